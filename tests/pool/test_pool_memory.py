"""Many tasks may be outstanding at once: what is kept of each is little, and what is over is let go."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import re
import tracemalloc
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from pool_world import Canned, answering, drain, image, images, now, task_json, world

from evolink_async import AsyncEvoLink
from evolink_async.ledger import Row
from evolink_async.ledger.values import shared
from evolink_async.pool.deadlines import Deadlines
from evolink_async.pool.record import Record
from evolink_async.pool.stages import Stages


async def test_what_is_kept_of_an_outstanding_task_is_little() -> None:
    """The answers about them are some 2,000 bytes each once they are read: keeping one would show here."""

    class Patient(Canned):
        """Takes everything and finishes nothing."""

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.count += 1
            more = {"usage": {"credits_reserved": 2.5}, "task_info": {"estimated_time": 200, "can_cancel": True}}
            return httpx.Response(200, json=task_json(f"task-unified-1757156493-{self.count:08d}", "pending", **more))

    count = 3_000
    given = images(count)
    logging.disable(logging.CRITICAL)  # pytest keeps every line
    try:
        async with httpx.AsyncClient(transport=Patient()) as http_client:  # noqa: SIM117
            async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client) as client:
                client._core.memory.rates[given[0].model] = 1e9
                async with client.pool(images(1)) as first:
                    while not first.outstanding:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                    gc.collect()
                    tracemalloc.start()
                    async with client.pool(given, max_outstanding=count) as pool:
                        while len(pool.outstanding) < count:  # noqa: ASYNC110
                            await asyncio.sleep(0.01)
                        gc.collect()
                        each = tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    assert each < 900, f"{each:.0f} bytes"


@pytest.mark.looptime
async def test_two_requests_that_the_service_gives_the_same_task_both_have_their_outcome(api_key: str) -> None:
    def same(request: httpx.Request) -> tuple[int, Any] | None:
        if request.method == "POST" and request.url.path.endswith("generations"):
            return 200, task_json("task-one", "pending")
        return 200, task_json("task-one", "completed" if now() > 20 else "processing", results=["https://x.test/a.png"])

    async with world(api_key) as w:
        w.wire.tamper = answering(same)
        async with w.pool(images(3)) as pool:
            await asyncio.sleep(5)
            assert pool.outstanding == ("task-one",) * 3
            assert pool.stats.outstanding == 3
            outcomes = await drain(pool)
            assert pool.outstanding == ()
        assert pool.leftovers == []
    assert sorted(outcome.index for outcome in outcomes) == [0, 1, 2]  # type: ignore[type-var]
    assert all(outcome.ok for outcome in outcomes)


@pytest.mark.looptime
async def test_the_task_of_an_unfinished_outcome_tells_what_is_known_of_it(api_key: str) -> None:
    def running(request: httpx.Request) -> tuple[int, Any] | None:
        if request.method == "GET":
            return 200, task_json(request.url.path.rpartition("/")[2], "processing", progress=40)
        return None

    async with world(api_key) as w:
        w.wire.tamper = answering(running)
        async with w.pool([image()], task_timeout=60) as pool:
            (outcome,) = await drain(pool)
        (booked,) = w.book
    task = outcome.task
    assert task is not None
    assert (task.id, task.status, task.progress) == (booked["task_id"], "processing", 40)
    assert (task.kind, task.model) == ("image", image().model)
    assert task.usage.credits_reserved == outcome.credits
    assert outcome.error is not None
    assert outcome.error.task == task  # type: ignore[attr-defined]
    assert "client.tasks.wait" in repr(task)


@pytest.mark.looptime
async def test_every_request_has_an_idempotency_key_of_its_own(api_key: str) -> None:
    async with world(api_key) as w:
        outcomes = []
        for _ in range(2):
            async with w.pool(images(30)) as pool:
                outcomes += [await pool.run(image("run")), *await drain(pool)]
        posted = [post.key for post in w.wire.posts]
    assert len(set(posted)) == len(posted) == 62
    assert sorted(posted) == sorted(outcome.idempotency_key for outcome in outcomes)  # type: ignore[type-var]
    assert all(re.fullmatch(r"ea-[0-9a-f]{32}", key) for key in posted)


# Deadlines


HOME = Mock()  # of the records below


def outstanding(stages: Stages, number: int) -> Record:
    record = Record(HOME, number, None, row=Row(number, b"", shared("", "")))
    assert record.row is not None
    record.row.task_id = f"task-{number}"
    stages.hold(record, record.row.task_id)
    return record


@pytest.mark.looptime
async def test_deadlines_expire_in_time_and_never_early() -> None:
    stages, began, ends = Stages(1000), dict[Record, float](), list[tuple[float, float]]()
    deadlines = Deadlines(stages, lambda record: ends.append((began[record], now())))

    def start(number: int) -> None:
        record = outstanding(stages, number)
        began[record] = now()
        deadlines.start(record, 100, asyncio.get_running_loop())

    for number in range(50):
        start(number)
        await asyncio.sleep(0.03)
    await asyncio.sleep(110)
    assert len(ends) == 50
    assert all(began + 100 <= end + 1e-4 <= began + 100.2 for began, end in ends)
    start(50)
    await asyncio.sleep(101)
    assert len(ends) == 51, "after a rest as well"


@pytest.mark.looptime
async def test_what_is_over_does_not_expire_and_is_let_go_long_before_its_time() -> None:
    stages, expired = Stages(100_000), list[Record]()
    deadlines = Deadlines(stages, expired.append)
    loop = asyncio.get_running_loop()
    last = [outstanding(stages, number) for number in range(3)]
    for _ in range(20):
        records = [outstanding(stages, 10 + number) for number in range(1000)]
        for record in records:
            deadlines.start(record, 1000, loop)
            await asyncio.sleep(0.002)
        for record in records:
            stages.close(record)
        del record, records
    assert sum(isinstance(kept, Record) and kept.home is HOME for kept in gc.get_objects()) < 200
    for record in last:
        deadlines.start(record, 1000, loop)
    await asyncio.sleep(1001)
    assert expired == last
    assert all(record.ends == math.inf for record in last)
    deadlines.start(last[0], 1000, loop)
    deadlines.close()
    await asyncio.sleep(1001)
    assert expired == last


@pytest.mark.looptime
async def test_a_shorter_deadline_that_begins_later_is_kept_as_well() -> None:
    stages, ends = Stages(1000), list[tuple[str | None, float]]()
    deadlines = Deadlines(stages, lambda record: ends.append((record.task_id, now())))
    loop = asyncio.get_running_loop()
    for number, seconds in enumerate([100, 10, None, 50, 10]):
        deadlines.start(outstanding(stages, number), seconds, loop)
    await asyncio.sleep(200)
    assert [name for name, _ in ends] == ["task-1", "task-4", "task-3", "task-0"]
    assert [round(at) for _, at in ends] == [10, 10, 50, 100]
