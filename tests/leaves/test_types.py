"""Tasks: every shape the service is known to send is read, and nothing it may send breaks the reading."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import tzset
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evolink_async import InvalidRequestError, Task, TaskFailure, TaskStatus
from evolink_async.types import TaskInfo, TaskReading, Usage

ID = "task-unified-1774857405-abc123"
CREATED = {
    "created": 1774857405,
    "id": ID,
    "model": "seedance-2.0-text-to-video",
    "object": "video.generation.task",
    "progress": 0,
    "status": "pending",
    "type": "video",
    "task_info": {"can_cancel": True, "estimated_time": 165, "video_duration": 5},
    "usage": {"billing_rule": "per_second", "credits_reserved": 50, "user_group": "default"},
}


def read(**fields: Any) -> Task:
    return Task.model_validate({"id": ID, **fields})


def test_the_documented_create_answer() -> None:
    task = Task.model_validate(CREATED)
    assert (task.id, task.status, task.kind, task.progress) == (ID, TaskStatus.PENDING, "video", 0)
    assert task.model == "seedance-2.0-text-to-video"
    assert task.estimated_time == 165
    assert (task.task_info.can_cancel, task.task_info.video_duration) == (True, 5)
    assert (task.usage.billing_rule, task.usage.credits_reserved) == ("per_second", Decimal(50))
    assert task.created == datetime(2026, 3, 30, 7, 56, 45, tzinfo=UTC)
    assert task.expires_at == task.created + timedelta(hours=24)
    assert task.raw == CREATED
    assert not task.is_terminal


def test_nothing_but_the_id_is_needed() -> None:
    task = Task(id=ID)
    assert (task.status, task.progress, task.results, task.urls, task.error) == ("pending", 0, (), (), None)
    assert task.estimated_time is task.created is task.expires_at is task.kind is None


def test_a_task_is_frozen_and_can_be_pickled_and_read_again() -> None:
    task = Task.model_validate(CREATED)
    with pytest.raises(ValidationError):
        task.status = "completed"
    assert pickle.loads(pickle.dumps(task)) == task
    assert Task.model_validate(task.model_dump()) == task


NO_IDS: list[Any] = ["", ".", "..", "...", "../x", "a/b", "a b", "a\n", "x" * 129, "ä", None, 5, ["a"]]


@pytest.mark.parametrize("identifier", NO_IDS, ids=ascii)
def test_what_is_no_id_is_refused(identifier: Any) -> None:
    with pytest.raises(InvalidRequestError, match="id: ") as caught:
        Task(id=identifier)
    assert caught.value.param == "id"


@pytest.mark.parametrize("identifier", ["a", "_", "x" * 128, "task-unified-1-a.b:c", ".hidden", "-"])
def test_ids_as_the_vendor_checks_them(identifier: str) -> None:
    assert Task(id=identifier).id == identifier


@pytest.mark.parametrize(
    ("word", "status", "terminal"),
    [
        ("pending", "pending", False),
        ("processing", "processing", False),
        ("completed", "completed", True),
        ("COMPLETED", "completed", True),
        (" failed ", "failed", True),
        ("cancelled", "cancelled", True),
        ("canceled", "cancelled", True),
        ("queued", "queued", False),
        ("succeeded", "succeeded", False),
        ("Moderated", "Moderated", False),
        ("", "pending", False),
        (None, "pending", False),
        (5, "pending", False),
        (["completed"], "pending", False),
    ],
    ids=repr,
)
def test_statuses(word: Any, status: str, terminal: bool) -> None:
    task = read(status=word)
    assert (task.status, task.is_terminal) == (status, terminal)
    assert task.succeeded is (status == "completed")
    assert isinstance(task.status, TaskStatus) is (status in list(TaskStatus))


@pytest.mark.parametrize(
    ("progress", "percent"),
    [(0, 0), (40, 40), (101, 100), (-1, 0), ("50", 50), (33.9, 33), (None, 0), (True, 0), ("x", 0), (1e300, 0)],
    ids=repr,
)
def test_progress_is_a_whole_number_from_0_to_100(progress: Any, percent: int) -> None:
    assert read(progress=progress).progress == percent


def test_completed_without_progress_is_a_hundred_percent() -> None:
    assert read(status="completed").progress == 100
    assert read(status="completed", progress=0).progress == 0


MOMENT = datetime(2026, 3, 30, 7, 56, 45, tzinfo=UTC)


@pytest.mark.parametrize(
    ("created", "moment"),
    [
        (1774857405, MOMENT),
        (1774857405.0, MOMENT),
        (1774857405000, MOMENT),
        ("1774857405", MOMENT),
        ("2026-03-30T07:56:45Z", MOMENT),
        ("2026-03-30T09:56:45+02:00", MOMENT),
        ("2026-03-30T07:56:45", MOMENT),
        (MOMENT, MOMENT),
        (-5, None),
        (0, None),
        (1e20, None),
        ("0001-01-01T00:00:00+05:00", None),
        ("9999-12-31T23:59:59-05:00", None),
        (float("nan"), None),
        ("yesterday", None),
        (True, None),
        (None, None),
        ({}, None),
    ],
    ids=repr,
)
def test_created_is_aware_utc_or_none(
    created: Any, moment: datetime | None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kathmandu")  # where the program runs is of no interest
    tzset()
    request.addfinalizer(tzset)
    for name in ("created", "created_at"):
        task = read(**{name: created})
        assert task.created == moment
        assert task.created is None or task.created.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("value", "amount"),
    [
        (2.5, "2.5"),
        (8.7, "8.7"),
        (0.05, "0.05"),
        (28.8, "28.8"),
        (252, "252"),
        ("2.5", "2.5"),
        (0.1 + 0.2, "0.30000000000000004"),
        (float("nan"), None),
        ("NaN", None),
        ("Infinity", None),
        (1e300, None),
        (10**5000, None),
        (True, None),
        ("x", None),
        (None, None),
        ([], None),
    ],
    ids=lambda value: ascii(value)[:30] if not isinstance(value, int) or value < 10**9 else "huge",
)
def test_credits_are_exact_decimals(value: Any, amount: str | None) -> None:
    expected = None if amount is None else Decimal(amount)
    usage = read(usage={"credits_reserved": value, "cost": {"credits": value}}).usage
    assert (usage.credits_reserved, usage.credits_used) == (expected, expected)


@pytest.mark.parametrize("value", [0, -5, "x", None, True, 86_401, 1e9, 1e300, float("nan")], ids=repr)
def test_an_estimate_that_is_none_is_none(value: Any) -> None:
    assert read(task_info={"estimated_time": value}).estimated_time is None


@pytest.mark.parametrize(("value", "seconds"), [(100, 100), ("100", 100), (45.5, 45.5)])
def test_estimates(value: Any, seconds: float) -> None:
    assert read(task_info={"estimated_time": value}).estimated_time == seconds


A, B, C = "https://files.test/a.png", "http://files.test/b.mp4", "https://files.test/c.mp3"
SHAPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "list": ({"results": [A, B]}, (A, B)),
    "repeated": ({"results": [B, A, B]}, (B, A)),
    "text": ({"results": A}, (A,)),
    "objects": ({"results": [{"url": A}, {"video_url": B}]}, (A, B)),
    "mixed": ({"results": [None, 5, A, {"x": 1}, [B]]}, (A, B)),
    "not-links": ({"results": ["element-17", "ftp://x", A]}, (A,)),
    "result-nested": ({"result": {"results": [A, B]}}, (A, B)),
    "result-text": ({"result": A}, (A,)),
    "result-object": ({"result": {"video_url": B}}, (B,)),
    "result-url": ({"result_url": A}, (A,)),
    "video-url": ({"video_url": B}, (B,)),
    "output": ({"output": {"video_url": B}}, (B,)),
    "output-list": ({"output": [A]}, (A,)),
    "file-url": ({"file_url": A}, (A,)),
    "empty-results-and-url": ({"results": [], "url": A}, (A,)),
    "null": ({"results": None}, ()),
    "empty-object": ({"results": {}}, ()),
    "number": ({"results": 5}, ()),
    "tracks": ({"result_data": [{"video_url": B, "image_url": A, "audio_url": C, "title": "t"}]}, (B, A, C)),
    "both": ({"results": [C], "result_data": [{"audio_url": C, "image_url": A}]}, (C, A)),
    "one-object": ({"result_data": {"audio_url": C}}, (C,)),
    "songs": ({"result_data": {"songs": [{"audio_url": C}]}}, (C,)),
    "persona": ({"result_data": {"persona_id": "p"}}, ()),
    "links": ({"result_data": [A, B]}, (A, B)),
    "data-number": ({"result_data": 5}, ()),
    "null-links": ({"result_data": [{"video_url": None, "audio_url": ""}]}, ()),
}


@pytest.mark.parametrize("name", SHAPES)
def test_links_are_found_once_and_in_order_wherever_they_are(name: str) -> None:
    fields, urls = SHAPES[name]
    task = read(status="completed", **fields)
    assert task.urls == urls
    assert all(isinstance(result, str) for result in task.results)
    assert task.result_data == fields.get("result_data")


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        ({"code": "service_error", "message": "m", "type": "task_error"}, ("service_error", "m")),
        ({"code": 429, "message": "m"}, ("429", "m")),
        ({"code": True, "message": "m"}, ("unknown_error", "m")),
        ({"code": None, "message": None}, ("unknown_error", "")),
        ({"code": ["x"], "message": {}}, ("unknown_error", "")),
        ({"message": "m"}, ("unknown_error", "m")),
        ("just text", ("unknown_error", "just text")),
        (None, None),
        ("", None),
        ({}, None),
        ([], None),
        (5, None),
    ],
    ids=repr,
)
def test_failures_in_every_shape(error: Any, failure: tuple[str, str] | None) -> None:
    found = read(status="failed", error=error).error
    assert failure == (None if found is None else (found.code, found.message))


def test_unknown_fields_are_kept() -> None:
    task = read(usage={"estimated_cost": 0.252}, task_info={"eta": 1}, error={"code": "c", "suggestion": "s"}, new=1)
    assert task.usage.model_extra == {"estimated_cost": 0.252}
    assert task.task_info.model_extra == {"eta": 1}
    assert task.error is not None
    assert task.error.model_extra == {"suggestion": "s"}
    assert task.raw["new"] == 1
    read_fast = Task._of({"id": ID, **task.raw})
    assert (read_fast.usage, read_fast.task_info, read_fast.error) == (task.usage, task.task_info, task.error)


def test_tasks_that_tell_the_same_share_its_frozen_parts_but_never_what_they_were_read_from() -> None:
    one, other = Task._of(CREATED), Task._of(json.loads(json.dumps(CREATED)))
    assert (one.usage, one.task_info) == (other.usage, other.task_info)
    assert one.usage is other.usage
    assert one.task_info is other.task_info
    assert one.raw is CREATED
    assert other.raw is not CREATED


@pytest.mark.parametrize(
    ("value", "other"),
    [
        *[(1, True), (True, 1), (1, 1.0), (1.0, True), (0, False), (0, -0.0), ("1", 1), ([], [1])],
        (Decimal("1.0"), Decimal("1.00")),
    ],
    ids=repr,
)
def test_parts_are_shared_only_by_what_is_the_same_in_type_too(value: Any, other: Any) -> None:
    for name in ("credits_reserved", "credits_used", "user_group"):
        first, second = ({"usage": {name: given}} for given in (value, other))
        Task._of({"id": ID} | first)
        found = Task._of({"id": ID} | second)
        assert repr(found.usage) == repr(Usage.model_validate(second["usage"]))
    for name in ("can_cancel", "estimated_time", "video_duration"):
        first, second = ({"task_info": {name: given}} for given in (value, other))
        Task._of({"id": ID} | first)
        found = Task._of({"id": ID} | second)
        assert repr(found.task_info) == repr(TaskInfo.model_validate(second["task_info"]))


def test_what_could_be_changed_is_not_shared() -> None:
    one, other = (Task._of({"id": ID, "usage": {"cost": {"credits": 2}}}).usage for _ in range(2))
    assert one == other
    assert one is not other


def test_the_kind_is_found_in_type_or_object() -> None:
    assert read(type="audio").kind == "audio"
    assert read(object="image.generation.task").kind == "image"
    assert read(type=5, object=[]).kind is None


def test_the_repr_of_a_task_that_goes_on_says_how_to_wait() -> None:
    text = repr(Task.model_validate(CREATED))
    assert f"await client.tasks.wait({ID!r})" in text
    assert "165 s" in text
    assert "wait(" not in repr(read(status="completed", results=[A]))
    assert "wait(" in repr(read(status="queued"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
NAMES = ["status", "kind", "type", "object", "model", "progress", "results", "result", "output", "url", "result_data"]
FIELDS = st.sampled_from([*NAMES, "raw", "error", "task_info", "usage", "created", "created_at", "id"])
INNER = st.sampled_from(["code", "message", "credits_used", "cost", "credits", "estimated_time", "songs", "results"])


@given(st.dictionaries(FIELDS, JSON | st.dictionaries(INNER, JSON)))
def test_no_json_breaks_the_reading(fields: dict[str, Any]) -> None:
    task = Task.model_validate({**fields, "id": ID})
    assert task.id == ID
    assert 0 <= task.progress <= 100
    assert isinstance(task.urls, tuple)
    assert repr(task)
    assert isinstance(task.error, TaskFailure | None)
    assert Task._of({**fields, "id": ID}) == task, "the reading without validation gives the same"
    assert pickle.loads(pickle.dumps(task)).id == ID


@given(st.dictionaries(FIELDS, JSON))
def test_nothing_but_the_id_is_ever_wrong(fields: dict[str, Any]) -> None:
    fields.pop("id", None)
    with pytest.raises(InvalidRequestError) as caught:
        Task.model_validate(fields)
    assert caught.value.param == "id"


def test_a_video_duration_of_zero_as_in_the_documented_upscaler_is_kept() -> None:
    task = Task(id="t", task_info={"can_cancel": True, "estimated_time": 600, "video_duration": 0})  # type: ignore[arg-type]
    assert task.task_info.video_duration == 0
    assert Task(id="t", task_info={"video_duration": -1}).task_info.video_duration is None  # type: ignore[arg-type]
    assert TaskReading.of(task).video_duration is None  # it says nothing of what the task costs
