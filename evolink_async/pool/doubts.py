"""Requests of a pool of which nobody knows yet whether a task exists, and callbacks that settle them.

A callback's token names a request, its body a task. The task is taken for the request's own only if the service itself
knows it, it has the request's kind and model, it was made when the request was sent, and nobody else has it.

    the request's POST                  a callback for it
    is on the wire                      waits for the answer: that tells the id
    was lost; is to be sent again       it is not sent again: its task is followed
    was lost; its outcome is `unknown`  and not taken yet: the outcome becomes the task's
                                        and handed over: the ledger is settled, and the next run tells
    was accepted, or refused            only hastens a look at the task, if it is this one
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from evolink_async.errors import ConfigurationError, EvoLinkError
from evolink_async.ledger import open_ledger
from evolink_async.ledger.candidates import why_not
from evolink_async.ledger.states import State as Known
from evolink_async.own_tasks import own_task
from evolink_async.pool.record import Record
from evolink_async.types import Task, TaskReading

if TYPE_CHECKING:
    from evolink_async.core import ClientCore
    from evolink_async.pool.journal import Journal

logger = logging.getLogger("evolink_async.pool")

MOST_UNKNOWN = 5_000  # requests that stay unknown and can still be settled by a callback in this run
_OPEN = (Known.UNSETTLED, Known.GIVEN_UP)  # what can be settled, as by `resolve`


@runtime_checkable
class Receiver(Protocol):
    """Who receives the callbacks: a `CallbackReceiver`, as a pool knows it."""

    def _refuse_elsewhere(self, core: ClientCore) -> None: ...
    def _name_of(self, job: str, identity: str) -> bytes: ...
    def _url_of(self, name: bytes) -> str: ...
    def _opened(self, doubts: Doubts) -> None: ...
    def _closed(self, doubts: Doubts) -> None: ...
    def _has_heard(self, name: bytes) -> bool: ...
    def _ask_about(self, name: bytes) -> None: ...
    def _forget(self, name: bytes) -> None: ...


def checked_receiver(callbacks: object, core: ClientCore) -> Receiver:
    """The receiver, if it is one and the client's service would call it. Raises `ConfigurationError`."""
    if not isinstance(callbacks, Receiver):
        raise ConfigurationError(f"callbacks must be a CallbackReceiver, got {type(callbacks).__name__}")
    callbacks._refuse_elsewhere(core)
    return callbacks


class Pool(Protocol):
    """What the pool does for its doubts."""

    @property
    def journal(self) -> Journal: ...
    def notify(self, task_id: str) -> None: ...
    def who_has(self, task_id: str) -> str | None: ...
    async def adopt(self, record: Record, task: TaskReading) -> None: ...
    def crashed(self, record: Record, error: BaseException) -> None: ...


class Doubts:
    """The requests of an open pool that are sending or unknown, by the name that tokens have for them.

    job, ledger: the pool's options. fills: whether its requests get their `callback_url` from the receiver.
    """

    def __init__(
        self, pool: Pool, receiver: Receiver, *, job: str, ledger: str | os.PathLike[str] | None, fills: bool
    ) -> None:
        self.receiver = receiver
        self._pool = pool
        self._job_name = job
        self._ledger = ledger
        self._fills = fills
        self._names: dict[Record, bytes] = {}  # of those that are sending
        self._sending: dict[bytes, Record] = {}
        self._unknown: OrderedDict[bytes, Record] = OrderedDict()
        self._found: deque[tuple[bytes, Record, TaskReading]] = deque()
        self._settling: asyncio.Task[None] | None = None

    # What the pool tells

    def open(self) -> None:
        """The pool's block is entered."""
        self.receiver._opened(self)

    def send(self, record: Record) -> str | None:
        """A request is about to be sent, perhaps once more: the address to be called back at, if it is ours to give."""
        name = self._names.get(record) or self._name(record)
        self._names[record], self._sending[name] = name, record
        if record.row is not None and record.row.state in _OPEN:
            self.receiver._ask_about(name)
        return self.receiver._url_of(name) if self._fills else None

    def answered(self, record: Record) -> None:
        """A POST has come to something, which is written down next: what a callback told before is of use only then."""
        name = self._names.get(record)
        if name is not None and self.receiver._has_heard(name):
            asyncio.get_running_loop().call_soon(self.receiver._ask_about, name)

    def over(self, record: Record) -> None:
        """A request was accepted, or has its outcome."""
        name = self._names.pop(record, None)
        if name is not None:
            self._sending.pop(name, None)
            if not self._names:  # gives back what they took when they were full
                self._names.clear()
                self._sending.clear()
        if record.row is not None and record.row.state in _OPEN:
            name = name or self._name(record)
            self._unknown[name] = record
            if len(self._unknown) > MOST_UNKNOWN:
                self._unknown.popitem(last=False)
            self.receiver._ask_about(name)

    async def aclose(self) -> None:
        """The pool's block is left: nothing more is settled here."""
        self.receiver._closed(self)
        self._found.clear()
        if self._settling is not None and not self._settling.done():
            self._settling.cancel()
            await asyncio.wait({self._settling})

    # What the receiver asks and tells

    def notify(self, task_id: str) -> None:
        """A hint for the pool: this task may have ended."""
        self._pool.notify(task_id)

    def has(self, name: bytes) -> bool:
        """Whether a request of this name is sending or unknown."""
        return self._record(name) is not None

    def is_open(self, name: bytes) -> bool:
        """Whether nobody knows if there is a task for the request of this name, and no answer is on its way."""
        record = self._record(name)
        return record is not None and record.row is not None and record.row.state in _OPEN

    def found(self, name: bytes, reading: TaskReading) -> None:
        """A callback for this request named this task, and the service knows it."""
        record = self._record(name)
        if record is None:
            return
        self._found.append((name, record, reading))
        if self._settling is None or self._settling.done():
            loop = asyncio.get_running_loop()
            self._settling = own_task(loop, self._settle_all(), "evolink settling", contextvars.Context())

    # Settling

    async def _settle_all(self) -> None:
        while self._found:
            name, record, reading = self._found.popleft()
            try:
                await self._settle(name, record, reading)
            except EvoLinkError as error:
                logger.warning(
                    "request %s could not be settled by a callback: %s",
                    record.identity,
                    error,
                    extra={"event": "callback_doubtful", "task_id": reading.id},
                )
            except Exception as error:  # noqa: BLE001  (a fault of ours: it becomes the pool's reason)
                self._pool.crashed(record, error)

    async def _settle(self, name: bytes, record: Record, reading: TaskReading) -> None:
        task_id: str = reading.id
        why = _why_not(record, reading.task) or await self._whose(record, task_id)
        # From here to the move in `_adopt` nothing is awaited.
        row = record.row
        if row is None or row.state not in _OPEN:
            return  # settled meanwhile, or its POST is on the wire again: `answered` comes back to it
        why = why or self._pool.who_has(task_id)
        if why is not None:
            logger.warning(
                "a callback for request %s names task %s, which is not taken for its own: %s",
                record.identity,
                task_id,
                why,
                extra={"event": "callback_doubtful", "task_id": task_id},
            )
            self.receiver._forget(name)
            return
        logger.info(
            "a callback has settled request %s: task %s",
            record.identity,
            task_id,
            extra={"event": "callback_settled", "identity": record.identity, "task_id": task_id},
        )
        self.receiver._forget(name)
        self._unknown.pop(name, None)
        await self._pool.adopt(record, reading)

    async def _whose(self, record: Record, task_id: str) -> str | None:
        """Whose task it is, as far as anybody in the ledger can tell; None: nobody's."""
        if self._ledger is None:
            return None
        await self._pool.journal.job.find(record.identity)  # what was told before is in the file then
        async with open_ledger(self._ledger) as ledger:
            known = await ledger.knows([task_id])
        return "another request in the ledger has it, or a former try had it" if known else None

    def _record(self, name: bytes) -> Record | None:
        return self._sending.get(name) or self._unknown.get(name)

    def _name(self, record: Record) -> bytes:
        return self.receiver._name_of(self._job_name, record.identity)


def _why_not(record: Record, task: Task) -> str | None:
    """Why a task can't be that of a request. More is asked for than of a candidate, for nobody looks at it first."""
    row = record.row
    assert row is not None
    assert record.request is not None
    if task.model is None or task.created is None or row.submitted_at is None:
        return "the service does not say for which model and when it was made"
    if task.kind is not None and task.kind != record.request.kind:
        return f"it is of kind {task.kind}, the request is for {record.request.kind}"
    return why_not(row.model, row.submitted_at, task)
