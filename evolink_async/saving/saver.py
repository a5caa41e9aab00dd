"""`Saver`: results of completed tasks into one folder or object store. `client.save` and a pool's `save_to` use it.

For a pool. One for its life, made when the options are checked, as nothing is bound to a loop and nothing touched yet:

    saver = Saver(core, save_to)               # ConfigurationError: no folder, no known store, extra missing
    await saver.prepare()                        # entering the block, before anything is paid: ConfigurationError if
                                                 # nothing can be written there
    files = await saver.save(                    # after a task has completed; as many at once as you like
        task,
        key=request.key, index=index, identity=identity,       # what its files are named after
        saved=row.files,                         # what an earlier run has recorded: `job.saved(row, map(str, files))`
    )

It returns the paths in the order of the task's links, all of them whole, durable and under their names. Nothing is
fetched for a link whose file is there: one of `saved` that is whole (where nothing is at its path, under its name in
the present folder: the folder was moved), or one in the folder that carries the mark of this very result (a run that
was killed between saving and recording). A mark of another result is always heeded. Anything else under the name is
compared with what is fetched, kept if it is the same, and otherwise left alone: `DownloadError`.

Whole means: a regular file of the size in its mark, or (no mark, or somebody edited it) one whose first bytes are of
the type of its extension and whose structure has its end, for types that tell: PNG, JPEG, GIF, WebP, WAV, MP4 and kin.
A file gets its name only when it is whole and synced, so nothing of ours is ever cut; sizes needn't be recorded.

Raises `ResultExpiredError`, or `DownloadError` for anything else that went wrong: `.files` has what was saved all the
same. Never an error of the pool; never `OSError`. `ClosedError` when the client is closed.

A cancelled `save` leaves files under their names whole, and removes its temporary one before the cancellation goes on.
An upload to an object store that is under way may still end; the object is whole or not there.

At most 128 files of a client are in the making at once, over at most 24 connections that polls and submissions don't
use; the others wait in order, holding nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol

from evolink_async.errors import ConfigurationError, DownloadError, EvoLinkError
from evolink_async.http.media import MediaSource, describe
from evolink_async.polling.endings import conclude
from evolink_async.saving.download import Download, LinkGone, gone_error, most_bytes
from evolink_async.saving.folder import Folder, PartFile, in_thread, in_thread_alone, is_full
from evolink_async.saving.names import request_stem, stem_of_url, unique_stem
from evolink_async.saving.objects import Bucket, ObjectPath, as_written, is_object_store, path_of
from evolink_async.tasks import Tasks
from evolink_async.types import Task

if TYPE_CHECKING:
    from evolink_async.core import ClientCore

__all__ = ["SavedPath", "Saver"]

logger = logging.getLogger("evolink_async.saving")

SavedPath = Path | ObjectPath
_PAID = "The generation itself is done and paid: don't repeat it for this"


class Place(Protocol):
    """Where files are saved. All of it blocks."""

    part_folder: Path
    lingers: bool  # publishing may take minutes: a cancellation doesn't wait for its end

    def prepare(self) -> None: ...
    def case_matters(self) -> bool: ...
    def find(self, stem: str, result: str | None, *, by_name: bool, kind: str | None = None) -> SavedPath | None: ...
    def kept(self, file: PurePath, result: str) -> SavedPath | None: ...
    def publish(self, part: PartFile, name: str, result: str | None) -> SavedPath: ...


class Saver:
    """Saves results into one folder, or under one prefix of an object store: see the module.

    directory: a path, or s3://bucket/prefix, gs://..., az://... Raises `ConfigurationError` for one that cannot be.
    """

    def __init__(self, core: ClientCore, directory: str | os.PathLike[str]) -> None:
        self._core = core
        self._place = place_at(directory)

    async def prepare(self) -> None:
        """Make the folder, and see that it can be written to. Raises `ConfigurationError`."""
        try:
            await in_thread(self._place.prepare)
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(f"cannot write into {self._place}: {_reason(error)}") from error

    async def save(
        self,
        task: Task,
        *,
        key: str | None,
        index: int | None,
        identity: str,
        saved: Sequence[str] = (),
        fresh: Callable[[], Awaitable[Task]] | None = None,
    ) -> tuple[SavedPath, ...]:
        """Save every result of a completed task: the paths, in the order of its links.

        Named `{key}-{n}.{ext}`, without a key `{index:06d}-{first 8 of identity}-{n}.{ext}`. All else: see the module.
        fresh: gives the task again, for links that are dead or missing; asked once; by default the service is.
        """

        def stem(case_matters: bool) -> str:
            return request_stem(key, index, identity, case_matters=case_matters)

        job = _TaskSaving(self._core, self._place, task, stem, by_name=False, saved=saved, fresh=fresh)
        return await self._core.open().until_closed(job.run())

    async def save_as_itself(self, task: Task) -> tuple[SavedPath, ...]:
        """`save` for one task alone: its files are named after its id."""

        def stem(case_matters: bool) -> str:
            return unique_stem(task.id, case_matters=case_matters)

        job = _TaskSaving(self._core, self._place, task, stem, by_name=True)
        return await self._core.open().until_closed(job.run())

    async def save_link(self, link: str) -> SavedPath:
        """Save what one link leads to, named after its last path segment."""
        saving = _LinkSaving(self._core, self._place, link, lambda _: stem_of_url(link), renew=_no_fresh_link)
        return await self._core.open().until_closed(saving.run())


def place_at(directory: str | os.PathLike[str]) -> Place:
    """The folder or object store of this name. Raises `ConfigurationError` for what is neither."""
    directory = as_written(directory)
    if is_object_store(directory):
        return Bucket(str(directory))
    try:
        folder = Path(directory)
    except TypeError:
        raise ConfigurationError(f"directory must be a path, got {type(directory).__name__}") from None
    if "\0" in str(folder):
        raise ConfigurationError("directory holds a NUL character")
    return Folder(folder)


class _TaskSaving:
    """The links of one task, which are looked up again at most once.

    stem: names its files. by_name: only this task can have given a file such a name.
    """

    def __init__(
        self,
        core: ClientCore,
        place: Place,
        task: Task,
        stem: Callable[[bool], str],
        *,
        by_name: bool,
        saved: Sequence[str] = (),
        fresh: Callable[[], Awaitable[Task]] | None = None,
    ) -> None:
        self._core = core
        self._place = place
        self._task = conclude(task)
        self._stem = stem
        self._by_name = by_name
        self._saved = saved
        self._ask = fresh or (lambda: Tasks(core).get(task.id))
        self._fresh: Task | None = None

    async def run(self) -> tuple[SavedPath, ...]:
        task = self._task
        kept = await in_thread(self._kept) if self._saved else {}
        if kept and len(kept) >= max(len(task.urls), len(self._saved)):
            return tuple(path for _, path in sorted(kept.items()))
        if not task.urls:
            task = await self._read_again() or task
        files: list[SavedPath] = []
        first: DownloadError | None = None
        for n, link in enumerate(task.urls, 1):
            try:
                files.append(kept[n] if n in kept else await self._save_one(n, link))
            except DownloadError as error:
                first = first or error
        if first is not None:
            first.files = tuple(files)
            if files:
                first.add_note(f"saved: {', '.join(map(str, files))}")
            raise first
        return tuple(files)

    def _kept(self) -> dict[int, SavedPath]:
        """What an earlier run has saved and is still there, by number."""
        kept = ((n, self._place.kept(path_of(text), _result(self._task, n))) for n, text in enumerate(self._saved, 1))
        return {n: path for n, path in kept if path is not None}

    async def _save_one(self, n: int, link: str) -> SavedPath:
        saving = _LinkSaving(
            self._core,
            self._place,
            link,
            lambda case_matters: f"{self._stem(case_matters)}-{n}",
            task=self._task,
            number=n,
            by_name=self._by_name,
            renew=lambda: self._fresh_link(n),
        )
        return await saving.run()

    async def _fresh_link(self, n: int) -> str | None:
        fresh = await self._read_again()
        return fresh.urls[n - 1] if fresh is not None and len(fresh.urls) >= n else None

    async def _read_again(self) -> Task | None:
        """The task as the service knows it now, asked for once; None if it knows no such completed task."""
        if self._fresh is None:
            try:
                self._fresh = await self._ask()
            except EvoLinkError as error:
                logger.info(
                    "task %s could not be looked up for fresh links: %s",
                    self._task.id,
                    error,
                    extra={"event": "links_not_renewed", "task_id": self._task.id},
                )
                self._fresh = self._task
        return self._fresh if self._fresh.succeeded else None


class _LinkSaving:
    """One link into one file. result: which result of its task it is, `<task id>/<n>`."""

    def __init__(
        self,
        core: ClientCore,
        place: Place,
        link: str,
        stem: Callable[[bool], str],
        *,
        task: Task | None = None,
        number: int = 1,
        by_name: bool = False,
        renew: Callable[[], Awaitable[str | None]],
    ) -> None:
        self._core = core
        self._place = place
        self._link = link
        self._stem = stem
        self._task = task
        self._result = None if task is None else _result(task, number)
        self._by_name = by_name
        self._about = "" if task is None else f"result {number} of task {task.id}: "
        self._renew = renew

    async def run(self) -> SavedPath:
        media = self._core.open().media
        async with media.places:
            try:
                return await self._save(media)
            except LinkGone as gone:
                error: DownloadError = gone_error(gone, self._link, _age(self._task))
                raise self._worded(error) from None
            except DownloadError as error:
                raise self._worded(error) from error.__cause__
            except (OSError, UnicodeError) as error:
                full = ": make room and save again" if isinstance(error, OSError) and is_full(error) else ""
                where = repr(str(self._place.part_folder)) if self._place.lingers else self._place
                message = f"cannot write into {where}: {_reason(error)}{full}"
                raise self._worded(DownloadError(message)) from error

    async def _save(self, media: MediaSource) -> SavedPath:
        part = PartFile(self._place.part_folder)
        handed_over = False
        try:
            there, stem = await in_thread(self._begin, part)
            if there is not None:
                return there
            kind = None if self._task is None else self._task.kind
            most = most_bytes(kind) if kind else None
            retry = self._core.options.retry
            ending = await Download(self._link, part, media, retry, most=most, renew=self._renew).run()
            publish = self._place.publish, part, f"{stem}.{ending}", self._result
            handed_over = self._place.lingers
            path = await (in_thread_alone(part.discard, *publish) if handed_over else in_thread(*publish))
        finally:
            if not handed_over:
                part.discard()
        logger.debug(
            "saved %s as %s (%d bytes)",
            describe(self._link),
            path,
            part.size,
            extra={
                "event": "saved",
                "task_id": None if self._task is None else self._task.id,
                "path": str(path),
                "size": part.size,
            },
        )
        observer = self._core.observation.observer
        if observer is not None:
            observer.downloaded(part.size)
        return path

    def _begin(self, part: PartFile) -> tuple[SavedPath | None, str]:
        """Look for the file; if it isn't there, open a temporary one. Blocks."""
        stem = self._stem(self._place.case_matters())
        there = None
        if self._result is not None:
            kind = None if self._task is None else self._task.kind
            there = self._place.find(stem, self._result, by_name=self._by_name, kind=kind)
        if there is None:
            part.open()
        return there, stem

    def _worded(self, error: DownloadError) -> DownloadError:
        """The error with what it is about and what to do about it."""
        return type(error)(f"{self._about}{error.message}. {_PAID}")


async def _no_fresh_link() -> str | None:
    return None


def _result(task: Task, number: int) -> str:
    """Which result of which task, as marks say it."""
    return f"{task.id}/{number}"


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _age(task: Task | None) -> float | None:
    if task is None or task.created is None:
        return None
    return max(0.0, (datetime.now(UTC) - task.created).total_seconds())
