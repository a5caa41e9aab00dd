"""Runs a program as its user would: a process of its own, pointed at an emulator by its environment."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    """What a program left behind."""

    code: int
    stdout: str
    stderr: str


async def run_program(
    arguments: list[str], emulator: Any, *, timeout: float = 300, cwd: Path | None = None
) -> Finished:
    """Run to the end; killed, by its id, if it takes longer than `timeout` seconds."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("EVOLINK_", "PYTEST", "COV_"))
    }
    environment |= {
        "EVOLINK_BASE_URL": emulator.base_url,
        "EVOLINK_API_KEY": emulator.api_key,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::ResourceWarning",
    }
    process = await asyncio.create_subprocess_exec(
        *arguments, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment
    )
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Finished(process.returncode, stdout.decode(), stderr.decode())
