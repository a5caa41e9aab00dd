"""The files API: uploads by base64, multipart and link; list, quota, deletion. No I/O; the time is passed in.

Facts from the documentation and the vendor's client: paths, fields, codes, limits, 72 hours, and that an upload
overwrites a file of the same name. Guesses: errors come with HTTP 400 (``with_200`` makes it the 200 that the
vendor's client reckons with), and a file that overwrites another gets a new id.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from .queries import LAST_PAGE, whole

Json = dict[str, Any]

PREFIX = "/api/v1/files/"
LINKS = "/files/"
RECEIPTS = "upload-receipts/"
_CALLS = {"upload/base64": "POST", "upload/stream": "POST", "upload/url": "POST", "list": "GET", "quota": "GET"}
LIFETIME = 72 * 3600.0  # emulated seconds
MOST_BYTES = 100 * 1024 * 1024
BODY_LIMIT = 140 * 1024 * 1024  # of an upload's HTTP body: base64 takes four bytes for three
MOST_FILES = 100
_LARGEST_PAGE = 100
_BEIJING = timezone(timedelta(hours=8))  # as in the documented examples

# What names must look like, in patterns that mean the same in Python and in JSON Schema.
FILE_NAME = r"(?!\.\.$)[^/\\\x00-\x1f]{0,255}"
FOLDER = r"(?!(.*/)?\.\.(/|$))[^\\\x00-\x1f]*"

# Magic bytes: offset, bytes, type.
_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (8, b"WAVE", "audio/wav"),
    (0, b"OggS", "audio/ogg"),
    (0, b"fLaC", "audio/flac"),
    (0, b"ID3", "audio/mpeg"),
    (0, b"\xff\xfb", "audio/mpeg"),
    (0, b"\xff\xf3", "audio/mpeg"),
    (0, b"\x1aE\xdf\xa3", "video/webm"),
    (8, b"qt  ", "video/quicktime"),
    (4, b"ftyp", "video/mp4"),
)
TYPES = tuple(dict.fromkeys(content_type for _, _, content_type in _MAGIC))


@dataclass(frozen=True, slots=True)
class FileRefusal:
    """The files API says no."""

    code: int
    message: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An uploaded file. Times are seconds on the service's clock."""

    id: str
    name: str
    original_name: str
    folder: str
    content: bytes
    content_type: str
    uploaded: float
    expires: float

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}" if self.folder else self.name

    def as_json(self, links_at: str) -> Json:
        link = f"{links_at}{LINKS}{quote(self.path)}"
        return {
            "file_id": self.id,
            "file_name": self.name,
            "original_name": self.original_name,
            "file_size": len(self.content),
            "mime_type": self.content_type,
            "upload_path": self.folder,
            "file_url": link,
            "download_url": link,
            "upload_time": _rfc3339(self.uploaded),
            "expires_at": _rfc3339(self.expires),
        }

    def as_row(self) -> Json:
        return {
            "file_id": self.id,
            "file_name": self.name,
            "file_size": len(self.content),
            "upload_time": _rfc3339(self.uploaded),
        }


class FileStore:
    """One account's files. ``fetch`` gives the content behind a link of the emulator itself, by its path."""

    def __init__(
        self, fetch: Callable[[str, float], bytes | None] = lambda *_: None, *, speed: float = 1.0, seed: int = 0
    ) -> None:
        self.fetch = fetch
        self._lifetime = LIFETIME / speed
        self._seed = seed
        self._files: dict[str, StoredFile] = {}  # by path, the oldest first
        self._receipts: dict[str, StoredFile] = {}  # by upload id
        self.max_files = MOST_FILES
        self.max_bytes = MOST_BYTES
        self.with_200 = False
        self.uploads = 0
        self.overwritten = 0

    # --- the calls --------------------------------------------------------------------------------------------

    def upload_base64(self, body: object, now: float) -> StoredFile | FileRefusal:
        """base64_data (a data URL or bare), upload_path, file_name."""
        fields = _fields(body, "base64_data")
        if isinstance(fields, FileRefusal):
            return fields
        text = fields["base64_data"]
        if text.startswith("data:"):
            text = text.partition(",")[2]
        try:
            content = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            return FileRefusal(400, "base64_data is not valid base64.")
        return self._store(content, fields["file_name"], "", fields["upload_path"], now)

    def upload_form(self, content_type: str, body: bytes, now: float) -> StoredFile | FileRefusal:
        """A multipart form: file, and the name fields in either spelling."""
        parts = read_form(content_type, body)
        if parts is None:
            return FileRefusal(400, "The body is not a valid multipart/form-data body.")
        if "file" not in parts:
            return FileRefusal(400, "file is required.")
        own_name, content = parts["file"]
        texts = {name: value.decode("utf-8", "replace") for name, (_, value) in parts.items() if name != "file"}
        name = texts.get("fileName") or texts.get("file_name") or own_name
        folder = texts.get("uploadPath") or texts.get("upload_path") or ""
        return self._store(content, name, own_name, folder, now)

    def upload_url(self, body: object, own: str, now: float) -> StoredFile | FileRefusal:
        """file_url, upload_path, file_name. Only the emulator's own links are fetched; ``own`` is its host."""
        fields = _fields(body, "file_url")
        if isinstance(fields, FileRefusal):
            return fields
        try:
            parts = urlsplit(fields["file_url"])
        except ValueError:
            return FileRefusal(40004, "The URL is not valid.")
        is_own = parts.scheme in ("http", "https") and parts.netloc == own
        content = self.fetch(unquote(parts.path), now) if is_own else None
        if content is None:
            return FileRefusal(40004, "The file could not be fetched from the URL.")
        original = parts.path.rpartition("/")[2]
        return self._store(content, fields["file_name"], original, fields["upload_path"], now)

    def page(self, query: dict[str, str], now: float) -> Json | FileRefusal:
        """The files, the newest first."""
        number = whole(query.get("page", "1"), 1, LAST_PAGE)
        size = whole(query.get("pageSize", "20"), 1, _LARGEST_PAGE)
        if number is None:
            return FileRefusal(400, "page must be a positive integer.")
        if size is None:
            return FileRefusal(400, f"pageSize must be between 1 and {_LARGEST_PAGE}.")
        self._expire(now)
        files = list(reversed(self._files.values()))
        start = (number - 1) * size
        return {"total": len(files), "files": [file.as_row() for file in files[start : start + size]]}

    def quota(self, now: float) -> Json:
        """How many files there are and may be."""
        self._expire(now)
        used = len(self._files)
        remaining = max(0, self.max_files - used)
        return {
            "user_group": "default",
            "used_files": used,
            "max_files": self.max_files,
            "remain_files": remaining,
        }

    def delete(self, file_id: str, now: float) -> FileRefusal | None:
        """Remove a file."""
        self._expire(now)
        for path, file in self._files.items():
            if file.id == file_id:
                del self._files[path]
                return None
        return FileRefusal(404, "File not found.")

    def find(self, path: str, now: float) -> StoredFile | None:
        """The file that a link leads to, None where there is none or no longer."""
        self._expire(now)
        return self._files.get(path.removeprefix(LINKS))

    def book(self, now: float) -> Json:
        """The ground truth about uploads."""
        self._expire(now)
        return {"stored": len(self._files), "uploads": self.uploads, "overwritten": self.overwritten}

    # --- receipts ---------------------------------------------------------------------------------------------

    def note_receipt(self, upload_id: str, file: StoredFile) -> None:
        """Keep a receipt for an upload that brought an id of its own, so that a lost answer can be asked for."""
        self._receipts[upload_id] = file

    def receipt(self, upload_id: str, links_at: str, now: float) -> Json | FileRefusal:
        """The answer about such an upload (vendor's client)."""
        file = self._receipts.get(upload_id)
        if file is None or now >= file.expires:
            self._receipts.pop(upload_id, None)
            return FileRefusal(404, "There is no receipt for this upload.")
        return {"upload_id": upload_id, "state": "done", "result_verified": True, "file": file.as_json(links_at)}

    # --- inside -----------------------------------------------------------------------------------------------

    def _store(self, content: bytes, name: str, original: str, folder: str, now: float) -> StoredFile | FileRefusal:
        self._expire(now)
        if not content:
            return FileRefusal(400, "The file is empty.")
        if len(content) > self.max_bytes:
            return FileRefusal(40001, f"The file is larger than {self.max_bytes // 2**20} MB.")
        content_type = _type_of(content)
        if content_type is None:
            return FileRefusal(40002, "Files of this type are not supported.")
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        name = name or original or f"{digest}.{content_type.partition('/')[2]}"
        if not _is_path(folder, name):
            return FileRefusal(400, "file_name or upload_path is not valid.")
        folder = folder.strip("/")
        path = f"{folder}/{name}" if folder else name
        if path not in self._files and len(self._files) >= self.max_files:
            return FileRefusal(40003, f"The quota of {self.max_files} files is used up.")
        self.uploads += 1
        self.overwritten += self._files.pop(path, None) is not None
        file = StoredFile(
            id=f"file_{self._seed:x}_{self.uploads:08x}",
            name=name,
            original_name=original or name,
            folder=folder,
            content=content,
            content_type=content_type,
            uploaded=now,
            expires=now + self._lifetime,
        )
        self._files[path] = file
        return file

    def _expire(self, now: float) -> None:
        # In the order of their uploads, so in that of their ends.
        while self._files:
            path, file = next(iter(self._files.items()))
            if now < file.expires:
                return
            del self._files[path]


def method_of(name: str) -> str | None:
    """The method of a path below PREFIX: a call, a receipt, or a file to delete. None where there is nothing."""
    if name.startswith(RECEIPTS):
        return "GET"
    return _CALLS.get(name, "DELETE" if name and "/" not in name else None)


def is_upload_id(text: str) -> bool:
    """Whether this can be the X-Evo-Upload-Id of an upload (vendor's client)."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{15,127}", text) is not None


def accepted(data: Json | None) -> Json:
    """The envelope of success."""
    return {"success": True, "code": 200, "msg": "success", "data": data}


def refused(refusal: FileRefusal) -> Json:
    """The envelope of a refusal."""
    return {"success": False, "code": refusal.code, "msg": refusal.message}


def read_form(content_type: str, body: bytes) -> dict[str, tuple[str, bytes]] | None:
    """The parts of a multipart form by name, each with its file name; None for what is no such form."""
    found = re.search(r'multipart/form-data;.*?boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', content_type, re.I)
    if found is None:
        return None
    mark = b"\r\n--" + (found[1] or found[2]).encode("latin-1")
    body = b"\r\n" + body
    parts: dict[str, tuple[str, bytes]] = {}
    start = body.find(mark)
    while start >= 0:
        start += len(mark)
        if body[start : start + 2] == b"--":
            return parts
        end = body.find(mark, start)
        head_end = body.find(b"\r\n\r\n", start)
        if end < 0 or not start <= head_end < end:
            return None
        head = body[start:head_end].decode("utf-8", "replace")
        name = re.search(r'content-disposition:[^\r\n]*?[;\s]name="([^"]*)"', head, re.I)
        if name is None:
            return None
        own_name = re.search(r'filename="([^"]*)"', head, re.I)
        parts[name[1]] = (own_name[1] if own_name else "", body[head_end + 4 : end])
        start = end
    return None


def _fields(body: object, wanted: str) -> dict[str, str] | FileRefusal:
    """The texts of an upload's body; those that were not sent are empty. A null is a field that was not sent."""
    values = body if isinstance(body, dict) else {}
    texts = {name: values.get(name) for name in (wanted, "file_name", "upload_path")}
    for name, value in texts.items():
        if not isinstance(value, str | None):
            return FileRefusal(400, f"{name} must be a string.")
    if not texts[wanted]:
        return FileRefusal(400, f"{wanted} is required.")
    return {name: value or "" for name, value in texts.items()}


def _is_path(folder: str, name: str) -> bool:
    """Whether a file can be stored, and linked to, under this name."""
    if not re.fullmatch(FILE_NAME, name) or not re.fullmatch(FOLDER, folder):
        return False
    try:
        return bool(f"{folder}/{name}".encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _type_of(content: bytes) -> str | None:
    for offset, magic, content_type in _MAGIC:
        if content[offset : offset + len(magic)] == magic:
            return content_type
    return None


def _rfc3339(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).astimezone(_BEIJING).isoformat(timespec="seconds")
