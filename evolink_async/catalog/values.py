"""One value against one parameter's specification."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .findings import Finding, Severity, finding_at, shown, shown_key, unknown_parameter
from .model import Model, ParamSpec, Pixels
from .urls import callback_remark, media_remark

_JSON_TYPES: dict[type, str] = {
    str: "string",
    bool: "boolean",  # and no integer
    int: "integer",
    float: "number",
    list: "array",
    tuple: "array",
    dict: "object",
    type(None): "null",
}
_WORDS = {
    "string": "text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "array": "a list",
    "object": "an object",
}
_PIXELS = re.compile(r"(\d{1,9})[xX×](\d{1,9})\Z")
_UUID = re.compile(r"[0-9A-Fa-f]{8}-?(?:[0-9A-Fa-f]{4}-?){3}[0-9A-Fa-f]{12}\Z")
_MOST_NODES = 20_000  # of an undocumented value looked through; more than any request has


@dataclass(slots=True)
class ValueCheck:
    """The check of one request's values, with what it finds."""

    model: Model
    allow_private_hosts: bool
    findings: list[Finding]

    def report(self, severity: Severity, path: str, message: str) -> None:
        self.findings.append(finding_at(severity, path, message))

    def value(self, spec: ParamSpec, path: str, value: Any) -> None:
        """Report what is wrong with `value`."""
        kind = _JSON_TYPES.get(type(value)) or _json_type_of_other(value)
        if kind not in spec.types and not (kind == "integer" and "number" in spec.types):
            self._other_type(spec, path, kind, value)
        elif kind == "string":
            self._string(spec, path, str.__str__(value))
        elif kind == "array":
            self._array(spec, path, value)
        elif kind == "object":
            self._object(spec, path, value)
        elif kind != "boolean":
            self._number(spec, path, value)

    def _other_type(self, spec: ParamSpec, path: str, kind: str, value: object) -> None:
        if kind == "null":
            # sent as it is; most services read it as absent
            if spec.required:
                self.report("error", path, f"required by {self.model.id}, but null was given")
            else:
                self.report("warning", path, "null is sent as it is; leave the parameter out instead")
        elif not (kind == "other" and spec.format == "uri" and is_local_file(value)):  # uploaded, its link is sent
            self.report("error", path, self._wrong_type(spec, value))

    def _string(self, spec: ParamSpec, path: str, text: str) -> None:
        if spec.format is not None:
            self._formatted(spec, path, text)
        if spec.enum or spec.pixels is not None:
            self._choice(spec, path, text)
        if spec.max_length is not None and len(text) > spec.max_length and spec.format != "callback":
            self.report("error", path, f"{len(text)} characters given, at most {spec.max_length}")
        elif spec.max_bytes is not None and _utf8_length(text) > spec.max_bytes:
            self.report("error", path, f"{_utf8_length(text)} bytes of UTF-8 given, at most {spec.max_bytes}")
        if spec.advised_length is not None and len(text) > spec.advised_length:
            self.report(
                "warning",
                path,
                f"{len(text)} characters given, about {spec.advised_length} are used ({spec.note})",
            )
        if spec.min_length is not None and len(text) < spec.min_length:
            self.report("error", path, f"{len(text)} characters given, at least {spec.min_length}")
        elif not text and spec.required:
            self.report("warning", path, f"is empty, and {self.model.id} requires it")
        if spec.pattern is not None and re.fullmatch(spec.pattern, text) is None:
            self.report("error", path, f"{shown(text)} does not match {spec.pattern}")

    def _formatted(self, spec: ParamSpec, path: str, text: str) -> None:
        remark = None
        if spec.format == "uri":
            remark = media_remark(text, spec, allow_private_hosts=self.allow_private_hosts)
        elif spec.format == "callback":
            remark = callback_remark(text, allow_private_hosts=self.allow_private_hosts)
        elif _UUID.match(text) is None:
            remark = ("error", f"{shown(text)} is no UUID")
        if remark is not None:
            self.report(remark[0], path, remark[1])

    def _choice(self, spec: ParamSpec, path: str, text: str) -> None:
        if text in spec.enum or text in spec.also:
            return
        if _PIXELS.match(text):
            if text.replace("×", "x").replace("X", "x") in spec.enum:
                return
            if spec.pixels is not None:
                self._pixels(spec.pixels, path, text)
                return
        meant = _other_case(spec, text)
        if meant is None:
            self.report("error", path, self._not_accepted(spec, text))
        elif not spec.ignore_case:
            # whether the service minds the case is not documented, so it isn't refused here
            self.report("warning", path, f"{shown(text)} is documented as {meant!r}")

    def _pixels(self, pixels: Pixels, path: str, text: str) -> None:
        match = _PIXELS.match(text)
        if match is not None and not _fits(pixels, int(match[1]), int(match[2])):
            self.report("error", path, f"{shown(text)} is not accepted by {self.model.id}; allowed: {pixels.text}")

    def _number(self, spec: ParamSpec, path: str, value: Any) -> None:
        if not -math.inf < value < math.inf:
            self.report("error", path, f"{value} is not a number JSON can carry")
        elif value in spec.also:
            return
        elif (spec.enum and value not in spec.enum) or not _in_range(spec, value):
            self.report("error", path, self._not_accepted(spec, value))

    def _array(self, spec: ParamSpec, path: str, value: Any) -> None:
        count = len(value)
        if spec.max_items is not None and count > spec.max_items:
            self.report("error", path, f"{count} items given, at most {spec.max_items}")
        elif spec.min_items is not None and count < spec.min_items:
            self.report("error", path, f"{count} items given, at least {spec.min_items}")
        if spec.items is not None:
            # the count is already refused, so look no further than what could be sent
            for index, item in enumerate(value[: spec.max_items or 1000]):
                self.value(spec.items, f"{path}[{index}]", item)

    def _object(self, spec: ParamSpec, path: str, value: Any) -> None:
        for key, item in value.items():
            inner = spec.properties.get(key) if isinstance(key, str) else None
            if inner is not None:
                self.value(inner, f"{path}.{key}", item)
            else:
                if has_non_finite(item):
                    self.report("error", f"{path}.{shown_key(key)}", "NaN and infinity are not numbers JSON can carry")
                if spec.properties:
                    self.findings.append(unknown_parameter(self.model, path, key))
        for key, inner in spec.properties.items():
            if inner.required and key not in value:
                self.report("error", f"{path}.{key}", f"required by {self.model.id}, and not given")

    def _not_accepted(self, spec: ParamSpec, value: object) -> str:
        return f"{shown(value)} is not accepted by {self.model.id}; allowed: {spec.allowed}"

    def _wrong_type(self, spec: ParamSpec, value: object) -> str:
        wanted = " or ".join(_WORDS[kind] for kind in spec.types)
        text = f"{shown(value)} is not {wanted}"
        if spec.types == ("array",) and isinstance(value, str):
            return f"{text}; give [{shown(value)}]"
        if spec.types == ("array",) and is_local_file(value):
            return f"{text}; put it in one: [...]"
        if spec.format == "uri":
            return f"{text}; give a link, or a pathlib.Path or bytes to have them uploaded"
        allowed = spec.allowed
        return f"{text}; allowed: {allowed}" if allowed else text


def is_local_file(value: object) -> bool:
    """Whether a value is a path or bytes, which are uploaded where a link is wanted."""
    return isinstance(value, (os.PathLike, bytes))


def _json_type_of_other(value: object) -> str:
    """The JSON type of a value that is none of Python's own; "other" where JSON has none."""
    if isinstance(value, Mapping):
        return "object"
    for base in (str, int, float, list, tuple):  # StrEnum, IntEnum, named tuples
        if isinstance(value, base):
            return _JSON_TYPES[base]
    return "other"


def has_non_finite(value: object) -> bool:
    """Whether NaN or an infinity is anywhere inside; without recursion, as the value may nest deeply."""
    if isinstance(value, (str, bool, int)):
        return False
    return any(isinstance(node, float) and not math.isfinite(node) for node in _nodes(value))


def _nodes(value: object) -> Iterator[object]:
    stack = [value]
    for _ in range(_MOST_NODES):
        if not stack:
            return
        node = stack.pop()
        yield node
        if isinstance(node, Mapping):
            stack.extend(node.values())
        elif isinstance(node, (list, tuple)):
            stack.extend(node)


def _in_range(spec: ParamSpec, value: Any) -> bool:
    return (spec.min is None or value >= spec.min) and (spec.max is None or value <= spec.max)


def _utf8_length(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _fits(pixels: Pixels, width: int, height: int) -> bool:
    if not width or not height or width % pixels.multiple_of or height % pixels.multiple_of:
        return False
    if pixels.edge is not None and not (pixels.edge[0] <= min(width, height) and max(width, height) <= pixels.edge[1]):
        return False
    if pixels.area is not None and not pixels.area[0] <= width * height <= pixels.area[1]:
        return False
    return pixels.ratio is None or pixels.ratio[0] <= width / height <= pixels.ratio[1]


def _other_case(spec: ParamSpec, text: str) -> str | None:
    """The documented value that differs from `text` in case only."""
    if len(text) > 60:
        return None
    folded = text.casefold()
    for choice in (*spec.enum, *spec.also):
        if isinstance(choice, str) and choice.casefold() == folded:
            return choice
    return None
