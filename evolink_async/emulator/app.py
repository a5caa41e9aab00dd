"""The emulator as an ASGI application: HTTP in, the pure service in the middle, HTTP out.

Written by hand rather than on a framework: a status read is the hot path of every benchmark against the emulator.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .answers import CURRENT, Json
from .api import Api
from .behaviour import Behaviour, Dialect
from .callbacks import Courier
from .clock import Clock
from .control import PREFIX as CONTROL
from .control import Control
from .faults import Aim, Fault, FaultPlan
from .files import FileStore
from .http import (
    BATCH,
    Answer,
    ClientGone,
    ConnectionDropped,
    Receive,
    Request,
    Scope,
    Send,
    all_headers,
    read_request,
    route,
)
from .models import MICRO
from .recording import Recording, read_recording, request_of
from .service import Service


@dataclass(frozen=True, slots=True)
class Options:
    """What an emulator is made of; how it begins, and begins again after a reset."""

    speed: float
    seed: int
    rate: float | None
    burst: float | None
    concurrency: int | None
    retry_after: str | None
    credits: float
    failure_share: float
    idempotency: bool
    batch: bool
    listing: bool
    private_callbacks: bool
    api_key: str
    faults: tuple[Fault, ...]
    dialect: Dialect = CURRENT
    models: Mapping[str, Behaviour | Mapping[str, Any]] = field(default_factory=dict)
    record: bool = False


class App:
    """The ASGI application."""

    def __init__(self, options: Options, clock: Clock) -> None:
        self.clock = clock
        self._begin(options)
        clock.on_change(lambda: self._courier.wake())

    def _begin(self, options: Options) -> None:
        self.options = options
        self.service = Service(
            speed=options.speed,
            seed=options.seed,
            rate=options.rate,
            burst=options.burst,
            concurrency=options.concurrency,
            credits=round(options.credits * MICRO),
            failure_share=options.failure_share,
            idempotency=options.idempotency,
            private_callbacks=options.private_callbacks,
            models=options.models,
            dialect=options.dialect,
        )
        self.files = FileStore(speed=options.speed, seed=options.seed)
        self.api = Api(
            self.service,
            self.files,
            self.clock,
            api_key=options.api_key,
            retry_after=options.retry_after,
            batch=options.batch,
            listing=options.listing,
        )
        self.plan = FaultPlan(options.faults, options.seed)
        self.recording = Recording(options.seed) if options.record else None
        self._control = Control(self)
        self._courier = Courier(self.service, self.clock, lambda aim: self.plan.next(aim), self._note_callback)
        self._requests: Counter[str] = Counter()
        self._faulted = 0
        self._answered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send, self.close)
            return
        if scope["type"] != "http":
            raise ConnectionDropped(f"the emulator doesn't speak {scope['type']}")
        try:
            request = await read_request(scope, receive)
        except ClientGone:
            return
        answer = self.api.too_large(scope["path"]) if request is None else await self._respond(request)
        headers = all_headers(answer, self._request_id())
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})

    async def close(self) -> None:
        """End what runs in the background: the callbacks."""
        await self._courier.close()

    def book(self) -> Json:
        """The ground truth, as ``GET /_emulator/book`` tells it."""
        return {
            **self.service.book(self.clock()),
            "requests": dict(self._requests),
            "faulted": self._faulted,
            "files": self.files.book(self.clock()),
            "media": {"requests": self.api.downloads, "with_authorization": self.api.keys_leaked},
        }

    def set_faults(self, faults: Iterable[Fault]) -> None:
        """Replace the faults in force; their counts start again."""
        self.plan = FaultPlan(faults, self.options.seed)

    def reset(self, seed: int | None = None) -> None:
        """Begin again as at first, with another seed if one is given: no tasks, no files, the first balance and faults.

        The clock goes on. Callbacks that are on their way are forgotten.
        """
        self._courier.forget()
        self._begin(self.options if seed is None else replace(self.options, seed=seed))

    def record(self, on: bool) -> None:
        """Begin to record, with nothing recorded yet, or stop and forget."""
        self.recording = Recording(self.options.seed) if on else None

    def replay(self, text: bytes | str) -> Json:
        """Begin again and carry out a recording at its own times; gives how many requests were answered otherwise.

        Raises ValueError for what is no recording. The clock is not behind the recording's last moment afterwards.
        """
        seed, lines = read_recording(text)
        self.reset(seed)
        differing, last = [], self.clock()
        for number, line in enumerate(lines, 2):
            last = max(last, line["at"])
            with self.clock.at(line["at"]):
                if "action" in line:
                    self._control.repeat(line["action"], line["value"])
                    continue
                status = self._repeat(request_of(line, f"Bearer {self.options.api_key}"))
            if status != line["status"]:
                differing.append({"line": number, "recorded": line["status"], "now": status})
        self.service.due_callbacks(last)  # what was sent then is not sent again
        if last > self.clock():
            self.clock.advance(last - self.clock())
        self._courier.wake()
        return {"lines": len(lines), "differing": differing}

    def intervene(self, name: str, value: Any) -> None:
        """Carry out an intervention by its name in the controls. ValueError says what is wrong with it."""
        self._control.intervene(name, value)

    def woken(self) -> None:
        """Something was accepted or ended: see whether a callback is due."""
        self._courier.wake()

    def _note_callback(self, task_id: str, result: str) -> None:
        self._control.intervene("callback", {"id": task_id, "result": result})

    def _request_id(self) -> str:
        self._answered += 1
        return f"req_{self.options.seed:x}_{self._answered:08x}"

    # --- faults stand before everything -----------------------------------------------------------------------

    async def _respond(self, request: Request) -> Answer:
        if request.path.startswith(CONTROL) or request.path in self._control.pages:
            return self._control.handle(request)
        if not self.plan.faults and self.recording is None:  # the hot path
            self._requests[route(request)] += 1
            answer = self.api.handle(request)
            if request.submits:
                self._courier.wake()
            return answer
        return await self._respond_with_faults(request)

    async def _respond_with_faults(self, request: Request) -> Answer:
        at = self.clock()
        fault = self._next_fault(request)
        try:
            answer = await self._faulty(request, fault)
        except ConnectionDropped:
            self._record(at, request, None)
            raise
        self._record(at, request, answer.status)
        return answer

    def _next_fault(self, request: Request) -> Fault | None:
        self._requests[route(request)] += 1
        if not self.plan.faults:
            return None
        return self.plan.next(Aim.of(request, self.api.tasks_of(request), self.clock()))

    async def _faulty(self, request: Request, fault: Fault | None) -> Answer:
        if fault is None:
            return self._handle(request)
        proper = self._accepted(request, fault) if request.submits else None
        if fault.delay:
            key = request.key
            if key is not None and proper is not None:
                self.service.hold_key(key, True)
            try:
                await asyncio.sleep(fault.delay)
            finally:
                if key is not None and proper is not None:
                    self.service.hold_key(key, False)
        return self._spoilt(request, fault, proper)

    def _accepted(self, request: Request, fault: Fault) -> Answer | None:
        """The proper answer to a submission that a fault hits, if it is accepted all the same."""
        if fault.accepts:
            return self._handle(request)
        self._faulted += 1
        return None

    def _spoilt(self, request: Request, fault: Fault, proper: Answer | None) -> Answer:
        if proper is None and fault.drop is None and fault.garbage is None and not fault.replaces_answer:
            proper = self._handle(request)
        if fault.status == 404 and fault.younger_than is not None and request.path == BATCH:
            return self.api.handle(request, hidden=self._young(request, fault.younger_than))
        answer = fault.answer(proper)
        if fault.spoils_connection:
            script = fault.script(answer, all_headers(answer, self._request_id()))
            raise ConnectionDropped("a fault spoils the connection", script)
        return answer

    def _young(self, request: Request, age: float) -> list[str]:
        now = self.clock()
        return [task.id for task in self.api.tasks_of(request) if now - task.created < age]

    def _handle(self, request: Request) -> Answer:
        answer = self.api.handle(request)
        if request.submits:
            self._courier.wake()
        return answer

    # --- recording --------------------------------------------------------------------------------------------

    def _record(self, at: float, request: Request, status: int | None) -> None:
        if self.recording is not None:
            authorized = request.headers.get(b"authorization") == f"Bearer {self.options.api_key}".encode()
            self.recording.add_request(at, request, authorized, status)

    def _repeat(self, request: Request) -> int | None:
        """Carry out a recorded request, without waiting for anything; gives the status of its answer."""
        fault = self._next_fault(request)
        if fault is None:
            return self._handle(request).status
        proper = self._accepted(request, fault) if request.submits else None
        try:
            with self.clock.at(self.clock() + (0.0 if request.submits else fault.delay)):
                return self._spoilt(request, fault, proper).status
        except ConnectionDropped:
            return None


async def _live(receive: Receive, send: Send, close: Any) -> None:
    """The lifespan protocol, for servers that want it."""
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await close()
    await send({"type": "lifespan.shutdown.complete"})
