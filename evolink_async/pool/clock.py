"""The wall clock, by which outcomes are dated and which goes on between two runs."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> datetime:
    """This moment, aware."""
    return datetime.now(UTC)
