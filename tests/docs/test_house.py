"""The rooms of the package import each other one way, as CONTRIBUTING.md says."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import evolink_async

PACKAGE = Path(evolink_async.__file__).parent
LEAVES = {"errors", "types", "requests"}  # values and the errors that carry them: one room, in three files


def room_of(module: str) -> str | None:
    """The folder or file of the package that a module lies in; None: not in the package, or its face."""
    first, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    if first != "evolink_async" or not room:
        return None
    return "leaves" if room in LEAVES else room


def imports() -> dict[str, set[str]]:
    """By room, the rooms that it imports: for types only, or late within a function, too."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("evolink_async", *path.relative_to(PACKAGE).with_suffix("").parts))
        room = room_of(module.removesuffix(".__init__"))
        if room is None:
            continue
        names = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path}: an import from a room above"
                assert path.parent != PACKAGE, f"{path}: a relative import"
                continue  # of the same room
            if isinstance(node, ast.ImportFrom):
                wanted = [f"{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                wanted = [name.name for name in node.names]
            else:
                continue
            names |= {other for name in wanted if (other := room_of(name)) is not None and other != room}
    return found


def test_the_rooms_import_each_other_one_way_even_for_types() -> None:
    try:
        order = list(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        raise AssertionError(f"rooms import each other in a circle: {' <- '.join(error.args[1])}") from None
    floors = [order.index(room) for room in ("leaves", "http", "core", "saving", "pool", "client", "cli")]
    assert floors == sorted(floors)


def test_the_emulator_and_the_product_know_nothing_of_each_other() -> None:
    found = imports()
    assert found["emulator"] <= {"_version"}
    assert {room for room, others in found.items() if "emulator" in others} <= {"cli", "testing"}
