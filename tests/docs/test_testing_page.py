"""The page on testing: its blocks run as the reader's tests would, and its names are the plugin's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evolink_async.testing.background import BackgroundEmulator
from evolink_async.testing.summary import summarize

pytest_plugins = ["pytester"]

PAGE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
CONFTEST = [block for block in BLOCKS if block.startswith("# conftest.py")]
TESTS = [block for block in BLOCKS if block not in CONFTEST]


@pytest.mark.parametrize("number", range(len(TESTS)))
def test_a_block_of_the_page_on_testing_passes(number: int, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makeconftest(CONFTEST[0])
    pytester.makepyfile(TESTS[number])
    result = pytester.runpytest_inprocess("-W", "error")
    result.assert_outcomes(passed=TESTS[number].count("def test_"))


def test_the_table_names_what_the_emulator_has() -> None:
    table = PAGE.partition("| | |\n")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`\.(\w+)", row)}
    assert named == {name for name in vars(BackgroundEmulator) if not name.startswith("_")}


def test_the_report_of_a_failure_looks_as_the_page_shows_it() -> None:
    seed, *lines = PAGE.partition("- evolink emulator -")[2].partition("\n```")[0].splitlines()[1:]
    assert re.fullmatch(r"seed: (\d+), repeat with --evolink-seed=\1", seed)
    with BackgroundEmulator(failure_share=0.5) as emulator:
        book = emulator.book() | {"posts": [{"status": "failed"}], "replays": 1}
    faults = [{"method": "POST", "nth": [1], "drop": "after", "matched": 2, "hit": 1}]
    assert summarize({"speed": 1000, "failure_share": 0.5}, book, faults) == lines


def test_the_page_is_read_in_two_minutes() -> None:
    text = re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S)
    assert len(text.split()) < 500
