"""What a row holds, and what it makes when it is read."""

from __future__ import annotations

import gc
import random
import tracemalloc
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from ledger_world import (
    ENDPOINT,
    MODEL,
    PRINT,
    accept,
    ask,
    at,
    content,
    end_of,
    enter_all,
    entered,
    entry,
    intend,
    new_task,
    opened,
)

from evolink_async.ledger import Entry, State, counts
from evolink_async.ledger.counts import Counts
from evolink_async.ledger.values import counted_identity, numbered_key, split_identity

PREFIX = "ea-0123456789abcdef01234567"


@pytest.mark.parametrize("named", [True, False], ids=["keys", "no keys"])
async def test_a_ledger_in_memory_keeps_little_of_a_request_on_its_way(named: bool) -> None:
    """Beyond what others keep: the key that the caller gave, the number of the request, the id of its task."""
    count = 10_000
    numbers = list(range(count))
    names = [f"k{number}" if named else None for number in numbers]
    ids = [f"task-{number}" for number in numbers]
    rows = [None] * count
    async with opened(None) as job:
        gc.collect()
        tracemalloc.start()
        try:
            for number in numbers:
                found = Entry(names[number], number.to_bytes(8), ENDPOINT, MODEL)
                rows[number] = row = job.enter_at_once(found).row  # type: ignore[call-overload]
                intend(job, row, idempotency_key=numbered_key(PREFIX, number), key_number=numbers[number])
                job.accepted(row, ids[number], reserved=Decimal("2.5"), at=at(1))
            del found, row
            gc.collect()
            each = tracemalloc.get_traced_memory()[0] / count
        finally:
            tracemalloc.stop()
    assert each < 225, f"{each:.0f} bytes"


async def test_requests_with_the_same_model_price_and_api_key_have_these_together(place: Path | str | None) -> None:
    async with opened(place) as job:
        known = await enter_all(job, [entry(f"k{number}", number) for number in range(3)])
        one, other, third = (found.row for found in known)
        assert one.common is other.common
        for number, row in enumerate((one, other)):
            assert await intend(job, row, idempotency_key=numbered_key(PREFIX, number), key_number=number) is None
        assert await intend(job, third, price="dear") is None
        assert one.common is other.common
        assert (one.model, one.endpoint, one.price, one.fingerprint) == (MODEL, ENDPOINT, "image", PRINT)
        assert (third.model, third.endpoint, third.price, third.fingerprint) == (MODEL, ENDPOINT, "dear", PRINT)


async def test_a_row_says_the_very_key_that_was_sent(place: Path | str | None) -> None:
    keys: list[tuple[str, int | None]] = [
        *((numbered_key(PREFIX, number), number) for number in (0, 1, 255, 4096, 0xFFFFFFFF)),
        ("the-callers.own_key_of_old", None),
        (numbered_key(PREFIX, 7), None),
        ("ea-00000000000000000000000000000000", None),
    ]
    async with opened(place) as job:
        known = await enter_all(job, [entry(None, key) for key, _ in keys])
        for (key, number), found in zip(keys, known, strict=True):
            assert await intend(job, found.row, idempotency_key=key, key_number=number) is None
            assert found.row.idempotency_key == key
    if place is not None:
        assert ask(place, "SELECT idempotency_key FROM request ORDER BY id") == [(key,) for key, _ in keys]


async def test_each_try_keeps_the_key_that_was_sent_with_it(place: Path | str | None) -> None:
    sent = [(numbered_key(PREFIX, 9), 9), ("a-key-of-its-own-16", None), (numbered_key(PREFIX[::-1], 10), 10)]
    async with opened(place) as job:
        row = await entered(job, "k")
        for key, number in sent:
            assert await intend(job, row, idempotency_key=key, key_number=number) is None
            task = new_task()
            await accept(job, row, task, at=at(1))
            await job.ended(row, end_of(task, "failed", code="service_error"), at=at(2))
        assert [*(past.idempotency_key for past in row.past), row.idempotency_key] == [key for key, _ in sent]
        assert [*(past.number for past in row.past), row.number] == [1, 2, 3]


async def test_a_moment_is_kept_to_the_microsecond(place: Path | str | None) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    first = datetime(1970, 1, 1, tzinfo=UTC)
    moments = [first + timedelta(microseconds=chance.randrange(5 * 10**15)) for _ in range(300)]  # up to the year 2128
    moments += [first, datetime(2026, 11, 26, 23, 59, 59, 999_999, tzinfo=UTC)]
    names = [f"k{number}" for number in range(len(moments))]
    async with opened(place) as job:
        known = await enter_all(job, map(entry, names))
        for moment, found in zip(moments, known, strict=True):
            intend(job, found.row, at=moment)
        assert [found.row.submitted_at for found in known] == moments
        assert {found.row.submitted_at.tzinfo for found in known if found.row.submitted_at} == {UTC}
    if place is not None:
        async with opened(place) as job:
            known = await enter_all(job, map(entry, names))
            assert [found.row.submitted_at for found in known] == moments


async def test_a_request_without_a_key_is_named_by_its_content_and_its_count(place: Path | str | None) -> None:
    async with opened(place) as job:
        known = await enter_all(job, [entry(None, body) for body in "aba"])
        names = [f"{content(body).hex()}-{count}" for body, count in (("a", 0), ("b", 0), ("a", 1))]
        assert [found.row.identity for found in known] == names
        assert [found.row.content for found in known] == [content(body) for body in "aba"]
        assert {(found.row.key, found.row.keyed) for found in known} == {(None, False)}
        row = await entered(job, names[0] + "x")
        assert (row.identity, row.key, row.keyed) == (names[0] + "x", names[0] + "x", True)


def test_the_parts_of_a_name_are_found_again() -> None:
    assert split_identity(counted_identity(b"\0\1\2\3\4\5\6\7", 12)) == (b"\0\1\2\3\4\5\6\7", 12)
    for name in ("mine", "mine-1", "0001-", "00-x", ""):
        with pytest.raises(ValueError, match=r"hex|int"):
            split_identity(name)


def test_how_often_a_content_came_is_known_of_the_latest_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counts, "_COUNTED", 100)
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    counted = Counts()
    came: dict[bytes, int] = {}  # the latest last
    for _ in range(5_000):
        one = chance.randrange(400).to_bytes(8)
        before = came.pop(one, 0)
        latest = list(came)[-99:]
        told = counted.get(one)
        assert told in (None, before)
        came[one] = before + 1
        counted.set(one, before + 1)
        assert {other: counted.get(other) for other in latest} == {other: came[other] for other in latest}
        assert len(counted._latest) + len(counted._before) <= 200
    counted.forget(one)
    assert counted.get(one) is None


@pytest.mark.parametrize("named", [True, False], ids=["keys", "no keys"])
async def test_what_is_on_its_way_keeps_reserved_what_its_class_has_used_and_what_is_over_is_let_go(
    named: bool,
) -> None:
    async with opened(None, max_credits=Decimal(1000)) as job:
        rows = [await entered(job, f"k{number}" if named else None, number) for number in range(4)]
        tasks = [new_task() for _ in rows]
        for row, task in zip(rows, tasks, strict=True):
            assert await intend(job, row, told=None if row is not rows[0] else Decimal("2.5")) is None
            await accept(job, row, task, at=at(1))
        job.let_go(rows[1])  # nobody waits for it any more, but it may cost something still
        await job.ended(rows[2], end_of(tasks[2], "failed"), at=at(2))
        job.let_go(rows[2])
        await job.ended(rows[0], end_of(tasks[0], used=4), at=at(2))
        job.let_go(rows[0])
        assert [row.reserved for row in rows] == [0, 4_000_000, 0, 4_000_000]
        assert (job.reserved, job.spent) == (8, 4)
        assert [row.state for row in job._unnamed] == [State.ACCEPTED] * (2 if not named else 0)
