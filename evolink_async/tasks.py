"""`client.tasks`: what the service says of its tasks, and waiting for them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from evolink_async.checks import checked_function, checked_id, deadline_after
from evolink_async.errors import (
    BadRequestError,
    ClosedError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotFoundError,
    ResponseError,
    TaskError,
)
from evolink_async.http.answers import task_from
from evolink_async.own_tasks import own_task
from evolink_async.polling.endings import conclude, has_result, is_over, never_seen, still_running
from evolink_async.polling.watcher import BATCH_PATH, BATCH_SIZE
from evolink_async.types import Task, TaskReading, with_what_creation_told

if TYPE_CHECKING:
    from evolink_async.core import ClientCore

__all__ = ["Tasks"]

logger = logging.getLogger("evolink_async")

LIST_PAGE = 50
_READERS = 8  # single GETs at once of one `get_many`
_PAGES_WITHOUT_NEWS = 20
_LIST_STATUSES = ("processing", "completed", "failed", "cancelled")


class Tasks:
    """`client.tasks`: what the service says of its tasks."""

    def __init__(self, core: ClientCore) -> None:
        self._core = core

    async def get(self, task_id: str, *, timeout: float | None = 60) -> Task:
        """The task now. Raises `NotFoundError` for an id that the service doesn't know. timeout: seconds in all."""
        task = self._noted(task_from(await self._core.read("GET", f"/v1/tasks/{checked_id(task_id)}", timeout)))
        if task.id != task_id:
            raise ResponseError(f"asked for task {task_id}, the answer is about another")
        return task

    async def get_many(self, task_ids: Iterable[str], *, timeout: float | None = 60) -> dict[str, Task]:
        """The tasks now, by id; ids the service doesn't know are left out.

        Asks for 50 at once where the service can (the vendor's client does; it isn't documented), else one by one.
        timeout: seconds in all, retries included; raises what stood in the way last when they are over.
        """
        if isinstance(task_ids, str) or not isinstance(task_ids, Iterable):
            message = f"task_ids must be several ids, got {task_ids!r}; for one use get"
            raise InvalidRequestError(message, param="task_ids")
        ids = list(dict.fromkeys(map(checked_id, task_ids)))
        deadline = deadline_after(timeout)
        found: dict[str, Task] = {}
        for start in range(0, len(ids), BATCH_SIZE):
            chunk = ids[start : start + BATCH_SIZE]
            if len(chunk) > 1 and self._core.memory.reads.batches is not False:
                found.update(await self._get_batch(chunk, deadline))
        await self._get_each([task_id for task_id in ids if task_id not in found], found, deadline)
        return {task_id: found[task_id] for task_id in ids if task_id in found}

    async def _get_batch(self, ids: list[str], deadline: float | None) -> dict[str, Task]:
        """Those that one batch could tell all about; none where the service has no batches, or not now."""
        session = self._core.open()
        try:
            async with asyncio.timeout_at(deadline):
                answer = await session.until_closed(session.reader.attempt("POST", BATCH_PATH, {"task_ids": ids}))
        except (TimeoutError, ConnectionFailedError):
            return {}  # whether it is the batch or everything that fails: the single GETs find out
        readings = self._core.memory.reads.read_batch(answer) or {}
        tasks = [self._noted(readings[task_id]) for task_id in ids if task_id in readings]
        return {task.id: task for task in tasks if has_result(task) or not task.succeeded}

    async def _get_each(self, ids: list[str], found: dict[str, Task], deadline: float | None) -> None:
        queue = iter(ids)
        loop = self._core.open().loop

        async def work() -> None:
            for task_id in queue:
                try:
                    found[task_id] = await self.get(task_id, timeout=self._left(deadline))
                except (NotFoundError, BadRequestError) as error:
                    if not isinstance(error, NotFoundError) and error.code != "invalid_task_id":
                        raise

        workers = [own_task(loop, work(), "evolink read") for _ in range(min(_READERS, len(ids)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            if workers:
                await asyncio.wait(workers)

    def _noted(self, reading: TaskReading) -> Task:
        """The task that was read; a status that this library doesn't know is logged once."""
        self._core.memory.reads.note_status(reading.status)
        return reading.task

    def _left(self, deadline: float | None) -> float | None:
        # A hair of time is left for the call to say what it would have done.
        return None if deadline is None else max(1e-3, deadline - self._core.open().loop.time())

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
        filters = {name: value for name, value in (("status", status), ("model", model)) if value is not None}
        seen: set[str] = set()  # pages shift while tasks are added, so that rows come again
        known_pages = 0
        page = 1
        while known_pages < _PAGES_WITHOUT_NEWS:
            query = urlencode({"page": page, "page_size": LIST_PAGE} | filters)
            rows = _rows_of_page(await self._core.read("GET", f"/v1/tasks?{query}", timeout), page)
            known_pages += 1
            for task in (self._noted(task_from(row)) for row in rows):
                if task.id not in seen:
                    seen.add(task.id)
                    known_pages = 0
                    yield task
            if len(rows) < LIST_PAGE:
                return
            page += 1
        raise ResponseError(f"the pages of tasks repeat: nothing new on {known_pages} of them")

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
        deadline = deadline_after(timeout)
        checked_function(on_progress, "on_progress")
        task = task_or_id if isinstance(task_or_id, Task) else Task(id=checked_id(task_or_id))
        checked_id(task.id)
        only_id = task is not task_or_id
        return await wait_for(self._core, task, deadline, timeout, only_id=only_id, on_progress=on_progress)


async def wait_for(
    core: ClientCore,
    task: Task,
    deadline: float | None,
    timeout: float | None,
    *,
    age: float | None = None,
    only_id: bool = False,
    on_progress: Callable[[Task], object] | None = None,
) -> Task:
    """Wait for a task until the deadline (loop time): the completed one. See `Tasks.wait` for what is raised.

    timeout: what the caller gave, for the words of an error. age: seconds since the task was submitted, None if only
    its `created` tells. only_id: nothing else is known of the task, not even that there is one.
    """
    if is_over(task):
        return conclude(task)
    try:
        session = core.open()
    except ClosedError:
        message = f"the client is closed, and task {task.id} goes on: wait for it by its id with another one"
        raise ClosedError(message) from None
    waiter = Waiter(session.loop.create_future(), task, on_progress)
    session.watcher.follow(TaskReading.of(task), waiter, age=age)
    try:
        async with asyncio.timeout_at(deadline):
            ended = await waiter.future
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
        why = session.watcher.failure(task.id)
        if session.watcher.unreachable(task.id):
            message = f"no look at task {task.id} got through: {why}; it goes on: wait again"
            raise ConnectionFailedError(message) from None
        if waiter.task.is_terminal:  # its end came with the deadline, or only its links were still awaited
            return conclude(waiter.task)
        if only_id and waiter.task is task:
            raise never_seen(task, timeout, why) from None
        raise still_running(waiter.task, timeout, why) from None
    except asyncio.CancelledError as cancellation:
        cancellation.add_note(f"evolink task {task.id} goes on: client.tasks.wait({task.id!r})")
        raise
    finally:
        session.watcher.unfollow(task.id, waiter)


class Waiter:
    """The follower of one wait."""

    __slots__ = ("_context", "_on_progress", "_seen", "future")

    def __init__(self, future: asyncio.Future[Task], task: Task, on_progress: Callable[[Task], object] | None) -> None:
        self.future = future
        self._seen: Task | TaskReading = task
        self._on_progress = on_progress
        self._context = contextvars.copy_context()  # the watcher has none of its own

    @property
    def task(self) -> Task:
        """The last that was seen of it."""
        if isinstance(self._seen, TaskReading):
            self._seen = self._seen.task
        return self._seen

    def seen(self, reading: TaskReading) -> None:
        self._seen = reading
        if self._on_progress is None or reading.is_terminal or self.future.done():
            return
        try:
            self._context.run(self._on_progress, self.task)
        except Exception:
            logger.exception("on_progress raised; the waiting goes on", extra={"event": "callback_failed"})

    def ended(self, task: Task) -> None:
        self._seen = task
        if not self.future.done():
            self.future.set_result(task)

    def lost(self, error: EvoLinkError) -> None:
        if isinstance(error, TaskError):
            error.task = self.task
        else:
            error._task_id = self.task.id  # it goes on, and whoever let it be made may have no other word of it
        if not self.future.done():
            self.future.set_exception(error)

    def crashed(self, error: BaseException) -> None:
        if not self.future.done():
            fault = EvoLinkError(f"a fault of this client while task {self.task.id} was running: {error!r}; wait again")
            fault.__cause__ = error
            self.future.set_exception(fault)


def _rows_of_page(value: Any, page: int) -> list[Any]:
    """The rows of one page of tasks. Raises `ResponseError` if it is none, or another one than was asked for."""
    rows = value.get("data") if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise ResponseError("the answer about tasks is not a page of tasks")
    if value.get("page", page) != page or value.get("page_size", LIST_PAGE) != LIST_PAGE:
        raise ResponseError(f"asked for page {page} of {LIST_PAGE} tasks each, the answer is another page")
    return rows
