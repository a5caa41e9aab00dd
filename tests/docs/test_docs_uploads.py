"""docs/uploads.md says what is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from programs import run_program

from evolink_async import RetryPolicy
from evolink_async.emulator import Emulator
from evolink_async.saving import attachments, files, upload

PAGE = (Path(__file__).parents[2] / "docs" / "uploads.md").read_text(encoding="utf-8")


def test_its_numbers_are_those_of_the_code() -> None:
    assert f"above {upload.MOST_BYTES // 2**20} MB" in PAGE
    assert f"An account may have {attachments.PLACES} files" in PAGE
    assert f"Up to {attachments.UPLOADS_AT_ONCE} are uploaded at once" in PAGE
    assert attachments.REMOVAL_SECONDS == 60
    assert files.LIFETIME.total_seconds() == 72 * 3600
    assert attachments._WORTH_USING.days == 1
    assert f"`RetryPolicy.unreachable_for`, {RetryPolicy().unreachable_for:g} s" in PAGE


async def test_its_programs_run_and_leave_no_file(api_key: str, tmp_path: Path) -> None:
    generate, empty = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    for name in ("sketch", "two", "three"):
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + name.encode())
    async with Emulator(speed=100, seed=1, api_key=api_key).serve() as server:
        (tmp_path / "program.py").write_text(generate)
        finished = await run_program([sys.executable, "program.py"], server, cwd=tmp_path)
        assert finished.code == 0, finished.stderr
        assert finished.stdout.count(" completed None\n") == 3
        assert len(list((tmp_path / "out").iterdir())) == 3
        book: dict[str, Any] = server.emulator.book()
        assert (book["files"]["uploads"], book["files"]["stored"], len(book["posts"])) == (4, 0, 4)

        (tmp_path / "program.py").write_text(empty)
        server.emulator.app.files._store(b"\x89PNG\r\n\x1a\n", "left.png", "", "", 2e9)
        finished = await run_program([sys.executable, "program.py"], server, cwd=tmp_path)
        assert finished.code == 0, finished.stderr
        assert "used=1" in finished.stdout
        assert server.emulator.book()["files"]["stored"] == 0
