"""A ledger in PostgreSQL: who may make it, what is refused, and what is said of it, in which no password is."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from ledger_world import (
    accept,
    ask,
    assert_balanced,
    at,
    enter_all,
    entered,
    entry,
    intend,
    new_task,
    opened,
    row_in,
)
from postgres import USER, Postgres, database_of, passwords
from programs import ROOT

from evolink_async import ConfigurationError, LedgerError, open_ledger
from evolink_async.ledger import State, checked_job, open_job
from evolink_async.types import Task


@contextlib.contextmanager
def refused(match: str, kind: type[Exception] = LedgerError) -> Iterator[None]:
    """It is refused with these words, and nothing that is said of it holds a password."""
    with pytest.raises(kind, match=f"(?s){match}") as caught:
        yield
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(caught.value.__cause__)
    assert not [password for password in passwords if password in told]


# What names a server


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "POSTGRESQL"])
async def test_a_url_of_any_usual_spelling_names_a_ledger(postgres_url: str, scheme: str) -> None:
    url = scheme + postgres_url[postgres_url.index("://") :]
    async with opened(url) as job:
        await row_in(job, State.COMPLETED, "k")
    async with open_ledger(url) as ledger:
        assert await ledger.jobs() == ["default"]


@pytest.mark.parametrize(
    "rest", ["me:SECRET@[host/db", "me:SEC%ZZRET@host/db", "me:SEC%00RET@host/db", "me:SECRET@host/db?no_such=1"]
)
def test_a_url_that_can_be_none_is_a_configuration_error_that_does_not_show_it(rest: str) -> None:
    for begin in (open_ledger, lambda url: checked_job(url, "default")):
        with pytest.raises(ConfigurationError, match="postgresql://") as caught:
            begin(f"postgresql://{rest}")
        told = "".join(traceback.format_exception(caught.value))
        assert "SECRET" not in told
        assert "SEC%" not in told


async def test_without_the_extra_the_ledger_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "psycopg" or name.startswith("psycopg.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=r"pip install .evolink-async\[cluster\]"):
        await open_job("postgresql://me@host/db")
    with pytest.raises(ConfigurationError, match=r"pip install .evolink-async\[cluster\]"):
        open_ledger("postgresql://me@host/db")


def test_nothing_of_postgresql_is_loaded_for_a_file() -> None:
    importlib.import_module("evolink_async.ledger.store")
    program = (
        "import sys, evolink_async.ledger.store, evolink_async.ledger.reports; assert 'psycopg' not in sys.modules"
    )
    assert os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", program], {"PYTHONPATH": str(ROOT)}) == 0


async def test_a_ledger_is_shown_with_all_but_its_secrets(postgres_url: str, postgres: Postgres) -> None:
    shown = f"postgresql://{USER}@127.0.0.1:{postgres.port}/{database_of(postgres_url)}"
    async with opened(postgres_url) as job, open_ledger(postgres_url) as ledger:
        assert shown in repr(ledger)
        assert not [password for password in passwords if password in f"{job!r} {vars(job)} {ledger!r} {vars(ledger)}"]
        with refused(f"{shown}.*in use by this process"):
            await open_job(postgres_url)
    options = f"user={USER}&password={quote(postgres.password, safe='')}"
    in_query = f"postgresql://127.0.0.1:{postgres.port}/{database_of(postgres_url)}?{options}"
    async with opened(in_query), open_ledger(in_query) as ledger:
        assert "canary" not in repr(ledger)


async def test_the_password_may_come_from_the_environment_and_the_server_from_a_socket(
    postgres_url: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    folder = quote(str(postgres.folder), safe="")
    for url in (
        f"postgresql://{USER}@127.0.0.1:{postgres.port}/{database_of(postgres_url)}",
        f"postgresql://{USER}@{folder}:{postgres.port}/{database_of(postgres_url)}",
        f"postgresql:///{database_of(postgres_url)}?host={folder}&port={postgres.port}&user={USER}",
    ):
        async with opened(url) as job:
            await row_in(job, State.COMPLETED, "k") if job.run == 1 else None
            assert job.census.known == min(job.run - 1, 1)


# What cannot be had


async def test_a_server_that_cannot_be_reached_is_one_sentence(unused_port: int, postgres: Postgres) -> None:
    with refused(rf"127\.0\.0\.1:{unused_port}/db.*refused"):
        await open_job(postgres.url("db", port=unused_port))
    with refused(r"no\.such\.host\.invalid"):
        await open_job("postgresql://me@no.such.host.invalid/db")


async def test_a_wrong_password_and_a_database_that_is_not_there_are_said(
    postgres: Postgres, postgres_url: str
) -> None:
    with refused("password"):
        await open_job(postgres_url.replace(quote(postgres.password, safe=""), "wrong"))
    with refused("no_such_database"):
        await open_job(postgres.url("no_such_database"))
    with refused("password"):  # none at all
        await open_job(f"postgresql://{USER}@127.0.0.1:{postgres.port}/postgres")


@pytest.fixture
def roles(postgres: Postgres, postgres_url: str) -> Iterator[Any]:
    """Gives the URL of a user who may do nothing but what is granted."""
    made: list[str] = []

    def role(*grants: str) -> str:
        name = f"{database_of(postgres_url)}_{len(made)}"
        made.append(name)
        postgres.ask(f"CREATE ROLE {name} LOGIN PASSWORD '{postgres.password}'")
        for grant in grants:
            postgres.ask(f"GRANT {grant} TO {name}", database=database_of(postgres_url))
        return postgres_url.replace(f"//{USER}:", f"//{name}:")

    yield role
    for name in made:
        postgres.ask(f"DROP OWNED BY {name}", database=database_of(postgres_url))
        postgres.ask(f"DROP ROLE {name}")


async def test_who_may_not_make_a_schema_is_told_what_to_grant(postgres_url: str, roles: Any) -> None:
    url = roles()
    with refused("(?i)GRANT CREATE ON DATABASE"):
        await open_job(url)
    url = roles(f"CREATE ON DATABASE {database_of(postgres_url)}")
    async with opened(url) as job:
        await row_in(job, State.COMPLETED, "k")
    assert_balanced(postgres_url)


async def test_a_schema_that_was_made_beforehand_and_is_empty_is_taken(postgres_url: str, roles: Any) -> None:
    ask(postgres_url, "CREATE SCHEMA evolink_async")
    url = roles("USAGE, CREATE ON SCHEMA evolink_async")
    async with opened(url) as job:
        await row_in(job, State.COMPLETED, "k")


async def test_who_may_write_to_the_tables_can_run_jobs_of_a_ledger_that_is_there(
    postgres: Postgres, postgres_url: str, roles: Any
) -> None:
    async with opened(postgres_url, "made"):
        pass
    tables = "ALL TABLES IN SCHEMA evolink_async"
    url = roles("USAGE ON SCHEMA evolink_async", f"SELECT, INSERT, UPDATE, DELETE ON {tables}")
    async with opened(url, "mine") as job:
        for state in State:
            await row_in(job, state, state.value)
        postgres.cut(postgres_url)
        await row_in(job, State.COMPLETED, "after it was cut")
    async with open_ledger(url) as ledger:
        await ledger.job("mine").resolve("unsettled", submitted=False)
    assert_balanced(postgres_url, "mine")


async def test_who_may_only_read_can_look(postgres_url: str, roles: Any) -> None:
    async with opened(postgres_url) as job:
        await row_in(job, State.UNSETTLED, "k")
    url = roles("USAGE ON SCHEMA evolink_async", "SELECT ON ALL TABLES IN SCHEMA evolink_async")
    async with open_ledger(url) as ledger:
        assert (await ledger.job().stats()).requests == 1
        assert [request.identity for request in await ledger.job().unknown()] == ["k"]
        assert [row.identity async for row in ledger.job().rows()] == ["k"]
        assert await ledger.job().costs()
        with refused("permission denied"):
            await ledger.job().resolve("k", give_up=True)
    with refused("permission denied"):
        await open_job(url)
    with refused("permission denied"):
        async with open_ledger(roles()) as ledger:
            await ledger.job().stats()


async def test_a_server_that_takes_no_writes_is_said_to_be_no_place_for_a_job(
    postgres: Postgres, postgres_url: str
) -> None:
    """As a standby does."""
    async with opened(postgres_url) as job:
        await row_in(job, State.UNSETTLED, "k")
    postgres.ask(f"ALTER DATABASE {database_of(postgres_url)} SET default_transaction_read_only = on")
    with refused("read-only"):
        await open_job(postgres_url)
    async with open_ledger(postgres_url) as ledger:
        assert (await ledger.job().stats()).requests == 1


async def test_when_all_connections_are_taken_it_is_said_so(postgres: Postgres, postgres_url: str) -> None:
    postgres.ask(f"ALTER DATABASE {database_of(postgres_url)} CONNECTION LIMIT 0")
    name = f"{database_of(postgres_url)}_few"
    postgres.ask(f"CREATE ROLE {name} LOGIN PASSWORD '{postgres.password}'")
    try:
        with refused("too many connections"):
            await open_job(postgres_url.replace(f"//{USER}:", f"//{name}:"))
    finally:
        postgres.ask(f"DROP ROLE {name}")


# What is refused


async def test_looking_at_a_ledger_that_is_not_there_makes_none(postgres_url: str) -> None:
    with refused("no ledger"):
        async with open_ledger(postgres_url):
            pass
    assert ask(postgres_url, "SELECT to_regnamespace('evolink_async')") == [(None,)]


@pytest.mark.parametrize(
    "table", ["version (v text)", "version (version text)", "job (id bigint)", "other (id bigint)"]
)
async def test_a_schema_of_that_name_that_is_no_ledger_is_refused_and_left_alone(postgres_url: str, table: str) -> None:
    ask(postgres_url, "CREATE SCHEMA evolink_async")
    ask(postgres_url, f"CREATE TABLE evolink_async.{table}")
    with refused("no ledger"):
        await open_job(postgres_url)
    with refused("no ledger"):
        async with open_ledger(postgres_url):
            pass
    assert ask(postgres_url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'evolink_async'") == [(1,)]


async def test_a_newer_ledger_is_refused_with_what_to_do(postgres_url: str) -> None:
    async with opened(postgres_url) as job:
        row = await entered(job, "k")
        ask(postgres_url, "UPDATE version SET version = 99")
        with refused("version 99.*install a newer"):  # under a program too
            await intend(job, row)
        ask(postgres_url, "UPDATE version SET version = 3")
        assert await intend(job, row) is None
        await accept(job, row, new_task(), at=at())
    ask(postgres_url, "UPDATE version SET version = 99")
    with refused("version 99.*install a newer"):
        await open_job(postgres_url)
    with refused("version 99.*install a newer"):
        async with open_ledger(postgres_url):
            pass


@pytest.mark.parametrize(
    "spoilt",
    [
        "UPDATE job SET reserved = reserved + 1",
        "UPDATE request SET spent = 5 WHERE identity = 'a'",
        "DELETE FROM request WHERE identity = 'b'",
        "UPDATE job SET requests = 1",
        "DELETE FROM job",
    ],
)
async def test_a_ledger_whose_sums_are_wrong_is_refused(postgres_url: str, spoilt: str) -> None:
    async with opened(postgres_url) as job:
        for key in "ab":
            await row_in(job, State.COMPLETED, key)
    ask(postgres_url, spoilt)
    with refused("damaged"):
        await open_job(postgres_url)


@pytest.mark.parametrize("spoilt", ["state = 'complexed'", "submitted_at = 1::bigint << 62", "task_id = NULL"])
async def test_a_row_that_makes_no_sense_is_a_damage_too(postgres_url: str, spoilt: str) -> None:
    async with opened(postgres_url) as job:
        await row_in(job, State.ACCEPTED, "k")
    ask(postgres_url, f"UPDATE request SET {spoilt}")
    async with opened(postgres_url) as job:
        with refused("damaged"):
            await job.enter(entry("k", "k"))


async def test_a_database_whose_letters_are_not_unicode_is_refused(postgres: Postgres) -> None:
    name = "test_latin"
    postgres.ask(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    try:
        with refused("LATIN1.*UTF8"):
            await open_job(postgres.url(name))
    finally:
        postgres.drop(postgres.url(name))


async def test_texts_are_compared_by_their_bytes_whatever_the_rules_of_the_database(postgres_url: str) -> None:
    """Identities of one content are a range of texts: "-" and "." must stand beside each other."""
    async with opened(postgres_url):
        pass
    query = (
        "SELECT table_name, column_name, collation_name FROM information_schema.columns "
        "WHERE table_schema = 'evolink_async' AND data_type = 'text' AND collation_name IS DISTINCT FROM 'C'"
    )
    told_only = {("job", "holder", None)}
    assert {*ask(postgres_url, query)} <= told_only


# How it is made


async def test_many_that_make_the_same_ledger_in_the_same_moment_share_it(postgres_url: str) -> None:
    jobs = await asyncio.gather(*(open_job(postgres_url, f"job {number}") for number in range(8)))
    for job in jobs:
        await row_in(job, State.COMPLETED, "k")
        await job.aclose()
    async with open_ledger(postgres_url) as ledger:
        assert sorted(await ledger.jobs()) == [f"job {number}" for number in range(8)]
    assert ask(postgres_url, "SELECT count(*) FROM version") == [(1,)]


async def test_an_older_ledger_is_brought_up_when_nobody_runs_a_job(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    postgres_module = importlib.import_module("evolink_async.ledger.postgres")
    async with opened(postgres_url) as job:
        await row_in(job, State.COMPLETED, "k")
        now = postgres_module.VERSION
        monkeypatch.setattr(postgres_module, "VERSION", now + 1)
        monkeypatch.setattr(
            postgres_module, "MIGRATIONS", (*postgres_module.MIGRATIONS, ("ALTER TABLE job ADD COLUMN later INTEGER",))
        )
        with refused("in use"):
            await open_job(postgres_url, "other")
        assert ask(postgres_url, "SELECT version FROM version") == [(now,)]
    async with opened(postgres_url) as job:
        assert job.census.known == 1
    assert "bringing the ledger" in caplog.text
    assert ask(postgres_url, "SELECT version FROM version") == [(now + 1,)]
    assert ask(postgres_url, "SELECT later FROM job") == [(None,)]


async def test_a_migration_that_fails_changes_nothing(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    postgres_module = importlib.import_module("evolink_async.ledger.postgres")
    async with opened(postgres_url) as job:
        await row_in(job, State.COMPLETED, "k")
    with monkeypatch.context() as patch:
        patch.setattr(postgres_module, "VERSION", postgres_module.VERSION + 1)
        wrong = ("ALTER TABLE job ADD COLUMN later INTEGER", "ALTER TABLE nothing ADD COLUMN later INTEGER")
        patch.setattr(postgres_module, "MIGRATIONS", (*postgres_module.MIGRATIONS, wrong))
        with refused("nothing"):
            await open_job(postgres_url)
    async with opened(postgres_url) as job:
        assert job.census.known == 1
    assert not ask(postgres_url, "SELECT FROM information_schema.columns WHERE column_name = 'later'")


# What a ledger asks of its connection


async def settings_of(url: str, *names: str) -> dict[str, str]:
    """As they are for the connection of a run."""
    async with opened(url) as job:
        assert job._turns is not None
        connection = job._turns._store._database._connection  # type: ignore[attr-defined]
        return {name: connection.execute(f"SHOW {name}").fetchone()[0] for name in names}


async def test_a_commit_is_durable_whatever_the_server_or_the_user_has_as_its_default(
    postgres: Postgres, postgres_url: str
) -> None:
    assert postgres.ask("SHOW synchronous_commit") == [("off",)]
    assert await settings_of(postgres_url, "synchronous_commit") == {"synchronous_commit": "on"}
    for given, kept in (("local", "on"), ("remote_apply", "remote_apply"), ("remote_write", "remote_write")):
        postgres.ask(f"ALTER DATABASE {database_of(postgres_url)} SET synchronous_commit = {given}")
        assert await settings_of(postgres_url, "synchronous_commit") == {"synchronous_commit": kept}


async def test_a_network_that_is_dead_is_noticed_in_half_a_minute_unless_the_url_says_otherwise(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    given: list[dict[str, Any]] = []
    connect = psycopg.connect

    def connected(url: str, **options: Any) -> Any:
        connection = connect(url, **options)
        if url == postgres_url:
            return connection  # for questions of ours
        given.append(psycopg.conninfo.conninfo_to_dict(url, **options))
        with socket.socket(fileno=os.dup(connection.fileno())) as wire:
            given[-1]["on the socket"] = wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        return connection

    monkeypatch.setattr(psycopg, "connect", connected)
    async with opened(postgres_url):
        pass
    assert given[-1]["on the socket"] == 30_000
    assert int(given[-1]["connect_timeout"]) <= 30
    assert int(given[-1]["keepalives_idle"]) <= 30
    async with opened(f"{postgres_url}?tcp_user_timeout=5000&connect_timeout=3&application_name=mine"):
        assert ask(postgres_url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'mine'") == [(1,)]
    assert (given[-1]["on the socket"], given[-1]["connect_timeout"]) == (5_000, "3")


async def test_a_lock_that_somebody_holds_on_a_row_is_waited_for_and_then_given_up(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    monkeypatch.setattr(
        "evolink_async.ledger.postgres._SETTINGS", {"search_path": "evolink_async", "lock_timeout": "200ms"}
    )
    async with opened(postgres_url) as job:
        row = await entered(job, "k")
        with contextlib.closing(psycopg.connect(postgres_url)) as other:
            other.execute("UPDATE evolink_async.job SET spent = spent")
            with refused("lock"):
                await intend(job, row)
        assert await intend(job, row) is None


async def test_nothing_of_a_user_s_own_schemas_is_used_or_touched(postgres_url: str) -> None:
    for table in ("job", "request", "version"):
        ask(postgres_url, f"CREATE TABLE public.{table} (id text)")
    async with opened(postgres_url) as job:
        await row_in(job, State.COMPLETED, "k")
    assert ask(postgres_url, "SELECT count(*) FROM public.job") == [(0,)]
    assert ask(postgres_url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(3,)]


# Texts that a database does not take


async def test_a_text_with_a_nul_of_a_service_breaks_no_ledger(postgres_url: str) -> None:
    async with opened(postgres_url) as job:
        refusal, lost, failed = [await row_in(job, State.SENDING, key) for key in "abc"]
        await job.rejected(refusal, code="bad\0code", error="no\0size")
        await job.unsettled(lost, code="\0", error="\0")
        await accept(job, failed, new_task(task_id="task-1"), at=at())
        wire = {
            "id": "task-1",
            "status": "failed",
            "error": {"code": "a\0b", "message": "c\0d"},
            "odd\0": ["\0", "\ud800"],
        }
        await job.ended(failed, Task.model_validate(wire), at=at())
        await job.remember('"\\u0000"')
    async with opened(postgres_url) as job:
        [refusal, lost, failed] = [one.row for one in await enter_all(job, [entry(key, key) for key in "abc"])]
        assert (refusal.error_code, refusal.error) == ("bad\ufffdcode", "no\ufffdsize")
        assert failed.task is not None
        assert failed.task.raw["odd\0"] == ["\0", "\ud800"]  # in JSON it is written out
    assert_balanced(postgres_url)


# Processes

FORKS = """
import asyncio, os, sys, gc
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
from evolink_async.ledger import Entry, open_job, open_ledger

async def main():
    job = await open_job(sys.argv[1])
    known = await job.enter(Entry("before", b"0", "/v1/images/generations", "m"))
    async with open_ledger(sys.argv[1]) as ledger:
        if os.fork() == 0:
            del job, known, ledger
            gc.collect()
            os._exit(0)
        os.wait()
        await job.enter(Entry("after", b"0", "/v1/images/generations", "m"))
        print((await ledger.job().stats()).requests, flush=True)
    await job.aclose()

asyncio.run(main())
"""


async def test_a_forked_child_that_ends_does_not_end_the_connection_of_its_parent(postgres_url: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", FORKS, postgres_url),
        env={"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert (process.returncode, output.decode().split()) == (0, ["2"]), errors.decode()


async def test_whoever_is_named_as_the_holder_is_believed_only_while_somebody_has_the_lock(postgres_url: str) -> None:
    async with opened(postgres_url):
        pass
    ask(postgres_url, "UPDATE job SET holder = ?", '{"pid": 1, "host": "there", "since": "then"}')
    async with open_ledger(postgres_url) as ledger:
        assert (await ledger.job().stats()).in_use_by is None
    async with opened(postgres_url), open_ledger(postgres_url) as ledger:
        assert str((await ledger.job().stats()).in_use_by).startswith("this process since 20")
        [(holder,)] = ask(postgres_url, "SELECT holder FROM job")
        ask(postgres_url, "UPDATE job SET holder = 'no json'")
        assert (await ledger.job().stats()).in_use_by == "another process"
        ask(postgres_url, "UPDATE job SET holder = ?", holder)
