"""A media host on loopback that answers as badly as a test asks it to."""

from __future__ import annotations

import asyncio
import io
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Call:
    """One request that came in."""

    number: int
    path: str
    headers: dict[str, str]


Handler = Callable[[Call, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class MediaHost:
    """The running host: its address, and what it was asked."""

    port: int = 0
    calls: list[Call] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def media_host(handler: Handler) -> AsyncIterator[MediaHost]:
    """Every connection carries one request, which `handler` answers; then it is closed."""
    host = MediaHost()
    running: set[asyncio.Task[None]] = set()
    writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        writers.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            host.calls.append(Call(len(host.calls) + 1, head[0].split(" ")[1], headers))
            await handler(host.calls[-1], writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            running.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        server.close()
        for _ in range(10):  # connections that were just being made are served after the first round
            for task in list(running):
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for writer in list(writers):
                writer.transport.abort()  # it may still have bytes for somebody who has left
            await asyncio.sleep(0)


def answer(
    writer: asyncio.StreamWriter, body: bytes = b"", status: str = "200 OK", length: int | None = -1, **headers: str
) -> None:
    """Write an answer. length: another Content-Length than the true one; None: none at all."""
    lines = [f"HTTP/1.1 {status}", "connection: close"]
    if length is not None:
        lines.append(f"content-length: {len(body) if length < 0 else length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)


def picture(side: int = 64, colour: int = 0x336699) -> bytes:
    """A real PNG."""
    out = io.BytesIO()
    Image.effect_noise((side, side), 60 + colour % 7).save(out, "PNG")
    return out.getvalue()
