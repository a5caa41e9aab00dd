"""The ASGI app: what each kind of call gets, and what it never does."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from callback_world import call, status, told
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async.callbacks.asgi import CallbackApp
from evolink_async.callbacks.rules import MOST_BYTES, Tokens

TOKENS = Tokens("s" * 16)
NAME = TOKENS.name("job", "request")
TOKEN = TOKENS.token(NAME)
PATH = f"/evolink/{TOKEN}"


class Heard(list[Any]):
    def __call__(self, name: bytes, task_id: str) -> None:
        self.append((name, task_id))


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def app(heard: Heard) -> CallbackApp:
    return CallbackApp(TOKENS, heard)


async def test_a_callback_is_taken_with_nothing_but_a_status(app: CallbackApp, heard: Heard) -> None:
    assert await call(app, PATH, told("task-unified-1-a")) == (204, {})
    assert heard == [(NAME, "task-unified-1-a")]


@pytest.mark.parametrize(
    ("path", "root_path"),
    [(f"/{TOKEN}", ""), (f"/{TOKEN}", "/evolink"), (PATH, "/evolink"), (f"/a/b/c/{TOKEN}", "/a"), (TOKEN, "")],
)
async def test_it_works_wherever_it_is_mounted(app: CallbackApp, heard: Heard, path: str, root_path: str) -> None:
    assert await status(app, path, told("task-unified-1-a"), scope={"root_path": root_path}) == 204
    assert len(heard) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"])
async def test_other_methods_learn_nothing_about_the_token(app: CallbackApp, heard: Heard, method: str) -> None:
    good, bad = await call(app, PATH, method=method), await call(app, "/evolink/x", method=method)
    assert good == bad == (405, {b"content-length": b"0", b"allow": b"POST"})
    assert heard == []


async def test_every_wrong_token_gets_the_same_answer_and_its_body_is_not_read(app: CallbackApp, heard: Heard) -> None:
    class Unread:
        def __iter__(self) -> Any:
            yield b""  # what came with the head
            raise AssertionError("the body was read")

    paths = ["/", "", "/evolink", "/evolink/", f"{PATH}/", f"/{TOKEN[:-1]}", f"/{TOKEN}=", f"/{TOKEN.swapcase()}", "/é"]
    answers = [await call(app, path, Unread()) for path in paths]
    answers.append(await call(app, "/x", headers=[(b"content-length", b"99999999999")]))
    assert {str(answer) for answer in answers} == {str((404, {b"content-length": b"0", b"connection": b"close"}))}
    assert heard == []


async def test_a_body_over_a_mebibyte_is_refused_by_its_announced_length_or_as_soon_as_it_is_longer(
    app: CallbackApp, heard: Heard
) -> None:
    announced = [(b"Content-Length", str(MOST_BYTES + 1).encode())]
    assert await status(app, PATH, headers=announced) == 413
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 65536
            yield b"x" * 65536

    assert await status(app, PATH, endless()) == 413
    assert read <= MOST_BYTES + 4 * 65536
    # An announced length that is a lie helps nobody.
    assert await status(app, PATH, endless(), headers=[(b"content-length", b"10")]) == 413
    assert heard == []


async def test_a_body_in_small_chunks_is_taken_up_to_the_last_byte(app: CallbackApp, heard: Heard) -> None:
    body = told("task-unified-1-a", pad="x" * (MOST_BYTES - 60))
    body += b" " * (MOST_BYTES - len(body))
    assert await status(app, PATH, [body[start : start + 1000] for start in range(0, len(body), 1000)]) == 204
    assert await status(app, PATH, [body, b" "]) == 413
    assert len(heard) == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"id": 7}', b"\xff", told("../x"), b"[" * 100_000])
async def test_a_body_that_names_no_task_is_a_bad_request(app: CallbackApp, heard: Heard, body: bytes) -> None:
    assert await status(app, PATH, body) == 400
    assert heard == []


@pytest.mark.looptime
async def test_a_body_that_does_not_end_is_waited_for_ten_seconds(app: CallbackApp, heard: Heard) -> None:
    before = asyncio.get_running_loop().time()
    assert await call(app, PATH, b'{"id"', stuck=True) == (408, {b"content-length": b"0", b"connection": b"close"})
    assert asyncio.get_running_loop().time() - before == pytest.approx(10, abs=0.1)
    assert heard == []


@pytest.mark.looptime
async def test_a_body_that_drips_has_ten_seconds_in_all(app: CallbackApp, heard: Heard) -> None:
    sent = 0

    async def receive() -> dict[str, Any]:
        nonlocal sent
        sent += 1
        await asyncio.sleep(1)
        return {"type": "http.request", "body": b" ", "more_body": True}

    answers: list[Any] = []

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    await app(scope, receive, send)
    assert answers[0]["status"] == 408
    assert sent == 10
    assert heard == []


async def test_nothing_is_answered_to_who_has_gone_and_half_a_body_is_no_callback(
    app: CallbackApp, heard: Heard
) -> None:
    assert await call(app, PATH, told("task-unified-1-a"), gone=True) == (None, {})
    assert heard == []


async def test_a_callback_whose_sender_has_gone_before_the_answer_is_taken_all_the_same(
    app: CallbackApp, heard: Heard
) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": told("task-unified-1-a")}

    async def send(message: Any) -> None:
        raise ConnectionResetError

    await app({"type": "http", "method": "POST", "path": PATH, "headers": []}, receive, send)
    assert heard == [(NAME, "task-unified-1-a")]


async def test_it_lives_through_a_servers_lifespan_and_refuses_websockets(app: CallbackApp) -> None:
    coming = ["lifespan.startup", "lifespan.shutdown"]
    answers = []

    async def receive() -> dict[str, Any]:
        return {"type": coming.pop(0)}

    async def send(message: Any) -> None:
        answers.append(message["type"])

    await app({"type": "lifespan"}, receive, send)
    assert answers == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    coming.append("websocket.connect")
    await app({"type": "websocket"}, receive, send)
    assert answers[2:] == ["websocket.close"]


async def test_over_http_2_no_header_speaks_of_the_connection(app: CallbackApp) -> None:
    assert await call(app, "/x", scope={"http_version": "2"}) == (404, {b"content-length": b"0"})


PATHS = st.text(max_size=60) | st.sampled_from([PATH, f"/{TOKEN}", f"/{TOKEN}/", f"/{TOKEN[:-1]}A"])
METHODS = st.sampled_from(["POST", "POST", "POST", "GET", "HEAD"]) | st.text(max_size=8)
HEADERS = st.lists(
    st.tuples(st.sampled_from([b"content-length", b"host"]) | st.binary(max_size=9), st.binary(max_size=9))
)


@given(PATHS, METHODS, HEADERS, st.lists(st.binary(max_size=200), max_size=4))
@settings(max_examples=300)
def test_nothing_that_is_sent_crashes_it_or_is_believed(
    path: str, method: str, headers: list[tuple[bytes, bytes]], body: list[bytes]
) -> None:
    heard = Heard()
    answer = asyncio.run(status(CallbackApp(TOKENS, heard), path, body, method=method, headers=headers))
    assert answer in (204, 400, 404, 405, 413)
    assert bool(heard) == (answer == 204)
    if answer == 204:
        assert path.endswith(TOKEN)
        assert method == "POST"


async def test_frameworks_mount_it_and_a_server_serves_it_alone(heard: Heard) -> None:
    """Over TCP: chunked and drawn-out bodies come in pieces, and uvicorn sees that it is an ASGI 3 app."""
    import httpx
    import uvicorn
    from fastapi import FastAPI
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = CallbackApp(TOKENS, heard)
    fast = FastAPI()
    fast.mount("/evolink", app)
    star = Starlette(routes=[Mount("/deep", routes=[Mount("/evolink", app=app)])])
    for served, path in ((fast, PATH), (star, f"/deep{PATH}"), (app, PATH)):
        config = uvicorn.Config(served, port=0, log_config=None, lifespan="on", http="h11")
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  (it has no event)
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            heard.clear()

            async def chunked(size: int) -> Any:
                for _ in range(size):
                    yield b" " * 65536
                yield told("task-unified-1-a")

            assert (await http.post(path, content=told("task-unified-1-a"))).status_code == 204
            assert (await http.post(path, content=chunked(3))).status_code == 204
            assert (await http.get(path)).status_code == 405
            assert (await http.head(path)).status_code == 405
            assert (await http.post(path[:-1] + "!", content=b"{}")).status_code == 404
            assert len(heard) == 2
            with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # the server hangs up on the rest
                assert (await http.post(path, content=chunked(40))).status_code == 413
            assert len(heard) == 2
        server.should_exit = True
        await running


def test_the_app_needs_no_framework() -> None:
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "evolink_async/callbacks").glob("*.py"))
    assert not re.search(r"^\s*(from|import) (starlette|fastapi|uvicorn|httpx)", source, re.M)


def test_importing_the_room_loads_no_extra() -> None:
    script = "import sys; from evolink_async.callbacks import CallbackReceiver; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout.split()
    assert not {"starlette", "fastapi", "uvicorn", "sqlite3", "obstore"} & set(loaded)
