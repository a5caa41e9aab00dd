"""A real process of the real pool is killed, over real sockets: at random, at every named point, beside another one.

KILLS=100 KILL_REQUESTS=1000 KILL_POINTS=all KILL_LEDGERS="file postgresql" pytest tests/kills    # the whole of it

`killing.py` tells more.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kill_points import POINTS
from killing import POSTS, PRICE, Job, random_kills, service, set_faults
from postgres import Postgres, is_postgres

KILLS = int(os.environ.get("KILLS", "4"))
REQUESTS = int(os.environ.get("KILL_REQUESTS", "100"))
LEDGERS = os.environ.get("KILL_LEDGERS", "file").split()
# A process or three for each: in every run of the suite only these, the others by the environment.
IN_THE_SUITE = {
    *(("after intend", "replay"), ("before post", "replay"), ("after post", "hold"), ("before accepted", "replay")),
    *(("after ended", "hold"), ("before unsettled", "hold"), ("after replay", "replay")),
    ("outcome handed over", "replay"),
}
DIED_AGAIN = ("after replay", "before keys_are_honoured")  # while it was sent again, which is done once
NEVER_AGAIN = ("replay", "keys_are_honoured")  # verbs that are not come to where nothing is sent again
CHOSEN = [
    (point, policy)
    for point in POINTS
    for policy in ("replay", "hold")
    if (point, policy) in IN_THE_SUITE or os.environ.get("KILL_POINTS") == "all"
    if policy == "replay" or not point.endswith(NEVER_AGAIN)
]


@pytest.mark.timeout(600 + 10 * KILLS)
@pytest.mark.parametrize(
    ("lost_response", "new_ledger"),
    [
        ("replayed by a service that honours keys", "file"),
        ("held at a service that ignores them", "file"),
        ("replayed by a service that honours keys", "postgresql"),
    ],
    indirect=["new_ledger"],
)
async def test_a_job_that_is_killed_again_and_again_pays_for_no_request_twice_and_loses_none(
    tmp_path: Path, lost_response: str, new_ledger: Callable[[], Path | str]
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    hold = lost_response.startswith("held")
    kills = KILLS // 2 if is_postgres(new_ledger()) else KILLS
    job, judgement = await random_kills(
        tmp_path, kills=kills, requests=REQUESTS, hold=hold, honoured=not hold, seed=seed, new_ledger=new_ledger
    )
    print(job.kills_on_the_wire, "kills with a POST on the wire;", judgement)
    assert job.kills == kills
    assert job.accounted_for == (REQUESTS * PRICE, 0)
    if hold:
        assert judgement.replays == 0


async def test_a_job_whose_server_crashes_again_and_again_pays_for_no_request_twice_and_loses_none(
    tmp_path: Path, postgres: Postgres, postgres_url: str
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    where = {"new_ledger": lambda: postgres_url, "server": postgres}
    job, judgement = await random_kills(
        tmp_path, kills=KILLS // 4, requests=REQUESTS // 2, hold=False, honoured=True, seed=seed, **where
    )
    print(job.kills_on_the_wire, "crashes with a POST on the wire;", judgement)
    assert job.accounted_for == (REQUESTS // 2 * PRICE, 0)


async def test_a_job_whose_server_is_restarted_comes_to_its_end_in_one_run(
    tmp_path: Path, postgres: Postgres, postgres_url: str
) -> None:
    async with service() as base_url:
        job = Job(tmp_path, base_url, postgres_url, requests=100, rate=20, cap=float(100 * PRICE))
        async with job.run() as life:
            await life.entered.wait()
            for _ in range(2):
                await asyncio.sleep(1)
                await asyncio.to_thread(postgres.crash)
                await asyncio.to_thread(postgres.start)
            assert await life.end() == 0, life.errors
        job.note(life, killed=False)
        assert not life.told("reason")
        judgement = await job.judge(life)
    assert (judgement.tasks, judgement.posts, judgement.unknown) == (100, 100, 0)


# What has to go wrong so that a verb is come to; everything else is come to by itself.
WRONG: dict[str, list[dict[str, Any]]] = {
    "replay": [POSTS | {"drop": "after", "nth": [1, 3]}],
    "unsettled": [POSTS | {"drop": "after", "nth": [1, 3]}],
    "keys_are_honoured": [POSTS | {"drop": "after", "nth": [1]}],
    "posted_in_vain": [POSTS | {"status": 429, "headers": {"retry-after": "1"}, "nth": [1, 3]}],
    "rejected": [POSTS | {"status": 400, "nth": [1, 3]}],
    "lost": [{"path": "/v1/tasks", "status": 404, "younger_than": 1e9}],
}


@pytest.mark.parametrize("new_ledger", LEDGERS, indirect=True)
@pytest.mark.parametrize(("point", "policy"), CHOSEN)
async def test_killed_at_this_very_point_the_job_goes_on_without_loss(
    tmp_path: Path, point: str, policy: str, new_ledger: Callable[[], Path | str]
) -> None:
    hold, verb = policy == "hold", point.partition(" ")[2]
    count = 1 if verb == "keys_are_honoured" else 2  # that is proven once
    async with service(idempotency=not hold, faults=WRONG.get(verb, [])) as base_url:
        options = {"requests": 6, "hold": hold, "rate": 30, "cap": float(6 * PRICE), "lost_after": 0.5}
        job = Job(tmp_path, base_url, new_ledger(), **options)
        async with job.run(KILL_AT=f"{point}:{count}") as life:
            assert await life.end() == -signal.SIGKILL, "it did not come to this point"
        job.note(life, killed=True)
        await job.judge()
        if verb != "lost":
            await set_faults(base_url, [])
        async with job.run() as last:
            assert await last.end() == 0, last.errors
        job.note(last, killed=False)
        assert not last.told("reason")
        judgement = await job.judge(last)
        assert hold or judgement.unknown == (point in DIED_AGAIN)
        if point in ("after post", "before accepted", "before unsettled") and hold:
            assert judgement.unknown_with_task, "it was accepted, and nobody could know"


@pytest.mark.parametrize("new_ledger", LEDGERS, indirect=True)
async def test_a_second_process_is_told_who_runs_the_job_and_the_lock_of_a_killed_one_is_free_at_once(
    tmp_path: Path, new_ledger: Callable[[], Path | str]
) -> None:
    async with service() as base_url:
        job = Job(tmp_path, base_url, new_ledger(), requests=40, rate=1)
        async with job.run() as first:
            await first.entered.wait()
            async with job.run() as second:
                assert await second.end() == 3
            [message] = second.told("refused")
            print(message)
            assert re.fullmatch(
                rf"job 'default' of the ledger .* is in use by process {first.process.pid} on \S+ since "
                r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00; other jobs in the same (file|ledger) are free",
                message,
            )
            assert second.lines == [f"refused {second.lines[0].partition(' ')[2]}"]
            assert await first.kill()
        job.note(first, killed=True)
        job.options["rate"] = None
        began = time.perf_counter()
        async with job.run() as third:
            await third.entered.wait()
            print(f"free, and entered {time.perf_counter() - began:.2f} s after the kill, start of Python included")
            assert third.lines[0].startswith("entered")
            assert await third.end() == 0
        job.note(third, killed=False)
        await job.judge(third)


@pytest.mark.parametrize("new_ledger", LEDGERS, indirect=True)
async def test_of_four_processes_at_once_on_one_job_one_runs_it_and_the_others_are_told(
    tmp_path: Path, new_ledger: Callable[[], Path | str]
) -> None:
    async with service() as base_url:
        job = Job(tmp_path, base_url, new_ledger(), requests=30, rate=10)

        async def one() -> tuple[int, list[Any]]:
            async with job.run() as life:
                return await life.end(), life.told("refused")

        ends = await asyncio.gather(*(one() for _ in range(4)))
        async with job.run() as last:
            await last.end()
        await job.judge(last)
    assert sum(code == 0 for code, _ in ends) >= 1
    assert all("is in use by process" in refused[0] for code, refused in ends if code)
