"""Outages: answers that are lost in a row, a service that cannot be reached, a laptop that sleeps."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from scripted_transport import Say, ScriptedTransport, Sent, lost, refusal, replayed, unsent
from submit_room import ID, REQUEST, Listener, Room, now
from tickets import Ticket

from evolink_async import ConnectionFailedError, SubmitOutcomeUnknownError, Task, clock
from evolink_async.http.pace import Urgency

pytestmark = pytest.mark.looptime


def events(caplog: pytest.LogCaptureFixture, *names: str) -> list[tuple[str, int]]:
    """The records of these events: name and level."""
    records = ((getattr(record, "event", ""), record.levelno) for record in caplog.records)
    return [(event, level) for event, level in records if event in names]


# -- Answers lost in a row ------------------------------------------------------------------------------


def outage(start: float, end: float, bad: Callable[[], Say] = lost) -> Callable[[Sent, int], Say]:
    """A service that takes everything and honours keys, but whose answers are lost for a while."""
    taken: set[str] = set()

    def choose(sent: Sent, number: int) -> Say:
        known = sent.key in taken
        taken.add(sent.key)
        if start <= sent.at < end:
            return bad()
        return replayed() if known else Say()

    return choose


BAD = {
    "502": lambda: Say(502, b"<html>bad gateway"),
    "503": lambda: Say(503, b"busy"),
    "cut": lost,
    "portal": lambda: Say(200, b"<html>please log in"),
}


@pytest.mark.parametrize(("bad", "limit"), [*((bad, "10/s") for bad in BAD), ("502", None)])
async def test_after_an_outage_of_a_minute_every_request_has_its_task(bad: str, limit: str | None) -> None:
    room = Room(ScriptedTransport(choose=outage(3, 63, BAD[bad])), limit=limit)
    listeners = [Listener() for _ in range(700)]
    for listener in listeners:
        room.start(listener)
    await asyncio.gather(*(listener.done.wait() for listener in listeners))
    assert Counter(listener.ends[0].ending for listener in listeners) == {"accepted": 700}
    assert sum(3 <= sent.at < 63 for sent in room.transport.sent) < 60


@pytest.mark.parametrize("minutes", [1, 9, 30])
async def test_what_is_sent_again_after_an_outage_keeps_its_ten_minutes(minutes: int) -> None:
    room = Room(ScriptedTransport(choose=outage(2, 2 + 60 * minutes)), limit="20/s")
    listeners = [Listener() for _ in range(400)]
    for listener in listeners:
        room.start(listener)
    await asyncio.gather(*(listener.done.wait() for listener in listeners))
    sent = sorted((sent.key, sent.at) for sent in room.transport.sent)
    again = [late - early for (key, early), (other, late) in itertools.pairwise(sent) if key == other]
    assert again
    assert 2 <= min(again) <= max(again) <= 600
    unknown = sum(listener.ends[0].ending == "unknown" for listener in listeners)
    assert unknown <= (0 if minutes < 10 else 10 + 2 * minutes)


async def test_the_pause_grows_with_each_answer_lost_after_it_and_one_finds_out_for_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    room = Room(ScriptedTransport(lost(after=0.1)), hold=True, limit=None)  # ten at once
    for _ in range(50):
        room.start()
    await asyncio.sleep(400)
    times = [sent.at for sent in room.transport.sent if sent.at < 399.9]  # whose answers are lost by now
    pauses = [late - early - 0.1 for early, late in itertools.pairwise(times[9:])]
    for number, pause in enumerate(pauses):
        longest = min(30.0, 0.5 * 2**number)
        assert 0.5 * longest <= pause <= longest + 0.05
    assert len(pauses) > 10
    logged = events(caplog, "cool_down")
    assert logged == [("cool_down", logging.INFO)] * (len(pauses) + 1)
    await room.aclose()


async def test_the_service_s_own_hint_is_longer_and_told(caplog: pytest.LogCaptureFixture) -> None:
    room = Room(ScriptedTransport(refusal(503, retry_after="60")), hold=True)
    for _ in range(5):
        room.start()
    await asyncio.sleep(50)
    for _ in range(3):
        room.start()
    await asyncio.sleep(300)
    pauses = [record.__dict__["seconds"] for record in caplog.records if getattr(record, "event", "") == "cool_down"]
    assert len(pauses) >= 3
    assert min(pauses) > 59
    await room.aclose()


async def test_answers_lost_together_are_one_reason_to_wait() -> None:
    room = Room(ScriptedTransport(*[lost()] * 40, Say()), hold=True)
    for _ in range(80):
        room.start()
    await asyncio.sleep(5)
    assert len(room.transport.sent) == 80
    assert room.transport.sent[-1].at < 2


@pytest.mark.parametrize(
    "answer", [Say(), refusal(400), refusal(429, retry_after="1"), refusal(409, "idempotency_conflict"), refusal(402)]
)
async def test_any_answer_ends_the_row(answer: Say) -> None:
    room = Room(ScriptedTransport(lost(), lost(), answer, lost(), lost(), lost()), hold=True)
    while len(room.transport.sent) < 5:
        room.start(listener := Listener())
        await listener.done.wait()
    assert room.pace.cool_down_of(REQUEST.model, now()) == 0
    room.start(listener := Listener())
    await listener.done.wait()
    assert len(room.transport.sent) == 6
    assert room.pace.cool_down_of(REQUEST.model, now()) > 0


async def test_a_failed_connection_says_nothing_about_answers() -> None:
    room = Room(ScriptedTransport(lost(), lost(), unsent(), lost()), hold=True)
    for _ in range(3):
        room.start(listener := Listener())
        await listener.done.wait()
    assert room.pace.cool_down_of(REQUEST.model, now()) > 0


async def test_an_outage_of_one_model_is_not_the_others() -> None:
    room = Room(ScriptedTransport(choose=lambda sent, n: lost() if b"gpt-4o-image" in sent.content else Say()))
    for _ in range(10):
        room.start()
    await asyncio.sleep(60)
    begun = now()
    for _ in range(5):
        await room.submit(model="another")
    assert now() - begun < 1
    await room.aclose()


async def test_where_only_replays_are_left_they_find_out_themselves() -> None:
    room = Room(ScriptedTransport(choose=outage(0, 1)))
    ends = await asyncio.gather(*(room.submit() for _ in range(8)))
    assert {task.id for task in ends} == {ID}
    assert now() < 10


async def test_a_single_call_has_its_turn_in_an_outage() -> None:
    """Its answers may come where those to a pool's larger requests are lost."""

    def choose(sent: Sent, number: int) -> Say:
        return Say() if sent.key == "the-single-call-0001" else lost()

    room = Room(ScriptedTransport(choose=choose), limit="10/s")
    for _ in range(100):
        room.start()
    await asyncio.sleep(2)
    assert isinstance(await room.submit(key="the-single-call-0001"), Task)
    assert now() < 10
    await room.aclose()


async def test_who_finds_out_was_not_sent_yet_and_is_not_withdrawn() -> None:
    pace, let = Room(ScriptedTransport(lost())).pace, []
    for _ in range(3):
        pace.lost("m", now(), now())
    returned, withdrawn, fresh = (
        Ticket("m", "pool", lambda name=name: let.append(name))  # type: ignore[misc]
        for name in ("returned", "withdrawn", "fresh")
    )
    pace.enqueue(returned, Urgency.RETURNED)
    pace.enqueue(withdrawn, Urgency.SOURCE)
    pace.enqueue(fresh, Urgency.SOURCE)
    pace.withdraw(withdrawn)
    await asyncio.sleep(2)
    assert let == ["fresh"]
    pace.finished("m")
    await asyncio.sleep(2)
    assert let == ["fresh", "returned"]
    await pace.aclose()


# -- A service that cannot be reached -------------------------------------------------------------------


async def test_one_warning_when_the_service_cannot_be_reached_and_one_line_when_it_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    room = Room(ScriptedTransport(*[unsent()] * 12, Say()))
    for _ in range(5):
        room.start()
    await asyncio.sleep(100)
    names = ("service_unreachable", "service_reachable")
    period = [(names[0], logging.WARNING), (names[1], logging.INFO)]
    assert events(caplog, *names) == period
    first = next(record for record in caplog.records if getattr(record, "event", "") == names[0])
    assert first.getMessage() == (
        "could not reach 127.0.0.1: ConnectError: refused; check the address, the network and its proxies; trying again"
    )
    assert first.__dict__["host"] == "127.0.0.1"
    caplog.clear()
    room.transport.script = (unsent(), Say())
    room.transport.knocks.clear()
    await room.submit()
    assert events(caplog, *names) == period


async def ended(listener: Listener) -> float:
    await listener.done.wait()
    assert listener.ends[0].ending == "rejected"
    assert isinstance(listener.ends[0].error, ConnectionFailedError)
    return now()


async def test_patience_counts_from_when_the_service_became_unreachable() -> None:
    room, listeners = Room(ScriptedTransport(unsent())), [Listener() for _ in range(10)]
    for listener in listeners:
        room.start(listener, patience=60)
    times = await asyncio.gather(*(ended(listener) for listener in listeners))
    assert 60 <= min(times) < 100
    room.start(late := Listener(), patience=60)
    assert await ended(late) - max(times) < 35
    assert now() < 100 + 10 * 31


async def test_who_is_awaited_has_patience_of_his_own() -> None:
    room, first, late = Room(ScriptedTransport(unsent())), Listener(), Listener()
    room.start(first, patience=60)
    begun = await ended(first)
    room.start(late, patience=60, urgency=Urgency.CALLER)
    assert 60 <= await ended(late) - begun < 130


async def test_what_was_known_of_the_service_long_ago_costs_no_patience(caplog: pytest.LogCaptureFixture) -> None:
    room, first, late = Room(ScriptedTransport(unsent())), Listener(), Listener()
    room.start(first, patience=60)
    await ended(first)
    await asyncio.sleep(3600)
    begun = now()
    room.start(late, patience=60)
    assert 60 <= await ended(late) - begun < 100
    assert len(events(caplog, "service_unreachable")) == 2


# -- A laptop that sleeps -------------------------------------------------------------------------------


class WallClock:
    """Goes with the loop's time and on while that stands still, or is set."""

    ahead = 0.0

    def now(self) -> datetime:
        return datetime(2026, 11, 20, 12, tzinfo=UTC) + timedelta(seconds=now() + self.ahead)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    wall = WallClock()
    monkeypatch.setattr(clock, "now", wall.now)
    return wall


ASKED = refusal(409, "paid_outcome_unknown")


@pytest.mark.parametrize(
    ("script", "asleep_at"),
    [
        ((lost(),), 0.02),
        ((lost(),), 1.0),
        ((ASKED,), 0.02),
        ((ASKED,), 1.0),
        ((lost(), ASKED), 3.0),
    ],
    ids=[
        "flying",
        "waiting for its replay",
        "flying and asked for",
        "waiting to be asked for",
        "replayed and asked for",
    ],
)
async def test_after_eight_hours_of_sleep_nothing_is_sent_again(
    wall: WallClock, script: tuple[Say, ...], asleep_at: float
) -> None:
    room = Room(ScriptedTransport(*script, Say()))
    submitting = asyncio.create_task(room.submit())
    await asyncio.sleep(asleep_at)
    wall.ahead = 8 * 3600.0
    [end] = await asyncio.gather(submitting, return_exceptions=True)
    assert isinstance(end, SubmitOutcomeUnknownError)
    assert len(room.transport.sent) == len(script)


async def test_a_nap_of_five_minutes_leaves_the_replay_its_time(wall: WallClock) -> None:
    room = Room(ScriptedTransport(lost(), replayed()))
    submitting = asyncio.create_task(room.submit())
    await asyncio.sleep(1)
    wall.ahead = 300.0
    assert (await submitting).id == ID


async def test_a_clock_that_is_set_back_makes_no_attempt_younger(wall: WallClock) -> None:
    room = Room(ScriptedTransport(lost(), Say()))
    submitting = asyncio.create_task(room.submit())
    await asyncio.sleep(1)
    wall.ahead = -8 * 3600.0
    room.pace.cool(REQUEST.model, now() + 700)
    [end] = await asyncio.gather(submitting, return_exceptions=True)
    assert isinstance(end, SubmitOutcomeUnknownError)
    assert len(room.transport.sent) == 1
