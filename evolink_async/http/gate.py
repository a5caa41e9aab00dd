"""A fair gate with two lanes: who may use a connection next.

Nothing here knows about connections. A gate has a number of places; whoever sends takes one, and gives it
back when the answer is in. There are two lanes, because paid submissions and status reads must never starve
each other:

* inside a lane: first come, first served, and nobody barges past a waiter;
* between lanes: a freed place goes to the lanes in turn while both wait;
* a reserve: no lane may fill the whole gate, so the other one always finds a place which comes free soon.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Literal, get_args

Lane = Literal["submit", "read"]
LANES: tuple[Lane, ...] = get_args(Lane)

_OTHER: dict[Lane, Lane] = {"submit": "read", "read": "submit"}


class Gate:
    """`total` places, shared by the lanes "submit" and "read".

    A lane uses at most `lane_limit` places, the reserve (a quarter, at least one) is for the other lane.
    With a single place there is nothing to reserve, and the lanes only take turns.

    Every operation takes constant time. Nothing is bound to an event loop until somebody has to wait.
    """

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a gate needs at least one place, got {total}")
        reserve = max(1, total // 4) if total > 1 else 0
        self._total = total
        self._lane_limit = total - reserve
        self._used: dict[Lane, int] = dict.fromkeys(LANES, 0)
        # Ordered dicts as queues, because a cancelled waiter leaves from the middle at constant cost: a deque
        # would keep the dead ones, for ever if nobody releases.
        self._waiters: dict[Lane, OrderedDict[asyncio.Future[None], None]] = {lane: OrderedDict() for lane in LANES}
        self._last_served: Lane = "read"

    @property
    def total(self) -> int:
        """Places in all."""
        return self._total

    @property
    def lane_limit(self) -> int:
        """Places that one lane may use at most."""
        return self._lane_limit

    @property
    def in_use(self) -> int:
        """Places taken, both lanes together."""
        return self._used["submit"] + self._used["read"]

    @property
    def waiting(self) -> int:
        """Waiters, both lanes together."""
        return len(self._waiters["submit"]) + len(self._waiters["read"])

    def used_by(self, lane: Lane) -> int:
        """Places taken by one lane."""
        return self._used[lane]

    def waiting_in(self, lane: Lane) -> int:
        """Waiters of one lane."""
        return len(self._waiters[lane])

    def try_acquire(self, lane: Lane) -> bool:
        """Take a place if that needs no waiting; says whether it did."""
        if self._waiters[lane] or not self._has_room_for(lane):
            return False
        self._used[lane] += 1
        return True

    async def acquire(self, lane: Lane) -> None:
        """Take a place, waiting for one in this lane's queue if need be.

        Cancelling the wait is safe at any moment: a place that had just been given is passed on.
        """
        if self.try_acquire(lane):
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[lane][waiter] = None
        try:
            await waiter
        except BaseException:
            # A result in the future means that the place was already ours when the cancellation came.
            if waiter.done() and not waiter.cancelled():
                self.release(lane)
            else:
                self._waiters[lane].pop(waiter, None)
            raise

    def release(self, lane: Lane) -> None:
        """Give a place back; the next waiter, if any, has it from this moment on."""
        if self._used[lane] < 1:
            raise RuntimeError(f"release of a place that was not taken: {self!r}, lane {lane!r}")
        self._used[lane] -= 1
        if any(self._waiters.values()):
            self._serve_waiters()

    def _has_room_for(self, lane: Lane) -> bool:
        return self._used[lane] < self._lane_limit and self.in_use < self._total

    def _serve_waiters(self) -> None:
        while (lane := self._next_lane()) is not None:
            waiter, _ = self._waiters[lane].popitem(last=False)
            # Cancelled, but its task didn't run yet and so it is still in the queue.
            if waiter.done():
                continue
            # The place changes hands here, not when the waiter wakes up: nobody can barge in between.
            self._used[lane] += 1
            self._last_served = lane
            waiter.set_result(None)

    def _next_lane(self) -> Lane | None:
        first = _OTHER[self._last_served]
        for lane in (first, self._last_served):
            if self._waiters[lane] and self._has_room_for(lane):
                return lane
        return None

    def __repr__(self) -> str:
        lanes = ", ".join(f"{lane}: {self._used[lane]} in use + {len(self._waiters[lane])} waiting" for lane in LANES)
        return f"<Gate {self.in_use}/{self._total} ({lanes})>"
