"""When to look next: what was seen of tasks in, ages out."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async.polling.progress import TENTHS
from evolink_async.polling.schedule import (
    LONGEST,
    SHORTEST,
    Expectation,
    Schedule,
    Sightings,
    TaskClass,
    class_of,
    may_be_early,
    shared_moment,
)

MODEL = TaskClass("image", "some-model")
ALMOST_ONE = math.nextafter(1.0, 0.0)
dice = st.floats(0, ALMOST_ONE)
Bar = Callable[[float, float], int]  # true share, age -> percent


def honest(share: float, age: float) -> int:
    return int(100 * share)


def by_the_clock(share: float, age: float) -> int:
    return min(95, int(age))


def live(expectation: Expectation, duration: float, bar: Bar | None = None, random: float = 0.5) -> list[float]:
    """Look at a task until it is over; the ages of the looks."""
    task, looks = Sightings(0.0), []
    while True:
        looks.append(expectation.next_look(task, random))
        if looks[-1] >= duration:
            expectation.over(task, looks[-1])
            return looks
        task.unfinished(looks[-1], bar(looks[-1] / duration, looks[-1]) if bar else 0)


def first_look(expectation: Expectation, random: float = 0.5) -> float:
    return expectation.next_look(Sightings(0.0), random)


def experienced(
    count: int, *, bias: float = 1.0, spread: float = 0.2, bar: Bar | None = None, task_class: TaskClass = MODEL
) -> Schedule:
    """A schedule that has seen so many tasks of an estimate of 100 s end."""
    schedule, chance = Schedule(), random.Random(1)
    for _ in range(count):
        duration = 100 * bias * math.exp(spread * chance.gauss(0, 1))
        live(schedule.expect(task_class, 100), duration, bar, chance.random())
    return schedule


def gaps(looks: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise([0.0, *looks])]


# -- A task of a model that nothing is known of ----------------------------------------------------


def test_the_first_looks_are_for_early_failures_and_most_are_around_the_estimate() -> None:
    looks = live(Schedule().expect(MODEL, 100), 130)
    assert 10 < looks[0] < 30
    assert sum(look < 50 for look in looks) <= 3
    assert sum(80 < look < 130 for look in looks) >= 4


@pytest.mark.parametrize(("kind", "usual"), [("image", 30), ("audio", 90), ("video", 180), (None, 60), ("text", 60)])
@pytest.mark.parametrize("estimate", [None, 0, -5, math.nan, -math.inf])
def test_without_a_usable_estimate_the_usual_duration_of_the_kind_counts(
    kind: str | None, usual: float, estimate: float | None
) -> None:
    looks = [first_look(Schedule().expect(TaskClass(kind, "m"), seconds)) for seconds in (estimate, usual)]
    assert looks[0] == looks[1]


def test_without_an_estimate_the_latest_of_the_same_model_counts() -> None:
    schedule = Schedule()
    schedule.expect(MODEL, 200)
    known = first_look(schedule.expect(MODEL._replace(size="50 credits"), None))
    assert known == first_look(Schedule().expect(MODEL, 200))
    assert first_look(schedule.expect(MODEL._replace(model="another"), None)) < known


@pytest.mark.parametrize("estimate", [1e9, math.inf, 3600.0])
def test_an_absurdly_long_estimate_counts_as_an_hour_and_no_gap_is_over_five_minutes(estimate: float) -> None:
    looks = live(Schedule().expect(MODEL, estimate), 10_000)
    assert looks == live(Schedule().expect(MODEL, 3600), 10_000)
    assert max(gaps(looks)) <= LONGEST


@pytest.mark.parametrize("estimate", [1e-9, 0.1, 1, 3])
def test_a_tiny_estimate_never_makes_it_look_more_than_once_a_second(estimate: float) -> None:
    assert min(gaps(live(Schedule(price=1e-9).expect(MODEL, estimate), 100))) >= SHORTEST - 1e-9


def test_tasks_that_were_submitted_together_are_looked_at_apart() -> None:
    schedule = Schedule()
    firsts = sorted(first_look(schedule.expect(MODEL, 100), share / 100) for share in range(100))
    assert len(set(firsts)) == 100
    assert firsts[-1] > 1.08 * firsts[0]


def test_a_task_that_nobody_looked_at_in_time_is_due() -> None:
    """The age to look at counts from the submission, not from now."""
    assert first_look(Schedule().expect(MODEL, 100)) < 60


# -- Bounds, whatever happens ----------------------------------------------------------------------

estimates = st.none() | st.floats() | st.sampled_from([0, -5, 1e9, 100.0])
seen = st.lists(st.tuples(st.floats(0, 500), st.integers(0, 100), dice), max_size=30)


@given(lives=st.lists(st.tuples(estimates, seen), min_size=1, max_size=4), price=st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_every_look_is_between_a_second_and_five_minutes_after_the_one_before(
    lives: list[tuple[float | None, list[tuple[float, int, float]]]], price: float
) -> None:
    schedule = Schedule(price)
    for estimate, looks in lives:
        expectation, task, age = schedule.expect(MODEL, estimate), Sightings(0.0), 0.0
        for late, progress, jitter in looks:
            due = expectation.next_look(task, jitter)
            assert math.isfinite(due)
            assert age + SHORTEST <= due * (1 + 1e-12)
            assert due <= age + LONGEST
            age = due + late
            assert 0 <= expectation.urgency(task, age) < math.inf
            task.unfinished(age, progress)
        expectation.over(task, age + 1)


@given(age=st.floats(), progress=st.integers(0, 100))
def test_ages_from_clocks_that_go_wrong_do_no_harm(age: float, progress: int) -> None:
    schedule = Schedule()
    expectation, task = schedule.expect(MODEL, 100), Sightings(0.0)
    task.unfinished(50, 40)
    task.unfinished(min(age, 1e9), progress)
    assert math.isfinite(expectation.next_look(task, 0.5))
    expectation.over(task, age)
    assert math.isfinite(first_look(expectation))


@given(price=st.floats(1e-4, 1e3), more=st.floats(1.5, 1e3))
def test_dearer_looks_are_fewer(price: float, more: float) -> None:
    cheap, dear = (len(live(Schedule(some).expect(MODEL, 100), 150)) for some in (price, price * more))
    assert dear <= cheap


@pytest.mark.parametrize("price", [0, -1, math.nan, math.inf])
def test_a_price_that_is_none_is_refused(price: float) -> None:
    schedule = Schedule()
    with pytest.raises(ValueError, match="positive and finite"):
        schedule.price = price
    with pytest.raises(ValueError, match="positive and finite"):
        Schedule(price)


def test_a_new_price_counts_from_the_next_look_on() -> None:
    schedule = Schedule(price=0.1)
    expectation, task = schedule.expect(MODEL, 100), Sightings(0.0)
    task.unfinished(80)
    cheap = expectation.next_look(task, 0.5)
    schedule.price = 1.6
    assert expectation.next_look(task, 0.5) - 80 == pytest.approx(4 * (cheap - 80), rel=0.3)


# -- Learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [0.3, 0.5, 2.0, 4.0])
def test_a_wrong_estimate_is_made_good_by_what_was_seen(bias: float) -> None:
    new, old = Schedule(), experienced(300, bias=bias)
    first, later = (live(schedule.expect(MODEL, 100), 100 * bias) for schedule in (new, old))
    assert later[-1] - 100 * bias < 10 * bias
    if bias > 1:
        assert len(later) < 0.8 * len(first)
    else:
        assert sum(look > 0.7 * 100 * bias for look in later) > sum(look > 0.7 * 100 * bias for look in first)


def test_what_was_learned_counts_in_units_of_the_estimate() -> None:
    """A clip of twice the length, and the service says so: the same law."""
    schedule = experienced(300, bias=2)
    near = [look for look in live(schedule.expect(MODEL, 50), 120) if look > 70]
    assert len(near) > 4


def test_another_model_is_not_judged_by_this_one() -> None:
    other = MODEL._replace(model="another")
    assert live(experienced(300, bias=2).expect(other, 100), 150) == live(Schedule().expect(other, 100), 150)


def test_a_new_size_starts_from_what_its_model_has_shown_and_then_goes_its_own_way() -> None:
    schedule = experienced(300, bias=2, spread=0.1)
    large = MODEL._replace(size="91 credits")
    assert len(live(schedule.expect(large, 100), 200)) < 0.8 * len(live(Schedule().expect(large, 100), 200))
    before = live(schedule.expect(MODEL, 100), 200)
    for _ in range(100):
        live(schedule.expect(large, 100), 600)
    looks = live(schedule.expect(large, 100), 600)
    assert sum(look < 400 for look in looks) < sum(look >= 400 for look in looks)
    assert live(schedule.expect(MODEL, 100), 200) == pytest.approx(before, rel=0.05)


def test_early_failures_are_learned_and_looked_for() -> None:
    schedule, chance = Schedule(), random.Random(2)
    for _ in range(400):
        duration = 20 if chance.random() < 0.3 else 100 * math.exp(0.1 * chance.gauss(0, 1))
        live(schedule.expect(MODEL, 100), duration, random=chance.random())
    assert any(20 <= look < 26 for look in live(schedule.expect(MODEL, 100), 110))


def test_models_and_sizes_are_forgotten_when_there_are_too_many() -> None:
    schedule = Schedule()
    for n in range(1000):
        schedule.expect(TaskClass("image", f"model-{n}"), 100)
        live(schedule.expect(TaskClass("video", "one-model", f"{n} credits"), 100), 100)
    models = schedule.export()["models"]
    assert len(models) == 128
    assert models[-1]["model"] == "one-model"
    assert len(models[-1]["laws"]) == 16


# -- Progress --------------------------------------------------------------------------------------


def test_an_honest_bar_is_trusted_after_a_while_and_tells_when_to_look() -> None:
    without, sure = (experienced(300, spread=0.8, bar=bar) for bar in (None, honest))
    durations = (40.0, 60.0, 100.0, 250.0, 400.0)
    blind, told = ([live(some.expect(MODEL, 100), end, honest) for end in durations] for some in (without, sure))
    assert sum(map(len, told)) < 0.8 * sum(map(len, blind))
    assert sum(looks[-1] for looks in told) - sum(durations) < 0.5 * (
        sum(looks[-1] for looks in blind) - sum(durations)
    )


def test_a_bar_made_from_the_clock_changes_nothing() -> None:
    with_bar, without = (experienced(400, spread=0.4, bar=bar) for bar in (by_the_clock, None))
    for duration in (60, 100, 250):
        looks = [
            live(copy.deepcopy(schedule).expect(MODEL, 100), duration, bar)
            for schedule, bar in ((with_bar, by_the_clock), (without, None))
        ]
        assert looks[0] == pytest.approx(looks[1], rel=0.01)


def test_a_bar_that_turns_to_lies_loses_its_trust() -> None:
    schedule = experienced(300, spread=0.4, bar=honest)
    chance = random.Random(3)

    def lie(share: float, age: float) -> int:
        return chance.randrange(1, 100)

    for _ in range(100):
        live(schedule.expect(MODEL, 100), 100 * math.exp(0.4 * chance.gauss(0, 1)), lie, chance.random())
    tenths = schedule.export()["models"][0]["progress"]
    assert all(row["gain"] < 0.05 for row in tenths)


def test_progress_of_zero_or_a_bar_that_never_moves_is_no_news() -> None:
    quiet = experienced(100, bar=lambda share, age: 0)
    assert quiet.export() == experienced(100).export()


def test_a_bar_that_jumps_about_for_hours_takes_no_memory() -> None:
    task = Sightings(0.0)
    for second in range(1, 10_000):
        task.unfinished(float(second), 1 + second * 37 % 99)
    assert len(task.readings or ()) <= 2 * TENTHS


# -- Export and restore ----------------------------------------------------------------------------


def test_a_restored_schedule_goes_on_where_the_other_one_ended() -> None:
    old = experienced(200, bias=2, spread=0.4, bar=honest)
    live(old.expect(MODEL._replace(size="8 s"), 50), 70)
    exported = json.loads(json.dumps(old.export(), allow_nan=False))
    new = Schedule()
    new.restore(exported)
    assert new.export() == exported
    looks = [live(schedule.expect(MODEL, None), 220, honest) for schedule in (old, new)]
    assert len(looks[0]) == pytest.approx(len(looks[1]), abs=1)
    assert len(looks[1]) < len(live(Schedule().expect(MODEL, 100), 220, honest))


def test_what_is_restored_stands_beside_other_models_and_replaces_the_same_one() -> None:
    schedule, other = experienced(20), MODEL._replace(model="another")
    live(schedule.expect(other, 100), 100)
    schedule.restore(experienced(50, bias=2).export())
    assert {row["model"] for row in schedule.export()["models"]} == {"some-model", "another"}
    assert schedule.export()["models"][-1] == experienced(50, bias=2).export()["models"][0]


def test_a_class_that_was_asked_for_just_before_is_expected_by_what_is_restored() -> None:
    schedule = Schedule()
    fresh = live(schedule.expect(MODEL, 100), 200)
    schedule.restore(experienced(300, bias=2).export())
    restored = Schedule()
    restored.restore(experienced(300, bias=2).export())
    assert live(schedule.expect(MODEL, 100), 200) == live(restored.expect(MODEL, 100), 200) != fresh


GOOD = json.dumps(experienced(30, bar=honest).export())


def broken(path: str, value: Any) -> Any:
    """An export with one thing changed; `path` is dotted."""
    exported: Any = json.loads(GOOD)
    place, *names = exported, *path.split(".")
    for name in names[:-1]:
        place = place[int(name) if name.isdigit() else name]
    last = int(names[-1]) if names[-1].isdigit() else names[-1]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return exported


@pytest.mark.parametrize(
    "exported",
    [
        None,
        7,
        "{}",
        [],
        {},
        {"version": 2, "models": []},
        {"version": 1},
        {"version": 1, "models": 5},
        {"version": 1, "models": [None]},
        {"version": 1, "models": {"a": 1}},
        broken("models.0.kind", 7),
        broken("models.0.model", "x" * 1000),
        broken("models.0.model", ["x"]),
        broken("models.0.estimate", "100"),
        broken("models.0.estimate", math.nan),
        broken("models.0.estimate", 10**400),
        broken("models.0.estimate", True),
        broken("models.0.estimate", 0),
        broken("models.0.laws", None),
        broken("models.0.laws", [3]),
        broken("models.0.laws.0.size", 5),
        broken("models.0.laws.0.observed", KeyError),
        broken("models.0.laws.0.observed", [1.0]),
        broken("models.0.laws.0.observed", "0" * 128),
        broken("models.0.laws.0.observed.5", -1),
        broken("models.0.laws.0.observed.5", math.nan),
        broken("models.0.laws.0.observed.5", math.inf),
        broken("models.0.laws.0.observed.5", 1e300),
        broken("models.0.laws.0.observed.5", None),
        broken("models.0.laws.0.observed.5", "1"),
        broken("models.0.progress.0.tenth", 10),
        broken("models.0.progress.0.tenth", -1),
        broken("models.0.progress.0.gain", math.inf),
        broken("models.0.progress.0.gain", 10**400),
        broken("models.0.progress.0.observed", []),
    ],
    ids=repr,
)
def test_what_is_no_export_is_refused_and_changes_nothing(exported: Any) -> None:
    schedule = experienced(20)
    before = schedule.export()
    with pytest.raises(ValueError, match="not an export of a polling schedule, start without it"):
        schedule.restore(exported)
    assert schedule.export() == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=5), some, max_size=3),
    max_leaves=5,
)
PLACES = [
    "version",
    "models",
    "models.0",
    *(f"models.0.{name}" for name in ("kind", "model", "estimate", "laws", "progress", "laws.0", "progress.0")),
    *(f"models.0.laws.0.{name}" for name in ("size", "observed", "observed.0", "observed.127")),
    *(f"models.0.progress.0.{name}" for name in ("tenth", "gain", "observed", "observed.60")),
]


@given(place=st.sampled_from(PLACES), value=json_values)
@settings(deadline=None)
def test_a_damaged_export_is_refused_or_harmless(place: str, value: Any) -> None:
    schedule = Schedule()
    try:
        schedule.restore(broken(place, value))
    except ValueError:
        return
    assert math.isfinite(live(schedule.expect(MODEL, 100), 150, honest)[-1])
    json.dumps(schedule.export(), allow_nan=False)


# -- Classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credits_reserved", "seconds", "size"),
    [
        (None, None, None),
        (50.0, None, "45.3 credits"),
        (52.5, None, "45.3 credits"),  # a longer prompt is no other class
        (100.0, None, "90.5 credits"),
        (0.05, None, "0.0442 credits"),
        (64.0, 5, "64 credits"),
        (None, 5, "5.66 s"),
        (None, 10, "11.3 s"),
        (0.0, 10, "11.3 s"),
        (0.0, 0, None),
        (-3.0, -1, None),
        (math.nan, math.inf, None),
        (1.7e308, None, None),
        (5e-324, None, "4.94e-324 credits"),
    ],
)
def test_the_class_of_a_task_is_its_model_and_about_what_it_costs(
    credits_reserved: float | None, seconds: float | None, size: str | None
) -> None:
    assert class_of("video", "m", credits_reserved, seconds) == ("video", "m", size)


def test_names_of_any_length_make_a_class_of_bounded_length() -> None:
    task_class = class_of("k" * 100_000, "m" * 100_000, 1e14, None)
    assert len(task_class.model or "") == len(task_class.kind or "") == 256
    schedule = Schedule()
    schedule.expect(task_class, None)
    Schedule().restore(schedule.export())


def test_of_an_id_alone_the_class_is_unknown() -> None:
    assert class_of(None, None, None, None) == (None, None, None)


@given(moment=st.floats(0, 1e7), now=st.floats(0, 1e7))
def test_a_shared_moment_is_a_128th_of_the_way_later_at_most_and_never_earlier_than_a_pause_allows(
    moment: float, now: float
) -> None:
    shared = shared_moment(moment, now)
    if moment > now:
        assert moment <= shared <= moment + max(1.0, moment - now) / 128
    else:
        assert moment - 1 / 128 <= shared <= moment


def test_however_many_tasks_there_are_they_share_less_than_two_thousand_moments() -> None:
    chance = random.Random(4)
    moments = set()
    for n in range(100_000):
        now = n / 10_000  # submitted over ten seconds, estimated at a minute
        moments.add(shared_moment(now + chance.uniform(10, 20), now))
        moments.add(shared_moment(now + chance.uniform(1, LONGEST), now))
    assert len(moments) < 2000


@pytest.mark.parametrize(
    ("seconds", "gap", "may"),
    [
        (-3.0, 10.0, True),  # it is late already
        (0.0, SHORTEST, True),
        (3.3, 10.0, True),
        (3.4, 10.0, False),
        (90.0, LONGEST, True),
        (0.3, SHORTEST, True),
        (0.4, SHORTEST, False),
    ],
)
def test_a_look_gives_up_a_third_of_its_gap_to_share_a_request(seconds: float, gap: float, may: bool) -> None:
    assert may_be_early(seconds, gap) is may
