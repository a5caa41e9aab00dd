"""`JobStore`: the rows of one job in a database. Everything here blocks.

Keys are integers: the job's number in the upper bits, the request's in the lower. So the rows of a job lie together,
and its one owner can number them.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from evolink_async.errors import InvalidRequestError, LedgerError
from evolink_async.ledger import rules
from evolink_async.ledger.database import Database, patiently
from evolink_async.ledger.job import Opened
from evolink_async.ledger.states import ENDS, State
from evolink_async.ledger.turns import Batch, Found, JobSums
from evolink_async.ledger.values import (
    Account,
    Fate,
    PastTry,
    StoredRow,
    changed,
    counted_identity,
    shared,
    split_identity,
    written,
)
from evolink_async.types import Task

logger = logging.getLogger("evolink_async.ledger")

T = TypeVar("T")

_ID_BITS = 40  # requests of a job; the other bits number jobs
_IN_ONE_QUERY = 500

_COLUMNS = (
    *(
        "id",
        "job",
        "identity",
        "keyed",
        "content",
        "endpoint",
        "model",
        "state",
        "seen",
        "number",
        "attempts",
        "losses",
    ),
    *("replayed", "idempotency_key", "fingerprint", "task_id", "reserved", "spent", "submitted_at", "ended_at"),
    *("error_code", "error", "past"),
)


def _upsert(table: str, columns: Sequence[str], keys: Sequence[str], fixed: Collection[str] = ()) -> str:
    """The statement that writes a row whole. fixed: what never changes of one that is there."""
    changing = [f"{name} = excluded.{name}" for name in columns if name not in keys and name not in fixed]
    marks = ", ".join("?" * len(columns))
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) "
        f"ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {', '.join(changing)}"
    )


_WRITE_ROW = _upsert("request", _COLUMNS, ["id"], ["job", "identity", "keyed"])
_WRITE_BODY = _upsert("body", ["request", "body"], ["request"])
_WRITE_RESULT = _upsert("result", ["request", "task", "files"], ["request"])
_WRITE_PRICE = _upsert("price", ["job", "class", "credits", "used"], ["job", "class"])
_WRITE_LEARNED = _upsert("learned", ["job", "value"], ["job"])
_PAST_COLUMNS = (
    *("request", "number", "state", "replayed", "task_id", "idempotency_key", "reserved", "spent"),
    *("submitted_at", "ended_at", "error_code", "error"),
)
_WRITE_PAST = f"INSERT INTO past_try ({', '.join(_PAST_COLUMNS)}) VALUES ({', '.join('?' * len(_PAST_COLUMNS))})"
_READ_ROWS = (
    f"SELECT {', '.join(_COLUMNS)}, result.task, result.files "
    "FROM request LEFT JOIN result ON result.request = request.id"
)
_WITH_ID = (State.ACCEPTED, State.LOST, *ENDS.values())
_UNTIL_SETTLED = (State.UNSETTLED, State.SENDING, State.REPLAYING)


class JobStore:
    """One job of a ledger, locked for this process."""

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._name = name
        self._job = self._run = 0
        self._highest = 0  # of the numbers of requests that are stored for certain
        self._doubtful: set[int] = set()  # those that are not, of turns that failed

    def open(self, cap: int | None, now: datetime, *, begins_run: bool = True) -> Opened:
        """Take the job, made if it is new, and unsettle what the last run left sending. Raises `LedgerError`."""
        database = self._database
        with database.session():
            try:
                database.open()
                check_sums(database)
                self._job = _job_id(database, self._name, now)
                database.lock(self._job, self._name)
                return self._take_over(cap, begins_run=begins_run)
            except BaseException:
                self.close()
                raise

    def carry_out(self, batch: Batch) -> Found:
        """Write the batch in one transaction, then look up what it asks for. A server that is lost is waited for."""
        return patiently(self._database, functools.partial(self._carry_out, batch))

    def _carry_out(self, batch: Batch) -> Found:
        new = {row[0] for row in batch.rows if row[0] > self._highest}
        undone = self._doubtful - new
        self._doubtful |= new  # if this turn fails, it may be stored all the same
        if batch.job is not None:
            with self._database.transaction():
                self._drop(undone)
                self._write(batch, batch.job)
        found = self._found(batch)
        if batch.job is not None:
            self._highest = max(new, default=self._highest)
            self._doubtful.clear()
        return found

    def refuse(self, key: str) -> None:
        """Raise `InvalidRequestError` for a key that cannot be stored."""
        self._database.refuse(key)

    def close(self) -> None:
        """Close the database and release the job."""
        self._database.close()

    def _take_over(self, cap: int | None, *, begins_run: bool) -> Opened:
        database = self._database
        with database.transaction():
            database.execute("UPDATE job SET runs = runs + ? WHERE id = ?", (begins_run, self._job))
            learned = _learned(database, self._job)
            columns = "runs, requests, reserved, spent, probe, probe_price, replays, keys_honoured"
            [job] = database.query(f"SELECT {columns} FROM job WHERE id = ?", (self._job,))
            run, requests, reserved, spent, probe, probe_price, replays, keys_honoured = job
            classes = database.query("SELECT class, credits, used FROM price WHERE job = ?", (self._job,))
            first, most = ids_of(self._job)
            [[last]] = database.query("SELECT max(id) FROM request WHERE id <= ?", (most,))
            interrupted = self._recover()
        self._run = run
        self._highest = max(first, last or 0)
        prices = {price: credits for price, credits, _ in classes}
        used = {price: credits for price, _, credits in classes if credits is not None}
        account = Account(cap, reserved, spent, prices, used, None, probe_price, replays, bool(keys_honoured))
        if probe is not None:
            for row in read_rows(database, "id = ?", (probe,)):
                row.common = changed(row.common, price=probe_price)
                account.probe = row
        return Opened(self._name, run, account, self._highest + 1, requests, interrupted, learned)

    def _recover(self) -> int:
        """What a run that died had on the wire is unsettled."""
        rows = read_rows(self._database, "job = ? AND state IN (?, ?)", (self._job, State.SENDING, State.REPLAYING))
        for row in rows:
            rules.left_sending(row)
        self._database.executemany(_WRITE_ROW, [self._values(written(row)) for row in rows])
        return len(rows)

    def _found(self, batch: Batch) -> Found:
        uncounted = batch.contents.keys() - batch.counted.keys()
        counts = batch.counted | self._count(uncounted)
        wanted = [
            counted_identity(content, counts[content] + more)
            for content, most in batch.contents.items()
            for more in range(most)
        ]
        return Found(rows_named(self._database, self._job, [*batch.identities, *wanted]), counts)

    def _drop(self, ids: set[int]) -> None:
        """What was new in a turn that failed and was undone, but may have been stored all the same."""
        if not ids:
            return
        query = f"DELETE FROM request WHERE id = ? AND state = '{State.ENTERED}' AND attempts = 0"
        self._database.executemany(query, [(id,) for id in ids])

    def _write(self, batch: Batch, job: JobSums) -> None:
        database = self._database
        database.executemany(_WRITE_ROW, map(self._values, batch.rows))
        if batch.bodies:
            database.executemany(_WRITE_BODY, batch.bodies.items())
        if batch.results:
            results = [(id, _task_text(task), json.dumps(files)) for id, task, files in batch.results]
            database.executemany(_WRITE_RESULT, results)
        if batch.past:  # whole, so that it does no harm to write them twice
            database.executemany("DELETE FROM past_try WHERE request = ?", [(id,) for id in batch.past])
            values = [_past_values(id, past) for id, tries in batch.past.items() for past in tries]
            database.executemany(_WRITE_PAST, values)
        if batch.prices:
            prices = [(self._job, price, *credits) for price, credits in batch.prices.items()]
            database.executemany(_WRITE_PRICE, prices)
        if batch.learned is not None:
            database.execute(_WRITE_LEARNED, (self._job, batch.learned))
        database.execute(
            "UPDATE job SET reserved = ?, spent = ?, probe = ?, probe_price = ?, replays = ?, keys_honoured = ?, "
            "requests = ? WHERE id = ?",
            (
                *(job.reserved, job.spent, job.probe, job.probe_price, job.replays, job.keys_honoured, job.requests),
                self._job,
            ),
        )

    def _values(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        """The columns of a row, from what `written` gives."""
        submitted_at, ended_at, code, error, past = row[17:]
        times = _micros(submitted_at), _micros(ended_at)
        return (row[0], self._job, *row[1:17], *times, code, error, len(past))

    def _count(self, contents: Iterable[bytes]) -> dict[bytes, int]:
        """How often each content came in this run: nearly always never, which the first of them tells."""
        counts = dict.fromkeys(contents, 0)
        first = {counted_identity(content, 0): content for content in counts}
        for some in portions([*first]):
            query = f"SELECT identity FROM request WHERE job = ? AND seen = ? AND identity IN ({marks(some)})"
            for (identity,) in self._database.query(query, (self._job, self._run, *some)):
                digits = first[identity].hex()
                [[counts[first[identity]]]] = self._database.query(
                    "SELECT count(*) FROM request WHERE job = ? AND identity >= ? AND identity < ? AND seen = ? "
                    "AND keyed = 0",
                    (self._job, f"{digits}-", f"{digits}.", self._run),
                )
        return counts


_UNBALANCED = """
    WITH held AS (
        SELECT job, 1 AS one, coalesce(reserved, 0) AS reserved, coalesce(spent, 0) AS spent FROM request
        UNION ALL
        SELECT job, 0, coalesce(past_try.reserved, 0), coalesce(past_try.spent, 0)
        FROM past_try LEFT JOIN request ON request.id = past_try.request
        UNION ALL
        SELECT id, -requests, -reserved, -spent FROM job
    )
    SELECT max(name) FROM held LEFT JOIN job ON job.id = held.job GROUP BY held.job
    HAVING sum(one) <> 0 OR sum(held.reserved) <> 0 OR sum(held.spent) <> 0 OR max(name) IS NULL"""


def check_sums(database: Database) -> None:
    """Raise `LedgerError` if what is stored of the requests does not add up to what is stored of their jobs."""
    for (name,) in database.query(_UNBALANCED):
        raise database.damaged(f"the requests of job {name!r} do not add up")


def _job_id(database: Database, name: str, now: datetime) -> int:
    with database.transaction():
        query = "SELECT id FROM job WHERE name = ?"
        if not database.query(query, (name,)):
            new = "INSERT INTO job (name, created_at) VALUES (?, ?) ON CONFLICT (name) DO NOTHING"
            database.execute(new, (name, _micros(now)))
        job: int
        [[job]] = database.query(query, (name,))
        return job


def _learned(database: Database, job: int) -> str | None:
    """What the job has learned. A convenience: what cannot be read is no damage that would stop a run."""
    for (value,) in database.query(database.learned, (job,)):
        try:
            text = bytes(value).decode()
            json.loads(text)
        except (ValueError, RecursionError):
            logger.warning(
                "what the ledger's job has learned cannot be read; it begins anew",
                extra={"event": "learned_unreadable"},
            )
            return None
        return text
    return None


def ids_of(job: int) -> tuple[int, int]:
    """The numbers of a job's requests are above the first and up to the second."""
    return job << _ID_BITS, (job + 1 << _ID_BITS) - 1


# Rows


def read_rows(database: Database, where: str, parameters: Sequence[Any]) -> list[StoredRow]:
    """Requests with all that belongs to them; the body only of those that may be sent again."""
    try:
        return _read_rows(database, where, parameters)
    except (ValueError, TypeError, OverflowError, RecursionError, InvalidRequestError) as error:
        raise LedgerError("the ledger is damaged: what it says of a request makes no sense") from error


def rows_named(database: Database, job: int, identities: Sequence[str]) -> dict[str, StoredRow]:
    """Those of the identities that a job has requests of."""
    found: dict[str, StoredRow] = {}
    for some in portions(identities):
        where = f"job = ? AND identity IN ({marks(some)})"
        found.update((row.identity, row) for row in read_rows(database, where, (job, *some)))
    return found


def _read_rows(database: Database, where: str, parameters: Sequence[Any]) -> list[StoredRow]:
    rows = [_row(values) for values in database.query(f"{_READ_ROWS} WHERE {where}", parameters)]
    with_body = {row.id: row for row in rows if row.state in _UNTIL_SETTLED}
    for some in portions([*with_body]):
        for id, body in database.query(f"SELECT request, body FROM body WHERE request IN ({marks(some)})", some):
            with_body[id].body = body
    with_past = {row.id: row for row in rows if row._past_written}
    for some in portions([*with_past]):
        query = f"SELECT {', '.join(_PAST_COLUMNS)} FROM past_try WHERE request IN ({marks(some)}) ORDER BY id"
        for id, *values in database.query(query, some):
            row = with_past[id]
            row.fate = row.fate._replace(past=(*row.past, _past_try(values)))
    return rows


def _row(values: tuple[Any, ...]) -> StoredRow:
    id, _, identity, keyed, content, endpoint, model, state, seen, number, attempts, losses, replayed = values[:13]
    key, fingerprint, task_id, reserved, spent, submitted_at, ended_at, code, error, past, task, files = values[13:]
    if (state in ENDS.values() and task is None) or (state in _WITH_ID and task_id is None):
        raise ValueError(f"a request that is {state} has no task")
    name: str | int = identity
    if not keyed:
        content, name = split_identity(identity)
    row = StoredRow(id, name, bytes(content), shared(endpoint, model, None, fingerprint), State(state), seen)
    row.attempts, row.task_id, row.reserved = attempts, task_id, reserved
    sent = _moment(submitted_at)
    row._sent_key, row._submitted = key, None if sent is None else sent.timestamp()
    row.fate = Fate(
        losses,
        bool(replayed),
        spent,
        _moment(ended_at),
        code,
        error,
        _task(task),
        tuple(json.loads(files)) if files else (),
        number,
    )
    row._past_written = past
    return row


def _past_values(request: int, past: PastTry) -> tuple[Any, ...]:
    return (
        *(request, past.number, past.state, past.replayed, past.task_id, past.idempotency_key),
        *(past.reserved, past.spent),
        *(_micros(past.submitted_at), _micros(past.ended_at), past.error_code, past.error),
    )


def _past_try(values: Sequence[Any]) -> PastTry:
    number, state, replayed, task_id, key, reserved, spent, submitted_at, ended_at, code, error = values
    times = _moment(submitted_at), _moment(ended_at)
    return PastTry(number, State(state), bool(replayed), task_id, key, reserved, spent, *times, code, error)


def _task_text(task: Task | None) -> str | None:
    """The task as the service sent it. ASCII, so that no half of a surrogate pair can hinder it."""
    return None if task is None else json.dumps(task.raw, separators=(",", ":"), default=str)


def _task(text: str | None) -> Task | None:
    if text is None:
        return None
    told = json.loads(text)
    return Task.model_validate({**told, "raw": told})


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _micros(moment: datetime | None) -> int | None:
    return None if moment is None else (moment - _EPOCH) // _MICROSECOND


def _moment(micros: int | None) -> datetime | None:
    return None if micros is None else _EPOCH + timedelta(microseconds=micros)


def portions(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items in portions that fit into one query."""
    for start in range(0, len(items), _IN_ONE_QUERY):
        yield items[start : start + _IN_ONE_QUERY]


def marks(items: Sequence[Any]) -> str:
    """A place in a query for each of the items."""
    return ", ".join("?" * len(items))
