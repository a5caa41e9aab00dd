"""A wish to send that is a function."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Ticket:
    model: str
    party: Hashable
    go: Callable[[], None]
    failures: list[BaseException] = field(default_factory=list)
    waiting: bool = False

    def turn_failed(self, error: BaseException) -> None:
        self.failures.append(error)
