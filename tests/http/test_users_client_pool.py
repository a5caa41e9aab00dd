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
@pytest.mark.parametrize("whose", ["ours", "the user's"])
async def test_who_waits_for_a_connection_is_not_refused_however_long_it_takes(whose: str) -> None:
    async with sharing(2) as (service, http_client, _):
        given = {"http_client": http_client} if whose == "the user's" else {}
        async with AsyncEvoLink(base_url=service.url, max_connections=2, request_timeout=1, **given) as client:  # type: ignore[arg-type]
            answers = await asyncio.gather(*(client.raw("POST", "/v1/anything", json={}) for _ in range(40)))
        assert len(answers) == service.posts == 40


@pytest.mark.looptime
async def test_a_users_client_whose_connections_are_all_taken_has_sent_nothing() -> None:
    retry = RetryPolicy(0.01, 0.02)
    async with sharing(1, request_timeout=0.3, retry=retry) as (service, http_client, client):
        async with http_client.stream("GET", service.url):  # somebody else's, and not read to its end
            with pytest.raises(ConnectionFailedError, match=r"PoolTimeout; all connections of http_client are in use"):
                await client.images.submit(model="unknown", prompt="x", timeout=0.5)
        assert service.posts == 0
        assert (await client.images.submit(model="unknown", prompt="x")).id == "task-1"


class Patient(httpx.AsyncBaseTransport):
    """Takes all the time it is given to find a connection, to connect and to agree on TLS, and then gives up."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeouts = request.extensions["timeout"]
        for step in ("pool", "connect", "connect"):
            await asyncio.sleep(timeouts[step] - 0.001)
        raise httpx.ConnectTimeout("no connection", request=request)


@pytest.mark.looptime
@pytest.mark.parametrize("request_timeout", [None, 3.0, 60.0])
async def test_a_users_client_that_never_connects_is_heard_before_it_is_cut(request_timeout: float | None) -> None:
    async with (
        httpx.AsyncClient(transport=Patient()) as http_client,
        AsyncEvoLink(
            base_url="http://127.0.0.1:9",
            http_client=http_client,
            request_timeout=request_timeout,
            retry=RetryPolicy(unreachable_for=1),
        ) as client,
    ):
        [outcome] = await client.run_many([ImageRequest(model="unknown", prompt="x")])
        assert outcome.status == "rejected"
        assert isinstance(outcome.error, ConnectionFailedError)


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
