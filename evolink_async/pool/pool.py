"""`TaskPool`: hand it ten or a million requests, get every outcome as it completes.

This is what the caller sees of a pool; what it does is in `engine`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from evolink_async.checks import checked_count, checked_function, checked_id, checked_seconds
from evolink_async.errors import ClosedError, ConfigurationError, InvalidRequestError
from evolink_async.ledger import Census, checked_job, open_job
from evolink_async.pool.doubts import Doubts, Receiver, checked_receiver
from evolink_async.pool.engine import Engine
from evolink_async.pool.journal import Journal
from evolink_async.pool.options import MOST, refuse_unknown
from evolink_async.pool.outcome import Outcome, PoolStats
from evolink_async.pool.pricing import Prices, checked_credits, checked_prices
from evolink_async.pool.record import OUTSTANDING
from evolink_async.requests import GenerationRequest
from evolink_async.saving.saver import Saver
from evolink_async.types import TASK_ID, Task

if TYPE_CHECKING:
    from evolink_async.core import ClientCore

__all__ = ["TaskPool"]

Source = GenerationRequest | Iterable[GenerationRequest] | AsyncIterable[GenerationRequest]


class TaskPool:
    """Many requests through one client; an async context manager and an async iterator of `Outcome`.

        async with client.pool(requests, max_outstanding=200) as pool:
            async for outcome in pool:                       # as each completes
                print(outcome.key, outcome.status, outcome.urls, outcome.error)

    requests: a request, an iterable or an async iterable of requests; read only as far as there is room.
    max_outstanding: tasks that run at the service at once; a source is read only while outstanding + waiting + untaken
        outcomes stay below it, so a slow reader slows the sources.
    ledger: a path, or a postgresql:// URL: what was sent, accepted and paid for is written there and survives a crash;
        run the same program again and it goes on (docs/ledger.md). None: ids live in this process only.
    job: the name of this set of requests in the ledger. Only one process at a time may run it.
    max_credits: no request is sent that would bring what is spent and reserved above it, over all runs of the job. A
        service that uses more than it reserves is found out when the first such task ends (docs/ledger.md).
    prices: credits by model, or a function of a request that gives its credits (None: not known). What is not told is
        taken from the last request of the same kind; the first of a kind is tried alone. A function that raises has its
        request rejected.
    save_to: a folder, or s3://, gs://, az:// (extra `storage`): the results of each task that completes are saved there
        before its outcome is yielded (docs/saving.md). What is saved already is not fetched again.
    task_timeout: seconds that a task is watched, None: for ever; then its outcome is `unfinished` with its id.
    retry_failed: so many times a task that failed for a passing reason is generated, and paid for, once more.
    stop_after_rejections: so many identical refusals in a row end the pool; None: never. Where nobody is reached, each
        request that `RetryPolicy.unreachable_for` has run out for is one.
    callbacks: a `CallbackReceiver`, which gives each request its `callback_url` unless it has one. Callbacks hasten
        looks and settle what is unknown; polling goes on as without them (docs/callbacks.md).
    on_progress: plain function, called with `PoolStats` at most once a second, and at the end.

    A bad item is an outcome, never an exception out of the loop. What ends the pool early (no access, no credits, the
    budget, a ledger that cannot be written, an exception in an iterable, a run of identical refusals, a cool-down over
    an hour) is its `reason`: the sources are closed, what is outstanding is finished and yielded, and leaving the block
    raises the reason once. What is wrong with the ledger is raised as `LedgerError` on entering the block.

    Leaving early (break, exception, cancellation) gives POSTs under way 5 s to be answered; `leftovers` then holds an
    outcome for everything that was sent and not handed over. The tasks go on at the service.

    A pool is used once. `add`, `attach`, `stop` and `notify` are plain functions. Since 0.1.0.
    """

    def __init__(
        self,
        core: ClientCore,
        requests: Source | None = None,
        *,
        max_outstanding: int = 1000,
        ledger: str | os.PathLike[str] | None = None,
        job: str = "default",
        max_credits: Decimal | float | None = None,
        prices: Prices | None = None,
        save_to: str | os.PathLike[str] | None = None,
        task_timeout: float | None = 3600,
        retry_failed: int = 0,
        stop_after_rejections: int | None = 20,
        callbacks: Receiver | None = None,
        on_progress: Callable[[PoolStats], object] | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(unknown)
        checked_job(ledger, job)
        self._core = core
        self._ledger = ledger
        self._job_name = job
        self._max_credits = checked_credits(max_credits, "max_credits")
        self._prices = checked_prices(prices)
        self._prices_by_model = dict(prices) if isinstance(prices, Mapping) else {}
        if stop_after_rejections is not None:
            checked_count(stop_after_rejections, "stop_after_rejections", 1, MOST)
        checked_function(on_progress, "on_progress")
        self._engine = Engine(
            core,
            most=checked_count(max_outstanding, "max_outstanding", 1, MOST),
            saver=None if save_to is None else _saver(core, save_to),
            task_timeout=checked_seconds(task_timeout, "task_timeout"),
            retry_failed=checked_count(retry_failed, "retry_failed", 0, MOST),
            stop_after_rejections=stop_after_rejections,
            on_progress=on_progress,
        )
        if callbacks is not None:
            self._doubt(checked_receiver(callbacks, core), fills=True)
        if requests is not None:
            self.add(requests)

    # For the caller

    def add(self, more: Source) -> None:
        """More requests: one, an iterable or an async iterable. Returns at once; single ones go before iterables.

        Raises `ClosedError` after `stop` or the block, `InvalidRequestError` for what is no source. When the pool has
        ended early an iterable is not read any more, and a single request comes back `not_submitted`.
        """
        self._refuse_if_over("add", stopped=self._engine.stopped)
        self._engine.add(more)

    def attach(self, task_ids: str | Iterable[str]) -> None:
        """Follow tasks that exist already: their outcomes are yielded with request None and the id as key.

        Raises `ClosedError` after the block, `InvalidRequestError` for what is no task id.
        """
        self._refuse_if_over("attach")
        if not isinstance(task_ids, Iterable):
            raise InvalidRequestError(f"no task ids: {task_ids!r}", param="task_ids")
        ids = [task_ids] if isinstance(task_ids, str) else list(task_ids)
        for task_id in [checked_id(task_id) for task_id in ids]:
            self._engine.attach(task_id)

    async def run(self, request: GenerationRequest) -> Outcome:
        """One request through the pool: its outcome, which the iteration does not yield.

        It goes ahead of the sources and waits only for a place among the outstanding, never for the reader, so it can
        be awaited inside the loop. Cancelling it stops the waiting, not the task (whose id is in a note of the
        exception); a request that was not sent yet is not sent any more. Raises `ClosedError` after `stop` or the
        block; everything else is in the outcome.
        """
        self._refuse_if_over("run", stopped=self._engine.stopped)
        self._refuse_if_not_entered()
        waiter: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        record = self._engine.give(request, waiter)
        try:
            return await waiter
        except asyncio.CancelledError as cancellation:
            await self._engine.desert(record, waiter, cancellation)
            raise

    def stop(self) -> None:
        """Submit nothing more and finish what is outstanding; requests not sent yet come back `not_submitted`."""
        self._refuse_elsewhere("stop")
        self._engine.stop()

    def notify(self, task_id_or_body: str | bytes | Mapping[str, Any] | Task) -> None:
        """A hint, e.g. from a callback, that a task may have ended: it is looked at now. Never believed.

        An id, a task, or the body of a callback, parsed or as it came. What names no task of this pool does nothing.
        """
        self._refuse_elsewhere("notify")
        task_id = _task_id_in(task_id_or_body)
        if isinstance(task_id, str):
            self._engine.notify(task_id)

    def _heed(self, receiver: Receiver) -> None:
        """Callbacks that come to this receiver are about requests of this pool."""
        engine = self._engine
        if engine.doubts is None:
            doubts = self._doubt(receiver, fills=False)
            if engine.entered and not engine.left:
                doubts.open()
        elif engine.doubts.receiver is not receiver:
            raise ConfigurationError("this pool has another receiver of callbacks already")

    def _doubt(self, receiver: Receiver, *, fills: bool) -> Doubts:
        self._engine.doubts = Doubts(self._engine, receiver, job=self._job_name, ledger=self._ledger, fills=fills)
        return self._engine.doubts

    @property
    def reason(self) -> BaseException | None:
        """What ended the pool early, None while nothing has."""
        return self._engine.reason

    @property
    def outstanding(self) -> tuple[str, ...]:
        """The ids of the tasks that run now."""
        held = self._engine.stages.these(OUTSTANDING)
        return tuple(record.task_id for record in held if record.task_id is not None)

    @property
    def leftovers(self) -> list[Outcome]:
        """After the block: an outcome for everything that was sent and not handed over.

        Inside the block: those of `run` calls that were cancelled.
        """
        return list(self._engine.leftovers)

    @property
    def stats(self) -> PoolStats:
        """How the pool is doing now; after the block, how it did."""
        return self._engine.stats()

    @property
    def census(self) -> Census | None:
        """How the requests pulled so far compare with those of earlier runs; None without a ledger."""
        return self._engine.census()

    @property
    def _state(self) -> str:
        engine = self._engine
        return "left" if engine.left else "stopped" if engine.stopped else "open" if engine.entered else "not entered"

    def _repr_html_(self) -> str:
        from evolink_async.html import table

        rows: list[tuple[str, object]] = [("pool", self._state)]
        if self.reason is not None:
            rows.append(("ended early", f"{type(self.reason).__name__}: {self.reason}"))
        if leftovers := len(self._engine.leftovers):
            rows.append(("leftovers", f"{leftovers:,}: sent and not handed over, see pool.leftovers"))
        return table(rows) + self.stats._repr_html_()

    def __repr__(self) -> str:
        engine = self._engine
        return (
            f"<TaskPool {self._state}: {engine.stages.waiting} waiting, {engine.outstanding} outstanding, "
            f"{len(engine.stages.untaken)} untaken, {engine.finished} finished>"
        )

    # The block

    async def __aenter__(self) -> Self:
        engine = self._engine
        if engine.entered:
            raise ClosedError("a pool is used once; make a new one with client.pool(...)")
        session = self._core.open()
        await engine.prepare()
        job = await open_job(self._ledger, self._job_name, max_credits=self._max_credits)
        durable = self._ledger is not None
        journal = Journal(job, session.submitter.replays, self._prices, engine.end_early, engine.heard, durable=durable)
        journal.start_warm(self._core.memory.schedule)
        if job.probe is not None:  # an earlier run has left it
            journal.price_probe(checked_credits(self._prices_by_model.get(job.probe.model), "prices"))
        engine.start(session, journal)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._engine.left:
            return
        await self._engine.aclose()
        if exc is None and self.reason is not None:
            raise self.reason

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outcome:
        engine = self._engine
        if engine.loop is not asyncio.get_running_loop():
            self._refuse_if_over("iterating")
            self._refuse_if_not_entered()
        untaken = engine.stages.untaken
        while not untaken:
            if engine.is_done:
                raise StopAsyncIteration
            engine.changed.clear()
            await engine.changed.wait()
            self._refuse_if_over("iterating")
        # No await from here on: an outcome that is taken is handed over.
        outcome = untaken.popleft()
        engine.sources.notice_room()
        return outcome

    def _refuse_if_over(self, what: str, *, stopped: bool = False) -> None:
        if self._engine.left:
            raise ClosedError(f"{what}: the pool's block has been left; what was not handed over is in pool.leftovers")
        if stopped:
            raise ClosedError(f"{what}: the pool was stopped")
        self._refuse_elsewhere(what)

    def _refuse_elsewhere(self, what: str) -> None:
        if self._engine.entered and not self._engine.left and self._engine.session.loop is not _running_loop():
            raise ConfigurationError(
                f"{what}: a pool belongs to the event loop that its block was entered in; from another thread, use "
                "loop.call_soon_threadsafe or asyncio.run_coroutine_threadsafe"
            )

    def _refuse_if_not_entered(self) -> None:
        if not self._engine.entered:
            raise ConfigurationError("enter the pool first: async with client.pool(...) as pool")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _task_id_in(hint: object) -> object:
    if isinstance(hint, Task):
        return hint.id
    if isinstance(hint, bytes) or (isinstance(hint, str) and not TASK_ID.fullmatch(hint)):
        try:
            hint = json.loads(hint)
        except (ValueError, RecursionError):
            return None
    return hint.get("id") if isinstance(hint, Mapping) else hint


def _saver(core: ClientCore, save_to: str | os.PathLike[str]) -> Saver:
    try:
        return Saver(core, save_to)
    except ConfigurationError as error:
        raise ConfigurationError(f"save_to: {error.message}") from None
