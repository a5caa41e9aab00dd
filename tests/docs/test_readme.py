"""Every Python block of the README runs, against the emulator, and does what the text says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
COMMAND = re.compile(r"<!-- (\w+) command -->\n```sh\n(.*?)\n```", re.S)


def test_the_readme_has_its_three_examples_and_two_commands() -> None:
    assert len(BLOCKS) == 3
    assert [name for name, _ in COMMAND.findall(README)] == ["demo", "test"]


def test_the_bulk_example_has_ten_lines_of_code() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=["bulk", "backend", "notebook"])
async def test_a_block_of_the_readme_runs_as_it_stands(number: int, emulator: Any, tmp_path: Path) -> None:
    block = tmp_path / "block.py"
    block.write_text(BLOCKS[number], encoding="utf-8")
    runner = Path(__file__).parent / "run_block.py"
    done = await run_program([sys.executable, str(runner), str(block)], emulator, cwd=tmp_path)
    assert done.code == 0, done.stderr
    links = re.findall(r"http://127\.0\.0\.1:\d+/\S+?(?=['\"\s])|urls=1", done.stdout + "\n")
    assert len(links) == {0: 20, 1: 1, 2: 1}[number], done.stdout
    assert len(emulator.emulator.book()["posts"]) == len(links)
    assert [path.suffix for path in tmp_path.glob("out/*")] == ([".png"] if number == 2 else [])
