"""What the service tells us, as frozen values that tolerate every shape the service is known to send."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from functools import cache, lru_cache
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError, model_validator

from evolink_async.errors import InvalidRequestError

__all__ = [
    "CreditBalance",
    "Credits",
    "KeyCredits",
    "Kind",
    "Task",
    "TaskFailure",
    "TaskInfo",
    "TaskStatus",
    "UploadedFile",
    "Usage",
]

Kind = Literal["image", "video", "audio"]

# The vendor's own check of ids, and no mere dots, which would lead elsewhere in a path. Anything else in a 2xx answer
# is not a task.
_TASK_ID_FORM = r"[.]*[A-Za-z0-9_:-][A-Za-z0-9._:-]*"
TASK_ID = re.compile(rf"(?=.{{1,128}}\Z){_TASK_ID_FORM}", re.ASCII)

RESULT_LIFETIME = timedelta(hours=24)  # documented on all image and video pages

_LINK_KEYS = ("video_url", "image_url", "audio_url", "url", "file_url", "result_url", "download_url")
_RESULT_KEYS = frozenset({"result", "output", *_LINK_KEYS})
_TEXT = frozenset({str})
_PLAIN = _TEXT | {int, float, bool, type(None)}
_DEEPEST = 16  # lists and objects around a link; more has no meaning here
_ABSURD = 1e15  # no time, size or sum of this service is that large; NaN and infinities fail the test too
_LONGEST_ESTIMATE = 86_400.0  # seconds; who says that a task takes longer than its links live tells nothing
_EARLIEST, _LATEST = 946_684_800, 4_102_444_800  # 2000 and 2100: outside lies a broken clock, not a task
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TaskStatus(StrEnum):
    """The statuses the service is known to use. A status not listed here is kept as a plain string."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


_TERMINAL = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})
_STATUS_BY_WORD: dict[str, TaskStatus] = {status.value: status for status in TaskStatus} | {
    "canceled": TaskStatus.CANCELLED
}


def _number(value: object) -> float | int | None:
    """A finite number from whatever the wire holds; None for anything else."""
    if type(value) is int:  # nearly always
        return value if abs(value) < _ABSURD else None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < _ABSURD:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _positive(value: object, most: float = _ABSURD) -> float | int | None:
    number = _number(value)
    return number if number is not None and 0 < number <= most else None


def _estimate(value: object) -> float | int | None:
    return _positive(value, _LONGEST_ESTIMATE)


def _not_negative(value: object) -> float | int | None:
    number = _number(value)
    return number if number is not None and number >= 0 else None


def _percent(value: object) -> int:
    number = _number(value)
    if number is None or number <= 0:
        return 0
    return int(number) if number < 100 else 100


def _credits(value: object) -> Decimal | None:
    """Credits as an exact decimal: floats through their shortest form, so 2.5 stays 2.5."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _credits_of(value)
    if isinstance(value, str):
        try:
            value = Decimal(value)
        except InvalidOperation:
            return None
    return value if isinstance(value, Decimal) and value.is_finite() and abs(value) < _ABSURD else None


# The same few prices come again and again, and each task keeps one.
@lru_cache(maxsize=1024)
def _credits_of(value: float) -> Decimal | None:
    number = _number(value)
    return None if number is None else Decimal(str(number))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _moment(value: object) -> datetime | None:
    """Unix seconds or milliseconds, or an ISO date, as aware UTC; None where it makes no sense."""
    number = _number(value)
    if number is None:
        return _utc(value) if isinstance(value, datetime) else _iso_moment(value)
    if number > _LATEST:
        number = number / 1000
    return _unix_moment(number) if _EARLIEST <= number <= _LATEST else None


# Many tasks are made in the same second, and the looks at one of them all tell the same.
@lru_cache(maxsize=4096)
def _unix_moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _iso_moment(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        return _utc(datetime.fromisoformat(value))
    except ValueError:
        return None


def _utc(moment: datetime) -> datetime | None:
    """In UTC, which is what a moment without a zone means here; None outside the same bounds as for numbers."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    if not _EARLIEST <= (moment - _EPOCH).total_seconds() <= _LATEST:
        return None
    return moment.astimezone(UTC)


def invalid(error: ValidationError) -> InvalidRequestError:
    """What pydantic finds wrong first, as an error of ours."""
    first = error.errors(include_url=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    message = first["msg"]
    if first["type"].endswith("_type"):
        message += f", got {type(first['input']).__name__}"
    return InvalidRequestError(f"{param}: {message}" if param else message, param=param)


class _Wire(BaseModel):
    """Base of wire values: frozen, unknown fields kept."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="allow", protected_namespaces=(), defer_build=True
    )

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise invalid(error) from None


class _Read(_Wire):
    """A wire value that is read tolerantly: whatever the wire holds, each field makes a fitting value of it."""

    _readers: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    @classmethod
    def _read(cls, wire: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every field, with a value that needs no more checking; and what is no field."""
        values, unknown = _defaults_of(cls).copy(), {}
        for name, value in wire.items():
            reader = cls._readers.get(name)
            if reader is None:
                unknown[name] = value
            else:
                values[name] = reader(value)
        return values, unknown

    @model_validator(mode="before")
    @classmethod
    def _tolerant(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        values, unknown = cls._read(dict(data))
        return values | unknown

    @classmethod
    def _of(cls, wire: Mapping[str, Any]) -> Self:
        """The same as `model_validate` makes of it, without the second look at every value, which costs the most."""
        return cls._made(*cls._read(wire))

    @classmethod
    def _made(cls, values: dict[str, Any], unknown: dict[str, Any]) -> Self:
        made = object.__new__(cls)
        _put_values(made, values)
        _put_fields_set(made, _fields_of(cls))
        _put_extra(made, unknown)
        _put_private(made, None)
        return made


# These values are frozen: what pydantic keeps in them goes there directly.
_put_values, _put_fields_set, _put_extra, _put_private = (
    vars(BaseModel)[name].__set__
    for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
)


@cache
def _defaults_of(cls: type[BaseModel]) -> dict[str, Any]:
    return {name: field.default for name, field in cls.model_fields.items()}


@cache
def _fields_of(cls: type[BaseModel]) -> set[str]:
    return set(cls.model_fields)


class TaskInfo(_Read):
    """`task_info` of a task; every part may be missing.

    estimated_time: the service's guess at creation, seconds; not a bound (documented as an estimate).
    video_duration: seconds; 0 where a page's example has it so.
    """

    _readers: ClassVar = {"can_cancel": _boolean, "estimated_time": _estimate, "video_duration": _not_negative}

    can_cancel: bool | None = None
    estimated_time: int | float | None = None
    video_duration: int | float | None = None


class Usage(_Read):
    """`usage` of a task, in credits; every part may be missing (polls usually omit it all)."""

    _readers: ClassVar = {
        "billing_rule": _text,
        "credits_reserved": _credits,
        "credits_used": _credits,
        "user_group": _text,
    }

    billing_rule: str | None = None
    credits_reserved: Decimal | None = None
    credits_used: Decimal | None = None
    user_group: str | None = None

    @classmethod
    def _read(cls, wire: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        values, unknown = super()._read(wire)
        if "cost" in unknown and wire.get("credits_used") is None and isinstance(wire["cost"], Mapping):
            values["credits_used"] = _credits(wire["cost"].get("credits"))
        return values, unknown


def _code(value: object) -> str:
    return str(value) if _is_code(value) else "unknown_error"


def _message(value: object) -> str:
    return value if isinstance(value, str) else ""


class TaskFailure(_Read):
    """Why a task failed. `code` is a string whatever the wire held; `unknown_error` if it held none."""

    _readers: ClassVar = {"code": _code, "message": _message}

    code: str = "unknown_error"
    message: str = ""


def _is_code(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _ABSURD
    return isinstance(value, str) and value != ""


class CreditBalance(_Wire):
    """Credits of the account: what remains and what was used."""

    remaining: Decimal
    used: Decimal


class KeyCredits(CreditBalance):
    """Credits of this API key; `unlimited` keys are bounded by the account alone."""

    unlimited: bool = False


class Credits(_Wire):
    """The answer of `client.credits()`: the account's and this key's credits."""

    user: CreditBalance
    key: KeyCredits


class UploadedFile(BaseModel):
    """A file at the service.

    id: what `client.files.delete` takes. name: made by us, so that nothing is overwritten. url: the link to give to
    a model; empty for rows of `list`, which carry none. size: bytes; None if it isn't told. content_type: MIME type;
    empty if it isn't told. expires_at: aware UTC, 72 hours after the upload (documented). raw: the answer as parsed.
    Since 0.1.0.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    id: str
    name: str
    url: str = ""
    size: int | None = None
    content_type: str = ""
    expires_at: datetime
    raw: dict[str, Any] = Field(default_factory=dict, repr=False)


_NO_INFO, _NO_USAGE = TaskInfo._of({}), Usage._of({})
_Section = TypeVar("_Section", TaskInfo, Usage)


class Task(_Read):
    """The service's record of one accepted request. Only `id` is certain; all else may be missing on the wire.

    progress: 0-100; may stay 0 and jump, may go backwards.
    results: what the service lists as results, normally links that die 24 hours later.
    result_data: details of audio and utility models, as sent: a list, an object or None.
    created: aware UTC. raw: the answer as parsed.
    """

    id: str = Field(pattern=rf"^{_TASK_ID_FORM}$", max_length=128)
    status: TaskStatus | str = TaskStatus.PENDING
    kind: str | None = None
    model: str | None = None
    progress: int = 0
    results: tuple[str, ...] = ()
    result_data: Any = None
    error: TaskFailure | None = None
    task_info: TaskInfo = _NO_INFO
    usage: Usage = _NO_USAGE
    created: datetime | None = None
    raw: SkipValidation[dict[str, Any]] = Field(default_factory=dict, repr=False)

    @classmethod
    def _read(cls, wire: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        values = TaskReading(wire if isinstance(wire, dict) else dict(wire)).fields()  # all the rest is in `raw`
        if isinstance(wire.get("raw"), dict):
            values["raw"] = wire["raw"]
        return values, {}

    @property
    def is_terminal(self) -> bool:
        """Whether the status is final: completed, failed or cancelled."""
        return self.status in _TERMINAL

    @property
    def succeeded(self) -> bool:
        """Whether the task completed."""
        return self.status == TaskStatus.COMPLETED

    @property
    def estimated_time(self) -> int | float | None:
        """The service's guess of the duration in seconds, None if it gave none."""
        return self.task_info.estimated_time

    @property
    def urls(self) -> tuple[str, ...]:
        """Every http(s) link once, first those of `results`, then those of `result_data`."""
        links = (*self.results, *_links_in(self.result_data))
        return tuple(dict.fromkeys(link for link in links if link.startswith(("https://", "http://"))))

    @property
    def expires_at(self) -> datetime | None:
        """When the links must be expected to be dead: 24 hours after creation.

        The documented lifetime counts from the end of the generation, which the service does not tell.
        """
        return self.created + RESULT_LIFETIME if self.created else None

    def __repr__(self) -> str:
        about = f"Task({self.id!r}, {str(self.status)!r}, model={self.model!r}"
        if self.is_terminal:
            return f"{about}, urls={len(self.urls)})"
        estimate = f", estimated {self.estimated_time} s" if self.estimated_time else ""
        return f"{about}, progress={self.progress}{estimate}; wait: await client.tasks.wait({self.id!r}))"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        from evolink_async.html import results, table

        rows: list[tuple[str, object]] = [("task", self.id), ("status", self.status), ("model", self.model)]
        if not self.is_terminal:
            rows.append(("progress", f"{self.progress} %"))
            rows.append(("estimated", None if self.estimated_time is None else f"{self.estimated_time} s"))
            rows.append(("wait", f"await client.tasks.wait({self.id!r})"))
        if self.error is not None:
            rows.append(("error", f"{self.error.code}: {self.error.message}"))
        used, reserved = self.usage.credits_used, self.usage.credits_reserved
        rows.append(("credits", used if used is not None else reserved))
        until = self.expires_at.isoformat(" ", "minutes") if self.urls and self.expires_at else None
        rows.append(("links, until", until))
        return table(rows) + results(self.urls, previews=self.kind == "image")


class TaskReading:
    """The JSON of one task, read as far as somebody asks: most looks only want to know whether it goes on.

    It tolerates every shape seen on the wire, and our own field names.
    """

    __slots__ = ("_task", "id", "raw", "status")

    def __init__(self, wire: dict[str, Any]) -> None:
        self.id: Any = wire.get("id")
        self.status = _status(wire.get("status"))
        self.raw = wire
        self._task: Task | None = None

    @classmethod
    def of(cls, task: Task) -> Self:
        """One that was read already."""
        reading = cls(vars(task))
        reading._task = task
        return reading

    @property
    def is_terminal(self) -> bool:
        return self.status in _TERMINAL

    @property
    def kind(self) -> str | None:
        kind = self.raw.get("kind") or self.raw.get("type")
        if kind:
            return _text(kind)
        name = self.raw.get("object")  # image.generation.task
        return _text(name.partition(".")[0]) if isinstance(name, str) else None

    @property
    def model(self) -> str | None:
        return _text(self.raw.get("model"))

    @property
    def progress(self) -> int:
        progress = self.raw.get("progress")
        if type(progress) is int and 0 <= progress <= 100:
            return progress
        return 100 if progress is None and self.status == TaskStatus.COMPLETED else _percent(progress)

    @property
    def created(self) -> datetime | None:
        return _moment(self.raw.get("created", self.raw.get("created_at")))

    @property
    def estimated_time(self) -> int | float | None:
        info = self.raw.get("task_info")
        if isinstance(info, dict):
            return _estimate(info.get("estimated_time"))
        return info.estimated_time if isinstance(info, TaskInfo) else None

    @property
    def video_duration(self) -> float | None:
        info = self.raw.get("task_info")
        if isinstance(info, dict):
            return _positive(info.get("video_duration"))
        return (info.video_duration or None) if isinstance(info, TaskInfo) else None

    @property
    def credits_reserved(self) -> Decimal | None:
        usage = self.raw.get("usage")
        if isinstance(usage, dict):
            return _credits(usage.get("credits_reserved"))
        return usage.credits_reserved if isinstance(usage, Usage) else None

    def fields(self) -> dict[str, Any]:
        """Every field of a `Task`."""
        wire = self.raw
        return {
            "id": self.id,
            "status": self.status,
            "kind": self.kind,
            "model": self.model,
            "progress": self.progress,
            "results": _results(wire),
            "result_data": wire.get("result_data"),
            "error": _failure(wire.get("error")),
            "task_info": _section(wire.get("task_info"), _NO_INFO),
            "usage": _section(wire.get("usage"), _NO_USAGE),
            "created": self.created,
            "raw": wire,
        }

    @property
    def task(self) -> Task:
        """The whole of it."""
        if self._task is None:
            self._task = Task._made(self.fields(), {})
        return self._task


def with_what_creation_told(task: Task, created: Task) -> Task:
    """The task with its price and its estimate, which later answers leave out."""
    usage, info = created.usage, created.task_info
    missing_usage = _missing(task.usage, usage, ("billing_rule", "credits_reserved", "user_group"))
    missing_info = _missing(task.task_info, info, ("estimated_time", "video_duration"))
    if not missing_usage and not missing_info:
        return task
    parts = {
        "usage": task.usage.model_copy(update=missing_usage),
        "task_info": task.task_info.model_copy(update=missing_info),
    }
    return task.model_copy(update=parts)


def _missing(later: BaseModel, earlier: BaseModel, names: Iterable[str]) -> dict[str, Any]:
    known = {name: getattr(earlier, name) for name in names if getattr(later, name) is None}
    return {name: value for name, value in known.items() if value is not None}


def _section(value: object, nothing: _Section) -> _Section:
    """A part of a task; `nothing` stands for one that is missing, as it is frozen.

    Nearly all tasks of a kind tell the same in it, and so share one.
    """
    if not value:
        return nothing
    if not isinstance(value, (dict, Mapping)):  # the check of a dict is the cheaper one by far
        return value if isinstance(value, type(nothing)) else nothing
    if nothing._readers.keys() >= value.keys() and _PLAIN.issuperset(map(type, value.values())):
        shared: _Section = _shared(type(nothing), **value)
        return shared
    return nothing._of(value)


@lru_cache(maxsize=256, typed=True)  # true is no 1
def _shared(section: type[TaskInfo | Usage], /, **wire: Any) -> Any:
    return section._of(wire)


def _failure(value: object) -> TaskFailure | None:
    if not value:
        return None
    if isinstance(value, str):
        return TaskFailure._of({"message": value})
    if isinstance(value, Mapping):
        return TaskFailure._of(value)
    return value if isinstance(value, TaskFailure) else None


def _status(value: object) -> str:
    if not isinstance(value, str) or not value:
        return TaskStatus.PENDING
    return _STATUS_BY_WORD.get(value) or _STATUS_BY_WORD.get(value.strip().lower()) or value


def _results(wire: Mapping[str, Any]) -> tuple[str, ...]:
    """`results` as documented, else the other places that samples and older pages name."""
    found = wire.get("results")
    if not found:
        if _RESULT_KEYS.isdisjoint(wire):
            return ()
        found = [wire[name] for name in ("result", "output", *_LINK_KEYS) if wire.get(name)]
    is_list_of_text = isinstance(found, list) and _TEXT.issuperset(map(type, found))
    return tuple(found if is_list_of_text else _strings_in(found, 0))


def _strings_in(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif depth > _DEEPEST:
        return
    elif isinstance(value, Mapping):
        nested = value.get("results")
        yield from _strings_in(nested, depth + 1) if nested else _links_in(value, depth)
    elif isinstance(value, Iterable):
        for item in value:
            yield from _strings_in(item, depth + 1)


def _links_in(data: object, depth: int = 0) -> Iterator[str]:
    """Links in `result_data`: a list of objects, one object, or an object holding a list of songs."""
    if isinstance(data, str):
        yield data
    elif depth > _DEEPEST:
        return
    elif isinstance(data, Mapping):
        yield from (data[key] for key in _LINK_KEYS if isinstance(data.get(key), str) and data[key])
        yield from _links_in(data.get("songs"), depth + 1)
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _links_in(item, depth + 1)
