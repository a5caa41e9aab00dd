"""A real browser for the tests marked `browser`: Debian's chromium, headless, through playwright."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser as Chromium
from playwright.async_api import Page as ChromiumPage
from playwright.async_api import async_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds


class Page:
    """A page that is open in the browser."""

    def __init__(self, page: ChromiumPage) -> None:
        self.raw = page
        self._complaints: list[str] = []
        page.on("console", lambda message: self._complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.on("dialog", lambda dialog: self._complaints.append(f"dialog: {dialog.message}"))

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        return await self.raw.evaluate(expression)

    async def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true. (Playwright's own way needs eval, which our pages forbid.)"""
        async with asyncio.timeout(PATIENCE / 1000):
            while True:
                if await self.value(expression):
                    return
                await asyncio.sleep(0.05)

    async def complaints(self) -> list[str]:
        """Errors on the console, uncaught exceptions and dialogs so far."""
        return self._complaints

    async def screenshot(self, path: Path) -> None:
        await self.raw.screenshot(path=path, full_page=True)


class Browser:
    """One browser process."""

    def __init__(self, chromium: Chromium) -> None:
        self._chromium = chromium

    @asynccontextmanager
    async def page(self, url: str, *, width: int = 1280, height: int = 1000, **options: Any) -> AsyncIterator[Page]:
        context = await self._chromium.new_context(viewport={"width": width, "height": height}, **options)
        try:
            page = Page(await context.new_page())
            await page.raw.goto(url, timeout=PATIENCE)
            yield page
        finally:
            await context.close()


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser, as long as the block."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        try:
            yield Browser(browser)
        finally:
            await browser.close()
