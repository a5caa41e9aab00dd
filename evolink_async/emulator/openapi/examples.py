"""A small valid body for each model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolink_async.emulator.answers import Json, Refusal
from evolink_async.emulator.models import Model
from evolink_async.emulator.rules import check, item_spec

_PROMPT = "A lighthouse at dawn"
_LINKS = {"image": "https://example.com/picture.png", "video": "https://example.com/clip.mp4"}
_LINKS["audio"] = "https://example.com/tune.mp3"


def example_body(model: Model) -> Json:
    """The least that the model accepts, found by asking the service what is missing until nothing is."""
    body: Json = {"model": model.id}
    if "prompt" in model.params:
        body["prompt"] = _PROMPT
    for _ in range(20):
        answer = check(model.kind, body)
        if not isinstance(answer, Refusal):
            return body
        _add(body, model.params, str(answer.param).split("."))
    raise ValueError(f"no example found for {model.id}: {answer}")


def _add(body: Json, specs: Mapping[str, Any], names: list[str]) -> None:
    name, *rest = names
    if rest:
        _add(body.setdefault(name, {}), specs[name]["properties"], rest)
    else:
        body[name] = _value(name, specs[name])


def _value(name: str, spec: Mapping[str, Any]) -> Any:
    """A plausible value for a parameter that must be sent."""
    if "enum" in spec:
        return spec["enum"][0]
    if spec["type"] == "array":
        return [_value(name, item_spec(spec))] * max(1, spec.get("min_items", 1))
    if spec["type"] == "object":
        needed = {inner: value for inner, value in spec.get("properties", {}).items() if value.get("required")}
        return {inner: _value(inner, value) for inner, value in needed.items()}
    if spec["type"] == "string":
        return _text(name, spec)
    return spec.get("min", 1024)


def _text(name: str, spec: Mapping[str, Any]) -> str:
    if spec.get("format") == "uuid":
        return "6f0c1a52-3b1e-4f4e-9d0a-0123456789ab"
    if spec.get("format") == "uri" or name.endswith(("_url", "_urls")):
        return next((link for kind, link in _LINKS.items() if kind in name), _LINKS["image"])
    return name[: spec.get("max_length", len(name))]
