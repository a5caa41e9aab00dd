"""A ledger in PostgreSQL whose connection is lost: at a commit, before it, after it; or while another takes the job."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from decimal import Decimal

import pytest
from book_service import BookService
from cutting import Cutter, cutting
from ledger_world import (
    accept,
    ask,
    assert_balanced,
    at,
    end_of,
    enter_all,
    entered,
    entry,
    intend,
    new_task,
    opened,
    row_in,
)
from pooler import pooling
from postgres import Postgres, database_of
from small_pool import SmallPool
from test_ledger_pool_part import FAULTS, judge

from evolink_async import LedgerError, open_ledger
from evolink_async.ledger import JobLedger, State, database, open_job
from evolink_async.ledger.database import PAUSES_WHEN_LOST

SEEDS = int(os.environ.get("LEDGER_CUT_SEEDS", "2"))

# Where a turn is cut: words, and whether the last of them is carried out.
CUTS = {
    "nothing is committed": (["COMMIT"], False),
    "the answer to the commit is lost": (["COMMIT"], True),
    "it is committed, and what is looked up is not": (["COMMIT", "LEFT JOIN result"], False),
}


@pytest.fixture
async def cutter(postgres: Postgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cutter]:
    async with cutting(postgres, postgres_url, monkeypatch) as cutter:
        yield cutter


@pytest.fixture(params=CUTS)
def cut(request: pytest.FixtureRequest, cutter: Cutter) -> Callable[[], None]:
    words, carried_out = CUTS[request.param]
    return lambda: cutter.cut_at(*words, carried_out=carried_out)


async def written(job: JobLedger) -> None:
    """Everything that was kept is in the ledger."""
    async with asyncio.timeout(20):
        while job.broken is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_what_was_entered_in_a_turn_that_was_cut_is_entered_once(
    cutter: Cutter, postgres_url: str, cut: Callable[[], None]
) -> None:
    pulled = [entry("a"), entry(None, "x"), entry(None, "x"), entry("b", "body")]
    async with opened(cutter.url) as job:
        await row_in(job, State.COMPLETED, "before")
        first = enter_all(job, pulled)
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # they are looked up; now they are written, and others are looked up in the same turn
        cut()
        more = enter_all(job, [entry("never again")])
        results = await asyncio.gather(first, more, return_exceptions=True)
        assert cutter.cuts == 1
        assert any(isinstance(result, LedgerError) for result in results)
        await written(job)
        known = await enter_all(job, [entry("b", "another body"), entry("a"), entry(None, "x"), entry(None, "x")])
        assert {one.row.state for one in known} == {State.ENTERED}
        assert job.census.gone == 0
        count = len(ask(postgres_url, "SELECT FROM request"))
    assert_balanced(postgres_url)
    assert ask(postgres_url, "SELECT requests FROM job") == [(count,)]
    async with opened(postgres_url) as job:  # which checks all sums
        assert job.census.known == count


async def test_an_intent_that_was_cut_has_not_happened_and_leaves_nothing_that_a_next_run_would_take_for_sent(
    cutter: Cutter, postgres_url: str
) -> None:
    for carried_out in (False, True):
        async with opened(cutter.url, max_credits=Decimal(100)) as job:
            row = await entered(job, f"k{carried_out}")
            free = job.free
            cutter.cut_at("COMMIT", carried_out=carried_out)
            with pytest.raises(LedgerError):
                await intend(job, row)
            assert (row.state, row.attempts, job.free) == (State.ENTERED, 0, free)
            [(state,)] = ask(postgres_url, "SELECT state FROM request WHERE identity = ?", row.identity)
            assert state == ("sending" if carried_out else "entered")
            await written(job)
            [(state,)] = ask(postgres_url, "SELECT state FROM request WHERE identity = ?", row.identity)
            assert state == "entered"
            assert await intend(job, row) is None
            await accept(job, row, new_task(), at=at(1))
        assert_balanced(postgres_url)
    assert cutter.cuts == 2


async def test_an_id_that_was_told_when_the_connection_was_cut_is_kept_and_written(
    cutter: Cutter, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(cutter.url) as job:
        for carried_out in (False, True):
            row = await row_in(job, State.SENDING, f"k{carried_out}")
            cutter.cut_at("COMMIT", carried_out=carried_out)
            with pytest.raises(LedgerError):
                await accept(job, row, new_task(task_id=f"task-{carried_out}"), at=at(1))
            assert row.task_id == f"task-{carried_out}"
            await written(job)
            assert ask(postgres_url, "SELECT state FROM request WHERE task_id = ?", row.task_id) == [("accepted",)]
    assert "task task-True was accepted for request kTrue, and that is not in the ledger yet" in caplog.text
    assert "the ledger can be written again" in caplog.text
    assert_balanced(postgres_url)


@pytest.mark.parametrize("carried_out", [False, True])
async def test_former_tries_and_second_tasks_are_on_record_once_though_their_turn_was_cut(
    cutter: Cutter, postgres_url: str, carried_out: bool
) -> None:
    async with opened(cutter.url, max_credits=Decimal(100)) as job:
        failed, twice = await row_in(job, State.FAILED, "failed"), await row_in(job, State.ACCEPTED, "twice")
        cutter.cut_at("COMMIT", carried_out=carried_out)
        told = [intend(job, failed), accept(job, twice, new_task(task_id="task-second"), at=at(5))]
        errors = await asyncio.gather(*told, return_exceptions=True)
        assert [type(error) for error in errors] == [LedgerError] * 2
        assert (failed.state, failed.number, failed.past) == (State.FAILED, 1, ())
        await written(job)
        assert_balanced(postgres_url)
        assert ask(postgres_url, "SELECT task_id FROM past_try WHERE state = 'accepted'") == [("task-second",)]
        assert await intend(job, failed) is None
        await accept(job, failed, new_task(), at=at(6))
        await job.ended(twice, end_of(new_task(task_id=twice.task_id)), at=at(7))
    assert_balanced(postgres_url)
    async with opened(postgres_url) as job:
        [failed, twice] = [
            known.row for known in await enter_all(job, [entry("failed", "failed"), entry("twice", "twice")])
        ]
        assert [past.state for past in failed.past] == ["failed"]
        assert [past.task_id for past in twice.past] == ["task-second"]


async def test_what_was_kept_while_the_server_cannot_be_reached_is_written_when_it_can(
    cutter: Cutter, postgres_url: str
) -> None:
    async with opened(cutter.url) as job:
        row = await row_in(job, State.SENDING, "k")
        await cutter.proxy.disable()
        with pytest.raises(LedgerError):
            await accept(job, row, new_task(task_id="task-kept"), at=at(1))
        await asyncio.sleep(0.3)
        assert ask(postgres_url, "SELECT state FROM request") == [("sending",)]
        await cutter.proxy.enable()
        await written(job)
        assert ask(postgres_url, "SELECT state, task_id FROM request") == [("accepted", "task-kept")]
        other = await entered(job, "other")
        assert await intend(job, other) is None
    assert_balanced(postgres_url)


@pytest.fixture
def patience(cutter: Cutter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is lost is waited for, as it is outside of the other tests here."""
    monkeypatch.setattr(database, "PAUSES_WHEN_LOST", PAUSES_WHEN_LOST)


@pytest.mark.usefixtures("patience")
async def test_a_turn_that_is_cut_is_carried_out_again_and_nobody_hears_of_it(
    cutter: Cutter, cut: Callable[[], None], postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(cutter.url) as job:
        row = await row_in(job, State.ACCEPTED, "k")
        first = await entered(job, "a")
        cut()
        refusal, _, second = await asyncio.gather(
            intend(job, first),
            accept(job, row, new_task(task_id="task-second"), at=at(1)),  # there are two tasks for it now
            job.enter(entry("b")),
        )
        assert cutter.cuts == 1
        assert refusal is job.broken is None
        assert await intend(job, second.row) is None
    states = ask(postgres_url, "SELECT identity, state FROM request ORDER BY id")
    assert states == [("k", "accepted"), ("a", "sending"), ("b", "sending")]
    assert ask(postgres_url, "SELECT task_id FROM past_try") == [("task-second",)]
    assert_balanced(postgres_url)
    assert {getattr(record, "event", None) for record in caplog.records}.isdisjoint({"ledger_lost", "ledger_unwritten"})


@pytest.mark.usefixtures("patience")
async def test_a_server_that_is_started_again_is_waited_for(
    cutter: Cutter, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(cutter.url) as job:
        row = await row_in(job, State.SENDING, "k")
        await cutter.proxy.disable()
        accepted = accept(job, row, new_task(task_id="task-1"), at=at(1))
        await asyncio.sleep(0.5)
        assert not accepted.done()
        await cutter.proxy.enable()
        assert await accepted
        assert job.broken is None
    assert ask(postgres_url, "SELECT state, task_id FROM request") == [("accepted", "task-1")]
    events = [getattr(record, "event", None) for record in caplog.records]
    assert events.count("ledger_lost") == 1
    assert "ledger_unwritten" not in events


async def test_what_never_could_be_written_is_told_at_the_end_and_the_job_is_free(
    cutter: Cutter, postgres_url: str
) -> None:
    job = await open_job(cutter.url)
    row = await row_in(job, State.SENDING, "k")
    await cutter.proxy.disable()
    accept(job, row, new_task(task_id="task-unwritten"), at=at(1))
    with pytest.raises(LedgerError, match=r"(?s)1 requests could not be written.*task-unwritten"):
        await job.aclose()
    async with opened(postgres_url) as job:
        assert (await job.enter(entry("k", "k"))).row.state is State.UNSETTLED


async def test_a_run_that_the_server_has_cut_goes_on_and_still_has_the_job(
    postgres: Postgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolink_async.ledger.turns._FIRST_PAUSE", 0.05)
    async with opened(postgres_url) as job:
        row = await row_in(job, State.SENDING, "k")
        assert postgres.cut(postgres_url)
        await asyncio.gather(accept(job, row, new_task(), at=at(1)), return_exceptions=True)
        await written(job)
        assert ask(postgres_url, "SELECT state FROM request") == [("accepted",)]
        with pytest.raises(LedgerError, match="in use by this process"):
            await open_job(postgres_url)


async def test_a_connection_that_was_cut_while_nothing_was_done_is_made_anew_and_nobody_hears_of_it(
    postgres: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a firewall in a long rest, or by a restart of the server."""
    async with opened(postgres_url) as job, open_ledger(postgres_url) as ledger:
        row = await entered(job, "k")
        assert await ledger.jobs() == ["default"]
        postgres.crash()
        postgres.start()
        assert await intend(job, row) is None
        assert await ledger.jobs() == ["default"]
        with pytest.raises(LedgerError, match="in use by this process"):
            await open_job(postgres_url)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert_balanced(postgres_url)


# Another takes the job


async def test_who_was_cut_off_while_another_took_the_job_writes_and_sends_nothing_any_more(
    cutter: Cutter, postgres_url: str
) -> None:
    first = await open_job(cutter.url)
    sent, unsent = await row_in(first, State.SENDING, "sent"), await entered(first, "unsent", "unsent")
    await cutter.proxy.disable()  # it does not know
    async with opened(postgres_url) as second:
        assert second.interrupted == 1
        await cutter.proxy.enable()
        before = ask(postgres_url, "SELECT * FROM request ORDER BY id"), ask(postgres_url, "SELECT * FROM job")
        with pytest.raises(LedgerError):
            await intend(first, unsent)
        assert unsent.state is State.ENTERED
        with pytest.raises(LedgerError):
            await accept(first, sent, new_task(task_id="task-of-the-first"), at=at(1))
        await asyncio.sleep(0.3)  # it is tried again, in vain
        assert first.broken is not None
        assert before == (
            ask(postgres_url, "SELECT * FROM request ORDER BY id"),
            ask(postgres_url, "SELECT * FROM job"),
        )
        [known] = await enter_all(second, [entry("unsent", "unsent")])
        assert await intend(second, known.row) is None
        await accept(second, known.row, new_task(task_id="task-of-the-second"), at=at(2))
    # The second has ended, and the job is free: but what the first remembers is not true any more.
    with pytest.raises(LedgerError, match="another process"):
        await intend(first, unsent)
    async with opened(postgres_url) as third:  # and it keeps nobody from the job
        assert third.run == 3
    with pytest.raises(LedgerError, match=r"task-of-the-first"):
        await first.aclose()
    assert ask(postgres_url, "SELECT identity, task_id FROM request ORDER BY id") == [
        ("sent", None),
        ("unsent", "task-of-the-second"),
    ]
    assert_balanced(postgres_url)


async def test_a_run_whose_name_is_no_longer_in_the_job_s_row_writes_nothing(postgres_url: str) -> None:
    """As behind a pooler that lets two processes have the same lock."""
    job = await open_job(postgres_url)
    row = await entered(job, "k")
    [(holder,)] = ask(postgres_url, "SELECT holder FROM job")
    ask(postgres_url, "UPDATE job SET holder = ?", holder[:-3] + 'x"}')
    with pytest.raises(LedgerError, match="another process"):
        await intend(job, row)
    async with opened(postgres_url) as other:  # it keeps nobody from the job
        assert other.run == 2
    assert ask(postgres_url, "SELECT state FROM request") == [("entered",)]
    with pytest.raises(LedgerError, match="another process"):
        await job.aclose()


# Many cuts


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_job_that_is_cut_again_and_again_ends_with_the_money_of_the_book(
    cutter: Cutter, postgres_url: str, seed: int
) -> None:
    chance = random.Random(seed)
    service = BookService(random.Random(seed), honours=True, faults=FAULTS)
    names = [f"r{number}" for number in range(20)]
    for _ in range(40):
        words, last = ["COMMIT"] * chance.randrange(1, 12), chance.choice(["COMMIT", "LEFT JOIN result", "INSERT INTO"])
        cutter.cut_at(*words, last, carried_out=last == "COMMIT" and chance.random() < 0.6)
        try:
            job = await open_job(cutter.url)
        except LedgerError:
            continue
        try:
            outcomes = await SmallPool(job, service, retry_failed=1).run(names, workers=3)
        except LedgerError:
            await written(job)
            await job.aclose()
            assert_balanced(postgres_url)
        else:
            await job.aclose()
            break
    else:
        raise AssertionError("it never came to its end")
    assert cutter.cuts
    await judge(postgres_url, service, names, outcomes, f"seed {seed}")


# Poolers


async def test_behind_a_pooler_of_transactions_no_job_is_begun_and_it_is_said_why(
    postgres: Postgres, postgres_url: str
) -> None:
    async with pooling(postgres_url) as port:
        pooled = postgres.url(database_of(postgres_url), port=port)
        for _ in range(3):  # for the first time it makes the ledger
            with pytest.raises(LedgerError, match=r"a pooler gives each transaction another connection.*directly"):
                await open_job(pooled)
    async with opened(postgres_url) as job:  # and what it left behind is no hindrance
        assert job.run == 1
