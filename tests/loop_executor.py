"""An executor without a thread: for virtual time, and to repeat a run exactly."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class InLoop(Executor):
    """Does at once, in the loop, what is otherwise done in the ledger's thread.

    Nothing else is different: the same functions get the same batches, and their results arrive the same way.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        call: Future[Any] = Future()
        try:
            call.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  (it goes where that of a thread would)
            call.set_exception(error)
        return call


def in_loop(monkeypatch: Any) -> None:
    """Ledgers opened from now on have no thread."""
    monkeypatch.setattr("evolink_async.ledger.opening.one_thread", InLoop)
