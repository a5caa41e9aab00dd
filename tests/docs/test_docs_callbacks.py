"""docs/callbacks.md says what is true: its table is acted out, row by row."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

from evolink_async.callbacks.receiver import REMEMBERED
from evolink_async.callbacks.rules import BODY_SECONDS, LEAST_SECRET, MOST_BYTES
from evolink_async.emulator import Emulator
from evolink_async.polling import watcher
from evolink_async.pool.doubts import MOST_UNKNOWN

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))

from callback_world import SECRET, World, image, path_of, status, told, wall_clock, world

PAGE = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| callback | answer |")[2].partition("\n\n")[0].splitlines()[2:]
ROWS = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in row.strip("|").split("|")] for row in TABLE)}

Act = Callable[[World, Any, str, str], Awaitable[set[int | None]]]


async def posted(app: Any, path: str, *bodies: Any, **how: Any) -> set[int | None]:
    return {await status(app, path, body, **how) for body in bodies}


def ended(w: World) -> None:
    w.emulator.advance(200)


async def genuine(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    ended(w)
    return await posted(app, path, told(task_id))


async def replayed(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    await genuine(w, app, path, task_id)
    await asyncio.sleep(1)
    w.wire.looks.clear()
    return {await status(app, path, told(task_id)) for _ in range(1000)}


async def late(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    while w.book[0]["first_told_at"] is None:  # noqa: ASYNC110  (the emulator has no event for it)
        await asyncio.sleep(10)
    w.wire.looks.clear()
    return await posted(app, path, told(task_id))


async def early(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    return await posted(app, path, told(task_id))


async def other_results(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    ended(w)
    return await posted(app, path, told(task_id, results=["https://evil.example/x.png"]))


async def nobodys(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    return await posted(app, path, told("task-unified-1-nobody"))


async def wrong_token(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    other = path_of(w.receiver(secret="t" * 40).url_for("order"))
    return {await status(app, wrong, told(task_id)) for wrong in ("/evolink", path[:-1], f"{path}x", other)}


async def wrong_method(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    methods = ("GET", "HEAD", "PUT", "OPTIONS", "DELETE")
    return {await status(app, where, told(task_id), method=name) for name in methods for where in (path, "/x")}


async def malformed(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    ids = ("../credits", "http://169.254.169.254/", 7, None)
    return await posted(app, path, b"", b"{", b"\xff", b"[]", b"{}", *map(told, ids))


async def oversized(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    announced = [(b"content-length", b"1048577")]
    return await posted(app, path, told(task_id), headers=announced) | await posted(app, path, b" " * (MOST_BYTES + 1))


async def slow(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    return await posted(app, path, told(task_id), stuck=True)


async def gone(w: World, app: Any, path: str, task_id: str) -> set[int | None]:
    return await posted(app, path, told(task_id), gone=True)


ACTS: list[Act] = [
    *(genuine, replayed, late, early, other_results, nobodys, wrong_token, wrong_method, malformed, oversized),
    *(slow, gone),
]


@pytest.mark.looptime
@pytest.mark.parametrize(("row", "act"), list(zip(ROWS, ACTS, strict=True)))
async def test_each_kind_of_callback_gets_what_the_table_says(
    row: str, act: Act, api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By the emulator's clock the task is new, so that polling leaves it alone for the first seconds.
    monkeypatch.setattr(watcher.time, "time", lambda: wall_clock().timestamp())
    async with world(api_key) as w:
        receiver = w.receiver()
        task = await w.client.submit(image("order", callback_url=receiver.url_for("order")))
        waiting = asyncio.ensure_future(w.client.tasks.wait(task))
        await asyncio.sleep(0.5)
        w.wire.looks.clear()
        answers = await act(w, receiver.asgi, path_of(receiver.url_for("order")), task.id)
        await asyncio.sleep(0.5)
        answer, looks, _ = ROWS[row]
        assert answers == {None if answer == "none" else int(answer)}
        assert len(w.wire.looks) == int(looks)
        done = await waiting
        assert done.succeeded
        assert "evil" not in str(done.raw)


def test_its_bounds_are_those_of_the_code() -> None:
    assert f"after {BODY_SECONDS:g} s |" in PAGE
    assert f"at least {LEAST_SECRET} bytes" in PAGE
    assert f"last {MOST_UNKNOWN:,} unknown" in PAGE
    assert f"the last {REMEMBERED:,}." in PAGE
    assert MOST_BYTES == 2**20
    assert SECRET not in PAGE


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_its_program_runs_and_every_callback_is_taken(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    # Below those that the system hands out: others may be given one of these meanwhile.
    ports = range(20_000 + os.getpid() % 10_000, 32_768)
    monkeypatch.setenv("PORT", str(next(port for port in ports if is_free(port))))
    monkeypatch.setenv("CALLBACK_SECRET", SECRET)
    async with Emulator(speed=50, seed=1, api_key=api_key, private_callbacks=True).serve() as server:
        done = await run_program([sys.executable, "program.py"], server, cwd=tmp_path)
        assert done.code == 0, done.stderr
        posts = server.emulator.book()["posts"]
    assert len(re.findall(r"^\d+ completed http://", done.stdout, re.M)) == len(posts) == 10
    attempts = [attempt["result"] for post in posts for attempt in post["callback"]["attempts"]]
    assert set(attempts[:1]) == {"204"}
    assert attempts.count("204") >= 5
