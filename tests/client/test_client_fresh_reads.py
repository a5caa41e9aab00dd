"""A cache on the way to the service, which answers a poll with what it has unless it is told not to (F60)."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from canned import canned

pytestmark = pytest.mark.looptime

LINK = "https://files.example/a.png"


class Cache:
    """Before a service whose task ends after a minute. It asks the service again only for who says `no-cache`."""

    def __init__(self) -> None:
        self.kept: dict[str, httpx.Response] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(404)  # no batches
        path = request.url.path
        if path not in self.kept or "no-cache" not in request.headers.get("cache-control", ""):
            self.kept.setdefault(path, self.service())
        else:
            self.kept[path] = self.service()
        kept = self.kept[path]
        return httpx.Response(200, content=kept.content, headers={"age": "30"})

    def service(self) -> httpx.Response:
        over = asyncio.get_running_loop().time() >= 60
        state = {"status": "completed", "results": [LINK]} if over else {"status": "processing"}
        return httpx.Response(200, json={"id": "task-1"} | state)


async def test_a_cache_on_the_way_does_not_hide_the_end_of_a_task() -> None:
    async with canned(Cache()) as client:
        task = await client.tasks.wait("task-1", timeout=600)
    assert task.urls == (LINK,)
    assert asyncio.get_running_loop().time() < 120


async def test_a_single_look_is_fresh_too() -> None:
    async with canned(Cache()) as client:
        assert not (await client.tasks.get("task-1")).is_terminal
        await asyncio.sleep(60)
        assert (await client.tasks.get("task-1")).succeeded
