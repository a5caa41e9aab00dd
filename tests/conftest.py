"""What every test gets: a secret key that must show nowhere, a clean environment, and a check that nothing is left."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import gc
import inspect
import itertools
import logging
import os
import random
import secrets
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from postgres import Postgres, passwords, running
from support import assert_nothing_left, contents, transports

from evolink_async import AsyncEvoLink
from evolink_async.emulator import Emulator
from evolink_async.http.transport import SlotTransport

# A busy machine is no fault of what is tested.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-asyncio asks for "the" event loop of the thread before each test; where none is set, Python 3.11 makes one
    # that nobody closes.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    config.add_cleanup(loop.close)
    if sys.version_info < (3, 12):
        _parse_without_collections(config)


def _parse_without_collections(config: pytest.Config) -> None:
    """Python 3.11 cannot parse while it parses, as when a collection in the middle has a traceback formatted.

    It says "AST constructor recursion depth mismatch". Hypothesis parses whole modules.
    """
    parse = ast.parse

    @functools.wraps(parse)
    def parse_whole(*args: Any, **options: Any) -> Any:
        collecting = gc.isenabled()
        gc.disable()
        try:
            return parse(*args, **options)
        finally:
            if collecting:
                gc.enable()

    ast.parse = parse_whole  # type: ignore[assignment]
    config.add_cleanup(lambda: setattr(ast, "parse", parse))


@pytest.fixture(scope="session", autouse=True)
def _remember_transports() -> Iterator[None]:
    original = SlotTransport.__init__

    @functools.wraps(original)
    def remembering(self: SlotTransport, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        transports.add(self)

    SlotTransport.__init__ = remembering  # type: ignore[method-assign]
    yield
    SlotTransport.__init__ = original  # type: ignore[method-assign]


class _Everything(logging.Handler):
    """Keeps every formatted line, with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record) + repr(record.args))


@pytest.fixture
def api_key() -> str:
    """The secret of this test."""
    return f"sk-canary-{secrets.token_hex(12)}"


@pytest.fixture(autouse=True)
def _canary(
    api_key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[None]:
    """The key is in the environment, and no secret may be found in a log line or a file of the test afterwards."""
    for name in _PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in [name for name in os.environ if name.startswith("EVOLINK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EVOLINK_API_KEY", api_key)
    handler = _Everything()
    root, ours = logging.getLogger(), logging.getLogger("evolink_async")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG)
    yield
    root.removeHandler(handler)
    ours.setLevel(level)
    for name, secret in (("API key", api_key), *(("database's password", password) for password in passwords)):
        leaks = [line for line in handler.lines if secret in line]
        assert not leaks, f"the {name} is in the log: {leaks[:3]}"
        written = [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in contents(path)]
        assert not written, f"the {name} is in files: {written}"


MEMORY = Path("/dev/shm")


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where the system has one: for ledgers whose many small commits say nothing about a disk."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="evolink-test-", dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server, started when something is asked of it for the first time."""
    with running() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """A database that is new and empty."""
    url = postgres.create()
    yield url
    postgres.drop(url)


@pytest.fixture(params=["file", "postgresql"])
def new_ledger(request: pytest.FixtureRequest) -> Iterator[Callable[[], Path | str]]:
    """Gives places where a ledger can be made: once files, once databases."""
    if request.param == "file":
        folder: Path = request.getfixturevalue("quick_path")
        names = itertools.chain(["job.db"], (f"job{number}.db" for number in itertools.count(2)))
        yield lambda: folder / next(names)
        return
    server: Postgres = request.getfixturevalue("postgres")
    with contextlib.ExitStack() as stack:

        def lend() -> str:
            url = server.lend()
            stack.callback(server.give_back, url)
            return url

        yield lend


@pytest.fixture
def ledger_url(new_ledger: Callable[[], Path | str]) -> Path | str:
    """Where a ledger can be made: once a file, once a database."""
    return new_ledger()


@pytest.fixture(autouse=True)
def _chance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On virtual time chance comes from a seed (another: `CHANCE=2 pytest`): what is found once is found again."""
    if request.node.get_closest_marker("looptime") is None:
        return
    seed, unseeded, count = os.environ.get("CHANCE", "1"), random.Random, itertools.count()
    print(f"chance: CHANCE={seed}")
    random.seed(seed)
    monkeypatch.setattr(random, "Random", lambda *given: unseeded(*given or (f"{seed} {next(count)}",)))


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port of this machine that refuses connections, and goes to nobody else as long as the test runs."""
    with socket.socket() as taken:
        taken.bind(("", 0))  # and nobody listens
        yield int(taken.getsockname()[1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        test = getattr(item, "obj", None)
        if inspect.iscoroutinefunction(test):
            item.obj = _checked(test)  # type: ignore[attr-defined]


def _checked(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    async def checked(*args: Any, **kwargs: Any) -> None:
        await test(*args, **kwargs)
        await assert_nothing_left()

    return checked


@pytest.fixture
async def emulator(api_key: str) -> AsyncIterator[Any]:
    """A running emulator on a real port: `.base_url`, `.api_key`, `.emulator`. Fast: 100 times real speed."""
    async with Emulator(speed=100, seed=1, api_key=api_key).serve() as server:
        yield server


@pytest.fixture
async def client(emulator: Any) -> AsyncIterator[AsyncEvoLink]:
    """A client of the running emulator."""
    async with AsyncEvoLink(base_url=emulator.base_url) as client:
        yield client


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    """Debian's chromium, for tests marked `browser`."""
    from browser import chromium

    async with chromium() as browser:
        yield browser
