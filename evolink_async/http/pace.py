"""When the next paid request may be sent: the one dispatcher that acts on `ModelPace` and the user's limit.

Everything that wants to submit (pools and single calls) puts a `Ticket` in the queue of its model and is told when it
may go: there is one waiter at the limiter, so there is no race for a place and no starvation.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from aiolimiter import AsyncLimiter

from evolink_async.http.evidence import TICK
from evolink_async.http.model_pace import START_BURST, START_RATE, ModelPace
from evolink_async.http.observer import Observation
from evolink_async.http.rates import RateLimit
from evolink_async.http.retry import RetryPolicy
from evolink_async.own_tasks import own_task

logger = logging.getLogger("evolink_async.pace")

LONG_COOL_DOWN = 60.0  # seconds; somebody may want to know
LONGEST_COOL_DOWN = 3600.0  # no pool waits for the end of a longer one

# A task of whose end we are not told counts for so many times its estimate, and so many seconds at least.
_BELIEVED, _LEAST_BELIEVED = 3.0, 60.0
_USUAL = 120.0  # seconds, where the service tells no estimate

# Of several models each may have so many times the places under way that are still free.
_MOST_OF_FREE = 3

_LONGEST_AT_THE_WIRE = 1.0  # seconds; a slow disk or resolver brings requests together

# So many answers of a model lost in a row are an outage.
LOST_IN_A_ROW = 3


class Urgency(IntEnum):
    """Who goes first within one party's queue."""

    RETURNED = 0  # was sent already and must go again
    CALLER = 1  # somebody awaits it
    SOURCE = 2  # pulled from an iterable


class Ticket(Protocol):
    """One wish to send a paid request. Let go, it may be queued again; withdrawn, it may not."""

    waiting: bool  # it is in the queue; kept by the pace
    party: Hashable

    @property
    def model(self) -> str:
        """Whose pace it keeps."""

    def go(self) -> None:
        """Called, synchronously, the moment it may be sent."""

    def turn_failed(self, error: BaseException) -> None:
        """Called if the pace itself failed and it never will be."""


@dataclass(slots=True)
class Holds:
    """Until when nothing may be sent, by `time.monotonic`: it outlives a loop, whose clock is its own.

    limit: by the user's limit, all that was sent counted. models: because of cool-downs.
    """

    limit: float = -math.inf
    models: dict[str, float] = field(default_factory=dict)

    def left(self, model: str) -> float:
        """Seconds for which this model has a cool-down."""
        return max(0.0, self.models.get(model, -math.inf) - time.monotonic())


class Lane:
    """The queue of one model: one heap per party, parties taking turns."""

    __slots__ = ("losses", "lost_until", "model", "pace", "queues")

    def __init__(self, model: str, pace: ModelPace) -> None:
        self.model = model
        self.pace = pace
        self.losses = 0  # answers lost in a row
        self.lost_until = -math.inf  # the end of the last pause for their sake
        self.queues: OrderedDict[Hashable, list[tuple[int, int, Ticket]]] = OrderedDict()  # whose turn is next, first

    def put(self, ticket: Ticket, urgency: Urgency, number: int) -> None:
        queue = self.queues.get(ticket.party)
        if queue is None:
            queue = self.queues[ticket.party] = []
        heapq.heappush(queue, (urgency, number, ticket))

    def has_work(self) -> bool:
        """Whether a ticket waits; drops those that were withdrawn."""
        while self.queues:
            party, queue = next(iter(self.queues.items()))
            while queue and not queue[0][2].waiting:
                heapq.heappop(queue)
            if queue:
                return True
            del self.queues[party]
        return False

    @property
    def is_in_outage(self) -> bool:
        """Whether one finds out for all if answers come again."""
        return self.losses >= LOST_IN_A_ROW

    def take(self) -> Ticket:
        if self.losses and self.is_in_outage and (fresh := self._take_fresh()) is not None:
            return fresh
        party, queue = next(iter(self.queues.items()))
        self.queues.move_to_end(party)
        return heapq.heappop(queue)[2]

    def _take_fresh(self) -> Ticket | None:
        """The first that was not sent yet: a replay whose answer is lost again is never settled."""
        for party, queue in self.queues.items():
            fresh = min((entry for entry in queue if entry[0] != Urgency.RETURNED and entry[2].waiting), default=None)
            if fresh is not None:
                queue.remove(fresh)
                heapq.heapify(queue)
                self.queues.move_to_end(party)
                return fresh[2]
        return None


class Pace:
    """The one dispatcher of paid requests of a client on one loop.

    `parallel` bounds the requests under way, so that none waits behind others for a connection after it was let go.
    `rates`, `refused` and `caps` hold what was learned of each model: submissions per second, the same that were too
    many, and tasks that may run at once. They and `holds` outlive the loop. The dispatcher's task exists only while
    there is a ticket.
    """

    def __init__(
        self,
        limit: RateLimit | None,
        parallel: int,
        retry: RetryPolicy,
        rates: dict[str, float],
        rng: random.Random | None = None,
        *,
        refused: dict[str, float] | None = None,
        caps: dict[str, float] | None = None,
        holds: Holds | None = None,
        observation: Observation | None = None,
    ) -> None:
        self._observation = observation or Observation()
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._holds = holds or Holds()
        opens_at = self._loop.time() + self._holds.limit - time.monotonic()
        self._ceiling = _Ceiling(limit, opens_at) if limit is not None else None
        self._wire = _Ceiling(limit, opens_at) if limit is not None else None
        self._line = asyncio.Lock()  # held by the first of those who wait for the wire
        self._in_line = 0
        self._parallel = parallel
        self._under_way = 0
        self._retry = retry
        self._rates = rates
        self._refused = {} if refused is None else refused
        self._caps = {} if caps is None else caps
        self._random = rng or random.Random()
        self._lanes: OrderedDict[str, Lane] = OrderedDict()  # whose turn is next, first
        self._later: list[tuple[float, int, Urgency, Ticket]] = []
        self._numbers = itertools.count()
        self._unreachable_until = -math.inf
        self._failures = 0
        self.unreachable_since = math.inf  # loop time, once `unreachable` was told
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None  # while the dispatcher waits
        self.refusals = 0

    # What the outside does

    def enqueue(self, ticket: Ticket, urgency: Urgency, not_before: float = -math.inf) -> None:
        """Queue a ticket; `ticket.go` is called when it is its turn, not before a moment of the loop."""
        now = self._loop.time()
        ticket.waiting = True
        if not_before > now:
            heapq.heappush(self._later, (not_before, next(self._numbers), urgency, ticket))
        else:
            self._lane(ticket.model, now).put(ticket, urgency, next(self._numbers))
        if self._task is None:
            self._task = own_task(self._loop, self._dispatch(), "evolink pace", contextvars.Context())
        else:
            self._notice()

    async def clearance(self, model: str) -> bool | None:
        """Right before a request that was let go is written: whether it may be, now. Only True comes without a wait.

        Time has passed since it was let go, more for one request than for another, and may have brought several of them
        together. False: the limit asked for a wait, which is over; ask again. None: its model was given a cool-down
        meanwhile, so it has to be queued again.
        """
        now, wire = self._loop.time(), self._wire
        if self._lanes[model].pace.cool_until > now + TICK:
            return None
        if wire is None:
            return True
        if wire.is_open(now) and not self._line.locked():
            self._holds.limit = time.monotonic() + await wire.take(now)
            return True
        self._in_line += 1
        try:
            async with self._line:
                now = self._loop.time()
                while not wire.is_open(now):
                    await asyncio.sleep(wire.opens_at(now) - now)
                    now = self._loop.time()
        finally:
            self._in_line -= 1
            self._notice()
        return False

    def withdraw(self, ticket: Ticket) -> None:
        """Take a ticket back; its `go` will not be called."""
        ticket.waiting = False
        self._notice()

    def finished(self, model: str) -> None:
        """A request that was let go is no longer under way."""
        self._under_way -= 1
        self._lanes[model].pace.landed()
        self._notice()

    def accepted(self, model: str, now: float, task_id: str | None = None, estimate: float | None = None) -> None:
        """The service took a request for this model.

        `task_id`: the task that runs now. While nobody watches it, it counts for several times its `estimate`
        (seconds).
        """
        lane = self._lane(model, now)
        lane.pace.accepted(now, task_id, _believed_until(now, estimate))
        rate = lane.pace.rate
        if rate < math.inf:
            self._rates[model] = rate
        if lane.losses:
            self._end_row(lane)

    def watch(self, task_id: str, model: str | None = None) -> Lane | None:
        """Somebody watches this task, and tells when it has `ended`, or that he does not watch it any more.

        The lane to tell it of; None: no request that was sent by us has made this task. `model`: what the service says,
        which nearly always is what was asked for.
        """
        likely = self._lanes.get(model) if model is not None else None
        if likely is not None and likely.pace.watch(task_id):
            return likely
        for lane in self._lanes.values():
            if lane.pace.watch(task_id):
                return lane
        return None

    def unwatch(self, lane: Lane, task_id: str, estimate: float | None = None) -> None:
        """Nobody watches this task any more, which goes on. `estimate`: seconds that such tasks take."""
        lane.pace.unwatch(task_id, _believed_until(self._loop.time(), estimate))
        if lane.pace.cap < math.inf and not self._loop.is_closed():  # a forgotten wait may be collected after its loop
            self._notice()

    def ended(self, lane: Lane) -> None:
        """A task that was watched has ended, so that another one may run."""
        lane.pace.ended(self._loop.time())
        if lane.pace.cap < math.inf:  # else nobody waits for a place
            self._caps[lane.model] = lane.pace.cap
            self._notice()

    def refused(self, model: str, now: float, sent_at: float, hint: float | None) -> None:
        """The service answered 429."""
        self.refusals += 1
        pace = self._lane(model, now).pace
        before = pace.cool_until
        pace.refused(now, sent_at, hint, self._retry, self._random.random())
        self._hold(model, pace, before, now)
        self._rates[model], self._refused[model] = pace.rate, pace.refused_rate
        if pace.cap < math.inf:
            self._caps[model] = pace.cap
        self._notice()

    def cool(self, model: str, until: float) -> None:
        """Nobody asks this model before `until` (loop time)."""
        now = self._loop.time()
        pace = self._lane(model, now).pace
        before = pace.cool_until
        pace.cool(now, until)
        self._hold(model, pace, before, now)
        self._notice()

    def lost(self, model: str, now: float, sent_at: float) -> None:
        """An answer was lost. From the third in a row on everybody waits, ever longer, and then one finds out for all.

        Whatever is sent into an outage may stay unknown for good. `sent_at`: when the request was let go.
        """
        lane = self._lane(model, now)
        if lane.is_in_outage and sent_at < lane.lost_until - TICK:
            return  # it was let go before the pause began, and says nothing new
        lane.losses += 1
        if lane.is_in_outage:
            attempt = lane.losses - LOST_IN_A_ROW + 1
            lane.lost_until = now + self._retry.delay(attempt, None, self._random.random())
            self.cool(model, lane.lost_until)

    def answered(self, model: str) -> None:
        """An answer came, whatever it says: none is lost in a row any more. One that was accepted needs no telling."""
        self._end_row(self._lanes[model])

    def _end_row(self, lane: Lane) -> None:
        if lane.losses:
            lane.losses = 0
            self._notice()

    def unreachable(self, now: float, sent_at: float) -> bool:
        """No connection could be made: everybody waits, so that a thousand requests don't each knock.

        Whether that is news: the service was reached last time, or nobody has tried for as long as a pool is patient.
        """
        if sent_at < self._unreachable_until - TICK:
            return False  # it was let go before the pause began, and says nothing new
        news = sent_at - self._unreachable_until > self._retry.unreachable_for
        if news:
            self._failures, self.unreachable_since = 0, now
        self._failures += 1
        self._unreachable_until = now + self._retry.delay(self._failures, None, self._random.random())
        self._notice()
        return news

    def reachable(self) -> bool:
        """A connection was made. Whether that is news."""
        if not self._failures:
            return False
        self._failures = 0
        self._unreachable_until = -math.inf
        self._notice()
        return True

    def cool_down_of(self, model: str, now: float) -> float:
        """Seconds for which this model may not be asked, because of what the service answered or didn't."""
        lane = self._lanes.get(model)
        return max(0.0, lane.pace.cool_until - now) if lane else self._holds.left(model)

    def rate_of(self, models: set[str]) -> float | None:
        """Submissions per second allowed now for these models together; None while nothing is known."""
        ceiling = self._limit.per_second if self._limit else math.inf
        rates = [self._lanes[model].pace.rate for model in models if model in self._lanes]
        rate = min(sum(rates) if rates else math.inf, ceiling)
        return None if math.isinf(rate) else rate

    @property
    def waiting(self) -> int:
        """Tickets in the queues, for tests and reprs."""
        queued = sum(len(queue) for lane in self._lanes.values() for queue in lane.queues.values())
        return queued + len(self._later)

    async def aclose(self) -> None:
        """Stop the dispatcher. Tickets still queued are not let go."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    # The dispatcher

    def _lane(self, model: str, now: float) -> Lane:
        lane = self._lanes.get(model)
        if lane is None:
            ceiling = math.inf if self._limit is None else self._limit.per_second
            cap = self._caps.get(model, math.inf)
            if model in self._rates:
                refused = self._refused.get(model, math.inf)
                pace = ModelPace(self._rates[model], 1, now, ceiling, refused=refused, cap=cap)
            elif self._limit is not None:
                pace = ModelPace(math.inf, 1, now, ceiling, cap=cap)
            else:
                pace = ModelPace(START_RATE, START_BURST, now, cap=cap)
            if (left := self._holds.left(model)) > 0:
                pace.cool(now, now + left)
            lane = self._lanes[model] = Lane(model, pace)
        return lane

    def _hold(self, model: str, pace: ModelPace, before: float, now: float) -> None:
        """Keep a cool-down, and tell of one that begins; refusals of one volley move its end, and are no news."""
        seconds = pace.cool_until - now
        self._holds.models[model] = time.monotonic() + seconds
        if before > now or seconds <= 0:
            return
        level = logging.INFO if seconds < LONG_COOL_DOWN else logging.WARNING
        logger.log(
            level,
            "%s: none is sent for %.1f s",
            model,
            seconds,
            extra={"event": "cool_down", "model": model, "seconds": seconds},
        )
        if self._observation.observer is not None:
            self._observation.observer.cooled(model, seconds)

    def _notice(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)

    def _release_due(self, now: float) -> None:
        while self._later and (self._later[0][0] <= now + TICK or not self._later[0][3].waiting):
            _, number, urgency, ticket = heapq.heappop(self._later)
            if ticket.waiting:
                self._lane(ticket.model, now).put(ticket, urgency, number)

    def _choose(self, now: float) -> tuple[Lane | None, float | None]:
        """The lane whose turn it is, or when to look again unless something happens; None: nothing waits."""
        earliest = None
        if self._later:
            self._release_due(now)
            earliest = self._later[0][0] if self._later else None
        for lane in self._lanes.values():
            if not lane.has_work():
                continue
            ready = max(lane.pace.ready_at(now), self._unreachable_until)
            if lane.losses and lane.is_in_outage and lane.pace.under_way:
                ready = math.inf  # the one under way finds out
            if len(self._lanes) > 1 and lane.pace.under_way >= _MOST_OF_FREE * (self._places() - self._under_way):
                ready = math.inf  # what is left is for other models: this one may have stopped answering
            if ready <= now + TICK:
                return lane, now
            earliest = ready if earliest is None else min(earliest, ready)
        return None, earliest

    async def _dispatch(self) -> None:
        task = self._task
        try:
            await self._let_all_go()
        except BaseException as error:
            self._retire(task)
            self._fail_all(error)
            if not isinstance(error, asyncio.CancelledError):
                logger.exception("the dispatcher of submissions failed", extra={"event": "internal_error"})
            else:
                raise
        else:
            self._retire(task)

    def _retire(self, task: asyncio.Task[None] | None) -> None:
        """The next ticket needs another dispatcher: also one that is queued by who hears that this one failed."""
        if self._task is task:  # not another one's, since it was closed
            self._task = None

    async def _let_all_go(self) -> None:
        while True:
            now = self._loop.time()
            lane, ready = self._choose(now)
            if ready is None:
                return
            if lane is None:
                await self._until(ready)
            elif self._under_way >= self._places():
                await self._until(math.inf)
            elif self._ceiling is None:
                self._let_go(lane, now)
            elif (opens_at := self._limit_opens_at(self._ceiling, now)) > now:
                # Not a wait in the limiter: meanwhile somebody more urgent may come, or everybody go.
                await self._until(opens_at)
            else:
                await self._ceiling.take(now)
                self._let_go(lane, now)

    async def _until(self, moment: float) -> None:
        """Until the moment has come, or something has happened."""
        self._wake = wake = self._loop.create_future()
        timer = self._loop.call_at(moment, self._notice) if moment < math.inf else None
        try:
            await wake
        finally:
            if timer is not None:
                timer.cancel()

    def _places(self) -> int:
        """How many may be under way: while the service can't be reached, one finds out for all."""
        return 1 if self._failures else self._parallel

    def _limit_opens_at(self, ceiling: _Ceiling, now: float) -> float:
        """From when on the user's limit lets another one go.

        Those let go may wait at the wire where several come together. Where it is further behind, as after a slow
        connection, they wait here: each would hold an idle connection, and none would ever make up for it.
        """
        wire = self._wire
        assert wire is not None  # as there is a ceiling
        return max(ceiling.opens_for(0, now), wire.opens_for(self._in_line, now) - _LONGEST_AT_THE_WIRE)

    def _let_go(self, lane: Lane, now: float) -> None:
        self._lanes.move_to_end(lane.model)
        ticket = lane.take()
        ticket.waiting = False
        lane.pace.sent(now)
        self._under_way += 1
        try:
            ticket.go()
        except Exception as error:
            logger.exception("a submission could not be started", extra={"event": "internal_error"})
            self.finished(lane.model)
            ticket.turn_failed(error)

    def _fail_all(self, error: BaseException) -> None:
        queued = [ticket for lane in self._lanes.values() for queue in lane.queues.values() for _, _, ticket in queue]
        queued += [ticket for _, _, _, ticket in self._later]
        self._later.clear()
        for lane in self._lanes.values():
            lane.queues.clear()
        for ticket in queued:
            if ticket.waiting:
                ticket.waiting = False
                ticket.turn_failed(error)


def _believed_until(now: float, estimate: float | None) -> float:
    return now + max(_LEAST_BELIEVED, _BELIEVED * (estimate or _USUAL))


class _Ceiling:
    """The limit that the user set: aiolimiter's bucket, sized so that no window sees more than `rate` + 1.

    There are two: one decides who goes, the other keeps together-coming requests apart on their way to the wire.

    The bucket starts empty and so lets its capacity through at once, then leaks: capacity + leak * per in a window.
    Capacity 1 is the smoothest; loops wake up about every millisecond, so fast rates need 10 ms worth of capacity.
    """

    # A timer that fires a hair early must find the bucket open.
    _ONE = 1 - 1e-6

    def __init__(self, limit: RateLimit, opens_at: float) -> None:
        self._capacity = max(1, int(min(limit.per_second * 0.01, limit.rate / 2)))
        self._leak = (limit.rate + (1 - self._capacity)) / limit.per
        self._limiter = AsyncLimiter(self._capacity, self._capacity / self._leak)
        self._first_at = opens_at
        self._empty_at = -math.inf  # when the bucket will have run dry

    def is_open(self, now: float) -> bool:
        return now + TICK >= self._first_at and self._limiter.has_capacity(self._ONE)

    def opens_for(self, others: int, now: float) -> float:
        """When there will be room for one more, who comes after so many others; now, if there is."""
        return (now if self.is_open(now) else self.opens_at(now)) + others / self._leak

    def opens_at(self, now: float) -> float:
        """When there will be room, later than now."""
        return max(self._first_at, self._empty_at - (self._capacity - 1) / self._leak, now + 2e-6)

    async def take(self, now: float) -> float:
        """Use the room that there is; returns without suspending: in how many seconds the bucket will have run dry."""
        await self._limiter.acquire(self._ONE)
        self._empty_at = max(self._empty_at, now) + 1 / self._leak
        return self._empty_at - now
