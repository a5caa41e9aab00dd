"""Where requests come from: every kind of source, in turn, lazily, and closed when the pool ends early."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from pool_world import MODEL, Canned, drain, image, images, now, turns, world
from tqdm import tqdm

from evolink_async import (
    AsyncEvoLink,
    EvoLinkError,
    ImageRequest,
    InvalidRequestError,
    NotSubmittedError,
    VideoRequest,
)
from evolink_async.ledger import counts

pytestmark = pytest.mark.looptime


def prompts(outcomes: list[Any]) -> list[str]:
    return [outcome.request.prompt for outcome in sorted(outcomes, key=lambda outcome: outcome.index)]


async def test_a_list_comes_back_whole(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(30)) as pool:
        outcomes = await drain(pool)
    assert {outcome.key for outcome in outcomes} == {f"k{number}" for number in range(30)}
    assert sorted(outcome.index for outcome in outcomes) == list(range(30))  # type: ignore[type-var]
    assert all(outcome.ok for outcome in outcomes)


async def test_a_generator_an_async_generator_and_a_single_request_are_sources(api_key: str) -> None:
    async def asynchronous() -> AsyncIterator[ImageRequest]:
        for number in range(5):
            await asyncio.sleep(3)
            yield image(f"async {number}")

    async with world(api_key) as w, w.pool(image(f"sync {number}") for number in range(5)) as pool:
        pool.add(asynchronous())
        pool.add(image("single"))
        outcomes = await drain(pool)
    assert len(outcomes) == 11
    assert all(outcome.ok for outcome in outcomes)


async def test_no_requests_at_all_are_an_empty_iteration(api_key: str) -> None:
    async with world(api_key) as w:
        nothing: Any
        for nothing in ([], iter(()), None):
            async with w.pool(nothing) as pool:
                assert await drain(pool) == []
        assert await w.client.run_many([]) == []
    assert w.wire.posts == []


async def test_iterables_take_turns_the_async_ones_too(api_key: str) -> None:
    async def third() -> AsyncIterator[ImageRequest]:
        for number in range(4):
            yield image(f"c{number}")

    async with world(api_key) as w, w.pool(max_outstanding=1) as pool:
        pool.add([image(f"a{number}") for number in range(4)])
        pool.add(image(f"b{number}") for number in range(4))
        pool.add(third())
        outcomes = await drain(pool)
    expected = [f"picture {name}{number}" for number in range(4) for name in "abc"]
    assert prompts(outcomes) == expected


async def test_single_requests_go_before_iterables(api_key: str) -> None:
    async def endless() -> AsyncIterator[ImageRequest]:
        while True:
            yield image("async")

    async with world(api_key) as w, w.pool(iter(lambda: image("sync"), None), max_outstanding=1) as pool:
        pool.add(endless())
        seen = []
        async for outcome in pool:
            seen.append(outcome.request.prompt)  # type: ignore[union-attr]
            if len(seen) == 3:
                pool.add(image("now"))
            if len(seen) == 6:
                break
    assert "picture now" in seen[3:5], seen  # one may have been pulled already


async def test_a_source_that_cannot_tell_its_length_is_read_all_the_same(api_key: str) -> None:
    class Unsized:
        def __len__(self) -> int:
            raise NotImplementedError

        def __iter__(self) -> Iterator[ImageRequest]:
            return iter(images(3))

    async with world(api_key) as w:
        for source in (tqdm((request for request in images(3)), disable=True), Unsized()):
            async with w.pool(source) as pool:
                assert pool.stats.total is None
                assert len(await drain(pool)) == pool.stats.total == 3


async def test_a_source_is_read_only_as_far_as_there_is_room(api_key: str) -> None:
    pulled = 0

    def source() -> Iterator[ImageRequest]:
        nonlocal pulled
        for number in range(10_000):
            pulled += 1
            yield image(number)

    async with world(api_key) as w:
        async with w.pool(source(), max_outstanding=7) as pool:
            await asyncio.sleep(500)  # nobody reads: outcomes count as well
            assert pulled == 7
            taken = 0
            async for _ in pool:
                taken += 1
                assert pulled <= taken + 7
                if taken == 40:
                    break
        assert pulled <= 47
    assert len(w.book) <= 47


async def test_many_items_of_a_generator_cost_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # The one thing that grows, up to a bound: the bodies that were seen lately.
    monkeypatch.setattr(counts, "_COUNTED", 100)

    async def peak(count: int) -> int:
        async with httpx.AsyncClient(transport=Canned()) as http_client:  # noqa: SIM117
            async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client) as client:
                client._core.memory.rates[MODEL] = 1e9
                async with client.pool((image(number) for number in range(count)), max_outstanding=50) as pool:
                    tracemalloc.reset_peak()
                    done = 0
                    async for outcome in pool:
                        done += outcome.ok
                    assert done == count
                    return tracemalloc.get_traced_memory()[1]

    logging.disable(logging.CRITICAL)  # pytest keeps every line
    tracemalloc.start()
    try:
        await peak(100)
        small, large = await peak(300), await peak(2_000)
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    # pydantic remembers up to 16,384 strings of JSON: here an id and a link of each task, some 170 bytes. An outcome
    # has 3,000.
    assert large - small < 1_700 * 300, (small, large)


async def test_a_chain_adds_a_video_for_every_picture(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(5)) as pool:
        kinds = []
        async for outcome in pool:
            kinds.append(outcome.unwrap().kind)
            if isinstance(outcome.request, ImageRequest):
                pool.add(
                    VideoRequest(
                        model="seedance-2.0-image-to-video",
                        prompt="it moves",
                        image_urls=[outcome.urls[0]],  # type: ignore[call-arg]
                    )
                )
    assert sorted(kinds) == ["image"] * 5 + ["video"] * 5  # type: ignore[type-var]


async def test_after_the_end_more_can_be_added_and_iterated(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(3)) as pool:
        assert len(await drain(pool)) == 3
        assert await drain(pool) == []
        pool.add(images(2, start=3))
        assert len(await drain(pool)) == 2


async def test_a_live_producer_keeps_the_loop_open(api_key: str) -> None:
    queue: asyncio.Queue[ImageRequest | None] = asyncio.Queue()

    async def live() -> AsyncIterator[ImageRequest]:
        while (request := await queue.get()) is not None:
            yield request

    async with world(api_key) as w, w.pool(live()) as pool:
        reading = asyncio.create_task(drain(pool))
        for number in range(3):
            queue.put_nowait(image(number))
            await asyncio.sleep(1000)
            assert not reading.done()
        queue.put_nowait(None)
        assert len(await reading) == 3


async def test_a_source_that_has_nothing_to_give_stops_no_other(api_key: str) -> None:
    async def stuck() -> AsyncIterator[ImageRequest]:
        await asyncio.sleep(5000)
        yield image("late")

    async with world(api_key) as w, w.pool(max_outstanding=2) as pool:
        pool.add(stuck())
        pool.add(images(20))
        count = 0
        async for _ in pool:
            count += 1
            if count == 20:
                assert now() < 4000
    assert count == 21


async def test_an_exception_in_an_iterable_is_the_reason_and_the_others_are_closed(api_key: str) -> None:
    ended: list[str] = []

    def broken() -> Iterator[ImageRequest]:
        yield from images(5)
        raise ValueError("row 6 is broken")

    def fine() -> Iterator[ImageRequest]:
        try:
            while True:
                yield image("fine")
        finally:
            ended.append("sync")

    async def fine_too() -> AsyncIterator[ImageRequest]:
        try:
            while True:
                yield image("fine too")
        finally:
            await asyncio.sleep(1)
            ended.append("async")

    async with world(api_key) as w:
        outcomes = []
        with pytest.raises(ValueError, match="row 6"):  # noqa: PT012
            async with w.pool(broken()) as pool:
                pool.add(fine())
                pool.add(fine_too())
                async for outcome in pool:
                    outcomes.append(outcome)
                assert isinstance(pool.reason, ValueError)
        assert sorted(ended) == ["async", "sync"]
        assert len(w.book) == sum(outcome.ok for outcome in outcomes)
        refused = [outcome for outcome in outcomes if not outcome.ok]
        assert all(isinstance(outcome.error, NotSubmittedError) for outcome in refused)
        assert all(outcome.error.__cause__ is pool.reason for outcome in refused)  # type: ignore[union-attr]
        assert pool.stats.pulled == len(outcomes)


async def test_an_exception_in_an_async_iterable_is_the_reason(api_key: str) -> None:
    async def broken() -> AsyncIterator[ImageRequest]:
        yield image(1)
        await asyncio.sleep(100)
        raise KeyError("gone")

    async with world(api_key) as w:
        with pytest.raises(KeyError, match="gone"):
            async with w.pool(broken()) as pool:
                assert [outcome.ok for outcome in await drain(pool)] == [True]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_cancellation_from_inside_an_iterable_is_no_silent_end(api_key: str, asynchronous: bool) -> None:
    async def broken() -> AsyncIterator[ImageRequest]:
        yield image(1)
        raise asyncio.CancelledError

    def broken_too() -> Iterator[ImageRequest]:
        yield image(1)
        raise asyncio.CancelledError

    async with world(api_key) as w:
        with pytest.raises(EvoLinkError, match="cancelled from within"):
            async with w.pool(broken() if asynchronous else broken_too()) as pool:
                await drain(pool)


async def test_generators_are_closed_when_the_pool_is_left_early(api_key: str) -> None:
    ended: list[int | str] = []

    def sync() -> Iterator[ImageRequest]:
        try:
            while True:
                yield image()
        finally:
            ended.append("sync")

    async def waiting() -> AsyncIterator[ImageRequest]:
        try:
            await asyncio.sleep(1e6)
            yield image()
        finally:
            await asyncio.sleep(2)
            ended.append("waiting")

    async def between() -> AsyncIterator[ImageRequest]:
        try:
            while True:
                yield image()
        finally:
            await asyncio.sleep(2)
            ended.append("between")

    async with world(api_key) as w:
        async with w.pool(sync(), max_outstanding=5) as pool:
            pool.add(waiting())
            pool.add(between())
            async for _ in pool:
                break
        assert sorted(ended) == ["between", "sync", "waiting"]


async def test_a_clean_up_that_never_ends_holds_nobody_for_longer_than_five_seconds(api_key: str) -> None:
    stuck = asyncio.Event()

    async def source() -> AsyncIterator[ImageRequest]:
        try:
            while True:
                yield image()
        finally:
            await stuck.wait()

    async with world(api_key) as w:
        async with w.pool(source(), max_outstanding=2) as pool:
            async for _ in pool:
                break
            left_at = now()
        assert now() - left_at <= 5.1
        stuck.set()
        await turns()


async def test_a_source_that_swallows_its_cancellation_is_not_read_on(api_key: str) -> None:
    asked = 0

    class Stubborn:
        def __aiter__(self) -> Stubborn:
            return self

        async def __anext__(self) -> ImageRequest:
            nonlocal asked
            asked += 1
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                pass
            return image(asked)

    async with world(api_key) as w, w.pool(Stubborn()) as pool:
        await asyncio.sleep(10)
        pool.stop()
        outcomes = await drain(pool)
        await turns()
        outcomes += await drain(pool)
    assert asked == 1
    assert [str(outcome.status) for outcome in outcomes] in ([], ["not_submitted"])


async def test_an_iterable_that_stops_the_pool_from_inside_is_not_read_on_and_closed(api_key: str) -> None:
    ended: list[int | str] = []
    pulled = 0

    def source() -> Iterator[ImageRequest]:
        nonlocal pulled
        try:
            while True:
                pulled += 1
                if pulled == 5:
                    pool.stop()
                yield image(pulled)
        finally:
            ended.append(1)

    async with world(api_key) as w, w.pool(source()) as pool:
        outcomes = await drain(pool)
    assert pulled == 5
    assert len(outcomes) == 5
    assert ended == [1]


@pytest.mark.parametrize("item", [{"model": MODEL, "prompt": "x"}, "text", None, 7, ImageRequest])
async def test_a_wrong_item_is_a_rejected_outcome(api_key: str, item: Any) -> None:
    async with world(api_key) as w, w.pool([image(1), item, image(2)]) as pool:
        outcomes = sorted(await drain(pool), key=lambda outcome: outcome.index)  # type: ignore[arg-type, return-value]
    assert [str(outcome.status) for outcome in outcomes] == ["completed", "rejected", "completed"]
    assert isinstance(outcomes[1].error, InvalidRequestError)
    assert outcomes[1].request is None
    assert len({outcome.identity for outcome in outcomes}) == 3


def _endless() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    inner["again"] = inner
    return inner


class _Failing(ImageRequest):
    def body(self) -> dict[str, Any]:
        raise LookupError("no prompt in the caller's table")


@pytest.mark.parametrize(
    "item",
    [
        _Failing(model=MODEL),
        ImageRequest.model_construct(model=MODEL, option=_endless()),
        ImageRequest.model_construct(model=MODEL, option=_endless(), image_urls=[b"a local file"]),
        image(3, option=10**5000),
        ImageRequest.model_construct(prompt="no model"),
        ImageRequest.model_construct(model=["no name"], prompt="no model"),
    ],
    ids=["fails", "endless", "endless with a file", "digits", "no model", "a list for a model"],
)
@pytest.mark.parametrize("capped", [False, True])
async def test_a_request_that_cannot_be_made_sense_of_is_rejected_and_no_other_is_touched(
    api_key: str, item: ImageRequest, capped: bool
) -> None:
    async with world(api_key) as w:
        async with w.pool([image(1), item, image(2)], max_credits=100 if capped else None) as pool:
            outcomes = await asyncio.wait_for(drain(pool), 1000)
            awaited = await asyncio.wait_for(pool.run(item), 1000)
        assert pool.reason is None
        assert len(w.book) == 2
    assert {outcome.index: str(outcome.status) for outcome in [*outcomes, awaited]} == {
        0: "completed",
        1: "rejected",
        2: "completed",
        3: "rejected",
    }


@pytest.mark.parametrize("source", [{"model": MODEL}, "text", b"bytes", 7, object()])
async def test_what_is_no_source_is_refused_at_once(api_key: str, source: Any) -> None:
    async with world(api_key) as w:
        with pytest.raises(InvalidRequestError, match="a source is"):
            w.pool(source)
        async with w.pool() as pool:
            with pytest.raises(InvalidRequestError, match="a source is"):
                pool.add(source)
            assert await drain(pool) == []


async def test_equal_bodies_are_counted_and_keys_name_themselves(api_key: str) -> None:
    async with world(api_key) as w, w.pool([image(1), image(1), image(2), image(1, key="mine")]) as pool:
        outcomes = await drain(pool)
    names = [outcome.identity for outcome in sorted(outcomes, key=lambda outcome: outcome.index or 0)]
    assert names[0].endswith("-0")
    assert names[1] == names[0][:-1] + "1"
    assert names[2].endswith("-0")
    assert names[3] == "mine"


async def test_single_requests_come_back_when_the_pool_has_ended_early(api_key: str) -> None:
    def broken() -> Iterator[ImageRequest]:
        yield image(0)
        raise ValueError("broken")

    async with world(api_key) as w:
        with pytest.raises(ValueError, match="broken"):  # noqa: PT012
            async with w.pool(broken()) as pool:
                (first,) = await drain(pool)  # pulled, and not yet sent when the next item failed
                assert first.status == "not_submitted"
                pool.add(image("after the end"))
                pool.add(images(5))
                (outcome,) = await drain(pool)
                assert outcome.status == "not_submitted"
                assert outcome.error is not None
                assert outcome.error.__cause__ is pool.reason
        assert w.book == []
