"""A pool from its first to its last outcome, as one call."""

from __future__ import annotations

import math

from evolink_async.pool.outcome import Outcome, OutcomeStatus
from evolink_async.pool.pool import TaskPool

_IDS_IN_A_NOTE = 20


async def run_many(pool: TaskPool) -> list[Outcome]:
    """All outcomes of a pool in the order given; what is raised instead has those so far as `.outcomes`."""
    outcomes: list[Outcome] = []
    try:
        async with pool:
            async for outcome in pool:
                outcomes.append(outcome)
    except BaseException as error:
        error.outcomes = _in_order([*outcomes, *pool.leftovers])  # type: ignore[attr-defined]
        if error is not pool.reason:
            _note_leftovers(error, pool.leftovers)
        raise
    return _in_order(outcomes)


def _note_leftovers(error: BaseException, leftovers: list[Outcome]) -> None:
    running = [outcome.task.id for outcome in leftovers if outcome.task is not None]
    if running:
        shown = ", ".join(running[:_IDS_IN_A_NOTE]) + (", ..." if len(running) > _IDS_IN_A_NOTE else "")
        error.add_note(f"{len(running)} evolink tasks go on, their ids are in the log: {shown}")
    keys = [str(outcome.idempotency_key) for outcome in leftovers if outcome.status is OutcomeStatus.UNKNOWN]
    if keys:
        error.add_note(f"{len(keys)} evolink requests may have been accepted: idempotency keys {', '.join(keys)}")


def _in_order(outcomes: list[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda outcome: math.inf if outcome.index is None else outcome.index)
