"""How long tasks take, learned from looks that only ever tell "not yet" or "over". Pure."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

# Ages and durations are counted in units of a scale (the estimated time, say), in bins of about 6 %. The first bin
# begins at 0, the last holds all that is longer.
BINS = 128
_FIRST_EDGE, _LAST_EDGE = 0.02, 30.0
_RATIO = (_LAST_EDGE / _FIRST_EDGE) ** (1 / (BINS - 1))
_EDGES: list[float] = [0.0, *(_FIRST_EDGE * _RATIO**k for k in range(BINS))]
_WIDTHS = [high - low for low, high in pairwise(_EDGES)]
_DOUBLE_WIDTHS = [2 * width for width in _WIDTHS]

# What is believed before anything was seen: durations spread around the scale, and a few early failures. It counts as
# much as so many observations, and less as more were seen: half after the second number.
_PRIOR_WEIGHT, _PRIOR_HALVED = 8.0, 50.0
_PRIOR_SPREAD, _PRIOR_FAILURES, _PRIOR_FAIL_BEFORE = 0.6, 0.03, 0.3

_MEMORY = 500.0  # observations that count; older ones fade
_GROWTH = 1 / (1 - 1 / _MEMORY)  # what each counts more than the one before
# Where few were seen they are spread further. Passes of smoothing below so many observations that count.
_SMOOTHING = ((30.0, 32), (120.0, 8), (math.inf, 1))
_REBUILD_SHARE = 1 / 8  # of what was seen, newly seen, and the law is brought up to date

# The world has changed when what was learned predicts worse than knowing nothing: half of it is forgotten then.
_SCORE_RATE, _SCORE_BOUND, _SCORE_LEAST, _KEPT = 1 / 16, 4.0, -0.25, 0.5

_BEYOND = 1.15  # where no law reaches, the gaps grow with the age
_TINY = 1e-12
_UNBELIEVED = 1e-6  # of the tasks end there: what is believed says nothing about where among them
_NO_NEWS = 0.99  # of the tasks end there anyway
_LEAST_SHARE = 1e-4  # nothing is quite impossible
# The first look comes after so much of a step; the random rest keeps tasks apart that were submitted together.
_SOONEST, _LATEST = 0.7, 0.8
_FIRST_LOOKS = 64  # prices of which the first look is remembered


class DurationLaw:
    """The law of durations in units of a scale. Learns each observation in time that doesn't grow with their number."""

    __slots__ = ("_believed", "_effort", "_first_looks", "_fresh", "_learned", "_score", "_spans", "_survival", "_unit")

    def __init__(self, learned: Iterable[float] = (0.0,) * BINS) -> None:
        self._learned = array("d", learned)  # observations by bin, in _unit; what `_spans` holds comes on top
        self._spans = [0.0] * BINS  # by bin, how much more weight lies on it than on the one before
        self._unit = 1.0  # grows, instead of everything learned fading
        self._believed = sum(self._learned)  # observations that count
        self._fresh = 0.0
        self._score = 0.0  # how much better than the prior it predicted lately, in nats
        self._survival: array[float]  # at the edges
        self._effort: array[float]  # the root hazard, added up to the edges
        self._first_looks: dict[float, tuple[float, float]]  # by price: the soonest and the latest
        self._bring_up_to_date()

    def survival(self, age: float) -> float:
        """The share of tasks that take longer than `age`."""
        return _at(self._survival, age)

    def root_hazard(self, age: float) -> float:
        """The square root of the rate at which tasks of this age end: how dense looks should be there."""
        k = min(bisect_right(_EDGES, age), BINS) - 1
        return (self._effort[k + 1] - self._effort[k]) / _WIDTHS[k]

    def first_look(self, price: float, random: float) -> float:
        """The age at which to look first. random: uniform in [0, 1).

        Thousands of tasks ask for the same, and the way there is long: its ends are remembered until more is learned.
        """
        ends = self._first_looks.get(price)
        if ends is None:
            if len(self._first_looks) >= _FIRST_LOOKS:
                self._first_looks.clear()
            ends = self.next_look(0.0, price, _SOONEST), self.next_look(0.0, price, _LATEST)
            self._first_looks[price] = ends
        soonest, latest = ends
        return soonest + (latest - soonest) * random

    def next_look(self, age: float, price: float, step: float = 1.0) -> float:
        """The age at which to look next. age: of the latest look, 0 if there was none; price: delay that a look costs.

        One step on is where the root hazard adds up to sqrt(2 * price), which makes the interval sqrt(2 * price /
        hazard). Where many are expected to end early on the way, the look comes right after those.
        """
        place = _place(age)
        return self._early_look(place, self._after(age, place, step * math.sqrt(2 * price)), price)

    def _early_look(self, place: tuple[int, float], goal: float, price: float) -> float:
        """Where on the way from that place to `goal` a look pays most, `goal` if it does nowhere."""
        unfinished = _value(self._survival, *place)
        way = slice(place[0] + 1, bisect_left(_EDGES, goal))
        best, best_gain = goal, 0.0
        for edge, left in zip(_EDGES[way], self._survival[way], strict=True):
            # What a look in between saves those who end before it, less its price for all others.
            gain = (unfinished - left) * (goal - edge) - price * left
            if gain > best_gain:
                best, best_gain = edge, gain
        return best

    def _after(self, age: float, place: tuple[int, float], effort: float) -> float:
        """The age at which the root hazard from `age` on adds up to `effort`. place: of that age."""
        goal = _value(self._effort, *place) + effort
        if goal >= self._effort[BINS]:
            return max(age, _LAST_EDGE) * _BEYOND
        k = bisect_left(self._effort, goal) - 1
        return _value(_EDGES, k, (goal - self._effort[k]) / (self._effort[k + 1] - self._effort[k]))

    def observe(self, low: float, high: float) -> float:
        """Learn that a task was unfinished at age `low` and over at age `high`.

        Returns the share of all tasks that were believed to end there.
        """
        first, low_part = _place(low)
        last, high_part = _place(high)
        unfinished, left = _values(self._survival, first, low_part, last, high_part)
        share = unfinished - left
        if share > _NO_NEWS:
            return share
        before, after = _values(_PRIOR_SURVIVAL, first, low_part, last, high_part)
        gain = math.log(max(share, _TINY) / max(before - after, _TINY))
        if not -_SCORE_BOUND < gain < _SCORE_BOUND:
            gain = math.copysign(_SCORE_BOUND, gain)
        self._score += _SCORE_RATE * (gain - self._score)
        self._unit *= _GROWTH
        self._believed += 1 - self._believed / _MEMORY
        self._fresh += 1
        if first == last or share < _UNBELIEVED:
            self._learned[last] += self._unit
        else:
            self._spread(first, last, unfinished, left, self._unit / share)
        if self._score < _SCORE_LEAST:
            self._forget()
        elif self._fresh > _REBUILD_SHARE * self._believed:
            self._rebuild()
        return share

    def _spread(self, first: int, last: int, unfinished: float, left: float, weight: float) -> None:
        """One observation over the bins that it may belong to, as far as each is believed.

        Those between the first and the last get all that each is believed to hold, times the weight. What is believed
        stays as it is until `_settle`, so until then it is enough to know where the weight begins and where it ends.
        """
        learned, survival = self._learned, self._survival
        learned[first] += weight * (unfinished - survival[first + 1])
        learned[last] += weight * (survival[last] - left)
        self._spans[first + 1] += weight
        self._spans[last] -= weight

    def _settle(self, unit: float = 1.0) -> None:
        """Put what lies on spans of bins into each of them; then all is counted in `unit`."""
        masses, weight, survival = [], 0.0, self._survival
        for mass, more, unfinished, left in zip(self._learned, self._spans, survival, survival[1:], strict=False):
            weight += more
            mass += weight * (unfinished - left)
            masses.append(mass / unit if mass > 0.0 else 0.0)  # sums of floats may end below zero
        self._learned = array("d", masses)
        self._spans = [0.0] * BINS

    def _forget(self) -> None:
        self._unit /= _KEPT
        self._believed *= _KEPT
        self._score = 0.0
        self._rebuild()

    def _rebuild(self) -> None:
        self._settle(self._unit)
        self._unit = 1.0
        self._fresh = 0.0
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        """What is believed, from what was learned."""
        weight = _PRIOR_WEIGHT / (1 + self._believed / _PRIOR_HALVED)
        belief = [weight * prior + mass for prior, mass in zip(_PRIOR, self._learned, strict=True)]
        for _ in range(next(passes for below, passes in _SMOOTHING if self._believed < below)):
            belief = _smoothed(belief)
        left = _added_up_from_the_end(belief)
        whole = left[0]
        self._survival = array("d", [share / whole for share in left])
        # The root hazard of a bin, sqrt(share that ends there / share at risk / width), times its width.
        effort, efforts = 0.0, [0.0]
        for mass, double_width, before, after in zip(belief, _DOUBLE_WIDTHS, left, left[1:], strict=False):
            effort += math.sqrt(mass * double_width / (before + after))
            efforts.append(effort)
        self._effort = array("d", efforts)
        self._first_looks = {}

    def heir(self, observations: float) -> DurationLaw:
        """A new law that starts from what this one has learned, as if from at most so many observations."""
        self._settle()
        kept = min(1.0, observations / self._believed) / self._unit if self._believed else 0.0
        return DurationLaw([mass * kept for mass in self._learned])

    def export(self) -> list[float]:
        """What was learned, for `DurationLaw` again: observations by bin, to four decimals."""
        self._settle()
        return [round(mass / self._unit, 4) for mass in self._learned]


def chance(share: float, unfinished: float) -> float:
    """That a task ends where this share of all tasks does, if it is one of the share that are unfinished."""
    return max(share, _LEAST_SHARE) / max(unfinished, _LEAST_SHARE)


def _place(age: float) -> tuple[int, float]:
    """The bin of an age, and how far into it."""
    k = bisect_right(_EDGES, age) - 1
    return (k, (age - _EDGES[k]) / _WIDTHS[k]) if k < BINS else (BINS - 1, 1.0)


def _value(values: Sequence[float], k: int, part: float) -> float:
    """Between the edges, on a straight line."""
    return values[k] + (values[k + 1] - values[k]) * part


def _values(values: Sequence[float], k: int, part: float, j: int, other: float) -> tuple[float, float]:
    """The same at two places."""
    low, high = values[k], values[j]
    return low + (values[k + 1] - low) * part, high + (values[j + 1] - high) * other


def _at(values: Sequence[float], age: float) -> float:
    return _value(values, *_place(age))


def _smoothed(masses: list[float]) -> list[float]:
    """Each is shared with its neighbours, twice; four times as much in all."""
    smoothed, mass, pair = [], masses[0], masses[0]
    for after in (*masses[1:], 0.0):
        next_pair = mass + after
        smoothed.append(pair + next_pair)
        mass, pair = after, next_pair
    return smoothed


def _added_up_from_the_end(masses: Sequence[float]) -> list[float]:
    """What lies beyond every edge: never quite nothing."""
    left = list(accumulate(reversed(masses), initial=_TINY))
    left.reverse()
    return left


def _prior() -> list[float]:
    def share_before(age: float) -> float:
        if age == 0:
            return 0.0
        usual = 0.5 * math.erfc(-math.log(age) / _PRIOR_SPREAD / math.sqrt(2))
        return (1 - _PRIOR_FAILURES) * usual + _PRIOR_FAILURES * min(1.0, age / _PRIOR_FAIL_BEFORE)

    shares = [share_before(edge) for edge in _EDGES]
    return [after - before for before, after in pairwise(shares)]


_PRIOR = _prior()
_PRIOR_SURVIVAL = _added_up_from_the_end(_PRIOR)
