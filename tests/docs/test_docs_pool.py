"""docs/pool.md says what is true of how a pool is used."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from programs import run_program

from evolink_async import Outcome, TaskPool

PAGE = (Path(__file__).parents[2] / "docs" / "pool.md").read_text(encoding="utf-8")
USE = PAGE.partition("## A request on its way")[0]


async def test_its_program_runs(emulator: Any, tmp_path: Path) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "program.py").write_text(program)
    finished = await run_program([sys.executable, "program.py"], emulator, cwd=tmp_path)
    assert finished.code == 0, finished.stderr
    assert finished.stdout.count(".mp4") == 3
    assert len(emulator.emulator.book()["posts"]) == 6


def test_its_options_and_their_defaults_are_those_of_the_code() -> None:
    parameters = inspect.signature(TaskPool).parameters.values()
    options = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", USE.partition("| option |")[2], re.M)
    said = {}
    for names, defaults in rows:
        values = [eval(value.strip("` ")) for value in defaults.split(",")]
        for position, name in enumerate(re.findall(r"\w+", names)):
            said[name] = values[min(position, len(values) - 1)]
    assert said == options


def test_it_names_everything_that_a_pool_and_an_outcome_have() -> None:
    of_pool = {name for name, value in vars(TaskPool).items() if not name.startswith("_") and name != "census"}
    assert {name for name in of_pool if f"pool.{name}" not in USE} == set()
    assert {field.name for field in dataclasses.fields(Outcome) if f"`{field.name}`" not in USE} == set()
