"""check() is total: whatever the parameters hold, it answers with findings and raises nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evolink_async.catalog import ParamSpec, all_models, check

MODELS = all_models()
TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(categories=["Cs", "Lu", "Zs"]), max_size=10),  # with lone surrogates
    st.sampled_from(["https://[", "http://", "data:", "https://1.2/a", "file:///x", "1024x1024", "0x0", "9" * 400]),
    st.integers(1, 3).map(lambda n: "y" * 10**n * 50),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), TEXTS, st.binary(max_size=5)
)
JSON_LIKE = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.one_of(TEXTS, st.integers(), st.none()), inner, max_size=4),
    ),
    max_leaves=12,
)


def _near(spec: ParamSpec) -> st.SearchStrategy[Any]:
    """Values that get past the first checks, so that the later ones are met too."""
    choices: list[st.SearchStrategy[Any]] = [JSON_LIKE]
    if spec.enum:
        choices.append(st.sampled_from(spec.enum))
    if spec.items is not None:
        choices.append(st.lists(st.deferred(lambda: _near(spec.items or spec)), max_size=5))
    if spec.properties:
        choices.append(st.fixed_dictionaries({}, optional={k: _near(v) for k, v in spec.properties.items()}))
    if "boolean" in spec.types:
        choices.append(st.booleans())
    return st.one_of(choices)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, dict[Any, Any]]:
    model = draw(st.sampled_from(MODELS))
    params = draw(st.fixed_dictionaries({}, optional={k: _near(v) for k, v in model.params.items()}))
    stray = draw(
        st.dictionaries(st.one_of(TEXTS, st.integers(), st.sampled_from(["image_url", "video_urls"])), JSON_LIKE)
    )
    return model.kind, model.id, {**params, **stray}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests(), st.booleans())
def test_a_known_model_never_makes_check_raise(request: tuple[str, str, dict[Any, Any]], local: bool) -> None:
    kind, model, params = request
    findings = check(kind, model, params, allow_private_hosts=local)
    assert [f.severity for f in findings] == sorted(f.severity for f in findings)  # "error" before "warning"
    assert findings == check(kind, model, dict(reversed(params.items())), allow_private_hosts=local)
    assert all(len(str(finding)) < 2000 for finding in findings)


@settings(max_examples=150, deadline=None)
@given(
    TEXTS,
    TEXTS,
    st.dictionaries(st.one_of(TEXTS, st.just("callback_url"), st.integers()), JSON_LIKE, max_size=5),
)
def test_an_unknown_model_never_makes_check_raise(kind: str, model: str, params: dict[Any, Any]) -> None:
    assert check(kind, model, params)


def test_numbers_too_large_to_print_are_reported() -> None:
    params = {"prompt": "x", "n": 10**5000, "stray": 10**5000}
    assert [f.severity for f in check("image", "gpt-4o-image", params)] == ["error", "warning"]


def test_deep_nesting_and_cycles_do_no_harm() -> None:
    deep: list[Any] = []
    for _ in range(50_000):
        deep = [deep]
    ring: list[Any] = []
    ring.append(ring)
    for value in (deep, ring, {"a": deep}):
        for name in ("stray", "model_params", "image_urls", "prompt"):
            check("video", "seedance-2.0-text-to-video", {"prompt": "x", name: value})
