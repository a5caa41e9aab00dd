"""Connections: one request per slot, one connection per slot, and a fair gate in front.

`SlotTransport` is an ordinary httpx transport, made for very many small exchanges at once. Its parts:

* `_Slot`          a connection: a `SocketStream` below, an `HttpConnection` on top.
* `_IdleSlots`     slots between two requests: newest first per origin, oldest first over all of them.
* `Reply`          an exchange: a place of the gate and the slot in it; given back exactly once.

httpcore's own pool is not used: at hundreds of waiting requests it rescans all of them per event, and a cancelled
request can lose a place of it for ever (https://github.com/encode/httpcore/issues/1093). Here nothing queues below the
gate, every operation takes constant time, and a request that fails or is cancelled costs its own connection only.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import cast

import httpx

from evolink_async.clock import Moment
from evolink_async.http.failures import raise_connect_failure
from evolink_async.http.gate import LANES, Gate, Lane
from evolink_async.http.proxies import DEFAULT_PORTS, Origin, Proxies, Proxy, open_tunnel, place_of
from evolink_async.http.stream import SocketStream, shared_ssl_context
from evolink_async.http.wire import Body, Head, HttpConnection, Pairs, header_lines, request_line

DEFAULT_KEEPALIVE_EXPIRY = 4.0
"""Seconds. Common servers drop an idle connection after 5 s: a POST written into one that the server is just
closing may or may not have been received, so we stay below."""

_Timeouts = Mapping[str, float | None]


class TransportClosed(httpx.TransportError, RuntimeError):
    """The transport is closed; nothing was sent."""


@dataclass(slots=True)
class Call:
    """A request on its way to a connection; times in seconds, None: for ever.

    lines: the headers, as `header_lines` makes them. length: of a body that is no bytes, None: it is sent in chunks.
    seconds: for the whole exchange, from the gate to the end of the answer: `httpx.ReadTimeout` when they are over.
    pool_timeout bounds the wait at the gate, connect_timeout the whole way to a usable connection: DNS, TCP, proxy and
    TLS together. on_slot: called as soon as the gate is passed: here the exchange begins. clear: awaited once the
    connection is ready, and not counted in `seconds`; False: time has passed, ask again if the connection still stands;
    raises if the request must not be written after all. on_bytes:
    called right before the first byte of the request is written, and never before the connection is ready; if it wasn't
    called, then nothing of the request left this machine. vet: raises for an address that must not be connected to; it
    is shown all that a new connection is about to choose from, not those of a proxy. The same for all calls to one
    origin.
    """

    method: bytes
    origin: Origin
    target: bytes
    lines: bytes
    body: Body = b""
    length: int | None = None
    lane: Lane = "read"
    seconds: float | None = None
    pool_timeout: float | None = None
    connect_timeout: float | None = None
    read_timeout: float | None = None
    write_timeout: float | None = None
    on_slot: Callable[[], object] | None = None
    clear: Callable[[], Awaitable[bool]] | None = None
    on_bytes: Callable[[], object] | None = None
    server_name: str | None = None  # for TLS, if it isn't the host
    vet: Callable[[str], object] | None = None

    @property
    def netloc(self) -> bytes:
        """Host and port as a URL has them."""
        scheme, host, port = self.origin
        place = place_of(host, port).encode("ascii")
        return place.rpartition(b":")[0] if port == DEFAULT_PORTS[scheme] else place


class _Slot:
    """One connection to one origin, straight or through a proxy."""

    __slots__ = ("_forward_proxy", "connection", "idle_since", "origin", "stream")

    def __init__(self, origin: Origin, stream: SocketStream, forward_proxy: Proxy | None) -> None:
        self.origin = origin
        self.idle_since = Moment(0.0, 0.0)
        self.stream = stream
        self._forward_proxy = forward_proxy
        self.connection = HttpConnection(stream)

    async def send(self, call: Call) -> Head:
        target, lines = call.target, call.lines
        if self._forward_proxy is not None:
            target = b"%b://%b%b" % (call.origin[0], call.netloc, target)
            lines = self._forward_proxy.header_lines + lines
        return await self.connection.send(
            call.method,
            b"%b%b\r\n" % (request_line(call.method, target), lines),
            call.body,
            length=call.length,
            read_timeout=call.read_timeout,
            write_timeout=call.write_timeout,
            on_bytes=call.on_bytes,
        )

    def is_stale(self) -> bool:
        """Whether the server closed the idle connection, or wrote into it, as far as this machine knows."""
        return self.stream.is_readable()


class _IdleSlots:
    """Open slots that nobody uses: taken newest first, dropped oldest first, both at constant cost."""

    def __init__(self) -> None:
        self._by_origin: defaultdict[Origin, deque[_Slot]] = defaultdict(deque)
        self._by_age: OrderedDict[_Slot, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_age)

    def push(self, slot: _Slot) -> None:
        self._by_origin[slot.origin].append(slot)
        self._by_age[slot] = None

    def pop_newest(self, origin: Origin) -> _Slot | None:
        slots = self._by_origin.get(origin)
        if slots is None:
            return None
        slot = slots.pop()
        del self._by_age[slot]
        self._forget_if_empty(origin)
        return slot

    def oldest(self) -> _Slot | None:
        return next(iter(self._by_age), None)

    def pop_oldest(self) -> _Slot:
        slot, _ = self._by_age.popitem(last=False)
        # The oldest of all is the oldest of its origin.
        self._by_origin[slot.origin].popleft()
        self._forget_if_empty(slot.origin)
        return slot

    def _forget_if_empty(self, origin: Origin) -> None:
        if not self._by_origin[origin]:
            del self._by_origin[origin]


class Reply:
    """An exchange: a place of the gate, the slot in it once there is one, and an answer whose body is still to be read.

    It holds its place until it is closed, whoever closes it first: early, that costs the connection.
    headers: names and values as they came.
    """

    __slots__ = ("_gate", "_idle", "_lane", "_open", "headers", "reason", "slot", "status", "timer")

    status: int
    reason: bytes
    headers: Pairs

    def __init__(self, gate: Gate, lane: Lane, idle: Callable[[_Slot], None]) -> None:
        self._gate = gate
        self._lane = lane
        self._idle = idle
        self._open = True
        self.slot: _Slot | None = None
        self.timer: asyncio.TimerHandle | None = None

    async def read(self) -> bytes:
        """The next bytes of the body; none at its end."""
        if self.slot is None or not self._open:
            raise httpx.StreamClosed
        try:
            return await self.slot.connection.read()
        except BaseException:
            self.discard()
            raise

    async def aclose(self) -> None:
        """Give the place back, and keep the connection for the next request if it can serve one. Can be repeated."""
        if self._open and self.slot is not None and self.slot.connection.is_reusable:
            self._end()
            self._idle(self.slot)
            self._gate.release(self._lane)
        else:
            self.discard()

    def discard(self) -> None:
        """Close the connection and give the place back. Can be repeated."""
        if self._open:
            self._end()
            if self.slot is not None:
                self.slot.stream.abort()
            self._gate.release(self._lane)

    def _end(self) -> None:
        self._open = False
        if self.timer is not None:
            self.timer.cancel()

    @property
    def has_surplus(self) -> bool:
        """Whether more came after its end, as far as is known: its length was a lie, or the server is confused."""
        return self.slot is not None and self.slot.connection.has_surplus


class _HttpxBody(httpx.AsyncByteStream):
    """The body of a reply as httpx reads it."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while part := await self._reply.read():
                yield part
        except BaseException:  # GeneratorExit too: the reader left early
            self._reply.discard()
            raise

    async def aclose(self) -> None:
        await self._reply.aclose()


def lane_of(request: httpx.Request) -> Lane:
    lane = request.extensions.get("lane", "read")
    if lane not in LANES:
        raise ValueError(f"the request extension 'lane' must be one of {LANES}, got {lane!r}")
    return cast(Lane, lane)


async def wait_at_gate(gate: Gate, lane: Lane, timeout: float | None) -> None:
    """Take a place, for which there is no room now or others wait."""
    try:
        async with asyncio.timeout(timeout):
            await gate.acquire(lane)
    except TimeoutError:
        raise httpx.PoolTimeout(f"no connection slot came free within {timeout:g} s: {gate!r}") from None


def _call_of(request: httpx.Request) -> Call:
    """What httpx asks for. Raises before anything is sent if it cannot be."""
    extensions = request.extensions
    timeouts: _Timeouts = extensions.get("timeout") or {}
    length = request.headers.get("content-length")
    body: Body = cast("AsyncIterable[bytes]", request.stream)
    if length is None and "transfer-encoding" not in request.headers:
        body = b""  # as httpx says it, unless somebody took the header out
    return Call(
        request.method.encode("ascii"),
        origin_of(request.url),
        request.url.raw_path,
        header_lines(request.headers.raw),
        body,
        length=int(length) if length and length.isdecimal() else None,
        lane=lane_of(request),
        pool_timeout=timeouts.get("pool"),
        connect_timeout=timeouts.get("connect"),
        read_timeout=timeouts.get("read"),
        write_timeout=timeouts.get("write"),
        on_slot=extensions.get("on_slot"),
        on_bytes=extensions.get("on_bytes"),
        server_name=extensions.get("sni_hostname"),
    )


def origin_of(url: httpx.URL) -> Origin:
    """Scheme, host and port of a URL. Raises `httpx.UnsupportedProtocol` for one that is not http(s) with a host."""
    scheme = url.raw_scheme
    if scheme not in DEFAULT_PORTS or not url.raw_host:
        raise httpx.UnsupportedProtocol(f"the URL must be http:// or https:// with a host, got {url.scheme!r}")
    return scheme, url.raw_host, url.port or DEFAULT_PORTS[scheme]


class SlotTransport(httpx.AsyncBaseTransport):
    """An httpx transport with one connection per slot behind a fair gate: HTTP/1.1, TLS, proxies.

        client = httpx.AsyncClient(transport=SlotTransport())

    At most `max_connections` connections are open, idle ones included. A response holds its slot until it is
    closed: read it to the end, or close it. An exchange that fails, is cancelled or isn't read to the end closes
    its own connection and disturbs no other.

    Request extensions: httpx's `"timeout"` and `"sni_hostname"`; `"lane"`: "submit" or "read" (default), see `Gate`;
    `"on_slot"` and `"on_bytes"`: functions without arguments, see `Call`.

    All exceptions of the network are httpx's; a proxy or certificates that cannot be used are a `ConfigurationError`.
    `trust_env` covers the proxies, SSL_CERT_FILE and SSL_CERT_DIR.
    `verify` is True, False or an `ssl.SSLContext`.
    """

    def __init__(
        self,
        max_connections: int = 100,
        *,
        keepalive_expiry: float = DEFAULT_KEEPALIVE_EXPIRY,
        trust_env: bool = True,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._gate = Gate(max_connections)
        self._keepalive_expiry = keepalive_expiry
        self._trust_env = trust_env
        self._verify = verify
        self._proxies = Proxies.from_environment() if trust_env else Proxies({})
        self._idle = _IdleSlots()
        self._closed = False
        self._connections_opened = 0

    @property
    def gate(self) -> Gate:
        """The gate in front of the slots."""
        return self._gate

    @property
    def idle(self) -> int:
        """Connections open and unused."""
        return len(self._idle)

    @property
    def in_use(self) -> int:
        """Slots taken by an exchange, the connecting ones included."""
        return self._gate.in_use

    def is_proxied(self, origin: Origin) -> bool:
        """Whether a proxy leads there. Raises `ConfigurationError` for a proxy that cannot be used."""
        return self._proxies.for_origin(origin) is not None

    @property
    def waiting(self) -> int:
        """Requests waiting at the gate."""
        return self._gate.waiting

    @property
    def connections_opened(self) -> int:
        """Connections opened since the start, those that failed included."""
        return self._connections_opened

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request. Returns when the response's headers are here; its body is still to be read."""
        reply = await self.call(_call_of(request))
        return httpx.Response(
            status_code=reply.status,
            headers=reply.headers,
            stream=_HttpxBody(reply),
            extensions={
                "http_version": b"HTTP/1.1",
                "reason_phrase": reply.reason,
                "network_stream": reply.slot and reply.slot.stream,
            },
        )

    async def call(self, call: Call) -> Reply:
        """`handle_async_request` without httpx's objects, which cost more than the exchange."""
        self._refuse_if_closed()
        if not self._gate.try_acquire(call.lane):
            await wait_at_gate(self._gate, call.lane, call.pool_timeout)
        reply = Reply(self._gate, call.lane, self._keep)
        try:
            self._refuse_if_closed()
            if call.on_slot is not None:
                call.on_slot()
            loop = asyncio.get_running_loop()
            began = loop.time()
            slot = reply.slot = self._reuse(call.origin, Moment.of(loop)) or await self._open(call)
            asked = loop.time()
            while call.clear is not None and not await call.clear():
                if slot.is_stale():  # no server bears with an idle connection for ever
                    slot.stream.abort()
                    slot = reply.slot = self._reuse(call.origin, Moment.of(loop)) or await self._open(call)
                began += loop.time() - asked
                asked = loop.time()
            if call.seconds is not None:
                reply.timer = loop.call_at(began + call.seconds, slot.stream.expire, call.seconds)
            reply.status, reply.reason, reply.headers = await slot.send(call)
        except BaseException:
            reply.discard()
            raise
        return reply

    async def aclose(self) -> None:
        """Close the idle connections now, and those in use as soon as their responses are closed."""
        self._close_idle()
        # Sockets are really closed in asyncio's next round.
        await asyncio.sleep(0)

    def abandon(self) -> None:
        """`aclose` for a transport whose event loop is closed: it can only let go of the sockets."""
        with warnings.catch_warnings():
            # asyncio warns of sockets that its loop can't close any more. That loop was the caller's to end.
            warnings.simplefilter("ignore", ResourceWarning)
            self._close_idle()
            gc.collect()  # TLS connections are cycles

    def _close_idle(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop_oldest().stream.abort()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise TransportClosed("the transport is closed; nothing was sent")

    def _keep(self, slot: _Slot) -> None:
        if self._closed:
            slot.stream.abort()
            return
        slot.idle_since = slot.stream.moment()
        self._idle.push(slot)

    def _reuse(self, origin: Origin, now: Moment) -> _Slot | None:
        self._drop_expired(now)
        while (slot := self._idle.pop_newest(origin)) is not None:
            if not slot.is_stale():
                return slot
            slot.stream.abort()
        return None

    def _drop_expired(self, now: Moment) -> None:
        # By the wall clock too: of a connection that the server ended while this machine slept nobody tells us.
        while (slot := self._idle.oldest()) is not None and now.since(slot.idle_since) > self._keepalive_expiry:
            self._idle.pop_oldest().stream.abort()

    def _make_room(self) -> None:
        # The place of the connection about to be opened counts as in use already.
        while self._idle and self._gate.in_use + len(self._idle) > self._gate.total:
            self._idle.pop_oldest().stream.abort()

    async def _open(self, call: Call) -> _Slot:
        origin, timeout = call.origin, call.connect_timeout
        proxy = self._proxies.for_origin(origin)
        self._make_room()
        self._connections_opened += 1
        stream = SocketStream()
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(stream, origin, proxy, call)
        except BaseException as exc:
            stream.abort()
            via = "" if proxy is None else f" through the proxy {proxy.place}"
            raise_connect_failure(exc, timeout, f"{place_of(origin[1], origin[2])}{via}")
            raise

    async def _connect(self, stream: SocketStream, origin: Origin, proxy: Proxy | None, call: Call) -> _Slot:
        scheme, host, _ = origin
        if proxy is None:
            await stream.connect(host.decode("ascii"), origin[2], call.vet)
        else:
            await stream.connect(proxy.host.decode("ascii"), proxy.port)
            if proxy.scheme == b"https":
                await stream.start_tls(self._ssl_context(), proxy.host.decode("ascii"))
            if scheme == b"http":
                return _Slot(origin, stream, proxy)
            await open_tunnel(stream, origin, proxy)
        if scheme == b"https":
            await stream.start_tls(self._ssl_context(), call.server_name or host.decode("ascii"))
        return _Slot(origin, stream, None)

    def _ssl_context(self) -> ssl.SSLContext:
        return shared_ssl_context(self._verify, self._trust_env)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<SlotTransport {state}: {self.idle + self.in_use} of {self._gate.total} slots "
            f"({self.in_use} in use, {self.idle} idle), {self.waiting} waiting>"
        )
