"""`open_ledger`: looking at a job, and settling what is unknown."""

from __future__ import annotations

import asyncio
import functools
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from ledger_world import (
    MODEL,
    accept,
    as_nobody,
    ask,
    assert_balanced,
    at,
    end_of,
    enter_all,
    entered,
    entry,
    facts,
    intend,
    kill,
    new_task,
    opened,
    row_in,
)
from loop_executor import in_loop

from evolink_async import ClosedError, ConfigurationError, InvalidRequestError, LedgerError, open_ledger
from evolink_async.ledger import LedgerJob, State, Todo, open_job, what_to_do
from evolink_async.ledger.file import FileDatabase
from evolink_async.ledger.reports import PAGE, Cost, page_of_rows


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)


@pytest.fixture
async def path(ledger_url: Path | str) -> Path | str:
    """A ledger with one request in each state."""
    path = ledger_url
    async with opened(path) as job:
        for state in State:
            await row_in(job, state, state.value)
    return path


@asynccontextmanager
async def looking(path: Path | str, name: str = "default") -> AsyncIterator[LedgerJob]:
    async with open_ledger(path) as ledger:
        yield ledger.job(name)


async def test_stats_say_how_a_job_stands(path: Path | str) -> None:
    async with looking(path) as job:
        stats = await job.stats()
    assert stats.counts == {state.value: 1 for state in State}
    assert (stats.name, stats.requests, stats.runs) == ("default", len(State), 1)
    # sending, unsettled, replaying, accepted, cancelled, lost, given_up hold 2.5 each
    assert (stats.credits_spent, stats.credits_reserved) == (Decimal("2.5"), Decimal("17.5"))
    assert (stats.unknown, stats.credits_at_risk) == (3, Decimal("7.5"))
    assert stats.created_at.tzinfo is UTC


async def test_what_is_unknown_is_listed_with_what_it_takes_to_look_for_it(path: Path | str) -> None:
    async with looking(path) as job:
        unknown = {request.identity: request for request in await job.unknown()}
    assert unknown.keys() == {"sending", "unsettled", "replaying"}
    lost = unknown["unsettled"]
    assert (lost.key, lost.model, lost.endpoint, lost.state) == (
        *("unsettled", MODEL, "/v1/images/generations", "unsettled"),
    )
    assert (lost.reason, lost.credits, lost.submitted_at, lost.task_id) == ("cut", Decimal("2.5"), at(), None)
    assert lost.idempotency_key is not None
    assert lost.idempotency_key.startswith("ea-")


async def test_what_was_sent_twice_is_unknown_until_the_service_has_proven_that_it_honours_keys(
    ledger_url: Path | str,
) -> None:
    path = ledger_url
    async with opened(path) as job:
        again = await row_in(job, State.REPLAYING, "again")
        await accept(job, again, new_task(task_id="task-perhaps-second"), at=at(3))
        retried = await row_in(job, State.REPLAYING, "retried")
        task = new_task()
        await accept(job, retried, task, at=at(3))
        await job.ended(retried, end_of(task, "failed", code="service_error"), at=at(4))
        await intend(job, retried)
        await accept(job, retried, new_task(), at=at(5))
    async with looking(path) as look:
        [first, second] = await look.unknown()
        assert (first.identity, first.state, first.task_id) == ("again", "accepted", "task-perhaps-second")
        # Its former try was.
        assert (second.identity, second.task_id, second.submitted_at) == ("retried", task.id, at())
        assert (await look.stats()).unknown == 2
    async with opened(path) as job:
        await job.keys_are_honoured()
    async with looking(path) as look:
        assert await look.unknown() == []


async def test_costs_are_told_by_model_and_day_and_over_all_tries(ledger_url: Path | str) -> None:
    path = ledger_url
    day = 86_400
    async with opened(path) as job:
        for number, (model, when, end) in enumerate(
            [("a", 0, "completed"), ("a", 0, "failed"), ("a", day, "completed"), ("b", day, "cancelled")]
        ):
            row = await entered(job, f"k{number}")
            row.common = row.common._replace(model=model)
            await intend(job, row, at=at(when))
            task = new_task()
            await accept(job, row, task, at=at(when))
            await job.ended(row, end_of(task, end), at=at(when))
        await accept(job, row, new_task(), at=at(2 * day))  # a second task for the last one
        await entered(job, "never sent")
    async with looking(path) as look:
        assert await look.costs() == [
            Cost(model=model, day=date(2026, 11, day), tasks=1, credits_spent=spent, credits_reserved=reserved)
            for model, day, spent, reserved in [
                ("a", 20, Decimal("2.5"), 0),
                ("a", 21, Decimal("2.5"), 0),
                ("b", 21, 0, Decimal("2.5")),
                ("b", 22, 0, Decimal("2.5")),
            ]
        ]


async def test_rows_come_in_the_order_they_were_pulled_page_by_page(ledger_url: Path | str) -> None:
    path = ledger_url
    count = 2 * PAGE + 3
    async with opened(path) as job, opened(path, "other") as other:
        known = await enter_all(job, [entry(f"k{number}", number) for number in range(count)])
        await enter_all(other, [entry(f"x{number}", number) for number in range(10)])
        done = known[PAGE + 1].row
        await intend(job, done)
        task = new_task()
        await accept(job, done, task, at=at())
        await job.ended(done, end_of(task), at=at())
        before = facts(done)
    async with looking(path) as look:
        assert [row.identity async for row in look.rows()] == [f"k{number}" for number in range(count)]
        [row] = [row async for row in look.rows("completed", "failed")]
        assert facts(row) == before
        with pytest.raises(InvalidRequestError, match="no state 'done'; there are entered, sending"):
            [row async for row in look.rows("done")]


async def test_a_page_of_rows_costs_the_same_in_a_long_job(quick_path: Path) -> None:
    """SQLite would gladly sort the whole job for each page."""
    path, steps = quick_path / "job.db", []
    for more in range(2):
        async with opened(path) as job:
            await enter_all(job, [entry(f"k{more}-{number}", number) for number in range(3 * PAGE)])
        with closing(FileDatabase(path)) as database:
            database.look()
            passed: list[int] = []
            database._connection.set_progress_handler(functools.partial(passed.append, 0), 10)  # it gives None: go on
            assert len(page_of_rows(database, "default", 0, [])) == PAGE
            steps.append(len(passed))
    assert steps[1] < 1.2 * steps[0]


async def test_jobs_are_told_by_name_and_one_that_is_not_there_is_said_so(path: Path | str) -> None:
    async with opened(path, "second"):
        pass
    async with open_ledger(path) as ledger:
        assert await ledger.jobs() == ["default", "second"]
        for question in ("stats", "unknown", "costs"):
            with pytest.raises(LedgerError, match="no job 'third'; its jobs: 'default', 'second'"):
                await getattr(ledger.job("third"), question)()
        with pytest.raises(LedgerError, match="no job 'third'"):
            await ledger.job("third").resolve("k", give_up=True)
        assert await ledger.jobs() == ["default", "second"]


async def test_a_ledger_is_open_in_its_block_only(path: Path | str) -> None:
    ledger = open_ledger(path)
    with pytest.raises(ClosedError, match="async with open_ledger"):
        await ledger.jobs()
    async with ledger:
        await ledger.jobs()
        with pytest.raises(ConfigurationError, match="open already"):
            async with ledger:
                pass
    with pytest.raises(ClosedError):
        await ledger.job().stats()
    async with ledger:
        assert await ledger.jobs()
    assert not isinstance(path, Path) or [other.name for other in path.parent.iterdir()] == ["job.db"]


async def test_what_a_running_program_has_on_the_wire_is_not_unknown(path: Path | str) -> None:
    async with opened(path) as job, looking(path) as look:
        await row_in(job, State.SENDING, "on the wire")
        stats = await look.stats()
        # The others on the wire are those of the program that ended, unsettled since this one has begun.
        assert {request.identity for request in await look.unknown()} == {"sending", "unsettled", "replaying"}
        assert stats.unknown == 3
        assert stats.counts["sending"] == 1
        assert stats.in_use_by is not None
        assert stats.in_use_by.startswith("this process since 20")
    async with looking(path) as look:
        assert "on the wire" in {request.identity for request in await look.unknown()}
        assert (await look.stats()).in_use_by is None


async def test_what_was_sent_is_told_by_its_prompt_where_it_has_one(ledger_url: Path | str) -> None:
    path = ledger_url
    bodies = {"words": b'{"prompt": "a lighthouse"}', "none": b'{"model": "m"}', "list": b"[1]", "broken": b"\xff{"}
    async with opened(path) as job:
        for key, body in bodies.items():
            row = await entered(job, key, key)
            await intend(job, row, body=body)
            await job.unsettled(row, code=None, error="cut")
    async with looking(path) as look:
        prompts = {request.identity: request.prompt for request in await look.unknown()}
    assert prompts == {"words": "a lighthouse", "none": None, "list": None, "broken": None}


async def test_a_request_is_found_by_its_identity(path: Path | str) -> None:
    async with looking(path) as job:
        row = await job.find("completed")
        assert row is not None
        assert (row.state, row.spent) == (State.COMPLETED, 2_500_000)
        assert await job.find("nobody") is None
        for nothing in (None, 5, "\ud800"):
            with pytest.raises(InvalidRequestError, match="named by its identity"):
                await job.find(nothing)  # type: ignore[arg-type]


async def test_a_ledger_knows_the_tasks_of_all_its_jobs_and_tries(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job, opened(path, "other") as other:
        row = await entered(job, "k")
        await intend(job, row)
        await accept(job, row, new_task(task_id="task-first"), at=at())
        await accept(job, row, new_task(task_id="task-second"), at=at())
        theirs = await entered(other, "x")
        await intend(other, theirs)
        await accept(other, theirs, new_task(task_id="task-theirs"), at=at())
        await row_in(job, State.UNSETTLED, "unsettled")
    async with open_ledger(path) as ledger:
        many = [f"task-{number}-of-nobody" for number in range(2_000)]
        known = {"task-first", "task-second", "task-theirs"}
        assert await ledger.knows([*many, *known]) == known
        assert await ledger.knows([]) == set()
        with pytest.raises(InvalidRequestError, match="several ids"):
            await ledger.knows("task-first")
        for task_id, owner in (("task-theirs", "'x' of job 'other'"), ("task-second", "'k'$"), ("task-first", "'k'$")):
            with pytest.raises(InvalidRequestError, match=f"{task_id} belongs to the request {owner}"):
                await ledger.job().resolve("unsettled", task_id=task_id)


# Resolving


async def known_next_run(path: Path | str, key: str) -> tuple[Todo, Any]:
    async with opened(path) as job:
        known = await job.enter(entry(key, key))
        return what_to_do(known), known.row


@pytest.mark.parametrize("key", ["unsettled", "sending", "replaying", "given_up"])
async def test_one_whose_task_is_found_is_polled_on(path: Path | str, key: str) -> None:
    async with looking(path) as job:
        row = await job.resolve(key, task_id="task-found")
        assert (row.state, row.task_id) == (State.ACCEPTED, "task-found")
    todo, row = await known_next_run(path, key)
    assert todo is Todo.FOLLOW
    assert (row.task_id, row.credits) == ("task-found", 2.5)
    assert_balanced(path)


@pytest.mark.parametrize("key", ["unsettled", "sending", "replaying", "given_up"])
async def test_one_that_was_not_accepted_is_submitted_again_and_its_credits_are_free(
    path: Path | str, key: str
) -> None:
    async with looking(path) as job:
        before = (await job.stats()).credits_reserved
        await job.resolve(key, submitted=False)
        assert before - (await job.stats()).credits_reserved == Decimal("2.5")
    todo, row = await known_next_run(path, key)
    assert todo is Todo.SUBMIT
    assert (row.losses, row.replayed, row.credits) == (0, False, None)


@pytest.mark.parametrize("key", ["unsettled", "sending", "replaying", "given_up"])
async def test_one_that_is_given_up_is_never_sent_again_and_keeps_its_credits(path: Path | str, key: str) -> None:
    async with looking(path) as job:
        before = (await job.stats()).credits_reserved
        await job.resolve(key, give_up=True)
        assert key not in {request.identity for request in await job.unknown()}
        assert (await job.stats()).credits_reserved == before
    todo, row = await known_next_run(path, key)
    assert todo is Todo.HOLD
    assert row.state is State.GIVEN_UP


@pytest.mark.parametrize("key", ["entered", "accepted", "completed", "failed", "cancelled", "lost", "rejected"])
async def test_only_what_is_unknown_can_be_resolved(path: Path | str, key: str) -> None:
    before = ask(path, "SELECT * FROM request WHERE identity = ?", key)
    async with looking(path) as job:
        for how in ({"task_id": "task-x"}, {"submitted": False}, {"give_up": True}):
            with pytest.raises(InvalidRequestError, match=f"'{key}' is {key}"):
                await job.resolve(key, **how)  # type: ignore[arg-type]
    assert ask(path, "SELECT * FROM request WHERE identity = ?", key) == before


@pytest.mark.parametrize(
    "how",
    [
        *({}, {"task_id": "t", "give_up": True}, {"submitted": True}, {"submitted": False, "give_up": True}),
        *({"submitted": "no"}, {"give_up": "yes"}, {"task_id": "t", "submitted": False}, {"give_up": None}),
    ],
)
async def test_resolving_takes_one_word(path: Path | str, how: dict[str, Any]) -> None:
    async with looking(path) as job:
        with pytest.raises(InvalidRequestError, match="give one of"):
            await job.resolve("unsettled", **how)


async def test_a_task_id_is_checked_before_anything_is_changed(path: Path | str) -> None:
    [(taken,)] = ask(path, "SELECT task_id FROM request WHERE identity = 'completed'")
    async with looking(path) as job:
        with pytest.raises(InvalidRequestError, match="belongs to the request 'completed'"):
            await job.resolve("unsettled", task_id=taken)
        for nothing in ("../etc/passwd", "", 5):
            with pytest.raises(InvalidRequestError, match="no task id"):
                await job.resolve("unsettled", task_id=nothing)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="named by its identity"):
            await job.resolve(None, give_up=True)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="has no request 'nobody'"):
            await job.resolve("nobody", give_up=True)
    assert (await known_next_run(path, "unsettled"))[0] is Todo.SETTLE


async def test_many_are_resolved_at_once_and_no_task_becomes_that_of_two(path: Path | str) -> None:
    names = [f"unsettled {number}" for number in range(20)]
    async with opened(path) as job:
        for name in names:
            await row_in(job, State.UNSETTLED, name)
    async with looking(path) as look:
        told = (look.resolve(name, task_id="task-found") for name in names)
        settled = await asyncio.gather(*told, return_exceptions=True)
        refused = [error for error in settled if isinstance(error, InvalidRequestError)]
        assert len(refused) == 19
        assert all("belongs to the request 'unsettled 0'" in str(error) for error in refused)
        await asyncio.gather(*(look.resolve(name, submitted=False) for name in names[1:]))
        assert [request.key for request in await look.unknown() if request.key in names] == []


async def test_resolving_is_no_run_and_not_possible_during_one(path: Path | str) -> None:
    async with looking(path) as look:
        runs = (await look.stats()).runs
        await look.resolve("unsettled", give_up=True)
        assert (await look.stats()).runs == runs
        async with opened(path):
            with pytest.raises(LedgerError, match="in use by this process"):
                await look.resolve("sending", give_up=True)
    assert await known_next_run(path, "sending")


async def test_a_job_that_died_is_recovered_by_who_resolves(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path)
    await row_in(job, State.SENDING, "k")
    kill(job)
    async with looking(path) as look:
        assert [request.state for request in await look.unknown()] == ["sending"]
        await look.resolve("k", submitted=False)
        assert await look.unknown() == []


# Where nothing may be written


@contextmanager
def read_only(folder: Path, *, also_folder: bool = True) -> Iterator[None]:
    """Takes away the right to write, and sees that nothing was written."""
    before = contents(folder)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555 if also_folder else 0o755)
    try:
        yield
        assert contents(folder) == before
    finally:
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith("-shm")}


async def one_of_each(path: Path | str) -> None:
    async with opened(path) as job:
        for state in State:
            await row_in(job, state, state.value)


@pytest.mark.parametrize("also_folder", [True, False], ids=["folder too", "file alone"])
async def test_a_ledger_that_may_not_be_written_to_is_looked_at_and_nothing_is_left_beside_it(
    also_folder: bool,
) -> None:
    with as_nobody() as folder:
        await one_of_each(folder / "job.db")
        names = {file.name for file in folder.iterdir()}
        with read_only(folder, also_folder=also_folder):
            async with looking(folder / "job.db") as job:
                assert (await job.stats()).requests == len(State)
                assert {row.state async for row in job.rows()} == set(State)
                assert len(await job.unknown()) > 0
                assert await job.costs()
            with pytest.raises(LedgerError):
                await resolve_first(folder / "job.db")
            assert {file.name for file in folder.iterdir()} == names


async def resolve_first(path: Path | str) -> None:
    async with looking(path) as job:
        await job.resolve((await job.unknown())[0].identity, give_up=True)


async def test_what_a_killed_program_wrote_last_is_seen_where_nothing_may_be_written() -> None:
    with as_nobody() as folder:
        living, dead = folder / "living", folder / "dead"
        living.mkdir()
        await one_of_each(living / "job.db")
        async with opened(living / "job.db") as job:
            await row_in(job, State.COMPLETED, "last")
            shutil.copytree(living, dead)  # with the log and its index, as a power cut leaves them
        with read_only(dead):
            async with looking(dead / "job.db") as job:
                assert await job.find("last") is not None
        (dead / "job.db-shm").unlink()
        with read_only(dead), pytest.raises(LedgerError, match=r"in 'job.db-wal', .* copy both files"):
            async with looking(dead / "job.db"):
                pass


async def test_a_look_without_locks_is_refused_when_somebody_begins_to_write() -> None:
    with as_nobody() as folder:
        path = folder / "job.db"
        await one_of_each(path)
        path.chmod(0o444)
        async with looking(path) as job:
            assert (await job.stats()).requests == len(State)
            path.chmod(0o644)
            async with opened(path) as running:
                await row_in(running, State.COMPLETED, "new")
                path.chmod(0o444)
                with pytest.raises(LedgerError, match=r"somebody has begun to write .* look again"):
                    await job.stats()
                async with looking(path) as again:
                    assert (await again.stats()).requests == len(State) + 1
                    assert (await again.stats()).in_use_by is not None
                path.chmod(0o644)


async def test_an_older_ledger_that_may_not_be_written_to_is_refused_with_what_to_do() -> None:
    with as_nobody() as folder:
        path = folder / "job.db"
        await one_of_each(path)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 1")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with read_only(folder), pytest.raises(LedgerError, match=r"has version 1 .* copy it into a folder"):
            async with looking(path):
                pass


async def test_a_ledger_that_may_not_even_be_read_is_one_sentence() -> None:
    with as_nobody() as folder:
        await one_of_each(folder / "job.db")
        (folder / "job.db").chmod(0)
        with pytest.raises(LedgerError, match="cannot be opened for reading: Permission denied"):
            async with looking(folder / "job.db"):
                pass
