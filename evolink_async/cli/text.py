"""Words for people: foreign text made harmless, numbers made short. Pure."""

from __future__ import annotations

import re
from decimal import Decimal

# Escape sequences whole, so that their letters don't stay behind: CSI, OSC and the like, two-character ones.
_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x1b\\|\x07|\Z)|\x1b[ -/]*[0-~]|\x9b[0-?]*[ -/]*[@-~]", re.S
)
# What else moves the cursor or turns the reading direction.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")


def clean(text: object) -> str:
    """One line without terminal escapes, control characters and direction marks."""
    return _CONTROLS.sub(" ", _SEQUENCES.sub("", str(text)))


def escaped(text: str) -> str:
    """A line of JSON in which what moves the cursor or turns the reading direction is written out, as JSON may."""
    return _CONTROLS.sub(lambda found: "".join(f"\\u{ord(character):04x}" for character in found[0]), text)


def readable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8, as old disks have them, are written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


_PLAIN = {"…": "...", "·": "-", "×": "x", "—": "-", "–": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "→": "->"}


def in_code_page(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that a console's code page lacks: a codec's error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in missing), error.end


def shortened(text: object, most: int) -> str:
    """`clean`, cut to `most` characters."""
    line = clean(text).strip()
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def amount(credits: Decimal | float) -> str:
    """Credits with at most two decimals: `12`, `2.5`, `0.11`; grouped by thousands."""
    text = f"{Decimal(str(credits)):,.2f}"  # a float is rounded as what it is written as, or two equal sums differ
    return text.rstrip("0").rstrip(".") if "." in text else text


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 request`, `2 requests`, `12,000 requests`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
