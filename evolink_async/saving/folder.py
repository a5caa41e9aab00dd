"""Files in a folder: written under a temporary name, made visible whole, never over another file.

Everything here blocks, except `in_thread`, which is how it is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from evolink_async.errors import DownloadError
from evolink_async.saving.content import CONTENT_TYPES, HEAD, is_whole, sniff

T = TypeVar("T")

_BLOCK = 1024 * 1024
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})
# `O_NOFOLLOW` and `O_BINARY` don't exist everywhere.
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Call `function` in a thread. Cancelled, it waits for the call to end first: a file is not closed under it."""
    call: asyncio.Future[T] = asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *args))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([call])
        if not call.cancelled():
            call.exception()  # looked at, so that asyncio doesn't complain
        raise


class PartFile:
    """A file under a random temporary name, on its way to its own. Making the object touches nothing yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f".evolink-{secrets.token_hex(8)}.part"
        self._opened: FileIO | None = None
        self.size = 0
        self.head = b""

    def open(self) -> None:
        """Make the file, and the folder if it is missing: proof that it can be written to."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._opened = FileIO(os.open(self._path, _CREATE, 0o666), "r+b")

    @property
    def _file(self) -> FileIO:
        assert self._opened is not None
        return self._opened

    def write(self, data: bytes) -> None:
        """Append."""
        if len(self.head) < HEAD:
            self.head += data[: HEAD - len(self.head)]
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]
        self.size += len(data)

    def restart(self) -> None:
        """Forget what was written."""
        self._file.seek(0)
        self._file.truncate()
        self.size = 0
        self.head = b""

    def looks_whole(self, ending: str) -> bool:
        """Whether what was written ends as a file of this type does."""
        try:
            return is_whole(cast(BinaryIO, self._file), ending)
        finally:
            self._file.seek(0, os.SEEK_END)

    def publish(self, name: str) -> Path:
        """Give the file its name, durably: the path. A file of that name and the same content is kept as it is.

        Raises `DownloadError` if another file has the name; that one isn't touched.
        """
        final = self._folder / name
        if final.name != name or name == ".." or final.parent != self._folder:
            raise DownloadError(f"{name!r} is no name for a file in {str(self._folder)!r}")
        os.fsync(self._file.fileno())
        self._file.close()
        try:
            _move(self._path, final)
        except FileExistsError:
            if not _same_content(self._path, final):
                raise DownloadError(
                    f"another file is there already: {str(final)!r}; it was not touched: "
                    "move it away or save into another folder"
                ) from None
            self.discard()
        else:
            _sync_folder(self._folder)
        return final

    def discard(self) -> None:
        """Close and remove what is there. Never fails, can be repeated, is over at once."""
        with contextlib.suppress(OSError):
            if self._opened is not None:
                self._opened.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def find_whole(folder: Path, stem: str) -> Path | None:
    """The file `stem`.* that an earlier run has saved: of the type that its extension says, and complete."""
    for ending in CONTENT_TYPES:
        path = folder / f"{stem}.{ending}"
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                continue
            with path.open("rb") as file:
                if sniff(file.read(HEAD)) == ending and is_whole(file, ending):
                    return path
        except OSError:
            continue
    return None


def _move(source: Path, target: Path) -> None:
    """Rename, but raise `FileExistsError` rather than replace anything."""
    if os.name == "nt":
        source.rename(target)  # there it replaces nothing
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: take the name first, then put the file there.
        os.close(os.open(target, _CREATE, 0o666))
        try:
            source.replace(target)
        except BaseException:
            target.unlink()
            raise
    else:
        source.unlink()


def _same_content(one: Path, other: Path) -> bool:
    try:
        details = other.lstat()
        if not stat.S_ISREG(details.st_mode) or details.st_size != one.stat().st_size:
            return False
        return _digest(one) == _digest(other)
    except OSError:
        return False


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hash_of(file)[0]


def hash_of(file: BinaryIO, most: int | None = None) -> tuple[bytes, int]:
    """SHA-256 and length of what is left of a file; reading ends once it is longer than `most` bytes."""
    digest = hashlib.sha256()
    size = 0
    while (most is None or size <= most) and (block := file.read(_BLOCK)):
        digest.update(block)
        size += len(block)
    return digest.digest(), size


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut, where the system lets us."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
