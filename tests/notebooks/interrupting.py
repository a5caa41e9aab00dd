"""Runs a notebook's job cell, interrupts the kernel in the middle of it, and runs the cell again.

python interrupting.py FOLDER REQUESTS INTERRUPTIONS

The emulator is that of the environment. Prints JSON: the output of every run of the cell, and how many POSTs the book
of the emulator held after each.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import nbclient
import nbformat

SETUP = """
from evolink_async import AsyncEvoLink, ImageRequest
from evolink_async.notebook import progress_bar
client = AsyncEvoLink()
requests = [ImageRequest(model="gpt-4o-image", prompt=f"a lighthouse {n}", key=f"k{n}") for n in range(REQUESTS)]
"""

JOB = """
done = {}
async with client.pool(requests, ledger="job.db", save_to="out", max_outstanding=4, on_progress=progress_bar()) as pool:
    async for outcome in pool:
        done[outcome.key] = outcome
        open("taken", "w").write(str(len(done)))
"""

# What a user finds after the interruption, and that the loop is as usable as before.
LOOK = """
import json
assert all(outcome.task is not None for outcome in pool.leftovers if outcome.status != "unknown")
print(json.dumps({
    "done": len(done), "ok": sum(o.ok for o in done.values()), "leftovers": len(pool.leftovers),
    "from_ledger": sum(o.from_ledger for o in done.values()), "files": sum(len(o.files) for o in done.values()),
    "credits": str((await client.credits()).key.used),
}))
"""

AGAIN = """
from evolink_async.notebook import live_table
async with client.pool(requests, ledger="job.db", on_progress=live_table()) as pool:
    again = [outcome async for outcome in pool]
"""

CLOSE = "await client.aclose()"


async def book() -> dict[str, Any]:
    key = {"Authorization": f"Bearer {os.environ['EVOLINK_API_KEY']}"}
    async with httpx.AsyncClient(base_url=os.environ["EVOLINK_BASE_URL"], headers=key) as http:
        found: dict[str, Any] = (await http.get("/_emulator/book")).raise_for_status().json()
        return found


async def clock(**value: Any) -> None:
    async with httpx.AsyncClient(base_url=os.environ["EVOLINK_BASE_URL"]) as http:
        (await http.post("/_emulator/clock", json=value)).raise_for_status()


async def until_half_way(folder: Path, some: int) -> None:
    """Until that many outcomes were taken and other tasks run: these go on running, for the clock stands from then."""
    taken = folder / "taken"
    while True:
        posts = (await book())["posts"]
        done = sum(post["status"] == "completed" for post in posts)
        if len(posts) > done and taken.exists() and int(taken.read_text() or 0) >= some:
            return
        if done < some:
            await clock(advance=0.2)
        await asyncio.sleep(0.02)


async def main(folder: str, requests: int, interruptions: int) -> None:
    notebook = nbformat.v4.new_notebook()
    sources = [SETUP.replace("REQUESTS", str(requests)), JOB, LOOK, AGAIN, CLOSE]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    client = nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    runs: list[dict[str, Any]] = []
    async with client.async_setup_kernel():
        setup, job, look, again, close = notebook.cells
        await client.async_execute_cell(setup, 0)
        for run in range(interruptions + 1):
            error = None
            (Path(folder) / "taken").unlink(missing_ok=True)
            cell = asyncio.ensure_future(client.async_execute_cell(job, 1))
            if run < interruptions:
                await until_half_way(Path(folder), (run + 1) * requests // (interruptions + 2))
                await client.km.interrupt_kernel()
            else:
                await clock(standing=False)
            try:
                await cell
            except nbclient.exceptions.CellExecutionError as failure:
                error = failure.ename
            outputs = list(job.outputs)
            await client.async_execute_cell(look, 2)
            found = json.loads(look.outputs[0]["text"])
            found |= {"error": error, "posts": len((await book())["posts"])}
            found["shown"] = "".join(out.get("text", "") for out in outputs)
            runs.append(found)
        await client.async_execute_cell(again, 3)
        await client.async_execute_cell(close, 4)
    posts = (await book())["posts"]
    live = [output["data"].get("text/html", "") for output in again.outputs if "data" in output]
    print(json.dumps({"runs": runs, "posts": len(posts), "live": live}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
