"""When a call is made again. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from evolink_async.errors import ConfigurationError

# Reads change nothing, so everything that may pass is tried again (DESIGN section 6).
RETRIED_READ_STATUSES = frozenset({408, 425, 429, *range(500, 600)})

# A paid request whose answer was lost is sent again only in this window after the first attempt, in seconds: not so
# late that the service may have forgotten the key, and not so soon after the lost one that it is still on its way.
REPLAY_EARLIEST, REPLAY_LATEST = 2.0, 600.0
UNPROVEN_REPLAYS = 3

# `paid_outcome_unknown`: the same key again after 2, 4, 8 ... seconds, for two minutes (vendor: "about a minute").
# The last time so long before their end that a turn which comes a little late is still in time.
IN_PROGRESS_WINDOW = 120.0
_FIRST_ASK, _LAST_ASK = 2.0, 118.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to back off between attempts of one call.

    base_delay, max_delay: seconds; attempt n waits between half of and the whole of `base_delay * 2**(n-1)`, at most
    `max_delay`, and never less than the service's own hint. How often: until the call's `timeout`.
    unreachable_for: seconds for which a pool keeps trying to connect before a request is `rejected`: those of sources
    since the service could not be reached any more, one given to `run` since it was tried itself.

    What may be sent again at all is not a matter of policy: reads always, paid requests only where it is
    certain that nothing was accepted, or by the rules of `on_lost_response`.
    """

    base_delay: float = 0.5
    max_delay: float = 30.0
    unreachable_for: float = 120.0

    def __post_init__(self) -> None:
        for name in ("base_delay", "max_delay", "unreachable_for"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigurationError(f"RetryPolicy.{name} must be a positive number of seconds, got {value!r}")
        if self.max_delay < self.base_delay:
            raise ConfigurationError("RetryPolicy.max_delay must not be less than base_delay")

    def delay(self, attempt: int, hint: float | None, random: float) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 1); `random` is uniform in [0, 1)."""
        ceiling = min(self.max_delay, self.base_delay * 2.0 ** min(attempt - 1, 30))
        backoff = ceiling * (0.5 + random / 2)
        if hint is None:
            return backoff
        # A little spread above the hint, so that a thousand clients told the same second don't come back in one.
        return max(backoff, hint + random * min(1.0, hint * 0.1))

    def delay_within(self, left: float, attempt: int, hint: float | None, random: float) -> float | None:
        """The same where only so many seconds are left: None if an attempt would come after them.

        Our own guess does not sleep away the last chance.
        """
        delay = self.delay(attempt, hint, random)
        if hint is None:
            delay = min(delay, max(left / 2, self.base_delay))
        return delay if delay < left else None


class Verdict(StrEnum):
    """What an answer to a paid POST settles."""

    ACCEPTED = "accepted"  # a task exists and its id is known
    UNSENT = "unsent"  # no byte was written
    RATE_LIMITED = "rate_limited"  # refused, free, may be asked again later
    REFUSED = "refused"  # refused for good
    ACCOUNT = "account"  # refused because of the key or the money: the next one would be too
    LOST = "lost"  # nobody knows whether a task exists
    IN_PROGRESS = "in_progress"  # the service still works on the request with this key
    CONFLICT = "conflict"  # a task exists for this key, made from another body


class Next(StrEnum):
    """What becomes of a paid request after an answer."""

    ACCEPT = "accept"
    AGAIN = "again"  # with the same key, after `delay`
    REPLAY = "replay"  # once more for a lost response, if the replays allow it, after `delay`
    REJECT = "reject"
    NOT_SUBMIT = "not_submit"
    GIVE_UP = "give_up"  # unknown: nobody can settle it here


@dataclass(frozen=True, slots=True)
class History:
    """What happened to one paid request so far; times in seconds.

    age: since its first attempt. sent_for: since the last one was sent. lost: answers lost. asked: answers
    `paid_outcome_unknown`, this one included; asked_for: since the first of these was sent. unsent_for: since
    connections fail. patience: how long that is borne.
    may_replay: whether a lost response may be sent again at all (the policy is "replay").
    """

    age: float = 0.0
    sent_for: float = 0.0
    lost: int = 0
    asked: int = 0
    asked_for: float = 0.0
    unsent_for: float = 0.0
    patience: float = math.inf
    may_replay: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """What to do, and how many seconds to wait before it."""

    next: Next
    delay: float = 0.0


def may_send_again(history: History, delay: float = 0.0) -> bool:
    """Whether a request that may have been accepted already may still be sent again `delay` seconds from now."""
    if history.asked and history.asked_for + delay > IN_PROGRESS_WINDOW:
        return False
    if history.lost:
        return history.may_replay and history.age + delay <= REPLAY_LATEST
    return True


def next_step(verdict: Verdict, history: History, hint: float | None = None) -> Step:
    """What to do with a paid request after `verdict`. `history` holds what was known before it, `lost` not yet raised.

    A request of which one answer is lost, or that the service says it is still working on, may be accepted already.
    Nothing but an id settles it: what would reject a fresh request leaves such a one unknown.
    """
    doubtful = history.lost > 0 or history.asked > 0
    again = may_send_again(history, hint or 0.0)
    match verdict:
        case Verdict.ACCEPTED:
            return Step(Next.ACCEPT)
        case Verdict.RATE_LIMITED:  # the pace knows until when
            return Step(Next.AGAIN if not doubtful or again else Next.GIVE_UP)
        case Verdict.UNSENT:
            if doubtful:
                return Step(Next.AGAIN if again else Next.GIVE_UP)
            return Step(Next.AGAIN if history.unsent_for < history.patience else Next.REJECT)
        case Verdict.REFUSED:
            return Step(Next.GIVE_UP if doubtful else Next.REJECT)
        case Verdict.ACCOUNT:
            return Step(Next.GIVE_UP if doubtful else Next.NOT_SUBMIT)
        case Verdict.IN_PROGRESS:
            delay = max(_asking_pause(history), hint or 0.0)
            return Step(Next.AGAIN, delay) if delay and may_send_again(history, delay) else Step(Next.GIVE_UP)
        case Verdict.CONFLICT:
            return Step(Next.GIVE_UP)
        case Verdict.LOST:
            delay = max(REPLAY_EARLIEST - history.sent_for, hint or 0.0, 0.0)
            if history.lost or not history.may_replay or history.age + delay > REPLAY_LATEST:
                return Step(Next.GIVE_UP)
            return Step(Next.REPLAY, delay)


def _asking_pause(history: History) -> float:
    """Seconds until the service is asked again about a request that it says it is still working on; 0.0: no more."""
    left = _LAST_ASK - history.asked_for
    if left < _FIRST_ASK:
        return 0.0
    return min(_FIRST_ASK * 2.0 ** (min(history.asked, 10) - 1), left)


class Replays:
    """How many lost responses may be sent again before the service has proven that it honours idempotency keys.

    Until the proof at most three are sent again; while some of their answers are out the others wait, and when all
    three came back unmarked nothing is sent again any more.
    """

    __slots__ = ("answered", "proven", "started")

    def __init__(self) -> None:
        self.proven = False
        self.started = 0
        self.answered = 0

    def permission(self) -> bool | None:
        """True: send it again. False: never. None: wait for the answers to those under way."""
        if self.proven or self.started < UNPROVEN_REPLAYS:
            return True
        return None if self.answered < self.started else False

    def start(self) -> None:
        """A request is about to be sent again."""
        self.started += 1

    def withdraw(self) -> None:
        """It was not sent again after all: its place is free."""
        self.started -= 1

    def answer(self, marked: bool) -> None:
        """A replay came to an end, with or without the service's mark."""
        self.answered += 1
        self.proven = self.proven or marked

    def forget_unanswered(self) -> None:
        """Nobody waits for the open answers any more: their loop is gone."""
        self.answered = self.started
