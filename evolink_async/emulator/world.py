"""The whole emulated world: the service, its files, the faults in force, the clock, and what was recorded.

Everything that happens here happens at once; waiting and connections are left to the application.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .answers import CURRENT, Json, Refusal
from .api import KEY_STATES, Api
from .behaviour import Behaviour, Dialect
from .callbacks import Courier
from .clock import Clock
from .faults import Aim, Fault, FaultPlan, faults_of
from .files import FileStore
from .http import BATCH, Answer, ConnectionDropped, Request, all_headers, route
from .models import MICRO
from .recording import Recording, read_recording, request_of
from .service import Service

LIMITS = ("rate", "burst", "concurrency")


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


class InterventionRefused(ValueError):
    """An intervention can't be carried out; the refusal says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class World:
    """One emulator's world."""

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
        self._courier = Courier(self.service, self.clock, lambda aim: self.plan.next(aim), self._note_callback)
        self._requests: Counter[str] = Counter()
        self._faulted = 0
        self._answered = 0

    async def close(self) -> None:
        """End what runs in the background: the callbacks."""
        await self._courier.close()

    def book(self) -> Json:
        """The ground truth."""
        return {
            **self.service.book(self.clock()),
            "requests": dict(self._requests),
            "faulted": self._faulted,
            "files": self.files.book(self.clock()),
            "media": {"requests": self.api.downloads, "with_authorization": self.api.keys_leaked},
        }

    def request_id(self) -> str:
        """The id of the next answer."""
        self._answered += 1
        return f"req_{self.options.seed:x}_{self._answered:08x}"

    # --- requests: faults stand before everything -----------------------------------------------------------------

    @property
    def is_plain(self) -> bool:
        """Whether requests are just answered: no fault is in force and nothing is recorded."""
        return not self.plan.faults and self.recording is None

    def answer(self, request: Request) -> Answer:
        """Count a request and answer it, whatever faults are in force."""
        self._requests[route(request)] += 1
        return self._handle(request)

    def next_fault(self, request: Request) -> Fault | None:
        """Count a request and give the fault that hits it."""
        self._requests[route(request)] += 1
        if not self.plan.faults:
            return None
        return self.plan.next(Aim.of(request, self.api.tasks_of(request), self.clock()))

    def accept(self, request: Request, fault: Fault | None) -> Answer | None:
        """Take a submission, before anything is waited for: the proper answer, None if the fault keeps it away."""
        if fault is None or fault.accepts:
            return self._handle(request)
        self._faulted += 1
        return None

    def spoil(self, request: Request, fault: Fault, proper: Answer | None) -> Answer:
        """The answer under a fault. Raises ConnectionDropped with what is done to the connection instead."""
        if proper is None and not fault.replaces_answer and fault.drop is None and fault.garbage is None:
            proper = self._handle(request)
        if fault.status == 404 and fault.younger_than is not None and request.path == BATCH:
            return self.api.handle(request, hidden=self._young(request, fault.younger_than))
        answer = fault.answer(proper)
        if fault.spoils_connection:
            script = fault.script(answer, all_headers(answer, self.request_id()))
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

    # --- interventions: each has a name, so that a recording can carry it out again ---------------------------------

    def intervene(self, name: str, value: Any) -> None:
        """Carry out an intervention and record it. ValueError says what is wrong with it."""
        self._carry_out(name, value)
        if self.recording is not None and name != "clock":  # the recorded times hold what the clock was told
            self.recording.add_action(self.clock(), name, value)
        self._courier.wake()

    def set_faults(self, faults: Iterable[Fault]) -> None:
        """Replace the faults in force; their counts start again."""
        self.intervene("faults", [fault.to_dict() for fault in faults])

    def reset(self, seed: int | None = None) -> None:
        """Begin again as at first, with another seed if one is given; the clock goes on.

        Callbacks that are on their way are forgotten.
        """
        self._courier.forget()
        self._begin(self.options if seed is None else replace(self.options, seed=seed))

    def _carry_out(self, name: str, value: Any) -> None:
        actions = {
            "faults": self._do_faults,
            "clock": self._do_clock,
            "account": self._do_account,
            "end": self._do_end,
            "callback": self._do_callback,
        }
        if name not in actions:
            raise ValueError(f"there is no intervention {name!r}")
        actions[name](value)

    def _do_faults(self, value: Any) -> None:
        self.plan = FaultPlan(faults_of(value), self.options.seed)

    def _do_clock(self, value: Any) -> None:
        fields = fields_of(value, ("advance", "standing"))
        if "standing" in fields:
            if not isinstance(fields["standing"], bool):
                raise ValueError(f"standing must be true or false, not {fields['standing']!r}")
            (self.clock.stand if fields["standing"] else self.clock.run)()
        if "advance" in fields:
            self.clock.advance(_number(fields["advance"], "advance"))

    def _do_account(self, value: Any) -> None:
        fields = fields_of(value, ("credits", "key", *LIMITS))
        if fields.get("key", "active") not in KEY_STATES:
            raise ValueError(f"key must be one of {', '.join(KEY_STATES)}, not {fields['key']!r}")
        chosen = {name: fields[name] for name in LIMITS if name in fields}
        limits = {**self.service.limits(), **chosen}
        for name, low in (("rate", 1e-9), ("burst", 1), ("concurrency", 1)):
            if limits[name] is not None and _number(limits[name], name) < low:
                raise ValueError(f"{name} must be {low:g} or more, or null, not {limits[name]!r}")
        if "credits" in fields:
            self.service.settle(self.clock())
            self.service.account.set_remaining(round(_number(fields["credits"], "credits") * MICRO))
        self.api.key_state = fields.get("key", self.api.key_state)
        if chosen:
            self.service.set_limits(limits["rate"], limits["burst"], limits["concurrency"])

    def _do_end(self, value: Any) -> None:
        fields = fields_of(value, ("id", "status", "code"))
        status, code = fields.get("status", "completed"), fields.get("code")
        if code is not None and not isinstance(code, str):
            raise ValueError(f"code must be text, not {code!r}")
        ended = self.service.end(str(fields.get("id")), status, code, self.clock())
        if isinstance(ended, Refusal):
            raise InterventionRefused(ended)

    def _do_callback(self, value: Any) -> None:
        """An attempt to deliver a callback, as it was made or as a recording tells it."""
        fields = fields_of(value, ("id", "result"))
        self.service.callback_attempted(str(fields.get("id")), str(fields.get("result")), self.clock())

    def _note_callback(self, task_id: str, result: str) -> None:
        self.intervene("callback", {"id": task_id, "result": result})

    # --- recording --------------------------------------------------------------------------------------------------

    def record(self, on: bool) -> None:
        """Begin to record, with nothing recorded yet, or stop and forget."""
        self.recording = Recording(self.options.seed) if on else None

    def note(self, at: float, request: Request, status: int | None) -> None:
        """Record a request with its time and the status that it was answered (None: the connection was spoilt)."""
        if self.recording is not None:
            authorized = request.headers.get(b"authorization") == f"Bearer {self.options.api_key}".encode()
            self.recording.add_request(at, request, authorized, status)

    def replay(self, text: bytes | str) -> Json:
        """Begin again and carry out a recording at its own times; gives what was answered otherwise.

        Raises ValueError for what is no recording. The clock is not behind the recording's last moment afterwards.
        """
        seed, lines = read_recording(text)
        self.reset(seed)
        differing, last = [], self.clock()
        for number, line in enumerate(lines, 2):
            last = max(last, line["at"])
            with self.clock.at(line["at"]):
                if "action" in line:
                    self._carry_out(line["action"], line["value"])
                    continue
                status = self._repeat(request_of(line, f"Bearer {self.options.api_key}"))
            if status != line["status"]:
                differing.append({"line": number, "recorded": line["status"], "now": status})
        self.service.due_callbacks(last)  # what was sent then is not sent again
        if last > self.clock():
            self.clock.advance(last - self.clock())
        self._courier.wake()
        return {"lines": len(lines), "differing": differing}

    def _repeat(self, request: Request) -> int | None:
        """Carry out a recorded request without waiting for anything; gives the status of its answer."""
        fault = self.next_fault(request)
        if fault is None:
            return self._handle(request).status
        proper = self.accept(request, fault) if request.submits else None
        try:
            with self.clock.at(self.clock() + (0.0 if request.submits else fault.delay)):
                return self.spoil(request, fault, proper).status
        except ConnectionDropped:
            return None


def fields_of(value: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    """A JSON object that has no other fields than the known ones. ValueError says what it has."""
    if not isinstance(value, dict):
        raise ValueError(f"send a JSON object with {', '.join(known)}")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"there is no {unknown[0]!r} here, only {', '.join(known)}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:
        raise ValueError(f"{name} must be a number from 0, not {value!r}")
    return value
