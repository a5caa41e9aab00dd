"""The page as text: what is foreign in it is text and no more."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import threading
import warnings
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from PIL import Image
from report_folders import BEGUN, MADE, contents, item, png

from evolink_async.report import page as page_room
from evolink_async.report import previews as previews_room
from evolink_async.report.page import image_files, render
from evolink_async.report.previews import MOST_PIXELS, previews

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(2)>',
    "'-alert(3)-'",
    "{{ 7*7 }}{% raw %}",
    "\u2028alert(4)\u2029",
    "<svg onload=alert(5)>",
    "&lt;script&gt;",
    "\ud800 half",
    "a\x00b",
]


class Reader(HTMLParser):
    """Tags with their attributes, and what stands in each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return dict(json.loads(found[1]))


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_is_foreign_comes_out_as_text(text: str) -> None:
    one = item(key=text, model=text, prompt=text, error_code=text, error=text, task_id=text, elsewhere=(text,))
    made = contents([one], title=text)
    made.notes.append(text)
    page = render(made, {}, MADE)
    page.encode()
    reader = Reader(page)
    names = [tag for tag, _ in reader.tags]
    assert names.count("script") == 2
    assert names.count("img") == 0
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert not [name for _, attributes in reader.tags for name in attributes if name == "style"]
    [told] = data_of(page)["items"]
    shown = text.replace("\u2028", r"\u2028").replace("\u2029", r"\u2029").replace("\ud800", r"\ud800")
    shown = shown.replace("\x00", r"\x00")
    assert (told["name"], told["prompt"], told["error"]) == (shown, shown, f"{shown}: {shown}")
    assert f"<bdi>{escape(shown)}</bdi>" in page


def test_the_policy_allows_our_script_and_style_and_no_network() -> None:
    page = render(contents([item()]), {}, MADE)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy is not None
    allowed = html.unescape(policy[1])
    assert allowed.startswith("default-src 'none'; img-src 'self' file: data:; media-src 'self' file:;")
    for tag in ("style", "script"):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in allowed
    assert "unsafe" not in allowed
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg|https\?:", "", page)


def test_numbers_are_credits_as_text_seconds_and_utc() -> None:
    one = item(spent=Decimal("0.100001"), reserved=Decimal("2.5"), service_seconds=4.5, attempts=3)
    [told] = data_of(render(contents([one]), {}, MADE))["items"]
    assert (told["credits"], told["reserved"]) == ("2.600001", "2.5")
    assert (told["seconds"], told["late"], told["attempts"]) == (5.0, 0.5, 3)
    assert told["submitted"] == "2026-11-20 12:00:00 UTC"


def test_what_is_not_known_is_not_there() -> None:
    one = item(status="not_submitted", spent=None, reserved=None, submitted_at=None, finished_at=None, prompt=None)
    page = render(contents([one]), {}, MADE)
    [told] = data_of(page)["items"]
    assert sorted(told) == ["model", "name", "status"]
    for sentence in ("Nothing was submitted", "No task has ended", "Nothing was charged", "No record of the pace"):
        assert sentence in page


def test_a_job_without_requests_is_a_page_too() -> None:
    assert data_of(render(contents([]), {}, MADE)) == {"items": [], "total": 0}


def test_file_names_become_relative_links() -> None:
    files = ("k0-1.png", "javascript:alert(1).mp4", 'a"b<c>#?&.wav', "sub/ä b.webp", "page.html", "x.svg")
    [told] = data_of(render(contents([item(files=files)]), {"k0-1.png": None}, MADE))["items"]
    assert [(file["url"], file["kind"]) for file in told["files"]] == [
        ("./k0-1.png", "image"),
        ("./javascript%3Aalert%281%29.mp4", "video"),
        ("./a%22b%3Cc%3E%23%3F%26.wav", "audio"),
        ("./sub/%C3%A4%20b.webp", "image"),
    ]
    assert told["files"][0]["preview"] is None
    assert told["elsewhere"] == ["page.html", "x.svg"]  # could hold scripts: named, not linked


def test_links_that_die_are_only_told_where_no_file_is() -> None:
    links = ("https://files.example/a.png",)
    saved, not_saved = data_of(
        render(contents([item(0, links=links, files=("a.png",)), item(1, links=links)]), {}, MADE)
    )["items"]
    assert "links" not in saved
    assert not_saved["links"] == list(links)


def test_the_texts_of_a_page_are_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_room, "MOST_TEXT", 1000)
    told = data_of(render(contents(item(number, prompt="x" * 4000) for number in range(10)), {}, MADE))["items"]
    assert {one["prompt"] for one in told} == {"x" * 100 + "… (3,900 more characters)"}


def test_hostile_models_are_text_in_the_plots(tmp_path: Path) -> None:
    page = render(contents([item(model="<script>alert(1)</script>" * 3)]), {}, MADE)
    assert "&lt;script&gt;" in page
    assert Reader(page).tags[-1] == ("script", {})


# Previews


def test_small_pictures_are_made_of_large_ones(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(edge=900))
    preview = previews(tmp_path, ["a.png"])["a.png"]
    assert preview is not None
    assert preview.startswith("data:image/webp;base64,UklGR")
    assert len(preview) < 2000


def test_what_is_no_picture_or_too_large_a_one_is_not_to_be_shown(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(claimed=30_000))
    Image.new("1", (int(MOST_PIXELS**0.5) + 1,) * 2).save(tmp_path / "large.png")
    (tmp_path / "half.png").write_bytes(png(edge=300)[:400])
    (tmp_path / "lie.png").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    (tmp_path / "empty.png").write_bytes(b"")
    names = ["bomb.png", "large.png", "half.png", "lie.png", "empty.png", "gone.png"]
    assert previews(tmp_path, names) == dict.fromkeys(names)


def test_previews_end_where_the_room_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}.png" for number in range(100)]
    for name in names:
        (tmp_path / name).write_bytes(png())
    monkeypatch.setattr("evolink_async.report.previews.MOST_BYTES", 500)
    made = previews(tmp_path, names)
    assert list(made) == names[:32]


def test_two_reports_at_once_leave_the_warnings_of_the_program_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        if path.name == "first.png":
            first_is_in.set()
            second_is_in.wait(0.3)
        else:
            second_is_in.set()
            first_is_out.wait(60)

    def first() -> None:
        previews(tmp_path, ["first.png"])
        first_is_out.set()

    monkeypatch.setattr(previews_room, "preview_of", slow)
    before = list(warnings.filters)
    threads = [threading.Thread(target=first), threading.Thread(target=previews, args=(tmp_path, ["second.png"]))]
    for thread in threads:
        thread.start()
        assert first_is_in.wait(60)
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_the_first_picture_of_a_request_is_its_preview() -> None:
    items = [item(0, files=("a.png", "b.png")), item(1, files=("c.mp4", "d.png")), item(2, files=("e.txt", "f.JPG"))]
    assert image_files(contents([*items, item(3, files=("g.avif",)), item(4)])) == ["a.png", "f.JPG"]


def test_times_of_the_page_are_utc() -> None:
    page = render(contents([item(0), item(1, finished_at=BEGUN.replace(day=21))]), {}, MADE)
    assert "2026-11-20 12:00:00 to 2026-11-21 12:00:00 UTC · Report of 2026-11-20 13:00:00 UTC" in page
