"""The caller's function of prices raises what no function should: no pool hangs over it, and no job stays locked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from loop_executor import in_loop
from pool_world import Canned, drain, images, world

from evolink_async import AsyncEvoLink, InvalidRequestError


class Odd(BaseException):
    """No `Exception`, and nobody's order to stop."""


def failing(error: type[BaseException], call: int = 1, *, always: bool = False) -> Callable[[Any], float]:
    """A function of prices that raises in its n-th call."""
    calls = 0

    def prices(request: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == call or always:
            raise error("by prices")
        return 2.5

    return prices


@pytest.mark.looptime
@pytest.mark.parametrize("with_ledger", [True, False], ids=["ledger", "memory"])
@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, Odd])
async def test_whatever_a_function_of_prices_raises_rejects_its_request_and_no_other(
    api_key: str, tmp_path: Path, error: type[BaseException], with_ledger: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_loop(monkeypatch)
    ledger = tmp_path / "job.db" if with_ledger else None
    async with world(api_key) as w, asyncio.timeout(1000):
        async with w.pool(images(4), max_credits=100, prices=failing(error), ledger=ledger) as pool:
            outcomes = await drain(pool)
            run = await pool.run(images(1, start=9)[0])
        assert Counter(str(outcome.status) for outcome in outcomes) == {"rejected": 1, "completed": 3}
        [rejected] = [outcome for outcome in outcomes if outcome.error is not None]
        assert isinstance(rejected.error, InvalidRequestError)
        assert f"prices(request) raised {error.__name__}: by prices" in str(rejected.error)
        assert isinstance(rejected.error.__cause__, error)
        assert run.ok
        assert pool.reason is None


@pytest.mark.looptime
@pytest.mark.parametrize("call", range(2, 13))
async def test_a_function_of_prices_that_fails_only_later_hangs_nothing_either(
    api_key: str, tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked when a request is pulled, when its turn comes, and when its credits are reserved."""
    in_loop(monkeypatch)
    ledger = tmp_path / "job.db"
    async with world(api_key) as w, asyncio.timeout(1000):
        pool = w.pool(images(4), max_credits=100, prices=failing(asyncio.CancelledError, call), ledger=ledger)
        try:
            async with pool:
                await drain(pool)
        except InvalidRequestError as error:
            assert error is pool.reason  # noqa: PT017
        async with w.pool(images(4), ledger=ledger) as again:
            assert all(outcome.ok for outcome in await drain(again))
        assert len(w.book) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2, 3, 7, 11])
def test_an_order_to_stop_out_of_a_function_of_prices_stops_the_program_and_leaves_the_job_free(
    api_key: str, tmp_path: Path, error: type[BaseException], call: int
) -> None:
    async def run(prices: Any) -> list[bool]:
        async with (
            httpx.AsyncClient(transport=Canned()) as http_client,
            AsyncEvoLink(api_key, base_url="http://127.0.0.1", http_client=http_client) as client,
            asyncio.timeout(20),
            client.pool(images(4), ledger=tmp_path / "job.db", max_credits=100, prices=prices) as pool,
        ):
            return [outcome.ok for outcome in await drain(pool)]

    with pytest.raises(error, match="by prices"):
        asyncio.run(run(failing(error, call)))
    assert asyncio.run(run({"gpt-4o-image": 2.5})) == [True] * 4
