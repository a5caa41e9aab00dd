"""The asyncio tasks of this library."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


def own_task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], name: str, context: Context | None = None
) -> asyncio.Task[T]:
    """A task that begins in the loop's next round, whatever task factory the loop has.

    An eager one (`asyncio.eager_task_factory`) would run the work up to its first wait, or to its end, before whoever
    starts it knows the task. context: what it sees of context variables; None: what is there now.
    """
    return asyncio.Task(work, loop=loop, name=name, context=context)
