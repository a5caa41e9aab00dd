"""Requests that wait for a place in a pool."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from evolink_async.pool.record import Record


class Waiting:
    """Records in the order they were pulled, by line (mostly their model): some may have no place at the moment.

    count: how many there are.
    """

    def __init__(self, may_have_place: Callable[[str], bool]) -> None:
        self._may_have_place = may_have_place
        self._queues: dict[str, OrderedDict[Record, None]] = {}
        self.count = 0

    def put(self, record: Record, *, first: bool = False) -> None:
        """Add a record, as the last of its model or as the `first`."""
        queue = self._queues.get(record.line)
        if queue is None:
            queue = self._queues[record.line] = OrderedDict()
        queue[record] = None
        if first:
            queue.move_to_end(record, last=False)
        self.count += 1

    def next(self) -> Record | None:
        """The oldest one whose model may have a place; it stays here."""
        oldest = None
        for model, queue in self._queues.items():
            record = next(iter(queue))
            if self._may_have_place(model) and (oldest is None or record.number < oldest.number):
                oldest = record
        return oldest

    def remove(self, record: Record) -> bool:
        """Take a record out; whether it was here."""
        queue = self._queues.get(record.line)
        if queue is None or record not in queue:
            return False
        del queue[record]
        if not queue:
            del self._queues[record.line]
        self.count -= 1
        return True

    def take_all(self) -> list[Record]:
        """Take out all of them, in the order they were pulled."""
        records = sorted(
            (record for queue in self._queues.values() for record in queue), key=lambda record: record.number
        )
        self._queues.clear()
        self.count = 0
        return records

    def of(self, model: str) -> int:
        """How many wait for this model."""
        return len(self._queues.get(model, ()))

    def __iter__(self) -> Iterator[Record]:
        return (record for queue in self._queues.values() for record in queue)
