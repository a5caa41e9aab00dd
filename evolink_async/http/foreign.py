"""Sending through a client that the user made."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import httpx

from evolink_async.errors import ConfigurationError
from evolink_async.http.gate import Gate, Lane
from evolink_async.http.transport import Call, wait_at_gate
from evolink_async.http.wire import Pairs

_T = TypeVar("_T")

_STEPS_TO_A_CONNECTION = 3
_KEPT_URLS = 16  # those that are posted to come again and again


class ForeignTransport:
    """Carries calls over a client that the user made, with our gate in front. Never closes that client.

    The request goes out as we built it: the client's cookies, default headers, auth and redirects stay out; its
    transport, proxies, certificates and event hooks apply. Any client of httpx's shape will do: one of another
    family (httpx2) gets a request of its own family, and its exceptions come through untranslated.

    A `Call` means what it does to `SlotTransport`, with these differences: nobody but that client knows when the first
    byte is written, so `on_bytes` is called before the client is. Called may mean unsent; not called never means sent.
    `clear` is awaited until it says True, whatever the connection does meanwhile. No `vet`, no `server_name`.
    """

    def __init__(self, client: httpx.AsyncClient, gate: Gate) -> None:
        self._client = client
        self._gate = gate
        self._family = _family_of(client)
        self._url = functools.lru_cache(_KEPT_URLS)(self._family.URL)

    @property
    def gate(self) -> Gate:
        """The gate in front of the client."""
        return self._gate

    async def call(self, call: Call) -> ForeignReply:
        """Send one request; returns when the answer's headers are here. What the client raises comes through as it is.

        Raises `ConfigurationError` if its owner has closed it: nothing is sent any more.
        """
        if not self._gate.try_acquire(call.lane):
            await wait_at_gate(self._gate, call.lane, call.pool_timeout)
        reply = ForeignReply(self._gate, call.lane)
        try:
            if call.on_slot is not None:
                call.on_slot()
            if call.clear is not None:
                while not await call.clear():  # when the connection will be ready nobody can know
                    pass
            if is_closed(self._client):
                raise ConfigurationError("nothing was sent: http_client was closed before this client was")
            request = self._request(call)
            reply.begin(call.seconds)
            if call.on_bytes is not None:
                call.on_bytes()
            sending = self._client.send(request, stream=True, auth=None, follow_redirects=False)
            reply.take(await reply.in_time(sending))
        except BaseException:
            reply.release()
            raise
        return reply

    def _request(self, call: Call) -> Any:
        """The call as a request of the client's family."""
        scheme = call.origin[0].decode("ascii")
        lines = (line.partition(b": ") for line in call.lines.split(b"\r\n") if line)
        return self._family.Request(
            call.method.decode("ascii"),
            self._url(f"{scheme}://{call.netloc.decode('ascii')}{call.target.decode('ascii')}"),
            headers=[(name, value) for name, _, value in lines],
            content=call.body or None,
            extensions={"timeout": _timeouts(call)},
        )

    async def aclose(self) -> None:
        """Does nothing: the client is the user's."""

    def __repr__(self) -> str:
        kind = type(self._client)
        return f"<ForeignTransport {kind.__module__}.{kind.__qualname__}, {self._gate!r}>"


class ForeignReply:
    """An answer of a user's client, its body still to be read. It holds its place of the gate until it is closed.

    headers: names and values as they came, but for the encoding of a body that the client has decoded.
    """

    __slots__ = ("_deadline", "_gate", "_lane", "_parts", "_response", "_seconds", "_whole", "headers", "status")

    status: int
    headers: Pairs
    _response: Any
    _whole: bytes
    _parts: AsyncGenerator[bytes, None] | None

    def __init__(self, gate: Gate, lane: Lane) -> None:
        self._gate: Gate | None = gate
        self._lane: Lane = lane
        self._seconds: float | None = None
        self._deadline: float | None = None

    def begin(self, seconds: float | None) -> None:
        """From here on the whole exchange may take so long."""
        self._seconds = seconds
        self._deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds

    def take(self, response: Any) -> None:
        """The client's response, whose headers are here."""
        self._response = response
        self.status = response.status_code
        self.headers = response.headers.raw
        if response.is_stream_consumed:  # by an event hook, or made with its content, as by `httpx.MockTransport`
            self._parts, self._whole = None, response.content
            self.headers = [pair for pair in self.headers if pair[0].lower() != b"content-encoding"]
        else:
            self._parts, self._whole = response.aiter_raw(), b""

    async def in_time(self, step: Awaitable[_T]) -> _T:
        """What a step of the exchange gives. Raises `httpx.ReadTimeout` when the exchange's time is over."""
        limit = asyncio.timeout_at(self._deadline)
        try:
            async with limit:
                return await step
        except TimeoutError as error:
            if limit.expired():  # else it is the client's own
                raise httpx.ReadTimeout(f"took longer than {self._seconds:g} s") from error
            raise

    async def read(self) -> bytes:
        """The next bytes of the body; none at its end."""
        while self._parts is not None:
            part = await self.in_time(anext(self._parts, None))
            if part is None:
                break
            if part:
                return part
        whole, self._whole = self._whole, b""
        return whole

    async def aclose(self) -> None:
        """Let go of the response, and give the place back. Can be repeated."""
        try:
            if self._parts is not None:
                await self._parts.aclose()
        finally:
            try:
                await self._response.aclose()
            finally:
                self.release()

    def release(self) -> None:
        """Give the place back. Can be repeated."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.release(self._lane)


def gate_for(client: httpx.AsyncClient, max_connections: int) -> Gate:
    """A gate that lets no more through than the client has connections, if it has httpx's own pool of them.

    Nothing should queue in there: what we cut while it waits takes a place of that pool with it for good
    (https://github.com/encode/httpcore/issues/1093), and whether it was sent nobody could say. With HTTP/2 one
    connection has room for all.
    """
    pool = getattr(getattr(client, "_transport", None), "_pool", None)
    limit = getattr(pool, "_max_connections", None)
    if isinstance(limit, int) and not getattr(pool, "_http2", False):
        max_connections = max(1, min(max_connections, limit))
    return Gate(max_connections)


def is_closed(client: httpx.AsyncClient) -> bool:
    """Whether a client of httpx's shape says that it is closed."""
    return getattr(client, "is_closed", False) is True


def _timeouts(call: Call) -> dict[str, float | None]:
    """What the client may take for each of its steps.

    Only the client itself can say that nothing was sent, so it must give up before it is cut: it has a third of the
    time each to find a connection in its pool, to connect and to agree on TLS. And of other clients we cannot know how
    well they bear to be cut, so they may time out by themselves.
    """
    seconds = call.seconds
    pool, connect = call.pool_timeout, call.connect_timeout
    if seconds is not None:
        pool = seconds / _STEPS_TO_A_CONNECTION
        connect = pool if connect is None else min(connect, pool)
    read, write = call.read_timeout or seconds, call.write_timeout or seconds
    return {"connect": connect, "read": read, "write": write, "pool": pool}


def _family_of(client: object) -> Any:
    """The package of httpx's shape that the client comes from: httpx itself if it is no other."""
    for base in type(client).__mro__:
        package = sys.modules.get(base.__module__.partition(".")[0])
        if package is not httpx and base.__name__ == "AsyncClient" and hasattr(package, "Request"):
            return package
    return httpx
