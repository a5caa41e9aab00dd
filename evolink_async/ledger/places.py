"""Where a ledger lies: from what the caller gave to a file that locks can be trusted on, or to a server."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode

from evolink_async.errors import ConfigurationError, LedgerError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))
_MOUNTS = "/proc/self/mountinfo"

# File systems that lie on another machine or behind a program: others may see the same file, or there is no shared
# memory as SQLite's WAL needs it. Of those behind a program only the known local ones are trusted.
_REMOTE = re.compile(r"nfs\d?|cifs|smb\d?|smbfs|afs|9p|ncpfs|ceph|glusterfs|lustre|beegfs|orangefs|pvfs2|fuse\..+")
_LOCAL_FUSE = re.compile(r"fuse\.(fuse-overlayfs|gocryptfs|encfs|cryfs|mergerfs|bindfs|veracrypt|ext\d|exfat|ntfs.*)")


@dataclass(frozen=True, slots=True)
class Server:
    """A ledger in PostgreSQL. As text it is shown, without secrets; `url` is what the caller gave."""

    url: str = field(repr=False)
    shown: str
    has_secret: bool

    def __str__(self) -> str:
        return self.shown


Place = Path | Server


def ledger_place(url: str | os.PathLike[str]) -> Place:
    """The file or server that `ledger=` names. Raises `ConfigurationError` for what names none."""
    if re.match(r"\s*postgres(ql)?:/", str(url), re.IGNORECASE):
        if isinstance(url, str):
            return _server(url.strip())
        raise ConfigurationError("the URL of a ledger in PostgreSQL is given as a str, not as a path")
    return ledger_path(url)


def ledger_path(url: str | os.PathLike[str]) -> Path:
    """The file that `ledger=` names. Raises `ConfigurationError` for what names none."""
    try:
        text: str | None = os.fspath(url)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise ConfigurationError(f"a ledger is named by a path such as 'job.db', got {type(url).__name__}")
    scheme = _SCHEME.match(text)
    if scheme:
        raise ConfigurationError(
            f"a ledger is named by a path such as 'job.db' or a postgresql:// URL, not by a {scheme[1]}:// URL"
        )
    if not text.strip() or "\0" in text or text == ":memory:":
        raise ConfigurationError(f"a ledger is named by a path such as 'job.db', got {text!r}")
    if text.endswith(_SEPARATORS):
        raise ConfigurationError(f"a ledger is a file such as {os.path.join(text, 'job.db')!r}, got a folder: {text!r}")
    return Path(os.path.realpath(text))


def _server(url: str) -> Server:
    try:
        from psycopg import Error, pq
    except ImportError as error:
        raise ConfigurationError(
            f"a ledger in PostgreSQL needs psycopg ({error}): pip install 'evolink-async[cluster]'"
        ) from error
    _, separator, rest = url.partition("://")
    url = f"postgresql://{rest}"
    try:
        if not separator or "\0" in url:
            raise ValueError
        options = [option for option in pq.Conninfo.parse(url.encode()) if option.val is not None]
        values = {option.keyword.decode(): (option.val or b"").decode() for option in options}
        for port in filter(None, values.get("port", "").split(",")):
            int(port)
    except (Error, ValueError):  # its message may quote the password
        raise ConfigurationError(
            "a ledger in PostgreSQL is named by a URL such as postgresql://user@host:5432/database; this one cannot be "
            "read (in a user or a password, write what is no letter or digit as %XX)"
        ) from None
    secrets = {option.keyword.decode() for option in options if option.dispchar == b"*"}
    return Server(url, _shown({name: values[name] for name in values if name not in secrets}), bool(secrets))


def _shown(values: dict[str, str]) -> str:
    """The URL of a server, of its parameters."""
    user, name = quote(values.pop("user", ""), safe=""), quote(values.pop("dbname", ""), safe="")
    address = ""
    if "," not in values.get("host", "") + values.get("port", ""):
        host, port = values.pop("host", ""), values.pop("port", "")
        address = f"[{host}]" if ":" in host else quote(host, safe="")
        address += f":{port}" if port else ""
    more = f"?{urlencode(values, quote_via=quote)}" if values else ""
    return f"postgresql://{user}{'@' if user else ''}{address}/{name}{more}"


def refuse_remote(path: Path) -> None:
    """Raise `LedgerError` if the file lies, or would lie, on a file system that is known not to be this machine's."""
    kind = _kind_of_place(path)
    if kind is not None:
        raise LedgerError(
            f"the ledger {str(path)!r} would lie on a {kind} file system, where its locks cannot be trusted: "
            "put it on a disk of this machine"
        )


def _kind_of_place(path: Path) -> str | None:
    """The kind of remote file system, None if there is no sign of one."""
    if sys.platform == "win32":
        return _windows_share(path)
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as mounts:
            kind = file_system_of(str(path), mounts.read())
    except OSError:
        return None  # not Linux: the check of locks and of the WAL has to do
    if kind is None or _LOCAL_FUSE.fullmatch(kind) or not _REMOTE.fullmatch(kind):
        return None
    return kind


def file_system_of(path: str, mountinfo: str) -> str | None:
    """The type of the file system that holds an absolute path, after the text of /proc/self/mountinfo."""
    best, kind = -1, None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of two mounts on one point the later one counts
            best, kind = len(point), right.split(" ")[0]
    return kind


if sys.platform == "win32":

    def _windows_share(path: Path) -> str | None:
        import ctypes

        remote = 4  # DRIVE_REMOTE
        if path.drive.startswith("\\\\") or ctypes.windll.kernel32.GetDriveTypeW(path.drive + "\\") == remote:
            return "network"
        return None
