"""What a pool costs: CPU and memory for each task, in process and over TCP, beside a loop written by hand.

    python benchmarks/pool.py [--parts overhead,tcp,memory,constant,crowd] [--outstanding 1000,10000,100000]
                              [--tasks 0] [--repeat 3] [--seed 1] [--json] [--plot FILE.png] [--quick]

overhead  The whole way of a task (submit, looks, bookkeeping, delivery) over a transport in this process that answers
          at once; less what that transport itself costs, which is measured by calling it alone in the same way.
          The requests are built before, and the garbage collector leaves them alone.
tcp       The same over TCP, the service in another process; then aiohttp, used by hand, makes the same calls: as many
          POSTs, as many status requests for as many tasks. Once at the moments at which the service got ours, to a
          twentieth of a second: what comes in bursts here does so there, and who waits here waits there. And once as
          fast as it can ("flat out"), where one wake-up of its loop serves many calls: that is another job.
          "core" is the core install on asyncio's own loop, "fast" the `fast` extra; each beside aiohttp on the same
          loop. CPU time is the client process's own.
memory    Bytes for each outstanding task beyond its request: as Python counts them, and resident. Every task was
          looked at at least once, and shows progress. Without a key of its own a request is given a name, kept as well.
constant  The peak of resident memory while a generator of ever more requests goes through.
crowd     So many tasks outstanding on one client, looked at 3,000 times a second, each task in turn: the share of one
          core, and how late the latest look was. In batches of 50, and one by one.

Every row runs in a process of its own, every measurement on real time. CPU time depends on what else the machine does;
compare within a run. `--quick` is all of it in small, to see that it works.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
import tracemalloc
import uuid
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import psutil
from machine import machine

from evolink_async import AsyncEvoLink, ImageRequest, TaskPool
from evolink_async import session as session_module
from evolink_async.http.transport import Call, SlotTransport
from evolink_async.polling.schedule import Sightings
from evolink_async.polling.watcher import Watcher

MODEL = "gpt-4o-image"
BATCH = 50
CONNECTIONS = 100
PACKAGES = ("httpx", "h11", "httptools", "uvloop", "pydantic", "aiohttp")
LOOKS_PER_SECOND = 3_000
BURST = 0.05  # seconds: calls that came so close together are made at once
WARM_UP = 50  # tasks: what is loaded at the first use is not a cost of each
PARTS = ("overhead", "tcp", "memory", "constant", "crowd")
INSTALLS = ("core", "fast")


@dataclass(frozen=True)
class Job:
    """What one row does. seconds: how long a task takes, give or take a fifth; 0: it is finished when it is made."""

    tasks: int
    outstanding: int
    seconds: float
    seed: int = 1
    fast: bool = True
    keys: bool = True
    counted: bool = True  # memory: as Python counts it, not as the system does
    estimate: int = 0  # that the service tells; 0: what it takes
    looks: float = 0.0  # a second, for the crowd
    batches: bool = True
    window: float = 0.0  # seconds that the crowd is watched


def requests(job: Job) -> Iterator[ImageRequest]:
    for number in range(job.tasks):
        own = {"key": f"row-{number}"} if job.keys else {}
        yield ImageRequest(model=MODEL, prompt=f"lighthouse number {number}", size="1024x1024", **own)


class Counts(NamedTuple):
    """What a service was asked: POSTs, looks one by one, batches, and tasks looked at in all. Also of one call."""

    posts: int = 0
    singles: int = 0
    batches: int = 0
    looks: int = 0

    def since(self, earlier: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, earlier, strict=True)))

    @property
    def status_requests(self) -> int:
        return self.singles + self.batches


# -- The service ------------------------------------------------------------------------------------------------------


class Service:
    """Takes everything, finishes it in time, and says so in as few steps as it can."""

    created = (
        '{{"created":1757156493,"id":"{0}","model":"gpt-4o-image","object":"image.generation.task","progress":0,'
        '"status":"{1}","task_info":{{"can_cancel":true,"estimated_time":{2}}},"type":"image",{3}'
        '"usage":{{"billing_rule":"per_call","credits_reserved":2.5,"user_group":"default"}}}}'
    )
    running = (
        '{{"created":1757156493,"id":"{0}","model":"gpt-4o-image","object":"image.generation.task","progress":30,'
        '"status":"processing","task_info":{{"can_cancel":true}},"type":"image"}}'
    )
    done = (
        '{{"created":1757156493,"id":"{0}","model":"gpt-4o-image","object":"image.generation.task","progress":100,'
        '"results":["https://files.example/{0}.png"],"status":"completed","type":"image",'
        '"usage":{{"credits_reserved":2.5}}}}'
    )

    _numbers = itertools.count(1)  # of all services: no task is made twice in a process

    def __init__(self, job: Job) -> None:
        self._seconds = job.seconds
        self._estimate = job.estimate or max(1, round(job.seconds))
        self._batches = job.batches
        self._random = random.Random(job.seed)
        self._ends: dict[str, float] = {}
        self._count = 0
        self.singles = self.batches = self.looks = 0

    @property
    def counts(self) -> Counts:
        return Counts(self._count, self.singles, self.batches, self.looks)

    def answer(self, target: bytes, body: bytes) -> bytes | None:
        """The JSON of an answer; None: there is nothing of that kind."""
        if target == b"/v1/images/generations":
            return self._make()
        if target == b"/v1/tasks/batch":
            if not self._batches:
                return None
            ids = json.loads(body)["task_ids"]
            self.batches += 1
            self.looks += len(ids)
            return f'{{"data":[{",".join(map(self._row, ids))}]}}'.encode()
        self.singles += 1
        self.looks += 1
        return self._row(target.rpartition(b"/")[2].decode()).encode()

    def _make(self) -> bytes:
        self._count += 1
        task_id = f"task-unified-1757156493-{next(self._numbers):08d}"
        if not self._seconds:
            link = f'"results":["https://files.example/{task_id}.png"],'
            return self.created.format(task_id, "completed", 1, link).encode()
        self._ends[task_id] = time.monotonic() + self._seconds * self._random.uniform(0.8, 1.2)
        return self.created.format(task_id, "pending", self._estimate, "").encode()

    def _row(self, task_id: str) -> str:
        over = self._ends[task_id] <= time.monotonic()
        return (self.done if over else self.running).format(task_id)


class RecordingService(Service):
    """Remembers what it was asked when, and tells it."""

    calls_path = "/v1/calls"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._calls: list[tuple[float, Counts]] = []

    def answer(self, target: bytes, body: bytes) -> bytes | None:
        if target == self.calls_path.encode():
            return json.dumps(self._calls).encode()
        before = self.counts
        answer = super().answer(target, body)
        self._calls.append((time.monotonic(), self.counts.since(before)))
        return answer


class CannedReply:
    """An answer that is here already."""

    __slots__ = ("_body", "headers", "status")

    def __init__(self, body: bytes | None) -> None:
        self.status = 200 if body is not None else 404
        self.headers = [(b"Content-Type", b"application/json")]
        self._body = body or b"{}"

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def aclose(self) -> None:
        pass


class CannedTransport(SlotTransport):
    """Answers in this process and at once; keeps some calls of each kind, to make them again."""

    service: Service
    kept: defaultdict[bytes, list[Call]]
    _KEPT = 500

    async def call(self, call: Call) -> Any:
        if call.on_slot is not None and call.on_bytes is not None:
            call.on_slot()
            if call.clear is not None:
                await call.clear()
            call.on_bytes()
        assert isinstance(call.body, bytes)
        kept = self.kept[_kind_of(call)]
        if len(kept) < self._KEPT:
            kept.append(call)
        return CannedReply(self.service.answer(call.target, call.body))

    async def own_cost(self) -> dict[bytes, float]:
        """CPU seconds of one call, by method and kind of target: the calls made again by nobody but us."""
        kinds = {
            kind: [replace(call, on_slot=_nothing, clear=None, on_bytes=_nothing) for call in calls]
            for kind, calls in self.kept.items()
        }
        self.kept.clear()
        costs = {}
        for kind, calls in kinds.items():
            started = time.process_time()
            for call in calls:
                reply = await self.call(call)
                while await reply.read():
                    pass
                await reply.aclose()
            costs[kind] = (time.process_time() - started) / len(calls)
            self.kept.clear()
        return costs


def _nothing() -> None:
    pass


def _kind_of(call: Call) -> bytes:
    return b"look" if call.method == b"GET" else call.target


@contextlib.asynccontextmanager
async def canned_client(job: Job) -> Any:
    """A client whose service is in this process, and that transport."""
    made: list[CannedTransport] = []

    def make(_: object, max_connections: int) -> SlotTransport:
        made.append(CannedTransport(max_connections))
        made[-1].service, made[-1].kept = Service(job), defaultdict(list)
        return made[-1]

    original, session_module._transport = session_module._transport, make
    try:
        async with AsyncEvoLink("sk-benchmark", base_url="http://127.0.0.1", max_connections=CONNECTIONS) as client:
            client._core.memory.rates[MODEL] = 1e7  # nothing is to wait for its turn
            client._core.open()
            yield client, made[0]
    finally:
        session_module._transport = original


# -- In process -------------------------------------------------------------------------------------------------------


async def overhead(job: Job) -> dict[str, Any]:
    """CPU for each task, less what the transport costs."""
    given = list(requests(job))
    async with canned_client(job) as (client, transport):
        await drain(client.pool(requests(replace(job, tasks=WARM_UP))))
        transport.service, transport.kept = Service(job), defaultdict(list)
        _leave_out_of_collections()
        cpu, start = time.process_time(), time.perf_counter()
        pool = client.pool(given, max_outstanding=job.outstanding)
        await drain(pool)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        counts = transport.service.counts
        costs = await transport.own_cost()
        calls = {b"/v1/images/generations": counts.posts, b"/v1/tasks/batch": counts.batches, b"look": counts.singles}
        own = sum(costs.get(kind, 0.0) * count for kind, count in calls.items())
    return {
        "outstanding": job.outstanding,
        "tasks": job.tasks,
        "cpu_us": per(cpu, job.tasks),
        "transport_us": per(own, job.tasks),
        "overhead_us": per(cpu - own, job.tasks),
        "looks": counts.looks / job.tasks,
        "status_requests": counts.status_requests / job.tasks,
        "tasks_per_second": job.tasks / wall,
    }


def _leave_out_of_collections() -> None:
    """The collector's walks over what was made so far, the requests above all, are not those of what is measured."""
    gc.collect()
    gc.freeze()


async def drain(pool: TaskPool) -> None:
    done = 0
    async with pool:
        async for outcome in pool:
            outcome.unwrap()
            done += 1
    assert done == pool.stats.completed, pool.stats


def per(seconds: float, tasks: int) -> float:
    return seconds / tasks * 1e6


async def memory(job: Job) -> dict[str, Any]:
    """Bytes for each task that is outstanding and was looked at: counted by Python, or resident."""
    given = list(requests(job))
    async with canned_client(job) as (client, transport):
        transport._KEPT = 0
        async with client.pool() as warm:
            warm.add(given[0])
            await _until(lambda: bool(warm.outstanding))
            gc.collect()
            before = _held(job.counted, start=True)
            async with client.pool(given, max_outstanding=job.outstanding) as pool:
                await _until(lambda: len(pool.outstanding) == job.outstanding)
                await _until(lambda: pool.stats.polls >= 1.2 * job.outstanding)
                gc.collect()
                held = _held(job.counted) - before - _service_bytes(transport.service, job.counted)
    return {
        "outstanding": job.outstanding,
        "keys": job.keys,
        "counted": job.counted,
        "bytes": held / job.outstanding,
    }


def _held(counted: bool, *, start: bool = False) -> int:
    if not counted:
        return int(psutil.Process().memory_info().rss)
    if start:
        tracemalloc.start()
    return tracemalloc.get_traced_memory()[0]


def _service_bytes(service: Service, counted: bool) -> int:
    """What the service in this process holds: it isn't the pool's. Ids are the pool's own copies."""
    ends = service._ends
    entries = sum(sys.getsizeof(task_id) + 24 for task_id in ends)
    return sys.getsizeof(ends) + (entries if counted else int(entries * 1.15))


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  (nothing tells of it)
        await asyncio.sleep(0.01)


async def constant(job: Job) -> dict[str, Any]:
    """The peak of resident memory over a generator of many requests."""
    async with canned_client(job) as (client, transport):
        transport._KEPT = 0
        start = time.perf_counter()
        await drain(client.pool(requests(job), max_outstanding=job.outstanding))
        wall = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"tasks": job.tasks, "outstanding": job.outstanding, "peak_mb": peak / 1e6, "seconds": wall}


# -- A crowd ----------------------------------------------------------------------------------------------------------


class EveryTask:
    """A schedule that looks at each of so many tasks in turn, so many of them a second, whatever it costs.

    The first look is anywhere in the interval, the others are an interval apart.
    """

    price = 1.0
    latest = None  # it is asked for every task

    def __init__(self, job: Job) -> None:
        self.interval = self.estimate = job.outstanding / job.looks
        self.random = random.Random(job.seed)

    def expect(self, task_class: object, estimate: object) -> EveryTask:
        return self

    def next_look(self, task: Sightings, dice: float) -> float:
        first = task.looked_at == task.started
        return task.looked_at + self.interval * (dice if first else 0.95 + dice / 10)

    def should_be_over(self, task: Sightings) -> bool:
        return False

    def urgency(self, task: Sightings, now: float) -> float:
        return 1.0


async def crowd(job: Job) -> dict[str, Any]:
    """So many tasks outstanding: the share of a core that it takes to look at them, and how late the looks are."""
    late: list[float] = []
    take = Watcher._take

    def timed_take(self: Watcher, due: Any) -> Any:
        if measuring:
            late.append(self._loop.time() - due)
        return take(self, due)

    measuring = False
    Watcher._take = timed_take  # type: ignore[method-assign]
    given = list(requests(job))
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    async with canned_client(job) as (client, transport):
        transport._KEPT = 0
        watcher = client._core.session.watcher
        watcher._schedule, watcher._most_requests = EveryTask(job), 1e6
        pool = client.pool(given, max_outstanding=job.outstanding, task_timeout=None)
        async with pool:
            await _until(lambda: len(pool.outstanding) == job.outstanding)
            held = process.memory_info().rss - before
            await asyncio.sleep(job.outstanding / job.looks)  # the crowd of the start has spread
            measuring, looked = True, transport.service.looks
            cpu, start = time.process_time(), time.perf_counter()
            await asyncio.sleep(job.window)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - start
            looked = transport.service.looks - looked
    assert late
    return {
        "outstanding": job.outstanding,
        "batches": job.batches,
        "looks_per_second": looked / wall,
        "share_of_a_core": cpu / wall,
        "us_per_look": cpu / looked * 1e6,
        "late_max": max(late),
        "late_p99": sorted(late)[int(len(late) * 0.99)],
        "rss_mb": held / 1e6,
    }


# -- Over TCP ---------------------------------------------------------------------------------------------------------


class Connected(asyncio.Protocol):
    """Bare HTTP/1.1 with keep-alive, one request after the other."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = int(head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0] or 0)
            if len(self._buffer) < end + 4 + length:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
            answer = self._service.answer(head.split(b" ", 2)[1], body)
            status = b"200 OK" if answer is not None else b"404 Not Found"
            answer = answer or b"{}"
            start = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            self._transport.write(start % (status, len(answer)) + answer)


def _serve(pipe: Connection, job: Job) -> None:
    async def main() -> None:
        service = RecordingService(job)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connected(service), "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        with contextlib.suppress(EOFError):
            await loop.run_in_executor(None, pipe.recv)
        server.close()

    run_on(main(), fast=True)


def run_on(main: Coroutine[Any, Any, Any], *, fast: bool) -> Any:
    """Run on uvloop, or as the core install would."""
    if not fast:
        sys.modules["httptools"] = None  # type: ignore[assignment]
        return asyncio.run(main)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@contextlib.contextmanager
def serving(job: Job) -> Iterator[str]:
    """The service in a process of its own: its base URL."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, job), daemon=True)
    process.start()
    there.close()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        here.close()
        process.join(10)


Calls = list[tuple[float, Counts]]  # when, in seconds, and what


async def pool_over_tcp(job: Job, base_url: str) -> tuple[float, Calls]:
    """CPU seconds of a pool, and its calls."""
    given = list(requests(job))
    async with AsyncEvoLink("sk-benchmark", base_url=base_url, max_connections=CONNECTIONS) as client:
        client._core.memory.rates[MODEL] = 1e7  # nothing is to wait for its turn
        await drain(client.pool(requests(replace(job, tasks=WARM_UP))))
        calls_before = len(await client.raw("GET", RecordingService.calls_path))
        _leave_out_of_collections()
        cpu = time.process_time()
        await drain(client.pool(given, max_outstanding=job.outstanding))
        cpu = time.process_time() - cpu
        calls = (await client.raw("GET", RecordingService.calls_path))[calls_before:]
        return cpu, [(moment, Counts(*call)) for moment, call in calls]


async def aiohttp_by_hand(job: Job, base_url: str, calls: Calls) -> float:
    """CPU seconds of a program written with aiohttp that makes these calls and keeps what they answer.

    Each not before its moment, counted from the first; those with the same moment as fast as it can, POSTs first.
    """
    import aiohttp

    loop = asyncio.get_running_loop()
    bodies = itertools.cycle([request.body() for request in requests(job)])
    tasks: dict[str, dict[str, Any]] = {}
    ids: list[str] = []
    headers = {"Authorization": "Bearer sk-benchmark"}
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(base_url, connector=connector, headers=headers) as session:

        async def submit(moments: Iterator[tuple[float, Counts]]) -> None:
            for moment, _ in moments:
                await until(moment)
                key = {"Idempotency-Key": f"ea-{uuid.uuid4().hex}"}
                async with session.post("/v1/images/generations", json=next(bodies), headers=key) as response:
                    response.raise_for_status()
                    task = await response.json()
                    tasks[task["id"]] = task
                    ids.append(task["id"])

        async def look(moments: Iterator[tuple[float, Counts]]) -> None:
            for moment, batch in moments:
                await until(moment)
                async with session.post("/v1/tasks/batch", json={"task_ids": next_ids(batch.looks)}) as response:
                    response.raise_for_status()
                    for task in (await response.json())["data"]:
                        tasks[task["id"]] = task

        async def look_alone(moments: Iterator[tuple[float, Counts]]) -> None:
            for moment, _ in moments:
                await until(moment)
                (task_id,) = next_ids(1)
                async with session.get(f"/v1/tasks/{task_id}") as response:
                    response.raise_for_status()
                    tasks[task_id] = await response.json()

        async def until(moment: float) -> None:
            if (seconds := start + moment - loop.time()) > 0:
                await asyncio.sleep(seconds)

        def next_ids(count: int) -> list[str]:
            return [ids[next(turn) % len(ids)] for _ in range(count)]

        start, turn = loop.time(), itertools.count()
        await submit(iter([(0.0, Counts(posts=1))] * WARM_UP))
        first = min(moment for moment, _ in calls)
        waiting = [(moment - first, call) for moment, call in calls]
        posts = iter([entry for entry in waiting if entry[1].posts])
        batches = iter([entry for entry in waiting if entry[1].batches])
        singles = iter([entry for entry in waiting if entry[1].singles])
        _leave_out_of_collections()
        cpu, start = time.process_time(), loop.time()
        await asyncio.gather(
            *(submit(posts) for _ in range(CONNECTIONS * 3 // 4)),
            *(look(batches) for _ in range(CONNECTIONS // 8)),
            *(look_alone(singles) for _ in range(CONNECTIONS // 8)),
        )
        cpu = time.process_time() - cpu
    assert len(tasks) == len(ids) == WARM_UP + job.tasks
    return cpu


def _own_process(pipe: Connection, work: Callable[..., Any], *args: Any) -> None:
    pipe.send(work(*args))


def in_process(work: Callable[..., Any], *args: Any) -> Any:
    """The result of a function that runs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_own_process, args=(there, work, *args))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _row(name: str, job: Job) -> dict[str, Any]:
    """A part in process, in this process."""
    logging.disable(logging.INFO)
    logging.getLogger("evolink_async").setLevel(logging.ERROR)
    work = {"overhead": overhead, "memory": memory, "constant": constant, "crowd": crowd}[name]
    result: dict[str, Any] = asyncio.run(work(job))
    return result


def _pool_row(job: Job, base_url: str) -> tuple[float, Calls]:
    logging.getLogger("evolink_async").setLevel(logging.ERROR)
    cpu, calls = run_on(pool_over_tcp(job, base_url), fast=job.fast)
    return cpu, calls


def _aiohttp_row(job: Job, base_url: str, calls: Calls) -> float:
    return float(run_on(aiohttp_by_hand(job, base_url, calls), fast=job.fast))


def tcp(job: Job) -> dict[str, Any]:
    """Our CPU and aiohttp's, one after the other, with the same calls."""
    with serving(job) as base_url:
        ours, calls = in_process(_pool_row, job, base_url)
    with serving(job) as base_url:
        at_its_time = [(moment // BURST * BURST, call) for moment, call in calls]
        theirs = in_process(_aiohttp_row, job, base_url, at_its_time)
    with serving(job) as base_url:
        flat_out = in_process(_aiohttp_row, job, base_url, [(0.0, call) for _, call in calls])
    looks = sum(call.looks for _, call in calls)
    return {
        "install": "fast" if job.fast else "core",
        "outstanding": job.outstanding,
        "tasks": job.tasks,
        "cpu_us": per(ours, job.tasks),
        "aiohttp_us": per(theirs, job.tasks),
        "ratio": ours / theirs,
        "flat_out_us": per(flat_out, job.tasks),
        "flat_out_ratio": ours / flat_out,
        "seconds": max(moment for moment, _ in calls) - min(moment for moment, _ in calls),
        "looks": looks / job.tasks,
        "status_requests": sum(call.status_requests for _, call in calls) / job.tasks,
    }


# -- The program ------------------------------------------------------------------------------------------------------


def median_of(rows: list[dict[str, Any]], by: str) -> dict[str, Any]:
    """The run with the median of one figure."""
    middle = statistics.median_low([row[by] for row in rows])
    return next(row for row in rows if row[by] == middle)


def seconds_for(outstanding: int) -> float:
    """How long a task has to take so that so many are outstanding at once."""
    return max(2.0, outstanding / 2_500)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    sizes, seed = options.outstanding, options.seed

    def note(text: str) -> None:
        print(f"{text} ...", file=sys.stderr, flush=True)

    def job(outstanding: int, **more: Any) -> Job:
        tasks = options.tasks or max(2 * outstanding, 10_000)
        plain = {"tasks": tasks, "outstanding": outstanding, "seconds": seconds_for(outstanding), "seed": seed}
        return Job(**plain | more)

    def repeated(name: str, by: str, one: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        note(name)
        return median_of([one() for _ in range(options.repeat)], by)

    if "overhead" in options.parts:
        results["overhead"] = [
            repeated(f"overhead, {size} outstanding", "overhead_us", lambda: in_process(_row, "overhead", job(size)))  # noqa: B023
            for size in sizes
        ]
    if "tcp" in options.parts:
        results["tcp"] = [
            repeated(f"{install} over TCP, {size} outstanding", "ratio", lambda: tcp(job(size, fast=install == "fast")))  # noqa: B023
            for install in INSTALLS
            for size in sizes
        ]
    if "memory" in options.parts:
        note("memory")
        estimate = 2 if options.quick else 20
        results["memory"] = [
            in_process(
                _row, "memory", job(size, tasks=size, seconds=10_000.0, estimate=estimate, keys=keys, counted=counted)
            )
            for size in sizes
            for keys in (True, False)
            for counted in (True, False)
        ]
    if "constant" in options.parts:
        note("constant memory")
        results["constant"] = [
            in_process(_row, "constant", job(min(sizes), tasks=tasks, seconds=0.0)) for tasks in options.generators
        ]
    if "crowd" in options.parts:
        note("crowd")
        size = max(sizes)
        looks = min(LOOKS_PER_SECOND, size / 2)
        results["crowd"] = [
            in_process(
                _row,
                "crowd",
                job(size, tasks=size, seconds=10_000.0, looks=looks, batches=batches, window=options.window),
            )
            for batches in (True, False)
        ]
    return results


TABLES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "overhead": (
        "In process: CPU us for each task (at most 80 of overhead)",
        {
            "outstanding": ("outstanding", ",d"),
            "tasks": ("tasks", ",d"),
            "overhead_us": ("overhead", ".1f"),
            "transport_us": ("transport", ".1f"),
            "cpu_us": ("together", ".1f"),
            "looks": ("looks/task", ".2f"),
            "status_requests": ("requests/task", ".3f"),
            "tasks_per_second": ("tasks/s", ",.0f"),
        },
    ),
    "tcp": (
        "Over TCP: CPU us for each task beside aiohttp by hand (at most 4 times on core, 2 times on fast)",
        {
            "install": ("install", "s"),
            "outstanding": ("outstanding", ",d"),
            "tasks": ("tasks", ",d"),
            "cpu_us": ("pool", ".1f"),
            "aiohttp_us": ("aiohttp", ".1f"),
            "ratio": ("ratio", ".2f"),
            "flat_out_us": ("flat out", ".1f"),
            "flat_out_ratio": ("ratio", ".2f"),
            "seconds": ("seconds", ".1f"),
            "looks": ("looks/task", ".2f"),
            "status_requests": ("requests/task", ".3f"),
        },
    ),
    "memory": (
        "Memory: bytes for each outstanding task beyond its request (at most 700)",
        {
            "outstanding": ("outstanding", ",d"),
            "keys": ("own keys", ""),
            "counted": ("counted", ""),
            "bytes": ("bytes", ",.0f"),
        },
    ),
    "constant": (
        "A generator of many requests: peak of resident memory",
        {
            "tasks": ("requests", ",d"),
            "outstanding": ("outstanding", ",d"),
            "peak_mb": ("peak MB", ".1f"),
            "seconds": ("seconds", ".1f"),
        },
    ),
    "crowd": (
        "A crowd: looks at all of them in turn (no look later than 2 s)",
        {
            "outstanding": ("outstanding", ",d"),
            "batches": ("batches", ""),
            "looks_per_second": ("looks/s", ",.0f"),
            "share_of_a_core": ("of one core", ".1%"),
            "us_per_look": ("us/look", ".1f"),
            "late_max": ("latest, s", ".3f"),
            "late_p99": ("p99, s", ".3f"),
            "rss_mb": ("RSS MB", ".0f"),
        },
    ),
}


def report(results: dict[str, Any]) -> str:
    """Tables for people."""
    lines = []
    for name, (title, columns) in TABLES.items():
        if name not in results:
            continue
        lines += ["", title, "".join(f"{head:>15}" for head, _ in columns.values())]
        for row in results[name]:
            cells = (format(row[key], style) if style else str(row[key]) for key, (_, style) in columns.items())
            lines.append("".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def plot(results: dict[str, Any], path: str) -> None:
    """Cost against scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    if rows := results.get("overhead"):
        axes.plot([r["outstanding"] for r in rows], [r["overhead_us"] for r in rows], "o-k", label="pool, without HTTP")
    for install, colour in (("core", "tab:orange"), ("fast", "tab:blue")):
        if rows := [row for row in results.get("tcp", ()) if row["install"] == install]:
            sizes = [row["outstanding"] for row in rows]
            axes.plot(sizes, [r["cpu_us"] for r in rows], "o-", color=colour, label=f"pool over TCP, {install}")
            axes.plot(sizes, [r["aiohttp_us"] for r in rows], "x:", color=colour, label=f"aiohttp by hand, {install}")
    axes.set(xscale="log", xlabel="tasks outstanding", ylabel="CPU µs for each task", ylim=(0, None))
    sizes = sorted({row["outstanding"] for part in ("overhead", "tcp") for row in results.get(part, ())})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_title("What a task costs")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    sizes = [1_000, 10_000, 100_000]
    parser.add_argument("--outstanding", type=numbers, default=sizes, help="tasks outstanding at once")
    sizes = [10_000, 100_000, 1_000_000]
    parser.add_argument("--generators", type=numbers, default=sizes, help="requests of a generator, for `constant`")
    parser.add_argument("--tasks", type=int, default=0, help="in a row; else twice those outstanding, 10,000 at least")
    parser.add_argument("--window", type=float, default=30.0, help="seconds for which the crowd is watched (30)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of a row, the median is shown (3)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the durations (1)")
    parser.add_argument("--quick", action="store_true", help="all of it in small, to see that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw cost against scale (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.outstanding, options.generators, options.tasks = [100], [500, 1_000], 100
        options.repeat, options.window = 1, 1.0
    options.parts = [part.strip() for part in options.parts.split(",")]
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown parts {unknown}; known are {', '.join(PARTS)}")
    return options


def main() -> None:
    options = parse()
    setting = {name: getattr(options, name) for name in ("seed", "repeat", "quick")}
    results = measure(options)
    if options.plot:
        plot(results, options.plot)
    if options.json:
        print(
            json.dumps(
                {
                    "machine": machine(*PACKAGES),
                    "setting": setting,
                    **results,
                },
                indent=2,
            )
        )
    else:
        print(", ".join(f"{name} {value}" for name, value in machine(*PACKAGES).items()))
        print(", ".join(f"{name} {value}" for name, value in setting.items()))
        print(report(results))


if __name__ == "__main__":
    main()
