"""The page at ``/``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from evolink_async.emulator import Emulator, Fault, Server

IMAGES = "/v1/images/generations"
HOSTILE = "</td><script>alert(1)</script><img src=x onerror='alert(2)'> & \"co\""


async def busy(server: Server) -> list[str]:
    """Some tasks of each kind and end."""
    headers = {"Authorization": f"Bearer {server.api_key}"}
    async with httpx.AsyncClient(base_url=server.base_url, headers=headers) as client:
        ids = []
        for kind, body in [
            ("images", {"model": "gpt-4o-image", "prompt": HOSTILE}),
            ("images", {"model": "gpt-4o-image", "prompt": "two of them", "n": 2}),
            ("videos", {"model": "veo3", "prompt": "waves"}),
            ("audios", {"model": "suno-v5", "prompt": "a song"}),
        ]:
            ids.append((await client.post(f"/v1/{kind}/generations", json=body)).json()["id"])
        await client.post(IMAGES, json={"model": "nope"})
        server.emulator.end(ids[0])
        server.emulator.end(ids[2], "failed", code="service_error")
        return ids


def emulator(**options: Any) -> Emulator:
    faults = [Fault(path="/v1/credits", status=503, body={"<b>": HOSTILE})]
    return Emulator(standing=True, seed=3, credits=1000, faults=faults, **options)


async def test_the_page_shows_account_faults_and_tasks_and_escapes_what_came_from_outside() -> None:
    async with emulator(rate=5).serve() as server, httpx.AsyncClient(base_url=server.base_url) as client:
        assert "None yet" in (await client.get("/")).text
        ids = await busy(server)
        answer = await client.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        page = answer.text
        assert all(task_id in page for task_id in ids)
        for text in (
            "service_error",
            "1 × 400 invalid_request",
            "5/s, 5 at once",
            "the clock stands still",
            "/v1/credits",
        ):
            assert text in page, text
        assert "<img src=x" not in page
        assert len(re.findall("<script>", page)) == 1
        assert (await client.post("/")).status_code == 405
        assert (await client.head("/")).content == b""


async def test_the_page_shows_the_newest_hundred() -> None:
    async with emulator().serve() as server, httpx.AsyncClient(base_url=server.base_url) as client:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        for number in range(105):
            body = {"model": "gpt-4o-image", "prompt": f"number {number}."}
            await client.post(IMAGES, json=body, headers=headers)
        page = (await client.get("/")).text
        assert "the newest 100" in page
        assert "number 104." in page
        assert "number 4." not in page


@pytest.mark.browser
async def test_in_a_browser_the_page_is_inert_live_and_has_its_pictures(browser: Any, tmp_path: Path) -> None:
    async with emulator().serve() as server:
        ids = await busy(server)
        async with browser.page(server.base_url) as page:
            assert await page.value("document.title") == "EvoLink emulator"
            assert HOSTILE in await page.value("document.querySelector('#tasks').innerText")
            assert await page.value("document.querySelectorAll('#tasks tr').length") == 5
            loaded = "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
            await page.until(f"{loaded} === 1")
            # It follows what happens, without being loaded again.
            server.emulator.end(ids[1])
            await page.until(f"{loaded} === 3")
            await page.until("document.querySelector('#account').innerText.includes('7.5')")
            assert await page.value("document.title") == "EvoLink emulator"
            assert await page.complaints() == []
            await page.screenshot(tmp_path / "page.png")
