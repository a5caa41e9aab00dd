"""`generate`, `status`, `wait` and `credits`: one generation, and tasks that exist already."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pydantic_core import from_json
from rich.console import Console
from rich.text import Text

from evolink_async.catalog import get_model
from evolink_async.checks import checked_id
from evolink_async.cli.entries import BadInput, Defaults, convert, request_from
from evolink_async.cli.job import tell_running
from evolink_async.cli.outputs import Standard, refuse_no_text, result_line, stopped_by_account, task_line, to_terminal
from evolink_async.cli.running import Source, leave_at_once, opened, run_through
from evolink_async.cli.signals import Interrupts
from evolink_async.cli.text import amount, clean, counted
from evolink_async.cli.view import STATUS_STYLES
from evolink_async.durations import duration
from evolink_async.errors import (
    BadRequestError,
    DownloadError,
    EvoLinkError,
    NotFoundError,
    NotSubmittedError,
    TaskError,
    TaskTimeoutError,
)
from evolink_async.pool import Outcome
from evolink_async.requests import GenerationRequest
from evolink_async.saving.saver import Saver
from evolink_async.types import Task

if TYPE_CHECKING:
    from evolink_async import AsyncEvoLink
    from evolink_async.cli.settings import Settings
    from evolink_async.cli.view import Screen

T = TypeVar("T")

_QUESTION, _LAST_LOOK, _A_MOMENT = 60.0, 5.0, 0.1  # seconds
_SILENCE = 5.0  # seconds that a question may take before something is said


# One generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The options of `generate`."""

    kind: str
    model: str
    prompt: str | None
    params: list[str]
    out: str | None
    timeout: float
    as_json: bool


def generate_one(screen: Screen, settings: Settings, wanted: Generation) -> int:
    """Generate one; print its links, or the paths of its files. Raises `EvoLinkError` before anything is sent."""
    if wanted.out is not None:
        refuse_no_text(wanted.out)
    fields: dict[str, Any] = {"kind": str(wanted.kind), "model": wanted.model}
    if wanted.prompt is not None:
        fields["prompt"] = _standard_input() if wanted.prompt == "-" else wanted.prompt
    fields |= parameters(wanted.model, wanted.params)
    request, warnings = request_from(fields, Defaults(lenient_hosts=settings.is_local))
    for warning in warnings:
        screen.say(f"warning: {warning}", style="yellow")
    screen.log.without.update(warnings)
    return asyncio.run(_generated(screen, settings.client(), request, wanted))


def parameters(model: str, texts: Iterable[str]) -> dict[str, Any]:
    """What NAME=VALUE options say, as the types of the model's parameters. Raises `BadInput`.

    A name that comes more than once is a list; so is one that takes a list.
    """
    given: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BadInput(f"--param reads NAME=VALUE, such as size=1024x1024, got {text!r}")
        if name in _OWN_OPTIONS:
            raise BadInput(f"--param {name}: that is what --{name} is for" if name != "kind" else _KIND_FIRST)
        if name in _NEVER_SENT:
            raise BadInput(f"--param {name}: {name} belongs to a line of a file, and is never sent")
        given.setdefault(name, []).append(value)
    known = get_model(model)
    fields: dict[str, Any] = {}
    for name, values in given.items():
        converted = [convert(model, name, value) for value in values]
        if len(values) == 1:
            fields[name] = converted[0]
            continue
        spec = None if known is None else known.params.get(name)
        if spec is not None and "array" not in spec.types:
            raise BadInput(f"--param {name} stands there {len(values)} times, and {name} takes one value")
        fields[name] = [item for part in converted for item in (part if isinstance(part, list) else [part])]
    return fields


_OWN_OPTIONS = ("model", "prompt", "kind")
_NEVER_SENT = ("key", "custom_id", "metadata")
_KIND_FIRST = "--param kind: the kind stands first, such as: evolink-async generate image"


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise BadInput("standard input is closed; give the prompt as --prompt TEXT")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        pass  # a console with a code page of its own
    try:
        return data.decode(sys.stdin.encoding).strip()
    except UnicodeDecodeError:
        raise BadInput("the prompt on standard input is not UTF-8") from None


async def _generated(screen: Screen, client: AsyncEvoLink, request: GenerationRequest, wanted: Generation) -> int:
    ended: list[Outcome] = []

    async def work() -> int:
        async with opened(client, screen, interrupts):
            saver = None if wanted.out is None else Saver(client._core, wanted.out)
            if saver is not None:
                await saver.prepare()
            source = Source(iter([request]), 1)
            seconds = wanted.timeout
            ending = await run_through(
                client, source, ended.append, screen, interrupts, within=seconds, task_timeout=seconds
            )
            code = ending.code
            if ending.out_of_time and ended[0].status == "not_submitted":
                why = f"nothing was sent: no way through to the service within {duration(seconds)}"
                ended[0] = replace(ended[0], error=NotSubmittedError(why))
            if saver is not None and ended[0].status == "completed" and interrupts.code is None:
                ended[0] = await _saved(saver, ended[0])
                code = max(code, 0 if ended[0].ok else 1)
            if ending.running:
                tell_running(screen, ending.running)
            elif code == 0:
                spent, elapsed = amount(ending.stats.credits_spent), duration(ending.stats.elapsed)
                screen.say(f"completed in {elapsed}, {spent} credits", style="green")
            if interrupts.count > 1 and interrupts.code is not None:
                _tell_outcome(screen, ended[0], wanted)
                leave_at_once(interrupts.code)
        return code

    try:
        with Interrupts(lambda: screen.say("stopping (once more: at once)", style="yellow")) as interrupts:
            return await interrupts.run(work())
    finally:
        if ended:
            _tell_outcome(screen, ended[0], wanted)


async def _saved(saver: Saver, outcome: Outcome) -> Outcome:
    """The outcome with its files, or with what was wrong."""
    assert outcome.task is not None
    try:
        return replace(outcome, files=tuple(await saver.save_as_itself(outcome.task)))
    except DownloadError as error:
        return replace(outcome, files=error.files, error=error)


def _tell_outcome(screen: Screen, outcome: Outcome, wanted: Generation) -> None:
    try:
        _print_outcome(screen.standard(), outcome, wanted)
    except OSError:  # a full disk: what is paid for is at least told
        if outcome.task is not None:
            screen.say(f"task {outcome.task.id}, whose links live for 24 hours:")
        for what in (*outcome.urls, *outcome.files):
            screen.verbatim(f"  {what}")
        if outcome.error is not None:
            screen.complain(outcome.error)
        raise
    if outcome.error is not None and outcome.status != "unfinished":
        screen.complain(outcome.error)
    if wanted.out is not None and outcome.urls and len(outcome.files) < len(outcome.urls):
        screen.say("its links, which live for 24 hours:")
        for url in outcome.urls:
            screen.verbatim(f"  {url}")


def _print_outcome(standard: Standard, outcome: Outcome, wanted: Generation) -> None:
    if wanted.as_json:
        standard.json(result_line(outcome))
    elif wanted.out is None:
        for url in outcome.urls:
            standard.line(url)
    else:
        for file in outcome.files:
            standard.line(str(file))


# Tasks that exist


def show_status(screen: Screen, settings: Settings, arguments: list[str], *, as_json: bool) -> int:
    """What the service says of them; 1 if it doesn't know one."""
    ids = _ids(arguments, unfinished=False)

    async def work(client: AsyncEvoLink) -> dict[str, Task]:
        return await client.tasks.get_many(ids)

    found = _asked(screen, settings, work)
    standard = Standard()
    if as_json:
        for task_id in ids:
            standard.json(task_line(found[task_id]) if task_id in found else {"task_id": task_id, "status": None})
    elif to_terminal():
        console = Console(markup=False, emoji=False, highlight=False)
        for task_id in ids:
            console.print(_task_text(task_id, found.get(task_id)), soft_wrap=True)
    else:
        for task_id in ids:
            standard.line("\t".join(_task_cells(task_id, found.get(task_id))))
    missing = [task_id for task_id in ids if task_id not in found]
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        screen.complain(f"the service doesn't know {counted(len(missing), 'task')}: {names}")
    return 1 if missing else 0


def _task_cells(task_id: str, task: Task | None) -> list[str]:
    if task is None:
        return [task_id, "not known", "", "", ""]
    what = "; ".join(task.urls) or (task.error.message if task.error else "")
    return [clean(cell) for cell in (task.id, task.status, f"{task.progress} %", task.model or "", what)]


def _task_text(task_id: str, task: Task | None) -> Text:
    """A line about the task and one for each link, at home in any width."""
    name, status, progress, model, _ = _task_cells(task_id, task)
    text = Text(f"{name}  ").append(status, STATUS_STYLES.get(status, "yellow" if task is None else "cyan"))
    if task is not None:
        text.append(f"  {model}" if task.is_terminal else f"  {progress}  {model}")
        for url in task.urls:
            text.append(f"\n  {clean(url)}")
        if task.error is not None:
            text.append(f"\n  {clean(task.error.code)}: {clean(task.error.message)}", "red")
    return text


def wait_for(screen: Screen, settings: Settings, arguments: list[str], timeout: float, *, as_json: bool) -> int:
    """Wait for all of them and print links as they end."""
    ids = [checked_id(task_id) for task_id in _ids(arguments, unfinished=True)]
    return asyncio.run(_Waiting(screen, ids, timeout, as_json=as_json).run(settings.client()))


class _Waiting:
    """Some tasks that are waited for."""

    def __init__(self, screen: Screen, ids: list[str], timeout: float, *, as_json: bool) -> None:
        self._screen, self._ids, self._timeout, self._as_json = screen, ids, timeout, as_json
        self._standard = screen.standard()
        self._running: dict[str, Task | None] = dict.fromkeys(ids)
        self._code = 0

    async def run(self, client: AsyncEvoLink) -> int:
        with Interrupts() as interrupts:
            code = await interrupts.run(self._work(client))
        if self._running:
            tell_running(self._screen, list(self._running))
        return code

    async def _work(self, client: AsyncEvoLink) -> int:
        now = asyncio.get_running_loop().time
        deadline = now() + self._timeout
        async with client, self._screen.following(self._picture, self._sentence):
            await self._refused_account(client)
            left = max(deadline - now(), _A_MOMENT)
            await asyncio.gather(*(self._one(client, task_id, left) for task_id in self._ids))
        return self._code

    async def _refused_account(self, client: AsyncEvoLink) -> None:
        """Ask once first: a wait is patient with a refused key, the one who gave it wants to hear at once."""
        try:
            await client.tasks.get(self._ids[0], timeout=min(self._timeout, _QUESTION))
        except EvoLinkError as error:
            if stopped_by_account(error):
                self._running.clear()
                raise

    async def _one(self, client: AsyncEvoLink, task_id: str, timeout: float) -> None:
        def progressed(task: Task) -> None:
            self._running[task_id] = task

        try:
            task = await client.tasks.wait(task_id, timeout=timeout, on_progress=progressed)
        except TaskTimeoutError:
            self._code = max(self._code, 1)
            if await self._is_known(client, task_id):
                self._screen.complain(f"{task_id} is still running after {duration(self._timeout)}")
            else:
                self._running.pop(task_id)
                self._screen.complain(f"the service doesn't know {task_id}")
        except EvoLinkError as error:
            self._screen.complain(error)
            if isinstance(error, TaskError):
                self._running.pop(task_id, None)
                self._tell(error.task)
            self._code = max(self._code, 3 if stopped_by_account(error) else 1)
        else:
            self._running.pop(task_id, None)
            self._tell(task)

    async def _is_known(self, client: AsyncEvoLink, task_id: str) -> bool:
        """Whether there is such a task, which a wait that saw none cannot tell; so it is asked for once more."""
        if self._running[task_id] is None:
            try:
                await client.tasks.get(task_id, timeout=_LAST_LOOK)
            except (NotFoundError, BadRequestError):
                return False
            except EvoLinkError:
                pass  # nobody can say; if it is there it is paid for
        return True

    def _tell(self, task: Task) -> None:
        if self._as_json:
            self._standard.json(task_line(task))
        else:
            for url in task.urls:
                self._standard.line(url)

    def _sentence(self) -> str:
        ended = len(self._ids) - len(self._running)
        if len(self._ids) == 1:
            task = next(iter(self._running.values()), None)
            return "waiting" if task is None else f"{task.status}, {task.progress} %"
        return f"{ended:,} of {len(self._ids):,} ended"

    def _picture(self) -> Text:
        lines = [self._sentence()] if len(self._ids) > 1 else []
        seen = [(task_id, task) for task_id, task in self._running.items()][:5]
        for task_id, task in seen:
            lines.append(f"{task_id}: " + ("waiting" if task is None else f"{clean(task.status)}, {task.progress} %"))
        return Text("\n".join(lines) or " ", style="cyan")


def _ids(arguments: Iterable[str], *, unfinished: bool) -> list[str]:
    """The ids, each once; `@FILE` stands for those in a file that a command wrote, or that has one on each line."""
    ids: dict[str, None] = {}
    for argument in arguments:
        if argument.startswith("@"):
            ids.update(dict.fromkeys(_ids_in(argument[1:], unfinished=unfinished)))
        else:
            ids[argument] = None
    if not ids:
        raise BadInput("no task ids there" + (" that are unfinished" if unfinished else ""))
    return list(ids)


def _opened(name: str) -> AbstractContextManager[IO[bytes]]:
    """The file, or standard input for `-`."""
    if name != "-":
        return open(name, "rb")
    if sys.stdin is None or sys.stdin.closed:
        raise BadInput("standard input is closed; give a file")
    return nullcontext(sys.stdin.buffer)


_MAY_GO_ON = ("unfinished", "lost", "pending", "processing")


def _ids_in(name: str, *, unfinished: bool) -> list[str]:
    ids: list[str] = []
    try:
        with _opened(name) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if not line.lstrip().startswith(b"{"):  # a bare id
                    ids.append(line.decode(errors="replace").strip())
                    continue
                try:
                    row = from_json(line, allow_inf_nan=False)
                except ValueError:
                    raise BadInput(f"{name}, line {number} is not JSON") from None
                about = row.get("error") or row if isinstance(row, dict) else {}
                task_id = about.get("task_id")
                if isinstance(task_id, str) and (not unfinished or about.get("status") in _MAY_GO_ON):
                    ids.append(task_id)
    except OSError as error:
        raise BadInput(f"cannot read {name}: {error.strerror or error}") from None
    return ids


# Credits


def show_credits(screen: Screen, settings: Settings, *, as_json: bool) -> int:
    """The account's and the key's credits."""

    async def work(client: AsyncEvoLink) -> Any:
        return await client.credits()

    found = _asked(screen, settings, work)
    standard = Standard()
    if as_json:
        user, key = found.user, found.key
        standard.json(
            {
                "user": {"remaining": float(user.remaining), "used": float(user.used)},
                "key": {"remaining": float(key.remaining), "used": float(key.used), "unlimited": key.unlimited},
            }
        )
        return 0
    of_key = "unlimited" if found.key.unlimited else f"{amount(found.key.remaining)} credits left"
    standard.line(f"account: {amount(found.user.remaining)} credits left, {amount(found.user.used)} used")
    standard.line(f"this key: {of_key}, {amount(found.key.used)} used")
    return 0


def _asked(screen: Screen, settings: Settings, work: Callable[[AsyncEvoLink], Coroutine[Any, Any, T]]) -> T:
    """The answer to a question that costs nothing, so that Ctrl-C may just end it."""
    client = settings.client()

    async def asked() -> T:
        hint = f"no answer yet, trying for {duration(_QUESTION)} in all; Ctrl-C ends it"
        saying = asyncio.get_running_loop().call_later(_SILENCE, partial(screen.say, hint, style="yellow"))
        try:
            async with client:
                return await work(client)
        finally:
            saying.cancel()

    return asyncio.run(asked())
