"""A small pool on a ledger, against a service with a book: crashes at every point, and random lives.

The seed of a life that fails is in the assertion; run it alone with LEDGER_SEED=<seed>.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from book_service import PRICE, BookService
from ledger_world import assert_balanced, kill, sums_on_disk
from loop_executor import in_loop
from postgres import is_postgres
from small_pool import POINTS, VERBS, Crash, CrashPoints, SmallPool

from evolink_async.ledger import JobLedger, Row, State, open_job, open_ledger

FAULTS = {
    "unsent": 0.1,
    "rate_limited": 0.1,
    "lost_before": 0.05,
    "lost_after": 0.05,
    "refused": 0.05,
    "in_progress": 0.05,
    "failed": 0.1,
    "cancelled": 0.05,
    "lost": 0.1,
}
LIVES = 150
PAID = (State.ACCEPTED, State.COMPLETED, State.CANCELLED, State.LOST)


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)


class Counting:
    """Dies at the nth time that a point is reached; counts all."""

    def __init__(self, point: str | None = None, nth: int = 0, chance: random.Random | None = None) -> None:
        self.point, self.nth, self.chance = point, nth, chance
        self.reached: Counter[str] = Counter()
        self.dead = False
        self.job: JobLedger | None = None

    def __call__(self, point: str) -> None:
        if self.dead:
            raise Crash  # nothing of this process goes on
        self.reached[point] += 1
        hit = point == self.point and self.reached[point] == self.nth
        if hit or (self.chance is not None and self.chance.random() < 0.01):
            self.dead = True
            assert self.job is not None
            kill(self.job)  # in this very moment: nothing more is written, whatever the loop still does
            raise Crash(point)


async def one_run(
    path: Path | str, service: BookService, names: list[str], counting: Counting, **options: Any
) -> dict[str, str] | None:
    """A run of the job to its end; None: it died."""
    job = counting.job = await open_job(path)
    service.reached = counting
    points: JobLedger = CrashPoints(job, counting)  # type: ignore[assignment]
    try:
        outcomes = await SmallPool(points, service, **options).run(names)
    except Crash:
        return None
    await job.aclose()
    return outcomes


async def rows_of(path: Path | str) -> list[Row]:
    async with open_ledger(path) as ledger:
        return [row async for row in ledger.job().rows()]


async def judge(
    path: Path | str, service: BookService, names: list[str], outcomes: dict[str, str], seed: object
) -> None:
    """Every request has one outcome, and the ledger says of the money what the book says."""
    assert sorted(outcomes) == sorted(names), seed
    assert_balanced(path)
    rows = {row.identity: row for row in await rows_of(path)}
    charges: dict[str, list[str]] = {name: [] for name in names}
    for charge in service.book:
        charges[charge.name].append(charge.task_id)
    async with open_ledger(path) as ledger:
        listed = {request.identity for request in await ledger.job().unknown()}
    twice = 0
    for name in names:
        row = rows[name]
        known = [task for task in (row.task_id, *(past.task_id for past in row.past)) if task is not None]
        assert len(known) == len(set(known)), seed
        assert set(known) <= set(charges[name]), (seed, name)
        unheard = len(charges[name]) - len(known)
        replays = sum(tried.replayed for tried in (row, *row.past))
        if row.state is State.UNSETTLED:
            assert unheard <= 1 + (0 if service.honours else replays), (seed, name)
            twice += max(0, unheard - 1)
            assert outcomes[name] == "unknown", seed
            assert name in listed, seed
        elif unheard:
            assert not service.honours, (seed, name)
            assert unheard <= replays, (seed, name)
            assert name in listed, (seed, name)
            twice += unheard
    assert twice <= 3, seed
    # To the micro-credit: everything that is paid or may be is in the sums.
    paid = sum(row.state in PAID for row in rows.values())
    unknown = sum(row.state is State.UNSETTLED for row in rows.values())
    assert sum(sums_on_disk(path)[:2]) == (paid + unknown) * PRICE * 1_000_000, seed


async def settled(
    path: Path | str, service: BookService, names: list[str], first: Counting, **options: Any
) -> dict[str, str]:
    """Runs of a job until one does not die."""
    outcomes = await one_run(path, service, names, first, **options)
    while outcomes is None:
        counting = Counting(chance=first.chance)
        outcomes = await one_run(path, service, names, counting, **options)
        first.reached += counting.reached
    return outcomes


@pytest.mark.parametrize("policy", ["replay", "hold"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_process_may_die_at_every_point(quick_path: Path, point: str, policy: str) -> None:
    if policy == "hold" and point.partition(" ")[2] in ("replay", "keys_are_honoured"):
        return  # nothing is sent again
    died, seed = 0, 0
    names = [f"r{number}" for number in range(12)]
    while died < 3:
        seed += 1
        assert seed < 400, "the point is not reached"
        path = quick_path / f"{seed}.db"
        service = BookService(random.Random(seed), honours=policy == "replay", faults=FAULTS)
        counting = Counting(point, nth=1 + died % 3)
        outcomes = await settled(path, service, names, counting, hold=policy == "hold", retry_failed=1)
        died += counting.dead
        await judge(path, service, names, outcomes, f"{point}, seed {seed}")
        again = await settled(path, service, names, Counting(), hold=policy == "hold", retry_failed=1)
        kept = {name: how for name, how in outcomes.items() if how not in ("unknown", "rejected")}
        assert {name: again[name] for name in kept} == kept


async def test_random_lives_of_a_job_end_with_the_money_of_the_book(new_ledger: Callable[[], Path | str]) -> None:
    alone = os.environ.get("LEDGER_SEED")
    reached: Counter[str] = Counter()
    states: Counter[str] = Counter()
    deaths = 0
    for seed in [int(alone)] if alone else range(LIVES):
        path = new_ledger()
        if is_postgres(path) and seed >= LIVES // 15:
            return  # they take longer; and rare ones may be missing among so few
        chance = random.Random(seed)
        faults = {name: likely * chance.choice([0, 1, 1, 3]) for name, likely in FAULTS.items()}
        service = BookService(random.Random(seed), honours=chance.random() < 0.6, faults=faults)
        hold = chance.random() < 0.3
        names = [f"r{number}" for number in range(chance.randrange(1, 40))]
        counting = Counting(chance=chance if chance.random() < 0.8 else None)
        outcomes = await settled(path, service, names, counting, hold=hold, retry_failed=chance.randrange(3))
        await judge(path, service, names, outcomes, f"seed {seed}")
        reached += counting.reached
        deaths += counting.dead
        states.update(row.state for row in await rows_of(path))
        if hold or not service.honours:
            for name, count in Counter(charge.key for charge in service.book).items():
                assert count == 1 or not hold, f"seed {seed}: {name} was charged {count} times"
    if not alone:
        assert deaths >= 60
        assert {point for point in POINTS if reached[point] < 20} == set()
        rare = {State.UNSETTLED, State.COMPLETED, State.FAILED, State.CANCELLED, State.LOST, State.REJECTED}
        assert {state for state in rare if states[state] < 20} == set()


def test_every_verb_of_a_pool_is_a_point() -> None:
    told_by_the_user = {"not_submitted", "given_up"}
    told = {
        name
        for name, value in vars(JobLedger).items()
        if callable(value) and "Future" in str(getattr(value, "__annotations__", {}).get("return", ""))
    }
    without_a_move = {"remember", "classify", "price_probe"}
    assert told - told_by_the_user - without_a_move - {"find", "_written", "_intended", "_done"} == set(VERBS)
