"""`run` as a process, against an emulator over TCP."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pty
import re
import resource
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from cli_process import command, ended, environment, images, lines_of, started, until, write_lines

from evolink_async import PoolStats
from evolink_async.cli.job import _Balance
from evolink_async.cli.view import Screen
from evolink_async.emulator import Emulator

FAST = ("--rate", "100/s")


@asynccontextmanager
async def service(api_key: str, **options: Any) -> AsyncIterator[Any]:
    async with Emulator(**{"speed": 100, "seed": 1, "api_key": api_key} | options).serve() as server:
        yield server


def posts(server: Any) -> list[Any]:
    """What the service accepted."""
    return server.emulator.book()["posts"]


async def test_every_request_is_in_one_of_the_files_and_stdout_stays_empty(emulator: Any, tmp_path: Path) -> None:
    rows = [*images(3), {"custom_id": "film", "url": "/v1/videos/generations", "body": {"model": "veo3.1-fast-beta"}}]
    rows[3]["body"]["prompt"] = "waves"
    file = write_lines(tmp_path / "in.jsonl", *rows)
    result = await command("run", file, "--out", tmp_path / "out", "--rate", "50/s", server=emulator)
    assert (result.code, result.stdout) == (0, "")
    lines = lines_of(tmp_path / "out/results.jsonl")
    assert {line["key"] for line in lines} == {"k0", "k1", "k2", "film"}
    assert {line["task_id"] for line in lines} == {post["task_id"] for post in posts(emulator)}
    assert all(line["urls"] and line["status"] == "completed" and line["credits"] > 0 for line in lines)
    assert (tmp_path / "out/errors.jsonl").read_bytes() == b""
    assert "4 of 4 completed" in result.stderr
    assert "Traceback" not in result.stderr


async def test_json_gives_one_object_for_each_outcome(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(3, metadata={"row": 7}))
    result = await command("run", file, "--out", tmp_path / "out", "--json", server=emulator)
    assert result.stdout.encode() == (tmp_path / "out/results.jsonl").read_bytes()
    assert [line["metadata"] for line in lines_of(tmp_path / "out/results.jsonl")] == [{"row": 7}] * 3


async def test_one_bad_line_and_nothing_is_sent(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(2), {"model": "gpt-4o-image", "prompt": "a", "n": 3})
    result = await command("run", file, "--out", tmp_path / "out", server=emulator)
    assert result.code == 2
    assert "line 3: n: 3 is not accepted" in result.stderr
    assert "nothing was sent" in result.stderr
    assert not posts(emulator)
    assert not (tmp_path / "out").exists()


async def test_bad_lines_are_skipped_when_asked_and_kept(emulator: Any, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    write_lines(file, *images(2), {"model": "gpt-4o-image", "prompt": "a", "n": 3})
    file.write_bytes(file.read_bytes() + b"{nonsense\n")
    result = await command("run", file, "--out", tmp_path / "out", "--skip-bad", server=emulator)
    assert result.code == 1
    assert len(lines_of(tmp_path / "out/results.jsonl")) == 2
    wrong, nonsense = lines_of(tmp_path / "out/errors.jsonl")
    assert (wrong["n"], wrong["line"], wrong["error"]["status"]) == (3, 3, "rejected")
    assert (nonsense["text"], nonsense["line"]) == ("{nonsense", 4)
    assert f"as lines for another run: {tmp_path / 'out/errors.jsonl'}" in result.stderr


async def test_standard_input_is_read(emulator: Any, tmp_path: Path) -> None:
    result = await command(
        "run", "-", "--out", tmp_path / "out", "--model", "krea-2-turbo", given=b"prompt\na\nb\nc\n", server=emulator
    )
    assert result.code == 0
    assert len(posts(emulator)) == 3


async def test_a_limit_leaves_the_rest_alone(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(5))
    result = await command("run", file, "--out", tmp_path / "out", "--limit", 2, server=emulator)
    assert result.code == 0
    assert [line["key"] for line in lines_of(tmp_path / "out/results.jsonl")] in (["k0", "k1"], ["k1", "k0"])


async def test_a_folder_with_results_is_refused(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    (tmp_path / "out").mkdir()
    write_lines(tmp_path / "out/results.jsonl", {"key": "k0"})
    result = await command("run", file, "--out", tmp_path / "out", server=emulator)
    assert result.code == 2
    assert "choose a new folder" in " ".join(result.stderr.split())
    assert lines_of(tmp_path / "out/results.jsonl") == [{"key": "k0"}]
    assert not posts(emulator)


async def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_sent(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    result = await command("run", file, "--out", file, server=emulator)
    assert result.code == 2
    assert "cannot write into" in result.stderr
    assert "a file" in result.stderr
    assert not posts(emulator)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "--out is empty"),
        ("s3://bucket/x", "a folder of this machine"),
        ("n" * 300, "too long"),  # any that cannot be looked into, such as one of somebody else
    ],
)
async def test_what_is_no_folder_is_refused_and_nothing_is_made(out: str, said: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    for more in ([], ["--dry-run"]):
        result = await command("run", file, "--out", out, *more, cwd=tmp_path)
        assert result.code == 2
        assert said in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


async def test_a_dry_run_needs_no_key_and_sends_nothing(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(3), {"model": "unheard-of", "kind": "image", "prompt": "a"})
    env = environment(emulator, EVOLINK_API_KEY=None)
    result = await command("run", file, "--dry-run", "--rate", "60/min", env=env)
    assert (result.code, result.stdout) == (0, "")
    assert "4 requests would be sent" in result.stderr
    assert "3  krea-2-turbo (image)" in result.stderr
    assert "warning: line 4" in result.stderr
    assert "4.0 s to send" in result.stderr
    assert not posts(emulator)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "out"], "no API key"),
        ([], "give --out DIR"),
        (["--out", "out", "--rate", "fast"], "a rate limit reads like"),
        (["--out", "out", "--max-outstanding", "0"], "max-outstanding"),
    ],
)
async def test_what_cannot_work_is_one_sentence(arguments: list[str], said: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    env = environment(EVOLINK_API_KEY=None)
    result = await command("run", file, *arguments, env=env, cwd=tmp_path)
    assert result.code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


async def test_without_credits_everything_comes_back_to_be_sent_later(api_key: str, tmp_path: Path) -> None:
    rows = images(40, metadata={"row": 1})
    file = write_lines(tmp_path / "in.jsonl", *rows)
    async with service(api_key, credits=12) as server:  # five pictures
        result = await command("run", file, "--out", tmp_path / "out", "--max-outstanding", 5, server=server)
        paid = len(posts(server))
    assert result.code == 3
    results, errors = lines_of(tmp_path / "out/results.jsonl"), lines_of(tmp_path / "out/errors.jsonl")
    assert len(results) == paid < 40
    assert {line["key"] for line in results + errors} == {row["key"] for row in rows}
    assert len(results + errors) == 40
    assert all(line["error"]["status"] == "not_submitted" and line["metadata"] == {"row": 1} for line in errors)
    assert "Top up" in result.stderr
    async with service(api_key) as server:
        again = await command("run", tmp_path / "out/errors.jsonl", "--out", tmp_path / "out2", *FAST, server=server)
        assert len(posts(server)) == len(errors)
    assert again.code == 0


async def test_that_the_account_stops_it_outranks_bad_lines_in_the_exit_code(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", {"model": "gpt-4o-image", "prompt": "a", "n": 3}, *images(6))
    async with service(api_key, credits=6) as server:
        options = ("--skip-bad", "--max-outstanding", 1)
        result = await command("run", file, "--out", tmp_path / "out", *options, server=server)
    statuses = {line["error"]["status"] for line in lines_of(tmp_path / "out/errors.jsonl")}
    assert statuses == {"rejected", "not_submitted"}
    assert result.code == 3


async def test_a_refused_key_is_told_and_never_shown(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(2))
    env = environment(emulator, EVOLINK_API_KEY="sk-another-one")
    result = await command("--verbose", "run", file, "--out", tmp_path / "out", env=env)
    assert result.code == 3
    assert "sk-another-one" not in result.stderr
    assert "Check the API key" in result.stderr


async def test_what_failed_is_a_line_that_is_accepted_again(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(4))
    async with service(api_key, failure_share=1) as server:
        result = await command("run", file, "--out", tmp_path / "out", server=server)
    assert result.code == 1
    errors = lines_of(tmp_path / "out/errors.jsonl")
    assert {line["error"]["status"] for line in errors} == {"failed"}
    assert all(line["error"]["code"] and line["error"]["task_id"] for line in errors)
    async with service(api_key) as server:
        again = await command("run", tmp_path / "out/errors.jsonl", "--out", tmp_path / "out2", server=server)
    assert again.code == 0
    assert {line["key"] for line in lines_of(tmp_path / "out2/results.jsonl")} == {"k0", "k1", "k2", "k3"}


@pytest.fixture(autouse=True)
def hang_ups_are_told() -> Iterator[None]:
    """Also where the tests themselves run under nohup, which a child would inherit."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
async def test_one_signal_ends_it_in_order(number: int, code: int, api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(30))
    async with service(api_key, standing=True) as server:
        options = ("--max-outstanding", 4, "--rate", "100/s")
        async with started("run", file, "--out", tmp_path / "out", *options, server=server) as process:
            await until(lambda: len(posts(server)) == 4)
            process.send_signal(number)
            result = await ended(process)
        running = {post["task_id"] for post in posts(server)}
        assert (result.code, len(running)) == (code, 4)
        errors = lines_of(tmp_path / "out/errors.jsonl")
        assert len(errors) == 30
        unfinished = [line["error"]["task_id"] for line in errors if line["error"]["status"] == "unfinished"]
        assert set(unfinished) == running
        assert all(task_id in result.stderr for task_id in running)
        assert f"evolink-async run {file} --out {tmp_path / 'out'} --max-outstanding 4" in result.stderr

        again = await command("run", tmp_path / "out/errors.jsonl", "--out", tmp_path / "out2", server=server)
        assert again.code == 2
        assert "was sent already: task" in again.stderr
        assert len(posts(server)) == 4


async def test_the_line_that_resumes_gives_the_links(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(6))
    async with service(api_key, standing=True) as server:
        async with started("run", file, "--out", tmp_path / "out", *FAST, server=server) as process:
            await until(lambda: len(posts(server)) == 6)
            process.send_signal(signal.SIGINT)
            assert (await ended(process)).code == 130
        server.emulator.advance(60)  # 100 minutes of the service
        result = await command("wait", f"@{tmp_path / 'out/errors.jsonl'}", server=server)
        assert result.code == 0
        assert len(result.stdout.splitlines()) == 6
        assert len(posts(server)) == 6


async def test_a_post_under_way_is_awaited_after_one_signal(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    slow = {"method": "POST", "path": "/v1/images", "delay": 2.0}
    async with service(api_key, standing=True, faults=[slow]) as server:
        async with started("run", file, "--out", tmp_path / "out", server=server) as process:
            await until(lambda: len(posts(server)) == 1)
            process.send_signal(signal.SIGINT)
            result = await ended(process)
        (line,) = lines_of(tmp_path / "out/errors.jsonl")
        assert result.code == 130
        assert line["error"]["status"] == "unfinished"
        assert line["error"]["task_id"] == posts(server)[0]["task_id"]


async def test_a_closed_terminal_leaves_its_posts_their_seconds_however_often_the_shell_says_so(
    api_key: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    slow = {"method": "POST", "path": "/v1/images", "delay": 2.0}
    ours, theirs = pty.openpty()
    async with service(api_key, standing=True, faults=[slow]) as server:
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        async with started("run", file, "--out", tmp_path / "out", server=server, **streams) as process:
            os.close(theirs)
            await until(lambda: len(posts(server)) == 1)
            process.send_signal(signal.SIGHUP)
            seen = b""
            while b"stopping" not in seen:
                seen += await asyncio.wait_for(asyncio.to_thread(os.read, ours, 65536), 60)
            os.close(ours)
            process.send_signal(signal.SIGHUP)
            assert await asyncio.wait_for(process.wait(), 60) == 129
        (line,) = lines_of(tmp_path / "out/errors.jsonl")
        assert line["error"]["status"] == "unfinished"
        assert line["error"]["task_id"] == posts(server)[0]["task_id"]


async def test_a_run_that_ignores_hang_ups_goes_on(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    slow = {"method": "POST", "path": "/v1/images", "delay": 1.0}
    async with service(api_key, speed=200, faults=[slow]) as server:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does: a child inherits it
        try:
            async with started("run", file, "--out", tmp_path / "out", server=server) as process:
                await until(lambda: len(posts(server)) == 1)
                process.send_signal(signal.SIGHUP)
                result = await ended(process)
        finally:
            signal.signal(signal.SIGHUP, before)
    assert (result.code, len(lines_of(tmp_path / "out/results.jsonl"))) == (0, 1), result.stderr


async def test_what_is_still_unanswered_after_one_signal_is_told_once_and_not_waited_for_again(
    api_key: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(2))
    slow = {"method": "POST", "path": "/v1/images", "delay": 60.0}
    async with (
        service(api_key, standing=True, faults=[slow]) as server,
        started("run", file, "--out", tmp_path / "out", server=server) as process,
    ):
        await until(lambda: len(posts(server)) == 2)
        process.send_signal(signal.SIGINT)
        result = await ended(process)
    assert result.code == 130
    *_, resumes, report = result.stderr.splitlines()  # nothing comes after these
    assert resumes.endswith(f"evolink-async run {file} --out {tmp_path / 'out'}")
    assert report.endswith("report.html")
    assert "cut before its answer" not in result.stderr


async def test_two_signals_end_it_at_once_and_name_what_is_unanswered(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(3))
    slow = {"method": "POST", "path": "/v1/images", "delay": 60.0}
    took = []
    while not took or (min(took) > 4 and len(took) < 3):  # the grace is 5 s, always; a busy machine is so for a while
        out = tmp_path / f"out{len(took)}"
        async with (
            service(api_key, standing=True, faults=[slow]) as server,
            started("run", file, "--out", out, server=server) as process,
        ):
            await until(lambda server=server: len(posts(server)) == 3)
            process.send_signal(signal.SIGINT)
            assert b"stopping" in await asyncio.wait_for(process.stderr.readline(), 60)
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            result = await ended(process)
            took.append(time.monotonic() - began)
        errors = lines_of(out / "errors.jsonl")
        assert result.code == 130
        assert {line["error"]["status"] for line in errors} == {"unknown"}
        assert all(line["error"]["idempotency_key"].startswith("ea-") for line in errors)
        assert f"evolink-async job unknown {out / 'job.db'}" in result.stderr
    assert min(took) < 4


async def test_a_reader_that_goes_away_stops_nothing(emulator: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(5))
    async with started("run", file, "--out", tmp_path / "out", "--json", server=emulator) as process:
        process.stdout._transport.close()
        await asyncio.wait_for(process.wait(), 60)
        stderr = (await process.stderr.read()).decode()
    assert process.returncode == 0
    assert len(lines_of(tmp_path / "out/results.jsonl")) == 5
    assert "Broken" not in stderr


async def test_a_full_disk_under_standard_output_does_not_end_the_run(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(6))
    full = os.open("/dev/full", os.O_WRONLY)
    async with service(api_key) as server:
        result = await command("run", file, "--out", tmp_path / "out", *FAST, "--json", server=server, stdout=full)
    os.close(full)
    assert result.code == 1
    assert result.stderr.count("cannot write to standard output") == 1
    assert "6 of 6 completed" in result.stderr
    assert len(lines_of(tmp_path / "out/results.jsonl")) == 6


async def test_a_full_disk_under_standard_error_does_not_end_the_run(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(6))
    refused = {"method": "POST", "nth": [1], "status": 400, "body": {"error": {"code": "no"}}}
    full = os.open("/dev/full", os.O_WRONLY)
    async with service(api_key, faults=[refused]) as server:
        result = await command("run", file, "--out", tmp_path / "out", *FAST, server=server, stderr=full)
    os.close(full)
    assert result.code == 1
    assert len(lines_of(tmp_path / "out/results.jsonl")) == 5


async def test_a_reader_of_standard_error_that_goes_away_does_not_end_the_run(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(6))
    refused = {"method": "POST", "nth": [1], "status": 400, "body": {"error": {"code": "no"}}}
    ours, theirs = os.pipe()
    os.close(ours)
    async with service(api_key, faults=[refused]) as server:
        result = await command("run", file, "--out", tmp_path / "out", *FAST, "--json", server=server, stderr=theirs)
    os.close(theirs)
    assert result.code == 1
    assert len(lines_of(tmp_path / "out/results.jsonl")) == 5
    assert len(result.stdout.splitlines()) == 6


async def test_a_terminal_that_goes_away_does_not_end_the_run(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(12))
    ours, theirs = pty.openpty()
    async with service(api_key) as server:
        streams = {"env": environment(server, TERM="xterm"), "stderr": theirs, "stdout": asyncio.subprocess.DEVNULL}
        async with started("run", file, "--out", tmp_path / "out", "--rate", "4/s", **streams) as process:
            os.close(theirs)
            await until(lambda: len(posts(server)) > 1)
            os.close(ours)  # what is written from now on fails
            assert (await ended(process)).code == 0
    assert len(lines_of(tmp_path / "out/results.jsonl")) == 12


async def test_a_full_disk_loses_no_outcome(api_key: str, tmp_path: Path) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))

    file = write_lines(tmp_path / "in.jsonl", *images(400))
    command_line = ("run", file, "--out", tmp_path / "out", "--max-outstanding", 40, "--rate", "1000/s")
    async with service(api_key) as server:
        result = await command(*command_line, server=server, preexec_fn=small_disk)
        accepted = {post["task_id"] for post in posts(server)}
        assert result.code == 1
        assert 0 < len(accepted) < 400
        told = (tmp_path / "out/results.jsonl").read_text() + result.stderr
        assert all(task_id in told for task_id in accepted)
        assert "goes on, once the ledger is in order" in " ".join(result.stderr.split())
        assert "pays for nothing twice" not in result.stderr
        again = await command(*command_line, server=server)
        assert again.code == 0
        assert len(posts(server)) == 400


async def test_where_no_ledger_can_be_written_nothing_is_sent(api_key: str, tmp_path: Path) -> None:
    def no_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    file = write_lines(tmp_path / "in.jsonl", *images(3))
    async with service(api_key) as server:
        result = await command("run", file, "--out", tmp_path / "out", server=server, preexec_fn=no_disk)
        assert not posts(server)
    assert result.code == 2
    assert "cannot be written" in result.stderr


async def test_run_again_goes_on_after_a_signal_and_after_a_kill(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(40))
    command_line = ("run", file, "--out", tmp_path / "out", "--max-outstanding", 10, *FAST)
    async with service(api_key, speed=40) as server:
        for number in (signal.SIGINT, signal.SIGKILL):
            async with started(*command_line, server=server) as process:
                goal = min(len(posts(server)) + 15, 35)
                await until(lambda goal=goal: len(posts(server)) >= goal)
                process.send_signal(number)
                await asyncio.wait_for(process.wait(), 60)
        result = await command(*command_line, server=server)
        assert result.code == 0
        assert len(posts(server)) == 40
        assert {line["task_id"] for line in lines_of(tmp_path / "out/results.jsonl")} == {
            post["task_id"] for post in posts(server)
        }
        assert "40 of 40 completed" in result.stderr
        assert "known from earlier runs" in result.stderr
        again = await command(*command_line, server=server)
        assert again.code == 0
        assert len(lines_of(tmp_path / "out/results.jsonl")) == 40
        assert len(posts(server)) == 40


async def test_a_second_run_into_the_same_folder_is_refused_and_harms_nothing(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(6))
    async with service(api_key, standing=True) as server:
        async with started("run", file, "--out", tmp_path / "out", *FAST, server=server) as process:
            await until(lambda: len(posts(server)) == 6)
            second = await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
            assert second.code == 2
            assert str(process.pid) in second.stderr
            server.emulator.advance(60)  # 100 minutes of the service
            assert (await ended(process)).code == 0
        assert len(posts(server)) == 6
    assert len(lines_of(tmp_path / "out/results.jsonl")) == 6


async def test_what_was_given_up_is_not_said_to_go_on_with_the_next_run(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1), {"key": "other", "model": "gpt-4o-image", "prompt": "a pier"})
    lost = {"method": "POST", "path": "/v1/images", "model": images(1)[0]["model"], "drop": "after"}
    async with service(api_key, idempotency=False, faults=[lost]) as server:
        first = await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
        assert first.code == 1
        assert "job unknown" in first.stderr
        assert "the same command again goes on" in first.stderr
        assert (await command("job", "resolve", tmp_path / "out", "k0", "--give-up")).code == 0
        again = await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
    told = " ".join(again.stderr.split())
    assert again.code == 1
    assert "1 request was given up: it is never sent again, and may have been paid for" in told
    assert "the same command again" not in told
    assert "job unknown" not in told
    assert "can still settle it" in lines_of(tmp_path / "out/errors.jsonl")[0]["error"]["message"]


async def test_a_budget_ends_the_run_with_code_3_and_a_larger_one_goes_on(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(8))
    command_line = ("run", file, "--out", tmp_path / "out", *FAST, "--max-credits")
    async with service(api_key) as server:
        first = await command(*command_line, 10, server=server)
        assert first.code == 3
        assert len(posts(server)) == 4
        assert "max_credits=10" in first.stderr
        assert "the same command again with more --max-credits goes on" in first.stderr
        second = await command(*command_line, 20, server=server)
        assert second.code == 0
        assert len(posts(server)) == 8


async def test_changed_input_is_told_and_not_paid_for(api_key: str, tmp_path: Path) -> None:
    async with service(api_key) as server:
        file = write_lines(tmp_path / "in.jsonl", *images(3))
        assert (await command("run", file, "--out", tmp_path / "out", *FAST, server=server)).code == 0
        write_lines(file, {"key": "k0", "model": "gpt-4o-image", "prompt": "something else"}, images(2)[1])
        result = await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
        assert result.code == 1
        write_lines(file, *images(3, prompt="all changed"))
        again = await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
        assert len(posts(server)) == 3
    told = " ".join(result.stderr.split())
    assert "1 request has another body" in told
    assert "1 request of earlier runs did not come" in told
    export = f"the ledger has it: evolink-async job export {tmp_path / 'out/job.db'}"
    assert f"results.jsonl is without what became of them in earlier runs; {export}" in told
    assert lines_of(tmp_path / "out/results.jsonl") == []
    assert export in " ".join(again.stderr.split())


async def test_foreign_text_neither_colours_nor_moves_anything(api_key: str, tmp_path: Path) -> None:
    rows = [{"key": "[red]\x1b[31mk\x1b]0;title\x07", "model": "gpt-4o-image", "prompt": "[bold]a\x1b[2J"}]
    file = write_lines(tmp_path / "in.jsonl", *rows)
    async with service(api_key, failure_share=1) as server:
        result = await command("run", file, "--out", tmp_path / "out", server=server)
    assert "\x1b" not in result.stderr
    assert "[red]k failed" in result.stderr
    assert lines_of(tmp_path / "out/errors.jsonl")[0]["key"] == rows[0]["key"]


async def test_credits_that_will_not_do_are_told_early(api_key: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(60))
    async with service(api_key, credits=100) as server:
        result = await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
    assert result.code == 3
    told = re.search(r"all 60 requests cost about ([\d.]+) credits, and there are 100", " ".join(result.stderr.split()))
    assert told is not None
    assert 100 < float(told[1]) <= 150  # where answers are awaited, that of the others


def test_what_the_whole_file_costs_is_told_also_while_results_are_being_saved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """28 of the 40 that are paid for are neither outstanding nor completed yet."""
    paid = {"credits_spent": Decimal(75), "credits_reserved": Decimal(25)}
    counts = {"completed": 2, "not_submitted": 3}
    stats = PoolStats(total=60, pulled=60, waiting=17, outstanding=10, untaken=0, counts=counts, **paid)
    balance = _Balance(Screen(), Decimal(100), 60)
    balance.look(dataclasses.replace(stats, credits_spent=Decimal(0)))  # where answers are awaited it seems less
    assert not capsys.readouterr().err
    balance.look(stats)
    balance.look(stats)
    assert capsys.readouterr().err.count("all 60 requests cost about 150 credits, and there are 100") == 1


async def test_results_are_saved_into_the_folder_and_what_could_not_be_is_fetched_the_next_time(
    api_key: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(3))
    gone = {"method": "GET", "path": "/results", "status": 404}
    async with service(api_key, faults=[gone]) as server:
        first = await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
        assert first.code == 1
        assert "3 of them not saved" in first.stderr
        assert all(
            line["error"]["code"] or line["error"]["message"] for line in lines_of(tmp_path / "out/results.jsonl")
        )
        assert not list((tmp_path / "out").glob("*.png"))
        server.emulator.set_faults([])
        again = await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
        assert again.code == 0
        assert len(posts(server)) == 3
    lines = lines_of(tmp_path / "out/results.jsonl")
    assert {path for line in lines for path in line["files"]} == {
        str(path) for path in (tmp_path / "out").glob("*.png")
    }
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"k0-1.png", "k1-1.png", "k2-1.png"}


@pytest.mark.parametrize("name", ["errors.jsonl", "results.jsonl"])
async def test_a_file_that_the_run_would_write_anew_is_not_read(api_key: str, tmp_path: Path, name: str) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(3))
    async with service(api_key, failure_share=0.5, seed=3) as server:
        await command("run", file, "--out", tmp_path / "out", *FAST, server=server)
        before, sent = (tmp_path / "out" / name).read_bytes(), len(posts(server))
        assert before
        result = await command("run", tmp_path / "out" / name, "--out", tmp_path / "out", *FAST, server=server)
        assert result.code == 2
        assert "another --out" in " ".join(result.stderr.split())
        assert (tmp_path / "out" / name).read_bytes() == before
        assert len(posts(server)) == sent


async def test_pictures_beside_a_list_are_uploaded_for_it(emulator: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / f"pictures/{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([number]))
    table = tmp_path / "in.csv"
    rows = "".join(f"k{number},as a painting,pictures/{number}.png\n" for number in range(3))
    table.write_text("key,prompt,image_urls\n" + rows)
    result = await command("run", table, "--model", "gpt-4o-image", "--out", tmp_path / "out", *FAST, server=emulator)
    assert result.code == 0, result.stderr
    assert {line["key"] for line in lines_of(tmp_path / "out/results.jsonl")} == {"k0", "k1", "k2"}
    assert emulator.emulator.book()["files"] == {"stored": 0, "uploads": 3, "overwritten": 0}
    table.write_text("key,prompt,image_urls\nk0,x,pictures/none.png\n")
    result = await command("run", table, "--model", "gpt-4o-image", "--out", tmp_path / "out2", server=emulator)
    assert result.code == 2
    assert "line 2: image_urls[0]: no file" in result.stderr


async def test_a_folder_that_was_copied_away_goes_on_there_when_its_links_are_dead(
    api_key: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(2), {"model": "suno-v5-beta", "prompt": "a song", "key": "song"})
    async with service(api_key) as server:
        assert (await command("run", file, "--out", "out", *FAST, server=server, cwd=tmp_path)).code == 0
        shutil.copytree(tmp_path / "out", tmp_path / "moved", copy_function=shutil.copyfile)  # as cp -r: no marks
        shutil.rmtree(tmp_path / "out")
        server.emulator.advance(25 * 3600)
        again = await command("run", file, "--out", "moved", *FAST, server=server, cwd=tmp_path)
        assert (again.code, len(posts(server))) == (0, 3), again.stderr
    files = [path for line in lines_of(tmp_path / "moved/results.jsonl") for path in line["files"]]
    assert len(files) >= 3
    assert all(path.startswith("moved/") and (tmp_path / path).is_file() for path in files)
