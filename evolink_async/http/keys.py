"""The API key: where it comes from, what it may look like, and how it is kept out of everything we print."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import re
from collections.abc import Awaitable, Callable

from evolink_async.errors import ConfigurationError

KeySource = str | Callable[[], str | Awaitable[str]]

_ALLOWED = re.compile(r"[\x21-\x7e]+", re.ASCII)
_LONGEST = 512
_PLACEHOLDERS = frozenset({"YOUR_API_KEY", "YOUR_EVOLINK_API_KEY", "<YOUR_API_KEY>", "sk-...", "..."})


# Seconds that the caller's function has; requests wait for it, and some of them wait without a limit of their own.
PATIENCE = 60.0


class ApiKey:
    """A key, or a way to ask for the current one. Its value is in no repr, error or log."""

    __slots__ = ("_source",)

    def __init__(self, source: KeySource) -> None:
        if not callable(source):
            source = checked_key(source)
        self._source = source

    async def get(self) -> str:
        """The key to use now. Raises `ConfigurationError` if the caller's function gives no usable one in time."""
        if isinstance(self._source, str):
            return self._source
        problem = None
        limit = asyncio.timeout(PATIENCE)
        try:
            value = self._source()
            if inspect.isawaitable(value):
                async with limit:
                    value = await value
        except Exception as error:  # noqa: BLE001  (whatever the caller's function raises must not look like ours)
            # Neither the message nor the exception itself: a caller's error about a key may well quote the key.
            problem = f"the api_key function raised {type(error).__name__}"
            if limit.expired():
                problem = f"the api_key function gave no key within {PATIENCE:g} s"
        if problem is not None:
            raise ConfigurationError(problem)
        return checked_key(value)

    def __repr__(self) -> str:
        return "ApiKey(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("an API key is not pickled")


def checked_key(value: object) -> str:
    """The key if it can be sent as a header. Raises `ConfigurationError`, which never shows the value."""
    if not isinstance(value, str):
        raise ConfigurationError(f"the API key must be a string, got {type(value).__name__}")
    if not value:
        raise ConfigurationError("the API key is empty; set EVOLINK_API_KEY or give api_key=")
    if value in _PLACEHOLDERS:
        raise ConfigurationError(
            "the API key is a placeholder from an example; get a key at https://evolink.ai/dashboard/keys"
        )
    if value.lower().startswith("bearer "):
        raise ConfigurationError("give the API key alone, without 'Bearer '")
    if value[0] in "\"'" or value[-1] in "\"'":
        raise ConfigurationError("the API key has quotation marks around it; remove them")
    if not _ALLOWED.fullmatch(value):
        raise ConfigurationError(
            "the API key holds a space, a line end or a character that is no printable ASCII; "
            "was it read from a file without .strip()?"
        )
    if len(value) > _LONGEST:
        raise ConfigurationError(
            f"the API key has {len(value):,} characters, and at most {_LONGEST} are taken; give the key alone"
        )
    return value


def fingerprint(key: str) -> str:
    """A short hash that tells two keys apart and reveals neither."""
    return hashlib.sha256(b"evolink-async key " + key.encode()).hexdigest()[:16]
