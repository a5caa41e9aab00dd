"""`job show`, `unknown`, `resolve` and `export` of a ledger in PostgreSQL: as of a file, and without its password."""

from __future__ import annotations

import csv
import io
import re
import shlex

import pytest
from cli_ledgers import MODEL, a_ledger
from cli_process import Ended, command, environment
from postgres import USER, Postgres, database_of, passwords
from pydantic_core import from_json

from evolink_async import open_ledger


@pytest.fixture
async def url(postgres_url: str) -> str:
    requests = {"a": "completed", "b": "failed", "lost": "unsettled", "lost too": "unsettled", "e": "accepted"}
    return str(await a_ledger(postgres_url, requests))  # type: ignore[arg-type]


async def job(verb: str, *arguments: object, **more: str | None) -> Ended:
    """`evolink-async job ...`, whose output holds no password."""
    result = await command("job", verb, *arguments, env=environment(EVOLINK_API_KEY=None, **more))
    assert not [password for password in passwords if password in result.stdout + result.stderr]
    return result


async def test_a_ledger_is_shown_settled_and_exported_by_its_url(url: str, postgres: Postgres) -> None:
    shown = f"postgresql://{USER}@127.0.0.1:{postgres.port}/{database_of(url)}"
    result = await job("show", url)
    assert result.code == 0
    assert "requests  5: 2 unsettled, 1 accepted, 1 completed, 1 failed" in result.stdout
    assert f"evolink-async job unknown {shown}" in result.stdout
    assert "PGPASSWORD" in result.stderr
    [told] = [from_json(line) for line in (await job("show", url, "--json")).stdout.splitlines()]
    assert (told["requests"], told["credits_spent"], told["unknown"], told["in_use_by"]) == (5, 2.5, 2, None)
    assert told["costs"] == [
        {"day": "2026-11-20", "model": MODEL, "tasks": 4, "credits_spent": 2.5, "credits_reserved": 7.5}
    ]

    listed = await job("unknown", url)
    assert listed.code == 1
    commands = re.findall(r"^  evolink-async (job resolve .*)$", listed.stdout, re.M)
    assert [shlex.split(line)[2] for line in commands] == [shown, shown]
    for line, how in zip(commands, (["--task-id", "task-found"], ["--not-submitted"]), strict=True):
        result = await job(*shlex.split(line)[1:], *how, PGPASSWORD=postgres.password)
        assert result.code == 0, result.stderr
    assert (await job("unknown", url)).code == 0
    async with open_ledger(url) as ledger:
        states = {row.identity: str(row.state) async for row in ledger.job().rows()}
    assert (states["lost"], states["lost too"]) == ("accepted", "entered")

    exported = [from_json(line) for line in (await job("export", url, "--state", "accepted")).stdout.splitlines()]
    assert [row["identity"] for row in exported] == ["lost", "e"]
    table = csv.DictReader(io.StringIO((await job("export", url, "--format", "csv")).stdout))
    assert [row["identity"] for row in table] == ["a", "b", "lost", "lost too", "e"]


async def test_what_is_wrong_with_a_server_is_one_sentence(postgres: Postgres, unused_port: int) -> None:
    for wrong, said in (
        (postgres.url("db", port=unused_port), f"127.0.0.1:{unused_port}/db"),
        (f"postgresql://{USER}:%ZZ@host/db", "postgresql://"),
    ):
        result = await job("unknown", wrong)
        assert (result.code, result.stdout) == (2, "")
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr
