"""A single paid call: one request through the submitter, for a caller who waits and may stop waiting."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from evolink_async.errors import ConnectionFailedError, EvoLinkError, RateLimitError
from evolink_async.http.answers import Judgement
from evolink_async.http.pace import Urgency
from evolink_async.http.submit import Settled, Submission, Submitter
from evolink_async.requests import GenerationRequest
from evolink_async.types import Task, TaskReading

logger = logging.getLogger("evolink_async.submit")


@dataclass(slots=True, eq=False)
class _Waiter:
    """The listener of a single call. The future gives the end, or None if there is no use in waiting for it."""

    future: asyncio.Future[Settled | None]
    deadline: float | None

    async def intend(self, submission: Submission, fingerprint: str) -> Settled | None:
        return None

    def unsent(self, submission: Submission) -> None:
        pass

    def answered(self, submission: Submission, judgement: Judgement) -> None:
        pass

    async def accepted(self, submission: Submission, task: TaskReading) -> EvoLinkError | None:
        return None

    def held(self, submission: Submission, error: EvoLinkError) -> None:
        hint = error.retry_after if isinstance(error, RateLimitError) else None
        if hint is None or self.deadline is None or self.future.done():
            return
        if asyncio.get_running_loop().time() + hint >= self.deadline:
            self.future.set_result(None)

    def paused(self, error: EvoLinkError) -> None:
        pass  # until the deadline

    def settled(self, submission: Submission, settled: Settled) -> None:
        if not self.future.done():
            self.future.set_result(settled)

    def crashed(self, error: BaseException) -> None:
        pass  # `settled` was told before, with the fault as the cause


async def submit_and_wait(
    submitter: Submitter,
    request: GenerationRequest,
    key: str,
    party: Hashable,
    deadline: float | None,
    *,
    content: bytes = b"",
    on_end: Callable[[Settled], None] = lambda settled: None,
) -> Task:
    """Submit one request and return its task; the error of the submission is raised.

    content: the bytes to send, if they are not the request's own. on_end: called with what is known at the end.

    At the deadline (loop time) and when cancelled, a POST under way has `GRACE` seconds to be answered; then the
    cancellation goes on with the id, or failing that the idempotency key, in a note of the exception. When the service
    asks for a pause that ends after the deadline, its refusal is raised at once.
    """
    loop = asyncio.get_running_loop()
    waiter = _Waiter(loop.create_future(), deadline)
    submission = Submission(
        request, key, party, Urgency.CALLER, waiter, float("inf"), submitter.replays, content=content
    )
    submitter.start(submission)
    settled = None
    try:
        try:
            async with asyncio.timeout_at(deadline):
                settled = await waiter.future
        except TimeoutError:
            pass
        is_late = settled is None
        if settled is None:
            settled = await submitter.leave(submission)
        on_end(settled)
        why = _why_late(submission) if is_late and settled.ending == "not_submitted" else None
        if why is not None:
            raise why
    except asyncio.CancelledError as cancellation:
        try:
            settled = await submitter.leave(submission)
        except asyncio.CancelledError:
            settled = submitter.known(submission)
        on_end(settled)
        _note(cancellation, submission, settled)
        if settled.task is not None:
            submitter.leave_alone(settled.task.id)
        raise
    if settled.task is not None:
        return settled.task.task
    assert settled.error is not None
    raise settled.error


def _why_late(submission: Submission) -> EvoLinkError | None:
    """What kept a request until its deadline, None if only its turn did not come."""
    if submission.last_error is None and submission.flight is not None and submission.flight.connecting:
        return ConnectionFailedError("no connection to the service within the timeout; nothing was sent")
    return submission.last_error


def _note(cancellation: BaseException, submission: Submission, settled: Settled) -> None:
    """Put the id, or the key, where whoever handles the cancellation can find it."""
    if settled.task is not None:
        note = f"evolink task {settled.task.id} was accepted and is running: client.tasks.wait({settled.task.id!r})"
    elif settled.ending == "unknown":
        note = f"an evolink request may have been accepted: idempotency key {submission.key}"
    else:
        return
    cancellation.add_note(note)
    logger.warning(
        "cancelled while submitting: %s",
        note,
        extra={
            "event": "submission_cancelled",
            "task_id": None if settled.task is None else settled.task.id,
            "idempotency_key": submission.key,
            "model": submission.request.model,
        },
    )
