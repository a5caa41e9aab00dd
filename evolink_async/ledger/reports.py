"""What a ledger tells about its jobs: questions to a database, answered with plain values. All of it blocks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from evolink_async.errors import InvalidRequestError, LedgerError
from evolink_async.ledger.database import Database
from evolink_async.ledger.states import State
from evolink_async.ledger.store import ids_of, marks, portions, read_rows, rows_named
from evolink_async.ledger.values import PastTry, Row, StoredRow, known_price, to_credits

PAGE = 500
_DAY = 24 * 60 * 60 * 1_000_000  # microseconds
_LATEST = 5000  # completed requests by which it is told how long a model takes
_IN_DOUBT = (State.UNSETTLED, State.SENDING, State.REPLAYING)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStats:
    """How a job stands.

    requests: all that were ever pulled; counts: the same by state, see docs/ledger.md. credits_spent,
    credits_reserved: over all runs and tries. unknown: requests that may have been accepted, or paid for twice, and
    wait to be settled; credits_at_risk: what they hold. runs: how often the job was begun. in_use_by: the process that
    runs it now, in words, None: none does. created_at: aware UTC.
    """

    name: str
    requests: int
    counts: Mapping[str, int]
    credits_spent: Decimal
    credits_reserved: Decimal
    unknown: int
    credits_at_risk: Decimal
    runs: int
    in_use_by: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownRequest:
    """A request of which it is not certain what it has cost.

    state: "unsettled": sent, and no answer settles whether a task exists; "sending", "replaying": its POST was on the
    wire when the program ended; anything else: it was sent twice, so there may be a second task besides `task_id`,
    since the service has not proven that it honours idempotency keys.
    credits: what it holds, None if nobody has told. reason: what became of the answer. submitted_at: aware UTC.
    prompt: of the body that was sent, where it has one and is still kept.
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
    prompt: str | None

    @property
    def resolvable(self) -> bool:
        """Whether `resolve` can settle it. What was sent twice and has a task only the service can clear up."""
        return self.state in _IN_DOUBT


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model has cost on one day (UTC, of the submission; None: not submitted). tasks: tries paid or reserved."""

    model: str
    day: date | None
    tasks: int
    credits_spent: Decimal
    credits_reserved: Decimal


def job_names(database: Database) -> list[str]:
    """The jobs of a file, the oldest first."""
    return [name for (name,) in database.query("SELECT name FROM job ORDER BY id")]


def job_stats(database: Database, name: str) -> JobStats:
    """How a job stands at this moment."""
    job = _job(database, name)
    with database.snapshot():
        columns = "requests, spent, reserved, runs, created_at"
        [(requests, spent, reserved, runs, created_at)] = database.query(
            f"SELECT {columns} FROM job WHERE id = ?", (job,)
        )
        by_state = database.query("SELECT state, count(*) FROM request WHERE job = ? GROUP BY state", (job,))
        unknown = unknown_requests(database, name)
    return JobStats(
        name=name,
        requests=requests,
        counts=dict(by_state),
        credits_spent=to_credits(spent),
        credits_reserved=to_credits(reserved),
        unknown=len(unknown),
        credits_at_risk=sum((request.credits or Decimal(0) for request in unknown), Decimal(0)),
        runs=runs,
        in_use_by=database.holder(job),
        created_at=datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=created_at),
    )


def unknown_requests(database: Database, name: str) -> list[UnknownRequest]:
    """The requests of a job that are not certain, in the order they were first pulled."""
    job = _job(database, name)
    [[keys_honoured]] = database.query("SELECT keys_honoured FROM job WHERE id = ?", (job,))
    running = database.holder(job) is not None
    states = (State.UNSETTLED,) if running else _IN_DOUBT
    sent_twice = "replayed = 1 OR id IN (SELECT request FROM past_try WHERE replayed = 1)"
    certain = "1 = 1" if keys_honoured else f"NOT ({sent_twice}) OR state = '{State.GIVEN_UP}'"
    where = f"job = ? AND (state IN ({marks(states)}) OR NOT ({certain})) ORDER BY id"
    rows = read_rows(database, where, (job, *states))
    return [_unknown(row) for row in rows if row.state in states or row.state not in _IN_DOUBT]


def costs(database: Database, name: str) -> list[Cost]:
    """What a job has cost, by day and model."""
    job = _job(database, name)
    query = f"""
        SELECT model, day, count(*), CAST(sum(spent) AS BIGINT), CAST(sum(reserved) AS BIGINT) FROM (
            SELECT model, submitted_at / {_DAY} AS day, coalesce(spent, 0) AS spent, coalesce(reserved, 0) AS reserved
            FROM request WHERE job = ? AND (spent > 0 OR reserved > 0)
            UNION ALL
            SELECT model, past_try.submitted_at / {_DAY}, coalesce(past_try.spent, 0), coalesce(past_try.reserved, 0)
            FROM past_try JOIN request ON request.id = past_try.request
            WHERE job = ? AND (past_try.spent > 0 OR past_try.reserved > 0)
        ) AS tries GROUP BY day, model ORDER BY day IS NOT NULL, day, model"""
    return [
        Cost(
            model=model,
            day=None if day is None else date(1970, 1, 1) + timedelta(days=day),
            tasks=tasks,
            credits_spent=to_credits(spent),
            credits_reserved=to_credits(reserved),
        )
        for model, day, tasks, spent, reserved in database.query(query, (job, job))
    ]


def page_of_rows(database: Database, name: str, after: int, states: Sequence[str]) -> list[StoredRow]:
    """The next requests of a job, in the order they were first pulled."""
    first, last = ids_of(_job(database, name))
    chosen = f"AND state IN ({marks(states)})" if states else ""
    # By the numbers alone: with the job too, SQLite would sort all of its requests for every page.
    where = f"id > ? AND id <= ? {chosen} ORDER BY id LIMIT {PAGE}"
    return read_rows(database, where, (max(first, after), last, *states))


def find_row(database: Database, name: str, identity: str) -> Row | None:
    """One request of a job."""
    rows = read_rows(database, "job = ? AND identity = ?", (_job(database, name), identity))
    return rows[0] if rows else None


def find_rows(database: Database, name: str, identities: Sequence[str]) -> dict[str, Row]:
    """Those of the identities that the job has requests of."""
    return {**rows_named(database, _job(database, name), identities)}


def known_prices(database: Database, name: str) -> dict[str, Decimal]:
    """What a request of each price class is taken to cost, as far as that is known."""
    query = "SELECT class, credits, used FROM price WHERE job = ?"
    classes = database.query(query, (_job(database, name),))
    known = {price: known_price(reserved, used) for price, reserved, used in classes}
    return {price: to_credits(credits) for price, credits in known.items() if credits is not None}


def seconds_taken(database: Database, name: str) -> dict[str, float]:
    """How long a task of each model took, submission to known end: the median of the latest that completed."""
    first, last = ids_of(_job(database, name))
    query = f"""
        SELECT model, ended_at - submitted_at FROM request
        WHERE id > ? AND id <= ? AND state = '{State.COMPLETED}' AND ended_at > submitted_at
        ORDER BY id DESC LIMIT {_LATEST}"""
    taken: dict[str, list[int]] = {}
    for model, micros in database.query(query, (first, last)):
        taken.setdefault(model, []).append(micros)
    return {model: statistics.median(micros) / 1e6 for model, micros in taken.items()}


def known_tasks(database: Database, task_ids: Sequence[str]) -> set[str]:
    """Those of the ids that belong to a request of any job, in any try."""
    known: set[str] = set()
    for some in portions(task_ids):
        for table in ("request", "past_try"):
            query = f"SELECT task_id FROM {table} WHERE task_id IN ({marks(some)})"
            known.update(task_id for (task_id,) in database.query(query, some))
    return known


def refuse_taken(database: Database, name: str, identity: str, task_id: str) -> None:
    """Raise `InvalidRequestError` if a task is another request's, or that of a former try."""
    query = """
        SELECT job.name, identity, 0 FROM request JOIN job ON job.id = request.job WHERE request.task_id = ?
        UNION ALL
        SELECT job.name, identity, 1 FROM past_try JOIN request ON request.id = past_try.request
        JOIN job ON job.id = request.job WHERE past_try.task_id = ?"""
    for job, other, is_past in database.query(query, (task_id, task_id)):
        if is_past or (job, other) != (name, identity):
            of_job = "" if job == name else f" of job {job!r}"
            raise InvalidRequestError(f"task {task_id} belongs to the request {other!r}{of_job}", param="task_id")


def _job(database: Database, name: str) -> int:
    for (job,) in database.query("SELECT id FROM job WHERE name = ?", (name,)):
        return int(job)
    names = ", ".join(map(repr, job_names(database))) or "none"
    raise LedgerError(f"the ledger has no job {name!r}; its jobs: {names}")


def _unknown(row: Row) -> UnknownRequest:
    sent: Row | PastTry = row
    if not row.replayed and row.state not in _IN_DOUBT:
        sent = next((past for past in reversed(row.past) if past.replayed), row)  # it is the former try that was
    return UnknownRequest(
        identity=row.identity,
        key=row.key,
        model=row.model,
        endpoint=row.endpoint,
        state=row.state.value,
        reason=row.error,
        idempotency_key=sent.idempotency_key,
        task_id=sent.task_id,
        credits=row.credits,
        submitted_at=sent.submitted_at,
        prompt=_prompt(row.body),
    )


def _prompt(body: bytes | None) -> str | None:
    try:
        prompt = json.loads(body or b"{}")["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return prompt if isinstance(prompt, str) else None
