"""Many tasks saved through a bad network from a media host that lies: what has its name is whole.

SAVING_TASKS=1000 for the large run.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from wiretap import wiretap

from evolink_async import AsyncEvoLink, AudioRequest, DownloadError, ImageRequest, RetryPolicy, Task, VideoRequest
from evolink_async.emulator import Emulator
from evolink_async.http import media
from evolink_async.saving import Saver, download
from evolink_async.testing import Bandwidth, FaultProxy, LimitData, ResetPeer, Slicer, Timeout

TASKS = int(os.environ.get("SAVING_TASKS", "60"))
FAST = RetryPolicy(base_delay=0.01, max_delay=0.1)

RESULTS = {"method": "GET", "path": "/results/"}
LIES: list[dict[str, Any]] = [
    {"cut": 700, "probability": 0.08},
    {"cut": 0, "reset": True, "probability": 0.04},
    {"stall": 900, "probability": 0.03},
    {"drip": 300, "probability": 0.03},
    {"content_length": 500, "probability": 0.05},  # shorter than what is sent
    {"content_length": 10_000_000, "probability": 0.05},  # longer
    {"status": 200, "raw_body": b"<!DOCTYPE html><html>Sorry</html>", "content_type": "text/html", "probability": 0.05},
    {"status": 200, "raw_body": b"<html>" + b"x" * 999, "content_type": "image/png", "probability": 0.03},
    {"status": 503, "probability": 0.04},
    {"status": 429, "headers": {"Retry-After": "0"}, "probability": 0.04},
    {"drop": "before", "probability": 0.04},
    {"garbage": b"\x00\xff what?\r\n\r\n", "probability": 0.03},
]


def requests() -> list[Any]:
    kinds = [
        lambda n: ImageRequest(model="gpt-4o-image", prompt=f"{n}", n=1 + n % 2, key=f"picture {n}"),
        lambda n: VideoRequest(model="seedance-2.0-text-to-video", prompt=f"{n}"),
        lambda n: AudioRequest(model="suno-v4.5-beta", prompt=f"{n}", key=f"Song-{n}"),
    ]
    return [kinds[0 if n % 5 < 3 else n % 5 - 2](n) for n in range(TASKS)]


async def generated(server: Any) -> list[tuple[Any, Task]]:
    """Requests and their tasks, made over a good connection."""
    async with AsyncEvoLink(server.api_key, base_url=server.base_url, rate_limit="5000/s") as client:
        outcomes = await client.run_many(requests(), max_outstanding=1000)
    return [(outcome, outcome.unwrap()) for outcome in outcomes]


@pytest.mark.timeout(600 + TASKS)
async def test_what_has_its_name_is_whole_whatever_the_host_and_the_network_do(
    tmp_path: Path, api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    monkeypatch.setattr(download, "STALL_SECONDS", 0.7)
    monkeypatch.setattr(media, "ANSWER_TIMEOUT", 2.0)
    out = tmp_path / "out"
    async with (
        Emulator(speed=100, seed=seed, api_key=api_key).serve() as server,
        FaultProxy(server.base_url, seed=seed) as proxy,
        wiretap(proxy.base_url) as tap,
        AsyncEvoLink(base_url=tap.base_url, retry=FAST) as client,
    ):
        made = await generated(server)
        through = await client.tasks.get_many([task.id for _, task in made])  # links lead where the task was asked for
        server.emulator.set_faults([RESULTS | lie for lie in LIES])
        for toxic in (
            LimitData(bytes=3_000, toxicity=0.15),
            ResetPeer(timeout=20, toxicity=0.05),
            Slicer(average_size=900, size_variation=600, toxicity=0.3),
            Bandwidth(rate=100, toxicity=0.2),
            Timeout(timeout=0, toxicity=0.02),
        ):
            proxy.add(toxic)
        saver = Saver(client._core, out)
        await saver.prepare()
        saved: dict[int, tuple[Path, ...]] = {}
        failures: Counter[str] = Counter()

        async def save(index: int) -> None:
            outcome, task = made[index]
            key, identity = outcome.request.key, outcome.identity
            try:
                saved[index] = await saver.save(through[task.id], key=key, index=index, identity=identity)
            except DownloadError as error:
                failures[str(error).partition(". The generation")[0].rpartition(" ")[2]] += 1

        rounds = 0
        while len(saved) < TASKS:
            await asyncio.gather(*(save(index) for index in range(TASKS) if index not in saved))
            rounds += 1
            assert rounds < 30, failures
        told = [row["hit"] for row in server.emulator._world.plan.as_json()]
        assert all(told) or TASKS < 500, told
        server.emulator.set_faults([])
        expected: dict[str, str] = {}
        async with httpx.AsyncClient() as plain:
            for index, (_, task) in enumerate(made):
                assert len(saved[index]) == len(task.urls)
                for link, path in zip(task.urls, saved[index], strict=True):
                    expected[path.name] = hashlib.sha256((await plain.get(link)).content).hexdigest()
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    assert found == expected
    on_the_wire = tap.media_connections()
    assert len(on_the_wire) > TASKS
    assert not any(api_key.encode() in said or b"authorization" in said.lower() for said in on_the_wire)
    assert not any(b"cookie" in said.lower() for said in on_the_wire)
    assert server.emulator.book()["media"]["with_authorization"] == 0
    print(
        f"{TASKS} tasks, {len(found)} files, {len(on_the_wire)} media connections, "
        f"{sum(told)} lies told, {proxy.stats.accepted} connections through the proxy, {rounds} rounds, "
        f"{sum(failures.values())} saves failed on the way"
    )
