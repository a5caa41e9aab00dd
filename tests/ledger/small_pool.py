"""Plays the pool's part: the smallest program that takes a ledger's verbs in the order in which a pool takes them.

pulled        enter, and what_to_do says what follows
sending       intend before the POST; posted_in_vain, rejected, unsettled, accepted after it
sent again    replay before the POST, under the same key
outstanding   ended, lost
saved         saved
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, Protocol

from evolink_async.ledger import Entry, JobLedger, Row, State, Todo, may_try_again, what_to_do
from evolink_async.types import Task

ENDPOINT, MODEL = "/v1/images/generations", "gpt-4o-image"


@dataclass(frozen=True)
class Answer:
    """What came of a POST."""

    kind: Literal["accepted", "lost", "rate_limited", "refused", "unsent", "in_progress"]
    task: Task | None = None
    replayed: bool = False


class Service(Protocol):
    """Where the POSTs go."""

    async def post(self, body: bytes, idempotency_key: str) -> Answer: ...
    async def poll(self, task_id: str) -> Task | None: ...


def now() -> datetime:
    return datetime.now(UTC)


def body_of(name: str) -> bytes:
    return b'{"model": "gpt-4o-image", "prompt": "%s"}' % name.encode()


@dataclass
class SmallPool:
    """hold: never send again. retry_failed: new tries of a passing failure. outcomes: by key, how each came out."""

    job: JobLedger
    service: Service
    hold: bool = False
    retry_failed: int = 0
    pause: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)

    def __post_init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {}
        self.spent_out = False

    async def run(self, names: Sequence[str], workers: int = 10) -> dict[str, str]:
        """Every request to its outcome; the outcome of each."""
        waiting = iter(range(0, len(names), 5))

        async def work() -> None:
            for start in waiting:
                some = names[start : start + 5]
                entries = [Entry(name, _hash(name), ENDPOINT, MODEL) for name in some]
                for known in await asyncio.gather(*map(self.job.enter, entries)):
                    self._finish(
                        known.row, await self._one(known.row, what_to_do(known, retry_failed=self.retry_failed))
                    )

        tasks = [asyncio.ensure_future(work()) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        assert all(len(outcomes) == 1 for outcomes in self.outcomes.values())
        return {name: outcomes[0] for name, outcomes in self.outcomes.items()}

    def _finish(self, row: Row, outcome: str) -> None:
        self.outcomes.setdefault(row.identity, []).append(outcome)

    async def _one(self, row: Row, todo: Todo) -> str:
        if todo is Todo.DELIVER:
            return row.state.value
        if todo is Todo.HOLD:
            return "unknown"
        if todo is Todo.SETTLE:
            return await self._settle(row)
        if todo is Todo.FOLLOW:
            return await self._follow(row)
        assert todo is Todo.SUBMIT
        return await self._submit(row)

    async def _submit(self, row: Row) -> str:
        key = f"ea-{hashlib.sha256(f'{row.identity} {row.number} {row.attempts}'.encode()).hexdigest()[:32]}"
        for _ in range(100):
            refusal = await self.job.intend(
                row,
                idempotency_key=key,
                body=body_of(row.identity),
                fingerprint="0123456789abcdef",
                at=now(),
                price="image",
                told=Decimal(3),
            )
            if refusal is not None:
                self.spent_out = True
                return "not_submitted"
            answer = await self.service.post(body_of(row.identity), key)
            match answer.kind:
                case "accepted":
                    return await self._accepted(row, answer)
                case "unsent" | "rate_limited":
                    await self.job.posted_in_vain(row, sent=answer.kind == "rate_limited")
                    await self.pause()
                case "refused":
                    await self.job.rejected(row, code="bad_size", error="no such size")
                    return "rejected"
                case "lost" | "in_progress":
                    await self.job.unsettled(row, code=None, error="cut", lost=answer.kind == "lost")
                    return await self._settle(row)
        raise AssertionError("it never got through")

    async def _settle(self, row: Row) -> str:
        """By the rules for lost responses, as far as a ledger has a part in them."""
        for _ in range(100):
            if self.hold and row.losses:
                return "unknown"
            await self.pause()
            if not await self.job.replay(row):
                return "unknown"
            assert row.idempotency_key is not None
            answer = await self.service.post(row.body or body_of(row.identity), row.idempotency_key)
            if answer.replayed or answer.kind == "in_progress":
                await self.job.keys_are_honoured()
            match answer.kind:
                case "accepted":
                    return await self._accepted(row, answer)
                case "unsent" | "rate_limited":
                    await self.job.posted_in_vain(row, sent=answer.kind == "rate_limited")
                case "refused":
                    await self.job.rejected(row, code="bad_size", error="no such size")
                    return "unknown"
                case "lost" | "in_progress":
                    await self.job.unsettled(row, code=None, error="cut again", lost=answer.kind == "lost")
        raise AssertionError("it never got through")

    async def _accepted(self, row: Row, answer: Answer) -> str:
        assert answer.task is not None
        reserved = answer.task.usage.credits_reserved
        await self.job.accepted(row, answer.task.id, reserved=reserved, at=now())
        return await self._follow(row)

    async def _follow(self, row: Row) -> str:
        """Looks at the task until it has ended."""
        assert row.task_id is not None
        for _ in range(1000):
            await self.pause()
            task = await self.service.poll(row.task_id)
            if task is None:
                await self.job.lost(row, error="404 three times", at=now())
                return "lost"
            if task.is_terminal:
                await self.job.ended(row, task, at=now())
                if row.state is State.COMPLETED:
                    await self.job.saved(row, [f"{row.identity}-1.png"])
                if may_try_again(row, self.retry_failed):
                    return await self._submit(row)
                return row.state.value
        raise AssertionError("it never ended")


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:8]


class Crash(BaseException):
    """The process is gone. No handler of errors may see it."""


class CrashPoints:
    """A `JobLedger` around which a process can be made to die: `reached` is called with the name of each point.

    "before <verb>": it was decided upon, nothing is written. "after <verb>": it is durable, its caller does not know.
    What `reached` does is up to the test: kill the process, raise `Crash`, count.
    """

    def __init__(self, job: JobLedger, reached: Callable[[str], None]) -> None:
        self._job = job
        self._reached = reached

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._job, name)
        if name not in VERBS:
            return value

        def verb(*args: Any, **kwargs: Any) -> asyncio.Future[Any]:
            self._reached(f"before {name}")
            durable: asyncio.Future[Any] = value(*args, **kwargs)
            if not durable.done():
                return asyncio.ensure_future(self._after(name, durable))
            self._reached(f"after {name}")
            return durable

        return verb

    async def _after(self, name: str, durable: asyncio.Future[Any]) -> Any:
        result = await durable
        self._reached(f"after {name}")
        return result


VERBS = (
    *("enter", "intend", "replay", "posted_in_vain", "rejected", "unsettled", "keys_are_honoured", "accepted"),
    *("ended", "lost", "saved"),
)
POINTS = [f"{moment} {verb}" for verb in VERBS for moment in ("before", "after")] + ["before post", "after post"]
