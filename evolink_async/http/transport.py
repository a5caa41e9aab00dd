"""Connections: one request per slot, one connection per slot, and a fair gate in front.

`SlotTransport` is an ordinary httpx transport, made for very many small exchanges at once. Its parts:

* `_Slot`          a connection: a `SocketStream` below, httpcore's HTTP/1.1 (h11) on top.
* `_IdleSlots`     slots between two requests: newest first per origin, oldest first over all of them.
* `_Lease`         a place of the gate and the slot in it, from the first byte to the last; given back exactly once.

httpcore's own pool is not used: at hundreds of waiting requests it rescans all of them per event, and a cancelled
request can lose a place of it for ever (https://github.com/encode/httpcore/issues/1093). Here nothing queues below the
gate, every operation takes constant time, and a request that fails or is cancelled costs its own connection only.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import warnings
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
from typing import Any, cast

import httpcore
import httpx

from evolink_async.http.failures import raise_connect_failure, raise_translated
from evolink_async.http.gate import LANES, Gate, Lane
from evolink_async.http.proxies import DEFAULT_PORTS, Origin, Proxies, Proxy, open_tunnel, place_of
from evolink_async.http.stream import SocketStream, shared_ssl_context

DEFAULT_KEEPALIVE_EXPIRY = 4.0
"""Seconds. Common servers drop an idle connection after 5 s: a POST written into one that the server is just
closing may or may not have been received, so we stay below."""

_Timeouts = Mapping[str, float | None]


class TransportClosed(httpx.TransportError, RuntimeError):
    """The transport is closed; nothing was sent."""


class _Slot:
    """One connection to one origin, straight or through a proxy."""

    __slots__ = ("_connection", "_forward_proxy", "_stream", "idle_since", "origin")

    def __init__(self, origin: Origin, stream: SocketStream, forward_proxy: Proxy | None, next_hop: Origin) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self._stream = stream
        self._forward_proxy = forward_proxy
        # httpcore's keep-alive clock stays off: `idle_since` is measured on the loop's.
        self._connection = httpcore.AsyncHTTP11Connection(httpcore.Origin(*next_hop), stream)

    async def send(self, request: httpx.Request, on_bytes: Callable[[], object] | None) -> httpcore.Response:
        core_request = self._convert(request)
        self._stream.begin_exchange(on_bytes)
        return await self._connection.handle_async_request(core_request)

    def is_reusable(self) -> bool:
        """Whether the last exchange ended cleanly: read to the end, nothing left over, no wish to close."""
        # Bytes after the end of an answer would be taken for the answer to the next request. httpcore passes
        # them to h11, whose `trailing_data` is the only place to see them. Should httpcore ever move it: close
        # rather than trust.
        state = getattr(self._connection, "_h11_state", None)
        return self._connection.is_idle() and state is not None and not state.trailing_data[0]

    def is_stale(self) -> bool:
        """Whether the server closed the idle connection, or wrote into it, as far as this machine knows."""
        return self._connection.has_expired()

    def abort(self) -> None:
        self._stream.abort()

    def _convert(self, request: httpx.Request) -> httpcore.Request:
        url, proxy = request.url, self._forward_proxy
        headers = request.headers.raw
        if proxy is None:
            scheme, host, port, target = url.raw_scheme, url.raw_host, url.port, url.raw_path
        else:
            scheme, host, port = proxy.scheme, proxy.host, proxy.port
            target = b"%b://%b%b" % (url.raw_scheme, url.netloc, url.raw_path)
            headers = proxy.headers + headers
        return httpcore.Request(
            method=request.method,
            url=httpcore.URL(scheme=scheme, host=host, port=port, target=target),
            headers=headers,
            content=cast(httpx.AsyncByteStream, request.stream),
            extensions=request.extensions,
        )


class _IdleSlots:
    """Open slots that nobody uses: taken newest first, dropped oldest first, both at constant cost."""

    def __init__(self) -> None:
        self._by_origin: dict[Origin, deque[_Slot]] = {}
        self._by_age: OrderedDict[_Slot, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_age)

    def push(self, slot: _Slot) -> None:
        self._by_origin.setdefault(slot.origin, deque()).append(slot)
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


class _Lease:
    """A place of the gate, and the slot in it once there is one. Ends once, whoever ends it first."""

    __slots__ = ("_gate", "_idle", "_lane", "_open", "slot")

    def __init__(self, gate: Gate, lane: Lane, idle: Callable[[_Slot], None]) -> None:
        self._gate = gate
        self._lane = lane
        self._idle = idle
        self._open = True
        self.slot: _Slot | None = None

    @property
    def is_open(self) -> bool:
        return self._open

    def discard(self) -> None:
        """Close the connection and give the place back."""
        if self._open:
            self._open = False
            if self.slot is not None:
                self.slot.abort()
            self._gate.release(self._lane)

    def give_back(self) -> None:
        """Keep the connection for the next request, if it can serve one, and give the place back."""
        if self.slot is None or not self.slot.is_reusable():
            self.discard()
        elif self._open:
            self._open = False
            self._idle(self.slot)
            self._gate.release(self._lane)


class _LeasedBody(httpx.AsyncByteStream):
    """A response's body, which holds its slot until it is closed. Closed early, it costs the connection."""

    def __init__(self, response: httpcore.Response, lease: _Lease) -> None:
        self._stream = response.stream
        self._lease = lease
        self._complete = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = cast("AsyncGenerator[bytes, None]", aiter(cast("AsyncIterable[bytes]", self._stream)))
        try:
            async for part in parts:
                yield part
            self._complete = True
        except BaseException as exc:  # GeneratorExit too: the reader left early
            self._lease.discard()
            await parts.aclose()
            raise_translated(exc)
            raise

    async def aclose(self) -> None:
        if not self._lease.is_open:
            return
        if not self._complete:
            self._lease.discard()
            return
        try:
            await cast(httpx.AsyncByteStream, self._stream).aclose()
        except BaseException as exc:
            self._lease.discard()
            raise_translated(exc)
            raise
        self._lease.give_back()


def lane_of(request: httpx.Request) -> Lane:
    lane = request.extensions.get("lane", "read")
    if lane not in LANES:
        raise ValueError(f"the request extension 'lane' must be one of {LANES}, got {lane!r}")
    return cast(Lane, lane)


async def pass_gate(gate: Gate, lane: Lane, timeout: float | None) -> None:
    if gate.try_acquire(lane):
        return
    try:
        async with asyncio.timeout(timeout):
            await gate.acquire(lane)
    except TimeoutError:
        raise httpx.PoolTimeout(f"no connection slot came free within {timeout:g} s: {gate!r}") from None


def _origin_of(url: httpx.URL) -> Origin:
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

    Request extensions, besides those of httpcore's HTTP/1.1 ("trace", "sni_hostname", ...):

    * `"timeout"`: httpx's mapping. "pool" bounds the wait at the gate (`httpx.PoolTimeout`), "connect" the whole
      way to a usable connection: DNS, TCP, proxy and TLS together.
    * `"lane"`: "submit" or "read" (default), see `Gate`.
    * `"on_slot"`: called without arguments as soon as the gate is passed: here the exchange begins.
    * `"on_bytes"`: called without arguments right before the first byte of the request is written, and never
      before the connection is ready. If it wasn't called, then nothing of the request left this machine.

    All exceptions of the network are httpx's. `trust_env` covers the proxies, SSL_CERT_FILE and SSL_CERT_DIR.
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
        extensions = request.extensions
        timeouts: _Timeouts = extensions.get("timeout") or {}
        lane = lane_of(request)
        origin = _origin_of(request.url)
        self._refuse_if_closed()
        await pass_gate(self._gate, lane, timeouts.get("pool"))
        lease = _Lease(self._gate, lane, self._keep)
        try:
            self._refuse_if_closed()
            on_slot = extensions.get("on_slot")
            if on_slot is not None:
                on_slot()
            lease.slot = self._reuse(origin) or await self._open(origin, extensions, timeouts.get("connect"))
            response = await lease.slot.send(request, extensions.get("on_bytes"))
        except BaseException as exc:
            lease.discard()
            raise_translated(exc)
            raise
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_LeasedBody(response, lease),
            extensions=response.extensions,
        )

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
            self._idle.pop_oldest().abort()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise TransportClosed("the transport is closed; nothing was sent")

    def _keep(self, slot: _Slot) -> None:
        if self._closed:
            slot.abort()
            return
        slot.idle_since = asyncio.get_running_loop().time()
        self._idle.push(slot)

    def _reuse(self, origin: Origin) -> _Slot | None:
        self._drop_expired()
        while (slot := self._idle.pop_newest(origin)) is not None:
            if not slot.is_stale():
                return slot
            slot.abort()
        return None

    def _drop_expired(self) -> None:
        limit = asyncio.get_running_loop().time() - self._keepalive_expiry
        while (slot := self._idle.oldest()) is not None and slot.idle_since < limit:
            self._idle.pop_oldest().abort()

    def _make_room(self) -> None:
        # The place of the connection about to be opened counts as in use already.
        while self._idle and self._gate.in_use + len(self._idle) > self._gate.total:
            self._idle.pop_oldest().abort()

    async def _open(self, origin: Origin, extensions: Mapping[str, Any], timeout: float | None) -> _Slot:
        proxy = self._proxies.for_origin(origin)
        self._make_room()
        self._connections_opened += 1
        stream = SocketStream()
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(stream, origin, proxy, extensions)
        except BaseException as exc:
            stream.abort()
            via = "" if proxy is None else f" through the proxy {proxy.place}"
            raise_connect_failure(exc, timeout, f"{place_of(origin[1], origin[2])}{via}")
            raise

    async def _connect(
        self, stream: SocketStream, origin: Origin, proxy: Proxy | None, extensions: Mapping[str, Any]
    ) -> _Slot:
        scheme, host, _ = origin
        if proxy is None:
            await stream.connect(host.decode("ascii"), origin[2])
        else:
            await stream.connect(proxy.host.decode("ascii"), proxy.port)
            if proxy.scheme == b"https":
                await stream.start_tls(self._ssl_context(), proxy.host.decode("ascii"))
            if scheme == b"http":
                return _Slot(origin, stream, proxy, (proxy.scheme, proxy.host, proxy.port))
            await open_tunnel(stream, origin, proxy)
        if scheme == b"https":
            server_name = extensions.get("sni_hostname") or host.decode("ascii")
            await stream.start_tls(self._ssl_context(), server_name)
        return _Slot(origin, stream, None, origin)

    def _ssl_context(self) -> ssl.SSLContext:
        return shared_ssl_context(self._verify, self._trust_env)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<SlotTransport {state}: {self.idle + self.in_use} of {self._gate.total} slots "
            f"({self.in_use} in use, {self.idle} idle), {self.waiting} waiting>"
        )
