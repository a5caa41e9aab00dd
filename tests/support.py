"""What tests share: an emulator in virtual time, and the check that nothing of ours is left."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from evolink_async.emulator import Emulator
from evolink_async.http.transport import SlotTransport

transports: weakref.WeakSet[SlotTransport] = weakref.WeakSet()  # all that live; filled by conftest


async def assert_nothing_left() -> None:
    """No asyncio task named by the library, and no slot in use, once the loop had a few turns to clean up."""
    for _ in range(20):
        await asyncio.sleep(0)
        tasks = [task for task in asyncio.all_tasks() if task.get_name().startswith("evolink ")]
        busy = [transport for transport in transports if transport.in_use]
        if not tasks and not busy:
            return
    gc.collect()
    assert not tasks, f"tasks are left: {tasks}"
    assert not busy, f"slots are left: {busy}"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """The head of the next request that a raw server is sent, once its body has come too."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.I)
    await reader.readexactly(int(length[1]) if length else 0)
    return head


def contents(path: Path) -> bytes:
    """Nothing, of a file that was removed since its folder was listed."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@asynccontextmanager
async def virtual_service(api_key: str, **options: Any) -> AsyncIterator[tuple[Emulator, httpx.AsyncClient]]:
    """An emulator on the loop's (virtual) clock, reached in process: nothing but time passes."""
    emulator = Emulator(clock=asyncio.get_running_loop().time, api_key=api_key, **options)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=emulator.app)) as http_client:  # type: ignore[arg-type]
        yield emulator, http_client


class Odd:
    """An object of a class that nobody knows, whose name is the same in every process."""

    def __repr__(self) -> str:
        return "<odd>"
