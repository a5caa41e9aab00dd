"""What is to be uploaded, made ready: looked at, named, and written as a multipart body as often as need be."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from evolink_async.errors import InvalidRequestError
from evolink_async.saving.content import CONTENT_TYPES, ENDINGS, HEAD, kind_of, sniff
from evolink_async.saving.folder import hash_of, in_thread
from evolink_async.saving.names import stem_of_url

MOST_BYTES = 100 * 2**20  # vendor's skill pages: 100 MB
_BLOCK = 256 * 1024
_LONGEST_STEM = 40

Source = str | os.PathLike[str] | bytes | BinaryIO


def is_link(source: object) -> bool:
    """Whether a source is a URL: a `str` that begins with http:// or https://, in any case."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def unique_name(stem: str, tail: str, ending: str | None) -> str:
    """A name of plain characters: `{stem up to 40}-{tail}.{ending}`. The service overwrites files of equal name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem, flags=re.A)[:_LONGEST_STEM].strip("-_") or "file"
    return f"{plain}-{tail}.{ending}" if ending else f"{plain}-{tail}"


def name_for_link(link: str, name: str | None) -> str:
    """A name for what the service fetches itself; nothing is known of it but its link."""
    ending = _known_ending(name or link.partition("?")[0].partition("#")[0])
    return unique_name(_stem(name) if name else stem_of_url(link), secrets.token_hex(8), ending)


def _known_ending(name: str) -> str | None:
    ending = name.rpartition(".")[2].lower()
    return ending if ending in ENDINGS else None


def _stem(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if dot and ending.lower() in ENDINGS else name


@dataclass(frozen=True, slots=True)
class Content:
    """An open file from `start` on: `size` bytes of the type `ending`. Read as often as it is sent."""

    file: BinaryIO
    start: int
    size: int
    ending: str
    digest: str  # SHA-256, hex
    name: str  # as it will be at the service

    @property
    def content_type(self) -> str:
        return CONTENT_TYPES[self.ending]


class SourceFile:
    """A source that is a file, or becomes one: opened by `look`, closed by `close` if it was we who opened it.

    Raises `InvalidRequestError` for what cannot be one.
    """

    def __init__(self, source: Source) -> None:
        if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) and not hasattr(source, "read"):
            given = type(source).__name__
            raise InvalidRequestError(f"give a path, bytes, a binary file or an http(s) link to upload, got {given}")
        self._source = source
        self._ours: BinaryIO | None = None

    def look(self, name: str | None) -> Content:
        """Open it and read it once. Blocks. Raises `InvalidRequestError` for what the service would refuse."""
        source = self._source
        if isinstance(source, bytes | bytearray | memoryview):
            return _look(io.BytesIO(source), 0, name or "file")
        if isinstance(source, str | os.PathLike):
            self._ours = _open(source)
            return _look(self._ours, 0, name or Path(source).name)
        own_name = getattr(source, "name", None)
        name = name or (os.path.basename(own_name) if isinstance(own_name, str) else "file")
        try:
            return _look_at_object(source, name)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise InvalidRequestError(f"{name!r} could not be read: {error}") from error

    def reopen(self, known: Content) -> Content:
        """Open what was looked at and closed since. Blocks. Raises `InvalidRequestError` if its length has changed."""
        source = self._source
        if isinstance(source, bytes):
            return replace(known, file=io.BytesIO(source))
        assert isinstance(source, os.PathLike)
        self._ours = _open(source)
        if os.fstat(self._ours.fileno()).st_size != known.size:
            raise _changed(known)
        return replace(known, file=self._ours)

    def close(self) -> None:
        if self._ours is not None:
            self._ours.close()


def _changed(content: Content) -> InvalidRequestError:
    return InvalidRequestError(f"{content.name!r} has changed since it was looked at; nothing was sent, give it again")


def glance(path: str | os.PathLike[str]) -> None:
    """Raise `InvalidRequestError` for a file that the service would refuse, without reading all of it."""
    with _open(path) as file:
        _ending_of(file, 0, os.path.basename(path))
        _refuse_large(os.fstat(file.fileno()).st_size, os.path.basename(path))


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        # Not blocking, so that a pipe without a writer is found to be one.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        shown = os.fspath(path)[:200]
        raise InvalidRequestError(f"cannot read {shown!r}: {reason}; a link must begin with https://") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidRequestError(f"{os.fspath(path)!r} is no regular file")
    return os.fdopen(descriptor, "rb")


def _look_at_object(file: BinaryIO, name: str) -> Content:
    try:
        start = file.tell()
        file.seek(start)
    except (OSError, AttributeError):  # a pipe, a socket: it can be read only once, and may have to be sent twice
        data = file.read(MOST_BYTES + 1)
        if not isinstance(data, bytes):
            raise InvalidRequestError("the file must be binary: open it with mode 'rb'") from None
        return _look(io.BytesIO(data), 0, name)
    return _look(file, start, name)


def _look(file: BinaryIO, start: int, name: str) -> Content:
    """Read it once, for its type, size and hash. Raises `InvalidRequestError` for what the service would refuse."""
    ending = _ending_of(file, start, name)
    file.seek(start)
    digest, size = hash_of(file, MOST_BYTES)
    _refuse_large(size, name)
    return Content(file, start, size, ending, digest.hex(), unique_name(_stem(name), digest.hex()[:16], ending))


def _ending_of(file: BinaryIO, start: int, name: str) -> str:
    file.seek(start)
    head = file.read(HEAD)
    if not isinstance(head, bytes):
        raise InvalidRequestError("the file must be binary: open it with mode 'rb'")
    if not head:
        raise InvalidRequestError(f"{name!r} is empty")
    ending = sniff(head)
    if ending is None or kind_of(ending) is None:
        raise InvalidRequestError(f"{name!r} is no image, video or audio file of a known type")
    return ending


def _refuse_large(size: int, name: str) -> None:
    if size > MOST_BYTES:
        raise InvalidRequestError(f"{name!r} is larger than the {MOST_BYTES // 2**20} MB that the service takes")


class MultipartBody:
    """A form with one file, streamed: iterate it anew for every attempt.

    It ends only if the bytes were those of the content's digest, so nothing else is ever stored under its name.
    written: whether one attempt has given all of it, so that the file may be there.

    The name fields are sent in both spellings: camelCase in the vendor's client, with underscores in the pages.
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self.written = False
        boundary = secrets.token_hex(16)
        fields = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{content.name}\r\n'
            for field in ("fileName", "file_name")
        )
        self._before = (
            f'{fields}--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{content.name}"\r\n'
            f"Content-Type: {content.content_type}\r\n\r\n"
        ).encode("ascii")
        self._after = f"\r\n--{boundary}--\r\n".encode("ascii")
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(self._before) + content.size + len(self._after)),
        }

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._before
        done = 0
        digest = hashlib.sha256()
        while done < self._content.size:
            block = await in_thread(self._read, done, digest)
            if not block:
                raise InvalidRequestError(f"{self._content.name!r} became shorter while it was uploaded")
            done += len(block)
            if done == self._content.size and digest.hexdigest() != self._content.digest:
                raise _changed(self._content)
            yield block
        self.written = True
        yield self._after

    def _read(self, position: int, digest: hashlib._Hash) -> bytes:
        content = self._content
        try:
            content.file.seek(content.start + position)
            block = content.file.read(min(_BLOCK, content.size - position))
            digest.update(block)
            return block
        except (OSError, ValueError) as error:  # ValueError: the caller closed it
            raise InvalidRequestError(f"{content.name!r} could not be read to its end") from error
