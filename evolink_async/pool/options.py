"""The options of a pool, checked at the call."""

from __future__ import annotations

from collections.abc import Iterable

from evolink_async.errors import ConfigurationError

MOST = 1_000_000


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise `ConfigurationError` for an option that a pool doesn't have."""
    for name in names:
        raise ConfigurationError(f"a pool has no option {name!r}")
