"""The body of a submission as JSON Schema, one schema for each model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolink_async.emulator.answers import Json
from evolink_async.emulator.behaviour import Dialect
from evolink_async.emulator.crossrules import RULES
from evolink_async.emulator.models import Model, all_models, media_fields
from evolink_async.emulator.rules import CALLBACK_LENGTH, LINK, NOT_BLANK, PIXELS, SAFE_LINK, UUID, item_spec

from .examples import example_body

Spec = Mapping[str, Any]


def body_schemas(kind: str, dialect: Dialect) -> dict[str, Json]:
    """The schema of the body that a model takes, by the schema's name; and their union, ``ImageRequest``."""
    if dialect.validation == "lenient":
        return {f"{kind.title()}Request": _ANYTHING}
    schemas = {schema_name(model): body_schema(model) for model in all_models() if model.kind == kind}
    references = {name: f"#/components/schemas/{name}" for name in schemas}
    mapping = {
        model_id: references[name] for name in schemas for model_id in schemas[name]["properties"]["model"]["enum"]
    }
    union = {
        "oneOf": [{"$ref": reference} for reference in references.values()],
        "discriminator": {"propertyName": "model", "mapping": mapping},
    }
    return {f"{kind.title()}Request": union, **schemas}


def schema_name(model: Model) -> str:
    """``gpt-image-2.5-flare`` is ``GptImage2_5FlareRequest``."""
    words = model.id.replace(".", "_").split("-")
    return "".join(word[:1].upper() + word[1:] for word in words) + "Request"


def body_schema(model: Model) -> Json:
    """What this model accepts. A null is a parameter that was not sent, and unknown parameters are ignored."""
    rules = [RULES[sentence] for sentence in model.rules if sentence in RULES]
    conditions = [schema for rule in rules for schema in rule.schemas]
    foreign = sorted(media_fields() - set(model.params))
    return {
        "title": model.id,
        "description": _description(model),
        "type": "object",
        "required": ["model", *(name for name, spec in model.params.items() if spec.get("required"))],
        "properties": {
            "model": {"type": "string", "enum": [model.id, *model.aliases]},
            **{name: parameter_schema(spec) for name, spec in model.params.items()},
            "callback_url": {"$ref": "#/components/schemas/CallbackUrl"},
        },
        "propertyNames": {"not": {"enum": foreign}},
        **({"allOf": conditions} if conditions else {}),
        "examples": [example_body(model)],
        "x-refused-beyond-schema": refused_beyond_schema(model),
    }


def refused_beyond_schema(model: Model) -> list[str]:
    """The parameters of which the service refuses more than JSON Schema can say."""
    by_rules = {name for sentence in model.rules if sentence in RULES for name in RULES[sentence].unsaid}
    by_pixels = {name for name, spec in model.params.items() if "pixels" in spec}
    return sorted(by_rules | by_pixels | {"callback_url"})


def _description(model: Model) -> str:
    lines = [f"Billed {model.billing_rule}; takes about {model.estimate:g} s."]
    if model.aliases:
        lines.append(f"Also called {', '.join(model.aliases)}.")
    enforced = [sentence for sentence in model.rules if sentence in RULES]
    if enforced:
        lines += ["", "Rules over several parameters:", "", *(f"- {sentence}" for sentence in enforced)]
    ignored = [sentence for sentence in model.rules if sentence not in RULES]
    if ignored:
        lines += ["", "Documented, but not checked here:", "", *(f"- {sentence}" for sentence in ignored)]
    return "\n".join(lines)


_ANYTHING: Json = {
    "description": "Any model with any parameters: nothing but the callback is checked here.",
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string", "minLength": 1},
        "callback_url": {"$ref": "#/components/schemas/CallbackUrl"},
    },
    "x-refused-beyond-schema": ["callback_url"],
}


def callback_url(*, private: bool) -> Json:
    """The address that a finished task is sent to."""
    address = "http or https, also to this machine" if private else "https, and no private address (documented)"
    return {
        "description": f"Where the finished task is POSTed to: {address}.",
        "type": ["string", "null"],
        "pattern": f"^{LINK if private else SAFE_LINK}",
        "maxLength": CALLBACK_LENGTH,
    }


def parameter_schema(spec: Spec) -> Json:
    """A parameter, null allowed where it need not be sent."""
    schema = _value_schema(spec)
    if not spec.get("required"):
        schema = _or_null(schema)
    return {**schema, "default": spec["default"]} if "default" in spec else schema


def _or_null(schema: Json) -> Json:
    if "type" not in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    values = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, "type": [*types, "null"], **values}


_KEYWORDS = {
    "min": "minimum",
    "max": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "min_items": "minItems",
    "max_items": "maxItems",
}


def _value_schema(spec: Spec) -> Json:
    types = spec["type"].split("|")
    schema: Json = {"type": types[0] if len(types) == 1 else types}
    schema.update((keyword, spec[name]) for name, keyword in _KEYWORDS.items() if name in spec)
    if "string" in types:
        schema.update(_text_schema(spec))
    elif "enum" in spec:
        schema["enum"] = list(spec["enum"])
    if "items" in spec:
        schema["items"] = _value_schema(item_spec(spec))
    if "properties" in spec:
        inner = spec["properties"]
        needed = [name for name, value in inner.items() if value.get("required")]
        schema.update({"required": needed} if needed else {})
        schema["properties"] = {name: parameter_schema(value) for name, value in inner.items()}
    return {"anyOf": [schema, {"enum": list(spec["also"])}]} if "also" in spec else schema


def _text_schema(spec: Spec) -> Json:
    if "pixels" in spec or "ratios" in spec:
        return _size_schema(spec)
    if "enum" in spec:
        return {"pattern": _in_any_case(spec["enum"])} if spec.get("any_case") else {"enum": list(spec["enum"])}
    if "pattern" in spec:
        return {"pattern": f"^{spec['pattern']}$"}
    if spec.get("format") == "uri":
        return {"pattern": f"^{LINK}"}  # no format: links with other letters than ASCII's do work
    if spec.get("format") == "uuid":
        return {"format": "uuid", "pattern": f"^{UUID}$"}
    return {"pattern": NOT_BLANK} if spec.get("required") else {}


def _in_any_case(words: list[str]) -> str:
    def letters(word: str) -> str:
        return "".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in word)

    return f"^({'|'.join(letters(word) for word in words)})$"


def _size_schema(spec: Spec) -> Json:
    ratios, pixels = list(spec.get("ratios", ())), spec.get("pixels")
    if pixels is None:
        return {"enum": ratios}
    limits = ["Pixels as WxH (the multiplication sign × is as good)"]
    if "edge" in pixels:
        limits.append("each edge {} to {} pixels".format(*pixels["edge"]))
    if "area" in pixels:
        limits.append("{} to {} pixels in all".format(*pixels["area"]))
    if "ratio" in pixels:
        limits.append(f"the long edge at most {pixels['ratio']} times the short one")
    if "multiple" in pixels:
        limits.append(f"both edges multiples of {pixels['multiple']}")
    description, pattern = f"{', '.join(limits)}.", f"^{PIXELS}$"
    if not ratios:
        return {"description": description, "pattern": pattern}
    return {"description": f"A ratio of the list. {description}", "anyOf": [{"enum": ratios}, {"pattern": pattern}]}
