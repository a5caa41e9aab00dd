"""The emulated files API, seen by a client that isn't ours, and its store by itself."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from evolink_async.emulator import Emulator
from evolink_async.emulator import files as files_module
from evolink_async.emulator.files import MOST_BYTES, FileRefusal, FileStore, StoredFile, read_form
from evolink_async.emulator.media import render

FILES = "/api/v1/files"
PNG = render(bytes(16), 1, "png", "1:1")
WAV = render(bytes(16), 1, "wav", None)
HOUR = 3600.0


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Emulator]]:
    async with Emulator(**options).serve() as server:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        async with httpx.AsyncClient(base_url=server.base_url, headers=headers) as client:
            yield client, server.emulator


def store(**options: Any) -> FileStore:
    return FileStore(lambda path, now: PNG if path == "/own.png" else None, **options)


def put(files: FileStore, name: str, content: bytes = PNG, now: float = 0.0) -> StoredFile:
    body = {"base64_data": base64.b64encode(content).decode(), "file_name": name}
    stored = files.upload_base64(body, now)
    assert isinstance(stored, StoredFile)
    return stored


# --- over HTTP --------------------------------------------------------------------------------------------------


async def test_the_three_ways_to_upload_give_a_link_that_works() -> None:
    async with running() as (client, _):
        data_url = "data:image/png;base64," + base64.b64encode(PNG).decode()
        first = await client.post(f"{FILES}/upload/base64", json={"base64_data": data_url, "file_name": "a.png"})
        form = {"uploadPath": "sub/folder", "fileName": "b ö.png"}
        second = await client.post(f"{FILES}/upload/stream", files={"file": ("own.png", PNG)}, data=form)
        link = second.json()["data"]["file_url"]
        third = await client.post(f"{FILES}/upload/url", json={"file_url": link, "file_name": "c.png"})
        for answer in (first, second, third):
            body = answer.json()
            assert (answer.status_code, body["success"], body["code"]) == (200, True, 200)
            data = body["data"]
            assert data["file_size"] == len(PNG)
            assert data["mime_type"] == "image/png"
            async with httpx.AsyncClient() as plain:
                assert (await plain.get(data["file_url"])).content == PNG
            lifetime = datetime.fromisoformat(data["expires_at"]) - datetime.fromisoformat(data["upload_time"])
            assert lifetime == timedelta(hours=72)
            assert data["upload_time"].endswith("+08:00")
        assert second.json()["data"]["upload_path"] == "sub/folder"
        assert second.json()["data"]["original_name"] == "own.png"


async def test_downloads_of_uploads_count_as_media_and_take_ranges() -> None:
    async with running() as (client, emulator):
        uploaded = await client.post(f"{FILES}/upload/stream", files={"file": ("a.png", PNG)})
        link = uploaded.json()["data"]["file_url"]
        part = await client.get(link, headers={"Range": "bytes=5-9"})
        assert (part.status_code, part.content) == (206, PNG[5:10])
        book = emulator.book()
        assert book["media"] == {"requests": 1, "with_authorization": 1}
        assert book["files"] == {"stored": 1, "uploads": 1, "overwritten": 0}
        assert book["requests"]["GET /files/{name}"] == 1


async def test_list_quota_and_deletion() -> None:
    async with running() as (client, _):
        for n in range(3):
            await client.post(f"{FILES}/upload/stream", files={"file": (f"{n}.png", PNG)})
        page = (await client.get(f"{FILES}/list", params={"page": 1, "pageSize": 2})).json()["data"]
        assert page["total"] == 3
        assert [row["file_name"] for row in page["files"]] == ["2.png", "1.png"]
        assert set(page["files"][0]) == {"file_id", "file_name", "file_size", "upload_time"}
        gone = await client.delete(f"{FILES}/{page['files'][0]['file_id']}")
        assert gone.json()["success"] is True
        assert (await client.delete(f"{FILES}/{page['files'][0]['file_id']}")).status_code == 404
        quota = (await client.get(f"{FILES}/quota")).json()["data"]
        assert quota == {"user_group": "default", "used_files": 2, "max_files": 100, "remain_files": 98}


async def test_refusals_come_in_the_envelope_and_with_200_where_asked() -> None:
    async with running() as (client, emulator):
        answer = await client.get(f"{FILES}/quota", headers={"Authorization": "Bearer wrong"})
        assert (answer.status_code, answer.json()["success"], answer.json()["code"]) == (401, False, 401)
        answer = await client.post(f"{FILES}/upload/stream", files={"file": ("a.txt", b"text")})
        assert (answer.status_code, answer.json()["code"]) == (400, 40002)
        emulator.app.files.with_200 = True
        answer = await client.post(f"{FILES}/upload/url", json={"file_url": "https://example.com/a.png"})
        assert (answer.status_code, answer.json()["code"]) == (200, 40004)
        for method, path in (("GET", "/list?page=0"), ("GET", "/list?pageSize=101"), ("POST", "/upload/other")):
            assert (await client.request(method, FILES + path)).json()["success"] is False


async def test_a_body_above_the_64_mb_of_the_api_is_taken_here() -> None:
    async with running() as (client, _):
        large = PNG + bytes(70 * 1024 * 1024)
        answer = await client.post(f"{FILES}/upload/stream", files={"file": ("a.png", large)})
        assert answer.json()["data"]["file_size"] == len(large)


async def test_a_body_above_every_limit_is_refused_in_the_envelope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "BODY_LIMIT", 1000)
    async with running() as (client, _):
        answer = await client.post(f"{FILES}/upload/stream", files={"file": ("a.png", PNG)})
        assert (answer.status_code, answer.json()["code"]) == (413, 40001)


# --- the store --------------------------------------------------------------------------------------------------


async def test_an_upload_with_an_id_of_its_own_leaves_a_receipt_for_72_hours() -> None:
    async with running(standing=True) as (client, emulator):
        upload_id = {"X-Evo-Upload-Id": "upload-0123456789abcdef"}
        body = {"base64_data": base64.b64encode(PNG).decode(), "file_name": "a.png"}
        uploaded = (await client.post(f"{FILES}/upload/base64", json=body, headers=upload_id)).json()["data"]
        receipt = f"{FILES}/upload-receipts/upload-0123456789abcdef"
        told = (await client.get(receipt)).json()
        assert told["success"] is True
        assert (told["data"]["state"], told["data"]["result_verified"]) == ("done", True)
        assert told["data"]["file"] == uploaded
        assert (await client.get(f"{FILES}/upload-receipts/upload-another-0123456789")).status_code == 404
        emulator.advance(72 * HOUR)
        assert (await client.get(receipt)).status_code == 404


def test_an_equal_name_overwrites() -> None:
    files = store()
    first, second = put(files, "a.png"), put(files, "a.png", WAV)
    assert first.id != second.id
    found = files.find("/files/a.png", 0.0)
    assert found is not None
    assert found.content == WAV
    assert files.book(0.0) == {"stored": 1, "uploads": 2, "overwritten": 1}


def test_files_end_after_72_hours_of_the_emulated_clock() -> None:
    for speed in (1.0, 50.0):
        files = store(speed=speed)
        put(files, "a.png")
        put(files, "b.png", now=HOUR / speed)
        assert files.find("/files/a.png", 71.9 * HOUR / speed)
        assert files.find("/files/a.png", 72 * HOUR / speed) is None
        assert files.quota(72.5 * HOUR / speed)["used_files"] == 1
        assert files.book(73 * HOUR / speed)["stored"] == 0


def test_the_quota_refuses_new_names_only() -> None:
    files = store()
    files.max_files = 1
    put(files, "a.png")
    put(files, "a.png", WAV)
    refused = files.upload_base64({"base64_data": base64.b64encode(PNG).decode(), "file_name": "b.png"}, 0.0)
    assert isinstance(refused, FileRefusal)
    assert refused.code == 40003


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, 400), ([], 400), ({"base64_data": "!!!"}, 400), ({"base64_data": "data:image/png;base64,"}, 400),
        ({"base64_data": base64.b64encode(b"text").decode()}, 40002),
        ({"base64_data": base64.b64encode(PNG).decode(), "file_name": "a/b.png"}, 400),
        ({"base64_data": base64.b64encode(PNG).decode(), "upload_path": "../x"}, 400),
    ],
)  # fmt: skip
def test_what_is_no_upload_is_refused(body: Any, code: int) -> None:
    refused = store().upload_base64(body, 0.0)
    assert isinstance(refused, FileRefusal)
    assert refused.code == code


def test_a_file_above_the_cap_is_too_large() -> None:
    files = store()
    refused = files.upload_form("multipart/form-data; boundary=x", form(PNG + bytes(MOST_BYTES)), 0.0)
    assert isinstance(refused, FileRefusal)
    assert refused.code == 40001


@pytest.mark.parametrize(
    ("link", "fits"),
    [
        ("http://here:1/own.png", True), ("https://here:1/own.png?x", True), ("http://here:1/other.png", False),
        ("http://there/own.png", False), ("file:///own.png", False), ("http://[", False), ("", False),
    ],
)  # fmt: skip
def test_only_own_links_are_fetched(link: str, fits: bool) -> None:
    stored = store().upload_url({"file_url": link}, "here:1", 0.0)
    assert isinstance(stored, StoredFile) is fits
    assert fits or stored.code in (400, 40004)  # type: ignore[union-attr]


def form(content: bytes, boundary: bytes = b"x") -> bytes:
    head = b'\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return b"--" + boundary + head + content + b"\r\n--" + boundary + b"--\r\n"


def test_a_form_is_read_byte_for_byte() -> None:
    content = bytes(range(256)) + b"\r\n--y\r\n--"
    assert read_form('multipart/form-data; boundary="x"', form(content)) == {"file": ("a.png", content)}


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"), ("multipart/form-data", form(PNG)), ("multipart/form-data; boundary=z", form(PNG)),
        ("multipart/form-data; boundary=x", form(PNG)[:-6]), ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\nno head at all\r\n--x--"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Type: a/b\r\n\r\n1\r\n--x--"),
    ],
)  # fmt: skip
def test_what_is_no_form_is_none(content_type: str, body: bytes) -> None:
    assert read_form(content_type, body) is None
