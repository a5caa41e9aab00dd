"""Connections: one request per slot, one connection per slot, and a fair gate in front.

`SlotTransport` is an ordinary httpx transport, made for very many small exchanges at once. Bottom up:

* `_SocketStream`  a TCP or TLS connection over an asyncio protocol. It can be cut synchronously at any moment,
                   which is what makes cancellation safe: no cleanup ever has to wait for anything.
* `_Proxies`       which proxy the environment asks for, as httpx reads it.
* `_Slot`          a connection: the stream below, httpcore's HTTP/1.1 (h11) on top.
* `_IdleSlots`     slots between two requests: newest first per origin, oldest first over all of them.
* `_Lease`         a place of the gate and the slot in it, from first byte to last; given back exactly once.

httpcore's own pool is not used: at hundreds of waiting requests it rescans all of them per event, and a
cancelled request can lose a place of it for ever (https://github.com/encode/httpcore/issues/1093). Here nothing
queues below the gate, every operation takes constant time, and a request that fails or is cancelled costs its
own connection only.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import gc
import ipaddress
import os
import select
import ssl
import sys
import urllib.request
import warnings
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import httpcore
import httpx

from .gate import LANES, Gate, Lane

DEFAULT_KEEPALIVE_EXPIRY = 4.0
"""Seconds. Common servers drop an idle connection after 5 s: a POST written into one that the server is just
closing may or may not have been received, so we stay below."""

_HAPPY_EYEBALLS_DELAY = 0.25
"""Seconds before the next address is tried as well (RFC 8305)."""

_HIGH_WATER = 256 * 1024
"""Bytes received and not yet read at which the peer is made to wait."""

_DEFAULT_PORTS = {b"http": 80, b"https": 443}

_PLAIN_EXTENSIONS = ("http_version", "reason_phrase")

_Origin = tuple[bytes, bytes, int]  # scheme, host, port
_Timeouts = Mapping[str, float | None]


class TransportClosed(httpx.TransportError, RuntimeError):
    """The transport is closed; nothing was sent."""


# -- Errors: httpcore's and the system's become httpx's --------------------------------------------

_TRANSLATIONS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    # The most specific first: the first match wins.
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ReadTimeout, httpx.ReadTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.TimeoutException, httpx.TimeoutException),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.ReadError, httpx.ReadError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.NetworkError, httpx.NetworkError),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
    (httpcore.ProtocolError, httpx.ProtocolError),
    (httpcore.ProxyError, httpx.ProxyError),
    (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol),
    # Raised before anything is written, if a connection is asked for two things at once.
    (httpcore.ConnectionNotAvailable, httpx.ConnectError),
)


def translate_exception(exc: BaseException) -> httpx.TransportError | None:
    """The httpx exception that stands for one of httpcore's; None for anything else.

    It carries its `__cause__`, except where the original's text may show a header, and so the API key.
    """
    target = next((target for source, target in _TRANSLATIONS if isinstance(exc, source)), None)
    if target is None:
        return None
    if isinstance(exc, httpcore.LocalProtocolError):
        translated = target("the request isn't valid HTTP/1.1 (details withheld: they may show a header)")
        translated.__suppress_context__ = True
    else:
        translated = target(_describe(exc))
        translated.__cause__ = exc
    return translated


def _raise_translated(exc: BaseException) -> None:
    """Raise what stands for `exc`, if anything does; the caller re-raises the original otherwise."""
    translated = translate_exception(exc)
    if translated is not None:
        raise translated


def _raise_connect_failure(exc: BaseException, timeout: float | None, place: str) -> None:
    """Raise what stands for a failure before the connection was ready; the caller re-raises anything else."""
    if isinstance(exc, TimeoutError):
        within = "" if timeout is None else f" within {timeout:g} s"
        raise httpx.ConnectTimeout(f"no connection to {place}{within}") from exc
    # OSError covers DNS, refusals, TLS (ssl.SSLError) and "too many open files"; UnicodeError is a host name
    # that DNS cannot spell.
    if isinstance(exc, OSError | UnicodeError):
        raise httpx.ConnectError(f"cannot connect to {place}: {_describe(exc)}") from exc


# -- TLS -------------------------------------------------------------------------------------------


def _shared_ssl_context(verify: ssl.SSLContext | bool, trust_env: bool) -> ssl.SSLContext:
    """The context for `verify`, one per process and setting: building one costs 20-40 ms."""
    if isinstance(verify, ssl.SSLContext):
        context = verify
    else:
        files = tuple(os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")) if trust_env else ()
        context = _build_ssl_context(verify, trust_env, files)
    # Whatever the context offered before: we speak nothing but HTTP/1.1.
    context.set_alpn_protocols(["http/1.1"])
    return context


@functools.lru_cache(maxsize=8)
def _build_ssl_context(verify: bool, trust_env: bool, files: tuple[str | None, ...]) -> ssl.SSLContext:
    return httpx.create_ssl_context(verify=verify, trust_env=trust_env)


# -- The stream ------------------------------------------------------------------------------------


class _SocketStream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """A connection as httpcore wants it, on an asyncio transport.

    asyncio reads all the time, so a connection that the server closes while idle is noticed without a request.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._ended = False  # no more bytes will come
        self._failure: Exception | None = None
        self._aborted = False
        self._reading_paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._writer: asyncio.Future[None] | None = None
        self._untouched = False  # nothing of the current request is written yet
        self._on_first_byte: Callable[[], object] | None = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._aborted:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > _HIGH_WATER and self._transport is not None:
            self._transport.pause_reading()
            self._reading_paused = True
        self._wake(self._reader)

    def eof_received(self) -> None:
        # Returning None makes asyncio close its side: nothing further can be asked on this connection.
        self._ended = True
        self._wake(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._failure = self._failure or exc
        self._wake(self._reader)
        self._wake(self._writer)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake(self._writer)

    # What httpcore calls.

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self._received and not self._ended:
            self._reader = self._loop.create_future()
            await self._wait(self._reader, timeout, httpcore.ReadTimeout, "no bytes came")
        if not self._received and self._failure is not None:
            raise httpcore.ReadError(_describe(self._failure)) from self._failure
        return self._take(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        if self._untouched:
            self._touch()
        if self._transport is None or self._ended:
            raise httpcore.WriteError(_describe(self._failure))
        self._transport.write(buffer)
        while self._writing_paused and not self._ended:
            self._writer = self._loop.create_future()
            await self._wait(self._writer, timeout, httpcore.WriteTimeout, "the peer took no bytes")

    async def aclose(self) -> None:
        self.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        # asyncio would wait for the handshake of a connection that is gone already.
        if self._transport is None or self._ended or self._received:
            raise httpcore.ConnectError(_describe(self._failure))
        async with asyncio.timeout(timeout):
            secured = await self._loop.start_tls(self._transport, self, ssl_context, server_hostname=server_hostname)
        if secured is None:  # asyncio's answer if the connection was cut without an error
            raise httpcore.ConnectError(_describe(self._failure))
        self._transport = secured
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._is_readable()
        names = {"client_addr": "sockname", "server_addr": "peername"}
        return None if self._transport is None else self._transport.get_extra_info(names.get(info, info))

    # What the slot calls.

    async def connect(self, host: str, port: int) -> None:
        """Open the TCP connection, to whichever of the host's addresses answers first."""
        # Only asyncio's own loops know about happy eyeballs; uvloop tries one address after the other.
        race = isinstance(self._loop, asyncio.BaseEventLoop)
        options: dict[str, Any] = {"happy_eyeballs_delay": _HAPPY_EYEBALLS_DELAY} if race else {}
        await self._loop.create_connection(lambda: self, host, port, **options)

    def begin_exchange(self, on_first_byte: Callable[[], object] | None) -> None:
        """A request follows; the callback is called right before its first byte is written, or never."""
        self._untouched = True
        self._on_first_byte = on_first_byte

    def abort(self) -> None:
        """Cut the connection now. Needs no await, can be repeated, never fails."""
        if self._aborted:
            return
        self._aborted = self._ended = True
        self._failure = self._failure or ConnectionAbortedError("the connection was closed on our side")
        if self._transport is not None:
            try:
                self._transport.abort()
            except RuntimeError:  # the loop is closed, and nothing but letting go can close the socket
                self._transport = None
        self._wake(self._reader)
        self._wake(self._writer)

    # Inside.

    def _touch(self) -> None:
        """Right before a request's first byte: the last chance to find that it can't get through."""
        self._untouched = False
        # A server that closed the idle connection, or wrote into it ("408 Request Timeout" is common), did not
        # mean this request. Raised as a failure to connect, because nothing of it was sent.
        if self._ended or self._received:
            raise httpcore.ConnectError("the server closed the connection before the request was written")
        tell, self._on_first_byte = self._on_first_byte, None
        if tell is not None:
            tell()

    def _take(self, max_bytes: int) -> bytes:
        data = bytes(self._received[:max_bytes])
        del self._received[:max_bytes]
        if self._reading_paused and not self._received and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    def _is_readable(self) -> bool:
        if self._ended or self._received or self._transport is None:
            return True
        # What arrived since the loop last looked.
        return _is_socket_readable(self._transport.get_extra_info("socket").fileno())

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(
        self,
        waiter: asyncio.Future[None],
        timeout: float | None,
        error: type[httpcore.TimeoutException],
        what: str,
    ) -> None:
        # Cheaper than asyncio.timeout(), which every read of every poll would pay for.
        timer = None
        if timeout is not None:
            timer = self._loop.call_later(timeout, _expire, waiter, error, f"{what} for {timeout:g} s")
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()


def _expire(waiter: asyncio.Future[None], error: type[httpcore.TimeoutException], message: str) -> None:
    if not waiter.done():
        waiter.set_exception(error(message))


def _describe(exc: BaseException | None) -> str:
    if exc is None:
        return "the connection was closed by the server"
    return str(exc) or type(exc).__name__


def _is_socket_readable(descriptor: int) -> bool:
    if descriptor < 0:
        return True
    if sys.platform == "win32":
        return bool(select.select([descriptor], [], [], 0)[0])
    # Not select(): it cannot look at descriptors above 1023.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


# -- Proxies ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Proxy:
    scheme: bytes
    host: bytes
    port: int
    authorization: bytes | None = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> _Proxy:
        """Read a proxy's URL. No error shows it, because it may hold a password."""
        try:
            parsed = httpx.URL(url if "://" in url else f"http://{url}")
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if not parsed.host:
            raise httpx.ProxyError("the environment's proxy URL isn't valid (not shown: it may hold a password)")
        if parsed.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(
                f"the environment asks for a {parsed.scheme!r} proxy; only http and https proxies are supported"
            )
        authorization = None
        if parsed.username or parsed.password:
            pair = f"{parsed.username}:{parsed.password}".encode()
            authorization = b"Basic " + base64.b64encode(pair)
        port = parsed.port or _DEFAULT_PORTS[parsed.raw_scheme]
        return cls(parsed.raw_scheme, parsed.raw_host, port, authorization)

    @property
    def place(self) -> str:
        return _place(self.host, self.port)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [] if self.authorization is None else [(b"Proxy-Authorization", self.authorization)]


class _Proxies:
    """HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, and the system's settings on macOS and Windows; read once."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._urls = {scheme: settings[scheme] for scheme in ("http", "https", "all") if settings.get(scheme)}
        entries = (entry.strip().lower() for entry in settings.get("no", "").split(","))
        self._exceptions = [entry for entry in entries if entry]

    @classmethod
    def from_environment(cls) -> _Proxies:
        return cls(urllib.request.getproxies())

    def for_origin(self, origin: _Origin) -> _Proxy | None:
        scheme, host = origin[0].decode("ascii"), origin[1].decode("ascii")
        url = self._urls.get(scheme) or self._urls.get("all")
        if url is None or any(_is_excepted(entry, scheme, host, origin[2]) for entry in self._exceptions):
            return None
        return _Proxy.parse(url)


def _is_excepted(entry: str, scheme: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY covers the origin: `*`, name, `.name`, `name:port`, address or network."""
    if entry == "*":
        return True
    if "://" in entry:
        wanted_scheme, _, entry = entry.partition("://")
        if wanted_scheme not in ("all", scheme):
            return False
    name, wanted_port = _split_port(entry)
    if wanted_port is not None and wanted_port != str(port):
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    except ValueError:  # one of them is a name
        bare = name.removeprefix("*")
        return host.endswith(bare) if bare.startswith(".") else host == bare or host.endswith(f".{bare}")


def _split_port(entry: str) -> tuple[str, str | None]:
    if entry.startswith("["):  # [::1] or [::1]:8080
        name, _, rest = entry[1:].partition("]")
        return name, rest.removeprefix(":") or None
    if entry.count(":") == 1:
        name, _, port = entry.partition(":")
        return name, port
    return entry, None


def _place(host: bytes, port: int) -> str:
    name = host.decode("ascii")
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


async def _open_tunnel(stream: _SocketStream, origin: _Origin, proxy: _Proxy) -> None:
    """Ask the proxy to connect us through to `origin`."""
    _, host, port = origin
    authority = _place(host, port).encode("ascii")
    request = httpcore.Request(
        method=b"CONNECT",
        url=httpcore.URL(scheme=proxy.scheme, host=proxy.host, port=proxy.port, target=authority),
        headers=[(b"Host", authority), (b"Accept", b"*/*"), *proxy.headers],
    )
    next_hop = httpcore.Origin(proxy.scheme, proxy.host, proxy.port)
    try:
        response = await httpcore.AsyncHTTP11Connection(next_hop, stream).handle_async_request(request)
    except (httpcore.NetworkError, httpcore.ProtocolError) as exc:
        # Not what they would mean elsewhere: our own request wasn't even begun.
        raise httpx.ProxyError(f"the proxy {proxy.place} did not open a tunnel: {exc}") from exc
    if not 200 <= response.status <= 299:
        reason = response.extensions.get("reason_phrase", b"").decode("ascii", errors="replace")
        raise httpx.ProxyError(f"the proxy {proxy.place} refused the tunnel: {response.status} {reason}")


# -- Slots -----------------------------------------------------------------------------------------


class _Slot:
    """One connection to one origin, straight or through a proxy."""

    __slots__ = ("_connection", "_forward_proxy", "_stream", "idle_since", "origin")

    def __init__(self, origin: _Origin, stream: _SocketStream, forward_proxy: _Proxy | None, next_hop: _Origin) -> None:
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
        self._by_origin: dict[_Origin, deque[_Slot]] = {}
        self._by_age: OrderedDict[_Slot, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_age)

    def push(self, slot: _Slot) -> None:
        self._by_origin.setdefault(slot.origin, deque()).append(slot)
        self._by_age[slot] = None

    def pop_newest(self, origin: _Origin) -> _Slot | None:
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

    def _forget_if_empty(self, origin: _Origin) -> None:
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
            _raise_translated(exc)
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
            _raise_translated(exc)
            raise
        self._lease.give_back()


# -- Transports ------------------------------------------------------------------------------------


def _lane_of(request: httpx.Request) -> Lane:
    lane = request.extensions.get("lane", "read")
    if lane not in LANES:
        raise ValueError(f"the request extension 'lane' must be one of {LANES}, got {lane!r}")
    return cast(Lane, lane)


def _origin_of(url: httpx.URL) -> _Origin:
    scheme = url.raw_scheme
    if scheme not in _DEFAULT_PORTS or not url.raw_host:
        raise httpx.UnsupportedProtocol(f"the URL must be http:// or https:// with a host, got {url.scheme!r}")
    return scheme, url.raw_host, url.port or _DEFAULT_PORTS[scheme]


async def _pass_gate(gate: Gate, lane: Lane, timeout: float | None) -> None:
    if gate.try_acquire(lane):
        return
    try:
        async with asyncio.timeout(timeout):
            await gate.acquire(lane)
    except TimeoutError:
        raise httpx.PoolTimeout(f"no connection slot came free within {timeout:g} s: {gate!r}") from None


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
        self._proxies = _Proxies.from_environment() if trust_env else _Proxies({})
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
        lane = _lane_of(request)
        origin = _origin_of(request.url)
        self._refuse_if_closed()
        await _pass_gate(self._gate, lane, timeouts.get("pool"))
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
            _raise_translated(exc)
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

    def _reuse(self, origin: _Origin) -> _Slot | None:
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

    async def _open(self, origin: _Origin, extensions: Mapping[str, Any], timeout: float | None) -> _Slot:
        proxy = self._proxies.for_origin(origin)
        self._make_room()
        self._connections_opened += 1
        stream = _SocketStream()
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(stream, origin, proxy, extensions)
        except BaseException as exc:
            stream.abort()
            via = "" if proxy is None else f" through the proxy {proxy.place}"
            _raise_connect_failure(exc, timeout, f"{_place(origin[1], origin[2])}{via}")
            raise

    async def _connect(
        self, stream: _SocketStream, origin: _Origin, proxy: _Proxy | None, extensions: Mapping[str, Any]
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
            await _open_tunnel(stream, origin, proxy)
        if scheme == b"https":
            server_name = extensions.get("sni_hostname") or host.decode("ascii")
            await stream.start_tls(self._ssl_context(), server_name)
        return _Slot(origin, stream, None, origin)

    def _ssl_context(self) -> ssl.SSLContext:
        return _shared_ssl_context(self._verify, self._trust_env)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<SlotTransport {state}: {self.idle + self.in_use} of {self._gate.total} slots "
            f"({self.in_use} in use, {self.idle} idle), {self.waiting} waiting>"
        )


class ForeignTransport(httpx.AsyncBaseTransport):
    """Sends through a client that the user made, with our gate in front. Never closes that client.

    The request goes out as we built it: the client's cookies, default headers, auth and redirects stay out; its
    transport, proxies, certificates and event hooks apply. Any client of httpx's shape will do: one of another
    family (httpx2) gets a request of its own family, and its exceptions come through untranslated.

    The request extensions are those of `SlotTransport`, with one difference: nobody but that client knows when
    the first byte is written, so "on_bytes" is called before the client is. Called may mean unsent; not called
    never means sent.
    """

    def __init__(self, client: httpx.AsyncClient, gate: Gate) -> None:
        self._client = client
        self._gate = gate
        self._family = _family_of(client)

    @property
    def gate(self) -> Gate:
        """The gate in front of the client."""
        return self._gate

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request through the client; the response is httpx's, whatever the client's family."""
        extensions = request.extensions
        timeouts: _Timeouts = extensions.get("timeout") or {}
        lane = _lane_of(request)
        await _pass_gate(self._gate, lane, timeouts.get("pool"))
        try:
            for name in ("on_slot", "on_bytes"):
                if extensions.get(name) is not None:
                    extensions[name]()
            response = await self._client.send(self._adopt(request), stream=True, auth=None, follow_redirects=False)
        except BaseException:
            self._gate.release(lane)
            raise
        return httpx.Response(
            status_code=response.status_code,
            headers=response.headers.raw,
            stream=_ForeignBody(response, self._gate, lane),
            extensions=_plain_extensions(response),
        )

    def _adopt(self, request: httpx.Request) -> httpx.Request:
        if self._family is None:
            return request
        try:
            content: bytes | AsyncIterable[bytes] = request.content
        except httpx.RequestNotRead:
            content = cast("AsyncIterable[bytes]", request.stream)
        adopted = self._family.Request(
            request.method,
            str(request.url),
            headers=request.headers.raw,
            content=content,
            extensions=dict(request.extensions),
        )
        return cast(httpx.Request, adopted)

    async def aclose(self) -> None:
        """Does nothing: the client is the user's."""

    def __repr__(self) -> str:
        kind = type(self._client)
        return f"<ForeignTransport {kind.__module__}.{kind.__qualname__}, {self._gate!r}>"


def _plain_extensions(response: httpx.Response) -> dict[str, Any]:
    return {name: response.extensions[name] for name in _PLAIN_EXTENSIONS if name in response.extensions}


def _family_of(client: object) -> Any:
    """The package of httpx's shape that the client comes from; None if that is httpx itself, or unknown."""
    for base in type(client).__mro__:
        package = sys.modules.get(base.__module__.partition(".")[0])
        if package is not httpx and base.__name__ == "AsyncClient" and hasattr(package, "Request"):
            return package
    return None


class _ForeignBody(httpx.AsyncByteStream):
    """The body of a user's client's response; holds its place of the gate until it is closed."""

    def __init__(self, response: httpx.Response, gate: Gate, lane: Lane) -> None:
        self._response = response
        self._gate = gate
        self._lane: Lane = lane
        self._open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._response.aiter_raw():
                yield part
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        if not self._open:
            return
        self._open = False
        try:
            await self._response.aclose()
        finally:
            self._gate.release(self._lane)
