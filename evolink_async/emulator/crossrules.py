"""Rules over several parameters. Pure.

The data file names a model's rules by a sentence; this table says what each sentence means: as a check, and as the
JSON Schema of the bodies that keep it. A handful is not checked, because the service would have to open the media or
because the sentence describes no refusal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .answers import Json, Refusal, invalid

Params = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Condition:
    """What holds of some requests' parameters. ``schema`` is None where JSON Schema can't say it."""

    holds: Callable[[Params], bool]
    schema: Json | None


@dataclass(frozen=True, slots=True)
class Rule:
    """What every request must keep.

    Bodies that keep it fit all ``schemas``. The reverse is true as well, except that for the parameters in ``unsaid``
    the check refuses more than the schemas can say.
    """

    check: Callable[[Params], Refusal | None]
    schemas: tuple[Json, ...] = ()
    unsaid: tuple[str, ...] = ()


def check_rules(sentences: Iterable[str], params: Params) -> Refusal | None:
    """The first rule that is broken."""
    for sentence in sentences:
        rule = RULES.get(sentence)
        refusal = None if rule is None else rule.check(params)
        if refusal is not None:
            return refusal
    return None


# --- parameters ------------------------------------------------------------------------------------------------

_EMPTY: Json = {"enum": [None, "", []]}  # as good as not sent


def _at(params: Params, name: str) -> Any:
    """The value of a parameter; ``a.b`` looks into the object ``a``."""
    value: Any = params
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _count(params: Params, *names: str) -> int:
    """How many items these parameters hold together; a single value counts one."""
    values = [_at(params, name) for name in names]
    return sum(len(value) if isinstance(value, list) else value not in (None, "") for value in values)


def _having(name: str, schema: Json) -> Json:
    """Bodies that have this parameter, with a value of this schema."""
    first, _, rest = name.partition(".")
    inner = {"type": "object", **_having(rest, schema)} if rest else schema
    return {"required": [first], "properties": {first: inner}}


def _if_there(name: str, schema: Json) -> Json:
    """Bodies that don't have this parameter, or have it with a value of this schema."""
    first, _, rest = name.partition(".")
    return {"properties": {first: _if_there(rest, schema) if rest else schema}}


# --- conditions ------------------------------------------------------------------------------------------------

_ALWAYS = Condition(lambda _: True, {})


def _sent(name: str) -> Condition:
    return Condition(lambda params: _count(params, name) > 0, _having(name, {"not": _EMPTY}))


def _is(name: str, value: object) -> Condition:
    return Condition(lambda params: _at(params, name) == value, _having(name, {"const": value}))


def _more_than(limit: int, *names: str) -> Condition:
    schema = _having(names[0], {"type": "array", "minItems": limit + 1}) if len(names) == 1 else None
    return Condition(lambda params: _count(params, *names) > limit, schema)


def _above(limit: float, name: str) -> Condition:
    return Condition(
        lambda params: (_at(params, name) or 0) > limit, _having(name, {"type": "number", "exclusiveMinimum": limit})
    )


def _both(one: Condition, other: Condition) -> Condition:
    said = None not in (one.schema, other.schema)
    schema: Json | None = {"allOf": [one.schema, other.schema]} if said else None
    return Condition(lambda params: one.holds(params) and other.holds(params), schema)


def _not(condition: Condition) -> Condition:
    schema: Json | None = None if condition.schema is None else {"not": condition.schema}
    return Condition(lambda params: not condition.holds(params), schema)


# --- rules -----------------------------------------------------------------------------------------------------


def _rule(param: str, message: str, broken: Callable[[Params], bool], schema: Json | None) -> Rule:
    return Rule(
        lambda params: invalid(message, param) if broken(params) else None,
        () if schema is None else (schema,),
        (param,) if schema is None else (),
    )


def _where(when: Condition, schema: Json) -> Json | None:
    """The schema, of those bodies alone for which the condition holds.

    Also where that is all: generators of clients take a bare schema for properties of its own.
    """
    return None if when.schema is None else {"if": when.schema, "then": schema}


def _refuse(param: str, message: str, when: Condition) -> Rule:
    return _rule(param, message, when.holds, _not(when).schema)


def _forbid(*names: str, when: Condition = _ALWAYS) -> Rule:
    def forbid(name: str) -> Rule:
        broken = _both(when, _sent(name)).holds
        return _rule(name, f"{name} is not accepted here.", broken, _where(when, _if_there(name, _EMPTY)))

    return _all_of(*map(forbid, names))


def _need(*names: str, when: Condition = _ALWAYS) -> Rule:
    def need(name: str) -> Rule:
        broken, there = _both(when, _not(_sent(name))).holds, _having(name, {"not": _EMPTY})
        return _rule(name, f"{name} is required here.", broken, _where(when, there))

    return _all_of(*map(need, names))


def _need_any(*names: str) -> Rule:
    message = f"at least one of {', '.join(names)} is required."
    schema = {"anyOf": [_having(name, {"not": _EMPTY}) for name in names]}
    return _rule(names[0], message, lambda params: not _count(params, *names), schema)


def _only(name: str, *values: object, when: Condition = _ALWAYS) -> Rule:
    """The parameter, if it is sent, has one of these values."""
    message = f"{name} must be {' or '.join(map(str, values))} here."
    allowed = (*values, None)
    schema = _where(when, _if_there(name, {"enum": list(allowed)}))
    return _rule(name, message, lambda params: when.holds(params) and _at(params, name) not in allowed, schema)


def _at_most(limit: int, *names: str, when: Condition = _ALWAYS) -> Rule:
    schema = _where(when, _if_there(names[0], {"maxItems": limit})) if len(names) == 1 else None
    message = f"{' + '.join(names)}: at most {limit}."
    return _rule(names[0], message, _both(when, _more_than(limit, *names)).holds, schema)


def _exactly(number: int, name: str, when: Condition = _ALWAYS) -> Rule:
    message = f"{name} must hold exactly {number}."
    schema = _where(when, _having(name, {"type": "array", "minItems": number, "maxItems": number}))
    return _rule(name, message, lambda params: when.holds(params) and _count(params, name) != number, schema)


def _all_of(*rules: Rule) -> Rule:
    return Rule(
        lambda params: next((refusal for rule in rules if (refusal := rule.check(params)) is not None), None),
        tuple(schema for rule in rules for schema in rule.schemas),
        tuple(name for rule in rules for name in rule.unsaid),
    )


def _shots_fill_the_duration(params: Params) -> Refusal | None:
    shots = _at(params, "model_params.multi_prompt")
    if not shots:
        return None
    try:
        total = sum(float(shot["duration"]) for shot in shots)
    except ValueError:
        return invalid("every shot needs a duration in seconds.", "model_params.multi_prompt")
    if total != params.get("duration", 5):
        return invalid("the durations of the shots must sum up to duration.", "model_params.multi_prompt")
    return None


def _vocal_window(params: Params) -> Refusal | None:
    start, end = _at(params, "model_params.vocal_start"), _at(params, "model_params.vocal_end")
    if start is not None and end is not None and not start + 10 <= end <= start + 30:
        return invalid("the vocal window must be 10 to 30 seconds long.", "model_params.vocal_end")
    return None


_FLAGS = ("--v", "--version", "--niji", "--fast", "--draft", "--turbo")
_FLAG_PATTERN = f"(^|[ \\t\\r\\n])({'|'.join(_FLAGS)})([ \\t\\r\\n]|$)"


def _prompt_without_flags(params: Params) -> Refusal | None:
    found = re.search(_FLAG_PATTERN, str(params.get("prompt", "")))
    return invalid(f"{found[2]} is not accepted in the prompt.", "prompt") if found else None


_ALL_MEDIA = ("image_start", "image_end", "image_urls", "video_urls", "audio_urls")
_TRANSPARENT = _is("background", "transparent")
_ELEMENTS = "model_params.element_list"
_O3_IMAGES = ("image_start", "image_end", "image_urls")
_CUSTOM = _is("custom_mode", True)
_REFERENCE = _is("generation_type", "REFERENCE")
_SUNG = _not(_is("instrumental", True))

RULES: dict[str, Rule] = {
    # never together
    "exclusive: audio_references with image_urls": _forbid("audio_references", when=_sent("image_urls")),
    "exclusive: content_filter=false with model_params.web_search=true -> 400": _only(
        "content_filter", True, when=_is("model_params.web_search", True)
    ),
    "exclusive: model_params.file_url with model_params.link_url": _forbid(
        "model_params.link_url", when=_sent("model_params.file_url")
    ),
    "exclusive: quality=hd with model_params.speed=draft": _refuse(
        "quality", "quality hd cannot be drafted.", _both(_is("quality", "hd"), _is("model_params.speed", "draft"))
    ),
    # not here
    "forbid in prompt: --v, --version, --niji, --fast, --draft, --turbo": Rule(
        _prompt_without_flags, (_if_there("prompt", {"not": {"type": "string", "pattern": _FLAG_PATTERN}}),)
    ),
    "forbid: any media input": _forbid(*_ALL_MEDIA),
    "forbid: background=transparent": _refuse("background", "background cannot be transparent here.", _TRANSPARENT),
    "forbid: duration -> parameter error": _forbid("duration"),
    "forbid: element_voice_id with image_refer": _forbid(
        "model_params.element_voice_id", when=_is("model_params.reference_type", "image_refer")
    ),
    "forbid: image_end when total images >2": _forbid("image_end", when=_more_than(2, *_O3_IMAGES)),
    "forbid: image_start, image_end, image_urls, video_urls, audio_urls": _forbid(*_ALL_MEDIA),
    "forbid: image_urls, video_urls, audio_urls": _forbid("image_urls", "video_urls", "audio_urls"),
    "forbid: mask_url when image_urls has more than 1 item": _forbid("mask_url", when=_more_than(1, "image_urls")),
    "forbid: model_params": _refuse(
        "model_params",
        "model_params is not accepted.",
        Condition(lambda params: "model_params" in params, _having("model_params", {"not": {"type": "null"}})),
    ),
    "forbid: prompt_priority=fast -> 400": _only("prompt_priority", "standard"),
    "forbid: quality=1080p with 2+ images": _refuse(
        "quality", "quality 1080p takes one image at most.", _both(_is("quality", "1080p"), _more_than(1, "image_urls"))
    ),
    "forbid: video_urls, audio_urls": _forbid("video_urls", "audio_urls"),
    "forbid: video_urls, audio_urls, image_urls": _forbid("video_urls", "audio_urls", "image_urls"),
    # how many
    "limit: elements <=3 with first frame; images+elements <=7": _all_of(
        _at_most(3, _ELEMENTS, when=_sent("image_start")), _at_most(7, _ELEMENTS, *_O3_IMAGES)
    ),
    "limit: image_urls <=3 else error": _at_most(3, "image_urls"),
    "limit: image_urls exactly 1": _exactly(1, "image_urls"),
    "limit: image_urls+video_urls <=5": _at_most(5, "image_urls", "video_urls"),
    "limit: images+elements <=4": _at_most(4, "image_urls", _ELEMENTS),
    "limit: images+elements <=4 with a video": _at_most(4, "image_urls", _ELEMENTS, when=_sent("video_urls")),
    "limit: sum of shot durations = duration": Rule(_shots_fill_the_duration, unsaid=("model_params.multi_prompt",)),
    # this only with that
    "limit_if: background=transparent -> exactly 1 input image; output_format=jpeg rejected": (
        _all_of(_exactly(1, "image_urls", when=_TRANSPARENT), _only("output_format", "png", when=_TRANSPARENT))
    ),
    "limit_if: background=transparent -> output_format in png,webp": _only(
        "output_format", "png", "webp", when=_TRANSPARENT
    ),
    "limit_if: draft=true -> quality must be 480p or absent (becomes 480p), else 400": _only(
        "quality", "480p", when=_is("draft", True)
    ),
    "limit_if: element_list -> character_orientation=video": _only(
        "model_params.character_orientation", "video", when=_sent(_ELEMENTS)
    ),
    "limit_if: generation_type=REFERENCE -> duration 8, aspect_ratio 16:9": (
        _all_of(_only("duration", 8, when=_REFERENCE), _only("aspect_ratio", "16:9", when=_REFERENCE))
    ),
    "limit_if: quality=1080p -> duration 6": _only("duration", 6, when=_is("quality", "1080p")),
    "limit_if: quality=480p -> aspect_ratio in 16:9,9:16,1:1": _only(
        "aspect_ratio", "16:9", "9:16", "1:1", when=_is("quality", "480p")
    ),
    "limit_if: quality=512p -> exactly 1 image": _exactly(1, "image_urls", when=_is("quality", "512p")),
    "limit_if: size set -> n must be 1": _only("n", 1, when=_sent("size")),
    "limit_if: video_urls -> duration <=10": _refuse(
        "duration", "duration must be at most 10 with a video.", _both(_sent("video_urls"), _above(10, "duration"))
    ),
    # needed
    "require_any: image_start, image_end": _need_any("image_start", "image_end"),
    "require_any: image_urls, video_urls": _need_any("image_urls", "video_urls"),
    "require_any: image_urls, video_urls (audio alone is rejected)": _need_any("image_urls", "video_urls"),
    "require_any: image_urls, video_urls, audio_urls": _need_any("image_urls", "video_urls", "audio_urls"),
    "require_if: custom_mode=false -> prompt": _need("prompt", when=_not(_CUSTOM)),
    "require_if: custom_mode=true -> style, title": _need("style", "title", when=_CUSTOM),
    "require_if: custom_mode=true and instrumental=false -> prompt (lyrics)": _need(
        "prompt", when=_both(_CUSTOM, _SUNG)
    ),
    "require_if: first_frame -> image_start; forbid image_end, video_urls": _all_of(
        _need("image_start", when=_is("generation_mode", "first_frame")),
        _forbid("image_end", "video_urls", when=_is("generation_mode", "first_frame")),
    ),
    "require_if: first_last_frame -> image_start and image_end; forbid video_urls": _all_of(
        _need("image_start", "image_end", when=_is("generation_mode", "first_last_frame")),
        _forbid("video_urls", when=_is("generation_mode", "first_last_frame")),
    ),
    "require_if: video_continuation -> video_urls; forbid image_start, audio_urls; duration >= input length": _all_of(
        _need("video_urls", when=_is("generation_mode", "video_continuation")),
        _forbid("image_start", "audio_urls", when=_is("generation_mode", "video_continuation")),
    ),
    "require_if: image_end -> image_start": _need("image_start", when=_sent("image_end")),
    "require_if: mask_url -> image_urls (mask alone is ignored)": _need("image_urls", when=_sent("mask_url")),
    "require_if: multi_shot=true -> shot_type": _need(
        "model_params.shot_type", when=_is("model_params.multi_shot", True)
    ),
    "require_if: no image_urls -> prompt": _need("prompt", when=_not(_sent("image_urls"))),
    "require_if: reference_type=image_refer -> element_image_list": _need(
        "model_params.element_image_list", when=_is("model_params.reference_type", "image_refer")
    ),
    "require_if: reference_type=video_refer -> element_video_list": _need(
        "model_params.element_video_list", when=_is("model_params.reference_type", "video_refer")
    ),
    "require_if: shot_type=customize -> multi_prompt (prompt ignored)": _need(
        "model_params.multi_prompt", when=_is("model_params.shot_type", "customize")
    ),
    "require_if: vocal_start <-> vocal_end together; window 10..30 s": _all_of(
        _need("model_params.vocal_end", when=_sent("model_params.vocal_start")),
        _need("model_params.vocal_start", when=_sent("model_params.vocal_end")),
        Rule(_vocal_window, unsaid=("model_params.vocal_end",)),
    ),
}

UNCHECKED = {
    "forbid: pixel sizes": "the list of sizes already holds no pixel size",
    "limit: one persona per result_id": "about earlier tasks; the service says so when the task runs",
    "limit: reference video seconds + output seconds <=30": "the length of the caller's video is not known",
    "require_any: image_urls, video_urls (whether audio alone is accepted is not verified)": ("not verified"),
    "require_if: model_params.shot_type -> prompt_extend true to take effect": "without effect, not refused",
}
