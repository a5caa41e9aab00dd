"""Runs one block of the README the way its reader would: as a script, in a notebook cell, or as a web app.

python run_block.py FILE
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
from pathlib import Path
from typing import Any

import httpx


async def use_app(app: Any) -> None:
    """Call the web backend of the block: submit, then wait for the result."""
    transport = httpx.ASGITransport(app=app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://app") as http:
        submitted = (await http.post("/pictures", params={"prompt": "a lighthouse"})).raise_for_status().json()
        print((await http.get(f"/pictures/{submitted['id']}", timeout=30)).raise_for_status().json())


async def cell(code: Any, names: dict[str, Any]) -> None:
    """Run a notebook cell, top-level await included, and close what a kernel would keep open."""
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result
    print(names["task"])
    await names["client"].aclose()


def main(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    code = compile(source, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, Any] = {"__name__": "__main__"}
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(cell(code, names))
        return
    exec(code, names)
    if "app" in names:
        asyncio.run(use_app(names["app"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
