"""Ledgers as a job leaves them behind, made with the verbs that a pool takes."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from evolink_async.ledger import Entry, JobLedger, Row, open_job
from evolink_async.types import Task

MODEL = "krea-2-turbo"
SENT = datetime(2026, 11, 20, 12, 0, 3, tzinfo=UTC)
PRICE = Decimal("2.5")


async def put(
    job: JobLedger,
    key: str | None,
    state: str = "unsettled",
    *,
    model: str = MODEL,
    sent: datetime = SENT,
    task_id: str | None = None,
    prompt: str = "a lighthouse",
    reason: str = "the connection was cut",
) -> Row:
    """A request that has come to a state: entered, sending, unsettled, twice, accepted, completed or failed."""
    body = json.dumps({"model": model, "prompt": prompt}).encode()
    content = hashlib.sha256(body).digest()[:8]
    known = await job.enter(Entry(key, content, "/v1/images/generations", model))
    row = known.row
    if state == "entered":
        return row
    idempotency_key = f"ea-{row.id:032x}"
    refusal = await job.intend(
        row, idempotency_key=idempotency_key, body=body, fingerprint="00", at=sent, price=model, told=PRICE
    )
    assert refusal is None
    if state == "sending":
        return row
    if state in ("unsettled", "twice"):
        await job.unsettled(row, code=None, error=reason)
        if state == "unsettled":
            return row
        assert await job.replay(row)
    task_id = task_id or f"task-unified-{row.id}"
    await job.accepted(row, task_id, reserved=PRICE, at=sent)
    if state not in ("accepted", "twice"):
        wire: dict[str, Any] = {"id": task_id, "status": state, "model": model}
        wire |= {"results": [f"https://files.example/{key}.png"]} if state == "completed" else {}
        wire |= {"error": {"code": "content_policy", "message": reason}} if state == "failed" else {}
        await job.ended(row, Task.model_validate(wire), at=SENT)
        if state == "completed":
            await job.saved(row, [f"out/{key}-1.png"])
    return row


async def a_ledger(path: Path, requests: dict[str, str], name: str = "default", **options: Any) -> Path:
    """A ledger with requests in these states, by key."""
    job = await open_job(path, name)
    for key, state in requests.items():
        await put(job, key, state, **options)
    await job.aclose()
    return path
