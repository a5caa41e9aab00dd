"""kill -9, for real: a process that plays the pool's part is killed at random moments, and the file is judged."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from ledger_world import ask, assert_balanced, opened, sums_on_disk
from postgres import is_postgres
from programs import ROOT

HERE = Path(__file__).parent
KILLS = int(os.environ.get("LEDGER_KILLS", "8"))
REQUESTS = 600 + 100 * KILLS


async def started(path: Path | str, folder: Path) -> asyncio.subprocess.Process:
    names = [str(path), str(folder / "book"), str(folder / "told")]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(str(HERE / "kill_program.py"), *names, str(REQUESTS)),
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def judge(path: Path | str, folder: Path) -> None:
    """What was told to be durable is there, and nobody was charged twice."""
    assert isinstance(path, str) or ask(path, "PRAGMA integrity_check") == [("ok",)]
    assert_balanced(path)
    rows = {row[0]: row[1:] for row in ask(path, "SELECT identity, state, task_id, idempotency_key FROM request")}
    bodies = {identity for (identity,) in ask(path, "SELECT identity FROM request JOIN body ON request = request.id")}
    for verb, identity, what in lines(folder / "told"):
        state, task_id, key = rows[identity]
        if verb == "accepted":
            assert task_id == what, identity
            assert state not in ("entered", "sending", "unsettled", "replaying"), identity
        else:
            assert state != "entered", identity
            assert key == what, identity
            assert identity in bodies
    charges = Counter(identity for identity, _, _ in lines(folder / "book"))
    assert max(charges.values(), default=0) <= 1
    intended = {identity for identity, (state, _, _) in rows.items() if state != "entered"}
    assert charges.keys() <= intended  # never a POST without a durable intent


@pytest.mark.timeout(600 + 20 * KILLS)
async def test_whatever_was_durable_survives_kill_9_at_any_moment(ledger_url: Path | str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown if it fails; the processes have their own chance
    chance = random.Random(seed)
    kills = KILLS // 4 if is_postgres(ledger_url) else KILLS
    killed_before_the_end = 0
    for _ in range(kills):
        process = await started(ledger_url, tmp_path)
        await asyncio.sleep(chance.expovariate(1 / 0.25))
        killed_before_the_end += process.returncode is None
        if process.returncode is None:
            process.kill()
        await process.wait()
        judge(ledger_url, tmp_path)
    process = await started(ledger_url, tmp_path)
    await process.communicate()
    assert process.returncode == 0
    judge(ledger_url, tmp_path)
    counts = dict(ask(ledger_url, "SELECT state, count(*) FROM request GROUP BY state"))
    unsettled = counts.pop("unsettled", 0)
    assert counts == {"completed": REQUESTS - unsettled}
    assert sum(sums_on_disk(ledger_url)[:2]) == REQUESTS * 3_000_000
    assert killed_before_the_end >= kills // 3, "it was done before it was killed: give it more requests"
    async with opened(ledger_url) as job:
        assert job.run == kills + 2
        assert job.interrupted == 0
