"""What a failed test shows of its emulator."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_NOT_SHOWN = ("seed", "faults", "api_key")  # the first two stand elsewhere


def summarize(options: Mapping[str, Any], book: Mapping[str, Any], faults: Iterable[Mapping[str, Any]]) -> list[str]:
    """The options, what the book says in short, and what became of the faults: one line each."""
    shown = (f"{name}={value!r}" for name, value in options.items() if name not in _NOT_SHOWN)
    return [
        f"options: {', '.join(shown)}",
        f"submissions: {'; '.join(_submissions(book))}",
        "credits: {spent} spent, {reserved} reserved, {remaining} of {initial} left".format(**book["account"]),
        *map(_fault, faults),
    ]


def _submissions(book: Mapping[str, Any]) -> Iterator[str]:
    statuses = Counter(post["status"] for post in book["posts"])
    yield f"{len(book['posts'])} accepted{_in_brackets(f'{count} {status}' for status, count in statuses.items())}"
    refused = {f"{status} {code}": count for status, codes in book["refused"].items() for code, count in codes.items()}
    yield f"{sum(refused.values())} refused{_in_brackets(f'{count} x {why}' for why, count in refused.items())}"
    yield f"{book['replays']} replayed"
    yield f"{book['faulted']} stopped by a fault"


def _in_brackets(parts: Iterable[str]) -> str:
    text = ", ".join(parts)
    return f" ({text})" if text else ""


def _fault(fault: Mapping[str, Any]) -> str:
    what = {name: value for name, value in fault.items() if name not in ("matched", "hit")}
    return f"fault {json.dumps(what, ensure_ascii=False)}: hit {fault['hit']} of {fault['matched']} requests it matched"
