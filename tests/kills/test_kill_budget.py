"""A hundred coroutines at a budget that is nearly spent, again and again, on virtual time.

BUDGET_ROUNDS=1000 pytest tests/kills/test_kill_budget.py
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from loop_executor import in_loop

from evolink_async import AsyncEvoLink, BudgetExceededError, ImageRequest, Outcome
from evolink_async.emulator import Emulator
from evolink_async.pool import TaskPool

ROUNDS = int(os.environ.get("BUDGET_ROUNDS", "24"))
COROUTINES = 100
MODEL, PRICE = "gpt-4o-image", Decimal("2.5")
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Watched(httpx.AsyncBaseTransport):
    """Looks at both accounts around every request that is sent."""

    def __init__(self, emulator: Emulator) -> None:
        self._inner = httpx.ASGITransport(app=emulator.app)  # type: ignore[arg-type]
        self._emulator = emulator
        self.cap = Decimal(0)
        self.pool: TaskPool | None = None
        self.most = Decimal(0)
        self.looks = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.look()
        answer = await self._inner.handle_async_request(request)
        self.look()
        return answer

    def look(self) -> None:
        account = self._emulator.book()["account"]
        held = [Decimal(str(account["reserved"])) + Decimal(str(account["spent"]))]
        if self.pool is not None and self.pool.reason is None:
            job = self.pool._engine.journal.job
            held.append(job.reserved + job.spent)
        self.looks += 1
        self.most = max(self.most, *held)


def image(number: int, name: str) -> ImageRequest:
    return ImageRequest(model=MODEL, prompt=f"{name} {number}", key=f"{name} {number}")


async def one_round(chance: random.Random, path: Path | None, told: bool) -> tuple[int, int]:
    """How many credits' worth of requests were let through, and how many fit. Looks at everything on the way."""
    before = chance.randrange(0, 4) if path is not None else 0
    # One request finds out a price that nobody has told: see below.
    fit = chance.randrange(0 if told or before else 1, 12)
    cap = PRICE * (fit + before) + Decimal(chance.choice(["0", "0.000001", "1.25", "2.499999"]))
    emulator = Emulator(clock=asyncio.get_running_loop().time, seed=chance.randrange(1000))
    wire = Watched(emulator)
    options: dict[str, Any] = {"max_credits": cap, "prices": {MODEL: PRICE} if told else None, "ledger": path}
    async with (
        httpx.AsyncClient(transport=wire) as http_client,
        AsyncEvoLink(emulator.api_key, base_url="http://127.0.0.1", http_client=http_client) as client,
    ):
        if before:  # an earlier run has spent its part
            async with client.pool([image(number, "before") for number in range(before)], **options) as pool:
                assert len([outcome async for outcome in pool]) == before
        outcomes: list[Outcome] = []
        wire.pool = pool = client.pool(**options)
        reason: BaseException | None = None

        async def one(number: int) -> None:
            await asyncio.sleep(chance.choice([0, 0, 0, 0.1, 1]))
            wire.look()
            outcomes.append(await pool.run(image(number, "now")))
            wire.look()

        try:
            async with pool:
                await asyncio.gather(*(one(number) for number in range(COROUTINES)))
                wire.look()
        except BudgetExceededError as error:
            reason = error
        assert reason is pool.reason
        assert isinstance(reason, BudgetExceededError)
    accepted = len(emulator.book()["posts"])
    assert wire.most <= cap, f"{wire.most} credits were spent and reserved, and {cap} were allowed"
    assert wire.looks > COROUTINES
    assert Counter(str(outcome.status) for outcome in outcomes) == Counter(
        {"completed": accepted - before, "not_submitted": COROUTINES - accepted + before}
    ) - Counter({"completed": 0})
    return accepted, int(cap // PRICE)


@pytest.mark.looptime
@pytest.mark.timeout(600 + ROUNDS)
@pytest.mark.parametrize("told", [True, False], ids=["price told", "price learned"])
@pytest.mark.parametrize("with_ledger", [True, False], ids=["ledger", "memory"])
async def test_a_hundred_coroutines_use_the_credits_that_fit_and_not_one_more(
    monkeypatch: pytest.MonkeyPatch, told: bool, with_ledger: bool
) -> None:
    in_loop(monkeypatch)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for number in range(ROUNDS // 4):
            path = Path(folder, f"{number}.db") if with_ledger else None
            accepted, fit = await one_round(chance, path, told)
            assert accepted == fit, f"round {number}: {fit} requests fit, and {accepted} were accepted"


@pytest.mark.looptime
async def test_a_price_that_nobody_knows_and_that_is_above_the_budget_is_found_out_by_one_request_and_no_more() -> None:
    emulator = Emulator(clock=asyncio.get_running_loop().time)
    wire = Watched(emulator)
    async with (
        httpx.AsyncClient(transport=wire) as http_client,
        AsyncEvoLink(emulator.api_key, base_url="http://127.0.0.1", http_client=http_client) as client,
    ):
        pool = client.pool(max_credits=PRICE / 2)
        with pytest.raises(BudgetExceededError):
            async with pool:
                outcomes = await asyncio.gather(*(pool.run(image(number, "dear")) for number in range(COROUTINES)))
    assert Counter(str(outcome.status) for outcome in outcomes) == {"completed": 1, "not_submitted": COROUTINES - 1}
    assert len(emulator.book()["posts"]) == 1
