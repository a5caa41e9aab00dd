"""What notebooks show of our values: small tables. Pure; all text is escaped, and only http(s) links are links."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from evolink_async.durations import duration

if TYPE_CHECKING:
    from evolink_async.pool.outcome import Outcome, PoolStats
    from evolink_async.types import Task

_LONGEST = 200  # characters of one text
_LONGEST_LINK = 4096
_MOST_LINKS = 8
_PREVIEWS = 4
_TABLE = '<table class="evolink-async" style="text-align:left">'


def task_html(task: Task) -> str:
    """A task: what is known of it, and its results."""
    rows: list[tuple[str, object]] = [("task", task.id), ("status", task.status), ("model", task.model)]
    if not task.is_terminal:
        rows.append(("progress", f"{task.progress} %"))
        rows.append(("estimated", None if task.estimated_time is None else f"{task.estimated_time} s"))
        rows.append(("wait", f"await client.tasks.wait({task.id!r})"))
    if task.error is not None:
        rows.append(("error", f"{task.error.code}: {task.error.message}"))
    used, reserved = task.usage.credits_used, task.usage.credits_reserved
    rows.append(("credits", used if used is not None else reserved))
    rows.append(("links, until", task.expires_at.isoformat(" ", "minutes") if task.urls and task.expires_at else None))
    return table(rows) + results(task.urls, previews=task.kind == "image")


def outcome_html(outcome: Outcome) -> str:
    """An outcome: which request, what became of it, what it left."""
    request, task, error = outcome.request, outcome.task, outcome.error
    rows: list[tuple[str, object]] = [
        ("request", outcome.key if outcome.key is not None else outcome.identity),
        ("status", outcome.status),
        ("model", None if request is None else request.model),
        ("task", None if task is None else task.id),
        ("error", None if error is None else f"{type(error).__name__}: {error}"),
        ("credits", outcome.credits),
        ("known from", "the ledger" if outcome.from_ledger else None),
        *(("file", path) for path in outcome.files[:_MOST_LINKS]),
    ]
    kind = None if request is None else request.kind
    return table(rows) + results(outcome.urls, previews=kind == "image")


def stats_html(stats: PoolStats) -> str:
    """How a pool is doing."""
    total = "" if stats.total is None else f" of {stats.total:,}"
    rows: list[tuple[str, object]] = [
        ("finished", f"{stats.finished:,}{total}"),
        *((f"- {status.replace('_', ' ')}", f"{count:,}") for status, count in stats.counts.items() if count),
        ("outstanding", f"{stats.outstanding:,}"),
        ("waiting", f"{stats.waiting:,}"),
        ("untaken", f"{stats.untaken:,}" if stats.untaken else None),
        ("credits", f"{stats.credits_spent.normalize():f} spent, {stats.credits_reserved.normalize():f} reserved"),
        ("pace", None if stats.rate is None else f"{stats.rate:.3g}/s, {stats.rate_limited:,} refused"),
        ("elapsed", duration(stats.elapsed)),
        ("left", None if stats.eta is None else duration(stats.eta)),
    ]
    return table(rows)


def pool_html(state: str, stats: PoolStats, reason: BaseException | None, leftovers: int) -> str:
    """A pool as it is at this moment."""
    rows: list[tuple[str, object]] = [("pool", state)]
    if reason is not None:
        rows.append(("ended early", f"{type(reason).__name__}: {reason}"))
    if leftovers:
        rows.append(("leftovers", f"{leftovers:,}: sent and not handed over, see pool.leftovers"))
    return table(rows) + stats_html(stats)


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
    links = "".join(f"<li>{link(url)}</li>" for url in urls[:_MOST_LINKS])
    more = f"<li>and {len(urls) - _MOST_LINKS:,} more</li>" if len(urls) > _MOST_LINKS else ""
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
