"""The account: what was there, what is reserved, what is spent. Integer micro-credits."""

from __future__ import annotations


class Account:
    """``initial == reserved + spent + remaining`` at every moment."""

    def __init__(self, initial: int) -> None:
        self.initial = initial
        self.reserved = 0
        self.spent = 0

    @property
    def remaining(self) -> int:
        return self.initial - self.reserved - self.spent

    def set_remaining(self, remaining: int) -> None:
        """Pay in, or take out, until so much is free."""
        self.initial = self.reserved + self.spent + remaining

    def reserve(self, amount: int) -> bool:
        """Set the amount aside, or say False when it doesn't fit."""
        if amount > self.remaining:
            return False
        self.reserved += amount
        return True

    def charge(self, reserved: int, amount: int) -> None:
        """The reservation is settled: ``amount`` of it is spent, the rest is free again."""
        self.reserved -= reserved
        self.spent += amount

    def release(self, reserved: int) -> None:
        """The reservation is given back whole."""
        self.charge(reserved, 0)
