"""A pool from its first to its last outcome, as one call."""

from __future__ import annotations

import math

from evolink_async.pool.outcome import Outcome
from evolink_async.pool.pool import TaskPool

_IDS_IN_A_NOTE = 20


async def run_many(pool: TaskPool) -> list[Outcome]:
    """All outcomes of a pool in the order given; its reason is raised with `.outcomes`."""
    outcomes: list[Outcome] = []
    try:
        async with pool:
            async for outcome in pool:
                outcomes.append(outcome)
    except BaseException as error:
        if error is pool.reason:
            error.outcomes = _in_order(outcomes)  # type: ignore[attr-defined]
        elif running := [outcome.task.id for outcome in pool.leftovers if outcome.task is not None]:
            shown = ", ".join(running[:_IDS_IN_A_NOTE]) + (", ..." if len(running) > _IDS_IN_A_NOTE else "")
            error.add_note(f"{len(running)} evolink tasks go on, their ids are in the log: {shown}")
        raise
    return _in_order(outcomes)


def _in_order(outcomes: list[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda outcome: math.inf if outcome.index is None else outcome.index)
