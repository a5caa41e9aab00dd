"""Which request is which, over runs. Pure."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict

from evolink_async.requests import GenerationRequest

# Without a ledger nothing outlives the run, so equal bodies are counted among this many recent ones only: memory
# must not grow with the number of requests.
_REMEMBERED = 10_000


class Identities:
    """Names requests: by their key, else by content and how many equal ones came before."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, int] = OrderedDict()

    def of(self, request: GenerationRequest) -> str:
        """The request's key, or `<16 hex>-<count>`."""
        if request.key is not None:
            return request.key
        content = content_hash(request)
        count = self._counts.pop(content, -1) + 1
        self._counts[content] = count
        if len(self._counts) > _REMEMBERED:
            self._counts.popitem(last=False)
        return f"{content}-{count}"


def content_hash(request: GenerationRequest) -> str:
    """16 hex digits over the endpoint and the canonical body without `callback_url`."""
    body = {name: value for name, value in request.body().items() if name != "callback_url"}
    try:
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        canonical = repr(sorted(body))  # it cannot be sent and will be rejected; it still wants a name
    return hashlib.sha256(f"{request.endpoint}\n{canonical}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
