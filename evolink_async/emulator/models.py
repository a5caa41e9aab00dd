"""The facts per model: what it accepts, how it is billed, how long it takes.

``models.json`` is the emulator's own reading of EvoLink's public documentation (165 models). It is deliberately not
the client's catalogue: an emulator that shares the client's facts would agree with its mistakes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

KINDS = ("image", "video", "audio")

_ESTIMATE_BY_KIND = {"image": 30, "audio": 90, "video": 180}
_BILLING_BY_KIND = {"image": "per_call", "audio": "per_call", "video": "per_second"}

MICRO = 1_000_000  # micro-credits in a credit: money is counted in integers


@dataclass(frozen=True, slots=True)
class Model:
    """One model. ``estimate`` is in emulated seconds."""

    id: str
    kind: str
    params: Mapping[str, Mapping[str, Any]]
    rules: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    billing_rule: str = "per_call"
    estimate: float = 30.0
    defaults: Mapping[str, Any] = field(default_factory=dict)


def model_named(name: str) -> Model | None:
    """The model with this id or alias, or None."""
    return _by_name().get(name)


def unknown_model(name: str, kind: str) -> Model:
    """A model of which only the name is known: it takes any parameter."""
    return Model(name, kind, {}, billing_rule=_BILLING_BY_KIND[kind], estimate=_ESTIMATE_BY_KIND[kind])


@cache
def all_models() -> tuple[Model, ...]:
    """Every model, in the order of the data file."""
    text = files(__package__).joinpath("models.json").read_text(encoding="utf-8")
    return tuple(_read(row) for row in json.loads(text))


@cache
def _by_name() -> dict[str, Model]:
    return {name: model for model in all_models() for name in (model.id, *model.aliases)}


def _read(row: Mapping[str, Any]) -> Model:
    kind = row["kind"]
    params = row["params"]
    return Model(
        id=row["id"],
        kind=kind,
        params=params,
        rules=tuple(row.get("rules", ())),
        aliases=tuple(row.get("aliases", ())),
        billing_rule=row.get("billing_rule", _BILLING_BY_KIND[kind]),
        estimate=float(row.get("estimated_time", _ESTIMATE_BY_KIND[kind])),
        defaults={name: spec["default"] for name, spec in params.items() if "default" in spec},
    )


@cache
def media_fields() -> frozenset[str]:
    """Every parameter name that carries media for some model; sending one that a model lacks is refused."""
    found = {"image_url"}  # no model has it, many users try it
    for model in all_models():
        for name, spec in model.params.items():
            if spec.get("format") == "uri" or spec.get("items") == "uri":
                found.add(name)
    return frozenset(found)


def price(model: Model, body: Mapping[str, Any], *, per_request: float | None = None) -> int:
    """What this request costs, in micro-credits. Plausible and deterministic, not EvoLink's price list.

    ``per_request``: the price in credits that was chosen for this model.
    """
    if per_request is not None:
        return round(per_request * MICRO)
    if model.billing_rule == "per_second":
        return _price_per_second(model, body)
    count = _asked_for(model, body)
    if model.billing_rule == "per_token":
        if model.kind != "image":
            return 20 * MICRO
        share = {"low": 110_000, "high": 4 * MICRO}.get(str(body.get("quality", "")).lower(), MICRO)
        return 3 * share * count
    return {"image": 2_500_000, "audio": 10 * MICRO, "video": 40 * MICRO}[model.kind] * count


# Seedance 2.0, micro-credits per second: (standard, fast, standard with a video, fast with a video).
_SEEDANCE = {
    "480p": (6_251_000, 5_063_000, 3_807_000, 3_012_000),
    "720p": (13_500_000, 10_935_000, 8_222_000, 6_506_000),
    "1080p": (30_375_000, 24_603_750, 18_499_500, 14_638_500),  # beyond 720p: scaled with the pixels
    "4k": (121_500_000, 98_415_000, 73_998_000, 58_554_000),
}
_ASSUMED_INPUT_SECONDS = 5  # we don't open the caller's videos


def _price_per_second(model: Model, body: Mapping[str, Any]) -> int:
    seconds = video_seconds(model, body) or 5.0
    if not model.id.startswith("seedance-2"):
        return round(5 * MICRO * seconds)
    tier = 1 if "-fast-" in model.id or "-mini-" in model.id else 0
    if body.get("video_urls"):
        tier += 2
        seconds += max(_ASSUMED_INPUT_SECONDS, seconds)
    quality = str(body.get("quality", model.defaults.get("quality", "720p")))
    rate = _SEEDANCE.get(quality, _SEEDANCE["720p"])[tier]
    micro = round(rate * seconds)
    return micro * 11 // 10 if body.get("content_filter") is False else micro


def video_seconds(model: Model, body: Mapping[str, Any]) -> float:
    """Length of the video in seconds; 0 when the model has no duration (upscaling, lip sync)."""
    if "duration" not in model.params:
        return 0.0
    for value in (body.get("duration"), model.defaults.get("duration")):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6:
            return float(value)
    return 5.0


def result_count(model: Model, body: Mapping[str, Any]) -> int:
    """How many results a completed task has."""
    if model.id in ("mj-v7", "mj-v8.1", "mj-v8.2"):
        return 4
    if model.kind == "audio":
        return 2 if model.id.startswith("suno-v") else 1
    return _asked_for(model, body)


def _asked_for(model: Model, body: Mapping[str, Any]) -> int:
    count = body.get("n", 1) if "n" in model.params else 1
    return int(count) if isinstance(count, (int, float)) and 1 <= count <= 100 else 1
