"""One timer for many deadlines of the same length."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Calls `expired(thing)` `seconds` after `start(thing)`, unless it was stopped. seconds None: never."""

    def __init__(self, seconds: float | None, expired: Callable[[T], None]) -> None:
        self._seconds = seconds
        self._expired = expired
        self._ends: OrderedDict[T, float] = OrderedDict()  # the earliest first
        self._timer: asyncio.TimerHandle | None = None

    def start(self, thing: T) -> None:
        if self._seconds is not None:
            self._ends[thing] = asyncio.get_running_loop().time() + self._seconds
            self._set_timer()

    def stop(self, thing: T) -> None:
        self._ends.pop(thing, None)

    def close(self) -> None:
        """Nothing expires any more."""
        self._ends.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        if self._timer is None and self._ends:
            moment = next(iter(self._ends.values()))
            self._timer = asyncio.get_running_loop().call_at(moment, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._ends and next(iter(self._ends.values())) <= now + 1e-5:
            thing, _ = self._ends.popitem(last=False)
            self._expired(thing)
        self._set_timer()
