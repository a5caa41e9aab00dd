"""The benchmark of the schedule runs, and its figures are figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "polling.py"


def test_a_quick_run_prints_its_figures_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "frontier.png"
    command = [sys.executable, str(PROGRAM), "--quick", "--json", "--seed", "3", "--jobs", "1", "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {"machine", "python", "seeds", "grid", "cost", "claims"} <= figures.keys()
    assert figures["seeds"] == "3"
    assert len(figures["grid"]) == 48
    assert all(ours > 0 and known > 0 for _, _, _, ours, known, *_ in figures["grid"])
    assert all(isinstance(claim["holds"], bool) for claim in figures["claims"])
    assert picture.read_bytes().startswith(b"\x89PNG")
