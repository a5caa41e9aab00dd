"""What a pool asks of its ledger and tells it: the one place where requests on their way and rows of a job meet.

A pool without a ledger has a job in memory, and takes the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from evolink_async import clock
from evolink_async.errors import ClosedError, EvoLinkError, InvalidRequestError, LedgerError, TaskLostError
from evolink_async.http.answers import Judgement
from evolink_async.http.retry import Replays, Verdict
from evolink_async.http.submit import Ending, Settled, Submission, new_idempotency_key
from evolink_async.ledger import Entered, Entry, JobLedger, Refusal, Row, states
from evolink_async.ledger.values import KEY_DIGITS, numbered_key
from evolink_async.polling.schedule import Schedule
from evolink_async.pool.pricing import price_class
from evolink_async.requests import GenerationRequest
from evolink_async.types import Task, TaskReading

if TYPE_CHECKING:
    from evolink_async.pool.record import Record

logger = logging.getLogger("evolink_async.pool")

_ON_THE_WIRE = (states.SENDING, states.REPLAYING)
_ON_ITS_WAY = (states.UNSETTLED, states.ACCEPTED)


class Journal:
    """The verbs of a job as a pool needs them.

    told: the price of a request that the caller knows; raises `InvalidRequestError` if his function fails for it.
    failed: called with the error when something could not be written, or asked. heard: with what is known of a record.
    """

    def __init__(
        self,
        job: JobLedger,
        replays: Replays,
        told: Callable[[GenerationRequest], Decimal | None],
        failed: Callable[[EvoLinkError], None],
        heard: Callable[[Record, Entered | EvoLinkError], None],
        *,
        durable: bool,
    ) -> None:
        self.job = job
        self.told = told
        self._failed = failed
        self._heard = heard
        self._spent_before = job.spent
        self.capped = job.free is not None
        self._priced = durable or self.capped
        self.durable = durable
        self._key_prefix = new_idempotency_key()[:-KEY_DIGITS]
        # Without a ledger the client counts what was sent again without proof; with one, the job does.
        self.replays = replays
        if durable:
            self.replays = Replays()
            self.replays.started = self.replays.answered = job.replays
            self.replays.proven = replays.proven or job.keys_honoured

    @property
    def spent(self) -> Decimal:
        """Credits that were spent in this run."""
        return self.job.spent - self._spent_before

    def enter(self, record: Record, entry: Entry) -> None:
        """Look a request up, or enter it; what is known of it is heard at once or later."""
        if self.durable:
            self.job.enter(entry).add_done_callback(functools.partial(self._entered, record))
        else:
            self._heard(record, self.job.enter_at_once(entry))

    def _entered(self, record: Record, future: asyncio.Future[Entered]) -> None:
        request = record.request
        assert request is not None
        try:
            known = future.result()
        except EvoLinkError as error:
            self._heard(record, error)
            return
        if not self.job.is_closed:
            self._classify(known, request)
            if self.job.probe is known.row and not known.changed:
                with contextlib.suppress(InvalidRequestError):  # their function fails: nothing is told
                    self.price_probe(self.told(request))
        self._heard(record, known)

    def price_probe(self, told: Decimal | None) -> None:
        """What the caller says that the request costs which tries an unknown price."""
        if told is not None:
            self._tell(self.job.price_probe(told))

    def _classify(self, known: Entered, request: GenerationRequest) -> None:
        """One that an earlier run has sent: of what class it is, its request tells."""
        row = known.row
        if row.price is None and row.reserved is not None and row.state in _ON_ITS_WAY and not known.changed:
            self._tell(self.job.classify(row, price_class(request)))

    def has_price(self, request: GenerationRequest) -> bool:
        """Whether it is known what a request will cost."""
        return self.told(request) is not None or self.job.price_of(price_class(request)) is not None

    def key_of(self, row: Row, number: int | None) -> str:
        """The idempotency key for a request: random, but for the last digits."""
        if row.state is states.UNSETTLED and row.idempotency_key is not None:
            return row.idempotency_key
        if row.state is states.FAILED or number is None:
            return new_idempotency_key()
        return numbered_key(self._key_prefix, number)

    async def intend(self, row: Row, submission: Submission, fingerprint: str, number: int | None) -> Settled | None:
        """Put the POST on record, with its credits: None. Or why it must not be made. number: as for `key_of`."""
        if row.state is states.UNSETTLED:
            return await self._replay(row, submission)
        request = submission.request
        price = told = None
        if self._priced:
            price, told = price_class(request), self.told(request)
        asked = self.job.intend(
            row,
            idempotency_key=submission.key,
            body=submission.content,
            fingerprint=fingerprint,
            at=clock.now(),
            price=price,
            told=told,
            key_number=number if submission.key.startswith(self._key_prefix) else None,
        )
        try:
            refusal = await asked
        except LedgerError as error:
            return _unwritten(error)
        return None if refusal is None else _unaffordable(refusal)

    async def _replay(self, row: Row, submission: Submission) -> Settled | None:
        """The same, where the POST was made before."""
        if submission.replays.proven:
            self._tell(self.job.keys_are_honoured())
        price = told = None
        if self.capped:
            price = price_class(submission.request)
            with contextlib.suppress(InvalidRequestError):  # their function fails: nothing is told
                told = self.told(submission.request)
        asked = self.job.replay(row, price=price, told=told)
        try:
            allowed = await asked
        except LedgerError as error:
            return _unwritten(error)
        if isinstance(allowed, Refusal):
            return _unaffordable(allowed)
        return None if allowed else Settled("unknown")

    def unsent(self, row: Row) -> None:
        """Nothing of the intended POST was written, and nothing will be."""
        if row.state in _ON_THE_WIRE and not self.job.is_closed:
            self._tell(self.job.posted_in_vain(row, sent=False))

    def answered(self, row: Row, judgement: Judgement) -> None:
        """What came of a POST; a task that was made is told with `accepted`."""
        job, verdict = self.job, judgement.verdict
        if (judgement.task is not None and not judgement.replayed) or job.is_closed:
            return
        if judgement.replayed or verdict is Verdict.IN_PROGRESS:
            self._tell(job.keys_are_honoured())
        error = judgement.error
        code, text = (None, "") if error is None else (error.code, _without_code(error))
        match verdict:
            case Verdict.UNSENT:
                self._tell(job.posted_in_vain(row, sent=False))
            case Verdict.RATE_LIMITED | Verdict.ACCOUNT:
                self._tell(job.posted_in_vain(row, sent=True))
            case Verdict.REFUSED:
                self._tell(job.rejected(row, code=code, error=text))
            case Verdict.LOST | Verdict.CONFLICT:
                self._tell(job.unsettled(row, code=code, error=text))
            case Verdict.IN_PROGRESS:
                self._tell(job.unsettled(row, code=code, error=text, lost=False))

    async def accepted(self, row: Row, task: TaskReading) -> EvoLinkError | None:
        """An id is known. Returns once it is durable, or with the reason why it isn't."""
        if self.job.is_closed:
            return None
        future = self.job.accepted(row, task.id, reserved=task.credits_reserved, at=clock.now())
        try:
            await future
        except LedgerError as error:
            return error
        return None

    def refused(self, row: Row, error: EvoLinkError) -> None:
        """A request was refused before anything was sent."""
        self._tell(self.job.rejected(row, code=error.code, error=_without_code(error)))

    def ended(self, row: Row, task: Task) -> None:
        """The service says how a task ended."""
        self._tell(self.job.ended(row, task, at=clock.now()))

    def lost(self, row: Row, error: TaskLostError) -> None:
        """The service no longer knows a task."""
        self._tell(self.job.lost(row, error=error.message, at=clock.now()))

    def start_warm(self, schedule: Schedule) -> None:
        """Give what earlier runs have learned of durations to a schedule that knows nothing yet."""
        if self.job.learned is None or schedule.has_learned:
            return
        try:
            schedule.restore(json.loads(self.job.learned))
        except ValueError as error:
            logger.warning("%s", error, extra={"event": "learned_unreadable"})

    def remember(self, schedule: Schedule) -> None:
        """Keep what was learned for the next run."""
        if self.durable and schedule.has_learned:
            self._tell(self.job.remember(json.dumps(schedule.export())))

    def saved(self, row: Row, files: Sequence[PurePath]) -> None:
        """The results are in these files."""
        self._tell(self.job.saved(row, list(map(str, files))))

    async def aclose(self) -> None:
        """Write the rest. Raises `LedgerError` for what could not be written."""
        await self.job.aclose()

    def _tell(self, future: asyncio.Future[Any]) -> None:
        if not future.done():  # else there was nothing to write
            future.add_done_callback(self._report)

    def _report(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, EvoLinkError) and not isinstance(error, ClosedError):
            self._failed(error)


def _without_code(error: EvoLinkError) -> str:
    """What an error says besides its code, which is kept beside it."""
    return str(error).removeprefix(f"{error.code}: ")


def _unaffordable(refusal: Refusal) -> Settled:
    error = refusal.error()
    ending: Ending = "not_submitted" if refusal.probe is None else "deferred"
    return Settled(ending, error=error, fatal=error)


def _unwritten(error: LedgerError) -> Settled:
    return Settled("not_submitted", error=error, fatal=error)
