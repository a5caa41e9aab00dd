"""Where the ledgers of these tests are kept."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["file", "postgresql", "memory"])
def place(request: pytest.FixtureRequest) -> Path | str | None:
    """Where a ledger is kept."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres_url")
        return url
    folder: Path = request.getfixturevalue("quick_path")
    return folder / "job.db" if request.param == "file" else None
