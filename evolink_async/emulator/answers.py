"""Answers as they look on the wire. Pure: from records to dicts."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .models import MICRO, result_count, video_seconds
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


def error_body(refusal: Refusal, suggestion: str | None = None) -> Json:
    """The documented error shape."""
    error: Json = {"code": refusal.code, "message": refusal.message, "type": refusal.type}
    if refusal.param is not None:
        error["param"] = refusal.param
    if suggestion is not None:
        error["fallback_suggestion"] = suggestion
    return {"error": error}


def credits_of(micro: int) -> int | float:
    """Micro-credits as the number on the wire."""
    whole, rest = divmod(micro, MICRO)
    return whole if rest == 0 else micro / MICRO


def created_task(task: Task) -> Json:
    """The answer to a POST. It doesn't change with time, so a replay is told the same."""
    info: Json = {"can_cancel": True, "estimated_time": round(task.estimate)}
    if task.model.kind == "video":
        info["video_duration"] = int(video_seconds(task.model, task.body))
    return {
        "created": int(task.created),
        "id": task.id,
        "model": task.model.id,
        "object": f"{task.model.kind}.generation.task",
        "progress": 0,
        "status": "pending",
        "type": task.model.kind,
        "task_info": info,
        "usage": {
            "billing_rule": task.model.billing_rule,
            "credits_reserved": credits_of(task.reserved),
            "user_group": "default",
        },
    }


def polled_task(task: Task, now: float, links_at: str) -> Json:
    """The answer to a poll. ``links_at`` is where the results are served, without a slash at the end."""
    status = task.status(now)
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
    elif status == "failed" and task.failure is not None:
        message = FAILURE_MESSAGES[task.failure]
        answer["error"] = {"code": task.failure, "message": message, "type": "task_error"}
    return answer


def listed_task(task: Task, now: float) -> Json:
    """A row of the list: no links."""
    status = task.status(now)
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
    count = result_count(task.model, task.body)
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
