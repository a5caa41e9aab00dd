"""The world of the pool's tests: an emulator in process, a wire that counts and can be tampered with, a client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from evolink_async import AsyncEvoLink, ImageRequest, Outcome
from evolink_async.emulator import Emulator
from evolink_async.pool import TaskPool

MODEL = "gpt-4o-image"

Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


@dataclass
class Post:
    """One paid request as the service saw it."""

    arrived: float
    key: str
    answered: float | None = None
    status: int | None = None


@dataclass
class Wire(httpx.AsyncBaseTransport):
    """Carries requests to the emulator. `tamper(request, go_on)` may answer, raise or change anything."""

    emulator: Emulator
    tamper: Callable[[httpx.Request, Handler], Awaitable[httpx.Response]] | None = None
    posts: list[Post] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    flying: int = 0

    def __post_init__(self) -> None:
        self._inner = httpx.ASGITransport(app=self.emulator.app)  # type: ignore[arg-type]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/generations"):
            return await self._post(request)
        self.reads.append(request.url.path)
        return await self._carry(request)

    async def _post(self, request: httpx.Request) -> httpx.Response:
        now = asyncio.get_running_loop().time
        post = Post(now(), request.headers["idempotency-key"])
        self.posts.append(post)
        self.flying += 1
        try:
            response = await self._carry(request)
        finally:
            self.flying -= 1
        post.answered, post.status = now(), response.status_code
        return response

    async def _carry(self, request: httpx.Request) -> httpx.Response:
        if self.tamper is None:
            return await self._inner.handle_async_request(request)
        return await self.tamper(request, self._inner.handle_async_request)

    @property
    def running(self) -> int:
        """Tasks that run at the service."""
        return sum(post["status"] in ("pending", "processing") for post in self.emulator.book()["posts"])


@dataclass
class World:
    emulator: Emulator
    wire: Wire
    client: AsyncEvoLink

    def pool(self, *args: Any, **options: Any) -> TaskPool:
        return self.client.pool(*args, **options)

    @property
    def book(self) -> list[dict[str, Any]]:
        """Every accepted POST."""
        posts: list[dict[str, Any]] = self.emulator.book()["posts"]
        return posts


@asynccontextmanager
async def world(
    api_key: str, client_options: dict[str, Any] | None = None, **emulator_options: Any
) -> AsyncIterator[World]:
    """On the loop's clock, which in these tests is virtual."""
    emulator = Emulator(clock=asyncio.get_running_loop().time, api_key=api_key, **emulator_options)
    wire = Wire(emulator)
    async with httpx.AsyncClient(transport=wire) as http_client:  # noqa: SIM117
        async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client, **client_options or {}) as client:
            yield World(emulator, wire, client)


def image(name: object = 0, **params: Any) -> ImageRequest:
    return ImageRequest(model=MODEL, prompt=f"picture {name}", **params)


def images(count: int, start: int = 0) -> list[ImageRequest]:
    return [image(number, key=f"k{number}") for number in range(start, start + count)]


async def drain(pool: TaskPool) -> list[Outcome]:
    return [outcome async for outcome in pool]


def now() -> float:
    return asyncio.get_running_loop().time()


async def turns(count: int = 10) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


def task_json(task_id: str, status: str, **more: Any) -> dict[str, Any]:
    return {"id": task_id, "status": status, "model": MODEL, "type": "image", "progress": 0} | more


def answering(
    rule: Callable[[httpx.Request], tuple[int, Any] | None],
) -> Callable[[httpx.Request, Handler], Awaitable[httpx.Response]]:
    """A tamper that answers what `rule` gives, and lets pass what it gives None for."""

    async def tamper(request: httpx.Request, go_on: Handler) -> httpx.Response:
        answer = rule(request)
        if answer is None:
            return await go_on(request)
        return response(*answer)

    return tamper


class _Body(httpx.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content


def response(status: int, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.Response(status, headers=headers, stream=_Body(content))


class Canned(httpx.AsyncBaseTransport):
    """A service that finishes every task at once and remembers nothing."""

    def __init__(self) -> None:
        self.count = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            task_id = request.url.path.rpartition("/")[2]
        else:
            self.count += 1
            task_id = f"task-{self.count}"
        body = task_json(task_id, "completed", results=[f"https://files.example/{task_id}.png"])
        return response(200, body)
