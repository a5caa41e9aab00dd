"""A large job, run twice; how much memory that took.

python big_job_program.py LEDGER COUNT
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psutil

from evolink_async.ledger import Entered, Entry, JobLedger, Todo, open_job, what_to_do
from evolink_async.types import Task

COUNT, BATCH = int(sys.argv[2]), 500
NOW = datetime(2026, 11, 20, tzinfo=UTC)


async def go_through(job: JobLedger, first: int, last: int, use: Callable[..., Coroutine[Any, Any, None]]) -> None:
    for start in range(first, last, BATCH):
        entries = [
            Entry(None, number.to_bytes(8), "/v1/images/generations", "gpt-4o-image")
            for number in range(start, start + BATCH)
        ]
        await use(job, await asyncio.gather(*map(job.enter, entries)), start)


async def pay(job: JobLedger, known: list[Entered], start: int) -> None:
    for number, one in enumerate(known, start):
        assert what_to_do(one) is Todo.SUBMIT
        job.intend(
            one.row,
            idempotency_key=f"ea-{number:032x}",
            body=b'{"model": "gpt-4o-image", "prompt": "a lighthouse, variation %d"}' % number,
            fingerprint="0123456789abcdef",
            at=NOW,
            price="image",
            told=Decimal(3),
        )
        wire = {"id": f"task-unified-1774857405-{number:08x}", "model": "gpt-4o-image"}
        job.accepted(one.row, wire["id"], reserved=Decimal(3), at=NOW)
        done = wire | {"status": "completed", "results": [f"https://files.example/{number:032x}.png"]}
        ended = job.ended(one.row, Task.model_validate(done), at=NOW)
    await ended


delivered = 0


async def deliver(job: JobLedger, known: list[Entered], start: int) -> None:
    global delivered
    for one in known:
        assert one.row.task is not None
        delivered += what_to_do(one) is Todo.DELIVER and one.row.task.succeeded


async def one_run(path: str, use: Callable[..., Coroutine[Any, Any, None]]) -> int:
    """How much more memory is used after all of it than after a tenth."""
    process = psutil.Process()
    job = await open_job(path)
    await go_through(job, 0, COUNT // 10, use)
    gc.collect()
    before = process.memory_info().rss
    await go_through(job, COUNT // 10, COUNT, use)
    gc.collect()
    after = process.memory_info().rss
    await job.aclose()
    return int(after - before)


async def main(path: str) -> None:
    told = {"grown_in_the_first_run": await one_run(path, pay)}
    told["grown_in_the_second_run"] = await one_run(path, deliver)
    told["delivered"] = delivered
    told["requests"] = COUNT
    told["bytes_per_request"] = os.path.getsize(path) // COUNT
    print(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
