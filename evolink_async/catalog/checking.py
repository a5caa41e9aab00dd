"""A request against the catalogue: every finding, nothing raised, nothing sent."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache

from .findings import Finding, Severity, shown, shown_key, unknown_parameter
from .loading import all_models, catalogue, get_model, nearest
from .model import Kind, Model, ParamSpec
from .names import family
from .rules import CompiledRule, compile_rules, given
from .urls import callback_remark
from .values import ValueCheck, has_non_finite, is_local_file

_KINDS = ("image", "video", "audio")
_NOT_JSON = "NaN and infinity are not numbers JSON can carry"


def check(kind: str, model: str, params: Mapping[str, object], *, allow_private_hosts: bool = False) -> list[Finding]:
    """What is wrong with a request, errors first, always in the same order; [] where nothing is. Since 0.1.0.

    `kind` is "image", "video" or "audio"; `params` are the fields of the JSON body without `model`. Facts are
    those of the public documents; where they disagree the union is accepted, and what only the service can
    know is left to it. A parameter whose own value is refused isn't reported again by the rules that involve
    it. `allow_private_hosts` lifts the rules about https and public hosts, for a local emulator. Never
    raises, whatever `params` holds.
    """
    known = get_model(model)
    if known is None:
        findings = _check_unknown_model(kind, model, params, allow_private_hosts)
    elif kind != known.kind:
        findings = [_wrong_kind(kind, known)]
    else:
        findings = _check_known_model(known, params, allow_private_hosts)
    if len(findings) > 1:
        findings.sort(key=lambda f: (f.severity != "error", f.param or "", f.message))
    return findings


@cache
def _rules_of(id: str) -> tuple[CompiledRule, ...]:
    model = get_model(id)
    return () if model is None else compile_rules(model, catalogue().media)


@cache
def _required_of(id: str) -> tuple[tuple[str, ParamSpec], ...]:
    model = get_model(id)
    return () if model is None else tuple((name, spec) for name, spec in model.params.items() if spec.required)


def _check_known_model(model: Model, params: Mapping[str, object], allow_private_hosts: bool) -> list[Finding]:
    findings: list[Finding] = []
    values = ValueCheck(model, allow_private_hosts, findings)
    specs = model.params
    for name, value in params.items():
        spec = specs.get(name)
        if spec is not None:
            values.value(spec, name, value)
        else:
            _check_undocumented(model, values, name, value, findings)
    for name, spec in _required_of(model.id):
        if name not in params and not any(alias in params for alias in spec.aliases):
            findings.append(Finding("error", name, f"required by {model.id}, and not given"))
    for rule in _rules_of(model.id):
        for path in rule.violations(params):
            _blame(path, rule, findings)
    return findings


def _blame(path: str, rule: CompiledRule, findings: list[Finding]) -> None:
    if any(f.param == path and f.severity == "error" for f in findings):
        return
    if rule.severity == "error":
        # a refused parameter needs no did-you-mean besides
        findings[:] = [f for f in findings if f.param != path]
    findings.append(Finding(rule.severity, path, rule.text))


def _check_undocumented(model: Model, values: ValueCheck, name: object, value: object, findings: list[Finding]) -> None:
    if not isinstance(name, str):
        findings.append(Finding("error", None, f"parameter names are texts, not {shown(name)}"))
        return
    if has_non_finite(value):
        findings.append(Finding("error", shown_key(name), _NOT_JSON))
    original = _aliased(model, name)
    if original is not None:
        _check_alias(original, values, name, value)
    elif name in catalogue().media and given(value):
        severity: Severity = "error" if model.documented else "warning"
        findings.append(Finding(severity, name, _media_not_taken(model.id, name)))
    else:
        findings.append(unknown_parameter(model, "", name))


def _aliased(model: Model, name: str) -> ParamSpec | None:
    return next((spec for spec in model.params.values() if name in spec.aliases), None)


def _check_alias(spec: ParamSpec, values: ValueCheck, name: str, value: object) -> None:
    # the page names the alias but not its shape, so a single link is as good as a list
    items = spec.items
    is_single = isinstance(value, str) or is_local_file(value)
    values.value(items if items is not None and is_single else spec, name, value)


# ---- models that aren't in the catalogue


def _check_unknown_model(
    kind: str, model: str, params: Mapping[str, object], allow_private_hosts: bool
) -> list[Finding]:
    refusal = catalogue().wrong_names.get(model)
    if refusal is not None:
        return [Finding("error", "model", f"no model {model!r}; {refusal}")]
    findings: list[Finding] = []
    if kind not in _KINDS:
        findings.append(Finding("error", None, f"no kind {shown(kind)}; there are image, video and audio"))
    findings.append(Finding("warning", "model", _unknown_model(model[:100])))
    for name, value in params.items():
        if has_non_finite(value):
            findings.append(Finding("error", shown_key(name), _NOT_JSON))
    callback = params.get("callback_url")  # the one parameter that every generation page documents
    if isinstance(callback, str):
        remark = callback_remark(callback, allow_private_hosts=allow_private_hosts)
        if remark is not None:
            findings.append(Finding(remark[0], "callback_url", remark[1]))
    return findings


@lru_cache(maxsize=512)
def _unknown_model(model: str) -> str:
    guesses = nearest(model)
    if not guesses:
        return f"no model {model!r} in the catalogue; sent as it is, unchecked"
    return f"no model {model!r} in the catalogue; did you mean {_either(guesses)}? Sent as it is, unchecked"


def _wrong_kind(kind: str, model: Model) -> Finding:
    where = f"use client.{model.kind}s, {model.kind.capitalize()}Request or the kind {model.kind!r}"
    return Finding("error", "model", f"{model.id!r} makes {_a(model.kind)}, not {shown(kind)}; {where}")


@lru_cache(maxsize=1024)
def _media_not_taken(id: str, field: str) -> str:
    text = f"not taken by {id!r}"
    model = get_model(id)
    if model is None:
        return text
    own = _own(model, field)
    if own:
        return f"{text}; it takes {_either(own)}"
    siblings = _siblings_taking(model, field)
    return f"{text}; use {siblings}" if siblings else text


def _siblings_taking(model: Model, field: str) -> str:
    """The models of the family that take the field, then those that take its medium under another name."""
    relatives = [m for m in all_models() if m is not model and m.kind == model.kind and not m.legacy]
    relatives = [m for m in relatives if family(m.id) == family(model.id)]
    exact = [repr(m.id) for m in relatives if field in m.params]
    other = [f"{m.id!r} with {own[0]!r}" for m in relatives if field not in m.params and (own := _own(m, field))]
    return " or ".join(exact + other)


def _own(model: Model, field: str) -> list[str]:
    """The model's parameters for the field's medium."""
    media = catalogue().media
    return [name for name in model.params if name in media and _medium(name) == _medium(field)]


def _medium(field: str) -> str:
    for medium in ("video", "audio"):
        if medium in field:
            return medium
    return "image"  # image_urls, image_start, mask_url, ...


def _either(names: list[str] | tuple[str, ...]) -> str:
    return " or ".join(repr(name) for name in names)


def _a(kind: Kind) -> str:
    return {"image": "images", "video": "videos", "audio": "audio"}[kind]
