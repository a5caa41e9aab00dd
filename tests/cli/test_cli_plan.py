"""`run --dry-run`: what a run would do, and that the run then does it."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from cli_ledgers import put
from cli_process import command, environment, images, write_lines
from pydantic_core import from_json

from evolink_async import ImageRequest, VideoRequest
from evolink_async.cli.plan import Experience, Plan, decide, make_plan, note
from evolink_async.emulator import Emulator
from evolink_async.ledger import Todo, open_job

MODEL = "krea-2-turbo"
PRICE = 2.5  # the emulator's, of this model


def plan(**options: Any) -> Plan:
    return Plan(**{"per_second": None, "max_outstanding": 1000, "max_credits": None} | options)


def planned(experience: Experience, *counts: tuple[str, int], **options: Any) -> Plan:
    """A plan to send so many requests of each model."""
    made = plan(**options)
    for model, count in counts:
        for number in range(count):
            note(made, experience, ImageRequest(model=model, prompt=f"{number:03}"), Todo.SUBMIT)
    return made


def price_of(model: str) -> dict[str, Decimal]:
    from evolink_async.pool.pricing import price_class

    return {price_class(ImageRequest(model=model, prompt="000")): Decimal("2.5")}


# The numbers


@pytest.mark.parametrize(
    ("budget", "enough", "left"), [(None, None, None), (24, False, "-1"), (25, True, "0"), (26, True, "1")]
)
def test_a_budget_is_held_against_what_the_prices_add_up_to(budget: Any, enough: Any, left: Any) -> None:
    made = planned(Experience(price_of(MODEL)), (MODEL, 10), max_credits=budget and Decimal(budget))
    assert (made.credits, made.unpriced, made.enough) == (Decimal(25), 0, enough)
    assert made.left == (left and Decimal(left))


def test_what_earlier_runs_hold_is_no_longer_in_the_budget() -> None:
    made = planned(Experience(price_of(MODEL)), (MODEL, 10), max_credits=Decimal(30))
    made.spent, made.reserved = Decimal(4), Decimal(2)
    assert (made.enough, made.left) == (False, Decimal(-1))


def test_without_a_price_nothing_is_promised() -> None:
    made = planned(Experience(price_of(MODEL)), (MODEL, 2), ("gpt-4o-image", 3), max_credits=Decimal(100))
    assert (made.credits, made.unpriced, made.enough, made.first_unpriced) == (Decimal(5), 3, None, 2)
    assert planned(Experience(), (MODEL, 2)).credits is None
    assert planned(Experience(price_of(MODEL)), (MODEL, 2), ("gpt-4o-image", 3), max_credits=Decimal(4)).enough is False


def test_the_time_is_that_of_the_pace_or_of_the_places_and_of_the_last_task() -> None:
    ten_seconds = Experience(seconds={MODEL: 10.0})
    by_pace = planned(ten_seconds, (MODEL, 100), per_second=2.0)
    assert (by_pace.sending, by_pace.seconds) == (50, 60)
    by_places = planned(ten_seconds, (MODEL, 100), per_second=100.0, max_outstanding=5)
    assert by_places.seconds == pytest.approx(200)
    alone = planned(ten_seconds, (MODEL, 1), per_second=1000.0, max_outstanding=1)
    assert alone.seconds == pytest.approx(10, abs=0.1)
    assert plan().seconds == 0


def test_a_duration_is_that_of_earlier_runs_else_documented_else_usual() -> None:
    seen = Experience(seconds={MODEL: 7.5})
    assert seen.taken_by("image", MODEL) == (7.5, "ledger")
    assert Experience().taken_by("image", MODEL) == (45.0, "catalogue")
    assert Experience().taken_by("video", "unheard-of") == (180.0, "usual")


async def test_each_state_of_the_ledger_is_planned_as_a_run_would_treat_it(tmp_path: Path) -> None:
    request = ImageRequest(model=MODEL, prompt="a")
    todos = {
        "entered": Todo.SUBMIT,
        "sending": Todo.SETTLE,
        "unsettled": Todo.SETTLE,
        "accepted": Todo.FOLLOW,
        "twice": Todo.FOLLOW,
        "completed": Todo.DELIVER,
        "failed": Todo.DELIVER,
    }
    job = await open_job(tmp_path / "job.db")
    rows = {state: await put(job, state, state) for state in todos}
    assert {state: decide(request, row.content, row, 0) for state, row in rows.items()} == todos
    refused = {state: decide(request, b"another body", row, 0) for state, row in rows.items()}
    assert refused == dict.fromkeys(todos, Todo.REFUSE) | {"entered": Todo.SUBMIT}
    assert decide(request, b"new", None, 0) is Todo.SUBMIT
    rows["failed"].fate = rows["failed"].fate._replace(error_code="service_error")
    assert decide(request, rows["failed"].content, rows["failed"], 1) is Todo.SUBMIT
    await job.aclose()


async def test_what_got_no_answer_is_not_promised_to_be_settled(tmp_path: Path) -> None:
    from evolink_async.ledger import Entry
    from evolink_async.pool.identity import content_hash

    request = ImageRequest(model=MODEL, prompt="picture 0")
    (tmp_path / "out").mkdir()
    job = await open_job(tmp_path / "out/job.db")
    row = (await job.enter(Entry("k0", content_hash(request), request.endpoint, request.model))).row
    assert await job.intend(row, idempotency_key="ea-" + "0" * 32, body=b"{}", fingerprint="0", at=_now()) is None
    await job.unsettled(row, code=None, error="the connection was cut")
    await job.aclose()
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    result = await command("run", file, "--out", tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert (
        "1 request sent without an answer: sent again under the same key where that is still allowed" in result.stderr
    )


async def test_equal_requests_without_a_key_are_told_apart_by_how_many_came_before(tmp_path: Path) -> None:
    import asyncio

    from evolink_async.ledger import Entry
    from evolink_async.pool.identity import content_hash

    request = ImageRequest(model=MODEL, prompt="a")
    job = await open_job(tmp_path / "job.db")
    entry = Entry(None, content_hash(request), request.endpoint, request.model)
    for known in await asyncio.gather(job.enter(entry), job.enter(entry)):
        assert known.row.identity.startswith(entry.content.hex())
        sent = job.intend(known.row, idempotency_key=f"ea-{known.row.id:032x}", body=b"{}", fingerprint="0", at=_now())
        assert await sent is None
        await job.accepted(known.row, f"task-unified-{known.row.id}", reserved=None, at=_now())
    await job.aclose()
    made = plan()
    await asyncio.to_thread(make_plan, made, {("image", MODEL): 3}, [request] * 3, tmp_path / "job.db", 0)
    assert (made.todo[Todo.FOLLOW], made.todo[Todo.SUBMIT]) == (2, 1)


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


def test_a_model_of_two_kinds_is_two_lines() -> None:
    made = plan()
    note(made, Experience(), ImageRequest(model="unheard-of", prompt="a"), Todo.SUBMIT)
    note(made, Experience(), VideoRequest(model="unheard-of", prompt="a"), Todo.SUBMIT)
    assert [(model.kind, model.seconds) for model in made.models.values()] == [("image", 30), ("video", 180)]


# The command


async def test_a_run_does_what_the_dry_run_said(api_key: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = write_lines(tmp_path / "first.jsonl", *images(4))
    rows = images(9)
    rows[1]["prompt"] = "another picture"  # k1 is paid for: its key is refused
    second = write_lines(tmp_path / "second.jsonl", *rows, {"model": "gpt-4o-image", "prompt": "a", "n": 2})
    async with Emulator(speed=100, seed=1, api_key=api_key).serve() as server:
        options = ("--out", out, "--rate", "100/s")
        assert (await command("run", first, *options, server=server)).code == 0
        before = {file.name: file.read_bytes() for file in out.iterdir() if "job.db-" not in file.name}
        no_key = environment(server, EVOLINK_API_KEY=None)
        said = await command("run", second, *options, "--dry-run", "--json", "--max-credits", 11, env=no_key)
        assert said.code == 0
        assert {file.name: file.read_bytes() for file in out.iterdir() if "job.db-" not in file.name} == before
        assert len(server.emulator.book()["posts"]) == 4
        told = from_json(said.stdout)
        assert told["todo"] == {"submit": 6, "settle": 0, "hold": 0, "follow": 0, "deliver": 3, "refuse": 1}
        assert told["delivered"] == {"completed": 3}
        assert told["credits"] == {
            "estimated": 5 * PRICE,
            "unpriced": 1,
            "spent": 4 * PRICE,
            "reserved": 0,
            "max": 11,
            "enough": False,
        }
        assert [(model["model"], model["to_send"], model["seconds_from"]) for model in told["models"]] == [
            (MODEL, 5, "ledger"),
            ("gpt-4o-image", 1, "catalogue"),
        ]
        for words in ("6 requests would be sent", "3 requests known from earlier runs", "1 request rejected"):
            assert words in said.stderr
        assert "about 12.5 credits for 5 of them" in said.stderr
        assert "unknown for 1 request (gpt-4o-image)" in said.stderr
        assert "11.5 too few" in said.stderr

        ran = await command("run", second, *options, "--json", server=server)
        assert len(server.emulator.book()["posts"]) == 4 + told["to_send"]
        assert sum(from_json(line)["status"] == "rejected" for line in ran.stdout.splitlines()) == 1
        done = from_json((await command("run", second, *options, "--dry-run", "--json", env=no_key)).stdout)
        assert (done["to_send"], done["credits"]["estimated"], done["seconds"]["estimated"]) == (0, 0, 0)


async def test_a_dry_run_of_a_bad_file_tells_what_is_bad_and_ends_with_2(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(2), {"model": "gpt-4o-image", "prompt": "a", "n": 3})
    result = await command("run", file, "--dry-run", "--json", env=environment(EVOLINK_API_KEY=None))
    told = from_json(result.stdout)
    assert (result.code, told["acceptable"], told["requests"], told["to_send"]) == (2, False, 2, 0)
    assert [entry["line"] for entry in told["bad"]] == [3]
    skipped = await command("run", file, "--dry-run", "--skip-bad", env=environment(EVOLINK_API_KEY=None))
    assert (skipped.code, "1 bad line left out" in skipped.stderr) == (0, True)


async def test_a_dry_run_into_a_folder_that_a_run_would_refuse_says_so(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *images(1))
    (tmp_path / "out").mkdir()
    write_lines(tmp_path / "out/results.jsonl", {"key": "k0"})
    result = await command("run", file, "--dry-run", "--out", tmp_path / "out")
    assert (result.code, "choose a new folder" in result.stderr) == (2, True)
    (tmp_path / "out/job.db").write_bytes(b"no ledger at all" * 100)
    result = await command("run", file, "--dry-run", "--out", tmp_path / "out")
    assert result.code == 2
    assert "job.db" in result.stderr
