"""The emulator as an ASGI application: HTTP in, the emulated world in the middle, HTTP out.

Written by hand rather than on a framework: a status read is the hot path of every benchmark against the emulator.
"""

from __future__ import annotations

import asyncio

from .control import Control
from .faults import Fault
from .files import FileStore
from .http import Answer, ClientGone, ConnectionDropped, Receive, Request, Scope, Send, all_headers, read_request
from .world import World


class App:
    """The ASGI application."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._control = Control(world)

    @property
    def files(self) -> FileStore:
        """The uploaded files."""
        return self._world.files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            raise ConnectionDropped(f"the emulator doesn't speak {scope['type']}")
        try:
            request = await read_request(scope, receive)
        except ClientGone:
            return
        answer = self._world.api.too_large(scope["path"]) if request is None else await self._respond(request)
        headers = all_headers(answer, self._world.request_id())
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})

    async def _respond(self, request: Request) -> Answer:
        world = self._world
        if self._control.owns(request.path):
            return self._control.handle(request)
        if world.is_plain:  # the hot path
            return world.answer(request)
        at = world.clock()
        try:
            answer = await self._respond_with_faults(request, world.next_fault(request))
        except ConnectionDropped:
            world.note(at, request, None)
            raise
        world.note(at, request, answer.status)
        return answer

    async def _respond_with_faults(self, request: Request, fault: Fault | None) -> Answer:
        world = self._world
        proper = world.accept(request, fault) if request.submits or fault is None else None
        if fault is None:
            assert proper is not None
            return proper
        if fault.delay:
            await self._delay(fault.delay, None if proper is None else request.key)
        return world.spoil(request, fault, proper)

    async def _delay(self, seconds: float, key: str | None) -> None:
        """Let the answer be late; until then the idempotency key of what was accepted is in progress."""
        service = self._world.service
        if key is not None:
            service.hold_key(key, True)
        try:
            await asyncio.sleep(seconds)
        finally:
            if key is not None:
                service.hold_key(key, False)

    async def _live(self, receive: Receive, send: Send) -> None:
        """The lifespan protocol, for servers that want it."""
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await self._world.close()
        await send({"type": "lifespan.shutdown.complete"})
