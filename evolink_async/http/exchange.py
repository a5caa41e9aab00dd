"""One call: one request out, one whole answer in, or a clear word on whether anything was sent."""

from __future__ import annotations

import asyncio
import functools
import logging
import platform
import re
import zlib
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import httpx

from evolink_async._version import __version__
from evolink_async.clock import Moment
from evolink_async.errors import ConfigurationError
from evolink_async.http.addresses import is_loopback
from evolink_async.http.answers import Answer, excerpt
from evolink_async.http.foreign import ForeignTransport
from evolink_async.http.gate import Lane
from evolink_async.http.transport import Call, SlotTransport, origin_of
from evolink_async.http.wire import Pairs, header_line, header_lines

logger = logging.getLogger("evolink_async.http")

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


class HeldBack(Exception):
    """Raised by what clears a request for writing: it must not be written now. No byte of it was."""


class AnswerLost(Exception):
    """The request, or a part of it, was written, and no whole answer came back."""


class Answered(Protocol):
    """An answer whose body is still to be read."""

    status: int
    headers: Pairs

    async def read(self) -> bytes: ...
    async def aclose(self) -> None: ...


class Caller(Protocol):
    """What carries calls: `SlotTransport` or `ForeignTransport`."""

    def call(self, call: Call) -> Awaitable[Answered]: ...


@dataclass(slots=True)
class Flight:
    """What is known of a call while it is under way."""

    connecting: bool = False  # a connection is waited for, or there is one
    sent: bool = False  # the first byte is about to be written: from here on it may have been received
    sent_at: Moment | None = None  # when that was
    answer: Answer | None = None  # that has begun to come: its body may never follow

    def first_byte(self) -> None:
        """It is about to be written."""
        self.sent = True
        self.sent_at = Moment.of(asyncio.get_running_loop())


# What httpx writes as it is.
_PLAIN_TARGET = re.compile(r"/[A-Za-z0-9/._~?=&:@!$()*+,;-]*", re.ASCII)

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
    if parsed.scheme not in ("https", "http"):
        raise ConfigurationError(f"{name} must begin with https://, got {url!r}")
    host = parsed.raw_host.decode("ascii", "replace")  # httpx decodes no host that IDNA 2008 forbids, and some exist
    if not _HOST.fullmatch(host) or not 0 < (parsed.port or 443) < 65_536:
        raise ConfigurationError(f"{name} has no usable host and port: {url!r}")
    if parsed.scheme == "http" and not is_loopback(host):
        raise ConfigurationError(
            f"{name} must be https (plain http is for loopback hosts only), got {url!r}: the API key would be readable"
        )
    root = str(parsed.copy_with(query=None, fragment=None))
    return root.rstrip("/").removesuffix("/v1").rstrip("/")


class Exchange:
    """Makes single calls to one host over a transport.

    Raises `ConfigurationError` if the environment asks for a proxy on the way there that cannot be used.
    """

    def __init__(self, transport: Caller, base_url: str) -> None:
        self._transport = transport
        url = httpx.URL(base_url)
        self.host = url.netloc.decode("ascii")
        self._origin = origin_of(url)
        if isinstance(transport, SlotTransport):
            transport.is_proxied(self._origin)
        self._root = url.raw_path.rstrip(b"/")
        self._key = ""
        self._lines = b""  # of every request with this key

    async def send(
        self,
        method: str,
        path: str,
        *,
        key: str,
        lane: Lane,
        seconds: float,
        content: bytes | AsyncIterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        flight: Flight | None = None,
        clear: Callable[[], Awaitable[bool]] | None = None,
    ) -> Answer:
        """Send one request and read its whole answer, within `seconds` from the moment it has a connection slot.

        Content that is bytes is JSON; any other needs its Content-Type and Content-Length among the headers. `clear` is
        awaited right before the first byte until it says True, and may raise `HeldBack`. Else raises `NotSent` or
        `AnswerLost`, and `ConfigurationError` if nothing can be sent at all. Cancelling it closes its connection.
        """
        flight = flight or Flight()
        trouble: BaseException
        flight.connecting = True
        try:
            call = Call(
                method.encode("ascii"),
                self._origin,
                self._root + _target(path),
                self._header_lines(method, key, content, headers),
                b"" if content is None else content,
                length=None if headers is None or isinstance(content, bytes) else int(headers.get("Content-Length", 0)),
                lane=lane,
                seconds=seconds,
                # What is written when there is no time left for the answer is lost.
                connect_timeout=min(CONNECT_TIMEOUT, seconds / 2),
                clear=clear,
                on_bytes=flight.first_byte,
            )
            reply = await self._transport.call(call)
            try:
                answer = flight.answer = Answer(reply.status, _headers_of(reply.headers))
                await _read_body(reply, answer)
            finally:
                try:
                    await reply.aclose()
                except Exception as error:  # noqa: BLE001  (the answer is here, or its loss is being told already)
                    logger.debug("closing an answer failed: %s", type(error).__name__)
        except HeldBack:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            trouble = error  # nobody cancelled us: it came out of the transport, as any other fault
        except ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever a transport raises, it is one of two things to the caller)
            trouble = error
        else:
            logger.debug("%s %s -> %d", method, path, answer.status)
            if len(key) >= _SHORTEST_SECRET:
                _hide(key, answer)
            return answer
        reason = _reason(trouble)
        # An exception may quote a header, and so the key: then it is neither shown nor kept.
        if key in f"{reason} {trouble} {trouble!r}" or isinstance(trouble, httpx.LocalProtocolError | UnicodeError):
            reason = f"{type(trouble).__name__} (details withheld: they may show a header)"
            raise self._failure(flight, trouble, reason, key)
        raise self._failure(flight, trouble, reason, key) from trouble

    def _header_lines(self, method: str, key: str, content: object, more: Mapping[str, str] | None) -> bytes:
        if key != self._key:
            self._lines = header_lines(
                [
                    (b"Host", self.host.encode("ascii")),
                    (b"Authorization", b"Bearer " + key.encode("ascii")),
                    (b"User-Agent", USER_AGENT.encode("ascii")),
                    (b"Accept", b"application/json"),
                    # Compression buys nothing for answers this small, and a bomb needs a decoder.
                    (b"Accept-Encoding", b"identity"),
                ]
            )
            self._key = key
        if isinstance(content, bytes):
            own = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(content)
        elif content is not None:
            own = b""  # `more` says what it is
        elif method == "GET":
            own = b"Cache-Control: no-cache\r\n"  # what a task was a minute ago helps nobody
        else:
            own = b"Content-Length: 0\r\n"
        lines = self._lines + own
        if more is not None:
            for name, value in more.items():
                lines += header_line(name.encode("ascii"), value.encode("ascii"))
        return lines

    def _failure(self, flight: Flight, trouble: BaseException, reason: str, key: str) -> NotSent | AnswerLost:
        unsent = not flight.sent
        names = _httpx_names(trouble)
        if isinstance(self._transport, ForeignTransport) and names & _UNSENT:
            unsent = True  # only that client knows when it writes, so `sent` was set before it was asked to
        if unsent:
            flight.sent, flight.sent_at = False, None
            advice = "check the address, the network and its proxies"
            if "PoolTimeout" in names:
                advice = "all connections of http_client are in use: give it more, or a client of its own to this one"
            what = f"could not reach {self.host}: {reason}"
            told = reason.removeprefix(f"{type(trouble).__name__}: ")
            if isinstance(self._transport, SlotTransport) and self.host in told:
                what = told  # a sentence of ours, which names it already
            return NotSent(f"{what}; {advice}")
        # Whatever listens there may speak another protocol.
        advice = "; if this lasts, check base_url" if "RemoteProtocolError" in names and flight.answer is None else ""
        return AnswerLost(f"the answer of {self.host} was lost{_after_head(flight.answer, key)}: {reason}{advice}")


def _after_head(answer: Answer | None, key: str) -> str:
    """What the service's support can be asked about if nothing but the head of an answer came."""
    if answer is None:
        return ""
    request_id = answer.request_id
    if request_id is None or key in request_id:
        return f" after its head (HTTP {answer.status})"
    return f" after its head (HTTP {answer.status}, request id {request_id})"


def _httpx_names(error: BaseException) -> set[str]:
    """What an exception is called in httpx, or in a package of its shape."""
    return {cls.__name__ for cls in type(error).__mro__ if cls.__module__.startswith("httpx")}


@functools.lru_cache(maxsize=128)
def _target(path: str) -> bytes:
    if _PLAIN_TARGET.fullmatch(path):
        return path.encode("ascii")
    return httpx.URL("http://localhost" + path).raw_path


def _headers_of(pairs: Pairs) -> dict[str, str]:
    """Headers by lower-case name; what came more than once is joined as RFC 9110 has it."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


async def _read_body(reply: Answered, answer: Answer) -> None:
    """Read the decoded body into its answer, or why there is none. Never holds more than its cap and one chunk."""
    cap = ERROR_CAP if answer.status >= 300 else TASK_CAP
    inflater = None
    encoding = answer.headers.get("content-encoding", "").strip().lower()
    if encoding not in _PLAIN:
        if encoding not in _DEFLATED:
            answer.problem = f"is compressed in a way that was not asked for ({excerpt(encoding.encode())!r})"
            return
        inflater = zlib.decompressobj(wbits=47)  # gzip or zlib, whichever it is
    body = bytearray()
    while chunk := await reply.read():
        try:
            body += chunk if inflater is None else inflater.decompress(chunk, cap - len(body) + 1)
        except zlib.error:
            answer.problem = f"is not the {encoding} that its headers say"
            return
        if len(body) > cap:
            answer.problem = f"is larger than the {cap // 1024} KiB that this client reads"
            return
    if inflater is not None and body and (not inflater.eof or inflater.unused_data):
        answer.problem = f"is not one whole {encoding} stream, as its headers say"
        return
    answer.body = bytes(body)


def _hide(key: str, answer: Answer) -> None:
    """A service that quotes the key in its answer doesn't get it into our errors."""
    if key in "\n".join(answer.headers.values()):
        answer.headers = {name: value.replace(key, "[API key]") for name, value in answer.headers.items()}
    answer.body = answer.body.replace(key.encode("ascii"), b"[API key]")


_PLAIN = frozenset({"", "identity"})
_DEFLATED = frozenset({"gzip", "x-gzip", "deflate"})


def _reason(error: BaseException) -> str:
    text = excerpt(str(error).encode("utf-8", "replace"))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
