"""Leaving early: what was sent is in the leftovers, nothing goes on in the background, nobody waits for long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from pool_world import Handler, World, answering, drain, image, images, now, task_json, turns, world

from evolink_async import (
    ClosedError,
    DownloadError,
    ImageRequest,
    Outcome,
    QuotaExhaustedError,
    SubmitOutcomeUnknownError,
)
from evolink_async.emulator import Fault
from evolink_async.pool import TaskPool
from evolink_async.saving.saver import Saver

pytestmark = pytest.mark.looptime


def accounted(w: World, pool: TaskPool, taken: list[Outcome]) -> None:
    """Every task of the book is known by its id, or by the idempotency key of an unknown outcome; once."""
    outcomes = [*taken, *pool.leftovers]
    ids = [outcome.task.id for outcome in outcomes if outcome.task is not None]
    keys = [outcome.idempotency_key for outcome in outcomes if outcome.status == "unknown"]
    assert len(set(ids)) == len(ids)
    indexes = [outcome.index for outcome in outcomes]
    assert len(set(indexes)) == len(indexes)
    for post in w.book:
        assert (post["task_id"] in ids) != (post["idempotency_key"] in keys)
    assert all(outcome.attempts or outcome.task for outcome in pool.leftovers)


async def test_break_after_50_of_100_000(api_key: str) -> None:
    pulled = 0
    closed = False

    def source() -> Iterator[ImageRequest]:
        nonlocal pulled, closed
        try:
            for number in range(100_000):
                pulled += 1
                yield image(number)
        finally:
            closed = True

    async with world(api_key) as w:
        taken = []
        async with w.pool(source(), max_outstanding=200) as pool:
            async for outcome in pool:
                taken.append(outcome)
                if len(taken) == 50:
                    break
            left_at = now()
        assert now() - left_at < 0.5
        posts = len(w.wire.posts)
        print(f"pulled {pulled}, posts {posts}, leftovers {len(pool.leftovers)}")
        assert closed
        assert pulled <= 50 + 200
        accounted(w, pool, taken)
        assert len(taken) + len(pool.leftovers) == len(w.book)
        reads = len(w.wire.reads)
        await asyncio.sleep(10_000)
        assert len(w.wire.posts) == posts
        assert len(w.wire.reads) == reads
        unfinished = [outcome for outcome in pool.leftovers if outcome.status == "unfinished"]
        assert unfinished
        task = await w.client.tasks.wait(unfinished[0].task.id)  # type: ignore[union-attr]
        assert task.succeeded


@pytest.mark.parametrize("way", ["exception", "cancel", "timeout", "anyio", "anyio_shielded_parent", "interrupt"])
async def test_every_way_out_keeps_the_ids(api_key: str, way: str) -> None:
    class Interrupt(BaseException):
        pass

    async with world(api_key) as w:
        taken: list[Outcome] = []
        pool = w.pool(iter(images(1000)), max_outstanding=30)

        async def work() -> None:
            async with pool:
                async for outcome in pool:
                    taken.append(outcome)
                    if way == "exception" and len(taken) == 5:
                        raise LookupError("mine")
                    if way == "interrupt" and len(taken) == 5:
                        raise Interrupt

        started = now()
        if way == "exception":
            with pytest.raises(LookupError, match="mine"):
                await work()
        elif way == "interrupt":
            with pytest.raises(Interrupt):
                await work()
        elif way == "cancel":
            task = asyncio.create_task(work())
            await asyncio.sleep(40)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(40):
                    await work()
        elif way == "anyio":
            with anyio.move_on_after(40) as scope:
                await work()
            assert scope.cancelled_caught
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(work)
                await asyncio.sleep(40)
                group.cancel_scope.cancel()
        assert now() - started < 100
        assert len(w.book) > 20
        accounted(w, pool, taken)


@pytest.mark.parametrize(("delay", "status"), [(3.0, "unfinished"), (60.0, "unknown")])
@pytest.mark.parametrize("way", ["native", "anyio", "break"])
async def test_posts_in_flight_get_five_seconds(api_key: str, delay: float, status: str, way: str) -> None:
    async with world(api_key, faults=[Fault(method="POST", delay=delay)]) as w:
        pool = w.pool(images(4))

        async def work() -> None:
            async with pool:
                if way == "break":
                    await asyncio.sleep(1)
                else:
                    await drain(pool)

        if way == "native":
            task = asyncio.create_task(work())
            await asyncio.sleep(1)
            task.cancel()
            await asyncio.wait({task})
        elif way == "anyio":
            with anyio.move_on_after(1):
                await work()
        else:
            await work()
        assert now() == pytest.approx(min(1 + 5, delay), abs=0.1)
        assert [str(outcome.status) for outcome in pool.leftovers] == [status] * 4
        assert {outcome.attempts for outcome in pool.leftovers} == {1}
        if status == "unknown":
            for outcome in pool.leftovers:
                assert isinstance(outcome.error, SubmitOutcomeUnknownError)
                assert outcome.error.idempotency_key == outcome.idempotency_key
        accounted(w, pool, [])


async def test_a_first_cancellation_while_the_block_is_being_left_lets_the_grace_pass(api_key: str) -> None:
    async with world(api_key, faults=[Fault(method="POST", delay=4)]) as w:
        pool = w.pool(images(2))

        async def work() -> None:
            async with pool:
                await asyncio.sleep(1)

        task = asyncio.create_task(work())
        await asyncio.sleep(2)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert now() == pytest.approx(4, abs=0.1)
        assert [str(outcome.status) for outcome in pool.leftovers] == ["unfinished"] * 2


async def test_a_second_cancellation_ends_the_grace_at_once(api_key: str) -> None:
    async with world(api_key, faults=[Fault(method="POST", delay=60)]) as w:
        pool = w.pool(images(2))

        async def work() -> None:
            async with pool:
                await drain(pool)

        task = asyncio.create_task(work())
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert now() == pytest.approx(2, abs=0.1)
        assert [str(outcome.status) for outcome in pool.leftovers] == ["unknown"] * 2


async def test_a_second_cancellation_ends_the_saving_too(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object, **__: object) -> list[Path]:
        await asyncio.sleep(10_000)
        return []

    def saving() -> int:
        return sum(task.get_name() == "evolink saving" for task in asyncio.all_tasks())

    monkeypatch.setattr(Saver, "save", never)
    async with world(api_key, batch=False, faults=[Fault(method="POST", nth=(2,), delay=60)]) as w:
        pool = w.pool([image(1)], save_to=tmp_path)

        async def work() -> None:
            async with pool:
                while not saving():  # noqa: ASYNC110
                    await asyncio.sleep(1)
                pool.add(image(2))
                await asyncio.sleep(1)

        task = asyncio.create_task(work())
        while len(w.wire.posts) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        await asyncio.sleep(2)
        assert (task.done(), saving()) == (False, 1)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.1)
        assert task.cancelled()
        assert not saving()
        assert sorted(str(outcome.status) for outcome in pool.leftovers) == ["completed", "unknown"]


async def test_an_id_that_comes_after_the_grace_is_in_the_log(api_key: str, caplog: pytest.LogCaptureFixture) -> None:
    async with world(api_key, faults=[Fault(method="POST", delay=20)]) as w:
        async with w.pool(images(1)) as pool:
            await asyncio.sleep(1)
        (left,) = pool.leftovers
        assert left.status == "unknown"
        caplog.set_level(logging.INFO, "evolink_async")
        await asyncio.sleep(30)
        (post,) = w.book
        assert post["task_id"] in caplog.text
        assert pool.leftovers == [left]


async def test_untaken_outcomes_are_leftovers(api_key: str) -> None:
    async with world(api_key, {"validate": False}) as w:
        async with w.pool([*images(5), image(n=-1), None]) as pool:  # type: ignore[list-item]
            await asyncio.sleep(300)
            assert pool.stats.untaken == 7
        statuses = sorted(str(outcome.status) for outcome in pool.leftovers)
        assert statuses == ["completed"] * 5 + ["rejected"]  # the item that is no request was not sent


async def test_the_block_is_entered_and_left_in_different_tasks(api_key: str) -> None:
    async with world(api_key) as w:
        pool = w.pool(images(5))
        await asyncio.create_task(pool.__aenter__())
        outcomes = await asyncio.create_task(drain(pool))
        await asyncio.create_task(pool.__aexit__(None, None, None))
        assert len(outcomes) == 5


async def test_an_abandoned_iteration_is_taken_up_again(api_key: str) -> None:
    async with world(api_key) as w:
        async with w.pool(images(6)) as pool:
            seen = []
            async for outcome in pool:
                seen.append(outcome)
                if len(seen) == 2:
                    break
            await turns()
            seen += [await anext(pool)]  # type: ignore[arg-type]
            seen += await drain(pool)
        assert len({outcome.index for outcome in seen}) == 6


async def test_a_cancelled_read_loses_no_outcome(api_key: str) -> None:
    async with world(api_key) as w:
        async with w.pool(images(40), max_outstanding=6) as pool:
            seen = []
            while len(seen) < 40:
                reading = asyncio.create_task(anext(pool))  # type: ignore[arg-type]
                await asyncio.wait({reading}, timeout=0.7)
                reading.cancel()
                await asyncio.wait({reading})
                if not reading.cancelled():
                    seen.append(reading.result())
        assert len({outcome.index for outcome in seen}) == 40


async def test_leaving_ends_an_iteration_in_another_task(api_key: str) -> None:
    async with world(api_key) as w:
        for source in (images(3), [], None):
            async with w.pool(source) as pool:
                if not source:
                    pool.attach("task-unified-1-nobody")
                reading = asyncio.create_task(drain(pool))
                await asyncio.sleep(1)
            with pytest.raises(ClosedError):
                await reading


async def test_two_readers_share_the_outcomes(api_key: str) -> None:
    async with world(api_key) as w:
        async with w.pool(images(20), max_outstanding=4) as pool:
            first, second = await asyncio.gather(drain(pool), drain(pool))
        assert len({outcome.index for outcome in [*first, *second]}) == len(first) + len(second) == 20


async def test_an_exception_on_its_way_is_not_replaced_by_a_failing_clean_up(api_key: str) -> None:
    def source() -> Iterator[ImageRequest]:
        try:
            while True:
                yield image()
        finally:
            raise ValueError("clean-up")

    async with world(api_key) as w:
        with pytest.raises(LookupError):  # noqa: PT012
            async with w.pool(source(), max_outstanding=2):
                await asyncio.sleep(1)
                raise LookupError
        with pytest.raises(ValueError, match="clean-up"):
            async with w.pool(source(), max_outstanding=2):
                await asyncio.sleep(1)


async def test_what_waits_for_a_replay_when_the_block_is_left_is_unknown(api_key: str) -> None:
    fault = Fault(method="POST", drop="after", delay=0.2, path="/v1/images")  # all are sent before one is lost
    async with world(api_key, faults=[fault]) as w:
        async with w.pool(images(8)) as pool:
            await asyncio.sleep(1)
        assert len(w.wire.posts) == 8
        assert {str(outcome.status) for outcome in pool.leftovers} == {"unknown"}
        accounted(w, pool, [])


async def test_a_request_that_is_connecting_when_the_block_is_left_is_not_sent(api_key: str) -> None:
    wait = asyncio.Event()

    async def key() -> str:
        await wait.wait()
        return api_key

    async with world(api_key, {"api_key": key}) as w:
        async with w.pool(images(3)) as pool:
            await asyncio.sleep(1)
            left_at = now()
        assert now() - left_at < 1
        wait.set()
        await asyncio.sleep(10)
        assert w.wire.posts == []
        assert pool.leftovers == []


async def test_leaving_a_pool_that_ended_early_raises_the_reason_only_without_another(api_key: str) -> None:
    async with world(api_key, credits=0) as w:
        with pytest.raises(QuotaExhaustedError):  # noqa: PT012
            async with w.pool(images(3)) as pool:
                async for _ in pool:
                    break
        assert {str(outcome.status) for outcome in pool.leftovers} <= {"not_submitted"}


async def test_run_many_names_the_tasks_that_go_on_when_it_is_cancelled(api_key: str) -> None:
    async with world(api_key) as w:
        running = asyncio.create_task(w.client.run_many(images(4)))
        await asyncio.sleep(5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await running
        for post in w.book:
            assert post["task_id"] in str(caught.value.__notes__)


async def test_what_run_many_had_before_it_was_cancelled_is_not_lost(api_key: str) -> None:
    async with world(api_key) as w:
        running = asyncio.create_task(w.client.run_many(images(4), max_outstanding=2))
        await asyncio.sleep(150)
        running.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await running
        outcomes = caught.value.outcomes  # type: ignore[attr-defined]
        assert [outcome.index for outcome in outcomes] == [0, 1, 2, 3]
        assert {outcome.task.id for outcome in outcomes} == {post["task_id"] for post in w.book}
        assert {str(outcome.status) for outcome in outcomes} == {"completed", "unfinished"}


async def test_run_many_names_the_keys_of_what_may_have_been_accepted_when_it_is_cancelled(api_key: str) -> None:
    async with world(api_key, faults=[Fault(method="POST", delay=45, path="/v1/images")]) as w:
        running = asyncio.create_task(w.client.run_many(images(4)))
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await running
        assert len(w.book) == 4
        for post in w.book:
            assert post["idempotency_key"] in str(caught.value.__notes__)


async def test_a_task_that_has_completed_and_whose_links_are_awaited_is_completed(api_key: str) -> None:
    async with world(api_key, batch=False) as w:

        def rule(request: httpx.Request) -> tuple[int, Any] | None:
            if request.method == "POST":
                return None
            return 200, task_json(request.url.path.rpartition("/")[2], "completed", results=[])

        w.wire.tamper = answering(rule)
        async with w.pool([image(1)]) as pool:
            await asyncio.sleep(1)
            pool.notify(pool.outstanding[0])
            await asyncio.sleep(1)
            assert pool.outstanding
        [left] = pool.leftovers
        assert left.status == "completed"
        assert left.ok
        assert left.urls == ()


async def test_what_completes_during_the_grace_is_not_saved_and_says_so(api_key: str, tmp_path: Path) -> None:
    async def slow(request: httpx.Request, go_on: Handler) -> httpx.Response:
        answer = await go_on(request)
        if len(w.wire.posts) == 2 and request.method == "POST":
            await asyncio.sleep(4)
        return answer

    async with world(api_key, batch=False) as w:
        w.wire.tamper = slow
        async with w.pool([image(1)], save_to=tmp_path) as pool:
            await asyncio.sleep(5)
            running = asyncio.create_task(pool.run(image(2)))
            await asyncio.sleep(1)
            [task_id] = pool.outstanding
            w.emulator.end(task_id)
            pool._engine.session.watcher.notify(task_id)
        assert (await running).status == "unfinished"
        [left] = pool.leftovers
        assert left.status == "completed"
        assert left.urls
        assert not left.files
        assert isinstance(left.error, DownloadError)


async def test_answers_during_the_grace_are_what_they_are(api_key: str) -> None:
    async def rule(request: httpx.Request, go_on: Handler) -> httpx.Response:
        number = len(w.wire.posts)
        answer = await go_on(request)
        await asyncio.sleep(2)
        kinds: dict[int, Any] = {1: (400, {}), 2: (429, {}), 3: (402, {}), 4: (500, {})}
        if request.method == "POST" and number in kinds:
            return await answering(lambda _: kinds[number])(request, go_on)
        return answer

    async with world(api_key) as w:
        w.wire.tamper = rule
        async with w.pool(images(5)) as pool:
            await asyncio.sleep(1)
        statuses = sorted(str(outcome.status) for outcome in pool.leftovers)
        assert statuses == ["not_submitted", "not_submitted", "rejected", "unfinished", "unknown"]
