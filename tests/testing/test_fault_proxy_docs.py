"""docs/fault-proxy.md: its example runs, and its table is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from evolink_async import testing
from evolink_async.testing import Toxic

TEXT = (Path(__file__).parents[2] / "docs" / "fault-proxy.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]


async def test_the_example_is_a_test_that_passes(tmp_path: Path) -> None:
    [block] = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(block, "fault-proxy.md", "exec"), names)
    [test] = [value for name, value in names.items() if name.startswith("test_")]
    await test(tmp_path)


@pytest.mark.parametrize("kind", Toxic.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_toxic_has_a_row_with_its_attributes(kind: type[Toxic]) -> None:
    [row] = [row for row in ROWS if row[0] == f"`{kind.__name__}`"]
    assert row[1] == f"`{kind.type}`"
    own = set(kind.__annotations__) - {"type"}
    assert set(re.findall(r"`(\w+)`", row[2])) == own
    assert kind.__name__ in testing.__all__


def test_every_name_of_the_room_is_there_and_others_are_not() -> None:
    assert dir(testing) == sorted(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = testing.nothing
