"""One link into one file: resumed where it broke off, within bounds of size, pace and patience."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime

from evolink_async.errors import DownloadError, ResultExpiredError
from evolink_async.http.hints import retry_after
from evolink_async.http.media import MediaAnswer, MediaCut, MediaSource, describe
from evolink_async.http.retry import RETRIED_READ_STATUSES, RetryPolicy
from evolink_async.saving.content import TELLING, ending_of, is_false, is_page, kind_of, sniff
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
FLUSH = 512 * 1024  # bytes that are gathered before they are written

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


class _Doubt(_Trouble):
    """All of the file has come, as far as is told; it may be cut all the same, and has to come once more."""


class Patience:
    """How much longer a slow transfer is borne: 30 s, and from anew whenever 30 kB have come. Pure."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.left = STALL_SECONDS
        self._wanted = STALL_SECONDS * LEAST_SPEED  # bytes

    def spend(self, seconds: float, received: int) -> None:
        """Count the seconds that were waited for these bytes."""
        self.left -= seconds
        self._wanted -= received
        if self._wanted <= 0:
            self._begin()


@dataclass(frozen=True, slots=True)
class _Version:
    """What tells whether a part belongs to the same file: its ETag, else its Last-Modified, as far as they are strong.

    A date is strong if the answer is at least a second younger (RFC 9110, 8.8.2.2): the file could change twice in one.
    """

    etag: str | None = None
    modified: str | None = None
    total: int | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str], total: int | None) -> _Version:
        etag, modified = headers.get("etag"), headers.get("last-modified")
        if modified and not _is_older(modified, headers.get("date", "")):
            modified = None
        return cls(etag if etag and etag.startswith('"') else None, modified, total)

    @property
    def condition(self) -> str | None:
        """The value for If-Range, None if the file cannot be resumed."""
        return self.etag or self.modified

    def fits(self, headers: Mapping[str, str]) -> bool:
        """Whether an answer is about the same file."""
        if self.etag:
            return headers.get("etag") == self.etag
        return headers.get("last-modified") == self.modified


class Download:
    """One link on its way into `part`.

    renew: asked once for a fresh link when this one is dead; gives None if there is none.
    most: the most bytes that the file may have; None: 100 MB for an image, 4 GB for anything else.
    """

    def __init__(
        self,
        link: str,
        part: PartFile,
        source: MediaSource,
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
        self._version = _Version()
        self._furthest = 0
        self._doubted: int | None = None  # the length of a transfer whose content looked cut all the same

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
                self._link, self._version = fresh, _Version()  # another link may lead to another copy: from the start
                continue
            except (_Trouble, MediaCut) as trouble:
                await in_thread(self._part.flush)
                if self._part.size >= self._furthest + PROGRESS:
                    self._furthest, tries, since = self._part.size, 0, loop.time()
                elif isinstance(trouble, _Doubt):
                    since = loop.time()  # the next transfer takes as long as this one did
                tries += 1
                hint = trouble.hint if isinstance(trouble, _Trouble) else None
                pause = self._retry.delay(tries, hint, random.random())
                if tries >= TRIES or loop.time() + pause > since + RETRY_SECONDS:
                    raise DownloadError(f"{describe(self._link)} could not be fetched: {trouble}") from trouble
                logger.info(
                    "%s: %s; again in %.1f s",
                    describe(self._link),
                    trouble,
                    pause,
                    extra={"event": "download_retried", "seconds": pause},
                )
                await asyncio.sleep(pause)

    async def _attempt(self) -> str:
        condition = self._version.condition
        resuming = self._part.size > 0 and condition is not None
        if not resuming and self._part.size:
            await in_thread(self._part.restart)
        headers = {"Range": f"bytes={self._part.size}-", "If-Range": condition or ""} if resuming else {}
        answer = await self._source.get(self._link, headers)
        try:
            total = await self._begin(answer, resuming=resuming)
            await self._receive(answer, total)
            has_surplus = answer.has_surplus
        finally:
            await answer.aclose()
        return await self._finish(answer, total, has_surplus=has_surplus)

    async def _begin(self, answer: MediaAnswer, *, resuming: bool) -> int | None:
        """Judge the head of an answer: the length of the whole file, None if it isn't told."""
        if answer.status in _GONE:
            raise LinkGone(answer.status)
        if answer.status in RETRIED_READ_STATUSES:
            raise _Trouble(f"HTTP {answer.status}", retry_after(answer.headers))
        if resuming and answer.status in (206, 416):
            total = self._total_of_part(answer)
            if total is None:
                self._version = _Version()  # the next attempt starts again
                raise _Trouble(f"HTTP {answer.status} with another part than the one asked for")
        elif answer.status != 200:
            raise DownloadError(f"{describe(self._link)} answers HTTP {answer.status}")
        else:
            if self._part.size:
                await in_thread(self._part.restart)
            total = _length_of(answer)
        if answer.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise DownloadError(f"{describe(self._link)} is sent compressed, which was not asked for")
        self._version = _Version.of(answer.headers, total)
        self._check_size(total or 0, answer)
        if total is not None and total - self._part.size > FLUSH:  # what is written at one go finds out by itself
            await in_thread(self._part.promise, total - self._part.size)
        return total

    def _total_of_part(self, answer: MediaAnswer) -> int | None:
        """The length of the whole file if this is the rest of what is here, else None."""
        part = _PART.fullmatch(answer.headers.get("content-range", "").strip())
        if answer.status != 206 or part is None:
            return None
        first, last, total = map(int, part.groups())
        if self._version.total not in (None, total) or not self._version.fits(answer.headers):
            return None
        return total if first == self._part.size and last + 1 == total else None

    async def _receive(self, answer: MediaAnswer, total: int | None) -> None:
        loop = asyncio.get_running_loop()
        patience = Patience()
        told = self._part.size >= ENOUGH_TO_TELL
        try:
            async with asyncio.timeout(None) as stall:
                while True:
                    begun = loop.time()
                    stall.reschedule(begun + patience.left)
                    chunk = await answer.read()
                    stall.reschedule(None)
                    if not chunk:
                        break
                    patience.spend(loop.time() - begun, len(chunk))
                    self._check_size(self._part.size + len(chunk), answer)
                    self._part.add(chunk)
                    if self._part.pending >= FLUSH:
                        await in_thread(self._part.flush)
                    if not told and self._part.size >= ENOUGH_TO_TELL:
                        told = True
                        self._check_page(answer)
        except TimeoutError as error:
            raise _Trouble(f"slower than {LEAST_SPEED / 1000:g} kB/s for {STALL_SECONDS:g} s") from error
        if total is not None and self._part.size != total:
            raise _Trouble(f"{self._part.size} bytes came, {total} were announced")

    async def _finish(self, answer: MediaAnswer, total: int | None, *, has_surplus: bool) -> str:
        if self._part.size == 0:
            raise _Trouble("the file is empty")
        self._check_page(answer)
        self._check_size(self._part.size, answer)
        announced = total is not None or "transfer-encoding" in answer.headers
        sniffed = sniff(self._part.head)
        ending = sniffed or self._told_ending(answer)
        if sniffed in TELLING:
            part = self._part
            looks_whole = part.looks_whole(ending) if part.is_in_memory else await in_thread(part.looks_whole, ending)
            if not looks_whole:
                where = "at the announced length" if announced else "and no length was announced"
                may_be_so = announced and not has_surplus
                await self._doubt(f"the transfer ended before the {ending} did, {where}", may_be_so=may_be_so)
        elif not announced:
            await self._doubt(f"neither the answer nor the {ending} tells its length", may_be_so=True)
        return ending

    def _told_ending(self, answer: MediaAnswer) -> str:
        content_type = answer.headers.get("content-type", "")
        if is_false(self._part.head, content_type):
            raise DownloadError(f"{describe(self._link)} is no {ending_of(content_type)}, although it says so")
        return ending_of(content_type)

    async def _doubt(self, why: str, *, may_be_so: bool) -> None:
        """The file may be cut. Raise `_Doubt`, unless it has come in this very length for the second time.

        A length can be a lie that cuts the file (then more bytes come than it has room for), and a file can be odd.
        """
        size = self._part.size
        if may_be_so and self._doubted == size:
            logger.warning(
                "%s: %s; it came twice in the same length and is kept",
                describe(self._link),
                why,
                extra={"event": "file_odd"},
            )
            return
        self._doubted = size
        await in_thread(self._part.restart)
        raise _Doubt(why)

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


def _is_older(modified: str, answered: str) -> bool:
    """Whether a file was changed at least a second before it was sent."""
    try:
        return parsedate_to_datetime(answered) - parsedate_to_datetime(modified) >= timedelta(seconds=1)
    except (TypeError, ValueError, OverflowError):  # one is no date, or has no time zone
        return False
