"""`AsyncEvoLink`: one long-lived client for everything EvoLink offers."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import warnings
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from evolink_async.errors import (
    APIStatusError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotFoundError,
    ResponseError,
    SubmitOutcomeUnknownError,
    TaskCancelledError,
    TaskError,
    TaskFailedError,
    TaskTimeoutError,
)
from evolink_async.http.answers import read_json, status_error, task_from
from evolink_async.http.exchange import AnswerLost, Exchange, NotSent, checked_base_url
from evolink_async.http.gate import Gate
from evolink_async.http.keys import ApiKey, KeySource
from evolink_async.http.pace import Pace, RateLimit
from evolink_async.http.reads import Reader
from evolink_async.http.retry import Replays, RetryPolicy
from evolink_async.http.submit import Submitter, checked_idempotency_key, submit_and_wait
from evolink_async.http.transport import ForeignTransport, SlotTransport
from evolink_async.polling.schedule import EstimateSchedule, Schedule
from evolink_async.polling.watcher import BATCH_PATH, BATCH_SIZE, WORKERS, Watcher, has_result
from evolink_async.requests import (
    AudioRequest,
    GenerationRequest,
    ImageRequest,
    VideoRequest,
    encode_json,
)
from evolink_async.types import TASK_ID, CreditBalance, Credits, KeyCredits, Task, TaskFailure, TaskStatus

if TYPE_CHECKING:
    import httpx

    from evolink_async.pool import Outcome, TaskPool

__all__ = ["AsyncEvoLink"]

logger = logging.getLogger("evolink_async")

DEFAULT_BASE_URL = "https://api.evolink.ai"
SUBMIT_TIMEOUT, POLL_TIMEOUT = 30.0, 15.0
MOST_CONNECTIONS = 10_000
LIST_PAGE = 50
_LIST_STATUSES = ("processing", "completed", "failed", "cancelled")

Validate = bool | Literal["warn"]


class _Session:
    """What belongs to one event loop: connections, pace, watcher. Built at the first call, dropped with its loop."""

    def __init__(self, client: AsyncEvoLink) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        options = client._options
        self.transport = _transport(options.http_client, options.max_connections)
        self.exchange = Exchange(self.transport, options.base_url)
        gate = self.transport.gate
        self.pace = Pace(options.rate_limit, gate.lane_limit, options.retry, client._learned_rates)
        self.submitter = Submitter(
            self.exchange,
            options.api_key,
            self.pace,
            options.retry,
            client._replays,
            hold=options.on_lost_response == "hold",
            request_timeout=options.request_timeout or SUBMIT_TIMEOUT,
        )
        self.reader = Reader(
            self.exchange, options.api_key, options.retry, request_timeout=options.request_timeout or POLL_TIMEOUT
        )
        workers = min(WORKERS, gate.lane_limit)
        self.watcher = Watcher(self.reader, client._schedule, options.retry, workers=workers)

    async def aclose(self) -> None:
        await self.submitter.aclose()
        await self.pace.aclose()
        await self.watcher.aclose()
        await self.transport.aclose()

    def abandon(self) -> None:
        """Let go of what a closed loop has left behind; nothing can be awaited any more."""
        if isinstance(self.transport, SlotTransport):
            self.transport.abandon()


def _transport(http_client: httpx.AsyncClient | None, max_connections: int) -> SlotTransport | ForeignTransport:
    if http_client is not None:
        return ForeignTransport(http_client, Gate(max_connections))
    return SlotTransport(max_connections)


class _Options:
    """The checked options of a client."""

    __slots__ = (
        "allow_private_hosts",
        "api_key",
        "base_url",
        "http_client",
        "max_connections",
        "on_lost_response",
        "rate_limit",
        "request_timeout",
        "retry",
        "validate",
    )

    api_key: ApiKey
    base_url: str
    rate_limit: RateLimit | None
    max_connections: int
    request_timeout: float | None
    retry: RetryPolicy
    on_lost_response: str
    validate: Validate
    http_client: httpx.AsyncClient | None
    allow_private_hosts: bool


class AsyncEvoLink:
    """A client for EvoLink's image, video and audio generations.

        async with AsyncEvoLink() as client:                  # the key is in EVOLINK_API_KEY
            task = await client.images.generate(model="gpt-4o-image", prompt="a lighthouse at dusk")
            print(task.urls)                                  # links that die in 24 h

    One client serves a whole program: make it once, share it between coroutines, close it at the end with
    `async with` or `aclose()`. Nothing is bound to an event loop when it is built, and no background task runs while
    nothing is outstanding.

    api_key: the key, or a function that returns it (or an awaitable of it) and is asked for every request; by
        default EVOLINK_API_KEY.
    base_url: the service's address without `/v1`; by default EVOLINK_BASE_URL or https://api.evolink.ai. Plain http
        is refused except on loopback hosts.
    rate_limit: `RateLimit(5)`, "5/s" or "60/min": never more submissions than that, over all pools and calls of this
        client. None: ten at once, then 5/s and faster until the service refuses.
    max_connections: connections to the service at once; a quarter is kept for polls, a quarter for submissions.
    request_timeout: seconds for one HTTP exchange; by default 30 for a submission, 15 for a poll.
    retry: how long to back off between attempts.
    on_lost_response: "replay" sends a paid request whose answer was lost once more with the same idempotency key
        (at most three times until the service has proven that it honours keys); "hold" never does.
    validate: check known models against the catalogue before anything is sent: True refuses, "warn" logs, False skips.
    http_client: any `httpx.AsyncClient`, used for the API's hosts only and never closed by us.
    allow_private_hosts: whether callback URLs may name private addresses.

    Raises `ConfigurationError` for an option that cannot work; the message never shows the key. Since 0.1.0.
    """

    def __init__(
        self,
        api_key: KeySource | None = None,
        *,
        base_url: str | None = None,
        rate_limit: RateLimit | str | None = None,
        max_connections: int = 100,
        request_timeout: float | None = None,
        retry: RetryPolicy | None = None,
        on_lost_response: Literal["replay", "hold"] = "replay",
        validate: Validate = True,
        http_client: httpx.AsyncClient | None = None,
        allow_private_hosts: bool = False,
    ) -> None:
        self._session: _Session | None = None
        self._closed = False
        options = self._options = _Options()
        if api_key is None:
            api_key = os.environ.get("EVOLINK_API_KEY")
            if api_key is None:
                raise ConfigurationError(
                    "no API key: set EVOLINK_API_KEY or give api_key=; keys are made at https://evolink.ai/dashboard/keys"
                )
        options.api_key = ApiKey(api_key)
        base_url = base_url or os.environ.get("EVOLINK_BASE_URL") or DEFAULT_BASE_URL
        options.base_url = checked_base_url(base_url, "base_url")
        options.rate_limit = None if rate_limit is None else RateLimit.parse(rate_limit)
        options.max_connections = _whole(max_connections, "max_connections", 1, MOST_CONNECTIONS)
        options.request_timeout = checked_seconds(request_timeout, "request_timeout")
        options.retry = RetryPolicy() if retry is None else retry
        if not isinstance(options.retry, RetryPolicy):
            raise ConfigurationError(f"retry must be a RetryPolicy, got {type(retry).__name__}")
        options.on_lost_response = _one_of(on_lost_response, "on_lost_response", ("replay", "hold"))
        options.validate = _one_of(validate, "validate", (True, False, "warn"))
        if http_client is not None and not callable(getattr(http_client, "send", None)):
            raise ConfigurationError(f"http_client must be an httpx.AsyncClient, got {type(http_client).__name__}")
        options.http_client = http_client
        options.allow_private_hosts = bool(allow_private_hosts)
        # What was learned outlives a loop.
        self._learned_rates: dict[str, float] = {}
        self._replays = Replays()
        self._schedule: Schedule = EstimateSchedule()
        self._warned: set[str] = set()
        self.images = Generations(self, ImageRequest)
        self.videos = Generations(self, VideoRequest)
        self.audios = Generations(self, AudioRequest)
        self.tasks = Tasks(self)

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
        return await self._submit(request, self._deadline(timeout), idempotency_key)

    def pool(
        self,
        requests: GenerationRequest | Iterable[GenerationRequest] | AsyncIterable[GenerationRequest] | None = None,
        **pool_options: Any,
    ) -> TaskPool:
        """A `TaskPool` for many requests: see there for the options. Raises `ConfigurationError` for a wrong one."""
        from evolink_async.pool import TaskPool

        return TaskPool(self, requests, **pool_options)

    async def run_many(
        self,
        requests: Iterable[GenerationRequest] | AsyncIterable[GenerationRequest],
        **pool_options: Any,
    ) -> list[Outcome]:
        """Run many requests: their outcomes in the order given. Never raises for one item.

        What ended the pool early is raised with the outcomes so far as `.outcomes`. The options are those of `pool`.
        """
        from evolink_async.pool import run_many

        return await run_many(self.pool(requests, **pool_options))

    # Reading

    async def credits(self, *, timeout: float | None = 60) -> Credits:
        """The credits of the account and of this key. timeout: seconds, retries included."""
        value = await self._read("GET", "/v1/credits", timeout)
        data = value.get("data") if isinstance(value, dict) else None
        if not isinstance(data, dict) or value.get("success") is False:
            raise ResponseError("the answer about credits is not the documented one")
        return _credits(data)

    async def raw(self, method: str, path: str, *, json: Any = None, timeout: float | None = 60) -> Any:
        """The parsed JSON of an endpoint that this library doesn't know yet.

        A GET is retried for `timeout` seconds. Anything else is sent once: if its answer is lost,
        `SubmitOutcomeUnknownError` says so. Generations are refused here: `submit` sends them safely.
        """
        method = method.upper()
        if not re.fullmatch(r"/v1/[\x21-\x7e]+", path) or "//" in path or ".." in path:
            raise InvalidRequestError(f"a path must begin with /v1/ and name no host, got {path!r}", param="path")
        if method == "GET":
            return await self._read("GET", path, timeout)
        if method not in ("POST", "PUT", "PATCH", "DELETE"):
            raise InvalidRequestError(f"method must be GET, POST, PUT, PATCH or DELETE, got {method!r}", param="method")
        if "/generations" in path:
            raise InvalidRequestError("generations cost money: use client.submit, which sends none twice on a guess")
        session = self._open()
        try:
            answer = await session.exchange.send(
                method,
                path,
                key=await self._options.api_key.get(),
                lane="read",
                seconds=_at_most(timeout, SUBMIT_TIMEOUT),
                content=None if json is None else encode_json(json),
            )
        except NotSent as error:
            raise ConnectionFailedError(str(error)) from error.__cause__
        except AnswerLost as error:
            raise SubmitOutcomeUnknownError(f"{method} {path} was sent: {error}") from error.__cause__
        if not 200 <= answer.status < 300:
            raise status_error(answer)
        return read_json(answer)

    # Life

    async def __aenter__(self) -> Self:
        if self._closed:
            raise ClosedError("this client is closed; make a new one")
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the client. POSTs under way have 5 s to be answered; running tasks stay at the service. Repeatable."""
        if self._closed:
            return
        session = None
        try:
            session = self._session and self._open()
        finally:
            self._closed = True
            self._session = None
        if session is not None:
            await session.aclose()

    def __del__(self) -> None:
        if getattr(self, "_session", None) is not None and not self._closed:
            message = f"unclosed {self!r}: use 'async with' or aclose()"
            warnings.warn(message, ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "idle" if self._session is None else "open"
        return f"<AsyncEvoLink {self._options.base_url} {state}>"

    def __reduce__(self) -> str:
        raise TypeError("a client is not pickled; make one in each process")

    # Inside

    def _open(self) -> _Session:
        """The session of the running loop."""
        if self._closed:
            raise ClosedError("this client is closed; make a new one")
        loop = asyncio.get_running_loop()
        session = self._session
        if session is not None:
            if session.pid != os.getpid():
                raise ConfigurationError("this client was used before a fork; make a new one in each process")
            if session.loop is loop:
                return session
            if not session.loop.is_closed():
                raise ConfigurationError(
                    "this client lives in another event loop that isn't closed; make one client for each loop or thread"
                )
            session.abandon()
        self._session = session = _Session(self)
        return session

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
        from evolink_async.catalog import check

        # A service on a loopback host, which is the only one that plain http is allowed for, may call back to one.
        lenient = self._options.allow_private_hosts or self._options.base_url.startswith("http:")
        findings = check(request.kind, request.model, request.params(), allow_private_hosts=lenient)
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
            logger.warning("%s", text)

    async def _submit(self, request: GenerationRequest, deadline: float | None, key: str | None) -> Task:
        self._check(request)
        key = checked_idempotency_key(key)
        session = self._open()
        task = await submit_and_wait(session.submitter, request, key, "calls", deadline)
        logger.info("task %s accepted", task.id)
        return task

    async def _wait(
        self,
        task: Task,
        deadline: float | None,
        timeout: float | None,
        *,
        age: float | None = None,
        on_progress: Callable[[Task], object] | None = None,
    ) -> Task:
        session = self._open()
        if task.is_terminal and (has_result(task) or not task.succeeded):
            return conclude(task)
        waiter = _Waiter(session.loop.create_future(), task, on_progress)
        session.watcher.follow(task, waiter, age=age)
        try:
            async with asyncio.timeout_at(deadline):
                task = await waiter.future
        except TimeoutError:
            if session.watcher.unreachable(task.id):
                message = f"could not reach {session.exchange.host} to look at task {task.id}; it goes on: wait again"
                raise ConnectionFailedError(message) from None
            raise still_running(waiter.task, timeout) from None
        except asyncio.CancelledError as cancellation:
            cancellation.add_note(f"evolink task {task.id} goes on: client.tasks.wait({task.id!r})")
            raise
        finally:
            session.watcher.unfollow(task.id, waiter)
        return conclude(task)

    async def _read(self, method: str, path: str, timeout: float | None, json: Any = None) -> Any:
        seconds = checked_seconds(timeout, "timeout")
        return await self._open().reader.json(method, path, timeout=seconds, json=json)


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

        timeout: seconds in all, None: for ever. Every other parameter is sent as given.
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


class Tasks:
    """`client.tasks`: what the service says of its tasks."""

    def __init__(self, client: AsyncEvoLink) -> None:
        self._client = client

    async def get(self, task_id: str, *, timeout: float | None = 60) -> Task:
        """The task now. Raises `NotFoundError` for an id that the service doesn't know. timeout: seconds in all."""
        return task_from(await self._client._read("GET", f"/v1/tasks/{_checked_id(task_id)}", timeout))

    async def get_many(self, task_ids: Iterable[str], *, timeout: float | None = 60) -> dict[str, Task]:
        """The tasks now, by id; ids the service doesn't know are left out.

        Asks for 50 at once where the service can (the vendor's client does; it isn't documented), else one by one.
        timeout: seconds in all, retries included.
        """
        ids = list(dict.fromkeys(_checked_id(task_id) for task_id in task_ids))
        found: dict[str, Task] = {}
        try:
            async with asyncio.timeout_at(self._client._deadline(timeout)):
                if len(ids) > 1:
                    await self._get_batches(ids, found)
                await self._get_each([task_id for task_id in ids if task_id not in found], found)
        except TimeoutError:
            raise ConnectionFailedError(
                f"{len(found)} of {len(ids)} tasks could be read within {timeout:g} s"
            ) from None
        return {task_id: found[task_id] for task_id in ids if task_id in found}

    async def _get_batches(self, ids: list[str], found: dict[str, Task]) -> None:
        for start in range(0, len(ids), BATCH_SIZE):
            try:
                chunk = ids[start : start + BATCH_SIZE]
                value = await self._client._read("POST", BATCH_PATH, None, json={"task_ids": chunk})
                tasks = [task_from(row) for row in value["data"]]
            except (APIStatusError, ResponseError, KeyError, TypeError):
                return  # not every service has it: one by one then
            whole = [task for task in tasks if has_result(task) or not task.succeeded]
            found.update((task.id, task) for task in whole if task.id in chunk)

    async def _get_each(self, ids: list[str], found: dict[str, Task]) -> None:
        queue = iter(ids)

        async def work() -> None:
            for task_id in queue:
                try:
                    found[task_id] = await self.get(task_id, timeout=None)
                except NotFoundError:
                    pass

        workers = [asyncio.ensure_future(work()) for _ in range(min(8, len(ids)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            if workers:
                await asyncio.wait(workers)

    async def list(
        self, *, status: str | None = None, model: str | None = None, timeout: float | None = 60
    ) -> AsyncIterator[Task]:
        """The account's tasks, newest first, as an async iterator; rows carry no result links.

        status: processing (pending ones included), completed, failed or cancelled. timeout: seconds for each page.
        The endpoint is in the vendor's client, not in the public pages: a service without it raises `NotFoundError`.
        """
        if status is not None and status not in _LIST_STATUSES:
            message = f"status must be one of {', '.join(_LIST_STATUSES)}, got {status!r}"
            raise InvalidRequestError(message, param="status")
        from urllib.parse import urlencode

        filters = {name: value for name, value in (("status", status), ("model", model)) if value is not None}
        seen: set[str] = set()
        page = 1
        while True:
            query = urlencode({"page": page, "page_size": LIST_PAGE} | filters)
            value = await self._client._read("GET", f"/v1/tasks?{query}", timeout)
            rows = value.get("data") if isinstance(value, dict) else None
            if not isinstance(rows, list):
                raise ResponseError("the answer about tasks is not a page of tasks")
            fresh = [task for task in map(task_from, rows) if task.id not in seen]
            seen = {task.id for task in fresh}  # pages shift while tasks are added: the last page's rows may come again
            for task in fresh:
                yield task
            if len(rows) < LIST_PAGE:
                return
            page += 1

    async def wait(
        self,
        task_or_id: Task | str,
        *,
        timeout: float | None = 3600,
        on_progress: Callable[[Task], object] | None = None,
    ) -> Task:
        """Wait for a task, also one from another process: the completed task.

        timeout: seconds in all, None: for ever. on_progress: called with the task at every look that finds it running.
        Raises `TaskFailedError`, `TaskCancelledError`, `TaskLostError`; `TaskTimeoutError` when the time is over (the
        task goes on and is paid: wait again); `ConnectionFailedError` if the service could not be reached at all.
        Cancelling it stops the waiting, not the task.
        """
        client = self._client
        deadline = client._deadline(timeout)
        task = task_or_id if isinstance(task_or_id, Task) else Task(id=_checked_id(task_or_id))
        return await client._wait(task, deadline, timeout, on_progress=on_progress)


class _Waiter:
    """The follower of one wait."""

    __slots__ = ("_on_progress", "future", "task")

    def __init__(
        self, future: asyncio.Future[Task], task: Task, on_progress: Callable[[Task], object] | None
    ) -> None:
        self.future = future
        self.task = task
        self._on_progress = on_progress

    def seen(self, task: Task) -> None:
        self.task = task
        if self._on_progress is None:
            return
        try:
            self._on_progress(task)
        except Exception:
            logger.exception("on_progress raised; the waiting goes on")

    def ended(self, task: Task) -> None:
        if not self.future.done():
            self.future.set_result(task)

    def lost(self, error: EvoLinkError) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def crashed(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def conclude(task: Task) -> Task:
    """The completed task. Raises `TaskFailedError` or `TaskCancelledError` for one that ended otherwise."""
    error = failure_of(task)
    if error is not None:
        raise error
    return task


def failure_of(task: Task) -> TaskError | None:
    """The error that a terminal task stands for, None if it completed."""
    if task.succeeded:
        return None
    failure = task.error or TaskFailure()
    message = failure.message or "the service gave no reason"
    if task.status == TaskStatus.CANCELLED:
        return TaskCancelledError(f"the task was cancelled: {message}", task=task)
    return TaskFailedError(message, task=task, code=failure.code)


def still_running(task: Task, timeout: float | None) -> TaskTimeoutError:
    """The error of a wait that ended before its task."""
    after = "" if timeout is None else f" after {timeout:g} s"
    message = f"still {task.status}{after}; it goes on and is paid for: wait again with client.tasks.wait({task.id!r})"
    return TaskTimeoutError(message, task=task)


def checked_seconds(value: float | None, name: str) -> float | None:
    """A positive number of seconds, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name} must be a positive number of seconds or None, got {value!r}")
    return float(value)


def _at_most(timeout: float | None, most: float) -> float:
    seconds = checked_seconds(timeout, "timeout")
    return most if seconds is None else min(seconds, most)


def _whole(value: int, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return value


def _one_of(value: Any, name: str, allowed: tuple[Any, ...]) -> Any:
    if not isinstance(value, str | bool) or value not in allowed:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _checked_id(task_id: str) -> str:
    if not isinstance(task_id, str) or not TASK_ID.fullmatch(task_id) or not task_id.strip("."):
        message = f"no task id: {task_id!r}; ids look like task-unified-1774857405-abc123"
        raise InvalidRequestError(message, param="task_id")
    return task_id


def _credits(data: Mapping[str, Any]) -> Credits:
    from decimal import Decimal

    def amount(section: str, name: str) -> Decimal:
        values = data.get(section)
        value = values.get(name) if isinstance(values, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ResponseError(f"the answer about credits has no {section}.{name}")
        try:
            return Decimal(str(value))
        except ArithmeticError:
            raise ResponseError(f"the answer about credits has no number as {section}.{name}") from None

    unlimited = isinstance(data.get("token"), dict) and data["token"].get("unlimited_credits") is True
    return Credits(
        user=CreditBalance(remaining=amount("user", "remaining_credits"), used=amount("user", "used_credits")),
        key=KeyCredits(
            remaining=amount("token", "remaining_credits"), used=amount("token", "used_credits"), unlimited=unlimited
        ),
    )
