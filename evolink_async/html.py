"""Small tables, by which notebooks show our values. Pure; all text is escaped, and only http(s) links are links."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_LONGEST = 200  # characters of one text
_LONGEST_LINK = 4096
MOST_LINKS = 8
_PREVIEWS = 4
_TABLE = '<table class="evolink-async" style="text-align:left">'


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values; what is None has no row."""
    lines = [
        f'<tr><th style="text-align:left">{text(name)}</th><td style="text-align:left">{text(value)}</td></tr>'
        for name, value in rows
        if value is not None
    ]
    return f"{_TABLE}{''.join(lines)}</table>"


def results(urls: Sequence[str], *, previews: bool) -> str:
    """Links to results, and small pictures of the first images.

    Only https links are shown as pictures. A browser fetches them when they come into view, and tells not from where.
    """
    links = "".join(f"<li>{link(url)}</li>" for url in urls[:MOST_LINKS])
    more = f"<li>and {len(urls) - MOST_LINKS:,} more</li>" if len(urls) > MOST_LINKS else ""
    pictures = "".join(preview(url) for url in urls[:_PREVIEWS]) if previews else ""
    return f"<ul>{links}{more}</ul>{pictures}" if links else ""


def link(url: str) -> str:
    """A link, or plain text for what a browser should not follow."""
    if not is_link(url, "https://", "http://"):
        return text(url)
    return f'<a href="{escape(url)}" target="_blank" rel="noopener noreferrer">{text(url)}</a>'


def preview(url: str) -> str:
    """A small picture."""
    if not is_link(url, "https://"):
        return ""
    return (
        f'<img src="{escape(url)}" alt="" loading="lazy" referrerpolicy="no-referrer" '
        'style="max-height:128px;max-width:128px;margin:2px">'
    )


def is_link(url: str, *schemes: str) -> bool:
    """Whether this is a link of one of these schemes and of nothing else that a browser makes of odd characters."""
    return len(url) <= _LONGEST_LINK and url.lower().startswith(schemes) and url.isprintable() and " " not in url


def text(value: object) -> str:
    """Text of bounded length, escaped."""
    shown = str(value)
    if len(shown) > _LONGEST:
        shown = shown[: _LONGEST - 1] + "…"
    return escape(shown)
