"""Requests through a pool, every outcome handed to whoever wants it, up to the exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio

from evolink_async.cli.outputs import stopped_by_account
from evolink_async.cli.signals import Interrupts
from evolink_async.cli.view import Screen, pool_picture, pool_sentence
from evolink_async.errors import NotSubmittedError, SubmitOutcomeUnknownError
from evolink_async.ledger import Census
from evolink_async.pool import Outcome, OutcomeStatus, PoolStats
from evolink_async.requests import GenerationRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from evolink_async import AsyncEvoLink

REST_IN_A_ROW = 500  # requests written down between two looks at the signals


class Source:
    """Numbers requests as the pool pulls them and remembers those without an outcome.

    No generator, as a pool closes those: what it leaves unread must still be written down as not sent.
    """

    def __init__(self, requests: Iterator[GenerationRequest], count: int) -> None:
        self._requests = requests
        self._count = count
        self._pulled = 0
        self.open: dict[int, GenerationRequest] = {}

    def __iter__(self) -> Source:
        return self

    def __len__(self) -> int:
        return self._count

    def __next__(self) -> GenerationRequest:
        request = next(self._requests)
        self.open[self._pulled] = request
        self._pulled += 1
        return request

    def withdrawn(self) -> list[Outcome]:
        """Outcomes for what was pulled and has none."""
        return [_not_sent(index, request) for index, request in self.open.items()]

    def unread(self) -> Iterator[Outcome]:
        """Outcomes for what was never pulled."""
        for request in self:
            yield _not_sent(self._pulled - 1, request)


@dataclass(slots=True)
class Ending:
    """How it ended: counts by status, what ended it early, ids of tasks that go on, and the last numbers."""

    stats: PoolStats
    counts: Counter[str] = field(default_factory=Counter)
    reason: BaseException | None = None
    running: list[str] = field(default_factory=list)
    unknown: int = 0  # and not given up
    given_up: int = 0
    unsaved: int = 0  # completed, and their files could not be saved
    from_ledger: int = 0
    census: Census | None = None
    cut_short: bool = False  # by a second signal: what was never read was not written down either
    out_of_time: bool = False

    @property
    def code(self) -> int:
        """The exit code, if no signal came."""
        if stopped_by_account(self.reason):
            return 3
        completed = set(self.counts) <= {OutcomeStatus.COMPLETED}
        return 0 if self.reason is None and completed and not self.unsaved else 1


@asynccontextmanager
async def opened(client: AsyncEvoLink, screen: Screen, interrupts: Interrupts) -> AsyncIterator[AsyncEvoLink]:
    """The client, closed at the end. After a signal it waits for no answer: POSTs had their seconds in the pool.

    Nor does it tell of those it cuts then, as that was done.
    """
    async with client:
        yield client
        if interrupts.code is not None:
            screen.log.setLevel(logging.ERROR)
            interrupts.cancel_soon()


async def run_through(
    client: AsyncEvoLink,
    source: Source,
    take: Callable[[Outcome], bool | None],
    screen: Screen,
    interrupts: Interrupts,
    *,
    begin: Callable[[], object] | None = None,
    within: float | None = None,
    **options: Any,
) -> Ending:
    """Run all of the source. Each request comes to `take` exactly once, also after a signal or an early end.

    The first signal (a cancellation) ends the pool: nothing more is sent and POSTs under way have 5 s. The second cuts
    that short. Where `take` says False nothing more is sent, and what runs is waited for. `begin` is called when the
    pool is open, its ledger with it. After `within` seconds the pool is left as it is then. The options are the pool's.
    """
    pool = client.pool(source, **options)
    ending = Ending(pool.stats)

    def handed(outcome: Outcome) -> None:
        if outcome.index is not None:
            source.open.pop(outcome.index, None)
        ending.counts[outcome.status] += 1
        if outcome.status is OutcomeStatus.UNFINISHED and outcome.task is not None:
            ending.running.append(outcome.task.id)
        if outcome.status is OutcomeStatus.UNKNOWN:
            given_up = isinstance(outcome.error, SubmitOutcomeUnknownError) and outcome.error.given_up
            ending.given_up += given_up
            ending.unknown += not given_up
        ending.unsaved += outcome.status is OutcomeStatus.COMPLETED and not outcome.ok
        ending.from_ledger += outcome.from_ledger
        if take(outcome) is False:
            pool.stop()

    def picture() -> RenderableType:
        return pool_picture(pool.stats, screen.console)

    try:
        async with screen.following(picture, lambda: pool_sentence(pool.stats)), pool:
            if begin is not None:
                begin()
            with anyio.move_on_after(within) as limit:
                async for outcome in pool:
                    handed(outcome)
            ending.out_of_time = limit.cancelled_caught
    except asyncio.CancelledError:
        if interrupts.code is None:
            raise
    except Exception as error:
        if error is not pool.reason:
            raise
    ending.stats = pool.stats
    ending.reason = pool.reason
    ending.census = pool.census
    for outcome in pool.leftovers:
        handed(outcome)
    for outcome in source.withdrawn():
        handed(outcome)
    for number, outcome in enumerate(source.unread()):
        handed(outcome)
        if number % REST_IN_A_ROW == 0:
            await _signals_may_come(interrupts)
            if interrupts.count > 1:
                ending.cut_short = True
                break
    return ending


async def _signals_may_come(interrupts: Interrupts) -> None:
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        if interrupts.code is None:
            raise


def _not_sent(index: int, request: GenerationRequest) -> Outcome:
    error = NotSubmittedError("nothing was sent for this request: the run ended before its turn")
    identity = request.key if request.key is not None else f"item-{index}"
    return Outcome(
        index=index,
        key=request.key,
        identity=identity,
        request=request,
        status=OutcomeStatus.NOT_SUBMITTED,
        error=error,
    )


def leave_at_once(code: int) -> None:
    """End the process without waiting for anything; all that matters was written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass
    os._exit(code)
