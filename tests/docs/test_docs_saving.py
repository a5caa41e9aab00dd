"""docs/saving.md says what is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from programs import run_program

from evolink_async.http import media
from evolink_async.http.gate import Gate
from evolink_async.saving import download, folder, objects
from evolink_async.saving.names import request_stem
from evolink_async.session import DOWNLOAD_CONNECTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "saving.md").read_text(encoding="utf-8")


def test_its_limits_are_those_of_the_code() -> None:
    [section] = re.findall(r"^## Limits\n(.*?)^## ", PAGE, re.M | re.S)
    mb, gb = download.MOST_IMAGE_BYTES // 2**20, download.MOST_BYTES // 2**30
    assert f"{mb} MB; {gb} GB" in section
    assert f"{download.LEAST_SPEED / 1000:g} kB/s for {download.STALL_SECONDS:g} s" in section
    assert f"{download.PROGRESS // 1024} kB of progress | {download.TRIES}, or {download.RETRY_SECONDS:g} s" in section
    assert f"| redirects | {media.MOST_REDIRECTS}," in section
    assert f"{Gate(DOWNLOAD_CONNECTIONS).lane_limit}; {media.MOST_AT_ONCE}, the others wait" in section
    assert f"up to {objects.AT_ONCE // 2**20} MB in one" in PAGE
    assert folder.MARK in PAGE


def test_its_names_are_those_of_the_code() -> None:
    assert f"`{request_stem(None, 17, '9f86d081884c7d65-0')}-1.png`" in PAGE
    for key in ("CON", "COM1.png"):
        assert f"`{key}`" in PAGE
        assert request_stem(key, 0, key) != key


async def test_its_program_runs(emulator: Any, tmp_path: Path) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "program.py").write_text(program)
    finished = await run_program([sys.executable, "program.py"], emulator, cwd=tmp_path)
    assert finished.code == 0, finished.stderr
    assert len(finished.stdout.splitlines()) == 2
    assert len(list((tmp_path / "out").iterdir())) == 2
