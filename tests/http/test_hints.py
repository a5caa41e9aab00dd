"""Hints of the service about when to come back, in every form they have been seen in, and nonsense."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async.http.hints import http_date, retry_after

NOW = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("1", 1), ("120", 120), ("1.5", 1.5), ("604800", 604_800), ("007", 7)],
)
def test_seconds(text: str, seconds: float) -> None:
    assert retry_after({"retry-after": text}) == seconds


@pytest.mark.parametrize(
    "text",
    ["Sun, 06 Nov 1994 08:50:37 GMT", "Sunday, 06-Nov-94 08:50:37 GMT", "Sun Nov  6 08:50:37 1994"],
    ids=["imf", "rfc850", "asctime"],
)
def test_all_three_date_forms_mean_the_same(text: str) -> None:
    assert retry_after({"retry-after": text}, now=NOW) == 60
    # A server whose clock is three days off is believed about the difference.
    server = formatdate(NOW - 3 * 86_400, usegmt=True)
    later = formatdate(NOW - 3 * 86_400 + 60, usegmt=True)
    assert retry_after({"retry-after": later, "date": server}, now=NOW) == 60
    assert retry_after({"retry-after": text, "date": "nonsense"}, now=NOW) == 60


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the zone of a process can't be changed here")
def test_a_date_without_a_zone_is_utc_wherever_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert retry_after({"retry-after": "Sun Nov  6 08:50:37 1994"}, now=NOW) == 60
    finally:
        monkeypatch.undo()
        time.tzset()


def test_milliseconds() -> None:
    assert retry_after({"retry-after-ms": "1500"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "1"}) == 1
    assert retry_after({"retry-after-ms": "3398088"}) == 3398.088
    assert retry_after({"retry-after-ms": "604800000"}) == 604800
    assert retry_after({"retry-after-ms": "604800001"}) is None


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("retry after 60 seconds", 60),
        ("Please retry after 30 s.", 30),
        ("Rate limit reached. Try again in 20s", 20),
        ("try again in 1.5 seconds", 1.5),
        ("Retry-After 5 sec", 5),
        ("retry after 2 minutes", 120),
        ("retry in 3 min", 180),
        ("retry after 60 apples", None),
        ("retry after 20ms", None),
        ("retry after ６０ seconds", None),
        ("retry after 999999 minutes", None),
        ("", None),
    ],
)
def test_words_in_the_body(words: str, seconds: float | None) -> None:
    assert retry_after({}, words) == seconds


def test_the_longest_hint_counts() -> None:
    assert retry_after({"retry-after": "10"}, "retry after 60 seconds") == 60
    assert retry_after({"retry-after": "90"}, "retry after 60 seconds") == 90
    assert retry_after({"retry-after": "nonsense"}, "retry after 60 seconds") == 60


GARBAGE = {
    "negative": "-10",
    "nan": "nan",
    "inf": "inf",
    "overflow": "1e309",
    "huge": "1" + "0" * 35,
    "full-width": "１２０",
    "underscore": "1_000",
    "plus": "+5",
    "empty": "",
    "blank": " ",
    "two-headers": "120, 60",
    "hex": "0x10",
    "exponent": "1e2",
    "a-week-and-more": "604801",
    "year-100000": "Sun, 06 Nov 100000 08:49:37 GMT",
    "no-such-day": "Zun, 29 Sep 2026 10:00:00 GMT",
    "no-time": "Sun, 29 Sep",
    "no-such-time": "Sun, 06 Nov 1994 24:61:61 GMT",
    "past": "Sun, 06 Nov 1994 08:49:36 GMT",
    "too-far": "Sun, 06 Nov 2094 08:49:37 GMT",
    "iso": "1994-11-06T08:50:37Z",
    "words": "soon",
    "nul": "5\x00",
    "newline": "5\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_nonsense_is_ignored(name: str) -> None:
    assert retry_after({"retry-after": GARBAGE[name]}, now=NOW) is None
    if "Nov" not in GARBAGE[name]:
        assert retry_after({"retry-after-ms": GARBAGE[name] + "x"}, now=NOW) is None


DATES = st.builds("{} {} {} {}:{}:{} {}".format, *[st.text("SunMoNv,-0169 :", max_size=6) for _ in range(7)])


@given(
    st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms", "date"]), st.text() | DATES),
    st.none() | st.text(),
)
def test_nothing_crashes_and_nothing_absurd_comes_out(headers: dict[str, str], words: str | None) -> None:
    seconds = retry_after(headers, words)
    assert seconds is None or 0 <= seconds <= 7 * 86_400


@given(st.text() | st.text("SunMoNvGT,- 0169:").map("Sun, 06 Nov ".__add__))
def test_no_date_crashes(text: str) -> None:
    http_date(text)
