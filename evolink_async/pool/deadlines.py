"""Things that end a fixed time after they began: one timer for all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Ending(Protocol):
    """Something with a deadline of its own, in loop time; None: it has none now."""

    ends_at: float | None


T = TypeVar("T", bound=Ending)

_SWEEP = 64  # so many that were stopped may stay in the queue, or a quarter of all


class Deadlines(Generic[T]):
    """Calls `expired(thing)` `seconds` after `start(thing)`, unless it was stopped. seconds None: never."""

    def __init__(self, seconds: float | None, expired: Callable[[T], None]) -> None:
        self._seconds = seconds
        self._expired = expired
        self._queue: deque[T] = deque()  # the earliest first; who was stopped has no deadline, or another one
        self._stopped = 0  # so many in the queue at most
        self._timer: asyncio.TimerHandle | None = None

    def start(self, thing: T) -> None:
        if self._seconds is None:
            return
        thing.ends_at = asyncio.get_running_loop().time() + self._seconds
        self._queue.append(thing)
        if self._timer is None:
            self._set_timer()

    def stop(self, thing: T) -> None:
        thing.ends_at = None
        self._stopped += 1
        if self._stopped > max(_SWEEP, len(self._queue) // 4):
            self._queue = deque(other for other in self._queue if other.ends_at is not None)
            self._stopped = 0

    def close(self) -> None:
        """Nothing expires any more."""
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        while self._queue and self._queue[0].ends_at is None:
            self._queue.popleft()
        if self._queue and (moment := self._queue[0].ends_at) is not None:
            self._timer = asyncio.get_running_loop().call_at(moment, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._queue and ((moment := self._queue[0].ends_at) is None or moment <= now + 1e-5):
            thing = self._queue.popleft()
            if moment is not None:
                thing.ends_at = None
                self._expired(thing)
        self._set_timer()
