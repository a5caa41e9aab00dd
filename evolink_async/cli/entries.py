"""What a line or a row of an input stands for: a request, or the reason why it is none. Pure, but for local files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from evolink_async.catalog import check, get_model
from evolink_async.errors import InvalidRequestError
from evolink_async.requests import GenerationRequest, body_with, encode_body, local_files, media_links

if TYPE_CHECKING:
    from evolink_async.catalog import ParamSpec

KEY_COLUMNS = ("key", "custom_id", "id")
_COLUMN = re.compile(r"[A-Za-z_][\w.-]*\Z", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64,}={0,2}\s*\Z", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?\Z", re.ASCII)


class BadInput(Exception):
    """An input as a whole cannot be used; the message is one sentence."""


class BadLine(Exception):
    """One line is no request; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the command line says about lines that don't say it themselves."""

    model: str | None = None
    kind: str | None = None
    lenient_hosts: bool = False  # a service on this machine may fetch from this machine
    folder: str = ""  # where relative paths of local files begin
    resend_unsettled: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: its number and either a request or the reason why it is none.

    data: the line's object as far as it could be read, `error` included, for writing it down again.
    """

    line: int
    request: GenerationRequest | None = None
    reason: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def request_from(fields: Mapping[str, Any], defaults: Defaults) -> tuple[GenerationRequest, tuple[str, ...]]:
    """The checked request of a line's fields, and warnings. Raises `InvalidRequestError`."""
    request = _with_files(GenerationRequest.from_dict(_with_defaults(fields, defaults)), defaults.folder)
    encode_body(request, links=dict.fromkeys(local_files(request), "https://"))
    findings = check(request.kind, request.model, request.params(), allow_private_hosts=defaults.lenient_hosts)
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise InvalidRequestError("; ".join(errors))
    return request, tuple(str(finding) for finding in findings)


def _with_files(request: GenerationRequest, folder: str) -> GenerationRequest:
    """The request with paths where it names local files in the place of links.

    The file may be anywhere: what is no image, video or audio file by its first bytes is refused, so that a list from
    elsewhere cannot have a password file uploaded.
    """
    texts = {place: text for place, text in media_links(request).items() if _may_be_path(text)}
    if not texts:
        return request
    from evolink_async.saving.content import ENDINGS  # most files name none
    from evolink_async.saving.upload import glance

    files: dict[str, Path] = {}
    for place, text in texts.items():
        path = Path(os.path.abspath(os.path.join(folder, text)))
        try:
            exists = path.exists()
        except (OSError, ValueError):  # too long for a name, such as an inline picture
            exists = False
        if exists:
            try:
                glance(path)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"{place}: {error.message}") from None
            files[place] = path
        elif "/" in text or path.suffix.lower().lstrip(".") in ENDINGS:
            raise InvalidRequestError(f"{place}: no file {str(path)!r}; a link must begin with https://")
    return type(request)(key=request.key, metadata=request.metadata, **body_with(request, files))


def _may_be_path(text: str) -> bool:
    is_link = _SCHEME.match(text) is not None and _DRIVE.match(text) is None
    return bool(text) and not is_link and not _BASE64.match(text)


def _with_defaults(fields: Mapping[str, Any], defaults: Defaults) -> dict[str, Any]:
    data = dict(fields)
    if data.get("model") is None:
        data.pop("model", None)
    body = data.get("body")
    if "model" not in data and isinstance(body, Mapping):  # OpenAI's batch lines; their url says the kind
        if body.get("model") is None and defaults.model is not None:
            data["body"] = dict(body) | {"model": defaults.model}
        return data
    if "model" not in data:
        if defaults.model is None:
            raise InvalidRequestError("a request needs a 'model': add it to the line or give --model", param="model")
        data["model"] = defaults.model
    if defaults.kind is not None:
        data.setdefault("kind", defaults.kind)
    return data


# Columns and cells


def is_column(name: str) -> bool:
    """Whether it may be the name of a parameter."""
    return _COLUMN.match(name) is not None


def columns_of(header: list[str], name: str) -> list[str]:
    """The fields that columns of these names stand for. Raises `BadInput`."""
    if len(header) == 1 and header[0].lower() not in ("model", *KEY_COLUMNS):
        return ["prompt"]
    known = ("prompt", "model", "kind", "metadata", *KEY_COLUMNS)
    columns = [cell.lower() if cell.lower() in known else cell for cell in header]
    keys = [column for column in columns if column in KEY_COLUMNS]
    if len(keys) > 1:
        raise BadInput(f"{name}: {' and '.join(keys)} are columns for the same thing, keep one")
    columns = ["key" if column in KEY_COLUMNS else column for column in columns]
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise BadInput(f"{name}: the column {twice[0]} stands there twice")
    return columns


def own_or_converted(model: str | None, column: str, cell: str) -> Any:
    if column in ("model", "kind", "key"):
        return cell.strip()
    if column == "prompt":
        return cell
    if column == "metadata":
        return json_or(cell, cell)
    return convert(model, column, cell)


def convert(model: str | None, param: str, text: str) -> Any:
    """A cell's or option's text as the type the catalogue documents for the model's parameter.

    Where nothing is documented, what reads as a JSON number, boolean, list or object becomes one. What cannot be
    converted stays text, and the check says what is wrong with it.
    """
    known = get_model(model) if model else None
    spec = known.params.get(param) if known is not None else None
    if spec is not None:
        return _typed(spec, text)
    if param.endswith("_urls"):
        return json_or(text, _divided(text, links=True))
    bare = text.strip()
    if bare in ("true", "false") or _NUMBER.match(bare) or bare[:1] in ("[", "{"):
        return json_or(bare, text)
    return text


def _typed(spec: ParamSpec, text: str) -> Any:
    bare = text.strip()
    if "string" in spec.types and (spec.types == ("string",) or bare in spec.enum or bare in spec.also):
        # A word of a list is meant without the blanks around it; free text is left as it is.
        return bare if spec.enum or spec.pixels is not None or spec.format is not None else text
    if "boolean" in spec.types and bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    if "array" in spec.types:
        if bare.startswith("["):
            return json_or(bare, text)
        items = spec.items
        parts = _divided(text, links=items is not None and items.format == "uri")
        return [_typed(items, part) for part in parts] if items is not None else parts
    if "object" in spec.types and bare.startswith("{"):
        return json_or(bare, text)
    if _NUMBER.match(bare) and ("number" in spec.types or "integer" in spec.types):
        value = json_or(bare, text)
        return int(value) if isinstance(value, float) and "number" not in spec.types and value.is_integer() else value
    return text


def _divided(text: str, *, links: bool) -> list[str]:
    """The parts of a cell with several values: divided by `|`, links also by blanks, which paths may hold."""
    parts = re.split(r"[|\s]+", text) if links and ":" in text else text.split("|")
    return [part.strip() for part in parts if part.strip()]


def json_or(text: str, otherwise: Any) -> Any:
    """What a text of JSON holds; `otherwise` for any other text."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return otherwise
