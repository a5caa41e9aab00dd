"""Which tasks may be those of requests whose answer was lost."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from ledger_world import MODEL, START

from evolink_async.ledger import candidates
from evolink_async.ledger.candidates import why_not
from evolink_async.ledger.reports import UnknownRequest
from evolink_async.types import Task


def unknown(identity: str, sent: datetime = START) -> UnknownRequest:
    return UnknownRequest(
        identity=identity,
        key=identity,
        model=MODEL,
        endpoint="/v1/images/generations",
        state="unsettled",
        reason="cut",
        idempotency_key=f"ea-{identity}",
        task_id=None,
        credits=Decimal("2.5"),
        submitted_at=sent,
        prompt=None,
    )


def made(task_id: str, after: float | None, model: str | None = MODEL) -> Task:
    """A task that was made so many seconds after the request was sent."""
    wire: dict[str, Any] = {"id": task_id, "status": "completed"}
    if model is not None:
        wire["model"] = model
    if after is not None:
        wire["created"] = int((START + timedelta(seconds=after)).timestamp())
    return Task.model_validate(wire)


@pytest.mark.parametrize(
    ("after", "model", "possible"),
    [
        *((0, MODEL, True), (-60, MODEL, True), (-61, MODEL, False), (660, MODEL, True), (661, MODEL, False)),
        *((1, "another", False), (1, None, True), (None, MODEL, False)),
    ],
)
def test_a_candidate_has_the_model_and_the_time_of_the_request(
    after: float | None, model: str | None, possible: bool
) -> None:
    found = candidates([unknown("k")], [made("task-a", after, model)])
    assert [task.id for task in found["k"]] == (["task-a"] if possible else [])


def test_the_nearest_in_time_comes_first_and_known_ones_are_left_out() -> None:
    tasks = [made("task-late", 300), made("task-known", 0), made("task-early", -20), made("task-near", 2)]
    late = unknown("late", sent=START + timedelta(seconds=299))
    found = candidates([unknown("k"), late], tasks, {"task-known"})
    assert [task.id for task in found["k"]] == ["task-near", "task-early", "task-late"]
    assert [task.id for task in found["late"]] == ["task-late"]


def test_it_is_said_why_a_task_is_not_the_one() -> None:
    assert why_not(MODEL, START, made("task-a", 3, "veo")) == f"it is a task of veo, the request is for {MODEL}"
    reason = why_not(MODEL, START, made("task-a", -3600))
    assert reason == "it was made at 2026-11-20 11:00:00 UTC, the request was sent at 2026-11-20 12:00:00 UTC"
    assert why_not(MODEL, START, made("task-a", None)) is None  # nothing speaks against it
    assert why_not(MODEL, None, made("task-a", 9e6)) is None
