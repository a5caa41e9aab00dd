"""How a model's tasks behave and how the service speaks: what a user of the emulator may choose. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from .models import KINDS, model_named

PROGRESS_LAWS = ("estimate", "none", "linear", "stairs", "stuck")


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the tasks of a model go.

    - ``estimate``: the ``estimated_time`` in emulated seconds (None: the documented one, or a usual one of its kind);
      ``tells_estimate=False`` leaves it out of the answers, as some models do.
    - A task takes ``estimate`` times a lognormal number with median ``bias`` and spread ``sigma``; ``slow_share`` of
      the tasks take ``slow_factor`` times as long (a model behind two queues).
    - ``failure_share``: the share that fails (None: the emulator's). ``early_share`` of the failures come in the first
      third, as refusals of moderation do; the others near the usual end.
    - ``cancelled_share``: the share that the service cancels. ``partial_share``: the share of requests for several
      images that bring fewer; only those are charged.
    - ``progress``: what a running task tells. ``"estimate"``: time passed through estimate, to 95 (how gateways
      compute it; it knows nothing of the true end). ``"none"``: 0. ``"linear"``: the truth. ``"stairs"``: the truth in
      steps of 20. ``"stuck"``: soon 90, then nothing until the end.
    - ``price``: credits for a request (None: a plausible one). ``rate``, ``burst`` (submissions per real second and at
      once) and ``concurrency`` (unfinished tasks): limits of this model alone, beside those of the account.
    """

    estimate: float | None = None
    tells_estimate: bool = True
    bias: float = 0.9
    sigma: float = 0.25
    slow_share: float = 0.0
    slow_factor: float = 4.0
    failure_share: float | None = None
    early_share: float = 0.85
    cancelled_share: float = 0.0
    partial_share: float = 0.0
    progress: Literal["estimate", "none", "linear", "stairs", "stuck"] = "estimate"
    price: float | None = None
    rate: float | None = None
    burst: float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("estimate", "slow_factor", "rate"):
            _require(self, name, "above 0", lambda value: 0 < value < float("inf"))
        for name in ("sigma", "bias", "price"):
            _require(self, name, "0 or more", lambda value: 0 <= value < float("inf"))
        for name in ("slow_share", "failure_share", "early_share", "cancelled_share", "partial_share"):
            _require(self, name, "between 0 and 1", lambda value: 0 <= value <= 1)
        _require(self, "burst", "1 or more", lambda value: value >= 1)
        _require(self, "concurrency", "a whole number from 1", lambda value: isinstance(value, int) and value >= 1)
        if self.progress not in PROGRESS_LAWS:
            raise ValueError(f"progress must be one of {', '.join(PROGRESS_LAWS)}, not {self.progress!r}")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the service speaks, where its documents, clients and generations differ. The defaults: the current documents.

    - ``errors``: ``"current"`` (``code`` is a word) or ``"old"`` (``code`` is the HTTP status as a number).
    - ``created``: how much the answer to a submission tells. ``"full"``, ``"bare"`` (without task_info and usage, as
      recorded for Suno) or ``"brief"`` (created, id, model, status, as the pages of veo-3.1 and hailuo show).
    - ``credits``: ``"current"`` or ``"old"`` (a hundred times the figure, with ``estimated_cost``, as in the oldest
      quickstart).
    - ``results``: ``"links"``, ``"objects"`` (each ``{"url": ...}``) or ``"nested"`` (``results``, and the same once
      more as ``result.results``, where the oldest quickstart's samples look for it).
    - ``polled_usage``: finished tasks carry ``usage``, ``billing`` and the seconds they took as ``duration``, as
      newer gateways do (vendor's client; that the seconds have decimals is our guess).
    - ``cancelled``: a task that the service cancelled is ``"failed"`` with the code request_cancelled (documented) or
      has the status ``"cancelled"`` (documented for callbacks).
    - ``unknown_model``: 400 (quickstart) or 403 (API pages).
    - ``validation``: ``"strict"``, or ``"lenient"``: any model name, any parameters.
    - ``files_with_200``: refusals of the files API come with HTTP 200 (vendor's client reckons with it).
    """

    errors: Literal["current", "old"] = "current"
    created: Literal["full", "bare", "brief"] = "full"
    credits: Literal["current", "old"] = "current"
    results: Literal["links", "objects", "nested"] = "links"
    polled_usage: bool = False
    cancelled: Literal["failed", "cancelled"] = "failed"
    unknown_model: Literal[400, 403] = 400
    validation: Literal["strict", "lenient"] = "strict"
    files_with_200: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                wanted = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} must be one of {wanted}, not {getattr(self, name)!r}")


_WORDS: Mapping[str, tuple[Any, ...]] = {
    "errors": ("current", "old"),
    "created": ("full", "bare", "brief"),
    "credits": ("current", "old"),
    "results": ("links", "objects", "nested"),
    "polled_usage": (False, True),
    "cancelled": ("failed", "cancelled"),
    "unknown_model": (400, 403),
    "validation": ("strict", "lenient"),
    "files_with_200": (False, True),
}

_Choice = TypeVar("_Choice", Behaviour, Dialect)


def read_choice(cls: type[_Choice], data: object) -> _Choice:
    """A Behaviour or a Dialect, or one from a mapping of its fields. ValueError says what is wrong with it."""
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(f"a {cls.__name__} is made of a mapping, not {data!r}")
    known = {spec.name for spec in dataclasses.fields(cls)}
    unknown = sorted(set(map(str, data)) - known)
    if unknown:
        raise ValueError(f"a {cls.__name__} has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    try:
        return cls(**data)
    except TypeError as exc:
        raise ValueError(f"a {cls.__name__} has a value of the wrong type: {exc}") from exc


class Behaviours:
    """What was chosen for all (``"*"``), for a kind, and for single models: the narrower overrides field by field."""

    def __init__(self, chosen: Mapping[str, Behaviour | Mapping[str, Any]]) -> None:
        self._chosen: dict[str, Mapping[str, Any]] = {}
        for name, fields in chosen.items():
            if name != "*" and name not in KINDS and model_named(name) is None:
                raise ValueError(f"models: no model {name!r}; name a model, a kind ({', '.join(KINDS)}) or '*' for all")
            try:
                behaviour = read_choice(Behaviour, fields)
            except ValueError as exc:
                raise ValueError(f"models: {name}: {exc}") from None
            model = model_named(name)
            self._chosen[name if model is None else model.id] = _given(behaviour, fields)
        self._merged: dict[str, Behaviour] = {}

    def of(self, model_id: str, kind: str) -> Behaviour:
        behaviour = self._merged.get(model_id)
        if behaviour is None:
            fields = {name: value for key in ("*", kind, model_id) for name, value in self._chosen.get(key, {}).items()}
            behaviour = self._merged[model_id] = Behaviour(**fields)
        return behaviour


def _given(behaviour: Behaviour, fields: Behaviour | Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields that were chosen: of an object, those that are not at their default."""
    if isinstance(fields, Mapping):
        return dict(fields)
    default = Behaviour()
    names = [spec.name for spec in dataclasses.fields(Behaviour)]
    return {name: getattr(behaviour, name) for name in names if getattr(behaviour, name) != getattr(default, name)}


def _require(choice: Behaviour, name: str, wanted: str, is_good: Any) -> None:
    value = getattr(choice, name)
    if value is None and name in _MAY_BE_NONE:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_good(value):
        raise ValueError(f"{name} must be {wanted}, not {value!r}")


_MAY_BE_NONE = {"estimate", "failure_share", "price", "rate", "burst", "concurrency"}
