"""A TCP proxy between a client and a server that does to their connections what networks do.

    client <-> `_End` . `_Pipe` upstream, `_Pipe` downstream . `_End` <-> server

What happens when is decided in `flow`; here it is carried out, by callbacks and one timer per pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

from .flow import Act, Flow, Step
from .toxics import Toxic

logger = logging.getLogger("evolink_async.testing")

_HOST = "127.0.0.1"
_MOST_WAITING = 1_000_000  # bytes per direction; beyond them the sender has to wait
_RESET_ON_CLOSE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # SO_LINGER for no time
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class ProxyStats:
    """What a proxy has seen so far.

    ``accepted``: connections; ``open``: those that still are. ``upstream_bytes``, ``downstream_bytes``: what got
    through to the server and to the client.
    """

    accepted: int
    open: int
    upstream_bytes: int
    downstream_bytes: int


class FaultProxy:
    """A TCP port on this machine that leads to ``upstream``, and the toxics that befall what passes.

        async with FaultProxy(server.base_url) as proxy:
            proxy.add(Latency(latency=300, jitter=100))
            async with AsyncEvoLink(base_url=proxy.base_url) as client:
                ...

    Without toxics it is transparent: bytes, half-closes and resets get through as they come, and a receiver that is
    slow slows the sender. Toxics come and go at any time and befall open connections too. ``enabled`` False is
    toxiproxy's ``down``: connecting is refused.

    - ``upstream``: where the server is, as a URL or as ``"host:port"``.
    - ``port``: where to listen; 0 takes a free one, which it keeps.
    - ``seed``: decides whom a toxicity below 1 befalls, and jitter and variation, by the number of the connection.

    It runs in the caller's loop and on its clock, with no task of its own but one for each connection that is just
    being made. On leaving everything is cut and closed. Since 0.1.0.
    """

    def __init__(self, upstream: str, *, port: int = 0, seed: int = 0) -> None:
        if not 0 <= port < 65_536:
            raise ValueError(f"port must be between 0 and 65535, not {port!r}")
        self._scheme, self._upstream = _place_of(upstream)
        self._port = port
        self._seed = seed
        self._toxics: dict[str, Toxic] = {}
        self._connections: set[_Connection] = set()
        self._accepted = 0
        self._passed = {"upstream": 0, "downstream": 0}
        self._server: asyncio.Server | None = None
        self._switching = asyncio.Lock()

    # Where it is and what it saw

    @property
    def address(self) -> tuple[str, int]:
        """Host and port. Raises `RuntimeError` before it listens for the first time, unless a port was given."""
        if not self._port:
            raise RuntimeError("the proxy has no port yet: enter it with 'async with'")
        return _HOST, self._port

    @property
    def base_url(self) -> str:
        """Where to point the client: upstream's scheme at this address. Raises as `address`."""
        host, port = self.address
        return f"{self._scheme}://{host}:{port}"

    @property
    def stats(self) -> ProxyStats:
        """What it has seen so far."""
        return ProxyStats(self._accepted, len(self._connections), self._passed["upstream"], self._passed["downstream"])

    def __repr__(self) -> str:
        host, port = self._upstream
        state = "enabled" if self.enabled else "disabled"
        toxics = ", ".join(self._toxics) or "no toxics"
        return f"<FaultProxy {_HOST}:{self._port} -> {host}:{port} {state}, {toxics}, seed {self._seed}>"

    # Toxics

    @property
    def toxics(self) -> tuple[Toxic, ...]:
        """The toxics in force, in the order in which they were added."""
        return tuple(self._toxics.values())

    def add(self, toxic: Toxic | Mapping[str, Any]) -> Toxic:
        """Put a toxic in force, for open connections too: the toxic, with its name. A mapping is toxiproxy's JSON.

        Several toxics of one stream work one after the other. Raises `ValueError` for one that cannot be, and if there
        is one of that name.
        """
        toxic = toxic if isinstance(toxic, Toxic) else Toxic.from_dict(toxic)
        if toxic.name in self._toxics:
            raise ValueError(f"there is a toxic named {toxic.name!r} already: remove it, or give this one another name")
        self._toxics[toxic.name] = toxic
        for connection in list(self._connections):
            connection.add(toxic)
        return toxic

    def remove(self, toxic: Toxic | str) -> None:
        """Take a toxic, or the one of that name, out of force. Raises `ValueError` if there is none.

        What it held back gets through at once. Connections that lost data to it are closed.
        """
        name = toxic if isinstance(toxic, str) else toxic.name
        removed = self._toxics.pop(name, None)
        if removed is None:
            raise ValueError(f"there is no toxic named {name!r}; there is {', '.join(self._toxics) or 'none'}")
        for connection in list(self._connections):
            connection.remove(removed)

    async def reset(self) -> None:
        """Take all toxics out of force, and enable the proxy."""
        for toxic in self.toxics:
            self.remove(toxic)
        await self.enable()

    # Up and down

    @property
    def enabled(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    async def enable(self) -> None:
        """Listen, on the same port as before. Raises `OSError` if somebody else has it. Repeatable."""
        async with self._switching:
            if self._server is not None:
                return
            loop = asyncio.get_running_loop()
            server = await loop.create_server(self._accept, _HOST, self._port, backlog=2048, start_serving=False)
            try:
                await server.start_serving()
            except BaseException:
                server.close()
                raise
            self._port = server.sockets[0].getsockname()[1]
            self._server = server

    async def disable(self) -> None:
        """Cut every connection and stop listening; from then on connecting is refused. Repeatable.

        Cancelled, it does so all the same, but doesn't wait until every socket is closed.
        """
        async with self._switching:
            server, self._server = self._server, None
            if server is None:
                return
            try:
                await _stop_accepting(server)
            finally:
                server.close()
                gone = [connection.gone for connection in self._connections]
                for connection in list(self._connections):
                    connection.cut()
            if gone:
                await asyncio.wait(gone)
            await server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.enable()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.disable()

    # Inside

    def _accept(self) -> asyncio.Protocol:
        return _Connection(self._upstream, self._register, self._passed).client

    def _register(self, connection: _Connection) -> None:
        self._accepted += 1
        self._connections.add(connection)
        connection.gone.add_done_callback(lambda _: self._connections.discard(connection))
        connection.seed = f"{self._seed} {self._accepted}"
        for toxic in self._toxics.values():
            connection.add(toxic)


class _Connection:
    """A client's connection, and the one to the server that belongs to it."""

    def __init__(
        self, upstream: tuple[str, int], register: Callable[[_Connection], None], passed: dict[str, int]
    ) -> None:
        self.seed = ""
        self._upstream = upstream
        self._register = register
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()  # done when both sockets are closed
        self.client, self.server = _End(self), _End(self)
        self._pipes = {
            "upstream": _Pipe(self, "upstream", self.client, self.server, passed),
            "downstream": _Pipe(self, "downstream", self.server, self.client, passed),
        }
        self.client.sends = self.server.receives = self._pipes["upstream"]
        self.server.sends = self.client.receives = self._pipes["downstream"]
        self._connecting: asyncio.Task[Any] | None = None
        self._ending = False

    def add(self, toxic: Toxic) -> None:
        pipe = self._pipes[toxic.stream]
        pipe.flow.add(toxic, self._loop.time(), Random(f"{self.seed} {toxic.name}"))
        pipe.pump()

    def remove(self, toxic: Toxic) -> None:
        pipe = self._pipes[toxic.stream]
        if pipe.flow.remove(toxic.name):
            self.close()
        pipe.pump()

    # How it begins

    def made(self, end: _End) -> None:
        if end is self.client:
            self._register(self)
            connect = self._loop.create_connection(lambda: self.server, *self._upstream)
            self._connecting = self._loop.create_task(connect, name="evolink proxy connect")
            self._connecting.add_done_callback(self._connected)
        else:
            for pipe in self._pipes.values():
                pipe.pump()

    def _connected(self, connecting: asyncio.Task[Any]) -> None:
        error = None if connecting.cancelled() else connecting.exception()
        if error is not None:
            logger.info("%s:%d could not be reached: %s", *self._upstream, error)
            self.close()
        self._check_gone()

    # How it ends

    def half_closed(self) -> None:
        """One direction has ended in order."""
        if all(pipe.flow.finished for pipe in self._pipes.values()):
            self.close()

    def lost(self, end: _End) -> None:
        """A socket is closed: by us, or because its peer reset it. Then the other peer learns of it in its turn."""
        if not self._ending:
            end.receives.stop()
            if end.sends.flow.finished:
                self.reset()
            else:
                end.sends.ended(Act.RESET)
        self._check_gone()

    def close(self) -> None:
        """End both sides in order, as soon as they have what got through."""
        self._end()
        for end in self._open_ends():
            end.transport.close()

    def reset(self) -> None:
        """Send both sides a TCP reset."""
        for end in self._open_ends():
            with contextlib.suppress(OSError):  # its peer was quicker
                end.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.cut()

    def cut(self) -> None:
        """Close both sockets at once, whatever is still to be written."""
        self._end()
        for end in self._open_ends():
            end.transport.abort()

    def _end(self) -> None:
        self._ending = True
        for pipe in self._pipes.values():
            pipe.stop()
        if self._connecting is not None:
            self._connecting.cancel()

    def _open_ends(self) -> list[_End]:
        return [end for end in (self.client, self.server) if end.is_open]

    def _check_gone(self) -> None:
        connecting = self._connecting is not None and not self._connecting.done()
        if not connecting and not self._open_ends() and not self.gone.done():
            self.gone.set_result(None)


class _End(asyncio.Protocol):
    """The proxy's socket to the client, or to the server."""

    transport: asyncio.Transport
    sends: _Pipe  # carries what its peer sends
    receives: _Pipe  # carries what its peer is to receive

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.is_open = True
        self._connection.made(self)

    def data_received(self, data: bytes) -> None:
        self.sends.came(data)

    def eof_received(self) -> bool:
        self.sends.ended(Act.FINISH)
        return True  # the other direction goes on

    def pause_writing(self) -> None:
        self.receives.block()

    def resume_writing(self) -> None:
        self.receives.unblock()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._connection.lost(self)


class _Pipe:
    """One direction of a connection: from the source's socket through its flow into the destination's."""

    def __init__(
        self, connection: _Connection, stream: str, source: _End, destination: _End, passed: dict[str, int]
    ) -> None:
        self.flow = Flow()
        self._connection = connection
        self._stream = stream
        self._source = source
        self._destination = destination
        self._passed = passed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._blocked = False  # the destination takes nothing now
        self._holding = False  # the source is not read from now
        self._stopped = False

    def came(self, data: bytes) -> None:
        self.flow.came(data, self._loop.time())
        self.pump()

    def ended(self, act: Act) -> None:
        self.flow.ended(act, self._loop.time())
        self.pump()

    def block(self) -> None:
        self._blocked = True

    def unblock(self) -> None:
        self._blocked = False
        self.pump()

    def stop(self) -> None:
        """Nothing gets through any more."""
        self._stopped = True
        self._cancel_timer()

    def pump(self) -> None:
        """Do what is due, and see to it that the rest will be done when it is. May be called at any time."""
        self._cancel_timer()
        if self._destination.is_open and not self._stopped:
            step, now = self.flow.next(blocked=self._blocked), self._loop.time()
            if step is not None and step.at > now:
                self._timer = self._loop.call_at(step.at, self.pump)
            elif step is not None:
                # One at a time, so that others have their turn and small pieces stay apart.
                self._timer = self._loop.call_soon(self.pump)
                self._do(step, now)
        self._hold_source()

    def _do(self, step: Step, now: float) -> None:
        transport = self._destination.transport
        match step.act:
            case Act.PASS:
                self._passed[self._stream] += step.size
                transport.write(self.flow.take(step, now))
            case Act.FINISH:
                self.flow.finish()
                with contextlib.suppress(OSError):  # its peer is gone: we hear of it soon
                    transport.write_eof()
                self._connection.half_closed()
            case Act.CLOSE:
                self._connection.close()
            case Act.RESET:
                self._connection.reset()

    def _hold_source(self) -> None:
        """Don't read from a source faster than the destination takes it."""
        if not self._source.is_open:
            return
        if not self._holding and self.flow.waiting > _MOST_WAITING:
            self._holding = True
            self._source.transport.pause_reading()
        elif self._holding and self.flow.waiting <= _MOST_WAITING // 2:
            self._holding = False
            self._source.transport.resume_reading()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _stop_accepting(server: asyncio.Server) -> None:
    # asyncio trips over a server that closes between accepting a socket and making its transport (3.11), so
    # accepting ends first, and what was accepted gets the rounds of the loop that it needs.
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        with contextlib.suppress(NotImplementedError):  # the Windows loop has no readers
            loop.remove_reader(listener.fileno())
    for _ in range(3):
        await asyncio.sleep(0)


def _place_of(upstream: str) -> tuple[str, tuple[str, int]]:
    """Scheme, and host with port, of a URL or of ``host:port``."""
    try:
        parts = urlsplit(upstream if "://" in upstream else f"//{upstream}")
        scheme = parts.scheme or "http"
        host, port = parts.hostname, parts.port or (_PORTS[scheme] if parts.scheme else None)
    except (TypeError, ValueError, KeyError):
        host = port = None
    if not host or not port:
        raise ValueError(f"upstream must be an http(s) URL or 'host:port', not {upstream!r}")
    return scheme, (host, port)
