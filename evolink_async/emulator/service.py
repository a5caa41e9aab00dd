"""The emulated service: tasks, money, limits, idempotency. No I/O; the time is passed in, in real seconds.

There is one clock, the one of the wire. The emulated world runs ``speed`` times faster: every emulated duration is
divided by ``speed`` where it enters, here.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .account import Account
from .answers import Json, Refusal, credits_body, credits_of, extension, invalid, listed_task, polled_task
from .limits import TokenBucket
from .models import Model, all_models, price, result_count
from .rules import check
from .tasks import Fate, Task, decide, derive, fingerprint

RESULT_LIFETIME = 24 * 3600.0  # emulated seconds that a result link lives
BATCH_LIMIT = 50
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
    ) -> None:
        self.account = Account(credits)
        self.speed = speed
        self._seed = seed
        self._bucket = None if rate is None else TokenBucket(rate, burst)
        self._concurrency = concurrency
        self._failure_share = failure_share
        self._idempotency = idempotency
        self._tasks: dict[str, Task] = {}
        self._unfinished: list[tuple[float, int, Task]] = []  # a heap: who ends next
        self._keys: dict[str, _Key] = {}
        self._seen: Counter[bytes] = Counter()  # how often a request was accepted
        self.refused: Counter[tuple[int, str]] = Counter()
        self.replays = 0
        self.status_reads = 0

    # --- submitting -------------------------------------------------------------------------------------------

    def submit(self, kind: str, body: object, key: str | None, now: float) -> Accepted | Refusal:
        """Take one submission. Refused ones cost nothing and leave no trace but a count."""
        self.settle(now)
        answer = self._submit(kind, body, key, now)
        if isinstance(answer, Refusal):
            self.refuse(answer)
        elif answer.replayed:
            self.replays += 1
        return answer

    def refuse(self, refusal: Refusal) -> None:
        """Count a submission that was refused."""
        self.refused[refusal.status, refusal.code] += 1

    def _submit(self, kind: str, body: object, key: str | None, now: float) -> Accepted | Refusal:
        # The gateway's limiter stands before everything that reads the body, so it counts replays too.
        wait = 0.0 if self._bucket is None else self._bucket.take(now)
        if wait > 0:
            return _too_many("Rate limit exceeded, please slow down.", wait)
        request = check(kind, body)
        if isinstance(request, Refusal):
            return request
        model, params = request
        digest = fingerprint(kind, params)
        known = self._keys.get(key) if key and self._idempotency else None
        if known is not None:
            if known.request != digest:
                return Refusal(409, "idempotency_conflict", "This Idempotency-Key was used with another body.")
            return Accepted(known.task, replayed=True)
        if self._concurrency is not None and len(self._unfinished) >= self._concurrency:
            wait = self._unfinished[0][0] - now if self._unfinished else 1.0
            return _too_many("Too many concurrent tasks, please wait until some are finished.", wait)
        cost = price(model, params)
        if not self.account.reserve(cost):
            message = f"Insufficient credits: {credits_of(cost)} needed, {credits_of(self.account.remaining)} left."
            return Refusal(402, "insufficient_quota", message, "insufficient_quota")
        task = self._accept(model, params, digest, key, cost, now)
        if key and self._idempotency:
            self._keys[key] = _Key(digest, task)
        return Accepted(task)

    def _accept(
        self, model: Model, params: Mapping[str, Any], request: bytes, key: str | None, cost: int, now: float
    ) -> Task:
        if "callback_url" in params:  # where the news goes changes nothing about the task
            request = fingerprint(model.kind, {name: params[name] for name in params if name != "callback_url"})
        # The n-th equal request has the same fate in every run, whatever else is going on.
        self._seen[request] += 1
        digest = derive(self._seed, request, self._seen[request])
        fate = decide(model, digest, self._failure_share)
        task = Task(
            id=self._free_id(fate, now),
            model=model,
            created=now,
            starts_at=now + fate.starts_after / self.speed,
            ends_at=now + fate.ends_after / self.speed,
            estimate=max(1.0, round(model.estimate / self.speed)),
            failure=fate.failure,
            reserved=cost,
            digest=digest,
            body={name: params[name] for name in _KEPT_FOR_RESULTS if name in params and name in model.params},
            idempotency_key=key,
        )
        self._tasks[task.id] = task
        heapq.heappush(self._unfinished, (task.ends_at, len(self._tasks), task))
        return task

    def _free_id(self, fate: Fate, now: float) -> str:
        stem = f"task-unified-{int(now)}-{fate.suffix}"
        name, count = stem, 0
        while name in self._tasks:
            count += 1
            name = f"{stem}{count}"
        return name

    def settle(self, now: float) -> None:
        """Finish every task whose time has come: charge the completed, release the failed."""
        while self._unfinished and self._unfinished[0][0] <= now:
            task = heapq.heappop(self._unfinished)[2]
            task.settled = True
            if task.failure is None:
                task.charged = task.reserved
            self.account.charge(task.reserved, task.charged)

    # --- reading ----------------------------------------------------------------------------------------------

    def model_of(self, task_id: str) -> str | None:
        """The model of a task, if there is such a task."""
        task = self._tasks.get(task_id)
        return None if task is None else task.model.id

    def read(self, task_id: str, now: float, links_at: str) -> Json | Refusal:
        """One poll."""
        if not task_id.startswith("task-unified-"):
            message = "Invalid task id: it must start with 'task-unified-'."
            return invalid(message, "task_id", code="invalid_task_id")
        task = self._tasks.get(task_id)
        if task is None:
            return Refusal(404, "task_not_found", f"Task {task_id} was not found.")
        return self._read(task, now, links_at)

    def read_batch(self, ids: object, now: float, links_at: str) -> Json | Refusal:
        """Up to 50 polls at once; ids that are not there are left out."""
        if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
            return invalid("task_ids must be a list of task ids.", "task_ids")
        if not 1 <= len(ids) <= BATCH_LIMIT:
            return invalid(f"task_ids must hold 1 to {BATCH_LIMIT} ids.", "task_ids")
        found = [task for name in dict.fromkeys(ids) if (task := self._tasks.get(name)) is not None]
        return {"data": [self._read(task, now, links_at) for task in found]}

    def _read(self, task: Task, now: float, links_at: str) -> Json:
        self.status_reads += 1
        if now < task.ends_at:
            task.polls += 1
        else:
            self._told(task, now)
        return polled_task(task, now, links_at)

    def _told(self, task: Task, now: float) -> None:
        if task.first_told_at is None:
            task.first_told_at = now

    def list_tasks(self, query: Mapping[str, str], now: float) -> Json | Refusal:
        """The account's tasks, newest first."""
        self.settle(now)
        page = _whole(query.get("page", "1"), 1, 10**9)
        size = _whole(query.get("page_size", "20"), 1, 50)
        if page is None:
            return invalid("page must be a positive integer.", "page")
        if size is None:
            return invalid("page_size must be between 1 and 50.", "page_size")
        wanted = query.get("status")
        if wanted not in (None, "processing", "completed", "failed", "cancelled"):
            return invalid("status must be processing, completed, failed or cancelled.", "status")
        matching = [task for task in reversed(self._tasks.values()) if _selected(task, query, wanted, now)]
        shown = list(islice(matching, (page - 1) * size, page * size))
        for task in shown:
            if task.settled:
                self._told(task, now)
        rows = [listed_task(task, now) for task in shown]
        return {"data": rows, "total": len(matching), "page": page, "page_size": size}

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
        if not number.isdecimal() or not 1 <= int(number) <= result_count(task.model, task.body):
            return None
        known = {extension(task)} | ({"png", "mp4"} if task.model.kind == "audio" else set())
        return (task, int(number), ending) if ending in known else None

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
            "posts": [_booked(task, now) for task in self._tasks.values()],
            "refused": refused,
            "replays": self.replays,
            "status_reads": self.status_reads,
        }


def _booked(task: Task, now: float) -> Json:
    return {
        "idempotency_key": task.idempotency_key,
        "task_id": task.id,
        "model": task.model.id,
        "kind": task.model.kind,
        "time": task.created,
        "reserved": credits_of(task.reserved),
        "charged": credits_of(task.charged),
        "status": task.status(now),
        "polls": task.polls,
        "finished_at": task.ends_at if task.settled else None,
        "first_told_at": task.first_told_at,
    }


def _too_many(message: str, wait: float) -> Refusal:
    return Refusal(429, "rate_limit_exceeded", message, "rate_limit_error", wait=wait)


def _selected(task: Task, query: Mapping[str, str], wanted: str | None, now: float) -> bool:
    if query.get("type") not in (None, task.model.kind) or query.get("model") not in (None, task.model.id):
        return False
    if wanted is None:
        return True
    status = task.status(now)
    return ("processing" if status == "pending" else status) == wanted


def _whole(text: str, low: int, high: int) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 12 and low <= int(text) <= high else None
