"""The observer that makes OpenTelemetry spans and metrics.

The names that begin with `gen_ai.` are OpenTelemetry's conventions for generative AI, which are still in development
and moved to a repository of their own; so they are spelt here. Those that begin with `evolink.` are ours.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from opentelemetry import context, metrics, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode

from evolink_async._version import __version__
from evolink_async.errors import APIStatusError, EvoLinkError, TaskLostError
from evolink_async.http.answers import Answer, Judgement
from evolink_async.http.observer import End, Observer, Submission
from evolink_async.polling.endings import is_over
from evolink_async.requests import GenerationRequest
from evolink_async.types import Task, TaskReading, TaskStatus

logger = logging.getLogger("evolink_async.telemetry")

OPERATION = "generate_content"
PROVIDER = "evolink"
OTHER = "_OTHER"
SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200, 1800, 3600)  # tasks take these

_LONGEST = 128  # characters of an attribute
_LONGEST_PROMPT = 1000
_MOST_NAMES = 200  # models, and kinds of errors, that metrics tell apart
_MOST_OPEN = 100_000  # spans of tasks
_REMEMBERED = 10_000  # ended spans that the span of a later wait may link to
_MOST_EVENTS = 32  # of one span; the attributes tell the rest
_OUTPUT = {"image": "image", "video": "video", "audio": "speech"}

_Method = TypeVar("_Method", bound=Callable[..., None])

clock = time.monotonic


@dataclass(slots=True, eq=False)
class _Open:
    """A span that goes on."""

    span: Span
    model: str
    submitted: float | None  # by `clock`; None: by another process
    continuous: bool  # watched ever since
    queued: float = 0.0
    posts: int = 0
    polls: int = 0
    events: int = 0
    running: bool = False  # a look found it so
    status: str = ""
    reserved: float = 0.0
    task: bool = False  # it was accepted
    followed: bool = False


@dataclass(slots=True)
class _Ended:
    """What a later span of the same task should know."""

    context: SpanContext
    model: str
    submitted: float | None
    reserved: float


@dataclass(slots=True)
class _Names:
    """The first names that come, and one for all others: what a program makes up does not flood the metrics."""

    known: set[str] = field(default_factory=set)

    def bounded(self, name: str) -> str:
        name = name[:_LONGEST]
        if name not in self.known:
            if len(self.known) >= _MOST_NAMES:
                return OTHER
            self.known.add(name)
        return name


def _careful(method: _Method) -> _Method:
    """Telemetry that fails, or an exporter, costs nobody a task: it is logged and goes on."""

    @functools.wraps(method)
    def careful(self: Telemetry, *args: Any) -> None:
        try:
            method(self, *args)
        except Exception:
            if not self.failed:
                logger.exception(
                    "telemetry failed; further failures are not logged", extra={"event": "telemetry_failed"}
                )
            self.failed = True

    return careful  # type: ignore[return-value]


class Telemetry(Observer):
    """Spans and metrics of one client."""

    def __init__(
        self,
        base_url: str,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        *,
        capture_prompts: bool = False,
    ) -> None:
        self._tracer = trace.get_tracer("evolink_async", __version__, tracer_provider)
        self._metrics = _Metrics(metrics.get_meter("evolink_async", __version__, meter_provider))
        self._capture_prompts = capture_prompts
        server = urlsplit(base_url)
        self._server: dict[str, Any] = {
            "server.address": server.hostname or "",
            "server.port": server.port or (443 if server.scheme == "https" else 80),
        }
        self._models, self._errors = _Names(), _Names()
        self._pools: WeakKeyDictionary[Any, Context] = WeakKeyDictionary()
        self._submissions: dict[Submission, _Open] = {}
        self._tasks: OrderedDict[str, _Open] = OrderedDict()
        self._ended: OrderedDict[str, _Ended] = OrderedDict()
        self.failed = False

    # Submitting

    @_careful
    def pool_entered(self, party: Hashable) -> None:
        self._pools[party] = context.get_current()

    @_careful
    def queued(self, submission: Submission) -> None:
        known = self._submissions.get(submission)
        if known is None:
            known = self._submissions[submission] = self._begin(submission.request, submission.party)
        known.queued = clock()

    @_careful
    def begun(self, submission: Submission) -> None:
        known = self._submissions.get(submission)
        if known is not None:
            self._metrics.wait.record(clock() - known.queued, self._labels(known.model))

    @_careful
    def answered(self, submission: Submission, judgement: Judgement) -> None:
        model = submission.request.model
        labels = self._labels(model) | {"evolink.verdict": judgement.verdict.value}
        if judgement.error is not None:
            labels["error.type"] = self._errors.bounded(_kind_of(judgement.error))
        self._metrics.posts.add(1, labels)
        known = self._submissions.get(submission)
        if known is not None:
            known.posts += 1
            _add_event(known, "evolink.post", {"evolink.verdict": judgement.verdict.value})

    @_careful
    def settled(self, submission: Submission, end: End) -> None:
        known = self._submissions.pop(submission, None)
        if known is None:
            return
        known.span.set_attribute("http.request.resend_count", max(0, known.posts - 1))
        if end.task is None:
            if end.ending == "deferred":
                known.span.set_attribute("evolink.status", "deferred")  # it is queued again later, in another span
                known.span.end()
            else:
                self._end(known, end.ending, end.error)
            return
        known.reserved = float(end.task.credits_reserved or 0)
        self._open(end.task.id, known)
        if end.task.is_terminal and is_over(end.task.task):
            self._conclude(end.task.task)

    def _begin(self, request: GenerationRequest, party: Hashable) -> _Open:
        parent = self._pools.get(party) if not isinstance(party, str) else None
        attributes = self._attributes(request.model) | {"gen_ai.output.type": _OUTPUT.get(request.kind, request.kind)}
        params = request.params()
        for name, value in (
            ("gen_ai.request.choice.count", params.get("n")),
            ("gen_ai.request.seed", params.get("seed")),
        ):
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
                attributes[name] = value
        prompt = params.get("prompt")
        if self._capture_prompts and isinstance(prompt, str):
            attributes["evolink.prompt"] = prompt[:_LONGEST_PROMPT]
        return _Open(self._start(request.model, attributes, parent), request.model, clock(), continuous=True)

    # Watching

    @_careful
    def followed(self, task: TaskReading) -> None:
        known = self._tasks.get(task.id)
        if known is None:
            before = self._ended.pop(task.id, None)
            links = [] if before is None else [Link(before.context)]
            model = task.model or ("" if before is None else before.model)
            span = self._start(model, self._attributes(model), None, links)
            known = _Open(span, model, None if before is None else before.submitted, continuous=False)
            known.reserved = float(task.credits_reserved or 0) or (0.0 if before is None else before.reserved)
            self._open(task.id, known)
        known.followed = True

    @_careful
    def looked(self, task_ids: Sequence[str], answer: Answer | EvoLinkError) -> None:
        labels = {"gen_ai.provider.name": PROVIDER}
        if not isinstance(answer, Answer):
            labels["error.type"] = self._errors.bounded(_kind_of(answer))
        elif answer.status >= 300:
            labels["error.type"] = str(answer.status)
        self._metrics.requests.add(1, labels)
        counts: dict[str, int] = {}
        for task_id in task_ids:
            known = self._tasks.get(task_id)
            if known is not None:
                known.polls += 1
                counts[known.model] = counts.get(known.model, 0) + 1
        for model, count in counts.items():
            self._metrics.polls.add(count, self._labels(model))

    @_careful
    def seen(self, reading: TaskReading) -> None:
        known = self._tasks.get(reading.id)
        if known is None:
            return
        known.running = known.running or not reading.is_terminal
        if reading.status != known.status:  # no event for every look
            known.status = reading.status
            status = str(reading.status)[:_LONGEST]
            _add_event(known, "evolink.status", {"evolink.status": status, "evolink.progress": reading.progress})

    @_careful
    def ended(self, task: Task) -> None:
        self._conclude(task)

    @_careful
    def lost(self, task_id: str, error: EvoLinkError) -> None:
        known = self._close(task_id)
        if known is not None:
            self._end(known, "lost" if isinstance(error, TaskLostError) else "unfinished", error)

    @_careful
    def left(self, task_id: str) -> None:
        known = self._close(task_id)
        if known is None:
            return
        if len(self._ended) >= _REMEMBERED:
            self._ended.popitem(last=False)
        submitted, reserved = known.submitted, known.reserved
        self._ended[task_id] = _Ended(known.span.get_span_context(), known.model, submitted, reserved)
        if known.followed:
            self._end(known, "unfinished", None)
        else:
            known.span.set_attribute("evolink.status", "submitted")
            known.span.end()

    # The rest

    @_careful
    def cooled(self, model: str, seconds: float) -> None:
        self._metrics.cool_down.record(seconds, self._labels(model))

    @_careful
    def downloaded(self, size: int) -> None:
        self._metrics.downloaded.add(size, {"gen_ai.provider.name": PROVIDER})

    @_careful
    def close(self) -> None:
        for task_id in list(self._tasks):
            self.left(task_id)
        for known in self._submissions.values():
            known.span.end()
        self._submissions.clear()

    # Inside

    def _labels(self, model: str) -> dict[str, str]:
        labels = {"gen_ai.operation.name": OPERATION, "gen_ai.provider.name": PROVIDER}
        if model:
            labels["gen_ai.request.model"] = self._models.bounded(model)
        return labels

    def _attributes(self, model: str) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": PROVIDER,
        } | self._server
        if model:
            attributes["gen_ai.request.model"] = model[:_LONGEST]
        return attributes

    def _start(
        self, model: str, attributes: dict[str, Any], parent: Context | None, links: Sequence[Link] = ()
    ) -> Span:
        name = f"{OPERATION} {model[:_LONGEST]}" if model else OPERATION
        return self._tracer.start_span(name, parent, SpanKind.CLIENT, attributes, links)

    def _open(self, task_id: str, known: _Open) -> None:
        known.task = True
        if task_id in self._tasks:  # the service may give two requests the same task
            known.span.set_attribute("gen_ai.response.id", task_id)
            known.span.end()
            return
        if len(self._tasks) >= _MOST_OPEN:
            self.left(next(iter(self._tasks)))
        known.span.set_attribute("gen_ai.response.id", task_id)
        self._tasks[task_id] = known
        labels = self._labels(known.model)
        self._metrics.active.add(1, labels)
        if known.reserved:
            self._metrics.reserved.add(known.reserved, labels)

    def _close(self, task_id: str) -> _Open | None:
        known = self._tasks.pop(task_id, None)
        if known is not None:
            labels = self._labels(known.model)
            self._metrics.active.add(-1, labels)
            if known.reserved:
                self._metrics.reserved.add(-known.reserved, labels)
        return known

    def _conclude(self, task: Task) -> None:
        known = self._close(task.id)
        if known is None:
            return
        if not known.model and task.model:
            known.model = task.model
            known.span.update_name(f"{OPERATION} {task.model[:_LONGEST]}")
        if task.model:
            known.span.set_attribute("gen_ai.response.model", task.model[:_LONGEST])
        error = None
        if not task.succeeded:
            code = "cancelled" if task.status == TaskStatus.CANCELLED else "unknown_error"
            error = EvoLinkError("", code=code if task.error is None else task.error.code)
        used = task.usage.credits_used
        if used is None:
            used = task.usage.credits_reserved
        spent = 0.0
        if task.succeeded:
            spent = known.reserved if used is None else float(used)
        elif task.status == TaskStatus.CANCELLED and task.usage.credits_used is not None:
            spent = float(task.usage.credits_used)
        known.span.set_attribute("evolink.credits.spent", spent)
        if spent:
            self._metrics.spent.add(spent, self._labels(known.model))
        # Of a task that nobody watched when it ended, nobody knows how long it took.
        if known.submitted is not None and (known.continuous or known.running):
            labels = self._labels(known.model) | self._server
            if error is not None:
                labels["error.type"] = self._errors.bounded(_kind_of(error))
            self._metrics.duration.record(clock() - known.submitted, labels)
        self._end(known, str(task.status), error)

    def _end(self, known: _Open, status: str, error: EvoLinkError | None) -> None:
        span = known.span
        self._metrics.outcomes.add(1, self._labels(known.model) | {"evolink.status": status})
        span.set_attribute("evolink.status", status)
        if known.task:
            span.set_attribute("evolink.poll.count", known.polls)
            span.set_attribute("evolink.credits.reserved", known.reserved)
        if error is not None:
            kind = _kind_of(error)[:_LONGEST]
            span.set_attribute("error.type", kind)
            span.set_status(Status(StatusCode.ERROR, kind))  # never the message, which may quote the prompt
        span.end()


class _Metrics:
    """The instruments."""

    def __init__(self, meter: metrics.Meter) -> None:
        def histogram(name: str, description: str) -> metrics.Histogram:
            return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=SECONDS)

        self.duration = histogram(
            "gen_ai.client.operation.duration", "From the submission of a task to our knowing that it ended"
        )
        self.wait = histogram(
            "evolink.ratelimit.wait", "What a request waited for its turn: the rate limit, the pace, cool-downs"
        )
        self.cool_down = histogram(
            "evolink.ratelimit.cooldown", "How long the service asked to be left alone; their count is the cool-downs'"
        )
        self.outcomes = meter.create_counter("evolink.outcomes", "{request}", "What became of requests")
        self.posts = meter.create_counter("evolink.posts", "{post}", "Paid POSTs, by what their answers meant")
        self.active = meter.create_up_down_counter("evolink.tasks.active", "{task}", "Accepted tasks that are watched")
        self.reserved = meter.create_up_down_counter(
            "evolink.credits.reserved", "{credit}", "Credits reserved for the tasks that are watched"
        )
        self.spent = meter.create_counter("evolink.credits.spent", "{credit}", "Credits charged for what ended")
        self.polls = meter.create_counter("evolink.poll.count", "{look}", "Looks at tasks")
        self.requests = meter.create_counter("evolink.poll.requests", "{request}", "Status requests; a batch is one")
        self.downloaded = meter.create_counter("evolink.download.bytes", "By", "Results that were fetched")


def _add_event(known: _Open, name: str, attributes: dict[str, Any]) -> None:
    known.events += 1
    if known.events <= _MOST_EVENTS:
        known.span.add_event(name, attributes)


def _kind_of(error: EvoLinkError) -> str:
    """The service's code, else the HTTP status, else the name of the error."""
    if error.code:
        return error.code
    if isinstance(error, APIStatusError):
        return str(error.status_code)
    return type(error).__name__
