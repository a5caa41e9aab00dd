"""A pool with a ledger: every run goes on where the last one ended, and nothing is paid for twice."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from loop_executor import in_loop
from pool_world import Handler, World, drain, image, images, now, turns, world
from postgres import Postgres, ask

from evolink_async import (
    AsyncEvoLink,
    BadRequestError,
    BudgetExceededError,
    InvalidRequestError,
    LedgerError,
    NotSubmittedError,
    Outcome,
    SubmitOutcomeUnknownError,
    TaskFailedError,
    clock,
    open_ledger,
)
from evolink_async.emulator import Fault
from evolink_async.ledger import store as store_module

pytestmark = pytest.mark.looptime

POSTS: dict[str, Any] = {"method": "POST", "path": "/v1/images"}


@pytest.fixture(autouse=True)
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)
    start = datetime(2026, 11, 20, 12, tzinfo=UTC)
    monkeypatch.setattr(clock, "now", lambda: start + timedelta(seconds=now()))


@pytest.fixture
def ledger(ledger_url: Path | str) -> Path | str:
    return ledger_url


@asynccontextmanager
async def restarted(w: World, api_key: str, **options: Any) -> AsyncIterator[AsyncEvoLink]:
    """The client of another process: it has learned nothing yet."""
    async with httpx.AsyncClient(transport=w.wire) as http_client:  # noqa: SIM117
        async with AsyncEvoLink(api_key, base_url="http://127.0.0.1", http_client=http_client, **options) as client:
            yield client


def by_key(outcomes: list[Outcome]) -> dict[str | None, Outcome]:
    assert len({outcome.identity for outcome in outcomes}) == len(outcomes)
    return {outcome.key: outcome for outcome in outcomes}


async def test_a_finished_job_run_again_posts_nothing_and_gives_the_same_outcomes(
    api_key: str, ledger: Path | str
) -> None:
    async with world(api_key, failure_share=0.3, seed=3) as w:
        async with w.pool([*images(20), *map(image, range(10))], ledger=ledger) as pool:
            first = await drain(pool)
        posts = len(w.wire.posts)
        async with (
            restarted(w, api_key) as client,
            client.pool([*images(20), *map(image, range(10))], ledger=ledger) as again,
        ):
            second = await drain(again)
    assert len(w.wire.posts) == posts == 30
    assert not any(outcome.from_ledger for outcome in first)
    assert all(outcome.from_ledger for outcome in second)
    before = {outcome.identity: outcome for outcome in first}
    for outcome in second:
        same = before[outcome.identity]
        for name in (
            "key",
            "request",
            "status",
            "task",
            "credits",
            "attempts",
            "idempotency_key",
            "submitted_at",
            "finished_at",
        ):
            assert getattr(outcome, name) == getattr(same, name), name
        assert type(outcome.error) is type(same.error)
        assert str(outcome.error) == str(same.error)


async def test_the_error_of_a_refused_or_lost_request_reads_the_same_when_it_comes_from_the_ledger(
    api_key: str, ledger: Path | str
) -> None:
    refused = Fault(**POSTS, nth=(1,), status=400, body={"error": {"code": "bad_size", "message": "no such size"}})
    forgotten = Fault(method="GET", path="/v1/tasks/", status=404)
    requests = [image(0, key="refused"), image(0, key="refused"), image(1, key="lost")]
    async with world(api_key, batch=False, faults=[refused, forgotten]) as w:
        async with w.pool(requests, ledger=ledger) as pool:
            *twice, lost = sorted(await drain(pool), key=lambda outcome: outcome.index)
        async with restarted(w, api_key) as client, client.pool(requests[2:], ledger=ledger) as again:
            (known,) = await drain(again)
    assert str(twice[0].error).startswith("bad_size: no such size")
    assert str(twice[0].error) == str(twice[1].error)
    assert known.from_ledger
    assert (known.status, str(known.error)) == ("lost", str(lost.error))


async def test_a_job_left_early_is_finished_by_the_next_run(api_key: str, ledger: Path | str) -> None:
    async with world(api_key) as w:
        async with w.pool(images(60), ledger=ledger, max_outstanding=20) as pool:
            taken = [await anext(pool) for _ in range(10)]  # type: ignore[arg-type]
        assert len(w.wire.posts) < 60
        async with restarted(w, api_key) as client, client.pool(images(60), ledger=ledger) as again:
            outcomes = by_key(await drain(again))
    assert len(outcomes) == 60
    assert all(outcome.ok for outcome in outcomes.values())
    assert {outcome.key for outcome in taken} <= {outcome.key for outcome in outcomes.values() if outcome.from_ledger}
    assert len(w.book) == len(w.wire.posts) == 60


async def test_inserted_and_reordered_requests_are_not_paid_for_twice(api_key: str, ledger: Path | str) -> None:
    async with world(api_key) as w:
        async with w.pool(map(image, [1, 2, 2, 3]), ledger=ledger) as pool:
            await drain(pool)
        async with w.pool(map(image, [3, 9, 2, 1, 2, 2]), ledger=ledger) as again:
            outcomes = await drain(again)
    assert len(w.book) == 6
    assert sorted(outcome.from_ledger for outcome in outcomes) == [False, False, True, True, True, True]


async def test_a_request_that_was_sent_when_the_last_run_ended_is_sent_again_with_the_same_key_and_bytes(
    api_key: str, ledger: Path | str
) -> None:
    bodies: list[bytes] = []

    async def tamper(request: httpx.Request, go_on: Handler) -> httpx.Response:
        if request.url.path.endswith("generations"):
            bodies.append(request.content)
            if len(bodies) == 1:
                await go_on(request)
                await asyncio.sleep(1000)
        return await go_on(request)

    async with world(api_key) as w:
        w.wire.tamper = tamper
        async with w.pool(images(1), ledger=ledger) as pool:
            await asyncio.sleep(1)
        assert [outcome.status for outcome in pool.leftovers] == ["unknown"]
        async with restarted(w, api_key) as client, client.pool(images(1), ledger=ledger) as again:
            [outcome] = await drain(again)
        assert outcome.ok
        assert outcome.attempts == 2
        assert len(w.book) == 1
        assert len({post.key for post in w.wire.posts}) == 1
        assert bodies[0] == bodies[1]
        async with open_ledger(ledger) as opened:
            assert await opened.job().unknown() == []


async def test_held_it_stays_unknown_over_all_runs_until_the_user_settles_it(api_key: str, ledger: Path | str) -> None:
    async with world(api_key, faults=[Fault(**POSTS, drop="after", nth=(1,))]) as w:
        for _ in range(2):
            async with (
                restarted(w, api_key, on_lost_response="hold") as client,
                client.pool(images(1), ledger=ledger) as pool,
            ):
                [outcome] = await drain(pool)
            assert outcome.status == "unknown"
            assert isinstance(outcome.error, SubmitOutcomeUnknownError)
            assert outcome.idempotency_key == w.wire.posts[0].key
        assert len(w.wire.posts) == 1
        async with open_ledger(ledger) as opened:
            [request] = await opened.job().unknown()
            assert request.key == "k0"
            await opened.job().resolve("k0", task_id=w.book[0]["task_id"])
        async with w.pool(images(1), ledger=ledger) as pool:
            [outcome] = await drain(pool)
        assert outcome.ok
        assert outcome.task is not None
        assert outcome.task.id == w.book[0]["task_id"]
        assert len(w.wire.posts) == 1


async def test_resolved_as_not_submitted_it_is_sent_anew(api_key: str, ledger: Path | str) -> None:
    async with world(api_key, {"on_lost_response": "hold"}, faults=[Fault(**POSTS, drop="before", nth=(1,))]) as w:
        async with w.pool(images(1), ledger=ledger) as pool:
            await drain(pool)
        async with open_ledger(ledger) as opened:
            await opened.job().resolve("k0", submitted=False)
        async with w.pool(images(1), ledger=ledger) as pool:
            [outcome] = await drain(pool)
        assert outcome.ok
        assert len({post.key for post in w.wire.posts}) == 2


async def test_too_late_or_under_another_api_key_nothing_is_sent_again(
    api_key: str, new_ledger: Callable[[], Path | str]
) -> None:
    for late in (True, False):
        path = new_ledger()
        faults = [Fault(**POSTS, drop="after", nth=(1,))]
        async with world(api_key, {"on_lost_response": "hold"}, faults=faults) as w:
            async with w.pool(images(1), ledger=path) as pool:
                await drain(pool)
            w.emulator.api_key = None  # any key is as good
            await asyncio.sleep(700 if late else 10)
            key = api_key if late else api_key[:-1] + "x"
            async with restarted(w, key) as client, client.pool(images(1), ledger=path) as again:
                [outcome] = await drain(again)
            assert outcome.status == "unknown"
            assert ("too late" in str(outcome.error)) is late
            assert ("API key has changed" in str(outcome.error)) is not late
            assert len(w.wire.posts) == 1


async def test_replays_without_proof_are_counted_over_all_runs(api_key: str, ledger: Path | str) -> None:
    async with world(api_key, faults=[Fault(**POSTS, drop="before", probability=1.0)]) as w:
        for start in (0, 2, 4):
            async with restarted(w, api_key) as client, client.pool(images(2, start), ledger=ledger) as pool:
                outcomes = await drain(pool)
            assert {outcome.status for outcome in outcomes} == {"unknown"}
        keys = Counter(post.key for post in w.wire.posts)
        assert sorted(keys.values()) == [1, 1, 1, 2, 2, 2]
        async with open_ledger(ledger) as opened:
            assert len(await opened.job().unknown()) == 6


async def test_a_second_run_of_the_same_job_is_refused_and_another_job_in_the_same_file_is_not(
    api_key: str, ledger: Path | str
) -> None:
    async with world(api_key) as w:
        async with w.pool(images(3), ledger=ledger) as pool:
            with pytest.raises(LedgerError, match="default"):
                async with w.pool(images(3), ledger=ledger):
                    pass
            async with w.pool(images(3), ledger=ledger, job="other") as other:
                assert len(await drain(other)) == 3
            assert len(await drain(pool)) == 3
        async with w.pool(images(3), ledger=ledger) as again:
            assert all(outcome.from_ledger for outcome in await drain(again))


async def test_what_is_wrong_with_a_ledger_is_raised_on_entering_and_nothing_is_sent(
    api_key: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "job.db"
    ledger.write_bytes(b"this is no ledger, it is a text" * 100)
    async with world(api_key) as w:
        pool = w.pool(images(3), ledger=ledger)
        with pytest.raises(LedgerError):
            async with pool:
                pass
        assert w.wire.posts == []


async def test_another_body_under_a_known_key_is_rejected(api_key: str, ledger: Path | str) -> None:
    async with world(api_key) as w:
        async with w.pool([image(1, key="a")], ledger=ledger) as pool:
            await drain(pool)
        async with w.pool([image(2, key="a"), image(3, key="b")], ledger=ledger) as pool:
            outcomes = by_key(await drain(pool))
        assert outcomes["a"].status == "rejected"
        assert isinstance(outcomes["a"].error, InvalidRequestError)
        assert "'a'" in str(outcomes["a"].error)
        assert outcomes["b"].ok
        assert len(w.book) == 2
        assert pool.census is not None
        assert (pool.census.changed, pool.census.new, pool.census.gone) == (1, 1, 0)


async def test_bad_rows_between_good_ones_end_no_later_run_either(api_key: str, ledger: Path | str) -> None:
    rows = [image(number, size="17x4") if number % 3 == 0 else image(number) for number in range(90)]
    async with world(api_key, {"validate": False}) as w:
        for max_outstanding in (1000, 1000, 10):
            outcomes = await w.client.run_many(rows, ledger=ledger, max_outstanding=max_outstanding)
            assert [str(outcome.status) for outcome in outcomes] == ["rejected", "completed", "completed"] * 30
        assert len(w.book) == 60
        more = [image(number, size="17x4") for number in range(100, 150)]
        with pytest.raises(BadRequestError):
            await w.client.run_many(rows + more, ledger=ledger, max_outstanding=10)


@pytest.mark.parametrize("how", ["read to the end", "left", "stopped", "without sources"])
async def test_only_who_reads_all_sources_to_the_end_is_told_what_is_missing_in_them(
    api_key: str, ledger: Path | str, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async with world(api_key) as w:
        await w.client.run_many(images(20), ledger=ledger)
        requests = images(19) if how == "read to the end" else images(20)
        caplog.clear()
        async with w.pool(None if how == "without sources" else requests, ledger=ledger, max_outstanding=5) as pool:
            if how == "without sources":
                assert (await pool.run(image(1, key="k1"))).ok
            async for _ in pool:
                if how == "left":
                    break
                if how == "stopped":
                    pool.stop()
    told = [record.getMessage() for record in caplog.records if getattr(record, "event", None) == "job_differs"]
    expected = ["job 'default': of its requests 1 of earlier runs were not given this time"]
    assert told == (expected if how == "read to the end" else [])


@pytest.mark.parametrize("with_ledger", [True, False])
async def test_a_key_seen_before_in_the_run_never_pays_again(
    api_key: str, ledger: Path | str, with_ledger: bool
) -> None:
    requests = [image(1, key="a"), image(1, key="a"), image(2, key="a"), image(3, key="b")]
    async with world(api_key) as w:
        async with w.pool(requests, ledger=ledger if with_ledger else None) as pool:
            outcomes = await drain(pool)
            later = await pool.run(image(1, key="a"))
        assert len(w.book) == 2
    assert sorted((outcome.index, str(outcome.status)) for outcome in outcomes) == [
        (0, "completed"),
        (1, "completed"),
        (2, "rejected"),
        (3, "completed"),
    ]
    tasks = {outcome.index: outcome.task for outcome in outcomes}
    assert tasks[0] == tasks[1] == later.task


async def test_a_request_that_was_not_sent_or_was_refused_is_tried_again(api_key: str, ledger: Path | str) -> None:
    faults = [Fault(**POSTS, status=400, nth=(1,)), Fault(**POSTS, status=402, nth=(2,))]
    async with world(api_key, faults=faults) as w:
        pool = w.pool(images(3), ledger=ledger, max_outstanding=1)
        with pytest.raises(Exception, match=r"402|quota|credit"):
            async with pool:
                first = by_key(await drain(pool))
        assert [str(first[key].status) for key in ("k0", "k1")] == ["rejected", "not_submitted"]
        async with w.pool(images(3), ledger=ledger) as again:
            outcomes = await drain(again)
    assert all(outcome.ok for outcome in outcomes)
    assert len(w.book) == 3


async def test_a_failure_is_yielded_and_not_paid_for_again_unless_tries_are_left(
    api_key: str, ledger: Path | str
) -> None:
    count = 0

    async def tamper(request: httpx.Request, go_on: Handler) -> httpx.Response:
        nonlocal count
        answer = await go_on(request)
        if request.method == "GET" and count < 2:
            data = json.loads(answer.content if hasattr(answer, "_content") else await answer.aread())
            if data["status"] == "completed":
                count += 1
                data |= {"status": "failed", "results": [], "error": {"code": "resource_exhausted", "message": "busy"}}
            return httpx.Response(200, json=data)
        return answer

    async with world(api_key, batch=False) as w:
        w.wire.tamper = tamper
        async with w.pool(images(1), ledger=ledger) as pool:
            [first] = await drain(pool)
        assert first.status == "failed"
        async with w.pool(images(1), ledger=ledger) as pool:
            [again] = await drain(pool)
        assert again.from_ledger
        assert isinstance(again.error, TaskFailedError)
        assert len(w.wire.posts) == 1
        async with w.pool(images(1), ledger=ledger, retry_failed=2) as pool:
            [done] = await drain(pool)
        assert done.ok
        assert done.attempts == 3
        assert not done.from_ledger
        assert len({post.key for post in w.wire.posts}) == 3


async def test_credits_of_every_run_count_against_the_budget(api_key: str, ledger: Path | str) -> None:
    async with world(api_key) as w:
        cost = None
        for cap, requests, sent in ((10, 3, 3), (10, 9, 4), (20, 9, 8)):
            pool = w.pool(images(requests), ledger=ledger, max_credits=cap)
            try:
                async with pool:
                    outcomes = await drain(pool)
            except BudgetExceededError as error:
                assert error is pool.reason  # noqa: PT017
                assert cost is not None
                assert all(
                    isinstance(outcome.error, NotSubmittedError)
                    for outcome in outcomes
                    if outcome.status == "not_submitted"
                )
            else:
                assert requests == 3
            cost = outcomes[0].credits
            assert cost == Decimal("2.5")
            assert len(w.book) == sent


async def test_an_unknown_price_is_tried_by_one_request_alone(api_key: str) -> None:
    async with world(api_key) as w:
        async with w.pool(images(20), max_credits=1000) as pool:
            await drain(pool)
        assert len(w.book) == 20
        first, second = w.wire.posts[:2]
        assert first.answered is not None
        assert second.arrived >= first.answered


async def test_prices_that_are_told_need_no_trying(api_key: str) -> None:
    async with world(api_key) as w:
        pool = w.pool(images(20), max_credits=10, prices={"gpt-4o-image": 5})
        with pytest.raises(BudgetExceededError):
            async with pool:
                outcomes = await drain(pool)
        assert len(w.book) == 3  # the service reserves half of what was told
        assert sum(outcome.status == "not_submitted" for outcome in outcomes) >= 1


async def test_if_an_intent_cannot_be_written_nothing_is_sent(
    api_key: str, ledger: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(api_key) as w:
        pool = w.pool(images(3), ledger=ledger)
        with pytest.raises(LedgerError):  # noqa: PT012
            async with pool:
                broken_at(monkeypatch, "sending")
                outcomes = await drain(pool)
        assert w.wire.posts == []
        assert {outcome.status for outcome in outcomes} == {"not_submitted"}
        monkeypatch.undo()


async def test_an_id_that_cannot_be_written_is_logged_kept_and_retried(
    api_key: str, ledger: Path | str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(api_key) as w:
        pool = w.pool(images(8), ledger=ledger, max_outstanding=2)
        with pytest.raises(LedgerError):  # noqa: PT012
            async with pool:
                broken_at(monkeypatch, "accepted", times=1)
                outcomes = await drain(pool)
        assert 1 <= len(w.book) <= 2
        assert w.book[0]["task_id"] in caplog.text
        done = [outcome for outcome in outcomes if outcome.ok]
        assert len(done) == len(w.book)
        async with open_ledger(ledger) as opened:
            assert (await opened.job().stats()).counts["completed"] == len(w.book)
        async with w.pool(images(8), ledger=ledger) as again:
            assert all(outcome.ok for outcome in await drain(again))
        assert len(w.book) == 8


def broken_at(monkeypatch: pytest.MonkeyPatch, state: str, times: int = 10**9) -> None:
    """Turns that hold a row in this state cannot be written."""
    original = store_module.JobStore.carry_out
    left = times

    def carry_out(self: Any, batch: Any) -> Any:
        nonlocal left
        if left and any(str(row[6]) == state for row in batch.rows):
            left -= 1
            raise sqlite3.OperationalError("database or disk is full")
        return original(self, batch)

    monkeypatch.setattr(store_module.JobStore, "carry_out", carry_out)


async def test_in_no_window_are_more_sent_than_the_limit_says_however_slow_the_disk_is(
    api_key: str, ledger: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evolink_async.ledger.turns import Turns

    end = Turns._end
    monkeypatch.setattr(Turns, "_end", lambda self, call: asyncio.get_running_loop().call_later(0.7, end, self, call))
    async with world(api_key, {"rate_limit": "10/s"}) as w:
        async with w.pool(images(100), ledger=ledger) as pool:
            await drain(pool)
        sent = [post.arrived for post in w.wire.posts]
    assert len(sent) == 100
    assert all(later - earlier >= 1 - 1e-6 for earlier, later in zip(sent, sent[11:], strict=False))
    assert sent[-1] - sent[0] < 13


async def test_nothing_is_sent_in_a_cool_down_that_came_while_the_intent_was_written(
    api_key: str, ledger: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evolink_async.ledger.turns import Turns

    end = Turns._end
    monkeypatch.setattr(Turns, "_end", lambda self, call: asyncio.get_running_loop().call_later(0.3, end, self, call))
    refusal = Fault(**POSTS, status=429, headers={"retry-after": "20"}, nth=(1,))
    async with world(api_key, {"rate_limit": "50/s"}, faults=[refusal]) as w:
        async with w.pool(images(60), ledger=ledger) as pool:
            await drain(pool)
        refused_at = next(post.answered for post in w.wire.posts if post.status == 429)
        assert refused_at is not None
        assert not [post for post in w.wire.posts if refused_at < post.arrived < refused_at + 20]
        assert len(w.book) == 60


async def test_a_second_task_for_one_request_is_told_and_the_first_is_followed(
    api_key: str, ledger: Path | str
) -> None:
    """A service that does not honour keys: the request is paid for twice, and the ledger says so."""
    async with world(api_key, idempotency=False, faults=[Fault(**POSTS, drop="after", nth=(1,))]) as w:
        async with w.pool(images(1), ledger=ledger) as pool:
            [outcome] = await drain(pool)
        assert outcome.ok
        assert len(w.book) == 2
        async with open_ledger(ledger) as opened:
            [request] = await opened.job().unknown()
        assert request.task_id == outcome.task.id if outcome.task else None


async def test_what_was_learned_of_durations_is_there_for_the_next_run(api_key: str, ledger: Path | str) -> None:
    async with world(api_key) as w:
        async with w.pool(images(40), ledger=ledger) as pool:
            await drain(pool)
        learned = w.client._core.memory.schedule.export()
        async with restarted(w, api_key) as client:
            assert not client._core.memory.schedule.has_learned
            async with client.pool([], ledger=ledger):
                assert client._core.memory.schedule.export() == learned


async def test_only_what_has_a_connection_is_on_record_as_sent(api_key: str, ledger: Path | str) -> None:
    """After a crash nobody could tell that the others, with an intent and no byte written, were not paid for."""
    async with (
        world(api_key, {"max_connections": 4, "rate_limit": "1000/s"}, faults=[Fault(**POSTS, delay=10)]) as w,
        w.pool(images(40), ledger=ledger) as pool,
    ):
        await asyncio.sleep(5)
        assert w.wire.flying == 3
        assert ask(ledger, "SELECT count(*) FROM request WHERE idempotency_key IS NOT NULL") == [(3,)]
        pool.stop()
        await drain(pool)


async def test_who_stops_waiting_for_a_shared_request_takes_nothing_from_the_other(api_key: str) -> None:
    async with world(api_key) as w, w.pool() as pool:
        first = asyncio.create_task(pool.run(image(1, key="a")))
        await asyncio.sleep(1)
        second = asyncio.create_task(pool.run(image(1, key="a")))
        await asyncio.sleep(1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert (await first).ok
        assert len(w.book) == 1
        assert pool.leftovers == []


async def test_a_run_whose_caller_has_gone_is_not_paid_for_again(api_key: str) -> None:
    async with world(api_key, failure_share=1, batch=False) as w:
        async with w.pool(retry_failed=5) as pool:
            running = asyncio.create_task(pool.run(image(1)))
            await asyncio.sleep(1)
            running.cancel()
            await asyncio.sleep(1000)
        assert len(w.book) == 1


@pytest.mark.parametrize("grace", [0.0, 2.0])
async def test_what_is_looked_up_while_the_block_is_left_is_not_sent_any_more(
    api_key: str, ledger: Path | str, grace: float
) -> None:
    async with world(api_key, faults=[Fault(**POSTS, nth=(1,), delay=1 + grace)]) as w:
        async with w.pool(images(1), ledger=ledger) as pool:
            await asyncio.sleep(1)
            pool.add(images(20, start=1))
            running = asyncio.create_task(pool.run(image("awaited")))
            await turns(3)
            assert pool.stats.waiting == 21
            left_at = now()
        assert now() - left_at == pytest.approx(grace, abs=0.1)
        outcome = await asyncio.wait_for(running, 0.1)
        assert outcome.status == "not_submitted"
        assert "block was left" in str(outcome.error)
        await asyncio.sleep(60)
        assert len(w.wire.posts) == 1
    assert [str(left.status) for left in pool.leftovers] == ["unfinished"]
    assert pool.stats.pulled == sum(pool.stats.counts.values())


async def test_stopped_it_follows_what_earlier_runs_have_sent_and_sends_nothing(
    api_key: str, ledger: Path | str
) -> None:
    async with world(api_key) as w:
        async with w.pool(images(6), ledger=ledger):
            await asyncio.sleep(3)
        sent = len(w.book)
        assert sent == 6
        async with w.pool(images(12), ledger=ledger, max_outstanding=4) as again:
            first = await anext(again)  # type: ignore[arg-type]
            again.stop()
            outcomes = [first, *await drain(again)]
        assert len(w.book) <= sent + 4
        assert all(outcome.ok for outcome in outcomes if outcome.key in {f"k{number}" for number in range(6)})


async def test_a_crowd_at_a_nearly_spent_budget_never_goes_over_and_uses_what_there_is(api_key: str) -> None:
    async with world(api_key) as w:
        pool = w.pool(max_credits=20, prices={"gpt-4o-image": 2.5})
        with pytest.raises(BudgetExceededError):
            async with pool:
                outcomes = await asyncio.gather(*(pool.run(image(number)) for number in range(100)))
        assert len(w.book) == 8
        assert sum(outcome.ok for outcome in outcomes) == 8
        assert {outcome.status for outcome in outcomes if not outcome.ok} == {"not_submitted"}


async def test_a_function_of_prices_that_fails_rejects_its_request_and_no_other(api_key: str) -> None:
    def prices(request: Any) -> Any:
        return {"picture 0": 1 / 0 if request.prompt == "picture 0" else 2.5, "picture 1": "cheap"}.get(
            request.prompt, 2.5
        )

    async with world(api_key) as w:
        async with w.pool(images(4), max_credits=100, prices=prices) as pool:
            outcomes = by_key(await drain(pool))
        assert [str(outcomes[f"k{number}"].status) for number in range(4)] == ["rejected"] * 2 + ["completed"] * 2
        assert "ZeroDivisionError" in str(outcomes["k0"].error)
        assert "'cheap'" in str(outcomes["k1"].error)
        assert len(w.book) == 2


async def test_a_key_that_postgresql_cannot_keep_is_rejected_alone_and_nothing_is_sent_for_it(
    api_key: str, postgres_url: str
) -> None:
    keys = ["good", "with a \0", "\u20ac" * 900, "\u20ac" * 800]
    requests = [image(number, key=key) for number, key in enumerate(keys)]
    async with world(api_key) as w:
        async with w.pool(requests, ledger=postgres_url) as pool:
            outcomes = by_key(await drain(pool))
            awaited = await pool.run(image(9, key="\0"))
        assert [str(outcomes[key].status) for key in keys] == ["completed", "rejected", "rejected", "completed"]
        assert isinstance(outcomes[keys[1]].error, InvalidRequestError)
        assert "NUL" in str(outcomes[keys[1]].error)
        assert "2,500 bytes" in str(outcomes[keys[2]].error)
        assert awaited.status == "rejected"
        assert len(w.wire.posts) == 2
        async with w.pool(requests, ledger=postgres_url) as again:
            assert by_key(await drain(again)).keys() == outcomes.keys()
        assert len(w.wire.posts) == 2


async def test_texts_with_a_nul_that_a_service_tells_are_kept_without_it_and_break_no_ledger(
    api_key: str, ledger: Path | str
) -> None:
    refusal = {"error": {"code": "bad\0size", "message": "no \0 such size"}}
    faults = [Fault(**POSTS, nth=(1,), status=400, body=refusal)]
    async with world(api_key, faults=faults) as w:
        async with w.pool(images(3), ledger=ledger) as pool:
            first = by_key(await drain(pool))
        assert sorted(str(outcome.status) for outcome in first.values()) == ["completed", "completed", "rejected"]
        async with w.pool(images(3), ledger=ledger) as again:
            assert all(outcome.ok for outcome in await drain(again))
        assert pool.reason is again.reason is None


async def test_a_server_that_cannot_be_reached_is_told_on_entering_and_nothing_is_sent(
    api_key: str, postgres: Postgres, unused_port: int
) -> None:
    async with world(api_key) as w:
        pool = w.pool(images(3), ledger=postgres.url("db", port=unused_port))
        with pytest.raises(LedgerError, match=f"127.0.0.1:{unused_port}/db cannot be reached"):
            async with pool:
                pass
        assert w.wire.posts == []
