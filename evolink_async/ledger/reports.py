"""What a ledger tells about its jobs: questions to an SQLite file, answered with plain values. All of it blocks."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from evolink_async.errors import InvalidRequestError, LedgerError
from evolink_async.ledger.sqlite import read_rows
from evolink_async.ledger.states import State
from evolink_async.ledger.values import Row, to_credits

PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStats:
    """How a job stands.

    requests: all that were ever pulled; counts: the same by state, see docs/ledger.md. credits_spent,
    credits_reserved: over all runs and tries. unknown: requests that may have been accepted, or paid for twice, and
    wait to be settled; credits_at_risk: what they hold. runs: how often the job was begun. created_at: aware UTC.
    """

    name: str
    requests: int
    counts: Mapping[str, int]
    credits_spent: Decimal
    credits_reserved: Decimal
    unknown: int
    credits_at_risk: Decimal
    runs: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownRequest:
    """A request of which it is not certain what it has cost.

    state: "unsettled": sent, and no answer settles whether a task exists; "sending", "replaying": its POST is on the
    wire now, or was when the program ended; anything else: it was sent twice, so there may be a second task besides
    `task_id`, since the service has not proven that it honours idempotency keys. Only the unsettled can be resolved.
    credits: what it holds, None if nobody has told. reason: what became of the answer. submitted_at: aware UTC.
    """

    identity: str
    key: str | None
    model: str
    endpoint: str
    state: str
    reason: str | None
    idempotency_key: str | None
    task_id: str | None
    credits: Decimal | None
    submitted_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model has cost on one day (UTC, of the submission; None: not submitted). tasks: tries paid or reserved."""

    model: str
    day: date | None
    tasks: int
    credits_spent: Decimal
    credits_reserved: Decimal


def job_names(connection: sqlite3.Connection) -> list[str]:
    """The jobs of a file, the oldest first."""
    return [name for (name,) in connection.execute("SELECT name FROM job ORDER BY id")]


def job_stats(connection: sqlite3.Connection, name: str) -> JobStats:
    """How a job stands at this moment."""
    job = _job(connection, name)
    connection.execute("BEGIN")  # one view of everything
    try:
        columns = "requests, spent, reserved, runs, created_at"
        [(requests, spent, reserved, runs, created_at)] = connection.execute(
            f"SELECT {columns} FROM job WHERE id = ?", (job,)
        )
        counts = dict(connection.execute("SELECT state, count(*) FROM request WHERE job = ? GROUP BY state", (job,)))
        unknown = unknown_requests(connection, name)
    finally:
        connection.execute("ROLLBACK")
    return JobStats(
        name=name,
        requests=requests,
        counts=counts,
        credits_spent=to_credits(spent),
        credits_reserved=to_credits(reserved),
        unknown=len(unknown),
        credits_at_risk=sum((request.credits or Decimal(0) for request in unknown), Decimal(0)),
        runs=runs,
        created_at=datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=created_at),
    )


def unknown_requests(connection: sqlite3.Connection, name: str) -> list[UnknownRequest]:
    """The requests of a job that are not certain, in the order they were first pulled."""
    job = _job(connection, name)
    [[keys_honoured]] = connection.execute("SELECT keys_honoured FROM job WHERE id = ?", (job,))
    open_states = (State.UNSETTLED, State.SENDING, State.REPLAYING)
    sent_twice = "replayed OR id IN (SELECT request FROM past_try WHERE replayed)"
    certain = "1" if keys_honoured else f"NOT ({sent_twice}) OR state = '{State.GIVEN_UP}'"
    where = f"job = ? AND (state IN (?, ?, ?) OR NOT ({certain})) ORDER BY id"
    return [_unknown(row) for row in read_rows(connection, where, (job, *open_states))]


def costs(connection: sqlite3.Connection, name: str) -> list[Cost]:
    """What a job has cost, by day and model."""
    job = _job(connection, name)
    day = "date(submitted_at / 1000000, 'unixepoch')"
    query = f"""
        SELECT model, day, count(*), sum(spent), sum(reserved) FROM (
            SELECT model, {day} AS day, coalesce(spent, 0) AS spent, coalesce(reserved, 0) AS reserved
            FROM request WHERE job = ?1 AND (spent > 0 OR reserved > 0)
            UNION ALL
            SELECT model, {day.replace("submitted_at", "past_try.submitted_at")},
                coalesce(past_try.spent, 0), coalesce(past_try.reserved, 0)
            FROM past_try JOIN request ON request.id = past_try.request
            WHERE job = ?1 AND (past_try.spent > 0 OR past_try.reserved > 0)
        ) GROUP BY day, model ORDER BY day, model"""
    return [
        Cost(
            model=model,
            day=date.fromisoformat(day) if day else None,
            tasks=tasks,
            credits_spent=to_credits(spent),
            credits_reserved=to_credits(reserved),
        )
        for model, day, tasks, spent, reserved in connection.execute(query, (job,))
    ]


def page_of_rows(connection: sqlite3.Connection, name: str, after: int, states: Sequence[str]) -> list[Row]:
    """The next requests of a job, in the order they were first pulled."""
    job = _job(connection, name)
    chosen = f"AND state IN ({', '.join('?' * len(states))})" if states else ""
    where = f"job = ? AND id > ? {chosen} ORDER BY id LIMIT {PAGE}"
    return read_rows(connection, where, (job, after, *states))


def refuse_taken(connection: sqlite3.Connection, name: str, identity: str, task_id: str) -> None:
    """Raise `InvalidRequestError` if a task is another request's."""
    job = _job(connection, name)
    query = "SELECT identity FROM request WHERE job = ? AND task_id = ? AND identity <> ?"
    for (other,) in connection.execute(query, (job, task_id, identity)):
        raise InvalidRequestError(f"task {task_id} belongs to the request {other!r}", param="task_id")


def _job(connection: sqlite3.Connection, name: str) -> int:
    for (job,) in connection.execute("SELECT id FROM job WHERE name = ?", (name,)):
        return int(job)
    names = ", ".join(map(repr, job_names(connection))) or "none"
    raise LedgerError(f"the ledger has no job {name!r}; its jobs: {names}")


def _unknown(row: Row) -> UnknownRequest:
    return UnknownRequest(
        identity=row.identity,
        key=row.key,
        model=row.model,
        endpoint=row.endpoint,
        state=row.state.value,
        reason=row.error,
        idempotency_key=row.idempotency_key,
        task_id=row.task_id,
        credits=row.credits,
        submitted_at=row.submitted_at,
    )
