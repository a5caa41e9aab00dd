"""Any width, any code page, any text: what a terminal, a pipe and a script are given. And `generate` into a folder."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_process import COMMAND, command, environment, images, lines_of, on_terminal, write_lines
from pydantic_core import from_json

from evolink_async import cli
from evolink_async.cli.entries import BadInput
from evolink_async.cli.single import parameters
from evolink_async.cli.text import escaped, in_code_page

LINKS = ["https://a/1", "https://a/2"]
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def shown(text: str) -> list[str]:
    """The lines as they stand on a screen."""
    return COLOURS.sub("", text).replace("\r", "").rstrip("\n").split("\n")


# Widths


@pytest.mark.parametrize("columns", [40, 80, 200])
async def test_nothing_is_wider_than_the_terminal_and_no_name_is_broken(
    columns: int, emulator: Any, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(3))
    dry_run = ("run", file, "--dry-run", "--rate", "5/s", "--max-credits", 100)
    for arguments in (["models", "--kind", "video"], ["models", "mj-v7-edit"], dry_run):
        code, text = await on_terminal(*arguments, columns=columns)
        lines = shown(text)
        assert code == 0
        assert max(len(line.rstrip()) for line in lines) <= columns, arguments
        assert not [line for line in lines if "…" in line]
    _, text = await on_terminal("models", "--kind", "video", columns=columns)
    assert "seedance-2.0-fast-reference-to-video" in text


@pytest.mark.parametrize("columns", [40, 80])
async def test_help_names_every_option_in_full(columns: int) -> None:
    for name, option in (
        ("emulator", "--private-callbacks"),
        ("run", "--resend-unsettled"),
        ("job resolve", "--not-submitted"),
    ):
        code, text = await on_terminal(*name.split(), "--help", columns=columns)
        assert code == 0
        assert option in text
        assert "…" not in text
        assert max(map(len, shown(text))) <= max(columns, 50)  # click wraps no closer


async def test_the_list_of_commands_fits_and_is_not_cut() -> None:
    _, text = await on_terminal("--help", columns=80)
    assert "..." not in text.replace("[ARGS]...", "")
    assert max(map(len, shown(text))) <= 80


# Code pages


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
async def test_a_code_page_without_the_characters_ends_nothing(encoding: str, emulator: Any, tmp_path: Path) -> None:
    env = environment(emulator, PYTHONIOENCODING=encoding)
    file = write_lines(tmp_path / "in.jsonl", *images(2, prompt="日本 … öß"), images(1, key="schlüssel-…-日本")[0])
    ran = await command("run", file, "--out", tmp_path / "out", "--json", env=env)
    assert ran.code == 0
    assert [from_json(line)["prompt"] for line in ran.stdout.splitlines()].count("日本 … öß") == 2
    code, text = await on_terminal(
        *("run", file, "--out", tmp_path / "out", "--json"), columns=80, **{**env, "TERM": "xterm-256color"}
    )
    assert code == 0
    assert "Error" not in text
    code, text = await on_terminal("models", "gpt-image-2", columns=80, PYTHONIOENCODING=encoding)
    assert (code, "WxH or W" in text) == (0, True)


def test_what_a_code_page_lacks_is_replaced_by_what_reads_alike() -> None:
    import codecs

    codecs.register_error("test.in_code_page", in_code_page)
    assert "a… b·c × 日本 ’".encode("ascii", "test.in_code_page") == b"a... b-c x ?? '"
    assert "é…".encode("cp437", "test.in_code_page") == b"\x82..."
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "test.in_code_page")


# Foreign text


async def test_a_terminal_is_given_no_escapes_by_json_and_a_pipe_all_of_it(emulator: Any, tmp_path: Path) -> None:
    hostile = "a\x1b[31mb\x9b2Jc\u202ed"
    file = write_lines(tmp_path / "in.jsonl", *images(1, key=hostile))
    arguments = ("run", file, "--out", tmp_path / "out", "--json")
    piped = await command(*arguments, server=emulator)
    assert from_json(piped.stdout)["key"] == hostile
    for stderr_too in (True, False):
        process = await asyncio.to_thread(_on_terminal_alone, arguments, emulator, stderr_too)
        [line] = re.findall(r'\{"key".*\}', process)
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202e]", line)
        assert from_json(line)["key"] == hostile


def _on_terminal_alone(arguments: Any, server: Any, stderr_too: bool) -> str:
    """What a terminal that is standard output is sent; standard error is the same one, or nowhere."""
    ours, theirs = pty.openpty()
    stderr = theirs if stderr_too else subprocess.DEVNULL
    env = environment(server, TERM="xterm", COLUMNS="1000")
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=theirs, stderr=stderr, env=env)
    os.close(theirs)
    received = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        received += data
    assert process.wait() == 0
    os.close(ours)
    return received.decode()


def test_json_for_a_terminal_is_still_the_same_json() -> None:
    text = '{"a":"\x9b\u202e","b":"\\u001b"}'
    assert escaped(text) == '{"a":"\\u009b\\u202e","b":"\\u001b"}'
    assert from_json(escaped(text)) == from_json(text)


# generate


async def test_a_generation_is_saved_and_its_paths_printed(emulator: Any, tmp_path: Path) -> None:
    arguments = ("generate", "image", "--model", "gpt-4o-image", "--prompt", "an owl", "--param", "n=2")
    result = await command(*arguments, "--out", tmp_path / "out", server=emulator)
    paths = [Path(line) for line in result.stdout.splitlines()]
    task_id = emulator.emulator.book()["posts"][0]["task_id"]
    assert (result.code, len(paths)) == (0, 2)
    assert [path.stem for path in paths] == [f"{task_id}-1", f"{task_id}-2"]
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    again = await command(*arguments, "--out", tmp_path / "out", "--json", server=emulator)
    assert again.code == 0  # the same words again are another picture, and write over none
    assert len(from_json(again.stdout)["files"]) == 2
    assert len(list((tmp_path / "out").iterdir())) == 4


async def test_a_folder_that_cannot_be_is_found_before_anything_is_sent(emulator: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("generate", "image", "--model", "krea-2-turbo", "--prompt", "a", "--out", tmp_path / "file")
    result = await command(*arguments, server=emulator)
    assert (result.code, result.stdout) == (2, "")
    assert "cannot write into" in result.stderr
    assert not emulator.emulator.book()["posts"]


async def test_a_picture_that_cannot_be_saved_is_not_lost(api_key: str, tmp_path: Path) -> None:
    from evolink_async.emulator import Emulator

    gone = {"method": "GET", "path": "/results", "status": 404}
    async with Emulator(speed=100, api_key=api_key, faults=[gone]).serve() as server:
        result = await command(
            *("generate", "image", "--model", "krea-2-turbo", "--prompt", "a", "--out", tmp_path / "out"), server=server
        )
        task_id = server.emulator.book()["posts"][0]["task_id"]
    assert (result.code, result.stdout) == (1, "")
    assert f"/results/{task_id}-1.png" in result.stderr


@pytest.mark.parametrize(
    ("model", "texts", "fields"),
    [
        ("gpt-4o-image", ["n=2", "size=1:1"], {"n": 2, "size": "1:1"}),
        ("gpt-4o-image", ["image_urls=https://a/1"], {"image_urls": ["https://a/1"]}),
        ("gpt-4o-image", ["image_urls=https://a/1", "image_urls=https://a/2"], {"image_urls": LINKS}),
        ("gpt-4o-image", ['image_urls=["https://a/1"]', "image_urls=https://a/2"], {"image_urls": LINKS}),
        ("gpt-4o-image", ["image_urls=https://a/1|https://a/2"], {"image_urls": LINKS}),
        ("mj-v7", ['model_params={"speed": "draft"}'], {"model_params": {"speed": "draft"}}),
        ("krea-2-turbo", ["nsfw_check=true", "seed=0"], {"nsfw_check": True, "seed": 0}),
        ("unheard-of", ["a=1", "b=1.5", "c=false", "d=x=y"], {"a": 1, "b": 1.5, "c": False, "d": "x=y"}),
        ("unheard-of", ["e=007", "f=[1]", "g="], {"e": "007", "f": [1], "g": ""}),
        ("unheard-of", ["a=1", "a=two"], {"a": [1, "two"]}),
    ],
)
def test_parameters_are_read_as_the_types_they_have(model: str, texts: list[str], fields: dict[str, Any]) -> None:
    assert parameters(model, texts) == fields


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n", "NAME=VALUE"),
        ("=1", "NAME=VALUE"),
        ("model=x", "what --model is for"),
        ("prompt=x", "what --prompt is for"),
        ("kind=video", "evolink-async generate image"),
        ("key=x", "never sent"),
        ("metadata={}", "never sent"),
    ],
)
def test_what_is_no_parameter_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parameters("gpt-4o-image", [text])


def test_a_parameter_of_one_value_may_not_come_twice() -> None:
    with pytest.raises(BadInput, match="n stands there 2 times"):
        parameters("gpt-4o-image", ["n=1", "n=2"])


# Pipes, ids, interruptions


async def test_ids_come_from_standard_input_bare_or_as_json_lines(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(2))
    assert (await command("run", file, "--out", tmp_path / "out", server=emulator)).code == 0
    ids = [line["task_id"] for line in lines_of(tmp_path / "out/results.jsonl")]
    for given in ("\n".join(ids).encode(), (tmp_path / "out/results.jsonl").read_bytes()):
        result = await command("status", "@-", given=given, server=emulator)
        assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ids
    waited = await command("wait", "@-", "--json", given=f"{ids[0]}\n".encode(), server=emulator)
    assert from_json(waited.stdout)["task_id"] == ids[0]
    nothing = await command("status", "@-", given=b"\n", server=emulator)
    assert (nothing.code, "no task ids" in nothing.stderr) == (2, True)


async def test_a_prompt_on_standard_input_is_utf_8_whatever_the_code_page(emulator: Any) -> None:
    env = environment(emulator, PYTHONIOENCODING="cp1252")
    arguments = ("generate", "image", "--model", "krea-2-turbo", "--prompt", "-", "--json")
    result = await command(*arguments, given="\ufeff日本\r\n".encode(), env=env)
    assert from_json(result.stdout)["prompt"] == "日本"
    result = await command(*arguments, given="schön".encode("cp1252"), env=env)
    assert from_json(result.stdout)["prompt"] == "schön"


def test_an_interruption_while_it_starts_is_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_main", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file name is text")
async def test_a_folder_whose_name_is_no_text_is_refused_before_anything_is_paid(emulator: Any, tmp_path: Path) -> None:
    name = os.fsdecode(b"na\xefve")
    file = write_lines(tmp_path / f"{name}.jsonl", *images(1))
    one = ("generate", "image", "--model", "krea-2-turbo", "--prompt", "a")
    for arguments in (["run", file, "--out", tmp_path / name], [*one, "--out", tmp_path / name, "--json"]):
        result = await command(*arguments, server=emulator)
        assert result.code == 2
        assert "is no UTF-8" in result.stderr
    assert not (tmp_path / name).exists()
    assert emulator.emulator.book()["posts"] == []
    plan = await command("run", file, "--dry-run", "--json")
    assert (plan.code, from_json(plan.stdout)["file"]) == (0, "na\\udcefve.jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file name is text")
async def test_a_run_below_a_folder_whose_name_is_no_text_is_reported(emulator: Any, tmp_path: Path) -> None:
    below = tmp_path / os.fsdecode(b"na\xefve")
    below.mkdir()
    write_lines(below / "in.jsonl", *images(1))
    result = await command("run", "in.jsonl", "--out", "out", server=emulator, cwd=below)
    assert (result.code, "no report was written" in result.stderr) == (0, False)
    shown = await command("job", "show", "out", cwd=below)
    assert (shown.code, "1 completed" in shown.stdout) == (0, True)


async def test_an_emulator_cannot_listen_on_what_is_no_host() -> None:
    result = await command("emulator", "--host", "ä..b", "--port", 0)
    assert result.code == 2
    assert "cannot listen on ä..b" in result.stderr
    assert "Traceback" not in result.stderr


async def test_a_full_disk_under_standard_output_is_one_sentence(emulator: Any) -> None:
    for arguments in (["--help"], ["credits"], ["models"]):
        full = os.open("/dev/full", os.O_WRONLY)
        result = await command(*arguments, server=emulator, stdout=full)
        os.close(full)
        assert result.code == 1
        assert "No space left" in result.stderr
        assert "Traceback" not in result.stderr


async def test_models_are_json_when_asked() -> None:
    listed = [from_json(line) for line in (await command("models", "--json", "--kind", "audio")).stdout.splitlines()]
    assert {line["kind"] for line in listed} == {"audio"}
    one = from_json((await command("models", "gpt-4o-image", "--json")).stdout)
    assert one["params"]["prompt"]["required"] is True
    assert one["params"]["image_urls"]["items"]["type"] == "string"
