"""Paid requests over a scripted transport: what is sent, how often, and what is known at the end."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from scripted_transport import KEY, Say, ScriptedTransport, Sent, lost, refusal, replayed, unsent
from submit_room import ID, REQUEST, Listener, Room, now

from evolink_async import (
    AsyncEvoLink,
    AuthenticationError,
    BadRequestError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotSubmittedError,
    RateLimitError,
    SubmitOutcomeUnknownError,
    Task,
)
from evolink_async.http.retry import Replays, next_step
from evolink_async.http.submit import (
    Settled,
    Submission,
    checked_idempotency_key,
)

pytestmark = pytest.mark.looptime


async def unknown(submitting: Awaitable[Any]) -> SubmitOutcomeUnknownError:
    with pytest.raises(SubmitOutcomeUnknownError) as caught:
        await submitting
    assert caught.value.idempotency_key
    assert caught.value.idempotency_key in str(caught.value)
    assert caught.value.request is REQUEST
    return caught.value


# -- Sending again ------------------------------------------------------------------------------------


async def test_every_attempt_sends_the_same_bytes_and_the_same_keys() -> None:
    script = (refusal(429, retry_after="1"), unsent(), refusal(409, "paid_outcome_unknown"), lost(), Say())
    room = Room(ScriptedTransport(*script))
    task = await room.submit()
    assert task.id == ID
    assert len(room.transport.sent) == 4
    assert {sent.content for sent in room.transport.sent} == {
        b'{"model":"gpt-4o-image","prompt":"a lighthouse","seed":7}'
    }
    assert len({sent.key for sent in room.transport.sent}) == 1
    assert {sent.headers["authorization"] for sent in room.transport.sent} == {f"Bearer {KEY}"}
    assert {sent.path for sent in room.transport.sent} == {"/v1/images/generations"}
    assert room.transport.open_answers == 0


LOST = {
    "cut": lost(),
    "500": refusal(500),
    "502-html": Say(502, b"<html>"),
    "408": refusal(408),
    "409": refusal(409),
    "302": Say(302, b"", {"location": "https://elsewhere.test"}),
    "200-empty": Say(200, b""),
    "200-no-id": Say(200, {"status": "pending"}),
    "200-html": Say(200, b"<html>"),
    "value-error": Say(error=ValueError("what?")),
    "timeout": Say(after=1000),
}


@pytest.mark.parametrize("name", LOST)
async def test_a_lost_response_is_sent_again_once_and_then_unknown(name: str) -> None:
    room = Room(ScriptedTransport(LOST[name]))
    error = await unknown(room.submit())
    assert isinstance(error.__cause__, EvoLinkError)
    first, second = room.transport.times
    assert second - first >= 2
    assert room.replays.answered == room.replays.started == 1


@pytest.mark.parametrize("before", [refusal(429, retry_after="5"), refusal(409, "paid_outcome_unknown")])
async def test_a_replay_keeps_its_distance_from_the_attempt_that_was_lost_and_not_from_one_before(before: Say) -> None:
    room = Room(ScriptedTransport(before, lost(), replayed()))
    assert (await room.submit()).id == ID
    _, second, third = room.transport.times
    assert third - second >= 2


async def test_a_task_that_is_given_for_two_requests_is_told(caplog: pytest.LogCaptureFixture) -> None:
    room = Room(ScriptedTransport(Say(), lost(), replayed()))
    await room.submit(key="the-first-request-1")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    await room.submit(key="the-other-request-2")
    (told,) = (record for record in caplog.records if "given for two requests" in record.getMessage())
    for what in (ID, "the-first-request-1", "the-other-request-2"):
        assert what in told.getMessage()
    await room.submit(key="the-first-request-1")  # which is no other request
    assert caplog.text.count("given for two requests") == 1


@pytest.mark.parametrize("name", LOST)
async def test_hold_never_sends_again(name: str) -> None:
    room = Room(ScriptedTransport(LOST[name]), hold=True)
    await unknown(room.submit())
    assert len(room.transport.sent) == 1
    assert room.replays.started == 0


async def test_a_lost_response_that_is_settled_by_its_replay_gives_the_task(caplog: pytest.LogCaptureFixture) -> None:
    room = Room(ScriptedTransport(lost(), replayed()))
    assert (await room.submit()).id == ID
    assert room.replays.proven
    assert room.transport.sent[0].key in caplog.text


@pytest.mark.parametrize("refused", [refusal(400), refusal(401), refusal(404), refusal(409, "idempotency_conflict")])
async def test_what_refuses_the_replay_does_not_settle_the_first_attempt(refused: Say) -> None:
    room = Room(ScriptedTransport(lost(), refused))
    await unknown(room.submit())
    assert len(room.transport.sent) == 2


async def test_a_replay_waits_as_long_as_a_503_asks_and_so_does_its_model() -> None:
    def choose(sent: Sent, number: int) -> Say:
        return refusal(503, retry_after="60") if number == 0 else Say()

    room = Room(ScriptedTransport(choose=choose))
    first = asyncio.create_task(room.submit())
    await asyncio.sleep(1)
    second = asyncio.create_task(room.submit())
    other = asyncio.create_task(room.submit(model="another"))
    await asyncio.wait({first, second, other})
    assert first.result().id == second.result().id == ID
    times = room.transport.times
    assert times[1] == pytest.approx(1, abs=0.1)  # the other model goes on
    assert min(times[2:]) >= 60
    assert room.replays.started == 1


async def test_no_replay_after_ten_minutes_even_if_the_pace_holds_it_back() -> None:
    room = Room(ScriptedTransport(lost(), Say()))
    submitting = asyncio.create_task(room.submit())
    await asyncio.sleep(1)
    room.pace.cool(REQUEST.model, now() + 700)
    error = await unknown(submitting)
    assert "too late" in str(error)
    assert len(room.transport.sent) == 1
    assert room.replays.started == 0


async def test_a_429_on_the_replay_keeps_it_waiting_and_is_not_counted_twice() -> None:
    room = Room(ScriptedTransport(lost(), refusal(429, retry_after="5"), refusal(429, retry_after="5"), replayed()))
    assert (await room.submit()).id == ID
    assert room.replays.started == 1


async def test_under_another_api_key_a_lost_response_is_held() -> None:
    keys = iter(["sk-the-first-key-0001", "sk-the-second-key-002"])
    room = Room(ScriptedTransport(lost(), Say()), key=lambda: next(keys))
    error = await unknown(room.submit())
    assert "API key has changed" in str(error)
    assert len(room.transport.sent) == 1
    assert (room.replays.started, room.replays.answered) == (0, 0)


async def test_under_another_api_key_paid_outcome_unknown_is_held_too() -> None:
    keys = iter(["sk-the-first-key-0001", "sk-the-second-key-002"])
    room = Room(ScriptedTransport(refusal(409, "paid_outcome_unknown"), Say()), key=lambda: next(keys))
    await unknown(room.submit())
    assert len(room.transport.sent) == 1


async def test_a_key_that_rotates_between_refusals_does_no_harm() -> None:
    keys = iter(["sk-the-first-key-0001", "sk-the-second-key-002", "sk-the-second-key-002"])
    room = Room(ScriptedTransport(refusal(429), lost(), replayed()), key=lambda: next(keys))
    assert (await room.submit()).id == ID


async def test_a_key_function_that_fails_after_a_lost_response_leaves_it_unknown() -> None:
    keys = iter(["sk-the-first-key-0001"])
    room = Room(ScriptedTransport(lost(), Say()), key=lambda: next(keys))
    await unknown(room.submit())
    assert (room.replays.started, room.replays.answered) == (0, 0)


@pytest.mark.parametrize("hold", [False, True], ids=["replay", "hold"])
async def test_paid_outcome_unknown_is_asked_again_for_two_minutes_and_is_no_replay(hold: bool) -> None:
    room = Room(ScriptedTransport(refusal(409, "paid_outcome_unknown")), hold=hold)
    error = await unknown(room.submit())
    assert error.code == "paid_outcome_unknown"
    pauses = [round(b - a) for a, b in zip(room.transport.times, room.transport.times[1:], strict=False)]
    assert pauses == [2, 4, 8, 16, 32, 56]
    assert room.replays.started == 0
    assert room.replays.proven


@pytest.mark.parametrize("status", [200, 402, 425, 500])
async def test_paid_outcome_unknown_is_known_under_any_status(status: int) -> None:
    room = Room(ScriptedTransport(refusal(status, "paid_outcome_unknown"), replayed()), hold=True)
    assert (await room.submit()).id == ID
    assert len(room.transport.sent) == 2


async def test_a_refusal_after_paid_outcome_unknown_is_unknown() -> None:
    room = Room(ScriptedTransport(refusal(409, "paid_outcome_unknown"), refusal(400)))
    await unknown(room.submit())


@pytest.mark.parametrize("status", [402, 429])
async def test_what_was_refused_after_a_lost_response_is_not_said_to_be_free_or_to_be_sent_again(status: int) -> None:
    hint = {"retry_after": "700"} if status == 429 else {}  # longer than a replay may wait
    error = await unknown(Room(ScriptedTransport(lost(), refusal(status, **hint))).submit())
    text = str(error)
    assert "Nothing was charged" not in text
    assert "run again" not in text
    assert text.count("again") == 1
    assert "Look for it at the service before you submit it again" in text


async def test_a_conflict_is_unknown_and_never_sent_again() -> None:
    room = Room(ScriptedTransport(refusal(409, "idempotency_conflict")))
    error = await unknown(room.submit(key="my-own-key-of-today"))
    assert error.idempotency_key == "my-own-key-of-today"
    assert error.code == "idempotency_conflict"
    assert "a task exists for this idempotency key" in str(error)
    assert len(room.transport.sent) == 1


@pytest.mark.parametrize(
    ("say", "kind"),
    [
        (refusal(400, "x"), BadRequestError),
        (refusal(401), AuthenticationError),
        (refusal(402), EvoLinkError),
        (refusal(403), EvoLinkError),
    ],
    ids=["400", "401", "402", "403"],
)
async def test_a_refusal_is_raised_at_once(say: Say, kind: type[EvoLinkError]) -> None:
    room = Room(ScriptedTransport(say))
    with pytest.raises(kind):
        await room.submit()
    assert len(room.transport.sent) == 1


@pytest.mark.parametrize("say", [refusal(401), refusal(402), refusal(403, "key_disabled")], ids=["401", "402", "403"])
async def test_a_refused_account_is_fatal_and_not_submitted(say: Say) -> None:
    room, listener = Room(ScriptedTransport(say)), Listener()
    room.start(listener)
    await listener.done.wait()
    (end,) = listener.ends
    assert end.ending == "not_submitted"
    assert end.fatal is end.error


# -- At most three replays without proof ----------------------------------------------------------------


def first_lost(then: Callable[[Sent, int], Say]) -> Callable[[Sent, int], Say]:
    """Loses the first answer to every key; `then` tells the answers to the others."""
    seen: set[str] = set()
    count = 0

    def choose(sent: Sent, number: int) -> Say:
        nonlocal count
        if sent.key not in seen:
            seen.add(sent.key)
            return lost()
        count += 1
        return then(sent, count)

    return choose


async def test_three_are_sent_again_and_the_others_are_held_when_all_come_back_unmarked() -> None:
    room = Room(ScriptedTransport(choose=first_lost(lambda sent, n: Say(after=5.0))))
    ends = await asyncio.gather(*(room.submit() for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(end, Task) for end in ends) == 3
    assert sum(isinstance(end, SubmitOutcomeUnknownError) for end in ends) == 7
    assert len(room.transport.sent) == 13


async def test_the_others_are_released_when_one_comes_back_marked() -> None:
    def then(sent: Sent, n: int) -> Say:
        return Say(after=5.0) if n < 3 else Say(headers={"idempotency-replayed": "true"}, after=20.0)

    room = Room(ScriptedTransport(choose=first_lost(then)))
    ends = await asyncio.gather(*(room.submit() for _ in range(10)))
    assert len(ends) == 10
    assert len(room.transport.sent) == 20
    again = sorted(room.transport.times)[10:]
    assert sum(at < 20 for at in again) == 3
    assert len({sent.key for sent in room.transport.sent}) == 10


async def test_a_request_that_waits_for_the_answers_of_others_is_given_up_after_ten_minutes() -> None:
    room = Room(ScriptedTransport(choose=first_lost(lambda sent, n: Say(after=3000.0))), request_timeout=5000)
    ends = [asyncio.ensure_future(room.submit()) for _ in range(4)]
    done, _ = await asyncio.wait(ends, timeout=700)
    assert len(done) == 1
    assert now() >= 600
    await unknown(done.pop())
    await asyncio.gather(*ends, return_exceptions=True)


async def test_a_released_replay_keeps_its_distance_of_two_seconds() -> None:
    replays = Replays()
    for _ in range(3):
        replays.start()
    script = (lost(after=0.1), refusal(409, "paid_outcome_unknown", after="x"), Say())
    room = Room(ScriptedTransport(*script), replays=replays)
    replays.answered = 0  # three of somebody else are under way
    parked = asyncio.create_task(room.submit())
    await asyncio.sleep(0.3)
    proving = asyncio.create_task(room.submit())
    await asyncio.wait({parked, proving})
    first = room.transport.sent[0]
    again = [sent.at for sent in room.transport.sent if sent.key == first.key]
    assert again[1] - again[0] >= 2


async def test_an_abandoned_replay_that_was_not_sent_leaves_its_place_to_another() -> None:
    room = Room(ScriptedTransport(choose=first_lost(lambda sent, n: Say(after=100.0))))
    submissions = [room.start() for _ in range(4)]
    await asyncio.sleep(1)  # all answers are lost, three replays are due after two seconds
    assert room.replays.started == 3
    ends = [room.submitter.withdraw(submission) for submission in submissions[:3]]
    assert [end.ending for end in ends] == ["unknown"] * 3
    assert room.replays.started == 1
    await room.aclose()


async def test_an_abandoned_replay_that_was_sent_counts_when_its_answer_comes() -> None:
    room = Room(ScriptedTransport(choose=first_lost(lambda sent, n: Say(after=10.0))))
    submissions = [room.start() for _ in range(4)]
    await asyncio.sleep(1)
    room.pace.answered(REQUEST.model)  # else one of them would find out for all
    await asyncio.sleep(2)  # three replays are out
    for submission in submissions[:3]:
        submission.last_try = True
        assert room.submitter.known(submission).ending == "unknown"
    listener = submissions[3].listener
    assert isinstance(listener, Listener)
    await listener.done.wait()
    assert 10 < now() < 20  # not only when its ten minutes are over
    assert listener.ends[0].ending == "unknown"


# -- No connection, refusals ----------------------------------------------------------------------------


async def test_an_unsent_request_is_tried_again_with_back_off() -> None:
    room = Room(ScriptedTransport(*[unsent()] * 6, Say()))
    assert (await room.submit()).id == ID
    pauses = [b - a for a, b in zip(room.transport.knocks, room.transport.knocks[1:], strict=False)]
    for number, pause in enumerate(pauses, 1):
        assert 0.5 * 0.5 * 2 ** (number - 1) <= pause <= 0.5 * 2 ** (number - 1) + 0.01


@pytest.mark.parametrize(("first", "window"), [(lost(), 600), (refusal(409, "paid_outcome_unknown"), 120)])
async def test_a_replay_that_was_held_up_on_its_way_to_the_wire_is_not_sent_too_late(first: Say, window: float) -> None:
    room, listener = Room(ScriptedTransport(first, Say())), SlowToIntend()
    room.start(listener)
    await listener.done.wait()
    assert now() > window
    assert listener.ends[0].ending == "unknown"
    assert "too late" in str(listener.ends[0].error)
    assert len(room.transport.sent) == 1


class SlowToIntend(Listener):
    """Its disk stalls at the second POST."""

    async def intend(self, submission: Submission, fingerprint: str) -> Settled | None:
        await super().intend(submission, fingerprint)
        if self.posts == 2:
            await asyncio.sleep(700)
        return None


async def test_a_thousand_waiting_requests_do_not_each_knock() -> None:
    room = Room(ScriptedTransport(unsent(after=0.01)))
    submissions = [room.start(patience=1000) for _ in range(1000)]
    await asyncio.sleep(100)
    assert len(room.transport.knocks) < 50 + 12  # one volley, then one at a time
    for submission in submissions:
        assert room.submitter.withdraw(submission).ending == "not_submitted"


async def test_what_never_got_through_raises_connection_failed_at_the_deadline() -> None:
    room = Room(ScriptedTransport(unsent()))
    with pytest.raises(ConnectionFailedError) as caught:
        await room.submit(timeout=20)
    assert now() <= 20.1
    assert caught.value.__cause__ is not None


async def test_a_connection_that_hangs_until_the_deadline_raises_connection_failed() -> None:
    room = Room(ScriptedTransport(unsent(after=1000)))
    with pytest.raises(ConnectionFailedError):
        await room.submit(timeout=5)
    assert now() == pytest.approx(5, abs=0.01)


async def test_a_pool_gives_up_an_unreachable_service_after_its_patience() -> None:
    room, listener = Room(ScriptedTransport(unsent())), Listener()
    room.start(listener, patience=60)
    await listener.done.wait()
    assert listener.ends[0].ending == "rejected"
    assert isinstance(listener.ends[0].error, ConnectionFailedError)
    assert 60 <= now() < 100


async def test_refusals_last_until_the_deadline_and_tell_when_to_come_back() -> None:
    room = Room(ScriptedTransport(refusal(429, "rate_limit_exceeded", retry_after="2")))
    with pytest.raises(RateLimitError) as caught:
        await room.submit(timeout=21)
    assert caught.value.retry_after == 2
    assert 18 < now() <= 21.1
    assert all(b - a >= 2 for a, b in zip(room.transport.times, room.transport.times[1:], strict=False))


async def test_a_hint_beyond_the_deadline_is_raised_at_once() -> None:
    room = Room(ScriptedTransport(refusal(429, retry_after="100")))
    with pytest.raises(RateLimitError):
        await room.submit(timeout=60)
    assert now() < 1


async def test_who_comes_during_a_cool_down_and_has_less_time_is_not_submitted() -> None:
    room = Room(ScriptedTransport(refusal(429, retry_after="100")))
    waiting = room.start()
    await asyncio.sleep(1)
    with pytest.raises(NotSubmittedError, match="pause"):
        await room.submit(timeout=10)
    assert room.submitter.withdraw(waiting).ending == "not_submitted"  # a 429 leaves no doubt
    assert len(room.transport.sent) == 1


async def test_an_answer_shortly_after_the_deadline_still_counts() -> None:
    room = Room(ScriptedTransport(Say(after=4)))
    assert (await room.submit(timeout=1)).id == ID


async def test_an_answer_long_after_the_deadline_is_unknown_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    room = Room(ScriptedTransport(Say(after=20)))
    error = await unknown(room.submit(timeout=1))
    assert now() == pytest.approx(6, abs=0.01)
    assert not caplog.text
    await asyncio.sleep(20)
    assert ID in caplog.text
    assert str(error.idempotency_key) in caplog.text
    assert not room.submitter._live


async def test_a_refusal_in_the_grace_period_is_raised_as_such() -> None:
    room = Room(ScriptedTransport(refusal(429, after="x")))
    room.transport.script = (Say(429, b"", after=3.0),)
    with pytest.raises(RateLimitError):
        await room.submit(timeout=1)
    assert len(room.transport.sent) == 1


# -- Cancellation ---------------------------------------------------------------------------------------


async def by_cancel(submitting: Awaitable[Any], seconds: float) -> BaseException:
    task = asyncio.ensure_future(submitting)
    await asyncio.sleep(seconds)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    return caught.value


async def by_timeout(submitting: Awaitable[Any], seconds: float) -> BaseException:
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(seconds):
            await submitting
    assert caught.value.__cause__ is not None
    return caught.value.__cause__


async def by_scope(submitting: Awaitable[Any], seconds: float) -> BaseException:
    seen: list[BaseException] = []
    with anyio.move_on_after(seconds) as scope:
        try:
            await submitting
        except asyncio.CancelledError as error:
            seen.append(error)
            raise
    assert scope.cancelled_caught
    return seen[0]


async def by_fail_after(submitting: Awaitable[Any], seconds: float) -> BaseException:
    seen: list[BaseException] = []

    async def remembering() -> None:
        try:
            await submitting
        except asyncio.CancelledError as error:
            seen.append(error)
            raise

    with pytest.raises(TimeoutError), anyio.fail_after(seconds):
        await remembering()
    return seen[0]


Way = Callable[[Awaitable[Any], float], Awaitable[BaseException]]
WAYS = pytest.mark.parametrize("way", [by_cancel, by_timeout, by_scope, by_fail_after])


def notes(error: BaseException) -> str:
    return " ".join(getattr(error, "__notes__", []))


@WAYS
async def test_cancelled_while_queued_it_is_never_sent(way: Way) -> None:
    room = Room(ScriptedTransport(Say()), limit="1/h")
    await room.submit()
    error = await way(room.submit(), 5)
    assert now() == pytest.approx(5.05, abs=0.1)
    assert not notes(error)
    await asyncio.sleep(7200)
    assert len(room.transport.knocks) == 1


@WAYS
async def test_cancelled_while_the_key_is_asked_for_it_is_never_sent(way: Way) -> None:
    async def key() -> str:
        await asyncio.sleep(60)
        return KEY

    room = Room(ScriptedTransport(Say()), key=key)
    error = await way(room.submit(), 5)
    assert now() == pytest.approx(5, abs=0.01)
    assert not notes(error)
    await asyncio.sleep(100)
    assert not room.transport.knocks


@WAYS
async def test_cancelled_while_connecting_it_is_never_sent(way: Way) -> None:
    room = Room(ScriptedTransport(unsent(after=8)))
    error = await way(room.submit(), 5)
    assert now() == pytest.approx(5, abs=0.01)
    assert not notes(error)
    await asyncio.sleep(100)
    assert len(room.transport.knocks) == 1


@WAYS
async def test_cancelled_after_sending_it_waits_for_the_id(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    room = Room(ScriptedTransport(Say(after=8)))
    error = await way(room.submit(), 5)
    assert now() == pytest.approx(8, abs=0.01)
    assert ID in notes(error)
    assert ID in caplog.text
    assert not room.transport.sent[0].cut


@WAYS
async def test_cancelled_after_sending_it_waits_five_seconds_at_most(
    way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    room = Room(ScriptedTransport(Say(after=25)))
    error = await way(room.submit(), 5)
    assert now() == pytest.approx(10, abs=0.01)
    assert room.transport.sent[0].key in notes(error)
    assert ID not in caplog.text
    await asyncio.sleep(30)
    assert not room.transport.sent[0].cut
    assert ID in caplog.text


@WAYS
async def test_cancelled_while_waiting_for_its_replay_it_tells_the_key(way: Way) -> None:
    room = Room(ScriptedTransport(lost(), Say()))
    error = await way(room.submit(), 1)
    assert now() == pytest.approx(1, abs=0.01)
    assert room.transport.sent[0].key in notes(error)
    await asyncio.sleep(100)
    assert len(room.transport.sent) == 1
    assert room.replays.started == 0


@WAYS
async def test_cancelled_while_parked_it_tells_the_key(way: Way) -> None:
    replays = Replays()
    room = Room(ScriptedTransport(lost(), Say()), replays=replays)
    replays.started = 3  # three of somebody else are under way
    error = await way(room.submit(), 50)
    assert room.transport.sent[0].key in notes(error)
    await asyncio.sleep(1000)
    assert len(room.transport.sent) == 1


@WAYS
async def test_cancelled_during_a_cool_down_it_is_known_to_be_free(way: Way) -> None:
    room = Room(ScriptedTransport(refusal(429, retry_after="60")))
    error = await way(room.submit(), 5)
    assert now() == pytest.approx(5, abs=0.01)
    assert not notes(error)
    await asyncio.sleep(100)
    assert len(room.transport.sent) == 1


@pytest.mark.parametrize("phase", ["sent", "connecting"])
async def test_cancelled_twice_it_goes_at_once(phase: str) -> None:
    room = Room(ScriptedTransport(Say(after=60) if phase == "sent" else unsent(after=60)))
    task = asyncio.create_task(room.submit())
    await asyncio.sleep(1)
    task.cancel()
    if phase == "sent":
        await asyncio.sleep(1)
    else:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert now() == pytest.approx(2 if phase == "sent" else 1, abs=0.01)
    assert (room.transport.sent[0].key in notes(caught.value)) if phase == "sent" else not notes(caught.value)
    await asyncio.sleep(100)
    assert len(room.transport.sent) == (phase == "sent")


async def test_a_withdrawn_submission_whose_key_comes_late_is_not_sent() -> None:
    async def key() -> str:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            pass  # a function that does not let itself be cancelled
        return KEY

    room = Room(ScriptedTransport(Say()), key=key)
    submission = room.start()
    await asyncio.sleep(1)
    assert room.submitter.withdraw(submission).ending == "not_submitted"
    await asyncio.sleep(10)
    assert not room.transport.knocks


async def test_a_post_cut_by_somebody_else_is_unknown_and_its_caller_hears_of_it() -> None:
    room, listener = Room(ScriptedTransport(Say(after=60))), Listener()
    submission = room.start(listener)
    await asyncio.sleep(1)
    assert submission.post is not None
    submission.post.cancel()
    await asyncio.wait_for(listener.done.wait(), 1)
    assert listener.ends[0].ending == "unknown"


@pytest.mark.parametrize("by", ["its caller", "somebody else"])
async def test_posts_cut_before_they_began_are_not_sent_and_give_their_places_back(by: str) -> None:
    room, ends = Room(ScriptedTransport(Say())), list[Settled]()

    def go_and_be_cut(submission: Submission) -> None:
        room.submitter._post(submission)
        if by == "its caller":
            ends.append(room.submitter.withdraw(submission))
        else:
            assert submission.post is not None
            submission.post.cancel()

    listener = Listener(ends=ends)
    for _ in range(60):  # more than there are places
        submission = room.start(listener)
        submission.go = functools.partial(go_and_be_cut, submission)  # type: ignore[method-assign]
    await asyncio.sleep(1)
    assert [end.ending for end in ends] == ["not_submitted"] * 60
    assert listener.posts == 0
    assert (await room.submit(timeout=10)).id == ID
    assert len(room.transport.knocks) == 1
    assert not room.submitter._live


# -- Closing, faults ------------------------------------------------------------------------------------


async def test_closing_answers_everybody() -> None:
    room = Room(ScriptedTransport(Say(after=3), Say(after=60), lost(), unsent(after=60), Say()), limit="1/s")
    submitting = [asyncio.ensure_future(room.submit()) for _ in range(6)]
    await asyncio.sleep(3.5)
    started = now()
    await room.aclose()
    assert now() - started == pytest.approx(5, abs=0.01)
    ends = await asyncio.wait_for(asyncio.gather(*submitting, return_exceptions=True), 1)
    answered, hanging, replaying, connecting, *queued = ends
    assert isinstance(answered, Task)
    assert isinstance(hanging, SubmitOutcomeUnknownError)
    assert isinstance(hanging.__cause__, ClosedError)
    assert isinstance(replaying, SubmitOutcomeUnknownError)
    for end in (connecting, *queued):
        assert isinstance(end, NotSubmittedError)
        assert isinstance(end.__cause__, ClosedError)
    assert not room.submitter._live


async def test_who_submits_after_the_close_hears_that_it_is_closed() -> None:
    room, listener = Room(ScriptedTransport(Say())), Listener()
    await room.aclose()
    room.start(listener)
    assert not listener.ends  # later, as everybody else
    await listener.done.wait()
    assert listener.ends[0].ending == "not_submitted"
    assert isinstance(listener.ends[0].fatal, ClosedError)
    assert not room.transport.knocks


async def test_a_close_that_is_cancelled_cuts_at_once_and_answers_everybody() -> None:
    room = Room(ScriptedTransport(Say(after=60)))
    submitting = asyncio.ensure_future(room.submit())
    await asyncio.sleep(1)
    closing = asyncio.create_task(room.submitter.aclose())
    await asyncio.sleep(1)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert now() == pytest.approx(2, abs=0.01)
    await unknown(asyncio.wait_for(submitting, 1))
    assert room.transport.sent[0].cut


async def test_a_fault_in_a_listener_becomes_known_and_nobody_hangs() -> None:
    class Broken(Listener):
        async def intend(self, submission: Submission, fingerprint: str) -> Settled | None:
            raise RuntimeError("a bug")

    room, listener = Room(ScriptedTransport(Say())), Broken()
    room.start(listener)
    await listener.done.wait()
    assert listener.ends[0].ending == "not_submitted"
    assert [type(error) for error in listener.crashes] == [RuntimeError]
    assert (await room.submit()).id == ID  # the others go on


async def test_a_fault_in_the_dispatcher_reaches_everybody_who_waits(caplog: pytest.LogCaptureFixture) -> None:
    room = Room(ScriptedTransport(Say()))
    room.pace.cool(REQUEST.model, now() + 100)
    listener = Listener()
    room.start(listener)
    submitting = asyncio.ensure_future(room.submit())
    await asyncio.sleep(1)
    original, room.pace._choose = room.pace._choose, None  # type: ignore[method-assign, assignment]
    room.pace._notice()
    await asyncio.wait_for(listener.done.wait(), 1)
    with pytest.raises(NotSubmittedError):
        await asyncio.wait_for(submitting, 1)
    assert [type(error) for error in listener.crashes] == [TypeError]
    room.pace._choose = original  # type: ignore[method-assign]
    await asyncio.sleep(100)
    assert (await room.submit()).id == ID


# -- Keys -----------------------------------------------------------------------------------------------


async def test_a_key_function_that_hangs_ends_with_the_deadline() -> None:
    async def key() -> str:
        await asyncio.sleep(10_000)
        return KEY

    room = Room(ScriptedTransport(Say()), key=key)
    with pytest.raises(NotSubmittedError, match="API key"):
        await room.submit(timeout=10)
    assert now() == pytest.approx(10, abs=0.01)


async def test_a_key_function_that_fails_is_told_and_nothing_is_sent() -> None:
    def key() -> str:
        raise RuntimeError(f"no {KEY}")

    room = Room(ScriptedTransport(Say()), key=key)
    with pytest.raises(ConfigurationError) as caught:
        await room.submit()
    assert KEY not in repr(caught.value) + repr(caught.value.__context__)
    assert not room.transport.knocks


BAD_KEYS = ["", "short", "x" * 97, "has space in the key", "ключ-ключ-ключ-ключ", "a" * 16 + "\n", 5]


@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
async def test_an_idempotency_key_that_the_service_refuses_is_refused_before(key: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        checked_idempotency_key(key)
    assert caught.value.param == "idempotency_key"


async def test_idempotency_keys_have_the_documented_form() -> None:
    key = checked_idempotency_key(None)
    assert key.startswith("ea-")
    assert len(key) == 35
    assert checked_idempotency_key(key) == key
    assert checked_idempotency_key(None) != key


# -- What a listener does while it is told ----------------------------------------------------------------


async def test_who_withdraws_others_while_told_of_one_has_none_of_them_sent_again() -> None:
    """As a pool does that ends early: the first of the parked ones that is given up takes the others along."""
    room = Room(ScriptedTransport(choose=first_lost(lambda sent, n: Say(after=5.0))))
    submissions: list[Submission] = []

    class Ending(Listener):
        def settled(self, submission: Submission, settled: Settled) -> None:
            super().settled(submission, settled)
            if settled.ending == "unknown":
                for other in submissions:
                    room.submitter.withdraw(other)

    submissions += [room.start(Ending()) for _ in range(8)]
    await asyncio.sleep(2000)
    assert len(room.transport.sent) == 8 + 3
    assert not room.submitter._parked
    listeners = [submission.listener for submission in submissions]
    # Three were settled by their replays, one was given up, and who was withdrawn is told nothing.
    assert sorted(len(listener.ends) for listener in listeners if isinstance(listener, Listener)) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("say", [refusal(429, retry_after="5"), unsent(after=1), lost(after=1)])
async def test_the_last_try_of_a_request_that_is_under_way_is_its_last(say: Say) -> None:
    """As a pool asks for when it stops: the answer is waited for, and nothing is sent after it."""
    room, listener = Room(ScriptedTransport(say)), Listener()
    submission = room.start(listener)
    await asyncio.sleep(0.01)
    submission.last_try = True
    await listener.done.wait()
    assert listener.ends[0].ending == ("not_submitted" if say.error is None or say.unsent else "unknown")
    await asyncio.sleep(100)
    assert len(room.transport.knocks) == 1


async def test_a_listener_that_stops_everything_when_held_is_not_sent_again() -> None:
    """As a pool does when the service asks for a pause of more than an hour."""
    room = Room(ScriptedTransport(refusal(429, retry_after="7200")))
    ends: list[Settled] = []

    class Stopping(Listener):
        def held(self, submission: Submission, error: EvoLinkError) -> None:
            assert submission.post is None
            ends.append(room.submitter.withdraw(submission))

    room.start(Stopping())
    await asyncio.sleep(10_000)
    assert [end.ending for end in ends] == ["not_submitted"]
    assert len(room.transport.sent) == 1


async def test_a_fault_of_ours_after_the_answer_does_not_lose_the_task(
    emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The money is spent by then: the id must reach the caller, whatever breaks on our side."""
    broken = iter([True])

    def next_step_once_broken(*args: Any) -> Any:
        if next(broken, False):
            raise RuntimeError("a fault of ours")
        return next_step(*args)

    monkeypatch.setattr("evolink_async.http.submit.next_step", next_step_once_broken)
    async with AsyncEvoLink(base_url=emulator.base_url) as client:
        task = await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
    assert [post["task_id"] for post in emulator.emulator.book()["posts"]] == [task.id]
