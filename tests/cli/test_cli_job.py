"""`job show`, `unknown`, `resolve`, `export`, as processes on ledgers that a job has left behind."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import io
import re
import shlex
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from cli_ledgers import MODEL, SENT, a_ledger, put
from cli_process import COMMAND, Ended, command, environment, on_terminal
from programs import ROOT
from pydantic_core import from_json

from evolink_async import AsyncEvoLink, open_ledger
from evolink_async.cli.ledger import _at_risk
from evolink_async.emulator import Emulator
from evolink_async.ledger import Row, State, open_job
from evolink_async.ledger.reports import UnknownRequest

HOSTILE = {"\x1b[31mred\x1b[0m\u202e": "unsettled", "\x9b2J\nfake line": "completed", "[bold]x[/]": "failed"}


async def job(verb: str, *arguments: object, **options: Any) -> Ended:
    """`evolink-async job ...`, without an API key unless a server is given."""
    if "server" not in options:
        options.setdefault("env", environment(EVOLINK_API_KEY=None))
    return await command("job", verb, *arguments, **options)


def json_lines(text: str) -> list[Any]:
    return [from_json(line) for line in text.splitlines()]


async def row_of(path: Path, identity: str, name: str = "default") -> Row:
    async with open_ledger(path) as ledger:
        row = await ledger.job(name).find(identity)
    assert row is not None
    return row


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    requests = {"a": "completed", "b": "completed", "c": "failed", "d": "accepted", "e": "unsettled", "f": "entered"}
    return await a_ledger(tmp_path / "job.db", requests)


# Show


async def test_show_tells_states_credits_what_is_unknown_and_costs(path: Path) -> None:
    result = await job("show", path)
    assert (result.code, result.stderr) == (0, "")
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[0] == "job default"
    assert "requests  6: 1 entered, 1 unsettled, 1 accepted, 2 completed, 1 failed" in lines
    assert "credits   5 spent, 5 reserved" in lines
    assert "unknown   1 request, 2.5 credits at risk" in lines
    assert f"evolink-async job unknown {path}" in lines
    assert lines[lines.index("2026-11-20") + 1].split() == [MODEL, "4", "5", "5"]
    assert "\x1b" not in result.stdout


async def test_the_folder_of_a_run_stands_for_its_ledger(path: Path) -> None:
    of_file = await command("job", "show", path, "--json")
    folder = path.parent / "out"
    folder.mkdir()
    path.rename(folder / "job.db")
    of_folder = await command("job", "show", folder, "--json")
    assert (of_folder.code, of_folder.stdout) == (0, of_file.stdout)


async def test_show_as_json_is_a_line_for_each_job(path: Path) -> None:
    await a_ledger(path, {"x": "completed"}, "other", sent=SENT + timedelta(days=1))
    result = await job("show", path, "--json")
    first, second = json_lines(result.stdout)
    created = first.pop("created_at")
    assert datetime.fromisoformat(created).tzinfo is not None
    assert first == {
        "job": "default",
        "requests": 6,
        "counts": {
            state: {"completed": 2}.get(state, int(state in ("entered", "unsettled", "accepted", "failed")))
            for state in State
        },
        "credits_spent": 5,
        "credits_reserved": 5,
        "unknown": 1,
        "credits_at_risk": 2.5,
        "runs": 1,
        "in_use_by": None,
        "costs": [{"day": "2026-11-20", "model": MODEL, "tasks": 4, "credits_spent": 5, "credits_reserved": 5}],
    }
    assert (second["job"], second["costs"][0]["day"]) == ("other", "2026-11-21")
    [only] = json_lines((await job("show", path, "--job", "other", "--json")).stdout)
    assert only == second


# Which ledger, which job


@pytest.mark.parametrize("verb", ["show", "unknown", "resolve", "export"])
async def test_a_ledger_that_is_none_is_one_sentence_and_nothing_is_made(tmp_path: Path, verb: str) -> None:
    more = ["key", "--give-up"] if verb == "resolve" else []
    result = await job(verb, tmp_path / "typo.db", *more)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"there is no ledger '{tmp_path / 'typo.db'}'\n"
    of_folder = await job(verb, tmp_path, *more)
    assert (of_folder.code, of_folder.stderr) == (2, f"there is no ledger '{tmp_path / 'job.db'}'\n")
    assert list(tmp_path.iterdir()) == []


async def test_what_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    result = await job("unknown", tmp_path / "prompts.jsonl")
    assert (result.code, result.stdout) == (2, "")
    assert "is no SQLite file" in result.stderr
    result = await job("show", "postgresql://me:se%3Fcret@127.0.0.1:1/db")  # where nobody listens
    assert (result.code, "postgresql://me@127.0.0.1:1/db" in result.stderr) == (2, True)
    assert "cret" not in result.stdout + result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("verb", ["show", "unknown", "resolve", "export"])
async def test_a_job_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path, verb: str) -> None:
    path = await a_ledger(tmp_path / "job.db", {"k": "unsettled"}, "first")
    more = ["k", "--give-up"] if verb == "resolve" else []
    await a_ledger(path, {"k": "unsettled"}, "second")
    result = await job(verb, path, *more, "--job", "third")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == "the ledger has no job 'third'; give --job NAME, one of: first, second\n"


async def test_without_a_name_it_is_the_only_job_or_the_one_called_default(tmp_path: Path) -> None:
    path = await a_ledger(tmp_path / "job.db", {"mine": "unsettled"}, "pictures")
    result = await job("unknown", path)
    assert f"  evolink-async job resolve {path} mine\n" in result.stdout
    await a_ledger(path, {"x": "unsettled"}, "second")
    result = await job("unknown", path)
    assert result.stderr == "the ledger has no job 'default'; give --job NAME, one of: pictures, second\n"
    await a_ledger(path, {"theirs": "unsettled"})
    result = await job("unknown", path)
    assert f"  evolink-async job resolve {path} theirs\n" in result.stdout
    result = await job("unknown", path, "--job", "pictures")
    assert f"  evolink-async job resolve {path} mine --job pictures\n" in result.stdout


HOLDER = """
import asyncio, sys
from cli_ledgers import put
from evolink_async.ledger import open_job

async def main():
    job = await open_job(sys.argv[1])
    await put(job, "on the wire", "sending")
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_while_a_program_runs_the_job_it_can_be_looked_at_and_not_settled(path: Path) -> None:
    env = environment(PYTHONPATH=str(Path(__file__).parent))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, path, env=env, stdout=pipe)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        [shown] = json_lines((await job("show", path, "--json")).stdout)
        assert shown["in_use_by"].startswith(f"process {process.pid} on ")
        assert (shown["counts"]["sending"], shown["unknown"]) == (1, 1)
        unknown = await job("unknown", path)
        assert "on the wire" not in unknown.stdout
        assert f"the job is running (process {process.pid} on" in unknown.stderr
        result = await job("resolve", path, "e", "--give-up")
        assert (result.code, f"in use by process {process.pid}" in result.stderr) == (2, True)
    finally:
        process.kill()
        await process.wait()
    [_, left] = json_lines((await job("unknown", path, "--json")).stdout)
    assert (left["identity"], left["state"]) == ("on the wire", "sending")
    assert (await job("resolve", path, "on the wire", "--not-submitted")).code == 0


# Unknown


async def test_unknown_tells_what_it_takes_to_find_out_as_the_page_shows(tmp_path: Path) -> None:
    reason = "the connection was cut before the answer was complete"
    path = await a_ledger(tmp_path / "job.db", {"page-17": "unsettled"}, prompt="a lighthouse at dusk", reason=reason)
    result = await job("unknown", "job.db", cwd=tmp_path)
    page = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^```text\n(1 request was sent.*?)^```", page, re.M | re.S)
    shown = re.sub(r"^  candidate: .*\n", "", shown, flags=re.M).replace("gpt-4o-image", MODEL)
    shown = re.sub(r"ea-[0-9a-f]{32}", str((await row_of(path, "page-17")).idempotency_key), shown)
    assert (result.code, result.stdout) == (1, shown)
    assert "--not-submitted  it was not" in result.stderr


async def test_unknown_as_json_is_a_line_for_each(tmp_path: Path) -> None:
    path = await a_ledger(tmp_path / "job.db", {"page-17": "unsettled", "again": "twice"})
    result = await job("unknown", path, "--json")
    first, second = json_lines(result.stdout)
    assert result.code == 1
    assert first == {
        "job": "default",
        "identity": "page-17",
        "key": "page-17",
        "model": MODEL,
        "prompt": "a lighthouse",
        "state": "unsettled",
        "reason": "the connection was cut",
        "idempotency_key": (await row_of(path, "page-17")).idempotency_key,
        "task_id": None,
        "credits": 2.5,
        "submitted_at": "2026-11-20T12:00:03Z",
        "resolve": f"evolink-async job resolve {path} page-17",
        "candidates": None,
    }
    assert (second["state"], second["resolve"], second["task_id"]) == (
        *("accepted", None, (await row_of(path, "again")).task_id),
    )


@pytest.mark.parametrize(
    ("credits", "said"),
    [
        ([None, None], "What that may cost is not known."),
        ([Decimal("2.5"), None], "2.5 credits are at risk, and what 1 of them may cost is not known."),
        ([Decimal("2.5"), Decimal(1)], "3.5 credits are at risk."),
    ],
)
def test_a_price_that_nobody_told_is_not_said_to_be_nothing(credits: list[Decimal | None], said: str) -> None:
    fields: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(UnknownRequest))
    assert _at_risk([UnknownRequest(**fields | {"credits": amount}) for amount in credits]) == said


async def test_where_nothing_is_to_be_resolved_the_exit_code_is_0(tmp_path: Path) -> None:
    path = await a_ledger(tmp_path / "job.db", {"done": "completed"})
    result = await job("unknown", path)
    assert (result.code, result.stdout) == (0, "nothing is unknown in job default\n")
    await a_ledger(path, {"again": "twice"})
    result = await job("unknown", path)
    assert result.code == 0
    assert "1 request was sent twice and may have been paid twice. 2.5 credits are at risk." in result.stdout
    assert "its task: task-unified-" in result.stdout
    assert "job resolve" not in result.stdout + result.stderr


async def test_the_commands_that_unknown_prints_settle_their_requests(tmp_path: Path) -> None:
    names = ["plain \u20ac", "-dash", "it's a $(name)", "\x1b[31mred\x1b[0m", "two\nlines", "x" * 250]
    path = await a_ledger(tmp_path / "my job.db", dict.fromkeys(names, "unsettled"), "a job")
    await a_ledger(path, {"other": "unsettled"}, "another")
    listed = await job("unknown", path, "--job", "a job")
    commands = re.findall(r"^  evolink-async (job resolve .*)$", listed.stdout, re.M)
    assert len(commands) == len(names)
    ways = {"given_up": ["--give-up"], "entered": ["--not-submitted"], "accepted": ["--task-id", "task-{}"]}
    expected = []
    for number, line in enumerate(commands):
        state = list(ways)[number % len(ways)]
        result = await job(*shlex.split(line)[1:], *(part.format(number) for part in ways[state]))
        assert result.code == 0, result.stderr
        expected.append(state)
    assert (await job("unknown", path, "--job", "a job")).code == 0
    assert [(await row_of(path, name, "a job")).state for name in names] == expected
    assert (await row_of(path, "other", "another")).state == "unsettled"


@pytest.mark.parametrize("verb", ["show", "unknown", "export", "resolve"])
async def test_what_comes_from_a_ledger_is_inert_on_a_terminal(tmp_path: Path, verb: str) -> None:
    path = tmp_path / "job.db"
    evil = "\x1b]0;owned\x07\x9b2J\u202e\n\nit is [red]done[/]"
    await a_ledger(path, HOSTILE, prompt=evil, reason=evil, model=f"model {evil}")
    keys = list(HOSTILE)
    more = {"export": ["--format", "csv"], "resolve": [keys[0], "--give-up"]}.get(verb, [])
    code, text = await on_terminal("job", verb, path, *more, columns=80)
    assert code == (1 if verb == "unknown" else 0)
    colours = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r\n", "\n")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", colours)
    assert "owned" not in text
    assert verb != "unknown" or "it is [red]done[/]" in text


@pytest.mark.parametrize("columns", [40, 80, 200])
async def test_on_a_terminal_lines_keep_to_its_width_and_commands_stay_whole(path: Path, columns: int) -> None:
    await a_ledger(path, {"long": "unsettled"}, prompt="a lighthouse " * 30, model="seedance-2.0-text-to-video")
    for verb in ("show", "unknown"):
        _, text = await on_terminal("job", verb, path, columns=columns)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r", "").split("\n")
        wide = [line for line in lines if len(line) > columns]
        assert all(line.startswith("  evolink-async job ") for line in wide)
        assert sum("evolink-async job " in line for line in lines) == (1 if verb == "show" else 2)
    _, text = await on_terminal("job", "show", path, columns=columns, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", text)


# Candidates


@pytest.fixture
async def service(api_key: str) -> Any:
    """An emulator in real time, so that its tasks are made when they are asked for."""
    async with Emulator(speed=1, api_key=api_key).serve() as server:
        yield server


async def made(server: Any, model: str = MODEL) -> str:
    """The id of a task that was just made."""
    async with AsyncEvoLink(base_url=server.base_url) as client:
        return (await client.images.submit(model=model, prompt="a lighthouse")).id


async def test_candidates_are_tasks_of_the_time_and_model_that_the_ledger_does_not_know(
    service: Any, tmp_path: Path
) -> None:
    orphan, known, other_model = await made(service), await made(service), await made(service, "gpt-4o-image")
    path = tmp_path / "job.db"
    now = datetime.now(UTC)
    ledger = await open_job(path)
    await put(ledger, "lost", sent=now)
    await put(ledger, "long ago", sent=now - timedelta(hours=2))
    await put(ledger, "again", "twice", task_id=known, sent=now)
    await ledger.aclose()
    result = await job("unknown", path, "--candidates", server=service)
    assert result.code == 1
    found = re.findall(r"(candidate|second task): ([\w-]+), (?:pending|processing), made 20", result.stdout)
    assert found == [("candidate", orphan), ("second task", orphan)]
    assert result.stdout.count("no candidate: the service lists no such task") == 1
    lost, long_ago, again = json_lines((await job("unknown", path, "--candidates", "--json", server=service)).stdout)
    assert [task["task_id"] for task in lost["candidates"]] == [orphan]
    assert (long_ago["candidates"], again["candidates"]) == ([], lost["candidates"])
    assert other_model not in result.stdout
    assert (await row_of(path, "lost")).state == "unsettled"  # shown, not taken
    posts = len(service.emulator.book()["posts"])
    assert posts == 3


async def test_candidates_need_a_list_a_key_and_an_account(tmp_path: Path, api_key: str) -> None:
    path = await a_ledger(tmp_path / "job.db", {"lost": "unsettled"}, sent=datetime.now(UTC))
    async with Emulator(listing=False, api_key=api_key).serve() as server:
        result = await job("unknown", path, "--candidates", server=server)
        assert (result.code, "this service has no list of tasks" in result.stderr) == (1, True)
        assert "evolink-async job resolve" in result.stdout
    async with Emulator(api_key=api_key).serve() as server:
        env = environment(server, EVOLINK_API_KEY="sk-wrong")
        result = await job("unknown", path, "--candidates", env=env)
        assert (result.code, "Check the API key" in result.stderr) == (3, True)
        assert "evolink-async job resolve" in result.stdout
    result = await job("unknown", path, "--candidates")
    assert (result.code, result.stdout, "EVOLINK_API_KEY" in result.stderr) == (2, "", True)


# Resolve


@pytest.mark.parametrize(
    "how", [[], ["--give-up", "--not-submitted"], ["--task-id", "t", "--give-up"], ["--give-up", "--force"]]
)
async def test_resolving_takes_one_option(path: Path, how: list[str]) -> None:
    result = await job("resolve", path, "e", *how)
    assert (result.code, result.stdout) == (2, "")
    assert "--task-id" in result.stderr
    assert (await row_of(path, "e")).state == "unsettled"


async def test_resolving_says_what_it_means_for_the_money_and_the_next_run(tmp_path: Path) -> None:
    path = await a_ledger(tmp_path / "job.db", dict.fromkeys(["found", "vain", "gone"], "unsettled"))
    result = await job("resolve", path, "vain", "--not-submitted")
    assert "vain was not submitted: its 2.5 credits are free; the next run sends it, and pays for it" in result.stderr
    assert f"2 requests are still unknown:\n  evolink-async job unknown {path}\n" in result.stderr
    result = await job("resolve", path, "gone", "--give-up", "--json")
    assert "its 2.5 credits stay reserved" in result.stderr
    [line] = json_lines(result.stdout)
    assert (line["identity"], line["state"], line["credits"]) == ("gone", "given_up", 2.5)
    result = await job("resolve", path, "found", "--task-id", "task-found")
    assert "EVOLINK_API_KEY is not set, so the task was not looked up" in result.stderr
    assert "found is the task task-found: it holds its 2.5 credits until that ends; the next run polls" in result.stderr
    assert "still unknown" not in result.stderr
    [shown] = json_lines((await job("show", path, "--json")).stdout)
    assert (shown["credits_reserved"], shown["unknown"], shown["runs"]) == (5, 0, 1)
    result = await job("resolve", path, "gone", "--not-submitted")  # it was found out after all
    assert (result.code, (await row_of(path, "gone")).state) == (0, "entered")


@pytest.mark.parametrize(
    ("identity", "said"),
    [("nobody", "has no request 'nobody'"), ("a", "'a' is completed: only one that is unknown"), ("f", "is entered")],
)
async def test_only_what_is_unknown_can_be_resolved(path: Path, identity: str, said: str) -> None:
    result = await job("resolve", path, identity, "--give-up")
    assert (result.code, result.stdout) == (2, "")
    assert said in result.stderr


async def test_a_task_id_is_looked_up_before_it_is_taken(service: Any, tmp_path: Path) -> None:
    path = tmp_path / "job.db"
    right, wrong_model = await made(service), await made(service, "gpt-4o-image")
    ledger = await open_job(path)
    await put(ledger, "lost", sent=datetime.now(UTC))
    await put(ledger, "old", sent=datetime.now(UTC) - timedelta(days=3))
    await ledger.aclose()
    refused = [
        ("lost", "task-unified-0-nobody", "the service doesn't know the task"),
        ("lost", wrong_model, f"it is a task of gpt-4o-image, the request is for {MODEL}"),
        ("old", right, "the request was sent at"),
        ("lost", "../../etc", "no task id"),
    ]
    for identity, task_id, said in refused:
        result = await job("resolve", path, identity, "--task-id", task_id, server=service)
        assert (result.code, said in result.stderr) == (2, True), result.stderr
    env = environment(service, EVOLINK_API_KEY="sk-wrong")
    result = await job("resolve", path, "lost", "--task-id", right, env=env)
    assert (result.code, "nothing was changed; --force" in result.stderr) == (3, True)
    assert (await row_of(path, "lost")).state == "unsettled"
    result = await job("resolve", path, "lost", "--task-id", right, server=service)
    assert (result.code, (await row_of(path, "lost")).task_id) == (0, right)
    result = await job("resolve", path, "old", "--task-id", right, "--force", server=service)
    assert (result.code, "belongs to the request 'lost'" in result.stderr) == (2, True)
    result = await job("resolve", path, "old", "--task-id", "task-by-hand", "--force", server=service)
    assert (result.code, (await row_of(path, "old")).task_id) == (0, "task-by-hand")


# Export


async def test_export_is_a_json_line_for_each_request(path: Path) -> None:
    result = await job("export", path)
    assert (result.code, result.stderr) == (0, "")
    lines = json_lines(result.stdout)
    assert [line["key"] for line in lines] == ["a", "b", "c", "d", "e", "f"]
    first, failed, unsettled = lines[0], lines[2], lines[4]
    assert first == {
        "key": "a",
        "identity": "a",
        "state": "completed",
        "model": MODEL,
        "task_id": first["task_id"],
        "urls": ["https://files.example/a.png"],
        "files": ["out/a-1.png"],
        "credits": 2.5,
        "attempts": 1,
        "idempotency_key": first["idempotency_key"],
        "submitted_at": "2026-11-20T12:00:03Z",
        "finished_at": "2026-11-20T12:00:03Z",
        "error": None,
    }
    assert failed["error"] == {"code": "content_policy", "message": "the connection was cut"}
    assert (unsettled["task_id"], unsettled["urls"], unsettled["credits"]) == (None, [], 2.5)
    assert (await job("export", path, "--json")).stdout == result.stdout


async def test_export_can_be_of_some_states(path: Path) -> None:
    lines = json_lines((await job("export", path, "--state", "failed", "--state", "unsettled")).stdout)
    assert [line["state"] for line in lines] == ["failed", "unsettled"]
    result = await job("export", path, "--state", "done")
    assert (result.code, result.stdout) == (2, "")
    assert "no state 'done'; there are entered, sending" in result.stderr


async def test_export_as_csv_gives_back_what_is_in_the_ledger(tmp_path: Path) -> None:
    requests = {'quote " and, comma': "completed", "two\nlines": "failed", "=1+1": "unsettled"}
    path = await a_ledger(tmp_path / "job.db", requests, reason='it, "failed"')
    result = await job("export", path, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["key"] for row in rows] == list(requests)
    assert rows[0]["urls"].startswith("https://files.example/quote")
    assert (rows[1]["error_code"], rows[1]["error"]) == ("content_policy", 'it, "failed"')
    assert (rows[2]["credits"], rows[2]["submitted_at"]) == ("2.5", "2026-11-20T12:00:03+00:00")
    assert rows[2]["task_id"] == ""
    result = await job("export", path, "--format", "csv", "--json")
    assert (result.code, result.stdout) == (2, "")


async def test_a_reader_of_an_export_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    path = await a_ledger(tmp_path / "job.db", {f"k{number}": "entered" for number in range(2_000)})
    pipe = asyncio.subprocess.PIPE
    line = f"{shlex.join(COMMAND)} job export {path} | head -1"
    process = await asyncio.create_subprocess_shell(line, stdout=pipe, stderr=pipe)
    stdout, stderr = await process.communicate()
    assert (len(stdout.splitlines()), stderr) == (1, b"")


async def test_looking_at_a_ledger_starts_without_what_speaks_to_the_service(path: Path) -> None:
    code = (
        f"import sys\nsys.argv = ['evolink-async', 'job', 'show', {str(path)!r}]\n"
        "from evolink_async.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([name for name in ('httpx', 'evolink_async.pool', 'evolink_async.client') if name in sys.modules])\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    stdout, _ = await process.communicate()
    assert b"job default" in stdout
    assert stdout.splitlines()[-1] == b"[]"


async def test_help_tells_the_exit_codes_that_scripts_rely_on() -> None:
    for verb, said in {"unknown": "1 something is", "resolve": "0 it is settled", "show": "0 done"}.items():
        text = " ".join((await job(verb, "--help")).stdout.split())
        assert "Exit codes:" in text
        assert said in text
