"""Connections against real sockets: reuse, every way to fail, and that nothing is lost on any of them."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import random
import socket
import ssl
import struct
import sys
import traceback
import types
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from evolink_async import AsyncEvoLink, ConfigurationError
from evolink_async.http import stream as stream_module
from evolink_async.http.foreign import ForeignTransport
from evolink_async.http.gate import Gate
from evolink_async.http.proxies import Proxies
from evolink_async.http.transport import Call, SlotTransport, TransportClosed, origin_of

# For localhost and 127.0.0.1, signed by itself, known to nobody: worth nothing outside these tests.
TEST_CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgV/HnGwtG06mnC3kb
NkQZPzNiQbWgYY4jPm7KQJEqhZqhRANCAARsivzg2gLaxTdj8tObkBfLoYzEB7fh
uSxVuiTfcOfqLSC6pvo1Wig1jU6gkBk8G1Ab7tFySXUbiuxFqWaieKjB
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBrjCCAVOgAwIBAgIUaxLZNXLbVBfEj3t5m4veYDKrgUUwCgYIKoZIzj0EAwIw
HTEbMBkGA1UEAwwSZXZvbGlua19hc3luYyB0ZXN0MCAXDTI2MTEyMDIxMjEyNFoY
DzIxMjYxMDI3MjEyMTI0WjAdMRswGQYDVQQDDBJldm9saW5rX2FzeW5jIHRlc3Qw
WTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARsivzg2gLaxTdj8tObkBfLoYzEB7fh
uSxVuiTfcOfqLSC6pvo1Wig1jU6gkBk8G1Ab7tFySXUbiuxFqWaieKjBo28wbTAd
BgNVHQ4EFgQUpDrO2JhdVpeo3XKiWwCeI+Y2X70wHwYDVR0jBBgwFoAUpDrO2Jhd
Vpeo3XKiWwCeI+Y2X70wDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2Nh
bGhvc3SHBH8AAAEwCgYIKoZIzj0EAwIDSQAwRgIhAI5CMaju9EHWuTfwEASwUG8+
2X0a5SLzrVRICBMXVe0uAiEA62JTJ4kvgLECMOzlmbAkl/C/b5kjOi6Nr0sD5HSn
TKY=
-----END CERTIFICATE-----
"""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HALF_A_BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"

Answer = Callable[["Peer", bytes], None]


# -- Tiny servers ------------------------------------------------------------------------------------


class Peer(asyncio.Protocol):
    """One connection as the server sees it: finds whole requests, hands each to the server's answer."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.number = len(server.peers)
        self.buffer = b""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tunnel: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's isn't a subclass
        self.server.peers.append(self)
        self.server.progress.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        if self.tunnel is not None:
            self.tunnel.abort()
        self.server.progress.set()

    def data_received(self, data: bytes) -> None:
        if self.tunnel is not None:
            self.tunnel.write(data)
            return
        self.buffer += data
        while (size := whole_request(self.buffer)) is not None:
            request, self.buffer = self.buffer[:size], self.buffer[size:]
            self.server.requests.append((self.number, request))
            self.server.answer(self, request)
            self.server.progress.set()

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def close(self) -> None:
        self.transport.close()


def whole_request(buffer: bytes) -> int | None:
    head, end, _ = buffer.partition(b"\r\n\r\n")
    if not end:
        return None
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
    size = len(head) + 4 + int(length.partition(b":")[2])
    return size if len(buffer) >= size else None


class Server:
    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.peers: list[Peer] = []
        self.requests: list[tuple[int, bytes]] = []
        self.progress = asyncio.Event()
        self.port = 0
        self.url = ""

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self.progress.clear()
                await self.progress.wait()

    async def until_requests(self, n: int) -> None:
        await self.until(lambda: len(self.requests) >= n)

    async def until_peers(self, n: int) -> None:
        await self.until(lambda: len(self.peers) >= n)

    @property
    def connections_of_requests(self) -> list[int]:
        return [number for number, _ in self.requests]


@asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(answer)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Peer(server), "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.port}"
    try:
        yield server
    finally:
        listener.close()
        for peer in server.peers:
            peer.transport.abort()
        await settle()


def always(data: bytes) -> Answer:
    return lambda peer, request: peer.write(data)


def silence(peer: Peer, request: bytes) -> None:
    """Take the request and say nothing."""


def then_close(data: bytes) -> Answer:
    def answer(peer: Peer, request: bytes) -> None:
        peer.write(data)
        peer.close()

    return answer


def reset(peer: Peer) -> None:
    peer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.transport.abort()


def in_turn(*answers: Answer) -> Answer:
    """The first request gets the first answer, and so on; the last one repeats."""
    rest = list(answers)
    return lambda peer, request: (rest.pop(0) if len(rest) > 1 else rest[0])(peer, request)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# -- Helpers -----------------------------------------------------------------------------------------


def request(url: str, method: str = "GET", content: bytes | None = None, **extensions: Any) -> httpx.Request:
    extensions.setdefault("timeout", {"connect": 60.0, "read": 60.0, "write": 60.0, "pool": 60.0})
    return httpx.Request(method, url, content=content, extensions=extensions)


async def fetch(transport: httpx.AsyncBaseTransport, url: str, **options: Any) -> bytes:
    response = await transport.handle_async_request(request(url, **options))
    try:
        return await response.aread()
    finally:
        await response.aclose()


def assert_clean(transport: SlotTransport) -> None:
    assert (transport.in_use, transport.waiting) == (0, 0), transport


@pytest.fixture
async def make(parser: str) -> AsyncIterator[Callable[..., SlotTransport]]:
    """Makes transports that don't look at this machine's environment, and closes them."""
    made: list[SlotTransport] = []

    def build(max_connections: int = 10, **options: Any) -> SlotTransport:
        made.append(SlotTransport(max_connections, **{"trust_env": False, **options}))
        return made[-1]

    yield build
    for transport in made:
        await transport.aclose()
        assert_clean(transport)
    await settle()


Make = Callable[..., SlotTransport]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    path.write_text(TEST_CERTIFICATE)
    return path


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def client_tls(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate)


# -- Reuse -------------------------------------------------------------------------------------------


async def test_one_connection_serves_one_request_after_the_other(make: Make) -> None:
    transport = make()
    async with serving(always(OK)) as server:
        for _ in range(3):
            assert await fetch(transport, server.url) == b"ok"
        assert server.connections_of_requests == [0, 0, 0]
        assert repr(transport) == "<SlotTransport open: 1 of 10 slots (0 in use, 1 idle), 0 waiting>"


async def test_it_works_as_the_transport_of_an_httpx_client(make: Make) -> None:
    async with serving(always(OK)) as server, httpx.AsyncClient(transport=make(4)) as client:
        answers = await asyncio.gather(*(client.post(server.url, json={"n": n}) for n in range(20)))
        assert [answer.text for answer in answers] == ["ok"] * 20
        bodies = {body.rpartition(b"\r\n")[2] for _, body in server.requests}
        assert bodies == {b'{"n":%d}' % n for n in range(20)}
        assert len(server.peers) == 3, "the lane's limit of a gate of four"


async def test_the_newest_idle_connection_is_used_first(make: Make) -> None:
    transport = make()
    async with serving(always(OK)) as server:
        responses = [await transport.handle_async_request(request(server.url)) for _ in range(3)]
        for response in responses:
            await response.aread()
        await fetch(transport, server.url)
        await fetch(transport, server.url)
        assert server.connections_of_requests == [0, 1, 2, 2, 2]
        assert transport.idle == 3


async def test_the_slot_is_held_until_the_body_is_read(make: Make) -> None:
    transport = make(1)
    async with serving(always(OK)) as server:
        response = await transport.handle_async_request(request(server.url))
        assert (transport.in_use, transport.idle) == (1, 0)
        assert await response.aread() == b"ok"
        assert (transport.in_use, transport.idle) == (0, 1)


@pytest.mark.parametrize("data", [OK, HALF_A_BODY], ids=["whole body came", "half a body came"])
async def test_a_body_that_nobody_read_costs_the_connection(make: Make, data: bytes) -> None:
    transport = make(1)
    async with serving(always(data)) as server:
        response = await transport.handle_async_request(request(server.url))
        await response.aclose()
        assert (transport.in_use, transport.idle) == (0, 0)
        await server.peers[0].lost


async def test_leaving_a_body_halfway_costs_the_connection(make: Make) -> None:
    transport = make(1)
    async with serving(always(HALF_A_BODY)) as server:
        response = await transport.handle_async_request(request(server.url))
        async for part in response.aiter_raw():
            assert part == b"half"
            break
        await response.aclose()
        assert (transport.in_use, transport.idle) == (0, 0)
        await server.peers[0].lost


async def test_a_reader_cancelled_in_the_body_gives_the_slot_back_at_once(make: Make) -> None:
    transport = make(1)
    async with serving(always(HALF_A_BODY)) as server:
        response = await transport.handle_async_request(request(server.url))
        task = asyncio.create_task(response.aread())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (transport.in_use, transport.idle) == (0, 0), "though nobody closed the response"
        await server.peers[0].lost


async def test_closing_a_response_twice_releases_once(make: Make) -> None:
    transport = make(1)
    async with serving(always(OK)) as server:
        response = await transport.handle_async_request(request(server.url))
        await response.aread()
        await response.stream.aclose()  # type: ignore[union-attr]
        await response.stream.aclose()  # type: ignore[union-attr]
        assert (transport.in_use, transport.idle) == (0, 1)


async def test_connection_close_is_obeyed(make: Make) -> None:
    transport = make()
    async with serving(always(OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))) as server:
        await fetch(transport, server.url)
        assert transport.idle == 0
        await fetch(transport, server.url)
        assert server.connections_of_requests == [0, 1]


@pytest.mark.parametrize("length", [b"3", b"30"])
async def test_an_answer_with_a_length_and_chunks_costs_its_connection(make: Make, length: bytes) -> None:
    """Somebody on the way may have read it by its length, and takes the next answer for the rest of this one."""
    both = b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" % length
    transport = make()
    async with serving(in_turn(always(both), always(OK))) as server:
        try:
            assert await fetch(transport, server.url) == b"ok"
        except httpx.RemoteProtocolError:  # httptools reads no such answer
            pass
        assert await fetch(transport, server.url) == b"ok"
        assert server.connections_of_requests == [0, 1]


async def test_a_connection_that_the_server_closed_gets_no_request(make: Make) -> None:
    transport = make()
    async with serving(in_turn(then_close(OK), always(OK))) as server:
        await fetch(transport, server.url, method="POST", content=b"1")
        await server.peers[0].lost
        assert await fetch(transport, server.url, method="POST", content=b"2") == b"ok"
        assert server.connections_of_requests == [0, 1], "each POST once, the second on a new connection"


async def test_a_close_that_the_event_loop_did_not_notice_yet_is_seen(make: Make) -> None:
    transport = make()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)  # a thread that waits for ever would hang the whole run
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def answer_one() -> socket.socket:
            peer, _ = listener.accept()
            peer.recv(4096)
            peer.sendall(OK)
            return peer

        first = asyncio.create_task(asyncio.to_thread(answer_one))
        await fetch(transport, url)
        peer = await first
        second = asyncio.create_task(asyncio.to_thread(answer_one))
        await settle()
        peer.close()
        # No await between: only the socket itself can tell.
        assert await fetch(transport, url) == b"ok"
        (await second).close()
        assert transport.connections_opened == 2


async def test_a_word_from_the_server_on_an_idle_connection_is_no_answer(make: Make) -> None:
    transport = make()
    async with serving(always(OK)) as server:
        await fetch(transport, server.url)
        server.peers[0].write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await settle()
        assert await fetch(transport, server.url) == b"ok"
        assert server.connections_of_requests == [0, 1]


@pytest.mark.parametrize("garbage", [b"x", OK])
async def test_bytes_after_the_end_are_not_the_next_answer(make: Make, garbage: bytes) -> None:
    transport = make()
    async with serving(in_turn(always(OK + garbage), always(OK.replace(b"ok", b"no")))) as server:
        assert await fetch(transport, server.url) == b"ok"
        assert await fetch(transport, server.url) == b"no"
        assert server.connections_of_requests == [0, 1]


async def test_a_connection_idle_for_too_long_is_replaced(make: Make) -> None:
    transport = make(keepalive_expiry=0.0)
    async with serving(always(OK)) as server:
        await fetch(transport, server.url)
        await fetch(transport, server.url)
        assert server.connections_of_requests == [0, 1]
        await server.peers[0].lost


async def test_at_the_cap_the_oldest_idle_connection_makes_room(make: Make) -> None:
    transport = make(2)
    async with serving(always(OK)) as one, serving(always(OK)) as two, serving(always(OK)) as three:
        await fetch(transport, one.url)
        await fetch(transport, two.url)
        assert transport.idle == 2
        await fetch(transport, three.url)
        assert transport.idle == 2
        await one.peers[0].lost
        await fetch(transport, two.url)
        assert len(two.peers) == 1


async def test_no_more_connections_than_slots(make: Make) -> None:
    transport = make(8)
    async with serving(always(OK)) as server:
        await asyncio.gather(*(fetch(transport, server.url, lane=["read", "submit"][n % 2]) for n in range(200)))
        assert len(server.peers) == transport.connections_opened == 8


# -- The gate in front -------------------------------------------------------------------------------


async def test_pool_timeout_comes_from_the_gate(make: Make) -> None:
    transport = make(1)
    async with serving(silence) as server:
        busy = asyncio.create_task(fetch(transport, server.url))
        await server.until_requests(1)
        with pytest.raises(httpx.PoolTimeout, match=r"no connection slot came free within 0\.01 s: <Gate 1/1"):
            await fetch(transport, server.url, timeout={"pool": 0.01})
        assert transport.waiting == 0
        busy.cancel()
        with pytest.raises(asyncio.CancelledError):
            await busy


async def test_lanes_keep_places_for_each_other(make: Make) -> None:
    transport = make(4)
    async with serving(silence) as server:
        reads = [asyncio.create_task(fetch(transport, server.url, lane="read")) for _ in range(10)]
        await server.until_requests(3)
        submit = asyncio.create_task(fetch(transport, server.url, lane="submit"))
        await server.until_requests(4)
        assert (transport.in_use, transport.waiting) == (4, 7)
        for task in (*reads, submit):
            task.cancel()
        await asyncio.gather(*reads, submit, return_exceptions=True)


async def test_an_unknown_lane_is_refused_before_anything(make: Make) -> None:
    transport = make()
    with pytest.raises(ValueError, match="'fast'"):
        await fetch(transport, "http://127.0.0.1:1", lane="fast")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "/relative"])
async def test_other_urls_are_refused(make: Make, url: str) -> None:
    with pytest.raises(httpx.UnsupportedProtocol):
        await fetch(make(), url)


# -- What the caller is told -------------------------------------------------------------------------


class Calls(list[str]):
    @property
    def extensions(self) -> dict[str, Any]:
        return {"on_slot": lambda: self.append("slot"), "on_bytes": lambda: self.append("bytes")}


async def test_the_caller_hears_of_its_slot_and_of_the_first_byte(make: Make) -> None:
    transport = make(1)
    calls = Calls()
    async with serving(silence) as server:
        first = asyncio.create_task(fetch(transport, server.url))
        await server.until_requests(1)
        second = asyncio.create_task(fetch(transport, server.url, method="POST", content=b"x", **calls.extensions))
        await settle()
        assert calls == []
        first.cancel()
        await server.until_requests(2)
        assert calls == ["slot", "bytes"]
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)


async def test_no_byte_is_written_when_the_connection_is_refused(make: Make, unused_port: int) -> None:
    calls = Calls()
    with pytest.raises(httpx.ConnectError, match=f"cannot connect to 127.0.0.1:{unused_port}"):
        await fetch(make(), f"http://127.0.0.1:{unused_port}", **calls.extensions)
    assert calls == ["slot"]


async def test_no_byte_is_written_when_tls_fails(make: Make, server_tls: ssl.SSLContext) -> None:
    calls = Calls()
    # The server's side of the failed handshake is of no interest.
    logging.getLogger("asyncio").disabled = True
    try:
        async with serving(always(OK), server_tls) as server:
            with pytest.raises(httpx.ConnectError, match="certificate verify failed") as caught:
                await fetch(make(), server.url, **calls.extensions)
            assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    finally:
        logging.getLogger("asyncio").disabled = False
    assert calls == ["slot"]


async def test_no_byte_is_written_to_who_shows_the_certificate_of_another_host(
    make: Make, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    calls = Calls()
    logging.getLogger("asyncio").disabled = True
    try:
        async with serving(always(OK), server_tls) as server:
            extensions = {**calls.extensions, "sni_hostname": "api.example"}
            with pytest.raises(httpx.ConnectError, match=r"certificate is not valid for 'api\.example'"):
                await fetch(make(verify=client_tls), server.url, method="POST", content=b"x", **extensions)
            assert server.requests == []
    finally:
        logging.getLogger("asyncio").disabled = False
    assert calls == ["slot"]


async def test_no_byte_is_written_when_the_header_is_invalid_and_it_isnt_shown(make: Make) -> None:
    calls = Calls()
    transport = make()
    async with serving(always(OK)) as server:
        bad = httpx.Request("GET", server.url, headers={"authorization": "Bearer sk-SECRET\n"})
        bad.extensions = calls.extensions
        with pytest.raises(httpx.LocalProtocolError) as caught:
            await transport.handle_async_request(bad)
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))
        assert server.requests == []
    assert calls == []


async def test_a_server_that_closes_while_the_request_is_prepared_got_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last moment: the connection was alive when chosen and is dead when the first byte is due."""
    transport = make()
    calls = Calls()
    async with serving(always(OK)) as server:
        await fetch(transport, server.url)

        chosen = transport._idle.oldest()
        assert chosen is not None

        begin = chosen.stream.begin_exchange

        def hang_up(*args: Any) -> None:
            chosen.stream.eof_received()
            begin(*args)

        monkeypatch.setattr(chosen.stream, "begin_exchange", hang_up)
        with pytest.raises(httpx.ConnectError, match="before the request was written"):
            await transport.handle_async_request(request(server.url, **calls.extensions))
        assert len(server.requests) == 1
    assert calls == ["slot"]


async def test_a_callback_that_raises_costs_nothing_but_its_request(make: Make) -> None:
    transport = make(1)

    def refuse() -> None:
        raise LookupError("no")

    async with serving(always(OK)) as server:
        for name in ("on_slot", "on_bytes"):
            with pytest.raises(LookupError):
                await fetch(transport, server.url, **{name: refuse})
            assert_clean(transport)
        assert await fetch(transport, server.url) == b"ok"
        assert len(server.requests) == 1


# -- Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (then_close(b""), httpx.RemoteProtocolError),
        (then_close(b"HTTP/1.1 200 OK\r\nContent-"), httpx.RemoteProtocolError),
        (then_close(HALF_A_BODY), httpx.RemoteProtocolError),
        (then_close(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nha"), httpx.RemoteProtocolError),
        (then_close(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"), httpx.RemoteProtocolError),
        (always(b"SSH-2.0-OpenSSH_9.7\r\n\r\n"), httpx.RemoteProtocolError),
        (always(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000), httpx.RemoteProtocolError),
        (lambda peer, request: reset(peer), httpx.ReadError),
        (silence, httpx.ReadTimeout),
        (always(b"HTTP/1.1 200"), httpx.ReadTimeout),
        (always(HALF_A_BODY), httpx.ReadTimeout),
    ],
    ids=[
        "no answer",
        "half a head",
        "half a body",
        "half a chunk",
        "no last chunk",
        "another protocol",
        "endless head",
        "reset",
        "timeout before the head",
        "timeout in the head",
        "timeout in the body",
    ],
)
async def test_a_failing_exchange_costs_its_own_connection_only(
    make: Make, answer: Answer, error: type[Exception]
) -> None:
    transport = make(1)
    async with serving(in_turn(always(OK), answer, always(OK))) as server:
        await fetch(transport, server.url)
        with pytest.raises(error):
            await fetch(transport, server.url, timeout={"read": 0.05})
        assert (transport.in_use, transport.idle) == (0, 0)
        assert await fetch(transport, server.url) == b"ok"
        assert server.connections_of_requests == [0, 0, 1]


async def test_an_answer_in_single_bytes_is_read_like_any_other(make: Make) -> None:
    text = "é" * 5
    body = text.encode()
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)

    def drip(peer: Peer, request: bytes) -> None:
        async def send() -> None:
            for n in range(len(data)):
                peer.write(data[n : n + 1])
                await asyncio.sleep(0)

        drips.append(asyncio.ensure_future(send()))

    drips: list[asyncio.Future[None]] = []
    async with serving(drip) as server:
        transport = make()
        for _ in range(2):
            assert await fetch(transport, server.url) == body
        assert len(server.peers) == 1
        await asyncio.gather(*drips)


async def test_chunks_that_come_together_are_all_read(make: Make) -> None:
    parts = [b"{", "\u00e9".encode()[:1], "\u00e9".encode()[1:], b"}" * 1000]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    async with serving(always(answer)) as server:
        assert await fetch(make(), server.url) == b"".join(parts)


async def test_a_big_body_in_both_directions(make: Make) -> None:
    size = 3_000_000
    body = random.Random(1).randbytes(size)

    def echo(peer: Peer, request: bytes) -> None:
        peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + request[-size:])

    async with serving(echo) as server:
        assert await fetch(make(), server.url, method="POST", content=body) == body


async def in_parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_body_of_unknown_length_is_sent_in_chunks(make: Make) -> None:
    transport = make()
    async with serving(silence) as server:
        asked = httpx.Request("POST", server.url, content=in_parts(b"a" * 10, b"", b"b"))
        task = asyncio.create_task(drain(transport, asked))
        await server.until_requests(2)  # the server knows no chunks: to it they are another request
        assert server.requests[1][1] == b"a\r\n" + b"a" * 10 + b"\r\n1\r\nb\r\n0\r\n\r\n"
        server.peers[0].write(OK)
        assert await task == b"ok"
        assert transport.idle == 1


@pytest.mark.parametrize("promised", [2, 4])
async def test_a_body_of_another_length_than_promised_is_our_own_error(make: Make, promised: int) -> None:
    transport = make()
    async with serving(always(OK)) as server:
        asked = httpx.Request(
            "POST", server.url, content=in_parts(b"ab", b"c"), headers={"content-length": f"{promised}"}
        )
        with pytest.raises(httpx.LocalProtocolError, match=f"promise.* {promised}|{promised} bytes"):
            await transport.handle_async_request(asked)
        assert (transport.in_use, transport.idle) == (0, 0)


async def test_an_upload_that_is_refused_halfway_still_has_its_answer(make: Make) -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    class Hasty(asyncio.Protocol):
        """Answers as soon as anything comes, and hangs up."""

        def connection_made(self, base: asyncio.BaseTransport) -> None:
            self.base = cast(asyncio.Transport, base)

        def data_received(self, data: bytes) -> None:
            self.base.write(refusal)
            self.base.close()

    sent = 0

    async def endless_upload() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            yield b"x" * 1000
            sent += 1
            await asyncio.sleep(0.001)

    listener = await asyncio.get_running_loop().create_server(Hasty, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(60):
        response = await make().handle_async_request(httpx.Request("POST", url, content=endless_upload()))
    assert response.status_code == 413
    assert sent < 1000
    await response.aclose()
    listener.close()
    await settle()


async def test_the_answer_to_a_head_request_has_no_body_and_leaves_the_connection_fit(make: Make) -> None:
    transport = make()
    headers_only = b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n"
    async with serving(in_turn(always(headers_only), always(OK))) as server:
        response = await transport.handle_async_request(request(server.url, method="HEAD"))
        assert await response.aread() == b""
        assert response.headers["content-length"] == "20000"
        assert await fetch(transport, server.url) == b"ok"
        assert server.connections_of_requests == [0, 0]


async def test_a_slow_reader_slows_the_server(make: Make) -> None:
    size = 30_000_000  # more than the system's buffers take in
    async with serving(always(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))) as server:
        response = await make().handle_async_request(request(server.url))
        server_side = server.peers[0].transport
        left = -1
        while left != (left := server_side.get_write_buffer_size()):  # noqa: ASYNC110 - the kernel sends no event
            await asyncio.sleep(0.05)
        assert left > size // 4
        assert len(await response.aread()) == size


async def test_a_peer_that_takes_no_bytes_is_a_write_timeout(make: Make) -> None:
    transport = make(1)
    calls = Calls()

    class Deaf(asyncio.Protocol):
        def connection_made(self, base: asyncio.BaseTransport) -> None:
            assert isinstance(base, asyncio.Transport)
            base.pause_reading()
            deaf.append(base)

    deaf: list[asyncio.Transport] = []
    listener = await asyncio.get_running_loop().create_server(Deaf, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    content, took_nothing = b"x" * 50_000_000, r"the peer took no bytes for 0\.1 s"
    streamed = request(url, method="POST", content=content, timeout={"write": 0.1}, **calls.extensions)
    with pytest.raises(httpx.WriteTimeout, match=took_nothing):
        await transport.handle_async_request(streamed)
    assert calls == ["slot", "bytes"]
    assert_clean(transport)
    origin = (b"http", b"127.0.0.1", listener.sockets[0].getsockname()[1])
    whole = Call(b"POST", origin, b"/", b"Content-Length: 50000000\r\n", content, write_timeout=0.1, seconds=5)
    with pytest.raises(httpx.WriteTimeout, match=took_nothing):
        await transport.call(whole)
    assert_clean(transport)
    for base in deaf:
        base.abort()
    listener.close()
    await settle()


async def test_a_silent_network_is_a_connect_timeout(make: Make) -> None:
    transport = make(1)
    calls = Calls()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        place = listener.getsockname()
        full = [socket.socket() for _ in range(4)]
        for caller in full:
            caller.setblocking(False)
            caller.connect_ex(place)
        with pytest.raises(httpx.ConnectTimeout, match=r"no connection to 127.0.0.1:\d+ within 0\.05 s"):
            await fetch(transport, f"http://127.0.0.1:{place[1]}", timeout={"connect": 0.05}, **calls.extensions)
        for caller in full:
            caller.close()
    assert calls == ["slot"]


async def test_a_silent_tls_peer_is_a_connect_timeout(make: Make, client_tls: ssl.SSLContext) -> None:
    calls = Calls()
    async with serving(silence) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(httpx.ConnectTimeout):
            await fetch(make(verify=client_tls), url, timeout={"connect": 0.3}, **calls.extensions)
        await server.until_peers(1)
        await server.peers[0].lost
    assert calls == ["slot"]


async def test_a_peer_that_hangs_up_during_the_handshake(make: Make, client_tls: ssl.SSLContext) -> None:
    async with serving(silence) as server:
        url = server.url.replace("http:", "https:")
        task = asyncio.create_task(fetch(make(verify=client_tls), url))
        await server.until_peers(1)
        server.peers[0].close()
        with pytest.raises(httpx.ConnectError):
            await task


@pytest.mark.parametrize("does", ["speaks first", "hangs up"])
async def test_who_has_spoken_or_gone_before_the_handshake_is_not_waited_for(
    does: str, client_tls: ssl.SSLContext
) -> None:
    async with serving(silence) as server:
        stream = stream_module.SocketStream()
        await stream.connect("127.0.0.1", server.port)
        await server.until_peers(1)
        if does == "speaks first":
            server.peers[0].write(b"SSH-2.0-OpenSSH_9.2\r\n")
        else:
            server.peers[0].close()
        while not stream.is_readable():
            await settle()
        await settle()  # and the loop has told
        with pytest.raises(httpx.ConnectError):
            async with asyncio.timeout(5):
                await stream.start_tls(client_tls, "127.0.0.1")
        stream.abort()


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.EMFILE, "Too many open files"),
        socket.gaierror(-2, "Name or service not known"),
        UnicodeError("label too long"),
        ssl.SSLError("handshake failure"),
    ],
    ids=lambda failure: type(failure).__name__,
)
async def test_the_systems_refusals_are_connect_errors(
    make: Make, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    async def refuse(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", refuse)
    transport = make(1)
    with pytest.raises(httpx.ConnectError, match=str(failure.args[-1])) as caught:
        await fetch(transport, "http://evolink.invalid")
    assert caught.value.__cause__ is failure
    assert_clean(transport)


def call_to(server: Server, **more: Any) -> Call:
    return Call(b"GET", (b"http", b"127.0.0.1", server.port), b"/", b"Host: 127.0.0.1\r\n", **more)


@pytest.mark.looptime  # or a slow machine would take the time that the good exchange has
async def test_an_exchange_that_has_had_all_its_time_is_cut_though_bytes_still_come(make: Make) -> None:
    transport = make(1)

    def drip(peer: Peer, request: bytes) -> None:
        async def send() -> None:
            peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not peer.lost.done():
                await asyncio.sleep(0.01)
                peer.write(b".")

        drips.append(asyncio.ensure_future(send()))

    drips: list[asyncio.Future[None]] = []
    async with serving(drip) as server:
        reply = await transport.call(call_to(server, seconds=0.1))

        async def read_on() -> None:
            while await reply.read():
                pass

        with pytest.raises(httpx.ReadTimeout, match=r"took longer than 0\.1 s"):
            await read_on()
        assert (transport.in_use, transport.idle) == (0, 0)
        server.answer = silence
        with pytest.raises(httpx.ReadTimeout, match=r"took longer than 0\.1 s"):
            await transport.call(call_to(server, seconds=0.1))
        server.answer = always(OK)
        reply = await transport.call(call_to(server, seconds=0.1))
        assert await reply.read() == b"ok"
        await reply.aclose()
        await asyncio.sleep(0.15)
        assert transport.idle == 1, "the time of an exchange that ended is of no meaning to the connection"
        with pytest.raises(httpx.StreamClosed):
            await reply.read()
        await asyncio.gather(*drips)


# -- Cancellation ------------------------------------------------------------------------------------


async def _hang(*args: object, **options: object) -> None:
    await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def hanging_in(phase: str, transport: SlotTransport) -> AsyncIterator[tuple[asyncio.Task[bytes], Server]]:
    """A request that hangs in the given phase, and a server that will answer the next one."""
    answers = {"before the head": b"", "in the head": b"HTTP/1.1 200", "in the body": HALF_A_BODY, "reused": b""}
    first = [always(OK)] if phase == "reused" else []
    async with serving(in_turn(*first, always(answers.get(phase, OK)), always(OK))) as server:
        url, options = server.url, {}
        if phase == "reused":
            await fetch(transport, url)
        if phase == "tls handshake":
            url = url.replace("http:", "https:")
            server.answer = silence
        if phase == "request body":
            options = {"method": "POST"}
        with pytest.MonkeyPatch.context() as patch:
            if phase == "connect":
                patch.setattr(asyncio.get_running_loop(), "create_connection", _hang)
            if phase == "request body":
                hanging = httpx.Request("POST", url, content=endless(), headers={"content-length": "100"})
                task = asyncio.create_task(drain(transport, hanging))
            else:
                task = asyncio.create_task(fetch(transport, url, **options))
            if phase == "connect":
                await settle()
            elif phase in ("tls handshake", "request body"):
                await server.until_peers(1)
            else:
                await server.until_requests(2 if phase == "reused" else 1)
            # What the server wrote is on its way through the loop; a few rounds bring it in.
            await settle()
            yield task, server
        server.answer = always(OK)


async def endless() -> AsyncIterator[bytes]:
    yield b"x"
    await _hang()


async def drain(transport: SlotTransport, asked: httpx.Request) -> bytes:
    response = await transport.handle_async_request(asked)
    return await response.aread()


PHASES = ["connect", "tls handshake", "request body", "before the head", "in the head", "in the body", "reused"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("cancels", [1, 2, 3])
async def test_a_cancelled_request_poisons_its_own_slot_only(make: Make, phase: str, cancels: int) -> None:
    transport = make(1)
    async with hanging_in(phase, transport) as (task, server):
        assert (transport.in_use, transport.waiting) == (1, 0)
        # More than once: the cleanup of the first cancellation is cut short as well.
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (transport.in_use, transport.idle) == (0, 0)
        for peer in server.peers:
            await peer.lost
    async with serving(always(OK)) as server:
        assert await fetch(transport, server.url) == b"ok"


@pytest.mark.parametrize("phase", PHASES)
async def test_a_deadline_of_the_caller_is_a_cancellation_like_any_other(make: Make, phase: str) -> None:
    transport = make(1)

    async with hanging_in(phase, transport) as (task, _):

        async def bounded() -> None:
            async with asyncio.timeout(0.01):
                await task

        with pytest.raises(TimeoutError):
            await bounded()
        assert (transport.in_use, transport.idle) == (0, 0)


async def test_a_connection_that_comes_after_its_cancellation_is_cut() -> None:
    class Late(asyncio.Transport):
        cut = False

        def abort(self) -> None:
            self.cut = True

    stream = stream_module.SocketStream()
    stream.abort()
    stream.connection_made(late := Late())
    assert late.cut


async def test_cancelled_at_the_gate(make: Make) -> None:
    transport = make(1)
    async with serving(silence) as server:
        busy = asyncio.create_task(fetch(transport, server.url))
        await server.until_requests(1)
        queue = [asyncio.create_task(fetch(transport, server.url)) for _ in range(3)]
        await settle()
        queue[0].cancel()
        busy.cancel()
        queue[1].cancel()
        await server.until_requests(2)
        assert (transport.in_use, transport.waiting) == (1, 0)
        queue[2].cancel()
        await asyncio.gather(busy, *queue, return_exceptions=True)


async def test_chaos_leaves_the_gate_clean(make: Make) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    behaviours: list[Answer] = [
        always(OK),
        always(OK),
        always(OK + b"x"),
        then_close(OK),
        then_close(b""),
        then_close(HALF_A_BODY),
        always(HALF_A_BODY),
        silence,
        lambda peer, request: peer.transport.abort(),
    ]
    patience = [None, 0.05]
    transport = make(6)

    async def one(url: str) -> None:
        response = await transport.handle_async_request(
            request(url, lane=dice.choice(["read", "submit"]), timeout={"read": 0.02, "pool": dice.choice(patience)})
        )
        try:
            if dice.random() < 0.8:
                await response.aread()
        finally:
            await response.aclose()

    async with serving(lambda peer, request: dice.choice(behaviours)(peer, request)) as server:
        tasks = [asyncio.create_task(one(server.url)) for _ in range(600)]
        while pending := [task for task in tasks if not task.done()]:
            if dice.random() < 0.5:
                dice.choice(pending).cancel()
            await asyncio.sleep(0 if dice.random() < 0.7 else 0.002)
        ends = {type(end) for end in await asyncio.gather(*tasks, return_exceptions=True)}
        assert ends <= {
            type(None),
            asyncio.CancelledError,
            httpx.PoolTimeout,
            httpx.ReadTimeout,
            httpx.ReadError,
            httpx.RemoteProtocolError,
            httpx.ConnectError,
        }
        assert_clean(transport)
        server.answer = always(OK)
        assert await fetch(transport, server.url) == b"ok"


# -- Closing -----------------------------------------------------------------------------------------


async def test_closing_closes_idle_connections_now_and_busy_ones_later(make: Make) -> None:
    transport = make()
    async with serving(always(OK)) as server:
        busy = await transport.handle_async_request(request(server.url))
        await fetch(transport, server.url)
        await transport.aclose()
        await server.peers[1].lost
        assert repr(transport) == "<SlotTransport closed: 1 of 10 slots (1 in use, 0 idle), 0 waiting>"
        assert await busy.aread() == b"ok"
        await server.peers[0].lost
        assert transport.is_closed


async def test_a_closed_transport_refuses(make: Make) -> None:
    transport = make()
    await transport.aclose()
    await transport.aclose()
    with pytest.raises(TransportClosed, match="nothing was sent") as caught:
        await fetch(transport, "http://127.0.0.1:1")
    assert isinstance(caught.value, httpx.TransportError)
    assert isinstance(caught.value, RuntimeError)


async def test_who_waits_at_the_gate_of_a_closing_transport_is_refused(make: Make) -> None:
    transport = make(1)
    async with serving(silence) as server:
        busy = asyncio.create_task(fetch(transport, server.url))
        await server.until_requests(1)
        waiting = asyncio.create_task(fetch(transport, server.url))
        await settle()
        await transport.aclose()
        busy.cancel()
        with pytest.raises(TransportClosed):
            await waiting


@pytest.mark.usefixtures("parser")
def test_a_transport_can_be_built_without_a_loop_and_abandoned_with_one_gone(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    transport = SlotTransport(4, trust_env=False, verify=client_tls)

    async def use() -> None:
        async with serving(always(OK)) as plain, serving(always(OK), server_tls) as secured:
            await fetch(transport, plain.url)
            await fetch(transport, secured.url)
            # As if the program ended here: the servers' ends stay open as long as the loop.
            plain.peers.clear()
            secured.peers.clear()

    with warnings.catch_warnings():
        # The servers' ends are left open on purpose.
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(use())
        gc.collect()
    assert transport.idle == 2
    transport.abandon()
    gc.collect()
    assert (transport.idle, transport.in_use) == (0, 0)


@pytest.mark.usefixtures("parser")
def test_it_runs_on_uvloop(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    import uvloop

    async def use() -> None:
        transport = SlotTransport(4, trust_env=False, verify=client_tls)
        for tls in (None, server_tls):
            async with serving(always(OK), tls) as server:
                for _ in range(3):
                    assert await fetch(transport, server.url) == b"ok"
                assert len(server.peers) == 1
                server.answer = silence
                with pytest.raises(httpx.ReadTimeout):
                    await fetch(transport, server.url, timeout={"read": 0.01})
        assert_clean(transport)
        await transport.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(use())


# -- TLS ---------------------------------------------------------------------------------------------


async def test_tls_connections_are_reused(make: Make, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    transport = make(verify=client_tls)
    async with serving(always(OK), server_tls) as server:
        for _ in range(3):
            assert await fetch(transport, server.url) == b"ok"
        assert server.connections_of_requests == [0, 0, 0]


async def test_the_context_is_built_once_and_only_for_https(
    certificate: Path, server_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[ssl.SSLContext] = []
    create = httpx.create_ssl_context

    def counting(**options: Any) -> ssl.SSLContext:
        built.append(create(**options))
        return built[-1]

    monkeypatch.setattr(httpx, "create_ssl_context", counting)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    stream_module._build_ssl_context.cache_clear()
    transports = [SlotTransport(4), SlotTransport(4)]
    try:
        async with serving(always(OK)) as server:
            await fetch(transports[0], server.url)
        assert built == []
        async with serving(always(OK), server_tls) as server:
            for transport in transports:
                await asyncio.gather(*(fetch(transport, server.url) for _ in range(5)))
        assert len(built) == 1, "one context for all connections of the process"
    finally:
        stream_module._build_ssl_context.cache_clear()
        for transport in transports:
            await transport.aclose()


@pytest.mark.parametrize("name", ["missing.pem", "garbage.pem", "."])
async def test_certificates_that_cannot_be_read_are_told_by_their_variable_and_not_tried_again(
    name: str, server_tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "garbage.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
    async with serving(always(OK), server_tls) as server, AsyncEvoLink("sk-x", base_url=server.url) as client:
        for call in (client.credits(), client.images.submit(model="gpt-4o-image", prompt="x")):
            with pytest.raises(ConfigurationError, match=r"from SSL_CERT_FILE="):
                await call


# -- Proxies -----------------------------------------------------------------------------------------


@pytest.fixture
def proxy_env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


ProxyEnv = Callable[..., None]


def proxying(peer: Peer, asked: bytes) -> None:
    """A proxy: opens tunnels; answers what would be forwarded itself."""
    if not asked.startswith(b"CONNECT "):
        peer.write(OK.replace(b"ok", b"px"))
        return
    _, _, port = asked.split(b" ")[1].decode().rpartition(":")

    class Back(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            peer.write(data)

        def connection_lost(self, exc: Exception | None) -> None:
            peer.close()

    async def connect() -> None:
        peer.tunnel, _ = await asyncio.get_running_loop().create_connection(Back, "127.0.0.1", int(port))
        peer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    peer.connecting = asyncio.ensure_future(connect())  # type: ignore[attr-defined]


async def test_plain_http_is_forwarded(make: Make, proxy_env: ProxyEnv) -> None:
    async with serving(proxying) as proxy:
        proxy_env(HTTP_PROXY=f"http://user:p%40ss@127.0.0.1:{proxy.port}")
        transport = make(trust_env=True)
        for _ in range(2):
            assert await fetch(transport, "http://evolink.invalid/v1/credits?a=b") == b"px"
        assert len(proxy.peers) == 1
        head = proxy.requests[0][1]
        assert head.startswith(b"GET http://evolink.invalid/v1/credits?a=b HTTP/1.1\r\n")
        assert b"Host: evolink.invalid\r\n" in head
        assert b"Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in head


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
async def test_https_goes_through_a_tunnel(
    make: Make,
    proxy_env: ProxyEnv,
    variable: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    calls = Calls()
    async with serving(proxying) as proxy, serving(always(OK), server_tls) as server:
        proxy_env(**{variable: f"127.0.0.1:{proxy.port}"})
        transport = make(trust_env=True, verify=client_tls)
        for _ in range(2):
            url = f"https://evolink.invalid:{server.port}/"
            assert await fetch(transport, url, sni_hostname="127.0.0.1", **calls.extensions) == b"ok"
        assert [head.split(b"\r\n")[0] for _, head in proxy.requests] == [
            b"CONNECT evolink.invalid:%d HTTP/1.1" % server.port
        ]
        assert len(server.peers) == 1
    assert calls == ["slot", "bytes"] * 2


async def test_a_proxy_that_itself_speaks_tls(
    make: Make, proxy_env: ProxyEnv, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    async with serving(proxying, server_tls) as proxy, serving(always(OK), server_tls) as server:
        proxy_env(ALL_PROXY=f"https://127.0.0.1:{proxy.port}")
        transport = make(trust_env=True, verify=client_tls)
        tunnelled = await fetch(transport, f"https://evolink.invalid:{server.port}/", sni_hostname="127.0.0.1")
        assert tunnelled == b"ok"
        assert await fetch(transport, "http://evolink.invalid/") == b"px"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (always(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"), "407 Proxy Auth"),
        (then_close(b""), "did not open a tunnel"),
        (then_close(b"SSH-2.0\r\n"), "did not open a tunnel"),
    ],
)
async def test_a_refusing_proxy_is_named_without_its_password(
    make: Make, proxy_env: ProxyEnv, answer: Answer, text: str
) -> None:
    calls = Calls()
    async with serving(answer) as proxy:
        proxy_env(HTTPS_PROXY=f"http://user:SECRET@127.0.0.1:{proxy.port}")
        transport = make(1, trust_env=True)
        with pytest.raises(httpx.ProxyError, match=f"127.0.0.1:{proxy.port}.*{text}") as caught:
            await fetch(transport, "https://evolink.invalid/", **calls.extensions)
        assert "SECRET" not in "".join(traceback.format_exception(caught.value)) + repr(transport)
        assert_clean(transport)
        await proxy.peers[0].lost
    assert calls == ["slot"], "what the proxy was told is not the request"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://user:SECRET@host:port", "ALL_PROXY holds no valid proxy URL"),
        ("http://user:SECRET@", "ALL_PROXY holds no valid proxy URL"),
        ("socks5://user:SECRET@127.0.0.1:1080", "ALL_PROXY asks for a socks5 proxy"),
    ],
)
async def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(
    make: Make, proxy_env: ProxyEnv, url: str, text: str
) -> None:
    proxy_env(ALL_PROXY=url)
    transport = make(1, trust_env=True)
    with pytest.raises(ConfigurationError, match=text) as caught:
        await fetch(transport, "https://evolink.invalid/")
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert_clean(transport)


async def test_cancelled_while_the_proxy_thinks(make: Make, proxy_env: ProxyEnv) -> None:
    async with serving(silence) as proxy:
        proxy_env(HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}")
        transport = make(1, trust_env=True)
        task = asyncio.create_task(fetch(transport, "https://evolink.invalid/"))
        await proxy.until_requests(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert_clean(transport)
        await proxy.peers[0].lost


@pytest.mark.parametrize(
    ("no_proxy", "origin", "direct"),
    [
        ("*", (b"https", b"api.evolink.ai", 443), True),
        ("evolink.ai", (b"https", b"api.evolink.ai", 443), True),
        ("evolink.ai", (b"https", b"evolink.ai", 443), True),
        ("evolink.ai", (b"https", b"notevolink.ai", 443), False),
        (".evolink.ai", (b"https", b"api.evolink.ai", 443), True),
        ("*.evolink.ai", (b"https", b"api.evolink.ai", 443), True),
        (".evolink.ai", (b"https", b"evolink.ai", 443), False),
        ("x, EVOLINK.ai ,", (b"https", b"api.evolink.ai", 443), True),
        ("evolink.ai:8443", (b"https", b"evolink.ai", 443), False),
        ("evolink.ai:8443", (b"https", b"evolink.ai", 8443), True),
        ("http://evolink.ai", (b"https", b"evolink.ai", 443), False),
        ("all://evolink.ai", (b"https", b"evolink.ai", 443), True),
        ("10.0.0.1", (b"http", b"10.0.0.1", 80), True),
        ("192.168.0.0/16", (b"http", b"192.168.3.4", 80), True),
        ("192.168.0.0/16", (b"http", b"10.0.0.1", 80), False),
        ("fd00::1", (b"http", b"fd00::1", 80), True),
        ("[fd00::1]:80", (b"http", b"fd00::1", 80), True),
        ("[fd00::1]:81", (b"http", b"fd00::1", 80), False),
        ("", (b"http", b"evolink.ai", 80), False),
    ],
)
def test_no_proxy(no_proxy: str, origin: tuple[bytes, bytes, int], direct: bool) -> None:
    proxies = Proxies({"all": "http://proxy:3128", "no": no_proxy})
    assert (proxies.for_origin(origin) is None) is direct


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "[::1]"])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_no_proxy_is_asked_for_a_loopback_host(
    make: Make, proxy_env: ProxyEnv, unused_port: int, scheme: str, host: str
) -> None:
    async with serving(then_close(b"")) as proxy:
        proxy_env(**{f"{scheme.upper()}_PROXY": f"http://127.0.0.1:{proxy.port}"}, NO_PROXY="evolink.ai")
        transport = make(trust_env=True)
        with pytest.raises(httpx.ConnectError):
            await fetch(transport, f"{scheme}://{host}:{unused_port}/")
        assert proxy.peers == []


async def test_the_key_and_the_files_of_a_service_on_this_machine_pass_by_every_proxy(
    proxy_env: ProxyEnv, tmp_path: Path, api_key: str
) -> None:
    picture = b"\x89PNG\r\n\x1a\n" + bytes(4) + b"IHDR" + bytes(17) + bytes(4) + b"IEND\xaeB`\x82"
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"
    answers = in_turn(always(answer % (2, b"{}")), always(answer % (len(picture), picture)))
    async with serving(then_close(b"")) as proxy, serving(answers) as server:
        proxy_env(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}", ALL_PROXY=f"http://127.0.0.1:{proxy.port}")
        async with AsyncEvoLink(base_url=server.url) as client:
            assert await client.raw("GET", "/v1/anything") == {}
            [path] = await client.save(f"{server.url.rstrip('/')}/a.png", tmp_path / "out")
        assert path.read_bytes() == picture
        assert [api_key.encode() in head for _, head in server.requests] == [True, False]
        assert proxy.peers == []


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
async def test_a_proxy_of_a_kind_that_cannot_be_spoken_ends_the_first_call_at_once(
    proxy_env: ProxyEnv, variable: str
) -> None:
    proxy_env(**{variable: "socks5://user:SECRET@127.0.0.1:1080"})
    async with AsyncEvoLink() as client:
        for call in (
            lambda: client.credits(),
            lambda: client.images.submit(model="gpt-4o-image", prompt="x"),
            lambda: client.files.quota(),
            lambda: client.run_many([]),
        ):
            async with asyncio.timeout(60):
                with pytest.raises(ConfigurationError, match=f"^{variable} asks for a socks5 proxy") as caught:
                    await call()
            assert "SECRET" not in "".join(traceback.format_exception(caught.value))


async def test_a_proxy_that_only_the_files_host_needs_hinders_no_other_call(proxy_env: ProxyEnv) -> None:
    proxy_env(HTTPS_PROXY="socks5://127.0.0.1:1080")
    async with (
        serving(always(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")) as server,
        AsyncEvoLink(base_url=server.url, files_url="https://files.invalid") as client,
    ):
        assert await client.raw("GET", "/v1/anything") == {}
        with pytest.raises(ConfigurationError, match="HTTPS_PROXY asks for a socks5 proxy"):
            await client.files.quota()


# -- A user's own client -----------------------------------------------------------------------------


def users_call(url: str, body: bytes | AsyncIterator[bytes] = b"", **options: Any) -> Call:
    place = httpx.URL(url)
    length = 2 if not isinstance(body, bytes) else len(body)
    lines = b"Host: %b\r\nAuthorization: Bearer ours\r\nContent-Length: %d\r\n" % (place.netloc, length)
    method = b"POST" if body else b"GET"
    return Call(method, origin_of(place), place.raw_path, lines, body, **{"seconds": 60.0, **options})


async def body_of(transport: ForeignTransport, call: Call) -> bytes:
    reply = await transport.call(call)
    try:
        body = b""
        while part := await reply.read():
            body += part
        return body
    finally:
        await reply.aclose()


async def test_a_users_client_sends_our_request_and_nothing_of_its_own() -> None:
    async with serving(in_turn(always(OK.replace(b"OK\r\n", b"OK\r\nSet-Cookie: a=b\r\n")), always(OK))) as server:
        async with httpx.AsyncClient(
            headers={"x-mine": "1"}, cookies={"c": "d"}, auth=("u", "p"), follow_redirects=True, trust_env=False
        ) as client:
            transport = ForeignTransport(client, Gate(2))
            calls = Calls()
            reply = await transport.call(users_call(server.url, b"{}", lane="submit", **calls.extensions))
            assert transport.gate.used_by("submit") == 1
            assert [await reply.read(), await reply.read()] == [b"ok", b""]
            await reply.aclose()
            await reply.aclose()
            assert (transport.gate.in_use, calls) == (0, ["slot", "bytes"])
            assert await body_of(transport, users_call(server.url)) == b"ok"
            await transport.aclose()
            assert not client.is_closed
        head = server.requests[0][1].lower()
        assert b"authorization: bearer ours\r\n" in head
        assert not any(word in head for word in (b"x-mine", b"cookie", b"python-httpx"))
        assert b"cookie" not in server.requests[1][1].lower()


async def test_a_users_client_follows_no_redirect_with_our_key() -> None:
    moved = b"HTTP/1.1 307 Moved\r\nLocation: http://evolink.invalid/\r\nContent-Length: 0\r\n\r\n"
    async with serving(always(moved)) as server, httpx.AsyncClient(follow_redirects=True, trust_env=False) as client:
        transport = ForeignTransport(client, Gate(1))
        reply = await transport.call(users_call(server.url))
        assert reply.status == 307
        await reply.aclose()
        assert transport.gate.in_use == 0


@pytest.mark.parametrize("phase", ["before the head", "in the body"])
async def test_cancelling_a_users_client_releases_the_place(phase: str) -> None:
    answer = silence if phase == "before the head" else always(HALF_A_BODY)
    async with serving(answer) as server, httpx.AsyncClient(trust_env=False) as client:
        gate = Gate(1)
        task = asyncio.create_task(body_of(ForeignTransport(client, gate), users_call(server.url)))
        await server.until_requests(1)
        await settle()
        assert gate.in_use == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (gate.in_use, gate.waiting) == (0, 0)
        await server.peers[0].lost


async def test_a_users_client_that_fails_to_close_costs_no_place() -> None:
    class Stubborn(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"x"

        async def aclose(self) -> None:
            raise OSError("no")

    gate = Gate(1)
    answering = httpx.MockTransport(lambda asked: httpx.Response(200, stream=Stubborn()))
    async with httpx.AsyncClient(transport=answering) as client:
        reply = await ForeignTransport(client, gate).call(users_call("http://evolink.invalid"))
        with pytest.raises(OSError, match="no"):
            await reply.aclose()
    assert gate.in_use == 0


async def test_pool_timeout_and_failures_of_a_users_client(unused_port: int) -> None:
    gate = Gate(1)
    async with httpx.AsyncClient(trust_env=False) as client:
        transport = ForeignTransport(client, gate)
        with pytest.raises(httpx.ConnectError):
            await transport.call(users_call(f"http://127.0.0.1:{unused_port}"))
        assert gate.in_use == 0
        gate.try_acquire("read")
        with pytest.raises(httpx.PoolTimeout):
            await transport.call(users_call(f"http://127.0.0.1:{unused_port}", pool_timeout=0.01))
        gate.release("read")


@pytest.fixture
def other_family(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package of httpx's shape under another name, whose client refuses httpx's own requests."""
    family = types.ModuleType("otherx")

    class Request(httpx.Request):
        pass

    class AsyncClient(httpx.AsyncClient):
        async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
            assert isinstance(request, Request)
            return await super().send(request, **options)

    AsyncClient.__module__ = Request.__module__ = "otherx._client"
    family.AsyncClient, family.Request, family.URL = AsyncClient, Request, httpx.URL  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "otherx", family)
    return family


async def test_a_client_of_another_family_gets_a_request_of_its_own(other_family: types.ModuleType) -> None:
    class Mine(other_family.AsyncClient):  # type: ignore[name-defined,misc]
        pass

    async def parts() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    async with serving(always(OK)) as server, Mine(trust_env=False) as client:
        transport = ForeignTransport(client, Gate(1))
        assert await body_of(transport, users_call(server.url, b"body")) == b"ok"
        assert await body_of(transport, users_call(server.url, parts())) == b"ok"
        assert [head.rpartition(b"\r\n")[2] for _, head in server.requests] == [b"body", b"ab"]
        assert repr(transport).endswith("read: 0 in use + 0 waiting)>>")


# Connecting


async def test_a_dead_address_costs_a_quarter_of_a_second_and_not_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first address never answers (a full backlog); the second does."""
    loop = asyncio.get_running_loop()
    deaf = socket.socket()
    deaf.bind(("127.0.0.1", 0))
    deaf.listen(0)
    fill = [socket.socket() for _ in range(3)]
    for filler in fill:
        filler.setblocking(False)
        filler.connect_ex(deaf.getsockname())
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    addresses = [(socket.AF_INET, deaf.getsockname()), (socket.AF_INET, server.sockets[0].getsockname())]
    monkeypatch.setattr(stream_module, "_HAPPY_EYEBALLS_DELAY", 0.01)
    connected = await stream_module._connect_first(loop, addresses)
    assert connected.getpeername() == server.sockets[0].getsockname()
    for one in (connected, deaf, *fill):
        one.close()
    server.close()
    await asyncio.sleep(0)


async def test_a_refused_address_is_followed_by_the_next_at_once(
    monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    loop = asyncio.get_running_loop()
    refused = ("127.0.0.1", unused_port)
    monkeypatch.setattr(stream_module, "_HAPPY_EYEBALLS_DELAY", 3600)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    addresses = [(socket.AF_INET, refused), (socket.AF_INET, server.sockets[0].getsockname())]
    async with asyncio.timeout(60):
        connected = await stream_module._connect_first(loop, addresses)
        connected.close()
        server.close()
        with pytest.raises(ConnectionRefusedError):
            await stream_module._connect_first(loop, [(socket.AF_INET, refused)] * 2)
    await asyncio.sleep(0)


async def test_cancelling_at_any_moment_of_connecting_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unclosed socket would be a ResourceWarning, and those are errors here."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    address = (socket.AF_INET, server.sockets[0].getsockname())
    loop = asyncio.get_running_loop()
    for turns in range(12):
        connecting = asyncio.ensure_future(stream_module._connect_first(loop, [address, address]))
        for _ in range(turns):
            await asyncio.sleep(0)
        connecting.cancel()
        for one in await asyncio.gather(connecting, return_exceptions=True):
            if isinstance(one, socket.socket):
                one.close()
        await asyncio.sleep(0.001)
        gc.collect()
    server.close()
    await asyncio.sleep(0)


def test_the_families_of_a_host_take_turns() -> None:
    found = [(6, 1, 6, "", "a6"), (6, 1, 6, "", "b6"), (2, 1, 6, "", "a4")]
    assert [address for _, address in stream_module._interleaved(found)] == ["a6", "a4", "b6"]
