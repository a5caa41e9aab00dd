"""Every documented rule between parameters: one request that keeps it and one that breaks it.

`said` is the rule as our notes on EvoLink's pages have it. All 58 of them stand here; the two that cannot be
decided before sending are in `UNCHECKED` (two more only in part; the data says which part and why).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from evolink_async.catalog import all_models, check, get_model, kind_of

TRANSPARENT = (
    "limit_if: background=transparent -> exactly 1 input image with alpha; output is png; output_format=jpeg rejected"
)
REFERENCE = (
    "limit_if: generation_type=REFERENCE -> duration 8, aspect_ratio 16:9, only generate_audio "
    "among the advanced fields"
)
H3_REFERENCE = (
    "require_any: image_urls, video_urls (documentation text is cut here: whether audio alone "
    "is accepted is not verified)"
)
CONTINUATION = "require_if: video_continuation -> video_urls; forbid image_start, audio_urls; duration >= input length"
URL = "https://example.com/a.png"
TASK = "task-unified-1-abcdef"


class Case(NamedTuple):
    said: str
    model: str
    base: dict[str, Any]  # goes into both requests
    keeps: dict[str, Any]
    breaks: dict[str, Any]
    param: str  # the parameter blamed
    severity: str = "error"


P: dict[str, Any] = {"prompt": "x"}
PI: dict[str, Any] = {"prompt": "x", "image_urls": [URL]}
ELEMENTS = [{"element_id": "e"}]
SHOTS = [{"index": 1, "prompt": "a", "duration": "2"}, {"index": 2, "prompt": "b", "duration": "3"}]
ELEMENT = {"element_name": "e", "element_description": "d"}
BY_IMAGE = {**ELEMENT, "reference_type": "image_refer"}
BY_VIDEO = {**ELEMENT, "reference_type": "video_refer"}
IMAGE_LIST = {"frontal_image": URL, "refer_images": [{"image_url": URL}]}
VIDEO_LIST = {"refer_videos": [{"video_url": URL}]}
PERSONA = {
    "source_task_id": TASK,
    "result_id": "0" * 8 + "-0000-0000-0000-" + "0" * 12,
    "name": "n",
    "description": "d",
}
MULTI = {"multi_shot": True, "shot_type": "customize", "multi_prompt": SHOTS}
MOTION = {"image_urls": [URL], "video_urls": [URL]}


def mp(**inner: Any) -> dict[str, Any]:
    return {"model_params": inner}


CASES = [
    Case(
        "exclusive: audio_references with image_urls",
        "doubao-seed-audio-1-0",
        P,
        {"image_urls": [URL], "audio_references": []},
        {"image_urls": [URL], "audio_references": ["voice"]},
        "audio_references",
    ),
    Case(
        "exclusive: content_filter=false with model_params.web_search=true -> 400",
        "seedance-2.0-text-to-video",
        {**P, **mp(web_search=True)},
        {},
        {"content_filter": False},
        "model_params.web_search",
    ),
    Case(
        "exclusive: model_params.file_url with model_params.link_url",
        "wan3.0-reference-video",
        PI,
        mp(file_url=URL),
        mp(file_url=URL, link_url=URL),
        "model_params.file_url",
    ),
    Case(
        "exclusive: quality=hd with model_params.speed=draft",
        "mj-v8.1",
        {**P, "quality": "hd"},
        {},
        mp(speed="draft"),
        "quality",
    ),
    Case(
        "forbid in prompt: --v, --version, --niji, --fast, --draft, --turbo",
        "mj-v7",
        {},
        {"prompt": "a --vivid --ar 16:9 well--v"},
        {"prompt": "a cat --niji 6"},
        "prompt",
    ),
    Case("forbid: any media input", "wan3.0-text-to-video", P, {}, {"image_start": URL}, "image_start"),
    Case(
        "forbid: background=transparent",
        "gpt-image-2-beta",
        P,
        {},
        {"background": "transparent"},
        "background",
    ),
    Case("forbid: duration -> parameter error", "suno-v5-beta", P, {}, {"duration": 30}, "duration"),
    Case(
        "forbid: element_voice_id with image_refer",
        "kling-custom-element",
        {},
        mp(**BY_VIDEO, element_video_list=VIDEO_LIST, element_voice_id="v"),
        mp(**BY_IMAGE, element_image_list=IMAGE_LIST, element_voice_id="v"),
        "model_params.element_voice_id",
    ),
    Case(
        "forbid: image_end when total images >2",
        "kling-o3-image-to-video",
        {**P, "image_start": URL, "image_end": URL},
        {},
        {"image_urls": [URL]},
        "image_end",
    ),
    Case(
        "forbid: image_start, image_end, image_urls, video_urls, audio_urls",
        "minimax-h3-text-to-video",
        P,
        {},
        {"image_end": URL},
        "image_end",
    ),
    Case(
        "forbid: image_urls, video_urls, audio_urls",
        "seedance-2.0-text-to-video",
        P,
        {},
        {"audio_urls": [URL]},
        "audio_urls",
    ),
    Case(
        "forbid: mask_url when image_urls has more than 1 item",
        "gpt-4o-image",
        {**P, "mask_url": URL},
        {"image_urls": [URL]},
        {"image_urls": [URL, URL]},
        "mask_url",
    ),
    Case(
        "forbid: model_params",
        "seedance-2.0-mini-text-to-video",
        P,
        {},
        mp(web_search=True),
        "model_params",
    ),
    Case("forbid: pixel sizes", "gpt-image-2-beta", P, {"size": "3:2"}, {"size": "1024x1024"}, "size"),
    Case(
        "forbid: prompt_priority=fast -> 400",
        "doubao-seedream-5.0-flash",
        P,
        {"prompt_priority": "standard"},
        {"prompt_priority": "fast"},
        "prompt_priority",
    ),
    Case(
        "forbid: quality=1080p with 2+ images",
        "grok-imagine-video-1.5-preview",
        {**P, "quality": "1080p"},
        {"image_urls": [URL]},
        {"image_urls": [URL, URL]},
        "quality",
    ),
    Case(
        "forbid: video_urls, audio_urls",
        "seedance-2.0-image-to-video",
        PI,
        {},
        {"video_urls": [URL]},
        "video_urls",
    ),
    Case(
        "forbid: video_urls, audio_urls, image_urls",
        "minimax-h3-image-to-video",
        {**P, "image_start": URL},
        {},
        {"image_urls": [URL]},
        "image_urls",
    ),
    Case(
        "limit: elements <=3 with first frame; images+elements <=7",
        "kling-o3-image-to-video",
        mp(element_list=ELEMENTS * 4),
        {**P, "image_urls": [URL] * 3},
        {**P, "image_start": URL},
        "model_params.element_list",
    ),
    Case(
        "limit: elements <=3 with first frame; images+elements <=7",
        "kling-o3-image-to-video",
        {**P, **mp(element_list=ELEMENTS * 4)},
        {"image_urls": [URL] * 3},
        {"image_urls": [URL] * 4},
        "model_params.element_list",
    ),
    Case("limit: image_urls <=3 else error", "qwen-image-3.0", P, PI, {"image_urls": [URL] * 4}, "image_urls"),
    Case(
        "limit: image_urls exactly 1",
        "doubao-seedream-5.0-pro-layerize",
        {},
        {"image_urls": [URL]},
        {"image_urls": [URL] * 2},
        "image_urls",
    ),
    Case(
        "limit: image_urls+video_urls <=5",
        "wan2.7-reference-video",
        {**P, "video_urls": [URL] * 2},
        {"image_urls": [URL] * 3},
        {"image_urls": [URL] * 4},
        "image_urls",
    ),
    Case(
        "limit: images+elements <=4",
        "kling-o3-video-edit",
        {"video_url": URL, **mp(element_list=ELEMENTS * 2)},
        {"image_urls": [URL] * 2},
        {"image_urls": [URL] * 3},
        "image_urls",
    ),
    Case(
        "limit: images+elements <=4 with a video",
        "kling-o3-reference-to-video",
        {**P, "image_urls": [URL] * 3, **mp(element_list=ELEMENTS * 2)},
        {},
        {"video_url": URL},
        "image_urls",
    ),
    Case(
        "limit: sum of shot durations = duration",
        "kling-o3-text-to-video",
        {**P, **mp(**MULTI)},
        {"duration": 5},
        {"duration": 6},
        "model_params.multi_prompt",
    ),
    Case(
        "limit: sum of shot durations = duration",
        "kling-v3-text-to-video",
        P,
        mp(**MULTI),
        mp(**{**MULTI, "multi_prompt": SHOTS * 2}),
        "model_params.multi_prompt",
        "warning",
    ),
    Case(
        TRANSPARENT,
        "doubao-seedream-5.0-pro",
        {**P, "background": "transparent"},
        {"image_urls": [URL]},
        {},
        "image_urls",
    ),
    Case(
        TRANSPARENT,
        "doubao-seedream-5.0-pro",
        {**PI, "background": "transparent"},
        {"output_format": "png"},
        {"output_format": "jpeg"},
        "output_format",
    ),
    Case(
        "limit_if: background=transparent -> output_format in png,webp",
        "gpt-image-2",
        {**P, "background": "transparent"},
        {"output_format": "webp"},
        {"output_format": "jpeg"},
        "output_format",
    ),
    Case(
        "limit_if: draft=true -> quality must be 480p or absent (becomes 480p), else 400",
        "seedance-2.5-text-to-video",
        {**P, "draft": True},
        {},
        {"quality": "720p"},
        "quality",
    ),
    Case(
        "limit_if: element_list -> character_orientation=video",
        "kling-v3-motion-control",
        MOTION,
        mp(character_orientation="video", element_list=ELEMENTS),
        mp(character_orientation="image", element_list=ELEMENTS),
        "model_params.character_orientation",
    ),
    Case(
        REFERENCE,
        "veo-3.1-generate-preview",
        {**PI, "generation_type": "REFERENCE"},
        {"generate_audio": True},
        {"duration": 4},
        "duration",
    ),
    Case(
        REFERENCE,
        "veo-3.1-generate-preview",
        {**PI, "generation_type": "REFERENCE", "duration": 8},
        {"aspect_ratio": "16:9"},
        {"aspect_ratio": "9:16"},
        "aspect_ratio",
    ),
    Case(
        REFERENCE,
        "veo-3.1-generate-preview",
        {**PI, "generation_type": "REFERENCE"},
        {},
        {"seed": 7},
        "seed",
        "warning",
    ),
    Case(
        "limit_if: quality=1080p -> duration 6",
        "MiniMax-Hailuo-02",
        {**P, "quality": "1080p"},
        {},
        {"duration": 10},
        "duration",
    ),
    Case(
        "limit_if: quality=480p -> aspect_ratio in 16:9,9:16,1:1",
        "wan2.5-text-to-video",
        {**P, "quality": "480p"},
        {"aspect_ratio": "1:1"},
        {"aspect_ratio": "4:3"},
        "aspect_ratio",
    ),
    Case(
        "limit_if: quality=512p -> exactly 1 image",
        "MiniMax-Hailuo-02",
        {**P, "quality": "512p"},
        {"image_urls": [URL]},
        {},
        "image_urls",
    ),
    Case(
        "limit_if: size set -> n must be 1",
        "qwen-image-edit-plus",
        {**PI, "size": "1024x1024"},
        {"n": 1},
        {"n": 2},
        "n",
    ),
    Case(
        "limit_if: video_urls -> duration <=10",
        "wan2.7-reference-video",
        {**P, "video_urls": [URL]},
        {"duration": 10},
        {"duration": 12},
        "duration",
    ),
    Case(
        "require_any: image_start, image_end",
        "minimax-h3-image-to-video",
        P,
        {"image_end": URL},
        {},
        "image_start",
    ),
    Case(
        "require_any: image_urls, video_urls",
        "wan2.7-reference-video",
        P,
        {"video_urls": [URL]},
        {"image_urls": []},
        "image_urls",
    ),
    Case(
        "require_any: image_urls, video_urls (audio alone is rejected)",
        "seedance-2.0-reference-to-video",
        {**P, "audio_urls": [URL]},
        {"video_urls": [URL]},
        {},
        "image_urls",
    ),
    Case(
        H3_REFERENCE,
        "minimax-h3-reference-to-video",
        P,
        {"image_urls": [URL]},
        {},
        "image_urls",
    ),
    Case(
        H3_REFERENCE,
        "minimax-h3-reference-to-video",
        {**P, "audio_urls": [URL]},
        {"image_urls": [URL]},
        {},
        "image_urls",
        "warning",
    ),
    Case(
        "require_any: image_urls, video_urls, audio_urls",
        "seedance-2.5-reference-to-video",
        P,
        {"audio_urls": [URL]},
        {},
        "image_urls",
    ),
    Case("require_if: custom_mode=false -> prompt", "suno-v5-beta", {}, P, {}, "prompt"),
    Case(
        "require_if: custom_mode=true -> style, title",
        "suno-v5-beta",
        {**P, "custom_mode": True, "title": "t"},
        {"style": "s"},
        {},
        "style",
    ),
    Case(
        "require_if: custom_mode=true and instrumental=false -> prompt (lyrics)",
        "suno-v5-beta",
        {"custom_mode": True, "title": "t", "style": "s"},
        {"instrumental": True},
        {},
        "prompt",
    ),
    Case(
        "require_if: first_frame -> image_start; forbid image_end, video_urls",
        "wan2.7-image-to-video",
        {"generation_mode": "first_frame"},
        {"image_start": URL},
        {},
        "image_start",
    ),
    Case(
        "require_if: first_frame -> image_start; forbid image_end, video_urls",
        "wan2.7-image-to-video",
        {"generation_mode": "first_frame", "image_start": URL},
        {},
        {"image_end": URL},
        "image_end",
    ),
    Case(
        "require_if: first_last_frame -> image_start and image_end; forbid video_urls",
        "wan2.7-image-to-video",
        {"generation_mode": "first_last_frame", "image_start": URL},
        {"image_end": URL},
        {},
        "image_end",
    ),
    Case(
        "require_if: first_last_frame -> image_start and image_end; forbid video_urls",
        "wan2.7-image-to-video",
        {"generation_mode": "first_last_frame", "image_start": URL, "image_end": URL},
        {},
        {"video_urls": [URL]},
        "video_urls",
    ),
    Case(
        CONTINUATION,
        "wan2.7-image-to-video",
        {"generation_mode": "video_continuation"},
        {"video_urls": [URL]},
        {},
        "video_urls",
    ),
    Case(
        CONTINUATION,
        "wan2.7-image-to-video",
        {"generation_mode": "video_continuation", "video_urls": [URL]},
        {},
        {"audio_urls": [URL]},
        "audio_urls",
    ),
    Case(
        "require_if: image_end -> image_start",
        "kling-o3-image-to-video",
        {**P, "image_end": URL},
        {"image_start": URL},
        {},
        "image_start",
    ),
    Case(
        "require_if: mask_url -> image_urls (mask alone is ignored)",
        "gpt-image-2",
        {**P, "mask_url": URL},
        {"image_urls": [URL]},
        {},
        "image_urls",
    ),
    Case(
        "require_if: model_params.shot_type -> prompt_extend true to take effect",
        "wan2.6-text-to-video",
        {**P, **mp(shot_type="multi")},
        {},
        {"prompt_extend": False},
        "model_params.shot_type",
        "warning",
    ),
    Case(
        "require_if: multi_shot=true -> shot_type",
        "kling-v3-text-to-video",
        P,
        mp(multi_shot=True, shot_type="intelligence"),
        mp(multi_shot=True),
        "model_params.shot_type",
    ),
    Case(
        "require_if: no image_urls -> prompt",
        "MiniMax-Hailuo-02",
        {},
        {"image_urls": [URL]},
        {"image_urls": []},
        "prompt",
    ),
    Case(
        "require_if: reference_type=image_refer -> element_image_list",
        "kling-custom-element",
        {},
        mp(**BY_IMAGE, element_image_list=IMAGE_LIST),
        mp(**BY_IMAGE),
        "model_params.element_image_list",
    ),
    Case(
        "require_if: reference_type=video_refer -> element_video_list",
        "kling-custom-element",
        {},
        mp(**BY_VIDEO, element_video_list=VIDEO_LIST),
        mp(**BY_VIDEO),
        "model_params.element_video_list",
    ),
    Case(
        "require_if: shot_type=customize -> multi_prompt (prompt ignored)",
        "kling-o3-text-to-video",
        P,
        mp(**MULTI),
        mp(multi_shot=True, shot_type="customize"),
        "model_params.multi_prompt",
    ),
    Case(
        "require_if: vocal_start <-> vocal_end together; window 10..30 s",
        "suno-persona",
        {},
        mp(**PERSONA, vocal_start=5, vocal_end=15),
        mp(**PERSONA, vocal_start=5),
        "model_params.vocal_end",
    ),
    Case(
        "require_if: vocal_start <-> vocal_end together; window 10..30 s",
        "suno-persona",
        {},
        mp(**PERSONA),
        mp(**PERSONA, vocal_end=20),
        "model_params.vocal_start",
    ),
    Case(
        "require_if: vocal_start <-> vocal_end together; window 10..30 s",
        "suno-persona",
        {},
        mp(**PERSONA, vocal_start=0.5, vocal_end=30.5),
        mp(**PERSONA, vocal_start=5, vocal_end=36),
        "model_params.vocal_end",
    ),
    # limits that stand in the notes on a parameter and bind several of them
    Case(
        "note: simple mode: 3000 max (older text 500)",
        "suno-v5-beta",
        {"prompt": "x" * 3001},
        {"custom_mode": True, "style": "s", "title": "t"},
        {},
        "prompt",
    ),
    Case(
        "note: reference count + outputs <=15",
        "doubao-seedream-4.0",
        {**P, "n": 10},
        {"image_urls": [URL] * 5},
        {"image_urls": [URL] * 6},
        "n",
    ),
    Case(
        "note: draft top level only; inside model_params -> 400",
        "seedance-2.5-text-to-video",
        P,
        {"draft": True},
        mp(draft=True),
        "model_params.draft",
    ),
]

# text in the data file, by what our notes say
UNCHECKED = {
    "limit: one persona per result_id": "suno-persona",
    "limit: reference video seconds + output seconds <=30": "wan3.0-reference-video",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.said} [{case.model}]")
def test_a_request_that_keeps_the_rule_passes(case: Case) -> None:
    assert check(str(kind_of(case.model)), case.model, {**case.base, **case.keeps}) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.said} [{case.model}]")
def test_a_request_that_breaks_the_rule_is_reported(case: Case) -> None:
    findings = check(str(kind_of(case.model)), case.model, {**case.base, **case.breaks})
    assert (case.param, case.severity) in {(f.param, f.severity) for f in findings}
    assert case.severity == "error" or not [f for f in findings if f.severity == "error"]


def test_all_58_documented_rules_are_accounted_for() -> None:
    said = {case.said for case in CASES if not case.said.startswith("note: ")} | set(UNCHECKED)
    assert len(said) == 58


@pytest.mark.parametrize(("said", "id"), UNCHECKED.items())
def test_a_rule_that_only_the_service_can_decide_is_kept_with_the_reason(said: str, id: str) -> None:
    model = get_model(id)
    assert model is not None, said
    assert [rule.reason for rule in model.rules if rule.rule == "unchecked"]


def test_every_kind_of_rule_in_the_data_is_met_by_a_case() -> None:
    def texts(rule: str | None = None) -> set[str]:
        return {r.text for m in all_models() for r in m.rules if r.rule != "unchecked" and rule in (None, r.rule)}

    tried = {r.text for case in CASES for m in [get_model(case.model)] if m for r in m.rules}
    # the 64 MB bound has a test of its own, with a body that large
    assert {text for text in texts() - tried if "64 MB" not in text} == set()


def test_an_absent_parameter_is_the_services_choice_and_breaks_no_limit() -> None:
    # output_format is documented to default to jpeg, and a transparent background to give png
    assert check("image", "doubao-seedream-5.0-pro", {**PI, "background": "transparent"}) == []


def test_a_value_of_the_wrong_type_is_reported_once_and_confuses_no_rule() -> None:
    findings = check("video", "wan2.7-reference-video", {**P, "video_urls": [URL], "duration": "long"})
    assert [(f.severity, f.param) for f in findings] == [("error", "duration")]
