"""docs/telemetry.md and docs/notebooks.md say what is true; the table of events is checked with the logging."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

from evolink_async.telemetry import otel, thresholds

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "telemetry.md").read_text(encoding="utf-8")
NOTEBOOKS = (DOCS / "notebooks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, r'"name": "generate_content gpt-4o-image"'), (1, r"^75(\.00)? to 75(\.00)? credits, \d+ s left$")],
    ids=["spans", "forecast"],
)
async def test_a_program_of_the_page_runs(number: int, said: str, emulator: Any, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(BLOCKS[number], encoding="utf-8")
    done = await run_program([sys.executable, "program.py"], emulator, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert re.search(said, done.stdout, re.M), done.stdout


def test_every_name_of_a_span_or_a_metric_is_on_the_page() -> None:
    tree = ast.parse(Path(otel.__file__).read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    form = r"(gen_ai|evolink|error|server|http)(\.[a-z_]+)+"
    names = {text for text in texts if re.fullmatch(form, text)} - {"evolink.progress", "evolink.post"}
    assert len(names) > 20
    assert {name for name in names if f"`{name}`" not in PAGE} == set()
    written = {word for word in re.findall(r"`([a-z_.]+)`", PAGE) if re.fullmatch(form, word)}
    assert written <= names | {"evolink.post", "http.request.resend_count"}


def test_its_bounds_are_those_of_the_code() -> None:
    assert f"status, {otel._MOST_EVENTS} in all" in PAGE
    assert f"{otel._LONGEST_PROMPT:,} characters" in PAGE
    assert f"the first {otel._MOST_NAMES} names" in PAGE
    assert f"{1 - thresholds.BACK:.0%}".replace("%", " %") in PAGE


async def test_the_cell_of_the_page_on_notebooks_runs(emulator: Any, tmp_path: Path) -> None:
    [cell] = re.findall(r"^```python\n(.*?)^```", NOTEBOOKS, re.M | re.S)
    body = (cell + "await client.aclose()\nprint(len(done))").replace("\n", "\n    ")
    program = f"import asyncio\n\n\nasync def main():\n    {body}\n\n\nasyncio.run(main())\n"
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = await run_program([sys.executable, "program.py"], emulator, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.stdout == "20\n"
    assert "20/20" in done.stderr
