"""What ends a pool early: the reason, what becomes of everything, and that nothing hangs."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pool_world import Handler, World, answering, drain, image, images, now, response, world

from evolink_async import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ClosedError,
    ImageRequest,
    Outcome,
    PermissionDeniedError,
    QuotaExhaustedError,
    RateLimitError,
    ServerError,
    SubmitOutcomeUnknownError,
)
from evolink_async.core import ClientCore
from evolink_async.emulator import Fault
from evolink_async.http import submit
from evolink_async.http.exchange import Exchange
from evolink_async.http.reads import Reader
from evolink_async.http.submit import Submitter
from evolink_async.polling import watcher
from evolink_async.polling.schedule import Expectation
from evolink_async.polling.watcher import Watcher
from evolink_async.pool import TaskPool
from evolink_async.pool.engine import Engine
from evolink_async.pool.record import Record
from evolink_async.pool.sources import Sources

pytestmark = pytest.mark.looptime


def account_error(status: int, code: str = "x") -> dict[str, Any]:
    return {"error": {"code": code, "message": "no", "type": "x"}}


async def until_it_ends(pool: TaskPool, expected: type[BaseException]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with pytest.raises(expected) as caught:  # noqa: PT012
        async with pool:
            async for outcome in pool:
                outcomes.append(outcome)
            assert isinstance(pool.reason, expected)
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling()
    assert caught.value is pool.reason
    assert not isinstance(caught.value, BaseExceptionGroup)
    return outcomes


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (401, "invalid_api_key", AuthenticationError),
        (402, "insufficient_quota", QuotaExhaustedError),
        (403, "key_disabled", PermissionDeniedError),
        (403, "user_disabled", PermissionDeniedError),
    ],
)
async def test_an_account_that_is_refused_ends_the_pool_and_what_is_outstanding_is_finished(
    api_key: str, status: int, code: str, error: type[APIStatusError]
) -> None:
    async with world(api_key) as w:

        def rule(request: httpx.Request) -> tuple[int, Any] | None:
            over = request.method == "POST" and len(w.wire.posts) > 12
            return (status, account_error(status, code)) if over else None

        w.wire.tamper = answering(rule)
        outcomes = await until_it_ends(w.pool(iter(images(500)), max_outstanding=40), error)
        counts = Counter(str(outcome.status) for outcome in outcomes)
        assert counts["completed"] == len(w.book) == 12
        assert counts["not_submitted"] == len(outcomes) - 12 <= 40
        assert len(w.wire.posts) == 13
    assert len({outcome.index for outcome in outcomes}) == len(outcomes)


async def test_credits_run_out_in_the_middle_of_5000_requests(api_key: str) -> None:
    """Nothing is sent after the answer was read, and every picture that is paid for is delivered."""
    pulled = 0

    def source() -> Iterator[ImageRequest]:
        nonlocal pulled
        for request in images(5000):
            pulled += 1
            yield request

    async def late(request: httpx.Request, go_on: Handler) -> httpx.Response:
        if request.method == "POST":
            answer = await go_on(request)
            await asyncio.sleep(0.2)
            return answer
        return await go_on(request)

    async with world(api_key, {"rate_limit": "100/s"}, speed=20) as w:
        async with w.pool() as probe:
            price = float((await probe.run(image())).credits or 0)
        w.emulator._world.service.account.initial = round((price * 900) * 1_000_000)
        w.wire.posts.clear()
        w.wire.tamper = late
        outcomes = await until_it_ends(w.pool(source(), max_outstanding=300), QuotaExhaustedError)
        counts = Counter(str(outcome.status) for outcome in outcomes)
        refused = [post for post in w.wire.posts if post.status == 402]
        first_read = min(post.answered or 0.0 for post in refused)
        after = [post for post in w.wire.posts if post.arrived > first_read]
        print(f"{counts} pulled {pulled} posts {len(w.wire.posts)} answered 402: {len(refused)}")
        assert after == []
        assert len(refused) <= 25  # 0.2 s at 100/s were on their way
        assert counts["completed"] == len(w.book) - 1 == 899
        assert counts["not_submitted"] == pulled - 899
        assert len(outcomes) == pulled < 1500
        in_flight = [outcome for outcome in outcomes if outcome.status == "not_submitted" and outcome.attempts]
        assert len(in_flight) == len(refused)


async def test_posts_that_were_started_and_not_written_when_the_answer_came_are_not_sent(api_key: str) -> None:
    wait = asyncio.Event()
    asked = 0

    async def key() -> str:
        nonlocal asked
        asked += 1
        if asked > 1:
            await wait.wait()
        return api_key

    async def slow(request: httpx.Request, go_on: Handler) -> httpx.Response:
        await asyncio.sleep(1)
        return await go_on(request)

    async with world(api_key, {"api_key": key}, credits=0) as w:
        w.wire.tamper = slow
        outcomes = await until_it_ends(w.pool(images(10)), QuotaExhaustedError)
        wait.set()
        await asyncio.sleep(10)
        assert len(w.wire.posts) == 1
    assert {str(outcome.status) for outcome in outcomes} == {"not_submitted"}


async def test_requests_that_wait_after_a_429_come_back_not_submitted(api_key: str) -> None:
    """They were refused, so it is known that no task exists."""
    async with world(api_key, rate=0.1, burst=2) as w:
        async with w.pool(images(10)) as pool:
            await asyncio.sleep(5)
            assert pool.stats.rate_limited > 0
            pool.stop()
            outcomes = await drain(pool)
        assert len(outcomes) == 10
        assert {str(outcome.status) for outcome in outcomes} == {"completed", "not_submitted"}
        assert sum(outcome.ok for outcome in outcomes) == len(w.book)


async def test_a_429_to_a_post_that_is_not_sent_again_counts_in_the_statistics(api_key: str) -> None:
    async def slow(request: httpx.Request, go_on: Handler) -> httpx.Response:
        if request.method == "POST":
            await asyncio.sleep(2)
        return await go_on(request)

    async with world(api_key, concurrency=1) as w:
        w.wire.tamper = slow
        async with w.pool(images(2)) as pool:
            await asyncio.sleep(1)
            pool.stop()
            outcomes = await drain(pool)
        assert {str(outcome.status) for outcome in outcomes} == {"completed", "not_submitted"}
        assert sorted(post.status or 0 for post in w.wire.posts) == [200, 429]
        assert (pool.stats.posts, pool.stats.rate_limited) == (2, 1)


async def test_twenty_identical_refusals_end_the_pool(api_key: str) -> None:
    async with world(api_key, {"validate": False, "rate_limit": "1/s"}) as w:
        source = (image(number, size="17x4") for number in range(1000))
        outcomes = await until_it_ends(w.pool(source, max_outstanding=10), BadRequestError)
        assert len(w.wire.posts) == 20
        counts = Counter(str(outcome.status) for outcome in outcomes)
        assert counts["rejected"] == 20
        assert counts["not_submitted"] <= 10


async def test_different_refusals_do_not_end_it_and_an_accepted_request_starts_the_count_again(api_key: str) -> None:
    async with world(api_key, {"validate": False, "rate_limit": "1/s"}) as w:
        different = [image(number, size="17x4") if number % 2 else image(number, n="many") for number in range(60)]
        outcomes = await w.client.run_many(different)
        assert {str(outcome.status) for outcome in outcomes} == {"rejected"}
        interrupted = [image(number) if number % 15 == 14 else image(number, size="17x4") for number in range(60)]
        outcomes = await w.client.run_many(interrupted)
        assert sum(outcome.ok for outcome in outcomes) == 4
        assert len(await w.client.run_many([image(1, size="17x4")] * 50, stop_after_rejections=None)) == 50
        await until_it_ends(w.pool([image(1, size="17x4")] * 50, stop_after_rejections=3), BadRequestError)


@pytest.mark.parametrize(("status", "hint"), [(429, 7200), (429, 3601), (503, 7200), (503, 3601)])
async def test_a_cool_down_over_an_hour_ends_the_pool_at_once(api_key: str, status: int, hint: int) -> None:
    faults = [Fault(method="POST", nth=(5,), status=status, headers={"retry-after": str(hint)})]
    async with world(api_key, {"rate_limit": "1/s"}, faults=faults) as w:
        outcomes = await until_it_ends(
            w.pool(iter(images(100)), max_outstanding=20), RateLimitError if status == 429 else Exception
        )
        assert now() < 400
        counts = Counter(str(outcome.status) for outcome in outcomes)
        assert counts["completed"] == len(w.book) == 4
        assert counts["unknown"] == (status == 503)
        assert len(w.wire.posts) == 5


async def test_a_cool_down_over_an_hour_ends_every_pool_that_has_to_wait_for_it(api_key: str) -> None:
    faults = [Fault(method="POST", nth=(3,), status=429, headers={"retry-after": "7200"})]
    async with world(api_key, {"rate_limit": "1/s"}, faults=faults) as w:
        waits = w.pool(images(5))  # its requests and those of the other take turns
        outcomes, others = await asyncio.gather(
            until_it_ends(waits, RateLimitError), until_it_ends(w.pool(images(5, start=5)), RateLimitError)
        )
        assert now() < 400
        assert Counter(str(outcome.status) for outcome in outcomes + others) == {"completed": 2, "not_submitted": 8}
        later = await until_it_ends(w.pool(images(3)), RateLimitError)
        assert {str(outcome.status) for outcome in later} == {"not_submitted"}
        assert now() < 400
        assert len(w.wire.posts) == 3
        await asyncio.sleep(3700)  # less than an hour of it is left
        assert all(outcome.ok for outcome in await w.client.run_many(images(3)))
        assert now() >= 7200


@pytest.mark.parametrize("hint", [3000, 3600])
async def test_a_cool_down_up_to_an_hour_is_waited_out(api_key: str, hint: int) -> None:
    faults = [Fault(method="POST", nth=(3,), status=429, headers={"retry-after": str(hint)})]
    async with world(api_key, faults=faults) as w:
        outcomes = await w.client.run_many(images(10))
        assert all(outcome.ok for outcome in outcomes)
        assert now() >= hint


async def test_no_access_for_polls_makes_what_is_outstanding_unfinished(api_key: str) -> None:
    async with world(api_key) as w:

        def rule(request: httpx.Request) -> tuple[int, Any] | None:
            return (401, account_error(401)) if len(w.wire.posts) >= 10 else None

        w.wire.tamper = answering(rule)
        outcomes = await until_it_ends(w.pool(images(50), max_outstanding=20), AuthenticationError)
        assert now() < 150
        unfinished = [outcome for outcome in outcomes if outcome.status == "unfinished"]
        assert len(unfinished) == len(w.book) == 9
        assert all(isinstance(outcome.error, AuthenticationError) for outcome in unfinished)


async def test_another_exception_on_its_way_wins_over_the_reason(api_key: str) -> None:
    async with world(api_key, credits=0) as w:
        with pytest.raises(LookupError, match="mine"):  # noqa: PT012
            async with w.pool(images(3)) as pool:
                await drain(pool)
                assert isinstance(pool.reason, QuotaExhaustedError)
                raise LookupError("mine")


# Crashes: something low breaks on purpose


def break_once(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str, at: int) -> None:
    original = getattr(cls, name)
    calls = 0

    def broken(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError(f"{name} is broken")
        return original(*args, **options)

    monkeypatch.setattr(cls, name, broken)


def moments_of_the_end(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When pools are told to end early."""
    moments: list[float] = []
    end_early = Engine.end_early
    monkeypatch.setattr(Engine, "end_early", lambda self, error: (moments.append(now()), end_early(self, error)))
    return moments


def accounted(w: World, pool: TaskPool, outcomes: list[Outcome]) -> None:
    """Every request that was pulled has one outcome, and every task one that names it."""
    assert sorted(outcome.index for outcome in outcomes) == list(range(pool.stats.pulled))  # type: ignore[type-var]
    known = {outcome.task.id for outcome in outcomes if outcome.task is not None}
    keys = {outcome.idempotency_key for outcome in outcomes if outcome.status == "unknown"}
    for post in w.book:
        assert post["task_id"] in known or post["idempotency_key"] in keys


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (submit, "judge_submission"),
        (Exchange, "send"),
        (Submitter, "start"),
        (Engine, "posting"),
        (Engine, "settled"),
        (Engine, "_accepted"),
        (Engine, "_follow"),
        (Engine, "_begin"),
        (Engine, "_send"),
        (Engine, "_conclude"),
        (Engine, "seen"),
        (Record, "outcome"),
        (ClientCore, "check"),
        (Watcher, "follow"),
        (Sources, "_give_turn"),
    ],
)
async def test_a_crash_on_the_way_is_the_reason_and_everything_comes_back(
    api_key: str, monkeypatch: pytest.MonkeyPatch, cls: Any, name: str
) -> None:
    async with world(api_key) as w:
        crashed = moments_of_the_end(monkeypatch)
        break_once(monkeypatch, cls, name, at=4)
        pool = w.pool(iter(images(100)), max_outstanding=8)
        outcomes = await until_it_ends(pool, RuntimeError)
        accounted(w, pool, outcomes)
        # Our own fault ends the iteration within a second; an iterable's lets what is outstanding finish.
        assert now() - crashed[0] < 1


@pytest.mark.parametrize(
    ("cls", "name", "at"),
    [(Reader, "attempt", 1), (Reader, "attempt", 3), (Expectation, "next_look", 9), (watcher, "read_task", 2)],
)
async def test_a_crash_of_the_watcher_gives_everything_back_at_once(
    api_key: str, monkeypatch: pytest.MonkeyPatch, cls: Any, name: str, at: int
) -> None:
    async with world(api_key) as w:
        crashed = moments_of_the_end(monkeypatch)
        break_once(monkeypatch, cls, name, at)
        pool = w.pool(iter(images(100)), max_outstanding=8)
        outcomes = await until_it_ends(pool, RuntimeError)
        assert now() - crashed[0] < 1
        accounted(w, pool, outcomes)
        statuses = {str(outcome.status) for outcome in outcomes}
        assert "unfinished" in statuses
        assert statuses <= {"unfinished", "completed", "not_submitted", "unknown"}


async def test_a_crash_of_the_feeder_gives_back_at_once_what_is_running(
    api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(api_key) as w:
        crashed = moments_of_the_end(monkeypatch)
        break_once(monkeypatch, Sources, "_give_turn", at=10)  # the first turn after one of eight tasks has ended
        pool = w.pool(iter(images(100)), max_outstanding=8)
        outcomes = await until_it_ends(pool, RuntimeError)
        assert now() - crashed[0] < 1
        accounted(w, pool, outcomes)
        assert "unfinished" in {str(outcome.status) for outcome in outcomes}


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_fault_that_stays_where_an_end_is_counted_and_logged_hangs_nobody(api_key: str, awaited: bool) -> None:
    def failing(record: logging.LogRecord) -> bool:
        if getattr(record, "identity", None) == "k3" and record.event == "outcome":  # type: ignore[attr-defined]
            raise RuntimeError("the caller's own filter")
        return True

    log = logging.getLogger("evolink_async.pool")
    log.addFilter(failing)
    try:
        async with world(api_key) as w:
            with pytest.raises(RuntimeError, match="own filter"):  # noqa: PT012
                async with w.pool(None if awaited else iter(images(8)), max_outstanding=4) as pool:
                    async with asyncio.timeout(1000):
                        if awaited:
                            outcomes = await asyncio.gather(*map(pool.run, images(8)))
                        else:
                            outcomes = await drain(pool)
            accounted(w, pool, outcomes)
    finally:
        log.removeFilter(failing)


async def failing(request: httpx.Request, go_on: Handler) -> httpx.Response:
    if request.method == "POST":
        pytest.fail("nothing may be sent here")
    return await go_on(request)


async def test_what_a_users_transport_raises_beside_exceptions_is_the_reason(api_key: str) -> None:
    """A test that fails inside its own transport raises what is no Exception."""
    async with world(api_key) as w, asyncio.timeout(60):
        w.wire.tamper = failing
        outcomes = await until_it_ends(w.pool(images(3)), pytest.fail.Exception)
    assert {str(outcome.status) for outcome in outcomes} <= {"unknown", "not_submitted"}


async def test_a_submission_hears_at_once_what_a_users_transport_raises_beside_exceptions(api_key: str) -> None:
    async with world(api_key) as w, asyncio.timeout(60):
        w.wire.tamper = failing
        with pytest.raises(SubmitOutcomeUnknownError) as caught:
            await w.client.submit(image())
        assert isinstance(caught.value.__cause__, pytest.fail.Exception)


async def test_a_crash_in_one_pool_does_not_touch_another(api_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(api_key) as w, w.pool(images(10)) as fine:
        broken = w.pool(images(10, start=10))
        monkeypatch.setattr(broken._engine, "_conclude", lambda *_: 1 / 0)
        await until_it_ends(broken, ZeroDivisionError)
        outcomes = await drain(fine)
    assert all(outcome.ok for outcome in outcomes)
    assert len(outcomes) == 10


async def test_the_client_closed_under_the_pool_ends_it(api_key: str) -> None:
    async with world(api_key, {"rate_limit": "1/s"}) as w:
        pool = w.pool(iter(images(1000)), max_outstanding=30)
        closing = asyncio.get_running_loop().call_later(5.5, lambda: asyncio.ensure_future(w.client.aclose()))
        outcomes = await until_it_ends(pool, ClosedError)
        assert "closed under the pool" in str(pool.reason)
        assert now() < 12
        accounted(w, pool, outcomes)
        counts = Counter(str(outcome.status) for outcome in outcomes)
        assert counts["unfinished"] == len(w.book) > 0
        assert counts["not_submitted"] == len(outcomes) - len(w.book)
        closing.cancel()


async def test_a_post_without_an_answer_when_the_client_is_closed_counts_in_the_statistics(api_key: str) -> None:
    async def never(request: httpx.Request, go_on: Handler) -> httpx.Response:
        if request.method == "POST":
            await asyncio.Event().wait()
        return await go_on(request)

    async with world(api_key) as w:
        w.wire.tamper = never
        pool = w.pool(images(1))
        asyncio.get_running_loop().call_later(1, lambda: asyncio.ensure_future(w.client.aclose()))
        [outcome] = await until_it_ends(pool, ClosedError)
        assert (outcome.status, outcome.attempts) == ("unknown", 1)
        assert pool.stats.posts == len(w.wire.posts) == 1


async def test_a_server_error_is_no_reason(api_key: str) -> None:
    faults = [Fault(method="POST", nth=(2,), status=500)]
    async with world(api_key, {"on_lost_response": "hold"}, faults=faults) as w:
        outcomes = await w.client.run_many(images(5))
    (unknown,) = [outcome for outcome in outcomes if not outcome.ok]
    assert unknown.status == "unknown"
    assert unknown.error is not None
    assert isinstance(unknown.error.__cause__, ServerError)


async def test_an_answer_that_was_lost_when_the_pool_ends_is_unknown_and_not_sent_again(api_key: str) -> None:
    async def rule(request: httpx.Request, go_on: Handler) -> httpx.Response:
        if request.method == "POST" and len(w.wire.posts) == 1:
            await asyncio.sleep(5)
            await go_on(request)
            raise httpx.ReadError("cut")
        if request.method == "POST":
            await asyncio.sleep(1)
            return response(402, {})
        return await go_on(request)

    async with world(api_key) as w:
        w.wire.tamper = rule
        outcomes = await until_it_ends(w.pool(images(2)), QuotaExhaustedError)
        assert sorted(str(outcome.status) for outcome in outcomes) == ["not_submitted", "unknown"]
        assert len(w.wire.posts) == 2
