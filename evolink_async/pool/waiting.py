"""Requests that wait for a place in a pool."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evolink_async.pool.record import Record


class Line:
    """Requests of one model, which may have to wait for the service's sake; those with local files have their own.

    sending: so many of them are. held: a source is not read on, since it gave one of these last and they are enough.
    """

    __slots__ = ("held", "sending")

    def __init__(self) -> None:
        self.sending = 0
        self.held = False


NO_LINE = Line()  # of what waits for nothing


class Waiting:
    """Records in the order they were pulled, by line. A line of which `most` are sending has no place for more.

    count: how many there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._queues: dict[Line, deque[Record]] = {}
        self.count = 0

    def put(self, record: Record, *, first: bool = False) -> None:
        """Add a record, as the last of its line or as the `first`."""
        queue = self._queues.get(record.line)
        if queue is None:
            queue = self._queues[record.line] = deque()
        if first:
            queue.appendleft(record)
        else:
            queue.append(record)
        self.count += 1

    def has_next(self) -> bool:
        """Whether there is one whose line may have a place."""
        return any(line.sending < self._most for line in self._queues)

    def take(self) -> Record | None:
        """Take out the oldest one whose line may have a place."""
        oldest = None
        for line, queue in self._queues.items():
            if line.sending < self._most and (oldest is None or queue[0].number < oldest.number):
                oldest = queue[0]
        if oldest is not None:
            self.remove(oldest)
        return oldest

    def remove(self, record: Record) -> None:
        """Take a record out that is here."""
        queue = self._queues[record.line]
        queue.remove(record)  # mostly it is the first
        if not queue:
            del self._queues[record.line]
        self.count -= 1

    def take_all(self) -> list[Record]:
        """Take out all of them, in the order they were pulled."""
        records = sorted(
            (record for queue in self._queues.values() for record in queue), key=lambda record: record.number
        )
        self._queues.clear()
        self.count = 0
        return records

    def of(self, line: Line) -> int:
        """How many wait in this line."""
        return len(self._queues.get(line, ()))
