"""A transport that answers what a test has written down, on the loop's clock, and remembers what it was sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from evolink_async.http.transport import Call

KEY = "sk-scripted-0123456789"
TASK = {"id": "task-unified-1774857405-abc123", "status": "pending"}


@dataclass
class Say:
    """One answer. `after`: seconds until it comes. `error`: raised instead, `unsent` says whether before any byte."""

    status: int = 200
    body: Any = field(default_factory=lambda: dict(TASK))
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.05
    error: BaseException | None = None
    unsent: bool = False


def lost(after: float = 0.05) -> Say:
    return Say(error=httpx.ReadError("cut"), after=after)


def unsent(after: float = 0.0) -> Say:
    return Say(error=httpx.ConnectError("refused"), unsent=True, after=after)


def refusal(status: int, code: str | None = None, **headers: str) -> Say:
    body = {"error": {"code": code, "message": "no", "type": "x"}}
    return Say(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def replayed() -> Say:
    return Say(headers={"idempotency-replayed": "true"})


@dataclass
class Sent:
    """One request as it was written."""

    at: float
    method: str
    path: str
    headers: httpx.Headers
    content: bytes
    cut: bool = False

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]


class ScriptedTransport:
    """Answers with the script in order, and with its last line from then on; or asks `script(request, number)`."""

    def __init__(self, *script: Say, choose: Callable[[Sent, int], Say] | None = None) -> None:
        self.script = script
        self.choose = choose
        self.sent: list[Sent] = []
        self.knocks: list[float] = []
        self.open_answers = 0

    async def call(self, call: Call) -> ScriptedReply:
        try:
            async with asyncio.timeout(call.seconds):
                return await self._answer(call)
        except TimeoutError as error:
            raise httpx.ReadTimeout("too slow") from error

    async def _answer(self, call: Call) -> ScriptedReply:
        loop = asyncio.get_running_loop()
        number = len(self.knocks)
        self.knocks.append(loop.time())
        headers = httpx.Headers([tuple(line.split(b": ", 1)) for line in call.lines.splitlines() if line])
        assert isinstance(call.body, bytes)
        sent = Sent(loop.time(), call.method.decode(), call.target.decode(), headers, call.body)
        say = self.choose(sent, number) if self.choose else self.script[min(number, len(self.script) - 1)]
        if say.unsent:
            await asyncio.sleep(say.after)
            assert say.error is not None
            raise say.error
        if call.clear is not None:
            while not await call.clear():
                pass
        assert call.on_bytes is not None
        call.on_bytes()
        self.sent.append(sent)
        try:
            await asyncio.sleep(say.after)
        except asyncio.CancelledError:
            sent.cut = True
            raise
        if say.error is not None:
            raise say.error
        self.open_answers += 1
        return ScriptedReply(say, self._closed)

    def _closed(self) -> None:
        self.open_answers -= 1

    @property
    def times(self) -> list[float]:
        return [round(sent.at, 2) for sent in self.sent]


class ScriptedReply:
    """An answer as calls get it."""

    def __init__(self, say: Say, closed: Callable[[], None]) -> None:
        self.status = say.status
        self.headers = [(name.encode(), value.encode()) for name, value in say.headers.items()]
        self._body = _encoded(say.body)
        self._closed = closed

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def aclose(self) -> None:
        self._closed()


class Body(httpx.AsyncByteStream):
    """Bytes in the given pieces."""

    def __init__(self, parts: Iterable[bytes], closed: Callable[[], None] = lambda: None) -> None:
        self._parts = parts
        self._closed = closed

    async def __aiter__(self) -> Any:
        for part in self._parts:
            yield part

    async def aclose(self) -> None:
        self._closed()


def _encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()
