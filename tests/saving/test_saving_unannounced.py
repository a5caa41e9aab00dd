"""Transfers of which nothing tells the length: a cut one looks like a whole one (F19)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mediahost import Call, answer, media_host

from evolink_async import AsyncEvoLink, DownloadError, RetryPolicy

MP3 = b"ID3\x04\0\0\0\0\0\0" + b"\xff\xfb\x90\0" * 500
WEBM = b"\x1aE\xdf\xa3....webm" + bytes(2000)
ANY = bytes(range(1, 200)) * 10
FILES = {"mp3": ("audio/mpeg", MP3), "webm": ("video/webm", WEBM), "bin": ("application/octet-stream", ANY)}


@pytest.fixture
async def saver() -> AsyncIterator[AsyncEvoLink]:
    fast = RetryPolicy(base_delay=0.001, max_delay=0.002)
    async with AsyncEvoLink(base_url="http://127.0.0.1:9", retry=fast, allow_private_hosts=True) as client:
        yield client


@pytest.mark.parametrize("ending", FILES)
async def test_a_cut_transfer_without_a_length_is_not_taken_for_the_file(
    saver: AsyncEvoLink, tmp_path: Path, ending: str
) -> None:
    content_type, whole = FILES[ending]

    async def handler(call: Call, writer: asyncio.StreamWriter) -> None:
        cut = {1: 700, 2: 1200}.get(call.number, len(whole))
        answer(writer, whole[:cut], length=None, content_type=content_type)

    async with media_host(handler) as host:
        [path] = await saver.save(f"{host.url}/result", tmp_path)
    assert path.name == f"result.{ending}"
    assert path.read_bytes() == whole
    assert len(host.calls) == 4


async def test_a_transfer_without_a_length_that_is_always_cut_elsewhere_is_an_error_and_no_file(
    saver: AsyncEvoLink, tmp_path: Path
) -> None:
    async def handler(call: Call, writer: asyncio.StreamWriter) -> None:
        answer(writer, MP3[: 700 + call.number], length=None, content_type="audio/mpeg")

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="neither the answer nor the mp3 tells its length"):
            await saver.save(f"{host.url}/result", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", FILES)
async def test_what_came_twice_in_the_same_length_is_kept_and_told(
    saver: AsyncEvoLink, tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    content_type, whole = FILES[ending]

    async def handler(call: Call, writer: asyncio.StreamWriter) -> None:
        answer(writer, whole, length=None, content_type=content_type)

    async with media_host(handler) as host:
        with caplog.at_level(logging.WARNING, "evolink_async.saving"):
            [path] = await saver.save(f"{host.url}/result", tmp_path)
    assert path.read_bytes() == whole
    assert len(host.calls) == 2
    assert [record.event for record in caplog.records] == ["file_odd"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("ending", FILES)
async def test_chunks_tell_that_a_transfer_is_whole(saver: AsyncEvoLink, tmp_path: Path, ending: str) -> None:
    content_type, whole = FILES[ending]

    async def handler(call: Call, writer: asyncio.StreamWriter) -> None:
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(whole), whole)
        answer(writer, chunks, length=None, content_type=content_type, transfer_encoding="chunked")

    async with media_host(handler) as host:
        [path] = await saver.save(f"{host.url}/result", tmp_path)
    assert path.read_bytes() == whole
    assert len(host.calls) == 1


async def test_a_part_that_is_shorter_than_it_says_is_not_the_rest_of_the_file(
    saver: AsyncEvoLink, tmp_path: Path
) -> None:
    async def handler(call: Call, writer: asyncio.StreamWriter) -> None:
        if call.number == 1:
            answer(writer, MP3[:700], length=len(MP3), etag='"one"')
            return
        start = int(call.headers["range"].removeprefix("bytes=").removesuffix("-"))
        end = len(MP3) - 10 if call.number == 2 else len(MP3)
        span = f"bytes {start}-{len(MP3) - 1}/{len(MP3)}"
        answer(writer, MP3[start:end], "206 Partial Content", etag='"one"', content_range=span)

    async with media_host(handler) as host:
        [path] = await saver.save(f"{host.url}/result", tmp_path)
    assert path.read_bytes() == MP3
    assert len(host.calls) == 3


@pytest.mark.looptime
async def test_a_slow_transfer_that_must_come_twice_has_the_time_for_it(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: asyncio.StreamWriter) -> None:
        answer(writer, MP3, length=None, content_type="audio/mpeg")
        for _ in range(400):  # each transfer alone takes longer than is waited without progress
            await asyncio.sleep(1)
            writer.write(bytes(5_000))
            await writer.drain()

    async with media_host(handler) as host:
        [path] = await saver.save(f"{host.url}/result", tmp_path)
    assert path.stat().st_size == len(MP3) + 2_000_000
    assert len(host.calls) == 2
    assert asyncio.get_running_loop().time() >= 800
