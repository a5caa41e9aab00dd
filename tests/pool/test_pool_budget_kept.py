"""A budget and a service that reserves nothing, or less than it uses; and a ledger that is deleted under a pool."""

from __future__ import annotations

import asyncio
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from loop_executor import in_loop
from pool_world import Handler, answering, drain, images, now, task_json, world

from evolink_async import BudgetExceededError, ImageRequest, LedgerError, Outcome, TaskPool, open_ledger

pytestmark = pytest.mark.looptime

SECONDS = 30  # that a task takes


@pytest.fixture(autouse=True)
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)


class Service:
    """Reserves and uses what it is told to, and keeps count of what is true."""

    def __init__(self, reserved: float | None, used: float | None) -> None:
        self.reserved, self.used = reserved, used
        self.begun: dict[str, float] = {}
        self.most_at_once = 0

    def __call__(self, request: httpx.Request) -> tuple[int, Any] | None:
        if request.method == "POST" and request.url.path.endswith("/generations"):
            task_id = f"task-{len(self.begun)}"
            self.begun[task_id] = now()
            running = sum(now() - begun < SECONDS for begun in self.begun.values())
            self.most_at_once = max(self.most_at_once, running)
            return 200, task_json(task_id, "pending", usage=self._usage("credits_reserved", self.reserved))
        task_id = request.url.path.rpartition("/")[2]
        if task_id not in self.begun:
            return 404, {"error": {"message": "no such thing"}}
        if now() - self.begun[task_id] < SECONDS:
            return 200, task_json(task_id, "processing")
        usage = self._usage("credits_used", self.used)
        return 200, task_json(task_id, "completed", results=["https://files.example/a.png"], usage=usage)

    @staticmethod
    def _usage(name: str, credits: float | None) -> dict[str, float]:
        return {} if credits is None else {name: credits}


async def until_the_budget_ends_it(pool: TaskPool) -> list[Outcome]:
    """All its outcomes; its reason must be the budget."""
    with pytest.raises(BudgetExceededError):
        async with pool:
            outcomes = await drain(pool)
    return outcomes


@pytest.mark.parametrize("by_function", [False, True])
async def test_a_told_price_frees_the_budget_whatever_is_sent_next(
    api_key: str, tmp_path: Path, by_function: bool
) -> None:
    ledger = tmp_path / "job.db"
    others = [ImageRequest(model="nano-banana-beta", prompt=f"other {number}") for number in range(3)]
    # A mapping says at once what it frees. A function is asked when the request comes that holds the budget.
    requests = [*images(1), *others] if by_function else [*others, *images(1)]
    model = images(1)[0].model
    async with world(api_key) as w:
        service = Service(None, None)
        w.wire.tamper = answering(service)
        await w.client.run_many(images(1), ledger=ledger, max_credits=50)
        untold = await until_the_budget_ends_it(w.pool(requests, ledger=ledger, max_credits=50))
        assert len(service.begun) == 1
        assert {str(outcome.status) for outcome in untold} == {"completed", "not_submitted"}
        prices: Any = {model: 4, "nano-banana-beta": 5}
        told = (lambda request: prices[request.model]) if by_function else prices
        async with w.pool(requests, ledger=ledger, max_credits=50, prices=told) as pool:
            assert all(outcome.ok for outcome in await drain(pool))
        assert len(service.begun) == 4
    async with open_ledger(ledger) as opened:
        stats = await opened.job("default").stats()
    assert (stats.credits_spent, stats.credits_reserved) == (4 + 3 * 5, 0)


@pytest.mark.parametrize(
    ("reserved", "used", "posts", "spent"),
    [(10, 10, 5, 50), (0, 10, 5, 50), (-100, 10, 5, 50), (None, 10, 5, 50), (10, -10, 5, 50), (0, 0, 40, 0)],
)
async def test_a_budget_is_kept_whatever_the_service_says_that_it_reserves(
    api_key: str, reserved: float | None, used: float, posts: int, spent: int
) -> None:
    async with world(api_key) as w:
        service = Service(reserved, used)
        w.wire.tamper = answering(service)
        pool = w.pool(images(40), max_credits=50)
        try:
            async with pool:
                outcomes = await drain(pool)
        except BudgetExceededError:
            assert posts < 40
        assert len(service.begun) == posts
        assert (pool.stats.credits_spent, pool.stats.credits_reserved) == (spent, 0)
        assert Counter(str(outcome.status) for outcome in outcomes) == Counter(
            completed=posts, not_submitted=40 - posts
        )


async def test_after_the_first_has_shown_that_it_uses_more_than_was_reserved_no_more_are_sent_than_fit(
    api_key: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "job.db"
    async with world(api_key) as w:
        service = Service(1, 10)
        w.wire.tamper = answering(service)
        # Nine of them run when it comes out, and what they have used is known when they end.
        pool = w.pool(images(100), max_credits=250, ledger=ledger, max_outstanding=9)
        await until_the_budget_ends_it(pool)
        assert len(service.begun) == 25
        assert pool.stats.credits_spent == 250
        pool = w.pool(images(100), max_credits=299, ledger=ledger)
        outcomes = await until_the_budget_ends_it(pool)
        assert len(service.begun) == 29
        assert sum(outcome.from_ledger for outcome in outcomes) == 25
        assert pool.stats.credits_spent == 40


async def test_tasks_of_an_earlier_run_that_use_more_than_was_reserved_show_it_too(
    api_key: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "job.db"
    async with world(api_key) as w:
        service = Service(1, 10)
        w.wire.tamper = answering(service)
        async with w.pool(images(5), max_credits=95, ledger=ledger):
            await asyncio.sleep(SECONDS / 2)
        assert len(service.begun) == 5
        # Nothing new is sent before they end, for they hold all places.
        pool = w.pool(images(100), max_credits=95, ledger=ledger, max_outstanding=5)
        await until_the_budget_ends_it(pool)
        assert len(service.begun) == 9
        assert pool.stats.credits_spent == 90


async def test_a_price_that_the_caller_tells_too_low_is_put_right_by_the_first_that_ends(api_key: str) -> None:
    async with world(api_key) as w:
        service = Service(None, 10)
        w.wire.tamper = answering(service)
        pool = w.pool(images(100), max_credits=200, prices={"gpt-4o-image": 1}, max_outstanding=10)
        await until_the_budget_ends_it(pool)
        assert len(service.begun) == 20
        assert pool.stats.credits_spent == 200


async def test_a_request_that_is_free_goes_alone_only_until_that_is_shown(api_key: str) -> None:
    async with world(api_key) as w:
        service = Service(0, None)
        w.wire.tamper = answering(service)
        async with w.pool(images(20), max_credits=50) as pool:
            await drain(pool)
        begun = sorted(service.begun.values())
        assert begun[1] - begun[0] >= SECONDS
        assert service.most_at_once > 5
        assert pool.stats.credits_spent == Decimal(0)


async def test_a_job_whose_service_tells_no_prices_goes_on_once_the_caller_tells_them(
    api_key: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "job.db"
    async with world(api_key) as w:
        service = Service(None, None)
        w.wire.tamper = answering(service)
        pool = w.pool(images(10), max_credits=50, ledger=ledger)
        outcomes = await until_the_budget_ends_it(pool)
        assert Counter(str(outcome.status) for outcome in outcomes) == {"completed": 1, "not_submitted": 9}
        assert "tell the price with prices=" in str(pool.reason)
        async with w.pool(images(10), max_credits=50, ledger=ledger, prices={"gpt-4o-image": 5}) as pool:
            assert {str(outcome.status) for outcome in await drain(pool)} == {"completed"}
        assert len(service.begun) == 10
        async with w.pool(images(10), ledger=ledger) as pool:
            assert [outcome.credits for outcome in await drain(pool)] == [5] * 10


async def test_what_an_earlier_run_sent_without_a_budget_is_sent_again_within_the_budget_of_this_one(
    api_key: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "job.db"

    async def cut(request: httpx.Request, go_on: Handler) -> httpx.Response:
        raise httpx.ReadError("cut")

    async with world(api_key) as w:
        w.wire.tamper = cut
        async with w.pool(images(20), ledger=ledger) as pool:
            await asyncio.sleep(1.5)
        sent = {outcome.key for outcome in pool.leftovers}
        assert len(sent) > 2  # and nobody has told their price
        w.wire.tamper = None
        pool = w.pool(images(20), ledger=ledger, max_credits=5)
        outcomes = await until_the_budget_ends_it(pool)
        assert w.emulator.book()["account"]["spent"] == pool.stats.credits_spent == 5
        assert sum(outcome.ok for outcome in outcomes) == len(w.book) == 2
        assert {str(outcome.status) for outcome in outcomes if outcome.key in sent} == {"completed", "unknown"}


async def test_when_the_ledger_is_deleted_under_a_pool_nothing_more_is_sent_and_the_reason_says_what_to_do(
    api_key: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "job.db"
    async with world(api_key) as w:
        pool = w.pool(images(60), ledger=ledger, max_outstanding=5)
        with pytest.raises(LedgerError, match=r"deleted or moved away.*before you run the job again"):  # noqa: PT012
            async with pool:
                outcomes = [await anext(pool) for _ in range(3)]  # type: ignore[arg-type]
                for path in tmp_path.glob("job.db*"):
                    path.unlink()
                posts = len(w.wire.posts)
                outcomes += await drain(pool)
        assert len(w.wire.posts) == len(w.book) <= posts + 5 < 60
        done = Counter(str(outcome.status) for outcome in outcomes)
        assert done["completed"] == len(w.book)
        assert done["completed"] + done["not_submitted"] == len(outcomes)
        assert not list(tmp_path.iterdir())
