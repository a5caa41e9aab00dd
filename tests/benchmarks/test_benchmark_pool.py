"""The benchmark of pools runs, and prints what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from programs import ROOT, run_program

NOBODY = SimpleNamespace(base_url="http://127.0.0.1:9", api_key="sk-of-no-use")  # it brings its own service


async def test_the_benchmark_of_pools_measures_every_part_and_draws_it(tmp_path: Path) -> None:
    plot = tmp_path / "cost.png"
    arguments = [sys.executable, str(ROOT / "benchmarks" / "pool.py"), "--quick", "--json", "--plot", str(plot)]
    finished = await run_program(arguments, NOBODY, timeout=550)
    assert finished.code == 0, finished.stderr
    results = json.loads(finished.stdout)
    assert results["setting"]["seed"] == 1
    assert {"machine", "python", "evolink_async", "aiohttp"} <= results["machine"].keys()
    (overhead,) = results["overhead"]
    assert overhead["cpu_us"] > overhead["overhead_us"] > 0
    assert overhead["looks"] >= 1
    assert [row["install"] for row in results["tcp"]] == ["core", "fast"]
    assert all(row["ratio"] > 0 for row in results["tcp"])
    assert len(results["memory"]) == 4
    assert [row["tasks"] for row in results["constant"]] == [500, 1000]
    assert [row["batches"] for row in results["crowd"]] == [True, False]
    assert all(row["looks_per_second"] > 0 for row in results["crowd"])
    assert plot.read_bytes().startswith(b"\x89PNG")
