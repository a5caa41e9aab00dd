"""One call: one request out, one whole answer in, or a clear word on whether anything was sent."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import platform
import re
import zlib
from collections.abc import AsyncIterable, Awaitable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import httpx

from evolink_async._version import __version__
from evolink_async.errors import ConfigurationError
from evolink_async.http.answers import Answer, excerpt
from evolink_async.http.foreign import ForeignTransport

logger = logging.getLogger("evolink_async.http")

Lane = Literal["submit", "read"]

TASK_CAP = 8 * 1024 * 1024  # decoded bytes of an answer that we need
ERROR_CAP = 64 * 1024  # decoded bytes of an answer that only says what went wrong
CONNECT_TIMEOUT = 10.0

USER_AGENT = f"evolink-async/{__version__} (python {platform.python_version()})"

# By httpx's own documentation these are raised before the request's first byte is written. Known by name, since a
# user's client may come from another package of httpx's shape.
_UNSENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"})

_SHORTEST_SECRET = 8  # a shorter key is a toy, and would be found in every other word


class NotSent(Exception):
    """No byte of the request was written."""


class AnswerLost(Exception):
    """The request, or a part of it, was written, and no whole answer came back."""


class Transport(Protocol):
    """What a call needs below it: `SlotTransport`, or a user's client behind `ForeignTransport`."""

    def handle_async_request(self, request: httpx.Request) -> Awaitable[httpx.Response]: ...


@dataclass(slots=True)
class Flight:
    """What is known of a call while it is under way."""

    connecting: bool = False  # a connection is waited for, or there is one
    sent: bool = False  # the first byte is about to be written: from here on it may have been received
    sent_at: float | None = None  # loop time of that


# A name or an address.
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9._-]+)?", re.ASCII)


def checked_base_url(url: str, name: str) -> str:
    """The root of a service without `/v1` and a trailing slash.

    Raises `ConfigurationError` unless it is https, or http on a loopback host: the key must not travel in the clear.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise ConfigurationError(f"{name} is no URL: {url!r}") from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ConfigurationError(f"{name} must have no user, query or fragment")
    if not _HOST.fullmatch(parsed.raw_host.decode("ascii", "replace")) or not 0 < (parsed.port or 443) < 65_536:
        raise ConfigurationError(f"{name} has no usable host and port: {url!r}")
    if parsed.scheme not in ("https", "http"):
        raise ConfigurationError(f"{name} must begin with https://, got {url!r}")
    if parsed.scheme == "http" and not _is_loopback(parsed.host):
        raise ConfigurationError(
            f"{name} must be https (plain http is for loopback hosts only), got {url!r}: the API key would be readable"
        )
    root = str(parsed.copy_with(query=None, fragment=None))
    return root.rstrip("/").removesuffix("/v1").rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Exchange:
    """Makes single calls to one host over a transport."""

    def __init__(self, transport: Transport, base_url: str) -> None:
        self._transport = transport
        self._base_url = base_url
        self.host = httpx.URL(base_url).netloc.decode("ascii")

    async def send(
        self,
        method: str,
        path: str,
        *,
        key: str,
        lane: Lane,
        seconds: float,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        flight: Flight | None = None,
    ) -> Answer:
        """Send one request and read its whole answer, within `seconds` from the moment it has a connection slot.

        Raises `NotSent` or `AnswerLost`. Cancelling it closes its connection.
        """
        flight = flight or Flight()
        loop = asyncio.get_running_loop()
        whole = asyncio.timeout(None)

        def begin() -> None:
            whole.reschedule(loop.time() + seconds)

        def first_byte() -> None:
            flight.sent = True
            flight.sent_at = loop.time()

        trouble: BaseException
        flight.connecting = True
        try:
            request = httpx.Request(
                method,
                self._base_url + path,
                headers=_headers(key, content, headers),
                content=content,
                extensions={
                    "timeout": _timeouts(seconds),
                    "lane": lane,
                    "on_slot": begin,
                    "on_bytes": first_byte,
                },
            )
            async with whole:
                answer = await self._exchange(request, key)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            trouble = error  # nobody cancelled us: it came out of the transport, as any other fault
        except Exception as error:  # noqa: BLE001  (whatever a transport raises, it is one of two things to the caller)
            trouble = error
        else:
            logger.debug("%s %s -> %d", method, path, answer.status)
            return answer
        reason = f"took longer than {seconds:g} s" if whole.expired() else _reason(trouble)
        # An exception may quote a header, and so the key: then it is neither shown nor kept.
        if key in f"{reason} {trouble} {trouble!r}" or isinstance(trouble, httpx.LocalProtocolError | UnicodeError):
            reason = f"{type(trouble).__name__} (details withheld: they may show a header)"
            raise self._failure(flight, trouble, reason)
        raise self._failure(flight, trouble, reason) from trouble

    async def _exchange(self, request: httpx.Request, key: str) -> Answer:
        response = await self._transport.handle_async_request(request)
        try:
            cap = ERROR_CAP if response.status_code >= 300 else TASK_CAP
            headers = {name.lower(): value for name, value in response.headers.items()}
            body, problem = await _read_body(response, headers.get("content-encoding", ""), cap)
        finally:
            try:
                await response.aclose()
            except Exception as error:  # noqa: BLE001  (the answer is here, or its loss is being told already)
                logger.debug("closing an answer failed: %s", type(error).__name__)
        if len(key) >= _SHORTEST_SECRET:  # a service that quotes the key in its answer doesn't get it into our errors
            headers = {name: value.replace(key, "[API key]") for name, value in headers.items()}
            body = body.replace(key.encode(), b"[API key]")
        return Answer(response.status_code, headers, body, problem)

    def _failure(self, flight: Flight, trouble: BaseException, reason: str) -> NotSent | AnswerLost:
        unsent = not flight.sent
        if isinstance(self._transport, ForeignTransport) and _says_unsent(trouble):
            unsent = True  # only that client knows when it writes, so `sent` was set before it was asked to
        if unsent:
            flight.sent, flight.sent_at = False, None
            return NotSent(f"could not reach {self.host}: {reason}")
        return AnswerLost(f"the answer of {self.host} was lost: {reason}")


def _says_unsent(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__ if cls.__module__.startswith("httpx")}
    return bool(names & _UNSENT)


def _timeouts(seconds: float) -> dict[str, float | None]:
    return {"connect": min(CONNECT_TIMEOUT, seconds), "read": seconds, "write": seconds, "pool": None}


def _headers(key: str, content: bytes | None, more: Mapping[str, str] | None) -> dict[str, str]:
    headers = {
        "Authorization": f"Bearer {key}",
        "User-Agent": USER_AGENT,
        "Accept": "application/json",
        # Compression buys nothing for answers this small, and a bomb needs a decoder.
        "Accept-Encoding": "identity",
    }
    if content is not None:
        headers["Content-Type"] = "application/json"
    if more:
        headers.update(more)
    return headers


async def _read_body(response: httpx.Response, encoding: str, cap: int) -> tuple[bytes, str | None]:
    """The decoded body up to `cap` bytes, or why there is none. Never holds more than the cap and one chunk."""
    encoding = encoding.strip().lower()
    if encoding not in _PLAIN and encoding not in _DEFLATED:
        return b"", f"is compressed in a way that was not asked for ({excerpt(encoding.encode())!r})"
    inflater = zlib.decompressobj(wbits=47) if encoding in _DEFLATED else None  # 47: gzip or zlib, whichever it is
    body = bytearray()
    async for chunk in cast("AsyncIterable[bytes]", response.stream):
        try:
            body += chunk if inflater is None else inflater.decompress(chunk, cap - len(body) + 1)
        except zlib.error:
            return b"", f"is not the {encoding} that its headers say"
        if len(body) > cap:
            return b"", f"is larger than the {cap // 1024} KiB that this client reads"
    if inflater is not None and body and (not inflater.eof or inflater.unused_data):
        return b"", f"is not one whole {encoding} stream, as its headers say"
    return bytes(body), None


_PLAIN = frozenset({"", "identity"})
_DEFLATED = frozenset({"gzip", "x-gzip", "deflate"})


def _reason(error: BaseException) -> str:
    text = excerpt(str(error).encode("utf-8", "replace"))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
