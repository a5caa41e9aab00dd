"""`client.save`: whole files or none, from hosts that behave and from hosts that don't."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mediahost import Call, MediaHost, answer, media_host, picture

from evolink_async import (
    AsyncEvoLink,
    ClosedError,
    ConfigurationError,
    DownloadError,
    InvalidRequestError,
    Outcome,
    OutcomeStatus,
    ResultExpiredError,
    RetryPolicy,
    Task,
    TaskFailedError,
)
from evolink_async.http import media, stream
from evolink_async.http.addresses import refusal
from evolink_async.saving import download
from evolink_async.saving.folder import Folder, PartFile

Writer = asyncio.StreamWriter
PNG = picture()
BIG = picture(400)  # some 150 kB: more than one read
FAST = RetryPolicy(base_delay=0.001, max_delay=0.002)


@pytest.fixture
async def saver() -> AsyncIterator[AsyncEvoLink]:
    """A client that may fetch from loopback, retries at once, and whose API is nowhere."""
    async with AsyncEvoLink(base_url="http://127.0.0.1:9", retry=FAST, allow_private_hosts=True) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_temporary_files(tmp_path: Path) -> Iterator[None]:
    yield
    left = [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    assert not left, f"temporary files are left: {left}"


def task_with(*links: str, **fields: Any) -> Task:
    wire = {"id": "task-unified-1-abc", "status": "completed", "type": "image", "results": list(links)}
    return Task.model_validate(wire | fields)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bytes_in(folder: Path) -> int:
    found = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # the one that tries out the folder comes and goes
            found += path.stat().st_size
    return found


async def finished(client: AsyncEvoLink, **params: Any) -> Task:
    return await client.images.generate(model="gpt-4o-image", prompt="a lighthouse", **params)


def book(emulator: Any) -> dict[str, int]:
    counts: dict[str, int] = emulator.emulator.book()["media"]
    return counts


# --- what is normal --------------------------------------------------------------------------------------------


async def test_a_task_is_saved_under_its_id_without_the_key(
    client: AsyncEvoLink, emulator: Any, tmp_path: Path
) -> None:
    task = await finished(client, n=2)
    paths = await client.save(task, tmp_path / "new" / "out")
    assert [path.name for path in paths] == [f"{task.id}-1.png", f"{task.id}-2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert book(emulator) == {"requests": 2, "with_authorization": 0}


async def test_what_is_there_and_whole_is_not_fetched_again(
    client: AsyncEvoLink, emulator: Any, tmp_path: Path
) -> None:
    task = await finished(client, n=2)
    first = await client.save(task, str(tmp_path))
    stamp = first[0].stat().st_mtime_ns
    first[1].unlink()
    assert await client.save(task, str(tmp_path)) == first
    assert first[0].stat().st_mtime_ns == stamp
    assert book(emulator)["requests"] == 3


async def test_a_task_read_from_the_list_is_looked_up_for_its_links(client: AsyncEvoLink, tmp_path: Path) -> None:
    task = await finished(client)
    row = task_with(id=task.id)
    assert not row.urls
    assert [path.name for path in await client.save(row, tmp_path)] == [f"{task.id}-1.png"]


async def test_a_bare_link_is_saved_under_its_own_name(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, PNG)

    async with media_host(handler) as host:
        assert await saver.save(f"{host.url}/a/sunset.jpeg?sig=x", tmp_path) == [tmp_path / "sunset.png"]
        assert await saver.save(f"{host.url}/", tmp_path) == [tmp_path / "result.png"]
        assert await saver.save(f"{host.url}/a/sunset.jpeg", tmp_path) == [tmp_path / "sunset.png"]
    headers = host.calls[0].headers
    assert headers["user-agent"].startswith("evolink-async/")
    assert headers["accept-encoding"] == "identity"
    assert "authorization" not in headers
    assert "cookie" not in headers


@pytest.mark.parametrize(
    ("body", "content_type", "ending"),
    [
        (b"\0\0\0\x18ftypmp42" + bytes(600), "application/octet-stream", "mp4"),
        (b"ID3" + bytes(600), "", "mp3"),
        (b"\1\2\3" * 300, "image/tiff", "tiff"),
        (b"\1\2\3" * 300, "application/x-msdownload", "bin"),
    ],
)
async def test_the_extension_comes_from_the_content(
    saver: AsyncEvoLink, tmp_path: Path, body: bytes, content_type: str, ending: str
) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, body, content_type=content_type)

    async with media_host(handler) as host:
        paths = await saver.save(f"{host.url}/x.exe", tmp_path)
    assert [path.name for path in paths] == [f"x.exe.{ending}"]


# --- what is refused before anything is fetched -----------------------------------------------------------------


async def test_a_task_that_is_not_finished_or_failed_is_not_saved(saver: AsyncEvoLink, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"wait with client\.tasks\.wait"):
        await saver.save(task_with(status="processing"), tmp_path)
    with pytest.raises(TaskFailedError):
        await saver.save(task_with(status="failed", error={"code": "service_error"}), tmp_path)
    outcome = Outcome(index=0, key="x", identity="x", request=None, status=OutcomeStatus.COMPLETED)
    with pytest.raises(InvalidRequestError, match=r"got Outcome; an outcome has a \.task"):
        await saver.save(outcome, tmp_path)  # type: ignore[call-overload]
    for wrong in ("task-unified-1-abc", "/etc/passwd", "file:///etc/passwd", None, 5):
        with pytest.raises(InvalidRequestError):
            await saver.save(wrong, tmp_path)  # type: ignore[arg-type]
    for folder in ("a\0b", 5):
        with pytest.raises(ConfigurationError):
            await saver.save("http://127.0.0.1/", folder)  # type: ignore[call-overload]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
async def test_a_folder_that_cannot_be_written_to_is_found_before_fetching(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, PNG)

    blocking = tmp_path / "file"
    blocking.write_bytes(b"")
    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="cannot write into"):
            await saver.save(f"{host.url}/a.png", blocking)
        with pytest.raises(DownloadError, match="cannot write into"):
            await saver.save(f"{host.url}/a.png", tmp_path / "\ud800")
        assert host.calls == []


async def test_a_private_address_is_refused_unless_it_is_the_api_or_allowed(tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, PNG)

    async with media_host(handler) as host, AsyncEvoLink(base_url="http://127.0.0.1:9", retry=FAST) as client:
        for name in ("127.0.0.1", "localhost", "127.1", "2130706433", "[::ffff:127.0.0.1]", "[::1]"):
            with pytest.raises(DownloadError, match="allow_private_hosts=True"):
                await client.save(f"http://{name}:{host.port}/a.png", tmp_path)
        with pytest.raises(DownloadError, match="link-local"):
            await client.save("http://169.254.169.254/latest/meta-data/", tmp_path)
        assert host.calls == []
    async with media_host(handler) as host, AsyncEvoLink(base_url=host.url) as client:
        assert await client.save(f"{host.url}/a.png", tmp_path) == [tmp_path / "a.png"]
    assert names_in(tmp_path) == ["a.png"]


class Resolver:
    """Gives a name one address after the other, the last of them for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.asked: list[str] = []
        self._addresses = addresses
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._look_up)

    async def _look_up(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        self.asked.append(host)
        address = self._addresses[min(len(self.asked), len(self._addresses)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


async def test_a_name_that_becomes_private_between_look_ups_is_looked_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: what is checked is what is connected to. 192.0.2.1 (nobody's) passes for public here."""

    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, PNG)

    connected: list[str] = []

    async def connect(loop: object, address: tuple[int, Any]) -> socket.socket:
        connected.append(address[1][0])
        raise ConnectionRefusedError

    monkeypatch.setattr(media, "refusal", lambda text: None if text == "192.0.2.1" else refusal(text))
    monkeypatch.setattr(stream, "_connect_one", connect)
    resolver = Resolver(monkeypatch, "192.0.2.1", "127.0.0.1")
    async with media_host(handler) as host, AsyncEvoLink(base_url="http://127.0.0.1:9", retry=FAST) as client:
        with pytest.raises(DownloadError, match="a loopback address"):  # the second attempt looks up again
            await client.save(f"http://rebound.example:{host.port}/a.png", tmp_path)
        assert host.calls == []
    assert resolver.asked == ["rebound.example"] * 2
    assert connected == ["192.0.2.1"]
    assert names_in(tmp_path) == []


async def test_one_private_address_among_public_ones_is_enough_to_refuse_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        found = ("8.8.8.8", "10.0.0.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    async with AsyncEvoLink(base_url="http://127.0.0.1:9", retry=FAST) as client:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
        with pytest.raises(DownloadError, match="a private or reserved address"):
            await client.save("https://mixed.example/a.png", tmp_path)


async def test_a_redirect_to_a_private_address_is_refused(tmp_path: Path) -> None:
    async def inner(call: Call, writer: Writer) -> None:
        answer(writer, PNG)

    async with media_host(inner) as secret:

        async def outer(call: Call, writer: Writer) -> None:
            answer(writer, status="302 Found", location=f"{secret.url}/latest/meta-data")

        # The outer host is the API's own place and so allowed; where it leads to is not.
        async with media_host(outer) as host, AsyncEvoLink(base_url=host.url, retry=FAST) as client:
            with pytest.raises(DownloadError, match="a loopback address"):
                await client.save(f"{host.url}/a.png", tmp_path)
        assert secret.calls == []
    assert names_in(tmp_path) == []


async def test_behind_a_proxy_names_are_the_proxys_business_and_private_addresses_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, PNG)

    async with media_host(handler) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        async with AsyncEvoLink(base_url="http://127.0.0.1:9", retry=FAST) as client:
            await client.save("http://media.invalid/a.png", tmp_path)
            with pytest.raises(DownloadError, match="a loopback address"):
                await client.save("http://127.1:8080/b.png", tmp_path)
    assert [call.path for call in proxy.calls] == ["http://media.invalid/a.png"]
    assert names_in(tmp_path) == ["a.png"]


async def test_a_proxy_that_cannot_be_spoken_to_ends_a_download_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks5://user:SECRET@127.0.0.1:1080")
    async with AsyncEvoLink(base_url="http://127.0.0.1:9") as client, asyncio.timeout(60):
        with pytest.raises(DownloadError, match="HTTP_PROXY asks for a socks5 proxy") as caught:
            await client.save("http://media.invalid/a.png", tmp_path)
    assert "SECRET" not in str(caught.value)
    assert names_in(tmp_path) == []


async def test_five_redirects_are_followed_and_six_are_not(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        left = int(call.path.rpartition("/")[2])
        if left:
            answer(writer, status="307 Temporary Redirect", location=f"../x/{left - 1}")
        else:
            answer(writer, PNG)

    async with media_host(handler) as host:
        assert len(await saver.save(f"{host.url}/y/5", tmp_path)) == 1
        host.calls.clear()
        with pytest.raises(DownloadError, match="more than 5 times"):
            await saver.save(f"{host.url}/y/25", tmp_path)
        assert len(host.calls) == 6


# --- hosts that answer badly ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<!DOCTYPE html><html>Sorry</html>", "text/html"),
        (b"<!DOCTYPE html>" + b" " * 5000, "image/png"),
        (b'{"error": "expired"}', "application/json"),
        (b"\0" * 1000, "text/html; charset=utf-8"),
        (b"no picture at all" * 50, "image/png"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    ],
)
async def test_a_page_instead_of_a_file_is_an_error_at_once(
    saver: AsyncEvoLink, tmp_path: Path, body: bytes, content_type: str
) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, body, content_type=content_type)

    async with media_host(handler) as host:
        with pytest.raises(DownloadError) as caught:
            await saver.save(f"{host.url}/a.png", tmp_path)
        assert len(host.calls) == 1
    assert "done and paid" in str(caught.value)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("how", ["truncated", "empty", "cut chunk", "no answer", "503", "garbage", "unmarked cut"])
async def test_what_may_pass_is_tried_again_and_given_up_in_the_end(
    saver: AsyncEvoLink, tmp_path: Path, how: str
) -> None:
    broken = True

    async def handler(call: Call, writer: Writer) -> None:
        if not broken and call.number % 3 == 0:
            answer(writer, PNG)
        elif how == "truncated":
            answer(writer, PNG[:100], length=len(PNG))
        elif how == "empty":
            answer(writer)
        elif how == "cut chunk":
            answer(writer, b"40\r\n" + PNG[:20], length=None, transfer_encoding="chunked")
        elif how == "503":
            answer(writer, b"busy", "503 Service Unavailable")
        elif how == "garbage":
            writer.write(b"\xff\xfe\x00 what?\r\n\r\n")
        elif how == "unmarked cut":
            answer(writer, PNG[:-20], length=None)

    async with media_host(handler) as host:
        with pytest.raises(DownloadError) as caught:
            await saver.save(f"{host.url}/a.png", tmp_path)
        assert "done and paid" in str(caught.value)
        assert len(host.calls) == download.TRIES
        assert names_in(tmp_path) == []
        broken = False
        host.calls.clear()
        [path] = await saver.save(f"{host.url}/a.png", tmp_path)
        assert len(host.calls) == 3
    assert path.read_bytes() == PNG


async def test_a_hint_is_heeded(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        if call.number == 1:
            answer(writer, b"", "429 Too Many Requests", retry_after_ms="200")
        else:
            answer(writer, PNG)

    async with media_host(handler) as host:
        begun = time.monotonic()
        await saver.save(f"{host.url}/a.png", tmp_path)
        assert time.monotonic() - begun >= 0.2


async def test_a_length_and_no_length_and_chunks_all_arrive_whole(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        if call.path == "/chunked.png":
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BIG[:5], BIG[5:])) + b"0\r\n\r\n"
            answer(writer, body, length=None, transfer_encoding="chunked")
        else:
            answer(writer, BIG, length=None if call.path == "/until-closed.png" else -1)

    async with media_host(handler) as host:
        for name in ("chunked.png", "until-closed.png", "length.png"):
            [path] = await saver.save(f"{host.url}/{name}", tmp_path)
            assert path.read_bytes() == BIG
    assert len(names_in(tmp_path)) == 3


@pytest.mark.parametrize("announced", [True, False])
async def test_a_file_above_its_cap_is_cut(
    saver: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    monkeypatch.setattr(download, "MOST_IMAGE_BYTES", 100_000)

    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, BIG, length=-1 if announced else None)

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="larger than"):
            await saver.save(f"{host.url}/a.png", tmp_path)
        with pytest.raises(DownloadError, match="larger than"):
            await saver.save(task_with(f"{host.url}/a.png"), tmp_path)
        assert len(host.calls) == 2
        assert len(await saver.save(task_with(f"{host.url}/a.png", type="video"), tmp_path)) == 1


async def test_an_endless_body_is_cut(saver: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MOST_BYTES", 300_000)

    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, b"\0\0\0\x18ftypmp42", length=None)
        while True:
            writer.write(bytes(60_000))
            await writer.drain()

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="larger than"):
            await saver.save(f"{host.url}/a.mp4", tmp_path)
    assert names_in(tmp_path) == []


async def test_a_slow_drip_is_cut_and_given_up(
    saver: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(download, "TRIES", 2)

    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, PNG[:20], length=len(PNG))
        for byte in PNG[20:]:
            await asyncio.sleep(0.02)
            writer.write(bytes([byte]))

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="slower than 1 kB/s"):
            await saver.save(f"{host.url}/a.png", tmp_path)
        assert len(host.calls) == 2


async def test_a_host_that_never_answers_is_given_up(
    saver: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr(download, "TRIES", 2)

    async def handler(call: Call, writer: Writer) -> None:
        await asyncio.sleep(30)

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match=r"no answer within 0\.05 s"):
            await saver.save(f"{host.url}/a.png", tmp_path)


async def test_a_host_that_does_not_exist_is_given_up(saver: AsyncEvoLink, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="could not be fetched"):
        await saver.save("http://127.0.0.1:9/a.png", tmp_path)


# --- resuming ---------------------------------------------------------------------------------------------------


def resuming(how: str) -> Callable[[Call, Writer], Any]:
    """A host that cuts its first answer in the middle and answers Range in one of many ways."""
    half = len(BIG) // 2

    async def handler(call: Call, writer: Writer) -> None:
        tag = '"one"' if call.number == 1 or how != "changed" else '"two"'
        wanted = call.headers.get("range")
        if call.number == 1:
            answer(writer, BIG[:half], length=len(BIG), etag=tag)
        elif wanted is None or how == "ignored":
            answer(writer, BIG, etag=tag)
        elif how == "416":
            answer(writer, b"", "416 Range Not Satisfiable", content_range=f"bytes */{len(BIG)}")
        else:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            start -= 7 if how == "wrong offset" else 0
            span = f"bytes {start}-{len(BIG) - 1}/{len(BIG)}" if how != "no range" else "bytes"
            end = -10 if how == "short part" and call.number == 2 else None
            answer(writer, BIG[start:end], "206 Partial Content", etag=tag, content_range=span)

    return handler


@pytest.mark.parametrize(
    ("how", "requests"),
    [
        ("honoured", 2),
        ("ignored", 2),
        ("416", 3),
        ("wrong offset", 3),
        ("no range", 3),
        ("changed", 3),
        ("short part", 3),
    ],
)
async def test_a_cut_transfer_is_resumed_or_begun_again_never_patched_wrongly(
    saver: AsyncEvoLink, tmp_path: Path, how: str, requests: int
) -> None:
    async with media_host(resuming(how)) as host:
        [path] = await saver.save(f"{host.url}/a.png", tmp_path)
    assert path.read_bytes() == BIG
    assert len(host.calls) == requests
    resumed = host.calls[1].headers
    assert int(resumed["range"].removeprefix("bytes=").removesuffix("-")) > 0
    assert resumed["if-range"] == '"one"'


async def test_a_file_without_a_version_is_begun_again(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, BIG if call.number > 1 else BIG[:5000], length=len(BIG), etag='W/"weak"')

    async with media_host(handler) as host:
        [path] = await saver.save(f"{host.url}/a.png", tmp_path)
        assert "range" not in host.calls[1].headers
    assert path.read_bytes() == BIG


async def test_progress_renews_the_patience(saver: AsyncEvoLink, tmp_path: Path) -> None:
    whole = b"\0\0\0\x18ftypmp42" + bytes(20 * download.PROGRESS)

    async def handler(call: Call, writer: Writer) -> None:
        start = int(call.headers.get("range", "bytes=0-")[6:-1])
        piece = whole[start : start + download.PROGRESS + 100]
        span = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        status = "206 Partial Content" if start else "200 OK"
        answer(writer, piece, status, length=len(whole) - start, etag='"x"', content_range=span)

    async with media_host(handler) as host:
        [path] = await saver.save(f"{host.url}/a.mp4", tmp_path)
        assert len(host.calls) > 2 * download.TRIES
    assert path.read_bytes() == whole


async def test_an_answer_to_another_question_is_an_error(saver: AsyncEvoLink, tmp_path: Path) -> None:
    for status in (
        "206 Partial Content",
        "204 No Content",
        "401 Unauthorized",
        "416 Range Not Satisfiable",
        "300 Many",
    ):

        async def handler(call: Call, writer: Writer, status: str = status) -> None:
            answer(
                writer,
                b"" if status.startswith("204") else PNG,
                status,
                length=None if status.startswith("204") else -1,
            )

        async with media_host(handler) as host:
            with pytest.raises(DownloadError, match=status[:3]):
                await saver.save(f"{host.url}/a.png", tmp_path)
            assert len(host.calls) == 1


async def test_a_compressed_answer_is_refused(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, b"\x1f\x8b" + bytes(20), content_encoding="gzip")

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="compressed"):
            await saver.save(f"{host.url}/a.png", tmp_path)


# --- dead links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["403 Forbidden", "404 Not Found", "410 Gone"])
async def test_a_dead_link_is_asked_for_once_again(tmp_path: Path, api_key: str, status: str) -> None:
    """The host is API and media host in one: its task has a fresh link."""

    async def handler(call: Call, writer: Writer) -> None:
        if call.path.startswith("/v1/tasks/"):
            links = ", ".join(f'"http://{call.headers["host"]}/fresh/{n}"' for n in (1, 2))
            body = f'{{"id": "task-unified-1-abc", "status": "completed", "results": [{links}]}}'
            answer(writer, body.encode(), content_type="application/json")
        elif call.path.startswith("/fresh/"):
            answer(writer, PNG)
        else:
            answer(writer, b"", status)

    async with media_host(handler) as host, AsyncEvoLink(base_url=host.url, retry=FAST) as client:
        paths = await client.save(task_with(f"{host.url}/old/1", f"{host.url}/old/2"), tmp_path)
    assert len(paths) == 2
    looked_up = [call for call in host.calls if call.path.startswith("/v1/")]
    assert len(looked_up) == 1
    assert all(("authorization" in call.headers) == (call in looked_up) for call in host.calls)
    assert not any(api_key in str(call.headers) for call in host.calls if call not in looked_up)


async def test_a_link_that_stays_dead_has_expired_and_says_how_old_it_is(
    client: AsyncEvoLink, emulator: Any, tmp_path: Path
) -> None:
    task = await finished(client)
    old = task.model_copy(
        update={
            "results": (task.urls[0].replace("-1.png", "-9.png"),),
            "created": task.created and task.created.replace(2020),
        }
    )
    with pytest.raises(
        ResultExpiredError, match=r"HTTP 404: its task is \d+\.\d h old, and result links live 24 h"
    ) as caught:
        await client.save(old.model_copy(update={"id": "task-unified-1-gone"}), tmp_path)
    assert "done and paid" in str(caught.value)
    assert "task-unified-1-gone" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message
    with pytest.raises(ResultExpiredError, match="age is unknown"):
        await client.save(f"{emulator.base_url}/results/nothing-1.png", tmp_path)
    assert names_in(tmp_path) == []


async def test_fresh_links_are_asked_for_once_only(tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, b"", "404 Not Found")

    async with media_host(handler) as host, AsyncEvoLink(base_url=host.url, retry=FAST) as client:
        fresh = iter(range(100))

        async def renew() -> str:
            return f"{host.url}/{next(fresh)}"

        part = PartFile(tmp_path)
        await asyncio.to_thread(part.open)
        try:
            with pytest.raises(download.LinkGone):
                await download.Download(f"{host.url}/old", part, client._core.open().media, FAST, renew=renew).run()
        finally:
            part.discard()
    assert [call.path for call in host.calls] == ["/old", "/0"]


async def test_the_other_links_are_saved_before_the_error_of_one_is_raised(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, b"<html>" if call.path == "/2" else PNG)

    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="result 2 of task task-unified-1-abc: ") as caught:
            await saver.save(task_with(*(f"{host.url}/{n}" for n in (1, 2, 3))), tmp_path)
    names = ["task-unified-1-abc-1.png", "task-unified-1-abc-3.png"]
    assert names_in(tmp_path) == names
    assert all(name in caught.value.__notes__[0] for name in names)


# --- what is in the folder already ------------------------------------------------------------------------------


async def test_a_different_file_is_never_overwritten(client: AsyncEvoLink, tmp_path: Path) -> None:
    task = await finished(client)
    planted = tmp_path / f"{task.id}-1.png"
    planted.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="another file is there already"):
        await client.save(task, tmp_path)
    assert planted.read_bytes() == b"mine"
    assert names_in(tmp_path) == [planted.name]


@pytest.mark.skipif(os.name == "nt", reason="needs symlinks")
@pytest.mark.parametrize("dangling", [True, False])
async def test_a_planted_symlink_is_not_followed(client: AsyncEvoLink, tmp_path: Path, dangling: bool) -> None:
    task = await finished(client)
    (tmp_path / "out").mkdir()
    elsewhere = tmp_path / "elsewhere"
    if not dangling:
        elsewhere.write_bytes(PNG)
    (tmp_path / "out" / f"{task.id}-1.png").symlink_to(elsewhere)
    with pytest.raises(DownloadError, match="another file is there already"):
        await client.save(task, tmp_path / "out")
    assert elsewhere.exists() is not dangling
    assert dangling or elsewhere.read_bytes() == PNG


async def test_two_at_once_leave_one_whole_file(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, BIG)

    async with media_host(handler) as host:
        paths = await asyncio.gather(*(saver.save(f"{host.url}/a.png", tmp_path) for _ in range(8)))
    assert paths == [[tmp_path / "a.png"]] * 8
    assert (tmp_path / "a.png").read_bytes() == BIG
    assert names_in(tmp_path) == ["a.png"]


# --- interruptions ----------------------------------------------------------------------------------------------


async def half_an_answer(call: Call, writer: Writer) -> None:
    answer(writer, b"\0\0\0\x18ftypmp42" + bytes(2 * download.FLUSH), length=10 * download.FLUSH)
    await writer.drain()
    await asyncio.sleep(30)


async def begun(host: MediaHost, tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        while True:
            if bytes_in(tmp_path):
                return
            await asyncio.sleep(0.002)


async def test_a_cancelled_download_leaves_nothing(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async with media_host(half_an_answer) as host:
        saving = asyncio.create_task(saver.save(f"{host.url}/a.png", tmp_path))
        await begun(host, tmp_path)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        assert names_in(tmp_path) == []


async def test_a_closed_client_ends_its_downloads(tmp_path: Path) -> None:
    async with media_host(half_an_answer) as host:
        async with AsyncEvoLink(base_url=host.url) as client:
            saving = asyncio.create_task(client.save(f"{host.url}/a.png", tmp_path))
            await begun(host, tmp_path)
        with pytest.raises(ClosedError):
            await saving
        assert names_in(tmp_path) == []


async def test_cancelling_at_any_moment_leaves_a_whole_file_or_none(saver: AsyncEvoLink, tmp_path: Path) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, BIG)

    async with media_host(handler) as host:
        for step in range(60):
            folder = tmp_path / str(step)
            saving = asyncio.create_task(saver.save(f"{host.url}/a.png", folder))
            for _ in range(step):
                await asyncio.sleep(0)
            saving.cancel()
            saving.cancel()
            await asyncio.wait([saving])
            left = list(folder.iterdir()) if folder.exists() else []
            assert all(path.name == "a.png" and path.read_bytes() == BIG for path in left)


async def test_a_full_disk_is_told_and_leaves_nothing(
    saver: AsyncEvoLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, BIG)

    def full(self: PartFile) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartFile, "flush", full)
    async with media_host(handler) as host:
        with pytest.raises(DownloadError, match="No space left on device: make room and save again"):
            await saver.save(f"{host.url}/a.png", tmp_path)
        assert len(host.calls) == 1
    assert names_in(tmp_path) == []


# --- any name at all --------------------------------------------------------------------------------------------


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(name=st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=300))
def test_no_name_writes_outside_the_folder(tmp_path: Path, name: str) -> None:
    part = PartFile(tmp_path / "out")
    part.open()
    part.add(b"x")
    try:
        path = Folder(tmp_path / "out").publish(part, name, None)
    except (DownloadError, OSError, ValueError):
        pass
    else:
        assert path.resolve().parent == (tmp_path / "out").resolve()
        path.unlink()
    finally:
        part.discard()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert list((tmp_path / "out").iterdir()) == []
