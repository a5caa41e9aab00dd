"""Completed tasks whose results are being saved, by a fixed number of workers."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from pathlib import PurePath

from evolink_async.errors import DownloadError
from evolink_async.pool.record import Record
from evolink_async.saving.crew import Crew
from evolink_async.saving.saver import Saver

logger = logging.getLogger("evolink_async.pool")

WORKERS = 32  # the saver has fewer connections than that
FULL_PAUSE = 10.0  # seconds, until a full disk is tried again
FULL_PATIENCE = 900.0  # seconds without room, after which results are given up one by one; their links live a day

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


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
        self._first = asyncio.Lock()  # while the disk is full, one finds out for all
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
        if _is_full(problem):
            async with self._first:
                files, problem = await self._attempt(record)  # whoever was the first before has found room, perhaps
                while _is_full(problem) and self._seconds_full() < FULL_PATIENCE:
                    await asyncio.sleep(FULL_PAUSE)
                    files, problem = await self._attempt(record)
        self._saved(record, files, problem)

    async def _attempt(self, record: Record) -> tuple[tuple[PurePath, ...], DownloadError | None]:
        task, row = record.task, record.row
        assert task is not None
        files: tuple[PurePath, ...] = ()
        problem: DownloadError | None = None
        try:
            files = await self._saver.save(
                task,
                key=record.key,
                index=record.index,
                identity=record.identity,
                saved=() if row is None else row.files,
            )
        except DownloadError as error:
            files, problem = tuple(error.files), error
        self._note_room(problem)
        return files, problem

    def _note_room(self, problem: DownloadError | None) -> None:
        if _is_full(problem):
            if self._full_since is None:
                self._full_since = time.monotonic()
                logger.warning("saving waits for room on the disk: %s", problem, extra={"event": "disk_full"})
        elif problem is None and self._full_since is not None:
            logger.warning(
                "there is room on the disk again after %.0f s", self._seconds_full(), extra={"event": "disk_has_room"}
            )
            self._full_since = None

    def _seconds_full(self) -> float:
        return 0.0 if self._full_since is None else time.monotonic() - self._full_since


def _is_full(problem: DownloadError | None) -> bool:
    cause = None if problem is None else problem.__cause__
    return isinstance(cause, OSError) and cause.errno in _FULL
