"""How tasks go and how the service speaks, where a user of the emulator may choose. Pure: time is passed in."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async.emulator import Behaviour, Dialect, Emulator
from evolink_async.emulator.answers import Refusal, created_task, error_body
from evolink_async.emulator.service import Accepted, Service
from evolink_async.emulator.tasks import Task

IMAGE = {"model": "gpt-4o-image", "prompt": "a lighthouse"}  # 2.5 credits, 100 s
VIDEO = {"model": "seedance-2.0-text-to-video", "prompt": "waves"}
LINKS = "http://host/results"


def submit(service: Service, body: dict[str, Any] = IMAGE, kind: str = "image", now: float = 0.0) -> Task:
    accepted = service.submit(kind, body, None, now)
    assert isinstance(accepted, Accepted), accepted
    return accepted.task


def read(service: Service, task: Task, now: float) -> dict[str, Any]:
    answer = service.read(task.id, now, LINKS)
    assert isinstance(answer, dict)
    return answer


def with_behaviour(**fields: Any) -> Service:
    return Service(models={"*": fields})


# --- durations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "sigma"), [(0.5, 0.1), (1.0, 0.4), (2.0, 0.8)])
def test_durations_are_lognormal_with_the_chosen_bias_and_spread(bias: float, sigma: float) -> None:
    service = with_behaviour(bias=bias, sigma=sigma)
    logs = [submit(service).ends_at for _ in range(2000)]
    assert statistics.median(logs) == pytest.approx(100 * bias, rel=0.08)
    low, high = sorted(logs)[320], sorted(logs)[1680]  # 16 % and 84 %: one sigma to each side
    assert (high / low) == pytest.approx(2.718 ** (2 * sigma), rel=0.15)


def test_without_spread_and_bias_a_task_takes_exactly_its_estimate() -> None:
    task = submit(with_behaviour(bias=1, sigma=0))
    assert task.ends_at == 100.0


def test_some_tasks_can_be_slower_by_a_factor() -> None:
    service = with_behaviour(bias=1, sigma=0, slow_share=0.3, slow_factor=5)
    ends = [submit(service).ends_at for _ in range(500)]
    assert set(ends) == {100.0, 500.0}
    assert 100 < ends.count(500.0) < 200


def test_an_estimate_can_be_chosen_or_kept_back() -> None:
    task = submit(with_behaviour(estimate=20, bias=1, sigma=0))
    assert task.ends_at == 20
    assert created_task(task)["task_info"]["estimated_time"] == 20
    assert "estimated_time" not in created_task(submit(with_behaviour(tells_estimate=False)))["task_info"]


def test_failures_come_early_or_near_the_end_as_chosen() -> None:
    for early_share, expected in ((1.0, 30), (0.0, 80)):
        service = with_behaviour(bias=1, sigma=0, failure_share=1, early_share=early_share)
        tasks = [submit(service) for _ in range(200)]
        timely = [task for task in tasks if task.failure != "generation_timeout"]
        assert all(task.failure for task in tasks)
        assert all((task.ends_at <= expected) == bool(early_share) for task in timely)


def test_a_share_of_the_tasks_is_cancelled_by_the_service_and_costs_nothing() -> None:
    service = with_behaviour(cancelled_share=1)
    answer = read(service, submit(service), 1000.0)
    assert answer["status"] == "failed"
    assert answer["error"]["code"] == "request_cancelled"
    assert service.book(1000.0)["account"]["spent"] == 0


def test_fewer_images_than_asked_for_cost_less() -> None:
    service = with_behaviour(partial_share=1)
    tasks = [submit(service, {**IMAGE, "n": 4}) for _ in range(50)]
    counts = [len(read(service, task, 10_000.0)["results"]) for task in tasks]
    assert set(counts) == {1, 2, 3}
    book = service.book(10_000.0)
    assert [post["charged"] for post in book["posts"]] == [2.5 * count for count in counts]
    assert service.result(f"{tasks[0].id}-{counts[0]}.png", 10_000.0) is not None
    assert service.result(f"{tasks[0].id}-{counts[0] + 1}.png", 10_000.0) is None


@pytest.mark.parametrize(
    ("law", "quarter", "half", "late"),
    [
        ("none", 0, 0, 0),
        ("linear", 25, 50, 98),
        ("stairs", 20, 40, 80),
        ("stuck", 75, 90, 90),
        ("estimate", 12, 25, 49),
    ],
)
def test_progress_follows_the_chosen_law(law: str, quarter: int, half: int, late: int) -> None:
    service = with_behaviour(progress=law, bias=0.5, sigma=0)
    task = submit(service)  # 50 s, estimated at 100
    told = [read(service, task, now)["progress"] for now in (12.51, 25.01, 49.01, 50.0)]
    assert told == [quarter, half, late, 100]


def test_the_narrower_choice_overrides_the_wider_field_by_field() -> None:
    service = Service(
        models={"*": {"bias": 1, "sigma": 0}, "image": {"estimate": 10}, "gpt-4o-image": Behaviour(progress="none")}
    )
    picture, film = submit(service), submit(service, VIDEO, "video")
    other = submit(service, {"model": "krea-2-turbo", "prompt": "x"})
    assert (picture.ends_at, picture.progress_law) == (10, "none")
    assert (other.ends_at, other.progress_law) == (10, "estimate")
    assert film.ends_at == 165


def test_an_alias_chooses_for_its_model() -> None:
    service = Service(models={"suno-v5": {"price": 7}})
    assert submit(service, {"model": "suno-v5-beta", "prompt": "a song"}, "audio").reserved == 7_000_000


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        ({"nope": {}}, "no model 'nope'"),
        ({"*": {"bais": 1}}, "no 'bais'"),
        ({"*": {"sigma": -1}}, "sigma must be 0 or more"),
        ({"*": {"failure_share": 2}}, "failure_share must be between 0 and 1"),
        ({"*": {"progress": "fast"}}, "progress must be one of"),
        ({"*": {"concurrency": 0.5}}, "concurrency must be"),
        ({"*": {"bias": "1"}}, "bias must be"),
        ({"*": 5}, "made of a mapping"),
    ],
    ids=str,
)
def test_a_behaviour_that_makes_no_sense_is_refused(models: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Emulator(models=models)


# --- limits per model, prices ----------------------------------------------------------------------------------


def test_a_model_has_limits_of_its_own() -> None:
    service = Service(models={"gpt-4o-image": {"rate": 1, "burst": 2}, "veo3": {"concurrency": 1}})
    assert [isinstance(service.submit("image", IMAGE, None, 0.0), Accepted) for _ in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    other = {"model": "krea-2-turbo", "prompt": "x"}
    assert all(isinstance(service.submit("image", other, None, 0.0), Accepted) for _ in range(9))
    film = {"model": "veo3", "prompt": "x"}
    first = submit(service, film, "video")
    refusal = service.submit("video", film, None, 1.0)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code) == (429, "rate_limit_exceeded")
    submit(service, film, "video", first.ends_at)


def test_limits_can_change_while_tasks_run_and_they_go_on_counting() -> None:
    service = Service()
    tasks = [submit(service) for _ in range(3)]
    service.set_limits(None, None, 3)
    assert isinstance(service.submit("image", IMAGE, None, 1.0), Refusal)
    service.settle(max(task.ends_at for task in tasks))
    assert service.unfinished == 0
    service.set_limits(0.5, None, None)
    assert service.limits() == {"rate": 0.5, "burst": 1.0, "concurrency": None}


# --- the account always balances -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 150),
            st.sampled_from(["submit", "repeat", "read", "end", "pay in", "limits", "callbacks"]),
            st.integers(0, 3),
        ),
        max_size=60,
    ),
    behaviour=st.fixed_dictionaries(
        {
            "failure_share": st.sampled_from([0.0, 0.3, 1.0]),
            "cancelled_share": st.sampled_from([0.0, 0.5]),
            "partial_share": st.sampled_from([0.0, 1.0]),
            "sigma": st.sampled_from([0.0, 0.8]),
            "concurrency": st.sampled_from([None, 1, 3]),
            "price": st.sampled_from([None, 0.000001, 3.3]),
        }
    ),
    seed=st.integers(0, 2**32),
)
def test_the_book_always_balances(steps: list[tuple[float, str, int]], behaviour: dict[str, Any], seed: int) -> None:
    service = Service(seed=seed, credits=50_000_000, models={"*": behaviour}, private_callbacks=True)
    now, paid_in, tasks = 0.0, 50_000_000, list[Task]()
    for pause, action, n in steps:
        now += pause
        if action in ("submit", "repeat"):
            body = {**IMAGE, "prompt": f"p{n}", "n": (1, 2, 4)[n % 3], "callback_url": "http://localhost/hook"}
            accepted = service.submit("image", body, f"key-{n}" if action == "repeat" else None, now)
            tasks += [accepted.task] if isinstance(accepted, Accepted) else []
        elif action == "read" and tasks:
            service.read(tasks[n % len(tasks)].id, now, LINKS)
        elif action == "end" and tasks:
            service.end(tasks[n % len(tasks)].id, ("completed", "failed", "cancelled")[n % 3], None, now)
        elif action == "pay in":
            service.settle(now)
            paid_in += n * 1_000_000
            service.account.set_remaining(service.account.remaining + n * 1_000_000)
        elif action == "limits":
            service.set_limits(None, None, n or None)
        elif action == "callbacks":
            assert all(task.settled for task in service.due_callbacks(now))
        account = service.account
        assert account.reserved + account.spent + account.remaining == account.initial == paid_in
        assert min(account.reserved, account.spent, account.remaining) >= 0
        service.settle(now)
        records = [service.task(task.id) for task in tasks]
        unique = {task.id: task for task in records if task is not None}.values()
        assert account.spent == sum(task.charged for task in unique)
        assert account.reserved == sum(task.reserved for task in unique if not task.settled)
        assert service.unfinished == sum(not task.settled for task in unique)
        assert all(task.charged <= task.reserved for task in unique)
        assert all(task.charged == 0 for task in unique if task.failure)


# --- ending a task by hand -------------------------------------------------------------------------------------


def test_a_task_can_be_ended_at_once_in_each_way() -> None:
    service = Service(credits=100_000_000)
    done, failed, cancelled = submit(service), submit(service), submit(service)
    assert service.end(done.id, "completed", None, 1.0) is done
    assert service.end(failed.id, "failed", "quota_exceeded", 1.0) is failed
    assert service.end(cancelled.id, "cancelled", None, 1.0) is cancelled
    assert read(service, done, 1.0)["results"] == [f"{LINKS}/{done.id}-1.png"]
    assert read(service, failed, 1.0)["error"]["code"] == "quota_exceeded"
    assert read(service, cancelled, 1.0)["error"]["code"] == "request_cancelled"
    assert (service.account.reserved, service.account.spent) == (0, 2_500_000)
    service.settle(10_000.0)  # their first ends pass without a trace
    assert (service.account.reserved, service.account.spent, service.unfinished) == (0, 2_500_000, 0)


def test_only_an_unfinished_task_can_be_ended() -> None:
    service = Service()
    task = submit(service)
    unknown, odd = service.end("task-unified-1-x", "failed", None, 1.0), service.end(task.id, "pending", None, 1.0)
    late = service.end(task.id, "failed", None, task.ends_at)
    assert [refusal.status for refusal in (unknown, odd, late) if isinstance(refusal, Refusal)] == [404, 400, 409]


# --- dialects --------------------------------------------------------------------------------------------------


def test_old_errors_have_the_status_as_their_code() -> None:
    refusal = Refusal(429, "rate_limit_exceeded", "Slow down.", "rate_limit_error")
    old = Dialect(errors="old")
    assert error_body(refusal, "retry after 60 seconds", old)["error"] == {
        "code": 429,
        "message": "Slow down.",
        "type": "rate_limit_error",
        "fallback_suggestion": "retry after 60 seconds",
    }
    assert error_body(Refusal(402, "x", "y"), None, old)["error"]["type"] == "insufficient_quota_error"


def test_the_answer_to_a_submission_can_be_short() -> None:
    task = submit(Service())
    assert set(created_task(task, Dialect(created="brief"))) == {"created", "id", "model", "status"}
    assert not {"task_info", "usage"} & set(created_task(task, Dialect(created="bare")))


def test_old_credits_are_a_hundred_times_the_figure_with_an_estimated_cost() -> None:
    usage = created_task(submit(Service()), Dialect(credits="old"))["usage"]
    assert (usage["credits_reserved"], usage["estimated_cost"]) == (250, 0.25)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ("links", {"results": ["L"]}),
        ("objects", {"results": [{"url": "L"}]}),
        ("nested", {"results": ["L"], "result": {"results": ["L"]}}),
    ],
)
def test_results_come_as_links_as_objects_or_nested_as_well(results: Any, expected: dict[str, Any]) -> None:
    service = Service(dialect=Dialect(results=results))
    task = submit(service)
    answer = read(service, task, 1000.0)
    link = f"{LINKS}/{task.id}-1.png"
    assert {name: answer[name] for name in answer if name.startswith("result")} == _with(expected, link)


def _with(value: Any, link: str) -> Any:
    if isinstance(value, dict):
        return {name: _with(item, link) for name, item in value.items()}
    return [_with(item, link) for item in value] if isinstance(value, list) else link


def test_finished_tasks_can_carry_their_bill() -> None:
    service = Service(dialect=Dialect(polled_usage=True), models={"veo3": {"failure_share": 1}})
    good, bad = submit(service), submit(service, {"model": "veo3", "prompt": "x"}, "video")
    assert "usage" not in read(service, good, 1.0)
    answer = read(service, good, 10_000.0)
    assert answer["duration"] == pytest.approx(good.ends_at - good.created, abs=0.001)
    assert answer["usage"]["credits_used"] == answer["billing"]["charged_credits"] == 2.5
    billing = read(service, bad, 10_000.0)["billing"]
    assert (billing["charge_status"], billing["refund_status"]) == ("released", "completed")
    assert billing["refunded_credits"] == billing["reserved_credits"] > 0
    assert billing["refunded_at"].endswith("Z")


def test_a_cancelled_task_can_have_the_word_for_it() -> None:
    service = Service(dialect=Dialect(cancelled="cancelled"), models={"*": {"cancelled_share": 1}})
    task = submit(service)
    assert read(service, task, 1000.0)["status"] == "cancelled"
    listed = service.list_tasks({"status": "cancelled"}, 1000.0)
    assert isinstance(listed, dict)
    assert [row["id"] for row in listed["data"]] == [task.id]
    assert service.book(1000.0)["posts"][0]["status"] == "cancelled"


def test_an_unknown_model_is_400_or_403_and_fine_when_lenient() -> None:
    body = {"model": "brand-new-9", "prompt": "x", "whatever": [1]}
    strict = Service().submit("image", body, None, 0.0)
    denied = Service(dialect=Dialect(unknown_model=403)).submit("image", body, None, 0.0)
    assert isinstance(strict, Refusal)
    assert isinstance(denied, Refusal)
    assert (strict.status, denied.status, denied.code) == (400, 403, "model_access_denied")
    lenient = Service(dialect=Dialect(validation="lenient"))
    assert created_task(submit(lenient, body))["model"] == "brand-new-9"
    wild = {"model": "gpt-4o-image", "n": "many", "duration": 1e400, "size": {}}
    task = submit(lenient, wild)
    assert read(lenient, task, 1000.0)["results"]


@pytest.mark.parametrize("dialect", [{"errors": "new"}, {"unknown_model": 404}, {"nope": 1}, "old"], ids=str)
def test_a_dialect_that_nobody_speaks_is_refused(dialect: Any) -> None:
    with pytest.raises(ValueError):
        Emulator(dialect=dialect)
