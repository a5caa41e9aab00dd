"""A task and its fate. Pure: everything about a task is decided when it is accepted, and read off the time later.

So a task costs nothing while nobody looks at it: there are no timers.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .behaviour import Behaviour
from .models import Model, result_count

_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

CANCELLED = "request_cancelled"

# Documented failure codes: weight, message, and whether it shows late (a time-out cannot come early).
_FAILURES: tuple[tuple[str, int, str, bool], ...] = (
    ("service_error", 4, "The generation service had an internal error. Please try again later.", False),
    ("content_policy_violation", 3, "Content policy violation.\nThe request was blocked by moderation.", False),
    ("generation_timeout", 2, "The generation took too long and was stopped.", True),
    ("resource_exhausted", 1, "Resources are exhausted at the moment. Please try again later.", False),
)
FAILURE_MESSAGES = {
    **{code: message for code, _, message, _ in _FAILURES},
    CANCELLED: "The request was cancelled.",
    "invalid_parameters": "The parameters are not valid.",
    "image_processing_error": "The image could not be processed.",
    "image_dimension_mismatch": "The dimensions of the images do not match.",
    "generation_failed_no_content": "The generation brought no content.",
    "quota_exceeded": "Rate limit or quota exceeded.",
    "service_unavailable": "The service is not available at the moment.",
    "resource_not_found": "The resource was not found.",
    "unknown_error": "An unknown error occurred.",
}


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a task, in emulated seconds after it was accepted."""

    starts_after: float
    ends_after: float
    failure: str | None
    suffix: str  # the random end of the task's id
    produced: int  # how many results there are when it completes


@dataclass(slots=True, eq=False)
class Callback:
    """Where a task's end is to be told, and what came of it. Times on the service's clock."""

    url: str
    links_at: str
    attempts: list[tuple[float, str]] = field(default_factory=list)  # when, and the HTTP status or what went wrong
    delivered: bool = False


@dataclass(slots=True, eq=False)
class Task:
    """The service's record of one accepted request. Times are seconds on the service's clock, money micro-credits."""

    id: str
    model: Model
    created: float
    starts_at: float
    ends_at: float
    estimate: float  # real seconds, as told on the wire
    tells_estimate: bool
    progress_law: str
    failure: str | None
    end_status: str  # completed, failed or cancelled
    produced: int
    reserved: int
    digest: bytes  # what the media are drawn from
    body: Mapping[str, Any]  # the parameters that results depend on
    idempotency_key: str | None
    label: str = ""  # the beginning of the prompt
    callback: Callback | None = None
    charged: int = 0
    settled: bool = False
    polls: int = 0
    first_told_at: float | None = None

    def status(self, now: float) -> str:
        """pending, processing, or how it ended."""
        if now >= self.ends_at:
            return self.end_status
        return "pending" if now < self.starts_at else "processing"

    def progress(self, now: float) -> int:
        """0..100."""
        status = self.status(now)
        if status == "processing":
            share = (now - self.created) / (self.ends_at - self.created)
            return _progress(self.progress_law, share, (now - self.created) / self.estimate)
        return 100 if status == "completed" else 0


def _progress(law: str, share: float, through_estimate: float) -> int:
    """What a running task tells; ``share`` is the truth, from 0 to 1."""
    if law == "none":
        return 0
    if law == "linear":
        return min(99, int(100 * share))
    if law == "stairs":
        return min(80, int(5 * share) * 20)
    if law == "stuck":
        return min(90, int(300 * share))
    return min(95, int(100 * through_estimate))


def fingerprint(kind: str, params: Mapping[str, Any]) -> bytes:
    """Sixteen bytes that are equal for equal requests, in whatever order the parameters come."""
    text = json.dumps([kind, params], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def derive(seed: int, *parts: bytes | int | str) -> bytes:
    """Sixteen bytes decided by the seed and the parts, and by nothing else."""
    text = repr((seed, *parts)).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def decide(model: Model, body: Mapping[str, Any], behaviour: Behaviour, digest: bytes, failure_share: float) -> Fate:
    """The fate that this digest holds for a task of this model. ``failure_share`` is the emulator's."""
    chance = random.Random(digest)
    spread = chance.lognormvariate(0.0, behaviour.sigma)
    duration = (model.estimate if behaviour.estimate is None else behaviour.estimate) * behaviour.bias * spread
    starts = chance.uniform(0.02, 0.10)
    suffix = "".join(chance.choices(_ID_LETTERS, k=8))
    failing = failure_share if behaviour.failure_share is None else behaviour.failure_share
    fails, slow, cancelled, partial = (chance.random() for _ in range(4))
    if slow < behaviour.slow_share:
        duration *= behaviour.slow_factor
    wanted = result_count(model, body)
    if fails < failing:
        code, _, _, late = chance.choices(_FAILURES, [weight for _, weight, _, _ in _FAILURES])[0]
        late = late or chance.random() >= behaviour.early_share
        duration *= chance.uniform(0.8, 1.2) if late else chance.uniform(0.05, 0.30)
        return Fate(starts * duration, duration, code, suffix, 0)
    if cancelled < behaviour.cancelled_share:
        duration *= chance.uniform(0.05, 0.95)
        return Fate(starts * duration, duration, CANCELLED, suffix, 0)
    if wanted > 1 and partial < behaviour.partial_share:
        wanted = chance.randrange(1, wanted)
    return Fate(starts * duration, duration, None, suffix, wanted)


def settled_cost(task: Task) -> int:
    """What a task costs that ended: nothing unless it completed, and only the results that there are."""
    if task.failure is not None:
        return 0
    wanted = result_count(task.model, task.body)
    return task.reserved if task.produced == wanted else math.ceil(task.reserved * task.produced / wanted)
