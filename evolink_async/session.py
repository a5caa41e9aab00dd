"""What a client's core is made of: its options, what it has learned, and what belongs to the event loop it runs in."""

from __future__ import annotations

import asyncio
import math
import os
from collections import OrderedDict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import anyio

from evolink_async.errors import ClosedError, EvoLinkError
from evolink_async.http.exchange import Exchange
from evolink_async.http.foreign import ForeignTransport, gate_for
from evolink_async.http.keys import ApiKey
from evolink_async.http.media import MediaSource, place_of
from evolink_async.http.observer import Observation
from evolink_async.http.pace import Holds, Pace
from evolink_async.http.rates import RateLimit
from evolink_async.http.reads import Reader
from evolink_async.http.retry import Replays, RetryPolicy
from evolink_async.http.submit import Submitter
from evolink_async.http.transport import SlotTransport
from evolink_async.polling.schedule import Schedule
from evolink_async.polling.watcher import WORKERS, Learned, Watcher
from evolink_async.types import UploadedFile

if TYPE_CHECKING:
    import httpx

SUBMIT_TIMEOUT, POLL_TIMEOUT = 30.0, 15.0
DOWNLOAD_CONNECTIONS = 32
REMEMBERED_UPLOADS = 10_000  # an account holds a hundred files, or five
CLOSED = "this client is closed; make a new one"

Validate = bool | Literal["warn"]
_T = TypeVar("_T")


class Options:
    """The checked options of a client, see there."""

    __slots__ = (
        "allow_private_hosts",
        "api_key",
        "base_url",
        "files_url",
        "http_client",
        "max_connections",
        "on_lost_response",
        "rate_limit",
        "request_timeout",
        "retry",
        "validate",
    )

    api_key: ApiKey
    base_url: str
    files_url: str
    rate_limit: RateLimit | None
    max_connections: int
    request_timeout: float | None
    retry: RetryPolicy
    on_lost_response: str
    validate: Validate
    http_client: httpx.AsyncClient | None
    allow_private_hosts: bool


@dataclass(slots=True)
class Memory:
    """What a client has learned of its service; it outlives a loop."""

    rates: dict[str, float] = field(default_factory=dict)  # submissions per second, by model
    refused: dict[str, float] = field(default_factory=dict)  # the same, that were too many
    caps: dict[str, float] = field(default_factory=dict)  # tasks that may run at once, by model
    holds: Holds = field(default_factory=Holds)
    pauses: dict[str, EvoLinkError] = field(default_factory=dict)  # by model, what asked for one of over an hour
    reads: Learned = field(default_factory=Learned)
    replays: Replays = field(default_factory=Replays)
    schedule: Schedule = field(default_factory=Schedule)
    uploads: OrderedDict[str, str] = field(default_factory=OrderedDict)  # what counts in place of a link that we made
    uploaded: OrderedDict[str, UploadedFile] = field(default_factory=OrderedDict)  # by SHA-256 of the content

    def note_upload(self, link: str, content: str) -> None:
        """Remember what a link leads to: a later run has another link for the same."""
        self.uploads[link] = content
        self.uploads.move_to_end(link)
        if len(self.uploads) > REMEMBERED_UPLOADS:
            self.uploads.popitem(last=False)


class Closable(Protocol):
    """What ends with a session."""

    async def aclose(self) -> None: ...


class Session:
    """What belongs to one event loop: connections, pace, watcher. Built at the first call, dropped with its loop."""

    def __init__(self, options: Options, memory: Memory, observation: Observation) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        self.transport = _transport(options.http_client, options.max_connections)
        self.exchange = Exchange(self.transport, options.base_url)
        self._files_url = options.files_url
        self._files_exchange: Exchange | None = None
        self._downloads: SlotTransport | None = None
        self._media: MediaSource | None = None
        self.attachments: Closable | None = None  # once a request has a local file
        self._own_places = frozenset({place_of(options.base_url), place_of(options.files_url)})
        self._allow_private = options.allow_private_hosts
        self._calls: set[asyncio.Timeout] = set()
        self._closed = False
        gate = self.transport.gate
        self.pace = Pace(
            options.rate_limit,
            gate.lane_limit,
            options.retry,
            memory.rates,
            refused=memory.refused,
            caps=memory.caps,
            holds=memory.holds,
            observation=observation,
        )
        self.submitter = Submitter(
            self.exchange,
            options.api_key,
            self.pace,
            options.retry,
            memory.replays,
            hold=options.on_lost_response == "hold",
            request_timeout=options.request_timeout or SUBMIT_TIMEOUT,
            pauses=memory.pauses,
            observation=observation,
        )
        self.reader = Reader(
            self.exchange, options.api_key, options.retry, request_timeout=options.request_timeout or POLL_TIMEOUT
        )
        workers = min(WORKERS, gate.lane_limit)
        self.watcher = Watcher(
            self.reader,
            memory.schedule,
            options.retry,
            self.pace,
            memory.reads,
            workers=workers,
            observation=observation,
        )

    @property
    def files_exchange(self) -> Exchange:
        """Calls to the file service. Raises `ConfigurationError` where the way there cannot be gone."""
        if self._files_exchange is None:
            self._files_exchange = Exchange(self.transport, self._files_url)
        return self._files_exchange

    @property
    def downloads(self) -> SlotTransport:
        """Connections for result files, which never carry the key and never starve polls."""
        if self._closed:
            raise ClosedError(CLOSED)
        if self._downloads is None:
            self._downloads = SlotTransport(DOWNLOAD_CONNECTIONS)
        return self._downloads

    @property
    def media(self) -> MediaSource:
        """Where result files are fetched from, by all who save them."""
        if self._media is None or self._closed:
            self._media = MediaSource(self.downloads, self._own_places, allow_private=self._allow_private)
        return self._media

    async def until_closed(self, call: Awaitable[_T]) -> _T:
        """The result of a call that raises only errors of this library; `ClosedError` if the client is closed first."""
        limit = asyncio.timeout(None)
        self._calls.add(limit)
        try:
            async with limit:
                return await call
        except TimeoutError as error:
            if isinstance(error, EvoLinkError):
                raise
            raise ClosedError("the client was closed during this call") from None
        finally:
            self._calls.discard(limit)

    async def aclose(self) -> None:
        self._closed = True
        for limit in self._calls:
            limit.reschedule(-math.inf)
        try:
            await self.watcher.aclose()
            await self.submitter.aclose()
            if self.attachments is not None:
                await self.attachments.aclose()
        finally:
            with anyio.CancelScope(shield=True):
                await self.pace.aclose()
                if self._downloads is not None:
                    await self._downloads.aclose()
                await self.transport.aclose()

    def abandon(self) -> None:
        """Let go of what a closed loop has left behind; nothing can be awaited any more."""
        for transport in (self.transport, self._downloads):
            if isinstance(transport, SlotTransport):
                transport.abandon()


def _transport(http_client: httpx.AsyncClient | None, max_connections: int) -> SlotTransport | ForeignTransport:
    if http_client is not None:
        return ForeignTransport(http_client, gate_for(http_client, max_connections))
    return SlotTransport(max_connections)
