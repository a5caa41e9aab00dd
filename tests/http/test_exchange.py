"""One call over canned bytes: what comes back, what is held in memory, what is lost and what was never sent."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import h11
import httpx
import pytest
from scripted_transport import KEY, Body, Say, ScriptedTransport
from test_keys import everything_of

from evolink_async import AsyncEvoLink, ConnectionFailedError, EvoLinkError, SubmitOutcomeUnknownError
from evolink_async.http.answers import Answer, judge_submission
from evolink_async.http.exchange import ERROR_CAP, TASK_CAP, AnswerLost, Exchange, Flight, NotSent
from evolink_async.http.foreign import ForeignTransport
from evolink_async.http.gate import Gate
from evolink_async.http.retry import Verdict

TASK = b'{"id": "task-1"}'


class Canned(httpx.AsyncBaseTransport):
    """Answers everything with the same response."""

    def __init__(self, status: int, parts: Iterable[bytes], headers: dict[str, str]) -> None:
        self.status, self.parts, self.headers = status, parts, headers
        self.closed = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(self.status, headers=self.headers, stream=Body(self.parts, self._close))

    def _close(self) -> None:
        self.closed += 1


def exchange_over(transport: httpx.AsyncBaseTransport) -> Exchange:
    return Exchange(ForeignTransport(httpx.AsyncClient(transport=transport), Gate(10)), "http://127.0.0.1")


async def get(status: int, parts: Iterable[bytes], **headers: str) -> Answer:
    canned = Canned(status, parts, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = await exchange_over(canned).send("GET", "/v1/x", key=KEY, lane="read", seconds=5)
    assert canned.closed == 1
    return answer


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data)


@pytest.mark.parametrize("size", [0, 1, 3, 1000])
@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate", "X-GZIP"])
async def test_a_body_is_read_in_whatever_pieces_it_comes(encoding: str, size: int) -> None:
    data = {"identity": TASK, "gzip": gzipped(TASK), "deflate": zlib.compress(TASK), "X-GZIP": gzipped(TASK)}[encoding]
    parts = [data[at : at + size] for at in range(0, len(data), size)] if size else [data]
    answer = await get(200, parts, content_encoding=encoding)
    assert (answer.body, answer.problem) == (TASK, None)


@pytest.mark.parametrize(("status", "cap"), [(200, TASK_CAP), (400, ERROR_CAP), (302, ERROR_CAP)])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
async def test_a_body_is_read_up_to_its_cap(status: int, cap: int, packed: bool) -> None:
    async def answered(size: int) -> Answer:
        data = b"x" * size
        parts = [gzipped(data)] if packed else [data[at : at + 65_536] for at in range(0, size, 65_536)]
        return await get(status, parts, **({"content_encoding": "gzip"} if packed else {}))

    assert len((await answered(cap)).body) == cap
    over = await answered(cap + 1)
    assert over.body == b""
    assert "larger than" in str(over.problem)


async def test_a_body_without_an_end_is_given_up() -> None:
    def endless() -> Iterable[bytes]:
        while True:
            yield b"x" * 65_536

    assert "larger" in str((await get(200, endless())).problem)


async def test_a_gzip_bomb_is_given_up_without_filling_the_memory() -> None:
    packer = zlib.compressobj(wbits=31)
    zeros = bytes(1024 * 1024)
    bomb = b"".join([packer.compress(zeros) for _ in range(200)]) + packer.flush()
    tracemalloc.start()
    try:
        answer = await get(200, [bomb], content_encoding="gzip")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "larger" in str(answer.problem)
    assert peak < 3 * TASK_CAP


LIES = {
    "plain-as-gzip": ([TASK], "gzip"),
    "cut-gzip": ([gzipped(TASK)[:-5]], "gzip"),
    "gzip-and-more": ([gzipped(TASK) + b"more"], "gzip"),
    "two-members": ([gzipped(TASK), gzipped(TASK)], "gzip"),
    "brotli": ([TASK], "br"),
    "zstd": ([TASK], "zstd"),
    "twice": ([gzipped(gzipped(TASK))], "gzip, gzip"),
    "nonsense": ([TASK], "\x1b[31m"),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_body_that_is_not_what_its_headers_say_is_no_task(name: str) -> None:
    parts, encoding = LIES[name]
    answer = await get(200, parts, content_encoding=encoding)
    assert answer.problem is not None
    assert judge_submission(answer).verdict is Verdict.LOST
    assert str(judge_submission(answer).error).isprintable()


async def test_an_empty_body_that_calls_itself_gzip_is_empty() -> None:
    assert (await get(204, [], content_encoding="gzip")).problem is None


async def test_a_refusal_with_an_unreadable_body_is_still_a_refusal() -> None:
    answer = await get(429, [b"x" * (ERROR_CAP + 1)], retry_after="5")
    assert judge_submission(answer).verdict is Verdict.RATE_LIMITED
    assert judge_submission(answer).retry_after == 5


async def test_a_service_that_quotes_the_key_does_not_get_it_into_an_error() -> None:
    quoting = b'{"error": {"code": "unauthorized", "message": "no such key: ' + KEY.encode() + b'"}}'
    error = judge_submission(await get(401, [quoting], x_request_id=f"r-{KEY}")).error
    assert error is not None
    assert KEY not in everything_of(error)


async def test_where_keys_change_an_answer_is_cleared_of_the_key_of_its_own_call() -> None:
    both_sent = asyncio.Event()

    class Quoting(Canned):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            quoted = request.headers["authorization"]
            self.parts, self.headers = [quoted.encode()], {"x-request-id": quoted}
            answer = await super().handle_async_request(request)
            if not quoted.endswith(KEY):
                both_sent.set()
            await both_sent.wait()
            return answer

    exchange = exchange_over(Quoting(401, [], {}))
    answers = await asyncio.gather(
        *(exchange.send("GET", "/v1/x", key=key, lane="read", seconds=5) for key in (KEY, f"{KEY}-rotated"))
    )
    for answer in answers:
        assert KEY not in f"{answer.body!r} {answer.headers}"


# -- Sockets ------------------------------------------------------------------------------------------


@asynccontextmanager
async def served(answer: bytes) -> AsyncIterator[str]:
    """A server that answers everything with these bytes and closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


OK = b"HTTP/1.1 200 OK\r\n"
CUT = {
    "nothing": b"",
    "half-a-head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "short-body": OK + b"Content-Length: 100\r\n\r\n" + TASK,
    "cut-chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n10\r\n" + TASK,
    "another-protocol": b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
    "two-lengths": OK + b"Content-Length: 16\r\nContent-Length: 17\r\n\r\n" + TASK,
    "huge-header": OK + b"X: " + b"x" * 300_000 + b"\r\n\r\n",
}


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("name", CUT)
async def test_an_answer_that_was_cut_is_lost(name: str) -> None:
    async with served(CUT[name]) as url, AsyncEvoLink(base_url=url, on_lost_response="hold") as client:
        with pytest.raises(SubmitOutcomeUnknownError) as caught:
            await client.images.submit(model="gpt-4o-image", prompt="x")
        assert isinstance(caught.value.__cause__, EvoLinkError)


WHOLE = {
    "length": OK + b"Content-Length: 16\r\n\r\n" + TASK,
    "length-and-more": OK + b"Content-Length: 16\r\n\r\n" + TASK + b"HTTP/1.1 500 No",
    "chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\n" + TASK[:4] + b"\r\nc\r\n" + TASK[4:] + b"\r\n0\r\n\r\n",
    "until-close": OK + b"\r\n" + TASK,
    "bom": OK + b"Content-Length: 19\r\n\r\n\xef\xbb\xbf" + TASK,
    "wrong-type": OK + b"Content-Type: text/html\r\nContent-Length: 16\r\n\r\n" + TASK,
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 16\r\n\r\n" + TASK,
}


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("name", WHOLE)
async def test_an_answer_that_is_whole_is_read(name: str) -> None:
    async with served(WHOLE[name]) as url, AsyncEvoLink(base_url=url) as client:
        assert (await client.images.submit(model="gpt-4o-image", prompt="x")).id == "task-1"


# -- What a transport may raise -------------------------------------------------------------------------


class Hostile(Exception):
    def __str__(self) -> str:
        return f"\x1b[31m Bearer {KEY} \u202e"


RAISED: dict[str, Callable[[], BaseException]] = {
    "read": lambda: httpx.ReadError("cut"),
    "read-timeout": lambda: httpx.ReadTimeout(""),
    "write": lambda: httpx.WriteError("cut"),
    "remote-protocol": lambda: httpx.RemoteProtocolError("what"),
    "local-protocol": lambda: httpx.LocalProtocolError(f"Illegal header value b'Bearer {KEY}'"),
    "too-many-redirects": lambda: httpx.TooManyRedirects("round"),
    "decoding": lambda: httpx.DecodingError("x"),
    "stream-consumed": lambda: httpx.StreamConsumed(),
    "invalid-url": lambda: httpx.InvalidURL("x"),
    "h11": lambda: h11.RemoteProtocolError("x"),
    "value": lambda: ValueError(KEY),
    "unicode": lambda: UnicodeEncodeError("ascii", KEY + "é", 22, 23, "x"),
    "os": lambda: OSError(24, "too many open files"),
    "timeout": lambda: TimeoutError(),
    "os-timeout": lambda: TimeoutError(110, "timed out"),
    "recursion": lambda: RecursionError(),
    "memory": lambda: MemoryError(),
    "assertion": lambda: AssertionError(),
    "stop": lambda: StopAsyncIteration(),
    "group": lambda: ExceptionGroup("g", [ValueError(1)]),
    "cancelled": lambda: asyncio.CancelledError(),
    "hostile": Hostile,
}


@pytest.mark.looptime
@pytest.mark.parametrize("sent", [True, False], ids=["sent", "unsent"])
@pytest.mark.parametrize("name", RAISED)
async def test_whatever_a_transport_raises_is_lost_or_not_sent(name: str, sent: bool) -> None:
    transport = ScriptedTransport(Say(error=RAISED[name](), unsent=not sent))
    flight = Flight()
    exchange = Exchange(transport, "http://127.0.0.1")
    with pytest.raises((AnswerLost, NotSent)) as caught:
        await exchange.send("POST", "/v1/x", key=KEY, lane="submit", seconds=5, content=b"{}", flight=flight)
    assert isinstance(caught.value, AnswerLost if sent else NotSent)
    assert flight.sent is sent
    assert KEY not in everything_of(caught.value)
    assert str(caught.value).isprintable()


UNSENT: dict[str, Callable[[], BaseException]] = {
    "connect": lambda: httpx.ConnectError("refused"),
    "connect-timeout": lambda: httpx.ConnectTimeout("slow"),
    "pool": lambda: httpx.PoolTimeout("full"),
    "proxy": lambda: httpx.ProxyError("407"),
    "scheme": lambda: httpx.UnsupportedProtocol("x"),
}


@pytest.mark.looptime
@pytest.mark.parametrize("name", [*RAISED, *UNSENT])
async def test_whatever_a_users_client_raises_becomes_an_error_of_ours(name: str, api_key: str) -> None:
    calls = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        raise (RAISED | UNSENT)[name]()

    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http_client,
        AsyncEvoLink(http_client=http_client, on_lost_response="hold") as client,
    ):
        unsent = name in UNSENT
        with pytest.raises(ConnectionFailedError if unsent else SubmitOutcomeUnknownError) as submitting:
            await client.images.submit(model="gpt-4o-image", prompt="x", timeout=10)
        assert (calls > 1) is unsent
        with pytest.raises(ConnectionFailedError) as reading:
            await client.tasks.get("task-1", timeout=10)
        for caught in (submitting.value, reading.value):
            assert api_key not in everything_of(caught)


@pytest.mark.looptime
async def test_an_answer_that_drips_is_cut_at_the_timeout() -> None:
    class Drip(Body):
        async def __aiter__(self) -> Any:
            while True:
                await asyncio.sleep(1)
                yield b" "

    class Dripping(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, stream=Drip([]))

    exchange = exchange_over(Dripping())
    with pytest.raises(AnswerLost, match="longer than 5 s"):
        await exchange.send("GET", "/v1/x", key=KEY, lane="read", seconds=5)


async def test_what_is_sent() -> None:
    transport = ScriptedTransport(Say())
    exchange = Exchange(transport, "http://127.0.0.1/proxy")
    more = {"Idempotency-Key": "k"}
    await exchange.send("POST", "/v1/x?a=b", key=KEY, lane="submit", seconds=5, content=b"{}", headers=more)
    (sent,) = transport.sent
    assert sent.path == "/proxy/v1/x?a=b"
    assert sent.content == b"{}"
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert sent.headers["accept-encoding"] == "identity"
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["user-agent"].startswith("evolink-async/")
    assert sent.key == "k"
