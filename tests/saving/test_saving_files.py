"""`client.files`: every kind of source, the account's list and quota, and a service that fails."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mediahost import picture
from pydantic import ValidationError

from evolink_async import (
    AsyncEvoLink,
    AuthenticationError,
    BadRequestError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    ResponseError,
    RetryPolicy,
    ServerError,
)
from evolink_async.emulator import Emulator, Fault
from evolink_async.saving import files as files_module
from evolink_async.saving import upload as upload_module
from evolink_async.saving.upload import unique_name

PNG = picture()
WAV = b"RIFF\x24\0\0\0WAVEfmt " + bytes(60)
MP4 = b"\0\0\0\x18ftypmp42" + bytes(300_000)
AAC = b"\xff\xf1\x50\x80" + bytes(100)
FAST = RetryPolicy(base_delay=0.001, max_delay=0.002)


@pytest.fixture
async def service(api_key: str) -> AsyncIterator[Any]:
    """An emulator at real speed: uploads live 72 hours."""
    async with Emulator(api_key=api_key).serve() as server:
        yield server


@pytest.fixture
async def client(service: Any) -> AsyncIterator[AsyncEvoLink]:
    async with AsyncEvoLink(base_url=service.base_url, retry=FAST) as client:
        yield client


async def content_of(link: str) -> bytes:
    async with httpx.AsyncClient() as plain:
        answer = await plain.get(link)
    assert answer.status_code == 200
    return answer.content


def stored(service: Any) -> dict[str, int]:
    counts: dict[str, int] = service.emulator.book()["files"]
    return counts


class OneWay(io.RawIOBase):
    """A file that can be read once, as a pipe."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(size)


# --- sources ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "text path", "bytes", "file", "BytesIO", "middle", "pipe"])
async def test_every_kind_of_source_arrives_as_it_is(client: AsyncEvoLink, tmp_path: Path, how: str) -> None:
    path = tmp_path / "my clip.mp4"
    path.write_bytes(MP4)
    middle = io.BytesIO(b"before" + MP4)
    middle.seek(6)
    sources: dict[str, Any] = {
        "path": path, "text path": str(path), "bytes": MP4, "BytesIO": io.BytesIO(MP4), "middle": middle,
        "pipe": OneWay(MP4),
    }  # fmt: skip
    with path.open("rb") as opened:
        file = await client.files.upload(opened if how == "file" else sources[how])
        assert not opened.closed
    assert await content_of(file.url) == MP4
    assert file.size == len(MP4)
    assert file.content_type == "video/mp4"
    assert file.name.startswith("my-clip-" if how in ("path", "text path", "file") else "file-")
    assert file.name.endswith(".mp4")
    left = file.expires_at - datetime.now(UTC)
    assert timedelta(hours=71) < left < timedelta(hours=73)
    assert file.expires_at.utcoffset() == timedelta(0)
    assert file.raw["file_id"] == file.id
    with pytest.raises(ValidationError):
        file.url = "x"  # type: ignore[misc]


async def test_a_link_is_fetched_by_the_service(client: AsyncEvoLink, service: Any) -> None:
    first = await client.files.upload(PNG)
    second = await client.files.upload(first.url, name="copy.png")
    assert second.url != first.url
    assert second.name.startswith("copy-")
    assert await content_of(second.url) == PNG
    assert service.emulator.book()["requests"]["POST /api/v1/files/upload/url"] == 1
    with pytest.raises(BadRequestError, match=r"40004: .*could not fetch the link"):
        await client.files.upload("https://example.com/a.png")


async def test_an_uploaded_link_can_be_used_in_a_request(client: AsyncEvoLink) -> None:
    file = await client.files.upload(PNG)
    task = await client.images.submit(model="gpt-4o-image", prompt="as a painting", image_urls=[file.url])
    assert task.id


async def test_a_name_is_only_the_beginning_of_ours(client: AsyncEvoLink) -> None:
    one = await client.files.upload(PNG, name="portrait.png")
    two = await client.files.upload(picture(80), name="portrait.png")
    assert one.name != two.name
    assert one.url != two.url
    hostile = await client.files.upload(WAV, name='../../"\r\nX: y/ö.wav')
    assert set(hostile.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


@given(st.text(max_size=100), st.sampled_from(["png", None]))
def test_every_name_is_plain_and_short(stem: str, ending: str | None) -> None:
    name = unique_name(stem, "0123456789abcdef", ending)
    assert name.isascii()
    assert name[0].isalnum()
    assert len(name) <= 40 + 1 + 16 + 4
    assert not set(name) & set("/\\\r\n\" '")


async def test_equal_content_is_uploaded_once_while_its_link_lives(client: AsyncEvoLink, service: Any) -> None:
    first = await client.files.upload(PNG)
    assert await client.files.upload(io.BytesIO(PNG)) == first
    assert stored(service)["uploads"] == 1
    await client.files.delete(first)
    again = await client.files.upload(PNG)
    assert stored(service)["uploads"] == 2
    old = again.model_copy(update={"expires_at": datetime.now(UTC) + timedelta(minutes=59)})
    client.files._uploaded = type(client.files._uploaded)(dict.fromkeys(client.files._uploaded, old))
    await client.files.upload(PNG)
    assert stored(service) == {"stored": 1, "uploads": 3, "overwritten": 1}


async def test_the_memory_of_uploads_is_bounded(client: AsyncEvoLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "REMEMBERED", 3)
    for n in range(6):
        await client.files.upload(WAV + bytes([n]))
    assert len(client.files._uploaded) == 3


# --- what is refused before anything is sent --------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
async def test_what_is_no_media_file_is_refused_at_once(client: AsyncEvoLink, service: Any, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"<html>")
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    closed = io.BytesIO(PNG)
    closed.close()
    wrong: list[Any] = [
        tmp_path / "page.png", tmp_path / "empty.png", tmp_path / "pipe.png", tmp_path, tmp_path / "missing.png",
        "missing.png", "a\0b", "ftp://example.com/a.png", "data:image/png;base64,AAAA", b"", b"%PDF-1.7",
        io.StringIO("x"), closed, 5, None, ["a.png"],
    ]  # fmt: skip
    for source in wrong:
        with pytest.raises(InvalidRequestError):
            await client.files.upload(source)
    with pytest.raises(InvalidRequestError):
        await client.files.upload(PNG, name="")
    with pytest.raises(ConfigurationError):
        await client.files.upload(PNG, timeout=-1)
    for file_id in ("", "..", "a/b", "a?b", None):
        with pytest.raises(InvalidRequestError):
            await client.files.delete(file_id)  # type: ignore[arg-type]
    assert service.emulator.book()["requests"] == {}


async def test_a_file_above_100_mb_is_refused(
    client: AsyncEvoLink, service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_module, "MOST_BYTES", len(MP4) - 1)
    (tmp_path / "long.mp4").write_bytes(MP4)
    for source in (MP4, tmp_path / "long.mp4", OneWay(MP4)):
        with pytest.raises(InvalidRequestError, match="larger than"):
            await client.files.upload(source)  # type: ignore[arg-type]
    assert stored(service)["uploads"] == 0


async def test_a_file_that_shrinks_meanwhile_is_told_as_that(client: AsyncEvoLink, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(MP4)
    original = upload_module.SourceFile.look

    def look_then_shrink(self: upload_module.SourceFile, name: str | None) -> upload_module.Content:
        content = original(self, name)
        os.truncate(path, 1000)
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload_module.SourceFile, "look", look_then_shrink)
        with pytest.raises(InvalidRequestError, match="became shorter"):
            await client.files.upload(path)


# --- the account's files ----------------------------------------------------------------------------------------


async def test_files_are_listed_page_by_page_counted_and_deleted(
    client: AsyncEvoLink, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "PAGE", 2)
    uploaded = [await client.files.upload(WAV + bytes([n])) for n in range(5)]
    listed = [file async for file in client.files.list()]
    assert [file.id for file in listed] == [file.id for file in reversed(uploaded)]
    assert [file.size for file in listed] == [len(WAV) + 1] * 5
    assert all(file.url == "" for file in listed)
    assert all(abs(file.expires_at - uploaded[0].expires_at) < timedelta(minutes=1) for file in listed)
    quota = await client.files.quota()
    assert (quota.used, quota.limit, quota.remaining) == (5, 100, 95)
    await client.files.delete(listed[0])
    await client.files.delete(listed[1].id)
    assert (await client.files.quota()).used == 3
    with pytest.raises(NotFoundError):
        await client.files.delete(listed[0])


async def test_no_files_are_an_empty_list(client: AsyncEvoLink) -> None:
    assert [file async for file in client.files.list()] == []


# --- a service that refuses or fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("with_200", [False, True])
async def test_every_refusal_has_its_class_whatever_the_http_status(
    client: AsyncEvoLink, service: Any, with_200: bool
) -> None:
    store = service.emulator.app.files
    store.with_200 = with_200
    store.max_files = 1
    await client.files.upload(PNG)
    with pytest.raises(PermissionDeniedError, match=r"40003: .*client\.files\.delete"):
        await client.files.upload(WAV)
    store.max_files = 100
    store.max_bytes = 1000
    with pytest.raises(BadRequestError, match="40001: ") as caught:
        await client.files.upload(MP4)
    assert caught.value.status_code == 413
    with pytest.raises(BadRequestError, match="40002: "):
        await client.files.upload(AAC)
    with pytest.raises(NotFoundError):
        await client.files.delete("file_0_ffffffff")


async def test_a_refusal_without_a_code_is_one_all_the_same(client: AsyncEvoLink, service: Any) -> None:
    body = {"success": False, "msg": "no", "data": {"file_id": "x", "file_url": "https://example.com/x.png"}}
    service.emulator.set_faults([Fault(path="/api/v1/files/", status=200, body=body)])
    with pytest.raises(BadRequestError, match="no"):
        await client.files.upload(PNG)


async def test_a_wrong_key_is_an_authentication_error(service: Any) -> None:
    async with AsyncEvoLink("sk-another", base_url=service.base_url) as client:
        with pytest.raises(AuthenticationError):
            await client.files.upload(PNG)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503}, {"status": 429, "headers": {"Retry-After": "0"}}, {"drop": "before"}, {"drop": "after"},
        {"status": 502, "raw_body": b"<html>bad gateway</html>", "content_type": "text/html"},
        {"status": 200, "body": {"success": False, "code": 500, "msg": "internal"}},
        {"status": 200, "body": {"success": False, "code": 50000, "msg": "storage"}},
    ],
)  # fmt: skip
async def test_an_upload_is_repeated_under_the_same_name(
    client: AsyncEvoLink, service: Any, tmp_path: Path, fault: dict[str, Any]
) -> None:
    (tmp_path / "a.mp4").write_bytes(MP4)
    for source in (MP4, tmp_path / "a.mp4"):
        client.files._uploaded.clear()
        service.emulator.set_faults([Fault(path="/api/v1/files/upload/stream", nth=(1, 2), **fault)])
        file = await client.files.upload(source, name="clip")
        assert await content_of(file.url) == MP4
    assert stored(service)["stored"] == 1


async def test_a_storage_failure_is_given_the_documented_minute(
    client: AsyncEvoLink, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"success": False, "code": 50001, "msg": "storage error"}
    service.emulator.set_faults([Fault(path="/api/v1/files/upload/stream", nth=(1,), status=500, body=body)])
    with pytest.raises(ServerError, match="50001"):
        await client.files.upload(PNG, timeout=5)
    monkeypatch.setattr(files_module, "STORAGE_PAUSE", 0.01)
    service.emulator.set_faults([Fault(path="/api/v1/files/upload/stream", nth=(1,), status=500, body=body)])
    assert (await client.files.upload(PNG)).url


async def test_a_delete_whose_answer_was_lost_has_succeeded(client: AsyncEvoLink, service: Any) -> None:
    file = await client.files.upload(PNG)
    store, original = service.emulator.app.files, service.emulator.app.files.delete
    service.emulator.set_faults([Fault(method="DELETE", nth=(1,), status=503)])
    store.delete = lambda file_id, now: original(file_id, now)
    original(file.id, datetime.now(UTC).timestamp())
    await client.files.delete(file)
    assert stored(service)["stored"] == 0


@pytest.mark.parametrize(
    "body",
    [
        {"success": True, "code": 200, "data": {}}, {"success": True, "code": 200}, [], "text", {"data": [1]},
        {"success": True, "data": {"file_id": "x", "file_url": "javascript:1"}}, {"data": {"file_url": "https://x/y"}},
    ],
)  # fmt: skip
async def test_an_answer_that_is_none_is_a_response_error(client: AsyncEvoLink, service: Any, body: Any) -> None:
    service.emulator.set_faults([Fault(path="/api/v1/files/", status=200, body=body)])
    with pytest.raises(ResponseError):
        await client.files.upload(PNG)
    with pytest.raises(ResponseError):
        await client.files.quota()
    with pytest.raises(ResponseError):
        [file async for file in client.files.list()]


async def test_what_the_service_leaves_out_is_filled_in(client: AsyncEvoLink, service: Any) -> None:
    data = {"file_id": 7, "download_url": "https://files.example.com/a.png", "expires_at": "2030-01-01T08:00:00+08:00"}
    service.emulator.set_faults([Fault(path="/api/v1/files/", status=200, body={"data": data})])
    file = await client.files.upload(PNG)
    assert (file.id, file.url, file.name, file.size) == ("7", data["download_url"], "", None)
    assert file.expires_at == datetime(2030, 1, 1, tzinfo=UTC)


async def test_an_unreachable_service_is_told_when_the_time_is_over() -> None:
    async with AsyncEvoLink(base_url="http://127.0.0.1:9", retry=FAST) as client:
        with pytest.raises(ConnectionFailedError):
            await client.files.upload(PNG, timeout=0.1)


async def test_cancelling_an_upload_closes_its_file(client: AsyncEvoLink, service: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(MP4)
    service.emulator.set_faults([Fault(path="/api/v1/files/upload/stream", delay=30, status=503)])
    for step in (0, 1, 3, 10, 40, 200):
        uploading = asyncio.create_task(client.files.upload(path))
        for _ in range(step):
            await asyncio.sleep(0)
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
    assert str(path) not in [opened.path for opened in psutil.Process().open_files()]


async def test_a_closed_client_ends_its_uploads(service: Any) -> None:
    service.emulator.set_faults([Fault(path="/api/v1/files/upload/stream", delay=30, status=503)])
    async with AsyncEvoLink(base_url=service.base_url) as client:
        uploading = asyncio.create_task(client.files.upload(PNG))
        await asyncio.sleep(0.1)
    with pytest.raises(ClosedError):
        await uploading
    with pytest.raises(ClosedError):
        await client.files.quota()
