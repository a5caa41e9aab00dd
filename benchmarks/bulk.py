"""A pool under load: thousands of requests over real TCP against the emulator in another process.

    python benchmarks/bulk.py [--requests 5000] [--speed 100] [--seed 1] [--max-outstanding 1000] [--json]
    python benchmarks/bulk.py --memory [--items 10000,100000] [--json]
    python benchmarks/bulk.py --cpu [--requests 5000] [--json]

The first counts what came back against the emulator's book (429 for 1 % of the submissions, 2 % of the tasks fail):
every request has exactly one outcome, every POST that was accepted has its outcome, nothing is paid twice. The second
gives a generator of many items to a service in this process that finishes everything at once, and compares the peak
memory (each size in its own process). The third measures the CPU time of the client alone, with the same service.
CPU time is this process's own; the emulator's is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import httpx
from machine import machine

from evolink_async import AsyncEvoLink, ImageRequest
from evolink_async import session as session_module
from evolink_async.emulator import Emulator, Fault, Server
from evolink_async.http.answers import Answer
from evolink_async.http.exchange import Exchange

MODEL = "gpt-4o-image"
REFUSED, FAILED = 0.01, 0.02


def requests(count: int) -> Iterator[ImageRequest]:
    for number in range(count):
        yield ImageRequest(model=MODEL, prompt=f"lighthouse number {number}", key=f"row-{number}")


# The emulator, in its own process


def _serve(pipe: Connection, speed: float, seed: int) -> None:
    hint = {"retry-after-ms": "50"}
    faults = [Fault(method="POST", path="/v1/images", status=429, probability=REFUSED, headers=hint)]
    emulator = Emulator(speed=speed, seed=seed, failure_share=FAILED, faults=faults)

    def started(server: Server) -> None:
        pipe.send((server.base_url, server.api_key))

    emulator.run(port=0, on_start=started)


class EmulatorProcess:
    def __init__(self, speed: float, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, speed, seed), daemon=True)
        self._process.start()
        self.base_url, self.api_key = here.recv()

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(10)


async def bulk(count: int, speed: float, seed: int, most: int) -> dict[str, Any]:
    server = await asyncio.to_thread(EmulatorProcess, speed, seed)
    try:
        async with AsyncEvoLink(server.api_key, base_url=server.base_url, rate_limit="1000/s") as client:
            cpu, start = time.process_time(), time.perf_counter()
            outcomes = []
            async with client.pool(requests(count), max_outstanding=most) as pool:
                async for outcome in pool:
                    outcomes.append(outcome)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            stats = pool.stats
        async with httpx.AsyncClient(timeout=60) as plain:
            book = (await plain.get(f"{server.base_url}/_emulator/book")).json()
    finally:
        await asyncio.to_thread(server.stop)
    keys = Counter(outcome.key for outcome in outcomes)
    booked = {post["task_id"]: post for post in book["posts"]}
    told = {outcome.task.id: str(outcome.status) for outcome in outcomes if outcome.task is not None}
    charged = sum(post["charged"] for post in book["posts"])
    return {
        "requests": count,
        "outcomes": dict(stats.counts),
        "each_once": len(keys) == count and set(keys.values()) == {1},
        "book_agrees": told == {task_id: post["status"] for task_id, post in booked.items()},
        "paid_twice": len(booked) - len({post["idempotency_key"] for post in book["posts"]}),
        "charged": charged,
        "charged_agrees": abs(charged - float(stats.credits_spent)) < 1e-6,
        "posts": stats.posts,
        "refused_429": stats.rate_limited,
        "polls": stats.polls,
        "status_requests": stats.status_requests,
        "seconds": round(wall, 2),
        "posts_per_second": round(stats.posts / wall, 1),
        "cpu_ms_per_request": round(1000 * cpu / count, 3),
        "peak_rss_mb": peak_rss(),
    }


# A service in this process


class Canned(Exchange):
    """Accepts everything, has it finished at once, and costs next to nothing: HTTP itself is left out."""

    count = 0

    async def send(self, method: str, path: str, **_: Any) -> Answer:
        Canned.count += 1
        body = (
            '{"id": "task-unified-%d", "status": "completed", "model": "gpt-4o-image", "type": "image", '
            '"results": ["https://files.example/%d.png"], "usage": {"credits_reserved": 2.5}}'
        )
        return Answer(200, {}, (body % (self.count, self.count)).encode())


async def through_canned(count: int, most: int) -> dict[str, Any]:
    logging.disable(logging.INFO)
    session_module.Exchange = Canned  # type: ignore[attr-defined]
    async with AsyncEvoLink("sk-canned", base_url="http://127.0.0.1") as client:
        client._core.memory.rates[MODEL] = 1e6
        cpu, start = time.process_time(), time.perf_counter()
        done = 0
        async with client.pool(requests(count), max_outstanding=most) as pool:
            async for outcome in pool:
                done += outcome.ok
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "requests": count,
        "completed": done,
        "seconds": round(wall, 2),
        "cpu_ms_per_request": round(1000 * cpu / count, 3),
        "peak_rss_mb": peak_rss(),
    }


def _measure_memory(count: int, most: int) -> dict[str, Any]:
    return asyncio.run(through_canned(count, most))


def memory(sizes: list[int], most: int) -> dict[str, Any]:
    rows = []
    for size in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as workers:
            rows.append(workers.apply(_measure_memory, (size, most)))
    growth = rows[-1]["peak_rss_mb"] - rows[0]["peak_rss_mb"]
    items = rows[-1]["requests"] - rows[0]["requests"]
    return {"rows": rows, "growth_mb": round(growth, 1), "bytes_per_item": round(growth * 1e6 / items) if items else 0}


def peak_rss() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--speed", type=float, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-outstanding", type=int, default=1000)
    parser.add_argument("--memory", action="store_true", help="compare the peak memory of generators of these --items")
    parser.add_argument("--items", default="10000,100000")
    parser.add_argument("--cpu", action="store_true", help="the client alone, against a service in this process")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.memory:
        figures = memory([int(size) for size in options.items.split(",")], min(options.max_outstanding, 100))
    elif options.cpu:
        figures = asyncio.run(through_canned(options.requests, options.max_outstanding))
    else:
        figures = asyncio.run(bulk(options.requests, options.speed, options.seed, options.max_outstanding))
    figures = machine("httpx") | {"seed": options.seed} | figures
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:20} {value}")
    good = all(figures.get(name, True) for name in ("each_once", "book_agrees", "charged_agrees"))
    return 0 if good and not figures.get("paid_twice") else 1


if __name__ == "__main__":
    sys.exit(main())
