"""`client.files`: what the service needs links to, uploaded."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import random
import re
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, cast
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field

from evolink_async.checks import checked_seconds
from evolink_async.errors import (
    APIStatusError,
    ConnectionFailedError,
    EvoLinkError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    ResponseError,
)
from evolink_async.http.answers import Answer, hint_of, read_json, status_error
from evolink_async.http.exchange import AnswerLost, NotSent
from evolink_async.http.retry import RETRIED_READ_STATUSES
from evolink_async.requests import encode_json
from evolink_async.saving.folder import in_thread
from evolink_async.saving.upload import Content, MultipartBody, Source, SourceFile, is_link, name_for_link
from evolink_async.types import UploadedFile

if TYPE_CHECKING:
    from evolink_async.core import ClientCore
    from evolink_async.http.gate import Lane
    from evolink_async.session import Options, Session

__all__ = ["FileQuota", "Files"]

logger = logging.getLogger("evolink_async.saving")

UPLOAD_SECONDS = 120.0  # one exchange
READ_SECONDS = 15.0
LIFETIME = timedelta(hours=72)  # documented
PAGE = 100
REMEMBERED = 256  # links of uploads that are used again for the same content
WORTH_USING = timedelta(hours=1)  # a link must live longer than that to be used again
STORAGE_PAUSE = 60.0  # seconds; documented for code 50001: "retry after 1 min"

_PATH = "/api/v1/files"
_FILE_ID = re.compile(r"[A-Za-z0-9._:-]{1,256}", re.ASCII)
_STATUS_OF_CODE = {40001: 413, 40002: 415, 40003: 403, 40004: 400}
_ADVICE_OF_CODE = {
    40003: "The account's place for files is full: remove some with client.files.delete; each ends after 72 h anyway",
    40004: "The service could not fetch the link: is it public, and does it lead to the file itself?",
}


class FileQuota(BaseModel):
    """How many files the account has, may have, and may still add. Since 0.1.0."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    used: int
    limit: int
    remaining: int
    raw: dict[str, Any] = Field(default_factory=dict, repr=False)


class Files:
    """`client.files`: uploads to EvoLink's files service, which make links for `image_urls` and the like.

    Uploads are free and live for 72 hours. An error of this service is an `APIStatusError` with its `code`: 40001
    (too large) and 40002 (type) are `BadRequestError`, 40004 (link not fetched) too, 40003 (too many files) is
    `PermissionDeniedError`, since it is no matter of credits, and 5xxxx are `ServerError`. Codes: documented, the
    classes are our choice. Since 0.1.0.
    """

    def __init__(self, core: ClientCore) -> None:
        self._core = core
        self._uploaded = core.memory.uploaded

    async def upload(self, source: Source, *, name: str | None = None, timeout: float | None = 600) -> UploadedFile:
        """Upload an image, video or audio file: its `.url` can be given to models for 72 hours.

        source: a path, bytes, a binary file (read from where it stands, not closed), or an http(s) link that the
            service fetches itself; a `str` that begins with http:// or https:// is a link, any other is a path.
        name: a file name to begin ours with. The service overwrites files of equal name, so a hash is always added.
        timeout: seconds in all, retries included; None: for ever. One exchange has 120 s, or `request_timeout`.

        At most 100 MB. Files are streamed, whatever their size; only a file object that cannot seek is held in memory.
        The same content uploaded again by the same client gives the same link while that has an hour to live.
        An upload costs nothing and repeating it changes nothing, so it is tried again until `timeout`.
        Raises `InvalidRequestError` for what is no media file, empty or too large, before anything is sent; an
        `APIStatusError` (see `Files`); `ConnectionFailedError`. Cancelling it may leave the file at the service.
        """
        if name is not None and not (isinstance(name, str) and name):
            raise InvalidRequestError(f"name must be a text that isn't empty, got {name!r}", param="name")
        if is_link(source):
            link = str(source)
            call = Call("POST", "/upload/url", {"file_url": link, "file_name": name_for_link(link, name)})
            file = _uploaded(await self._call(call, timeout))
            self._core.memory.note_upload(file.url, link)
            return file
        with contextlib.closing(SourceFile(source)) as held:
            content = await in_thread(held.look, name)
            known = self._remembered(content.digest)
            if known is not None:
                return known
            file = _uploaded(await self._call(Call("POST", "/upload/stream", form=MultipartBody(content)), timeout))
            logger.debug("uploaded %s (%d bytes)", file.name, content.size)
            self._remember(content, file)
            return file

    async def list(self, *, timeout: float | None = 60) -> AsyncIterator[UploadedFile]:
        """The account's files, as an async iterator. timeout: seconds for each page of 100.

        The endpoint is in the vendor's client, not in the public pages; its rows carry no links.
        """
        seen: set[str] = set()
        page = 1
        while True:
            query = urlencode({"page": page, "pageSize": PAGE})
            data = await self._call(Call("GET", f"/list?{query}"), timeout)
            rows = data.get("files")
            if not isinstance(rows, list):
                raise ResponseError("the answer about files is not a page of files")
            fresh = [file for file in map(_row, rows) if file.id not in seen]
            seen = {file.id for file in fresh}  # pages shift while files are added
            for file in fresh:
                yield file
            if len(rows) < PAGE:
                return
            page += 1

    async def quota(self, *, timeout: float | None = 60) -> FileQuota:
        """How many files the account may still add. timeout: seconds in all.

        The endpoint is in the vendor's client, not in the public pages.
        """
        return _quota(await self._call(Call("GET", "/quota"), timeout))

    async def delete(self, file: UploadedFile | str, *, timeout: float | None = 60) -> None:
        """Delete a file, given itself or its id. timeout: seconds in all.

        Raises `NotFoundError` for an id that the service doesn't know. The endpoint is in the vendor's client, not
        in the public pages.
        """
        file_id = file.id if isinstance(file, UploadedFile) else file
        if not isinstance(file_id, str) or not _FILE_ID.fullmatch(file_id) or not file_id.strip("."):
            raise InvalidRequestError(f"no file id: {file_id!r}", param="file")
        for digest in [digest for digest, known in self._uploaded.items() if known.id == file_id]:
            del self._uploaded[digest]
        await self._call(Call("DELETE", f"/{file_id}"), timeout)

    # Inside

    def _remembered(self, digest: str, living: timedelta = WORTH_USING) -> UploadedFile | None:
        """A file of this content whose link lives longer than that."""
        file = self._uploaded.get(digest)
        if file is None or file.expires_at - datetime.now(UTC) <= living:
            return None
        self._uploaded.move_to_end(digest)
        return file

    def _remember(self, content: Content, file: UploadedFile) -> None:
        self._core.memory.note_upload(file.url, named(content.digest))
        self._uploaded[content.digest] = file
        self._uploaded.move_to_end(content.digest)
        if len(self._uploaded) > REMEMBERED:
            self._uploaded.popitem(last=False)

    async def _call(self, call: Call, timeout: float | None) -> dict[str, Any]:
        """The data of an answer; tried again, until the time is over, as long as the trouble may pass."""
        seconds = checked_seconds(timeout, "timeout")
        session = self._core.open()
        return await session.until_closed(FilesService(session, self._core.options).persist(call, seconds))


class FilesService:
    """Calls of the files service, on one loop."""

    def __init__(self, session: Session, options: Options) -> None:
        self._exchange = session.files_exchange
        self._options = options

    async def persist(
        self, call: Call, seconds: float | None, patience: Callable[[EvoLinkError], float] = lambda trouble: math.inf
    ) -> dict[str, Any]:
        """The data of an answer; tried again, until the time is over, as long as the trouble may pass.

        patience: how many seconds a trouble is borne if the service fails or cannot be reached; if it is busy, longer.
        """
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else loop.time() + seconds
        last: EvoLinkError | None = None
        failing_since: float | None = None
        tries = 0
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    tries += 1
                    hint: float | None = None
                    try:
                        answer = await self._attempt(call)
                        refusal = _refusal(answer)
                        if refusal is None:
                            return _data(answer)
                        if call.method == "DELETE" and isinstance(refusal, NotFoundError) and tries > 1:
                            return {}  # an earlier attempt, whose answer was lost, has done it
                        if refusal.status_code not in RETRIED_READ_STATUSES:
                            raise refusal
                        last, hint = refusal, hint_of(answer)
                        if refusal.code == "50001":
                            hint = max(hint or 0.0, STORAGE_PAUSE)
                    except ConnectionFailedError as error:
                        last = error
                    seconds_borne = patience(last)
                    if isinstance(last, RateLimitError):
                        failing_since = None
                    elif failing_since is None:
                        failing_since = loop.time()
                    elif loop.time() - failing_since >= seconds_borne:
                        raise last
                    left = math.inf if deadline is None else deadline - loop.time()
                    pause = self._options.retry.delay_within(left, tries, hint, random.random())
                    if pause is None:
                        raise last
                    logger.info("files: %s; again in %.1f s", last, pause, extra={"event": "files_retried"})
                    await asyncio.sleep(pause)
        except TimeoutError:
            raise (last or ConnectionFailedError(f"no answer of the files service within {seconds:g} s")) from None

    async def _attempt(self, call: Call) -> Answer:
        options = self._options
        content, headers = call.content()
        usual = READ_SECONDS if call.lane == "read" else UPLOAD_SECONDS
        try:
            return await self._exchange.send(
                call.method,
                _PATH + call.path,
                key=await options.api_key.get(),
                lane=call.lane,
                seconds=options.request_timeout or usual,
                content=content,
                headers=headers,
            )
        except (NotSent, AnswerLost) as error:
            if isinstance(error.__cause__, EvoLinkError):  # from reading our own file
                raise error.__cause__ from None
            raise ConnectionFailedError(str(error)) from error.__cause__

    async def upload(self, form: MultipartBody, patience: Callable[[EvoLinkError], float]) -> UploadedFile:
        """Store a file; tried again for ever, but for `patience`."""
        return _uploaded(await self.persist(Call("POST", "/upload/stream", form=form), None, patience))

    async def delete(self, file_id: str, seconds: float) -> None:
        """Remove a file; one that is not there is removed."""
        with contextlib.suppress(NotFoundError):
            await self.persist(Call("DELETE", f"/{file_id}"), seconds)

    async def quota(self, seconds: float) -> FileQuota:
        """How many files the account may still add."""
        return _quota(await self.persist(Call("GET", "/quota"), seconds))


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of the files service, as often as it has to be made."""

    method: str
    path: str
    json: Mapping[str, Any] | None = None
    form: MultipartBody | None = None

    @property
    def lane(self) -> Lane:
        return "submit" if self.method == "POST" else "read"

    def content(self) -> tuple[bytes | None, dict[str, str]]:
        if self.form is not None:
            # An async iterable goes through `Exchange.send` as it is; with a Content-Length it isn't sent in chunks.
            return cast(bytes, self.form), self.form.headers
        return (None if self.json is None else encode_json(self.json)), {}


def named(digest: str) -> str:
    """What counts in the place of a link to this content, in the identity of a request."""
    return f"sha256:{digest}"


def lifetime_of(file: UploadedFile) -> float:
    """Seconds from the upload of a file to its end, both by the service's clock."""
    born = _moment(file.raw.get("upload_time"))
    return (LIFETIME if born is None else file.expires_at - born).total_seconds()


def _refusal(answer: Answer) -> APIStatusError | None:
    """The error of an answer that is none of success, with whatever status; None for success."""
    try:
        value = read_json(answer)
    except ResponseError:
        value = None
    value = value if isinstance(value, dict) else {}
    code = _count(value.get("code")) or 0
    if 200 <= answer.status < 300 and value.get("success") is not False and code < 400:
        return None
    status = _STATUS_OF_CODE.get(code) or (500 if 50000 <= code < 60000 else None)
    if status is None and not 200 <= answer.status < 300:
        status = answer.status
    if status is None:  # an error with HTTP 200: as the vendor's client reads it
        status = code if 400 <= code < 600 else 400
    error = status_error(dataclasses.replace(answer, status=status))
    advice = _ADVICE_OF_CODE.get(code)
    if advice is not None:
        error.message = f"{error.message.rstrip('. ')}. {advice}"
    return error


def _data(answer: Answer) -> dict[str, Any]:
    if not answer.body.strip():
        return {}  # to a DELETE
    value = read_json(answer)
    data = value.get("data", value) if isinstance(value, dict) else None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ResponseError("the answer of the files service is not the documented one")
    return data


def _uploaded(data: dict[str, Any]) -> UploadedFile:
    url = data.get("file_url") or data.get("download_url")
    if not is_link(url):
        raise ResponseError("the answer to an upload holds no link")
    return _file(data, str(url))


def _quota(data: dict[str, Any]) -> FileQuota:
    used, limit = _count(data.get("used_files")), _count(data.get("max_files"))
    if used is None or limit is None:
        raise ResponseError("the answer about the file quota is not the one expected")
    remaining = _count(data.get("remain_files"))
    left = max(0, limit - used) if remaining is None else remaining
    return FileQuota(used=used, limit=limit, remaining=left, raw=data)


def _row(row: object) -> UploadedFile:
    if not isinstance(row, dict):
        raise ResponseError("a row of the list of files is no object")
    url = row.get("file_url") or row.get("download_url")
    return _file(row, str(url) if is_link(url) else "")


def _file(data: dict[str, Any], url: str) -> UploadedFile:
    file_id = data.get("file_id")
    if not isinstance(file_id, str | int) or isinstance(file_id, bool) or file_id == "":
        raise ResponseError("the answer about a file holds no file_id")
    born = _moment(data.get("upload_time")) or datetime.now(UTC)
    return UploadedFile(
        id=str(file_id),
        name=_text(data.get("file_name")) or _text(data.get("original_name")),
        url=url,
        size=_count(data.get("file_size")),
        content_type=_text(data.get("mime_type")),
        expires_at=_moment(data.get("expires_at")) or born + LIFETIME,
        raw=data,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value, re.A):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18 else None


def _moment(value: object) -> datetime | None:
    """An RFC 3339 time (documented; +08:00 in the examples) as UTC."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
