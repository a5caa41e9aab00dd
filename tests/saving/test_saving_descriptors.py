"""A process that may open few files (F126; macOS allows 256): what is saved waits for its turn, and nothing fails."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

from mediahost import Call, answer, media_host, picture

from evolink_async import AsyncEvoLink

PNG = picture()


async def page(call: Call, writer: asyncio.StreamWriter) -> None:
    answer(writer, PNG, content_type="image/png")


async def test_many_files_at_once_are_saved_where_few_may_be_open(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    async with media_host(page) as host:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(128, 2 * used), limits[1]))
        try:
            async with AsyncEvoLink(base_url="http://127.0.0.1:9", allow_private_hosts=True) as client:
                paths = await asyncio.gather(*(client.save(f"{host.url}/{n}", tmp_path) for n in range(300)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len({path for [path] in paths}) == 300
    assert all(path.read_bytes() == PNG for [path] in paths)
