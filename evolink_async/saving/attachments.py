"""Local files of requests: uploaded just before the POST, removed from the service after the task ended.

    looked at ──attach──▶ in line ──places──▶ uploading ──▶ attached ──release──▶ removed
                             ▲                    │
                             └── the quota is full, against what we thought: what it has goes back, first in line

The account has places for a hundred files. We count them: asked for once, taken by an upload, given back by a removal,
asked for again now and then while somebody stands in line. A request gets the places for all its files at once, and
gives all back when one is refused: two that hold half of what they need would wait for each other.

Equal content is uploaded once for all requests that use it at the same time, and removed when the last one has ended.
Its name at the service is random, so that nobody else's upload of the same content shares its fate. What may still be
needed by a task that we don't see end is kept; it ends by itself after 72 hours.

An asyncio task runs only while there is something to look at, to upload, to ask or to remove.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import logging
import math
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio

from evolink_async.errors import (
    APIStatusError,
    ClosedError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotSubmittedError,
)
from evolink_async.http.submit import Settled
from evolink_async.polling.endings import is_over
from evolink_async.requests import GenerationRequest, LocalFile, encode_body, local_files
from evolink_async.saving.content import kind_of
from evolink_async.saving.crew import Crew
from evolink_async.saving.files import FileQuota, Files, FilesService, lifetime_of, named
from evolink_async.saving.folder import in_thread
from evolink_async.saving.upload import Content, MultipartBody, SourceFile, unique_name
from evolink_async.types import Task, TaskReading, UploadedFile

if TYPE_CHECKING:
    from evolink_async.core import ClientCore
    from evolink_async.session import Options, Session

logger = logging.getLogger("evolink_async.saving")

LOOKS_AT_ONCE = 4
UPLOADS_AT_ONCE = 8
REMOVALS_AT_ONCE = 4
PLACES = 100  # documented; for a service that doesn't tell
ASK_SECONDS, REMOVAL_SECONDS = 30.0, 60.0  # retries included
SHORTEST_PAUSE, LONGEST_PAUSE = 10.0, 60.0  # between two questions how many places there are
GRACE = 5.0  # at the client's end, for what is to be removed
_WORTH_USING = timedelta(hours=24)  # so long a link of the caller's own upload must live: the request may have to wait
_FULL = "40003"
# What ends a worker. Nothing else does: what a user's transport raises need be no Exception, pytest.fail is none.
_CUTS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)

Told = Callable[[EvoLinkError | None], None]


class Attachment:
    """The local files of one request, and their links while they are at the service."""

    __slots__ = ("_content_at", "_held", "_number", "_patience", "_source_of", "_then", "links", "request")

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.links: dict[str, str] = {}  # by where they stand, once it is attached
        self._content_at: dict[str, Content] = {}  # by where it stands; its file is closed
        self._source_of: dict[str, LocalFile] = {}  # by digest
        self._held: dict[str, _Stored] = {}  # by digest
        self._number = 0
        self._patience = math.inf
        self._then: Told | None = None

    def names(self) -> dict[str, str]:
        """What counts as the files in the identity of the request, by where they stand."""
        return {place: named(content.digest) for place, content in self._content_at.items()}

    def encoded(self, callback_url: str | None = None) -> bytes:
        """The request's body with the links."""
        return encode_body(self.request, callback_url, self.links)


@dataclass(slots=True, eq=False)
class _Stored:
    """A content that is at the service, or on its way there."""

    content: Content
    source: LocalFile
    users: dict[Attachment, None] = field(default_factory=dict)
    file: UploadedFile | None = None
    fresh_until: float = math.inf  # loop time: nobody new uses it after that
    kept: bool = False  # somebody may need it whose end we don't see
    trouble: EvoLinkError | None = None
    form: MultipartBody | None = None
    scope: anyio.CancelScope | None = None

    def bears(self, trouble: EvoLinkError) -> float:
        """Seconds that the trouble of its upload is borne."""
        self.trouble = trouble
        return max((user._patience for user in self.users), default=REMOVAL_SECONDS)


def attachments_of(core: ClientCore, session: Session) -> Attachments:
    """Those of this session, made when they are first used."""
    if session.attachments is None:
        session.attachments = Attachments(session, core.options, Files(core))
    assert isinstance(session.attachments, Attachments)
    return session.attachments


class Attachments:
    """All that are used on one loop."""

    def __init__(self, session: Session, options: Options, files: Files) -> None:
        self._service = FilesService(session, options)
        self._watcher = session.watcher
        self._files = files
        self._loop = session.loop
        self._looking: dict[Attachment, None] = {}
        self._line: OrderedDict[Attachment, None] = OrderedDict()
        self._stored: dict[str, _Stored] = {}  # by digest: what a newcomer may use
        self._room: int | None = None  # files that the account may still add; None: not asked yet
        self._limit: int | None = None
        self._taken = 0  # places, ever
        self._attached = 0  # requests, ever
        self._asked_at, self._pause = -math.inf, SHORTEST_PAUSE
        self._timer: asyncio.TimerHandle | None = None
        self._asking = self._warned = self._closed = False
        at_once = max(1, min(UPLOADS_AT_ONCE, session.transport.gate.lane_limit // 2))
        self._looks = Crew("evolink file look", LOOKS_AT_ONCE, self._look)
        self._uploads = Crew("evolink upload", at_once, self._upload)
        self._removals = Crew("evolink removal", REMOVALS_AT_ONCE, self._remove)
        self._questions = Crew("evolink file quota", 1, self._ask)

    # For calls and pools

    def look(self, request: GenerationRequest, then: Told) -> Attachment:
        """Look at the local files of a request; `then` hears of the end, later. Nothing is sent.

        The error is an `InvalidRequestError` that names the parameter for a file that cannot be read or would be
        refused, and for a request that cannot be sent for other reasons.
        """
        attachment = Attachment(request)
        attachment._then = then
        if self._closed:
            self._loop.call_soon(self._tell, attachment, _closed())
        else:
            self._looking[attachment] = None
            self._looks.put(attachment)
        return attachment

    def attach(self, attachment: Attachment, then: Told, patience: float) -> None:
        """Upload what was looked at; `then` hears of the end, at once or later, unless it is released before.

        patience: seconds that a files service is borne that fails or cannot be reached. A full quota is waited out.
        """
        attachment._then, attachment._patience = then, patience
        self._attached += 1
        attachment._number = self._attached
        if self._closed:
            self._tell(attachment, _closed())
        elif self._missing(attachment):
            self._line[attachment] = None
            self._admit_soon()
        else:
            self._take(attachment)

    def release(self, attachment: Attachment, *, keep: bool = False) -> None:
        """A request needs its files no more, or not yet. keep: somebody else may. May be called more than once."""
        attachment._then = None
        self._line.pop(attachment, None)
        self._give_back(attachment, keep=keep)
        self._admit_soon()

    async def attached(self, request: GenerationRequest, deadline: float | None) -> Attachment:
        """Look and attach, until the deadline (loop time). To be released. Raises what stood in the way."""
        told = self._loop.create_future()
        attachment = self.look(request, _resolver(told))
        try:
            async with asyncio.timeout_at(deadline):
                await told
                told = self._loop.create_future()
                self.attach(attachment, _resolver(told), math.inf)
                await told
        except TimeoutError:
            error = self._why_late(attachment)
            self.release(attachment)
            raise error from error.__cause__
        except BaseException:
            self.release(attachment)
            raise
        return attachment

    def settled(self, attachment: Attachment, settled: Settled) -> None:
        """A single call has ended like this: release when its task has ended, if there is one."""
        task = settled.task
        if task is None or (task.is_terminal and is_over(task.task)):
            self.release(attachment, keep=settled.ending == "unknown")
        else:
            self._watcher.follow(task, _Borrower(self, attachment), age=0.0)

    async def aclose(self) -> None:
        """End everything; what is to be removed has a few seconds for it."""
        self._closed = True
        self._cancel_timer()
        users = (user for stored in self._stored.values() for user in stored.users)
        for attachment in [*self._looking, *self._line, *users]:
            if attachment._then is not None:  # else it is attached, and its task goes on
                self._tell(attachment, _closed())
        for crew in (self._looks, self._questions, self._uploads):
            await crew.aclose()
        await self._removals.aclose(GRACE)

    # Looking

    async def _look(self, attachment: Attachment) -> None:
        error: EvoLinkError | None = None
        try:
            request = attachment.request
            sources = local_files(request)
            encode_body(request, links=dict.fromkeys(sources, "https://"))
            for place, source in sources.items():
                if attachment._then is None:
                    return  # nobody waits any more
                content = await in_thread(_looked_at, place, source)
                attachment._content_at[place] = content
                attachment._source_of.setdefault(content.digest, source)
        except Exception as trouble:  # noqa: BLE001  (whoever waits must hear of it)
            error = _ours(trouble)
        finally:
            self._looking.pop(attachment, None)
        self._tell(attachment, error)

    # Places

    def _missing(self, attachment: Attachment) -> int:
        """How many places an attachment needs."""
        return sum(self._there(digest) is None for digest in attachment._source_of)

    def _there(self, digest: str) -> _Stored | str | None:
        """What a newcomer can use of this content, or the link of the caller's own upload."""
        stored = self._stored.get(digest)
        if stored is not None and stored.fresh_until > self._loop.time():
            return stored
        file = self._files._remembered(digest, _WORTH_USING)
        return None if file is None else file.url

    def _admit_soon(self) -> None:
        # Never at once: whoever attaches or releases is in the middle of something.
        if self._line or self._timer is not None:
            self._loop.call_soon(self._admit)

    def _admit(self) -> None:
        """Let those in line upload, as far as there are places: the first one first."""
        while self._line and not self._closed:
            first = next(iter(self._line))
            missing = self._missing(first)
            if self._limit is not None and missing > self._limit:
                del self._line[first]
                self._tell(first, InvalidRequestError(f"{missing} local files, the account may have {self._limit}"))
            elif self._room is None or missing > self._room:
                self._ask_later()
                return
            else:
                del self._line[first]
                self._take(first)
        self._cancel_timer()

    def _take(self, attachment: Attachment) -> None:
        """Use what is there, and upload the rest."""
        there: dict[str, _Stored | str] = {}
        for content in attachment._content_at.values():
            digest = content.digest
            found = there.get(digest) or self._there(digest)
            if found is None:
                found = self._stored[digest] = _Stored(_renamed(content), attachment._source_of[digest])
                self._taken += 1
                if self._room is not None:
                    self._room -= 1
                self._uploads.put(found)
            if isinstance(found, _Stored):
                found.users[attachment] = None
                attachment._held[digest] = found
            there[digest] = found
        attachment.links = {
            place: found
            for place, content in attachment._content_at.items()
            if isinstance(found := there[content.digest], str)
        }
        self._tell_if_attached(attachment)

    def _tell_if_attached(self, attachment: Attachment) -> None:
        held = attachment._held
        if any(stored.file is None for stored in held.values()):
            return
        for place, content in attachment._content_at.items():
            stored = held.get(content.digest)
            if stored is not None and stored.file is not None:
                attachment.links[place] = stored.file.url
        self._tell(attachment, None)

    def _tell(self, attachment: Attachment, error: EvoLinkError | None) -> None:
        then, attachment._then = attachment._then, None
        if error is not None:
            self._line.pop(attachment, None)
            self._give_back(attachment)
        if then is not None:
            then(error)

    def _give_back(self, attachment: Attachment, *, keep: bool = False) -> None:
        held = list(attachment._held.items())
        attachment._held.clear()
        attachment.links = {}
        for digest, stored in held:
            stored.users.pop(attachment, None)
            stored.kept |= keep
            if not stored.users and not stored.kept:
                self._forget(digest, stored)
                if stored.file is not None:
                    self._removals.put(stored)
                elif stored.scope is not None and (stored.form is None or not stored.form.written):
                    stored.scope.cancel()  # later, it would be there and nobody would know its id

    def _forget(self, digest: str, stored: _Stored) -> None:
        if self._stored.get(digest) is stored:
            del self._stored[digest]

    # Asking

    def _ask_later(self) -> None:
        if self._timer is None and not self._asking:
            at = max(self._loop.time(), self._asked_at + self._pause)
            self._timer = self._loop.call_at(at, self._ask_now)

    def _ask_now(self) -> None:
        self._timer = None
        self._asking = True
        self._questions.put(None)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _ask(self, _: None) -> None:
        self._asked_at = self._loop.time()
        taken = self._taken
        on_their_way = sum(stored.file is None for stored in self._stored.values())
        quota: FileQuota | None = None
        try:
            quota = await self._service.quota(ASK_SECONDS)
        except _CUTS:
            raise
        except BaseException as trouble:  # noqa: BLE001  (the endpoint isn't documented: an upload will tell)
            error = _ours(trouble)
            logger.info("how many files the account may have is not known: %s", error, extra={"event": "quota_unknown"})
        before = len(self._line)
        if quota is not None:
            self._limit = quota.limit
            room = min(quota.remaining, quota.limit - quota.used)  # below zero where the account has too many
            self._room = room - on_their_way - (self._taken - taken)
        elif self._room is None:
            self._room = PLACES
        elif self._line:
            self._room = max(self._room, self._missing(next(iter(self._line))))
        self._admit()
        blocked = len(self._line) >= before > 0
        self._pause = min(2 * self._pause, LONGEST_PAUSE) if blocked else SHORTEST_PAUSE
        self._asking = False
        if self._line:
            self._ask_later()
        ours = self._removals.busy or any(stored.users for stored in self._stored.values())
        if blocked and not ours and not self._warned:
            self._warned = True
            logger.warning(
                "the account's places for files%s are taken by files that are not of this client's requests; requests "
                "with local files wait: remove some with client.files.delete; each ends 72 hours after its upload",
                "" if self._limit is None else f" ({self._limit})",
                extra={"event": "quota_full"},
            )

    # Uploading and removing

    async def _upload(self, stored: _Stored) -> None:
        error: EvoLinkError | None = None
        opened = SourceFile(stored.source)
        try:
            if stored.users:
                with contextlib.closing(opened), anyio.CancelScope() as stored.scope:
                    stored.form = MultipartBody(await in_thread(opened.reopen, stored.content))
                    stored.file = await self._service.upload(stored.form, stored.bears)
        except _CUTS:
            raise
        except BaseException as trouble:  # noqa: BLE001  (whoever waits must hear of it)
            error = _ours(trouble)
        stored.form = stored.scope = None
        if error is not None:
            self._upload_failed(stored, error)
        elif stored.file is None:
            self._place_is_free()
        else:
            logger.debug("uploaded %s (%d bytes)", stored.file.name, stored.content.size)
            stored.fresh_until = self._loop.time() + lifetime_of(stored.file) / 2
            for user in list(stored.users):
                self._tell_if_attached(user)
            if not stored.users and not stored.kept:
                self._removals.put(stored)

    def _upload_failed(self, stored: _Stored, error: EvoLinkError) -> None:
        digest = stored.content.digest
        self._forget(digest, stored)
        users = list(stored.users)
        if isinstance(error, APIStatusError) and error.code == _FULL:
            self._room = 0
            self._back_in_line(users)
            return
        self._place_is_free()
        for user in users:
            if type(error) is InvalidRequestError and user._source_of[digest] != stored.source:
                self._back_in_line([user])  # its own file may be as it was
            else:
                self._tell(user, _of_parameter(error, user, digest))

    def _back_in_line(self, attachments: list[Attachment]) -> None:
        for attachment in attachments:
            self._give_back(attachment)
            self._line[attachment] = None
        self._line = OrderedDict.fromkeys(sorted(self._line, key=lambda attachment: attachment._number))
        self._admit()

    async def _remove(self, stored: _Stored) -> None:
        assert stored.file is not None
        try:
            await self._service.delete(stored.file.id, REMOVAL_SECONDS)
        except Exception as error:  # noqa: BLE001  (it costs nobody anything but a place for a while)
            logger.info(
                "%s is not removed, it ends by itself: %s", stored.file.name, error, extra={"event": "upload_left"}
            )
        else:
            self._place_is_free()

    def _place_is_free(self) -> None:
        if self._room is not None:
            self._room += 1
        self._admit()

    def _why_late(self, attachment: Attachment) -> EvoLinkError:
        troubles = [stored.trouble for stored in attachment._held.values() if stored.trouble is not None]
        if troubles:
            return copy.copy(troubles[0])
        what = "were not uploaded in time"
        if attachment in self._line:
            if self._room is None:
                return ConnectionFailedError("no answer of the files service within the timeout; nothing was sent")
            what = "found no place at the files service in time: the account's are taken (see client.files.quota)"
        return NotSubmittedError(f"nothing was sent for this request: its local files {what}")


class _Borrower:
    """Follows the task of a single call, whose files it needs."""

    def __init__(self, home: Attachments, attachment: Attachment) -> None:
        self._home = home
        self._attachment = attachment

    def seen(self, reading: TaskReading) -> None:
        pass

    def ended(self, task: Task) -> None:
        self._home.release(self._attachment)

    def lost(self, error: EvoLinkError) -> None:
        self._home.release(self._attachment, keep=True)

    def crashed(self, error: BaseException) -> None:
        self._home.release(self._attachment, keep=True)


def _looked_at(place: str, source: LocalFile) -> Content:
    """Blocks. Raises `InvalidRequestError` for what the service would refuse there."""
    try:
        with contextlib.closing(SourceFile(source)) as opened:
            content = opened.look(None)
        kind, wanted = kind_of(content.ending), _wanted_kind(place)
        # Of video and audio one may be in the other's clothes.
        if wanted is not None and kind != wanted and "image" in (kind, wanted):
            raise InvalidRequestError(f"{content.name!r} holds {kind}, where {wanted} is wanted")
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{place}: {error.message}", param=_param(place)) from error.__cause__
    return content


def _wanted_kind(place: str) -> str | None:
    name = re.sub(r"\[\d+\]$", "", place).rpartition(".")[2]
    for word, kind in (("video", "video"), ("audio", "audio"), ("image", "image"), ("mask", "image")):
        if word in name:
            return kind
    return None


def _param(place: str) -> str:
    return re.split(r"[.\[]", place, maxsplit=1)[0]


def _renamed(content: Content) -> Content:
    """With a name that nobody else's upload has."""
    stem = content.name.rpartition("-")[0]
    return dataclasses.replace(content, name=unique_name(stem, secrets.token_hex(8), content.ending))


def _of_parameter(error: EvoLinkError, attachment: Attachment, digest: str) -> EvoLinkError:
    """An error of its own for each who hears of it, with the parameter where the file stands."""
    places = [place for place, content in attachment._content_at.items() if content.digest == digest]
    told = copy.copy(error)
    if isinstance(told, InvalidRequestError | APIStatusError) and told.param is None:
        told.param = _param(places[0])
    return told


def _ours(trouble: BaseException) -> EvoLinkError:
    if isinstance(trouble, EvoLinkError):
        return trouble
    logger.error(
        "local files failed inside this library: %s",
        type(trouble).__name__,
        exc_info=trouble,
        extra={"event": "internal_error"},
    )
    fault = EvoLinkError(f"a fault of this client in handling local files: {trouble!r}; nothing was sent")
    fault.__cause__ = trouble
    return fault


def _closed() -> ClosedError:
    return ClosedError("the client was closed before this request was sent; nothing was sent")


def _resolver(future: asyncio.Future[None]) -> Told:
    def then(error: EvoLinkError | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    return then
