"""Seconds as people write them: on the command line, in reports and in notebooks. Pure."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`120 ms`, `8.2 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
