"""EvoLink's HTTP API: from a request to the answer of the pure service. No faults, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial

from . import files
from .answers import Json, Refusal, created_task, error_body
from .clock import Clock
from .files import FileRefusal, FileStore, StoredFile
from .http import BATCH, RESULTS, SUBMIT_PATHS, TASKS, Answer, Request, json_answer, ranged
from .limits import hint_headers, hint_text
from .media import CONTENT_TYPES, render
from .queries import read_query
from .service import Service
from .tasks import Task

DOCUMENT = "/openapi.json"
KEY_STATES = ("active", "invalid", "disabled", "expired")


class Api:
    """The documented endpoints, and those known from the vendor's own clients."""

    def __init__(
        self,
        service: Service,
        store: FileStore,
        clock: Clock,
        *,
        api_key: str,
        retry_after: str | None,
        batch: bool,
        listing: bool,
    ) -> None:
        self.service = service
        self.store = store
        self.key_state = "active"
        self.downloads = 0
        self.keys_leaked = 0
        self._clock = clock
        self._authorization = f"Bearer {api_key}".encode()
        self._retry_after = retry_after
        self._batch = batch
        self._listing = listing
        self._document: Answer | None = None
        store.fetch = self._own_media

    def handle(self, request: Request, *, hidden: Collection[str] = ()) -> Answer:
        """Answer a request. A batch leaves out the ``hidden`` ids."""
        path, method = request.path, request.method
        if path.startswith((RESULTS, files.LINKS)):
            return self._download(request)
        if path == DOCUMENT:
            return self._describe(request)
        if request.headers.get(b"authorization") != self._authorization or self.key_state != "active":
            return self._unauthorized(request)
        if method == "GET" and path.startswith(TASKS) and path != BATCH:  # the hot path
            return self._read_one(request)
        if path.startswith(files.PREFIX):
            return self._files_call(request)
        calls = self._calls(path, hidden)
        call = calls.get(method)
        if call is not None:
            return call(request)
        if calls:
            return self._wrong_method(path, calls)
        return self.refused(Refusal(404, "not_found", f"There is nothing at {path}."))

    def tasks_of(self, request: Request) -> list[Task]:
        """The tasks that a read is about."""
        path = request.path
        if path == BATCH and request.method == "POST":
            body = request.json()
            ids = body.get("task_ids") if isinstance(body, dict) else None
            names = [name for name in ids if isinstance(name, str)] if isinstance(ids, list) else []
        elif path.startswith(TASKS):
            names = [path.removeprefix(TASKS)]
        elif path.startswith(RESULTS):
            names = [path.removeprefix(RESULTS).rpartition("-")[0]]
        else:
            return []
        return [task for name in names if (task := self.service.task(name)) is not None]

    def too_large(self, path: str) -> Answer:
        """The answer to a body beyond the limit."""
        if path.startswith(files.PREFIX):
            return json_answer(413, files.refused(FileRefusal(40001, "The body is too large.")))
        return self.refused(Refusal(413, "request_too_large", "The body is larger than 64 MB."))

    def refused(self, refusal: Refusal, headers: Iterable[tuple[str, str]] = ()) -> Answer:
        """A refusal on the wire, with the hint when to come again."""
        suggestion = None
        if refusal.wait is not None:
            headers = [*headers, *hint_headers(self._retry_after, refusal.wait, self._clock())]
            suggestion = hint_text(self._retry_after, refusal.wait)
        body = error_body(refusal, suggestion, self.service.dialect)
        return json_answer(refusal.status, body, tuple(headers))

    def _wrong_method(self, path: str, allowed: Iterable[str]) -> Answer:
        names = ", ".join(allowed)
        return self.refused(Refusal(405, "method_not_allowed", f"{path} answers {names} only."), [("allow", names)])

    def _describe(self, request: Request) -> Answer:
        """The OpenAPI document. It is made when it is first asked for: few ever do."""
        if request.method not in ("GET", "HEAD"):
            return self._wrong_method(request.path, ("GET", "HEAD"))
        if self._document is None:
            from .openapi import document

            service = self.service
            made = document(
                service.dialect,
                batch=self._batch,
                listing=self._listing,
                private_callbacks=service.private_callbacks,
            )
            self._document = json_answer(200, made)
        return self._document

    # --- tasks, account, models -----------------------------------------------------------------------------------

    def _calls(self, path: str, hidden: Collection[str]) -> dict[str, Callable[[Request], Answer]]:
        """What this path answers to, by method."""
        if path in SUBMIT_PATHS:
            return {"POST": partial(self._submit, SUBMIT_PATHS[path])}
        if path == BATCH:
            return {"POST": partial(self._read_batch, hidden)} if self._batch else {}
        if path == "/v1/tasks":
            return {"GET": self._list} if self._listing else {}
        if path == "/v1/credits":
            return {"GET": lambda _: self._told(self.service.credits(self._clock()))}
        if path == "/v1/models":
            return {"GET": lambda _: self._told(self.service.models())}
        return {"GET": self._read_one} if path.startswith(TASKS) else {}

    def _unauthorized(self, request: Request) -> Answer:
        refusal = Refusal(401, "unauthorized", "The API key is missing or not valid.", "authentication_error")
        if self.key_state in ("disabled", "expired"):
            code, message = f"key_{self.key_state}", f"The API key is {self.key_state}."
            refusal = Refusal(403, code, message, "authentication_error")
        if request.path.startswith(files.PREFIX):
            return self._file_refused(FileRefusal(refusal.status, refusal.message))
        if request.submits:
            self.service.refuse(refusal)
        return self.refused(refusal)

    def _submit(self, kind: str, request: Request) -> Answer:
        body = request.json()
        if isinstance(body, Refusal):
            self.service.refuse(body)
            return self.refused(body)
        accepted = self.service.submit(kind, body, request.key, self._clock(), request.links_at)
        if isinstance(accepted, Refusal):
            return self.refused(accepted)
        replayed = (("idempotency-replayed", "true"),) if accepted.replayed else ()
        return json_answer(200, created_task(accepted.task, self.service.dialect), replayed)

    def _read_one(self, request: Request) -> Answer:
        return self._told(self.service.read(request.path[len(TASKS) :], self._clock(), request.links_at))

    def _read_batch(self, hidden: Collection[str], request: Request) -> Answer:
        body = request.json()
        ids = body.get("task_ids") if isinstance(body, dict) else body
        if isinstance(ids, Refusal):
            return self.refused(ids)
        return self._told(self.service.read_batch(ids, self._clock(), request.links_at, hidden=hidden))

    def _list(self, request: Request) -> Answer:
        query = read_query(request.query)
        return self._told(self.service.list_tasks(query, self._clock()))

    def _told(self, answer: Json | Refusal) -> Answer:
        return self.refused(answer) if isinstance(answer, Refusal) else json_answer(200, answer)

    # --- files ----------------------------------------------------------------------------------------------------

    def _files_call(self, request: Request) -> Answer:
        name, now = request.path.removeprefix(files.PREFIX), self._clock()
        call = request.method, name
        if call == ("POST", "upload/stream"):
            content_type = request.headers.get(b"content-type", b"").decode("latin-1")
            return self._uploaded(self.store.upload_form(content_type, request.body, now), request)
        if call == ("POST", "upload/base64"):
            return self._uploaded(self.store.upload_base64(request.json(), now), request)
        if call == ("POST", "upload/url"):
            return self._uploaded(self.store.upload_url(request.json(), request.host, now), request)
        if call == ("GET", "list"):
            page = self.store.page(read_query(request.query), now)
            return self._file_refused(page) if isinstance(page, FileRefusal) else json_answer(200, files.accepted(page))
        if call == ("GET", "quota"):
            return json_answer(200, files.accepted(self.store.quota(now)))
        allowed = files.method_of(name)
        if allowed is None:
            return self._file_refused(FileRefusal(404, f"There is nothing at {request.path}."))
        if request.method != allowed:
            refusal = self._file_refused(FileRefusal(405, f"{request.path} answers {allowed} only."))
            return replace(refusal, headers=(("allow", allowed),))
        if allowed == "GET":
            return self._receipt(name.removeprefix(files.RECEIPTS), request)
        gone = self.store.delete(name, now)
        return json_answer(200, files.accepted(None)) if gone is None else self._file_refused(gone)

    def _uploaded(self, stored: StoredFile | FileRefusal, request: Request) -> Answer:
        if isinstance(stored, FileRefusal):
            return self._file_refused(stored)
        upload_id = request.headers.get(b"x-evo-upload-id", b"").decode("latin-1")
        if files.is_upload_id(upload_id):
            self.store.note_receipt(upload_id, stored)
        return json_answer(200, files.accepted(stored.as_json(request.origin)))

    def _receipt(self, upload_id: str, request: Request) -> Answer:
        receipt = self.store.receipt(upload_id, request.origin, self._clock())
        if isinstance(receipt, FileRefusal):
            return self._file_refused(receipt)
        return json_answer(200, {"success": True, "data": receipt})

    def _file_refused(self, refusal: FileRefusal) -> Answer:
        status = refusal.code if refusal.code < 600 else 500 if refusal.code >= 50000 else 400
        with_200 = self.store.with_200 or self.service.dialect.files_with_200
        return json_answer(200 if with_200 else status, files.refused(refusal))

    # --- result files ---------------------------------------------------------------------------------------------

    def _download(self, request: Request) -> Answer:
        self.downloads += 1
        if b"authorization" in request.headers:  # the key has no business here; the book says so
            self.keys_leaked += 1
        if request.method not in ("GET", "HEAD"):
            return Answer(405, b"method not allowed", "text/plain", (("allow", "GET, HEAD"),))
        media = self._media(request.path, self._clock())
        if media is None:
            return Answer(404, b"no such file, or its link has expired", "text/plain")
        content, content_type, tag = media
        return ranged(content, content_type, tag, request.headers)

    def _media(self, path: str, now: float) -> tuple[bytes, str, str] | None:
        """Content, content type and tag of a result or an uploaded file."""
        if path.startswith(files.LINKS):
            file = self.store.find(path, now)
            return None if file is None else (file.content, file.content_type, f'"{file.id}"')
        found = self.service.result(path.removeprefix(RESULTS), now)
        if found is None:
            return None
        task, number, ending = found
        content = render(task.digest, number, ending, task.body.get("size"))
        return content, CONTENT_TYPES[ending], f'"{task.digest.hex()}-{number}-{ending}"'

    def _own_media(self, path: str, now: float) -> bytes | None:
        """What one of our own links leads to."""
        media = self._media(path, now)
        return None if media is None else media[0]
