"""docs/emulator.md says what is true."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

from evolink_async.emulator import Behaviour, Dialect, Fault, read_faults

PAGE = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text(encoding="utf-8")


async def test_its_program_runs_as_it_stands(emulator: Any, tmp_path: Path) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = await run_program([sys.executable, "program.py"], emulator, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert re.fullmatch(r"completed \['http://127\.0\.0\.1:\d+/results/\S+\.png'\]\n404\n", done.stdout)


def test_its_faults_are_faults() -> None:
    [text] = re.findall(r"^```json\n(.*?)^```", PAGE, re.M | re.S)
    assert len(read_faults(text)) == 4


@pytest.mark.parametrize("choice", [Behaviour, Dialect, Fault], ids=lambda choice: choice.__name__)
def test_it_names_every_field(choice: Any) -> None:
    missing = [field.name for field in dataclasses.fields(choice) if f"`{field.name}" not in PAGE]
    assert missing == []
