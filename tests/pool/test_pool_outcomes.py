"""Every status an outcome can have, reached from the wire, and the fields of outcomes."""

from __future__ import annotations

import asyncio
import pickle
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import pytest
from pool_world import MODEL, Handler, World, answering, drain, image, images, now, response, task_json, world

from evolink_async import (
    APIStatusError,
    AsyncEvoLink,
    BadRequestError,
    ConnectionFailedError,
    ImageRequest,
    InvalidRequestError,
    NotSubmittedError,
    Outcome,
    QuotaExhaustedError,
    RetryPolicy,
    SubmitOutcomeUnknownError,
    TaskCancelledError,
    TaskFailedError,
    TaskLostError,
    TaskTimeoutError,
)
from evolink_async.emulator import Fault


async def only(w: World, request: ImageRequest | None = None, **options: Any) -> Outcome:
    async with w.pool([request or image()], **options) as pool:
        (outcome,) = await drain(pool)
    assert pool.leftovers == []
    return outcome


@pytest.mark.looptime
async def test_completed(api_key: str) -> None:
    async with world(api_key) as w:
        before = datetime.now(UTC)
        request = image(key="mine", metadata={"row": 3})
        outcome = await only(w, request)
        (booked,) = w.book
    assert outcome.status == "completed"
    assert outcome.ok
    assert outcome.error is None
    assert outcome.index == 0
    assert outcome.key == outcome.identity == "mine"
    assert outcome.request is request
    assert outcome.attempts == 1
    assert outcome.credits == Decimal(str(booked["charged"]))
    assert outcome.idempotency_key == booked["idempotency_key"]
    assert outcome.unwrap().id == booked["task_id"]
    assert outcome.urls == outcome.unwrap().urls != ()
    assert outcome.submitted_at is not None
    assert outcome.finished_at is not None
    assert before <= outcome.submitted_at <= outcome.finished_at <= datetime.now(UTC)
    assert outcome.submitted_at.tzinfo is UTC
    assert outcome.finished_at.tzinfo is UTC
    assert outcome.files == ()
    assert outcome.from_ledger is False
    with pytest.raises(AttributeError):
        outcome.index = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(outcome)) == outcome


@pytest.mark.looptime
async def test_failed(api_key: str) -> None:
    async with world(api_key, failure_share=1) as w:
        outcome = await only(w)
    assert outcome.status == "failed"
    assert not outcome.ok
    assert isinstance(outcome.error, TaskFailedError)
    assert outcome.credits == 0
    assert outcome.task is not None
    with pytest.raises(TaskFailedError):
        outcome.unwrap()


@pytest.mark.looptime
@pytest.mark.parametrize("how", ["stopped", "left", "run deserted"])
async def test_failed_and_not_generated_once_more_because_the_pool_ended_is_failed(api_key: str, how: str) -> None:
    """To call it `not_submitted` would deny the task that there was."""
    async with world(api_key, client_options={"rate_limit": "1/min"}, failure_share=1, seed=2) as w:
        pool = w.pool(None if how == "run deserted" else [image()], retry_failed=1)
        async with pool:
            running = asyncio.create_task(pool.run(image())) if how == "run deserted" else None
            await asyncio.sleep(1)
            w.emulator.end(w.book[0]["task_id"], "failed", code="service_error")
            await asyncio.sleep(45)
            assert not pool.outstanding, "the second try waits for its turn"
            outcomes = []
            if how == "stopped":
                pool.stop()
                outcomes = await drain(pool)
            elif running is not None:
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
        (outcome,) = [*outcomes, *pool.leftovers]
        assert len(w.book) == 1
    assert outcome.status == "failed"
    assert isinstance(outcome.error, TaskFailedError)
    assert outcome.task is not None
    assert (outcome.task.id, outcome.task.status) == (w.book[0]["task_id"], "failed")
    assert outcome.attempts == 1


@pytest.mark.looptime
async def test_what_the_second_try_cost_is_not_known_if_only_the_failed_first_one_was_told(api_key: str) -> None:
    untold = Fault(method="POST", path="/v1/images", patch={"usage": None})
    async with world(api_key, models={MODEL: {"failure_share": 0}}, faults=[untold]) as w:
        async with w.pool([image()], retry_failed=1) as pool:
            await asyncio.sleep(1)
            w.emulator.end(w.book[0]["task_id"], "failed", code="service_error")
            (outcome,) = await drain(pool)
        assert len(w.book) == 2
    assert outcome.ok
    assert outcome.credits is None


@pytest.mark.looptime
async def test_the_time_of_a_task_that_is_generated_once_more_begins_anew(api_key: str) -> None:
    async with world(api_key) as w:
        ids: list[str] = []

        def rule(request: httpx.Request) -> tuple[int, Any] | None:
            if request.url.path == "/v1/tasks/batch":
                return 404, {}
            if request.method == "POST":
                ids.append(f"task-unified-1757156493-{len(ids):08d}")
                return 200, task_json(ids[-1], "pending")
            task_id = request.url.path.removeprefix("/v1/tasks/")
            if task_id == ids[0] and now() >= 60:
                error = {"code": "service_error", "message": "try again"}
                return 200, task_json(task_id, "failed", error=error)
            if now() >= 140:
                return 200, task_json(task_id, "completed", results=["https://files.example/1.png"])
            return 200, task_json(task_id, "processing")

        w.wire.tamper = answering(rule)
        async with w.pool([image()], retry_failed=1, task_timeout=100) as pool:
            (outcome,) = await drain(pool)
    assert len(ids) == 2
    assert outcome.status == "completed", "80 s is less than it may take"
    assert 140 <= now() < 165


@pytest.mark.looptime
async def test_cancelled(api_key: str) -> None:
    async with world(api_key) as w:

        def rule(request: httpx.Request) -> tuple[int, Any] | None:
            task_id = request.url.path.removeprefix("/v1/tasks/")
            return (200, task_json(task_id, "canceled")) if request.method == "GET" else None

        w.wire.tamper = answering(rule)
        outcome = await only(w)
    assert outcome.status == "cancelled"
    assert isinstance(outcome.error, TaskCancelledError)
    assert outcome.credits == Decimal("2.5") or outcome.credits == Decimal(3)  # what was reserved is kept


@pytest.mark.looptime
async def test_unfinished_by_task_timeout(api_key: str) -> None:
    async with world(api_key) as w:
        outcome = await only(w, task_timeout=9)
        assert now() == pytest.approx(9, abs=0.5)
        assert w.book[0]["polls"] >= 1
    assert outcome.status == "unfinished"
    assert isinstance(outcome.error, TaskTimeoutError)
    assert outcome.task is not None
    assert outcome.error.task.id == outcome.task.id == w.book[0]["task_id"]
    assert outcome.credits is not None


@pytest.mark.looptime
async def test_a_task_timeout_shorter_than_the_first_look_still_looks_once(api_key: str) -> None:
    async with world(api_key) as w:
        outcome = await only(w, task_timeout=0.5)
        assert outcome.status == "unfinished"
        assert w.book[0]["polls"] == 1
        assert now() < 2


@pytest.mark.looptime
async def test_a_task_whose_last_look_finds_it_ended_is_completed(api_key: str) -> None:
    async with world(api_key, speed=1000) as w:
        outcome = await only(w, task_timeout=0.2)
    assert outcome.ok


@pytest.mark.looptime
async def test_a_task_whose_looks_all_fail_is_unfinished_soon_after_its_timeout(api_key: str) -> None:
    async with world(api_key, faults=[Fault(path="/v1/tasks", status=500)]) as w:
        outcome = await only(w, task_timeout=100)
        assert 100 <= now() <= 120
        assert len(w.wire.reads) > 3
    assert outcome.status == "unfinished"
    assert isinstance(outcome.error, TaskTimeoutError)


@pytest.mark.looptime
async def test_a_task_that_completed_without_links_until_its_timeout_is_completed(api_key: str) -> None:
    """It isn't running any more: to call it unfinished would make somebody wait for it again."""

    async def without_links(request: httpx.Request, go_on: Handler) -> httpx.Response:
        response = await go_on(request)
        if request.method == "POST":
            return response
        answer = {"id": request.url.path.rpartition("/")[2], "status": "completed", "results": []}
        return httpx.Response(200, json=answer)

    async with world(api_key) as w:
        w.wire.tamper = without_links
        outcome = await only(w, task_timeout=27)  # looked at after about 25 s, and twice more within ten
    assert (outcome.status, outcome.ok, outcome.urls) == ("completed", True, ())


@pytest.mark.looptime
async def test_task_timeouts_of_many_tasks_are_kept_one_by_one(api_key: str) -> None:
    async with world(api_key, {"rate_limit": "1/s"}) as w:
        async with w.pool(images(20), task_timeout=8) as pool:
            async for outcome in pool:
                assert outcome.status == "unfinished"
                index = outcome.index
                assert index is not None
                assert index + 8 <= now() + 1e-6 <= index * 1.1 + 9
        assert pool.outstanding == ()


@pytest.mark.looptime
async def test_lost(api_key: str) -> None:
    async with world(api_key) as w:
        w.wire.tamper = answering(lambda request: (404, {}) if request.method == "GET" else None)
        outcome = await only(w)
    assert outcome.status == "lost"
    assert isinstance(outcome.error, TaskLostError)
    assert outcome.task is not None
    assert outcome.credits is not None


@pytest.mark.looptime
async def test_without_access_for_a_minute_tasks_are_unfinished_and_the_error_says_so(api_key: str) -> None:
    async with world(api_key) as w:
        w.wire.tamper = answering(lambda request: (403, {}) if request.method == "GET" else None)
        outcome = await only(w)
    assert outcome.status == "unfinished"
    assert isinstance(outcome.error, APIStatusError)
    assert outcome.task is not None


@pytest.mark.looptime
async def test_rejected_before_sending(api_key: str) -> None:
    async with world(api_key) as w:
        outcome = await only(w, ImageRequest(model="seedance-2.0", prompt="x"))
        assert w.wire.posts == []
    assert outcome.status == "rejected"
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.attempts == 0
    assert outcome.idempotency_key is None
    assert outcome.submitted_at is None
    assert outcome.finished_at is not None


@pytest.mark.looptime
async def test_rejected_by_the_service(api_key: str) -> None:
    async with world(api_key, {"validate": False}) as w:
        outcome = await only(w, image(size="17x4"))
    assert outcome.status == "rejected"
    assert isinstance(outcome.error, BadRequestError)
    assert outcome.attempts == 1
    assert outcome.credits is None
    assert outcome.submitted_at is not None


@pytest.mark.looptime
async def test_rejected_because_the_host_cannot_be_reached(unused_port: int) -> None:
    async with AsyncEvoLink(
        base_url=f"http://127.0.0.1:{unused_port}",
        retry=RetryPolicy(base_delay=0.05, max_delay=0.1, unreachable_for=0.3),
    ) as client:
        outcomes = await client.run_many(images(3))
    assert {str(outcome.status) for outcome in outcomes} == {"rejected"}
    assert all(isinstance(outcome.error, ConnectionFailedError) for outcome in outcomes)
    assert {outcome.attempts for outcome in outcomes} == {0}
    assert {outcome.submitted_at for outcome in outcomes} == {None}


@pytest.mark.looptime
async def test_unknown_under_hold(api_key: str) -> None:
    async with world(api_key, {"on_lost_response": "hold"}, faults=[Fault(method="POST", drop="after", nth=(1,))]) as w:
        outcome = await only(w)
        assert len(w.wire.posts) == len(w.book) == 1
    assert outcome.status == "unknown"
    assert isinstance(outcome.error, SubmitOutcomeUnknownError)
    assert outcome.error.idempotency_key == outcome.idempotency_key == w.book[0]["idempotency_key"]
    assert outcome.error.request is outcome.request
    assert outcome.attempts == 1
    assert outcome.task is None


@pytest.mark.looptime
async def test_a_lost_response_is_replayed_and_the_task_found(api_key: str) -> None:
    async with world(api_key, faults=[Fault(method="POST", drop="after", nth=(1,))]) as w:
        outcome = await only(w)
        assert len(w.book) == 1
        assert len(w.wire.posts) == 2
    assert outcome.ok
    assert outcome.attempts == 2


@pytest.mark.looptime
async def test_not_submitted(api_key: str) -> None:
    async with world(api_key, credits=0) as w:
        with pytest.raises(QuotaExhaustedError):
            async with w.pool(images(1)) as pool:
                (outcome,) = await drain(pool)
    assert outcome.status == "not_submitted"
    assert isinstance(outcome.error, NotSubmittedError)
    assert isinstance(outcome.error.__cause__, QuotaExhaustedError)
    assert outcome.attempts == 1


@pytest.mark.looptime
async def test_refusals_for_the_rate_are_waited_out(api_key: str) -> None:
    async with world(api_key, rate=0.5, burst=1) as w:
        async with w.pool(images(40)) as pool:
            outcomes = await drain(pool)
        stats = pool.stats
        assert stats.rate_limited == sum(w.emulator.book()["refused"]["429"].values()) > 0
        assert stats.posts == len(w.wire.posts) == sum(outcome.attempts for outcome in outcomes)
    assert all(outcome.ok for outcome in outcomes)


@pytest.mark.looptime
async def test_submitted_at_is_of_the_post_that_was_not_in_vain(api_key: str) -> None:
    times: list[datetime] = []

    async def refuse_once(request: httpx.Request, go_on: Handler) -> httpx.Response:
        if request.method == "POST":
            times.append(datetime.now(UTC))
            if len(times) == 1:
                await asyncio.sleep(0)
                return response(429, {}, **{"retry-after": "2"})
        return await go_on(request)

    async with world(api_key) as w:
        w.wire.tamper = refuse_once
        outcome = await only(w)
    assert outcome.attempts == 2
    assert outcome.submitted_at is not None
    assert times[0] < outcome.submitted_at <= times[1]
