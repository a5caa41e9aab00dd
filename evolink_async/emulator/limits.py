"""Rate limit and the hints a refusal carries. Pure: the time is passed in, in seconds."""

from __future__ import annotations

import math
from email.utils import formatdate

HINT_STYLES = ("seconds", "date", "ms", "body", None)


class TokenBucket:
    """At most ``burst`` at once and ``rate`` per second in the long run."""

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self.rate = rate
        self.burst = max(1.0, rate) if burst is None else float(burst)
        self._level = self.burst
        self._at: float | None = None

    def take(self, now: float) -> float:
        """Take one token and give 0, or leave it and give the seconds until there is one."""
        if self._at is not None:
            self._level = min(self.burst, self._level + max(0.0, now - self._at) * self.rate)
        self._at = now
        if self._level >= 1.0 - 1e-9:  # a caller who waits exactly as told must get in
            self._level = max(0.0, self._level - 1.0)
            return 0.0
        return (1.0 - self._level) / self.rate


def hint_headers(style: str | None, wait: float, now: float) -> list[tuple[str, str]]:
    """The headers that say "not for ``wait`` seconds", never less than that."""
    if style == "seconds":
        return [("retry-after", str(max(1, math.ceil(wait))))]
    if style == "date":
        return [("retry-after", formatdate(math.ceil(now + wait), usegmt=True))]
    if style == "ms":
        return [("retry-after-ms", str(max(1, math.ceil(wait * 1000))))]
    return []


def hint_text(style: str | None, wait: float) -> str | None:
    """The same hint in the older body style."""
    return f"retry after {max(1, math.ceil(wait))} seconds" if style == "body" else None
