"""The pure core: time is a number that the test passes in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async.emulator.answers import Refusal, created_task
from evolink_async.emulator.limits import TokenBucket, hint_headers, hint_text
from evolink_async.emulator.service import Accepted, Service
from evolink_async.emulator.tasks import Task

IMAGE = {"model": "gpt-4o-image", "prompt": "a lighthouse"}  # 2.5 credits, 100 s
LINKS = "http://host/results"


def submit(service: Service, body: dict[str, Any] = IMAGE, *, key: str | None = None, now: float = 0.0) -> Task:
    accepted = service.submit("image", body, key, now)
    assert isinstance(accepted, Accepted), accepted
    return accepted.task


def refused(service: Service, body: object = IMAGE, *, key: str | None = None, now: float = 0.0) -> Refusal:
    refusal = service.submit("image", body, key, now)
    assert isinstance(refusal, Refusal)
    return refusal


def read(service: Service, task: Task, now: float) -> dict[str, Any]:
    answer = service.read(task.id, now, LINKS)
    assert isinstance(answer, dict)
    return answer


# --- a task's life ---------------------------------------------------------------------------------------------


def test_a_task_goes_from_pending_through_processing_to_completed() -> None:
    service = Service()
    task = submit(service)
    looks = [read(service, task, now / 4) for now in range(1200)]
    statuses = [look["status"] for look in looks]
    assert list(dict.fromkeys(statuses)) == ["pending", "processing", "completed"]
    progress = [look["progress"] for look in looks]
    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert all(look["progress"] == 0 for look in looks if look["status"] == "pending")
    assert all("results" not in look for look in looks if look["status"] != "completed")
    assert looks[-1]["results"] == [f"{LINKS}/{task.id}-1.png"]
    assert looks[-1]["task_info"] == {"can_cancel": False}
    assert "usage" not in looks[-1]


def test_the_create_answer_has_the_documented_shape() -> None:
    service = Service()
    accepted = service.submit("video", {"model": "seedance-2.0-text-to-video", "prompt": "x"}, None, 1_774_857_405.7)
    assert isinstance(accepted, Accepted)
    answer = created_task(accepted.task)
    assert answer.pop("id").startswith("task-unified-1774857405-")
    assert answer == {
        "created": 1_774_857_405,
        "model": "seedance-2.0-text-to-video",
        "object": "video.generation.task",
        "progress": 0,
        "status": "pending",
        "type": "video",
        "task_info": {"can_cancel": True, "estimated_time": 165, "video_duration": 5},
        "usage": {"billing_rule": "per_second", "credits_reserved": 67.5, "user_group": "default"},
    }


def test_speed_divides_durations_and_what_the_wire_says_is_real_seconds() -> None:
    slow, fast = Service(speed=1), Service(speed=10)
    one, other = submit(slow), submit(fast)
    assert other.ends_at == pytest.approx(one.ends_at / 10)
    assert (one.estimate, other.estimate) == (100, 10)


def test_the_estimate_is_never_below_a_second() -> None:
    assert created_task(submit(Service(speed=10_000)))["task_info"]["estimated_time"] == 1


def test_most_tasks_end_near_their_estimate() -> None:
    service = Service()
    ends = sorted(submit(service).ends_at for _ in range(400))
    assert 80 < ends[200] < 100
    assert ends[0] > 30
    assert ends[-1] < 250


def test_a_failed_task_says_why_and_costs_nothing() -> None:
    service = Service(failure_share=1, credits=10_000_000)
    task = submit(service)
    assert service.account.reserved == 2_500_000
    answer = read(service, task, 1000.0)
    assert answer["status"] == "failed"
    assert answer["progress"] == 0
    assert set(answer["error"]) == {"code", "message", "type"}
    assert answer["error"]["type"] == "task_error"
    assert "results" not in answer
    service.settle(1000.0)
    assert (service.account.reserved, service.account.spent) == (0, 0)


def test_the_asked_share_of_tasks_fails_with_documented_codes_and_mostly_early() -> None:
    service = Service(failure_share=0.2)
    tasks = [submit(service) for _ in range(1000)]
    failed = [task for task in tasks if task.failure]
    assert 150 < len(failed) < 250
    assert {task.failure for task in failed} == {
        "service_error",
        "content_policy_violation",
        "generation_timeout",
        "resource_exhausted",
    }
    assert sum(task.ends_at < 50 for task in failed) > len(failed) / 2


def test_the_same_seed_gives_equal_requests_the_same_fate_in_whatever_order_they_come() -> None:
    prompts = [f"prompt {n}" for n in range(20)]

    def fates(seed: int, order: list[str]) -> dict[str, Any]:
        service = Service(seed=seed, failure_share=0.5)
        tasks = {prompt: submit(service, {**IMAGE, "prompt": prompt}) for prompt in order}
        return {prompt: (task.id, task.ends_at, task.failure, task.digest) for prompt, task in tasks.items()}

    assert fates(1, prompts) == fates(1, prompts[::-1])
    assert fates(1, prompts) != fates(2, prompts)


def test_equal_requests_become_different_tasks() -> None:
    service = Service()
    assert len({submit(service).id for _ in range(500)}) == 500


# --- money -----------------------------------------------------------------------------------------------------


def test_credits_are_reserved_at_submission_and_spent_at_completion() -> None:
    service = Service(credits=10_000_000)
    task = submit(service, {**IMAGE, "n": 2})
    assert service.credits(1.0)["data"]["user"] == {"remaining_credits": 5.0, "used_credits": 0.0}
    assert service.credits(task.ends_at)["data"]["user"] == {"remaining_credits": 5.0, "used_credits": 5.0}


def test_a_submission_that_does_not_fit_the_balance_is_402_and_leaves_no_task() -> None:
    service = Service(credits=4_000_000)
    submit(service)
    refusal = refused(service)
    assert (refusal.status, refusal.code) == (402, "insufficient_quota")
    assert len(service.book(0.0)["posts"]) == 1


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 120),
            st.sampled_from(["submit", "repeat", "read", "credits", "bad"]),
            st.integers(0, 3),
        ),
        max_size=40,
    ),
    failure_share=st.sampled_from([0.0, 0.3, 1.0]),
    concurrency=st.sampled_from([None, 1, 3]),
)
def test_the_account_always_balances(
    steps: list[tuple[float, str, int]], failure_share: float, concurrency: int | None
) -> None:
    service = Service(credits=30_000_000, failure_share=failure_share, concurrency=concurrency, rate=0.2, burst=5)
    now = 0.0
    for pause, action, n in steps:
        now += pause
        body = {**IMAGE, "prompt": f"p{n}", "n": (1, 2, 4)[n % 3]}
        if action == "submit":
            service.submit("image", body, None, now)
        elif action == "repeat":
            service.submit("image", body, f"key-{n}", now)
        elif action == "bad":
            service.submit("image", {**body, "n": 99}, None, now)
        elif action == "credits":
            service.credits(now)
        book = service.book(now)
        account, posts = book["account"], book["posts"]
        assert account["reserved"] + account["spent"] + account["remaining"] == account["initial"] == 30
        assert account["remaining"] >= 0
        assert account["spent"] == sum(post["charged"] for post in posts)
        unfinished = [post for post in posts if post["status"] in ("pending", "processing")]
        assert account["reserved"] == sum(post["reserved"] for post in unfinished)
        assert all(post["charged"] == (post["reserved"] if post["status"] == "completed" else 0) for post in posts)
        assert concurrency is None or len(unfinished) <= concurrency


# --- idempotency -----------------------------------------------------------------------------------------------


def test_a_repeated_key_returns_the_first_task_and_charges_once() -> None:
    service = Service()
    first = service.submit("image", IMAGE, "ea-1", 0.0)
    again = service.submit("image", dict(reversed(IMAGE.items())), "ea-1", 5.0)
    assert isinstance(first, Accepted)
    assert isinstance(again, Accepted)
    assert not first.replayed
    assert again.replayed
    assert created_task(first.task) == created_task(again.task)
    book = service.book(5.0)
    assert (len(book["posts"]), book["replays"], book["account"]["reserved"]) == (1, 1, 2.5)


def test_a_repeated_key_with_another_body_is_a_conflict() -> None:
    service = Service()
    submit(service, key="ea-1")
    refusal = refused(service, {**IMAGE, "prompt": "another"}, key="ea-1")
    assert (refusal.status, refusal.code) == (409, "idempotency_conflict")
    moved = refused(service, {**IMAGE, "callback_url": "https://example.com/hook"}, key="ea-1")
    assert moved.code == "idempotency_conflict"


def test_a_refused_submission_does_not_use_up_its_key() -> None:
    service = Service(concurrency=1)
    first = submit(service)
    assert refused(service, key="ea-1").status == 429
    submit(service, key="ea-1", now=first.ends_at)


def test_without_idempotency_every_post_is_a_new_paid_task() -> None:
    service = Service(idempotency=False)
    assert submit(service, key="ea-1").id != submit(service, key="ea-1").id
    assert service.book(0.0)["account"]["reserved"] == 5


# --- limits ----------------------------------------------------------------------------------------------------


def test_concurrency_counts_unfinished_tasks_only() -> None:
    service = Service(concurrency=2)
    tasks = [submit(service), submit(service)]
    first_end = min(task.ends_at for task in tasks)
    refusal = refused(service, now=1.0)
    assert (refusal.status, refusal.code, refusal.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert refusal.wait == pytest.approx(first_end - 1.0)
    submit(service, now=first_end)


@given(rate=st.floats(0.1, 50), burst=st.floats(1, 20), pauses=st.lists(st.floats(0, 2), min_size=1, max_size=200))
def test_no_window_holds_more_than_the_burst_and_the_rate(rate: float, burst: float, pauses: list[float]) -> None:
    bucket, now, taken = TokenBucket(rate, burst), 0.0, []
    for pause in pauses:
        now += pause
        if bucket.take(now) == 0:
            taken.append(now)
    for start, at in enumerate(taken):
        for end in range(start, len(taken)):
            assert end - start + 1 <= burst + rate * (taken[end] - at) + 1e-3


@given(rate=st.floats(0.1, 50))
def test_who_waits_exactly_as_told_is_let_in(rate: float) -> None:
    bucket, now = TokenBucket(rate, 1), 1_700_000_000.0
    assert bucket.take(now) == 0
    wait = bucket.take(now)
    assert wait > 0
    assert bucket.take(now + wait + 1e-6) == 0


def test_a_refused_submission_takes_nothing_from_the_rate() -> None:
    bucket = TokenBucket(1, 1)
    assert bucket.take(0.0) == 0
    assert [bucket.take(0.5) for _ in range(10)] == [0.5] * 10
    assert bucket.take(1.0) == 0


def test_hints_never_promise_less_than_the_wait() -> None:
    assert hint_headers("seconds", 1.2, 0.0) == [("retry-after", "2")]
    assert hint_headers("date", 1.2, 1_700_000_000.5) == [("retry-after", "Tue, 14 Nov 2023 22:13:22 GMT")]
    assert hint_headers("ms", 1.2345, 0.0) == [("retry-after-ms", "1235")]
    assert hint_headers("body", 1.2, 0.0) == hint_headers(None, 1.2, 0.0) == []
    assert (hint_text("body", 1.2), hint_text("seconds", 1.2)) == ("retry after 2 seconds", None)


# --- reading ---------------------------------------------------------------------------------------------------


def test_ids_that_cannot_be_are_400_and_unknown_ones_404() -> None:
    service = Service()
    bad, unknown = service.read("abc", 0.0, LINKS), service.read("task-unified-1-abcdefgh", 0.0, LINKS)
    assert isinstance(bad, Refusal)
    assert (bad.status, bad.code, bad.param) == (400, "invalid_task_id", "task_id")
    assert isinstance(unknown, Refusal)
    assert (unknown.status, unknown.code) == (404, "task_not_found")


def test_a_batch_leaves_out_what_is_not_there_and_tells_each_task_once() -> None:
    service = Service()
    tasks = [submit(service) for _ in range(3)]
    ids = [tasks[0].id, "task-unified-1-nothere0", tasks[2].id, tasks[0].id]
    answer = service.read_batch(ids, 0.0, LINKS)
    assert isinstance(answer, dict)
    assert [item["id"] for item in answer["data"]] == [tasks[0].id, tasks[2].id]


@pytest.mark.parametrize("ids", [None, "x", [1], [], ["task-unified-1-a"] * 51])
def test_a_batch_of_anything_but_1_to_50_ids_is_refused(ids: object) -> None:
    refusal = Service().read_batch(ids, 0.0, LINKS)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.param) == (400, "task_ids")


def test_the_list_is_newest_first_in_pages_and_filtered() -> None:
    service = Service()
    tasks = [submit(service, now=float(n)) for n in range(5)]
    video = service.submit("video", {"model": "veo3", "prompt": "x"}, None, 5.0)
    assert isinstance(video, Accepted)

    def listed(now: float = 6.0, **query: str) -> tuple[list[str], int]:
        answer = service.list_tasks(query, now)
        assert isinstance(answer, dict)
        return [row["id"] for row in answer["data"]], answer["total"]

    newest_first = [task.id for task in reversed(tasks)]
    assert listed() == ([video.task.id, *newest_first], 6)
    assert listed(type="image", page="2", page_size="2") == (newest_first[2:4], 5)
    assert listed(model="veo3", status="processing") == ([video.task.id], 1)
    assert listed(status="completed") == ([], 0)
    assert listed(status="completed", type="image", now=1000.0) == (newest_first, 5)
    for wrong in ({"status": "pending"}, {"page": "0"}, {"page_size": "51"}, {"page_size": "x"}):
        assert isinstance(service.list_tasks(wrong, 6.0), Refusal)


def test_the_book_counts_polls_of_unfinished_tasks_and_when_the_end_was_first_told() -> None:
    service = Service()
    task = submit(service, now=100.0)
    for now in (101.0, 102.0, task.ends_at + 3, task.ends_at + 9):
        read(service, task, now)
    [post] = service.book(task.ends_at + 10)["posts"]
    assert post["polls"] == 2
    assert post["time"] == 100.0
    assert post["finished_at"] == task.ends_at
    assert post["first_told_at"] == task.ends_at + 3
    assert service.book(task.ends_at + 10)["status_reads"] == 4


def test_the_book_counts_refusals_by_status_and_code() -> None:
    service = Service(concurrency=1)
    submit(service)
    refused(service)
    refused(service)
    refused(service, {"model": "nope"})
    assert service.book(0.0)["refused"] == {"429": {"rate_limit_exceeded": 2}, "400": {"invalid_request": 1}}


def test_result_files_are_there_from_completion_for_a_day() -> None:
    service = Service(speed=10)
    task = submit(service, {**IMAGE, "n": 2})
    end = task.ends_at
    assert service.result(f"{task.id}-1.png", end - 0.01) is None
    assert service.result(f"{task.id}-2.png", end) == (task, 2, "png")
    assert service.result(f"{task.id}-2.png", end + 8639) is not None
    assert service.result(f"{task.id}-2.png", end + 8640) is None
    for name in ("-0.png", "-3.png", "-x.png", "-1.mp4", ".png", ""):
        assert service.result(f"{task.id}{name}", end) is None


def test_music_has_two_tracks_in_results_and_result_data() -> None:
    service = Service()
    accepted = service.submit("audio", {"model": "suno-v5", "prompt": "a song"}, None, 0.0)
    assert isinstance(accepted, Accepted)
    answer = read(service, accepted.task, 10_000.0)
    assert answer["model"] == "suno-v5-beta"
    assert [track["audio_url"] for track in answer["result_data"]] == answer["results"]
    assert len({track["result_id"] for track in answer["result_data"]}) == 2
    names = Counter(
        url.rpartition("/")[2] for track in answer["result_data"] for url in track.values() if "://" in str(url)
    )
    assert all(service.result(name, 10_000.0) for name in names)


def test_a_designed_voice_has_result_data_and_no_links() -> None:
    body = {"model": "qwen-voice-design", "voice_prompt": "calm", "preview_text": "hello", "preferred_name": "ann"}
    service = Service()
    accepted = service.submit("audio", body, None, 7.0)
    assert isinstance(accepted, Accepted)
    answer = read(service, accepted.task, 10_000.0)
    assert answer["results"] == []
    assert answer["result_data"] == {"voice": "qwen-tts-vd-ann-voice-7"}
