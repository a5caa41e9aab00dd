"""`run --dry-run`: what a run would do, what that may cost and how long it may take. Nothing is sent or written."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evolink_async.catalog import get_model
from evolink_async.cli.outputs import as_number
from evolink_async.cli.text import amount, clean, counted, readable, shortened
from evolink_async.durations import duration
from evolink_async.http.model_pace import START_RATE
from evolink_async.ledger import Entered, LedgerJob, Row, State, Todo, open_ledger, what_to_do
from evolink_async.ledger.values import counted_identity
from evolink_async.polling.schedule import USUAL
from evolink_async.pool.identity import content_hash
from evolink_async.pool.pricing import price_class
from evolink_async.requests import GenerationRequest, has_local_files, local_files
from evolink_async.saving.files import named
from evolink_async.saving.upload import SourceFile

if TYPE_CHECKING:
    from evolink_async.cli.inputs import Report
    from evolink_async.cli.view import Screen

JOB = "default"  # the one that `run` makes
MODELS_NAMED = 3
_AT_ONCE = 500  # requests in one question to the ledger

Basis = Literal["ledger", "catalogue", "usual"]
_BASIS = {"ledger": "as in earlier runs", "catalogue": "as documented", "usual": "our guess"}


@dataclass(slots=True)
class ModelPlan:
    """The requests of one model. seconds: what a task takes, and where that is from. credits: of those with a price."""

    kind: str
    model: str
    seconds: float
    basis: Basis
    requests: int = 0
    to_send: int = 0
    priced: int = 0
    credits: Decimal = Decimal(0)

    @property
    def unpriced(self) -> int:
        """How many would be sent at a price that nobody has told."""
        return self.to_send - self.priced


@dataclass(slots=True)
class Plan:
    """What a run would do.

    todo: what is done with how many requests. retried: of those to submit, failed before. delivered: states of those
    whose outcome the ledger has. spent, reserved: by earlier runs. running: the process that runs the job now.
    """

    per_second: float | None
    max_outstanding: int
    max_credits: Decimal | None
    models: dict[tuple[str, str], ModelPlan] = field(default_factory=dict)
    todo: Counter[Todo] = field(default_factory=Counter)
    retried: int = 0
    delivered: Counter[State] = field(default_factory=Counter)
    first_unpriced: int | None = None  # how many requests come before the first of those without a price
    earlier_runs: int = 0
    spent: Decimal = Decimal(0)
    reserved: Decimal = Decimal(0)
    running: str | None = None

    @property
    def to_send(self) -> int:
        """Requests that would be sent and paid for."""
        return self.todo[Todo.SUBMIT]

    @property
    def unpriced(self) -> int:
        """Those of them whose price nobody has told."""
        return sum(model.unpriced for model in self.models.values())

    @property
    def credits(self) -> Decimal | None:
        """What those with a known price cost; None: none has one."""
        if self.to_send and self.unpriced == self.to_send:
            return None
        return sum((model.credits for model in self.models.values()), Decimal(0))

    @property
    def left(self) -> Decimal | None:
        """What the budget leaves over after that, below 0 if it does not do; None: there is no budget."""
        if self.max_credits is None:
            return None
        return self.max_credits - self.spent - self.reserved - (self.credits or 0)

    @property
    def enough(self) -> bool | None:
        """Whether the budget does for all of it; None: that can't be told."""
        if self.left is None or (self.unpriced and self.left >= 0):
            return None
        return self.left >= 0

    @property
    def sending(self) -> float:
        """Seconds to send it all, as far as the pace decides."""
        if self.per_second is not None:
            return self.to_send / self.per_second
        return max((model.to_send / START_RATE for model in self.models.values()), default=0.0)

    @property
    def seconds(self) -> float:
        """About how long the run takes: the pace, or the places for outstanding tasks, and the last task."""
        sent = [model for model in self.models.values() if model.to_send]
        if not sent:
            return 0.0
        places = sum(model.to_send * model.seconds for model in sent) / self.max_outstanding
        last = max(model.seconds for model in sent)
        return max(self.sending, places - last) + last


@dataclass(frozen=True, slots=True)
class Experience:
    """What earlier runs have told: credits by price class, seconds by model."""

    prices: Mapping[str, Decimal] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def taken_by(self, kind: str, model: str) -> tuple[float, Basis]:
        """Seconds that a task takes, and who says so."""
        if model in self.seconds:
            return self.seconds[model], "ledger"
        known = get_model(model)
        if known is not None and known.estimated_time is not None:
            return float(known.estimated_time), "catalogue"
        return USUAL[kind], "usual"


def decide(request: GenerationRequest, content: bytes, row: Row | None, retry_failed: int) -> Todo:
    """What a run would do with a request of which the ledger knows this."""
    if row is None:
        return Todo.SUBMIT
    return what_to_do(Entered(row, changed=row.paid_for and row.content != content), retry_failed=retry_failed)


def note(plan: Plan, experience: Experience, request: GenerationRequest, todo: Todo, row: Row | None = None) -> None:
    """Add a request to the plan."""
    kind, name = request.kind, request.model
    model = plan.models.get((kind, name))
    if model is None:
        model = plan.models[kind, name] = ModelPlan(kind, name, *experience.taken_by(kind, name))
    before = plan.todo.total()
    plan.todo[todo] += 1
    model.requests += 1
    if todo is Todo.SUBMIT:
        model.to_send += 1
        plan.retried += row is not None and row.state is State.FAILED
        price = experience.prices.get(price_class(request)) if experience.prices else None
        if price is not None:
            model.priced += 1
            model.credits += price
        elif plan.first_unpriced is None:
            plan.first_unpriced = before
    elif todo is Todo.DELIVER and row is not None:
        plan.delivered[row.state] += 1


def make_plan(
    plan: Plan,
    models: Mapping[tuple[str, str], int],
    requests: Iterable[GenerationRequest],
    ledger: Path | None,
    retry_failed: int,
) -> None:
    """Fill the plan in. ledger: of earlier runs, where there is one. Raises `LedgerError` if it can't be read.

    models: how many requests each has, which is enough where nothing is known of them.
    """
    if ledger is None or not ledger.exists() or not asyncio.run(_after_ledger(plan, requests, ledger, retry_failed)):
        for (kind, name), count in models.items():
            seconds, basis = Experience().taken_by(kind, name)
            plan.models[kind, name] = ModelPlan(kind, name, seconds, basis, requests=count, to_send=count)
            plan.todo[Todo.SUBMIT] += count


async def _after_ledger(plan: Plan, requests: Iterable[GenerationRequest], path: Path, retry_failed: int) -> bool:
    """False: the ledger knows nothing."""
    async with open_ledger(path) as ledger:
        if JOB not in await ledger.jobs():
            return False
        job = ledger.job(JOB)
        stats = await job.stats()
        plan.earlier_runs, plan.running = stats.runs, stats.in_use_by
        plan.spent, plan.reserved = stats.credits_spent, stats.credits_reserved
        experience = Experience(await job.prices(), await job.seconds_taken())
        seen: Counter[bytes] = Counter()
        coming = iter(requests)
        while some := list(islice(coming, _AT_ONCE)):
            await _look_up(plan, experience, job, some, seen, retry_failed)
    return True


async def _look_up(
    plan: Plan,
    experience: Experience,
    job: LedgerJob,
    requests: Iterable[GenerationRequest],
    seen: Counter[bytes],
    retry_failed: int,
) -> None:
    """Plan some requests after what the ledger knows. seen: how often each content came without a key so far."""
    named: list[tuple[str, bytes, GenerationRequest]] = []
    for request in requests:
        content = _content(request)
        identity = request.key
        if identity is None:
            identity = counted_identity(content, seen[content])
            seen[content] += 1
        named.append((identity, content, request))
    rows = await job.find_many([identity for identity, _, _ in named])
    for identity, content, request in named:
        row = rows.get(identity)
        note(plan, experience, request, decide(request, content, row, retry_failed), row)


def _content(request: GenerationRequest) -> bytes:
    """The hash of its content, in which local files count by what is in them."""
    if not has_local_files(request):
        return content_hash(request)
    names: dict[str, str] = {}
    for place, file in local_files(request).items():
        with contextlib.closing(SourceFile(file)) as source:
            names[place] = named(source.look(None).digest)
    return content_hash(request, names)


# Telling


def tell_plan(screen: Screen, plan: Plan, name: str, report: Report, rate: str | None) -> None:
    """The plan in sentences."""
    screen.say(f"{name}: {counted(plan.to_send, 'request')} would be sent, nothing was", style="bold")
    models = [model for model in plan.models.values() if model.to_send]
    models.sort(key=lambda model: -model.to_send)
    width = max((len(f"{model.to_send:,}") for model in models), default=1)
    for model in models:
        screen.say(f"  {model.to_send:>{width},}  {clean(model.model)} ({model.kind}){_price(model)}")
    if report.bad_count:
        screen.say(f"  {counted(report.bad_count, 'bad line')} left out")
    for line in _known_lines(plan):
        screen.say(f"  {line}")
    if plan.running is not None:
        screen.say(f"a program runs this job now ({plan.running}), so this changes", style="yellow")
    if plan.to_send:
        _tell_cost(screen, plan)
        _tell_time(screen, plan, models, rate)


def _price(model: ModelPlan) -> str:
    if not model.priced:
        return ""
    if model.unpriced:
        return f": {amount(model.credits)} credits for {model.priced:,} of them"
    return f": {amount(model.credits)} credits"


def _known_lines(plan: Plan) -> list[str]:
    """What the ledger has of the others, and what a run does about it."""
    todo = plan.todo
    lines = []
    if plan.delivered:
        states = ", ".join(f"{count:,} {state}" for state, count in plan.delivered.most_common())
        lines.append(f"{counted(todo[Todo.DELIVER], 'request')} known from earlier runs, not paid again: {states}")
    if plan.retried:
        lines.append(f"{plan.retried:,} of those to be sent failed before and would be paid anew")
    if todo[Todo.FOLLOW]:
        lines.append(f"{counted(todo[Todo.FOLLOW], 'task')} submitted by earlier runs, followed until the end")
    if todo[Todo.SETTLE]:
        lines.append(
            f"{counted(todo[Todo.SETTLE], 'request')} sent without an answer: sent again under the same key where that "
            "is still allowed, 10 min after the first attempt at the latest; else unknown, not sent"
        )
    if todo[Todo.HOLD]:
        lines.append(f"{counted(todo[Todo.HOLD], 'request')} unknown, never sent again by itself")
    if todo[Todo.REFUSE]:
        lines.append(f"{counted(todo[Todo.REFUSE], 'request')} rejected: the ledger has another body under the key")
    return lines


def _tell_cost(screen: Screen, plan: Plan) -> None:
    if plan.credits is not None:
        of = "" if not plan.unpriced else f" for {plan.to_send - plan.unpriced:,} of them"
        screen.say(f"cost: about {amount(plan.credits)} credits{of}, by what the service reserved in earlier runs")
    if plan.unpriced:
        names = [clean(model.model) for model in plan.models.values() if model.unpriced]
        named = ", ".join(names[:MODELS_NAMED])
        if len(names) > MODELS_NAMED:
            named += f" and {counted(len(names) - MODELS_NAMED, 'other model')}"
        finds_out = "that of the first" if plan.unpriced > 1 else "this one"
        how = f"a run with --limit 1 finds out {finds_out}"
        if plan.first_unpriced:
            how = "a run of a file with one of each into the same folder finds out"
        screen.say(
            f"cost: unknown for {counted(plan.unpriced, 'request')} ({named}): EvoLink tells a price when it accepts a "
            f"request, and {how}",
            style="yellow",
        )
    if plan.max_credits is None:
        return
    held = f"{amount(plan.spent)} spent and {amount(plan.reserved)} reserved" if plan.earlier_runs else "nothing spent"
    budget = f"budget: {amount(plan.max_credits)} credits, {held} so far"
    if plan.enough:
        screen.say(f"{budget}: enough")
    elif plan.enough is None:
        screen.say(
            f"{budget}: whether that is enough the prices will tell; each that is unknown is tried by one request alone"
        )
    else:
        assert plan.left is not None
        screen.say(f"{budget}: {amount(-plan.left)} too few; a run stops there with exit code 3", style="yellow")


def _tell_time(screen: Screen, plan: Plan, models: list[ModelPlan], rate: str | None) -> None:
    if rate is not None:
        pace = f"{duration(plan.sending)} to send at {clean(rate.strip())}"
    else:
        pace = f"{duration(plan.sending)} to send at {START_RATE:g}/s for each model, where a run begins"
    slowest = max(models, key=lambda model: model.seconds)
    takes = f"{duration(slowest.seconds)} for one {clean(slowest.model)} ({_BASIS[slowest.basis]})"
    screen.say(f"time: about {_about(plan.seconds)}: {pace}, {takes}, {plan.max_outstanding:,} at once")


def _about(seconds: float) -> str:
    """A duration no finer than it is known."""
    if seconds < 60:
        return duration(max(1, math.ceil(seconds)))
    return duration(math.ceil(seconds / 10) * 10)


def plan_line(plan: Plan, name: str, report: Report, *, acceptable: bool) -> dict[str, Any]:
    """What --dry-run --json says; documented in docs/cli.md."""
    return {
        "file": readable(name),
        "acceptable": acceptable,
        "requests": report.requests,
        "bad_lines": report.bad_count,
        "bad": [{"line": entry.line, "reason": shortened(entry.reason, 500)} for entry in report.bad],
        "warnings": [
            {"line": report.warned_first[warning], "lines": lines, "warning": warning}
            for warning, lines in report.warnings.most_common()
        ],
        "models": [
            {
                "kind": model.kind,
                "model": model.model,
                "requests": model.requests,
                "to_send": model.to_send,
                "credits": as_number(model.credits) if model.priced or not model.to_send else None,
                "unpriced": model.unpriced,
                "seconds": round(model.seconds, 3),
                "seconds_from": model.basis,
            }
            for model in sorted(plan.models.values(), key=lambda model: -model.requests)
        ],
        "to_send": plan.to_send,
        "retried": plan.retried,
        "todo": {todo: plan.todo[todo] for todo in Todo if todo is not Todo.SHARE},
        "delivered": {state: plan.delivered[state] for state in plan.delivered},
        "credits": {
            "estimated": as_number(plan.credits),
            "unpriced": plan.unpriced,
            "spent": as_number(plan.spent),
            "reserved": as_number(plan.reserved),
            "max": as_number(plan.max_credits),
            "enough": plan.enough,
        },
        "seconds": {"estimated": round(plan.seconds, 1), "sending": round(plan.sending, 1)},
        "running": plan.running,
    }
