"""How fast the emulator is and what it holds, so that nobody takes its limits for those of a client.

    python benchmarks/emulator.py [--requests 30000] [--connections 64] [--tasks 100000] [--json]

Status reads: the emulator in a process of its own, on one core where the machine lets us choose; a client of bare
sockets on another. The figure to trust is requests per second of the emulator's own CPU time: it doesn't depend on how
fast the client is. Single reads and batches of 50, on the core install and with the `fast` extra.
Memory: resident memory of a process before and after so many submissions, each with its own prompt and key.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import psutil
from machine import machine

from evolink_async.emulator import Emulator
from evolink_async.emulator.service import Service

BODY = {"model": "gpt-4o-image", "prompt": "a lighthouse at dusk", "size": "1024x1024"}
BATCH = 50


# The emulator, in its own process


def _serve(pipe: Connection, core: int | None, fast: bool) -> None:
    _pin(core)
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if fast:
        import uvloop

        loop_factory = uvloop.new_event_loop
    else:
        sys.modules["httptools"] = None  # type: ignore[assignment]
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_served(pipe))


async def _served(pipe: Connection) -> None:
    async with Emulator(seed=1).serve() as server:
        pipe.send((server.base_url, server.api_key))
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, pipe.recv):
            pipe.send(time.process_time())


def _pin(core: int | None) -> None:
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


class EmulatorProcess:
    def __init__(self, core: int | None, fast: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, core, fast), daemon=True)
        self._process.start()
        self.base_url, self.api_key = self._pipe.recv()

    def cpu(self) -> float:
        """CPU seconds that the emulator has used."""
        self._pipe.send(True)
        seconds: float = self._pipe.recv()
        return seconds

    def stop(self) -> None:
        self._pipe.send(False)
        self._process.join(10)


# The client: prepared bytes out, answers counted by their length


async def throughput(server: EmulatorProcess, count: int, connections: int, batch: bool) -> dict[str, float]:
    host, port = server.base_url.removeprefix("http://").split(":")
    ids = [await _submitted(host, int(port), server.api_key) for _ in range(BATCH)]
    message = _batch_message(server.api_key, ids) if batch else _read_message(server.api_key, ids[0])
    links = [await asyncio.open_connection(host, int(port)) for _ in range(connections)]
    await asyncio.gather(*(_repeat(*link, message, 5) for link in links))
    cpu, started = server.cpu(), time.perf_counter()
    await asyncio.gather(*(_repeat(*link, message, count // connections) for link in links))
    wall, cpu = time.perf_counter() - started, server.cpu() - cpu
    for _, writer in links:
        writer.close()
    done = count // connections * connections
    return {"requests": done, "per_second": done / wall, "per_cpu_second": done / cpu, "busy": cpu / wall}


async def _repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes, count: int) -> None:
    for _ in range(count):
        writer.write(message)
        await _answer(reader)


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return await reader.readexactly(length)


async def _submitted(host: str, port: int, key: str) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(_message("POST /v1/images/generations", key, json.dumps(BODY).encode()))
    task: dict[str, Any] = json.loads(await _answer(reader))
    writer.close()
    return str(task["id"])


def _read_message(key: str, task_id: str) -> bytes:
    return _message(f"GET /v1/tasks/{task_id}", key, b"")


def _batch_message(key: str, ids: list[str]) -> bytes:
    return _message("POST /v1/tasks/batch", key, json.dumps({"task_ids": ids}).encode())


def _message(call: str, key: str, body: bytes) -> bytes:
    head = f"{call} HTTP/1.1\r\nHost: emulator\r\nAuthorization: Bearer {key}\r\nAccept: */*\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# Memory


def _hold(pipe: Connection, count: int) -> None:
    service = Service(credits=10**15)
    service.submit("image", BODY, "warm-up", 0.0)
    gc.collect()
    process = psutil.Process()
    before, started = process.memory_info().rss, time.process_time()
    for number in range(count):
        body = {**BODY, "prompt": f"a lighthouse in the style of painter number {number}, at dusk, with gulls"}
        service.submit("image", body, f"ea-{number:032x}", number / 100)
    cpu = time.process_time() - started
    gc.collect()
    pipe.send({"bytes_per_task": (process.memory_info().rss - before) / count, "submit_us": cpu / count * 1e6})


def memory(count: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(there, count))
    process.start()
    figures: dict[str, float] = here.recv()
    process.join()
    return {"tasks": count, **figures, "megabytes": figures["bytes_per_task"] * count / 1e6}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    theirs = cores[0] if len(cores) > 1 else None
    _pin(cores[1] if len(cores) > 1 else None)
    results: dict[str, Any] = {}
    for name, fast in (("core", False), ("fast", True)):
        server = await asyncio.to_thread(EmulatorProcess, theirs, fast)
        try:
            results[name] = {
                "single": await throughput(server, options.requests, options.connections, batch=False),
                "batch": await throughput(server, options.requests // 10, options.connections, batch=True),
            }
        finally:
            server.stop()
    results["memory"] = await asyncio.to_thread(memory, options.tasks)
    return results


def show(results: dict[str, Any]) -> None:
    print(f"{'status reads':<28}{'requests/s':>12}{'per CPU second':>16}{'busy':>8}")
    for install in ("core", "fast"):
        for way, tasks in (("single", 1), ("batch", BATCH)):
            row = results[install][way]
            name = f"{install}, {f'batches of {BATCH}' if tasks > 1 else 'one by one'}"
            print(f"{name:<28}{row['per_second']:>12,.0f}{row['per_cpu_second']:>16,.0f}{row['busy']:>8.0%}")
    held = results["memory"]
    print(f"\n{held['tasks']:,} tasks: {held['megabytes']:.0f} MB, {held['bytes_per_task']:,.0f} bytes each;", end=" ")
    print(f"{held['submit_us']:.0f} us CPU for a submission in the pure service")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = asyncio.run(measure(options))
    where = machine()
    if options.json:
        print(json.dumps({"machine": where, "seed": 1, **results}))
    else:
        print(", ".join(f"{name} {value}" for name, value in where.items()) + ", seed 1\n")
        show(results)


if __name__ == "__main__":
    main()
