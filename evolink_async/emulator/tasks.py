"""A task and its fate. Pure: everything about a task is decided when it is accepted, and read off the time later.

So a task costs nothing while nobody looks at it: there are no timers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .models import Model

_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

# Documented failure codes: weight, message, and whether it shows late (a time-out cannot come early).
_FAILURES: tuple[tuple[str, int, str, bool], ...] = (
    ("service_error", 4, "The generation service had an internal error. Please try again later.", False),
    ("content_policy_violation", 3, "Content policy violation.\nThe request was blocked by moderation.", False),
    ("generation_timeout", 2, "The generation took too long and was stopped.", True),
    ("resource_exhausted", 1, "Resources are exhausted at the moment. Please try again later.", False),
)
FAILURE_MESSAGES = {code: message for code, _, message, _ in _FAILURES}


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a task, in emulated seconds after it was accepted."""

    starts_after: float
    ends_after: float
    failure: str | None
    suffix: str  # the random end of the task's id


@dataclass(slots=True, eq=False)
class Task:
    """The service's record of one accepted request. Times are seconds on the service's clock, money micro-credits."""

    id: str
    model: Model
    created: float
    starts_at: float
    ends_at: float
    estimate: float  # real seconds, as told on the wire
    failure: str | None
    reserved: int
    digest: bytes  # what the media are drawn from
    body: Mapping[str, Any]  # the parameters that results depend on
    idempotency_key: str | None
    charged: int = 0
    settled: bool = False
    polls: int = 0
    first_told_at: float | None = None

    def status(self, now: float) -> str:
        """pending, processing, completed or failed."""
        if now >= self.ends_at:
            return "completed" if self.failure is None else "failed"
        return "pending" if now < self.starts_at else "processing"

    def progress(self, now: float) -> int:
        """0..100, computed from the estimate as gateways do it, so it knows nothing about the true end."""
        status = self.status(now)
        if status == "processing":
            return min(95, int(100 * (now - self.created) / self.estimate))
        return 100 if status == "completed" else 0


def fingerprint(kind: str, params: Mapping[str, Any]) -> bytes:
    """Sixteen bytes that are equal for equal requests, in whatever order the parameters come."""
    text = json.dumps([kind, params], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def derive(seed: int, *parts: bytes | int | str) -> bytes:
    """Sixteen bytes decided by the seed and the parts, and by nothing else."""
    text = repr((seed, *parts)).encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def decide(model: Model, digest: bytes, failure_share: float) -> Fate:
    """The fate that this digest holds for a task of this model."""
    chance = random.Random(digest)
    duration = model.estimate * chance.lognormvariate(-0.105, 0.25)  # median 0.9 of the estimate
    starts = duration * chance.uniform(0.02, 0.10)
    suffix = "".join(chance.choices(_ID_LETTERS, k=8))
    if chance.random() >= failure_share:
        return Fate(starts, duration, None, suffix)
    code, _, _, late = chance.choices(_FAILURES, [weight for _, weight, _, _ in _FAILURES])[0]
    late = late or chance.random() < 0.15
    share = chance.uniform(0.8, 1.2) if late else chance.uniform(0.05, 0.30)
    return Fate(min(starts, duration * share), duration * share, code, suffix)
