"""A service that keeps a book, and loses answers by a seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from small_pool import MODEL, Answer

from evolink_async.types import Task

PRICE = 3


@dataclass
class Charge:
    """One accepted POST."""

    name: str
    key: str
    task_id: str
    polls: int
    end: str


@dataclass
class BookService:
    """honours: whether a key that comes again gives the same task. faults: the chances of what may go wrong."""

    chance: random.Random
    honours: bool = True
    faults: dict[str, float] = field(default_factory=dict)
    book: list[Charge] = field(default_factory=list)
    reached: Any = lambda point: None

    def __post_init__(self) -> None:
        self.posts: Counter[str] = Counter()

    async def post(self, body: bytes, idempotency_key: str) -> Answer:
        self.reached("before post")
        answer = self._answer(json.loads(body)["prompt"], idempotency_key)
        self.reached("after post")
        return answer

    async def poll(self, task_id: str) -> Task | None:
        [charge] = [charge for charge in self.book if charge.task_id == task_id]
        charge.polls -= 1
        if charge.polls > 0:
            return Task(id=task_id, model=MODEL, status="processing")
        if charge.end == "lost":
            return None
        wire: dict[str, Any] = {"id": task_id, "model": MODEL, "status": charge.end}
        if charge.end == "failed":
            wire["error"] = {"code": "service_error", "message": "try again"}
        return Task.model_validate(wire)

    def _answer(self, name: str, key: str) -> Answer:
        if self._happens("unsent"):
            return Answer("unsent")
        self.posts[key] += 1
        if self._happens("rate_limited"):
            return Answer("rate_limited")
        if self._happens("lost_before"):
            return Answer("lost")
        known = [charge for charge in self.book if charge.key == key]
        if not known and self._happens("refused"):
            return Answer("refused")
        replayed = bool(known) and self.honours
        if not replayed:
            self.book.append(Charge(name, key, f"task-{len(self.book)}", self.chance.randrange(1, 4), self._end()))
            if self.honours and self._happens("in_progress"):
                return Answer("in_progress")
            known = [self.book[-1]]
        if self._happens("lost_after"):
            return Answer("lost")
        wire = {"id": known[0].task_id, "model": MODEL, "status": "pending", "usage": {"credits_reserved": PRICE}}
        return Answer("accepted", Task.model_validate(wire), replayed)

    def _end(self) -> str:
        for end in ("failed", "cancelled", "lost"):
            if self._happens(end):
                return end
        return "completed"

    def _happens(self, what: str) -> bool:
        return self.chance.random() < self.faults.get(what, 0)
