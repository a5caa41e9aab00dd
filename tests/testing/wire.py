"""Both ends of a connection through a proxy, as bare sockets: what a client and a server see that are not ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from evolink_async.testing import FaultProxy


@dataclass
class Peer:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reads(self) -> list[tuple[float, bytes]]:
        """Everything up to the end, read by read, each with the loop's time."""
        loop = asyncio.get_running_loop()
        seen = []
        while data := await self.reader.read(2**20):
            seen.append((loop.time(), data))
        return seen


@dataclass
class Line:
    """A connection through the proxy."""

    client: Peer
    server: Peer

    def along(self, stream: str) -> tuple[Peer, Peer]:
        """Who sends and who receives on this stream."""
        return (self.client, self.server) if stream == "upstream" else (self.server, self.client)


@dataclass
class World:
    """A bare server, and the proxy in front of it."""

    proxy: FaultProxy
    _accepted: asyncio.Queue[Peer] = field(default_factory=asyncio.Queue)
    _peers: list[Peer] = field(default_factory=list)

    async def connect(self) -> Peer:
        """A client's connection to the proxy."""
        peer = Peer(*await asyncio.open_connection(*self.proxy.address))
        self._peers.append(peer)
        return peer

    async def line(self) -> Line:
        """A connection with both its ends."""
        return Line(await self.connect(), await self._accepted.get())


@asynccontextmanager
async def world(seed: int = 0) -> AsyncIterator[World]:
    """A server that leaves its connections to the test, and an enabled proxy in front of it."""

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        here._peers.append(peer)
        here._accepted.put_nowait(peer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with FaultProxy(f"127.0.0.1:{port}", seed=seed) as proxy:
            here = World(proxy)
            yield here
    finally:
        server.close()
        for peer in here._peers:
            peer.writer.transport.abort()
        for _ in range(2):
            await asyncio.sleep(0)
