"""What a request may carry: parameters, and the bodies that are not a model's. Pure."""

from __future__ import annotations

from typing import Any

from evolink_async.emulator.answers import Json
from evolink_async.emulator.files import FILE_NAME, FOLDER
from evolink_async.emulator.queries import LAST_PAGE
from evolink_async.emulator.service import BATCH_LIMIT

from .responses import EXAMPLE_TASK
from .shapes import ref

UPLOAD_ID = "upload_0123456789abcdef"
_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

PARAMETERS: Json = {
    "IdempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": (
            "A repeat with the same key and the same body makes no second task: it is answered with the first one "
            "(vendor's client, which sends 16 to 96 characters of A-Z a-z 0-9 . _ -; here any text will do)."
        ),
        "schema": {"type": "string"},
    },
    "UploadId": {
        "name": "X-Evo-Upload-Id",
        "in": "header",
        "description": (
            "Keeps a receipt for this upload, to ask for when its answer was lost (vendor's client): 16 to 128 "
            "letters, digits, - and _; anything else is ignored."
        ),
        "schema": {"type": "string"},
        "example": UPLOAD_ID,
    },
    "TaskId": {"name": "task_id", "in": "path", "required": True, "schema": ref("TaskId")},
    "Range": {
        "name": "Range",
        "in": "header",
        "description": "One range of bytes; anything else is ignored.",
        "schema": {"type": "string"},
        "example": "bytes=0-99",
    },
    "IfRange": {
        "name": "If-Range",
        "in": "header",
        "description": "The ETag for which the range is meant.",
        "schema": {"type": "string"},
    },
}


def _or_null(name: str) -> Json:
    return {"anyOf": [ref(name), {"type": "null"}]}


BODIES: dict[str, Json] = {
    "BatchRequest": {
        "type": "object",
        "required": ["task_ids"],
        "properties": {
            "task_ids": {"type": "array", "minItems": 1, "maxItems": BATCH_LIMIT, "items": {"type": "string"}}
        },
        "examples": [{"task_ids": [EXAMPLE_TASK]}],
    },
    "FileName": {
        "description": "The name to store the file under; without one its own, or one made from the content.",
        "type": "string",
        "pattern": f"^{FILE_NAME}$",
    },
    "UploadPath": {
        "description": "The folder to store the file in; no step of it is `..`.",
        "type": "string",
        "pattern": f"^{FOLDER}$",
    },
    "Base64Upload": {
        "type": "object",
        "required": ["base64_data"],
        "properties": {
            "base64_data": {
                "type": "string",
                "minLength": 1,
                "description": "The file in base64, bare or as a data URL (documented).",
            },
            "upload_path": _or_null("UploadPath"),
            "file_name": _or_null("FileName"),
        },
        "examples": [
            {"base64_data": _PNG, "file_name": "dot.png"},
            {"base64_data": f"data:image/png;base64,{_PNG}", "upload_path": "pictures", "file_name": "dot.png"},
        ],
    },
    "UrlUpload": {
        "type": "object",
        "required": ["file_url"],
        "properties": {
            "file_url": {"type": "string", "minLength": 1, "description": "The emulator fetches only its own links."},
            "upload_path": _or_null("UploadPath"),
            "file_name": _or_null("FileName"),
        },
        "examples": [{"file_url": "http://127.0.0.1:8085/files/dot.png"}],
    },
    "StreamUpload": {
        "type": "object",
        "required": ["file"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "uploadPath": {**ref("UploadPath"), "description": "As the vendor's client spells it."},
            "fileName": {**ref("FileName"), "description": "As the vendor's client spells it."},
            "upload_path": {**ref("UploadPath"), "description": "As the documentation spells it."},
            "file_name": {**ref("FileName"), "description": "As the documentation spells it."},
        },
    },
}


def parameter(name: str) -> Json:
    """A reference to a parameter of the document."""
    return {"$ref": f"#/components/parameters/{name}"}


def query(name: str, description: str, schema: Json) -> Json:
    """A parameter of the query string that may be left out."""
    return {"name": name, "in": "query", "description": description, "schema": schema}


def body(name: str, media_type: str = "application/json", **more: Any) -> Json:
    """A body that must be sent, by the name of its schema."""
    return {"required": True, "content": {media_type: {"schema": ref(name), **more}}}


PAGE = query("page", "From 1.", {"type": "integer", "minimum": 1, "maximum": LAST_PAGE, "default": 1})
