"""What schemathesis has to know about the emulator beyond its OpenAPI document."""

from __future__ import annotations

import zlib
from typing import Any

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.openapi.checks import RejectedPositiveData

# JSON Schema can't look into a file, nor behind a link.
_ABOUT_CONTENT = {
    "base64_data is not valid base64.",
    "The file is empty.",
    "Files of this type are not supported.",
    "The URL is not valid.",
    "The file could not be fetched from the URL.",
}
_FORM_TEXTS = ("fileName", "file_name", "uploadPath", "upload_path")


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Keep every failure but two.

    - A valid body is refused for a reason that the document says it can't express.
    - A form's field is no text: sent in a form it becomes one.
    """
    if isinstance(failure, RejectedPositiveData) and response.status_code == 400:
        answer = response.json()
        if "msg" in answer:
            return answer["msg"] not in _ABOUT_CONTENT
        return answer["error"].get("param") not in _refused_beyond_schema(case)
    if isinstance(failure, AcceptedNegativeData) and case.operation.path.endswith("/upload/stream"):
        return all(isinstance(case.body.get(name, ""), str) for name in _FORM_TEXTS)
    return True


def _refused_beyond_schema(case: Any) -> list[str]:
    """The parameters that the document names for the model of this body."""
    schemas = case.operation.schema.raw_schema["components"]["schemas"]
    model = case.body.get("model") if isinstance(case.body, dict) else None
    for schema in schemas.values():
        if model in schema.get("properties", {}).get("model", {}).get("enum", ()):
            return list(schema["x-refused-beyond-schema"])
    return []


@schemathesis.hook.apply_to(operation_id=["uploadBase64", "uploadUrl"])
def map_body(context: Any, body: Any) -> Any:
    """Most uploads have real content: schemathesis can't make any, and the emulator fetches only its own links."""
    if not isinstance(body, dict) or zlib.crc32(repr(body).encode()) % 4 == 0:
        return body
    operation = context.operation
    example = operation.schema.raw_schema["components"]["schemas"]["Base64Upload"]["examples"][0]
    real = {
        "base64_data": example["base64_data"],
        "file_url": f"{operation.base_url.rstrip('/')}/files/{example['file_name']}",
    }
    sent = {name: value for name, value in real.items() if isinstance(body.get(name), str) and body[name]}
    return {**body, **sent}
