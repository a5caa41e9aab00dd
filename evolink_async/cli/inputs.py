"""Reading requests from a file: JSON lines, CSV, and Parquet next door, checked line by line. Nothing here is sent.

A file is read twice, once to check all of it and once to send it, so that neither needs memory for more than a line
(and 16 bytes for each key, to find those that come twice). What cannot be read twice is copied to a temporary file.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import os
import re
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic_core import from_json

from evolink_async.catalog import check, get_model
from evolink_async.errors import EvoLinkError, InvalidRequestError
from evolink_async.requests import GenerationRequest, body_with, encode_body, local_files, media_links

if TYPE_CHECKING:
    from evolink_async.catalog import ParamSpec

__all__ = ["BadInput", "Defaults", "Entry", "Input", "Report", "convert", "open_input", "request_from"]

LONGEST_LINE = 64 * 2**20  # with inline images as data URLs lines get long; beyond this it is no list of requests
SHOWN = 20  # bad lines and warnings told one by one; the others are counted
KEY_COLUMNS = ("key", "custom_id", "id")
DELIMITERS = ",;\t"
# Outcomes after which a task exists or may exist: sent again they may be paid twice.
UNSETTLED = ("unfinished", "unknown", "lost")

_COLUMN = re.compile(r"[A-Za-z_][\w.-]*\Z", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64,}={0,2}\s*\Z", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?\Z", re.ASCII)


class BadInput(Exception):
    """An input as a whole cannot be used; the message is one sentence."""


class _BadLine(Exception):
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


@dataclass(slots=True)
class Report:
    """What a first reading found."""

    requests: int = 0
    models: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, model)
    bad: list[Entry] = field(default_factory=list)  # the first SHOWN
    bad_count: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    warned_first: dict[str, int] = field(default_factory=dict)  # the line where a warning came first
    repeated: dict[int, int] = field(default_factory=dict)  # a line whose key stood in an earlier one -> that line

    def note(self, entry: Entry) -> None:
        """Count a line."""
        if entry.request is None:
            self.bad_count += 1
            if len(self.bad) < SHOWN:
                self.bad.append(entry)
            return
        self.requests += 1
        self.models[entry.request.kind, entry.request.model] += 1
        for warning in entry.warnings:
            if warning in self.warned_first or len(self.warned_first) < 1000:
                self.warnings[warning] += 1
                self.warned_first.setdefault(warning, entry.line)


class Input:
    """A file of requests that can be read more than once. Close it."""

    def __init__(self, file: IO[bytes], name: str, defaults: Defaults) -> None:
        self._file = file
        self.name = name
        self._defaults = defaults
        self.unit = "line"  # what an entry's number counts
        self._skip, self._is_csv = 0, False
        try:
            if _is_parquet(file, name):
                self.unit = "row"
            else:
                self._skip, self._is_csv = _kind_of_file(file, name)
        except BaseException:
            file.close()
            raise

    def check(self, limit: int | None = None) -> Report:
        """Read all of it (up to `limit` requests): what would be sent, and every line that could not be."""
        report, keys = Report(), _Keys()
        for entry in self._entries():
            if entry.request is not None and entry.request.key is not None:
                keys.add(entry.request.key, entry.line)
            report.note(entry)
            if report.requests == limit:
                break
        if repeated := keys.repeated():
            report = Report(repeated=repeated)
            for entry in self.read(repeated, limit):
                report.note(entry)
        return report

    def read(self, repeated: Mapping[int, int], limit: int | None = None) -> Iterator[Entry]:
        """The entries again, lines with repeated keys as bad ones."""
        requests = 0
        for entry in self._entries():
            if entry.request is not None:
                requests += 1
                if entry.line in repeated:
                    entry = Entry(entry.line, reason=_repeated(self.unit, repeated[entry.line]), data=entry.data)
            yield entry
            if requests == limit:
                return

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Input:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _entries(self) -> Iterator[Entry]:
        self._file.seek(self._skip)
        if self.unit == "row":
            from evolink_async.cli.parquet import parquet_entries

            return parquet_entries(self._file, self.name, self._defaults)
        if self._is_csv:
            return _csv_entries(self._file, self.name, self._defaults)
        return _json_entries(self._file, self._defaults)


def open_input(name: str, defaults: Defaults) -> Input:
    """The file, or standard input for `-`. Raises `BadInput`."""
    file: IO[bytes]
    try:
        if name == "-":
            if sys.stdin is None or sys.stdin.closed:
                raise BadInput("standard input is closed; give a file")
            file = tempfile.TemporaryFile()  # noqa: SIM115  (Input closes it)
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.seek(0)
            return Input(file, "standard input", defaults)
        file = open(name, "rb")  # noqa: SIM115
        if not file.seekable():  # a pipe such as <(generate): keep what it holds
            with file as pipe:
                file = tempfile.TemporaryFile()  # noqa: SIM115
                shutil.copyfileobj(pipe, file)
                file.seek(0)
        return Input(file, Path(name).name, defaults)
    except OSError as error:
        raise BadInput(f"cannot read {name}: {error.strerror or error}") from None


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


# JSON lines


def _json_entries(file: IO[bytes], defaults: Defaults) -> Iterator[Entry]:
    for number, line in _lines(file):
        data: Mapping[str, Any] = {}
        try:
            if line is None:
                raise _BadLine(f"longer than {LONGEST_LINE >> 20} MiB")
            data = _parsed(line)
            request, warnings = _checked(data, defaults)
        except (_BadLine, EvoLinkError) as error:
            yield Entry(number, reason=_why(error), data=data or _as_text(line))
        else:
            yield Entry(number, request, data=data, warnings=warnings)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines that hold anything; None in place of one that is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif stripped := line.strip(b" \t\r\n"):
            yield number, stripped


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        data = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise _BadLine(f"not JSON: {_of_line(str(error))}") from None
    if isinstance(data, list):
        raise _BadLine("a list; put each request on a line of its own")
    if not isinstance(data, dict):
        raise _BadLine('not an object such as {"model": ..., "prompt": ...}')
    return data


def _of_line(message: str) -> str:
    """The parser counts lines within the line; only the column tells something."""
    return re.sub(r" at line \d+ column (\d+)", r" at column \1", message)


def _checked(data: Mapping[str, Any], defaults: Defaults) -> tuple[GenerationRequest, tuple[str, ...]]:
    if isinstance(error := data.get("error"), Mapping) and "status" in error:  # a line of our errors.jsonl
        if error["status"] in UNSETTLED and not defaults.resend_unsettled:
            raise _BadLine(_unsettled(error))
        data = {name: value for name, value in data.items() if name not in ("error", "line")}
    return request_from(data, defaults)


def _unsettled(error: Mapping[str, Any]) -> str:
    task_id = error.get("task_id")
    if error["status"] == "unfinished" and task_id:
        return f"was sent already: task {task_id}, see `evolink-async wait {task_id}` (--resend-unsettled pays again)"
    if task_id:
        return f"was sent already: task {task_id}, which the service then lost (--resend-unsettled pays again)"
    return (
        "was sent already and its answer lost, so it may be running and paid for: look at your account's tasks "
        "(--resend-unsettled may pay twice)"
    )


def _with_defaults(fields: Mapping[str, Any], defaults: Defaults) -> dict[str, Any]:
    data = dict(fields)
    body = data.get("body")
    if "model" not in data and isinstance(body, Mapping):  # OpenAI's batch lines; their url says the kind
        if "model" not in body and defaults.model is not None:
            data["body"] = {"model": defaults.model} | dict(body)
        return data
    if "model" not in data:
        if defaults.model is None:
            raise InvalidRequestError("a request needs a 'model': add it to the line or give --model", param="model")
        data["model"] = defaults.model
    if defaults.kind is not None:
        data.setdefault("kind", defaults.kind)
    return data


# CSV


def _csv_entries(file: IO[bytes], name: str, defaults: Defaults) -> Iterator[Entry]:
    lines = _Text(file, name)
    delimiter, header = _header(lines, name)
    for cell in header:
        if not is_column(cell):
            raise BadInput(
                f"{name}: the first line must name the columns, such as prompt or model; {cell[:60]!r} is no such name"
            )
    columns = columns_of(header, name)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        while True:
            number = lines.number + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield Entry(number, reason=f"not CSV: {error}")
                # Where the quoting is broken nothing that follows can be told apart.
                yield Entry(lines.number + 1, reason="not read: the lines before could not be told apart")
                return
            if row is None:
                return
            if any(cell.strip() for cell in row):
                yield _csv_entry(number, row, columns, defaults)
    finally:
        csv.field_size_limit(before)


def _csv_entry(number: int, row: list[str], columns: list[str], defaults: Defaults) -> Entry:
    fields: dict[str, Any] = {}
    try:
        if len(row) > len(columns):
            raise _BadLine(
                f"{len(row)} cells under {len(columns)} column{'s' * (len(columns) != 1)}; "
                "a text that holds the delimiter must stand in quotes"
            )
        fields = {column: cell for column, cell in zip(columns, row, strict=False) if cell.strip()}
        model = fields.get("model", defaults.model)
        fields = {column: _own_or_converted(model, column, cell) for column, cell in fields.items()}
        request, warnings = request_from(fields, defaults)
    except (_BadLine, EvoLinkError) as error:
        return Entry(number, reason=_why(error), data=fields)
    return Entry(number, request, data=fields, warnings=warnings)


class _Text(Iterator[str]):
    """The lines of a UTF-8 file, counted; broken bytes are a `BadInput` that says where."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name, self.number = file, name, 0

    def __next__(self) -> str:
        line = self._file.readline(LONGEST_LINE)
        if not line:
            raise StopIteration
        self.number += 1
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise BadInput(
                f"{self._name}, line {self.number}: not UTF-8; save the file as 'CSV UTF-8' and try again"
            ) from None


def _header(lines: _Text, name: str) -> tuple[str, list[str]]:
    """The delimiter that divides the first line into most cells, and those cells."""
    first = next(lines, None)
    while first is not None and not first.strip():
        first = next(lines, None)
    if first is None:
        raise BadInput(f"{name} is empty")
    readings = [(delimiter, next(csv.reader([first], delimiter=delimiter))) for delimiter in DELIMITERS]
    delimiter, cells = max(readings, key=lambda reading: len(reading[1]))
    return delimiter, [cell.strip() for cell in cells]


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


def _own_or_converted(model: str | None, column: str, cell: str) -> Any:
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


# Both


def _is_parquet(file: IO[bytes], name: str) -> bool:
    """By its first bytes, or by its name: then whatever is wrong with it is said by who reads Parquet."""
    start = file.read(4)
    file.seek(0)
    return start == b"PAR1" or (bool(start) and Path(name).suffix.lower() in (".parquet", ".pq"))


def _kind_of_file(file: IO[bytes], name: str) -> tuple[int, bool]:
    """How many bytes of byte order mark to skip, and whether it is CSV."""
    start = file.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[1:2] == b"\0":
        raise BadInput(f"{name} is UTF-16; save it as UTF-8")
    skip = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    if not start[skip:].strip() and len(start) < 4096:
        raise BadInput(f"{name} is empty")
    suffix = Path(name).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return skip, True
    looks_like_json = start[skip:].lstrip()[:1] in (b"{", b"[")
    return skip, not looks_like_json and suffix not in (".jsonl", ".ndjson", ".json")


def _why(error: Exception) -> str:
    return error.message if isinstance(error, EvoLinkError) else str(error)


def _as_text(line: bytes | None) -> dict[str, Any]:
    return {} if line is None else {"text": line[:10_000].decode(errors="replace")}


def _repeated(unit: str, earlier: int) -> str:
    return f"its key stands in {unit} {earlier} already; a key names one request"


class _Keys:
    """Finds keys that come twice, with 16 bytes for each. (Two different ones share 64 bits once in 10^7 files.)"""

    def __init__(self) -> None:
        self._hashes, self._lines = array("Q"), array("Q")

    def add(self, key: str, line: int) -> None:
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))
        self._lines.append(line)

    def repeated(self) -> dict[int, int]:
        """Each line whose key stood in an earlier one, and the first such line."""
        hashes, lines = self._hashes, self._lines
        found: dict[int, int] = {}
        order = sorted(range(len(hashes)), key=hashes.__getitem__)  # stable: equal ones stay in the file's order
        first = -1
        for position in order:
            if first >= 0 and hashes[first] == hashes[position]:
                found[lines[position]] = lines[first]
            else:
                first = position
        return found
