"""`client.save`: the links of a completed task, or one link, into a folder or an object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from evolink_async.errors import InvalidRequestError
from evolink_async.saving.objects import ObjectPath
from evolink_async.saving.saver import Saver
from evolink_async.types import Task

if TYPE_CHECKING:
    from evolink_async.core import ClientCore

__all__ = ["save_results"]


async def save_results(
    core: ClientCore, source: Task | str, directory: str | os.PathLike[str]
) -> list[Path] | list[ObjectPath]:
    """See `AsyncEvoLink.save`."""
    saver = Saver(core, directory)
    if isinstance(source, Task):
        if not source.is_terminal:
            raise InvalidRequestError(
                f"task {source.id} is {source.status}, there is nothing to save yet: "
                f"wait with client.tasks.wait({source.id!r})"
            )
        return cast("list[Path] | list[ObjectPath]", list(await saver.save_as_itself(source)))
    if not isinstance(source, str):
        hint = "; an outcome has a .task" if hasattr(source, "task") else ""
        raise InvalidRequestError(f"give a Task or an http(s) link to save, got {type(source).__name__}{hint}")
    if not source.lower().startswith(("https://", "http://")):
        raise InvalidRequestError(
            f"give a Task or an http(s) link to save, got {source[:80]!r}; "
            "a task's id is turned into a Task by client.tasks.get"
        )
    return cast("list[Path] | list[ObjectPath]", [await saver.save_link(source)])
