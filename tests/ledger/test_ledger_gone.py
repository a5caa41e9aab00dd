"""A ledger whose file is deleted, moved or replaced while its job runs: that is noticed, and nothing more is sent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ledger_world import (
    accept,
    ask,
    assert_balanced,
    at,
    end_of,
    enter_all,
    entered,
    entry,
    intend,
    new_task,
    opened,
    row_in,
    task_of,
)
from loop_executor import in_loop

from evolink_async import LedgerError
from evolink_async.ledger import State, open_job
from evolink_async.ledger.locks import FileLock

pytestmark = pytest.mark.looptime


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)


def delete(path: Path) -> None:
    """As `rm job.db*` does."""
    for other in path.parent.glob(f"{path.name}*"):
        other.unlink()


def replace(path: Path) -> None:
    """As an editor or a restored copy does."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


def move_the_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [(delete, "was deleted or moved away"), (move_the_folder, "was deleted or moved"), (replace, "was replaced")],
)
async def test_a_ledger_that_is_no_longer_at_its_place_is_not_written_any_more(
    tmp_path: Path, spoil: Callable[[Path], None], match: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "folder" / "job.db"
    path.parent.mkdir()
    job = await open_job(path)
    sending, row = await row_in(job, State.SENDING, "a"), await entered(job, "b")
    spoil(path)
    with pytest.raises(LedgerError, match=f"{match}.*Put it back"):
        await intend(job, row)
    assert (row.state, row.attempts) == (State.ENTERED, 0)
    assert job.broken is not None
    with pytest.raises(LedgerError, match=match):
        await accept(job, sending, new_task(task_id="task-paid"), at=at())
    assert "task task-paid was accepted for request a, and that is not in the ledger yet" in caplog.text
    with pytest.raises(LedgerError, match=r"task-paid"):
        await job.aclose()


async def test_a_ledger_that_is_put_back_is_written_again_with_all_that_was_kept(tmp_path: Path) -> None:
    path, away = tmp_path / "job.db", tmp_path / "away.db"
    async with opened(path) as job:
        row = await row_in(job, State.SENDING, "a")
        path.rename(away)
        with pytest.raises(LedgerError):
            await accept(job, row, new_task(task_id="task-paid"), at=at())
        away.rename(path)
        await intend(job, await entered(job, "b"))
        assert job.broken is None
    assert ask(path, "SELECT task_id FROM request ORDER BY id") == [("task-paid",), (None,)]
    assert_balanced(path)


def delete_the_log(path: Path) -> None:
    path.with_name(f"{path.name}-wal").unlink()


def replace_the_log(path: Path) -> None:
    replace(path.with_name(f"{path.name}-wal"))


@pytest.mark.parametrize("spoil", [delete_the_log, replace_the_log])
async def test_a_log_that_is_deleted_or_replaced_is_noticed_and_an_orderly_end_saves_what_it_held(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "job.db"
    job = await open_job(path)
    known = await row_in(job, State.ACCEPTED, "known")
    sending, unsent = await row_in(job, State.SENDING, "sending"), await entered(job, "unsent")
    spoil(path)
    with pytest.raises(LedgerError, match=r"'job.db-wal', the newest part of the ledger.*a crash would lose"):
        await intend(job, unsent)
    with pytest.raises(LedgerError):
        await accept(job, sending, new_task(task_id="task-paid"), at=at())
    assert "task task-paid was accepted for request sending" in caplog.text
    with pytest.raises(LedgerError, match="task-paid"):
        await job.aclose()
    path.with_name("job.db-wal").unlink(missing_ok=True)  # the other one
    states = {"known": State.ACCEPTED, "sending": State.UNSETTLED, "unsent": State.ENTERED}
    async with opened(path) as job:
        rows = [found.row for found in await enter_all(job, [entry(key, key) for key in states])]
        assert {row.identity: row.state for row in rows} == states
        assert rows[0].task_id == known.task_id


async def test_a_log_without_its_ledger_is_not_taken_for_that_of_a_new_one(tmp_path: Path) -> None:
    path, away, log = tmp_path / "job.db", tmp_path / "away.db", tmp_path / "job.db-wal"
    job = await open_job(path)
    await row_in(job, State.ACCEPTED, "k")
    path.rename(away)
    with pytest.raises(LedgerError):
        await entered(job, "late")
    with pytest.raises(LedgerError):
        await job.aclose()
    before = log.read_bytes()
    with pytest.raises(LedgerError, match=r"is gone, but its 'job.db-wal' is there.*put the file back"):
        await open_job(path)
    assert (path.exists(), log.read_bytes()) == (False, before)
    away.rename(path)
    async with opened(path) as job:
        known = await job.enter(entry("k", "k"))
        assert known.row.state is State.ACCEPTED
    path.unlink()
    log.touch()  # an empty one has nothing to tell
    async with opened(path) as job:
        assert job.census.known == 0


async def test_a_ledger_behind_a_link_and_one_named_from_the_current_folder_are_found_wherever_the_program_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "job.db")
    monkeypatch.chdir(tmp_path)
    for name in ("link.db", "plain.db"):
        async with opened(Path(name)) as job:
            os.chdir("/")
            await row_in(job, State.COMPLETED, "k")
            os.chdir(tmp_path)
    assert ask(tmp_path / "real" / "job.db", "SELECT count(*) FROM request") == [(1,)]


async def test_where_files_have_no_number_a_ledger_is_written_all_the_same_and_a_deleted_one_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.db"
    job = await open_job(path)
    unnumbered = SimpleNamespace(stat=lambda path: SimpleNamespace(st_dev=os.stat(path).st_dev, st_ino=0))
    monkeypatch.setattr("evolink_async.ledger.file.os", unnumbered)
    row = await row_in(job, State.SENDING, "k")
    replace(path)
    assert await accept(job, row, new_task(), at=at())
    delete(path)
    with pytest.raises(LedgerError, match="deleted"):
        await job.ended(row, end_of(task_of(row)), at=at())
    with pytest.raises(LedgerError):
        await job.aclose()


async def test_who_runs_a_ledger_that_was_deleted_takes_neither_lock_nor_file_from_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "job.db"
    old = await open_job(path)
    row = await row_in(old, State.SENDING, "k")
    delete(path)
    new = await open_job(path)
    await row_in(new, State.ACCEPTED, "k")
    with pytest.raises(LedgerError):
        await accept(old, row, new_task(), at=at())
    with pytest.raises(LedgerError):
        await old.aclose()
    with pytest.raises(LedgerError, match="in use by this process"):
        await open_job(path)
    await row_in(new, State.ACCEPTED, "other")
    await new.aclose()
    async with opened(path) as job:
        assert [known.row.state for known in await enter_all(job, [entry("k", "k"), entry("other", "other")])] == [
            State.ACCEPTED,
            State.ACCEPTED,
        ]


def test_a_lock_file_that_was_deleted_and_is_another_s_now_is_left_to_him(tmp_path: Path) -> None:
    path = tmp_path / "job.db.1.lock"
    mine = FileLock(path, "job")
    path.unlink()
    his = FileLock(path, "job")
    mine.release()
    assert path.exists()
    with pytest.raises(LedgerError, match="in use"):
        FileLock(path, "job")
    his.release()
    assert not path.exists()


async def test_the_look_at_the_place_is_two_stats_per_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "job.db"
    looks: list[object] = []
    stat = os.stat

    def counted(path: Any, **options: Any) -> os.stat_result:
        looks.append(path)
        return stat(path, **options)

    async with opened(path) as job:
        store: Any = job._turns._store  # type: ignore[union-attr]
        carry_out, turns = store.carry_out, list[int]()
        monkeypatch.setattr(
            store, "carry_out", lambda batch: (turns.append(batch.job is not None), carry_out(batch))[1]
        )
        monkeypatch.setattr(os, "stat", counted)
        rows = [known.row for known in await enter_all(job, [entry(f"k{number}") for number in range(100)])]
        for future in [intend(job, row) for row in rows]:
            await future
        monkeypatch.undo()
    assert looks == [path, path.with_name("job.db-wal")] * sum(turns)
