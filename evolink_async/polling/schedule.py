"""When to look at a task next. Pure: what is known of the task in, seconds out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

SHORTEST = 1.0  # seconds between two looks at one task; each look makes the service ask its provider (vendor's client)
LONGEST_ESTIMATE = 3600.0

# Where the service gives no estimate: the vendor's own fallbacks, in seconds.
_USUAL = {"image": 30.0, "audio": 90.0, "video": 180.0}
_USUAL_OF_ANY = 60.0

# Shares of the estimate: a look for early failures, then from LATE on one every STEP. SPREAD: how much earlier at most.
_EARLY, _LATE, _STEP, _SPREAD = 0.25, 0.6, 0.05, 0.1


@dataclass(frozen=True, slots=True)
class Sighting:
    """What is known of a task that is not finished. age and since_last in seconds; since_last None: never looked."""

    model: str | None
    kind: str | None
    age: float
    estimate: float | None
    progress: int
    since_last: float | None


class Schedule(Protocol):
    """Decides when to look again."""

    def next_look(self, sighting: Sighting, random: float) -> float:
        """Seconds until the next look; `random` is uniform in [0, 1) and spreads tasks of the same age."""


class EstimateSchedule:
    """Looks once early, then often around the estimated time.

    Before 60 % of the estimate: at 25 % (failures come early) and at 60 %. From there on at most 5 % of the estimate
    after the previous look, but a second at least. A task past 60 % that nobody has looked at yet: now.
    """

    def next_look(self, sighting: Sighting, random: float) -> float:
        estimate = _plausible(sighting)
        spread = 1.0 - _SPREAD * random  # only ever earlier
        for share in (_EARLY, _LATE):
            if sighting.age < share * estimate * (1.0 - _SPREAD):
                return max(SHORTEST, share * estimate * spread - sighting.age)
        if sighting.since_last is None and sighting.age >= _LATE * estimate:
            return 0.0
        return max(SHORTEST, _STEP * estimate * spread)


def _plausible(sighting: Sighting) -> float:
    """The estimate, or the usual duration where there is none that makes sense."""
    estimate = sighting.estimate
    if estimate is None or math.isnan(estimate) or estimate <= 0:
        estimate = _USUAL.get(sighting.kind or "", _USUAL_OF_ANY)
    return min(estimate, LONGEST_ESTIMATE)
