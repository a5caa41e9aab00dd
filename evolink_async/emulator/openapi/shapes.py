"""Everything that the emulator answers, as JSON Schema.

The objects are closed: a field that is not described here is a fault of the emulator. The real service sends more.
"""

from __future__ import annotations

from typing import Any

from evolink_async.emulator.answers import Json
from evolink_async.emulator.behaviour import Dialect
from evolink_async.emulator.models import KINDS
from evolink_async.emulator.tasks import FAILURE_MESSAGES

_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_CREDITS: Json = {"type": "number", "minimum": 0}
_LINK: Json = {"type": "string", "format": "uri", "pattern": "^https?://"}
_UNIX_TIME: Json = {"type": "integer", "minimum": 0, "description": "Unix seconds."}
_SECONDS_TAKEN: Json = {"type": "number", "minimum": 0, "description": "Seconds that the task took."}
_DATE_TIME: Json = {"type": "string", "format": "date-time", "description": "RFC 3339, in Beijing's time zone."}

TASK_ID: Json = {
    "type": "string",
    "pattern": "^task-unified-",
    "description": "`task-unified-<unix seconds>-<letters and digits>` (documented).",
    "examples": ["task-unified-1774857405-abc123xy"],
}


def ref(name: str) -> Json:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _closed(description: str, fields: Json, *, optional: Json | None = None) -> Json:
    """An object that has all these fields, perhaps the optional ones, and nothing else."""
    return {
        "type": "object",
        "description": description,
        "required": list(fields),
        "properties": {**fields, **(optional or {})},
        "additionalProperties": False,
    }


def _list_of(items: Json, **limits: int) -> Json:
    return {"type": "array", "items": items, **limits}


_CREATED_INFO = _closed(
    "What is known beforehand.",
    {"can_cancel": {"type": "boolean", "const": True, "description": "Though nothing cancels a task."}},
    optional={
        "estimated_time": {"type": "integer", "minimum": 1, "description": "Seconds; no bound. Some models have none."},
        "video_duration": {**_COUNT, "description": "Seconds; of videos only."},
    },
)
_POLLED_INFO = _closed("Always false in polls (documented).", {"can_cancel": {"type": "boolean", "const": False}})


def _task(status: list[str], progress: Json) -> dict[str, Json]:
    """What all tasks have, whatever became of them."""
    return {
        "created": _UNIX_TIME,
        "id": ref("TaskId"),
        "model": {**_TEXT, "description": "The model used: the full id where an alias was sent (documented)."},
        "object": ref("TaskObject"),
        "progress": progress,
        "status": {"type": "string", "enum": status},
        "type": ref("Kind"),
    }


def _created_task(dialect: Dialect) -> Json:
    fields = _task(["pending"], {"type": "integer", "const": 0})
    if dialect.created == "full":
        fields |= {"task_info": ref("CreatedTaskInfo"), "usage": ref("Usage")}
    if dialect.created == "brief":
        fields = {name: fields[name] for name in ("created", "id", "model", "status")}
    about = "The answer to a submission (documented). A submission that is replayed is answered with the same."
    return _closed(about, fields)


def _usage(dialect: Dialect, **more: Json) -> Json:
    fields = {
        "billing_rule": {"type": "string", "enum": ["per_call", "per_second", "per_token"]},
        "credits_reserved": _CREDITS,
        "user_group": {**_TEXT, "const": "default"},
        **({"estimated_cost": _CREDITS} if dialect.credits == "old" else {}),
        **more,
    }
    return _closed("What the task is expected to cost.", fields)


def _ended_tasks(dialect: Dialect) -> dict[str, Json]:
    """The tasks that have ended, by status."""
    more = {"task_info": ref("TaskInfo")}
    if dialect.polled_usage:
        more |= {"duration": _SECONDS_TAKEN, "usage": ref("EndedUsage"), "billing": ref("Billing")}
    completed = _task(["completed"], {"type": "integer", "const": 100}) | more | {"results": _links(dialect)}
    if dialect.results == "nested":
        completed["result"] = _closed("The same, as the oldest quickstart has it.", {"results": _links(dialect)})
    failed = _task(["failed"], {"type": "integer", "const": 0}) | more | {"error": ref("TaskError")}
    tasks = {
        "completed": _closed("A task with results.", completed, optional={"result_data": ref("ResultData")}),
        "failed": _closed("A task that failed, which is no HTTP error (documented). It costs nothing.", failed),
    }
    if dialect.cancelled == "cancelled":
        cancelled = _task(["cancelled"], {"type": "integer", "const": 0}) | more
        tasks["cancelled"] = _closed("A task that the service cancelled (documented for callbacks).", cancelled)
    return tasks


def _links(dialect: Dialect) -> Json:
    link = {**_LINK, "description": "Lives 24 hours (documented)."}
    return _list_of(_closed("A link.", {"url": link}) if dialect.results == "objects" else link)


def _tasks(dialect: Dialect) -> dict[str, Json]:
    ended = _ended_tasks(dialect)
    names = {status: f"{status.title()}Task" for status in ended}
    by_status = {"pending": "UnfinishedTask", "processing": "UnfinishedTask", **names}
    unfinished = _task(["pending", "processing"], {"type": "integer", "minimum": 0, "maximum": 99})
    about = "A task that has not ended. Its progress need not be true: it may stand still, or come from the estimate."
    return {
        "Kind": {"type": "string", "enum": list(KINDS)},
        "TaskObject": {"type": "string", "enum": [f"{kind}.generation.task" for kind in KINDS]},
        "TaskId": TASK_ID,
        "CreatedTask": _created_task(dialect),
        "CreatedTaskInfo": _CREATED_INFO,
        "TaskInfo": _POLLED_INFO,
        "Usage": _usage(dialect),
        "Task": {
            "description": "The answer to a poll, by its status (documented).",
            "oneOf": [ref(name) for name in ("UnfinishedTask", *names.values())],
            "discriminator": {
                "propertyName": "status",
                "mapping": {status: ref(name)["$ref"] for status, name in by_status.items()},
            },
        },
        "UnfinishedTask": _closed(about, unfinished | {"task_info": ref("TaskInfo")}),
        **{names[status]: schema for status, schema in ended.items()},
        "TaskBatch": _closed(
            "The tasks of a batch (vendor's client); ids that are not known are left out.",
            {"data": _list_of(ref("Task"), maxItems=50)},
        ),
        "TaskRow": _closed(
            "A task in the list (vendor's client): no links.",
            {
                "id": ref("TaskId"),
                "status": {"type": "string", "enum": list(by_status)},
                "model": _TEXT,
                "type": ref("Kind"),
                "progress": {**_COUNT, "maximum": 100},
                "created_at": _UNIX_TIME,
                "has_results": {"type": "boolean"},
                "has_error": {"type": "boolean"},
                "credits_used": _CREDITS,
            },
        ),
        "TaskPage": _closed(
            "One page of the account's tasks, the newest first (vendor's client).",
            {
                "data": _list_of(ref("TaskRow"), maxItems=50),
                "total": _COUNT,
                "page": {"type": "integer", "minimum": 1},
                "page_size": {"type": "integer", "minimum": 1, "maximum": 50},
            },
        ),
        **({"EndedUsage": _usage(dialect, credits_used=_CREDITS), "Billing": _BILLING} if dialect.polled_usage else {}),
        **_RESULTS,
    }


_BILLING = _closed(
    "What became of the reservation: newer gateways (vendor's client).",
    {
        "refund_scope": {**_TEXT, "const": "account_balance"},
        "charge_status": {"type": "string", "enum": ["charged", "released"]},
        "refund_status": {"type": "string", "enum": ["completed", "not_required"]},
        "reserved_credits": _CREDITS,
        "charged_credits": _CREDITS,
        "refunded_credits": _CREDITS,
    },
    optional={"refunded_at": {**_TEXT, "format": "date-time"}},
)

_RESULTS: dict[str, Json] = {
    "TaskError": _closed(
        "Why a task failed.",
        {
            "code": {**_TEXT, "description": "An open list (documented).", "examples": list(FAILURE_MESSAGES)},
            "message": _TEXT,
            "type": {**_TEXT, "const": "task_error"},
        },
    ),
    "ResultData": {
        "description": "What some audio and tool models answer besides, or instead of, links (documented).",
        "anyOf": [_list_of(ref("Track"), minItems=1), ref("Voice"), ref("Persona"), ref("Element")],
    },
    "Track": _closed(
        "One song of a Suno task.",
        {
            "result_id": {**_TEXT, "format": "uuid"},
            "title": _TEXT,
            "tags": _TEXT,
            "duration": {"type": "number", "minimum": 0, "description": "Seconds."},
            "image_url": _LINK,
            "audio_url": _LINK,
            "stream_audio_url": _LINK,
            "video_url": _LINK,
        },
    ),
    "Voice": _closed("The result of qwen-voice-design.", {"voice": _TEXT}),
    "Persona": _closed("The result of suno-persona.", {"persona_id": _TEXT}),
    "Element": _closed("The result of kling-custom-element (its shape is our guess).", {"id": _TEXT}),
}

_ACCOUNT: dict[str, Json] = {
    "Credits": _closed(
        "What the account and the key have left (documented).",
        {
            "success": {"type": "boolean", "const": True},
            "message": _TEXT,
            "data": ref("CreditBalances"),
        },
    ),
    "CreditBalances": _closed("Credits.", {"user": ref("UserCredits"), "token": ref("TokenCredits")}),
    "UserCredits": _closed("Of the account.", {"remaining_credits": _CREDITS, "used_credits": _CREDITS}),
    "TokenCredits": _closed(
        "Of the key.",
        {"remaining_credits": _CREDITS, "used_credits": _CREDITS, "unlimited_credits": {"type": "boolean"}},
    ),
    "ModelList": _closed(
        "The models that this key may use (vendor's client).",
        {"data": _list_of(ref("ModelRow"), minItems=1)},
    ),
    "ModelRow": _closed("A model.", {"id": _TEXT}),
}


def _errors(dialect: Dialect) -> dict[str, Json]:
    code = {"type": "integer"} if dialect.errors == "old" else _TEXT
    hint = "Older style of a hint: 'retry after 60 seconds' (an EvoLink site)."
    error = _closed(
        "What is wrong.",
        {"code": code, "message": _TEXT, "type": _TEXT},
        optional={
            "param": {**_TEXT, "description": "The parameter at fault."},
            "fallback_suggestion": {**_TEXT, "description": hint},
        },
    )
    about = "The error envelope of this generation of the API."
    return {"Error": _closed(about, {"error": ref("ErrorDetails")}), "ErrorDetails": error}


_FILE_ERROR = _closed(
    "The error envelope of the files API (documented).",
    {
        "success": {"type": "boolean", "const": False},
        "code": {
            "type": "integer",
            "description": "400, 401, 403, 404, 40001 too large, 40002 type, 40003 quota, 40004 link not fetched.",
        },
        "msg": _TEXT,
    },
)


def _file_answer(description: str, data: Json) -> Json:
    head: dict[str, Any] = {
        "success": {"type": "boolean", "const": True},
        "code": {"type": "integer", "const": 200},
        "msg": _TEXT,
    }
    return _closed(description, {**head, "data": data})


_ROW = {"file_id": ref("FileId"), "file_name": _TEXT, "file_size": {**_COUNT, "minimum": 1}, "upload_time": _DATE_TIME}

_FILES: dict[str, Json] = {
    "FileId": {"type": "string", "examples": ["file_0_00000001"]},
    "UploadAnswer": _file_answer("A file was stored (documented).", ref("StoredFile")),
    "StoredFile": _closed(
        "An uploaded file. It lives 72 hours, and one of the same path and name takes its place (documented).",
        {
            **_ROW,
            "original_name": _TEXT,
            "mime_type": _TEXT,
            "upload_path": _TEXT,
            "file_url": _LINK,
            "download_url": _LINK,
            "expires_at": _DATE_TIME,
        },
    ),
    "FileListAnswer": _file_answer("One page of the files (vendor's client).", ref("FilePage")),
    "FilePage": _closed("The newest first.", {"total": _COUNT, "files": _list_of(ref("FileRow"), maxItems=100)}),
    "FileRow": _closed("A file in the list.", _ROW),
    "QuotaAnswer": _file_answer("How many files there are and may be (vendor's client).", ref("FileQuota")),
    "FileQuota": _closed(
        "Numbers of files.",
        {"user_group": _TEXT, "used_files": _COUNT, "max_files": _COUNT, "remain_files": _COUNT},
    ),
    "DeleteAnswer": _file_answer("The file is gone (vendor's client).", {"type": "null"}),
    "ReceiptAnswer": _closed(
        "What became of an upload (vendor's client).",
        {"success": {"type": "boolean", "const": True}, "data": ref("UploadReceipt")},
    ),
    "UploadReceipt": _closed(
        "For an upload whose answer was lost.",
        {
            "upload_id": _TEXT,
            "state": {**_TEXT, "const": "done"},
            "result_verified": {"type": "boolean", "const": True},
            "file": ref("StoredFile"),
        },
    ),
    "FileError": _FILE_ERROR,
}


def answer_schemas(dialect: Dialect) -> dict[str, Json]:
    """The schema of everything that is answered, by name."""
    return {**_tasks(dialect), **_ACCOUNT, **_errors(dialect), **_FILES}
