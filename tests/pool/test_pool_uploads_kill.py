"""kill -9 in the middle of a job with local files: every run goes on, and each request has one task."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

import pytest
from programs import ROOT

from evolink_async.emulator import Emulator

HERE = Path(__file__).parent
KILLS = int(os.environ.get("UPLOAD_KILLS", "4"))
ROWS = 40 * KILLS


@pytest.mark.timeout(600 + 30 * KILLS)
async def test_a_job_with_pictures_survives_kill_9_at_any_moment(tmp_path: Path, api_key: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    (tmp_path / "pictures").mkdir()
    killed = 0
    async with Emulator(speed=200, seed=1, api_key=api_key).serve() as server:

        async def started() -> asyncio.subprocess.Process:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(HERE / "upload_job.py")),
                *(str(tmp_path / "job.db"), str(tmp_path / "pictures"), str(ROWS)),
                env={"PYTHONPATH": str(ROOT), "EVOLINK_BASE_URL": server.base_url, "EVOLINK_API_KEY": api_key},
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            assert await process.stdout.readline() == b"entered\n"
            return process

        for _ in range(KILLS):
            process = await started()
            await asyncio.sleep(chance.expovariate(1 / 0.5))
            if process.returncode is None:
                process.kill()
                killed += 1
            await process.communicate()
        process = await started()
        output, _ = await process.communicate()
        book = server.emulator.book()
    assert sorted(output.decode().split()) == sorted(["end", *map(str, range(ROWS))])
    assert len(book["posts"]) == ROWS
    assert all(post["status"] == "completed" for post in book["posts"])
    assert book["files"]["stored"] <= 8 * killed  # what the killed ones had under way; it ends by itself
    assert killed
