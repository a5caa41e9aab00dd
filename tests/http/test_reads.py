"""Reads: tried again until their timeout, and what is raised when it is over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_transport import KEY, Say, ScriptedTransport, lost, refusal, unsent
from support import Odd

from evolink_async import (
    BadRequestError,
    ConfigurationError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    ResponseError,
    RetryPolicy,
    ServerError,
)
from evolink_async.http.exchange import Exchange
from evolink_async.http.keys import ApiKey, KeySource
from evolink_async.http.reads import Reader

pytestmark = pytest.mark.looptime


def reader(transport: ScriptedTransport, key: KeySource = KEY) -> Reader:
    return Reader(Exchange(transport, "http://127.0.0.1"), ApiKey(key), RetryPolicy(), request_timeout=15)


def now() -> float:
    return asyncio.get_running_loop().time()


PASSING = {
    "unsent": unsent(),
    "lost": lost(),
    "408": refusal(408),
    "425": refusal(425),
    "429": refusal(429),
    "500": refusal(500),
    "502-html": Say(502, b"<html>"),
    "524": Say(524, b""),
    "timeout": Say(after=100),
    "value-error": Say(error=ValueError("what?")),
}


@pytest.mark.parametrize("name", PASSING)
async def test_what_may_pass_is_tried_again(name: str) -> None:
    transport = ScriptedTransport(PASSING[name], PASSING[name], Say(body={"ok": True}))
    assert await reader(transport).json("GET", "/v1/x", timeout=60) == {"ok": True}
    assert len(transport.knocks) == 3


@pytest.mark.parametrize("name", PASSING)
async def test_when_the_time_is_over_the_last_trouble_is_raised(name: str) -> None:
    kinds: dict[str, type[EvoLinkError]] = {"429": RateLimitError, "500": ServerError, "502-html": ServerError}
    kinds |= {"524": ServerError, "408": EvoLinkError, "425": EvoLinkError}
    transport = ScriptedTransport(PASSING[name])
    with pytest.raises(kinds.get(name, ConnectionFailedError)):
        await reader(transport).json("GET", "/v1/x", timeout=60)
    assert 45 < now() <= 60
    assert len(transport.knocks) > 3


async def test_a_first_answer_that_never_comes_is_a_failed_connection() -> None:
    with pytest.raises(ConnectionFailedError, match="within 5 s"):
        await reader(ScriptedTransport(Say(after=100))).json("GET", "/v1/x", timeout=5)
    assert now() == pytest.approx(5)


@pytest.mark.parametrize(
    ("say", "kind"),
    [
        (refusal(404), NotFoundError),
        (refusal(400), BadRequestError),
        (refusal(401), EvoLinkError),
        (Say(302, b"", {"location": "https://elsewhere.test"}), EvoLinkError),
        (Say(200, b"<html>"), ResponseError),
        (Say(200, b""), ResponseError),
        (Say(200, {"error": {"code": "internal_error", "message": "m"}}), ResponseError),
    ],
    ids=["404", "400", "401", "302", "html", "empty", "error-in-200"],
)
async def test_what_will_not_pass_is_raised_at_once(say: Say, kind: type[EvoLinkError]) -> None:
    transport = ScriptedTransport(say)
    with pytest.raises(kind):
        await reader(transport).json("GET", "/v1/x", timeout=60)
    assert len(transport.knocks) == 1


@pytest.mark.parametrize("hint", [3.0, 20.0])
async def test_a_hint_is_never_undercut(hint: float) -> None:
    transport = ScriptedTransport(refusal(429, retry_after=str(hint)), Say(body={"ok": True}))
    await reader(transport).json("GET", "/v1/x", timeout=60)
    assert transport.knocks[1] - transport.knocks[0] >= hint


async def test_a_hint_beyond_the_deadline_is_raised_at_once() -> None:
    with pytest.raises(RateLimitError) as caught:
        await reader(ScriptedTransport(refusal(429, retry_after="61"))).json("GET", "/v1/x", timeout=60)
    assert caught.value.retry_after == 61
    assert now() < 1


async def test_the_last_chance_is_not_slept_away() -> None:
    transport = ScriptedTransport(choose=lambda sent, n: refusal(500) if sent.at < 50 else Say(body={"ok": True}))
    assert await reader(transport).json("GET", "/v1/x", timeout=60) == {"ok": True}


async def test_without_a_timeout_it_goes_on_for_ever() -> None:
    transport = ScriptedTransport(choose=lambda sent, n: unsent() if n < 500 else Say(body=[1]))
    assert await reader(transport).json("GET", "/v1/x", timeout=None) == [1]
    assert now() > 3600


async def test_a_failed_connection_keeps_its_cause() -> None:
    with pytest.raises(ConnectionFailedError) as caught:
        await reader(ScriptedTransport(unsent())).json("GET", "/v1/x", timeout=5)
    assert "refused" in str(caught.value.__cause__)


async def test_a_key_function_that_fails_is_told_at_once() -> None:
    def key() -> str:
        raise OSError("vault")

    transport = ScriptedTransport(Say())
    with pytest.raises(ConfigurationError):
        await reader(transport, key).json("GET", "/v1/x", timeout=60)
    assert not transport.knocks


@pytest.mark.parametrize("body", [{"a": float("nan")}, {1: 2}, Odd(), "\ud800", b"x"], ids=ascii)
async def test_what_json_cannot_carry_is_refused_before_sending(body: Any) -> None:
    transport = ScriptedTransport(Say())
    with pytest.raises(InvalidRequestError):
        await reader(transport).attempt("POST", "/v1/x", body)
    assert not transport.knocks
