"""The queue that uploads and downloads wait in."""

from __future__ import annotations

import asyncio

import pytest

from evolink_async.saving.crew import Crew


@pytest.mark.parametrize("size", [1, 3])
async def test_what_is_put_in_the_moment_the_last_worker_ends_is_worked_on_too(size: int) -> None:
    """The worker is done then, and the loop has not called back yet."""
    loop = asyncio.get_running_loop()
    gate, done = asyncio.Event(), asyncio.Event()
    worked: list[int] = []

    async def work(item: int) -> None:
        if item < size:
            await gate.wait()
            if item == 0:
                loop.call_soon(crew.put, size)  # before the callbacks of those that end in this turn
        worked.append(item)
        if item == size:
            done.set()

    crew = Crew("evolink test", size, work)
    for item in range(size):
        crew.put(item)
    await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(60):
        await done.wait()
    assert sorted(worked) == list(range(size + 1))
    await crew.aclose()
    assert not crew.busy
