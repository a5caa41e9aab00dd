"""A client of bare sockets: it sees what is on the wire, and when the connection ends and how."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from evolink_async.emulator import Server


@dataclass
class Seen:
    """What came back: everything until the end of the connection, or until patience ran out."""

    data: bytes
    end: str  # closed, reset or open
    seconds: float

    @property
    def head(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1])

    def header(self, name: str) -> str | None:
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name:
                return value.strip()
        return None


async def exchange(
    server: Server,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    patience: float = 5.0,
    most: int = 10**6,
) -> Seen:
    """Send one request and read until the connection ends, ``most`` bytes are there, or ``patience`` seconds passed.

    The request asks for the connection to be closed, so that a proper answer ends it too.
    """
    host, port = server.base_url.removeprefix("http://").rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{port}", f"Authorization: Bearer {server.api_key}"]
    lines += [f"{name}: {value}" for name, value in {"Connection": "close", **(headers or {})}.items()]
    started = asyncio.get_running_loop().time()
    writer.write("\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content)
    data, end = b"", "closed"
    try:
        async with asyncio.timeout(patience):
            while len(data) < most and (part := await reader.read(65536)):
                data += part
            if len(data) >= most:
                end = "open"
    except TimeoutError:
        end = "open"
    except ConnectionResetError:
        end = "reset"
    seconds = asyncio.get_running_loop().time() - started
    writer.transport.abort()
    return Seen(data, end, seconds)
