"""Files that are no ledger, or no longer one, or lie where they can't be trusted: refused, and left as they are."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import random
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ledger_world import as_nobody, ask, assert_balanced, enter_all, entry, opened, row_in
from loop_executor import in_loop

from evolink_async import ConfigurationError, LedgerError
from evolink_async.ledger import State, Todo, open_job, open_ledger, what_to_do
from evolink_async.ledger.file import MIGRATIONS, VERSION
from evolink_async.ledger.places import file_system_of, ledger_path


async def a_ledger(path: Path, requests: int = 3) -> Path:
    async with opened(path) as job:
        for number in range(requests):
            await row_in(job, State.COMPLETED, f"k{number}")
    return path


async def assert_refused(path: Path, match: str) -> None:
    """By a run and by a look, and not one byte is changed."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerError, match=match):
        await open_job(path)
    with pytest.raises(LedgerError, match=match):
        async with open_ledger(path):
            pass
    assert (path.read_bytes() if path.is_file() else None) == before
    left = {other.name for other in path.parent.iterdir()} - {path.name}
    assert not {name for name in left if name.endswith((".lock", ".new", "-wal", "-shm"))}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"prompt,size\na lighthouse,1024x1024\n", "no SQLite file"),
        (b"SQLite format 3", "no SQLite file"),
        (b"SQLite format 3\0", "damaged|no ledger"),
        (b"SQLite format 3\0" + b"\0" * 4080, "damaged|no ledger"),
        (b"SQLite format 3\0" + b"\xff" * 9000, "damaged|no ledger"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "no SQLite file"),
    ],
    ids=["empty", "text", "half a header", "header", "zeros", "ones", "png"],
)
async def test_what_is_no_ledger_is_refused_and_left_alone(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "job.db"
    path.write_bytes(content)
    await assert_refused(path, match)


async def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    ask(path, "CREATE TABLE photo (id INTEGER PRIMARY KEY)")
    await assert_refused(path, "no ledger of evolink_async")
    assert ask(path, "PRAGMA journal_mode") == [("delete",)]


async def test_a_newer_ledger_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = await a_ledger(tmp_path / "job.db")
    ask(path, f"PRAGMA user_version = {VERSION + 1}")
    await assert_refused(path, rf"version {VERSION + 1}.*up to {VERSION}.*install a newer")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
async def test_a_ledger_that_was_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = await a_ledger(tmp_path / "job.db", 100)
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    with pytest.raises(LedgerError, match="damaged"):
        await open_job(path)


async def test_a_ledger_with_a_flipped_bit_is_refused_or_as_it_was_but_never_empty(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_loop(monkeypatch)
    path = await a_ledger(quick_path / "job.db", 60)
    whole = path.read_bytes()
    refused = 0
    for seed in range(200):
        chance = random.Random(seed)
        spoilt = bytearray(whole)
        for _ in range(chance.choice([1, 3, 20])):
            spoilt[chance.randrange(len(spoilt))] ^= 1 << chance.randrange(8)
        path.write_bytes(spoilt)
        try:
            async with opened(path) as job:
                known = await enter_all(job, [entry(f"k{number}", f"k{number}") for number in range(60)])
            # What a text says may be spoilt, but every request is known, and none is paid for again.
            assert job.census.known == 60, f"seed {seed}"
            assert {what_to_do(one) for one in known} <= {Todo.DELIVER, Todo.REFUSE}, f"seed {seed}"
        except LedgerError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("spoilt", ["state = 'complexed'", "submitted_at = 1 << 62", "content = 'text'"])
async def test_a_row_that_makes_no_sense_is_a_damage_too(tmp_path: Path, spoilt: str) -> None:
    path = await a_ledger(tmp_path / "job.db")
    ask(path, f"UPDATE request SET {spoilt} WHERE identity = 'k1'")  # the sums are right
    async with opened(path) as job:
        with pytest.raises(LedgerError, match="damaged"):
            await enter_all(job, [entry("k0"), entry("k1")])
        assert [known.row.key for known in await enter_all(job, [entry("k2")])] == ["k2"]


@pytest.mark.parametrize(
    "spoilt",
    [
        "DELETE FROM result WHERE request = (SELECT id FROM request WHERE identity = 'k1')",
        "UPDATE result SET task = NULL",
        """UPDATE result SET task = '{"id": "no id"}'""",
        f"UPDATE result SET task = '{'[' * 100_000}'",
        "UPDATE request SET task_id = NULL",
    ],
)
async def test_an_ended_request_without_its_task_is_a_damage_too(tmp_path: Path, spoilt: str) -> None:
    path = await a_ledger(tmp_path / "job.db")
    ask(path, spoilt)
    async with opened(path) as job:
        with pytest.raises(LedgerError, match="damaged"):
            await enter_all(job, [entry("k0"), entry("k1")])


async def test_a_file_with_a_second_name_is_refused_by_both_until_one_is_gone(tmp_path: Path) -> None:
    path, second = await a_ledger(tmp_path / "job.db"), tmp_path / "again.db"
    async with opened(path) as job:
        await row_in(job, State.COMPLETED, "in the log")
        second.hardlink_to(path)  # by this name the log isn't found, and its request would be paid again
        with pytest.raises(LedgerError, match=r"2 names.*remove the others"):
            await open_job(second)
    with pytest.raises(LedgerError, match="2 names"):
        await open_job(path)
    second.unlink()
    async with opened(path) as job:
        assert job.census.known == 4


async def test_what_a_process_that_was_killed_has_made_the_file_from_is_no_second_name(tmp_path: Path) -> None:
    path, fresh = await a_ledger(tmp_path / "[job].db"), tmp_path / ".[job].db.0123abcd.new"
    fresh.hardlink_to(path)
    async with opened(path):
        assert not fresh.exists()


@pytest.mark.parametrize(
    "spoilt",
    [
        "UPDATE request SET reserved = 1 WHERE identity = 'k1'",
        "UPDATE request SET spent = spent + 1 WHERE identity = 'k1'",
        "UPDATE job SET requests = requests + 1",
        "UPDATE job SET id = 7",
        "DELETE FROM request WHERE identity = 'k1'",
        "DELETE FROM job",
        "INSERT INTO past_try (request, number, state, replayed, reserved) VALUES (5, 1, 'failed', 0, 9)",
    ],
)
async def test_a_ledger_whose_sums_are_wrong_is_refused(tmp_path: Path, spoilt: str) -> None:
    path = await a_ledger(tmp_path / "job.db")
    ask(path, spoilt)
    with pytest.raises(LedgerError, match="do not add up"):
        await open_job(path)


async def test_a_folder_and_a_file_in_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    await assert_refused(tmp_path / "folder", "directory")
    with pytest.raises(LedgerError, match="does the folder exist"):
        await open_job(tmp_path / "nowhere" / "job.db")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(LedgerError):
        await open_job(tmp_path / "file" / "job.db")


async def test_looking_at_a_ledger_that_is_not_there_makes_none(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"there is no ledger .*typo\.db"):
        async with open_ledger(tmp_path / "typo.db"):
            pass
    assert list(tmp_path.iterdir()) == []


async def test_a_ledger_or_a_folder_that_may_not_be_written_to_is_refused() -> None:
    with as_nobody() as folder:
        path = await a_ledger(folder / "job.db")
        path.chmod(stat.S_IRUSR)
        with pytest.raises(LedgerError, match="Permission denied"):
            await open_job(path)
        path.chmod(0)
        with pytest.raises(LedgerError, match="Permission denied"):
            await open_job(path)
        path.chmod(0o600)
        folder.chmod(0o555)
        try:
            with pytest.raises(LedgerError):
                await open_job(path)
            with pytest.raises(LedgerError):
                await open_job(folder / "new.db")
        finally:
            folder.chmod(0o777)
        await (await open_job(path)).aclose()


async def test_a_new_ledger_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "job.db"
    with monkeypatch.context() as patch:
        patch.setattr("evolink_async.ledger.file.MIGRATIONS", (("CREATE TABLE job (id)", "NO SQL AT ALL"),))
        with pytest.raises(LedgerError, match="NO"):
            await open_job(path)
    assert list(tmp_path.iterdir()) == []
    await a_ledger(path)
    assert [other.name for other in tmp_path.iterdir()] == ["job.db"]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere folders cannot be synchronized")
async def test_what_is_committed_and_the_name_of_a_new_ledger_outlive_the_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the disk keeps its word (F118)."""
    in_loop(monkeypatch)
    path = tmp_path / "job.db"
    connections: list[sqlite3.Connection] = []
    folders: list[bool] = []
    real_connect, sync = sqlite3.connect, os.fsync

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        connections.append(real_connect(*args, **options))
        return connections[-1]

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folders.append(path.exists())
        sync(descriptor)

    monkeypatch.setattr(sqlite3, "connect", connect)
    monkeypatch.setattr(os, "fsync", fsync)
    async with opened(path) as job:
        assert folders == [True]
        await row_in(job, State.COMPLETED, "k")
        [writer] = [each for each in connections[1:] if each.total_changes]  # the first one has made the file
        assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: each commit waits for the disk


async def test_a_new_ledger_is_whole_though_its_log_cannot_be_written_back_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.db"
    readers: list[sqlite3.Connection] = []
    real_connect = sqlite3.connect

    class KeepsItsLog(sqlite3.Connection):
        """As on a full disk: closing leaves the log as it is, and says nothing."""

        def close(self) -> None:
            for file in tmp_path.glob(".*.new"):
                readers.append(reader := real_connect(file, check_same_thread=False))
                reader.execute("SELECT * FROM sqlite_schema").fetchall()
            super().close()

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", functools.partial(real_connect, factory=KeepsItsLog))
        await (await open_job(path)).aclose()
    assert len(readers) == 1
    readers[0].close()
    await a_ledger(path)


async def test_two_that_make_the_same_ledger_in_the_same_moment_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.db"
    original = os.link

    def slow_link(source: Any, target: Any) -> None:
        if not path.exists():
            with closing(sqlite3.connect(source)) as other, closing(sqlite3.connect(path)) as first:
                other.backup(first)
                first.execute("INSERT INTO job (name, created_at) VALUES ('of the first', 0)")
                first.commit()
        original(source, target)

    monkeypatch.setattr(os, "link", slow_link)
    async with opened(path, "of the second"):
        pass
    assert ask(path, "SELECT name FROM job ORDER BY id") == [("of the first",), ("of the second",)]


async def test_a_file_system_without_hard_links_can_hold_a_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    await a_ledger(tmp_path / "job.db")
    assert [other.name for other in tmp_path.iterdir()] == ["job.db"]


# Where locks and the log can be trusted


MOUNTS = """\
22 27 0:20 / /sys rw,nosuid - sysfs sysfs rw
27 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 27 0:45 / /mnt/share rw - nfs4 server:/export rw
41 27 0:46 / /mnt/my\\040files rw - cifs //server/files rw
42 40 0:47 / /mnt/share/local rw - ext4 /dev/vdb rw
43 27 0:48 / /content/drive rw - fuse.drive drive rw
44 27 0:49 / /safe rw - fuse.gocryptfs gocryptfs rw
45 27 0:50 / /twice rw - ext4 /dev/vdc rw
46 45 0:51 / /twice rw - fuse.sshfs host: rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/job.db", "ext4"),
        ("/mnt/share/job.db", "nfs4"),
        ("/mnt/share/local/job.db", "ext4"),
        ("/mnt/shared/job.db", "ext4"),
        ("/mnt/my files/a/job.db", "cifs"),
        ("/content/drive/MyDrive/job.db", "fuse.drive"),
        ("/twice/job.db", "fuse.sshfs"),
    ],
)
def test_the_file_system_of_a_path_is_found(path: str, kind: str) -> None:
    assert file_system_of(path, MOUNTS) == kind


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("nfs4", True), ("cifs", True), ("fuse.drive", True), ("fuse.gocryptfs", False), ("ext4", False), ("zfs", False)],
)
async def test_a_ledger_on_another_machine_s_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, refused: bool
) -> None:
    path = await a_ledger(tmp_path / "job.db")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"27 1 254:1 / / rw - ext4 /dev/vda rw\n40 27 0:45 / {tmp_path} rw - {kind} there rw\n")
    monkeypatch.setattr("evolink_async.ledger.places._MOUNTS", str(mounts))
    if refused:
        await assert_refused(path, f"{kind} file system.*local|{kind} file system.*this machine")
        with pytest.raises(LedgerError, match=kind):
            await open_job(tmp_path / "new.db")
    else:
        await (await open_job(path)).aclose()


async def test_a_place_that_cannot_have_a_write_ahead_log_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSharedMemory(sqlite3.Connection):
        def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
            return super().execute(statement.replace("journal_mode = WAL", "journal_mode = DELETE"), *args)

    path = await a_ledger(tmp_path / "job.db")
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=NoSharedMemory))
    with pytest.raises(LedgerError, match="write-ahead log"):
        await open_job(path)


async def test_a_place_where_locks_do_not_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = await a_ledger(tmp_path / "job.db")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda file, how: None)
        with pytest.raises(LedgerError, match="locks do not work"):
            await open_job(path)

    def no_locks(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(LedgerError, match="No locks available"):
        await open_job(path)
    assert_balanced(path)


async def test_an_sqlite_that_is_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 22, 0))
    with pytest.raises(LedgerError, match=r"SQLite 3\.24"):
        await open_job(tmp_path / "job.db")


# Names


@pytest.mark.parametrize(
    "url", ["", " ", ":memory:", "sqlite:///job.db", "https://host/job.db", "a\0b", "out/", b"job.db", 5, None]
)
def test_what_names_no_file_is_a_configuration_error(url: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"job\.db"):
        open_ledger(url)


@pytest.mark.parametrize("name", ["", " ", "x" * 257, "\ud800", 5, None])
async def test_a_job_needs_a_name(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigurationError, match="job's name"):
        await open_job(tmp_path / "job.db", name)
    assert list(tmp_path.iterdir()) == []


async def test_every_way_to_a_file_leads_to_the_same_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = await a_ledger(tmp_path / "job.db")
    (tmp_path / "link.db").symlink_to(path)
    async with opened(path):
        for other in ("job.db", "./job.db", "link.db", Path("link.db")):
            with pytest.raises(LedgerError, match="in use"):
                await open_job(other)
    assert ledger_path("link.db") == path


@pytest.mark.parametrize("name", ["job ?.db", "job #1%.db", "работа.db", "a'b\".db"])
async def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = await a_ledger(tmp_path / name)
    assert [other.name for other in tmp_path.iterdir()] == [name]
    async with open_ledger(path) as ledger:
        assert (await ledger.job().stats()).requests == 3


# Older ledgers


def _with_another_version(patch: pytest.MonkeyPatch, *statements: str) -> None:
    from evolink_async.ledger import file

    patch.setattr(file, "MIGRATIONS", (*file.MIGRATIONS, statements))
    patch.setattr(file, "VERSION", VERSION + 1)


async def test_an_older_ledger_is_brought_up_and_a_copy_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await a_ledger(tmp_path / "job.db")
    _with_another_version(monkeypatch, "ALTER TABLE job ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'")
    async with opened(path) as job:
        assert job.census.known == 3
    assert ask(path, "SELECT colour FROM job") == [("blue",)]
    assert ask(path, "PRAGMA user_version") == [(VERSION + 1,)]
    copy = tmp_path / f"job.db.v{VERSION}"
    assert ask(copy, "PRAGMA user_version") == [(VERSION,)]
    assert ask(copy, "SELECT count(*) FROM request") == [(3,)]


async def test_a_ledger_is_not_brought_up_under_a_program_that_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await a_ledger(tmp_path / "job.db")
    async with opened(path) as job, opened(path, "other"):
        with monkeypatch.context() as patch:
            _with_another_version(patch, "ALTER TABLE job ADD COLUMN colour TEXT")
            with pytest.raises(LedgerError, match="in use by this process"):
                async with open_ledger(path):
                    pass
            with pytest.raises(LedgerError, match="in use by this process"):
                await open_job(path, "third")
        await row_in(job, State.COMPLETED, "goes on")
    assert ask(path, "PRAGMA user_version") == [(VERSION,)]
    _with_another_version(monkeypatch, "ALTER TABLE job ADD COLUMN colour TEXT")
    async with open_ledger(path) as ledger:
        assert (await ledger.job().stats()).requests == 4
    assert ask(path, "PRAGMA user_version") == [(VERSION + 1,)]
    assert sorted(other.name for other in tmp_path.iterdir()) == ["job.db", f"job.db.v{VERSION}"]


async def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = await a_ledger(tmp_path / "job.db")
    with monkeypatch.context() as patch:
        _with_another_version(patch, "ALTER TABLE job ADD COLUMN colour TEXT", "NO SQL AT ALL")
        with pytest.raises(LedgerError, match="NO"):
            await open_job(path)
    assert ask(path, "PRAGMA user_version") == [(VERSION,)]
    async with opened(path) as job:
        assert job.census.known == 3


@pytest.mark.parametrize("version", range(1, VERSION))
async def test_a_ledger_of_an_earlier_version_learns_to_remember_and_keeps_its_prices(
    tmp_path: Path, version: int
) -> None:
    path = await a_ledger(tmp_path / "job.db")
    with closing(sqlite3.connect(path)) as connection:
        for table in ("price", "learned"):
            connection.execute(f"DROP TABLE {table}")
        for statement in [
            of for statements in MIGRATIONS[:version] for of in statements if "price (" in of or "learned" in of
        ]:
            connection.execute(statement)
        connection.execute("INSERT INTO price (job, class, credits) VALUES (1, 'image', 2500000), (1, 'free', 0)")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.commit()
    requests = ask(path, "SELECT * FROM request")
    async with opened(path) as job:
        assert (job.run, job.learned, job.census.known) == (2, None, 3)
        assert (job.price_of("image"), job.price_of("free")) == (2.5, None)
        assert await job.remember("{}")
    assert ask(path, "SELECT * FROM request") == requests
    assert ask(path, "SELECT * FROM learned") == [(1, "{}")]
    assert ask(tmp_path / f"job.db.v{version}", "SELECT count(*) FROM request") == [(3,)]
