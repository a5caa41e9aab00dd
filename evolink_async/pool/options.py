"""The options of a pool, checked at the call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from evolink_async.errors import ConfigurationError

MOST = 1_000_000

# In the contract, and refused until the rooms that carry them out exist: ignoring one would be worse.
_LATER: dict[str, Any] = {
    "ledger": None,
    "job": "default",
    "max_credits": None,
    "prices": None,
    "save_to": None,
    "retry_failed": 0,
    "callbacks": None,
}


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for an option that a pool doesn't have, or not yet."""
    for name, value in options.items():
        if name not in _LATER:
            raise ConfigurationError(f"a pool has no option {name!r}")
        if value is not _LATER[name] and value != _LATER[name]:
            raise ConfigurationError(f"the option {name!r} is not available in this version of evolink_async")


def checked_count(value: Any, name: str) -> int:
    """A whole number from 1 to a million."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise ConfigurationError(f"{name} must be a whole number from 1 to {MOST}, got {value!r}")
    return value


def checked_function(value: Any, name: str) -> Any:
    """A plain function, or None."""
    if value is not None and (not callable(value) or inspect.iscoroutinefunction(value)):
        raise ConfigurationError(f"{name} must be a plain function, got {value!r}")
    return value
