"""Result files are real: read back with libraries that are not ours."""

from __future__ import annotations

import io
import struct
import wave

import pytest
from PIL import Image

from evolink_async.emulator.media import pixel_size, render
from evolink_async.emulator.mp4 import encode

DIGEST = bytes(range(7, 23))
OTHER = bytes(range(9, 25))


@pytest.mark.parametrize("ending", ["png", "jpeg", "webp"])
def test_pictures_open_and_have_the_asked_proportions(ending: str) -> None:
    with Image.open(io.BytesIO(render(DIGEST, 1, ending, "1536x1024"))) as picture:
        picture.load()
        assert (picture.format or "").lower() == ending
        assert picture.size == (256, 171)


@pytest.mark.parametrize(
    ("size", "pixels"),
    [(None, (256, 256)), ("auto", (256, 256)), ("16:9", (256, 144)), ("1024×1536", (171, 256)), ("0x5", (256, 256))],
)
def test_any_size_has_pixels(size: str | None, pixels: tuple[int, int]) -> None:
    assert pixel_size(size) == pixels


@pytest.mark.parametrize("ending", ["png", "wav", "mp4"])
def test_equal_digests_give_equal_files_and_others_others(ending: str) -> None:
    first = render(DIGEST, 1, ending, None)
    render.cache_clear()
    assert render(DIGEST, 1, ending, None) == first
    assert len({first, render(DIGEST, 2, ending, None), render(OTHER, 1, ending, None)}) == 3


def test_the_sound_is_a_second_of_mono_pcm() -> None:
    with wave.open(io.BytesIO(render(DIGEST, 1, "wav", None))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        assert file.getnframes() == 16_000 * 6 // 5
        assert any(file.readframes(1000))


def boxes(data: bytes) -> dict[str, bytes]:
    """The boxes of one level, by type."""
    found, at = {}, 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        assert size >= 8
        found[kind.decode()] = data[at + 8 : at + size]
        at += size
    assert at == len(data)
    return found


def test_the_clip_is_an_mp4_whose_index_finds_every_frame() -> None:
    file = render(DIGEST, 1, "mp4", None)
    top = boxes(file)
    assert list(top) == ["ftyp", "moov", "mdat"]
    sample_table = top["moov"]
    for name in ("trak", "mdia", "minf", "stbl"):
        sample_table = boxes(sample_table)[name]
    found = boxes(sample_table)
    _, _, count, *sizes = struct.unpack(f">{len(found['stsz']) // 4}I", found["stsz"])
    assert count == len(sizes) == 10
    _, _, at = struct.unpack(">3I", found["stco"])
    for size in sizes:
        assert struct.unpack_from(">I", file, at)[0] == size - 4  # one NAL unit per frame,
        assert file[at + 4] & 0x1F == 5  # an IDR slice
        at += size
    assert at == len(file)


def test_the_samples_of_a_frame_are_in_the_file_as_they_are() -> None:
    luma = bytes(range(1, 257 - 1)) + bytes([7, 8])
    file = encode([(luma[:256], bytes([90]) * 64, bytes([91]) * 64)], 16, 16, frames_per_second=10)
    assert luma[:256] + bytes([90]) * 64 + bytes([91]) * 64 in file


def test_zeros_in_the_samples_never_look_like_a_start_code() -> None:
    file = encode([(bytes(256), bytes(64), bytes(64))], 16, 16, frames_per_second=10)
    slice_at = file.index(b"mdat") + 8
    payload = file[slice_at:]
    assert all(code not in payload for code in (b"\0\0\0", b"\0\0\1", b"\0\0\2"))
    assert payload.replace(b"\0\0\3", b"\0\0").count(b"\0" * 384) == 1
