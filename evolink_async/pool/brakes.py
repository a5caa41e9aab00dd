"""What makes a pool stop submitting before its sources end. Pure: answers and times go in, a yes or no comes out."""

from __future__ import annotations

import math
from typing import Any

from evolink_async.errors import APIStatusError, ConnectionFailedError, EvoLinkError

PROBE_PAUSE = 30.0


class Refusals:
    """Counts identical refusals that come one after another: the same status, code, param and model.

    What an earlier run has submitted is accepted already, and its place is between the requests that were read before
    and after it. A service that cannot be reached refuses every model alike.
    """

    __slots__ = ("_count", "_last", "_most")

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._last: tuple[Any, ...] | None = None
        self._count = 0

    def accepted(self) -> None:
        self._last, self._count = None, 0

    def too_many(self, error: EvoLinkError | None, model: str, *, accepted_before: int, has_sources: bool) -> bool:
        """Count a refusal; True when it is one too many. A pool without sources outlives that nobody is reached.

        accepted_before: how many that an earlier run has submitted were read before the refused one.
        """
        refusal: tuple[Any, ...]
        if isinstance(error, APIStatusError):
            refusal = (error.status_code, error.code, error.param, model, accepted_before)
        elif isinstance(error, ConnectionFailedError) and has_sources:
            refusal = (ConnectionFailedError,)
        else:
            return False
        self._count = self._count + 1 if refusal == self._last else 1
        self._last = refusal
        return self._most is not None and self._count >= self._most


class Block:
    """A pool without sources outlives 401 and 402: one request in a while is let through and finds out."""

    __slots__ = ("_until", "error")

    def __init__(self) -> None:
        self.error: EvoLinkError | None = None  # why nothing is sent at the moment
        self._until = -math.inf

    def begin(self, error: EvoLinkError, now: float) -> None:
        self.error = error
        self._until = now + PROBE_PAUSE

    def end(self) -> None:
        self.error = None

    def holds(self, now: float) -> bool:
        """Whether the next request has to stay. If not, it is the one that finds out, and the next ones stay."""
        if self.error is None:
            return False
        if now < self._until:
            return True
        self._until = now + PROBE_PAUSE
        return False
