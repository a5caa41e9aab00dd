"""How fast a model may be asked: the user's limit, and what is learned from the service's answers. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from evolink_async.errors import ConfigurationError
from evolink_async.http.retry import RetryPolicy

# Without a limit from the user, until the service refuses: gentle, since the limits are unpublished.
START_BURST = 10
START_RATE = 5.0
SLOWEST = 0.2
# Growth per accepted request, in requests per second: before the first refusal about +25 % a second, then +5 % a second
# back to the rate that was refused, and above it gentle probing, bolder the longer nothing was refused: the limits of
# a service change, and a refusal may have had nothing to do with our rate.
_GROWTH, _RECOVERY, _PROBING = 0.25, 0.2, 0.004
_RECOVERY_SHARE = 0.003  # of the rate, where that is more than _RECOVERY
_LIMIT_KEPT = 0.95
# One refusal after so many accepted ones may have had nothing to do with our rate: a smaller cut, sooner made good.
_LONE_AFTER, _LONE_CUT, _LONE_LIMIT_KEPT, _LONE_USED = 60, 0.87, 0.97, 0.5
_MEASURED_OVER = 5.0  # seconds; where ten requests take longer, as long as those. Probing doubles in the same time
_LEAST_MEASURED = 0.5  # seconds: over less than this a rate says nothing
# Who uses less than this share of the rate learns nothing about a higher one.
_USED_SHARE = 0.5

_PER_WORD = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_LIMIT_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:/|per)\s*([a-z]+)\s*", re.I | re.A)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `rate` submissions per `per` seconds, evenly spaced.

    In no window of `per` seconds are more than `rate` + 1 sent. Also written as text: "5/s", "60/min", "1000/h".
    """

    rate: float
    per: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "per"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigurationError(f"RateLimit.{name} must be a positive number, got {value!r}")

    @property
    def per_second(self) -> float:
        """Submissions per second."""
        return self.rate / self.per

    @classmethod
    def parse(cls, value: RateLimit | str) -> RateLimit:
        """A limit from text such as "60/min". Raises `ConfigurationError` for anything else."""
        if isinstance(value, RateLimit):
            return value
        match = _LIMIT_TEXT.fullmatch(str(value))
        per = _PER_WORD.get(match[2].lower()) if match else None
        if match is None or per is None:
            raise ConfigurationError(f'a rate limit reads like "5/s", "60/min" or "1000/h", got {value!r}')
        return cls(float(match[1]), per)


class ModelPace:
    """How fast one model may be asked now. Pure: the caller passes the time, in seconds of any one clock.

    rate: submissions per second, infinite until there is a reason to slow down where the user set a `ceiling`.
    """

    __slots__ = (
        "_before",
        "_ceiling",
        "_counted",
        "_due",
        "_limit",
        "_refusals",
        "_since",
        "_streak",
        "burst",
        "cool_until",
        "last_cut",
        "rate",
    )

    def __init__(self, rate: float, burst: int, now: float, ceiling: float = math.inf) -> None:
        self.rate = rate
        self._ceiling = ceiling
        self.burst = burst
        self.cool_until = -math.inf
        self.last_cut = -math.inf
        self._due = now  # when the next one would be due at an even spacing
        self._limit = math.inf  # the rate that was refused last
        self._refusals = 0  # in a row
        self._streak = 0  # accepted since the last refusal
        self._counted = 0  # accepted since `_since`
        self._since: float | None = None  # the first of those
        self._before = 0.0  # accepted per second in the stretch before

    def ready_at(self, now: float) -> float:
        """The moment from which the next one may be sent."""
        if math.isinf(self.rate):
            return self.cool_until
        return max(self.cool_until, self._due - (self.burst - 1) / self.rate)

    def sent(self, now: float) -> None:
        if not math.isinf(self.rate):
            self._due = max(self._due, now) + 1 / self.rate

    def accepted(self, now: float) -> None:
        """The service took one: go a little faster, if we are as fast as we may be."""
        self._refusals = 0
        self._streak += 1
        stretch = max(_MEASURED_OVER, 10 / self.rate)
        if self._since is None or now - self._since > stretch:
            if self._since is not None:
                self._before = self._measured(now) or 0.0
            self._counted, self._since = 0, now
        self._counted += 1
        used = max(self._before, self._measured(now) or 0.0) or math.inf
        if self.rate > START_RATE and self.rate * _USED_SHARE > used:
            return
        if math.isinf(self._limit):
            growth = _GROWTH
        elif self.rate < self._limit:
            growth = max(_RECOVERY, min(_RECOVERY_SHARE * self.rate, self._limit - self.rate))
        else:
            growth = min(_GROWTH, _PROBING * 2 ** min(max(0.0, now - self.last_cut) / stretch, 10))
        # Where seconds pass between two, each may not count for more than it does at the start.
        self.rate += growth * min(1.0, self.rate / START_RATE)

    def refused(self, now: float, sent_at: float, hint: float | None, retry: RetryPolicy, rand: float) -> None:
        """A 429: nobody asks this model before the hint, and from then on slower than what was refused.

        `sent_at`: when the refused request was let go.
        """
        if sent_at >= self.cool_until or not self._refusals:
            self._refusals += 1  # those of one volley are one refusal
        pause = retry.delay(self._refusals, None, rand) if hint is None else max(hint, 0.05) + 0.001
        self.cool_until = max(self.cool_until, now + pause)
        # Requests that were under way when the rate was cut say nothing about the new rate.
        if sent_at <= self.last_cut or now - self.last_cut < 1:
            self._counted, self._since = 0, None  # a pause is no part of what is measured
            return
        current = self._measured(now)
        measured = current or self._before
        lone = self._streak >= _LONE_AFTER
        rate = min(self.rate, self._ceiling)
        if lone and not math.isinf(rate):
            # Measured leaves out what is on its way, so it is taken only where the rate was clearly not used up.
            refused_rate, cut = current if current and current < _LONE_USED * rate else rate, _LONE_CUT
        elif measured:
            refused_rate, cut = min(rate, measured), 0.95
        elif math.isinf(self.rate):  # too soon to tell, but the user believed in his limit
            refused_rate, cut = rate, 0.5
        else:
            refused_rate, cut = rate, 0.7
        # What we come back to shrinks step by step, too.
        if math.isinf(self._limit):
            self._limit = refused_rate
        elif lone:
            self._limit = max(_LIMIT_KEPT * self._limit, _LONE_LIMIT_KEPT * refused_rate)
        else:
            self._limit = max(refused_rate, _LIMIT_KEPT * self._limit)
        self.rate = max(SLOWEST, cut * refused_rate)
        self._streak = 0
        self.burst = 1
        self.last_cut = now
        if current or self.rate > START_RATE:  # slow ones are measured over several refusals and their pauses
            self._before, self._counted, self._since = measured, 0, None
        self._due = max(now, self.cool_until)

    def _measured(self, now: float) -> float | None:
        """Accepted per second in this stretch, None while it is too short to tell."""
        if self._since is None or now - self._since < max(_LEAST_MEASURED, 3 / self.rate):
            return None
        return self._counted / (now - self._since)

    def cool(self, until: float) -> None:
        """Nobody asks this model before `until`."""
        self.cool_until = max(self.cool_until, until)
        self._counted, self._since = 0, None
