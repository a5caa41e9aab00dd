"""The benchmark of the ledger runs, and prints what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from programs import ROOT, run_program

NOBODY = SimpleNamespace(base_url="http://127.0.0.1:9", api_key="sk-of-no-use")  # it brings its own service


async def test_the_benchmark_of_the_ledger_measures_writes_size_and_what_a_pool_pays_for_it(tmp_path: Path) -> None:
    small = ["--requests", "200", "--tasks", "200", "--rounds", "1", "--size", "1000", "--folder", str(tmp_path)]
    arguments = [sys.executable, str(ROOT / "benchmarks" / "ledger.py"), "--json", *small]
    finished = await run_program(arguments, NOBODY, timeout=550)
    assert finished.code == 0, finished.stderr
    results = json.loads(finished.stdout)
    assert set(results["many"]) == {*("append and fdatasync", "ledger", "ledger in PostgreSQL", "ledger in memory")}
    assert all(row["writes_per_second"] > 0 for row in results["many"].values())
    assert results["alone"]["intent"]["p99_ms"] > 0
    assert results["alone"]["intent in PostgreSQL"]["p99_ms"] > 0
    assert results["size"]["megabytes"] > 0
    assert [row["way"] for row in results["pool"]] == ["over TCP", "service in process"]
    assert all(row["without_us"] > 0 for row in results["pool"])
    assert list(tmp_path.iterdir()) == []
