"""The options of a pool."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import TYPE_CHECKING, TypedDict

from evolink_async.errors import ConfigurationError

if TYPE_CHECKING:
    from evolink_async.pool.doubts import Receiver
    from evolink_async.pool.outcome import PoolStats
    from evolink_async.pool.pricing import Prices

MOST = 1_000_000


class PoolOptions(TypedDict, total=False):
    """What `client.pool` and `client.run_many` hand on to `TaskPool`, which says what each means."""

    max_outstanding: int
    ledger: str | os.PathLike[str] | None
    job: str
    max_credits: Decimal | float | None
    prices: Prices | None
    save_to: str | os.PathLike[str] | None
    task_timeout: float | None
    retry_failed: int
    stop_after_rejections: int | None
    callbacks: Receiver | None
    on_progress: Callable[[PoolStats], object] | None


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise `ConfigurationError` for an option that a pool doesn't have."""
    for name in names:
        raise ConfigurationError(f"a pool has no option {name!r}; it has {', '.join(PoolOptions.__annotations__)}")
