"""Statuses, headers and envelopes of the answers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolink_async.emulator.answers import Json, Refusal, error_body, invalid
from evolink_async.emulator.behaviour import Dialect

from .shapes import ref

EXAMPLE_TASK = "task-unified-1774857405-abc123xy"

HEADERS: Json = {
    "RequestId": {
        "description": "The number of this answer (vendor's client).",
        "required": True,
        "schema": {"type": "string", "pattern": "^req_"},
    },
    "IdempotencyReplayed": {
        "description": "Sent when the task was made by an earlier request with this Idempotency-Key (vendor's client).",
        "schema": {"type": "string", "const": "true"},
    },
    "RetryAfter": {
        "description": "Seconds, or an HTTP date; not sent when the hint is in the body, or there is none.",
        "schema": {"type": "string"},
    },
    "RetryAfterMs": {"description": "Milliseconds, instead of Retry-After.", "schema": {"type": "string"}},
    "AcceptRanges": {"schema": {"type": "string", "const": "bytes"}},
    "ContentRange": {"schema": {"type": "string", "pattern": "^bytes "}},
    "ETag": {"description": "For If-Range.", "schema": {"type": "string"}},
}


def headers_of(**names: str) -> Json:
    """References to headers: the number of the answer, and ``Retry_After="RetryAfter"``."""
    components = {"X-Request-Id": "RequestId", **{name.replace("_", "-"): own for name, own in names.items()}}
    return {name: {"$ref": f"#/components/headers/{own}"} for name, own in components.items()}


def answer(description: str, schema: Json, headers: Json | None = None, **more: Any) -> Json:
    """An answer of JSON."""
    content = {"application/json": {"schema": schema}}
    return {"description": description, "headers": headers or headers_of(), "content": content, **more}


def answers(good: Json, **others: str) -> Json:
    """Statuses: 200, and the named components for the others, given as ``_400="Invalid"``."""
    references = {status[1:]: {"$ref": f"#/components/responses/{name}"} for status, name in others.items()}
    return {"200": good, **references}


def call(operation_id: str, tag: str, summary: str, responses: Json, **more: Any) -> Json:
    """An operation."""
    return {"operationId": operation_id, "tags": [tag], "summary": summary, **more, "responses": responses}


def _refusal(dialect: Dialect, description: str, *refusals: Refusal, headers: Json | None = None) -> Json:
    """A refusal in the documented envelope, for one of these reasons."""
    bodies = {refusal.code: error_body(refusal, dialect=dialect) for refusal in refusals}
    told = [body["error"] for body in bodies.values()]
    fields = {name: {"enum": list(dict.fromkeys(error[name] for error in told))} for name in ("code", "type")}
    schema = {"allOf": [ref("Error"), {"properties": {"error": {"properties": fields}}}]}
    made = answer(description, schema, headers)
    made["content"]["application/json"]["examples"] = {code: {"value": body} for code, body in bodies.items()}
    return made


_KEY_REFUSALS = tuple(
    Refusal(403, f"key_{state}", f"The API key is {state}.", "authentication_error")
    for state in ("disabled", "expired")
)


def _refusals(dialect: Dialect) -> Mapping[str, tuple[str, tuple[Refusal, ...]]]:
    unauthorized = Refusal(401, "unauthorized", "The API key is missing or not valid.", "authentication_error")
    short = Refusal(402, "insufficient_quota", "Insufficient credits: 2.5 needed, 1 left.", "insufficient_quota")
    unknown = Refusal(403, "model_access_denied", "The model 'x' is not available to this key.", param="model")
    used = Refusal(409, "idempotency_conflict", "This Idempotency-Key was used with another body.")
    running = Refusal(409, "paid_outcome_unknown", "The first request with this Idempotency-Key is still in progress.")
    return {
        "Invalid": (
            "A parameter is missing or not valid (documented).",
            (invalid("prompt is required.", "prompt"),),
        ),
        "InvalidTaskId": (
            "The id doesn't start with task-unified- (documented).",
            (invalid("Invalid task id: it must start with 'task-unified-'.", "task_id", code="invalid_task_id"),),
        ),
        "Unauthorized": ("The key is missing or wrong (documented).", (unauthorized,)),
        "InsufficientCredits": ("The balance doesn't cover what the task would reserve (documented).", (short,)),
        "KeyRefused": ("The key may not be used (codes: vendor's client; status: our guess).", _KEY_REFUSALS),
        "Forbidden": (
            "The key may not be used, or not for this model (documented)."
            if dialect.unknown_model == 403
            else "The key may not be used (codes: vendor's client; status: our guess).",
            (*_KEY_REFUSALS, unknown) if dialect.unknown_model == 403 else _KEY_REFUSALS,
        ),
        "Conflict": (
            "The Idempotency-Key was used with another body, or its first request is still in progress (codes: "
            "vendor's client; status: our guess).",
            (used, running),
        ),
        "TaskNotFound": (
            "There is no such task (documented).",
            (Refusal(404, "task_not_found", f"Task {EXAMPLE_TASK} was not found."),),
        ),
        "TooLarge": (
            "The body is larger than 64 MB (status: vendor's client).",
            (Refusal(413, "request_too_large", "The body is larger than 64 MB."),),
        ),
        "TooManyRequests": (
            "Too many submissions, or too many unfinished tasks (documented). Sent only when the emulator was given a "
            "rate or a concurrency.",
            (Refusal(429, "rate_limit_exceeded", "Rate limit exceeded, please slow down.", "rate_limit_error"),),
        ),
    }


def refusal_components(dialect: Dialect) -> Json:
    """The answers of a refusal, by name."""
    hints = headers_of(Retry_After="RetryAfter", Retry_After_Ms="RetryAfterMs")
    made = {
        name: _refusal(dialect, about, *reasons, headers=hints if name == "TooManyRequests" else None)
        for name, (about, reasons) in _refusals(dialect).items()
    }
    file_error = ref("FileError")
    return {
        **made,
        "FileRefused": answer("The file or its name is refused (codes: documented; status: our guess).", file_error),
        "FilesUnauthorized": answer("The key is missing or wrong (documented).", file_error),
        "FilesForbidden": answer("The key may not be used (our guess).", file_error),
        "FileNotFound": answer("There is no such file, or no longer (documented).", file_error),
        "FileTooLarge": answer("The body is too large (our guess).", file_error),
    }
