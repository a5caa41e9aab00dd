"""The commands: what they are called, what they take, what they say for --help. The work is done next door.

Exit codes: 0 all completed and saved, 1 some not, 2 usage or bad input (nothing was sent), 3 stopped by the account or
its budget, 129, 130 and 143 interrupted by SIGHUP, SIGINT and SIGTERM. Standard output is data, standard error is for
people.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from evolink_async.cli.settings import Settings
from evolink_async.cli.text import in_code_page

if TYPE_CHECKING:
    from evolink_async.cli.view import Screen

__all__ = ["app", "start"]

app = typer.Typer(
    name="evolink-async",
    help="Run many EvoLink image, video and audio generations. The API key is read from EVOLINK_API_KEY only: "
    "on the command line every user of the machine could see it.",
    epilog="Exit codes: 0 all completed and saved, 1 some not, 2 usage or bad input (nothing sent), 3 stopped by the "
    "account or the budget, 129/130/143 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes leave no room for names of options on a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Kind(StrEnum):
    """What is generated."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"


class Hint(StrEnum):
    """How the emulator's 429 says when to come again."""

    SECONDS = "seconds"
    DATE = "date"
    MS = "ms"
    BODY = "body"
    NONE = "none"


def start() -> NoReturn:
    """Run the command line and exit."""
    _speak_code_page()
    try:
        app(prog_name="evolink-async")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer says 1; but who reads --help may have had enough
            sys.exit(0)
        raise
    except OSError as error:  # --help on a full disk, or a usage error that nobody can read
        from evolink_async.cli.outputs import silence

        try:
            print(f"cannot write: {error.strerror or error}", file=sys.stderr)
        except OSError:
            silence(sys.stderr)  # else it is written once more at the end, and fails again
        sys.exit(getattr(error.__context__, "exit_code", 1))
    finally:
        _flush()
    sys.exit(0)


def _speak_code_page() -> None:
    """A console whose encoding lacks a character gets something in its place, never an exception."""
    codecs.register_error("evolink.in_code_page", in_code_page)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="evolink.in_code_page")


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        from evolink_async.cli.outputs import silence_stdout

        silence_stdout()


def _finish(ctx: typer.Context, work: Callable[[Screen], int]) -> NoReturn:
    """Do a command's work: whatever it raises becomes one sentence and an exit code, never a traceback."""
    from evolink_async.cli.entries import BadInput
    from evolink_async.cli.outputs import silence_stdout, stopped_by_account
    from evolink_async.cli.view import Screen
    from evolink_async.errors import (
        BadRequestError,
        ConfigurationError,
        EvoLinkError,
        InvalidRequestError,
        LedgerError,
    )

    screen = Screen()
    logger = logging.getLogger("evolink_async")
    level = logger.level
    screen.log.setLevel(logging.INFO if ctx.obj.verbose else logging.WARNING)
    logger.addHandler(screen.log)
    if ctx.obj.verbose:
        logger.setLevel(logging.INFO)
    try:
        code = work(screen)
    except EvoLinkError as error:
        screen.complain(error)
        unusable = ConfigurationError | InvalidRequestError | LedgerError
        usage = isinstance(error, unusable) and not isinstance(error, BadRequestError)
        code = 2 if usage else 3 if stopped_by_account(error) else 1
    except BadInput as error:
        screen.complain(error)
        code = 2
    except KeyboardInterrupt:
        screen.say("interrupted; nothing was sent")
        code = 130
    except BrokenPipeError:
        silence_stdout()
        code = 0  # whoever read our output has had enough
    except OSError as error:
        where = f" {error.filename}:" if error.filename else ""
        screen.complain(f"{where} {error.strerror or error}".strip())
        code = 1
    finally:
        logger.removeHandler(screen.log)
        logger.setLevel(level)
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from evolink_async import __version__

        print(f"evolink-async {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    base_url: Annotated[
        str | None,
        typer.Option(help="The service's address without /v1, else EVOLINK_BASE_URL.", metavar="URL"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to standard error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    ctx.obj = Settings(base_url, verbose)


@app.command(short_help="See it work, without a key, in half a minute.")
def demo(
    ctx: typer.Context,
    requests: Annotated[int, typer.Option(min=1, max=10_000, help="How many generations.")] = 60,
    speed: Annotated[float, typer.Option(min=1, max=1000, help="How much faster than EvoLink.")] = 50,
    seed: Annotated[int, typer.Option(help="Another seed, other durations and failures.")] = 1,
    out: Annotated[
        str | None,
        typer.Option(help="A new folder for the files and the report, else evolink-demo.", metavar="DIR"),
    ] = None,
) -> None:
    """See it work, without a key: a local emulator, 60 generations through one pool, their files and a report."""
    from evolink_async.cli.demo import run_demo

    _finish(ctx, lambda screen: run_demo(screen, requests, speed, seed, out))


@app.command(short_help="Run every request of a file, or go on with it.")
def run(
    ctx: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="JSON lines (ours or OpenAI's batch lines), CSV or Parquet; - reads standard input.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Folder for the files, what each is, the ledger and the report.", metavar="DIR"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="For lines that name no model.", metavar="ID")] = None,
    kind: Annotated[
        Kind | None, typer.Option(help="For lines that name no kind: image, video, audio.", metavar="KIND")
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Never send faster, e.g. 5/s or 60/min.", metavar="RATE")] = None,
    max_outstanding: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Tasks that run at once.", metavar="N")
    ] = 1000,
    max_credits: Annotated[
        float | None,
        typer.Option(min=0, help="Never spend and reserve more, over all runs into this folder.", metavar="C"),
    ] = None,
    retry_failed: Annotated[
        int,
        typer.Option(
            min=0, max=100, help="So often generate, and pay, anew what failed for a passing reason.", metavar="N"
        ),
    ] = 0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the file and say what a run would send, cost and take; send nothing."),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N requests.", metavar="N")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without bad lines; they land in errors.jsonl.")
    ] = False,
    resend_unsettled: Annotated[
        bool,
        typer.Option("--resend-unsettled", help="Send lines again whose tasks may exist: may pay twice."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Each outcome as a JSON line on standard output; of --dry-run the plan.")
    ] = False,
) -> None:
    """Run every request of a file. The whole file is checked first; nothing is sent if a line is bad.

    Results are saved into the folder, which keeps a ledger, job.db, too: run again after whatever happened, it goes on
    and pays for nothing twice.
    """
    from evolink_async.cli.job import Job, run_file

    job = Job(
        file=file,
        out=out,
        model=model,
        kind=kind,
        rate=rate,
        max_outstanding=max_outstanding,
        max_credits=max_credits,
        retry_failed=retry_failed,
        dry_run=dry_run,
        limit=limit,
        skip_bad=skip_bad,
        resend_unsettled=resend_unsettled,
        as_json=as_json,
    )
    _finish(ctx, lambda screen: run_file(screen, ctx.obj, job))


@app.command(
    short_help="Write report.html into the folder of a run.",
    epilog="Exit codes: 0 it is written, 1 it could not be, 2 a folder that holds nothing of a run.",
)
def report(
    ctx: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a run, its --out.", show_default=False)],
) -> None:
    """Write report.html into the folder of a run: a gallery with filters, and what it took. Prints its path.

    `run` writes it when it ends; this is for a run that was killed, one that still runs, or a ledger of your own.
    """
    from evolink_async.cli.report import make_report

    _finish(ctx, lambda screen: make_report(folder))


@app.command(short_help="Generate one image, video or audio.")
def generate(
    ctx: typer.Context,
    kind: Annotated[
        Kind, typer.Argument(help="What to generate: image, video or audio.", metavar="KIND", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="The model's id; see `evolink-async models`.", metavar="ID")],
    prompt: Annotated[
        str | None, typer.Option(help="The text; - reads it from standard input.", metavar="TEXT")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(help="A parameter, e.g. n=2; of a list, once for each item.", metavar="NAME=VALUE"),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Save the files into this folder and print their paths.", metavar="DIR")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds in all.", metavar="S")] = 3600,
    as_json: Annotated[bool, typer.Option("--json", help="The outcome as a JSON line.")] = False,
) -> None:
    """Generate one image, video or audio and print its links, one a line. They die in 24 hours: --out saves them.

    Values are read as the type that the model's parameter has; of an unknown one true, false, numbers and JSON lists
    and objects are read as such, and all else is text.
    """
    from evolink_async.cli.single import Generation, generate_one

    wanted = Generation(
        kind=kind, model=model, prompt=prompt, params=param or [], out=out, timeout=timeout, as_json=as_json
    )
    _finish(ctx, lambda screen: generate_one(screen, ctx.obj, wanted))


@app.command(short_help="Say how tasks are doing.")
def status(
    ctx: typer.Context,
    ids: Annotated[
        list[str],
        typer.Argument(
            metavar="ID",
            help="Task ids, or @FILE: those in a results.jsonl or errors.jsonl; @- reads standard input.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Each task as a JSON line.")] = False,
) -> None:
    """Say how tasks are doing. Exit code 1 if the service doesn't know one of them."""
    from evolink_async.cli.single import show_status

    _finish(ctx, lambda screen: show_status(screen, ctx.obj, ids, as_json=as_json))


@app.command(short_help="Wait for tasks and print their links.")
def wait(
    ctx: typer.Context,
    ids: Annotated[
        list[str],
        typer.Argument(
            metavar="ID",
            help="Task ids, or @FILE: the unfinished ones in an errors.jsonl; @- reads standard input.",
            show_default=False,
        ),
    ],
    timeout: Annotated[float, typer.Option(min=1, help="Seconds in all.", metavar="S")] = 3600,
    as_json: Annotated[bool, typer.Option("--json", help="Each task as a JSON line as it ends.")] = False,
) -> None:
    """Wait for tasks and print their links, one a line. Interrupting it doesn't end the tasks."""
    from evolink_async.cli.single import wait_for

    _finish(ctx, lambda screen: wait_for(screen, ctx.obj, ids, timeout, as_json=as_json))


@app.command(short_help="Say how many credits there are.")
def credits(
    ctx: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="As a JSON object.")] = False
) -> None:
    """Say how many credits the account and this key have."""
    from evolink_async.cli.single import show_credits

    _finish(ctx, lambda screen: show_credits(screen, ctx.obj, as_json=as_json))


@app.command(short_help="List the models, or what one of them takes.")
def models(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="For its parameters.", metavar="ID", show_default=False)] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only these: image, video or audio.", metavar="KIND")] = None,
    legacy: Annotated[bool, typer.Option(help="Also models that are in older documents only.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Each model as a JSON line.")] = False,
) -> None:
    """List the models, or what one of them takes. From public documents; needs no key."""
    from evolink_async.cli.listing import show_model, show_models

    if model is None:
        _finish(ctx, lambda screen: show_models(kind, legacy=legacy, as_json=as_json))
    _finish(ctx, lambda screen: show_model(model, as_json=as_json))


# A ledger

JOB_CODES = "Exit codes: 0 done, 2 usage or a ledger that can't be used (nothing was changed)."

job_app = typer.Typer(
    help="Look at a ledger, and settle what is unknown in it. Looking is possible while a program runs the job.",
    short_help="Look at a ledger, and settle what is unknown in it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(job_app, name="job")


def _ledger_of(path: str) -> str:
    """The folder of a run stands for the ledger in it."""
    return os.path.join(path, "job.db") if os.path.isdir(path) else path


LedgerPath = Annotated[
    str,
    typer.Argument(
        metavar="LEDGER",
        help="The file, e.g. job.db, the folder of a run, or a postgresql:// URL.",
        callback=_ledger_of,
        show_default=False,
    ),
]
JobName = Annotated[
    str | None,
    typer.Option("--job", metavar="NAME", help="Which job; else the only one, or the one called default."),
]


@job_app.command("show", epilog=JOB_CODES)
def job_show(
    ctx: typer.Context,
    ledger: LedgerPath,
    job: Annotated[str | None, typer.Option("--job", metavar="NAME", help="Only this job.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Each job as a JSON line.")] = False,
) -> None:
    """How each job stands: requests by state, credits, what is unknown, and the cost by day and model."""
    from evolink_async.cli.ledger import show_jobs

    _finish(ctx, lambda screen: show_jobs(screen, ledger, job, as_json=as_json))


@job_app.command(
    "unknown",
    epilog="Exit codes: 0 nothing is to be resolved, 1 something is, 2 usage or a ledger that can't be used, 3 the "
    "service refused the account (--candidates).",
)
def job_unknown(
    ctx: typer.Context,
    ledger: LedgerPath,
    job: JobName = None,
    candidates: Annotated[
        bool,
        typer.Option(
            "--candidates",
            help="Ask the service, with EVOLINK_API_KEY, for tasks of the same model and time that the ledger doesn't "
            "know. They are shown, never taken.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Each request as a JSON line.")] = False,
) -> None:
    """List requests that may have been accepted, or paid for twice, and how to settle each.

    What a running program has on the wire at this moment is not among them.
    """
    from evolink_async.cli.ledger import show_unknown

    _finish(ctx, lambda screen: show_unknown(screen, ctx.obj, ledger, job, ask_service=candidates, as_json=as_json))


@job_app.command(
    "resolve",
    epilog="Exit codes: 0 it is settled; else nothing was changed: 1 the task could not be looked up, 2 usage, a task "
    "that can't be the one, a job that is running or a ledger that can't be used, 3 the service refused the account.",
)
def job_resolve(
    ctx: typer.Context,
    ledger: LedgerPath,
    identity: Annotated[
        str,
        typer.Argument(
            metavar="IDENTITY",
            help="The request as `job unknown` names it, or its idempotency key.",
            show_default=False,
        ),
    ],
    task_id: Annotated[
        str | None,
        typer.Option(
            "--task-id",
            metavar="ID",
            help="It was accepted, this is its task: the next run polls it on. With EVOLINK_API_KEY set the task is "
            "looked up first: it must exist, and have the model and the time of the request.",
        ),
    ] = None,
    not_submitted: Annotated[
        bool, typer.Option("--not-submitted", help="It was not accepted: its credits are free, the next run sends it.")
    ] = False,
    give_up: Annotated[
        bool, typer.Option("--give-up", help="Nobody will find out: never sent again, its credits stay reserved.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Take the task id without looking it up.")] = False,
    job: JobName = None,
    as_json: Annotated[bool, typer.Option("--json", help="The request as it is then, as a JSON line.")] = False,
) -> None:
    """Settle a request that is unknown by what you have found out. Not while a program runs the job."""
    from evolink_async.cli.ledger import Resolution, resolve_one

    how = Resolution(identity=identity, task_id=task_id, not_submitted=not_submitted, give_up=give_up, force=force)
    _finish(ctx, lambda screen: resolve_one(screen, ctx.obj, ledger, job, how, as_json=as_json))


class Format(StrEnum):
    """How requests are written."""

    JSONL = "jsonl"
    CSV = "csv"


@job_app.command("export", epilog=JOB_CODES)
def job_export(
    ctx: typer.Context,
    ledger: LedgerPath,
    job: JobName = None,
    state: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="Only these, e.g. failed; may be repeated.")
    ] = None,
    format: Annotated[Format, typer.Option(help="JSON lines or CSV.")] = Format.JSONL,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, which is the default.")] = False,
) -> None:
    """Write all requests to standard output: what each has become, its task, links, files and credits."""
    from evolink_async.cli.ledger import export_rows

    if as_json and format is Format.CSV:
        raise typer.BadParameter("--json and --format csv exclude each other")
    _finish(ctx, lambda screen: export_rows(ledger, job, state or [], as_csv=format is Format.CSV))


@app.command(short_help="Serve a local EvoLink, for trying things without a key.")
def emulator(
    ctx: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", metavar="PORT")] = 8085,
    speed: Annotated[float, typer.Option(min=0.001, help="How much faster than EvoLink.", metavar="X")] = 50,
    seed: Annotated[int, typer.Option(help="Another seed, other durations, failures and pictures.", metavar="N")] = 1,
    faults: Annotated[str | None, typer.Option(help="JSON file: what goes wrong.", metavar="FILE")] = None,
    rate: Annotated[float | None, typer.Option(help="Submissions per second, beyond them 429.", metavar="X")] = None,
    burst: Annotated[float | None, typer.Option(help="Submissions at once.", metavar="N")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Most unfinished tasks, beyond them 429.", metavar="N")
    ] = None,
    credits: Annotated[float | None, typer.Option(help="Credits at the start, else a million.", metavar="C")] = None,
    failure_share: Annotated[float, typer.Option(min=0, max=1, help="Share of tasks that fail.", metavar="X")] = 0,
    idempotency: Annotated[bool, typer.Option(help="Whether the Idempotency-Key header is honoured.")] = True,
    batch: Annotated[bool, typer.Option(help="Whether POST /v1/tasks/batch exists.")] = True,
    listing: Annotated[bool, typer.Option(help="Whether GET /v1/tasks exists.")] = True,
    retry_after: Annotated[
        Hint, typer.Option(help="How a 429 says when to come again: seconds, date, ms, body or none.", metavar="HOW")
    ] = Hint.SECONDS,
    private_callbacks: Annotated[
        bool, typer.Option("--private-callbacks", help="callback_url may be http and on this machine.")
    ] = False,
    standing: Annotated[bool, typer.Option("--standing", help="The clock stands until it is advanced.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Record from the start.")] = False,
    models: Annotated[str | None, typer.Option(help="JSON file: how the models' tasks go.", metavar="FILE")] = None,
    dialect: Annotated[str | None, typer.Option(help="JSON file: how the service speaks.", metavar="FILE")] = None,
) -> None:
    """Serve a local EvoLink until Ctrl-C, for trying things without a key and without costs.

    Its page at / shows tasks, account and faults; docs/emulator.md tells the rest.
    """
    from evolink_async.cli.serving import serve

    options = {
        "speed": speed,
        "seed": seed,
        "rate": rate,
        "burst": burst,
        "concurrency": concurrency,
        "credits": credits,
        "failure_share": failure_share,
        "idempotency": idempotency,
        "batch": batch,
        "listing": listing,
        "retry_after": None if retry_after is Hint.NONE else str(retry_after),
        "private_callbacks": private_callbacks,
        "standing": standing,
        "record": record,
    }
    files = {"faults": faults, "models": models, "dialect": dialect}
    _finish(ctx, lambda screen: serve(screen, host, port, files, options))
