"""How a program may end in the middle of everything: no noise of asyncio's, and what is paid for is told (F129)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from typing import Any

import pytest

START = """
import asyncio, os, signal, sys, threading
from evolink_async import AsyncEvoLink, ClosedError, VideoRequest
url = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in what they run behind
videos = [VideoRequest(model="seedance-2.0-text-to-video", prompt=f"wave {n}") for n in range(30)]
video = {"model": "seedance-2.0-text-to-video", "prompt": "a wave"}

async def pooling(first, closes=True):
    client = AsyncEvoLink(base_url=url)
    try:
        async with client.pool(videos) as pool:
            while not pool.outstanding:
                await asyncio.sleep(0.01)
            first()
            async for outcome in pool:
                pass
    finally:
        await client.aclose()

def fails():
    raise ValueError("of the program's own")
"""
NOISE = (
    "was destroyed but it is pending",
    "never retrieved",
    "Event loop is closed",
    "never awaited",
    "unhandled exception",
    "no running event loop",
    "Exception ignored",
    "generator didn't stop",
    "different task",
)
ENDS = {
    "an exit in the block": ("asyncio.run(pooling(lambda: sys.exit(7)))", 7),
    "an error in the block": ("asyncio.run(pooling(fails))", 1),
    "Ctrl-C": ("asyncio.run(pooling(lambda: os.kill(os.getpid(), signal.SIGINT)))", -signal.SIGINT),
    "a task that nobody awaits": (
        """
        async def main():
            global client, kept
            client = AsyncEvoLink(base_url=url)
            kept = asyncio.create_task(client.videos.generate(**video))
            while not [task async for task in client.tasks.list()]:
                await asyncio.sleep(0.01)
        asyncio.run(main())
        """,
        0,
    ),
    "a client that is not closed": (
        """
        async def main():
            global client
            client = AsyncEvoLink(base_url=url)
            await client.videos.submit(**video)
        asyncio.run(main())
        """,
        0,
    ),
    "a pool whose block is never left": (
        """
        async def main():
            global client, pool
            client = AsyncEvoLink(base_url=url)
            pool = client.pool(videos)
            await pool.__aenter__()
            while not pool.outstanding:
                await asyncio.sleep(0.01)
        asyncio.run(main())
        """,
        0,
    ),
    "a generator around a pool that is left early": (
        """
        async def outcomes():
            async with AsyncEvoLink(base_url=url) as client, client.pool(videos) as pool:
                async for outcome in pool:
                    yield outcome
        async def main():
            async for outcome in outcomes():
                break
        asyncio.run(main())
        """,
        0,
    ),
    "one client in one loop after the other": (
        """
        client = AsyncEvoLink(base_url=url)
        asyncio.run(client.videos.submit(**video))
        asyncio.run(client.credits())
        asyncio.run(client.aclose())
        """,
        0,
    ),
}


@pytest.mark.parametrize("name", ENDS)
async def test_a_program_that_ends_in_the_middle_is_quiet_and_tells_what_it_leaves(
    name: str, emulator: Any, api_key: str
) -> None:
    program, code = ENDS[name]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", START + textwrap.dedent(program), emulator.base_url),
        env=environment | {"EVOLINK_API_KEY": api_key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(300):
        output, _ = await process.communicate()
    told = output.decode()
    assert process.returncode == code, told
    assert not [noise for noise in NOISE if noise in told], told
    assert api_key not in told
    assert emulator.emulator.book()["posts"]
    if "in the block" in name or name == "Ctrl-C":
        assert "still running" in told
