"""docs/ledger.md says what is true."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from evolink_async.ledger import State, open_job
from evolink_async.ledger.file import APPLICATION_ID
from evolink_async.ledger.states import diagram, table

PAGE = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text(encoding="utf-8")


def test_its_diagram_and_its_table_are_drawn_from_the_table_of_states() -> None:
    """If not: put in what `diagram()` and `table()` give now."""
    [drawn] = re.findall(r"^```mermaid\n(.*?)^```", PAGE, re.M | re.S)
    assert drawn == diagram()
    assert table() in PAGE


def test_it_says_what_becomes_of_every_state_when_a_job_is_run_again() -> None:
    [section] = re.findall(r"^## Running a job again\n(.*?)^## ", PAGE, re.M | re.S)
    passing = {State.SENDING, State.REPLAYING}  # the next run finds them unsettled
    assert {state for state in State if f"`{state}`" in section} == set(State) - passing


async def test_it_names_every_table_of_the_file_and_its_mark(tmp_path: Path) -> None:
    await (await open_job(tmp_path / "job.db")).aclose()
    with closing(sqlite3.connect(tmp_path / "job.db")) as file:
        tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    [section] = re.findall(r"^## What is in the file\n(.*?)^## ", PAGE, re.M | re.S)
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == [
        *("job", "request", "body", "result", "past_try", "price", "learned")
    ]
    assert sorted(tables) == sorted(re.findall(r"^\| `(\w+)` \|", section, re.M))
    assert f"0x{APPLICATION_ID:X}" in section


async def test_its_program_runs(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from evolink_async.ledger import Entry

    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    job = await open_job(tmp_path / "job.db")
    known = await job.enter(Entry("page-17", b"\0", "/v1/images/generations", "gpt-4o-image"))
    now = datetime.now(UTC)
    await job.intend(known.row, idempotency_key="ea-0123456789abcdef", body=b"{}", fingerprint="00", at=now)
    await job.unsettled(known.row, code=None, error="cut")
    await job.aclose()
    indented = program.replace("job.db", str(tmp_path / "job.db")).replace("\n", "\n    ")
    names: dict[str, object] = {}
    exec(f"async def main():\n    {indented}", names)
    await names["main"]()  # type: ignore[operator]
    job = await open_job(tmp_path / "job.db")
    row = await job.find("page-17")
    assert row is not None
    assert row.task_id == "task-unified-1774857405-abc123"
    await job.aclose()
