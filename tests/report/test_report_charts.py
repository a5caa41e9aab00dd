"""Plots: where lines, bars and ticks lie."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from evolink_async.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    TimeAxis,
    completion,
    cost_by_model,
    delays,
    pace,
    value_ticks,
)
from evolink_async.report.items import ModelSums, Sample

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
DAY = 86_400.0


@pytest.mark.parametrize(
    ("most", "end", "values"),
    [
        (60, 60, [0, 20, 40, 60]),
        (5000, 5000, [0, 1000, 2000, 3000, 4000, 5000]),
        (0.9, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (7, 8, [0, 2, 4, 6, 8]),
        (0, 1, [0, 1]),
    ],
)
def test_an_axis_has_room_and_round_values(most: float, end: float, values: list[float]) -> None:
    top, ticks = value_ticks(most)
    assert top == pytest.approx(end)
    assert ticks == pytest.approx(values)


def test_counts_have_no_halves_on_their_axis() -> None:
    assert value_ticks(2, whole=True) == (2.0, [0.0, 1.0, 2.0])


def test_ticks_of_time_are_round_and_in_utc() -> None:
    axis = TimeAxis([NOON + 7, NOON + 3607])
    assert [tick.label for tick in axis.ticks()] == ["12:15", "12:30", "12:45"]
    assert (axis.x(NOON + 7), axis.x(NOON + 3607)) == (LEFT, RIGHT)
    assert [tick.label for tick in TimeAxis([NOON, NOON + 9 * DAY]).ticks()][:2] == ["21 Nov", "23 Nov"]
    assert TimeAxis([NOON + day * DAY for day in range(9)]).ticks()[0].label == "21 Nov"


def test_the_night_between_two_runs_is_cut_out() -> None:
    first = [NOON + second for second in range(600)]
    second = [NOON + DAY + second for second in range(600)]
    axis = TimeAxis([*first, *second])
    assert axis.x(first[-1]) == pytest.approx(axis.x(second[0]))
    assert axis.cuts == (pytest.approx((LEFT + RIGHT) / 2, abs=1),)
    assert axis.x(NOON + DAY / 2) == pytest.approx(axis.x(first[-1]))
    labels = [tick.label for tick in axis.ticks()]
    assert labels[0].startswith("20 Nov 12:0")
    assert labels[-1].startswith("21 Nov 12:0")


def test_a_slow_job_is_not_cut_to_pieces() -> None:
    assert TimeAxis([NOON + minutes * 60 for minutes in range(0, 240, 40)]).cuts == ()


def test_a_moment_alone_has_an_axis() -> None:
    axis = TimeAxis([NOON])
    assert axis.x(NOON) == LEFT
    assert TimeAxis([]).ticks() == ()


def test_lines_of_completion_end_at_what_there_is_and_stay_short() -> None:
    done = [NOON + number for number in range(5000)]
    chart = completion(done, done[:4000], done[4000:4001], TimeAxis(done))
    assert [(line.name, line.latest) for line in chart.lines] == [
        ("submitted", "5,000"),
        ("completed", "4,000"),
        ("ended otherwise", "1"),
    ]
    submitted, completed, _ = (line.path for line in chart.lines)
    assert re.findall(r"V([\d.]+)", submitted)[-1] == f"{TOP:.1f}"
    four_fifths = BOTTOM - (BOTTOM - TOP) * 0.8
    assert float(re.findall(r"V([\d.]+)", completed)[-1]) == pytest.approx(four_fifths, abs=0.1)
    assert submitted.count("V") <= 240
    assert chart.lines[0].path.startswith(f"M{LEFT:.1f} {BOTTOM:.1f}")


def test_nothing_is_said_to_be_nothing() -> None:
    axis = TimeAxis([])
    assert completion([], [], [], axis).empty
    assert delays([], [], whole_seconds=True).empty
    assert cost_by_model({MODEL: ModelSums(3)}).empty
    assert pace([], axis).empty


MODEL = "krea-2-turbo"


def test_delays_are_shared_out_into_bins_that_hold_all_of_them() -> None:
    seconds = [0.1 * number for number in range(100)] + [500.0]
    chart = delays(seconds, seconds, whole_seconds=False)
    assert chart.title == "Detection delay"
    assert sum(int(bar.about.partition(":")[0]) for bar in chart.bars) == 101
    assert "over" in chart.bars[-1].about
    assert chart.x_ticks[-1].label == "10 s+"
    assert "Half within 5.0 s, 95 % within 9.5 s" in chart.caption
    assert "whole seconds" not in chart.caption


def test_a_service_that_tells_whole_seconds_is_told_of() -> None:
    assert "off by up to one" in delays([1.5, 2.5], [1, 2, 3], whole_seconds=True).caption
    assert "of 2 of 3 tasks" in delays([1.5, 2.5], [1, 2, 3], whole_seconds=True).caption


def test_a_delay_below_nothing_counts_as_none() -> None:
    chart = delays([-0.2, -0.1], [1, 1], whole_seconds=True)
    assert "within 0 ms" in chart.caption
    assert sum(int(bar.about.partition(":")[0]) for bar in chart.bars) == 2


def test_without_the_services_word_the_time_to_the_result_is_shown_and_said_to_be_that() -> None:
    chart = delays([], [4.0, 5.0, 6.0], whole_seconds=True)
    assert chart.title == "Time to the result"
    assert "can't be told" in chart.caption
    assert chart.bars


def test_models_are_ordered_by_cost_and_the_small_ones_summed_up() -> None:
    models = {f"model-{n}": ModelSums(1, Decimal(n), Decimal(0)) for n in range(1, 12)}
    chart = cost_by_model(models)
    names = [label.text for label in chart.labels if not label.at_end]
    assert names[:2] == ["model-11", "model-10"]
    assert names[-1] == "5 other models"
    assert len(names) == 7
    assert [bar.width for bar in chart.bars][-1] == WIDTH  # 15 together
    assert "5 requests · 15" in [label.text for label in chart.labels]


def test_spent_and_reserved_lie_behind_each_other() -> None:
    chart = cost_by_model({MODEL: ModelSums(4, Decimal("7.5"), Decimal("2.5"))})
    spent, held = chart.bars
    assert (spent.x, held.x) == (0, spent.width)
    assert spent.width + held.width == pytest.approx(WIDTH)
    assert held.about.endswith("2.5 credits reserved")


def test_credits_are_exact() -> None:
    chart = cost_by_model({MODEL: ModelSums(1, Decimal("0.000001"), Decimal(0)), "b": ModelSums(1, Decimal(10**9))})
    assert "1 request · 0.000001" in [label.text for label in chart.labels]
    assert min(bar.width for bar in chart.bars) >= 1


def run_of(*samples: tuple[float, int, int, float | None], begun: float = NOON) -> list[Sample]:
    return [Sample(begun + elapsed, elapsed, posts, refused, rate) for elapsed, posts, refused, rate in samples]


def test_the_pace_of_several_runs_is_drawn_each_from_its_own_beginning() -> None:
    first = run_of((1, 10, 0, None), (2, 20, 4, 8.0))
    second = run_of((1, 6, 0, 8.0), (2, 12, 0, 8.0), begun=NOON + 100)
    axis = TimeAxis([sample.at for sample in (*first, *second)])
    chart = pace([first, second], axis)
    posts, allowed, refused = chart.lines
    assert (posts.latest, refused.latest) == ("32", "4")
    assert posts.path.count("M") == 2
    assert allowed.path.count("M") == 2
    [bar] = chart.bars
    assert bar.about == "4 × 429 a second"


def test_a_long_run_is_drawn_with_few_points_and_loses_no_429() -> None:
    long = run_of(*((second, second * 5, second, 5.0) for second in range(1, 5001)))
    chart = pace([long], TimeAxis([sample.at for sample in long]))
    assert chart.lines[0].path.count("H") <= 241
    assert chart.lines[2].latest == "5,000"
