"""Words and numbers for people, and foreign text made harmless. Pure."""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal

# What is no character to be read: controls but line breaks and tabs, line separators, marks that turn the direction of
# what follows them, halves of surrogate pairs. Marks that belong to scripts and emoji (joiners, LRM, RLM) stay.
_UNREADABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with what can't be read written out: `\\x00`, `\\u202e`."""
    return _UNREADABLE.sub(lambda found: _written_out(found[0]), text.replace("\r\n", "\n"))


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def cut(text: str | None, most: int) -> str | None:
    """At most so many characters, and how many more there are."""
    if text is None or len(text) <= most:
        return text
    return f"{text[:most]}… ({len(text) - most:,} more characters)"


def amount(credits: Decimal) -> str:
    """Credits, exactly: `12`, `2.5`, `1,200.000001`."""
    text = f"{credits:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def moment(time: datetime) -> str:
    """`2026-11-20 12:00:03 UTC`."""
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
