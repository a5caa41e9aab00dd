"""`JobLedger`: one job of a ledger, as the process that runs it sees it.

The rows that somebody holds live in memory, and every verb is carried out there at once, by `rules`; then `turns` makes
the change durable. Without a store (a pool without a ledger) nothing is written, and every future is done when the verb
returns: there is one path. Such a ledger knows requests with a key until they are let go, and the last of those a while
longer; others nobody asks for again. So its memory is bounded.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from threading import get_ident
from typing import Any, TypeVar
from weakref import WeakSet, WeakValueDictionary

from evolink_async.errors import ClosedError, ConfigurationError, LedgerError
from evolink_async.ledger import rules
from evolink_async.ledger.counts import Counts
from evolink_async.ledger.rerun import Entered
from evolink_async.ledger.states import ENDS
from evolink_async.ledger.turns import Batch, Found, JobSums, Store, Turns
from evolink_async.ledger.values import (
    LONGEST_LEARNED,
    Account,
    Common,
    Entry,
    Refusal,
    Row,
    StoredRow,
    as_text,
    changed,
    counted_identity,
    restore,
    saved_state,
    shared,
    to_credits,
    to_micro,
    told_micro,
)
from evolink_async.own_tasks import own_task
from evolink_async.types import Task

logger = logging.getLogger("evolink_async.ledger")

T = TypeVar("T")

_jobs: WeakSet[JobLedger] = WeakSet()


def _disown() -> None:
    """In a forked child: what the parent has opened belongs to none of its threads."""
    for job in _jobs:
        job._thread = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)

_KNOWN_LONGER = 10_000  # requests with a key that a ledger in memory knows after they were let go


@dataclass(frozen=True, slots=True)
class Opened:
    """A job as its store knows it when a run begins.

    run: its number, from 1. next_id: of the next request that is new. requests: in the ledger so far.
    interrupted: requests that the last run left sending, which are unsettled now. learned: of `remember`.
    """

    name: str
    run: int
    account: Account
    next_id: int
    requests: int
    interrupted: int
    learned: str | None = None


@dataclass(frozen=True, slots=True)
class Census:
    """How the requests of this run compare with those of the runs before.

    known: in the ledger before. new: were not. changed: had another body under the same key. gone: known, and not
    pulled in this run so far.
    """

    known: int
    new: int
    changed: int
    gone: int


class JobLedger:
    """The verbs of a job. Opened by `open_job`, closed with `aclose`.

    Every verb acts when it is called and returns a future, which is done when the change is durable: await it, or add
    a callback. Cancelling the wait takes nothing back.

    What is *asked for* (`enter`, `intend`, `replay`) and cannot be written has not happened: its future fails with
    `LedgerError`, and nothing may be sent. What is *told* (all others) has happened: if it cannot be written its future
    fails too, so that the caller can stop submitting; but the ledger keeps it, and writes it with the next turn, after
    a pause, and when it is closed. `broken` is why there is something unwritten, None while there is not.

    Raises `ClosedError` once closed, `ConfigurationError` in a forked child or another loop, and `LedgerError` for a
    move that is not in the table of `states`. Amounts are credits, moments are aware.

    learned: the JSON text that an earlier run gave to `remember`; None if there is none, or none that can be read.
    """

    def __init__(self, opened: Opened, store: Store | None = None, executor: Executor | None = None) -> None:
        self.name = opened.name
        self.run = opened.run
        self.interrupted = opened.interrupted
        self.learned = opened.learned
        self._loop = asyncio.get_running_loop()
        self._thread: int | None = get_ident()  # None: it is closed, or in a forked child
        _jobs.add(self)
        self._account = opened.account
        self._turns: Turns | None = None
        if store is not None:
            assert executor is not None
            self._turns = Turns(store, executor, self._sums)
        self._ids = itertools.count(opened.next_id)  # by which a store knows its requests
        self._known = opened.requests
        self._new = self._changed = self._seen_again = 0
        self._rows: MutableMapping[str, Row] = {} if store is None else WeakValueDictionary()
        self._unnamed: set[Row] = set()  # under a cap, while they are on their way: their reservation may have to rise
        self._let_go: OrderedDict[str, None] = OrderedDict()  # of a ledger without a store, and still known
        self._counts = Counts()
        if opened.account.probe is not None:
            self._rows[opened.account.probe.identity] = opened.account.probe
        # Nothing is waited for in memory, so what says so is shared.
        self._ready: dict[Any, asyncio.Future[Any]] = {told: self._done(told) for told in (None, True, False)}
        self._closed = False
        self._closing: asyncio.Task[None] | None = None

    # What the job has and knows

    @property
    def broken(self) -> LedgerError | None:
        """Why something that has happened is not in the ledger yet, None while everything is."""
        return None if self._turns is None else self._turns.broken

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more verbs."""
        return self._closed

    @property
    def reserved(self) -> Decimal:
        """Credits that tasks may still cost, over all runs."""
        return to_credits(self._account.reserved)

    @property
    def spent(self) -> Decimal:
        """Credits that tasks have cost, over all runs."""
        return to_credits(self._account.spent)

    @property
    def free(self) -> Decimal | None:
        """Credits that may still be reserved; None: without bound."""
        free = self._account.free
        return None if free is None else to_credits(free)

    @property
    def probe(self) -> Row | None:
        """The request whose price is being found out, and for which all that was free is reserved."""
        return self._account.probe

    def price_of(self, price: str) -> Decimal | None:
        """What a request of this price class is taken to cost, None if that is not known.

        It is the last that the service has reserved for one of them, or what one has used where that was more.
        """
        known = self._account.price_of(price)
        return None if known is None else to_credits(known)

    @property
    def replays(self) -> int:
        """Lost responses sent again, over all runs, while the service had not proven that it honours keys."""
        return self._account.replays

    @property
    def keys_honoured(self) -> bool:
        """Whether the service has proven, in any run, that it honours idempotency keys."""
        return self._account.keys_honoured

    @property
    def census(self) -> Census:
        """How this run's requests compare with those of the runs before."""
        return Census(self._known, self._new, self._changed, self._known - self._seen_again)

    # What is asked for

    def enter(self, entry: Entry) -> asyncio.Future[Entered]:
        """Look a request up, and enter it if it is new: what is known of it.

        One without a key is told apart by how many of the same content came before it in this run. What is asked at
        once is looked up and written together. `rerun.what_to_do` says what follows. Raises `InvalidRequestError` for a
        key that the ledger cannot keep.
        """
        if self._turns is None:
            return self._done(self.enter_at_once(entry))
        self._check()
        if entry.key is not None:
            self._turns.refuse(entry.key)
        future: asyncio.Future[Entered] = self._loop.create_future()
        return self._turns.look_up(
            future,
            functools.partial(self._ask_for, entry),
            functools.partial(self._enter, self._turns, entry, future),
        )

    def enter_at_once(self, entry: Entry) -> Entered:
        """The same, of a ledger without a store: nothing is waited for."""
        self._check()
        assert self._turns is None
        key, content = entry.key, entry.content
        if key is None:
            count = self._counts.get(content) or 0
            self._counts.set(content, count + 1)
            row = Row(count, content, shared(entry.endpoint, entry.model))
            if self._account.cap is not None:
                self._unnamed.add(row)
        elif key in self._rows:
            self._let_go.pop(key, None)
            row = self._rows[key]
            return Entered(row, repeated=True, changed=row.content != content)
        else:
            self._rows[key] = row = Row(key, content, shared(entry.endpoint, entry.model))
        self._new += 1
        return Entered(row)

    def let_go(self, row: Row) -> None:
        """Whoever runs this request has no more to say about it."""
        if self._turns is not None:
            return
        key = row.key
        if key is None:
            if row.state not in rules.ON_ITS_WAY:
                self._unnamed.discard(row)
            return
        self._let_go[key] = None
        if len(self._let_go) > _KNOWN_LONGER:
            key, _ = self._let_go.popitem(last=False)
            del self._rows[key]

    def find(self, identity: str) -> asyncio.Future[Row | None]:
        """The row of a request, without pulling it; None if the job has none of this identity."""
        self._check()
        future: asyncio.Future[Row | None] = self._loop.create_future()
        if self._turns is None:
            future.set_result(self._rows.get(identity))
            return future

        def found(found: Found) -> None:
            row = self._row(identity, found)
            if not future.done():
                future.set_result(row)

        return self._turns.look_up(future, lambda batch: batch.identities.add(identity), found)

    def intend(
        self,
        row: Row,
        *,
        idempotency_key: str,
        body: bytes,
        fingerprint: str,
        at: datetime,
        price: str | None = None,
        told: Decimal | None = None,
        key_number: int | None = None,
    ) -> asyncio.Future[Refusal | None]:
        """Before the first byte of a POST: reserve its credits, and remember what will be sent.

        None: send it. A `Refusal`: the credits do not suffice, and nothing has changed. price: names the class of
        requests that cost the same; told: what it costs, if the caller was told, else it is `price_of` its class. Where
        one of the class has used more than was reserved for it, it is no less than that. If nothing is known and there
        is a cap, the request tries it alone: all the rest is reserved for it. Never does this bring what is spent and
        reserved above the cap. key_number: with which the key ends, if it is a `numbered_key`; the row keeps only that.

        Whoever stops waiting and sends nothing says `posted_in_vain(row, sent=False)`.
        """
        self._check()
        price = price and as_text(price)
        account, turns = self._account, self._turns
        probe = account.probe
        before = () if turns is None else saved_state(_stored(row))
        refusal = rules.intend(
            row,
            account,
            idempotency_key=idempotency_key,
            key_number=key_number,
            fingerprint=fingerprint,
            price=price,
            told=None if told is None else to_micro(told),
            at=at,
        )
        if probe is not None and account.probe is not probe:
            self._note(probe)  # its price was told
            self._written(None, None)  # whatever becomes of this request
        if refusal is not None:
            return self._done(refusal)
        if turns is None:
            return self._ready[None]
        return self._intended(turns, _stored(row), body, before)

    def _intended(
        self, turns: Turns, row: StoredRow, body: bytes, before: tuple[object, ...]
    ) -> asyncio.Future[Refusal | None]:
        if row.body is not body:
            row.body = body
            turns.note_body(row)

        def undo() -> None:
            rules.take_back(row, self._account, before)
            turns.note_body(row)

        return self._written(row, None, undo)

    def replay(
        self, row: Row, *, price: str | None = None, told: Decimal | None = None
    ) -> asyncio.Future[Refusal | bool]:
        """Before the same POST is sent again, with the same key, bytes and API key. False: it must not be.

        Refused when the request was settled meanwhile, was sent again before, or the job has used up its replays.
        price, told: as for `intend`, of one that has nothing reserved though there is a cap: then a `Refusal` says that
        the credits do not suffice, and nothing has changed.
        """
        self._check()
        account = self._account
        before = () if self._turns is None else saved_state(_stored(row))
        replays, nothing_reserved, probe = account.replays, row.reserved is None, account.probe
        allowed = rules.replay(
            row,
            account,
            price=price and as_text(price),
            told=None if told is None else to_micro(told),
        )
        if probe is not None and account.probe is not probe:
            self._note(probe)  # its price was told
            self._written(None, None)  # whatever becomes of this request
        if allowed is not True:
            return self._done(allowed)
        counted = account.replays - replays

        def undo() -> None:
            if nothing_reserved:
                rules.take_back(_stored(row), account, before)
            else:
                reserved = row.reserved
                restore(_stored(row), before)
                row.reserved = reserved  # which may have been raised meanwhile
            account.replays -= counted

        return self._written(row, True, undo)

    # What is told

    def posted_in_vain(self, row: Row, *, sent: bool) -> asyncio.Future[None]:
        """The POST came to nothing for certain: no byte was written (`sent=False`), or 429, 401, 402 was answered.

        The reservation is released, unless an earlier POST of the same try is unsettled.
        """
        self._check()
        rules.posted_in_vain(row, self._account, sent=sent)
        return self._written(row, None)

    def rejected(self, row: Row, *, code: str | None, error: str) -> asyncio.Future[None]:
        """The request was refused, by the service or before it was sent; it holds no credits."""
        self._check()
        rules.rejected(row, self._account, code and as_text(code), as_text(error))
        return self._written(row, None)

    def unsettled(self, row: Row, *, code: str | None, error: str, lost: bool = True) -> asyncio.Future[None]:
        """The POST was sent, and no answer says whether a task exists; it keeps its credits.

        lost: False where the service itself says that it still works on the request.
        """
        self._check()
        rules.unsettled(row, code and as_text(code), as_text(error), lost=lost)
        return self._written(row, None)

    def keys_are_honoured(self) -> asyncio.Future[None]:
        """An answer has proven that the service honours idempotency keys."""
        self._check()
        if self._account.keys_honoured:
            return self._ready[None]
        self._account.keys_honoured = True
        return self._written(None, None)

    def accepted(
        self, row: Row, task_id: str, *, reserved: Decimal | None, at: datetime, number: int | None = None
    ) -> asyncio.Future[bool]:
        """A task exists for the request: nobody may see its id before this is durable. Never refused, however late.

        reserved: what the service says that it has reserved, which takes the place of the estimate, unless one of its
        class has used more; None, or a negative amount: it did not say. number: the try that the task belongs to, None:
        the present one. False: the request has another task already, so this one is paid for besides.
        """
        self._check()
        first = rules.accepted(row, self._account, task_id, told_micro(reserved), number, at)
        if not first:
            other = row.task_id or "that of another try"
            logger.warning(
                "request %s was paid for twice: task %s besides %s",
                row.identity,
                task_id,
                other,
                extra={"event": "paid_twice", "identity": row.identity, "task_id": task_id},
            )
        if self._turns is None:
            return self._ready[first]
        if row.price is not None:
            self._note_price(row.price)
        return self._written(row, first, accepted=task_id)

    def ended(self, row: Row, task: Task, *, at: datetime) -> asyncio.Future[bool]:
        """The service says that the task completed, failed or was cancelled. False: an end was known already.

        completed: what was used is spent, else what was reserved (if it tried an unknown price, and nobody has told it,
        that stays reserved until somebody does); failed: nothing; cancelled: it stays reserved. Where
        it has used more than was reserved for it, those of its class that are on their way keep that reserved.
        """
        self._check()
        end = ENDS.get(task.status)
        if end is None:
            raise LedgerError(f"request {row.identity!r}: its task {task.id} is {task.status}, so it has not ended")
        used = told_micro(task.usage.credits_used)
        account = self._account
        if used is None and (row.reserved is None or account.probe is row):  # accepted without our hearing of it
            used = told_micro(task.usage.credits_reserved)
        price = row.common.price
        used_before = None if price is None else account.used.get(price)
        first = rules.ended(row, account, end, task, used, at)
        if price is not None:
            self._note_price(price)
            if account.used.get(price) != used_before:
                self._raise_reservations()
        if self._turns is None:
            return self._ready[first]
        if first:
            self._turns.note_result(_stored(row))
        return self._written(row, first)

    def classify(self, row: Row, price: str) -> asyncio.Future[None]:
        """Tell the price class of a request that an earlier run has sent: only the run that sends one knows it."""
        self._check()
        row.common = changed(row.common, price=price)
        if not rules.raise_reservation(row, self._account):
            return self._ready[None]
        self._note(row)
        return self._written(None, None)

    def lost(self, row: Row, *, error: str, at: datetime) -> asyncio.Future[bool]:
        """The service no longer knows the id; its credits stay reserved. False: how it ended is known."""
        self._check()
        first = rules.lost(row, as_text(error), at)
        return self._written(row, first)

    def saved(self, row: Row, files: Sequence[str]) -> asyncio.Future[None]:
        """The results of a completed task are in these files."""
        self._check()
        rules.saved(row, tuple(map(as_text, files)))
        if self._turns is not None:
            self._turns.note_result(_stored(row))
        return self._written(row, None)

    def remember(self, text: str) -> asyncio.Future[bool]:
        """What was learned and will be of use to the next run, as JSON: it finds it as `learned`.

        It takes the place of what was remembered before. False: it is not kept, for it is longer than 256 kB, or
        nothing of this job is stored.
        """
        self._check()
        if self._turns is None or len(text.encode(errors="backslashreplace")) > LONGEST_LEARNED:
            return self._ready[False]
        self._turns.note_learned(as_text(text))
        return self._written(None, True)

    # What the user says

    def not_submitted(self, row: Row) -> asyncio.Future[None]:
        """No task exists for an unsettled request: its credits are released, and it may be submitted anew."""
        self._check()
        rules.not_submitted(row, self._account)
        return self._written(row, None)

    def given_up(self, row: Row) -> asyncio.Future[None]:
        """Nobody will find out about an unsettled request: it is never submitted again, and keeps its credits."""
        self._check()
        rules.given_up(row)
        return self._written(row, None)

    # The end

    async def aclose(self) -> None:
        """Write what is unwritten and let go of the job. Raises `LedgerError` for what cannot be written.

        Cancelling it stops the waiting, not the writing.
        """
        if self._closing is None:
            self._check()
            self._closed, self._thread = True, None
            self._closing = own_task(self._loop, self._finish(), "evolink ledger")
            self._closing.add_done_callback(lambda closing: closing.cancelled() or closing.exception())
        await asyncio.shield(self._closing)

    async def _finish(self) -> None:
        if self._turns is not None:
            await self._turns.finish()

    # Rows

    def _ask_for(self, entry: Entry, batch: Batch) -> None:
        """What has to be looked up, so that `_enter` can tell."""
        if entry.key is not None:
            batch.identities.add(entry.key)
            return
        batch.contents[entry.content] = batch.contents.get(entry.content, 0) + 1
        count = self._counts.get(entry.content)
        if count is not None:
            batch.counted[entry.content] = count

    def _enter(self, turns: Turns, entry: Entry, future: asyncio.Future[Entered], found: Found) -> None:
        counters = self._new, self._changed, self._seen_again
        name: str | int
        if entry.key is None:
            name = found.counts.get(entry.content, 0)
            found.counts[entry.content] = name + 1
            self._counts.set(entry.content, name + 1)
            identity = counted_identity(entry.content, name)
        else:
            name = identity = entry.key
        row = self._row(identity, found)
        step_back: Callable[[], None] | None = None
        if row is None:
            row = StoredRow(next(self._ids), name, entry.content, shared(entry.endpoint, entry.model), seen=self.run)
            self._rows[identity] = row
            self._new += 1
            known = Entered(row)
            step_back = functools.partial(self._forget, turns, row)
        elif row.seen == self.run:
            known = Entered(row, repeated=True, changed=row.content != entry.content)
        else:
            step_back = functools.partial(_unsee, row, row.seen, row.content, row.common)
            known = self._see_again(row, entry)

        def undo() -> None:
            self._new, self._changed, self._seen_again = counters
            self._counts.forget(entry.content)
            if step_back is not None:
                step_back()

        if step_back is not None:
            turns.note(row)
        turns.durable(future, known, undo)

    def _see_again(self, row: StoredRow, entry: Entry) -> Entered:
        row.seen = self.run
        self._seen_again += 1
        if row.content == entry.content:
            return Entered(row)
        self._changed += 1
        if row.paid_for or not row.keyed:  # or the key is the identity of a request without one
            return Entered(row, changed=True)
        # Nothing can have come of the former body, so it may be put right.
        row.content = entry.content
        row.common = changed(row.common, endpoint=entry.endpoint, model=entry.model)
        return Entered(row)

    def _row(self, identity: str, found: Found) -> StoredRow | None:
        """The row that lives, else the one that was found, which lives from now on."""
        row = self._rows.get(identity)
        if row is not None:
            return _stored(row)
        if identity in found.rows:
            self._rows[identity] = found.rows[identity]
        return found.rows.get(identity)

    def _forget(self, turns: Turns, row: StoredRow) -> None:
        turns.forget(row)
        self._rows.pop(row.identity, None)

    # Changes

    def _written(
        self, row: Row | None, value: T, undo: Callable[[], None] | None = None, *, accepted: str | None = None
    ) -> asyncio.Future[T]:
        """The future of a verb that has changed a row, or the job as a whole.

        undo: of what was asked for. Once something else is told of the row there is nothing to take back; that its
        reservation was raised or lowered because of others is nothing of its own, see `_note`. accepted: the id of the
        task that the verb tells.
        """
        if self._turns is None:
            return self._ready[value]
        loss = None
        if row is not None:
            row = _stored(row)
            row._version += 1
            self._turns.note(row)
            if undo is not None:
                undo = functools.partial(_undo_unless_changed, row, row._version, undo)
            if accepted is not None:
                loss = f"task {accepted} was accepted for request {row.identity}"
        return self._turns.durable(self._loop.create_future(), value, undo, loss)

    def _done(self, value: T) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        future.set_result(value)
        return future

    def _note(self, row: Row) -> None:
        if self._turns is not None:
            self._turns.note(_stored(row))

    def price_probe(self, told: Decimal) -> asyncio.Future[None]:
        """The caller tells what the request costs that tries an unknown price: it holds only that."""
        self._check()
        probe, account = self._account.probe, self._account
        if probe is None:
            return self._ready[None]
        rules.price_probe(account, max(to_micro(told), account.used.get(account.probe_price or "", 0)))
        self._note(probe)
        return self._written(None, None)

    def _note_price(self, price: str) -> None:
        account = self._account
        if self._turns is not None and (price in account.prices or price in account.used):
            self._turns.note_price(price, account.prices.get(price, 0), account.used.get(price))

    def _raise_reservations(self) -> None:
        """A request has used more than was reserved for it: so will those of its class that are on their way."""
        for row in [*self._rows.values(), *self._unnamed]:
            if rules.raise_reservation(row, self._account):
                self._note(row)

    def _sums(self) -> JobSums:
        account = self._account
        return JobSums(
            reserved=account.reserved,
            spent=account.spent,
            probe=None if account.probe is None else _stored(account.probe).id,
            probe_price=account.probe_price,
            replays=account.replays,
            keys_honoured=account.keys_honoured,
            requests=self._known + self._new,
        )

    def _check(self) -> None:
        # To ask for the running loop would be a system call each time; where ours runs in this thread, it is that one.
        if get_ident() == self._thread and self._loop.is_running():
            return
        if self._closed:
            raise ClosedError(f"the ledger of job {self.name!r} is closed")
        if self._thread is None:
            raise ConfigurationError("a ledger cannot be used in a forked process; open it there")
        raise ConfigurationError("a ledger belongs to the event loop that it was opened in")

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self.broken is not None else "open"
        return f"<JobLedger {self.name!r} {state}: run {self.run}, {self._known + self._new} requests>"


def _stored(row: Row) -> StoredRow:
    """A row of a ledger with a store."""
    assert isinstance(row, StoredRow)
    return row


def _undo_unless_changed(row: StoredRow, version: int, undo: Callable[[], None]) -> None:
    if row._version == version:
        undo()


def _unsee(row: StoredRow, seen: int, content: bytes, common: Common) -> None:
    row.seen, row.content, row.common = seen, content, common
