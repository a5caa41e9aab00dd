"""Answers to looks that say something about somebody else: a gateway, a clock."""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from typing import Any

import pytest
from watching import FakeReader, answer, done, follow, fresh, running, watching

from evolink_async.errors import TaskLostError
from evolink_async.http.answers import Answer
from evolink_async.polling import watcher as watcher_module
from evolink_async.polling.schedule import Schedule
from evolink_async.polling.watcher import Learned
from evolink_async.types import Task

pytestmark = pytest.mark.looptime

PAGE = b"<html><head><title>404 Not Found</title></head></html>"
EPOCH = 1_800_000_000


def now() -> float:
    return asyncio.get_running_loop().time()


def single(id_: str = "task-1", estimate: float = 20, **more: Any) -> Any:
    return running(id_, task_info={"estimated_time": estimate}, **more)


async def test_the_404_page_of_a_gateway_says_nothing_about_a_task() -> None:
    def lost_for_two_minutes(id_: str) -> Any:
        return Answer(404, {"content-type": "text/html"}, PAGE) if now() < 130 else done(id_)

    async with watching(FakeReader(lost_for_two_minutes), learned=Learned(batches=False)) as watcher:
        (ear,) = follow(watcher, [fresh(estimate=20)])
        assert (await asyncio.wait_for(ear.over, 400)).succeeded


@pytest.mark.parametrize("body", [b"", b'{"error": {"code": "not_found", "message": "no such task"}}'])
async def test_a_404_of_the_service_three_times_in_a_minute_is_the_loss_of_a_task(body: bytes) -> None:
    async with watching(FakeReader(lambda _: Answer(404, {}, body)), learned=Learned(batches=False)) as watcher:
        (ear,) = follow(watcher, [fresh(estimate=20)])
        with pytest.raises(TaskLostError):
            await asyncio.wait_for(ear.over, 200)


@pytest.mark.parametrize(("seconds", "earliest", "latest"), [(500_000, 5, 60), (1800, 1800, 1900)])
async def test_a_look_refused_for_days_is_tried_again_like_any_other(
    seconds: int, earliest: float, latest: float
) -> None:
    refused = []

    def once(id_: str) -> Any:
        if not refused:
            refused.append(id_)
            return answer(429, {"error": {"message": "slow down"}}, {"retry-after": str(seconds)})
        return done(id_)

    async with watching(FakeReader(once), learned=Learned(batches=False)) as watcher:
        (ear,) = follow(watcher, [fresh(estimate=20)])
        await asyncio.wait_for(ear.over, 4000)
    assert earliest <= now() <= latest


@pytest.mark.parametrize("skew", [-3600.0, 300.0, 3600.0, 86_400.0 * 300])
@pytest.mark.parametrize("tells_the_time", [True, False])
@pytest.mark.parametrize("knows_when", [True, False])
async def test_a_wrong_clock_does_not_keep_a_task_from_being_looked_at(
    monkeypatch: pytest.MonkeyPatch, skew: float, tells_the_time: bool, knows_when: bool
) -> None:
    """Ours is ahead of the service's by `skew`; or, the same to us, the service says a wrong moment of creation."""
    monkeypatch.setattr(watcher_module.time, "time", lambda: EPOCH + skew + now())

    def look(id_: str) -> Answer:
        row = done(id_, created=EPOCH) if now() >= 20 else single(id_, created=EPOCH)
        return answer(200, row, {"date": formatdate(EPOCH + now(), usegmt=True)} if tells_the_time else {})

    async with watching(FakeReader(look), schedule=Schedule(), learned=Learned(batches=False)) as watcher:
        task = Task(id="task-1", created=EPOCH, task_info={"estimated_time": 20}) if knows_when else Task(id="task-1")  # type: ignore[arg-type]
        (ear,) = follow(watcher, [task], age=None)
        await asyncio.wait_for(ear.over, 400)
    assert now() < (26 if tells_the_time else 36)
