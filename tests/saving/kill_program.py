"""Saves tasks as a pool and as `client.save` would, until it is killed.

python kill_program.py BASE_URL FOLDER < ids
"""

from __future__ import annotations

import asyncio
import sys

from evolink_async import AsyncEvoLink
from evolink_async.saving import Saver


async def main(base_url: str, folder: str, ids: list[str]) -> None:
    async with AsyncEvoLink(base_url=base_url) as client:
        tasks = await client.tasks.get_many(ids)
        saver = Saver(client._core, folder)
        await saver.prepare()
        print("ready", flush=True)

        async def save(index: int, task_id: str) -> None:
            if index % 3 == 0:
                await client.save(tasks[task_id], folder)
            else:
                key = f"item-{index}" if index % 3 == 1 else None
                await saver.save(tasks[task_id], key=key, index=index, identity=f"{index:016x}-0")

        await asyncio.gather(*(save(index, task_id) for index, task_id in enumerate(ids)))


asyncio.run(main(sys.argv[1], sys.argv[2], sys.stdin.read().split()))
