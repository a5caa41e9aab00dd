"""Which requests of a pool are in which state, and what room that leaves for more. The states are those of `record`."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

from evolink_async.pool.outcome import Outcome
from evolink_async.pool.record import ENTERING, OUTSTANDING, PULLED, SAVING, SENDING, UNTAKEN, Record, State
from evolink_async.pool.waiting import Line, Waiting


class Stages:
    """Holds the records of a pool, and moves each from the state it is in to the next.

    most: places, so many requests may be sending or outstanding at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._half = max(1, most // 2)
        self.places = 0  # that are held
        self._saving = 0
        self._outstanding: dict[Hashable, Record] = {}  # by the task's id
        self._others: dict[Record, None] = {}  # that have no outcome yet
        self._lines: dict[str, Line] = {}
        self.pulled = Waiting(self._half)  # wait for a place
        self.runs = Waiting(self._half)  # the same, and somebody awaits them: these go first
        self.unsent: dict[Record, None] = {}  # are sending, come from a source, and their first POST is still to come
        self.untaken: deque[Outcome] = deque()

    # Moving

    def enter(self, record: Record, line: str) -> None:
        """It was read from its source. line: what it will wait among, mostly its model."""
        found = self._lines.get(line)
        record.line = self._lines.setdefault(line, Line()) if found is None else found
        self._others[record] = None

    def pull(self, record: Record, *, first: bool = False) -> None:
        """It waits for a place, behind the others of its line or as the `first`."""
        if record.state is not ENTERING:
            self._leave(record)
            self._others[record] = None
        record.state = PULLED
        (self.pulled if record.waiter is None else self.runs).put(record, first=first)

    def send(self, record: Record) -> None:
        """It has a place."""
        record.state = SENDING
        record.line.sending += 1
        self.places += 1
        if record.waiter is None:
            self.unsent[record] = None

    def posting(self, record: Record) -> None:
        """A POST is about to be made for it: its place can't be given to another any more."""
        _drop(self.unsent, record)

    def hold(self, record: Record, task_id: str) -> None:
        """Its task is at the service."""
        self._leave(record)
        record.state = OUTSTANDING
        self.places += 1
        # The service may give two requests the same task.
        self._outstanding[record if task_id in self._outstanding else task_id] = record

    def save(self, record: Record) -> None:
        """Its results are fetched."""
        self._leave(record)
        self._saving += 1
        record.state = SAVING
        self._others[record] = None

    def close(self, record: Record) -> None:
        """How it ended is known."""
        self._leave(record)
        record.state = UNTAKEN

    def _leave(self, record: Record) -> None:
        """Give up what it has in the state that it leaves. If it waited for a place, who moves it has taken it out."""
        if record.state is OUTSTANDING:
            self.places -= 1
            task_id = record.task_id
            _drop(self._outstanding, task_id if self._outstanding.get(task_id) is record else record)
            return
        if record.state is SENDING:
            self.places -= 1
            record.line.sending -= 1
            if record in self.unsent:
                _drop(self.unsent, record)
        elif record.state is SAVING:
            self._saving -= 1
        _drop(self._others, record)

    # Room

    @property
    def waiting(self) -> int:
        """Requests of which nothing was sent yet."""
        return len(self) - self._saving - self.places + len(self.unsent)

    def has_room(self) -> bool:
        """Whether one more may be pulled."""
        under_way = len(self._others) + len(self._outstanding)
        return under_way - self.runs.count + len(self.untaken) < self._most

    def has_place(self) -> bool:
        """Whether one more may be sent."""
        return self.places < self._most

    def may_wait(self, line: Line) -> bool:
        """Whether one more request of this line may be pulled: half of the places are left to the others."""
        return line.sending + self.pulled.of(line) < self._half

    # Looking

    def __iter__(self) -> Iterator[Record]:
        """All that have no outcome yet."""
        return itertools.chain(self._others, self._outstanding.values())

    def __len__(self) -> int:
        return len(self._others) + len(self._outstanding)

    def __contains__(self, task_id: str) -> bool:
        """Whether a task of this id is outstanding."""
        return task_id in self._outstanding

    def these(self, *states: State) -> list[Record]:
        """All that are in these states."""
        return [record for record in self if record.state in states]


def _drop(records: dict[Any, Any], key: Hashable) -> None:
    records.pop(key, None)
    if not records:
        records.clear()  # a dict that was large stays so until it is cleared
