"""What a pool does with a request, after what a ledger knows of it. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from evolink_async.errors import TRANSIENT_FAILURES
from evolink_async.ledger import states
from evolink_async.ledger.rules import CONFLICT
from evolink_async.ledger.values import Row


class Todo(StrEnum):
    """What to do with a request that was pulled."""

    SUBMIT = "submit"  # nothing is known that could be paid twice, or a new try is wanted
    SETTLE = "settle"  # sent without an answer: by the rules for a lost response
    HOLD = "hold"  # the same, and it must not be sent again: its outcome is `unknown`
    FOLLOW = "follow"  # its task exists: poll on
    DELIVER = "deliver"  # it has ended: its outcome comes from the ledger
    SHARE = "share"  # this run has pulled the same request before: it gets that one's outcome
    REFUSE = "refuse"  # its key has another body


SUBMIT, SETTLE, HOLD, FOLLOW, DELIVER, SHARE, REFUSE = Todo


class Entered(NamedTuple):
    """A request as the ledger knows it. repeated: this run has pulled it before. changed: its key has another body."""

    row: Row
    repeated: bool = False
    changed: bool = False


def what_to_do(entered: Entered, *, retry_failed: int = 0) -> Todo:
    """The table "running it again" of the design."""
    row = entered.row
    if entered.changed:
        return REFUSE
    if entered.repeated:
        return SHARE
    match row.state:
        case states.ENTERED | states.REJECTED:
            return SUBMIT
        case states.SENDING | states.UNSETTLED | states.REPLAYING:
            return HOLD if row.losses > 1 or row.error_code == CONFLICT else SETTLE
        case states.GIVEN_UP:
            return HOLD
        case states.ACCEPTED:
            return FOLLOW
        case states.FAILED:
            return SUBMIT if may_try_again(row, retry_failed) else DELIVER
        case _:  # completed, cancelled, lost
            return DELIVER


def may_try_again(row: Row, retry_failed: int) -> bool:
    """Whether a failed request may be generated, and paid for, once more: a passing failure, and tries are left."""
    return row.state is states.FAILED and row.error_code in TRANSIENT_FAILURES and row.number <= retry_failed
