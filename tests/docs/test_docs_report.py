"""docs/report.md says what is true."""

from __future__ import annotations

import re
from pathlib import Path

from evolink_async.report import files, page
from evolink_async.report.items import MOST_ITEMS
from evolink_async.report.previews import MOST_BYTES, MOST_PIXELS, MOST_SECONDS

PAGE = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")


def test_its_limits_are_those_of_the_code() -> None:
    text = " ".join(PAGE.split())
    assert f"up to {MOST_BYTES / 1e6:g} MB and {MOST_SECONDS:g} s of making them" in text
    assert f"first {MOST_ITEMS:,} requests" in text
    assert f"more than {MOST_PIXELS / 1e6:g} million pixels" in text
    [cards] = re.findall(r"const PAGE = (\d+);", page._part("page.js"))
    assert int(cards) == 100
    assert "a hundred requests a page" in text


def test_it_names_every_file_that_a_report_is_made_of() -> None:
    for name in (files.RESULTS, files.ERRORS, files.LEDGER, files.PROGRESS, files.REPORT):
        assert f"`{name}`" in PAGE
