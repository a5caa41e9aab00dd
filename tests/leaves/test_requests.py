"""Requests: what is sent for them, byte by byte, and what is refused before anything is sent."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evolink_async import AudioRequest, GenerationRequest, ImageRequest, InvalidRequestError, VideoRequest
from evolink_async.requests import encode_body, has_local_files, local_files


def test_the_body_is_the_model_the_prompt_and_every_parameter() -> None:
    request = ImageRequest(model="m", prompt="p", key="k", metadata={"row": 3}, size="1:1", n=2, new_thing={"a": [1]})
    assert request.body() == {"model": "m", "prompt": "p", "size": "1:1", "n": 2, "new_thing": {"a": [1]}}
    assert encode_body(request) == b'{"model":"m","prompt":"p","size":"1:1","n":2,"new_thing":{"a":[1]}}'
    assert ImageRequest(model="m").body() == {"model": "m"}


@pytest.mark.parametrize(
    ("cls", "endpoint"),
    [
        (ImageRequest, "/v1/images/generations"),
        (VideoRequest, "/v1/videos/generations"),
        (AudioRequest, "/v1/audios/generations"),
    ],
)
def test_every_kind_has_its_endpoint(cls: type[GenerationRequest], endpoint: str) -> None:
    assert cls(model="m").endpoint == endpoint


def test_a_request_is_frozen_comparable_and_can_be_pickled() -> None:
    request = VideoRequest(model="m", prompt="p", duration=5, metadata={"a": 1})
    with pytest.raises(ValidationError):
        request.model = "other"
    assert pickle.loads(pickle.dumps(request)) == request
    assert request == VideoRequest(model="m", prompt="p", duration=5, metadata={"a": 1})


def test_a_request_stays_as_it_was_made_whatever_becomes_of_the_lists_it_was_made_of() -> None:
    links, settings, metadata = ["https://a.example/1.png"], {"speed": "fast", "tags": ["x"]}, {"seen": []}
    request = ImageRequest(model="m", image_urls=links, model_params=settings, pair=(links,), metadata=metadata)
    sent = encode_body(request)
    links.append("https://a.example/2.png")
    settings["tags"].append("y")  # type: ignore[attr-defined]
    request.body()["image_urls"].append("https://a.example/3.png")
    request.body()["model_params"]["tags"].clear()
    assert encode_body(request) == sent
    assert request.metadata["seen"] is metadata["seen"]  # never sent, and the caller's own


def test_fields_that_a_subclass_declares_are_sent_too() -> None:
    class Poster(ImageRequest):
        size: str = "2:3"
        seed: int | None = None
        image_urls: tuple[Path, ...] = ()

    request = Poster(model="m", prompt="p", quality="hd")
    assert request.body() == {"model": "m", "prompt": "p", "size": "2:3", "image_urls": (), "quality": "hd"}
    assert not has_local_files(request)
    assert Poster(model="m", seed=7).params()["seed"] == 7
    assert local_files(Poster(model="m", image_urls=(Path("a.png"),))) == {"image_urls[0]": Path("a.png")}
    assert pickle.loads(pickle.dumps(ImageRequest(model="m", size="1:1"))).body() == {"model": "m", "size": "1:1"}


def test_a_wrong_type_is_named_as_it_was_given() -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt: .*string, got list$"):
        ImageRequest(model="m", prompt=["a"])


WRONG: list[dict[str, Any]] = [
    {},
    {"model": ""},
    {"model": 5},
    {"model": None},
    {"model": "m", "prompt": 5},
    {"model": "m", "prompt": b"p"},
    {"model": "m", "key": ""},
    {"model": "m", "key": 5},
    {"model": "m", "metadata": [1]},
    {"model": "x" * 300},
]


@pytest.mark.parametrize("fields", WRONG, ids=ascii)
def test_a_wrong_field_is_an_invalid_request(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ImageRequest(**fields)
    assert caught.value.param


loop: list[Any] = []
loop.append(loop)
UNSENDABLE: dict[str, Any] = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "deep-nan": {"a": [1, float("-inf")]},
    "surrogate": "half \ud800",
    "deep-surrogate": [{"a": "\udfff"}],
    "surrogate-name": {"\ud800": 1},
    "number-name": {1: 2},
    "bytes": b"x",
    "object": object(),
    "set": {1},
    "complex": 1j,
    "endless": loop,
}


@pytest.mark.parametrize("name", UNSENDABLE)
def test_what_json_cannot_carry_is_refused_and_named(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        encode_body(ImageRequest(model="m", thing=UNSENDABLE[name]))
    assert caught.value.param == "thing"
    str(caught.value).encode()


SENDABLE: dict[str, Any] = {
    "nul": "a\0b",
    "emoji": "👩‍🚀",
    "right-to-left": "\u202eabc",
    "long": "x" * 100_000,
    "tuple": (1, 2),
    "big": 10**30,
    "small": 5e-324,
    "null": None,
    "true": True,
    "self": 1,
}


def test_half_a_surrogate_pair_in_the_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        encode_body(ImageRequest(model="m", prompt="half \ud800"))
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("name", SENDABLE)
def test_what_json_can_carry_arrives_as_it_was(name: str) -> None:
    request = ImageRequest(model="m", thing=SENDABLE[name])
    sent = json.loads(encode_body(request))["thing"]
    assert sent == (list(SENDABLE[name]) if name == "tuple" else SENDABLE[name])


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_texts_and_numbers_are_sent_exactly(text: str, real: float, whole: int) -> None:
    try:
        request = ImageRequest(model="m", prompt=text, real=real, whole=whole)
        sent = json.loads(encode_body(request))
    except InvalidRequestError:
        assert any("\ud800" <= character <= "\udfff" for character in text)
    else:
        assert (sent.get("prompt"), sent["real"], sent["whole"]) == (text, real, whole)


def test_a_parameter_may_have_any_name() -> None:
    odd = {"self": 1, "params": 2, "body": 3, "endpoint": 4, "model_config": 5, "ключ": 6}
    assert ImageRequest(**{"model": "m", **odd}).params() == odd


def test_our_own_lines() -> None:
    line = {"key": "k", "kind": "video", "model": "anything", "prompt": "p", "metadata": {"a": 1}, "duration": 5}
    request = GenerationRequest.from_dict(line)
    assert request == VideoRequest(model="anything", prompt="p", key="k", metadata={"a": 1}, duration=5)
    assert line["kind"] == "video"  # the caller's line is not touched
    assert GenerationRequest.from_dict(MappingProxyType(line)) == request
    empty = {"model": "gpt-4o-image", "key": None, "metadata": None}
    assert GenerationRequest.from_dict(empty) == ImageRequest(model="gpt-4o-image")


@pytest.mark.parametrize(
    ("url", "cls"),
    [
        ("/v1/images/generations", ImageRequest),
        ("https://api.evolink.ai/v1/videos/generations", VideoRequest),
        ("/v1/audios/generations", AudioRequest),
    ],
)
def test_batch_lines(url: str, cls: type[GenerationRequest]) -> None:
    line = {"custom_id": "k", "method": "POST", "url": url, "body": {"model": "m", "prompt": "p", "n": 2}}
    assert GenerationRequest.from_dict(line) == cls(model="m", prompt="p", key="k", n=2)


NO_REQUESTS: dict[str, Any] = {
    "text": "a prompt",
    "none": None,
    "list": ["a"],
    "empty": {},
    "number-name": {1: 2, "model": "m"},
    "no-model": {"prompt": "p"},
    "model-list": {"model": ["m"]},
    "unknown-model": {"model": "no-such-model-anywhere"},
    "wrong-kind": {"model": "m", "kind": "text"},
    "kind-list": {"model": "m", "kind": ["image"]},
    "batch-no-url": {"custom_id": "k", "body": {"model": "m"}},
    "batch-other-url": {"url": "/v1/chat/completions", "body": {"model": "m"}},
    "batch-edits": {"url": "/v1/images/edits", "body": {"model": "m"}},
    "batch-url-list": {"url": ["/v1/images/generations"], "body": {"model": "m"}},
    "batch-body-text": {"url": "/v1/images/generations", "body": "p"},
    "batch-get": {"url": "/v1/images/generations", "body": {"model": "m"}, "method": "GET"},
    "batch-body-number-name": {"url": "/v1/images/generations", "body": {1: 2, "model": "m"}},
    "batch-id-number": {"custom_id": 5, "url": "/v1/images/generations", "body": {"model": "m"}},
}


@pytest.mark.parametrize("name", NO_REQUESTS)
def test_what_is_no_request_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        GenerationRequest.from_dict(NO_REQUESTS[name])


VALUES = st.none() | st.integers() | st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text())
NAMES = st.sampled_from(["model", "kind", "key", "metadata", "body", "url", "method", "custom_id", "prompt", "self"])


@given(st.dictionaries(NAMES | st.text(), VALUES))
def test_no_line_raises_anything_else(line: dict[str, Any]) -> None:
    try:
        encode_body(GenerationRequest.from_dict(line))
    except InvalidRequestError:
        pass


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("seedance-2.0", "from text use 'seedance-2.0-text-to-video'"),
        ("gpt-4o-imag", "did you mean 'gpt-4o-image'? Else say its kind"),
        ("somebody-elses", "so say its kind: image, video or audio"),
    ],
)
def test_a_line_without_a_kind_whose_model_is_mistyped_hears_what_was_meant(model: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(said)):
        GenerationRequest.from_dict({"model": model, "prompt": "a"})
