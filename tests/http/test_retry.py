"""When a call is made again: the arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest

from evolink_async import ConfigurationError, RetryPolicy
from evolink_async.http.retry import Replays


@pytest.mark.parametrize(
    ("attempt", "hint", "delay"),
    [(1, None, 0.5), (2, None, 1), (3, None, 2), (7, None, 30), (1000, None, 30), (1, 0.0, 0.5), (3, 1.5, 2.0)],
)
def test_the_back_off_doubles_up_to_its_end(attempt: int, hint: float | None, delay: float) -> None:
    assert RetryPolicy().delay(attempt, hint, 1.0) == delay


@pytest.mark.parametrize("random", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("attempt", [1, 2, 5, 60])
def test_jitter_takes_at_most_half_and_a_hint_is_never_undercut(attempt: int, random: float) -> None:
    policy = RetryPolicy(base_delay=1, max_delay=20)
    ceiling = min(20, 2.0 ** (attempt - 1))
    assert ceiling / 2 <= policy.delay(attempt, None, random) <= ceiling
    for hint in (0.0, 0.5, 7.0, 60.0, 3600.0):
        assert hint <= policy.delay(attempt, hint, random) <= max(ceiling, hint + 1)


@pytest.mark.parametrize("hint", [None, 0.0, 7.0, 60.0])
def test_a_thousand_who_were_refused_in_one_second_do_not_come_back_in_one_moment(hint: float | None) -> None:
    delays = [RetryPolicy().delay(3, hint, number / 1000) for number in range(1000)]
    assert max(delays) - min(delays) >= 0.5
    assert max(sum(low <= delay < low + 0.1 for delay in delays) for low in delays) <= 250


BAD: list[dict[str, Any]] = [
    {"base_delay": 0},
    {"base_delay": -1},
    {"base_delay": math.nan},
    {"max_delay": math.inf},
    {"max_delay": "30"},
    {"unreachable_for": True},
    {"base_delay": 31},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_a_policy_that_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RetryPolicy(**options)


def test_three_replays_without_proof_then_waiting_then_never() -> None:
    replays = Replays()
    for _ in range(3):
        assert replays.permission() is True
        replays.start()
    assert replays.permission() is None
    replays.answer(False)
    replays.answer(False)
    assert replays.permission() is None
    replays.answer(False)
    assert replays.permission() is False


def test_one_marked_answer_frees_all() -> None:
    replays = Replays()
    for _ in range(3):
        replays.start()
    replays.answer(True)
    assert replays.permission() is True


def test_a_replay_that_was_not_sent_after_all_gives_its_place_back() -> None:
    replays = Replays()
    for _ in range(3):
        replays.start()
    replays.withdraw()
    assert replays.permission() is True


def test_answers_that_cannot_come_any_more_are_not_waited_for() -> None:
    replays = Replays()
    for _ in range(3):
        replays.start()
    replays.forget_unanswered()
    assert replays.permission() is False
