"""How a pool is doing: what it counts, and telling it to the caller from time to time."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable

from evolink_async.pool.outcome import PoolStats

logger = logging.getLogger("evolink_async.pool")

PAUSE = 1.0


class Tally:
    """Running sums over everything that went through a pool."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.posts = self.polls = self.rate_limited = 0
        self._seconds = 0.0
        self._timed = 0

    def ended(self, seconds: float) -> None:
        """A task that was sent in this run came to its end, so many seconds later."""
        self._seconds += max(0.0, seconds)
        self._timed += 1

    @property
    def finished(self) -> int:
        return sum(self.counts.values())

    def eta(self, to_send: int, running: int, rate: float | None, places: int) -> float | None:
        """Seconds until all is done: what is to be sent at the present rate, or as fast as places come free, and one
        more usual duration for the last of them. None while no task has ended."""
        if not to_send and not running:
            return 0.0
        if not self._timed:
            return None
        usual = self._seconds / self._timed
        return max(to_send / rate if rate else 0.0, to_send / places * usual) + usual


class Progress:
    """Calls the caller's `on_progress`, at most once a second while something changes, and once at the end."""

    def __init__(self, tell: Callable[[PoolStats], object] | None, stats: Callable[[], PoolStats]) -> None:
        self._tell = tell
        self._stats = stats
        self._timer: asyncio.TimerHandle | None = None
        self._last = -math.inf

    def changed(self) -> None:
        """Something changed."""
        if self._tell is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._last + PAUSE), self._report)

    def close(self) -> None:
        """The end: tell what is not told yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._report()
        self._tell = None

    def _report(self) -> None:
        self._timer = None
        if self._tell is None:
            return
        self._last = asyncio.get_running_loop().time()
        try:
            self._tell(self._stats())
        except Exception:
            logger.exception("on_progress raised; the pool goes on")
