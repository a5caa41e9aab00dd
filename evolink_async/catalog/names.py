"""How near two names are: "did you mean" for model ids and parameter names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

_WORDS = re.compile(r"[a-z]+|\d+(?:\.\d+)?")
_MODE = re.compile(
    r"-(?:text-to-video|image-to-video|reference-to-video|reference-video|video-edit|video-extend|draft-to-video"
    r"|text-to-image|image-to-image|motion-control|t2v|i2v)(?:-.*)?$"
)
_LONGEST = 100  # a longer id is no typing error, and comparing costs the square of its length
_NEAR = 0.72  # below this the guesses stop being helpful (tried on the table in tests/catalog)
_TIE = 0.06  # guesses this close to the best one are worth showing beside it

# Names that other services use for the same thing; looked up only where the model has the target.
_SYNONYMS = {
    "resolution": ("quality", "size"),
    "quality": ("resolution",),
    "ratio": ("aspect_ratio", "size"),
    "size": ("aspect_ratio",),
    "aspect_ratio": ("size",),
    "aspectRatio": ("aspect_ratio", "size"),
    "num_images": ("n",),
    "count": ("n",),
    "seconds": ("duration",),
    "length": ("duration",),
    "image": ("image_urls", "image_start"),
    "images": ("image_urls", "image_start"),
    "video": ("video_urls", "video_url"),
    "videos": ("video_urls", "video_url"),
    "text": ("prompt",),
    "input": ("prompt",),
    "lyrics": ("prompt",),
    "webhook_url": ("callback_url",),
    "webhook": ("callback_url",),
}


def closest(wrong: str, known: Iterable[str]) -> tuple[str, ...]:
    """Up to three of `known`, best first, that `wrong` may have meant; empty where nothing is near."""
    if len(wrong) > _LONGEST:
        return ()
    words = _words(wrong)
    scored = [(_likeness(words, _words(id)), id) for id in known]
    best = max((score for score, _ in scored), default=0.0)
    if best < _NEAR:
        return ()
    near = [(score, id) for score, id in scored if score >= best - _TIE and score >= _NEAR]
    near.sort(key=lambda pair: -pair[0])
    return tuple(id for _, id in near[:3])


def closest_parameter(wrong: str, known: Iterable[str]) -> str | None:
    """The parameter that `wrong` may have meant, if any is near."""
    names = list(known)
    for synonym in _SYNONYMS.get(wrong, ()):
        if synonym in names:
            return synonym
    if len(wrong) > _LONGEST:
        return None
    matches = get_close_matches(wrong, names, n=1, cutoff=0.7)
    return matches[0] if matches else None


def family(id: str) -> str:
    """The id without its mode: `seedance-2.0-fast` for `seedance-2.0-fast-text-to-video`."""
    return _MODE.sub("", id)


def _words(id: str) -> list[str]:
    # 2, 2.0 and 02 are one version to whoever types them
    return [f"{float(word):g}" if word[0].isdigit() else word for word in _WORDS.findall(id.lower())]


def _likeness(wrong: list[str], right: list[str]) -> float:
    if not wrong:
        return 0.0
    if wrong == right:
        return 1.0
    shared = len(set(wrong) & set(right)) / len(set(wrong) | set(right))
    letters = SequenceMatcher(None, "".join(wrong), "".join(right)).ratio()
    score = 0.65 * letters + 0.35 * shared
    # a family name ("kling-o3") stands for its members
    is_family = len("".join(wrong)) > 3 and right[: len(wrong)] == wrong
    return max(score, 0.8) if is_family else score
