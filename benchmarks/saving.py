"""How fast results become files, beside curl with the same links in the same run; and what it costs in memory.

    python benchmarks/saving.py [--rounds 3] [--rows small,medium,large] [--folder .] [--memory] [--json]

A second process serves files with sendfile over loopback, so that it costs next to nothing. `evolink_async` saves as a
pool would: checked, under final names, every file and the folder synced to the disk. `curl --parallel` writes them and
is done; it checks nothing and syncs nothing. The third line is evolink_async with fsync switched off: the difference is
what the disk asks for durability. Clients take turns, each is a process of its own; times are without its start.

--memory: 200 files of 50 MB, all asked for at once, by a process whose memory is looked at (10 GB of disk).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A benchmark measures the checkout that it lies in.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from machine import machine

MB = 10**6
ROWS = {"tiny": (20, 20_000), "small": (2000, 60_000), "medium": (200, 5 * MB), "large": (30, 50 * MB)}
MEMORY = (200, 50 * MB)
AT_ONCE = 24  # connections, on both sides
CLIENTS = ("evolink_async", "curl", "evolink_async, no fsync")


# -- The server, in its own process -----------------------------------------------------------------------------------


class _Files(asyncio.Protocol):
    """GET /<size>/<anything>.png with sendfile and keep-alive."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._buffer = b""
        self._sending: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._buffer.endswith(b"\r\n\r\n"):
            found = re.match(rb"GET /(\d+)/", self._buffer)
            self._buffer = b""
            assert found is not None
            self._sending = asyncio.ensure_future(self._send(int(found[1])))

    async def _send(self, size: int) -> None:
        self._transport.write(
            b'HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nETag: "%d"\r\nContent-Length: %d\r\n\r\n' % (size, size)
        )
        with open(os.path.join(self._folder, str(size)), "rb") as file:  # noqa: ASYNC230  (it is in memory)
            await asyncio.get_running_loop().sendfile(self._transport, file)


def _serve(pipe: Connection, folder: str) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Files(folder), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def _make_file(folder: str, size: int) -> None:
    """Something with the beginning and the end of a PNG."""
    with open(os.path.join(folder, str(size)), "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + os.urandom(1000))
        file.truncate(size - 12)
        file.seek(size - 12)
        file.write(b"\0\0\0\0IEND\xaeB`\x82")


# -- The clients ------------------------------------------------------------------------------------------------------


def _links(port: int, count: int, size: int) -> list[str]:
    return [f"http://127.0.0.1:{port}/{size}/{n:06d}.png" for n in range(count)]


async def _save_all(links: list[str], folder: str) -> dict[str, float]:
    from evolink_async import AsyncEvoLink, Task
    from evolink_async.saving import Saver

    async with AsyncEvoLink("sk-benchmark", base_url="http://127.0.0.1:9", allow_private_hosts=True) as client:
        saver = Saver(client._core, folder)
        await saver.prepare()
        tasks = [
            Task(id=f"task-unified-1-{n:08x}", status="completed", kind="image", results=(link,))
            for n, link in enumerate(links)
        ]
        grown = _peak_memory()
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(
            *(saver.save(task, key=None, index=n, identity=f"{n:016x}-0") for n, task in enumerate(tasks))
        )
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu, "grown_mb": (_peak_memory() - grown) / MB}


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run_ours(pipe: Connection, links: list[str], folder: str, sync: bool) -> None:
    if not sync:
        os.fsync = lambda _: None  # type: ignore[assignment]
    pipe.send(asyncio.run(_save_all(links, folder)))


def ours(links: list[str], folder: str, *, sync: bool = True) -> dict[str, float]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run_ours, args=(there, links, folder, sync))
    process.start()
    there.close()
    try:
        result: dict[str, float] = here.recv()
    finally:
        process.join()
    return result


def curl(links: list[str], folder: str) -> dict[str, float]:
    lines = [f'url = "{link}"\noutput = "{folder}/{n:06d}.png"' for n, link in enumerate(links)]
    config = f"{folder}/links"
    Path(config).write_text("\n".join(lines))
    command = ["curl", "-q", "-sS", "--noproxy", "*", "-Z", "--parallel-max", str(AT_ONCE), "-K", config]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # -s doesn't silence its table
    seconds = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.unlink(config)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "grown_mb": float("nan")}


def measured(client: str, port: int, count: int, size: int, top: str) -> dict[str, float]:
    links = _links(port, count, size)
    folder = tempfile.mkdtemp(dir=top)
    try:
        result = curl(links, folder) if client == "curl" else ours(links, folder, sync="no fsync" not in client)
        files = list(Path(folder).iterdir())
        assert len(files) == count, (client, len(files))
        assert all(path.stat().st_size == size for path in files)
    finally:
        shutil.rmtree(folder)
    os.sync()
    return {
        **result,
        "mb_per_second": count * size / MB / result["seconds"],
        "files_per_second": count / result["seconds"],
    }


def median(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


# -- The program ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default="small,medium,large", help="of " + ", ".join(ROWS))
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to be measured")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = {name: ROWS[name] for name in options.rows.split(",") if name}
    clients = [client for client in CLIENTS if client != "curl" or shutil.which("curl")]
    with tempfile.TemporaryDirectory(dir=options.folder) as top:
        for _, size in (*rows.values(), MEMORY):
            _make_file(top, size)
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, top), daemon=True)
        server.start()
        port = here.recv()
        report: dict[str, Any] = machine("httpx") | {"rows": {}}
        try:
            for name, (count, size) in rows.items():
                results: dict[str, list[dict[str, float]]] = {client: [] for client in clients}
                for _ in range(options.rounds):
                    for client in clients:
                        results[client].append(measured(client, port, count, size, top))
                report["rows"][name] = {client: median(found) for client, found in results.items()}
            if options.memory:
                report["memory"] = measured("evolink_async", port, *MEMORY, top)
        finally:
            server.kill()
            server.join()
    print(json.dumps(report, indent=2)) if options.json else show(report, rows)


def show(report: dict[str, Any], rows: dict[str, tuple[int, int]]) -> None:
    head = ", ".join(f"{name} {report[name]}" for name in machine("httpx"))
    print(f"{head}; {AT_ONCE} connections; medians\n")
    print(f"{'':34}{'seconds':>9}{'MB/s':>9}{'files/s':>9}{'CPU s':>8}{'x curl':>8}")
    for name, found in report["rows"].items():
        count, size = rows[name]
        print(f"{count} files of {size / MB:g} MB")
        for client, result in found.items():
            ratio = result["seconds"] / found["curl"]["seconds"] if "curl" in found else float("nan")
            print(
                f"  {client:32}{result['seconds']:9.2f}{result['mb_per_second']:9.0f}{result['files_per_second']:9.0f}"
                f"{result['cpu_seconds']:8.2f}{ratio:8.2f}"
            )
    if "memory" in report:
        count, size = MEMORY
        result = report["memory"]
        print(
            f"\n{count} files of {size / MB:g} MB at once: {result['seconds']:.1f} s, "
            f"{result['mb_per_second']:.0f} MB/s, memory grew by {result['grown_mb']:.1f} MB"
        )


if __name__ == "__main__":
    main()
