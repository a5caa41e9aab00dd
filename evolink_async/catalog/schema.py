"""The shape of models.json, for the test that reads the whole file; loading doesn't pay for it.

What a field means stands in model.py, what a rule means in rules.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .rules import OPERANDS, OPERATORS

JsonType = Literal["string", "integer", "number", "boolean", "array", "object"]
_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*\Z")


class _Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class PixelsRow(_Strict):
    """`pixels` of a size."""

    text: str
    edge: tuple[int, int] | None = None
    area: tuple[int, int] | None = None
    ratio: tuple[float, float] | None = None
    multiple_of: int = Field(default=1, ge=1)


class ParamRow(_Strict):
    """One parameter."""

    type: JsonType | list[JsonType]
    required: Literal[True] | None = None
    default: Any = None
    enum: list[Any] | None = Field(default=None, min_length=1)
    ignore_case: Literal[True] | None = None
    pixels: PixelsRow | None = None
    min: float | None = None
    max: float | None = None
    also: list[Any] | None = Field(default=None, min_length=1)
    min_length: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    advised_length: int | None = Field(default=None, ge=1)
    max_bytes: int | None = Field(default=None, ge=1)
    pattern: str | None = None
    format: Literal["uri", "uuid", "callback"] | None = None
    data_urls: Literal["yes", "unsure"] | None = None
    max_mb: int | None = Field(default=None, ge=1)
    min_items: int | None = Field(default=None, ge=1)
    max_items: int | None = Field(default=None, ge=1)
    items: ParamRow | None = None
    properties: dict[str, ParamRow] | None = None
    aliases: list[str] | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ParamRow:
        types: set[str] = {self.type} if isinstance(self.type, str) else set(self.type)
        self._fields_fit(types)
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min over max")
        if self.default is not None:
            self._default_is_allowed()
        return self

    def _fields_fit(self, types: set[str]) -> None:
        fits = {
            "string": (
                "min_length",
                "max_length",
                "advised_length",
                "max_bytes",
                "pattern",
                "format",
                "pixels",
            ),
            "array": ("items", "min_items", "max_items"),
            "object": ("properties",),
        }
        for kind, names in fits.items():
            stray = [name for name in names if getattr(self, name) is not None]
            if stray and kind not in types:
                raise ValueError(f"{stray} on {types}")
        if (self.min is not None or self.max is not None) and not types & {"integer", "number"}:
            raise ValueError(f"a range on {types}")

    def _default_is_allowed(self) -> None:
        if self.enum is not None and self.default not in self.enum:
            raise ValueError(f"default {self.default!r} is not in {self.enum}")
        number = isinstance(self.default, (int, float)) and self.default not in (self.also or ())
        if number and not (self.min or self.default) <= self.default <= (self.max or self.default):
            raise ValueError(f"default {self.default!r} is out of range")


class RuleRow(_Strict):
    """One rule; which fields it has depends on its kind."""

    rule: Literal["forbid", "require_any", "require_if", "exclusive", "limit", "limit_if", "unchecked"]
    text: str = Field(min_length=1)
    params: list[str] | None = Field(default=None, min_length=1)
    when: list[Any] | None = None
    bound: list[Any] | None = None
    sides: list[list[Any]] | None = Field(default=None, min_length=2)
    severity: Literal["warning"] | None = None
    reason: str | None = Field(default=None, min_length=1)

    @field_validator("when", "bound")
    @classmethod
    def _is_condition(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None:
            check_condition(value)
        return value

    @model_validator(mode="after")
    def _has_its_fields(self) -> RuleRow:
        needed, optional = _FIELDS[self.rule]
        present = {name for name in ("params", "when", "bound", "sides", "reason") if getattr(self, name) is not None}
        if not needed <= present <= needed | optional:
            raise ValueError(f"{self.rule} has {sorted(present)}")
        for side in self.sides or ():
            check_condition(side)
        return self


class ModelRow(_Strict):
    """One model."""

    id: str = Field(pattern=r"^[A-Za-z0-9.-]+$")
    kind: Literal["image", "video", "audio"]
    endpoint: str
    aliases: list[str] = []
    legacy: Literal[True] | None = None
    documented: Literal[False] | None = None
    billing_rule: Literal["per_call", "per_second", "per_token"] | None = None
    estimated_time: int | None = Field(default=None, ge=1)
    params: dict[str, ParamRow] = Field(min_length=1)
    rules: list[RuleRow] = []
    notes: list[str] = []
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _endpoint_is_of_its_kind(self) -> ModelRow:
        if self.endpoint != f"/v1/{self.kind}s/generations":
            raise ValueError(f"{self.endpoint} for {self.kind}")
        return self

    @model_validator(mode="after")
    def _conditions_name_parameters(self) -> ModelRow:
        # what a model prohibits need not be its parameter; what decides whether it is prohibited must be
        known = set(_paths("", self.params))
        for rule in self.rules:
            unknown = [p for c in (rule.when, rule.bound, *(rule.sides or ())) for p in _paths_in(c) if p not in known]
            if unknown and rule.rule != "forbid":
                raise ValueError(f"{rule.text}: no parameter {unknown}")
        return self


class WrongNameRow(_Strict):
    """A name that is known to be refused, and what to send instead."""

    id: str
    text: str


class CatalogueFile(_Strict):
    """models.json."""

    about: str
    media: list[str]
    wrong_names: list[WrongNameRow]
    common: dict[str, ParamRow]
    models: list[ModelRow]


_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "forbid": ({"params"}, {"when"}),
    "require_any": ({"params"}, {"when"}),
    "require_if": ({"params", "when"}, set()),
    "exclusive": ({"params", "sides"}, set()),
    "limit": ({"params", "bound"}, set()),
    "limit_if": ({"params", "bound", "when"}, set()),
    "unchecked": ({"reason"}, set()),
}


def check_condition(condition: Any) -> None:
    """Raise ValueError unless this is a condition of the rule language."""
    if not isinstance(condition, list) or not condition:
        raise ValueError(f"no condition: {condition!r}")
    head, *rest = condition
    if head in ("and", "or", "not"):
        if not rest or (head == "not" and len(rest) != 1):
            raise ValueError(f"operands of {condition!r}")
        for part in rest:
            check_condition(part)
    elif head == "has":
        _need_path(*rest)
    elif head == "match":
        _need_path(rest[0])
        re.compile(rest[1])
    elif head == "in":
        _check_operand(rest[0])
        if not isinstance(rest[1], list):
            raise ValueError(f"no list in {condition!r}")
    elif head in OPERATORS and len(rest) == 2:
        _check_operand(rest[0])
        if isinstance(rest[1], list):
            _check_operand(rest[1])
    else:
        raise ValueError(f"no condition: {condition!r}")


def _check_operand(operand: Any) -> None:
    if isinstance(operand, str):
        _need_path(operand)
    elif isinstance(operand, list):
        if operand[0] not in OPERANDS:
            raise ValueError(f"no operand: {operand!r}")
        if operand[0] in ("+", "-"):
            _check_operand(operand[1])
            _check_operand(operand[2])
        else:
            _need_path(*(path.replace("[]", "") for path in operand[1:]))


def _need_path(*paths: Any) -> None:
    for path in paths:
        if not isinstance(path, str) or _PATH.match(path) is None:
            raise ValueError(f"no path: {path!r}")


def _paths(prefix: str, params: dict[str, ParamRow]) -> Iterator[str]:
    for name, row in params.items():
        yield prefix + name
        yield from _paths(f"{prefix}{name}.", row.properties or {})


def _paths_in(condition: list[Any] | None) -> Iterator[str]:
    """The parameters a condition looks at."""
    if not condition:
        return
    head, *rest = condition
    if head in ("and", "or", "not"):
        for part in rest:
            yield from _paths_in(part)
        return
    operands = rest if head in OPERATORS else rest[:1]
    for position, operand in enumerate(operands):
        yield from _paths_of(operand, is_path=position == 0)


def _paths_of(operand: Any, *, is_path: bool) -> Iterator[str]:
    if isinstance(operand, str) and is_path:
        yield operand
    elif isinstance(operand, list):
        for part in operand[1:]:
            path = part.partition("[]")[0] if isinstance(part, str) else part
            yield from _paths_of(path, is_path=True)
