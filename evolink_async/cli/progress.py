"""progress.jsonl: how a run went, a line now and then, for the plots of a report."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from evolink_async.cli.outputs import encoded
from evolink_async.pool import PoolStats
from evolink_async.report.files import PROGRESS

_SHARE = 500  # of the time gone by: no line before it has grown by this part, so a long run takes few thousand lines


class ProgressRecord:
    """Adds a line for each look at a pool to the file of a folder; every run adds its own.

    What cannot be written is left out: it is a picture's worth and no more.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS
        self._next = 0.0

    def note(self, stats: PoolStats) -> None:
        """Write down how the pool is doing, unless the last line is recent."""
        if stats.elapsed < self._next:
            return
        self._next = stats.elapsed * (1 + 1 / _SHARE)
        line = {
            "at": datetime.now(UTC),
            "elapsed": round(stats.elapsed, 3),
            "outstanding": stats.outstanding,
            "finished": stats.finished,
            "posts": stats.posts,
            "rate_limited": stats.rate_limited,
            "status_requests": stats.status_requests,
            "rate": stats.rate,
        }
        try:
            with open(self._path, "ab", buffering=0) as file:
                file.write(encoded(line))
        except OSError:
            pass  # the same disk holds the outcomes, and there it is told
