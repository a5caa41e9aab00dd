"""How many requests the watcher sends for many tasks: no more than there may be, full batches, and nobody starves."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from watching import FakeReader, done, fresh, refusal, running, watching

from evolink_async.errors import EvoLinkError
from evolink_async.polling.schedule import PRICE, Schedule
from evolink_async.polling.watcher import Learned, Watcher
from evolink_async.types import Task, TaskReading

ESTIMATE = 100.0


class World:
    """Tasks that end on their own, around their estimate, and a watcher that is told of each as it is submitted."""

    def __init__(self, seed: int = 1) -> None:
        self.dice = random.Random(seed)
        self.ends: dict[str, float] = {}
        self.delays: list[float] = []
        self.unfinished = 0

    def look(self, task_id: str) -> Any:
        return (done if self.ends[task_id] <= now() else running)(task_id)

    def batch(self, ids: list[str]) -> Any:
        return {"data": [self.look(task_id) for task_id in ids]}

    def submit(self, watcher: Watcher) -> None:
        task_id = f"task-{len(self.ends)}"
        self.ends[task_id] = now() + ESTIMATE * math.exp(self.dice.gauss(0.0, 0.2))
        self.unfinished += 1
        watcher.follow(TaskReading.of(fresh(task_id, ESTIMATE, model="m")), self, age=0.0)

    async def run(self, watcher: Watcher, count: int, per_second: float) -> None:
        for _ in range(count):
            self.submit(watcher)
            await asyncio.sleep(1 / per_second)
        while True:
            if not self.unfinished:
                return
            await asyncio.sleep(1)

    def seen(self, reading: TaskReading) -> None:
        pass

    def ended(self, task: Task) -> None:
        self.unfinished -= 1
        self.delays.append(now() - self.ends[task.id])

    def lost(self, error: EvoLinkError) -> None:
        raise error

    crashed = lost


def now() -> float:
    return asyncio.get_running_loop().time()


def learned(**fields: Any) -> Learned:
    return Learned(**fields)


def busiest(reader: FakeReader, seconds: float = 10.0) -> float:
    """The most requests per second over any of so many seconds."""
    return max(Counter(int(at / seconds) for at in reader.times()).values()) / seconds


@pytest.mark.looptime
async def test_many_tasks_take_no_more_requests_than_there_may_be_and_all_are_found() -> None:
    world, single = World(), learned(batches=False)
    reader = FakeReader(world.look)
    options: dict[str, Any] = {"schedule": Schedule(), "learned": single, "random": None, "requests_per_second": 8.0}
    async with watching(reader, **options) as watcher:
        await world.run(watcher, 500, 3.0)  # about 300 outstanding: unbounded they would take 30 looks a second
    assert busiest(reader) <= 8.0 + 1.2  # ten may come at once
    assert statistics.mean(world.delays) < 20
    assert max(world.delays) < 75


@pytest.mark.looptime
async def test_in_batches_a_thousand_tasks_of_a_known_model_take_a_third_of_a_request_each() -> None:
    world = World()
    reader = FakeReader(world.look, world.batch)
    async with watching(reader, schedule=Schedule(), random=None) as watcher:
        await world.run(watcher, 500, 15.0)
        before = len(reader.calls)
        await world.run(watcher, 1500, 15.0)
    assert (len(reader.calls) - before) / 1500 < 0.4  # while there are few, at both ends, requests are not full
    assert statistics.mean(world.delays[500:]) < 2.5


@pytest.mark.looptime
async def test_in_batches_few_tasks_take_fewer_requests_and_are_found_no_later_than_one_by_one() -> None:
    requests, delays = [], []
    for batches in (True, False):
        world = World()
        reader = FakeReader(world.look, world.batch)
        async with watching(reader, schedule=Schedule(), learned=learned(batches=batches), random=None) as watcher:
            await world.run(watcher, 300, 0.4)  # about 40 outstanding
        requests.append(len(reader.calls) / 300)
        delays.append(statistics.mean(world.delays))
    assert requests[0] < requests[1] / 3
    assert delays[0] < delays[1]


@pytest.mark.looptime
async def test_few_tasks_are_looked_at_as_often_as_it_is_worth() -> None:
    world, schedule = World(), Schedule()
    async with watching(
        FakeReader(world.look), schedule=schedule, learned=learned(batches=False), random=None
    ) as watcher:
        await world.run(watcher, 20, 1.0)
    assert schedule.price == PRICE


@pytest.mark.looptime
async def test_a_refusal_lowers_the_requests_there_may_be_and_time_raises_them_again() -> None:
    world, known = World(), learned(batches=False)
    served: Callable[[str], Any] = world.look
    level, at = 5.0, 0.0  # a service that takes 10 reads a second, 5 at once

    def limited(task_id: str) -> Any:
        nonlocal level, at
        level, at = min(5.0, level + 10 * (now() - at)), now()
        if level < 1:
            return refusal(429, headers={"retry-after": "1"})
        level -= 1
        return served(task_id)

    reader = FakeReader(limited)
    async with watching(reader, schedule=Schedule(), learned=known, random=None) as watcher:
        await world.run(watcher, 300, 3.0)
        lowered = known.requests_per_second
        assert 3 < lowered < 30
        await world.run(watcher, 10, 1.0)
        assert known.requests_per_second > lowered
    assert statistics.mean(world.delays[100:]) < 10  # a burst after each pause, refused again, would double it
