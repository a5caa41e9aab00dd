"""Random lives of a job: the ledger in a file, the one in memory and a naive model do the same.

The naive model shares no code with the package: each request is the list of its tries, and every sum is made anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_world import (
    assert_balanced,
    at,
    end_of,
    enter_all,
    entry,
    facts,
    intend,
    kill,
    new_task,
    sums_on_disk,
)
from loop_executor import in_loop
from postgres import is_postgres

from evolink_async.ledger import JobLedger, Row, State, open_job, rules
from evolink_async.types import Task

PRICES = st.sampled_from([None, 0, 1, 2, 5])
AMOUNTS = st.sampled_from([None, -1, 0, 1, 2, 5])
CLASSES = st.sampled_from(["sd", "hd"])
MILLION = 1_000_000


@dataclass
class Try:
    """What one try holds."""

    reserved: int | None = None
    spent: int | None = None
    task: str | None = None


@dataclass
class Request:
    """What is naively known of a request."""

    state: str = "entered"
    tries: list[Try] = field(default_factory=lambda: [Try()])
    extras: list[Try] = field(default_factory=list)
    losses: int = 0
    replayed: bool = False
    attempts: int = 0
    price: str | None = None

    @property
    def now(self) -> Try:
        return self.tries[-1]

    @property
    def held(self) -> list[Try]:
        return self.tries + self.extras


class Naive:
    """A job, naively."""

    def __init__(self, cap: int | None) -> None:
        self.cap = cap
        self.requests: dict[str, Request] = {}
        self.prices: dict[str, int] = {}
        self.used: dict[str, int] = {}
        self.probe: str | None = None
        self.probe_class: str | None = None
        self.replays = 0

    @property
    def reserved(self) -> int:
        return sum(held.reserved or 0 for request in self.requests.values() for held in request.held)

    @property
    def spent(self) -> int:
        return sum(held.spent or 0 for request in self.requests.values() for held in request.held)

    def price_of(self, price: str) -> int | None:
        if price in self.used:
            return max(self.used[price], self.prices.get(price, 0))
        return self.prices.get(price) if self.prices.get(price) != 0 else None

    def intend(self, key: str, price: str, told: int | None) -> bool:
        request = self.requests[key]
        known = self.price_of(price) if told is None else max(told, self.used.get(price, 0))
        if known is not None and self.probe is not None and self.probe_class == price:
            self.requests[self.probe].now.reserved = known
            self.probe = None
        if self.cap is not None:
            free = self.cap - self.reserved - self.spent
            if known is None:
                if self.probe is not None or free <= 0:
                    return False
                self.probe, self.probe_class, known = key, price, free
            elif known > free:
                return False
        if request.now.task is not None:
            request.tries.append(Try())
        request.state, request.losses, request.replayed, request.price = "sending", 0, False, price
        request.now.reserved = known
        request.attempts += 1
        return True

    def used_more(self, price: str, used: int) -> None:
        self.used[price] = max(used, self.used.get(price, 0))
        for request in self.requests.values():
            if request.price == price:
                self.keep_what_was_used(request)

    def keep_what_was_used(self, request: Request) -> None:
        on_its_way = request.state in ("sending", "unsettled", "replaying", "accepted")
        if on_its_way and request.now.reserved is not None and request.price in self.used:
            request.now.reserved = max(request.now.reserved, self.used[request.price])

    def release(self, key: str) -> None:
        now = self.requests[key].now
        now.reserved = None if now.spent is None else 0
        if self.probe == key:
            self.probe = None


class Life(RuleBasedStateMachine):
    """One job over several runs."""

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.path = path
        self.rows: dict[str, Row] = {}
        self.twins: dict[str, Row] = {}

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize(cap=st.sampled_from([None, 6, 11]))
    def begin(self, cap: int | None) -> None:
        self.naive = Naive(None if cap is None else cap * MILLION)
        options: dict[str, Any] = {} if cap is None else {"max_credits": Decimal(cap)}
        self.job: JobLedger = self.do(open_job(self.path, **options))
        self.twin: JobLedger = self.do(open_job(None, **options))

    def teardown(self) -> None:
        if hasattr(self, "job"):
            self.do(self.job.aclose())
            self.do(self.twin.aclose())
        self.loop.close()

    def both(self, verb: str, key: str, *args: Any, **kwargs: Any) -> Any:
        """Tell the ledger and its twin; what both answer."""

        async def told() -> tuple[Any, Any]:
            one = await getattr(self.job, verb)(self.rows[key], *args, **kwargs)
            other = await getattr(self.twin, verb)(self.twins[key], *args, **kwargs)
            return one, other

        one, other = self.do(told())
        assert one == other
        return one

    def some(self, data: st.DataObject, *states: str) -> str:
        keys = [key for key, request in self.naive.requests.items() if request.state in states]
        return data.draw(st.sampled_from(keys))

    def has(self, *states: str) -> bool:
        return any(request.state in states for request in self.naive.requests.values())

    # The pool's part

    @rule(count=st.integers(1, 3))
    def pull(self, count: int) -> None:
        async def pulled() -> None:
            keys = [f"k{len(self.naive.requests) + more}" for more in range(count)]
            for known, twin in zip(
                await enter_all(self.job, [entry(key, key) for key in keys]),
                await enter_all(self.twin, [entry(key, key) for key in keys]),
                strict=True,
            ):
                assert not known.repeated
                self.rows[known.row.identity], self.twins[known.row.identity] = known.row, twin.row
                self.naive.requests[known.row.identity] = Request()

        self.do(pulled())

    @precondition(lambda self: self.has("entered", "rejected", "failed"))
    @rule(data=st.data(), price=CLASSES, told=PRICES)
    def intend(self, data: st.DataObject, price: str, told: int | None) -> None:
        key = self.some(data, "entered", "rejected", "failed")
        granted = self.naive.intend(key, price, None if told is None else told * MILLION)
        before = self.naive.reserved + self.naive.spent

        async def asked() -> list[Any]:
            options = {"price": price, "told": None if told is None else Decimal(told), "idempotency_key": f"ea-{key}"}
            return [
                await intend(self.job, self.rows[key], **options),
                await intend(self.twin, self.twins[key], **options),
            ]

        one, other = self.do(asked())
        assert (one is None) == (other is None) == granted
        if granted and self.naive.cap is not None:
            assert before <= self.naive.cap

    @precondition(lambda self: self.has("sending", "replaying"))
    @rule(data=st.data(), sent=st.booleans())
    def come_back(self, data: st.DataObject, sent: bool) -> None:
        key = self.some(data, "sending", "replaying")
        self.both("posted_in_vain", key, sent=sent)
        request = self.naive.requests[key]
        request.attempts -= not sent
        if request.state == "sending":
            request.state = "entered"
            self.naive.release(key)
        else:
            request.state = "unsettled"
            if not sent and request.replayed:
                request.replayed = False
                self.naive.replays -= 1

    @precondition(lambda self: self.has("entered", "sending", "replaying"))
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        key = self.some(data, "entered", "sending", "replaying")
        self.both("rejected", key, code="bad_size", error="no such size")
        request = self.naive.requests[key]
        if request.state == "replaying":
            request.state = "unsettled"
            request.losses += 1
        else:
            request.state = "rejected"
            self.naive.release(key)

    @precondition(lambda self: self.has("sending", "replaying"))
    @rule(data=st.data(), lost=st.booleans())
    def lose_the_answer(self, data: st.DataObject, lost: bool) -> None:
        key = self.some(data, "sending", "replaying")
        self.both("unsettled", key, code=None, error="cut", lost=lost)
        self.naive.requests[key].state = "unsettled"
        self.naive.requests[key].losses += lost

    @precondition(lambda self: self.has("unsettled"))
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        key = self.some(data, "unsettled")
        request = self.naive.requests[key]
        counts = request.losses == 1 and not request.replayed
        may = request.losses <= 1 and not (counts and self.naive.replays >= 3)
        assert self.both("replay", key) is may
        if may:
            request.state = "replaying"
            request.attempts += 1
            request.replayed |= counts
            self.naive.replays += counts

    @precondition(lambda self: self.has("entered", "sending", "unsettled", "replaying", "rejected", "given_up"))
    @rule(data=st.data(), reserved=AMOUNTS)
    def accept(self, data: st.DataObject, reserved: int | None) -> None:
        key = self.some(data, "entered", "sending", "unsettled", "replaying", "rejected", "given_up")
        task = new_task(reserved)
        assert self.both("accepted", key, task.id, reserved=task.usage.credits_reserved, at=at(1)) is True
        request = self.naive.requests[key]
        request.state, request.now.task = "accepted", task.id
        if reserved is not None and reserved >= 0:
            known = None
            if request.price is not None:
                self.naive.prices[request.price] = reserved * MILLION
                known = self.naive.price_of(request.price)
            if reserved or request.now.reserved is None or known is not None:
                request.now.reserved = max(reserved * MILLION, self.naive.used.get(request.price or "", 0))
                if self.naive.probe == key:
                    self.naive.probe = None

    @precondition(lambda self: self.has("accepted", "completed", "failed", "cancelled", "lost"))
    @rule(data=st.data(), known=st.booleans())
    def accept_late(self, data: st.DataObject, known: bool) -> None:
        key = self.some(data, "accepted", "completed", "failed", "cancelled", "lost")
        request = self.naive.requests[key]
        task = new_task(None, request.now.task) if known else new_task(3)
        assert self.both("accepted", key, task.id, reserved=task.usage.credits_reserved, at=at(2)) is known
        if not known:
            self.add_extra(request)

    def add_extra(self, request: Request) -> None:
        request.extras.append(Try(reserved=max(3 * MILLION, self.naive.used.get(request.price or "", 0))))

    @precondition(lambda self: any(len(request.tries) > 1 for request in self.naive.requests.values()))
    @rule(data=st.data())
    def accept_for_a_former_try(self, data: st.DataObject) -> None:
        key = data.draw(
            st.sampled_from([key for key, request in self.naive.requests.items() if len(request.tries) > 1])
        )
        assert self.both("accepted", key, new_task().id, reserved=Decimal(3), at=at(2), number=1) is False
        self.add_extra(self.naive.requests[key])

    @precondition(lambda self: self.has("accepted", "lost"))
    @rule(data=st.data(), end=st.sampled_from(["completed", "failed", "cancelled"]), used=AMOUNTS)
    def end(self, data: st.DataObject, end: str, used: int | None) -> None:
        key = self.some(data, "accepted", "lost")
        request = self.naive.requests[key]
        assert request.now.task is not None
        ended = end_of(Task(id=request.now.task), end, used)
        assert self.both("ended", key, ended, at=at(3)) is True
        request.state = end
        now = request.now
        if end == "completed":
            price = request.price or "of an earlier run"
            unknown = self.naive.price_of(price) is None
            cost = used * MILLION if used is not None and used >= 0 else None
            if cost is None and unknown and price in self.naive.prices:
                cost = 0
            now.spent = now.reserved if cost is None else cost
            more = cost is not None and now.reserved is not None and cost > now.reserved
            if cost is not None and request.price is not None and (unknown or more):
                self.naive.used_more(price, cost)
        if end == "failed":
            now.spent = 0
        if end != "cancelled":
            self.naive.release(key)

    @precondition(lambda self: any(self.of_an_earlier_run(request) for request in self.naive.requests.values()))
    @rule(data=st.data(), price=CLASSES)
    def pull_one_of_an_earlier_run(self, data: st.DataObject, price: str) -> None:
        keys = [key for key, request in self.naive.requests.items() if self.of_an_earlier_run(request)]
        key = data.draw(st.sampled_from(keys))
        self.both("classify", key, price)
        self.naive.requests[key].price = price
        self.naive.keep_what_was_used(self.naive.requests[key])

    @staticmethod
    def of_an_earlier_run(request: Request) -> bool:
        return request.state in ("unsettled", "accepted") and request.price is None and request.now.reserved is not None

    @precondition(lambda self: self.has("accepted"))
    @rule(data=st.data())
    def lose_the_task(self, data: st.DataObject) -> None:
        key = self.some(data, "accepted")
        self.both("lost", key, error="404 three times", at=at(3))
        self.naive.requests[key].state = "lost"

    @precondition(lambda self: self.has("completed"))
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        self.both("saved", self.some(data, "completed"), ["a.png"])

    @precondition(lambda self: self.has("unsettled"))
    @rule(data=st.data(), gone=st.booleans())
    def settle_by_hand(self, data: st.DataObject, gone: bool) -> None:
        key = self.some(data, "unsettled")
        request = self.naive.requests[key]
        if gone:
            self.both("not_submitted", key)
            request.state, request.losses, request.replayed = "entered", 0, False
            self.naive.release(key)
        else:
            self.both("given_up", key)
            request.state = "given_up"

    # The end of a run

    @rule(crash=st.booleans(), more=st.sampled_from([0, 0, 5]))
    def run_again(self, crash: bool, more: int) -> None:
        if self.naive.cap is not None:
            self.naive.cap += more * MILLION
        cap = None if self.naive.cap is None else Decimal(self.naive.cap) / MILLION
        self.do(self._run_again(crash, cap))
        for key, request in self.naive.requests.items():
            if request.state in ("sending", "replaying"):
                request.state = "unsettled"
                request.losses += 1
            # Of what class a request is, is known in its own run; and of the one that tries a price.
            if key != self.naive.probe:
                request.price = None

    async def _run_again(self, crash: bool, cap: Decimal | None) -> None:
        if crash:
            kill(self.job)
        else:
            await self.job.aclose()
        self.job = await open_job(self.path, max_credits=cap)
        known = await enter_all(self.job, [entry(key, key) for key in self.rows])
        assert not any(one.repeated or one.changed for one in known)
        self.rows = {one.row.identity: one.row for one in known}
        for row in self.twins.values():
            if row.state in (State.SENDING, State.REPLAYING):
                rules.left_sending(row)
            if row is not self.twin.probe:
                row.common = row.common._replace(price=None)
        self.twin._account.cap = None if self.naive.cap is None else self.naive.cap

    # What holds at every moment

    @invariant()
    def all_three_agree(self) -> None:
        if not hasattr(self, "naive"):
            return
        for key, request in self.naive.requests.items():
            row, twin = self.rows[key], self.twins[key]
            assert (row.state, row.losses, row.replayed, row.attempts, row.task_id) == (
                *(request.state, request.losses, request.replayed, request.attempts, request.now.task),
            )
            assert row.holds == (
                sum(held.reserved or 0 for held in request.held),
                sum(held.spent or 0 for held in request.held),
            )
            assert (row.reserved, row.spent) == (request.now.reserved, request.now.spent)
            assert facts(row) == facts(twin)
        for job in (self.job, self.twin):
            assert (job.reserved * MILLION, job.spent * MILLION) == (self.naive.reserved, self.naive.spent)
            assert job.replays == self.naive.replays
            assert (None if job.probe is None else job.probe.identity) == self.naive.probe
            assert {price: job.price_of(price) for price in ("sd", "hd")} == {
                price: None if known is None else Decimal(known) / MILLION
                for price, known in ((price, self.naive.price_of(price)) for price in ("sd", "hd"))
            }
        assert_balanced(self.path)
        assert sums_on_disk(self.path)[:2] == (self.naive.reserved, self.naive.spent)


def test_a_ledger_its_twin_in_memory_and_a_naive_model_do_the_same(
    new_ledger: Callable[[], Path | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_loop(monkeypatch)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: Life(new_ledger()),
        settings=settings(
            max_examples=6 if is_postgres(new_ledger()) else 60,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
