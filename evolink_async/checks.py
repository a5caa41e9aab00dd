"""Values that a caller gives, checked before anything is done with them."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from evolink_async.errors import ConfigurationError, InvalidRequestError
from evolink_async.types import TASK_ID

_ENDLESS = 1e9  # seconds; more is no number of seconds but a mistake


def checked_seconds(value: float | None, name: str) -> float | None:
    """A positive number of seconds, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _ENDLESS:
        raise ConfigurationError(
            f"{name} must be a positive number of seconds below {_ENDLESS:g}, or None, got {value!r}"
        )
    return float(value)


def deadline_after(timeout: float | None) -> float | None:
    """The loop time when a caller's timeout is over; None: there is none."""
    seconds = checked_seconds(timeout, "timeout")
    return None if seconds is None else asyncio.get_running_loop().time() + seconds


def checked_count(value: Any, name: str, least: int, most: int) -> int:
    """A whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return value


def one_of(value: Any, name: str, allowed: tuple[Any, ...]) -> Any:
    """One of a few words or switches."""
    if not isinstance(value, str | bool) or value not in allowed:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def checked_function(value: Any, name: str) -> Any:
    """A plain function, or None."""
    if value is not None and (not callable(value) or inspect.iscoroutinefunction(value)):
        raise ConfigurationError(f"{name} must be a plain function, got {value!r}")
    return value


def checked_id(task_id: Any) -> str:
    """A task's id. Raises `InvalidRequestError` for what cannot be one."""
    if not isinstance(task_id, str) or not TASK_ID.fullmatch(task_id) or not task_id.strip("."):
        message = f"no task id: {task_id!r}; ids look like task-unified-1774857405-abc123"
        raise InvalidRequestError(message, param="task_id")
    return task_id
