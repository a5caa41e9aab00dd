"""When to look next: numbers in, numbers out."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async.polling.schedule import LONGEST_ESTIMATE, SHORTEST, EstimateSchedule, Sighting

LAW = EstimateSchedule()
ALMOST_ONE = math.nextafter(1.0, 0.0)


def sighting(
    age: float, estimate: float | None = 100.0, *, kind: str | None = "image", looked: bool = True
) -> Sighting:
    return Sighting(
        model="some-model", kind=kind, age=age, estimate=estimate, progress=0, since_last=1.0 if looked else None
    )


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (0, 25),  # early failures
        (10, 15),
        (22, 3),
        (22.5, 37.5),  # so close to the early look that it counts as done
        (25, 35),
        (50, 10),
        (53.9, 6.1),
        (54, 5),  # so close to 60 % that from here on it is every 5 %
        (60, 5),
        (100, 5),
        (10_000, 5),
    ],
)
def test_looks_come_at_25_and_60_percent_and_then_every_5_percent(age: float, expected: float) -> None:
    assert LAW.next_look(sighting(age), 0.0) == pytest.approx(expected)


def test_the_spread_makes_looks_earlier_by_a_tenth_at_most_and_never_later() -> None:
    for age in (0, 25, 60, 200):
        latest = LAW.next_look(sighting(age), 0.0)
        looks = [LAW.next_look(sighting(age), share / 100) for share in range(100)]
        assert len(set(looks)) == 100
        assert max(looks) == latest
        assert age + min(looks) >= 0.9 * (age + latest) - 1e-9


@pytest.mark.parametrize(("kind", "usual"), [("image", 30), ("audio", 90), ("video", 180), (None, 60), ("text", 60)])
@pytest.mark.parametrize("estimate", [None, 0, -5, math.nan, -math.inf])
def test_without_a_usable_estimate_the_usual_duration_of_the_kind_counts(
    kind: str | None, usual: float, estimate: float | None
) -> None:
    assert LAW.next_look(sighting(0, estimate, kind=kind), 0.0) == pytest.approx(usual / 4)


@pytest.mark.parametrize("estimate", [1e9, math.inf, 3600.0])
def test_an_absurdly_long_estimate_counts_as_an_hour(estimate: float) -> None:
    assert LAW.next_look(sighting(0, estimate), 0.0) == pytest.approx(900)
    assert LAW.next_look(sighting(3000, estimate), 0.0) == pytest.approx(180)


@pytest.mark.parametrize("estimate", [1e-9, 0.1, 1, 3])
def test_a_tiny_estimate_never_makes_it_look_more_than_once_a_second(estimate: float) -> None:
    assert LAW.next_look(sighting(0, estimate), ALMOST_ONE) == SHORTEST
    assert LAW.next_look(sighting(5, estimate), ALMOST_ONE) == SHORTEST


def test_a_task_that_nobody_looked_at_and_that_is_due_is_looked_at_now() -> None:
    assert LAW.next_look(sighting(60, looked=False), 0.5) == 0
    assert LAW.next_look(sighting(1e6, looked=False), 0.5) == 0
    assert LAW.next_look(sighting(30, looked=False), 0.0) == pytest.approx(30)


numbers = st.floats(0, 1e7, allow_nan=False)


@given(
    age=numbers,
    estimate=st.none() | st.floats(),
    kind=st.sampled_from([None, "image", "audio", "video", "else"]),
    looked=st.booleans(),
    random=st.floats(0, ALMOST_ONE),
)
def test_every_look_is_bounded_whatever_is_known(
    age: float, estimate: float | None, kind: str | None, looked: bool, random: float
) -> None:
    wait = LAW.next_look(sighting(age, estimate, kind=kind, looked=looked), random)
    assert math.isfinite(wait)
    assert wait >= (SHORTEST if looked else 0)
    assert wait <= 0.6 * LONGEST_ESTIMATE


@given(estimate=st.floats(1e-3, LONGEST_ESTIMATE), share=st.floats(0.6, 50), random=st.floats(0, ALMOST_ONE))
def test_past_60_percent_the_next_look_is_at_most_5_percent_away(estimate: float, share: float, random: float) -> None:
    wait = LAW.next_look(sighting(share * estimate, estimate), random)
    assert SHORTEST <= wait <= max(SHORTEST, 0.05 * estimate)


@given(estimate=st.floats(10, LONGEST_ESTIMATE), randoms=st.lists(st.floats(0, ALMOST_ONE), min_size=40, max_size=40))
def test_a_whole_life_takes_two_early_looks_and_a_steady_rest(estimate: float, randoms: list[float]) -> None:
    age, looks = 0.0, []
    for number, random in enumerate(randoms):
        age += LAW.next_look(sighting(age, estimate, looked=number > 0), random)
        looks.append(age / estimate)
    assert sum(look < 0.5 for look in looks) == 1
    assert 0.2 <= looks[0] <= 0.25 + 1e-9
    assert 0.53 <= looks[1] <= 0.6 + 1e-9
    assert all(later > earlier for earlier, later in itertools.pairwise(looks))
