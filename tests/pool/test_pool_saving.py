"""A pool that saves: an outcome has its files, and nothing is fetched or paid for twice."""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pool_world import drain, images

from evolink_async import (
    AsyncEvoLink,
    ClosedError,
    ConfigurationError,
    DownloadError,
    ImageRequest,
    TaskPool,
    VideoRequest,
)
from evolink_async.emulator import Emulator
from evolink_async.pool import savings
from evolink_async.pool.record import State
from evolink_async.saving import download, folder
from evolink_async.saving.folder import PartFile


def client_of(server: Any, **options: Any) -> AsyncEvoLink:
    return AsyncEvoLink(server.api_key, base_url=server.base_url, rate_limit="200/s", **options)


async def test_every_completed_outcome_has_its_files(api_key: str, tmp_path: Path) -> None:
    async with (
        Emulator(speed=100, api_key=api_key, failure_share=0.2, seed=2).serve() as server,
        client_of(server) as client,
        client.pool(images(20), save_to=tmp_path / "out") as pool,
    ):
        outcomes = await drain(pool)
    done = [outcome for outcome in outcomes if outcome.ok]
    assert 10 < len(done) < 20
    assert {path for outcome in done for path in outcome.files} == set((tmp_path / "out").iterdir())
    assert all(outcome.files[0].name == f"{outcome.key}-1.png" for outcome in done)
    assert not any(outcome.files for outcome in outcomes if not outcome.ok)


async def test_run_again_only_what_is_missing_is_fetched(api_key: str, tmp_path: Path) -> None:
    out, ledger = tmp_path / "out", tmp_path / "job.db"
    async with Emulator(speed=100, api_key=api_key).serve() as server, client_of(server) as client:
        async with client.pool(images(6), ledger=ledger, save_to=out) as pool:
            first = {outcome.key: outcome.files for outcome in await drain(pool)}
        first["k3"][0].unlink()  # type: ignore[attr-defined]
        before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        async with client.pool(images(6), ledger=ledger, save_to=out) as pool:
            second = {outcome.key: outcome.files for outcome in await drain(pool)}
        assert second == first
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert len(list(out.iterdir())) == 6
        async with client.pool(images(6), ledger=ledger) as pool:  # without a folder the files are told all the same
            assert {outcome.key: outcome.files for outcome in await drain(pool)} == first
        assert len(server.emulator.book()["posts"]) == 6


async def test_what_cannot_be_saved_is_completed_with_an_error_and_not_paid_for_again(
    api_key: str, tmp_path: Path
) -> None:
    out, ledger = tmp_path / "out", tmp_path / "job.db"
    out.mkdir()
    (out / "k1-1.png").write_bytes(b"somebody else's")
    async with Emulator(speed=100, api_key=api_key).serve() as server, client_of(server) as client:
        for _ in range(2):
            async with client.pool(images(3), ledger=ledger, save_to=out) as pool:
                outcomes = {outcome.key: outcome for outcome in await drain(pool)}
            assert outcomes["k1"].status == "completed"
            assert isinstance(outcomes["k1"].error, DownloadError)
            assert outcomes["k0"].ok
            assert outcomes["k2"].ok
        assert len(server.emulator.book()["posts"]) == 3
    assert (out / "k1-1.png").read_bytes() == b"somebody else's"


async def test_a_run_and_an_attached_task_are_saved_too(api_key: str, tmp_path: Path) -> None:
    async with Emulator(speed=100, api_key=api_key).serve() as server, client_of(server) as client:
        task = await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
        async with client.pool(save_to=tmp_path) as pool:
            pool.attach(task.id)
            outcome = await pool.run(ImageRequest(model="gpt-4o-image", prompt="a ship"))
            [attached] = await drain(pool)
    assert outcome.files[0].name == f"000000-{outcome.identity[:8]}-1.png"
    assert attached.files[0].name == f"{task.id}-1.png"
    assert {path.name for path in tmp_path.iterdir()} == {outcome.files[0].name, attached.files[0].name}


async def test_a_folder_that_cannot_be_is_told_before_anything_is_paid_for(api_key: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    async with Emulator(speed=100, api_key=api_key).serve() as server, client_of(server) as client:
        with pytest.raises(ConfigurationError):
            async with client.pool(images(3), save_to=tmp_path / "out"):
                pass
        assert server.emulator.book()["posts"] == []


async def test_a_download_holds_no_place_among_the_outstanding(api_key: str, tmp_path: Path) -> None:
    stalled = {"path": "/results", "stall": 100}
    async with Emulator(speed=100, api_key=api_key, faults=[stalled]).serve() as server, client_of(server) as client:
        async with client.pool(max_outstanding=1, save_to=tmp_path) as pool:
            runs = [asyncio.create_task(pool.run(request)) for request in images(3)]
            async with asyncio.timeout(200):
                while len(server.emulator.book()["posts"]) < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        outcomes = await asyncio.gather(*runs)
        assert all(outcome.status in ("completed", "unfinished") for outcome in outcomes)
        assert not any(outcome.ok for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A disk without room for another byte until `room` is set: by what it says is free, or only when it is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, says_so: bool = True) -> None:
        self.room = False
        flush, usage = PartFile.flush, shutil.disk_usage

        def flush_if_there_is_room(part: PartFile) -> None:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            flush(part)

        def usage_if_full(path: Path) -> Any:
            return usage(path) if self.room else usage(path)._replace(free=0)

        if says_so:
            monkeypatch.setattr(folder.shutil, "disk_usage", usage_if_full)
            monkeypatch.setattr(download, "FLUSH", 1000)  # smaller files are written at one go and don't ask
        else:
            monkeypatch.setattr(PartFile, "flush", flush_if_there_is_room)


@pytest.mark.parametrize("says_so", [True, False])
async def test_while_the_disk_is_full_saving_waits_and_no_more_is_paid_for(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, says_so: bool
) -> None:
    disk = FullDisk(monkeypatch, says_so=says_so)
    monkeypatch.setattr(savings, "FULL_PAUSE", 0.02)
    caplog.set_level(logging.WARNING, "evolink_async")

    async def make_room(server: Any) -> None:
        async with asyncio.timeout(200):
            while sum(record.event == "disk_full" for record in caplog.records if hasattr(record, "event")) < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert len(server.emulator.book()["posts"]) <= 10
        disk.room = True

    async with (
        Emulator(speed=100, api_key=api_key).serve() as server,
        client_of(server) as client,
        client.pool(iter(images(40)), save_to=tmp_path, max_outstanding=10) as pool,
    ):
        making = asyncio.create_task(make_room(server))
        outcomes = await drain(pool)
        await making
    assert [outcome.error for outcome in outcomes] == [None] * 40
    assert len(list(tmp_path.iterdir())) == 40
    events = [record.event for record in caplog.records if hasattr(record, "event")]
    assert events.count("disk_full") == events.count("disk_has_room") == 1


async def test_while_too_many_files_are_open_saving_waits_too(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Path] = []
    begin = PartFile.open

    def open_if_there_are_few(part: PartFile) -> None:
        if len(refused) < 60:
            refused.append(part.folder)
            raise OSError(errno.EMFILE, "Too many open files")
        begin(part)

    monkeypatch.setattr(savings, "FULL_PAUSE", 0.01)
    async with (
        Emulator(speed=100, api_key=api_key).serve() as server,
        client_of(server) as client,
        client.pool(images(10), save_to=tmp_path) as pool,
    ):
        monkeypatch.setattr(PartFile, "open", open_if_there_are_few)
        outcomes = await drain(pool)
    assert [outcome.error for outcome in outcomes] == [None] * 10
    assert len(refused) == 60
    assert len(list(tmp_path.iterdir())) == 10


async def test_a_disk_that_stays_full_is_not_waited_for_for_ever(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch)
    monkeypatch.setattr(savings, "FULL_PAUSE", 0.02)
    monkeypatch.setattr(savings, "FULL_PATIENCE", 0.2)
    async with (
        Emulator(speed=100, api_key=api_key).serve() as server,
        client_of(server) as client,
        asyncio.timeout(200),
        client.pool(images(40), save_to=tmp_path, max_outstanding=10) as pool,
    ):
        outcomes = await drain(pool)
    assert {outcome.status for outcome in outcomes} == {"completed"}
    assert all(isinstance(outcome.error, DownloadError) for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


async def test_leaving_a_pool_whose_disk_is_full_waits_for_no_room(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch)
    async with Emulator(speed=100, api_key=api_key).serve() as server, client_of(server) as client:
        async with asyncio.timeout(200), client.pool(save_to=tmp_path) as pool:
            running = asyncio.create_task(pool.run(images(1)[0]))
            while not pool._engine.stages.these(State.SAVING):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        outcome = await running
    assert outcome.status == "completed"
    assert isinstance(outcome.error, DownloadError)


async def test_a_file_that_never_fits_is_given_up_although_smaller_ones_are_saved_meanwhile(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)  # pictures have 3,000 bytes, the video 60,000
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(download, "FLUSH", 20_000)
    monkeypatch.setattr(savings, "FULL_PAUSE", 0.02)
    monkeypatch.setattr(savings, "FULL_PATIENCE", 4.0)

    async def some() -> AsyncIterator[ImageRequest | VideoRequest]:
        yield VideoRequest(model="veo3.1-fast-beta", prompt="waves", key="video")
        for request in images(10_000):
            if over.is_set():
                return
            yield request
            await asyncio.sleep(0.05)

    over = asyncio.Event()
    async with (
        Emulator(speed=200, api_key=api_key).serve() as server,
        client_of(server) as client,
        asyncio.timeout(200),
        client.pool(some(), save_to=tmp_path) as pool,
    ):
        async for outcome in pool:
            if outcome.key == "video":
                video = outcome
                over.set()
            else:
                assert outcome.ok
    assert isinstance(video.error, DownloadError)
    assert "make room" in str(video.error)


async def close_when_saving(client: AsyncEvoLink, pool: TaskPool) -> None:
    while len(pool._engine.stages.these(State.SAVING)) < 6:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await client.aclose()


@pytest.mark.parametrize("earlier", [False, True])
async def test_a_client_closed_while_results_are_saved_is_no_fault_of_the_pool(
    api_key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, earlier: bool
) -> None:
    async with Emulator(speed=100, api_key=api_key).serve() as server, client_of(server) as client:
        if earlier:
            await client.run_many(images(6), ledger=tmp_path / "job.db")
        server.emulator.set_faults([{"path": "/results/", "stall": 0}])
        pool = client.pool(images(6), ledger=tmp_path / "job.db", save_to=tmp_path / "out")
        closing = asyncio.create_task(close_when_saving(client, pool))
        with pytest.raises(ClosedError, match="closed under the pool"):
            async with pool:
                outcomes = await drain(pool)
        await closing
    assert [(str(outcome.status), type(outcome.error)) for outcome in outcomes] == [("completed", DownloadError)] * 6
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
