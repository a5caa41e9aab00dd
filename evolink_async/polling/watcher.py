"""The one watcher of a client on a loop: a heap of due looks, one scheduler, a few workers.

Every wait and every pool follows its tasks here, so one look serves all who follow a task. The asyncio tasks exist only
while something is followed.
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
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from evolink_async.errors import (
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    ResponseError,
    TaskLostError,
)
from evolink_async.http.answers import Answer, hint_of, read_json, read_task, status_error, task_from
from evolink_async.http.reads import Reader
from evolink_async.http.retry import RetryPolicy
from evolink_async.polling.schedule import Schedule, Sighting
from evolink_async.types import Task, TaskStatus

logger = logging.getLogger("evolink_async.polling")

BATCH_PATH = "/v1/tasks/batch"
BATCH_SIZE = 50  # the vendor's client sends at most this many ids
WORKERS = 64
# A batch takes along what is due within this many seconds: the request is paid for already.
_GATHER = 0.5

# An id is lost after 404 three times over a minute; a new id may be unknown for a moment.
_LOST_AFTER, _LOST_LOOKS = 60.0, 3
_ACCESS_PATIENCE = 60.0
# Completed without any link: three looks in ten seconds, then it is taken as it is.
_EMPTY_LOOKS, _EMPTY_PAUSE = 3, 5.0

# Timers may fire a hair early; what is due within this many seconds is due.
_TICK = 1e-5

_NO_BATCH = frozenset({400, 403, 404, 405})
_NO_TASK = frozenset({404, 410})
_NO_ACCESS = frozenset({401, 403})


class Follower(Protocol):
    """Whoever wants to know about a task. Called synchronously; must not raise."""

    def seen(self, task: Task) -> None:
        """A look: the task is not finished."""

    def ended(self, task: Task) -> None:
        """The first terminal status that was seen. Nothing more is told."""

    def lost(self, error: EvoLinkError) -> None:
        """Nobody looks any more: the service doesn't know the id, or doesn't let us look. Nothing more is told."""

    def crashed(self, error: BaseException) -> None:
        """The watcher itself failed. Nothing more is told."""


@dataclass(slots=True, eq=False)
class _Watched:
    """What the watcher knows of one task. Times are loop times."""

    task: Task
    started: float
    estimate: float | None
    followers: list[Follower] = field(default_factory=list)
    due: float = math.inf
    looking: bool = False
    heard: bool = False  # the service answered at least once
    look_again: bool = False  # somebody asked for a look while one was under way
    alone: bool = False  # the next look is a single GET
    last_look: float | None = None
    failures: int = 0
    missing: int = 0
    missing_since: float = 0.0
    denied_since: float | None = None
    empty_looks: int = 0
    hastened: float = -math.inf


class Watcher:
    """Looks at tasks until they end, as rarely as the schedule allows."""

    def __init__(self, reader: Reader, schedule: Schedule, retry: RetryPolicy, *, workers: int = WORKERS) -> None:
        self._reader = reader
        self._schedule = schedule
        self._retry = retry
        self._workers_max = workers
        self._loop = asyncio.get_running_loop()
        self._random = random.Random()
        self._watched: dict[str, _Watched] = {}
        self._heap: list[tuple[float, int, _Watched]] = []
        self._numbers = itertools.count()
        self._ready: deque[list[_Watched]] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._scheduler: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._paused_until = -math.inf
        self._batch: bool | None = None  # None: not known yet
        self._probing = False
        self._unknown_words: set[str] = set()
        self.polls = 0  # looks at tasks
        self.requests = 0  # status requests; one batch is one request

    def __len__(self) -> int:
        return len(self._watched)

    def follow(self, task: Task, follower: Follower, *, age: float | None = None) -> None:
        """Tell `follower` how the task goes on. `age`: seconds since its submission, None if only `created` tells."""
        watched = self._watched.get(task.id)
        if watched is not None:
            watched.followers.append(follower)
            return
        now = self._loop.time()
        # Of an id alone nothing is known, so the first look is at once.
        fresh = age is not None or task.created is not None
        if age is None:
            age = _age_by_wall_clock(task)
        watched = _Watched(task, now - age, task.estimated_time, [follower])
        self._watched[task.id] = watched
        self._plan(watched, self._interval(watched, now) if fresh else 0.0)
        self._ensure_scheduler()

    def unfollow(self, task_id: str, follower: Follower) -> None:
        """Stop telling `follower`; the last one to go ends the looks."""
        watched = self._watched.get(task_id)
        if watched is None:
            return
        watched.followers = [other for other in watched.followers if other is not follower]
        if not watched.followers:
            self._forget(watched)

    def notify(self, task_id: str) -> None:
        """A hint that the task may have ended: look now, at most once per task and second."""
        watched = self._watched.get(task_id)
        now = self._loop.time()
        if watched is None or now - watched.hastened < 1.0:
            return
        watched.hastened = now
        watched.alone = True
        if watched.looking:
            watched.look_again = True
        else:
            self._plan(watched, 0.0)

    def unreachable(self, task_id: str) -> bool:
        """Whether looks were tried and not one of them was answered."""
        watched = self._watched.get(task_id)
        return watched is not None and watched.failures > 0 and not watched.heard

    async def aclose(self) -> None:
        """End all looks; followers are told with `ClosedError`."""
        error = ClosedError("the client was closed while the task was still running; wait for it again by its id")
        for watched in list(self._watched.values()):
            self._tell_lost(watched, error)
        tasks = [task for task in (self._scheduler, *self._workers) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # Planning

    def _interval(self, watched: _Watched, now: float) -> float:
        sighting = Sighting(
            model=watched.task.model,
            kind=watched.task.kind,
            age=now - watched.started,
            estimate=watched.estimate,
            progress=watched.task.progress,
            since_last=None if watched.last_look is None else now - watched.last_look,
        )
        return self._schedule.next_look(sighting, self._random.random())

    def _plan(self, watched: _Watched, delay: float) -> None:
        watched.due = self._loop.time() + delay
        heapq.heappush(self._heap, (watched.due, next(self._numbers), watched))
        if self._heap[0][2] is watched:
            self._wake.set()

    def _forget(self, watched: _Watched) -> None:
        watched.due = math.inf
        if self._watched.get(watched.task.id) is watched:
            del self._watched[watched.task.id]
        if not self._watched:
            self._wake.set()

    def _ensure_scheduler(self) -> None:
        if self._scheduler is None:
            self._scheduler = self._spawn(self._run(), "evolink watcher")
            self._scheduler.add_done_callback(self._scheduler_done)

    def _spawn(self, coroutine: Any, name: str) -> asyncio.Task[None]:
        # An empty context: whoever happened to follow first must not lend his to everybody's looks.
        return self._loop.create_task(coroutine, name=name, context=contextvars.Context())

    def _scheduler_done(self, task: asyncio.Task[None]) -> None:
        self._scheduler = None
        if task.cancelled():
            return
        if task.exception() is not None:
            self._crash(task.exception())
        if self._watched:  # somebody followed a task just as the scheduler found nothing to do
            self._ensure_scheduler()
        else:
            self._heap.clear()

    def _crash(self, error: BaseException | None) -> None:
        assert error is not None
        logger.error("the watcher failed: %r", error)
        for watched in list(self._watched.values()):
            followers, watched.followers = watched.followers, []
            self._forget(watched)
            for follower in followers:
                follower.crashed(error)

    async def _run(self) -> None:
        while self._watched:
            self._wake.clear()
            now = self._loop.time()
            due = [] if now + _TICK < self._paused_until else self._take_due(now + _TICK)
            self._ready.extend(self._grouped(due, now))
            self._ensure_workers()
            earliest = self._heap[0][0] if self._heap else math.inf
            await self._sleep_until(max(earliest, self._paused_until))

    async def _sleep_until(self, moment: float) -> None:
        try:
            async with asyncio.timeout_at(None if math.isinf(moment) and moment > 0 else moment):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _take_due(self, until: float) -> list[_Watched]:
        """Pop what is due; entries that were planned anew, or are finished, are left behind in the heap until here."""
        due = []
        while self._heap and self._heap[0][0] <= until:
            moment, _, watched = heapq.heappop(self._heap)
            if watched.due == moment and not watched.looking:
                watched.looking = True
                due.append(watched)
        return due

    def _grouped(self, due: list[_Watched], now: float) -> Iterable[list[_Watched]]:
        """Single looks, or batches where the service has them."""
        single = [watched for watched in due if watched.alone]
        common = [watched for watched in due if not watched.alone]
        probe = self._batch is None and not self._probing and len(common) > 1
        if probe:
            self._probing = True
            single, common = single + common[BATCH_SIZE:], common[:BATCH_SIZE]
        elif self._batch and len(common) > 1:
            if len(common) % BATCH_SIZE:
                room = BATCH_SIZE - len(common) % BATCH_SIZE
                common += self._take_soon(now + _GATHER, room)
        else:
            single, common = single + common, []
        groups = [[watched] for watched in single]
        groups += [common[at : at + BATCH_SIZE] for at in range(0, len(common), BATCH_SIZE)]
        return groups

    def _take_soon(self, until: float, room: int) -> list[_Watched]:
        soon: list[_Watched] = []
        while len(soon) < room and self._heap and self._heap[0][0] <= until:
            moment, _, watched = heapq.heappop(self._heap)
            if watched.due == moment and not watched.looking:
                watched.looking = True
                soon.append(watched)
        return soon

    def _ensure_workers(self) -> None:
        for _ in range(min(len(self._ready), self._workers_max - len(self._workers))):
            worker = self._spawn(self._work(), "evolink poll")
            self._workers.add(worker)
            worker.add_done_callback(self._worker_done)

    def _worker_done(self, task: asyncio.Task[None]) -> None:
        self._workers.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._crash(task.exception())
        elif self._ready and self._watched:
            self._ensure_workers()

    async def _work(self) -> None:
        while self._ready:
            group = self._ready.popleft()
            group = [watched for watched in group if watched.followers]
            if len(group) > 1:
                await self._look_at_many(group)
            elif group:
                await self._look_at(group[0])

    # Looking

    async def _look_at(self, watched: _Watched) -> None:
        now = self._loop.time()
        self.requests += 1
        self.polls += 1
        answer = await self._ask("GET", f"/v1/tasks/{quote(watched.task.id, safe='')}")
        watched.looking = False
        if not watched.followers:
            return
        if not isinstance(answer, Answer):
            self._failed(watched, answer)
        elif not 200 <= answer.status < 300:
            self._refused(watched, answer)
        else:
            try:
                task = read_task(answer)
            except ResponseError as error:
                self._failed(watched, error)
            else:
                self._saw(watched, task, now, alone=True)

    async def _look_at_many(self, group: list[_Watched]) -> None:
        now = self._loop.time()
        self.requests += 1
        self.polls += len(group)
        answer = await self._ask("POST", BATCH_PATH, {"task_ids": [watched.task.id for watched in group]})
        tasks = self._batch_tasks(answer)
        for watched in group:
            watched.looking = False
        group = [watched for watched in group if watched.followers]
        if tasks is None:
            for watched in group:
                if self._batch is False:
                    self._plan(watched, 0.0)
                else:
                    self._failed(watched, answer)
            return
        for watched in group:
            task = tasks.get(watched.task.id)
            if task is None:
                # Absent means wrong, expired or foreign, and perhaps only "not yet": one answer of its own tells.
                watched.alone = True
                self._plan(watched, 0.0)
            else:
                self._saw(watched, task, now, alone=False)

    async def _ask(self, method: str, path: str, json: Any = None) -> Answer | EvoLinkError:
        try:
            return await self._reader.attempt(method, path, json)
        except (ConnectionFailedError, ConfigurationError) as error:
            return error

    def _batch_tasks(self, answer: Answer | EvoLinkError) -> dict[str, Task] | None:
        """The tasks of a batch answer; None if there are none, after deciding whether to ask for batches again."""
        self._probing = False
        if not isinstance(answer, Answer):
            return None
        if not 200 <= answer.status < 300:
            if answer.status in _NO_BATCH:
                self._no_batch(f"HTTP {answer.status}")
            return None
        try:
            value = read_json(answer)
            rows = value["data"]
            tasks = [task_from(row) for row in rows if isinstance(row, dict)]
        except (ResponseError, KeyError, TypeError):
            self._no_batch("an answer of another shape")
            return None
        self._batch = True
        return {task.id: task for task in tasks}

    def _no_batch(self, why: str) -> None:
        logger.info("status in batches is not available (%s): asking for each task by itself", why)
        self._batch = False

    # What was seen

    def _saw(self, watched: _Watched, task: Task, asked_at: float, *, alone: bool) -> None:
        if task.id != watched.task.id:
            self._failed(watched, ResponseError(f"asked for task {watched.task.id}, the answer is about another"))
            return
        watched.failures = watched.missing = 0
        watched.heard = True
        watched.denied_since = None
        watched.last_look = asked_at
        watched.alone = False
        if watched.task.is_terminal and not (task.succeeded and has_result(task)):
            task = watched.task  # it ended without a result before, and the first terminal status stands
        if task.is_terminal:
            self._saw_end(watched, task, alone=alone)
            return
        self._note_unknown_status(task)
        watched.task = task
        if watched.estimate is None:
            watched.estimate = task.estimated_time
        self._again(watched, self._interval(watched, self._loop.time()))
        for follower in tuple(watched.followers):
            follower.seen(task)

    def _saw_end(self, watched: _Watched, task: Task, *, alone: bool) -> None:
        watched.empty_looks += alone
        if task.succeeded and not has_result(task) and watched.empty_looks < _EMPTY_LOOKS:
            watched.task = task
            watched.alone = True
            self._again(watched, _EMPTY_PAUSE if alone else 0.0)
            return
        followers, watched.followers = watched.followers, []
        self._forget(watched)
        for follower in followers:
            follower.ended(task)

    def _again(self, watched: _Watched, delay: float) -> None:
        if watched.look_again:
            watched.look_again, watched.alone, delay = False, True, 0.0
        self._plan(watched, delay)

    def _note_unknown_status(self, task: Task) -> None:
        if not isinstance(task.status, TaskStatus) and task.status not in self._unknown_words:
            if len(self._unknown_words) < 100:
                self._unknown_words.add(task.status)
            logger.warning("unknown task status %r: taken as not finished", task.status[:64])

    def _refused(self, watched: _Watched, answer: Answer) -> None:
        error = status_error(answer)
        now = self._loop.time()
        if answer.status in _NO_TASK or error.code == "invalid_task_id":
            self._missing(watched, now)
        elif answer.status in _NO_ACCESS:
            if watched.denied_since is None:
                watched.denied_since = now
            if now - watched.denied_since >= _ACCESS_PATIENCE:
                self._tell_lost(watched, error)
            else:
                self._again(watched, 10.0)
        else:
            self._failed(watched, answer)

    def _missing(self, watched: _Watched, now: float) -> None:
        if watched.missing == 0:
            watched.missing_since = now
        watched.missing += 1
        if watched.missing >= _LOST_LOOKS and now - watched.missing_since >= _LOST_AFTER:
            message = f"the service no longer knows the task: 404 {watched.missing} times over {_LOST_AFTER:g} s"
            self._tell_lost(watched, TaskLostError(message, task=watched.task))
        else:
            watched.alone = True
            self._again(watched, min(30.0, 2.0**watched.missing))

    def _failed(self, watched: _Watched, trouble: Answer | EvoLinkError) -> None:
        """A look that told nothing: the task is as it was."""
        watched.failures += 1
        hint = None
        if isinstance(trouble, Answer):
            watched.heard = True
            hint = hint_of(trouble)
            if trouble.status == 429:
                pause = self._retry.delay(watched.failures, hint, self._random.random())
                self._paused_until = max(self._paused_until, self._loop.time() + pause)
        delay = self._retry.delay(watched.failures, hint, self._random.random())
        self._again(watched, max(1.0, delay))

    def _tell_lost(self, watched: _Watched, error: EvoLinkError) -> None:
        followers, watched.followers = watched.followers, []
        self._forget(watched)
        for follower in followers:
            follower.lost(error)


def has_result(task: Task) -> bool:
    """Whether a completed task has anything to show."""
    return bool(task.urls or task.results or task.result_data)


def _age_by_wall_clock(task: Task) -> float:
    """Seconds since creation as far as two clocks that may disagree can tell."""
    if task.created is None:
        return 0.0
    return min(max(0.0, time.time() - task.created.timestamp()), 7 * 86_400.0)
