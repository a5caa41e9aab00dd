"""A watcher over a service that a test describes, and a follower that keeps what it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from evolink_async.errors import EvoLinkError
from evolink_async.http.answers import Answer
from evolink_async.http.pace import Pace
from evolink_async.http.retry import RetryPolicy
from evolink_async.polling.schedule import SHORTEST, Expectation, Schedule, Sightings, TaskClass
from evolink_async.polling.watcher import Learned, Watcher
from evolink_async.types import Task, TaskReading

LINK = "https://files.example/a.png"


def answer(status: int, value: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    body = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
    return Answer(status, headers or {}, body)


def running(id_: str, **more: Any) -> dict[str, Any]:
    return {"id": id_, "status": "processing", "type": "image"} | more


def done(id_: str, **more: Any) -> dict[str, Any]:
    return {"id": id_, "status": "completed", "results": [LINK]} | more


def refusal(status: int, code: str = "some_code", headers: Mapping[str, str] | None = None) -> Answer:
    return answer(status, {"error": {"code": code, "message": "no"}}, headers)


class FakeReader:
    """Stands for the service: `single(id)` and `batch(ids)` say what it answers, `calls` what it was asked when.

    What they return is an `Answer`, an error to raise, or JSON of a 200. Every call takes `latency` seconds.
    """

    def __init__(
        self,
        single: Callable[[str], Any],
        batch: Callable[[list[str]], Any] | None = None,
        latency: float = 0.01,
    ) -> None:
        self.single = single
        self.batch = batch or (lambda ids: refusal(404))
        self.latency = latency
        self.calls: list[tuple[float, str, tuple[str, ...]]] = []
        self.under_way = self.most_under_way = 0

    async def attempt(self, method: str, path: str, json: Any = None) -> Answer:
        loop = asyncio.get_running_loop()
        ids = tuple(json["task_ids"]) if method == "POST" else (path.rpartition("/")[2],)
        self.calls.append((loop.time(), method, ids))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.latency)
        finally:
            self.under_way -= 1
        value = self.batch(list(ids)) if method == "POST" else self.single(ids[0])
        if isinstance(value, BaseException):
            raise value
        return value if isinstance(value, Answer) else answer(200, value)

    def times(self, task_id: str | None = None) -> list[float]:
        return [at for at, _, ids in self.calls if task_id is None or task_id in ids]

    def kinds(self) -> list[str]:
        return [method for _, method, _ in self.calls]


class Ear:
    """A follower."""

    def __init__(self) -> None:
        self.over: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        self.sightings: list[Task] = []
        self.told = 0  # how often the end was told

    def seen(self, reading: TaskReading) -> None:
        self.sightings.append(reading.task)

    def ended(self, task: Task) -> None:
        self.told += 1
        self.over.set_result(task)

    def lost(self, error: EvoLinkError) -> None:
        self.told += 1
        self.over.set_exception(error)

    def crashed(self, error: BaseException) -> None:
        self.told += 1
        self.over.set_exception(error)


class PlainSchedule(Schedule):
    """Learns nothing: looks at 25 % and 60 % of the estimate, then every 5 % of it."""

    def expect(self, task_class: TaskClass, estimate: float | None) -> Expectation:
        return PlainExpectation(estimate or 30.0)


class PlainExpectation(Expectation):
    def __init__(self, estimate: float) -> None:
        self.estimate = estimate

    def next_look(self, task: Sightings, random: float) -> float:
        for share in (0.25, 0.6):
            if task.looked_at - task.started < 0.9 * share * self.estimate:
                return task.started + share * self.estimate * (1 - random / 10)
        return task.looked_at + max(SHORTEST, self.estimate / 20) * (1 - random / 10)

    def should_be_over(self, task: Sightings) -> bool:
        return task.looked_at - task.started > 2 * self.estimate

    def urgency(self, task: Sightings, now: float) -> float:
        return 0.0

    def over(self, task: Sightings, heard_at: float) -> None:
        pass


@asynccontextmanager
async def watching(
    reader: FakeReader,
    *,
    schedule: Schedule | None = None,
    learned: Learned | None = None,
    workers: int = 64,
    random: float | None = 0.0,
    **options: Any,
) -> AsyncIterator[Watcher]:
    """A watcher, closed in the end; its dice always show `random`, unless that is None."""
    retry = RetryPolicy()
    pace = Pace(None, 10, retry, {})
    watcher = Watcher(reader, schedule or PlainSchedule(), retry, pace, learned, workers=workers, **options)  # type: ignore[arg-type]
    if random is not None:
        watcher._random.random = lambda: random  # type: ignore[method-assign]
    try:
        yield watcher
    finally:
        await watcher.aclose()


def fresh(id_: str = "task-1", estimate: float | None = 100.0, **more: Any) -> Task:
    return Task(id=id_, status="pending", kind="image", task_info={"estimated_time": estimate}, **more)


def follow(watcher: Watcher, tasks: Iterable[Task], age: float | None = 0.0) -> list[Ear]:
    ears = []
    for task in tasks:
        ears.append(Ear())
        watcher.follow(TaskReading.of(task), ears[-1], age=age)
    return ears


def our_tasks() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("evolink ")]
