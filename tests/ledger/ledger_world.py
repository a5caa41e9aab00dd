"""The world of the ledger's tests: requests, answers, a ledger in any state."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from postgres import ask

from evolink_async.ledger import Entered, Entry, JobLedger, Refusal, Row, State, open_job
from evolink_async.types import Task

ENDPOINT, MODEL = "/v1/images/generations", "gpt-4o-image"
START = datetime(2026, 11, 20, 12, tzinfo=UTC)
PRINT = "0123456789abcdef"  # the fingerprint of an API key

_tasks = itertools.count(1)


def content(body: object) -> bytes:
    """What stands for a body."""
    return hashlib.sha256(repr(body).encode()).digest()[:8]


def entry(key: str | None = None, body: object = 0) -> Entry:
    return Entry(key, content(body), ENDPOINT, MODEL)


def at(seconds: float = 0) -> datetime:
    return START + timedelta(seconds=seconds)


def new_task(reserved: float | None = 2.5, task_id: str | None = None) -> Task:
    """A task as the service tells of it when it has accepted a request."""
    wire: dict[str, Any] = {"id": task_id or f"task-{next(_tasks)}", "status": "pending", "model": MODEL}
    if reserved is not None:
        wire["usage"] = {"credits_reserved": reserved}
    return Task.model_validate(wire)


def task_of(row: Row) -> Task:
    """The task of a request that was accepted, as one who only knows its id would have it."""
    assert row.task_id is not None
    return Task(id=row.task_id)


def end_of(task: Task, status: str = "completed", used: float | None = None, code: str = "unknown_error") -> Task:
    """The same task as it is told of when it has ended."""
    wire: dict[str, Any] = {"id": task.id, "status": status, "model": MODEL}
    if used is not None:
        wire["usage"] = {"credits_used": used}
    if status == "completed":
        wire["results"] = [f"https://files.example/{task.id}.png"]
    elif status == "failed":
        wire["error"] = {"code": code, "message": "it did not work"}
    return Task.model_validate(wire)


@asynccontextmanager
async def opened(path: Path | str | None, name: str = "default", **options: Any) -> AsyncIterator[JobLedger]:
    """A run of a job, closed at the end."""
    job = await open_job(path, name, **options)
    try:
        yield job
    finally:
        await job.aclose()


def enter_all(job: JobLedger, entries: Iterable[Entry]) -> asyncio.Future[list[Entered]]:
    """What is known of each; all are asked for at once."""
    return asyncio.gather(*map(job.enter, entries))


async def entered(job: JobLedger, key: str | None = None, body: object = 0) -> Row:
    known = await job.enter(entry(key, body))
    return known.row


def intend(job: JobLedger, row: Row, **options: Any) -> asyncio.Future[Refusal | None]:
    told = {
        "idempotency_key": f"ea-{getattr(row, 'id', 0):032x}",
        "body": b'{"model": "gpt-4o-image"}',
        "fingerprint": PRINT,
        "at": at(),
        "price": "image",
        "told": Decimal("2.5"),
    }
    return job.intend(row, **told | options)


def accept(job: JobLedger, row: Row, task: Task, **options: Any) -> asyncio.Future[bool]:
    return job.accepted(row, task.id, reserved=task.usage.credits_reserved, **options)


async def row_in(job: JobLedger, state: State, key: str) -> Row:
    """A request that has gone the shortest way to a state."""
    row = await entered(job, key, key)
    if state is State.ENTERED:
        return row
    if state is State.REJECTED:
        await job.rejected(row, code="bad_size", error="no such size")
        return row
    assert await intend(job, row) is None
    if state is State.SENDING:
        return row
    if state in (State.UNSETTLED, State.REPLAYING, State.GIVEN_UP):
        await job.unsettled(row, code=None, error="cut")
        if state is State.REPLAYING:
            assert await job.replay(row)
        if state is State.GIVEN_UP:
            await job.given_up(row)
        return row
    task = new_task()
    assert await accept(job, row, task, at=at(1))
    if state is State.LOST:
        await job.lost(row, error="404 three times", at=at(2))
    elif state is not State.ACCEPTED:
        await job.ended(row, end_of(task, state.value), at=at(2))
    return row


def kill(job: JobLedger) -> None:
    """As if the process were gone: what is not on disk by now will never be. For ledgers in the loop."""
    turns = job._turns
    assert turns is not None
    turns._reading, turns._sums_changed, turns._closing = [], False, True
    turns._store.close()


def facts(row: Row) -> tuple[Any, ...]:
    """All that a ledger keeps of a row, as plain values."""
    ended = row.state in (State.COMPLETED, State.FAILED, State.CANCELLED)
    task = row.task.raw if row.task is not None and ended else None
    return (
        *(row.identity, row.keyed, row.content, row.endpoint, row.model, row.state, row.number, row.attempts),
        *(row.losses, row.replayed, row.idempotency_key, row.fingerprint, row.task_id, row.reserved, row.spent),
        *(row.submitted_at, row.ended_at, row.error_code, row.error, row.past, row.files, json.dumps(task)),
    )


def sums_on_disk(path: Path | str, name: str = "default") -> tuple[int, int, int, int]:
    """Reserved and spent: as the job says, and as its rows and past tries add up to."""
    [job] = ask(path, "SELECT id, reserved, spent FROM job WHERE name = ?", name)
    [rows] = ask(path, "SELECT coalesce(sum(reserved), 0), coalesce(sum(spent), 0) FROM request WHERE job = ?", job[0])
    [past] = ask(
        path,
        "SELECT coalesce(sum(past_try.reserved), 0), coalesce(sum(past_try.spent), 0) FROM past_try "
        "JOIN request ON request.id = past_try.request WHERE job = ?",
        job[0],
    )
    return job[1], job[2], rows[0] + past[0], rows[1] + past[1]


def assert_balanced(path: Path | str, name: str = "default") -> None:
    reserved, spent, of_rows, spent_of_rows = sums_on_disk(path, name)
    assert (reserved, spent) == (of_rows, spent_of_rows)


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder, and no rights but those of others to it; for root itself nothing is forbidden."""
    with tempfile.TemporaryDirectory(prefix="evolink-test-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        if os.geteuid() != 0:
            yield folder
            return
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)
