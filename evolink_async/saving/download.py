"""One link into one file: resumed where it broke off, within bounds of size, pace and patience."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from evolink_async.errors import DownloadError, ResultExpiredError
from evolink_async.http.hints import retry_after
from evolink_async.http.media import MediaAnswer, MediaCut, MediaSource, describe
from evolink_async.http.retry import RETRIED_READ_STATUSES, RetryPolicy
from evolink_async.saving.content import ending_of, is_false, is_page, kind_of, sniff
from evolink_async.saving.folder import PartFile, in_thread

logger = logging.getLogger("evolink_async.saving")

MB = 2**20
MOST_IMAGE_BYTES = 100 * MB
MOST_BYTES = 4 * 1024 * MB
STALL_SECONDS = 30.0
LEAST_SPEED = 1000.0  # bytes per second
RETRY_SECONDS = 300.0  # without progress, pauses included
TRIES = 7  # without progress
PROGRESS = 64 * 1024  # bytes beyond the furthest so far that count as progress

ENOUGH_TO_TELL = 512  # bytes after which a page is told from a file
_GONE = frozenset({403, 404, 410})
_PART = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)


class LinkGone(Exception):
    """The link answers 403, 404 or 410: expired, or withdrawn."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Trouble(Exception):
    """This attempt failed in a way that may pass. `hint`: seconds the server asks for."""

    def __init__(self, reason: str, hint: float | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


class Patience:
    """How much longer a slow transfer is borne: 30 s of silence, or as much more as it was slow instead of silent.

    Time waited is spent; every 1000 bytes earn a second, up to the 30 of the start. Pure.
    """

    def __init__(self) -> None:
        self.left = STALL_SECONDS

    def spend(self, seconds: float, received: int) -> None:
        self.left = min(STALL_SECONDS, self.left - seconds + received / LEAST_SPEED)


@dataclass(frozen=True, slots=True)
class _Version:
    """What tells whether a part belongs to the same file: its ETag (a strong one), else its Last-Modified."""

    etag: str | None
    modified: str | None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> _Version:
        etag = headers.get("etag")
        return cls(etag if etag and etag.startswith('"') else None, headers.get("last-modified"))

    @property
    def condition(self) -> str | None:
        """The value for If-Range, None if the file cannot be resumed."""
        return self.etag or self.modified


class Download:
    """One link on its way into `part`.

    renew: asked once for a fresh link when this one is dead; gives None if there is none.
    most: the most bytes that the file may have; None: 100 MB for an image, 4 GB for anything else.
    """

    def __init__(
        self,
        link: str,
        part: PartFile,
        source: Callable[[], MediaSource],
        retry: RetryPolicy,
        *,
        most: int | None = None,
        renew: Callable[[], Awaitable[str | None]],
    ) -> None:
        self._link = link
        self._part = part
        self._source = source
        self._retry = retry
        self._most = most
        self._renew: Callable[[], Awaitable[str | None]] | None = renew
        self._version = _Version(None, None)
        self._furthest = 0

    async def run(self) -> str:
        """Fetch it all: the extension that the content calls for.

        Raises `DownloadError`, and `LinkGone` for a link that is dead and stays so.
        """
        loop = asyncio.get_running_loop()
        tries, since = 0, loop.time()
        while True:
            try:
                return await self._attempt()
            except LinkGone:
                if self._renew is None:
                    raise
                renew, self._renew = self._renew, None
                fresh = await renew()
                if fresh is None or fresh == self._link:
                    raise
                self._link = fresh
                continue
            except (_Trouble, MediaCut) as trouble:
                if self._part.size >= self._furthest + PROGRESS:
                    self._furthest, tries, since = self._part.size, 0, loop.time()
                tries += 1
                hint = trouble.hint if isinstance(trouble, _Trouble) else None
                pause = self._retry.delay(tries, hint, random.random())
                if tries >= TRIES or loop.time() + pause > since + RETRY_SECONDS:
                    raise DownloadError(f"{describe(self._link)} could not be fetched: {trouble}") from trouble
                logger.info("%s: %s; again in %.1f s", describe(self._link), trouble, pause)
                await asyncio.sleep(pause)

    async def _attempt(self) -> str:
        condition = self._version.condition
        resuming = self._part.size > 0 and condition is not None
        if not resuming:
            await in_thread(self._part.restart)
        headers = {"Range": f"bytes={self._part.size}-", "If-Range": condition or ""} if resuming else {}
        answer = await self._source().get(self._link, headers)
        try:
            total = await self._begin(answer, resuming=resuming)
            await self._receive(answer, total)
        finally:
            await answer.aclose()
        return await self._finish(answer, total)

    async def _begin(self, answer: MediaAnswer, *, resuming: bool) -> int | None:
        """Judge the head of an answer: the length of the whole file, None if it isn't told."""
        if answer.status in _GONE:
            raise LinkGone(answer.status)
        if answer.status in RETRIED_READ_STATUSES:
            raise _Trouble(f"HTTP {answer.status}", retry_after(answer.headers))
        if resuming and answer.status in (206, 416):
            total = self._total_of_part(answer)
            if total is None:
                self._version = _Version(None, None)  # the next attempt starts again
                raise _Trouble(f"HTTP {answer.status} with another part than the one asked for")
        elif answer.status != 200:
            raise DownloadError(f"{describe(self._link)} answers HTTP {answer.status}")
        else:
            if self._part.size:
                await in_thread(self._part.restart)
            total = _length_of(answer)
        if answer.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise DownloadError(f"{describe(self._link)} is sent compressed, which was not asked for")
        self._version = _Version.of(answer.headers)
        self._check_size(total or 0, answer)
        return total

    def _total_of_part(self, answer: MediaAnswer) -> int | None:
        """The length of the whole file if this is the rest of what is here, else None."""
        part = _PART.fullmatch(answer.headers.get("content-range", "").strip())
        if answer.status != 206 or part is None or _Version.of(answer.headers) != self._version:
            return None
        first, last, total = map(int, part.groups())
        return total if first == self._part.size and last + 1 == total else None

    async def _receive(self, answer: MediaAnswer, total: int | None) -> None:
        loop = asyncio.get_running_loop()
        patience = Patience()
        told = self._part.size >= ENOUGH_TO_TELL
        try:
            async with asyncio.timeout(None) as stall, aclosing(answer.chunks()) as chunks:
                while True:
                    begun = loop.time()
                    stall.reschedule(begun + patience.left)
                    chunk = await anext(chunks, None)
                    stall.reschedule(None)
                    if chunk is None:
                        break
                    patience.spend(loop.time() - begun, len(chunk))
                    self._check_size(self._part.size + len(chunk), answer)
                    await in_thread(self._part.write, chunk)
                    if not told and self._part.size >= ENOUGH_TO_TELL:
                        told = True
                        self._check_page(answer)
        except TimeoutError as error:
            raise _Trouble(f"slower than {LEAST_SPEED / 1000:g} kB/s for {STALL_SECONDS:g} s") from error
        if total is not None and self._part.size != total:
            raise _Trouble(f"{self._part.size} bytes came, {total} were announced")

    async def _finish(self, answer: MediaAnswer, total: int | None) -> str:
        if self._part.size == 0:
            raise _Trouble("the file is empty")
        self._check_page(answer)
        self._check_size(self._part.size, answer)
        ending = sniff(self._part.head)
        if ending is None:
            content_type = answer.headers.get("content-type", "")
            if is_false(self._part.head, content_type):
                raise DownloadError(f"{describe(self._link)} is no {ending_of(content_type)}, although it says so")
            return ending_of(content_type)
        proven = total is not None or "transfer-encoding" in answer.headers
        if not proven and not await in_thread(self._part.looks_whole, ending):
            await in_thread(self._part.restart)
            raise _Trouble(f"the connection ended before the {ending} did, and no length was announced")
        return ending

    def _check_page(self, answer: MediaAnswer) -> None:
        if is_page(self._part.head, answer.headers.get("content-type", "")):
            raise DownloadError(f"{describe(self._link)} is a page or message (HTML, JSON, text), no media file")

    def _check_size(self, size: int, answer: MediaAnswer) -> None:
        most = self._most
        if most is None:
            ending = sniff(self._part.head) or ending_of(answer.headers.get("content-type", ""))
            most = most_bytes(kind_of(ending))
        if size > most:
            raise DownloadError(f"{describe(self._link)} is larger than the {most // MB} MB that are fetched")


def most_bytes(kind: str | None) -> int:
    """The most bytes of a file of this kind: image, or anything else."""
    return MOST_IMAGE_BYTES if kind == "image" else MOST_BYTES


def gone_error(gone: LinkGone, link: str, age: float | None) -> ResultExpiredError:
    """The error for a dead link. age: seconds since its task was created, None if that isn't known."""
    born = "its age is unknown" if age is None else f"its task is {age / 3600:.1f} h old"
    return ResultExpiredError(f"{describe(link)} answers HTTP {gone.status}: {born}, and result links live 24 h")


def _length_of(answer: MediaAnswer) -> int | None:
    if "transfer-encoding" in answer.headers:
        return None
    text = answer.headers.get("content-length", "").strip()
    return int(text) if _LENGTH.fullmatch(text) else None
