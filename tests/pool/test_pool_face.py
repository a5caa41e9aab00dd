"""Options, `stop`, `attach`, `notify`, the statistics, `on_progress` and `run_many`."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from pool_world import answering, drain, image, images, now, world
from support import Odd

from evolink_async import (
    AsyncEvoLink,
    ClosedError,
    ConfigurationError,
    ImageRequest,
    InvalidRequestError,
    PoolStats,
    QuotaExhaustedError,
    Task,
    TaskPool,
    clock,
)
from evolink_async.pool.options import PoolOptions

pytestmark = pytest.mark.looptime


@pytest.mark.parametrize(
    "options",
    [
        {"max_outstanding": 0},
        {"max_outstanding": -1},
        {"max_outstanding": 1.5},
        {"max_outstanding": True},
        {"max_outstanding": 10**7},
        {"task_timeout": 0},
        {"task_timeout": float("nan")},
        {"task_timeout": float("inf")},
        {"stop_after_rejections": 0},
        {"on_progress": 3},
        {"nonsense": 1},
        {"max_credits": -1},
        {"max_credits": "5"},
        {"max_credits": float("nan")},
        {"prices": 3},
        {"prices": {"gpt-4o-image": -1}},
        {"prices": {5: 1}},
        {"prices": {"": 1}},
        {"save_to": 3},
        {"save_to": "ftp://host/out"},
        {"retry_failed": -1},
        {"job": ""},
        {"job": " "},
        {"job": 5},
        {"job": "j" * 257},
        {"ledger": 5},
        {"ledger": ""},
        {"ledger": ":memory:"},
        {"ledger": "mysql://host/job"},
        {"ledger": "postgresql://host:port/job"},
        {"callbacks": Odd()},
    ],
)
async def test_wrong_options_are_refused_at_the_call(api_key: str, options: dict[str, Any]) -> None:
    async with world(api_key) as w:
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            w.pool([], **options)
        with pytest.raises(ConfigurationError):
            await w.client.run_many([], **options)


async def test_options_at_their_defaults_are_accepted_and_on_progress_must_be_plain(api_key: str) -> None:
    async def coroutine(stats: PoolStats) -> None: ...

    async with world(api_key) as w:
        w.pool([], ledger=None, job="default", max_credits=None, save_to=None, retry_failed=0, task_timeout=None)
        with pytest.raises(ConfigurationError, match="plain function"):
            w.pool([], on_progress=coroutine)
        with pytest.raises(ConfigurationError, match="enter"):
            await drain(w.pool([]))


def test_add_attach_stop_and_notify_are_plain_functions() -> None:
    from evolink_async import TaskPool

    assert not any(inspect.iscoroutinefunction(getattr(TaskPool, name)) for name in ("add", "attach", "stop", "notify"))


async def test_stop_submits_nothing_more_and_finishes_what_is_outstanding(api_key: str) -> None:
    closed = []

    def source() -> Iterator[ImageRequest]:
        try:
            yield from images(1000)
        finally:
            closed.append(1)

    async with world(api_key) as w:
        async with w.pool(source(), max_outstanding=40) as pool:
            await asyncio.sleep(1)
            pool.stop()
            posts = len(w.wire.posts)
            assert closed
            outcomes = await drain(pool)
            pool.stop()
        assert len(w.wire.posts) == posts
        assert sum(outcome.ok for outcome in outcomes) == len(w.book) == posts
        refused = [outcome for outcome in outcomes if not outcome.ok]
        assert {str(outcome.status) for outcome in refused} == {"not_submitted"}
        assert isinstance(refused[0].error.__cause__, ClosedError)  # type: ignore[union-attr]
        assert sorted(outcome.index for outcome in outcomes) == list(range(len(outcomes)))  # type: ignore[type-var]
        assert pool.reason is None
        assert pool.leftovers == []


@pytest.mark.parametrize("count", [1, 150])
async def test_stop_before_entering_gives_single_requests_back(api_key: str, count: int) -> None:
    async with world(api_key) as w:
        pool = w.pool()
        for number in range(count):
            pool.add(image(number))
        pool.stop()
        async with pool:
            outcomes = await drain(pool)
    assert [outcome.status for outcome in outcomes] == ["not_submitted"] * count


async def test_attached_tasks_are_followed_and_unknown_ids_are_lost_after_a_minute(api_key: str) -> None:
    async with world(api_key) as w:
        ids = [(await w.client.submit(image(number))).id for number in range(3)]
        pool = w.pool()
        pool.attach([*ids, ids[0], "task-unified-1-nobody"])
        async with pool:
            pool.attach(ids[1])
            assert set(pool.outstanding) == {*ids, "task-unified-1-nobody"}
            assert pool.stats.total == 4
            outcomes = {outcome.key: outcome async for outcome in pool}
            assert set(outcomes) == {*ids, "task-unified-1-nobody"}
            assert 60 <= now() < 200
            for task_id in ids:
                outcome = outcomes[task_id]
                assert outcome.ok
                assert outcome.index is None
                assert outcome.request is None
                assert outcome.identity == task_id
                assert outcome.attempts == 0
                assert outcome.submitted_at is None
                assert outcome.idempotency_key is None
            assert outcomes["task-unified-1-nobody"].status == "lost"
            pool.attach(ids[0])  # it may be asked for again
            assert [outcome.key async for outcome in pool] == [ids[0]]
    assert len(w.book) == 3


async def test_attached_tasks_that_still_run_are_leftovers(api_key: str) -> None:
    async with world(api_key) as w:
        task = await w.client.submit(image())
        async with w.pool() as pool:
            pool.attach(task.id)
            await asyncio.sleep(2)
        (left,) = pool.leftovers
        assert left.status == "unfinished"
        assert left.key == task.id


@pytest.mark.parametrize("ids", ["no id", "../x", ["ok", 3], None, 7, [None], ".."])
async def test_what_is_no_id_is_not_attached(api_key: str, ids: Any) -> None:
    async with world(api_key) as w, w.pool() as pool:
        with pytest.raises(InvalidRequestError, match="task id"):
            pool.attach(ids)
        assert pool.outstanding == ()
        assert await drain(pool) == []


async def test_outstanding_is_live(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(3)) as pool:
        assert pool.outstanding == ()
        await asyncio.sleep(3)
        assert set(pool.outstanding) == {post["task_id"] for post in w.book}
        async for outcome in pool:
            assert outcome.unwrap().id not in pool.outstanding
        assert pool.outstanding == ()


async def test_notify_hastens_a_look_and_is_never_believed(api_key: str) -> None:
    async with world(api_key) as w:
        async with w.pool(images(1)) as pool:
            await asyncio.sleep(1)
            (task_id,) = pool.outstanding
            before = len(w.wire.reads)
            for hint in (task_id, {"id": task_id, "status": "completed"}, {"id": None}, {}, "task-1-x", 3, None):
                pool.notify(hint)  # type: ignore[arg-type]
            await asyncio.sleep(0.5)
            assert len(w.wire.reads) == before + 1
            assert pool.outstanding == (task_id,)
            bodies = [f'{{"id": "{task_id}"}}', f'{{"id": "{task_id}"}}'.encode(), Task(id=task_id), {"id": task_id}]
            for seconds, hint in enumerate(bodies, 2):
                await asyncio.sleep(1)
                pool.notify(hint)  # type: ignore[arg-type]
                await asyncio.sleep(0.5)
                assert len(w.wire.reads) == before + seconds
            for hint in (b"\xff", b"[]", "[" * 100_000, '{"id": 5}', b"", "a b"):
                pool.notify(hint)
            (outcome,) = await drain(pool)
            assert outcome.ok
        pool.notify(task_id)


async def test_the_statistics_agree_with_the_wire_and_the_book(api_key: str) -> None:
    async with world(api_key, {"validate": False}, failure_share=0.3, seed=2, rate=2, burst=3) as w:
        requests = [*images(40), image(n=-1), None]
        pool = w.pool(requests, max_outstanding=15)  # type: ignore[arg-type]
        before = pool.stats
        assert (before.total, before.pulled, before.finished, before.eta) == (42, 0, 0, None)
        async with pool:
            outcomes = []
            async for outcome in pool:
                outcomes.append(outcome)
                stats = pool.stats
                assert stats.total == 42
                assert stats.finished + stats.waiting + stats.outstanding == stats.pulled <= 42
                assert stats.outstanding <= 15
                assert stats.eta is None or stats.eta >= 0
            assert stats.eta == 0
        stats = pool.stats
        book = w.emulator.book()
        assert stats.posts == len(w.wire.posts)
        assert stats.rate_limited == sum(book["refused"].get("429", {}).values()) > 0
        assert stats.status_requests == len(w.wire.reads)
        assert stats.polls > 0
        assert float(stats.credits_spent) == pytest.approx(book["account"]["spent"])
        assert stats.credits_reserved == 0
        assert stats.completed == sum(outcome.ok for outcome in outcomes)
        assert stats.failed == sum(outcome.status == "failed" for outcome in outcomes) > 0
        assert stats.counts["rejected"] == 2
        assert stats.finished == 42
        assert stats.rate is not None
        elapsed = stats.elapsed
        await asyncio.sleep(10)
        assert pool.stats.elapsed == elapsed
        assert pool.stats is not stats or pool.stats == stats


async def test_the_total_is_unknown_until_a_generator_is_read(api_key: str) -> None:
    async with world(api_key) as w, w.pool(iter(images(12)), max_outstanding=5) as pool:
        assert pool.stats.total is None
        await anext(pool)  # type: ignore[arg-type]
        running = asyncio.create_task(pool.run(image()))
        await drain(pool)
        await running
        assert pool.stats.total == pool.stats.finished == 13


async def test_the_estimate_of_the_rest_is_of_the_right_size(api_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Outcomes are dated by the wall clock, which stands still while virtual time passes.
    monkeypatch.setattr(clock, "now", lambda: datetime.fromtimestamp(now(), UTC))
    async with world(api_key) as w:
        async with w.pool(images(400), max_outstanding=20) as pool:
            guess = None
            async for _ in pool:
                if guess is None and pool.stats.finished >= 200:
                    eta = pool.stats.eta
                    assert eta is not None
                    guess = now() + eta
        assert guess is not None
        assert guess == pytest.approx(now(), rel=0.3)


async def test_on_progress_is_called_at_most_once_a_second_and_at_the_end(api_key: str) -> None:
    calls: list[tuple[float, PoolStats]] = []
    async with world(api_key) as w:  # noqa: SIM117
        async with w.pool(images(300), on_progress=lambda stats: calls.append((now(), stats))) as pool:
            await drain(pool)
    gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(calls)]
    assert all(gap >= 0.999 for gap in gaps[:-1])
    assert len(calls) > 20
    assert calls[-1][1].finished == 300
    assert calls[-1][1].completed == 300


def test_a_pool_that_is_stopped_before_its_block_tells_no_progress(api_key: str) -> None:
    calls: list[PoolStats] = []
    pool = AsyncEvoLink(api_key, base_url="http://127.0.0.1:1").pool(images(1)[0], on_progress=calls.append)
    pool.stop()  # and there is no event loop that could tell it later
    assert pool.reason is None
    assert not calls


async def test_on_progress_that_raises_is_logged_and_the_pool_goes_on(
    api_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(stats: PoolStats) -> None:
        raise ValueError("mine")

    async with world(api_key) as w, w.pool(images(5), on_progress=broken) as pool:
        assert all(outcome.ok for outcome in await drain(pool))
    assert "on_progress raised" in caplog.text


@pytest.mark.parametrize("count", [99, 100, 250])
async def test_without_a_ledger_the_pool_warns_once_at_its_100th_request(
    api_key: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(api_key) as w, w.pool(images(count - 1)) as pool:
        await pool.run(image())
        await drain(pool)
    lines = [line for line in caplog.records if line.levelno >= logging.WARNING and "ledger" in line.message]
    assert len(lines) == (count >= 100)


async def test_run_many_gives_outcomes_in_order_and_errors_as_values(api_key: str) -> None:
    async with world(api_key, failure_share=0.4, seed=5) as w:
        requests: list[Any] = [*images(20), ImageRequest(model="seedance-2.0", prompt="x"), "text"]
        outcomes = await w.client.run_many(iter(requests), max_outstanding=7)
    assert [outcome.index for outcome in outcomes] == list(range(22))
    assert [outcome.key for outcome in outcomes[:20]] == [f"k{number}" for number in range(20)]
    assert {str(outcome.status) for outcome in outcomes} == {"completed", "failed", "rejected"}


async def test_run_many_raises_the_reason_with_the_outcomes(api_key: str) -> None:
    async with world(api_key) as w:
        w.wire.tamper = answering(
            lambda request: (402, {}) if request.method == "POST" and len(w.wire.posts) > 5 else None
        )
        with pytest.raises(QuotaExhaustedError) as caught:
            await w.client.run_many(images(30), max_outstanding=8)
        outcomes = caught.value.outcomes
        assert [outcome.index for outcome in outcomes] == list(range(len(outcomes)))
        assert sum(outcome.ok for outcome in outcomes) == len(w.book) == 5


async def test_the_repr_says_how_it_stands(api_key: str) -> None:
    async with world(api_key) as w:
        pool = w.pool(images(3))
        assert repr(pool).startswith("<TaskPool not entered: 0 waiting")
        async with pool:
            assert "open" in repr(pool)
            await drain(pool)
            pool.stop()
            assert "stopped" in repr(pool)
        assert repr(pool) == "<TaskPool left: 0 waiting, 0 outstanding, 0 untaken, 3 finished>"


async def test_the_reason_is_raised_once_however_often_the_block_is_left(api_key: str) -> None:
    def broken() -> Iterator[ImageRequest]:
        yield image()
        raise LookupError("mine")

    async with world(api_key) as w:
        pool = w.pool(broken())
        with pytest.raises(LookupError):
            async with pool:
                await drain(pool)
        await pool.__aexit__(None, None, None)
        assert isinstance(pool.reason, LookupError)


async def test_a_pool_that_is_entered_twice_sends_nothing_twice(api_key: str) -> None:
    async with world(api_key) as w:
        pool = w.pool(images(3))
        async with pool:
            await asyncio.sleep(1)
            with pytest.raises(ClosedError, match="a pool is used once"):
                await pool.__aenter__()
            assert [outcome.ok for outcome in await drain(pool)] == [True] * 3
        with pytest.raises(ClosedError, match="a pool is used once"):
            async with pool:
                pass
        assert len(w.book) == len(w.wire.posts) == 3


async def test_from_another_thread_a_pool_is_refused_and_goes_on(api_key: str) -> None:
    async with world(api_key) as w, w.pool(images(2)) as pool:

        async def elsewhere() -> None:
            with pytest.raises(ConfigurationError, match="another thread"):
                await pool.run(image())
            with pytest.raises(ConfigurationError, match="another thread"):
                await anext(pool)

        def without_a_loop() -> None:
            with pytest.raises(ConfigurationError, match="another thread"):
                pool.add(image())
            for call in (pool.stop, partial(pool.notify, "task-unified-1-abcdefgh")):
                with pytest.raises(ConfigurationError, match="another thread"):
                    call()
            asyncio.run(elsewhere())

        thread = threading.Thread(target=without_a_loop)
        thread.start()
        thread.join()
        assert [outcome.ok for outcome in await drain(pool)] == [True, True]


def test_what_is_no_option_is_told_with_those_that_there_are(api_key: str) -> None:
    with pytest.raises(ConfigurationError, match="no option 'ledgers'; it has max_outstanding, ledger, job"):
        AsyncEvoLink(api_key).pool(ledgers="job.db")  # type: ignore[call-arg]


def test_the_options_that_type_checkers_know_are_those_of_the_pool() -> None:
    parameters = inspect.signature(TaskPool).parameters
    keywords = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert list(PoolOptions.__annotations__) == keywords
    hints = {name: parameter.annotation for name, parameter in parameters.items() if name in keywords}
    assert {name: hint.__forward_arg__ for name, hint in PoolOptions.__annotations__.items()} == hints
