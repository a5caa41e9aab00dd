"""What each verb does to a row and to the credits of its job. Pure: the same for every kind of ledger.

A function here changes the row and the account that it is given, or raises `IllegalMove` and changes nothing. The
account is always the sum of what its rows hold: only `_reserve`, `_add_extra`, `ended` and `take_back` move credits.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from evolink_async.http.retry import UNPROVEN_REPLAYS
from evolink_async.ledger.states import (
    ACCEPTED,
    CANCELLED,
    COMPLETED,
    ENTERED,
    FAILED,
    REJECTED,
    REPLAYING,
    SENDING,
    UNSETTLED,
    State,
    Verb,
    after,
)
from evolink_async.ledger.values import (
    KEY_DIGITS,
    NOTHING_YET,
    Account,
    Fate,
    PastTry,
    Refusal,
    Row,
    StoredRow,
    as_text,
    changed,
    restore,
    shared,
    to_credits,
)
from evolink_async.types import Task

ON_ITS_WAY = frozenset({SENDING, UNSETTLED, REPLAYING, ACCEPTED})
_INTEND, _ACCEPTED, _ENDED = Verb.INTEND, Verb.ACCEPTED, Verb.ENDED  # every task goes through these
CONFLICT = "idempotency_conflict"  # vendor's client: a task exists for this key, made from another body


def intend(
    row: Row,
    account: Account,
    *,
    idempotency_key: str,
    key_number: int | None,
    fingerprint: str,
    price: str | None,
    told: int | None,
    at: datetime,
) -> Refusal | None:
    """Reserve the credits and let a POST be made. key_number: None unless it is a `numbered_key`."""
    state = after(row.state, _INTEND, of=row)
    refusal, reservation = _afford(row, account, price, told)
    if refusal is not None:
        return refusal
    if row.task_id is not None:
        row.fate = Fate(number=row.number + 1, past=(*row.past, _as_past(row)))
        row.reserved = row.task_id = None  # the past try holds it
    elif row.fate is not NOTHING_YET:
        row.fate = _nothing_yet(row)
    row.state = state
    row.attempts += 1
    prefix, common = "", row.common
    if key_number is None:
        row._sent_key = idempotency_key
    else:
        row._sent_key, prefix = key_number, idempotency_key[:-KEY_DIGITS]
    row.common = shared(common.endpoint, common.model, price, fingerprint, prefix)
    row._submitted = at.timestamp()
    if reservation is not None:  # else nobody knows, and there is no cap
        _reserve(row, account, reservation)
    return None


def _afford(row: Row, account: Account, price: str | None, told: int | None) -> tuple[Refusal | None, int | None]:
    """What a POST must reserve, None where nobody knows and there is no cap; or why the credits do not suffice."""
    known = account.price_of(price) if told is None else max(told, account.used.get(price or "", 0))
    if known is not None and account.probe is not None and price is not None and account.probe_price == price:
        price_probe(account, known)
    if account.cap is None:
        return None, known
    free = account.cap - account.spent - account.reserved
    if known is None and (account.probe is not None or free <= 0 or price is None):
        return Refusal(None, to_credits(free), to_credits(account.cap), account.probe), None
    if known is not None and known > free:
        return Refusal(to_credits(known), to_credits(free), to_credits(account.cap), account.probe), None
    if known is not None:
        return None, known
    account.probe, account.probe_price = row, price
    return None, free


def price_probe(account: Account, price: int) -> None:
    """The price that a request tries has become known otherwise: it holds only that."""
    row = account.probe
    assert row is not None
    if row.state is COMPLETED:
        row.fate = row.fate._replace(spent=price)
        account.spent += price
        price = 0
    _reserve(row, account, price)
    _leave_probe(account)


def _as_past(row: Row) -> PastTry:
    return PastTry(
        number=row.number,
        state=row.state,
        replayed=row.replayed,
        task_id=row.task_id,
        idempotency_key=row.idempotency_key,
        reserved=row.reserved,
        spent=row.spent,
        submitted_at=row.submitted_at,
        ended_at=row.ended_at,
        error_code=row.error_code,
        error=row.error,
    )


def _nothing_yet(row: Row) -> Fate:
    """The fate of the present try as it was when that began."""
    number, past = row.number, row.past
    return Fate(number=number, past=past) if number > 1 or past else NOTHING_YET


def take_back(row: StoredRow, account: Account, before: tuple[object, ...]) -> None:
    """An intent that could not be written has not happened. before: of `saved_state`."""
    reserved, spent = row.holds
    restore(row, before)
    reserved_before, spent_before = row.holds
    account.reserved += reserved_before - reserved
    account.spent += spent_before - spent
    if account.probe is row:
        _leave_probe(account)


def replay(row: Row, account: Account, *, price: str | None, told: int | None) -> Refusal | bool:
    """Let the same POST be made once more; False: it may not be.

    Where there is a cap, one that has nothing reserved has to fit like a fresh one: it was sent when there was no cap,
    and nobody knew its price.

    A lost response is sent again once, and at most three of a job before the service has proven that it honours keys.
    Where the service itself said that it still works on the request (no loss), asking again is not counted.
    """
    if row.task_id is not None:
        return False  # settled meanwhile
    state = after(row.state, Verb.REPLAY, of=row)
    if row.losses > 1 or row.error_code == CONFLICT:
        return False
    counted = row.losses > 0 and not row.replayed
    unproven = counted and not account.keys_honoured
    if unproven and account.replays >= UNPROVEN_REPLAYS:
        return False
    if account.cap is not None and row.reserved is None:
        refusal, reservation = _afford(row, account, price, told)
        if refusal is not None:
            return refusal
        row.common = changed(row.common, price=price)
        _reserve(row, account, reservation)
    if counted:
        account.replays += unproven
        row.fate = row.fate._replace(replayed=True)
    row.state = state
    row.attempts += 1
    return True


def posted_in_vain(row: Row, account: Account, *, sent: bool) -> None:
    """Nothing can have come of the POST. sent: whether it was written at all."""
    before, row.state = row.state, after(row.state, Verb.POSTED_IN_VAIN, of=row)
    if row.state is before:
        return
    if not sent:
        row.attempts -= 1
        if row.replayed and before is REPLAYING:
            row.fate = row.fate._replace(replayed=False)
            if not account.keys_honoured:
                account.replays -= 1
    if row.state is ENTERED:
        row._submitted = None
        _release(row, account)


def rejected(row: Row, account: Account, code: str | None, error: str) -> None:
    """The request was refused, by the service or before it was sent."""
    before, row.state = row.state, after(row.state, Verb.REJECTED, of=row)
    if row.state is before:
        return
    row.fate = row.fate._replace(error_code=code, error=error)
    if row.state is REJECTED:
        row.drop_body()
        _release(row, account)
    else:
        row.fate = row.fate._replace(losses=row.losses + 1)


def unsettled(row: Row, code: str | None, error: str, *, lost: bool) -> None:
    """No answer settles the POST. lost: no use in waiting; else the service says that it works on it still."""
    before, row.state = row.state, after(row.state, Verb.UNSETTLED, of=row)
    if row.state is not before or row.state is UNSETTLED:
        row.fate = row.fate._replace(error_code=code, error=error)
    if row.state is not before and lost:
        row.fate = row.fate._replace(losses=row.losses + 1)


def left_sending(row: Row) -> None:
    """The process died while the POST may have been on the wire."""
    row.state = after(row.state, Verb.LEFT_SENDING, of=row)
    error = "the program ended before an answer came"
    row.fate = row.fate._replace(error_code=None, error=error, losses=row.losses + 1)


def accepted(row: Row, account: Account, task_id: str, reserved: int | None, number: int | None, at: datetime) -> bool:
    """A task exists for the request. number: of the try that made it, None: the present one.

    False: it is a second task for this request, and is kept beside the first.
    """
    told, price = reserved, row.common.price
    if reserved is not None and price is not None:
        reserved = max(reserved, account.used.get(price, 0))
    if number is not None and number < row.number:
        return not _add_extra(row, account, number, task_id, reserved, at)
    state = after(row.state, _ACCEPTED, of=row)
    if row.task_id is None:
        row.task_id = task_id
        if row._submitted is None:
            row._submitted = at.timestamp()
        row.drop_body()
        if row.fate is not NOTHING_YET:
            row.fate = row.fate._replace(error_code=None, error=None)
    elif row.task_id != task_id:
        return not _add_extra(row, account, row.number, task_id, reserved, at)
    row.state = state
    if reserved is not None:
        if told is not None and price is not None:
            account.prices[price] = told
        # That nothing was reserved releases nothing before it is known that this is the price.
        if state is ACCEPTED and (reserved or row.reserved is None or account.price_of(price) is not None):
            _release(row, account, reserved)
    return True


def _add_extra(row: Row, account: Account, number: int, task_id: str, reserved: int | None, at: datetime) -> bool:
    """Keep a task that is not the present try's; False if it is known already."""
    if any(past.task_id == task_id for past in row.past):
        return False
    extra = PastTry(number, ACCEPTED, False, task_id, row.idempotency_key, reserved, None, at, None, None, None)
    mine = [past for past in row.past if past.number == number]
    if mine:
        extra = replace(extra, idempotency_key=mine[0].idempotency_key)
    row.fate = row.fate._replace(past=(*row.past, extra))
    account.reserved += reserved or 0
    return True


def ended(row: Row, account: Account, end: State, task: Task, used: int | None, at: datetime) -> bool:
    """The service says how the task ended. used: what it cost, None: it did not say. False: the end was known."""
    state = after(row.state, _ENDED, end, of=row)
    if state is row.state:
        return False
    row.state = state
    spent = 0 if state is FAILED else None
    if state is COMPLETED:
        price = row.common.price
        if price is not None:
            if used is None and account.prices.get(price) == 0 and account.price_of(price) is None:
                used = 0  # it has told nothing else
            if used is not None:
                _learn_price(price, used, row.reserved, account)
        if used is not None:
            spent = used
        elif account.probe is not row:
            spent = row.reserved
    code = error = None
    if task.error is not None:
        code, error = as_text(task.error.code), as_text(task.error.message)
    fate = row.fate
    row.fate = Fate(fate.losses, fate.replayed, spent, at, code, error, task, (), fate.number, fate.past)
    if spent is not None:
        account.spent += spent
        _release(row, account, 0)
    elif state is not CANCELLED and account.probe is not row:  # it keeps all until somebody tells what it has cost
        _release(row, account)
    return True


def _learn_price(price: str, used: int, reserved: int | None, account: Account) -> None:
    if account.price_of(price) is None or (reserved is not None and used > reserved):
        account.used[price] = max(used, account.used.get(price, 0))


def raise_reservation(row: Row, account: Account) -> bool:
    """A request on its way keeps reserved what one of its class has used. False: it does already."""
    used = account.used.get(row.price or "", 0)
    if row.state not in ON_ITS_WAY or row.reserved is None or row.reserved >= used:
        return False
    _reserve(row, account, used)
    return True


def lost(row: Row, error: str, at: datetime) -> bool:
    """The service no longer knows the task. False: how it ended is known."""
    before, row.state = row.state, after(row.state, Verb.LOST, of=row)
    if row.state is before:
        return False
    row.fate = row.fate._replace(ended_at=at, error_code=None, error=error)
    return True


def not_submitted(row: Row, account: Account) -> None:
    """The user says that no task exists for the request."""
    row.state = after(row.state, Verb.NOT_SUBMITTED, of=row)
    row._submitted = None
    row.drop_body()
    row.fate = _nothing_yet(row)
    _release(row, account)


def given_up(row: Row) -> None:
    """The user says that nobody will find out."""
    row.state = after(row.state, Verb.GIVEN_UP, of=row)


def saved(row: Row, files: tuple[str, ...]) -> None:
    """The results are in these files."""
    row.state = after(row.state, Verb.SAVED, of=row)
    row.fate = row.fate._replace(files=files)


def _reserve(row: Row, account: Account, reserved: int | None) -> None:
    """What the present try may cost."""
    account.reserved += (reserved or 0) - (row.reserved or 0)
    row.reserved = reserved


def _release(row: Row, account: Account, left: int | None = None) -> None:
    """The present try can cost no more than is left. left: 0 where it is known what it has cost."""
    _reserve(row, account, left)
    if account.probe is row:
        _leave_probe(account)


def _leave_probe(account: Account) -> None:
    account.probe = account.probe_price = None
