"""What a job has learned is there when it is run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ledger_world import ask, assert_balanced, opened, row_in
from loop_executor import in_loop
from postgres import is_postgres

from evolink_async import ClosedError
from evolink_async.ledger import State, open_job
from evolink_async.ledger.values import LONGEST_LEARNED
from evolink_async.polling.schedule import Schedule, Sightings, TaskClass


@pytest.fixture(autouse=True)
def _without_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)


async def test_the_next_run_finds_the_last_that_was_remembered(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job, opened(path, "other") as other:
        assert job.learned is None
        assert await job.remember('{"a": 1}')
        assert await job.remember('{"a": "\u20ac"}')
        await other.remember("[]")
        await row_in(job, State.COMPLETED, "k")
        assert job.learned is None  # it says what there was when the run began
    async with opened(path) as job, opened(path, "other") as other, opened(path, "third") as third:
        assert (job.learned, other.learned, third.learned) == ('{"a": "\u20ac"}', "[]", None)
        assert job.census.known == 1
    assert_balanced(path)


async def test_a_schedule_that_has_learned_starts_warm(ledger_url: Path | str) -> None:
    path = ledger_url
    schedule, task_class = Schedule(), TaskClass("image", "gpt-4o-image", "1024x1024")
    for _ in range(50):
        task = Sightings(0.0)
        task.unfinished(30.0)
        schedule.expect(task_class, 100.0).over(task, 32.0)
    async with opened(path) as job:
        assert await job.remember(json.dumps(schedule.export()))
    warm = Schedule()
    async with opened(path) as job:
        assert job.learned is not None
        warm.restore(json.loads(job.learned))
    new = Sightings(0.0)
    looks = [one.expect(task_class, 100.0).next_look(new, 0.5) for one in (Schedule(), schedule, warm)]
    assert looks[2] == pytest.approx(looks[1], rel=0.01)  # an export is rounded
    assert looks[2] != pytest.approx(looks[0], rel=0.2)


async def test_what_is_too_long_is_not_kept_and_what_was_there_stays(ledger_url: Path | str) -> None:
    path = ledger_url
    longest = json.dumps("x" * (LONGEST_LEARNED - 2))
    async with opened(path) as job:
        assert await job.remember(longest)
        assert not await job.remember(f"{longest} ")
        assert not await job.remember(json.dumps("\u20ac" * (LONGEST_LEARNED // 3), ensure_ascii=False))
    async with opened(path) as job:
        assert job.learned == longest


@pytest.mark.parametrize("value", ["{", b"\xff", "\0", "", "[" * 200_000], ids=lambda value: repr(value)[:5])
async def test_what_cannot_be_read_is_as_if_never_learned(
    ledger_url: Path | str, value: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if is_postgres(ledger_url) and value in (b"\xff", "\0"):
        return  # it would not take that for a text
    path = ledger_url
    async with opened(path) as job:
        await job.remember("{}")
    ask(path, "UPDATE learned SET value = ?", value)
    async with opened(path) as job:
        assert job.learned is None
        assert await job.remember("[1]")
    assert "cannot be read" in caplog.text
    async with opened(path) as job:
        assert job.learned == "[1]"


async def test_half_of_a_surrogate_pair_is_written_out(ledger_url: Path | str) -> None:
    path = ledger_url
    async with opened(path) as job:
        assert await job.remember('"\ud800"')
    assert ask(path, "SELECT value FROM learned") == [('"\\ud800"',)]


async def test_a_job_in_memory_remembers_nothing() -> None:
    async with opened(None) as job:
        assert (job.learned, await job.remember("{}")) == (None, False)
    with pytest.raises(ClosedError):
        job.remember("{}")


async def test_remembering_writes_no_request_and_other_turns_do_not_write_it_again(ledger_url: Path | str) -> None:
    path = ledger_url
    job = await open_job(path)
    await job.remember("{}")
    ask(path, "UPDATE learned SET value = '[]'")
    await row_in(job, State.ACCEPTED, "k")
    await job.aclose()
    assert ask(path, "SELECT value FROM learned") == [("[]",)]
