"""The price of a look, from how many there may be."""

from __future__ import annotations

import heapq
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async.polling.price import price_for
from evolink_async.polling.schedule import SHORTEST, Schedule, Sightings, TaskClass

urgencies = st.lists(st.just(0.0) | st.floats(1e-6, 10), min_size=1, max_size=50)
budgets = st.floats(1e-3, 1e4)


def looks_per_second(urgencies: list[float], outstanding: int, price: float) -> float:
    """What that price comes to, by its definition."""
    some = [min(1 / SHORTEST, urgency / math.sqrt(2 * price)) for urgency in urgencies]
    return outstanding * sum(some) / len(some)


@given(urgencies=urgencies, outstanding=st.integers(1, 100_000), budget=budgets)
def test_the_price_uses_up_the_budget_or_there_is_none(urgencies: list[float], outstanding: int, budget: float) -> None:
    price = price_for(urgencies, outstanding, budget)
    if price > 0:
        assert looks_per_second(urgencies, outstanding, price) == pytest.approx(budget, rel=1e-6)
    else:
        assert outstanding * sum(urgency > 0 for urgency in urgencies) / len(urgencies) / SHORTEST <= budget * (
            1 + 1e-9
        )


@given(urgencies=urgencies, budget=budgets, more=st.floats(1, 100))
def test_a_larger_budget_is_never_dearer_and_more_tasks_never_cheaper(
    urgencies: list[float], budget: float, more: float
) -> None:
    price = price_for(urgencies, 1000, budget)
    assert price_for(urgencies, 1000, budget * more) <= price * (1 + 1e-9)
    assert price_for(urgencies, int(1000 * more), budget) >= price * (1 - 1e-9)


def test_without_tasks_looks_are_free() -> None:
    assert price_for([], 0, 10) == 0
    assert price_for([0.0, 0.0], 100, 10) == 0


@pytest.mark.parametrize("budget", [0, -1, math.nan])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="polls_per_second must be positive"):
        price_for([0.1], 1, budget)


def test_a_thousand_tasks_at_the_price_of_a_budget_use_that_budget() -> None:
    """Tasks of 100 s that are replaced as they end; 40 looks a second, four for each task."""
    dice, budget, outstanding = random.Random(5), 40.0, 1000
    schedule, task_class = Schedule(), TaskClass("image", "a-model")

    expectation = schedule.expect(task_class, 100)

    def fresh(began: float) -> tuple[float, Sightings]:
        return began + 100 * math.exp(0.2 * dice.gauss(0, 1)), Sightings(began)

    tasks = [fresh(dice.uniform(-100, 0)) for _ in range(outstanding)]
    due = [(max(0.0, expectation.next_look(task, dice.random())), n) for n, (_, task) in enumerate(tasks)]
    heapq.heapify(due)
    used, second = 0, 0
    while due[0][0] < 400:
        now, n = heapq.heappop(due)
        if now > second:
            sample = [expectation.urgency(task, now) for _, task in dice.sample(tasks, 300)]
            schedule.price = max(0.01, price_for(sample, outstanding, budget))
            second += 1
        used += now > 200
        ends, task = tasks[n]
        if now >= ends:
            expectation.over(task, now)
            tasks[n] = fresh(now)
        else:
            task.unfinished(now)
        heapq.heappush(due, (expectation.next_look(tasks[n][1], dice.random()), n))
    assert used / 200 == pytest.approx(budget, rel=0.15)
