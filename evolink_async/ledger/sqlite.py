"""`SqliteStore`: the rows of one job in an SQLite file. Everything here blocks.

Keys are integers: the job's number in the upper bits, the request's in the lower. So the rows of a job lie together,
and its one owner can number them.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from evolink_async.errors import InvalidRequestError, LedgerError
from evolink_async.ledger import rules
from evolink_async.ledger.file import (
    Identity,
    check_structure,
    check_sums,
    connect,
    create,
    identities_of,
    ledger_errors,
    lock_job,
    migrate,
    refuse_if_gone,
    refuse_orphan,
    transaction,
)
from evolink_async.ledger.job import Opened
from evolink_async.ledger.locks import FileLock
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
_FIXED = frozenset({"id", "job", "identity", "keyed"})
_WRITE_ROW = (
    f"INSERT INTO request ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) ON CONFLICT (id) DO UPDATE "
    f"SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS if name not in _FIXED)}"
)
_READ_ROWS = (
    f"SELECT {', '.join(_COLUMNS)}, result.task, result.files "
    "FROM request LEFT JOIN result ON result.request = request.id"
)
_WITH_ID = (State.ACCEPTED, State.LOST, *ENDS.values())
_UNTIL_SETTLED = (State.UNSETTLED, State.SENDING, State.REPLAYING)


class SqliteStore:
    """One job of a file, locked for this process."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._connection: sqlite3.Connection | None = None
        self._lock: FileLock | None = None
        self._identities: tuple[Identity, Identity] = (None, None)
        self._job = self._run = 0

    def open(self, cap: int | None, now: datetime, *, begins_run: bool = True) -> Opened:
        """Take the job, made if it is new, and unsettle what the last run left sending. Raises `LedgerError`."""
        with ledger_errors(self._path):
            refuse_orphan(self._path)
            if not self._path.exists():
                create(self._path)
            self._connection = connection = connect(self._path)
            try:
                self._identities = identities_of(self._path)
                check_structure(connection, self._path)
                migrate(connection, self._path)
                check_sums(connection, self._path)
                self._job = _job_id(connection, self._name, now)
                self._lock = lock_job(self._path, self._job, self._name)
                _stores.add(self)
                return self._take_over(cap, begins_run=begins_run)
            except BaseException:
                self.close()
                raise

    def carry_out(self, batch: Batch) -> Found:
        """Write the batch in one transaction, then look up what it asks for."""
        connection = self._connection
        assert connection is not None
        with ledger_errors(self._path):
            if batch.job is not None:
                with transaction(connection):
                    self._write(connection, batch, batch.job)
                    refuse_if_gone(self._path, self._identities)
            uncounted = batch.contents.keys() - batch.counted.keys()
            counts = batch.counted | self._count(connection, uncounted)
            wanted = [
                counted_identity(content, counts[content] + more)
                for content, most in batch.contents.items()
                for more in range(most)
            ]
            return Found(self._rows(connection, [*batch.identities, *wanted]), counts)

    def close(self) -> None:
        """Close the file and release the job."""
        connection, self._connection = self._connection, None
        lock, self._lock = self._lock, None
        try:
            if connection is not None:
                with ledger_errors(self._path):
                    connection.close()
        finally:
            if lock is not None:
                lock.release()

    def _take_over(self, cap: int | None, *, begins_run: bool) -> Opened:
        connection = self._connection
        assert connection is not None
        with transaction(connection):
            connection.execute("UPDATE job SET runs = runs + ? WHERE id = ?", (begins_run, self._job))
            learned = _learned(connection, self._job)
            columns = "runs, requests, reserved, spent, probe, probe_price, replays, keys_honoured"
            [job] = connection.execute(f"SELECT {columns} FROM job WHERE id = ?", (self._job,))
            run, requests, reserved, spent, probe, probe_price, replays, keys_honoured = job
            classes = list(connection.execute("SELECT class, credits, used FROM price WHERE job = ?", (self._job,)))
            first, most = ids_of(self._job)
            [[last]] = connection.execute("SELECT max(id) FROM request WHERE id <= ?", (most,))
            interrupted = self._recover(connection)
        self._run = run
        prices = {price: credits for price, credits, _ in classes}
        used = {price: credits for price, _, credits in classes if credits is not None}
        account = Account(cap, reserved, spent, prices, used, None, probe_price, replays, bool(keys_honoured))
        if probe is not None:
            for row in read_rows(connection, "id = ?", (probe,)):
                row.common = changed(row.common, price=probe_price)
                account.probe = row
        return Opened(self._name, run, account, max(first, last or 0) + 1, requests, interrupted, learned)

    def _recover(self, connection: sqlite3.Connection) -> int:
        """What a run that died had on the wire is unsettled."""
        rows = read_rows(connection, "job = ? AND state IN (?, ?)", (self._job, State.SENDING, State.REPLAYING))
        for row in rows:
            rules.left_sending(row)
        connection.executemany(_WRITE_ROW, [self._values(written(row)) for row in rows])
        return len(rows)

    def _write(self, connection: sqlite3.Connection, batch: Batch, job: JobSums) -> None:
        connection.executemany(_WRITE_ROW, map(self._values, batch.rows))
        if batch.bodies:
            connection.executemany("INSERT OR REPLACE INTO body VALUES (?, ?)", batch.bodies.items())
        if batch.results:
            results = [(id, _task_text(task), json.dumps(files)) for id, task, files in batch.results]
            connection.executemany("INSERT OR REPLACE INTO result VALUES (?, ?, ?)", results)
        if batch.past:
            connection.executemany(
                f"INSERT INTO past_try VALUES ({', '.join('?' * 13)})", map(_past_values, batch.past)
            )
        if batch.prices:
            prices = [(self._job, price, *credits) for price, credits in batch.prices.items()]
            connection.executemany("INSERT OR REPLACE INTO price VALUES (?, ?, ?, ?)", prices)
        if batch.learned is not None:
            connection.execute("INSERT OR REPLACE INTO learned VALUES (?, ?)", (self._job, batch.learned))
        connection.execute(
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

    def _count(self, connection: sqlite3.Connection, contents: Iterable[bytes]) -> dict[bytes, int]:
        """How often each content came in this run: nearly always never, which the first of them tells."""
        counts = dict.fromkeys(contents, 0)
        first = {counted_identity(content, 0): content for content in counts}
        for some in _portions([*first]):
            query = f"SELECT identity FROM request WHERE job = ? AND seen = ? AND identity IN ({_marks(some)})"
            for (identity,) in connection.execute(query, (self._job, self._run, *some)).fetchall():
                digits = first[identity].hex()
                [[counts[first[identity]]]] = connection.execute(
                    "SELECT count(*) FROM request WHERE job = ? AND identity >= ? AND identity < ? AND seen = ? "
                    "AND NOT keyed",
                    (self._job, f"{digits}-", f"{digits}.", self._run),
                )
        return counts

    def _rows(self, connection: sqlite3.Connection, identities: Sequence[str]) -> dict[str, StoredRow]:
        rows: dict[str, StoredRow] = {}
        for some in _portions(identities):
            where = f"job = ? AND identity IN ({_marks(some)})"
            rows.update((row.identity, row) for row in read_rows(connection, where, (self._job, *some)))
        return rows


_stores: weakref.WeakSet[SqliteStore] = weakref.WeakSet()
_inherited: list[Any] = []


def _keep_inherited() -> None:
    """SQLite forbids to close in a child what the parent has opened, so it is kept from being collected."""
    _inherited.extend(store._connection for store in _stores)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)


def _job_id(connection: sqlite3.Connection, name: str, now: datetime) -> int:
    with transaction(connection):
        connection.execute("INSERT OR IGNORE INTO job (name, created_at) VALUES (?, ?)", (name, _micros(now)))
        job: int
        [[job]] = connection.execute("SELECT id FROM job WHERE name = ?", (name,))
        return job


def _learned(connection: sqlite3.Connection, job: int) -> str | None:
    """What the job has learned. A convenience: what cannot be read is no damage that would stop a run."""
    for (value,) in connection.execute("SELECT CAST(value AS BLOB) FROM learned WHERE job = ?", (job,)):
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


def read_rows(connection: sqlite3.Connection, where: str, parameters: Sequence[Any]) -> list[StoredRow]:
    """Requests with all that belongs to them; the body only of those that may be sent again."""
    try:
        return _read_rows(connection, where, parameters)
    except (ValueError, TypeError, OverflowError, RecursionError, InvalidRequestError) as error:
        raise LedgerError("the ledger is damaged: what it says of a request makes no sense") from error


def _read_rows(connection: sqlite3.Connection, where: str, parameters: Sequence[Any]) -> list[StoredRow]:
    rows = [_row(values) for values in connection.execute(f"{_READ_ROWS} WHERE {where}", parameters).fetchall()]
    for row in rows:
        if row.state in _UNTIL_SETTLED:
            body = connection.execute("SELECT body FROM body WHERE request = ?", (row.id,)).fetchone()
            row.body = body and body[0]
        if row._past_written:
            past = connection.execute("SELECT * FROM past_try WHERE request = ? ORDER BY id", (row.id,))
            row.fate = row.fate._replace(past=tuple(map(_past_try, past)))
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


def _past_values(item: tuple[int, PastTry]) -> tuple[Any, ...]:
    request, past = item
    return (
        *(None, request, past.number, past.state, past.replayed, past.task_id, past.idempotency_key),
        *(past.reserved, past.spent),
        *(_micros(past.submitted_at), _micros(past.ended_at), past.error_code, past.error),
    )


def _past_try(values: tuple[Any, ...]) -> PastTry:
    _, _, number, state, replayed, task_id, key, reserved, spent, submitted_at, ended_at, code, error = values
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


def _portions(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), _IN_ONE_QUERY):
        yield items[start : start + _IN_ONE_QUERY]


def _marks(items: Sequence[str]) -> str:
    return ", ".join("?" * len(items))
