"""Every error that evolink_async raises, as one family.

EvoLinkError
├── ConfigurationError                       bad key or option; nothing was sent
├── ClosedError (also RuntimeError)          client or pool is closed or stopped
├── InvalidRequestError                      the request itself is wrong; .param
├── ConnectionFailedError                    provably never sent
├── ResponseError                            unreadable, oversized or impossible answer
├── SubmitOutcomeUnknownError                lost response: a task may or may not exist
├── NotSubmittedError                        nothing was sent; the cause is the reason
├── APIStatusError                           the service answered with an error status
│   ├── BadRequestError (also InvalidRequestError)    400 413 415 422
│   ├── AuthenticationError                  401
│   ├── QuotaExhaustedError                  402
│   ├── PermissionDeniedError                403
│   ├── NotFoundError                        404
│   ├── RateLimitError                       429; .retry_after
│   └── ServerError                          5xx
├── TaskError                                .task
│   ├── TaskFailedError                      .code .retryable
│   ├── TaskCancelledError
│   ├── TaskLostError                        the service no longer knows the id
│   └── TaskTimeoutError (also TimeoutError) still running: resume with its id
├── BudgetExceededError
├── LedgerError
└── DownloadError
    └── ResultExpiredError

try:
    task = await client.images.generate(model="gpt-4o-image", prompt="a lighthouse")
except evolink_async.TaskTimeoutError as error:
    later = error.task.id                    # it is still running, and paid: wait for it again
except evolink_async.EvoLinkError as error:
    print(error)                             # code: message (request id ..., task ...)
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from evolink_async.requests import GenerationRequest
    from evolink_async.types import Task

__all__ = [
    "APIStatusError",
    "AuthenticationError",
    "BadRequestError",
    "BudgetExceededError",
    "ClosedError",
    "ConfigurationError",
    "ConnectionFailedError",
    "DownloadError",
    "EvoLinkError",
    "InvalidRequestError",
    "LedgerError",
    "NotFoundError",
    "NotSubmittedError",
    "PermissionDeniedError",
    "QuotaExhaustedError",
    "RateLimitError",
    "ResponseError",
    "ResultExpiredError",
    "ServerError",
    "SubmitOutcomeUnknownError",
    "TaskCancelledError",
    "TaskError",
    "TaskFailedError",
    "TaskLostError",
    "TaskTimeoutError",
]

# Documented as safe to generate again (error-codes page, vendor's client). A retry is a new paid task.
TRANSIENT_FAILURES = frozenset(
    {
        "generation_timeout",
        "quota_exceeded",
        "rate_limited",
        "resource_exhausted",
        "service_error",
        "service_unavailable",
        "upstream_error",
    }
)


def _is_portable(error: BaseException) -> bool:
    """Whether an exception survives pickling; many of other libraries don't."""
    if isinstance(error, EvoLinkError):
        return True
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # noqa: BLE001  (its own code runs here, and may do anything)
        return False


def _revive(cls: type[EvoLinkError], args: tuple[Any, ...], state: dict[str, Any]) -> EvoLinkError:
    cause = state.pop("__cause__", None)
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    error.__cause__ = cause
    return error


class EvoLinkError(Exception):
    """Base of every error of this library.

    `message` is the sentence without the code, the ids and, where a task ended, the advice that `str()` adds.
    `outcomes` is what `run_many` had already when this error ended its pool early.
    """

    code: str | None = None
    request_id: str | None = None
    outcomes: Sequence[Any] = ()  # of `Outcome`, which is a later room
    _task_id: str | None = None
    _advice: str = ""  # what `str()` says to do next, where the message is the service's own

    def __init__(self, message: str, *, code: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if request_id is not None:
            self.request_id = request_id

    @property
    def task_id(self) -> str | None:
        """The id of the task concerned, where there is one."""
        return self._task_id

    def __str__(self) -> str:
        text = f"{self.code}: {self.message}" if self.code and self.code != self.message else self.message
        if self._advice:
            text = f"{text.rstrip('. ')}. {self._advice}"
        ids = [f"request id {self.request_id}"] if self.request_id else []
        if self.task_id:
            ids.append(f"task {self.task_id}")
        return f"{text} ({', '.join(ids)})" if ids else text

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        if self.__cause__ is not None and _is_portable(self.__cause__):
            state["__cause__"] = self.__cause__
        return _revive, (type(self), self.args, state)


class ConfigurationError(EvoLinkError):
    """A key, an option or a way of use that cannot work. Nothing was sent."""


class ClosedError(EvoLinkError, RuntimeError):
    """The client or pool was closed or stopped before this call."""


class InvalidRequestError(EvoLinkError):
    """The request is wrong: found before sending, or (as `BadRequestError`) said by the service.

    `param` names the parameter, where one is known.
    """

    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param


class ConnectionFailedError(EvoLinkError):
    """The service could not be reached, or the answer to a read was lost: it cannot have cost anything."""


class ResponseError(EvoLinkError):
    """The service's answer is unreadable, oversized or impossible."""

    def __init__(self, message: str, *, status_code: int | None = None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.status_code = status_code


class SubmitOutcomeUnknownError(EvoLinkError):
    """A paid request was sent and no answer came back that settles whether a task exists.

    Submitting it again under a new key may pay twice. `idempotency_key` names the attempt, `request` is what
    was sent; `__cause__` says what happened to the answer. `given_up`: the caller has said in its ledger that nobody
    will find out.
    """

    def __init__(
        self,
        message: str,
        *,
        request: GenerationRequest | None = None,
        idempotency_key: str | None = None,
        code: str | None = None,
        request_id: str | None = None,
        given_up: bool = False,
    ) -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.request = request
        self.idempotency_key = idempotency_key
        self.given_up = given_up


class NotSubmittedError(EvoLinkError):
    """Nothing was sent for this request; `__cause__` is the reason, so it can be given again."""


class APIStatusError(EvoLinkError):
    """The service answered with an error status.

    `body` is the parsed JSON, or the text of an answer that was no JSON, or None.
    """

    advice: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        status_code: int = 0,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        body: Any = None,
    ) -> None:
        if self.advice:
            message = f"{message.rstrip('. ')}. {self.advice}" if message else self.advice
        EvoLinkError.__init__(self, message, code=code, request_id=request_id)
        self.status_code = status_code
        self.type = type
        self.param = param
        self.body = body


class BadRequestError(APIStatusError, InvalidRequestError):
    """400, 413, 415, 422: the service refused the request itself. Nothing was charged (documented)."""


class AuthenticationError(APIStatusError):
    """401: the key was not accepted."""

    advice = "Check the API key (EVOLINK_API_KEY); keys are managed at https://evolink.ai/dashboard/keys"


class QuotaExhaustedError(APIStatusError):
    """402: the balance or the key's quota does not cover the request. Nothing was charged."""

    advice = "Top up at https://evolink.ai/dashboard/credits or raise the key's limit, then run again"


class PermissionDeniedError(APIStatusError):
    """403: the key may not do this, or is disabled or expired (`code` tells)."""

    advice = "See what the key may do at https://evolink.ai/dashboard/keys"


class NotFoundError(APIStatusError):
    """404: no such task, file or endpoint."""

    advice = "Check the id (this account's, and not too old) or base_url"


class RateLimitError(APIStatusError):
    """429: too many requests or too many tasks at once. Nothing was charged.

    `retry_after`: seconds the service asked for, None if it gave no usable hint.
    """

    advice = "Nothing was charged: send it again later, fewer at once or with a rate_limit"

    retry_after: float | None = None


class ServerError(APIStatusError):
    """5xx: the service failed. On a read it is retried; on a paid POST see `SubmitOutcomeUnknownError`."""

    advice = "The service failed; if this lasts, tell its support the request id and the time"


class TaskError(EvoLinkError):
    """Something about one task; `task` is the last that was seen of it."""

    def __init__(self, message: str, *, task: Task, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.task = task

    @property
    def task_id(self) -> str | None:
        return self.task.id


class TaskFailedError(TaskError):
    """The service says that the generation failed. Failed tasks are not charged (documented)."""

    @property
    def retryable(self) -> bool:
        """Whether the failure is of a passing kind, so that a new (paid) task may succeed."""
        return self.code in TRANSIENT_FAILURES

    @property
    def _advice(self) -> str:  # type: ignore[override]
        if self.retryable:
            return "The failure is of a passing kind: generate it again, as a new paid task"
        return "Change what it asks for before you generate it again, as a new paid task"


class TaskCancelledError(TaskError):
    """The service says that the task was cancelled."""

    _advice = "Look at what it cost before you generate it again, as a new paid task"


class TaskLostError(TaskError):
    """The service no longer knows the id: 404 three times over 60 s."""

    _advice = "Check the id and whose key it belongs to, and look for it at the service before you pay again"


class TaskTimeoutError(TaskError, TimeoutError):
    """Waiting ended, the task did not: it is still running and paid for. Wait again with `task.id`."""


class BudgetExceededError(EvoLinkError):
    """The next request could exceed the credits that the caller allowed. It was not sent."""


class LedgerError(EvoLinkError):
    """The ledger cannot be used: locked, corrupt, newer than this version, or not writable."""


class DownloadError(EvoLinkError):
    """A result could not be saved. The generation itself is done: never pay for it again, fetch the link again.

    files: paths of what was saved of the same task all the same.
    """

    files: tuple[Any, ...] = ()


class ResultExpiredError(DownloadError):
    """The result link is dead (24 hours after the generation, documented)."""
