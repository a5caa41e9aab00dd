"""What the program that is killed writes down on its way, and the points at which it can be made to die.

Wrapped are the verbs of the pool's ledger and the one place where a request is written to a socket; nothing in the
package knows of it. Every line of the log is one write to a file, which outlives a kill:

    intend NAME      it is asked for, and nothing may be sent yet
    intended NAME    it is durable, or refused
    settled NAME     what came of the POST is durable
    post KEY NAME    the next thing is its first byte
    answer KEY       the head of the answer is here
    lost KEY         there will be no answer
    full             from here on nothing can be written to the ledger's disk
    room             from here on it can
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from evolink_async.http.transport import Call, _Slot
from evolink_async.ledger import JobLedger, open_job
from evolink_async.pool import pool as pool_module

VERBS = ("enter", "intend", "replay", "posted_in_vain", "rejected", "unsettled", "keys_are_honoured", "accepted")
VERBS += ("ended", "lost")
POINTS = [f"{moment} {verb}" for verb in VERBS for moment in ("before", "after")]
POINTS += ["before post", "after post", "outcome handed over"]

_ASKED = ("intend", "replay")
_SETTLING = ("posted_in_vain", "rejected", "unsettled", "accepted")
_KEY = re.compile(rb"idempotency-key: *(\S+)", re.IGNORECASE)


class Points:
    """die_at, full_at: "<point>:<n>", the n-th time that a point is reached; None: never.

    ledger: whose disk is to be full. room_after: seconds until it has room again, None: for the next process only.
    """

    def __init__(
        self, log: str, ledger: str, die_at: str | None, full_at: str | None, room_after: float | None
    ) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._ledger = Path(ledger)
        self._die_at, self._full_at, self._room_after = die_at, full_at, room_after
        self._reached: Counter[str] = Counter()
        self.unsent: set[str] = set()  # requests whose intent is durable, and whose POST has not begun

    def note(self, *words: str) -> None:
        os.write(self._log, (" ".join(words) + "\n").encode())

    def reached(self, point: str) -> None:
        self._reached[point] += 1
        now = f"{point}:{self._reached[point]}"
        if now == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if now == self._full_at:
            self._fill_disk()

    def fills_at(self, point: str) -> bool:
        """Whether the disk will be full the next time that the point is reached."""
        return f"{point}:{self._reached[point] + 1}" == self._full_at

    def _fill_disk(self) -> None:
        filler = self._ledger.parent / "filler"
        if filler.exists():  # a small file system, so that it can really be filled
            with filler.open("ab", buffering=0) as file:
                for size in (65536, 4096, 1):
                    try:
                        while True:
                            file.write(b"x" * size)
                    except OSError:
                        pass  # so much is too much
        else:
            log = self._ledger.with_name(self._ledger.name + "-wal")
            resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))
        self.note("full")
        if self._room_after is not None:
            asyncio.get_running_loop().call_later(self._room_after, self._make_room, filler)

    def _make_room(self, filler: Path) -> None:
        if filler.exists():
            os.truncate(filler, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.note("room")

    def install(self) -> None:
        """Wrap the ledger that a pool opens, and the socket."""

        async def opened(*args: Any, **kwargs: Any) -> Any:
            return WatchedJob(await open_job(*args, **kwargs), self)

        pool_module.open_job = opened  # type: ignore[assignment]
        send = _Slot.send

        async def watched(slot: _Slot, call: Call) -> Any:
            if call.method != b"POST" or not call.target.endswith(b"/generations"):
                return await send(slot, call)
            match = _KEY.search(call.lines)
            assert match is not None
            assert isinstance(call.body, bytes)
            key, name = match[1].decode(), json.loads(call.body)["prompt"]
            self.reached("before post")
            self.note("post", key, name)
            self.unsent.discard(name)
            try:
                head = await send(slot, call)
            except BaseException:
                self.note("lost", key)
                raise
            self.reached("after post")
            self.note("answer", key)
            return head

        _Slot.send = watched  # type: ignore[method-assign]


class WatchedJob:
    """A job whose verbs are points.

    "before <verb>": it was decided upon, nothing is written. "after <verb>": it is durable, its caller does not know.
    """

    def __init__(self, job: JobLedger, points: Points) -> None:
        self._job = job
        self._points = points
        self._writing: set[asyncio.Future[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._job, name)
        if name not in VERBS:
            return value

        def verb(*args: Any, **kwargs: Any) -> asyncio.Future[Any]:
            return self._verb(name, value, *args, **kwargs)

        return verb

    def _verb(self, name: str, value: Any, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        if self._points.fills_at(f"before {name}") and (self._writing or self._points.unsent):
            return asyncio.ensure_future(self._once_written(name, value, *args, **kwargs))
        identity = getattr(args[0], "identity", "") if args else ""
        self._points.reached(f"before {name}")
        if name in _ASKED:
            self._points.note("intend", identity)
        durable: asyncio.Future[Any] = value(*args, **kwargs)
        if durable.done():
            self._done(name, identity, durable)
        else:  # the first to hear of it
            durable.add_done_callback(lambda future: self._done(name, identity, future))
            self._writing.add(durable)
            durable.add_done_callback(self._writing.discard)
        return durable

    async def _once_written(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """The disk is full from here on: what was asked for before is written by then, and its POST begun."""
        while self._writing or self._points.unsent:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return await self._verb(name, value, *args, **kwargs)

    def _done(self, name: str, identity: str, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        self._points.reached(f"after {name}")
        if name in _ASKED:
            self._points.note("intended", identity)
            self._points.unsent.add(identity)
        elif name in _SETTLING:
            self._points.note("settled", identity)
