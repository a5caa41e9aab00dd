"""An answer that breaks off after its head (F11): lost, but what its head said can be told to the service's support."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support import read_request

from evolink_async import AsyncEvoLink, ConnectionFailedError, RetryPolicy, SubmitOutcomeUnknownError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\nX-Request-Id: %b\r\n\r\n"
PART = b'{"id": "task-unified-1-abc", "status": "pen'


@asynccontextmanager
async def service(answer: bytes) -> AsyncIterator[AsyncEvoLink]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await read_request(reader)
            writer.write(answer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with AsyncEvoLink(base_url=url, on_lost_response="hold", retry=RetryPolicy(0.01, 0.05)) as client:
            yield client


async def test_a_paid_request_whose_answer_was_cut_is_unknown_with_the_request_id() -> None:
    async with service(HEAD % b"req-2026-4711" + PART) as client:
        with pytest.raises(SubmitOutcomeUnknownError, match=r"HTTP 200, request id req-2026-4711"):
            await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")


@pytest.mark.looptime
async def test_a_read_whose_answer_was_cut_says_so_too() -> None:
    async with service(HEAD % b"req-2026-4711" + PART) as client:
        with pytest.raises(ConnectionFailedError, match="req-2026-4711"):
            await client.credits(timeout=1)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-"], ids=["none", "half"])
async def test_without_a_head_there_is_nothing_to_tell(head: bytes) -> None:
    async with service(head) as client:
        with pytest.raises(SubmitOutcomeUnknownError) as caught:
            await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
    assert "after its head" not in str(caught.value)
    assert "the server closed the connection before it had sent a whole head" in str(caught.value)


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.7\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n"], ids=["ssh", "tls"]
)
async def test_where_something_else_listens_the_address_is_suspected(parser: str, answer: bytes) -> None:
    async with service(answer) as client:
        with pytest.raises(SubmitOutcomeUnknownError, match=r"isn't HTTP/1\.1: .*; if this lasts, check base_url"):
            await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")


async def test_a_service_that_gives_the_key_as_its_request_id_does_not_get_it_into_an_error(api_key: str) -> None:
    async with service(HEAD % api_key.encode() + PART) as client:
        with pytest.raises(SubmitOutcomeUnknownError) as caught:
            await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
    assert api_key not in f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
