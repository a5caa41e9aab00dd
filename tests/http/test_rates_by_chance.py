"""Refusals that have nothing to do with our rate, and how they are told from a limit: pure, in numbers. The service is
that of `benchmarks/pace.py`."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from pace_bench import bench

from evolink_async.http.evidence import Trials
from evolink_async.http.model_pace import ModelPace

SEEDS = range(1, 7)


def figures(figure: str, **world: Any) -> list[float]:
    """One figure of a run for each seed."""
    found = []
    for seed in SEEDS:
        run = bench.figures(bench.Case(bench.World(**world), seed=seed))
        assert run["early"] == 0  # nothing is sent in a cool-down
        found.append(run[figure])
    print(f"{world}, seeds {list(SEEDS)}: {figure} " + ", ".join(f"{value:.3f}" for value in found))
    return found


@pytest.mark.parametrize("hint", [1.0, None], ids=["hint", "no-hint"])
@pytest.mark.parametrize(
    ("share", "ceiling", "least"),
    [(0.1, None, 0.6), (0.2, None, 0.6), (0.3, None, 0.5), (0.1, 2.0, 0.4), (0.2, 2.0, 0.4), (0.3, 2.0, 0.25)],
)
def test_of_what_the_pauses_after_random_refusals_leave_a_good_share_is_used(
    share: float, ceiling: float | None, least: float, hint: float | None
) -> None:
    per_second = figures("per second", rate=None, chance=share, chance_hint=hint, ceiling=ceiling)
    assert statistics.fmean(per_second) > least * bench.most_by_chance(share, hint, ceiling)
    assert min(per_second) > 0.2 * bench.most_by_chance(share, hint, ceiling)


@pytest.mark.parametrize("hint", [1.0, None], ids=["hint", "no-hint"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_a_job_of_300_requests_is_not_brought_to_a_standstill_by_random_refusals(
    share: float, hint: float | None
) -> None:
    seconds = figures("finished", rate=None, chance=share, chance_hint=hint, requests=300)
    assert max(seconds) < 600


@pytest.mark.parametrize(("share", "most"), [(0.1, 95.0), (0.2, 290.0)])
def test_random_refusals_of_short_tasks_are_seldom_taken_for_a_lack_of_places(share: float, most: float) -> None:
    seconds = figures("finished", rate=None, chance=share, chance_hint=None, lasts=2.0, lag=0.5, requests=300)
    assert statistics.fmean(seconds) < most


@pytest.mark.parametrize("hint", [1.0, None], ids=["hint", "no-hint"])
@pytest.mark.parametrize("ceiling", [None, 20.0], ids=["no-ceiling", "ceiling"])
def test_rare_refusals_by_chance_do_not_take_away_one_place_after_the_other(
    ceiling: float | None, hint: float | None
) -> None:
    long = {"places": 100, "lasts": 15.0, "lag": 1.75, "seconds": 3600.0}
    per_second = figures("per second", rate=None, chance=0.01, chance_hint=hint, ceiling=ceiling, **long)
    assert statistics.fmean(per_second) > 0.7 * 100 / 16.5


def test_rare_refusals_by_chance_do_not_turn_a_limit_on_the_rate_into_one_on_places() -> None:
    used = figures("whole used", rate=5.0, chance=0.01, lasts=15.0, lag=1.75, seconds=7200.0)
    assert statistics.fmean(used) > 0.5


def test_a_limit_is_found_though_some_are_refused_whatever_the_rate() -> None:
    assert statistics.fmean(figures("whole used", rate=5.0, chance=0.1)) > 0.45
    assert statistics.fmean(figures("whole refused", rate=5.0, chance=0.1)) < 0.25


def test_a_limit_that_was_lowered_costs_few_refusals_more() -> None:
    assert max(figures("second refused", rate=50.0, factor=0.5)) < 0.005
    assert max(figures("second refused", rate=5.0, factor=0.5)) < 0.02


def test_rare_refusals_by_chance_leave_a_client_with_a_limit_half_of_it() -> None:
    got = []
    for seed in range(1, 9):
        world = bench.World(100.0, ceiling=20.0, seconds=200.0, chance=0.01)
        got.append(len(bench.Simulation(world, ModelPace(math.inf, 1, 0.0, 20.0), seed)().accepted))
    print("seeds 1 to 8:", got)
    assert statistics.fmean(got) > 0.5 * 20 * 200


# -- What came through ----------------------------------------------------------------------------------


def trials(*rows: tuple[float, int, float]) -> Trials:
    """Of each refused rate: accepted, and per second."""
    found = Trials()
    for rate, accepted, through in rows:
        found.add(rate, accepted, through)
        found.compare()
    return found


def test_that_much_less_comes_through_at_a_lower_rate_is_noticed() -> None:
    assert trials((8, 20, 4), (4, 20, 2.5)).better() == pytest.approx((8, 4))
    assert trials((8, 20, 4), (4, 20, 2.5)).highest_rate == pytest.approx(8)


def test_under_a_limit_as_much_comes_through_at_a_lower_rate_and_none_is_better() -> None:
    assert trials((80, 40, 10), (40, 40, 9.9), (20, 40, 10), (11, 100, 9.8)).better() is None


def test_a_limit_that_was_lowered_is_seen_where_as_high_a_rate_is_tried_again() -> None:
    assert trials((11, 100, 10), (10.5, 20, 5)).better() is None
    assert trials((11, 100, 10), (10.5, 20, 5), (5.5, 20, 5)).better() is None


def test_of_a_slow_decline_in_small_steps_the_beginning_is_remembered() -> None:
    steps = [(100 * 0.95**n, 50, 90 * 0.95**n) for n in range(9)]
    assert trials(*steps).better() == pytest.approx((100, 90))


def test_what_few_accepted_say_is_put_together() -> None:
    found = trials((8, 20, 4), (4, 1, 1), (4, 2, 1))
    assert found.better() is None
    found.add(4, 2, 1)
    found.compare()
    assert found.better() == pytest.approx((8, 4))


def test_what_was_forgotten_is_not_compared() -> None:
    found = trials((8, 20, 4), (4, 4, 1))
    found.forget()
    found.add(2, 4, 1)
    found.compare()
    assert found.better() is None
    assert found.highest_rate == 0
