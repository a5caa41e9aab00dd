"""Plots as shapes to be drawn: where lines, bars and ticks lie in a picture of fixed size. Pure.

A picture is `WIDTH` wide; its plot lies between `LEFT` and `RIGHT`, `TOP` and `BOTTOM`. y grows downwards, as in SVG.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from statistics import quantiles

from evolink_async.durations import duration
from evolink_async.report.items import ModelSums, Sample
from evolink_async.report.text import amount

WIDTH, HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 44.0, 508.0, 14.0, 192.0
_POINTS = 240  # of a line: more can't be seen
_MODELS = 7
_ROW = 32.0  # height of a model's bar with its name
_LONGEST_NAME = 38
_IDLE_SECONDS = 1800.0  # a longer pause that is a quarter of all is cut out
_BINS = 24
_TIME_STEPS = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200),
    *(day * 86400 for day in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)),
)


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: its place and its word."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line, and how it is drawn: its CSS class and its name in the legend. latest: what it comes to, in words."""

    name: str
    style: str
    path: str
    latest: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle, and what it means in words."""

    x: float
    y: float
    width: float
    height: float
    style: str
    about: str


@dataclass(frozen=True, slots=True)
class Label:
    """Text beside a bar; `whole` where it had to be cut."""

    x: float
    y: float
    text: str
    whole: str
    at_end: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A plot. caption: what it says, for everybody; about: for those who can't see it. empty: why there is nothing."""

    title: str
    caption: str = ""
    about: str = ""
    empty: str = ""
    height: float = HEIGHT
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    labels: tuple[Label, ...] = ()
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()
    cuts: tuple[float, ...] = ()


class TimeAxis:
    """Moments (unix seconds) along the width of a plot. Long pauses, between two runs of a job, are cut out."""

    def __init__(self, moments: Iterable[float]) -> None:
        times = sorted(moments)
        self._start, self._end = (times[0], times[-1]) if times else (0.0, 0.0)
        least = max(_IDLE_SECONDS, (self._end - self._start) / 4)
        pairs = itertools.pairwise(times)
        self._cuts = [(early, late) for early, late in pairs if late - early > least]
        self._length = self._busy(self._end)
        if not self._length:
            self._cuts, self._length = [], (self._end - self._start) or 1.0

    def _busy(self, moment: float) -> float:
        """Seconds from the start, without what is cut out."""
        idle = sum(min(moment, late) - early for early, late in self._cuts if moment > early)
        return moment - self._start - idle

    def x(self, moment: float) -> float:
        """Its place."""
        return LEFT + (RIGHT - LEFT) * min(max(self._busy(moment) / self._length, 0.0), 1.0)

    @property
    def cuts(self) -> tuple[float, ...]:
        """Where something is cut out."""
        return tuple(round(self.x(early), 1) for early, _ in self._cuts)

    def ticks(self) -> tuple[Tick, ...]:
        """Round moments, in UTC."""
        step = next((step for step in _TIME_STEPS if self._length / step <= 5), _TIME_STEPS[-1])
        shape = "%d %b" if step >= 86400 else "%H:%M:%S" if step < 60 else "%H:%M"
        width = 60
        if self._cuts and step < 86400:  # the same hour may come again
            shape, width = f"%d %b {shape}", 105
        stretches = zip(
            [self._start, *(late for _, late in self._cuts)],
            [*(early for early, _ in self._cuts), self._end],
            strict=True,
        )
        ticks: list[Tick] = []
        for start, end in stretches:
            for number in range(math.ceil(start / step), min(math.floor(end / step), math.ceil(start / step) + 10) + 1):
                moment = datetime.fromtimestamp(number * step, UTC)
                x = round(self.x(number * step), 1)
                if LEFT + width / 4 <= x <= RIGHT - width / 4 and (not ticks or x - ticks[-1].at >= width):
                    ticks.append(Tick(x, moment.strftime(shape)))
        return tuple(ticks)


def value_ticks(most: float, *, whole: bool = False) -> tuple[float, list[float]]:
    """The end of an axis from 0 that has room for `most`, and at most six round values on it."""
    if most <= 0:
        return 1.0, [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if most / (power * factor) <= 5)
    step = max(step, 1.0) if whole else step
    count = math.ceil(most / step - 1e-9)
    return count * step, [number * step for number in range(count + 1)]


def completion(
    submitted: Iterable[float], completed: Iterable[float], in_vain: Iterable[float], axis: TimeAxis
) -> Chart:
    """How many were submitted, completed, and ended otherwise, up to each moment."""
    title = "Completion over time"
    counted = [("submitted", "sent", submitted), ("completed", "good", completed), ("ended otherwise", "bad", in_vain)]
    sorted_ones = [(name, style, sorted(times)) for name, style, times in counted]
    most = max(len(times) for _, _, times in sorted_ones)
    if not most:
        return Chart(title=title, empty="Nothing was submitted, or when is not known.")
    top, values = value_ticks(most, whole=True)
    lines = [
        Line(name, style, _stairs(times, axis, top), f"{len(times):,}") for name, style, times in sorted_ones if times
    ]
    return Chart(
        title=title,
        caption="Requests, by the time (UTC) at which their end was known here.",
        about=", ".join(f"{line.latest} {line.name}" for line in lines),
        lines=tuple(lines),
        x_ticks=axis.ticks(),
        y_ticks=_y_ticks(values, top),
        cuts=axis.cuts,
    )


def _stairs(times: Sequence[float], axis: TimeAxis, top: float) -> str:
    """A line that goes up by one at each of the times, thinned out where it has too many steps."""
    path = [f"M{axis.x(times[0]):.1f} {_y(0, top):.1f}"]
    stride = max(1, math.ceil(len(times) / _POINTS))
    for count in [*range(stride, len(times), stride), len(times)]:
        path.append(f"H{axis.x(times[count - 1]):.1f}V{_y(count, top):.1f}")
    return "".join(path) + f"H{RIGHT:g}"


def delays(seconds: Sequence[float], took: Sequence[float], *, whole_seconds: bool) -> Chart:
    """How late the end of a task was known; where the service doesn't tell when a task ended, how long it took."""
    if seconds:
        share = "" if len(seconds) == len(took) else f" of {len(seconds):,} of {len(took):,} tasks"
        exact = " It tells whole seconds, so each is off by up to one." if whole_seconds else ""
        caption = (
            f"{_quantiles(seconds)}{share}: from submission to known end, less the seconds that the service says the "
            f"task took. The way of the POST is in it.{exact}"
        )
        return _histogram("Detection delay", caption, [max(0.0, value) for value in seconds])
    if not took:
        return Chart(title="Detection delay", empty="No task has ended, or when is not known.")
    caption = (
        f"{_quantiles(took)}, from submission to known end. The service did not say how long its tasks took, so how "
        "late their ends were known can't be told."
    )
    return _histogram("Time to the result", caption, took)


def _quantiles(seconds: Sequence[float]) -> str:
    if len(seconds) == 1:
        return duration(seconds[0])
    cuts = quantiles(seconds, n=20, method="inclusive")
    return f"Half within {duration(max(0.0, cuts[9]))}, 95 % within {duration(max(0.0, cuts[18]))}"


def _histogram(title: str, caption: str, seconds: Sequence[float]) -> Chart:
    """How many lie in each of equal spans of time; what is far beyond the usual is in the last one."""
    usual = quantiles(seconds, n=100, method="inclusive")[97] if len(seconds) > 1 else seconds[0]
    end, values = value_ticks(usual * 1.02 or 1.0)
    width = end / _BINS
    bins = [0] * _BINS
    for value in seconds:
        bins[min(int(value / width), _BINS - 1)] += 1
    top, counts = value_ticks(max(bins), whole=True)
    step = (RIGHT - LEFT) / _BINS
    beyond = max(seconds) > end

    def span(number: int) -> str:
        if number == _BINS - 1 and beyond:
            return f"over {duration(number * width)}"
        return f"{duration(number * width)} to {duration((number + 1) * width)}"

    bars = tuple(
        Bar(
            round(LEFT + number * step + 0.5, 1),
            round(_y(count, top), 1),
            round(step - 1, 1),
            round(BOTTOM - _y(count, top), 1),
            "busy",
            f"{count:,}: {span(number)}",
        )
        for number, count in enumerate(bins)
        if count
    )
    words = [f"{value:g} s" + ("+" if beyond and value == values[-1] else "") for value in values]
    places = [round(LEFT + (RIGHT - LEFT) * value / end, 1) for value in values]
    return Chart(
        title=title,
        caption=caption,
        about=caption,
        bars=bars,
        x_ticks=tuple(map(Tick, places, words)),
        y_ticks=_y_ticks(counts, top),
    )


def cost_by_model(models: Mapping[str, ModelSums]) -> Chart:
    """A bar for each model: what was spent and what is held."""
    title = "Cost by model"
    costs = sorted(models.items(), key=lambda item: (-(item[1].spent + item[1].reserved), item[0]))
    paid = [(name or "model not known", sums) for name, sums in costs if sums.spent or sums.reserved]
    if not paid:
        return Chart(title=title, empty="Nothing was charged, or what is not known.")
    if len(paid) > _MODELS:
        rest = [sums for _, sums in paid[_MODELS - 1 :]]
        paid = [*paid[: _MODELS - 1], (f"{len(rest)} other models", _sum_of(rest))]
    most = max(sums.spent + sums.reserved for _, sums in paid)
    bars: list[Bar] = []
    labels: list[Label] = []
    for number, (name, sums) in enumerate(paid):
        y, x = TOP + number * _ROW, 0.0
        labels.append(Label(0, y, name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…", name))
        told = _cost_words(sums)
        labels.append(Label(WIDTH, y, told, told, at_end=True))
        for credits, style, word in ((sums.spent, "good", "spent"), (sums.reserved, "held", "reserved")):
            width = round(float(credits / most) * WIDTH, 1)
            if credits:
                bars.append(Bar(x, y + 6, max(width, 1.5), 9, style, f"{name}: {amount(credits)} credits {word}"))
            x += width
    return Chart(
        title=title,
        caption="Credits, over all tries of a request.",
        about="; ".join(f"{name}: {_cost_words(sums)}" for name, sums in paid),
        height=TOP + len(paid) * _ROW,
        bars=tuple(bars),
        labels=tuple(labels),
    )


def _cost_words(sums: ModelSums) -> str:
    held = f" + {amount(sums.reserved)} reserved" if sums.reserved else ""
    noun = "request" if sums.requests == 1 else "requests"
    return f"{sums.requests:,} {noun} · {amount(sums.spent)}{held}"


def _sum_of(several: Iterable[ModelSums]) -> ModelSums:
    whole = ModelSums(0, Decimal(0), Decimal(0))
    for sums in several:
        whole.requests += sums.requests
        whole.spent += sums.spent
        whole.reserved += sums.reserved
    return whole


def pace(runs: Sequence[Sequence[Sample]], axis: TimeAxis) -> Chart:
    """POSTs a second, those refused with 429, and the rate that was allowed."""
    title = "Rate and 429s"
    spans = [span for run in runs for span in _spans(run)]
    if not spans:
        return Chart(title=title, empty="No record of the pace (progress.jsonl, which `run` writes) is here.")
    allowed = [rate for run in runs for rate in _typical_rates(run)]
    most = max([*(posts for _, _, posts, _ in spans), *allowed])
    top, values = value_ticks(most)
    bars = tuple(
        Bar(
            round(axis.x(start), 1),
            round(_y(refused, top), 1),
            max(round(axis.x(end) - axis.x(start), 1), 1.0),
            round(BOTTOM - _y(refused, top), 1),
            "warn",
            f"{refused:.2g} × 429 a second",
        )
        for start, end, _, refused in spans
        if refused
    )
    posted = "".join(
        f"{'M' if not number or spans[number - 1][1] < start else 'L'}{axis.x(start):.1f} {_y(posts, top):.1f}"
        f"H{axis.x(end):.1f}"
        for number, (start, end, posts, _) in enumerate(spans)
    )
    refused = sum(run[-1].refused for run in runs)
    lines = [Line("POSTs", "busy", posted, f"{sum(run[-1].posts for run in runs):,}")]
    if allowed:
        lines.append(Line("allowed", "sent", "".join(_rate_path(run, axis, top) for run in runs)))
    if refused:
        lines.append(Line("429", "warn", "", f"{refused:,}"))
    return Chart(
        title=title,
        caption="Per second, as the run recorded it. A POST that is refused (429) is free, and was sent again.",
        about=f"{lines[0].latest} POSTs, {refused:,} of them refused for pace",
        lines=tuple(lines),
        bars=bars,
        x_ticks=axis.ticks(),
        y_ticks=_y_ticks(values, top),
        cuts=axis.cuts,
    )


def _spans(run: Sequence[Sample]) -> list[tuple[float, float, float, float]]:
    """Start, end, POSTs and 429s a second between samples, thinned out to what can be seen."""
    first = run[0]
    start = Sample(first.at - first.elapsed, 0.0, 0, 0, first.rate)
    whole = [start, *run] if first.elapsed > 0 else list(run)
    stride = max(1, math.ceil(len(whole) / _POINTS))
    chosen = [*whole[:-1:stride], whole[-1]]
    spans = []
    for early, late in itertools.pairwise(chosen):
        seconds = late.elapsed - early.elapsed
        if seconds > 0:
            posts, refused = late.posts - early.posts, late.refused - early.refused
            spans.append((early.at, late.at, max(posts, 0) / seconds, max(refused, 0) / seconds))
    return spans


def _typical_rates(run: Sequence[Sample]) -> list[float]:
    return [sample.rate for sample in run if sample.rate is not None]


def _rate_path(run: Sequence[Sample], axis: TimeAxis, top: float) -> str:
    stride = max(1, math.ceil(len(run) / _POINTS))
    known = [sample for sample in [*run[:-1:stride], run[-1]] if sample.rate is not None]
    return "".join(
        f"{'L' if number else 'M'}{axis.x(sample.at):.1f} {_y(sample.rate or 0, top):.1f}"
        for number, sample in enumerate(known)
    )


def _y(value: float, top: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * min(value / top, 1.0)


def _y_ticks(values: Iterable[float], top: float) -> tuple[Tick, ...]:
    return tuple(Tick(round(_y(value, top), 1), f"{value:,g}" if value < 1e5 else f"{value:,.0f}") for value in values)
