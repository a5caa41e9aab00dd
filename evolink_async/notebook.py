"""Progress of a pool below the cell that runs it (docs/notebooks.md).

    from evolink_async.notebook import progress_bar

    async with client.pool(requests, ledger="job.db", on_progress=progress_bar()) as pool: ...

`progress_bar` needs the `notebook` extra, `live_table` IPython; both are loaded when they are called.
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from evolink_async.errors import ConfigurationError
from evolink_async.pool.outcome import OutcomeStatus, PoolStats

__all__ = ["live_table", "progress_bar"]


def progress_bar(**options: Any) -> Callable[[PoolStats], None]:
    """A bar for one pool, as its `on_progress`: a widget in notebooks that have ipywidgets, else text (`tqdm.auto`).

    options: for tqdm, e.g. `desc="lighthouses"`, `leave=False`, `total=500` for a generator. Works in terminals too.
    Raises `ConfigurationError` without tqdm. Since 0.1.0.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a notebook without ipywidgets: a bar of text will do
            tqdm = import_module("tqdm.auto").tqdm
    except ImportError:
        raise ConfigurationError(
            "a progress bar needs the notebook extra: pip install 'evolink-async[notebook]'"
        ) from None
    return _in_this_cell(_Bar(tqdm, {"unit": "request"} | options))


def live_table() -> Callable[[PoolStats], None]:
    """A table of counts below the cell, as the `on_progress` of one pool.

    Raises `ConfigurationError` without IPython. Since 0.1.0.
    """
    try:
        display = import_module("IPython.display").display
    except ImportError:
        raise ConfigurationError("live_table needs IPython, as in a notebook") from None
    shown: list[Any] = []

    def show(stats: PoolStats) -> None:
        if shown:
            shown[0].update(stats)
        else:
            handle = display(stats, display_id=True)
            if handle is not None:  # no notebook, but a terminal
                shown.append(handle)

    return _in_this_cell(show)


# Run again, they come to their end.
_TO_COME = (OutcomeStatus.UNFINISHED, OutcomeStatus.NOT_SUBMITTED)


class _Bar:
    """One tqdm bar, made when there is something to tell."""

    def __init__(self, tqdm: Any, options: dict[str, Any]) -> None:
        self._tqdm = tqdm
        self._options = options
        self._bar: Any = None

    def __call__(self, stats: PoolStats) -> None:
        if self._bar is None:
            self._bar = self._tqdm(**{"total": stats.total} | self._options)
        bar = self._bar
        if self._options.get("total") is None:
            # A pool that was left knows of no more requests than it has read.
            bar.total = stats.total if bar.total is None or stats.total is None else max(bar.total, stats.total)
        bar.n = stats.finished - sum(stats.counts.get(status, 0) for status in _TO_COME)
        bar.set_postfix_str(_summary(stats), refresh=False)
        bar.refresh()
        if stats.total is not None and stats.finished >= stats.total:
            bar.close()


def _summary(stats: PoolStats) -> str:
    """What is worth a word beside the bar."""
    parts = [f"{stats.outstanding} outstanding"]
    bad = stats.finished - stats.completed - sum(stats.counts.get(status, 0) for status in _TO_COME)
    if bad:
        parts.append(f"{bad} not completed")
    if stats.credits_spent:
        parts.append(f"{stats.credits_spent.normalize():f} credits")
    return ", ".join(parts)


def _in_this_cell(tell: Callable[[PoolStats], None]) -> Callable[[PoolStats], None]:
    """Whoever calls it, it writes below the cell that made it: a kernel knows its cell by the context."""
    here = contextvars.copy_context()

    def told(stats: PoolStats) -> None:
        here.run(tell, stats)

    return told
