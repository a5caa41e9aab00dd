"""The wall clock: outcomes are dated by it, and it goes on between two runs, and while a laptop sleeps."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import NamedTuple


def now() -> datetime:
    """This moment, aware."""
    return datetime.now(UTC)


class Moment(NamedTuple):
    """A moment by both clocks: `loop` stands still while a laptop sleeps, `wall` may be set. Seconds."""

    loop: float
    wall: float

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop, seconds_ago: float = 0.0) -> Moment:
        """This moment, or one so many seconds before it."""
        return cls(loop.time() - seconds_ago, now().timestamp() - seconds_ago)

    def since(self, earlier: Moment) -> float:
        """Seconds since `earlier`, by the clock that says more: what is over by one of them is over."""
        return max(self.loop - earlier.loop, self.wall - earlier.wall)
