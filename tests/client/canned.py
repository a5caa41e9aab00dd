"""Clients whose service is a function."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from evolink_async import AsyncEvoLink

BASE = "http://127.0.0.1:9"


@asynccontextmanager
async def canned(handler: Callable[[httpx.Request], Any], **options: Any) -> AsyncIterator[AsyncEvoLink]:
    """A client whose service is `handler`: it returns JSON, an `httpx.Response`, or raises; it may be a coroutine."""

    async def respond(request: httpx.Request) -> httpx.Response:
        value = handler(request)
        if inspect.isawaitable(value):
            value = await value
        return value if isinstance(value, httpx.Response) else httpx.Response(200, json=value)

    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(respond)) as http_client,
        AsyncEvoLink(base_url=BASE, http_client=http_client, **options) as client,
    ):
        yield client


def error(status: int, code: str = "some_code", message: str = "no", **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "message": message}}, headers=headers)


def body_of(request: httpx.Request) -> Any:
    return json.loads(request.content)


def our_tasks() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("evolink ")]
