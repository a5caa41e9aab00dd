"""A kernel that is interrupted in the middle of a job, as Jupyter's stop button does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from programs import run_program

from evolink_async.emulator import Emulator

REQUESTS = 16


async def test_a_job_cell_interrupted_twice_and_run_again_pays_once_for_every_request(
    api_key: str, tmp_path: Path
) -> None:
    driver = Path(__file__).parent / "interrupting.py"
    async with Emulator(speed=50, standing=True, seed=1, api_key=api_key).serve() as server:
        arguments = [sys.executable, str(driver), str(tmp_path), str(REQUESTS), "2"]
        done = await run_program(arguments, server, timeout=550)
        assert done.code == 0, done.stderr
        posts: list[dict[str, Any]] = server.emulator.book()["posts"]
    found = json.loads(done.stdout)
    first, second, last = found["runs"]
    assert first["error"] == second["error"] == "CancelledError"
    assert last["error"] is None
    # What had come stays in the variable; what was sent and not handed over is in the leftovers.
    assert 0 < first["done"] < REQUESTS
    assert first["done"] == first["ok"]
    assert first["leftovers"] >= 1
    assert first["posts"] <= first["done"] + first["leftovers"]
    # Run again, the cell begins with what it had.
    assert second["from_ledger"] >= first["done"]
    assert (last["done"], last["ok"], last["files"]) == (REQUESTS, REQUESTS, REQUESTS)
    # By the book: one POST, one charge for each.
    assert first["posts"] < second["posts"] < last["posts"] == found["posts"] == len(posts) == REQUESTS
    assert float(last["credits"]) == 2.5 * REQUESTS
    # The bar never shrinks to what was read so far.
    assert f"{REQUESTS}/{REQUESTS}" not in first["shown"]
    assert f"/{first['done']} " not in first["shown"]
    assert f"{REQUESTS}/{REQUESTS}" in last["shown"]
    # The live table is one display below its cell, kept up to date.
    [table] = found["live"]
    assert f"{REQUESTS} of {REQUESTS}" in table
