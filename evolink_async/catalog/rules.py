"""The rule language of models.json and its interpreter.

A condition is a JSON list:

    ["has", path]                         given: neither absent nor null nor empty
    ["=", left, right]    != < <= > >=    comparison
    ["in", left, [value, ...]]
    ["match", path, regular expression]   found anywhere in a text
    ["and", c, ...]  ["or", c, ...]  ["not", c]

`left` and `right` are a number, or one of ["value", path], ["count", path, ...] (items of lists; anything
else given is 1), ["length", path] (characters), ["bytes", path, ...] (characters of all texts in there),
["sum", "list[].field"], ["+", a, b], ["-", a, b]. A text on the left is a path, a literal on the right is
itself. A path is `name` or `object.name`.

When a rule applies (`when`, `sides`) the documented default stands in for an absent parameter, and what
cannot be told is "no". What it then demands (`bound`) looks only at what was given, and what cannot be told
is "yes": an absent parameter is the service's choice. Both lean towards accepting.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from .model import Condition, Model, ParamSpec, Rule

Params = Mapping[str, object]
Test = Callable[[Params], bool]
Operand = Callable[[Params], Any]  # None: cannot be told
Violations = Callable[[Params], Iterable[str]]  # the parameters to blame

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
OPERANDS = ("value", "count", "length", "bytes", "sum", "+", "-")


class CompiledRule(NamedTuple):
    """A rule ready to be asked for its violations."""

    severity: Literal["error", "warning"]
    text: str
    violations: Violations


def compile_rules(model: Model, media: frozenset[str]) -> tuple[CompiledRule, ...]:
    """The model's enforceable rules.

    `media` fields that the model doesn't take are reported with a better message by the check itself, so a
    plain prohibition of one is left out here.
    """
    defaults = dict(_defaults("", model.params))
    return tuple(
        CompiledRule(rule.severity, rule.text, _VIOLATIONS[rule.rule](rule, defaults))
        for rule in model.rules
        if rule.rule != "unchecked" and not _is_plain_media_ban(rule, model, media)
    )


def given(value: object) -> bool:
    """Whether a parameter has anything in it: null, "" and [] count as absent."""
    return value is not None and (not isinstance(value, (str, list, tuple, Mapping)) or len(value) > 0)


def _is_plain_media_ban(rule: Rule, model: Model, media: frozenset[str]) -> bool:
    return (
        rule.rule == "forbid" and rule.when is None and all(p in media and p not in model.params for p in rule.params)
    )


def _defaults(prefix: str, specs: Mapping[str, ParamSpec]) -> Iterator[tuple[str, Any]]:
    for name, spec in specs.items():
        if spec.default is not None:
            yield prefix + name, spec.default
        yield from _defaults(f"{prefix}{name}.", spec.properties)


# ---- what a rule finds


def _forbid(rule: Rule, defaults: Mapping[str, Any]) -> Violations:
    applies = _when(rule, defaults)
    targets = _targets(rule)
    names = frozenset(path.partition(".")[0] for path in rule.params)

    def find(params: Params) -> Iterable[str]:
        if names.isdisjoint(params):
            return ()
        present = [path for path, get in targets if given(get(params))]
        return present if present and applies(params) else ()

    return find


def _require_any(rule: Rule, defaults: Mapping[str, Any]) -> Violations:
    applies = _when(rule, defaults)
    targets = _targets(rule)

    def find(params: Params) -> Iterable[str]:
        none_given = not any(given(get(params)) for _, get in targets)
        return rule.params[:1] if none_given and applies(params) else ()

    return find


def _require_if(rule: Rule, defaults: Mapping[str, Any]) -> Violations:
    applies = _when(rule, defaults)
    targets = _targets(rule)

    def find(params: Params) -> Iterable[str]:
        absent = [path for path, get in targets if not given(get(params))]
        return absent if absent and applies(params) else ()

    return find


def _exclusive(rule: Rule, defaults: Mapping[str, Any]) -> Violations:
    sides = [_condition(side, defaults) for side in rule.sides]

    def find(params: Params) -> Iterable[str]:
        return rule.params[:1] if all(side(params) for side in sides) else ()

    return find


def _limit(rule: Rule, defaults: Mapping[str, Any]) -> Violations:
    applies = _when(rule, defaults)
    assert rule.bound is not None  # the schema test sees to it
    holds = _condition(rule.bound, None)

    def find(params: Params) -> Iterable[str]:
        return rule.params[:1] if not holds(params) and applies(params) else ()

    return find


_VIOLATIONS: dict[str, Callable[[Rule, Mapping[str, Any]], Violations]] = {
    "forbid": _forbid,
    "require_any": _require_any,
    "require_if": _require_if,
    "exclusive": _exclusive,
    "limit": _limit,
    "limit_if": _limit,
}


def _targets(rule: Rule) -> list[tuple[str, Operand]]:
    return [(path, _getter(path)) for path in rule.params]


def _when(rule: Rule, defaults: Mapping[str, Any]) -> Test:
    return (lambda params: True) if rule.when is None else _condition(rule.when, defaults)


# ---- conditions; `defaults` is None inside a bound


def _condition(condition: Condition, defaults: Mapping[str, Any] | None) -> Test:
    head, *rest = condition
    if head == "has":
        get = _getter(rest[0])
        return lambda params: given(get(params))
    if head == "not":
        inner = _condition(rest[0], defaults)
        return lambda params: not inner(params)
    if head in ("and", "or"):
        tests = [_condition(part, defaults) for part in rest]
        join = all if head == "and" else any
        return lambda params: join(test(params) for test in tests)
    if head == "match":
        return _match(rest[0], rest[1], defaults)
    left = _operand(rest[0], defaults)
    if head == "in":
        return _compared(left, lambda params: rest[1], operator.contains, defaults, swapped=True)
    return _compared(left, _operand_on_the_right(rest[1], defaults), OPERATORS[head], defaults)


def _compared(
    left: Operand,
    right: Operand,
    compare: Callable[[Any, Any], bool],
    defaults: Mapping[str, Any] | None,
    *,
    swapped: bool = False,
) -> Test:
    cannot_tell = defaults is None

    def test(params: Params) -> bool:
        a, b = left(params), right(params)
        if a is None or b is None:
            return cannot_tell
        try:
            return bool(compare(b, a) if swapped else compare(a, b))
        except TypeError:  # a value of the wrong type, which has its own finding
            return cannot_tell

    return test


def _match(path: str, pattern: str, defaults: Mapping[str, Any] | None) -> Test:
    value = _value(path, defaults)
    expression = re.compile(pattern)

    def test(params: Params) -> bool:
        text = value(params)
        return expression.search(text) is not None if isinstance(text, str) else defaults is None

    return test


# ---- operands


def _operand_on_the_right(right: Any, defaults: Mapping[str, Any] | None) -> Operand:
    return _operand(right, defaults) if isinstance(right, list) else (lambda params: right)


def _operand(left: Any, defaults: Mapping[str, Any] | None) -> Operand:
    if isinstance(left, str):
        return _value(left, defaults)
    if not isinstance(left, list):
        return lambda params: left
    head, *rest = left
    if head == "value":
        return _value(rest[0], defaults)
    if head == "sum":
        return _sum(rest[0])
    if head in ("+", "-"):
        return _arithmetic(head, _operand(rest[0], defaults), _operand(rest[1], defaults))
    measure = {"count": _count, "length": _length, "bytes": _text_size}[head]
    getters = [_getter(path) for path in rest]
    return lambda params: sum(measure(get(params)) for get in getters)


def _value(path: str, defaults: Mapping[str, Any] | None) -> Operand:
    get = _getter(path)
    default = None if defaults is None else defaults.get(path)

    def value(params: Params) -> Any:
        found = get(params)
        return default if found is None else found

    return value


def _getter(path: str) -> Operand:
    outer, _, inner = path.partition(".")
    if not inner:
        return lambda params: params.get(outer)
    get_inner = _getter(inner)

    def get(params: Params) -> Any:
        value = params.get(outer)
        return get_inner(value) if isinstance(value, Mapping) else None

    return get


def _count(value: object) -> int:
    if isinstance(value, (list, tuple)):
        return len(value)
    return 1 if given(value) else 0


def _length(value: object) -> int:
    return len(value) if isinstance(value, str) else 0


def _text_size(value: object) -> int:
    if isinstance(value, (list, tuple)):
        return sum(_length(item) for item in value)
    return _length(value)


def _arithmetic(head: str, a: Operand, b: Operand) -> Operand:
    def value(params: Params) -> float | None:
        left, right = _as_number(a(params)), _as_number(b(params))
        if left is None or right is None:
            return None
        return left + right if head == "+" else left - right

    return value


def _sum(path: str) -> Operand:
    outer, _, name = path.partition("[].")
    get = _getter(outer)

    def value(params: Params) -> float | None:
        items = get(params)
        if not isinstance(items, (list, tuple)):
            return None
        numbers = [_as_number(item.get(name)) if isinstance(item, Mapping) else None for item in items]
        return None if None in numbers else sum(number for number in numbers if number is not None)

    return value


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
