"""Random lives of a job, from its first run to its last, judged by the service's book.

    python tests/simulation/lives.py [--seeds 2000] [--first 1] [--ledger file | postgresql] [--mutation NAME]

Client, pool and ledger live in one process with the emulator's core, on virtual time. A seed decides what goes wrong at
the service and on the wire, and where the program is killed: in front of or behind every commit of the ledger, every
request and every outcome. What a killed program does after that moment reaches neither disk nor wire. A connection to
PostgreSQL is lost besides, in front of or behind a commit. Then the same program runs again; in the last run nothing
goes wrong any more, and what came of it all is judged:

* no request has two tasks that are paid for, beyond what `on_lost_response` and `retry_failed` allow;
* no task that was paid for is unknown to the ledger, or the request is among the `unknown` ones;
* an id is on disk before anyone asks for it; one key is one request and the same bytes every time;
* never over the budget, never faster than the limit, nothing sent in a cool-down that the service asked for;
* every run gives every request one outcome, and an outcome that was handed over stays what it was;
* when faults cease the job ends in bounded time, and the ledger's credits are the book's, to the micro-credit.

`--mutation` breaks the code in a way that must be found: see MUTATIONS.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import httpx
import looptime
from loop_executor import InLoop
from postgres import Postgres, ask, is_postgres, running

from evolink_async import AsyncEvoLink, BudgetExceededError, ImageRequest, LedgerError, Outcome, clock, open_ledger
from evolink_async.emulator import Emulator, Fault
from evolink_async.http.submit import new_idempotency_key
from evolink_async.ledger import opening
from evolink_async.ledger.job import JobLedger
from evolink_async.ledger.store import JobStore
from evolink_async.ledger.values import MICRO
from evolink_async.polling import watcher
from evolink_async.pool import TaskPool
from evolink_async.pool.journal import Journal

API_KEY = "sk-simulation-0123456789abcdef"
MODEL = "gpt-4o-image"
PRICE = Decimal("2.5")
START = datetime(2026, 11, 20, 12, tzinfo=UTC)
LONGEST_CALM = 4 * 3600.0
POSTS: dict[str, Any] = {"method": "POST", "path": "/v1/images"}
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# What a life may come upon, and must, often enough, in many of them.
RARE = (
    *("killed before intend", "killed after intend", "killed before accepted", "killed after accepted"),
    *("killed before ended", "killed after ended", "killed before entered", "killed after entered"),
    *("killed before unsettled", "killed after unsettled", "killed before replaying", "killed after replaying"),
    *("killed before post", "killed after post", "killed before read", "killed after outcome"),
    *("replayed", "settled by a later run", "unknown at the end", "the user settled it", "held"),
    *("budget spent", "price tried alone", "429", "failed and tried again", "failed for good"),
    *("rejected", "lost response", "404 for a moment", "a run ended early", "keys not honoured", "paid twice"),
)
CUT = ("cut before a commit", "cut after a commit")  # connections to PostgreSQL


class Violation(AssertionError):
    """A promise that was not kept."""


def _now() -> float:
    return asyncio.get_running_loop().time()


class Process:
    """The program between its start and its end: once it is dead it reaches neither disk nor wire."""

    def __init__(self, life: Life, die_at: tuple[str, int] | None) -> None:
        self.life = life
        self.dead = False
        self._die_at = die_at
        self._reached: Counter[str] = Counter()
        self.main: asyncio.Task[Any] | None = None

    def reach(self, point: str) -> None:
        """A point at which it may die."""
        self._reached[point] += 1
        if not self.dead and self._die_at == (point, self._reached[point]):
            self.dead = True
            self.life.came_upon[f"killed {point}"] += 1
            assert self.main is not None
            asyncio.get_running_loop().call_soon(self.main.cancel)

    def check(self) -> None:
        if self.dead:
            raise OSError("this process is dead")


class Store(JobStore):
    """Commits at which the process may die. What it commits after its death is not written."""

    process: Process

    def __init__(self, database: Any, name: str) -> None:
        super().__init__(database, name)
        if self.process.life.cuts:
            database.transaction = functools.partial(self._cut, database, database.transaction)

    @contextlib.contextmanager
    def _cut(self, database: Any, transaction: Callable[[], Any]) -> Iterator[None]:
        """A transaction of a server to which the connection is lost now and then."""
        life, turn = self.process.life, self._turn
        with transaction():
            yield
            if turn and life.cut("before"):
                database._connection.close()
        if turn and life.cut("after"):
            database._connection.close()
            raise life.no_answer

    _turn = False

    def carry_out(self, batch: Any) -> Any:
        self.process.check()
        states = {_POINTS.get(row[6].value, row[6].value) for row in batch.rows}
        for state in sorted(states):
            self.process.reach(f"before {state}")
        self.process.check()
        self._turn = True
        result = super().carry_out(batch)
        for state in sorted(states):
            self.process.reach(f"after {state}")
        self.process.check()
        return result


_POINTS = {"sending": "intend", "completed": "ended", "failed": "ended", "cancelled": "ended"}


class Wire(httpx.AsyncBaseTransport):
    """Between the processes and the emulator; keeps what was sent."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.process: Process | None = None
        self.posts: list[dict[str, Any]] = []
        self._inner = httpx.ASGITransport(app=life.emulator.app)  # type: ignore[arg-type]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        process, is_post = self.process, request.url.path.endswith("/generations")
        assert process is not None
        kind = "post" if is_post else "read"
        process.reach(f"before {kind}")
        if process.dead:
            await asyncio.Event().wait()
        if is_post:
            return await self._post(request, process)
        self.life.expect_durable(request)
        response = await self._inner.handle_async_request(request)
        if response.status_code == 404 and request.method == "GET":
            self.life.came_upon["404 for a moment"] += 1
        return response

    async def _post(self, request: httpx.Request, process: Process) -> httpx.Response:
        post = {
            "key": request.headers["idempotency-key"],
            "name": json.loads(request.content)["prompt"],
            "body": request.content,
            "at": _now(),
            "process": process,
        }
        self.posts.append(post)
        self.life.expect_intended(post)
        response = await self._inner.handle_async_request(request)
        self.life.expect_within_budget()
        post["status"], post["answered"] = response.status_code, _now()
        if response.status_code == 429:
            self.life.came_upon["429"] += 1
            post["pause"] = float(response.headers.get("retry-after", 0))
        if response.headers.get("idempotency-replayed") == "true":
            self.life.came_upon["replayed"] += 1
        process.reach("after post")
        if process.dead:
            await asyncio.Event().wait()
        return response


class Life:
    """One job, all of its runs, and the judgement."""

    def __init__(self, seed: int, path: Path | str) -> None:
        self.seed = seed
        self.came_upon: Counter[str] = Counter()
        self.chance = chance = random.Random(seed)
        self.path = path
        self.count = chance.randrange(1, 25)
        self.honours = chance.random() < 0.7
        self.hold = chance.random() < (0.2 if self.honours else 0.6)
        self.retry_failed = chance.choice([0, 0, 1, 2])
        self.limit = chance.choice([None, "2/s", "10/s"])
        self.cap = chance.choice([None, None, PRICE * chance.randrange(1, self.count + 3)])
        self.told = chance.random() < 0.5
        self.most = chance.choice([1, 3, 10, 1000])
        self.handed_over: dict[str, tuple[str, str | None]] = {}
        self.emulator = Emulator(
            clock=lambda: _now(),
            api_key=API_KEY,
            seed=seed,
            idempotency=self.honours,
            failure_share=chance.choice([0, 0, 0.3]),
            rate=chance.choice([None, None, 2]),
            concurrency=chance.choice([None, None, 2]),
            batch=chance.random() < 0.7,
            faults=self._faults(),
        )
        if not self.honours:
            self.came_upon["keys not honoured"] += 1
        self.wire = Wire(self)
        self.pulled = 0
        self.violations: list[str] = []
        self.lives = chance.choice([0, 1, 1, 2, 3])
        self.cuts = is_postgres(path) and chance.random() < 0.5
        self.cut_last = -1e9

    def _faults(self) -> list[Fault]:
        chance = self.chance
        kinds = [
            Fault(**POSTS, status=429, probability=0.15, headers={"retry-after": "3"}),
            Fault(**POSTS, drop="after", probability=0.15),
            Fault(**POSTS, drop="before", probability=0.1),
            Fault(**POSTS, status=500, probability=0.1),
            Fault(**POSTS, status=502, accept=True, probability=0.1),
            Fault(**POSTS, status=503, headers={"retry-after": "5"}, probability=0.05),
            Fault(**POSTS, delay=4, probability=0.2),
            Fault(**POSTS, delay=45, probability=0.05),
            Fault(**POSTS, status=402, probability=0.02),
            Fault(**POSTS, status=400, probability=0.05),
            Fault(method="GET", path="/v1/tasks", status=500, probability=0.2),
            Fault(method="GET", path="/v1/tasks", drop="before", probability=0.1),
            Fault(path="/v1/tasks", status=404, younger_than=40),
            Fault(path="/v1/tasks", delay=10, probability=0.1),
        ]
        return chance.sample(kinds, chance.randrange(6))

    def requests(self) -> list[ImageRequest]:
        keyed = self.seed % 2 == 0
        names = [f"picture {number}" for number in range(self.count)]
        return [ImageRequest(model=MODEL, prompt=name, key=f"key of {name}" if keyed else None) for name in names]

    # What is expected at once

    def found(self, what: str) -> None:
        """A violation in a place where raising would only be one more fault of the network."""
        self.violations.append(what)

    async def watch(self, pool: TaskPool, process: Process) -> None:
        """An id that the program can see is on disk."""
        while True:
            await asyncio.sleep(0.5)
            if process.dead or _now() < self.cut_last + 60:
                continue  # a connection was cut: the id is logged, and on disk once there is one again
            shown = [*pool.outstanding]
            marks = ", ".join("?" * len(shown)) or "NULL"
            query = f"SELECT task_id FROM request WHERE task_id IN ({marks}) AND state <> 'sending'"
            for task_id in {*shown} - {task_id for (task_id,) in self.ask(query, *shown)}:
                self.found(f"task {task_id} is shown, and its id is not on disk")

    def ask(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return ask(self.path, query, *parameters)

    def cut(self, when: str) -> bool:
        """Whether the connection is lost now."""
        lost = self.cuts and self.chance.random() < 0.02
        if lost:
            self.came_upon[f"cut {when} a commit"] += 1
            self.cut_last = _now()
        return lost

    @property
    def no_answer(self) -> Exception:
        import psycopg

        return psycopg.OperationalError("the connection is lost")

    def expect_intended(self, post: dict[str, Any]) -> None:
        query = "SELECT 1 FROM request WHERE idempotency_key = ? AND state IN ('sending', 'replaying')"
        if not self.ask(query, post["key"]):
            self.found(f"a POST with the key {post['key']} is not on record")

    def expect_durable(self, request: httpx.Request) -> None:
        ids = json.loads(request.content)["task_ids"] if request.content else [request.url.path.rpartition("/")[2]]
        if _now() < self.cut_last + 60:
            return
        for task_id in ids:
            if not self.ask("SELECT 1 FROM request WHERE task_id = ?", task_id):
                self.found(f"task {task_id} was asked for before its id was on disk")

    def expect_within_budget(self) -> None:
        if self.cap is None or not (self.honours or self.hold):
            return
        account = self.emulator.book()["account"]
        held = Decimal(str(account["reserved"])) + Decimal(str(account["spent"]))
        if held > self.cap:
            self.found(f"{held} credits are reserved and spent, and {self.cap} were allowed")

    # Runs

    async def live(self) -> None:
        """All runs, the calm last one included."""
        for _ in range(self.lives):
            await self.run(self.death())
            await asyncio.sleep(self.chance.choice([0, 1, 30, 200, 700]))
        self.emulator.set_faults([])
        self.cuts = False
        for _ in range(2):
            last = await self.run(None, calm=True)
            await self.judge(last)
            if not await self.settle_some():
                break
            last = await self.run(None, calm=True)
        posts = len(self.wire.posts)
        again = await self.run(None, calm=True)
        await self.judge(again)
        if self.cap is None and len(self.wire.posts) != posts:
            raise Violation("a job that had ended was sent again")

    def death(self) -> tuple[str, int] | None:
        points = [name.removeprefix("killed ") for name in RARE if name.startswith("killed ")]
        weights = [6.0 if "unsettled" in name or "replaying" in name else 1.0 for name in points]
        [point] = self.chance.choices(points, weights)
        most = {"read": 10, "unsettled": 3, "replaying": 3}.get(point.partition(" ")[2], self.count)
        return (point, self.chance.randrange(1, max(2, most)))

    async def run(self, die_at: tuple[str, int] | None, *, calm: bool = False) -> list[Outcome]:
        process = self.wire.process = Process(self, die_at)
        Store.process = process
        process.main = asyncio.current_task()
        outcomes: list[Outcome] = []
        try:
            async with asyncio.timeout(LONGEST_CALM if calm else None):
                await self._run(process, outcomes)
        except asyncio.CancelledError:
            if not process.dead:
                raise
        except TimeoutError:
            raise Violation(f"a calm run was not over after {LONGEST_CALM:g} s") from None
        except (LedgerError, OSError):
            if not process.dead and not self.cuts:
                raise
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)  # a kill that came in the last moment
            if (me := asyncio.current_task()) is not None:
                while me.cancelling():
                    me.uncancel()
        if self.violations:
            raise Violation("; ".join(self.violations[:3]))
        return outcomes

    async def _run(self, process: Process, outcomes: list[Outcome]) -> None:
        lost_before = await self.unknown()
        async with httpx.AsyncClient(transport=self.wire) as http_client:  # noqa: SIM117
            async with AsyncEvoLink(
                API_KEY,
                base_url="http://127.0.0.1",
                http_client=http_client,
                on_lost_response="hold" if self.hold else "replay",
                rate_limit=self.limit,
            ) as client:
                pool = client.pool(
                    self.requests(),
                    ledger=self.path,
                    max_credits=self.cap,
                    prices={MODEL: PRICE} if self.told else None,
                    retry_failed=self.retry_failed,
                    max_outstanding=self.most,
                    stop_after_rejections=None,
                )
                watching = asyncio.create_task(self.watch(pool, process))
                try:
                    async with pool:
                        async for outcome in pool:
                            outcomes.append(outcome)
                            if not process.dead:
                                self.take(outcome)
                                process.reach("after outcome")
                except Exception as error:
                    if process.dead:
                        return
                    if error is not pool.reason:
                        raise
                    self.came_upon[
                        "budget spent" if isinstance(error, BudgetExceededError) else "a run ended early"
                    ] += 1
                finally:
                    watching.cancel()
                self.pulled = pool.stats.pulled if pool.reason is not None else self.count
                if not process.dead and pool.leftovers:
                    raise Violation(f"a run that was not left early has leftovers: {pool.leftovers}")
                for outcome in outcomes:
                    if outcome.ok and outcome.identity in lost_before:
                        self.came_upon["settled by a later run"] += 1

    def take(self, outcome: Outcome) -> None:
        """It was handed over: it must stay what it is."""
        if outcome.status == "not_submitted" and self.cuts:
            return  # nobody could be asked what is known of it
        task_id = outcome.task.id if outcome.task is not None else None
        before = self.handed_over.get(outcome.identity)
        if before is not None and before[0] == "completed" and before != (outcome.status, task_id):
            raise Violation(f"{outcome.identity} was handed over as {before}, now it is {outcome.status}, {task_id}")
        self.handed_over[outcome.identity] = (str(outcome.status), task_id)
        if outcome.status == "rejected":
            self.came_upon["rejected"] += 1
        if outcome.status == "failed":
            self.came_upon["failed for good"] += 1
        if outcome.ok and len({post["key"] for post in self.wire.posts if post["name"] == self.name_of(outcome)}) > 1:
            self.came_upon["failed and tried again"] += 1

    @staticmethod
    def name_of(outcome: Outcome) -> str:
        assert outcome.request is not None
        return str(outcome.request.prompt)

    async def unknown(self) -> set[str]:
        there = "SELECT FROM pg_tables WHERE schemaname = 'evolink_async'"
        if not (self.ask(there) if isinstance(self.path, str) else self.path.exists()):
            return set()
        async with open_ledger(self.path) as ledger:
            if "default" not in await ledger.jobs():
                return set()
            return {request.identity for request in await ledger.job().unknown() if request.state == "unsettled"}

    async def settle_some(self) -> bool:
        """The user looks at the service's list, and tells the ledger what became of the unknown ones."""
        identities = sorted(await self.unknown())
        if not identities or self.chance.random() < 0.3:
            return False
        tasks = {post["idempotency_key"]: post["task_id"] for post in self.emulator.book()["posts"]}
        async with open_ledger(self.path) as ledger:
            for request in await ledger.job().unknown():
                if request.state != "unsettled":
                    continue
                task_id = tasks.get(request.idempotency_key or "")
                if task_id is not None:
                    await ledger.job().resolve(request.identity, task_id=task_id)
                else:
                    await ledger.job().resolve(request.identity, submitted=False)
                self.came_upon["the user settled it"] += 1
        return True

    # The judgement

    async def judge(self, outcomes: list[Outcome]) -> None:
        identities = Counter(outcome.identity for outcome in outcomes)
        if len(identities) != self.pulled or max(identities.values(), default=0) > 1:
            raise Violation(f"{self.pulled} requests, and these outcomes: {identities}")
        async with open_ledger(self.path) as ledger:
            job = ledger.job()
            stats, uncertain = await job.stats(), {request.identity for request in await job.unknown()}
            rows = [row async for row in job.rows()]
        self._verify_ends(rows)
        if uncertain and self.hold:
            self.came_upon["held"] += 1
        if any(outcome.status == "unknown" for outcome in outcomes):
            self.came_upon["unknown at the end"] += 1
        for outcome in outcomes:
            if outcome.status == "unknown" and outcome.identity not in uncertain:
                raise Violation(f"{outcome.identity} is unknown, and the ledger does not say so")
            if outcome.status not in ("completed", "failed", "unknown") and self.cap is None:
                raise Violation(f"calm, and {outcome.identity} is {outcome.status}: {outcome.error}")
            if outcome.status in ("unfinished", "lost"):
                raise Violation(f"calm, and {outcome.identity} is {outcome.status}: {outcome.error}")
        self._judge_payments(outcomes, uncertain)
        self._judge_posts()
        self._judge_money(rows, stats, uncertain)

    def _verify_ends(self, rows: list[Any]) -> None:
        """What the ledger says of a task is what the service says."""
        book = {post["task_id"]: post["status"] for post in self.emulator.book()["posts"]}
        for row in rows:
            if row.task_id is not None and row.state in ("completed", "failed") and book[row.task_id] != row.state:
                raise Violation(f"task {row.task_id} is {book[row.task_id]}, and {row.state} in the ledger")

    def _judge_payments(self, outcomes: list[Outcome], uncertain: set[str]) -> None:
        names = {post["key"]: post["name"] for post in self.wire.posts}
        identity_of = {self.name_of(outcome): outcome.identity for outcome in outcomes}
        paid: Counter[str] = Counter()
        made: Counter[str] = Counter()
        for post in self.emulator.book()["posts"]:
            name = names[post["idempotency_key"]]
            made[name] += 1
            paid[name] += post["status"] != "failed"
        twice = {name for name, count in paid.items() if count > 1}
        if twice:
            self.came_upon["paid twice"] += len(twice)
        if twice and (self.honours or self.hold):
            raise Violation(f"paid twice: {twice}")
        if len(twice) > 3:
            raise Violation(f"more than three were paid twice: {twice}")
        hidden = {name for name in twice if name in identity_of and identity_of[name] not in uncertain}
        if hidden:
            raise Violation(f"paid twice, and the ledger does not say so: {hidden}")
        if self.honours or self.hold:
            for name, count in made.items():
                if count > 1 + self.retry_failed:
                    raise Violation(f"{name!r} was made {count} times")

    def _judge_posts(self) -> None:
        names: dict[str, tuple[str, bytes]] = {}
        for post in self.wire.posts:
            if names.setdefault(post["key"], (post["name"], post["body"])) != (post["name"], post["body"]):
                raise Violation(f"the key {post['key']} stands for two requests, or two bodies")
        again = Counter(post["key"] for post in self.wire.posts if post.get("status") not in (429, 409))
        if sum(count > 1 for count in again.values()):
            self.came_upon["lost response"] += 1
        for process in {post["process"] for post in self.wire.posts}:
            mine = [post for post in self.wire.posts if post["process"] is process]
            for post in mine:
                until = post.get("answered", 0.0) + post.get("pause", 0.0) - 1e-6
                if post.get("pause") and any(post["answered"] < other["at"] < until for other in mine):
                    raise Violation("a POST in a cool-down that the service had asked for")
            if self.limit is not None:
                rate = int(self.limit.partition("/")[0])
                moments = sorted(post["at"] for post in mine)
                for earlier, later in zip(moments, moments[rate + 1 :], strict=False):
                    if later - earlier < 1 - 1e-4:
                        raise Violation(f"{rate + 2} POSTs in {later - earlier:g} s, and {self.limit} are allowed")

    def _judge_money(self, rows: list[Any], stats: Any, uncertain: set[str]) -> None:
        book = {post["task_id"]: post for post in self.emulator.book()["posts"]}
        known = {row.task_id for row in rows} | {past.task_id for row in rows for past in row.past}
        names = {post["key"]: post["name"] for post in self.wire.posts}
        by_key = {row.idempotency_key: row.identity for row in rows}
        by_key |= {past.idempotency_key: row.identity for row in rows for past in row.past}
        for task_id, post in book.items():
            if task_id not in known and by_key.get(post["idempotency_key"]) not in uncertain:
                name = names[post["idempotency_key"]]
                raise Violation(f"task {task_id} of {name!r} was paid for, and the ledger does not know it")
        # Of a task whose id the user told nobody has said what it costs, if no other had been accepted by then; if it
        # was the one that found out a price, all that was reserved for it counts as spent, or stays reserved.
        untold = {row for row in rows if row.state == "completed" and (row.spent is None or row.spent > PRICE * MICRO)}
        if untold and not self.came_upon["the user settled it"]:
            raise Violation(f"nobody knows what {untold} have cost")
        # A budget that is spent ends a run before it has pulled all: what earlier runs have sent waits in the ledger.
        waiting = {row for row in rows if row.state == "accepted" and self.pulled < self.count}
        told = known - {row.task_id for row in untold | waiting}
        charged = sum(Decimal(str(post["charged"] or 0)) for task_id, post in book.items() if task_id in told)
        extra = sum(
            Decimal(str(book[past.task_id]["charged"] or 0))
            for row in rows
            for past in row.past
            if past.task_id in book and past.state == "accepted"
        )
        spent = stats.credits_spent - Decimal(sum(row.spent or 0 for row in untold)) / MICRO
        if spent != charged - extra:
            raise Violation(f"the ledger says {spent} credits were spent, the book {charged - extra}")
        held = Decimal(sum(row.reserved or 0 for row in waiting | untold)) / MICRO
        if not uncertain and stats.credits_reserved != held:
            raise Violation(f"{stats.credits_reserved} credits are reserved, and {held} for what waits")


# Breaking the code


@contextlib.contextmanager
def _patched(target: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)


def _id_written_after_it_is_shown() -> Any:
    original = Journal.accepted

    async def accepted(self: Journal, row: Any, task: Any) -> None:
        row.task_id = task.id  # shown now, written in three seconds
        asyncio.get_running_loop().call_later(3, lambda: asyncio.ensure_future(original(self, row, task)))

    return _patched(Journal, "accepted", accepted)


def _replay_with_a_new_key() -> Any:
    original = Journal.intend

    async def intend(self: Journal, row: Any, submission: Any, fingerprint: str) -> Any:
        if row.state == "unsettled":
            submission.key = new_idempotency_key()
        return await original(self, row, submission, fingerprint)

    return _patched(Journal, "intend", intend)


def _no_reservation() -> Any:
    original = JobLedger.intend

    def intend(self: JobLedger, row: Any, **options: Any) -> Any:
        return original(self, row, **options | {"told": Decimal(0)})

    return _patched(JobLedger, "intend", intend)


def _lost_at_the_first_404() -> Any:
    stack = contextlib.ExitStack()
    stack.enter_context(_patched(watcher, "_LOST_LOOKS", 1))
    stack.enter_context(_patched(watcher, "_LOST_AFTER", 0.0))
    return stack


def _post_before_the_intent_is_durable() -> Any:
    original = JobLedger.intend

    def intend(self: JobLedger, row: Any, **options: Any) -> Any:
        refusal = original(self, row, **options)
        if refusal.done():
            return refusal
        at_once: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        at_once.set_result(None)
        return at_once

    return _patched(JobLedger, "intend", intend)


def _end_of_a_task_not_written() -> Any:
    return _patched(Journal, "ended", lambda self, row, task: None)


MUTATIONS: dict[str, Callable[[], Any]] = {
    "id-written-after-it-is-shown": _id_written_after_it_is_shown,
    "replay-with-a-new-key": _replay_with_a_new_key,
    "no-reservation": _no_reservation,
    "lost-at-the-first-404": _lost_at_the_first_404,
    "post-before-the-intent-is-durable": _post_before_the_intent_is_durable,
    "end-of-a-task-not-written": _end_of_a_task_not_written,
}


# Many of them


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Virtual wall clock, no thread, a store that may die."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched(clock, "now", lambda: START + timedelta(seconds=_now())))
        stack.enter_context(_patched(opening, "one_thread", InLoop))
        import evolink_async.ledger.store as store_module

        stack.enter_context(_patched(store_module, "JobStore", Store))
        yield


@contextlib.contextmanager
def _place(server: Postgres | None) -> Iterator[Path | str]:
    """Of a ledger."""
    if server is not None:
        url = server.lend()
        try:
            yield url
        finally:
            server.give_back(url)
        return
    with tempfile.TemporaryDirectory(prefix="evolink-lives-", dir=MEMORY) as folder:
        yield Path(folder) / "job.db"


async def one_life(seed: int, server: Postgres | None) -> Counter[str]:
    """What it came upon. Raises `Violation`."""
    random.seed(seed)
    with _place(server) as path:
        life = Life(seed, path)
        await life.live()
        if life.cap is not None and not life.told:
            life.came_upon["price tried alone"] += 1
        return life.came_upon


def lives(seeds: range, server: Postgres | None = None) -> Iterator[tuple[int, Counter[str], BaseException | None]]:
    """One after the other, each on a loop of its own. server: where the ledgers are, None: in files."""
    for seed in seeds:
        with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
            try:
                yield seed, runner.run(one_life(seed, server)), None
            except Exception as error:  # noqa: BLE001
                yield seed, Counter(), error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--ledger", choices=["file", "postgresql"], default="file")
    parser.add_argument("--mutation", choices=MUTATIONS)
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first violation")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.CRITICAL)
    seeds = range(options.first, options.first + options.seeds)
    reached: Counter[str] = Counter()
    violations, started = 0, time.perf_counter()
    broken = MUTATIONS[options.mutation]() if options.mutation else contextlib.nullcontext()
    where = running() if options.ledger == "postgresql" else contextlib.nullcontext()
    with simulated(), broken, where as server:
        for number, (seed, came_upon, error) in enumerate(lives(seeds, server), 1):
            reached.update(name for name, count in came_upon.items() if count)
            if error is not None:
                violations += 1
                print(f"seed {seed}, after {number}: {type(error).__name__}: {error}")
                print(f"  python tests/simulation/lives.py --first {seed} --seeds 1", end="")
                print(f" --ledger {options.ledger}", end="")
                print(f" --mutation {options.mutation}" if options.mutation else "")
                if options.verbose:
                    raise error
                if not options.keep_going:
                    break
    seconds = time.perf_counter() - started
    print(f"{number} lives in {seconds:.0f} s ({number / seconds:.1f} per second), {violations} violations")
    for name in (*RARE, *CUT):
        print(f"  {reached[name]:>6} lives came upon: {name}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
