"""What check() says about a request: pitfalls, values, media, callbacks, what is unknown or in doubt."""

from __future__ import annotations

import io
import math
import timeit
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from evolink_async import ImageRequest
from evolink_async.catalog import Finding, Model, ParamSpec, all_models, check, get_model, kind_of
from evolink_async.requests import local_files

URL = "https://example.com/a.png"
T2V = "seedance-2.0-text-to-video"
I2V = "seedance-2.0-image-to-video"
R2V = "seedance-2.0-reference-to-video"


def run(model: str, **params: Any) -> list[Finding]:
    return check(str(kind_of(model)), model, {"prompt": "x", **params})


def errors(model: str, **params: Any) -> list[str]:
    return [str(finding) for finding in run(model, **params) if finding.severity == "error"]


def warnings(model: str, **params: Any) -> list[str]:
    assert errors(model, **params) == []
    return [str(finding) for finding in run(model, **params)]


# ---- the four pitfalls of Seedance 2.0


def test_plain_seedance_is_no_model() -> None:
    (finding,) = check("video", "seedance-2.0", {"prompt": "x"})
    assert finding.severity == "error"
    assert finding.message.startswith("no model 'seedance-2.0'; from text use 'seedance-2.0-text-to-video'")


def test_an_image_on_text_to_video_names_the_models_to_use() -> None:
    (text,) = errors(T2V, image_urls=[URL])
    assert text == f"image_urls: not taken by '{T2V}'; use '{I2V}' or '{R2V}'"


def test_an_unsupported_quality_names_the_supported_ones() -> None:
    (text,) = errors(T2V, quality="2160p")
    assert text == f"quality: '2160p' is not accepted by {T2V}; allowed: 480p, 720p, 1080p, 4k"
    assert errors("seedance-2.0-fast-text-to-video", quality="1080p")


def test_too_many_inputs_are_counted() -> None:
    assert errors(R2V, image_urls=[URL] * 12) == ["image_urls: 12 items given, at most 9"]
    assert errors(I2V, image_urls=[]) == ["image_urls: 0 items given, at least 1"]
    assert errors(R2V, image_urls=[URL] * 9) == []


def test_a_too_large_inline_image_is_measured() -> None:
    inline = "data:image/png;base64," + "A" * (31 * 2**20 * 4 // 3)
    (text,) = errors(I2V, image_urls=[inline])
    assert text == "image_urls: [0]: an inline file of 31.0 MB given, at most 30 MB"


def test_a_too_large_body_is_refused() -> None:
    inline = "data:image/png;base64," + "A" * (24 * 2**20)
    (text,) = errors(R2V, image_urls=[inline] * 3)
    assert "64 MB" in text


# ---- kinds


def test_a_model_of_another_kind_is_refused_naming_the_right_one() -> None:
    (finding,) = check("image", T2V, {"prompt": "x"})
    assert (finding.severity, finding.param) == ("error", "model")
    assert "makes videos" in finding.message
    assert "client.videos" in finding.message
    assert "the kind 'video'" in finding.message, "on the command line there is no client"


def test_a_kind_that_does_not_exist_is_refused_for_any_model() -> None:
    assert [f.severity for f in check("text", "who-knows", {})] == ["error", "warning"]
    assert [f.severity for f in check("text", T2V, {"prompt": "x"})] == ["error"]


# ---- values


@pytest.mark.parametrize(
    ("model", "param", "value", "says"),
    [
        ("gpt-4o-image", "n", True, "True is not a whole number; allowed: 1, 2, 4"),
        ("gpt-4o-image", "n", 3, "3 is not accepted by gpt-4o-image; allowed: 1, 2, 4"),
        ("gpt-4o-image", "n", 1.0, "1.0 is not a whole number"),
        (T2V, "duration", "5", "'5' is not a whole number; allowed: 4 to 15"),
        (T2V, "duration", 16, "16 is not accepted by seedance-2.0-text-to-video; allowed: 4 to 15"),
        (T2V, "duration", math.nan, "nan is not a whole number"),
        (T2V, "generate_audio", "true", "'true' is not true or false"),
        (T2V, "generate_audio", 1, "1 is not true or false"),
        (T2V, "model_params", [], "a list of 0 is not an object"),
        ("wan2.7-text-to-video", "duration", math.inf, "inf is not a number JSON can carry"),
        ("wan2.7-text-to-video", "duration", math.nan, "nan is not a number JSON can carry"),
        ("suno-v5", "style_weight", 1.5, "1.5 is not accepted by suno-v5-beta; allowed: 0 to 1"),
        (I2V, "image_urls", URL, f"'{URL}' is not a list; give ['{URL}']"),
        (I2V, "image_urls", [URL, 7], "[1]: 7 is not text"),
        (I2V, "image_urls", [io.BytesIO()], "[0]: a BytesIO is not text; give a link, or a pathlib.Path or bytes"),
        ("gpt-image-1.5", "prompt", "x" * 2001, "2001 characters given, at most 2000"),
        ("gpt-image-2", "prompt", "字" * 20_001, "60003 bytes of UTF-8 given, at most 60000"),
        ("minimax-h3-text-to-video", "prompt", "", "0 characters given, at least 1"),
        ("qwen-voice-design", "preferred_name", "no spaces", "does not match [0-9A-Za-z_]+"),
        ("gpt-4o-image", "prompt", 7, "7 is not text"),
        ("gpt-4o-image", "prompt", None, "required by gpt-4o-image, but null was given"),
        ("wan2.7-video-edit", "duration", 1, "allowed: 2 to 10, 0"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_given_and_what_is_allowed(
    model: str, param: str, value: object, says: str
) -> None:
    found = [f for f in run(model, **{param: value}) if f.param == param and f.severity == "error"]
    assert len(found) == 1
    assert says in found[0].message


def test_a_missing_required_parameter_is_named() -> None:
    findings = check("video", I2V, {})
    assert [f.param for f in findings] == ["image_urls", "prompt"]
    assert "required by" in findings[0].message
    assert errors("mj-v7-upscale") == ["model_params: required by mj-v7-upscale, and not given"]
    assert errors("mj-v7-upscale", model_params={}) == [
        "model_params.task_id: required by mj-v7-upscale, and not given"
    ]


def test_inner_values_are_checked_and_named_by_their_path() -> None:
    shots = [{"index": 1, "prompt": "x" * 513, "duration": 5}]
    found = errors("kling-o3-text-to-video", model_params={"multi_prompt": shots, "multi_shot": "yes"})
    assert [text.partition(": ")[0] for text in found] == [
        "model_params.multi_prompt",
        "model_params.multi_prompt",
        "model_params.multi_shot",
    ]
    assert "[0].duration: 5 is not text" in found[0]
    assert "[0].prompt: 513 characters given, at most 512" in found[1]


def test_all_findings_are_given_errors_first_in_an_order_of_their_own() -> None:
    params = {"prompt": "x", "zzz": 1, "quality": "8k", "duration": 99, "aspect_ratio": "x", "stray": 1}
    findings = check("video", T2V, params)
    assert [f.param for f in findings] == ["aspect_ratio", "duration", "quality", "stray", "zzz"]
    assert check("video", T2V, dict(reversed(params.items()))) == findings


def test_tuples_mappings_and_text_enums_are_read_as_json_reads_them() -> None:
    class Quality(str, Enum):  # noqa: UP042 - the older way prints differently from its value
        FULL = "1080p"

    frozen: Mapping[str, Any] = MappingProxyType({"web_search": True})
    assert run(T2V, quality=Quality.FULL, model_params=frozen) == []
    assert run(R2V, image_urls=(URL, URL)) == []


def test_null_for_an_optional_parameter_is_remarked_upon_only() -> None:
    assert len(warnings(T2V, quality=None)) == 1


# ---- sizes


@pytest.mark.parametrize(
    ("model", "size", "accepted"),
    [
        ("gpt-image-2", "auto", True),
        ("gpt-image-2", "16:9", True),
        ("gpt-image-2", "1024x1024", True),
        ("gpt-image-2", "1024×1024", True),
        ("gpt-image-2", "1024X1024", True),
        ("gpt-image-2", "1000x1000", False),  # no multiple of 16
        ("gpt-image-2", "3840x1024", False),  # over 3:1
        ("gpt-image-2", "512x512", False),  # too few pixels
        ("gpt-image-2", "7:5", False),
        ("gpt-4o-image", "1024×1536", True),
        ("gpt-4o-image", "1024x1537", False),
        ("wan2.5-text-to-image", "1024x1024", True),
        ("wan2.5-text-to-image", "16:9", False),
        ("doubao-seedream-4.5", "4096x4096", True),
        ("doubao-seedream-4.5", "1024x1024", False),
        ("z-image-turbo", "0x0", False),
        ("qwen-image-3.0", "2048x2048", True),
    ],
)
def test_a_size_is_a_listed_ratio_or_pixels_that_fit(model: str, size: str, accepted: bool) -> None:
    assert (errors(model, size=size) == []) is accepted


# ---- media


@pytest.mark.parametrize(
    "value", ["a.png", "./a.png", "/tmp/a.png", "C:\\a.png", "file:///a.png", "s3://b/a.png", "https://", ""]
)
def test_what_is_no_link_is_refused(value: str) -> None:
    (text,) = errors(I2V, image_urls=[value])
    assert "client.files.upload" in text or "no host" in text


@pytest.mark.parametrize("value", [Path("a.png"), b"\x89PNG"])
def test_a_path_or_bytes_may_stand_for_a_link(value: object) -> None:
    assert errors(I2V, image_urls=[value]) == []
    (text,) = errors(I2V, image_urls=value)
    assert "put it in one" in text
    assert any("prompt" in text for text in errors(I2V, prompt=value, image_urls=[value]))


def test_every_parameter_that_wants_a_link_to_media_takes_local_files() -> None:
    def names(specs: Mapping[str, ParamSpec]) -> Iterator[str]:
        for name, spec in specs.items():
            inner = spec.items or spec
            if inner.format == "uri":
                yield name
            yield from names(inner.properties)

    found = {name for model in all_models() for name in names(model.params)}
    assert "image_urls" in found
    for name in found:
        assert local_files(ImageRequest(model="m", params={name: [b"x"]})) == {f"params.{name}[0]": b"x"}
    assert not local_files(ImageRequest(model="m", callback_url=b"x", style=b"x"))


def test_inline_files_are_taken_only_where_a_page_says_so() -> None:
    inline = "data:image/png;base64,iVBORw0KGgo="
    assert run("gemini-omni-flash-image-to-video", image_urls=[inline]) == []
    assert run("gemini-omni-flash-image-to-video", image_urls=["iVBORw0KGgo" * 10]) == []
    assert errors("gpt-4o-image", image_urls=[inline])
    assert len(warnings(I2V, image_urls=[inline])) == 1  # no page says yes or no


def test_a_media_field_of_another_name_is_refused_with_the_models_own() -> None:
    assert errors("kling-v3-image-to-video", image_start=URL, image_urls=[URL]) == [
        "image_urls: not taken by 'kling-v3-image-to-video'; it takes 'image_start' or 'image_end'"
    ]
    assert errors(I2V, image_urls=[URL], image_url=URL) == [f"image_url: not taken by '{I2V}'; it takes 'image_urls'"]


def test_a_sibling_with_another_name_for_the_medium_is_named_too() -> None:
    (text,) = errors("kling-v3-text-to-video", image_urls=[URL])
    assert "'kling-v3-image-to-video' with 'image_start'" in text


def test_an_empty_media_field_is_remarked_upon_only() -> None:
    assert len(warnings(T2V, image_urls=[])) == 1


def test_a_model_without_a_page_is_not_refused_media() -> None:
    assert len(warnings("veo3-fast", image_urls=[URL])) == 1


def test_a_link_to_a_private_host_is_remarked_upon() -> None:
    assert len(warnings(I2V, image_urls=["http://192.168.1.2/a.png"])) == 1
    assert (
        check(
            "video",
            I2V,
            {"prompt": "x", "image_urls": ["http://127.0.0.1:1/a.png"]},
            allow_private_hosts=True,
        )
        == []
    )


# ---- callback_url


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "https://localhost/hook",
        "https://127.0.0.1/hook",
        "https://127.1/hook",
        "https://2130706433/hook",
        "https://10.1.2.3/hook",
        "https://172.20.0.1/hook",
        "https://192.168.0.1:8443/hook",
        "https://169.254.169.254/hook",
        "https://[::1]/hook",
        "https://[::ffff:10.0.0.1]/hook",
        "https://printer.local/hook",
    ],
)
def test_a_callback_the_service_refuses_is_refused_but_not_for_a_local_emulator(url: str) -> None:
    for model in ("gpt-4o-image", "who-knows"):
        params = {"prompt": "x", "callback_url": url}
        assert [f.param for f in check("image", model, params) if f.severity == "error"] == ["callback_url"]
        assert not [f for f in check("image", model, params, allow_private_hosts=True) if f.severity == "error"]


@pytest.mark.parametrize(
    "url", ["ftp://example.com", "example.com/hook", "https://", "https://[", "https://e.com/" + "a" * 2048]
)
def test_a_callback_that_is_no_link_is_refused_everywhere(url: str) -> None:
    params = {"prompt": "x", "callback_url": url}
    found = check("image", "gpt-4o-image", params, allow_private_hosts=True)
    assert [(f.severity, f.param) for f in found] == [("error", "callback_url")]


@pytest.mark.parametrize(
    "url",
    ["https://example.com/hook", "https://8.8.8.8/x", "https://mylocalhost.com", "https://1a.example.com"],
)
def test_a_public_https_callback_passes(url: str) -> None:
    assert run("gpt-4o-image", callback_url=url) == []


# ---- what is not documented


@pytest.mark.parametrize(
    ("model", "param", "says"),
    [
        (T2V, "durations", "Did you mean 'duration'?"),
        (T2V, "aspectratio", "Did you mean 'aspect_ratio'?"),
        (T2V, "resolution", "Did you mean 'quality'?"),
        (T2V, "web_search", "It belongs inside model_params"),
        ("gpt-4o-image", "num_images", "Did you mean 'n'?"),
        ("gpt-4o-image", "xyzzy", "sent as it is"),
    ],
)
def test_an_unknown_parameter_passes_with_a_hint(model: str, param: str, says: str) -> None:
    (text,) = warnings(model, **{param: 1})
    assert text.startswith(f"{param}: not documented for {model}")
    assert says in text


def test_unknown_inner_parameters_are_hinted_at_too() -> None:
    (text,) = warnings(T2V, model_params={"websearch": True})
    assert text.startswith("model_params.websearch: ")
    assert "Did you mean 'web_search'?" in text
    (text,) = warnings(T2V, model_params={"duration": 5})
    assert "It belongs at the top level" in text


def test_nan_is_refused_wherever_it_hides() -> None:
    for model in (T2V, "who-knows"):
        found = check("video", model, {"prompt": "x", "stray": {"a": [1, {"b": math.nan}]}})
        assert [f.param for f in found if f.severity == "error"] == ["stray"]


def test_a_name_that_is_no_text_is_refused() -> None:
    params: dict[Any, Any] = {"prompt": "x", 7: 1}
    assert [f.severity for f in check("video", T2V, params)] == ["error"]


# ---- where documents disagree, the union is accepted


@pytest.mark.parametrize(
    ("model", "params"),
    [
        *[(T2V, {"quality": quality}) for quality in ("480p", "720p", "1080p", "4k")],
        (T2V, {"aspect_ratio": "16:9"}),
        (T2V, {"aspect_ratio": "adaptive"}),
        ("veo-3.1-generate-preview", {"image_urls": [URL] * 3}),
        ("veo-3.1-generate-preview", {"quality": "4k"}),
        ("veo3.1-fast", {"image_urls": [URL] * 3}),
        ("doubao-seedream-5.0-pro", {"n": 1}),
        ("doubao-seedream-5.0-pro", {"model_params": {"output_format": "png"}}),
        ("doubao-seedream-5.0-pro", {"quality": "1.5K", "size": "2150x2150"}),
        ("doubao-seedream-5.0-pro", {"prompt": "x" * 9000}),
        *[("sora-2-preview", {"duration": seconds}) for seconds in (4, 8, 10, 12, 15, 25)],
        *[("sora-2", {"duration": seconds}) for seconds in (4, 8, 10, 12, 15, 25)],
        ("suno-v5", {"prompt": "x" * 3000}),
        ("suno-v5", {"custom_mode": False, "instrumental": False}),
        ("gpt-4o-image", {"size": "1024×1024"}),
        *[("topaz-video-upscale", {"model_params": {"upscale_factor": f}, "video_urls": [URL]}) for f in ("2", 2, 4.0)],
        ("grok-imagine-image-2.0", {"resolution": "2k", "quality": "LOW"}),
        ("seedance-2.5-text-to-video", {"duration": -1}),
        ("wan3.0-text-to-video", {"duration": -1}),
        ("gemini-omni-flash-text-to-video", {"duration": "auto"}),
        ("gemini-omni-flash-text-to-video", {"duration": 5}),
        ("wan2.7-video-edit", {"video_urls": [URL], "duration": 0}),
        ("happyhorse-1.0-video-edit", {"video_url": URL}),
        ("happyhorse-1.0-video-edit", {"video": [URL]}),
    ],
)
def test_the_union_of_the_documents_is_accepted(model: str, params: dict[str, Any]) -> None:
    assert errors(model, **params) == []


def test_another_case_is_remarked_upon_where_no_page_says_that_case_is_ignored() -> None:
    assert warnings(T2V, quality="720P") == ["quality: '720P' is documented as '720p'"]


def test_a_length_that_the_service_cuts_is_remarked_upon_only() -> None:
    assert len(warnings("wan2.7-text-to-video", prompt="x" * 5001)) == 1
    assert len(warnings("qwen-image-3.0", prompt="x" * 4501)) == 1


# ---- every model


def _sample(spec: ParamSpec) -> Any:
    if spec.default is not None:
        return spec.default
    if spec.enum:
        return spec.enum[0]
    if spec.items is not None:
        return [_sample(spec.items)] * (spec.min_items or 1)
    if spec.types[0] == "object":
        return {name: _sample(inner) for name, inner in spec.properties.items() if inner.required}
    if spec.format == "uuid":
        return "01234567-89ab-cdef-0123-456789abcdef"
    if spec.types[0] in ("integer", "number"):
        return spec.min or 1
    return {"uri": URL}.get(spec.format or "", "x")


def _with_defaults(specs: Mapping[str, ParamSpec]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name, spec in specs.items():
        inner = _with_defaults(spec.properties)
        if inner and (spec.required or any(s.default is not None for s in spec.properties.values())):
            chosen[name] = inner
        elif spec.required or spec.default is not None:
            chosen[name] = _sample(spec)
    return chosen


def _completed(model: Model, params: dict[str, Any]) -> dict[str, Any]:
    """With what the model's `require` rules ask for besides."""
    for finding in check(model.kind, model.id, params):
        outer, _, inner = (finding.param or "").partition(".")
        spec = model.params[outer]
        if inner:
            params = {**params, outer: {**params[outer], inner: _sample(spec.properties[inner])}}
        elif outer not in params:
            params = {**params, outer: _sample(spec)}
    return params


@pytest.mark.parametrize("model", all_models(), ids=lambda model: model.id)
def test_the_least_valid_request_and_all_defaults_pass(model: Model) -> None:
    least = {name: _sample(spec) for name, spec in model.params.items() if spec.required}
    assert check(model.kind, model.id, _completed(model, least)) == []
    assert check(model.kind, model.id, _completed(model, _with_defaults(model.params))) == []


def test_a_check_is_fast_enough_for_a_million_requests() -> None:
    params = {
        "prompt": "a lighthouse at dusk, " * 15,
        "image_urls": [URL],
        "duration": 5,
        "quality": "720p",
        "aspect_ratio": "16:9",
        "callback_url": "https://example.com/hook",
    }
    assert get_model(I2V) is not None
    best = min(timeit.repeat(lambda: check("video", I2V, params), number=500, repeat=5)) / 500
    assert best < 50e-6 * 3  # the aim is 50 us; three times that for a busy machine
