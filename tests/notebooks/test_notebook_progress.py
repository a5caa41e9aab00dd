"""Progress bars and tables as `on_progress`."""

from __future__ import annotations

import io
import sys

import pytest

from evolink_async import AsyncEvoLink, ConfigurationError, ImageRequest, PoolStats
from evolink_async.notebook import live_table, progress_bar


def stats(finished: int, total: int | None, **more: int) -> PoolStats:
    counts = {"completed": finished} | more
    return PoolStats(total=total, pulled=finished, waiting=0, outstanding=2, untaken=0, counts=counts)


def bar_text(*moments: PoolStats, **options: int | None) -> str:
    screen = io.StringIO()
    tell = progress_bar(file=screen, mininterval=0, **options)
    for moment in moments:
        tell(moment)
    return screen.getvalue().rpartition("\r")[2] or screen.getvalue()


async def test_the_bar_follows_a_job_to_its_end(client: AsyncEvoLink) -> None:
    screen = io.StringIO()
    requests = [ImageRequest(model="gpt-4o-image", prompt=f"p{n}") for n in range(5)]
    async with client.pool(requests, on_progress=progress_bar(file=screen)) as pool:
        _ = [outcome async for outcome in pool]
    assert "5/5" in screen.getvalue()
    assert "12.5 credits" in screen.getvalue()


def test_a_total_that_becomes_known_late_is_shown_then() -> None:
    assert "3/7" in bar_text(stats(2, None), stats(3, 7))


def test_a_total_that_the_caller_knows_stays() -> None:
    assert "3/7" in bar_text(stats(2, None), stats(3, None), total=7)
    assert "3/7" in bar_text(stats(2, None), stats(3, 7), total=None)


def test_what_a_pool_leaves_unfinished_is_not_shown_as_done() -> None:
    text = bar_text(stats(3, 10), stats(3, 5, unfinished=2))
    assert "3/10" in text
    assert "not completed" not in text


def test_what_went_wrong_is_told_beside_the_bar() -> None:
    assert "2 not completed" in bar_text(stats(3, 10, failed=1, rejected=1, not_submitted=4))


def test_without_tqdm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ConfigurationError, match=r"evolink-async\[notebook\]"):
        progress_bar()


def test_without_ipython_a_live_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(ConfigurationError, match="IPython"):
        live_table()
