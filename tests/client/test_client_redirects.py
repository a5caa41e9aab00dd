"""Redirects on calls that carry the key: never followed, whatever they are (F47, F48, F50)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support import read_request

from evolink_async import AsyncEvoLink, EvoLinkError, RetryPolicy, SubmitOutcomeUnknownError, TaskTimeoutError

STATUSES = (301, 302, 303, 307, 308)
READS: dict[str, Callable[[AsyncEvoLink], Awaitable[Any]]] = {
    "credits": lambda client: client.credits(timeout=1),
    "get": lambda client: client.tasks.get("task-1", timeout=1),
    "get_many": lambda client: client.tasks.get_many(["task-1", "task-2"], timeout=1),
    "list": lambda client: anext(client.tasks.list(timeout=1)),
    "raw": lambda client: client.raw("GET", "/v1/anything", timeout=1),
    "quota": lambda client: client.files.quota(timeout=1),
    "delete": lambda client: client.files.delete("file-1", timeout=1),
    "upload": lambda client: client.files.upload(b"\x89PNG\r\n\x1a\n", timeout=1),
}


class Place:
    """A server that answers everything alike, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.answer = b""
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                self.requests.append(await read_request(reader))
                writer.write(self.answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    here = Place()
    server = await asyncio.start_server(here.serve, "127.0.0.1", 0)
    here.port = server.sockets[0].getsockname()[1]
    async with server:
        yield here


@asynccontextmanager
async def redirecting(status: int, where: str = "") -> AsyncIterator[tuple[AsyncEvoLink, Place, Place]]:
    """A client, its service that sends everybody elsewhere, and that place."""
    async with place() as service, place() as elsewhere:
        location = where or f"http://127.0.0.1:{elsewhere.port}/v1/credits"
        service.answer = f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
        elsewhere.answer = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"id": "task-1"}'
        retry = RetryPolicy(base_delay=0.01, max_delay=0.05)
        async with AsyncEvoLink(base_url=f"http://127.0.0.1:{service.port}", retry=retry) as client:
            yield client, service, elsewhere


@pytest.mark.looptime
@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("name", READS)
async def test_a_read_or_an_upload_is_not_sent_elsewhere(name: str, status: int) -> None:
    async with redirecting(status) as (client, service, elsewhere):
        with pytest.raises(EvoLinkError) as caught:
            await READS[name](client)
        assert service.requests
        assert not elsewhere.requests
        assert f"127.0.0.1:{elsewhere.port}" in str(caught.value)  # where it leads is told
        assert "base_url" in str(caught.value)


@pytest.mark.looptime
@pytest.mark.parametrize("status", STATUSES)
async def test_a_paid_request_is_not_sent_elsewhere_and_is_unknown(status: int) -> None:
    async with redirecting(status) as (client, service, elsewhere):
        with pytest.raises(SubmitOutcomeUnknownError, match=f"127.0.0.1:{elsewhere.port}"):
            await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
        assert not elsewhere.requests
        assert len(service.requests) == 2  # the one replay
        assert len({re.search(rb"Idempotency-Key: (\S+)", head)[1] for head in service.requests}) == 1  # type: ignore[index]


@pytest.mark.looptime
@pytest.mark.parametrize("status", STATUSES)
async def test_a_poll_is_not_sent_elsewhere_and_says_nothing_about_its_task(status: int) -> None:
    async with redirecting(status) as (client, service, elsewhere):
        with pytest.raises(TaskTimeoutError):
            await client.tasks.wait("task-1", timeout=60)
        assert len(service.requests) > 3
        assert not elsewhere.requests


@pytest.mark.looptime
async def test_a_redirect_within_the_service_is_not_followed_either() -> None:
    async with redirecting(307, "/v1/credits") as (client, service, _):
        with pytest.raises(EvoLinkError, match="redirect"):
            await client.credits(timeout=1)
        assert len(service.requests) == 1
