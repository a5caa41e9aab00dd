"""A loop may make tasks that begin at once (`asyncio.eager_task_factory`): ours begin when we know them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pool_world import drain, images, world

import evolink_async
from evolink_async import ImageRequest

pytestmark = pytest.mark.looptime

PACKAGE = Path(evolink_async.__file__).parent
APART = {PACKAGE / room for room in ("emulator", "testing", "cli")}


def is_ours(code: Any) -> bool:
    path = Path(code.co_filename)
    return PACKAGE in path.parents and not APART.intersection(path.parents)


async def test_no_task_of_ours_is_left_to_the_loops_task_factory(api_key: str) -> None:
    left_to_the_factory: list[str] = []

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        if is_ours(coro.cr_code):
            left_to_the_factory.append(coro.__qualname__)
        return asyncio.Task(coro, loop=loop, **options)

    async def some() -> AsyncIterator[ImageRequest]:
        for request in images(5):
            yield request

    async with world(api_key) as w:
        asyncio.get_running_loop().set_task_factory(factory)
        try:
            task = await w.client.run(images(1)[0])
            assert list(await w.client.tasks.get_many([task.id, task.id + "x"])) == [task.id]
            async with w.pool(some()) as pool:
                pool.add(images(5, start=5))
                assert all(outcome.ok for outcome in await drain(pool))
        finally:
            asyncio.get_running_loop().set_task_factory(None)
    assert left_to_the_factory == []
