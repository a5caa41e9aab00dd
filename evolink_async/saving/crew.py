"""A queue, and a fixed number of asyncio tasks that empty it while there is something in it."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio

from evolink_async.own_tasks import own_task

T = TypeVar("T")


class Crew(Generic[T]):
    """A queue, and a fixed number of asyncio tasks while there is something in it. `work` must not raise."""

    def __init__(self, name: str, size: int, work: Callable[[T], Awaitable[None]]) -> None:
        self._name = name
        self._size = size
        self._work = work
        self._waiting: deque[T] = deque()
        self._closed = False
        self._workers: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        return bool(self._workers)

    def put(self, item: T) -> None:
        if self._closed:
            return
        self._waiting.append(item)
        if len(self._workers) < self._size:
            worker = own_task(asyncio.get_running_loop(), self._run(), self._name, contextvars.Context())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def aclose(self, seconds: float = 0.0) -> None:
        """Stop. What is under way or waits has so many seconds to end."""
        with anyio.CancelScope(shield=True):
            if self._workers and seconds:
                await asyncio.wait(self._workers, timeout=seconds)
            self._closed = True
            self._waiting.clear()
            for worker in self._workers:
                worker.cancel()
            if self._workers:
                await asyncio.wait(self._workers)

    async def _run(self) -> None:
        while self._waiting:
            await self._work(self._waiting.popleft())
        # At once: what is put before the loop has called back would count on this one.
        worker = asyncio.current_task()
        assert worker is not None
        self._workers.discard(worker)
