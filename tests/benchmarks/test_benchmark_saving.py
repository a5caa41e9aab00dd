"""The benchmark of saving runs, and prints what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from programs import ROOT, run_program

NOBODY = SimpleNamespace(base_url="http://127.0.0.1:9", api_key="sk-of-no-use")  # it brings its own service


async def test_the_benchmark_of_saving_saves_with_every_client(tmp_path: Path) -> None:
    program = str(ROOT / "benchmarks" / "saving.py")
    arguments = [sys.executable, program, "--rows", "tiny", "--rounds", "1", "--json", "--folder", str(tmp_path)]
    finished = await run_program(arguments, NOBODY, timeout=550)
    assert finished.code == 0, finished.stderr
    results = json.loads(finished.stdout)
    assert {"machine", "python", "evolink_async", "httpx"} <= results.keys()
    found = results["rows"]["tiny"]
    assert {"evolink_async", "evolink_async, no fsync"} <= found.keys()
    assert all(result["seconds"] > 0 and result["files_per_second"] > 0 for result in found.values())
    assert list(tmp_path.iterdir()) == []
