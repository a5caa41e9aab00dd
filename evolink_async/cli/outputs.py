"""Writing outcomes down: results.jsonl, errors.jsonl, and one JSON object a line on standard output."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pydantic_core import to_json

from evolink_async.cli.text import clean, escaped, readable
from evolink_async.errors import APIStatusError, BudgetExceededError, ConfigurationError, EvoLinkError
from evolink_async.report.files import ERRORS, LEDGER, RESULTS
from evolink_async.requests import GenerationRequest, body_with, local_files
from evolink_async.types import Task

if TYPE_CHECKING:
    from evolink_async.pool import Outcome  # by name only: `job` commands start without it


class OutputFolder:
    """A folder that takes each outcome as it arrives: completed ones in results.jsonl, all others in errors.jsonl.

    A completed one whose files could not be saved has an `error` in results.jsonl.

    Every line is one write to the file, so what was written stays whatever happens to the process. A line of
    errors.jsonl is a request line with the field `error`, and can be given to `run` again. The ledger of the job lies
    beside them; where there is one, the files are written anew, since the ledger tells every outcome again.

    Raises `ConfigurationError` on entering if the folder cannot be used, or holds such files and no ledger.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder)
        self.ledger = self.path / LEDGER
        self._files = ExitStack()
        self._made = self._begun = False

    def __enter__(self) -> Self:
        refuse_no_text(self.path)
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            refuse_without_ledger(self.path)
        except (FileExistsError, NotADirectoryError):
            raise ConfigurationError(f"cannot write into {self.path}: it is, or lies below, a file") from None
        except OSError as error:
            raise ConfigurationError(f"cannot write into {self.path}: {error.strerror or error}") from None
        return self

    def begin(self) -> None:
        """The job is ours now, so the files are. Raises `ConfigurationError` if they cannot be written."""
        try:
            self._results = self._files.enter_context(open(self.path / RESULTS, "wb", buffering=0))  # noqa: SIM115
            self._errors = self._files.enter_context(open(self.path / ERRORS, "wb", buffering=0))  # noqa: SIM115
        except OSError as error:
            raise ConfigurationError(f"cannot write into {self.path}: {error.strerror or error}") from None
        self._begun = True

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()
        if self._begun and not self._written(RESULTS) and not self._written(ERRORS):
            # Nothing happened, so nothing should be left behind.
            for name in (RESULTS, ERRORS):
                (self.path / name).unlink(missing_ok=True)
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def take(self, outcome: Outcome) -> None:
        """Write an outcome down. Raises `OSError`, e.g. when the disk is full."""
        if outcome.ok or outcome.status == "completed":  # generated and paid for, if not saved: never to be sent again
            _write(self._results, result_line(outcome))
        else:
            _write(self._errors, error_line(outcome))

    def refused(self, line: Mapping[str, Any]) -> None:
        """Write down a line that was not sent."""
        _write(self._errors, line)

    def _written(self, name: str) -> bool:
        try:
            return (self.path / name).stat().st_size > 0
        except OSError:
            return True  # whatever is the matter, removing files is not the answer


def refuse_no_text(folder: str | Path) -> None:
    """Raises `ConfigurationError` for a name that no line of JSON can hold: the paths of results go into such lines."""
    name = readable(str(folder))
    if name != str(folder):
        raise ConfigurationError(f"--out {name}: the name is no UTF-8; give another folder")


def refuse_without_ledger(folder: Path) -> None:
    """Raises `ConfigurationError` for a folder with results of a run whose ledger is gone."""
    for name in (RESULTS, ERRORS):
        if (folder / name).exists() and not (folder / LEDGER).exists():
            raise ConfigurationError(
                f"{folder / name} exists already without its ledger {LEDGER}, and running again could pay "
                f"again for what is in it: choose a new folder (give {folder / ERRORS} as the file to send "
                "only what went wrong)"
            )


def result_line(outcome: Outcome) -> dict[str, Any]:
    """What results.jsonl and --json say of an outcome."""
    request, task = outcome.request, outcome.task
    line: dict[str, Any] = {
        "key": outcome.key,
        "index": outcome.index,
        "identity": outcome.identity,
        "status": outcome.status,
        "kind": request.kind if request else task.kind if task else None,
        "model": request.model if request else task.model if task else None,
        "prompt": request.prompt if request else None,
        "task_id": task.id if task else None,
        "urls": outcome.urls,
        "files": [str(file) for file in outcome.files],
        "credits": as_number(outcome.credits),
        "attempts": outcome.attempts,
        "submitted_at": outcome.submitted_at,
        "finished_at": outcome.finished_at,
        "metadata": request.metadata if request else {},
    }
    if outcome.error is not None:
        line["error"] = error_fields(outcome)
    return line


def error_line(outcome: Outcome) -> dict[str, Any]:
    """A request line that `run` accepts again, with what went wrong."""
    assert outcome.request is not None
    return request_line(outcome.request) | {"error": error_fields(outcome)}


def request_line(request: GenerationRequest) -> dict[str, Any]:
    """A request as a line of ours."""
    key = {} if request.key is None else {"key": request.key}
    metadata = {"metadata": request.metadata} if request.metadata else {}
    paths = {place: os.fspath(file) for place, file in local_files(request).items() if isinstance(file, os.PathLike)}
    return key | {"kind": request.kind} | body_with(request, paths) | metadata


def bad_line(line: int, reason: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """A line that `run` refused, as it was, with the reason; what an earlier run said of it stays."""
    earlier = data.get("error")
    if isinstance(earlier, Mapping) and "status" in earlier:
        return {**data, "line": line}
    error = {"status": "rejected", "code": "bad_line", "message": reason, "task_id": None, "idempotency_key": None}
    return {**data, "line": line, "error": error}


def error_fields(outcome: Outcome) -> dict[str, Any]:
    """The object `error` of a line."""
    error = outcome.error
    return {
        "status": outcome.status,
        "code": error.code if error else None,
        "message": message_of(error) if error else None,
        "task_id": outcome.task.id if outcome.task else None,
        "idempotency_key": outcome.idempotency_key if outcome.attempts else None,
        "index": outcome.index,
        "identity": outcome.identity,
    }


def message_of(error: BaseException) -> str:
    """The sentence of an error, for a line that holds its code and ids beside it."""
    return error.message if isinstance(error, EvoLinkError) else str(error)


def task_line(task: Task) -> dict[str, Any]:
    """What --json says of a task."""
    return {
        "task_id": task.id,
        "status": task.status,
        "progress": task.progress,
        "kind": task.kind,
        "model": task.model,
        "urls": task.urls,
        "credits": as_number(task.usage.credits_used),
        "created": task.created,
        "error": {"code": task.error.code, "message": task.error.message} if task.error else None,
    }


def stopped_by_account(error: BaseException | None) -> bool:
    """Whether it is the account or the budget, not the request, that stands in the way (exit code 3)."""
    refused = isinstance(error, APIStatusError) and error.status_code in (401, 402, 403)
    return refused or isinstance(error, BudgetExceededError)


def encoded(line: Mapping[str, Any]) -> bytes:
    """One line of JSON, in UTF-8."""
    return to_json(line, serialize_unknown=True) + b"\n"


def as_number(credits: Decimal | None) -> float | int | None:
    """Credits as a JSON number (pydantic writes decimals as text)."""
    if credits is None:
        return None
    return int(credits) if credits == credits.to_integral_value() else float(credits)


def _write(file: Any, line: Mapping[str, Any]) -> None:
    rest = memoryview(encoded(line))
    while rest:  # one write as long as the disk takes it whole
        rest = rest[file.write(rest) :]


class Standard:
    """Standard output: data, in UTF-8 whatever the console's encoding, and silence once nobody reads it.

    A terminal gets it without control characters, in its own encoding. `instead`: where the data goes while a live view
    has the same terminal, as it would tear the picture.
    """

    def __init__(self, instead: Callable[[str], object] | None = None) -> None:
        self.broken = sys.stdout is None or sys.stdout.closed
        self._instead = instead
        self._to_terminal = to_terminal()

    def line(self, text: str) -> None:
        """Write a line of foreign text."""
        self.rendered(clean(text) if self._to_terminal else text)

    def json(self, line: Mapping[str, Any]) -> None:
        """Write an object as a line of JSON."""
        text = encoded(line).decode().removesuffix("\n")
        self.rendered(escaped(text) if self._to_terminal else text)

    def rendered(self, text: str) -> None:
        """Write a line that is harmless already."""
        if self._instead is not None:
            self._instead(text)
            return
        if self.broken:
            return
        try:
            if self._to_terminal:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
            else:
                sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")
                sys.stdout.buffer.flush()
        except (BrokenPipeError, ValueError):
            self.broken = True
            silence_stdout()
        except OSError as error:
            silence_stdout()  # else it is written once more at the end, and fails again
            raise OSError(error.errno, f"cannot write to standard output: {error.strerror or error}") from None


def is_terminal(stream: Any) -> bool:
    """Whether a stream is read by a person."""
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:  # closed
        return False


def to_terminal() -> bool:
    """Whether standard output is read by a person."""
    return is_terminal(sys.stdout)


def silence_stdout() -> None:
    """Point standard output at nothing, so that the interpreter's last flush doesn't complain about a closed pipe."""
    silence(sys.stdout)


def silence(stream: Any) -> None:
    """Point a standard stream at nothing."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
    except (OSError, ValueError, AttributeError):
        pass  # no real file stands behind it: there is nothing to flush into
