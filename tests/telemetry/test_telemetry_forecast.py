"""What a job will cost, and warnings."""

from __future__ import annotations

import logging
import random
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from evolink_async import AsyncEvoLink, ConfigurationError, ImageRequest, Outcome, OutcomeStatus, PoolStats
from evolink_async.emulator import Emulator
from evolink_async.pool.outcome import ModelStats
from evolink_async.pool.progress import Tally
from evolink_async.telemetry import Crossing, Thresholds, forecast


def outcome(model: str, credits: float | None, status: OutcomeStatus = OutcomeStatus.COMPLETED) -> Outcome:
    request = ImageRequest(model=model, prompt="p")
    price = None if credits is None else Decimal(str(credits))
    return Outcome(index=0, key=None, identity="i", request=request, status=status, credits=price)


def stats(outcomes: list[Outcome], total: int | None, **more: Any) -> PoolStats:
    tally = Tally()
    for each in outcomes:
        tally.outcome(each)
    counts = tally.counts()
    known = {"waiting": 0, "outstanding": 0, "untaken": 0, "counts": counts, "models": tally.by_model()}
    return PoolStats(total=total, pulled=len(outcomes), **(known | more))


def test_a_job_of_one_price_costs_that_price_times_its_requests() -> None:
    told = forecast(stats([outcome("m", 2.5)] * 10, 100, eta=60.0))
    assert (told.credits, told.low, told.high, told.seconds) == (250, 250, 250, 60)


def test_failures_are_released_and_make_the_rest_cheaper_and_less_certain() -> None:
    outcomes = [outcome("m", 10)] * 15 + [outcome("m", 0, OutcomeStatus.FAILED)] * 5
    told = forecast(stats(outcomes, 120))
    assert told.credits == 150 + 750
    assert told.low is not None
    assert told.high is not None
    assert 150 < told.low < 900 < told.high < 1200


def test_rejected_requests_cost_nothing_and_unsent_ones_say_nothing() -> None:
    rejected = [outcome("m", None, OutcomeStatus.REJECTED)] * 5
    unsent = [outcome("m", None, OutcomeStatus.NOT_SUBMITTED)] * 40
    told = forecast(stats([outcome("m", 2)] * 5 + rejected + unsent, 60))
    assert told.credits == 10 + 10


def test_models_with_other_prices_are_told_apart_where_the_mix_is_known() -> None:
    outcomes = [outcome("cheap", 1)] * 10 + [outcome("dear", 100)] * 5
    told = forecast(stats(outcomes, 30), requests={"cheap": 25, "dear": 5})
    assert (told.credits, told.low, told.high) == (525, 525, 525)


def test_nothing_is_told_of_what_nobody_can_know() -> None:
    few = stats([outcome("m", 2)] * 4, 10, eta=5.0)
    assert forecast(few).credits is forecast(few).low is forecast(few).high is None
    assert forecast(few).seconds == 5
    assert forecast(stats([outcome("m", 2)] * 10, None)).credits is None
    unpriced = stats([outcome("m", None)] * 10, 20)
    assert forecast(unpriced).credits is None
    assert forecast(stats([outcome("m", 2)] * 10, 20), requests={"m": 12, "new": 1}).credits is None


def test_a_told_price_stands_in_for_what_was_not_seen_and_may_be_released() -> None:
    told = forecast(stats([outcome("m", 2)] * 10, 20), requests={"m": 10, "new": 10}, prices={"new": Decimal(5)})
    assert (told.credits, told.low, told.high) == (70, 20, 70)
    for price in (float("nan"), Decimal("NaN"), Decimal("sNaN"), -1):
        with pytest.raises(ConfigurationError, match="prices"):
            forecast(stats([], 1), requests={"new": 1}, prices={"new": price})


def test_when_all_is_done_it_is_what_was_spent() -> None:
    outcomes = [outcome("m", 2), outcome("m", 3)]
    assert forecast(stats(outcomes, 2)).credits == 5


def test_the_range_holds_nineteen_times_out_of_twenty() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    hits, tries = 0, 400
    for _ in range(tries):
        costs = [dice.choice([0.0, 4.0, 4.0, 9.5]) for _ in range(200)]
        told = forecast(stats([outcome("m", cost) for cost in costs[:30]], 200))
        assert told.low is not None
        assert told.high is not None
        hits += told.low <= Decimal(str(sum(costs))) <= told.high
    assert 0.88 * tries < hits


async def test_the_forecast_of_a_real_job_ends_with_what_was_spent(api_key: str) -> None:
    requests = [ImageRequest(model="gpt-4o-image", prompt=f"p{n}") for n in range(40)]
    models = Counter(request.model for request in requests)
    async with Emulator(speed=200, seed=3, api_key=api_key, failure_share=0.2).serve() as server:  # noqa: SIM117
        async with AsyncEvoLink(base_url=server.base_url, rate_limit="40/s") as client:
            async with client.pool(requests, max_outstanding=10) as pool:
                told = [forecast(pool.stats, requests=models)]
                async for _ in pool:
                    told.append(forecast(pool.stats, requests=models))
            spent = pool.stats.credits_spent
    assert told[0].credits is None
    assert told[-1].credits == spent
    for each in told[1:]:
        assert each.credits is not None
        assert each.low is not None
        assert each.high is not None
        assert each.low <= each.credits <= each.high <= 40 * Decimal("2.5") * 2


def moment(completed: int, failed: int = 0, **more: Any) -> PoolStats:
    counts = {"completed": completed, "failed": failed}
    return PoolStats(total=None, pulled=0, waiting=0, outstanding=0, untaken=0, counts=counts, **more)


def test_a_crossing_is_told_once_until_the_value_was_well_below(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Crossing] = []
    thresholds = Thresholds(credits=100, on_crossed=told.append)
    for spent in (90, 101, 105, 95, 101, 90, 101):
        thresholds(moment(0, credits_reserved=Decimal(spent)))
    assert [(crossing.value, crossing.over) for crossing in told] == [(101, True), (90, False), (101, True)]
    events = [record.event for record in caplog.records if hasattr(record, "event")]
    assert events == ["threshold_crossed", "threshold_cleared", "threshold_crossed"]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_function_that_raises_takes_no_crossing_from_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def failing(crossing: Crossing) -> None:
        raise RuntimeError(crossing.name)

    thresholds = Thresholds(credits=100, latency=60, on_crossed=failing)
    with pytest.raises(RuntimeError, match="credits"):
        thresholds.check(moment(0, credits_reserved=Decimal(101), timed=20, task_seconds=2000.0))
    assert [getattr(record, "threshold", None) for record in caplog.records] == ["credits", "latency"]


def test_the_share_of_errors_is_that_of_the_last_outcomes() -> None:
    thresholds = Thresholds(error_share=0.5)
    assert thresholds.check(moment(0, failed=19)) == []  # too few to tell
    [up] = thresholds.check(moment(0, failed=20))
    assert (up.name, up.value, up.over) == ("error_share", 1.0, True)
    # 20 failures at the start are forgotten once 50 others came.
    thresholds.check(moment(30, failed=20))
    crossings = [c for n in range(31, 200) for c in thresholds.check(moment(n, failed=20))]
    assert [crossing.over for crossing in crossings] == []
    assert not thresholds._over


def test_latency_is_the_mean_of_the_last_tasks() -> None:
    thresholds = Thresholds(latency=60)
    assert thresholds.check(moment(100, timed=100, task_seconds=3000.0)) == []
    crossings = [
        c for n in range(1, 51) for c in thresholds.check(moment(100 + n, timed=100 + n, task_seconds=3000.0 + 90 * n))
    ]
    assert [(crossing.name, crossing.over) for crossing in crossings] == [("latency", True)]


def test_a_forecast_over_the_threshold_warns_before_the_money_is_gone() -> None:
    thresholds = Thresholds(forecast=200)
    [crossing] = thresholds.check(stats([outcome("m", 2.5)] * 10, 100))
    assert (crossing.name, crossing.value) == ("forecast", 250)


@pytest.mark.parametrize(
    "limits",
    [
        *({"credits": 0}, {"latency": "x"}, {"error_share": 2}, {"forecast": float("inf")}),
        *({"credits": Decimal("NaN")}, {"credits": Decimal("sNaN")}, {"forecast": Decimal("Infinity")}),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Thresholds(**limits)


def test_stats_by_model_are_sums_of_the_outcomes() -> None:
    seen = stats([outcome("m", 2), outcome("m", 4), outcome("n", 0, OutcomeStatus.FAILED)], 3).models
    assert seen["m"] == ModelStats(requests=2, completed=2, priced=2, credits=Decimal(6), deviation=1.0)
    assert seen["n"] == ModelStats(requests=1, failed=1, priced=1)
