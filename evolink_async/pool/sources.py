"""Where a pool's requests come from: single ones first, then iterables in turn, pulled one at a time."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from evolink_async.errors import EvoLinkError, InvalidRequestError
from evolink_async.own_tasks import own_task
from evolink_async.requests import GenerationRequest

# A long run of pulls that never waits would keep the loop from everything else.
_PULLS_IN_A_ROW = 64


@dataclass(slots=True, eq=False)
class _Reader:
    """An async iterable with the task that asks it. It is among the turns unless it is being asked right now."""

    source: AsyncIterator[Any]
    go: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


def _length_of(source: Iterable[Any]) -> int | None:
    try:
        return len(source)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001  (it has none, or its class only thinks so, as tqdm's around a generator)
        return None


class Sources:
    """Pulls an item when `has_room()` says so and hands it to `take`, which must be plain and must not raise.

    `take` may give a reason for which the source of this item is held, not read on, until `release` is told of it.

    One asyncio task, the feeder, decides whose turn it is; each async iterable has one more that asks it, so that one
    which has nothing to give at the moment keeps nobody else waiting. A fault of an iterable goes to `failed`, one of
    the feeder itself to `broken`; `drained` is called when one has come to its end.
    """

    def __init__(
        self,
        has_room: Callable[[], bool],
        take: Callable[[Any], Hashable | None],
        failed: Callable[[BaseException], None],
        broken: Callable[[BaseException], None],
        drained: Callable[[], None],
    ) -> None:
        self._has_room = has_room
        self._take = take
        self._failed = failed
        self._broken = broken
        self._drained = drained
        self._singles: deque[Any] = deque()
        self._turns: deque[Iterator[Any] | _Reader] = deque()
        self._held: dict[Hashable, list[Iterator[Any] | _Reader]] = {}
        self._singles_held: Hashable | None = None
        self._readers: set[_Reader] = set()
        self._feeder: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._started = False
        self.closed = False
        self.cut_short = False  # closed before all was read
        self.pulled = 0
        self.total: int | None = 0  # requests in all, as far as the sources tell their length

    def add(self, source: Any) -> None:
        """A request, an iterable or an async iterable. Raises `InvalidRequestError` for anything else.

        Once closed, iterables are not touched any more.
        """
        if isinstance(source, GenerationRequest):
            self._singles.append(source)
            self._count(1)
        elif isinstance(source, str | bytes | Mapping) or not isinstance(source, AsyncIterable | Iterable):
            raise InvalidRequestError(
                f"a source is a request or an iterable of requests, got {type(source).__name__}; "
                "make a request out of a dict with GenerationRequest.from_dict"
            )
        elif self.closed:
            return
        elif isinstance(source, AsyncIterable):
            reader = _Reader(aiter(source))
            self._readers.add(reader)
            self._turns.append(reader)
            self._count(None)
        else:
            self._turns.append(iter(source))
            self._count(_length_of(source))
        if self._started:
            self._ensure_feeder()

    def start(self) -> None:
        """Begin to pull. Needs a running loop."""
        self._started = True
        self._ensure_feeder()

    def notice_room(self) -> None:
        """There may be room again."""
        self._wake.set()

    def release(self, reason: Hashable) -> None:
        """Read on what was held for this reason."""
        if reason in self._held:
            self._turns.extend(self._held.pop(reason))
            self._wake.set()
        if reason == self._singles_held:
            self._singles_held = None
            self._wake.set()

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to pull."""
        return self.closed or not (self._singles or self._turns or self._held or self._readers)

    def close_iterables(self) -> None:
        """Read on nothing and close the generators.

        Async generators are closed by the tasks that read them: see `tasks`.
        """
        if self.closed:
            return
        self.cut_short = not self.exhausted
        self.closed = True
        self._wake.set()
        for reader in self._readers:
            # The one that runs right now (its item made somebody close us) sees `closed` by itself.
            if reader.task is not None and reader.task is not asyncio.current_task():
                reader.task.cancel()
        turns = [*self._turns, *(turn for held in self._held.values() for turn in held)]
        self._turns.clear()
        self._held.clear()
        for turn in turns:
            if not isinstance(turn, _Reader):
                self._close_iterator(turn)

    def take_singles(self) -> list[Any]:
        """The single requests that nobody pulled."""
        singles, self._singles = list(self._singles), deque()
        self.pulled += len(singles)
        return singles

    def tasks(self) -> set[asyncio.Task[None]]:
        """The asyncio tasks of ours that still run: the clean-up of async generators may take its time."""
        tasks = [self._feeder, *(reader.task for reader in self._readers)]
        return {task for task in tasks if task is not None}

    def _count(self, more: int | None) -> None:
        self.total = None if self.total is None or more is None else self.total + more

    # The feeder

    def _ensure_feeder(self) -> None:
        if self._feeder is None and not self.exhausted:
            self._feeder = own_task(asyncio.get_running_loop(), self._feed(), "evolink feeder")
            self._feeder.add_done_callback(self._feeder_done)
        self._wake.set()

    async def _feed(self) -> None:
        pulls = 0
        while not self.closed:
            singles = self._singles and self._singles_held is None
            if not (singles or self._turns) or not self._has_room():
                if self.exhausted:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            pulls += 1
            if singles:
                self.pulled += 1
                self._singles_held = self._take(self._singles.popleft())
            elif self._give_turn(self._turns.popleft()) or pulls % _PULLS_IN_A_ROW == 0:
                await asyncio.sleep(0)

    def _give_turn(self, turn: Iterator[Any] | _Reader) -> bool:
        """Pull from an iterator, or let a reader ask. True: wait a moment, for an item that is there at once."""
        if isinstance(turn, _Reader):
            if turn.task is None:
                turn.task = own_task(asyncio.get_running_loop(), self._read(turn), "evolink source")
                turn.task.add_done_callback(lambda task: self._reader_done(turn, task))
            turn.go.set()
            return True
        try:
            item = next(turn)
        except StopIteration:
            return False
        except Exception as error:  # noqa: BLE001  (the iterable is the caller's code)
            self._failed(error)
            return False
        self._got(item, turn)
        return False

    def _got(self, item: Any, turn: Iterator[Any] | _Reader) -> None:
        """An item was pulled. Its source is among the turns again, or among the held ones."""
        self.pulled += 1
        held_for = self._take(item)
        if self.closed:  # the iterable itself had the pool stopped, or what became of its item
            if not isinstance(turn, _Reader):
                self._close_iterator(turn)
        elif held_for is not None:
            self._held.setdefault(held_for, []).append(turn)
        else:
            self._turns.append(turn)

    def _feeder_done(self, task: asyncio.Task[None]) -> None:
        self._feeder = None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):  # an iterable's fault was told where it was met, so this one is ours
            self._broken(error)
            self._drained()
        else:
            self._done(task)
        if self._started:
            self._ensure_feeder()

    # Async iterables

    async def _read(self, reader: _Reader) -> None:
        try:
            while not self.closed:
                await reader.go.wait()
                reader.go.clear()
                try:
                    item = await anext(reader.source)
                except StopAsyncIteration:
                    return
                self._got(item, reader)
                self._wake.set()
        finally:
            close = getattr(reader.source, "aclose", None)
            if self.closed and close is not None:
                await close()

    def _reader_done(self, reader: _Reader, task: asyncio.Task[None]) -> None:
        self._readers.discard(reader)
        self._wake.set()
        self._done(task)

    # Ends

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            if not self.closed:
                # To the user it must look like a fault of the iterable, never like a cancellation of himself.
                self._failed(EvoLinkError("an iterable of requests was cancelled from within: CancelledError"))
        elif (error := task.exception()) is not None:
            self._failed(error)
        self._drained()

    def _close_iterator(self, iterator: Iterator[Any]) -> None:
        # A generator that runs right now (it had the pool closed) can't be closed; `_give_turn` does it then.
        if inspect.isgenerator(iterator) and not iterator.gi_running:
            try:
                iterator.close()
            except Exception as error:  # noqa: BLE001  (a generator's clean-up is the caller's code)
                self._failed(error)
