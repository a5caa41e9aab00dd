"""A ledger when its server or connection is not what it believes, and what PostgreSQL does not take."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from ledger_world import (
    accept,
    ask,
    assert_balanced,
    at,
    entered,
    entry,
    intend,
    new_task,
    opened,
    row_in,
)
from loop_executor import in_loop
from postgres import Postgres, database_of

from evolink_async import ConfigurationError, InvalidRequestError, LedgerError, open_ledger
from evolink_async.ledger import JobLedger, State, open_job
from evolink_async.ledger.file import FileDatabase
from evolink_async.ledger.places import ledger_place
from evolink_async.ledger.postgres import LONGEST_KEY, PostgresDatabase

# Stored, though the turn has failed


@pytest.fixture
def answers_are_lost(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As long as there is something in the list, whoever commits is not told."""
    lost: list[bool] = []
    original = FileDatabase.transaction

    @contextlib.contextmanager
    def transaction(self: FileDatabase) -> Iterator[None]:
        with original(self):
            yield
        if lost:
            raise LedgerError("no answer came")

    in_loop(monkeypatch)
    monkeypatch.setattr(FileDatabase, "transaction", transaction)
    return lost


@pytest.mark.looptime
@pytest.mark.parametrize("fails_again", [False, True])
async def test_a_request_whose_entering_failed_and_was_stored_all_the_same_is_entered_again(
    quick_path: Path, answers_are_lost: list[bool], fails_again: bool
) -> None:
    path = quick_path / "job.db"
    async with opened(path) as job:
        await row_in(job, State.ACCEPTED, "kept")
        answers_are_lost.append(True)
        with pytest.raises(LedgerError, match="no answer"):
            await entered(job, "a")
        assert ask(path, "SELECT count(*) FROM request") == [(2,)]
        if fails_again:
            with pytest.raises(LedgerError, match="no answer"):
                await entered(job, "b")
        answers_are_lost.clear()
        again = await entered(job, "a", "another body")
        assert (again.state, again.attempts) == (State.ENTERED, 0)
        assert ask(path, "SELECT id FROM request WHERE identity = 'a'") == [(again.id,)]  # type: ignore[attr-defined]
        assert await intend(job, again) is None
    assert_balanced(path)
    async with opened(path) as job:  # which checks the sums, the number of requests among them
        assert (job.census.known, job.interrupted) == (2, 1)


@pytest.mark.looptime
async def test_a_former_try_that_was_stored_though_its_turn_failed_is_stored_once(
    quick_path: Path, answers_are_lost: list[bool]
) -> None:
    path = quick_path / "job.db"
    async with opened(path) as job:
        row = await row_in(job, State.ACCEPTED, "k")
        answers_are_lost.append(True)
        with pytest.raises(LedgerError, match="no answer"):
            await accept(job, row, new_task(task_id="task-second"), at=at())
        answers_are_lost.clear()
    assert ask(path, "SELECT task_id FROM past_try") == [("task-second",)]
    assert_balanced(path)


# Connections


class HalfLost:
    """A relay before the server that loses the client's half of each connection: the server goes on believing in it."""

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[HalfLost]:
        async with await asyncio.start_server(self._accept, "127.0.0.1", 0) as listening:
            self.port = listening.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                for pair in self._pairs:
                    for writer in pair:
                        writer.transport.abort()
                await asyncio.gather(*self._pumps, return_exceptions=True)

    def lose(self) -> None:
        for client, _ in self._pairs:
            client.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._pairs.append((writer, server_writer))
        for source, target in ((reader, server_writer), (server_reader, writer)):
            self._pumps.add(asyncio.create_task(self._pump(source, target)))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                target.write(data)


async def test_a_connection_that_the_server_still_believes_in_keeps_its_own_job_from_nobody(
    postgres: Postgres, postgres_url: str
) -> None:
    async with (
        HalfLost(postgres).running() as relay,
        opened(postgres.url(database_of(postgres_url), port=relay.port)) as job,
    ):
        row = await row_in(job, State.SENDING, "k")
        relay.lose()
        assert await accept(job, row, new_task(task_id="task-1"), at=at())
        assert ask(postgres_url, "SELECT task_id FROM request") == [("task-1",)]
    assert_balanced(postgres_url)


def database_under(job: JobLedger) -> PostgresDatabase:
    assert job._turns is not None
    return job._turns._store._database  # type: ignore[attr-defined, no-any-return]


async def test_whoever_got_the_process_number_of_a_connection_that_was_cut_is_left_alone(
    postgres: Postgres, postgres_url: str
) -> None:
    """A server that was started again gives its numbers anew, also to who runs a job in another database."""
    other_url = postgres.create()
    async with opened(postgres_url) as job, opened(other_url) as other:
        row = await entered(job, "k")
        process = database_under(job)._server_process = database_under(other)._server_process
        assert postgres.cut(postgres_url)
        assert await intend(job, row) is None
        assert postgres.ask("SELECT count(*) FROM pg_stat_activity WHERE pid = ?", process) == [(1,)]
    postgres.drop(other_url)


async def test_a_connection_that_was_cut_in_a_rest_ends_no_job(postgres: Postgres, postgres_url: str) -> None:
    async with opened(postgres_url) as job, open_ledger(postgres_url) as ledger:
        first = await row_in(job, State.SENDING, "first")
        assert postgres.cut(postgres_url) == 2
        assert (await entered(job, "second")).state is State.ENTERED  # it is looked up first
        assert postgres.cut(postgres_url) >= 1
        assert await accept(job, first, new_task(), at=at())
        assert job.broken is None
        assert (await ledger.job().stats()).requests == 2
        with pytest.raises(LedgerError, match="in use by this process"):
            await open_job(postgres_url)


async def test_a_pooler_that_gives_each_transaction_another_connection_is_told_of_before_anything_is_written(
    postgres_url: str,
) -> None:
    job = await open_job(postgres_url)
    row = await entered(job, "k")
    assert job._turns is not None
    job._turns._store._database._server_process += 1  # type: ignore[attr-defined]
    with pytest.raises(LedgerError, match=r"pooler .*connect directly"):
        await intend(job, row)
    assert row.state is State.ENTERED
    assert ask(postgres_url, "SELECT state FROM request") == [("entered",)]
    with pytest.raises(LedgerError, match="pooler"):
        await job.aclose()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
async def test_a_ledger_that_is_open_is_of_no_use_in_a_forked_child(ledger_url: Path | str) -> None:
    async with opened(ledger_url):
        pass
    async with open_ledger(ledger_url) as ledger:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                ledger.jobs().send(None)
            except ConfigurationError:
                with contextlib.suppress(StopIteration):
                    ledger.__aexit__(None, None, None).send(None)  # and is left without waiting for anything
                    code = 2
                code = code - 1
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0  # noqa: ASYNC222
        assert await ledger.jobs() == ["default"]


# Keys


async def test_a_key_that_postgresql_cannot_keep_is_refused_and_a_file_takes_it(ledger_url: Path | str) -> None:
    async with opened(ledger_url) as job:
        for key in ("a\0b", "\N{PILE OF POO}" * (LONGEST_KEY // 4 + 1)):
            if isinstance(ledger_url, Path):
                assert (await entered(job, key)).key == key
            else:
                with pytest.raises(InvalidRequestError, match=r"^key: .* PostgreSQL") as caught:
                    job.enter(entry(key))
                assert caught.value.param == "key"
        longest = "\N{PILE OF POO}" * (LONGEST_KEY // 4)
        assert (await entered(job, longest)).key == longest
    assert_balanced(ledger_url)


# Names


@pytest.mark.parametrize(
    ("url", "shown", "has_secret"),
    [
        ("postgres://h", "postgresql://h/", False),
        (" POSTGRESQL://u:p%2Fw@h:1/d\n", "postgresql://u@h:1/d", True),
        ("postgresql:///d?host=/run/pg&password=x", "postgresql://%2Frun%2Fpg/d", True),
        ("postgresql://u@[::1]:5/d?sslmode=require&sslpassword=x", "postgresql://u@[::1]:5/d?sslmode=require", True),
        ("postgresql://a:1,b:2/d", "postgresql:///d?host=a%2Cb&port=1%2C2", False),
    ],
)
def test_a_server_is_shown_by_a_url_that_leads_there_and_has_no_secret(url: str, shown: str, has_secret: bool) -> None:
    place = ledger_place(url)
    assert (str(place), place.has_secret) == (shown, has_secret)  # type: ignore[union-attr]
    assert str(ledger_place(shown)) == shown
    assert "p/w" not in repr(place)
    assert "p%2Fw" not in repr(place)


@pytest.mark.parametrize(
    "url",
    ["postgresql:/u:secret@h/d", Path("postgresql://u:secret@h/d"), "postgresql://u:secret@h/d\0", "postgres://h:x"],
)
def test_what_is_nearly_a_url_is_never_taken_for_a_file(url: Path | str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ledger_place(url)
    assert "secret" not in str(caught.value)


async def test_a_host_that_is_no_name_is_told_as_one_that_cannot_be_reached() -> None:
    with pytest.raises(LedgerError, match=r"postgresql://a\.\.b/d cannot be reached"):
        await open_job("postgresql://:secret@a..b/d")
