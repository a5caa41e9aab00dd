"""Opening a ledger: to run one of its jobs, or to look at it and settle what is unknown."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

from evolink_async.checks import checked_id
from evolink_async.errors import ClosedError, ConfigurationError, InvalidRequestError
from evolink_async.ledger.job import JobLedger, Opened
from evolink_async.ledger.places import Place, Server, ledger_place
from evolink_async.ledger.states import State
from evolink_async.ledger.turns import Store
from evolink_async.ledger.values import Account, Row, is_text, to_micro

if TYPE_CHECKING:
    from evolink_async.ledger.database import Database
    from evolink_async.ledger.reports import Cost, JobStats, UnknownRequest

__all__ = ["Ledger", "LedgerJob", "open_job", "open_ledger"]

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST_NAME = 256


def one_thread() -> Executor:
    """Where everything that blocks is done, in order."""
    return ThreadPoolExecutor(1, thread_name_prefix="evolink ledger")


async def open_job(
    url: str | os.PathLike[str] | None, name: str = "default", *, max_credits: Decimal | None = None
) -> JobLedger:
    """Begin a run of a job: lock it, and make the ledger and the job if they are new.

    url: a path, or a postgresql:// URL; None: in memory, for this run alone. max_credits: what may be spent and
    reserved, over all runs. Raises `LedgerError` if the job is in use, or the ledger is damaged, newer than this
    version, none, not writable, not to be reached or on a file system without trustworthy locks; `ConfigurationError`
    for a url or name that can be none.
    """
    cap = None if max_credits is None else to_micro(max_credits)
    place = checked_job(url, name)
    if place is None:
        return JobLedger(Opened(name, 1, Account(cap), 1, 0, 0))
    return await _open(place, name, cap, begins_run=True)


def checked_job(url: str | os.PathLike[str] | None, name: str) -> Place | None:
    """Where a job lies, None: in memory. Raises `ConfigurationError` for a url or name that can be none."""
    _checked_name(name)
    place = None if url is None else ledger_place(url)
    if isinstance(place, Server) and "\0" in name:
        raise ConfigurationError(f"in PostgreSQL a job's name holds no NUL, got {name!r}")
    return place


async def _open(place: Place, name: str, cap: int | None, *, begins_run: bool) -> JobLedger:
    from evolink_async.ledger.database import database_at
    from evolink_async.ledger.store import JobStore

    store = JobStore(database_at(place), name)
    executor = one_thread()
    try:
        opened = await _in(executor, store, store.open, cap, datetime.now(UTC), begins_run=begins_run)
        return JobLedger(opened, store, executor)
    except BaseException:
        executor.shutdown(wait=False)
        raise


async def _in(executor: Executor, store: Store, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in the ledger's thread. Cancelled, the store is closed there as soon as it ends."""
    call = executor.submit(function, *args, **kwargs)
    try:
        return await asyncio.wrap_future(call)
    except asyncio.CancelledError:
        executor.submit(store.close)
        raise


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.strip() or not is_text(name):
        raise ConfigurationError(f"a job's name is a text of 1 to {_LONGEST_NAME} characters, got {name!r}")
    return name


def open_ledger(url: str | os.PathLike[str]) -> Ledger:
    """A ledger to look at, whether or not its jobs are running.

        async with open_ledger("job.db") as ledger:
            for request in await ledger.job("default").unknown():
                print(request.identity, request.credits, request.idempotency_key)

    url: a path, or a postgresql:// URL. The ledger must exist. It may lie where nothing may be written; then nothing
    is. What is wrong with it is raised as `LedgerError` on entering the block. Raises `ConfigurationError` for what
    names no ledger. Since 0.1.0.
    """
    return Ledger(ledger_place(url))


class Ledger:
    """A ledger, opened for reading by `open_ledger`. `job` names one of its jobs, `jobs` tells which there are."""

    _resolving: asyncio.Lock  # one at a time, as each has the job for itself; of the loop in which it was opened

    def __init__(self, place: Place) -> None:
        self._place = place
        self._executor: Executor | None = None
        self._database: Database | None = None
        self._process: int | None = None  # that has opened it

    async def __aenter__(self) -> Self:
        if self._executor is not None:
            raise ConfigurationError("this ledger is open already; open_ledger gives another")
        self._executor, self._process = one_thread(), os.getpid()
        self._resolving = asyncio.Lock()
        try:
            await self._call(self._connect)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    def job(self, name: str = "default") -> LedgerJob:
        """One of its jobs. Whether there is one of that name is found out by the first question."""
        return LedgerJob(self, _checked_name(name))

    async def jobs(self) -> list[str]:
        """The names of its jobs, the oldest first."""
        from evolink_async.ledger.reports import job_names

        return await self._ask(job_names)

    async def knows(self, task_ids: Iterable[str]) -> set[str]:
        """Those of the ids that belong to a request of any of its jobs, in any try."""
        from evolink_async.ledger.reports import known_tasks

        if isinstance(task_ids, str):
            raise InvalidRequestError("task_ids are several ids", param="task_ids")
        return await self._ask(known_tasks, list(task_ids))

    async def _close(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None and self._process == os.getpid():
            closing = executor.submit(self._disconnect)
            executor.shutdown(wait=False)
            await asyncio.wrap_future(closing)

    def _connect(self) -> None:
        from evolink_async.ledger.database import database_at

        self._database = database = database_at(self._place)
        with database.session():
            database.look()

    def _disconnect(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()

    async def _ask(self, question: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        from evolink_async.ledger.database import patiently

        def asked() -> T:
            database = self._database
            assert database is not None
            return patiently(database, lambda: question(database, *args, **kwargs))

        return await self._call(asked)

    async def _call(self, function: Callable[[], T]) -> T:
        if self._executor is None:
            raise ClosedError("the ledger is not open: async with open_ledger(...) as ledger")
        if self._process != os.getpid():
            raise ConfigurationError("a ledger cannot be used in a forked process; open it there")
        return await asyncio.wrap_future(self._executor.submit(function))

    def __repr__(self) -> str:
        return f"<Ledger {str(self._place)!r} {'closed' if self._executor is None else 'open'}>"


class LedgerJob:
    """One job of a ledger, from `Ledger.job`. Reading works while the job runs, `resolve` only while it does not."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self.name = name

    async def stats(self) -> JobStats:
        """How the job stands. Raises `LedgerError` if there is no job of this name."""
        from evolink_async.ledger.reports import job_stats

        return await self._ledger._ask(job_stats, self.name)

    async def unknown(self) -> list[UnknownRequest]:
        """The requests of which it is not certain what they have cost, with the credits at risk.

        While a program runs the job, what it has on the wire is not among them. `candidates` finds tasks for them.
        """
        from evolink_async.ledger.reports import unknown_requests

        return await self._ledger._ask(unknown_requests, self.name)

    async def find(self, identity: str) -> Row | None:
        """One of its requests; None if it has none of this identity."""
        from evolink_async.ledger.reports import find_row

        return await self._ledger._ask(find_row, self.name, _checked_identity(identity))

    async def find_many(self, identities: Sequence[str]) -> dict[str, Row]:
        """Those of its requests that have one of these identities."""
        from evolink_async.ledger.reports import find_rows

        return await self._ledger._ask(find_rows, self.name, [_checked_identity(identity) for identity in identities])

    async def prices(self) -> dict[str, Decimal]:
        """What a request is taken to cost, by price class (`pool.pricing`): the last that the service has reserved.

        Where a request has used more than was reserved for it, what it has used; 0 only if one has used nothing.
        """
        from evolink_async.ledger.reports import known_prices

        return await self._ledger._ask(known_prices, self.name)

    async def seconds_taken(self) -> dict[str, float]:
        """How long a task took from its submission to its known end, by model: the median of the latest."""
        from evolink_async.ledger.reports import seconds_taken

        return await self._ledger._ask(seconds_taken, self.name)

    async def costs(self) -> list[Cost]:
        """What the job has cost over all runs and tries, by day and model."""
        from evolink_async.ledger.reports import costs

        return await self._ledger._ask(costs, self.name)

    async def rows(self, *states: str) -> AsyncGenerator[Row, None]:
        """Its requests, in the order they were first pulled; only those in one of `states`, where any are given."""
        from evolink_async.ledger.reports import page_of_rows

        wanted = [State(state) for state in _checked_states(states)]
        last = 0
        while page := await self._ledger._ask(page_of_rows, self.name, last, wanted):
            for row in page:
                yield row
            last = page[-1].id

    async def resolve(
        self, identity: str, *, task_id: str | None = None, submitted: bool | None = None, give_up: bool = False
    ) -> Row:
        """Settle a request that is unknown, by what you have found out; give one of three.

        task_id: it was accepted, and this is its task: the next run polls it on. submitted=False: it was not accepted:
        its credits are released, and the next run submits it again. give_up=True: it can't be found out: it is never
        submitted again, keeps its credits reserved, and is no longer listed by `unknown`.

        The request as it is then. Raises `InvalidRequestError` for a request that isn't unknown, and for a task that
        another request in the ledger has; `LedgerError` while the job is running. Nothing is asked of the service.
        """
        from evolink_async.ledger.reports import job_stats, refuse_taken

        told = (task_id is not None) + (submitted is not None) + (give_up is not False)
        if told != 1 or submitted not in (None, False) or give_up not in (False, True):
            raise InvalidRequestError("give one of task_id=..., submitted=False, give_up=True")
        _checked_identity(identity)
        if task_id is not None:
            checked_id(task_id)
        await self._ledger._ask(job_stats, self.name)  # a job that isn't there is not made
        async with self._ledger._resolving:
            job = await _open(self._ledger._place, self.name, None, begins_run=False)
            try:
                row = await job.find(identity)
                if row is None:
                    raise InvalidRequestError(f"job {self.name!r} has no request {identity!r}", param="identity")
                if row.state not in (State.UNSETTLED, State.GIVEN_UP):
                    message = f"request {identity!r} is {row.state}: only one that is unknown can be resolved"
                    raise InvalidRequestError(message, param="identity")
                if task_id is not None:
                    await self._ledger._ask(refuse_taken, self.name, identity, task_id)
                    await job.accepted(row, task_id, reserved=None, at=datetime.now(UTC))
                elif give_up and row.state is State.UNSETTLED:
                    await job.given_up(row)
                elif not give_up:
                    await job.not_submitted(row)
            finally:
                await job.aclose()
        return row


def _checked_identity(identity: str) -> str:
    if not isinstance(identity, str) or not is_text(identity):
        raise InvalidRequestError(f"a request is named by its identity, got {identity!r}", param="identity")
    return identity


def _checked_states(states: Sequence[str]) -> Sequence[str]:
    for state in states:
        if state not in frozenset(State):
            raise InvalidRequestError(f"no state {state!r}; there are {', '.join(State)}", param="states")
    return states
