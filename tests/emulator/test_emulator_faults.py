"""Every fault rule, seen by clients that are not ours: bare sockets, httpx and aiohttp. Time is virtual."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import pytest
from bare_client import exchange

from evolink_async.emulator import ConnectionDropped, Emulator, Fault, Server, read_faults

pytestmark = pytest.mark.looptime
IMAGES = "/v1/images/generations"
IMAGE = {"model": "gpt-4o-image", "prompt": "a lighthouse"}
CREDITS = "/v1/credits"


@pytest.fixture(params=["httptools", "h11"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's HTTP parser: the fast one, or the one that is always there."""
    if request.param == "h11":
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    return str(request.param)


@asynccontextmanager
async def serving(*faults: Fault | dict[str, Any], **options: Any) -> AsyncIterator[Server]:
    async with Emulator(**{"speed": 2000, "faults": faults, **options}).serve() as server:
        yield server


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    async with httpx.AsyncClient(base_url=server.base_url, headers=headers) as client:
        yield client


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that other tasks of this loop are about to do."""
    async with asyncio.timeout(60):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


async def accepted(server: Server) -> int:
    return len(server.emulator.book()["posts"])


# --- the connection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drop", "posts"), [("before", 0), ("after", 1)])
@pytest.mark.parametrize(("reset", "end"), [(False, "closed"), (True, "reset")])
async def test_a_drop_ends_the_connection_without_a_byte(
    parser: str, drop: Any, posts: int, reset: bool, end: str
) -> None:
    async with serving(Fault(path=IMAGES, drop=drop, reset=reset)) as server:
        seen = await exchange(server, "POST", IMAGES, IMAGE)
        assert (seen.data, seen.end) == (b"", end)
        assert await accepted(server) == posts


async def test_a_cut_ends_the_connection_in_the_middle_of_the_body(parser: str) -> None:
    async with serving(Fault(path=CREDITS, cut=20)) as server:
        whole = await exchange(server, "GET", "/v1/models")
        assert whole.status == 200  # others are not hit
        seen = await exchange(server, "GET", CREDITS)
        assert len(seen.body) == 20
        assert seen.end == "closed"
        assert int(seen.header("content-length") or 0) > 20
        async with client_of(server) as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(CREDITS)


async def test_a_cut_can_be_a_reset(parser: str) -> None:
    async with serving(Fault(path=CREDITS, cut=20, reset=True)) as server:
        assert (await exchange(server, "GET", CREDITS)).end == "reset"


async def test_a_cut_after_accepting_leaves_a_paid_task_whose_id_is_lost(parser: str) -> None:
    async with serving(Fault(path=IMAGES, cut=10)) as server:
        seen = await exchange(server, "POST", IMAGES, IMAGE)
        assert (seen.status, len(seen.body)) == (200, 10)
        assert await accepted(server) == 1


async def test_a_stall_says_nothing_more_and_keeps_the_connection_open(parser: str) -> None:
    async with serving(Fault(path=CREDITS, stall=5)) as server:
        seen = await exchange(server, "GET", CREDITS, patience=0.3)
        assert (len(seen.body), seen.end) == (5, "open")


async def test_a_stalled_connection_ends_with_the_server(parser: str) -> None:
    async with serving(Fault(stall=0)) as server:
        reading = asyncio.create_task(exchange(server, "GET", CREDITS, patience=20))
        await until(lambda: "GET /v1/credits" in server.emulator.book()["requests"])
        started = asyncio.get_running_loop().time()
    assert (await reading).end in ("closed", "reset")
    assert asyncio.get_running_loop().time() - started < 2


async def test_a_drip_is_as_slow_as_asked_and_whole(parser: str) -> None:
    async with serving(Fault(path=CREDITS, drip=1000)) as server:
        seen = await exchange(server, "GET", CREDITS)
        assert seen.end == "closed"
        json.loads(seen.body)
        expected = len(seen.data) / 1000
        assert expected * 0.8 < seen.seconds < expected * 1.5 + 0.5


@pytest.mark.parametrize("claimed", [3, 5000])
async def test_a_wrong_length_is_claimed(parser: str, claimed: int) -> None:
    async with serving(Fault(path=CREDITS, content_length=claimed)) as server:
        seen = await exchange(server, "GET", CREDITS)
        assert seen.header("content-length") == str(claimed)
        assert 3 < len(seen.body) < 5000
        async with client_of(server) as client:
            if claimed == 5000:
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.get(CREDITS)
            else:
                assert len((await client.get(CREDITS)).content) == 3


async def test_garbage_comes_instead_of_http(parser: str) -> None:
    async with serving(Fault(path=CREDITS, garbage=b"SSH-2.0-OpenSSH_9.2\r\n")) as server:
        assert (await exchange(server, "GET", CREDITS)).data == b"SSH-2.0-OpenSSH_9.2\r\n"
        async with client_of(server) as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(CREDITS)


async def test_garbage_on_a_submission_accepts_nothing(parser: str) -> None:
    async with serving(Fault(path=IMAGES, garbage=b"\xff\xfe")) as server:
        await exchange(server, "POST", IMAGES, IMAGE)
        assert await accepted(server) == 0
        assert server.emulator.book()["faulted"] == 1


async def test_after_a_broken_connection_others_are_served(parser: str) -> None:
    async with serving(Fault(nth=(1,), drop="before"), Fault(nth=(2,), cut=1)) as server, client_of(server) as client:
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(CREDITS)
        assert (await client.get(CREDITS)).status_code == 200


async def test_without_a_connection_to_spoil_the_caller_sees_an_exception() -> None:
    app = Emulator(faults=[Fault(cut=5)]).app
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=httpx.ASGITransport(app)) as client:
        with pytest.raises(ConnectionDropped):
            await client.get(CREDITS)


# --- bombs -----------------------------------------------------------------------------------------------------


async def test_a_gzip_bomb_is_small_and_unpacks_to_its_size(parser: str) -> None:
    async with serving(Fault(path=CREDITS, bomb="gzip", size=5_000_000)) as server:
        seen = await exchange(server, "GET", CREDITS)
        assert (seen.status, seen.header("content-encoding")) == (200, "gzip")
        assert len(seen.body) < 100_000
        unpacked = zlib.decompress(seen.body, wbits=31)
        assert 5_000_000 <= len(unpacked) < 5_000_100
        assert json.loads(unpacked)["status"] == "pending"


async def test_a_nested_bomb_is_as_deep_as_asked(parser: str) -> None:
    async with serving(Fault(path=CREDITS, bomb="nested", size=100_000)) as server:
        seen = await exchange(server, "GET", CREDITS)
        assert seen.body == b"[" * 100_000 + b"]" * 100_000


async def test_an_endless_body_goes_on_as_long_as_it_is_read_and_no_further(parser: str) -> None:
    async with serving(Fault(path=CREDITS, bomb="endless")) as server:
        seen = await exchange(server, "GET", CREDITS, most=5_000_000)
        assert seen.end == "open"
        assert seen.header("content-length") is None


async def test_an_endless_body_waits_for_its_reader(parser: str) -> None:
    async with serving(Fault(path=CREDITS, bomb="endless")) as server:
        with socket.create_connection(("127.0.0.1", int(server.base_url.rsplit(":", 1)[1]))) as idle:
            tracemalloc.start()
            try:
                idle.send(f"GET {CREDITS} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                for _ in range(2000):
                    await asyncio.sleep(0)
                assert tracemalloc.get_traced_memory()[1] < 5_000_000
            finally:
                tracemalloc.stop()


# --- answers ---------------------------------------------------------------------------------------------------


async def test_a_status_with_its_body_and_headers_replaces_the_answer(parser: str) -> None:
    fault = {"path": CREDITS, "status": 503, "body": {"error": "busy"}, "headers": {"Retry-After": "7"}}
    async with serving(fault) as server:
        seen = await exchange(server, "GET", CREDITS)
        assert (seen.status, seen.header("retry-after"), json.loads(seen.body)) == (503, "7", {"error": "busy"})


async def test_a_patch_changes_fields_adds_some_and_takes_some_away() -> None:
    patch = {"status": "queued", "id": None, "extra": [1]}
    async with serving(Fault(path=IMAGES, patch=patch)) as server, client_of(server) as client:
        answer = (await client.post(IMAGES, json=IMAGE)).json()
        assert answer["status"] == "queued"
        assert "id" not in answer
        assert answer["extra"] == [1]
        assert answer["model"] == "gpt-4o-image"
        assert await accepted(server) == 1


async def test_a_finished_task_can_flap_back() -> None:
    fault = Fault(method="GET", path="/v1/tasks/", nth=(2,), patch={"status": "processing", "progress": 40})
    async with serving(fault, standing=True) as server, client_of(server) as client:
        task = (await client.post(IMAGES, json=IMAGE)).json()
        server.emulator.advance(100)
        statuses = [(await client.get(f"/v1/tasks/{task['id']}")).json()["status"] for _ in range(3)]
        assert statuses == ["completed", "processing", "completed"]


async def test_a_patch_goes_over_each_task_of_a_batch() -> None:
    async with serving(Fault(path="/v1/tasks/batch", patch={"results": []})) as server, client_of(server) as client:
        ids = [(await client.post(IMAGES, json=IMAGE)).json()["id"] for _ in range(3)]
        batch = (await client.post("/v1/tasks/batch", json={"task_ids": ids})).json()
        assert [task["results"] for task in batch["data"]] == [[], [], []]


async def test_a_young_task_is_not_found_for_its_first_seconds_and_left_out_of_batches() -> None:
    fault = Fault(status=404, younger_than=5, body={"error": {"code": "task_not_found", "message": "no such task"}})
    async with serving(fault, standing=True, speed=1) as server, client_of(server) as client:
        first = (await client.post(IMAGES, json=IMAGE)).json()["id"]
        server.emulator.advance(3)
        second = (await client.post(IMAGES, json=IMAGE)).json()["id"]
        server.emulator.advance(3)
        assert (await client.get(f"/v1/tasks/{first}")).status_code == 200
        assert (await client.get(f"/v1/tasks/{second}")).status_code == 404
        batch = (await client.post("/v1/tasks/batch", json={"task_ids": [first, second]})).json()
        assert [task["id"] for task in batch["data"]] == [first]
        server.emulator.advance(3)
        assert (await client.get(f"/v1/tasks/{second}")).status_code == 200


async def test_a_fault_can_be_aimed_by_a_request_header() -> None:
    blocked = Fault(path="/results/", request_headers={"User-Agent": "Python-urllib"}, status=403, raw_body=b"1010")
    async with serving(blocked) as server, client_of(server) as client:
        link = f"/results/{(await client.post(IMAGES, json=IMAGE)).json()['id']}-1.png"
        assert (await client.get(link, headers={"User-Agent": "Python-urllib/3.11"})).content == b"1010"
        assert (await client.get(link, headers={"User-Agent": "my-product/1.0"})).status_code in (200, 404)


async def test_a_batch_is_aimed_at_by_the_models_of_its_tasks() -> None:
    async with serving(Fault(path="/v1/tasks/batch", model="veo3", status=500)) as server, client_of(server) as client:
        picture = (await client.post(IMAGES, json=IMAGE)).json()["id"]
        film = (await client.post("/v1/videos/generations", json={"model": "veo3", "prompt": "x"})).json()["id"]
        assert (await client.post("/v1/tasks/batch", json={"task_ids": [picture]})).status_code == 200
        assert (await client.post("/v1/tasks/batch", json={"task_ids": [picture, film]})).status_code == 500


async def test_while_an_answer_is_late_its_key_is_in_progress() -> None:
    key = {"Idempotency-Key": "ea-0123456789abcdef"}
    async with serving(Fault(path=IMAGES, nth=(1,), delay=0.4)) as server, client_of(server) as client:
        first = asyncio.create_task(client.post(IMAGES, json=IMAGE, headers=key))
        await until(lambda: server.emulator.book()["posts"])
        early = await client.post(IMAGES, json=IMAGE, headers=key)
        assert (early.status_code, early.json()["error"]["code"]) == (409, "paid_outcome_unknown")
        created = await first
        replay = await client.post(IMAGES, json=IMAGE, headers=key)
        assert replay.headers["idempotency-replayed"] == "true"
        assert replay.json() == created.json()
        assert await accepted(server) == 1


async def test_a_client_that_gives_up_waiting_frees_its_key() -> None:
    key = {"Idempotency-Key": "ea-0123456789abcdef"}
    async with serving(Fault(path=IMAGES, nth=(1,), delay=0.3)) as server, client_of(server) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(IMAGES, json=IMAGE, headers=key, timeout=0.1)
        await asyncio.sleep(0.4)
        assert (await client.post(IMAGES, json=IMAGE, headers=key)).headers["idempotency-replayed"] == "true"


async def test_aiohttp_sees_broken_answers_too() -> None:
    faults = [Fault(nth=(1,), cut=3), Fault(nth=(2,), garbage=b"?"), Fault(nth=(3,), drop="before", reset=True)]
    async with serving(*faults) as server, aiohttp.ClientSession(server.base_url) as session:
        for _ in faults:
            with pytest.raises(aiohttp.ClientError):
                async with session.post(IMAGES, json=IMAGE) as answer:
                    await answer.read()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(path=IMAGES, patch={"id": None, "a": [1]}, probability=0.5),
        Fault(bomb="gzip", size=10, request_headers={"a": "b"}),
        Fault(garbage=b"\xff\x00", reset=True),
        Fault(garbage=b"SSH-2.0\r\n"),
        Fault(cut=5, drip=100.5, content_length=7),
        Fault(stall=0, younger_than=3.5, method="GET"),
        Fault(method="CALLBACK", repeat=3, delay=1.5, patch={"status": "failed"}),
    ],
    ids=str,
)
def test_faults_survive_json(fault: Fault) -> None:
    assert read_faults(json.dumps([fault.to_dict()])) == (fault,)


@pytest.mark.parametrize(
    "row",
    [
        {"patch": [1]},
        {"bomb": "zip"},
        {"cut": -1},
        {"drip": 0},
        {"stall": "x"},
        {"cut": 1.5},
        {"status": 500.5},
        {"status": True},
        {"bomb": "gzip", "size": None},
        {"garbage": True},
        {"status": 500, "raw_body": ["no"]},
        {"status": 500, "raw_body_base64": 5},
        {"reset": "yes"},
        {"status": 500, "accept": 1},
        {"status": 500, "nth": True},
        {"request_headers": {"a": 1}, "status": 500},
        {"repeat": 2},
        {"method": "CALLBACK", "status": 500},
        {"method": "CALLBACK", "cut": 5},
        {"younger_than": 5},
        {"method": "DELETE", "younger_than": 5, "status": 404},
    ],
    ids=str,
)
def test_faults_that_make_no_sense_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Fault.from_dict(row)
