"""Warnings when a job costs, fails or takes more than it should."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from evolink_async.checks import checked_function
from evolink_async.errors import ConfigurationError
from evolink_async.pool.outcome import OutcomeStatus, PoolStats
from evolink_async.telemetry.forecast import forecast

__all__ = ["Crossing", "Thresholds"]

logger = logging.getLogger("evolink_async.telemetry")

WINDOW, FEWEST = 50, 20  # outcomes over which shares and means are taken; fewer tell nothing
BACK = 0.9  # of a limit: below that it may be crossed again


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value went over its limit, or (`over` is False) came back well below it. name: that of the threshold."""

    name: str
    value: float
    limit: float
    over: bool


class _Point(NamedTuple):
    """The sums of one moment."""

    outcomes: int
    errors: int
    timed: int
    seconds: float


class Thresholds:
    """Looks at a pool's stats and tells when a limit is crossed: once, until the value was 10 % below it again.

        thresholds = Thresholds(credits=1_500, error_share=0.2, latency=120)
        async with client.pool(requests, on_progress=thresholds) as pool: ...

    credits: spent in this run, and reserved. forecast: what the job will have cost in the end, by `forecast(stats)`.
    error_share: of the last 50 outcomes, those that are neither completed nor unsent; 0
    to 1. latency: seconds from submission to end, the mean of the last 50 tasks. Below 20 of them nothing is told.
    on_crossed: plain function that is given each `Crossing`.

    A crossing is logged as a warning too (`threshold_crossed`; `threshold_cleared` on the way back). Use one for each
    pool; `check(stats)` does the same by hand. Raises `ConfigurationError` for a limit that is none. Since 0.1.0.
    """

    def __init__(
        self,
        *,
        credits: Decimal | float | None = None,
        forecast: Decimal | float | None = None,
        error_share: float | None = None,
        latency: float | None = None,
        on_crossed: Callable[[Crossing], object] | None = None,
    ) -> None:
        limits = {"credits": credits, "forecast": forecast, "error_share": error_share, "latency": latency}
        self._limits = {name: _checked(limit, name) for name, limit in limits.items() if limit is not None}
        if error_share is not None and error_share > 1:
            raise ConfigurationError(f"error_share is a share between 0 and 1, got {error_share!r}")
        checked_function(on_crossed, "on_crossed")
        self._on_crossed = on_crossed
        self._over: set[str] = set()
        self._points: deque[_Point] = deque([_Point(0, 0, 0, 0.0)])

    def __call__(self, stats: PoolStats) -> None:
        """The same as `check`, for `on_progress`."""
        self.check(stats)

    def check(self, stats: PoolStats) -> list[Crossing]:
        """The limits that were crossed since the last time, in either direction."""
        values = self._values(stats)
        crossings = []
        for name, limit in self._limits.items():
            value = values[name]
            if value is None:
                continue
            if name not in self._over and value > limit:
                self._over.add(name)
                crossings.append(Crossing(name, value, limit, over=True))
            elif name in self._over and value <= BACK * limit:
                self._over.discard(name)
                crossings.append(Crossing(name, value, limit, over=False))
        for crossing in crossings:
            _log(crossing)
        if self._on_crossed is not None:  # which may raise: then all are logged at least
            for crossing in crossings:
                self._on_crossed(crossing)
        return crossings

    def _values(self, stats: PoolStats) -> dict[str, float | None]:
        unsent = stats.counts.get(OutcomeStatus.NOT_SUBMITTED, 0)
        outcomes = stats.finished - unsent
        now = _Point(outcomes, outcomes - stats.completed, stats.timed, stats.task_seconds)
        points = self._points
        if now != points[-1]:
            points.append(now)
        while len(points) > 2 and now.outcomes - points[1].outcomes >= WINDOW:
            points.popleft()
        before = points[0]
        recent, timed = now.outcomes - before.outcomes, now.timed - before.timed
        likely = forecast(stats).credits if "forecast" in self._limits else None
        return {
            "credits": float(stats.credits_spent + stats.credits_reserved),
            "forecast": None if likely is None else float(likely),
            "error_share": (now.errors - before.errors) / recent if recent >= FEWEST else None,
            "latency": (now.seconds - before.seconds) / timed if timed >= FEWEST else None,
        }


def _log(crossing: Crossing) -> None:
    facts = {"threshold": crossing.name, "value": crossing.value, "limit": crossing.limit}
    if crossing.over:
        logger.warning(
            "%s is %.6g, over its threshold of %.6g",
            crossing.name,
            crossing.value,
            crossing.limit,
            extra={"event": "threshold_crossed"} | facts,
        )
    else:
        logger.info(
            "%s is %.6g, well below its threshold of %.6g again",
            crossing.name,
            crossing.value,
            crossing.limit,
            extra={"event": "threshold_cleared"} | facts,
        )


def _checked(limit: Decimal | float, name: str) -> float:
    known = isinstance(limit, Decimal | int | float) and not isinstance(limit, bool)
    if not known or not Decimal(str(limit)).is_finite() or limit <= 0:
        raise ConfigurationError(f"{name} must be a positive number, got {limit!r}")
    return float(limit)
