"""What notebooks show: small, escaped, and inert whatever the service or the caller wrote."""

from __future__ import annotations

from decimal import Decimal
from html.parser import HTMLParser
from pathlib import PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async import (
    AsyncEvoLink,
    ImageRequest,
    Outcome,
    OutcomeStatus,
    PoolStats,
    Task,
    TaskFailedError,
)
from evolink_async.html import link, preview

TAGS = {"table", "tr", "th", "td", "ul", "li", "a", "img"}
ATTRIBUTES = {"class", "style", "href", "target", "rel", "src", "alt", "loading", "referrerpolicy"}

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    'https://x/"onload="alert(1)',
    "https://x/' onerror='alert(1)",
    "https://x/ onerror=alert(1)",
    "JaVaScRiPt://x/%0aalert(1)",
    "data:text/html,<script>alert(1)</script>",
    " https://x/\n<b>",
]


class Reader(HTMLParser):
    """Every tag and attribute that a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            if name in ("href", "src"):
                self.links.append((name, value or ""))


def check(html: str) -> Reader:
    reader = Reader(html)
    for name, url in reader.links:
        assert url.startswith("https://" if name == "src" else ("https://", "http://")), url
    return reader


def task(text: str = "x", **more: object) -> Task:
    wire = {"id": "task-1", "status": "completed", "model": text, "type": "image", "results": [text]} | more
    return Task.model_validate(wire)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_wherever_it_stands(text: str) -> None:
    failed = task(text, status="failed", error={"code": text, "message": text})
    request = ImageRequest(model=text, prompt=text, key=text)
    outcome = Outcome(
        index=0,
        key=text,
        identity=text,
        request=request,
        status=OutcomeStatus.FAILED,
        task=failed,
        error=TaskFailedError(text, task=failed),
        files=(PurePath(text),),
    )
    stats = PoolStats(total=1, pulled=1, waiting=0, outstanding=0, untaken=0, counts={text: 1})
    for value in (task(text), failed, outcome, stats):
        check(value._repr_html_())


@given(st.text(), st.text())
def test_any_text_stays_text(text: str, more: str) -> None:
    check(link(text) + preview(text) + link("https://" + more) + preview("https://" + more))


def test_credits_are_shown_without_idle_zeros() -> None:
    credits = {"credits_spent": Decimal("0.0"), "credits_reserved": Decimal("1200.50")}
    shown = PoolStats(total=1, pulled=1, waiting=0, outstanding=1, untaken=0, **credits)._repr_html_()
    assert "0 spent, 1200.5 reserved" in shown
    assert "0.0" not in shown


async def test_a_pool_shows_its_counts_while_it_runs_and_why_it_ended(client: AsyncEvoLink) -> None:
    requests = [ImageRequest(model="gpt-4o-image", prompt="<b>", key=f"<i>{n}") for n in range(3)]

    def failing():  # type: ignore[no-untyped-def]
        yield from requests
        raise ValueError("<script>")

    pool = client.pool(failing())
    assert "not entered" in check(pool._repr_html_()).rawdata + pool._repr_html_()
    with pytest.raises(ValueError, match="script"):
        async with pool:
            seen = [pool._repr_html_() async for _ in pool]
    assert all("open" in html for html in seen)
    html = pool._repr_html_()
    check(html)
    assert "ValueError: &lt;script&gt;" in html
    assert '<td style="text-align:left">3</td>' in html  # completed


def test_only_https_images_are_shown_as_pictures_and_tell_nobody_where_they_are_shown() -> None:
    html = task("https://files.example/a.png")._repr_html_()
    assert 'referrerpolicy="no-referrer"' in html
    assert 'loading="lazy"' in html
    assert [name for name, _ in check(html).links] == ["href", "src"]
    assert "<img" not in task("http://files.example/a.png")._repr_html_()
    assert "<img" not in task("https://files.example/a.mp4", type="video")._repr_html_()


def test_what_is_shown_is_of_bounded_size() -> None:
    many = task("m" * 10_000, results=[f"https://files.example/{n}{'x' * 5000}.png" for n in range(1000)])
    assert len(many._repr_html_()) < 20_000
    assert "992 more" in many._repr_html_()


def test_a_running_task_says_how_to_wait_for_it() -> None:
    html = task(status="processing", progress=40, results=[], task_info={"estimated_time": 30})._repr_html_()
    check(html)
    assert "40 %" in html
    assert "30 s" in html
    assert "await client.tasks.wait(&#x27;task-1&#x27;)" in html


def test_a_prompt_is_not_shown() -> None:
    request = ImageRequest(model="m", prompt="a private wish", key="k")
    outcome = Outcome(
        index=0, key="k", identity="k", request=request, status=OutcomeStatus.COMPLETED, credits=Decimal("2.5")
    )
    assert "private" not in outcome._repr_html_()
