"""kill -9, for real: a process that saves is killed at random moments, and its folder is judged.

SAVING_KILLS=50 for the long run.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import sys
from pathlib import Path

import httpx
import pytest
from programs import ROOT
from wiretap import Wiretap, wiretap

from evolink_async import AsyncEvoLink, ImageRequest, VideoRequest
from evolink_async.emulator import Emulator
from evolink_async.saving.folder import read_mark
from evolink_async.testing import Bandwidth, FaultProxy, Slicer

KILLS = int(os.environ.get("SAVING_KILLS", "4"))
TASKS = 45


async def started(base_url: str, api_key: str, folder: Path, ids: list[str]) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(Path(__file__).with_name("kill_program.py")), base_url, str(folder)),
        env={"PYTHONPATH": str(ROOT), "EVOLINK_API_KEY": api_key},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n".join(ids).encode())
    process.stdin.close()
    assert await process.stdout.readline() == b"ready\n"
    return process


def asked_for(tap: Wiretap) -> set[str]:
    """The results that were asked for, by the names in their links."""
    return {name.decode() for said in tap.said for name in re.findall(rb"GET /results/(\S+)", said)}


def whole_files(folder: Path) -> dict[str, str]:
    """Names and content of what has a final name."""
    files = [path for path in folder.iterdir() if not path.name.endswith(".part")] if folder.exists() else []
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.timeout(600 + 10 * KILLS)
@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="needs Linux: files carry marks")
async def test_a_killed_process_leaves_whole_files_only_and_the_next_one_goes_on(tmp_path: Path, api_key: str) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    async with (
        Emulator(speed=100, api_key=api_key).serve() as server,
        FaultProxy(server.base_url) as proxy,
        AsyncEvoLink(base_url=server.base_url, rate_limit="1000/s") as client,
        httpx.AsyncClient() as plain,
    ):
        outcomes = await client.run_many(
            VideoRequest(model="seedance-2.0-text-to-video", prompt=f"{n}")
            if n % 2
            else ImageRequest(model="gpt-4o-image", prompt=f"{n}", n=2)
            for n in range(TASKS)
        )
        ids = [outcome.unwrap().id for outcome in outcomes]
        links = {f"{outcome.unwrap().id}/{n}": link for outcome in outcomes for n, link in enumerate(outcome.urls, 1)}
        content = {link: hashlib.sha256((await plain.get(link)).content).hexdigest() for link in links.values()}
        proxy.add(Bandwidth(rate=60))
        proxy.add(Slicer(average_size=5_000, size_variation=4_000))
        kills = completed = cut_short = fetched = 0
        folder = tmp_path / "0"
        while kills < KILLS or not completed:
            before = whole_files(folder)
            known = {links[read_mark(folder / name).rpartition("/")[0]] for name in before}
            async with wiretap(proxy.base_url) as tap:
                process = await started(tap.base_url, api_key, folder, ids)
                assert process.stdout is not None
                try:
                    if kills < KILLS:
                        async with asyncio.timeout(draw.uniform(0.0, 0.9)):
                            await process.stdout.read()
                    await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()
                    kills += 1
                asked = asked_for(tap)
            fetched += len(asked)
            assert not asked & {link.rpartition("/")[2] for link in known}, "fetched again what was whole"
            after = whole_files(folder)
            assert before.items() <= after.items()
            for name, digest in after.items():
                assert content[links[read_mark(folder / name).rpartition("/")[0]]] == digest, name
            if process.returncode == 0:
                assert len(after) == len(links)
                assert sorted(path.name for path in folder.iterdir()) == sorted(after)  # nothing else is left
                completed += 1
                folder = tmp_path / str(completed)
            else:
                assert process.returncode == -9
                cut_short += any(path.name.endswith(".part") for path in folder.iterdir())
    print(
        f"{kills} kills, {cut_short} of them in the middle of a file, {completed} folders of {len(links)} files "
        f"completed, {fetched} requests for results"
    )
