"""Answers as they look on the wire. Pure: from records to dicts."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .behaviour import Dialect
from .models import MICRO, video_seconds
from .tasks import FAILURE_MESSAGES, Task

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The service says no: nothing was accepted, nothing is charged. ``wait`` is in seconds."""

    status: int
    code: str
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    wait: float | None = None


def invalid(message: str, param: str | None = None, *, code: str = "invalid_request") -> Refusal:
    """A 400 that names the parameter."""
    return Refusal(400, code, message, param=param)


# The older generation's words, by HTTP status (an EvoLink site's documentation, the vendor's first client).
_OLD_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large_error",
    429: "rate_limit_error",
}
CURRENT = Dialect()


def error_body(refusal: Refusal, suggestion: str | None = None, dialect: Dialect = CURRENT) -> Json:
    """The documented error shape, of this or of the older generation."""
    error: Json = {"code": refusal.code, "message": refusal.message, "type": refusal.type}
    if dialect.errors == "old":
        error["code"] = refusal.status
        error["type"] = _OLD_TYPES.get(refusal.status, refusal.type)
    if refusal.param is not None:
        error["param"] = refusal.param
    if suggestion is not None:
        error["fallback_suggestion"] = suggestion
    return {"error": error}


def credits_of(micro: int) -> int | float:
    """Micro-credits as the number on the wire."""
    whole, rest = divmod(micro, MICRO)
    return whole if rest == 0 else micro / MICRO


def created_task(task: Task, dialect: Dialect = CURRENT) -> Json:
    """The answer to a POST. It doesn't change with time, so a replay is told the same."""
    if dialect.created == "brief":
        return {"created": int(task.created), "id": task.id, "model": task.model.id, "status": "pending"}
    answer: Json = {
        "created": int(task.created),
        "id": task.id,
        "model": task.model.id,
        "object": f"{task.model.kind}.generation.task",
        "progress": 0,
        "status": "pending",
        "type": task.model.kind,
    }
    if dialect.created == "bare":
        return answer
    info: Json = {"can_cancel": True}
    if task.tells_estimate:
        info["estimated_time"] = round(task.estimate)
    if task.model.kind == "video":
        info["video_duration"] = int(video_seconds(task.model, task.body))
    return {**answer, "task_info": info, "usage": _reserved(task, dialect)}


def _reserved(task: Task, dialect: Dialect) -> Json:
    usage: Json = {
        "billing_rule": task.model.billing_rule,
        "credits_reserved": credits_of(task.reserved),
        "user_group": "default",
    }
    if dialect.credits == "old":
        usage["credits_reserved"] = credits_of(task.reserved * 100)
        usage["estimated_cost"] = round(task.reserved / MICRO / 10, 6)
    return usage


def polled_task(task: Task, now: float, links_at: str, dialect: Dialect = CURRENT) -> Json:
    """The answer to a poll. ``links_at`` is where the results are served, without a slash at the end."""
    status = told_status(task, now, dialect)
    answer: Json = {
        "created": int(task.created),
        "id": task.id,
        "model": task.model.id,
        "object": f"{task.model.kind}.generation.task",
        "progress": task.progress(now),
        "status": status,
        "task_info": {"can_cancel": False},
        "type": task.model.kind,
    }
    if status == "completed":
        answer.update(_results(task, links_at))
        _reshape(answer, dialect)
    elif status == "failed" and task.failure is not None:
        message = FAILURE_MESSAGES.get(task.failure, "The generation failed.")
        answer["error"] = {"code": task.failure, "message": message, "type": "task_error"}
    if dialect.polled_usage and now >= task.ends_at:
        answer["duration"] = round(task.ends_at - task.created, 3)
        answer["usage"] = {**_reserved(task, dialect), "credits_used": credits_of(task.charged)}
        answer["billing"] = _billing(task)
    return answer


def _reshape(answer: Json, dialect: Dialect) -> None:
    if dialect.results == "objects":
        answer["results"] = [{"url": link} for link in answer["results"]]
    elif dialect.results == "nested":
        answer["result"] = {"results": answer["results"]}


def _billing(task: Task) -> Json:
    """The account of a finished task as the vendor's client reads it from newer gateways."""
    released = task.failure is not None
    billing: Json = {
        "refund_scope": "account_balance",
        "charge_status": "released" if released else "charged",
        "refund_status": "completed" if released else "not_required",
        "reserved_credits": credits_of(task.reserved),
        "charged_credits": credits_of(task.charged),
        "refunded_credits": credits_of(task.reserved - task.charged),
    }
    if released:
        billing["refunded_at"] = datetime.fromtimestamp(task.ends_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return billing


def listed_task(task: Task, now: float, dialect: Dialect = CURRENT) -> Json:
    """A row of the list: no links."""
    status = told_status(task, now, dialect)
    return {
        "id": task.id,
        "status": status,
        "model": task.model.id,
        "type": task.model.kind,
        "progress": task.progress(now),
        "created_at": int(task.created),
        "has_results": status == "completed",
        "has_error": status == "failed",
        "credits_used": credits_of(task.charged),
    }


def told_status(task: Task, now: float, dialect: Dialect) -> str:
    """The word for how a task stands, as this dialect has it."""
    status = task.status(now)
    return "failed" if status == "cancelled" and dialect.cancelled == "failed" else status


_EXTENSIONS = {"image": "png", "audio": "wav", "video": "mp4"}


def extension(task: Task) -> str:
    """The format of the task's main results."""
    wanted = task.body.get("output_format")
    if task.model.kind == "image" and wanted in ("jpeg", "webp"):
        return str(wanted)
    return _EXTENSIONS[task.model.kind]


def _results(task: Task, links_at: str) -> Json:
    """results, and result_data for the models that have it."""
    model_id = task.model.id
    if model_id == "qwen-voice-design":
        voice = f"qwen-tts-vd-{task.body.get('preferred_name')}-voice-{int(task.created)}"
        return {"results": [], "result_data": {"voice": voice}}
    if model_id == "suno-persona":
        return {"results": [], "result_data": {"persona_id": task.digest.hex()}}
    if model_id == "kling-custom-element":
        return {"results": [], "result_data": {"id": str(int.from_bytes(task.digest[:6], "big"))}}
    count = task.produced
    stem = f"{links_at}/{task.id}"
    links = [f"{stem}-{n}.{extension(task)}" for n in range(1, count + 1)]
    if not model_id.startswith("suno-v"):
        return {"results": links}
    tracks = [_track(task, f"{stem}-{n}", n) for n in range(1, count + 1)]
    return {"results": links, "result_data": tracks}


def _track(task: Task, stem: str, n: int) -> Json:
    return {
        "result_id": str(uuid.UUID(bytes=bytes([task.digest[0] ^ n]) + task.digest[1:])),
        "title": str(task.body.get("title") or "Untitled"),
        "tags": str(task.body.get("style") or "pop"),
        "duration": 1.2,
        "image_url": f"{stem}.png",
        "audio_url": f"{stem}.wav",
        "stream_audio_url": f"{stem}.wav",
        "video_url": f"{stem}.mp4",
    }


def credits_body(remaining: int, spent: int) -> Json:
    """The answer of GET /v1/credits."""
    figures: Mapping[str, Any] = {"remaining_credits": remaining / MICRO, "used_credits": spent / MICRO}
    return {
        "success": True,
        "message": "",
        "data": {"user": dict(figures), "token": {**figures, "unlimited_credits": False}},
    }
