"""A submitter on a scripted transport, and who listens to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from scripted_transport import KEY, TASK, ScriptedTransport

from evolink_async import EvoLinkError, ImageRequest, RetryPolicy, Task
from evolink_async.http.answers import Judgement
from evolink_async.http.exchange import Exchange
from evolink_async.http.keys import ApiKey, KeySource
from evolink_async.http.pace import Pace, Urgency
from evolink_async.http.rates import RateLimit
from evolink_async.http.retry import Replays
from evolink_async.http.single import submit_and_wait
from evolink_async.http.submit import (
    Settled,
    Submission,
    Submitter,
    new_idempotency_key,
)
from evolink_async.types import TaskReading

REQUEST = ImageRequest(model="gpt-4o-image", prompt="a lighthouse", seed=7)
ID = TASK["id"]


class Room:
    """A submitter on a scripted transport."""

    def __init__(
        self,
        transport: ScriptedTransport,
        *,
        hold: bool = False,
        key: KeySource = KEY,
        limit: str | None = "1000/s",
        replays: Replays | None = None,
        request_timeout: float = 30,
    ) -> None:
        self.transport = transport
        self.replays = replays or Replays()
        policy = RetryPolicy()
        self.pace = Pace(RateLimit.parse(limit) if limit else None, 50, policy, {})
        self.submitter = Submitter(
            Exchange(transport, "http://127.0.0.1"),
            ApiKey(key),
            self.pace,
            policy,
            self.replays,
            hold=hold,
            request_timeout=request_timeout,
        )

    async def submit(self, timeout: float | None = None, key: str | None = None, model: str | None = None) -> Task:
        deadline = None if timeout is None else now() + timeout
        request = REQUEST if model is None else ImageRequest(model=model)
        return await submit_and_wait(self.submitter, request, key or new_idempotency_key(), "calls", deadline)

    def start(
        self, listener: Listener | None = None, patience: float = 120, urgency: Urgency = Urgency.SOURCE
    ) -> Submission:
        listener = listener or Listener()
        key = new_idempotency_key()
        submission = Submission(REQUEST, key, "pool", urgency, listener, patience, self.replays)
        self.submitter.start(submission)
        return submission

    async def aclose(self) -> None:
        await self.submitter.aclose()
        await self.pace.aclose()


@dataclass
class Listener:
    ends: list[Settled] = field(default_factory=list)
    held_for: list[EvoLinkError] = field(default_factory=list)
    crashes: list[BaseException] = field(default_factory=list)
    posts: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def intend(self, submission: Submission, fingerprint: str) -> Settled | None:
        self.posts += 1
        return None

    def unsent(self, submission: Submission) -> None:
        pass

    def answered(self, submission: Submission, judgement: Judgement) -> None:
        pass

    async def accepted(self, submission: Submission, task: TaskReading) -> EvoLinkError | None:
        return None

    def held(self, submission: Submission, error: EvoLinkError) -> None:
        self.held_for.append(error)

    def paused(self, error: EvoLinkError) -> None:
        self.held_for.append(error)

    def settled(self, submission: Submission, settled: Settled) -> None:
        self.ends.append(settled)
        self.done.set()

    def crashed(self, error: BaseException) -> None:
        self.crashes.append(error)


def now() -> float:
    return asyncio.get_running_loop().time()
