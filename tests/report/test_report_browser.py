"""Reports in a real browser: inert whatever they show, usable with thousands of requests, by keyboard too."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from report_folders import BEGUN, MADE, contents, item, outcome, png, write_ledger, write_outcomes

from evolink_async.emulator.media import render as media
from evolink_async.errors import DownloadError
from evolink_async.report import write_report
from evolink_async.report.items import MOST_ITEMS
from evolink_async.report.page import image_files, render
from evolink_async.report.previews import previews
from evolink_async.requests import ImageRequest

pytestmark = pytest.mark.browser

HOSTILE = [
    "</script><script>window.hacked=1;alert(1)</script>",
    "<!--<script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1;alert(2)">',
    "<img src=http://127.0.0.1:9/pixel.gif>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<svg><animate onbegin=alert(3) attributeName=x dur=1s>",
    "<details open ontoggle=alert(4)>",
    "<style>@import 'http://127.0.0.1:9/x.css'; body{display:none}</style>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<base href=http://127.0.0.1:9/>",
    "<form action=http://127.0.0.1:9/><button>go</button></form>",
    "javascript:window.hacked=1",
    "data:text/html,<script>alert(5)</script>",
    "${alert(6)} {{constructor.constructor('alert(7)')()}}",
    "\u202etxt.exe\u202c \u2066x\u2069",
    "a\x00b\x1b[2Jc\x07\u2028d\u2029e",
    "__proto__",
    "constructor",
    "Z\u0351\u036f" * 50,
    "灯" * 3000,
    "x" * 100_000,
]
NAMES = ["javascript:alert(1).png", '"><script>.png', "a b#c?d&e%41.png", "ünï 灯.png", "'onerror='alert(1).png"]


@asynccontextmanager
async def opened(browser: Any, path: Path, **options: Any) -> AsyncIterator[tuple[Any, list[str]]]:
    """The report in a page, and the addresses that it asks for."""
    asked: list[str] = []
    async with browser.page("about:blank", **options) as page:
        page.raw.on("request", lambda request: asked.append(request.url))
        await page.raw.goto(path.as_uri())
        yield page, asked


def written(folder: Path, items: list[Any], **made: Any) -> Path:
    """A report of these items."""
    whole = contents(items)
    path = folder / "report.html"
    path.write_text(render(whole, made.get("previews", previews(folder, image_files(whole))), MADE), encoding="utf-8")
    return path


async def test_hostile_text_everywhere_stays_text(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(8)>"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(png())
    outcomes = []
    for number, text in enumerate(HOSTILE):
        request = ImageRequest(model=text[:256], prompt=text, key=text[:1024], metadata={"note": text})
        files = [folder / name for name in NAMES]
        wire = {"id": "task-unified-1", "status": "completed", "results": [text, "https://127.0.0.1:9/x.png"]}
        error = DownloadError(text, code=text[:100])
        outcomes.append(outcome(number, key=text[:1024], request=request, files=files, error=error, task=_task(wire)))
    write_outcomes(folder, *outcomes)
    await write_ledger(folder, {text[:1024]: "failed" for text in HOSTILE[:8]})
    path = await write_report(folder)
    async with opened(browser, path) as (page, asked):
        assert await page.value("document.querySelectorAll('.card').length") == len(HOSTILE)
        await page.until("[...document.images].every((image) => image.complete)")
        for number in range(len(HOSTILE)):
            await page.value(f"document.querySelectorAll('.top button')[{number}].click()")
            await page.value("document.getElementById('close').click()")
        await page.value("document.getElementById('model').selectedIndex = 3")
        await page.value("document.getElementById('model').dispatchEvent(new Event('change'))")
        await asyncio.sleep(0.2)
        assert await page.complaints() == []
        assert await page.value("window.hacked") is None
        assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}
        assert all(url.startswith((folder.as_uri(), "data:")) for url in asked)
        assert page.raw.url == path.as_uri()
        assert len(page.raw.frames) == 1
        assert await page.value("document.querySelectorAll('script').length") == 2
        assert await page.value("document.querySelectorAll('iframe, meta[http-equiv=refresh], base').length") == 0
        hrefs = await page.value("[...document.querySelectorAll('a')].map((link) => link.href)")
        assert all(href.startswith((folder.as_uri() + "/", "https://127.0.0.1:9/")) for href in hrefs)
        assert await page.value("document.querySelector('h1').innerText") == folder.name


def _task(wire: dict[str, Any]) -> Any:
    from evolink_async.types import Task

    return Task.model_validate(wire)


async def test_the_policy_stops_what_would_get_through(browser: Any, tmp_path: Path) -> None:
    """Were a text ever to become markup: the browser itself runs nothing and loads nothing."""
    path = written(tmp_path, [item()])
    page_text = path.read_text()
    arrived = bytearray()  # chromium may connect, but asks for nothing

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.extend(await reader.read(100))
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
        there = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        hole = (
            f"<img src=x onerror='window.hacked=1'><script>window.hacked=2</script><img src={there}/a.gif>"
            f"<iframe src={there}/b></iframe><link rel=stylesheet href={there}/c><video src={there}/d autoplay></video>"
            f"<object data={there}/e></object><form id=f action={there}/f></form><base href={there}/>"
        )
        path.write_text(page_text.replace("<main>", f"<main>{hole}"))
        async with opened(browser, path) as (page, _):
            await page.until("document.querySelectorAll('.card').length === 1")
            await page.value("document.getElementById('f').submit()")
            await page.value(f"fetch('{there}/g').catch(() => 0)")
            await asyncio.sleep(0.5)
            assert await page.value("window.hacked") is None
            assert page.raw.url == path.as_uri()
            assert [line for line in await page.complaints() if "Content Security Policy" in line]
    assert arrived == b""


async def test_control_characters_and_directions_are_written_out(browser: Any, tmp_path: Path) -> None:
    path = written(tmp_path, [item(key="gnp.\u202eexe", prompt="a\x00b\x1b[31mred")])
    async with opened(browser, path) as (page, _):
        text = await page.value("document.querySelector('.card').innerText")
        assert r"gnp.\u202eexe" in text
        assert r"a\x00b\x1b[31mred" in text


async def test_pictures_sounds_and_films_are_shown_and_fetched_late(browser: Any, tmp_path: Path) -> None:
    digest = bytes(range(16))
    (tmp_path / "a.png").write_bytes(media(digest, 1, "png", None))
    (tmp_path / "b.wav").write_bytes(media(digest, 1, "wav", None))
    items = [item(0, files=("a.png", "a.png")), item(1, files=("b.wav",)), item(2, files=("no.png",))]
    for number in range(3, 60):
        (tmp_path / f"{number}.mp4").write_bytes(media(digest, number, "mp4", None))
        items.append(item(number, files=(f"{number}.mp4",)))
    path = written(tmp_path, items, previews={})
    async with opened(browser, path) as (page, asked):
        await page.until("document.querySelector('#cards img').naturalWidth > 0")
        await page.until("document.querySelector('.card:nth-child(3)').innerText.includes('cannot be shown')")
        films = [url for url in asked if url.endswith(".mp4")]
        assert len(films) < 30
        assert not [url for url in asked if url.endswith(".wav")]
        await page.value("document.querySelector('.card:last-child').scrollIntoView()")
        await page.until("document.querySelector('.card:last-child video').readyState >= 2")
        assert await page.value("document.querySelector('.card:last-child video').videoWidth") == 64
        assert await page.value("document.querySelector('.card:first-child .more').innerText") == "2 files"
        assert (await page.complaints()) in ([], ["Failed to load resource: net::ERR_FILE_NOT_FOUND"])


async def test_filters_orders_and_counts(browser: Any, tmp_path: Path) -> None:
    items = [item(number, spent=Decimal(number), prompt=f"Picture {number}") for number in range(230)]
    items += [item(number, "failed", model="veo3", error="too DARK", spent=None) for number in range(230, 250)]
    path = written(tmp_path, items)
    async with opened(browser, path) as (page, _):
        count, first = "document.getElementById('count').innerText", "document.querySelector('.top button').innerText"
        assert await page.value(count) == "1–100 of 250 requests"
        statuses = "[...document.getElementById('status').options].map((option) => option.innerText)"
        assert await page.value(statuses) == ["all (250)", "completed (230)", "failed (20)"]
        await page.raw.select_option("#status", "failed")
        assert await page.value(count) == "20 requests, of 250"
        await page.raw.select_option("#status", "")
        await page.raw.select_option("#model", "veo3")
        assert await page.value(count) == "20 requests, of 250"
        await page.raw.select_option("#model", "")
        await page.raw.fill("#text", "too dark")
        await page.until(f"{count} === '20 requests, of 250'")
        await page.raw.fill("#text", "nothing like it")
        await page.until("document.getElementById('cards').innerText.includes('Nothing fits')")
        await page.raw.fill("#text", "")
        await page.until(f"{count} === '1–100 of 250 requests'")
        await page.raw.select_option("#order", "credits")
        assert await page.value(first) == "k229"
        await page.raw.click(".pager button:last-child >> nth=0")
        await page.raw.click(".pager button:last-child >> nth=0")
        assert await page.value(count) == "201–250 of 250 requests"
        assert await page.value("document.querySelector('.pager button:last-child').disabled") is True


async def test_everything_works_by_keyboard(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = written(tmp_path, [item(0, files=("a.png",)), item(1), item(2)])
    async with opened(browser, path) as (page, _):
        keys = page.raw.keyboard
        for _ in range(5):  # search, three selects, the first picture
            await keys.press("Tab")
        assert await page.value("document.activeElement.getAttribute('aria-label')") == "Open k0"
        await keys.press("Enter")
        title = "document.getElementById('detail-title').innerText"
        assert await page.value(title) == "k0"
        await keys.press("ArrowRight")
        await keys.press("ArrowRight")
        await keys.press("ArrowRight")
        assert await page.value(title) == "k2"
        await keys.press("Escape")
        assert await page.value("document.getElementById('detail').open") is False
        assert await page.value("document.querySelector('#cards img').alt") == "a lighthouse, number 0"


async def test_dark_narrow_and_printed_pages_fit(browser: Any, tmp_path: Path) -> None:
    items = [item(number, model="a-model-with-a-very-long-name-" * 4, prompt="word" * 200) for number in range(9)]
    path = written(tmp_path, items)
    background = "getComputedStyle(document.body).backgroundColor"
    async with opened(browser, path, width=400, color_scheme="dark") as (page, _):
        assert await page.value("document.documentElement.scrollWidth") <= 400
        assert await page.value(background) == "rgb(21, 24, 27)"
        await page.raw.emulate_media(media="print", color_scheme="light")
        assert await page.value(background) == "rgb(255, 255, 255)"
        assert await page.value("getComputedStyle(document.getElementById('filters')).display") == "none"


async def test_without_script_the_figures_are_there(browser: Any, tmp_path: Path) -> None:
    path = written(tmp_path, [item(0), item(1, "failed")])
    async with opened(browser, path, java_script_enabled=False) as (page, _):
        text = await page.raw.inner_text("body")
        assert "Completion over time" in text
        assert "needs JavaScript" in text


@pytest.mark.parametrize("number", [5_000, MOST_ITEMS])
async def test_thousands_of_requests_stay_usable(browser: Any, tmp_path: Path, number: int) -> None:
    dice = random.Random(1)
    (tmp_path / "a.png").write_bytes(media(bytes(16), 1, "png", None))
    preview = previews(tmp_path, ["a.png"])["a.png"]
    items = []
    for n in range(number):
        took = timedelta(seconds=dice.uniform(1, 60))
        sent = BEGUN + timedelta(seconds=n / 50)
        prompt = " ".join(dice.choices(("lighthouse", "owl", "market", "bridge", "boat", "comet"), k=25))
        files = (f"{n}.png",)
        items.append(item(n, submitted_at=sent, finished_at=sent + took, prompt=prompt, files=files))
    path = written(tmp_path, items, previews={f"{n}.png": preview for n in range(3000)})
    started = time.perf_counter()
    async with opened(browser, path) as (page, _):
        loaded = time.perf_counter() - started
        assert await page.value("document.querySelectorAll('.card').length") == 100
        elements = await page.value("document.querySelectorAll('*').length")
        heap = await page.value("performance.memory.usedJSHeapSize") / 1e6
        searched = await page.value(_SEARCH)
        print(f"{number}: {path.stat().st_size / 1e6:.1f} MB, open in {loaded:.2f} s, {elements} elements, "
              f"heap {heap:.0f} MB, search {searched:.0f} ms")  # fmt: skip
        assert elements < 3000
        assert await page.complaints() == []


_SEARCH = """
(async () => {
  const field = document.getElementById('text'), begun = performance.now();
  field.value = 'owl owl';
  field.dispatchEvent(new Event('input'));
  while (!document.getElementById('count').innerText.includes(', of ')) await new Promise((go) => setTimeout(go, 5));
  return performance.now() - begun;
})()
"""
