"""A wall clock that is set while a pool runs, or between two runs of a job (F107): nothing is timed by it but age."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from loop_executor import in_loop
from pool_world import drain, images, now, world

from evolink_async import AsyncEvoLink, clock
from evolink_async.emulator import Fault

pytestmark = pytest.mark.looptime

HOUR, DAYS = 3600.0, 2 * 86_400.0


class WallClock:
    """Goes with the loop's time, and can be set."""

    def __init__(self) -> None:
        self.start = datetime(2026, 11, 20, 12, tzinfo=UTC)
        self.ahead = 0.0

    def now(self) -> datetime:
        return self.start + timedelta(seconds=now() + self.ahead)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Iterator[WallClock]:
    in_loop(monkeypatch)
    wall = WallClock()
    monkeypatch.setattr(clock, "now", wall.now)
    monkeypatch.setattr(time, "time", lambda: wall.now().timestamp())
    yield wall
    monkeypatch.undo()


@pytest.mark.parametrize("jump", [-HOUR, -DAYS, HOUR, DAYS], ids=["an hour back", "days back", "an hour on", "days on"])
async def test_a_clock_that_is_set_while_a_pool_runs_changes_nothing(
    api_key: str, wall: WallClock, jump: float
) -> None:
    took: list[float] = []
    for ahead in (0.0, jump):
        async with world(api_key, seed=5) as w:
            begun = now()
            async with w.pool(images(30), task_timeout=600) as pool:
                first = await anext(pool)
                wall.ahead = ahead
                outcomes = [first, *await drain(pool)]
            took.append(now() - begun)
        assert {outcome.status for outcome in outcomes} == {"completed"}
        assert len(w.wire.posts) == 30
        assert all(outcome.submitted_at and outcome.finished_at for outcome in outcomes)
        assert pool.stats.elapsed == pytest.approx(took[-1])
        wall.ahead = 0.0
    assert took[1] == pytest.approx(took[0], rel=0.3)  # each run has its own jitter


@pytest.mark.parametrize("jump", [-DAYS, DAYS], ids=["back", "on"])
async def test_a_timeout_is_not_shortened_or_lengthened_by_a_clock_that_is_set(
    api_key: str, wall: WallClock, jump: float
) -> None:
    slow = {"gpt-4o-image": {"slow_share": 1.0, "slow_factor": 1000.0}}
    async with world(api_key, models=slow) as w:
        async with w.pool(images(1), task_timeout=300) as pool:
            begun = now()
            await asyncio.sleep(1)
            assert pool.outstanding
            wall.ahead = jump
            [outcome] = await drain(pool)
        assert outcome.status == "unfinished"
        assert 300 <= now() - begun < 330


@pytest.mark.parametrize(
    ("jump", "resent"),
    [(0.0, True), (-HOUR, False), (HOUR, False), (DAYS, False)],
    ids=["not set", "an hour back", "an hour on", "days on"],
)
async def test_between_two_runs_a_clock_that_was_set_never_makes_a_lost_request_be_sent_again(
    api_key: str, tmp_path: Path, wall: WallClock, jump: float, resent: bool
) -> None:
    faults = [Fault(method="POST", path="/v1/images", drop="after", nth=(1,))]
    async with world(api_key, {"on_lost_response": "hold"}, faults=faults) as w:
        async with w.pool(images(1), ledger=tmp_path / "job.db") as pool:
            [lost] = await drain(pool)
        assert lost.status == "unknown"
        wall.ahead = jump
        async with (
            AsyncEvoLink(
                api_key, base_url="http://127.0.0.1", http_client=w.client._core.options.http_client
            ) as client,
            client.pool(images(1), ledger=tmp_path / "job.db") as again,
        ):
            [outcome] = await drain(again)
        assert outcome.status == ("completed" if resent else "unknown")
        assert len(w.wire.posts) == 1 + resent
        assert len(w.book) == 1


async def test_a_task_of_an_earlier_run_is_followed_whatever_the_clock_says(
    api_key: str, tmp_path: Path, wall: WallClock
) -> None:
    async with world(api_key) as w:
        async with w.pool(images(5), ledger=tmp_path / "job.db") as pool:
            await asyncio.sleep(1)
            assert len(pool.outstanding) == 5
        for wall.ahead in (-HOUR, DAYS):
            async with w.pool(images(5), ledger=tmp_path / "job.db") as again:
                outcomes = await drain(again)
            assert {outcome.status for outcome in outcomes} == {"completed"}
        assert len(w.wire.posts) == 5
