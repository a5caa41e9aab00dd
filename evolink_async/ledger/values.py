"""What a ledger holds: requests, their former tries, and the credits of a job. Plain values."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from evolink_async.errors import BudgetExceededError, InvalidRequestError
from evolink_async.ledger.states import ENTERED, REJECTED, State
from evolink_async.types import Task

MICRO = 1_000_000  # a ledger counts in millionths of a credit
LONGEST_LEARNED = 256_000  # bytes of what a job remembers for its next run
KEY_DIGITS = 8  # of the number at the end of a `numbered_key`
_MOST = 10**9  # credits; no request costs that much, and sums of it still fit into 64 bits


# The same few prices come again and again, and each request keeps one.
@lru_cache(maxsize=1024)
def to_micro(credits: Decimal) -> int:
    """Micro-credits, rounded up; an absurd amount is brought to the nearest sensible one."""
    return int((max(Decimal(0), min(credits, Decimal(_MOST))) * MICRO).to_integral_value(ROUND_CEILING))


@lru_cache(maxsize=1024)
def to_credits(micro: int) -> Decimal:
    """Credits, exactly."""
    return Decimal(micro) / MICRO


def told_micro(credits: Decimal | None) -> int | None:
    """Micro-credits that the service has told; a negative amount tells nothing."""
    return None if credits is None or credits < 0 else to_micro(credits)


def known_price(reserved: int | None, used: int | None) -> int | None:
    """The price of a class, of what was last reserved and what was used above that.

    That nothing was reserved is no price until a task has ended and shown what it used.
    """
    return max(reserved or 0, used) if used is not None else reserved or None


@dataclass(slots=True)
class Entry:
    """A request as it is looked up, and entered if it is new.

    key: the caller's name for it, None: it goes by its content. content: of the hash over endpoint and canonical body.
    Raises `InvalidRequestError` for a key that is no text.
    """

    key: str | None
    content: bytes
    endpoint: str
    model: str

    def __post_init__(self) -> None:
        if self.model.isascii() and (self.key is None or self.key.isascii()):
            return
        for name, value in (("key", self.key or ""), ("model", self.model)):
            if not is_text(value):
                message = f"{name}: holds half of a surrogate pair, which is no text; decode it anew"
                raise InvalidRequestError(message, param=name)


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def as_text(value: str) -> str:
    """The string with what is no text written out."""
    return value if is_text(value) else value.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class PastTry:
    """A former try of a request, or a second task that was made for one try (then `state` is accepted).

    number: of the try, from 1. replayed: it was sent twice. reserved, spent: micro-credits that it still holds, or has
    cost.
    """

    number: int
    state: State
    replayed: bool
    task_id: str | None
    idempotency_key: str | None
    reserved: int | None
    spent: int | None
    submitted_at: datetime | None
    ended_at: datetime | None
    error_code: str | None
    error: str | None


class Fate(NamedTuple):
    """What has become of a request: of its present try nothing, as long as that goes well and has not ended.

    losses: POSTs of this try without an answer that settles them; none while it is unsettled: the service itself said
    that it works on it. replayed: one of them was sent again. spent: micro-credits, None if nobody has told.
    error_code, error: of the last answer that was no task. task: as the service told of it when it had ended. files:
    paths that were saved. number: of the present try, from 1. past: what is known of former ones.
    """

    losses: int = 0
    replayed: bool = False
    spent: int | None = None
    ended_at: datetime | None = None
    error_code: str | None = None
    error: str | None = None
    task: Task | None = None
    files: tuple[str, ...] = ()
    number: int = 1
    past: tuple[PastTry, ...] = ()


NOTHING_YET = Fate()  # shared, as it is that of nearly every request on its way


class Common(NamedTuple):
    """What a request has in common with many others. Made by `shared`, it is the same object for all of them.

    price: the class of those that cost the same. fingerprint: of the API key. key_prefix: of a `numbered_key`.
    """

    endpoint: str
    model: str
    price: str | None = None
    fingerprint: str | None = None
    key_prefix: str = ""


shared = lru_cache(maxsize=1024)(Common)


def changed(common: Common, **values: Any) -> Common:
    """The same but for some values, and again the same object for all rows alike."""
    return shared(*common._replace(**values))


def numbered_key(prefix: str, number: int) -> str:
    """An idempotency key that a row need not keep whole: many have its prefix, and its number is kept elsewhere too."""
    return f"{prefix}{number:0{KEY_DIGITS}x}"


def counted_identity(content: bytes, count: int) -> str:
    """The name of a request without a key. count: how many of the same content came before it in its run."""
    return f"{content.hex()}-{count}"


def split_identity(identity: str) -> tuple[bytes, int]:
    """The two of `counted_identity`. Raises `ValueError` for another name."""
    digits, _, count = identity.rpartition("-")
    return bytes.fromhex(digits), int(count)


class Row:
    """A request in a ledger. It is live: what it says is what is true now. Yours to read, the ledger's to change.

    content: of the hash over endpoint and canonical body. attempts: POSTs sent, over all tries. reserved: micro-credits
    of this try, None if nobody has told. fate: what has become of it; its parts are the row's.

    A pool may have many of them outstanding, so it holds little of its own.
    """

    __slots__ = (
        *("_name", "_sent_key", "_submitted", "attempts", "common", "content", "fate", "reserved", "state", "task_id"),
    )

    def __init__(self, name: str | int, content: bytes, common: Common, state: State = ENTERED) -> None:
        self._name = name  # the caller's key, else how many of the same content came before
        self.content = content
        self.common = common
        self.state = state
        self.attempts = 0
        self._sent_key: str | int | None = None  # the number of a `numbered_key`
        self._submitted: float | None = None  # seconds since 1970
        self.task_id: str | None = None
        self.reserved: int | None = None
        self.fate = NOTHING_YET

    @property
    def keyed(self) -> bool:
        """Whether the caller has given it a name."""
        return isinstance(self._name, str)

    @property
    def key(self) -> str | None:
        """The caller's name for it, None if it goes by its content."""
        return self._name if isinstance(self._name, str) else None

    @property
    def identity(self) -> str:
        """Its name, unique in the job."""
        name = self._name
        return name if isinstance(name, str) else counted_identity(self.content, name)

    @property
    def endpoint(self) -> str:
        return self.common.endpoint

    @property
    def model(self) -> str:
        return self.common.model

    @property
    def price(self) -> str | None:
        """The class of requests that cost the same, once it is known."""
        return self.common.price

    @property
    def fingerprint(self) -> str | None:
        """Of the API key of the last POST."""
        return self.common.fingerprint

    @property
    def idempotency_key(self) -> str | None:
        """Of the last POST."""
        key = self._sent_key
        return numbered_key(self.common.key_prefix, key) if isinstance(key, int) else key

    @property
    def submitted_at(self) -> datetime | None:
        """When this try's first POST was sent that was not provably in vain."""
        return None if self._submitted is None else datetime.fromtimestamp(self._submitted, UTC)

    @property
    def number(self) -> int:
        """Of the present try, from 1."""
        return self.fate.number

    @property
    def past(self) -> tuple[PastTry, ...]:
        """What is known of former tries."""
        return self.fate.past

    @property
    def body(self) -> bytes | None:
        """The exact bytes of the last POST, while a store keeps them: as long as it may be sent again."""
        return None

    def drop_body(self) -> None:
        """It is not sent again as it was."""

    @property
    def losses(self) -> int:
        return self.fate.losses

    @property
    def replayed(self) -> bool:
        return self.fate.replayed

    @property
    def spent(self) -> int | None:
        return self.fate.spent

    @property
    def ended_at(self) -> datetime | None:
        return self.fate.ended_at

    @property
    def error_code(self) -> str | None:
        return self.fate.error_code

    @property
    def error(self) -> str | None:
        return self.fate.error

    @property
    def task(self) -> Task | None:
        return self.fate.task

    @property
    def files(self) -> tuple[str, ...]:
        return self.fate.files

    @property
    def credits(self) -> Decimal | None:
        """Spent or still reserved, over all tries; None if nobody has told, of one that may have cost something."""
        if self.reserved is None and self.fate.spent is None:
            unsent = self.state in (ENTERED, REJECTED)
            if not unsent or all(past.reserved is None and past.spent is None for past in self.past):
                return None
        reserved, spent = self.holds
        return to_credits(reserved + spent)

    @property
    def holds(self) -> tuple[int, int]:
        """Micro-credits reserved and spent, over all tries."""
        fate = self.fate
        reserved, spent = self.reserved or 0, fate.spent or 0
        for past in fate.past:
            reserved += past.reserved or 0
            spent += past.spent or 0
        return reserved, spent

    @property
    def paid_for(self) -> bool:
        """Whether a task exists or may exist for it, in any try."""
        return self.state not in (ENTERED, REJECTED) or bool(self.past)

    def __repr__(self) -> str:
        return f"<Row {self.identity!r} {self.state}{f' {self.task_id}' if self.task_id else ''}>"


class StoredRow(Row):
    """A request in a ledger that is kept.

    id: by which the store knows it. seen: the number of the last run that pulled it.
    """

    __slots__ = ("__weakref__", "_past_written", "_version", "body", "id", "seen")

    def __init__(
        self, id: int, name: str | int, content: bytes, common: Common, state: State = ENTERED, seen: int = 0
    ) -> None:
        super().__init__(name, content, common, state)
        self.id = id
        self.seen = seen
        self.body: bytes | None = None
        self._version = 0  # raised with every verb whose change is to be written
        self._past_written = 0

    def drop_body(self) -> None:
        """It is not sent again as it was."""
        self.body = None


_WRITTEN = operator.attrgetter(
    *("id", "identity", "keyed", "content", "endpoint", "model", "state", "seen", "number", "attempts"),
    *("fate.losses", "fate.replayed", "idempotency_key", "fingerprint", "task_id", "reserved", "fate.spent"),
    *("submitted_at", "fate.ended_at", "fate.error_code", "fate.error", "past"),
)


def written(row: StoredRow) -> tuple[Any, ...]:
    """What is stored of a row in one piece: all but its body, result and past tries, which change seldom."""
    values: tuple[Any, ...] = _WRITTEN(row)
    return values


_CHANGING = tuple(name for name in (*Row.__slots__, "seen", "body") if name != "_name")
_CHANGING_VALUES = operator.attrgetter(*_CHANGING)


def saved_state(row: StoredRow) -> tuple[object, ...]:
    """What `restore` needs to undo all later changes."""
    values: tuple[object, ...] = _CHANGING_VALUES(row)
    return values


def restore(row: StoredRow, state: tuple[object, ...]) -> None:
    """Make a row what it was."""
    for name, value in zip(_CHANGING, state, strict=True):
        setattr(row, name, value)


@dataclass(slots=True)
class Account:
    """The credits of a job, over all of its runs, in micro-credits; and what it has learned.

    cap: never more than that is spent and reserved, None: no bound. prices: by price class, the last that the service
    has reserved. used: the most that a request of the class has used, where that was more than was reserved for it, or
    the service had reserved nothing. probe: the request that tries an unknown price, and has all reserved that was
    left; probe_price: the class it tries. replays: lost responses that were sent again while it was not proven that the
    service honours keys.
    """

    cap: int | None = None
    reserved: int = 0
    spent: int = 0
    prices: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    probe: Row | None = None
    probe_price: str | None = None
    replays: int = 0
    keys_honoured: bool = False

    @property
    def free(self) -> int | None:
        """What may still be reserved; None: any amount."""
        return None if self.cap is None else self.cap - self.spent - self.reserved

    def price_of(self, price: str | None) -> int | None:
        """What a request of this class is taken to cost; None: that is not known."""
        return None if price is None else known_price(self.prices.get(price), self.used.get(price))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no intent was made: the credits do not suffice. Nothing may be sent.

    price: of the request, None if it is not known. free: what is left of the cap. probe: the request whose price is
    being found out and for which all the rest is reserved; once it is settled there may be enough.
    """

    price: Decimal | None
    free: Decimal
    cap: Decimal
    probe: Row | None

    def error(self) -> BudgetExceededError:
        """The error that says it."""
        cost = "at a price that is not known yet" if self.price is None else f"which may cost {self.price:f} credits"
        left = max(self.free, Decimal(0))  # a price that was tried may have been more than there was
        text = f"the next request, {cost}, was not sent: {left:f} of max_credits={self.cap:f} are left"
        if self.probe is not None:
            settle = "settle it, or " if self.probe.task_id is None else ""
            text += (
                f", since the rest is reserved for the request {self.probe.identity!r}, whose price is not known and "
                f"which is {self.probe.state}: {settle}tell the price with prices=..."
            )
        elif self.price is None:
            text += "; a service that tells no prices leaves them to you: prices=..."
        return BudgetExceededError(f"{text}; what is reserved may come back when tasks end, or raise max_credits")
