"""What the folder of a run tells: its ledger, its lines of outcomes, its record of progress. All of it is foreign.

The ledger knows how every request stands, whatever happened to the program; the lines know prompts, and what never came
as far as the ledger. A folder may hold either.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from evolink_async.errors import ConfigurationError, LedgerError
from evolink_async.ledger import LedgerJob, Row, State, open_ledger
from evolink_async.ledger.values import to_credits
from evolink_async.report.files import ERRORS, LEDGER, PROGRESS, RESULTS
from evolink_async.report.items import STATUSES, Contents, Item, Sample
from evolink_async.report.text import cut

LONGEST_LINE = 64 * 2**20  # as long as a request may be that `run` reads
LONGEST_TEXT = 5_000  # characters of a prompt or an error that a page shows; results.jsonl and the ledger have all
MOST_LINKS = 20  # of one request

_MOST = 1e12  # of anything that is counted or measured

_STATUS_OF = {
    State.ENTERED: "not_submitted",
    State.SENDING: "unknown",
    State.UNSETTLED: "unknown",
    State.REPLAYING: "unknown",
    State.GIVEN_UP: "unknown",
    State.ACCEPTED: "unfinished",
}
_ENDPOINT = re.compile(r"/v1/(image|video|audio)s/")


async def read_folder(folder: Path) -> Contents:
    """All that the folder tells.

    Raises `ConfigurationError` if there is nothing of a run in it, `LedgerError` for a ledger that can't be used.
    """
    there = await asyncio.to_thread(_what_is_there, folder)
    reader = _Reader(folder)
    if LEDGER in there:
        await reader.read_ledger(folder / LEDGER)
    await asyncio.to_thread(reader.read_lines, [folder / name for name in (RESULTS, ERRORS) if name in there])
    await asyncio.to_thread(reader.read_progress, folder / PROGRESS)
    return reader.contents


def _what_is_there(folder: Path) -> list[str]:
    there = [name for name in (LEDGER, RESULTS, ERRORS) if (folder / name).is_file()]
    if not there:
        what = "is no folder" if not folder.is_dir() else f"holds neither {RESULTS} nor {ERRORS} nor {LEDGER}"
        raise ConfigurationError(f"{folder} {what}: give the folder that a run has written, its --out")
    return there


class _Reader:
    """Puts together what the files of a folder say. Its memory holds one number for each request that isn't shown."""

    def __init__(self, folder: Path) -> None:
        self.contents = Contents(folder.resolve().name or str(folder))
        self._files = _Files(folder)
        self._known: set[int] = set()  # hashes of the identities that the ledger has told
        self._shown: dict[str, tuple[int, State]] = {}  # places and states of those that are shown
        self._unreadable = 0

    async def read_ledger(self, path: Path) -> None:
        async with open_ledger(path) as ledger:
            names = await ledger.jobs()
            if not names:
                return
            name = names[0] if len(names) == 1 else "default"
            if name not in names:
                raise LedgerError(f"{path} holds {len(names)} jobs and none is called default, which a report is of")
            if len(names) > 1:
                self.contents.notes.append(f"The ledger holds {len(names)} jobs; this is the one called default.")
            await self._read_job(ledger.job(name))
            holder = (await ledger.job(name).stats()).in_use_by
            if holder is not None:
                self.contents.notes.append("The job was running when this page was made.")

    async def _read_job(self, job: LedgerJob) -> None:
        async with aclosing(job.rows()) as rows:
            async for row in rows:
                self._known.add(hash(row.identity))
                before = len(self.contents.items)
                self.contents.add(self._item_of_row(row))
                if len(self.contents.items) > before:
                    self._shown[row.identity] = before, row.state

    def _item_of_row(self, row: Row) -> Item:
        endpoint = _ENDPOINT.match(row.endpoint)
        reserved, spent = row.holds
        told = row.credits is not None
        task = row.task
        here, elsewhere = self._files.sorted(row.files if self.contents.has_room else ())
        return Item(
            identity=row.identity,
            key=row.key,
            status=_STATUS_OF.get(row.state, row.state.value),
            kind=endpoint[1] if endpoint else None,
            model=row.model,
            task_id=row.task_id,
            error_code=row.error_code,
            error=cut(row.error, LONGEST_TEXT),
            spent=to_credits(spent) if told else None,
            reserved=to_credits(reserved) if told else None,
            attempts=row.attempts,
            submitted_at=row.submitted_at,
            finished_at=row.ended_at,
            service_seconds=None if task is None else _number(task.raw.get("duration")),  # the name: vendor's client
            sent_twice=row.replayed,
            files=here,
            elsewhere=elsewhere,
            links=_links(task.urls if task is not None and self.contents.has_room else ()),
        )

    def read_lines(self, paths: list[Path]) -> None:
        """Add what the lines know. Their order is that of completion, which is as good as another."""
        for path in paths:
            with open(path, "rb") as file:
                for number, line in enumerate(_objects(file)):
                    if line is None:
                        self._unreadable += 1
                    else:
                        self._take(self._item_of_line(line, f"{path.name}:{number + 1}"))
        if self._unreadable:
            what = "1 line that" if self._unreadable == 1 else f"{self._unreadable:,} lines that"
            self.contents.notes.append(f"The files held {what} could not be read.")
        if self._known and not paths:
            self.contents.notes.append(f"A ledger keeps no prompts: they are in {RESULTS}, which is not here.")

    def _take(self, item: Item) -> None:
        if hash(item.identity) not in self._known:
            self.contents.add(item)
            return
        place, state = self._shown.get(item.identity, (None, None))
        if place is None:
            return
        if item.status == "rejected" and state not in (State.ENTERED, State.REJECTED):
            self.contents.add(item)  # another request under a key that was known: refused, and never entered
            return
        known = self.contents.items[place]
        merged = replace(known, prompt=item.prompt)
        if item.status == known.status and known.error is None:  # such as: generated, and could not be saved
            merged = replace(merged, error_code=item.error_code, error=item.error)
        self.contents.items[place] = merged

    def _item_of_line(self, line: Mapping[str, Any], where: str) -> Item:
        """An outcome as results.jsonl or errors.jsonl tells it; the latter has it in `error`, beside the request."""
        error = line["error"] if isinstance(line.get("error"), dict) else {}
        body = line["body"] if isinstance(line.get("body"), dict) else line
        told = line if isinstance(line.get("status"), str) and "identity" in line else error
        status = told.get("status")
        key = _text(line.get("key")) or _text(line.get("custom_id"))
        credits = _credits(line.get("credits"))
        settled = status in ("completed", "failed", "rejected", "not_submitted")
        here, elsewhere = self._files.sorted(line.get("files") if self.contents.has_room else ())
        return Item(
            identity=_text(told.get("identity")) or key or where,
            key=key,
            status=status if status in STATUSES else "unknown",
            kind=_text(line.get("kind")),
            model=_text(body.get("model")),
            prompt=cut(_text(body.get("prompt")) or _text(line.get("text")), LONGEST_TEXT),
            task_id=_text(told.get("task_id")),
            error_code=_text(error.get("code")),
            error=cut(_text(error.get("message")), LONGEST_TEXT),
            spent=credits if settled else None,
            reserved=None if settled else credits,
            attempts=attempts if isinstance(attempts := line.get("attempts"), int) else 0,
            submitted_at=_moment(line.get("submitted_at")),
            finished_at=_moment(line.get("finished_at")),
            files=here,
            elsewhere=elsewhere,
            links=_links(line.get("urls")),
        )

    def read_progress(self, path: Path) -> None:
        if not path.is_file():
            return
        with open(path, "rb") as file:
            for line in _objects(file):
                sample = None if line is None else _sample(line)
                if sample is not None:
                    self.contents.samples.append(sample)


class _Files:
    """Tells files that lie in the folder of a report from others, whatever they are called and wherever they point."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._real = folder.resolve()

    def sorted(self, names: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Paths below the folder, with slashes; and the others, as they are called."""
        here: list[str] = []
        elsewhere: list[str] = []
        for name in names if isinstance(names, list | tuple) else ():
            if isinstance(name, str) and len(here) + len(elsewhere) < MOST_LINKS:
                path = self._below(name)
                if path is None:
                    elsewhere.append(name)
                else:
                    here.append(path)
        return tuple(here), tuple(elsewhere)

    def _below(self, name: str) -> str | None:
        """As it is written (a run names files from where it was started), else beside the report."""
        for candidate in (Path(name), self._folder / Path(name).name):
            try:
                real = candidate.resolve()
                below = real.relative_to(self._real).as_posix()
                if real.is_file():
                    return below
            except (OSError, ValueError, RuntimeError):  # elsewhere, a null byte, too long a name, a loop of links
                pass
        return None


def _objects(file: IO[bytes]) -> Iterator[dict[str, Any] | None]:
    """The objects of a file of JSON lines; None for what is none, such as half a line that a killed run wrote."""
    while line := file.readline(LONGEST_LINE):
        if not line.strip():
            continue
        try:
            value = from_json(line)
        except ValueError:
            value = None
        yield value if isinstance(value, dict) else None


def _sample(line: Mapping[str, Any]) -> Sample | None:
    at = _moment(line.get("at"))
    elapsed, posts, refused = (_number(line.get(name)) for name in ("elapsed", "posts", "rate_limited"))
    if at is None or elapsed is None or posts is None or refused is None:
        return None
    return Sample(at.timestamp(), elapsed, int(posts), int(refused), _number(line.get("rate")))


def _number(value: object) -> float | None:
    """A number that something can be counted or measured by."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        return None
    return float(value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _credits(value: object) -> Decimal | None:
    return None if _number(value) is None else Decimal(str(value))


def _moment(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC) if moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def _links(urls: object) -> tuple[str, ...]:
    """Links that a page may have."""
    if not isinstance(urls, list | tuple):
        return ()
    web = [url for url in urls if isinstance(url, str) and re.match(r"https?://[^\s]+\Z", url, re.I)]
    return tuple(web[:MOST_LINKS])
