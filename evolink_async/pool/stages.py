"""Which requests of a pool are in which state, and what room that leaves for more. The states are those of `record`."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator
from typing import TypeVar

from evolink_async.pool.outcome import Outcome
from evolink_async.pool.record import Record, State
from evolink_async.pool.waiting import Waiting

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class Stages:
    """Holds the records of a pool by state, and moves each from where it is to where it is next.

    most: places, so many requests may be sending or outstanding at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._half = max(1, most // 2)
        self.entering: dict[Record, None] = {}
        self.pulled = Waiting(self._may_have_place)  # wait for a place
        self.runs = Waiting(self._may_have_place)  # the same, and somebody awaits them: these go first
        self.sending: dict[Record, None] = {}
        self.unsent: dict[Record, None] = {}  # of `sending` those from sources whose first POST is still to come
        self.outstanding: dict[Hashable, Record] = {}  # by the task's id
        self.saving: dict[Record, None] = {}
        self.untaken: deque[Outcome] = deque()
        self._sending_of: Counter[str] = Counter()  # those of `sending`, by line
        self._held = {State.ENTERING: self.entering, State.SENDING: self.sending, State.SAVING: self.saving}

    # Moving

    def enter(self, record: Record) -> None:
        """It was read from its source."""
        self.entering[record] = None

    def pull(self, record: Record, *, first: bool = False) -> None:
        """It waits for a place, behind the others of its line or as the `first`."""
        self._leave(record)
        record.state = State.PULLED
        self.line_of(record).put(record, first=first)

    def send(self, record: Record) -> None:
        """It has a place."""
        self._leave(record)
        record.state = State.SENDING
        self.sending[record] = None
        self._sending_of[record.line] += 1
        if record.waiter is None:
            self.unsent[record] = None

    def posting(self, record: Record) -> None:
        """A POST is about to be made for it: its place can't be given to another any more."""
        _drop(self.unsent, record)

    def hold(self, record: Record, task_id: str) -> None:
        """Its task is at the service."""
        self._leave(record)
        record.state = State.OUTSTANDING
        # The service may give two requests the same task.
        self.outstanding[(task_id, record.index) if task_id in self.outstanding else task_id] = record

    def save(self, record: Record) -> None:
        """Its results are fetched."""
        self._leave(record)
        record.state = State.SAVING
        self.saving[record] = None

    def close(self, record: Record) -> None:
        """How it ended is known."""
        self._leave(record)
        record.state = State.UNTAKEN

    def _leave(self, record: Record) -> None:
        records = self._held.get(record.state)
        if records is not None:
            _drop(records, record)
            if records is self.sending:
                _drop(self.unsent, record)
                self._sending_of[record.line] -= 1
        elif record.state is State.OUTSTANDING:
            task_id = record.task_id
            shared = self.outstanding.get(task_id) is not record
            _drop(self.outstanding, (task_id, record.index) if shared else task_id)
        # If it is pulled or untaken, who moves it has taken it from those that wait for a place, or for the reader.

    # Room

    @property
    def anyone_waits(self) -> bool:
        """Whether a request waits for a place."""
        return bool(self.pulled.count or self.runs.count)

    @property
    def places_held(self) -> int:
        """Requests that are sending or outstanding."""
        return len(self.sending) + len(self.outstanding)

    @property
    def waiting(self) -> int:
        """Requests of which nothing was sent yet."""
        return len(self.entering) + self.pulled.count + self.runs.count + len(self.unsent)

    def has_room(self) -> bool:
        """Whether one more may be pulled."""
        before = len(self.entering) + self.pulled.count
        return self.places_held + before + len(self.saving) + len(self.untaken) < self._most

    def has_place(self) -> bool:
        """Whether one more may be sent."""
        return self.places_held < self._most

    def may_wait(self, line: str) -> bool:
        """Whether one more request of this line may be pulled: half of the places are left to the others."""
        return self._sending_of[line] + self.pulled.of(line) < self._half

    def _may_have_place(self, line: str) -> bool:
        return self._sending_of[line] < self._half

    # Looking

    def line_of(self, record: Record) -> Waiting:
        """Where it waits for a place."""
        return self.pulled if record.waiter is None else self.runs

    def holders(self) -> list[Record]:
        """All that hold a place."""
        return [*self.sending, *self.outstanding.values()]

    def under_way(self) -> Iterator[Record]:
        """All that have no outcome yet."""
        holders = (self.sending, self.outstanding.values(), self.saving)
        for records in (self.entering, self.pulled, self.runs, *holders):
            yield from records


def _drop(records: dict[_K, _V], key: _K) -> None:
    records.pop(key, None)
    if not records:
        records.clear()  # a dict that was large stays so until it is cleared
