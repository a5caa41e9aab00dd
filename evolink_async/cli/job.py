"""`run`: a file of requests, checked, sent, every outcome written down."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolink_async.cli.entries import BadInput, Defaults
from evolink_async.cli.inputs import SHOWN, Input, Report, open_input
from evolink_async.cli.outputs import (
    OutputFolder,
    Standard,
    bad_line,
    encoded,
    message_of,
    refuse_without_ledger,
    result_line,
)
from evolink_async.cli.plan import Plan, make_plan, plan_line, tell_plan
from evolink_async.cli.progress import ProgressRecord
from evolink_async.cli.report import report_at_the_end
from evolink_async.cli.running import Ending, Source, leave_at_once, opened, run_through
from evolink_async.cli.signals import Interrupts
from evolink_async.cli.text import amount, counted, shortened
from evolink_async.durations import duration
from evolink_async.errors import BudgetExceededError, EvoLinkError, LedgerError
from evolink_async.http.rates import RateLimit
from evolink_async.pool import Outcome, OutcomeStatus, PoolStats
from evolink_async.report.files import ERRORS, LEDGER, RESULTS
from evolink_async.requests import GenerationRequest

if TYPE_CHECKING:
    from evolink_async import AsyncEvoLink
    from evolink_async.cli.settings import Settings
    from evolink_async.cli.view import Screen

FAILURES_SHOWN = 20
_SAMPLE = 10  # requests after which the price of the whole file is estimated
_BALANCE_TIMEOUT = 5.0
_TOLD_AT_THE_END = (OutcomeStatus.NOT_SUBMITTED, OutcomeStatus.UNFINISHED)
IDS_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The options of `run`."""

    file: str
    out: str | None
    model: str | None
    kind: str | None
    rate: str | None
    max_outstanding: int
    max_credits: float | None
    retry_failed: int
    dry_run: bool
    limit: int | None
    skip_bad: bool
    resend_unsettled: bool
    as_json: bool


def run_file(screen: Screen, settings: Settings, job: Job) -> int:
    """Do it; the exit code. Raises `BadInput` and `EvoLinkError` before anything is sent."""
    rate = None if job.rate is None else RateLimit.parse(job.rate)
    if job.out is None and not job.dry_run:
        raise BadInput("give --out DIR, the folder for results.jsonl and errors.jsonl (or --dry-run)")
    if job.out is not None:
        _refuse_no_folder(job.out)
    if job.dry_run or job.out is None:
        return _planned(screen, settings, job, rate)
    _refuse_own_output(job.file, Path(job.out))
    client = settings.client(job.rate)
    with OutputFolder(job.out) as folder, open_input(job.file, _defaults(settings, job)) as source:
        report = source.check(job.limit)
        if not _acceptable(screen, source, report, job):
            return 2
        return asyncio.run(_sent(_Run(screen, client, job, folder, source, report)))


def _refuse_no_folder(out: str) -> None:
    """An empty variable of a script is no folder, and a store cannot hold the ledger that lies beside the results."""
    if not out.strip():
        raise BadInput("--out is empty: give the folder for results.jsonl and errors.jsonl")
    if "://" in out:
        raise BadInput(
            f"--out {out}: a run keeps its ledger beside its results, so it needs a folder of this machine; "
            "in a program, save_to= of a pool takes object stores"
        )
    try:
        os.stat(Path(out) / LEDGER)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # nobody may look into it, or its name is too long
        raise BadInput(f"cannot write into {shortened(out, 300)}: {error.strerror or error}") from None


def _refuse_own_output(file: str, out: Path) -> None:
    """A file that `run` writes anew cannot be what it reads."""
    for name in (RESULTS, ERRORS):
        if file != "-" and (out / name).exists() and os.path.exists(file) and os.path.samefile(file, out / name):
            raise BadInput(
                f"{file} is written anew by a run into {out}: give the file of the first time, which goes on, "
                "or another --out"
            )


def _defaults(settings: Settings, job: Job) -> Defaults:
    return Defaults(
        model=job.model,
        kind=None if job.kind is None else str(job.kind),
        lenient_hosts=settings.is_local,
        folder="" if job.file == "-" else os.path.dirname(job.file),
        resend_unsettled=job.resend_unsettled,
    )


# Before


def _acceptable(screen: Screen, source: Input, report: Report, job: Job) -> bool:
    """Tell what was found; whether to go on."""
    for warning, count in report.warnings.most_common(SHOWN):
        lines = f"{source.unit} {report.warned_first[warning]}" + (
            f" and {counted(count - 1, 'other')}" if count > 1 else ""
        )
        screen.say(f"warning: {lines}: {shortened(warning, 500)}", style="yellow")
    if (more := len(report.warnings) - SHOWN) > 0:
        screen.say(f"and {counted(more, 'other warning')}", style="yellow")
    screen.log.without.update(report.warnings)  # the client would say them again
    for entry in report.bad:
        screen.say(f"{source.unit} {entry.line}: {shortened(entry.reason, 500)}", style="red")
    if (more := report.bad_count - len(report.bad)) > 0:
        screen.say(f"and {counted(more, f'other bad {source.unit}')}", style="red")
    if report.bad_count and not job.skip_bad:
        of = f"{counted(report.bad_count, f'bad {source.unit}')} in {source.name}, {report.requests:,} good"
        screen.say(f"{of}; nothing was sent (--skip-bad goes on without the bad ones)", style="red")
        return False
    if not report.requests:
        screen.complain(f"{source.name} holds no requests that can be sent")
        return False
    return True


def _planned(screen: Screen, settings: Settings, job: Job, rate: RateLimit | None) -> int:
    """Check the file and say what a run would do."""
    ledger = None
    if job.out is not None:
        _refuse_own_output(job.file, Path(job.out))
        refuse_without_ledger(Path(job.out))
        ledger = Path(job.out) / LEDGER
    with open_input(job.file, _defaults(settings, job)) as source:
        report = source.check(job.limit)
        acceptable = _acceptable(screen, source, report, job)
        plan = Plan(
            per_second=None if rate is None else rate.per_second,
            max_outstanding=job.max_outstanding,
            max_credits=None if job.max_credits is None else Decimal(str(job.max_credits)),
        )
        if acceptable:
            entries = source.read(report.repeated, job.limit)
            requests = (entry.request for entry in entries if entry.request is not None)
            make_plan(plan, report.models, requests, ledger, job.retry_failed)
            tell_plan(screen, plan, source.name, report, job.rate)
        if job.as_json:
            screen.standard().json(plan_line(plan, source.name, report, acceptable=acceptable))
    return 0 if acceptable else 2


# Under way


class _Run:
    """One run: takes requests from the file, gives outcomes to the files and to standard output."""

    def __init__(
        self, screen: Screen, client: AsyncEvoLink, job: Job, folder: OutputFolder, source: Input, report: Report
    ) -> None:
        self.screen, self.client, self.job, self.folder = screen, client, job, folder
        self.source = Source(self._requests(source, report), report.requests)
        self.total = report.requests
        self.left_out = 0
        self.cannot_write = self.cannot_print = False
        self._standard = screen.standard() if job.as_json else None
        self._failures = 0

    def _requests(self, source: Input, report: Report) -> Iterator[GenerationRequest]:
        for entry in source.read(report.repeated, self.job.limit):
            if entry.request is not None:
                yield entry.request
            else:
                self.left_out += 1
                line = bad_line(entry.line, entry.reason, entry.data)
                self._write(self.folder.refused, line, line)
            if self.cannot_write:
                return

    def take(self, outcome: Outcome) -> bool:
        """Write it down first, then tell. False: nothing more should be sent, as it could not be written down."""
        self._write(self.folder.take, outcome, result_line(outcome))
        if self._standard is not None:
            self._print(self._standard, outcome)
        if outcome.error is not None and outcome.status not in _TOLD_AT_THE_END:
            self._tell(outcome)
        return not self.cannot_write

    def _write(self, write: Callable[[Any], None], what: Any, line: Mapping[str, Any]) -> None:
        """Write to the folder; where that fails (a full disk), what is paid for is at least told."""
        try:
            write(what)
        except OSError as error:
            if not self.cannot_write:
                self.cannot_write = True
                why = error.strerror or error
                self.screen.complain(
                    f"cannot write into {self.folder.path}: {why}; nothing more is sent, the rest is here:"
                )
            self.screen.verbatim(encoded(line).decode())

    def _print(self, standard: Standard, outcome: Outcome) -> None:
        """Print it; where that fails (a full disk), the folder still has it, so the run goes on."""
        try:
            standard.json(result_line(outcome))
        except OSError as error:
            self._standard, self.cannot_print = None, True
            self.screen.complain(f"{error.strerror or error}; all that becomes of it is in {self.folder.path}")

    def _tell(self, outcome: Outcome) -> None:
        self._failures += 1
        if self._failures <= FAILURES_SHOWN:
            assert outcome.error is not None
            name = outcome.key if outcome.key is not None else f"request {outcome.index}"
            task = f" (task {outcome.task.id})" if outcome.task else ""
            why = shortened(message_of(outcome.error), 300)
            code = f"{outcome.error.code}: " if outcome.error.code else ""
            what = "not saved" if outcome.status is OutcomeStatus.COMPLETED else _words(outcome.status)
            self.screen.say(f"{shortened(name, 60)} {what}: {code}{why}{task}", style="red")
        elif self._failures == FAILURES_SHOWN + 1:
            self.screen.say(f"more that did not complete is in {self.folder.path / ERRORS}", style="red")


async def _sent(run: _Run) -> int:
    screen = run.screen

    def stopping() -> None:
        screen.say(
            "stopping: nothing more is sent; up to 5 s for answers that are on their way (once more: at once)",
            style="yellow",
        )

    with Interrupts(stopping) as interrupts:
        return await interrupts.run(_sent_until(run, interrupts))


class _Balance:
    """Warns once, as soon as it shows, that the credits there are will not do for the whole file."""

    def __init__(self, screen: Screen, credits: Decimal | None, total: int) -> None:
        self._screen, self._credits, self._total = screen, credits, total

    def look(self, stats: PoolStats) -> None:
        """Compare. Takes what was asked for so far as a sample of the rest."""
        free = stats.counts.get(OutcomeStatus.REJECTED, 0) + stats.counts.get(OutcomeStatus.NOT_SUBMITTED, 0)
        asked = stats.pulled - stats.waiting - free  # also those whose results are being saved
        cost = stats.credits_spent + stats.credits_reserved
        if self._credits is None or not cost or asked < min(_SAMPLE, self._total):
            return
        whole = cost / asked * self._total
        if whole > self._credits:
            self._screen.say(
                f"at this price all {self._total:,} requests cost about {amount(whole)} credits, and there are "
                f"{amount(self._credits)}; what they do not do for comes back to be sent later",
                style="yellow",
            )
            self._credits = None


async def _balance(client: AsyncEvoLink) -> Decimal | None:
    """The credits that may be spent, None if the service does not say."""
    try:
        credits = await client.credits(timeout=_BALANCE_TIMEOUT)
    except EvoLinkError:
        return None  # what is wrong, the first request will tell
    limits = [credits.user.remaining, None if credits.key.unlimited else credits.key.remaining]
    return min((limit for limit in limits if limit is not None), default=None)


async def _sent_until(run: _Run, interrupts: Interrupts) -> int:
    async with opened(run.client, run.screen, interrupts) as client:
        balance = _Balance(run.screen, await _balance(client), run.total)
        progress = ProgressRecord(run.folder.path)

        def look(stats: PoolStats) -> None:
            balance.look(stats)
            progress.note(stats)

        ending = await run_through(
            client,
            run.source,
            run.take,
            run.screen,
            interrupts,
            begin=run.folder.begin,
            on_progress=look,
            max_outstanding=run.job.max_outstanding,
            max_credits=run.job.max_credits,
            retry_failed=run.job.retry_failed,
            ledger=run.folder.ledger,
            save_to=run.folder.path,
        )
        _sum_up(run, ending)
        if interrupts.count > 1 and interrupts.code is not None:
            leave_at_once(interrupts.code)
        await report_at_the_end(run.screen, run.folder.path)
    return max(ending.code, 1 if run.left_out or run.cannot_write or run.cannot_print else 0)


# Afterwards


def _sum_up(run: _Run, ending: Ending) -> None:
    screen, stats, folder = run.screen, ending.stats, run.folder.path
    completed = ending.counts[OutcomeStatus.COMPLETED]
    others = [
        f"{count:,} {_words(status)}" for status, count in ending.counts.items() if status != "completed" and count
    ]
    if run.left_out:
        others.append(counted(run.left_out, "bad line") + " left out")
    if ending.cut_short or run.cannot_write:
        others.append("the rest was not read")
    if ending.unsaved:
        others.append(f"{ending.unsaved:,} of them not saved")
    if ending.from_ledger:
        others.append(f"{ending.from_ledger:,} of them known from earlier runs")
    so = ", ".join([f"{completed:,} of {run.total:,} completed", *others])
    spent = f"{amount(stats.credits_spent)} credits" + (" spent" if not ending.running else " spent so far")
    screen.say(f"{so}; {spent}, {duration(stats.elapsed)}", style="green" if not others else "bold")
    if ending.reason is not None:
        screen.complain(f"ended early: {ending.reason}")
    if completed:
        screen.say(f"files: {folder}, and what each is: {folder / RESULTS}")
    _tell_changes(screen, ending, run.folder.ledger)
    if ending.counts.total() > completed or run.left_out:
        screen.say(f"what did not complete, as lines for another run: {folder / ERRORS}")
    if ending.unknown:
        screen.say(
            f"{counted(ending.unknown, 'request')} got no answer and may be running and paid for; "
            "`run` settles what it can when it is run again, and this is how to look at them:",
            style="yellow",
        )
        screen.verbatim(f"  {shlex.join(['evolink-async', 'job', 'unknown', str(run.folder.ledger)])}")
    if ending.given_up:
        screen.say(
            f"{counted(ending.given_up, 'request was', 'requests were')} given up: "
            f"{'it is' if ending.given_up == 1 else 'they are'} never sent again, and may have been paid for",
            style="yellow",
        )
    if ending.running:
        tell_ids(screen, ending.running, folder / ERRORS)
    if ending.running or ending.unknown or ending.unsaved or ending.counts[OutcomeStatus.NOT_SUBMITTED]:
        with_more = " with more --max-credits" if isinstance(ending.reason, BudgetExceededError) else ""
        # A ledger that could not be written does not know all that was paid for.
        promise = (
            "once the ledger is in order" if isinstance(ending.reason, LedgerError) else "and pays for nothing twice"
        )
        screen.say(f"the same command again{with_more} goes on, {promise}:")
        screen.verbatim(f"  {shlex.join(['evolink-async', *sys.argv[1:]])}")


def _tell_changes(screen: Screen, ending: Ending, ledger: Path) -> None:
    """How this file compares with that of earlier runs."""
    census = ending.census
    if census is None or not census.known:
        return
    if census.changed:
        one = "1 request has" if census.changed == 1 else f"{census.changed:,} requests have"
        screen.say(f"{one} another body than in an earlier run under the same key", style="yellow")
    gone = census.gone if ending.reason is None and not ending.cut_short else 0
    if gone:
        screen.say(f"{counted(gone, 'request')} of earlier runs did not come this time", style="yellow")
    if census.changed or gone:
        screen.say(f"{RESULTS} is without what became of them in earlier runs; the ledger has it:", style="yellow")
        screen.verbatim(f"  {shlex.join(['evolink-async', 'job', 'export', str(ledger)])}")


def tell_ids(screen: Screen, ids: list[str], file: Path | None = None) -> None:
    """Name tasks that go on."""
    screen.say(f"{counted(len(ids), 'task')} still running at the service, and paid for:", style="yellow")
    for task_id in ids[:IDS_SHOWN]:
        screen.verbatim(f"  {task_id}")
    if (more := len(ids) - IDS_SHOWN) > 0:
        screen.say(f"  and {more:,} more" + (f" in {file}" if file else ""))


def tell_running(screen: Screen, ids: list[str]) -> None:
    """Name tasks that go on and the command that waits for them."""
    tell_ids(screen, ids)
    screen.say("wait for them with:")
    screen.verbatim(f"  evolink-async wait {' '.join(ids)}")


def _words(status: str) -> str:
    return {"completed": "completed", "unknown": "unanswered"}.get(status, status.replace("_", " "))
