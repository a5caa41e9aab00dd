"""What a ledger costs: durable writes per second, how long an intent waits, CPU per write and task, bytes per request.

    python benchmarks/ledger.py [--requests 10000] [--tasks 1000] [--rounds 3] [--size 100000] [--folder .] [--json]
                                [--parts many,alone,size,pool] [--postgresql URL]

So many asyncio tasks at once take requests through `enter`, `intend`, `accepted` and `ended`, and wait for each of the
four to be durable. Beside it, in the same run and in turns with it, on the same disk, the least that durability can
cost: as many tasks that wait for a record of 350 bytes to be appended to a file and synced with fdatasync, many at
once, in a thread. The ratio of the two is the figure to trust; the rest depends on the disk and on who else is on it.
The ledger in memory takes the same way without a file: what is left of the CPU time is what the file costs. The one in
PostgreSQL is in a server that is started for it, with its usual settings (fsync on), where temporary files are; or
where the URL says, in a job of its own for each round.

Then the whole of it: the same job through a pool without and with a ledger, in turns, so many tasks outstanding at
once; over TCP, the service in another process, and with a service in this process that answers at once, which shows the
pool's own cost. CPU time is that of the program's process, the ledger's thread included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import queue
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests"))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from machine import machine
from pool import CONNECTIONS, MODEL, WARM_UP, Job, canned_client, drain, requests, seconds_for, serving
from postgres import running

from evolink_async import AsyncEvoLink
from evolink_async.ledger import Entry, JobLedger, open_job
from evolink_async.types import Task

BODY = '{{"model":"gpt-4o-image","prompt":"a lighthouse in the style of painter {}, at dusk","size":"1024x1024"}}'
RECORD = b"x" * 350
VERBS = 4
PARTS = ("many", "alone", "size", "pool")
AS_USUAL = {
    "fsync": "on",
    "full_page_writes": "on",
    "autovacuum": "on",
    "shared_buffers": "128MB",
    "wal_level": "replica",
}
NOW = datetime(2026, 11, 20, tzinfo=UTC)


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"p50_ms": ordered[len(ordered) // 2] * 1e3, "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3}


async def by_many(tasks: int, count: int, one: Callable[[int], Awaitable[float]]) -> dict[str, float]:
    """`one(number)` for every number, so many at once; it tells how long its intent waited."""
    numbers = iter(range(count))
    waits: list[float] = []

    async def work() -> None:
        for number in numbers:
            waits.append(await one(number))

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(tasks)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, **percentiles(waits)}


# The ledger


def completed(number: int) -> Task:
    """A task that has completed, as long as the service's."""
    wire: dict[str, Any] = {
        "id": f"task-unified-1774857405-{number:08x}",
        "object": "image.generation.task",
        "created": 1774857405,
        "model": "gpt-4o-image",
        "type": "image",
        "task_info": {"can_cancel": False, "estimated_time": 45},
        "usage": {"billing_rule": "per_call", "credits_reserved": 2.5, "user_group": "default"},
    }
    results = [f"https://files.evolink.example/images/{number:032x}.png"]
    return Task.model_validate(wire | {"status": "completed", "progress": 100, "results": results})


def through(job: JobLedger) -> Callable[[int], Awaitable[float]]:
    async def one(number: int) -> float:
        known = await job.enter(Entry(None, number.to_bytes(8), "/v1/images/generations", "gpt-4o-image"))
        row = known.row
        asked = time.perf_counter()
        await job.intend(
            row,
            idempotency_key=f"ea-{number:032x}",
            body=BODY.format(number).encode(),
            fingerprint="0123456789abcdef",
            at=NOW,
            price="gpt-4o-image",
            told=Decimal("2.5"),
        )
        waited = time.perf_counter() - asked
        task = TASKS[number]
        await job.accepted(row, task.id, reserved=Decimal("2.5"), at=NOW)
        await job.ended(row, task, at=NOW)
        return waited

    return one


TASKS: list[Task] = []


async def ledger(place: Path | str | None, tasks: int, count: int) -> dict[str, float]:
    job = await open_job(place, f"benchmark {time.time_ns()}")
    try:
        figures = await by_many(tasks, count, through(job))
    finally:
        await job.aclose()
    return figures | {
        "writes_per_second": count * VERBS / figures["seconds"],
        "cpu_us_per_write": figures["cpu_seconds"] / count / VERBS * 1e6,
    }


# The peer: a bare append and fdatasync, many records at a time


class Appender:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[asyncio.Future[None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def append(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(future)
        return future

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        os.close(self._file)

    def _work(self) -> None:
        while True:
            futures = [self._queue.get()]
            while not self._queue.empty() and len(futures) < 2000:
                futures.append(self._queue.get())
            waiting = [future for future in futures if future is not None]
            if waiting:
                os.write(self._file, RECORD * len(waiting))
                getattr(os, "fdatasync", os.fsync)(self._file)
                self._loop.call_soon_threadsafe(self._done, waiting)
            if len(waiting) < len(futures):
                return

    @staticmethod
    def _done(futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            future.set_result(None)


async def append(path: Path, tasks: int, count: int) -> dict[str, float]:
    appender = Appender(path)

    async def one(number: int) -> float:
        for written in range(VERBS):
            asked = time.perf_counter()
            await appender.append()
            if written == 1:
                waited = time.perf_counter() - asked
        return waited

    try:
        figures = await by_many(tasks, count, one)
    finally:
        appender.close()
    return figures | {
        "writes_per_second": count * VERBS / figures["seconds"],
        "cpu_us_per_write": figures["cpu_seconds"] / count / VERBS * 1e6,
    }


# One alone, and the size


async def alone(folder: Path, url: str) -> dict[str, dict[str, float]]:
    """How long one intent waits when nobody else writes, and one append."""
    intents = []
    for place in (folder / "alone.db", url):
        job = await open_job(place, f"benchmark {time.time_ns()}")
        one = through(job)
        intents.append(percentiles([await one(number) for number in range(200)]))
        await job.aclose()
    appender = Appender(folder / "alone")
    appends: list[float] = []
    for _ in range(200):
        asked = time.perf_counter()
        await appender.append()
        appends.append(time.perf_counter() - asked)
    appender.close()
    return {"intent": intents[0], "intent in PostgreSQL": intents[1], "append": percentiles(appends)}


async def size(path: Path, count: int) -> dict[str, float]:
    """The file of so many requests that were completed, and its parts."""
    job = await open_job(path)
    one = through(job)
    for start in range(0, count, 1000):
        await asyncio.gather(*(one(number) for number in range(start, min(count, start + 1000))))
    await job.aclose()
    sizes: dict[str, float] = {"requests": count}
    with closing(sqlite3.connect(path)) as file:
        [[pages], [page]] = file.execute("PRAGMA page_count").fetchall() + file.execute("PRAGMA page_size").fetchall()
        sizes["megabytes"] = pages * page / 1e6
        try:
            parts = file.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name").fetchall()
        except sqlite3.OperationalError:  # an SQLite that was built without it
            parts = []
    sizes |= {f"bytes_per_request: {name}": part / count for name, part in parts if part > count}
    started = time.perf_counter()
    again = await open_job(path)
    sizes["seconds_to_open"] = time.perf_counter() - started
    await again.aclose()
    return sizes


# The whole way, through a pool


async def pooled(client: AsyncEvoLink, job: Job, path: Path | None) -> float:
    """CPU seconds of a job, the opening and closing of its ledger included."""
    given = list(requests(job))
    cpu = time.process_time()
    await drain(client.pool(given, max_outstanding=job.outstanding, ledger=path))
    return time.process_time() - cpu


async def through_pools(folder: Path, tasks: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """CPU per task without and with a ledger; medians of rounds in which they take turns."""
    job = Job(count, tasks, seconds_for(tasks))
    warm_up = Job(WARM_UP, tasks, seconds_for(tasks))
    rows = []
    with serving(job) as base_url:
        async with AsyncEvoLink("sk-benchmark", base_url=base_url, max_connections=CONNECTIONS) as client:
            client._core.memory.rates[MODEL] = 1e7  # nothing is to wait for its turn
            rows.append({"way": "over TCP", **await in_turns(client, job, warm_up, folder / "tcp", rounds)})
    async with canned_client(job) as (client, transport):
        transport._KEPT = 0
        rows.append({"way": "service in process", **await in_turns(client, job, warm_up, folder / "canned", rounds)})
    return rows


async def in_turns(client: AsyncEvoLink, job: Job, warm_up: Job, path: Path, rounds: int) -> dict[str, float]:
    await pooled(client, warm_up, path.with_suffix(".warm"))
    without, with_ledger = [], []
    for number in range(rounds):
        without.append(await pooled(client, job, None))
        with_ledger.append(await pooled(client, job, path.with_suffix(f".{number}.db")))
    bare, full = statistics.median(without), statistics.median(with_ledger)
    return {
        "without_us": bare / job.tasks * 1e6,
        "with_us": full / job.tasks * 1e6,
        "added_us": (full - bare) / job.tasks * 1e6,
        "added_share": full / bare - 1,
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    TASKS.extend(completed(number) for number in range(max(options.requests, options.size)))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name, running(**AS_USUAL) as server:
        folder = Path(name)
        if {"many", "alone"} & set(options.parts):
            url = options.postgresql or server.create()
        if "many" in options.parts:
            results["many"] = await compared(folder, url, options)
        if "alone" in options.parts:
            results["alone"] = await alone(folder, url)
        if "size" in options.parts:
            results["size"] = await size(folder / "size.db", options.size)
        if "pool" in options.parts:
            TASKS.clear()
            results["pool"] = await through_pools(folder, options.tasks, options.requests, options.rounds)
    return results


async def compared(folder: Path, url: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The ledger and its peers, in turns; medians of the rounds."""
    ways = ("append and fdatasync", "ledger", "ledger in PostgreSQL", "ledger in memory")
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(options.rounds):
        rounds["append and fdatasync"].append(await append(folder / f"{number}", options.tasks, options.requests))
        rounds["ledger"].append(await ledger(folder / f"{number}.db", options.tasks, options.requests))
        rounds["ledger in PostgreSQL"].append(await ledger(url, options.tasks, options.requests))
        rounds["ledger in memory"].append(await ledger(None, options.tasks, options.requests))
    return {
        way: {figure: statistics.median(each[figure] for each in all_of_them) for figure in all_of_them[0]}
        for way, all_of_them in rounds.items()
    }


def show(results: dict[str, Any], options: argparse.Namespace) -> None:
    if "many" in results:
        show_many(results["many"], options)
    for what, row in results.get("alone", {}).items():
        print(f"one {what} alone: p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms")
    if "size" in results:
        show_size(dict(results["size"]))
    if "pool" in results:
        print(f"\n{options.requests:,} tasks through a pool, {options.tasks:,} outstanding: CPU us for each task")
        print(f"{'':<24}{'without':>10}{'ledger':>10}{'added':>10}{'share':>10}")
        for row in results["pool"]:
            print(
                f"{row['way']:<24}{row['without_us']:>10.0f}{row['with_us']:>10.0f}{row['added_us']:>10.0f}"
                f"{row['added_share']:>10.0%}"
            )


def show_many(many: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    print(f"{options.tasks:,} tasks at once, {options.requests:,} requests of {VERBS} writes; medians of the rounds")
    print(f"{'':<24}{'writes/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'CPU us per write':>20}")
    for way, row in many.items():
        print(
            f"{way:<24}{row['writes_per_second']:>10,.0f}{row['p50_ms']:>10.1f}{row['p99_ms']:>10.1f}"
            f"{row['cpu_us_per_write']:>20.1f}"
        )
    ours, bare = many["ledger"], many["append and fdatasync"]
    rate, wait = ours["writes_per_second"] / bare["writes_per_second"], ours["p99_ms"] / bare["p99_ms"]
    print(
        f"beside a bare append the ledger writes {rate:.2f} times as many records, its p99 is {wait:.1f} times as long"
    )
    server = many["ledger in PostgreSQL"]
    rate, wait = server["writes_per_second"] / ours["writes_per_second"], server["p99_ms"] / ours["p99_ms"]
    print(f"beside the file PostgreSQL writes {rate:.2f} times as many, its p99 is {wait:.1f} times as long")


def show_size(sizes: dict[str, Any]) -> None:
    print(f"\n{sizes.pop('requests'):,} requests: {sizes.pop('megabytes'):.1f} MB, ", end="")
    print(f"opened again in {sizes.pop('seconds_to_open'):.2f} s (checked whole)")
    for name, bytes_each in sizes.items():
        print(f"{name:<50}{bytes_each:>8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--folder", help="where the files are made, by default where temporary files are")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--postgresql", metavar="URL", help="a database of yours, in which a ledger is made")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.parts = [part.strip() for part in options.parts.split(",")]
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown parts {unknown}; known are {', '.join(PARTS)}")
    logging.getLogger("evolink_async").setLevel(logging.ERROR)
    results = asyncio.run(measure(options))
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    where = machine() | {"sqlite": sqlite3.sqlite_version, "load": load}
    if options.json:
        print(json.dumps({"machine": where, **results}))
    else:
        print(", ".join(f"{name} {value}" for name, value in where.items()) + "\n")
        show(results, options)


if __name__ == "__main__":
    main()
