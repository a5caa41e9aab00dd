"""How long tasks take, from looks that only tell "not yet" or "over"."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async.polling.law import BINS, DurationLaw, _place, chance

ages = st.floats(0, 100) | st.floats(0, 1e9)
prices = st.floats(1e-7, 0.25)
intervals = st.tuples(ages, st.floats(0, 10)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def learned(observed: list[tuple[float, float]]) -> DurationLaw:
    law = DurationLaw()
    for low, high in observed:
        law.observe(low, high)
    return law


laws = st.lists(intervals, max_size=60).map(learned)


def lognormal(count: int, *, middle: float = 1.0, spread: float = 0.2, seed: int = 1) -> list[tuple[float, float]]:
    """Observations of tasks that were looked at often."""
    dice = random.Random(seed)
    durations = [middle * math.exp(spread * dice.gauss(0, 1)) for _ in range(count)]
    return [(0.98 * duration, 1.02 * duration) for duration in durations]


def looks(law: DurationLaw, price: float, until: float = 5.0) -> list[float]:
    """When a task is looked at that doesn't end."""
    found, age = [], 0.0
    while age < until:
        age = law.next_look(age, price)
        found.append(age)
    return found


@given(law=laws, age=ages)
def test_whatever_was_seen_shares_and_hazards_are_shares_and_hazards(law: DurationLaw, age: float) -> None:
    assert law.survival(0) == 1
    steps = [law.survival(age / 100 * step) for step in range(101)]
    assert all(1 >= before >= after >= 0 for before, after in itertools.pairwise(steps))
    assert 0 <= law.root_hazard(age) < math.inf
    assert 0 < chance(law.survival(age) - law.survival(2 * age), law.survival(age / 2)) <= 1 + 1e-9


@given(law=laws, age=ages, price=prices)
def test_the_next_look_is_later_and_finite(law: DurationLaw, age: float, price: float) -> None:
    assert age <= law.next_look(age, price) < math.inf


@given(law=laws, age=ages, price=prices, dearer=st.floats(1, 100))
def test_dearer_looks_are_further_apart(law: DurationLaw, age: float, price: float, dearer: float) -> None:
    """Where none comes early: a longer step may have room for one, which then comes before the end of the shorter."""
    longer, shorter = (law._after(age, _place(age), math.sqrt(2 * each)) for each in (min(0.25, price * dearer), price))
    assert longer >= shorter


def test_a_first_look_that_was_asked_for_before_follows_what_is_learned_since() -> None:
    law = DurationLaw()
    usual = law.first_look(0.05, 0.5)
    for _ in range(200):
        law.observe(0.05, 0.06)  # half of them fail early
        law.observe(0.95, 1.05)
    assert law.first_look(0.05, 0.5) == DurationLaw(law.export()).first_look(0.05, 0.5) < 0.1 < usual


@given(law=laws)
def test_what_is_exported_makes_an_equal_law(law: DurationLaw) -> None:
    exported = law.export()
    again = DurationLaw(exported)
    assert again.export() == exported
    assert len(exported) == BINS


def test_a_law_that_was_exported_and_read_looks_when_the_old_one_did() -> None:
    law = learned(lognormal(500))
    law.observe(0.9, 1.0)
    law = DurationLaw(law.export())  # up to date
    assert looks(DurationLaw(law.export()), 0.003) == pytest.approx(looks(law, 0.003))


@pytest.mark.parametrize("middle", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.1, 0.4, 0.8])
def test_the_share_that_takes_longer_is_learned(middle: float, spread: float) -> None:
    law = learned(lognormal(1000, middle=middle, spread=spread))
    for share, normal in ((0.9, -1.28), (0.5, 0.0), (0.1, 1.28)):
        assert law.survival(middle * math.exp(spread * normal)) == pytest.approx(share, abs=0.06)


def test_a_wide_interval_counts_where_tasks_are_known_to_end() -> None:
    law = learned(lognormal(200, spread=0.05))
    for _ in range(200):
        law.observe(0.97, 2.0)
    assert law.survival(0.97) > 0.75
    assert law.survival(1.15) < 0.08


def test_an_interval_that_all_tasks_end_in_teaches_nothing() -> None:
    law = learned(lognormal(50))
    before = law.export()
    law.observe(0.0, 1e6)
    assert law.export() == before


def test_two_kinds_of_tasks_are_looked_at_at_both_ends_and_seldom_between() -> None:
    law = learned([*lognormal(300, middle=0.4, spread=0.05), *lognormal(300, middle=2.0, spread=0.05)])
    seen = looks(law, 0.001)
    at_first, between, at_last = (
        sum(low <= look < high for look in seen) for low, high in ((0.3, 0.5), (0.55, 1.7), (1.75, 2.3))
    )
    assert at_first + at_last >= 5
    assert min(at_first, at_last) >= 2
    assert between <= 2


def test_where_many_end_early_the_look_comes_right_after_them_and_not_a_step_later() -> None:
    law = learned([(0.19, 0.2)] * 100 + [(0.99, 1.0)] * 900)
    first = law.next_look(0.0, 0.02)
    assert 0.18 < first < 0.3


def test_four_times_the_price_means_half_the_looks() -> None:
    law = learned(lognormal(500, spread=0.4))
    often, seldom = (sum(0.4 < look < 2 for look in looks(law, price)) for price in (0.0005, 0.002))
    assert often == pytest.approx(2 * seldom, rel=0.2)


def test_a_task_that_outlives_all_others_is_looked_at_in_gaps_that_grow_with_its_age() -> None:
    law = learned(lognormal(500, spread=0.1))
    seen = looks(law, 0.002, until=200)
    late = [(before, after) for before, after in itertools.pairwise(seen) if before > 2]
    assert late
    assert all(after - before < 0.3 * before for before, after in late)


def test_what_the_world_no_longer_does_is_forgotten() -> None:
    law = learned(lognormal(2000))
    for low, high in lognormal(100, middle=2.0, seed=2):
        law.observe(low, high)
    assert law.survival(1.4) > 0.6


def test_the_latest_five_hundred_observations_count() -> None:
    law = learned(lognormal(3000, spread=0.4))
    assert 450 < sum(law.export()) <= 501
    for low, high in lognormal(1500, spread=0.4, middle=1.5):  # not so far off that all is forgotten at once
        law.observe(low, high)
    assert law.survival(1.5) == pytest.approx(0.5, abs=0.08)


def test_what_is_seldom_is_no_reason_to_forget() -> None:
    """Early failures, one in twenty."""
    dice = random.Random(3)
    law = learned(lognormal(1000))
    for low, high in lognormal(1000, seed=4):
        law.observe(*((0.1, 0.12) if dice.random() < 0.05 else (low, high)))
    assert sum(law.export()) > 400
    assert 1 - law.survival(0.3) == pytest.approx(0.05, abs=0.02)


def test_an_heir_starts_from_what_was_learned_and_changes_its_mind_sooner() -> None:
    law = learned(lognormal(1000, middle=2.0))
    heir = law.heir(30)
    assert sum(heir.export()) == pytest.approx(30, abs=0.1)
    assert heir.survival(1.4) > 0.8
    for low, high in lognormal(60, middle=0.7):
        heir.observe(low, high)
    assert heir.survival(1.2) < 0.3
    assert law.survival(1.4) > 0.9  # is not the heir's


def test_the_heir_of_a_law_that_saw_nothing_knows_nothing() -> None:
    assert DurationLaw().heir(30).export() == DurationLaw().export()
