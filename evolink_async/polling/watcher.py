"""The one watcher of a client on a loop: a heap of moments with looks due, one timer as scheduler, a few looks at once.

Every wait and every pool follows its tasks here, so one look serves all who follow a task. Timer and asyncio tasks
exist only while something is followed.

    planned ──due──▶ looking ──answer──▶ planned again, or ended
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import heapq
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from evolink_async.errors import (
    APIStatusError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    ResponseError,
    TaskLostError,
)
from evolink_async.http.answers import Answer, hint_of, read_json, read_task, status_error
from evolink_async.http.hints import http_date
from evolink_async.http.observer import Observation
from evolink_async.http.pace import Lane, Pace
from evolink_async.http.reads import Reader
from evolink_async.http.retry import RetryPolicy
from evolink_async.own_tasks import own_task
from evolink_async.polling.endings import has_result
from evolink_async.polling.price import price_for
from evolink_async.polling.schedule import (
    PRICE,
    SHORTEST,
    Expectation,
    Schedule,
    Sightings,
    class_of,
    may_be_early,
    shared_moment,
)
from evolink_async.types import Task, TaskReading, TaskStatus

logger = logging.getLogger("evolink_async.polling")

BATCH_PATH = "/v1/tasks/batch"
BATCH_SIZE = 50  # the vendor's client sends at most this many ids
WORKERS = 64  # looks under way at once
# Status requests per second, of everybody together. The service's limit is not published ("safe to poll frequently"
# says one of its guides), so this is our guess; a refusal lowers it for a while.
REQUESTS_PER_SECOND = 500.0
_AT_ONCE = 10
_GROWN_BATCH = 1.25  # after each that was answered
_FEWEST_REQUESTS, _REFUSED_SHARE, _REGAINED_SHARE = 0.5, 0.7, 1.01  # per second; at a refusal; each second after
_BATCH_DISCOUNT = 0.5  # in a batch a look costs the service less, but its provider as much
_REPRICED_EVERY, _SAMPLE, _NEW_PRICE_SHARE, _USED_SHARE = 1.0, 200, 0.3, 0.95
_PROBE_PATIENCE = 1.0  # seconds that the others wait for the answer to the first batch
# Until a batch has told of an end: so often a task was over right after a batch had told that it runs, and batches are
# not believed any more. It is tried at most once in so many seconds.
_BEHIND, _COMPARED_EVERY = 3, 10.0
# So many looks in batches that told nothing about a task, and it gets one of its own.
_BATCH_FAILURES = 2

# An id is lost after 404 three times over a minute; a new id may be unknown for a moment.
_LOST_AFTER, _LOST_LOOKS = 60.0, 3
# No access for a minute, three times at least: nobody looks any more.
_ACCESS_PATIENCE, _DENIALS, _DENIED_PAUSE = 60.0, 3, 10.0
# Completed without any link: three looks in ten seconds, then it is taken as it is.
_EMPTY_FOR, _EMPTY_LOOKS, _EMPTY_PAUSE = 10.0, 3, 5.0
_NOTICE_PAUSE = 1.0  # hints about one task are taken at most this often

# Timers may fire a hair early; what is due within this many seconds is due.
_TICK = 1e-5

_NO_BATCH = frozenset({400, 403, 404, 405})
_NO_TASK = frozenset({404, 410})
_OLDEST, _USUAL = 10.0, 60.0  # estimates; seconds, where there is none
_LONGEST_HINT = 3600.0  # a look costs next to nothing: who wants none for longer is not believed
_NO_ACCESS = frozenset({401, 403})
_MOST_WORDS = 100
_REMEMBERED = 1000
_LONGEST_REASON = 300


class Follower(Protocol):
    """Whoever wants to know about a task. Called synchronously; one that raises is told `crashed` and no more."""

    def seen(self, reading: TaskReading) -> None:
        """A look that is not the end: the task runs, or it completed and its links are still awaited."""

    def ended(self, task: Task) -> None:
        """The first terminal status that was seen. Nothing more is told."""

    def lost(self, error: EvoLinkError) -> None:
        """Nobody looks any more: the service doesn't know the id, or doesn't let us look. Nothing more is told.

        Of its task the error knows the id alone: what was seen of it last, the follower may have kept.
        """

    def crashed(self, error: BaseException) -> None:
        """The watcher itself failed. Nothing more is told."""


@dataclass(slots=True)
class Learned:
    """What a client learns about status reads; it outlives a loop.

    batches: whether the service answers for many tasks at once; None: not known yet. odd_words: unknown statuses that
    were logged. submitted: the latest tasks by id, as created. requests_per_second: how many status requests the
    service has lately allowed, infinite until it refused one. batch_size: ids in one, fewer after it refused a batch:
    whether a limit counts requests or ids isn't known. behind: how often a single look knew of an end and the batch
    right before it didn't; None: batches do tell of ends.
    """

    batches: bool | None = None
    batch_size: float = BATCH_SIZE
    behind: int | None = 0
    requests_per_second: float = math.inf
    odd_words: set[str] = field(default_factory=set)
    submitted: OrderedDict[str, Task] = field(default_factory=OrderedDict)

    def note_submitted(self, task: Task) -> None:
        """Remember a task as created: only then the service tells its estimate, and the caller may keep just the id."""
        self.submitted[task.id] = task
        if len(self.submitted) > _REMEMBERED:
            self.submitted.popitem(last=False)

    def read_batch(self, answer: Answer) -> dict[str, TaskReading] | None:
        """The tasks in the answer to a batch, by id; None if it holds none, and perhaps batches are over for good."""
        if not 200 <= answer.status < 300:
            if answer.status in _NO_BATCH:
                self._no_batches(f"HTTP {answer.status}")
            return None
        try:
            rows = read_json(answer)["data"]
            if not isinstance(rows, list):
                raise TypeError
            # Only ids that we asked for are looked up here, so whether they are valid needs no more checking.
            readings: dict[str, TaskReading] = {}
            for row in rows:
                # Where a task has several rows, one that says it is over counts.
                if row is not None and ((told := readings.get(row["id"])) is None or not told.is_terminal):
                    readings[row["id"]] = TaskReading(row)
        except (ResponseError, KeyError, TypeError):
            self._no_batches("an answer of another shape")
            return None
        if self.batches is None:
            self.batches = True
        return readings

    def grow_batches(self, factor: float) -> None:
        """Ask for more tasks at once again, if it were fewer."""
        self.batch_size = min(self.batch_size * factor, BATCH_SIZE)

    def note_behind(self) -> None:
        """A task was over right after a batch had told that it runs."""
        if self.behind is not None:
            self.behind += 1
            if self.behind >= _BEHIND:
                self._no_batches("they tell of no end")

    def _no_batches(self, why: str) -> None:
        if self.batches is not False:
            logger.info(
                "status in batches is not available (%s): asking for each task by itself",
                why,
                extra={"event": "batches_unavailable"},
            )
        self.batches = False

    def note_status(self, word: str) -> None:
        """Log a status that this library doesn't know, once."""
        if isinstance(word, TaskStatus) or word in self.odd_words or len(self.odd_words) >= _MOST_WORDS:
            return
        self.odd_words.add(word)
        word = word[:64]
        logger.warning(
            "unknown task status %r: taken as not finished", word, extra={"event": "unknown_status", "status": word}
        )


@dataclass(slots=True, eq=False)
class _Trouble:
    """What went wrong with the looks at one task, and what follows for the next. Times are loop times."""

    alone: bool = False  # the next look is a single GET
    compared: bool = False  # with what a batch has just told
    answered: bool = False  # the service answered, though perhaps nothing of use
    why: str | None = None  # the last look told nothing
    failures: int = 0
    missing: int = 0
    missing_since: float = 0.0
    denied: int = 0
    denied_since: float = 0.0
    ended: Task | None = None  # completed, but there is no link yet
    empty_looks: int = 0
    empty_since: float = 0.0


class _Due(float):
    """A loop time at which tasks are due, an entry of the heap: for those in `tasks` whose `due` it still is."""

    __slots__ = ("tasks",)

    tasks: list[_Watched]


class _Watched(Sightings):
    """What the watcher knows of one task: little, as there may be many. Times are loop times."""

    __slots__ = ("due", "expectation", "follower", "id", "lane", "trouble")

    def __init__(self, task_id: str, started: float, expectation: Expectation | None, follower: Follower) -> None:
        super().__init__(started)
        self.id = task_id
        self.expectation = expectation  # None: of an id alone nothing is known
        # Nearly always the only one; None: nobody follows any more.
        self.follower: Follower | tuple[Follower, ...] | None = follower
        self.lane: Lane | None = None  # whose pace counts on hearing of its end; None: nobody's
        self.due: _Due | None = None  # None: it is looked at, or forgotten
        self.trouble: _Trouble | None = None

    @property
    def followers(self) -> tuple[Follower, ...]:
        follower = self.follower
        if follower is None:
            return ()
        return follower if isinstance(follower, tuple) else (follower,)

    @property
    def looks_alone(self) -> bool:
        """Whether the next look is a single GET."""
        return self.trouble is not None and self.trouble.alone

    def in_trouble(self) -> _Trouble:
        if self.trouble is None:
            self.trouble = _Trouble()
        return self.trouble

    def out_of_trouble(self) -> Task | None:
        """A look told how the task is: what remains is that only its links are awaited, and then it is returned."""
        trouble = self.trouble
        if trouble is None or trouble.ended is None:
            self.trouble = None
            return None
        trouble.failures = trouble.missing = trouble.denied = 0
        trouble.alone, trouble.why, trouble.answered = False, None, True
        return trouble.ended


class Watcher:
    """Looks at tasks until they end, as rarely as the schedule allows.

    workers: looks under way at once. requests_per_second: status requests of everybody together, at most; beyond them
    looks get rarer.
    """

    def __init__(
        self,
        reader: Reader,
        schedule: Schedule,
        retry: RetryPolicy,
        pace: Pace,
        learned: Learned | None = None,
        *,
        workers: int = WORKERS,
        requests_per_second: float = REQUESTS_PER_SECOND,
        observation: Observation | None = None,
    ) -> None:
        self._observation = observation or Observation()
        self._reader = reader
        self._schedule = schedule
        self._retry = retry
        self._pace = pace
        self._learned = Learned() if learned is None else learned
        self._workers = workers
        self._most_requests = requests_per_second
        self._loop = asyncio.get_running_loop()
        self._random = random.Random()
        self._watched: dict[str, _Watched] = {}
        self._heap: list[_Due] = []
        self._dues: dict[float, _Due] = {}  # those in the heap
        self._left_behind = 0  # tasks in the heap that are planned anew or forgotten
        self._latest_start = -math.inf
        self._told: tuple[object, ...] = ()  # by the latest task that was new, and what was expected of it
        self._expected: Expectation | None = None
        self._hastened: OrderedDict[str, float] = OrderedDict()  # by id, the loop time of the latest hint
        self._look_again: set[str] = set()  # somebody asked for a look while one was under way
        self._strangers: set[str] = set()  # followed ids that only a stranger has told
        self._undated: set[str] = set()  # followed ids of which neither we nor the service's clock have told the age
        self._looks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._probe: list[_Watched] | None = None  # the batch under way that finds out whether there are batches
        self._paused_until = -math.inf
        self._held_until = -math.inf  # for the probe
        self._compared_at = -math.inf
        self._refusals = 0
        self._refused_at = -math.inf
        self._priced_at = -math.inf
        self._next_request_at = -math.inf  # if requests were evenly spaced
        self._closed = False
        self.polls = 0  # looks at tasks
        self.requests = 0  # status requests; one batch is one request

    def __len__(self) -> int:
        return len(self._watched)

    def follow(
        self, task: TaskReading, follower: Follower, *, age: float | None = None, stranger: bool = False
    ) -> None:
        """Tell `follower` how the task goes on. `age`: seconds since its submission, None if only `created` tells.

        stranger: nobody of ours has the id from the service, so that it is lost as soon as that does not know it.
        """
        if self._closed:
            self._loop.call_soon(self._tell, follower, follower.lost, _closed_while_running(task.id))
            return
        watched = self._watched.get(task.id)
        if watched is not None:
            watched.follower = (*watched.followers, follower)
            if watched.lane is None:
                watched.lane = self._pace.watch(task.id, task.model)
            if not stranger:
                self._strangers.discard(task.id)
            return
        if self._observation.observer is not None:
            self._observation.observer.followed(task)
        now = self._loop.time()
        submitted = self._learned.submitted.get(task.id)
        if submitted is not None and task.created is None:
            task = TaskReading.of(submitted)
        started = shared_moment(now - (_age_of(task) if age is None else age), now)
        if started == self._latest_start:
            started = self._latest_start  # the same number for all who began together
        self._latest_start = started
        model = task.model
        known = model is not None or task.estimated_time is not None
        expectation = self._expect(task, model) if known else None
        watched = _Watched(task.id, started, expectation, follower)
        # Of an id alone nothing is known, and a task that ended needs only its links: the first look is at once.
        moment = now
        if task.is_terminal:
            watched.in_trouble().ended = task.task
        elif expectation is not None and (age is not None or task.created is not None):
            moment = max(now, expectation.next_look(watched, self._random.random()))
        self._watched[task.id] = watched
        watched.lane = self._pace.watch(task.id, model)
        if age is None:
            self._undated.add(task.id)
        if stranger:
            self._strangers.add(task.id)
        self._plan(watched, moment, now)

    def follows(self, task_id: str) -> bool:
        """Whether anybody follows this task."""
        return task_id in self._watched

    def unfollow(self, task_id: str, follower: Follower) -> None:
        """Stop telling `follower`; the last one to go ends the looks."""
        watched = self._watched.get(task_id)
        if watched is None:
            self._tell_left(task_id)
            return
        watched.follower = tuple(other for other in watched.followers if other is not follower)
        if not watched.follower:
            self._forget(watched)
            self._tell_left(task_id)

    def notify(self, task_id: str) -> None:
        """A hint that the task may have ended: look now, at most once per task and second."""
        watched = self._watched.get(task_id)
        now = self._loop.time()
        while self._hastened and now - next(iter(self._hastened.values())) >= _NOTICE_PAUSE:
            self._hastened.popitem(last=False)
        if watched is None or task_id in self._hastened:
            return
        self._hastened[task_id] = now
        if watched.due is None:  # it is looked at
            self._look_again.add(task_id)
        else:
            watched.in_trouble().alone = True
            self._unplan(watched)
            self._plan(watched, now, now)

    def unreachable(self, task_id: str) -> bool:
        """Whether looks were tried and not one of them was answered."""
        watched = self._watched.get(task_id)
        if watched is None or watched.trouble is None or watched.looked_at != watched.started:
            return False
        return watched.trouble.failures > 0 and not watched.trouble.answered

    def failure(self, task_id: str) -> str | None:
        """What the last look at a task failed with, None if it didn't."""
        watched = self._watched.get(task_id)
        return None if watched is None or watched.trouble is None else watched.trouble.why

    async def aclose(self) -> None:
        """End all looks; followers are told with `ClosedError`."""
        self._closed = True
        for watched in list(self._watched.values()):
            self._tell_lost(watched, _closed_while_running(watched.id))
        looks = list(self._looks)
        for look in looks:
            look.cancel()
        if looks:
            await asyncio.wait(looks)

    # Planning

    def _expect(self, task: TaskReading, model: str | None) -> Expectation:
        told = task.kind, model, task.raw.get("usage"), task.raw.get("task_info")
        if told != self._told or self._expected is None or self._expected is not self._schedule.latest:
            price = task.credits_reserved
            task_class = class_of(task.kind, model, None if price is None else float(price), task.video_duration)
            self._told, self._expected = told, self._schedule.expect(task_class, task.estimated_time)
        return self._expected

    def _plan(self, watched: _Watched, moment: float, now: float) -> None:
        moment = shared_moment(moment, now)
        due = self._dues.get(moment)
        if due is not None:
            due.tasks.append(watched)
            watched.due = due
            return
        due = watched.due = _Due(moment)
        due.tasks = [watched]
        self._dues[due] = due
        heapq.heappush(self._heap, due)
        if self._heap[0] is due:
            self._set_timer()

    def _unplan(self, watched: _Watched) -> None:
        """Leave it in the heap behind. Such tasks must not pile up until their time comes."""
        watched.due = None
        self._left_behind += 1
        if self._left_behind > len(self._watched) + BATCH_SIZE:
            self._left_behind = 0
            for due in self._heap:
                due.tasks = [watched for watched in due.tasks if watched.due is due]
            self._heap = sorted(due for due in self._heap if due.tasks)
            self._dues = {due: due for due in self._heap}

    def _price_looks(self) -> None:
        """Once a second: make looks as dear as it takes for all of them to fit into the requests there may be."""
        now = self._loop.time()
        elapsed = now - self._priced_at
        if elapsed < _REPRICED_EVERY or self._first() is None:
            return
        self._priced_at = now
        learned = self._learned
        if math.isfinite(elapsed):
            regained = _REGAINED_SHARE ** min(elapsed, 100.0)
            learned.requests_per_second *= regained
            learned.grow_batches(regained)
        looks = self._requests_per_second * (learned.batch_size if learned.batches else 1)
        weights = [len(due.tasks) for due in self._heap]
        dues = self._random.choices(self._heap, weights, k=min(_SAMPLE, len(self._watched)))
        sample = map(self._random.choice, (due.tasks for due in dues))
        urgencies = [task.expectation.urgency(task, now) for task in sample if task.expectation is not None]
        price = price_for(urgencies, len(self._watched), _USED_SHARE * looks) if urgencies else 0.0
        least = PRICE * (_BATCH_DISCOUNT if learned.batches else 1.0)
        share = _NEW_PRICE_SHARE if math.isfinite(elapsed) else 1.0
        self._schedule.price = max(least, (1 - share) * self._schedule.price + share * price)

    @property
    def _requests_per_second(self) -> float:
        return min(self._learned.requests_per_second, self._most_requests)

    def _count_request(self, now: float) -> None:
        """Space the next requests; a few may come at once."""
        gap = 1 / self._requests_per_second
        self._next_request_at = max(self._next_request_at, now - _AT_ONCE * gap) + gap

    def _again(self, watched: _Watched, moment: float, now: float) -> None:
        """Plan the next look after one."""
        if watched.id in self._look_again:
            self._look_again.discard(watched.id)
            watched.in_trouble().alone = True
            moment = now
        self._plan(watched, moment, now)

    def _forget(self, watched: _Watched, *, ended: bool = False) -> tuple[Follower, ...]:
        """Look at it no more. Returns who followed it: nobody, if it was forgotten before."""
        followers = watched.followers
        if watched.follower is not None:
            watched.follower = None
            lane, expectation = watched.lane, watched.expectation
            if lane is not None and ended:
                self._pace.ended(lane)
            elif lane is not None:
                self._pace.unwatch(lane, watched.id, None if expectation is None else expectation.estimate)
            del self._watched[watched.id]
            if watched.due is not None:
                self._unplan(watched)
            self._look_again.discard(watched.id)
            self._strangers.discard(watched.id)
            self._undated.discard(watched.id)
            if not self._watched:
                self._rest()
        return followers

    def _rest(self) -> None:
        """Nobody follows anything: no timer, no look under way."""
        self._heap.clear()
        self._dues.clear()
        self._left_behind = 0
        self._set_timer()
        if not self._loop.is_closed():  # a forgotten wait may be collected after its loop
            for look in self._looks:
                look.cancel()  # one of them may be running right now: it has nothing left to wait for

    def _set_timer(self) -> None:
        moment = math.inf
        # With as many looks under way as may be, the first that ends sets it.
        if self._heap and len(self._looks) < self._workers:
            moment = max(self._heap[0], self._paused_until, self._held_until, self._next_request_at)
        if self._timer is not None:
            if self._timer_at == moment:
                return
            self._timer.cancel()
            self._timer = None
        self._timer_at = moment
        if moment < math.inf:
            # An empty context: whoever happened to follow first must not lend his to everybody's looks.
            self._timer = self._loop.call_at(moment, self._dispatch, context=contextvars.Context())

    def _dispatch(self) -> None:
        """Look at what is due, and come back when the next look is due."""
        self._timer = None
        try:
            self._price_looks()
            while len(self._looks) < self._workers and (group := self._next_group()):
                look = own_task(self._loop, self._look(group), "evolink poll")
                self._looks.add(look)
                look.add_done_callback(functools.partial(self._look_done, group))
            self._set_timer()
        except Exception as error:  # noqa: BLE001  (whatever it is, whoever waits must hear of it)
            self._crash(error)

    def _look_done(self, group: list[_Watched], look: asyncio.Task[None]) -> None:
        self._looks.discard(look)
        if self._probe is group:
            self._probe = None
            self._held_until = -math.inf
        if look.cancelled():  # perhaps by somebody who cancels every task that he finds
            now = self._loop.time()
            for watched in group:
                if watched.follower is not None and watched.due is None:
                    self._again(watched, now + SHORTEST, now)
        elif (error := look.exception()) is not None:
            self._crash(error)
        self._set_timer()

    def _crash(self, error: BaseException) -> None:
        """A fault of ours: every follower hears of it, none hangs."""
        logger.error("the watcher failed", exc_info=error, extra={"event": "internal_error"})
        for watched in list(self._watched.values()):
            followers = self._forget(watched)
            self._tell_left(watched.id)
            for follower in followers:
                self._tell(follower, follower.crashed, error)

    def _next_group(self) -> list[_Watched]:
        """What is looked at together now: one task, or a batch where the service has them. Empty: nothing is due."""
        now = self._loop.time()
        if now + _TICK < max(self._paused_until, self._held_until, self._next_request_at):
            return []
        due = self._first()
        if due is None or due > now + _TICK:
            return []
        group = [self._take(due)]
        self._count_request(now)
        probing = self._learned.batches is None
        if not group[0].looks_alone and (self._learned.batches or (probing and self._probe is None)):
            most = int(self._learned.batch_size)
            while len(group) < most and (due := self._first()) is not None and self._comes_along(due, now):
                group.append(self._take(due))
            if probing and len(group) > 1:
                self._probe = group
                # If batches work, it would be a waste to ask for the others one by one meanwhile.
                self._held_until = now + _PROBE_PATIENCE
        return group

    def _first(self) -> _Due | None:
        """When the next look is due: at the last of its tasks. Those left behind there are dropped."""
        while self._heap:
            due = self._heap[0]
            tasks = due.tasks
            while tasks:
                if tasks[-1].due is due:
                    return due
                tasks.pop()
                self._left_behind -= 1
            del self._dues[heapq.heappop(self._heap)]
        return None

    def _comes_along(self, due: _Due, now: float) -> bool:
        """Whether the look that is due next may share the batch that is sent now: that request is paid for already."""
        watched, early = due.tasks[-1], due - now
        if early <= _TICK:
            return not watched.looks_alone
        # Where something went wrong the pause stands; of an id alone nothing is known.
        return (
            watched.trouble is None and watched.expectation is not None and may_be_early(early, due - watched.looked_at)
        )

    def _take(self, due: _Due) -> _Watched:
        """Who is looked at now."""
        watched = due.tasks.pop()
        watched.due = None
        return watched

    # Looking

    async def _look(self, group: list[_Watched]) -> None:
        group = [watched for watched in group if watched.follower is not None]
        if not group:
            return
        asked_at = self._loop.time()
        self.requests += 1
        self.polls += len(group)
        if len(group) == 1:
            answer = await self._ask("GET", f"/v1/tasks/{quote(group[0].id, safe='')}")
            self._tell_looked(group, answer)
            self._take_answer(group[0], answer, asked_at)
        else:
            answer = await self._ask("POST", BATCH_PATH, {"task_ids": [watched.id for watched in group]})
            self._tell_looked(group, answer)
            self._take_batch(group, answer, asked_at)

    async def _ask(self, method: str, path: str, json: Any = None) -> Answer | EvoLinkError:
        try:
            return await self._reader.attempt(method, path, json)
        except (ConnectionFailedError, ConfigurationError) as error:
            return error

    def _take_answer(self, watched: _Watched, answer: Answer | EvoLinkError, asked_at: float) -> None:
        if watched.follower is None:
            return
        compared = False
        if watched.trouble is not None:  # at one look: a later one may tell what has happened since
            compared, watched.trouble.compared = watched.trouble.compared, False
        if not isinstance(answer, Answer) or not 200 <= answer.status < 300:
            self._refused(watched, answer, asked_at)
            return
        try:
            reading = read_task(answer)
            if reading.id != watched.id:
                raise ResponseError(f"asked for task {watched.id}, the answer is about another")
        except ResponseError as error:
            watched.in_trouble().answered = True
            self._failed(watched, error, asked_at)
        else:
            if reading.is_terminal and compared:
                self._learned.note_behind()
            self._saw(watched, reading, answer, asked_at, self._loop.time(), alone=True)

    def _take_batch(self, group: list[_Watched], answer: Answer | EvoLinkError, asked_at: float) -> None:
        readings = self._learned.read_batch(answer) if isinstance(answer, Answer) else None
        if readings is not None:
            self._learned.grow_batches(_GROWN_BATCH)
        elif isinstance(answer, Answer) and answer.status == 429 and asked_at > self._refused_at:
            # Down to single looks: they may get through where batches never do.
            self._learned.batch_size = max(1.0, self._learned.batch_size / 2)
        now = self._loop.time()
        for watched in group:
            if watched.follower is None:
                continue
            reading = None if readings is None else readings.get(watched.id)
            if reading is not None:
                assert isinstance(answer, Answer)
                self._saw(watched, reading, answer, asked_at, now, alone=False)
            elif readings is None and self._learned.batches is not False:
                self._batch_failed(watched, answer, asked_at)
            else:
                # Absent means wrong, expired or foreign, and perhaps only "not yet": one answer of its own tells.
                trouble = watched.in_trouble()
                trouble.alone, trouble.answered = True, trouble.answered or isinstance(answer, Answer)
                self._again(watched, now, now)
        if readings is not None and self._learned.behind is not None and now >= self._compared_at + _COMPARED_EVERY:
            self._compared_at = now
            self._compare(group, now)

    def _compare(self, group: list[_Watched], now: float) -> None:
        """Look at once by itself at one of those that a batch tells to run though it should have ended.

        An unfinished task is brought up to date by the look at it (vendor's client); whether by a batch isn't known.
        """
        for watched in group:
            expectation = watched.expectation
            if watched.due is None or watched.trouble is not None or expectation is None:
                continue
            if expectation.should_be_over(watched):
                trouble = watched.in_trouble()
                trouble.alone = trouble.compared = True
                self._unplan(watched)
                self._plan(watched, now, now)
                return

    def _batch_failed(self, watched: _Watched, answer: Answer | EvoLinkError, asked_at: float) -> None:
        """Perhaps it is only the batch that fails, and for ever: then each task gets a look of its own."""
        status = answer.status if isinstance(answer, Answer) else None
        trouble = watched.in_trouble()
        trouble.alone = status in _NO_ACCESS or (status != 429 and trouble.failures + 1 >= _BATCH_FAILURES)
        self._refused(watched, answer, asked_at)

    # What was seen

    def _saw(
        self, watched: _Watched, reading: TaskReading, answer: Answer, asked_at: float, now: float, *, alone: bool
    ) -> None:
        ended = None if watched.trouble is None else watched.out_of_trouble()
        self._refusals = 0
        if reading.is_terminal or ended is not None:
            self._saw_end(watched, reading.task, ended, asked_at, now, alone=alone)
            return
        self._learned.note_status(reading.status)
        expectation = watched.expectation
        if expectation is None:
            expectation = watched.expectation = self._expect(reading, reading.model)
        if watched.id in self._undated and reading.created is not None:
            self._undated.discard(watched.id)
            watched.started = now - _age_of(reading, answer)
        watched.unfinished(asked_at, reading.progress)
        moment = expectation.next_look(watched, self._random.random())
        self._again(watched, max(now + SHORTEST, moment), now)
        self._tell_seen(watched, reading)

    def _saw_end(
        self, watched: _Watched, task: Task, ended: Task | None, asked_at: float, now: float, *, alone: bool
    ) -> None:
        """ended: what it was when it ended before, without a result."""
        if ended is None:
            if not alone and watched.looked_at > watched.started:
                self._learned.behind = None
            if watched.expectation is not None and watched.id not in self._undated:
                watched.expectation.over(watched, now)
        elif not (task.succeeded and has_result(task)):
            task = ended  # the first terminal status stands
        if not has_result(task) and task.succeeded and self._awaits_links(watched, asked_at, alone=alone):
            trouble = watched.in_trouble()
            trouble.ended, trouble.alone, trouble.answered = task, True, True
            self._again(watched, now + (_EMPTY_PAUSE if alone else 0.0), now)
            self._tell_seen(watched, TaskReading.of(task))
            return
        followers = self._forget(watched, ended=True)
        if self._observation.observer is not None:
            self._observation.observer.ended(task)
        for follower in followers:
            self._tell(follower, follower.ended, task)

    def _awaits_links(self, watched: _Watched, asked_at: float, *, alone: bool) -> bool:
        """Whether to look once more at a task that completed without any link. Looks in batches don't count."""
        trouble = watched.in_trouble()
        if alone:
            trouble.empty_since = trouble.empty_since if trouble.empty_looks else asked_at
            trouble.empty_looks += 1
        return trouble.empty_looks < _EMPTY_LOOKS or asked_at - trouble.empty_since < _EMPTY_FOR - _TICK

    def _refused(self, watched: _Watched, answer: Answer | EvoLinkError, asked_at: float) -> None:
        """There was no answer, or one with an error status."""
        if isinstance(answer, ConfigurationError):  # the caller's function gives no key
            self._denied(watched, answer)
            return
        if not isinstance(answer, Answer):
            self._failed(watched, answer, asked_at)
            return
        trouble = watched.in_trouble()
        trouble.answered = True
        error = status_error(answer)
        denied = answer.status in _NO_ACCESS
        missing = error.code == "invalid_task_id" or (answer.status in _NO_TASK and _is_of_the_service(answer, error))
        ended = trouble.ended
        if ended is not None and (denied or missing):  # a look without links like another
            self._saw_end(watched, ended, ended, asked_at, self._loop.time(), alone=True)
        elif denied:
            self._denied(watched, error)
        elif missing:
            self._missing(watched)
        else:
            self._failed(watched, answer, asked_at)

    def _missing(self, watched: _Watched) -> None:
        now = self._loop.time()
        trouble = watched.in_trouble()
        trouble.why = None
        if trouble.missing == 0:
            trouble.missing_since = now
        trouble.missing += 1
        if watched.id in self._strangers:
            self._tell_lost(watched, TaskLostError("the service knows no such task", task=Task(id=watched.id)))
        elif trouble.missing >= _LOST_LOOKS and now - trouble.missing_since >= _LOST_AFTER - _TICK:
            message = f"the service no longer knows the task: 404 {trouble.missing} times over {_LOST_AFTER:g} s"
            logger.warning("task %s: %s", watched.id, message, extra={"event": "task_lost", "task_id": watched.id})
            self._tell_lost(watched, TaskLostError(message, task=Task(id=watched.id)))
        else:
            trouble.alone = True
            self._again(watched, now + min(30.0, 2.0**trouble.missing), now)

    def _denied(self, watched: _Watched, error: EvoLinkError) -> None:
        now = self._loop.time()
        trouble = watched.in_trouble()
        trouble.why = _short(error)
        if trouble.denied == 0:
            trouble.denied_since = now
        trouble.denied += 1
        if trouble.denied >= _DENIALS and now - trouble.denied_since >= _ACCESS_PATIENCE - _TICK:
            self._tell_lost(watched, error)
        else:
            self._again(watched, now + _DENIED_PAUSE, now)

    def _failed(self, watched: _Watched, why: Answer | EvoLinkError, asked_at: float) -> None:
        """A look that told nothing: the task is as it was."""
        trouble = watched.in_trouble()
        trouble.why = _short(status_error(why) if isinstance(why, Answer) else why)
        failures = trouble.failures = trouble.failures + 1
        hint = hint_of(why) if isinstance(why, Answer) else None
        if hint is not None and hint > _LONGEST_HINT:
            hint = None
        if isinstance(why, Answer) and why.status == 429:
            self._pause(hint, asked_at)
        delay = self._retry.delay(failures, hint, self._random.random())
        now = self._loop.time()
        self._again(watched, now + max(SHORTEST, delay), now)

    def _pause(self, hint: float | None, asked_at: float) -> None:
        """Nobody looks at anything for a while. Looks under way at the last refusal say nothing new."""
        now = self._loop.time()
        if asked_at > self._refused_at:
            self._refusals += 1
            self._refused_at = now
            learned = self._learned
            refused = min(learned.requests_per_second, self._most_requests)
            learned.requests_per_second = max(_FEWEST_REQUESTS, _REFUSED_SHARE * refused)
        pause = self._retry.delay(max(1, self._refusals), hint, self._random.random())
        if self._paused_until <= now:
            logger.info("no task is looked at for %.1f s", pause, extra={"event": "polls_paused", "seconds": pause})
        self._paused_until = max(self._paused_until, now + pause)
        self._next_request_at = max(self._next_request_at, self._paused_until)  # and then one by one

    # Telling

    def _tell_looked(self, group: list[_Watched], answer: Answer | EvoLinkError) -> None:
        if self._observation.observer is not None:
            self._observation.observer.looked([watched.id for watched in group], answer)

    def _tell_left(self, task_id: str) -> None:
        if self._observation.observer is not None:
            self._observation.observer.left(task_id)

    def _tell_seen(self, watched: _Watched, reading: TaskReading) -> None:
        if self._observation.observer is not None:
            self._observation.observer.seen(reading)
        for follower in watched.followers:
            if not self._tell(follower, follower.seen, reading):
                self.unfollow(watched.id, follower)

    def _tell_lost(self, watched: _Watched, error: EvoLinkError) -> None:
        followers = self._forget(watched, ended=isinstance(error, TaskLostError))
        if self._observation.observer is not None:
            self._observation.observer.lost(watched.id, error)
        for follower in followers:
            # Each its own: an exception raised in two tasks collects the tracebacks and notes of both.
            self._tell(follower, follower.lost, copy.copy(error))

    def _tell(self, follower: Follower, how: Callable[[Any], None], what: Any) -> bool:
        """Call a follower; a fault of his is his alone. False: there was one."""
        try:
            how(what)
        except Exception as error:
            logger.exception("a follower of a task failed", extra={"event": "internal_error"})
            if how != follower.crashed:
                self._tell(follower, follower.crashed, error)
            return False
        return True


def _closed_while_running(task_id: str) -> ClosedError:
    return ClosedError(
        f"the client was closed while task {task_id} was running; it goes on: wait for it again by its id"
    )


def _short(error: EvoLinkError) -> str:
    """There may be as many of them as there are tasks."""
    return str(error)[:_LONGEST_REASON]


def _age_of(task: TaskReading, answer: Answer | None = None) -> float:
    """Seconds since creation: by the service's clock, if an answer tells what it shows, else by ours, which may differ.

    No more than ten estimates: a task that runs so long would be looked at so rarely that a wrong moment of creation,
    or a wrong clock, would cost minutes.
    """
    if task.created is None:
        return 0.0
    now = http_date(answer.headers.get("date", "")) if answer is not None else None
    age = (time.time() if now is None else now) - task.created.timestamp()
    return min(max(0.0, age), _OLDEST * (task.estimated_time or _USUAL))


def _is_of_the_service(answer: Answer, error: APIStatusError) -> bool:
    """Whether it speaks of a task at all: the page of a gateway that has lost its service does not."""
    return not answer.body.strip() or isinstance(error.body, dict)
