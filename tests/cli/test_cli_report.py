"""The report that `run` and `demo` end with, and `report` itself, as processes."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_process import Ended, command, ended, environment, images, lines_of, started, until, write_lines
from pydantic_core import from_json

from evolink_async.emulator import Emulator

FAST = ("--rate", "100/s")


def items_of(folder: Path) -> list[dict[str, Any]]:
    """What the gallery of a report shows."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    items: list[dict[str, Any]] = from_json(found[1])["items"]
    return items


async def test_a_run_ends_with_its_report(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(3))
    result = await command("run", file, "--out", tmp_path / "out", *FAST, server=emulator)
    assert (result.code, result.stdout) == (0, "")
    assert f"look at it: {tmp_path / 'out/report.html'}" in result.stderr
    items = items_of(tmp_path / "out")
    assert [(item["name"], item["status"], item["files"][0]["url"]) for item in items] == [
        (f"k{number}", "completed", f"./k{number}-1.png") for number in range(3)
    ]
    assert all(item["files"][0]["preview"].startswith("data:image/webp") for item in items)
    assert [item["prompt"] for item in items] == [image["prompt"] for image in images(3)]
    assert not list((tmp_path / "out").glob(".report*"))


async def test_every_run_adds_to_the_record_of_progress_and_the_report_counts_them(
    emulator: Any, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(4))
    for limit in (2, 4):
        result = await command("run", file, "--out", tmp_path / "out", "--limit", limit, *FAST, server=emulator)
        assert result.code == 0
    lines = lines_of(tmp_path / "out/progress.jsonl")
    assert [line["posts"] for line in lines if line["finished"] in (2, 4)][-1] == 2
    assert {"at", "elapsed", "posts", "rate_limited", "rate", "outstanding"} <= lines[0].keys()
    assert "<dt>runs</dt><dd>2</dd>" in (tmp_path / "out/report.html").read_text()


async def test_an_interrupted_run_has_a_report_of_what_runs_and_what_was_not_sent(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(30))
    async with Emulator(standing=True, seed=1, api_key=api_key).serve() as server:
        options = ("--max-outstanding", 4, *FAST)
        async with started("run", file, "--out", tmp_path / "out", *options, server=server) as process:
            await until(lambda: len(server.emulator.book()["posts"]) == 4)
            process.send_signal(signal.SIGINT)
            result = await ended(process)
    assert result.code == 130
    statuses = [item["status"] for item in items_of(tmp_path / "out")]
    assert (statuses.count("unfinished"), statuses.count("not_submitted"), len(statuses)) == (4, 26, 30)


async def test_a_killed_run_is_reported_from_its_ledger(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(8))
    async with (
        Emulator(standing=True, seed=1, api_key=api_key).serve() as server,
        started("run", file, "--out", tmp_path / "out", *FAST, server=server) as process,
    ):
        await until(lambda: len(server.emulator.book()["posts"]) == 8)
        during = await command("report", tmp_path / "out")
        process.kill()
        await process.wait()
    assert during.code == 0
    assert "was running when this page was made" in (tmp_path / "out/report.html").read_text()
    result = await command("report", tmp_path / "out", env=environment(EVOLINK_API_KEY=None))
    assert (result.code, result.stdout, result.stderr) == (0, f"{tmp_path / 'out/report.html'}\n", "")
    assert [item["status"] for item in items_of(tmp_path / "out")] == ["unfinished"] * 8
    assert "was running" not in (tmp_path / "out/report.html").read_text()


async def test_where_nothing_of_a_run_is_report_is_usage(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = await command("report", folder)
        assert (result.code, result.stdout) == (2, "")
        assert "give the folder that a run has written" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


async def test_a_report_that_cannot_be_written_makes_the_run_no_worse(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    (tmp_path / "out/report.html").mkdir(parents=True)
    result = await command("run", file, "--out", tmp_path / "out", *FAST, server=emulator)
    assert result.code == 0
    assert "no report was written: " in result.stderr
    assert f"evolink-async report {tmp_path / 'out'}" in result.stderr
    assert not list((tmp_path / "out").glob(".report*"))
    alone = await command("report", tmp_path / "out")
    assert (alone.code, alone.stdout) == (1, "")
    assert f"cannot write report.html into {tmp_path / 'out'}: Is a directory" in " ".join(alone.stderr.split())
    assert "copy the folder" in alone.stderr


async def without_jinja(server: Any, *arguments: object) -> Ended:
    code = (
        f"import sys\nsys.modules['jinja2'] = None\nsys.argv = ['evolink-async', *{[*map(str, arguments)]!r}]\n"
        "from evolink_async.cli import main\nmain()"
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=pipe, stderr=pipe, env=environment(server)
    )
    return await ended(process)


async def test_without_its_extra_a_run_says_one_line_and_ends_as_it_would(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    result = await without_jinja(emulator, "run", file, "--out", tmp_path / "out", *FAST)
    assert result.code == 0
    [line] = [line for line in result.stderr.splitlines() if "jinja2" in line]
    assert "pip install 'evolink-async[report]'" in line
    assert not (tmp_path / "out/report.html").exists()
    alone = await without_jinja(emulator, "report", tmp_path / "out")
    assert alone.code == 2
    assert "pip install 'evolink-async[report]'" in alone.stderr


async def test_the_demo_leaves_files_and_a_report_in_a_folder_of_its_own(tmp_path: Path) -> None:
    options = ("--requests", 8, "--speed", 200)
    for name in ("evolink-demo", "evolink-demo-2"):
        result = await command("demo", *options, cwd=tmp_path)
        assert result.code == 0
        assert f"look at it: {name}/report.html" in result.stderr
        items = items_of(tmp_path / name)
        assert len(items) == 8
        assert all((tmp_path / name / file["name"]).is_file() for item in items for file in item.get("files", []))
        assert all(item["late"] < 10 for item in items)
        assert "Detection delay" in (tmp_path / name / "report.html").read_text()
    refused = await command("demo", *options, "--out", "evolink-demo", cwd=tmp_path)
    assert refused.code == 2
    assert "is not empty" in refused.stderr


@pytest.mark.parametrize("name", ["report", "run", "demo"])
async def test_the_help_tells_of_it(name: str) -> None:
    assert "report" in (await command(name, "--help")).stdout
