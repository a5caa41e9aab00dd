"""Did you mean: what a mistyped, shortened or renamed model id leads to."""

from __future__ import annotations

import pytest

from evolink_async.catalog import all_models, check, nearest


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("seedance-2-text-to-video", "seedance-2.0-text-to-video"),
        ("seedance2.0-text-to-video", "seedance-2.0-text-to-video"),
        ("seedance-20-text-to-video", "seedance-2.0-text-to-video"),
        ("seedance_2.0_text_to_video", "seedance-2.0-text-to-video"),
        ("seedance-2.0-text2video", "seedance-2.0-text-to-video"),
        ("Seedance-2.0-Text-To-Video", "seedance-2.0-text-to-video"),
        ("seedence-2.0-fast-image-to-video", "seedance-2.0-fast-image-to-video"),
        ("gpt4o-image", "gpt-4o-image"),
        ("gpt-4o-images", "gpt-4o-image"),
        ("gpt-image2", "gpt-image-2"),
        ("minimax-hailuo-02", "MiniMax-Hailuo-02"),
        ("wan-2.6-text-to-video", "wan2.6-text-to-video"),
        ("kling-v3-text-video", "kling-v3-text-to-video"),
        ("nano-banana-2-lite", "nano-banana-2-lite-beta"),
        ("nano-banana", "nano-banana-beta"),
        ("seedream-4.5", "doubao-seedream-4.5"),
        ("sora2", "sora-2"),
        ("suno-5", "suno-v5-beta"),
        ("kling-o3", "kling-o3-text-to-video"),
        ("seedance-2.5", "seedance-2.5-text-to-video"),
        ("topaz-upscale", "topaz-video-upscale"),
    ],
)
def test_a_slip_leads_to_the_right_id(typed: str, meant: str) -> None:
    assert nearest(typed)[0] == meant


@pytest.mark.parametrize("typed", ["", "foo", "flux-pro", "dall-e-3", "x" * 10_000, "\ud800", "---"])
def test_nothing_is_suggested_where_nothing_is_near(typed: str) -> None:
    assert nearest(typed) == ()


def test_a_known_id_is_its_own_nearest() -> None:
    assert all(nearest(model.id) == (model.id,) for model in all_models())
    assert nearest("suno-v5") == ("suno-v5-beta",)


def test_an_unknown_model_passes_with_a_warning_that_names_the_nearest() -> None:
    (finding,) = check("video", "seedance-2-text-to-video", {"prompt": "x", "anything": [1]})
    assert (finding.severity, finding.param) == ("warning", "model")
    assert "did you mean 'seedance-2.0-text-to-video'?" in finding.message


def test_an_unknown_model_without_a_likeness_passes_with_a_plain_warning() -> None:
    (finding,) = check("image", "flux-pro", {"prompt": "x"})
    assert finding.severity == "warning"
    assert "did you mean" not in finding.message


@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        ("seedance-2.0", "from text use 'seedance-2.0-text-to-video'"),
        ("seedance-2.0-fast", "from text use 'seedance-2.0-fast-text-to-video'"),
        ("seedance-2.0-mini", "from text use 'seedance-2.0-mini-text-to-video'"),
        ("fast-seedance-2.0", "from text use 'seedance-2.0-fast-text-to-video'"),
        ("fast-seedance-2.0-text-to-video", "use 'seedance-2.0-fast-text-to-video'"),
        ("fast-seedance-2.0-image-to-video", "use 'seedance-2.0-fast-image-to-video'"),
        ("mini-seedance-2.0-reference-to-video", "use 'seedance-2.0-mini-reference-to-video'"),
    ],
)
def test_a_known_wrong_name_is_refused_with_the_fix(typed: str, fix: str) -> None:
    (finding,) = check("video", typed, {"prompt": "x"})
    assert (finding.severity, finding.param) == ("error", "model")
    assert finding.message.startswith(f"no model '{typed}'; {fix}")


@pytest.mark.parametrize("id", [model.id for model in all_models() if model.legacy])
def test_a_legacy_model_passes_silently(id: str) -> None:
    needs = {"base_video_task_id": "task-unified-1-a"} if id == "sora-2-pro-remix" else {}
    kind = "image" if id == "gpt-4o-image" else "video"
    assert check(kind, id, {"prompt": "x", **needs}) == []
