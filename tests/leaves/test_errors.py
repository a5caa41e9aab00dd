"""The error family: what it says, and that it survives a journey between processes."""

from __future__ import annotations

import inspect
import pickle

import httpx
import pytest

from evolink_async import errors
from evolink_async.errors import (
    BadRequestError,
    ClosedError,
    EvoLinkError,
    InvalidRequestError,
    NotSubmittedError,
    RateLimitError,
    SubmitOutcomeUnknownError,
    TaskError,
    TaskTimeoutError,
)
from evolink_async.pool import Outcome, OutcomeStatus
from evolink_async.requests import ImageRequest
from evolink_async.types import Task

TASK = Task(id="task-1", status="processing")
CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, EvoLinkError)]


def made(cls: type[EvoLinkError]) -> EvoLinkError:
    return cls("m", task=TASK) if issubclass(cls, TaskError) else cls("m")


def test_every_error_is_named_in_the_face_of_the_module() -> None:
    assert {cls.__name__ for cls in CLASSES} == set(errors.__all__)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_can_be_pickled(cls: type[EvoLinkError]) -> None:
    error = made(cls)
    error.code, error.request_id = "c", "r"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    assert str(error).startswith("c: m")
    assert "request id r" in str(error)


def test_relations_outside_the_family() -> None:
    assert issubclass(ClosedError, RuntimeError)
    assert issubclass(TaskTimeoutError, TimeoutError)
    assert issubclass(BadRequestError, InvalidRequestError)


def test_causes_are_kept_as_far_as_they_can_travel() -> None:
    error = NotSubmittedError("m")
    error.__cause__ = RateLimitError("slow down", status_code=429)
    error.__cause__.__cause__ = httpx.ConnectError("no")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again.__cause__, RateLimitError)
    assert again.__cause__.status_code == 429
    assert isinstance(again.__cause__.__cause__, httpx.ConnectError)

    class Unportable(Exception):
        def __reduce__(self) -> str:
            raise RuntimeError("not me")

    error.__cause__ = Unportable()
    assert pickle.loads(pickle.dumps(error)).__cause__ is None


def test_an_unknown_outcome_names_request_and_key() -> None:
    request = ImageRequest(model="m", prompt="p")
    error = SubmitOutcomeUnknownError("m", request=request, idempotency_key="ea-1")
    again = pickle.loads(pickle.dumps(error))
    assert (again.request, again.idempotency_key) == (request, "ea-1")


def test_a_code_that_is_all_that_was_said_is_said_once() -> None:
    assert str(errors.APIStatusError("invalid_token", code="invalid_token", request_id="r-1")) == (
        "invalid_token (request id r-1)"
    )


@pytest.mark.parametrize("name", ["AuthenticationError", "QuotaExhaustedError", "PermissionDeniedError"])
def test_a_refusal_of_the_account_says_where_to_look(name: str) -> None:
    assert "https://evolink.ai/dashboard/" in str(getattr(errors, name)("no"))


@pytest.mark.parametrize("name", ["NotFoundError", "RateLimitError", "ServerError"])
def test_other_refusals_say_what_to_do_next(name: str) -> None:
    error = getattr(errors, name)("no such thing.", code="some_code", request_id="r-1")
    assert str(error) == f"some_code: no such thing. {error.advice} (request id r-1)"
    assert error.advice


def test_an_error_that_ended_no_run_many_has_no_outcomes_and_type_checkers_know_them() -> None:
    error = EvoLinkError("x")
    assert list(error.outcomes) == []
    error.outcomes = [outcome := Outcome(index=0, key=None, identity="a-0", request=None, status=OutcomeStatus.FAILED)]
    assert pickle.loads(pickle.dumps(error)).outcomes == [outcome]
