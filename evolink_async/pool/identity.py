"""Which request is which, over runs. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from evolink_async.requests import GenerationRequest, body_with

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def content_hash(request: GenerationRequest, contents: Mapping[str, str] | None = None) -> bytes:
    """8 bytes over the endpoint and the canonical body without `callback_url`.

    contents: what counts in the place of local files, and of links to uploads, by where they stand.
    """
    body = body_with(request, contents or {})
    body.pop("callback_url", None)
    try:
        canonical = _canonical(body)
    except (TypeError, ValueError, RecursionError):
        canonical = repr(sorted(body))  # it cannot be sent and will be rejected; it still wants a name
    return hashlib.sha256(f"{request.endpoint}\n{canonical}".encode("utf-8", "surrogatepass")).digest()[:8]
