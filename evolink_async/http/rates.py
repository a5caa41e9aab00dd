"""The limit that a user gives."""

from __future__ import annotations

import re
from dataclasses import dataclass

from evolink_async.errors import ConfigurationError

_LEAST, _MOST = 1e-9, 1e9  # beyond these what is computed from a limit is 0 or infinite

_PER_WORD = {"s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_LIMIT_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:/|per)\s*([a-z]+)\s*", re.I | re.A)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `rate` submissions per `per` seconds, evenly spaced.

    In no window of `per` seconds are more than `rate` + 1 sent. Also written as text: "5/s", "60/min", "1000/h".
    """

    rate: float
    per: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "per"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST <= value <= _MOST:
                raise ConfigurationError(
                    f"RateLimit.{name} must be a positive number, from {_LEAST:g} to {_MOST:g}, got {value!r}"
                )

    @property
    def per_second(self) -> float:
        """Submissions per second."""
        return self.rate / self.per

    @classmethod
    def parse(cls, value: RateLimit | str) -> RateLimit:
        """A limit from text such as "60/min". Raises `ConfigurationError` for anything else."""
        if isinstance(value, RateLimit):
            return value
        match = _LIMIT_TEXT.fullmatch(str(value))
        per = _PER_WORD.get(match[2].lower()) if match else None
        if match is None or per is None:
            raise ConfigurationError(f'a rate limit reads like "5/s", "60/min" or "1000/h", got {value!r}')
        return cls(float(match[1]), per)
