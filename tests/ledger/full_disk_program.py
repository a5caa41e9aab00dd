"""Plays the pool's part until the disk is full, in the middle of it, and goes on when there is room again."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from datetime import UTC, datetime
from decimal import Decimal

from evolink_async import LedgerError
from evolink_async.ledger import Entry, open_job

LIMIT = 300_000  # bytes; the file and its log are smaller at first
COUNT = 300


async def main(path: str) -> None:
    job = await open_job(path)
    known = await asyncio.gather(
        *(job.enter(Entry(f"k{n}", b"\0", "/v1/images/generations", "m")) for n in range(COUNT))
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    rows = {each.row.identity: each.row for each in known}
    accepted: dict[str, str] = {}
    told: set[str] = set()
    kept = sent_after = 0

    async def send(number: int) -> None:
        nonlocal sent_after
        row = known[number].row
        full = job.broken is not None
        try:
            await job.intend(
                row,
                idempotency_key=f"ea-{number:032x}",
                body=b"x" * 3000,
                fingerprint="00",
                at=datetime.now(UTC),
                price="m",
                told=Decimal(1),
            )
        except LedgerError:
            return
        sent_after += full
        accepted[row.identity] = f"task-{number}"  # the service has it

    async def tell(identity: str, task_id: str) -> None:
        nonlocal kept
        row = rows[identity]
        try:
            await job.accepted(row, task_id, reserved=Decimal(1), at=datetime.now(UTC))
        except LedgerError:
            kept += 1

    for start in range(0, COUNT + 4, 4):
        # Together with the intents of the next ones the ids of these are written: both meet the full disk.
        news = [(identity, task_id) for identity, task_id in accepted.items() if identity not in told]
        told.update(identity for identity, _ in news)
        numbers = range(start, min(start + 4, COUNT))
        await asyncio.gather(*(send(number) for number in numbers), *(tell(*new) for new in news))
    sent = len(accepted)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await job.aclose()
    print(
        json.dumps(
            {
                "tried": COUNT,
                "sent_before": sent,
                "sent_after_the_first_failure": sent_after,
                "kept": kept,
                "accepted": accepted,
            }
        )
    )


asyncio.run(main(sys.argv[1]))
