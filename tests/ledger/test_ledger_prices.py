"""A service that uses more than it reserves, or reserves nothing: the cap holds as soon as that is known."""

from __future__ import annotations

import random
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from ledger_world import accept, assert_balanced, at, end_of, enter_all, entered, entry, intend, kill, new_task, opened
from loop_executor import in_loop

from evolink_async import LedgerError
from evolink_async.ledger import JobLedger, Row, State, open_job, open_ledger


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)


async def running(job: JobLedger, key: str | None, reserved: float | None, told: float | None = None) -> Row:
    """A request whose task is accepted."""
    row = await entered(job, key, key)
    assert await intend(job, row, price="hd", told=None if told is None else Decimal(str(told))) is None
    await accept(job, row, new_task(reserved), at=at(1))
    return row


async def complete(job: JobLedger, row: Row, used: float | None) -> None:
    assert row.task_id is not None
    await job.ended(row, end_of(new_task(None, row.task_id), used=used), at=at(2))


# Nothing, and less than nothing


async def test_a_negative_amount_counts_as_not_told(place: Path | str | None) -> None:
    async with opened(place, max_credits=Decimal(50)) as job:
        probe = await running(job, "a", -100)
        assert (job.probe, job.free, job.price_of("hd")) == (probe, 0, None)
        await complete(job, probe, 10)
        assert (job.free, job.price_of("hd")) == (40, 10)
        await complete(job, await running(job, "b", 10), -10)
        assert (job.spent, job.reserved) == (20, 0)
        silent = await running(job, "c", -1)
        assert job.reserved == 10
        await complete(job, silent, -1)
        assert job.spent == 30


async def test_a_class_for_which_only_0_was_reserved_is_tried_alone_until_a_task_has_shown_what_it_uses(
    place: Path | str | None,
) -> None:
    async with opened(place, max_credits=Decimal(50)) as job:
        probe, other = await running(job, "a", 0), await entered(job, "b")
        refusal = await intend(job, other, price="hd", told=None)
        assert refusal is not None
        assert (refusal.probe, job.probe, job.free, job.price_of("hd")) == (probe, probe, 0, None)
        await complete(job, probe, 10)
        assert (job.probe, job.free, job.price_of("hd")) == (None, 40, 10)
        assert await intend(job, other, price="hd", told=None) is None
        await accept(job, other, new_task(0), at=at(1))
        assert (job.reserved, job.free) == (10, 30)


@pytest.mark.parametrize("end", ["failed", "rejected"])
async def test_a_request_for_which_0_was_reserved_and_that_came_to_nothing_shows_no_price(
    place: Path | str | None, end: str
) -> None:
    async with opened(place, max_credits=Decimal(50)) as job:
        if end == "failed":
            row = await running(job, "a", 0)
            assert row.task_id is not None
            await job.ended(row, end_of(new_task(None, row.task_id), "failed"), at=at(2))
        else:
            row = await entered(job, "a", "a")
            await intend(job, row, price="hd", told=None)
            await job.rejected(row, code=None, error="no")
        assert (job.probe, job.free, job.price_of("hd")) == (None, 50, None)


@pytest.mark.parametrize("used", [0, None])
async def test_a_request_that_is_free_as_far_as_the_service_tells_has_the_price_0_when_it_has_ended(
    place: Path | str | None, used: float | None
) -> None:
    async with opened(place, max_credits=Decimal(50)) as job:
        await complete(job, await running(job, "a", 0), used)
        assert (job.spent, job.free, job.price_of("hd")) == (0, 50, 0)
        rows = [await running(job, key, 0) for key in "bcd"]
        assert (job.probe, job.reserved) == (None, 0)
        for row in rows:
            await complete(job, row, used)
        assert (job.spent, job.reserved) == (0, 0)


async def test_a_price_that_falls_to_0_is_not_known_any_more_and_releases_nothing(place: Path | str | None) -> None:
    async with opened(place, max_credits=Decimal(50)) as job:
        await complete(job, await running(job, "a", 10), 10)
        b, c = await entered(job, "b"), await entered(job, "c")
        assert [await intend(job, row, price="hd", told=None) for row in (b, c)] == [None, None]
        await accept(job, b, new_task(0), at=at(1))
        assert (job.reserved, job.price_of("hd")) == (20, None)
        await complete(job, b, 10)
        assert (job.spent, job.reserved, job.price_of("hd")) == (20, 10, 10)


# More than was reserved


async def test_where_more_was_used_than_reserved_that_is_the_price_and_all_on_their_way_keep_it(
    ledger_url: Path | str,
) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(50)) as job:
        rows = [await running(job, key, 1) for key in "abc"]
        sending = await entered(job, "d")
        await intend(job, sending, price="hd", told=None)
        other = await entered(job, "other")
        await intend(job, other, price="sd", told=Decimal(2))
        assert job.reserved == 6
        await complete(job, rows[0], 10)
        assert [row.reserved for row in (*rows, sending, other)] == [0, 10e6, 10e6, 10e6, 2e6]
        assert (job.spent, job.reserved, job.free, job.price_of("hd")) == (10, 32, 8, 10)
        assert_balanced(path)
        await accept(job, sending, new_task(1), at=at(1))
        assert sending.reserved == 10e6
        assert await intend(job, await entered(job, "e"), price="hd", told=None) is not None
    kept = {"b": 10e6, "c": 10e6, "d": 10e6}
    async with opened(path, max_credits=Decimal(50)) as job:
        assert job.price_of("hd") == 10
        known = await enter_all(job, [entry(key, key) for key in "bcd"])
        assert {one.row.identity: one.row.reserved for one in known} == kept
        await complete(job, known[0].row, 9)
        await job.accepted(known[1].row, "task-of-its-own", reserved=Decimal(1), at=at(3))
    async with open_ledger(path) as ledger:
        assert await ledger.job().prices() == {"hd": 10}
    assert_balanced(path)


async def test_where_never_more_was_used_than_reserved_the_price_is_what_was_last_reserved_also_when_it_falls(
    place: Path | str | None,
) -> None:
    async with opened(place, max_credits=Decimal(100)) as job:
        for reserved, used in ((10, 10), (8, 8), (9, 3), (5, None), (7, 7)):
            row = await running(job, None, reserved)
            assert job.price_of("hd") == reserved
            await complete(job, row, used)
            assert job.price_of("hd") == reserved


async def test_the_most_that_was_used_counts_and_a_greater_reservation_counts_more(place: Path | str | None) -> None:
    async with opened(place, max_credits=Decimal(100)) as job:
        for reserved, used, price in ((1, 10, 10), (1, 4, 10), (1, 12, 12), (15, 15, 15), (1, 1, 12)):
            await complete(job, await running(job, None, reserved), used)
            assert job.price_of("hd") == price


async def test_a_lost_task_that_ends_after_all_does_not_lower_what_its_class_was_seen_to_use(
    place: Path | str | None,
) -> None:
    async with opened(place, max_credits=Decimal(100)) as job:
        lost, row = [await running(job, key, 1) for key in "ab"]
        await job.lost(lost, error="404 three times", at=at(2))
        await complete(job, row, 10)
        await complete(job, lost, 5)
        assert (job.spent, job.reserved, job.price_of("hd")) == (15, 0, 10)


async def test_a_price_that_the_caller_has_told_gives_way_to_what_one_of_its_class_has_used(
    place: Path | str | None,
) -> None:
    async with opened(place, max_credits=Decimal(50)) as job:
        first, second = [await running(job, key, 5, told=5) for key in "ab"]
        await complete(job, first, 10)
        assert (job.spent, job.reserved, second.reserved) == (10, 10, 10e6)
        await running(job, "c", 5, told=5)
        assert job.reserved == 20
        await running(job, "d", 12, told=12)  # his word is above it
        assert (job.reserved, job.free) == (32, 8)
        refusal = await intend(job, await entered(job, "e"), price="hd", told=Decimal(5))
        assert refusal is not None
        assert refusal.price == 10


async def test_what_an_earlier_run_has_sent_keeps_what_its_class_has_used_since(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path, max_credits=Decimal(50))
    for key in "abc":
        await running(job, key, 1)
    await intend(job, await entered(job, "sending", "sending"), price="hd", told=None)
    kill(job)
    async with opened(path, max_credits=Decimal(50)) as job:
        a, b, c, sending = [
            known.row for known in await enter_all(job, [entry(key, key) for key in [*"abc", "sending"]])
        ]
        await job.classify(a, "hd")
        await job.classify(b, "hd")
        await complete(job, a, 10)
        assert (job.price_of("hd"), b.reserved, c.reserved) == (10, 10e6, 1e6)
        await job.classify(c, "hd")
        await job.classify(sending, "hd")
        assert (c.reserved, sending.reserved, sending.state) == (10e6, 10e6, State.UNSETTLED)
    assert_balanced(path)


@pytest.mark.parametrize("verb", ["intend", "replay"])
async def test_what_is_kept_for_a_request_is_right_if_its_intent_or_replay_cannot_be_written(
    ledger_url: Path | str, verb: str
) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(50)) as job:
        first, row = await running(job, "a", 1), await entered(job, "b")
        if verb == "replay":
            await intend(job, row, price="hd", told=None)
            await job.unsettled(row, code=None, error="cut")
        store: Any = job._turns._store  # type: ignore[union-attr]
        carry_out, store.carry_out = store.carry_out, _full
        asked = job.replay(row) if verb == "replay" else intend(job, row, price="hd", told=None)
        ended = job.ended(first, end_of(new_task(None, first.task_id), used=10), at=at(2))
        for future in (asked, ended):
            with pytest.raises(LedgerError):
                await future
        store.carry_out = carry_out
        assert row.state is (State.UNSETTLED if verb == "replay" else State.ENTERED)
        assert (job.spent, job.reserved) == (10, 10 if verb == "replay" else 0)
        assert await (job.replay(row) if verb == "replay" else intend(job, row, price="hd", told=None)) in (None, True)
        assert (job.spent, job.reserved) == (10, 10)
    assert_balanced(path)


def _full(batch: Any) -> None:
    raise LedgerError("the disk is full")


# Random services


@dataclass(frozen=True)
class Prices:
    """What a service reserves for a request of a class, and what it uses."""

    reserved: float | None
    used: float


async def test_once_each_class_has_shown_what_it_uses_no_intent_brings_the_true_cost_above_the_cap() -> None:
    """The seed of a round is its number."""
    grants = over = 0
    for seed in range(400):
        chance = random.Random(seed)
        classes = {
            name: Prices(chance.choice([None, -1, 0, 0, 1, 3, 8]), chance.choice([0, 1, 3, 8])) for name in "xyz"
        }
        cap = chance.choice([20, 60])
        job = await open_job(None, max_credits=Decimal(cap))
        shown, cost, on_their_way = set[str](), 0.0, list[tuple[Row, str]]()
        for number in range(150):
            if on_their_way and chance.random() < 0.45:
                row, name = on_their_way.pop(chance.randrange(len(on_their_way)))
                if chance.random() < 0.2:
                    await job.ended(row, end_of(new_task(None, row.task_id), "failed"), at=at())
                    cost -= classes[name].used
                else:
                    await complete(job, row, classes[name].used)
                    shown.add(name)
            else:
                name = chance.choice("xyz")
                row = await entered(job, chance.choice([None, f"k{number}"]), number)
                # What is told for a request is never less than what the service will reserve for it, but maybe less
                # than it will use.
                reserved = max(0, classes[name].reserved or 0)
                told = chance.choice([None, None, None, Decimal(reserved), Decimal(reserved) + 2])
                if await intend(job, row, price=name, told=told) is None:
                    await accept(job, row, new_task(classes[name].reserved), at=at())
                    on_their_way.append((row, name))
                    cost += classes[name].used
                    grants += 1
                    if {name for _, name in on_their_way} <= shown:
                        assert cost <= cap or classes[name].used == 0, f"seed {seed}: {cost} of {cap}, {classes}"
                    over += cost > cap
        await job.aclose()
    assert grants > 5_000
    assert over > 50  # before that is known it may happen
