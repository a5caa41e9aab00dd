"""Running a job again: which request is which, and what is done with it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from ledger_world import (
    accept,
    at,
    content,
    end_of,
    enter_all,
    entered,
    entry,
    intend,
    kill,
    new_task,
    opened,
    row_in,
    task_of,
)
from loop_executor import in_loop
from postgres import is_postgres

from evolink_async import InvalidRequestError
from evolink_async.ledger import Entered, Entry, State, Todo, may_try_again, open_job, what_to_do
from evolink_async.ledger.job import Census
from evolink_async.ledger.values import Fate, Row, counted_identity, shared


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)


def row(state: State, *, number: int = 1, **fate: Any) -> Row:
    made = Row("k", b"\0", shared("/v1/images/generations", "m"), state)
    made.fate = Fate(number=number, **fate)
    return made


@pytest.mark.parametrize(
    ("known", "todo"),
    [
        (row(State.ENTERED), Todo.SUBMIT),
        (row(State.REJECTED, error_code="bad_size"), Todo.SUBMIT),
        (row(State.UNSETTLED, losses=1), Todo.SETTLE),
        (row(State.UNSETTLED, losses=0), Todo.SETTLE),
        (row(State.UNSETTLED, losses=2), Todo.HOLD),
        (row(State.UNSETTLED, losses=1, error_code="idempotency_conflict"), Todo.HOLD),
        (row(State.GIVEN_UP, losses=1), Todo.HOLD),
        (row(State.ACCEPTED), Todo.FOLLOW),
        (row(State.COMPLETED), Todo.DELIVER),
        (row(State.FAILED, error_code="content_policy"), Todo.DELIVER),
        (row(State.FAILED, error_code="service_error"), Todo.DELIVER),
        (row(State.CANCELLED), Todo.DELIVER),
        (row(State.LOST), Todo.DELIVER),
    ],
)
def test_what_is_done_with_a_request_follows_from_its_state(known: Row, todo: Todo) -> None:
    assert what_to_do(Entered(known)) is todo
    assert what_to_do(Entered(known, repeated=True)) is Todo.SHARE
    assert what_to_do(Entered(known, changed=True)) is Todo.REFUSE
    assert what_to_do(Entered(known, repeated=True, changed=True)) is Todo.REFUSE


@pytest.mark.parametrize("state", State)
def test_every_state_has_something_to_do(state: State) -> None:
    assert what_to_do(Entered(row(state))) in Todo


@pytest.mark.parametrize(
    ("number", "tries", "again"), [(1, 0, False), (1, 1, True), (2, 1, False), (2, 2, True), (3, 2, False)]
)
def test_a_passing_failure_is_tried_again_as_often_as_was_asked_for(number: int, tries: int, again: bool) -> None:
    failed = row(State.FAILED, error_code="service_error", number=number)
    assert may_try_again(failed, tries) is again
    assert (what_to_do(Entered(failed), retry_failed=tries) is Todo.SUBMIT) is again


@pytest.mark.parametrize("state", [state for state in State if state is not State.FAILED])
def test_nothing_but_a_passing_failure_is_ever_paid_for_again(state: State) -> None:
    assert not may_try_again(row(state, error_code="service_error"), 9)
    assert not may_try_again(row(State.FAILED, error_code="content_policy"), 9)


async def test_a_finished_job_is_delivered_from_the_ledger(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        made = await row_in(job, State.COMPLETED, "a")
        await job.saved(made, ["out/a-1.png", "out/a-2.png"])
        await row_in(job, State.FAILED, "b")
    async with opened(path) as job:
        [a, b] = await enter_all(job, [entry("a", "a"), entry("b", "b")])
        assert [what_to_do(known) for known in (a, b)] == [Todo.DELIVER, Todo.DELIVER]
        assert a.row.task is not None
        assert a.row.task.urls == (f"https://files.example/{a.row.task_id}.png",)
        assert a.row.files == ("out/a-1.png", "out/a-2.png")
        assert (a.row.credits, b.row.credits) == (2.5, 0)
        assert (b.row.error_code, b.row.error) == ("unknown_error", "it did not work")
        assert (a.row.submitted_at, a.row.ended_at) == (at(), at(2))
        assert job.census == Census(known=2, new=0, changed=0, gone=0)


async def test_what_died_while_sending_is_unsettled_with_all_that_a_replay_needs(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path)
    for key in ("sending", "replaying", "accepted"):
        await row_in(job, State(key), key)
    kill(job)
    async with opened(path) as job:
        assert job.interrupted == 2
        [sending, replaying, accepted] = await enter_all(
            job, [entry(key, key) for key in ("sending", "replaying", "accepted")]
        )
        assert [what_to_do(known) for known in (sending, replaying, accepted)] == [
            Todo.SETTLE,
            Todo.HOLD,
            Todo.FOLLOW,
        ]
        assert (sending.row.state, sending.row.losses, sending.row.attempts) == (State.UNSETTLED, 1, 1)
        assert sending.row.body == b'{"model": "gpt-4o-image"}'
        assert sending.row.idempotency_key == f"ea-{sending.row.id:032x}"
        assert (sending.row.fingerprint, sending.row.submitted_at) == ("0123456789abcdef", at())
        assert (replaying.row.losses, replaying.row.replayed) == (2, True)
        assert accepted.row.task_id is not None
        assert accepted.row.task is None
        assert accepted.row.body is None


# Which is which


async def test_without_a_key_equal_bodies_are_told_apart_by_how_many_came_before(ledger_url: Path | str) -> None:
    path = ledger_url
    bodies = ["a", "b", "a", "a", "c", "b"]
    async with opened(path) as job:
        first = await enter_all(job, [entry(None, body) for body in bodies])
        names = [known.row.identity for known in first]
        assert names == [
            counted_identity(content(body), count) for body, count in zip(bodies, [0, 0, 1, 2, 0, 1], strict=True)
        ]
        assert [known.row.key for known in first] == [None] * 6
    async with opened(path) as job:
        # Inserting and reordering rows changes nothing.
        shuffled = ["x", *reversed(bodies)]
        again = await enter_all(job, [entry(None, body) for body in shuffled])
        assert sorted(known.row.identity for known in again[1:]) == sorted(names)
        assert job.census == Census(known=6, new=1, changed=0, gone=0)
    async with opened(path) as job:
        await job.enter(entry(None, "a"))
        assert job.census == Census(known=7, new=0, changed=0, gone=6)


async def test_equal_bodies_are_counted_over_calls_even_when_the_count_is_no_longer_remembered(
    place: Path | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place is not None:
        monkeypatch.setattr("evolink_async.ledger.counts._COUNTED", 2)
    chance = random.Random(5)
    for _ in range(2):
        seen: dict[str, int] = {}
        async with opened(place) as job:
            for _ in range(60):
                bodies = [chance.choice("abcdef") for _ in range(chance.randrange(6))]
                calls = [enter_all(job, [entry(None, body) for body in bodies[half::2]]) for half in (0, 1)]
                for half, call in enumerate(calls):
                    for body, known in zip(bodies[half::2], await call, strict=True):
                        assert known.row.identity == counted_identity(content(body), seen.get(body, 0))
                        assert not known.repeated
                        seen[body] = seen.get(body, 0) + 1


async def test_a_key_that_comes_twice_in_a_run_is_one_request(ledger_url: Path | str) -> None:
    async with opened(ledger_url) as job:
        [first, same, other] = await enter_all(job, [entry("k", 1), entry("k", 1), entry("k", 2)])
        assert first.row is same.row is other.row
        assert [what_to_do(known) for known in (first, same, other)] == [Todo.SUBMIT, Todo.SHARE, Todo.REFUSE]
        later = await job.enter(entry("k", 1))
        assert later.row is first.row
        assert later.repeated


async def test_a_row_that_nobody_holds_is_read_again_when_its_key_comes_again(ledger_url: Path | str) -> None:
    async with opened(ledger_url) as job:
        await row_in(job, State.COMPLETED, "k")
        again = await job.enter(entry("k", "k"))
        assert again.repeated
        assert again.row.state is State.COMPLETED
        assert again.row.task is not None
        assert again.row.task.urls


async def test_a_changed_body_is_refused_once_its_key_may_have_been_paid_for(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        for state in (State.COMPLETED, State.FAILED, State.ACCEPTED, State.UNSETTLED):
            await row_in(job, state, state.value)
    async with opened(path) as job:
        keys = ["completed", "failed", "accepted", "unsettled"]
        known = await enter_all(job, [entry(key, "another body") for key in keys])
        assert [what_to_do(one, retry_failed=9) for one in known] == [Todo.REFUSE] * 4
        assert job.census == Census(known=4, new=0, changed=4, gone=0)
    async with opened(path) as job:  # and it is not changed by that
        known = await enter_all(job, [entry(key, key) for key in keys])
        assert not any(one.changed for one in known)


async def test_a_body_of_which_nothing_came_may_be_put_right_in_a_later_run(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        await row_in(job, State.REJECTED, "bad")
        await row_in(job, State.ENTERED, "unsent")
        vain = await row_in(job, State.SENDING, "vain")
        await job.posted_in_vain(vain, sent=True)
    async with opened(path) as job:
        known = await enter_all(job, [entry(key, "put right") for key in ("bad", "unsent", "vain")])
        assert [what_to_do(one) for one in known] == [Todo.SUBMIT] * 3
        assert job.census.changed == 3
        await intend(job, known[0].row, body=b"right")
        await accept(job, known[0].row, new_task(), at=at())
    async with opened(path) as job:
        [one, other] = await enter_all(job, [entry("bad", "put right"), entry("unsent", "unsent")])
        assert not one.changed
        assert (what_to_do(one), what_to_do(other)) == (Todo.FOLLOW, Todo.SUBMIT)


async def test_a_key_that_looks_like_an_identity_is_not_taken_for_it(ledger_url: Path | str) -> None:
    async with opened(ledger_url) as job:
        await entered(job, counted_identity(content("a"), 0), "b")
        unkeyed = await job.enter(entry(None, "a"))
        assert what_to_do(unkeyed) is Todo.REFUSE  # never two requests under one name


async def test_jobs_in_one_file_know_nothing_of_each_other(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path, "one") as one, opened(path, "other") as other:
        await row_in(one, State.COMPLETED, "k")
        known = await other.enter(entry("k", "k"))
        assert what_to_do(known) is Todo.SUBMIT
        assert (one.spent, other.spent) == (2.5, 0)
        assert await other.find("k") is known.row
        await intend(other, known.row)
    async with opened(path, "other") as other:
        known = await other.enter(entry("k", "k"))
        assert known.row.state is State.UNSETTLED


async def test_every_name_that_is_a_text_is_kept_as_it_is(ledger_url: Path | str) -> None:
    path = ledger_url
    no_text_there = [] if is_postgres(path) else ["\0", "a\0b"]
    names = [*no_text_there, "'; DROP TABLE request; --", "ключ", "\U0001f3a8", " ", "%", "k" * 1024, "a\nb", "NULL"]
    async with opened(path) as job:
        await enter_all(job, [entry(name) for name in names])
    async with opened(path) as job:
        known = await enter_all(job, [entry(name) for name in names])
        assert [one.row.key for one in known] == names
        assert job.census == Census(known=len(names), new=0, changed=0, gone=0)
    for key, model in (("\ud800", "m"), ("k", "m\udfff")):
        with pytest.raises(InvalidRequestError, match="surrogate"):
            Entry(key, b"\0", "/v1/images/generations", model)


async def test_a_key_that_is_the_identity_of_a_request_without_one_changes_nothing_of_that(
    ledger_url: Path | str,
) -> None:
    path = ledger_url
    async with opened(path) as job:
        row = await entered(job, None, "a")
    async with opened(path) as job:
        known = await job.enter(entry(row.identity, "another body"))
        assert (known.changed, known.row.content, known.row.key) == (True, row.content, None)


# A new try


async def test_a_new_try_keeps_the_former_one_on_record_and_counts_it(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        again = await entered(job, "k")
        await intend(job, again, idempotency_key="first-key-of-sixteen")
        first = new_task()
        await accept(job, again, first, at=at(1))
        await job.ended(again, end_of(first, "failed", code="service_error"), at=at(2))
        assert again.credits == 0
        await intend(job, again, idempotency_key="second-key-of-sixteen", at=at(3))
        assert (again.state, again.number, again.attempts, again.task_id) == (State.SENDING, 2, 2, None)
        second = new_task(4)
        await accept(job, again, second, at=at(4))
        await job.ended(again, end_of(second, used=3), at=at(5))
        # The first turns out to have been charged after all.
        assert await accept(job, again, new_task(2.5, "task-first-charged"), at=at(6), number=1) is False
        assert again.credits == 5.5
        assert (job.spent, job.reserved) == (3, 2.5)
    async with opened(path) as job:
        known = await job.enter(entry("k"))
        [failed, extra] = known.row.past
        assert (failed.number, failed.state, failed.task_id) == (1, State.FAILED, first.id)
        assert (failed.idempotency_key, failed.error_code) == ("first-key-of-sixteen", "service_error")
        assert (extra.number, extra.state, extra.task_id) == (1, State.ACCEPTED, "task-first-charged")
        assert extra.idempotency_key == "first-key-of-sixteen"
        assert known.row.idempotency_key == "second-key-of-sixteen"
        assert known.row.credits == 5.5
        # Told again, in another run: known, and of no other try.
        assert known.row.task is not None
        assert known.row.task.id == second.id
        await accept(job, known.row, new_task(2.5, "task-first-charged"), at=at(7), number=1)
        assert known.row.credits == 5.5


async def test_a_second_task_for_one_request_is_kept_and_counted(
    ledger_url: Path | str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(ledger_url) as job:
        twice = await row_in(job, State.ACCEPTED, "k")
        assert await accept(job, twice, new_task(2.5, "task-besides"), at=at(5)) is False
        assert "paid for twice: task task-besides" in caplog.text
        assert twice.task_id != "task-besides"
        assert (job.reserved, twice.credits) == (5, 5)
        await job.ended(twice, end_of(task_of(twice)), at=at(6))
        assert (job.reserved, job.spent, twice.credits) == (2.5, 2.5, 5)
