"""How few status requests many tasks take, and how late their ends are known: the real client on a virtual clock.

    python benchmarks/watching.py [--outstanding 1,10,100,1000,5000] [--spread 0.2] [--seed 1] [--seeds 2] [--json]
    python benchmarks/watching.py --quick

A service in this process says that each task takes 100 s; it takes 100 * exp(spread * N(0, 1)) s, but 5 % of the tasks
fail early, somewhere in their first 30 s. It answers after 20 to 100 ms. A pool keeps so many tasks outstanding; its
rate is what that takes, so that they don't start all at once. What counts is a stretch of this steady state, when
some hundred tasks have shown how long they take. Once the service answers for 50 tasks in one request, and up to 1000
outstanding once it doesn't. "1" is a program that waits for one task after the other.

looks and requests: of status, for each task; ids: in each request; delay: from the end of a task at the service to the
moment the caller's loop has its outcome. Means over the seeds.

Exit status 1 if a claim that this program checks doesn't hold. --quick checks that it runs, not the claims.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import httpx
import looptime
from machine import machine

from evolink_async import AsyncEvoLink, ImageRequest

MODEL = "gpt-4o-image"
ESTIMATE = 100.0
MOST_REQUESTS, MOST_DELAY, CROWD = 0.35, 2.5, 5_000
MOST_ONE_BY_ONE = 1_000  # tasks outstanding: more of them take too long to simulate
NO_SLOWER = 1.02
WARM_UP = 500  # tasks at least, before those that count
COUNTED = 500  # tasks at least


class Service(httpx.AsyncBaseTransport):
    """Takes everything, ends it in its time, and counts what it is asked."""

    def __init__(self, spread: float, batches: bool, seed: int) -> None:
        self._spread = spread
        self._batches = batches
        self._durations, self._ways = random.Random(seed), random.Random(seed + 1)
        self._loop = asyncio.get_running_loop()
        self.ends: dict[str, float] = {}
        self.requests = self.looks = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        way = self._ways.uniform(0.02, 0.1) / 2
        await asyncio.sleep(way)
        status, answer = self._answer(request.url.path, await request.aread())
        await asyncio.sleep(way)
        return httpx.Response(status, json=answer)

    def _answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/v1/images/generations":
            return 200, self._make()
        self.requests += 1
        if path == "/v1/tasks/batch":
            if not self._batches:
                return 404, {"error": {"message": "not found"}}
            ids = json.loads(body)["task_ids"]
            self.looks += len(ids)
            return 200, {"data": [self._row(task_id) for task_id in ids]}
        self.looks += 1
        return 200, self._row(path.rpartition("/")[2])

    def _make(self) -> dict[str, Any]:
        task_id, dice = f"task-unified-{len(self.ends):08d}", self._durations
        lasts = ESTIMATE * math.exp(self._spread * dice.gauss(0, 1))
        if dice.random() < 0.05:
            lasts = dice.uniform(1, 30)
        self.ends[task_id] = self._loop.time() + lasts
        return self._row(task_id) | {"task_info": {"can_cancel": True, "estimated_time": ESTIMATE}}

    def _row(self, task_id: str) -> dict[str, Any]:
        row = {"id": task_id, "object": "image.generation.task", "type": "image", "model": MODEL}
        if self.ends[task_id] > self._loop.time():
            return row | {"status": "processing", "progress": 0}
        return row | {"status": "completed", "progress": 100, "results": [f"https://files.example/{task_id}.png"]}


@dataclass
class Stretch:
    """What happened while the tasks ended that count."""

    delays: list[float] = field(default_factory=list)
    requests: int = 0
    looks: int = 0

    def figures(self) -> dict[str, float]:
        tasks, ordered = len(self.delays), sorted(self.delays)
        return {
            "looks": self.looks / tasks,
            "requests": self.requests / tasks,
            "ids": self.looks / self.requests,
            "mean": statistics.fmean(ordered),
            "median": statistics.median(ordered),
            "p99": ordered[int(0.99 * tasks)],
        }


def requests(count: int) -> Iterator[ImageRequest]:
    for number in range(count):
        yield ImageRequest(model=MODEL, prompt=f"lighthouse number {number}", key=f"row-{number}")


async def steady(outstanding: int, spread: float, batches: bool, seed: int, factor: float) -> dict[str, float]:
    """So many tasks outstanding; after the first of them twice as many are counted."""
    service = Service(spread, batches, seed)
    unmeasured = max(int(WARM_UP * factor), int(2 * factor * outstanding))
    counted = max(int(COUNTED * factor), int(2 * factor * outstanding))
    stretch, loop = Stretch(), asyncio.get_running_loop()
    async with httpx.AsyncClient(transport=service) as http_client:
        client = AsyncEvoLink(
            "sk-benchmark",
            base_url="http://127.0.0.1",
            http_client=http_client,
            rate_limit=f"{max(1.0, 1.1 * outstanding / ESTIMATE):g}/s",
        )
        total = unmeasured + counted + outstanding
        async with client, client.pool(requests(total), max_outstanding=outstanding) as pool:
            told = 0
            async for outcome in pool:
                told += 1
                if told == unmeasured:
                    stretch.requests, stretch.looks = -service.requests, -service.looks
                elif unmeasured < told <= unmeasured + counted:
                    assert outcome.task is not None, outcome
                    stretch.delays.append(loop.time() - service.ends[outcome.task.id])
                    if told == unmeasured + counted:
                        stretch.requests += service.requests
                        stretch.looks += service.looks
                        pool.stop()
                        break
    return stretch.figures()


def run(outstanding: int, spread: float, batches: bool, seed: int, factor: float) -> dict[str, float]:
    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        return runner.run(steady(outstanding, spread, batches, seed, factor))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outstanding", default="1,10,100,1000,5000", help="tasks outstanding, with commas")
    parser.add_argument("--spread", type=float, default=0.2, help="of the durations (0.2)")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small, one seed, no claims")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    sizes = [1, 60] if options.quick else [int(size) for size in options.outstanding.split(",")]
    seeds = range(options.seed, options.seed + (1 if options.quick else options.seeds))
    factor = 0.1 if options.quick else 1.0
    started, rows = time.perf_counter(), []
    columns = ("looks", "requests", "ids", "mean", "median", "p99")
    header = machine("httpx") | {"spread": options.spread, "seeds": list(seeds)}
    if not options.json:
        print(*(f"{name:14} {value}" for name, value in header.items()), sep="\n")
        print(f"\n{'outstanding':>11} {'batches':>8}" + "".join(f"{name:>10}" for name in columns))
    for size in sizes:
        for batches in (True, False) if size <= MOST_ONE_BY_ONE else (True,):
            runs = [run(size, options.spread, batches, seed, factor) for seed in seeds]
            means = {name: statistics.fmean(one[name] for one in runs) for name in columns}
            rows.append({"outstanding": size, "batches": batches} | means)
            if not options.json:
                cells = "".join(f"{means[name]:10.3f}" for name in columns)
                print(f"{size:11,d} {'yes' if batches else 'no':>8}{cells}", flush=True)
    claims = []
    for row in rows:
        if row["batches"] and row["outstanding"] == CROWD:
            claims.append((f"{CROWD} outstanding: requests for each task", row["requests"], MOST_REQUESTS))
            claims.append((f"{CROWD} outstanding: seconds of delay", row["mean"], MOST_DELAY))
        if row["batches"] and row["outstanding"] <= MOST_ONE_BY_ONE:
            alone = next(other for other in rows if other["outstanding"] == row["outstanding"] and not other["batches"])
            quotient = row["mean"] / alone["mean"]
            claims.append((f"{row['outstanding']} outstanding: delay over that one by one", quotient, NO_SLOWER))
    if options.json:
        texts = [{"claim": text, "figure": figure, "most": most} for text, figure, most in claims]
        print(json.dumps(header | {"rows": rows, "claims": texts}, indent=2))
    else:
        print()
        for text, figure, most in claims:
            print(f"{'pass' if figure <= most else 'FAIL'}  {text}: {figure:.3f} (at most {most:g})")
        print(f"\n{time.perf_counter() - started:.0f} s")
    return 0 if options.quick or all(figure <= most for _, figure, most in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
