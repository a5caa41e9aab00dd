"""Paid requests: from the queue to an id, or to a clear word on what is known.

Each POST runs in an asyncio task of this module's own, never in the caller's, so that no cancellation can cut it in
half. What an answer means and what may be done next is decided in `answers` and `retry`; here it is only carried out.

    queued ──go──▶ flying ──answer──▶ settled
      ▲               │
      ├── again ──────┤  429, no connection, paid_outcome_unknown: back to the queue, first in line
      └── parked ◀────┘  lost response: waits until it may be sent again with the same key
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import secrets
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import anyio

from evolink_async.errors import (
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotSubmittedError,
    SubmitOutcomeUnknownError,
)
from evolink_async.http.answers import Judgement, judge_submission
from evolink_async.http.exchange import AnswerLost, Exchange, Flight, NotSent
from evolink_async.http.keys import ApiKey, fingerprint
from evolink_async.http.pace import Pace, Ticket, Urgency
from evolink_async.http.retry import (
    REPLAY_LATEST,
    History,
    Next,
    Replays,
    RetryPolicy,
    Step,
    Verdict,
    next_step,
)
from evolink_async.requests import GenerationRequest, encode_body
from evolink_async.types import Task

logger = logging.getLogger("evolink_async.submit")

# How long a cancelled caller waits for the answer of a POST that is under way, in seconds.
GRACE = 5.0

_IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._-]{16,96}", re.ASCII)  # the vendor's own rule

Ending = Literal["accepted", "rejected", "unknown", "not_submitted"]


def new_idempotency_key() -> str:
    """A fresh key: `ea-` and 32 hex digits."""
    return f"ea-{secrets.token_hex(16)}"


def checked_idempotency_key(key: str | None) -> str:
    """The caller's key, or a fresh one. Raises `InvalidRequestError` for one the service does not accept."""
    if key is None:
        return new_idempotency_key()
    if not _IDEMPOTENCY_KEY.fullmatch(str(key)):
        raise InvalidRequestError(
            f"an idempotency key has 16 to 96 characters out of A-Z a-z 0-9 . _ -, got {key!r}", param="idempotency_key"
        )
    return key


@dataclass(frozen=True, slots=True)
class Settled:
    """What is known of a paid request at its end. `fatal`: why no further request should be sent."""

    ending: Ending
    task: Task | None = None
    error: EvoLinkError | None = None
    fatal: EvoLinkError | None = None


class Listener(Protocol):
    """Whoever gave a submission and wants to know."""

    def posting(self, submission: Submission) -> None:
        """A POST is about to be made."""

    def held(self, submission: Submission, error: EvoLinkError) -> None:
        """It was not taken and goes back to the queue."""

    def settled(self, submission: Submission, settled: Settled) -> None:
        """The end. Called once, synchronously, with no await since the answer was judged."""

    def crashed(self, error: BaseException) -> None:
        """A fault of this library (or of a listener) while the submission was carried out."""


@dataclass(slots=True, eq=False)
class Submission:
    """One paid request on its way. The bytes and the key are the same for every attempt."""

    request: GenerationRequest
    key: str
    party: Hashable
    urgency: Urgency
    listener: Listener
    patience: float
    content: bytes = b""
    last_try: bool = False  # once it is out of its current POST it is not sent again
    attempts: int = 0
    flight: Flight | None = None
    post: asyncio.Task[None] | None = None
    ticket: Ticket | None = None
    end: Settled | None = None
    last_error: EvoLinkError | None = None
    _first_sent: float | None = field(default=None, init=False)
    _first_unsent: float | None = field(default=None, init=False)
    _first_asked: float | None = field(default=None, init=False)
    _asked: int = field(default=0, init=False)
    _lost: int = field(default=0, init=False)
    _replaying: bool = field(default=False, init=False)
    _key_print: str | None = field(default=None, init=False)

    @property
    def was_sent(self) -> bool:
        """Whether an attempt reached the wire whose answer doesn't exclude that a task exists."""
        return bool(self._lost or self._asked or (self.flight and self.flight.sent))


class Submitter:
    """Carries out the submissions of a client on one loop."""

    def __init__(
        self,
        exchange: Exchange,
        api_key: ApiKey,
        pace: Pace,
        retry: RetryPolicy,
        replays: Replays,
        *,
        hold: bool,
        request_timeout: float,
    ) -> None:
        self._exchange = exchange
        self._api_key = api_key
        self._pace = pace
        self._retry = retry
        self._replays = replays
        self._hold = hold
        self._request_timeout = request_timeout
        self._loop = asyncio.get_running_loop()
        self._posts: set[asyncio.Task[None]] = set()
        self._parked: dict[Submission, asyncio.TimerHandle] = {}
        self._live: set[Submission] = set()

    def start(self, submission: Submission) -> None:
        """Queue a submission; its listener hears of the end. Raises `InvalidRequestError` if it cannot be written."""
        submission.content = encode_body(submission.request)
        self._live.add(submission)
        self._queue(submission, submission.urgency, 0.0)

    def withdraw(self, submission: Submission) -> Settled:
        """Stop a submission that is queued or parked, and say what is known of it. Its listener is not called.

        One that is flying cannot be stopped: use `leave`.
        """
        self._unpark(submission)
        if submission.ticket is not None:
            self._pace.withdraw(submission.ticket)
            submission.ticket = None
        if submission._replaying:
            self._end_replay(submission, marked=False)
        self._live.discard(submission)
        submission.end = self._abandoned(submission)
        return submission.end

    async def leave(self, submission: Submission, seconds: float = GRACE) -> Settled:
        """What is known of a submission whose caller stops waiting: a POST under way gets `seconds` to be answered.

        A native cancellation during the wait ends it at once. The POST itself goes on in any case, and a late id
        is logged.
        """
        post = submission.post
        if submission.end is None and post is not None:
            if submission.flight is not None and not submission.flight.sent:
                post.cancel()  # nothing was written yet
            with anyio.CancelScope(shield=True):
                await asyncio.wait({post}, timeout=seconds)
        return self.known(submission)

    def known(self, submission: Submission) -> Settled:
        """What is known of a submission now, for good: an answer that comes later is only logged."""
        if submission.end is None and submission.post is not None and not submission.post.done():
            submission.end = Settled("unknown", error=self._unknown(submission, "its answer had not come yet"))
        return submission.end or self.withdraw(submission)

    async def aclose(self) -> None:
        """Take back what is queued, give POSTs under way the grace period, then cut them; their keys are logged."""
        for submission in self._live:
            submission.last_try = True
        for submission in [one for one in self._live if one.post is None]:
            end = self.withdraw(submission)
            submission.listener.settled(submission, end)
        if self._posts:
            with anyio.CancelScope(shield=True):
                await asyncio.wait(self._posts, timeout=GRACE)
        for post in list(self._posts):
            post.cancel()
        if self._posts:
            await asyncio.wait(self._posts)
        for submission in list(self._live):
            self._settle(submission, self.known(submission))

    # One attempt

    def _queue(self, submission: Submission, urgency: Urgency, delay: float) -> None:
        def go() -> None:
            submission.ticket = None
            submission.flight = Flight()
            post = self._loop.create_task(
                self._attempt(submission, submission.flight),
                name="evolink post",
                context=contextvars.Context(),
            )
            submission.post = post
            self._posts.add(post)
            post.add_done_callback(lambda _: self._landed(submission, post))

        not_before = self._loop.time() + delay if delay > 0 else 0.0
        ticket = Ticket(submission.request.model, submission.party, urgency, go, not_before)
        submission.ticket = ticket
        self._pace.enqueue(ticket)

    def _landed(self, submission: Submission, post: asyncio.Task[None]) -> None:
        self._posts.discard(post)
        if submission.post is post:
            submission.post = None
        self._pace.finished()
        error = None if post.cancelled() else post.exception()
        if error is None:
            return
        # A fault of ours: the caller must hear of it, and of the money that may be spent.
        logger.error("a submission failed inside this library: %r", error)
        if submission.end is None:
            unknown = self._unknown(submission, f"a fault of this client: {error!r}")
            unknown.__cause__ = error
            self._settle(submission, Settled("unknown", error=unknown))
        submission.listener.crashed(error)

    async def _attempt(self, submission: Submission, flight: Flight) -> None:
        loop = self._loop
        model = submission.request.model
        sent_at = loop.time()
        try:
            key = await self._api_key.get()
        except ConfigurationError as error:
            self._settle(submission, Settled("not_submitted", error=error, fatal=error))
            return
        key_print = fingerprint(key)
        if submission._key_print is None:
            submission._key_print = key_print
        elif submission._key_print != key_print and submission._lost:
            self._settle(submission, self._given_up(submission, "the API key has changed since it was sent"))
            return
        submission.listener.posting(submission)
        try:
            answer = await self._exchange.send(
                "POST",
                submission.request.endpoint,
                key=key,
                lane="submit",
                seconds=self._request_timeout,
                content=submission.content,
                headers={"Idempotency-Key": submission.key},
                flight=flight,
            )
        except NotSent as error:
            judgement = Judgement(Verdict.UNSENT, error=ConnectionFailedError(str(error)))
            judgement.error.__cause__ = error.__cause__  # type: ignore[union-attr]
            self._pace.unreachable(loop.time(), sent_at)
        except AnswerLost as error:
            flight.sent = True
            judgement = Judgement(Verdict.LOST, error=EvoLinkError(str(error)))
        except asyncio.CancelledError:
            if flight.sent and submission.end is None:
                logger.warning("a paid POST was cut before its answer: idempotency key %s", submission.key)
            raise
        else:
            flight.sent = True
            self._pace.reachable()
            judgement = judge_submission(answer)
        if flight.sent:
            submission.attempts += 1
            submission._first_sent = sent_at if submission._first_sent is None else submission._first_sent
        self._tell_pace(model, judgement, sent_at)
        self._proceed(submission, judgement)

    def _tell_pace(self, model: str, judgement: Judgement, sent_at: float) -> None:
        now = self._loop.time()
        if judgement.verdict is Verdict.ACCEPTED:
            self._pace.accepted(model, now)
        elif judgement.verdict is Verdict.RATE_LIMITED:
            self._pace.refused(model, now, sent_at, judgement.retry_after)
        elif judgement.verdict is Verdict.LOST and judgement.retry_after is not None:
            self._pace.cool(model, now + judgement.retry_after)

    # What follows from an answer

    def _proceed(self, submission: Submission, judgement: Judgement) -> None:
        now = self._loop.time()
        verdict = judgement.verdict
        if judgement.error is not None:
            submission.last_error = judgement.error
        if verdict is Verdict.UNSENT and submission._first_unsent is None:
            submission._first_unsent = now
        if verdict is Verdict.IN_PROGRESS:
            submission._asked += 1
            submission._first_asked = now if submission._first_asked is None else submission._first_asked
        proven = judgement.replayed or verdict is Verdict.IN_PROGRESS
        if proven:
            self._replays.proven = True
        step = next_step(verdict, self._history(submission, now), judgement.retry_after)
        if verdict is Verdict.LOST:
            submission._lost += 1
        elif verdict is not Verdict.UNSENT:
            submission._first_unsent = None
        if submission._replaying and (step.next is not Next.AGAIN or submission.end is not None):
            self._end_replay(submission, marked=proven)
        elif proven:
            self._reconsider_parked()
        if submission.end is not None:
            self._log_late(submission, judgement)
            return
        if submission.last_try and step.next in (Next.AGAIN, Next.REPLAY):
            self._settle(submission, self._abandoned(submission))
            return
        self._take(submission, judgement, step)

    def _history(self, submission: Submission, now: float) -> History:
        def since(moment: float | None) -> float:
            return 0.0 if moment is None else now - moment

        return History(
            age=since(submission._first_sent),
            lost=submission._lost,
            asked=submission._asked,
            asked_for=since(submission._first_asked),
            unsent_for=since(submission._first_unsent),
            patience=submission.patience,
            may_replay=not self._hold,
        )

    def _take(self, submission: Submission, judgement: Judgement, step: Step) -> None:
        error = judgement.error
        match step.next:
            case Next.ACCEPT:
                task = judgement.task
                assert task is not None
                logger.debug("task %s accepted", task.id)
                self._settle(submission, Settled("accepted", task=task))
            case Next.AGAIN:
                self._queue(submission, Urgency.RETURNED, step.delay)
                if error is not None:
                    submission.listener.held(submission, error)
            case Next.REPLAY:
                self._park(submission, step.delay)
            case Next.REJECT:
                self._settle(submission, Settled("rejected", error=error))
            case Next.NOT_SUBMIT:
                self._settle(submission, Settled("not_submitted", error=error, fatal=error))
            case Next.GIVE_UP:
                fatal = error if judgement.verdict is Verdict.ACCOUNT else None
                self._settle(submission, self._given_up(submission, str(error), fatal))

    def _settle(self, submission: Submission, end: Settled) -> None:
        submission.end = end
        self._live.discard(submission)
        submission.listener.settled(submission, end)

    def _given_up(self, submission: Submission, why: str, fatal: EvoLinkError | None = None) -> Settled:
        error = self._unknown(submission, why)
        logger.warning("lost response, not settled: idempotency key %s", submission.key)
        return Settled("unknown", error=error, fatal=fatal)

    def _unknown(self, submission: Submission, why: str) -> SubmitOutcomeUnknownError:
        last = submission.last_error
        error = SubmitOutcomeUnknownError(
            f"the request was sent, but whether a task exists (and is paid for) is not known: {why}. "
            f"Look for it at the service before you submit it again; idempotency key {submission.key}",
            request=submission.request,
            idempotency_key=submission.key,
            code=last.code if last else None,
            request_id=last.request_id if last else None,
        )
        error.__cause__ = last
        return error

    def _abandoned(self, submission: Submission) -> Settled:
        """What is known of one that is not flying and will not be sent again."""
        if submission.was_sent:
            return Settled("unknown", error=self._unknown(submission, str(submission.last_error or "no answer came")))
        error = NotSubmittedError("the request was not sent: it was still waiting for its turn")
        error.__cause__ = submission.last_error
        return Settled("not_submitted", error=error)

    def _log_late(self, submission: Submission, judgement: Judgement) -> None:
        """An answer after everybody stopped waiting: the id must not be lost."""
        if judgement.task is not None:
            logger.warning(
                "task %s was accepted after its caller had gone (idempotency key %s)", judgement.task.id, submission.key
            )

    # Lost responses

    def _park(self, submission: Submission, delay: float) -> None:
        """Keep a submission whose answer was lost until it may be sent again, or never."""
        permission = self._replays.permission()
        if permission is False:
            why = f"{submission.last_error} (the replays so far did not prove that the service honours keys)"
            self._settle(submission, self._given_up(submission, why))
            return
        if permission is None:
            self._parked[submission] = self._loop.call_at(self._window_end(submission), self._expire, submission)
            return
        self._replays.start()
        submission._replaying = True
        logger.warning("lost response: sending again with idempotency key %s", submission.key)
        self._queue(submission, Urgency.RETURNED, delay)

    def _window_end(self, submission: Submission) -> float:
        return (submission._first_sent or self._loop.time()) + REPLAY_LATEST

    def _expire(self, submission: Submission) -> None:
        del self._parked[submission]
        self._settle(submission, self._given_up(submission, f"{submission.last_error} (too late to send it again)"))

    def _unpark(self, submission: Submission) -> None:
        timer = self._parked.pop(submission, None)
        if timer is not None:
            timer.cancel()

    def _end_replay(self, submission: Submission, *, marked: bool) -> None:
        submission._replaying = False
        self._replays.answer(marked)
        self._reconsider_parked()

    def _reconsider_parked(self) -> None:
        if self._replays.permission() is None:
            return
        for submission in list(self._parked):
            self._unpark(submission)
            self._park(submission, 0.0)


@dataclass(slots=True, eq=False)
class _Waiter:
    """The listener of a single call."""

    future: asyncio.Future[Settled]

    def posting(self, submission: Submission) -> None:
        pass

    def held(self, submission: Submission, error: EvoLinkError) -> None:
        pass

    def settled(self, submission: Submission, settled: Settled) -> None:
        if not self.future.done():
            self.future.set_result(settled)

    def crashed(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


async def submit_and_wait(
    submitter: Submitter, request: GenerationRequest, key: str, party: Hashable, deadline: float | None
) -> Task:
    """Submit one request and return its task; the error of the submission is raised.

    At the deadline (loop time) and when cancelled, a POST under way has `GRACE` seconds to be answered; then the
    cancellation goes on with the id, or failing that the idempotency key, in a note of the exception.
    """
    loop = asyncio.get_running_loop()
    waiter = _Waiter(loop.create_future())
    submission = Submission(request, key, party, Urgency.CALLER, waiter, patience=float("inf"))
    submitter.start(submission)
    try:
        async with asyncio.timeout_at(deadline):
            settled = await waiter.future
    except TimeoutError:
        settled = await submitter.leave(submission)
        if settled.ending == "not_submitted" and submission.last_error is not None:
            raise submission.last_error from None
    except asyncio.CancelledError as cancellation:
        try:
            settled = await submitter.leave(submission)
        except asyncio.CancelledError:
            settled = submitter.known(submission)
        _note(cancellation, submission, settled)
        raise
    if settled.task is not None:
        return settled.task
    assert settled.error is not None
    raise settled.error


def _note(cancellation: BaseException, submission: Submission, settled: Settled) -> None:
    """Put the id, or the key, where whoever handles the cancellation can find it."""
    if settled.task is not None:
        note = f"evolink task {settled.task.id} was accepted and is running: client.tasks.wait({settled.task.id!r})"
    elif settled.ending == "unknown":
        note = f"an evolink request may have been accepted: idempotency key {submission.key}"
    else:
        return
    cancellation.add_note(note)
    logger.warning("cancelled while submitting: %s", note)
