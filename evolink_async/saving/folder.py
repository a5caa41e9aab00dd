"""Files in a folder: written under a temporary name, made visible whole, never over another file.

Everything here blocks, except `in_thread`, which is how it is called.

A file has its own name only when it is whole and on the disk: written as `.evolink-<16 hex>.part` in the same folder,
synced, given its name by a hard link (which fails where there is something), the folder synced. Whoever is killed
leaves a `.part` file behind. While one is in use it is locked; the next process that saves into the folder removes
those that nobody holds.

Where the file system keeps such things, a file carries a mark, `user.evolink.result` = `<task id>/<n>/<size>`: which
result it is. It tells a program that was killed before it could write down what it had saved that this is it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, FileIO
from pathlib import Path, PurePath
from typing import BinaryIO, TypeVar, cast

from evolink_async.errors import DownloadError
from evolink_async.saving.content import CONTENT_TYPES, ENDINGS, HEAD, TELLING, is_whole, sniff

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

THREADS = 16
MARK = "user.evolink.result"
_BLOCK = 1024 * 1024
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL = _NO_ROOM | {errno.EFBIG}
_TOO_MANY_OPEN = frozenset({errno.EMFILE, errno.ENFILE})
# `O_NOFOLLOW` and `O_BINARY` don't exist everywhere.
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_PART = ".evolink-", ".part"
_ENDINGS = (*CONTENT_TYPES, *sorted(ENDINGS - CONTENT_TYPES.keys()))


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Call `function` in a thread. Cancelled, it waits for the call to end first: a file is not closed under it."""
    loop = asyncio.get_running_loop()
    call: asyncio.Future[T] = loop.run_in_executor(_threads(os.getpid(), "disk"), functools.partial(function, *args))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([call])
        if not call.cancelled():
            call.exception()  # looked at, so that asyncio doesn't complain
        raise


async def in_thread_alone(afterwards: Callable[[], object], function: Callable[..., T], *args: object) -> T:
    """Call `function`, which may take minutes, in a thread. Cancelled, the call goes on alone, or doesn't begin.

    afterwards: called in the end in any case, in any thread.
    """
    call = _threads(os.getpid(), "uploads").submit(function, *args)
    call.add_done_callback(lambda _: afterwards())
    return await asyncio.wrap_future(call)


@functools.lru_cache(maxsize=2)
def _threads(process: int, purpose: str) -> ThreadPoolExecutor:
    """Threads of our own: the loop's look up hosts for everybody, and must not queue behind a slow disk."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix=f"evolink {purpose}")


class _Room:
    """Disk space that running downloads were told they will need, by device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._promised: Counter[int] = Counter()

    def promise(self, device: int, folder: Path, size: int) -> None:
        """Raise `DownloadError` unless there is room for so many bytes beside what is promised to others."""
        with self._lock:
            others = self._promised[device]
            free = shutil.disk_usage(folder).free
            if size > free - others:
                taken = f", {others / 1e6:.1f} MB of them for other downloads" if others else ""
                raise DownloadError(
                    f"not enough space in {str(folder)!r}: {size / 1e6:.1f} MB are needed, "
                    f"{free / 1e6:.1f} MB are free{taken}; make room and save again"
                ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._promised[device] += size

    def give_back(self, device: int, size: int) -> None:
        with self._lock:
            self._promised[device] -= size


_room = _Room()


class PartFile:
    """A file under a random temporary name, on its way to its own. Making the object touches nothing yet.

    size, head: of all that was added, which may be in memory still.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder
        self._opened: FileIO | None = None
        self._device = 0
        self._pending: list[bytes] = []
        self._promised = 0
        self.pending = 0  # bytes added and not written yet
        self.size = 0
        self.head = b""

    def open(self) -> None:
        """Make the file, and the folder if it is missing: proof that it can be written to."""
        while self._opened is None:
            self.path = self.folder / secrets.token_hex(8).join(_PART)
            try:
                descriptor = os.open(self.path, _CREATE, 0o666)
            except FileNotFoundError:
                self.folder.mkdir(parents=True, exist_ok=True)
                continue
            self._opened = FileIO(descriptor, "r+b")
            # Somebody who cleans up may have found it before it was locked.
            if _lock(descriptor) is False or os.fstat(descriptor).st_nlink == 0:
                self.discard()
                self._opened = None
        self._device = os.fstat(self._file.fileno()).st_dev

    @property
    def _file(self) -> FileIO:
        assert self._opened is not None
        return self._opened

    def promise(self, size: int) -> None:
        """So many more bytes will come. Raises `DownloadError` if there is no room for them."""
        self._break_promise()
        _room.promise(self._device, self.folder, size)
        self._promised = size

    def add(self, data: bytes) -> None:
        """Append, in memory first."""
        if len(self.head) < HEAD:
            self.head += data[: HEAD - len(self.head)]
        self._pending.append(data)
        self.pending += len(data)
        self.size += len(data)

    def flush(self) -> None:
        """Write what was added."""
        pending, self._pending = self._pending, []
        self.pending = 0
        for data in pending:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) or 0 :]
        kept = min(self._promised, sum(map(len, pending)))
        _room.give_back(self._device, kept)
        self._promised -= kept

    def restart(self) -> None:
        """Forget what was added."""
        self._pending.clear()
        self._break_promise()
        self._file.seek(0)
        self._file.truncate()
        self.pending = self.size = 0
        self.head = b""

    def _break_promise(self) -> None:
        promised, self._promised = self._promised, 0
        _room.give_back(self._device, promised)

    @property
    def is_in_memory(self) -> bool:
        """Whether nothing of it is written yet."""
        return self.pending == self.size

    def looks_whole(self, ending: str) -> bool:
        """Whether what was added ends as a file of this type does. Doesn't block if all of it is in memory."""
        if self.is_in_memory:
            return is_whole(BytesIO(b"".join(self._pending)), ending)
        self.flush()
        try:
            return is_whole(cast(BinaryIO, self._file), ending)
        finally:
            self._file.seek(0, os.SEEK_END)

    def finish(self, mark: str | None) -> None:
        """Bring it all to the disk."""
        self.flush()
        if mark is not None:
            set_mark(self._file.fileno(), f"{mark}/{self.size}")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more is added."""
        self._file.close()

    def let_go(self) -> None:
        """It has a name of its own now: nothing is left to discard."""
        self._file.close()
        self._opened = None

    def discard(self) -> None:
        """Close and remove what is there. Never fails, can be repeated, is over at once."""
        self._break_promise()
        if self._opened is None:
            return
        steps = self.path.unlink, self._opened.close
        for step in reversed(steps) if os.name == "nt" else steps:  # there an open file cannot be removed
            with contextlib.suppress(OSError):
                step()


class Folder:
    """A directory that results are saved into. Making the object touches nothing yet."""

    def __init__(self, given: Path) -> None:
        self.lingers = False
        self._given = given  # the paths that are told begin as the caller's does
        self.part_folder = Path(os.path.abspath(given))

    def __str__(self) -> str:
        return repr(str(self._given))

    def prepare(self) -> None:
        """Make it, and remove what killed processes have left. Raises `OSError` if it cannot be written to."""
        _prepared.cache_clear()
        self.case_matters()

    def case_matters(self) -> bool:
        """Whether names that differ in case are different here. `prepare`, unless that was done in this process."""
        return _prepared(self.part_folder, os.getpid())

    def find(self, stem: str, result: str | None, *, by_name: bool, kind: str | None = None) -> Path | None:
        """The file `stem`.* that holds this result and is whole.

        by_name: the name alone proves that it is the result; else its mark has to.
        """
        start = os.path.join(self.part_folder, stem)
        for ending in _ENDINGS:
            if not os.path.lexists(f"{start}.{ending}"):
                continue
            path = Path(f"{start}.{ending}")
            mark = _whole_mark(path, ending)
            if mark is not None and (mark == result or (by_name and not mark and ending in CONTENT_TYPES)):
                return self._given / path.name
        return None

    def kept(self, file: PurePath, result: str) -> Path | None:
        """Where this file, which an earlier run has saved as this result, is now, if it is whole; in whatever folder.

        Its folder may have been moved or copied, and the copy have no marks: where the recorded path leads to nothing,
        or to another result by now, the file of that name in this folder is it, unless its mark says otherwise.
        """
        for path, told in ((Path(file), Path(file)), (self.part_folder / file.name, self._given / file.name)):
            mark = _whole_mark(path, path.suffix.removeprefix("."))
            if mark is not None and mark in ("", result):
                return told
            if mark is None and os.path.lexists(path):
                return None  # cut, or no file of ours: fetched again
        return None

    def publish(self, part: PartFile, name: str, result: str | None) -> Path:
        """Give the file its name, durably: the path. A file of that name and the same content is kept as it is.

        Raises `DownloadError` if another file has the name; that one isn't touched.
        """
        final = self.part_folder / name
        if final.name != name or name == ".." or final.parent != self.part_folder:
            raise DownloadError(f"{name!r} is no name for a file in {self}")
        part.finish(result)
        if os.name == "nt":
            part.close()  # there an open file cannot be renamed
        try:
            _move(part.path, final)
        except FileExistsError:
            if not _same_content(part.path, final):
                raise DownloadError(
                    f"another file is there already: {str(self._given / name)!r}; it was not touched: "
                    "move it away or save into another folder"
                ) from None
            part.discard()
        else:
            part.let_go()
            _sync_folder(self.part_folder)
        return self._given / name


@functools.lru_cache(maxsize=64)
def _prepared(folder: Path, process: int) -> bool:
    part = PartFile(folder)
    try:
        part.open()
        twin = part.path.with_name(part.path.name.upper())
        case_matters = not twin.exists()
        remove_leftovers(folder)
    finally:
        part.discard()
    return case_matters


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that are gone."""
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(_PART[0]) and entry.name.endswith(_PART[1])]
    for path in found:
        with contextlib.suppress(OSError):
            if os.name == "nt":
                os.unlink(path)  # fails for one that is open
                continue
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(descriptor):
                    os.unlink(path)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Mark an open file as in use: False if somebody else has, None where there are no locks.

    Gone with the process, whatever ends it.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _whole_mark(path: Path, ending: str) -> str | None:
    """Which result a file is, "" if it doesn't tell; None if it is no whole file of the type that its name says."""
    try:
        details = path.lstat()
        if not stat.S_ISREG(details.st_mode) or details.st_size == 0:
            return None
        result, _, size = read_mark(path).rpartition("/")
        if result and size == str(details.st_size):
            return result
        with path.open("rb") as file:
            if ending in CONTENT_TYPES and sniff(file.read(HEAD)) != ending:
                return None
            # A mark with another size: somebody worked on it, or cut it. Only some types tell which.
            if not is_whole(file, ending) or (result and ending not in TELLING):
                return None
            return result
    except OSError:
        return None


def read_mark(path: Path) -> str:
    """The mark of a file, "" if it has none."""
    if not hasattr(os, "getxattr"):
        return ""
    try:
        return os.getxattr(path, MARK, follow_symlinks=False).decode("ascii", "replace")
    except OSError:
        return ""


def set_mark(file: int | Path, mark: str) -> None:
    """Mark a file, where the file system can."""
    if hasattr(os, "setxattr"):
        with contextlib.suppress(OSError):
            os.setxattr(file, MARK, mark.encode("ascii"))


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
        # A file system without hard links. Look and rename are two steps, so one process of ours at a time; never a
        # placeholder under the final name, which a crash would leave there.
        with _locked(target.parent):
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "File exists", str(target)) from None
            source.rename(target)
    else:
        source.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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


def is_full(error: OSError) -> bool:
    """Whether it says that no more can be written."""
    return error.errno in _FULL


def lacks_room(problem: DownloadError) -> bool:
    """Whether there was no room for a file, on the disk or among the open ones, as there may be later."""
    return isinstance(problem.__cause__, OSError) and problem.__cause__.errno in _NO_ROOM | _TOO_MANY_OPEN


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
