"""Credits: what is reserved, spent and released, and that the cap holds."""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from ledger_world import (
    accept,
    assert_balanced,
    at,
    end_of,
    entered,
    entry,
    intend,
    kill,
    new_task,
    opened,
    row_in,
    sums_on_disk,
    task_of,
)
from loop_executor import in_loop

from evolink_async import BudgetExceededError
from evolink_async.ledger import Refusal, Row, State, open_job
from evolink_async.ledger.values import to_credits, to_micro
from evolink_async.types import Task


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)


@pytest.mark.parametrize(
    ("state", "reserved", "spent", "credits"),
    [
        (State.ENTERED, 0, 0, None),
        (State.SENDING, 3, 0, 3),
        (State.UNSETTLED, 3, 0, 3),
        (State.REPLAYING, 3, 0, 3),
        (State.ACCEPTED, 2.5, 0, 2.5),
        (State.COMPLETED, 0, 2.5, 2.5),
        (State.FAILED, 0, 0, 0),
        (State.CANCELLED, 2.5, 0, 2.5),
        (State.LOST, 2.5, 0, 2.5),
        (State.REJECTED, 0, 0, None),
        (State.GIVEN_UP, 3, 0, 3),
    ],
)
async def test_what_a_request_holds_follows_from_its_state(
    place: Path | str | None, state: State, reserved: float, spent: float, credits: float | None, monkeypatch: Any
) -> None:
    monkeypatch.setitem(row_in.__globals__, "intend", lambda job, row: intend(job, row, told=Decimal(3)))
    async with opened(place) as job:
        row = await row_in(job, state, "k")
        assert (job.reserved, job.spent, row.credits) == (reserved, spent, credits)
    if place is not None:
        assert sums_on_disk(place) == (reserved * 1e6, spent * 1e6) * 2


async def test_a_completed_task_costs_what_was_used_else_what_was_reserved(place: Path | str | None) -> None:
    async with opened(place) as job:
        used, reserved, silent = [await row_in(job, State.ACCEPTED, key) for key in "abc"]
        for row, end in ((used, 1.25), (reserved, None)):
            await job.ended(row, end_of(task_of(row), used=end), at=at())
        assert (job.spent, job.reserved) == (3.75, 2.5)
        nothing_told = await entered(job, "d")
        await intend(job, nothing_told, told=None, price=None)
        task = new_task(reserved=None)
        await accept(job, nothing_told, task, at=at())
        await job.ended(nothing_told, end_of(task), at=at())
        assert nothing_told.credits is None
        assert silent.credits == 2.5


async def test_a_post_in_vain_releases_what_it_held_but_not_while_an_earlier_one_is_in_doubt(
    place: Path | str | None,
) -> None:
    async with opened(place) as job:
        row = await row_in(job, State.SENDING, "k")
        await job.posted_in_vain(row, sent=False)
        assert (job.reserved, row.attempts, row.submitted_at) == (0, 0, None)
        await intend(job, row)
        await job.posted_in_vain(row, sent=True)  # 429
        assert (job.reserved, row.attempts) == (0, 1)
        await intend(job, row)
        await job.unsettled(row, code=None, error="cut")
        assert await job.replay(row)
        await job.posted_in_vain(row, sent=True)
        assert (row.state, job.reserved, row.submitted_at) == (State.UNSETTLED, 2.5, at())


async def test_the_user_s_word_releases_or_keeps(place: Path | str | None) -> None:
    async with opened(place) as job:
        gone, kept = [await row_in(job, State.UNSETTLED, key) for key in "ab"]
        await job.not_submitted(gone)
        await job.given_up(kept)
        assert (gone.state, gone.credits, kept.credits, job.reserved) == (State.ENTERED, None, 2.5, 2.5)
        await accept(job, gone, new_task(), at=at())  # he was wrong
        assert (gone.state, job.reserved) == (State.ACCEPTED, 5)


# The cap


async def test_nothing_goes_over_the_cap_and_the_refusal_says_what_is_left(place: Path | str | None) -> None:
    async with opened(place, max_credits=Decimal(6)) as job:
        rows = [await entered(job, key) for key in "abc"]
        assert [await intend(job, row) for row in rows[:2]] == [None, None]
        refusal = await intend(job, rows[2])
        assert refusal == Refusal(price=Decimal("2.5"), free=Decimal(1), cap=Decimal(6), probe=None)
        assert (rows[2].state, job.reserved, job.free) == (State.ENTERED, 5, 1)
        error = refusal.error()
        assert isinstance(error, BudgetExceededError)
        assert "2.5 credits" in str(error)
        assert "1 of max_credits=6" in str(error)
        # What comes back may be used.
        await job.rejected(rows[0], code=None, error="no")
        assert await intend(job, rows[2]) is None
        assert job.free == 1


async def test_the_cap_is_over_all_runs(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(6)) as job:
        await row_in(job, State.COMPLETED, "spent")
        await row_in(job, State.LOST, "kept")
    async with opened(path, max_credits=Decimal(6)) as job:
        assert job.free == 1
        assert await intend(job, await entered(job, "c")) is not None
    async with opened(path, max_credits=Decimal("7.5")) as job:
        assert await intend(job, await entered(job, "c")) is None


@pytest.mark.parametrize("spent", [0, 97.5])
async def test_a_hundred_coroutines_at_a_nearly_spent_budget_never_go_over(spent: float) -> None:
    """The seed of a round is its number."""
    for seed in range(200):
        chance = random.Random(seed)
        job = await open_job(None, max_credits=Decimal(100))
        if spent:
            row = await entered(job, "before")
            await intend(job, row, told=Decimal(str(spent)))
        most = Decimal(0)

        async def spend(number: int) -> None:
            nonlocal most
            row = await entered(job, f"k{number}")  # noqa: B023
            price = Decimal(chance.randrange(1, 30)) / 10  # noqa: B023
            await asyncio.sleep(0)
            if await intend(job, row, told=price) is None:  # noqa: B023
                most = max(most, job.reserved + job.spent)  # noqa: B023
                await asyncio.sleep(0)
                if chance.random() < 0.3:  # noqa: B023
                    await job.posted_in_vain(row, sent=True)  # noqa: B023
                    return
                task = new_task(float(price))
                await accept(job, row, task, at=at())  # noqa: B023
                await asyncio.sleep(0)
                end = chance.choice(["completed", "failed", "cancelled"])  # noqa: B023
                await job.ended(row, end_of(task, end), at=at())  # noqa: B023
            most = max(most, job.reserved + job.spent)  # noqa: B023

        await asyncio.gather(*(spend(number) for number in range(100)))
        assert most <= 100, f"seed {seed}"
        await job.aclose()


async def test_what_the_service_reserves_takes_the_place_of_the_estimate_even_above_the_cap(
    place: Path | str | None,
) -> None:
    async with opened(place, max_credits=Decimal(3)) as job:
        row = await entered(job, "k")
        await intend(job, row)
        await accept(job, row, new_task(5), at=at())  # a fact
        assert (job.reserved, job.free) == (5, -2)
        assert await intend(job, await entered(job, "b"), told=Decimal(0)) is not None


async def test_the_price_is_what_was_told_else_what_the_service_last_reserved(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(100)) as job:
        assert job.price_of("hd") is None
        row = await entered(job, "a")
        await intend(job, row, price="hd", told=Decimal(7))
        assert job.reserved == 7
        await accept(job, row, new_task(4), at=at())
        assert (job.reserved, job.price_of("hd")) == (4, 4)
        b = await entered(job, "b")
        await intend(job, b, price="hd", told=None)
        assert job.reserved == 8
    async with opened(path, max_credits=Decimal(100)) as job:
        assert job.price_of("hd") == 4
        await intend(job, await entered(job, "c"), price="hd", told=None)
        assert job.reserved == 12


# An unknown price


async def probing(job: Any, key: str = "probe") -> Row:
    row = await entered(job, key)
    assert await intend(job, row, price="new", told=None) is None
    return row


async def test_an_unknown_price_is_tried_by_one_request_alone(place: Path | str | None) -> None:
    async with opened(place, max_credits=Decimal(100)) as job:
        await row_in(job, State.COMPLETED, "before")
        probe = await probing(job)
        assert (job.probe, job.reserved, job.free) == (probe, Decimal("97.5"), 0)
        other = await entered(job, "other")
        for told in (None, Decimal(1)):
            refusal = await intend(job, other, price="new", told=told) if told is None else None
            refusal = refusal or await intend(job, other, price="known", told=Decimal(1))
            assert refusal is not None
            assert refusal.probe is probe
        assert "'probe'" in str(refusal.error())
        await accept(job, probe, new_task(4), at=at())
        assert (job.probe, job.reserved, job.price_of("new")) == (None, 4, 4)
        assert await intend(job, other, price="new", told=None) is None
        assert job.reserved == 8


@pytest.mark.parametrize("end", ["vain", "rejected", "failed", "completed"])
async def test_a_request_that_tries_a_price_makes_way_when_it_is_settled(place: Path | str | None, end: str) -> None:
    async with opened(place, max_credits=Decimal(100)) as job:
        probe = await probing(job)
        if end == "vain":
            await job.posted_in_vain(probe, sent=True)
        elif end == "rejected":
            await job.rejected(probe, code=None, error="no")
        else:
            task = new_task(reserved=None)
            await accept(job, probe, task, at=at())
            assert job.free == 0  # nobody has told the price yet
            await job.ended(probe, end_of(task, end, used=3 if end == "completed" else None), at=at())
        assert job.probe is None
        assert job.free == (97 if end == "completed" else 100)
        assert job.price_of("new") == (3 if end == "completed" else None)


async def test_an_unknown_cost_that_is_never_told_holds_all_that_was_left_until_the_price_is_told(
    ledger_url: Path | str,
) -> None:
    async with opened(ledger_url, max_credits=Decimal(100)) as job:
        probe = await probing(job)
        task = new_task(reserved=None)
        await accept(job, probe, task, at=at())
        await job.ended(probe, end_of(task), at=at())
        assert (job.spent, job.reserved, job.free) == (0, 100, 0)
        refusal = await intend(job, await entered(job, "other"), price="new", told=None)
        assert refusal is not None
        assert "'probe', whose price is not known and which is completed: tell the price" in str(refusal.error())
    async with opened(ledger_url, max_credits=Decimal(100)) as job:
        assert job.free == 0
        assert await intend(job, await entered(job, "other"), price="new", told=Decimal(4)) is None
        assert (job.probe, job.spent, job.reserved, job.free) == (None, 4, 4, 92)
    assert_balanced(ledger_url)
    async with opened(ledger_url, max_credits=Decimal(100)) as job:
        assert (await entered(job, "probe")).credits == 4


async def test_what_the_end_of_a_task_says_was_reserved_is_its_price_if_nobody_has_told_it_before(
    place: Path | str | None,
) -> None:
    async with opened(place, max_credits=Decimal(100)) as job:
        probe = await probing(job)
        task = new_task(reserved=None)
        await accept(job, probe, task, at=at())
        usage = {"usage": {"credits_reserved": 4}}
        await job.ended(probe, Task.model_validate(end_of(task).raw | usage), at=at())
        assert (job.probe, job.spent, job.reserved, job.price_of("new")) == (None, 4, 0, 4)


async def test_without_a_cap_an_unknown_price_holds_nobody_up(place: Path | str | None) -> None:
    async with opened(place) as job:
        await probing(job, "a")
        await probing(job, "b")
        assert (job.probe, job.reserved, job.free) == (None, 0, None)


async def test_a_price_that_cannot_be_learned_is_not_tried_under_a_cap(place: Path | str | None) -> None:
    async with opened(place, max_credits=Decimal(100)) as job:
        refusal = await intend(job, await entered(job, "k"), price=None, told=None)
        assert refusal is not None
        assert "not known yet" in str(refusal.error())


async def test_after_a_crash_a_told_price_frees_what_an_unsettled_probe_holds(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path, max_credits=Decimal(100))
    await probing(job)
    kill(job)
    async with opened(path, max_credits=Decimal(100)) as job:
        assert (job.free, job.probe and job.probe.state) == (0, State.UNSETTLED)
        b = await entered(job, "b")
        refusal = await intend(job, b, price="new", told=None)
        assert refusal is not None
        assert refusal.probe is job.probe
    async with opened(path, max_credits=Decimal(150)) as job:  # more credits make the price no better known
        b = await entered(job, "b")
        assert job.free == 50
        assert await intend(job, b, price="newer", told=None) is not None
    async with opened(path, max_credits=Decimal(100)) as job:
        b = await entered(job, "b")
        assert await intend(job, b, price="new", told=Decimal(4)) is None
        assert (job.probe, job.free) == (None, 92)
    assert_balanced(path)
    async with opened(path, max_credits=Decimal(100)) as job:
        probe = await job.enter(entry("probe"))
        assert (probe.row.credits, job.free) == (4, 92)


async def test_a_price_that_is_told_with_a_refused_request_is_written_all_the_same(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(10)) as job:
        await probing(job)
        assert await intend(job, await entered(job, "b"), price="new", told=Decimal(6)) is not None
        assert (job.probe, job.reserved) == (None, 6)
        for _ in range(10):  # the turn that nobody waits for
            await asyncio.sleep(0)
        assert sums_on_disk(path)[0] == 6_000_000
        assert_balanced(path)


async def test_after_a_crash_the_answer_of_a_probe_still_teaches_the_price(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path, max_credits=Decimal(100))
    await probing(job)
    kill(job)
    async with opened(path, max_credits=Decimal(100)) as job:
        probe = await job.enter(entry("probe"))
        assert await job.replay(probe.row)
        await accept(job, probe.row, new_task(4), at=at())
        assert (job.price_of("new"), job.free) == (4, 96)


async def test_what_was_sent_without_a_cap_at_an_unknown_price_has_to_fit_before_it_is_sent_again(
    ledger_url: Path | str,
) -> None:
    path = ledger_url
    async with opened(path) as job:
        for key in "abcd":
            row = await entered(job, key)
            await intend(job, row, price="new", told=None)
            await job.unsettled(row, code=None, error="cut")
        assert job.reserved == 0
    async with opened(path, max_credits=Decimal(10)) as job:
        await job.keys_are_honoured()
        a, b, c, d = [(await job.enter(entry(key))).row for key in "abcd"]
        assert await job.replay(a, price="new") is True
        assert (job.probe, job.reserved) == (a, 10)
        refusal = await job.replay(b, price="new")
        assert isinstance(refusal, Refusal)
        assert (refusal.probe, b.state, b.attempts) == (a, State.UNSETTLED, 1)
        await accept(job, a, new_task(4), at=at())
        assert await job.replay(b, price="new") is True
        assert (job.probe, job.reserved) == (None, 8)
        refusal = await job.replay(c, price="new")
        assert isinstance(refusal, Refusal)
        assert (refusal.price, refusal.free, refusal.probe) == (4, 2, None)
        assert await job.replay(d, price="new", told=Decimal(2)) is True
        assert job.free == 0
    assert_balanced(path)


# Replays


async def test_three_lost_responses_of_a_job_are_sent_again_before_the_proof(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        rows = [await row_in(job, State.UNSETTLED, key) for key in "abc"]
        assert [await job.replay(row) for row in rows] == [True, True, True]
        assert job.replays == 3
        await job.posted_in_vain(rows[2], sent=False)  # not one byte: its place is free
        assert (job.replays, rows[2].replayed) == (2, False)
        assert await job.replay(rows[2])
    async with opened(path) as job:
        assert (job.replays, job.keys_honoured) == (3, False)
        d = await row_in(job, State.UNSETTLED, "d")
        assert await job.replay(d) is False
        assert d.state is State.UNSETTLED
        await job.keys_are_honoured()
        assert await job.replay(d)
    async with opened(path) as job:
        assert (job.replays, job.keys_honoured) == (3, True)


async def test_one_request_is_sent_again_once_but_asked_for_as_often_as_it_takes(place: Path | str | None) -> None:
    async with opened(place) as job:
        row = await row_in(job, State.REPLAYING, "k")
        await job.posted_in_vain(row, sent=True)  # 429: the same replay goes on
        assert await job.replay(row)
        assert job.replays == 1
        await job.unsettled(row, code=None, error="cut again")
        assert await job.replay(row) is False
        asked = await row_in(job, State.SENDING, "asked")
        for _ in range(5):
            await job.unsettled(asked, code="paid_outcome_unknown", error="in progress", lost=False)
            assert await job.replay(asked)
        assert (job.replays, asked.losses, asked.attempts) == (1, 0, 6)


async def test_a_conflict_is_never_sent_again(place: Path | str | None) -> None:
    async with opened(place) as job:
        row = await row_in(job, State.SENDING, "k")
        await job.unsettled(row, code="idempotency_conflict", error="another body")
        assert await job.replay(row) is False
        assert job.replays == 0


# Amounts


@pytest.mark.parametrize(
    ("credits", "micro"),
    [("0", 0), ("2.5", 2_500_000), ("0.000001", 1), ("0.0000001", 1), ("-3", 0), ("1e30", 10**15)],
)  # fmt: skip
def test_credits_are_counted_in_millionths(credits: str, micro: int) -> None:
    assert to_micro(Decimal(credits)) == micro
    assert to_micro(to_credits(micro)) == micro


async def test_an_absurd_price_fits_into_the_file(ledger_url: Path | str) -> None:
    async with opened(ledger_url) as job:
        for key in "abc":
            row = await entered(job, key)
            await intend(job, row)
            await accept(job, row, new_task(1e14), at=at())
        assert job.reserved == 3 * 10**9
    assert_balanced(ledger_url)
