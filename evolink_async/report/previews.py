"""Small pictures of large ones, to be carried inside a page. Needs Pillow; where something is wrong, there is none."""

from __future__ import annotations

import base64
import io
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

EDGE = 200  # pixels
MOST_BYTES = 6_000_000  # of all previews of a page
MOST_SECONDS = 5.0  # for making them
MOST_PIXELS = 50_000_000  # of a picture that is opened, here or by the page
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_AT_ONCE = 32
_filtering = threading.Lock()  # warnings' filters are the process's: two that put them back in turn leave ours in force


def previews(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    """Data URIs of the pictures with these names, as many as there is room and time for.

    None: it can't be read or is dangerously large, so it should not be shown. What is missing was not looked at.
    """
    try:
        from PIL import Image, features
    except ModuleNotFoundError:
        return {}
    if not features.check("webp"):
        return {}
    found: dict[str, str | None] = {}
    threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "evolink previews")
    with _filtering, warnings.catch_warnings(), threads as pool:
        size, stop_at = 0, time.monotonic() + MOST_SECONDS
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for some in _portions(names, _AT_ONCE):
            for name, preview in zip(some, pool.map(preview_of, (folder / name for name in some)), strict=True):
                found[name] = preview
                size += len(preview or "")
            if size >= MOST_BYTES or time.monotonic() >= stop_at:
                break
    return found


def preview_of(path: Path) -> str | None:
    """The data URI of one picture."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                return None
            picture.draft("RGB", (2 * EDGE, 2 * EDGE))  # a JPEG is read at a fraction of its size
            small = ImageOps.exif_transpose(picture)
            small.thumbnail((EDGE, EDGE))
            small = small.convert("RGBA" if small.has_transparency_data else "RGB")
        data = io.BytesIO()
        small.save(data, "WEBP", quality=72, method=2)
    except Exception:  # noqa: BLE001  (a file may be anything, and Pillow raises whatever it meets in there)
        return None
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _portions(names: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(names)
    while some := list(islice(rest, size)):
        yield some
