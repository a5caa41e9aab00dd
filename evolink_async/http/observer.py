"""Where telemetry looks into a client: one place, told synchronously what happens, and nothing while nobody looks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from evolink_async.errors import EvoLinkError
    from evolink_async.http.answers import Answer, Judgement
    from evolink_async.requests import GenerationRequest
    from evolink_async.types import Task, TaskReading


class Submission(Protocol):
    """What is told of a paid request on its way. party: who gave it."""

    @property
    def request(self) -> GenerationRequest: ...
    @property
    def party(self) -> Hashable: ...


class End(Protocol):
    """What is told of its end: its task, or how else it ended, and why."""

    @property
    def ending(self) -> str: ...
    @property
    def task(self) -> TaskReading | None: ...
    @property
    def error(self) -> EvoLinkError | None: ...


class Observer:
    """What happens in a client. Every method returns at once and raises nothing."""

    def pool_entered(self, party: Hashable) -> None:
        """The block of a pool was entered, whose submissions name this party."""

    def queued(self, submission: Submission) -> None:
        """A submission waits for its turn, for the first time or again."""

    def begun(self, submission: Submission) -> None:
        """It is its turn: it is posted now."""

    def answered(self, submission: Submission, judgement: Judgement) -> None:
        """What became of one POST."""

    def settled(self, submission: Submission, end: End) -> None:
        """The end of a submission. One that was accepted is followed now, or `left`."""

    def cooled(self, model: str, seconds: float) -> None:
        """This model is not asked for so long."""

    def followed(self, task: TaskReading) -> None:
        """A task is watched from now on."""

    def looked(self, task_ids: Sequence[str], answer: Answer | EvoLinkError) -> None:
        """One status request, for these tasks, and what came of it."""

    def seen(self, reading: TaskReading) -> None:
        """A look that found a task running."""

    def ended(self, task: Task) -> None:
        """The first terminal status of a watched task."""

    def lost(self, task_id: str, error: EvoLinkError) -> None:
        """A task is watched no more: the service doesn't know it, or lets nobody look."""

    def left(self, task_id: str) -> None:
        """Nobody watches the task any more, which goes on."""

    def downloaded(self, size: int) -> None:
        """A result of so many bytes was fetched."""

    def close(self) -> None:
        """Nothing more is told."""


class Observation:
    """Holds the observer of a client, if there is one; it outlives a loop."""

    __slots__ = ("observer",)

    def __init__(self) -> None:
        self.observer: Observer | None = None

    def __repr__(self) -> str:
        return f"<Observation {self.observer!r}>"
