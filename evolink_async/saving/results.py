"""`client.save`: the links of a completed task, or one link, into a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from evolink_async.errors import DownloadError, EvoLinkError, InvalidRequestError
from evolink_async.http.media import MediaSource, describe, place_of
from evolink_async.polling.endings import conclude
from evolink_async.saving.download import Download, LinkGone, gone_error, most_bytes
from evolink_async.saving.folder import PartFile, find_whole, in_thread
from evolink_async.saving.names import stem_of_url, unique_stem
from evolink_async.types import Task

if TYPE_CHECKING:
    from evolink_async.client import AsyncEvoLink

__all__ = ["save_results"]

logger = logging.getLogger("evolink_async.saving")

_PAID = "The generation itself is done and paid: don't repeat it for this"


async def save_results(client: AsyncEvoLink, source: Task | str, directory: str | os.PathLike[str]) -> list[Path]:
    """Save every link of a completed task, or one URL, into a folder: the paths, in the order of the links.

    A task's files are named `{task id}-{n}.{ext}`, n from 1, the extension from the content; a URL's file after its
    last path segment, or `result`. The folder is made if it is missing. Each file appears whole or not at all, and
    never in the place of a different one. What an earlier call has saved of a task, and is whole, is not fetched
    again. A task whose links are missing (rows of `tasks.list`) or dead is looked up once for fresh ones; one that
    has no links at all gives an empty list.

    Only http(s) links to public addresses are fetched (and to the API's own host and port), unless the client was
    made with `allow_private_hosts=True`; redirects are checked likewise, five at most. Never with the key. An image
    may have 100 MB, anything else 4 GB; a transfer below 1 kB/s for 30 s is cut, resumed, and given up after seven
    attempts or 300 s without progress. The bounds are our guess; the links' 24 hours are documented.

    Raises `InvalidRequestError` for a task that isn't finished, the task's own error for one that failed,
    `ResultExpiredError` for dead links and `DownloadError` for anything else that went wrong. If a task has several
    links, the others are still saved before the first one's error is raised; a note names them.
    Cancelling it, or closing the client (`ClosedError`), leaves whole files only. Since 0.1.0.
    """
    folder = _checked_folder(directory)
    if isinstance(source, str):
        if not source.lower().startswith(("https://", "http://")):
            raise InvalidRequestError(
                f"give a Task or an http(s) link to save, got {source[:80]!r}; "
                "a task's id is turned into a Task by client.tasks.get"
            )
        save_link = _save_link(client, source, folder, stem_of_url(source))
        return [await client._open().until_closed(save_link)]
    if not isinstance(source, Task):
        raise InvalidRequestError(f"give a Task or an http(s) link to save, got {type(source).__name__}")
    task = _finished(source)
    return await client._open().until_closed(_TaskResults(client, task, folder).save())


def _finished(task: Task) -> Task:
    if not task.is_terminal:
        raise InvalidRequestError(
            f"task {task.id} is {task.status}, there is nothing to save yet: wait with client.tasks.wait({task.id!r})"
        )
    return conclude(task)


def _checked_folder(directory: str | os.PathLike[str]) -> Path:
    try:
        folder = Path(directory)
    except TypeError:
        message = f"directory must be a path, got {type(directory).__name__}"
        raise InvalidRequestError(message, param="directory") from None
    if "\0" in str(folder):
        raise InvalidRequestError("directory holds a NUL character", param="directory")
    return folder


class _TaskResults:
    """The links of one task, which are looked up again at most once."""

    def __init__(self, client: AsyncEvoLink, task: Task, folder: Path) -> None:
        self._client = client
        self._task = task
        self._folder = folder
        self._fresh: Task | None = None

    async def save(self) -> list[Path]:
        task = self._task if self._task.urls else await self._read_again() or self._task
        saved: list[Path] = []
        first: DownloadError | None = None
        for n in range(1, len(task.urls) + 1):
            try:
                saved.append(await self._save_one(n, task.urls[n - 1]))
            except DownloadError as error:
                first = first or error
        if first is not None:
            if saved:
                first.add_note(f"saved: {', '.join(map(str, saved))}")
            raise first
        return saved

    async def _save_one(self, n: int, link: str) -> Path:
        stem = f"{unique_stem(self._task.id)}-{n}"
        there = await in_thread(find_whole, self._folder, stem)
        if there is not None:
            return there
        return await _save_link(
            self._client,
            link,
            self._folder,
            stem,
            task=self._task,
            about=f"result {n} of task {self._task.id}: ",
            renew=lambda: self._fresh_link(n),
        )

    async def _fresh_link(self, n: int) -> str | None:
        fresh = await self._read_again()
        return fresh.urls[n - 1] if fresh is not None and len(fresh.urls) >= n else None

    async def _read_again(self) -> Task | None:
        """The task as the service knows it now, asked for once; None if it knows no such completed task."""
        if self._fresh is None:
            try:
                self._fresh = await self._client.tasks.get(self._task.id)
            except EvoLinkError as error:
                logger.info("task %s could not be looked up for fresh links: %s", self._task.id, error)
                self._fresh = self._task
        return self._fresh if self._fresh.succeeded else None


async def _no_fresh_link() -> str | None:
    return None


async def _save_link(
    client: AsyncEvoLink,
    link: str,
    folder: Path,
    stem: str,
    *,
    task: Task | None = None,
    about: str = "",
    renew: Callable[[], Awaitable[str | None]] = _no_fresh_link,
) -> Path:
    part = PartFile(folder)
    try:
        try:
            await in_thread(part.open)
            most = most_bytes(task.kind) if task is not None and task.kind else None
            download = Download(
                link, part, lambda: _media_source(client), client._options.retry, most=most, renew=renew
            )
            ending = await download.run()
            path = await in_thread(part.publish, f"{stem}.{ending}")
        finally:
            part.discard()
    except LinkGone as gone:
        error: DownloadError = gone_error(gone, link, _age(task))
        raise _worded(error, about) from None
    except DownloadError as error:
        raise _worded(error, about) from error.__cause__
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise _worded(DownloadError(f"cannot write into {str(folder)!r}: {reason}"), about) from error
    logger.debug("saved %s as %s (%d bytes)", describe(link), path, part.size)
    return path


def _worded(error: DownloadError, about: str) -> DownloadError:
    """The error with what it is about and what to do about it."""
    return type(error)(f"{about}{error.message}. {_PAID}")


def _age(task: Task | None) -> float | None:
    if task is None or task.created is None:
        return None
    return max(0.0, (datetime.now(UTC) - task.created).total_seconds())


def _media_source(client: AsyncEvoLink) -> MediaSource:
    session, options = client._open(), client._options
    own = frozenset({place_of(options.base_url), place_of(options.files_url)})
    return MediaSource(session.downloads, own, allow_private=options.allow_private_hosts)
