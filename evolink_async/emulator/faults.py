"""Faults as data: which requests are hit, and what happens to them."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from .tasks import derive


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and for which requests.

    A request is *matched* by ``method`` (None = any), ``path`` (a prefix, query not included) and ``model`` (of the
    body, or of the task that is read). Of the matched ones those numbered in ``nth`` (from 1) are hit, or each with
    ``probability`` (seeded); with neither, all are. Where several faults would hit a request, the first one does.

    - ``status`` with ``body`` (JSON) or ``raw_body`` (bytes, with ``content_type``) and ``headers``: the answer. A
      submission is not accepted, unless ``accept``: then the task exists and is paid, and only the answer is wrong.
    - ``drop="before"``: the connection is closed, nothing was accepted. ``drop="after"``: a submission is accepted and
      paid, then the connection is closed without an answer. (Reads are just dropped.)
    - ``delay``: seconds that the answer is late. A submission is accepted at once and answered late; a read is
      answered with what is true after the delay. A fault with nothing but a delay changes only the time.
    """

    method: str | None = None
    path: str = "/"
    model: str | None = None
    nth: tuple[int, ...] = ()
    probability: float | None = None
    status: int | None = None
    body: Any = None
    raw_body: bytes | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    accept: bool = False
    drop: str | None = None
    delay: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "nth", _numbers(self.nth))
        if isinstance(self.raw_body, str):
            object.__setattr__(self, "raw_body", self.raw_body.encode())
        for name in ("method", "path", "model", "content_type"):
            if not isinstance(getattr(self, name), (str, NoneType if name in ("method", "model") else str)):
                raise ValueError(f"{name} must be text, not {getattr(self, name)!r}")
        if {name.lower() for name in self.headers} & {"content-length", "content-type", "transfer-encoding"}:
            raise ValueError("a fault's headers are those beside the body's: its type is content_type")
        if self.drop not in (None, "before", "after"):
            raise ValueError(f"drop must be 'before' or 'after', not {self.drop!r}")
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, not {self.probability!r}")
        if self.nth and self.probability is not None:
            raise ValueError("a fault has nth or probability, not both")
        if self.status is not None and not 200 <= self.status <= 599:
            raise ValueError(f"status must be between 200 and 599, not {self.status!r}")
        if not (self.delay >= 0):
            raise ValueError(f"delay must be seconds, not {self.delay!r}")
        if self.status is None and (self.body is not None or self.raw_body is not None):
            raise ValueError("a fault with a body needs a status")
        if self.status is None and self.drop is None and not self.delay:
            raise ValueError("a fault needs an effect: status, drop or delay")

    @property
    def accepts(self) -> bool:
        """Whether a submission that is hit becomes a paid task all the same."""
        if self.drop is not None:
            return self.drop == "after"
        return self.accept or self.status is None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fault:
        """Read a fault from JSON: the same names; bytes as text in ``raw_body`` or ``raw_body_base64``."""
        values = dict(data)
        if "raw_body_base64" in values:
            values["raw_body"] = base64.b64decode(values.pop("raw_body_base64"))
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
            if spec.name == "raw_body" and value is not None:
                data.update(_bytes_as_json(value))
            elif value not in (spec.default, {}):
                data[spec.name] = list(value) if isinstance(value, tuple) else value
        return data


def _numbers(value: Any) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    if any(not isinstance(number, int) or number < 1 for number in numbers):
        raise ValueError(f"nth counts from 1, not {value!r}")
    return numbers


def _bytes_as_json(value: bytes) -> dict[str, str]:
    try:
        return {"raw_body": value.decode()}
    except UnicodeDecodeError:
        return {"raw_body_base64": base64.b64encode(value).decode()}


class FaultPlan:
    """The faults in force and how often each was met. Pure, but it counts."""

    def __init__(self, faults: Iterable[Fault], seed: int) -> None:
        self.faults = tuple(faults)
        self._seed = seed
        self.matched = [0] * len(self.faults)
        self.hit = [0] * len(self.faults)

    def next(self, method: str, path: str, model: str | None) -> Fault | None:
        """Count this request and give the fault that hits it."""
        chosen: int | None = None
        for index, fault in enumerate(self.faults):
            if not _matches(fault, method, path, model):
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
        counts = zip(self.faults, self.matched, self.hit, strict=True)
        return [{**fault.to_dict(), "matched": matched, "hit": hit} for fault, matched, hit in counts]


def _matches(fault: Fault, method: str, path: str, model: str | None) -> bool:
    if fault.method is not None and fault.method.upper() != method:
        return False
    return path.startswith(fault.path) and (fault.model is None or fault.model == model)
