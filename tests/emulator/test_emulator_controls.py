"""The emulator's own controls over HTTP: clock, account, ending tasks, reset, recordings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async.emulator import Emulator, Fault

IMAGES = "/v1/images/generations"
IMAGE = {"model": "gpt-4o-image", "prompt": "a lighthouse"}


@asynccontextmanager
async def client_of(emulator: Emulator) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {emulator.api_key}"}
    transport = httpx.ASGITransport(emulator.app)
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport, headers=headers) as client:
        yield client


async def submit(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await client.post(IMAGES, json={**IMAGE, **more})
    assert answer.status_code == 200, answer.text
    task: dict[str, Any] = answer.json()
    return task


async def status_of(client: httpx.AsyncClient, task: dict[str, Any]) -> str:
    status: str = (await client.get(f"/v1/tasks/{task['id']}")).json()["status"]
    return status


# --- the clock -------------------------------------------------------------------------------------------------


async def test_a_standing_clock_lets_nothing_happen_until_it_is_advanced() -> None:
    async with client_of(Emulator(standing=True)) as client:
        task = await submit(client)
        assert await status_of(client, task) == "pending"
        told = (await client.post("/_emulator/clock", json={"advance": 50})).json()
        assert told["standing"] is True
        assert await status_of(client, task) == "processing"
        await client.post("/_emulator/clock", json={"advance": 500})
        assert await status_of(client, task) == "completed"


async def test_a_test_can_let_twenty_four_hours_pass() -> None:
    emulator = Emulator()
    async with client_of(emulator) as client:
        task = await submit(client)
        emulator.advance(1000)
        link = (await client.get(f"/v1/tasks/{task['id']}")).json()["results"][0]
        assert (await client.get(link)).status_code == 200
        emulator.advance(24 * 3600)
        assert (await client.get(link)).status_code == 404


async def test_a_running_clock_can_be_stopped_and_runs_on_from_there() -> None:
    moment = 1000.0
    emulator = Emulator(clock=lambda: moment)
    async with client_of(emulator) as client:
        assert (await client.post("/_emulator/clock", json={"standing": True})).json()["now"] == 1000
        moment += 500
        assert (await client.post("/_emulator/clock", json={"advance": 7})).json()["now"] == 1007
        assert (await client.post("/_emulator/clock", json={"standing": False})).json()["now"] == 1007
        moment += 3
        assert (await client.get("/_emulator/clock")).json() == {"now": 1010, "standing": False, "speed": 1}


async def test_with_a_standing_clock_the_rate_limit_waits_too() -> None:
    emulator = Emulator(standing=True, rate=1, burst=1)
    async with client_of(emulator) as client:
        await submit(client)
        assert (await client.post(IMAGES, json=IMAGE)).status_code == 429
        emulator.advance(1)
        await submit(client)


@pytest.mark.parametrize(
    "body", [{"advance": -1}, {"advance": "x"}, {"standing": 1}, {"nope": 1}, [], {"advance": True}]
)
async def test_a_clock_cannot_be_told_nonsense(body: Any) -> None:
    async with client_of(Emulator()) as client:
        answer = await client.post("/_emulator/clock", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        assert (await client.post("/_emulator/clock", content=b"{")).status_code == 400
    with pytest.raises(ValueError):
        Emulator().advance(float("nan"))


# --- the account -----------------------------------------------------------------------------------------------


async def test_the_account_tells_its_balance_key_and_limits() -> None:
    async with client_of(Emulator(credits=10, rate=5, concurrency=2)) as client:
        await submit(client)
        assert (await client.get("/_emulator/account")).json() == {
            "remaining": 7.5,
            "spent": 0,
            "reserved": 2.5,
            "key": "active",
            "rate": 5,
            "burst": 5,
            "concurrency": 2,
        }


async def test_money_can_be_paid_in_and_taken_out() -> None:
    async with client_of(Emulator(credits=1)) as client:
        assert (await client.post(IMAGES, json=IMAGE)).status_code == 402
        await client.post("/_emulator/account", json={"credits": 3})
        await submit(client)
        assert (await client.get("/v1/credits")).json()["data"]["user"]["remaining_credits"] == 0.5
        await client.post("/_emulator/account", json={"credits": 0})
        assert (await client.post(IMAGES, json=IMAGE)).status_code == 402
        account = (await client.get("/_emulator/book")).json()["account"]
        assert account["reserved"] + account["spent"] + account["remaining"] == account["initial"] == 2.5


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [("invalid", 401, "unauthorized"), ("disabled", 403, "key_disabled"), ("expired", 403, "key_expired")],
)
async def test_a_key_can_be_taken_away_and_given_back(key: str, status: int, code: str) -> None:
    emulator = Emulator()
    async with client_of(emulator) as client:
        task = await submit(client)
        emulator.set_account(key=key)
        for answer in (await client.post(IMAGES, json=IMAGE), await client.get(f"/v1/tasks/{task['id']}")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        emulator.set_account(key="active")
        assert await status_of(client, task) == "pending"
        assert emulator.book()["refused"] == {str(status): {code: 1}}


async def test_the_limits_can_change() -> None:
    async with client_of(Emulator(standing=True)) as client:
        await client.post("/_emulator/account", json={"rate": 2, "burst": 3})
        codes = [(await client.post(IMAGES, json=IMAGE)).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        changed = (await client.post("/_emulator/account", json={"rate": None, "burst": None, "concurrency": 4})).json()
        assert (changed["rate"], changed["concurrency"]) == (None, 4)
        codes = [(await client.post(IMAGES, json=IMAGE)).status_code for _ in range(2)]
        assert codes == [200, 429]


@pytest.mark.parametrize(
    "body", [{"credits": -1}, {"key": "lost"}, {"rate": 0}, {"concurrency": "2"}, {"burst": 0.5}, {"money": 1}], ids=str
)
async def test_an_account_cannot_be_told_nonsense(body: Any) -> None:
    async with client_of(Emulator()) as client:
        before = (await client.get("/_emulator/account")).json()
        assert (await client.post("/_emulator/account", json=body)).status_code == 400
        assert (await client.get("/_emulator/account")).json() == before


# --- ending a task, beginning again ----------------------------------------------------------------------------


async def test_a_task_ends_when_it_is_told_to() -> None:
    async with client_of(Emulator()) as client:
        first, second = await submit(client), await submit(client)
        told = (await client.post(f"/_emulator/tasks/{first['id']}", json={"status": "completed"})).json()
        assert told == (await client.get(f"/v1/tasks/{first['id']}")).json()
        assert (await client.get(told["results"][0])).status_code == 200
        await client.post(f"/_emulator/tasks/{second['id']}", json={"status": "failed", "code": "quota_exceeded"})
        assert (await client.get(f"/v1/tasks/{second['id']}")).json()["error"]["code"] == "quota_exceeded"
        again = await client.post(f"/_emulator/tasks/{second['id']}", json={"status": "completed"})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "task_finished")
        assert (await client.post("/_emulator/tasks/x", json={"status": "completed"})).status_code == 404
        assert (await client.post(f"/_emulator/tasks/{first['id']}", json={"status": "pending"})).status_code == 400


async def test_a_reset_begins_again_with_the_first_balance_and_faults() -> None:
    emulator = Emulator(credits=10, faults=[Fault(path="/v1/credits", nth=(1,), status=500)])
    async with client_of(emulator) as client:
        first = await submit(client)
        assert (await client.get("/v1/credits")).status_code == 500
        emulator.set_faults([])
        emulator.set_account(key="disabled", rate=1)
        assert (await client.post("/_emulator/reset")).json() == {"seed": 0}
        assert (await client.get(f"/v1/tasks/{first['id']}")).status_code == 404
        assert (await client.get("/v1/credits")).status_code == 500
        book = (await client.get("/_emulator/book")).json()
        assert (book["posts"], book["account"]["remaining"], book["refused"]) == ([], 10, {})


async def test_a_reset_can_bring_another_seed() -> None:
    emulator = Emulator(clock=lambda: 1000.0)
    async with client_of(emulator) as client:
        first = await submit(client)
        emulator.reset()
        assert (await submit(client))["id"] == first["id"]
        assert (await client.post("/_emulator/reset", json={"seed": 7})).json() == {"seed": 7}
        assert (await submit(client))["id"] != first["id"]
        assert (await client.post("/_emulator/reset", json={"seed": "x"})).status_code == 400


async def test_controls_know_their_methods_and_paths() -> None:
    async with client_of(Emulator()) as client:
        wrong = await client.put("/_emulator/clock")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")
        for path in ("/_emulator/nothing", "/_emulator/", "/_emulator"):
            nothing = await client.get(path)
            assert nothing.status_code == 404
            assert "account, book, clock, faults" in nothing.json()["error"]["message"]


async def test_the_faults_that_are_told_can_be_given_back() -> None:
    async with client_of(Emulator(faults=[{"method": "POST", "nth": 1, "status": 503, "raw_body": b"busy"}])) as client:
        assert (await client.post(IMAGES, json=IMAGE)).status_code == 503
        told = await client.get("/_emulator/faults")
        assert [(fault["matched"], fault["hit"]) for fault in told.json()["faults"]] == [(1, 1)]
        again = await client.post("/_emulator/faults", json=told.json())
        assert (again.status_code, [fault["hit"] for fault in again.json()["faults"]]) == (200, [0])
        assert (await client.post(IMAGES, json=IMAGE)).status_code == 503


# --- recordings ------------------------------------------------------------------------------------------------


def options() -> dict[str, Any]:
    return {
        "credits": 60,
        "rate": 2,
        "burst": 4,
        "failure_share": 0.3,
        "faults": [
            Fault(method="POST", path=IMAGES, probability=0.2, drop="after"),
            Fault(path="/v1/tasks/", probability=0.2, status=502),
        ],
    }


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 60),
            st.sampled_from(["submit", "keyed", "read", "batch", "end", "pay", "faults", "advance", "bad"]),
            st.integers(0, 3),
        ),
        max_size=30,
    ),
    seed=st.integers(0, 1000),
)
def test_a_replayed_run_has_the_same_book(steps: list[tuple[float, str, int]], seed: int) -> None:
    now = 1_700_000_000.0
    original = Emulator(seed=seed, record=True, clock=lambda: now, **options())

    async def run() -> None:
        nonlocal now
        async with client_of(original) as client:
            ids = ["task-unified-1-x"]
            for pause, action, n in steps:
                now += pause
                await act(original, client, ids, action, n)

    asyncio.run(run())
    other = Emulator(clock=lambda: 5.0, **options())
    done = other.replay(original.recording())
    assert done["differing"] == []
    assert book_of(other) == book_of(original)


async def act(emulator: Emulator, client: httpx.AsyncClient, ids: list[str], action: str, n: int) -> None:
    if action in ("submit", "keyed", "bad"):
        headers = {"Idempotency-Key": f"key-{n}-0123456789"} if action == "keyed" else {}
        body = {"model": "nope"} if action == "bad" else {**IMAGE, "prompt": f"p{n}", "n": (1, 2, 4)[n % 3]}
        try:
            answer = await client.post(IMAGES, json=body, headers=headers)
        except Exception:  # noqa: BLE001  the connection was dropped
            return
        if answer.status_code == 200:
            ids.append(answer.json()["id"])
    elif action == "read":
        await client.get(f"/v1/tasks/{ids[n % len(ids)]}")
    elif action == "batch":
        await client.post("/v1/tasks/batch", json={"task_ids": ids[:50]})
    elif action == "end":
        await client.post(f"/_emulator/tasks/{ids[-1]}", json={"status": ("failed", "completed")[n % 2]})
    elif action == "pay":
        emulator.set_account(credits=n * 10)
    elif action == "faults":
        emulator.set_faults([Fault(path="/v1", nth=(n + 1,), status=500)])
    elif action == "advance":
        emulator.advance(n * 100)


def book_of(emulator: Emulator) -> dict[str, Any]:
    """The book at the end of the run: settled, whatever the clocks say."""
    emulator.advance(10_000)
    return emulator.book()


async def test_a_recording_is_begun_fetched_replayed_and_ended_over_http_and_holds_no_key() -> None:
    emulator = Emulator(standing=True, api_key="sk-very-secret")
    async with client_of(emulator) as client:
        assert (await client.get("/_emulator/recording")).status_code == 404
        await client.post("/_emulator/recording")
        await submit(client)
        await client.get("/v1/credits", headers={"Authorization": "Bearer sk-another-secret"})
        text = (await client.get("/_emulator/recording")).text
        assert "secret" not in text
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line.get("status") for line in lines] == [None, 200, 401]
        assert (await client.delete("/_emulator/recording")).json() == {"recording": False}
        assert (await client.get("/_emulator/recording")).status_code == 404
        done = (await client.put("/_emulator/recording", content=text)).json()
        assert done == {"lines": 2, "differing": []}
        assert len((await client.get("/_emulator/book")).json()["posts"]) == 1


async def test_a_replay_says_what_was_answered_otherwise() -> None:
    rich, poor = Emulator(record=True), Emulator(credits=3)
    async with client_of(rich) as client:
        await submit(client)
        await submit(client)
    assert poor.replay(rich.recording())["differing"] == [{"line": 3, "recorded": 200, "now": 402}]


@pytest.mark.parametrize(
    "text", ["", "{}", "x", '{"recording": 2, "seed": 1}', '{"recording": 1, "seed": 1}\n{"at": 5}']
)
async def test_what_is_no_recording_is_refused(text: str) -> None:
    async with client_of(Emulator()) as client:
        assert (await client.put("/_emulator/recording", content=text)).status_code == 400
    with pytest.raises(ValueError):
        Emulator().replay(text)
