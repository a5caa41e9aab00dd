"""The pool over real TCP: few tests, for what only sockets show."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from pool_world import drain, image, images

from evolink_async import AsyncEvoLink, AuthenticationError
from evolink_async.emulator import Emulator, Fault


async def test_many_requests_with_refusals_and_failures_agree_with_the_book(api_key: str) -> None:
    faults = [
        Fault(method="POST", path="/v1/images", status=429, probability=0.02, headers={"retry-after-ms": "20"}),
        Fault(method="POST", path="/v1/images", drop="after", nth=(17, 40, 90)),
        Fault(method="GET", path="/v1/tasks", drop="before", probability=0.02),
    ]
    emulator = Emulator(speed=100, seed=1, failure_share=0.05, faults=faults, api_key=api_key)
    async with emulator.serve() as server, AsyncEvoLink(base_url=server.base_url, rate_limit="500/s") as client:
        async with client.pool(images(200), max_outstanding=80) as pool:
            run = asyncio.create_task(pool.run(image("run")))
            outcomes = [*await drain(pool), await run]
        book = emulator.book()["posts"]
        assert len({outcome.index for outcome in outcomes}) == 201
        told = {outcome.task.id: str(outcome.status) for outcome in outcomes if outcome.task is not None}
        assert told == {post["task_id"]: post["status"] for post in book}
        assert len(book) == 201
        counts = Counter(str(outcome.status) for outcome in outcomes)
        assert set(counts) == {"completed", "failed"}
        assert pool.stats.posts == 201 + 3 + pool.stats.rate_limited


async def test_break_with_posts_on_the_wire_accounts_for_every_task(emulator: Any, client: AsyncEvoLink) -> None:
    taken = []
    async with client.pool((image(number) for number in range(100_000)), max_outstanding=60) as pool:
        async for outcome in pool:
            taken.append(outcome)
            if len(taken) == 10:
                break
    known = {outcome.task.id for outcome in [*taken, *pool.leftovers] if outcome.task is not None}
    assert known == {post["task_id"] for post in emulator.emulator.book()["posts"]}


async def test_a_wrong_key_ends_the_pool_after_one_round_trip(emulator: Any) -> None:
    async with AsyncEvoLink("sk-not-the-right-one", base_url=emulator.base_url, rate_limit="5/s") as client:
        with pytest.raises(AuthenticationError):
            async with client.pool(images(1000)) as pool:
                outcomes = await drain(pool)
        assert {str(outcome.status) for outcome in outcomes} == {"not_submitted"}
        assert sum(outcome.attempts for outcome in outcomes) <= 2
