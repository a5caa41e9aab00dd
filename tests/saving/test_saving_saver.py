"""`Saver`, the entry for pools: names, what is there already, what is refused, what an end in the middle leaves."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mediahost import Call, MediaHost, answer, media_host, picture

from evolink_async import (
    AsyncEvoLink,
    ClosedError,
    ConfigurationError,
    DownloadError,
    ResultExpiredError,
    RetryPolicy,
    Task,
    TaskFailedError,
)
from evolink_async.saving import Saver, download, folder
from evolink_async.saving.folder import Folder, PartFile, read_mark, set_mark
from evolink_async.saving.names import request_stem, unique_stem

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="marks, locks and case probes as Linux has them")

Writer = asyncio.StreamWriter
PNG = picture()
OTHER = picture(80)
MP4 = b"\0\0\0\x18ftypmp42" + bytes(12) + b"\0\0\0\x0cmoov" + bytes(4)
FAST = RetryPolicy(base_delay=0.001, max_delay=0.002)


@pytest.fixture(autouse=True)
def _no_temporary_files(tmp_path: Path) -> Iterator[None]:
    folder._prepared.cache_clear()
    yield
    left = [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    assert not left, f"temporary files are left: {left}"
    assert not any(folder._room._promised.values())


@pytest.fixture
async def client() -> AsyncIterator[AsyncEvoLink]:
    """A client that may fetch from loopback, retries at once, and whose API is nowhere."""
    async with AsyncEvoLink(base_url="http://127.0.0.1:9", retry=FAST, allow_private_hosts=True) as client:
        yield client


async def good(call: Call, writer: Writer) -> None:
    answer(writer, OTHER if "other" in call.path else PNG)


def task_with(*links: str, id: str = "task-unified-1-abc", **fields: Any) -> Task:
    wire = {"id": id, "status": "completed", "type": "image", "results": list(links)}
    return Task.model_validate(wire | fields)


class Named(NamedTuple):
    """How a pool names a request."""

    key: str | None = None
    index: int = 0
    identity: str = "0123456789abcdef-0"

    def as_options(self) -> dict[str, Any]:
        return self._asdict()


def names_in(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


# --- names ------------------------------------------------------------------------------------------------------


async def test_files_are_named_after_the_key_else_after_number_and_identity(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    async with media_host(good) as host:
        task = task_with(f"{host.url}/1", f"{host.url}/2")
        saver = Saver(client._core, tmp_path / "new" / "out")
        keyed = await saver.save(task, key="light-7", index=3, identity="light-7")
        plain = await saver.save(task, key=None, index=3, identity="0123456789abcdef-0")
        unsafe = await saver.save(task, key="a/b: c", index=4, identity="a/b: c")
    assert [path.name for path in keyed] == ["light-7-1.png", "light-7-2.png"]
    assert [path.name for path in plain] == ["000003-01234567-1.png", "000003-01234567-2.png"]
    assert [path.name for path in unsafe] == ["a_b_c-212e4b10-1.png", "a_b_c-212e4b10-2.png"]
    assert all(path.parent == tmp_path / "new" / "out" for path in (*keyed, *plain, *unsafe))


@pytest.mark.parametrize(
    "key",
    [
        "CON",
        "nul.txt",
        "COM1",
        "a.",
        "a ",
        "-rf",
        ".hidden",
        "e\u0301",
        "x" * 300,
        "a\\b",
        "a:b",
        "..",
        "",
        "\u202egnp",
    ],
)
def test_a_key_that_is_no_safe_name_is_changed_and_told_by_its_hash(key: str) -> None:
    stem = request_stem(key, 0, key)
    assert stem != key
    assert stem[-9] == "-"
    assert int(stem[-8:], 16) >= 0
    assert len(f"{stem}-99999.webp".encode()) <= 255


@given(st.lists(st.text(max_size=300), max_size=8, unique=True))
def test_no_two_keys_have_the_same_name_even_where_case_is_no_difference(keys: list[str]) -> None:
    assert len({unique_stem(key) for key in keys}) == len(keys)
    folded = {unique_stem(key, case_matters=False).casefold() for key in keys}
    assert len(folded) == len(keys)


async def test_on_a_file_system_without_case_keys_that_differ_in_it_have_files_of_their_own(
    client: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name.startswith(".EVOLINK-") or exists(path))
    saver = Saver(client._core, tmp_path)
    async with media_host(good) as host:
        lower = await saver.save(task_with(f"{host.url}/1"), key="a", index=0, identity="a")
        upper = await saver.save(task_with(f"{host.url}/2"), key="A", index=1, identity="A")
    assert lower[0].name == "a-1.png"
    assert upper[0].name == "A-559aead0-1.png"


# --- what is there already --------------------------------------------------------------------------------------


async def test_a_killed_run_s_files_are_known_by_their_marks(client: AsyncEvoLink, tmp_path: Path) -> None:
    async with media_host(good) as host:
        task = task_with(f"{host.url}/1", f"{host.url}/2")
        first = await Saver(client._core, tmp_path).save(task, key="k", index=0, identity="k")
        assert read_mark(tmp_path / "k-2.png") == f"task-unified-1-abc/2/{len(PNG)}"
        assert await Saver(client._core, tmp_path).save(task, key="k", index=0, identity="k") == first
    assert len(host.calls) == 2


async def test_recorded_files_that_are_whole_need_no_request_whatever_they_are_called(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    saved = [tmp_path / "000007-01234567-1.png", tmp_path / "000007-01234567-2.mp4"]
    saved[0].write_bytes(PNG)
    saved[1].write_bytes(MP4)
    async with media_host(good) as host:
        task = task_with(f"{host.url}/1", f"{host.url}/2")
        options = Named(index=8).as_options()
        saver = Saver(client._core, tmp_path)
        assert await saver.save(task, saved=[str(path) for path in saved], **options) == tuple(saved)
        assert host.calls == []
        saved[0].unlink()
        again = await saver.save(task, saved=[str(path) for path in saved], **options)
        assert again == (tmp_path / "000008-01234567-1.png", saved[1])
        assert [call.path for call in host.calls] == ["/1"]
        nothing_left = task.model_copy(update={"results": ()})  # of a task from the list
        assert await saver.save(nothing_left, saved=[str(path) for path in again], **options) == again


@pytest.mark.parametrize("how", ["cut", "empty", "gone", "folder", "link", "another type"])
async def test_a_recorded_file_that_is_not_whole_is_fetched(client: AsyncEvoLink, tmp_path: Path, how: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    recorded = tmp_path / "elsewhere" / "a.png"
    (tmp_path / "real.png").write_bytes(PNG)
    if how == "folder":
        recorded.mkdir()
    elif how == "link":
        recorded.symlink_to(tmp_path / "real.png")
    elif how != "gone":
        recorded.write_bytes({"cut": PNG[:-20], "empty": b"", "another type": MP4}[how])
    async with media_host(good) as host:
        task = task_with(f"{host.url}/1")
        paths = await Saver(client._core, tmp_path / "out").save(task, saved=[str(recorded)], **Named("k").as_options())
    assert paths == (tmp_path / "out" / "k-1.png",)
    assert len(host.calls) == 1


async def test_the_files_of_a_folder_that_was_copied_without_marks_and_removed_are_known_by_their_recorded_names(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    async with media_host(good) as host:
        task = task_with(f"{host.url}/1", f"{host.url}/2")
        saved = await Saver(client._core, tmp_path / "out").save(task, **Named("k").as_options())
        shutil.copytree(tmp_path / "out", tmp_path / "moved", copy_function=shutil.copyfile)
        shutil.rmtree(tmp_path / "out")
        host.calls.clear()
        saver = Saver(client._core, tmp_path / "moved")
        found = await saver.save(task, saved=[str(path) for path in saved], **Named("k").as_options())
        assert found == (tmp_path / "moved" / "k-1.png", tmp_path / "moved" / "k-2.png")
        assert host.calls == []


@pytest.mark.parametrize("how", ["cut", "marked", "type", "link", "recorded is there", "not recorded"])
async def test_what_may_be_another_file_is_not_taken_for_a_recorded_one(
    client: AsyncEvoLink, tmp_path: Path, how: str
) -> None:
    there, recorded = tmp_path / "moved" / "k-1.png", tmp_path / "out" / "k-1.png"
    there.parent.mkdir()
    recorded.parent.mkdir()
    if how == "link":
        (tmp_path / "real.png").write_bytes(OTHER)
        there.symlink_to(tmp_path / "real.png")
    else:
        there.write_bytes({"cut": OTHER[:-20], "type": MP4}.get(how, OTHER))
    if how == "marked":
        set_mark(there, f"task-unified-9-xyz/1/{len(OTHER)}")
    if how == "recorded is there":
        recorded.write_bytes(PNG[:-20])
    before = there.read_bytes()
    async with media_host(good) as host:
        with pytest.raises(DownloadError, match="another file is there already"):
            await Saver(client._core, tmp_path / "moved").save(
                task_with(f"{host.url}/1"),
                saved=[] if how == "not recorded" else [str(recorded)],
                **Named("k").as_options(),
            )
    assert there.read_bytes() == before


@pytest.mark.parametrize("moved", [True, False])
async def test_a_recorded_path_where_another_result_lies_by_now_is_not_this_one_s(
    client: AsyncEvoLink, tmp_path: Path, moved: bool
) -> None:
    recorded, there = tmp_path / "out" / "k-1.png", tmp_path / "moved" / "k-1.png"
    recorded.parent.mkdir()
    there.parent.mkdir()
    recorded.write_bytes(OTHER)
    set_mark(recorded, f"task-unified-9-xyz/1/{len(OTHER)}")
    if moved:
        there.write_bytes(PNG)
    async with media_host(good) as host:
        task = task_with(f"{host.url}/1")
        paths = await Saver(client._core, tmp_path / "moved").save(
            task, saved=[str(recorded)], **Named("k").as_options()
        )
        assert len(host.calls) == (0 if moved else 1)
    assert paths == (there,)
    assert there.read_bytes() == PNG


async def test_the_file_of_another_task_under_the_same_key_is_never_taken_for_this_one_s(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    async with media_host(good) as host:
        saver = Saver(client._core, tmp_path)
        await saver.save(task_with(f"{host.url}/1"), **Named("k").as_options())
        with pytest.raises(DownloadError, match="another file is there already"):
            await saver.save(task_with(f"{host.url}/other", id="task-unified-2-xyz"), **Named("k").as_options())
        same = await saver.save(task_with(f"{host.url}/3", id="task-unified-3-xyz"), **Named("k").as_options())
        assert len(host.calls) == 3
    assert same[0].read_bytes() == PNG


async def test_a_file_without_a_mark_is_compared_and_kept_if_it_is_the_same(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    (tmp_path / "k-1.png").write_bytes(PNG)
    before = (tmp_path / "k-1.png").stat()
    async with media_host(good) as host:
        [path] = await Saver(client._core, tmp_path).save(task_with(f"{host.url}/1"), **Named("k").as_options())
    assert path.stat().st_ino == before.st_ino
    assert len(host.calls) == 1


def test_a_marked_file_of_another_size_is_whole_only_if_its_content_says_so(tmp_path: Path) -> None:
    place = Folder(tmp_path)
    for name, content, whole in (
        ("a.png", PNG, True),
        ("b.png", PNG[:-20], False),
        ("c.mp3", b"ID3" + bytes(9), False),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        result = "task-unified-1-abc/1"
        set_mark(path, f"{result}/{len(content) + 1}")
        assert place.kept(path, result) == (path if whole else None), name
        set_mark(path, f"{result}/{len(content)}")
        assert place.kept(path, result) == path, name


# --- links that are dead or missing -----------------------------------------------------------------------------


async def test_a_fresh_task_is_asked_for_once_for_all_dead_links(client: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        await (good(call, writer) if call.path.startswith("/new") else gone(call, writer))

    async def gone(call: Call, writer: Writer) -> None:
        answer(writer, b"", "403 Forbidden")

    asked = 0
    async with media_host(handler) as host:

        async def fresh() -> Task:
            nonlocal asked
            asked += 1
            return task_with(f"{host.url}/new1", f"{host.url}/new2")

        task = task_with(f"{host.url}/1", f"{host.url}/2")
        saver = Saver(client._core, tmp_path)
        assert len(await saver.save(task, fresh=fresh, **Named("k").as_options())) == 2
        assert len(await saver.save(task_with(), fresh=fresh, **Named("j").as_options())) == 2
        assert asked == 2

        async def as_dead() -> Task:
            return task

        with pytest.raises(ResultExpiredError):
            await saver.save(task, fresh=as_dead, **Named("i").as_options())


async def test_files_are_numbered_in_the_order_of_the_links_each_once(client: AsyncEvoLink, tmp_path: Path) -> None:
    contents = {"/z": PNG, "/a": MP4, "/m": PNG + b"m"}

    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, contents[call.path])

    async with media_host(handler) as host:
        task = task_with(f"{host.url}/z", f"{host.url}/a", f"{host.url}/z", f"{host.url}/m")
        files = await Saver(client._core, tmp_path).save(task, **Named("k").as_options())
    assert files == (tmp_path / "k-1.png", tmp_path / "k-2.mp4", tmp_path / "k-3.png")
    assert [file.read_bytes() for file in map(Path, files)] == [PNG, MP4, PNG + b"m"]


async def test_what_could_be_saved_is_in_the_error_of_what_could_not(client: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, b"<html>" if call.path == "/1" else PNG)

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="result 1 of task task-unified-1-abc") as caught:
            await Saver(client._core, tmp_path).save(
                task_with(f"{host.url}/1", f"{host.url}/2"), **Named("k").as_options()
            )
    assert caught.value.files == (tmp_path / "k-2.png",)


async def test_a_task_that_did_not_complete_has_nothing_to_save(client: AsyncEvoLink, tmp_path: Path) -> None:
    failed = task_with(status="failed", error={"code": "service_error"})
    with pytest.raises(TaskFailedError):
        await Saver(client._core, tmp_path).save(failed, **Named("k").as_options())


async def test_a_link_that_was_replaced_is_fetched_from_the_start(client: AsyncEvoLink, tmp_path: Path) -> None:
    """The old link's part could be of another copy, whatever its date says."""

    async def handler(call: Call, writer: Writer) -> None:
        if call.path == "/new":
            assert "range" not in call.headers
            answer(writer, OTHER, etag='"one"')
        elif call.number == 1:
            answer(writer, PNG[:900], length=len(PNG), etag='"one"')
        else:
            answer(writer, b"", "403 Forbidden")

    async with media_host(handler) as host:

        async def fresh() -> Task:
            return task_with(f"{host.url}/new")

        [path] = await Saver(client._core, tmp_path).save(
            task_with(f"{host.url}/old"), fresh=fresh, **Named("k").as_options()
        )
    assert path.read_bytes() == OTHER


# --- before anything is paid ------------------------------------------------------------------------------------


async def test_a_folder_that_cannot_be_used_is_found_before_anything_is_paid(
    client: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "\ud800"):
        with pytest.raises(ConfigurationError, match="cannot write into"):
            await Saver(client._core, wrong).prepare()

    def read_only(*args: object, **options: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "open", read_only)
        with pytest.raises(ConfigurationError, match="Read-only file system"):
            await Saver(client._core, tmp_path).prepare()
    for wrong in ("a\0b", 5, None, "ftp://host/x", "http://host/x", "s3://", "S3://bucket/x", "s3:///x"):
        with pytest.raises(ConfigurationError):
            Saver(client._core, wrong)  # type: ignore[arg-type]
    await Saver(client._core, tmp_path / "good").prepare()
    assert names_in(tmp_path / "good") == []


async def test_leftovers_of_dead_processes_are_removed_and_those_of_the_living_are_not(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    import fcntl

    orphan, held = tmp_path / ".evolink-0000000000000000.part", tmp_path / ".evolink-1111111111111111.part"
    mine = tmp_path / "notes.part"
    for path in (orphan, held, mine):
        path.write_bytes(b"x")
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        await Saver(client._core, tmp_path).prepare()
        assert names_in(tmp_path) == [held.name, mine.name]
    await Saver(client._core, tmp_path).prepare()
    assert names_in(tmp_path) == [mine.name]
    mine.unlink()


def test_a_temporary_file_that_was_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = folder._lock, []

    def after_a_clean_up(descriptor: int) -> bool | None:
        if not removed:
            removed.extend(path.unlink() or path for path in tmp_path.iterdir())
        return lock(descriptor)

    monkeypatch.setattr(folder, "_lock", after_a_clean_up)
    part = PartFile(tmp_path)
    part.open()
    assert part.path.exists()
    assert part.path not in removed
    part.discard()


async def test_without_locks_nobody_s_temporary_files_are_removed(
    client: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    other = tmp_path / ".evolink-0000000000000000.part"
    other.write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        await Saver(client._core, tmp_path).prepare()
    assert names_in(tmp_path) == [other.name]
    other.unlink()


# --- space ------------------------------------------------------------------------------------------------------


async def test_a_file_that_does_not_fit_is_refused_before_it_is_fetched(
    client: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = MP4 + bytes(download.FLUSH)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=len(large) - 1))

    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, large)

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match=r"not enough space in .* make room and save again"):
            await Saver(client._core, tmp_path).save(
                task_with(f"{host.url}/1", type="video"), **Named("k").as_options()
            )
        assert len(host.calls) == 1
    assert names_in(tmp_path) == []


async def test_what_is_promised_to_one_download_is_not_promised_to_another(
    client: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big, other = 10 * download.FLUSH, MP4 + bytes(2 * download.FLUSH)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage._replace(free=big + len(other) - 1))
    began = asyncio.Event()

    async def handler(call: Call, writer: Writer) -> None:
        if call.path == "/big":
            answer(writer, MP4, length=big)
            await writer.drain()
            began.set()
            await asyncio.sleep(30)
        answer(writer, other)

    async with media_host(handler) as host:
        saver = Saver(client._core, tmp_path)
        large = asyncio.create_task(saver.save(task_with(f"{host.url}/big", type="video"), **Named("v").as_options()))
        await began.wait()
        while not folder._room._promised.total():  # noqa: ASYNC110  (nobody tells us)
            await asyncio.sleep(0.001)
        task = task_with(f"{host.url}/1", type="video")
        with pytest.raises(DownloadError, match="MB of them for other downloads"):
            await saver.save(task, **Named("k").as_options())
        large.cancel()
        await asyncio.wait([large])
        assert len(await saver.save(task, **Named("k").as_options())) == 1


async def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_and_says_so(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    """A real limit of the operating system: no file of this process may be larger than 300 kB."""
    import resource
    import signal

    body = MP4 + bytes(2 * download.FLUSH)

    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, body)

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with media_host(handler) as host:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, old[1]))
        try:
            with pytest.raises(DownloadError, match="File too large: make room and save again"):
                await Saver(client._core, tmp_path).save(
                    task_with(f"{host.url}/1", type="video"), **Named("k").as_options()
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, ignored)
        assert len(host.calls) == 1
    assert names_in(tmp_path) == []


# --- many at once, and ends in the middle -----------------------------------------------------------------------


async def test_a_thousand_at_once_open_few_files_and_connections(client: AsyncEvoLink, tmp_path: Path) -> None:
    most = 0

    async def handler(call: Call, writer: Writer) -> None:
        nonlocal most
        most = max(most, psutil.Process().num_fds())
        answer(writer, PNG)

    before = psutil.Process().num_fds()
    async with media_host(handler) as host:
        saver = Saver(client._core, tmp_path)
        paths = await asyncio.gather(
            *(saver.save(task_with(f"{host.url}/{n}"), key=f"{n}", index=n, identity=f"{n}") for n in range(1000))
        )
    assert len({path for (path,) in paths}) == 1000
    assert most - before < 250


async def test_cancelled_saves_leave_whole_files_or_none_and_no_place_taken(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    async with media_host(good) as host:
        saver = Saver(client._core, tmp_path)
        for step in range(80):
            saving = asyncio.create_task(saver.save(task_with(f"{host.url}/1"), **Named(f"k{step}").as_options()))
            for _ in range(step):
                await asyncio.sleep(0)
            saving.cancel()
            await asyncio.wait([saving])
            for path in tmp_path.iterdir():
                assert path.name.startswith("k")
                assert path.read_bytes() == PNG
                path.unlink()
        places = client._core.open().media.places
        assert places._value == 128


async def test_closing_the_client_ends_saves_with_that_error(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def silent(call: Call, writer: Writer) -> None:
        asked.set()
        await asyncio.sleep(30)

    async with media_host(silent) as host:
        async with AsyncEvoLink(base_url=host.url) as client:
            saver = Saver(client._core, tmp_path)
            saving = asyncio.create_task(saver.save(task_with(f"{host.url}/1"), **Named("k").as_options()))
            await asked.wait()
        with pytest.raises(ClosedError):
            await saving
        with pytest.raises(ClosedError):
            await saver.save(task_with(f"{host.url}/1"), **Named("k").as_options())
    assert names_in(tmp_path) == []


# --- answers that lie about their length ------------------------------------------------------------------------


def lying(bodies: list[Callable[[Writer], None]]) -> Any:
    async def handler(call: Call, writer: Writer) -> None:
        bodies[min(call.number, len(bodies)) - 1](writer)

    return handler


async def saved_from(client: AsyncEvoLink, place: Path, *bodies: Callable[[Writer], None]) -> tuple[bytes, MediaHost]:
    async with media_host(lying(list(bodies))) as host:
        [path] = await Saver(client._core, place).save(task_with(f"{host.url}/1"), **Named("k").as_options())
    return path.read_bytes(), host


async def test_a_length_that_is_too_short_never_cuts_a_file(client: AsyncEvoLink, tmp_path: Path) -> None:
    def short(writer: Writer) -> None:
        answer(writer, PNG, length=500)

    def true(writer: Writer) -> None:
        answer(writer, PNG)

    content, host = await saved_from(client, tmp_path / "1", short, short, short, true)
    assert content == PNG
    assert len(host.calls) == 4
    async with media_host(lying([short])) as liar:
        with pytest.raises(DownloadError, match="before the png did, at the announced length"):
            await Saver(client._core, tmp_path / "2").save(task_with(f"{liar.url}/1"), **Named("k").as_options())
    assert names_in(tmp_path / "2") == []


async def test_an_odd_file_is_kept_once_the_server_has_said_twice_that_it_is_all(
    client: AsyncEvoLink, tmp_path: Path
) -> None:
    odd = PNG[:-12]  # as if its maker had forgotten the end

    def told(writer: Writer) -> None:
        answer(writer, odd)

    content, host = await saved_from(client, tmp_path, told)
    assert content == odd
    assert len(host.calls) == 2


# --- resuming ---------------------------------------------------------------------------------------------------

LONG_AGO, NOW = "Tue, 01 Sep 2026 10:00:00 GMT", "Thu, 26 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("modified", "date", "resumed"),
    [(LONG_AGO, NOW, True), (NOW, NOW, False), (LONG_AGO, None, False), ("x", NOW, False), (NOW, LONG_AGO, False)],
)
async def test_a_date_that_could_be_of_two_versions_resumes_nothing(
    client: AsyncEvoLink, tmp_path: Path, modified: str, date: str | None, resumed: bool
) -> None:
    headers = {"last_modified": modified} | ({"date": date} if date else {})

    async def handler(call: Call, writer: Writer) -> None:
        start = int(call.headers.get("range", "bytes=0-")[6:-1])
        if call.number == 1:
            answer(writer, PNG[:1000], length=len(PNG), **headers)
        elif start:
            span = f"bytes {start}-{len(PNG) - 1}/{len(PNG)}"
            answer(writer, PNG[start:], "206 Partial Content", content_range=span, **headers)
        else:
            answer(writer, PNG, **headers)

    async with media_host(handler) as host:
        [path] = await Saver(client._core, tmp_path).save(task_with(f"{host.url}/1"), **Named("k").as_options())
    assert path.read_bytes() == PNG
    assert ("range" in host.calls[1].headers) is resumed


async def test_a_part_of_a_file_of_another_length_is_not_appended(client: AsyncEvoLink, tmp_path: Path) -> None:
    longer = PNG + b"made by x"
    headers = {"last_modified": LONG_AGO, "date": NOW}

    async def handler(call: Call, writer: Writer) -> None:
        start = int(call.headers.get("range", "bytes=0-")[6:-1])
        if call.number == 1:
            answer(writer, PNG[:1000], length=len(PNG), **headers)
        elif start:
            span = f"bytes {start}-{len(longer) - 1}/{len(longer)}"
            answer(writer, longer[start:], "206 Partial Content", content_range=span, **headers)
        else:
            answer(writer, longer, **headers)

    async with media_host(handler) as host:
        [path] = await Saver(client._core, tmp_path).save(task_with(f"{host.url}/1"), **Named("k").as_options())
        assert len(host.calls) == 3
    assert path.read_bytes() == longer


def test_every_thread_that_saves_is_our_own() -> None:
    """The loop's own threads look up hosts for polls and submissions, and must not wait behind a slow disk."""
    import threading

    async def where() -> str:
        return await folder.in_thread(lambda: threading.current_thread().name)

    assert asyncio.run(where()).startswith("evolink disk")
    assert folder._threads(os.getpid(), "disk") is not folder._threads(os.getpid(), "uploads")


# --- time, and others' time -------------------------------------------------------------------------------------


@pytest.mark.looptime
@pytest.mark.parametrize(("pause", "cut_after"), [(10.0, 30.0), (2.0, 30.0), (0.1, None)])
async def test_below_a_kilobyte_a_second_for_half_a_minute_a_transfer_is_cut_and_resumed(
    client: AsyncEvoLink, tmp_path: Path, pause: float, cut_after: float | None
) -> None:
    """Nothing for 10 s at a time; 150 bytes every 2 s; 150 bytes every 0.1 s, which is fast enough."""
    body = MP4 + b"\0\0\0\0mdat" + bytes(90_000)
    times: list[float] = []

    async def handler(call: Call, writer: Writer) -> None:
        times.append(asyncio.get_running_loop().time())
        start = int(call.headers.get("range", "bytes=0-")[6:-1])
        if start:
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            answer(writer, body[start:], "206 Partial Content", content_range=span, etag='"one"')
            return
        answer(writer, body[:50], length=len(body), etag='"one"')
        for position in range(50, len(body), 150):
            writer.write(body[position : position + 150])
            await asyncio.sleep(pause)

    async with media_host(handler) as host:
        [path] = await Saver(client._core, tmp_path).save(
            task_with(f"{host.url}/1", type="video"), **Named("k").as_options()
        )
        assert len(host.calls) == (1 if cut_after is None else 2)
    assert path.read_bytes() == body
    if cut_after is not None:
        begun, resumed = times
        assert cut_after <= resumed - begun <= cut_after * 1.5


async def test_polls_and_submissions_don_t_wait_for_files(emulator: Any, tmp_path: Path) -> None:
    async def silent(call: Call, writer: Writer) -> None:
        await asyncio.sleep(60)

    async with (
        media_host(silent) as host,
        AsyncEvoLink(base_url=emulator.base_url, allow_private_hosts=True, max_connections=4) as client,
    ):
        saver = Saver(client._core, tmp_path)
        saves = [
            asyncio.create_task(saver.save(task_with(f"{host.url}/{n}"), key=f"{n}", index=n, identity=f"{n}"))
            for n in range(300)
        ]
        while len(host.calls) < 20:  # noqa: ASYNC110  (nobody tells us)
            await asyncio.sleep(0.01)
        async with asyncio.timeout(200):
            task = await client.images.generate(model="gpt-4o-image", prompt="a lighthouse")
        assert task.succeeded
        assert not any(save.done() for save in saves)
        for save in saves:
            save.cancel()
        await asyncio.wait(saves)
    assert names_in(tmp_path) == []


# --- the disk ---------------------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_is_too_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, link = os.fsync, os.link

    def fsync(descriptor: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    def linked(source: Path, target: Path, **options: Any) -> None:
        assert source.parent == target.parent
        assert source.read_bytes() == PNG
        steps.append("name")
        link(source, target, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", linked)
    part = PartFile(tmp_path)
    part.open()
    part.add(PNG)
    Folder(tmp_path).publish(part, "a.png", None)
    part.discard()
    assert steps == ["sync file", "name", "sync folder"]
    assert names_in(tmp_path) == ["a.png"]


@pytest.mark.parametrize("planted", ["link", "file"])
def test_a_temporary_file_is_never_one_that_is_there_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """F99: not even if its random name was guessed."""
    monkeypatch.setattr(folder.secrets, "token_hex", lambda count: "0" * 2 * count)
    mine, there = tmp_path / "mine.txt", tmp_path / f".evolink-{'0' * 16}.part"
    mine.write_bytes(b"mine")
    there.symlink_to(mine) if planted == "link" else there.hardlink_to(mine)
    part = PartFile(tmp_path)
    with pytest.raises(FileExistsError):
        part.open()
    part.discard()
    assert mine.read_bytes() == b"mine"
    there.unlink()  # it is there still


def test_a_file_that_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    part = PartFile(tmp_path)
    part.open()
    folder.remove_leftovers(tmp_path)
    assert part.path.exists()
    part.discard()
    assert names_in(tmp_path) == []
