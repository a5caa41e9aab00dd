"""Callbacks: the end of a task is told to the URL that its submission named.

Documented: a POST of the task's body once its billing is confirmed; 10 seconds to answer; any 2xx is success; else
three more attempts after 1, 2 and 4 seconds; no signature. The pauses are emulated seconds, divided by the speed; the
10 seconds are real ones, since the receiver's program is no faster than it is.

The emulator calls nobody outside: a callback goes only where the host's addresses are loopback or private.
"""

from __future__ import annotations

import asyncio
import heapq
import ipaddress
import json
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from .clock import Clock
from .faults import CALLBACK, Aim, Fault
from .service import Service
from .spoiling import patched
from .tasks import Task

if TYPE_CHECKING:
    import h11

PAUSES = (1.0, 2.0, 4.0)  # emulated seconds before the second, third and fourth attempt
TIMEOUT = 10.0  # real seconds
_SHORTEST_PAUSE = 0.001  # seconds; less may not move a clock that is virtual
_AT_ONCE = 64


@dataclass(order=True, slots=True)
class _Delivery:
    """One attempt to come."""

    at: float
    number: int
    task: Task = field(compare=False)
    tries: int = field(compare=False)  # attempts before this one
    fault: Fault | None = field(default=None, compare=False)


class Courier:
    """Sends the callbacks of a service. Its asyncio task lives only while there is something to send."""

    def __init__(
        self,
        service: Service,
        clock: Clock,
        next_fault: Callable[[Aim], Fault | None],
        on_attempt: Callable[[str, str], None],
    ) -> None:
        self._service = service
        self._clock = clock
        self._next_fault = next_fault
        self._on_attempt = on_attempt
        self._deliveries: list[_Delivery] = []
        self._numbered = 0
        self._working: asyncio.Task[None] | None = None
        self._changed: asyncio.Event | None = None

    def wake(self) -> None:
        """Look again at what is due: a task was accepted or ended, or the clock was changed."""
        if self._working is not None and not self._working.done():
            assert self._changed is not None
            self._changed.set()
        elif self._next_at() is not None:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # no loop runs: the next request wakes us
                return
            self._changed = asyncio.Event()
            self._working = loop.create_task(self._work(self._changed), name="emulator callbacks")

    def forget(self) -> None:
        """Send nothing more, and forget what was due."""
        self._deliveries.clear()
        if self._working is not None:
            self._working.cancel()

    async def close(self) -> None:
        """Stop sending. What was not delivered stays due."""
        if self._working is not None and not self._working.done():
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)
        self._working = None

    def _next_at(self) -> float | None:
        times = [at for at in (self._service.next_callback_at(),) if at is not None]
        times += [delivery.at for delivery in self._deliveries[:1]]
        return min(times, default=None)

    async def _work(self, changed: asyncio.Event) -> None:
        sending: set[asyncio.Task[None]] = set()
        try:
            while sending or self._next_at() is not None:
                changed.clear()
                self._collect()
                while self._deliveries and self._deliveries[0].at <= self._clock() and len(sending) < _AT_ONCE:
                    delivery = heapq.heappop(self._deliveries)
                    attempt = asyncio.create_task(self._attempt(delivery), name="emulator callback")
                    sending.add(attempt)
                    attempt.add_done_callback(sending.discard)
                    attempt.add_done_callback(lambda _: changed.set())
                await self._pause(changed, len(sending))
        finally:
            for attempt in sending:
                attempt.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    async def _pause(self, changed: asyncio.Event, sending: int) -> None:
        """Until something is due or has changed."""
        at = self._next_at()
        due_in = None
        if at is not None and not self._clock.standing and sending < _AT_ONCE:
            due_in = max(_SHORTEST_PAUSE, at - self._clock())
        if due_in is None and not sending and at is None:
            return
        try:
            async with asyncio.timeout(due_in):
                await changed.wait()
        except TimeoutError:
            pass

    def _collect(self) -> None:
        now = self._clock()
        for task in self._service.due_callbacks(now):
            self._schedule(task, now, 0)

    def _schedule(self, task: Task, at: float, tries: int) -> None:
        assert task.callback is not None
        path = urlsplit(task.callback.url).path or "/"
        fault = self._next_fault(Aim(CALLBACK, path, {}, (task.model.id,)))
        late = 0.0 if fault is None else fault.delay
        for _ in range(1 if fault is None else max(1, fault.repeat)):
            self._numbered += 1
            heapq.heappush(self._deliveries, _Delivery(at + late, self._numbered, task, tries, fault))

    async def _attempt(self, delivery: _Delivery) -> None:
        task, fault = delivery.task, delivery.fault
        callback = task.callback
        assert callback is not None
        now = self._clock()
        body = json.dumps(self._service.tell(task, now, callback.links_at), separators=(",", ":")).encode()
        if fault is not None and fault.patch:
            body = patched(body, fault.patch)
        dropped = fault is not None and fault.drop is not None
        result = "dropped" if dropped else await post(callback.url, body)
        self._on_attempt(task.id, result)
        if not result.startswith("2") and delivery.tries < len(PAUSES):
            self._schedule(task, self._clock() + PAUSES[delivery.tries] / self._service.speed, delivery.tries + 1)


async def post(url: str, body: bytes) -> str:
    """POST ``body`` to a receiver nearby: the HTTP status as text, or what went wrong. Never raises."""
    try:
        parts = urlsplit(url)
        async with asyncio.timeout(TIMEOUT):
            return await _post(parts, body)
    except TimeoutError:
        return f"no answer in {TIMEOUT:g} s"
    except (OSError, ValueError, EOFError) as exc:
        return f"{type(exc).__name__}: {exc}"


async def _post(parts: SplitResult, body: bytes) -> str:
    import h11

    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    address = await _nearby_address(host, port)
    if address is None:
        return "not sent: the emulator calls loopback and private addresses only"
    tls = ssl.create_default_context() if secure else None
    reader, writer = await asyncio.open_connection(address, port, ssl=tls, server_hostname=host if secure else None)
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [
            ("host", parts.netloc.rpartition("@")[2]),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("user-agent", "EvoLink-emulator"),
            ("connection", "close"),
        ]
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        request = h11.Request(method="POST", target=target, headers=headers)
        for event in (request, h11.Data(body), h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        await writer.drain()
        return await _status(connection, reader)
    except h11.ProtocolError as exc:
        return f"no HTTP: {exc}"
    finally:
        writer.transport.abort()  # nothing of ours is under way any more


async def _status(connection: h11.Connection, reader: asyncio.StreamReader) -> str:
    import h11

    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return str(event.status_code)
        if event is h11.NEED_DATA:
            data = await reader.read(65536)
            if not data:
                return "the connection was closed without an answer"
            connection.receive_data(data)


async def _nearby_address(host: str, port: int) -> str | None:
    """An address of the host, if all of them are loopback or private."""
    try:
        return host if _is_nearby(host) else None
    except ValueError:
        pass  # a name
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    nearby = all(_is_nearby(address) for address in addresses)
    return addresses[0] if addresses and nearby else None


def _is_nearby(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return ip.is_loopback or ip.is_private
