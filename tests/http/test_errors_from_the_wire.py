"""Every error that the wire can cause, raised through the public client by canned answers."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from scripted_transport import Body

import evolink_async as ea
from evolink_async import AsyncEvoLink, EvoLinkError

pytestmark = pytest.mark.looptime

ID = "task-unified-1774857405-abc123"
Wire = Callable[[httpx.Request], tuple[int, Any, dict[str, str]]]


def answering(status: int, body: Any = b"", **headers: str) -> Wire:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: (status, body, named)


def raising(error: Exception) -> Wire:
    def wire(request: httpx.Request) -> tuple[int, Any, dict[str, str]]:
        raise error

    return wire


def coded(status: int, code: str, **headers: str) -> Wire:
    return answering(status, {"error": {"code": code, "message": "no", "type": "t", "param": "prompt"}}, **headers)


def submitted_then(task: Any, status: int = 200) -> Wire:
    def wire(request: httpx.Request) -> tuple[int, Any, dict[str, str]]:
        if request.method == "POST" and "generations" in request.url.path:
            return 200, {"id": ID, "status": "pending", "model": "gpt-4o-image"}, {}
        if request.method == "POST":
            return 404, b"", {}
        return status, task, {}

    return wire


@asynccontextmanager
async def client_of(wire: Wire, **options: Any) -> AsyncIterator[AsyncEvoLink]:
    def handle(request: httpx.Request) -> httpx.Response:
        status, body, headers = wire(request)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.Response(status, headers=headers, stream=Body([content]))

    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http_client,
        AsyncEvoLink(http_client=http_client, **options) as client,
    ):
        yield client


Call = Callable[[AsyncEvoLink], Awaitable[Any]]


def submit(client: AsyncEvoLink) -> Awaitable[Any]:
    return client.images.submit(model="gpt-4o-image", prompt="x", timeout=50)


def generate(client: AsyncEvoLink) -> Awaitable[Any]:
    return client.images.generate(model="gpt-4o-image", prompt="x", timeout=500)


def get(client: AsyncEvoLink) -> Awaitable[Any]:
    return client.tasks.get(ID, timeout=50)


def task(status: str, **more: Any) -> dict[str, Any]:
    return {"id": ID, "status": status, **more}


policy = {"code": "content_policy_violation", "message": "no such pictures", "type": "task_error"}
FROM_THE_WIRE: dict[str, tuple[Wire, Call, type[EvoLinkError], dict[str, Any]]] = {
    "connection": (raising(httpx.ConnectError("no")), submit, ea.ConnectionFailedError, {}),
    "connection-get": (raising(httpx.ReadError("no")), get, ea.ConnectionFailedError, {}),
    "html": (answering(200, b"<html>"), get, ea.ResponseError, {"status_code": 200}),
    "no-task": (answering(200, {"status": "pending"}), get, ea.ResponseError, {}),
    "oversized": (answering(200, b" " * (9 << 20)), get, ea.ResponseError, {}),
    "lost": (raising(httpx.ReadError("no")), submit, ea.SubmitOutcomeUnknownError, {}),
    "lost-html": (answering(524, b"<html>"), submit, ea.SubmitOutcomeUnknownError, {}),
    "in-progress": (
        coded(409, "paid_outcome_unknown"),
        submit,
        ea.SubmitOutcomeUnknownError,
        {"code": "paid_outcome_unknown"},
    ),
    "400": (coded(400, "c"), submit, ea.BadRequestError, {"param": "prompt", "status_code": 400, "code": "c"}),
    "413": (answering(413), submit, ea.BadRequestError, {"status_code": 413}),
    "422": (coded(422, "c"), submit, ea.InvalidRequestError, {"param": "prompt"}),
    "401": (coded(401, "unauthorized"), submit, ea.AuthenticationError, {"type": "t"}),
    "402": (coded(402, "insufficient_quota"), submit, ea.QuotaExhaustedError, {}),
    "403": (coded(403, "model_access_denied"), submit, ea.PermissionDeniedError, {}),
    "404": (coded(404, "task_not_found", x_request_id="r-1"), get, ea.NotFoundError, {"request_id": "r-1"}),
    "429": (coded(429, "rate_limit_exceeded", retry_after="7"), submit, ea.RateLimitError, {"retry_after": 7}),
    "429-get": (coded(429, "rate_limit_exceeded", retry_after="7"), get, ea.RateLimitError, {"retry_after": 7}),
    "500": (coded(500, "internal_error"), get, ea.ServerError, {"status_code": 500}),
    "302": (answering(302, b"", location="https://elsewhere.test"), get, ea.APIStatusError, {"status_code": 302}),
    "failed": (
        submitted_then(task("failed", error=policy)),
        generate,
        ea.TaskFailedError,
        {"code": "content_policy_violation", "retryable": False},
    ),
    "failed-passing": (
        submitted_then(task("failed", error={"code": "service_error", "message": "m"})),
        generate,
        ea.TaskFailedError,
        {"retryable": True},
    ),
    "cancelled": (submitted_then(task("canceled")), generate, ea.TaskCancelledError, {"task_id": ID}),
    "lost-task": (submitted_then({"error": {"code": "x"}}, 404), generate, ea.TaskLostError, {"task_id": ID}),
    "timeout": (submitted_then(task("processing")), generate, ea.TaskTimeoutError, {"task_id": ID}),
}


@pytest.mark.parametrize("name", FROM_THE_WIRE)
async def test_every_error_comes_from_the_wire_with_its_facts(name: str) -> None:
    wire, call, expected, facts = FROM_THE_WIRE[name]
    async with client_of(wire) as client:
        with pytest.raises(expected) as caught:
            await call(client)
    error = caught.value
    assert {fact: getattr(error, fact) for fact in facts} == facts
    if error.code:
        assert str(error).startswith(f"{error.code}: ")
    if error.request_id:
        assert f"request id {error.request_id}" in str(error)
    if error.task_id:
        assert f"task {error.task_id}" in str(error)
    error.add_note("seen in production")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.args == error.args
        assert other.__notes__ == ["seen in production"]
        assert type(other.__cause__) is type(error.__cause__)
        assert {fact: getattr(other, fact) for fact in facts} == facts


async def test_a_disabled_key_is_an_error_of_permission() -> None:
    async with client_of(coded(403, "key_disabled")) as client:
        with pytest.raises(ea.PermissionDeniedError, match="key_disabled"):
            await submit(client)


async def test_an_unusable_hint_gives_a_rate_limit_error_without_one() -> None:
    async with client_of(coded(429, "x", retry_after="1e309")) as client:
        with pytest.raises(ea.RateLimitError) as caught:
            await get(client)
    assert caught.value.retry_after is None
