"""How what has changed in memory becomes durable: in turns, each one transaction.

While one turn is written in the ledger's thread the next one gathers, so a thousand waiting callers cost one commit. A
turn writes whole rows as they were when it began, and the sums of the job with them. So what is on disk was true in
memory at one moment, and a turn that failed is made good by the next one that does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from evolink_async.errors import LedgerError
from evolink_async.ledger.states import State
from evolink_async.ledger.values import PastTry, StoredRow, written
from evolink_async.types import Task

logger = logging.getLogger("evolink_async.ledger")

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds before what could not be written is tried again
_LAST_TRIES = 2  # when it is closed


@dataclass(frozen=True, slots=True)
class JobSums:
    """What is stored of a job as a whole."""

    reserved: int
    spent: int
    probe: int | None
    probe_price: str | None
    replays: int
    keys_honoured: bool
    requests: int


@dataclass(slots=True)
class Batch:
    """What one turn writes, and what it looks up afterwards.

    rows: as `values.written` gives them. past: of a request that has a new one, all of them. job: None: nothing is to
    be written. contents: of those without a key, and how many of each come now; counted: how many of them came before
    in this run, where that is known. prices: by class, what was last reserved, and what was used above that.
    """

    rows: list[tuple[Any, ...]] = field(default_factory=list)
    bodies: dict[int, bytes] = field(default_factory=dict)
    results: list[tuple[int, Task | None, tuple[str, ...]]] = field(default_factory=list)
    past: dict[int, tuple[PastTry, ...]] = field(default_factory=dict)
    prices: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    learned: str | None = None
    job: JobSums | None = None
    identities: set[str] = field(default_factory=set)
    contents: dict[bytes, int] = field(default_factory=dict)
    counted: dict[bytes, int] = field(default_factory=dict)


@dataclass(slots=True)
class Found:
    """Rows by identity, and how often each content came before in this run."""

    rows: dict[str, StoredRow] = field(default_factory=dict)
    counts: dict[bytes, int] = field(default_factory=dict)


class Store(Protocol):
    """Where the rows of one job are kept. Everything blocks, and is called from one thread at a time."""

    def carry_out(self, batch: Batch) -> Found:
        """Write the batch as a whole or not at all, then look up. Raises `LedgerError`."""

    def refuse(self, key: str) -> None:
        """Raise `InvalidRequestError` for a key that cannot be stored. In the loop."""

    def close(self) -> None:
        """Let go of everything, and let another process have the job."""


@dataclass(slots=True)
class _Waiting:
    """A change that is not on disk yet. undo: of what was asked for; what was told stays. loss: what to log of it."""

    future: asyncio.Future[Any]
    value: Any
    undo: Callable[[], None] | None
    loss: str | None


@dataclass(slots=True)
class _Reading:
    """A question to the store."""

    future: asyncio.Future[Any]
    ask: Callable[[Batch], None]
    found: Callable[[Found], None]


@dataclass(slots=True)
class _Turn:
    """A turn under way: what is in it, to be put back if it fails. rows: with how many past tries each has then."""

    batch: Batch
    rows: dict[StoredRow, int]
    results: set[StoredRow]
    waiting: list[_Waiting]
    reading: list[_Reading]


class Turns:
    """Writes what is noted. `broken` says why there is something that could not be written."""

    def __init__(self, store: Store, executor: Executor, sums: Callable[[], JobSums]) -> None:
        self.broken: LedgerError | None = None
        self._loop = asyncio.get_running_loop()
        self._store = store
        self._executor = executor
        self._sums = sums
        self._sums_changed = False
        self._rows: dict[StoredRow, None] = {}
        self._bodies: dict[int, bytes] = {}
        self._results: set[StoredRow] = set()
        self._prices: dict[str, tuple[int, int | None]] = {}
        self._learned: str | None = None
        self._waiting: list[_Waiting] = []
        self._reading: list[_Reading] = []
        self._turn: _Turn | None = None
        self._due = False  # a turn is about to begin
        self._ended = asyncio.Event()
        self._pause = _FIRST_PAUSE
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    # What is to be written: noted first, then asked to become `durable` in the same step

    def note(self, row: StoredRow) -> None:
        """A row has changed."""
        self._rows[row] = None
        self._sums_changed = True

    def note_body(self, row: StoredRow) -> None:
        """A row has another body."""
        if row.body is not None:
            self._bodies[row.id] = row.body

    def note_result(self, row: StoredRow) -> None:
        """A row has another task or files."""
        self._results.add(row)

    def note_price(self, price: str, reserved: int, used: int | None) -> None:
        """A price is known."""
        self._prices[price] = reserved, used

    def note_learned(self, text: str) -> None:
        """Something else was learned."""
        self._learned = text

    def forget(self, row: StoredRow) -> None:
        """A row is not to be written after all."""
        self._rows.pop(row, None)

    def durable(
        self,
        future: asyncio.Future[T],
        value: T,
        undo: Callable[[], None] | None = None,
        loss: str | None = None,
    ) -> asyncio.Future[T]:
        """Give the future its value when everything noted so far is on disk."""
        self._waiting.append(_Waiting(future, value, undo, loss))
        self._sums_changed = True
        self._soon()
        return future

    def look_up(
        self, future: asyncio.Future[T], ask: Callable[[Batch], None], found: Callable[[Found], None]
    ) -> asyncio.Future[T]:
        """After the next turn tell `found` what `ask` has put into its batch; if it fails the future gets the error."""
        self._reading.append(_Reading(future, ask, found))
        self._soon()
        return future

    def refuse(self, key: str) -> None:
        """Raise `InvalidRequestError` for a key that cannot be stored."""
        self._store.refuse(key)

    async def finish(self) -> None:
        """Write the rest and close the store. Raises `LedgerError` for what cannot be written."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        failures = 0
        while self._turn is not None or (self._has_work and failures < _LAST_TRIES):
            if self._turn is None:
                self._begin()
            self._ended.clear()
            await self._ended.wait()
            failures = 0 if self.broken is None else failures + 1
        closing = self._executor.submit(self._store.close)
        self._executor.shutdown(wait=False)
        await asyncio.wrap_future(closing)
        if self._sums_changed:
            running = [row.task_id for row in self._rows if row.state is State.ACCEPTED]
            tasks = f"; it does not know the running tasks {', '.join(map(str, running))}" if running else ""
            message = f"{len(self._rows)} requests could not be written to the ledger: {self.broken}{tasks}"
            raise LedgerError(message) from self.broken

    # Turns

    @property
    def _has_work(self) -> bool:
        return bool(self._sums_changed or self._reading)

    def _soon(self) -> None:
        if self._turn is None and not self._due:
            self._due = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._due = False
        if self._turn is not None or not self._has_work:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._turn = turn = self._gather()
        call = self._executor.submit(self._store.carry_out, turn.batch)
        call.add_done_callback(self._carried_out)

    def _gather(self) -> _Turn:
        """Take everything that is to be written or looked up, as it is at this moment."""
        batch = Batch(bodies=self._bodies, prices=self._prices, learned=self._learned)
        rows = {row: len(row.past) for row in self._rows}
        for row in rows:
            batch.rows.append(written(row))
            if len(row.past) > row._past_written:
                batch.past[row.id] = row.past
        batch.results = [(row.id, row.task, row.files) for row in self._results]
        if self._sums_changed:
            batch.job = self._sums()
        self._reading = [reading for reading in self._reading if _unless_it_fails(reading, reading.ask, batch)]
        turn = _Turn(batch, rows, self._results, self._waiting, self._reading)
        self._sums_changed, self._learned = False, None
        self._rows, self._bodies, self._results, self._prices, self._waiting, self._reading = {}, {}, set(), {}, [], []
        return turn

    def _carried_out(self, call: Future[Found]) -> None:
        """In the ledger's thread."""
        try:
            self._loop.call_soon_threadsafe(self._end, call)
        except RuntimeError:
            logger.debug("the event loop ended before the ledger's last turn did")

    def _end(self, call: Future[Found]) -> None:
        turn, self._turn = self._turn, None
        assert turn is not None
        self._ended.set()
        error = call.exception()
        if error is None:
            self._succeed(turn, call.result())
        else:
            self._fail(turn, _as_ledger_error(error))
        if self._waiting or self._reading or (self._sums_changed and self.broken is None):
            self._soon()

    def _succeed(self, turn: _Turn, found: Found) -> None:
        if turn.batch.job is not None and self.broken is not None:
            logger.warning("the ledger can be written again", extra={"event": "ledger_recovered"})
            self.broken, self._pause = None, _FIRST_PAUSE
        for row, past in turn.rows.items():
            row._past_written = past
        for waiting in turn.waiting:
            if not waiting.future.done():
                waiting.future.set_result(waiting.value)
        for reading in turn.reading:
            _unless_it_fails(reading, reading.found, found)

    def _fail(self, turn: _Turn, error: LedgerError) -> None:
        """Nothing of the turn was written: what was told is kept, what was asked for is undone."""
        if turn.batch.job is not None:
            self._keep(turn)
            for waiting in reversed(turn.waiting):
                if waiting.undo is not None:
                    waiting.undo()
            if self.broken is None:
                logger.error(
                    "%s; what has happened is kept, and written again", error, extra={"event": "ledger_unwritten"}
                )
            self.broken = error
            if not self._closing:
                self._timer = self._loop.call_later(self._pause, self._soon)
                self._pause = min(_LONGEST_PAUSE, self._pause * 2)
        for waiting in turn.waiting:
            if waiting.loss is not None:
                logger.error("%s, and that is not in the ledger yet", waiting.loss, extra={"event": "ledger_behind"})
            _refuse(waiting.future, error)
        for reading in turn.reading:
            _refuse(reading.future, error)

    def _keep(self, turn: _Turn) -> None:
        self._rows = dict.fromkeys(turn.rows) | self._rows
        self._bodies = turn.batch.bodies | self._bodies
        self._prices = turn.batch.prices | self._prices
        self._results |= turn.results
        if self._learned is None:
            self._learned = turn.batch.learned
        self._sums_changed = True


def _unless_it_fails(reading: _Reading, step: Callable[[T], None], value: T) -> bool:
    """Whether a step of a question went well. A fault in it is that one's only: nobody else is kept waiting."""
    try:
        step(value)
    except Exception as error:  # noqa: BLE001  (a fault of ours)
        _refuse(reading.future, _as_ledger_error(error))
        return False
    return True


def _as_ledger_error(error: BaseException) -> LedgerError:
    if isinstance(error, LedgerError):
        return error
    logger.error("the ledger failed inside this library", exc_info=error, extra={"event": "internal_error"})
    fault = LedgerError(f"the ledger failed inside this library: {type(error).__name__}")
    fault.__cause__ = error
    return fault


def _refuse(future: asyncio.Future[Any], error: LedgerError) -> None:
    if not future.done():
        own = LedgerError(error.message)  # each waiter raises one of his own, for each adds his traceback to it
        own.__cause__ = error.__cause__
        future.set_exception(own)
        future.exception()  # looked at, so that asyncio does not complain: whoever only tells need not wait
