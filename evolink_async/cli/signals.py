"""SIGINT, SIGTERM and SIGHUP while something is under way: the first ends it in order, the second at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupts"]

_SOON = 0.2  # seconds; what closes without waiting is closed by then
_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


class Interrupts:
    """Cancels a task at the first signal, and again at the second; the third ends the process.

    `on_first` is called at the first one, before the cancellation. `count` says how many came; `code` is the exit
    code they ask for, None without any. Enter it in the main thread, inside the running loop.

    A closed terminal or a lost ssh is a SIGHUP, which comes from the system and from the shell: a second one means no
    hurry and isn't counted. Where it is ignored (nohup) it stays so.
    """

    def __init__(self, on_first: Callable[[], object] | None = None) -> None:
        self.count = 0
        self.code: int | None = None
        self._on_first = on_first
        self._work: asyncio.Task[Any] | None = None
        self._restore: list[Callable[[], object]] = []

    async def run(self, work: Coroutine[Any, Any, int]) -> int:
        """The work's result; if it was cancelled by a signal, the signal's exit code."""
        self._work = asyncio.ensure_future(work)
        if self.count:
            self._work.cancel()
        try:
            code = await self._work
        except asyncio.CancelledError:
            if self.code is None:
                raise
            return self.code
        return code if self.code is None else self.code

    def cancel_soon(self) -> None:
        """Cut short what the work still does, unless it ends by itself in a moment."""
        if self._work is not None:
            asyncio.get_running_loop().call_later(_SOON, self._work.cancel)

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in _signals():
            try:
                loop.add_signal_handler(number, self._came, number)
                self._restore.append(partial(loop.remove_signal_handler, number))
            except NotImplementedError:  # the Windows loop
                before = signal.signal(number, self._handler(loop))
                self._restore.append(partial(signal.signal, number, before))
            except (ValueError, RuntimeError):  # not in the main thread: then signals are somebody else's
                pass
        return self

    def __exit__(self, *exc: object) -> None:
        for restore in self._restore:
            restore()
        self._restore.clear()

    def _handler(self, loop: asyncio.AbstractEventLoop) -> Callable[[int, FrameType | None], object]:
        return lambda number, frame: loop.call_soon_threadsafe(self._came, number)

    def _came(self, number: int) -> None:
        if number == _HANGUP and self.count:
            return
        self.count += 1
        self.code = 128 + number if self.code is None else self.code
        if self.count == 1 and self._on_first is not None:
            self._on_first()
        if self.count > 2:
            os._exit(self.code)
        if self._work is not None:
            self._work.cancel()


def _signals() -> list[signal.Signals]:
    """Those to listen to."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
        signals.append(_HANGUP)
    return signals
