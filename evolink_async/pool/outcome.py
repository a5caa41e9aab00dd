"""What became of a request, and how a pool is doing: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import PurePath

from evolink_async.durations import duration
from evolink_async.errors import EvoLinkError
from evolink_async.requests import GenerationRequest
from evolink_async.types import Task


class OutcomeStatus(StrEnum):
    """The ends a request given to a pool can come to."""

    COMPLETED = "completed"  # generated (and saved, where asked)
    FAILED = "failed"  # so says the service; not charged
    CANCELLED = "cancelled"  # so says the service
    UNFINISHED = "unfinished"  # running or believed so, its id is known
    LOST = "lost"  # the service no longer knows the id
    REJECTED = "rejected"  # refused, by us or by the service; not charged
    UNKNOWN = "unknown"  # lost response: a task may exist
    NOT_SUBMITTED = "not_submitted"  # pulled from its source, nothing sent


COMPLETED, FAILED, CANCELLED, UNFINISHED, LOST, REJECTED, UNKNOWN, NOT_SUBMITTED = OutcomeStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request given to a pool.

    index: counts requests in the order pulled, from 0; None for tasks that were attached. key: the caller's own.
    identity: the request's key, or 16 hex digits of its content's hash and how many equal ones came before it.
    task: the last that was seen of it, None if there is none; of one that may still run only its id, kind, model,
    status, progress and reserved credits are kept. error: None if all went well.
    files: paths that hold its results, where `save_to` asked for them, in the order of its links. credits: charged or
    still reserved, over all tries; None if the service told nothing.
    attempts: POSTs sent. submitted_at, finished_at: aware UTC. from_ledger: not run again, known from an earlier run.
    """

    index: int | None
    key: str | None
    identity: str
    request: GenerationRequest | None
    status: OutcomeStatus
    task: Task | None = None
    error: EvoLinkError | None = None
    files: tuple[PurePath, ...] = ()
    credits: Decimal | None = None
    attempts: int = 0
    idempotency_key: str | None = None
    submitted_at: datetime | None = None
    finished_at: datetime | None = None
    from_ledger: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return self.error is None

    @property
    def urls(self) -> tuple[str, ...]:
        """The result links, which die in 24 hours."""
        return self.task.urls if self.task is not None else ()

    def unwrap(self) -> Task:
        """The completed task. Raises `error` if there is one."""
        if self.error is not None:
            raise self.error
        assert self.task is not None
        return self.task

    def _repr_html_(self) -> str:
        from evolink_async.html import MOST_LINKS, results, table

        request, task, error = self.request, self.task, self.error
        rows: list[tuple[str, object]] = [
            ("request", self.key if self.key is not None else self.identity),
            ("status", self.status),
            ("model", None if request is None else request.model),
            ("task", None if task is None else task.id),
            ("error", None if error is None else f"{type(error).__name__}: {error}"),
            ("credits", self.credits),
            ("known from", "the ledger" if self.from_ledger else None),
            *(("file", path) for path in self.files[:MOST_LINKS]),
        ]
        return table(rows) + results(self.urls, previews=request is not None and request.kind == "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStats:
    """What became of the requests for one model so far.

    requests: outcomes, of which so many completed and failed. priced: those of which is known what they cost (failed
    and rejected ones: nothing). credits: what they cost together, what stays reserved included. deviation: of what one
    costs, the standard deviation.
    """

    requests: int = 0
    completed: int = 0
    failed: int = 0
    priced: int = 0
    credits: Decimal = Decimal(0)
    deviation: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """How a pool is doing.

    total: requests in all, None while a source of unknown length isn't read to its end. pulled: read from the sources.
    waiting: pulled, not sent yet. outstanding: submitted or being submitted, and not terminal. untaken: outcomes that
    wait for the reader. counts: outcomes by status. credits_reserved: of what is outstanding; credits_spent: of what
    ended. posts: POSTs sent. polls: looks at this pool's tasks. status_requests: requests for them, a batch being one,
    those of other pools and waits of the client included. rate_limited: 429 answers to this pool. rate: submissions per
    second allowed now, None while unlimited. eta: seconds until all is done at the present pace, None if unknown.
    elapsed: seconds since the block was entered. timed: tasks that were sent and ended in this run; task_seconds: what
    they took together. models: what became of the requests so far, by model.
    """

    total: int | None
    pulled: int
    waiting: int
    outstanding: int
    untaken: int
    counts: Mapping[str, int] = field(default_factory=dict)
    credits_reserved: Decimal = Decimal(0)
    credits_spent: Decimal = Decimal(0)
    posts: int = 0
    polls: int = 0
    status_requests: int = 0
    rate_limited: int = 0
    rate: float | None = None
    eta: float | None = None
    elapsed: float = 0.0
    timed: int = 0
    task_seconds: float = 0.0
    models: Mapping[str, ModelStats] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        """Outcomes so far."""
        return sum(self.counts.values())

    @property
    def completed(self) -> int:
        """Outcomes with status completed."""
        return self.counts.get(OutcomeStatus.COMPLETED, 0)

    @property
    def failed(self) -> int:
        """Outcomes with status failed."""
        return self.counts.get(OutcomeStatus.FAILED, 0)

    def _repr_html_(self) -> str:
        from evolink_async.html import table

        total = "" if self.total is None else f" of {self.total:,}"
        rows: list[tuple[str, object]] = [
            ("finished", f"{self.finished:,}{total}"),
            *((f"- {status.replace('_', ' ')}", f"{count:,}") for status, count in self.counts.items() if count),
            ("outstanding", f"{self.outstanding:,}"),
            ("waiting", f"{self.waiting:,}"),
            ("untaken", f"{self.untaken:,}" if self.untaken else None),
            ("credits", f"{self.credits_spent.normalize():f} spent, {self.credits_reserved.normalize():f} reserved"),
            ("pace", None if self.rate is None else f"{self.rate:.3g}/s, {self.rate_limited:,} refused"),
            ("elapsed", duration(self.elapsed)),
            ("left", None if self.eta is None else duration(self.eta)),
        ]
        return table(rows)
