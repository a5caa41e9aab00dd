"""Which tasks may be those of requests that nobody knows the outcome of. Pure."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from evolink_async.types import Task

if TYPE_CHECKING:
    from evolink_async.ledger.reports import UnknownRequest

# A request is sent again up to 10 minutes after its first POST, and may be some time on the wire; clocks differ.
EARLIEST, LATEST = timedelta(minutes=-1), timedelta(minutes=11)


def candidates(
    unknown: Iterable[UnknownRequest], tasks: Sequence[Task], known_ids: Collection[str] = ()
) -> dict[str, list[Task]]:
    """For each request the tasks that may be its own, or its second one, by identity; the likeliest first.

    tasks: of `client.tasks.list()`. known_ids: of tasks that have a request, as `Ledger.knows` tells. A candidate is
    of the same model, was made between a minute before the first POST and 11 minutes after, and is not known. That is
    no proof: another program with the same account makes such tasks too. Look at what it shows before you `resolve`.
    """
    known = frozenset(known_ids)
    rest = [task for task in tasks if task.created is not None and task.id not in known]
    found: dict[str, list[Task]] = {}
    for request in unknown:
        possible = [task for task in rest if why_not(request.model, request.submitted_at, task) is None]
        found[request.identity] = sorted(possible, key=functools.partial(_distance, request.submitted_at))
    return found


def why_not(model: str, submitted_at: datetime | None, task: Task) -> str | None:
    """Why a task can't be that of a request, as far as that can be seen; None: it may be."""
    if task.model is not None and task.model != model:
        return f"it is a task of {task.model}, the request is for {model}"
    if submitted_at is None or task.created is None or EARLIEST <= task.created - submitted_at <= LATEST:
        return None
    return f"it was made at {_moment(task.created)}, the request was sent at {_moment(submitted_at)}"


def _distance(submitted_at: datetime | None, task: Task) -> timedelta:
    return LATEST if submitted_at is None or task.created is None else abs(task.created - submitted_at)


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
