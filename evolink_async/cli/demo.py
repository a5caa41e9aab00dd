"""`demo`: a local emulator, sixty generations through one pool, and the emulator's book as the judge.

It leaves behind what `run` does: the files, what each is, the ledger and a report.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator, Mapping
from decimal import Decimal
from itertools import count as counting
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from evolink_async import AsyncEvoLink, AudioRequest, GenerationRequest, ImageRequest, VideoRequest
from evolink_async.catalog import get_model
from evolink_async.cli.entries import BadInput
from evolink_async.cli.outputs import OutputFolder
from evolink_async.cli.progress import ProgressRecord
from evolink_async.cli.report import report_at_the_end
from evolink_async.cli.running import Ending, Source, leave_at_once, run_through
from evolink_async.cli.serving import emulator_with
from evolink_async.cli.signals import Interrupts
from evolink_async.cli.text import amount, counted, shortened
from evolink_async.cli.view import STATUS_STYLES, Screen
from evolink_async.durations import duration
from evolink_async.pool import Outcome

if TYPE_CHECKING:
    from evolink_async.emulator import Server

FAILURE_SHARE = 0.08
# What the emulator allows is a little below what the demo asks for, so that its 429 can be watched.
SERVICE_RATE, SERVICE_BURST = 6.0, 8
OUR_RATE = "8/s"
FOLDER = "evolink-demo"
NARROW = 76  # columns; below them an outcome's line leaves out the estimate

IMAGE_MODELS = ("krea-2-turbo", "gpt-image-2")
VIDEO_MODELS = ("seedance-2.0-fast-text-to-video", "veo3.1-fast-beta")
AUDIO_MODEL = "suno-v5-beta"

_SUBJECTS = ("a lighthouse", "an owl", "a night market", "a glass bridge", "a paper boat", "a tea house", "a comet")
_MOODS = ("at dusk", "in the rain", "in spring", "under snow", "by moonlight", "in fog")

CODE = """\
async with AsyncEvoLink() as client, client.pool(requests, ledger="job.db", save_to="out/") as pool:
    async for outcome in pool:
        print(outcome.key, outcome.status, *outcome.files)"""


def run_demo(screen: Screen, count: int, speed: float, seed: int, out: str | None) -> int:
    """Run it: 0 if every request has exactly one outcome and the book agrees. Raises `BadInput` for a used folder."""
    folder = _new_folder(out)
    emulator = emulator_with(
        speed=speed,
        seed=seed,
        rate=SERVICE_RATE,
        burst=SERVICE_BURST,
        failure_share=FAILURE_SHARE,
        retry_after="ms",
        dialect={"polled_usage": True},  # a task that has ended says how long it took, so its report can say how late
    )
    with OutputFolder(str(folder)) as output:
        return asyncio.run(_demonstrated(screen, emulator, output, count, speed, seed))


def _new_folder(out: str | None) -> Path:
    """A folder with nothing in it: a demonstration begins from nothing, and writes over nothing."""
    if out is None:
        names = (FOLDER if number == 1 else f"{FOLDER}-{number}" for number in counting(1))
        return next(Path(name) for name in names if not os.path.lexists(name))
    folder = Path(out)
    if os.path.isdir(folder) and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: give --out a new folder")
    return folder


def requests(count: int, seed: int) -> Iterator[GenerationRequest]:
    """Images mostly, some videos, some music; the same ones for the same seed."""
    dice = random.Random(seed)
    for number in range(count):
        prompt = f"{dice.choice(_SUBJECTS)} {dice.choice(_MOODS)}"
        key = f"demo-{number + 1:02}"
        draw = dice.random()
        if draw < 0.6:
            model = dice.choice(IMAGE_MODELS)
            yield ImageRequest(model=model, prompt=prompt, key=key)
        elif draw < 0.85:
            model = dice.choice(VIDEO_MODELS)
            yield VideoRequest(model=model, prompt=prompt, key=key)
        else:
            yield AudioRequest(model=AUDIO_MODEL, prompt=f"a song about {prompt}", key=key)


async def _demonstrated(
    screen: Screen, emulator: Any, output: OutputFolder, count: int, speed: float, seed: int
) -> int:
    with Interrupts(lambda: screen.say("stopping (once more: at once)", style="yellow")) as interrupts:
        return await interrupts.run(_Demo(screen, output, count, speed, interrupts).run(emulator, seed))


class _Demo:
    """One demonstration."""

    def __init__(self, screen: Screen, output: OutputFolder, count: int, speed: float, interrupts: Interrupts) -> None:
        self._screen, self._output, self._count, self._speed = screen, output, count, speed
        self._interrupts = interrupts
        self._outcomes: dict[int, list[Outcome]] = {}

    async def run(self, emulator: Any, seed: int) -> int:
        screen = self._screen
        screen.say(f"A local emulator plays EvoLink, {self._speed:g} times faster: no key, no costs.")
        screen.say(
            f"{counted(self._count, 'request')}, at most {OUR_RATE}; the emulator takes {SERVICE_RATE:g}/s "
            f"and lets {FAILURE_SHARE:.0%} of the tasks fail.",
            style="dim",
        )
        async with (
            emulator.serve() as server,
            AsyncEvoLink(server.api_key, base_url=server.base_url, rate_limit=OUR_RATE) as client,
        ):
            source = Source(requests(self._count, seed), self._count)
            ending = await run_through(
                client,
                source,
                self._take,
                screen,
                self._interrupts,
                begin=self._output.begin,
                on_progress=ProgressRecord(self._output.path).note,
                max_outstanding=200,
                ledger=self._output.ledger,
                save_to=self._output.path,
            )
            if self._interrupts.code is not None:
                self._tell_interrupted(ending)
                if self._interrupts.count > 1:
                    leave_at_once(self._interrupts.code)
                await report_at_the_end(screen, self._output.path)
                return 1
            good = self._sum_up(ending, server)
        await report_at_the_end(screen, self._output.path)
        return 0 if good else 1

    def _take(self, outcome: Outcome) -> None:
        assert outcome.index is not None
        self._output.take(outcome)
        self._outcomes.setdefault(outcome.index, []).append(outcome)
        if self._interrupts.code is None:
            self._screen.row(self._line(outcome))

    def _line(self, outcome: Outcome) -> Text:
        """Which, how it ended, how long it took, and its link or the reason."""
        model = outcome.request.model if outcome.request else ""
        line = Text()
        line.append(f"{outcome.key:<8} ").append(f"{outcome.status:<9} ", STATUS_STYLES[outcome.status])
        wide = not self._screen.is_live or self._screen.console.width >= NARROW
        line.append(f"{shortened(model, 31):<31} " if wide else f"{shortened(model, 20):<20} ")
        if outcome.submitted_at and outcome.finished_at:
            took = (outcome.finished_at - outcome.submitted_at).total_seconds()
            line.append(f"{took:4.1f} s ")
            known = get_model(model)
            if wide and known is not None and known.estimated_time is not None:
                line.append(f"(estimated {known.estimated_time / self._speed:3.1f} s) ", "dim")
        if outcome.error is not None:
            line.append(shortened(outcome.error.code or outcome.error, 60), "red")
        elif outcome.files:
            line.append(str(outcome.files[0]), "dim")
            if len(outcome.files) > 1:
                line.append(f" and {len(outcome.files) - 1} more", "dim")
        return line

    def _tell_interrupted(self, ending: Ending) -> None:
        done = sum(count for status, count in ending.counts.items() if status in ("completed", "failed"))
        self._screen.say(f"interrupted: {done} of {self._count} were done")
        if ending.running:
            self._screen.say(f"{counted(len(ending.running), 'task')} still running (they end with the emulator):")
            for task_id in ending.running:
                self._screen.say(f"  {task_id}", style="dim")

    def _sum_up(self, ending: Ending, server: Server) -> bool:
        """Hold our account against the emulator's; whether they agree."""
        book = server.emulator.book()
        once = sum(len(outcomes) == 1 for outcomes in self._outcomes.values())
        outcomes = [outcome for several in self._outcomes.values() for outcome in several]
        disagreement = _disagreement(outcomes, book)
        good = once == self._count and disagreement is None and ending.reason is None
        stats = ending.stats
        by_status = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in ending.counts.items())
        refused = f", {stats.rate_limited} of them refused for pace (429) and sent again" if stats.rate_limited else ""
        ours = sum((outcome.credits or Decimal(0) for outcome in outcomes), Decimal(0))
        verdict = "the book agrees" if disagreement is None else f"the book disagrees: {disagreement}"
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("accounted for", Text(f"{once} of {self._count}: {by_status}"))
        table.add_row("POSTs", Text(f"{stats.posts}{refused}"))
        table.add_row("status requests", Text(f"{stats.status_requests}, up to 50 tasks in each"))
        theirs = amount(book["account"]["spent"])
        table.add_row("credits", Text(f"{amount(ours)} by our count, {theirs} by the emulator's"))
        table.add_row("", Text(verdict, "green" if disagreement is None else "bold red"))
        table.add_row("took", Text(duration(stats.elapsed)))
        self._screen.show()
        self._screen.show(table)
        if ending.reason is not None:
            self._screen.complain(f"ended early: {ending.reason}")
        self._screen.show()
        self._screen.say("The same with your own key, in three lines:")
        for line in CODE.splitlines():
            self._screen.verbatim("    " + line)
        return good


def _disagreement(outcomes: list[Outcome], book: Mapping[str, Any]) -> str | None:
    """What the emulator's book says otherwise, None if nothing."""
    ours = {outcome.task.id: outcome for outcome in outcomes if outcome.task is not None}
    theirs = {post["task_id"]: post for post in book["posts"]}
    if len(book["posts"]) != len(ours) or theirs.keys() != ours.keys():
        return f"{len(theirs)} tasks were accepted and {len(ours)} are known here"
    for task_id, post in theirs.items():
        outcome = ours[task_id]
        if post["status"] != outcome.status:
            return f"{task_id} is {post['status']} there and {outcome.status} here"
        if Decimal(str(post["charged"] or 0)) != (outcome.credits or 0):
            return f"{task_id} cost {post['charged']} there and {outcome.credits} here"
    return None
