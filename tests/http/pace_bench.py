"""`benchmarks/pace.py` as a module: its worlds are those of the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_pace", path)
    assert spec is not None
    assert spec.loader is not None
    sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = _load(BENCHMARKS / "pace.py")
