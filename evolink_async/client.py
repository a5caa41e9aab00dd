"""`AsyncEvoLink`: one long-lived client for everything EvoLink offers."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import warnings
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload
from urllib.parse import urlsplit

from evolink_async.checks import checked_count, checked_seconds, one_of
from evolink_async.errors import (
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotSubmittedError,
    ResponseError,
    SubmitOutcomeUnknownError,
)
from evolink_async.http.answers import Answer, excerpt, read_json, status_error
from evolink_async.http.exchange import AnswerLost, Flight, NotSent, checked_base_url
from evolink_async.http.keys import ApiKey, KeySource
from evolink_async.http.rates import RateLimit
from evolink_async.http.retry import RetryPolicy
from evolink_async.http.single import submit_and_wait
from evolink_async.http.submit import checked_idempotency_key
from evolink_async.observer import Observation
from evolink_async.polling.endings import conclude, is_over, still_running
from evolink_async.requests import (
    AudioRequest,
    GenerationRequest,
    ImageRequest,
    VideoRequest,
    encode_json,
    has_local_files,
)
from evolink_async.session import CLOSED, SUBMIT_TIMEOUT, Memory, Options, Session, Validate
from evolink_async.tasks import Tasks, Waiter
from evolink_async.types import CreditBalance, Credits, KeyCredits, Task, TaskReading, with_what_creation_told

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from evolink_async.catalog import Finding
    from evolink_async.pool import Outcome, TaskPool
    from evolink_async.pool.options import PoolOptions
    from evolink_async.saving import Files, ObjectPath
    from evolink_async.saving.attachments import Attachments

__all__ = ["AsyncEvoLink"]

logger = logging.getLogger("evolink_async")

DEFAULT_BASE_URL = "https://api.evolink.ai"
DEFAULT_FILES_URL = "https://files-api.evolink.ai"
MOST_CONNECTIONS = 10_000
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class AsyncEvoLink:
    """A client for EvoLink's image, video and audio generations.

        async with AsyncEvoLink() as client:                  # the key is in EVOLINK_API_KEY
            task = await client.images.generate(model="gpt-4o-image", prompt="a lighthouse at dusk")
            print(task.urls)                                  # links that die in 24 h

    One client serves a whole program: make it once, share it between coroutines, close it at the end with
    `async with` or `aclose()`. Nothing is bound to an event loop when it is built, and no background task runs while
    nothing is outstanding.

    api_key: the key, or a function that returns it (or an awaitable of it, awaited for 60 s at most) and is asked for
        every request; by default EVOLINK_API_KEY.
    base_url: the service's address without `/v1`; by default EVOLINK_BASE_URL or https://api.evolink.ai. Plain http
        is refused except on loopback hosts.
    files_url: the address of the file service; by default EVOLINK_FILES_BASE_URL, else https://files-api.evolink.ai,
        or the host of a base_url that is not EvoLink's own.
    rate_limit: `RateLimit(5)`, "5/s" or "60/min": never more submissions than that, over all pools and calls of this
        client. None: ten at once, then 5/s and faster until the service refuses.
    max_connections: connections to the service at once; a quarter is kept for polls, a quarter for submissions.
    request_timeout: seconds for one HTTP exchange; by default 30 for a submission, 15 for a poll.
    retry: how long to back off between attempts.
    on_lost_response: "replay" sends a paid request whose answer was lost once more with the same idempotency key
        (at most three times until the service has proven that it honours keys); "hold" never does.
    validate: check known models against the catalogue before anything is sent: True refuses, "warn" logs, False skips.
    http_client: any `httpx.AsyncClient`, used for the API's hosts only and never closed by us.
    allow_private_hosts: whether result links may lead to private addresses, and callback URLs name them.

    Raises `ConfigurationError` for an option that cannot work; the message never shows the key. Since 0.1.0.
    """

    def __init__(
        self,
        api_key: KeySource | None = None,
        *,
        base_url: str | None = None,
        files_url: str | None = None,
        rate_limit: RateLimit | str | None = None,
        max_connections: int = 100,
        request_timeout: float | None = None,
        retry: RetryPolicy | None = None,
        on_lost_response: Literal["replay", "hold"] = "replay",
        validate: Validate = True,
        http_client: httpx.AsyncClient | None = None,
        allow_private_hosts: bool = False,
    ) -> None:
        self._session: Session | None = None
        self._closed = False
        options = self._options = Options()
        if api_key is None:
            api_key = os.environ.get("EVOLINK_API_KEY")
            if api_key is None:
                raise ConfigurationError(
                    "no API key: set EVOLINK_API_KEY or give api_key=; keys are made at https://evolink.ai/dashboard/keys"
                )
        options.api_key = ApiKey(api_key)
        if base_url is None:
            base_url = os.environ.get("EVOLINK_BASE_URL") or DEFAULT_BASE_URL
        options.base_url = checked_base_url(base_url, "base_url")
        if files_url is None:
            files_url = os.environ.get("EVOLINK_FILES_BASE_URL") or _files_url_beside(options.base_url)
        options.files_url = checked_base_url(files_url, "files_url")
        options.rate_limit = None if rate_limit is None else RateLimit.parse(rate_limit)
        options.max_connections = checked_count(max_connections, "max_connections", 1, MOST_CONNECTIONS)
        options.request_timeout = checked_seconds(request_timeout, "request_timeout")
        options.retry = RetryPolicy() if retry is None else retry
        if not isinstance(options.retry, RetryPolicy):
            raise ConfigurationError(f"retry must be a RetryPolicy, got {type(retry).__name__}")
        options.on_lost_response = one_of(on_lost_response, "on_lost_response", ("replay", "hold"))
        options.validate = one_of(validate, "validate", (True, False, "warn"))
        options.http_client = _checked_http_client(http_client)
        options.allow_private_hosts = one_of(allow_private_hosts, "allow_private_hosts", (True, False))
        # Whether callback URLs may lead to private hosts, as far as this side minds. A service on a loopback host,
        # which is the only one that plain http is allowed for, may call back to one.
        self._calls_private_hosts = options.allow_private_hosts or options.base_url.startswith("http:")
        self._memory = Memory()
        self._observation = Observation()
        self._warned: set[str] = set()
        self.images = Generations(self, ImageRequest)
        self.videos = Generations(self, VideoRequest)
        self.audios = Generations(self, AudioRequest)
        self.tasks = Tasks(self)
        self._files: Files | None = None

    @property
    def files(self) -> Files:
        """Uploads: files that requests can name by a link."""
        if self._files is None:
            from evolink_async.saving import Files

            self._files = Files(self)
        return self._files

    # Submitting and waiting

    async def run(self, request: GenerationRequest, *, timeout: float | None = 3600) -> Task:
        """Submit a request and wait: the completed task.

        timeout: seconds in all, None: for ever. Raises what `submit` and `tasks.wait` raise. Cancelling it stops the
        waiting, not the task: the id is in a note of the exception and in the log.
        """
        deadline = self._deadline(timeout)
        task = await self._submit(request, deadline, None)
        return await self._wait(task, deadline, timeout, age=0.0)

    async def submit(
        self, request: GenerationRequest, *, timeout: float | None = 3600, idempotency_key: str | None = None
    ) -> Task:
        """Submit a request: the task as created, which now runs and costs credits.

        timeout: seconds in all, waiting for the rate limit and retries after 429 included; None: for ever.
        idempotency_key: 16 to 96 characters of A-Z a-z 0-9 . _ -; by default a fresh one.
        Raises `InvalidRequestError` before anything is sent, an `APIStatusError` the service refused with,
        `ConnectionFailedError` if nothing ever got through, `NotSubmittedError` if its turn did not come in time, and
        `SubmitOutcomeUnknownError` if a POST was sent and its answer lost.
        Cancelling it never cuts a POST in half: one under way has 5 s to be answered, then the cancellation goes on
        with the id, or failing that the idempotency key, in a note of the exception and in the log.
        """
        task = await self._submit(request, self._deadline(timeout), idempotency_key)
        if self._observation.observer is not None:
            self._observation.observer.left(task.id)
        return task

    def pool(
        self,
        requests: GenerationRequest | Iterable[GenerationRequest] | AsyncIterable[GenerationRequest] | None = None,
        **pool_options: Unpack[PoolOptions],
    ) -> TaskPool:
        """A `TaskPool` for many requests: see there for the options. Raises `ConfigurationError` for a wrong one."""
        from evolink_async.pool import TaskPool

        return TaskPool(self, requests, **pool_options)

    async def run_many(
        self,
        requests: Iterable[GenerationRequest] | AsyncIterable[GenerationRequest],
        **pool_options: Unpack[PoolOptions],
    ) -> list[Outcome]:
        """Run many requests: their outcomes in the order given. Never raises for one item.

        What ended the pool early is raised with the outcomes so far as `.outcomes`. The options are those of `pool`.
        """
        from evolink_async.pool import run_many

        return await run_many(self.pool(requests, **pool_options))

    @overload
    async def save(self, source: Task | str, directory: os.PathLike[str]) -> list[Path]: ...
    @overload
    async def save(self, source: Task | str, directory: str) -> list[Path] | list[ObjectPath]: ...
    async def save(self, source: Task | str, directory: str | os.PathLike[str]) -> list[Path] | list[ObjectPath]:
        """Save every link of a completed task, or one link: the paths, in the order of the links.

        directory: a folder, which is made if it is missing, or s3://bucket/prefix, gs://... or az://... (the `storage`
        extra; the paths are then of that form).

        A task's files are named `{task id}-{n}.{ext}`, n from 1, the extension from the content; a link's file after
        its last path segment, or `result`. Each file appears whole or not at all, never in the place of a different
        one. What an earlier call has saved of a task, and is whole, is not fetched again. A task whose links are gone
        (rows of `tasks.list`) or dead is looked up once for fresh ones; one without any links gives an empty list.

        Only http(s) links to public addresses are fetched (and to the API's own host and port), unless the client was
        made with `allow_private_hosts=True`; redirects are checked likewise, five at most. Never with the key. An image
        may have 100 MB, anything else 4 GB; a transfer below 1 kB/s for 30 s is cut, resumed, and given up after seven
        attempts or 300 s without progress. The bounds are our guess; the links' 24 hours are documented.

        Raises `InvalidRequestError` for a task that isn't finished, the task's own error for one that failed,
        `ConfigurationError` for a directory that cannot be one, `ResultExpiredError` for dead links and `DownloadError`
        for anything else that went wrong. If a task has several links, the others are still saved before the first
        one's error is raised; its `.files` and a note name them. Cancelling it, or closing the client (`ClosedError`),
        leaves whole files only. Since 0.1.0.
        """
        from evolink_async.saving import save_results

        return await save_results(self, source, directory)

    # Reading

    async def credits(self, *, timeout: float | None = 60) -> Credits:
        """The credits of the account and of this key. timeout: seconds, retries included."""
        value = await self._read("GET", "/v1/credits", timeout)
        data = value.get("data") if isinstance(value, dict) else None
        if not isinstance(data, dict) or value.get("success") is False:
            reason = value.get("message") or value.get("msg") if isinstance(value, dict) else None
            said = f": {excerpt(reason.encode('utf-8', 'replace'))}" if isinstance(reason, str) else ""
            raise ResponseError(f"the answer about credits is not the documented one{said}")
        return _credits(data)

    async def raw(self, method: str, path: str, *, json: Any = None, timeout: float | None = 60) -> Any:
        """The parsed JSON of an endpoint that this library doesn't know yet; None for an answer without a body.

        A GET is retried for `timeout` seconds. Anything else is sent once: if its answer is lost,
        `SubmitOutcomeUnknownError` says so. Generations are refused here: `submit` sends them safely.
        """
        method = _checked_call(method, path, json)
        if method == "GET":
            return await self._read("GET", path, timeout)
        deadline = self._deadline(timeout)
        content = None if json is None else encode_json(json)
        session = self._open()
        answer = await session.until_closed(self._send_once(session, method, path, content, deadline))
        if not 200 <= answer.status < 300:
            raise status_error(answer)
        return read_json(answer) if answer.body or answer.problem else None

    async def _send_once(
        self, session: Session, method: str, path: str, content: bytes | None, deadline: float | None
    ) -> Answer:
        flight = Flight()
        try:
            async with asyncio.timeout_at(deadline):
                return await session.exchange.send(
                    method,
                    path,
                    key=await self._options.api_key.get(),
                    lane="read",
                    seconds=self._options.request_timeout or SUBMIT_TIMEOUT,
                    content=content,
                    flight=flight,
                )
        except (NotSent, AnswerLost, TimeoutError) as error:
            if isinstance(error, AnswerLost) or flight.sent:
                why = str(error) or "no answer came in time"
                raise SubmitOutcomeUnknownError(f"{method} {path} was sent: {why}") from error.__cause__
            why = str(error) or f"{session.exchange.host} was not reached in time"
            raise ConnectionFailedError(why) from error.__cause__

    # Life

    async def __aenter__(self) -> Self:
        if self._closed:
            raise ClosedError(CLOSED)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the client. POSTs under way have 5 s to be answered; running tasks stay at the service. Repeatable.

        Whoever waits for a task, or for an answer, gets `ClosedError`.
        """
        if self._closed:
            return
        session = self._session
        if session is not None and not session.loop.is_closed():
            self._refuse_elsewhere(session)
        self._closed = True
        self._session = None
        if session is None:
            return
        if session.loop.is_closed():
            session.abandon()
        else:
            await session.aclose()

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        session = getattr(self, "_session", None)
        if session is not None and not self._closed and session.pid == os.getpid():
            warn(f"unclosed {self!r}: use 'async with' or aclose()", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "idle" if self._session is None else "open"
        return f"<AsyncEvoLink {self._options.base_url} {state}>"

    def __reduce__(self) -> str:
        raise TypeError("a client is neither copied nor pickled: share it within a loop, make one in each process")

    # Inside

    def _open(self) -> Session:
        """The session of the running loop."""
        if self._closed:
            raise ClosedError(CLOSED)
        session = self._session
        if session is not None:
            # A closed loop is replaced, but not in a forked child, which shares its sockets with the parent.
            if not session.loop.is_closed() or session.pid != os.getpid():
                self._refuse_elsewhere(session)
                return session
            session.abandon()
        self._session = session = Session(self._options, self._memory, self._observation)
        return session

    def _refuse_elsewhere(self, session: Session) -> None:
        """Raise unless this is the process and the loop that the session lives in."""
        if session.pid != os.getpid():
            raise ConfigurationError("this client was used before a fork; make a new one in each process")
        if session.loop is not asyncio.get_running_loop():
            raise ConfigurationError(
                "this client lives in another event loop that isn't closed; make one client for each loop or thread"
            )

    def _deadline(self, timeout: float | None) -> float | None:
        seconds = checked_seconds(timeout, "timeout")
        return None if seconds is None else asyncio.get_running_loop().time() + seconds

    def _check(self, request: GenerationRequest) -> None:
        """Raise `InvalidRequestError` for what the catalogue knows to be wrong, as far as `validate` asks for it."""
        if not isinstance(request, GenerationRequest):
            raise InvalidRequestError(
                f"a request must be an ImageRequest, VideoRequest or AudioRequest, got {type(request).__name__}; "
                "make one out of a dict with GenerationRequest.from_dict"
            )
        mode = self._options.validate
        if mode is False:
            return
        check, lenient = _catalogue_check(), self._calls_private_hosts
        findings = check(request.kind, request.model, request.params(), allow_private_hosts=lenient)
        if not findings:
            return
        errors = [finding for finding in findings if finding.severity == "error" and mode is True]
        for finding in findings:
            if finding not in errors:
                self._warn_once(str(finding))
        if errors:
            raise InvalidRequestError("; ".join(str(finding) for finding in errors), param=errors[0].param)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            if len(self._warned) < 1000:
                self._warned.add(text)
            logger.warning("%s", text, extra={"event": "request_doubtful"})

    async def _submit(self, request: GenerationRequest, deadline: float | None, key: str | None) -> Task:
        self._check(request)
        if key is not None and not isinstance(key, str):
            raise InvalidRequestError(f"an idempotency key is text, got {key!r}", param="idempotency_key")
        key = checked_idempotency_key(key)
        session = self._open()
        try:
            if has_local_files(request):
                task = await self._submit_with_files(session, request, deadline, key)
            else:
                task = await submit_and_wait(session.submitter, request, key, "calls", deadline)
        except NotSubmittedError as error:
            if not self._closed:
                raise
            raise ClosedError("the client was closed before this request was sent; nothing was sent") from error
        logger.info(
            "task %s accepted", task.id, extra={"event": "task_accepted", "task_id": task.id, "model": request.model}
        )
        self._memory.reads.note_submitted(task)
        return task

    async def _submit_with_files(
        self, session: Session, request: GenerationRequest, deadline: float | None, key: str
    ) -> Task:
        attachments = self._attachments(session)
        attachment = await session.until_closed(attachments.attached(request, deadline))
        return await submit_and_wait(
            session.submitter,
            request,
            key,
            "calls",
            deadline,
            content=attachment.encoded(),
            on_end=partial(attachments.settled, attachment),
        )

    def _attachments(self, session: Session) -> Attachments:
        if session.attachments is None:
            from evolink_async.saving.attachments import Attachments

            session.attachments = Attachments(session, self._options, self.files)
        return session.attachments

    async def _wait(
        self,
        task: Task,
        deadline: float | None,
        timeout: float | None,
        *,
        age: float | None = None,
        on_progress: Callable[[Task], object] | None = None,
    ) -> Task:
        if is_over(task):
            return conclude(task)
        try:
            session = self._open()
        except ClosedError:
            message = f"the client is closed, and task {task.id} goes on: wait for it by its id with another one"
            raise ClosedError(message) from None
        waiter = Waiter(session.loop.create_future(), task, on_progress)
        session.watcher.follow(TaskReading.of(task), waiter, age=age)
        try:
            async with asyncio.timeout_at(deadline):
                ended = await waiter.future
                session.pace.ended(ended.id)
                logger.info(
                    "task %s %s",
                    ended.id,
                    ended.status,
                    extra={
                        "event": "task_ended",
                        "task_id": ended.id,
                        "model": ended.model,
                        "status": str(ended.status),
                        "code": None if ended.error is None else ended.error.code,
                    },
                )
                return conclude(with_what_creation_told(ended, task))
        except TimeoutError as error:
            if isinstance(error, EvoLinkError):
                raise
            if session.watcher.unreachable(task.id):
                message = f"could not reach {session.exchange.host} to look at task {task.id}; it goes on: wait again"
                raise ConnectionFailedError(message) from None
            if waiter.task.is_terminal:  # its end came with the deadline, or only its links were still awaited
                return conclude(waiter.task)
            raise still_running(waiter.task, timeout) from session.watcher.denial(task.id)
        except asyncio.CancelledError as cancellation:
            cancellation.add_note(f"evolink task {task.id} goes on: client.tasks.wait({task.id!r})")
            raise
        finally:
            session.watcher.unfollow(task.id, waiter)

    async def _read(self, method: str, path: str, timeout: float | None, json: Any = None) -> Any:
        seconds = checked_seconds(timeout, "timeout")
        session = self._open()
        return await session.until_closed(session.reader.json(method, path, timeout=seconds, json=json))


class Generations:
    """`client.images`, `client.videos`, `client.audios`: generations of one kind."""

    def __init__(self, client: AsyncEvoLink, request_class: type[GenerationRequest]) -> None:
        self._client = client
        self._request_class = request_class

    async def generate(
        self,
        *,
        model: str,
        prompt: str | None = None,
        timeout: float | None = 3600,
        idempotency_key: str | None = None,
        **params: Any,
    ) -> Task:
        """Submit and wait: the completed task. See `AsyncEvoLink.submit` and `Tasks.wait`.

        timeout: seconds in all, None: for ever. Every other parameter is sent as given; a path or bytes where a link is
        wanted is uploaded for it, and removed after the task (docs/uploads.md).
        """
        client = self._client
        deadline = client._deadline(timeout)
        request = self._request_class(model=model, prompt=prompt, **params)
        task = await client._submit(request, deadline, idempotency_key)
        return await client._wait(task, deadline, timeout, age=0.0)

    async def submit(
        self,
        *,
        model: str,
        prompt: str | None = None,
        timeout: float | None = 3600,
        idempotency_key: str | None = None,
        **params: Any,
    ) -> Task:
        """Submit: the task as created. See `AsyncEvoLink.submit`."""
        request = self._request_class(model=model, prompt=prompt, **params)
        return await self._client.submit(request, timeout=timeout, idempotency_key=idempotency_key)


@cache
def _catalogue_check() -> Callable[..., list[Finding]]:
    from evolink_async.catalog import check  # reads the catalogue, which not every program needs

    return check


def _files_url_beside(base_url: str) -> str:
    """EvoLink's own file service; the host of any other service, which is the only one that may see its key."""
    if base_url == DEFAULT_BASE_URL:
        return DEFAULT_FILES_URL
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc}"


def _checked_http_client(http_client: httpx.AsyncClient | None) -> httpx.AsyncClient | None:
    """An open client of httpx's asynchronous shape, or None."""
    if http_client is None:
        return None
    methods = (getattr(http_client, name, None) for name in ("send", "aclose"))
    if isinstance(http_client, type) or not all(map(callable, methods)):
        raise ConfigurationError(f"http_client must be an httpx.AsyncClient, got {type(http_client).__name__}")
    if getattr(http_client, "is_closed", False) is True:
        raise ConfigurationError("http_client is closed already")
    return http_client


def _checked_call(method: str, path: str, json: Any) -> str:
    """The method in upper case. Raises `InvalidRequestError` for what `raw` does not send."""
    if not isinstance(path, str) or not re.fullmatch(r"/v1/[\x21-\x7e]+", path):
        raise InvalidRequestError(f"a path must begin with /v1/ and hold no spaces, got {path!r}", param="path")
    resource = path.partition("?")[0]
    if "//" in resource or ".." in resource or "#" in path or "\\" in resource:
        raise InvalidRequestError(f"a path must be plain, got {path!r}", param="path")
    if not isinstance(method, str) or method.upper() not in _METHODS:
        raise InvalidRequestError(f"method must be one of {', '.join(_METHODS)}, got {method!r}", param="method")
    method = method.upper()
    if method == "GET" and json is not None:
        raise InvalidRequestError("a GET carries no json: put it in the query", param="json")
    if method != "GET" and "/generations" in resource:
        raise InvalidRequestError("generations cost money: use client.submit, which sends none twice on a guess")
    return method


def _credits(data: Mapping[str, Any]) -> Credits:
    from decimal import Decimal

    def amount(section: str, name: str) -> Decimal:
        values = data.get(section)
        value = values.get(name) if isinstance(values, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ResponseError(f"the answer about credits has no {section}.{name}")
        try:
            number = Decimal(str(value))
        except ArithmeticError:
            number = Decimal("NaN")
        if not number.is_finite():
            raise ResponseError(f"the answer about credits has no number as {section}.{name}")
        return number

    unlimited = isinstance(data.get("token"), dict) and data["token"].get("unlimited_credits") in (True, "true")
    return Credits(
        user=CreditBalance(remaining=amount("user", "remaining_credits"), used=amount("user", "used_credits")),
        key=KeyCredits(
            remaining=amount("token", "remaining_credits"), used=amount("token", "used_credits"), unlimited=unlimited
        ),
    )
