"""One request on its way through a pool.

    state        where it is                                holds a place  moved on by
    (source)     in the caller's iterable                   no             the feeder, while there is room
    entering     read; the ledger looks it up, or the same  no             the ledger
                 request is on its way already
    pulled       known and checked; waits for a place       no             the pool, when a place is free
    sending      its local files are uploaded; in the       yes            the submitter, with the answer
                 pace's queue; or its POST flies; or
                 waits to be sent again
    outstanding  at the service, its id is known            yes            the watcher, with the first terminal status
    saving       completed; its results are fetched         no             the worker that saves them
    untaken      how it ended is known                      no             the reader of the iteration, or the caller
                                                                           of `run`
    (handed      the pool has forgotten it                  no
    over)

There is room for one more to be read while places held + entering + pulled + saving + untaken < `max_outstanding`.
There is a place for one more to be sent while places held < `max_outstanding`; a request given to `run` may also have
the place of one from a source that is still in the pace's queue, which then is pulled again. Every other move goes down
the table.

One model that has to wait leaves half of the places to the others: a request gets no place while half of them are held
by requests of its model in `sending`, and a source is not read on while as many requests of the model that it gave last
are pulled or sending. Requests with local files count as a model of their own.

Short cuts: from entering to untaken (or to saving), what has ended in an earlier run; from pulled to untaken, what is
wrong or comes when nothing is sent any more; from pulled to outstanding, whose task an earlier run has made; from
sending back to pulled, what has to wait until a price is known; from sending to untaken, what was refused, taken back
or stays unknown; from outstanding to untaken, all that has nothing to save, timed out or was lost, and back to pulled,
what failed and may be tried again; and from untaken, where it is `unknown`, back to outstanding, when a callback has
shown its task. When the block is left, what was sent and is not handed over goes to `leftovers`, and what was not sent
is dropped.

Each move is one synchronous step of `Stages`, and is made in one place: entering `Engine._begin`, pulled
`_wait_for_place`, sending `_send`, outstanding `_hold`, saving `_conclude_as`, untaken `_finish`. What the ledger has
to know of it goes through the `Journal`: durable before the first byte of a POST, and before anyone sees an id.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import PurePath
from typing import Any, ClassVar, Protocol

from evolink_async.errors import (
    EvoLinkError,
    InvalidRequestError,
    NotSubmittedError,
    SubmitOutcomeUnknownError,
    TaskError,
    TaskLostError,
)
from evolink_async.http.answers import Judgement
from evolink_async.http.retry import Verdict
from evolink_async.http.submit import Settled, Submission
from evolink_async.ledger import Row, states
from evolink_async.ledger.values import shared, to_credits
from evolink_async.polling.endings import failure_of, still_running
from evolink_async.pool.journal import Journal
from evolink_async.pool.outcome import (
    FAILED,
    LOST,
    NOT_SUBMITTED,
    REJECTED,
    UNFINISHED,
    UNKNOWN,
    Outcome,
    OutcomeStatus,
)
from evolink_async.pool.waiting import NO_LINE, Line
from evolink_async.requests import GenerationRequest
from evolink_async.saving.objects import path_of
from evolink_async.types import Task, TaskReading, TaskStatus, Usage

_UNSENT = Verdict.UNSENT


class State(StrEnum):
    """Where a request is."""

    ENTERING = "entering"
    PULLED = "pulled"
    SENDING = "sending"
    OUTSTANDING = "outstanding"
    SAVING = "saving"
    UNTAKEN = "untaken"


# A name of a module costs a tenth of what `State.ENTERING` does (until Python 3.12), and each task asks for many.
ENTERING, PULLED, SENDING, OUTSTANDING, SAVING, UNTAKEN = State


class Home(Protocol):
    """What a record tells its pool."""

    @property
    def journal(self) -> Journal: ...
    def posting(self, record: Record) -> None: ...
    def posted(self, record: Record, judgement: Judgement) -> None: ...
    def held(self, record: Record, error: EvoLinkError) -> None: ...
    def end_early(self, reason: BaseException) -> None: ...
    def settled(self, record: Record, settled: Settled) -> None: ...
    def seen(self, record: Record) -> None: ...
    def ended(self, record: Record, task: Task) -> None: ...
    def lost(self, record: Record, error: EvoLinkError) -> None: ...
    def crashed(self, record: Record, error: BaseException) -> None: ...
    def unwatched(self, error: BaseException) -> None: ...


@dataclass(slots=True, eq=False)
class Record:
    """One request on its way through a pool. Listens to its submission, follows its task.

    What outlives the pool is in its `row`.
    """

    waiter: ClassVar[asyncio.Future[Outcome] | None] = None  # of the `run` that gave it; None: it came from a source

    home: Home
    index: int | None
    request: GenerationRequest | None
    row: Row | None = None  # once the ledger has told
    state: State = ENTERING
    submission: Submission | None = None  # while it is sending
    task: Task | None = None  # the whole of it, once it is over: that many are outstanding at once, each a word only
    status: str | None = None  # that a look found, since the task was submitted or attached
    progress: int = 0
    ends: float = math.inf  # the time for which its task is watched, by the loop's clock
    from_ledger: bool = False  # how it ended was known before this run
    accepted_before: int = 0  # so many that an earlier run has submitted were read before it
    line: Line = NO_LINE  # what it waits among

    @property
    def identity(self) -> str:
        """Its name in the job, as far as it has one."""
        if self.row is not None:
            return self.row.identity
        key = self.key
        return key if key is not None else f"item-{self.index}"

    @property
    def model(self) -> str:
        """The model it asks for."""
        assert self.request is not None
        return self.request.model

    @property
    def number(self) -> int:
        """Its place in the order pulled."""
        assert self.index is not None
        return self.index

    @property
    def deserted(self) -> bool:
        """Whether the caller of `run` has stopped waiting."""
        return self.waiter is not None and self.waiter.done()

    @property
    def key(self) -> str | None:
        """The caller's name for it."""
        return None if self.request is None else self.request.key

    @property
    def task_id(self) -> str | None:
        """The id of its task, once that is known."""
        return None if self.row is None else self.row.task_id

    def known_task(self) -> Task | None:
        """The task as far as it is known: of one that goes on, what its outcome has to tell."""
        if self.task is not None or (task_id := self.task_id) is None:
            return self.task
        request, row = self.request, self.row
        reserved = None if row is None or row.reserved is None else to_credits(row.reserved)
        return Task(
            id=task_id,
            status=self.status or TaskStatus.PENDING,
            kind=None if request is None else request.kind,
            model=None if request is None else request.model,
            progress=self.progress,
            usage=Usage(credits_reserved=reserved),
        )

    def again(self) -> None:
        """Forget the task that failed: another one is wanted."""
        self.submission = self.task = self.status = None
        self.progress = 0

    # As the listener of its submission. A fault in here is reported by the submitter, to `crashed`.

    def intend(self, submission: Submission, fingerprint: str) -> Coroutine[Any, Any, Settled | None]:
        assert self.row is not None
        if submission is self.submission:
            self.home.posting(self)
        return self.home.journal.intend(self.row, submission, fingerprint, self.index)

    def unsent(self, submission: Submission) -> None:
        assert self.row is not None
        self.home.journal.unsent(self.row)

    def answered(self, submission: Submission, judgement: Judgement) -> None:
        assert self.row is not None
        if submission is self.submission and judgement.verdict is not _UNSENT:
            self.home.posted(self, judgement)
        self.home.journal.answered(self.row, judgement)

    def accepted(self, submission: Submission, task: TaskReading) -> Coroutine[Any, Any, EvoLinkError | None]:
        assert self.row is not None
        return self.home.journal.accepted(self.row, task)

    def held(self, submission: Submission, error: EvoLinkError) -> None:
        if submission is self.submission:
            self.home.held(self, error)

    def paused(self, error: EvoLinkError) -> None:
        self.home.end_early(error)

    def settled(self, submission: Submission, settled: Settled) -> None:
        if submission is self.submission:
            self.home.settled(self, settled)

    # As a follower of its task. A fault in here would take the watcher down, and with it everybody's tasks.

    def seen(self, reading: TaskReading) -> None:
        self.status, self.progress = reading.status, reading.progress
        if reading.is_terminal:  # only its links are awaited
            self.task = reading.task
        try:
            self.home.seen(self)
        except Exception as error:  # noqa: BLE001  (it becomes the pool's reason)
            self.home.crashed(self, error)

    def ended(self, task: Task) -> None:
        self.task = task
        try:
            self.home.ended(self, task)
        except Exception as error:  # noqa: BLE001  (it becomes the pool's reason)
            self.home.crashed(self, error)

    def lost(self, error: EvoLinkError) -> None:
        if isinstance(error, TaskError):
            error.task = self.known_task() or error.task
        try:
            self.home.lost(self, error)
        except Exception as fault:  # noqa: BLE001  (it becomes the pool's reason)
            self.home.crashed(self, fault)

    def crashed(self, error: BaseException) -> None:
        if self.state is OUTSTANDING:
            self.home.unwatched(error)
        else:
            self.home.crashed(self, error)

    # Its end

    def outcome(
        self, status: OutcomeStatus, error: EvoLinkError | None, finished_at: datetime, files: tuple[PurePath, ...]
    ) -> Outcome:
        """The outcome, if it ends like this. files: that were saved just now; else those that its row knows."""
        row, task = self.row, self.task or self.known_task()
        if row is None:
            credits = None if task is None else _charged(status, task.usage)
            row = _NO_ROW
        else:
            credits = row.credits
        return Outcome(
            index=self.index,
            key=self.key,
            identity=self.identity,
            request=self.request,
            status=status,
            task=task,
            error=error,
            files=files or (tuple(map(path_of, row.files)) if row.files else ()),
            credits=credits,
            attempts=row.attempts,
            idempotency_key=row.idempotency_key,
            submitted_at=row.submitted_at,
            finished_at=(row.ended_at or finished_at) if self.from_ledger else finished_at,
            from_ledger=self.from_ledger,
        )

    def known_ending(self) -> tuple[OutcomeStatus, EvoLinkError | None]:
        """How its row says that it ended, or where it stands if it has not."""
        row, request = self.row, self.request
        assert row is not None
        match row.state:
            case states.COMPLETED | states.FAILED | states.CANCELLED:
                self.task = self.task or row.task
                assert self.task is not None
                return OutcomeStatus(row.state), failure_of(self.task)
            case states.LOST:
                lost = self.known_task()
                assert lost is not None
                return LOST, TaskLostError(row.error or "the service no longer knows it", task=lost)
            case states.REJECTED:
                text = (row.error or "it was refused").removeprefix(f"{row.error_code}: ")  # as `str` of an error is
                return REJECTED, InvalidRequestError(text, code=row.error_code)
            case states.ACCEPTED:
                task = self.known_task()
                assert task is not None
                return UNFINISHED, still_running(task, None)
            case states.ENTERED:
                return NOT_SUBMITTED, NotSubmittedError("nothing was sent for this request")
        given_up = row.state is states.GIVEN_UP
        then = "Look for it at the service, then settle it with `evolink-async job resolve`"
        if given_up:
            then = "It was given up and is never sent again; `evolink-async job resolve` can still settle it"
        error = SubmitOutcomeUnknownError(
            "the request was sent in an earlier run, and whether a task exists (and is paid for) is not known: "
            f"{row.error or 'no answer came'}. {then}; idempotency key {row.idempotency_key}",
            request=request,
            idempotency_key=row.idempotency_key,
            code=row.error_code,
            given_up=given_up,
        )
        return UNKNOWN, error


@dataclass(slots=True, eq=False)
class AwaitedRecord(Record):
    """One that was given to `run`, whose caller awaits the outcome."""

    waiter: asyncio.Future[Outcome] = field(kw_only=True)  # type: ignore[misc]


@dataclass(slots=True, eq=False)
class AttachedTask(Record):
    """A task that exists already, and goes by its id."""

    id: str = ""

    @property
    def key(self) -> str | None:
        return self.id

    @property
    def task_id(self) -> str | None:
        return self.id


_NO_ROW = Row("", b"", shared("", ""))


def _charged(status: OutcomeStatus, usage: Usage) -> Decimal | None:
    """completed: what was used, else what was reserved; failed: released; anything else may still be charged."""
    if status is FAILED:
        return Decimal(0)
    return usage.credits_used if usage.credits_used is not None else usage.credits_reserved
