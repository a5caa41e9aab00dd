"""The states of a request in a ledger, and the only moves between them. Pure.

    state       what is certain
    entered     nothing was sent of which anything could have come
    sending     a POST may be on the wire: this is durable before its first byte
    unsettled   a POST was sent, and no answer settles whether a task exists
    replaying   the same POST may be on the wire once more, with the same key and the same bytes
    accepted    a task exists, and its id is known
    completed, failed, cancelled    so says the service
    lost        the service no longer knows the id; it may still be charged
    rejected    refused, by us or by the service; not charged
    given_up    nobody will settle it any more; it may still be charged

Rules:

1. `enter`, `intend` and `replay` are asked for. When they are refused or cannot be written, nothing has happened, and
   nothing may be sent.
2. All other moves tell what has happened. They are never refused for coming late or twice: what can no longer change
   anything leaves the state as it is.
3. Nothing but an id, or the user's own word, settles a request that may have been accepted. What would reject a fresh
   one, or send it back, leaves such a one unsettled.
4. Once an id is known only the end of that task moves the request on. A second id for it is a task paid twice: it is
   kept beside the first.
5. The service's first word on an end is final. `lost` is not its word but our conclusion, so an end may still follow.
6. A failed request may be generated again: a new try with a key of its own. The former try stays on record.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from evolink_async.errors import LedgerError

__all__ = ["ENDS", "MOVES", "IllegalMove", "Move", "State", "Verb", "after", "diagram", "table"]


class State(StrEnum):
    """What is certain about a request."""

    ENTERED = "entered"
    SENDING = "sending"
    UNSETTLED = "unsettled"
    REPLAYING = "replaying"
    ACCEPTED = "accepted"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    REJECTED = "rejected"
    GIVEN_UP = "given_up"


class Verb(StrEnum):
    """What is asked of a ledger, or told to it."""

    ENTER = "enter"
    INTEND = "intend"
    REPLAY = "replay"
    POSTED_IN_VAIN = "posted_in_vain"
    REJECTED = "rejected"
    UNSETTLED = "unsettled"
    LEFT_SENDING = "left_sending"
    ACCEPTED = "accepted"
    ENDED = "ended"
    LOST = "lost"
    SAVED = "saved"
    NOT_SUBMITTED = "not_submitted"
    GIVEN_UP = "given_up"


V = Verb

# A name of a module costs a tenth of what `State.ENTERED` does (until Python 3.12), and each task asks for many.
ENTERED, SENDING, UNSETTLED, REPLAYING, ACCEPTED, COMPLETED, FAILED, CANCELLED, LOST, REJECTED, GIVEN_UP = State

_NO_TASK = (ENTERED, SENDING, UNSETTLED, REPLAYING, REJECTED, GIVEN_UP)
_TASK = (ACCEPTED, COMPLETED, FAILED, CANCELLED, LOST)
ENDS: dict[str, State] = {end.value: end for end in (COMPLETED, FAILED, CANCELLED)}  # by the status of a task


@dataclass(frozen=True, slots=True)
class Move:
    """One legal move. sources: None is "not in the ledger yet". target: None is "the state stays"."""

    verb: Verb
    sources: tuple[State | None, ...]
    target: State | None
    by: str = ""
    when: str = ""
    money: str = ""


MOVES = (
    Move(V.ENTER, (None,), ENTERED, "pool", "it was pulled from its source"),
    Move(V.INTEND, (ENTERED, REJECTED, FAILED), SENDING, "pool", "before the first byte of a POST", "reserved"),
    Move(V.POSTED_IN_VAIN, (SENDING,), ENTERED, "pool", "no byte was written, 429, or no access", "released"),
    Move(V.POSTED_IN_VAIN, (REPLAYING,), UNSETTLED, "pool", "no byte was written, or 429", "kept"),
    Move(V.REJECTED, (ENTERED, SENDING), REJECTED, "pool", "it was refused", "released"),
    Move(V.REJECTED, (REPLAYING,), UNSETTLED, "pool", "it was refused, but not the first POST", "kept"),
    Move(V.UNSETTLED, (SENDING, REPLAYING), UNSETTLED, "pool", "no answer settles it", "kept"),
    Move(V.LEFT_SENDING, (SENDING, REPLAYING), UNSETTLED, "next run", "the process died", "kept"),
    Move(V.REPLAY, (UNSETTLED,), REPLAYING, "pool", "before the same POST is sent again", "kept"),
    Move(V.ACCEPTED, _NO_TASK, ACCEPTED, "pool, callback, user", "an id is known", "the service's own figure"),
    Move(V.ENDED, (ACCEPTED, LOST), COMPLETED, "pool", "the service says so", "spent: what was used"),
    Move(V.ENDED, (ACCEPTED, LOST), FAILED, "pool", "the service says so", "released"),
    Move(V.ENDED, (ACCEPTED, LOST), CANCELLED, "pool", "the service says so", "kept"),
    Move(V.LOST, (ACCEPTED,), LOST, "pool", "the id is no longer known", "kept"),
    Move(V.SAVED, (COMPLETED,), COMPLETED, "pool", "its files are saved"),
    Move(V.NOT_SUBMITTED, (UNSETTLED, GIVEN_UP), ENTERED, "user", "no task exists for it", "released"),
    Move(V.GIVEN_UP, (UNSETTLED,), GIVEN_UP, "user", "it cannot be found out", "kept"),
    # Late, or told twice.
    Move(V.POSTED_IN_VAIN, (ENTERED, UNSETTLED, GIVEN_UP, *_TASK), None),
    Move(V.REJECTED, (REJECTED, UNSETTLED, GIVEN_UP, *_TASK), None),
    Move(V.UNSETTLED, (UNSETTLED, GIVEN_UP, *_TASK), None),
    Move(V.ACCEPTED, _TASK, None),
    Move(V.ENDED, (*ENDS.values(),), None),
    Move(V.LOST, (LOST, *ENDS.values()), None),
)  # fmt: skip

_NEXT: dict[tuple[State | None, Verb, State | None], State] = {}
for _move in MOVES:
    for _source in _move.sources:
        _target = _move.target or _source
        assert _target is not None
        _told: tuple[State | None, ...] = (None,)
        if _move.verb is V.ENDED:  # it comes with an end, which matters only to the first
            _told = (*ENDS.values(),) if _move.target is None else (_target,)
        for _end in _told:
            _NEXT[_source, _move.verb, _end] = _target


class Named(Protocol):
    """A request, as far as an error names it."""

    @property
    def identity(self) -> str: ...


class IllegalMove(LedgerError):
    """A move that is not in the table: a fault of whoever makes it."""


def after(state: State | None, verb: Verb, end: State | None = None, *, of: Named | None = None) -> State:
    """The state that `verb` leads to. `end`: which end, for the verb with several. `of`: whose it is.

    Raises `IllegalMove`.
    """
    try:
        return _NEXT[state, verb, end]
    except KeyError:
        whose = "" if of is None else f"request {of.identity!r}: "
        what = f"{verb} ({end})" if end else verb
        message = f"{whose}{what} is no move for a request that is {state or 'not in the ledger'}"
        raise IllegalMove(message) from None


def diagram() -> str:
    """The moves as a mermaid state diagram; those that change nothing are left out."""
    arrows: dict[tuple[str, State], list[str]] = {}
    for move in MOVES:
        for source in move.sources:
            if move.target is not None and move.target is not source:
                arrows.setdefault((source or "[*]", move.target), []).append(move.verb)
    lines = [f"    {source} --> {target}: {', '.join(verbs)}\n" for (source, target), verbs in arrows.items()]
    return "stateDiagram-v2\n" + "".join(lines)


def table() -> str:
    """The same moves as a markdown table."""
    lines = ["| verb | from | to | told by | when | credits |", "|---|---|---|---|---|---|"]
    for move in MOVES:
        if move.target is not None:
            sources = ", ".join(source or "(new)" for source in move.sources)
            cells = (f"`{move.verb}`", sources, move.target, move.by, move.when, move.money)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
