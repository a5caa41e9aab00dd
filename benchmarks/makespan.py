"""How long a whole job takes over the least time possible: the real client, pool and emulator, on a virtual clock.

    python benchmarks/makespan.py [--requests 10000] [--rate 50] [--seconds 10] [--seed 1] [--seeds 3] [--json]
    python benchmarks/makespan.py --quick

The emulator runs in this process and takes so many submissions a second; its tasks take about 10 s, some more, some
less. Submissions are answered after 50 to 300 ms, looks after 20 to 100 ms. One client sends all requests of a
generator through one pool, once with the limit set by its user, and once without: then it starts with 10 at once and
5/s and has to find the limit, which says no more than 429 with Retry-After.

The lower bound: the n-th task cannot be accepted before n / rate, and then takes what it takes; the job takes as long
as the last of them to end, about requests / rate + what the slowest of the last ones takes. Exit status 1 if a job
takes more than 1.03 times that, or if anything was lost or paid twice. --quick checks that it runs, not the claims.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import httpx
import looptime
from machine import machine

from evolink_async import AsyncEvoLink, ImageRequest
from evolink_async.emulator import Emulator

MODEL = "gpt-4o-image"
CLAIM = 1.03


class Wire(httpx.AsyncBaseTransport):
    """Carries requests to the emulator, in a time of its own."""

    def __init__(self, emulator: Emulator, dice: random.Random) -> None:
        self._inner = httpx.ASGITransport(app=emulator.app)  # type: ignore[arg-type]
        self._dice = dice
        self.answers: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        submission = request.url.path.endswith("/generations")
        way = self._dice.uniform(0.05, 0.3) / 2 if submission else self._dice.uniform(0.02, 0.1) / 2
        await asyncio.sleep(way)
        response = await self._inner.handle_async_request(request)
        self.answers[f"{'POST' if submission else 'look'} {response.status_code}"] += 1
        await asyncio.sleep(way)
        return response


def requests(count: int) -> Iterator[ImageRequest]:
    for number in range(count):
        yield ImageRequest(model=MODEL, prompt=f"lighthouse number {number}", key=f"row-{number}")


async def job(count: int, rate: float, lasts: float, limit: str | None, seed: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    tasks = {MODEL: {"estimate": lasts, "bias": 1.0, "sigma": 0.25, "rate": rate}}
    emulator = Emulator(clock=loop.time, seed=seed, models=tasks, credits=1e9)
    wire = Wire(emulator, random.Random(seed))
    start = loop.time()
    seen: Counter[str] = Counter()
    # The default of 1000 would be too few places for long tasks at this rate.
    places = max(1000, int(2 * rate * lasts))
    async with httpx.AsyncClient(transport=wire) as http_client:  # noqa: SIM117
        async with AsyncEvoLink(
            emulator.api_key, base_url="http://127.0.0.1", http_client=http_client, rate_limit=limit
        ) as client:
            async with client.pool(requests(count), max_outstanding=places) as pool:
                async for outcome in pool:
                    seen[str(outcome.key)] += outcome.ok
    took = loop.time() - start
    book = emulator.book()["posts"]
    book.sort(key=lambda post: post["time"])
    bound = max(n / rate + post["finished_at"] - post["time"] for n, post in enumerate(book, start=1))
    delays = [post["first_told_at"] - post["finished_at"] for post in book]
    posts = sum(number for answer, number in wire.answers.items() if answer.startswith("POST"))
    return {
        "took": round(took, 2),
        "bound": round(bound, 2),
        "times_the_bound": round(took / bound, 4),
        "last_accepted_after": round(book[-1]["time"] - start, 2),
        "mean_detection_delay": round(statistics.fmean(delays), 2),
        "refused_share": round(wire.answers["POST 429"] / posts, 5),
        "status_requests_per_task": round((sum(wire.answers.values()) - posts) / count, 3),
        "each_once": len(seen) == len(book) == count and set(seen.values()) == {1},
    }


def run(count: int, rate: float, lasts: float, limit: str | None, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        figures = runner.run(job(count, rate, lasts, limit, seed))
    return figures | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument(
        "--rate", type=float, default=50.0, help="of the emulator, and of the user who knows it, per second"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="that a task takes, about")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a short job, one seed, no claims")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    count = 300 if options.quick else options.requests
    seeds = range(options.seed, options.seed + (1 if options.quick else options.seeds))
    jobs = []
    for limit in (f"{options.rate:g}/s", None):
        for seed in seeds:
            jobs.append({"user_limit": limit, "seed": seed} | run(count, options.rate, options.seconds, limit, seed))
            if not options.json:
                print(*(f"{name}={value}" for name, value in jobs[-1].items()), flush=True)
    head = machine("httpx") | {"requests": count, "rate": options.rate, "seeds": list(seeds)}
    ratios = {
        limit or "none": statistics.fmean(job["times_the_bound"] for job in jobs if job["user_limit"] == limit)
        for limit in (f"{options.rate:g}/s", None)
    }
    if options.json:
        print(json.dumps(head | {"jobs": jobs, "times_the_bound": ratios}, indent=2))
    else:
        print()
        for name, value in head.items():
            print(f"{name:14} {value}")
        for limit, ratio in ratios.items():
            print(f"user's limit {limit}: {ratio:.3f} times the lower bound")
    holds = options.quick or all(ratio <= CLAIM for ratio in ratios.values())
    return 0 if holds and all(job["each_once"] for job in jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
