"""Paid requests over sockets that took long to open: the limit and the cool-downs hold at the first byte of each.

And over those that were open before a laptop slept.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from test_transport import Answer, Peer, serving

from evolink_async import AsyncEvoLink, ImageRequest, clock

pytestmark = pytest.mark.looptime


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
    """Connections open after so many seconds, by their number."""
    loop = asyncio.get_running_loop()
    connect, opened = loop.create_connection, 0

    async def create_connection(*args: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        await asyncio.sleep(seconds(opened))
        return await connect(*args, **options)

    monkeypatch.setattr(loop, "create_connection", create_connection)


def accepting(arrivals: list[float], first: bytes | None = None) -> Answer:
    """Accepts every request, but the first one where there is another answer to it."""

    def answer(peer: Peer, request: bytes) -> None:
        arrivals.append(asyncio.get_running_loop().time())
        body = json.dumps({"id": f"task-{len(arrivals)}", "status": "completed", "results": ["https://example.com/1"]})
        accepted = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body.encode())
        peer.write(first if first is not None and len(arrivals) == 1 else accepted)

    return answer


async def submit(url: str, count: int, key: Any = "sk-slow-connections", **options: Any) -> None:
    async with AsyncEvoLink(key, base_url=url, **options) as client:
        await asyncio.gather(
            *(client.submit(ImageRequest(model="gpt-4o-image", prompt=str(number))) for number in range(count))
        )


async def test_requests_whose_connections_open_together_keep_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals: list[float] = []
    slowly(monkeypatch, lambda number: 8 - asyncio.get_running_loop().time() if number <= 40 else 0)
    async with serving(accepting(arrivals)) as server:
        await submit(server.url, 60, rate_limit="5/s")
    assert len(arrivals) == 60
    assert arrivals[0] == pytest.approx(8, abs=0.01)
    assert all(later - earlier > 0.99 for earlier, later in zip(arrivals, arrivals[6:], strict=False))


async def test_a_request_that_was_still_connecting_when_a_cool_down_began_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arrivals: list[float] = []
    slowly(monkeypatch, lambda number: 0 if number == 1 else 3)
    refusal = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n"
    async with serving(accepting(arrivals, refusal)) as server:
        await submit(server.url, 10)
    assert len(arrivals) == 11
    assert arrivals[1] >= 60


async def test_waiting_for_its_turn_with_an_open_connection_takes_nothing_from_the_time_of_the_answer() -> None:
    arrivals: list[float] = []

    async def key() -> str:
        await asyncio.sleep(max(0.0, 8 - asyncio.get_running_loop().time()))
        return "sk-slow-connections"

    async with serving(accepting(arrivals)) as server:
        await submit(server.url, 12, key, rate_limit="1/s", request_timeout=3, on_lost_response="hold")
    assert [round(arrival, 1) for arrival in arrivals] == [8.0 + number for number in range(12)]


def closing_idle(answer: Answer, seconds: float) -> Answer:
    """Closes each connection so many seconds after its answer, as servers do."""

    def answer_and_close(peer: Peer, request: bytes) -> None:
        answer(peer, request)
        asyncio.get_running_loop().call_later(seconds, peer.close)

    return answer_and_close


async def test_after_one_slow_connection_the_others_find_the_wire_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    arrivals: list[float] = []
    slowly(monkeypatch, lambda number: 8 if number == 1 else 0)
    async with serving(closing_idle(accepting(arrivals), 5)) as server:
        await submit(server.url, 12, rate_limit="6/min")
    assert [round(arrival) for arrival in arrivals] == [8 + 10 * number for number in range(12)]
    assert not caplog.records  # the service was reached each time


async def test_a_connection_that_ends_while_its_request_waits_for_the_limit_is_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    arrivals: list[float] = []

    async def key() -> str:
        await asyncio.sleep(max(0.0, 31 - asyncio.get_running_loop().time()))
        return "sk-slow-connections"

    async with serving(accepting(arrivals)) as server:

        def close_all() -> None:
            for peer in server.peers:
                peer.close()

        asyncio.get_running_loop().call_at(35, close_all)
        await submit(server.url, 4, key, rate_limit="6/min")
    assert [round(arrival) for arrival in arrivals] == [31, 41, 51, 61]
    assert not caplog.records


class _Slow(httpx.AsyncBaseTransport):
    """Bears a long time with each status read, and accepts every request."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.arrivals.append(asyncio.get_running_loop().time())
        await asyncio.sleep(5)
        return httpx.Response(200, json={"id": f"task-{len(self.arrivals)}", "status": "pending"})


async def test_the_limit_holds_where_requests_wait_behind_status_reads_for_a_client_of_the_users() -> None:
    transport = _Slow()
    options: dict[str, Any] = {"base_url": "http://127.0.0.1:1", "max_connections": 4, "rate_limit": "1/s"}
    async with (
        httpx.AsyncClient(transport=transport) as mine,
        AsyncEvoLink("sk-slow-connections", http_client=mine, **options) as client,
    ):
        reads = [asyncio.create_task(client.tasks.get(f"task-{number}")) for number in range(3)]
        await asyncio.sleep(0)
        posts = (client.submit(ImageRequest(model="gpt-4o-image", prompt=str(number))) for number in range(6))
        await asyncio.gather(*posts, *reads, return_exceptions=True)
    arrivals = transport.arrivals
    assert len(arrivals) == 6
    assert all(later - earlier > 0.99 for earlier, later in zip(arrivals, arrivals[2:], strict=False))


async def test_a_connection_that_leaves_no_time_for_the_answer_is_given_up_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arrivals: list[float] = []
    accept = accepting(arrivals)

    def after_a_second(peer: Peer, request: bytes) -> None:
        asyncio.get_running_loop().call_later(1, accept, peer, request)

    slowly(monkeypatch, lambda number: 3.9 if number == 1 else 0)
    async with serving(after_a_second) as server:
        await submit(server.url, 1, request_timeout=4, on_lost_response="hold")
        assert len(server.requests) == 1


async def test_after_hours_of_sleep_nothing_is_sent_over_a_connection_of_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server has ended them, and a machine that slept heard nothing of it. Loop time stood still."""
    start, asleep = datetime(2026, 11, 20, tzinfo=UTC), timedelta()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(clock, "now", lambda: start + timedelta(seconds=loop.time()) + asleep)
    arrivals: list[float] = []
    accept, of_before = accepting(arrivals), 0

    def answer(peer: Peer, request: bytes) -> None:
        if peer.number < of_before:
            peer.transport.abort()
        else:
            loop.call_later(0.1, accept, peer, request)

    requests = [ImageRequest(model="gpt-4o-image", prompt=str(number)) for number in range(20)]
    async with (
        serving(answer) as server,
        AsyncEvoLink("sk-slow-connections", base_url=server.url, rate_limit="100/s") as client,
    ):
        assert all(outcome.ok for outcome in await client.run_many(requests))
        of_before, asleep = len(server.peers), timedelta(hours=8)
        assert of_before > 10
        outcomes = await client.run_many(requests)
        assert [outcome.status for outcome in outcomes] == ["completed"] * 20
        assert len(server.requests) == len(arrivals) == 40
