"""What bytes are, by their first few: file types told apart without trusting a name or a header. Pure.

The table covers what the service is known to make and to take, and the close relatives that would be mistaken for it.
"""

from __future__ import annotations

import os
from typing import BinaryIO, Literal

MediaKind = Literal["image", "video", "audio"]

HEAD = 4096  # bytes that are enough to tell every type of the table

CONTENT_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "avif": "image/avif",
    "heic": "image/heic",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mov": "video/quicktime",
    "mkv": "video/x-matroska",
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "ogg": "audio/ogg",
    "flac": "audio/flac",
    "m4a": "audio/mp4",
    "aac": "audio/aac",
}
_BY_CONTENT_TYPE = {content_type: ending for ending, content_type in CONTENT_TYPES.items()} | {
    "image/jpg": "jpg",
    "image/bmp": "bmp",
    "image/tiff": "tiff",
    "audio/mp3": "mp3",
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/x-m4a": "m4a",
    "audio/x-flac": "flac",
    "application/ogg": "ogg",
}
ENDINGS = frozenset({*_BY_CONTENT_TYPE.values(), "jpeg", "bin"})

_CERTAIN = frozenset({"png", "jpg", "webp", "gif", "avif", "wav", "flac", "ogg", "webm"})

_BRANDS = {b"qt  ": "mov", b"M4A ": "m4a", b"M4B ": "m4a", b"avif": "avif", b"avis": "avif"}
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "heic")
_TEXT_STARTS = (b"<", b"{", b"[")


def sniff(head: bytes) -> str | None:
    """The file name extension that these first bytes stand for, None if they are of no type in the table."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"RIFF"):
        return {b"WEBP": "webp", b"WAVE": "wav"}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "mp4")
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime from before there were brands
        return "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "webm" if b"webm" in head[:64] else "mkv"
    if head.startswith(b"OggS"):
        return "ogg"
    if head.startswith(b"fLaC"):
        return "flac"
    if head.startswith(b"ID3"):
        return "mp3"
    return _mpeg_audio(head)


def _mpeg_audio(head: bytes) -> str | None:
    """MP3 or AAC from a frame header: eleven bits of sync, and no reserved value in the fields after it."""
    if len(head) < 3 or head[0] != 0xFF:
        return None
    if head[1] & 0xF6 == 0xF0:
        return "aac"
    is_layer_three = head[1] & 0xE6 == 0xE2 and head[1] & 0x18 != 0x08
    return "mp3" if is_layer_three and head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C else None


def kind_of(ending: str | None) -> MediaKind | None:
    """What a file with this extension holds; None for what is not in the table."""
    kind = CONTENT_TYPES.get(ending or "", "").partition("/")[0]
    return kind if kind in ("image", "video", "audio") else None  # type: ignore[return-value]


def content_type_of(ending: str) -> str:
    """The Content-Type of a file with this extension."""
    return CONTENT_TYPES.get(ending, "application/octet-stream")


def ending_of(content_type: str) -> str:
    """An extension for a Content-Type header: from our table, else `bin`. Never one that a system would execute."""
    return _BY_CONTENT_TYPE.get(_bare(content_type), "bin")


def is_false(head: bytes, content_type: str) -> bool:
    """Whether the Content-Type names a type that always begins with certain bytes, and these are not such bytes."""
    return sniff(head) is None and ending_of(content_type) in _CERTAIN


def is_page(head: bytes, content_type: str) -> bool:
    """Whether this is a page or a message of a server (HTML, XML, JSON, text) in the place of a file."""
    if sniff(head) is not None:
        return False
    bare = _bare(content_type)
    if bare.startswith("text/") or bare.endswith(("json", "xml", "javascript")):
        return True
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in _TEXT_STARTS


def _bare(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


TELLING = frozenset({"png", "jpg", "gif", "webp", "wav", "mp4", "mov", "m4a", "avif", "heic"})
"""Types of which `is_whole` knows where they end."""

_STREAMED = 0x7FFF_0000  # what is written as a size by who doesn't know it yet: this, or more, or nothing


def is_whole(file: BinaryIO, ending: str) -> bool:
    """Whether a file looks complete from its end or its own idea of its size, for types that tell; True for others.

    A guess beside an announced length, and the best there is without one. What some tools write after the end is borne.
    """
    size = file.seek(0, os.SEEK_END)
    if ending == "png":
        return b"IEND\xaeB`\x82" in _tail(file, size, HEAD)
    if ending == "jpg":
        return b"\xff\xd9" in _tail(file, size, 16 * HEAD)
    if ending == "gif":
        return b";" in _tail(file, size, 16)
    if ending in ("webp", "wav"):
        file.seek(4)
        claimed = int.from_bytes(file.read(4), "little")
        return size >= 8 + claimed or (ending == "wav" and (claimed == 0 or claimed >= _STREAMED))
    if ending in ("mp4", "mov", "m4a", "avif", "heic"):
        return _boxes_fit(file, size)
    return size > 0


def _tail(file: BinaryIO, size: int, length: int) -> bytes:
    file.seek(max(0, size - length))
    return file.read(length)


def _boxes_fit(file: BinaryIO, size: int) -> bool:
    """Whether the top-level boxes of an ISO media file end where the file does, and its index is among them."""
    position, indexed = 0, False
    while position < size:
        file.seek(position)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 0:
            return True  # by definition: up to the end of the file
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:
            return False
        indexed |= header[4:8] in (b"moov", b"moof", b"meta")
        position += length
    return position == size and indexed
