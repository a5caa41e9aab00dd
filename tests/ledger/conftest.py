"""Where the ledgers of these tests are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import Postgres


@pytest.fixture(params=["file", "postgresql", "memory"])
def place(request: pytest.FixtureRequest) -> Iterator[Path | str | None]:
    """Where a ledger is kept."""
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.lend()
        yield url
        server.give_back(url)
        return
    folder: Path = request.getfixturevalue("quick_path")
    yield folder / "job.db" if request.param == "file" else None
