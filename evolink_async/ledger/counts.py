"""How often a content came before in this run: what tells equal requests without a key apart."""

from __future__ import annotations

_COUNTED = 10_000  # the latest contents, of which this many are remembered at least


class Counts:
    """Counts of the latest contents. A store knows the others; without one they begin anew."""

    __slots__ = ("_before", "_latest")

    def __init__(self) -> None:
        self._latest: dict[bytes, int] = {}
        self._before: dict[bytes, int] = {}  # what came before `_latest` began

    def get(self, content: bytes) -> int | None:
        """How often it came; None: it did not, or not lately."""
        count = self._latest.get(content)
        return self._before.get(content) if count is None else count

    def set(self, content: bytes, count: int) -> None:
        """It came once more: so often by now."""
        latest = self._latest
        latest[content] = count
        if len(latest) >= _COUNTED:
            self._latest, self._before = {}, latest

    def forget(self, content: bytes) -> None:
        """Nothing certain is known of it."""
        self._latest.pop(content, None)
        self._before.pop(content, None)
