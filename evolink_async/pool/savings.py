"""Completed tasks whose results are being saved, by a fixed number of workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import PurePath

from evolink_async.errors import ClosedError, DownloadError
from evolink_async.pool.record import Record
from evolink_async.saving.crew import Crew
from evolink_async.saving.folder import lacks_room
from evolink_async.saving.saver import Saver

logger = logging.getLogger("evolink_async.pool")

WORKERS = 32  # the saver has fewer connections than that
FULL_PAUSE = 10.0  # seconds, until a full disk is tried again
FULL_PATIENCE = 900.0  # seconds without room, after which results are given up one by one; their links live a day

_Attempt = tuple[tuple[PurePath, ...], DownloadError | None]  # the files that are saved, and why not all are


class Savings:
    """Saves the results of records, as many at once as there are workers.

    While the disk is full the workers wait, and with them the reading of sources: what is saved later is paid for
    later.

    saved: called with the paths, and with the error if not all could be saved; crashed: with a fault of ours.
    """

    def __init__(
        self,
        saver: Saver,
        saved: Callable[[Record, tuple[PurePath, ...], DownloadError | None], None],
        crashed: Callable[[Record, BaseException], None],
    ) -> None:
        self._saver = saver
        self._saved = saved
        self._crashed = crashed
        self._crew = Crew("evolink saving", WORKERS, self._work)
        self._finding_out = asyncio.Lock()  # whether there is room again: one at a time
        self._full_since: float | None = None

    async def prepare(self) -> None:
        """Make the folder. Raises `ConfigurationError` if nothing can be saved there."""
        await self._saver.prepare()

    def put(self, record: Record) -> None:
        """Save the results of its task."""
        self._crew.put(record)

    async def aclose(self) -> None:
        """Stop. What is not saved by now is not saved; nothing is left half written under its name."""
        await self._crew.aclose()

    async def _work(self, record: Record) -> None:
        try:
            await self._save(record)
        except Exception as error:  # noqa: BLE001  (a fault of ours: it becomes the reason)
            self._crashed(record, error)

    async def _save(self, record: Record) -> None:
        files, problem = await self._attempt(record)
        if _lacks_room(problem):
            async with self._finding_out:
                files, problem = await self._wait_for_room(record)
        elif not self._finding_out.locked():
            self._full_since = None  # nobody waits for room any more
        self._saved(record, files, problem)

    async def _wait_for_room(self, record: Record) -> _Attempt:
        """Try until there is room, or there was none for too long: one finds out for all that wait behind it."""
        files, problem = await self._attempt(record)
        while _lacks_room(problem):
            if self._full_since is None:
                self._full_since = time.monotonic()
                logger.warning("saving waits for room: %s", problem, extra={"event": "disk_full"})
            if time.monotonic() - self._full_since >= FULL_PATIENCE:
                return files, problem
            await asyncio.sleep(FULL_PAUSE)
            files, problem = await self._attempt(record)
        if self._full_since is not None:
            self._full_since = None
            logger.warning("there is room for results again", extra={"event": "disk_has_room"})
        return files, problem

    async def _attempt(self, record: Record) -> _Attempt:
        task, row = record.task, record.row
        assert task is not None
        try:
            files = await self._saver.save(
                task,
                key=record.key,
                index=record.index,
                identity=record.identity,
                saved=() if row is None else row.files,
            )
        except DownloadError as error:
            return tuple(error.files), error
        except ClosedError as error:
            unsaved = not_saved()
            unsaved.__cause__ = error
            return (), unsaved
        return files, None


def not_saved() -> DownloadError:
    """Saving has ended before its results were saved."""
    return DownloadError("its results were not saved; it is done and paid: fetch them with its links")


def _lacks_room(problem: DownloadError | None) -> bool:
    return problem is not None and lacks_room(problem)
