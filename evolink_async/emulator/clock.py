"""The emulator's clock: it runs, or it stands still and is advanced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds on the clock of the wire. ``source`` gives seconds that never go back."""

    def __init__(self, source: Callable[[], float], *, standing: bool = False) -> None:
        self._source = source
        self._ahead = 0.0  # how far it was advanced while it ran
        self._stands_at: float | None = source() if standing else None
        self._listeners: list[Callable[[], None]] = []

    def __call__(self) -> float:
        return self._source() + self._ahead if self._stands_at is None else self._stands_at

    @property
    def standing(self) -> bool:
        return self._stands_at is not None

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once. ValueError unless the number is 0 or more and finite."""
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"a clock is advanced by seconds, 0 or more, not {seconds!r}")
        if self._stands_at is None:
            self._ahead += seconds
        else:
            self._stands_at += seconds
        self._tell()

    def stand(self) -> None:
        """Stand still from now on."""
        self._stands_at = self()
        self._tell()

    def run(self) -> None:
        """Run on from where it stands."""
        if self._stands_at is not None:
            self._ahead = self._stands_at - self._source()
            self._stands_at = None
            self._tell()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` whenever the clock is advanced, stopped or started."""
        self._listeners.append(listener)

    @contextmanager
    def at(self, moment: float) -> Iterator[None]:
        """Show ``moment`` inside the block: for a recorded request that is carried out again."""
        before, self._stands_at = self._stands_at, moment
        try:
            yield
        finally:
            self._stands_at = before

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()


def wall_clock() -> Callable[[], float]:
    """Unix time that never goes back, whatever is done to the machine's clock."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()
