"""The calls of the files API. Pure."""

from __future__ import annotations

from typing import Any

from evolink_async.emulator.answers import Json
from evolink_async.emulator.behaviour import Dialect
from evolink_async.emulator.files import MOST_BYTES, PREFIX, RECEIPTS, TYPES

from .inputs import PAGE, UPLOAD_ID, body, parameter, query
from .responses import answer, answers, call
from .shapes import ref

_REFUSALS = {400: "FileRefused", 401: "FilesUnauthorized", 403: "FilesForbidden", 404: "FileNotFound"}


def file_paths(dialect: Dialect) -> Json:
    """Uploads, the list, the quota, deletion and receipts, by path."""
    at = PREFIX.rstrip("/")
    rows = {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}
    form = body("StreamUpload", "multipart/form-data")
    return {
        f"{at}/upload/base64": {
            "post": _upload(dialect, "uploadBase64", "Upload base64 (documented)", body("Base64Upload"))
        },
        f"{at}/upload/stream": {
            "post": _upload(dialect, "uploadStream", "Upload a form with a file (documented)", form)
        },
        f"{at}/upload/url": {
            "post": _upload(dialect, "uploadUrl", "Have a link fetched (documented)", body("UrlUpload"))
        },
        f"{at}/list": {
            "get": _call(
                dialect,
                "listFiles",
                "List the files, the newest first (vendor's client)",
                answer("One page.", ref("FileListAnswer")),
                400,
                parameters=[PAGE, query("pageSize", "Rows.", rows)],
            )
        },
        f"{at}/quota": {
            "get": _call(
                dialect,
                "getFileQuota",
                "How many files there are and may be (vendor's client)",
                answer("The quota.", ref("QuotaAnswer")),
            )
        },
        f"{at}/{{file_id}}": {
            "delete": _call(
                dialect,
                "deleteFile",
                "Delete a file (vendor's client)",
                answer("It is gone.", ref("DeleteAnswer")),
                404,
                parameters=[{"name": "file_id", "in": "path", "required": True, "schema": ref("FileId")}],
            )
        },
        f"{at}/{RECEIPTS}{{upload_id}}": {
            "get": _call(
                dialect,
                "getUploadReceipt",
                "What became of an upload that brought an X-Evo-Upload-Id (vendor's client)",
                answer("It is stored.", ref("ReceiptAnswer")),
                404,
                parameters=[
                    {
                        "name": "upload_id",
                        "in": "path",
                        "required": True,
                        "schema": {"type": "string"},
                        "example": UPLOAD_ID,
                    }
                ],
            )
        },
    }


def _upload(dialect: Dialect, operation_id: str, summary: str, request: Json) -> Json:
    delete = {"operationId": "deleteFile", "parameters": {"file_id": "$response.body#/data/file_id"}}
    return _call(
        dialect,
        operation_id,
        summary,
        answer("The file is stored.", ref("UploadAnswer"), links={"delete": delete}),
        *(400, 413),
        description=(
            f"Pictures, sound and video of at most {MOST_BYTES // 2**20} MB, known by their first bytes: "
            f"{', '.join(TYPES)}."
        ),
        parameters=[parameter("UploadId")],
        requestBody=request,
    )


def _call(dialect: Dialect, operation_id: str, summary: str, good: Json, *statuses: int, **more: Any) -> Json:
    """A call with the refusals that it knows beside those of the key."""
    refusals = {f"_{status}": _REFUSALS[status] for status in sorted({*statuses, 401, 403} & set(_REFUSALS))}
    if dialect.files_with_200:
        refusals = {}
        media = good["content"]["application/json"]
        media["schema"] = {"oneOf": [media["schema"], ref("FileError")]}
    if 413 in statuses:
        refusals["_413"] = "FileTooLarge"
    return call(operation_id, "Files", summary, answers(good, **refusals), **more)
