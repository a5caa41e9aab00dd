"""What EvoLink's own quickstart pages tell people to write works against the emulator, but for the base URL.

Three pages: the older quickstart (gpt-4o-image, an error-handling sample, a batch with aiohttp), the page of
gpt-4o-image, and the quickstart of Seedance 2.0. Their requests are sent as they stand there; the programs around them
are ours and make the same calls, with the same habits: fixed pauses, ``results`` by its index, Retry-After read by int.
"""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from json import dumps, loads
from typing import Any

import aiohttp
import pytest

from evolink_async.emulator import Dialect, Emulator, Fault, Server

# The bodies of the pages' samples.
OLD_QUICKSTART = {"model": "gpt-4o-image", "prompt": "海面上绚丽多彩的美丽日落", "size": "1024x1024", "n": 1}
IMAGE_PAGE = {"model": "gpt-4o-image", "prompt": "A beautiful sunset over the ocean with vibrant colors"}
SEEDANCE = {
    "model": "seedance-2.0-text-to-video",
    "prompt": "一只金毛巡回犬穿越阳光洒落的草地,电影级慢动作",
    "duration": 5,
    "quality": "720p",
    "aspect_ratio": "16:9",
}

# The pages' sample answers.
CREATED_OLD = {
    "created": 1757156493,
    "id": "task-unified-1757156493-imcg5zqt",
    "model": "gpt-4o-image",
    "object": "image.generation.task",
    "progress": 0,
    "status": "pending",
    "task_info": {"can_cancel": True, "estimated_time": 100},
    "type": "image",
    "usage": {"billing_rule": "per_call", "credits_reserved": 252, "estimated_cost": 0.252, "user_group": "default"},
}
CREATED_IMAGE = {**CREATED_OLD, "usage": {"billing_rule": "per_call", "credits_reserved": 2.5, "user_group": "default"}}
CREATED_SEEDANCE = {
    "created": 1774857405,
    "id": "task-unified-1774857405-abc123",
    "model": "seedance-2.0-text-to-video",
    "object": "video.generation.task",
    "progress": 0,
    "status": "pending",
    "type": "video",
    "task_info": {"can_cancel": True, "estimated_time": 165, "video_duration": 5},
    "usage": {"billing_rule": "per_second", "credits_reserved": 50, "user_group": "default"},
}
COMPLETED = {
    "created": 1757156493,
    "id": "task-unified-1757156493-imcg5zqt",
    "model": "gpt-4o-image",
    "object": "image.generation.task",
    "progress": 100,
    "results": ["https://tempfile.aiquickdraw.com/s/generated_image_url.png"],
    "status": "completed",
    "task_info": {"can_cancel": False},
    "type": "image",
}
FAILED = {
    **{name: value for name, value in COMPLETED.items() if name != "results"},
    "progress": 0,
    "status": "failed",
    "error": {"code": "content_policy_violation", "message": "Content policy violation.", "type": "task_error"},
}
REFUSED = {"error": {"code": "invalid_request", "message": "…", "type": "invalid_request_error", "param": "model"}}
CREDITS = {
    "success": True,
    "message": "",
    "data": {
        "user": {"remaining_credits": 1.5, "used_credits": 0.5},
        "token": {"remaining_credits": 1.5, "used_credits": 0.5, "unlimited_credits": False},
    },
}

FAST = 1000.0


def same_shape(answer: Any, sample: Any, path: str = "answer") -> None:
    """The answer has every field of the sample, with the same types; integers and fractions are both numbers."""
    if isinstance(sample, dict):
        assert isinstance(answer, dict), path
        assert set(sample) <= set(answer), f"{path} lacks {set(sample) - set(answer)}"
        for name, value in sample.items():
            same_shape(answer[name], value, f"{path}.{name}")
    elif isinstance(sample, list):
        assert isinstance(answer, list), path
        assert answer, path
        for item in answer:
            same_shape(item, sample[0], path)
    elif isinstance(sample, (int, float)) and not isinstance(sample, bool):
        assert isinstance(answer, (int, float)), path
        assert not isinstance(answer, bool), path
    else:
        assert type(answer) is type(sample), path


class Refused(Exception):
    def __init__(self, status: int, body: Any, headers: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status, self.body, self.headers = status, body, headers


class SampleClient:
    """Plain blocking calls, as in the pages' first samples."""

    def __init__(self, server: Server) -> None:
        self.base_url = server.base_url
        self.headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, self.headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(error.code, loads(error.read()), error.headers) from None

    def wait(self, task_id: str, pause: float = 0.02, most: int = 500) -> Any:
        for _ in range(most):
            task = self.call("GET", f"/v1/tasks/{task_id}")
            if task["status"] == "completed":
                return task
            if task["status"] == "failed":
                raise RuntimeError(task["error"]["code"])
            time.sleep(pause)
        raise TimeoutError(task_id)


async def in_a_thread(server: Server, program: Any) -> Any:
    return await asyncio.to_thread(program, SampleClient(server))


@pytest.mark.parametrize(
    ("kind", "body", "dialect", "sample"),
    [
        ("images", OLD_QUICKSTART, Dialect(credits="old"), CREATED_OLD),
        ("images", IMAGE_PAGE, Dialect(), CREATED_IMAGE),
        ("videos", SEEDANCE, Dialect(), CREATED_SEEDANCE),
    ],
    ids=["old quickstart", "gpt-4o-image page", "seedance quickstart"],
)
async def test_submit_poll_and_read_the_results(kind: str, body: Any, dialect: Dialect, sample: Any) -> None:
    def program(client: SampleClient) -> Any:
        created = client.call("POST", f"/v1/{kind}/generations", body)
        assert created["status"] == "pending"
        done = client.wait(created["id"])
        with urllib.request.urlopen(done["results"][0], timeout=60) as media:
            return created, done, media.headers["content-type"]

    async with Emulator(speed=FAST, dialect=dialect).serve() as server:
        created, done, content_type = await in_a_thread(server, program)
    same_shape(created, sample)
    same_shape(done, {**COMPLETED, "object": sample["object"]})
    assert content_type == ("video/mp4" if kind == "videos" else "image/png")


async def test_the_sample_answers_of_the_pages_are_told_field_by_field() -> None:
    async with Emulator(standing=True).serve() as server:

        def submit(client: SampleClient) -> Any:
            with pytest.raises(Refused) as refusal:
                client.call("POST", "/v1/videos/generations", {**SEEDANCE, "model": "seedance-2.0"})
            assert refusal.value.status == 400
            same_shape(refusal.value.body, REFUSED)
            same_shape(client.call("GET", "/v1/credits"), CREDITS)
            return client.call("POST", "/v1/images/generations", IMAGE_PAGE)

        task = await in_a_thread(server, submit)
        assert task["task_info"]["estimated_time"] == 100
        assert task["usage"]["credits_reserved"] == 2.5
        server.emulator.end(task["id"], "failed", code="content_policy_violation")
        same_shape(await in_a_thread(server, lambda client: client.call("GET", f"/v1/tasks/{task['id']}")), FAILED)


async def test_the_samples_that_look_for_results_inside_result_find_them() -> None:
    def program(client: SampleClient) -> Any:
        task = client.wait(client.call("POST", "/v1/images/generations", OLD_QUICKSTART)["id"])
        return task["result"]["results"], task["results"]

    async with Emulator(speed=FAST, dialect=Dialect(results="nested")).serve() as server:
        nested, results = await in_a_thread(server, program)
    assert nested == results != []


def handled(client: SampleClient) -> Iterator[str]:
    """The habits of the error-handling sample: by status, waiting as Retry-After says, read by int."""
    for _ in range(5):
        try:
            task = client.call("POST", "/v1/images/generations", OLD_QUICKSTART)
        except Refused as error:
            if error.status == 429:
                pause = int(error.headers.get("Retry-After", "60"))
                yield f"waits {pause}"
                time.sleep(pause / 100)
                continue
            yield {401: "key", 402: "credits", 400: "parameters"}.get(error.status, "other")
            return
        yield client.wait(task["id"])["status"]
        return


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"faults": [Fault(nth=(1,), status=429, headers={"Retry-After": "2"}, body={})]}, ["waits 2", "completed"]),
        ({"credits": 1}, ["credits"]),
        ({"failure_share": 0.0}, ["completed"]),
    ],
    ids=["429", "402", "200"],
)
async def test_the_error_handling_sample_meets_what_it_expects(options: Any, expected: list[str]) -> None:
    async with Emulator(speed=FAST, **options).serve() as server:
        assert await in_a_thread(server, lambda client: list(handled(client))) == expected
        server.emulator.set_account(key="invalid")
        assert await in_a_thread(server, lambda client: list(handled(client))) == ["key"]


async def test_the_rate_limit_tells_the_error_handling_sample_when_to_come_again() -> None:
    async with Emulator(speed=FAST, rate=50, burst=1).serve() as server:
        assert await in_a_thread(server, lambda client: list(handled(client))) == ["completed"]
        told = [await in_a_thread(server, lambda client: list(handled(client))[-1]) for _ in range(3)]
        assert told == ["completed"] * 3


async def test_the_batch_sample_with_aiohttp_gets_every_result() -> None:
    prompts = [f"picture number {number}" for number in range(12)]

    async def one(session: aiohttp.ClientSession, prompt: str) -> str:
        body = {"model": "gpt-4o-image", "prompt": prompt}
        async with session.post("/v1/images/generations", json=body) as answer:
            task = await answer.json()
        while True:
            async with session.get(f"/v1/tasks/{task['id']}") as answer:
                task = await answer.json()
            if task["status"] == "completed":
                return str(task["results"][0])
            assert task["status"] in ("pending", "processing")
            await asyncio.sleep(0.02)

    async with Emulator(speed=FAST).serve() as server:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        async with aiohttp.ClientSession(server.base_url, headers=headers) as session:
            links = await asyncio.gather(*(one(session, prompt) for prompt in prompts))
        assert len(set(links)) == 12
        assert len(server.emulator.book()["posts"]) == 12
