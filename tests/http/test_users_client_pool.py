"""A user's client with fewer connections than our own limit, or shared with somebody: nothing is lost in its queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from support import read_request

from evolink_async import AsyncEvoLink, ConnectionFailedError, ImageRequest, RetryPolicy
from evolink_async.http.foreign import gate_for

SECONDS = 0.1  # for each answer


class Slow:
    """A service that takes its time for each answer, and whose tasks are completed when they are made."""

    def __init__(self) -> None:
        self.posts = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                self.posts += (await read_request(reader)).startswith(b"POST")
                await asyncio.sleep(SECONDS)
                body = json.dumps(
                    {"id": f"task-{self.posts}", "status": "completed", "results": ["https://x.invalid/"]}
                )
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body.encode()))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@asynccontextmanager
async def sharing(connections: int, **options: Any) -> AsyncIterator[tuple[Slow, httpx.AsyncClient, AsyncEvoLink]]:
    """A slow service, a client of httpx's with so many connections to it, and one of ours on top of that."""
    service = Slow()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    limits = httpx.Limits(max_connections=connections)
    async with (
        server,
        httpx.AsyncClient(trust_env=False, limits=limits) as http_client,
        AsyncEvoLink(base_url=service.url, http_client=http_client, on_lost_response="hold", **options) as client,
    ):
        yield service, http_client, client


@pytest.mark.looptime
async def test_requests_that_queue_for_the_connections_of_a_users_client_are_not_lost() -> None:
    count = 20
    timeout = count / 2 * SECONDS / 2  # the queue takes twice as long
    async with sharing(2, request_timeout=timeout, rate_limit="1000/s") as (service, _, client):
        async with asyncio.timeout(20):
            outcomes = await client.run_many(ImageRequest(model="unknown", prompt=str(n)) for n in range(count))
        assert [str(outcome.status) for outcome in outcomes] == ["completed"] * count
        assert service.posts == count


@pytest.mark.looptime
async def test_a_users_client_whose_connections_are_all_taken_has_sent_nothing() -> None:
    retry = RetryPolicy(0.01, 0.02)
    async with sharing(1, request_timeout=0.3, retry=retry) as (service, http_client, client):
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
