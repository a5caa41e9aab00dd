"""What is decided without any I/O: names, addresses, types, patience."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest
from hostile import is_safe
from hypothesis import given
from hypothesis import strategies as st
from mediahost import picture

from evolink_async.errors import DownloadError
from evolink_async.http.addresses import refusal
from evolink_async.http.media import checked_link, describe, next_hop, place_of
from evolink_async.saving.content import ending_of, is_page, is_whole, kind_of, sniff
from evolink_async.saving.download import LEAST_SPEED, STALL_SECONDS, Patience
from evolink_async.saving.folder import Folder, PartFile
from evolink_async.saving.names import safe_stem, stem_of_url, unique_stem

NASTY_SEGMENTS = [
    "..", ".", "...", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2fetc%2fpasswd", "..%5c..%5cwindows",
    "..\\..\\boot.ini", "%c0%af%c0%ae", "%252e%252e%252f", "....//....//", "a%00.png", "%00", "CON", "con.png", "COM1",
    "COM¹.mp4", "lpt9.txt.png", "NUL.", "aux ", "a:b", "a.png::$DATA", "-rf", "--help.png", ".bashrc", ".evolink",
    "name\u202egnp.exe", "name\u2066x", "a\nb\rc", "\x1b[31mred", "x" * 400, "ü" * 300, "😀" * 200, "a.", "a ", " . ",
    "~", "~root", "$HOME", "`id`", "a|b", "a*b?", '"quoted"', "<script>", "\ud800", "file.php", "CONIN$",
    "\u2215etc\u2215passwd", "\uff0e\uff0e\uff0fetc",
]  # fmt: skip


@pytest.mark.parametrize("segment", NASTY_SEGMENTS)
def test_a_hostile_last_segment_becomes_a_plain_name(segment: str) -> None:
    assert is_safe(f"{stem_of_url(f'https://example.com/{segment}')}.png")
    assert is_safe(f"{unique_stem(segment)}-1.png")


@given(st.text(max_size=600))
def test_no_url_gives_a_name_outside_the_folder(text: str) -> None:
    name = f"{stem_of_url('https://example.com/' + text)}.png"
    assert is_safe(name)
    assert (Path("/srv/out") / name).resolve().parent == Path("/srv/out").resolve()


@given(st.text(max_size=600))
def test_no_identifier_gives_a_name_outside_the_folder(text: str) -> None:
    assert is_safe(f"{unique_stem(text)}-12.mp4")


@given(st.from_regex(r"https?://[ -~]{0,80}", fullmatch=True))
def test_no_whole_url_gives_a_name_outside_the_folder(url: str) -> None:
    assert is_safe(f"{stem_of_url(url)}.bin")


@pytest.mark.parametrize(
    ("url", "stem"),
    [
        ("https://cdn.example.com/a/photo.PNG?sig=1", "photo"),
        ("https://cdn.example.com/", "result"),
        ("https://cdn.example.com", "result"),
        ("https://cdn.example.com/two%20words.mp4", "two_words"),
        ("https://cdn.example.com/bild-größe.jpeg", "bild-größe"),
        ("https://cdn.example.com/v1.2", "v1.2"),
        ("https://[", "result"),
    ],
)
def test_a_name_keeps_what_is_harmless(url: str, stem: str) -> None:
    assert stem_of_url(url) == stem


def test_a_task_id_stays_as_it_is_and_a_changed_one_cannot_collide() -> None:
    assert unique_stem("task-unified-1774857405-abc123") == "task-unified-1774857405-abc123"
    assert unique_stem("a:b") != unique_stem("a_b")
    assert len({unique_stem("x" * n) for n in range(300, 310)}) == 10


def test_a_fallback_stands_in_where_nothing_is_left() -> None:
    assert safe_stem("...---", "result") == "result"


def test_publishing_under_a_name_with_a_separator_is_refused(tmp_path: Path) -> None:
    part = PartFile(tmp_path)
    part.open()
    try:
        for name in ("../x.png", "a/b.png", "..", ""):
            with pytest.raises(DownloadError, match="no name for a file"):
                Folder(tmp_path).publish(part, name, None)
    finally:
        part.discard()
    assert list(tmp_path.iterdir()) == []


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.8", "198.18.0.1", "192.0.2.1", "203.0.113.9",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:7f00:1::",
    "2002:c0a8:101::", "2001:0:7f00:1::", "2001:db8::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1",
    "fec0::1", "ff02::1", "4000::1", "not an address", "",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "172.32.0.1",
    "100.128.0.1",
    "2606:4700:4700::1111",
    "64:ff9b::808:808",
    "2002:808:808::",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert refusal(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_fine(address: str) -> None:
    assert refusal(address) is None


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0", "0x7f.1", "017700000001", "localhost"])
def test_numeric_forms_of_a_host_are_private_once_resolved(host: str) -> None:
    try:
        found = socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)
    except OSError:  # a resolver that doesn't read this form cannot connect there either
        return
    assert all(refusal(str(address[0])) for *_, address in found)


@pytest.mark.parametrize(
    "link",
    [
        "file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://example.com/a", "gopher://example.com/", "//x/y",
        "https://", "https:///a.png", "https://api.evolink.ai@example.com/a.png", "http://user:word@example.com/",
        "", "javascript:alert(1)", "https://[", "https://exa%2fmple/", "http://example.com:99999/",
        "https://exa mple.com/\x00",
    ],
)  # fmt: skip
def test_only_plain_web_links_are_followed(link: str) -> None:
    with pytest.raises(DownloadError):
        checked_link(link)


def test_a_host_that_idna_2008_forbids_is_looked_up_as_it_stands() -> None:
    assert place_of(checked_link("https://xn--ls8h.example/a.png")) == ("xn--ls8h.example", 443)
    with pytest.raises(DownloadError, match=r"true host is 'xn--ls8h\.example'"):
        checked_link("https://example.com@xn--ls8h.example/a.png")


def test_a_redirect_is_checked_like_a_link_and_never_leaves_https() -> None:
    here = checked_link("https://example.com/a/b?c")
    assert str(next_hop(here, "../d")) == "https://example.com/d"
    assert str(next_hop(checked_link("http://example.com/"), "https://example.com/")) == "https://example.com/"
    for location in ("http://example.com/", "file:///etc/passwd", "https://a@example.org/", None, "", "https://["):
        with pytest.raises(DownloadError):
            next_hop(here, location)


def test_a_link_is_shown_without_its_signature() -> None:
    assert describe("https://example.com/a.png?X-Signature=abc#d") == "https://example.com/a.png"


HEADS = [
    (b"\x89PNG\r\n\x1a\n....", "png", "image"), (b"\xff\xd8\xff\xe0", "jpg", "image"), (b"GIF89a", "gif", "image"),
    (b"RIFF\x10\0\0\0WEBPVP8 ", "webp", "image"), (b"RIFF\x10\0\0\0WAVEfmt ", "wav", "audio"),
    (b"\0\0\0\x18ftypmp42", "mp4", "video"), (b"\0\0\0\x14ftypqt  ", "mov", "video"),
    (b"\0\0\0\x14ftypM4A ", "m4a", "audio"), (b"\0\0\0\x1cftypavif", "avif", "image"),
    (b"\0\0\0\x1cftypheic", "heic", "image"), (b"\x1aE\xdf\xa3\x01B\x82webm", "webm", "video"),
    (b"\x1aE\xdf\xa3\x01B\x82matroska", "mkv", "video"), (b"ID3\x04", "mp3", "audio"),
    (b"\xff\xfb\x90\x00", "mp3", "audio"),
    (b"\xff\xf1\x50\x80", "aac", "audio"), (b"OggS\0", "ogg", "audio"), (b"fLaC\0", "flac", "audio"),
    (b"\0\0\0\x08wide\0\0", "mov", "video"),
    (b"<!doctype html>", None, None), (b"{}", None, None), (b"", None, None), (b"\xff\xff\xff\xff", None, None),
    (b"RIFF\x10\0\0\0AVI LIST", None, None), (b"MZ\x90", None, None), (b"%PDF-1.7", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("head", "ending", "kind"), HEADS)
def test_the_type_is_told_from_the_first_bytes(head: bytes, ending: str | None, kind: str | None) -> None:
    assert sniff(head) == ending
    assert kind_of(ending) == kind


@given(st.binary(max_size=64))
def test_no_bytes_confuse_the_type_table(head: bytes) -> None:
    ending = sniff(head)
    assert ending is None or kind_of(ending)


def test_a_page_in_the_place_of_a_file_is_recognised() -> None:
    for head in (b"<html>", b"  \n<!DOCTYPE html>", b'\xef\xbb\xbf{"error": 1}', b"[1]", b"<svg/>", b"<?xml?>"):
        assert is_page(head, "application/octet-stream")
    assert is_page(b"not found", "text/plain; charset=utf-8")
    assert is_page(b"\x00", "application/problem+json")
    assert not is_page(picture(), "text/html")
    assert not is_page(b"\x00\x01", "application/octet-stream")


def test_an_unknown_content_type_never_makes_an_executable() -> None:
    for content_type in ("application/x-msdownload", "text/html", "image/svg+xml", "../../x", "", "application/x-sh"):
        assert ending_of(content_type) == "bin"


def test_a_cut_file_is_seen_to_be_cut() -> None:
    whole = picture()
    boxes = b"\0\0\0\x10ftypmp42\0\0\0\0" + b"\0\0\0\x0cmoov" + b"data"
    samples = {"png": whole, "jpg": b"\xff\xd8\xff..\xff\xd9", "gif": b"GIF89a...;", "mp4": boxes,
               "webp": b"RIFF\x0c\0\0\0WEBPxxxxxxxx"}  # fmt: skip
    for ending, data in samples.items():
        assert is_whole(io.BytesIO(data), ending), ending
        assert not is_whole(io.BytesIO(data[:-3]), ending), ending
    assert not is_whole(io.BytesIO(b""), "mp3")
    assert not is_whole(io.BytesIO(boxes[:16]), "mp4")  # cut exactly between two boxes


def test_a_file_with_something_after_its_end_or_of_a_size_that_its_writer_did_not_know_is_whole() -> None:
    assert is_whole(io.BytesIO(picture() + b"made by x"), "png")
    assert is_whole(io.BytesIO(b"\xff\xd8\xff..\xff\xd9" + bytes(5000)), "jpg")
    for unknown in (b"\xff\xff\xff\xff", b"\0\0\0\0"):
        assert is_whole(io.BytesIO(b"RIFF" + unknown + b"WAVEfmt " + bytes(100)), "wav")


def test_patience_ends_after_30_s_of_silence_or_of_less_than_a_kilobyte_a_second() -> None:
    def borne_for(speed: float, burst: int = 0) -> float:
        patience, seconds = Patience(), 0.0
        patience.spend(0.0, burst)
        while patience.left > 0 and seconds < 10 * STALL_SECONDS:
            patience.spend(0.5, int(speed / 2))
            seconds += 0.5
        return seconds

    assert borne_for(0) == STALL_SECONDS
    assert borne_for(0, burst=10**9) == STALL_SECONDS  # nothing is saved up
    assert borne_for(LEAST_SPEED * 0.9) == STALL_SECONDS
    assert borne_for(LEAST_SPEED) == 10 * STALL_SECONDS


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX links")
def test_a_file_system_without_hard_links_still_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for content, fits in ((b"one", True), (b"one", True), (b"two", False)):
        part = PartFile(tmp_path)
        part.open()
        part.add(content)
        try:
            if fits:
                assert Folder(tmp_path).publish(part, "a.bin", None).read_bytes() == content
            else:
                with pytest.raises(DownloadError, match="another file is there"):
                    Folder(tmp_path).publish(part, "a.bin", None)
        finally:
            part.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"one"
