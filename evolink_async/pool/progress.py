"""How a pool is doing: what it counts, and telling it to the caller from time to time."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal

from evolink_async.pool.outcome import COMPLETED, FAILED, NOT_SUBMITTED, REJECTED, ModelStats, Outcome, PoolStats

logger = logging.getLogger("evolink_async.pool")

PAUSE = 1.0


# What they cost is known, although nothing may be told of it.
_FREE = frozenset({FAILED, REJECTED})


@dataclass(slots=True)
class _Sums:
    """Of the outcomes of one model."""

    counts: Counter[str] = field(default_factory=Counter)
    priced: int = 0
    credits: Decimal = Decimal(0)
    squares: Decimal = Decimal(0)

    def stats(self) -> ModelStats:
        mean = float(self.credits) / self.priced if self.priced else 0.0
        variance = float(self.squares) / self.priced - mean * mean if self.priced else 0.0
        return ModelStats(
            requests=self.counts.total(),
            completed=self.counts[COMPLETED],
            failed=self.counts[FAILED],
            priced=self.priced,
            credits=self.credits,
            deviation=math.sqrt(variance) if variance > 1e-9 * mean * mean else 0.0,
        )


class Tally:
    """Running sums over everything that went through a pool."""

    def __init__(self) -> None:
        self.finished = 0  # outcomes
        self.posts = self.polls = self.rate_limited = 0
        self.seconds = 0.0
        self.timed = 0
        self._models: defaultdict[str | None, _Sums] = defaultdict(_Sums)  # None: of tasks that were attached

    def outcome(self, outcome: Outcome, times: int = 1) -> None:
        """A request came to its end; -1 times: it has not, after all."""
        self.finished += times
        request, status, credits = outcome.request, outcome.status, outcome.credits
        sums = self._models[None if request is None else request.model]
        sums.counts[status] += times
        if credits is not None and status is not NOT_SUBMITTED:
            sums.priced += times
            paid = credits * times
            sums.credits += paid
            sums.squares += paid * credits
        elif status in _FREE:
            sums.priced += times

    def counts(self) -> dict[str, int]:
        """Outcomes by status."""
        counts = sum((sums.counts for sums in self._models.values()), Counter[str]())
        return {str(status): count for status, count in counts.items()}

    def by_model(self) -> dict[str, ModelStats]:
        return {model: sums.stats() for model, sums in self._models.items() if model is not None}

    def ended(self, seconds: float) -> None:
        """A task that was sent in this run came to its end, so many seconds later."""
        if seconds > 0.0:
            self.seconds += seconds
        self.timed += 1

    def eta(self, to_send: int, running: int, rate: float | None, places: int) -> float | None:
        """Seconds until all is done: what is to be sent at the present rate, or as fast as places come free, and one
        more usual duration for the last of them. None while no task has ended."""
        if not to_send and not running:
            return 0.0
        if not self.timed:
            return None
        usual = self.seconds / self.timed
        return max(to_send / rate if rate else 0.0, to_send / places * usual) + usual


class Progress:
    """Calls the caller's `on_progress`, at most once a second while something changes, and once at the end.

    It begins with `open`.
    """

    def __init__(self, on_progress: Callable[[PoolStats], object] | None, stats: Callable[[], PoolStats]) -> None:
        self._on_progress = on_progress
        self._tell: Callable[[PoolStats], object] | None = None
        self._stats = stats
        self._timer: asyncio.TimerHandle | None = None
        self._last = -math.inf

    def open(self) -> None:
        """From here on changes are told."""
        self._tell = self._on_progress

    def changed(self) -> None:
        """Something changed."""
        if self._tell is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._last + PAUSE), self._report)

    def close(self) -> None:
        """The end: tell what is not told yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._report()
        self._tell = None

    def _report(self) -> None:
        self._timer = None
        if self._tell is None:
            return
        self._last = asyncio.get_running_loop().time()
        try:
            self._tell(self._stats())
        except Exception:
            logger.exception("on_progress raised; the pool goes on", extra={"event": "callback_failed"})


def log_outcome(outcome: Outcome) -> None:
    """Say what became of a request."""
    if not logger.isEnabledFor(logging.INFO):
        return  # one of a million
    request, task, error = outcome.request, outcome.task, outcome.error
    logger.info(
        "request %s: %s",
        outcome.identity,
        outcome.status,
        extra={
            "event": "outcome",
            "identity": outcome.identity,
            "status": str(outcome.status),
            "task_id": None if task is None else task.id,
            "model": None if request is None else request.model,
            "credits": None if outcome.credits is None else float(outcome.credits),
            "error": None if error is None else type(error).__name__,
            "code": None if error is None else error.code,
            "attempts": outcome.attempts,
        },
    )
