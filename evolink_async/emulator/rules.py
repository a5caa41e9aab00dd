"""What the service checks before it accepts a request. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from .answers import CURRENT, Refusal, invalid
from .behaviour import Dialect
from .crossrules import check_rules
from .models import Model, media_fields, model_named, unknown_model

Body = Mapping[str, Any]


def check(
    kind: str, body: object, *, private_callbacks: bool = False, dialect: Dialect = CURRENT
) -> tuple[Model, dict[str, Any]] | Refusal:
    """The model and the parameters of a submission, or why it is refused."""
    if not isinstance(body, dict):
        return invalid("The body must be a JSON object.")
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
            _check_unknown_media(model, params)
            or refusal
            or _check_all(model.params, params, "")
            or check_rules(model.rules, params)
        )
    return refusal or (model, {"model": model.id, **params})


def _check_unknown_media(model: Model, params: Body) -> Refusal | None:
    for name in params:
        if name in media_fields() and name not in model.params:
            return invalid(f"{model.id} does not accept {name}.", name)
    return None


def _check_callback(url: object, private: bool) -> Refusal | None:
    if url is None:
        return None
    if not isinstance(url, str) or len(url) > 2048:
        return invalid("callback_url must be a string of at most 2048 characters.", "callback_url")
    try:
        parts = urlsplit(url)
        good = parts.scheme in (("http", "https") if private else ("https",)) and bool(parts.hostname)
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
        if value is None:
            if spec.get("required"):
                return invalid(f"{prefix}{name} is required.", prefix + name)
            continue
        problem = _problem(spec, value)
        if problem is not None:
            return invalid(f"{prefix}{name} {problem}.", prefix + name)
        if "properties" in spec:
            refusal = _check_all(spec["properties"], value, f"{prefix}{name}.")
            if refusal is not None:
                return refusal
    return None


def _problem(spec: Mapping[str, Any], value: Any) -> str | None:
    """What is wrong with this value, as the end of a sentence."""
    if "also" in spec and any(value == other and type(value) is type(other) for other in spec["also"]):
        return None
    if not any(_TYPES[name](value) for name in spec["type"].split("|")):
        return f"must be {' or '.join(spec['type'].split('|'))}"
    if isinstance(value, str):
        return _text_problem(spec, value)
    if isinstance(value, list):
        return _list_problem(spec, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number_problem(spec, value)
    return None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": _is_integer,
    "number": lambda value: _is_integer(value) or isinstance(value, float),
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


def _text_problem(spec: Mapping[str, Any], value: str) -> str | None:
    if spec.get("required") and not value.strip():
        return "must not be empty"
    if len(value) > spec.get("max_length", len(value)):
        return f"must have at most {spec['max_length']} characters"
    if len(value) < spec.get("min_length", 0):
        return f"must have at least {spec['min_length']} characters"
    if spec.get("format") == "uri" and not _is_link(value):
        return "must be an http(s) URL"
    if spec.get("format") == "uuid" and not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", value):
        return "must be a UUID"
    if "pattern" in spec and not re.fullmatch(spec["pattern"], value):
        return f"must match {spec['pattern']}"
    if "pixels" in spec or "ratios" in spec:
        return _size_problem(spec, value)
    if "enum" in spec and not _listed(spec, value):
        return f"must be one of {', '.join(map(str, spec['enum']))}"
    return None


def _listed(spec: Mapping[str, Any], value: str) -> bool:
    if spec.get("any_case"):
        return value.lower() in {str(item).lower() for item in spec["enum"]}
    return value in spec["enum"]


def _is_link(value: str) -> bool:
    return value.startswith(("http://", "https://")) and len(value) > 8


def _size_problem(spec: Mapping[str, Any], value: str) -> str | None:
    ratios = spec.get("ratios", ())
    if value in ratios:
        return None
    match = re.fullmatch(r"(\d{1,5})[x×X](\d{1,5})", value)
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


_OBJECT_ITEMS = {
    "{index:int,prompt:str<=512,duration:str}": ("index", "prompt", "duration"),
    "{element_id:str}": ("element_id",),
    "{image_url}": ("image_url",),
    "{video_url}": ("video_url",),
    "{width,height,points:[x1,y1,...]}": ("width", "height", "points"),
    "object{type:'web_search'}": ("type",),
}


def _list_problem(spec: Mapping[str, Any], value: list[Any]) -> str | None:
    if not spec.get("min_items", 0) <= len(value) <= spec.get("max_items", len(value)):
        return f"must hold {spec.get('min_items', 0)} to {spec.get('max_items', 'any number of')} items"
    wanted = spec.get("items")
    if wanted == "uri":
        good = all(isinstance(item, str) and (_is_link(item) or (spec.get("inline") and item)) for item in value)
        return None if good else "must be a list of http(s) URLs"
    names = _OBJECT_ITEMS.get(str(wanted))
    if names is not None and not all(isinstance(item, dict) and all(n in item for n in names) for item in value):
        return f"must be a list of objects with {', '.join(names)}"
    return None
