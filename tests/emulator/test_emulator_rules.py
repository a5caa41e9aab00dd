"""What the service accepts and refuses, model by model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async.emulator.answers import Refusal
from evolink_async.emulator.crossrules import RULES, UNCHECKED
from evolink_async.emulator.models import MICRO, all_models, model_named, price
from evolink_async.emulator.rules import check
from evolink_async.emulator.service import Accepted, Service

T2V = {"model": "seedance-2.0-text-to-video", "prompt": "x"}
GPT2 = {"model": "gpt-image-2", "prompt": "x"}
SUNO = {"model": "suno-v5-beta", "prompt": "x"}
O3 = {"model": "kling-o3-image-to-video", "prompt": "x", "image_start": "https://a.b/c.png"}
URL = "https://a.b/c.png"


def kind_of(body: dict[str, Any]) -> str:
    model = model_named(body["model"])
    return "image" if model is None else model.kind


GOOD: list[dict[str, Any]] = [
    T2V,
    {**T2V, "duration": 15, "quality": "4k", "an_unknown_name": [1]},
    {**T2V, "duration": None},
    {**GPT2, "size": "1024x1024"},
    {**GPT2, "size": "1024×1536"},
    {**GPT2, "n": 1.0},
    {**GPT2, "size": "16:9", "resolution": "2k"},
    {**GPT2, "callback_url": "https://example.com/hook"},
    {"model": "seedance-2.5-text-to-video", "prompt": "x", "duration": -1},
    {"model": "gemini-omni-flash-text-to-video", "prompt": "x", "duration": "auto"},
    {"model": "gemini-omni-flash-image-to-video", "prompt": "x", "image_urls": ["data:image/png;base64,AAAA"]},
    {"model": "topaz-video-upscale", "video_urls": ["https://a.b/c.mp4"], "model_params": {"upscale_factor": 3}},
    {"model": "suno-v5", "prompt": "x"},
    {"model": "suno-v5-beta", "custom_mode": True, "style": "s", "title": "t", "instrumental": True},
    {"model": "mj-v8.1", "prompt": "x", "quality": "hd"},
    {**O3, "model_params": {"multi_prompt": [{"index": 1, "prompt": "p", "duration": "5"}]}},
]

BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "seedance-2.0", "prompt": "x"}, "model"),
    ({"model": "", "prompt": "x"}, "model"),
    ({"model": "gpt-image-2"}, "prompt"),
    ({**GPT2, "prompt": "   "}, "prompt"),
    ({**GPT2, "prompt": 5}, "prompt"),
    ({**GPT2, "prompt": "x" * 32_001}, "prompt"),
    ({**GPT2, "n": 11}, "n"),
    ({**GPT2, "n": True}, "n"),
    ({**GPT2, "n": 1.5}, "n"),
    ({**GPT2, "size": "1000x1000"}, "size"),
    ({**GPT2, "size": "7:5"}, "size"),
    ({**GPT2, "image_urls": []}, "image_urls"),
    ({**GPT2, "image_urls": ["c.png"]}, "image_urls"),
    ({**GPT2, "image_urls": [URL] * 17}, "image_urls"),
    ({**GPT2, "video_urls": [URL]}, "video_urls"),
    ({**GPT2, "image_url": URL}, "image_url"),
    ({**GPT2, "mask_url": URL}, "image_urls"),
    ({**GPT2, "background": "transparent", "output_format": "jpeg"}, "output_format"),
    ({**GPT2, "callback_url": "http://example.com"}, "callback_url"),
    ({**GPT2, "callback_url": "https://127.0.0.1/x"}, "callback_url"),
    ({**GPT2, "callback_url": "https://[half"}, "callback_url"),
    ({**T2V, "image_urls": [URL]}, "image_urls"),
    ({**T2V, "duration": "5"}, "duration"),
    ({**T2V, "quality": "8k"}, "quality"),
    ({**T2V, "model_params": {"web_search": "yes"}}, "model_params.web_search"),
    ({**T2V, "content_filter": False, "model_params": {"web_search": True}}, "content_filter"),
    ({"model": "seedance-2.0-reference-to-video", "prompt": "x", "audio_urls": [URL]}, "image_urls"),
    ({**SUNO, "duration": 30}, "duration"),
    ({"model": "suno-v5-beta", "style": "s"}, "prompt"),
    ({**SUNO, "custom_mode": True, "style": "s"}, "title"),
    ({"model": "mj-v8.1", "prompt": "x", "quality": "hd", "model_params": {"speed": "draft"}}, "quality"),
    ({"model": "mj-v7", "prompt": "a cat --niji 6"}, "prompt"),
    ({"model": "MiniMax-Hailuo-02"}, "prompt"),
    ({"model": "MiniMax-Hailuo-02", "prompt": "x", "quality": "1080p", "duration": 10}, "duration"),
    ({"model": "minimax-h3-image-to-video", "prompt": "x"}, "image_start"),
    ({"model": "qwen-image-edit-plus", "prompt": "x", "image_urls": [URL], "size": "1024x1024", "n": 2}, "n"),
    ({**O3, "image_end": URL, "image_urls": [URL]}, "image_end"),
    (
        {**O3, "model_params": {"multi_prompt": [{"index": 1, "prompt": "p", "duration": "4"}]}},
        "model_params.multi_prompt",
    ),
    ({"model": "wan2.7-image-to-video", "generation_mode": "first_last_frame", "image_start": URL}, "image_end"),
]


@pytest.mark.parametrize("body", GOOD, ids=lambda body: str(body)[:60])
def test_good_requests_are_accepted(body: dict[str, Any]) -> None:
    assert not isinstance(checked := check(kind_of(body), body), Refusal), checked


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: str(value)[:60])
def test_bad_requests_are_refused_and_the_parameter_named(body: dict[str, Any], param: str) -> None:
    refusal = check(kind_of(body), body)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code, refusal.type) == (400, "invalid_request", "invalid_request_error")
    assert refusal.param == param


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_not_an_object_is_refused(body: object) -> None:
    assert isinstance(check("image", body), Refusal)


def test_a_model_of_another_kind_is_refused_with_the_right_endpoint() -> None:
    refusal = check("image", T2V)
    assert isinstance(refusal, Refusal)
    assert "/v1/videos/generations" in refusal.message


def test_every_rule_in_the_data_is_either_checked_or_said_not_to_be() -> None:
    named = {sentence for model in all_models() for sentence in model.rules}
    assert named == set(RULES) | set(UNCHECKED)
    assert not set(RULES) & set(UNCHECKED)


def test_every_model_accepts_what_its_refusals_ask_for_and_has_a_price() -> None:
    assert len(all_models()) == 165
    for model in all_models():
        body: dict[str, Any] = {"model": model.id}
        for _ in range(20):
            checked = check(model.kind, body)
            if not isinstance(checked, Refusal):
                break
            add(body, model.params, str(checked.param).split("."))
        assert not isinstance(checked, Refusal), (model.id, checked)
        assert price(model, checked[1]) > 0


def add(body: dict[str, Any], specs: Any, names: list[str]) -> None:
    """Put a plausible value where a refusal says that one is missing."""
    name, *rest = names
    if rest:
        add(body.setdefault(name, {}), specs[name]["properties"], rest)
    else:
        body[name] = plausible(specs[name])


def plausible(spec: Any) -> Any:
    if "enum" in spec:
        return spec["enum"][0]
    if spec["type"] == "array":
        items = {"{image_url}": {"image_url": URL}, "{video_url}": {"video_url": URL}}
        return [items.get(spec["items"], URL)] * max(1, spec.get("min_items", 1))
    if spec.get("format") == "uuid":
        return "6f0c1a52-3b1e-4f4e-9d0a-0123456789ab"
    text = URL if spec.get("format") == "uri" else "x" * spec.get("min_length", 1)
    return {"string": text, "object": {}, "integer": 1024, "number": 1.0}[spec["type"]]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(URL),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_body_breaks_the_service(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(all_models()))
    names = [*model.params, "n", "size", "duration", "image_url", "callback_url"]
    values = {name: example_of(model.params.get(name), data) for name in data.draw(st.lists(st.sampled_from(names)))}
    service = Service()
    accepted = service.submit(model.kind, {"model": model.id, "prompt": "x", **values}, None, 0.0)
    if isinstance(accepted, Accepted):
        answer = service.read(accepted.task.id, 1e5, "http://host/results")
        assert isinstance(answer, dict)
        assert answer["status"] == "completed"
        for link in answer["results"]:
            assert service.result(link.rpartition("/")[2], accepted.task.ends_at) is not None


def example_of(spec: Any, data: st.DataObject) -> Any:
    """Now and then a value that fits, else anything."""
    good: list[Any] = [] if spec is None else [*spec.get("enum", []), *([spec["min"]] if "min" in spec else [])]
    fitting: bool = data.draw(st.booleans())
    return data.draw(st.sampled_from(good) if good and fitting else anything)


def test_prices_follow_what_is_asked_for() -> None:
    image, video, gpt = (
        model_named("gpt-4o-image"),
        model_named("seedance-2.0-fast-text-to-video"),
        model_named("gpt-image-2"),
    )
    assert image
    assert video
    assert gpt
    assert price(image, {"n": 4}) == 10 * MICRO
    assert price(video, {"quality": "480p", "duration": 10}) == 50_630_000
    assert price(video, {"quality": "480p", "duration": 10, "content_filter": False}) == 55_693_000
    assert price(gpt, {"quality": "high", "n": 2}) == 24 * MICRO
