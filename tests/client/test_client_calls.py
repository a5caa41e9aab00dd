"""What each call of the client gives and raises: over TCP, and against canned answers."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import pickle
import time
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import anyio
import httpx
import pytest
from canned import body_of, canned, error

from evolink_async import (
    AsyncEvoLink,
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    ImageRequest,
    InvalidRequestError,
    NotFoundError,
    NotSubmittedError,
    PermissionDeniedError,
    QuotaExhaustedError,
    RateLimit,
    RateLimitError,
    ResponseError,
    ServerError,
    SubmitOutcomeUnknownError,
    Task,
    TaskCancelledError,
    TaskFailedError,
    TaskLostError,
    TaskTimeoutError,
    VideoRequest,
)

LINK = "https://files.example/a.png"
PICTURE = ImageRequest(model="gpt-4o-image", prompt="a lighthouse")


def now() -> float:
    return asyncio.get_running_loop().time()


def is_submission(request: httpx.Request) -> bool:
    return request.url.path.endswith("/generations")


# -- Over TCP --------------------------------------------------------------------------------------


async def test_pictures_videos_and_music_are_generated(client: AsyncEvoLink, emulator: Any) -> None:
    tasks = await asyncio.gather(
        client.images.generate(model="gpt-4o-image", prompt="a lighthouse", n=2),
        client.videos.generate(model="seedance-2.0-text-to-video", prompt="waves"),
        client.audios.generate(model="suno-v5-beta", prompt="a shanty"),
    )
    assert [task.kind for task in tasks] == ["image", "video", "audio"]
    assert all(task.succeeded and task.urls for task in tasks)
    assert [post["kind"] for post in emulator.emulator.book()["posts"]] == ["image", "video", "audio"]


async def test_a_submitted_task_is_waited_for_by_itself_or_by_its_id(client: AsyncEvoLink) -> None:
    task = await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
    assert not task.is_terminal
    assert "client.tasks.wait" in repr(task)
    first, second = await asyncio.gather(client.tasks.wait(task), client.tasks.wait(task.id))
    assert first.urls == second.urls != ()
    assert (await client.tasks.get(task.id)).urls == first.urls


async def test_run_and_submit_take_a_request_object_and_a_key(client: AsyncEvoLink, emulator: Any) -> None:
    task = await client.submit(PICTURE, idempotency_key="my-own-key-0123456789")
    again = await client.submit(PICTURE, idempotency_key="my-own-key-0123456789")
    assert task.id == again.id
    assert (await client.run(VideoRequest(model="seedance-2.0-text-to-video", prompt="waves"))).succeeded
    assert emulator.emulator.book()["posts"][0]["idempotency_key"] == "my-own-key-0123456789"


async def test_many_tasks_are_read_at_once_and_unknown_ones_left_out(client: AsyncEvoLink, emulator: Any) -> None:
    tasks = [await client.submit(PICTURE) for _ in range(6)]
    ids = [task.id for task in tasks]
    found = await client.tasks.get_many([*ids, "task-unified-1-unknown", "unknown", ids[0]])
    assert list(found) == ids
    assert emulator.emulator.book()["requests"]["POST /v1/tasks/batch"] == 1


async def test_all_tasks_are_listed_newest_first_and_filtered(emulator: Any) -> None:
    async with AsyncEvoLink(base_url=emulator.base_url, rate_limit="1000/s") as client:
        tasks = await asyncio.gather(*(client.submit(PICTURE) for _ in range(120)))
        listed = [task.id async for task in client.tasks.list()]
        assert sorted(listed) == sorted(task.id for task in tasks)
        await asyncio.gather(*map(client.tasks.wait, tasks))
        assert [task.id async for task in client.tasks.list(status="processing")] == []
        assert len([task async for task in client.tasks.list(status="completed", model="gpt-4o-image")]) == 120
        assert [task.id async for task in client.tasks.list(model="seedance-2.0-text-to-video")] == []


async def test_credits_and_unknown_endpoints_can_be_read(client: AsyncEvoLink) -> None:
    before = await client.credits()
    await client.run(PICTURE)
    after = await client.credits()
    assert before.user.remaining - after.user.remaining == Decimal("2.5") == after.user.used
    assert (await client.raw("get", "/v1/models"))["data"]


async def test_a_service_without_lists_and_batches_is_served_too(api_key: str) -> None:
    from evolink_async.emulator import Emulator

    emulator = Emulator(speed=200, api_key=api_key, batch=False, listing=False)
    async with emulator.serve() as server, AsyncEvoLink(base_url=server.base_url) as client:
        tasks = [await client.submit(PICTURE) for _ in range(3)]
        for _ in range(2):
            assert len(await client.tasks.get_many(task.id for task in tasks)) == 3
        assert emulator.book()["requests"]["POST /v1/tasks/batch"] == 1
        with pytest.raises(NotFoundError):
            [task async for task in client.tasks.list()]


async def test_five_hundred_waits_at_once_all_end(api_key: str) -> None:
    from evolink_async.emulator import Emulator

    emulator = Emulator(speed=100, api_key=api_key, batch=False)
    async with emulator.serve() as server, AsyncEvoLink(base_url=server.base_url, rate_limit="5000/s") as client:
        tasks = await asyncio.gather(*(client.submit(PICTURE) for _ in range(500)))
        ended = await asyncio.gather(*(client.tasks.wait(task) for task in tasks))
    assert {task.id for task in ended} == {task.id for task in tasks}
    assert all(task.succeeded for task in ended)
    assert len(emulator.book()["posts"]) == 500


@pytest.mark.looptime
async def test_a_service_that_is_not_there_is_a_failed_connection(unused_port: int) -> None:
    calls: list[Callable[[AsyncEvoLink], Awaitable[Any]]] = [
        lambda client: client.credits(timeout=0.3),
        lambda client: client.tasks.get("task-1", timeout=0.3),
        lambda client: client.tasks.get_many(["task-1", "task-2"], timeout=0.3),
        lambda client: client.raw("GET", "/v1/models", timeout=0.3),
        lambda client: client.raw("POST", "/v1/models", timeout=0.3),
        lambda client: client.submit(PICTURE, timeout=0.3),
        lambda client: client.run(PICTURE, timeout=0.3),
        lambda client: client.tasks.wait("task-1", timeout=0.3),
        lambda client: anext(client.tasks.list(timeout=0.3)),
    ]
    for call in calls:
        async with AsyncEvoLink(base_url=f"http://127.0.0.1:{unused_port}") as client:
            began = now()
            with pytest.raises(ConnectionFailedError):
                await call(client)
            assert now() - began < 0.5


# -- Timeouts (virtual time) -----------------------------------------------------------------------


@pytest.mark.looptime
async def test_a_timeout_covers_everything_and_leaves_a_task_to_wait_for_again() -> None:
    async def slow(request: httpx.Request) -> Any:
        await asyncio.sleep(3)
        return {"id": "task-1", "status": "processing", "progress": 7, "task_info": {"estimated_time": 100}}

    async with canned(slow) as client:
        for call in (client.run(PICTURE, timeout=30), client.tasks.wait("task-1", timeout=30)):
            began = now()
            with pytest.raises(TaskTimeoutError, match="task-1") as caught:
                await call
            assert now() - began == pytest.approx(30, abs=0.1)
            assert isinstance(caught.value, TimeoutError)
            assert caught.value.task.id == "task-1"
            assert caught.value.task.progress == 7
            assert "30 s" in str(caught.value)


@pytest.mark.looptime
async def test_without_a_timeout_a_wait_lasts_as_long_as_the_task() -> None:
    def week(request: httpx.Request) -> Any:
        status = "processing" if now() < 7 * 86_400 else "failed"
        return {"id": "task-1", "status": status, "task_info": {"estimated_time": 3600}}

    async with canned(week) as client:
        with pytest.raises(TaskFailedError):
            await client.tasks.wait("task-1", timeout=None)
    assert now() >= 7 * 86_400


@pytest.mark.looptime
async def test_the_time_waiting_for_the_rate_limit_counts() -> None:
    sent = []

    def handler(request: httpx.Request) -> Any:
        sent.append(now())
        return {"id": f"task-{len(sent)}", "status": "processing"}

    async with canned(handler, rate_limit="1/min") as client:
        results = await asyncio.gather(*(client.submit(PICTURE, timeout=90) for _ in range(5)), return_exceptions=True)
    assert [type(result).__name__ for result in results].count("Task") in (2, 3)
    assert {type(result).__name__ for result in results} == {"Task", "NotSubmittedError"}
    assert now() == pytest.approx(90, abs=0.1)


@pytest.mark.looptime
@pytest.mark.parametrize("limit", [RateLimit(1e-9, 1e9), RateLimit(1e9, 1e-9), RateLimit(1e-9, 1e-9)], ids=str)
async def test_the_slowest_and_the_fastest_limit_there_can_be_are_kept(limit: RateLimit) -> None:
    async with canned(lambda request: {"id": "task-1"}, rate_limit=limit) as client:
        await client.submit(PICTURE)
        if limit.per_second > 1e9:
            await client.submit(PICTURE)
        elif limit.per_second < 1e-9:
            with pytest.raises(NotSubmittedError):
                await client.submit(PICTURE, timeout=1e6)
        else:
            await client.submit(PICTURE)
            assert now() == pytest.approx(1, rel=0.1)


@pytest.mark.looptime
async def test_a_key_function_that_hangs_is_covered_by_the_timeout() -> None:
    async def never() -> str:
        await asyncio.sleep(1e6)
        return ""

    async with canned(lambda request: {}, api_key=never) as client:
        for call in (
            client.credits(timeout=5),
            client.raw("POST", "/v1/x", timeout=5),
            client.tasks.wait("task-1", timeout=5),
            client.tasks.get_many(["task-1", "task-2"], timeout=5),
        ):
            began = now()
            with pytest.raises((ConnectionFailedError, TaskTimeoutError)):
                await call
            assert now() - began == pytest.approx(5, abs=0.1)


@pytest.mark.looptime
async def test_the_answer_that_comes_with_the_deadline_is_not_lost_when_only_links_are_missing() -> None:
    async with canned(lambda request: {"id": "task-1", "status": "completed", "results": []}) as client:
        assert (await client.tasks.wait("task-1", timeout=7)).succeeded
        assert now() == pytest.approx(7, abs=0.1)
        assert (await client.tasks.wait("task-1")).succeeded
        assert now() == pytest.approx(17, abs=0.1)


@pytest.mark.looptime
@pytest.mark.parametrize("answer", [error(500), error(404), error(401), httpx.Response(200, content=b"<html>")])
async def test_a_service_that_answers_nonsense_was_reached(answer: httpx.Response) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if now() < 2:
            raise httpx.ConnectError("not there yet")
        return httpx.Response(answer.status_code, content=answer.content)

    async with canned(handler) as client:
        with pytest.raises(TaskTimeoutError):
            await client.tasks.wait("task-1", timeout=30)


@pytest.mark.looptime
@pytest.mark.parametrize("status", [401, 403])
async def test_a_generation_whose_looks_are_denied_ends_with_the_id_of_what_was_paid_for(status: int) -> None:
    def handler(request: httpx.Request) -> Any:
        return error(status) if request.method == "GET" else {"id": "task-1", "status": "pending"}

    async with canned(handler) as client:
        with pytest.raises((AuthenticationError, PermissionDeniedError), match=r"task task-1\)") as caught:
            await client.images.generate(model="gpt-4o-image", prompt="x")
        assert caught.value.task_id == "task-1"
        assert pickle.loads(pickle.dumps(caught.value)).task_id == "task-1"
        again = await asyncio.gather(*(client.tasks.wait(f"task-{n}") for n in range(2)), return_exceptions=True)
        assert [error.task_id for error in again if isinstance(error, EvoLinkError)] == ["task-0", "task-1"]


@pytest.mark.looptime
async def test_a_wait_for_an_id_that_was_never_seen_does_not_say_that_it_runs_and_is_paid_for() -> None:
    async with canned(lambda request: error(404)) as client:
        with pytest.raises(TaskTimeoutError, match="may not know the id") as caught:
            await client.tasks.wait("task-1", timeout=25)
        assert "paid" not in str(caught.value)
        created = Task(id="task-1", status="pending")
        with pytest.raises(TaskTimeoutError, match="is paid for"):
            await client.tasks.wait(created, timeout=25)


@pytest.mark.looptime
@pytest.mark.parametrize("status", [401, 402, 429, 500])
async def test_a_wait_whose_looks_fail_ends_with_what_they_failed_with(status: int) -> None:
    fails = True

    def handler(request: httpx.Request) -> Any:
        if fails:
            return error(status, code="its_code", message="its message")
        return {"id": "task-1", "status": "processing"}

    async with canned(handler) as client:
        for waited_for in ("task-1", Task(id="task-1", status="pending")):
            with pytest.raises(TaskTimeoutError, match="its_code: its message") as caught:
                await client.tasks.wait(waited_for, timeout=30)
            assert "may not know" not in str(caught.value)
        fails = False
        with pytest.raises(TaskTimeoutError) as caught:
            await client.tasks.wait("task-1", timeout=30)
        assert "its_code" not in str(caught.value)


@pytest.mark.looptime
async def test_an_unfinished_outcome_says_what_the_looks_at_its_task_failed_with() -> None:
    def handler(request: httpx.Request) -> Any:
        return {"id": "task-1", "status": "pending"} if request.method == "POST" else error(500, message="its message")

    async with canned(handler) as client:
        [outcome] = await client.run_many([PICTURE], task_timeout=20)
    assert outcome.status == "unfinished"
    assert "its message" in str(outcome.error)


@pytest.mark.looptime
async def test_an_answer_without_an_id_shows_what_it_says_instead() -> None:
    upstream = {"message": "Resource exhausted", "type": "", "param": "", "code": 429}
    async with canned(lambda request: upstream) as client:
        with pytest.raises(ResponseError, match=r"no valid task id: .*Resource exhausted"):
            await client.tasks.get("task-1")
        with pytest.raises(SubmitOutcomeUnknownError, match=r"no valid task id: .*Resource exhausted"):
            await client.submit(PICTURE)


async def test_an_error_that_comes_with_200_is_no_success() -> None:
    async with canned(lambda request: {"error": {"code": "key_limited", "message": "not for this key"}}) as client:
        for read in (client.raw("GET", "/v1/elsewhere"), client.credits(), client.tasks.get("task-1")):
            with pytest.raises(ResponseError, match=r"\(HTTP 200\) holds an error: key_limited not for this key"):
                await read


@pytest.mark.looptime
async def test_a_wait_of_which_no_look_got_through_says_what_stood_in_the_way() -> None:
    def handler(request: httpx.Request) -> Any:
        raise httpx.ConnectError("no route")

    async with canned(handler) as client:
        with pytest.raises(ConnectionFailedError, match=r"task-1 .*no route"):
            await client.tasks.wait("task-1", timeout=30)


@pytest.mark.looptime
async def test_an_end_that_comes_in_the_same_moment_as_the_deadline_is_given() -> None:
    async with canned(lambda request: {"id": "task-1", "status": "processing"}) as client:
        waiting = asyncio.create_task(client.tasks.wait("task-1", timeout=30))
        await asyncio.sleep(1)
        assert client._core.session is not None
        (follower,) = client._core.session.watcher._watched["task-1"].followers
        over = Task(id="task-1", status="completed", results=[LINK])
        asyncio.get_running_loop().call_at(30, follower.ended, over)
        assert await waiting is over
        assert now() == pytest.approx(30)


@pytest.mark.looptime
async def test_an_error_that_comes_with_a_cancellation_is_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    async with canned(lambda request: {"id": "task-1", "status": "processing"}) as client:
        waiting = asyncio.create_task(client.tasks.wait("task-1"))
        await asyncio.sleep(1)
        assert client._core.session is not None
        (follower,) = client._core.session.watcher._watched["task-1"].followers
        follower.lost(TaskLostError("gone", task=Task(id="task-1")))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        del follower, waiting
        gc.collect()
    assert "never retrieved" not in caplog.text


# -- How tasks end ---------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_each_way_to_end_is_its_own_error() -> None:
    ends = {
        "failed": {"status": "failed", "error": {"code": "service_error", "message": "try again"}},
        "refused": {"status": "failed", "error": "plain words"},
        "mute": {"status": "failed"},
        "cancelled": {"status": "canceled"},
    }

    def handler(request: httpx.Request) -> Any:
        name = request.url.path.rpartition("/")[2]
        return {"id": name} | ends[name] if name in ends else error(404, "task_not_found")

    async with canned(handler) as client:
        with pytest.raises(TaskFailedError, match=r"service_error: try again.*task failed") as caught:
            await client.tasks.wait("failed")
        assert caught.value.retryable
        assert caught.value.message == "try again"
        assert str(caught.value) == (
            "service_error: try again. The failure is of a passing kind: generate it again, as a new paid task "
            "(task failed)"
        )
        with pytest.raises(TaskFailedError, match="unknown_error: plain words") as caught:
            await client.tasks.wait("refused")
        assert not caught.value.retryable
        assert str(caught.value) == (
            "unknown_error: plain words. Change what it asks for before you generate it again, as a new paid task "
            "(task refused)"
        )
        with pytest.raises(TaskFailedError, match="no reason"):
            await client.tasks.wait("mute")
        with pytest.raises(TaskCancelledError, match=r"Look at what it cost .* \(task cancelled\)$"):
            await client.tasks.wait("cancelled")
        with pytest.raises(TaskLostError, match=r"Check the id .* \(task gone\)$"):
            await client.tasks.wait("gone")
    assert 60 <= now() < 70


@pytest.mark.looptime
async def test_a_task_that_is_over_is_not_asked_for_and_one_without_links_is_asked_at_once() -> None:
    calls = []

    def handler(request: httpx.Request) -> Any:
        calls.append(request)
        return {"id": "task-1", "status": "completed", "results": [LINK]}

    async with canned(handler) as client:
        over = Task(id="task-1", status="completed", results=[LINK])
        assert await client.tasks.wait(over) is over
        with pytest.raises(TaskFailedError):
            await client.tasks.wait(Task(id="task-1", status="failed"))
        assert not calls
        assert (await client.tasks.wait(Task(id="task-1", status="completed", created=time.time()))).urls == (LINK,)
        assert now() < 0.1


@pytest.mark.looptime
async def test_a_task_that_is_over_when_it_is_created_is_not_polled() -> None:
    def handler(request: httpx.Request) -> Any:
        assert is_submission(request)
        return {"id": "task-1", "status": "completed", "results": [LINK]}

    async with canned(handler) as client:
        assert (await client.run(PICTURE)).urls == (LINK,)


# -- on_progress -----------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_progress_is_told_in_the_callers_context_and_its_faults_are_only_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    seen: list[tuple[int, str]] = []

    def handler(request: httpx.Request) -> Any:
        if now() > 100:
            return {"id": "task-1", "status": "completed", "results": []}
        return {"id": "task-1", "status": "processing", "progress": int(now())}

    def progress(task: Task) -> None:
        seen.append((task.progress, variable.get()))
        raise ZeroDivisionError("in the caller's function")

    async with canned(handler) as client:
        variable.set("mine")
        assert (await client.tasks.wait("task-1", on_progress=progress)).succeeded
    assert len(seen) > 5
    assert {context for _, context in seen} == {"mine"}
    assert [number for number, _ in seen] == sorted(number for number, _ in seen)
    assert "ZeroDivisionError" in caplog.text

    async def coroutine(task: Task) -> None: ...

    async with canned(handler) as client:
        for wrong in (coroutine, 7):
            with pytest.raises(ConfigurationError):
                await client.tasks.wait("task-1", on_progress=wrong)  # type: ignore[arg-type]


# -- Reads -----------------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_reads_are_retried_for_their_timeout_and_then_raise_what_stood_in_the_way() -> None:
    calls = []

    def handler(request: httpx.Request) -> Any:
        calls.append(now())
        return error(503)

    async with canned(handler) as client:
        for call in (client.credits(timeout=20), client.tasks.get_many(["task-1", "task-2"], timeout=20)):
            began = now()
            with pytest.raises(ServerError):
                await call
            assert now() - began <= 20
            assert len(calls) > 3
            calls.clear()


@pytest.mark.looptime
@pytest.mark.parametrize("timeout", [1, 5, 60])
async def test_reads_of_the_files_service_are_retried_for_their_timeout_too(timeout: float) -> None:
    def handler(request: httpx.Request) -> Any:
        raise httpx.ConnectError("not there")

    async with canned(handler) as client:
        for call in (client.files.quota(timeout=timeout), client.files.delete("file-1", timeout=timeout)):
            began = now()
            with pytest.raises(ConnectionFailedError):
                await call
            assert now() - began == pytest.approx(timeout, abs=0.51)


@pytest.mark.looptime
async def test_reads_wait_for_the_hint_of_a_429() -> None:
    def handler(request: httpx.Request) -> Any:
        if now() < 9:
            return error(429, **{"retry-after": "10"})
        return {"success": True, "data": {"user": {"remaining_credits": 1, "used_credits": 2}, "token": TOKEN}}

    async with canned(handler) as client:
        await client.credits()
        assert 10 <= now() < 12

    async with canned(lambda request: error(429, **{"retry-after": "100"})) as client:
        with pytest.raises(RateLimitError) as caught:
            await client.credits()
        assert caught.value.retry_after == 100


TOKEN = {"remaining_credits": "0.05", "used_credits": 28.8, "unlimited_credits": True}


async def test_credits_are_exact_whatever_their_type_on_the_wire() -> None:
    data = {"user": {"remaining_credits": 2.5, "used_credits": 7}, "token": TOKEN}
    async with canned(lambda request: {"success": True, "data": data}) as client:
        credits = await client.credits()
    assert (credits.user.remaining, credits.user.used) == (Decimal("2.5"), Decimal(7))
    assert (credits.key.remaining, credits.key.used) == (Decimal("0.05"), Decimal("28.8"))
    assert credits.key.unlimited


@pytest.mark.parametrize(
    "value",
    [
        {"success": False, "message": "the key is paused", "data": {"user": {}, "token": {}}},
        {"success": False, "msg": 7},
        {"success": True},
        {"data": None},
        {"data": {"user": None, "token": TOKEN}},
        {"data": {"user": {"remaining_credits": 1, "used_credits": "much"}, "token": TOKEN}},
        {"data": {"user": {"remaining_credits": "nan", "used_credits": 1}, "token": TOKEN}},
        {"data": {"user": {"remaining_credits": True, "used_credits": 1}, "token": TOKEN}},
        [1],
        "text",
        None,
    ],
)
async def test_an_answer_that_is_not_about_credits_is_an_error(value: Any) -> None:
    async with canned(lambda request: httpx.Response(200, json=value)) as client:
        with pytest.raises(ResponseError) as caught:
            await client.credits()
    if isinstance(value, dict) and value.get("message"):
        assert "the key is paused" in str(caught.value)
    elif isinstance(value, list):
        assert "[1]" in str(caught.value)


async def test_an_answer_about_another_task_is_an_error() -> None:
    async with canned(lambda request: {"id": "task-2", "status": "completed"}) as client:
        with pytest.raises(ResponseError):
            await client.tasks.get("task-1")


@pytest.mark.looptime
@pytest.mark.parametrize("status", [404, 405, 400, 403, 429, 500, 200])
async def test_get_many_falls_back_to_one_by_one(status: int) -> None:
    batches = []

    def handler(request: httpx.Request) -> Any:
        if request.url.path.endswith("/batch"):
            batches.append(request)
            return error(status) if status != 200 else {"nothing": 1}
        name = request.url.path.rpartition("/")[2]
        return error(400, "invalid_task_id") if name == "odd" else {"id": name, "status": "processing"}

    async with canned(handler) as client:
        ids = [f"task-{n}" for n in range(70)]
        assert list(await client.tasks.get_many([*ids, "odd"])) == ids
        assert len(batches) == (2 if status in (429, 500) else 1)
        await client.tasks.get_many(ids[:2])
        assert len(batches) == (3 if status in (429, 500) else 1)


async def test_get_many_asks_again_for_those_completed_without_links() -> None:
    def handler(request: httpx.Request) -> Any:
        if request.url.path.endswith("/batch"):
            return {"data": [{"id": id_, "status": "completed"} for id_ in body_of(request)["task_ids"]]}
        return {"id": request.url.path.rpartition("/")[2], "status": "completed", "results": [LINK]}

    async with canned(handler) as client:
        found = await client.tasks.get_many(["task-1", "task-2"])
        assert [task.urls for task in found.values()] == [(LINK,)] * 2


async def test_get_many_raises_a_refusal_and_leaves_nothing_behind() -> None:
    async with canned(lambda request: error(401)) as client:
        with pytest.raises(AuthenticationError):
            await client.tasks.get_many(f"task-{n}" for n in range(20))
        assert await client.tasks.get_many([]) == {}
        for wrong in ("task-1", 7, None, ["task-1", 7], ["../x"], [""], ["a" * 129], [".."]):
            with pytest.raises(InvalidRequestError):
                await client.tasks.get_many(wrong)  # type: ignore[arg-type]


async def test_pages_that_shift_while_they_are_read_give_each_task_once() -> None:
    existing = [f"task-{n:04}" for n in range(400)]
    pages = 0

    def handler(request: httpx.Request) -> Any:
        nonlocal pages
        page = int(request.url.params["page"])
        rows = [{"id": id_, "status": "processing"} for id_ in existing[(page - 1) * 50 : page * 50]]
        pages += 1
        if pages < 12:
            existing[:0] = [f"new-{pages}-{n}" for n in range(70)]  # more than a page each time
        return {"data": rows, "total": len(existing), "page": page, "page_size": 50}

    async with canned(handler) as client:
        listed = [task.id async for task in client.tasks.list()]
    assert len(listed) == len(set(listed))
    assert {f"task-{n:04}" for n in range(400)} <= set(listed)


@pytest.mark.parametrize(
    "value",
    [
        {"rows": []},
        [],
        {"data": None},
        {"data": [{"no": "id"}]},
        {"data": ["x"]},
        {"data": [], "page": 2},
        {"data": [{"id": "a"}], "page_size": 20},
        {"data": [{"id": f"task-{n}"} for n in range(50)]},  # the same page for ever
    ],
)
async def test_a_list_that_is_none_or_never_ends_is_an_error(value: Any) -> None:
    async with canned(lambda request: value) as client:
        with pytest.raises(ResponseError):
            [task async for task in client.tasks.list()]
        with pytest.raises(InvalidRequestError):
            await anext(client.tasks.list(status="pending"))


# -- raw -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "json"),
    [
        ("GET", "https://elsewhere.example/v1/x", None),
        ("GET", "//elsewhere.example/v1/x", None),
        ("GET", "/v1//x", None),
        ("GET", "/v1/../x", None),
        ("GET", "/v1/x y", None),
        ("GET", "/v1/x#y", None),
        ("GET", "/v1/\\x", None),
        ("GET", "/v2/x", None),
        ("GET", "/v1/\n", None),
        ("GET", 7, None),
        (7, "/v1/x", None),
        ("TRACE", "/v1/x", None),
        ("GET", "/v1/x", {"a": 1}),
        ("POST", "/v1/images/generations", {"model": "m"}),
        ("POST", "/v1/images/generations?x=1", {"model": "m"}),
        ("POST", "/v1/x", {"a": object()}),
    ],
)
async def test_raw_refuses_what_it_does_not_send(method: Any, path: Any, json: Any) -> None:
    async with canned(lambda request: pytest.fail("it was sent")) as client:
        with pytest.raises(InvalidRequestError):
            await client.raw(method, path, json=json)


@pytest.mark.parametrize("read", ["get", "get_many", "list"])
async def test_a_status_that_is_not_known_is_kept_and_logged_once_however_it_is_read(
    read: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"id": f"task-{n}", "status": "queued"} for n in (1, 2)]

    def handler(request: httpx.Request) -> Any:
        return {"data": rows} if request.url.path.removeprefix("/v1/tasks") in ("", "/batch") else rows[0]

    async with canned(handler) as client:
        for _ in range(2):
            if read == "get":
                tasks = [await client.tasks.get("task-1")]
            elif read == "get_many":
                tasks = list((await client.tasks.get_many(["task-1", "task-2"])).values())
            else:
                tasks = [task async for task in client.tasks.list()]
            assert {(str(task.status), task.is_terminal) for task in tasks} == {("queued", False)}
    assert [record.getMessage() for record in caplog.records if "queued" in record.getMessage()] == [
        "unknown task status 'queued': taken as not finished"
    ]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_raw_gives_none_for_an_answer_without_a_body(method: str) -> None:
    async with canned(lambda request: httpx.Response(204)) as client:
        assert await client.raw(method, "/v1/elsewhere") is None
    async with canned(lambda request: httpx.Response(200, content=b"<html>")) as client:
        with pytest.raises(ResponseError, match="is no JSON"):
            await client.raw(method, "/v1/elsewhere")


@pytest.mark.looptime
async def test_raw_sends_a_change_once_and_says_when_its_fate_is_unknown() -> None:
    calls = []

    async def handler(request: httpx.Request) -> Any:
        calls.append(request)
        if request.url.path == "/v1/slow":
            await asyncio.sleep(1000)
        if request.url.path == "/v1/cut":
            raise httpx.ReadError("cut")
        if request.url.path == "/v1/refused":
            return error(500)
        return httpx.Response(204) if request.method == "DELETE" else {"query": str(request.url.query, "ascii")}

    async with canned(handler) as client:
        assert await client.raw("PUT", "/v1/x?url=https://a.example//b/../c", json={}) == {
            "query": "url=https://a.example//b/../c"
        }
        assert await client.raw("DELETE", "/v1/x") is None
        calls.clear()
        with pytest.raises(SubmitOutcomeUnknownError):
            await client.raw("POST", "/v1/cut")
        with pytest.raises(SubmitOutcomeUnknownError):
            await client.raw("POST", "/v1/slow", timeout=2)
        assert now() == pytest.approx(2, abs=0.1)
        with pytest.raises(ServerError):
            await client.raw("POST", "/v1/refused")
        assert len(calls) == 3


# -- Validation ------------------------------------------------------------------------------------


async def test_a_known_model_is_checked_before_anything_is_sent() -> None:
    async with canned(lambda request: pytest.fail("it was sent")) as client:
        for call in (
            client.videos.generate(model="seedance-2.0", prompt="waves"),
            client.videos.submit(
                model="seedance-2.0-text-to-video", prompt="waves", image_urls=["https://a.example/b"]
            ),
            client.run(VideoRequest(model="seedance-2.0", prompt="waves")),
            client.submit({"model": "gpt-4o-image"}),  # type: ignore[arg-type]
            client.submit(PICTURE, idempotency_key="short"),
            client.submit(PICTURE, idempotency_key=12345678901234567890),  # type: ignore[arg-type]
            client.images.generate(model=None, prompt="x"),  # type: ignore[arg-type]
            client.images.generate(model="gpt-4o-image", prompt=7),  # type: ignore[arg-type]
        ):
            with pytest.raises(InvalidRequestError):
                await call
        with pytest.raises(InvalidRequestError, match=r"seedance-2\.0-text-to-video"):
            await client.videos.generate(model="seedance-2.0", prompt="waves")


@pytest.mark.parametrize("mode", ["warn", False])
async def test_validation_can_warn_or_be_silent(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    sent = []

    def handler(request: httpx.Request) -> Any:
        sent.append(body_of(request)["model"])
        return {"id": "task-1"}

    async with canned(handler, validate=mode) as client:
        for _ in range(3):
            await client.videos.submit(model="seedance-2.0", prompt="waves")
    assert sent == ["seedance-2.0"] * 3
    warned = [record for record in caplog.records if "seedance-2.0" in record.getMessage()]
    assert len([record for record in warned if record.levelno == logging.WARNING]) == (1 if mode == "warn" else 0)


async def test_an_unknown_model_goes_through() -> None:
    async with canned(lambda request: {"id": "task-1"}) as client:
        assert (await client.images.submit(model="gpt-9-image", prompt="x", new_parameter=1)).id == "task-1"


@pytest.mark.parametrize(
    ("status", "expected"), [(400, BadRequestError), (401, AuthenticationError), (402, QuotaExhaustedError)]
)
async def test_a_refused_submission_raises_the_refusal(status: int, expected: type[Exception]) -> None:
    async with canned(lambda request: error(status)) as client:
        with pytest.raises(expected):
            await client.run(PICTURE)


# -- Cancel scopes ---------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_anyio_scopes_and_asyncio_timeouts_end_a_wait_on_time_and_nothing_else() -> None:
    running = {"id": "task-1", "status": "processing", "task_info": {"estimated_time": 100}}
    async with canned(lambda request: running) as client:
        with anyio.move_on_after(3) as scope:
            await client.tasks.wait("task-1")
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(3):
                await client.tasks.wait("task-1")
        assert not isinstance(caught.value, TaskTimeoutError)
        with pytest.raises(TaskTimeoutError):
            with anyio.fail_after(50):
                await client.tasks.wait("task-1", timeout=4)
        assert now() == pytest.approx(10, abs=0.1)
        async with anyio.create_task_group() as group:
            group.start_soon(client.tasks.wait, "task-1")
            await anyio.sleep(3)
            group.cancel_scope.cancel()
        assert now() == pytest.approx(13, abs=0.1)


@pytest.mark.looptime
async def test_a_cancelled_wait_says_how_to_go_on() -> None:
    async with canned(lambda request: {"id": "task-1", "status": "processing"}) as client:
        waiting = asyncio.create_task(client.tasks.wait("task-1"))
        await asyncio.sleep(3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await waiting
        assert "client.tasks.wait('task-1')" in caught.value.__notes__[0]
