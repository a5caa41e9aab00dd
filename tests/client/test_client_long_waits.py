"""A wait that lasts a virtual month, and polls that are slower than their pauses (F13, F112)."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest
from canned import canned

pytestmark = pytest.mark.looptime

LINK = "https://files.example/a.png"
DAY = 86_400.0


def now() -> float:
    return asyncio.get_running_loop().time()


def state_of(task_id: str, *, over: bool) -> dict[str, object]:
    rest = {"status": "completed", "results": [LINK]} if over else {"status": "processing", "progress": 40}
    return {"id": task_id, "model": "gpt-4o-image", "task_info": {"estimated_time": 60}, **rest}


async def test_a_wait_of_a_month_looks_rarely_and_piles_up_neither_timers_nor_tasks() -> None:
    loop = asyncio.get_running_loop()
    polls = 0
    kept: list[tuple[int, int]] = []

    def service(request: httpx.Request) -> object:
        nonlocal polls
        polls += 1
        if now() >= DAY * (len(kept) + 1):
            kept.append((len(loop._scheduled), len(asyncio.all_tasks())))  # type: ignore[attr-defined]
        return state_of("task-1", over=now() >= 30 * DAY)

    async with canned(service) as client:
        task = await client.tasks.wait("task-1", timeout=None)
    assert task.urls == (LINK,)
    assert 30 * DAY <= now() < 30 * DAY + 1800
    assert polls < 30 * 24 * 60  # not even one a minute
    assert len(kept) == 30
    assert max(timers for timers, _ in kept) <= 10
    assert max(tasks for _, tasks in kept) <= 5


async def test_polls_that_take_longer_than_the_pauses_between_them_never_overlap() -> None:
    asked: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def service(request: httpx.Request) -> object:
        if request.method == "POST":
            return httpx.Response(404)  # no batches
        task_id = request.url.path.rpartition("/")[2]
        asked[task_id] += 1
        most[task_id] = max(most[task_id], asked[task_id])
        try:
            await asyncio.sleep(30)  # twice as long as the client waits for an answer
            return state_of(task_id, over=True)
        finally:
            asked[task_id] -= 1

    ids = [f"task-{number}" for number in range(20)]
    async with canned(service) as client:
        waits = [asyncio.create_task(client.tasks.wait(task_id, timeout=600)) for task_id in ids]
        waits += [asyncio.create_task(client.tasks.wait(task_id, timeout=600)) for task_id in ids]  # each twice
        await asyncio.sleep(300)
        assert set(most) == set(ids)
        assert set(most.values()) == {1}
        assert not any(wait.done() for wait in waits)  # nobody was answered within the 15 s that a poll has
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def test_answers_that_come_late_but_in_time_end_the_wait() -> None:
    async def service(request: httpx.Request) -> object:
        if request.method == "POST":
            return httpx.Response(404)
        task_id = request.url.path.rpartition("/")[2]
        if task_id in answered:
            pauses.append(now() - answered[task_id])
        await asyncio.sleep(14)
        answered[task_id] = now()
        return state_of(task_id, over=now() > 100)

    answered: dict[str, float] = {}
    pauses: list[float] = []
    async with canned(service) as client:
        tasks = await asyncio.gather(*(client.tasks.wait(f"task-{number}", timeout=600) for number in range(100)))
    assert all(task.succeeded for task in tasks)
    assert now() < 300
    assert min(pauses) >= 2 / 3  # a slow service is not asked again as soon as it has answered
