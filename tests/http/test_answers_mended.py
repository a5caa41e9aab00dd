"""Answers with a text that was cut in the middle of a character: they cost that character, not the task (F76)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async import AsyncEvoLink
from evolink_async.http.answers import Answer, judge_submission, read_json, read_task, status_error
from evolink_async.http.retry import Verdict

ID = "task-unified-1774857405-abc123"
LINK = "https://files.example/a.png"
CUT = {
    "the first half of a pair": rb"a lighthouse \ud83d",
    "the second half of a pair": rb"\ude00 at dusk",
    "a half before a pair": rb"\ud83d\ud83d\ude00",
}


@pytest.mark.parametrize("text", CUT.values(), ids=CUT)
def test_a_paid_task_is_known_though_a_text_beside_it_is_cut(text: bytes) -> None:
    body = b'{"id": "%b", "status": "completed", "prompt": "%b", "results": ["%b"]}' % (
        ID.encode(),
        text,
        LINK.encode(),
    )
    judged = judge_submission(Answer(200, {}, body))
    assert judged.verdict is Verdict.ACCEPTED
    task = read_task(Answer(200, {}, body)).task
    assert task.succeeded
    assert task.urls == (LINK,)
    assert "\ufffd" in task.raw["prompt"]
    task.raw["prompt"].encode()  # can be printed and written


@pytest.mark.parametrize("text", CUT.values(), ids=CUT)
def test_a_refusal_keeps_its_code_though_its_message_is_cut(text: bytes) -> None:
    error = status_error(Answer(400, {}, b'{"error": {"code": "content_policy", "message": "%b"}}' % text))
    assert error.code == "content_policy"
    assert "\ufffd" in error.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(categories=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(categories=None)), inner),
    max_leaves=10,
)


def whole(value: Any) -> Any:
    """The same with U+FFFD for each half of a pair, as UTF-16 has it."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, dict):
        return {whole(name): whole(item) for name, item in value.items()}
    return value


@given(JSON)
def test_all_but_the_cut_characters_is_read_as_it_was_written(value: Any) -> None:
    wrapped = {"data": [value, "\\ud83d", "\\\\ud83d\\"]}  # what only looks like an escape stays
    assert read_json(Answer(200, {}, json.dumps(wrapped).encode())) == whole(wrapped)


@pytest.mark.looptime
async def test_a_task_whose_prompt_comes_back_cut_is_waited_for_to_its_end() -> None:
    def service(request: httpx.Request) -> httpx.Response:
        status = b"pending" if request.method == "POST" else b"completed"
        body = b'{"id": "%b", "status": "%b", "prompt": "dusk \\ud83d", "results": ["%b"]}'
        return httpx.Response(200, content=body % (ID.encode(), status, LINK.encode()))

    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(service)) as http_client,
        AsyncEvoLink(base_url="http://127.0.0.1:9", http_client=http_client) as client,
    ):
        task = await client.images.generate(model="gpt-4o-image", prompt="dusk", timeout=60)
    assert task.urls == (LINK,)
