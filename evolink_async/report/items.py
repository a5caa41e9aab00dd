"""What a report tells of: the requests of a job, sums over all of them, and how its runs went. Plain values."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

STATUSES = (
    *("completed", "failed", "cancelled", "lost", "rejected"),
    *("unknown", "unfinished", "not_submitted"),
)
MOST_ITEMS = 20_000  # requests that a page shows one by one; the sums are over all


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One request of a job, and what became of it.

    status: as of an outcome. spent, reserved: credits over all tries, None if nobody has told. submitted_at,
    finished_at: aware UTC; the latter is when the end was known here. service_seconds: how long the task took by the
    service's word, None where it says nothing. files: paths below the folder of the report; elsewhere: other files, as
    text. links: http(s), they die in 24 hours.
    """

    identity: str
    status: str
    key: str | None = None
    kind: str | None = None
    model: str | None = None
    prompt: str | None = None
    task_id: str | None = None
    error_code: str | None = None
    error: str | None = None
    spent: Decimal | None = None
    reserved: Decimal | None = None
    attempts: int = 0
    submitted_at: datetime | None = None
    finished_at: datetime | None = None
    service_seconds: float | None = None
    sent_twice: bool = False
    files: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What people call it."""
        return self.identity if self.key is None else self.key

    @property
    def seconds(self) -> float | None:
        """From its submission to the end being known here; None if a clock that was set back hides it."""
        if self.submitted_at is None or self.finished_at is None or self.finished_at < self.submitted_at:
            return None
        return (self.finished_at - self.submitted_at).total_seconds()

    @property
    def detection_delay(self) -> float | None:
        """Seconds from the end of the task to its being known here; None where the service tells no duration.

        Both spans begin with the submission, so that no two clocks are compared. The way of the POST is in it.
        """
        if self.seconds is None or self.service_seconds is None or self.sent_twice:
            return None
        return self.seconds - self.service_seconds


@dataclass(frozen=True, slots=True)
class Sample:
    """How a run was doing at one moment: unix time, seconds since it began, and its counts so far.

    refused: 429 answers. rate: submissions per second that are allowed, None while nothing bounds them.
    """

    at: float
    elapsed: float
    posts: int
    refused: int
    rate: float | None


@dataclass(slots=True)
class ModelSums:
    """What the requests of one model have come to."""

    requests: int = 0
    spent: Decimal = Decimal(0)
    reserved: Decimal = Decimal(0)


@dataclass(slots=True)
class Totals:
    """Sums over requests, eight bytes for each moment. Times are unix seconds, `took` and `delays` seconds.

    charged: whether anybody has told what anything cost. whole_seconds: whether all that the service told of durations
    were whole numbers.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    models: dict[str, ModelSums] = field(default_factory=dict)
    submitted: array[float] = field(default_factory=lambda: array("d"))
    completed: array[float] = field(default_factory=lambda: array("d"))
    in_vain: array[float] = field(default_factory=lambda: array("d"))
    took: array[float] = field(default_factory=lambda: array("d"))
    delays: array[float] = field(default_factory=lambda: array("d"))
    whole_seconds: bool = True
    charged: bool = False

    def add(self, item: Item) -> None:
        """Count a request."""
        self.statuses[item.status] += 1
        model = self.models.setdefault(item.model or "", ModelSums())
        model.requests += 1
        model.spent += item.spent or 0
        model.reserved += item.reserved or 0
        self.charged = self.charged or item.spent is not None or item.reserved is not None
        if item.submitted_at is not None:
            self.submitted.append(item.submitted_at.timestamp())
        if item.finished_at is not None and item.status in ("completed", "failed", "cancelled", "lost"):
            ended = self.completed if item.status == "completed" else self.in_vain
            ended.append(item.finished_at.timestamp())
            self._add_spans(item)

    def _add_spans(self, item: Item) -> None:
        if item.seconds is not None and item.status != "lost":
            self.took.append(item.seconds)
        if item.detection_delay is not None and item.service_seconds is not None:
            self.delays.append(item.detection_delay)
            self.whole_seconds = self.whole_seconds and float(item.service_seconds).is_integer()

    @property
    def requests(self) -> int:
        """All of them."""
        return self.statuses.total()

    @property
    def spent(self) -> Decimal:
        """Credits charged."""
        return sum((model.spent for model in self.models.values()), Decimal(0))

    @property
    def reserved(self) -> Decimal:
        """Credits that are held for what has not ended, or is not certain."""
        return sum((model.reserved for model in self.models.values()), Decimal(0))


@dataclass(slots=True)
class Contents:
    """All that a report is made from. items: the first `MOST_ITEMS` of the job; totals: over all. notes: sentences."""

    title: str
    items: list[Item] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        """Whether one more request will be shown."""
        return len(self.items) < MOST_ITEMS

    def add(self, item: Item) -> None:
        """One more request."""
        self.totals.add(item)
        if self.has_room:
            self.items.append(item)

    def runs(self) -> Iterator[list[Sample]]:
        """The samples by run: the time since the beginning of a run never goes back."""
        run: list[Sample] = []
        for sample in self.samples:
            if run and sample.elapsed < run[-1].elapsed:
                yield run
                run = []
            run.append(sample)
        if run:
            yield run
