"""The `evolink-async` command. Needs the extra `cli`; importing this package needs nothing."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA = ("typer", "rich", "click")


def main() -> None:
    """Run the command line and exit."""
    try:
        _main()
    except KeyboardInterrupt:  # while it was starting, so nothing was begun
        sys.exit(130)


def _main() -> None:
    try:
        import rich  # noqa: F401  (typer does without it, we don't)

        from evolink_async.cli.app import start
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        message = f"evolink-async needs {error.name}, which is not installed: pip install 'evolink-async[cli]'"
        print(message, file=sys.stderr)
        sys.exit(2)
    start()
