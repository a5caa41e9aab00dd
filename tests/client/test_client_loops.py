"""The limit and the cool-downs hold over the loops of one client, as in a program that calls `asyncio.run` often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from evolink_async import AsyncEvoLink, ImageRequest, RateLimit, RateLimitError

PICTURE = ImageRequest(model="gpt-4o-image", prompt="a lighthouse")


class _Service(httpx.AsyncBaseTransport):
    """Accepts every request, but the first where there is another answer to it."""

    def __init__(self, first: Callable[[], httpx.Response] | None = None) -> None:
        self.first = first
        self.arrivals: list[float] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.arrivals.append(time.monotonic())
        if self.first is not None and len(self.arrivals) == 1:
            return self.first()
        return httpx.Response(200, json={"id": f"task-{len(self.arrivals)}", "status": "pending"})


def client_of(service: _Service, **options: Any) -> AsyncEvoLink:
    mine = httpx.AsyncClient(transport=service)
    return AsyncEvoLink("sk-loop-after-loop", base_url="http://127.0.0.1:1", http_client=mine, **options)


def test_the_limit_of_the_user_holds_over_loops() -> None:
    service = _Service()
    client = client_of(service, rate_limit=RateLimit(2, per=0.5))
    began = time.monotonic()
    for _ in range(4):
        asyncio.run(client.submit(PICTURE))
    asyncio.run(client.aclose())
    # Counted from the beginning: one that was held up on its way arrives closer to the next.
    assert all(at - began > 0.24 * place for place, at in enumerate(service.arrivals))


def test_a_cool_down_holds_over_loops() -> None:
    service = _Service(lambda: httpx.Response(429, headers={"retry-after-ms": "2000"}))
    client = client_of(service)
    with pytest.raises(RateLimitError):
        asyncio.run(client.submit(PICTURE, timeout=1.9))
    asyncio.run(client.submit(PICTURE))
    asyncio.run(client.aclose())
    assert service.arrivals[1] - service.arrivals[0] >= 2


def test_a_cool_down_of_over_an_hour_ends_a_pool_of_a_later_loop_too() -> None:
    service = _Service(lambda: httpx.Response(429, headers={"retry-after": "7200"}))
    client = client_of(service)
    with pytest.raises(RateLimitError):
        asyncio.run(client.submit(PICTURE, timeout=60))
    with pytest.raises(RateLimitError) as caught:
        asyncio.run(client.run_many([PICTURE], task_timeout=60))
    asyncio.run(client.aclose())
    assert [outcome.status for outcome in caught.value.outcomes] == ["not_submitted"]
    assert len(service.arrivals) == 1
