"""The emulator as an ASGI application: HTTP in, the pure service in the middle, HTTP out.

Written by hand rather than on a framework: a status read is the hot path of every benchmark against the emulator.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from . import files
from .answers import Json, Refusal, created_task, error_body, invalid
from .faults import Fault, FaultPlan
from .files import FileRefusal, FileStore, StoredFile
from .limits import hint_headers, hint_text
from .media import CONTENT_TYPES, render
from .models import KINDS
from .service import Service

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_LIMIT = 64 * 1024 * 1024  # bytes, as documented
_SUBMIT_PATHS = {f"/v1/{kind}s/generations": kind for kind in KINDS}
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class ConnectionDropped(Exception):
    """The connection is to be closed without an answer: the server does so, in bare ASGI the caller sees this."""


class ClientGone(Exception):
    """The client went away before its request was complete."""


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
        return self.method == "POST" and self.path in _SUBMIT_PATHS

    @property
    def host(self) -> str:
        """The host and port that the client called."""
        return self.headers.get(b"host", b"localhost").decode("latin-1")

    @property
    def links_at(self) -> str:
        """Where this client finds the result files: the host it called."""
        return f"{self.scheme}://{self.host}/results"

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


class App:
    """The ASGI application. ``clock`` gives unix seconds."""

    def __init__(
        self,
        service: Service,
        *,
        clock: Callable[[], float],
        api_key: str,
        retry_after: str | None = "seconds",
        batch: bool = True,
        listing: bool = True,
        faults: Iterable[Fault] = (),
        seed: int = 0,
    ) -> None:
        self._service = service
        self._clock = clock
        self._authorization = f"Bearer {api_key}".encode()
        self._retry_after = retry_after
        self._batch = batch
        self._listing = listing
        self._seed = seed
        self.files = FileStore(self._own_media, speed=service.speed, seed=seed)
        self._plan = FaultPlan(faults, seed)
        self._requests: Counter[str] = Counter()
        self._faulted = 0
        self._downloads = 0
        self._keys_leaked = 0
        self._answered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            raise ConnectionDropped(f"the emulator doesn't speak {scope['type']}")
        try:
            request = await _read(scope, receive)
        except ClientGone:
            return
        answer = _too_large(scope["path"]) if request is None else await self._respond(request)
        self._answered += 1
        headers = [
            (b"content-type", answer.content_type.encode()),
            (b"content-length", str(len(answer.body)).encode()),
            (b"x-request-id", f"req_{self._seed:x}_{self._answered:08x}".encode()),
            *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})

    def book(self) -> Json:
        """The ground truth, as ``GET /_emulator/book`` tells it."""
        return {
            **self._service.book(self._clock()),
            "requests": dict(self._requests),
            "faulted": self._faulted,
            "files": self.files.book(self._clock()),
            "media": {"requests": self._downloads, "with_authorization": self._keys_leaked},
        }

    def set_faults(self, faults: Iterable[Fault]) -> None:
        """Replace the faults in force; their counts start again."""
        self._plan = FaultPlan(faults, self._seed)

    # --- faults stand before everything -----------------------------------------------------------------------

    async def _respond(self, request: Request) -> Answer:
        if request.path.startswith("/_emulator/"):
            return self._control(request)
        self._requests[_route(request)] += 1
        if not self._plan.faults:
            return self._handle(request)
        fault = self._plan.next(request.method, request.path, self._model_of(request))
        return self._handle(request) if fault is None else await self._respond_badly(request, fault)

    async def _respond_badly(self, request: Request, fault: Fault) -> Answer:
        answer: Answer | None = None
        if request.submits and fault.accepts:
            answer = self._handle(request)  # accepted now, whatever becomes of the answer
        elif request.submits:
            self._faulted += 1
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.drop is not None:
            raise ConnectionDropped(f"dropped {fault.drop} accepting")
        if fault.status is not None:
            return _faulty(fault, fault.status)
        return self._handle(request) if answer is None else answer

    def _model_of(self, request: Request) -> str | None:
        if request.submits:
            body = request.json()
            name = body.get("model") if isinstance(body, dict) else None
            return name if isinstance(name, str) else None
        return self._service.model_of(request.path.removeprefix("/v1/tasks/"))

    # --- the API ----------------------------------------------------------------------------------------------

    def _handle(self, request: Request) -> Answer:
        path, method = request.path, request.method
        if path.startswith(("/results/", files.LINKS)):
            return self._download(request)
        if request.headers.get(b"authorization") != self._authorization:
            return self._unauthorized(request)
        if path.startswith(files.PREFIX):
            return self._files_call(request)
        if method == "GET" and path.startswith("/v1/tasks/"):  # the hot path
            return self._read_one(request)
        calls = self._calls(path)
        call = calls.get(method)
        if call is not None:
            return call(request)
        if calls:
            refusal = Refusal(405, "method_not_allowed", f"{path} answers {', '.join(calls)} only.")
            return self._refused(refusal, [("allow", ", ".join(calls))])
        return self._refused(Refusal(404, "not_found", f"There is nothing at {path}."))

    def _calls(self, path: str) -> dict[str, Callable[[Request], Answer]]:
        """What this path answers to, by method."""
        if path in _SUBMIT_PATHS:
            return {"POST": partial(self._submit, _SUBMIT_PATHS[path])}
        if path == "/v1/tasks/batch":
            return {"POST": self._read_batch} if self._batch else {}
        if path == "/v1/tasks":
            return {"GET": self._list} if self._listing else {}
        if path == "/v1/credits":
            return {"GET": lambda _: self._told(self._service.credits(self._clock()))}
        if path == "/v1/models":
            return {"GET": lambda _: self._told(self._service.models())}
        return {"GET": self._read_one} if path.startswith("/v1/tasks/") else {}

    def _unauthorized(self, request: Request) -> Answer:
        refusal = Refusal(401, "unauthorized", "The API key is missing or not valid.", "authentication_error")
        if request.path.startswith(files.PREFIX):
            return self._file_refused(FileRefusal(401, refusal.message))
        if request.submits:
            self._service.refuse(refusal)
        return self._refused(refusal)

    def _submit(self, kind: str, request: Request) -> Answer:
        key = request.headers.get(b"idempotency-key", b"").decode("latin-1") or None
        body = request.json()
        if isinstance(body, Refusal):
            self._service.refuse(body)
            return self._refused(body)
        accepted = self._service.submit(kind, body, key, self._clock())
        if isinstance(accepted, Refusal):
            return self._refused(accepted)
        replayed = (("idempotency-replayed", "true"),) if accepted.replayed else ()
        return _json(200, created_task(accepted.task), replayed)

    def _read_one(self, request: Request) -> Answer:
        task_id = request.path.removeprefix("/v1/tasks/")
        return self._told(self._service.read(task_id, self._clock(), request.links_at))

    def _read_batch(self, request: Request) -> Answer:
        body = request.json()
        ids = body.get("task_ids") if isinstance(body, dict) else body
        if isinstance(ids, Refusal):
            return self._refused(ids)
        return self._told(self._service.read_batch(ids, self._clock(), request.links_at))

    def _list(self, request: Request) -> Answer:
        query = dict(parse_qsl(request.query.decode("latin-1")))
        return self._told(self._service.list_tasks(query, self._clock()))

    def _told(self, answer: Json | Refusal) -> Answer:
        return self._refused(answer) if isinstance(answer, Refusal) else _json(200, answer)

    def _refused(self, refusal: Refusal, headers: Iterable[tuple[str, str]] = ()) -> Answer:
        suggestion = None
        if refusal.wait is not None:
            headers = [*headers, *hint_headers(self._retry_after, refusal.wait, self._clock())]
            suggestion = hint_text(self._retry_after, refusal.wait)
        return _json(refusal.status, error_body(refusal, suggestion), tuple(headers))

    # --- the files API ----------------------------------------------------------------------------------------

    def _files_call(self, request: Request) -> Answer:
        call, now = (request.method, request.path.removeprefix(files.PREFIX)), self._clock()
        if call == ("POST", "upload/stream"):
            content_type = request.headers.get(b"content-type", b"").decode("latin-1")
            return self._uploaded(self.files.upload_form(content_type, request.body, now), request)
        if call == ("POST", "upload/base64"):
            return self._uploaded(self.files.upload_base64(request.json(), now), request)
        if call == ("POST", "upload/url"):
            return self._uploaded(self.files.upload_url(request.json(), request.host, now), request)
        if call == ("GET", "list"):
            page = self.files.page(dict(parse_qsl(request.query.decode("latin-1"))), now)
            return self._file_refused(page) if isinstance(page, FileRefusal) else _json(200, files.accepted(page))
        if call == ("GET", "quota"):
            return _json(200, files.accepted(self.files.quota(now)))
        if request.method == "DELETE":
            gone = self.files.delete(call[1], now)
            return _json(200, files.accepted(None)) if gone is None else self._file_refused(gone)
        return self._file_refused(FileRefusal(404, f"There is nothing at {request.method} {request.path}."))

    def _uploaded(self, stored: StoredFile | FileRefusal, request: Request) -> Answer:
        if isinstance(stored, FileRefusal):
            return self._file_refused(stored)
        return _json(200, files.accepted(stored.as_json(f"{request.scheme}://{request.host}")))

    def _file_refused(self, refusal: FileRefusal) -> Answer:
        status = refusal.code if refusal.code < 600 else 500 if refusal.code >= 50000 else 400
        return _json(200 if self.files.with_200 else status, files.refused(refusal))

    def _own_media(self, path: str, now: float) -> bytes | None:
        """What one of our own links leads to."""
        media = self._media(path, now)
        return None if media is None else media[0]

    def _media(self, path: str, now: float) -> tuple[bytes, str, str] | None:
        """Content, content type and tag of a result or an uploaded file."""
        if path.startswith(files.LINKS):
            file = self.files.find(path, now)
            return None if file is None else (file.content, file.content_type, f'"{file.id}"')
        found = self._service.result(path.removeprefix("/results/"), now)
        if found is None:
            return None
        task, number, ending = found
        content = render(task.digest, number, ending, task.body.get("size"))
        return content, CONTENT_TYPES[ending], f'"{task.digest.hex()}-{number}-{ending}"'

    # --- result files -----------------------------------------------------------------------------------------

    def _download(self, request: Request) -> Answer:
        self._downloads += 1
        if b"authorization" in request.headers:  # the key has no business here; the book says so
            self._keys_leaked += 1
        if request.method not in ("GET", "HEAD"):
            return Answer(405, b"method not allowed", "text/plain", (("allow", "GET, HEAD"),))
        media = self._media(request.path, self._clock())
        if media is None:
            return Answer(404, b"no such file, or its link has expired", "text/plain")
        content, content_type, tag = media
        return _ranged(content, content_type, tag, request.headers)

    # --- the emulator's own pages -----------------------------------------------------------------------------

    def _control(self, request: Request) -> Answer:
        call = request.method, request.path.removeprefix("/_emulator/")
        if call == ("GET", "health"):
            return _json(200, {"status": "ok"})
        if call == ("GET", "book"):
            return _json(200, self.book())
        if call == ("POST", "faults"):
            return self._replace_faults(request)
        if call == ("GET", "faults"):
            return _json(200, {"faults": self._plan.as_json()})
        return self._refused(Refusal(404, "not_found", f"There is nothing at {request.method} {request.path}."))

    def _replace_faults(self, request: Request) -> Answer:
        try:
            self.set_faults(read_faults(request.body))
        except ValueError as exc:
            return self._refused(invalid(str(exc)))
        return _json(200, {"faults": self._plan.as_json()})


def read_faults(text: bytes | str) -> tuple[Fault, ...]:
    """Faults from a JSON list; ValueError says what is wrong with it."""
    rows = json.loads(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("faults are a JSON list of objects")
    return tuple(Fault.from_dict(row) for row in rows)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _route(request: Request) -> str:
    path = request.path
    if path.startswith("/v1/tasks/") and not (path == "/v1/tasks/batch" and request.method == "POST"):
        path = "/v1/tasks/{id}"
    elif path.startswith("/results/"):
        path = "/results/{name}"
    elif path.startswith(files.LINKS):
        path = "/files/{name}"
    elif path.startswith(files.PREFIX) and request.method == "DELETE":
        path = f"{files.PREFIX}{{id}}"
    return f"{request.method} {path}"


def _json(status: int, data: Any, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    return Answer(status, _encode(data).encode("utf-8", "surrogatepass"), headers=headers)


def _too_large(path: str) -> Answer:
    if path.startswith(files.PREFIX):
        return _json(413, files.refused(FileRefusal(40001, "The body is too large.")))
    return _json(413, error_body(Refusal(413, "request_too_large", "The body is larger than 64 MB.")))


def _faulty(fault: Fault, status: int) -> Answer:
    headers = tuple(fault.headers.items())
    if fault.raw_body is not None:
        return Answer(status, fault.raw_body, fault.content_type, headers)
    body = b"" if fault.body is None else _encode(fault.body).encode()
    return Answer(status, body, fault.content_type, headers)


def _ranged(content: bytes, content_type: str, tag: str, headers: dict[bytes, bytes]) -> Answer:
    """The file, or the part of it that a Range header asks for."""
    common = (("accept-ranges", "bytes"), ("etag", tag))
    wanted = headers.get(b"range", b"").decode("latin-1")
    changed = headers.get(b"if-range", tag.encode()) != tag.encode()
    if not wanted.startswith("bytes=") or "," in wanted or changed:
        return Answer(200, content, content_type, common)
    first, dash, last = wanted[6:].partition("-")
    total = len(content)
    if not dash or not (first + last).isdecimal():
        return Answer(200, content, content_type, common)
    start = int(first) if first else max(0, total - int(last))
    end = min(total, int(last) + 1) if first and last else total
    if start >= end:
        return Answer(416, b"", content_type, (*common, ("content-range", f"bytes */{total}")))
    part = ("content-range", f"bytes {start}-{end - 1}/{total}")
    return Answer(206, content[start:end], content_type, (*common, part))


async def _read(scope: Scope, receive: Receive) -> Request | None:
    """The request with its body, or None when that is too large."""
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


async def _live(receive: Receive, send: Send) -> None:
    """The lifespan protocol, for servers that want it: there is nothing to start or stop."""
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})
