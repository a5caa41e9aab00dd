"""A TCP or TLS connection over an asyncio protocol. Its failures are httpx's exceptions.

It can be cut synchronously at any moment, which is what makes cancellation safe: no clean-up ever has to wait.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import itertools
import os
import select
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import httpx

from evolink_async.clock import Moment
from evolink_async.errors import ConfigurationError
from evolink_async.http.failures import describe
from evolink_async.own_tasks import own_task

_HAPPY_EYEBALLS_DELAY = 0.25
"""Seconds before the next address is tried as well (RFC 8305)."""

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # the first one that is set counts

_HIGH_WATER = 256 * 1024
"""Bytes received and not yet read at which the peer is made to wait."""


def shared_ssl_context(verify: ssl.SSLContext | bool, trust_env: bool) -> ssl.SSLContext:
    """The context for `verify`, one per process and setting: building one costs 20-40 ms.

    Raises `ConfigurationError` if the environment names certificates that cannot be read: they won't be there later.
    """
    if isinstance(verify, ssl.SSLContext):
        context = verify
    else:
        files = tuple(os.environ.get(name) for name in _CERTIFICATES) if trust_env else ()
        context = _build_ssl_context(verify, trust_env, files)
    # Whatever the context offered before: we speak nothing but HTTP/1.1.
    context.set_alpn_protocols(["http/1.1"])
    return context


@functools.lru_cache(maxsize=8)
def _build_ssl_context(verify: bool, trust_env: bool, files: tuple[str | None, ...]) -> ssl.SSLContext:
    try:
        return httpx.create_ssl_context(verify=verify, trust_env=trust_env)
    except (ssl.SSLError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        named = next((f"{name}={file}" for name, file in zip(_CERTIFICATES, files, strict=False) if file), "certifi")
        raise ConfigurationError(f"no certificates to check https with can be read from {named}: {error}") from None


_Address = tuple[int, Any]  # family and socket address


async def _addresses(loop: asyncio.AbstractEventLoop, host: str, port: int) -> list[_Address]:
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return _interleaved(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP))
    return [(socket.AF_INET if number.version == 4 else socket.AF_INET6, (host, port))]  # no need to ask anybody


def _interleaved(found: Sequence[tuple[Any, ...]]) -> list[_Address]:
    """The addresses of a host, the resolver's favourite first, families in turn (RFC 8305)."""
    by_family: dict[int, list[_Address]] = {}
    for family, _, _, _, address in found:
        by_family.setdefault(family, []).append((family, address))
    rounds = itertools.zip_longest(*by_family.values())
    return [address for turn in rounds for address in turn if address is not None]


async def _connect_first(loop: asyncio.AbstractEventLoop, addresses: list[_Address]) -> socket.socket:
    """A connected socket: each further address is tried as soon as the one before failed or took its time.

    asyncio's own happy eyeballs lose a socket when they are cancelled (3.11), and uvloop has none.
    """
    attempts: set[asyncio.Task[socket.socket]] = set()
    trouble: OSError | None = None
    winner: socket.socket | None = None
    try:
        for position, address in enumerate(addresses):
            attempts.add(own_task(loop, _connect_one(loop, address), "evolink connect"))
            last = position == len(addresses) - 1
            while attempts and winner is None:
                patience = None if last else _HAPPY_EYEBALLS_DELAY
                done, _ = await asyncio.wait(attempts, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    attempts.discard(attempt)
                    failure = attempt.exception()
                    if failure is None and winner is None:
                        winner = attempt.result()
                    elif failure is None:
                        attempt.result().close()
                    elif not isinstance(failure, OSError):
                        raise failure
                    else:
                        trouble = trouble or failure
                if not last:
                    break
            if winner is not None:
                return winner
        raise trouble or OSError("the host has no address")
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_late)


async def _connect_one(loop: asyncio.AbstractEventLoop, address: _Address) -> socket.socket:
    connecting = socket.socket(address[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        connecting.setblocking(False)
        await loop.sock_connect(connecting, address[1])
    except BaseException:
        connecting.close()
        raise
    return connecting


def _close_late(attempt: asyncio.Task[socket.socket]) -> None:
    """An attempt that won a race nobody runs any more."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


class SocketStream(asyncio.Protocol):
    """A connection on an asyncio transport.

    asyncio reads all the time, so a connection that the server closes while idle is noticed without a request.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received: list[bytes] = []
        self._size = 0
        self._ended = False  # no more bytes will come
        self._failure: Exception | None = None
        self._aborted = False
        self._reading_paused = False
        self._reader: asyncio.Future[None] | None = None
        self.is_full = False  # the peer takes no more for now
        self._writer: asyncio.Future[None] | None = None

    def moment(self) -> Moment:
        """This moment, on its event loop."""
        return Moment.of(self._loop)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._aborted:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        self._size += len(data)
        if self._size > _HIGH_WATER and self._transport is not None:
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
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        self._wake(self._writer)

    # What HTTP needs.

    async def read(self, timeout: float | None = None) -> bytes:
        """What has come, at least one byte; nothing once the peer has ended the connection."""
        if not self._received and not self._ended:
            self._reader = self._loop.create_future()
            if timeout is None:
                await self._reader
            else:
                await self._wait(self._reader, timeout, httpx.ReadTimeout, "no bytes came")
        if not self._received and self._failure is not None:
            if isinstance(self._failure, httpx.ReadTimeout):
                raise self._failure
            raise httpx.ReadError(describe(self._failure)) from self._failure
        return self._take()

    def write(self, data: bytes) -> None:
        """Write, without waiting for the peer to take it; see `drain`."""
        if self._transport is None or self._ended:
            raise httpx.WriteError(describe(self._failure))
        self._transport.write(data)

    async def drain(self, timeout: float | None = None) -> None:
        """Wait while the peer takes no more."""
        while self.is_full and not self._ended:
            self._writer = self._loop.create_future()
            await self._wait(self._writer, timeout, httpx.WriteTimeout, "the peer took no bytes")

    # What the slot calls.

    async def start_tls(self, ssl_context: ssl.SSLContext, server_hostname: str) -> None:
        # asyncio would wait for the handshake of a connection that is gone already.
        if self._transport is None or self._ended or self._received:
            raise httpx.ConnectError(describe(self._failure))
        secured = await self._loop.start_tls(self._transport, self, ssl_context, server_hostname=server_hostname)
        if secured is None:  # asyncio's answer if the connection was cut without an error
            raise httpx.ConnectError(describe(self._failure))
        self._transport = secured

    def get_extra_info(self, info: str) -> Any:
        """What asyncio knows of the connection, also under httpx's names "client_addr" and "server_addr"."""
        names = {"client_addr": "sockname", "server_addr": "peername"}
        return None if self._transport is None else self._transport.get_extra_info(names.get(info, info))

    def is_readable(self) -> bool:
        """Whether something came, if only the end, as far as this machine knows."""
        if self._ended or self._received or self._transport is None:
            return True
        # What arrived since the loop last looked.
        return _is_socket_readable(self._transport.get_extra_info("socket").fileno())

    async def connect(self, host: str, port: int, vet: Callable[[str], object] | None = None) -> None:
        """Open the TCP connection, to whichever of the host's addresses answers first.

        vet: is shown every address before any is connected to, and raises for one that must not be.
        """
        addresses = await _addresses(self._loop, host, port)
        if vet is not None:
            for _, address in addresses:
                vet(str(address[0]))
        connected = await _connect_first(self._loop, addresses)
        try:
            await self._loop.create_connection(lambda: self, sock=connected)
        except BaseException:
            connected.close()
            raise

    def begin_exchange(self, on_bytes: Callable[[], object] | None) -> None:
        """Right before a request's first byte, with nothing awaited between: the last chance to find that it can't go.

        The callback is called if it can.
        """
        # A server that closed the idle connection, or wrote into it ("408 Request Timeout" is common), did not
        # mean this request. Raised as a failure to connect, because nothing of it was sent.
        if self._ended or self._received:
            raise httpx.ConnectError("the server closed the connection before the request was written")
        if on_bytes is not None:
            on_bytes()

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

    def expire(self, seconds: float) -> None:
        """Cut the connection because the exchange has had all its time: whoever reads gets `httpx.ReadTimeout`."""
        self._failure = self._failure or httpx.ReadTimeout(f"took longer than {seconds:g} s")
        self.abort()

    # Inside.

    def _take(self) -> bytes:
        data = b"".join(self._received)
        self._received.clear()
        self._size = 0
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(
        self,
        waiter: asyncio.Future[None],
        timeout: float | None,
        error: type[httpx.TimeoutException],
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


def _expire(waiter: asyncio.Future[None], error: type[httpx.TimeoutException], message: str) -> None:
    if not waiter.done():
        waiter.set_exception(error(message))


def _is_socket_readable(descriptor: int) -> bool:
    if descriptor < 0:
        return True
    if sys.platform == "win32":
        return bool(select.select([descriptor], [], [], 0)[0])
    # Not select(): it cannot look at descriptors above 1023.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
