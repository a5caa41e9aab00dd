"""The SQLite file of a ledger: how it is made, opened, locked and checked, and its errors as ours. It all blocks.

A new file is made whole under another name first, so an empty one is never ours. WAL and synchronous=FULL: what is
committed survives the process and, as far as the disk keeps its word about fsync, the power.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from evolink_async.errors import LedgerError
from evolink_async.ledger.locks import FileLock, holder_of
from evolink_async.ledger.places import refuse_remote
from evolink_async.ledger.schema import MIGRATIONS, VERSION

logger = logging.getLogger("evolink_async.ledger")

APPLICATION_ID = 0x45764C67  # "EvLg": what makes an SQLite file a ledger
Identity = tuple[int, int] | None  # of an open file; None where nothing tells it from others
OLDEST_SQLITE = (3, 24)  # the first with upserts
BUSY_SECONDS = 10.0  # how long a turn waits for that of another job in the same file


class FileDatabase:
    """A ledger in an SQLite file."""

    learned = "SELECT CAST(value AS BLOB) FROM learned WHERE job = ?"
    lost = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open_connection: sqlite3.Connection | None = None
        self._lock: FileLock | None = None
        self._identities: tuple[Identity, Identity] | None = None  # of what may not be replaced while a job runs
        self._refuse_changed: Callable[[], None] | None = None  # where it is read without taking part in its locks

    def open(self) -> None:
        path = self._path
        refuse_orphan(path)
        if not path.exists():
            create(path)
        self._open_connection = connection = connect(path)
        self._identities = identities_of(path)
        check_structure(connection, path)
        migrate(connection, path)

    def look(self) -> None:
        if may_write(self._path):
            self._open_connection = connection = connect(self._path)
            migrate(connection, self._path)
        else:
            self._open_connection, self._refuse_changed = connect_to_look(self._path)

    def close(self) -> None:
        connection, self._open_connection = self._open_connection, None
        lock, self._lock = self._lock, None
        try:
            if connection is not None:
                with ledger_errors(self._path):
                    connection.close()
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def session(self) -> Iterator[None]:
        with ledger_errors(self._path):
            try:
                yield
            finally:
                if self._refuse_changed is not None:
                    self._refuse_changed()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with transaction(self._connection):
            yield
            if self._identities is not None:
                refuse_if_gone(self._path, self._identities)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def query(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._connection.execute(query, parameters).fetchall()

    def execute(self, query: str, parameters: Sequence[Any] = ()) -> None:
        self._connection.execute(query, parameters)

    def executemany(self, query: str, many: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(query, many)

    def lock(self, job: int, name: str) -> None:
        self._lock = lock_job(self._path, job, name)

    def holder(self, job: int) -> str | None:
        return holder_of(_lock_path(self._path, job))

    def refuse(self, key: str) -> None:
        """It takes them all."""

    def disown(self) -> None:
        """The lock of a job sees to itself."""

    def damaged(self, details: str) -> LedgerError:
        return corrupt(self._path, details)

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._open_connection is not None
        return self._open_connection


def connect(path: Path) -> sqlite3.Connection:
    """A connection to a file that is a ledger, ready for use. Raises `LedgerError` for anything else."""
    _refuse_foreign(path, "r+b")
    _refuse_other_names(path)
    connection = _opened(path, "mode=rw")
    try:
        _refuse_unknown(connection, path)
        [[mode]] = connection.execute("PRAGMA journal_mode = WAL")
        if mode != "wal":
            raise LedgerError(f"the ledger {str(path)!r} cannot use a write-ahead log here: put it on a local disk")
        for pragma in ("synchronous = FULL", "fullfsync = ON", "checkpoint_fullfsync = ON", "trusted_schema = OFF"):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def may_write(path: Path) -> bool:
    """Whether a ledger and what lies beside it may be written to, as SQLite does even for those who only read."""
    options = {"effective_ids": True} if os.access in os.supports_effective_ids else {}
    return all(os.access(place, os.W_OK, **options) for place in (path, path.parent) if place.exists())


def connect_to_look(path: Path) -> tuple[sqlite3.Connection, Callable[[], None]]:
    """A connection for reading a ledger where nothing may be written, and nothing is.

    The function raises `LedgerError` if what was read may be no whole picture, because somebody began to write. Raises
    it too for what is no ledger, is of another version, or cannot be read without writing.
    """
    _refuse_foreign(path, "rb")
    wal, index = _log_of(path), Path(f"{path}-shm")
    before = _stamp(path, wal)
    closed = before[-1] == 0  # whoever had it open has ended in order: all is in the file itself
    if not closed and not index.exists():
        raise LedgerError(
            f"what was written last into the ledger {str(path)!r} is in {wal.name!r}, which cannot be read where "
            "nothing may be written: copy both files into a folder of yours and look there"
        )
    # Immutable: neither locks nor logs. Else SQLite reads along with whoever writes, by the index that they share.
    connection = _opened(path, "mode=ro&immutable=1" if closed else "mode=ro")

    def refuse_changed() -> None:
        if closed and _stamp(path, wal) != before:
            raise LedgerError(f"somebody has begun to write into the ledger {str(path)!r} meanwhile: look again")

    try:
        _refuse_unknown(connection, path)
        if (version := _version(connection)) < VERSION:
            raise LedgerError(
                f"the ledger {str(path)!r} has version {version} and must be brought up to {VERSION}, which cannot be "
                "done where nothing may be written: copy it into a folder of yours and look there"
            )
        connection.execute("PRAGMA trusted_schema = OFF")
    except BaseException:
        connection.close()
        raise
    return connection, refuse_changed


def _stamp(path: Path, wal: Path) -> tuple[int, int, int]:
    """What changes when somebody writes into a ledger; at last the size of its log."""
    details = path.stat()
    try:
        log = wal.stat().st_size
    except FileNotFoundError:
        log = 0
    return details.st_mtime_ns, details.st_size, log


def _opened(path: Path, how: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?{how}", timeout=BUSY_SECONDS, uri=True, isolation_level=None)


def _refuse_foreign(path: Path, mode: Literal["rb", "r+b"]) -> None:
    """Before SQLite sees it: it would make an empty file its own, and leave logs beside one it may not write to."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise LedgerError(f"a ledger needs SQLite 3.24 or later, this Python has {sqlite3.sqlite_version}")
    refuse_remote(path)
    try:
        with path.open(mode) as file:
            start = file.read(18)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise LedgerError(f"there is no ledger {str(path)!r}") from None
    except OSError as error:
        purpose = "for writing" if mode == "r+b" else "for reading"
        raise LedgerError(f"the ledger {str(path)!r} cannot be opened {purpose}: {error.strerror or error}") from error
    if not start.startswith(b"SQLite format 3\0"):
        what = "is empty" if not start else "is no SQLite file"
        raise LedgerError(
            f"{str(path)!r} {what}, so it is no ledger, or no longer one. It is left as it is: "
            "restore it from a copy, or give another path to begin anew"
        )
    page = int.from_bytes(start[16:18], "big")
    if page and size % (65536 if page == 1 else page) and not _log_of(path).exists():
        raise corrupt(path, "its end is missing")  # SQLite takes the rest of a cut page for zeros


def _refuse_other_names(path: Path) -> None:
    """By each name of a file (hard links) SQLite keeps another log: what is in one is paid again by the other."""
    if path.stat().st_nlink == 1:
        return
    for fresh in path.parent.glob(f".{glob.escape(path.name)}.*.new"):  # of who has made it, or was killed then
        with contextlib.suppress(OSError):
            if fresh.samefile(path):
                fresh.unlink()
    if (names := path.stat().st_nlink) > 1:
        raise LedgerError(
            f"the ledger {str(path)!r} has {names} names (hard links), and whoever uses another one would not see what "
            "is paid for: remove the others, or give the path of a copy"
        )


def _refuse_unknown(connection: sqlite3.Connection, path: Path) -> None:
    [[application]] = connection.execute("PRAGMA application_id")
    if application != APPLICATION_ID:
        raise LedgerError(f"{str(path)!r} is a database, but no ledger of evolink_async; give another path")
    _version(connection)


def _version(connection: sqlite3.Connection) -> int:
    version: int
    [[version]] = connection.execute("PRAGMA user_version")
    if version > VERSION:
        raise LedgerError(
            f"the ledger has version {version}, this evolink_async knows up to {VERSION}: install a newer one"
        )
    return version


def identity_of(path: Path) -> Identity:
    """What tells the file at a path from every other as long as it is open."""
    there = os.stat(path)
    return (there.st_dev, there.st_ino) if there.st_ino else None


def identities_of(path: Path) -> tuple[Identity, Identity]:
    """Those of a ledger that is open and of its log, which is there as long as it is open."""
    return identity_of(path), identity_of(_log_of(path))


def refuse_if_gone(path: Path, identities: tuple[Identity, Identity]) -> None:
    """Raise `LedgerError` unless the files at the paths are those that are open: a deleted file takes every write."""
    ledger, log = identities
    if what := _fate_of(path, ledger):
        raise LedgerError(
            f"the ledger {str(path)!r} {what} while its job is running, so nobody would find what is written to it. "
            "Put it back with its -wal file, or restore a copy, before you run the job again: another file does not "
            "know what was paid for. If there is none, the log has the id of every task that was accepted"
        )
    if what := _fate_of(_log_of(path), log):
        raise LedgerError(
            f"{_log_of(path).name!r}, the newest part of the ledger {str(path)!r}, {what} while its job is running, so "
            "a crash would lose what is written to it. Put it back, or let the program end in order: that saves what "
            "was written before. The log has the id of every task that was accepted"
        )


def _fate_of(file: Path, identity: Identity) -> str | None:
    """What has become of a file that is open; None: it is where it was."""
    try:
        there = identity_of(file)
    except FileNotFoundError:
        return "was deleted or moved away"
    return None if there == identity or there is None or identity is None else "was replaced by another file"


def _log_of(path: Path) -> Path:
    return Path(f"{path}-wal")


def check_structure(connection: sqlite3.Connection, path: Path) -> None:
    """Raise `LedgerError` if the file is damaged in its structure, or an identity differs from its index."""
    [[verdict], *_] = connection.execute("PRAGMA integrity_check(1)")
    if verdict != "ok":
        raise corrupt(path, str(verdict).splitlines()[-1])


def corrupt(path: Path, details: str) -> LedgerError:
    """The error that says that a file is damaged."""
    return LedgerError(
        f"the ledger {str(path)!r} is damaged ({details}). It is left as it is, since it says what was paid for: "
        "copy it away with its -wal file, then restore a copy or try SQLite's .recover"
    )


def create(path: Path) -> None:
    """Make a new ledger, whole or not at all. It is no error if another process is faster."""
    refuse_remote(path)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        connection = sqlite3.connect(fresh, isolation_level=None)
        try:
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("PRAGMA synchronous = FULL")
            with transaction(connection):
                _bring_up(connection, 0)
            # Only now: on a full disk a log may not get into the file when it is closed, and nobody is told.
            connection.execute("PRAGMA journal_mode = WAL")
        finally:
            connection.close()
        _publish(fresh, path)
    finally:
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(f"{fresh}{ending}")


def refuse_orphan(path: Path) -> None:
    """Raise `LedgerError` if a ledger has gone and left its log: SQLite would take that for one of the next file."""
    log = _log_of(path)
    try:
        left = log.stat().st_size > 0
    except FileNotFoundError:  # asked for once: its last user may be closing it
        return
    if left and not path.exists():  # asked for last: who has made it meanwhile has a log of his own
        raise LedgerError(
            f"the ledger {str(path)!r} is gone, but its {log.name!r} is there with the newest part of it: put the file "
            "back, or restore both from a copy. To begin anew, and pay anew, remove the log too"
        )


def _publish(fresh: Path, path: Path) -> None:
    try:
        os.link(fresh, path)
    except FileExistsError:
        return
    except OSError:  # a file system without links: nobody else makes this very file in the same moment
        if path.exists():
            return
        os.rename(fresh, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring an older ledger up to this version, all at once; a copy of the old one is kept beside it.

    None of its jobs may be running, for a program of the older version could not go on with it.
    """
    if _version(connection) == VERSION:
        return
    with contextlib.ExitStack() as locks, transaction(connection):
        for job, name in connection.execute("SELECT id, name FROM job").fetchall():
            locks.callback(lock_job(path, job, name).release)
        version = _version(connection)
        if version < VERSION:
            copy = path.with_name(f"{path.name}.v{version}")
            logger.warning(
                "bringing the ledger %s up to version %d; the old one is kept as %s",
                path,
                VERSION,
                copy,
                extra={"event": "ledger_upgraded"},
            )
            _copy(path, copy)
            _bring_up(connection, version)


def _copy(path: Path, copy: Path) -> None:
    """A copy of what is committed. A second connection reads it, the first one keeps everybody from writing."""
    with (
        contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def _bring_up(connection: sqlite3.Connection, version: int) -> None:
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def lock_job(path: Path, job: int, name: str) -> FileLock:
    """Take the lock of a job. Raises `LedgerError` if another process has it."""
    return FileLock(_lock_path(path, job), f"job {name!r} of the ledger {str(path)!r}")


def _lock_path(path: Path, job: int) -> Path:
    return path.with_name(f"{path.name}.{job}.lock")


# Transactions and errors


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        _version(connection)  # a newer program may have brought it up meanwhile
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # what went wrong first is what counts
                connection.execute("ROLLBACK")
        raise


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and of the file system into ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise _ledger_error(path, error) from error
    except UnicodeDecodeError as error:  # of a message of SQLite's that quotes what is damaged
        raise corrupt(path, "it holds what is no text") from error
    except OSError as error:
        raise LedgerError(f"the ledger {str(path)!r} cannot be used: {error.strerror or error}") from error


def _ledger_error(path: Path, error: sqlite3.Error) -> LedgerError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    said = str(error)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return corrupt(path, said)
    reasons = {
        sqlite3.SQLITE_FULL: "the disk is full: make room",
        sqlite3.SQLITE_READONLY: "it may not be written to: check its permissions and those of its folder",
        sqlite3.SQLITE_CANTOPEN: "it cannot be opened: does the folder exist, and may it be written to?",
        sqlite3.SQLITE_BUSY: f"another process has kept it busy for {BUSY_SECONDS:g} s: close what has it open",
        sqlite3.SQLITE_IOERR: "the disk refuses: check it and the room on it",
    }
    reason = reasons.get(code)
    if reason is None:
        return LedgerError(f"the ledger {str(path)!r} cannot be used: {said}")
    return LedgerError(f"the ledger {str(path)!r} cannot be written ({said}); {reason}")
