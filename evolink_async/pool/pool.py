"""`TaskPool`: hand it ten or a million requests, get every outcome as it completes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from evolink_async.client import checked_seconds, failure_of, still_running
from evolink_async.errors import (
    APIStatusError,
    ClosedError,
    ConfigurationError,
    EvoLinkError,
    InvalidRequestError,
    NotSubmittedError,
    TaskLostError,
)
from evolink_async.http.pace import Urgency
from evolink_async.http.submit import GRACE, Settled, Submission, new_idempotency_key
from evolink_async.polling.watcher import has_result
from evolink_async.pool.identity import Identities
from evolink_async.pool.outcome import Outcome, OutcomeStatus, PoolStats
from evolink_async.pool.record import Record, State
from evolink_async.pool.sources import Sources
from evolink_async.requests import GenerationRequest
from evolink_async.types import TASK_ID, Task, TaskStatus

if TYPE_CHECKING:
    from evolink_async.client import AsyncEvoLink

__all__ = ["TaskPool", "run_many"]

logger = logging.getLogger("evolink_async.pool")

Source = GenerationRequest | Iterable[GenerationRequest] | AsyncIterable[GenerationRequest]

MOST_OUTSTANDING = 1_000_000
LONGEST_COOL_DOWN = 3600.0
PROBE_PAUSE = 30.0  # without sources, 401 and 402 don't end a pool: one request in this many seconds finds out
PROGRESS_PAUSE = 1.0
WARN_WITHOUT_LEDGER_AT = 100

# In the contract, and refused until the rooms that carry them out exist: ignoring one would be worse.
_LATER = ("ledger", "max_credits", "prices", "save_to", "callbacks")


class TaskPool:
    """Many requests through one client; an async context manager and an async iterator of `Outcome`.

        async with client.pool(requests, max_outstanding=200) as pool:
            async for outcome in pool:                       # as each completes
                print(outcome.key, outcome.status, outcome.urls, outcome.error)

    requests: a request, an iterable or an async iterable of requests; read only as far as there is room.
    max_outstanding: tasks that run at the service at once; a source is read only while outstanding + waiting + untaken
        outcomes stay below it, so a slow reader slows the sources.
    task_timeout: seconds that a task is watched, None: for ever; then its outcome is `unfinished` with its id.
    stop_after_rejections: so many identical refusals in a row end the pool; None: never.
    on_progress: plain function, called with `PoolStats` at most once a second.

    A bad item is an outcome, never an exception out of the loop. What ends the pool early (no access, no credits, an
    exception in an iterable, a run of identical refusals, a cool-down over an hour) is its `reason`: the sources are
    closed, what is outstanding is finished and yielded, and leaving the block raises the reason once.

    Leaving early (break, exception, cancellation) gives POSTs under way 5 s to be answered; `leftovers` then holds an
    outcome for everything that was sent and not handed over. The tasks go on at the service.

    A pool is used once. `add`, `attach`, `stop` and `notify` are plain functions. Since 0.1.0.
    """

    def __init__(
        self,
        client: AsyncEvoLink,
        requests: Source | None = None,
        *,
        max_outstanding: int = 1000,
        task_timeout: float | None = 3600,
        stop_after_rejections: int | None = 20,
        on_progress: Callable[[PoolStats], object] | None = None,
        **later: Any,
    ) -> None:
        _refuse_unknown(later)
        self._client = client
        self._max = _whole(max_outstanding, "max_outstanding", MOST_OUTSTANDING)
        self._task_timeout = checked_seconds(task_timeout, "task_timeout")
        self._stop_after = (
            None
            if stop_after_rejections is None
            else _whole(stop_after_rejections, "stop_after_rejections", MOST_OUTSTANDING)
        )
        if on_progress is not None and not callable(on_progress):
            raise ConfigurationError("on_progress must be a plain function")
        self._on_progress = on_progress

        self._sources = Sources(self._has_room, self._take, self._source_failed, self._notify_reader)
        self._has_sources = False
        self._identities = Identities()
        self._entered = self._stopped = self._left = False
        self._reason: BaseException | None = None
        self._reason_raised = False

        self._pulled: deque[Record] = deque()  # wait for a place
        self._runs: deque[Record] = deque()  # the same, and somebody awaits them: these go first
        self._active: set[Record] = set()  # hold a place: sending or outstanding
        self._unsent: dict[Record, None] = {}  # those of `_active` from sources whose first POST is still to come
        self._by_task: dict[str, Record] = {}
        self._untaken: deque[Outcome] = deque()
        self._unclaimed: list[Outcome] = []  # of runs whose callers had gone
        self._unfinished = 0  # requests of the sources, and attached tasks, without an outcome
        self._deadlines: OrderedDict[Record, None] = OrderedDict()  # the earliest first
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

        self._next_index = 0
        self._counts: Counter[str] = Counter()
        self._posts = self._polls = self._rate_limited = 0
        self._reserved = self._spent = Decimal(0)
        self._durations = 0.0
        self._models: set[str] = set()
        self._refusal: tuple[Any, ...] | None = None
        self._refusals = 0
        self._blocked_until = -math.inf
        self._blocked_by: BaseException | None = None
        self._leftovers: list[Outcome] = []
        self._progress_timer: asyncio.TimerHandle | None = None
        self._progress_at = -math.inf
        if requests is not None:
            self.add(requests)

    # For the caller

    def add(self, more: Source) -> None:
        """More requests: one, an iterable or an async iterable. Returns at once; single ones go before iterables.

        Raises `ClosedError` after `stop` or the block, `InvalidRequestError` for what is no source.
        """
        self._refuse_if_over("add")
        self._sources.add(more)
        self._has_sources = True
        if self._reason is not None:
            self._sources.close()

    def attach(self, task_ids: str | Iterable[str]) -> None:
        """Follow tasks that exist already: their outcomes are yielded with request None and the id as key."""
        self._refuse_if_over("attach")
        for task_id in [task_ids] if isinstance(task_ids, str) else list(task_ids):
            if not isinstance(task_id, str) or not TASK_ID.fullmatch(task_id):
                raise InvalidRequestError(f"no task id: {task_id!r}", param="task_ids")
            if task_id not in self._by_task:
                record = Record(self, None, None, task_id, task_id, task=Task(id=task_id))
                self._unfinished += 1
                self._by_task[task_id] = record
                self._active.add(record)
                if self._entered:
                    self._follow(record, None)

    async def run(self, request: GenerationRequest) -> Outcome:
        """One request through the pool: its outcome, which the iteration does not yield.

        It goes ahead of the sources and waits only for a place among the outstanding, never for the reader, so it can
        be awaited inside the loop. Cancelling it stops the waiting, not the task (whose id is in a note of the
        exception); a request that was not sent yet is not sent any more. Raises `ClosedError` after `stop` or the
        block; everything else is in the outcome.
        """
        self._refuse_if_over("run")
        if not self._entered:
            raise ConfigurationError("enter the pool first: async with client.pool(...) as pool")
        record = self._new_record(request, asyncio.get_running_loop().create_future())
        assert record.waiter is not None
        if not self._refused_before_sending(record):
            self._runs.append(record)
            self._fill()
        try:
            return await record.waiter
        except asyncio.CancelledError as cancellation:
            await self._run_cancelled(record, cancellation)
            raise

    def stop(self) -> None:
        """Submit nothing more and finish what is outstanding; requests not sent yet come back `not_submitted`."""
        if not self._stopped:
            self._stopped = True
            self._withdraw_unsent(ClosedError("the pool was stopped"))

    def notify(self, task_id_or_body: str | Mapping[str, Any]) -> None:
        """A hint, e.g. from a callback, that a task may have ended: it is looked at now. Never believed."""
        task_id = task_id_or_body.get("id") if isinstance(task_id_or_body, Mapping) else task_id_or_body
        if isinstance(task_id, str) and task_id in self._by_task and self._entered and not self._left:
            self._session.watcher.notify(task_id)

    @property
    def reason(self) -> BaseException | None:
        """What ended the pool early, None while nothing has."""
        return self._reason

    @property
    def outstanding(self) -> tuple[str, ...]:
        """The ids of the tasks that run now."""
        return tuple(self._by_task)

    @property
    def leftovers(self) -> list[Outcome]:
        """After the block: an outcome for everything that was sent and not handed over."""
        return list(self._leftovers)

    @property
    def stats(self) -> PoolStats:
        """How the pool is doing now."""
        session = self._session if self._entered else None
        now = session.loop.time() if session else 0.0
        elapsed = now - self._entered_at if session else 0.0
        waiting = len(self._pulled) + len(self._runs) + len(self._unsent)
        finished = sum(self._counts.values())
        rate = session.pace.rate_of(self._models) if session and self._models else None
        return PoolStats(
            total=self._total(),
            pulled=self._next_index,
            waiting=waiting,
            outstanding=len(self._active) - len(self._unsent),
            untaken=len(self._untaken),
            counts={str(status): count for status, count in self._counts.items()},
            credits_reserved=self._reserved,
            credits_spent=self._spent,
            posts=self._posts,
            polls=self._polls,
            status_requests=session.watcher.requests - self._requests_before if session else 0,
            rate_limited=self._rate_limited,
            rate=rate,
            eta=self._eta(rate, finished),
            elapsed=elapsed,
        )

    def __repr__(self) -> str:
        state = "left" if self._left else "stopped" if self._stopped else "open" if self._entered else "not entered"
        waiting = len(self._pulled) + len(self._runs) + len(self._unsent)
        outstanding = len(self._active) - len(self._unsent)
        return (
            f"<TaskPool {state}: {waiting} waiting, {outstanding} outstanding, {len(self._untaken)} untaken, "
            f"{sum(self._counts.values())} finished>"
        )

    # The block

    async def __aenter__(self) -> Self:
        if self._entered:
            raise ClosedError("a pool is used once; make a new one with client.pool(...)")
        self._session = self._client._open()
        self._entered = True
        self._entered_at = self._session.loop.time()
        self._requests_before = self._session.watcher.requests
        for record in self._by_task.values():
            self._follow(record, None)
        self._sources.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._leave()
        finally:
            self._left = True
            self._collect_leftovers()
            self._report_progress()
            self._changed.set()
        if exc is None and self._reason is not None and not self._reason_raised:
            self._reason_raised = True
            raise self._reason

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outcome:
        if self._left:
            raise ClosedError("the pool's block has been left; what was not handed over is in pool.leftovers")
        if not self._entered:
            raise ConfigurationError("enter the pool first: async with client.pool(...) as pool")
        while not self._untaken:
            if self._sources.exhausted and not self._unfinished:
                raise StopAsyncIteration
            if self._left:
                raise ClosedError("the pool's block was left while this iteration waited")
            self._changed.clear()
            await self._changed.wait()
        # No await from here on: an outcome that is taken is handed over.
        outcome = self._untaken.popleft()
        self._sources.notice_room()
        if self._untaken:
            self._changed.set()
        return outcome

    # Pulling

    def _has_room(self) -> bool:
        return len(self._active) + len(self._pulled) + len(self._untaken) < self._max

    def _take(self, item: Any) -> None:
        """An item was pulled from a source."""
        record = self._new_record(item, None)
        self._unfinished += 1
        if self._next_index == WARN_WITHOUT_LEDGER_AT:
            logger.warning(
                "%d requests and no ledger: the ids of tasks that are paid for live in this process only",
                WARN_WITHOUT_LEDGER_AT,
            )
        if not self._refused_before_sending(record):
            self._pulled.append(record)
            self._fill()

    def _new_record(self, item: Any, waiter: asyncio.Future[Outcome] | None) -> Record:
        index = self._next_index
        self._next_index += 1
        request = item if isinstance(item, GenerationRequest) else None
        identity = self._identities.of(request) if request is not None else f"item-{index}"
        record = Record(self, index, request, request.key if request else None, identity, waiter)
        if request is None:
            error = InvalidRequestError(
                f"item {index} of the source is no request but {type(item).__name__}; "
                "make a request out of a dict with GenerationRequest.from_dict"
            )
            self._finish(record, OutcomeStatus.REJECTED, error)
        return record

    def _refused_before_sending(self, record: Record) -> bool:
        """Give the outcome of a request that will not be sent; True if there is one."""
        if record.state is State.UNTAKEN or record.request is None:
            return True
        if self._reason is not None or self._stopped:
            reason = self._reason or ClosedError("the pool was stopped")
            self._finish(record, OutcomeStatus.NOT_SUBMITTED, _not_submitted(reason))
            return True
        try:
            self._client._check(record.request)
        except InvalidRequestError as error:
            self._finish(record, OutcomeStatus.REJECTED, error)
            return True
        return False

    # Sending

    def _fill(self) -> None:
        """Give free places to requests that wait for one: those awaited first."""
        while self._runs and self._place_for_run():
            self._send(self._runs.popleft())
        while self._pulled and len(self._active) < self._max:
            self._send(self._pulled.popleft())

    def _place_for_run(self) -> bool:
        """Whether a run may be sent: only what is really outstanding keeps it waiting, so others wait in its stead."""
        if len(self._active) < self._max:
            return True
        if not self._unsent:
            return False
        record, _ = self._unsent.popitem()
        assert record.submission is not None
        self._session.submitter.withdraw(record.submission)
        self._active.discard(record)
        record.submission, record.state = None, State.PULLED
        self._pulled.appendleft(record)
        return True

    def _send(self, record: Record) -> None:
        assert record.request is not None
        record.idempotency_key = record.idempotency_key or new_idempotency_key()
        record.state = State.SENDING
        record.submission = Submission(
            record.request,
            record.idempotency_key,
            self,
            Urgency.SOURCE if record.waiter is None else Urgency.CALLER,
            record,
            self._client._options.retry.unreachable_for,
        )
        self._models.add(record.request.model)
        self._active.add(record)
        if self._blocked_by is not None and not self._may_probe():
            self._finish(record, OutcomeStatus.NOT_SUBMITTED, _not_submitted(self._blocked_by))
            return
        try:
            self._session.submitter.start(record.submission)
        except InvalidRequestError as error:
            self._finish(record, OutcomeStatus.REJECTED, error)
            return
        if record.waiter is None:
            self._unsent[record] = None

    def _may_probe(self) -> bool:
        now = self._session.loop.time()
        if now < self._blocked_until:
            return False
        self._blocked_until = now + PROBE_PAUSE
        return True

    def _posting(self, record: Record) -> None:
        self._unsent.pop(record, None)
        record.submitted_at = record.submitted_at or _now()
        self._progressed()

    def _count_posts(self, record: Record) -> None:
        sent = record.submission.attempts if record.submission else 0
        self._posts += sent - record.posts_counted
        record.posts_counted = sent

    def _held(self, record: Record, error: EvoLinkError) -> None:
        self._count_posts(record)
        if isinstance(error, APIStatusError) and error.status_code == 429:
            self._rate_limited += 1
        assert record.request is not None
        cool_down = self._session.pace.cool_down_of(record.request.model, self._session.loop.time())
        if cool_down > LONGEST_COOL_DOWN:
            self._end_early(error)
        self._progressed()

    def _settled(self, record: Record, settled: Settled) -> None:
        self._unsent.pop(record, None)
        self._count_posts(record)
        self._count_refusals(record, settled)
        if settled.ending == "accepted":
            assert settled.task is not None
            self._blocked_by = None
            self._accepted(record, settled.task)
        else:
            status = OutcomeStatus(settled.ending)
            error = settled.error
            if status is OutcomeStatus.NOT_SUBMITTED and not isinstance(error, NotSubmittedError):
                error = _not_submitted(error)
            self._finish(record, status, error)
        if settled.fatal is not None:
            if self._has_sources:
                self._end_early(settled.fatal)
            else:
                self._block(settled.fatal)

    def _accepted(self, record: Record, task: Task) -> None:
        record.task = task
        record.state = State.OUTSTANDING
        record.reserved = task.usage.credits_reserved
        self._reserved += record.reserved or 0
        logger.info("task %s accepted for request %s", task.id, record.identity)
        self._by_task[task.id] = record
        self._follow(record, 0.0)
        self._progressed()

    def _count_refusals(self, record: Record, settled: Settled) -> None:
        error = settled.error
        if settled.ending != "rejected" or not isinstance(error, APIStatusError):
            if settled.ending == "accepted":
                self._refusals = 0
            return
        model = record.request.model if record.request else None
        refusal = (error.status_code, error.code, error.param, model)
        self._refusals = self._refusals + 1 if refusal == self._refusal else 1
        self._refusal = refusal
        if self._stop_after is not None and self._refusals >= self._stop_after:
            self._end_early(error)

    # Watching

    def _follow(self, record: Record, age: float | None) -> None:
        task = record.task
        assert task is not None
        if task.is_terminal and (has_result(task) or not task.succeeded):
            self._conclude(record, task)
            return
        record.state = State.OUTSTANDING
        self._session.watcher.follow(task, record, age=age)
        if self._task_timeout is not None:
            record.deadline = self._session.loop.time() + self._task_timeout
            self._deadlines[record] = None
            self._watch_deadlines()

    def _seen(self, record: Record, task: Task) -> None:
        self._polls += 1

    def _ended(self, record: Record, task: Task) -> None:
        self._polls += 1
        self._conclude(record, task)

    def _conclude(self, record: Record, task: Task) -> None:
        error = failure_of(task)
        status = OutcomeStatus.COMPLETED
        if error is not None:
            status = OutcomeStatus.CANCELLED if task.status == TaskStatus.CANCELLED else OutcomeStatus.FAILED
        self._finish(record, status, error)

    def _lost(self, record: Record, error: EvoLinkError) -> None:
        lost = isinstance(error, TaskLostError)
        self._finish(record, OutcomeStatus.LOST if lost else OutcomeStatus.UNFINISHED, error)
        if isinstance(error, ClosedError):
            self._end_early(error)

    def _watch_deadlines(self) -> None:
        if self._deadline_timer is None and self._deadlines:
            at = next(iter(self._deadlines)).deadline
            self._deadline_timer = self._session.loop.call_at(at, self._check_deadlines)

    def _check_deadlines(self) -> None:
        self._deadline_timer = None
        now = self._session.loop.time()
        while self._deadlines and next(iter(self._deadlines)).deadline <= now:
            record, _ = self._deadlines.popitem(last=False)
            assert record.task is not None
            if record.looked:
                self._time_out(record)
            else:
                # Not one look was answered: it gets one now, and the time that takes.
                self._session.watcher.notify(record.task.id)
                self._session.loop.call_later(self._last_look_patience(), self._time_out, record)
        self._watch_deadlines()

    def _last_look_patience(self) -> float:
        return self._client._options.request_timeout or 15.0

    def _time_out(self, record: Record) -> None:
        if record.state is State.OUTSTANDING and record.task is not None:
            self._session.watcher.unfollow(record.task.id, record)
            self._finish(record, OutcomeStatus.UNFINISHED, still_running(record.task, self._task_timeout))

    # Ending one

    def _finish(self, record: Record, status: OutcomeStatus, error: EvoLinkError | None) -> None:
        """The one step into `untaken`, or to the caller of `run`."""
        if record.state is State.UNTAKEN:
            return
        outcome = self._close_record(record, status, error)
        if record.waiter is None:
            self._unfinished -= 1
            self._untaken.append(outcome)
        elif not record.waiter.done():
            record.waiter.set_result(outcome)
        elif outcome.attempts:
            self._unclaimed.append(outcome)
        self._fill()
        self._sources.notice_room()
        self._notify_reader()
        self._progressed()

    def _close_record(self, record: Record, status: OutcomeStatus, error: EvoLinkError | None) -> Outcome:
        was_outstanding = record.state is State.OUTSTANDING
        record.state = State.UNTAKEN
        self._active.discard(record)
        self._unsent.pop(record, None)
        self._deadlines.pop(record, None)
        if record.task is not None:
            self._by_task.pop(record.task.id, None)
        outcome = record.outcome(status, error, _now())
        self._counts[status] += 1
        if was_outstanding and record.request is not None:
            self._reserved -= record.reserved or 0
            self._spent += outcome.credits or 0
            self._durations += _seconds_between(record.submitted_at, outcome.finished_at)
        return outcome

    def _notify_reader(self) -> None:
        self._changed.set()

    # Ending all

    def _source_failed(self, error: BaseException) -> None:
        self._end_early(error)

    def _crashed(self, error: BaseException) -> None:
        """A worker failed: it is the reason, and what it was to do comes back as far as it is known."""
        self._end_early(error)
        for record in list(self._active):
            if record.state is State.OUTSTANDING and record.task is not None:
                self._session.watcher.unfollow(record.task.id, record)
                self._finish(record, OutcomeStatus.UNFINISHED, still_running(record.task, None))
            elif record.submission is not None:
                settled = self._session.submitter.known(record.submission)
                self._finish(record, OutcomeStatus.UNKNOWN, settled.error)

    def _end_early(self, reason: BaseException) -> None:
        if self._reason is not None:
            return
        self._reason = reason
        logger.warning("the pool ends early: %s", type(reason).__name__)
        self._withdraw_unsent(reason)

    def _block(self, error: BaseException) -> None:
        """Without sources: whoever waits hears at once, and one request in a while finds out when it is over."""
        self._blocked_by = error
        self._blocked_until = self._session.loop.time() + PROBE_PAUSE
        self._withdraw_unsent(error, close_sources=False)

    def _withdraw_unsent(self, reason: BaseException, *, close_sources: bool = True) -> None:
        """Nothing more is sent: what waits comes back."""
        if close_sources:
            self._sources.close()
        waiting = [*self._runs, *self._pulled]
        self._runs.clear()
        self._pulled.clear()
        for record in waiting:
            self._finish(record, OutcomeStatus.NOT_SUBMITTED, _not_submitted(reason))
        for record in [record for record in self._active if record.state is State.SENDING]:
            submission = record.submission
            assert submission is not None
            submission.last_try = True
            if submission.post is not None:
                continue  # its answer is awaited
            settled = self._session.submitter.withdraw(submission)
            if settled.ending == "not_submitted":
                self._finish(record, OutcomeStatus.NOT_SUBMITTED, _not_submitted(reason))
            else:
                self._finish(record, OutcomeStatus.UNKNOWN, settled.error)
        self._notify_reader()

    async def _leave(self) -> None:
        """Stop everything of ours; POSTs under way get their grace, so that ids that are paid for become known."""
        self._stopped = True
        self._withdraw_unsent(ClosedError("the pool's block was left"))
        posts = {record.submission.post for record in self._active if record.submission and record.submission.post}
        try:
            if posts:
                with anyio.CancelScope(shield=True):
                    await asyncio.wait(posts, timeout=GRACE)
        finally:
            await self._sources.aclose()

    def _collect_leftovers(self) -> None:
        left = ClosedError("the pool's block was left; the task goes on: wait for it with its id")
        outcomes = [outcome for outcome in self._untaken if outcome.attempts or outcome.task is not None]
        self._untaken.clear()
        for record in list(self._active):
            if record.state is State.OUTSTANDING:
                assert record.task is not None
                self._session.watcher.unfollow(record.task.id, record)
                error = still_running(record.task, None)
                error.__cause__ = left
                outcome = self._close_record(record, OutcomeStatus.UNFINISHED, error)
            else:
                assert record.submission is not None
                settled = self._session.submitter.known(record.submission)
                outcome = self._close_record(record, OutcomeStatus.UNKNOWN, settled.error)
            if record.waiter is not None and not record.waiter.done():
                record.waiter.set_result(outcome)
            else:
                outcomes.append(outcome)
        outcomes += self._unclaimed
        self._unclaimed = []
        self._unfinished = 0
        self._deadlines.clear()
        for timer in (self._deadline_timer, self._progress_timer):
            if timer is not None:
                timer.cancel()
        self._leftovers = outcomes
        if outcomes:
            running = sum(outcome.status is OutcomeStatus.UNFINISHED for outcome in outcomes)
            logger.warning("left a pool with %d outcomes not handed over, %d still running", len(outcomes), running)

    async def _run_cancelled(self, record: Record, cancellation: BaseException) -> None:
        """The caller of `run` stops waiting: leave an unsent request unsent, and tell of a sent one what is known."""
        submission = record.submission
        if record in self._runs:
            self._runs.remove(record)
            self._close_record(record, OutcomeStatus.NOT_SUBMITTED, None)
            return
        if submission is not None and record.state is State.SENDING:
            if submission.post is not None:
                try:
                    with anyio.CancelScope(shield=True):
                        await asyncio.wait({submission.post}, timeout=GRACE)
                except asyncio.CancelledError:
                    pass  # asked twice: what is known must do
            elif not submission.was_sent:
                self._session.submitter.withdraw(submission)
                self._close_record(record, OutcomeStatus.NOT_SUBMITTED, None)
                self._fill()
                return
        if record.task is not None:
            cancellation.add_note(f"evolink task {record.task.id} goes on: client.tasks.wait({record.task.id!r})")
        elif submission is not None and submission.was_sent:
            cancellation.add_note(
                f"an evolink request may have been accepted: idempotency key {record.idempotency_key}"
            )

    def _refuse_if_over(self, what: str) -> None:
        if self._left:
            raise ClosedError(f"{what}: the pool's block has been left")
        if self._stopped:
            raise ClosedError(f"{what}: the pool was stopped")

    # Progress

    def _total(self) -> int | None:
        if self._sources.exhausted:
            return self._next_index
        return self._sources.total

    def _eta(self, rate: float | None, finished: int) -> float | None:
        """Remaining submissions at the present rate, and one more typical duration for the last of them."""
        total = self._total()
        if total is None or not finished or not self._durations:
            return None
        typical = self._durations / finished
        to_send = max(0, total - finished - (len(self._active) - len(self._unsent)))
        by_rate = to_send / rate if rate else 0.0
        by_places = to_send / self._max * typical
        return max(by_rate, by_places) + (typical if total > finished else 0.0)

    def _progressed(self) -> None:
        if self._on_progress is None or self._progress_timer is not None or self._left:
            return
        loop = self._session.loop
        at = max(loop.time(), self._progress_at + PROGRESS_PAUSE)
        self._progress_timer = loop.call_at(at, self._report_progress)

    def _report_progress(self) -> None:
        self._progress_timer = None
        if self._on_progress is None or not self._entered:
            return
        self._progress_at = self._session.loop.time()
        try:
            self._on_progress(self.stats)
        except Exception:
            logger.exception("on_progress raised; the pool goes on")


async def run_many(pool: TaskPool) -> list[Outcome]:
    """All outcomes of a pool in the order given; its reason is raised with `.outcomes`."""
    outcomes: list[Outcome] = []
    try:
        async with pool:
            async for outcome in pool:
                outcomes.append(outcome)
    except BaseException as error:
        if error is pool.reason:
            error.outcomes = _in_order(outcomes)  # type: ignore[attr-defined]
        raise
    return _in_order(outcomes)


def _in_order(outcomes: list[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda outcome: math.inf if outcome.index is None else outcome.index)


def _not_submitted(reason: BaseException | None) -> NotSubmittedError:
    what = f"{type(reason).__name__}: {reason}" if reason is not None else "it was still waiting for its turn"
    error = NotSubmittedError(f"nothing was sent for this request: {what}")
    error.__cause__ = reason
    return error


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    defaults: dict[str, Any] = dict.fromkeys(_LATER) | {"job": "default", "retry_failed": 0}
    for name, value in options.items():
        if name not in defaults:
            raise ConfigurationError(f"a pool has no option {name!r}")
        if value != defaults[name]:
            raise ConfigurationError(f"the option {name!r} is not available in this version of evolink_async")


def _whole(value: Any, name: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigurationError(f"{name} must be a whole number from 1 to {most}, got {value!r}")
    return value


def _now() -> datetime:
    return datetime.now(UTC)


def _seconds_between(start: datetime | None, end: datetime | None) -> float:
    return max(0.0, (end - start).total_seconds()) if start and end else 0.0
