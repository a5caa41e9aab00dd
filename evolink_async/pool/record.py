"""One request on its way through a pool.

    state        where it is                                holds a place  moved on by
    (source)     in the caller's iterable                   no             the feeder, while there is room
    pulled       read and checked; waits for a place        no             the pool, when a place is free
    sending      in the pace's queue; or its POST flies;    yes            the submitter, with the answer
                 or waits to be sent again
    outstanding  at the service, its id is known            yes            the watcher, with the first terminal status
    untaken      how it ended is known                      no             the reader of the iteration, or the caller
                                                                           of `run`
    (handed      the pool has forgotten it                  no
    over)

There is room for one more to be pulled while places held + pulled + untaken < `max_outstanding`. There is a place for
one more to be sent while places held < `max_outstanding`; a request given to `run` may also have the place of one from
a source that is still in the pace's queue, which then is pulled again. Every other move goes down the table.

One model that has to wait leaves half of the places to the others: a request gets no place while half of them are held
by requests of its model in `sending`, and a source is not read on while as many requests of the model that it gave last
are pulled or sending.

Short cuts to untaken: from pulled, what is wrong or comes when nothing is sent any more; from sending, what was
refused, taken back or stays unknown; from outstanding, what timed out or was lost. When the block is left, what was
sent and is not handed over goes to `leftovers`, and what was not sent is dropped.

Each move is one synchronous step and is made in one place: pulled `TaskPool._begin`, sending `_send`, outstanding
`_accepted`, untaken `_close`. A ledger has to make durable: the step into `sending` before the first byte, the
step into `outstanding` before anyone sees the id, and the last two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Protocol

from evolink_async.errors import EvoLinkError, TaskError
from evolink_async.http.submit import Settled, Submission
from evolink_async.pool.outcome import Outcome, OutcomeStatus
from evolink_async.requests import GenerationRequest
from evolink_async.types import Task, TaskReading, TaskStatus, Usage


class State(StrEnum):
    """Where a request is."""

    PULLED = "pulled"
    SENDING = "sending"
    OUTSTANDING = "outstanding"
    UNTAKEN = "untaken"


class Home(Protocol):
    """What a record tells its pool."""

    def _key_of(self, record: Record) -> str: ...
    def _posting(self, record: Record) -> None: ...
    def _held(self, record: Record, error: EvoLinkError) -> None: ...
    def _settled(self, record: Record, settled: Settled) -> None: ...
    def _seen(self, record: Record) -> None: ...
    def _ended(self, record: Record, task: Task) -> None: ...
    def _lost(self, record: Record, error: EvoLinkError) -> None: ...
    def _crashed(self, record: Record, error: BaseException) -> None: ...
    def _unwatched(self, error: BaseException) -> None: ...


@dataclass(slots=True, eq=False)
class Record:
    """One request and all that is known of it. Listens to its submission and follows its task."""

    home: Home
    index: int | None
    request: GenerationRequest | None
    identity: str
    waiter: asyncio.Future[Outcome] | None = None  # of the `run` that gave it; None: it came from a source
    state: State = State.PULLED
    has_key: bool = False  # an idempotency key: it was given to the submitter
    submission: Submission | None = None  # while it is sending
    attempts: int = 0
    task_id: str | None = None
    task: Task | None = None  # the whole of it, once it is over: that many are outstanding at once, each a word only
    status: str | None = None  # that a look found, since the task was submitted or attached
    progress: int = 0
    reserved: Decimal | None = None
    submitted_at: float | None = None  # Unix time of the first POST that was not provably in vain

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

    def is_over(self) -> bool:
        """Whether it has its outcome."""
        return self.state is State.UNTAKEN

    @property
    def key(self) -> str | None:
        """The caller's name for it."""
        return self.task_id if self.request is None else self.request.key

    @property
    def idempotency_key(self) -> str | None:
        """Of all its POSTs; None if there was nobody yet to make them."""
        return self.home._key_of(self) if self.has_key else None

    def known_task(self) -> Task | None:
        """The task as far as it is known: of one that goes on, what its outcome has to tell."""
        if self.task is not None or self.task_id is None:
            return self.task
        request = self.request
        return Task(
            id=self.task_id,
            status=self.status or TaskStatus.PENDING,
            kind=None if request is None else request.kind,
            model=None if request is None else request.model,
            progress=self.progress,
            usage=Usage(credits_reserved=self.reserved),
        )

    # As the listener of its submission. A fault in here is reported by the submitter, to `crashed`.

    def posting(self, submission: Submission) -> None:
        if submission is self.submission:
            self.home._posting(self)

    def held(self, submission: Submission, error: EvoLinkError) -> None:
        if submission is self.submission:
            self.home._held(self, error)

    def settled(self, submission: Submission, settled: Settled) -> None:
        if submission is self.submission:
            self.home._settled(self, settled)

    # As a follower of its task. A fault in here would take the watcher down, and with it everybody's tasks.

    def seen(self, reading: TaskReading) -> None:
        self.status, self.progress = reading.status, reading.progress
        if reading.is_terminal:  # only its links are awaited
            self.task = reading.task
        try:
            self.home._seen(self)
        except Exception as error:  # noqa: BLE001  (it becomes the pool's reason)
            self.home._crashed(self, error)

    def ended(self, task: Task) -> None:
        self.task = task
        self._tell(self.home._ended, self, task)

    def lost(self, error: EvoLinkError) -> None:
        if isinstance(error, TaskError):
            error.task = self.known_task() or error.task
        self._tell(self.home._lost, self, error)

    def crashed(self, error: BaseException) -> None:
        if self.state is State.OUTSTANDING:
            self.home._unwatched(error)
        else:
            self.home._crashed(self, error)

    def _tell(self, step: Callable[..., None], *args: Any) -> None:
        try:
            step(*args)
        except Exception as error:  # noqa: BLE001  (it becomes the pool's reason)
            self.home._crashed(self, error)

    # Its end

    def outcome(self, status: OutcomeStatus, error: EvoLinkError | None, finished_at: float) -> Outcome:
        """The outcome, if it ends like this. finished_at: Unix time."""
        return Outcome(
            index=self.index,
            key=self.key,
            identity=self.identity,
            request=self.request,
            status=status,
            task=self.known_task(),
            error=error,
            credits=self._credits(status),
            attempts=self.attempts,
            idempotency_key=self.idempotency_key,
            submitted_at=None if self.submitted_at is None or not self.attempts else _utc(self.submitted_at),
            finished_at=_utc(finished_at),
        )

    def _credits(self, status: OutcomeStatus) -> Decimal | None:
        """completed: what was used, else what was reserved; failed: released; anything else may still be charged."""
        if status is OutcomeStatus.FAILED:
            return Decimal(0)
        used = self.task.usage.credits_used if self.task else None
        return used if used is not None else self.reserved


def _utc(moment: float) -> datetime:
    return datetime.fromtimestamp(moment, UTC)
