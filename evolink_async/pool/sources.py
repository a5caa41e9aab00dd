"""Where a pool's requests come from: single ones first, then iterables in turn, pulled one at a time."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from evolink_async.errors import InvalidRequestError
from evolink_async.requests import GenerationRequest

# A long run of pulls that never waits would keep the loop from everything else.
_PULLS_IN_A_ROW = 64


class Sources:
    """Pulls items while `has_room()` says so and hands each to `take`, in one asyncio task, and one more for each
    async iterable. `take` must be plain and must not raise.

    A fault of an iterable goes to `failed` and closes everything; nothing is read on.
    """

    def __init__(
        self,
        has_room: Callable[[], bool],
        take: Callable[[Any], None],
        failed: Callable[[BaseException], None],
        drained: Callable[[], None],
    ) -> None:
        self._has_room = has_room
        self._take = take
        self._failed = failed
        self._drained = drained
        self._singles: deque[Any] = deque()
        self._iterators: deque[Iterator[Any]] = deque()
        self._readers: dict[asyncio.Task[None], AsyncIterator[Any]] = {}
        self._pending: list[AsyncIterator[Any]] = []
        self._feeder: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._started = False
        self.closed = False
        self.total: int | None = 0  # requests in all as far as the sources tell their length

    def add(self, source: Any) -> None:
        """A request, an iterable or an async iterable. Raises `InvalidRequestError` for anything else."""
        if isinstance(source, GenerationRequest):
            self._singles.append(source)
            self._count(1)
        elif isinstance(source, str | bytes | Mapping):
            raise InvalidRequestError(
                f"a source is a request or an iterable of requests, got {type(source).__name__}; "
                "make a request out of a dict with GenerationRequest.from_dict"
            )
        elif isinstance(source, AsyncIterable):
            self._count(None)
            self._pending.append(aiter(source))
        elif isinstance(source, Iterable):
            self._count(len(source) if isinstance(source, Sized) else None)
            self._iterators.append(iter(source))
        else:
            raise InvalidRequestError(f"a source is a request or an iterable of requests, got {type(source).__name__}")
        if self._started:
            self._ensure()

    def start(self) -> None:
        """Begin to pull. Needs a running loop."""
        self._started = True
        self._ensure()

    def notice_room(self) -> None:
        """There may be room again."""
        self._room.set()

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to pull."""
        return self.closed or not (self._singles or self._iterators or self._readers or self._pending)

    def close(self) -> None:
        """Read on nothing. Generators are closed; async ones by the tasks that read them, see `aclose`."""
        if self.closed:
            return
        self.closed = True
        self._singles.clear()
        if self._feeder is not None:
            self._feeder.cancel()
        for reader in self._readers:
            reader.cancel()
        for iterator in self._iterators:
            # A generator that is running right now (it raised, or closed the pool itself) can't be closed.
            if inspect.isgenerator(iterator) and not iterator.gi_running:
                try:
                    iterator.close()
                except Exception as error:  # noqa: BLE001  (a generator's clean-up is the caller's code)
                    self._failed(error)
        self._iterators.clear()

    async def aclose(self) -> None:
        """Close, and wait until no task of ours is left."""
        self.close()
        tasks = [task for task in (self._feeder, *self._readers) if task is not None]
        if tasks:
            await asyncio.wait(tasks)
        for source in self._pending:
            await _close_async(source)
        self._pending.clear()

    def _count(self, more: int | None) -> None:
        self.total = None if self.total is None or more is None else self.total + more

    def _ensure(self) -> None:
        if self.closed:
            return
        loop = asyncio.get_running_loop()
        while self._pending:
            source = self._pending.pop()
            reader = loop.create_task(self._read(source), name="evolink source", context=contextvars.copy_context())
            self._readers[reader] = source
            reader.add_done_callback(self._reader_done)
        if (self._singles or self._iterators) and self._feeder is None:
            self._feeder = loop.create_task(self._feed(), name="evolink feeder")
            self._feeder.add_done_callback(self._feeder_done)
        self._room.set()

    def _feeder_done(self, task: asyncio.Task[None]) -> None:
        self._feeder = None
        if not task.cancelled() and task.exception() is not None:
            self._fault(task.exception())
        elif self._singles or self._iterators:
            self._ensure()
        else:
            self._drained()

    def _reader_done(self, task: asyncio.Task[None]) -> None:
        self._readers.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            self._fault(task.exception())
        else:
            self._drained()

    def _fault(self, error: BaseException | None) -> None:
        assert error is not None
        self._failed(error)

    async def _feed(self) -> None:
        pulled = 0
        while self._singles or self._iterators:
            await self._wait_for_room()
            if self._singles:
                self._take(self._singles.popleft())
            elif self._iterators:
                self._pull_in_turn()
            pulled += 1
            if pulled % _PULLS_IN_A_ROW == 0:
                await asyncio.sleep(0)

    def _pull_in_turn(self) -> None:
        iterator = self._iterators.popleft()
        try:
            item = next(iterator)
        except StopIteration:
            return
        self._iterators.append(iterator)
        self._take(item)

    async def _read(self, source: AsyncIterator[Any]) -> None:
        try:
            while True:
                await self._wait_for_room()
                try:
                    item = await anext(source)
                except StopAsyncIteration:
                    return
                self._take(item)
        finally:
            if self.closed:
                await _close_async(source)

    async def _wait_for_room(self) -> None:
        while not self._has_room():
            self._room.clear()
            await self._room.wait()


async def _close_async(source: AsyncIterator[Any]) -> None:
    close = getattr(source, "aclose", None)
    if close is not None:
        await close()
