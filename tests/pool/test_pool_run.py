"""`run`, the end of the iteration, and the bounds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pool_world import Handler, answering, drain, image, images, now, response, turns, world

from evolink_async import ClosedError, ConfigurationError, ImageRequest, NotSubmittedError, Outcome, QuotaExhaustedError
from evolink_async.emulator import Fault
from evolink_async.http.submit import Submitter
from evolink_async.pool.brakes import PROBE_PAUSE

pytestmark = pytest.mark.looptime


async def test_run_gives_the_outcome_and_the_iteration_does_not(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(3)) as pool:
        outcome = await pool.run(image("awaited", key="mine"))
        others = await drain(pool)
    assert outcome.ok
    assert outcome.key == "mine"
    assert {other.key for other in others} == {"k0", "k1", "k2"}
    assert len({outcome.index for outcome in [outcome, *others]}) == 4


async def test_run_inside_the_loop_never_waits_for_the_reader(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(30), max_outstanding=3) as pool:
        runs = []
        async for _ in pool:
            await asyncio.sleep(300)  # by now every place is taken by outcomes that nobody has taken
            runs.append(await pool.run(image(f"run {len(runs)}")))
    assert len(runs) == 30
    assert all(run.ok for run in runs)


async def test_many_runs_in_a_full_pool_all_come_back(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(20), max_outstanding=2) as pool:
        runs = await asyncio.gather(*(pool.run(image(f"run {number}")) for number in range(500)))
        assert all(run.ok for run in runs)
        assert len(await drain(pool)) == 20
    assert len(w.book) == 520


async def test_run_goes_ahead_of_sources_that_wait_for_the_pace(api_key: str) -> None:
    async with world(api_key, {"rate_limit": "1/min"}) as w, w.pool(images(50), max_outstanding=20) as pool:
        await asyncio.sleep(1)  # all places are taken, by requests that the pace holds back
        outcome = await pool.run(image("urgent"))
        assert outcome.submitted_at is not None
        assert len(w.wire.posts) <= 4
        pool.stop()
        outcomes = await drain(pool)
    keys = [outcome.idempotency_key for outcome in [outcome, *outcomes] if outcome.attempts]
    assert sorted(keys) == sorted(post["idempotency_key"] for post in w.book)  # type: ignore[type-var]


async def test_a_request_whose_post_has_begun_is_not_sent_twice_to_make_place_for_a_run(api_key: str) -> None:
    """The key function is awaited between the start of a POST and its first byte."""
    slow = asyncio.Event()

    async def key() -> str:
        await slow.wait()
        return api_key

    async with world(api_key, {"api_key": key}, idempotency=False) as w:  # noqa: SIM117
        async with w.pool(images(4), max_outstanding=2) as pool:
            await turns()
            running = asyncio.create_task(pool.run(image("urgent")))
            await turns()
            slow.set()
            assert (await running).ok
            assert len(await drain(pool)) == 4
    assert len(w.book) == 5
    assert len({post.key for post in w.wire.posts}) == len(w.wire.posts) == 5


async def test_outstanding_never_exceeds_the_bound_with_sources_and_runs(api_key: str) -> None:
    most = 0

    async def watch(request: httpx.Request, go_on: Handler) -> httpx.Response:
        nonlocal most
        answer = await go_on(request)
        most = max(most, w.wire.running)
        return answer

    async with world(api_key, seed=4) as w:
        w.wire.tamper = watch
        async with w.pool(images(60), max_outstanding=7) as pool:

            async def runs(number: int) -> None:
                for turn in range(5):
                    await asyncio.sleep(number * 7)
                    assert (await pool.run(image(f"{number} {turn}"))).ok

            running = [asyncio.create_task(runs(number)) for number in range(6)]
            async for _ in pool:
                assert len(pool.outstanding) <= 7
            await asyncio.gather(*running)
    assert most == 7
    assert len(w.book) == 90


async def test_a_slow_reader_slows_the_sources_and_not_the_polls(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(40), max_outstanding=4) as pool:
        delays = []
        async for outcome in pool:
            await asyncio.sleep(400)
            (post,) = [post for post in w.book if outcome.task is not None and post["task_id"] == outcome.task.id]
            delays.append(post["first_told_at"] - post["finished_at"])
            assert len(w.book) <= len(delays) + 4
    assert max(delays) < 10  # each task was seen to end soon after its end, whenever it was taken


async def test_a_source_is_pulled_only_while_there_is_room_for_its_outcome(api_key: str) -> None:
    def source() -> Iterator[ImageRequest]:
        for number in range(60):
            stats = pool.stats
            assert stats.outstanding + stats.waiting + stats.untaken < 9, stats
            yield image(number)

    async with world(api_key, {"rate_limit": "1/s"}) as w, w.pool(source(), max_outstanding=9) as pool:
        random.seed(1)
        running = []
        async for _ in pool:
            await asyncio.sleep(random.expovariate(0.1))
            if random.random() < 0.2:
                running.append(asyncio.create_task(pool.run(image(f"run {len(running)}"))))
        await asyncio.gather(*running)


async def test_cancelling_a_run_stops_the_waiting_and_not_the_task(api_key: str) -> None:
    async with world(api_key) as w:
        async with w.pool() as pool:
            running = asyncio.create_task(pool.run(image()))
            await asyncio.sleep(5)
            (task_id,) = pool.outstanding
            running.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await running
            assert task_id in str(caught.value.__notes__)
            assert pool.outstanding == (task_id,)
            await asyncio.sleep(200)
            assert pool.outstanding == ()
            (left,) = pool.leftovers
            assert left.status == "completed"
        assert pool.leftovers == [left]


async def test_a_run_that_is_cancelled_before_its_turn_is_never_sent(api_key: str) -> None:
    async with world(api_key) as w:
        async with w.pool(max_outstanding=1) as pool:
            first = asyncio.create_task(pool.run(image(1)))
            await asyncio.sleep(1)
            second = asyncio.create_task(pool.run(image(2)))
            await asyncio.sleep(1)
            second.cancel()
            assert (await first).ok
            with pytest.raises(asyncio.CancelledError):
                await second
            assert (await pool.run(image(3))).ok
        assert pool.leftovers == []
    assert len(w.book) == 2


async def test_a_key_whose_run_was_cancelled_before_its_turn_can_be_run_again(api_key: str) -> None:
    async with world(api_key, {"rate_limit": "1/s"}) as w, w.pool() as pool:
        others = [asyncio.create_task(pool.run(image(number))) for number in range(4)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.run(image("mine", key="mine")), 0.5)
        again = await pool.run(image("mine", key="mine"))
        await asyncio.gather(*others)
        assert again.ok
        assert not again.from_ledger
        assert len(w.book) == 5


async def test_who_takes_an_unsent_request_back_takes_it_from_nobody_who_wants_the_same(api_key: str) -> None:
    async with world(api_key, {"rate_limit": "1/s"}) as w, w.pool() as pool:
        others = [asyncio.create_task(pool.run(image(number))) for number in range(4)]
        first, *same = [asyncio.create_task(pool.run(image("wanted", key="wanted"))) for _ in range(4)]
        await asyncio.sleep(0.5)
        first.cancel()
        same.pop().cancel()
        outcomes = await asyncio.gather(*same, *others)
        assert all(outcome.ok for outcome in outcomes)
        assert outcomes[0].task == outcomes[1].task
        assert len(w.book) == 5


async def test_a_run_that_is_cancelled_while_its_post_flies_waits_for_the_id(api_key: str) -> None:
    async with world(api_key, faults=[Fault(method="POST", delay=3)]) as w:
        async with w.pool() as pool:
            running = asyncio.create_task(pool.run(image()))
            await asyncio.sleep(1)
            running.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await running
            assert now() == pytest.approx(3, abs=0.1)
            assert w.book[0]["task_id"] in str(caught.value.__notes__)
        (left,) = pool.leftovers
        assert left.status == "unfinished"


async def test_a_run_that_is_cancelled_twice_while_its_post_flies_is_refused_and_not_sent_again(api_key: str) -> None:
    faults = [Fault(method="POST", path="/v1/images", nth=(1,), delay=3, status=429, headers={"retry-after": "1"})]
    async with world(api_key, faults=faults) as w:
        async with w.pool() as pool:
            running = asyncio.create_task(pool.run(image()))
            await asyncio.sleep(1)
            running.cancel()
            await asyncio.sleep(1)
            running.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await running
            assert "idempotency key" in str(caught.value.__notes__)
            await asyncio.sleep(100)
        assert w.book == []
        (left,) = pool.leftovers
        assert left.status == "not_submitted"


async def test_a_run_that_ends_in_the_moment_it_is_cancelled_is_in_the_leftovers(
    api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(api_key) as w:
        async with w.pool() as pool:
            running = asyncio.create_task(pool.run(image()))
            await asyncio.sleep(1)
            finish = pool._engine._finish

            def finish_and_cancel(*args: Any) -> None:
                finish(*args)
                running.cancel()

            monkeypatch.setattr(pool._engine, "_finish", finish_and_cancel)
            with pytest.raises(asyncio.CancelledError) as caught:
                await running
            assert "ended" in str(caught.value.__notes__)
        (left,) = pool.leftovers
        assert left.ok


async def test_leaving_lets_every_waiting_run_return(api_key: str) -> None:
    async with world(api_key, faults=[Fault(method="POST", nth=(3,), delay=60)]) as w:
        async with w.pool(max_outstanding=3) as pool:
            running = [asyncio.create_task(pool.run(image(number))) for number in range(6)]
            await asyncio.sleep(2)
        outcomes: list[Outcome] = await asyncio.gather(*running)
    statuses = sorted(str(outcome.status) for outcome in outcomes)
    assert statuses == ["not_submitted"] * 3 + ["unfinished"] * 2 + ["unknown"]
    assert pool.leftovers == []  # they were handed over
    unknown = [outcome for outcome in outcomes if outcome.status == "unknown"]
    assert unknown[0].attempts == 1


async def test_run_is_refused_outside_the_block_and_after_stop(api_key: str) -> None:
    async with world(api_key) as w:
        pool = w.pool()
        with pytest.raises(ConfigurationError, match="enter"):
            await pool.run(image())
        async with pool:
            pool.stop()
            with pytest.raises(ClosedError):
                await pool.run(image())
            with pytest.raises(ClosedError):
                pool.add(image())
            assert await drain(pool) == []
        for call in (pool.run(image()), drain(pool)):
            with pytest.raises(ClosedError):
                await call
        with pytest.raises(ClosedError):
            pool.add(image())
        with pytest.raises(ClosedError):
            pool.attach("task-unified-1-a")
        with pytest.raises(ClosedError):
            await pool.__aenter__()


@pytest.mark.parametrize("status", [401, 402])
async def test_a_pool_without_sources_outlives_401_and_402_and_probes_every_30_seconds(
    api_key: str, status: int
) -> None:
    broken = True
    async with world(api_key) as w:
        w.wire.tamper = answering(lambda request: (status, {}) if broken and request.method == "POST" else None)
        async with w.pool() as pool:
            for _ in range(200):
                outcome = await pool.run(image())
                assert outcome.status == "not_submitted"
                assert isinstance(outcome.error, NotSubmittedError)
                assert outcome.error.__cause__.status_code == status  # type: ignore[union-attr]
                await asyncio.sleep(1)
            assert pool.reason is None
            assert len(w.wire.posts) == pytest.approx(200 / PROBE_PAUSE, abs=1.1)
            gaps = [b.arrived - a.arrived for a, b in zip(w.wire.posts, w.wire.posts[1:], strict=False)]
            assert min(gaps) >= PROBE_PAUSE - 0.01
            broken = False
            await asyncio.sleep(PROBE_PAUSE)
            assert (await pool.run(image())).ok
            runs = await asyncio.gather(*(pool.run(image(number)) for number in range(20)))
            assert all(run.ok for run in runs)


async def test_a_key_that_could_not_be_sent_in_a_blocked_pool_is_sent_when_that_is_over(api_key: str) -> None:
    async with world(api_key, credits=0) as w, w.pool() as pool:
        assert (await pool.run(image(1, key="a"))).status == "not_submitted"
        w.emulator.set_account(credits=100)
        await asyncio.sleep(PROBE_PAUSE + 1)
        first = await pool.run(image(1, key="a"))
        second = await pool.run(image(1, key="a"))
        assert first.ok
        assert second.task == first.task
        assert len(w.book) == 1


async def test_many_runs_that_wait_in_a_blocked_pool_come_back_at_once(api_key: str) -> None:
    async def slow_refusal(request: httpx.Request, go_on: Handler) -> httpx.Response:
        await asyncio.sleep(1)
        return response(402, {})

    async with world(api_key) as w:
        w.wire.tamper = slow_refusal
        async with w.pool(max_outstanding=1) as pool:
            runs = await asyncio.gather(*(pool.run(image(number)) for number in range(3000)))
            more = await asyncio.gather(*(pool.run(image(number)) for number in range(3000)))
    assert {str(run.status) for run in [*runs, *more]} == {"not_submitted"}
    assert len(w.wire.posts) == 1


async def test_sources_added_to_a_blocked_pool_are_not_burnt(api_key: str) -> None:
    async with world(api_key, credits=2.5) as w, w.pool() as pool:
        assert (await pool.run(image(1))).status in ("completed", "not_submitted")
        assert (await pool.run(image(2))).status == "not_submitted"
        w.emulator._world.service.account.initial += 10**9
        pool.add(images(20))
        assert all([outcome.ok async for outcome in pool])


async def test_with_sources_a_402_for_a_run_ends_the_pool(api_key: str) -> None:
    async with world(api_key, credits=0) as w:
        with pytest.raises(QuotaExhaustedError):  # noqa: PT012
            async with w.pool(max_outstanding=2) as pool:
                pool.add(iter(()))
                assert (await pool.run(image())).status == "not_submitted"
                assert (await pool.run(image())).status == "not_submitted"
                assert len(w.wire.posts) == 1


async def test_requests_that_cannot_be_written_do_not_exhaust_the_stack(api_key: str) -> None:
    async with world(api_key, {"validate": False}) as w, w.pool(max_outstanding=1) as pool:
        first = asyncio.create_task(pool.run(image()))
        await asyncio.sleep(1)
        runs = [asyncio.create_task(pool.run(image(seed=float("nan")))) for _ in range(2000)]
        assert (await first).ok
        outcomes = await asyncio.gather(*runs)
    assert {str(outcome.status) for outcome in outcomes} == {"rejected"}
    assert pool.reason is None


async def test_a_key_that_was_refused_is_not_sent_again_in_the_same_pool(api_key: str) -> None:
    refusal = {"error": {"code": "invalid_parameter", "message": "no such size"}}
    async with world(api_key, faults=[Fault(method="POST", status=400, body=refusal)]) as w, w.pool() as pool:
        first, second = [await pool.run(image(1, key="a")) for _ in range(2)]
        assert len(w.wire.posts) == 1
    assert first.status == second.status == "rejected"
    assert second.error is not None
    assert str(first.error).startswith(str(second.error).partition(" (")[0])
    assert str(second.error).count("invalid_parameter") == 1


async def test_a_wrong_request_given_to_run_is_an_outcome(api_key: str) -> None:
    async with world(api_key) as w, w.pool() as pool:
        wrong: Any = {"model": "gpt-4o-image"}
        outcome = await pool.run(wrong)
    assert outcome.status == "rejected"
    assert "GenerationRequest.from_dict" in str(outcome.error)


async def test_a_fault_while_a_run_is_started_reaches_nobody_else(
    api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(api_key) as w:
        with pytest.raises(RuntimeError, match="boom"):  # noqa: PT012
            async with w.pool() as pool:
                monkeypatch.setattr(Submitter, "start", _boom)
                outcome = await pool.run(image())
                assert outcome.status == "not_submitted"
                assert isinstance(pool.reason, RuntimeError)


def _boom(*_: Any, **__: Any) -> None:
    raise RuntimeError("boom")


async def test_runs_in_a_pool_whose_client_is_closed_come_back(api_key: str) -> None:
    async with world(api_key, {"rate_limit": "1/s"}) as w:
        with pytest.raises(ClosedError):  # noqa: PT012
            async with w.pool(max_outstanding=5) as pool:
                running = [asyncio.create_task(pool.run(image(number))) for number in range(8)]
                await asyncio.sleep(3.5)
                await w.client.aclose()
                outcomes = await asyncio.gather(*running)
                statuses = sorted(str(outcome.status) for outcome in outcomes)
                assert statuses == ["not_submitted"] * (8 - len(w.book)) + ["unfinished"] * len(w.book)
                assert (await pool.run(image())).status == "not_submitted"
                assert isinstance(pool.reason, ClosedError)


async def test_only_one_request_finds_out_whether_a_block_is_over(api_key: str) -> None:
    async def slow_refusal(request: httpx.Request, go_on: Handler) -> httpx.Response:
        await asyncio.sleep(5)
        return response(402, {})

    async with world(api_key) as w:
        w.wire.tamper = slow_refusal
        async with w.pool() as pool:
            await pool.run(image())
            for round_number in range(2, 5):
                await asyncio.sleep(PROBE_PAUSE)
                runs = await asyncio.gather(*(pool.run(image(number)) for number in range(10)))
                assert {str(run.status) for run in runs} == {"not_submitted"}
                assert len(w.wire.posts) == round_number
