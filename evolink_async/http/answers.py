"""What an answer of the service means. Pure: an answer in, a meaning out.

The table "answer to a POST" of the design lives in `judge_submission`; `status_error` turns any error status
into this library's error, whichever of the known body shapes it came in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from evolink_async.errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    EvoLinkError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExhaustedError,
    RateLimitError,
    ResponseError,
    ServerError,
)
from evolink_async.http.hints import retry_after
from evolink_async.http.retry import Verdict
from evolink_async.types import TASK_ID, TaskReading

# 403 codes that speak of the key or the user, not of this request: the vendor's client has key_disabled, key_expired
# and user_disabled; the other words for the same are our guess.
_ACCOUNT_CODES = frozenset(
    f"{whose}_{state}" for whose in ("key", "api_key", "token", "user", "account") for state in ("disabled", "expired")
)
# Codes that are no refusal of the request but news about its idempotency key (vendor's client); the status varies.
_IN_PROGRESS, _CONFLICT = "paid_outcome_unknown", "idempotency_conflict"

_REFUSED = frozenset({400, 403, 404, 413, 415, 422})
_ACCOUNT = frozenset({401, 402})

_REQUEST_ID_IN_TEXT = re.compile(r"\s*\(request id: ?([^()]{1,128})\)\s*$", re.I)
# An escape in JSON: a whole surrogate pair, half of one (the group), or any other.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.S
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]+")
_CODE = re.compile(r"[A-Za-z0-9_.:-]{1,128}", re.ASCII)
_EXCERPT = 200
_LONGEST_MESSAGE = 2_000


@dataclass(slots=True)
class Answer:
    """One complete answer. `headers` has lower-case names; `body` is decoded.

    `problem` says why there is no body although one came: too large, or not what its headers say.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    problem: str | None = None

    @property
    def request_id(self) -> str | None:
        return _word(self.headers.get("x-request-id") or self.headers.get("x-oneapi-request-id"))


@dataclass(slots=True)
class Judgement:
    """What an answer to a paid POST means, and the error that says so if it is not the end."""

    verdict: Verdict
    task: TaskReading | None = None
    error: EvoLinkError | None = None
    retry_after: float | None = None
    replayed: bool = False  # the service proved that it honours idempotency keys


def judge_submission(answer: Answer) -> Judgement:
    """The table "answer to a POST": what may have been paid, and what may be done next."""
    replayed = answer.headers.get("idempotency-replayed", "").strip().lower() == "true"
    unreadable: ResponseError | None = None
    if 200 <= answer.status < 300:
        try:
            return Judgement(Verdict.ACCEPTED, task=read_task(answer), replayed=replayed)
        except ResponseError as problem:
            unreadable = problem
    error = status_error(answer)
    # A hint asks for patience; but for a 429 it does not prove that this request was not accepted.
    verdict = _verdict(answer.status, error)
    if verdict is Verdict.LOST and unreadable is not None:
        return Judgement(verdict, error=unreadable, retry_after=hint_of(answer), replayed=replayed)
    return Judgement(verdict, error=error, retry_after=hint_of(answer), replayed=replayed)


def _verdict(status: int, error: APIStatusError) -> Verdict:
    """What an answer without a task means."""
    if (error.code or "").lower() == _IN_PROGRESS:
        return Verdict.IN_PROGRESS
    if proves_a_task(error):
        return Verdict.CONFLICT
    if status == 429:
        return Verdict.RATE_LIMITED
    if is_account_error(error):
        return Verdict.ACCOUNT
    return Verdict.REFUSED if status in _REFUSED else Verdict.LOST


def is_account_error(error: EvoLinkError) -> bool:
    """Whether every further request would be refused as this one was: no key, no money, key or user disabled."""
    if not isinstance(error, APIStatusError):
        return False
    return error.status_code in _ACCOUNT or (error.status_code == 403 and (error.code or "").lower() in _ACCOUNT_CODES)


def proves_a_task(error: EvoLinkError | None) -> bool:
    """Whether a refusal says that there is a task for the idempotency key already."""
    return error is not None and (error.code or "").lower() == _CONFLICT


def read_json(answer: Answer) -> Any:
    """The parsed body of a 2xx answer. Raises `ResponseError` if it is oversized, no JSON, or an error in disguise."""
    if answer.problem:
        raise _unreadable(answer, answer.problem)
    try:
        value = _parse(answer.body)
    except ValueError:
        what = f"is no JSON: {excerpt(answer.body)!r}" if answer.body.strip() else "is empty"
        raise _unreadable(answer, what) from None
    if isinstance(value, dict) and value.get("error") and not value.get("id") and "data" not in value:
        details = _error_details(value)
        raise _unreadable(answer, f"holds an error: {details.get('code') or ''} {details['message']}".rstrip())
    return value


def read_task(answer: Answer) -> TaskReading:
    """The task in a 2xx answer. Raises `ResponseError` if there is no valid id in it."""
    return task_from(read_json(answer), answer)


def task_from(value: Any, answer: Answer | None = None) -> TaskReading:
    """The task in parsed JSON. Raises `ResponseError` if there is no valid id in it."""
    identifier = value.get("id") if isinstance(value, dict) else None
    if not isinstance(identifier, str) or not TASK_ID.fullmatch(identifier):
        raise _unreadable(answer, f"holds no valid task id: {excerpt(to_json(value))!r}")
    return TaskReading(value)


def _unreadable(answer: Answer | None, what: str) -> ResponseError:
    if answer is None:
        return ResponseError(f"the service's answer {what}")
    return ResponseError(
        f"the service's answer (HTTP {answer.status}) {what}; if this lasts, check base_url",
        status_code=answer.status,
        request_id=answer.request_id,
    )


def hint_of(answer: Answer) -> float | None:
    """Seconds the service asks us to wait, None without a usable hint."""
    details = _error_details(_json_or_none(answer))
    words = f"{details.get('fallback_suggestion') or ''} {details['message']}"
    return retry_after(answer.headers, words)


def status_error(answer: Answer) -> APIStatusError:
    """The error of an answer with an error status, in any of the service's body shapes."""
    parsed = _json_or_none(answer)
    details = _error_details(parsed)
    message, request_id = _split_request_id(details["message"])
    body = parsed if parsed is not None else _as_text(answer.body)
    if not message:
        message = f"HTTP {answer.status} with {_describe(answer)}"
    cls = _error_class(answer.status)
    error = cls(
        message,
        status_code=answer.status,
        code=details.get("code"),
        type=details.get("type"),
        param=details.get("param"),
        request_id=details.get("request_id") or answer.request_id or request_id,
        body=body,
    )
    if isinstance(error, RateLimitError):
        error.retry_after = hint_of(answer)
    return error


def _error_class(status: int) -> type[APIStatusError]:
    by_status: dict[int, type[APIStatusError]] = {
        400: BadRequestError,
        401: AuthenticationError,
        402: QuotaExhaustedError,
        403: PermissionDeniedError,
        404: NotFoundError,
        413: BadRequestError,
        415: BadRequestError,
        422: BadRequestError,
        429: RateLimitError,
    }
    return by_status.get(status, ServerError if status >= 500 else APIStatusError)


def _parse(body: bytes) -> Any:
    """JSON, also behind a byte order mark; neither NaN nor Infinity. Raises `ValueError`.

    A half of a surrogate pair is left where somebody cut a text, such as a quoted prompt. RFC 8259 allows it and the
    parser does not. It costs that character (U+FFFD stands for it), not a task that is paid for.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError:
        whole = body.removeprefix(b"\xef\xbb\xbf")
        whole = _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], whole)
        if whole == body:
            raise
        return from_json(whole, allow_inf_nan=False)


def _json_or_none(answer: Answer) -> Any:
    if not answer.body:
        return None
    try:
        return _parse(answer.body)
    except ValueError:
        return None


def _error_details(parsed: Any) -> dict[str, Any]:
    """code, message, type, param out of: {error: {...}}, {error: "...", error_description}, {code, msg|message}."""
    if not isinstance(parsed, dict):
        return {"message": ""}
    error = parsed.get("error")
    if isinstance(error, dict):
        source = error
    elif isinstance(error, str):
        code = error if _CODE.fullmatch(error) else parsed.get("code")  # some put a whole sentence there
        source = {"code": code, "message": parsed.get("error_description") or parsed.get("message") or error}
    else:
        source = parsed
    return {
        "code": _word(source.get("code")),
        "message": _clean(source.get("message") or source.get("msg") or ""),
        "type": _word(source.get("type")),
        "param": _word(source.get("param")),
        "request_id": _word(source.get("request_id") or parsed.get("request_id")),
        "fallback_suggestion": _word(source.get("fallback_suggestion")),
    }


def _word(value: object) -> str | None:
    """A short text of a field that may be a string or a number."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return _clean(value if isinstance(value, str) else str(value)[:32])[:256]


def _clean(text: object) -> str:
    """Text fit for a terminal and a log: control and direction characters gone, of bounded length."""
    if not isinstance(text, str):
        return ""
    return _CONTROL.sub(" ", text)[:_LONGEST_MESSAGE].strip()


def _split_request_id(message: str) -> tuple[str, str | None]:
    match = _REQUEST_ID_IN_TEXT.search(message)
    return (message[: match.start()], match[1].strip()) if match else (message, None)


def _describe(answer: Answer) -> str:
    if answer.problem:
        return f"a body that {answer.problem}"
    where = answer.headers.get("location")
    if where and 300 <= answer.status < 400:
        return f"a redirect to {excerpt(where.encode('utf-8', 'replace'))!r}, which is not followed; check base_url"
    if not answer.body.strip():
        return "an empty body"
    return f"a body without a message: {excerpt(answer.body)!r}"


def _as_text(body: bytes) -> str | None:
    return body.decode("utf-8", "replace")[:_LONGEST_MESSAGE] if body else None


def excerpt(body: bytes) -> str:
    """The first characters of a body, fit for an error message."""
    return _clean(body[: 4 * _EXCERPT].decode("utf-8", "replace"))[:_EXCERPT]
