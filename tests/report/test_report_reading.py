"""What a report makes of a folder: of a run's, of half a run's, of a ledger's alone."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from report_folders import BEGUN, MODEL, item, outcome, png, write_ledger, write_outcomes

from evolink_async.errors import ConfigurationError, DownloadError, LedgerError
from evolink_async.report import items as items_room
from evolink_async.report import write_report
from evolink_async.report.items import Contents, Item
from evolink_async.report.reading import LONGEST_TEXT, read_folder


async def read(folder: Path) -> dict[str, Item]:
    return {item.name: item for item in (await read_folder(folder)).items}


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


async def test_lines_alone_tell_what_they_know(tmp_path: Path) -> None:
    folder = write_outcomes(tmp_path / "out", outcome(0), outcome(1, "failed"), outcome(2, key=None))
    items = await read(folder)
    assert items["k0"] == Item(
        identity="k0",
        key="k0",
        status="completed",
        kind="image",
        model=MODEL,
        prompt="a lighthouse, number 0",
        task_id="task-unified-0",
        spent=Decimal("2.5"),
        attempts=1,
        submitted_at=BEGUN,
        finished_at=BEGUN + timedelta(seconds=5),
    )
    assert (items["k1"].status, items["k1"].error, items["k1"].prompt) == (
        "failed",
        "it was refused",
        "a lighthouse, number 1",
    )
    assert items["0000000000000002-0"].key is None


async def test_the_ledger_knows_states_times_and_credits_and_the_lines_know_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_outcomes(folder, outcome(0), outcome(1, "failed"), outcome(2, "not_submitted", attempts=0, task=None))
    await write_ledger(folder, {"k0": "completed", "k1": "failed", "k2": "entered", "late": "accepted"}, duration=4.25)
    items = await read(folder)
    assert [(item.name, item.status) for item in items.values()] == [
        ("k0", "completed"),
        ("k1", "failed"),
        ("k2", "not_submitted"),
        ("late", "unfinished"),
    ]
    assert items["k0"].prompt == "a lighthouse, number 0"
    assert (items["k0"].seconds, items["k0"].service_seconds, items["k0"].detection_delay) == (5.0, 4.25, 0.75)
    assert (items["k0"].spent, items["k0"].reserved) == (Decimal("2.5"), Decimal(0))
    assert (items["k1"].error_code, items["k1"].error, items["k1"].spent) == (
        "content_policy",
        "it was refused",
        Decimal(0),
    )
    assert (items["late"].spent, items["late"].reserved, items["late"].prompt) == (Decimal(0), Decimal("2.5"), None)


async def test_a_ledger_alone_is_enough_and_the_missing_prompts_are_told(tmp_path: Path) -> None:
    contents = await read_folder(await write_ledger(tmp_path / "out", {"k0": "completed", "k1": "unsettled"}))
    completed, unknown = contents.items
    assert completed.links == ("https://files.example/k0.png",)
    assert (unknown.status, unknown.error, unknown.reserved) == ("unknown", "the connection was cut", Decimal("2.5"))
    assert contents.totals.reserved == Decimal("2.5")
    assert [note for note in contents.notes if "prompts" in note]


async def test_what_was_generated_and_not_saved_says_why(tmp_path: Path) -> None:
    error = DownloadError("the link was gone")
    folder = write_outcomes(tmp_path / "out", outcome(0, error=error))
    items = await read(await write_ledger(folder, {"k0": "completed"}))
    assert (items["k0"].status, items["k0"].error) == ("completed", "the link was gone")


async def test_a_line_that_the_ledger_has_overtaken_does_not_bring_its_old_error(tmp_path: Path) -> None:
    folder = write_outcomes(tmp_path / "out", outcome(0, "unknown", error=DownloadError("nobody knows")))
    items = await read(await write_ledger(folder, {"k0": "completed"}))
    assert (items["k0"].status, items["k0"].error) == ("completed", None)


async def test_another_request_under_a_known_key_is_shown_beside_the_first(tmp_path: Path) -> None:
    folder = write_outcomes(tmp_path / "out", outcome(0, "rejected", task=None, error=DownloadError("another body")))
    contents = await read_folder(await write_ledger(folder, {"k0": "completed"}))
    assert [item.status for item in contents.items] == ["completed", "rejected"]


async def test_half_a_line_of_a_killed_run_is_told_and_left_out(tmp_path: Path) -> None:
    whole = {"identity": "a", "key": "a", "status": "completed", "model": MODEL}
    write(tmp_path / "out/results.jsonl", whole, b"[1]\n", b'{"identity": "b", "sta')
    contents = await read_folder(tmp_path / "out")
    assert [item.name for item in contents.items] == ["a"]
    assert contents.notes == ["The files held 2 lines that could not be read."]


async def test_bad_lines_and_batch_lines_have_their_prompts(tmp_path: Path) -> None:
    error = {"status": "rejected", "code": "bad_line", "message": "n: 3 is not accepted", "task_id": None}
    write(
        tmp_path / "out/errors.jsonl",
        {"custom_id": "b", "body": {"model": MODEL, "prompt": "waves"}, "line": 1, "error": error},
        {"text": "{nonsense", "line": 2, "error": error},
    )
    items = await read(tmp_path / "out")
    assert (items["b"].prompt, items["b"].model, items["b"].status) == ("waves", MODEL, "rejected")
    assert items["errors.jsonl:2"].prompt == "{nonsense"


async def test_values_of_any_type_are_survived(tmp_path: Path) -> None:
    odd: list[Any] = [None, True, -1, 1e400, 10**30, "x", "", [], {}, [[]], {"a": 1}, "2026-13-45", "0001-01-01T00:00Z"]
    names = ["key", "identity", "status", "kind", "model", "prompt", "task_id", "urls", "files", "credits", "attempts"]
    names += ["submitted_at", "finished_at", "error", "body"]
    write(tmp_path / "out/results.jsonl", *(dict.fromkeys(names, value) for value in odd))
    write(tmp_path / "out/errors.jsonl", *({"error": dict.fromkeys(names, value)} for value in odd))
    write(
        tmp_path / "out/progress.jsonl",
        *(dict.fromkeys(("at", "elapsed", "posts", "rate_limited", "rate"), value) for value in odd),
    )
    contents = await read_folder(tmp_path / "out")
    assert contents.totals.requests == 2 * len(odd)
    assert contents.samples == []


async def test_only_files_in_the_folder_are_linked(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png())
    for name in ("k0-1.png", "sub/deep.png", "od#d? name.png", "javascript:alert(1).png"):
        (folder / name).write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    good = [str(folder / "k0-1.png"), "gone/elsewhere/k0-1.png", str(folder / "sub/deep.png"), "od#d? name.png"]
    good.append("javascript:alert(1).png")
    bad = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "a\x00b.png", "x" * 5000, "/etc/passwd", ""]
    bad += ["pipe.png", "https://example.com/a.png", ".", "..", "missing.png"]
    write(folder / "results.jsonl", {"identity": "a", "status": "completed", "files": [*good, *bad]})
    [item] = (await read_folder(folder)).items
    assert item.files == ("k0-1.png", "k0-1.png", "sub/deep.png", "od#d? name.png", "javascript:alert(1).png")
    assert list(item.elsewhere) == bad


async def test_a_folder_that_was_moved_still_finds_its_files(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/k0-1.png").write_bytes(png())
    write(tmp_path / "moved/results.jsonl", {"identity": "a", "status": "completed", "files": ["out/k0-1.png"]})
    [item] = (await read_folder(tmp_path / "moved")).items
    assert item.files == ("k0-1.png",)


async def test_links_go_to_the_web_only(tmp_path: Path) -> None:
    urls = [
        "javascript:alert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
        "https://a.example/x.png",
        "http://b/\n",
        7,
    ]
    write(tmp_path / "out/results.jsonl", {"identity": "a", "status": "completed", "urls": urls})
    [item] = (await read_folder(tmp_path / "out")).items
    assert item.links == ("https://a.example/x.png",)


async def test_a_long_prompt_is_cut_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "out/results.jsonl", {"identity": "a", "status": "completed", "prompt": "x" * 100_000})
    [item] = (await read_folder(tmp_path / "out")).items
    assert item.prompt == "x" * LONGEST_TEXT + "… (95,000 more characters)"


async def test_of_a_large_job_the_first_are_shown_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items_room, "MOST_ITEMS", 3)
    folder = write_outcomes(tmp_path / "out", *(outcome(number) for number in range(7)))
    await write_ledger(folder, {f"k{number}": "completed" for number in range(6)})
    contents = await read_folder(folder)
    assert [(item.name, item.prompt is not None) for item in contents.items] == [
        ("k0", True),
        ("k1", True),
        ("k2", True),
    ]
    assert contents.totals.requests == 7
    assert contents.totals.spent == Decimal("17.5")


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty folder", "a folder of something else"])
async def test_where_nothing_of_a_run_is_there_is_no_report(there: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if there == "a file":
        folder.write_text("x")
    elif there != "nothing":
        folder.mkdir()
    if there == "a folder of something else":
        (folder / "notes.txt").write_text("x")
    with pytest.raises(ConfigurationError, match="the folder that a run has written"):
        await read_folder(folder)


async def test_a_ledger_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write_outcomes(tmp_path / "out", outcome(0))
    (folder / "job.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(LedgerError):
        await read_folder(folder)


async def test_of_several_jobs_it_is_the_default_one(tmp_path: Path) -> None:
    await write_ledger(tmp_path / "out", {"x": "completed"}, name="other")
    assert [item.name for item in (await read_folder(tmp_path / "out")).items] == ["x"]
    await write_ledger(tmp_path / "out", {"y": "completed"}, name="third")
    with pytest.raises(LedgerError, match="none is called default"):
        await read_folder(tmp_path / "out")
    await write_ledger(tmp_path / "out", {"z": "completed"})
    contents = await read_folder(tmp_path / "out")
    assert [item.name for item in contents.items] == ["z"]
    assert "3 jobs" in contents.notes[0]


async def test_every_run_adds_its_samples_and_they_are_told_apart(tmp_path: Path) -> None:
    write_outcomes(tmp_path / "out", outcome(0))
    lines = [
        {"at": f"2026-11-20T12:00:0{second}Z", "elapsed": elapsed, "posts": 5, "rate_limited": 1, "rate": None}
        for second, elapsed in ((1, 1.0), (2, 2.0), (7, 1.0), (8, 2.0))
    ]
    write(tmp_path / "out/progress.jsonl", *lines)
    contents = await read_folder(tmp_path / "out")
    assert [[sample.elapsed for sample in run] for run in contents.runs()] == [[1.0, 2.0], [1.0, 2.0]]


def test_what_was_sent_twice_has_no_delay() -> None:
    contents = Contents("x")
    usual = {"submitted_at": BEGUN, "finished_at": BEGUN + timedelta(seconds=9), "service_seconds": 8.5}
    contents.add(Item(identity="a", status="completed", **usual))  # type: ignore[arg-type]
    contents.add(Item(identity="b", status="completed", sent_twice=True, **usual))  # type: ignore[arg-type]
    assert list(contents.totals.delays) == [0.5]
    assert list(contents.totals.took) == [9.0, 9.0]


def test_a_clock_that_was_set_back_hides_how_long_a_task_took() -> None:
    contents = Contents("x")
    contents.add(item(0, submitted_at=BEGUN, finished_at=BEGUN - timedelta(hours=1), service_seconds=8.5))
    assert contents.items[0].seconds is None
    assert list(contents.totals.delays) == list(contents.totals.took) == []


async def test_pages_of_one_folder_that_are_written_at_once_do_not_take_each_others_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_outcomes(tmp_path / "out", outcome(0))
    both_written, replace = threading.Barrier(2, timeout=20), os.replace

    def replace_when_both_are_written(*paths: Path) -> None:
        both_written.wait()
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_when_both_are_written)
    assert await asyncio.gather(write_report(folder), write_report(folder)) == [folder / "report.html"] * 2
    assert not list(folder.glob(".report.html*"))
