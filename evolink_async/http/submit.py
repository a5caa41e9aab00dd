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
import copy
import functools
import logging
import re
import secrets
from collections.abc import Awaitable, Hashable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import anyio

from evolink_async.clock import Moment
from evolink_async.errors import (
    APIStatusError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotSubmittedError,
    ServerError,
    SubmitOutcomeUnknownError,
)
from evolink_async.http.answers import Judgement, judge_submission, proves_a_task
from evolink_async.http.exchange import AnswerLost, Exchange, Flight, HeldBack, NotSent
from evolink_async.http.keys import ApiKey, fingerprint
from evolink_async.http.observer import Observation
from evolink_async.http.pace import LONGEST_COOL_DOWN, Pace, Urgency
from evolink_async.http.retry import (
    REPLAY_EARLIEST,
    REPLAY_LATEST,
    History,
    Next,
    Replays,
    RetryPolicy,
    Step,
    Verdict,
    may_send_again,
    next_step,
)
from evolink_async.own_tasks import own_task
from evolink_async.requests import GenerationRequest, encode_body
from evolink_async.types import TaskReading

logger = logging.getLogger("evolink_async.submit")

# How long a cancelled caller waits for the answer of a POST that is under way, in seconds.
GRACE = 5.0

_LATEST_TASKS = 100

_IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._-]{16,96}", re.ASCII)  # the vendor's own rule

Ending = Literal["accepted", "rejected", "unknown", "not_submitted", "deferred"]


def new_idempotency_key() -> str:
    """A fresh key: `ea-` and 32 hex digits."""
    return f"ea-{secrets.token_hex(16)}"


def checked_idempotency_key(key: str | None) -> str:
    """The caller's key, or a fresh one. Raises `InvalidRequestError` for one the service does not accept."""
    if key is None:
        return new_idempotency_key()
    if not isinstance(key, str) or not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequestError(
            f"an idempotency key has 16 to 96 characters out of A-Z a-z 0-9 . _ -, got {key!r}", param="idempotency_key"
        )
    return key


@dataclass(slots=True)
class Settled:
    """What is known of a paid request at its end. `fatal`: why no further request should be sent.

    deferred: its listener wants to give it again later; nothing was sent.
    """

    ending: Ending
    task: TaskReading | None = None
    error: EvoLinkError | None = None
    fatal: EvoLinkError | None = None


class Listener(Protocol):
    """Whoever gave a submission and wants to know."""

    def intend(self, submission: Submission, fingerprint: str) -> Awaitable[Settled | None]:
        """A POST is about to be made, with the API key of this fingerprint.

        None, once everything that must outlive a crash is written down: it is made. Else it isn't, and this is the end
        ("unknown" needs no error). When this is cancelled, or nothing is sent after all, `unsent` is called.
        """

    def unsent(self, submission: Submission) -> None:
        """Nothing of the POST that was intended has been written, and nothing will be."""

    def answered(self, submission: Submission, judgement: Judgement) -> None:
        """The POST that was intended came to this. Called at once, also after the end."""

    def accepted(self, submission: Submission, task: TaskReading) -> Awaitable[EvoLinkError | None]:
        """The POST was accepted. Returns once that would outlive a crash, or with the reason why it would not."""

    def held(self, submission: Submission, error: EvoLinkError) -> None:
        """It was not taken and goes back to the queue."""

    def paused(self, error: EvoLinkError) -> None:
        """What the service answered to another request keeps this one in the queue for over an hour."""

    def settled(self, submission: Submission, settled: Settled) -> None:
        """The end. Called once, synchronously, with no await since the answer was judged."""

    def crashed(self, error: BaseException) -> None:
        """A fault of this library (or of a listener) while the submission was carried out."""


@dataclass(eq=False)
class Submission:
    """One paid request on its way. The bytes and the key are the same for every attempt."""

    # Without slots: what stays as it begins, and most does, costs nothing.

    request: GenerationRequest
    key: str
    party: Hashable
    urgency: Urgency
    listener: Listener
    patience: float
    replays: Replays
    callback_url: str | None = None  # where the request names none itself
    content: bytes = b""
    task: TaskReading | None = field(default=None, init=False)  # once it was accepted
    submitter: Submitter | None = field(default=None, init=False)
    last_try: bool = field(default=False, init=False)  # once it is out of its current POST it is not sent again
    flight: Flight | None = field(default=None, init=False)
    post: asyncio.Task[None] | None = field(default=None, init=False)
    waiting: bool = field(default=False, init=False)  # for its turn
    end: Settled | None = field(default=None, init=False)
    last_error: EvoLinkError | None = field(default=None, init=False)
    _first_sent: Moment | None = field(default=None, init=False)
    _unsent_since: float | None = field(default=None, init=False)  # loop time
    _first_asked: Moment | None = field(default=None, init=False)  # that was sent, whose answer asks to ask again
    _asked: int = field(default=0, init=False)
    _lost: int = field(default=0, init=False)
    _replay_at: float = field(default=0.0, init=False)  # a replay is not sent earlier
    _replaying: bool = field(default=False, init=False)  # it holds one of the replays
    _replay_sent: bool = field(default=False, init=False)
    _key_print: str | None = field(default=None, init=False)  # of the last attempt that may have been accepted

    def resume(
        self, *, content: bytes, fingerprint: str | None, sent_at: Moment, error: EvoLinkError, lost: bool
    ) -> None:
        """Go on with a POST that an earlier run sent: these bytes, at `sent_at`, without an answer.

        error: what became of the answer. lost: False if the service said that it was working on it.
        """
        self.content, self._key_print, self._first_sent, self.last_error = content, fingerprint, sent_at, error
        if lost:
            self._lost = 1
        else:
            self._asked, self._first_asked = 1, sent_at

    @property
    def was_sent(self) -> bool:
        """Whether an attempt reached the wire whose answer doesn't exclude that a task exists."""
        return self._in_doubt or (self.flight is not None and self.flight.sent)

    @property
    def _in_doubt(self) -> bool:
        """Whether an answer so far leaves open if a task exists."""
        return bool(self._lost or self._asked)

    # As a ticket of the pace.

    @property
    def model(self) -> str:
        """The model whose pace it keeps."""
        return self.request.model

    def go(self) -> None:
        """It is its turn."""
        assert self.submitter is not None
        self.submitter._post(self)

    def turn_failed(self, error: BaseException) -> None:
        """Its turn will never come."""
        assert self.submitter is not None
        self.submitter._broken(self, error)


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
        pauses: dict[str, EvoLinkError] | None = None,
        observation: Observation | None = None,
    ) -> None:
        self._observation = observation or Observation()
        self._exchange = exchange
        self._api_key = api_key
        self._pace = pace
        self._retry = retry
        self.replays = replays
        self._hold = hold
        self._request_timeout = request_timeout
        self._loop = asyncio.get_running_loop()
        self._posts: dict[asyncio.Task[None], Submission] = {}
        self._parked: dict[Submission, asyncio.TimerHandle] = {}
        self._live: set[Submission] = set()
        self._pauses = {} if pauses is None else pauses  # by model, what asked for the last one of over an hour
        self._closed: ClosedError | None = None
        self._last_key = self._last_print = ""
        self._tasks: dict[str, str] = {}  # the latest, and the idempotency keys they were given for
        # What an earlier loop has sent again is not answered any more.
        replays.forget_unanswered()

    def start(self, submission: Submission) -> None:
        """Queue a submission; its listener hears of the end. Raises `InvalidRequestError` if it cannot be written.

        One that an earlier run has sent already (`Submission.resume`) goes on by the rules for a lost response.
        """
        submission.content = submission.content or encode_body(submission.request, submission.callback_url)
        submission.submitter = self
        self._live.add(submission)
        if self._closed is not None:
            # The client was closed under somebody who still holds this; he is told as everybody is, later.
            self._loop.call_soon(self._close, submission)
        elif submission._in_doubt:
            self._loop.call_soon(self._settle_doubt, submission)
        else:
            self._queue(submission, submission.urgency, 0.0)

    def _settle_doubt(self, submission: Submission) -> None:
        if submission.end is not None:
            return
        history = self._history(submission)
        if not may_send_again(history):
            why = "it is not sent again" if self._hold else "it is too late to send it again"
            self._settle(submission, self._given_up(submission, f"an earlier run got no answer, and {why}"))
        elif submission._lost:
            submission._replay_at = self._loop.time() + max(0.0, REPLAY_EARLIEST - history.age)
            self._park(submission)
        else:
            self._queue(submission, Urgency.RETURNED, 0.0)

    def withdraw(self, submission: Submission) -> Settled:
        """Stop a submission that may be stopped, and say what is known of it. Its listener is not called.

        Stopped is what is queued or parked, and what flies without a byte written. A POST that was sent goes on.
        """
        if submission.end is not None:
            return submission.end
        flight, post = submission.flight, submission.post
        sent = flight is not None and flight.sent
        self._unpark(submission)
        if submission.waiting:
            self._pace.withdraw(submission)
        submission.end = self._abandoned(submission)  # from here on `_attempt` sends nothing any more
        self._live.discard(submission)
        observer = self._observation.observer
        if observer is not None:
            observer.settled(submission, submission.end)
            if submission.end.task is not None:
                observer.left(submission.end.task.id)
        if not sent:
            if post is not None:
                submission.listener.unsent(submission)
                post.cancel()
            self._end_replay(submission, marked=False)
        return submission.end

    def long_pause(self, model: str) -> EvoLinkError | None:
        """For whose sake nobody may ask this model for more than an hour from now; mostly None."""
        error = self._pauses.get(model)
        if error is None:
            return None
        if self._pace.cool_down_of(model, self._loop.time()) <= LONGEST_COOL_DOWN:
            del self._pauses[model]
            return None
        return copy.copy(error)  # each pool raises its own

    async def leave(self, submission: Submission, seconds: float = GRACE) -> Settled:
        """What is known of a submission whose caller stops waiting: a POST under way gets `seconds` to be answered.

        A native cancellation during the wait ends it at once. The POST itself goes on in any case, and a late id
        is logged.
        """
        post = submission.post
        if submission.end is None and post is not None:
            submission.last_try = True
            if submission.flight is None or not submission.flight.sent:
                self.withdraw(submission)
            with anyio.CancelScope(shield=True):
                await asyncio.wait({post}, timeout=seconds)
        return self.known(submission)

    def leave_alone(self, task_id: str) -> None:
        """Nobody is going to watch a task that was accepted."""
        if self._observation.observer is not None:
            self._observation.observer.left(task_id)

    def known(self, submission: Submission) -> Settled:
        """What is known of a submission now, for good: an answer that comes later is only logged."""
        return submission.end or self.withdraw(submission)

    async def aclose(self) -> None:
        """Take back what is queued, give POSTs under way the grace period, then cut them; their keys are logged."""
        self._closed = self._closed or ClosedError("the client was closed")
        for submission in list(self._live):
            submission.last_try = True
            if submission.flight is None or not submission.flight.sent:
                self._close(submission)
        try:
            if self._posts:
                with anyio.CancelScope(shield=True):
                    await asyncio.wait(self._posts, timeout=GRACE)
        finally:
            for submission in list(self._live):
                self._close(submission)
            for post in list(self._posts):
                post.cancel()
        if self._posts:
            with anyio.CancelScope(shield=True):
                await asyncio.wait(self._posts)

    def _close(self, submission: Submission) -> None:
        """End a submission because the client is closed."""
        if submission.end is not None:
            return
        end = self.withdraw(submission)
        if end.error is not None and (end.ending == "not_submitted" or end.error.__cause__ is None):
            end.error.__cause__ = self._closed
        self._settle(submission, Settled(end.ending, end.task, end.error, fatal=self._closed))

    # One attempt

    def _queue(self, submission: Submission, urgency: Urgency, delay: float) -> None:
        if self._observation.observer is not None:
            self._observation.observer.queued(submission)
        self._pace.enqueue(submission, urgency, self._loop.time() + delay if delay > 0 else 0.0)

    def _post(self, submission: Submission) -> None:
        if self._observation.observer is not None:
            self._observation.observer.begun(submission)
        submission.flight = flight = Flight()
        submission.post = post = own_task(
            self._loop, self._attempt(submission, flight), "evolink post", contextvars.Context()
        )
        self._posts[post] = submission
        post.add_done_callback(self._never_begun)

    def _never_begun(self, post: asyncio.Task[None]) -> None:
        """A task was cancelled before its first step, and so could not tell of its end itself."""
        submission = self._posts[post]
        self._landed(submission, post)
        self._cut(submission, Flight())

    def _landed(self, submission: Submission, post: asyncio.Task[None]) -> None:
        del self._posts[post]
        submission.post = None
        self._pace.finished(submission.model)

    def _cut(self, submission: Submission, flight: Flight) -> None:
        """Its POST was cancelled: it was withdrawn, or by somebody else."""
        if submission.end is not None and flight.sent:
            logger.warning(
                "a paid POST was cut before its answer: idempotency key %s",
                submission.key,
                extra={"event": "post_cut", "idempotency_key": submission.key, "model": submission.model},
            )
        self._end_replay(submission, marked=False)
        if submission.end is None:
            # The loop is coming to its end, or the caller cancels every task he finds.
            self._settle(submission, self._abandoned(submission))

    def _broken(self, submission: Submission, error: BaseException) -> None:
        """A fault of ours: the caller must hear of it, and of the money that may be spent."""
        if not isinstance(error, asyncio.CancelledError):
            logger.error(
                "a submission failed inside this library: %s",
                type(error).__name__,
                exc_info=error,
                extra={"event": "internal_error"},
            )
        if submission.end is None:
            end = self._abandoned(submission)
            assert end.error is not None
            end.error.__cause__ = error
            self._end_replay(submission, marked=False)
            self._settle(submission, end)
        if not isinstance(error, KeyboardInterrupt | SystemExit):
            submission.listener.crashed(error)

    async def _attempt(self, submission: Submission, flight: Flight) -> None:
        """One POST and what follows from it: all that its task does."""
        post = submission.post
        assert post is not None
        post.remove_done_callback(self._never_begun)
        begun = self._loop.time()
        try:
            judgement = await self._send(submission, flight, begun)
            if judgement is not None:
                await self._take(submission, flight, judgement, begun)
        except asyncio.CancelledError:
            self._landed(submission, post)
            self._cut(submission, flight)
            raise
        except GeneratorExit:  # its loop is gone
            raise
        except BaseException as error:  # what a user's transport raises need be no Exception: pytest.fail is none
            self._landed(submission, post)
            self._end_replay(submission, marked=False)
            self._broken(submission, error)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        else:
            self._landed(submission, post)

    async def _send(self, submission: Submission, flight: Flight, begun: float) -> Judgement | None:
        """What a POST came to. None: it was not made, and all is done that follows from that."""
        try:
            key = await self._api_key.get()
        except ConfigurationError as error:
            self._cannot_send(submission, error)
            return None
        if submission.end is not None:
            return None  # withdrawn meanwhile
        key_print = self._fingerprint(key)
        if submission._in_doubt:
            why = None
            if submission._key_print != key_print:
                why = "the API key has changed since it was sent"
            elif not may_send_again(self._history(submission)):
                why = "it is too late to send it again"
            if why is not None:
                self._finish(submission, self._given_up(submission, f"{submission.last_error}; {why}"))
                return None
        try:
            end = await submission.listener.intend(submission, key_print)
            if end is not None:
                self._not_intended(submission, end)
                return None
            submission._key_print = key_print
            answer = await self._exchange.send(
                "POST",
                submission.request.endpoint,
                key=key,
                lane="submit",
                seconds=self._request_timeout,
                content=submission.content,
                headers={"Idempotency-Key": submission.key},
                flight=flight,
                clear=functools.partial(self._clear, submission),
            )
        except HeldBack:
            submission.listener.unsent(submission)
            submission.flight = submission.post = None
            self._queue(submission, Urgency.RETURNED, 0.0)
            return None
        except asyncio.CancelledError:
            if not flight.sent:
                submission.listener.unsent(submission)
            raise
        except ConfigurationError as error:
            submission.listener.unsent(submission)
            self._cannot_send(submission, error)
            return None
        except NotSent as error:
            unsent = ConnectionFailedError(str(error))
            unsent.__cause__ = error.__cause__
            if self._pace.unreachable(self._loop.time(), begun):
                host = self._exchange.host
                logger.warning("%s; trying again", error, extra={"event": "service_unreachable", "host": host})
            return Judgement(Verdict.UNSENT, error=unsent)
        except AnswerLost as error:
            lost = EvoLinkError(str(error))
            lost.__cause__ = error.__cause__
            return Judgement(Verdict.LOST, error=lost)
        flight.sent = True
        return judge_submission(answer)

    async def _take(self, submission: Submission, flight: Flight, judgement: Judgement, begun: float) -> None:
        """What follows from what a POST came to."""
        if flight.sent:
            submission._replay_sent = submission._replaying
            submission._first_sent = submission._first_sent or flight.sent_at
            if self._pace.reachable():
                host = self._exchange.host
                logger.info("%s can be reached again", host, extra={"event": "service_reachable", "host": host})
        unwritten = None
        try:
            if self._observation.observer is not None:
                self._observation.observer.answered(submission, judgement)
            self._tell_pace(submission.model, judgement, begun)
            submission.listener.answered(submission, judgement)
            if judgement.task is not None:
                submission.task = judgement.task
                self._note_task(submission.key, judgement.task.id)
                unwritten = await submission.listener.accepted(submission, judgement.task)
            # It has landed: from here on the verdict says whether a task may exist, and it may be queued again.
            submission.flight = submission.post = None
            self._proceed(submission, judgement, flight.sent_at, unwritten)
        except BaseException:
            # A fault of ours after the answer came: what it said is not lost with it.
            if submission.end is None and judgement.task is not None:
                self._settle(submission, Settled("accepted", task=judgement.task))
            elif judgement.verdict in (Verdict.LOST, Verdict.IN_PROGRESS):
                submission._lost += 1
            raise

    def _note_task(self, key: str, task_id: str) -> None:
        """Two requests with one task: somebody between us and the service has mixed up its answers, or keeps them."""
        other = self._tasks.setdefault(task_id, key)
        if other != key:
            logger.warning(
                "task %s was given for two requests, of which one must be another's (idempotency keys %s and %s)",
                *(task_id, other, key),
                extra={"event": "task_given_twice", "task_id": task_id, "idempotency_key": key},
            )
        elif len(self._tasks) > _LATEST_TASKS:
            del self._tasks[next(iter(self._tasks))]

    def _cannot_send(self, submission: Submission, error: ConfigurationError) -> None:
        """The end of one for which there is no key, or no client."""
        if submission.end is None:
            submission.last_error = error
            self._finish(submission, self._refused(submission, error, fatal=error))

    async def _clear(self, submission: Submission) -> bool:
        """Time has passed since its turn came."""
        if submission._in_doubt and not may_send_again(self._history(submission)):
            raise HeldBack
        clear = await self._pace.clearance(submission.model)
        if clear is None:
            raise HeldBack
        return clear

    def _not_intended(self, submission: Submission, end: Settled) -> None:
        """The end of one whose POST must not be made."""
        if end.ending == "unknown" or (end.ending != "deferred" and submission._in_doubt):
            why = str(submission.last_error or "no answer came") if end.error is None else str(end.error)
            end = self._given_up(submission, why, end.fatal)
        self._finish(submission, end)

    def _fingerprint(self, key: str) -> str:
        if key != self._last_key:
            self._last_key, self._last_print = key, fingerprint(key)
        return self._last_print

    def _tell_pace(self, model: str, judgement: Judgement, begun: float) -> None:
        now = self._loop.time()
        task = judgement.task
        if task is not None:
            running = None if task.is_terminal else task.id
            self._pace.accepted(model, now, running, task.estimated_time)
            return
        if judgement.verdict is Verdict.RATE_LIMITED:
            self._pace.refused(model, now, begun, judgement.retry_after)
        elif isinstance(judgement.error, ServerError) and judgement.retry_after is not None:
            self._pace.cool(model, now + judgement.retry_after)
        if judgement.error is not None and (judgement.retry_after or 0.0) > LONGEST_COOL_DOWN:
            self._pauses[model] = judgement.error
            for other in [other for other in self._live if other.waiting and other.model == model]:
                other.listener.paused(copy.copy(judgement.error))
        if judgement.verdict is Verdict.LOST:
            self._pace.lost(model, now, begun)
        elif judgement.verdict is not Verdict.UNSENT:
            self._pace.answered(model)

    # What follows from an answer

    def _proceed(
        self, submission: Submission, judgement: Judgement, sent_at: Moment | None, unwritten: EvoLinkError | None
    ) -> None:
        """unwritten: why an id would not outlive a crash."""
        proven = judgement.replayed or judgement.verdict is Verdict.IN_PROGRESS
        if proven:
            self.replays.proven = submission.replays.proven = True
        step = self._step_after(submission, judgement, sent_at) if judgement.task is None else None
        if submission.end is not None:
            self._log_late(submission, judgement)
            self._end_replay(submission, marked=proven)
        elif step is None:
            self._finish(submission, Settled("accepted", judgement.task, None, unwritten), marked=proven)
        elif step.next is Next.AGAIN or step.next is Next.REPLAY:
            if submission.last_try:
                self._finish(submission, self._abandoned(submission))
            elif step.next is Next.REPLAY:
                submission._replay_at = self._loop.time() + step.delay
                self._park(submission)
            else:
                self._queue(submission, Urgency.RETURNED, step.delay)
                if judgement.error is not None:
                    submission.listener.held(submission, judgement.error)
        else:
            self._finish(submission, self._end_of(submission, judgement, step), marked=proven)
        if proven:
            self._reconsider_parked()

    def _step_after(self, submission: Submission, judgement: Judgement, sent_at: Moment | None) -> Step:
        """What to do after an answer without a task; notes what the answer changes."""
        verdict = judgement.verdict
        if judgement.error is not None:
            submission.last_error = judgement.error
        if verdict is Verdict.UNSENT and submission._unsent_since is None:
            # A source's request has waited with all the others for the service to come back.
            of_source = submission.urgency is Urgency.SOURCE
            submission._unsent_since = self._pace.unreachable_since if of_source else self._loop.time()
        if verdict is Verdict.IN_PROGRESS:
            submission._asked += 1
            submission._first_asked = submission._first_asked or sent_at
        step = next_step(verdict, self._history(submission, sent_at), judgement.retry_after)
        if verdict is Verdict.LOST:
            submission._lost += 1
        elif verdict is not Verdict.UNSENT:
            submission._unsent_since = None
        return step

    def _history(self, submission: Submission, sent_at: Moment | None = None) -> History:
        now = Moment.of(self._loop)

        def since(moment: Moment | None) -> float:
            return 0.0 if moment is None else now.since(moment)

        return History(
            age=since(submission._first_sent),
            sent_for=since(sent_at),
            lost=submission._lost,
            asked=submission._asked,
            asked_for=since(submission._first_asked),
            unsent_for=0.0 if submission._unsent_since is None else now.loop - submission._unsent_since,
            patience=submission.patience,
            may_replay=not self._hold,
        )

    def _end_of(self, submission: Submission, judgement: Judgement, step: Step) -> Settled:
        error = judgement.error
        if step.next is Next.REJECT:
            return Settled("rejected", error=error)
        assert error is not None
        fatal = error if judgement.verdict is Verdict.ACCOUNT else None
        if step.next is Next.NOT_SUBMIT:
            return self._refused(submission, error, fatal)
        return self._given_up(submission, str(error), fatal)

    def _refused(self, submission: Submission, error: EvoLinkError, fatal: EvoLinkError | None) -> Settled:
        """The end of one that cannot be sent now: of an earlier attempt it says nothing."""
        if submission._in_doubt:
            return self._given_up(submission, str(error), fatal)
        return Settled("not_submitted", error=error, fatal=fatal)

    def _finish(self, submission: Submission, end: Settled, *, marked: bool = False) -> None:
        """The end of one that has just landed."""
        submission.flight = submission.post = None
        self._settle(submission, end)
        if submission._replaying:
            self._end_replay(submission, marked=marked)

    def _settle(self, submission: Submission, end: Settled) -> None:
        submission.end = end
        if self._observation.observer is not None:
            self._observation.observer.settled(submission, end)
        self._live.discard(submission)
        if not self._live:
            self._live.clear()  # gives back what it took when it was full
        try:
            submission.listener.settled(submission, end)
        except Exception as error:
            logger.exception("a listener failed", extra={"event": "internal_error"})
            submission.listener.crashed(error)

    def _given_up(self, submission: Submission, why: str, fatal: EvoLinkError | None = None) -> Settled:
        error = self._unknown(submission, why)
        self._warn_of_loss("response_lost", "lost response, not settled: idempotency key %s", submission)
        return Settled("unknown", error=error, fatal=fatal)

    def _unknown(self, submission: Submission, why: str) -> SubmitOutcomeUnknownError:
        last = submission.last_error
        if isinstance(last, APIStatusError) and last.advice:  # it is about that attempt, and says nothing of an earlier
            why = why.replace(f". {last.advice}", "")
        known = "the request was sent, but whether a task exists (and is paid for) is not known"
        if proves_a_task(last):
            known = "a task exists for this idempotency key, but its id is not known"
        error = SubmitOutcomeUnknownError(
            f"{known}: {why.rstrip('. ')}. Look for it at the service before you submit it again; "
            f"idempotency key {submission.key}",
            request=submission.request,
            idempotency_key=submission.key,
            code=last.code if last else None,
            request_id=last.request_id if last else None,
        )
        error.__cause__ = last
        return error

    def _abandoned(self, submission: Submission) -> Settled:
        """What is known of one that will not be sent again."""
        if submission.task is not None:
            return Settled("accepted", task=submission.task)
        if submission.was_sent:
            answer = "its answer had not come yet" if submission.flight is not None else "no answer came"
            return Settled("unknown", error=self._unknown(submission, str(submission.last_error or answer)))
        pause = self._pace.cool_down_of(submission.model, self._loop.time())
        why = "it was still waiting for its turn"
        if submission.flight is not None:
            why = "it was still waiting for a connection" if submission.flight.connecting else "no API key came"
        elif pause > 0:
            why = f"its model has a pause, of which {pause:.0f} s are left"
        error = NotSubmittedError(f"the request was not sent: {why}; give it again")
        error.__cause__ = submission.last_error or ConnectionFailedError(f"no byte was written: {why}")
        return Settled("not_submitted", error=error)

    def _log_late(self, submission: Submission, judgement: Judgement) -> None:
        """An answer after everybody stopped waiting: the id must not be lost."""
        if judgement.task is not None:
            logger.warning(
                "task %s was accepted after its caller had gone (idempotency key %s)",
                judgement.task.id,
                submission.key,
                extra={
                    "event": "task_accepted_late",
                    "task_id": judgement.task.id,
                    "idempotency_key": submission.key,
                    "model": submission.model,
                },
            )

    def _warn_of_loss(self, event: str, message: str, submission: Submission) -> None:
        logger.warning(
            message,
            submission.key,
            extra={"event": event, "idempotency_key": submission.key, "model": submission.model},
        )

    # Lost responses

    def _park(self, submission: Submission) -> None:
        """Keep a submission whose answer was lost until it may be sent again, or never."""
        now = self._loop.time()
        permission = submission.replays.permission()
        if permission is None:
            left = REPLAY_LATEST - self._history(submission).age
            self._parked[submission] = self._loop.call_later(left, self._expire, submission)
        elif permission:
            submission.replays.start()
            submission._replaying, submission._replay_sent = True, False
            self._warn_of_loss(
                "response_lost_replayed", "lost response: sending again with idempotency key %s", submission
            )
            self._queue(submission, Urgency.RETURNED, submission._replay_at - now)
        else:
            why = f"{submission.last_error} (the replays so far did not prove that the service honours keys)"
            self._settle(submission, self._given_up(submission, why))

    def _expire(self, submission: Submission) -> None:
        del self._parked[submission]
        why = f"{submission.last_error}; it is too late to send it again"
        self._settle(submission, self._given_up(submission, why))

    def _unpark(self, submission: Submission) -> None:
        timer = self._parked.pop(submission, None)
        if timer is not None:
            timer.cancel()

    def _end_replay(self, submission: Submission, *, marked: bool) -> None:
        """Give back the replay that a submission holds, if it does."""
        if not submission._replaying:
            return
        submission._replaying = False
        flight = submission.flight
        if marked or submission._replay_sent or (flight is not None and flight.sent):
            submission.replays.answer(marked)
        else:
            submission.replays.withdraw()
        self._reconsider_parked()

    def _reconsider_parked(self) -> None:
        for submission in list(self._parked):
            # Not withdrawn by whoever was told of the one before.
            if submission in self._parked and submission.replays.permission() is not None:
                self._unpark(submission)
                self._park(submission)
