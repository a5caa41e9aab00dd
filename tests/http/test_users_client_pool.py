"""A user's client with fewer connections than our own limit, or shared with somebody: nothing is lost in its queue."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from evolink_async import AsyncEvoLink, ConnectionFailedError, ImageRequest, RetryPolicy
from evolink_async.http.foreign import gate_for

SECONDS = 0.1  # for each answer


class Slow:
    """A service that takes its time for each answer, and whose tasks are completed when they are made."""

    def __init__(self) -> None:
        self.url = ""
        self.posts = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.I)
                await reader.readexactly(int(length[1]) if length else 0)
                self.posts += head.startswith(b"POST")
                await asyncio.sleep(SECONDS)
                body = json.dumps(
                    {"id": f"task-{self.posts}", "status": "completed", "results": ["https://x.invalid/"]}
                )
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body.encode()))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@asynccontextmanager
async def slow_service() -> AsyncIterator[Slow]:
    service = Slow()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    async with server:
        service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield service


async def test_requests_that_queue_for_the_connections_of_a_users_client_are_not_lost() -> None:
    count = 20
    async with (
        slow_service() as service,
        httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=2)) as http_client,
        AsyncEvoLink(
            base_url=service.url,
            http_client=http_client,
            request_timeout=count / 2 * SECONDS / 2,  # the queue takes twice as long
            rate_limit="1000/s",
            on_lost_response="hold",
        ) as client,
    ):
        async with asyncio.timeout(20):
            outcomes = await client.run_many(ImageRequest(model="unknown", prompt=str(n)) for n in range(count))
        assert [str(outcome.status) for outcome in outcomes] == ["completed"] * count
        assert service.posts == count


async def test_a_users_client_whose_connections_are_all_taken_has_sent_nothing() -> None:
    async with (
        slow_service() as service,
        httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=1)) as http_client,
        AsyncEvoLink(
            base_url=service.url,
            http_client=http_client,
            request_timeout=0.3,
            on_lost_response="hold",
            retry=RetryPolicy(0.01, 0.02),
        ) as client,
    ):
        async with http_client.stream("GET", service.url):  # somebody else's, and not read to its end
            with pytest.raises(ConnectionFailedError, match=r"PoolTimeout; all connections of http_client are in use"):
                await client.images.submit(model="unknown", prompt="x", timeout=0.5)
        assert service.posts == 0
        assert (await client.images.submit(model="unknown", prompt="x")).id == "task-1"


@pytest.mark.parametrize(
    ("http_client", "places"),
    [
        (httpx.AsyncClient(limits=httpx.Limits(max_connections=7)), 7),
        (httpx.AsyncClient(limits=httpx.Limits(max_connections=700)), 50),
        (httpx.AsyncClient(limits=httpx.Limits(max_connections=None)), 50),
        (httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(200))), 50),
    ],
    ids=["fewer", "more", "unlimited", "none of httpx's own"],
)
async def test_a_users_client_gets_no_more_at_once_than_it_has_connections(
    http_client: httpx.AsyncClient, places: int
) -> None:
    assert gate_for(http_client, 50).total == places
