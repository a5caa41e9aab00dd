"""Local files in requests: uploaded just before the POST, removed after the task, none of them wrongly."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from loop_executor import in_loop
from pool_world import MODEL, Handler, World, answering, drain, image, now, turns, world
from uploads_world import FILES, UPLOAD, FilesSeen, edit, picture, without_threads

from evolink_async import (
    AsyncEvoLink,
    AuthenticationError,
    BadRequestError,
    ConnectionFailedError,
    ImageRequest,
    InvalidRequestError,
    NotSubmittedError,
    Outcome,
    RateLimitError,
    clock,
)
from evolink_async.emulator import Fault
from evolink_async.pool.pricing import price_class

pytestmark = pytest.mark.looptime

ROWS = int(os.environ.get("UPLOAD_ROWS", "1000"))


@pytest.fixture(autouse=True)
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)
    without_threads(monkeypatch)
    start = datetime(2026, 11, 20, 12, tzinfo=UTC)
    monkeypatch.setattr(clock, "now", lambda: start + timedelta(seconds=now()))


@asynccontextmanager
async def watched(
    api_key: str, client_options: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[World, FilesSeen]]:
    """A world whose files are watched; every link was alive when it was sent."""
    async with world(api_key, client_options, **options) as w:
        seen = FilesSeen(w)
        yield w, seen
    assert seen.dead == []


@asynccontextmanager
async def restarted(w: World, api_key: str, **options: Any) -> AsyncIterator[AsyncEvoLink]:
    """The client of another process."""
    async with httpx.AsyncClient(transport=w.wire) as http_client:  # noqa: SIM117
        async with AsyncEvoLink(api_key, base_url="http://127.0.0.1", http_client=http_client, **options) as client:
            yield client


def fill(seen: FilesSeen, count: int) -> list[str]:
    """Files of somebody else; their ids."""
    files = [seen.store._store(picture(f"foreign {n}"), f"foreign-{n}.png", "", "", now()) for n in range(count)]
    return [file.id for file in files]


async def test_a_cool_down_over_an_hour_that_begins_during_an_upload_ends_the_pool(api_key: str) -> None:
    slow = Fault(path=UPLOAD, delay=20)
    refusal = Fault(method="POST", path="/v1/images", status=429, headers={"retry-after": "9000"})
    async with watched(api_key, faults=[slow, refusal]) as (w, seen):
        with pytest.raises(RateLimitError):  # noqa: PT012
            async with w.pool([edit(picture(1))]) as pool:
                await asyncio.sleep(3)
                with pytest.raises(RateLimitError):
                    await w.client.submit(image(1), timeout=60)
                (outcome,) = await drain(pool)
        assert outcome.status == "not_submitted"
        assert now() < 30
        await asyncio.sleep(10)
        assert seen.stored == 0


@pytest.mark.parametrize("path", [f"{FILES}/quota", UPLOAD])
async def test_what_a_users_transport_raises_beside_exceptions_leaves_no_request_hanging(
    api_key: str, path: str
) -> None:
    """A test that fails inside its own transport raises what is no Exception."""
    async with watched(api_key) as (w, _), asyncio.timeout(900):

        async def failing(request: httpx.Request, go_on: Handler) -> httpx.Response:
            if request.url.path == path:
                pytest.fail("this may not be asked for")
            return await go_on(request)

        w.wire.tamper = failing
        async with w.pool([edit(picture(1)), image(2)]) as pool:
            outcomes = await drain(pool)
    told = {outcome.index: outcome.status for outcome in outcomes}
    assert told == {0: "rejected" if path == UPLOAD else "completed", 1: "completed"}


# --- the quota --------------------------------------------------------------------------------------------------


async def test_a_job_of_many_pictures_runs_through_a_quota_of_a_hundred_files(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        async with w.pool(edit(picture(n), n, key=f"k{n}") for n in range(ROWS)) as pool:
            outcomes = await drain(pool)
        assert [outcome.ok for outcome in outcomes] == [True] * ROWS
        assert len(w.book) == len(w.wire.posts) == seen.uploads == ROWS
        assert seen.most <= 100
        assert seen.full == 0
        await asyncio.sleep(1)
        assert seen.stored == 0
        questions = w.wire.reads.count(f"{FILES}/quota")
        assert questions <= 5 + now() / 30  # places are counted, not asked for
        print(
            f"{ROWS} rows: {seen.uploads} uploads, {len(w.wire.posts)} POSTs, at most {seen.most} files, {seen.stored} "
            f"left, {seen.full} uploads refused, {questions} questions for the quota, {now():.0f} s of virtual time"
        )


async def test_a_quota_full_of_others_files_is_waited_out_while_requests_without_files_go_on(
    api_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(api_key) as (w, seen):
        foreign = fill(seen, 100)
        async with w.pool(max_outstanding=10) as pool:
            pool.add(edit(picture(n), n, key=f"edit {n}") for n in range(20))
            pool.add(image(n, key=f"plain {n}") for n in range(20))
            done = [await anext(pool) for _ in range(20)]
            assert {str(outcome.key)[:5] for outcome in done} == {"plain"}
            await asyncio.sleep(3600)
            assert seen.uploads == 100
            warnings = [record for record in caplog.records if "taken by files" in record.message]
            assert len(warnings) == 1
            assert "client.files.delete" in warnings[0].message
            assert seen.full == 0
            for file_id in foreign[:2]:
                seen.store.delete(file_id, now())
            assert all(outcome.ok for outcome in await drain(pool))
        assert len(w.book) == 40
        await asyncio.sleep(1)
        assert seen.stored == 98


async def test_a_quota_that_is_smaller_than_it_was_said_to_be_is_waited_out_too(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        async with w.pool((edit(picture(n), n) for n in range(150)), max_outstanding=40) as pool:
            first = await anext(pool)
            seen.store.max_files = 10
            rest = await drain(pool)
        assert first.ok
        assert all(outcome.ok for outcome in rest)
        assert len(w.book) == 150
        assert 0 < seen.full < 20  # told by refusals, which are not waited out by trying


async def test_requests_of_several_files_never_wait_for_each_other(api_key: str) -> None:
    uploads = 0

    async def third_is_slow(request: httpx.Request, go_on: Handler) -> httpx.Response:
        nonlocal uploads
        uploads += request.url.path == UPLOAD
        if uploads == 3:
            await asyncio.sleep(5)  # the next request has a place that the first one needs
        return await go_on(request)

    def several(n: int) -> ImageRequest:
        return ImageRequest(model=MODEL, prompt=f"{n}", image_urls=[picture(f"{n} {part}") for part in range(3)])

    async with world(api_key, faults=[Fault(path=f"{FILES}/quota", status=404)]) as w:
        w.wire.tamper = third_is_slow
        seen = FilesSeen(w)
        seen.store.max_files = 4
        async with asyncio.timeout(10_000):
            outcomes = await w.client.run_many(map(several, range(12)))
        assert all(outcome.ok for outcome in outcomes)
        assert len(w.book) == 12
        assert seen.full
        assert seen.dead == []


async def test_a_request_of_more_files_than_an_account_may_have_is_rejected(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        seen.store.max_files = 2
        request = ImageRequest(model=MODEL, prompt="x", image_urls=[picture(n) for n in range(3)])
        (outcome,) = await w.client.run_many([request])
        assert outcome.status == "rejected"
        assert "3 local files" in str(outcome.error)
        assert seen.uploads == 0


async def test_a_service_that_does_not_tell_its_quota_is_tried(api_key: str) -> None:
    async with watched(api_key, faults=[Fault(path=f"{FILES}/quota", status=404)]) as (w, seen):
        seen.store.max_files = 7
        outcomes = await w.client.run_many([edit(picture(n), n) for n in range(40)])
        assert all(outcome.ok for outcome in outcomes)
        assert len(w.book) == 40
        assert seen.most == 7


@pytest.mark.parametrize("how", ["stop", "leave", "close"])
async def test_nothing_hangs_that_waits_for_a_full_quota(api_key: str, how: str) -> None:
    async with watched(api_key) as (w, seen):
        fill(seen, 100)
        async with w.pool(edit(picture(n), n) for n in range(5)) as pool:
            await asyncio.sleep(100)
            if how == "stop":
                pool.stop()
            elif how == "close":
                await w.client.aclose()
            if how != "leave":
                try:
                    outcomes = await drain(pool)
                finally:
                    pool._engine.reason = None
                assert {outcome.status for outcome in outcomes} == {"not_submitted"}
                assert isinstance(outcomes[0].error, NotSubmittedError)
        assert pool.leftovers == []
        assert w.wire.posts == []
        assert seen.uploads == 100


async def test_a_run_goes_ahead_of_requests_that_wait_for_the_quota(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        fill(seen, 100)
        async with w.pool((edit(picture(n), n) for n in range(50)), max_outstanding=1) as pool:
            await asyncio.sleep(10)
            outcome = await pool.run(image("urgent"))
            assert outcome.ok
            pool.stop()
            assert all(outcome.status == "not_submitted" for outcome in await drain(pool))


# --- what is sent -----------------------------------------------------------------------------------------------


async def test_equal_content_is_uploaded_once_for_all_who_use_it_and_removed_after_the_last(
    api_key: str, tmp_path: Path
) -> None:
    path = tmp_path / "style.png"
    path.write_bytes(picture("style"))
    async with watched(api_key) as (w, seen):
        sources = [path, picture("style"), tmp_path / "." / "style.png"]
        async with w.pool(edit(sources[n % 3], n) for n in range(60)) as pool:
            async for _ in pool:
                if pool.stats.outstanding:
                    assert seen.stored == 1
        await asyncio.sleep(1)
        assert seen.uploads == 1
        assert len({link for links in seen.links for link in links}) == 1
        assert seen.stored == 0


async def test_files_are_found_wherever_a_link_is_wanted(api_key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture("a"))
    request = ImageRequest(
        model="house-model",
        prompt="x",
        image_urls=["https://example.com/b.png", path],
        mask_url=picture("mask"),
        image_start=picture("start"),
        model_params={"references": [{"image_url": picture("c")}, {"url": path}]},
    )
    bodies = []

    async def keep(posted: httpx.Request, go_on: Handler) -> httpx.Response:
        if posted.url.path.endswith("/generations"):
            bodies.append(json.loads(await posted.aread()))
        return await go_on(posted)

    async with world(api_key) as w:
        w.wire.tamper = keep
        seen = FilesSeen(w)
        await w.client.run_many([request])
        (body,) = bodies
        assert body["image_urls"][0] == "https://example.com/b.png"
        assert body["model_params"]["references"][1]["url"] == body["image_urls"][1]
        assert seen.uploads == 4
        names = [body["image_urls"][1], body["mask_url"], body["image_start"]]
        assert len({*names, body["model_params"]["references"][0]["image_url"]}) == 4
    assert request.body()["image_urls"][1] is path  # the request itself is as it was


async def test_a_lost_response_is_sent_again_with_the_same_link_while_its_file_is_there(api_key: str) -> None:
    faults = [Fault(method="POST", path="/v1/images", drop="after", nth=(1,))]
    async with watched(api_key, faults=faults) as (w, seen):
        (outcome,) = await w.client.run_many([edit(picture(1))])
        assert outcome.ok
        assert len(w.wire.posts) == 2
        assert len(w.book) == 1
        assert seen.links[0] == seen.links[1]
        assert seen.uploads == 1


@pytest.mark.parametrize("how", ["unknown", "unfinished", "left"])
async def test_a_file_that_a_task_may_still_need_is_not_removed(api_key: str, how: str) -> None:
    faults = [Fault(method="POST", path="/v1/images", drop="after")] if how == "unknown" else []
    options = {"task_timeout": 1} if how == "unfinished" else {}
    async with watched(api_key, {"on_lost_response": "hold"}, faults=faults) as (w, seen):
        async with w.pool(edit(picture(1)), **options) as pool:
            if how == "left":
                await asyncio.sleep(3)
            else:
                (outcome,) = await drain(pool)
                assert outcome.status == how
        assert len(w.book) == 1
        await asyncio.sleep(100)
        assert seen.stored == 1


async def test_a_file_is_removed_after_a_task_that_failed(api_key: str) -> None:
    async with watched(api_key, failure_share=1) as (w, seen):
        (outcome,) = await w.client.run_many([edit(picture(1))])
        assert outcome.status == "failed"
        await asyncio.sleep(1)
        assert seen.stored == 0


async def test_a_failed_task_that_is_generated_again_has_its_files_again(api_key: str) -> None:
    async with watched(api_key, failure_share=0.9, seed=5) as (w, seen):
        outcomes = await w.client.run_many([edit(picture(n), n) for n in range(10)], retry_failed=3)
        assert len(w.book) > 10
        assert len(outcomes) == 10
        await asyncio.sleep(1)
        assert seen.stored == 0


async def test_a_removal_that_fails_delays_nobody_and_is_tried_again(api_key: str) -> None:
    async with watched(api_key, faults=[Fault(method="DELETE", status=503, delay=5, nth=(1, 2))]) as (w, seen):
        begun = now()
        async with w.pool(edit(picture(1))) as pool:
            (outcome,) = await drain(pool)
            ended = now()
        assert outcome.ok
        assert outcome.finished_at is not None
        assert ended - begun == pytest.approx(now() - begun)
        assert seen.stored == 1
        await asyncio.sleep(30)
        assert seen.stored == 0


async def test_a_files_own_upload_of_the_caller_is_used_and_never_removed(
    api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(api_key) as (w, seen):
        mine = await w.client.files.upload(picture(1))
        later = mine.model_copy(update={"expires_at": datetime.now(UTC) + timedelta(hours=70)})
        uploaded = w.client._core.memory.uploaded
        uploaded.update(dict.fromkeys(uploaded, later))
        outcomes = await w.client.run_many([edit(picture(1)), edit(mine.url), edit(picture(2))])
        assert all(outcome.ok for outcome in outcomes)
        assert [links == [mine.url] for links in seen.links].count(True) == 2
        await asyncio.sleep(1)
        assert seen.uploads == 2
        assert seen.content(mine.url) == picture(1)


async def test_another_programs_upload_of_the_same_content_is_not_removed(api_key: str) -> None:
    async with watched(api_key) as (w, seen), restarted(w, api_key) as other:
        theirs = await other.files.upload(picture(1))
        (outcome,) = await w.client.run_many([edit(picture(1))])
        assert outcome.ok
        await asyncio.sleep(1)
        assert seen.content(theirs.url) == picture(1)


# --- refused before anything is sent ------------------------------------------------------------------------------


async def test_what_cannot_be_uploaded_is_rejected_by_its_parameters_name(api_key: str, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_bytes(b"<html>")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    wrong = {
        "missing.png": "No such file",
        ".": "no regular file",
        "page.png": "no image, video or audio",
        "empty.png": "is empty",
        "clip.mp4": "holds video, where image is wanted",
    }
    async with watched(api_key) as (w, seen):
        for name, why in wrong.items():
            request = edit(tmp_path / name)
            (outcome,) = await w.client.run_many([request])
            assert outcome.status == "rejected"
            error = outcome.error
            assert isinstance(error, InvalidRequestError)
            assert error.param == "image_urls"
            assert f"image_urls[0]: {'' if name != 'page.png' else repr(name)}" in str(error)
            assert why in str(error)
            with pytest.raises(InvalidRequestError, match=why):
                await w.client.run(request)
        bad_number = ImageRequest(model="house-model", image_url=picture(1), strength=float("nan"))
        assert (await w.client.run_many([bad_number]))[0].status == "rejected"
        elsewhere = ImageRequest(model="house-model", style=picture(1))
        (outcome,) = await w.client.run_many([elsewhere])
        assert "*_url" in str(outcome.error)
        assert w.wire.posts == []
        assert seen.uploads == 0
        assert w.wire.reads == []


async def test_a_file_that_changes_before_it_is_uploaded_is_not_sent(api_key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(1))
    async with watched(api_key) as (w, seen):
        seen.store.max_files = 1
        (foreign,) = fill(seen, 1)
        async with w.pool([edit(path, 1), edit(picture(1), 2)]) as pool:
            await asyncio.sleep(5)  # it was looked at, and waits
            path.write_bytes(picture(2))
            seen.store.delete(foreign, now())
            outcomes = {outcome.index: outcome for outcome in await drain(pool)}
        assert outcomes[0].status == "rejected"
        assert "changed" in str(outcomes[0].error)
        assert outcomes[1].ok  # its own content is what it was
        assert len(w.book) == 1
        assert seen.uploads == 2


async def test_a_file_that_the_service_refuses_is_rejected(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        seen.store.max_bytes = 10
        (outcome,) = await w.client.run_many([edit(picture(1))])
        assert outcome.status == "rejected"
        assert isinstance(outcome.error, BadRequestError)
        assert (outcome.error.code, outcome.error.param) == ("40001", "image_urls")
        assert w.wire.posts == []


async def test_an_upload_that_fails_is_tried_again(api_key: str) -> None:
    answers = iter([(503, {}), (429, {}), (500, {}), (429, {})] * 3)

    def rule(request: httpx.Request) -> tuple[int, Any] | None:
        return next(answers, None) if request.url.path == UPLOAD else None

    async with world(api_key) as w:
        w.wire.tamper = answering(rule)
        seen = FilesSeen(w)
        (outcome,) = await w.client.run_many([edit(picture(1))])
        assert outcome.ok
        assert seen.uploads == len(w.book) == 1


async def test_a_files_service_that_is_dead_rejects_after_the_patience_for_connections(api_key: str) -> None:
    async def dead(request: httpx.Request, go_on: Handler) -> httpx.Response:
        if request.url.path == UPLOAD:
            raise httpx.ConnectError("dead")
        return await go_on(request)

    async with world(api_key) as w:
        w.wire.tamper = dead
        begun = now()
        async with w.pool([edit(picture(1)), image()]) as pool:
            outcomes = {outcome.index: outcome async for outcome in pool}
        assert outcomes[1].ok
        assert outcomes[0].status == "rejected"
        assert isinstance(outcomes[0].error, ConnectionFailedError)
        assert 120 <= now() - begun < 300


async def test_no_access_at_the_files_service_ends_the_pool(api_key: str) -> None:
    async with world(api_key) as w:
        w.wire.tamper = answering(
            lambda request: (401, {"code": 401, "msg": "no"}) if request.url.path == UPLOAD else None
        )
        outcomes: list[Outcome] = []
        with pytest.raises(AuthenticationError):
            async with w.pool([edit(picture(n), n) for n in range(5)]) as pool:
                outcomes = await drain(pool)
        assert {outcome.status for outcome in outcomes} == {"not_submitted"}
        assert w.wire.posts == []


# --- the ledger ---------------------------------------------------------------------------------------------------


async def test_the_same_content_is_the_same_request_in_every_run(api_key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(1))
    ledger = tmp_path / "job.db"
    async with watched(api_key) as (w, _seen):
        first = (await w.client.run_many([edit(path)], ledger=ledger))[0]
        path.rename(tmp_path / "b.png")
        for source in ("bytes", "renamed", "link"):
            async with restarted(w, api_key) as client:
                given: Any = {"bytes": picture(1), "renamed": tmp_path / "b.png"}.get(source)
                if source == "link":
                    given = (await client.files.upload(picture(1))).url
                (again,) = await client.run_many([edit(given)], ledger=ledger)
                assert again.identity == first.identity, source
                assert again.from_ledger
        assert len(w.book) == 1
        (other,) = await w.client.run_many([edit(picture(2))], ledger=ledger)
        assert other.identity != first.identity
        assert len(w.book) == 2


async def test_a_link_made_from_a_link_counts_as_that_link(api_key: str, tmp_path: Path) -> None:
    async with watched(api_key) as (w, _seen):
        source = (await w.client.files.upload(picture(1))).url
        links = [(await w.client.files.upload(source)).url for _ in range(2)]
        assert links[0] != links[1]
        outcomes = [(await w.client.run_many([edit(link)], ledger=tmp_path / "job.db"))[0] for link in links]
        assert outcomes[0].identity == outcomes[1].identity
        assert len(w.book) == 1


async def test_a_key_with_another_picture_is_another_request(api_key: str, tmp_path: Path) -> None:
    async with watched(api_key) as (w, _seen):
        assert (await w.client.run_many([edit(picture(1), key="k")], ledger=tmp_path / "job.db"))[0].ok
        (outcome,) = await w.client.run_many([edit(picture(2), key="k")], ledger=tmp_path / "job.db")
        assert outcome.status == "rejected"
        assert "another body" in str(outcome.error)
        assert len(w.book) == 1


async def test_a_job_left_in_the_middle_is_finished_with_one_task_for_each(api_key: str, tmp_path: Path) -> None:
    def rows() -> list[ImageRequest]:
        return [edit(picture(n), n) for n in range(60)]

    async with watched(api_key) as (w, _seen):
        async with w.pool(rows(), ledger=tmp_path / "job.db", max_outstanding=20) as pool:
            for _ in range(15):
                await anext(pool)
        async with restarted(w, api_key) as client, client.pool(rows(), ledger=tmp_path / "job.db") as again:
            outcomes = await drain(again)
        assert all(outcome.ok for outcome in outcomes)
        assert len(outcomes) == len(w.book) == 60


async def test_what_was_sent_before_a_crash_is_sent_again_with_the_link_of_then(api_key: str, tmp_path: Path) -> None:
    faults = [Fault(method="POST", path="/v1/images", drop="after", nth=(1,))]
    async with watched(api_key, faults=faults) as (w, seen):
        async with w.pool(edit(picture(1)), ledger=tmp_path / "job.db") as pool:
            await asyncio.sleep(1)  # its answer is lost, and it is left before it may be sent again
        assert [outcome.status for outcome in pool.leftovers] == ["unknown"]
        async with restarted(w, api_key) as client:
            (outcome,) = await client.run_many([edit(picture(1))], ledger=tmp_path / "job.db")
        assert outcome.ok
        assert len(w.book) == 1
        assert seen.links[0] == seen.links[1]
        assert seen.uploads == 1


async def test_the_budget_holds_for_requests_with_files(api_key: str, tmp_path: Path) -> None:
    async with watched(api_key) as (w, seen):
        async with w.pool(
            (edit(picture(n), n) for n in range(40)), ledger=tmp_path / "job.db", max_credits=100
        ) as pool:
            outcomes = await drain(pool)
            pool._engine.reason = None
        counts = Counter(outcome.status for outcome in outcomes)
        assert counts["completed"] > 2
        assert sum(outcome.credits or 0 for outcome in outcomes) <= 100
        await asyncio.sleep(1)
        assert seen.stored == 0


def test_a_file_costs_what_a_link_costs() -> None:
    link = "https://example.com/a.png"
    for file in (Path("a.png"), b"x" * 100):
        assert price_class(edit(file)) == price_class(edit(link))
        one = ImageRequest(model=MODEL, prompt="x", mask_url=file)
        assert price_class(one) == price_class(ImageRequest(model=MODEL, prompt="x", mask_url=link))


# --- single calls -------------------------------------------------------------------------------------------------


async def test_a_single_call_uploads_its_file_and_removes_it_after_the_task(api_key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(1))
    async with watched(api_key) as (w, seen):
        task = await w.client.images.generate(model=MODEL, prompt="x", image_urls=[path])
        assert task.succeeded
        await asyncio.sleep(1)
        assert (seen.uploads, seen.stored) == (1, 0)
        created = await w.client.submit(edit(path))
        await asyncio.sleep(1)
        assert seen.stored == 1  # its task runs
        await w.client.tasks.wait(created)
        await asyncio.sleep(1)
        assert (seen.uploads, seen.stored) == (2, 0)


async def test_the_file_of_a_submitted_task_that_nobody_waits_for_is_removed_too(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        await w.client.submit(edit(picture(1)))
        await asyncio.sleep(1000)
        assert seen.stored == 0


async def test_equal_content_of_single_calls_at_once_is_uploaded_once(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        await asyncio.gather(*(w.client.run(edit(picture(1), n)) for n in range(10)))
        assert len(w.book) == 10
        assert seen.uploads == 1
        await asyncio.sleep(1)
        assert seen.stored == 0


async def test_closing_the_client_removes_no_file_of_a_task_that_goes_on(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        async with restarted(w, api_key) as client:
            await client.submit(edit(picture(1)))
        assert seen.stored == 1
        async with restarted(w, api_key) as client, client.pool([edit(picture(2)), edit(picture(3))]) as pool:
            await asyncio.sleep(3)
            await client.aclose()
            outcomes = await drain(pool)
            pool._engine.reason = None
        assert {outcome.status for outcome in outcomes} == {"unfinished"}
        await asyncio.sleep(100)
        assert seen.stored == len(w.book) == 3


@pytest.mark.parametrize("step", [0, 1, 2, 3, 5, 8, 13, 21, "late"])
async def test_a_cancelled_call_sends_nothing_and_leaves_no_file(api_key: str, step: int | str) -> None:
    async with watched(api_key, faults=[Fault(path=UPLOAD, delay=10)]) as (w, seen):
        calling = asyncio.create_task(w.client.run(edit(picture(1))))
        await (asyncio.sleep(5) if step == "late" else turns(int(step)))
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await asyncio.sleep(60)
        assert w.wire.posts == []
        assert seen.stored == 0


async def test_a_call_cancelled_after_its_post_keeps_the_file_until_the_task_ended(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        calling = asyncio.create_task(w.client.run(edit(picture(1))))
        await asyncio.sleep(2)
        assert len(w.book) == 1
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await asyncio.sleep(1)
        assert seen.stored == 1
        await asyncio.sleep(1000)
        assert seen.stored == 0


async def test_a_full_quota_bounds_a_call_by_its_timeout(api_key: str) -> None:
    async with watched(api_key) as (w, seen):
        fill(seen, 100)
        begun = now()
        with pytest.raises(NotSubmittedError, match="found no place at the files service"):
            await w.client.run(edit(picture(1)), timeout=500)
        assert now() - begun == pytest.approx(500, abs=1)
        assert w.wire.posts == []


@pytest.mark.parametrize("timeout", [5, 50])
async def test_an_unreachable_files_service_bounds_a_call_by_its_timeout(timeout: int, api_key: str) -> None:
    async def dead(request: httpx.Request, go_on: Handler) -> httpx.Response:
        raise httpx.ConnectError("dead")

    async with world(api_key) as w:
        w.wire.tamper = dead
        with pytest.raises(ConnectionFailedError):
            await w.client.run(edit(picture(1)), timeout=timeout)
        assert now() == pytest.approx(timeout, abs=1)


async def test_requests_show_no_bytes_and_survive_a_copy() -> None:
    request = edit(bytes(10_000_000))
    assert len(repr(request)) < 200
    assert "<10000000 bytes>" in repr(request)
    assert request.model_copy().body() == request.body()
