"""The emulator over HTTP, seen by clients that are not ours: httpx, aiohttp and bare sockets."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from PIL import Image

from evolink_async.emulator import ConnectionDropped, Emulator, Fault, read_faults

ROOT = Path(__file__).resolve().parents[2]
IMAGES = "/v1/images/generations"
IMAGE = {"model": "gpt-4o-image", "prompt": "a lighthouse"}
FAST = 2000.0  # an image in 50 ms


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[httpx.AsyncClient]:
    options = {"speed": FAST, **options}
    async with Emulator(**options).serve() as server:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        async with httpx.AsyncClient(base_url=server.base_url, headers=headers) as client:
            yield client


async def finished(client: httpx.AsyncClient, task: dict[str, Any], pause: float = 0.01) -> dict[str, Any]:
    while True:
        answer: dict[str, Any] = (await client.get(f"/v1/tasks/{task['id']}")).json()
        if answer["status"] in ("completed", "failed"):
            return answer
        await asyncio.sleep(pause)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other tasks of this loop are about to do."""
    async with asyncio.timeout(60):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


async def book_of(client: httpx.AsyncClient) -> dict[str, Any]:
    book: dict[str, Any] = (await client.get("/_emulator/book", headers={"Authorization": ""})).json()
    return book


# --- the way of a task -----------------------------------------------------------------------------------------


async def test_submit_poll_and_download_a_picture() -> None:
    async with running() as client:
        created = await client.post(IMAGES, json={**IMAGE, "n": 2, "size": "1024x1536"})
        assert created.status_code == 200
        assert created.headers["x-request-id"]
        done = await finished(client, created.json())
        assert done["progress"] == 100
        assert len(done["results"]) == 2
        async with httpx.AsyncClient() as plain:
            files = [await plain.get(link) for link in done["results"]]
        assert all(file.headers["content-type"] == "image/png" for file in files)
        assert files[0].content != files[1].content
        with Image.open(io.BytesIO(files[0].content)) as picture:
            assert picture.size == (171, 256)
        book = await book_of(client)
        assert book["media"] == {"requests": 2, "with_authorization": 0}
        assert book["account"]["spent"] == book["posts"][0]["charged"] == 5


async def test_sound_and_video_are_what_they_say() -> None:
    async with running(speed=20_000) as client:
        song = await client.post("/v1/audios/generations", json={"model": "suno-v5", "prompt": "a song"})
        film = await client.post("/v1/videos/generations", json={"model": "veo3", "prompt": "a film"})
        tracks, clip = await finished(client, song.json()), await finished(client, film.json())
        async with httpx.AsyncClient() as plain:
            sound, cover = await plain.get(tracks["results"][0]), await plain.get(tracks["result_data"][0]["image_url"])
            video = await plain.get(clip["results"][0])
        with wave.open(io.BytesIO(sound.content)) as file:
            assert file.getnframes() > 0
        assert cover.content.startswith(b"\x89PNG")
        assert video.headers["content-type"] == "video/mp4"
        assert video.content[4:8] == b"ftyp"


async def test_a_key_sent_to_the_media_host_is_noted_in_the_book() -> None:
    async with running() as client:
        done = await finished(client, (await client.post(IMAGES, json=IMAGE)).json())
        await client.get(done["results"][0])
        assert (await book_of(client))["media"] == {"requests": 1, "with_authorization": 1}


async def test_a_file_can_be_fetched_in_parts() -> None:
    async with running() as client:
        done = await finished(client, (await client.post(IMAGES, json=IMAGE)).json())
        link = done["results"][0]
        whole = await client.get(link)
        total = len(whole.content)

        async def part(wanted: str, **headers: str) -> httpx.Response:
            return await client.get(link, headers={"Range": wanted, **headers})

        middle = await part("bytes=10-19")
        assert middle.status_code == 206
        assert middle.content == whole.content[10:20]
        assert middle.headers["content-range"] == f"bytes 10-19/{total}"
        assert (await part("bytes=100-")).content == whole.content[100:]
        assert (await part("bytes=-7")).content == whole.content[-7:]
        assert (await part(f"bytes={total}-")).status_code == 416
        assert (await part("bytes=10-", **{"If-Range": whole.headers["etag"]})).status_code == 206
        assert (await part("bytes=10-", **{"If-Range": '"other"'})).content == whole.content
        head = await client.head(link)
        assert head.headers["content-length"] == str(total)
        assert head.content == b""


async def test_result_links_die_after_a_day_of_the_emulated_clock() -> None:
    now = 1_700_000_000.0
    emulator = Emulator(clock=lambda: now)
    headers = {"Authorization": f"Bearer {emulator.api_key}"}
    transport = httpx.ASGITransport(emulator.app)
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport, headers=headers) as client:
        task = (await client.post(IMAGES, json=IMAGE)).json()
        now += 1000
        link = (await client.get(f"/v1/tasks/{task['id']}")).json()["results"][0]
        assert link.startswith("http://evolink.test/results/")
        assert (await client.get(link)).status_code == 200
        now += 24 * 3600
        assert (await client.get(link)).status_code == 404


@pytest.mark.looptime
async def test_under_virtual_time_an_hour_of_tasks_takes_no_time() -> None:
    loop = asyncio.get_running_loop()
    emulator = Emulator(clock=loop.time)
    headers = {"Authorization": f"Bearer {emulator.api_key}"}
    transport = httpx.ASGITransport(emulator.app)
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport, headers=headers) as client:
        for _ in range(20):
            task = (await client.post("/v1/videos/generations", json={"model": "veo3", "prompt": "x"})).json()
            await finished(client, task, pause=5)
    assert 2000 < loop.time() < 6000


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "sk-evo-emulator"])
@pytest.mark.parametrize(("method", "path"), [("POST", IMAGES), ("GET", "/v1/tasks/x"), ("GET", "/v1/credits")])
async def test_without_the_key_everything_is_401(method: str, path: str, authorization: str) -> None:
    async with running() as client:
        answer = await client.request(method, path, headers={"Authorization": authorization})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "unauthorized"
        assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"model": NaN}', b"\xff", b"[" * 100_000])
async def test_a_body_that_is_not_a_json_object_is_400(content: bytes) -> None:
    async with running() as client:
        answer = await client.post(IMAGES, content=content)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_request"
        assert (await book_of(client))["refused"] == {"400": {"invalid_request": 1}}


async def test_errors_have_the_documented_shape() -> None:
    async with running() as client:
        answer = await client.post(IMAGES, json={"model": "seedance-2.0", "prompt": "x"})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert set(error) == {"code", "message", "type", "param"}
        assert error["param"] == "model"
        assert (await client.get("/v1/tasks/abc")).json()["error"]["code"] == "invalid_task_id"
        assert (await client.get("/v1/tasks/task-unified-1-abcdefgh")).status_code == 404
        assert (await client.get("/nothing/here")).status_code == 404
        wrong = await client.delete("/v1/credits")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "GET"


async def test_the_balance_runs_out_with_402() -> None:
    async with running(credits=3) as client:
        assert (await client.post(IMAGES, json=IMAGE)).status_code == 200
        answer = await client.post(IMAGES, json=IMAGE)
        assert answer.status_code == 402
        assert answer.json()["error"]["code"] == answer.json()["error"]["type"] == "insufficient_quota"
        figures = (await client.get("/v1/credits")).json()["data"]
        assert figures["user"]["remaining_credits"] == figures["token"]["remaining_credits"] == 0.5


@pytest.mark.parametrize("style", ["seconds", "date", "ms", "body", None])
async def test_a_429_carries_the_hint_in_the_chosen_style(style: Any) -> None:
    now = 1_800_000_000.0
    async with running(rate=0.5, retry_after=style, clock=lambda: now) as client:
        assert (await client.post(IMAGES, json=IMAGE)).status_code == 200
        answer = await client.post(IMAGES, json=IMAGE)
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        hint = answer.headers.get("retry-after")
        if style == "seconds":
            assert hint == "2"
        elif style == "date":
            assert 2 <= parsedate_to_datetime(hint or "").timestamp() - now <= 3
        elif style == "ms":
            assert 1000 < int(answer.headers["retry-after-ms"]) <= 2000
        assert (hint is not None) == (style in ("seconds", "date"))
        assert ("retry-after-ms" in answer.headers) == (style == "ms")
        assert (error.get("fallback_suggestion") == "retry after 2 seconds") == (style == "body")


async def test_a_repeated_key_is_marked_as_replayed() -> None:
    async with running() as client:
        key = {"Idempotency-Key": "ea-0123456789abcdef"}
        first, again = [await client.post(IMAGES, json=IMAGE, headers=key) for _ in range(2)]
        assert first.json() == again.json()
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        other = await client.post(IMAGES, json={**IMAGE, "n": 2}, headers=key)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
        book = await book_of(client)
        assert book["posts"][0]["idempotency_key"] == "ea-0123456789abcdef"
        assert book["replays"] == 1


async def test_batch_list_and_models_answer_and_can_be_switched_off() -> None:
    async with running() as client:
        ids = [(await client.post(IMAGES, json=IMAGE)).json()["id"] for _ in range(3)]
        batch = (await client.post("/v1/tasks/batch", json={"task_ids": [*ids, "task-unified-1-x"]})).json()
        assert [task["id"] for task in batch["data"]] == ids
        rows = (await client.get("/v1/tasks", params={"page_size": 2})).json()
        assert [row["id"] for row in rows["data"]] == ids[:0:-1]
        assert (rows["total"], rows["page"], rows["page_size"]) == (3, 1, 2)
        assert set(rows["data"][0]) == {
            "id",
            "status",
            "model",
            "type",
            "progress",
            "created_at",
            "has_results",
            "has_error",
            "credits_used",
        }
        assert {"id": "gpt-4o-image"} in (await client.get("/v1/models")).json()["data"]
    async with running(batch=False, listing=False) as client:
        assert (await client.post("/v1/tasks/batch", json={"task_ids": ids})).status_code == 404
        assert (await client.get("/v1/tasks")).status_code == 404


# --- faults ----------------------------------------------------------------------------------------------------


async def test_a_drop_before_accepting_closes_the_connection_and_leaves_nothing() -> None:
    async with running(faults=[Fault(path=IMAGES, nth=(1,), drop="before")]) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(IMAGES, json=IMAGE)
        book = await book_of(client)
        assert (book["posts"], book["faulted"]) == ([], 1)
        assert (await client.post(IMAGES, json=IMAGE)).status_code == 200


async def test_a_drop_after_accepting_leaves_a_paid_task_that_its_key_finds_again() -> None:
    async with running(faults=[Fault(method="POST", nth=(1,), drop="after")]) as client:
        key = {"Idempotency-Key": "ea-0123456789abcdef"}
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(IMAGES, json=IMAGE, headers=key)
        [post] = (await book_of(client))["posts"]
        again = await client.post(IMAGES, json=IMAGE, headers=key)
        assert again.headers["idempotency-replayed"] == "true"
        assert again.json()["id"] == post["task_id"]
        assert len((await book_of(client))["posts"]) == 1


async def test_a_dropped_connection_is_closed_on_the_wire_without_a_byte() -> None:
    async with Emulator(faults=[Fault(drop="after")]).serve() as server:
        host, port = server.base_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /v1/credits HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()
        await writer.wait_closed()


async def test_drops_and_an_abrupt_end_leave_no_noise_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    faults = [Fault(nth=(1, 2), drop="before"), Fault(nth=(3,), delay=60)]
    async with Emulator(faults=faults).serve() as server, aiohttp.ClientSession(server.base_url) as session:
        for _ in range(2):
            with pytest.raises(aiohttp.ClientError):
                await session.post("/v1/videos/generations", json={})
        waiting = asyncio.create_task(session.get("/v1/credits"))
        await until(lambda: "GET /v1/credits" in server.emulator.book()["requests"])
    # The server ended while this request was being worked on.
    with pytest.raises(aiohttp.ClientError):
        await waiting
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


async def test_in_bare_asgi_a_drop_is_an_exception() -> None:
    transport = httpx.ASGITransport(Emulator(faults=[Fault(drop="before")]).app)
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport) as client:
        with pytest.raises(ConnectionDropped):
            await client.get("/v1/credits")


async def test_a_status_fault_answers_as_told_and_accepts_nothing() -> None:
    fault = Fault(path="/v1/images", nth=(2,), status=503, body={"message": "busy"}, headers={"Retry-After": "7"})
    async with running(faults=[fault]) as client:
        statuses = []
        for _ in range(3):
            answer = await client.post(IMAGES, json=IMAGE)
            statuses.append(answer.status_code)
            if answer.status_code == 503:
                assert answer.json() == {"message": "busy"}
                assert answer.headers["retry-after"] == "7"
        assert statuses == [200, 503, 200]
        assert len((await book_of(client))["posts"]) == 2


async def test_garbage_can_be_answered_after_the_task_was_accepted() -> None:
    fault = Fault(path=IMAGES, status=524, raw_body=b"<html>\xff", content_type="text/html", accept=True)
    async with running(faults=[fault]) as client:
        answer = await client.post(IMAGES, json=IMAGE)
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (524, b"<html>\xff", "text/html")
        assert len((await book_of(client))["posts"]) == 1


@pytest.mark.looptime
async def test_a_late_answer_to_a_submission_has_its_task_at_once() -> None:
    async with running(faults=[Fault(path=IMAGES, delay=30)]) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(IMAGES, json=IMAGE, timeout=0.2)
        assert len((await book_of(client))["posts"]) == 1


async def test_faults_can_be_aimed_at_a_model_when_it_is_submitted_and_when_it_is_read() -> None:
    async with running(faults=[Fault(model="veo3", status=500)]) as client:
        task = (await client.post(IMAGES, json=IMAGE)).json()
        assert (await client.get(f"/v1/tasks/{task['id']}")).status_code == 200
        assert (await client.post("/v1/videos/generations", json={"model": "veo3", "prompt": "x"})).status_code == 500


async def test_a_probability_hits_the_same_requests_in_every_run() -> None:
    async def hits(seed: int) -> list[int]:
        async with running(seed=seed, faults=[Fault(probability=0.3, status=502)]) as client:
            return [(await client.get("/v1/credits")).status_code for _ in range(60)]

    assert await hits(1) == await hits(1) != await hits(2)
    assert 8 < (await hits(1)).count(502) < 30


async def test_faults_are_set_and_shown_at_run_time() -> None:
    async with running() as client:
        row = {"path": "/v1/credits", "nth": [1], "status": 500}
        assert (await client.post("/_emulator/faults", json=[row])).status_code == 200
        assert [(await client.get("/v1/credits")).status_code for _ in range(2)] == [500, 200]
        assert (await client.get("/_emulator/faults")).json() == {"faults": [{**row, "matched": 2, "hit": 1}]}
        assert (await client.post("/_emulator/faults", json=[{"stat": 5}])).status_code == 400
        assert (await client.post("/_emulator/faults", content=b"{")).status_code == 400
        assert len((await client.get("/_emulator/faults")).json()["faults"]) == 1
        assert (await client.post("/_emulator/faults", json=[])).json() == {"faults": []}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop="after", method="POST", path="/v1", model="veo3", probability=0.5),
        Fault(status=500, raw_body=b"\xff\x00", content_type="text/plain", nth=(1, 3), accept=True),
        Fault(status=500, raw_body=b"<html>", headers={"x": "y"}, delay=0.5),
        Fault(status=500, body={"a": [1]}),
    ],
    ids=["drop", "bytes", "text", "json"],
)
def test_faults_survive_json(fault: Fault) -> None:
    assert read_faults(json.dumps([fault.to_dict()])) == (fault,)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"drop": "later"},
        {"status": 42},
        {"status": "500"},
        {"status": 500, "nth": [0]},
        {"status": 500, "nth": [1], "probability": 0.5},
        {"status": 500, "probability": 2},
        {"status": 500, "headers": {"Content-Length": "1"}},
        {"status": 500, "path": 5},
        {"delay": -1},
        {"body": {}},
        {"nope": 1},
    ],
    ids=str,
)
def test_faults_that_make_no_sense_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Emulator(faults=[row])


# --- the server ------------------------------------------------------------------------------------------------


async def test_an_answer_does_not_wait_for_acknowledgements() -> None:
    async with running() as client:

        async def seconds() -> float:
            started = time.perf_counter()
            for _ in range(25):
                await client.get("/_emulator/health")
            return time.perf_counter() - started

        # Without TCP_NODELAY each of these takes 40 ms, always; a machine that is busy is so for a while.
        for _ in range(20):
            if await seconds() < 0.8:
                break
        else:
            pytest.fail("25 answers never came within 0.8 s")


@pytest.mark.looptime
async def test_the_server_stops_at_once_with_idle_and_busy_connections() -> None:
    async with aiohttp.ClientSession() as session:
        async with Emulator(faults=[Fault(path="/v1/credits", delay=60)]).serve() as server:
            async with session.get(f"{server.base_url}/_emulator/health") as answer:
                assert await answer.json() == {"status": "ok"}
            busy = asyncio.create_task(session.get(f"{server.base_url}/v1/credits"))
            await until(lambda: "GET /v1/credits" in server.emulator.book()["requests"])
            started = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - started < 0.5
        with pytest.raises(aiohttp.ClientError):
            await busy
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{server.base_url}/_emulator/health")


async def test_serving_again_continues_with_the_same_account() -> None:
    emulator = Emulator(speed=FAST)
    async with emulator.serve() as server, httpx.AsyncClient(base_url=server.base_url) as client:
        await client.post(IMAGES, json=IMAGE, headers={"Authorization": f"Bearer {server.api_key}"})
    async with emulator.serve() as server, httpx.AsyncClient(base_url=server.base_url) as client:
        assert len((await book_of(client))["posts"]) == 1
    assert len(emulator.book()["posts"]) == 1


async def test_a_taken_port_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        async with Emulator().serve(port=taken.getsockname()[1]):
            pass


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_run_serves_until_a_signal_and_returns(name: str) -> None:
    program = (
        "from evolink_async.emulator import Emulator\n"
        "Emulator().run(port=0, on_start=lambda server: print(server.base_url, flush=True))\n"
        "print('returned')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        base_url = process.stdout.readline().strip()
        assert httpx.get(f"{base_url}/_emulator/health").status_code == 200
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=100)
    assert (out, err, process.returncode) == ("returned\n", "", 0)


def test_importing_the_emulator_loads_no_server_and_no_client() -> None:
    program = (
        "import sys, evolink_async.emulator as e; e.Emulator().app\n"
        "heavy = {'starlette', 'uvicorn', 'PIL', 'httpx', 'pydantic'} & set(sys.modules)\n"
        "ours = {n for n in sys.modules if n.startswith('evolink_async.')}\n"
        "rooms = {n for n in ours if '.emulator' not in n and not n.endswith('._version')}\n"
        "print(heavy, rooms)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "set() set()\n"


async def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evolink_async.emulator.server", None)
    monkeypatch.delattr("evolink_async.emulator.server", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'evolink_async\[emulator\]'"):
        async with Emulator().serve():
            pass


@pytest.mark.parametrize(
    "options",
    [
        *({"speed": 0}, {"rate": 0}, {"concurrency": 0}, {"retry_after": "x"}, {"credits": -1}, {"failure_share": 2}),
        *({"speed": "5"}, {"rate": "5/s"}, {"credits": float("inf")}, {"failure_share": None}, {"concurrency": 1.5}),
        *({"seed": "x"}, {"seed": None}, {"batch": None}, {"idempotency": "no"}, {"burst": True}, {"api_key": ""}),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(ValueError, match=name):
        Emulator(**options)
