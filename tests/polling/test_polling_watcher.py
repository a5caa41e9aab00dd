"""The watcher, in virtual time, over a service that each test describes."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import random
from typing import Any

import pytest
from support import virtual_service
from watching import (
    LINK,
    Ear,
    FakeReader,
    PlainExpectation,
    PlainSchedule,
    answer,
    done,
    follow,
    fresh,
    our_tasks,
    refusal,
    running,
    watching,
)

from evolink_async import AsyncEvoLink
from evolink_async.errors import (
    AuthenticationError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    PermissionDeniedError,
    TaskLostError,
)
from evolink_async.http.model_pace import ModelPace
from evolink_async.polling import watcher as watcher_module
from evolink_async.polling.schedule import Expectation, Schedule, Sightings, TaskClass, class_of
from evolink_async.polling.watcher import Learned, Watcher
from evolink_async.types import Task, TaskReading

pytestmark = pytest.mark.looptime


def now() -> float:
    return asyncio.get_running_loop().time()


def done_at(moment: float, **results: Any) -> Any:
    """A service where every task completes at one moment."""
    return lambda id_: done(id_, **results) if now() >= moment else running(id_)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# -- One look for all, and nothing when nobody follows ---------------------------------------------


async def test_one_look_serves_everyone_who_follows_the_task() -> None:
    reader = FakeReader(done_at(62))
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh()] * 5)
        tasks = await asyncio.gather(*(ear.over for ear in ears))
    assert [ear.told for ear in ears] == [1] * 5
    assert {task.urls for task in tasks} == {(LINK,)}
    assert reader.times() == pytest.approx([25, 60.0, 65], abs=0.1)


async def test_nothing_exists_before_anything_is_followed_nor_afterwards() -> None:
    reader = FakeReader(done_at(30))
    async with watching(reader) as watcher:
        assert not our_tasks()
        assert watcher._timer is None
        for _ in range(3):  # and it wakes up again for the next one
            (ear,) = follow(watcher, [fresh()])
            await ear.over
            await turns()
            assert not our_tasks()
            assert watcher._timer is None
            assert not watcher._heap
            assert len(watcher) == 0


async def test_when_one_of_two_followers_leaves_the_other_is_still_told() -> None:
    reader = FakeReader(done_at(62))
    async with watching(reader) as watcher:
        first, second = follow(watcher, [fresh()] * 2)
        await asyncio.sleep(30)
        watcher.unfollow("task-1", first)
        assert (await second.over).succeeded
        assert first.told == 0


# -- What the pace hears of the tasks that run -----------------------------------------------------------


def submitted(watcher: Watcher, task_id: str = "task-1") -> ModelPace:
    """Whose pace counts this task, which the service has just taken from us."""
    watcher._pace.accepted("m", now(), task_id, 100.0)
    return watcher._pace._lane("m", now()).pace


@pytest.mark.parametrize("service", [done_at(62), lambda id_: refusal(404)], ids=["ended", "lost"])
async def test_a_task_that_ended_or_is_lost_runs_no_more_for_its_pace(service: Any) -> None:
    async with watching(FakeReader(service)) as watcher:
        pace = submitted(watcher)
        (ear,) = follow(watcher, [fresh()])
        await asyncio.sleep(20)
        assert pace.running == 1
        await asyncio.wait([ear.over])
        ear.over.exception()
        assert pace.running == 0


async def test_a_task_that_nobody_follows_any_more_runs_on_for_its_pace() -> None:
    async with watching(FakeReader(running)) as watcher:
        pace = submitted(watcher)
        (ear,) = follow(watcher, [fresh()])
        await asyncio.sleep(1000)
        watcher.unfollow("task-1", ear)
        assert pace.running == 1
        await asyncio.sleep(1000)
        submitted(watcher, "another")
        assert pace.running == 1  # by now it must have ended


async def test_a_task_that_was_followed_before_its_answer_came_is_one_that_runs_and_ends() -> None:
    async with watching(FakeReader(done_at(62))) as watcher:
        (first,) = follow(watcher, [fresh()])  # a callback was faster
        pace = submitted(watcher)
        follow(watcher, [fresh()])
        await first.over
        assert pace.running == 0


# -- Who leaves --------------------------------------------------------------------------------------------


async def test_when_the_last_follower_leaves_during_a_look_the_look_is_cut_and_nobody_is_told() -> None:
    reader = FakeReader(done_at(0), latency=10)
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        await asyncio.sleep(26)
        assert reader.under_way == 1
        watcher.unfollow("task-1", ear)
        await turns()
        assert reader.under_way == 0
        assert not our_tasks()
        await asyncio.sleep(100)
        assert ear.told == 0
        assert len(reader.calls) == 1


async def test_a_task_followed_anew_during_the_look_of_those_who_left_gets_its_own_answer() -> None:
    reader = FakeReader(done_at(0), latency=10)
    async with watching(reader) as watcher:
        ear, other = follow(watcher, [fresh(), fresh("task-2", 10_000)])
        await asyncio.sleep(26)
        watcher.unfollow("task-1", ear)
        (again,) = follow(watcher, [Task(id="task-1")], age=None)
        assert (await again.over).succeeded
        assert now() == pytest.approx(36, abs=0.1)
        assert (ear.told, other.told) == (0, 0)


async def test_whoever_follows_again_from_within_the_news_of_the_end_is_served() -> None:
    reader = FakeReader(done_at(0))
    async with watching(reader) as watcher:
        ear = Ear()

        class Chain(Ear):
            def ended(self, task: Task) -> None:
                super().ended(task)
                watcher.follow(TaskReading.of(fresh("task-2")), ear, age=0.0)

        watcher.follow(TaskReading.of(fresh()), Chain(), age=0.0)
        assert (await asyncio.wait_for(ear.over, 100)).id == "task-2"


async def test_looks_run_in_an_empty_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    seen = []

    def single(id_: str) -> Any:
        seen.append(variable.get())
        return running(id_) if len(seen) < 4 else done(id_)

    async with watching(FakeReader(single)) as watcher:
        variable.set("a secret of the first caller")
        (ear,) = follow(watcher, [fresh()])
        await ear.over
    assert seen == ["nothing"] * 4


async def test_no_more_looks_are_under_way_than_workers() -> None:
    reader = FakeReader(done_at(0), latency=1)
    async with watching(reader, workers=7, learned=Learned(batches=False)) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(100)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert reader.most_under_way == 7
    assert now() == pytest.approx(25 + 100 / 7, abs=1.1)


# -- When ------------------------------------------------------------------------------------------


async def test_a_bare_id_is_looked_at_at_once_and_its_age_is_then_known(monkeypatch: pytest.MonkeyPatch) -> None:
    created = 1_800_000_000
    monkeypatch.setattr(watcher_module.time, "time", lambda: created + 80.0)
    reader = FakeReader(
        lambda id_: running(id_, created=created, task_info={"estimated_time": 100}) if now() < 11 else done(id_)
    )
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [Task(id="task-1")], age=None)
        await ear.over
    assert reader.times() == pytest.approx([0, 5, 10, 15], abs=0.1)


async def test_an_old_task_from_elsewhere_is_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher_module.time, "time", lambda: 1_800_000_000.0)
    reader = FakeReader(done_at(0))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh(created=1_800_000_000 - 3600)], age=None)
        await ear.over
    assert now() < 0.1


@pytest.mark.parametrize("skew", [-3600, 2 * 86_400, 10**12])
async def test_a_wrong_wall_clock_changes_only_the_pace(monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    monkeypatch.setattr(watcher_module.time, "time", lambda: 1_800_000_000.0 + skew)
    reader = FakeReader(done_at(62))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh(created=1_800_000_000)], age=None)
        await ear.over
    assert len(reader.calls) < 20
    assert now() < 67


# -- What the schedule is told ---------------------------------------------------------------------


class Diary(PlainSchedule):
    """Keeps what it is told about tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Any, ...]] = []

    def expect(self, task_class: TaskClass, estimate: float | None) -> Expectation:
        diary = self

        class DiaryExpectation(PlainExpectation):
            def next_look(self, task: Sightings, random: float) -> float:
                if task.looked_at > task.started:
                    diary.told.append(("unfinished", round(task.looked_at - task.started, 1), task.shown))
                return super().next_look(task, random)

            def over(self, task: Sightings, heard_at: float) -> None:
                diary.told.append(("over", round(heard_at - task.started, 1)))

        self.told.append(("expect", task_class, estimate))
        return DiaryExpectation(estimate or 30.0)


async def test_the_schedule_is_told_when_looks_were_asked_for_and_when_the_end_was_heard() -> None:
    diary = Diary()
    reader = FakeReader(lambda id_: running(id_, progress=round(now())) if now() < 62 else done(id_), latency=0.5)
    task = fresh(model="a-model", usage={"credits_reserved": 64})
    async with watching(reader, schedule=diary, learned=Learned(batches=False)) as watcher:
        (ear,) = follow(watcher, [task])
        await ear.over
    assert diary.told == [
        ("expect", ("image", "a-model", "64 credits"), 100),
        ("unfinished", 25.0, 26),
        ("unfinished", 60.0, 60),
        ("over", 65.5),
    ]


@pytest.mark.parametrize("failure", [refusal(500), refusal(404), refusal(429), ConnectionFailedError("cut")])
async def test_a_look_that_failed_tells_the_schedule_nothing(failure: Any) -> None:
    diary = Diary()
    reader = FakeReader(lambda id_: running(id_) if now() < 40 else failure if now() < 70 else done(id_))
    async with watching(reader, schedule=diary, learned=Learned(batches=False)) as watcher:
        (ear,) = follow(watcher, [fresh()])
        await ear.over
    assert [what for what, *_ in diary.told] == ["expect", "unfinished", "over"]
    assert diary.told[1][1] == 25.0


CUT = ConnectionFailedError("cut")


@pytest.mark.parametrize(
    ("first", "then", "unreachable"),
    [
        (CUT, CUT, True),
        (running("task-1"), CUT, False),
        (refusal(500), CUT, False),
        (refusal(404), CUT, False),
        (answer(200, ["no task"]), CUT, False),
        (done("task-1", results=[]), CUT, False),
        (running("task-1"), running("task-1"), False),
    ],
)
async def test_the_service_is_unreachable_if_looks_failed_and_none_was_ever_answered(
    first: Any, then: Any, unreachable: bool
) -> None:
    reader = FakeReader(lambda id_: first if now() < 26 else then)
    async with watching(reader, learned=Learned(batches=False)) as watcher:
        (ear,) = follow(watcher, [fresh()])
        await asyncio.sleep(24)
        assert not watcher.unreachable("task-1")
        await asyncio.sleep(40)
        assert len(reader.calls) >= 2
        assert watcher.unreachable("task-1") is unreachable
        watcher.unfollow("task-1", ear)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_an_end_is_told_once_however_it_was_and_not_again_when_the_links_come(status: str) -> None:
    diary = Diary()
    end = {"id": "task-1", "status": status}
    reader = FakeReader(lambda id_: running(id_) if now() < 60 else end)
    async with watching(reader, schedule=diary) as watcher:
        (ear,) = follow(watcher, [fresh()])
        await ear.over
    assert [told for told in diary.told if told[0] == "over"] == [("over", 60.0)]


async def test_a_task_of_unknown_age_teaches_the_schedule_nothing() -> None:
    diary = Diary()
    async with watching(FakeReader(done_at(62)), schedule=diary) as watcher:
        ears = follow(watcher, [Task(id="task-1"), fresh("task-2")], age=None)
        for ear in ears:
            await ear.over
    assert "over" not in [what for what, *_ in diary.told]


async def test_of_an_id_alone_the_schedule_is_asked_when_the_first_look_has_told_what_it_is() -> None:
    diary = Diary()
    reader = FakeReader(lambda id_: running(id_, model="a-model", task_info={"estimated_time": 50}))
    async with watching(reader, schedule=diary) as watcher:
        (ear,) = follow(watcher, [Task(id="task-1")], age=None)
        await asyncio.sleep(20)
        watcher.unfollow("task-1", ear)
    assert [told for told in diary.told if told[0] == "expect"] == [("expect", ("image", "a-model", None), 50)]


async def test_tasks_that_take_twice_the_estimate_are_soon_looked_at_less() -> None:
    reader = FakeReader(lambda id_: running(id_) if now() - float(id_[5:]) < 200 else done(id_))
    looks = []
    async with watching(reader, schedule=Schedule(), learned=Learned(batches=False)) as watcher:
        for _ in range(60):
            (ear,) = follow(watcher, [fresh(f"task-{now()}", model="a-model")])
            before = len(reader.calls)
            await ear.over
            looks.append(len(reader.calls) - before)
    assert sum(looks[-10:]) < 0.6 * sum(looks[:10])


# -- Hints -----------------------------------------------------------------------------------------


async def test_a_hint_hastens_a_look_at_most_once_a_second() -> None:
    reader = FakeReader(running)
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh(estimate=3600.0)])
        await asyncio.sleep(10)
        for _ in range(30):
            watcher.notify("task-1")
            watcher.notify("task-unknown")
            await asyncio.sleep(0.1)
        assert reader.times() == pytest.approx([10, 11, 12], abs=0.05)
        watcher.unfollow("task-1", ear)


async def test_a_hint_during_a_look_brings_one_more_look_after_it() -> None:
    reader = FakeReader(done_at(28.5), latency=3)
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        await asyncio.sleep(26)
        watcher.notify("task-1")
        await ear.over
    assert reader.times() == pytest.approx([25, 28], abs=0.05)


# -- Batches ---------------------------------------------------------------------------------------


def whole_batch(ids: list[str]) -> Any:
    return {"data": [running(id_) if now() < 60 else done(id_) for id_ in ids]}


async def test_where_the_service_answers_for_fifty_it_is_asked_for_fifty() -> None:
    reader = FakeReader(running, whole_batch)
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(120)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert max(len(ids) for _, method, ids in reader.calls if method == "POST") == 50
    assert reader.kinds().count("GET") <= 70  # while the probe was out
    assert reader.calls[-1][1] == "POST"
    assert watcher.requests == len(reader.calls)
    assert watcher.polls == sum(len(ids) for *_, ids in reader.calls)


class Every30Seconds(Schedule):
    def expect(self, task_class: TaskClass, estimate: float | None) -> Expectation:
        return In30Seconds(30.0)


class In30Seconds(PlainExpectation):
    def next_look(self, task: Sightings, random: float) -> float:
        return task.looked_at + 30


async def test_a_batch_takes_along_whoever_has_waited_most_of_the_time_between_two_looks() -> None:
    reader = FakeReader(done_at(60), whole_batch)
    async with watching(reader, schedule=Every30Seconds(), learned=Learned(batches=True)) as watcher:
        ears = follow(watcher, [fresh("first")])
        await asyncio.sleep(9)
        ears += follow(watcher, [fresh("in-9-of-30")])
        await asyncio.sleep(2)
        ears += follow(watcher, [fresh("in-11-of-30")])
        await asyncio.sleep(30)
        assert [(round(at), ids) for at, _, ids in reader.calls] == [
            (30, ("first", "in-9-of-30")),
            (41, ("in-11-of-30",)),
        ]
        await asyncio.gather(*(ear.over for ear in ears))


async def test_a_batch_comes_to_no_task_before_its_pause_after_trouble_is_over() -> None:
    def batch(ids: list[str]) -> Any:
        if now() < 31 and "troubled" in ids:
            return refusal(503, headers={"retry-after": "20"})
        return whole_batch(ids)

    reader = FakeReader(done_at(60), batch)
    async with watching(reader, schedule=Every30Seconds(), learned=Learned(batches=True)) as watcher:
        ears = follow(watcher, [fresh("troubled"), fresh("with-it")])
        await asyncio.sleep(15)
        ears += follow(watcher, [fresh("other")])  # due 15 s after the refusal, 5 s before its pause is over
        await asyncio.gather(*(ear.over for ear in ears))
    looks = reader.times("troubled")
    assert looks[1] - looks[0] >= 20
    assert 44 < reader.times("other")[0] < 46


@pytest.mark.parametrize("status", [400, 403, 404, 405])
async def test_a_refused_batch_means_single_looks_for_the_clients_life(status: int) -> None:
    reader = FakeReader(done_at(62), lambda ids: refusal(status))
    learned = Learned()
    async with watching(reader, learned=learned) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(30)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert reader.kinds().count("POST") == 1
    assert max(ear.told for ear in ears) == 1
    async with watching(reader, learned=learned) as watcher:  # the client's next loop
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(30)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert reader.kinds().count("POST") == 1


@pytest.mark.parametrize(
    "shape",
    [
        {"data": None},
        {"tasks": []},
        [],
        "text",
        {"data": "text"},
        {"data": {"a": 1}},
        {"data": [{"no": "id"}]},
        {"data": ["x"]},
        {"error": {"code": "x", "message": "y"}},
        b"<html>",
        b"",
    ],
)
async def test_a_malformed_batch_means_single_looks(shape: Any) -> None:
    reader = FakeReader(done_at(62), lambda ids: answer(200, shape))
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(10)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert reader.kinds().count("POST") == 1


@pytest.mark.parametrize("trouble", [refusal(429), refusal(500), refusal(503), ConnectionFailedError("cut")])
async def test_passing_trouble_with_a_batch_does_not_end_batches(trouble: Any) -> None:
    reader = FakeReader(running, lambda ids: trouble if now() < 26 else whole_batch(ids))
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(10)])
        await asyncio.gather(*(ear.over for ear in ears))
        assert watcher._learned.batches is True
    assert reader.calls[-1][1] == "POST"


async def test_a_batch_that_fails_for_ever_does_not_keep_tasks_from_being_seen() -> None:
    reader = FakeReader(done_at(62), lambda ids: refusal(500))
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(10)])
        await asyncio.wait_for(asyncio.gather(*(ear.over for ear in ears)), 80)


async def test_where_batches_are_refused_for_ever_as_too_many_requests_tasks_are_looked_at_one_by_one() -> None:
    """A limit may count ids: then a batch of fifty never gets through, however long the pauses are."""
    reader = FakeReader(done_at(62), lambda ids: refusal(429, headers={"retry-after": "2"}))
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(60)])
        await asyncio.wait_for(asyncio.gather(*(ear.over for ear in ears)), 80)
        assert watcher._learned.batches is not False


async def test_where_a_limit_counts_ids_batches_become_as_large_as_get_through() -> None:
    reader = FakeReader(done_at(62), lambda ids: refusal(429) if len(ids) > 20 else whole_batch(ids))
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(200)])
        await asyncio.gather(*(ear.over for ear in ears))
    sizes = [len(ids) for _, method, ids in reader.calls if method == "POST"]
    assert sum(size > 20 for size in sizes) < len(sizes) / 3
    assert reader.kinds().count("GET") == 0


async def test_batches_are_whole_again_soon_after_a_refusal() -> None:
    reader = FakeReader(running, lambda ids: refusal(429) if now() < 26 else {"data": [running(id_) for id_ in ids]})
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(200)])
        await asyncio.sleep(120)
        for n, ear in enumerate(ears):
            watcher.unfollow(f"task-{n}", ear)
    refused = sum(at < 26 for at, _, _ in reader.calls)
    sizes = [len(ids) for _, _, ids in reader.calls[refused:]]
    assert 50 in sizes[:16]


async def test_batches_that_tell_of_no_end_are_found_out_and_given_up() -> None:
    """Whether a batch makes the service ask its provider, as a single look does, isn't known."""
    reader = FakeReader(done_at(62), lambda ids: {"data": [running(id_) for id_ in ids]})
    learned = Learned()
    async with watching(reader, learned=learned) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(60)])
        await asyncio.wait_for(asyncio.gather(*(ear.over for ear in ears)), 250)
    assert learned.batches is False


async def test_batches_are_not_behind_where_a_task_ended_after_a_single_look_that_failed() -> None:
    failed: set[str] = set()

    def told(id_: str) -> Any:
        return done(id_) if now() > (400 if id_ in failed else 600) else running(id_)

    def single(id_: str) -> Any:
        if now() > 400:
            return told(id_)
        failed.add(id_)
        return refusal(500)

    learned = Learned()
    async with watching(FakeReader(single, lambda ids: {"data": list(map(told, ids))}), learned=learned) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(60)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert len(failed) > 3
    assert learned.batches is True


async def test_batches_that_have_told_of_an_end_are_believed() -> None:
    """They may still be a little behind, as here; that is no reason for fifty times the requests."""

    def batch(ids: list[str]) -> Any:
        return {"data": [done(id_) if now() > 40 * int(id_[5:]) + 30 else running(id_) for id_ in ids]}

    reader = FakeReader(lambda id_: done(id_) if now() > 40 * int(id_[5:]) else running(id_), batch)
    learned = Learned()
    async with watching(reader, learned=learned) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(1, 21)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert learned.batches is True
    assert reader.kinds().count("GET") < 5  # when it is the last


@pytest.mark.parametrize("which", [[0, 1], [1, 0]], ids=["the end first", "the end last"])
async def test_of_several_rows_about_a_task_one_that_says_it_is_over_counts(which: list[int]) -> None:
    def batch(ids: list[str]) -> Any:
        rows = [[done(id_), running(id_)] for id_ in ids]
        return {"data": [pair[n] for n in which for pair in rows]}

    reader = FakeReader(running, batch)
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(10)])
        await asyncio.wait_for(asyncio.gather(*(ear.over for ear in ears)), 30)


async def test_a_batch_that_alone_needs_more_rights_does_not_lose_a_task() -> None:
    reader = FakeReader(done_at(150), lambda ids: refusal(401))
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(10)])
        await asyncio.wait_for(asyncio.gather(*(ear.over for ear in ears)), 170)


async def test_who_is_missing_in_a_batch_or_completed_without_links_gets_a_look_of_its_own() -> None:
    def batch(ids: list[str]) -> Any:
        rows: list[Any] = [done(id_) for id_ in ids if id_ not in ("task-0", "task-1")]
        return {"data": [*rows, None, *([done("task-1", results=[])] if "task-1" in ids else [])]}

    reader = FakeReader(done_at(0), batch)
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(10)])
        tasks = await asyncio.gather(*(ear.over for ear in ears))
    assert [(method, len(ids)) for _, method, ids in reader.calls] == [("POST", 10), ("GET", 1), ("GET", 1)]
    assert all(task.urls for task in tasks)
    assert now() < 25.1


async def test_batches_are_probed_once_at_a_time_and_again_when_the_probe_found_nobody_left() -> None:
    reader = FakeReader(running, lambda ids: {"data": [running(id_) for id_ in ids]}, latency=5)
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(60)])
        (stays,) = follow(watcher, [fresh("stays", 10_000)])
        await asyncio.sleep(26)
        assert reader.kinds().count("POST") == 1
        for n, ear in enumerate(ears):
            watcher.unfollow(f"task-{n}", ear)
        for look in our_tasks():
            look.cancel()
        await turns()
        assert watcher._learned.batches is None
        later = follow(watcher, [fresh(f"later-{n}") for n in range(5)])
        await asyncio.sleep(35)
        assert reader.kinds().count("POST") == 2
        assert watcher._learned.batches is True
        for n, ear in enumerate(later):
            watcher.unfollow(f"later-{n}", ear)
        watcher.unfollow("stays", stays)


# -- What ends a task, and what does not -----------------------------------------------------------


TROUBLES: list[Any] = [
    refusal(500),
    refusal(503, headers={"retry-after": "2"}),
    refusal(408),
    answer(502, b"<html>bad gateway</html>"),
    answer(302, b"", {"location": "https://elsewhere.example"}),
    ConnectionFailedError("took longer than 15 s"),
    answer(200, b"not json"),
    answer(200, b""),
    answer(200, {"error": {"code": "x", "message": "y"}}),
    answer(200, {"status": "completed"}),
    answer(200, done("task-of-somebody-else")),
    answer(200, [1]),
    answer(200, {"id": 7}),
]


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_look_that_fails_changes_nothing_about_the_task(trouble: Any) -> None:
    reader = FakeReader(lambda id_: trouble if 20 < now() < 1000 else done(id_) if now() > 1000 else running(id_))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh(estimate=20.0)])
        assert (await ear.over).id == "task-1"
    assert ear.told == 1
    assert 1000 < now() < 1000 + 31
    assert all(task.id == "task-1" and not task.is_terminal for task in ear.sightings)
    assert len(reader.calls) < 100


async def test_a_new_id_that_is_not_found_yet_is_waited_for() -> None:
    reader = FakeReader(lambda id_: refusal(404) if now() < 50 else done(id_))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh(estimate=10.0)])
        assert (await ear.over).succeeded


@pytest.mark.parametrize("status", [404, 410, 400])
async def test_an_id_is_lost_after_three_looks_over_a_minute(status: int) -> None:
    reader = FakeReader(lambda id_: refusal(status, "invalid_task_id"))
    async with watching(reader) as watcher:
        first, second = follow(watcher, [fresh(estimate=10.0)] * 2)
        with pytest.raises(TaskLostError) as caught:
            await first.over
        assert second.over.exception() is not caught.value
        assert isinstance(second.over.exception(), TaskLostError)
    assert caught.value.task.id == "task-1"
    assert len(reader.calls) >= 3
    assert 60 <= reader.times()[-1] - reader.times()[0] < 61


async def test_an_id_that_is_found_in_between_is_not_lost() -> None:
    reader = FakeReader(lambda id_: running(id_) if 30 < now() < 40 else refusal(404) if now() < 200 else done(id_))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh(estimate=20.0)])
        with pytest.raises(TaskLostError):
            await ear.over
    assert now() > 100


@pytest.mark.parametrize("flap", ["failed", "cancelled"])
async def test_the_first_terminal_status_wins(flap: str) -> None:
    looks = []

    def single(id_: str) -> Any:
        looks.append(now())
        return [done(id_, results=[]), running(id_), {"id": id_, "status": flap}, done(id_)][len(looks) - 1]

    async with watching(FakeReader(single)) as watcher:
        (ear,) = follow(watcher, [fresh()])
        task = await ear.over
    assert task.status == "completed"
    assert ear.told == 1
    assert looks == pytest.approx([25, 30, 35], abs=0.1)
    assert not any(task.status == "failed" for task in ear.sightings)


async def test_completed_without_a_link_is_looked_at_three_times_in_ten_seconds() -> None:
    reader = FakeReader(done_at(0, results=[]))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        task = await ear.over
    assert task.succeeded
    assert task.urls == ()
    assert reader.times() == pytest.approx([25, 30, 35], abs=0.1)


async def test_hints_do_not_shorten_the_wait_for_links() -> None:
    reader = FakeReader(lambda id_: done(id_, results=[] if now() < 34 else [LINK]))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        await asyncio.sleep(25.5)
        for _ in range(8):
            watcher.notify("task-1")
            await asyncio.sleep(1.1)
        assert (await ear.over).urls == (LINK,)


async def test_links_that_come_late_are_delivered() -> None:
    reader = FakeReader(lambda id_: done(id_, results=[] if now() < 28 else [LINK]))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        assert (await ear.over).urls == (LINK,)
    assert now() == pytest.approx(30, abs=0.1)


@pytest.mark.parametrize("status", [404, 401, 403])
async def test_who_completed_stays_completed_though_the_next_looks_are_refused(status: int) -> None:
    reader = FakeReader(lambda id_: done(id_, results=[]) if now() < 28 else refusal(status))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        assert (await ear.over).succeeded
    assert reader.times() == pytest.approx([25, 30, 35], abs=0.1)


async def test_a_refusal_between_is_no_reason_to_miss_the_links() -> None:
    reader = FakeReader(
        lambda id_: refusal(404) if 28 < now() < 32 else done(id_, results=[LINK] if now() > 32 else [])
    )
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        assert (await ear.over).urls == (LINK,)


async def test_a_result_that_is_no_link_is_a_result() -> None:
    reader = FakeReader(lambda id_: {"id": id_, "status": "completed", "result_data": {"voice_id": "v"}})
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        await ear.over
    assert len(reader.calls) == 1


@pytest.mark.parametrize(("status", "error"), [(401, AuthenticationError), (403, PermissionDeniedError)])
async def test_without_access_for_a_minute_nobody_looks_any_more(status: int, error: type[Exception]) -> None:
    reader = FakeReader(lambda id_: refusal(status))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        with pytest.raises(error):
            await ear.over
    assert 60 <= reader.times()[-1] - reader.times()[0] < 71


async def test_access_that_comes_back_within_a_minute_costs_nothing() -> None:
    reader = FakeReader(lambda id_: refusal(401) if now() < 70 else done(id_))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        assert (await ear.over).succeeded


async def test_a_key_function_that_fails_counts_as_no_access() -> None:
    reader = FakeReader(lambda id_: ConfigurationError("the api_key function raised OSError"))
    async with watching(reader) as watcher:
        (ear,) = follow(watcher, [fresh()])
        with pytest.raises(ConfigurationError):
            await ear.over
    assert 84 < now() < 100


async def test_an_unknown_status_is_kept_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = FakeReader(lambda id_: {"id": id_, "status": "moderated"} if now() < 200 else done(id_))
    with caplog.at_level(logging.WARNING, "evolink_async.polling"):
        async with watching(reader) as watcher:
            ears = follow(watcher, [fresh(f"task-{n}") for n in range(3)])
            await asyncio.gather(*(ear.over for ear in ears))
    assert ears[0].sightings[0].status == "moderated"
    assert len([record for record in caplog.records if "moderated" in record.getMessage()]) == 1


async def test_a_thousand_different_unknown_statuses_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    learned = Learned()
    with caplog.at_level(logging.WARNING, "evolink_async.polling"):
        for n in range(1000):
            learned.note_status(f"odd-{n}" * 50)
    assert len(caplog.records) == 100
    assert max(len(record.getMessage()) for record in caplog.records) < 200


# -- 429 on looks ----------------------------------------------------------------------------------


async def test_a_429_on_a_look_pauses_all_looks_for_as_long_as_the_hint_says() -> None:
    def single(id_: str) -> Any:
        return refusal(429, headers={"retry-after": "40"}) if now() < 26 else done(id_)

    reader = FakeReader(single, latency=0.1)
    async with watching(reader, workers=4, learned=Learned(batches=False)) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(100)])
        await asyncio.gather(*(ear.over for ear in ears))
    early = [at for at in reader.times() if at < 60]
    assert len(early) == 4  # those under way at that moment
    assert min(at for at in reader.times() if at > 60) >= 65.1


async def test_429s_without_a_hint_back_off_together_until_one_look_succeeds() -> None:
    reader = FakeReader(lambda id_: refusal(429) if now() < 200 else done(id_), latency=0.1)
    async with watching(reader, workers=10, learned=Learned(batches=False)) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(50)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert sum(at < 200 for at in reader.times()) < 200  # some 15 rounds of 10, not 50 times every half second


async def test_many_refusals_of_the_same_moment_count_as_one() -> None:
    reader = FakeReader(lambda id_: refusal(429) if now() < 25.4 else done(id_), latency=0.3)
    async with watching(reader, workers=50, learned=Learned(batches=False)) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(50)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert now() < 28


async def test_a_refused_batch_counts_as_one_refusal_however_fast_the_answer_came() -> None:
    reader = FakeReader(running, lambda ids: refusal(429) if now() < 26 else {"data": [done(id_) for id_ in ids]}, 0.0)
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(50)])
        await asyncio.gather(*(ear.over for ear in ears))
    assert now() < 28


# -- Faults ----------------------------------------------------------------------------------------


class Broken(PlainSchedule):
    """Fails after so many looks."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good = good

    def expect(self, task_class: TaskClass, estimate: float | None) -> Expectation:
        schedule = self

        class BrokenExpectation(PlainExpectation):
            def next_look(self, task: Sightings, random: float) -> float:
                schedule.good -= 1
                if schedule.good < 0:
                    raise ZeroDivisionError("a bug")
                return super().next_look(task, random)

        return BrokenExpectation(estimate or 30.0)


async def test_a_fault_in_a_look_reaches_every_follower_and_the_watcher_goes_on_with_the_next() -> None:
    reader = FakeReader(running, whole_batch)
    async with watching(reader, schedule=Broken(20)) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(20)])
        await asyncio.sleep(26)
        assert [type(ear.over.exception()) for ear in ears] == [ZeroDivisionError] * 20
        assert [ear.told for ear in ears] == [1] * 20
        await turns()
        assert not our_tasks()
        assert watcher._timer is None
        watcher._schedule = PlainSchedule()
        (ear,) = follow(watcher, [fresh()])
        watcher.notify("task-1")
        await asyncio.sleep(61)
        watcher.unfollow("task-1", ear)
        assert ear.told == 0
        assert len(ear.sightings) == 3


@pytest.mark.parametrize("where", ["_next_group", "_take", "_look", "_take_answer", "_saw", "_set_timer"])
async def test_a_fault_anywhere_leaves_nobody_hanging(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FakeReader(running)
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(3)])
        await asyncio.sleep(24)

        def broken(*args: Any, **more: Any) -> Any:
            if len(watcher):
                raise ZeroDivisionError("a bug")

        monkeypatch.setattr(watcher, where, broken)
        await asyncio.sleep(2)
        assert [type(ear.over.exception()) for ear in ears] == [ZeroDivisionError] * 3
        monkeypatch.undo()


async def test_a_follower_that_raises_hurts_nobody_else() -> None:
    class Bad(Ear):
        def seen(self, task: Task) -> None:
            raise ZeroDivisionError("in a pool")

    class Worse(Ear):
        def ended(self, task: Task) -> None:
            raise ZeroDivisionError("in a pool")

        crashed = ended  # type: ignore[assignment]

    reader = FakeReader(done_at(62))
    async with watching(reader) as watcher:
        bad, worse = Bad(), Worse()
        watcher.follow(TaskReading.of(fresh()), bad, age=0.0)
        watcher.follow(TaskReading.of(fresh()), worse, age=0.0)
        (good,) = follow(watcher, [fresh()])
        assert (await good.over).succeeded
        assert isinstance(bad.over.exception(), ZeroDivisionError)
        assert bad.told == 1


async def test_whoever_cancels_every_task_he_finds_only_delays_the_looks() -> None:
    reader = FakeReader(done_at(62), latency=0.5)
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(3)])
        for _ in range(60):
            await asyncio.sleep(1.25)
            for look in our_tasks():
                look.cancel()
        await asyncio.wait_for(asyncio.gather(*(ear.over for ear in ears)), 60)


async def test_a_look_cancelled_before_it_began_is_made_again() -> None:
    reader = FakeReader(done_at(0))
    async with watching(reader, learned=Learned(batches=False)) as watcher:
        (ear,) = follow(watcher, [fresh()])
        await asyncio.sleep(24)
        watcher._timer.cancel()  # type: ignore[union-attr]
        await asyncio.sleep(2)
        watcher._dispatch()
        (look,) = our_tasks()
        look.cancel()
        assert (await asyncio.wait_for(ear.over, 10)).succeeded


async def test_closing_tells_every_follower_which_task_goes_on() -> None:
    reader = FakeReader(running, latency=10)
    async with watching(reader) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(3)])
        await asyncio.sleep(27)
        await watcher.aclose()
        for n, ear in enumerate(ears):
            with pytest.raises(ClosedError, match=f"task-{n}"):
                await ear.over
        assert not our_tasks()
        (late,) = follow(watcher, [fresh()])
        with pytest.raises(ClosedError):
            await late.over
        assert len(watcher) == 0
        assert watcher._timer is None


# -- Long lives ------------------------------------------------------------------------------------


def planned(watcher: Any) -> int:
    """Tasks in the heap, those left behind there included."""
    return sum(len(due.tasks) for due in watcher._heap)


async def test_hints_and_comings_and_goings_do_not_pile_up_in_the_heap() -> None:
    async with watching(FakeReader(running)) as watcher:
        (stays,) = follow(watcher, [fresh("stays", 3600.0)])
        for n in range(5000):
            (ear,) = follow(watcher, [fresh(f"task-{n}", 3600.0)])
            watcher.notify(f"task-{n}")
            watcher.unfollow(f"task-{n}", ear)
        assert planned(watcher) < 100
        for n in range(5000):
            (ear,) = follow(watcher, [fresh(f"task-{n}", 3600.0)])
            watcher.unfollow(f"task-{n}", ear)
        assert planned(watcher) < 100
        (earlier,) = follow(watcher, [fresh("earlier", 3000.0)])
        for _ in range(500):
            watcher.notify("stays")
            await asyncio.sleep(1.01)
            assert planned(watcher) < 100
        watcher.unfollow("stays", stays)
        watcher.unfollow("earlier", earlier)


async def test_who_stays_is_looked_at_in_time_though_most_others_leave() -> None:
    reader = FakeReader(running, whole_batch)
    async with watching(reader, learned=Learned(batches=True)) as watcher:
        ears = follow(watcher, [fresh(f"task-{n}") for n in range(500)])
        await asyncio.sleep(20)
        for n, ear in enumerate(ears):
            if n % 5:
                watcher.unfollow(f"task-{n}", ear)
        assert planned(watcher) < 300
        await asyncio.sleep(5.5)
        assert [len(ear.sightings) for ear in ears] == [1, 0, 0, 0, 0] * 100
        assert [len(ids) for _, _, ids in reader.calls] == [50, 50]


class Quiet(Ear):
    """Keeps nothing."""

    def __init__(self) -> None:
        pass

    def seen(self, task: Task) -> None:
        pass


async def test_ten_thousand_tasks_and_a_hundred_thousand_looks_leave_no_growth() -> None:
    def batch(ids: list[str]) -> Any:
        return {"data": [running(id_) for id_ in ids]}

    async with watching(FakeReader(running, batch), learned=Learned(batches=True)) as watcher:
        quiet = [Quiet() for _ in range(10_000)]
        dice = random.Random(1)
        watcher._random.random = dice.random  # type: ignore[method-assign]
        for n, ear in enumerate(quiet):
            watcher.follow(TaskReading.of(fresh(f"task-{n}")), ear, age=0.0)

        async def looks(count: int) -> int:
            goal = watcher.polls + count
            while watcher.polls < goal:  # noqa: ASYNC110
                await asyncio.sleep(1)
            watcher._reader.calls.clear()  # type: ignore[attr-defined]
            gc.collect()
            return len(gc.get_objects())

        before = await looks(30_000)
        after = await looks(70_000)
        assert planned(watcher) <= 10_000 + 10_000 + 50
        assert len(watcher._heap) < 300
        assert after - before < 1000
        for n, ear in enumerate(quiet):
            watcher.unfollow(f"task-{n}", ear)
        assert not watcher._heap


@pytest.mark.looptime
async def test_many_tasks_due_at_once_wait_for_the_first_batch_and_then_go_in_batches(api_key: str) -> None:
    async with virtual_service(api_key, seed=5) as (emulator, http_client):
        async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client) as client:
            tasks = [await client.images.submit(model="gpt-4o-image", prompt=f"{n}", timeout=None) for n in range(300)]
        await asyncio.sleep(600)
        before = emulator.book()["requests"].get("GET /v1/tasks/{id}", 0)
        async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client) as client:
            await asyncio.gather(*(client.tasks.wait(task.id) for task in tasks))
        requests = emulator.book()["requests"]
        assert requests["POST /v1/tasks/batch"] == 6
        assert requests.get("GET /v1/tasks/{id}", 0) == before


@pytest.mark.looptime
async def test_a_wait_by_id_knows_the_estimate_of_a_task_that_this_client_submitted(api_key: str) -> None:
    """Only the answer to the submission tells it; the web backend keeps just the id."""
    async with virtual_service(api_key, seed=5, speed=30) as (emulator, http_client):
        async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client) as client:
            task = await client.videos.submit(model="seedance-2.0-text-to-video", prompt="a harbour")
            await client.tasks.wait(task.id)
            (post,) = emulator.book()["posts"]
            assert post["first_told_at"] - post["finished_at"] < 1.5
        async with AsyncEvoLink(base_url="http://127.0.0.1", http_client=http_client) as stranger:
            assert not stranger._core.memory.reads.submitted


async def test_tasks_whose_answers_tell_the_same_share_an_expectation_until_something_else_is_learned_or_asked() -> (
    None
):
    told = {"model": "m", "type": "image", "task_info": {"estimated_time": 100}, "usage": {"credits_reserved": 2}}
    others = [told | {"model": "n"}, told | {"task_info": {"estimated_time": 50}}, told | {"usage": {}}]
    elsewhere, schedule = Schedule(), Schedule()
    elsewhere.expect(class_of("image", "m", 2.0, None), 100)

    async with watching(FakeReader(running), schedule=schedule) as watcher:

        def expected(number: int, wire: dict[str, Any]) -> Expectation:
            watcher.follow(TaskReading({"id": f"task-{number}"} | wire), Ear(), age=0.0)
            expectation = watcher._watched[f"task-{number}"].expectation
            assert expectation is not None
            return expectation

        first = expected(1, told)
        assert expected(2, told) is first
        different = {expected(3 + number, wire) for number, wire in enumerate(others)}
        assert len(different) == 3
        assert first not in different
        assert expected(6, told) is first
        schedule.restore(elsewhere.export())
        restored = expected(7, told)
        assert restored is not first
        assert restored is schedule.expect(class_of("image", "m", 2.0, None), 100)
