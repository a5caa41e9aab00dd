"""The benchmark of the watcher runs, and prints what it measured."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

from programs import ROOT, run_program

NOBODY = SimpleNamespace(base_url="http://127.0.0.1:9", api_key="sk-of-no-use")  # it brings its own service


async def test_the_benchmark_of_the_watcher_counts_looks_requests_and_delays() -> None:
    arguments = [sys.executable, str(ROOT / "benchmarks" / "watching.py"), "--quick", "--json"]
    finished = await run_program(arguments, NOBODY, timeout=550)
    assert finished.code == 0, finished.stderr
    results = json.loads(finished.stdout)
    assert {"machine", "python", "evolink_async", "httpx", "seeds"} <= results.keys()
    assert [(row["outstanding"], row["batches"]) for row in results["rows"]] == [
        (1, True),
        (1, False),
        (60, True),
        (60, False),
    ]
    one_by_one, in_batches = results["rows"][3], results["rows"][2]
    assert one_by_one["looks"] == one_by_one["requests"] > in_batches["requests"] > 0
    assert all(row["p99"] >= row["mean"] > 0 for row in results["rows"])
