"""What progress tells about when a task ends, and whether it tells anything. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from evolink_async.polling.law import DurationLaw, chance

TENTHS = 10
# How much better than the clock alone a tenth predicted lately, in nats: it starts in debt, and what is no better than
# the clock never gets out of it.
GAIN_BOUND = 3.0
_DEBT, _GAIN_RATE, _TRUSTED = -0.5, 0.05, 0.05


@dataclass(slots=True)
class Tenth:
    """What a tenth of progress has meant: a law of durations in units of the predicted one, and its gain in nats."""

    law: DurationLaw = field(default_factory=DurationLaw)
    gain: float = _DEBT


class ProgressLaws:
    """What a model's progress has meant, by tenths.

    So a bar that is late, that moves in steps or that stops at 95 % is learned for what it is. A tenth is trusted where
    it has predicted the ends of tasks better than their age alone did, measured before learning from them.
    """

    __slots__ = ("tenths",)

    def __init__(self) -> None:
        self.tenths: dict[int, Tenth] = {}

    def trusted(self, progress: float) -> DurationLaw | None:
        """The law of this progress, None where it is not known to help."""
        tenth = self.tenths.get(tenth_of(progress))
        return tenth.law if tenth is not None and tenth.gain > _TRUSTED else None

    def learn(self, progress: float, shown_at: float, low: float, high: float, by_clock: float) -> None:
        """Learn from a reading of a task that ended between two ages. by_clock: the chance its age alone gave that."""
        number = tenth_of(progress)
        tenth = self.tenths.get(number)
        if tenth is None:
            tenth = self.tenths[number] = Tenth()
        scale = predicted_duration(progress, shown_at)
        unfinished = tenth.law.survival(shown_at / scale)
        share = tenth.law.observe(low / scale, high / scale)
        gain = max(-GAIN_BOUND, min(GAIN_BOUND, math.log(chance(share, unfinished) / by_clock)))
        tenth.gain += _GAIN_RATE * (gain - tenth.gain)


def tenth_of(progress: float) -> int:
    """0 for up to 10 percent, 9 for the last ten."""
    return min(TENTHS - 1, int(progress * TENTHS / 100))


def predicted_duration(progress: float, shown_at: float) -> float:
    """Seconds in all, if `progress` percent, first seen at this age, are the true share."""
    return max(1.0, 100.0 * shown_at / progress)
