"""Callbacks, as a receiver that is not ours gets them. Time is virtual; the receiver has a real port."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from evolink_async.emulator import Emulator, Fault
from evolink_async.emulator.callbacks import post

IMAGES = "/v1/images/generations"


@dataclass
class Receiver:
    """Keeps what it gets. ``answers`` are statuses to give in turn, then 200; None closes without an answer."""

    answers: list[int | None] = field(default_factory=list)
    slow: float = 0.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    handlers: set[asyncio.Task[None]] = field(default_factory=set)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.handlers.add(task)
        try:
            await self._receive(reader, writer)
        finally:
            writer.transport.abort()
            self.handlers.discard(task)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.times.append(asyncio.get_running_loop().time())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
        self.heads.append(head)
        self.bodies.append(json.loads(await reader.readexactly(length)))
        await asyncio.sleep(self.slow)
        answer = self.answers.pop(0) if self.answers else 200
        if answer is not None:
            writer.write(f"HTTP/1.1 {answer} X\r\nContent-Length: 0\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    async def close(self) -> None:
        for task in self.handlers:
            task.cancel()
        await asyncio.gather(*self.handlers, return_exceptions=True)
        await asyncio.sleep(0)

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(3600):
            while True:
                if len(self.times) >= count:
                    return
                await asyncio.sleep(0.1)


@asynccontextmanager
async def receiving(**options: Any) -> AsyncIterator[Receiver]:
    receiver = Receiver(**options)
    server = await asyncio.start_server(receiver, "127.0.0.1", 0)
    async with server:
        receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hooks/one?token=t"
        yield receiver
        await receiver.close()


@asynccontextmanager
async def world(**options: Any) -> AsyncIterator[tuple[Emulator, httpx.AsyncClient]]:
    options = {"private_callbacks": True, "models": {"*": {"bias": 1, "sigma": 0}}, **options}
    emulator = Emulator(clock=asyncio.get_running_loop().time, **options)
    headers = {"Authorization": f"Bearer {emulator.api_key}"}
    transport = httpx.ASGITransport(emulator.app)
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport, headers=headers) as client:
        yield emulator, client
        await emulator.aclose()


async def submit(client: httpx.AsyncClient, url: str, **more: Any) -> dict[str, Any]:
    body = {"model": "gpt-4o-image", "prompt": "a lighthouse", "callback_url": url, **more}
    answer = await client.post(IMAGES, json=body)
    assert answer.status_code == 200, answer.text
    task: dict[str, Any] = answer.json()
    return task


def attempts(emulator: Emulator) -> list[str]:
    return [attempt["result"] for attempt in emulator.book()["posts"][0]["callback"]["attempts"]]


@pytest.mark.looptime
async def test_the_end_of_a_task_is_posted_as_a_poll_would_tell_it() -> None:
    async with receiving() as receiver, world() as (emulator, client):
        task = await submit(client, receiver.url)
        await receiver.wait(1)
        assert 100 <= receiver.times[0] <= 101.5  # the task takes 100 s, then its billing is confirmed
        assert receiver.bodies == [(await client.get(f"/v1/tasks/{task['id']}")).json()]
        assert receiver.bodies[0]["status"] == "completed"
        assert receiver.heads[0].startswith("POST /hooks/one?token=t HTTP/1.1\r\n")
        assert "content-type: application/json" in receiver.heads[0].lower()
        assert "authorization" not in receiver.heads[0].lower()
        assert attempts(emulator) == ["200"]
        post = emulator.book()["posts"][0]
        assert post["callback"]["delivered"]
        assert post["first_told_at"] == pytest.approx(receiver.times[0], abs=0.5)
        assert post["polls"] == 0


@pytest.mark.looptime
@pytest.mark.timeout(30)
async def test_a_moment_that_a_virtual_clock_cannot_show_comes_all_the_same() -> None:
    """Its steps are microseconds, and 0.891633 + 1 is not quite 1.891633."""
    models = {"*": {"bias": 1, "sigma": 0, "estimate": 0.391633}}
    dropped = Fault(method="CALLBACK", drop="before", nth=(1, 2, 3, 4))
    async with world(models=models, faults=[dropped]) as (emulator, client):
        await submit(client, "http://127.0.0.1:9/hook")
        await asyncio.sleep(60)
        assert len(attempts(emulator)) == 4


@pytest.mark.looptime
async def test_four_attempts_after_one_two_and_four_seconds_then_never_again() -> None:
    async with receiving(answers=[500, 404, None, 301, 200]) as receiver, world() as (emulator, client):
        await submit(client, receiver.url)
        await receiver.wait(4)
        await asyncio.sleep(1000)
        gaps = [b - a for a, b in zip(receiver.times, receiver.times[1:], strict=False)]
        assert gaps == pytest.approx([1, 2, 4], abs=0.1)
        assert attempts(emulator) == ["500", "404", "the connection was closed without an answer", "301"]
        assert not emulator.book()["posts"][0]["callback"]["delivered"]


@pytest.mark.looptime
async def test_after_a_success_there_are_no_more_attempts() -> None:
    async with receiving(answers=[503, 204]) as receiver, world() as (emulator, client):
        await submit(client, receiver.url)
        await receiver.wait(2)
        await asyncio.sleep(1000)
        assert attempts(emulator) == ["503", "204"]


@pytest.mark.looptime
async def test_a_receiver_has_ten_seconds_to_answer() -> None:
    async with receiving(slow=11) as receiver, world() as (emulator, client):
        await submit(client, receiver.url)
        await receiver.wait(2)
        assert receiver.times[1] - receiver.times[0] == pytest.approx(11, abs=0.2)  # 10 s, then the pause of 1 s
        assert attempts(emulator)[0] == "no answer in 10 s"


@pytest.mark.looptime
async def test_a_receiver_that_is_not_there_is_tried_four_times() -> None:
    async with receiving() as receiver:
        url = receiver.url
    async with world() as (emulator, client):
        await submit(client, url)
        await asyncio.sleep(200)
        assert len(attempts(emulator)) == 4
        assert all("refused" in result.lower() for result in attempts(emulator))


@pytest.mark.looptime
async def test_failed_and_cancelled_tasks_are_told_too_and_each_only_once() -> None:
    async with receiving() as receiver, world() as (emulator, client):
        tasks = [await submit(client, receiver.url) for _ in range(3)]
        emulator.end(tasks[0]["id"], "failed", code="service_error")
        emulator.end(tasks[1]["id"], "cancelled")
        await receiver.wait(3)
        await asyncio.sleep(500)
        told = {body["id"]: (body["status"], body.get("error", {}).get("code")) for body in receiver.bodies}
        assert [told[task["id"]] for task in tasks] == [
            ("failed", "service_error"),
            ("failed", "request_cancelled"),
            ("completed", None),
        ]
        assert len(receiver.bodies) == 3


@pytest.mark.looptime
async def test_a_fault_repeats_delays_forges_or_loses_callbacks() -> None:
    faults = [
        Fault(method="CALLBACK", nth=(1,), repeat=3),
        Fault(method="CALLBACK", nth=(2,), delay=30),
        Fault(method="CALLBACK", nth=(3,), patch={"status": "failed"}),
        Fault(method="CALLBACK", nth=(4, 5, 6, 7), drop="before"),
    ]
    async with receiving() as receiver, world(faults=faults) as (emulator, client):
        tasks = []
        for _ in range(4):
            tasks.append(await submit(client, receiver.url))
            await asyncio.sleep(1)
        await asyncio.sleep(300)
        ids = [body["id"] for body in receiver.bodies]
        first, second, third, fourth = (task["id"] for task in tasks)
        assert (ids.count(first), ids.count(second), ids.count(third), ids.count(fourth)) == (3, 1, 1, 0)
        assert receiver.times[ids.index(second)] == pytest.approx(131.5, abs=0.5)
        assert receiver.bodies[ids.index(third)]["status"] == "failed"
        posts = {post["task_id"]: post for post in emulator.book()["posts"]}
        assert posts[third]["status"] == "completed"
        assert [attempt["result"] for attempt in posts[fourth]["callback"]["attempts"]] == ["dropped"] * 4


@pytest.mark.looptime
async def test_requests_are_not_hit_by_faults_of_callbacks_nor_callbacks_by_those_of_requests() -> None:
    faults = [Fault(method="CALLBACK", path="/", drop="before"), Fault(path="/hooks", drop="before")]
    async with receiving() as receiver, world(faults=faults[1:]) as (_, client):
        await submit(client, receiver.url)
        await receiver.wait(1)
    async with receiving() as receiver, world(faults=faults[:1]) as (_, client):
        await submit(client, receiver.url)
        await asyncio.sleep(200)
        assert (await client.get("/v1/credits")).status_code == 200
        assert receiver.bodies == []


async def test_when_the_clock_stands_a_callback_comes_as_it_is_advanced() -> None:
    options: dict[str, Any] = {"private_callbacks": True, "standing": True, "models": {"*": {"bias": 1, "sigma": 0}}}
    async with receiving(answers=[500]) as receiver, Emulator(**options).serve() as server:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        async with httpx.AsyncClient(base_url=server.base_url, headers=headers) as client:
            await submit(client, receiver.url)
            server.emulator.advance(99)
            await asyncio.sleep(0.05)
            assert receiver.bodies == []
            server.emulator.advance(2)
            while attempts(server.emulator) != ["500"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert len(receiver.bodies) == 1
            server.emulator.advance(1)
            await receiver.wait(2)


@pytest.mark.parametrize("url", ["http://127.0.0.1/x", "http://example.com/x", "https://localhost/x", "ftp://h/x"])
async def test_without_private_callbacks_the_documented_rule_holds(url: str) -> None:
    transport = httpx.ASGITransport(Emulator(api_key="k").app)
    headers = {"Authorization": "Bearer k"}
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport, headers=headers) as client:
        body = {"model": "gpt-4o-image", "prompt": "x", "callback_url": url}
        answer = await client.post(IMAGES, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "callback_url")


@pytest.mark.parametrize("url", ["https://1.1.1.1/hook", "http://8.8.8.8:80/", "http://[2606:4700::1111]/"])
async def test_the_emulator_calls_nobody_outside(url: str) -> None:
    assert (await post(url, b"{}")).startswith("not sent")


@pytest.mark.parametrize("url", ["http://127.0.0.1:0/", "http://[::1", "http://nowhere.invalid/"])
async def test_a_receiver_that_cannot_be_reached_is_a_result_and_no_exception(url: str) -> None:
    assert ":" in await post(url, b"{}")


@pytest.mark.looptime
async def test_a_reset_forgets_callbacks_that_are_on_their_way() -> None:
    async with receiving() as receiver, world() as (emulator, client):
        await submit(client, receiver.url)
        emulator.reset()
        await asyncio.sleep(500)
        assert receiver.bodies == []


@pytest.mark.looptime
async def test_many_callbacks_at_once_all_arrive() -> None:
    async with receiving() as receiver, world() as (emulator, client):
        for _ in range(300):
            await submit(client, receiver.url)
        await receiver.wait(300)
        assert len({body["id"] for body in receiver.bodies}) == 300
        await asyncio.sleep(1)
        assert all(post["callback"]["delivered"] for post in emulator.book()["posts"])
