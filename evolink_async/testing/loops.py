"""Running a coroutine in an event loop from outside of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")
PATIENCE = 30.0  # seconds that a loop in another thread has to answer; it needs less than a millisecond


def run_in(loop: asyncio.AbstractEventLoop | None, coroutine: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that belongs to a loop: one that runs in another thread, or idles.

    Of a closed loop, or none, nothing can be awaited any more; what has nothing to wait for still runs to its end.
    """
    if loop is None or loop.is_closed():
        return _run_without_loop(coroutine)
    if not loop.is_running():
        return loop.run_until_complete(coroutine)
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result(PATIENCE)
    except TimeoutError:
        if future.done():  # an error of the coroutine's own
            raise
        future.cancel()
        raise TimeoutError(f"the event loop of another thread did not answer within {PATIENCE:g} s") from None


def _run_without_loop(coroutine: Coroutine[Any, Any, _T]) -> _T:
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    coroutine.close()
    raise RuntimeError("its event loop is closed, and it has something to wait for")
