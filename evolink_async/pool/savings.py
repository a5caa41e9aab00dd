"""Completed tasks whose results are being saved, by a fixed number of workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from evolink_async.errors import DownloadError
from evolink_async.pool.record import Record
from evolink_async.saving.crew import Crew
from evolink_async.saving.saver import Saver

WORKERS = 32  # the saver has fewer connections than that


class Savings:
    """Saves the results of records, as many at once as there are workers.

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
        self._saved(record, files, problem)
