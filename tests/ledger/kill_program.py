"""A small pool in a process that will be killed; the service's book and what was told are files, which survive it.

    python kill_program.py LEDGER BOOK TOLD COUNT

BOOK: a line for every accepted POST, "request idempotency-key task". TOLD: a line for every verb whose future was done:
"intend request key" before its POST is made, "accepted request task".
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from typing import Any

from small_pool import MODEL, Answer, SmallPool

from evolink_async.ledger import JobLedger, Row, open_job
from evolink_async.types import Task


class Lines:
    """Appends whole lines at once."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, *words: str) -> None:
        os.write(self._file, (" ".join(words) + "\n").encode())


class Service:
    """Honours keys, loses one answer in fifty, takes a little time."""

    def __init__(self, path: str) -> None:
        self.tasks: dict[str, str] = {}
        if os.path.exists(path):
            with open(path) as book:
                self.tasks = {key: task for _, key, task in map(str.split, book)}
        self.book = Lines(path)

    async def post(self, body: bytes, idempotency_key: str) -> Answer:
        await asyncio.sleep(random.uniform(0.001, 0.01))
        replayed = idempotency_key in self.tasks
        if not replayed:
            task_id = self.tasks[idempotency_key] = f"task-{idempotency_key}"
            self.book.add(json.loads(body)["prompt"], idempotency_key, task_id)
        if random.random() < 0.02:
            return Answer("lost")
        await asyncio.sleep(random.uniform(0.001, 0.01))
        wire = {"id": self.tasks[idempotency_key], "status": "pending", "usage": {"credits_reserved": 3}}
        return Answer("accepted", Task.model_validate(wire), replayed)

    async def poll(self, task_id: str) -> Task | None:
        await asyncio.sleep(random.uniform(0.001, 0.02))
        return Task(id=task_id, model=MODEL, status="completed")


class Telling:
    """The ledger; tells of what has become durable, the moment its caller could know."""

    def __init__(self, job: JobLedger, told: Lines) -> None:
        self._job = job
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    async def intend(self, row: Row, **options: Any) -> Any:
        refusal = await self._job.intend(row, **options)
        self._told.add("intend", row.identity, options["idempotency_key"])
        return refusal

    async def accepted(self, row: Row, task_id: str, **options: Any) -> Any:
        first = await self._job.accepted(row, task_id, **options)
        self._told.add("accepted", row.identity, task_id)
        return first


async def main(ledger: str, book: str, told: str, count: int) -> None:
    job = await open_job(ledger)
    print("ready", flush=True)
    telling: Any = Telling(job, Lines(told))
    await SmallPool(telling, Service(book)).run([f"r{number}" for number in range(count)], workers=40)
    await job.aclose()
    print("done", flush=True)


asyncio.run(main(*sys.argv[1:4], int(sys.argv[4])))  # type: ignore[call-arg]
