"""HTTP messages: a request read whole, an answer, and an answer spoilt on the wire."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from . import files
from .answers import invalid
from .models import KINDS

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_LIMIT = 64 * 1024 * 1024  # bytes, as documented
SUBMIT_PATHS: Mapping[str, str] = {f"/v1/{kind}s/generations": kind for kind in KINDS}
TASKS = "/v1/tasks/"
BATCH = "/v1/tasks/batch"
RESULTS = "/results/"
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, read whole."""

    method: str
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    scheme: str
    body: bytes = b""

    @property
    def submits(self) -> bool:
        return self.method == "POST" and self.path in SUBMIT_PATHS

    @property
    def key(self) -> str | None:
        """The idempotency key."""
        return self.headers.get(b"idempotency-key", b"").decode("latin-1") or None

    @property
    def host(self) -> str:
        """The host and port that the client called."""
        return self.headers.get(b"host", b"localhost").decode("latin-1")

    @property
    def origin(self) -> str:
        """Scheme, host and port that the client called."""
        return f"{self.scheme}://{self.host}"

    @property
    def links_at(self) -> str:
        """Where this client finds the result files: the host it called."""
        return f"{self.origin}/results"

    def json(self) -> Any:
        """The body as JSON, or a refusal."""
        try:
            return json.loads(self.body, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return invalid("The body is not valid JSON.")


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Script:
    """What is done to a connection instead of a proper answer: bytes, with pauses, and an end.

    ``close`` ends it in good order, ``reset`` with a TCP reset, ``hold`` says nothing more until the client leaves.
    """

    pieces: Iterable[bytes] = ()
    pause: float = 0.0  # seconds after each piece
    end: Literal["close", "reset", "hold"] = "close"


class ConnectionDropped(Exception):
    """There is no proper answer: the server carries out ``script``, in bare ASGI the caller sees this."""

    def __init__(self, reason: str, script: Script | None = None) -> None:
        super().__init__(reason)
        self.script = script or Script()


class ClientGone(Exception):
    """The client went away before its request was complete."""


def json_answer(status: int, data: Any, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """An answer of JSON."""
    return Answer(status, _encode(data).encode("utf-8", "replace"), headers=headers)  # no half of a surrogate pair


def all_headers(answer: Answer, request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers of an answer as they go out."""
    return [
        (b"content-type", answer.content_type.encode()),
        (b"content-length", str(len(answer.body)).encode()),
        (b"x-request-id", request_id.encode()),
        *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers),
    ]


async def read_request(scope: Scope, receive: Receive) -> Request | None:
    """The request with its body, or None when that is too large. Raises ClientGone."""
    body = b""
    if scope["method"] in ("POST", "PUT", "PATCH"):
        limit = files.BODY_LIMIT if scope["path"].startswith(files.PREFIX) else BODY_LIMIT
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                return None
            parts.append(part)
            more = message.get("more_body", False)
        body = b"".join(parts)
    headers = dict(scope["headers"])
    return Request(scope["method"], scope["path"], scope["query_string"], headers, scope.get("scheme", "http"), body)


def ranged(content: bytes, content_type: str, tag: str, headers: Mapping[bytes, bytes]) -> Answer:
    """A file, or the part of it that a Range header asks for."""
    common = (("accept-ranges", "bytes"), ("etag", tag))
    wanted = headers.get(b"range", b"").decode("latin-1")
    changed = headers.get(b"if-range", tag.encode()) != tag.encode()
    if not wanted.startswith("bytes=") or "," in wanted or changed:
        return Answer(200, content, content_type, common)
    first, dash, last = wanted[6:].partition("-")
    total = len(content)
    if not dash or not (first + last).isdecimal() or len(first + last) > 36:
        return Answer(200, content, content_type, common)
    start = int(first) if first else max(0, total - int(last))
    end = min(total, int(last) + 1) if first and last else total
    if start >= end:
        return Answer(416, b"", content_type, (*common, ("content-range", f"bytes */{total}")))
    part = ("content-range", f"bytes {start}-{end - 1}/{total}")
    return Answer(206, content[start:end], content_type, (*common, part))


def route(request: Request) -> str:
    """The method and path by which the book counts requests: ids and names are left out."""
    path = request.path
    if path.startswith(TASKS) and not (path == BATCH and request.method == "POST"):
        path = "/v1/tasks/{id}"
    elif path.startswith(RESULTS):
        path = "/results/{name}"
    elif path.startswith(files.LINKS):
        path = "/files/{name}"
    elif path.startswith(files.PREFIX) and request.method == "DELETE":
        path = f"{files.PREFIX}{{id}}"
    elif path.startswith(files.PREFIX + files.RECEIPTS):
        path = f"{files.PREFIX}{files.RECEIPTS}{{id}}"
    return f"{request.method} {path}"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
