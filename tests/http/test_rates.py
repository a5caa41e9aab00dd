"""What is learned of a limit that nobody published: pure, in numbers. The service is that of `benchmarks/pace.py`."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from typing import Any

import pytest
from pace_bench import BENCHMARKS, bench

from evolink_async import RetryPolicy
from evolink_async.http.evidence import Climb
from evolink_async.http.model_pace import START_BURST, START_RATE, ModelPace

POLICY = RetryPolicy()


def figures(seed: int = 1, **world: Any) -> dict[str, float]:
    found: dict[str, float] = bench.figures(bench.Case(bench.World(**world), seed=seed))
    print(f"seed {seed}, {world}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    assert found["early"] == 0  # nothing is sent in a cool-down
    return found


# -- The rate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", bench.STYLES)
@pytest.mark.parametrize("seed", [1, 2])
def test_97_percent_of_a_hidden_limit_are_used_and_few_refused_also_after_it_was_halved(style: Any, seed: int) -> None:
    found = figures(seed, rate=50.0, factor=0.5, style=style)
    assert found["whole used"] > 0.97
    assert found["second used"] > 0.97
    assert found["whole refused"] < 0.005
    assert found["second refused"] < 0.006
    assert found["steady refused"] < 0.006


@pytest.mark.parametrize(
    ("rate", "used", "steady_refused"),
    [(0.5, 0.87, 0.005), (2.0, 0.92, 0.005), (5.0, 0.96, 0.005), (200.0, 0.96, 0.002)],
)
def test_slow_and_fast_limits_are_found_too(rate: float, used: float, steady_refused: float) -> None:
    found = figures(rate=rate, factor=0.5, seconds=600.0 if rate >= 5 else 3000.0)
    assert found["whole used"] > used
    assert found["steady refused"] < steady_refused


@pytest.mark.parametrize(("store", "used"), [(10.0, 0.9), (500.0, 0.97)])
def test_a_limiter_that_stores_less_or_more_is_no_obstacle(store: float, used: float) -> None:
    found = figures(rate=50.0, store=store, factor=0.5)
    assert found["whole used"] > used
    assert found["whole refused"] < 0.012
    assert found["steady refused"] < 0.003


@pytest.mark.parametrize(("hint", "used"), [(5.0, 0.95), (60.0, 0.85)])
def test_the_longer_the_pauses_that_refusals_cost_the_rarer_they_become(hint: float, used: float) -> None:
    found = figures(rate=5.0, seconds=7200.0, least_hint=hint)
    assert found["whole used"] > used
    assert found["second refused"] < 0.001


def test_a_limit_that_was_raised_is_noticed() -> None:
    found = figures(rate=50.0, factor=4.0)
    assert found["second used"] > 0.8
    assert found["second refused"] < 0.005


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("rate", [0.03, 0.1])
def test_a_slow_limit_that_was_raised_is_noticed_soon_too(rate: float, seed: int) -> None:
    found = figures(seed, rate=rate, factor=10.0, seconds=28800.0)
    assert found["second used"] > 0.5
    assert found["second refused"] < 0.01


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("hint", [1.0, None])
def test_refusals_by_mere_chance_do_not_slow_it_down_for_good(hint: Any, seed: int) -> None:
    found = figures(seed, rate=None, chance=0.01, chance_hint=hint, ceiling=500.0)
    assert found["per second"] > 30  # with pauses of a second nobody gets more than a hundred


def test_the_rate_of_a_client_with_a_limit_never_exceeds_it() -> None:
    world = bench.World(100.0, ceiling=20.0, seconds=200.0, chance=0.01)
    run = bench.Simulation(world, policy := ModelPace(math.inf, 1, 0.0, 20.0), 1)()
    assert len(run.accepted) > 0.25 * 20 * 200  # how much in the mean: `test_rates_by_chance.py`
    assert policy.rate <= 20


def test_a_learned_rate_is_where_the_next_search_begins() -> None:
    world = bench.World(50.0, seconds=100.0)
    run = bench.Simulation(world, ModelPace(49.0, 1, 0.0, refused=52.0), 1)()
    assert len(run.accepted) > 0.97 * 50 * 100
    assert len(run.refused) < 0.004 * 50 * 100


def asked(pace: ModelPace, count: int, apart: float, begin: float = 0.0) -> float:
    """So many requests, each accepted at once. Gives the moment of the last."""
    moment = begin
    for _ in range(count):
        moment = max(moment + apart, pace.ready_at(moment))
        pace.sent(moment)
        pace.accepted(moment)
        pace.landed()
    return moment


def test_who_does_not_use_the_rate_learns_nothing_about_a_higher_one() -> None:
    pace = ModelPace(START_RATE, START_BURST, 0.0)
    asked(pace, 1000, 2.0)
    assert pace.rate < 2 * START_RATE


def test_after_a_refusal_it_is_slower_and_recovers() -> None:
    pace = ModelPace(START_RATE, START_BURST, 0.0)
    end = asked(pace, 300, 0.0)
    fast = pace.rate
    assert fast > 50
    pace.sent(end)
    pace.refused(end + 0.1, end, 1.0, POLICY, 0.5)
    assert pace.ready_at(end + 0.1) >= end + 1.1
    slow = pace.rate
    assert slow < 0.6 * fast
    pace.landed()
    asked(pace, 5000, 0.0, end + 1.2)
    assert pace.rate > fast


def test_the_refusals_of_one_volley_are_one_refusal() -> None:
    pace = ModelPace(50.0, 1, 0.0)
    for _ in range(50):
        pace.sent(0.0)
    for _ in range(50):
        pace.refused(0.1, 0.0, None, POLICY, 1.0)
        pace.landed()
    assert pace.cool_until <= 0.1 + 0.5
    assert pace.rate >= 0.45 * 50


def test_a_pause_that_was_too_short_says_nothing_about_the_rate_and_the_next_is_longer() -> None:
    pace = ModelPace(START_RATE, START_BURST, 0.0)
    asked(pace, 3, 0.0)
    pauses, moment = [], 0.0
    for _ in range(6):
        moment = pace.ready_at(moment)
        pace.sent(moment)
        pace.refused(moment + 0.1, moment, None, POLICY, 1.0)
        pace.landed()
        pauses.append(pace.cool_until - moment)
    assert pauses[-1] > 10
    assert pace.rate > 0.4 * START_RATE


def test_rare_requests_of_which_some_are_refused_do_not_bring_it_to_a_standstill() -> None:
    pace = ModelPace(START_RATE, START_BURST, 0.0)
    moment = 0.0
    for number in range(3000):
        moment = max(moment + 30.0, pace.ready_at(moment))
        pace.sent(moment)
        if number % 50 == 7:
            pace.refused(moment + 0.1, moment, 1.0, POLICY, 0.5)
        else:
            pace.accepted(moment + 0.1)
        pace.landed()
    assert pace.rate > 1


def test_the_first_after_a_pause_is_not_waited_for_for_ever() -> None:
    pace = ModelPace(START_RATE, START_BURST, 0.0)
    pace.sent(0.0)
    pace.refused(0.1, 0.0, 1.0, POLICY, 0.5)
    pace.landed()
    first = pace.ready_at(0.1)
    pace.sent(first)
    assert first + 1 < pace.ready_at(first) < first + 3


def test_a_climb_is_slow_near_what_was_refused_and_bold_far_beyond() -> None:
    climb = Climb(80.0)
    climb.begin(80.0, 100.0, 20, 100)
    levels = []
    for _ in range(320):
        climb.grow()
        levels.append(climb.level)
    assert levels == sorted(levels)
    assert levels[19] == pytest.approx(100)
    assert levels[69] < 102  # half of its patience later
    assert levels[119] == pytest.approx(110)
    assert levels[319] > 300


# -- The places -----------------------------------------------------------------------------------------

FEW_PLACES = {"rate": None, "places": 20, "lasts": 30.0, "lag": 2.0}


@pytest.mark.parametrize("style", bench.STYLES)
def test_the_number_of_tasks_that_may_run_is_learned(style: Any) -> None:
    found = figures(**FEW_PLACES, requests=1000, style=style)
    assert found["refused"] < 0.02
    assert found["finished"] < 1.2 * (1000 / 20 + 1) * 31


def test_with_places_and_rate_both_limited_both_are_learned() -> None:
    found = figures(**FEW_PLACES | {"rate": 5.0, "places": 60}, requests=1500)
    assert found["refused"] < 0.02
    assert found["finished"] < 1.2 * (1500 / 60 + 1) * 31


def test_a_limit_on_the_rate_is_not_taken_for_one_on_the_places() -> None:
    for rate, lasts in ((2.0, 60.0), (50.0, 5.0), (50.0, 100.0)):
        world = bench.World(rate, lasts=lasts, lag=2.0, requests=2000)
        bench.Simulation(world, policy := ModelPace(START_RATE, START_BURST, 0.0), 1)()
        assert math.isinf(policy.cap), (rate, lasts, policy.cap)


@pytest.mark.parametrize(("rate", "lasts"), [(0.5, 10.0), (1.0, 3.0), (2.0, 1.0)])
@pytest.mark.parametrize("style", ["seconds", None])
def test_a_slow_rate_with_few_tasks_running_is_not_taken_for_a_lack_of_places(
    rate: float, lasts: float, style: Any
) -> None:
    """As many run as ever, about as many ended as were accepted, and between two refusals there are just a few."""
    for seed in range(1, 9):
        world = bench.World(rate, seconds=600 / rate, lasts=lasts, lag=0.15 * lasts, style=style)
        bench.Simulation(world, policy := ModelPace(START_RATE, START_BURST, 0.0), seed)()
        assert math.isinf(policy.cap), (seed, policy.cap)


def test_a_slow_rate_that_is_halved_is_not_taken_for_a_lack_of_places() -> None:
    """Refusals are frequent then, so each says little: as few were accepted as ended, as many ran as just before."""
    used = []
    for seed in range(1, 13):
        world = bench.World(2.0, factor=0.5, seconds=1200.0, lasts=10.0, lag=1.5)
        run = bench.Simulation(world, ModelPace(START_RATE, START_BURST, 0.0), seed)()
        used.append(sum(moment >= 780.0 for moment in run.accepted) / 420.0)
    print("seeds 1 to 12:", used)
    assert min(used) > 0.8


@pytest.mark.parametrize("lasts", [3.0, 15.0, 100.0])
@pytest.mark.parametrize("style", ["seconds", None])
def test_that_only_one_task_may_run_is_learned(lasts: float, style: Any) -> None:
    for seed in (1, 2, 3):
        found = figures(seed, rate=None, places=1, lasts=lasts, lag=0.05 * lasts, seconds=150 * lasts, style=style)
        assert found["second used"] > 0.8
        assert found["second refused"] < 0.5


@pytest.mark.parametrize(
    ("places", "later", "lasts", "used"),
    [(1, 50, 15.0, 0.5), (1, 50, 100.0, 0.6), (2, 50, 100.0, 0.6), (5, 50, 100.0, 0.6), (20, 100, 100.0, 0.6)],
)
def test_a_limit_on_running_tasks_that_was_lifted_is_noticed_soon(
    places: int, later: int, lasts: float, used: float
) -> None:
    for seed in (1, 2, 3):
        world = {"rate": None, "places": places, "later_places": later, "lasts": lasts, "lag": 0.05 * lasts}
        found = figures(seed, seconds=14400.0 if lasts > 50 else 7200.0, **world)
        assert found["second used"] > used
        assert found["second refused"] < 0.02


@pytest.mark.parametrize("places", [2, 3, 5, 10])
def test_a_job_whose_service_runs_few_tasks_at_once_takes_little_longer_than_it_must(places: int) -> None:
    rounds = 60
    for seed in range(1, 7):
        found = figures(seed, rate=None, places=places, lasts=60.0, lag=4.0, requests=places * rounds)
        assert found["finished"] < 1.18 * rounds * 62  # with the mean of what they last


def test_places_that_run_out_again_and_again_leave_the_rate_what_it_is() -> None:
    world = bench.World(None, places=5, lasts=3.0, lag=0.5, seconds=7200.0, style=None)
    run = bench.Simulation(world, policy := ModelPace(START_RATE, START_BURST, 0.0), 1)()
    assert len(run.refused) > 10
    assert policy.rate > 2 * 5 / 3


def test_places_learned_before_are_soon_found_to_be_more() -> None:
    world = bench.World(None, places=50, lasts=30.0, lag=1.5, seconds=7200.0)
    run = bench.Simulation(world, ModelPace(1.0, 1, 0.0, refused=1.0, cap=1.0), 1)()
    assert sum(at >= 3600.0 for at in run.accepted) > 0.7 * 3600 * 50 / 32


@pytest.mark.parametrize("style", ["seconds", None])
def test_a_rate_that_is_just_what_the_places_let_through_is_not_taken_for_a_limit_for_good(style: Any) -> None:
    """Few were never sent then: whether a refusal was for the rate or for the places only a try tells."""
    used, caps = [], []
    for seed in range(1, 9):
        world = bench.World(**FEW_PLACES, seconds=3600.0, style=style)
        run = bench.Simulation(world, policy := ModelPace(0.6, 1, 0.0, refused=0.62), seed)()
        used.append(sum(moment >= 1800.0 for moment in run.accepted) / (1800.0 * 20 / 32))
        caps.append(policy.cap)
    print(f"seeds 1 to 8: {used}, {caps}")
    assert statistics.fmean(used) > 0.88
    assert sum(16 <= cap <= 25 for cap in caps) >= 7


@pytest.mark.parametrize(
    ("accepted", "again", "for_places"),
    [(8, False, True), (3, False, False), (8, True, False)],
    ids=["a try", "too few since to know what is usual", "the pause was too short, as where a minute is used up"],
)
def test_a_try_for_one_more_tells_that_a_refusal_in_a_steady_flow_was_for_the_places(
    accepted: int, again: bool, for_places: bool
) -> None:
    pace = ModelPace(1.0, 1, 0.0, refused=1.0)
    now, running = 0.0, []

    def flow(count: int) -> None:  # with ten that run, one of which ends before the next is sent
        nonlocal now
        for _ in range(count):
            now += 1.0
            if len(running) == 10:
                pace.ended(now)
                running.pop()
            pace.sent(now)
            pace.accepted(now, f"task {now}")
            pace.watch(f"task {now}")
            pace.landed()
            running.append(now)

    def refuse(after: float) -> None:
        nonlocal now
        now += after
        pace.sent(now)
        pace.refused(now, now, 1.0, POLICY, 0.5)
        pace.landed()

    flow(40)
    refuse(1.0)
    assert math.isinf(pace.cap)
    if again:
        refuse(1.5)
    now += 1.0
    flow(accepted)
    refuse(5.0)
    assert math.isinf(pace.cap) is not for_places


@pytest.mark.parametrize(("gap", "kept"), [(10.0, True), (0.5, False)])
def test_a_request_that_tries_one_place_more_says_nothing_of_the_rate_only_if_it_goes_well_apart(
    gap: float, kept: bool
) -> None:
    pace = ModelPace(5.0, 1, 0.0, refused=5.0, cap=2.0)
    now = 0.0
    for number in range(1000):  # one ends every ten seconds, and another follows
        now += 10.0
        if number > 1:
            pace.ended(now)
        pace.sent(now)
        pace.accepted(now, f"task {number}")
        pace.watch(f"task {number}")
        pace.landed()
        if pace.cap == 3:
            break
    assert pace.running == 2
    assert pace.ready_at(now + 0.5) == pytest.approx(now + 10.0, abs=1.0)
    rate = pace.rate
    pace.sent(now + gap)
    pace.refused(now + gap + 0.1, now + gap, 1.0, POLICY, 0.5)
    pace.landed()
    assert pace.cap == 2
    assert (pace.rate == rate) is kept


def full(cap: float) -> ModelPace:
    """A model of which as many tasks run as may."""
    pace = ModelPace(1000.0, 1, 0.0, refused=1000.0, cap=cap)
    for number in range(int(cap)):
        pace.sent(0.0)
        pace.accepted(0.0, f"task {number}", 500.0)
        pace.landed()
    return pace


def end(pace: ModelPace, task_id: str, now: float) -> None:
    """This task is watched, and ends."""
    assert pace.watch(task_id)
    pace.ended(now)


def test_nothing_is_sent_while_as_many_run_as_may_and_one_that_ends_makes_room() -> None:
    pace = full(5)
    assert pace.ready_at(10.0) == 500.0
    end(pace, "task 3", 10.0)
    assert not pace.watch("task 3")
    assert pace.ready_at(10.0) <= 10.0
    pace.sent(10.0)
    assert pace.ready_at(11.0) == 500.0  # the one under way counts already
    pace.landed()
    assert pace.ready_at(11.0) <= 11.0  # it came to nothing


def test_tasks_that_must_have_ended_are_forgotten_where_their_places_are_needed() -> None:
    pace = full(5)
    assert pace.ready_at(499.0) == 500.0
    assert pace.ready_at(500.0) <= 500.0
    assert pace.running == 0


def test_tasks_that_nobody_watches_do_not_pile_up_where_no_limit_on_places_is_known() -> None:
    pace = ModelPace(1000.0, 1, 0.0)
    most = 0
    for moment in range(100_000):
        pace.sent(moment)
        pace.accepted(moment, f"task {moment}", moment + 300.0)
        pace.landed()
        most = max(most, pace.running)
    assert most <= 310


def test_a_watched_task_keeps_its_place_for_as_long_as_it_runs() -> None:
    pace = full(2)
    assert pace.watch("task 0")
    assert pace.watch("task 1")
    assert pace.ready_at(5000.0) == math.inf
    pace.ended(5000.0)
    assert pace.ready_at(5000.0) <= 5000.0
    assert pace.running == 1


def test_a_task_that_is_watched_no_more_is_believed_in_for_a_while() -> None:
    pace = full(1)
    assert pace.watch("task 0")
    pace.unwatch("task 0", 700.0)
    assert pace.ready_at(699.0) == 700.0
    assert pace.ready_at(700.0) <= 700.0
    assert pace.running == 0


def test_a_timer_that_fires_a_hair_early_makes_no_room_for_all_that_wait() -> None:
    """The first that might be forgotten has ended long ago, and the others run on."""
    pace = full(2)
    end(pace, "task 0", 10.0)
    pace.sent(10.0)
    pace.accepted(10.0, "another", 900.0)
    pace.landed()
    end(pace, "task 1", 20.0)
    pace.sent(20.0)
    pace.accepted(20.0, "one more", 900.0)
    pace.landed()
    early = pace.ready_at(20.0) - 4e-6
    assert pace.ready_at(early) == 900.0
    assert pace.ready_at(900.0 - 4e-6) <= 900.0


def test_the_places_grow_only_while_they_are_used_up() -> None:
    pace = full(100)
    cap, moment = pace.cap, 1.0
    for number in range(1000):  # never more than half
        end(pace, f"task {number}", moment)
        if number >= 50:
            pace.sent(moment)
            pace.accepted(moment, f"task {number + 50}", 1e9)
            pace.landed()
        moment += 1
    assert pace.cap == cap
    while pace.ready_at(moment) <= moment:
        pace.sent(moment)
        pace.accepted(moment, f"more {moment}", 1e9)
        pace.landed()
        moment += 1
    for number in range(500):  # and now all of them
        end(pace, next(iter(pace._unwatched)), moment)
        pace.sent(moment)
        pace.accepted(moment, f"even more {number}", 1e9)
        pace.landed()
        moment += 1
    assert pace.cap > cap


# -- The benchmarks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pace", "makespan"])
def test_the_benchmark_runs(name: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json"]
    subprocess.run(command, check=True, capture_output=True, timeout=550)
