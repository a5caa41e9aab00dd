"""How much of a limit that nobody published is used, and how often it is run into: simulated, in virtual time.

    python benchmarks/pace.py [--seed 1] [--seeds 5] [--jobs N] [--json] [--plot FILE.png]
    python benchmarks/pace.py --quick

A job that always has work asks a service that lets so many requests a second through, stores up what is not used (as
much as a second's worth, but no less than one), and answers the others with 429. It lasts 600 s (slow limits: 3000 s),
and half-way the limit is halved. An answer takes 50 to 300 ms, half of it on the way there; at most 75 requests are
under way. The policies know nothing of the limit but those answers: ours is the `ModelPace` of this library, fed by
its own reader of hints.

"used": accepted, as a share of what the limit allows in that time (its rate, and for the whole run and its halves also
what is stored at the beginning). "steady": the first half without its first tenth, the slow start. "refused": of all
requests sent. Means over the seeds, the spread of them in brackets.

Further: the same with a hint of every kind, with other stores, a limit that is raised fourfold, refusals by mere
chance, rare and frequent ("of the most": as a share of what the pauses that they ask for leave), limits on the tasks
that may run (against somebody who knows them), and the real dispatcher on a virtual clock.

Exit status 1 if a claim that this program checks doesn't hold. --quick checks that it runs, not the claims.
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from typing import Any, Protocol

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from machine import machine

from evolink_async import RetryPolicy
from evolink_async.emulator.limits import TokenBucket, hint_headers, hint_text
from evolink_async.http.hints import retry_after
from evolink_async.http.model_pace import START_BURST, START_RATE, ModelPace
from evolink_async.http.pace import Pace, Urgency

RETRY = RetryPolicy()
RATES = (0.5, 2.0, 5.0, 50.0, 200.0)
STYLES = ("seconds", "date", "ms", "body", None)
PARALLEL = 75
LATENCY = (0.05, 0.3)
A_DAY = 1_700_000_000.0  # unix seconds at the beginning: hints as dates need a wall clock

# -- The service ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A service and its job. rate: None for no limit. store: tokens; None: a second's worth, at least one.

    factor: what the rate is multiplied with half-way. chance: share of refusals by mere chance. places: tasks that may
    run, each for about `lasts` seconds, and their end is known up to `lag` seconds later. later_places: how many from
    half-way on. requests: the job has so many, None: always more. style: of the hints, which ask for `least_hint`
    seconds at least; chance_hint: what a refusal by chance asks for.
    """

    rate: float | None = 50.0
    store: float | None = None
    factor: float = 1.0
    seconds: float = 600.0
    style: str | None = "seconds"
    least_hint: float = field(default=0.0, repr=False)  # no part of the seed
    chance: float = 0.0
    chance_hint: float | None = 1.0
    ceiling: float | None = None
    places: int | None = None
    later_places: int | None = field(default=None, repr=False)
    lasts: float = 0.0
    lag: float = 0.0
    requests: int | None = None

    def bucket(self, factor: float) -> TokenBucket | None:
        if self.rate is None:
            return None
        return TokenBucket(self.rate * factor, None if self.store is None else max(1.0, self.store * factor))

    def allowed(self, begin: float, end: float, stored: bool) -> float:
        """Requests that the limit lets through between two moments, none of which lies within a half."""
        assert self.rate is not None
        total = 0.0
        for start, stop, factor in ((0.0, self.seconds / 2, 1.0), (self.seconds / 2, self.seconds, self.factor)):
            if begin < stop and end > start:
                bucket = self.bucket(factor)
                assert bucket is not None
                total += self.rate * factor * (min(end, stop) - max(begin, start))
                total += bucket.burst if stored and (factor != 1.0 or start == 0.0) else 0.0
        return total


class Policy(Protocol):
    """Who decides when the next request is sent."""

    def ready_at(self, now: float) -> float: ...
    def sent(self, now: float) -> None: ...
    def landed(self) -> None: ...
    def accepted(self, now: float, task_id: str | None = None) -> None: ...
    def watch(self, task_id: str) -> object: ...
    def ended(self, now: float) -> None: ...
    def refused(self, now: float, sent_at: float, hint: float | None, retry: RetryPolicy, rand: float) -> None: ...

    @property
    def rate(self) -> float: ...


@dataclass
class Run:
    """What happened: moments at the service, and in the end. early: requests sent before a pause was over."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)
    early: int = 0
    finished: float = 0.0


class Simulation:
    """One job against one service."""

    def __init__(self, world: World, policy: Policy, seed: int) -> None:
        self.world = world
        self.policy = policy
        self.dice = random.Random(f"{world} {seed}")
        self.run = Run()
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._bucket = world.bucket(1.0)
        self._places = world.places
        self._running: list[float] = []  # a heap: when the tasks end
        self._flying = 0
        self._left = math.inf if world.requests is None else world.requests
        self._unfinished = self._left
        self._looks_at: float | None = None
        self._ceiling_at = 0.0
        self._cool_until = -math.inf

    def at(self, moment: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), what, arguments))

    def __call__(self) -> Run:
        world = self.world
        if world.factor != 1.0 or world.later_places is not None:
            self.at(world.seconds / 2, self._change)
        self._send()
        while self._events and self._unfinished > 0:
            moment, _, what, arguments = heapq.heappop(self._events)
            if world.requests is None and moment > world.seconds:
                break
            self.now = moment
            what(*arguments)
            self._send()
        self.run.finished = self.now
        return self.run

    def _change(self) -> None:
        if self.world.factor != 1.0:
            self._bucket = self.world.bucket(self.world.factor)
        if self.world.later_places is not None:
            self._places = self.world.later_places

    def _look(self, moment: float) -> None:
        if self._looks_at == moment:
            self._looks_at = None

    def _send(self) -> None:
        while self._left > 0 and self._flying < PARALLEL:
            moment = max(self.policy.ready_at(self.now), self._ceiling_at)
            if moment > self.now + 1e-9:
                if not math.isinf(moment) and (self._looks_at is None or moment < self._looks_at):
                    self._looks_at = moment
                    self.at(moment, self._look, moment)
                return
            self.policy.sent(self.now)
            self.run.early += self.now < self._cool_until - 1e-9
            self._flying += 1
            self._left -= 1
            if self.world.ceiling is not None:
                self._ceiling_at = max(self._ceiling_at, self.now) + 1 / self.world.ceiling
            way = self.dice.uniform(*LATENCY) / 2
            self.at(self.now + way, self._arrive, self.now, way)

    def _arrive(self, sent_at: float, way: float) -> None:
        hint, style, world = 0.0, self.world.style, self.world
        while self._running and self._running[0] <= self.now:
            heapq.heappop(self._running)
        if self._places is not None and len(self._running) >= self._places:
            hint = max(1e-3, self._running[0] - self.now)
        elif self._bucket is not None:
            hint = self._bucket.take(self.now)
        by_chance = hint == 0.0 and self.dice.random() < world.chance
        if hint == 0.0 and not by_chance:
            self.run.accepted.append(self.now)
            lasts = world.lasts * math.exp(0.25 * self.dice.gauss(0, 1)) if world.lasts else 0.0
            if world.places is not None:
                heapq.heappush(self._running, self.now + lasts)
            self.at(self.now + way, self._taken, self.now + lasts)
            return
        self.run.refused.append(self.now)
        told = world.chance_hint if by_chance else self._told(style, max(hint, world.least_hint))
        self.at(self.now + way, self._refused, sent_at, told)

    def _told(self, style: str | None, wait: float) -> float | None:
        """What our reader of hints makes of it."""
        wall = A_DAY + self.now
        headers = dict(hint_headers(style, wait, wall)) | {"date": formatdate(wall, usegmt=True)}
        return retry_after(headers, hint_text(style, wait), wall)

    def _taken(self, ends_at: float) -> None:
        self._flying -= 1
        if not self.world.lasts:
            self.policy.accepted(self.now)
            self._unfinished -= 1
        else:
            task_id = str(next(self._numbers))
            self.policy.accepted(self.now, task_id)
            self.policy.watch(task_id)
            self.at(max(self.now, ends_at + self.dice.uniform(0, self.world.lag)), self._ended)
        self.policy.landed()
        self.run.rates.append((self.now, self.policy.rate))

    def _refused(self, sent_at: float, hint: float | None) -> None:
        self._flying -= 1
        self._left += 1
        self._cool_until = max(self._cool_until, self.now + (hint or 0.0))
        self.policy.refused(self.now, sent_at, hint, RETRY, self.dice.random())
        self.policy.landed()
        self.run.rates.append((self.now, self.policy.rate))

    def _ended(self) -> None:
        self._unfinished -= 1
        self.policy.ended(self.now)


# -- The policies -----------------------------------------------------------------------------------------------------


class Fixed:
    """So many a second whatever the answers; a hint is waited for. The base of the others."""

    def __init__(self, rate: float, places: int | None = None) -> None:
        self.rate = rate
        self.places = math.inf if places is None else places
        self.held = 0
        self.due = self.cool_until = 0.0

    def ready_at(self, now: float) -> float:
        return math.inf if self.held >= self.places else max(self.due, self.cool_until)

    def sent(self, now: float) -> None:
        self.held += 1
        self.due = max(self.due, now) + 1 / self.rate

    def landed(self) -> None:
        pass

    def accepted(self, now: float, task_id: str | None = None) -> None:
        pass

    def watch(self, task_id: str) -> None:
        pass

    def ended(self, now: float) -> None:
        self.held -= 1

    def refused(self, now: float, sent_at: float, hint: float | None, retry: RetryPolicy, rand: float) -> None:
        self.held -= 1
        self.cool_until = max(self.cool_until, now + (retry.delay(1, None, rand) if hint is None else hint))


class Known(Fixed):
    """The limits themselves, also after the change."""

    def __init__(self, world: World) -> None:
        super().__init__(world.rate or 1e9, world.places)
        self.change_at = world.seconds / 2 if world.factor != 1.0 else math.inf
        self.changed = self.rate * world.factor

    def sent(self, now: float) -> None:
        if now >= self.change_at:
            self.rate = self.changed
        super().sent(now)


class Aimd(Fixed):
    """Half a request per second more every second; a refusal leaves 70 %, at most once a second."""

    def __init__(self) -> None:
        super().__init__(START_RATE)
        self.cut_at = -math.inf

    def accepted(self, now: float, task_id: str | None = None) -> None:
        self.rate += 0.5 / self.rate

    def refused(self, now: float, sent_at: float, hint: float | None, retry: RetryPolicy, rand: float) -> None:
        super().refused(now, sent_at, hint, retry, rand)
        if now - self.cut_at >= 1:
            self.rate, self.cut_at = max(0.5, 0.7 * self.rate), now


class MeasuredCut(Fixed):
    """A quarter more every second until the first refusal, then 0.4 %; a refusal leaves 95 % of what was accepted."""

    def __init__(self) -> None:
        super().__init__(START_RATE)
        self.gain, self.taken, self.since, self.cut_at = 0.25, 0, 0.0, -math.inf

    def accepted(self, now: float, task_id: str | None = None) -> None:
        self.taken += 1
        self.rate += self.gain
        if now - self.since > 5:
            self.taken, self.since = 0, now

    def refused(self, now: float, sent_at: float, hint: float | None, retry: RetryPolicy, rand: float) -> None:
        super().refused(now, sent_at, hint, retry, rand)
        if now - self.cut_at < 1:
            return
        elapsed = now - self.since
        measured = self.taken / max(elapsed, 0.2) if elapsed > 0.5 else 0.7 * self.rate
        self.rate = max(0.5, 0.95 * min(self.rate, measured))
        self.gain, self.taken, self.since, self.cut_at = 0.004, 0, now, now


def learned(world: World) -> Policy:
    if world.ceiling is not None:
        return ModelPace(math.inf, 1, 0.0, world.ceiling)
    return ModelPace(START_RATE, START_BURST, 0.0)


POLICIES: dict[str, Callable[[World], Policy]] = {
    "learned (ours)": learned,
    "AIMD": lambda world: Aimd(),
    "measured-rate cut": lambda world: MeasuredCut(),
    "knows the limits": Known,
    "fixed at the first limit": lambda world: Fixed(world.rate or 1.0),
    "fixed at twice the limit": lambda world: Fixed(2 * (world.rate or 1.0)),
}

# -- Figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One world and one policy."""

    world: World
    policy: str = "learned (ours)"
    seed: int = 1


def figures(case: Case) -> dict[str, float]:
    """What one run shows."""
    world = case.world
    run = Simulation(world, POLICIES[case.policy](world), case.seed)()
    sent = len(run.accepted) + len(run.refused)
    found = {"refused": len(run.refused) / max(1, sent), "early": float(run.early), "finished": run.finished}
    if world.rate is not None and world.requests is None:
        half = world.seconds / 2
        spans = {
            "whole": (0.0, world.seconds, True),
            "first": (0.0, half, True),
            "steady": (world.seconds / 20, half, False),
            "second": (half, world.seconds, world.factor != 1.0),
        }
        for name, (begin, end, stored) in spans.items():
            taken = sum(begin <= at < end for at in run.accepted)
            vain = sum(begin <= at < end for at in run.refused)
            found[f"{name} used"] = taken / world.allowed(begin, end, stored)
            found[f"{name} refused"] = vain / max(1, taken + vain)
    elif world.requests is None:
        found["per second"] = len(run.accepted) / world.seconds
    if world.rate is None and world.places is not None and world.requests is None:
        usual = world.lasts * math.exp(0.25**2 / 2) + world.lag / 2 + statistics.fmean(LATENCY)
        half = world.seconds / 2
        for name, begin, count in (("first", 0.0, world.places), ("second", half, world.later_places or world.places)):
            taken = sum(begin <= at < begin + half for at in run.accepted)
            vain = sum(begin <= at < begin + half for at in run.refused)
            found[f"{name} used"] = taken * usual / (count * half)
            found[f"{name} refused"] = vain / max(1, taken + vain)
    return found


@dataclass
class Table:
    """Rows of means with their spread over the seeds."""

    title: str
    columns: Sequence[str]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, runs: list[dict[str, float]]) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name}
        for column in sorted(set.intersection(*(set(run) for run in runs))):
            values = [run[column] for run in runs]
            row[column] = {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}
        self.rows.append(row)
        return row

    def text(self) -> str:
        width = max(len(row["name"]) for row in self.rows) + 2
        lines = ["", self.title, " " * width + "".join(f"{column:>19}" for column in self.columns)]
        for row in self.rows:
            cells = "".join(f"{_cell(row.get(column), column):>19}" for column in self.columns)
            lines.append(f"{row['name']:{width}}{cells}")
        return "\n".join(lines)


def _cell(value: dict[str, float] | None, column: str) -> str:
    if value is None:
        return "-"
    mean, least, most = value["mean"], value["least"], value["most"]
    if column.endswith("refused"):
        return f"{mean:.2%} [{100 * least:.2f}-{100 * most:.2f}]"
    if column.endswith("used"):
        return f"{mean:.1%} [{100 * least:.0f}-{100 * most:.0f}]"
    return f"{mean:.3g} [{least:.3g}-{most:.3g}]"


class Bench:
    """Runs the cases on all cores and collects tables and claims."""

    def __init__(self, seeds: Sequence[int], jobs: int) -> None:
        self.seeds = seeds
        self.tables: list[Table] = []
        self.claims: list[tuple[str, bool]] = []
        self._jobs = jobs

    def table(self, title: str, columns: Sequence[str], cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
        todo = [Case(case.world, case.policy, seed) for case in cases.values() for seed in self.seeds]
        if self._jobs > 1:
            with multiprocessing.get_context("spawn").Pool(self._jobs) as workers:
                found = workers.map(figures, todo, chunksize=1)
        else:
            found = [figures(case) for case in todo]
        table = Table(title, columns)
        batches = [found[start : start + len(self.seeds)] for start in range(0, len(found), len(self.seeds))]
        rows = {name: table.add(name, runs) for name, runs in zip(cases, batches, strict=True)}
        self.tables.append(table)
        return rows

    def claim(self, text: str, holds: bool) -> None:
        self.claims.append((text, holds))


USED = ("whole used", "whole refused", "first used", "steady used", "steady refused", "second used", "second refused")


def seconds_for(rate: float, quick: bool) -> float:
    """Long enough for hundreds of requests in each half."""
    return 60.0 if quick else 600.0 if rate >= 5 else 3000.0


def hidden_limits(bench: Bench, quick: bool) -> None:
    rates = (5.0, 50.0) if quick else RATES
    rows = bench.table(
        "A hidden limit, halved half-way (Retry-After in seconds)",
        USED,
        {f"{rate:g}/s": Case(World(rate, factor=0.5, seconds=seconds_for(rate, quick))) for rate in rates},
    )
    if not quick:
        at_50 = rows["50/s"]
        bench.claim("50/s: at least 97 % of what the limit allows is used", at_50["whole used"]["mean"] >= 0.97)
        bench.claim("50/s: also after it was halved", at_50["second used"]["mean"] >= 0.97)
        bench.claim("50/s: under 0.5 % refused", at_50["whole refused"]["mean"] < 0.005)
        bench.claim("50/s: also after it was halved ", at_50["second refused"]["mean"] < 0.005)
        bench.claim("no submission during a cool-down", all(row["early"]["most"] == 0 for row in rows.values()))
    bench.table(
        "The same at 50/s, by policy",
        USED,
        {name: Case(World(50.0, factor=0.5, seconds=seconds_for(50, quick)), name) for name in POLICIES},
    )
    rows = bench.table(
        "The same with hints of every kind",
        USED,
        {
            f"{rate:g}/s, {style or 'no hint'}": Case(
                World(rate, factor=0.5, seconds=seconds_for(rate, quick), style=style)
            )
            for rate in ((50.0,) if quick else (0.5, 50.0))
            for style in STYLES
        },
    )
    if not quick:
        usual = [row for name, row in rows.items() if name.startswith("50/s")]
        bench.claim("50/s: as much with every kind of hint", all(row["whole used"]["mean"] >= 0.97 for row in usual))
        bench.claim("50/s: as few with every kind of hint", all(row["whole refused"]["mean"] < 0.005 for row in usual))
    bench.table(
        "The same with other stores (a store of 1 refuses whatever arrives early by a hair)",
        USED,
        {
            f"{rate:g}/s, store {store:g}": Case(World(rate, store, 0.5, seconds_for(rate, quick)))
            for rate, store in (((50.0, 10.0),) if quick else ((2, 1), (5, 2), (5, 60), (50, 1), (50, 10), (50, 500)))
        },
    )
    if not quick:
        rows = bench.table(
            "A service that asks for longer pauses than it needs, over two hours",
            USED,
            {
                f"{rate:g}/s, {hint:g} s": Case(World(rate, seconds=7200.0, least_hint=hint))
                for rate in (5.0, 50.0)
                for hint in (5.0, 60.0)
            },
        )
        bench.claim(
            "long pauses: three quarters are used", all(row["whole used"]["mean"] >= 0.75 for row in rows.values())
        )
        bench.table(
            "A limit that is raised fourfold half-way",
            USED,
            {
                f"{rate:g}/s": Case(World(rate, factor=4.0, seconds=seconds_for(rate, quick)))
                for rate in (0.5, 5.0, 50.0)
            },
        )


def by_chance(bench: Bench, quick: bool) -> None:
    """Refusals that have nothing to do with the rate: who keeps the pauses gets no more than 1 / (share * pause)."""
    cases = {}
    for share, hint, ceiling in (
        (0.01, 1.0, None),
        (0.01, None, None),
        (0.01, 1.0, 500.0),
        (0.01, 0.05, 500.0),
        (0.002, 1.0, None),
    ):
        what = "no hint" if hint is None else f"Retry-After: {hint:g}"
        name = f"{share:.1%}, {what}, {'no limit set' if ceiling is None else f'limit {ceiling:g}/s'}"
        seconds = 60.0 if quick else 600.0
        cases[name] = Case(World(None, chance=share, chance_hint=hint, ceiling=ceiling, seconds=seconds))
    bench.table("Refusals by mere chance, no limit at the service", ("per second", "refused"), cases)


def most_by_chance(share: float, hint: float | None, ceiling: float | None) -> float:
    """Accepted per second by one who keeps every pause, tries with one request after it, and then sends as fast as
    `ceiling` allows until one is refused.

    Between two refusals (1 - share) / share are accepted; each costs its pause and the answer to the one that tries.
    Without a hint a pause is doubled with each refusal in a row. Who has many under way when one is refused gets more:
    they share its pause.
    """
    pause = hint if hint is not None else 0.75 * RETRY.base_delay * (1 - share) / (1 - 2 * share)
    accepted = (1 - share) / share
    sending = 0.0 if ceiling is None else accepted / ceiling
    return accepted / (pause + statistics.fmean(LATENCY) + sending)


def random_refusals(bench: Bench, quick: bool) -> None:
    """A good part of the requests is refused whatever the rate."""
    cases, bounds = {}, {}
    for hint, ceiling, share in itertools.product((1.0, None), (None, 2.0), (0.1, 0.2) if quick else (0.1, 0.2, 0.3)):
        what = "no hint" if hint is None else f"Retry-After: {hint:g}"
        name = f"{share:.0%}, {what}, {'no limit set' if ceiling is None else f'limit {ceiling:g}/s'}"
        seconds = 60.0 if quick else 600.0
        cases[name] = Case(World(None, chance=share, chance_hint=hint, ceiling=ceiling, seconds=seconds))
        bounds[name] = most_by_chance(share, hint, ceiling)
    rows = bench.table("Random refusals, no limit at the service", ("per second", "refused", "of the most"), cases)
    for name, row in rows.items():
        row["of the most"] = {of: value / bounds[name] for of, value in row["per second"].items()}
    if not quick:
        shares = [row["of the most"]["mean"] for row in rows.values()]
        bench.claim("random refusals: half of what the pauses leave, in the mean", statistics.fmean(shares) >= 0.5)
        bench.claim("random refusals: at least a quarter in each world", min(shares) >= 0.25)
        kept = not any(row["early"]["most"] for row in rows.values())
        bench.claim("random refusals: no submission during a cool-down", kept)


def places(bench: Bench, quick: bool) -> None:
    """Limits on the tasks that may run, and on the rate too: the time for a job over the least possible."""
    by_seconds = 60.0 if quick else 7200.0
    cases = {
        f"{places}, then {later}, tasks of {lasts:g} s{chance}": Case(
            World(
                None,
                places=places,
                later_places=later,
                lasts=lasts,
                lag=1 + 0.05 * lasts,
                seconds=by_seconds * (2 if lasts > 50 else 1),
                chance=0.01 if chance else 0.0,
            )
        )
        for places, later, lasts, chance in (
            (1, 50, 15.0, ""),
            (1, 50, 100.0, ""),
            (5, 50, 100.0, ""),
            (20, 100, 100.0, ""),
            (100, 50, 15.0, ""),
            (1, 1, 100.0, ""),
            (100, 100, 15.0, ", 1 % of refusals by chance"),
        )
    }
    bench.table(
        "A limit on the tasks that may run, changed half-way (used: of what those places let through)",
        ("first used", "second used", "first refused", "second refused"),
        cases,
    )
    table = Table(
        "A limit on the tasks that may run: the time of a job over its lower bound",
        ("times the bound", "knows the limits", "refused"),
    )
    worlds = [
        World(None, places=40, lasts=30, lag=3, requests=200 if quick else 2000),
        World(None, places=10, lasts=60, lag=3, requests=60 if quick else 600),
        World(None, places=200, lasts=100, lag=5, requests=3000),
        World(None, places=40, lasts=2, lag=0.5, requests=3000),
        World(5.0, places=40, lasts=30, lag=3, requests=2000),
        World(5.0, places=200, lasts=30, lag=3, requests=3000),
        World(3.4, places=100, lasts=30, lag=3, requests=3000),
    ]
    worlds += [World(None, places=40, lasts=30, lag=3, requests=2000, style=None)]
    for world in worlds[: 2 if quick else None]:
        assert world.requests is not None
        assert world.places is not None
        usual = world.lasts * math.exp(0.25**2 / 2)
        rate = min(world.places / usual, world.rate or math.inf)
        bound = world.requests / rate + usual
        runs = []
        for seed in bench.seeds:
            ours, oracle = figures(Case(world, seed=seed)), figures(Case(world, "knows the limits", seed))
            runs.append(
                {
                    "times the bound": ours["finished"] / bound,
                    "knows the limits": oracle["finished"] / bound,
                    "refused": ours["refused"],
                }
            )
        limits = f"{world.places} places" + ("" if world.rate is None else f", {world.rate:g}/s")
        table.add(f"{limits}, tasks of {world.lasts:g} s, {world.requests} requests, {world.style or 'no hint'}", runs)
    bench.tables.append(table)


# -- The real dispatcher ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Wish:
    """A ticket of the dispatcher."""

    go: Callable[[], None]
    model: str = "m"
    party: str = "job"
    waiting: bool = False

    def turn_failed(self, error: BaseException) -> None:
        raise error


async def dispatched(world: World, seed: int) -> dict[str, float]:
    """The same job through `Pace` itself."""
    loop = asyncio.get_running_loop()
    dice = random.Random(seed)
    pace = Pace(None, PARALLEL, RETRY, {}, dice)
    bucket, begin = world.bucket(1.0), loop.time()
    assert bucket is not None
    taken: list[float] = []
    vain: list[float] = []

    def change() -> None:
        nonlocal bucket
        bucket = world.bucket(world.factor)

    def put(urgency: Urgency) -> None:
        def go() -> None:
            way = dice.uniform(*LATENCY) / 2
            loop.call_later(way, arrive, loop.time(), way)

        pace.enqueue(Wish(go), urgency)

    def arrive(sent_at: float, way: float) -> None:
        assert bucket is not None
        now = loop.time() - begin
        wait = bucket.take(now)
        (vain if wait else taken).append(now)
        hint = retry_after(dict(hint_headers(world.style, wait, now)), hint_text(world.style, wait)) if wait else None
        loop.call_later(way, answer, sent_at, wait, hint)

    def answer(sent_at: float, wait: float, hint: float | None) -> None:
        if wait:
            pace.refused("m", loop.time(), sent_at, hint)
        else:
            pace.accepted("m", loop.time())
        pace.finished("m")
        put(Urgency.RETURNED if wait else Urgency.SOURCE)

    loop.call_later(world.seconds / 2, change)
    for _ in range(PARALLEL + START_BURST):
        put(Urgency.SOURCE)
    await asyncio.sleep(world.seconds)
    await pace.aclose()
    return {
        "whole used": len(taken) / world.allowed(0, world.seconds, True),
        "whole refused": len(vain) / (len(taken) + len(vain)),
    }


def on_a_virtual_clock(bench: Bench, quick: bool) -> None:
    import looptime

    table = Table(
        "50/s, halved half-way, through the real dispatcher on a virtual clock", ("whole used", "whole refused")
    )
    world = World(50.0, factor=0.5, seconds=seconds_for(50, quick))
    runs = []
    for seed in bench.seeds[:2]:
        with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
            runs.append(runner.run(dispatched(world, seed)))
    row = table.add("learned (ours)", runs)
    bench.tables.append(table)
    if not quick:
        good = row["whole used"]["mean"] >= 0.97 and row["whole refused"]["mean"] < 0.005
        bench.claim("50/s: the real dispatcher does as well", good)


# -- A picture --------------------------------------------------------------------------------------------------------


def plot(path: str, seed: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    world = World(50.0, factor=0.5)
    figure, all_axes = plt.subplots(3, 1, figsize=(9, 7), sharex=True, sharey=True, layout="constrained")
    for axes, name in zip(all_axes, ("learned (ours)", "measured-rate cut", "AIMD"), strict=True):
        run = Simulation(world, POLICIES[name](world), seed)()
        half = world.seconds / 2
        used = len(run.accepted) / world.allowed(0, world.seconds, True)
        share = len(run.refused) / (len(run.refused) + len(run.accepted))
        axes.plot([at for at, _ in run.rates], [rate for _, rate in run.rates], lw=1, label="rate")
        axes.step([0, half, world.seconds], [50, 50, 25], where="pre", color="0.6", lw=1, ls="--", label="hidden limit")
        axes.plot(run.refused, [2] * len(run.refused), "|", color="tab:red", label="refused")
        axes.set_title(f"{name}: {used:.1%} of the limit used, {share:.2%} refused", loc="left", fontsize=10)
        axes.set_ylim(0, 130)
        axes.set_ylabel("requests / s")
    all_axes[0].legend(loc="upper right", ncols=3, fontsize=8)
    all_axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("--quick", action="store_true", help="short runs of a few cases, no claims")
    options = parser.parse_args()
    started = time.perf_counter()
    seeds = range(options.seed, options.seed + (1 if options.quick else options.seeds))
    bench = Bench(seeds, 1 if options.quick else options.jobs)
    for part in (hidden_limits, by_chance, random_refusals, places, on_a_virtual_clock):
        part(bench, options.quick)
    if options.plot:
        plot(options.plot, options.seed)
    head = machine() | {"seeds": list(seeds), "seconds": round(time.perf_counter() - started, 1)}
    if options.json:
        claims = [{"claim": text.strip(), "holds": holds} for text, holds in bench.claims]
        print(json.dumps(head | {"tables": [asdict(table) for table in bench.tables], "claims": claims}, indent=2))
    else:
        for name, value in head.items():
            print(f"{name:14} {value}")
        for table in bench.tables:
            print(table.text())
        print()
        for text, holds in bench.claims:
            print(f"{'holds' if holds else 'FAILS'}: {text}")
    return 0 if all(holds for _, holds in bench.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
