"""Our client, the emulator, and a bad network between them: each toxic while submitting, polling and downloading.

Sockets are real, time is virtual, and the emulator's book is the judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from evolink_async import (
    AsyncEvoLink,
    ConnectionFailedError,
    DownloadError,
    ImageRequest,
    SubmitOutcomeUnknownError,
    Task,
    TaskFailedError,
    TaskTimeoutError,
)
from evolink_async.emulator import Emulator
from evolink_async.testing import (
    Bandwidth,
    FaultProxy,
    HalfClose,
    Latency,
    LimitData,
    ResetPeer,
    Slicer,
    SlowClose,
    Timeout,
    Toxic,
)

pytestmark = pytest.mark.looptime

MODEL = "seedance-2.0-text-to-video"
POST = "POST /v1/videos/generations"
DOWN = "down"  # the proxy disabled

SLOW: list[Any] = [
    Latency(latency=800, jitter=700, stream="upstream"),
    Latency(latency=800, jitter=700, stream="downstream"),
    Bandwidth(rate=5, stream="upstream"),
    Bandwidth(rate=5, stream="downstream"),
    SlowClose(delay=5000, stream="upstream"),
    SlowClose(delay=5000, stream="downstream"),
    Slicer(average_size=4, size_variation=3, stream="upstream"),
    Slicer(average_size=50, size_variation=49, delay=100, stream="downstream"),
]
BROKEN: list[Any] = [
    ResetPeer(stream="upstream"),
    ResetPeer(stream="downstream"),
    LimitData(bytes=0, stream="upstream"),
    LimitData(bytes=150, stream="upstream"),
    LimitData(bytes=0, stream="downstream"),
    LimitData(bytes=40, stream="downstream"),
    LimitData(bytes=300, stream="downstream"),
    HalfClose(bytes=0, stream="upstream"),
    HalfClose(bytes=150, stream="upstream"),
    HalfClose(bytes=300, stream="downstream"),
    Timeout(timeout=500, stream="upstream"),
    Timeout(timeout=500, stream="downstream"),
    Timeout(timeout=0, stream="upstream"),
    Timeout(timeout=0, stream="downstream"),
]
TOO_LATE = Latency(latency=40_000)  # the client waits 30 s for a submission, 15 s for a poll


def named(toxic: Any) -> str:
    if toxic == DOWN:
        return DOWN
    attributes = toxic.to_dict()["attributes"].values()
    return "-".join([toxic.name, *map(str, attributes)])


slow = pytest.mark.parametrize("toxic", SLOW, ids=named)
broken = pytest.mark.parametrize("toxic", BROKEN, ids=named)
broken_for_good = pytest.mark.parametrize("toxic", [*BROKEN, TOO_LATE], ids=named)
broken_or_down = pytest.mark.parametrize("toxic", [*BROKEN, TOO_LATE, DOWN], ids=named)
any_network = pytest.mark.parametrize("toxic", [*SLOW, *BROKEN, TOO_LATE, DOWN], ids=named)


@dataclass
class World:
    """The service, the network and the client."""

    emulator: Emulator
    direct_url: str
    proxy: FaultProxy
    client: AsyncEvoLink

    async def spoil(self, toxic: Toxic | str) -> None:
        if isinstance(toxic, Toxic):
            self.proxy.add(toxic)
        else:
            await self.proxy.disable()

    async def submit(self) -> Task:
        return await self.client.videos.submit(model=MODEL, prompt="a lighthouse at dusk", timeout=120)

    @property
    def posts(self) -> list[dict[str, Any]]:
        """Every task that was paid for."""
        return list(self.emulator.book()["posts"])

    @property
    def post_requests(self) -> int:
        """How many POSTs reached the service."""
        return int(self.emulator.book()["requests"].get(POST, 0))


@asynccontextmanager
async def world(api_key: str, *, hold: bool = False, seed: int = 1, **options: Any) -> AsyncIterator[World]:
    """Tasks take some 16 s."""
    clock = asyncio.get_running_loop().time
    emulator = Emulator(clock=clock, speed=10, seed=seed, api_key=api_key, **options)
    async with (
        emulator.serve() as server,
        FaultProxy(server.base_url, seed=seed) as proxy,
        AsyncEvoLink(base_url=proxy.base_url, on_lost_response="hold" if hold else "replay") as client,
    ):
        yield World(emulator, server.base_url, proxy, client)


# --- submitting -------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("hold", [False, True], ids=["replay", "hold"])
async def test_a_submission_over_a_slow_network_is_one_post(api_key: str, toxic: Toxic, hold: bool) -> None:
    async with world(api_key, hold=hold) as here:
        await here.spoil(toxic)
        task = await here.submit()
        assert [post["task_id"] for post in here.posts] == [task.id]
        assert here.post_requests == 1


@broken
async def test_a_lost_response_is_settled_by_one_replay_and_paid_once(api_key: str, toxic: Toxic) -> None:
    async with world(api_key) as here:
        await here.spoil(toxic)
        submitting = asyncio.create_task(here.submit())
        await asyncio.sleep(1.5)  # the replay comes after 2 s
        await here.proxy.reset()
        task = await submitting
        assert [post["task_id"] for post in here.posts] == [task.id]
        assert here.proxy.stats.accepted == 2
        assert here.emulator.book()["replays"] == here.post_requests - 1


@broken
async def test_held_nothing_is_sent_again_and_the_key_finds_what_was_paid(api_key: str, toxic: Toxic) -> None:
    async with world(api_key, hold=True) as here:
        await here.spoil(toxic)
        submitting = asyncio.create_task(here.submit())
        await asyncio.sleep(1.5)  # the replay comes after 2 s
        await here.proxy.reset()
        with pytest.raises(SubmitOutcomeUnknownError) as caught:
            await submitting
        assert here.proxy.stats.accepted == 1
        assert here.post_requests <= 1
        assert {post["idempotency_key"] for post in here.posts} <= {caught.value.idempotency_key}
        assert len(here.posts) == here.post_requests


@broken_for_good
async def test_a_network_that_stays_broken_costs_at_most_one_task(api_key: str, toxic: Toxic) -> None:
    async with world(api_key) as here:
        await here.spoil(toxic)
        with pytest.raises(SubmitOutcomeUnknownError) as caught:
            await here.submit()
        assert here.proxy.stats.accepted == 2
        assert {post["idempotency_key"] for post in here.posts} <= {caught.value.idempotency_key}
        assert len(here.posts) <= 1


@pytest.mark.parametrize("hold", [False, True], ids=["replay", "hold"])
async def test_a_connection_that_the_server_has_ended_already_is_no_lost_response(api_key: str, hold: bool) -> None:
    async with world(api_key, hold=hold) as here:
        await here.client.credits()
        await here.spoil(HalfClose())
        await asyncio.sleep(1)
        await here.proxy.reset()
        task = await here.submit()
        assert here.proxy.stats.accepted == 2
        assert [post["task_id"] for post in here.posts] == [task.id]
        assert here.post_requests == 1


@pytest.mark.parametrize("hold", [False, True], ids=["replay", "hold"])
async def test_a_refused_connection_is_no_lost_response(api_key: str, hold: bool) -> None:
    async with world(api_key, hold=hold) as here:
        await here.proxy.disable()
        submitting = asyncio.create_task(here.submit())
        await asyncio.sleep(20)
        await here.proxy.enable()
        task = await submitting
        assert [post["task_id"] for post in here.posts] == [task.id]
        assert here.post_requests == 1


async def test_refused_to_the_end_nothing_was_sent(api_key: str) -> None:
    async with world(api_key) as here:
        await here.proxy.disable()
        with pytest.raises(ConnectionFailedError):
            await here.submit()
        assert here.posts == []


async def test_a_kept_connection_that_the_server_has_ended_carries_no_paid_request(api_key: str) -> None:
    async with world(api_key, hold=True) as here:
        await here.submit()
        await here.spoil(HalfClose())
        await asyncio.sleep(0.1)
        await here.proxy.reset()
        await here.submit()
        assert here.proxy.stats.accepted == 2
        assert here.post_requests == len(here.posts) == 2


@broken_for_good
async def test_a_service_without_idempotency_is_paid_at_most_twice(api_key: str, toxic: Toxic) -> None:
    async with world(api_key, idempotency=False) as here:
        await here.spoil(toxic)
        with pytest.raises(SubmitOutcomeUnknownError):
            await here.submit()
        assert len(here.posts) <= 2


# --- polling ----------------------------------------------------------------------------------------------------


async def told(client: AsyncEvoLink, task_id: str, timeout: float = 3600) -> str | None:
    """How a task ended, as the client tells it; None: it could not tell in time."""
    try:
        return str((await client.tasks.wait(task_id, timeout=timeout)).status)
    except TaskFailedError as error:
        return str(error.task.status)
    except (TaskTimeoutError, ConnectionFailedError):
        return None


@any_network
async def test_polls_through_a_bad_network_never_change_how_a_task_ends(api_key: str, toxic: Toxic | str) -> None:
    async with world(api_key, failure_share=0.5) as here:
        ids = [(await here.submit()).id for _ in range(4)]
        await here.spoil(toxic)
        early = await asyncio.gather(*(told(here.client, task_id, 8) for task_id in ids))
        late = await asyncio.gather(*(told(here.client, task_id, 60) for task_id in ids))
        await here.proxy.reset()
        truth = await asyncio.gather(*(told(here.client, task_id) for task_id in ids))
        assert {post["task_id"]: post["status"] for post in here.posts} == dict(zip(ids, truth, strict=True))
        assert set(truth) == {"completed", "failed"}
        assert early == [None] * 4
        assert all(fate in (None, true) for fate, true in zip(late, truth, strict=True))


@slow
async def test_a_slow_network_does_not_keep_a_task_from_being_seen_to_end(api_key: str, toxic: Toxic) -> None:
    async with world(api_key) as here:
        task = await here.submit()
        await here.spoil(toxic)
        assert (await here.client.tasks.wait(task)).succeeded
        [post] = here.posts
        assert asyncio.get_running_loop().time() - post["finished_at"] < 30


@broken_or_down
async def test_a_wait_outlives_a_network_that_is_broken_for_a_while(api_key: str, toxic: Toxic | str) -> None:
    async with world(api_key) as here:
        task = await here.submit()
        await here.spoil(toxic)
        waiting = asyncio.create_task(here.client.tasks.wait(task))
        await asyncio.sleep(60)
        assert not waiting.done()
        await here.proxy.reset()
        assert (await waiting).succeeded
        assert len(here.posts) == 1


# --- downloading ------------------------------------------------------------------------------------------------

CUT_SHORT = [
    LimitData(bytes=30_000),
    HalfClose(bytes=30_000),
    ResetPeer(toxicity=0.5),
    Timeout(timeout=0, toxicity=0.5),
]


async def finished(here: World) -> tuple[Task, bytes]:
    """A completed task, and its file as the service itself gives it."""
    task = await here.client.tasks.wait(await here.submit())
    async with httpx.AsyncClient(trust_env=False) as http:
        return task, (await http.get(here.direct_url + urlsplit(task.urls[0]).path)).content


@pytest.mark.parametrize("toxic", [*SLOW, *CUT_SHORT], ids=named)
async def test_a_download_over_a_slow_or_cut_network_is_the_whole_file(
    api_key: str, toxic: Toxic, tmp_path: Path
) -> None:
    async with world(api_key) as here:
        task, content = await finished(here)
        await here.spoil(toxic)
        [path] = await here.client.save(task, tmp_path)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


@broken_or_down
async def test_a_download_over_a_broken_network_is_an_error_and_no_file(
    api_key: str, toxic: Toxic | str, tmp_path: Path
) -> None:
    async with world(api_key) as here:
        task, content = await finished(here)
        await here.spoil(toxic)
        with pytest.raises(DownloadError, match="done and paid"):
            await here.client.save(task, tmp_path)
        assert list(tmp_path.iterdir()) == []
        await here.proxy.reset()
        [path] = await here.client.save(task, tmp_path)
        assert path.read_bytes() == content


# --- a whole job ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_a_job_through_a_network_that_fails_at_random_agrees_with_the_book(api_key: str, seed: int) -> None:
    async with world(api_key, seed=seed, failure_share=0.1) as here:
        for toxic in (
            Latency(latency=300, jitter=300, toxicity=0.5),
            Slicer(average_size=50, size_variation=40, toxicity=0.3),
            ResetPeer(toxicity=0.1),
            ResetPeer(stream="upstream", toxicity=0.1),
            LimitData(bytes=2_000, toxicity=0.3),
            Timeout(timeout=3_000, toxicity=0.1),
        ):
            here.proxy.add(toxic)
        requests = [ImageRequest(model="gpt-4o-image", prompt=f"a lighthouse, {n}") for n in range(40)]
        outcomes = await here.client.run_many(requests, max_outstanding=20)
        assert [outcome.index for outcome in outcomes] == list(range(40))
        told = {outcome.task.id: str(outcome.status) for outcome in outcomes if outcome.task is not None}
        paid = {post["task_id"]: post["status"] for post in here.posts}
        unknown = {outcome.idempotency_key for outcome in outcomes if outcome.status == "unknown"}
        assert told == {task_id: status for task_id, status in paid.items() if task_id in told}, here.proxy
        assert {post["idempotency_key"] for post in here.posts if post["task_id"] not in told} <= unknown
        assert len(paid) <= 40
        assert {str(outcome.status) for outcome in outcomes} <= {"completed", "failed", "unknown"}
        assert "completed" in told.values()
