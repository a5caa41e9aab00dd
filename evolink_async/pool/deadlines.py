"""When the tasks of a pool have been watched for long enough: one timer for all of them, one shared number for each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from evolink_async.pool.record import OUTSTANDING, Record
from evolink_async.pool.stages import Stages

_TOGETHER = 1e-3  # of the time, and
_AT_LEAST = 0.02  # seconds: what begins within so much of it ends together


class Deadlines:
    """Calls `expired(record)` some time after `start`, a bit later at most, if it is outstanding then."""

    def __init__(self, stages: Stages, expired: Callable[[Record], None]) -> None:
        self._stages = stages
        self._expired = expired
        self._latest = -math.inf  # the time that was given last
        self._timer: asyncio.TimerHandle | None = None

    def start(self, record: Record, seconds: float | None, loop: asyncio.AbstractEventLoop) -> None:
        """Its time begins now, perhaps once more. None: it never ends."""
        if seconds is None:
            return
        ends = loop.time() + seconds
        together = max(_AT_LEAST, _TOGETHER * seconds)
        if not ends <= self._latest <= ends + together:
            self._latest = ends + together
            self._look_at(self._latest, loop)
        record.ends = self._latest

    def close(self) -> None:
        """Nothing expires any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_at(self, moment: float, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None or moment < self._timer.when():
            self.close()
            self._timer = loop.call_at(moment, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time() + 1e-5
        for record in self._stages.these(OUTSTANDING):
            if record.ends <= now and record.state is OUTSTANDING:
                record.ends = math.inf
                self._expired(record)
        soonest = min((record.ends for record in self._stages.these(OUTSTANDING)), default=math.inf)
        if soonest < math.inf:
            self._look_at(soonest, loop)
