"""What a pool does: every move of a request from its source to its outcome, and the end of them all.

The states of a request and who moves it are in `record`. Everything here is synchronous but for the leaving of the
block and for whoever stops waiting for a `run`; the asyncio tasks are the sources', submitter's and watcher's.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import anyio

from evolink_async import clock
from evolink_async.errors import (
    BudgetExceededError,
    ClosedError,
    ConfigurationError,
    DownloadError,
    EvoLinkError,
    InvalidRequestError,
    LedgerError,
    NotSubmittedError,
    TaskLostError,
)
from evolink_async.http.answers import Judgement, is_account_error
from evolink_async.http.pace import Urgency
from evolink_async.http.retry import Verdict
from evolink_async.http.submit import GRACE, Settled, Submission
from evolink_async.ledger import Census, Entered, Entry, Row, may_try_again, states, what_to_do
from evolink_async.ledger.rerun import FOLLOW, REFUSE, SETTLE, SHARE, SUBMIT
from evolink_async.polling.endings import failure_of, is_over, still_running
from evolink_async.pool.brakes import Block, Refusals
from evolink_async.pool.deadlines import Deadlines
from evolink_async.pool.doubts import Doubts
from evolink_async.pool.identity import content_hash
from evolink_async.pool.journal import Journal
from evolink_async.pool.outcome import (
    CANCELLED,
    COMPLETED,
    FAILED,
    LOST,
    NOT_SUBMITTED,
    REJECTED,
    UNFINISHED,
    UNKNOWN,
    Outcome,
    OutcomeStatus,
    PoolStats,
)
from evolink_async.pool.progress import Progress, Tally, log_outcome
from evolink_async.pool.record import (
    ENTERING,
    OUTSTANDING,
    PULLED,
    SAVING,
    SENDING,
    UNTAKEN,
    AttachedTask,
    AwaitedRecord,
    Record,
)
from evolink_async.pool.savings import Savings, not_saved
from evolink_async.pool.sources import Sources
from evolink_async.pool.stages import Stages
from evolink_async.pool.uploads import Uploads
from evolink_async.pool.waiting import Line
from evolink_async.requests import GenerationRequest, has_local_files
from evolink_async.saving.saver import Saver
from evolink_async.session import POLL_TIMEOUT, Session
from evolink_async.types import Task, TaskReading, TaskStatus

if TYPE_CHECKING:
    from evolink_async.core import ClientCore

logger = logging.getLogger("evolink_async.pool")

WARN_WITHOUT_LEDGER_AT = 100
_OF_CALLER, _OF_SOURCE = Urgency.CALLER, Urgency.SOURCE
_REMEMBERED_EVERY = 250  # outcomes, what was learned of durations is written down


class Engine:
    """Moves the requests of one pool. The options are those of `TaskPool`, checked; most: `max_outstanding`.

    session and journal are there once it has started.
    """

    session: Session
    journal: Journal

    def __init__(
        self,
        core: ClientCore,
        *,
        most: int,
        saver: Saver | None,
        task_timeout: float | None,
        retry_failed: int,
        stop_after_rejections: int | None,
        on_progress: Callable[[PoolStats], object] | None,
    ) -> None:
        self.core = core
        self._most = most
        self.stages = Stages(most)
        self._task_timeout = task_timeout
        self._patience = core.options.retry.unreachable_for
        self._retry_failed = retry_failed
        self.doubts: Doubts | None = None
        self._uploads = Uploads(core, self._guarded(self._looked_at), self._guarded(self._uploaded))
        self.heard = self._guarded(self._looked_up)
        self._savings = None if saver is None else Savings(saver, self._saved, self.crashed)
        has_room = self.stages.has_room
        self.sources = Sources(has_room, self._take, self._source_failed, self._break_down, self._wake_reader)
        self._has_sources = False
        self.entered = self.stopped = self.left = False
        self.reason: BaseException | None = None
        self.loop: asyncio.AbstractEventLoop | None = None  # in which it may be used, while it may
        self._broken: BaseException | None = None  # a fault of ours
        self._refusals = Refusals(stop_after_rejections)
        self._accepted_before = 0  # requests that an earlier run has submitted
        self._block = Block()

        self._sharing: dict[Row, list[Record]] = {}  # entering, and their request is on its way already
        self._probe: Record | None = None  # finds out a price, and nothing else is sent before
        self.leftovers: list[Outcome] = []
        self._awaited = 0  # so many of those that have no outcome yet were given to `run`
        self._filling = False
        self.changed = asyncio.Event()  # for the reader
        self._deadlines = Deadlines(self.stages, self._time_is_over)
        self._overdue: set[Record] = set()  # their time is over, they only get one last look

        self._next_index = 0
        self._given = 0  # requests that did not come from the sources: runs and attached tasks
        self._tally = Tally()
        self._models: set[str] = set()
        self._progress = Progress(on_progress, self.stats)
        self._last_stats: PoolStats | None = None

    # What the caller asks for

    async def prepare(self) -> None:
        """What may take a while before the block can be entered. Raises `ConfigurationError`."""
        if self._savings is not None:
            await self._savings.prepare()

    def start(self, session: Session, journal: Journal) -> None:
        """The block is entered: follow what was attached before, and begin to pull."""
        self.session, self.journal = session, journal
        self.loop = session.loop
        self.entered = True
        self._entered_at, self._entered_on = session.loop.time(), clock.now()
        self._requests_before = session.watcher.requests
        self._progress.open()
        if self.core.observation.observer is not None:
            self.core.observation.observer.pool_entered(self)
        if self.doubts is not None:
            self.doubts.open()
        for record in self.stages.these(OUTSTANDING):
            self._follow(record, _by_id(record.identity), None)
        self.sources.start()

    def add(self, more: Any) -> None:
        """Another source."""
        self.sources.add(more)
        self._has_sources = True
        self._block.end()  # with sources it is an answer to one of them that decides
        if self.reason is not None:
            self._return_singles()

    def attach(self, task_id: str) -> None:
        """Follow a task that exists already."""
        if task_id not in self.stages:
            record = AttachedTask(self, None, None, id=task_id)
            self._given += 1
            self.stages.hold(record, task_id)
            if self.entered:
                self._follow(record, _by_id(task_id), None)

    def give(self, request: GenerationRequest, waiter: asyncio.Future[Outcome]) -> Record:
        """A request whose outcome somebody awaits."""
        self._given += 1
        return self._new_record(request, waiter)

    def stop(self) -> None:
        """Submit nothing more."""
        if not self.stopped:
            self.stopped = True
            self._close_sources()
            self._withdraw_unsent(_stopped())

    def notify(self, task_id: str) -> None:
        """A hint that a task may have ended."""
        if task_id in self.stages and self.entered and not self.left:
            self.session.watcher.notify(task_id)

    def who_has(self, task_id: str) -> str | None:
        """Who has this task already, in words; None: nobody that we know of."""
        if self.session.watcher.follows(task_id) or task_id in self.core.memory.reads.submitted:
            return "it is followed already"
        if any(other.task_id == task_id for other in self.stages):
            return "another request of this pool has it"
        return None

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to pull, and an outcome for all that was pulled."""
        return self.sources.exhausted and len(self.stages) == self._awaited

    def census(self) -> Census | None:
        """How the requests compare with those of earlier runs; None without a ledger."""
        return self.journal.job.census if self.entered and self.journal.durable else None

    @property
    def outstanding(self) -> int:
        """Requests that are submitted or being submitted, and have not ended."""
        return self.stages.places - len(self.stages.unsent)

    @property
    def finished(self) -> int:
        """Outcomes so far."""
        return self._tally.finished

    def stats(self) -> PoolStats:
        """How the pool is doing now; after the block, how it did."""
        if self._last_stats is not None:
            return self._last_stats
        tally, stages = self._tally, self.stages
        rate, requests, elapsed, eta = None, 0, 0.0, None
        total = self._total()
        if self.entered:
            session = self.session
            rate = session.pace.rate_of(self._models) if self._models else None
            requests = session.watcher.requests - self._requests_before
            elapsed = session.loop.time() - self._entered_at
            if total is not None:
                to_send = max(0, total - tally.finished - self.outstanding)
                eta = tally.eta(to_send, self.outstanding, rate, self._most)
        return PoolStats(
            total=total,
            pulled=self._next_index,
            waiting=stages.waiting,
            outstanding=self.outstanding,
            untaken=len(stages.untaken),
            counts=tally.counts(),
            credits_reserved=self.journal.job.reserved if self.entered else Decimal(0),
            credits_spent=self.journal.spent if self.entered else Decimal(0),
            posts=tally.posts,
            polls=tally.polls,
            status_requests=requests,
            rate_limited=tally.rate_limited,
            rate=rate,
            eta=eta,
            elapsed=elapsed,
            timed=tally.timed,
            task_seconds=tally.seconds,
            models=tally.by_model(),
        )

    def _total(self) -> int | None:
        sources = self.sources
        known = sources.pulled if sources.exhausted else sources.total
        return None if known is None else known + self._given

    def _wake_reader(self) -> None:
        self.changed.set()

    # Pulling

    def _take(self, item: Any) -> Line | None:
        """An item was pulled from a source. Gives the line for whose sake that source is not to be read on for now."""
        line = self._new_record(item, None).line
        if self.stages.may_wait(line):
            return None
        line.held = True
        return line

    def _new_record(self, item: Any, waiter: asyncio.Future[Outcome] | None) -> Record:
        index = self._next_index
        self._next_index += 1
        if self._next_index == WARN_WITHOUT_LEDGER_AT and self.entered and not self.journal.durable:
            logger.warning(
                "%d requests and no ledger: the ids of tasks that are paid for live in this process only",
                WARN_WITHOUT_LEDGER_AT,
                extra={"event": "pool_without_ledger"},
            )
        request = None
        if isinstance(item, GenerationRequest) and isinstance(getattr(item, "model", None), str):
            request = item
        if waiter is None:
            record = Record(self, index, request)
        else:
            record = AwaitedRecord(self, index, request, waiter=waiter)
            self._awaited += 1
        try:
            self._begin(record, item)
        except Exception as error:  # noqa: BLE001  (a fault of ours: it becomes the reason)
            self.crashed(record, error)
        return record

    def _begin(self, record: Record, item: Any) -> None:
        """The step into `entering`."""
        if record.request is None:
            what = "without a model" if isinstance(item, GenerationRequest) else f"but {type(item).__name__}"
            error = InvalidRequestError(
                f"item {record.index} is no request {what}; "
                "make a request out of a dict with GenerationRequest.from_dict"
            )
            self._finish(record, REJECTED, error)
            return
        if not self.entered:
            self._not_sent(record, self.reason or _stopped())
            return
        request = record.request
        if has_local_files(request):  # such wait among themselves, for places at the files service
            self.stages.enter(record, f"{request.model} with files")
            self._uploads.look(record, self.session)
        else:
            self.stages.enter(record, request.model)
            self._enter(record)

    def _looked_at(self, record: Record, error: EvoLinkError | None) -> None:
        """What its local files hold is known, and with it what the request is."""
        if record.state is not ENTERING:
            return  # it has its outcome already
        if error is None:
            self._enter(record)
        elif isinstance(error, InvalidRequestError):
            self._finish(record, REJECTED, error)
        else:
            self._not_sent(record, error)
            self.end_early(error)

    def _enter(self, record: Record) -> None:
        request = record.request
        assert request is not None
        try:
            content = content_hash(request, self._uploads.names(record))
            entry = Entry(request.key, content, request.endpoint, request.model)
        except InvalidRequestError as error:
            self._finish(record, REJECTED, error)
        except Exception as error:  # noqa: BLE001  (a class of the caller's own)
            wrong = InvalidRequestError(f"its body cannot be made: {type(error).__name__}: {error}")
            wrong.__cause__ = error
            self._finish(record, REJECTED, wrong)
        else:
            try:
                self.journal.enter(record, entry)
            except InvalidRequestError as error:  # a key that this ledger cannot keep
                self._finish(record, REJECTED, error)

    def _guarded(self, step: Callable[[Record, Any], None]) -> Callable[[Record, Any], None]:
        def guarded(record: Record, known: Any) -> None:
            try:
                step(record, known)
            except Exception as error:  # noqa: BLE001  (a fault of ours: it becomes the reason)
                self.crashed(record, error)

        return guarded

    def _looked_up(self, record: Record, known: Entered | EvoLinkError) -> None:
        """What the ledger knows of a request decides what becomes of it."""
        if record.state is not ENTERING:
            return  # it has its outcome already
        if isinstance(known, EvoLinkError):
            self.end_early(known)
            self._not_sent(record, known)
            return
        todo = what_to_do(known, retry_failed=self._retry_failed)
        if todo is REFUSE:
            self._finish(record, REJECTED, _other_body(record))
            return
        record.row = row = known.row
        if todo is SHARE:
            if any(other.row is row for other in self.stages if other is not record):
                self._sharing.setdefault(row, []).append(record)
                return
            if row.state is states.ENTERED:
                todo = SUBMIT  # whoever gave it before has taken it back, or it could not be sent then
        if todo is SUBMIT:
            assert record.request is not None
            try:
                self.core.check(record.request)
                self.journal.told(record.request)
            except InvalidRequestError as error:
                self._refuse(record, row, error)
                return
            record.accepted_before = self._accepted_before
            self._wait_for_place(record)
            return
        self._accepted_before += row.task_id is not None
        if todo in (FOLLOW, SETTLE):
            self._wait_for_place(record)
        else:
            record.from_ledger = True
            self._conclude_as(record, *record.known_ending())

    def _refuse(self, record: Record, row: Row, error: InvalidRequestError) -> None:
        """It is found to be wrong before anything is sent."""
        self.journal.refused(row, error)
        self._finish(record, REJECTED, error)

    def _wait_for_place(self, record: Record, *, first: bool = False) -> None:
        """The step into `pulled`."""
        self.stages.pull(record, first=first)
        if not self._goes_on:
            self._withdraw_unsent(self.reason or (_block_left() if self.left else _stopped()))
        self._fill()

    def _read_on(self, line: Line) -> None:
        """Fewer of this line wait now, perhaps."""
        if self.stages.may_wait(line):
            line.held = False
            self.sources.release(line)

    # Sending

    def _fill(self) -> None:
        """Give free places to requests that wait for one: those awaited first."""
        pulled, runs = self.stages.pulled, self.stages.runs
        if self._filling or not (pulled.count or runs.count):
            return  # a step of the loop below, which goes on by itself, has called; or nobody wants a place
        self._filling = True
        try:
            while (pulled.count or runs.count) and (record := self._next_to_send()) is not None:
                try:
                    self._send(record)
                except Exception as error:  # noqa: BLE001  (a fault of ours: it becomes the reason)
                    self.crashed(record, error)
        finally:
            self._filling = False

    def _next_to_send(self) -> Record | None:
        if self._probe is not None and self._is_probing(self._probe):
            return None
        stages = self.stages
        if not stages.has_place() and not (stages.runs.has_next() and self._displace()):
            return None
        return (stages.runs.count and stages.runs.take()) or stages.pulled.take()

    def _is_probing(self, record: Record) -> bool:
        """Whether the price of this request is still being found out."""
        probing = record.state is SENDING or (record.state is OUTSTANDING and self.journal.job.probe is record.row)
        if not probing:
            self._probe = None
        return probing

    def _displace(self) -> bool:
        """Only what is really outstanding keeps a run waiting: the last of the others goes back to the pulled ones."""
        for record in reversed(self.stages.unsent):
            submission = record.submission
            # If it waits no more its POST has begun; without its bytes it is to be uploaded first.
            if submission is not None and (submission.waiting or self._uploads.are_due(record)):
                self.session.submitter.withdraw(submission)
                self._uploads.release(record)
                record.submission = None
                self.stages.pull(record, first=True)
                return True
        return False

    def _send(self, record: Record) -> None:
        """The step into `sending`; or into `outstanding`, if an earlier run has made the task."""
        request, row = record.request, record.row
        assert request is not None
        assert row is not None
        if self.core.closed:
            self.end_early(_client_closed())
        if row.state is states.ACCEPTED:
            self._go_on_with(record, row)
            return
        if self._block.error is not None and self._block.holds(self.session.loop.time()):
            self._return(record, self.reason or self._block.error)
            return
        self._mind_long_pause(request.model)
        if self.reason is not None:
            self._return(record, self.reason)
            return
        self.stages.send(record)
        record.submission = submission = Submission(
            request,
            self.journal.key_of(row, record.index),
            self,
            _OF_SOURCE if record.waiter is None else _OF_CALLER,
            record,
            self._patience,
            self.journal.replays,
        )
        if row.state is states.UNSETTLED:
            self._resume(submission, row)
        if self.doubts is not None:
            submission.callback_url = self.doubts.send(record)
        self._models.add(request.model)
        if self.journal.capped and not self.journal.has_price(request):
            self._probe = record
        if self._uploads.are_due(record):
            self._uploads.upload(record)
        else:
            self._start(record, submission)

    def _start(self, record: Record, submission: Submission) -> None:
        try:
            self.session.submitter.start(submission)
        except InvalidRequestError as error:
            assert record.row is not None
            self._refuse(record, record.row, error)

    def _uploaded(self, record: Record, error: EvoLinkError | None) -> None:
        """Its local files are at the service; or it cannot be sent without them."""
        submission, row = record.submission, record.row
        assert submission is not None
        if error is None:
            submission.content = self._uploads.content(record, submission)
            self._start(record, submission)
            self._mind_long_pause(record.model)  # it may have begun meanwhile
        elif is_account_error(error) or isinstance(error, ConfigurationError):
            self.settled(record, Settled("not_submitted", error=error, fatal=error))
        elif isinstance(error, ClosedError):
            self.settled(record, Settled("not_submitted", error=error))
        else:
            assert row is not None
            self.journal.refused(row, error)
            self.settled(record, Settled("rejected", error=error))

    def _resume(self, submission: Submission, row: Row) -> None:
        """An earlier run has sent it."""
        age = (clock.now() - row.submitted_at).total_seconds() if row.submitted_at is not None else math.inf
        submission.resume(
            content=row.body or b"",
            fingerprint=row.fingerprint,
            sent_at=clock.Moment.of(self.session.loop, age if age >= 0 else math.inf),  # a clock that was set back
            error=EvoLinkError(row.error or "no answer came in an earlier run", code=row.error_code),
            lost=row.losses > 0,
        )

    def _go_on_with(self, record: Record, row: Row) -> None:
        """The step into `outstanding` of a task that an earlier run has made."""
        reading = TaskReading({"id": row.task_id, "model": row.model, "kind": record.request and record.request.kind})
        self._hold(record, reading, self._age_of(row))

    def _age_of(self, row: Row) -> float | None:
        return None if row.submitted_at is None else max(0.0, (clock.now() - row.submitted_at).total_seconds())

    def posting(self, record: Record) -> None:
        """A POST is about to be made."""
        self.stages.posting(record)
        self._progress.changed()

    def posted(self, record: Record, judgement: Judgement) -> None:
        """A POST was made, and came to this."""
        self._tally.posts += 1
        if judgement.error is not None:
            self._tally.rate_limited += judgement.verdict is Verdict.RATE_LIMITED
        if self.doubts is not None:
            self.doubts.answered(record)

    def held(self, record: Record, error: EvoLinkError) -> None:
        """A POST was in vain and the request is in the queue again."""
        submission = record.submission
        assert submission is not None
        if not submission.was_sent and record.deserted:
            self.session.submitter.withdraw(submission)
            self._finish(record, NOT_SUBMITTED, _not_submitted(None))
        self._mind_long_pause(record.model)
        self._progress.changed()

    def settled(self, record: Record, settled: Settled) -> None:
        if record.state is not SENDING:
            return  # it has its outcome already
        error, fatal = settled.error, settled.fatal
        if settled.task is not None:
            self._accepted(record, settled.task)
        elif settled.ending == "deferred":
            self._defer(record, settled)
            return
        else:
            self._count_unanswered(record)
            if settled.ending == "not_submitted":
                self._not_sent(record, error)
            else:
                self._finish(record, OutcomeStatus(settled.ending), error)
        if self.core.closed:
            self.end_early(_client_closed())
        elif fatal is not None:
            if isinstance(fatal, LedgerError | BudgetExceededError):
                self.end_early(fatal)
            else:
                self._no_access(fatal)
        if error is not None:
            if settled.ending == "rejected" and self._refusals.too_many(
                error, record.model, accepted_before=record.accepted_before, has_sources=self._has_sources
            ):
                self.end_early(error)
            self._mind_long_pause(record.model)

    def _defer(self, record: Record, settled: Settled) -> None:
        """There are no credits until a price is known: back to `pulled`, if one of ours finds it out."""
        if record.deserted:
            self._return(record, None)
            return
        probe = self.journal.job.probe
        holders = self.stages.these(SENDING, OUTSTANDING)
        finder = None if probe is None else next((other for other in holders if other.row is probe), None)
        if probe is None or finder is not None:
            self._probe = finder
            self._uploads.release(record)
            record.submission = None
            self._wait_for_place(record, first=True)
        else:
            self._return(record, settled.error)
            assert settled.error is not None
            self.end_early(settled.error)

    def _accepted(self, record: Record, task: TaskReading) -> None:
        self._refusals.accepted()
        if self._block.error is not None:
            self._block.end()
        if logger.isEnabledFor(logging.INFO):
            identity = record.identity
            logger.info(
                "task %s accepted for request %s",
                task.id,
                identity,
                extra={"event": "task_accepted", "task_id": task.id, "identity": identity, "model": record.model},
            )
        self._hold(record, task if record.task_id == task.id else _by_id(record.task_id or task.id), 0.0)

    async def adopt(self, record: Record, task: TaskReading) -> None:
        """A callback has shown the task of a request that nobody knew the outcome of."""
        row = record.row
        assert row is not None
        submission = record.submission
        if record.state is SENDING and submission is not None:
            submission.task = task
            self.session.submitter.withdraw(submission)  # it is not sent again
        unwritten = await self.journal.accepted(row, task)
        if record.state is SENDING or self._take_back_unknown(record):
            self._hold(record, task, self._age_of(row))
        elif task.is_terminal and record.state is UNTAKEN:
            self.journal.ended(row, task.task)
        if unwritten is not None:
            self.end_early(unwritten)

    def _take_back_unknown(self, record: Record) -> bool:
        """Take the outcome `unknown` of a request from those that wait for the reader, if it is still there."""
        for place, outcome in enumerate(self.stages.untaken):
            if outcome.index == record.index and outcome.status is UNKNOWN:
                del self.stages.untaken[place]
                self._tally.outcome(outcome, -1)
                record.from_ledger = False
                return True
        return False

    def _hold(self, record: Record, task: TaskReading, age: float | None) -> None:
        """The step into `outstanding`."""
        record.submission = None  # with the bytes that were sent
        record.progress = task.progress
        if self.doubts is not None:
            self.doubts.over(record)
        self.stages.hold(record, task.id)
        self._follow(record, task, age)
        self._fill()
        if record.line.held:
            self._read_on(record.line)
        self._progress.changed()

    # Watching

    def _follow(self, record: Record, task: TaskReading, age: float | None) -> None:
        if task.is_terminal:
            record.task = task.task
            if is_over(record.task):
                self._conclude(record, record.task)
                return
        if self._broken is not None:
            self._give_up(record, self._broken)
            return
        self.session.watcher.follow(task, record, age=age)
        self._deadlines.start(record, self._task_timeout, self.session.loop)

    def seen(self, record: Record) -> None:
        self._tally.polls += 1
        if record in self._overdue:
            self._give_up_watching(record)

    def ended(self, record: Record, task: Task) -> None:
        self._tally.polls += 1
        self._conclude(record, task)

    def _conclude(self, record: Record, task: Task) -> None:
        row = record.row
        if row is not None:
            self.journal.ended(row, task)
            if self._tally.finished % _REMEMBERED_EVERY == 0:
                self.journal.remember(self.core.memory.schedule)
            if self._retry_failed and may_try_again(row, self._retry_failed) and self._goes_on and not record.deserted:
                self._try_again(record)
                return
        error = failure_of(task)
        status = COMPLETED
        if error is not None:
            status = CANCELLED if task.status == TaskStatus.CANCELLED else FAILED
        self._conclude_as(record, status, error)

    @property
    def _goes_on(self) -> bool:
        """Whether more is submitted."""
        return not self.sources.closed

    def _conclude_as(self, record: Record, status: OutcomeStatus, error: EvoLinkError | None) -> None:
        """How it ended is known: its results are saved, if there are any and somebody wants them."""
        if status is not COMPLETED or self._savings is None:
            self._finish(record, status, error)
            return
        if self.left:  # nothing is fetched any more
            self._finish(record, status, not_saved())
            return
        if record.state is OUTSTANDING:
            self._note_end(record, None if record.row is None else record.row.submitted_at, clock.now())
        self._uploads.release(record)
        self.stages.save(record)
        self._savings.put(record)
        self._fill()
        self._progress.changed()

    def _saved(self, record: Record, files: tuple[PurePath, ...], error: DownloadError | None) -> None:
        if record.state is not SAVING:
            return  # it has its outcome already
        if record.row is not None and files and tuple(map(str, files)) != record.row.files:
            self.journal.saved(record.row, files)
        self._finish(record, COMPLETED, error, files)
        if self.core.closed:
            self.end_early(_client_closed())

    def _try_again(self, record: Record) -> None:
        """Its task failed for a passing reason: back to `pulled`, for a new one."""
        logger.info(
            "task %s failed; request %s is generated once more",
            record.task_id,
            record.identity,
            extra={
                "event": "task_retried",
                "task_id": record.task_id,
                "identity": record.identity,
                "model": record.model,
            },
        )
        self._note_end(record, None, clock.now())
        self._uploads.release(record)
        record.again()
        self._wait_for_place(record, first=True)

    def lost(self, record: Record, error: EvoLinkError) -> None:
        status = UNFINISHED
        if isinstance(error, TaskLostError):
            status = LOST
            if record.row is not None:
                self.journal.lost(record.row, error)
        self._finish(record, status, error)
        if isinstance(error, ClosedError):
            self.end_early(_client_closed())
        elif is_account_error(error):
            self._no_access(error)

    def _time_is_over(self, record: Record) -> None:
        if record.status is not None or record in self._overdue:
            self._give_up_watching(record)
        elif record.task_id is not None:
            # Not one look was answered: it gets one now, and the time that takes.
            self._overdue.add(record)
            self.session.watcher.notify(record.task_id)
            last_look = self.core.options.request_timeout or POLL_TIMEOUT
            self._deadlines.start(record, last_look, self.session.loop)

    def _give_up_watching(self, record: Record) -> None:
        task = record.known_task()
        if record.state is OUTSTANDING and task is not None:
            why = self.session.watcher.failure(task.id)
            self.session.watcher.unfollow(task.id, record)
            if task.is_terminal:  # only its links were still awaited
                self._conclude(record, task)
            else:
                self._finish(record, UNFINISHED, still_running(task, self._task_timeout, why))

    # Ending one

    def _finish(
        self, record: Record, status: OutcomeStatus, error: EvoLinkError | None, files: tuple[PurePath, ...] = ()
    ) -> None:
        """The step into `untaken`: for the reader, or the caller of `run`, or who looks at the leftovers.

        files: that hold its results.
        """
        if record.state is UNTAKEN:
            return
        finished_at = clock.now()
        outcome = record.outcome(status, error, finished_at, files)
        if record.state is OUTSTANDING:
            self._note_end(record, outcome.submitted_at, finished_at)
        self.stages.close(record)
        # First of all: whatever fails below, nobody waits for it in vain.
        waiter = record.waiter
        if waiter is None:
            self.stages.untaken.append(outcome)
            self.changed.set()
        else:
            self._awaited -= 1
            self.sources.notice_room()
            if waiter.done():
                self._leave_behind(outcome)
            else:
                waiter.set_result(outcome)
        self._tally.outcome(outcome)
        log_outcome(outcome)
        if self.doubts is not None:
            self.doubts.over(record)
        self._uploads.forget(record, status)
        if record.row is not None:
            self.journal.job.let_go(record.row)
            if self._sharing:
                self._close_sharing(record, status, error, files)
        self._fill()
        if record.line.held:
            self._read_on(record.line)
        self._progress.changed()

    def _not_sent(self, record: Record, reason: BaseException | None) -> None:
        if record.row is not None and record.row.state is states.FAILED:  # it was only to be generated once more
            self._finish(record, *record.known_ending())
            return
        error = reason if isinstance(reason, NotSubmittedError) else _not_submitted(reason)
        self._finish(record, NOT_SUBMITTED, error)

    def _close_sharing(
        self, record: Record, status: OutcomeStatus, error: EvoLinkError | None, files: tuple[PurePath, ...]
    ) -> None:
        """Those that share its request have its outcome too; unless only its caller wanted it unsent."""
        assert record.row is not None
        sharing = self._sharing.pop(record.row, [])
        if record.deserted and status is NOT_SUBMITTED:
            for other in sharing:
                other.row = None
            for other in sharing:
                self._enter(other)
            return
        for other in sharing:
            other.task = record.task
            self._finish(other, status, error, files)

    def _note_end(self, record: Record, sent_at: datetime | None, at: datetime) -> None:
        """Its task is no longer watched: how long it took, if this run has sent it."""
        self._overdue.discard(record)
        if sent_at is not None and sent_at >= self._entered_on:
            self._tally.ended((at - sent_at).total_seconds())

    def _leave_behind(self, outcome: Outcome) -> None:
        if outcome.attempts or outcome.task is not None:
            self.leftovers.append(outcome)

    # Ending all

    def _source_failed(self, error: BaseException) -> None:
        if self.left and self.reason is None:
            logger.warning(
                "an iterable of requests failed in its clean-up: %s",
                type(error).__name__,
                extra={"event": "source_failed"},
            )
            self.reason = error
        self.end_early(error)

    def crashed(self, record: Record, error: BaseException) -> None:
        """A worker failed over this record: that is the reason, and nothing of this pool is trusted any more."""
        logger.error("a worker of the pool failed: %r", error, extra={"event": "internal_error"})
        self._break_down(error)
        self._give_up(record, error)

    def unwatched(self, error: BaseException) -> None:
        """The watcher failed."""
        self._break_down(error)

    def _break_down(self, error: BaseException) -> None:
        """Everything outstanding comes back with its id now, what is on the wire as soon as it is answered."""
        self._broken = self._broken or error
        self.end_early(error)
        for record in self.stages.these(OUTSTANDING):
            if record.state is OUTSTANDING:
                self._give_up(record, error)

    def end_early(self, reason: BaseException) -> None:
        if self.reason is None and not self.left:
            self.reason = reason
            name = type(reason).__name__
            logger.warning("the pool ends early: %s", name, extra={"event": "pool_ended_early", "reason": name})
            self._close_sources()
            self._withdraw_unsent(reason)

    def _no_access(self, error: EvoLinkError) -> None:
        """The account can't be used: that ends a pool with sources. Without, whoever waits hears of it at once."""
        if self._has_sources:
            self.end_early(error)
        else:
            self._block.begin(error, self.session.loop.time())
            self._withdraw_unsent(error)

    def _mind_long_pause(self, model: str) -> None:
        error = self.session.submitter.long_pause(model)
        if error is not None:
            self.end_early(error)

    def _close_sources(self) -> None:
        self.sources.close_iterables()
        self._return_singles()
        self._wake_reader()

    def _return_singles(self) -> None:
        """Single requests that nobody will pull any more come back."""
        for request in self.sources.take_singles():
            self._take(request)

    def _withdraw_unsent(self, reason: BaseException) -> None:
        """Nothing more is sent: what waits comes back."""
        for record in [*self.stages.runs.take_all(), *self.stages.pulled.take_all()]:
            if record.row is not None and record.row.state is states.ACCEPTED and not self.left:
                self.stages.pull(record)  # it is outstanding
            else:
                self._return(record, reason)
        for record in self.stages.these(SENDING):
            if record.state is not SENDING:
                continue
            settled = self._take_back(record)
            if settled is not None:  # if it is, its answer is awaited
                self._finish_as(record, settled, reason)

    def _return(self, record: Record, reason: BaseException | None) -> None:
        """Nothing is sent in this run: not for a fresh request, and what is known of another is its outcome."""
        row = record.row
        if row is None or row.state in (states.ENTERED, states.REJECTED):
            self._not_sent(record, reason)
        else:
            record.from_ledger = row.state is not states.FAILED
            self._finish(record, *record.known_ending())

    def _take_back(self, record: Record) -> Settled | None:
        """Stop a request that is sending, and say what is known of it. None: its POST is on the wire, the answer tells.

        In no case is it sent again.
        """
        submission = record.submission
        assert submission is not None
        submission.last_try = True
        # What has its credits reserved already is not kept back because those of another one are refused.
        goes_on = submission.flight is not None and (
            submission.flight.sent or isinstance(self.reason, BudgetExceededError)
        )
        if submission.end is None and goes_on:
            return None
        return self.session.submitter.withdraw(submission)

    def _finish_as(self, record: Record, settled: Settled, why: BaseException | None) -> None:
        """Give a request that will not be sent again the outcome that is known of its submission."""
        self._count_unanswered(record)
        if settled.task is not None:
            record.task = settled.task.task
            self._finish(record, UNFINISHED, still_running(record.task, None))
        elif settled.ending == "not_submitted":
            self._not_sent(record, why)
        else:
            self._finish(record, OutcomeStatus(settled.ending), settled.error)

    def _count_unanswered(self, record: Record) -> None:
        """A POST whose answer is not awaited any more was sent all the same."""
        submission = record.submission
        if submission is not None and submission.task is None:  # else it was answered, and is counted
            self._tally.posts += submission.flight is not None and submission.flight.sent

    def _give_up(self, record: Record, why: BaseException | None) -> None:
        """Give a request that is under way the outcome that is known by now."""
        task = record.known_task()
        if record.state is OUTSTANDING and task is not None:
            self.session.watcher.unfollow(task.id, record)
            if task.is_terminal and self._broken is None:  # only its links were still awaited
                self._conclude(record, task)
                return
            running = still_running(task, None)
            running.__cause__ = why
            self._finish(record, UNFINISHED, running)
        elif record.state is SENDING and record.submission is not None:
            self._finish_as(record, self.session.submitter.known(record.submission), why)
        elif record.state is SAVING:
            unsaved = not_saved()
            unsaved.__cause__ = why
            self._finish(record, COMPLETED, unsaved)
        else:
            self._return(record, why)

    # Leaving

    async def aclose(self) -> None:
        """The block is left: what was sent and not handed over becomes a leftover."""
        self.left, self.loop = True, None
        self._wake_reader()
        try:
            if self.entered:
                await self._leave()
        finally:
            try:
                self._collect_leftovers()
            finally:  # whatever the caller's `on_progress` raises at the end
                if self.entered:
                    await self._close_ledger()

    async def _leave(self) -> None:
        """Stop everything of ours; POSTs under way get their grace, so that ids that are paid for become known."""
        self.sources.close_iterables()
        self.sources.take_singles()
        if self.doubts is not None:
            await self.doubts.aclose()
        self._withdraw_unsent(_block_left())
        sending = [record.submission for record in self.stages.these(SENDING)]
        posts = {submission.post for submission in sending if submission is not None and submission.post is not None}
        tasks = posts | self.sources.tasks()
        try:
            if tasks:
                with anyio.CancelScope(shield=True):
                    await _given_grace(tasks)
        finally:
            if self._savings is not None:
                await self._savings.aclose()
        if self.sources.tasks():
            logger.warning(
                "an iterable of requests takes longer than %g s to clean up; it goes on alone",
                GRACE,
                extra={"event": "source_slow"},
            )

    async def _close_ledger(self) -> None:
        """Write what is unwritten, and let go of the job."""
        self.journal.remember(self.core.memory.schedule)
        try:
            await self.journal.aclose()
        except LedgerError as error:  # it names the tasks that the ledger does not know
            logger.error("%s", error, extra={"event": "ledger_unwritten"})
            if self.reason is None or isinstance(self.reason, LedgerError):
                self.reason = error
        self._tell_differences()

    def _tell_differences(self) -> None:
        """Warn of requests that are not those of earlier runs; of missing ones only if all there are were read."""
        census = self.census()
        if census is None:
            return
        differences = []
        if census.changed:
            differences.append(f"{census.changed} changed under their key")
        if census.gone and self._has_sources and not self.sources.cut_short and self.reason is None:
            differences.append(f"{census.gone} of earlier runs were not given this time")
        if differences:
            logger.warning(
                "job %r: of its requests %s",
                self.journal.job.name,
                ", ".join(differences),
                extra={"event": "job_differs", "changed": census.changed, "gone": census.gone},
            )

    def _collect_leftovers(self) -> None:
        left = ClosedError("the pool's block was left; the task goes on: wait for it with its id")
        for record in self.stages.these(SENDING, OUTSTANDING, SAVING):
            self._give_up(record, left)
        for record in self.stages.these(ENTERING):  # now that what they might share has its outcome
            self._not_sent(record, _block_left())
        for outcome in self.stages.untaken:
            self._leave_behind(outcome)
        self.stages.untaken.clear()
        self._deadlines.close()
        if self.entered:
            self._progress.close()
            self._last_stats = self.stats()
        if self.leftovers:
            running = sum(outcome.status is UNFINISHED for outcome in self.leftovers)
            logger.warning(
                "left a pool with %d outcomes not handed over, %d still running",
                len(self.leftovers),
                running,
                extra={"event": "pool_left", "leftovers": len(self.leftovers), "running": running},
            )

    async def desert(
        self, record: Record, waiter: asyncio.Future[Outcome], cancellation: asyncio.CancelledError
    ) -> None:
        """The caller of `run` stops waiting: leave an unsent request unsent, and tell of a sent one what is known."""
        if not waiter.cancelled():  # it ended in the same moment
            self._leave_behind(waiter.result())
        elif record.state is ENTERING:
            if record.row is not None:  # the same request is on its way for somebody else
                self._sharing[record.row].remove(record)
                record.row = None
            self._not_sent(record, None)
        elif record.state is PULLED:
            self.stages.runs.remove(record)
            self._return(record, None)
        elif record.state is SENDING and record.submission is not None:
            submission = record.submission
            post = submission.post
            if not submission.was_sent:
                self._take_back(record)
                self._not_sent(record, None)
            elif post is not None and not post.done():
                try:
                    with anyio.CancelScope(shield=True):
                        await asyncio.wait({post}, timeout=GRACE)
                except asyncio.CancelledError:
                    pass  # asked twice: what is known must do
        if record.task_id is not None:
            goes_on = "ended" if record.task is not None and record.task.is_terminal else "goes on"
            cancellation.add_note(f"evolink task {record.task_id} {goes_on}: client.tasks.wait({record.task_id!r})")
        elif record.row is not None and record.row.submitted_at is not None:
            cancellation.add_note(
                f"an evolink request may have been accepted: idempotency key {record.row.idempotency_key}"
            )


async def _given_grace(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for them as long as POSTs under way get. The first cancellation of the caller goes on only then."""
    loop, caller = asyncio.get_running_loop(), asyncio.current_task()
    ends = loop.time() + GRACE
    try:
        await asyncio.wait(tasks, timeout=GRACE)
    except asyncio.CancelledError:
        if caller is None or caller.cancelling() > 1:
            raise  # asked twice: what is known must do
        await asyncio.wait(tasks, timeout=max(0.0, ends - loop.time()))
        raise


def _not_submitted(reason: BaseException | None) -> NotSubmittedError:
    what = f"{type(reason).__name__}: {reason}" if reason is not None else "it was still waiting for its turn"
    error = NotSubmittedError(f"nothing was sent for this request: {what}")
    error.__cause__ = reason
    return error


def _by_id(task_id: str) -> TaskReading:
    return TaskReading({"id": task_id})


def _stopped() -> ClosedError:
    return ClosedError("the pool was stopped")


def _block_left() -> ClosedError:
    return ClosedError("the pool's block was left")


def _client_closed() -> ClosedError:
    return ClosedError("the client was closed under the pool")


def _other_body(record: Record) -> InvalidRequestError:
    return InvalidRequestError(
        f"key {record.key!r}: this job has a request with this key and another body, which may be paid for; "
        "give the changed one a key of its own",
        param="key",
    )
