"""A recorded run: every request and every intervention with its time, to be carried out again. JSON lines."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .http import Request

VERSION = 1
_KEPT_HEADERS = ("host", "content-type", "idempotency-key", "range", "user-agent")


class Recording:
    """The lines of a run, the first says what kind of recording it is."""

    def __init__(self, seed: int) -> None:
        self.lines: list[dict[str, Any]] = [{"recording": VERSION, "seed": seed}]

    def add_request(self, at: float, request: Request, authorized: bool, status: int | None) -> None:
        """A request, and the status that it was answered (None: the connection was dropped). No key is kept."""
        names = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.items())
        self.lines.append(
            {
                "at": at,
                "method": request.method,
                "path": request.path,
                "query": request.query.decode("latin-1"),
                "headers": {name: value for name, value in names if name in _KEPT_HEADERS},
                "authorized": authorized,
                "body": base64.b64encode(request.body).decode(),
                "status": status,
            }
        )

    def add_action(self, at: float, name: str, value: Any) -> None:
        """An intervention through the emulator's own controls."""
        self.lines.append({"at": at, "action": name, "value": value})

    def text(self) -> str:
        """As JSON lines."""
        return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in self.lines)


def read_recording(text: bytes | str) -> tuple[int, list[dict[str, Any]]]:
    """The seed and the lines of a recording. ValueError says what is wrong with it."""
    lines = list(_objects(text))
    if not lines or lines[0].get("recording") != VERSION or not isinstance(lines[0].get("seed"), int):
        raise ValueError(f"a recording begins with a line that has 'recording': {VERSION} and a 'seed'")
    for number, line in enumerate(lines[1:], 2):
        if not isinstance(line.get("at"), (int, float)) or not ({"method", "action"} & set(line)):
            raise ValueError(f"line {number} of the recording is neither a request nor an action")
    return lines[0]["seed"], lines[1:]


def request_of(line: Mapping[str, Any], authorization: str) -> Request:
    """The request of a line, with the key of the emulator that carries it out."""
    headers = {name.encode("latin-1"): value.encode("latin-1") for name, value in line["headers"].items()}
    if line["authorized"]:
        headers[b"authorization"] = authorization.encode()
    body = base64.b64decode(line["body"])
    return Request(line["method"], line["path"], line["query"].encode("latin-1"), headers, "http", body)


def _objects(text: bytes | str) -> Iterator[dict[str, Any]]:
    lines: Sequence[bytes | str] = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"line {number} of the recording is not JSON") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of the recording is not an object")
        yield row
