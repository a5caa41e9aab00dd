"""Many at once, and much in all: group commit, memory that does not grow, reading while it is written."""

from __future__ import annotations

import asyncio
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from ledger_world import accept, ask, assert_balanced, at, end_of, enter_all, entry, facts, intend, new_task, opened
from programs import ROOT

from evolink_async.ledger import JobLedger, Row, State, open_ledger
from evolink_async.ledger import job as job_module
from evolink_async.types import Task

MANY = 1000


def counted_turns(job: JobLedger) -> list[int]:
    """How many rows each turn from now on writes."""
    assert job._turns is not None
    store: Any = job._turns._store
    original, turns = store.carry_out, list[int]()

    def carry_out(batch: Any) -> Any:
        turns.append(len(batch.rows))
        return original(batch)

    store.carry_out = carry_out
    return turns


async def test_a_thousand_writers_share_a_few_commits_and_each_is_durable(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(3 * MANY)) as job:
        turns = counted_turns(job)
        gone_through = 0

        async def one(number: int) -> Row:
            nonlocal gone_through
            known = await job.enter(entry(f"k{number}", number))
            row = known.row
            assert await intend(job, row, body=b"body of %d" % number) is None
            # The future is done: it is on disk, whoever looks.
            if number % 100 == 0:
                assert ask(path, "SELECT state FROM request WHERE identity = ?", f"k{number}") == [("sending",)]
            task = new_task()
            await accept(job, row, task, at=at(1))
            await job.ended(row, end_of(task), at=at(2))
            gone_through += 1
            return row

        rows = await asyncio.gather(*(one(number) for number in range(MANY)))
        assert gone_through == MANY
        assert len(turns) < MANY / 10
        assert max(turns) > MANY / 10
        before = {row.identity: facts(row) for row in rows}
    assert_balanced(path)
    del rows
    async with opened(path) as job:
        known = await enter_all(job, [entry(f"k{number}", number) for number in range(MANY)])
        assert {one.row.identity: facts(one.row) for one in known} == before
    bodies = ask(path, "SELECT identity, body FROM request JOIN body ON request = request.id")
    assert sorted(bodies) == sorted((f"k{number}", b"body of %d" % number) for number in range(MANY))


async def test_two_jobs_write_to_one_ledger_at_once(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path, "one") as one, opened(path, "other") as other:

        async def write(job: JobLedger, number: int) -> None:
            known = await job.enter(entry(f"k{number}", number))
            await intend(job, known.row)
            await accept(job, known.row, new_task(), at=at())

        await asyncio.gather(*(write(job, number) for job in (one, other) for number in range(100)))
    for name in ("one", "other"):
        assert_balanced(path, name)
    assert ask(path, "SELECT state, count(*) FROM request GROUP BY state") == [("accepted", 200)]


async def test_rows_that_nobody_holds_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_KNOWN_LONGER", 1)
    for path in (tmp_path / "job.db", None):
        async with opened(path) as job:
            for start in range(0, 500, 100):
                for known in await enter_all(
                    job, [entry(f"k{number}", number) for number in range(start, start + 100)]
                ):
                    task = new_task()
                    intend(job, known.row)
                    accept(job, known.row, task, at=at(1))
                    await job.ended(known.row, end_of(task), at=at(2))
                    job.let_go(known.row)
                del known
            assert len(job._rows) <= 1


async def test_a_row_that_is_held_again_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_KNOWN_LONGER", 1)
    async with opened(None) as job:
        held = (await job.enter(entry("again", 0))).row
        job.let_go(held)
        assert (await job.enter(entry("again", 0))).row is held
        for number in range(1, 4):
            job.let_go((await job.enter(entry(f"k{number}", number))).row)
        assert (await job.enter(entry("again", 0))).row is held
        job.let_go(held)
        assert len(job._rows) == 1


async def test_many_requests_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    """In a process of its own, whose memory can be measured."""
    count = 20_000
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        *(str(Path(__file__).parent / "big_job_program.py"), str(tmp_path / "job.db"), str(count)),
        env={"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await program.communicate()
    assert program.returncode == 0
    told = json.loads(output)
    # It holds one batch at a time, and remembers how often each of the last 10,000 contents came.
    assert told["grown_in_the_first_run"] < 8e6
    assert told["grown_in_the_second_run"] < 8e6
    assert told["delivered"] == told["requests"] == count
    assert told["bytes_per_request"] < 1_000


async def test_a_running_job_can_be_looked_at(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job, open_ledger(path) as ledger:
        looked = 0

        async def look() -> None:
            nonlocal looked
            while looked < 20:
                stats = await ledger.job().stats()
                assert sum(stats.counts.values()) == stats.requests
                rows = [row async for row in ledger.job().rows()]
                assert len(rows) >= stats.requests
                looked += 1

        looking = asyncio.create_task(look())
        number = 0
        while not looking.done():
            for known in await enter_all(job, [entry(f"k{number + more}", more) for more in range(20)]):
                intend(job, known.row)
                await accept(job, known.row, Task(id=f"task-{known.row.id}"), at=at())
                assert known.row.state is State.ACCEPTED
            number += 20
        await looking
