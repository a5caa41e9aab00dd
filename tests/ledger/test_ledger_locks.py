"""One job, one process."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from ledger_world import ask, entry, opened, row_in
from programs import ROOT

from evolink_async import LedgerError
from evolink_async.ledger import State, locks, open_job, open_ledger
from evolink_async.ledger.locks import holder_of

HOLDER = """
import asyncio, os, sys
from evolink_async.ledger import Entry, open_job

async def main():
    job = await open_job(sys.argv[1], sys.argv[2])
    known = await job.enter(Entry("held", b"0", "/v1/images/generations", "m"))
    {then}
    print("holds it", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""

FORKS = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    child = os.fork()
    if child == 0:
        from evolink_async import ConfigurationError
        try:
            job.lost(known.row, error="", at=None)
        except ConfigurationError as error:
            said = str(error)
        print(f"child {os.getpid()} {said}", flush=True)
        os.close(1)  # whoever reads there waits for the parent only
        import time
        time.sleep(60)
        os._exit(0)
"""


async def hold(
    path: Path | str, name: str = "default", then: str = "pass"
) -> tuple[asyncio.subprocess.Process, list[str]]:
    """A process that has opened the job, and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", HOLDER.replace("{then}", then.strip()), str(path), name),
        env={"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    lines: list[str] = []
    while "holds it" not in lines or (then != "pass" and len(lines) < 2):
        line = (await process.stdout.readline()).decode()
        assert line, "it ended"
        lines.append(line.strip())
    return process, lines


async def test_a_second_process_is_refused_at_once_and_told_who_has_the_job(ledger_url: Path | str) -> None:
    path = ledger_url
    process, _ = await hold(path)
    try:
        with pytest.raises(LedgerError, match=f"process {process.pid} on {socket.gethostname()} since 20.*other jobs"):
            await open_job(path)
        async with opened(path, "another"):  # other jobs in the same file are fine
            pass
        async with open_ledger(path) as ledger:  # and so is looking
            assert (await ledger.job().stats()).requests == 1
            with pytest.raises(LedgerError, match=f"process {process.pid}"):
                await ledger.job().resolve("held", give_up=True)
    finally:
        process.kill()
        await process.wait()


async def test_the_job_is_free_as_soon_as_its_process_is_killed(ledger_url: Path | str) -> None:
    path = ledger_url
    process, _ = await hold(path)
    process.kill()
    await process.wait()
    async with opened(path) as job:
        assert job.run == 2
        known = await job.enter(entry("held"))
        assert known.row.state is State.ENTERED


async def test_two_pools_of_one_process_cannot_have_the_same_job(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path):
        with pytest.raises(LedgerError, match="by this process"):
            await open_job(path)
    async with opened(path):
        pass
    assert not isinstance(path, Path) or [other.name for other in path.parent.iterdir()] == ["job.db"]


async def test_a_lock_file_that_is_left_or_spoilt_locks_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "job.db"
    async with opened(path):
        pass
    lock = tmp_path / "job.db.1.lock"
    for text in ("", "no json", json.dumps({"pid": "x"}), json.dumps({"pid": 1, "host": "there", "since": "then"})):
        lock.write_text(text)
        async with opened(path):
            pass
    async with opened(path):
        lock.write_text("no json")
        with pytest.raises(LedgerError, match="is in use; other jobs"):
            await open_job(path)


async def test_many_that_want_a_job_at_once_get_it_one_after_the_other(ledger_url: Path | str) -> None:
    path = ledger_url
    holding = most = opens = 0

    async def want() -> None:
        nonlocal holding, most, opens
        for _ in range(5):
            try:
                job = await open_job(path)
            except LedgerError as error:
                assert "in use" in str(error)  # noqa: PT017
                await asyncio.sleep(0.01)
                continue
            holding += 1
            opens += 1
            most = max(most, holding)
            await asyncio.sleep(0)
            holding -= 1
            await job.aclose()

    await asyncio.gather(*(want() for _ in range(8)))
    assert most == 1
    assert opens >= 1
    assert ask(path, "SELECT runs FROM job") == [(opens,)]


async def test_a_forked_child_has_no_part_in_it_and_does_not_keep_it_locked(ledger_url: Path | str) -> None:
    path = ledger_url
    process, lines = await hold(path, then=FORKS)
    [told] = [line for line in lines if line.startswith("child")]
    child = int(told.split()[1])
    try:
        assert "cannot be used in a forked process" in told
        with pytest.raises(LedgerError, match=f"process {process.pid}"):
            await open_job(path)
        process.kill()
        await process.wait()
        os.kill(child, 0)  # the child lives on
        async with opened(path) as job:
            assert job.run == 2
            await row_in(job, State.COMPLETED, "k")
    finally:
        os.kill(child, signal.SIGKILL)
        if process.returncode is None:
            process.kill()
            await process.wait()
    async with opened(path) as job:
        known = await job.enter(entry("k", "k"))
        assert known.row.state is State.COMPLETED


async def test_looking_who_has_a_job_keeps_nobody_from_taking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "job.db", tmp_path / "job.db.1.lock"
    assert holder_of(lock) is None
    await (await open_job(path)).aclose()
    lock.write_bytes(b"")  # of one that died
    assert holder_of(lock) is None
    looker = os.open(lock, os.O_RDONLY)
    original = locks._lock
    tries = []

    def seen_meanwhile(file: Any) -> bool:
        """It was being looked at in the moment of the first try."""
        taken = original(file)
        tries.append(taken)
        if not taken and len(tries) == 1:
            os.close(looker)
        return taken

    fcntl.flock(looker, fcntl.LOCK_EX)
    monkeypatch.setattr(locks, "_lock", seen_meanwhile)
    await (await open_job(path)).aclose()
    assert tries[:2] == [False, True]
    assert holder_of(lock) is None
