"""What the service checks before it accepts a request. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from .answers import CURRENT, Refusal, invalid
from .behaviour import Dialect
from .crossrules import check_rules
from .models import Model, media_fields, model_named, unknown_model

Body = Mapping[str, Any]

DEEPEST = 100  # our guess; the parser and the encoder of Python have limits that differ
CALLBACK_LENGTH = 2048  # characters, as documented


def check(
    kind: str, body: object, *, private_callbacks: bool = False, dialect: Dialect = CURRENT
) -> tuple[Model, dict[str, Any]] | Refusal:
    """The model and the parameters of a submission, or why it is refused."""
    if not isinstance(body, dict):
        return invalid("The body must be a JSON object.")
    if _is_deeper(body, DEEPEST):
        return invalid(f"The body is nested deeper than {DEEPEST} levels.")
    name = body.get("model")
    if not isinstance(name, str) or not name:
        return invalid("model is required.", "model")
    model = model_named(name)
    lenient = dialect.validation == "lenient"
    if lenient and (model is None or model.kind != kind):
        model = unknown_model(name, kind)
    if model is None and dialect.unknown_model == 403:
        return Refusal(403, "model_access_denied", f"The model {name!r} is not available to this key.", param="model")
    if model is None:
        return invalid(f"The model {name!r} does not exist.", "model")
    if model.kind != kind:
        return invalid(f"{model.id} is a model for {model.kind}: POST to /v1/{model.kind}s/generations.", "model")
    # A null is a parameter that was not sent.
    params = {name: value for name, value in body.items() if value is not None and name != "model"}
    refusal = _check_callback(params.get("callback_url"), private_callbacks)
    if not lenient:
        refusal = (
            _check_unknown_media(model, body)
            or refusal
            or _check_all(model.params, params, "")
            or check_rules(model.rules, params)
        )
    return refusal or (model, {"model": model.id, **params})


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other more than so many levels deep."""
    layer = [value]
    for _ in range(levels):
        inside = [item.values() if isinstance(item, dict) else item for item in layer if isinstance(item, (dict, list))]
        layer = [item for items in inside for item in items if isinstance(item, (dict, list))]
        if not layer:
            return False
    return True


def _check_unknown_media(model: Model, body: Body) -> Refusal | None:
    for name in body:
        if name in media_fields() and name not in model.params:
            return invalid(f"{model.id} does not accept {name}.", name)
    return None


def _check_callback(url: object, private: bool) -> Refusal | None:
    if url is None:
        return None
    if not isinstance(url, str) or len(url) > CALLBACK_LENGTH:
        return invalid(f"callback_url must be a string of at most {CALLBACK_LENGTH} characters.", "callback_url")
    try:
        parts = urlsplit(url)
        good = bool(re.match(LINK if private else SAFE_LINK, url)) and bool(parts.hostname)
        good = good and (private or not _is_private(parts.hostname or ""))
        good = good and parts.port != 0
    except ValueError:
        good = False
    if not good and private:
        return invalid("callback_url must be an http(s) URL.", "callback_url")
    if not good:
        return invalid("callback_url must be https and not point to a private address.", "callback_url")
    return None


def _is_private(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local", ".internal"))


# --- one parameter ---------------------------------------------------------------------------------------------


def _check_all(specs: Mapping[str, Any], params: Body, prefix: str) -> Refusal | None:
    for name, spec in specs.items():
        value = params.get(name)
        if value is not None:
            refusal = _check_value(spec, value, prefix + name)
        else:
            refusal = invalid(f"{prefix}{name} is required.", prefix + name) if spec.get("required") else None
        if refusal is not None:
            return refusal
    return None


def _check_value(spec: Mapping[str, Any], value: Any, name: str) -> Refusal | None:
    problem = _problem(spec, value)
    if problem is not None:
        return invalid(f"{name} {problem}.", name)
    if isinstance(value, list):
        wanted = item_spec(spec)
        found = (_check_value(wanted, item, f"{name}[{index}]") for index, item in enumerate(value))
        refusal = next(filter(None, found), None)
        return None if refusal is None else replace(refusal, param=name)
    return _check_all(spec["properties"], value, f"{name}.") if "properties" in spec else None


def _problem(spec: Mapping[str, Any], value: Any) -> str | None:
    """What is wrong with this value, as the end of a sentence."""
    if "also" in spec and any(value == other and not isinstance(value, bool) for other in spec["also"]):
        return None
    if not any(_TYPES[name](value) for name in spec["type"].split("|")):
        return f"must be {' or '.join(spec['type'].split('|'))}"
    if isinstance(value, str):
        return _text_problem(spec, value)
    if isinstance(value, list) and not spec.get("min_items", 0) <= len(value) <= spec.get("max_items", len(value)):
        return f"must hold {spec.get('min_items', 0)} to {spec.get('max_items', 'any number of')} items"
    if _is_number(value):
        return _number_problem(spec, value)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    """As in JSON Schema, where 1.0 is an integer: JSON knows one kind of number."""
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": _is_integer,
    "number": _is_number,
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _number_problem(spec: Mapping[str, Any], value: float) -> str | None:
    if "enum" in spec and value not in spec["enum"]:
        return f"must be one of {', '.join(map(str, spec['enum']))}"
    if ("min" in spec and value < spec["min"]) or ("max" in spec and value > spec["max"]):
        return f"must be between {spec.get('min', '-inf')} and {spec.get('max', 'inf')}"
    return None


# What texts must look like, in patterns that mean the same in Python and in JSON Schema.
NOT_BLANK = r"[^ \t\r\n]"  # somewhere
LINK = r"https?://[^/\x00-\x20\x7f]"  # at the start
SAFE_LINK = r"https://[^/\x00-\x20\x7f]"  # at the start
UUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"  # the whole text
PIXELS = r"([0-9]{1,5})[x×X]([0-9]{1,5})"  # the whole text


def _text_problem(spec: Mapping[str, Any], value: str) -> str | None:
    if spec.get("required") and not re.search(NOT_BLANK, value):
        return "must not be empty"
    if len(value) > spec.get("max_length", len(value)):
        return f"must have at most {spec['max_length']} characters"
    if len(value) < spec.get("min_length", 0):
        return f"must have at least {spec['min_length']} characters"
    if spec.get("format") == "uri" and not re.match(LINK, value):
        return "must be an http(s) URL"
    if spec.get("format") == "uuid" and not re.fullmatch(UUID, value):
        return "must be a UUID"
    if "pattern" in spec and not re.fullmatch(spec["pattern"], value):
        return f"must match {spec['pattern']}"
    if "pixels" in spec or "ratios" in spec:
        return _size_problem(spec, value)
    if "enum" in spec and not _listed(spec, value):
        return f"must be one of {', '.join(map(str, spec['enum']))}"
    return None


def _listed(spec: Mapping[str, Any], value: str) -> bool:
    if spec.get("any_case") and value.isascii():
        return value.lower() in {str(item).lower() for item in spec["enum"]}
    return value in spec["enum"]


def _size_problem(spec: Mapping[str, Any], value: str) -> str | None:
    ratios = spec.get("ratios", ())
    if value in ratios:
        return None
    match = re.fullmatch(PIXELS, value)
    if match is None or "pixels" not in spec:
        return f"must be {', '.join(ratios)}{' or ' if ratios else ''}WxH"
    width, height = int(match[1]), int(match[2])
    if not _fits(spec["pixels"], width, height):
        return f"of {width}x{height} pixels is outside the model's limits"
    return None


def _fits(limits: Mapping[str, Any], width: int, height: int) -> bool:
    low, high = sorted((width, height))
    edge, area = limits.get("edge", (1, 10**6)), limits.get("area", (1, 10**12))
    return bool(
        low >= edge[0]
        and high <= edge[1]
        and area[0] <= width * height <= area[1]
        and high <= low * limits.get("ratio", 10**6)
        and width % limits.get("multiple", 1) == height % limits.get("multiple", 1) == 0
    )


_TEXT = {"type": "string", "required": True}
_NUMBER = {"type": "number", "required": True}
_ITEMS: dict[str, Mapping[str, Any]] = {
    "uri": {"type": "string", "format": "uri"},
    "voice id or audio URL": _TEXT,
    "{image_url}": {"type": "object", "properties": {"image_url": {**_TEXT, "format": "uri"}}},
    "{video_url}": {"type": "object", "properties": {"video_url": {**_TEXT, "format": "uri"}}},
    "{element_id:str}": {"type": "object", "properties": {"element_id": _TEXT}},
    "{index:int,prompt:str<=512,duration:str}": {
        "type": "object",
        "properties": {
            "index": {"type": "integer", "required": True},
            "prompt": {**_TEXT, "max_length": 512},
            "duration": _TEXT,
        },
    },
    "{width,height,points:[x1,y1,...]}": {
        "type": "object",
        "properties": {
            "width": _NUMBER,
            "height": _NUMBER,
            "points": {"type": "array", "required": True, "items": "number"},
        },
    },
    "object{type:'web_search'}": {
        "type": "object",
        "properties": {"type": {"type": "string", "required": True, "enum": ["web_search"]}},
    },
    "number": {"type": "number"},
}


def item_spec(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """What each item of this array must be."""
    return _TEXT if spec.get("inline") else _ITEMS[spec["items"]]
