"""The thinnest whole."""

from __future__ import annotations

import asyncio

import pytest
from support import virtual_service

from evolink_async import AsyncEvoLink, VideoRequest


async def test_a_picture_is_generated_over_tcp(client: AsyncEvoLink) -> None:
    task = await client.images.generate(model="gpt-4o-image", prompt="a lighthouse")
    assert task.succeeded
    assert len(task.urls) == 1


@pytest.mark.looptime
async def test_an_hour_of_videos_passes_in_virtual_time(api_key: str) -> None:
    async with virtual_service(api_key, seed=3) as (emulator, http_client):
        async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client) as client:
            requests = [VideoRequest(model="seedance-2.0-text-to-video", prompt=f"take {n}") for n in range(200)]
            outcomes = await client.run_many(requests, max_outstanding=10)
        assert len({outcome.task.id for outcome in outcomes if outcome.task}) == 200
        assert asyncio.get_running_loop().time() > 20 * 100
        assert len(emulator.book()["posts"]) == 200
