"""One call: one request out, one whole answer in, or a clear word on whether anything was sent."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import platform
import zlib
from collections.abc import AsyncIterable, Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import httpx

from evolink_async._version import __version__
from evolink_async.errors import ConfigurationError
from evolink_async.http.answers import Answer, excerpt

logger = logging.getLogger("evolink_async.http")

Lane = Literal["submit", "read"]

TASK_CAP = 8 * 1024 * 1024  # decoded bytes of an answer that we need
ERROR_CAP = 64 * 1024  # decoded bytes of an answer that only says what went wrong
CONNECT_TIMEOUT = 10.0

USER_AGENT = f"evolink-async/{__version__} (python {platform.python_version()})"

# By httpx's own documentation these are raised before the request's first byte is written.
_UNSENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
)


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

    sent: bool = False  # the first byte is about to be written: from here on it may have been received


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
    if parsed.scheme not in ("https", "http") or not parsed.host:
        raise ConfigurationError(f"{name} must begin with https://, got {url!r}")
    if parsed.scheme == "http" and not _is_loopback(parsed.host):
        raise ConfigurationError(
            f"{name} must be https (plain http is for loopback hosts only), got {url!r}: the API key would be readable"
        )
    return str(parsed).rstrip("/").removesuffix("/v1")


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

        request = httpx.Request(
            method,
            self._base_url + path,
            headers=_headers(key, content, headers),
            content=content,
            extensions={
                "timeout": {"connect": min(CONNECT_TIMEOUT, seconds), "read": seconds, "write": seconds, "pool": None},
                "lane": lane,
                "on_slot": begin,
                "on_bytes": first_byte,
            },
        )
        try:
            async with whole:
                answer = await self._exchange(request)
        except TimeoutError as error:
            raise self._failure(flight.sent, f"took longer than {seconds:g} s") from error
        except httpx.LocalProtocolError:
            # Its text quotes the offending header, which may be the key.
            raise self._failure(flight.sent, "could not be written as HTTP") from None
        except _UNSENT as error:
            raise self._failure(flight.sent, _reason(error)) from error
        except Exception as error:
            raise self._failure(True, _reason(error)) from error
        logger.debug("%s %s -> %d", method, path, answer.status)
        return answer

    async def _exchange(self, request: httpx.Request) -> Answer:
        response = await self._transport.handle_async_request(request)
        try:
            cap = ERROR_CAP if response.status_code >= 300 else TASK_CAP
            headers = {name.lower(): value for name, value in response.headers.items()}
            body, problem = await _read_body(response, headers.get("content-encoding", ""), cap)
        finally:
            await response.aclose()
        return Answer(response.status_code, headers, body, problem)

    def _failure(self, sent: bool, reason: str) -> NotSent | AnswerLost:
        if sent:
            return AnswerLost(f"the answer of {self.host} was lost: {reason}")
        return NotSent(f"could not reach {self.host}: {reason}")


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
    if response.is_closed or response.is_stream_consumed:
        return response.content[:cap], None  # a user's client has read it already
    decoder = _decoder(encoding.strip().lower())
    if decoder is None:
        return b"", f"is compressed in a way that was not asked for ({excerpt(encoding.encode())!r})"
    parts: list[bytes] = []
    size = 0
    async for chunk in cast("AsyncIterable[bytes]", response.stream):
        try:
            part = decoder(chunk, cap - size + 1)
        except zlib.error:
            return b"", f"is not the {encoding} that its headers say"
        size += len(part)
        if size > cap:
            return b"", f"is larger than the {cap // 1024} KiB that this client reads"
        parts.append(part)
    return b"".join(parts), None


def _decoder(encoding: str) -> Any:
    """chunk, limit -> at most `limit` decoded bytes; None for encodings we don't read."""
    if encoding in ("", "identity"):
        return lambda chunk, limit: chunk
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=47).decompress  # 47: gzip or zlib, whichever it is
    return None


def _reason(error: BaseException) -> str:
    text = excerpt(str(error).encode("utf-8", "replace"))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
