"""The fault proxy in front of the emulator, seen by HTTP clients that are not ours."""

from __future__ import annotations

import ast
import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

import evolink_async
from evolink_async.emulator import Emulator
from evolink_async.testing import (
    Bandwidth,
    FaultProxy,
    HalfClose,
    Latency,
    LimitData,
    ResetPeer,
    Slicer,
    SlowClose,
    Timeout,
    Toxic,
)

MODELS = "/v1/models"  # the longest answer, some 20 kB


async def fetch(proxy: FaultProxy, key: str, timeout: float = 60) -> bytes:
    """What httpx gets, over a connection of its own."""
    async with httpx.AsyncClient(base_url=proxy.base_url, timeout=timeout, trust_env=False) as http:
        return (await http.get(MODELS, headers={"authorization": f"Bearer {key}"})).content


async def fetch_with_aiohttp(proxy: FaultProxy, key: str, timeout: float = 60) -> bytes:
    """What aiohttp gets, over a connection of its own."""
    limits = aiohttp.ClientTimeout(total=timeout)
    async with (
        aiohttp.ClientSession(timeout=limits, headers={"authorization": f"Bearer {key}"}) as http,
        http.get(proxy.base_url + MODELS) as answer,
    ):
        return await answer.read()


FATAL = [
    (ResetPeer(stream="upstream"), httpx.ReadError, aiohttp.ClientOSError),
    (ResetPeer(stream="downstream"), httpx.ReadError, aiohttp.ClientOSError),
    (LimitData(bytes=20, stream="upstream"), httpx.RemoteProtocolError, aiohttp.ServerDisconnectedError),
    (LimitData(bytes=0), httpx.RemoteProtocolError, aiohttp.ServerDisconnectedError),
    (LimitData(bytes=400), httpx.RemoteProtocolError, aiohttp.ClientPayloadError),
    (HalfClose(), httpx.RemoteProtocolError, aiohttp.ServerDisconnectedError),
    (HalfClose(bytes=400), httpx.RemoteProtocolError, aiohttp.ClientPayloadError),
    (HalfClose(stream="upstream"), httpx.RemoteProtocolError, aiohttp.ServerDisconnectedError),
    (Timeout(timeout=100), httpx.RemoteProtocolError, aiohttp.ServerDisconnectedError),
    (Timeout(timeout=0), httpx.ReadTimeout, TimeoutError),
    (Timeout(timeout=0, stream="upstream"), httpx.ReadTimeout, TimeoutError),
    (Latency(latency=5000), httpx.ReadTimeout, TimeoutError),
    (Bandwidth(rate=0.5), None, TimeoutError),  # httpx's timeout is between two reads
]


@pytest.mark.looptime
@pytest.mark.parametrize(("toxic", "with_httpx", "with_aiohttp"), FATAL, ids=lambda value: getattr(value, "name", None))
async def test_each_toxic_that_breaks_an_exchange_is_the_error_that_clients_know(
    emulator: Any, toxic: Toxic, with_httpx: type[Exception] | None, with_aiohttp: type[Exception]
) -> None:
    async with FaultProxy(emulator.base_url) as proxy:
        proxy.add(toxic)
        if with_httpx is not None:
            with pytest.raises(with_httpx):
                await fetch(proxy, emulator.api_key, timeout=0.3)
        with pytest.raises(with_aiohttp):
            await fetch_with_aiohttp(proxy, emulator.api_key, timeout=0.3)
        proxy.remove(toxic)
        assert b"gpt-4o-image" in await fetch(proxy, emulator.api_key)


@pytest.mark.parametrize(
    ("toxic", "least"),
    [
        (Slicer(average_size=7, size_variation=3, delay=10), 0),
        (Slicer(average_size=3, stream="upstream"), 0),
        (Latency(latency=150), 0.15),
        (Latency(latency=150, stream="upstream"), 0.15),
        (SlowClose(delay=150), 0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
async def test_toxics_that_only_slow_down_change_no_answer(emulator: Any, toxic: Toxic, least: float) -> None:
    async with FaultProxy(emulator.base_url) as proxy:
        plain = await fetch(proxy, emulator.api_key)
        proxy.add(toxic)
        begun = time.monotonic()
        assert await fetch(proxy, emulator.api_key) == plain
        assert time.monotonic() - begun >= least
        assert await fetch_with_aiohttp(proxy, emulator.api_key) == plain


async def test_in_real_time_too_the_bandwidth_is_not_exceeded(emulator: Any) -> None:
    async with FaultProxy(emulator.base_url) as proxy:
        size = len(await fetch(proxy, emulator.api_key))
        proxy.add(Bandwidth(rate=size / 500))  # KB/s: the body alone takes half a second
        begun = time.monotonic()
        await fetch(proxy, emulator.api_key)
        assert time.monotonic() - begun >= 0.49


async def test_disabled_is_a_refused_connection(emulator: Any) -> None:
    async with FaultProxy(emulator.base_url) as proxy:
        await proxy.disable()
        with pytest.raises(httpx.ConnectError):
            await fetch(proxy, emulator.api_key)
        with pytest.raises(aiohttp.ClientConnectorError):
            await fetch_with_aiohttp(proxy, emulator.api_key)


async def test_where_a_toxic_sits_decides_whether_the_server_took_the_order(emulator: Any) -> None:
    body = {"model": "gpt-4o-image", "prompt": "a lighthouse"}
    accepted = []
    for toxic in (ResetPeer(stream="upstream"), ResetPeer(stream="downstream"), LimitData(bytes=150)):
        async with (
            FaultProxy(emulator.base_url) as proxy,
            httpx.AsyncClient(base_url=proxy.base_url, headers={"authorization": f"Bearer {emulator.api_key}"}) as http,
        ):
            proxy.add(toxic)
            with pytest.raises(httpx.TransportError):
                await http.post("/v1/images/generations", json=body)
        accepted.append(len(emulator.emulator.book()["posts"]))
    assert accepted == [0, 1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="uvloop is not made for Windows")
def test_under_uvloop_it_does_the_same(api_key: str) -> None:
    import uvloop

    async def main() -> None:
        async with Emulator(api_key=api_key).serve() as server:
            for toxic, error, _ in FATAL[:9]:
                async with FaultProxy(server.base_url) as proxy:
                    proxy.add(toxic)
                    assert error is not None
                    with pytest.raises(error):
                        await fetch(proxy, api_key)
                    await proxy.reset()
                    await fetch(proxy, api_key)
                    await proxy.disable()
                    with pytest.raises(httpx.ConnectError):
                        await fetch(proxy, api_key)
                    await proxy.enable()
                    await fetch(proxy, api_key)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_it_stands_on_the_standard_library_alone() -> None:
    allowed = sys.stdlib_module_names | {"__future__"}
    room = Path(evolink_async.__file__).parent / "testing"
    for path in (room / "toxics.py", room / "flow.py", room / "proxy.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                assert name.startswith("evolink_async.testing.") or name.partition(".")[0] in allowed, f"{path}: {name}"
            assert not isinstance(node, ast.ImportFrom) or node.level < 2
