"""The command as users run it: a process of its own, its output, its exit code."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

COMMAND = (sys.executable, "-W", "error", "-m", "evolink_async")


@dataclass(frozen=True)
class Ended:
    """A process that ended."""

    code: int
    stdout: str
    stderr: str


def environment(server: Any = None, **more: str | None) -> dict[str, str]:
    """This process's, pointed at an emulator; None takes a name out."""
    values = dict(os.environ) | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
    if server is not None:
        values |= {"EVOLINK_BASE_URL": server.base_url, "EVOLINK_API_KEY": server.api_key}
    return {name: value for name, value in (values | more).items() if value is not None}


@asynccontextmanager
async def started(*arguments: object, server: Any = None, env: dict[str, str] | None = None, **options: Any) -> Any:
    """A running command; killed if it is still there at the end."""
    pipe = asyncio.subprocess.PIPE
    streams = {"stdin": asyncio.subprocess.DEVNULL, "stdout": pipe, "stderr": pipe} | options
    command = (*COMMAND, *map(str, arguments))
    process = await asyncio.create_subprocess_exec(*command, env=env or environment(server), **streams)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ended(process: asyncio.subprocess.Process, given: bytes | None = None) -> Ended:
    """Wait for it."""
    stdout, stderr = await asyncio.wait_for(process.communicate(given), 300)
    assert process.returncode is not None
    return Ended(process.returncode, (stdout or b"").decode(), (stderr or b"").decode())


async def command(*arguments: object, given: bytes | None = None, **options: Any) -> Ended:
    """Run it to its end."""
    if given is not None:
        options["stdin"] = asyncio.subprocess.PIPE
    async with started(*arguments, **options) as process:
        return await ended(process, given)


async def on_terminal(*arguments: object, columns: int = 60, **env: str) -> tuple[int, str]:
    """The exit code and everything that a terminal was sent."""
    ours, theirs = pty.openpty()
    received = bytearray()
    all_read = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            data = b""
        received.extend(data)
        if not data:
            loop.remove_reader(ours)
            all_read.set()

    loop.add_reader(ours, read)
    values = environment(TERM="xterm-256color", COLUMNS=str(columns), LINES="24") | env
    async with started(*arguments, env=values, stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        await asyncio.wait_for(process.wait(), 300)
        await asyncio.wait_for(all_read.wait(), 60)
    os.close(ours)
    return process.returncode, received.decode(env.get("PYTHONIOENCODING", "utf-8"))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that the other process makes true."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (it is another process that makes it true)
            await asyncio.sleep(0.02)


def lines_of(path: Path) -> list[Any]:
    """The objects of a file of JSON lines."""
    return [from_json(line) for line in path.read_bytes().splitlines()]


def write_lines(path: Path, *rows: Any) -> Path:
    """A file of JSON lines."""
    path.write_bytes(b"".join(to_json(row) + b"\n" for row in rows))
    return path


def images(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Lines for `count` images."""
    return [{"key": f"k{n}", "model": "krea-2-turbo", "prompt": f"picture {n}"} | fields for n in range(count)]
