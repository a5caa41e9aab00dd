"""How long tasks take, learned from looks that only ever tell "not yet" or "over". Pure."""

from __future__ import annotations

import itertools
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

# Ages and durations are counted in units of a scale (the estimated time, say), in bins of about 6 %. The first bin
# begins at 0, the last holds all that is longer.
BINS = 128
_FIRST_EDGE, _LAST_EDGE = 0.02, 30.0
_RATIO = (_LAST_EDGE / _FIRST_EDGE) ** (1 / (BINS - 1))
_EDGES: list[float] = [0.0, *(_FIRST_EDGE * _RATIO**k for k in range(BINS))]
_WIDTHS = [high - low for low, high in itertools.pairwise(_EDGES)]

# What is believed before anything was seen: durations spread around the scale, and a few early failures. It counts as
# much as so many observations, and less as more were seen: half after the second number.
_PRIOR_WEIGHT, _PRIOR_HALVED = 8.0, 50.0
_PRIOR_SPREAD, _PRIOR_FAILURES, _PRIOR_FAIL_BEFORE = 0.6, 0.03, 0.3

_MEMORY = 500.0  # observations that count; older ones fade
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
        self._first_looks: dict[float, float]  # by price: where an early look pays before the first, else infinite
        self._bring_up_to_date()

    def survival(self, age: float) -> float:
        """The share of tasks that take longer than `age`."""
        return _at(self._survival, age)

    def chance(self, low: float, high: float, *, unfinished_at: float) -> float:
        """The chance that a task that is unfinished at one age ends between two later ones."""
        share = self.survival(low) - self.survival(high)
        return max(share, _LEAST_SHARE) / max(self.survival(unfinished_at), _LEAST_SHARE)

    def root_hazard(self, age: float) -> float:
        """The square root of the rate at which tasks of this age end: how dense looks should be there."""
        k = min(bisect_right(_EDGES, age), BINS) - 1
        return (self._effort[k + 1] - self._effort[k]) / _WIDTHS[k]

    def next_look(self, age: float, price: float, step: float = 1.0) -> float:
        """The age at which to look next. age: of the latest look, 0 if there was none; price: delay that a look costs.

        One step on is where the root hazard adds up to sqrt(2 * price), which makes the interval sqrt(2 * price /
        hazard). Where many are expected to end early on the way, the look comes right after those.
        """
        goal = self._after(age, step * math.sqrt(2 * price))
        if age > 0:
            return self._early_look(age, goal, price)
        # The way to the first look is long, and thousands of tasks have the same.
        early = self._first_looks.get(price)
        if early is None:
            early = self._early_look(0.0, goal, price)
            if len(self._first_looks) >= _FIRST_LOOKS:
                self._first_looks.clear()
            self._first_looks[price] = early = early if early < goal else math.inf
        return min(early, goal)

    def _early_look(self, age: float, goal: float, price: float) -> float:
        """Where on the way to `goal` a look pays most, `goal` if it does nowhere."""
        survival, unfinished = self._survival, self.survival(age)
        best, best_gain = goal, 0.0
        for k in range(bisect_right(_EDGES, age), bisect_left(_EDGES, goal)):
            # What a look in between saves those who end before it, less its price for all others.
            gain = (unfinished - survival[k]) * (goal - _EDGES[k]) - price * survival[k]
            if gain > best_gain:
                best, best_gain = _EDGES[k], gain
        return best

    def _after(self, age: float, effort: float) -> float:
        """The age at which the root hazard from `age` on adds up to `effort`."""
        goal = _at(self._effort, age) + effort
        if goal >= self._effort[BINS]:
            return max(age, _LAST_EDGE) * _BEYOND
        k = bisect_left(self._effort, goal) - 1
        if k < 0:
            return age
        return _EDGES[k] + _WIDTHS[k] * (goal - self._effort[k]) / (self._effort[k + 1] - self._effort[k])

    def observe(self, low: float, high: float) -> None:
        """Learn that a task was unfinished at age `low` and over at age `high`."""
        survival = self._survival
        first, low_part = _place(low)
        last, high_part = _place(high)
        unfinished, left = _value(survival, first, low_part), _value(survival, last, high_part)
        share = unfinished - left
        if share > _NO_NEWS:
            return
        self._note(share, _value(_PRIOR_SURVIVAL, first, low_part) - _value(_PRIOR_SURVIVAL, last, high_part))
        self._unit *= 1 / (1 - 1 / _MEMORY)
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

    def _settle(self) -> None:
        """Put what lies on spans of bins into each of them."""
        learned, survival, weight = self._learned, self._survival, 0.0
        for k, more in enumerate(self._spans):
            weight += more
            learned[k] += max(0.0, weight) * (survival[k] - survival[k + 1])  # sums of floats may end below zero
        self._spans = [0.0] * BINS

    def _note(self, share: float, prior_share: float) -> None:
        gain = math.log(max(share, _TINY) / max(prior_share, _TINY))
        self._score += _SCORE_RATE * (max(-_SCORE_BOUND, min(_SCORE_BOUND, gain)) - self._score)

    def _forget(self) -> None:
        self._unit /= _KEPT
        self._believed *= _KEPT
        self._score = 0.0
        self._rebuild()

    def _rebuild(self) -> None:
        self._settle()
        unit = self._unit
        self._learned = array("d", [mass / unit for mass in self._learned])
        self._unit = 1.0
        self._fresh = 0.0
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        """What is believed, from what was learned."""
        weight = _PRIOR_WEIGHT / (1 + self._believed / _PRIOR_HALVED)
        belief = [weight * prior + mass for prior, mass in zip(_PRIOR, self._learned, strict=True)]
        for _ in range(next(passes for below, passes in _SMOOTHING if self._believed < below)):
            belief = _smoothed(belief)
        self._survival = array("d", _survival(belief))
        self._effort = array("d", _efforts(self._survival))
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


def _place(age: float) -> tuple[int, float]:
    """The bin of an age, and how far into it."""
    k = bisect_right(_EDGES, age) - 1
    return (k, (age - _EDGES[k]) / _WIDTHS[k]) if k < BINS else (BINS - 1, 1.0)


def _value(values: Sequence[float], k: int, part: float) -> float:
    """Between the edges, on a straight line."""
    return values[k] + (values[k + 1] - values[k]) * part


def _at(values: Sequence[float], age: float) -> float:
    return _value(values, *_place(age))


def _smoothed(masses: list[float]) -> list[float]:
    """Half of each goes to its neighbours."""
    padded = [0.0, *masses, 0.0]
    return [(left + 2 * mass + right) / 4 for left, mass, right in zip(padded, masses, padded[2:], strict=False)]


def _survival(masses: list[float]) -> list[float]:
    total = sum(masses)
    left = 1.0
    survival = [left]
    for mass in masses:
        left = max(0.0, left - mass / total)
        survival.append(left)
    return survival


def _efforts(survival: Sequence[float]) -> list[float]:
    """The root hazard, added up from age 0 to every edge."""
    effort = 0.0
    efforts = [effort]
    for k, width in enumerate(_WIDTHS):
        before, after = survival[k], survival[k + 1]
        hazard = (before - after) / width / max((before + after) / 2, _TINY)
        effort += math.sqrt(hazard) * width
        efforts.append(effort)
    return efforts


def _prior() -> list[float]:
    def share_before(age: float) -> float:
        if age == 0:
            return 0.0
        usual = 0.5 * math.erfc(-math.log(age) / _PRIOR_SPREAD / math.sqrt(2))
        return (1 - _PRIOR_FAILURES) * usual + _PRIOR_FAILURES * min(1.0, age / _PRIOR_FAIL_BEFORE)

    shares = [share_before(edge) for edge in _EDGES]
    return [after - before for before, after in itertools.pairwise(shares)]


_PRIOR = _prior()
_PRIOR_SURVIVAL = _survival(_PRIOR)
