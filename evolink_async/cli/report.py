"""`report`, and the report that ends a run: never worth more than the run itself."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from evolink_async.cli.outputs import Standard
from evolink_async.errors import EvoLinkError
from evolink_async.report import write_report
from evolink_async.report.files import REPORT

if TYPE_CHECKING:
    from evolink_async.cli.view import Screen


def make_report(folder: str) -> int:
    """Write the report of a folder, and its path to standard output."""
    try:
        path = asyncio.run(write_report(folder))
    except OSError as error:
        raise EvoLinkError(
            f"cannot write {REPORT} into {folder}: {error.strerror or error}; "
            "where nothing may be written, copy the folder and make the report there"
        ) from error
    Standard().line(str(path))
    return 0


async def report_at_the_end(screen: Screen, folder: Path) -> None:
    """Write the report of a run that has ended. If that fails, it is told and nothing else comes of it."""
    try:
        path = await write_report(folder)
    except Exception as error:  # noqa: BLE001  (a run has ended as it has, whatever becomes of its picture)
        why = error if isinstance(error, EvoLinkError | OSError) else f"{type(error).__name__}: {error}"
        again = shlex.join(["evolink-async", "report", str(folder)])
        screen.say(f"no report was written: {why}; `{again}` tries again", style="yellow")
    else:
        screen.say(f"look at it: {path}")
