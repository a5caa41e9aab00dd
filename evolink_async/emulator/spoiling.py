"""How an answer is spoilt: patched, blown up, or broken on the wire. Pure: from answers to bytes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from http import HTTPStatus
from itertools import chain
from typing import Any, Literal

from .http import Answer, Script

_TICK = 0.05  # seconds between the pieces of a slow answer
_BLOCK = b" " * 65536


def patched(body: bytes, patch: Mapping[str, Any]) -> bytes:
    """A JSON answer with other fields; of a batch or a list, each row. Anything else stays as it is."""
    try:
        data = json.loads(body)
    except ValueError:
        return body
    rows = data.get("data") if isinstance(data, dict) else None
    for row in rows if isinstance(rows, list) else [data]:
        if isinstance(row, dict):
            row.update(patch)
            for name, value in patch.items():
                if value is None:
                    del row[name]
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


@lru_cache(maxsize=4)
def bomb_of(kind: Literal["gzip", "nested"], size: int) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """The body of a bomb, and the headers it needs."""
    if kind == "nested":
        return b"[" * size + b"]" * size, ()
    packer = zlib.compressobj(9, wbits=31)
    blocks = chain(
        [b'{"id":"'], (b"a" * min(2**20, size - start) for start in range(0, size, 2**20)), [b'","status":"pending"}']
    )
    return b"".join(map(packer.compress, blocks)) + packer.flush(), (("content-encoding", "gzip"),)


def script_of(
    answer: Answer,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    endless: bool,
    cut: int | None,
    stall: int | None,
    drip: float | None,
    content_length: int | None,
    reset: bool,
) -> Script:
    """The answer on the wire, with everything that is wrong about it. The connection never serves another request."""
    lines = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}".encode()]
    for name, value in headers:
        if name == b"content-length":
            if endless:
                continue
            value = value if content_length is None else str(content_length).encode()
        lines.append(name + b": " + value)
    head = b"\r\n".join([*lines, b"", b""])
    end: Literal["close", "reset", "hold"] = "reset" if reset else "close"
    body = answer.body
    if stall is not None:
        body, end = body[:stall], "hold"
    elif cut is not None:
        body = body[:cut]
    whole: Iterable[bytes] = chain([head, body], _without_end() if endless else ())
    if drip is None:
        return Script(whole, end=end)
    step = max(1, round(drip * _TICK))
    return Script(_slices(whole, step), pause=step / drip, end=end)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _without_end() -> Iterator[bytes]:
    while True:
        yield _BLOCK


def _slices(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    for piece in pieces:
        for start in range(0, len(piece), size):
            yield piece[start : start + size]
