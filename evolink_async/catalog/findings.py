"""Findings, and how they are worded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .loading import get_model
from .model import Model, ParamSpec
from .names import closest_parameter

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One remark about a request. Since 0.1.0.

    `severity` "error": the documents say that the service refuses it (or that it cannot work). "warning": it
    is sent, but probably not what was meant. `param`: the parameter, a path such as `model_params.speed` for
    inner ones (of a list: the list), `model` for the model's name, None for the request as a whole. `str()`
    reads `param: message`.
    """

    severity: Severity
    param: str | None
    message: str

    def __str__(self) -> str:
        return self.message if self.param is None else f"{self.param}: {self.message}"


def finding_at(severity: Severity, path: str, message: str) -> Finding:
    """The finding about a value; inside a list the list is the parameter, and the message says which item."""
    param, bracket, item = path.partition("[")
    return Finding(severity, param, f"[{item}: {message}" if bracket else message)


def shown(value: object) -> str:
    """The value for a message: short, whatever it is."""
    if isinstance(value, str):
        text = str.__str__(value)  # an enum member of text is sent as its value
        return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return str(int(value)) if -(10**40) < value < 10**40 else "a huge number"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}"


def shown_key(key: object) -> str:
    """A parameter's name for a message and for `Finding.param`."""
    return key[:100] if isinstance(key, str) else shown(key)


def unknown_parameter(model: Model, path: str, key: object) -> Finding:
    if not isinstance(key, str):
        return Finding("error", path or None, f"names are texts, not {shown(key)}")
    name = f"{path}.{shown_key(key)}" if path else shown_key(key)
    return finding_at("warning", name, _unknown_parameter_text(model.id, path, key[:100]))


@lru_cache(maxsize=4096)
def _unknown_parameter_text(id: str, path: str, key: str) -> str:
    text = f"not documented for {id}; sent as it is"
    model = get_model(id)
    if model is None:
        return text
    nested = model.params.get("model_params")
    inner = {} if nested is None else nested.properties
    if not path and key in inner:
        return f"{text}. It belongs inside model_params"
    if path == "model_params" and key in model.params:
        return f"{text}. It belongs at the top level, beside model_params"
    guess = closest_parameter(key, _names_at(model, path))
    return text if guess is None else f"{text}. Did you mean {guess!r}?"


def _names_at(model: Model, path: str) -> list[str]:
    specs: Mapping[str, ParamSpec] = model.params
    for part in path.split(".") if path else ():
        name, _, index = part.partition("[")
        spec = specs.get(name)
        inner = spec.items if spec is not None and index else spec
        specs = {} if inner is None else inner.properties
    return list(specs)
