"""`job ...` on a ledger in PostgreSQL: the password of its URL shows nowhere, and the lines to be copied work."""

from __future__ import annotations

import re
import shlex
from urllib.parse import unquote, urlsplit

import pytest
from cli_ledgers import a_ledger
from cli_process import Ended, command, environment
from postgres import Postgres

KEYS = {"a": "completed", "e": "unsettled", "odd & 'key'": "unsettled"}


@pytest.fixture
async def url(postgres: Postgres, postgres_url: str) -> str:
    await a_ledger(postgres_url, KEYS)
    return postgres_url


async def job(*arguments: str, password: str | None = None) -> Ended:
    result = await command("job", *arguments, env=environment(EVOLINK_API_KEY=None, PGPASSWORD=password))
    assert "canary" not in result.stdout + result.stderr
    return result


async def test_lines_to_be_copied_are_without_the_password_and_work_where_that_is_known(url: str) -> None:
    shown = re.sub(":[^@/]*@", "@", url)
    unknown = await job("unknown", url)
    assert unknown.code == 1
    assert "without the password: set PGPASSWORD" in unknown.stderr
    lines = [line.strip() for line in unknown.stdout.splitlines() if "evolink-async job resolve" in line]
    assert len(lines) == 2
    password = unquote(urlsplit(url).password or "")
    for left, line in zip((1, 0), lines, strict=True):
        program, _, *arguments = shlex.split(line)
        assert (program, arguments[1]) == ("evolink-async", shown)
        settled = await job(*arguments, "--not-submitted", password=password)
        assert settled.code == 0, settled.stderr
        assert (f"  evolink-async job unknown {shown}" in settled.stderr) is bool(left)
        assert "PGPASSWORD" not in settled.stderr  # there was none in the line
    assert (await job("unknown", url)).code == 0


async def test_every_verb_takes_the_url(url: str) -> None:
    for arguments in (("show", url), ("show", url, "--json"), ("export", url), ("export", url, "--format", "csv")):
        result = await job(*arguments)
        assert (result.code, "e" in result.stdout) == (0, True), result.stderr
    assert (await job("resolve", url, "e", "--give-up")).code == 0


async def test_what_is_wrong_with_a_server_is_one_line(url: str) -> None:
    for wrong in (f"{url}_not_there", url.replace("tester:", "nobody:"), url.replace("@", "x@")):
        result = await job("show", wrong)
        assert (result.code, result.stdout) == (2, "")
        assert re.fullmatch(r"the ledger postgresql://\S+ cannot be reached .*\n", result.stderr), result.stderr
