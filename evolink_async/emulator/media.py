"""Result files: small but real PNG/JPEG/WebP, WAV and MP4, drawn from a digest, made when first downloaded."""

from __future__ import annotations

import colorsys
import io
import math
import wave
from array import array
from functools import lru_cache
from typing import Any

from .mp4 import encode as encode_mp4

CONTENT_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "wav": "audio/wav",
    "mp4": "video/mp4",
}
_LONGEST_EDGE = 256
_SAMPLE_RATE = 16_000
_TUNE_SECONDS = 1.2


@lru_cache(maxsize=256)
def render(digest: bytes, number: int, ending: str, size: str | None) -> bytes:
    """The bytes of result ``number`` in the format ``ending``; equal arguments give equal bytes."""
    look = digest[number % 16 :] + digest[: number % 16]
    if ending == "wav":
        return _tune(look)
    if ending == "mp4":
        return _clip(look)
    return _picture(look, ending, pixel_size(size))


def pixel_size(size: str | None) -> tuple[int, int]:
    """Width and height for a ``size`` of WxH or W:H, scaled so that the longer edge is 256 pixels."""
    for separator in ("x", "×", "X", ":"):
        left, found, right = (size or "").partition(separator)
        try:
            width, height = float(left), float(right)
        except ValueError:
            continue
        if found and width > 0 and height > 0:
            scale = _LONGEST_EDGE / max(width, height)
            return max(16, round(width * scale)), max(16, round(height * scale))
    return _LONGEST_EDGE, _LONGEST_EDGE


def _colours(look: bytes) -> list[tuple[int, int, int]]:
    """Three colours that go together: a hue and two near it, from dark to light."""
    hue = look[0] / 256
    spread = 0.06 + look[1] / 256 * 0.2
    shades = ((hue, 0.75, 0.30), (hue + spread, 0.65, 0.75), (hue + 2 * spread, 0.35, 1.0))
    return [_rgb(*shade) for shade in shades]


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _picture(look: bytes, ending: str, size: tuple[int, int]) -> bytes:
    """A sky of one gradient, a sun, and two ranges of hills."""
    image_module, draw_module = _pillow()
    dark, middle, light = _colours(look)
    width, height = size
    image = image_module.new("RGB", size)
    draw = draw_module.Draw(image)
    for row in range(height):
        draw.line([(0, row), (width, row)], fill=_mix(light, middle, row / height))
    radius = min(size) * (0.08 + look[2] / 256 * 0.10)
    x, y = width * (0.2 + look[3] / 256 * 0.6), height * (0.2 + look[4] / 256 * 0.25)
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=_mix(light, (255, 255, 255), 0.7))
    for level, shade, phase in ((0.60, 0.45, look[5]), (0.75, 0.0, look[6])):
        waves = 1.5 + phase % 3
        ridge = [
            (left, height * (level + 0.08 * math.sin(waves * math.tau * left / width + phase)))
            for left in range(0, width + 4, 4)
        ]
        draw.polygon([*ridge, (width, height), (0, height)], fill=_mix(dark, middle, shade))
    out = io.BytesIO()
    image.save(out, ending.upper())
    return out.getvalue()


def _mix(one: tuple[int, int, int], other: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageDraw
    except ImportError as exc:
        raise ImportError("the emulator's pictures need pillow: pip install 'evolink_async[emulator]'") from exc
    return Image, ImageDraw


def _tune(look: bytes) -> bytes:
    """Six notes of a pentatonic scale."""
    steps = (0, 2, 4, 7, 9, 12)
    per_note = int(_SAMPLE_RATE * _TUNE_SECONDS / 6)
    samples = array("h")
    for note in range(6):
        pitch = 220 * 2 ** ((steps[look[note] % 6] + look[6] % 12) / 12) * math.tau / _SAMPLE_RATE
        for n in range(per_note):
            envelope = min(1.0, n / 200) * (1 - n / per_note)
            samples.append(int(12_000 * envelope * math.sin(pitch * n)))

    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def _clip(look: bytes) -> bytes:
    """One second of a ball that rolls through a gradient: 64x64, ten frames."""
    slope = 1 + look[3] % 2
    ground = bytes(60 + y + x * slope // 4 for y in range(64) for x in range(64))
    blue, red = 80 + look[0] % 96, 80 + look[1] % 96
    cb = bytes(blue + y // 2 for y in range(32) for _ in range(32))
    cr = bytes(red + x // 2 for _ in range(32) for x in range(32))
    frames = [(_with_ball(ground, look[2], step), cb, cr) for step in range(10)]
    return encode_mp4(frames, 64, 64, frames_per_second=10)


def _with_ball(ground: bytes, phase: int, step: int) -> bytes:
    """The luma plane of one frame: a bright disc of radius 8 on the ground."""
    luma = bytearray(ground)
    x, y = 8 + step * 5, 44 - round(20 * abs(math.sin(step * math.pi / 4.5 + phase)))
    for row in range(-8, 9):
        half = math.isqrt(64 - row * row)
        start = (y + row) * 64 + x - half
        luma[start : start + 2 * half] = bytes([225]) * (2 * half)
    return bytes(luma)
