"""An emulator in a thread of its own: for tests in any event loop or in none, and for programs in any language."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from evolink_async.emulator import Emulator, Fault, Server
from evolink_async.testing.loops import PATIENCE, run_in

_T = TypeVar("_T")


class BackgroundEmulator:
    """An emulator on a real loopback port, served by a thread with an event loop of its own.

        with BackgroundEmulator(speed=1000, seed=1) as emulator:
            subprocess.run(["node", "app.js"], env={**os.environ, "EVOLINK_BASE_URL": emulator.base_url})

    The options are those of :class:`evolink_async.emulator.Emulator`, which raises ValueError or TypeError for wrong
    ones. Entering it raises ImportError where the extra ``emulator`` is not installed, OSError where there is no port.
    All methods are plain functions that may be called from any thread, also inside a running event loop: what they do
    happens in the emulator's thread, between two requests. After the block the book and the faults can still be read.
    """

    def __init__(self, **options: Any) -> None:
        self._emulator = Emulator(**options)
        self._options = MappingProxyType(options)
        self._server: Future[Server] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="evolink emulator", daemon=True)

    def __repr__(self) -> str:
        served = self._server.done() and not self._server.cancelled() and self._server.exception() is None
        where = f" at {self._server.result().base_url}" if served else ""
        return f"<BackgroundEmulator{where}: {self._emulator!r}>"

    @property
    def base_url(self) -> str:
        """Where it listens, without ``/v1``: ``http://127.0.0.1:`` and a port."""
        if self._thread.ident is None:
            raise RuntimeError("the emulator does not serve yet: use it in a 'with' block")
        return self._server.result(PATIENCE).base_url

    @property
    def api_key(self) -> str:
        """The one key it knows."""
        return self._emulator.api_key

    @property
    def options(self) -> Mapping[str, Any]:
        """The options it was made with."""
        return self._options

    @property
    def seed(self) -> int:
        """What decides durations, failures and pictures."""
        seed: int = self._options.get("seed", 0)
        return seed

    def book(self) -> dict[str, Any]:
        """The ground truth: every accepted submission (``"posts"``), every charge, what was refused and why."""
        return self._call(self._emulator.book)

    def set_faults(self, faults: Iterable[Fault | Mapping[str, Any]]) -> None:
        """Replace the faults in force; their counts start again. Raises ValueError for a fault that can't be."""
        self._call(self._emulator.set_faults, list(faults))

    def faults(self) -> list[dict[str, Any]]:
        """The faults in force, each with how many requests it ``"matched"`` and how many it ``"hit"``."""
        faults: list[dict[str, Any]] = run_in(self._loop, self._control_page("faults"))["faults"]
        return faults

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once on the emulator's clock, not on those of its clients."""
        self._call(self._emulator.advance, seconds)

    def end(self, task_id: str, status: str = "completed", *, code: str | None = None) -> None:
        """Let a task end now: completed, failed (with ``code``) or cancelled.

        Raises ValueError for an unknown or finished task.
        """
        self._call(partial(self._emulator.end, code=code), task_id, status)

    def set_account(self, **changes: Any) -> None:
        """Change the account: ``credits`` that are free, ``rate``, ``burst``, ``concurrency``, and ``key``, which is
        active, invalid, disabled or expired. Raises ValueError for what can't be.
        """
        self._call(partial(self._emulator.set_account, **changes))

    def reset(self) -> None:
        """Begin again as at first: no tasks, no files, the first balance, the first faults; the clock goes on."""
        self._call(self._emulator.reset)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server.result(PATIENCE)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._server.done():
                raise
            self._server.set_exception(error)  # raised where it was to start

    async def _serve(self) -> None:
        async with self._emulator.serve() as server:
            self._loop = asyncio.get_running_loop()
            self._server.set_result(server)
            await self._stop.wait()

    def _call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        async def call() -> _T:
            return function(*arguments)

        return run_in(self._loop, call())

    async def _control_page(self, name: str) -> Any:
        """What GET /_emulator/ and the name answers, without a socket: a test may have replaced those."""
        parts: list[bytes] = []

        async def send(message: Mapping[str, Any]) -> None:
            parts.append(message.get("body", b""))

        scope = {"type": "http", "method": "GET", "path": f"/_emulator/{name}", "query_string": b"", "headers": []}
        await self._emulator.app(scope, _no_body, send)
        return json.loads(b"".join(parts))


async def _no_body() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}
