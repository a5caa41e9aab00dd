"""HTTP/1.1 as a client speaks it, over one stream. Requests are bytes written here; answers are read by a parser.

The parser is httptools' where that is installed (the `fast` extra: C, a tenth of the time), else h11's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterable, Callable, Iterable
from typing import NamedTuple, Protocol

import h11
import httpx

from evolink_async.http.stream import SocketStream

Pairs = list[tuple[bytes, bytes]]
Body = bytes | AsyncIterable[bytes]

# Bytes that a parser may swallow without giving anything back: a head, or what lies between two pieces of a body.
_LONGEST_SILENCE = 100 * 1024
# A body of this size goes out together with its head; a larger one isn't worth the copy.
_SMALL = 64 * 1024

_NOT_OURS = "the answer isn't HTTP/1.1"
_ENDED_BEFORE, _HEAD = "the server closed the connection before it had sent %s", "a whole head"

# RFC 9110: a token; and visible characters, blanks between them.
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_is_name = functools.lru_cache(maxsize=64)(_NAME.fullmatch)  # they are few
_VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\x20-\x7e\x80-\xff\t]*[\x21-\x7e\x80-\xff])?)?")
_TARGET = re.compile(rb"[\x21-\x7e]+")


class Head(NamedTuple):
    """The head of an answer; names as they came."""

    status: int
    reason: bytes
    headers: Pairs


def header_lines(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers as they are written. Raises `httpx.LocalProtocolError` for what HTTP cannot carry, not showing it."""
    return b"".join([header_line(name, value) for name, value in pairs])


def header_line(name: bytes, value: bytes) -> bytes:
    """One header as it is written, as above."""
    if not _is_name(name) or not _VALUE.fullmatch(value):
        raise _unfit()
    return b"%b: %b\r\n" % (name, value)


def request_line(method: bytes, target: bytes) -> bytes:
    """The first line of a request. Raises `httpx.LocalProtocolError` for what HTTP cannot carry, not showing it."""
    if not _NAME.fullmatch(method) or not _TARGET.fullmatch(target):
        raise _unfit()
    return b"%b %b HTTP/1.1\r\n" % (method, target)


def _unfit() -> httpx.LocalProtocolError:
    return httpx.LocalProtocolError("the request isn't valid HTTP/1.1 (details withheld: they may show a header)")


class Parser(Protocol):
    """Reads the answers on one connection, one after the other."""

    head: Head | None  # of the answer, once it is known
    parts: list[bytes]  # of its body, not yet taken
    complete: bool  # the answer has ended

    def begin(self, method: bytes) -> None:
        """A request with this method is about to be sent."""

    def feed(self, data: bytes) -> None:
        """Bytes that came; none: the connection has ended. Raises `httpx.RemoteProtocolError`."""

    @property
    def may_go_on(self) -> bool:
        """Whether a complete answer leaves the connection fit for another request: nothing came after it."""

    @property
    def has_surplus(self) -> bool:
        """Whether bytes came after a complete answer."""


class HttpConnection:
    """HTTP/1.1 over one stream, one exchange after the other."""

    __slots__ = ("_parser", "_read_timeout", "_stream")

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream
        self._parser = parser_class()()
        self._read_timeout: float | None = None

    async def send(
        self,
        method: bytes,
        head: bytes,
        body: Body,
        *,
        length: int | None = None,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        on_bytes: Callable[[], object] | None = None,
    ) -> Head:
        """Send a request, and read the answer up to the end of its head.

        `head` ends with the empty line. A body that is no bytes is written as it comes: of `length` bytes, or in
        chunks if `length` is None.
        """
        if method in (b"HEAD", b"CONNECT") and not isinstance(self._parser, H11Parser):
            self._parser = H11Parser()  # their answers end in ways of their own
        parser, stream = self._parser, self._stream
        parser.begin(method)
        stream.begin_exchange(on_bytes)
        self._read_timeout = read_timeout
        try:
            if not isinstance(body, bytes):
                stream.write(head)
                await self._write_parts(body, length, write_timeout)
            elif len(body) <= _SMALL:
                stream.write(head + body)
            else:
                stream.write(head)
                stream.write(body)
            if stream.is_full:
                await stream.drain(write_timeout)
        except httpx.WriteError:
            pass  # a server may refuse a request, and close, before it has read all of it: its answer may be here
        while parser.head is None:
            parser.feed(await stream.read(read_timeout))
        return parser.head

    async def read(self) -> bytes:
        """The next bytes of the answer's body; none at its end."""
        parser = self._parser
        while not parser.parts:
            if parser.complete:
                return b""
            parser.feed(await self._stream.read(self._read_timeout))
        data = b"".join(parser.parts)
        parser.parts.clear()
        return data

    @property
    def is_reusable(self) -> bool:
        """Whether the exchange ended cleanly: read to the end, nothing left over, no wish to close."""
        parser = self._parser
        return parser.complete and not parser.parts and parser.may_go_on

    @property
    def has_surplus(self) -> bool:
        """Whether bytes came after the end of the answer."""
        return self._parser.complete and self._parser.has_surplus

    async def _write_parts(self, body: AsyncIterable[bytes], length: int | None, timeout: float | None) -> None:
        written = 0
        async for part in body:
            if not part:
                continue
            written += len(part)
            if length is None:
                part = b"%x\r\n%b\r\n" % (len(part), part)
            elif written > length:
                raise httpx.LocalProtocolError(f"the body is longer than the {length} bytes that its headers promise")
            self._stream.write(part)
            await self._stream.drain(timeout)
        if length is None:
            self._stream.write(b"0\r\n\r\n")
        elif written < length:
            raise httpx.LocalProtocolError(f"the body has {written} bytes, and its headers promise {length}")


@functools.cache
def parser_class() -> type[H11Parser] | type[HttptoolsParser]:
    """The faster one of those that are installed."""
    try:
        import httptools  # noqa: F401
    except ImportError:
        return H11Parser
    return HttptoolsParser


class H11Parser:
    """Reads with h11. It is told of a request with the same method, so that it knows how the answer ends."""

    __slots__ = ("_ambiguous", "_connection", "complete", "head", "parts")

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def begin(self, method: bytes) -> None:
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_SILENCE)
        self._connection.send(_request_like(method))
        self._connection.send(h11.EndOfMessage())
        self.head: Head | None = None
        self.parts.clear()
        self.complete = False
        self._ambiguous = False  # its length is told in two ways, and whoever is between us may go by the other one

    def feed(self, data: bytes) -> None:
        connection = self._connection
        if not data and self.head is None:
            raise httpx.RemoteProtocolError(_ENDED_BEFORE % _HEAD)
        try:
            connection.receive_data(data)
            while not self.complete:
                event = connection.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return
                if isinstance(event, h11.Data):
                    self.parts.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self.complete = True
                elif isinstance(event, h11.Response):
                    if event.http_version not in (b"1.0", b"1.1"):
                        raise httpx.RemoteProtocolError(_NOT_OURS)
                    self.head = Head(event.status_code, event.reason, list(event.headers.raw_items()))
                    self._ambiguous = {_CODING, _LENGTH} <= {name for name, _ in event.headers}
        except h11.RemoteProtocolError as error:
            what = f"{_NOT_OURS}: {error}" if self.head is None else str(error)
            raise httpx.RemoteProtocolError(what) from error

    @property
    def may_go_on(self) -> bool:
        connection = self._connection
        clean = connection.trailing_data == (b"", False)  # neither more bytes nor the end of the connection
        return clean and not self._ambiguous and connection.our_state is connection.their_state is h11.DONE

    @property
    def has_surplus(self) -> bool:
        return self._connection.trailing_data[0] != b""


@functools.lru_cache(maxsize=16)
def _request_like(method: bytes) -> h11.Request:
    return h11.Request(method=method, target=b"/", headers=[(b"Host", b"localhost")])


class HttptoolsParser:
    """Reads with httptools, which calls the methods `on_...`. They must not raise."""

    __slots__ = (
        "_errors",
        "_fields",
        "_fit",
        "_parser",
        "_reason",
        "_refusal",
        "_silence",
        "_until_close",
        "_version",
        "complete",
        "has_surplus",
        "head",
        "parts",
    )

    def __init__(self) -> None:
        import httptools

        self._parser = httptools.HttpResponseParser(self)
        self._errors = (httptools.HttpParserError, httptools.HttpParserUpgrade)
        self.parts: list[bytes] = []

    def begin(self, method: bytes) -> None:
        self.head: Head | None = None
        self.parts.clear()
        self.complete = False
        self.has_surplus = False
        self._fields: Pairs = []
        self._reason = b""
        self._silence = 0  # bytes since the last that gave something
        self._until_close = False
        self._fit = False  # for another request
        self._refusal = ""  # what we don't accept, and httptools does

    def feed(self, data: bytes) -> None:
        if not data:
            self._end()
            return
        self._silence += len(data)
        try:
            self._parser.feed_data(data)
        except self._errors as error:
            self._fit = False
            self.has_surplus = self.complete
            if not self.complete:
                raise httpx.RemoteProtocolError(f"{_NOT_OURS}: {error}") from error
        if self._refusal:
            raise httpx.RemoteProtocolError(self._refusal)
        if self._silence > _LONGEST_SILENCE and not self.complete:
            raise httpx.RemoteProtocolError("the answer's head, or what lies between the parts of its body, has no end")

    @property
    def may_go_on(self) -> bool:
        return self._fit

    def _end(self) -> None:
        """The connection has ended: that ends an answer without a length, and spoils any other."""
        self._fit = False
        if self.complete:
            return
        if self.head is None or not self._until_close:
            raise httpx.RemoteProtocolError(_ENDED_BEFORE % (_HEAD if self.head is None else "the whole body"))
        self.complete = True

    # What httptools calls.

    def on_message_begin(self) -> None:
        self._fit = False  # after the end it is another answer, which nobody has asked for
        self.has_surplus = self.complete

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head is None:  # else it is a trailer
            self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        if self.head is not None:
            return
        status = self._parser.get_status_code()
        if status < 200:  # on its way there; 101 is an error of httptools, as we never ask for it
            self._fields, self._reason = [], b""
            return
        names = [name.lower() for name, _ in self._fields]
        coding = b""
        if _CODING in names:
            coding = b",".join(value.strip().lower() for name, value in self._fields if name.lower() == _CODING)
        if coding not in (b"", b"chunked"):
            self._refusal = "the answer's transfer coding is none that was asked for"
        self._version = self._parser.get_http_version()
        if self._version not in ("1.0", "1.1"):
            self._refusal = _NOT_OURS
        self._until_close = not (coding or _LENGTH in names or status in (204, 304))
        self.head = Head(status, self._reason, self._fields)

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.parts.append(data)
            self._silence = 0

    def on_message_complete(self) -> None:
        if self.head is not None and not self.complete:
            self.complete = True
            self._fit = self._parser.should_keep_alive() and self._version == "1.1"


_CODING, _LENGTH = b"transfer-encoding", b"content-length"
