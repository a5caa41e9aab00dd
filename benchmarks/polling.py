"""How rarely a task can be looked at, and how soon its end is known all the same: simulated, in virtual time.

    python benchmarks/polling.py [--seed 1] [--seeds 3] [--jobs N] [--json] [--plot FILE.png]
    python benchmarks/polling.py --quick

No HTTP and no event loop: durations are drawn, schedules say when to look, and two things are counted, looks per task
and detection delay (from the end of a task to the look that sees it). Every task has an estimate of 100 s; it takes
bias * estimate * exp(spread * N(0, 1)) seconds, but 5 % of the tasks fail early, somewhere in their first 30 s.

Schedules that are compared: ours (learns from nothing but its own looks); the square-root rule for somebody who knows
the law of the durations (oracle); every 5 s, every 10 s, or any other fixed interval; exponential back-off; and
waiting for the estimate before looking at all. Each is run at many prices (intervals, longest pauses), and the delays
are compared where the looks per task are equal, interpolated between the runs. Equal seeds, equal tasks.

Exit status 1 if a claim that this program checks doesn't hold. --quick checks that it runs, not the claims.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
import tracemalloc
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from machine import machine

from evolink_async.polling.law import DurationLaw
from evolink_async.polling.price import price_for
from evolink_async.polling.schedule import PRICE, SHORTEST, Schedule, Sightings, TaskClass

ESTIMATE = 100.0
BIASES, SPREADS = (0.5, 1.0, 2.0), (0.1, 0.2, 0.4, 0.8)
EQUAL_POLLS = (5, 8, 12, 20)
MODEL = TaskClass("image", "a-model")

# -- The world --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """How long the tasks of a model take. second_bias: of the other half of the tasks, if there are two kinds."""

    bias: float = 1.0
    spread: float = 0.2
    failures: float = 0.05
    second_bias: float | None = None

    def draw(self, dice: random.Random) -> tuple[float, float]:
        """When a task ends, and when it would have ended had it not failed."""
        bias = self.bias if self.second_bias is None or dice.random() < 0.5 else self.second_bias
        whole = ESTIMATE * bias * math.exp(self.spread * dice.gauss(0, 1))
        return (dice.uniform(1, 30), whole) if dice.random() < self.failures else (whole, whole)

    def share_before(self, age: float) -> float:
        """The share of tasks that end before this age."""
        if age <= 0:
            return 0.0
        biases = [self.bias, self.bias if self.second_bias is None else self.second_bias]
        logs = [math.log(age / ESTIMATE / bias) / self.spread for bias in biases]
        usual = statistics.fmean(0.5 * math.erfc(-x / math.sqrt(2)) for x in logs)
        return (1 - self.failures) * usual + self.failures * min(1.0, max(0.0, (age - 1) / 29))


# What a progress bar shows, from the true share, the age, and dice. 0..1
Bar = Callable[[float, float, random.Random], float]
BARS: dict[str, Bar] = {
    "informative": lambda share, age, dice: share + dice.gauss(0, 0.03),
    "late": lambda share, age, dice: 2 * share - 1,  # queued for half of the time
    "stairs": lambda share, age, dice: math.floor(4 * share) / 4,
    "stuck": lambda share, age, dice: min(share, 0.3),
    "fake": lambda share, age, dice: 1 - math.exp(-1.5 * age / ESTIMATE),  # made from the clock
    "capped fake": lambda share, age, dice: min(0.95, age / ESTIMATE),
    "noise": lambda share, age, dice: dice.random(),
}


@dataclass(frozen=True)
class Life:
    """One task: when it ends, and what its progress shows at an age."""

    ends: float
    whole: float
    bar: Bar | None
    dice: random.Random

    def progress(self, age: float) -> int:
        if self.bar is None:
            return 0
        return max(0, min(100, int(100 * self.bar(age / self.whole, age, self.dice))))


def lives(world: World, bar: str | None, seed: int) -> Iterator[Life]:
    """Tasks without end; equal seeds, equal durations, whatever the bar."""
    dice, noise = random.Random(seed), random.Random(seed + 1)
    while True:
        yield Life(*world.draw(dice), BARS[bar] if bar else None, noise)


# -- The schedules ----------------------------------------------------------------------------------------------------


class Looker(Protocol):
    """A schedule. Looks at one task until it is over: how often, and how late the last look was."""

    def follow(self, life: Life, jitter: float) -> tuple[int, float]: ...


class Learned:
    """Ours."""

    def __init__(self, price: float) -> None:
        self.schedule = Schedule(price)

    def follow(self, life: Life, jitter: float) -> tuple[int, float]:
        expectation, task = self.schedule.expect(MODEL, ESTIMATE), Sightings(0.0)
        for looks in itertools.count(1):
            age = expectation.next_look(task, jitter)
            if age >= life.ends:
                expectation.over(task, age)
                return looks, age - life.ends
            task.unfinished(age, life.progress(age))
        raise AssertionError


class Ageing:
    """A schedule that needs nothing but the age of the latest look; 0: none yet."""

    def __init__(self, after: Callable[[float, float], float]) -> None:
        self.after = after

    def follow(self, life: Life, jitter: float) -> tuple[int, float]:
        age = 0.0
        for looks in itertools.count(1):
            age = self.after(age, jitter)
            if age >= life.ends:
                return looks, age - life.ends
        raise AssertionError


def fixed(interval: float) -> Ageing:
    """As the vendor's samples do: sleep, look, sleep."""
    return Ageing(lambda age, jitter: age + interval)


def exponential(longest: float) -> Ageing:
    """A pause of 1 s, each half as long again as the one before, up to the longest."""
    return Ageing(lambda age, jitter: age + min(longest, 1 + age / 2))


def estimate_first(step: float) -> Ageing:
    """Trusts the estimate, then looks at fixed intervals."""
    return Ageing(lambda age, jitter: ESTIMATE if age == 0 else age + step)


@dataclass(frozen=True)
class Figures:
    """Per task: looks, and seconds of delay."""

    polls: float
    delay: float


class Oracle:
    """The square-root rule for somebody who knows the world: what it comes to is computed, not simulated.

    The interval is sqrt(2 * price / hazard), so a look is due where the integral of the hazard's square root has grown
    by sqrt(2 * price); the first one after 0.7 to 0.8 of that, like ours.
    """

    def __init__(self, world: World) -> None:
        self.edges = [0.0, *(0.2 * 300_000 ** (k / 3000) for k in range(3001))]
        self.shares = [world.share_before(edge) for edge in self.edges]
        self.efforts, self.integrals = [0.0], [0.0]  # of the root hazard, and of the share before
        for k, (before, after) in enumerate(itertools.pairwise(self.shares)):
            width = self.edges[k + 1] - self.edges[k]
            hazard = (after - before) / width / max(1 - (before + after) / 2, 1e-9)
            if 1 - before < 1e-3:  # hardly any task gets so far: gaps that grow with the age
                hazard = max(hazard, 0.15 / self.edges[k + 1])
            self.efforts.append(self.efforts[-1] + math.sqrt(hazard) * width)
            self.integrals.append(self.integrals[-1] + (before + after) / 2 * width)

    def frontier(self, count: int) -> list[Figures]:
        """At so many prices from half a hundredth of a second to twenty."""
        return [self.at_price(0.005 * 4000 ** (k / (count - 1))) for k in range(count)]

    def at_price(self, price: float) -> Figures:
        some = [self._figures(self.looks(price, 0.7 + 0.02 * k)) for k in range(6)]
        return Figures(*(statistics.fmean(column) for column in zip(*some, strict=True)))

    def looks(self, price: float, first: float) -> Iterator[float]:
        age, step = 0.0, math.sqrt(2 * price)
        while age < self.edges[-1]:
            goal = self._between(self.efforts, age) + step * (1.0 if age else first)
            k = min(bisect_left(self.efforts, goal), len(self.edges) - 1)
            low, high = self.efforts[k - 1], self.efforts[k]
            then = self.edges[k - 1] + (self.edges[k] - self.edges[k - 1]) * (goal - low) / max(high - low, 1e-12)
            age = max(age + SHORTEST, then)
            yield age

    def _figures(self, looks: Iterator[float]) -> tuple[float, float]:
        polls = delay = before = over = 0.0  # the age of the look before, and the share that is over by then
        for age in looks:
            polls += 1 - over
            ended = self._between(self.integrals, age) - self._between(self.integrals, before)
            delay += ended - (age - before) * over
            before, over = age, self._between(self.shares, age)
            if over > 1 - 1e-6:
                break
        return polls, delay

    def _between(self, values: Sequence[float], age: float) -> float:
        k = min(bisect_right(self.edges, age), len(self.edges) - 1) - 1
        share = min(1.0, (age - self.edges[k]) / (self.edges[k + 1] - self.edges[k]))
        return values[k] + (values[k + 1] - values[k]) * share


# -- Running them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One schedule at one price in one world."""

    name: str
    parameter: float
    world: World
    bar: str | None
    seed: int
    unmeasured: int  # tasks before those that count
    tasks: int

    def looker(self) -> Looker:
        if self.name == "ours":
            return Learned(self.parameter)
        return {"fixed": fixed, "exponential": exponential, "estimate first": estimate_first}[self.name](self.parameter)


def measure(looker: Looker, stream: Iterable[Life], dice: random.Random) -> Figures:
    seen = [looker.follow(life, dice.random()) for life in stream]
    return Figures(statistics.fmean(looks for looks, _ in seen), statistics.fmean(delay for _, delay in seen))


def perform(run: Run) -> Figures:
    looker, dice = run.looker(), random.Random(run.seed + 2)
    stream = lives(run.world, run.bar, run.seed)
    if run.unmeasured:
        measure(looker, itertools.islice(stream, run.unmeasured), dice)
    return measure(looker, itertools.islice(stream, run.tasks), dice)


def at_equal(points: Sequence[Figures], polls: float) -> float:
    """The delay at so many polls per task, or at fewer where it has no use for more. NaN: it cannot do with so few."""
    most = max(points, key=lambda point: point.polls)
    return most.delay if polls >= most.polls else _interpolate([(point.polls, point.delay) for point in points], polls)


def polls_for(points: Sequence[Figures], delay: float) -> float:
    """The polls per task that a delay takes."""
    return _interpolate([(point.delay, point.polls) for point in points], delay)


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    """On straight lines between logarithms; NaN outside."""
    points = sorted(points)
    k = bisect_left(points, (x, 0.0))
    if k == 0 or k == len(points):
        return math.nan
    (x0, y0), (x1, y1) = points[k - 1], points[k]
    return math.exp(math.log(y0) + (math.log(y1) - math.log(y0)) * math.log(x / x0) / math.log(x1 / x0))


# -- The measurements -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    unmeasured: int = 500
    tasks: int = 2000
    prices: tuple[float, ...] = tuple(2.0 ** (k / 1.5) for k in range(-5, 5))  # over one that takes some ten looks
    repeats: int = 24  # of the short measurements: first tasks, drift
    outstanding: int = 3000  # under a budget
    seconds: float = 300.0
    known_prices: int = 60  # of the oracle


@dataclass(frozen=True)
class Claim:
    """What must hold: a figure of at most so much."""

    text: str
    figure: float
    most: float

    @property
    def holds(self) -> bool:
        return self.figure <= self.most


@dataclass
class Report:
    """The figures, the claims they decide, and the lines for people."""

    figures: dict[str, Any] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


BASELINES: dict[str, tuple[float, ...]] = {
    "fixed": (1, 2, 3, 5, 8, 10, 14, 20, 30, 45, 70),
    "exponential": (1, 2, 3, 5, 8, 12, 18, 30, 60),
    "estimate first": (1, 2, 3, 5, 8, 10, 14, 20, 30, 45, 70),
}
Frontier = list[Figures]
Perform = Callable[[list[Run]], list[Figures]]


def frontiers(perform_all: Perform, wanted: dict[Any, list[Run]]) -> dict[Any, Frontier]:
    """All runs at once, sorted back under what they were wanted for."""
    figures = iter(perform_all(list(itertools.chain.from_iterable(wanted.values()))))
    return {what: list(itertools.islice(figures, len(runs))) for what, runs in wanted.items()}


def at_prices(world: World, bar: str | None, seed: int, size: Size) -> list[Run]:
    """A run of ours at every price."""
    usual = 0.35 * max(world.bias, world.second_bias or 0.0) * math.sqrt(world.spread / 0.2)
    return [Run("ours", usual * price, world, bar, seed, size.unmeasured, size.tasks) for price in size.prices]


def baselines(world: World, seed: int, size: Size) -> dict[str, list[Run]]:
    return {
        name: [Run(name, float(parameter), world, None, seed, 0, size.tasks) for parameter in parameters]
        for name, parameters in BASELINES.items()
    }


def span(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def grid(perform_all: Perform, size: Size, report: Report) -> dict[Any, Frontier]:
    """Ours beside the oracle and the others in every cell."""
    worlds = {(bias, spread): World(bias, spread) for bias in BIASES for spread in SPREADS}
    wanted: dict[Any, list[Run]] = {}
    for world in worlds.values():
        for seed in size.seeds:
            wanted[world, "ours", seed] = at_prices(world, None, seed, size)
        for name, runs in baselines(world, size.seeds[0], size).items():
            wanted[world, name] = runs
    found = frontiers(perform_all, wanted)
    found |= {(world, "oracle"): Oracle(world).frontier(size.known_prices) for world in worlds.values()}

    report.lines += ["Delay in seconds where looks per task are equal; after 500 tasks; ratio: mean (range over seeds)"]
    report.lines += ["", f"{'bias':>4} {'spread':>6} {'polls':>5} {'ours':>6} {'oracle':>6}  {'ours/oracle':<17}"]
    report.lines[-1] += f" {'fixed':>6} {'exponential':>11} {'estimate first':>14}"
    rows, worst = [], 0.0
    for (bias, spread), world in worlds.items():
        ours = [found[world, "ours", seed] for seed in size.seeds]
        for polls in EQUAL_POLLS:
            known = at_equal(found[world, "oracle"], polls)
            quotients = [at_equal(points, polls) / known for points in ours]
            worst = max(worst, statistics.fmean(quotients))
            mine = statistics.fmean(quotients) * known
            others = [at_equal(found[world, name], polls) for name in BASELINES]
            rows.append([bias, spread, polls, mine, known, quotients, *others])
            report.lines.append(
                f"{bias:4} {spread:6} {polls:5} {mine:6.2f} {known:6.2f}  {span(quotients):<17} "
                f"{number(others[0]):>6} {number(others[1]):>11} {number(others[2]):>14}"
            )
    report.figures["grid"] = rows
    report.claims.append(Claim("delay over the oracle's at equal polls, worst cell of the grid", worst, 1.10))

    world = worlds[1.0, 0.2]
    every_5_s = found[world, "fixed"][BASELINES["fixed"].index(5)]
    needed = [polls_for(found[world, "ours", seed], every_5_s.delay) for seed in size.seeds]
    report.figures["polls for the delay of fixed 5 s"] = {"ours": needed, "fixed 5 s": every_5_s.polls}
    report.lines += [
        "",
        f"Bias 1, spread 0.2, a delay of {every_5_s.delay:.2f} s: ours {span(needed)} polls, "
        f"fixed 5 s {every_5_s.polls:.1f}",
    ]
    report.claims.append(Claim("polls for the delay of fixed 5 s, bias 1, spread 0.2", statistics.fmean(needed), 11.0))
    return found


def odd_worlds(perform_all: Perform, size: Size, report: Report) -> None:
    """Laws that no formula was made for."""
    worlds = {
        "10 % fail early": World(failures=0.10),
        "half at 0.4, half at 1.5 estimates": World(bias=0.4, spread=0.1, second_bias=1.5),
        "a quarter of the estimate": World(bias=0.25),
        "four times the estimate": World(bias=4.0),
    }
    wanted = {(world, seed): at_prices(world, None, seed, size) for world in worlds.values() for seed in size.seeds}
    found = frontiers(perform_all, wanted)
    report.lines += ["", f"{'Odd worlds: delay over the oracle at equal polls':<50} 6 polls           10 polls"]
    for title, world in worlds.items():
        ours, known = [found[world, seed] for seed in size.seeds], Oracle(world).frontier(size.known_prices)
        quotients = {polls: [at_equal(points, polls) / at_equal(known, polls) for points in ours] for polls in (6, 10)}
        report.figures[title] = quotients
        report.lines.append(f"  {title:<48} {span(quotients[6]):<17} {span(quotients[10])}")
        worst = max(statistics.fmean(some) for some in quotients.values())
        report.claims.append(Claim(f"the same where {title}", worst, 1.10))


def progress(perform_all: Perform, size: Size, report: Report) -> dict[Any, Frontier]:
    """Ours with progress over ours without, at equal polls."""
    cells = [(World(spread=spread), bar) for bar in BARS for spread in (0.2, 0.8)]
    wanted = {
        (world, bar, seed): at_prices(world, bar, seed, size)
        for world, bar in [*dict.fromkeys((world, None) for world, _ in cells), *cells]
        for seed in size.seeds
    }
    found = frontiers(perform_all, wanted)
    report.lines += ["", "With progress: delay over that without, at equal polls"]
    report.lines += [f"{'bar':<12} {'spread':>6}   5 polls           8 polls           12 polls"]
    for world, bar in cells:
        pairs = [(found[world, bar, seed], found[world, None, seed]) for seed in size.seeds]
        quotients = {n: [at_equal(on, n) / at_equal(off, n) for on, off in pairs] for n in (5, 8, 12)}
        report.figures[f"progress {bar}, spread {world.spread}"] = quotients
        report.lines.append(
            f"{bar:<12} {world.spread:6}   " + " ".join(f"{span(some):<17}" for some in quotients.values())
        )
        worst = max(statistics.fmean(some) for some in quotients.values())
        if bar == "informative" and world.spread == 0.8:
            report.claims.append(Claim("delay with informative progress over that without, spread 0.8", worst, 0.5))
        else:
            report.claims.append(Claim(f"delay with {bar} progress over that without, {world.spread}", worst, 1.05))
    return found


def first_tasks(size: Size, report: Report) -> None:
    """The first 32 tasks of a model that nothing is known of."""
    count = 32
    report.lines += ["", f"The first {count} tasks of an unknown model, at the usual price of {PRICE:g} s per look: "]
    report.lines[-1] += "delay in s / looks per task"
    report.lines += [f"{'bias':>4} {'spread':>6}   one by one     all at once    after 1000     fixed 5 s"]
    for bias, spread in ((0.5, 0.2), (1.0, 0.2), (2.0, 0.2), (4.0, 0.2), (1.0, 0.8)):
        world = World(bias, spread)
        cells: dict[str, list[Figures]] = {"one by one": [], "all at once": [], "after 1000": [], "fixed 5 s": []}
        for seed in range(1000, 1000 + 10 * size.repeats, 10):
            tasks = list(itertools.islice(lives(world, None, seed), count))
            dice = random.Random(seed + 2)
            cells["one by one"].append(measure(Learned(PRICE), tasks, dice))
            cells["all at once"].append(all_at_once(Schedule(PRICE), tasks, dice))
            cells["fixed 5 s"].append(measure(fixed(5), tasks, dice))
        experienced, stream = Learned(PRICE), lives(world, None, size.seeds[0])
        measure(experienced, itertools.islice(stream, 1000), random.Random(2))
        cells["after 1000"].append(measure(experienced, itertools.islice(stream, 1000), random.Random(3)))
        means = {name: mean(some) for name, some in cells.items()}
        report.figures[f"first {count}, bias {bias}, spread {spread}"] = {
            name: [figures.delay, figures.polls] for name, figures in means.items()
        }
        texts = (f"{figures.delay:5.2f} /{figures.polls:5.1f}" for figures in means.values())
        report.lines.append(f"{bias:4} {spread:6}  " + "  ".join(f"{text:<13}" for text in texts))


def mean(some: Sequence[Figures]) -> Figures:
    return Figures(statistics.fmean(one.polls for one in some), statistics.fmean(one.delay for one in some))


def all_at_once(schedule: Schedule, tasks: Sequence[Life], dice: random.Random) -> Figures:
    """Tasks that were submitted at the same moment: nothing is known before the first of them ends."""
    expectation, seen = schedule.expect(MODEL, ESTIMATE), [Sightings(0.0) for _ in tasks]
    due = [(expectation.next_look(task, dice.random()), n) for n, task in enumerate(seen)]
    heapq.heapify(due)
    looks, delays = 0, []
    while due:
        now, n = heapq.heappop(due)
        looks += 1
        if now >= tasks[n].ends:
            expectation.over(seen[n], now)
            delays.append(now - tasks[n].ends)
        else:
            seen[n].unfinished(now, tasks[n].progress(now))
            heapq.heappush(due, (expectation.next_look(seen[n], dice.random()), n))
    return Figures(looks / len(tasks), statistics.fmean(delays))


def drift(size: Size, report: Report) -> None:
    """The tasks of a model that is known well take twice as long from one moment on."""
    blocks = (50, 50, 100, 100, 300)
    old, new = World(1.0), World(2.0)
    costs: list[list[float]] = []
    settled: list[float] = []
    shown: list[list[Figures]] = []
    for seed in range(2000, 2000 + 10 * size.repeats, 10):
        ours, dice = Learned(PRICE), random.Random(seed + 2)
        measure(ours, itertools.islice(lives(old, None, seed), 1000), dice)
        stream = lives(new, None, seed)
        shown.append([measure(ours, itertools.islice(stream, block), dice) for block in blocks])
        costs.append([figures.delay + PRICE * figures.polls for figures in shown[-1]])
        measure(ours, itertools.islice(stream, 1500), dice)
        final = measure(ours, itertools.islice(stream, 1000), dice)
        settled.append(final.delay + PRICE * final.polls)
    overs = [statistics.fmean(column) / statistics.fmean(settled) for column in zip(*costs, strict=True)]
    ends = list(itertools.accumulate(blocks))
    report.lines += [
        "",
        "Drift: bias 1 -> 2 after 1000 tasks, spread 0.2; cost = delay + price * polls, over the settled",
    ]
    for begin, end, over, column in zip([0, *ends], ends, overs, zip(*shown, strict=True), strict=False):
        figures = mean(column)
        report.lines.append(
            f"  tasks {begin:3}-{end:3}: {figures.delay:5.2f} s, {figures.polls:5.1f} polls, cost x {over:.2f}"
        )
    report.figures["drift: cost over the settled"] = dict(zip(map(str, ends), overs, strict=True))
    report.claims.append(Claim("cost from the 300th task after the drift on, over the settled", overs[-1], 1.10))


def budget(size: Size, report: Report) -> None:
    """Many tasks at once, replaced as they end, and so many looks per second in all."""
    report.lines += ["", f"A budget of looks, {size.outstanding} tasks outstanding: used, price, delay"]
    for polls_per_task in (2, 4, 8, 16):
        per_second = polls_per_task * size.outstanding / ESTIMATE
        used, price, delay = under_budget(size.outstanding, per_second, size.seconds, size.seeds[0])
        report.figures[f"budget of {per_second:g}/s"] = {"used": used / per_second, "price": price, "delay": delay}
        report.lines.append(
            f"  {per_second:6g}/s: {100 * used / per_second:4.0f} % used, {price:6.2f} s a look, delay {delay:6.2f} s"
        )
        if polls_per_task > 2:
            over = abs(math.log(used / per_second))
            report.claims.append(Claim(f"|ln(used / budget)| at {polls_per_task} polls per task", over, 0.1))


def under_budget(outstanding: int, per_second: float, seconds: float, seed: int) -> tuple[float, float, float]:
    """Looks per second, the last price, and the mean delay, in the second half of the time."""
    dice, stream = random.Random(seed), lives(World(), None, seed)
    ours = Learned(PRICE)
    measure(ours, itertools.islice(stream, 500), dice)
    schedule = ours.schedule
    expectation = schedule.expect(MODEL, ESTIMATE)
    tasks: list[tuple[Life, Sightings]] = []
    due: list[tuple[float, int]] = []
    for n in range(outstanding):
        tasks.append((next(stream), Sightings(dice.uniform(0, ESTIMATE))))
        due.append((expectation.next_look(tasks[n][1], dice.random()), n))
    heapq.heapify(due)
    looks, delays, adjust_at = 0, [], ESTIMATE
    while due[0][0] < ESTIMATE + seconds:
        now, n = heapq.heappop(due)
        while adjust_at <= now:
            sample = dice.sample(tasks, min(300, outstanding))
            urgencies = [expectation.urgency(task, now) for _, task in sample]
            schedule.price += 0.3 * (max(0.01, price_for(urgencies, outstanding, per_second)) - schedule.price)
            adjust_at += 1
        life, task = tasks[n]
        counts = now > ESTIMATE + seconds / 2
        looks += counts
        if now - task.started >= life.ends:
            expectation.over(task, now)
            if counts:
                delays.append(now - task.started - life.ends)
            life, task = tasks[n] = (next(stream), Sightings(now))
        else:
            task.unfinished(now)
        heapq.heappush(due, (expectation.next_look(task, dice.random()), n))
    return looks / (seconds / 2), schedule.price, statistics.fmean(delays)


def cost(size: Size, report: Report) -> None:
    """CPU time and memory of deciding and learning."""
    figures: dict[str, float] = {}
    for bar in (None, "informative"):
        title = "" if bar is None else " with progress"
        ours, dice = Learned(PRICE), random.Random(1)
        stream = lives(World(), bar, 1)
        measure(ours, itertools.islice(stream, 500), dice)
        tasks = list(itertools.islice(stream, size.tasks))
        watched = []
        for life in tasks:
            expectation, task, ages = ours.schedule.expect(MODEL, ESTIMATE), Sightings(0.0), []
            while (age := expectation.next_look(task, 0.5)) < life.ends:
                ages.append((age, life.progress(age)))
                task.unfinished(*ages[-1])
            watched.append((task, ages, age))
        began, looks = time.process_time(), 0
        for _, ages, _ in watched:
            expectation, task = ours.schedule.expect(MODEL, ESTIMATE), Sightings(0.0)
            expectation.next_look(task, 0.5)
            for seen in ages:
                task.unfinished(*seen)
                expectation.next_look(task, 0.5)
            looks += len(ages) + 1
        decided = time.process_time()
        for task, _, age in watched:
            expectation.over(task, age)
        figures[f"us per look{title}"] = (decided - began) / looks * 1e6
        figures[f"us to learn from a task{title}"] = (time.process_time() - decided) / len(tasks) * 1e6
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    laws = [DurationLaw() for _ in range(100)]
    figures["bytes per class (a law)"] = (tracemalloc.get_traced_memory()[0] - before) / len(laws)
    expectation, before = Schedule().expect(MODEL, ESTIMATE), tracemalloc.get_traced_memory()[0]
    outstanding = [Sightings(0.0) for _ in range(1000)]
    for title, readings in ((" outstanding task", (0,)), (" one with progress", range(5, 100, 10))):
        for task in outstanding:
            for reading in readings:
                task.unfinished(expectation.next_look(task, 0.5), reading)
        figures[f"bytes per{title}"] = (tracemalloc.get_traced_memory()[0] - before) / len(outstanding)
    tracemalloc.stop()
    report.figures["cost"] = figures
    report.lines += ["", "Cost: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items())]


# -- The program ------------------------------------------------------------------------------------------------------


def plot(path: str, grid_found: dict[Any, Frontier], progress_found: dict[Any, Frontier], seed: int) -> None:
    """The frontier in one usual world, and what progress does where the estimate says little."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    usual, wide = World(1.0, 0.2), World(1.0, 0.8)
    for name, colour in zip(BASELINES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        _draw(left, grid_found[usual, name], name, "--", colour)
    _draw(left, grid_found[usual, "oracle"], "oracle (knows the law)", "-", "0.7", "")
    _draw(left, grid_found[usual, "ours", seed], "learned", "-", "black")
    left.set_title("bias 1, spread 0.2")
    _draw(right, grid_found[wide, "fixed"], "fixed", "--", "tab:blue")
    _draw(right, progress_found[wide, None, seed], "learned, without progress", "-", "black")
    _draw(right, progress_found[wide, "fake", seed], "learned, fake progress", "", "tab:red", "x")
    _draw(right, progress_found[wide, "stairs", seed], "learned, progress in stairs", "-", "tab:brown")
    _draw(right, progress_found[wide, "informative", seed], "learned, informative progress", "-", "tab:purple")
    right.set_title("bias 1, spread 0.8")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlim=(2, 50), ylim=(0.5, 60), xlabel="looks per task")
        axes.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    left.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    left.set_ylabel("mean detection delay, s (estimate 100 s)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw(axes: Any, points: Frontier, label: str, style: str, colour: str, marker: str = ".") -> None:
    line = sorted((point.polls, point.delay) for point in points)
    polls, delays = [polls for polls, _ in line], [delay for _, delay in line]
    axes.plot(polls, delays, linestyle=style or "None", color=colour, marker=marker, label=label)


def without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(name): without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = Size(tuple(options.seed + 100 * n for n in range(options.seeds)))
    if options.quick:
        size = Size((options.seed,), 20, 40, (0.05, 0.8, 12.0), 1, 50, 100.0, 6)

    began, report = time.perf_counter(), Report()
    with multiprocessing.Pool(options.jobs) as pool:

        def perform_all(runs: list[Run]) -> list[Figures]:
            return pool.map(perform, runs, chunksize=4)

        grid_found = grid(perform_all, size, report)
        odd_worlds(perform_all, size, report)
        progress_found = progress(perform_all, size, report)
    first_tasks(size, report)
    drift(size, report)
    budget(size, report)
    cost(size, report)
    if options.plot:
        plot(options.plot, grid_found, progress_found, size.seeds[0])

    header = machine() | {"seeds": ", ".join(map(str, size.seeds)), "tasks per run": str(size.tasks)}
    claims = [{"claim": c.text, "figure": c.figure, "most": c.most, "holds": c.holds} for c in report.claims]
    if options.json:
        print(json.dumps(without_nan(header | report.figures | {"claims": claims}), indent=2, allow_nan=False))
    else:
        print(", ".join(f"{name} {value}" for name, value in header.items()))
        print(*report.lines, "", sep="\n")
        for claim in report.claims:
            print(f"{'pass' if claim.holds else 'FAIL'}  {claim.text}: {claim.figure:.3f} (at most {claim.most:g})")
        print(f"\n{time.perf_counter() - began:.0f} s")
    return 0 if options.quick or all(claim.holds for claim in report.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
