"""File names that are safe on every system, whatever they were made from. Pure."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from urllib.parse import unquote, urlsplit

from evolink_async.saving.content import ENDINGS

_MOST_BYTES = 200  # of 255 that file systems allow: leaves room for a number, a hash and an extension
_RESERVED = re.compile(r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9])", re.I)


def safe_stem(text: str, fallback: str) -> str:
    """A name without separators, control and direction characters, reserved words, leading dots or dashes.

    Letters and digits of any script stay, as do `.`, `_` and `-` inside; all else becomes `_`. `fallback` stands in
    where nothing is left.
    """
    kept = "".join(_safe(character) for character in unicodedata.normalize("NFC", text[:4096]))
    stem = _cut(re.sub(r"_{2,}|\.{2,}", "_", kept).lstrip("._- ")).rstrip("._- ")
    if not stem:
        return fallback
    # Windows reads COM1.anything as the device, and the superscript in COM¹ as the digit.
    first = unicodedata.normalize("NFKC", stem.partition(".")[0])
    return f"_{stem}" if _RESERVED.fullmatch(first) else stem


def _safe(character: str) -> str:
    if character in "._-" or unicodedata.category(character)[0] in "LN":
        return character
    # Marks belong to the letter before them.
    return character if unicodedata.category(character) in ("Mn", "Mc") else "_"


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:_MOST_BYTES].decode("utf-8", "ignore")


def unique_stem(text: str, *, case_matters: bool = True) -> str:
    """A safe name for an identifier: itself, or, where it had to be changed, with eight hex digits of its hash.

    case_matters: whether the file system tells `A` from `a`. Where it doesn't, a name that isn't all lower case is told
    from its twins by its hash.
    """
    stem = safe_stem(text, "task")
    if stem == text and (case_matters or text == text.casefold()):
        return stem
    return f"{stem}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def request_stem(key: str | None, index: int | None, identity: str, *, case_matters: bool = True) -> str:
    """The name of a pool's request: its key made safe, else its number and the first eight of its identity."""
    if key is not None:
        return unique_stem(key, case_matters=case_matters)
    start = safe_stem(identity[:8], "request")
    return start if index is None else f"{index:06d}-{start}"


def stem_of_url(url: str) -> str:
    """A safe name from a URL's last path segment, without a media extension; `result` where there is none."""
    try:
        path = urlsplit(url).path
    except ValueError:  # such as an unclosed IPv6 bracket
        path = ""
    segment = unquote(path.rpartition("/")[2], errors="replace")
    stem, dot, ending = segment.rpartition(".")
    return safe_stem(stem if dot and ending.lower() in ENDINGS else segment, "result")
