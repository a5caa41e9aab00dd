"""A pool with callbacks: its requests are called back about, and what is unknown is settled. Time is virtual."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from callback_world import (
    PUBLIC,
    SECRET,
    World,
    image,
    images,
    now,
    path_of,
    restarted,
    status,
    told,
    wall_clock,
    world,
)
from loop_executor import in_loop

from evolink_async import ConfigurationError, Outcome, TaskPool, clock, open_ledger
from evolink_async.callbacks import CallbackReceiver
from evolink_async.emulator import Fault

pytestmark = pytest.mark.looptime

LOST: dict[str, Any] = {"method": "POST", "path": "/v1/images", "drop": "after"}
HOLD = {"on_lost_response": "hold"}


@pytest.fixture(autouse=True)
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)
    monkeypatch.setattr(clock, "now", wall_clock)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "job.db"


class Post:
    """The emulator's callbacks come to a receiver without a network; `held` ones are kept back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.receiver: CallbackReceiver | None = None
        self.got: list[str] = []
        monkeypatch.setattr("evolink_async.emulator.callbacks.post", self.post)

    async def post(self, url: str, body: bytes) -> str:
        if self.receiver is None:
            return "refused"
        self.got.append(str(await status(self.receiver.asgi, path_of(url), body)))
        return self.got[-1]


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> Post:
    return Post(monkeypatch)


async def drain(pool: TaskPool) -> list[Outcome]:
    return [outcome async for outcome in pool]


async def call_about(w: World, receiver: CallbackReceiver, key: str, task_id: object = None) -> None:
    url = receiver.url_for(key)
    assert await status(receiver.asgi, path_of(url), told(task_id or w.book[0]["task_id"])) == 204


async def test_each_request_is_called_back_about_at_an_address_of_its_own_unless_it_names_one(
    api_key: str, post: Post
) -> None:
    async with world(api_key) as w:
        receiver = post.receiver = w.receiver()
        own = image("own", callback_url="http://127.0.0.1:9/mine/x")
        requests = [*images(3), image("a"), image("a"), own, image("none", callback_url=None)]
        async with w.client.pool(requests, callbacks=receiver) as pool:
            await asyncio.sleep(1)
            urls = [body["callback_url"] for body in w.wire.bodies]
            assert len(set(urls)) == 7
            assert urls[0] == receiver.url_for("k0")
            assert urls[3] == receiver.url_for(image("a"))
            assert urls[5] == "http://127.0.0.1:9/mine/x"
            post.receiver = None
            outcomes = await drain(pool)
        assert all(outcome.ok for outcome in outcomes)
        assert requests[0].body().get("callback_url") is None
        assert outcomes[0].request in requests


async def test_polling_alone_is_enough_when_no_callback_comes(api_key: str, post: Post) -> None:
    took = []
    for without in (True, False):
        async with world(api_key, models={}) as w:
            begun = now()
            async with w.client.pool(images(20), **{} if without else {"callbacks": w.receiver()}) as pool:
                outcomes = await drain(pool)
            took.append(now() - begun)
        assert len(outcomes) == 20
        assert all(outcome.ok for outcome in outcomes)
    assert took[1] <= 1.2 * took[0] + 5


async def test_callbacks_tell_ends_at_once_and_a_body_is_worth_one_look(api_key: str, post: Post) -> None:
    async with world(api_key, models={"*": {"bias": 0.31, "sigma": 0}}) as w:
        receiver = post.receiver = w.receiver()
        async with w.client.pool(images(10), callbacks=receiver) as pool:
            outcomes = await drain(pool)
            assert now() < 31.6
            await asyncio.sleep(1)
        assert all(outcome.ok for outcome in outcomes)
        assert post.got == ["204"] * 10


async def test_the_identity_and_the_bytes_of_a_request_are_the_same_in_every_run(
    api_key: str, ledger: Path, post: Post
) -> None:
    """With callbacks first, then without: the same requests."""
    async with world(api_key) as w:
        async with w.client.pool(map(image, range(3)), ledger=ledger, callbacks=w.receiver()) as pool:
            first = await drain(pool)
        async with w.client.pool(map(image, range(3)), ledger=ledger) as again:
            second = await drain(again)
        assert len(w.book) == 3
        assert {outcome.identity for outcome in first} == {outcome.identity for outcome in second}
        assert all(outcome.from_ledger for outcome in second)


async def test_a_replay_sends_the_same_bytes(api_key: str, post: Post) -> None:
    async with (
        world(api_key, faults=[Fault(**LOST, nth=(1,))]) as w,
        w.client.pool(images(1), callbacks=w.receiver()) as pool,
    ):
        [outcome] = await drain(pool)
    assert outcome.ok
    assert len(w.wire.bodies) == 2
    assert w.wire.bodies[0] == w.wire.bodies[1]
    assert "callback_url" in w.wire.bodies[0]


async def test_a_callback_before_the_replay_settles_a_lost_response_and_nothing_is_sent_again(api_key: str) -> None:
    async with world(api_key, faults=[Fault(**LOST, nth=(1,))]) as w:
        receiver = w.receiver()
        async with w.client.pool(images(1), callbacks=receiver) as pool:
            await asyncio.sleep(1)  # it is parked for two seconds
            await call_about(w, receiver, "k0")
            await asyncio.sleep(0.1)
            session = w.client._core.session
            assert session is not None
            assert not session.submitter._live
            assert session.submitter.replays.permission()
            [outcome] = await drain(pool)
        assert outcome.ok
        assert outcome.attempts == 1
        assert outcome.task is not None
        assert outcome.task.id == w.book[0]["task_id"]
        assert len(w.wire.bodies) == len(w.book) == 1


async def test_a_callback_while_the_post_is_on_the_wire_waits_for_its_answer(api_key: str, ledger: Path) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,), delay=5)]) as w:
        receiver = w.receiver()
        async with w.client.pool(images(1), ledger=ledger, callbacks=receiver) as pool:
            reading = asyncio.ensure_future(drain(pool))
            await asyncio.sleep(2)
            await call_about(w, receiver, "k0")
            await asyncio.sleep(1)
            assert w.wire.looks == []
            await reading
            await asyncio.sleep(1)
        async with open_ledger(ledger) as opened:
            row = await opened.job().find("k0")
            assert row is not None
            assert row.task_id == w.book[0]["task_id"]
            assert await opened.job().unknown() == []


async def test_what_a_callback_told_while_the_post_was_on_the_wire_is_used_when_its_answer_is_lost(
    api_key: str,
) -> None:
    async with world(api_key, faults=[Fault(**LOST, nth=(1,), delay=1)]) as w:
        receiver = w.receiver()
        async with w.client.pool(images(1), callbacks=receiver) as pool:
            reading = asyncio.ensure_future(drain(pool))
            await asyncio.sleep(0.5)
            await call_about(w, receiver, "k0")
            [outcome] = await reading
        assert outcome.ok
        assert len(w.wire.bodies) == 1


async def test_an_answer_that_comes_after_the_callback_is_no_second_task(api_key: str) -> None:
    async with world(api_key, faults=[Fault(method="POST", path="/v1/images", delay=5)]) as w:
        receiver = w.receiver()
        async with w.client.pool(images(1), callbacks=receiver) as pool:
            reading = asyncio.ensure_future(drain(pool))
            await asyncio.sleep(2)
            await call_about(w, receiver, "k0")
            [outcome] = await reading
        assert outcome.ok
        assert len(w.book) == 1


async def test_an_unknown_outcome_that_nobody_took_becomes_the_tasks(api_key: str) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w:
        receiver = w.receiver()
        async with w.client.pool(images(2), callbacks=receiver) as pool:
            await asyncio.sleep(5)
            assert pool.stats.counts == {"unknown": 1}
            await call_about(w, receiver, "k0")
            await asyncio.sleep(1)
            assert pool.stats.counts.get("unknown", 0) == 0
            assert pool.stats.outstanding == 2
            outcomes = await drain(pool)
            assert pool.stats.counts["completed"] == 2
        assert sorted(str(outcome.key) for outcome in outcomes) == ["k0", "k1"]
        assert all(outcome.ok for outcome in outcomes)
        assert len(w.book) == 2


async def test_an_unknown_outcome_that_was_taken_is_settled_in_the_ledger_and_the_next_run_tells(
    api_key: str, ledger: Path
) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w:
        receiver = w.receiver()
        prices = {"gpt-4o-image": 2.5}
        async with w.client.pool(images(1), ledger=ledger, callbacks=receiver, prices=prices) as pool:
            [outcome] = await drain(pool)
            assert outcome.status == "unknown"
            assert pool.stats.credits_reserved == 2.5
            w.emulator.advance(200)
            await call_about(w, receiver, "k0")
            await asyncio.sleep(1)
            assert pool.stats.credits_reserved == 0
            assert pool.stats.credits_spent == 2.5
        async with open_ledger(ledger) as opened:
            assert (await opened.job().stats()).counts == {"completed": 1}
        async with restarted(w, api_key) as later, later.client.pool(images(1), ledger=ledger) as again:
            [settled] = await drain(again)
        assert settled.ok
        assert len(w.book) == 1


async def killed(w: World, ledger: Path, **options: Any) -> None:
    """A run whose only POST got no answer, and which ended before its callback."""
    async with w.client.pool(images(1), ledger=ledger, **options) as pool:
        await asyncio.sleep(1)
    assert [outcome.status for outcome in pool.leftovers] == ["unknown"]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_run_again_knows_the_callbacks_of_the_run_before(api_key: str, ledger: Path, when: str) -> None:
    """Held, so that nothing but the callback can settle it; it comes before or after the request is pulled again."""
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w:
        await killed(w, ledger, callbacks=w.receiver())
        url = w.wire.bodies[0]["callback_url"]
        async with restarted(w, api_key, **HOLD) as later:
            receiver = CallbackReceiver(later.client, public_url=PUBLIC, secret=SECRET)
            body = told(w.book[0]["task_id"])
            if when == "before":
                assert await status(receiver.asgi, path_of(url), body) == 204
            async with later.client.pool(images(1), ledger=ledger, callbacks=receiver) as pool:
                await asyncio.sleep(2)
                if when == "after":
                    assert await status(receiver.asgi, path_of(url), body) == 204
                    await asyncio.sleep(1)
                [outcome] = await drain(pool)
        assert outcome.ok
        assert len(w.wire.bodies) == 1


async def test_what_was_given_up_can_still_be_settled(api_key: str, ledger: Path) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w:
        await killed(w, ledger, callbacks=w.receiver())
        async with open_ledger(ledger) as opened:
            await opened.job().resolve("k0", give_up=True)
        receiver = w.receiver()
        async with w.client.pool(images(1), ledger=ledger, callbacks=receiver) as pool:
            await asyncio.sleep(1)
            await call_about(w, receiver, "k0")
            await asyncio.sleep(1)
            [outcome] = await drain(pool)
        assert outcome.ok


@contextlib.asynccontextmanager
async def in_doubt(w: World, ledger: Path | None, *more: Any, **receiver_options: Any) -> Any:
    """A pool with one request that is unknown, and the job to look at."""
    receiver = w.receiver(**receiver_options)
    async with w.client.pool([*images(1), *more], ledger=ledger, callbacks=receiver) as pool:
        await asyncio.sleep(1)
        yield receiver, pool


async def still_unknown(pool: TaskPool, identity: str = "k0") -> bool:
    await asyncio.sleep(30)
    return any(outcome.key == identity and outcome.status == "unknown" for outcome in pool._engine.stages.untaken)


async def test_a_task_of_another_request_is_not_taken(api_key: str, ledger: Path) -> None:
    async with (
        world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w,
        in_doubt(w, ledger, image("other", key="other")) as (receiver, pool),
    ):
        await call_about(w, receiver, "k0", w.book[1]["task_id"])
        assert await still_unknown(pool)
        w.emulator.advance(200)
        assert (await anext(pool)).key == "k0"  # and not the other's one after that has ended
        await asyncio.sleep(30)
        await call_about(w, receiver, "k0", w.book[1]["task_id"])
        await asyncio.sleep(30)
        async with open_ledger(ledger) as opened:
            [unknown] = await opened.job().unknown()
            assert unknown.identity == "k0"


async def test_a_task_of_another_job_or_of_a_call_is_not_taken(api_key: str, ledger: Path) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(2,))]) as w:  # noqa: SIM117
        async with w.client.pool([image("z", key="z")], ledger=ledger, job="other") as other:
            await asyncio.sleep(1)
            other.stop()
            async with in_doubt(w, ledger) as (receiver, pool):
                await call_about(w, receiver, "k0", w.book[0]["task_id"])
                assert await still_unknown(pool)
                called = await w.client.submit(image("call"))
                await call_about(w, receiver, "k0", called.id)
                assert await still_unknown(pool)
                # The other job has ended by then, and only the ledger knows.
                w.emulator.advance(200)
                assert [outcome.ok for outcome in await drain(other)] == [True]
                await call_about(w, receiver, "k0", w.book[0]["task_id"])
                assert await still_unknown(pool)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "seedream-4.5"},
        {"model": None},
        {"type": "video", "object": "video.generation.task"},
        {"created": 1_763_999_000},
        {"created": 1_764_000_900},
        {"created": None},
    ],
    ids=str,
)
async def test_a_task_that_does_not_fit_the_request_is_not_taken(
    api_key: str, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w, in_doubt(w, None) as (receiver, pool):
        task: dict[str, Any] = {
            "id": w.book[0]["task_id"],
            "status": "processing",
            "model": "gpt-4o-image",
            "type": "image",
        }
        body = {
            name: value for name, value in (task | {"created": 1_764_000_001} | change).items() if value is not None
        }
        w.wire.tamper = lambda request: (200, body) if request.method == "GET" else None
        await call_about(w, receiver, "k0")
        assert await still_unknown(pool)
        assert "is not taken for its own" in caplog.text


async def test_the_end_of_a_task_that_settles_nothing_is_told_once_all_the_same(api_key: str) -> None:
    ended: list[str] = []
    async with (
        world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w,
        in_doubt(w, None, on_task=lambda task: ended.append(task.id)) as (receiver, pool),
    ):
        task_id = w.book[0]["task_id"]
        body = {"id": task_id, "status": "completed", "model": "another", "results": ["https://a.example/x.png"]}
        w.wire.tamper = lambda request: (200, body) if request.method == "GET" else None
        for _ in range(3):
            await call_about(w, receiver, "k0")
            assert await still_unknown(pool)
        assert w.looks_at(task_id) > 1
    assert ended == [task_id]


async def test_a_task_that_the_service_does_not_know_settles_nothing(api_key: str) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w, in_doubt(w, None) as (receiver, pool):
        await call_about(w, receiver, "k0", "task-unified-1764000001-nobody")
        assert await still_unknown(pool)
        await call_about(w, receiver, "k0")
        await asyncio.sleep(1)
        assert pool.stats.counts.get("unknown", 0) == 0


async def test_the_token_of_one_request_settles_no_other(api_key: str) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1, 2))]) as w:  # noqa: SIM117
        async with in_doubt(w, None, image("other", key="other")) as (receiver, pool):
            await call_about(w, receiver, "nobody", w.book[0]["task_id"])
            assert await still_unknown(pool)
            assert await still_unknown(pool, "other")


async def test_a_task_that_somebody_waits_for_is_not_taken_though_it_ends_with_the_look(api_key: str) -> None:
    async with (
        world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,))]) as w,
        in_doubt(w, None) as (receiver, pool),
        w.client.pool([image("x")]) as other,
    ):
        await asyncio.sleep(1)
        w.emulator.advance(200)
        await call_about(w, receiver, "k0", w.book[1]["task_id"])
        await asyncio.sleep(1)
        assert [outcome.ok for outcome in await drain(other)] == [True]
        assert await still_unknown(pool)


async def test_two_requests_that_are_called_about_one_task_at_once_get_nothing_of_it(
    api_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1, 2))]) as w:  # noqa: SIM117
        async with in_doubt(w, None, image("other", key="other")) as (receiver, pool):
            for key in ("k0", "other"):
                await call_about(w, receiver, key)
            assert await still_unknown(pool)
            assert await still_unknown(pool, "other")
            assert "settles nothing" in caplog.text


async def test_a_pool_whose_block_is_left_settles_nothing_and_leaves_nothing(api_key: str, ledger: Path) -> None:
    async with world(api_key, HOLD, faults=[Fault(**LOST, nth=(1,)), Fault(method="GET", delay=3)]) as w:
        async with in_doubt(w, ledger) as (receiver, _):
            await call_about(w, receiver, "k0")
            await asyncio.sleep(1)
        await asyncio.sleep(10)
        assert receiver._open == []
        assert receiver._looks == {}
        async with open_ledger(ledger) as opened:
            assert len(await opened.job().unknown()) == 1


async def test_a_run_gets_the_task_that_a_callback_has_shown(api_key: str) -> None:
    async with world(api_key, faults=[Fault(**LOST, nth=(1,))]) as w:
        receiver = w.receiver()
        async with w.client.pool(callbacks=receiver) as pool:
            running = asyncio.ensure_future(pool.run(images(1)[0]))
            await asyncio.sleep(1)
            await call_about(w, receiver, "k0")
            outcome = await running
        assert outcome.ok
        assert len(w.wire.bodies) == 1


async def test_nothing_is_kept_of_requests_that_have_ended(api_key: str, post: Post) -> None:
    async with world(api_key) as w:
        receiver = post.receiver = w.receiver()
        async with w.client.pool(images(300), callbacks=receiver) as pool:
            assert all(outcome.ok for outcome in await drain(pool))
            doubts = pool._engine.doubts
            assert doubts is not None
            assert not doubts._names
            assert not doubts._sending
            assert not doubts._unknown
        assert receiver._open == []


async def test_what_is_no_receiver_is_refused(api_key: str) -> None:
    async with world(api_key) as w:
        for wrong in (object(), True, "https://example.org", w.client):
            with pytest.raises(ConfigurationError, match="callbacks"):
                w.client.pool([], callbacks=wrong)
        assert json.dumps(w.wire.bodies) == "[]"
