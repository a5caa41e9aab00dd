"""Previews show a picture and nothing of what its maker wrote into it (F105)."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from PIL import Image, ImageCms, PngImagePlugin

from evolink_async.report.previews import previews

SECRET = "a-secret-of-the-camera"


def picture(path: Path) -> None:
    image = Image.effect_noise((300, 200), 60)
    exif = Image.Exif()
    exif[0x010E] = exif[0x9C9C] = SECRET  # ImageDescription, XPComment
    exif[0x0112] = 6  # Orientation: to be turned
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", SECRET)
    text.add_itxt("XML:com.adobe.xmp", f"<x>{SECRET}</x>")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(path, exif=exif, pnginfo=text, comment=SECRET, xmp=SECRET.encode(), icc_profile=profile)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif"])
def test_a_preview_holds_nothing_of_what_is_written_into_a_picture(name: str, tmp_path: Path) -> None:
    picture(tmp_path / name)
    assert SECRET.encode() in (tmp_path / name).read_bytes()
    preview = previews(tmp_path, [name])[name]
    assert preview is not None
    data = base64.b64decode(preview.partition(",")[2])
    assert SECRET.encode() not in data
    assert not [mark for mark in (b"EXIF", b"XMP ", b"ICCP") if mark in data]


def test_a_preview_is_turned_as_the_picture_asks(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    preview = previews(tmp_path, ["a.jpg"])["a.jpg"]
    assert preview is not None
    (tmp_path / "small.webp").write_bytes(base64.b64decode(preview.partition(",")[2]))
    with Image.open(tmp_path / "small.webp") as small:
        assert small.height > small.width  # it lay on its side
