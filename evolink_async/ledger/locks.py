"""A lock that one process can hold, and that dies with it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
import weakref
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from evolink_async.errors import LedgerError

_LOOKS, _A_LOOK = 5, 0.01  # how often it may be `holder_of` that has it, and seconds, far more than that takes
_TRIES = 10  # each means that another process has released it in the same moment
_REFUSED = frozenset({errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK})


class FileLock:
    """An exclusive lock: a file beside the ledger, locked by the operating system, which says who holds it.

    Released by `release`, or with the process, however it ends. A forked child has no part in it.
    """

    def __init__(self, path: Path, what: str) -> None:
        """Take it at once. Raises `LedgerError`, which names the holder, if another has it."""
        self._path = path
        self._what = what
        self._file: FileIO | None = self._take()
        _held.add(self)

    def release(self) -> None:
        """Let another have it."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                if self._is_there(file):  # else it was deleted, and may be another's now
                    os.unlink(self._path)  # still locked, so nobody else holds this very file
            file.close()

    def _take(self) -> FileIO:
        for _ in range(_TRIES):
            try:
                file = FileIO(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            except OSError as error:
                raise LedgerError(f"cannot write beside the ledger, {self._path.name!r}: {error.strerror}") from error
            try:
                if not _lock(file) and not _lock_after_looks(file):
                    raise LedgerError(
                        f"{self._what} is in use{by(_holder(file))}; other jobs in the same file are free"
                    )
                if not self._is_there(file):
                    file.close()  # its former holder has removed it since we opened it
                    continue
                self._refuse_if_worthless()
                file.truncate(0)
                file.write(json.dumps(myself()).encode())
            except OSError as error:
                file.close()
                message = f"{self._what} cannot be locked on this file system ({error.strerror}): use a local disk"
                raise LedgerError(message) from error
            except BaseException:
                file.close()
                raise
            return file
        raise LedgerError(f"{self._what} is in use: its lock file comes and goes")

    def _is_there(self, file: FileIO) -> bool:
        try:
            there, mine = os.stat(self._path), os.fstat(file.fileno())
        except FileNotFoundError:
            return False
        return (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)

    def _refuse_if_worthless(self) -> None:
        """A lock that can be taken twice is none."""
        with FileIO(os.open(self._path, os.O_RDWR), "r+b") as second:
            if _lock(second):
                raise LedgerError(f"{self._what}: locks do not work on this file system; use a local disk")

    def _disown(self) -> None:
        """In a forked child: the lock is the parent's, and must not live on with the child."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _disown_all() -> None:
    for lock in list(_held):
        lock._disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)

if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 30  # a byte that nobody writes to: a locked one could not be read by who wants to know the holder

    def _lock(file: FileIO) -> bool:
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in _REFUSED:
                return False
            raise
        finally:
            file.seek(0)
        return True

else:
    import fcntl

    def _lock(file: FileIO) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _REFUSED:
                return False
            raise
        return True


def _lock_after_looks(file: FileIO) -> bool:
    """Another has it. If only to see whether somebody has it, it is soon free."""
    for _ in range(_LOOKS):
        time.sleep(_A_LOOK)
        if _lock(file):
            return True
    return False


def holder_of(path: Path) -> str | None:
    """Who holds the lock of this file, in words; None: nobody does."""
    try:
        file = FileIO(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return None
    with file:
        return None if _lock(file) else _holder(file) or "another process"


def myself() -> dict[str, object]:
    """Who holds a lock, to be written down for others."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now}


def told_holder(text: str | bytes) -> str:
    """Who holds a lock, in words, of what `myself` has written down; empty if it can't be told."""
    try:
        told = json.loads(text)
        pid, host, since = int(told["pid"]), str(told["host"]), str(told["since"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    who = "this process" if pid == os.getpid() and host == socket.gethostname() else f"process {pid} on {host}"
    return f"{who} since {since}"


def by(holder: str) -> str:
    """The part of a sentence that names a holder, if it is known."""
    return holder and f" by {holder}"


def _holder(file: FileIO) -> str:
    """Who holds the lock, as far as the file tells."""
    try:
        file.seek(0)
        return told_holder(file.read(1000))
    except OSError:
        return ""
