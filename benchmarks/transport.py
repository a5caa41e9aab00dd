"""What one status poll costs, with several HTTP clients in turn, against a loopback server in a second process.

    python benchmarks/transport.py [--requests 2000] [--latency 0.02] [--rows slot,aiohttp] [--install fast] [--json]

Every row starts all its requests at once and reads and parses each answer. Connections are opened inside the
measurement, because programs do that too. CPU time is the client process's own and barely depends on what else the
machine does; requests per second do. Rows that don't finish within `--limit` seconds are cut, counted as far as they
came and marked. Stock httpx needs about two minutes and completes nothing in the first: `--limit 240` lets it finish.

A client spaces its status requests to 500 a second at most; the rows "wait" and "wait-batch" lift that, so that their
requests per second are those of the code.

To add a row: an async function `run(base_url, n) -> Result` under `@row("name", "what it is")`; `measure` does the
bookkeeping. The server answers `GET /v1/tasks/{id}` with a completed task.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from machine import machine

CONNECTIONS = 100
PACKAGES = ("httpx", "httpcore", "h11", "httptools", "anyio", "aiohttp", "uvloop")
TIMEOUT = 120.0
BATCHING = "/batching"  # below this path the server answers status in batches, elsewhere it doesn't know them


# -- The server, in its own process -----------------------------------------------------------------------------------


class _Answerer(asyncio.Protocol):
    """Bare HTTP/1.1 with keep-alive: finds the end of each request's head, answers after the latency."""

    def __init__(self, latency: float, opened: Any) -> None:
        self._latency = latency
        self._opened = opened
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._opened.value += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
            if len(rest) < length:
                return
            body, self._buffer = rest[:length], rest[length:]
            asyncio.get_running_loop().call_later(self._latency, self._answer, answer_to(head, body))

    def _answer(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


def answer_to(head: bytes, body: bytes) -> bytes:
    """The answer to a request: one task, a batch of them under BATCHING, else 404 for what isn't a GET."""
    path = head.split(b" ", 2)[1].decode("ascii")
    if head.startswith(b"GET "):
        return http_answer("200 OK", finished_task(path.rpartition("/")[2]))
    if path.startswith(BATCHING):
        return http_answer("200 OK", {"data": [finished_task(task_id) for task_id in json.loads(body)["task_ids"]]})
    return http_answer("404 Not Found", {"error": {"code": "not_found", "message": "no such endpoint"}})


def finished_task(task_id: str) -> dict[str, Any]:
    """The service's JSON for a completed task, about 200 bytes."""
    return {
        "id": task_id,
        "object": "image.generation.task",
        "model": "gpt-4o-image",
        "type": "image",
        "status": "completed",
        "progress": 100,
        "created": 1757156493,
        "results": ["https://files.example/a.png"],
    }


def http_answer(status: str, value: dict[str, Any]) -> bytes:
    """A complete HTTP answer."""
    body = json.dumps(value, separators=(",", ":")).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _serve(latency: float, opened: Any, ready: Connection) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Answerer(latency, opened), "127.0.0.1", 0, backlog=4096)
        ready.send(server.sockets[0].getsockname()[1])
        # Lives as long as the parent holds its end of the pipe.
        await asyncio.to_thread(_wait_for_end, ready)

    asyncio.run(main())


def _wait_for_end(ready: Connection) -> None:
    with contextlib.suppress(EOFError):
        ready.recv()


@contextlib.contextmanager
def serving(latency: float) -> Iterator[tuple[str, Any]]:
    """A running server: its base URL, and a shared counter of the connections that it accepted."""
    context = multiprocessing.get_context("spawn")
    opened = context.Value("q", 0, lock=False)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(latency, opened, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield f"http://127.0.0.1:{ours.recv()}", opened
    finally:
        ours.close()
        process.join(timeout=5)
        process.terminate()


# -- Measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What one row did; the runner fills in `connections`."""

    asked: int
    completed: int
    errors: dict[str, int]
    elapsed: float
    cpu: float
    connections: int = 0

    @property
    def finished(self) -> bool:
        """Whether every request came to an end within the limit."""
        return self.completed + sum(self.errors.values()) == self.asked

    @property
    def rate(self) -> float:
        """Completed requests per second."""
        return self.completed / self.elapsed

    @property
    def cpu_us(self) -> float:
        """CPU microseconds of the client process per completed request."""
        return self.cpu * 1e6 / max(self.completed, 1)


Run = Callable[[str, int], Coroutine[Any, Any, Result]]


@dataclass
class Settings:
    """What the rows share; set once by `main`."""

    limit: float = 25.0
    random: random.Random = field(default_factory=lambda: random.Random(1))


SETTINGS = Settings()
ROWS: dict[str, tuple[str, Run]] = {}


def row(name: str, title: str) -> Callable[[Run], Run]:
    """Register a row under a short name."""

    def register(run: Run) -> Run:
        ROWS[name] = (title, run)
        return run

    return register


async def measure(n: int, poll: Callable[[str], Awaitable[object]]) -> Result:
    """Run `poll(task_id)` n times at once, for at most the limit."""
    ids = [f"task-unified-{SETTINGS.random.getrandbits(64):016x}" for _ in range(n)]
    cpu, start = time.process_time(), time.perf_counter()
    tasks = [asyncio.ensure_future(poll(task_id)) for task_id in ids]
    done, pending = await asyncio.wait(tasks, timeout=SETTINGS.limit)
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    for task in pending:
        task.cancel()
    errors = Counter(type(exc).__name__ for task in done if (exc := task.exception()) is not None)
    return Result(n, len(done) - errors.total(), dict(errors), elapsed, cpu)


# -- The rows ---------------------------------------------------------------------------------------------------------


@row("httpx", "httpx.AsyncClient, stock, long timeouts")
async def run_stock_httpx(base_url: str, n: int) -> Result:
    import httpx

    # Closing it after a cut is not measured, and may take as long as the measurement.
    client = httpx.AsyncClient(timeout=TIMEOUT, trust_env=False)

    async def poll(task_id: str) -> object:
        return (await client.get(f"{base_url}/v1/tasks/{task_id}")).json()

    result = await measure(n, poll)
    if result.finished:
        await client.aclose()
    return result


@row("httpx-slot", "httpx.AsyncClient over SlotTransport")
async def run_httpx_over_slots(base_url: str, n: int) -> Result:
    import httpx

    from evolink_async.http.transport import SlotTransport

    transport = SlotTransport(CONNECTIONS, trust_env=False)
    async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT, trust_env=False) as client:

        async def poll(task_id: str) -> object:
            return (await client.get(f"{base_url}/v1/tasks/{task_id}")).json()

        return await measure(n, poll)


@row("slot", "SlotTransport, called directly")
async def run_slots(base_url: str, n: int) -> Result:
    import httpx

    from evolink_async.http.transport import SlotTransport

    transport = SlotTransport(CONNECTIONS, trust_env=False)
    timeouts = httpx.Timeout(TIMEOUT).as_dict()
    headers = httpx.Headers({"authorization": "Bearer sk-benchmark", "accept-encoding": "identity"})

    async def poll(task_id: str) -> object:
        url = f"{base_url}/v1/tasks/{task_id}"
        request = httpx.Request("GET", url, headers=headers, extensions={"timeout": timeouts})
        response = await transport.handle_async_request(request)
        return json.loads(await response.aread())

    try:
        return await measure(n, poll)
    finally:
        await transport.aclose()


@row("aiohttp", f"aiohttp, {CONNECTIONS} connections")
async def run_aiohttp(base_url: str, n: int) -> Result:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def poll(task_id: str) -> object:
            async with session.get(f"{base_url}/v1/tasks/{task_id}") as response:
                return json.loads(await response.read())

        return await measure(n, poll)


@row("wait", "tasks.wait of AsyncEvoLink, one GET a task")
async def run_waits(base_url: str, n: int) -> Result:
    from evolink_async import AsyncEvoLink

    async with AsyncEvoLink("sk-benchmark", base_url=base_url, max_connections=CONNECTIONS) as client:
        client._core.open()
        assert client._core.session is not None
        client._core.session.watcher._most_requests = 1e6
        return await measure(n, client.tasks.wait)


@row("wait-batch", "tasks.wait of AsyncEvoLink, in batches")
async def run_batched_waits(base_url: str, n: int) -> Result:
    return await run_waits(base_url + BATCHING, n)


# -- The program ------------------------------------------------------------------------------------------------------


def run_row(run: Run, base_url: str, opened: Any, n: int, repeat: int) -> list[Result]:
    """Several runs of one row, each in a fresh event loop; a row that was cut isn't repeated."""
    results: list[Result] = []
    while len(results) < repeat and (not results or results[-1].finished):
        before = opened.value
        result = asyncio.run(run(base_url, n))
        result.connections = opened.value - before
        results.append(result)
    return results


def median_of(results: list[Result]) -> Result:
    """The run with the median CPU time."""
    middle = statistics.median_low([result.cpu for result in results])
    return next(result for result in results if result.cpu == middle)


def report(medians: dict[str, Result], options: argparse.Namespace) -> str:
    """A table for people."""
    lines = [", ".join(f"{key} {value}" for key, value in machine(*PACKAGES).items())]
    lines.append(
        f"{options.requests} requests at once, server latency {options.latency * 1000:g} ms, "
        f"seed {options.seed}, median of {options.repeat}, {options.install} install"
    )
    lines.append("")
    lines.append(
        f"{'':44}{'req/s':>8}{'CPU us/req':>12}{'conns':>7}{'errors':>8}{'x httpx speed':>15}{'x aiohttp CPU':>15}"
    )
    for name, result in medians.items():
        faster = times_faster(result, medians.get("httpx"))
        dearer = times_dearer(result, medians.get("aiohttp"))
        cpu = f"{result.cpu_us:.0f}" if result.completed else "-"
        lines.append(
            f"{ROWS[name][0]:44}{result.rate:8.0f}{cpu:>12}{result.connections:7}"
            f"{sum(result.errors.values()):8}{faster or '-':>15}{dearer or '-':>15}"
        )
        if not result.finished:
            lines.append(f"    cut after {result.elapsed:.1f} s: {result.completed} of {result.asked} completed")
        lines.extend(f"    {count} x {error}" for error, count in result.errors.items())
    return "\n".join(lines)


def times_faster(result: Result, other: Result | None) -> str | None:
    """How many times sooner the whole batch was done; a lower bound (">45.0") if the other was cut before its end."""
    if other is None or not result.finished:
        return None
    return f"{'' if other.finished else '>'}{other.elapsed / result.elapsed:.1f}"


def times_dearer(result: Result, other: Result | None) -> str | None:
    """How many times as much CPU a request cost."""
    if other is None or not other.completed or not result.completed:
        return None
    return f"{result.cpu_us / other.cpu_us:.2f}"


def as_json(medians: dict[str, Result], options: argparse.Namespace) -> str:
    """The same for programs."""
    rows = {
        name: {
            "title": ROWS[name][0],
            **asdict(result),
            "finished": result.finished,
            "rate": result.rate,
            "cpu_us": result.cpu_us if result.completed else None,
            "times_faster_than_httpx": times_faster(result, medians.get("httpx")),
            "times_the_cpu_of_aiohttp": times_dearer(result, medians.get("aiohttp")),
        }
        for name, result in medians.items()
    }
    setting = {key: getattr(options, key) for key in ("requests", "latency", "seed", "repeat", "limit", "install")}
    return json.dumps(
        {
            "machine": machine(*PACKAGES),
            "setting": setting,
            "rows": rows,
        },
        indent=2,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="requests started at once (2000)")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before the server answers (0.02)")
    parser.add_argument("--limit", type=float, default=25.0, help="seconds after which a row is cut (25)")
    parser.add_argument("--repeat", type=int, default=3, help="runs per row, the median is shown (3)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the task ids (1)")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated: {', '.join(ROWS)}")
    parser.add_argument(
        "--install",
        choices=("core", "fast"),
        default="core",
        help="ours, as without the `fast` extra (h11; every row on asyncio's own loop) or with it (httptools; uvloop)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    options.rows = [name.strip() for name in options.rows.split(",")]
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"unknown rows {unknown}; known are {list(ROWS)}")
    return options


def main() -> None:
    """Run the rows asked for and print."""
    options = parse()
    SETTINGS.limit = options.limit
    SETTINGS.random = random.Random(options.seed)
    if options.install == "fast":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    else:
        sys.modules["httptools"] = None  # type: ignore[assignment]
    medians: dict[str, Result] = {}
    with serving(options.latency) as (base_url, opened):
        for name in options.rows:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results = run_row(ROWS[name][1], base_url, opened, options.requests, options.repeat)
            medians[name] = median_of(results)
    print(as_json(medians, options) if options.json else report(medians, options))


if __name__ == "__main__":
    main()
