"""Which request is which, over runs. Pure."""

from __future__ import annotations

import hashlib
import json

from evolink_async.requests import GenerationRequest


def content_hash(request: GenerationRequest) -> str:
    """16 hex digits over the endpoint and the canonical body without `callback_url`."""
    body = {name: value for name, value in request.body().items() if name != "callback_url"}
    try:
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        canonical = repr(sorted(body))  # it cannot be sent and will be rejected; it still wants a name
    return hashlib.sha256(f"{request.endpoint}\n{canonical}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
