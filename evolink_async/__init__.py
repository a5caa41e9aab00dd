"""evolink_async: run many EvoLink image, video and audio generations from asyncio.

    import asyncio
    from evolink_async import AsyncEvoLink, ImageRequest

    async def main():
        requests = [ImageRequest(model="gpt-4o-image", prompt=f"a lighthouse, variation {n}") for n in range(100)]
        async with AsyncEvoLink() as client, client.pool(requests) as pool:
            async for outcome in pool:                  # as each completes
                print(outcome.index, outcome.status, outcome.urls, outcome.error)

    asyncio.run(main())

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evolink_async._version import __version__

if TYPE_CHECKING:
    from evolink_async.client import AsyncEvoLink
    from evolink_async.errors import (
        APIStatusError,
        AuthenticationError,
        BadRequestError,
        BudgetExceededError,
        ClosedError,
        ConfigurationError,
        ConnectionFailedError,
        DownloadError,
        EvoLinkError,
        InvalidRequestError,
        LedgerError,
        NotFoundError,
        NotSubmittedError,
        PermissionDeniedError,
        QuotaExhaustedError,
        RateLimitError,
        ResponseError,
        ResultExpiredError,
        ServerError,
        SubmitOutcomeUnknownError,
        TaskCancelledError,
        TaskError,
        TaskFailedError,
        TaskLostError,
        TaskTimeoutError,
    )
    from evolink_async.http.rates import RateLimit
    from evolink_async.http.retry import RetryPolicy
    from evolink_async.ledger import open_ledger
    from evolink_async.pool import Outcome, OutcomeStatus, PoolStats, TaskPool
    from evolink_async.requests import AudioRequest, GenerationRequest, ImageRequest, VideoRequest
    from evolink_async.types import (
        CreditBalance,
        Credits,
        KeyCredits,
        Task,
        TaskFailure,
        TaskInfo,
        TaskStatus,
        UploadedFile,
        Usage,
    )

__all__ = [
    "APIStatusError",
    "AsyncEvoLink",
    "AudioRequest",
    "AuthenticationError",
    "BadRequestError",
    "BudgetExceededError",
    "ClosedError",
    "ConfigurationError",
    "ConnectionFailedError",
    "CreditBalance",
    "Credits",
    "DownloadError",
    "EvoLinkError",
    "GenerationRequest",
    "ImageRequest",
    "InvalidRequestError",
    "KeyCredits",
    "LedgerError",
    "NotFoundError",
    "NotSubmittedError",
    "Outcome",
    "OutcomeStatus",
    "PermissionDeniedError",
    "PoolStats",
    "QuotaExhaustedError",
    "RateLimit",
    "RateLimitError",
    "ResponseError",
    "ResultExpiredError",
    "RetryPolicy",
    "ServerError",
    "SubmitOutcomeUnknownError",
    "Task",
    "TaskCancelledError",
    "TaskError",
    "TaskFailedError",
    "TaskFailure",
    "TaskInfo",
    "TaskLostError",
    "TaskPool",
    "TaskStatus",
    "TaskTimeoutError",
    "UploadedFile",
    "Usage",
    "VideoRequest",
    "__version__",
    "open_ledger",
]

_ROOMS = {
    "client": ("AsyncEvoLink",),
    "http.rates": ("RateLimit",),
    "http.retry": ("RetryPolicy",),
    "ledger": ("open_ledger",),
    "pool": ("Outcome", "OutcomeStatus", "PoolStats", "TaskPool"),
    "requests": ("AudioRequest", "GenerationRequest", "ImageRequest", "VideoRequest"),
    "types": (
        *("CreditBalance", "Credits", "KeyCredits", "Task", "TaskFailure", "TaskInfo", "TaskStatus"),
        *("UploadedFile", "Usage"),
    ),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name) or ("errors" if name.endswith("Error") and name in __all__ else None)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
