"""A report as one HTML file: figures and plots made here, the gallery by a script of ours from data inside the page.

What is foreign (keys, prompts, models, errors, file names) is text and nothing else: the template escapes it, the
script gets it as JSON that cannot end its element, and the page's policy runs that one script and loads nothing from
elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from evolink_async.durations import duration
from evolink_async.report import charts
from evolink_async.report.items import STATUSES, Contents, Item, Totals
from evolink_async.report.text import amount, cut, moment, visible

MOST_TEXT = 20_000_000  # characters of all prompts and errors
_LONGEST_PROMPT = 5_000
_KINDS = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp", "gif", "avif"), "image"),
    **dict.fromkeys(("mp4", "webm", "mov"), "video"),
    **dict.fromkeys(("mp3", "wav", "ogg", "flac", "m4a", "aac"), "audio"),
}
PREVIEWED = (".png", ".jpg", ".jpeg", ".webp", ".gif")  # what Pillow reads wherever it is installed
_STYLES = {"completed": "good", "unfinished": "warn", "not_submitted": "warn"}
_ICON = (
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'>"
    "<path d='M1 4h2v4h-2zM4 1h2v7h-2z' fill='seagreen'/></svg>"
)
_IN_SCRIPT = re.compile("[<>&\u2028\u2029]")  # what could end the element, or begin a comment in it


def render(contents: Contents, previews: Mapping[str, str | None], made_at: datetime) -> str:
    """The page.

    previews: by file, data URIs of small pictures; None: a file that is not to be shown. Files of neither sort are
    shown themselves. Links to files go out from the folder in which the page will lie.
    """
    totals = contents.totals
    runs = list(contents.runs())
    moments = [*totals.submitted, *totals.completed, *totals.in_vain]
    recorded = [sample.at for run in runs for sample in run]
    axis = charts.TimeAxis(moments)
    style, script = _part("page.css"), _part("page.js")
    page = _template().render(
        title=visible(contents.title),
        subtitle=_subtitle(moments, made_at),
        tiles=_tiles(totals, moments, runs),
        notes=[visible(note) for note in contents.notes],
        charts=[
            charts.completion(totals.submitted, totals.completed, totals.in_vain, axis),
            charts.delays(totals.delays, totals.took, whole_seconds=totals.whole_seconds),
            charts.pace(runs, charts.TimeAxis([*moments, *recorded])),
            charts.cost_by_model({visible(name): sums for name, sums in totals.models.items()}),
        ],
        width=charts.WIDTH,
        left=charts.LEFT,
        right=charts.RIGHT,
        top=charts.TOP,
        bottom=charts.BOTTOM,
        icon=_ICON,
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_data(contents, previews)),
    )
    return page.lstrip()


def _policy(style: str, script: str) -> str:
    """Pictures and sounds from beside the page or inside it; our script, our style; nothing else, from nowhere."""
    return (
        "default-src 'none'; img-src 'self' file: data:; media-src 'self' file:; "
        f"style-src 'sha256-{_hash(style)}'; script-src 'sha256-{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _part(name: str) -> str:
    return resources.files("evolink_async.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(_part("page.html"))


# Above the gallery


def _subtitle(moments: list[float], made_at: datetime) -> str:
    made = f"Report of {moment(made_at)}"
    if not moments:
        return made
    first, last = (datetime.fromtimestamp(time, UTC) for time in (min(moments), max(moments)))
    end = f"{last:%H:%M:%S} UTC" if first.date() == last.date() else moment(last)
    return f"{first:%Y-%m-%d %H:%M:%S} to {end} · {made}"


def _tiles(totals: Totals, moments: list[float], runs: list[Any]) -> list[dict[str, str]]:
    tiles = [_tile("requests", f"{totals.requests:,}")]
    for status in STATUSES:
        if count := totals.statuses[status]:
            tiles.append(_tile(status.replace("_", " "), f"{count:,}", _STYLES.get(status, "bad")))
    if totals.charged:
        tiles.append(_tile("credits spent", amount(totals.spent)))
        if totals.reserved:
            tiles.append(_tile("credits reserved", amount(totals.reserved), "warn"))
    if len(runs) > 1:
        tiles.append(_tile("runs", f"{len(runs):,}"))
    if len(moments) > 1:
        tiles.append(_tile("from first to last", duration(max(moments) - min(moments))))
    return tiles


def _tile(name: str, value: str, style: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "style": style}


# The gallery


def _data(contents: Contents, previews: Mapping[str, str | None]) -> str:
    """What the script shows, as JSON that is safe inside a script element."""
    items = contents.items
    most = min(_LONGEST_PROMPT, MOST_TEXT // max(1, len(items)))
    data = {"items": [_told(item, previews, most) for item in items], "total": contents.totals.requests}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return _IN_SCRIPT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _told(item: Item, previews: Mapping[str, str | None], most: int) -> dict[str, Any]:
    """What the script is told of a request; what there isn't is left out."""
    reason = [visible(part) for part in (item.error_code, cut(item.error, most)) if part]
    parts = [credits for credits in (item.spent, item.reserved) if credits is not None]
    elsewhere = [name for name in item.files if _kind(name) is None] + list(item.elsewhere)
    told = {
        "name": visible(item.name),
        "status": item.status,
        "model": _visible(item.model),
        "prompt": _visible(cut(item.prompt, most)),
        "error": ": ".join(reason),
        "credits": f"{sum(parts):f}" if parts else None,
        "reserved": f"{item.reserved:f}" if item.reserved else None,
        "seconds": None if item.seconds is None else round(item.seconds, 3),
        "late": None if item.detection_delay is None else round(item.detection_delay, 3),
        "submitted": item.submitted_at and moment(item.submitted_at),
        "finished": item.finished_at and moment(item.finished_at),
        "attempts": item.attempts if item.attempts > 1 else None,
        "task": _visible(item.task_id),
        "identity": None if item.key is not None else visible(item.identity),
        "files": [_file(name, previews) for name in item.files if _kind(name) is not None],
        "elsewhere": [visible(name) for name in elsewhere],
        "links": [] if item.files else [visible(url) for url in item.links],
    }
    return {name: value for name, value in told.items() if value not in (None, "", [])}


def _visible(text: str | None) -> str | None:
    return None if text is None else visible(text)


def _kind(name: str) -> str | None:
    return _KINDS.get(name.rpartition(".")[2].lower())


def _file(name: str, previews: Mapping[str, str | None]) -> dict[str, str | None]:
    told = {"url": f"./{quote(os.fsencode(name))}", "name": visible(name), "kind": _kind(name)}
    return told | {"preview": previews[name]} if name in previews else told


def image_files(contents: Contents) -> list[str]:
    """The files of which the gallery shows small pictures: the first of each request."""
    firsts = (next((name for name in item.files if _kind(name) is not None), "") for item in contents.items)
    return [name for name in firsts if name.lower().endswith(PREVIEWED)]
