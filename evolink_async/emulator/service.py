"""The emulated service: tasks, money, limits, idempotency. No I/O; the time is passed in, in real seconds.

There is one clock, the one of the wire. The emulated world runs ``speed`` times faster: every emulated duration is
divided by ``speed`` where it enters, here.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .account import Account
from .answers import (
    CURRENT,
    Json,
    Refusal,
    credits_body,
    credits_of,
    extension,
    invalid,
    listed_task,
    polled_task,
    told_status,
)
from .behaviour import Behaviour, Behaviours, Dialect
from .limits import TokenBucket
from .models import Model, all_models, price, result_count
from .queries import LAST_PAGE, whole
from .rules import check
from .tasks import CANCELLED, Callback, Task, decide, derive, fingerprint, settled_cost

RESULT_LIFETIME = 24 * 3600.0  # emulated seconds that a result link lives
BILLING_DELAY = 0.5  # emulated seconds from a task's end to its callback: "after billing is confirmed"
BATCH_LIMIT = 50
_LABEL_LENGTH = 80  # characters of a prompt that the page shows
_NOTHING: Mapping[str, Any] = {}  # shared by all tasks that need no parameters
_KEPT_FOR_RESULTS = ("n", "size", "output_format", "duration", "title", "style", "preferred_name")


@dataclass(frozen=True, slots=True)
class Accepted:
    """A submission that became a task, now or (``replayed``) the first time it was sent."""

    task: Task
    replayed: bool = False


@dataclass(slots=True)
class _Key:
    """What an idempotency key stands for."""

    request: bytes
    task: Task
    in_progress: bool = False


class _Limits:
    """How fast and how many at once: of the account, or of one model."""

    def __init__(self, rate: float | None, burst: float | None, concurrency: int | None) -> None:
        self.bucket = None if rate is None else TokenBucket(rate, burst)
        self.concurrency = concurrency
        self.unfinished = 0

    def too_fast(self, now: float) -> float:
        """Seconds to wait, 0 when the submission may go on."""
        return 0.0 if self.bucket is None else self.bucket.take(now)

    @property
    def is_full(self) -> bool:
        return self.concurrency is not None and self.unfinished >= self.concurrency


class Service:
    """One account's view of EvoLink."""

    def __init__(
        self,
        *,
        speed: float = 1.0,
        seed: int = 0,
        rate: float | None = None,
        burst: float | None = None,
        concurrency: int | None = None,
        credits: int = 1_000_000_000_000,
        failure_share: float = 0.0,
        idempotency: bool = True,
        private_callbacks: bool = False,
        models: Mapping[str, Behaviour | Mapping[str, Any]] | None = None,
        dialect: Dialect = CURRENT,
    ) -> None:
        self.account = Account(credits)
        self.speed = speed
        self.dialect = dialect
        self._seed = seed
        self._limits = _Limits(rate, burst, concurrency)
        self._model_limits: dict[str, _Limits] = {}
        self._failure_share = failure_share
        self._idempotency = idempotency
        self.private_callbacks = private_callbacks
        self._behaviours = Behaviours(models or {})
        self._tasks: dict[str, Task] = {}
        self._unfinished: list[tuple[float, int, Task]] = []  # a heap: who ends next
        self._callbacks: list[tuple[float, int, Task]] = []  # a heap: whose callback is due next
        self._keys: dict[str, _Key] = {}
        self._seen: Counter[bytes] = Counter()  # how often a request was accepted
        self._pushed = 0  # counts entries of the heaps
        self.refused: Counter[tuple[int, str]] = Counter()
        self.replays = 0
        self.status_reads = 0

    # --- submitting -------------------------------------------------------------------------------------------

    def submit(self, kind: str, body: object, key: str | None, now: float, links_at: str = "") -> Accepted | Refusal:
        """Take one submission. Refused ones cost nothing and leave no trace but a count.

        ``links_at``: where the results are served, for the callback.
        """
        self.settle(now)
        answer = self._submit(kind, body, key, now, links_at)
        if isinstance(answer, Refusal):
            self.refuse(answer)
        elif answer.replayed:
            self.replays += 1
        return answer

    def refuse(self, refusal: Refusal) -> None:
        """Count a submission that was refused."""
        self.refused[refusal.status, refusal.code] += 1

    def _submit(self, kind: str, body: object, key: str | None, now: float, links_at: str) -> Accepted | Refusal:
        # The gateway's limiter stands before everything that reads the body, so it counts replays too.
        wait = self._limits.too_fast(now)
        if wait > 0:
            return _too_many("Rate limit exceeded, please slow down.", wait)
        request = check(kind, body, private_callbacks=self.private_callbacks, dialect=self.dialect)
        if isinstance(request, Refusal):
            return request
        model, params = request
        digest = fingerprint(kind, params)
        known = self._keys.get(key) if key and self._idempotency else None
        if known is not None:
            return _repeated(known, digest)
        refusal = self._refuse_for_limits(model, now)
        if refusal is not None:
            return refusal
        behaviour = self._behaviours.of(model.id, model.kind)
        cost = price(model, params, per_request=behaviour.price)
        if not self.account.reserve(cost):
            message = f"Insufficient credits: {credits_of(cost)} needed, {credits_of(self.account.remaining)} left."
            return Refusal(402, "insufficient_quota", message, "insufficient_quota")
        task = self._accept(model, params, behaviour, digest, key, cost, now, links_at)
        if key and self._idempotency:
            self._keys[key] = _Key(digest, task)
        return Accepted(task)

    def _refuse_for_limits(self, model: Model, now: float) -> Refusal | None:
        limits = self._limits_of(model)
        if self._limits.is_full or limits.is_full:
            wait = self._unfinished[0][0] - now if self._unfinished else 1.0
            return _too_many("Too many concurrent tasks, please wait until some are finished.", wait)
        wait = limits.too_fast(now)
        return _too_many(f"Rate limit of {model.id} exceeded, please slow down.", wait) if wait > 0 else None

    def _limits_of(self, model: Model) -> _Limits:
        limits = self._model_limits.get(model.id)
        if limits is None:
            chosen = self._behaviours.of(model.id, model.kind)
            limits = self._model_limits[model.id] = _Limits(chosen.rate, chosen.burst, chosen.concurrency)
        return limits

    def _accept(
        self,
        model: Model,
        params: Mapping[str, Any],
        behaviour: Behaviour,
        request: bytes,
        key: str | None,
        cost: int,
        now: float,
        links_at: str,
    ) -> Task:
        if "callback_url" in params:  # where the news goes changes nothing about the task
            request = fingerprint(model.kind, {name: params[name] for name in params if name != "callback_url"})
        # The n-th equal request has the same fate in every run, whatever else is going on.
        self._seen[request] += 1
        digest = derive(self._seed, request, self._seen[request])
        kept = {name: params[name] for name in _KEPT_FOR_RESULTS if name in params and name in model.params}
        fate = decide(model, kept, behaviour, digest, self._failure_share)
        estimate = model.estimate if behaviour.estimate is None else behaviour.estimate
        task = Task(
            id=self._free_id(fate.suffix, now),
            model=model,
            created=now,
            starts_at=now + fate.starts_after / self.speed,
            ends_at=now + fate.ends_after / self.speed,
            estimate=max(1.0, round(estimate / self.speed)),
            tells_estimate=behaviour.tells_estimate,
            progress_law=behaviour.progress,
            failure=fate.failure,
            end_status=_end_status(fate.failure),
            produced=fate.produced,
            reserved=cost,
            digest=digest,
            body=kept or _NOTHING,
            idempotency_key=key,
            label=str(params.get("prompt", ""))[:_LABEL_LENGTH],
            callback=Callback(params["callback_url"], links_at) if "callback_url" in params else None,
        )
        self._tasks[task.id] = task
        self._limits.unfinished += 1
        self._limits_of(model).unfinished += 1
        self._await_end(task)
        return task

    def _free_id(self, suffix: str, now: float) -> str:
        stem = f"task-unified-{int(now)}-{suffix}"
        name, count = stem, 0
        while name in self._tasks:
            count += 1
            name = f"{stem}{count}"
        return name

    def _await_end(self, task: Task) -> None:
        self._pushed += 1
        heapq.heappush(self._unfinished, (task.ends_at, self._pushed, task))
        if task.callback is not None:
            heapq.heappush(self._callbacks, (self._callback_at(task), self._pushed, task))

    def settle(self, now: float) -> None:
        """Finish every task whose time has come: charge the completed, release the others."""
        while self._unfinished and self._unfinished[0][0] <= now:
            ends_at, _, task = heapq.heappop(self._unfinished)
            if task.settled or ends_at != task.ends_at:  # it was ended before its time
                continue
            task.settled = True
            task.charged = settled_cost(task)
            self.account.charge(task.reserved, task.charged)
            self._limits.unfinished -= 1
            self._limits_of(task.model).unfinished -= 1

    def end(self, task_id: str, status: str, code: str | None, now: float) -> Task | Refusal:
        """Let a task that is not finished end now: completed, failed (with ``code``) or cancelled."""
        self.settle(now)
        task = self._tasks.get(task_id)
        if task is None:
            return Refusal(404, "task_not_found", f"Task {task_id} was not found.")
        if status not in ("completed", "failed", "cancelled"):
            return invalid("status must be completed, failed or cancelled.", "status")
        if task.settled:
            return Refusal(409, "task_finished", f"Task {task_id} is {told_status(task, now, self.dialect)} already.")
        task.failure = {"completed": None, "failed": code or "service_error", "cancelled": CANCELLED}[status]
        task.end_status = status
        task.produced = 0 if task.failure else result_count(task.model, task.body)
        task.ends_at, task.starts_at = now, min(task.starts_at, now)
        self._await_end(task)
        self.settle(now)
        return task

    # --- keys in progress, limits that change, callbacks ---------------------------------------------------------

    def hold_key(self, key: str, held: bool) -> None:
        """While a key is held, its first request counts as still in progress."""
        if key in self._keys:
            self._keys[key].in_progress = held

    def set_limits(self, rate: float | None, burst: float | None, concurrency: int | None) -> None:
        """Other limits for the account from now on; the tokens saved up are gone."""
        limits = _Limits(rate, burst, concurrency)
        limits.unfinished = self._limits.unfinished
        self._limits = limits

    def limits(self) -> Json:
        """The account's limits as they are now."""
        bucket = self._limits.bucket
        return {
            "rate": None if bucket is None else bucket.rate,
            "burst": None if bucket is None else bucket.burst,
            "concurrency": self._limits.concurrency,
        }

    def next_callback_at(self) -> float | None:
        """When the next callback may be due, None when none is to come."""
        return self._callbacks[0][0] if self._callbacks else None

    def due_callbacks(self, now: float) -> list[Task]:
        """The tasks whose end is to be told now; each is given once."""
        self.settle(now)
        due = []
        while self._callbacks and self._callbacks[0][0] <= now:
            at, _, task = heapq.heappop(self._callbacks)
            if at == self._callback_at(task):  # else it was ended before its time, and told then
                due.append(task)
        return due

    def callback_attempted(self, task_id: str, result: str, now: float) -> None:
        """Note an attempt to deliver a callback: the HTTP status as text, or what went wrong."""
        task = self._tasks.get(task_id)
        if task is None or task.callback is None:
            return
        task.callback.attempts.append((now, result))
        if result.startswith("2"):
            task.callback.delivered = True
            self.mark_told(task, now)

    def _callback_at(self, task: Task) -> float:
        return task.ends_at + BILLING_DELAY / self.speed

    # --- reading ----------------------------------------------------------------------------------------------

    def task(self, task_id: str) -> Task | None:
        """The record of a task."""
        return self._tasks.get(task_id)

    def newest(self, count: int) -> list[Task]:
        """The tasks accepted last, the newest first."""
        return list(islice(reversed(self._tasks.values()), count))

    @property
    def task_count(self) -> int:
        return len(self._tasks)

    @property
    def unfinished(self) -> int:
        return self._limits.unfinished

    def read(self, task_id: str, now: float, links_at: str) -> Json | Refusal:
        """One poll."""
        if not task_id.startswith("task-unified-"):
            message = "Invalid task id: it must start with 'task-unified-'."
            return invalid(message, "task_id", code="invalid_task_id")
        task = self._tasks.get(task_id)
        if task is None:
            return Refusal(404, "task_not_found", f"Task {task_id} was not found.")
        return self._read(task, now, links_at)

    def read_batch(self, ids: object, now: float, links_at: str, *, hidden: Collection[str] = ()) -> Json | Refusal:
        """Up to 50 polls at once; ids that are not there, and ``hidden`` ones, are left out."""
        if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
            return invalid("task_ids must be a list of task ids.", "task_ids")
        if not 1 <= len(ids) <= BATCH_LIMIT:
            return invalid(f"task_ids must hold 1 to {BATCH_LIMIT} ids.", "task_ids")
        wanted = (name for name in dict.fromkeys(ids) if name not in hidden)
        found = [task for name in wanted if (task := self._tasks.get(name)) is not None]
        return {"data": [self._read(task, now, links_at) for task in found]}

    def _read(self, task: Task, now: float, links_at: str) -> Json:
        self.settle(now)
        self.status_reads += 1
        if now < task.ends_at:
            task.polls += 1
        else:
            self.mark_told(task, now)
        return polled_task(task, now, links_at, self.dialect)

    def tell(self, task: Task, now: float, links_at: str) -> Json:
        """What a callback says: as a poll would, but it counts as none."""
        return polled_task(task, now, links_at, self.dialect)

    def mark_told(self, task: Task, now: float) -> None:
        """The caller knows now that the task has ended."""
        if task.first_told_at is None:
            task.first_told_at = now

    def list_tasks(self, query: Mapping[str, str], now: float) -> Json | Refusal:
        """The account's tasks, newest first."""
        self.settle(now)
        page = whole(query.get("page", "1"), 1, LAST_PAGE)
        size = whole(query.get("page_size", "20"), 1, 50)
        if page is None:
            return invalid("page must be a positive integer.", "page")
        if size is None:
            return invalid("page_size must be between 1 and 50.", "page_size")
        wanted = query.get("status")
        if wanted not in (None, "processing", "completed", "failed", "cancelled"):
            return invalid("status must be processing, completed, failed or cancelled.", "status")
        matching = [task for task in reversed(self._tasks.values()) if self._selected(task, query, wanted, now)]
        shown = list(islice(matching, (page - 1) * size, page * size))
        for task in shown:
            if task.settled:
                self.mark_told(task, now)
        rows = [listed_task(task, now, self.dialect) for task in shown]
        return {"data": rows, "total": len(matching), "page": page, "page_size": size}

    def _selected(self, task: Task, query: Mapping[str, str], wanted: str | None, now: float) -> bool:
        if query.get("type") not in (None, task.model.kind) or query.get("model") not in (None, task.model.id):
            return False
        if wanted is None:
            return True
        status = told_status(task, now, self.dialect)
        return ("processing" if status == "pending" else status) == wanted

    def credits(self, now: float) -> Json:
        """The answer of GET /v1/credits."""
        self.settle(now)
        return credits_body(self.account.remaining, self.account.spent)

    def models(self) -> Json:
        """The answer of GET /v1/models."""
        return {"data": [{"id": model.id} for model in all_models()]}

    def result(self, name: str, now: float) -> tuple[Task, int, str] | None:
        """Task, number (from 1) and extension of a result file, or None where there is none or no longer."""
        stem, _, ending = name.rpartition(".")
        task_id, _, number = stem.rpartition("-")
        task = self._tasks.get(task_id)
        if task is None or task.failure is not None or now < task.ends_at:
            return None
        if now >= task.ends_at + RESULT_LIFETIME / self.speed:
            return None
        index = whole(number, 1, task.produced)
        known = {extension(task)} | ({"png", "mp4"} if task.model.kind == "audio" else set())
        return None if index is None or ending not in known else (task, index, ending)

    # --- the ground truth -------------------------------------------------------------------------------------

    def book(self, now: float) -> Json:
        """Every accepted submission, every charge. Credits as numbers, times in unix seconds."""
        self.settle(now)
        account = self.account
        refused: dict[str, dict[str, int]] = {}
        for (status, code), count in self.refused.items():
            refused.setdefault(str(status), {})[code] = count
        return {
            "account": {
                "initial": credits_of(account.initial),
                "reserved": credits_of(account.reserved),
                "spent": credits_of(account.spent),
                "remaining": credits_of(account.remaining),
            },
            "posts": [self._booked(task, now) for task in self._tasks.values()],
            "refused": refused,
            "replays": self.replays,
            "status_reads": self.status_reads,
        }

    def _booked(self, task: Task, now: float) -> Json:
        entry: Json = {
            "idempotency_key": task.idempotency_key,
            "task_id": task.id,
            "model": task.model.id,
            "kind": task.model.kind,
            "time": task.created,
            "reserved": credits_of(task.reserved),
            "charged": credits_of(task.charged),
            "status": told_status(task, now, self.dialect),
            "polls": task.polls,
            "finished_at": task.ends_at if task.settled else None,
            "first_told_at": task.first_told_at,
        }
        if task.callback is not None:
            attempts = [{"time": at, "result": result} for at, result in task.callback.attempts]
            entry["callback"] = {"attempts": attempts, "delivered": task.callback.delivered}
        return entry


def _repeated(known: _Key, request: bytes) -> Accepted | Refusal:
    """What a key is answered that was used before. The statuses are our guess, the codes the vendor's client's."""
    if known.request != request:
        return Refusal(409, "idempotency_conflict", "This Idempotency-Key was used with another body.")
    if known.in_progress:
        return Refusal(409, "paid_outcome_unknown", "The first request with this Idempotency-Key is still in progress.")
    return Accepted(known.task, replayed=True)


def _end_status(failure: str | None) -> str:
    if failure is None:
        return "completed"
    return "cancelled" if failure == CANCELLED else "failed"


def _too_many(message: str, wait: float) -> Refusal:
    return Refusal(429, "rate_limit_exceeded", message, "rate_limit_error", wait=wait)
