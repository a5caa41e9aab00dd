"""What cannot be written: nothing is sent for what was asked, nothing is lost of what was told."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import sqlite3
import sys
import threading
import warnings
from concurrent.futures import Executor
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
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
from loop_executor import in_loop
from postgres import is_postgres
from programs import ROOT

from evolink_async import ClosedError, ConfigurationError, LedgerError
from evolink_async.ledger import Entry, JobLedger, State, open_job
from evolink_async.ledger.job import Census

HERE = Path(__file__).parent
DISK_IS_FULL = "(disk is full|No space left on device)"


class FullDisk(sqlite3.Connection):
    """A connection whose disk is full as long as `begins` is set: statements that begin so fail, as SQLite has them."""

    begins: str | None = None

    def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
        self._fail(statement)
        return super().execute(statement, *args)

    def executemany(self, statement: str, *args: Any) -> sqlite3.Cursor:
        self._fail(statement)
        return super().executemany(statement, *args)

    def _fail(self, statement: str) -> None:
        if self.begins is not None and statement.startswith(self.begins):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error


@pytest.fixture(params=["INSERT INTO request", "UPDATE job", "COMMIT"])
def where(request: pytest.FixtureRequest) -> str:
    """Where in its transaction a turn finds the disk full."""
    point: str = request.param
    return point


@pytest.fixture
def _virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=FullDisk))


in_virtual_time = pytest.mark.usefixtures("_virtual")


class FullServer:
    """A database whose server finds its disk full at the same points, and says so itself."""

    RAISE = """
        CREATE OR REPLACE FUNCTION public.find_full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF EXISTS (SELECT FROM public.disk WHERE starts_with(TG_ARGV[0], begins)) THEN
                RAISE 'could not extend file "base/5/16384": No space left on device' USING ERRCODE = 'disk_full';
            END IF;
            RETURN NULL;
        END $$"""
    POINTS = (
        "TRIGGER a AFTER INSERT ON request FOR EACH STATEMENT EXECUTE FUNCTION find_full('INSERT INTO request')",
        "TRIGGER b AFTER UPDATE ON job FOR EACH STATEMENT EXECUTE FUNCTION find_full('UPDATE job')",
        "CONSTRAINT TRIGGER c AFTER UPDATE ON job DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
        "EXECUTE FUNCTION find_full('COMMIT')",
    )

    def __init__(self, url: str) -> None:
        self._url = url
        if not ask(url, "SELECT FROM pg_tables WHERE tablename = 'disk'"):
            ask(url, "CREATE TABLE public.disk (begins text)")
            ask(url, self.RAISE)
            for point in self.POINTS:
                ask(url, f"CREATE {point}")

    def __setattr__(self, name: str, value: str | None) -> None:
        super().__setattr__(name, value)
        if name == "begins":
            ask(self._url, "DELETE FROM public.disk")
            if value is not None:
                ask(self._url, "INSERT INTO public.disk VALUES (?)", value)


def disk_of(job: JobLedger, url: Path | str = "") -> Any:
    """Is full as long as its `begins` is set."""
    if is_postgres(url):
        return FullServer(str(url))
    assert job._turns is not None
    return job._turns._store._database._connection  # type: ignore[attr-defined]


@in_virtual_time
@pytest.mark.looptime
async def test_an_intent_that_cannot_be_written_has_not_happened(ledger_url: Path | str, where: str) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(10)) as job:
        row = await entered(job, "k")
        disk_of(job, ledger_url).begins = where
        with pytest.raises(LedgerError, match=f"{DISK_IS_FULL}.*make room"):
            await intend(job, row)
        assert (row.state, row.attempts, row.idempotency_key, job.free) == (State.ENTERED, 0, None, 10)
        assert job.broken is not None
        await asyncio.wait([job.posted_in_vain(row, sent=False)])  # who says so all the same does no harm
        assert (row.state, row.attempts, job.free) == (State.ENTERED, 0, 10)
        disk_of(job, ledger_url).begins = None
        assert await intend(job, row) is None
        assert (row.state, row.attempts, job.free) == (State.SENDING, 1, Decimal("7.5"))
        assert job.broken is None
        assert ask(path, "SELECT body FROM body") == [(b'{"model": "gpt-4o-image"}',)]
    assert_balanced(path)


@in_virtual_time
@pytest.mark.looptime
async def test_an_intent_that_cannot_be_written_has_not_happened_though_its_price_became_known(
    ledger_url: Path | str, where: str
) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(10)) as job:
        probe, other = await entered(job, "probe"), await entered(job, "other")
        disk_of(job, ledger_url).begins = where
        asked = [intend(job, probe, price="new", told=None), intend(job, other, price="new", told=Decimal(2))]
        for future in asked:
            with pytest.raises(LedgerError, match=DISK_IS_FULL):
                await future
        assert (probe.state, other.state, job.probe, job.free) == (State.ENTERED, State.ENTERED, None, 10)
        disk_of(job, ledger_url).begins = None
    assert_balanced(path)


@in_virtual_time
@pytest.mark.looptime
async def test_an_id_that_cannot_be_written_is_logged_kept_and_written_later(
    ledger_url: Path | str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = ledger_url
    async with opened(path) as job:
        row = await row_in(job, State.SENDING, "k")
        disk_of(job, ledger_url).begins = where
        task = new_task(task_id="task-that-is-paid")
        with pytest.raises(LedgerError, match=DISK_IS_FULL):
            await accept(job, row, task, at=at(1))
        assert (row.state, row.task_id, job.reserved) == (State.ACCEPTED, "task-that-is-paid", 2.5)
        assert "task task-that-is-paid was accepted for request k, and that is not in the ledger yet" in caplog.text
        job.ended(row, end_of(task, used=1), at=at(2))  # who only tells need not wait
        await asyncio.sleep(100)
        assert ask(path, "SELECT state FROM request") == [("sending",)]
        assert_balanced(path)
        disk_of(job, ledger_url).begins = None
        await asyncio.sleep(31)
        assert ask(path, "SELECT state, task_id, spent FROM request") == [("completed", "task-that-is-paid", 1_000_000)]
        assert "the ledger can be written again" in caplog.text
    assert_balanced(path)


@in_virtual_time
@pytest.mark.looptime
async def test_what_is_kept_is_tried_again_after_ever_longer_pauses(ledger_url: Path | str) -> None:
    loop = asyncio.get_running_loop()
    async with opened(ledger_url) as job:
        row = await row_in(job, State.SENDING, "k")
        store = job._turns._store  # type: ignore[union-attr]
        tries: list[float] = []
        original = store.carry_out
        begun = loop.time()

        def carried_out(batch: Any) -> Any:
            tries.append(loop.time() - begun)
            return original(batch)

        store.carry_out = carried_out  # type: ignore[method-assign]
        disk_of(job, ledger_url).begins = "COMMIT"
        accept(job, row, new_task(), at=at(1))
        await asyncio.sleep(100)
        assert tries == pytest.approx([0, 1, 3, 7, 15, 31, 61, 91], abs=0.1)
        disk_of(job, ledger_url).begins = None


@in_virtual_time
@pytest.mark.looptime
async def test_what_never_could_be_written_is_told_at_the_end_with_the_ids_of_what_runs(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path)
    row = await row_in(job, State.SENDING, "k")
    disk = disk_of(job, ledger_url)
    disk.begins = "INSERT"
    accept(job, row, new_task(task_id="task-unwritten"), at=at(1))
    with pytest.raises(LedgerError, match=r"(?s)1 requests could not be written.*task-unwritten"):
        await job.aclose()
    disk.begins = None
    async with opened(path) as job:  # the job is free, and knows what it knew
        known = await job.enter(entry("k", "k"))
        assert known.row.state is State.UNSETTLED
    assert_balanced(path)


@in_virtual_time
@pytest.mark.looptime
async def test_closing_writes_what_is_unwritten(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path)
    row = await row_in(job, State.SENDING, "k")
    disk_of(job, ledger_url).begins = "INSERT"
    accept(job, row, new_task(task_id="task-late"), at=at(1))
    await asyncio.sleep(0.5)
    disk_of(job, ledger_url).begins = None
    await job.aclose()
    assert ask(path, "SELECT task_id FROM request") == [("task-late",)]


@in_virtual_time
@pytest.mark.looptime
async def test_requests_that_cannot_be_entered_are_as_if_never_seen(ledger_url: Path | str, where: str) -> None:
    path = ledger_url
    async with opened(path) as job:
        await row_in(job, State.REJECTED, "old")
    async with opened(path) as job:
        disk_of(job, ledger_url).begins = where
        pulled = [entry("old", "put right"), entry(None, "x"), entry(None, "x"), entry("new")]
        with pytest.raises(LedgerError, match=DISK_IS_FULL):
            await enter_all(job, pulled)
        assert job.census == Census(known=1, new=0, changed=0, gone=1)
        disk_of(job, ledger_url).begins = None
        [old, x, x_again, new] = await enter_all(job, pulled)
        assert not any(known.repeated for known in (old, x, x_again, new))
        assert (x.row.identity[-2:], x_again.row.identity[-2:]) == ("-0", "-1")
        assert job.census == Census(known=1, new=3, changed=1, gone=0)
    assert len(ask(path, "SELECT * FROM request")) == 4
    assert ask(path, "SELECT requests FROM job") == [(4,)]


@in_virtual_time
@pytest.mark.looptime
async def test_a_new_try_and_a_replay_that_cannot_be_written_have_not_happened(
    ledger_url: Path | str, where: str
) -> None:
    path = ledger_url
    async with opened(path, max_credits=Decimal(10)) as job:
        failed = await row_in(job, State.FAILED, "failed")
        lost = await row_in(job, State.UNSETTLED, "lost")
        probe = await entered(job, "probe")
        disk_of(job, ledger_url).begins = where
        asked = [job.replay(lost), intend(job, failed), intend(job, probe, told=None, price="new")]
        assert [type(error) for error in await asyncio.gather(*asked, return_exceptions=True)] == [LedgerError] * 3
        assert (failed.state, failed.number, failed.past, failed.attempts) == (State.FAILED, 1, (), 1)
        assert failed.task is not None
        assert (lost.state, lost.replayed, lost.attempts, job.replays) == (State.UNSETTLED, False, 1, 0)
        assert (job.probe, job.reserved) == (None, 2.5)
        disk_of(job, ledger_url).begins = None
        assert await job.replay(lost)
        assert await intend(job, failed) is None
        assert failed.number == 2
    assert_balanced(path)
    assert ask(path, "SELECT number, state FROM past_try") == [(1, "failed")]


@in_virtual_time
@pytest.mark.looptime
async def test_what_a_replay_reserves_is_free_again_if_it_cannot_be_written(ledger_url: Path | str, where: str) -> None:
    path = ledger_url
    async with opened(path) as job:
        row = await entered(job, "k")
        await intend(job, row, price="new", told=None)
        await job.unsettled(row, code=None, error="cut")
    async with opened(path, max_credits=Decimal(10)) as job:
        row = (await job.enter(entry("k"))).row
        disk_of(job, ledger_url).begins = where
        with pytest.raises(LedgerError):
            await job.replay(row, price="new")
        assert (row.state, row.replayed, row.reserved) == (State.UNSETTLED, False, None)
        assert (job.probe, job.reserved, job.replays) == (None, 0, 0)
        disk_of(job, ledger_url).begins = None
        assert await job.replay(row, price="new") is True
        assert (job.probe, job.reserved, job.replays) == (row, 10, 1)
    assert_balanced(path)


@in_virtual_time
@pytest.mark.looptime
async def test_an_intent_that_was_followed_by_news_is_not_undone_with_its_turn(ledger_url: Path | str) -> None:
    """The news is a fact; what it came after no longer matters."""
    path = ledger_url
    async with opened(path) as job:
        row = await entered(job, "k")
        disk_of(job, ledger_url).begins = "COMMIT"
        asked = intend(job, row)
        told = accept(job, row, new_task(task_id="task-by-callback"), at=at(1))
        errors = await asyncio.gather(asked, told, return_exceptions=True)
        assert [type(error) for error in errors] == [LedgerError] * 2
        assert (row.state, row.task_id) == (State.ACCEPTED, "task-by-callback")
        disk_of(job, ledger_url).begins = None
    assert ask(path, "SELECT state FROM request") == [("accepted",)]


@in_virtual_time
@pytest.mark.looptime
async def test_the_bytes_on_disk_are_those_of_the_last_intent_after_one_that_failed(ledger_url: Path | str) -> None:
    path = ledger_url
    first, second = b'{"first": 1}', b'{"second": 2}'
    async with opened(path) as job:
        row = await entered(job, "k")
        await intend(job, row, body=first)
        await job.posted_in_vain(row, sent=False)
        disk_of(job, ledger_url).begins = "COMMIT"
        with pytest.raises(LedgerError):
            await intend(job, row, body=second)
        disk_of(job, ledger_url).begins = None
        await intend(job, row, body=first)
        assert ask(path, "SELECT body FROM body") == [(first,)]


@in_virtual_time
@pytest.mark.looptime
async def test_a_proof_that_keys_are_honoured_is_kept_too(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        disk_of(job, ledger_url).begins = "COMMIT"
        with pytest.raises(LedgerError):
            await job.keys_are_honoured()
        disk_of(job, ledger_url).begins = None
        await asyncio.sleep(2)
        assert ask(path, "SELECT keys_honoured FROM job") == [(1,)]


@in_virtual_time
@pytest.mark.looptime
async def test_what_was_learned_is_kept_too_and_the_latest_counts(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        disk = disk_of(job, ledger_url)
        disk.begins = "COMMIT"
        with pytest.raises(LedgerError, match=DISK_IS_FULL):
            await job.remember('"first"')
        disk.begins = None
        await asyncio.sleep(2)
        assert ask(path, "SELECT value FROM learned") == [('"first"',)]
        disk.begins = "COMMIT"
        second = job.remember('"second"')
        await asyncio.sleep(0)  # its turn is under way
        third = job.remember('"third"')
        with pytest.raises(LedgerError, match=DISK_IS_FULL):
            await second
        disk.begins = None
        assert await third
    async with opened(path) as job:
        assert job.learned == '"third"'


@in_virtual_time
@pytest.mark.looptime
async def test_a_fault_of_ours_in_the_thread_is_a_ledger_error_too(
    ledger_url: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(ledger_url) as job:
        row = await entered(job, "k")
        with monkeypatch.context() as patch:
            patch.setattr("evolink_async.ledger.store._micros", lambda moment: 1 // 0)
            with pytest.raises(LedgerError, match="inside this library: ZeroDivisionError"):
                await intend(job, row)
        assert await intend(job, row) is None


@in_virtual_time
@pytest.mark.looptime
async def test_a_file_that_becomes_newer_under_a_program_is_not_written_any_more(quick_path: Path) -> None:
    path = quick_path / "job.db"
    job = await open_job(path)
    row = await entered(job, "k")
    ask(path, "PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match="version 99"):
        await intend(job, row)
    with pytest.raises(LedgerError, match="version 99"):
        await job.aclose()
    assert ask(path, "SELECT state FROM request") == [("entered",)]


@in_virtual_time
@pytest.mark.looptime
async def test_a_file_that_is_damaged_under_a_program_says_so(quick_path: Path) -> None:
    path = quick_path / "job.db"
    job = await open_job(path)
    for number in range(50):
        await row_in(job, State.COMPLETED, f"k{number}")
    disk_of(job).execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    disk_of(job).execute("PRAGMA shrink_memory")
    with pytest.raises(LedgerError, match=r"damaged.*copy it away"):
        await enter_all(job, [entry(f"k{number}") for number in range(50)])
    with pytest.raises(LedgerError):
        await accept(job, await _living(job), new_task(), at=at())
    with pytest.raises(LedgerError, match="damaged"):
        await job.aclose()


async def _living(job: JobLedger) -> Any:
    from evolink_async.ledger.values import StoredRow, shared

    return StoredRow(10**15, "living", b"\0", shared("/v1/images/generations", "m"), State.SENDING)


async def test_a_fault_in_one_question_keeps_nobody_else_waiting(ledger_url: Path | str) -> None:
    no_bytes: Any = []
    wrong = Entry(None, no_bytes, "/v1/images/generations", "m")
    no_text: Any = []
    odd = Entry("odd", b"\0", no_text, "m")
    async with opened(ledger_url) as job:
        asked = [job.enter(wrong), job.enter(entry("k")), job.find("k")]
        fault, known, found = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(fault, LedgerError)
        assert known.row.identity == "k"
        assert found is known.row
        with pytest.raises(LedgerError, match="inside this library"):
            await job.enter(odd)
        assert await intend(job, known.row) is None


async def test_a_file_that_another_keeps_busy_is_waited_for_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolink_async.ledger.file.BUSY_SECONDS", 0.2)
    path = tmp_path / "job.db"
    async with opened(path) as job:
        row = await entered(job, "k")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerError, match="another process has kept it busy"):
                await intend(job, row)
            waiting = intend(job, row)
            other.execute("COMMIT")
        assert await waiting is None


async def test_a_wait_that_is_cancelled_takes_nothing_back(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        row = await entered(job, "k")

        async def waiting() -> None:
            await intend(job, row)

        waiter = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait([waiter])
        assert waiter.cancelled()
        assert row.state is State.SENDING
    assert ask(path, "SELECT state FROM request") == [("sending",)]


async def test_closing_that_is_cancelled_goes_on(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path)
    row = await row_in(job, State.SENDING, "k")
    accept(job, row, new_task(task_id="task-last"), at=at())
    closer = asyncio.create_task(job.aclose())
    await asyncio.sleep(0)
    closer.cancel()
    await asyncio.wait([closer])
    await job.aclose()
    assert ask(path, "SELECT task_id FROM request") == [("task-last",)]


async def test_opening_that_is_cancelled_leaves_the_job_free(ledger_url: Path | str) -> None:
    path = ledger_url
    for _ in range(5):
        opener = asyncio.create_task(open_job(path))
        await asyncio.sleep(0)
        opener.cancel()
        await asyncio.wait([opener])
        assert opener.cancelled()
    for _ in range(100):  # the thread of the last one may still be at it
        try:
            job = await open_job(path)
        except LedgerError:
            await asyncio.sleep(0.05)
        else:
            break
    await job.aclose()
    for thread in threading.enumerate():  # those of the others may still close what they have opened
        if thread.name.startswith("evolink ledger"):
            await asyncio.to_thread(thread.join, 30)
            assert not thread.is_alive()


async def test_after_the_end_nothing_can_be_told(place: Path | str | None) -> None:
    job = await open_job(place)
    row = await row_in(job, State.SENDING, "k")
    await job.aclose()
    await job.aclose()
    with pytest.raises(ClosedError, match="default"):
        accept(job, row, new_task(), at=at())
    with pytest.raises(ClosedError):
        job.enter(entry("k"))


async def test_a_ledger_is_bound_to_its_loop(ledger_url: Path | str) -> None:
    async with opened(ledger_url) as job:
        row = await entered(job, "k")

        async def elsewhere() -> None:
            with pytest.raises(ConfigurationError, match="event loop"):
                await intend(job, row)

        await asyncio.to_thread(asyncio.run, elsewhere())
        assert row.state is State.ENTERED


async def test_a_loop_that_ends_in_the_middle_of_a_turn_loses_nothing_and_leaves_the_job_free(
    ledger_url: Path | str,
) -> None:
    path = ledger_url

    async def cut_short() -> Executor:
        job = await open_job(path)
        row = await row_in(job, State.SENDING, "k")
        await accept(job, row, new_task(task_id="task-durable"), at=at())
        job.ended(row, end_of(new_task(task_id="task-durable")), at=at())
        assert job._turns is not None
        job._turns._begin()  # the turn is under way, and nobody is left to hear of it
        return job._turns._executor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # rightly: nobody has closed it
        thread = await asyncio.to_thread(asyncio.run, cut_short())
        thread.shutdown()
        gc.collect()
    async with opened(path) as job:
        known = await job.enter(entry("k", "k"))
        assert known.row.task_id == "task-durable"


async def test_a_disk_that_is_really_full_stops_the_sending_and_loses_no_id(tmp_path: Path) -> None:
    """A process of its own, in which no file may grow beyond a size until it says so."""
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "full_disk_program.py"),
        str(tmp_path / "job.db"),
        env={"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await program.communicate()
    assert program.returncode == 0
    told = json.loads(output)
    assert told["sent_before"] > 10
    assert told["sent_after_the_first_failure"] == 0
    assert told["kept"] >= 1
    async with opened(tmp_path / "job.db") as job:
        known = await enter_all(job, [entry(f"k{number}") for number in range(told["tried"])])
        accepted = {known_one.row.identity: known_one.row.task_id for known_one in known if known_one.row.task_id}
        assert accepted == told["accepted"]
        assert {known_one.row.state for known_one in known} == {State.ACCEPTED, State.ENTERED}
    assert_balanced(tmp_path / "job.db")
