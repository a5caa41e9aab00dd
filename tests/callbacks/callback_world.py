"""The world of the callbacks' tests: an emulator in process, a wire that counts looks, and a caller of ASGI apps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from evolink_async import AsyncEvoLink, ImageRequest
from evolink_async.callbacks import CallbackReceiver
from evolink_async.emulator import Emulator

MODEL = "gpt-4o-image"
SECRET = "a secret of the tests, 40 characters long"
PUBLIC = "http://127.0.0.1:9/evolink"
EPOCH = 1_764_000_000  # the emulator's clock when the loop's begins


@dataclass
class Wire(httpx.AsyncBaseTransport):
    """Carries requests to the emulator, and counts those that look at tasks."""

    emulator: Emulator
    tamper: Callable[[httpx.Request], Any] | None = None
    looks: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inner = httpx.ASGITransport(app=self.emulator.app)  # type: ignore[arg-type]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path.endswith("/generations"):
            self.bodies.append(json.loads(request.content))
        elif path == "/v1/tasks/batch":
            self.looks += json.loads(request.content)["task_ids"]
        elif path.startswith("/v1/tasks/"):
            self.looks.append(path.rpartition("/")[2])
            self.times.append(now())
        if self.tamper is not None:
            answer = self.tamper(request)
            if answer is not None:
                return httpx.Response(answer[0], stream=_Body(json.dumps(answer[1]).encode()))
        return await self._inner.handle_async_request(request)


class _Body(httpx.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content


@dataclass
class World:
    emulator: Emulator
    wire: Wire
    client: AsyncEvoLink

    @property
    def book(self) -> list[dict[str, Any]]:
        """Every accepted POST."""
        posts: list[dict[str, Any]] = self.emulator.book()["posts"]
        return posts

    def receiver(self, target: Any = None, **options: Any) -> CallbackReceiver:
        return CallbackReceiver(target or self.client, **{"public_url": PUBLIC, "secret": SECRET} | options)

    def looks_at(self, task_id: str) -> int:
        return self.wire.looks.count(task_id)


@asynccontextmanager
async def world(
    api_key: str, client_options: dict[str, Any] | None = None, **emulator_options: Any
) -> AsyncIterator[World]:
    """On the loop's clock, which in these tests is virtual."""
    options: dict[str, Any] = {"private_callbacks": True, "models": {"*": {"bias": 1, "sigma": 0}}, **emulator_options}
    emulator = Emulator(clock=lambda: EPOCH + now(), api_key=api_key, **options)
    wire = Wire(emulator)
    async with httpx.AsyncClient(transport=wire) as http_client:  # noqa: SIM117
        async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client, **client_options or {}) as client:
            yield World(emulator, wire, client)
            await emulator.aclose()


@asynccontextmanager
async def restarted(w: World, api_key: str, **options: Any) -> AsyncIterator[World]:
    """The client of another process: it has learned nothing yet."""
    async with httpx.AsyncClient(transport=w.wire) as http_client:  # noqa: SIM117
        async with AsyncEvoLink(api_key, base_url="http://127.0.0.1", http_client=http_client, **options) as client:
            yield World(w.emulator, w.wire, client)


def image(name: object = 0, **params: Any) -> ImageRequest:
    return ImageRequest(model=MODEL, prompt=f"picture {name}", **params)


def images(count: int) -> list[ImageRequest]:
    return [image(number, key=f"k{number}") for number in range(count)]


def now() -> float:
    return asyncio.get_running_loop().time()


def wall_clock() -> datetime:
    """The emulator's clock."""
    return datetime.fromtimestamp(EPOCH + now(), UTC)


def path_of(url: str) -> str:
    return urlsplit(url).path


def told(task_id: object, status: str = "completed", **more: Any) -> bytes:
    return json.dumps({"id": task_id, "status": status, **more}).encode()


async def call(
    app: Any,
    path: str,
    body: bytes | Iterable[bytes] = b"",
    *,
    method: str = "POST",
    headers: Iterable[tuple[bytes, bytes]] = (),
    scope: dict[str, Any] | None = None,
    gone: bool = False,
    stuck: bool = False,
) -> tuple[int | None, dict[bytes, bytes]]:
    """Call an ASGI app as a server does: the status and headers of its answer, None if there is none.

    gone: the caller goes before the body has ended; stuck: it sends no more.
    """
    chunks = [body] if isinstance(body, bytes) else body
    pieces = iter(chunks)
    following = next(pieces, b"")
    ended = False
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal following, ended
        if ended:
            if stuck:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}
        chunk = following
        rest = next(pieces, None)
        ended = rest is None
        following = rest or b""
        return {"type": "http.request", "body": chunk, "more_body": not ended or gone or stuck}

    async def send(message: Any) -> None:
        answers.append(dict(message))

    whole = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "root_path": "",
        "query_string": b"",
        "headers": list(headers),
    } | (scope or {})
    await app(whole, receive, send)
    if not answers:
        return None, {}
    start, *rest_of_answer = answers
    assert [message["type"] for message in answers] == ["http.response.start", "http.response.body"]
    assert rest_of_answer[0]["body"] == b""
    return start["status"], dict(start["headers"])


async def status(app: Any, path: str, body: bytes | Iterable[bytes] = b"", **how: Any) -> int | None:
    return (await call(app, path, body, **how))[0]


async def turns(count: int = 30) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)
