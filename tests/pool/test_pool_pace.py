"""Several models in one pool, and what a pool learns of the limits of each, on virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from pool_world import Handler, World, drain, now, response, turns, world

from evolink_async import AsyncEvoLink, ImageRequest, Outcome
from evolink_async.pool import TaskPool

pytestmark = pytest.mark.looptime

COOLING, OTHER = "z-image-turbo", "gpt-4o-image"
PAUSE = 60.0
QUICK = {"image": {"estimate": 5.0, "sigma": 0.1}}


def request(model: str, number: int) -> ImageRequest:
    return ImageRequest(model=model, prompt=f"picture {number}", key=f"{model} {number}")


def requests(model: str, count: int) -> list[ImageRequest]:
    return [request(model, number) for number in range(count)]


async def some_requests(model: str, count: int) -> AsyncIterator[ImageRequest]:
    for number in range(count):
        yield request(model, number)


def model_of(sent: httpx.Request) -> str:
    return str(json.loads(sent.content)["model"])


def cool(w: World) -> list[float]:
    """One model asks for a pause whenever it is asked before the end of it; the list gets the times it was asked."""
    asked: list[float] = []

    async def tamper(sent: httpx.Request, go_on: Handler) -> httpx.Response:
        await asyncio.sleep(0.1)
        if sent.method == "POST" and model_of(sent) == COOLING:
            asked.append(now())
            left = PAUSE - now()
            if left > 0:
                return response(429, {"error": {"message": "slow down"}}, **{"retry-after": f"{left:.3f}"})
        return await go_on(sent)

    w.wire.tamper = tamper
    return asked


async def finished_before_the_pause(pool: TaskPool, model: str) -> list[Outcome]:
    """The outcomes of this model that were there before the pause was over; the pool is stopped then."""
    found = []
    async for outcome in pool:
        if now() >= PAUSE:
            pool.stop()
        elif outcome.request is not None and outcome.request.model == model:
            found.append(outcome)
    return found


async def watch_places(pool: TaskPool, most: int, model: str = COOLING) -> None:
    """Fails when the queue of a model holds more places than `most`."""
    while True:
        places = sum(record.state == "sending" and record.model == model for record in pool._engine.stages)
        assert places <= most, places
        assert pool._engine.stages.places <= pool._engine._most
        await asyncio.sleep(0.25)


@pytest.mark.parametrize("places", [4, 40, 1000])
@pytest.mark.parametrize("source", [requests, some_requests], ids=["iterable", "async-iterable"])
async def test_a_model_in_a_cool_down_does_not_slow_down_another(api_key: str, places: int, source: Any) -> None:
    count = 3 * places if places < 1000 else 500

    async def seconds(with_cooling: bool) -> float:
        async with world(api_key, models=QUICK) as w:
            cool(w)
            w.client._core.memory.rates.update({OTHER: 20.0, COOLING: 20.0})
            async with w.pool(max_outstanding=places) as pool:
                if with_cooling:
                    pool.add(source(COOLING, 3000))
                pool.add(requests(OTHER, count))
                watcher = asyncio.create_task(watch_places(pool, places // 2))
                start = now()
                done = 0
                async for outcome in pool:
                    done += outcome.ok and outcome.request is not None and outcome.request.model == OTHER
                    if done == count:
                        break
                assert not watcher.done()
                watcher.cancel()
                return now() - start

    alone, beside = await seconds(False), await seconds(True)
    print(f"{alone:.2f} s alone, {beside:.2f} s beside a model that waits")
    assert beside < PAUSE
    # Half of the places are left: enough where the rate is what holds it back, else it takes twice as long.
    assert beside <= alone * (1.05 if places == 1000 else 2.1) + 1


async def test_what_stands_behind_a_waiting_model_in_the_same_source_goes_on_for_half_of_the_places(
    api_key: str,
) -> None:
    def mixed() -> Iterator[ImageRequest]:
        for number in range(1000):
            yield request(COOLING, number)
            yield request(OTHER, number)

    async with world(api_key, models=QUICK) as w:
        asked = cool(w)
        async with w.pool(mixed(), max_outstanding=100) as pool:
            found = await finished_before_the_pause(pool, OTHER)
    assert len(found) >= 49
    early = [at for at in asked if at < PAUSE]
    assert max(early) < 1.0  # nobody asks during the cool-down


async def test_what_was_refused_for_pace_goes_first_when_its_pause_is_over(api_key: str) -> None:
    async with world(api_key, {"rate_limit": "1/s"}) as w:

        async def tamper(request: httpx.Request, go_on: Handler) -> httpx.Response:
            if len(w.wire.posts) <= 3 and request.url.path.endswith("/generations"):
                return response(429, {"error": {"message": "slow down"}}, **{"retry-after": "5"})
            return await go_on(request)

        w.wire.tamper = tamper
        outcomes = await w.client.run_many(requests(OTHER, 5))
    assert all(outcome.ok for outcome in outcomes)
    keys = [post.key for post in w.wire.posts]
    assert keys[:4] == [outcomes[0].idempotency_key] * 4
    assert keys[3:] == [outcome.idempotency_key for outcome in outcomes]


async def test_single_requests_of_a_waiting_model_are_not_read_on_either(api_key: str) -> None:
    async with world(api_key, models=QUICK) as w:
        cool(w)
        async with w.pool(max_outstanding=20) as pool:
            for number in range(500):
                pool.add(request(COOLING, number))
            pool.add(requests(OTHER, 70))
            found = await finished_before_the_pause(pool, OTHER)
    assert len(found) == 70


async def test_requests_refused_in_one_volley_hold_half_of_the_places(api_key: str) -> None:
    async with world(api_key, models=QUICK) as w:
        asked = cool(w)
        async with w.pool(requests(COOLING, 10), max_outstanding=10) as pool:
            await asyncio.sleep(1)
            assert len(asked) == 5
            pool.add(requests(OTHER, 30))
            seen: dict[str, float] = {}
            async for outcome in pool:
                assert outcome.ok
                seen[str(outcome.key)] = now()
    assert max(at for key, at in seen.items() if key.startswith(OTHER)) < PAUSE
    assert min(at for key, at in seen.items() if key.startswith(COOLING)) >= PAUSE
    assert len(asked) == 15


async def test_runs_of_a_waiting_model_leave_half_of_the_places_to_runs_of_others(api_key: str) -> None:
    async with world(api_key, models=QUICK) as w:
        cool(w)
        async with w.pool(max_outstanding=10) as pool:
            waiting = [asyncio.create_task(pool.run(request(COOLING, number))) for number in range(50)]
            await asyncio.sleep(1)
            others = await asyncio.gather(*(pool.run(request(OTHER, number)) for number in range(20)))
            assert all(outcome.ok for outcome in others)
            assert now() < PAUSE
            late = await asyncio.gather(*waiting)
            assert all(outcome.ok for outcome in late)
    assert len(w.book) == 70


async def test_a_pool_that_ends_returns_what_waits_of_every_model(api_key: str) -> None:
    closed = []

    def generator(model: str) -> Iterator[ImageRequest]:
        try:
            yield from requests(model, 1000)
        finally:
            closed.append(model)

    async with world(api_key, models=QUICK) as w:
        cool(w)
        async with w.pool(generator(COOLING), max_outstanding=20) as pool:
            pool.add(generator(OTHER))
            await asyncio.sleep(30)
            pool.stop()
            assert sorted(closed) == sorted([COOLING, OTHER])
            outcomes = await drain(pool)
            stats = pool.stats
    assert stats.waiting == stats.outstanding == 0
    assert stats.pulled == len(outcomes)
    assert [outcome.index for outcome in sorted(outcomes, key=lambda o: o.index or 0)] == list(range(len(outcomes)))
    assert not any(line.sending for line in pool._engine.stages._lines.values())


# -- Places at the service ------------------------------------------------------------------------------


def limited(model: str = OTHER, **limits: Any) -> dict[str, Any]:
    return {model: {"estimate": 30.0, "sigma": 0.25, "bias": 1.0, **limits}}


async def refused_share_and_slowness(w: World, count: int, bound: float) -> tuple[float, float]:
    start = now()
    async with w.pool(requests(OTHER, count)) as pool:
        outcomes = await drain(pool)
    assert all(outcome.ok for outcome in outcomes)
    refused = sum(post.status == 429 for post in w.wire.posts)
    share, slowness = refused / len(w.wire.posts), (now() - start) / bound
    print(f"{refused} refused, {share:.2%}; {slowness:.3f} times the bound; cap {w.client._core.memory.caps}")
    return share, slowness


@pytest.mark.parametrize("hint", ["seconds", None])
async def test_the_number_of_tasks_that_may_run_is_learned_with_few_refusals(api_key: str, hint: Any) -> None:
    places, count = 20, 1000
    async with world(api_key, models=limited(concurrency=places), retry_after=hint) as w:
        share, slowness = await refused_share_and_slowness(w, count, (count / places + 1) * 30)
        cap = w.client._core.memory.caps[OTHER]
    assert share < 0.03
    assert slowness < 1.25
    assert 0.8 * places <= cap <= 1.25 * places


@pytest.mark.parametrize("hint", ["seconds", None])
async def test_where_only_one_task_may_run_the_next_is_sent_when_it_has_ended(api_key: str, hint: Any) -> None:
    count = 60
    async with world(api_key, models=limited(concurrency=1), retry_after=hint) as w:
        _, slowness = await refused_share_and_slowness(w, count, (count + 1) * 31)
        assert w.client._core.memory.caps[OTHER] <= 2
    assert slowness < 1.15


async def test_more_than_one_task_are_sent_soon_after_that_is_allowed(api_key: str) -> None:
    lifted = asyncio.Event()

    async def tamper(sent: httpx.Request, go_on: Handler) -> httpx.Response:
        if sent.method == "POST" and not lifted.is_set() and w.wire.running:
            return response(429, {"error": {"message": "one at a time"}}, **{"retry-after": "1"})
        return await go_on(sent)

    async with world(api_key, models=limited(concurrency=50)) as w:
        w.wire.tamper = tamper
        async with w.pool(requests(OTHER, 1000)) as pool:
            async for outcome in pool:
                assert outcome.ok
                if outcome.index == 60:
                    lifted.set()
                    start = now()
        print(f"{now() - start:.0f} s for the others")
        assert now() - start < 3600


async def test_a_limit_on_running_tasks_and_one_on_the_rate_are_learned_together(api_key: str) -> None:
    places, rate, count = 100, 5.0, 1500
    async with world(api_key, models=limited(concurrency=places, rate=rate)) as w:
        share, slowness = await refused_share_and_slowness(w, count, count / (places / 30) + 30)
    assert share < 0.03
    assert slowness < 1.25


async def test_a_limit_on_the_rate_is_not_taken_for_one_on_running_tasks(api_key: str) -> None:
    rate, count = 2.0, 600
    async with world(api_key, models=limited(rate=rate)) as w:
        share, slowness = await refused_share_and_slowness(w, count, count / rate + 30)
        assert w.client._core.memory.caps == {}
    assert share < 0.04
    assert slowness < 1.15


async def test_learned_places_outlive_the_loop(api_key: str) -> None:
    client = AsyncEvoLink(api_key, base_url="http://127.0.0.1")
    client._core.memory.caps[OTHER] = 7
    session = client._core.open()
    assert session.pace._lane(OTHER, now()).pace.cap == 7
    await client.aclose()


async def test_tasks_that_nobody_waits_for_do_not_hold_a_place_for_ever(api_key: str) -> None:
    async with world(api_key, models=limited(concurrency=5)) as w:
        w.client._core.memory.caps[OTHER] = 5
        for number in range(5):
            await w.client.submit(request(OTHER, number))
        pace = w.client._core.open().pace._lane(OTHER, now()).pace
        assert pace.running == 5
        start = now()
        task = await w.client.submit(request(OTHER, 5), timeout=600)
        assert not task.is_terminal
        assert now() - start < 4 * 30
        assert len(w.book) == 6


async def test_a_task_that_was_waited_for_frees_its_place(api_key: str) -> None:
    async with world(api_key, models=limited(concurrency=5)) as w:
        w.client._core.memory.caps[OTHER] = 5
        await asyncio.gather(*(w.client.run(request(OTHER, number)) for number in range(30)))
        await turns()
        assert w.client._core.open().pace._lane(OTHER, now()).pace.running == 0
    assert all(post.status == 200 for post in w.wire.posts)
