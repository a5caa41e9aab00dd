"""Closing a test's client: in the event loop that it was used in, whoever runs that loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from evolink_async.client import AsyncEvoLink
from evolink_async.testing.loops import run_in


@contextlib.contextmanager
def leaving_its_loop(item: pytest.Item, client: AsyncEvoLink) -> Iterator[None]:
    """Meanwhile a coroutine test closes at its end what the client has opened in the test's loop.

    Only that, not the client: hypothesis calls a test many times with one client, each time perhaps in another loop.
    """
    inner = getattr(getattr(item, "obj", None), "hypothesis", None)
    holder, name = (item, "obj") if inner is None else (inner, "inner_test")
    test = getattr(holder, name, None)
    if not inspect.iscoroutinefunction(test):
        yield
        return

    @functools.wraps(test)
    async def leaving(*args: Any, **kwargs: Any) -> Any:
        try:
            return await test(*args, **kwargs)
        finally:
            await _leave_loop(client)

    setattr(holder, name, leaving)
    try:
        yield
    finally:
        setattr(holder, name, test)


async def _leave_loop(client: AsyncEvoLink) -> None:
    session = client._core.session
    if session is not None and session.loop is asyncio.get_running_loop():
        client._core.session = None
        await session.aclose()


def close(client: AsyncEvoLink) -> None:
    """Close a client for good, from outside its loop: a fixture may have used it in another one than the test's."""
    session = client._core.session
    run_in(None if session is None else session.loop, client.aclose())
