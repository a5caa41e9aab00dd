"""The page at ``/``: tasks, account and faults, as they are now. Server-rendered; a few lines of script refresh it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from html import escape

from .answers import credits_of, extension, told_status
from .tasks import Task
from .world import World

MOST_TASKS = 100  # rows on the page; the book has all
_THUMBNAILS = 4

_SCRIPT = """
const parser = new DOMParser();
async function refresh() {
  try {
    const page = await (await fetch('/', {cache: 'no-store'})).text();
    document.querySelector('main').replaceWith(parser.parseFromString(page, 'text/html').querySelector('main'));
    document.body.classList.remove('gone');
  } catch { document.body.classList.add('gone'); }
  setTimeout(refresh, 1000);
}
setTimeout(refresh, 1000);
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8883; --dim: #777; --good: #1a7f4b; --bad: #c0392b; --busy: #2767c4; }
@media (prefers-color-scheme: dark) { :root { --dim: #999; --good: #4cc38a; --bad: #ff7b6b; --busy: #7ab0ff; } }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.dim { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); } .busy { color: var(--busy); }
dl { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: 1rem 0 0; } dt { color: var(--dim); font-size: .85em; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 500; color: var(--dim); font-size: .85em; }
th, td { padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; } progress { width: 6rem; height: .6rem; }
img { height: 40px; border-radius: 4px; vertical-align: top; } #gone { display: none; color: var(--bad); }
.gone #gone { display: block; } .gone main { opacity: .5; }
"""

_ICON = (
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'>"
    "<circle cx='4.5' cy='4.5' r='4' fill='seagreen'/></svg>"
)
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
# The page loads its own pictures, its own script and itself again, and nothing else.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_SCRIPT_HASH}'"
)


def render_page(world: World, links_at: str) -> str:
    """The page. Every text that came from outside is escaped."""
    now = world.clock()
    world.service.settle(now)
    tasks = world.service.newest(MOST_TASKS)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>EvoLink emulator</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="{_ICON}">'
        '<noscript><meta http-equiv="refresh" content="3"></noscript>'
        f"<style>{_STYLE}</style></head><body><p id=gone>The emulator does not answer any more.</p><main>"
        f"{_head(world)}{_account(world)}{_faults(world)}{_refused(world)}{_tasks(world, tasks, now, links_at)}"
        f"</main><script>{_SCRIPT}</script></body></html>"
    )


def _head(world: World) -> str:
    clock = "the clock stands still" if world.clock.standing else f"{world.options.speed:g} times real speed"
    recording = ", recording" if world.recording is not None else ""
    return (
        f"<h1>EvoLink emulator</h1><p class=dim>{clock}, seed {world.options.seed}{recording} · "
        "a local stand-in: no key, no costs · <a href=/_emulator/book>book</a> · <a href=/openapi.json>OpenAPI</a></p>"
    )


def _account(world: World) -> str:
    account, limits = world.service.account, world.service.limits()
    figures = [
        ("credits left", _amount(account.remaining)),
        ("reserved", _amount(account.reserved)),
        ("spent", _amount(account.spent)),
        ("tasks", f"{world.service.task_count:,}"),
        ("unfinished", f"{world.service.unfinished:,}"),
        ("status reads", f"{world.service.status_reads:,}"),
        ("replays", f"{world.service.replays:,}"),
        ("rate", "no limit" if limits["rate"] is None else f"{limits['rate']:g}/s, {limits['burst']:g} at once"),
        ("concurrency", "no limit" if limits["concurrency"] is None else f"{limits['concurrency']:,}"),
        ("key", world.api.key_state),
    ]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
    return f"<dl id=account>{cells}</dl>"


def _faults(world: World) -> str:
    rows = []
    for fault, matched, hit in world.plan:
        text = json.dumps(fault.to_dict(), ensure_ascii=False)
        text = text if len(text) <= 300 else text[:299] + "…"
        rows.append(
            f"<tr><td><code>{escape(text)}</code></td><td class=n>{matched:,}</td><td class=n>{hit:,}</td></tr>"
        )
    if not rows:
        return "<h2>Faults</h2><p class=dim id=faults>None: POST a JSON list to <code>/_emulator/faults</code>.</p>"
    head = "<tr><th>fault</th><th class=n>requests matched</th><th class=n>hit</th></tr>"
    return f"<h2>Faults</h2><div class=scroll><table id=faults>{head}{''.join(rows)}</table></div>"


def _refused(world: World) -> str:
    refused: Counter[tuple[int, str]] = world.service.refused
    if not refused:
        return ""
    texts = (f"{count:,} × {status} {escape(code)}" for (status, code), count in sorted(refused.items()))
    return f"<p id=refused><span class=dim>Submissions refused:</span> {', '.join(texts)}</p>"


def _tasks(world: World, tasks: list[Task], now: float, links_at: str) -> str:
    if not tasks:
        return "<h2>Tasks</h2><p class=dim id=tasks>None yet: POST to <code>/v1/images/generations</code>.</p>"
    more = f" <span class=dim>the newest {len(tasks)}</span>" if world.service.task_count > len(tasks) else ""
    head = (
        "<tr><th>task</th><th>model and prompt</th><th>status</th><th class=n>age</th><th class=n>took (estimate)</th>"
        "<th class=n>polls</th><th class=n>told after</th><th class=n>credits</th><th>results</th></tr>"
    )
    rows = "".join(_row(world, task, now, links_at) for task in tasks)
    return f"<h2>Tasks{more}</h2><div class=scroll><table id=tasks>{head}{rows}</table></div>"


_CLASSES = {"completed": "good", "failed": "bad", "cancelled": "bad"}


def _row(world: World, task: Task, now: float, links_at: str) -> str:
    status = told_status(task, now, world.service.dialect)
    word = f"<span class={_CLASSES.get(status, 'busy')}>{status}</span>"
    if status == "processing":
        word += f"<br><progress max=100 value={task.progress(now)}></progress>"
    elif task.settled and task.failure is not None:
        word += f"<br><span class=dim>{escape(task.failure)}</span>"
    took = f"{task.ends_at - task.created:.1f} s" if task.settled else ""
    told = "" if task.first_told_at is None else f"{task.first_told_at - task.ends_at:.1f} s"
    money = _amount(task.charged) if task.settled else f"{_amount(task.reserved)} reserved"
    return (
        f"<tr><td><code>{escape(task.id)}</code></td>"
        f"<td>{escape(task.model.id)}<br><span class=dim>{escape(task.label)}</span></td><td>{word}</td>"
        f"<td class=n>{now - task.created:.0f} s</td>"
        f"<td class=n>{took} <span class=dim>({task.estimate:.0f} s)</span></td>"
        f"<td class=n>{task.polls}</td><td class=n>{told}</td><td class=n>{money}</td>"
        f"<td>{_links(world, task, now, links_at)}</td></tr>"
    )


def _links(world: World, task: Task, now: float, links_at: str) -> str:
    names = [f"{task.id}-{n}.{extension(task)}" for n in range(1, min(task.produced, _THUMBNAILS) + 1)]
    shown = []
    for name in names:
        if world.service.result(name, now) is None:
            continue
        link = escape(f"{links_at}/{name}")
        inside = f'<img src="{link}" alt="" loading=lazy>' if task.model.kind == "image" else extension(task)
        shown.append(f'<a href="{link}">{inside}</a>')
    return " ".join(shown)


def _amount(micro: int) -> str:
    return f"{credits_of(micro):,}"
