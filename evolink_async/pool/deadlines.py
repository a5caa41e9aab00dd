"""Things that end a fixed time after they began: one timer for all of them, and next to no memory for each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import filterfalse
from typing import Generic, TypeVar

T = TypeVar("T")

_TOGETHER = 1e-3  # of the time: what begins within so much of it ends together
_SWEEP = 64  # so many ends, or a quarter of all, and what is over leaves the queue


@dataclass(slots=True)
class _Group(Generic[T]):
    ends: float
    things: list[T]


class Deadlines(Generic[T]):
    """Calls `expired(thing)` `seconds` after `start(thing, loop)` (0.1 % later at most), unless it is over by then.

    seconds None: never. is_over: whether a thing needs no deadline any more. Each is started once, on one loop.
    """

    def __init__(self, seconds: float | None, expired: Callable[[T], None], is_over: Callable[[T], bool]) -> None:
        self._seconds = seconds
        self._expired = expired
        self._is_over = is_over
        self._groups: deque[_Group[T]] = deque()  # the earliest first
        self._ends_to_sweep = _SWEEP
        self._timer: asyncio.TimerHandle | None = None

    def start(self, thing: T, loop: asyncio.AbstractEventLoop) -> None:
        if self._seconds is None:
            return
        ends = loop.time() + self._seconds
        if not self._groups or ends > self._groups[-1].ends:
            self._groups.append(_Group(ends + _TOGETHER * self._seconds, []))
            self._set_timer(loop)
        self._groups[-1].things.append(thing)

    def note_end(self) -> None:
        """One of the things is over: they must not pile up until their time comes."""
        self._ends_to_sweep -= 1
        if self._ends_to_sweep <= 0:
            for group in self._groups:
                group.things = list(filterfalse(self._is_over, group.things))
            self._groups = deque(group for group in self._groups if group.things)
            self._ends_to_sweep = max(_SWEEP, sum(len(group.things) for group in self._groups) // 4)

    def close(self) -> None:
        """Nothing expires any more."""
        self._groups.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._groups and self._timer is None:
            self._timer = loop.call_at(self._groups[0].ends, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        while self._groups and self._groups[0].ends <= now + 1e-5:
            for thing in self._groups.popleft().things:
                if not self._is_over(thing):
                    self._expired(thing)
        self._set_timer(loop)
