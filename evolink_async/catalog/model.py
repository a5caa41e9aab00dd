"""What is known about a model, as plain values.

Sources: EvoLink's public pages and the parameter table in the vendor's client, which is built from them
("documented"); what is inferred or widened by us says so in its note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["image", "video", "audio"]

# A condition of the rule language (rules.py): a JSON list such as ["=", "custom_mode", false].
Condition = list[Any]


@dataclass(frozen=True, slots=True)
class Pixels:
    """A pixel size `WxH` (also `W×H`) and its documented bounds; `text` says them for people. Since 0.1.0."""

    text: str
    edge: tuple[int, int] | None = None
    area: tuple[int, int] | None = None
    ratio: tuple[float, float] | None = None
    multiple_of: int = 1


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One documented parameter. Since 0.1.0.

    `types` are JSON type names; `max_mb` bounds a file (1 MB read as 2**20 bytes, the lenient way),
    `advised_length` is a length over which the service is documented to cut silently or to count in tokens,
    so we only warn. `data_urls` says whether an inline file is accepted: "yes", "no" (links only) or
    "unsure".
    """

    types: tuple[str, ...]
    required: bool = False
    default: Any = None
    enum: tuple[Any, ...] = ()
    ignore_case: bool = False
    pixels: Pixels | None = None
    min: float | None = None
    max: float | None = None
    also: tuple[Any, ...] = ()
    min_length: int | None = None
    max_length: int | None = None
    advised_length: int | None = None
    max_bytes: int | None = None
    pattern: str | None = None
    format: str | None = None
    data_urls: str = "no"
    max_mb: int | None = None
    min_items: int | None = None
    max_items: int | None = None
    items: ParamSpec | None = None
    properties: Mapping[str, ParamSpec] = field(default_factory=lambda: MappingProxyType({}))
    aliases: tuple[str, ...] = ()
    note: str = ""

    @property
    def type(self) -> str:
        """The type in words: `integer`, `array of string`, `integer or string`. Since 0.1.0."""
        text = " or ".join(self.types)
        return f"{text} of {self.items.type}" if self.items is not None else text

    @property
    def allowed(self) -> str:
        """The accepted values in words, or "" where any value of the type is accepted. Since 0.1.0."""
        parts = [str(value) for value in self.enum]
        if self.pixels is not None:
            parts.append(self.pixels.text)
        if self.min is not None or self.max is not None:
            parts.append(_range_words(self.min, self.max))
        parts.extend(str(value) for value in self.also)
        if self.min_length is not None or self.max_length is not None:
            parts.append(f"{_range_words(self.min_length, self.max_length)} characters")
        if self.min_items is not None or self.max_items is not None:
            parts.append(f"{_range_words(self.min_items, self.max_items)} items")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Rule:
    """A documented relation between parameters; `text` says it for people. Since 0.1.0.

    `rule` is one of `forbid`, `require_any`, `require_if`, `exclusive`, `limit`, `limit_if`, or `unchecked`:
    known, but not decidable before sending, for the `reason` given. `severity` is "warning" where the
    documents leave a doubt.
    """

    rule: str
    text: str
    params: tuple[str, ...] = ()
    when: Condition | None = None
    bound: Condition | None = None
    sides: tuple[Condition, ...] = ()
    severity: Literal["error", "warning"] = "error"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the catalogue. Since 0.1.0.

    `billing_rule`: `per_call`, `per_second`, `per_token` or None (not documented). `estimated_time`: seconds
    in the page's example, a hint only. `legacy`: in older documents, absent from the current index.
    `documented`: False where no page was found, so that the parameter list is a guess.
    """

    id: str
    kind: Kind
    endpoint: str
    params: Mapping[str, ParamSpec]
    rules: tuple[Rule, ...] = ()
    notes: tuple[str, ...] = ()
    billing_rule: str | None = None
    estimated_time: int | None = None
    legacy: bool = False
    documented: bool = True
    aliases: tuple[str, ...] = ()
    source: str = ""


def build_model(row: Mapping[str, Any], common: Mapping[str, Any]) -> Model:
    """The model of one row of models.json; `common` are the parameters that every model takes."""
    fields = dict(row)
    params = {name: _build_spec(spec) for name, spec in {**row["params"], **common}.items()}
    fields["params"] = MappingProxyType(params)
    fields["rules"] = tuple(_build_rule(rule) for rule in row.get("rules", ()))
    for name in ("aliases", "notes"):
        fields[name] = tuple(row.get(name, ()))
    return Model(**fields)


def _build_spec(row: Mapping[str, Any]) -> ParamSpec:
    fields = dict(row)
    kind = fields.pop("type")
    fields["types"] = (kind,) if isinstance(kind, str) else tuple(kind)
    for name in ("enum", "also", "aliases"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if "pixels" in fields:
        fields["pixels"] = _build_pixels(fields["pixels"])
    if "items" in fields:
        fields["items"] = _build_spec(fields["items"])
    if "properties" in fields:
        inner = {name: _build_spec(spec) for name, spec in fields["properties"].items()}
        fields["properties"] = MappingProxyType(inner)
    return ParamSpec(**fields)


def _build_pixels(row: Mapping[str, Any]) -> Pixels:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Pixels(**fields)


def _build_rule(row: Mapping[str, Any]) -> Rule:
    fields = dict(row)
    for name in ("params", "sides"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return Rule(**fields)


def _range_words(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high}"
    if high is None:
        return f"at least {low}"
    return str(low) if low == high else f"{low} to {high}"
