"""`emulator`: a local EvoLink on a port."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolink_async.errors import ConfigurationError

if TYPE_CHECKING:
    from evolink_async.cli.view import Screen
    from evolink_async.emulator import Emulator, Server


def emulator_with(**options: Any) -> Emulator:
    """An emulator. Raises `ConfigurationError` for a wrong option, or when its extra is not installed."""
    try:
        import_module("evolink_async.emulator.server")  # used when it serves; if it can't be, say so now
        from evolink_async.emulator import Emulator
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the emulator needs {error.name}, which is not installed: pip install 'evolink-async[cli,emulator]'"
        ) from None
    try:
        return Emulator(**options)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def serve(screen: Screen, host: str, port: int, files: Mapping[str, str | None], options: Mapping[str, Any]) -> int:
    """Serve until SIGINT or SIGTERM: 0, as a server that is told to stop has done its work.

    ``files`` are JSON files by the option that they hold.
    """
    held = {name: _content(file) for name, file in files.items() if file is not None}
    emulator = emulator_with(**options, **held)

    def started(server: Server) -> None:
        screen.verbatim(f"EvoLink emulator at {server.base_url}, {options['speed']:g} times real speed; Ctrl-C ends it")
        screen.verbatim(f"export EVOLINK_BASE_URL={server.base_url} EVOLINK_API_KEY={server.api_key}")

    try:
        emulator.run(host, port, on_start=started)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return 0


def _content(name: str) -> Any:
    try:
        return json.loads(Path(name).read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read {name}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigurationError(f"{name} is not JSON: {error}") from None
