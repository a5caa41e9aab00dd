"""`job show`, `unknown`, `resolve` and `export`: a ledger for people and for scripts.

What comes from a ledger (keys, prompts, errors) is foreign text: a terminal gets it through `clean`.
"""

from __future__ import annotations

import asyncio
import csv
import io
import os
import shlex
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evolink_async.cli.entries import BadInput
from evolink_async.cli.outputs import Standard, as_number, stopped_by_account, to_terminal
from evolink_async.cli.text import amount, clean, counted, shortened
from evolink_async.errors import (
    BadRequestError,
    ConfigurationError,
    EvoLinkError,
    InvalidRequestError,
    LedgerError,
    NotFoundError,
)
from evolink_async.ledger import Ledger, LedgerJob, Row, State, candidates, open_ledger
from evolink_async.ledger.candidates import EARLIEST, why_not
from evolink_async.ledger.places import Server, ledger_place
from evolink_async.types import Task

if TYPE_CHECKING:
    from rich.console import RenderableType

    from evolink_async import AsyncEvoLink
    from evolink_async.cli.settings import Settings
    from evolink_async.cli.view import Screen
    from evolink_async.ledger.reports import Cost, JobStats, UnknownRequest

T = TypeVar("T")

CANDIDATES_SHOWN = 3
PROMPT_SHOWN = 200  # characters
LONGEST_NAME = 200  # characters of an identity that are still copied by hand
TASKS_LOOKED_AT = 10_000
JOBS_NAMED = 20
LOOK_UP_SECONDS = 15.0  # for one task, retries included
_LEFT_SENDING = "the program ended before an answer came"
_ANY_WIDTH = 10_000  # for what is no terminal: nothing is wrapped

STYLES = {
    State.COMPLETED: "green",
    State.ACCEPTED: "cyan",
    State.FAILED: "red",
    State.CANCELLED: "red",
    State.LOST: "red",
    State.REJECTED: "red",
    State.UNSETTLED: "bold red",
}


# Show


def show_jobs(screen: Screen, path: str, name: str | None, *, as_json: bool) -> int:
    """How each job stands, and what it has cost."""

    async def work() -> None:
        async with open_ledger(path) as ledger:
            jobs = await ledger.jobs() if name is None else [(await _job(ledger, name)).name]
            implied = _implied(await ledger.jobs())
            for number, job_name in enumerate(jobs):
                job = ledger.job(job_name)
                stats, costs = await job.stats(), await job.costs()
                if as_json:
                    standard.json(stats_line(stats, costs))
                else:
                    command = _command("unknown", path, job_name, implied)
                    _print(*([""] if number else []), *_job_picture(stats, costs, command))
                    if stats.unknown:
                        _say_password(screen, path)
            if not jobs:
                screen.say("the ledger has no jobs yet")

    standard = Standard()
    _run(work())
    return 0


def stats_line(stats: JobStats, costs: Sequence[Cost]) -> dict[str, Any]:
    """What --json says of a job."""
    return {
        "job": stats.name,
        "requests": stats.requests,
        "counts": {state: stats.counts.get(state, 0) for state in State},
        "credits_spent": as_number(stats.credits_spent),
        "credits_reserved": as_number(stats.credits_reserved),
        "unknown": stats.unknown,
        "credits_at_risk": as_number(stats.credits_at_risk),
        "runs": stats.runs,
        "in_use_by": stats.in_use_by,
        "created_at": stats.created_at,
        "costs": [
            {
                "day": cost.day,
                "model": cost.model,
                "tasks": cost.tasks,
                "credits_spent": as_number(cost.credits_spent),
                "credits_reserved": as_number(cost.credits_reserved),
            }
            for cost in costs
        ],
    }


def _job_picture(stats: JobStats, costs: Sequence[Cost], command: str) -> list[RenderableType]:
    begun = f"{_moment(stats.created_at)}, {counted(stats.runs, 'run')}"
    states = [
        Text(f"{stats.counts[state]:,} {state.replace('_', ' ')}", STYLES.get(state, ""))
        for state in State
        if stats.counts.get(state)
    ]
    requests = Text(f"{stats.requests:,}").append(": " if states else "").append(Text(", ").join(states))
    facts: list[tuple[str, str | Text]] = [("begun", begun), ("requests", requests)]
    facts.append(("credits", f"{amount(stats.credits_spent)} spent, {amount(stats.credits_reserved)} reserved"))
    if stats.in_use_by is not None:
        facts.append(("running", clean(stats.in_use_by)))
    if stats.unknown:
        credits = f", {amount(stats.credits_at_risk)} credits at risk" if stats.credits_at_risk else ""
        risk = f"{counted(stats.unknown, 'request')}{credits}"
        facts.append(("unknown", Text(risk, "bold red")))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, fact in facts:
        grid.add_row(Text(label, "dim"), fact if isinstance(fact, Text) else Text(fact))
    picture: list[RenderableType] = [Text.assemble("job ", (clean(stats.name), "bold")), Padding(grid, (0, 0, 0, 2))]
    if stats.unknown:
        picture.append(_Verbatim(f"  {command}"))
    if costs:
        picture += ["", Padding(_cost_table(costs), (0, 0, 0, 2))]
    return picture


def _cost_table(costs: Sequence[Cost]) -> Table:
    """By day, so that it has room on a narrow terminal too."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("credits by day and model", overflow="fold")
    for name in ("tasks", "spent", "reserved"):
        table.add_column(name, justify="right", no_wrap=True)
    for day, of_day in groupby(costs, key=lambda cost: cost.day):
        table.add_row(Text("not sent" if day is None else day.isoformat(), "bold"))
        for cost in of_day:
            table.add_row(Text(f"  {clean(cost.model)}"), *_cost_cells([cost]))
    if len(costs) > 1:
        table.add_row(Text("in all", "bold"), *_cost_cells(costs))
    return table


def _cost_cells(costs: Sequence[Cost]) -> list[str]:
    spent = sum((cost.credits_spent for cost in costs), Decimal(0))
    reserved = sum((cost.credits_reserved for cost in costs), Decimal(0))
    return [f"{sum(cost.tasks for cost in costs):,}", amount(spent), amount(reserved)]


# Unknown


def show_unknown(
    screen: Screen, settings: Settings, path: str, name: str | None, *, ask_service: bool, as_json: bool
) -> int:
    """What may have been accepted, or paid for twice. 1: something is to be resolved; 3: the account was refused."""
    client = settings.client() if ask_service else None

    async def work() -> int:
        async with open_ledger(path) as ledger:
            job = await _job(ledger, name)
            unknown = await job.unknown()
            in_use_by = (await job.stats()).in_use_by
            implied = _implied(await ledger.jobs())
            found = code = None
            if client is not None and unknown:
                found, code = await _candidates(screen, client, ledger, unknown)
        view = _UnknownView(screen, path, job.name, implied, found)
        if as_json:
            view.as_json(unknown)
        else:
            view.show(unknown)
        if in_use_by is not None and unknown:
            screen.say(f"the job is running ({in_use_by}): it may settle some itself, you can when it has ended")
        return code or int(any(request.resolvable for request in unknown))

    return _run(work())


async def _candidates(
    screen: Screen, client: AsyncEvoLink, ledger: Ledger, unknown: Sequence[UnknownRequest]
) -> tuple[dict[str, list[Task]] | None, int | None]:
    """For each request the tasks that may be its own. None, and perhaps an exit code, if the service can't be asked."""
    try:
        async with client:
            tasks = await _tasks_since(screen, client, unknown)
    except NotFoundError:
        screen.complain(
            "this service has no list of tasks (GET /v1/tasks is in the vendor's client, not in its public pages), so "
            "there are no candidates; look at the account's tasks in EvoLink's dashboard"
        )
        return None, None
    except EvoLinkError as error:
        screen.complain(error)
        screen.say("so there are no candidates", style="red")
        return None, 3 if stopped_by_account(error) else None
    possible = {task.id for some in candidates(unknown, tasks).values() for task in some}
    return candidates(unknown, tasks, await ledger.knows(possible)), None


async def _tasks_since(screen: Screen, client: AsyncEvoLink, unknown: Sequence[UnknownRequest]) -> list[Task]:
    """The account's tasks as far back as one of the requests was sent."""
    sent = [request.submitted_at for request in unknown if request.submitted_at is not None]
    since = min(sent) + EARLIEST - timedelta(minutes=1) if sent else None
    models = {request.model for request in unknown}
    tasks: list[Task] = []
    async for task in client.tasks.list(model=models.pop() if len(models) == 1 else None):
        if since is not None and task.created is not None and task.created < since:
            break
        tasks.append(task)
        if len(tasks) == TASKS_LOOKED_AT:
            screen.say(f"only the latest {TASKS_LOOKED_AT:,} tasks were looked at", style="yellow")
            break
    return tasks


@dataclass(frozen=True, slots=True)
class _UnknownView:
    """What `job unknown` says. implied: the job that needs no --job. found: candidates, None: not asked for."""

    screen: Screen
    path: str
    job: str
    implied: str
    found: dict[str, list[Task]] | None

    def as_json(self, unknown: Iterable[UnknownRequest]) -> None:
        standard = Standard()
        for request in unknown:
            standard.json(self._line(request))

    def show(self, unknown: Sequence[UnknownRequest]) -> None:
        open_ones = [request for request in unknown if request.resolvable]
        twice = [request for request in unknown if not request.resolvable]
        if not unknown:
            _print(Text(f"nothing is unknown in job {clean(self.job)}"))
        if open_ones:
            what = "request was sent and may have" if len(open_ones) == 1 else "requests were sent and may have"
            risk = f"{len(open_ones):,} {what} been accepted: nobody knows. {_at_risk(open_ones)}"
            _print(Text(risk, "bold"), *(part for request in open_ones for part in ("", *self._block(request))))
        if twice:
            what = "request was" if len(twice) == 1 else "requests were"
            risk = f"{len(twice):,} {what} sent twice and may have been paid twice. {_at_risk(twice)}"
            lines = (part for request in twice for part in ("", *self._block(request)))
            _print(*([""] if open_ones else []), Text(risk, "bold"), *lines)
        if open_ones:
            self._say_how(len(open_ones))
        if twice:
            self.screen.show()
            self.screen.say(
                "Of what was sent twice one task is known, and a second one may exist. There is nothing to resolve: it "
                "leaves this list when the service has proven that it honours idempotency keys."
            )

    def _block(self, request: UnknownRequest) -> list[RenderableType]:
        sent = "" if request.submitted_at is None else f", sent {_moment(request.submitted_at, seconds=True)}"
        credits = "credits not known" if request.credits is None else f"{amount(request.credits)} credits"
        lines = [Text(shortened(request.identity, LONGEST_NAME), "bold cyan")]
        about = [f"{clean(request.model)}{sent}, {credits}"]
        if request.prompt is not None:
            about.append(f"prompt: {shortened(request.prompt, PROMPT_SHOWN)}")
        reason = request.reason or (_LEFT_SENDING if request.state in ("sending", "replaying") else None)
        about.append(f"{request.state}: {clean(reason)}" if reason else request.state)
        if request.task_id is not None:
            about.append(f"its task: {clean(request.task_id)}")
        about.append(f"idempotency key: {clean(request.idempotency_key)}")
        block: list[RenderableType] = [*lines, *(Padding(Text(line), (0, 0, 0, 2)) for line in about)]
        block += [Padding(line, (0, 0, 0, 2)) for line in self._candidate_lines(request)]
        if request.resolvable:
            block.append(_Verbatim(f"  {self._command(request)}"))
        return block

    def _candidate_lines(self, request: UnknownRequest) -> list[Text]:
        if self.found is None:
            return []
        tasks = self.found.get(request.identity, [])
        what = "candidate" if request.resolvable else "candidate for a second task"
        if not tasks:
            return [Text(f"no {what}: the service lists no such task that this ledger doesn't know", "dim")]
        lines = []
        for task in tasks[:CANDIDATES_SHOWN]:
            made = "" if task.created is None else f", made {_moment(task.created, seconds=True)}"
            lines.append(Text(f"{what}: {clean(task.id)}, {clean(task.status)}{made}", "green"))
        if len(tasks) > CANDIDATES_SHOWN:
            lines.append(Text(f"and {len(tasks) - CANDIDATES_SHOWN:,} more (--json has all)", "dim"))
        return lines

    def _say_how(self, number: int) -> None:
        say = self.screen.say
        self.screen.show()
        if self.found is None:
            say("Look for the tasks in EvoLink's dashboard, or let the service be asked: add --candidates.")
        else:
            say("A candidate has the model and the time of the request, no more: see that it shows what was asked for.")
        say("Then run the command of " + ("the request" if number == 1 else "each request") + " with one of:")
        options = Table.grid(padding=(0, 2, 0, 0))
        options.add_row("--task-id ID", "it was accepted, this is its task: the next run polls it on")
        options.add_row("--not-submitted", "it was not: its credits are free, the next run sends it again")
        options.add_row("--give-up", "nobody will find out: never sent again, its credits stay reserved")
        self.screen.show(Padding(options, (0, 0, 0, 2)))
        _say_password(self.screen, self.path)

    def _line(self, request: UnknownRequest) -> dict[str, Any]:
        found = None if self.found is None else self.found.get(request.identity, [])
        return {
            "job": self.job,
            "identity": request.identity,
            "key": request.key,
            "model": request.model,
            "prompt": request.prompt,
            "state": request.state,
            "reason": request.reason,
            "idempotency_key": request.idempotency_key,
            "task_id": request.task_id,
            "credits": as_number(request.credits),
            "submitted_at": request.submitted_at,
            "resolve": self._command(request) if request.resolvable else None,
            "candidates": None if found is None else [_candidate_line(task) for task in found],
        }

    def _command(self, request: UnknownRequest) -> str:
        return _command("resolve", self.path, self.job, self.implied, _reference(request))


def _candidate_line(task: Task) -> dict[str, Any]:
    return {"task_id": task.id, "status": task.status, "model": task.model, "created": task.created}


def _at_risk(requests: Sequence[UnknownRequest]) -> str:
    """What they hold. Of one whose price nobody has told it is not known, which is not nothing."""
    told = [request.credits for request in requests if request.credits is not None]
    untold = len(requests) - len(told)
    if not told:
        return "What that may cost is not known."
    others = f", and what {untold:,} of them may cost is not known" if untold else ""
    return f"{amount(sum(told, Decimal(0)))} credits are at risk{others}."


def _reference(request: UnknownRequest) -> str:
    """What names a request on a command line: its identity, or its idempotency key if that is no text to be copied."""
    identity, key = request.identity, request.idempotency_key
    copied = clean(identity) == identity and not identity.startswith("-") and len(identity) <= LONGEST_NAME
    return identity if copied or key is None else key


# Resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """The options of `job resolve`."""

    identity: str
    task_id: str | None
    not_submitted: bool
    give_up: bool
    force: bool


def resolve_one(
    screen: Screen, settings: Settings, path: str, name: str | None, how: Resolution, *, as_json: bool
) -> int:
    """Settle a request and say what that means. Refused things change nothing."""
    if (how.task_id is not None) + how.not_submitted + how.give_up != 1:
        raise BadInput("give one of --task-id ID, --not-submitted, --give-up")
    if how.force and how.task_id is None:
        raise BadInput("--force is for --task-id")

    async def work() -> int:
        async with open_ledger(path) as ledger:
            job = await _job(ledger, name)
            row = await _find(job, how.identity)
            if how.task_id is not None and not how.force:
                code = await _refused_by_service(screen, settings, row, how.task_id)
                if code is not None:
                    return code
            settled = await job.resolve(
                row.identity,
                task_id=how.task_id,
                submitted=False if how.not_submitted else None,
                give_up=how.give_up,
            )
            if as_json:
                Standard().json(row_line(settled))
            screen.say(_consequence(how, row, settled), style="green")
            left = sum(request.resolvable for request in await job.unknown())
            command = _command("unknown", path, job.name, _implied(await ledger.jobs()))
        if left:
            screen.say(f"{counted(left, 'request is', 'requests are')} still unknown:")
            screen.verbatim(f"  {command}")
            _say_password(screen, path)
        return 0

    return _run(work())


async def _find(job: LedgerJob, identity: str) -> Row:
    """The request of this identity, or with this idempotency key."""
    row = await job.find(identity)
    if row is None:
        in_doubt = (State.UNSETTLED, State.SENDING, State.REPLAYING, State.GIVEN_UP)
        async with aclosing(job.rows(*in_doubt)) as rows:
            async for other in rows:
                if other.idempotency_key == identity:
                    return other
        raise BadInput(
            f"job {clean(job.name)!r} has no request {clean(identity)!r}, and no unknown one with such a key"
        )
    return row


async def _refused_by_service(screen: Screen, settings: Settings, row: Row, task_id: str) -> int | None:
    """Whether the service knows the task, and it may be that of the request. The exit code if not."""
    if row.state not in (State.UNSETTLED, State.SENDING, State.REPLAYING, State.GIVEN_UP):
        return None  # it can't be resolved at all, which the ledger says
    if not os.environ.get("EVOLINK_API_KEY"):
        screen.say("EVOLINK_API_KEY is not set, so the task was not looked up at the service", style="yellow")
        return None
    try:
        async with settings.client() as client:
            task = await client.tasks.get(task_id, timeout=LOOK_UP_SECONDS)
    except (NotFoundError, BadRequestError):
        reason = f"the service doesn't know the task {clean(task_id)} (with this key)"
    except (ConfigurationError, InvalidRequestError):
        raise
    except EvoLinkError as error:
        screen.complain(error)
        screen.say("so nothing was changed; --force takes the id without looking it up")
        return 3 if stopped_by_account(error) else 1
    else:
        why = why_not(row.model, row.submitted_at, task)
        if why is None:
            return None
        reason = f"{clean(task_id)} can hardly be the task of {shortened(row.identity, LONGEST_NAME)}: {clean(why)}"
    raise BadInput(f"{reason}; nothing was changed. If you know better: --force")


def _consequence(how: Resolution, before: Row, row: Row) -> str:
    name = shortened(row.identity, LONGEST_NAME)
    held = "" if before.credits is None else f"{amount(before.credits)} "
    if how.task_id is not None:
        return f"{name} is the task {row.task_id}: it holds its {held}credits until that ends; the next run polls it on"
    if how.not_submitted:
        return f"{name} was not submitted: its {held}credits are free; the next run sends it, and pays for it"
    return f"{name} is given up: it is never sent again, and its {held}credits stay reserved"


# Export


def export_rows(path: str, name: str | None, states: Sequence[str], *, as_csv: bool) -> int:
    """All requests on standard output, page by page."""
    standard = Standard()

    async def work() -> None:
        if as_csv:
            standard.line(csv_line(CSV_COLUMNS))
        async with open_ledger(path) as ledger:
            job = await _job(ledger, name)
            async with aclosing(job.rows(*states)) as rows:
                async for row in rows:
                    if standard.broken:
                        return  # whoever read it has had enough
                    if as_csv:
                        standard.line(csv_line(csv_cells(row)))
                    else:
                        standard.json(row_line(row))

    _run(work())
    return 0


def row_line(row: Row) -> dict[str, Any]:
    """What --json and `job export` say of a request."""
    error = None if row.error is None and row.error_code is None else {"code": row.error_code, "message": row.error}
    return {
        "key": row.key,
        "identity": row.identity,
        "state": row.state,
        "model": row.model,
        "task_id": row.task_id,
        "urls": row.task.urls if row.task is not None else (),
        "files": row.files,
        "credits": as_number(row.credits),
        "attempts": row.attempts,
        "idempotency_key": row.idempotency_key,
        "submitted_at": row.submitted_at,
        "finished_at": row.ended_at,
        "error": error,
    }


CSV_COLUMNS = (
    *("key", "identity", "state", "model", "task_id", "urls", "files", "credits", "attempts", "idempotency_key"),
    *("submitted_at", "finished_at", "error_code", "error"),
)


def csv_cells(row: Row) -> list[object]:
    """The same as cells in the order of `CSV_COLUMNS`; several links or files are separated by `; `."""
    line = row_line(row)
    urls, files = "; ".join(line["urls"]), "; ".join(line["files"])
    times = [moment and moment.isoformat() for moment in (row.submitted_at, row.ended_at)]
    credits = None if row.credits is None else f"{row.credits:f}"
    first = [line[name] for name in CSV_COLUMNS[:5]]
    return [*first, urls, files, credits, row.attempts, row.idempotency_key, *times, row.error_code, row.error]


def csv_line(cells: Iterable[object]) -> str:
    """A line of CSV. A terminal gets the cells made harmless, everything else as they are."""
    line = io.StringIO()
    shown = [clean(cell) if cell is not None else "" for cell in cells] if to_terminal() else cells
    csv.writer(line).writerow(shown)  # it quotes what ends lines, as its own do
    return line.getvalue().removesuffix("\r\n")


# What all of them need


async def _job(ledger: Ledger, name: str | None) -> LedgerJob:
    """The job of this name; without one the only job there is, else the one called default."""
    names = await ledger.jobs()
    chosen = _implied(names) if name is None else name
    if chosen in names:
        return ledger.job(chosen)
    if not names:
        raise BadInput("the ledger has no jobs yet")
    there = ", ".join(clean(other) for other in names[:JOBS_NAMED]) + (", ..." if len(names) > JOBS_NAMED else "")
    raise BadInput(f"the ledger has no job {clean(chosen)!r}; give --job NAME, one of: {there}")


def _implied(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "default"


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Do it. A ledger that can't be used is bad input: `BadInput`."""
    try:
        return asyncio.run(work)
    except LedgerError as error:
        raise BadInput(str(error)) from error


def _command(verb: str, path: str, job: str, implied: str, *more: str) -> str:
    """A line to be copied. The password of a URL is not in it."""
    options = [] if job == implied else ["--job", job]
    place = ledger_place(path)
    shown = place.shown if isinstance(place, Server) else path
    return shlex.join(["evolink-async", "job", verb, shown, *more, *options])


def _say_password(screen: Screen, path: str) -> None:
    """What a line to be copied needs besides."""
    place = ledger_place(path)
    if isinstance(place, Server) and place.has_secret:
        screen.say("These lines are without the password: set PGPASSWORD for them, or write it into ~/.pgpass.")


def _moment(moment: datetime, *, seconds: bool = False) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if seconds else f"{moment:%Y-%m-%d %H:%M} UTC"


class _Verbatim(Text):
    """A line to be copied: never wrapped by us."""


def _print(*parts: RenderableType) -> None:
    """To standard output; wrapped on a terminal, as long as they are elsewhere."""
    console = Console(markup=False, emoji=False, highlight=False, width=None if to_terminal() else _ANY_WIDTH)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, _Verbatim))
    lines = captured.get().removesuffix("\n").split("\n")
    Standard().rendered("\n".join(line.rstrip() for line in lines))
