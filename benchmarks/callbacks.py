"""A job with callbacks beside the same one without: how often is a task looked at, and how late is its end known?

    python benchmarks/callbacks.py [--tasks 200] [--speed 10] [--seed 1] [--json]

The emulator and the receiver, each behind a TCP port of its own, and the client are in one process. The emulator's book
says how often a task was looked at, and when a task ended; delay is from there to its outcome, in seconds of the
machine. "lost" is a job whose callbacks are all lost: polling alone must be enough.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import uvicorn
from machine import machine

from evolink_async import AsyncEvoLink, ImageRequest
from evolink_async.callbacks import CallbackReceiver
from evolink_async.emulator import Emulator
from evolink_async.emulator.server import listen, url_of

MODEL = "gpt-4o-image"


@asynccontextmanager
async def served(receiver_of: Any) -> AsyncIterator[CallbackReceiver]:
    """A receiver on a port of its own."""
    listener = listen("127.0.0.1", 0)
    receiver: CallbackReceiver = receiver_of(url_of(listener))
    config = uvicorn.Config(receiver.asgi, log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield receiver
    finally:
        server.should_exit = True
        await running


async def job(kind: str, tasks: int, speed: float, seed: int) -> dict[str, Any]:
    faults = [{"method": "CALLBACK", "drop": "before"}] if kind == "lost" else []
    emulator = Emulator(speed=speed, seed=seed, private_callbacks=True, faults=faults)
    async with emulator.serve() as server, AsyncEvoLink(server.api_key, base_url=server.base_url) as client:

        def receiver_of(url: str) -> CallbackReceiver:
            return CallbackReceiver(client, public_url=url, secret=secrets.token_bytes(32))

        async with served(receiver_of) as receiver:
            client._core.memory.rates[MODEL] = 500
            requests = (ImageRequest(model=MODEL, prompt=f"lighthouse {number}") for number in range(tasks))
            known: dict[str, float] = {}
            options: dict[str, Any] = {} if kind == "without" else {"callbacks": receiver}
            async with client.pool(requests, **options) as pool:
                async for outcome in pool:
                    assert outcome.ok, outcome.error
                    assert outcome.task is not None
                    known[outcome.task.id] = time.time()
                stats = pool.stats
            await asyncio.sleep(8 / speed)  # the last callbacks
        posts = emulator.book()["posts"]
    ends = {post["task_id"]: post["finished_at"] for post in posts}
    delays = sorted(known[task_id] - end for task_id, end in ends.items())
    attempts = [attempt["result"] for post in posts for attempt in post.get("callback", {}).get("attempts", [])]
    return {
        "callbacks": kind,
        "tasks": tasks,
        "looks_per_task": round(stats.polls / tasks, 2),
        "status_requests_per_task": round(stats.status_requests / tasks, 2),
        "mean_delay": round(sum(delays) / len(delays), 3),
        "p95_delay": round(delays[int(0.95 * len(delays))], 3),
        "answers": {result: attempts.count(result) for result in sorted(set(attempts))},
    }


async def measure(tasks: int, speed: float, seed: int) -> list[dict[str, Any]]:
    return [await job(kind, tasks, speed, seed) for kind in ("without", "with", "lost")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--speed", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = asyncio.run(measure(options.tasks, options.speed, options.seed))
    head = machine("httpx") | {"seed": options.seed, "speed": options.speed}
    if options.json:
        print(json.dumps(head | {"rows": rows}, indent=2))
    else:
        print(", ".join(f"{name} {value}" for name, value in head.items()) + "\n")
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
