"""What the service's answers say of its limits, each kind of evidence by itself. Pure; times are in seconds."""

from __future__ import annotations

import math
from collections import deque

TICK = 1e-5  # a timer may be so much early: what is due within these seconds is due
_BOLDNESS = 0.1  # how far above what was refused a probe is after as many accepted as its patience
# Under a limit as much comes through per second at one rate that is refused as at another. Where less comes through at
# the lower one, the refusals don't come from our rate, and each cut only makes the time between two of them longer.
ENOUGH = 5  # accepted; what few say is put together until there are as many
_ALIKE, _AS_MUCH, _MUCH_LESS = 1.25, 0.9, 0.7
_REMEMBERED = 16
_LONGER, _NEWS = 10.0, 0.25  # a gap counts for at most so many usual ones, and so much of the mean
PLACES_KEPT = 0.9


class Climb:
    """A level that is searched for: it climbs to what was refused last, and then, ever bolder, beyond."""

    __slots__ = ("_patience", "_probed", "_step", "_unit", "level", "refused")

    def __init__(self, level: float, unit: float = 0.0) -> None:
        self.level = level
        self._unit = unit  # a probe goes at least so much further
        self.refused = math.inf  # the level that was refused last
        self._step = self._probed = 0.0
        self._patience = 1.0

    def begin(self, level: float, refused: float, steps: float, patience: float) -> None:
        """Begin again at `level`: so many `steps` to what was `refused`, `patience` for a good part more."""
        self.level, self.refused = level, refused
        self._step = (refused - level) / steps
        self._probed, self._patience = 0.0, patience

    def grow(self) -> None:
        """One more was accepted at this level."""
        if self.level < self.refused:
            self.level = min(self.refused, self.level + self._step)
        else:
            self._probed += 1 / self._patience
            self.level = self.refused * (1 + _BOLDNESS * self._probed**3) + self._unit * self._probed


class Trials:
    """What came through per second at the rates that were refused, to tell whether a lower rate serves us.

    A rate counts until as high a one is tried again; of rates that are alike the highest stands for all, unless much
    less comes through now than then.
    """

    __slots__ = ("_accepted", "_asking", "_at", "_latest", "_seconds")

    def __init__(self) -> None:
        self._at: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)  # rate, through: from the highest rate down
        self.forget()

    def forget(self) -> None:
        """Begin again."""
        self._at.clear()
        self._latest = math.inf
        self._accepted, self._seconds, self._asking = 0, 0.0, 0.0

    @property
    def highest_rate(self) -> float:
        """The highest rate that counts; 0.0 if none does."""
        return self._at[0][0] if self._at else 0.0

    @property
    def asked(self) -> float:
        """The mean rate of what was added and not yet compared; 0.0 if nothing was."""
        return self._accepted / self._asking if self._accepted else 0.0

    def add(self, rate: float, accepted: int, through: float) -> None:
        """`accepted` between two refusals at `rate`, `through` per second with the pauses."""
        self._accepted += accepted
        self._seconds += accepted / through
        self._asking += accepted / rate

    def compare(self) -> bool:
        """Compare what was added, if it is enough; whether as much came through as at any higher rate."""
        if self._accepted < ENOUGH:
            return False
        rate, through = self._accepted / self._asking, self._accepted / self._seconds
        as_much = bool(self._at) and through >= _AS_MUCH * max(before for _, before in self._at)
        while self._at and self._at[-1][0] <= rate:
            self._at.pop()
        if self._at and self._at[-1][0] <= _ALIKE * rate:
            if through < _MUCH_LESS * self._at[-1][1]:
                self._at[-1] = (rate, through)
        else:
            self._at.append((rate, through))
        self._latest = through
        self._accepted, self._seconds, self._asking = 0, 0.0, 0.0
        return as_much

    def better(self) -> tuple[float, float] | None:
        """The rate at which most came through, and how much, if it is much more than lately."""
        best = max(self._at, key=lambda trial: trial[1], default=None)
        return best if best is not None and self._latest < _MUCH_LESS * best[1] else None


class Spacing:
    """How far apart requests are sent, beside those that are accepted.

    Whatever limit on the rate is near what comes through lately allows one that is sent no sooner after the last than
    is usual. If that one is refused, there was no place for it.
    """

    __slots__ = ("_accepted_at", "_gaps", "_sent_at", "usual")

    def __init__(self, now: float) -> None:
        self.usual = 0.0  # seconds between two that were accepted, about
        self._accepted_at = now
        self._sent_at = -math.inf
        self._gaps = 0.0

    def apart_at(self, gaps: float) -> float:
        """From when the next one is so many usual gaps apart from the last."""
        return self._sent_at + gaps * self.usual

    def sent(self, now: float) -> None:
        """One is sent."""
        self._gaps = (now - self._sent_at + TICK) / self.usual if self.usual else math.inf
        self._sent_at = now

    def accepted(self, now: float) -> None:
        """One is accepted."""
        gap, self._accepted_at = now - self._accepted_at, now
        self.usual += (min(gap, _LONGER * self.usual or gap) - self.usual) * _NEWS

    def was_apart(self, sent_at: float, gaps: float) -> bool:
        """Whether this is the last one, and was sent so many usual gaps apart from the one before."""
        return sent_at == self._sent_at and self._gaps >= gaps


class Together:
    """How many tasks ran together, and that was no obstacle.

    That a task has ended is known a little later. So one that is accepted shortly before the end of another is known
    has not run together with it.
    """

    __slots__ = ("_before", "_count", "_since", "most")

    def __init__(self, now: float) -> None:
        self.most = self._before = 0  # since the last refusal; lately, before it
        self._count, self._since = 0, now

    @property
    def most_lately(self) -> int:
        """The most, also before the last refusal."""
        return max(self.most, self._before)

    def accepted(self, now: float, running: int, shortly: float) -> None:
        """One was accepted, and so many run. shortly: seconds in which the end of another would say that they don't."""
        self.count(now, shortly)
        self._count, self._since = running, now

    def ended(self, now: float, shortly: float) -> None:
        """One has ended."""
        if now - self._since < shortly:
            self._count -= 1

    def count(self, now: float, shortly: float) -> None:
        """Count those that have run together for long enough by now."""
        if now - self._since >= shortly:
            self.most = max(self.most, self._count)

    def begin(self) -> None:
        """Begin again after a refusal."""
        # A rate that is halved refuses often at first, while fewer run each time: what is forgotten at once would let
        # that look like a lack of places.
        self.most, self._before = 0, max(self.most, int(PLACES_KEPT * self._before))
