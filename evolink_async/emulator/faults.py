"""Faults as data: which requests are hit, and what happens to them."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .http import Answer, Request, Script
from .spoiling import bomb_of, patched, script_of
from .tasks import Task, derive

CALLBACK = "CALLBACK"


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and for which requests.

    **Which.** A request is *matched* by ``method`` (None = any), ``path`` (a prefix, query not included), ``model`` (of
    the body, or of the task or result that is read), ``request_headers`` (each named header contains the text) and
    ``younger_than`` (a read of a task accepted less than so many seconds ago). Of the matched ones those numbered in
    ``nth`` (from 1) are hit, or each with ``probability`` (seeded); with neither, all are. Where several faults would
    hit a request, the first one does. ``method="CALLBACK"`` matches the emulator's own callbacks, by the path of their
    URL, and nothing else does.

    **What is answered.**

    - ``status`` with ``body`` (JSON) or ``raw_body`` (bytes, with ``content_type``) and ``headers``: the answer. A
      submission is not accepted, unless ``accept``: then the task exists and is paid, and only the answer is wrong.
      A 404 with ``younger_than`` leaves those tasks out of a batch, as the service does with ids that it doesn't know.
    - ``patch``: fields put over those of the proper JSON answer (None takes one away); in a batch or a list, of each
      task. ``{"status": "processing", "progress": 10}`` lets a finished task flap back.
    - ``bomb``: ``"gzip"`` (a small body that unpacks to ``size`` bytes), ``"nested"`` (``size`` JSON arrays in each
      other) or ``"endless"`` (a body without end).

    **What happens to the connection.** These need a real port; in bare ASGI the caller gets ConnectionDropped.

    - ``drop="before"``: the connection is closed, nothing was accepted. ``drop="after"``: a submission is accepted and
      paid, then the connection is closed without an answer. (Reads are just dropped.)
    - ``delay``: seconds that the answer is late. A submission is accepted at once and answered late, and until then its
      idempotency key is in progress; a read is answered with what is true after the delay.
    - ``cut``: the connection is closed after so many bytes of the body; ``stall``: nothing more comes after them, and
      the connection stays open. ``drip``: the answer comes at so many bytes per second.
    - ``content_length``: the length that the answer claims. ``garbage``: these bytes instead of HTTP.
    - ``reset``: whatever closes the connection does it with a TCP reset.

    **Callbacks** can be told with another ``status``-less ``patch``, late (``delay``), ``repeat`` times, or not at all
    (``drop``: the attempt fails).
    """

    method: str | None = None
    path: str = "/"
    model: str | None = None
    request_headers: Mapping[str, str] = field(default_factory=dict)
    younger_than: float | None = None
    nth: tuple[int, ...] = ()
    probability: float | None = None
    status: int | None = None
    body: Any = None
    raw_body: bytes | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    accept: bool = False
    patch: Mapping[str, Any] = field(default_factory=dict)
    bomb: Literal["gzip", "nested", "endless"] | None = None
    size: int = 200_000_000
    drop: Literal["before", "after"] | None = None
    delay: float = 0.0
    cut: int | None = None
    stall: int | None = None
    drip: float | None = None
    content_length: int | None = None
    garbage: bytes | None = None
    reset: bool = False
    repeat: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "nth", _numbers(self.nth))
        for name in ("raw_body", "garbage"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, getattr(self, name).encode())
        _check(self)

    @property
    def accepts(self) -> bool:
        """Whether a submission that is hit becomes a paid task all the same."""
        if self.drop is not None:
            return self.drop == "after"
        return self.accept or not (self.status is not None or self.bomb is not None or self.garbage is not None)

    @property
    def replaces_answer(self) -> bool:
        """Whether the answer is the fault's own, whatever the request was."""
        return self.status is not None or self.bomb is not None

    @property
    def spoils_connection(self) -> bool:
        """Whether it takes a connection to show this."""
        parts = (self.drop, self.cut, self.stall, self.drip, self.content_length, self.garbage)
        return any(part is not None for part in parts) or self.reset or self.bomb == "endless"

    def answer(self, proper: Answer | None) -> Answer:
        """What is answered: the fault's own, or the proper answer with the patch."""
        if self.bomb in ("gzip", "nested"):
            body, headers = bomb_of(self.bomb, self.size)
            return Answer(self.status or 200, body, self.content_type, (*self.headers.items(), *headers))
        if self.replaces_answer:
            return Answer(self.status or 200, self._own_body(), self.content_type, tuple(self.headers.items()))
        if proper is None:
            return Answer(200, b"")
        headers = (*proper.headers, *self.headers.items())
        body = patched(proper.body, self.patch) if self.patch else proper.body
        return Answer(proper.status, body, proper.content_type, headers)

    def _own_body(self) -> bytes:
        if self.raw_body is not None:
            return self.raw_body
        return b"" if self.body is None else json.dumps(self.body, separators=(",", ":")).encode()

    def script(self, answer: Answer, head: Iterable[tuple[bytes, bytes]]) -> Script:
        """What is done to the connection; ``head`` are the headers that the answer would have."""
        if self.drop is not None or self.garbage is not None:
            garbage = () if self.garbage is None else (self.garbage,)
            return Script(garbage, end="reset" if self.reset else "close")
        return script_of(
            answer,
            head,
            endless=self.bomb == "endless",
            cut=self.cut,
            stall=self.stall,
            drip=self.drip,
            content_length=self.content_length,
            reset=self.reset,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fault:
        """Read a fault from JSON: the same names; bytes as text, or in ``raw_body_base64`` and ``garbage_base64``."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a fault is an object, not {data!r}")
        values = {name: value for name, value in data.items() if name not in ("matched", "hit")}  # told, not chosen
        for name in ("raw_body", "garbage"):
            if isinstance(values.get(f"{name}_base64"), str):
                values[name] = base64.b64decode(values.pop(f"{name}_base64"))
        known = {spec.name for spec in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"a fault has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except (TypeError, AttributeError) as exc:
            raise ValueError(f"a fault has a value of the wrong type: {exc}") from exc

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads, without what was left at its default."""
        data: dict[str, Any] = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, bytes):
                data.update(_bytes_as_json(spec.name, value))
            elif value not in (spec.default, {}):
                data[spec.name] = list(value) if isinstance(value, tuple) else value
        return data


def read_faults(text: bytes | str) -> tuple[Fault, ...]:
    """Faults from a JSON list; ValueError says what is wrong with it."""
    return faults_of(json.loads(text))


def faults_of(rows: Iterable[Fault | Mapping[str, Any]]) -> tuple[Fault, ...]:
    """Faults, each as it is or from an object, or what ``GET /_emulator/faults`` has told.

    ValueError says what is wrong with them.
    """
    if isinstance(rows, Mapping) and set(rows) == {"faults"}:
        rows = rows["faults"]
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise ValueError(f"faults are a list of objects, not {rows!r}")
    return tuple(row if isinstance(row, Fault) else Fault.from_dict(row) for row in rows)


def _check(fault: Fault) -> None:
    for name in ("method", "path", "model", "content_type"):
        value = getattr(fault, name)
        if not isinstance(value, str) and not (value is None and name in ("method", "model")):
            raise ValueError(f"{name} must be text, not {value!r}")
    for name in ("raw_body", "garbage"):
        if not isinstance(getattr(fault, name), bytes | None):
            raise ValueError(f"{name} must be text (or {name}_base64), not {getattr(fault, name)!r}")
    for name in ("accept", "reset"):
        if not isinstance(getattr(fault, name), bool):
            raise ValueError(f"{name} must be true or false, not {getattr(fault, name)!r}")
    for name in ("headers", "request_headers", "patch"):
        if not isinstance(getattr(fault, name), Mapping):
            raise ValueError(f"{name} must be an object, not {getattr(fault, name)!r}")
    for name in ("headers", "request_headers"):
        if not all(isinstance(text, str) for pair in getattr(fault, name).items() for text in pair):
            raise ValueError(f"{name} must be texts by name, not {getattr(fault, name)!r}")
    if {name.lower() for name in fault.headers} & {"content-length", "content-type", "transfer-encoding"}:
        raise ValueError("a fault's headers are those beside the body's: its type is content_type")
    for name, words in (("drop", ("before", "after")), ("bomb", ("gzip", "nested", "endless"))):
        if getattr(fault, name) not in (None, *words):
            raise ValueError(f"{name} must be {' or '.join(map(repr, words))}, not {getattr(fault, name)!r}")
    if fault.nth and fault.probability is not None:
        raise ValueError("a fault has nth or probability, not both")
    for name, whole, low, high in _RANGES:
        value = getattr(fault, name)
        if value is None and name not in ("delay", "size", "repeat"):
            continue
        is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            noun = "a whole number" if whole else "a number"
            raise ValueError(f"{name} must be {noun} between {low:g} and {high:g}, not {value!r}")
    if fault.status is None and (fault.body is not None or fault.raw_body is not None):
        raise ValueError("a fault with a body needs a status")
    if fault.younger_than is not None and fault.method not in (None, "GET", "POST"):
        raise ValueError("younger_than is about reads of a task")
    effects = (fault.replaces_answer, fault.spoils_connection, fault.delay, fault.patch, fault.headers)
    if not any(effects) and fault.repeat == 1:
        raise ValueError("a fault needs an effect: status, patch, bomb, drop, delay, cut, stall, drip, garbage, repeat")
    if fault.method == CALLBACK and (fault.replaces_answer or (fault.spoils_connection and fault.drop is None)):
        raise ValueError("a callback can be dropped, delayed, patched or repeated")
    if fault.method != CALLBACK and fault.repeat != 1:
        raise ValueError("repeat is for callbacks: method CALLBACK")


_RANGES: tuple[tuple[str, bool, float, float], ...] = (  # True: a whole number
    ("probability", False, 0, 1),
    ("status", True, 200, 599),
    ("delay", False, 0, 1e9),
    ("younger_than", False, 0, 1e9),
    ("size", True, 0, 10**10),
    ("cut", True, 0, 10**12),
    ("stall", True, 0, 10**12),
    ("drip", False, 1e-3, 1e12),
    ("content_length", True, 0, 10**15),
    ("repeat", True, 0, 1000),
)


def _numbers(value: Any) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    if any(not isinstance(number, int) or isinstance(number, bool) or number < 1 for number in numbers):
        raise ValueError(f"nth counts from 1, not {value!r}")
    return numbers


def _bytes_as_json(name: str, value: bytes) -> dict[str, str]:
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode()}


@dataclass(frozen=True, slots=True)
class Aim:
    """What a fault is matched with: a request, or a callback, and the tasks it is about."""

    method: str
    path: str
    headers: Mapping[bytes, bytes]
    models: tuple[str, ...]
    ages: tuple[float, ...] = ()  # seconds since the tasks that are read were accepted

    @classmethod
    def of(cls, request: Request, tasks: Iterable[Task], now: float) -> Aim:
        """The aim of a request: a submission's model is in its body, a read's that of its tasks."""
        if request.submits:
            body = request.json()
            name = body.get("model") if isinstance(body, dict) else None
            return cls(request.method, request.path, request.headers, (name,) if isinstance(name, str) else ())
        models, ages = [], []
        for task in tasks:
            models.append(task.model.id)
            ages.append(now - task.created)
        return cls(request.method, request.path, request.headers, tuple(models), tuple(ages))


class FaultPlan:
    """The faults in force and how often each was met. Pure, but it counts."""

    def __init__(self, faults: Iterable[Fault], seed: int) -> None:
        self.faults = tuple(faults)
        self._seed = seed
        self.matched = [0] * len(self.faults)
        self.hit = [0] * len(self.faults)

    def next(self, aim: Aim) -> Fault | None:
        """Count this request and give the fault that hits it."""
        chosen: int | None = None
        for index, fault in enumerate(self.faults):
            if not _matches(fault, aim):
                continue
            self.matched[index] += 1
            if chosen is None and self._hits(index, fault):
                chosen = index
        if chosen is None:
            return None
        self.hit[chosen] += 1
        return self.faults[chosen]

    def _hits(self, index: int, fault: Fault) -> bool:
        count = self.matched[index]
        if fault.nth:
            return count in fault.nth
        if fault.probability is None:
            return True
        draw = int.from_bytes(derive(self._seed, "fault", index, count)[:7], "big") / 2**56
        return draw < fault.probability

    def as_json(self) -> list[dict[str, Any]]:
        """Each fault with how many requests matched and how many were hit."""
        return [{**fault.to_dict(), "matched": matched, "hit": hit} for fault, matched, hit in self]

    def __iter__(self) -> Iterator[tuple[Fault, int, int]]:
        return zip(self.faults, self.matched, self.hit, strict=True)


def _matches(fault: Fault, aim: Aim) -> bool:
    if fault.method is None:
        if aim.method == CALLBACK:
            return False
    elif fault.method.upper() != aim.method:
        return False
    if not aim.path.startswith(fault.path) or (fault.model is not None and fault.model not in aim.models):
        return False
    if fault.younger_than is not None and not any(age < fault.younger_than for age in aim.ages):
        return False
    return all(
        text in aim.headers.get(name.lower().encode(), b"").decode("latin-1")
        for name, text in fault.request_headers.items()
    )
