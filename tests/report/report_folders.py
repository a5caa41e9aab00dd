"""Folders as runs leave them: lines through the command's own writer, ledgers through the verbs that a pool takes."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from evolink_async.cli.outputs import OutputFolder
from evolink_async.errors import TaskFailedError
from evolink_async.ledger import Entry, open_job
from evolink_async.pool import Outcome, OutcomeStatus
from evolink_async.report.items import Contents, Item
from evolink_async.requests import ImageRequest
from evolink_async.types import Task

BEGUN = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
MADE = datetime(2026, 11, 20, 13, 0, 0, tzinfo=UTC)
MODEL = "krea-2-turbo"


def png(colour: tuple[int, int, int] = (200, 80, 40), edge: int = 32, claimed: int | None = None) -> bytes:
    """A square picture; `claimed` is the edge that its head tells."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = claimed or edge
    rows = (b"\0" + bytes(colour) * edge) * edge
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def item(number: int = 0, status: str = "completed", **fields: Any) -> Item:
    """A request of a job that sends one a second, each of which takes five."""
    sent = BEGUN + timedelta(seconds=number)
    usual: dict[str, Any] = {
        "identity": f"k{number}",
        "key": f"k{number}",
        "status": status,
        "model": MODEL,
        "prompt": f"a lighthouse, number {number}",
        "spent": Decimal("2.5"),
        "reserved": Decimal(0),
        "attempts": 1,
        "submitted_at": sent,
        "finished_at": sent + timedelta(seconds=5),
    }
    return Item(**usual | fields)


def contents(items: Iterable[Item], title: str = "out") -> Contents:
    """A report's contents with these items."""
    made = Contents(title)
    for one in items:
        made.add(one)
    return made


def outcome(number: int, status: str = "completed", *, key: str | None = "", **fields: Any) -> Outcome:
    """What a pool would hand over."""
    name = f"k{number}" if key == "" else key
    request = ImageRequest(model=MODEL, prompt=f"a lighthouse, number {number}", key=name)
    task = Task.model_validate({"id": f"task-unified-{number}", "status": "completed", "model": MODEL})
    error = TaskFailedError("it was refused", task=task) if status == "failed" else None
    usual: dict[str, Any] = {
        "index": number,
        "key": name,
        "identity": name or f"{number:016x}-0",
        "request": request,
        "status": OutcomeStatus(status),
        "task": task,
        "error": error,
        "credits": Decimal("2.5"),
        "attempts": 1,
        "submitted_at": BEGUN,
        "finished_at": BEGUN + timedelta(seconds=5),
    }
    return Outcome(**usual | fields)


def write_outcomes(folder: Path, *outcomes: Outcome) -> Path:
    """results.jsonl and errors.jsonl."""
    with OutputFolder(str(folder)) as output:
        output.begin()
        for one in outcomes:
            output.take(one)
    return folder


async def write_ledger(folder: Path, states: Mapping[str, str], *, name: str = "default", **wire: Any) -> Path:
    """job.db with requests in these states, by key: entered, unsettled, accepted, completed or failed."""
    folder.mkdir(exist_ok=True)
    job = await open_job(folder / "job.db", name)
    for number, (key, state) in enumerate(states.items()):
        sent = BEGUN + timedelta(seconds=number)
        body = json.dumps({"model": MODEL, "prompt": key}).encode()
        content = hashlib.sha256(body).digest()[:8]
        entered = await job.enter(Entry(key, content, "/v1/images/generations", MODEL))
        row = entered.row
        if state == "entered":
            continue
        idempotency_key = f"ea-{row.id:032x}"
        about = {"idempotency_key": idempotency_key, "body": body, "fingerprint": "00", "at": sent}
        await job.intend(row, **about, price=MODEL, told=Decimal("2.5"))
        if state == "unsettled":
            await job.unsettled(row, code=None, error="the connection was cut")
            continue
        task_id = f"task-unified-{number}"
        await job.accepted(row, task_id, reserved=Decimal("2.5"), at=sent)
        if state == "accepted":
            continue
        told: dict[str, Any] = {"id": task_id, "status": state, "model": MODEL, **wire}
        told |= {"results": [f"https://files.example/{key}.png"]} if state == "completed" else {}
        told |= {"error": {"code": "content_policy", "message": "it was refused"}} if state == "failed" else {}
        await job.ended(row, Task.model_validate(told), at=sent + timedelta(seconds=5))
        file = folder / f"{key}-1.png"
        if state == "completed" and file.exists():
            await job.saved(row, [str(file)])
    await job.aclose()
    return folder
