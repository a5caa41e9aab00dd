"""The gate: fair inside a lane, fair between lanes, and no place is ever lost."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from evolink_async.http.gate import LANES, Gate, Lane


async def settle() -> None:
    """Let every task run until it waits for something."""
    for _ in range(5):
        await asyncio.sleep(0)


class Crowd:
    """Tasks that take a place, write their name down, and keep it until told."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.served: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def join(self, lane: Lane, *names: str) -> None:
        for name in names:
            self.tasks[name] = asyncio.create_task(self._take(lane, name))
        await settle()

    async def _take(self, lane: Lane, name: str) -> None:
        await self.gate.acquire(lane)
        self.served.append(name)

    async def release(self, lane: Lane, times: int = 1) -> None:
        for _ in range(times):
            self.gate.release(lane)
        await settle()


def assert_clean(gate: Gate) -> None:
    assert (gate.in_use, gate.waiting) == (0, 0), gate


@pytest.mark.parametrize(("total", "limit"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6), (100, 75)])
async def test_a_lane_never_takes_the_reserve(total: int, limit: int) -> None:
    gate = Gate(total)
    assert gate.lane_limit == limit
    assert [gate.try_acquire("read") for _ in range(total + 1)].count(True) == limit
    assert [gate.try_acquire("submit") for _ in range(total + 1)].count(True) == total - limit
    assert gate.in_use == total


async def test_first_come_first_served_within_a_lane() -> None:
    gate = Gate(2)
    crowd = Crowd(gate)
    await crowd.join("read", "a", "b", "c", "d")
    assert crowd.served == ["a"]
    await crowd.release("read", 3)
    assert crowd.served == ["a", "b", "c", "d"]


async def test_nobody_barges_past_a_waiter() -> None:
    gate = Gate(1)
    crowd = Crowd(gate)
    await crowd.join("read", "a", "b")
    gate.release("read")
    # The place belongs to b already, although b's task has not run yet.
    assert not gate.try_acquire("read")
    assert not gate.try_acquire("submit")
    await settle()
    assert crowd.served == ["a", "b"]


async def test_lanes_take_turns_when_both_wait() -> None:
    gate = Gate(1)
    crowd = Crowd(gate)
    await crowd.join("read", "r0", "r1", "r2", "r3")
    await crowd.join("submit", "s1", "s2")
    turns: list[Lane] = ["read", "submit", "read", "submit", "read"]
    for lane in turns:
        await crowd.release(lane)
    assert crowd.served == ["r0", "s1", "r1", "s2", "r2", "r3"]


@pytest.mark.parametrize("busy", LANES)
async def test_a_flood_in_one_lane_does_not_starve_the_other(busy: Lane) -> None:
    gate = Gate(8)
    crowd = Crowd(gate)
    await crowd.join(busy, *(f"flood{i}" for i in range(1000)))
    other: Lane = "read" if busy == "submit" else "submit"
    await crowd.join(other, "x", "y")
    assert crowd.served[-2:] == ["x", "y"], "the reserve serves the other lane at once"


async def test_a_place_no_waiter_may_have_stays_free_for_the_other_lane() -> None:
    gate = Gate(4)
    crowd = Crowd(gate)
    await crowd.join("read", "r1", "r2", "r3", "r4")
    await crowd.join("submit", "s1")
    await crowd.release("submit")
    assert crowd.served == ["r1", "r2", "r3", "s1"], "r4 would take the reserve"
    await crowd.release("read")
    assert crowd.served[-1] == "r4"


async def test_cancelling_a_waiter_removes_it() -> None:
    gate = Gate(1)
    crowd = Crowd(gate)
    await crowd.join("read", "a", "b", "c")
    crowd.tasks["b"].cancel()
    await settle()
    assert gate.waiting == 1
    await crowd.release("read")
    assert crowd.served == ["a", "c"]


async def test_a_waiter_cancelled_with_its_place_in_hand_passes_it_on() -> None:
    gate = Gate(1)
    crowd = Crowd(gate)
    await crowd.join("read", "a", "b", "c")
    gate.release("read")  # b has the place from here on ...
    crowd.tasks["b"].cancel()  # ... and learns of its cancellation first
    await settle()
    assert crowd.served == ["a", "c"]
    await crowd.release("read")
    assert_clean(gate)


async def test_a_waiter_cancelled_before_the_release_is_skipped() -> None:
    gate = Gate(1)
    crowd = Crowd(gate)
    await crowd.join("read", "a", "b", "c")
    crowd.tasks["b"].cancel()
    gate.release("read")  # b's task has not run yet: its future is cancelled and still in the queue
    await settle()
    assert crowd.served == ["a", "c"]


async def test_cancelled_waiters_leave_nothing_behind_while_nobody_releases() -> None:
    gate = Gate(1)
    gate.try_acquire("read")
    for _ in range(1000):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await gate.acquire("read")
    assert gate.waiting == 0
    assert gate.waiting_in("read") == 0


async def test_ten_thousand_waiters_and_random_cancellations_lose_no_place() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    gate = Gate(20)
    most: dict[Lane, int] = dict.fromkeys(LANES, 0)

    async def use(lane: Lane) -> None:
        await gate.acquire(lane)
        try:
            most[lane] = max(most[lane], gate.used_by(lane))
            assert gate.in_use <= gate.total
            for _ in range(dice.randrange(3)):
                await asyncio.sleep(0)
        finally:
            gate.release(lane)

    tasks = [asyncio.create_task(use(dice.choice(LANES))) for _ in range(10_000)]
    victims = dice.sample(tasks, 5_000)
    while victims:
        for victim in (victims.pop() for _ in range(min(dice.randrange(1, 20), len(victims)))):
            victim.cancel()
        await asyncio.sleep(0)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ended} == {type(None), asyncio.CancelledError}
    assert_clean(gate)
    assert max(most.values()) <= gate.lane_limit
    assert [gate.try_acquire("read") for _ in range(16)].count(True) == gate.lane_limit


async def test_the_cost_does_not_grow_with_the_queue() -> None:
    async def seconds_per_waiter(n: int) -> float:
        gate = Gate(1)
        gate.try_acquire("read")
        start = time.process_time()
        tasks = [asyncio.create_task(gate.acquire("read")) for _ in range(n)]
        await settle()
        for _ in range(n):
            gate.release("read")
        await asyncio.gather(*tasks)
        return (time.process_time() - start) / n

    small, large = await seconds_per_waiter(1_000), await seconds_per_waiter(20_000)
    assert large < 10 * small, "twenty times the queue, about the same cost each"


def test_it_outlives_an_event_loop() -> None:
    gate = Gate(1)

    async def use() -> None:
        await gate.acquire("read")
        waiter = asyncio.create_task(gate.acquire("submit"))
        await settle()
        gate.release("read")
        await waiter
        gate.release("submit")

    asyncio.run(use())
    asyncio.run(use())
    assert_clean(gate)


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one place, got 0"):
        Gate(0)
    gate = Gate(2)
    gate.try_acquire("read")
    with pytest.raises(RuntimeError, match="lane 'submit'"):
        gate.release("submit")


async def test_repr_counts() -> None:
    gate = Gate(1)
    gate.try_acquire("submit")
    waiter = asyncio.create_task(gate.acquire("read"))
    await settle()
    assert repr(gate) == "<Gate 1/1 (submit: 1 in use + 0 waiting, read: 0 in use + 1 waiting)>"
    gate.release("submit")
    await waiter
