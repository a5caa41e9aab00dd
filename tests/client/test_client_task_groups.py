"""Our calls beside the caller's own in a TaskGroup: the fault of another ends them and costs no id (F133)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support import virtual_service

from evolink_async import AsyncEvoLink, ImageRequest

pytestmark = pytest.mark.looptime

BASE = "http://127.0.0.1:9"


def pictures(number: int) -> list[ImageRequest]:
    return [ImageRequest(model="gpt-4o-image", prompt=f"picture {n}") for n in range(number)]


async def fails_after(seconds: float) -> None:
    await asyncio.sleep(seconds)
    raise ValueError("somebody else's")


async def beside_a_fault(ours: Coroutine[Any, Any, None], seconds: float) -> None:
    task = None
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ours)
            group.create_task(fails_after(seconds))
    finally:
        assert task is not None
        assert task.cancelled()  # nobody ate the cancellation


async def generate(client: AsyncEvoLink) -> None:
    await client.images.generate(model="gpt-4o-image", prompt="a lighthouse")


async def run_many(client: AsyncEvoLink) -> None:
    await client.run_many(pictures(5))


async def pool(client: AsyncEvoLink) -> None:
    async with client.pool(pictures(5)) as pool:
        async for _ in pool:
            pass


async def submit_and_wait(client: AsyncEvoLink) -> None:
    task = await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
    await client.tasks.wait(task)


CALLS: dict[str, Callable[[AsyncEvoLink], Coroutine[Any, Any, None]]] = {
    "generate": generate,
    "run_many": run_many,
    "pool": pool,
    "submit and wait": submit_and_wait,
}


@pytest.mark.parametrize("seconds", [0.0, 1.0, 20.0], ids=["at once", "while it waits", "late"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_siblings_fault_is_the_only_error_and_every_paid_id_is_in_the_log(
    call: Callable[[AsyncEvoLink], Coroutine[Any, Any, None]],
    seconds: float,
    api_key: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with virtual_service(api_key) as (emulator, http_client):
        async with AsyncEvoLink(base_url=BASE, http_client=http_client) as client:
            with caplog.at_level(logging.INFO, "evolink_async"), pytest.raises(ExceptionGroup) as caught:
                await beside_a_fault(call(client), seconds)
            assert [type(error) for error in caught.value.exceptions] == [ValueError]
        told = "\n".join(record.getMessage() for record in caplog.records)
        paid = [post["task_id"] for post in emulator.book()["posts"]]
        assert paid or not seconds
        assert not [task_id for task_id in paid if task_id not in told]


async def test_a_timeout_of_the_caller_is_a_timeout_and_names_the_task(api_key: str) -> None:
    async with virtual_service(api_key) as (emulator, http_client):
        async with AsyncEvoLink(base_url=BASE, http_client=http_client) as client:
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(3):
                    await generate(client)
        [post] = emulator.book()["posts"]
        assert post["task_id"] in str(caught.value.__cause__.__notes__)  # type: ignore[union-attr]
