"""The ASGI app that is called back: three arguments, no framework."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from evolink_async.callbacks.rules import BODY_SECONDS, MOST_BYTES, TAKEN, Tokens, judge_head, task_id_in

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_UNREAD = frozenset({404, 408, 413})  # answered while a body may still be coming


class CallbackApp:
    """Answers callbacks, and tells `heard(name, task_id)` of those that are one. That must return at once.

    204: taken. 405: no POST. 404: no token of ours. 413: over 1 MiB. 408: the body took over 10 s. 400: the body names
    no task. No answer has a body.
    """

    __slots__ = ("_heard", "_tokens")

    def __init__(self, tokens: Tokens, heard: Callable[[bytes, str], None]) -> None:
        self._tokens = tokens
        self._heard = heard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            status = await self._status(scope, receive)
            if status is not None:
                await _answer(scope, send, status)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _status(self, scope: Scope, receive: Receive) -> int | None:
        """What to answer; None if nobody listens any more."""
        length = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), None)
        name = judge_head(self._tokens, scope["method"], scope["path"], length)
        if isinstance(name, int):
            return name
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            return 408
        if not isinstance(body, bytes):
            return body
        task_id = task_id_in(body)
        if task_id is None:
            return 400
        self._heard(name, task_id)
        return TAKEN


async def _read(receive: Receive) -> bytes | int | None:
    """The body; 413 as soon as it is too long; None if the caller has gone."""
    chunks: list[bytes] = []
    left = MOST_BYTES
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunk = message.get("body", b"")
        left -= len(chunk)
        if left < 0:
            return 413
        if chunk:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _answer(scope: Scope, send: Send, status: int) -> None:
    headers = [] if status == TAKEN else [(b"content-length", b"0")]
    if status == 405:
        headers.append((b"allow", b"POST"))
    if status in _UNREAD and str(scope.get("http_version", "1.1")).startswith("1"):
        headers.append((b"connection", b"close"))
    try:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
    except OSError:
        pass  # the caller has gone; a callback that was taken stays taken


async def _live(receive: Receive, send: Send) -> None:
    """Served alone, an app is told when the server starts and stops."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
