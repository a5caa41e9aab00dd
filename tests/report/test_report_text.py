"""Words and numbers of a report."""

from __future__ import annotations

from decimal import Decimal

import pytest

from evolink_async.durations import duration
from evolink_async.report.text import amount, cut, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain — ünïcödé 灯台", "plain — ünïcödé 灯台"),
        ("a\x00b\x1b[31m\x9b", r"a\x00b\x1b[31m\x9b"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("\u2066x\u2069", r"\u2066x\u2069"),
        ("line\u2028end\u2029", r"line\u2028end\u2029"),
        ("half \ud800 pair", r"half \ud800 pair"),
        ("two\r\nlines\tand a tab", "two\nlines\tand a tab"),
        ("a\rb", r"a\x0db"),
        ("👩‍🚀 שלום\u200f", "👩‍🚀 שלום\u200f"),
    ],
)
def test_what_cannot_be_read_is_written_out_and_the_rest_stays(text: str, shown: str) -> None:
    assert visible(text) == shown
    visible(text).encode()


def test_a_cut_says_what_is_missing() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("a" * 5003, 3) == "aaa… (5,000 more characters)"
    assert cut(None, 3) is None


def test_numbers_are_for_people() -> None:
    seconds = [0.0004, 0.538, 0.9996, 1, 9.96, 59.96, 125, 7800, 200_000]
    shown = ["0 ms", "538 ms", "1.0 s", "1.0 s", "10 s", "1 min 00 s", "2 min 05 s", "2 h 10 min", "2 d 7 h"]
    assert [duration(one) for one in seconds] == shown
    credits = [Decimal("12"), Decimal("2.50"), Decimal("1234567.000001"), Decimal("1E+3"), Decimal(0)]
    assert [amount(one) for one in credits] == ["12", "2.5", "1,234,567.000001", "1,000", "0"]
