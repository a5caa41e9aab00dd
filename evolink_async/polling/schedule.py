"""When to look at a task next. Pure: what was seen of tasks in, times of looks out.

The best interval between two looks is sqrt(2 * price / hazard) (Keller 1974): hazard is the rate at which tasks of that
age end, price what a look costs in seconds of delay. The hazard is learned for each class of tasks.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from evolink_async.polling.law import BINS, DurationLaw, chance
from evolink_async.polling.progress import GAIN_BOUND, TENTHS, ProgressLaws, Tenth, predicted_duration, tenth_of

SHORTEST = 1.0  # seconds between two looks at one task; each look makes the service ask its provider (vendor's client)
LONGEST = 300.0
LONGEST_ESTIMATE = 3600.0
PRICE = 0.3  # at an estimate of 100 s and little spread: about ten looks, and less than 3 s of delay

# Where the service never gave an estimate: the vendor's own fallbacks, in seconds.
USUAL = {"image": 30.0, "audio": 90.0, "video": 180.0}
USUAL_OF_ANY = 60.0

_EARLIEST = 1 / 3  # of the gap before a look: so much it gives up to share a request
_HARDLY_ANY = 0.05
_DEAREST = 0.25  # of the expected duration: no budget is so small that a task is as good as forgotten

_MOST_MODELS, _MOST_SIZES, _MOST_EXPECTATIONS, _LONGEST_NAME = 128, 16, 64, 256
_ABSURD = 1e15
_INHERITED = 30.0  # observations that a new size takes over from its model
_VERSION = 1
_MOST_OBSERVED = 1e4  # in a bin

_K = TypeVar("_K")
_V = TypeVar("_V")


def may_be_early(seconds: float, gap: float) -> bool:
    """Whether a look may come so much too early for a request that is sent now anyway. gap: since the look before.

    Few outstanding tasks fill a request that way, and hardly look more often; many fill it with what is due. So two
    looks at one task may be two thirds of `SHORTEST` apart.
    """
    return seconds <= _EARLIEST * gap


def shared_moment(moment: float, now: float) -> float:
    """About that moment, and the same for many tasks: later by at most a 128th of the way there, or of a second.

    Never earlier, as a pause stands; but what is due by now is due.
    """
    if moment <= now:
        return math.floor(128 * moment) / 128
    step = math.ldexp(1.0, max(math.frexp(moment - now)[1], 1) - 8)
    return math.ceil(moment / step) * step


class TaskClass(NamedTuple):
    """Tasks that take alike. size: about what one costs, or else how long its video is."""

    kind: str | None
    model: str | None
    size: str | None = None


@lru_cache(maxsize=1024)
def class_of(kind: str | None, model: str | None, credits_reserved: float | None, seconds: float | None) -> TaskClass:
    """The class of a task as created: its price stands for all that makes it longer. seconds: of the video.

    Sizes are half octaves, so that a longer prompt makes no other class. Polls usually tell neither of the two.
    """
    size = None
    for amount, unit in ((credits_reserved, "credits"), (seconds, "s")):
        if amount is not None and 0 < amount < _ABSURD:
            size = f"{2 ** (round(2 * math.log2(amount)) / 2):.3g} {unit}"
            break
    return TaskClass(kind and kind[:_LONGEST_NAME], model and model[:_LONGEST_NAME], size)


@dataclass(slots=True)
class _Model:
    """What was learned about one model: its latest estimate, a law for each size, and its progress."""

    estimate: float | None = None
    laws: OrderedDict[str | None, DurationLaw] = field(default_factory=OrderedDict)
    progress: ProgressLaws = field(default_factory=ProgressLaws)
    expectations: OrderedDict[tuple[str | None, float], Expectation] = field(default_factory=OrderedDict)

    def law(self, size: str | None) -> DurationLaw:
        """The law of this size; a new size starts from what the model has shown lately."""
        law = self.laws.get(size)
        if law is None:
            latest = next(reversed(self.laws.values()), None)
            law = DurationLaw() if latest is None else latest.heir(_INHERITED)
        _remember(self.laws, size, law, _MOST_SIZES)
        return law


class Schedule:
    """Learns when tasks end, and so when to look. Memory is bounded: models and sizes not seen lately are forgotten.

    price: what a look costs, in seconds of delay; may be set at any time. Four times the price: half the looks, twice
    the delay.
    """

    def __init__(self, price: float = PRICE) -> None:
        self.price = price
        self._models: OrderedDict[tuple[str | None, str | None], _Model] = OrderedDict()
        self.latest: Expectation | None = None  # expectation, that is still what such tasks go by

    @property
    def price(self) -> float:
        """What a look costs, in seconds of delay. Raises `ValueError` if set to what is not positive and finite."""
        return self._price

    @price.setter
    def price(self, price: float) -> None:
        if not 0 < price < math.inf:
            raise ValueError(f"price must be positive and finite, got {price!r}")
        self._price = price

    def expect(self, task_class: TaskClass, estimate: float | None) -> Expectation:
        """What to expect of such tasks. estimate: seconds; without a plausible one the latest of their model."""
        kind, name, size = task_class
        model = self._models.get((kind, name)) or _Model()
        _remember(self._models, (kind, name), model, _MOST_MODELS)
        if estimate is not None and estimate > 0:
            model.estimate = estimate = max(1.0, min(estimate, LONGEST_ESTIMATE))
        else:
            estimate = model.estimate or USUAL.get(kind or "", USUAL_OF_ANY)
        law = model.law(size)
        expectation = model.expectations.get((size, estimate))
        if expectation is None or expectation.law is not law:
            expectation = Expectation(self, law, model.progress, estimate)
        _remember(model.expectations, (size, estimate), expectation, _MOST_EXPECTATIONS)
        self.latest = expectation
        return expectation

    @property
    def has_learned(self) -> bool:
        """Whether there is anything to export."""
        return bool(self._models)

    def export(self) -> dict[str, Any]:
        """What was learned, as plain JSON values for `restore`."""
        return {
            "version": _VERSION,
            "models": [
                {
                    "kind": kind,
                    "model": name,
                    "estimate": model.estimate,
                    "laws": [{"size": size, "observed": law.export()} for size, law in model.laws.items()],
                    "progress": [
                        {"tenth": number, "gain": tenth.gain, "observed": tenth.law.export()}
                        for number, tenth in model.progress.tenths.items()
                    ],
                }
                for (kind, name), model in self._models.items()
            ],
        }

    def restore(self, exported: object) -> None:
        """Take over what another schedule exported; of a model that both know, the export's.

        Raises `ValueError` for anything that is not such an export; then nothing is taken over.
        """
        try:
            models = _read_models(exported)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not an export of a polling schedule, start without it: {error!r:.200}") from None
        for key, model in models.items():
            _remember(self._models, key, model, _MOST_MODELS)
        self.latest = None


class Sightings:
    """What was seen of one task. Times are those of one clock, whichever it is.

    They are moments and not ages: so all who are submitted or looked at together may share one number.
    """

    __slots__ = ("looked_at", "readings", "shown", "shown_at", "started")

    def __init__(self, started: float) -> None:
        self.started = started  # when it was submitted
        self.looked_at = started  # the latest look; `started`: there was none
        self.shown = 0  # the latest progress, 0 if it told nothing, and when it first showed
        self.shown_at = started
        self.readings: array[float] | None = None  # progress, age, of what showed before: the first at each tenth

    def unfinished(self, asked_at: float, progress: int = 0) -> None:
        """A look, asked for then, was answered: not over yet. progress: percent, 0 tells nothing."""
        if not asked_at > self.looked_at:
            return
        self.looked_at = asked_at
        if progress != self.shown:
            if self.shown:
                self.keep_reading()
            self.shown, self.shown_at = progress, asked_at

    def keep_reading(self) -> None:
        """Remember what is shown, to learn from it in the end."""
        age, readings = self.shown_at - self.started, self.readings
        if readings is None:  # small, as there may be many: a millisecond is near enough
            self.readings = array("f", (self.shown, age))
        elif len(readings) < 2 * TENTHS and tenth_of(readings[-2]) != tenth_of(self.shown):
            readings.extend((self.shown, age))


class Expectation:
    """What is expected of the tasks of one class and estimate: one for all of them, as there may be many at once."""

    __slots__ = ("_progress", "_schedule", "estimate", "law")

    def __init__(self, schedule: Schedule, law: DurationLaw, progress: ProgressLaws, estimate: float) -> None:
        self._schedule = schedule
        self.law = law
        self._progress = progress
        self.estimate = estimate

    def next_look(self, task: Sightings, random: float) -> float:
        """When to look next, counted from the latest look; may be over for a task never looked at.

        random: uniform in [0, 1), spreads the first looks at tasks of the same age.
        """
        law, scale = self._deciding(task) if task.shown else (self.law, self.estimate)
        started, looked_at = task.started, task.looked_at
        price = min(self._schedule._price / scale, _DEAREST)
        age = looked_at - started
        age = law.next_look(age / scale, price) if age > 0 else law.first_look(price, random)
        return min(max(started + scale * age, looked_at + SHORTEST), looked_at + LONGEST)

    def should_be_over(self, task: Sightings) -> bool:
        """Whether hardly any task was still running at the age of its latest look."""
        return self.law.survival((task.looked_at - task.started) / self.estimate) < _HARDLY_ANY

    def urgency(self, task: Sightings, now: float) -> float:
        """How densely looks at it are worth their price now, for `price_for`."""
        law, scale = self._deciding(task)
        return law.root_hazard(max(0.0, now - task.started) / scale) / math.sqrt(scale)

    def _deciding(self, task: Sightings) -> tuple[DurationLaw, float]:
        """The law that decides now, and its unit."""
        if task.shown:
            law = self._progress.trusted(task.shown)
            if law is not None:
                return law, predicted_duration(task.shown, task.shown_at - task.started)
        return self.law, self.estimate

    def over(self, task: Sightings, heard_at: float) -> None:
        """The answer that the task is over, however it ended, came then: learn from it, once."""
        started, estimate, law = task.started, self.estimate, self.law
        low = max(0.0, task.looked_at - started)
        high = max(heard_at - started, low)
        if not task.shown and task.readings is None:
            law.observe(low / estimate, high / estimate)
            return
        if task.shown:
            task.keep_reading()
        numbers = iter(task.readings or ())
        readings = [(progress, at, law.survival(at / estimate)) for progress, at in zip(numbers, numbers, strict=True)]
        share = law.observe(low / estimate, high / estimate)
        for progress, shown_at, unfinished in readings:
            self._progress.learn(progress, shown_at, low, high, chance(share, unfinished))


def _remember(memory: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> None:
    """As the latest; what is too much goes, the oldest first."""
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > most:
        memory.popitem(last=False)


# Reading an export: whatever doesn't fit raises ValueError, TypeError, KeyError or AttributeError.


def _read_models(exported: Any) -> dict[tuple[str | None, str | None], _Model]:
    if exported["version"] != _VERSION:
        raise ValueError(f"version {exported['version']!r}, expected {_VERSION}")
    return {(_name(row["kind"]), _name(row["model"])): _read_model(row) for row in exported["models"]}


def _read_model(row: Mapping[str, Any]) -> _Model:
    model = _Model(None if row["estimate"] is None else _number(row["estimate"], 1.0, LONGEST_ESTIMATE))
    for entry in row["laws"]:
        _remember(model.laws, _name(entry["size"]), _read_law(entry), _MOST_SIZES)
    for entry in row["progress"]:
        number = int(_number(entry["tenth"], 0, TENTHS - 1))
        model.progress.tenths[number] = Tenth(_read_law(entry), _number(entry["gain"], -GAIN_BOUND, GAIN_BOUND))
    return model


def _read_law(entry: Mapping[str, Any]) -> DurationLaw:
    observed = [_number(value, 0.0, _MOST_OBSERVED) for value in entry["observed"]]
    if len(observed) != BINS:
        raise ValueError(f"{len(observed)} bins, expected {BINS}")
    return DurationLaw(observed)


def _name(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME):
        return value
    raise ValueError(f"expected a name or null, got {value!r:.100}")


def _number(value: Any, least: float, most: float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return float(value)
    raise ValueError(f"expected a number from {least:g} to {most:g}, got {value!r:.100}")
