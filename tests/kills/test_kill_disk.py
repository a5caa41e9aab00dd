"""The disk is full, for real, while a process of the real pool writes to its ledger."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import POSTS, PRICE, Job, book_of, service


def _can_mount() -> bool:
    """Whether a small file system of our own can be had, which takes a privilege."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    test = "d=$(mktemp -d) && mount -t tmpfs -o size=1m tmpfs $d && umount $d; rmdir $d"
    return subprocess.run(["sh", "-c", test], capture_output=True, check=False).returncode == 0


HOWS = ["no file may grow", *(["a file system is full"] if _can_mount() else [])]


@pytest.fixture(params=HOWS)
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder for the ledger that can become full. `kill_points` sees by the filler how."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param != HOWS[-1] or len(HOWS) == 1:
        yield folder
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    try:
        (folder / "filler").touch()
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def job_on(disk: Path, base_url: str, **options: Any) -> Job:
    job = Job(disk, base_url, requests=8, rate=30, cap=float(8 * PRICE), **options)
    job.log = disk.parent / "log"  # on another disk
    return job


def empty(disk: Path) -> None:
    """There is room again."""
    if (disk / "filler").exists():
        os.truncate(disk / "filler", 0)


async def test_with_a_full_disk_nothing_is_sent_whose_intent_is_not_written(disk: Path) -> None:
    async with service() as base_url:
        job = job_on(disk, base_url)
        async with job.run(FULL_AT="before intend:4") as life:
            assert await life.end() == 0
        lines = job.lines()
        full = lines.index(["full"])
        intended = {line[1] for line in lines[:full] if line[0] == "intended"}
        assert len(intended) == 3
        assert {line[2] for line in lines if line[0] == "post"} == intended
        [(kind, message)] = life.told("reason")
        print(message)
        assert kind == "LedgerError"
        outcomes = {outcome["key"]: outcome for outcome in life.told("outcome")}
        assert len(outcomes) >= 3
        assert {key for key, outcome in outcomes.items() if outcome["status"] == "completed"} == intended
        assert {outcome["status"] for key, outcome in outcomes.items() if key not in intended} == {"not_submitted"}
        job.note(life, killed=True)  # what could not be written is as after a kill
        empty(disk)
        await job.judge()
        async with job.run() as last:
            assert await last.end() == 0
        job.note(last, killed=False)
        judgement = await job.judge(last)
        assert judgement.tasks == 8
        assert judgement.unknown == 0


@pytest.mark.parametrize("lost_response", ["replay", "hold"])
async def test_an_id_that_the_full_disk_does_not_take_is_logged_followed_and_found_again_or_unknown(
    disk: Path, lost_response: str
) -> None:
    hold = lost_response == "hold"
    # The answers come late, so that intents of others are not in the same turn.
    async with service(faults=[POSTS | {"delay": 0.02}]) as base_url:
        job = job_on(disk, base_url, hold=hold)
        async with job.run(FULL_AT="before accepted:3") as life:
            assert await life.end() == 0
        lines = job.lines()
        after = lines[lines.index(["full"]) :]
        written = {line[1] for line in lines[: -len(after)] if line[0] == "intended"}
        assert {line[2] for line in after if line[0] == "post"} <= written, "it submitted on"
        [(kind, message)] = life.told("reason")
        print(message)
        assert kind == "LedgerError"
        book = await book_of(base_url)
        sent = {line[2] for line in lines if line[0] == "post"}
        outcomes = {outcome["key"]: outcome for outcome in life.told("outcome")}
        assert {key for key, outcome in outcomes.items() if outcome["status"] == "completed"} == sent
        assert {outcome["task"] for outcome in outcomes.values()} - {None} == {
            post["task_id"] for post in book["posts"]
        }
        settled = {line[1] for line in lines if line[0] == "settled"}
        unwritten = {outcomes[key]["task"] for key in sent - settled}
        assert unwritten
        logged = {task for task in unwritten if task in life.errors}
        assert logged == unwritten, life.errors
        assert "and that is not in the ledger yet" in life.errors
        job.note(life, killed=True)
        empty(disk)
        await job.judge()
        async with job.run() as last:
            assert await last.end() == 0
        if hold:
            job.completed = {key: value for key, value in job.completed.items() if key in settled}
        job.note(last, killed=False)
        judgement = await job.judge(last)
        # An intent that was written, and whose taking back was not, is unknown too, but for nothing.
        assert judgement.tasks == 8 - judgement.unknown + judgement.unknown_with_task
        assert judgement.unknown_with_task == (len(unwritten) if hold else 0)


async def test_an_id_that_was_kept_in_memory_is_written_when_there_is_room_again(disk: Path) -> None:
    async with service(speed=40, faults=[POSTS | {"delay": 0.02}]) as base_url:
        job = job_on(disk, base_url, room_after=0.5)
        async with job.run(FULL_AT="before accepted:3") as life:
            assert await life.end() == 0
        [(kind, _)] = life.told("reason")
        assert kind == "LedgerError"
        assert "the ledger can be written again" in life.errors
        assert ["room"] in job.lines()
        job.note(life, killed=False)
        assert (await job.judge()).unknown == 0  # not one id had to be found again
        async with job.run() as last:
            assert await last.end() == 0
        job.note(last, killed=False)
        assert (await job.judge(last)).posts == 8
