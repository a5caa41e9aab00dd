"""One direction of a connection: what came in, and what may get through when. Pure: the time is passed in, in seconds.

Each toxic in force has an `Effect` on it. Those that only slow down are asked one after the other, in the order in
which they were added, how late a piece gets through; those that end the connection say when.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from random import Random
from typing import Any, Generic, NamedTuple, TypeVar

from .toxics import Bandwidth, HalfClose, Latency, LimitData, ResetPeer, Slicer, SlowClose, Timeout, Toxic

_T = TypeVar("_T", bound=Toxic)

_ANY = 2**62  # more bytes than anybody has
_AT_ONCE = float("-inf")
_PIECE_SECONDS = 0.02  # what passes in this time is one piece of a limited bandwidth
_LATE = 0.1  # seconds: what is later than this was held up by the receiver, not by a tired timer


class Act(Enum):
    """What happens to a connection."""

    PASS = "pass"  # the next bytes get through
    FINISH = "finish"  # this direction ends in order, the other one goes on
    CLOSE = "close"  # both end in order
    RESET = "reset"  # both are torn down


class Step(NamedTuple):
    """What happens next, not before `at`; `size`: how many bytes get through."""

    at: float
    act: Act
    size: int = 0


class Effect(Generic[_T]):
    """What a toxic does to one direction of one connection: by default nothing."""

    swallows = False  # what comes gets lost
    has_swallowed = False

    def __init__(self, toxic: _T, now: float, random: Random) -> None:
        self._toxic = toxic
        self._began = now
        self._random = random

    def most(self) -> int:
        """The most bytes that get through in one piece."""
        return _ANY

    def due(self, at: float, size: int) -> float:
        """When a piece gets through that without this toxic did at `at`."""
        return at

    def end_due(self, at: float) -> float:
        """The same for the end of the stream."""
        return at

    def passed(self, size: int, now: float, late: float) -> None:
        """A piece got through, later than it might have by `late` seconds."""

    def ending(self, came: float | None) -> Step | None:
        """How this toxic ends the connection. `came`: since when something waits to get through, None: nothing does."""
        return None


class _Latency(Effect[Latency]):
    def __init__(self, toxic: Latency, now: float, random: Random) -> None:
        super().__init__(toxic, now, random)
        self._draw()

    def due(self, at: float, size: int) -> float:
        return at + self._delay

    def passed(self, size: int, now: float, late: float) -> None:
        self._draw()

    def _draw(self) -> None:
        jitter = self._toxic.jitter
        self._delay = max(0.0, self._toxic.latency + self._random.uniform(-jitter, jitter)) / 1000


class _Bandwidth(Effect[Bandwidth]):
    def __init__(self, toxic: Bandwidth, now: float, random: Random) -> None:
        super().__init__(toxic, now, random)
        self._speed = toxic.rate * 1000  # bytes per second
        self._free = self._through = now  # when the line is free again, and when the piece asked about is through

    def most(self) -> int:
        return max(1, int(self._speed * _PIECE_SECONDS))

    def due(self, at: float, size: int) -> float:
        self._through = max(self._free, at) + size / self._speed
        return self._through

    def passed(self, size: int, now: float, late: float) -> None:
        # A line doesn't catch up on what the receiver held up, but it does on what our own timers did.
        self._free = self._through + (late if late > _LATE else 0.0)


class _SlowClose(Effect[SlowClose]):
    def end_due(self, at: float) -> float:
        return at + self._toxic.delay / 1000


class _Timeout(Effect[Timeout]):
    swallows = True

    def ending(self, came: float | None) -> Step | None:
        return Step(self._began + self._toxic.timeout / 1000, Act.CLOSE) if self._toxic.timeout else None


class _ResetPeer(Effect[ResetPeer]):
    def ending(self, came: float | None) -> Step | None:
        if came is not None and not self.swallows:
            self.swallows = True
            self._began = max(self._began, came)
        return Step(self._began + self._toxic.timeout / 1000, Act.RESET) if self.swallows else None


class _Slicer(Effect[Slicer]):
    def __init__(self, toxic: Slicer, now: float, random: Random) -> None:
        super().__init__(toxic, now, random)
        self._ready = now
        self._draw()

    def most(self) -> int:
        return self._size

    def due(self, at: float, size: int) -> float:
        return max(at, self._ready)

    def passed(self, size: int, now: float, late: float) -> None:
        self._ready = now + self._toxic.delay / 1_000_000
        self._draw()

    def _draw(self) -> None:
        variation = self._toxic.size_variation
        self._size = self._toxic.average_size + self._random.randint(-variation, variation)


class _LimitData(Effect[LimitData | HalfClose]):
    def __init__(self, toxic: LimitData | HalfClose, now: float, random: Random) -> None:
        super().__init__(toxic, now, random)
        self._left = toxic.bytes

    def most(self) -> int:
        return self._left

    def passed(self, size: int, now: float, late: float) -> None:
        self._left -= size

    def ending(self, came: float | None) -> Step | None:
        reached = self._left == 0 and (self._toxic.bytes > 0 or came is not None)
        return Step(_AT_ONCE, Act.CLOSE) if reached else None


class _HalfClose(_LimitData):
    def ending(self, came: float | None) -> Step | None:
        return Step(_AT_ONCE, Act.FINISH) if self._left == 0 else None


_EFFECTS: dict[type[Toxic], type[Effect[Any]]] = {
    Latency: _Latency,
    Bandwidth: _Bandwidth,
    SlowClose: _SlowClose,
    Timeout: _Timeout,
    ResetPeer: _ResetPeer,
    Slicer: _Slicer,
    LimitData: _LimitData,
    HalfClose: _HalfClose,
}


class Flow:
    """What is on its way in one direction of a connection."""

    def __init__(self) -> None:
        self.waiting = 0  # bytes that came and did not get through yet
        self.finished = False  # its end got through
        self._pieces: deque[tuple[float, memoryview]] = deque()  # since when each one waits
        self._end: Step | None = None
        self._effects: dict[str, Effect[Any]] = {}

    def add(self, toxic: Toxic, now: float, random: Random) -> None:
        """From now on the toxic befalls what waits and what comes, if its toxicity wants so."""
        if random.random() < toxic.toxicity:
            self._effects[toxic.name] = _EFFECTS[type(toxic)](toxic, now, random)

    def remove(self, name: str) -> bool:
        """The toxic is gone: whether bytes are missing because of it."""
        effect = self._effects.pop(name, None)
        return effect is not None and effect.has_swallowed

    def came(self, data: bytes, now: float) -> None:
        """Bytes came. Once the end got through they are lost, as on a closed socket."""
        if not self.finished:
            self._pieces.append((now, memoryview(data)))
            self.waiting += len(data)

    def ended(self, act: Act, now: float) -> None:
        """The sender ended the stream: `Act.FINISH`, or `Act.RESET`."""
        self._end = Step(now, act)

    def next(self, *, blocked: bool = False) -> Step | None:
        """What happens next; None: nothing before something comes. blocked: the receiver takes no bytes now."""
        if self.finished:
            return None
        effects = self._effects.values()
        came = self._pieces[0][0] if self._pieces else self._end.at if self._end else None
        steps = [step for effect in effects if (step := effect.ending(came)) is not None]
        self._swallow()
        if self._pieces:
            if not blocked:
                steps.append(self._next_piece())
        elif self._end is not None:
            at = self._end.at
            for effect in effects:
                at = effect.end_due(at)
            steps.append(self._end._replace(at=at))
        return min(steps, key=lambda step: step.at, default=None)

    def take(self, step: Step, now: float) -> memoryview:
        """The bytes of a step that is done now."""
        since, piece = self._pieces.popleft()
        if step.size < len(piece):
            self._pieces.appendleft((since, piece[step.size :]))
        self.waiting -= step.size
        for effect in self._effects.values():
            effect.passed(step.size, now, now - step.at)
        return piece[: step.size]

    def finish(self) -> None:
        """The end got through; what comes now is lost."""
        self.finished = True
        self._pieces.clear()
        self.waiting = 0

    def _next_piece(self) -> Step:
        since, piece = self._pieces[0]
        effects = self._effects.values()
        size = min([len(piece), *(effect.most() for effect in effects)])
        at = since
        for effect in effects:
            at = effect.due(at, size)
        return Step(at, Act.PASS, size)

    def _swallow(self) -> None:
        swallowing = [effect for effect in self._effects.values() if effect.swallows]
        if swallowing and self._pieces:
            self._pieces.clear()
            self.waiting = 0
            for effect in swallowing:
                effect.has_swallowed = True
