"""A TCP relay that remembers what the client said on each connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Wiretap:
    """The running relay: its address, and the client's bytes by connection."""

    base_url: str = ""
    said: list[bytearray] = field(default_factory=list)

    def media_connections(self) -> list[bytes]:
        """What was said on connections on which a result was asked for."""
        return [bytes(said) for said in self.said if b" /results/" in said]


@asynccontextmanager
async def wiretap(upstream: str) -> AsyncIterator[Wiretap]:
    """Relay to `upstream`, a URL, from a port of its own."""
    tap = Wiretap()
    host, port = urlsplit(upstream).hostname, urlsplit(upstream).port
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        said = bytearray()
        tap.said.append(said)
        sides = [writer]
        back: asyncio.Task[None] | None = None
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
            sides.append(far_writer)
            back = asyncio.create_task(_pump(far_reader, writer, None))
            running.add(back)
            back.add_done_callback(running.discard)
            await _pump(reader, far_writer, said)
            await back
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for side in sides:  # without an await before it: this may be cancelled once more
                side.transport.abort()
            if back is not None:
                back.cancel()
            running.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    tap.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield tap
    finally:
        server.close()
        for _ in range(10):  # connections that were just being made are served after the first round
            for task in list(running):
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.sleep(0)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytearray | None) -> None:
    try:
        while data := await reader.read(65536):
            if said is not None:
                said += data
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except (OSError, RuntimeError):
        writer.transport.abort()
