"""The other commands as processes, and what the command line is like as a whole."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_process import command, ended, environment, on_terminal, started, until
from pydantic_core import from_json

from evolink_async import __version__
from evolink_async.cli.text import amount, clean, shortened
from evolink_async.durations import duration

AN_OWL = ("generate", "image", "--model", "krea-2-turbo", "--prompt", "an owl")


async def generated(server: Any, *options: object) -> str:
    """The id of a task."""
    result = await command(
        "generate", "image", "--model", "krea-2-turbo", "--prompt", "an owl", "--json", *options, server=server
    )
    return str(from_json(result.stdout)["task_id"])


# The whole


async def test_help_and_version_are_quick_and_read_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['evolink-async', '--help']\n"
        "from evolink_async.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([name for name in ('httpx', 'pydantic', 'anyio', 'uvicorn') if name in sys.modules])\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    stdout, _ = await process.communicate()
    assert b"generate" in stdout
    assert stdout.splitlines()[-1] == b"[]"
    assert (await command("--version")).stdout == f"evolink-async {__version__}\n"


@pytest.mark.parametrize("missing", ["typer", "rich"])
async def test_without_its_extra_it_says_what_to_install(missing: str) -> None:
    code = f"import sys\nsys.modules[{missing!r}] = None\nfrom evolink_async.cli import main\nmain()"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=pipe, stderr=pipe)
    stdout, stderr = await process.communicate()
    assert (process.returncode, stdout) == (2, b"")
    assert stderr.decode().endswith("pip install 'evolink-async[cli]'\n")
    assert len(stderr.splitlines()) == 1


async def test_a_wrong_command_or_option_is_usage() -> None:
    assert (await command("runn")).code == 2
    assert (await command("credits", "--nonsense")).code == 2


async def test_the_key_is_no_option() -> None:
    result = await command("--api-key", "x", "credits")
    assert result.code == 2
    assert "EVOLINK_API_KEY" in (await command("--help")).stdout


# Models


async def test_models_are_lines_when_piped_and_need_no_key() -> None:
    result = await command("models", "--kind", "audio", env=environment(EVOLINK_API_KEY=None))
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert result.code == 0
    assert {row[1] for row in rows} == {"audio"}
    assert ["suno-v5-beta", "audio", "per call", "about 120 s", ""] in rows


async def test_a_model_tells_what_it_takes() -> None:
    result = await command("models", "gpt-4o-image")
    assert result.code == 0
    assert "  prompt  string; required" in result.stdout
    assert "  n  integer; 1, 2, 4" in result.stdout


async def test_an_unknown_model_names_the_nearest() -> None:
    result = await command("models", "gpt4o-image")
    assert result.code == 2
    assert "gpt-4o-image" in result.stderr


async def test_a_reader_that_has_had_enough_is_no_error() -> None:
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m evolink_async models | head -1",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert len(stdout.splitlines()) == 1
    assert stderr == b""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--version"], 0), (["--help"], 0), (["nonsense"], 2), (["run"], 2), (["run", "no file", "--dry-run"], 2)],
)
async def test_that_nobody_reads_on_changes_no_exit_code(arguments: list[str], code: int) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    full = os.open("/dev/full", os.O_WRONLY)
    assert (await command(*arguments, stdout=theirs, stderr=theirs)).code == code
    assert (await command(*arguments, stderr=full)).code == code
    os.close(full)
    os.close(theirs)


# One generation, tasks, credits


async def test_a_generation_prints_its_links(emulator: Any) -> None:
    result = await command(
        "generate",
        "image",
        "--model",
        "gpt-4o-image",
        "--prompt",
        "-",
        "--param",
        "n=2",
        given=b"owl\n",
        server=emulator,
    )
    assert result.code == 0
    assert len(result.stdout.splitlines()) == 2
    assert all(line.startswith(emulator.base_url) for line in result.stdout.splitlines())
    assert "completed in" in result.stderr


async def test_a_wrong_parameter_is_found_before_anything_is_sent(emulator: Any) -> None:
    result = await command(
        "generate", "image", "--model", "gpt-4o-image", "--prompt", "a", "--param", "n=3", server=emulator
    )
    assert (result.code, result.stdout) == (2, "")
    assert "n: 3 is not accepted" in result.stderr
    assert not emulator.emulator.book()["posts"]


async def test_an_interrupted_generation_names_its_task(api_key: str) -> None:
    from evolink_async.emulator import Emulator

    async with Emulator(standing=True, api_key=api_key).serve() as server:
        arguments = ("generate", "video", "--model", "veo3.1-fast-beta", "--prompt", "waves")
        async with started(*arguments, server=server) as process:
            await until(lambda: bool(server.emulator.book()["posts"]))
            process.send_signal(signal.SIGINT)
            result = await ended(process)
        task_id = server.emulator.book()["posts"][0]["task_id"]
    assert result.code == 130
    assert f"evolink-async wait {task_id}" in result.stderr


async def test_status_tells_of_each_task(emulator: Any) -> None:
    task_id = await generated(emulator)
    result = await command("status", task_id, "task-nobody-knows", "--json", server=emulator)
    known, unknown = (from_json(line) for line in result.stdout.splitlines())
    assert result.code == 1
    assert (known["task_id"], known["status"], known["progress"]) == (task_id, "completed", 100)
    assert unknown == {"task_id": "task-nobody-knows", "status": None}
    assert "doesn't know 1 task: task-nobody-knows" in result.stderr
    assert (await command("status", task_id, server=emulator)).stdout.startswith(f"{task_id}\tcompleted\t100 %")


async def test_generating_keeps_to_its_time_where_nothing_gets_through(api_key: str) -> None:
    from evolink_async.emulator import Emulator

    faults = [{"method": "POST", "path": "/v1/images", "status": 429}]
    async with Emulator(api_key=api_key, faults=faults).serve() as server, asyncio.timeout(60):
        result = await command(*AN_OWL, "--timeout", 1, server=server)
        assert server.emulator.book()["posts"] == []
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "nothing was sent: no way through to the service within 1.0 s"


async def test_generating_that_takes_too_long_says_how_to_go_on(api_key: str) -> None:
    from evolink_async.emulator import Emulator

    async with Emulator(standing=True, api_key=api_key).serve() as server:
        result = await command(*AN_OWL, "--timeout", 2, "--json", server=server)
        [post] = server.emulator.book()["posts"]
    outcome = from_json(result.stdout)
    assert (result.code, outcome["status"], outcome["task_id"]) == (1, "unfinished", post["task_id"])
    assert f"evolink-async wait {post['task_id']}" in result.stderr


async def test_a_link_that_standard_output_has_no_room_for_is_on_standard_error(emulator: Any) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    result = await command(*AN_OWL, server=emulator, stdout=full)
    os.close(full)
    [post] = emulator.emulator.book()["posts"]
    assert result.code == 1
    assert f"/results/{post['task_id']}-1.png" in result.stderr
    assert result.stderr.splitlines()[-1] == "cannot write to standard output: No space left on device"


async def test_waiting_that_takes_too_long_says_how_to_go_on(api_key: str) -> None:
    from evolink_async import AsyncEvoLink
    from evolink_async.emulator import Emulator

    async with (
        Emulator(standing=True, api_key=api_key).serve() as server,
        AsyncEvoLink(base_url=server.base_url) as client,
    ):
        task = await client.videos.submit(model="veo3.1-fast-beta", prompt="waves")
        result = await command("wait", task.id, "--timeout", 1, server=server)
    assert (result.code, result.stdout) == (1, "")
    assert f"evolink-async wait {task.id}" in result.stderr


@pytest.mark.parametrize(
    ("task_id", "code", "said"),
    [
        ("task-unified-1774857405-nobody00", 1, "the service doesn't know task-unified-1774857405-nobody00"),
        ("a/../b", 2, "no task id: 'a/../b'"),
    ],
)
async def test_waiting_for_what_is_no_task_says_so_and_not_that_it_runs(
    task_id: str, code: int, said: str, emulator: Any
) -> None:
    result = await command("wait", task_id, "--timeout", 5, server=emulator)
    assert (result.code, result.stdout) == (code, "")
    assert said in result.stderr
    assert "running" not in result.stderr


async def test_a_wait_for_a_service_that_is_not_there_keeps_to_its_time_and_a_question_says_that_it_waits() -> None:
    env = environment(EVOLINK_BASE_URL="http://127.0.0.1:9", EVOLINK_API_KEY="sk-x")
    began = time.monotonic()
    assert (await command("wait", "task-1", "--timeout", 1, env=env)).code == 1
    assert time.monotonic() - began < 60
    async with started("credits", env=env) as process:
        assert b"no answer yet" in await asyncio.wait_for(process.stderr.readline(), 60)


async def test_a_refused_key_ends_every_command_with_3(emulator: Any) -> None:
    env = environment(emulator, EVOLINK_API_KEY="sk-wrong")
    for arguments in (["credits"], ["status", "task-1"], ["wait", "task-1"]):
        result = await command(*arguments, env=env)
        assert result.code == 3
        assert result.stderr.count("Check the API key") == 1
        assert "sk-wrong" not in result.stderr


async def test_credits_are_two_lines_or_an_object(emulator: Any) -> None:
    result = await command("credits", server=emulator)
    assert result.stdout.splitlines()[0] == "account: 1,000,000 credits left, 0 used"
    assert from_json((await command("credits", "--json", server=emulator)).stdout)["user"]["used"] == 0


async def test_the_base_url_may_be_an_option(emulator: Any) -> None:
    env = environment(emulator, EVOLINK_BASE_URL="http://127.0.0.1:9")
    assert (await command("--base-url", emulator.base_url, "credits", env=env)).code == 0


# Emulator


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_emulator_serves_until_it_is_told_to_stop(number: int) -> None:
    async with started("emulator", "--port", 0, "--speed", 100) as process:
        address = (await asyncio.wait_for(process.stderr.readline(), 60)).decode()
        export = (await process.stderr.readline()).decode()
        assert "100 times real speed" in address
        found = re.fullmatch(r"export EVOLINK_BASE_URL=(\S+) EVOLINK_API_KEY=(\S+)\n", export)
        assert found is not None
        env = environment(EVOLINK_BASE_URL=found[1], EVOLINK_API_KEY=found[2])
        assert (await command("credits", env=env)).code == 0
        process.send_signal(number)
        assert (await ended(process)).code == 0


async def test_an_emulator_that_cannot_start_is_one_sentence(emulator: Any, tmp_path: Any) -> None:
    port = emulator.base_url.rpartition(":")[2]
    result = await command("emulator", "--port", port)
    assert result.code == 2
    assert "cannot listen" in result.stderr
    (tmp_path / "faults.json").write_text('[{"nonsense": 1}]')
    result = await command("emulator", "--faults", tmp_path / "faults.json")
    assert result.code == 2
    assert "nonsense" in result.stderr
    (tmp_path / "models.json").write_text('{"*": {"bais": 2}}')
    result = await command("emulator", "--models", tmp_path / "models.json")
    assert (result.code, "no 'bais'" in result.stderr) == (2, True)
    result = await command("emulator", "--dialect", tmp_path / "nothing.json")
    assert (result.code, "cannot read" in result.stderr) == (2, True)


async def test_the_emulator_takes_behaviours_and_dialects_from_files(tmp_path: Any) -> None:
    (tmp_path / "models.json").write_text('{"*": {"price": 7}}')
    (tmp_path / "dialect.json").write_text('{"created": "full", "credits": "old"}')
    files = ("--models", tmp_path / "models.json", "--dialect", tmp_path / "dialect.json")
    async with started("emulator", "--port", 0, "--standing", *files) as process:
        await asyncio.wait_for(process.stderr.readline(), 60)
        export = (await process.stderr.readline()).decode()
        url, key = re.findall(r"=(\S+)", export)
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}) as client:
            body = {"model": "gpt-4o-image", "prompt": "x"}
            answer = await client.post("/v1/images/generations", json=body)
            assert answer.json()["usage"]["credits_reserved"] == 700
            assert (await client.get("/_emulator/clock")).json()["standing"] is True


# Demo


async def test_the_demo_accounts_for_every_request(tmp_path: Path) -> None:
    env = environment(EVOLINK_API_KEY=None)
    result = await command("demo", "--requests", 15, "--speed", 200, env=env, cwd=tmp_path)
    assert (result.code, result.stdout) == (0, "")
    assert "15 of 15" in result.stderr
    assert "the book agrees" in result.stderr
    assert len(re.findall(r"^demo-\d\d ", result.stderr, re.M)) == 15


async def test_the_demo_works_where_the_environment_names_a_proxy(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"
    env = environment(HTTP_PROXY=nobody, http_proxy=nobody, ALL_PROXY=nobody, NO_PROXY=None, no_proxy=None)
    result = await command("demo", "--requests", 1, "--speed", 200, env=env, cwd=tmp_path)
    assert result.code == 0, result.stderr


async def test_an_interrupted_demo_names_what_runs(tmp_path: Path) -> None:
    async with started("demo", "--speed", 1, cwd=tmp_path) as process:
        seen = b""
        while b"requests, at most" not in seen:
            seen += await asyncio.wait_for(process.stderr.readline(), 60)
        await asyncio.sleep(1)  # the first ones are on their way; how many doesn't matter
        process.send_signal(signal.SIGINT)
        result = await ended(process)
    assert result.code == 130
    assert re.search(r"interrupted: \d+ of 60 were done", result.stderr)


async def test_a_terminal_gets_a_live_view_that_keeps_to_its_width(tmp_path: Path) -> None:
    code, text = await on_terminal("demo", "--requests", 10, "--speed", 200, "--out", tmp_path / "demo")
    assert code == 0
    assert "10 of 10" in text
    assert "\x1b[32m" in text  # green
    lines = re.sub(r"\x1b\]8;[^\x1b]*\x1b\\|\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")
    assert max(len(line) for line in lines if not line.startswith("    ")) <= 60  # code is there to be copied


async def test_no_color_means_none(tmp_path: Path) -> None:
    code, text = await on_terminal("demo", "--requests", 5, "--speed", 200, "--out", tmp_path / "demo", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", text)


# Words


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://a\x1b\\link", "link"),
        ("two\nlines\r\tmore", "two lines more"),
        ("\u202egnp.exe", " gnp.exe"),
        ("\x9b2Jx", "x"),
        ("[red]kept[/]", "[red]kept[/]"),
    ],
)
def test_text_from_others_is_made_harmless(text: str, harmless: str) -> None:
    assert clean(text) == harmless


def test_numbers_are_short() -> None:
    assert [duration(seconds) for seconds in (0.04, 9.9, 59.4, 125, 7800)] == [
        "40 ms",
        "9.9 s",
        "59 s",
        "2 min 05 s",
        "2 h 10 min",
    ]
    assert [amount(credits) for credits in (12, 2.5, 1234.567)] == ["12", "2.5", "1,234.57"]
    assert amount(60.175) == amount(Decimal("60.175")), "the demo shows both, side by side"
    assert shortened("a" * 20, 5) == "aaaa…"
