"""A client's options, and its life: built, bound to a loop, closed, forgotten."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import queue
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from canned import BASE, canned, error, our_tasks
from support import Odd

from evolink_async import (
    AsyncEvoLink,
    ClosedError,
    ConfigurationError,
    EvoLinkError,
    ImageRequest,
    RateLimit,
    RetryPolicy,
    SubmitOutcomeUnknownError,
)
from evolink_async.emulator import Emulator
from evolink_async.http.transport import SlotTransport

PICTURE = ImageRequest(model="gpt-4o-image", prompt="a lighthouse")


def now() -> float:
    return asyncio.get_running_loop().time()


# -- Options ---------------------------------------------------------------------------------------


WRONG: list[dict[str, Any]] = [
    {"api_key": ""},
    {"api_key": "two words"},
    {"api_key": "sk-123-456\n"},
    {"api_key": "schlüssel"},
    {"api_key": 7},
    {"api_key": "YOUR_API_KEY"},
    {"base_url": ""},
    {"base_url": "http://api.evolink.ai"},
    {"base_url": "ftp://127.0.0.1"},
    {"base_url": "api.evolink.ai"},
    {"base_url": "https://user:secret@api.evolink.ai"},
    {"base_url": "https://api.evolink.ai?x=1"},
    {"base_url": 7},
    {"base_url": b"https://api.evolink.ai"},
    {"files_url": ""},
    {"files_url": "http://files-api.evolink.ai"},
    {"files_url": 7},
    {"rate_limit": 0},
    {"rate_limit": 5},
    {"rate_limit": "5"},
    {"rate_limit": "0/s"},
    {"rate_limit": "-1/s"},
    {"rate_limit": "5/fortnight"},
    {"max_connections": 0},
    {"max_connections": -1},
    {"max_connections": 10**6},
    {"max_connections": 5.0},
    {"max_connections": True},
    {"max_connections": "10"},
    {"request_timeout": 0},
    {"request_timeout": -1},
    {"request_timeout": float("nan")},
    {"request_timeout": float("inf")},
    {"request_timeout": "30"},
    {"request_timeout": True},
    {"request_timeout": 10**400},
    {"retry": 3},
    {"retry": RetryPolicy},
    {"on_lost_response": "retry"},
    {"on_lost_response": None},
    {"on_lost_response": ["replay"]},
    {"validate": 1},
    {"validate": 0},
    {"validate": "yes"},
    {"validate": None},
    {"http_client": httpx.Client},
    {"http_client": httpx.AsyncClient},
    {"http_client": Odd()},
    {"http_client": "client"},
    {"allow_private_hosts": "no"},
    {"allow_private_hosts": 1},
]


@pytest.mark.parametrize("options", WRONG, ids=repr)
def test_an_option_that_cannot_work_is_refused_when_the_client_is_built(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        AsyncEvoLink(**options)
    key = options.get("api_key")
    if isinstance(key, str) and key:
        assert key.strip() not in str(caught.value)


async def test_a_closed_or_a_synchronous_http_client_is_refused() -> None:
    with httpx.Client() as synchronous, pytest.raises(ConfigurationError):
        AsyncEvoLink(http_client=synchronous)  # type: ignore[arg-type]
    async with httpx.AsyncClient() as http_client:
        AsyncEvoLink(http_client=http_client)
    with pytest.raises(ConfigurationError, match="closed"):
        AsyncEvoLink(http_client=http_client)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "60", True, 10**400])
async def test_a_timeout_that_cannot_work_is_refused_before_anything_is_sent(timeout: Any) -> None:
    async with canned(lambda request: pytest.fail("it was sent")) as client:
        calls = [
            client.run(PICTURE, timeout=timeout),
            client.submit(PICTURE, timeout=timeout),
            client.images.generate(model="gpt-4o-image", prompt="x", timeout=timeout),
            client.images.submit(model="gpt-4o-image", prompt="x", timeout=timeout),
            client.tasks.get("task-1", timeout=timeout),
            client.tasks.get_many(["task-1"], timeout=timeout),
            client.tasks.wait("task-1", timeout=timeout),
            anext(client.tasks.list(timeout=timeout)),
            client.credits(timeout=timeout),
            client.raw("GET", "/v1/x", timeout=timeout),
            client.raw("POST", "/v1/x", timeout=timeout),
        ]
        for call in calls:
            with pytest.raises(ConfigurationError, match="timeout"):
                await call


def test_without_a_key_there_is_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVOLINK_API_KEY")
    with pytest.raises(ConfigurationError, match="EVOLINK_API_KEY"):
        AsyncEvoLink()
    monkeypatch.setenv("EVOLINK_API_KEY", "")
    with pytest.raises(ConfigurationError, match="empty"):
        AsyncEvoLink()


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ({}, {}, ("https://api.evolink.ai", "https://files-api.evolink.ai")),
        ({"base_url": "https://api.evolink.ai/v1/"}, {}, ("https://api.evolink.ai", "https://files-api.evolink.ai")),
        ({"base_url": "http://localhost:8085/v1"}, {}, ("http://localhost:8085", "http://localhost:8085")),
        ({"base_url": "http://[::1]:8085"}, {}, ("http://[::1]:8085", "http://[::1]:8085")),
        ({"base_url": "https://gate.example/evolink/v1"}, {}, ("https://gate.example/evolink", "https://gate.example")),
        ({}, {"EVOLINK_BASE_URL": "http://127.0.0.1:1"}, ("http://127.0.0.1:1", "http://127.0.0.1:1")),
        ({}, {"EVOLINK_BASE_URL": ""}, ("https://api.evolink.ai", "https://files-api.evolink.ai")),
        (
            {"base_url": "http://127.0.0.1:2"},
            {"EVOLINK_BASE_URL": "http://127.0.0.1:1", "EVOLINK_FILES_BASE_URL": "https://files.example"},
            ("http://127.0.0.1:2", "https://files.example"),
        ),
        (
            {"files_url": "https://mine.example"},
            {"EVOLINK_FILES_BASE_URL": "https://files.example"},
            ("https://api.evolink.ai", "https://mine.example"),
        ),
    ],
)
def test_addresses_come_from_the_options_then_the_environment(
    given: dict[str, str], environment: dict[str, str], expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = AsyncEvoLink(**given)._core.options  # type: ignore[arg-type]
    assert (options.base_url, options.files_url) == expected


@pytest.mark.parametrize("variable", ["EVOLINK_BASE_URL", "EVOLINK_FILES_BASE_URL"])
def test_a_wrong_address_of_the_environment_is_told_by_its_variable(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "127.0.0.1:8085")
    with pytest.raises(ConfigurationError, match=f"^{variable} must begin with https://, got '127.0.0.1:8085'"):
        AsyncEvoLink()


async def test_the_key_is_asked_for_per_request_and_shows_nowhere(api_key: str) -> None:
    asked = []

    async def rotating() -> str:
        asked.append(f"{api_key}-{len(asked)}")
        return asked[-1]

    seen = []
    async with canned(
        lambda request: (seen.append(request.headers["authorization"]), error(403, message="no"))[1], api_key=rotating
    ) as client:
        for _ in range(3):
            with pytest.raises(EvoLinkError) as caught:
                await client.tasks.get("task-1")
            assert api_key not in str(caught.value) + repr(caught.value) + repr(client)
    assert seen == [f"Bearer {api_key}-{n}" for n in range(3)]


def test_a_limit_is_text_or_an_object_and_everything_good_is_taken(api_key: str) -> None:
    for limit in ("5/s", "60/min", RateLimit(5), RateLimit(1000, per=3600), None):
        AsyncEvoLink(api_key, rate_limit=limit, max_connections=1, request_timeout=1, validate="warn")
    assert api_key not in repr(AsyncEvoLink(api_key))


# -- Open and closed -------------------------------------------------------------------------------


def test_a_client_is_built_without_a_loop_and_bound_to_none() -> None:
    client = AsyncEvoLink()
    assert repr(client) == "<AsyncEvoLink https://api.evolink.ai idle>"
    assert client._core.session is None


CALLS: list[Callable[[AsyncEvoLink], Awaitable[Any]]] = [
    lambda client: client.run(PICTURE),
    lambda client: client.submit(PICTURE),
    lambda client: client.images.generate(model="gpt-4o-image", prompt="x"),
    lambda client: client.tasks.get("task-1"),
    lambda client: client.tasks.get_many(["task-1", "task-2"]),
    lambda client: client.tasks.wait("task-1"),
    lambda client: anext(client.tasks.list()),
    lambda client: client.credits(),
    lambda client: client.raw("GET", "/v1/x"),
    lambda client: client.raw("POST", "/v1/x"),
    lambda client: client.pool([PICTURE]).__aenter__(),
    lambda client: client.run_many([PICTURE]),
    lambda client: client.__aenter__(),
]


async def test_a_closed_client_says_so_and_closing_can_be_repeated() -> None:
    async with canned(lambda request: {"id": "task-1"}) as client:
        await client.submit(PICTURE)
        assert "open" in repr(client)
        await client.aclose()
        await client.aclose()
        assert "closed" in repr(client)
        for call in CALLS:
            with pytest.raises(ClosedError):
                await call(client)
    with pytest.raises(ClosedError):
        async with client:
            pass


async def test_the_users_http_client_is_used_and_never_closed() -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        return httpx.Response(200, json={"id": "task-1"})

    async with httpx.AsyncClient(transport=httpx.MockTransport(handler), headers={"x-mine": "1"}) as http_client:
        async with AsyncEvoLink(base_url=BASE, http_client=http_client) as client:
            await client.submit(PICTURE)
        assert not http_client.is_closed
        assert (await http_client.get("http://else.example/")).status_code == 200
    assert seen == ["127.0.0.1", "else.example"]


@pytest.mark.looptime
async def test_a_users_http_client_that_was_closed_meanwhile_sends_nothing_and_leaves_no_doubt() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"id": "task-1", "status": "processing"})

    http_client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    async with AsyncEvoLink(base_url=BASE, http_client=http_client) as client:
        task = await client.submit(PICTURE)
        waiting = asyncio.create_task(client.tasks.wait(task))
        await http_client.aclose()
        begun = now()
        for call in (
            client.submit(PICTURE),
            client.tasks.get("task-1"),
            client.raw("POST", "/v1/elsewhere"),
            client.files.upload(b"\x89PNG\r\n\x1a\n"),
        ):
            with pytest.raises(ConfigurationError, match="http_client was closed"):
                await call
        pool = client.pool([PICTURE, PICTURE])
        with pytest.raises(ConfigurationError, match="http_client was closed"):
            async with pool:
                assert [outcome.status async for outcome in pool] == ["not_submitted"] * 2
        assert now() == begun
        with pytest.raises(ConfigurationError, match="http_client was closed"):
            await waiting


async def test_a_body_that_the_users_client_has_read_already_is_read_all_the_same() -> None:
    async def hook(response: httpx.Response) -> None:
        await response.aread()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"id": "task-1"}'})

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, event_hooks={"response": [hook]}) as http_client:
        client = AsyncEvoLink(base_url=BASE, http_client=http_client)
        assert (await client.submit(PICTURE)).id == "task-1"
        await client.aclose()


def test_a_client_is_neither_copied_nor_pickled() -> None:
    client = AsyncEvoLink()
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="make one in each process"):
            attempt(client)


# -- Forgotten -------------------------------------------------------------------------------------


async def test_a_forgotten_client_is_a_resource_warning_and_others_are_not(api_key: str) -> None:
    async def use(client: AsyncEvoLink) -> None:
        await client.submit(PICTURE)

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"id": "task-1"})

    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as http_client:
        forgotten = AsyncEvoLink(base_url=BASE, http_client=http_client)
        await use(forgotten)
        gc.collect()
        del forgotten
        with pytest.warns(ResourceWarning, match="unclosed <AsyncEvoLink") as caught:
            gc.collect()
        assert api_key not in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            closed = AsyncEvoLink(base_url=BASE, http_client=http_client)
            await use(closed)
            await closed.aclose()
            never_used = AsyncEvoLink(base_url=BASE)
            with pytest.raises(ConfigurationError):
                AsyncEvoLink(base_url="nonsense")
            del closed, never_used
            gc.collect()


# -- Loops, threads, processes ---------------------------------------------------------------------


@pytest.fixture
def elsewhere(api_key: str) -> Iterator[str]:
    """The address of an emulator that lives in a thread of its own, and so outlives the test's loops."""
    address: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        async with Emulator(speed=200, api_key=api_key).serve() as server:
            over = asyncio.Event()
            address.put((server.base_url, asyncio.get_running_loop(), over))
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    base_url, loop, over = address.get(timeout=10)
    yield base_url
    loop.call_soon_threadsafe(over.set)
    thread.join()


def test_a_closed_loop_is_replaced_and_what_was_learned_is_kept(elsewhere: str) -> None:
    client = AsyncEvoLink(base_url=elsewhere)
    transports: list[SlotTransport] = []

    async def use() -> None:
        await asyncio.gather(*(client.run(PICTURE) for _ in range(3)))
        assert client._core.session is not None
        assert isinstance(client._core.session.transport, SlotTransport)
        transports.append(client._core.session.transport)
        assert client._core.session.transport.idle > 0  # sockets that are still open when their loop is closed
        assert client._core.session.downloads.idle == 0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            asyncio.run(use())
            assert client._core.memory.rates["gpt-4o-image"] > 5
            assert client._core.memory.reads.batches is True
        assert [transport.is_closed for transport in transports] == [True, True, False]
        asyncio.run(client.aclose())  # its loop is gone: there is only something to let go of
        assert transports[-1].is_closed
        gc.collect()
    assert "closed" in repr(client)


async def test_a_second_loop_while_the_first_lives_is_refused_and_hurts_nothing(client: AsyncEvoLink) -> None:
    await client.credits()
    caught: list[BaseException] = []

    def elsewhere() -> None:
        for call in (client.credits, client.aclose, lambda: client.run(PICTURE)):
            try:
                asyncio.run(call())
            except BaseException as error:  # noqa: BLE001
                caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert [type(error) for error in caught] == [ConfigurationError] * 3
    assert "loop" in str(caught[0])
    assert (await client.run(PICTURE)).succeeded


def _in_child(client: AsyncEvoLink, results: Any) -> None:
    async def try_it() -> None:
        for call in (client.credits, client.aclose):
            try:
                await call()
            except ConfigurationError as error:
                results.put(str(error))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(try_it())
        client._core.__del__()
    results.put([str(warning.message) for warning in caught if "AsyncEvoLink" in str(warning.message)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
async def test_a_forked_child_is_refused_and_the_parent_goes_on(client: AsyncEvoLink) -> None:
    await client.credits()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_child, args=(client, results))
    child.start()
    said = [await asyncio.to_thread(results.get, timeout=120) for _ in range(3)]
    await asyncio.to_thread(child.join)
    assert all("fork" in text for text in said[:2])
    assert said[2] == []
    assert (await client.run(PICTURE)).succeeded


# -- Closed while others wait ----------------------------------------------------------------------


async def _ends_soon(*pending: asyncio.Task[Any]) -> list[BaseException | None]:
    await asyncio.wait(pending, timeout=10)
    assert all(task.done() for task in pending), "somebody hangs"
    return [task.exception() for task in pending]


@pytest.mark.looptime
async def test_closing_ends_every_wait_and_read_with_closed_error() -> None:
    async def handler(request: httpx.Request) -> Any:
        if request.url.path.endswith("/slow"):
            await asyncio.sleep(1000)
        return {"id": request.url.path.rpartition("/")[2], "status": "processing"}

    async with canned(handler) as client:
        pending = [
            asyncio.create_task(call)
            for call in (
                client.tasks.wait("task-1"),
                client.tasks.wait("task-1"),
                client.tasks.wait("slow"),
                client.run(PICTURE),
                client.tasks.get("slow"),
                client.tasks.get_many(["task-1", "slow"]),
                client.raw("GET", "/v1/slow"),
                client.raw("POST", "/v1/slow"),
                client.credits(),
            )
        ]
        await asyncio.sleep(10)
        began = now()
        await client.aclose()
        ends = await _ends_soon(*pending)
        assert now() == began
    assert [type(end) for end in ends[:8]] == [ClosedError] * 8
    assert "generations" in str(ends[3])  # the id that this service gave
    assert not our_tasks()


@pytest.mark.looptime
async def test_closing_ends_submissions_sent_and_unsent() -> None:
    async def handler(request: httpx.Request) -> Any:
        await asyncio.sleep(3 if b"quick" in request.content else 1000)
        return {"id": "task-1", "status": "processing"}

    async with canned(handler, rate_limit="2/min", on_lost_response="hold") as client:
        quick = asyncio.create_task(client.run(ImageRequest(model="gpt-4o-image", prompt="quick")))
        await asyncio.sleep(31)
        slow, *queued = [asyncio.create_task(client.submit(PICTURE)) for _ in range(4)]
        await asyncio.sleep(10)
        await client.aclose()
        ends = await _ends_soon(quick, slow, *queued)
    assert [type(end) for end in ends] == [ClosedError, SubmitOutcomeUnknownError, *[ClosedError] * 3]
    assert "task-1" in str(ends[0])
    assert "nothing was sent" in str(ends[2])
    assert not our_tasks()


@pytest.mark.looptime
async def test_a_task_accepted_while_the_client_closes_is_named_to_its_caller() -> None:
    async def handler(request: httpx.Request) -> Any:
        await asyncio.sleep(3)
        return {"id": "task-late", "status": "processing"}

    async with canned(handler) as client:
        running = asyncio.create_task(client.run(PICTURE))
        await asyncio.sleep(1)
        await client.aclose()
        assert now() == pytest.approx(3, abs=0.1)
        (end,) = await _ends_soon(running)
    assert isinstance(end, ClosedError)
    assert "task-late" in str(end)


@pytest.mark.looptime
@pytest.mark.parametrize("after", [0.0, 1.0, 40.0])
async def test_closing_ends_a_pool_in_the_middle(after: float) -> None:
    accepted = 0

    async def handler(request: httpx.Request) -> Any:
        nonlocal accepted
        await asyncio.sleep(0.5)
        if request.method == "POST":
            accepted += 1
            return {"id": f"task-{accepted}", "status": "processing", "task_info": {"estimated_time": 1000}}
        return {"id": request.url.path.rpartition("/")[2], "status": "processing"}

    async with canned(handler) as client:
        outcomes = []
        reason: list[BaseException] = []

        async def consume() -> None:
            try:
                async with client.pool((PICTURE for _ in range(10_000)), max_outstanding=100) as pool:
                    async for outcome in pool:
                        outcomes.append(outcome)
            except EvoLinkError as error:
                reason.append(error)

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(after)
        await client.aclose()
        await asyncio.wait_for(consumer, 30)
    assert isinstance(reason[0], ClosedError)
    assert {outcome.status for outcome in outcomes} <= {"unfinished", "not_submitted"}
    assert sum(outcome.status == "unfinished" for outcome in outcomes) == accepted
    assert not our_tasks()


@pytest.mark.looptime
async def test_a_close_that_is_cancelled_leaves_nothing_running() -> None:
    async def handler(request: httpx.Request) -> Any:
        await asyncio.sleep(1000)

    for cancel in ("native", "scope"):
        async with canned(handler) as client:
            submitting = asyncio.create_task(client.submit(PICTURE))
            await asyncio.sleep(1)
            if cancel == "scope":
                with anyio.move_on_after(1):
                    await client.aclose()
            else:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1):
                        await client.aclose()
            (end,) = await _ends_soon(submitting)
            assert isinstance(end, SubmitOutcomeUnknownError)


async def test_a_close_that_is_cancelled_closes_every_connection(api_key: str) -> None:
    emulator = Emulator(api_key=api_key, faults=[{"path": "/v1/images", "delay": 30}])
    async with emulator.serve() as server:
        client = AsyncEvoLink(base_url=server.base_url)
        submitting = asyncio.create_task(client.submit(PICTURE))
        while not emulator.book()["posts"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        session = client._core.open()
        connections = (session.transport, session.downloads)
        with anyio.move_on_after(0.1):
            await client.aclose()
        assert all(transport.is_closed for transport in connections)  # type: ignore[union-attr]
        with pytest.raises(SubmitOutcomeUnknownError):
            await submitting


# -- For the saving room ---------------------------------------------------------------------------


async def test_the_session_offers_the_file_service_and_connections_for_downloads(client: AsyncEvoLink) -> None:
    session = client._core.open()
    assert session.files_exchange.host == session.exchange.host
    downloads = session.downloads
    assert isinstance(downloads, SlotTransport)
    assert session.downloads is downloads
    assert downloads is not session.transport
    await client.aclose()
    assert downloads.is_closed
    with pytest.raises(ClosedError):
        _ = session.downloads


async def test_files_and_save_come_from_the_saving_room(client: AsyncEvoLink, tmp_path: Any) -> None:
    pytest.importorskip("evolink_async.saving", exc_type=ImportError)
    from evolink_async.saving import Files

    assert isinstance(client.files, Files)
    assert client.files is client.files
    task = await client.run(PICTURE)
    (path,) = await client.save(task, tmp_path)
    assert path.read_bytes()
