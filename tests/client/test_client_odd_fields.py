"""A service whose tasks have fields with names that are ours: what it says is kept as it is, also in a ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from canned import canned

from evolink_async import ImageRequest

WIRE: dict[str, Any] = {
    "id": "task-1",
    "status": "completed",
    "results": ["https://files.invalid/a.png"],
    "raw": {"id": "task-2", "status": "failed"},
    "urls": ["https://files.invalid/other.png"],
    "is_terminal": False,
}


@pytest.mark.looptime
async def test_what_the_service_says_is_kept_although_its_fields_have_names_of_ours(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> Any:
        return {"id": "task-1", "status": "pending"} if "generations" in request.url.path else WIRE

    seen = []
    for _ in range(2):  # the second time from the ledger
        async with canned(answer) as client:
            request = ImageRequest(model="unknown", prompt="x")
            (outcome,) = await client.run_many([request], ledger=tmp_path / "job.db")
            assert outcome.ok
            assert outcome.task is not None
            assert outcome.task.raw == WIRE
            assert outcome.urls == ("https://files.invalid/a.png",)
            seen.append((outcome.task.id, outcome.from_ledger))
    assert seen == [("task-1", False), ("task-1", True)]
