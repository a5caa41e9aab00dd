"""The pytest plugin: the fixtures `evolink_emulator` and `evolink_client`. How to use it: docs/testing.md.

pytest loads this file in every run of everybody who has the package installed. So it imports nothing but pytest; what
a fixture needs is imported when a test asks for it. Hooks have the old style of wrapper, which every pytest knows.
"""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from evolink_async.client import AsyncEvoLink
    from evolink_async.testing.background import BackgroundEmulator

SPEED = 1000  # a video takes a fifth of a second, a link lives for 86
_MARKERS = (
    "evolink_emulator(**options): options of the emulator that the fixtures evolink_emulator and evolink_client serve, "
    "such as speed=1000, failure_share=0.5, rate=5, credits=100",
    "evolink_faults(*faults): what goes wrong on purpose in that emulator, each fault a dict such as "
    '{"method": "POST", "nth": 1, "drop": "after"}',
)

_EMULATOR = pytest.StashKey["BackgroundEmulator"]()
_CLIENT = pytest.StashKey["AsyncEvoLink"]()


# Options


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("evolink_async").addoption(
        "--evolink-seed",
        type=_seed,
        metavar="N|random",
        help="seed of the emulators: a number, or a random one for this run "
        "(default: from each test's name, the same in every run)",
    )


def _seed(text: str) -> int | str:
    if text == "random":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a seed is a whole number or 'random', not {text!r}") from None


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if config.option.evolink_seed == "random":
        controller = getattr(config, "workerinput", {})  # of pytest-xdist, in its workers
        config.option.evolink_seed = controller.get("evolink_seed", int.from_bytes(os.urandom(4), "big"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker of pytest-xdist the seed that was drawn."""
    node.workerinput["evolink_seed"] = node.config.option.evolink_seed


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.option.evolink_seed
    return None if seed is None else f"evolink: --evolink-seed={seed}"


# Fixtures


@pytest.fixture
def evolink_emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[BackgroundEmulator]:
    """A local EvoLink on a real port, for this test alone.

    It has `.base_url`, `.api_key`, `.book()`, `.set_faults([...])`, `.faults()`, `.advance(seconds)`, `.end(task_id)`,
    `.set_account(...)`, `.reset()`, `.options` and `.seed`. While the test runs, EVOLINK_BASE_URL,
    EVOLINK_FILES_BASE_URL and EVOLINK_API_KEY name it, so a plain `AsyncEvoLink()` in the code under test finds it, and
    never the real service.
    """
    with ExitStack() as stack:
        emulator = _started(_options(request.node), stack)
        request.node.stash[_EMULATOR] = emulator
        for name, value in _environment(emulator).items():
            monkeypatch.setenv(name, value)
        yield emulator


@pytest.fixture
def evolink_client(request: pytest.FixtureRequest, evolink_emulator: BackgroundEmulator) -> Generator[AsyncEvoLink]:
    """An `AsyncEvoLink` for the emulator of this test, closed at its end in the loop that the test ran in."""
    from evolink_async.client import AsyncEvoLink
    from evolink_async.testing.closing import close

    client = AsyncEvoLink(evolink_emulator.api_key, base_url=evolink_emulator.base_url)
    request.node.stash[_CLIENT] = client
    yield client
    del request.node.stash[_CLIENT]
    close(client)


def _started(options: Mapping[str, Any], stack: ExitStack) -> BackgroundEmulator:
    from evolink_async.testing.background import BackgroundEmulator

    try:
        return stack.enter_context(BackgroundEmulator(**options))
    except (TypeError, ValueError) as error:
        reason = f"the emulator refuses the options of this test's markers: {error}"
    except (ImportError, OSError) as error:  # which name the extra, or the address
        reason = f"evolink_emulator can't start: {error}"
    pytest.fail(reason, pytrace=False)


def _environment(emulator: BackgroundEmulator) -> dict[str, str]:
    """What leads a client to the emulator, past any proxy."""
    exceptions = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if exceptions.strip() != "*":
        exceptions = ",".join(filter(None, (exceptions, "127.0.0.1")))
    return {
        "EVOLINK_BASE_URL": emulator.base_url,
        "EVOLINK_FILES_BASE_URL": emulator.base_url,
        "EVOLINK_API_KEY": emulator.api_key,
        "NO_PROXY": exceptions,
        "no_proxy": exceptions,
    }


# What the markers ask for


def _options(item: pytest.Item) -> dict[str, Any]:
    """The emulator's options for a test: its markers', above the defaults."""
    options: dict[str, Any] = {"speed": SPEED, "seed": _seed_of(item), **_marked_options(item)}
    faults = _marked_faults(item)
    return options if faults is None else {**options, "faults": faults}


def _seed_of(item: pytest.Item) -> int:
    seed: int | None = item.config.option.evolink_seed
    return zlib.crc32(item.nodeid.encode(errors="backslashreplace")) if seed is None else seed


def _marked_options(item: pytest.Item) -> dict[str, Any]:
    """What the markers `evolink_emulator` say; for each option the one nearest to the test."""
    options: dict[str, Any] = {}
    for marker in chain.from_iterable(_markers(item, "evolink_emulator")):
        if marker.args:
            pytest.fail("the marker evolink_emulator takes options by name, such as speed=1000", pytrace=False)
        options |= marker.kwargs
    if "faults" in options:
        pytest.fail("faults have a marker of their own: evolink_faults({...}, {...})", pytrace=False)
    return options


def _marked_faults(item: pytest.Item) -> list[Any] | None:
    """The faults of the markers `evolink_faults` at the test; without any there those at its class; and so on."""
    nearest = next(filter(None, reversed(_markers(item, "evolink_faults"))), None)
    if nearest is None:
        return None
    faults = [fault for marker in nearest for fault in marker.args]
    if any(marker.kwargs for marker in nearest) or any(isinstance(fault, list | tuple) for fault in faults):
        pytest.fail("the marker evolink_faults takes dicts: evolink_faults({...}, {...})", pytrace=False)
    return faults


def _markers(item: pytest.Item, name: str) -> list[list[pytest.Mark]]:
    """The markers of a name, from those of the outermost node to the test's own."""
    return [[marker for marker in node.own_markers if marker.name == name] for node in item.listchain()]


# Around a test


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Have a coroutine test close what its client has opened before its loop ends, whichever plugin runs the loop."""
    client = item.stash.get(_CLIENT, None)
    if client is None:
        yield
        return
    from evolink_async.testing.closing import leaving_its_loop

    with leaving_its_loop(item, client):
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any]:
    """Show in a failure's report what the emulator of the test has seen, and how to have the same one again."""
    outcome = yield
    emulator = item.stash.get(_EMULATOR, None)
    if emulator is None:
        return
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("evolink emulator", _summary(item, emulator)))
    if call.when == "teardown":
        del item.stash[_EMULATOR]


def _summary(item: pytest.Item, emulator: BackgroundEmulator) -> str:
    from evolink_async.testing.summary import summarize

    repeat = "set by its marker" if "seed" in _marked_options(item) else f"repeat with --evolink-seed={emulator.seed}"
    try:
        lines = summarize(emulator.options, emulator.book(), emulator.faults())
    except TimeoutError as error:  # a report never fails
        lines = [str(error)]
    return "\n".join([f"seed: {emulator.seed}, {repeat}", *lines])
