"""What a ledger needs of a database: an SQLite file (`file`) or PostgreSQL (`postgres`). All of it blocks.

The queries are `store`'s and `reports`', and written once: in SQL that both understand, with `?` for a parameter.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from evolink_async.errors import LedgerError
from evolink_async.ledger.places import Place

logger = logging.getLogger("evolink_async.ledger")

T = TypeVar("T")

PAUSES_WHEN_LOST = (0.0, 0.2, 0.8, 2.0, 4.0, 8.0)  # seconds; a server that is started again is there by then


class Database(Protocol):
    """A database that holds a ledger. Used by one thread at a time."""

    learned: str  # the query for the bytes of what a job has learned, even if they are no text
    lost: bool  # the last session has failed because it could not be reached, or no longer

    def open(self) -> None:
        """Get ready to run a job; the ledger is made if it is new, and brought up if it is older. Within `session`."""

    def look(self) -> None:
        """Get ready to read a ledger that is there. Within `session`."""

    def close(self) -> None:
        """Let go of everything, the lock of a job too."""

    def session(self) -> AbstractContextManager[None]:
        """Everything else is done within one: foreign errors leave it as `LedgerError`."""

    def transaction(self) -> AbstractContextManager[None]:
        """All or nothing, and nothing if the ledger or the job is no longer ours to write."""

    def snapshot(self) -> AbstractContextManager[None]:
        """One view of everything for several queries."""

    def query(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows that a query finds."""

    def execute(self, query: str, parameters: Sequence[Any] = ()) -> None:
        """Change something."""

    def executemany(self, query: str, many: Iterable[Sequence[Any]]) -> None:
        """Change something once for each of the parameters."""

    def lock(self, job: int, name: str) -> None:
        """Take a job for this process. Raises `LedgerError`, which names the holder, if another has it."""

    def holder(self, job: int) -> str | None:
        """The process that runs a job now, in words; None: none does."""

    def refuse(self, key: str) -> None:
        """Raise `InvalidRequestError` for a key that it cannot store. Needs no session, and no thread of its own."""

    def disown(self) -> None:
        """In a forked child: what the parent has opened is not to live on with the child."""

    def damaged(self, details: str) -> LedgerError:
        """The error that says that the ledger is damaged."""


def patiently(database: Database, step: Callable[[], T]) -> T:
    """What a step gives, within a session. A server that is lost is waited for; then the step begins again."""
    for tries, pause in enumerate(PAUSES_WHEN_LOST):
        try:
            with database.session():
                return step()
        except LedgerError as error:
            if not database.lost:
                raise
            if tries == 1:  # it is not just that the connection was cut
                logger.warning(
                    "%s; it is waited for, and nothing is sent meanwhile", error, extra={"event": "ledger_lost"}
                )
        time.sleep(pause)
    with database.session():
        return step()


def database_at(place: Place) -> Database:
    """The database of a ledger, not opened yet."""
    database = _unopened(place)
    _databases.add(database)
    return database


def _unopened(place: Place) -> Database:
    if isinstance(place, Path):
        from evolink_async.ledger.file import FileDatabase

        return FileDatabase(place)
    from evolink_async.ledger.postgres import PostgresDatabase

    return PostgresDatabase(place)


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_inherited: list[Database] = []


def _keep_inherited() -> None:
    """In a child nobody may close what the parent has opened, so it is kept from being collected."""
    _inherited.extend(_databases)
    for database in _inherited:
        database.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)
