"""The options of a pool, checked at the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolink_async.errors import ConfigurationError

MOST = 1_000_000

# In the contract, and refused until the rooms that carry them out exist: ignoring one would be worse.
_LATER: dict[str, Any] = {
    "callbacks": None,
}


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for an option that a pool doesn't have, or not yet."""
    for name, value in options.items():
        if name not in _LATER:
            raise ConfigurationError(f"a pool has no option {name!r}")
        if value is not _LATER[name] and value != _LATER[name]:
            raise ConfigurationError(f"the option {name!r} is not available in this version of evolink_async")
