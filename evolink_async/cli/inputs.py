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
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from evolink_async.cli.entries import (
    BadInput,
    BadLine,
    Defaults,
    Entry,
    columns_of,
    is_column,
    own_or_converted,
    request_from,
)
from evolink_async.cli.parquet import parquet_entries
from evolink_async.errors import EvoLinkError
from evolink_async.requests import GenerationRequest

LONGEST_LINE = 64 * 2**20  # with inline images as data URLs lines get long; beyond this it is no list of requests
SHOWN = 20  # bad lines and warnings told one by one; the others are counted
DELIMITERS = ",;\t"
# Outcomes after which a task exists or may exist: sent again they may be paid twice.
UNSETTLED = ("unfinished", "unknown", "lost")


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
    """A file of requests that can be read more than once. Close it.

    Of text only what was there at first is read: lines that a program appends meanwhile were not checked.
    """

    def __init__(self, file: IO[bytes], name: str, defaults: Defaults) -> None:
        self._file = file
        self.name = name
        self._defaults = defaults
        self.unit = "line"  # what an entry's number counts
        self._skip, self._is_csv = 0, False
        try:
            self._end = file.seek(0, os.SEEK_END)
            file.seek(0)
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
            return parquet_entries(self._file, self.name, self._defaults)
        if self._is_csv:
            return _csv_entries(self._file, self._end, self.name, self._defaults)
        return _json_entries(self._file, self._end, self._defaults)


def _kept(stream: Any) -> IO[bytes]:
    """A temporary file with all that a buffered stream holds. Its end is asked for once: a terminal tells it once."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (Input closes it)
    while data := stream.read1(1 << 16):
        file.write(data)
    file.seek(0)
    return file


def open_input(name: str, defaults: Defaults) -> Input:
    """The file, or standard input for `-`. Raises `BadInput`."""
    file: IO[bytes]
    try:
        if name == "-":
            if sys.stdin is None or sys.stdin.closed:
                raise BadInput("standard input is closed; give a file")
            return Input(_kept(sys.stdin.buffer), "standard input", defaults)
        file = open(name, "rb")  # noqa: SIM115
        if not file.seekable():  # a pipe such as <(generate): keep what it holds
            with file as pipe:
                file = _kept(pipe)
        return Input(file, Path(name).name, defaults)
    except OSError as error:
        raise BadInput(f"cannot read {name}: {error.strerror or error}") from None


# JSON lines


def _json_entries(file: IO[bytes], end: int, defaults: Defaults) -> Iterator[Entry]:
    for number, line in _lines(file, end):
        data: Mapping[str, Any] = {}
        try:
            if line is None:
                raise BadLine(f"longer than {LONGEST_LINE >> 20} MiB")
            data = _parsed(line)
            request, warnings = _checked(data, defaults)
        except (BadLine, EvoLinkError) as error:
            yield Entry(number, reason=_why(error), data=data or _as_text(line))
        else:
            yield Entry(number, request, data=data, warnings=warnings)


def _lines(file: IO[bytes], end: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines that hold anything; None in place of one that is too long."""
    number = 0
    while line := _line(file, LONGEST_LINE + 1, end):
        number += 1
        if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := _line(file, 2**20, end)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif stripped := line.strip(b" \t\r\n"):
            yield number, stripped


def _line(file: IO[bytes], most: int, end: int) -> bytes:
    """The next line, at most so much of it, none behind the end."""
    return file.readline(min(most, max(end - file.tell(), 0)))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        data = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        try:
            line.decode()
        except UnicodeDecodeError:
            raise BadLine("not UTF-8; save the file as UTF-8 and try again") from None
        whole = "; a request must stand whole on one line" if str(error).startswith("EOF") else ""
        raise BadLine(f"not JSON: {_of_line(str(error))}{whole}") from None
    if isinstance(data, list):
        raise BadLine("a list; put each request on a line of its own")
    if not isinstance(data, dict):
        raise BadLine('not an object such as {"model": ..., "prompt": ...}')
    return data


def _of_line(message: str) -> str:
    """The parser counts lines within the line; only the column tells something."""
    return re.sub(r" at line \d+ column (\d+)", r" at column \1", message)


def _checked(data: Mapping[str, Any], defaults: Defaults) -> tuple[GenerationRequest, tuple[str, ...]]:
    if "identity" in data and "task_id" in data:  # a line of our results.jsonl or of `job export`
        raise BadLine(
            f"an outcome, no request (task {data['task_id']}): it would be paid for again; give the file of the first "
            "time to go on, or errors.jsonl to send what went wrong"
        )
    if isinstance(error := data.get("error"), Mapping) and "status" in error:  # a line of our errors.jsonl
        if error["status"] in UNSETTLED and not defaults.resend_unsettled:
            raise BadLine(_unsettled(error))
        data = {name: value for name, value in data.items() if name not in ("error", "line")}
        if data.keys() <= {"text"} and error.get("code") == "bad_line":
            raise BadLine(f"was no request, and still is none: {error.get('message')}")
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


# CSV


def _csv_entries(file: IO[bytes], end: int, name: str, defaults: Defaults) -> Iterator[Entry]:
    lines = _Text(file, end, name)
    delimiter, header = _header(lines, name)
    for place, cell in enumerate(header, 1):
        if not cell:
            raise BadInput(f"{name}: column {place} has no name in the first line; give it one or take it out")
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
                yield Entry(number, reason=f"not CSV: {_of_csv(error)}")
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
            raise BadLine(
                f"{len(row)} cells under {len(columns)} column{'s' * (len(columns) != 1)}; "
                "a text that holds the delimiter must stand in quotes"
            )
        fields = {column: cell for column, cell in zip(columns, row, strict=False) if cell.strip()}
        model = fields.get("model", defaults.model)
        fields = {column: own_or_converted(model, column, cell) for column, cell in fields.items()}
        request, warnings = request_from(fields, defaults)
    except (BadLine, EvoLinkError) as error:
        return Entry(number, reason=_why(error), data=fields)
    return Entry(number, request, data=fields, warnings=warnings)


class _Text(Iterator[str]):
    """The lines of a UTF-8 file, counted; broken bytes are a `BadInput` that says where."""

    def __init__(self, file: IO[bytes], end: int, name: str) -> None:
        self._file, self._end, self._name, self.number = file, end, name, 0

    def __next__(self) -> str:
        line = _line(self._file, LONGEST_LINE, self._end)
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
    try:
        readings = [(delimiter, next(csv.reader([first], delimiter=delimiter))) for delimiter in DELIMITERS]
    except csv.Error as error:
        raise BadInput(f"{name}: the first line must name the columns: {_of_csv(error)}") from None
    delimiter, cells = max(readings, key=lambda reading: len(reading[1]))
    return delimiter, [cell.strip() for cell in cells]


def _of_csv(error: csv.Error) -> str:
    """The reason in our words where Python's speak of how it opens files."""
    if "new-line character" in str(error):
        return "a carriage return stands outside of quotes; save the file with lines that end with LF or CRLF"
    return str(error)


# All


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
    if start.startswith(b"PK\x03\x04"):
        raise BadInput(f"{name} is an Excel workbook or another archive: save it as 'CSV UTF-8' and give that file")
    if start.startswith(b"\x1f\x8b"):
        raise BadInput(f"{name} is compressed; unpack it first")
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
