"""What a callback leads to: one look, and never belief. Time is virtual."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
from typing import Any

import pytest
from callback_world import (
    EPOCH,
    PUBLIC,
    SECRET,
    World,
    call,
    image,
    images,
    now,
    path_of,
    status,
    told,
    turns,
    wall_clock,
    world,
)

from evolink_async import AsyncEvoLink, ConfigurationError, InvalidRequestError, Task, TaskFailedError, clock
from evolink_async.callbacks import CallbackReceiver
from evolink_async.emulator import Fault

pytestmark = pytest.mark.looptime


@pytest.fixture(autouse=True)
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", wall_clock)


def delivered(monkeypatch: pytest.MonkeyPatch, receiver: CallbackReceiver) -> list[str]:
    """Let the emulator's callbacks come to the receiver without a network; what they got."""
    got: list[str] = []

    async def post(url: str, body: bytes) -> str:
        assert url.startswith(PUBLIC)
        got.append(str(await status(receiver.asgi, path_of(url), body)))
        return got[-1]

    monkeypatch.setattr("evolink_async.emulator.callbacks.post", post)
    return got


async def submitted(w: World, receiver: CallbackReceiver, key: str = "order-1") -> Task:
    return await w.client.submit(image(key, callback_url=receiver.url_for(key)))


def end(w: World, task: Task, status: str = "completed") -> None:
    """Let a task end now."""
    w.emulator.advance(100 - (now() - (w.book[-1]["time"] - EPOCH)) + 1)


async def test_a_wait_is_over_as_soon_as_the_callback_has_come(api_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(api_key, models={"*": {"bias": 0.31, "sigma": 0}}) as w:
        receiver = w.receiver()
        got = delivered(monkeypatch, receiver)
        task = await submitted(w, receiver)
        done = await w.client.tasks.wait(task.id)
        assert done.succeeded
        assert now() == pytest.approx(31.5, abs=0.05)  # billing is confirmed half a second after the end
        assert got == ["204"]


async def test_the_answer_comes_before_anything_is_asked_of_the_service(api_key: str) -> None:
    async with world(api_key, faults=[Fault(method="GET", delay=10)]) as w:
        tasks: list[Task] = []
        receiver = w.receiver(on_task=tasks.append)
        task = await submitted(w, receiver)
        end(w, task)
        before = now()
        assert await status(receiver.asgi, path_of(receiver.url_for("order-1")), told(task.id)) == 204
        assert now() == before
        assert w.wire.looks == []
        await asyncio.sleep(31)
        assert [done.id for done in tasks] == [task.id]


async def test_on_task_gets_what_the_service_says_and_nothing_of_the_body(api_key: str) -> None:
    async with world(api_key) as w:
        tasks: list[Task] = []
        receiver = w.receiver(on_task=tasks.append)
        task = await submitted(w, receiver)
        end(w, task)
        forged = told(task.id, "failed", results=["https://evil.example/x.png"], error={"code": "x", "message": "y"})
        assert await status(receiver.asgi, path_of(receiver.url_for("order-1")), forged) == 204
        await asyncio.sleep(1)
        [done] = tasks
        assert done.succeeded
        assert "evil" not in str(done.raw)
        assert w.looks_at(task.id) == 1


async def test_a_coroutine_function_may_be_told_and_what_it_raises_is_logged(
    api_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    told_of: list[str] = []

    async def on_task(task: Task) -> None:
        await asyncio.sleep(1)
        told_of.append(task.id)
        raise RuntimeError("mine")

    async with world(api_key) as w:
        receiver = w.receiver(on_task=on_task)
        ids = [(await submitted(w, receiver, key)).id for key in ("a", "b")]
        w.emulator.advance(200)
        for key, task_id in zip("ab", ids, strict=True):
            await status(receiver.asgi, path_of(receiver.url_for(key)), told(task_id))
        await asyncio.sleep(5)
    assert sorted(told_of) == sorted(ids)
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert sorted(errors) == sorted(f"on_task raised for task {task_id}" for task_id in ids)


async def test_a_forged_end_of_a_running_task_costs_one_look_and_changes_nothing(api_key: str) -> None:
    async with world(api_key) as w:
        tasks: list[Task] = []
        receiver = w.receiver(on_task=tasks.append)
        task = await submitted(w, receiver)
        assert await status(receiver.asgi, path_of(receiver.url_for("order-1")), told(task.id)) == 204
        await asyncio.sleep(50)
        assert w.looks_at(task.id) == 1
        assert tasks == []
        assert (await w.client.tasks.get(task.id)).status == "processing"
        # It doesn't stand in the way of the true one.
        end(w, task)
        assert await status(receiver.asgi, path_of(receiver.url_for("order-1")), told(task.id)) == 204
        await asyncio.sleep(1)
        assert [done.id for done in tasks] == [task.id]


async def test_a_thousand_replays_are_one_look_and_one_call(api_key: str) -> None:
    async with world(api_key) as w:
        tasks: list[Task] = []
        receiver = w.receiver(on_task=tasks.append)
        task = await submitted(w, receiver)
        end(w, task)
        path = path_of(receiver.url_for("order-1"))
        for number in range(1000):
            assert await status(receiver.asgi, path, told(task.id)) == 204
            if number % 100 == 0:
                await asyncio.sleep(0.5)
        await asyncio.sleep(10)
        assert len(tasks) == 1
        assert w.looks_at(task.id) == 1


async def test_an_id_that_the_service_does_not_know_costs_one_look(api_key: str) -> None:
    async with world(api_key) as w:
        receiver = w.receiver(on_task=lambda task: pytest.fail("told"))
        path = path_of(receiver.url_for("order-1"))
        assert await status(receiver.asgi, path, told("task-unified-1-nobody")) == 204
        await asyncio.sleep(300)
        assert w.wire.looks == ["task-unified-1-nobody"]


async def test_without_anybody_who_wants_to_know_nothing_is_asked(api_key: str) -> None:
    async with world(api_key) as w:
        receiver = w.receiver()
        task = await submitted(w, receiver)
        for task_id in (task.id, "task-unified-1-nobody"):
            assert await status(receiver.asgi, path_of(receiver.url_for("order-1")), told(task_id)) == 204
        await asyncio.sleep(300)
        assert w.wire.looks == []


async def test_a_look_that_fails_is_made_again_and_one_at_links_that_are_late_too(api_key: str) -> None:
    async with world(api_key) as w:
        tasks: list[Task] = []
        receiver = w.receiver(on_task=tasks.append)
        task = await submitted(w, receiver)
        end(w, task)
        answers: list[Any] = [
            (503, {"error": {"message": "busy"}}),
            (200, {"id": task.id, "status": "completed", "model": task.model}),
        ]
        w.wire.tamper = lambda request: answers.pop(0) if request.method == "GET" and answers else None
        assert await status(receiver.asgi, path_of(receiver.url_for("order-1")), told(task.id)) == 204
        await asyncio.sleep(60)
        [done] = tasks
        assert done.urls
        assert w.looks_at(task.id) == 3


async def test_one_look_serves_the_wait_and_on_task(api_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(api_key, models={"*": {"bias": 0.05, "sigma": 0}}) as w:
        tasks: list[Task] = []
        receiver = w.receiver(on_task=tasks.append)
        delivered(monkeypatch, receiver)
        task = await submitted(w, receiver)
        done = await w.client.tasks.wait(task.id)
        await turns()
        assert tasks == [done]
        assert w.wire.times == pytest.approx([0, 5.5], abs=0.1)  # the wait's first look, and the callback's


async def test_a_failed_task_fails_for_the_wait_and_is_told(api_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(api_key, failure_share=1) as w:
        tasks: list[Task] = []
        receiver = w.receiver(on_task=tasks.append)
        delivered(monkeypatch, receiver)
        task = await submitted(w, receiver)
        with pytest.raises(TaskFailedError):
            await w.client.tasks.wait(task.id)
        await asyncio.sleep(2)
        assert [done.status for done in tasks] == ["failed"]


async def test_a_task_that_was_called_about_under_two_requests_is_nobodys(
    api_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(api_key) as w:
        tasks: list[Task] = []
        receiver = w.receiver(on_task=tasks.append)
        task = await submitted(w, receiver)
        end(w, task)
        for key in ("order-1", "order-2"):
            await status(receiver.asgi, path_of(receiver.url_for(key)), told(task.id))
            await asyncio.sleep(2)
        assert len(tasks) == 1
        assert "another request's" in caplog.text


async def test_a_receiver_survives_a_restart_with_the_same_secret_only(api_key: str) -> None:
    async with world(api_key) as w:
        url = w.receiver().url_for(image(1, key="order-1"))
        assert w.receiver().url_for("order-1") == url
        assert await status(w.receiver().asgi, path_of(url), told("task-unified-1-a")) == 204
        assert await status(w.receiver(secret="t" * 40).asgi, path_of(url), told("task-unified-1-a")) == 404


async def test_an_address_names_the_job_and_the_request(api_key: str) -> None:
    async with world(api_key) as w:
        receiver = w.receiver()
        same = {
            receiver.url_for(image(1)),
            receiver.url_for(image(1, callback_url="https://x.example")),
            receiver.url_for(image(1, metadata={"a": 1})),
        }
        assert len(same) == 1
        others = [receiver.url_for(image(2)), receiver.url_for(image(1), job="other"), receiver.url_for("picture 1")]
        assert len({*same, *others}) == 4
        assert all(url.startswith(f"{PUBLIC}/") for url in others)
        pool = w.client.pool(job="other")
        assert w.receiver(pool).url_for(image(1)) == others[1]
        for wrong in (None, 7, "", b"x"):
            with pytest.raises(InvalidRequestError):
                receiver.url_for(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"public_url": "http://example.org"}, "public_url"),
        ({"secret": "short"}, "secret"),
        ({"on_task": 7}, "on_task"),
        ({"target": object()}, "target"),
    ],
)
async def test_what_cannot_work_is_refused_at_once(api_key: str, options: dict[str, Any], name: str) -> None:
    async with world(api_key) as w:
        with pytest.raises(ConfigurationError, match=name):
            CallbackReceiver(**{"target": w.client, "public_url": PUBLIC, "secret": SECRET} | options)


async def test_a_pool_takes_only_a_receiver_of_its_own_client_whose_address_the_service_calls(api_key: str) -> None:
    async with world(api_key) as w:
        receiver = w.receiver()
        async with AsyncEvoLink("sk-other", base_url="http://127.0.0.1") as other:
            with pytest.raises(ConfigurationError, match="another client"):
                other.pool([], callbacks=receiver)
        async with AsyncEvoLink("sk-other", base_url="https://api.evolink.ai") as real:
            local = CallbackReceiver(real, public_url=PUBLIC, secret=SECRET)
            with pytest.raises(ConfigurationError, match="https"):
                real.pool([], callbacks=local)
            private = CallbackReceiver(real, public_url="https://10.0.0.1/x", secret=SECRET)
            with pytest.raises(ConfigurationError, match="private"):
                real.pool([], callbacks=private)
            real.pool([], callbacks=CallbackReceiver(real, public_url="https://example.org", secret=SECRET))
        bound = w.client.pool()
        w.receiver(bound)
        with pytest.raises(ConfigurationError, match="another receiver"):
            w.receiver(bound)


async def test_the_secret_shows_nowhere(api_key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with world(api_key) as w:
        receiver = w.receiver()
        assert SECRET not in repr(receiver)
        for copying in (pickle.dumps, copy.copy):
            with pytest.raises(TypeError):
                copying(receiver)
        await status(receiver.asgi, path_of(receiver.url_for("a")), told("task-unified-1-a"))
        await status(receiver.asgi, "/wrong", told("task-unified-1-a"))
    assert SECRET not in caplog.text
    assert receiver.url_for("a").rpartition("/")[2] not in caplog.text


async def test_callbacks_after_the_client_was_closed_are_answered_and_dropped(api_key: str) -> None:
    async with world(api_key) as w:
        receiver = w.receiver(on_task=lambda task: pytest.fail("told"))
        path = path_of(receiver.url_for("a"))
    assert await status(receiver.asgi, path, told("task-unified-1-a")) == 204


async def test_so_many_looks_are_under_way_and_no_more(api_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolink_async.callbacks.receiver.LOOKS", 20)
    monkeypatch.setattr("evolink_async.callbacks.receiver.REMEMBERED", 5)
    async with world(api_key, faults=[Fault(method="GET", delay=5)]) as w:
        receiver = w.receiver(on_task=lambda task: pytest.fail("told"))
        path = path_of(receiver.url_for("a"))
        for number in range(100):
            assert await status(receiver.asgi, path, told(f"task-unified-1-{number}")) == 204
        await asyncio.sleep(60)
        assert len(w.wire.looks) == 20
        assert receiver._looks == {}


async def test_a_pool_as_the_target_is_told_and_nobody_else(api_key: str) -> None:
    async with world(api_key) as w, w.client.pool(max_outstanding=5) as pool:
        receiver = w.receiver(pool)
        (one, other) = images(2)
        pool.add(one.model_copy(update={"callback_url": receiver.url_for(one)}))
        outcome = asyncio.ensure_future(anext(pool))  # type: ignore[arg-type]
        await asyncio.sleep(1)
        task = w.book[0]["task_id"]
        elsewhere = await w.client.submit(other)
        waiting = asyncio.ensure_future(w.client.tasks.wait(elsewhere.id))
        await asyncio.sleep(1)
        before = len(w.wire.looks)
        for task_id in (task, elsewhere.id):
            assert await status(receiver.asgi, path_of(receiver.url_for(one)), told(task_id)) == 204
        await asyncio.sleep(0.2)
        assert w.wire.looks[before:] == [task]
        assert (await outcome).ok
        await waiting


async def test_a_head_in_capitals_and_a_query_change_nothing(api_key: str) -> None:
    async with world(api_key) as w:
        receiver = w.receiver()
        scope = {"query_string": b"a=b"}
        answer = await call(receiver.asgi, path_of(receiver.url_for("a")), told("task-unified-1-a"), scope=scope)
        assert answer == (204, {})
