"""kill -9, for real: a user's program is killed at random moments of a job, resumed each time, and judged by the book.

    python tests/kills/killing.py [--kills 100] [--requests 1000] [--ledger file | postgresql [--server]] [--hold]
        [--keys-ignored] [--seed N]

With --server it is the ledger's server that is killed each time, and started again. The program (`kill_job.py`) runs a
pool with a ledger over TCP; the emulator is another process, loses 2 % of the answers behind an accepted POST and 1 %
of the POSTs before, and its book is the truth. After each kill and at the end:

* no request has two tasks, whether keys are honoured (`on_lost_response="replay"`) or not (`"hold"`);
* every task in the book is known to the ledger, or its request is listed by `.unknown()`;
* unknown is only what was on its way when the program was killed, or whose answer was lost; where it may be sent again,
  only what that happened to once more when it was (the contract: a request is sent again once);
* the budget, which fits the job exactly, is never exceeded, and the ledger never holds less than the book;

and at the end every request has exactly one outcome, those that a killed program had printed as completed are the same,
and the ledger's credits are the book's to the micro-credit, less what is unknown. Then the user settles what is unknown
by the service's list, the job is run once more, and every credit is accounted for: spent and reserved are the book's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from postgres import Postgres, ask, running  # noqa: E402

from evolink_async import open_ledger  # noqa: E402
from evolink_async.ledger import Row  # noqa: E402

API_KEY = "sk-kills-0123456789abcdef"
PRICE = Decimal("2.5")
REPLAYS = 3  # a job makes so many before the service has proven that it honours keys
POSTS: dict[str, Any] = {"method": "POST", "path": "/v1/images"}
LOSSES = [
    POSTS | {"drop": "after", "probability": 0.02},
    POSTS | {"drop": "before", "probability": 0.01},
    POSTS | {"delay": 0.05, "probability": 0.5},
]
IN_DOUBT = ("sending", "replaying", "unsettled")


class Violation(AssertionError):
    """A promise that was not kept."""


class DoneTooSoon(Exception):
    """Nothing was left to kill: by chance, or because this machine stood still."""


# Processes


def environment(base_url: str = "", **more: str) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "EVOLINK_BASE_URL": base_url,
        "EVOLINK_API_KEY": API_KEY,
        **more,
    }


@contextlib.asynccontextmanager
async def service(**options: Any) -> AsyncIterator[str]:
    """The address of an emulator in a process of its own; still the same one at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(str(HERE / "kill_service.py"), json.dumps({"api_key": API_KEY, "speed": 200, **options})),
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        base_url = (await process.stdout.readline()).decode().strip()
        yield base_url
        if process.returncode is not None:
            raise Violation(f"the emulator has ended with {process.returncode}")
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def book_of(base_url: str) -> dict[str, Any]:
    """The emulator's book."""

    def read() -> dict[str, Any]:
        with urllib.request.urlopen(f"{base_url}/_emulator/book", timeout=120) as answer:
            book: dict[str, Any] = json.load(answer)
        return book

    return await asyncio.to_thread(read)


async def set_faults(base_url: str, faults: list[dict[str, Any]]) -> None:
    """Other faults from now on."""

    def post() -> None:
        data = json.dumps(faults).encode()
        request = urllib.request.Request(f"{base_url}/_emulator/faults", data, {"content-type": "application/json"})
        urllib.request.urlopen(request, timeout=120).close()

    await asyncio.to_thread(post)


@dataclass
class Life:
    """One run of the program: what it has printed."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Task[None] | None = None
    errors: str = ""

    async def read(self) -> None:
        assert self.process.stdout is not None
        while (line := await self.process.stdout.readline()).endswith(b"\n"):
            self.lines.append(line.decode().rstrip("\n"))
            self.entered.set()
        self.entered.set()

    async def end(self, seconds: float = 300) -> int:
        """Wait for it; its exit code."""
        assert self.reading is not None
        assert self.process.stderr is not None
        async with asyncio.timeout(seconds):
            await self.reading
            self.errors += (await self.process.stderr.read()).decode()
            return await self.process.wait()

    async def kill(self) -> bool:
        """SIGKILL, and whether that is what it died of."""
        if self.process.returncode is None:
            self.process.kill()
        return await self.end() == -signal.SIGKILL

    def told(self, word: str) -> list[Any]:
        """What it has printed behind this word."""
        return [json.loads(line.partition(" ")[2] or "null") for line in self.lines if line.partition(" ")[0] == word]


class Job:
    """A job, all of its runs, and what is known of them outside of the ledger."""

    def __init__(self, folder: Path, base_url: str, ledger: Path | str | None = None, **options: Any) -> None:
        self.ledger = ledger or folder / "job.db"
        self.log, self.base_url, self.options = folder / "log", base_url, options
        self.requests: int = options["requests"]
        self.cap: Decimal | None = None if options.get("cap") is None else Decimal(str(options["cap"]))
        self.completed: dict[str, dict[str, Any]] = {}  # as printed, in any run
        self.on_its_way: set[str] = set()  # requests that were, at one of the kills
        self.kills = self.kills_on_the_wire = self.kills_on_the_way = 0
        self._read = 0
        self.accounted_for: tuple[Decimal, Decimal] | None = None  # spent and reserved, as in the book

    @contextlib.asynccontextmanager
    async def run(self, **environ: str) -> AsyncIterator[Life]:
        """Start the program; it is not left behind."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(str(HERE / "kill_job.py"), str(self.ledger), str(self.log), json.dumps(self.options)),
            env=environment(self.base_url, **environ),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**20,
        )
        life = Life(process)
        life.reading = asyncio.create_task(life.read())
        try:
            yield life
        finally:
            if process.returncode is None:
                process.kill()
            await life.end()

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def log_has(self, word: str) -> bool:
        """Whether the present run has written this word."""
        return any(line[0] == word for line in self.lines()[self._read :])

    def note(self, life: Life, *, killed: bool) -> None:
        """Keep what a run that has ended leaves behind."""
        lines = self.lines()[self._read :]
        self._read += len(lines)
        wire: set[str] = set()
        way: set[str] = set()
        for word, *rest in lines:
            match word:
                case "post":
                    wire.add(rest[0])
                case "answer" | "lost":
                    wire.discard(rest[0])
                case "intend":
                    way.add(rest[0])
                case "settled":
                    way.discard(rest[0])
        if killed:
            self.kills += 1
            self.kills_on_the_wire += bool(wire)
            self.kills_on_the_way += bool(way)
            self.on_its_way |= way
        unwritten = life.errors if "could not be written to the ledger" in " ".join(life.lines) else ""
        for outcome in life.told("outcome"):
            if outcome["status"] == "completed" and outcome["task"] not in unwritten:
                before = self.completed.setdefault(outcome["key"], outcome)
                if _lasting(before) != _lasting(outcome):
                    raise Violation(f"it was printed as {before}, and then as {outcome}")

    # The judgement

    async def judge(self, last: Life | None = None) -> Judgement:
        """Raises `Violation`. last: the run in which everything came to its end."""
        book = await book_of(self.base_url)
        there = "SELECT FROM pg_tables WHERE schemaname = 'evolink_async'"
        if not (ask(self.ledger, there) if isinstance(self.ledger, str) else self.ledger.exists()):
            if book["posts"]:
                raise Violation("tasks were made, and there is no ledger")
            return Judgement()
        async with open_ledger(self.ledger) as ledger:
            if "default" not in await ledger.jobs():
                return Judgement()
            job = ledger.job()
            stats, unknown = await job.stats(), await job.unknown()
            rows = [row async for row in job.rows()]
        names = {line[1]: line[2] for line in self.lines() if line[0] == "post"}
        lost = {names[line[1]] for line in self.lines() if line[0] == "lost"}
        tasks = Counter(names.get(post["idempotency_key"], "nobody") for post in book["posts"])
        if tasks["nobody"]:
            raise Violation("the book has a task whose POST nobody has made")
        if any(count > 1 for count in tasks.values()):
            raise Violation(f"charged twice: {[name for name, count in tasks.items() if count > 1]}")
        uncertain = {request.identity for request in unknown}
        unsettled = {request.identity for request in unknown if request.resolvable}
        known = {row.task_id for row in rows if row.task_id}
        for post in book["posts"]:
            if post["task_id"] not in known and names[post["idempotency_key"]] not in uncertain:
                raise Violation(f"task {post['task_id']} of {names[post['idempotency_key']]} is lost")
        surprising = uncertain - self.on_its_way - lost
        if surprising:
            raise Violation(f"unknown, and was neither on its way at a kill nor lost: {surprising}")
        self._judge_money(book, stats, rows)
        judgement = Judgement(
            tasks=len(book["posts"]),
            unknown=len(unsettled),
            sent_twice=len(uncertain - unsettled),
            lost=sum(line[0] == "lost" for line in self.lines()),
            posts=sum(line[0] == "post" for line in self.lines()),
            replays=book["replays"],
            unknown_with_task=sum(names[post["idempotency_key"]] in unsettled for post in book["posts"]),
        )
        if last is not None:
            self._judge_outcomes(last, unsettled)
            self._judge_end(book, stats, rows)
        return judgement

    def _judge_money(self, book: dict[str, Any], stats: Any, rows: list[Row]) -> None:
        """At any moment."""
        held = stats.credits_spent + stats.credits_reserved
        if self.cap is not None and held > self.cap:
            raise Violation(f"{held} credits are spent and reserved, and {self.cap} were allowed")
        account = book["account"]
        charged = Decimal(str(account["spent"])) + Decimal(str(account["reserved"]))
        if held < charged:
            raise Violation(f"the ledger holds {held} credits, the book {charged}")
        spent, reserved = sum(row.spent or 0 for row in rows), sum(row.reserved or 0 for row in rows)
        sums = Decimal(spent) / 10**6, Decimal(reserved) / 10**6
        if sums != (stats.credits_spent, stats.credits_reserved) and not any(row.past for row in rows):
            raise Violation(f"the rows sum up to {sums}, the job says {stats.credits_spent}, {stats.credits_reserved}")

    def _judge_outcomes(self, last: Life, unsettled: set[str]) -> None:
        outcomes = last.told("outcome")
        counts = Counter(outcome["key"] for outcome in outcomes)
        if counts != Counter(f"r{number}" for number in range(self.requests)):
            raise Violation(f"not every request has one outcome: {counts.most_common(3)}, {len(counts)} in all")
        said = {outcome["key"] for outcome in outcomes if outcome["status"] == "unknown"}
        if said != unsettled:
            raise Violation(f"outcomes say that {said} are unknown, the ledger that {unsettled} are")
        intents = Counter(line[1] for line in self.lines() if line[0] == "intend")
        once = {key for key in unsettled if intents[key] < 2}
        # A kill may have cut off the answers to all three that may be sent again without proof, and some of these may
        # have reached the service for the first time, which proves nothing: then no more are.
        again = unsettled - once if self._keys_are_proven() else {key for key, count in intents.items() if count > 1}
        if once and not self.options.get("hold") and len(again) < REPLAYS:
            raise Violation(f"unknown, and it was not sent again: {once}")
        others = Counter(outcome["status"] for outcome in outcomes) - Counter(
            {"completed": self.requests, "unknown": len(unsettled), "lost": self.requests}
        )
        if others:
            raise Violation(f"at the end there are {others}")
        by_key = {outcome["key"]: outcome for outcome in outcomes}
        for key, before in self.completed.items():
            if _lasting(before) != _lasting(by_key[key]):
                raise Violation(f"it was printed as {before}, and in the last run as {by_key[key]}")

    def _keys_are_proven(self) -> bool:
        """Whether the job has seen that the service honours keys."""
        [(proven,)] = ask(self.ledger, "SELECT keys_honoured FROM job")
        return bool(proven)

    def _judge_end(self, book: dict[str, Any], stats: Any, rows: list[Row]) -> None:
        """When nothing runs: to the micro-credit. What is unknown or lost keeps its reservation in the ledger."""
        kept = {row.idempotency_key for row in rows if row.state in (*IN_DOUBT, "lost")}
        settled = [post for post in book["posts"] if post["idempotency_key"] not in kept]
        spent = sum((Decimal(str(post["charged"] or 0)) for post in settled), Decimal(0))
        if any(post["status"] != "completed" for post in book["posts"]):
            raise Violation("something still runs")
        if (stats.credits_spent, stats.credits_reserved) != (spent, len(kept) * PRICE):
            raise Violation(
                f"the ledger has spent {stats.credits_spent} and holds {stats.credits_reserved}; "
                f"the book has charged {spent} for what is settled, and {len(kept)} requests are not"
            )
        if not kept and (spent, Decimal(0)) != (
            Decimal(str(book["account"]["spent"])),
            Decimal(str(book["account"]["reserved"])),
        ):
            raise Violation(f"the book says {book['account']}, the ledger {spent}")


@dataclass
class Judgement:
    """Figures of a job at one moment.

    lost: answers. unknown: requests that may have a task; unknown_with_task: those that have one. sent_twice: listed
    because they were, and the service has not proven that it honours keys; they have their task.
    """

    tasks: int = 0
    unknown: int = 0
    sent_twice: int = 0
    lost: int = 0
    posts: int = 0
    replays: int = 0
    unknown_with_task: int = 0


def _lasting(outcome: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outcome.items() if name != "from_ledger"}


# Killing


async def until_killed(job: Job, chance: random.Random, mean: float, server: Postgres | None) -> bool:
    """One life that ends by SIGKILL at a random moment. False: it was done before.

    server: it is killed instead, and started again; then the program ends by itself, as soon as its tasks have ended.
    """
    async with job.run() as life:
        if chance.random() < 0.1:  # while it starts, opens and checks the ledger
            await asyncio.sleep(chance.uniform(0.2, 1.5))
        else:
            await life.entered.wait()
            if chance.random() < 0.9:  # once it submits, and not while it reads what is known
                while life.process.returncode is None and not job.log_has("intend"):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.sleep(chance.expovariate(1 / mean))
        if server is None:
            killed = await life.kill()
        else:
            await asyncio.to_thread(server.crash)
            await asyncio.sleep(chance.choice([0, 0.5, 3]))
            await asyncio.to_thread(server.start)
            await life.end()
            killed = bool(life.told("reason") or life.told("refused"))
    job.note(life, killed=killed)
    return killed


async def killed_often(
    job: Job, kills: int, chance: random.Random, rate: float, server: Postgres | None = None
) -> Judgement:
    """Kill it so many times, judge it each time; then let it come to its end, and judge it once more."""
    while job.kills < kills:
        posted = len({line[2] for line in job.lines() if line[0] == "post"})
        mean = max(0.02, (job.requests - posted) / (kills - job.kills + 2) / rate)
        if not await until_killed(job, chance, mean, server):
            raise DoneTooSoon(f"it was done after {job.kills} kills: give it more requests")
        await job.judge()
    async with job.run() as life:
        code = await life.end(300 + job.requests / rate)
    job.note(life, killed=False)
    if code or life.told("reason"):
        raise Violation(f"the last run ended with {code}, {life.told('reason')}: {life.errors[-2000:]}")
    judgement = await job.judge(life)
    async with job.run() as again:
        await again.end()
    if not all(outcome["from_ledger"] or outcome["status"] == "unknown" for outcome in again.told("outcome")):
        raise Violation("a job that had ended was gone on with")
    assert (await job.judge(again)).posts == judgement.posts
    await settled_by_the_user(job, rate)
    return judgement


async def settled_by_the_user(job: Job, rate: float) -> None:
    """The unknown ones are looked up in the book; after another run nothing is unknown, and all credits agree."""
    tasks = {post["idempotency_key"]: post["task_id"] for post in (await book_of(job.base_url))["posts"]}
    await set_faults(job.base_url, [])
    async with open_ledger(job.ledger) as ledger:
        for request in await ledger.job().unknown():
            if not request.resolvable:
                continue
            task_id = tasks.get(request.idempotency_key or "")
            if task_id is None:
                await ledger.job().resolve(request.identity, submitted=False)
            else:
                await ledger.job().resolve(request.identity, task_id=task_id)
    async with job.run() as life:
        await life.end(300 + job.requests / rate)
    outcomes = Counter(outcome["status"] for outcome in life.told("outcome"))
    if outcomes != {"completed": job.requests}:
        raise Violation(f"settled, and there are {outcomes}: {life.told('reason')}")
    account = (await book_of(job.base_url))["account"]
    async with open_ledger(job.ledger) as ledger:
        stats = await ledger.job().stats()
    ours = stats.credits_spent, stats.credits_reserved
    theirs = Decimal(str(account["spent"])), Decimal(str(account["reserved"]))
    if ours != theirs:
        raise Violation(f"the ledger has spent and reserved {ours}, the book {theirs}")
    job.accounted_for = ours


async def random_kills(
    folder: Path,
    *,
    kills: int,
    requests: int,
    hold: bool,
    honoured: bool,
    seed: int,
    rate: float = 60,
    new_ledger: Callable[[], Path | str] | None = None,
    server: Postgres | None = None,
) -> tuple[Job, Judgement]:
    """The whole of it; once more if whoever kills was held up until the job was done. server: it is what is killed."""
    for attempt in range(4):
        (here := folder / str(attempt)).mkdir()
        async with service(idempotency=honoured, seed=seed % 1000, faults=LOSSES) as base_url:
            ledger = None if new_ledger is None else new_ledger()
            options = {"hold": hold, "rate": rate, "cap": float(requests * PRICE), "impatient": server is not None}
            job = Job(here, base_url, ledger, requests=requests, **options)
            try:
                return job, await killed_often(job, kills, random.Random(seed), rate, server)
            except DoneTooSoon as reason:
                print(reason)
    raise Violation("it was always done too soon")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--ledger", choices=["file", "postgresql"], default="file")
    parser.add_argument("--server", action="store_true", help="kill the PostgreSQL server, not the program")
    parser.add_argument("--hold", action="store_true", help='on_lost_response="hold"')
    parser.add_argument("--keys-ignored", action="store_true", help="the service ignores idempotency keys")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--folder", help="where ledger and log are made and kept; else where temporary files are")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    started = time.perf_counter()
    where = running(fsync="on") if options.ledger == "postgresql" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as temporary, where as server:
        folder = Path(options.folder or temporary)
        job, judgement = asyncio.run(
            random_kills(
                folder,
                kills=options.kills,
                requests=options.requests,
                hold=options.hold,
                honoured=not options.keys_ignored,
                seed=options.seed,
                new_ledger=None if server is None else server.create,
                server=server if options.server else None,
            )
        )
    print(
        f"{job.kills} kills in a job of {job.requests} requests, {time.perf_counter() - started:.0f} s: "
        f"{job.kills_on_the_wire} with a POST on the wire, {job.kills_on_the_way} with an intent that was not settled, "
        f"{len(job.on_its_way)} requests were on their way"
    )
    print(", ".join(f"{name} {value}" for name, value in vars(judgement).items()))
    assert job.accounted_for is not None
    spent, reserved = job.accounted_for
    print(f"after the user has settled the unknown ones the ledger's and the book's spent {spent}, reserved {reserved}")
    print("no violation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
