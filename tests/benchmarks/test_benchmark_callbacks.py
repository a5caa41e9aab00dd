"""The benchmark of callbacks runs, and its receiver takes what comes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

from programs import ROOT, run_program

NOBODY = SimpleNamespace(base_url="http://127.0.0.1:9", api_key="sk-of-no-use")  # it brings its own service


async def test_the_benchmark_of_callbacks_finishes_every_job_with_and_without_them() -> None:
    program = str(ROOT / "benchmarks" / "callbacks.py")
    finished = await run_program([sys.executable, program, "--tasks", "20", "--speed", "50", "--json"], NOBODY)
    assert finished.code == 0, finished.stderr
    results = json.loads(finished.stdout)
    assert {"machine", "python", "evolink_async", "httpx", "seed"} <= results.keys()
    without, with_callbacks, lost = results["rows"]
    assert without["answers"] == {}
    assert set(with_callbacks["answers"]) == {"204"}
    assert lost["answers"] == {"dropped": 80}
    assert all(row["looks_per_task"] > 0 for row in (without, with_callbacks, lost))
