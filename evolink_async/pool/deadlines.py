"""Things that end a fixed time after they began: one timer for all of them, and next to no memory for each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_TOGETHER = 1e-3  # of the time: things that began so close to each other end together, with the last of them
_SWEEP = 64  # so many that are over may stay in the queue, or a quarter of all


@dataclass(slots=True)
class _Group(Generic[T]):
    began: float  # the first of them
    ends: float  # the last of them
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
        self._held = self._over = 0  # things in there, and how many of them are over, at most
        self._timer: asyncio.TimerHandle | None = None

    def start(self, thing: T, loop: asyncio.AbstractEventLoop) -> None:
        if self._seconds is None:
            return
        now = loop.time()
        if self._groups and now - self._groups[-1].began <= _TOGETHER * self._seconds:
            group = self._groups[-1]
            group.ends = now + self._seconds
            group.things.append(thing)
        else:
            self._groups.append(_Group(now, now + self._seconds, [thing]))
        self._held += 1
        if self._timer is None:
            self._set_timer(loop)

    def note_end(self) -> None:
        """One of the things is over: they must not pile up until their time comes."""
        self._over += 1
        if self._over > max(_SWEEP, self._held // 4):
            for group in self._groups:
                group.things = [thing for thing in group.things if not self._is_over(thing)]
            self._groups = deque(group for group in self._groups if group.things)
            self._held = sum(len(group.things) for group in self._groups)
            self._over = 0

    def close(self) -> None:
        """Nothing expires any more."""
        self._groups.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._groups:
            self._timer = loop.call_at(self._groups[0].ends, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        while self._groups and self._groups[0].ends <= now + 1e-5:
            group = self._groups.popleft()
            self._held -= len(group.things)
            for thing in group.things:
                if not self._is_over(thing):
                    self._expired(thing)
        self._set_timer(loop)
