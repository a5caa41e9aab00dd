"""What is read as an answer, and what is not: the same by both parsers, however the bytes are cut."""

from __future__ import annotations

import random
from dataclasses import dataclass

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evolink_async.http.wire import H11Parser, Head, HttptoolsParser, header_lines, request_line

OK = b"HTTP/1.1 200 OK\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class Read:
    """What a parser made of some bytes."""

    head: Head | None
    body: bytes
    complete: bool
    may_go_on: bool


def read(parser_class: type[H11Parser] | type[HttptoolsParser], pieces: list[bytes], method: bytes = b"GET") -> Read:
    parser = parser_class()
    parser.begin(method)
    body = b""
    for piece in pieces:
        if parser.complete and not piece:
            break  # nobody reads on after the end
        parser.feed(piece)
        body += b"".join(parser.parts)
        parser.parts.clear()
    return Read(parser.head, body, parser.complete, parser.complete and parser.may_go_on)


PARSERS = [HttptoolsParser, H11Parser]
both = pytest.mark.parametrize("parser_class", PARSERS, ids=["httptools", "h11"])


def cuts(data: bytes, count: int, dice: random.Random) -> list[bytes]:
    places = sorted(dice.sample(range(len(data) + 1), min(count, len(data) + 1)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True) if start < end]


# name: bytes, whether the connection ends after them, the body, whether it may be used again
WHOLE: dict[str, tuple[bytes, bool, bytes, bool]] = {
    "length": (OK + b"Content-Length: 4\r\n\r\nbody", False, b"body", True),
    "empty": (OK + b"Content-Length: 0\r\n\r\n", False, b"", True),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", False, b"", True),
    "not modified, with a length": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", False, b"", True),
    "no reason": (b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", False, b"", True),
    "chunks": (CHUNKED + b"3\r\nbod\r\n1\r\ny\r\n0\r\n\r\n", False, b"body", True),
    "chunks, extension and trailer": (CHUNKED + b"4;a=b\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\n", False, b"body", True),
    "until the end": (OK + b"\r\nbody", True, b"body", False),
    "close": (OK + b"Connection: close\r\nContent-Length: 4\r\n\r\nbody", False, b"body", False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nbody", False, b"body", False),
    "HTTP/1.0 that wants to go on": (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\nbody",
        False,
        b"body",
        False,
    ),
    "hints before": (CONTINUE + HINTS + OK + b"Content-Length: 1\r\n\r\n.", False, b".", True),
    "something after it": (OK + b"Content-Length: 4\r\n\r\nbodyx", False, b"body", False),
    "another answer after it": (OK + b"Content-Length: 4\r\n\r\nbody" + OK, False, b"body", False),
    "a whole answer after it": (2 * (OK + b"Content-Length: 4\r\n\r\nbody"), False, b"body", False),
    "something after chunks": (CHUNKED + b"4\r\nbody\r\n0\r\n\r\nx", False, b"body", False),
    "the end after it": (OK + b"Content-Length: 4\r\n\r\nbody", True, b"body", True),
}


@both
@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_is_read_to_its_end_however_it_is_cut(
    parser_class: type[H11Parser] | type[HttptoolsParser], name: str
) -> None:
    data, ends, body, may_go_on = WHOLE[name]
    dice = random.Random(1)
    for pieces in [[data], [data[n : n + 1] for n in range(len(data))], *(cuts(data, 3, dice) for _ in range(20))]:
        # What comes after the end is only seen as far as it comes with it: later it is the stream that notices.
        end = [b""] if ends else []
        found = read(parser_class, [*pieces, *end])
        assert found.head is not None
        assert (found.body, found.complete) == (body, True)
        if len(pieces) == 1 or may_go_on:
            assert found.may_go_on is may_go_on


WRONG: dict[str, tuple[bytes, bool]] = {
    "nothing": (b"", True),
    "half a head": (OK + b"Content-Le", True),
    "no end of the head": (OK + b"Content-Length: 4\r\n", True),
    "half a body": (OK + b"Content-Length: 4\r\n\r\nbod", True),
    "half a chunk": (CHUNKED + b"4\r\nbo", True),
    "no last chunk": (CHUNKED + b"4\r\nbody\r\n", True),
    "half a trailer": (CHUNKED + b"4\r\nbody\r\n0\r\nX-Sum", True),
    "only hints": (b"HTTP/1.1 100 Continue\r\n\r\n", True),
    "another protocol": (b"SSH-2.0-OpenSSH_9.7\r\n\r\n", False),
    "a request": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", False),
    "HTTP/2.0": (b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
    "HTTP/0.9": (b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n", False),
    "no number": (b"HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n", False),
    "two lengths": (OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nbody", False),
    "a length that is none": (OK + b"Content-Length: 4x\r\n\r\nbody", False),
    "a negative length": (OK + b"Content-Length: -4\r\n\r\nbody", False),
    "a chunk size that is none": (CHUNKED + b"4z\r\nbody\r\n0\r\n\r\n", False),
    "a chunk longer than it says": (CHUNKED + b"3\r\nbody\r\n0\r\n\r\n", False),
    "gzip as transfer coding": (OK + b"Transfer-Encoding: gzip\r\n\r\nbody", False),
    "gzip, chunked": (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", False),
    "a header without a name": (OK + b": x\r\nContent-Length: 0\r\n\r\n", False),
    "a blank before the colon": (OK + b"X : y\r\nContent-Length: 0\r\n\r\n", False),
    "a zero in a header": (OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n", False),
    "switching protocols": (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", False),
    "an endless head": (OK + b"X: " + b"x" * 300_000, False),
    "endless headers": (OK + b"X: y\r\n" * 30_000, False),
    "an endless chunk extension": (CHUNKED + b"4;" + b"x" * 300_000, False),
    "an endless trailer": (CHUNKED + b"4\r\nbody\r\n0\r\n" + b"X: y\r\n" * 90_000, False),
}


@both
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_whole_answer_is_refused(parser_class: type[H11Parser] | type[HttptoolsParser], name: str) -> None:
    data, ends = WRONG[name]
    for size in (256 * 1024, 1_000, 7):
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            read(parser_class, [*pieces, *([b""] if ends else [])])
        assert str(caught.value).isprintable()


@both
def test_an_endless_row_of_hints_is_given_up_or_read_without_being_kept(
    parser_class: type[H11Parser] | type[HttptoolsParser],
) -> None:
    parser = parser_class()
    parser.begin(b"GET")
    try:
        for _ in range(2_000):
            parser.feed(b"HTTP/1.1 103 Early Hints\r\nLink: " + b"x" * 1_000 + b"\r\n\r\n")
    except httpx.RemoteProtocolError:
        pass
    assert parser.head is None
    assert parser.parts == []


def test_the_answer_to_a_head_request_has_no_body() -> None:
    found = read(H11Parser, [OK + b"Content-Length: 4\r\n\r\n"], b"HEAD")
    assert (found.body, found.complete, found.may_go_on) == (b"", True, True)


@both
def test_one_parser_reads_many_answers(parser_class: type[H11Parser] | type[HttptoolsParser]) -> None:
    parser = parser_class()
    for n in range(5):
        parser.begin(b"GET")
        parser.feed(OK + b"Content-Length: 1\r\nX: %d\r\n\r\n%d" % (n, n))
        assert parser.head is not None
        assert parser.head.headers[1] == (b"X", b"%d" % n)
        assert (parser.parts, parser.complete, parser.may_go_on) == ([b"%d" % n], True, True)


CONTENT = st.sampled_from([data for data, _, _, _ in WHOLE.values()] + [data for data, _ in WRONG.values()][:18])


@given(CONTENT, st.integers(0, 2**32), st.integers(0, 3), st.booleans())
@example(OK + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nbody", 0, 0, False)
def test_what_both_read_to_the_end_they_read_alike(data: bytes, seed: int, changes: int, ends: bool) -> None:
    dice = random.Random(seed)
    spoiled = bytearray(data)
    for _ in range(changes if data else 0):
        spoiled[dice.randrange(len(spoiled))] = dice.choice(b"\r\n 0123456789abcdefxX:;,HTTP/.\0\xff")
    found = []
    for parser_class in PARSERS:
        try:
            found.append(read(parser_class, [*cuts(bytes(spoiled), 2, dice), *([b""] if ends else [])]))
        except httpx.RemoteProtocolError:
            return
    one, other = found
    if one.complete and other.complete and one.head is not None and other.head is not None:
        assert one.head.status == other.head.status
        lengths = [{value for name, value in r.head.headers if name.lower() == b"content-length"} for r in (one, other)]
        if lengths[0] == lengths[1]:
            assert one.body == other.body


# -- Writing ------------------------------------------------------------------------------------------


def test_headers_are_written_as_given() -> None:
    assert header_lines([(b"Host", b"a:1"), (b"X-Empty", b""), (b"x", b"a \t b\xc3\xa9")]) == (
        b"Host: a:1\r\nX-Empty: \r\nx: a \t b\xc3\xa9\r\n"
    )


BAD = [b"a\r\nX: y", b"a\n", b"\ra", b"a\0", b" a", b"a ", b"\x7f", b"\x01"]


@pytest.mark.parametrize("text", BAD)
def test_what_would_be_another_header_or_request_is_refused_and_not_shown(text: bytes) -> None:
    for write in (
        lambda: header_lines([(b"Authorization", text)]),
        lambda: header_lines([(text, b"x")]),
        lambda: request_line(text, b"/"),
        lambda: request_line(b"GET", b"/" + text),
    ):
        with pytest.raises(httpx.LocalProtocolError) as caught:
            write()
        assert str(caught.value).startswith("the request isn't valid HTTP/1.1 (details withheld")


@both
@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize(
    "surplus", [b"", b"more", b"\x89PNG", b"<html>", OK + b"Content-Length: 0\r\n\r\n", b"\xff" * 5000]
)
def test_bytes_after_the_end_are_noticed(parser_class: type[H11Parser], close: bytes, surplus: bytes) -> None:
    """A length that is too short has its file's end after the answer's."""
    parser = parser_class()
    parser.begin(b"GET")
    parser.feed(OK + close + b"Content-Length: 4\r\n\r\nbody" + surplus)
    assert parser.complete
    assert b"".join(parser.parts) == b"body"
    assert parser.has_surplus is (surplus != b"")
    if not close:
        parser.begin(b"GET")
        assert not (parser.complete and parser.has_surplus)
