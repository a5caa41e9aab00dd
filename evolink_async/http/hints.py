"""When the service wants to be asked again: every form a hint has been seen in. Pure."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

# Digits are ASCII on purpose: float() would take '１２０', '1_000', 'inf' and ' 5'.
_SECONDS = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?", re.ASCII)
_IN_WORDS = re.compile(
    r"\b(?:retry|try again)[ -](?:after|in) ([0-9]{1,6}(?:\.[0-9]{1,6})?) ?(s|secs?|seconds?|mins?|minutes?)\b",
    re.I | re.A,
)
# The three forms of RFC 9110 section 5.6.7 begin with a day's name, full or short.
_DATE_START = re.compile(r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?,? ", re.ASCII)

# A hint of more than a week is no plan for a client; it is nonsense like the others.
_LONGEST = 7 * 86_400.0


def retry_after(headers: Mapping[str, str], body_hint: str | None = None, now: float | None = None) -> float | None:
    """Seconds to wait according to `retry-after-ms`, `Retry-After` (seconds or an HTTP date) or the body's words.

    The longest of those given counts, since waiting less than any of them asks for a refusal. Nonsense (negative,
    infinite, not ASCII, in the past, more than a week) is ignored: None. `headers` has lower-case names.
    `now`: Unix seconds; the server's own Date header wins over it, so that a wrong local clock does no harm.
    """
    hints = (
        _seconds(headers.get("retry-after-ms"), unit=1000.0),
        _seconds_or_date(headers.get("retry-after"), headers.get("date"), now),
        _words(body_hint),
    )
    return max((hint for hint in hints if hint is not None), default=None)


def _seconds(text: str | None, unit: float = 1.0) -> float | None:
    return _sane(float(text) / unit) if text and _SECONDS.fullmatch(text) else None


def _seconds_or_date(text: str | None, server_date: str | None, now: float | None) -> float | None:
    if text is None:
        return None
    seconds = _seconds(text)
    if seconds is not None:
        return seconds
    moment = http_date(text)
    if moment is None:
        return None
    server_now = http_date(server_date) if server_date else None
    reference = server_now if server_now is not None else time.time() if now is None else now
    return _sane(moment - reference)


def http_date(text: str) -> float | None:
    """Unix seconds of an HTTP date in any of RFC 9110's three forms, None for anything else."""
    if not text.isascii() or not _DATE_START.match(text):
        return None
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None  # email.utils has raised each of these for some garbage
    # The asctime form carries no zone and comes back naive; HTTP dates are UTC.
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return moment.timestamp()
    except (ValueError, OverflowError):
        return None


def _words(text: str | None) -> float | None:
    match = _IN_WORDS.search(text) if text else None
    if match is None:
        return None
    return _sane(float(match[1]) * (60 if match[2].lower().startswith("min") else 1))


def _sane(seconds: float) -> float | None:
    return seconds if 0 <= seconds <= _LONGEST else None
