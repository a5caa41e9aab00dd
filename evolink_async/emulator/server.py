"""The emulator on a real TCP port, with uvicorn in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from .app import App
from .http import ConnectionDropped, Receive, Scope, Script, Send

KEEP_ALIVE = 75  # seconds that an idle connection is kept, longer than clients do
_DATE_EVERY = 1.0  # seconds between renewals of the Date header


def protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol (the faster one when its library is installed), able to drop a connection."""
    base: Any
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as base
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as base

    class DroppingProtocol(base):  # type: ignore[misc]
        app: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._inner = self.app
            self.app = self._run

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if self.server_state.closing:  # it was in the listener's queue when the server stopped
                transport.abort()

        async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await self._inner(scope, receive, send)
            except ConnectionDropped as dropped:
                await self._perform(dropped.script)
            except asyncio.CancelledError:
                self._tell_gone()
                self.transport.close()

        def _tell_gone(self) -> None:
            # Told that the client is gone, uvicorn writes neither an answer nor a traceback.
            self.cycle.disconnected = True

        async def _perform(self, script: Script) -> None:
            self._tell_gone()
            with contextlib.suppress(asyncio.CancelledError):  # the server stops, and aborts the connection
                await self._write(script)

        async def _write(self, script: Script) -> None:
            for piece in script.pieces:
                if self.transport.is_closing():
                    return
                self.transport.write(piece)
                await self.flow.drain()
                await asyncio.sleep(script.pause)
            if script.end == "reset":
                linger = struct.pack("ii", 1, 0)
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.transport.abort()
            elif script.end == "close":
                self.transport.close()

    return DroppingProtocol


class _State(ServerState):
    """What uvicorn's server shares with its connections, and whether it is stopping."""

    closing = False


class LoopbackServer(uvicorn.Server):
    """A uvicorn server that leaves signals alone and stops at once, whoever is still connected."""

    def __init__(self, app: App, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            http=protocol(),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        super().__init__(config)
        self.server_state: _State = _State()
        self._listener = listener
        self._dating: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listen."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.on_tick(0)
        await self.startup(sockets=[self._listener])
        self._dating = asyncio.create_task(self._keep_date())

    async def close(self) -> None:
        """Stop listening, cut every connection, end every request that is still worked on."""
        self.server_state.closing = True
        await self._stop_accepting()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        running = [*self.server_state.tasks, *([] if self._dating is None else [self._dating])]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await _rounds(1)  # aborted transports close in the next one
        for server in self.servers:
            await server.wait_closed()

    async def _stop_accepting(self) -> None:
        # asyncio trips over a server that closes between accepting a socket and making its transport (3.11), so
        # accepting ends first, and what was accepted gets the rounds of the loop that it needs.
        with contextlib.suppress(NotImplementedError):  # the Windows loop has no readers
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
        await _rounds(3)

    async def _keep_date(self) -> None:
        while True:
            await asyncio.sleep(_DATE_EVERY)
            await self.on_tick(0)


async def _rounds(count: int) -> None:
    """Let the loop go round so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY; without, head and body of every answer lie 40 ms apart.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere the option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except BaseException as error:
        listener.close()
        if isinstance(error, TypeError):  # so `bind` calls a name that no host can have
            raise OSError(str(error)) from None
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds the socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
