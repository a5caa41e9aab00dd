"""When the next paid request may be sent.

`ModelPace` is pure arithmetic over times passed in; `Pace` is the one dispatcher that acts on it. Everything that wants
to submit (pools and single calls) puts a `Ticket` in the queue of its model and is told when it may go: there is one
waiter at the limiter, so there is no race for a place and no starvation.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import logging
import math
import random
import re
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import IntEnum

from aiolimiter import AsyncLimiter

from evolink_async.errors import ConfigurationError
from evolink_async.http.retry import RetryPolicy

logger = logging.getLogger("evolink_async.pace")

# Without a limit from the user, until the service refuses: gentle, since the limits are unpublished.
START_BURST = 10
START_RATE = 5.0
SLOWEST = 0.2
# Growth per accepted request, in requests per second: before the first refusal about +25 % a second, then +5 % a second
# back to the rate that was refused, and above it gentle probing, bolder the longer nothing was refused: the limits of
# a service change, and a refusal may have had nothing to do with our rate.
_GROWTH, _RECOVERY, _PROBING = 0.25, 0.2, 0.004
_LIMIT_KEPT = 0.95
_MEASURED_OVER = 5.0  # seconds; where ten requests take longer, as long as those. Probing doubles in the same time
_LEAST_MEASURED = 0.5  # seconds: over less than this a rate says nothing
# Who uses less than this share of the rate learns nothing about a higher one.
_USED_SHARE = 0.5
# Timers may fire a hair early; what is due within this many seconds is due.
_TICK = 1e-5

_PER_WORD = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_LIMIT_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:/|per)\s*([a-z]+)\s*", re.I | re.A)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `rate` submissions per `per` seconds, evenly spaced.

    In no window of `per` seconds are more than `rate` + 1 sent. Also written as text: "5/s", "60/min", "1000/h".
    """

    rate: float
    per: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "per"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigurationError(f"RateLimit.{name} must be a positive number, got {value!r}")

    @property
    def per_second(self) -> float:
        """Submissions per second."""
        return self.rate / self.per

    @classmethod
    def parse(cls, value: RateLimit | str) -> RateLimit:
        """A limit from text such as "60/min". Raises `ConfigurationError` for anything else."""
        if isinstance(value, RateLimit):
            return value
        match = _LIMIT_TEXT.fullmatch(str(value))
        per = _PER_WORD.get(match[2].lower()) if match else None
        if match is None or per is None:
            raise ConfigurationError(f'a rate limit reads like "5/s", "60/min" or "1000/h", got {value!r}')
        return cls(float(match[1]), per)


class Urgency(IntEnum):
    """Who goes first within one party's queue."""

    RETURNED = 0  # was sent already and must go again
    CALLER = 1  # somebody awaits it
    SOURCE = 2  # pulled from an iterable


class ModelPace:
    """How fast one model may be asked now. Pure: the caller passes the time, in seconds of any one clock.

    rate: submissions per second, infinite until there is a reason to slow down where the user set a ceiling.
    """

    __slots__ = (
        "_before",
        "_counted",
        "_due",
        "_limit",
        "_refusals",
        "_since",
        "burst",
        "cool_until",
        "last_cut",
        "rate",
    )

    def __init__(self, rate: float, burst: int, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self.cool_until = -math.inf
        self.last_cut = -math.inf
        self._due = now  # when the next one would be due at an even spacing
        self._limit = math.inf  # the rate that was refused last
        self._refusals = 0  # in a row
        self._counted = 0  # accepted since `_since`
        self._since: float | None = None  # the first of those
        self._before = 0.0  # accepted per second in the stretch before

    def ready_at(self, now: float) -> float:
        """The moment from which the next one may be sent."""
        if math.isinf(self.rate):
            return self.cool_until
        return max(self.cool_until, self._due - (self.burst - 1) / self.rate)

    def sent(self, now: float) -> None:
        if not math.isinf(self.rate):
            self._due = max(self._due, now) + 1 / self.rate

    def accepted(self, now: float) -> None:
        """The service took one: go a little faster, if we are as fast as we may be."""
        self._refusals = 0
        stretch = max(_MEASURED_OVER, 10 / self.rate)
        if self._since is None or now - self._since > stretch:
            if self._since is not None:
                self._before = self._measured(now) or 0.0
            self._counted, self._since = 0, now
        self._counted += 1
        used = max(self._before, self._measured(now) or 0.0) or math.inf
        if self.rate > START_RATE and self.rate * _USED_SHARE > used:
            return
        if math.isinf(self._limit):
            growth = _GROWTH
        elif self.rate < self._limit:
            growth = _RECOVERY
        else:
            growth = min(_GROWTH, _PROBING * 2 ** min(max(0.0, now - self.last_cut) / stretch, 10))
        # Where seconds pass between two, each may not count for more than it does at the start.
        self.rate += growth * min(1.0, self.rate / START_RATE)

    def refused(self, now: float, sent_at: float, hint: float | None, retry: RetryPolicy, rand: float) -> None:
        """A 429: nobody asks this model before the hint, and from then on slower than what was refused.

        `sent_at`: when the refused request was let go.
        """
        if sent_at >= self.cool_until or not self._refusals:
            self._refusals += 1  # those of one volley are one refusal
        pause = retry.delay(self._refusals, None, rand) if hint is None else max(hint, 0.05) + 0.001
        self.cool_until = max(self.cool_until, now + pause)
        # Requests that were under way when the rate was cut say nothing about the new rate.
        if sent_at <= self.last_cut or now - self.last_cut < 1:
            return
        current = self._measured(now)
        measured = current or self._before
        if measured:
            refused_rate, cut = min(self.rate, measured), 0.95
        elif math.isinf(self.rate):
            refused_rate, cut = max(self._counted / _LEAST_MEASURED, START_RATE), 0.7
        else:
            refused_rate, cut = self.rate, 0.7
        # One refusal may be bad luck: what we come back to shrinks step by step.
        self._limit = refused_rate if math.isinf(self._limit) else max(refused_rate, _LIMIT_KEPT * self._limit)
        self.rate = max(SLOWEST, cut * refused_rate)
        self.burst = 1
        self.last_cut = now
        if current or self.rate > START_RATE:  # slow ones are measured over several refusals and their pauses
            self._before, self._counted, self._since = measured, 0, None
        self._due = max(now, self.cool_until)

    def _measured(self, now: float) -> float | None:
        """Accepted per second in this stretch, None while it is too short to tell."""
        if self._since is None or now - self._since < max(_LEAST_MEASURED, 3 / self.rate):
            return None
        return self._counted / (now - self._since)

    def cool(self, until: float) -> None:
        """Nobody asks this model before `until`."""
        self.cool_until = max(self.cool_until, until)
        self._counted, self._since = 0, None


@dataclass(slots=True, eq=False)
class Ticket:
    """One wish to send a paid request.

    `go` is called, synchronously, the moment it may be sent; `failed`, if the pace itself failed and it never will.
    """

    model: str
    party: Hashable
    urgency: Urgency
    go: Callable[[], None]
    not_before: float = -math.inf
    failed: Callable[[BaseException], None] | None = None
    withdrawn: bool = field(default=False, init=False)


class _Lane:
    """The queue of one model: one heap per party, parties taking turns."""

    __slots__ = ("model", "pace", "parties", "queues")

    def __init__(self, model: str, pace: ModelPace) -> None:
        self.model = model
        self.pace = pace
        self.parties: deque[Hashable] = deque()
        self.queues: dict[Hashable, list[tuple[int, int, Ticket]]] = {}

    def put(self, ticket: Ticket, number: int) -> None:
        queue = self.queues.get(ticket.party)
        if queue is None:
            queue = self.queues[ticket.party] = []
            self.parties.append(ticket.party)
        heapq.heappush(queue, (ticket.urgency, number, ticket))

    def has_work(self) -> bool:
        """Whether a ticket waits; drops those that were withdrawn."""
        while self.parties:
            party = self.parties[0]
            queue = self.queues[party]
            while queue and queue[0][2].withdrawn:
                heapq.heappop(queue)
            if queue:
                return True
            self.parties.popleft()
            del self.queues[party]
        return False

    def take(self) -> Ticket:
        party = self.parties[0]
        ticket = heapq.heappop(self.queues[party])[2]
        self.parties.rotate(-1)
        return ticket


class Pace:
    """The one dispatcher of paid requests of a client on one loop.

    `parallel` bounds the requests under way, so that none waits behind others for a connection after it was let go.
    `memory` holds the learned rate of each model and outlives the loop. Its task exists only while something waits.
    """

    def __init__(
        self,
        limit: RateLimit | None,
        parallel: int,
        retry: RetryPolicy,
        memory: dict[str, float],
        rng: random.Random | None = None,
    ) -> None:
        self._limit = limit
        self._ceiling = _Ceiling(limit) if limit is not None else None
        self._parallel = parallel
        self._under_way = 0
        self._retry = retry
        self._memory = memory
        self._random = rng or random.Random()
        self._lanes: dict[str, _Lane] = {}
        self._turns: deque[str] = deque()
        self._later: list[tuple[float, int, Ticket]] = []
        self._numbers = itertools.count()
        self._unreachable_until = -math.inf
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Event | None = None
        self.refusals = 0

    # What the outside does

    def enqueue(self, ticket: Ticket) -> None:
        """Queue a ticket; `ticket.go` is called when it is its turn."""
        loop = asyncio.get_running_loop()
        if ticket.not_before > loop.time():
            heapq.heappush(self._later, (ticket.not_before, next(self._numbers), ticket))
        else:
            self._lane(ticket.model, loop.time()).put(ticket, next(self._numbers))
        if self._task is None:
            self._wake = asyncio.Event()
            self._task = loop.create_task(self._dispatch(), name="evolink pace", context=contextvars.Context())
        else:
            self._notice()

    def withdraw(self, ticket: Ticket) -> None:
        """Take a ticket back; its `go` will not be called."""
        ticket.withdrawn = True
        self._notice()

    def finished(self) -> None:
        """A request that was let go is no longer under way."""
        self._under_way -= 1
        self._notice()

    def accepted(self, model: str, now: float) -> None:
        """The service took a request for this model."""
        lane = self._lane(model, now)
        lane.pace.accepted(now)
        if not math.isinf(lane.pace.rate):
            self._memory[model] = lane.pace.rate

    def refused(self, model: str, now: float, sent_at: float, hint: float | None) -> None:
        """The service answered 429."""
        self.refusals += 1
        lane = self._lane(model, now)
        lane.pace.refused(now, sent_at, hint, self._retry, self._random.random())
        self._memory[model] = lane.pace.rate
        self._notice()

    def cool(self, model: str, until: float) -> None:
        """Nobody asks this model before `until` (loop time)."""
        self._lane(model, asyncio.get_running_loop().time()).pace.cool(until)
        self._notice()

    def unreachable(self, now: float, sent_at: float) -> None:
        """No connection could be made: everybody waits, so that a thousand requests don't each knock."""
        if sent_at < self._unreachable_until:
            return  # it was let go before the pause began, and says nothing new
        self._failures += 1
        self._unreachable_until = now + self._retry.delay(self._failures, None, self._random.random())
        self._notice()

    def reachable(self) -> None:
        """A connection was made."""
        if self._failures:
            self._failures = 0
            self._unreachable_until = -math.inf
            self._notice()

    def cool_down_of(self, model: str, now: float) -> float:
        """Seconds for which this model may not be asked, because the service said so."""
        lane = self._lanes.get(model)
        return max(0.0, lane.pace.cool_until - now) if lane else 0.0

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

    def _lane(self, model: str, now: float) -> _Lane:
        lane = self._lanes.get(model)
        if lane is None:
            learned = self._memory.get(model)
            if learned is not None:
                pace = ModelPace(learned, 1, now)
            elif self._limit is not None:
                pace = ModelPace(math.inf, 1, now)
            else:
                pace = ModelPace(START_RATE, START_BURST, now)
            lane = self._lanes[model] = _Lane(model, pace)
            self._turns.append(model)
        return lane

    def _notice(self) -> None:
        if self._wake is not None:
            self._wake.set()

    def _release_due(self, now: float) -> None:
        while self._later and (self._later[0][0] <= now + _TICK or self._later[0][2].withdrawn):
            _, number, ticket = heapq.heappop(self._later)
            if not ticket.withdrawn:
                self._lane(ticket.model, now).put(ticket, number)

    def _choose(self, now: float) -> tuple[_Lane | None, float]:
        """The lane whose turn it is, or when to look again."""
        self._release_due(now)
        earliest = self._later[0][0] if self._later else math.inf
        for model in self._turns:
            lane = self._lanes[model]
            if not lane.has_work():
                continue
            ready = max(lane.pace.ready_at(now), self._unreachable_until)
            if ready <= now + _TICK:
                return lane, now
            earliest = min(earliest, ready)
        return None, earliest

    async def _dispatch(self) -> None:
        wake = self._wake
        assert wake is not None
        try:
            await self._let_all_go(wake)
        except BaseException as error:
            # Nobody is left waiting for a turn that will not come.
            self._fail_all(error)
            if not isinstance(error, asyncio.CancelledError):
                logger.exception("the dispatcher of submissions failed")
            else:
                raise
        finally:
            if self._wake is wake:
                self._task = self._wake = None

    async def _let_all_go(self, wake: asyncio.Event) -> None:
        now = asyncio.get_running_loop().time
        while True:
            wake.clear()
            lane, ready = self._choose(now())
            if lane is None and math.isinf(ready):
                return
            if lane is None:
                await _until(wake, ready)
            elif self._under_way >= self._places():
                await wake.wait()
            elif self._ceiling is not None and not self._ceiling.is_open():
                # Not a wait in the limiter: meanwhile somebody more urgent may come, or everybody go.
                await _until(wake, self._ceiling.opens_at(now()))
            else:
                if self._ceiling is not None:
                    await self._ceiling.take(now())
                self._let_go(lane, now())

    def _places(self) -> int:
        """How many may be under way: while the service can't be reached, one finds out for all."""
        return 1 if self._failures else self._parallel

    def _let_go(self, lane: _Lane, now: float) -> None:
        self._turns.remove(lane.model)
        self._turns.append(lane.model)
        ticket = lane.take()
        lane.pace.sent(now)
        self._under_way += 1
        try:
            ticket.go()
        except Exception as error:
            logger.exception("a submission could not be started")
            self._under_way -= 1
            if ticket.failed is not None:
                ticket.failed(error)

    def _fail_all(self, error: BaseException) -> None:
        queued = [ticket for lane in self._lanes.values() for queue in lane.queues.values() for _, _, ticket in queue]
        queued += [ticket for _, _, ticket in self._later]
        self._later.clear()
        for lane in self._lanes.values():
            lane.parties.clear()
            lane.queues.clear()
        for ticket in queued:
            if not ticket.withdrawn and ticket.failed is not None:
                ticket.failed(error)


class _Ceiling:
    """The limit that the user set: aiolimiter's bucket, sized so that no window sees more than `rate` + 1.

    The bucket starts empty and so lets its capacity through at once, then leaks: capacity + leak * per in a window.
    Capacity 1 is the smoothest; loops wake up about every millisecond, so fast rates need 10 ms worth of capacity.
    """

    # A timer that fires a hair early must find the bucket open.
    _ONE = 1 - 1e-6

    def __init__(self, limit: RateLimit) -> None:
        self._capacity = max(1, int(min(limit.per_second * 0.01, limit.rate / 2)))
        self._leak = (limit.rate + 1 - self._capacity) / limit.per
        self._limiter = AsyncLimiter(self._capacity, self._capacity / self._leak)
        self._empty_at = -math.inf  # when the bucket will have run dry

    def is_open(self) -> bool:
        return self._limiter.has_capacity(self._ONE)

    def opens_at(self, now: float) -> float:
        """When there will be room, later than now."""
        return max(self._empty_at - (self._capacity - 1) / self._leak, now + 2e-6)

    async def take(self, now: float) -> None:
        """Use the room that there is; returns without suspending."""
        await self._limiter.acquire(self._ONE)
        self._empty_at = max(self._empty_at, now) + 1 / self._leak


async def _until(wake: asyncio.Event, moment: float) -> None:
    try:
        async with asyncio.timeout_at(moment):
            await wake.wait()
    except TimeoutError:
        pass
