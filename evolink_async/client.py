"""`AsyncEvoLink`: one long-lived client for everything EvoLink offers."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload
from urllib.parse import urlsplit

from evolink_async.checks import checked_count, checked_seconds, deadline_after, one_of
from evolink_async.core import ClientCore
from evolink_async.errors import (
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidRequestError,
    NotSubmittedError,
    ResponseError,
    SubmitOutcomeUnknownError,
)
from evolink_async.http.answers import Answer, excerpt, read_json, status_error
from evolink_async.http.exchange import AnswerLost, Flight, NotSent, checked_base_url
from evolink_async.http.foreign import is_closed
from evolink_async.http.keys import ApiKey, KeySource
from evolink_async.http.rates import RateLimit
from evolink_async.http.retry import RetryPolicy
from evolink_async.http.single import submit_and_wait
from evolink_async.http.submit import checked_idempotency_key
from evolink_async.requests import (
    AudioRequest,
    GenerationRequest,
    ImageRequest,
    VideoRequest,
    encode_json,
    has_local_files,
)
from evolink_async.session import CLOSED, SUBMIT_TIMEOUT, Options, Session, Validate
from evolink_async.tasks import Tasks, wait_for
from evolink_async.types import CreditBalance, Credits, KeyCredits, Task

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from evolink_async.pool import Outcome, TaskPool
    from evolink_async.pool.options import PoolOptions
    from evolink_async.saving import Files, ObjectPath

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
    request_timeout: seconds for one HTTP exchange; by default 30 for a submission, 15 for a poll, 120 for an upload.
    retry: how long to back off between attempts.
    on_lost_response: "replay" sends a paid request whose answer was lost once more with the same idempotency key
        (at most three times until the service has proven that it honours keys); "hold" never does.
    validate: check known models against the catalogue before anything is sent: True refuses, "warn" logs, False skips.
    http_client: any `httpx.AsyncClient`, used for the API's hosts only and never closed by us. Its own limit of
        connections counts too.
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
        options = Options()
        if api_key is None:
            api_key = os.environ.get("EVOLINK_API_KEY")
            if api_key is None:
                raise ConfigurationError(
                    "no API key: set EVOLINK_API_KEY or give api_key=; keys are made at https://evolink.ai/dashboard/keys"
                )
        options.api_key = ApiKey(api_key)
        options.base_url = _address(base_url, "base_url", "EVOLINK_BASE_URL") or DEFAULT_BASE_URL
        beside = _files_url_beside(options.base_url)
        options.files_url = _address(files_url, "files_url", "EVOLINK_FILES_BASE_URL") or beside
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
        self._core = ClientCore(options)
        self.images: Generations = Generations(self, ImageRequest)
        self.videos: Generations = Generations(self, VideoRequest)
        self.audios: Generations = Generations(self, AudioRequest)
        self.tasks: Tasks = Tasks(self._core)
        self._files: Files | None = None

    @property
    def files(self) -> Files:
        """Uploads: files that requests can name by a link."""
        if self._files is None:
            from evolink_async.saving import Files

            self._files = Files(self._core)
        return self._files

    # Submitting and waiting

    async def run(self, request: GenerationRequest, *, timeout: float | None = 3600) -> Task:
        """Submit a request and wait: the completed task.

        timeout: seconds in all, None: for ever. Raises what `submit` and `tasks.wait` raise. Cancelling it stops the
        waiting, not the task: the id is in a note of the exception and in the log.
        """
        deadline = deadline_after(timeout)
        task = await _submit(self._core, request, deadline, None)
        return await wait_for(self._core, task, deadline, timeout, age=0.0)

    async def submit(
        self, request: GenerationRequest, *, timeout: float | None = 3600, idempotency_key: str | None = None
    ) -> Task:
        """Submit a request: the task as created, which now runs and costs credits.

        timeout: seconds in all, waiting for the rate limit and retries after 429 included; None: for ever. A POST that
            is under way when they are over has 5 s more to be answered.
        idempotency_key: 16 to 96 characters of A-Z a-z 0-9 . _ -; by default a fresh one.
        Raises `InvalidRequestError` before anything is sent, an `APIStatusError` the service refused with,
        `ConnectionFailedError` if nothing ever got through, `NotSubmittedError` if its turn did not come in time, and
        `SubmitOutcomeUnknownError` if a POST was sent and its answer lost.
        Cancelling it never cuts a POST in half: one under way has 5 s to be answered, then the cancellation goes on
        with the id, or failing that the idempotency key, in a note of the exception and in the log.
        """
        task = await _submit(self._core, request, deadline_after(timeout), idempotency_key)
        if self._core.observation.observer is not None:
            self._core.observation.observer.left(task.id)
        return task

    def pool(
        self,
        requests: GenerationRequest | Iterable[GenerationRequest] | AsyncIterable[GenerationRequest] | None = None,
        **pool_options: Unpack[PoolOptions],
    ) -> TaskPool:
        """A `TaskPool` for many requests: see there for the options. Raises `ConfigurationError` for a wrong one."""
        from evolink_async.pool import TaskPool

        return TaskPool(self._core, requests, **pool_options)

    async def run_many(
        self,
        requests: Iterable[GenerationRequest] | AsyncIterable[GenerationRequest],
        **pool_options: Unpack[PoolOptions],
    ) -> list[Outcome]:
        """Run many requests: their outcomes in the order given. Never raises for one item.

        What ended the pool early is raised with the outcomes so far as `.outcomes`; so is a cancellation, with those of
        what was sent and goes on too. The options are those of `pool`.
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

        return await save_results(self._core, source, directory)

    # Reading

    async def credits(self, *, timeout: float | None = 60) -> Credits:
        """The credits of the account and of this key. timeout: seconds, retries included."""
        value = await self._core.read("GET", "/v1/credits", timeout)
        data = value.get("data") if isinstance(value, dict) else None
        if not isinstance(data, dict) or value.get("success") is False:
            reason = value.get("message") or value.get("msg") if isinstance(value, dict) else None
            told = (reason if isinstance(reason, str) else repr(value)).encode("utf-8", "replace")
            raise ResponseError(f"the answer about credits is not the documented one: {excerpt(told)}")
        return _credits(data)

    async def raw(self, method: str, path: str, *, json: Any = None, timeout: float | None = 60) -> Any:
        """The parsed JSON of an endpoint that this library doesn't know yet; None for an answer without a body.

        A GET is retried for `timeout` seconds. Anything else is sent once: if its answer is lost,
        `SubmitOutcomeUnknownError` says so. Generations are refused here: `submit` sends them safely.
        """
        method = _checked_call(method, path, json)
        deadline = deadline_after(timeout)
        content = None if json is None else encode_json(json)
        session = self._core.open()
        if method == "GET":
            answer = await session.until_closed(session.reader.answer(method, path, timeout=timeout))
        else:
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
                    key=await self._core.options.api_key.get(),
                    lane="read",
                    seconds=self._core.options.request_timeout or SUBMIT_TIMEOUT,
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
        if self._core.closed:
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
        await self._core.aclose()

    def __repr__(self) -> str:
        return repr(self._core)

    def __reduce__(self) -> str:
        raise TypeError("a client is neither copied nor pickled: share it within a loop, make one in each process")


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
        core, deadline = self._client._core, deadline_after(timeout)
        request = self._request_class(model=model, prompt=prompt, **params)
        task = await _submit(core, request, deadline, idempotency_key)
        return await wait_for(core, task, deadline, timeout, age=0.0)

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


async def _submit(core: ClientCore, request: GenerationRequest, deadline: float | None, key: str | None) -> Task:
    core.check(request)
    if key is not None and not isinstance(key, str):
        raise InvalidRequestError(f"an idempotency key is text, got {key!r}", param="idempotency_key")
    key = checked_idempotency_key(key)
    session = core.open()
    try:
        if has_local_files(request):
            task = await _submit_with_files(core, session, request, deadline, key)
        else:
            task = await submit_and_wait(session.submitter, request, key, "calls", deadline)
    except NotSubmittedError as error:
        if not core.closed:
            raise
        raise ClosedError("the client was closed before this request was sent; nothing was sent") from error
    logger.info(
        "task %s accepted", task.id, extra={"event": "task_accepted", "task_id": task.id, "model": request.model}
    )
    core.memory.reads.note_submitted(task)
    return task


async def _submit_with_files(
    core: ClientCore, session: Session, request: GenerationRequest, deadline: float | None, key: str
) -> Task:
    from evolink_async.saving.attachments import attachments_of  # not every program has local files

    attachments = attachments_of(core, session)
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


def _address(given: str | None, option: str, variable: str) -> str | None:
    """The address of a service, given or in the environment; None if it is in neither."""
    if given is not None:
        return checked_base_url(given, option)
    told = os.environ.get(variable)
    return checked_base_url(told, variable) if told else None


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
    if is_closed(http_client):
        raise ConfigurationError("http_client is closed already")
    return http_client


def _checked_call(method: str, path: str, json: Any) -> str:
    """The method in upper case. Raises `InvalidRequestError` for what `raw` does not send."""
    if not isinstance(path, str) or not re.fullmatch(r"/v1/[\x21-\x7e]+", path):
        raise InvalidRequestError(
            f"a path must be /v1/ and more, in ASCII without spaces (percent-encoded), got {path!r}", param="path"
        )
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
