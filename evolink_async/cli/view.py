"""What people see, all of it on standard error: sentences, a live view on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from evolink_async.cli.outputs import Standard, is_terminal, silence, to_terminal
from evolink_async.cli.text import amount, clean, counted
from evolink_async.durations import duration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.console import OverflowMethod, RenderableType

    from evolink_async.pool import PoolStats

LIVE_PAUSE = 0.2  # seconds between two pictures of the live view
PLAIN_PAUSE = 10.0  # seconds between two lines where nobody watches

STATUS_STYLES = {
    "completed": "green",
    "failed": "red",
    "cancelled": "red",
    "lost": "red",
    "rejected": "red",
    "unknown": "bold red",
    "unfinished": "yellow",
    "not_submitted": "yellow",
}


class _Console(Console):
    """Rich ends the program when a pipe is broken; here that is an error as any other."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled


class Screen:
    """Standard error. Foreign text goes through `clean` and never through markup."""

    def __init__(self) -> None:
        self.console = _Console(stderr=True, markup=False, emoji=False, highlight=False)
        self.log = LogLines(self)
        self.is_live = is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"

    def say(self, *parts: str | Text, style: str = "") -> None:
        """A sentence; wrapped on a terminal, where what it begins with stays indented, one line elsewhere."""
        text = Text(style=style)
        for part in parts:
            text.append(part if isinstance(part, Text) else Text(clean(part)))
        indent = len(text.plain) - len(text.plain.lstrip(" "))
        if self.is_live and 0 < indent < len(text.plain):
            self.show(Padding(text[indent:], (0, 0, 0, indent), expand=False))
        else:
            self.show(text, soft_wrap=not self.is_live)

    def verbatim(self, line: str) -> None:
        """A line to be copied: never wrapped by us."""
        self.show(Text(clean(line), style="bold"), soft_wrap=True)

    def complain(self, error: object) -> None:
        """One red sentence."""
        self.say(str(error), style="red")

    def standard(self) -> Standard:
        """Standard output, going through the live view where both are on one terminal."""
        return Standard(self.data if self.is_live and to_terminal() else None)

    def data(self, line: str) -> None:
        """A harmless line of data on the terminal."""
        self.show(Text(line), soft_wrap=True)

    def row(self, line: Text) -> None:
        """A line that is cut at the edge of a terminal."""
        self.show(line, soft_wrap=not self.is_live, cut=self.is_live)

    def show(self, renderable: RenderableType = "", *, soft_wrap: bool = False, cut: bool = False) -> None:
        """Anything rich can show."""
        overflow: OverflowMethod | None = "ellipsis" if cut else None
        self._draw(lambda: self.console.print(renderable, soft_wrap=soft_wrap, no_wrap=cut or None, overflow=overflow))

    def _draw(self, draw: Callable[[], object]) -> None:
        """Write to standard error: a terminal that went away or a full disk ends no work, which matters more."""
        if sys.stderr is None:
            return
        try:
            draw()
        except OSError:
            silence(sys.stderr)  # else what is left in the buffers fails again
        except ValueError:
            pass  # it is closed

    @asynccontextmanager
    async def following(self, picture: Callable[[], RenderableType], line: Callable[[], str]) -> AsyncIterator[None]:
        """Show how something is doing while the block runs: `picture` renewed on a terminal, else `line`s."""
        if sys.stderr is None:
            yield
            return
        live = Live(console=self.console, auto_refresh=False, transient=True) if self.is_live else None
        ticker = asyncio.create_task(self._tick(live, picture, line), name="evolink view")
        try:
            if live is not None:
                self._draw(live.start)
            yield
        finally:
            ticker.cancel()
            await asyncio.wait([ticker])
            if live is not None:
                self._draw(live.stop)

    async def _tick(self, live: Live | None, picture: Callable[[], RenderableType], line: Callable[[], str]) -> None:
        while True:
            if live is not None:
                self._draw(partial(live.update, picture(), refresh=True))
                await asyncio.sleep(LIVE_PAUSE)
            else:
                await asyncio.sleep(PLAIN_PAUSE)
                self.say(line())


class LogLines(logging.Handler):
    """Log records as dim lines between the others, so that they don't tear the live view."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen
        self.without: set[str] = set()  # what was said already

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            # What a pool warns of (no ledger, an early end, tasks that go on) a command tells in its own words.
            told = self.level >= logging.WARNING and record.name.startswith("evolink_async.pool")
            if text not in self.without and not told:
                style = "yellow" if record.levelno >= logging.WARNING else "dim"
                word = "warning: " if record.levelno >= logging.WARNING else ""
                self._screen.say(word + text, style=style)
        except Exception:  # noqa: BLE001  (logging must never end the work)
            self.handleError(record)


# A pool


def pool_picture(stats: PoolStats, console: Console) -> RenderableType:
    """A bar and two lines of numbers."""
    table = Table.grid(padding=(0, 1))
    total = stats.total
    done = f"{stats.finished:,}" if total is None else f"{stats.finished:,}/{total:,}"
    left = "" if stats.eta is None else f"{duration(stats.eta)} left"
    width = max(8, min(40, console.width - len(done) - len(left) - 4))
    table.add_row(
        ProgressBar(total=total, completed=stats.finished, width=width, pulse=total is None), done, Text(left, "dim")
    )
    return Group(table, _joined(state_parts(stats)), _joined(pace_parts(stats), style="dim"))


def pool_sentence(stats: PoolStats) -> str:
    """The same in one line."""
    of = "" if stats.total is None else f" of {stats.total:,}"
    parts = [part.plain for part in (*state_parts(stats), *pace_parts(stats))]
    if stats.eta is not None:
        parts.append(f"{duration(stats.eta)} left")
    return f"{stats.finished:,}{of}: {', '.join(parts)}"


def state_parts(stats: PoolStats) -> list[Text]:
    """Counts by state, those that are not zero."""
    ended = [(status, stats.counts.get(status, 0), style) for status, style in STATUS_STYLES.items()]
    now = [("running", stats.outstanding, "cyan"), ("waiting", stats.waiting, "")]
    return [Text(f"{number:,} {status.replace('_', ' ')}", style) for status, number, style in (*ended, *now) if number]


def pace_parts(stats: PoolStats) -> list[Text]:
    """Rate, refusals and money."""
    parts = [] if stats.rate is None else [Text(f"{stats.rate:.3g}/s allowed")]
    if stats.rate_limited:
        parts.append(Text(f"{counted(stats.rate_limited, 'refusal')} for pace (429)"))
    parts.append(Text(f"{amount(stats.credits_spent)} credits spent"))
    if stats.credits_reserved:
        parts.append(Text(f"{amount(stats.credits_reserved)} reserved"))
    return parts


def _joined(parts: list[Text], style: str = "") -> Text:
    return Text(" · ", style=style).join(parts) if parts else Text(" ")


def link(url: str) -> Text:
    """A link that can be clicked even where the line is cut short."""
    address = clean(url)
    return Text(address, Style(link=address, dim=True))
