"""Query strings. Pure."""

from __future__ import annotations

from urllib.parse import parse_qsl

LAST_PAGE = 10**9


def read_query(query: bytes) -> dict[str, str]:
    """The parameters of a query string; the last of several with the same name counts."""
    return dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))


def whole(text: str, low: int, high: int) -> int | None:
    """The whole number between these bounds that the text is, else None."""
    digits = text.isascii() and text.isdecimal() and len(text) < 12
    return int(text) if digits and low <= int(text) <= high else None
