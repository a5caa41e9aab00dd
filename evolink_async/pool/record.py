"""One request on its way through a pool.

    state        what is known                         moved on by
    pulled       read from its source, checked         the pool, when a place is free
    sending      in the pace's queue, or its POST is   the submitter, with the answer
                 under way, or waits to be sent again
    outstanding  the task's id                         the watcher, with the first terminal status
    untaken      how it ended                          the reader of the iteration, or the caller of `run`
    handed over  (the pool forgets it)

Only these moves exist, each is one synchronous step, and each is made in one place. A ledger has to make durable: the
step into `sending` before the first byte, the step into `outstanding` before anyone sees the id, and the last two.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Protocol

from evolink_async.errors import EvoLinkError
from evolink_async.http.submit import Settled, Submission
from evolink_async.pool.outcome import Outcome, OutcomeStatus
from evolink_async.requests import GenerationRequest
from evolink_async.types import Task


class State(StrEnum):
    """Where a request is."""

    PULLED = "pulled"
    SENDING = "sending"
    OUTSTANDING = "outstanding"
    UNTAKEN = "untaken"


class Home(Protocol):
    """What a record tells its pool."""

    def _posting(self, record: Record) -> None: ...
    def _held(self, record: Record, error: EvoLinkError) -> None: ...
    def _settled(self, record: Record, settled: Settled) -> None: ...
    def _seen(self, record: Record, task: Task) -> None: ...
    def _ended(self, record: Record, task: Task) -> None: ...
    def _lost(self, record: Record, error: EvoLinkError) -> None: ...
    def _crashed(self, error: BaseException) -> None: ...


@dataclass(slots=True, eq=False)
class Record:
    """One request and all that is known of it. Listens to its submission and follows its task."""

    home: Home
    index: int | None
    request: GenerationRequest | None
    key: str | None
    identity: str
    waiter: asyncio.Future[Outcome] | None = None  # of the `run` that gave it; None: it came from a source
    state: State = State.PULLED
    idempotency_key: str | None = None
    submission: Submission | None = None
    task: Task | None = None
    reserved: Decimal | None = None
    posts_counted: int = 0
    deadline: float = float("inf")
    looked: bool = False  # the service has said something about the task since it was submitted or attached
    submitted_at: datetime | None = None

    # As the listener of its submission

    def posting(self, submission: Submission) -> None:
        self.home._posting(self)

    def held(self, submission: Submission, error: EvoLinkError) -> None:
        self.home._held(self, error)

    def settled(self, submission: Submission, settled: Settled) -> None:
        self.home._settled(self, settled)

    # As a follower of its task

    def seen(self, task: Task) -> None:
        self.task, self.looked = task, True
        self.home._seen(self, task)

    def ended(self, task: Task) -> None:
        self.task = task
        self.home._ended(self, task)

    def lost(self, error: EvoLinkError) -> None:
        self.home._lost(self, error)

    def crashed(self, error: BaseException) -> None:
        self.home._crashed(error)

    def outcome(self, status: OutcomeStatus, error: EvoLinkError | None, finished_at: datetime) -> Outcome:
        """The outcome, if it ends like this."""
        return Outcome(
            index=self.index,
            key=self.key,
            identity=self.identity,
            request=self.request,
            status=status,
            task=self.task,
            error=error,
            credits=self._credits(status),
            attempts=self.submission.attempts if self.submission else 0,
            idempotency_key=self.idempotency_key,
            submitted_at=self.submitted_at,
            finished_at=finished_at,
        )

    def _credits(self, status: OutcomeStatus) -> Decimal | None:
        """completed: what was used, else what was reserved; failed: released; anything else may still be charged."""
        if status is OutcomeStatus.FAILED:
            return Decimal(0)
        used = self.task.usage.credits_used if self.task else None
        return used if used is not None else self.reserved
