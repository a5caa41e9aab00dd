"""A pool whose service is out of order: its answers are lost, or nobody reaches it, or the machine slept."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from loop_executor import in_loop
from pool_world import Handler, World, answering, drain, image, images, now, response, world

from evolink_async import ConnectionFailedError, ImageRequest, NotSubmittedError, Outcome, clock
from evolink_async.pool import TaskPool

pytestmark = pytest.mark.looptime


def is_paid(request: httpx.Request) -> bool:
    return request.method == "POST" and request.url.path.endswith("/generations")


# Answers that are lost


@pytest.mark.parametrize("keys_honoured", [True, False])
async def test_an_outage_of_a_minute_leaves_a_handful_unknown(api_key: str, keys_honoured: bool) -> None:
    async with world(api_key, {"rate_limit": "10/s"}, idempotency=keys_honoured) as w:
        lost = 0

        def rule(request: httpx.Request) -> tuple[int, Any] | None:
            nonlocal lost
            if not (is_paid(request) and 5 <= now() < 65):
                return None
            lost += 1
            return 502, b"<html>bad gateway"

        w.wire.tamper = answering(rule)
        outcomes = await w.client.run_many(images(400))
        counts = Counter(str(outcome.status) for outcome in outcomes)
        assert lost < 20
        assert counts["unknown"] < lost
        assert counts["completed"] == 400 - counts["unknown"] == len(w.book)


async def test_an_outage_in_which_every_post_was_taken_costs_no_request_its_outcome(api_key: str) -> None:
    async with world(api_key, {"rate_limit": "10/s"}) as w:

        async def tamper(request: httpx.Request, go_on: Handler) -> httpx.Response:
            answer = await go_on(request)
            return response(504, b"<html>too late") if is_paid(request) and 5 <= now() < 65 else answer

        w.wire.tamper = tamper
        outcomes = await w.client.run_many(images(400))
        assert Counter(str(outcome.status) for outcome in outcomes) == {"completed": 400}
        assert len(w.book) == 400


# Nobody is reached


def cut_off(w: World) -> None:
    async def tamper(request: httpx.Request, go_on: Handler) -> httpx.Response:
        raise httpx.ConnectError("no route to host")

    w.wire.tamper = tamper


async def ended(pool: TaskPool) -> list[Outcome]:
    """The outcomes of a pool that ends because nobody is reached."""
    outcomes: list[Outcome] = []
    with pytest.raises(ConnectionFailedError, match="no route to host"):
        async with pool:
            outcomes += await drain(pool)
    return outcomes


def a_mixture() -> Iterable[ImageRequest]:
    models = ["gpt-4o-image", "z-image-turbo"]
    return (ImageRequest(model=models[number % 2], prompt="a lighthouse") for number in range(60))


@pytest.mark.parametrize("most", [2, 1000])
async def test_a_pool_that_reaches_nobody_ends_after_twenty_requests(api_key: str, most: int) -> None:
    async with world(api_key) as w:
        cut_off(w)
        outcomes = await ended(w.pool(a_mixture(), max_outstanding=most))
        assert now() < 120 + 20 * 31
    rejected = [outcome for outcome in outcomes if outcome.status == "rejected"]
    assert len(rejected) == 20
    assert all(isinstance(outcome.error, ConnectionFailedError) for outcome in rejected)
    unsent = [outcome for outcome in outcomes if outcome.status == "not_submitted"]
    assert len(rejected) + len(unsent) == len(outcomes)
    assert len(outcomes) == 60 or most == 2
    assert all(isinstance(outcome.error, NotSubmittedError) for outcome in unsent)
    assert {outcome.attempts for outcome in outcomes} == {0}


async def test_stop_after_rejections_counts_what_could_not_be_sent(api_key: str) -> None:
    async with world(api_key) as w:
        cut_off(w)
        outcomes = await ended(w.pool(images(30), stop_after_rejections=3))
        assert Counter(str(outcome.status) for outcome in outcomes) == {"rejected": 3, "not_submitted": 27}
        outcomes = await w.client.run_many(images(30), stop_after_rejections=None)
        assert Counter(str(outcome.status) for outcome in outcomes) == {"rejected": 30}


async def test_a_pool_whose_service_comes_back_in_time_goes_on(api_key: str) -> None:
    async with world(api_key) as w:
        cut_off(w)
        asyncio.get_running_loop().call_later(110, setattr, w.wire, "tamper", None)
        outcomes = await w.client.run_many(images(60))
        assert Counter(str(outcome.status) for outcome in outcomes) == {"completed": 60}


async def test_a_pool_without_sources_outlives_an_unreachable_service(api_key: str) -> None:
    async with world(api_key) as w:
        cut_off(w)
        async with w.pool() as pool:
            outcomes = await asyncio.gather(*(pool.run(image(number)) for number in range(25)))
            assert {str(outcome.status) for outcome in outcomes} == {"rejected"}
            assert pool.reason is None
            begun = now()
            await pool.run(image("late"))
            assert now() - begun >= 120  # the patience of its own
            w.wire.tamper = None
            assert (await pool.run(image("later"))).ok


# A laptop that sleeps


@pytest.mark.parametrize("durable", [False, True])
async def test_what_was_lost_before_hours_of_sleep_is_not_sent_again(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """While a machine is suspended, loop time stands still."""
    in_loop(monkeypatch)
    slept = 0.0
    monkeypatch.setattr(clock, "now", lambda: datetime(2026, 11, 20, tzinfo=UTC) + timedelta(seconds=now() + slept))
    async with world(api_key) as w:

        async def tamper(request: httpx.Request, go_on: Handler) -> httpx.Response:
            nonlocal slept
            answer = await go_on(request)
            if is_paid(request):
                slept = 8 * 3600.0
                raise httpx.ReadError("connection reset", request=request)
            return answer

        w.wire.tamper = tamper
        ledger = str(tmp_path / "job.db") if durable else None
        [outcome] = await w.client.run_many(images(1), ledger=ledger)
        assert outcome.status == "unknown"
        assert len(w.wire.posts) == len(w.book) == 1
