"""Sending through a client that the user made."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterator, Mapping
from typing import Any, Protocol, cast

import httpx

from evolink_async.errors import ConfigurationError
from evolink_async.http.gate import Gate, Lane
from evolink_async.http.transport import Call, lane_of, wait_at_gate

_PLAIN_EXTENSIONS = ("http_version", "reason_phrase")
_STEPS_TO_A_CONNECTION = 3


class ForeignTransport(httpx.AsyncBaseTransport):
    """Sends through a client that the user made, with our gate in front. Never closes that client.

    The request goes out as we built it: the client's cookies, default headers, auth and redirects stay out; its
    transport, proxies, certificates and event hooks apply. Any client of httpx's shape will do: one of another
    family (httpx2) gets a request of its own family, and its exceptions come through untranslated.

    The request extensions are those of `SlotTransport`, with two differences: nobody but that client knows when
    the first byte is written, so "on_bytes" is called before the client is. Called may mean unsent; not called
    never means sent. And "clear", see `Call`.
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
        """Send one request through the client; the response is httpx's, whatever the client's family.

        Raises `ConfigurationError` if its owner has closed it: nothing is sent any more.
        """
        extensions = request.extensions
        timeouts: Mapping[str, float | None] = extensions.get("timeout") or {}
        lane = lane_of(request)
        if not self._gate.try_acquire(lane):
            await wait_at_gate(self._gate, lane, timeouts.get("pool"))
        try:
            if (clear := extensions.get("clear")) is not None:
                while not await clear():  # when the connection will be ready nobody can know
                    pass
            if is_closed(self._client):
                raise ConfigurationError("nothing was sent: http_client was closed before this client was")
            for name in ("on_slot", "on_bytes"):
                if extensions.get(name) is not None:
                    extensions[name]()
            response = await self._client.send(self._adopt(request), stream=True, auth=None, follow_redirects=False)
        except BaseException:
            self._gate.release(lane)
            raise
        return httpx.Response(
            status_code=response.status_code,
            headers=_headers_of(response),
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


class HttpxTransport(Protocol):
    """Anything of the shape of httpx's transports."""

    def handle_async_request(self, request: httpx.Request) -> Awaitable[httpx.Response]: ...


class HttpxCaller:
    """Carries our calls over a transport of httpx's shape."""

    def __init__(self, transport: HttpxTransport) -> None:
        self._transport = transport

    async def call(self, call: Call) -> HttpxReply:
        """Send one request; what the transport raises comes through as it is.

        The seconds of the call bound the wait for the answer's head, and then each read.
        """
        loop = asyncio.get_running_loop()
        whole = asyncio.timeout(None)
        # Of other clients we cannot know how well they bear to be cut: they may time out by themselves.
        timeouts = {
            "connect": call.connect_timeout,
            "read": call.read_timeout or call.seconds,
            "write": call.write_timeout or call.seconds,
            "pool": call.pool_timeout,  # at our gate
        }

        def begin() -> None:
            if call.seconds is not None:
                whole.reschedule(loop.time() + call.seconds)
                # Only the client itself can say that nothing was sent, so it must give up before it is cut: it has a
                # third of the time each to find a connection in its pool, to connect and to agree on TLS.
                timeouts["pool"] = third = call.seconds / _STEPS_TO_A_CONNECTION
                timeouts["connect"] = third if call.connect_timeout is None else min(call.connect_timeout, third)
            if call.on_slot is not None:
                call.on_slot()

        scheme = call.origin[0].decode("ascii")
        lines = (line.partition(b": ") for line in call.lines.split(b"\r\n") if line)
        request = httpx.Request(
            call.method.decode("ascii"),
            f"{scheme}://{call.netloc.decode('ascii')}{call.target.decode('ascii')}",
            headers=[(name, value) for name, _, value in lines],
            content=call.body or None,
            extensions={
                "timeout": timeouts,
                "lane": call.lane,
                "clear": call.clear,
                "on_slot": begin,
                "on_bytes": call.on_bytes,
            },
        )
        with _expiry(whole, call.seconds):
            async with whole:
                response = await self._transport.handle_async_request(request)
        return HttpxReply(response, whole.when(), call.seconds)


@contextlib.contextmanager
def _expiry(limit: asyncio.Timeout, seconds: float | None) -> Iterator[None]:
    """Our limit is told from timeouts of the transport's own."""
    try:
        yield
    except TimeoutError as error:
        if limit.expired():
            raise httpx.ReadTimeout(f"took longer than {seconds:g} s") from error
        raise


class HttpxReply:
    """An httpx response as we read answers."""

    def __init__(self, response: httpx.Response, deadline: float | None, seconds: float | None) -> None:
        self._response = response
        self._deadline = deadline
        self._seconds = seconds
        self._parts = aiter(cast("AsyncIterable[bytes]", response.stream))
        self.status = response.status_code
        self.headers = list(response.headers.raw)

    async def read(self) -> bytes:
        """The next bytes of the body; none at its end."""
        limit = asyncio.timeout_at(self._deadline)
        with _expiry(limit, self._seconds):
            async with limit:
                async for part in self._parts:
                    if part:
                        return part
        return b""

    async def aclose(self) -> None:
        """Let go of the response."""
        try:
            close = getattr(self._parts, "aclose", None)
            if close is not None:
                await close()
        finally:
            await self._response.aclose()


def _headers_of(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """The headers that fit the body we get: one that was read already (by an event hook, or made with its content, as
    by `httpx.MockTransport`) comes decoded."""
    decoded = response.is_stream_consumed
    return [pair for pair in response.headers.raw if not (decoded and pair[0].lower() == b"content-encoding")]


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
            if self._response.is_stream_consumed:
                yield self._response.content
                return
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
