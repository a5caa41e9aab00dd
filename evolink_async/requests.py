"""What to generate: frozen requests, and the exact JSON that is sent for them. Nothing here sends anything."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from evolink_async.errors import InvalidRequestError
from evolink_async.types import Kind, invalid

__all__ = ["AudioRequest", "GenerationRequest", "ImageRequest", "VideoRequest"]

_OWN_FIELDS = ("key", "metadata")
_MAX_DEPTH = 64

# What may stand where the service wants a link; it is uploaded when the request is sent.
LocalFile = os.PathLike[str] | bytes

_EXACT = frozenset({str, int, bool, type(None)})  # JSON carries them as they are, or refuses to
_PLAIN = _EXACT | {float}
_UNWRITABLE = (PydanticSerializationError, UnicodeEncodeError, ValueError)
_NO_JSON = "the request holds a value that cannot be written as JSON"

# Names under which the documents want links to media. A `callback_url` is none.
_MEDIA_NAME = re.compile(r"(?!callback_url$)(?:\w*_)?urls?|image_start|image_end|frontal_image", re.ASCII)


class GenerationRequest(BaseModel):
    """What to generate. Use `ImageRequest`, `VideoRequest` or `AudioRequest`, or `from_dict` for data from a file.

    model: the service's model id. prompt: the text, where the model takes one.
    key: your stable name for this request; metadata: anything you want to find again on its outcome. Neither is sent.
    Every other parameter is kept and sent as given. A path or bytes where a link is wanted (in `*_url`, `*_urls`,
    `image_start`, `image_end`, also inside of lists and objects) is uploaded just before the request is sent, and
    removed from the service after the task ended (docs/uploads.md).

    Lists and objects are copied, so that what you change in them later changes no request. A subclass may declare
    parameters as fields of its own; one that is None is not sent.

    Raises `InvalidRequestError` if a field has the wrong type.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="allow", protected_namespaces=(), strict=True, defer_build=True
    )

    kind: ClassVar[Kind]
    _declared: ClassVar[tuple[str, ...]] = ()  # parameters that a subclass of the caller's makes fields of

    model: str = Field(min_length=1, max_length=256)
    prompt: str | None = None
    key: str | None = Field(default=None, min_length=1, max_length=1024)
    metadata: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, /, **data: Any) -> None:
        if type(self) is GenerationRequest:
            raise TypeError("use ImageRequest, VideoRequest, AudioRequest or GenerationRequest.from_dict")
        if not _PLAIN.issuperset(map(type, data.values())):
            data = {name: value if name == "metadata" else _copied(value, name) for name, value in data.items()}
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise invalid(error) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls._declared = tuple(name for name in cls.model_fields if name not in GenerationRequest.model_fields)

    @property
    def endpoint(self) -> str:
        """The path this request is posted to."""
        return _ENDPOINTS[self.kind]

    def params(self) -> dict[str, Any]:
        """Every parameter that is sent, without the model."""
        others = _others(self)
        return dict(others) if self.prompt is None else {"prompt": self.prompt, **others}

    def body(self) -> dict[str, Any]:
        """The JSON object to send. A local file stands in it as it was given: its link is known when it is uploaded."""
        return {"model": self.model, **{name: _copied(value, name) for name, value in self.params().items()}}

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, _without_bytes(value)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationRequest:
        """A request from a line of data: ours (`model`, `kind`?, `key`?, `metadata`?, parameters) or OpenAI's.

        An OpenAI batch line holds `custom_id`, `url` and `body`. Where `kind` is missing the catalogue's entry for
        the model decides it. Raises `InvalidRequestError` for anything that is no request.
        """
        if not isinstance(data, Mapping):
            raise InvalidRequestError(f"a request must be an object with a 'model', got {type(data).__name__}")
        fields = _from_batch_line(data) if "body" in data and "model" not in data else dict(data)
        if not all(isinstance(name, str) for name in fields):
            raise InvalidRequestError("the names of a request's fields must be strings")
        if fields.get("metadata") is None:
            fields.pop("metadata", None)
        model = fields.get("model")
        if not isinstance(model, str):
            got = "" if model is None else f" that is a string, got {model!r:.40}"
            raise InvalidRequestError(f"a request needs a 'model'{got}", param="model")
        return _request_class(fields.pop("kind", None), model)(**fields)


class ImageRequest(GenerationRequest):
    """A request for images: POST /v1/images/generations.

        ImageRequest(model="gpt-4o-image", prompt="a lighthouse", size="1024x1024", key="page-17")

    key and metadata are yours, all else is sent: see `GenerationRequest`.
    """

    kind: ClassVar[Kind] = "image"

    if TYPE_CHECKING:  # the one that type checkers make of a model's fields takes no other parameters

        def __init__(
            self,
            *,
            model: str,
            prompt: str | None = None,
            key: str | None = None,
            metadata: dict[str, Any] = ...,
            **params: Any,
        ) -> None: ...


class VideoRequest(GenerationRequest):
    """A request for a video: POST /v1/videos/generations.

        VideoRequest(model="veo3.1-fast-beta", prompt="waves", key="clip-3")

    key and metadata are yours, all else is sent: see `GenerationRequest`.
    """

    kind: ClassVar[Kind] = "video"

    if TYPE_CHECKING:  # as above

        def __init__(
            self,
            *,
            model: str,
            prompt: str | None = None,
            key: str | None = None,
            metadata: dict[str, Any] = ...,
            **params: Any,
        ) -> None: ...


class AudioRequest(GenerationRequest):
    """A request for music or speech: POST /v1/audios/generations (plural, as the service has it).

        AudioRequest(model="suno-v5-beta", prompt="a sea shanty", key="song-1")

    key and metadata are yours, all else is sent: see `GenerationRequest`.
    """

    kind: ClassVar[Kind] = "audio"

    if TYPE_CHECKING:  # as above

        def __init__(
            self,
            *,
            model: str,
            prompt: str | None = None,
            key: str | None = None,
            metadata: dict[str, Any] = ...,
            **params: Any,
        ) -> None: ...


REQUEST_CLASSES: dict[str, type[GenerationRequest]] = {
    cls.kind: cls for cls in (ImageRequest, VideoRequest, AudioRequest)
}
_ENDPOINTS = {kind: f"/v1/{kind}s/generations" for kind in REQUEST_CLASSES}  # a pool keeps one for each request


def _others(request: GenerationRequest) -> dict[str, Any]:
    """Every parameter but the prompt. Not to be changed."""
    extra = request.__pydantic_extra__ or {}
    if not request._declared:
        return extra
    declared = {name: getattr(request, name) for name in request._declared}
    return {name: value for name, value in declared.items() if value is not None} | extra


def _copied(value: Any, param: str, depth: int = 0) -> Any:
    """The value with lists and objects of its own; what is in them, such as a file, as it is.

    Raises `InvalidRequestError` for what is nested too deeply to be sent, or in itself.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list | tuple):
        _check_depth(depth, param)
        items = [_copied(item, param, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        _check_depth(depth, param)
        return {name: _copied(item, param, depth + 1) for name, item in value.items()}
    return value


def has_local_files(request: GenerationRequest) -> bool:
    """Whether there is something to upload before a request can be sent."""
    if _PLAIN.issuperset(map(type, _others(request).values())):
        return False
    return any(not isinstance(value, str) for _, value in _media_of(request))


def local_files(request: GenerationRequest) -> dict[str, LocalFile]:
    """What is to be uploaded, by where it stands, such as `image_urls[0]`."""
    return {place: value for place, value in _media_of(request) if not isinstance(value, str)}


def media_links(request: GenerationRequest) -> dict[str, str]:
    """The links to media, by where they stand."""
    return {place: value for place, value in _media_of(request) if isinstance(value, str)}


def body_with(request: GenerationRequest, replacements: Mapping[str, Any]) -> dict[str, Any]:
    """The body with other values at these places."""
    body = {"model": request.model, **request.params()}
    if not replacements:
        return body
    return {name: _replaced(value, name, replacements, 0) for name, value in body.items()}


def _media_of(request: GenerationRequest) -> Iterator[tuple[str, str | LocalFile]]:
    for name, value in _others(request).items():
        yield from _media_in(value, name, _MEDIA_NAME.fullmatch(name) is not None, 0)


def _media_in(value: object, place: str, is_media: bool, depth: int) -> Iterator[tuple[str, str | LocalFile]]:
    if isinstance(value, str | bytes | os.PathLike):
        if is_media:
            yield place, value
    elif depth > _MAX_DEPTH:
        return  # it cannot be sent anyway
    elif isinstance(value, Mapping):
        for name, item in value.items():
            named = isinstance(name, str) and _MEDIA_NAME.fullmatch(name) is not None
            yield from _media_in(item, f"{place}.{name}", named, depth + 1)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _media_in(item, f"{place}[{number}]", is_media, depth + 1)


def _replaced(value: Any, place: str, replacements: Mapping[str, Any], depth: int) -> Any:
    if place in replacements:
        return replacements[place]
    if depth > _MAX_DEPTH:
        return value  # it cannot be sent anyway
    if isinstance(value, Mapping):
        return {name: _replaced(item, f"{place}.{name}", replacements, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, f"{place}[{number}]", replacements, depth + 1) for number, item in enumerate(value)]
    return value


def _without_bytes(value: Any) -> Any:
    """The value for a repr, which is no place for megabytes."""
    if isinstance(value, bytes):
        return _Shown(f"<{len(value)} bytes>")
    if isinstance(value, list):
        return [_without_bytes(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_bytes(item) for name, item in value.items()}
    return value


class _Shown(str):
    """A text that is its own repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def encode_body(
    request: GenerationRequest, callback_url: str | None = None, links: Mapping[str, str] | None = None
) -> bytes:
    """The bytes to send, the same for every attempt.

    callback_url: for a request that names none itself. links: of local files, by where they stand. Raises
    `InvalidRequestError` for what JSON cannot carry faithfully: NaN, lone surrogates, unknown objects.
    """
    body = body_with(request, links or {})
    if callback_url is not None and body.get("callback_url") is None:
        body["callback_url"] = callback_url
    if not _EXACT.issuperset(map(type, body.values())):
        _check_body(body)
    try:
        return to_json(body)
    except _UNWRITABLE:
        _check_body(body)  # it knows which
        raise InvalidRequestError(_NO_JSON) from None


def encode_json(value: Any) -> bytes:
    """JSON bytes of plain values. Raises `InvalidRequestError` for what JSON cannot carry faithfully."""
    _check_json(value, "json", 0)
    try:
        return to_json(value)
    except _UNWRITABLE:
        raise InvalidRequestError(_NO_JSON) from None


def _check_body(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        _check_text(name, ascii(name))
        _check_json(value, name, 0)


def _check_json(value: object, param: str, depth: int) -> None:
    if isinstance(value, str):
        _check_text(value, param)
    elif value is None or isinstance(value, (bool, int)):
        return
    elif isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise InvalidRequestError(f"{param}: {value} cannot be sent, give a finite number", param=param)
    elif isinstance(value, Mapping):
        _check_depth(depth, param)
        for name, item in value.items():
            _check_name(name, param)
            _check_json(item, param, depth + 1)
    elif isinstance(value, list | tuple):
        _check_depth(depth, param)
        for item in value:
            _check_json(item, param, depth + 1)
    else:
        given = type(value).__name__
        message = f"{param}: a {given} cannot be sent, give text, numbers, lists or objects"
        if isinstance(value, bytes | os.PathLike):
            message += "; paths and bytes are uploaded where a link is wanted: in *_url and *_urls"
        raise InvalidRequestError(message, param=param)


def _check_depth(depth: int, param: str) -> None:
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"{param}: nested more than {_MAX_DEPTH} levels deep", param=param)


def _check_name(name: object, param: str) -> None:
    if not isinstance(name, str):
        raise InvalidRequestError(f"{param}: the names in an object must be strings, got {name!r}", param=param)
    _check_text(name, param)


def _check_text(text: str, param: str) -> None:
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        message = f"{param}: holds half of a surrogate pair, which is no text; decode it anew"
        raise InvalidRequestError(message, param=param)


def _from_batch_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an OpenAI batch line: custom_id, method, url, body."""
    body, url = line.get("body"), line.get("url")
    if not isinstance(body, Mapping):
        raise InvalidRequestError("a batch line needs an object as 'body'", param="body")
    path = url.rstrip("/") if isinstance(url, str) else ""
    kind = next((kind for kind, endpoint in _ENDPOINTS.items() if path.endswith(endpoint)), None)
    if kind is None:
        expected = ", ".join(_ENDPOINTS.values())
        raise InvalidRequestError(f"a batch line needs a 'url' out of {expected}; got {url!r}", param="url")
    if line.get("method", "POST") != "POST":
        raise InvalidRequestError(f"a batch line's method must be POST, got {line['method']!r}", param="method")
    own = {"key": line.get("custom_id"), "metadata": line.get("metadata") or {}}
    return dict(body) | own | {"kind": kind}


def _request_class(kind: object, model: str) -> type[GenerationRequest]:
    if kind is None:
        from evolink_async.catalog import kind_of  # the catalogue is read only when a kind must be looked up

        kind = kind_of(model)
    if kind is None:
        raise _unknown_model(model)
    cls = REQUEST_CLASSES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise InvalidRequestError(f"kind must be image, video or audio, got {kind!r}", param="kind")
    return cls


def _unknown_model(model: str) -> InvalidRequestError:
    """What to say of a model without a kind that the catalogue doesn't know."""
    from evolink_async.catalog import check, nearest

    for finding in check("image", model, {}):
        if finding.severity == "error":  # a name that is known to be wrong, whatever the kind
            return InvalidRequestError(finding.message, param="model")
    guesses = " or ".join(map(repr, nearest(model)))
    meant = f"; did you mean {guesses}? Else say its kind" if guesses else ", so say its kind"
    return InvalidRequestError(
        f"the model {model!r} isn't in the catalogue{meant}: image, video or audio", param="kind"
    )
