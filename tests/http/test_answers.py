"""The table "answer to a POST" of the design, row by row."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExhaustedError,
    RateLimitError,
    ResponseError,
    ServerError,
)
from evolink_async.http.answers import Answer, judge_submission, read_json, read_task, status_error, task_from
from evolink_async.http.retry import History, Next, Verdict, next_step

ID = "task-unified-1774857405-abc123"
HTML = b"<html><body>524: A timeout occurred</body></html>"


def answer(status: int, body: Any = b"", **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def now_shape(code: object) -> dict[str, Any]:
    return {"error": {"code": code, "message": "no", "type": "some_error", "param": "prompt"}}


ROWS: dict[str, tuple[Answer, Verdict, Next, Next]] = {}


def row(name: str, given: Answer, verdict: Verdict, fresh: Next, doubtful: Next = Next.GIVE_UP) -> None:
    """`fresh`: the next step of a first attempt under "replay"; `doubtful`: after an answer was lost."""
    ROWS[name] = (given, verdict, fresh, doubtful)


row("429", answer(429, now_shape("rate_limit_exceeded")), Verdict.RATE_LIMITED, Next.AGAIN, Next.AGAIN)
row("429-html", answer(429, HTML), Verdict.RATE_LIMITED, Next.AGAIN, Next.AGAIN)
row("429-empty", answer(429), Verdict.RATE_LIMITED, Next.AGAIN, Next.AGAIN)
passthrough = {"message": "Resource exhausted", "type": "", "param": "", "code": 429}
row("429-upstream", answer(429, passthrough), Verdict.RATE_LIMITED, Next.AGAIN, Next.AGAIN)
for status in (400, 403, 404, 413, 415, 422):
    row(f"{status}", answer(status, now_shape("invalid_request")), Verdict.REFUSED, Next.REJECT)
    row(f"{status}-int-code", answer(status, now_shape(status)), Verdict.REFUSED, Next.REJECT)
    row(f"{status}-html", answer(status, HTML), Verdict.REFUSED, Next.REJECT)
    files_shape = {"success": False, "code": 40001, "msg": "no"}
    row(f"{status}-msg-shape", answer(status, files_shape), Verdict.REFUSED, Next.REJECT)
row("403-model", answer(403, now_shape("model_access_denied")), Verdict.REFUSED, Next.REJECT)
for status in (401, 402):
    row(f"{status}", answer(status, now_shape("unauthorized")), Verdict.ACCOUNT, Next.NOT_SUBMIT)
    row(f"{status}-empty", answer(status), Verdict.ACCOUNT, Next.NOT_SUBMIT)
for code in ("key_disabled", "key_expired", "user_disabled", "user_expired", "account_disabled", "KEY_DISABLED"):
    row(f"403-{code}", answer(403, now_shape(code)), Verdict.ACCOUNT, Next.NOT_SUBMIT)
row("503-hint", answer(503, now_shape("x"), retry_after="30"), Verdict.LOST, Next.REPLAY)
for status in (302, 307, 405, 408, 409, 418, 425, 500, 502, 503, 504, 520, 524):
    row(f"{status}", answer(status, now_shape("internal_error")), Verdict.LOST, Next.REPLAY)
    row(f"{status}-html", answer(status, HTML), Verdict.LOST, Next.REPLAY)
row("302-location", answer(302, location="https://elsewhere.test/"), Verdict.LOST, Next.REPLAY)
for status in (200, 202, 400, 402, 404, 409, 425, 429, 500, 503):
    progress = answer(status, now_shape("paid_outcome_unknown"))
    row(f"in-progress-{status}", progress, Verdict.IN_PROGRESS, Next.AGAIN, Next.AGAIN)
    row(f"conflict-{status}", answer(status, now_shape("idempotency_conflict")), Verdict.CONFLICT, Next.GIVE_UP)
row("in-progress-upper", answer(409, now_shape("Paid_Outcome_Unknown")), Verdict.IN_PROGRESS, Next.AGAIN, Next.AGAIN)
in_code = {"code": "paid_outcome_unknown", "message": "wait"}
row("in-progress-flat", answer(409, in_code), Verdict.IN_PROGRESS, Next.AGAIN, Next.AGAIN)
NO_TASK: dict[str, Any] = {
    "missing": {"status": "pending"},
    "int": {"id": 5},
    "null": {"id": None},
    "empty-id": {"id": ""},
    "blank": {"id": " task"},
    "path": {"id": "../../v1/credits"},
    "dots": {"id": ".."},
    "query": {"id": "a?b"},
    "newline": {"id": "task\n"},
    "long": {"id": "x" * 129},
    "emoji": {"id": "täsk"},
    "empty": b"",
    "html": HTML,
    "error": now_shape("internal_error"),
    "error-text": {"error": "nope"},
    "files-error": {"success": False, "code": 40001, "msg": "no"},
    "nan": b'{"id": NaN}',
    "infinity": b'{"id": "task-1", "progress": Infinity}',
    "array": [{"id": ID}],
    "text": "task-1",
    "number": 7,
    "null-body": b"null",
    "cut": b'{"id": "task-unified-17748',
    "deep": b"[" * 100_000,
    "latin-1": '{"id": "task-1", "model": "é"}'.encode("latin-1"),
    "utf-16": '{"id": "task-1"}'.encode("utf-16"),
    "big-int": b'{"id": ' + b"9" * 5000 + b"}",
}
for name, body in NO_TASK.items():
    row(f"200-{name}", answer(200, body), Verdict.LOST, Next.REPLAY)
row("204", answer(204), Verdict.LOST, Next.REPLAY)
for status in (200, 201, 202):
    row(f"{status}-task", answer(status, {"id": ID}), Verdict.ACCEPTED, Next.ACCEPT, Next.ACCEPT)
row("bom", answer(200, b'\xef\xbb\xbf{"id": "task-1"}'), Verdict.ACCEPTED, Next.ACCEPT, Next.ACCEPT)
already = {"id": ID, "status": "failed", "error": {"code": "x", "message": "y"}}
row("already-failed", answer(200, already), Verdict.ACCEPTED, Next.ACCEPT, Next.ACCEPT)


@pytest.mark.parametrize("name", ROWS)
def test_a_fresh_request_under_replay(name: str) -> None:
    given, verdict, fresh, _ = ROWS[name]
    judgement = judge_submission(given)
    assert judgement.verdict is verdict
    asked = int(verdict is Verdict.IN_PROGRESS)
    assert next_step(verdict, History(asked=asked), judgement.retry_after).next is fresh
    assert (judgement.task is not None) == (verdict is Verdict.ACCEPTED)
    assert (judgement.error is None) == (verdict is Verdict.ACCEPTED)


@pytest.mark.parametrize("name", ROWS)
def test_under_hold_nothing_lost_is_sent_again(name: str) -> None:
    given, verdict, fresh, _ = ROWS[name]
    asked = int(verdict is Verdict.IN_PROGRESS)
    held = next_step(verdict, History(asked=asked, may_replay=False), judge_submission(given).retry_after)
    assert held.next is (Next.GIVE_UP if fresh is Next.REPLAY else fresh)


@pytest.mark.parametrize("name", ROWS)
def test_after_a_lost_answer_only_an_id_settles(name: str) -> None:
    given, verdict, _, doubtful = ROWS[name]
    asked = int(verdict is Verdict.IN_PROGRESS)
    history = History(age=5, lost=1, asked=asked)
    assert next_step(verdict, history, judge_submission(given).retry_after).next is doubtful


def test_no_other_status_says_that_a_request_was_free() -> None:
    """F40, F46, F47: what is neither in the table nor a task may have been paid for."""
    free = {400, 401, 402, 403, 404, 413, 415, 422, 429}
    bodies = (now_shape("some_error"), HTML, b"")
    told = {(status, judge_submission(answer(status, body)).verdict) for status in range(100, 1000) for body in bodies}
    assert {status for status, verdict in told if verdict is not Verdict.LOST} == free


@pytest.mark.parametrize("verdict", [Verdict.REFUSED, Verdict.ACCOUNT, Verdict.CONFLICT])
def test_a_refusal_after_paid_outcome_unknown_settles_nothing(verdict: Verdict) -> None:
    assert next_step(verdict, History(age=5, asked=1, asked_for=2)).next is Next.GIVE_UP


def test_an_unsent_request_is_tried_again_as_long_as_its_patience_lasts() -> None:
    assert next_step(Verdict.UNSENT, History(unsent_for=119, patience=120)).next is Next.AGAIN
    assert next_step(Verdict.UNSENT, History(unsent_for=120, patience=120)).next is Next.REJECT
    assert next_step(Verdict.UNSENT, History(lost=1, age=500, patience=0)).next is Next.AGAIN
    assert next_step(Verdict.UNSENT, History(lost=1, age=601)).next is Next.GIVE_UP


@pytest.mark.parametrize(
    ("age", "hint", "delay"),
    [(0.0, None, 2.0), (0.5, None, 1.5), (30.0, None, 0.0), (30.0, 60.0, 60.0), (0.1, 1.0, 1.9), (570.0, 30.0, 30.0)],
)
def test_a_replay_comes_between_two_seconds_and_ten_minutes(age: float, hint: float | None, delay: float) -> None:
    step = next_step(Verdict.LOST, History(age=age, sent_for=age), hint)
    assert (step.next, round(step.delay, 6)) == (Next.REPLAY, delay)


@pytest.mark.parametrize(("age", "hint"), [(600.1, None), (0.0, 601.0), (571.0, 30.0)])
def test_no_replay_later_than_ten_minutes(age: float, hint: float | None) -> None:
    assert next_step(Verdict.LOST, History(age=age), hint).next is Next.GIVE_UP


def test_paid_outcome_unknown_is_asked_after_2_4_8_seconds_for_two_minutes() -> None:
    asked_for, delays = 0.0, []
    for asked in range(1, 100):
        step = next_step(Verdict.IN_PROGRESS, History(asked=asked, asked_for=asked_for, may_replay=False))
        if step.next is Next.GIVE_UP:
            break
        delays.append(step.delay)
        asked_for += step.delay
    assert delays == [2, 4, 8, 16, 32, 56]


def test_the_last_ask_waits_for_no_mere_moment_and_for_no_hint_beyond_the_two_minutes() -> None:
    assert next_step(Verdict.IN_PROGRESS, History(asked=6, asked_for=117)).next is Next.GIVE_UP
    assert next_step(Verdict.IN_PROGRESS, History(asked=6, asked_for=62), hint=57.5).delay == 57.5
    assert next_step(Verdict.IN_PROGRESS, History(asked=6, asked_for=62), hint=59).next is Next.GIVE_UP


@pytest.mark.parametrize("status", [200, 400, 409, 429, 500])
def test_the_mark_of_a_replay_is_seen_on_any_answer(status: int) -> None:
    assert judge_submission(answer(status, {"id": ID}, idempotency_replayed="TRUE ")).replayed
    assert not judge_submission(answer(status, {"id": ID}, idempotency_replayed="false")).replayed


CLASSES = {
    400: BadRequestError,
    401: AuthenticationError,
    402: QuotaExhaustedError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: BadRequestError,
    415: BadRequestError,
    422: BadRequestError,
    429: RateLimitError,
    500: ServerError,
    502: ServerError,
    524: ServerError,
    302: APIStatusError,
    409: APIStatusError,
}


@pytest.mark.parametrize(("status", "expected"), CLASSES.items())
def test_every_status_has_its_class(status: int, expected: type[APIStatusError]) -> None:
    error = status_error(answer(status, now_shape("some_code")))
    assert type(error) is expected
    assert (error.status_code, error.code, error.param, error.type) == (status, "some_code", "prompt", "some_error")
    assert str(error).startswith("some_code: no")


SHAPES: dict[str, tuple[Any, str | None, str]] = {
    "now": ({"error": {"code": "c", "message": "m"}}, "c", "m"),
    "older": ({"error": {"code": 400, "message": "m"}}, "400", "m"),
    "no-code": ({"error": {"message": "m"}}, None, "m"),
    "files": ({"success": False, "code": 40001, "msg": "m"}, "40001", "m"),
    "oauth": ({"error": "invalid_token", "error_description": "m"}, "invalid_token", "m"),
    "error-text": ({"error": "m"}, "m", "m"),
    "error-sentence": ({"error": "not enough credits"}, None, "not enough credits"),
    "error-sentence-and-code": ({"error": "too fast", "code": "rate_limited"}, "rate_limited", "too fast"),
    "error-null": ({"error": None, "message": "m"}, None, "m"),
    "error-list": ({"error": [1], "message": "m"}, None, "m"),
    "bool-code": ({"error": {"code": True, "message": "m"}}, None, "m"),
    "bom": (b'\xef\xbb\xbf{"error": {"code": "c", "message": "m"}}', "c", "m"),
    "request-id": ({"error": {"code": "c", "message": "m (request id: r-1)"}}, "c", "m"),
    "ansi": ({"error": {"code": "c\x1b[31m", "message": "\x1b]8;;http://x\x07m"}}, "c [31m", "]8;;http://x m"),
    "message-object": ({"error": {"code": "c", "message": {"a": 1}}}, "c", "HTTP 400 with a body without a message"),
    "html": (HTML, None, "HTTP 400 with a body without a message"),
    "empty": (b"", None, "HTTP 400 with an empty body"),
    "array": ([1], None, "HTTP 400 with a body without a message"),
    "binary": (bytes(range(256)), None, "HTTP 400 with a body without a message"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_body_shape_is_read(name: str) -> None:
    body, code, message = SHAPES[name]
    error = status_error(answer(400, body))
    assert error.code == code
    assert error.message.startswith(message)
    assert str(error).isprintable()


def test_the_request_id_is_found_in_body_header_and_message() -> None:
    in_message = {"error": {"code": "c", "message": "m (request id: r-1)"}}
    assert status_error(answer(400, in_message)).request_id == "r-1"
    assert status_error(answer(400, in_message, x_oneapi_request_id="r-2")).request_id == "r-2"
    in_body = {"error": {"code": "c", "message": "m", "request_id": "r-3"}}
    error = status_error(answer(400, in_body, x_request_id="r-2"))
    assert error.request_id == "r-3"
    assert str(error) == "c: m (request id r-3)"


def test_a_429_says_when_to_come_back() -> None:
    in_body = {"error": {"code": 429, "message": "m", "fallback_suggestion": "retry after 60 seconds"}}
    error = status_error(answer(429, in_body))
    assert isinstance(error, RateLimitError)
    assert error.retry_after == 60


def test_an_answer_of_another_kind_says_to_check_the_address() -> None:
    with pytest.raises(ResponseError, match=r"no JSON.*check base_url"):
        read_json(answer(200, HTML))
    assert "elsewhere.test" in str(status_error(answer(302, location="https://elsewhere.test/x")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()), st.integers(100, 599))
def test_no_body_breaks_the_judging(body: bytes, status: int) -> None:
    judgement = judge_submission(Answer(status, {}, body))
    assert judgement.task is not None or judgement.error is not None


FIELDS = ["status", "results", "result", "error", "usage", "task_info", "created", "progress", "result_data", "type"]


@given(st.dictionaries(st.sampled_from([*FIELDS, "id", "raw", "kind", "model", "object"]), JSON))
def test_reading_a_task_raises_nothing_but_response_errors(fields: dict[str, Any]) -> None:
    for read in (lambda: task_from(fields), lambda: read_task(answer(200, fields))):
        try:
            task = read()
        except ResponseError:
            continue
        assert task.id == fields["id"]
