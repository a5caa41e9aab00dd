"""`write_report`: from a folder to its page."""

from __future__ import annotations

import asyncio
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from evolink_async.errors import ConfigurationError
from evolink_async.report.files import REPORT
from evolink_async.report.items import Contents
from evolink_async.report.reading import read_folder


async def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into the folder of a run, over an older one, and give its path.

    The folder holds what `evolink-async run` left there, also a run that was killed, or the ledger (`job.db`) and files
    of a pool of your own. Reading a ledger is possible while its job runs.

    Raises `ConfigurationError` if there is nothing of a run in the folder or the extra `report` is not installed,
    `LedgerError` for a ledger that can't be used, `OSError` if the page cannot be written. Cancelled, it may still
    write the page.
    """
    path = Path(folder)
    try:
        import jinja2  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"a report needs {error.name}, which is not installed: pip install 'evolink-async[report]'"
        ) from None
    contents = await read_folder(path)
    return await asyncio.to_thread(_write, path, contents)


def _write(folder: Path, contents: Contents) -> Path:
    """Make the page and put it in its place in one step, so that nobody ever sees half of it."""
    from evolink_async.report.page import image_files, render
    from evolink_async.report.previews import previews

    page = render(contents, previews(folder, image_files(contents)), datetime.now(UTC))
    path, temporary = folder / REPORT, folder / f".{REPORT}.{os.getpid()}-{threading.get_ident()}"
    try:
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path
