"""docs/client.md says what is true."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from programs import run_program

import evolink_async
from evolink_async import AsyncEvoLink, EvoLinkError
from evolink_async.client import Generations
from evolink_async.saving import Files
from evolink_async.tasks import Tasks

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")


async def test_its_program_runs(emulator: Any, tmp_path: Path) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "program.py").write_text(program)
    finished = await run_program([sys.executable, "program.py"], emulator, cwd=tmp_path)
    assert finished.code == 0, finished.stderr
    assert re.fullmatch(r"task-\S+ http\S+\n", finished.stdout)


def test_it_names_every_error_and_what_each_carries() -> None:
    [section] = re.findall(r"^## Errors\n(.*)", PAGE, re.M | re.S)
    errors = {
        name
        for name in evolink_async.__all__
        if name.endswith("Error") and name not in ("EvoLinkError", "APIStatusError", "TaskError")
    }
    assert errors | {"EvoLinkError"} == set(re.findall(r"\b\w+Error\b", section)) - {"TimeoutError", "RuntimeError"}
    assert all(issubclass(getattr(evolink_async, name), EvoLinkError) for name in errors)


def test_it_names_every_call() -> None:
    calls = set()
    for owner, names in ((AsyncEvoLink, ""), (Tasks, "tasks."), (Files, "files."), (Generations, "images.")):
        for name, member in vars(owner).items():
            if inspect.isfunction(member) and not name.startswith("_") and name != "aclose":
                calls.add(f"{names}{name}(")
    said = PAGE.replace("`.list", "`files.list").replace("`.quota", "`files.quota").replace("`.delete", "`files.delete")
    assert {call for call in calls if call not in said} == set()
