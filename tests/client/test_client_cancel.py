"""Cancellation at every step of the event loop: nothing is left running, and no accepted POST goes unmentioned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from canned import our_tasks
from support import virtual_service

from evolink_async import AsyncEvoLink, EvoLinkError, ImageRequest, Outcome, TaskPool

PICTURE = ImageRequest(model="gpt-4o-image", prompt="a lighthouse")
LATE = {"path": "/v1/images", "delay": 3}
TOO_LATE = {"path": "/v1/images", "delay": 8}  # later than the five seconds that a cancelled caller waits
LOST = {"path": "/v1/images", "drop": "after", "nth": [1]}


@dataclass
class Told:
    """What the caller of an operation holds in the end."""

    texts: list[str] = field(default_factory=list)
    pool: TaskPool | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    cancelled: bool = False


Operation = Callable[[AsyncEvoLink, Told], Awaitable[None]]


async def submit(client: AsyncEvoLink, told: Told) -> None:
    told.texts.append((await client.submit(PICTURE)).id)


async def run(client: AsyncEvoLink, told: Told) -> None:
    told.texts.append((await client.run(PICTURE)).id)


async def run_in_a_pool(client: AsyncEvoLink, told: Told) -> None:
    async with client.pool() as told.pool:
        told.outcomes.append(await told.pool.run(PICTURE))


async def iterate_a_pool(client: AsyncEvoLink, told: Told) -> None:
    async with client.pool([PICTURE] * 3, max_outstanding=2) as told.pool:
        async for outcome in told.pool:
            told.outcomes.append(outcome)
            await asyncio.sleep(0)


async def read(client: AsyncEvoLink, told: Told) -> None:
    await client.credits()
    await client.tasks.get_many(["task-unified-1-a", "task-unified-1-b"])
    [task async for task in client.tasks.list()]


async def wait_twice(client: AsyncEvoLink, told: Told) -> None:
    task = await client.submit(PICTURE)
    told.texts.append(task.id)
    await asyncio.gather(client.tasks.wait(task), client.tasks.wait(task.id))


@asynccontextmanager
async def cancelled_at(task: asyncio.Task[None], steps: tuple[int, ...]) -> AsyncIterator[None]:
    """Cancel `task` at these turns of the event loop, counted from here."""
    loop: Any = asyncio.get_running_loop()
    original, count = loop._run_once, 0

    def turn() -> None:
        nonlocal count
        count += 1
        if count in steps:
            task.cancel()
        original()

    loop._run_once = turn
    try:
        yield
    finally:
        loop._run_once = original


async def attempt(api_key: str, operation: Operation, steps: tuple[int, ...], **service: Any) -> tuple[Told, Any]:
    """One life of a client whose operation is cancelled at these steps."""
    async with virtual_service(api_key, seed=1, **service) as (emulator, http_client):
        async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client) as client:
            told = Told()
            task = asyncio.create_task(operation(client, told))  # type: ignore[arg-type]
            async with cancelled_at(task, steps):
                await asyncio.wait([task])
            told.cancelled = task.cancelled()
            try:
                await task
            except asyncio.CancelledError as cancellation:
                told.texts += getattr(cancellation, "__notes__", [])
            except (EvoLinkError, ExceptionGroup) as error:  # the operation ended by itself
                told.texts.append(str(error))
            session = client._core.session
            for _ in range(40):
                if not our_tasks():
                    break
                await asyncio.sleep(1)
            assert not our_tasks()
            assert session is None or session.transport.gate.in_use == 0
            assert session is None or len(session.watcher) == 0
            assert session is None or session.watcher._timer is None
        return told, emulator.book()


def check(told: Told, book: Any, caplog: pytest.LogCaptureFixture) -> None:
    known = list(told.texts)
    if told.pool is not None:
        for outcome in (*told.outcomes, *told.pool.leftovers):
            known += [outcome.task.id if outcome.task else "", outcome.idempotency_key or ""]
    known += [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    everything = "\n".join(known)
    for post in book["posts"]:
        assert post["task_id"] in everything or post["idempotency_key"] in everything, post


CASES: list[tuple[Operation, dict[str, Any]]] = [
    (submit, {}),
    (submit, {"faults": [LATE]}),
    (submit, {"faults": [TOO_LATE]}),
    (submit, {"faults": [LOST]}),
    (submit, {"rate": 0.01, "burst": 1, "faults": [{"path": "/v1/images", "status": 429, "nth": [1]}]}),
    (run, {"faults": [LATE]}),
    (wait_twice, {}),
    (read, {"faults": [{"path": "/v1/credits", "delay": 1}, {"path": "/v1/tasks", "delay": 1}]}),
    (run_in_a_pool, {"faults": [LATE]}),
    (iterate_a_pool, {"faults": [{**LATE, "nth": [1, 3]}]}),
]
NAMES = ["submit", "late", "too late", "lost", "429", "run", "wait", "read", "pool.run", "pool"]


# A pool has hundreds of steps: it is cancelled once at each of them.
EACH = [
    pytest.param(operation, service, again, id=f"{name}-{times}")
    for (operation, service), name in zip(CASES, NAMES, strict=True)
    for again, times in ((None, "once"), (2, "twice"))
    if not (operation is iterate_a_pool and again)
]


@pytest.mark.looptime
@pytest.mark.parametrize(("operation", "service", "again"), EACH)
async def test_cancelled_at_every_step_nothing_is_left_and_every_paid_post_is_mentioned(
    operation: Operation, service: dict[str, Any], again: int | None, api_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    step = 0
    while True:
        step += 1
        caplog.clear()
        steps = (step,) if again is None else (step, step + again)
        told, book = await attempt(api_key, operation, steps, **service)
        check(told, book, caplog)
        if not told.cancelled:
            break
        assert step < 3000
    print(f"cancelled at {step - 1} steps")
    assert step > 4
    assert all(post["idempotency_key"] for post in book["posts"])


@pytest.mark.parametrize("read_as_well", [False, True])
async def test_cancelled_at_every_step_over_tcp_no_slot_stays_in_use(
    emulator: Any, read_as_well: bool, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    step = 0
    cancelled = True
    while cancelled:
        step += 1
        async with AsyncEvoLink(base_url=emulator.base_url) as client:

            async def operation(client: AsyncEvoLink = client) -> None:
                await submit(client, told)
                if read_as_well:
                    await client.tasks.get_many([told.texts[-1], "task-unified-1-a"])

            task = asyncio.create_task(operation())
            async with cancelled_at(task, (step,)):
                await asyncio.wait([task])
            cancelled = task.cancelled()
            try:
                await task
            except asyncio.CancelledError as cancellation:
                told.texts += getattr(cancellation, "__notes__", [])
            for _ in range(200):
                if not our_tasks():
                    break
                await asyncio.sleep(0.001)
            assert not our_tasks()
            session = client._core.session
            assert session is None or session.transport.gate.in_use == 0
    assert step > 10
    print(f"cancelled at {step - 1} steps over TCP")
    check(told, emulator.emulator.book(), caplog)
