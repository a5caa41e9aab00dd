"""`CallbackReceiver`: from a callback to one look at its task, and to whoever wants to know."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections import deque
from collections.abc import Callable

from evolink_async.callbacks.asgi import CallbackApp
from evolink_async.callbacks.rules import Recent, Tokens, checked_public_url
from evolink_async.catalog.urls import callback_remark
from evolink_async.client import AsyncEvoLink
from evolink_async.core import ClientCore
from evolink_async.errors import ConfigurationError, EvoLinkError, InvalidRequestError
from evolink_async.ledger.values import counted_identity
from evolink_async.own_tasks import own_task
from evolink_async.pool.doubts import Doubts
from evolink_async.pool.identity import content_hash
from evolink_async.pool.pool import TaskPool
from evolink_async.requests import GenerationRequest, has_local_files
from evolink_async.types import Task, TaskReading

__all__ = ["CallbackReceiver"]

logger = logging.getLogger("evolink_async.callbacks")

REMEMBERED = 10_000  # callbacks for requests that nobody asks about yet, and tasks that have ended
LOOKS = 1_000  # under way at once; what comes beyond them is left to polling


class CallbackReceiver:
    """Receives the callbacks of tasks, and believes nothing of them: each is a hint, after which the task is looked at.

        receiver = CallbackReceiver(client, public_url="https://example.org/evolink", secret=secret)
        app.mount("/evolink", receiver.asgi)
        async with client.pool(requests, callbacks=receiver) as pool: ...

    target: the client, or one pool of it. A callback hastens the next look of every wait and pool of the client that
        follows its task (if a pool was given: of that pool, and of those that have `callbacks=` this receiver, only).
    public_url: where the service reaches `asgi`: https, without user, query and fragment; http on a loopback host for
        an emulator. The service calls no private hosts (documented).
    secret: text or bytes, 16 bytes or more. With the same one, addresses that were given out before a restart are
        still good. Everybody who has it can make such addresses; it shows in no error, log or repr.
    on_task: a function, or a coroutine function, called with the `Task` as the service tells it, after a callback and
        a look that found it ended; one call after the other. Not called again for the last 10,000 of them. What it
        raises is logged. Callbacks can be lost (the service gives up after four attempts, documented), so it can be
        missed: keep a wait, a pool or a sweep for what must not be.

    `asgi` answers before anything is asked of the service. It must run in the event loop of the client. Raises
    `ConfigurationError` for what cannot work. Since 0.1.0.
    """

    def __init__(
        self,
        target: AsyncEvoLink | TaskPool,
        *,
        public_url: str,
        secret: str | bytes,
        on_task: Callable[[Task], object] | None = None,
    ) -> None:
        if not isinstance(target, AsyncEvoLink | TaskPool):
            raise ConfigurationError(f"target must be a client or a pool, got {type(target).__name__}")
        if on_task is not None and not callable(on_task):
            raise ConfigurationError(f"on_task must be a function, got {on_task!r}")
        self._pool = target if isinstance(target, TaskPool) else None
        self._core = target._core
        self._public_url = checked_public_url(public_url)
        self._tokens = Tokens(secret)
        self._on_task = on_task
        self._app = CallbackApp(self._tokens, self._hear)
        self._open: list[Doubts] = []  # those of the pools whose block is open
        self._heard: Recent[bytes, str] = Recent(REMEMBERED)  # by request, the task that it was called about
        self._ended: Recent[str, bytes] = Recent(
            REMEMBERED
        )  # by task, the request; once a look has shown that it ended
        self._looks: dict[str, _Look] = {}
        self._to_tell: deque[Task] = deque()
        self._telling: asyncio.Task[None] | None = None
        if self._pool is not None:
            self._pool._heed(self)

    @property
    def asgi(self) -> CallbackApp:
        """The ASGI app: mount it, or serve it alone. Any path that ends in a token of ours is answered."""
        return self._app

    def url_for(self, request: GenerationRequest | str, *, job: str | None = None) -> str:
        """The `callback_url` for a request, or for the one with this key. A pool with `callbacks=` asks by itself.

        The same request of the same job always gets the same one. job: by default that of the pool that is the target,
        else "default". A request without a key goes by its content.
        """
        if isinstance(request, GenerationRequest):
            if request.key is None and has_local_files(request):
                raise InvalidRequestError("a request with local files has an address by its key: give it one")
            identity = request.key if request.key is not None else counted_identity(content_hash(request), 0)
        elif isinstance(request, str) and request:
            identity = request
        else:
            raise InvalidRequestError(f"a request, or the key of one, has an address; got {type(request).__name__}")
        if job is None:
            job = "default" if self._pool is None else self._pool._job_name
        return self._url_of(self._name_of(job, identity))

    def __repr__(self) -> str:
        return f"<CallbackReceiver {self._public_url}>"

    def __reduce__(self) -> str:
        raise TypeError("a receiver is neither copied nor pickled: it has a secret")

    # For a pool

    def _name_of(self, job: str, identity: str) -> bytes:
        return self._tokens.name(job, identity)

    def _url_of(self, name: bytes) -> str:
        return f"{self._public_url}/{self._tokens.token(name)}"

    def _refuse_elsewhere(self, core: ClientCore) -> None:
        """Raise unless the service of this client would call our address."""
        if core is not self._core:
            raise ConfigurationError("callbacks: the receiver was made for another client")
        remark = callback_remark(f"{self._public_url}/", allow_private_hosts=core.calls_private_hosts)
        if remark is not None:
            raise ConfigurationError(f"callbacks: public_url: {remark[1]}")

    def _opened(self, doubts: Doubts) -> None:
        self._open.append(doubts)

    def _closed(self, doubts: Doubts) -> None:
        if doubts in self._open:
            self._open.remove(doubts)

    def _has_heard(self, name: bytes) -> bool:
        return name in self._heard

    def _ask_about(self, name: bytes) -> None:
        """A pool is in doubt about this request: was there a callback for it?"""
        task_id = self._heard.get(name)
        if task_id is not None:
            self._hear(name, task_id)

    def _forget(self, name: bytes) -> None:
        self._heard.pop(name)

    # Hearing

    def _hear(self, name: bytes, task_id: str) -> None:
        """A callback with a token of ours says that something happened to this task."""
        try:
            watcher = self._core.open().watcher
        except EvoLinkError as error:
            logger.warning(
                "a callback about task %s is left to polling: %s",
                task_id,
                error,
                extra={"event": "callback_unused", "task_id": task_id},
            )
            return
        known_as = self._ended.get(task_id)
        if known_as is not None and known_as != name:
            logger.warning(
                "a callback is about task %s, which is another request's",
                task_id,
                extra={"event": "callback_doubtful", "task_id": task_id},
            )
            return
        in_doubt = any(doubts.has(name) for doubts in self._open)
        if in_doubt or not watcher.follows(task_id):
            self._heard.put(name, task_id)
        wanted = self._on_task is not None and known_as is None
        if wanted or any(doubts.is_open(name) for doubts in self._open):
            self._look(name, task_id)
        if self._pool is None or task_id in self._looks:
            watcher.notify(task_id)
        else:
            for doubts in self._open:
                doubts.notify(task_id)

    def _look(self, name: bytes, task_id: str) -> None:
        look = self._looks.get(task_id)
        if look is not None:
            look.is_others = look.is_others or look.name != name
        elif len(self._looks) < LOOKS:
            watcher = self._core.open().watcher
            self._looks[task_id] = look = _Look(self, task_id, name, watcher.follows(task_id))
            watcher.follow(TaskReading({"id": task_id}), look, stranger=True)
        else:
            logger.warning(
                "%d tasks are looked at after callbacks; one about %s is left to polling",
                LOOKS,
                task_id,
                extra={"event": "callback_unused", "task_id": task_id},
            )

    def _looked(self, look: _Look, reading: TaskReading) -> None:
        """What a callback was about, in the service's own words."""
        self._looks.pop(look.task_id, None)
        name = look.name
        if reading.is_terminal:
            first = look.task_id not in self._ended
            self._ended.put(look.task_id, name)
            if first and self._on_task is not None:
                self._tell(reading.task)
        mine = [doubts for doubts in self._open if doubts.is_open(name)]
        if look.is_others:
            if mine:
                logger.warning(
                    "task %s settles nothing: others follow it, or were called about it",
                    look.task_id,
                    extra={"event": "callback_doubtful", "task_id": look.task_id},
                )
        elif len(mine) == 1:
            mine[0].found(name, reading)
        elif mine:
            logger.warning(
                "task %s: %d open pools have the request that it is for",
                look.task_id,
                len(mine),
                extra={"event": "callback_doubtful", "task_id": look.task_id},
            )

    def _looked_in_vain(self, look: _Look, error: BaseException) -> None:
        self._looks.pop(look.task_id, None)
        logger.info(
            "a callback was about task %s, of which nothing could be learned: %s",
            look.task_id,
            error,
            extra={"event": "callback_in_vain", "task_id": look.task_id},
        )

    # Telling

    def _tell(self, task: Task) -> None:
        self._to_tell.append(task)
        if self._telling is None or self._telling.done():
            loop = asyncio.get_running_loop()
            self._telling = own_task(loop, self._tell_all(), "evolink callbacks", contextvars.Context())

    async def _tell_all(self) -> None:
        assert self._on_task is not None
        while self._to_tell:
            task = self._to_tell.popleft()
            try:
                told = self._on_task(task)
                if inspect.isawaitable(told):
                    await told
            except Exception:
                logger.exception("on_task raised for task %s", task.id, extra={"event": "callback_failed"})


class _Look:
    """The follower of a task for a single look."""

    __slots__ = ("_receiver", "is_others", "name", "task_id")

    def __init__(self, receiver: CallbackReceiver, task_id: str, name: bytes, is_others: bool) -> None:
        self._receiver = receiver
        self.task_id = task_id
        self.name = name  # of the request whose callback was about it
        self.is_others = is_others  # somebody followed it before, or was called about it too

    def seen(self, reading: TaskReading) -> None:
        if not reading.is_terminal:  # else its links are still awaited
            session = self._receiver._core.session
            if session is not None:
                session.watcher.unfollow(self.task_id, self)
            self._receiver._looked(self, reading)

    def ended(self, task: Task) -> None:
        self._receiver._looked(self, TaskReading.of(task))

    def lost(self, error: EvoLinkError) -> None:
        self._receiver._looked_in_vain(self, error)

    def crashed(self, error: BaseException) -> None:
        self._receiver._looked_in_vain(self, error)
