"""A pooler of transactions before a PostgreSQL server, as PgBouncer can be: each may get another connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg

_IDLE = b"Z\0\0\0\x05I"  # ends every answer after which no transaction is open
_SETTINGS = {"server_version": "16.0", "client_encoding": "UTF8", "server_encoding": "UTF8"}


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + (len(body) + 4).to_bytes(4) + body


class Pooler:
    """It lets everybody in. The connections take turns."""

    def __init__(self, url: str, connections: int) -> None:
        self._connections = [psycopg.connect(url, autocommit=True) for _ in range(connections)]
        self._free = deque(socket.socket(fileno=os.dup(connection.fileno())) for connection in self._connections)
        for server in self._free:
            server.setblocking(False)

    def close(self) -> None:
        for server in self._free:
            server.close()
        for connection in self._connections:
            connection.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await self._greet(reader, writer)
            await self._pass_on(reader, writer)
        writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            size = int.from_bytes(await reader.readexactly(4))
            asked = await reader.readexactly(size - 4)
            if asked.startswith(b"\0\3"):
                break
            writer.write(b"N")  # no encryption
        settings = (_message(b"S", f"{name}\0{value}\0".encode()) for name, value in _SETTINGS.items())
        writer.write(_message(b"R", bytes(4)) + b"".join(settings) + _message(b"K", bytes(8)) + _IDLE)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        server: socket.socket | None = None
        try:
            while (asked := await reader.read(65536)) and asked[:1] != b"X":
                server = server or self._free.popleft()
                await loop.sock_sendall(server, asked)
                with contextlib.suppress(TimeoutError):  # it waits for more of the client's
                    while True:
                        async with asyncio.timeout(0.05):
                            answer = await loop.sock_recv(server, 65536)
                        writer.write(answer)
                        if answer.endswith(_IDLE):
                            self._free.append(server)
                            server = None
                            break
        finally:
            if server is not None:
                self._free.append(server)


@asynccontextmanager
async def pooling(url: str, connections: int = 3) -> AsyncIterator[int]:
    """The port of a pooler of transactions."""
    pooler = Pooler(url, connections)
    try:
        async with await asyncio.start_server(pooler.serve, "127.0.0.1", 0) as listening:
            yield listening.sockets[0].getsockname()[1]
    finally:
        pooler.close()
