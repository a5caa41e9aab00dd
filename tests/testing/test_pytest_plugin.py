"""The pytest plugin, in pytest runs of its own: with each plugin that runs coroutine tests, and without any."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading

import pytest

from evolink_async import AsyncEvoLink, PermissionDeniedError
from evolink_async.emulator import Emulator
from evolink_async.http.transport import SlotTransport
from evolink_async.testing.background import BackgroundEmulator
from evolink_async.testing.summary import summarize

pytest_plugins = ["pytester"]

INI = """
[pytest]
addopts = --strict-markers --strict-config -p no:cacheprovider
filterwarnings = error
asyncio_default_fixture_loop_scope = function
"""
IMPORTS = """
import asyncio, os, urllib.request
import pytest
from evolink_async import AsyncEvoLink
"""
RUNNERS = {
    "pytest-asyncio strict": "pytestmark = pytest.mark.asyncio",
    "pytest-asyncio auto": "",
    "anyio": """
pytestmark = pytest.mark.anyio
@pytest.fixture
def anyio_backend(): return "asyncio"
""",
}
every_runner = pytest.mark.parametrize("runner", RUNNERS)


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> list[SlotTransport]:
    """The transports that were let go of after their loop had closed, instead of being closed in it."""
    abandoned: list[SlotTransport] = []
    original = SlotTransport.abandon

    def abandon(self: SlotTransport) -> None:
        abandoned.append(self)
        original(self)

    monkeypatch.setattr(SlotTransport, "abandon", abandon)
    return abandoned


def run(pytester: pytest.Pytester, tests: str, *options: str, runner: str = "pytest-asyncio auto") -> pytest.RunResult:
    """Run tests in this process, with every warning an error."""
    pytester.makeini(INI + ("asyncio_mode = auto\n" if runner == "pytest-asyncio auto" else ""))
    pytester.makepyfile(IMPORTS + RUNNERS[runner] + tests)
    return pytester.runpytest_inprocess(*options)


# A client, whoever runs the loop


@every_runner
def test_a_coroutine_test_gets_a_client_that_is_closed_in_its_loop(
    runner: str, pytester: pytest.Pytester, abandoned: list[SlotTransport]
) -> None:
    tests = """
async def paid(client, emulator, prompt):
    task = await client.images.submit(model="gpt-4o-image", prompt=prompt)
    assert [post["task_id"] for post in emulator.book()["posts"]] == [task.id]

@pytest.mark.parametrize("prompt", ["a lighthouse", "a harbour"])
async def test_function(evolink_client, evolink_emulator, prompt):
    await paid(evolink_client, evolink_emulator, prompt)

class TestClass:
    prompt = "a ship"
    async def test_method(self, evolink_client, evolink_emulator):
        await paid(evolink_client, evolink_emulator, self.prompt)

@pytest.fixture
def shop(evolink_client):
    return evolink_client

async def test_through_another_fixture(shop, evolink_emulator):
    await paid(shop, evolink_emulator, "a shop")
"""
    run(pytester, tests, runner=runner).assert_outcomes(passed=4)
    assert not abandoned


@every_runner
def test_a_failing_test_closes_its_client_all_the_same(
    runner: str, pytester: pytest.Pytester, abandoned: list[SlotTransport]
) -> None:
    tests = """
clients = []
async def test_fails(evolink_client):
    clients.append(evolink_client)
    await evolink_client.credits()
    raise LookupError("on purpose")

def test_afterwards():
    assert [repr(client).split()[-1] for client in clients] == ["closed>"]
"""
    if runner != "pytest-asyncio auto":
        tests = tests.replace("def test_afterwards", "async def test_afterwards")
    result = run(pytester, tests, runner=runner)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["E * LookupError: on purpose"])
    assert not abandoned


@every_runner
def test_a_fixture_may_use_the_client_after_the_test(runner: str, pytester: pytest.Pytester) -> None:
    fixture = "pytest_asyncio.fixture" if runner == "pytest-asyncio strict" else "pytest.fixture"
    tests = f"""
import pytest_asyncio
@{fixture}
async def shop(evolink_client, evolink_emulator):
    await evolink_client.credits()
    yield evolink_client
    await evolink_client.images.submit(model="gpt-4o-image", prompt="the last one")
    assert len(evolink_emulator.book()["posts"]) == 2

async def test_shop(shop):
    await shop.images.submit(model="gpt-4o-image", prompt="the first one")
"""
    run(pytester, tests, runner=runner).assert_outcomes(passed=1)


@pytest.mark.parametrize("runner", ["pytest-asyncio strict", "anyio"])
def test_hypothesis_calls_a_test_many_times_with_one_client(
    runner: str, pytester: pytest.Pytester, abandoned: list[SlotTransport]
) -> None:
    tests = """
from hypothesis import HealthCheck, given, settings, strategies as st
paid = []
@pytest.mark.parametrize("model", ["gpt-4o-image", "z-image-turbo"])
@settings(max_examples=5, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(min_size=1, alphabet="abc"))
async def test_property(evolink_client, evolink_emulator, model, prompt):
    await evolink_client.images.submit(model=model, prompt=prompt)
    paid.append(model)
    assert len(evolink_emulator.book()["posts"]) == paid.count(model)
"""
    run(pytester, tests, runner=runner).assert_outcomes(passed=2)
    assert not abandoned


def test_in_a_loop_for_the_whole_module_nothing_is_left_for_the_next_test(pytester: pytest.Pytester) -> None:
    tests = """
pytestmark = pytest.mark.asyncio(loop_scope="module")
loops = set()

@pytest.mark.parametrize("turn", [1, 2])
async def test_turn(turn, evolink_client):
    loops.add(asyncio.get_running_loop())
    assert len(loops) == 1
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("evolink ")]
    await evolink_client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
    asyncio.get_running_loop().create_task(evolink_client.images.generate(model="gpt-4o-image", prompt="a harbour"))
    await asyncio.sleep(0.1)
"""
    result = run(pytester, tests)
    result.assert_outcomes(passed=2)


def test_a_plain_test_may_run_the_client_in_a_loop_of_its_own(pytester: pytest.Pytester) -> None:
    tests = """
def test_run(evolink_client, evolink_emulator):
    asyncio.run(evolink_client.images.submit(model="gpt-4o-image", prompt="a lighthouse"))
    assert len(evolink_emulator.book()["posts"]) == 1

def test_unused(evolink_client): pass

def test_closed(evolink_client):
    asyncio.run(evolink_client.aclose())
"""
    run(pytester, tests).assert_outcomes(passed=3)


# The emulator and the environment


def test_a_plain_test_reaches_the_emulator_with_any_client_and_past_a_proxy(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "internal.example")
    tests = """
def test_urllib(evolink_emulator):
    request = urllib.request.Request(
        os.environ["EVOLINK_BASE_URL"] + "/v1/credits",
        headers={"Authorization": "Bearer " + os.environ["EVOLINK_API_KEY"]},
    )
    opener = urllib.request.build_opener()  # urlopen's own would keep this test's proxies
    with opener.open(request) as answer:
        assert answer.status == 200
    assert evolink_emulator.book()["requests"] == {"GET /v1/credits": 1}
    assert os.environ["no_proxy"] == "internal.example,127.0.0.1"

async def test_client(evolink_emulator):
    async with AsyncEvoLink() as client:
        await client.credits()
        await client.files.quota()
"""
    run(pytester, tests).assert_outcomes(passed=2)


def test_the_environment_is_as_before_afterwards(pytester: pytest.Pytester) -> None:
    before = dict(os.environ)
    tests = """
def test_first(monkeypatch, evolink_emulator):
    assert os.environ["EVOLINK_BASE_URL"] == os.environ["EVOLINK_FILES_BASE_URL"] == evolink_emulator.base_url
    assert os.environ["EVOLINK_API_KEY"] == evolink_emulator.api_key
    monkeypatch.setenv("EVOLINK_API_KEY", "sk-another")

def test_second(evolink_emulator):
    raise LookupError("on purpose")

def test_third():
    assert "EVOLINK_BASE_URL" not in os.environ
"""
    run(pytester, tests).assert_outcomes(passed=2, failed=1)
    ours = re.compile("evolink|proxy", re.I)
    assert {name: value for name, value in os.environ.items() if ours.search(name)} == {
        name: value for name, value in before.items() if ours.search(name)
    }


def test_without_the_extra_the_error_names_it(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "evolink_async.emulator.server", raising=False)
    monkeypatch.delattr("evolink_async.emulator.server", raising=False)
    result = run(pytester, "def test_it(evolink_emulator): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["evolink_emulator can't start: *pip install 'evolink_async[[]emulator[]]'"])


# Markers


def test_faults_are_data_in_a_marker_and_can_be_replaced(pytester: pytest.Pytester) -> None:
    tests = """
from evolink_async import BadRequestError, ServerError

@pytest.mark.evolink_faults(
    {"method": "POST", "path": "/v1/images", "nth": 1, "status": 400, "body": {"error": {"code": "odd"}}}
)
async def test_faults(evolink_client, evolink_emulator):
    with pytest.raises(BadRequestError, match="odd"):
        await evolink_client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
    await evolink_client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
    assert [(fault["matched"], fault["hit"]) for fault in evolink_emulator.faults()] == [(2, 1)]
    evolink_emulator.set_faults([{"path": "/v1/credits", "status": 422}])
    with pytest.raises(BadRequestError):
        await evolink_client.credits()
    with pytest.raises(ValueError, match="a fault has no 'when'"):
        evolink_emulator.set_faults([{"when": "now"}])
"""
    run(pytester, tests).assert_outcomes(passed=1)


def test_of_the_markers_the_nearest_wins(pytester: pytest.Pytester) -> None:
    tests = """
pytestmark = [
    pytest.mark.evolink_emulator(speed=5, credits=7),
    pytest.mark.evolink_faults({"path": "/module", "status": 500}),
]

def seen(emulator):
    return dict(emulator.options, seed=0), [fault["path"] for fault in emulator.faults()]

def test_of_the_module(evolink_emulator):
    options, faults = seen(evolink_emulator)
    assert (options["speed"], options["credits"], faults) == (5, 7, ["/module"])
    assert evolink_emulator.book()["account"]["initial"] == 7

@pytest.mark.evolink_emulator(credits=8)
@pytest.mark.evolink_faults({"path": "/class", "status": 500})
class TestClass:
    def test_of_the_class(self, evolink_emulator):
        options, faults = seen(evolink_emulator)
        assert (options["speed"], options["credits"], faults) == (5, 8, ["/class"])

    @pytest.mark.evolink_faults()
    @pytest.mark.evolink_emulator(speed=6)
    def test_of_the_method(self, evolink_emulator):
        options, faults = seen(evolink_emulator)
        assert (options["speed"], options["credits"], faults) == (6, 8, [])

    @pytest.mark.evolink_faults({"path": "/second", "status": 500})
    @pytest.mark.evolink_faults({"path": "/first", "status": 500})
    @pytest.mark.evolink_emulator(credits=9)
    @pytest.mark.parametrize("credits", [pytest.param(10, marks=pytest.mark.evolink_emulator(credits=10))])
    def test_of_the_parameter(self, evolink_emulator, credits):
        options, faults = seen(evolink_emulator)
        assert (options["credits"], faults) == (10, ["/first", "/second"])
"""
    run(pytester, tests).assert_outcomes(passed=4)


def test_without_markers_the_emulator_is_a_thousand_times_as_fast(pytester: pytest.Pytester) -> None:
    tests = """
def test_it(evolink_emulator):
    assert dict(evolink_emulator.options) == {"speed": 1000, "seed": evolink_emulator.seed}
"""
    run(pytester, tests).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (
            "evolink_emulator(speed=0)",
            "*options of this test's markers: speed must be a number above 0, not 0",
        ),
        ("evolink_emulator(sped=9)", "*refuses the options of this test's markers: *'sped'*"),
        ("evolink_emulator(50)", "the marker evolink_emulator takes options by name, such as speed=1000"),
        ("evolink_emulator(faults=[])", "faults have a marker of their own: evolink_faults({...}, {...})"),
        ("evolink_faults({'when': 'now'})", "*refuses the options of this test's markers: a fault has no 'when'; it*"),
        ("evolink_faults([{'status': 500}])", "the marker evolink_faults takes dicts: evolink_faults({...}, {...})"),
        ("evolink_faults(status=500)", "the marker evolink_faults takes dicts: evolink_faults({...}, {...})"),
    ],
)
def test_a_wrong_marker_fails_its_test_with_one_line(marker: str, message: str, pytester: pytest.Pytester) -> None:
    result = run(pytester, f"@pytest.mark.{marker}\ndef test_it(evolink_emulator): pass\ndef test_other(): pass")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines([re.sub(r"([\[\]])", r"[\1]", message)])
    result.stdout.no_fnmatch_line("*plugin.py*")


def test_the_markers_are_listed(pytester: pytest.Pytester) -> None:
    pytester.makeini(INI)
    listed = pytester.runpytest_inprocess("--markers").stdout
    listed.fnmatch_lines(["@pytest.mark.evolink_emulator(*", "@pytest.mark.evolink_faults(*"])


# The seed, and the report of a failure

WORLD = """
@pytest.mark.evolink_emulator(failure_share=0.5)
def test_world(evolink_emulator):
    import json
    fates = []
    for n in range(12):
        request = urllib.request.Request(
            evolink_emulator.base_url + "/v1/images/generations",
            json.dumps({"model": "gpt-4o-image", "prompt": f"number {n}"}).encode(),
            {"Authorization": "Bearer " + evolink_emulator.api_key},
        )
        with urllib.request.urlopen(request) as answer:
            fates.append(json.load(answer)["id"][-8:])
    print("WORLD", evolink_emulator.seed, *fates)
    raise LookupError("on purpose")

def test_another(evolink_emulator):
    print("ANOTHER", evolink_emulator.seed)
    raise LookupError("on purpose")
"""


def _line(result: pytest.RunResult, word: str) -> str:
    return next(line for line in result.outlines if line.startswith(word + " "))


def test_every_run_of_a_test_is_the_same_world_and_every_test_another(pytester: pytest.Pytester) -> None:
    first, second = run(pytester, WORLD), run(pytester, WORLD)
    assert _line(first, "WORLD") == _line(second, "WORLD")
    assert _line(first, "WORLD").split()[1] != _line(first, "ANOTHER").split()[1]


def test_a_failure_shows_the_option_that_repeats_it_and_what_the_emulator_saw(pytester: pytest.Pytester) -> None:
    failed = run(pytester, WORLD, "--evolink-seed=random")
    failed.stdout.fnmatch_lines(
        [
            "evolink: --evolink-seed=*",
            "*- evolink emulator -*",
            "seed: *, repeat with --evolink-seed=*",
            "options: speed=1000, failure_share=0.5",
            "submissions: 12 accepted (*); 0 refused; 0 replayed; 0 stopped by a fault",
            "credits: * spent, * reserved, * of 1000000 left",
        ]
    )
    option = next(word for line in failed.outlines if "repeat with" in line for word in line.split() if "--" in word)
    again = run(pytester, WORLD, option)
    assert _line(again, "WORLD") == _line(failed, "WORLD")
    assert _line(run(pytester, WORLD, "--evolink-seed=random"), "WORLD") != _line(failed, "WORLD")


def test_a_seed_of_the_tests_own_stands_above_the_option(pytester: pytest.Pytester) -> None:
    tests = """
@pytest.mark.evolink_emulator(seed=7)
def test_it(evolink_emulator):
    assert evolink_emulator.seed == 8
"""
    run(pytester, tests, "--evolink-seed=9").stdout.fnmatch_lines(["seed: 7, set by its marker"])


def test_a_failure_after_the_test_shows_the_emulator_too_and_success_does_not(pytester: pytest.Pytester) -> None:
    tests = """
@pytest.fixture
def broken(evolink_emulator):
    yield
    raise LookupError("on purpose")

@pytest.mark.evolink_faults({"path": "/v1/credits", "status": 500})
def test_it(broken): pass
"""
    result = run(pytester, tests, "-rP")
    result.assert_outcomes(passed=1, errors=1)
    sections = [line for line in result.outlines if "- evolink emulator -" in line]
    assert len(sections) == 1
    result.stdout.fnmatch_lines(['fault {"path": "/v1/credits", "status": 500}: hit 0 of 0 requests it matched'])


def test_a_seed_that_is_no_number_is_refused(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--evolink-seed=seven")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--evolink-seed: a seed is a whole number or 'random', not 'seven'"])


def test_a_random_seed_is_drawn_once_for_all_workers_of_xdist(pytester: pytest.Pytester) -> None:
    pytester.makeini(INI)
    pytester.makepyfile("""
import os, pathlib, pytest
@pytest.mark.parametrize("n", range(6))
def test_it(n, evolink_emulator):
    pathlib.Path(f"seed-{n}-{os.environ['PYTEST_XDIST_WORKER']}").write_text(str(evolink_emulator.seed))
""")
    # On Python 3.12 and later looptime warns when it looks for the loop of a test that has none.
    result = pytester.runpytest_subprocess("-p", "no:looptime_plugin", "-n2", "--dist=each", "--evolink-seed=random")
    result.assert_outcomes(passed=12)
    files = list(pytester.path.glob("seed-*"))
    assert {file.name[-3:] for file in files} == {"gw0", "gw1"}
    seeds = {file.read_text() for file in files}
    assert len(seeds) == 1
    result.stdout.fnmatch_lines([f"evolink: --evolink-seed={seeds.pop()}"])


# A run that has nothing to do with it


def test_a_run_that_does_not_use_it_imports_nothing_but_the_plugin(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
import sys
def test_it():
    heavy = ("evolink_async", "httpx", "pydantic", "uvicorn")
    assert {name for name in sys.modules if name.partition(".")[0] in heavy} == {
        "evolink_async", "evolink_async._version", "evolink_async.testing", "evolink_async.testing.plugin"
    }
""")
    result = pytester.runpytest_subprocess("-p", "no:xdist")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*evolink: *")


def test_the_plugin_imports_nothing_that_pytest_has_not_imported() -> None:
    program = (
        "import sys, pytest; before = set(sys.modules); import evolink_async.testing.plugin;"
        "print(*sorted(name for name in set(sys.modules) - before if not name.startswith('evolink_async')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# The emulator in a thread


async def test_the_emulator_in_a_thread_is_asked_from_inside_a_running_loop(api_key: str) -> None:
    with BackgroundEmulator(speed=1000, api_key=api_key) as emulator:
        async with AsyncEvoLink(base_url=emulator.base_url) as client:
            task = await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
            assert [post["task_id"] for post in emulator.book()["posts"]] == [task.id]
            assert repr(emulator) == f"<BackgroundEmulator at {emulator.base_url}: <Emulator speed=1000 seed=0>>"
    assert [post["task_id"] for post in emulator.book()["posts"]] == [task.id], "the book outlives the emulator"
    assert emulator.faults() == []
    assert not [thread for thread in threading.enumerate() if thread.name == "evolink emulator"]


def test_what_is_asked_of_the_emulator_happens_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    advance = Emulator.advance

    def noting(self: Emulator, seconds: float) -> None:
        asyncio.get_running_loop()
        threads.append(threading.current_thread().name)
        advance(self, seconds)

    monkeypatch.setattr(Emulator, "advance", noting)
    with BackgroundEmulator() as emulator:
        emulator.advance(86_400)
        with pytest.raises(ValueError, match="from 0, not -1"):
            emulator.advance(-1)
    assert threads == ["evolink emulator"] * 2


async def test_the_emulator_in_a_thread_has_the_controls_of_the_emulator(api_key: str) -> None:
    def told() -> list[str]:
        return [post["status"] for post in emulator.book()["posts"]]

    with BackgroundEmulator(standing=True, api_key=api_key) as emulator:
        async with AsyncEvoLink(base_url=emulator.base_url) as client:
            first = await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
            await client.images.submit(model="gpt-4o-image", prompt="a harbour")
            emulator.end(first.id, "failed", code="service_error")
            assert told() == ["failed", "pending"]
            emulator.advance(86_400)
            assert told() == ["failed", "completed"]
            emulator.set_account(key="disabled")
            with pytest.raises(PermissionDeniedError):
                await client.credits()
            emulator.reset()
            await client.credits()
            assert told() == []


def test_an_emulator_without_a_port_says_so_where_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    from evolink_async.emulator import server

    def listen(host: str, port: int) -> None:
        raise PermissionError(f"no port at {host}")

    monkeypatch.setattr(server, "listen", listen)
    emulator = BackgroundEmulator()
    with pytest.raises(RuntimeError, match="use it in a 'with' block"):
        _ = emulator.base_url
    with pytest.raises(PermissionError, match=r"no port at 127\.0\.0\.1"), emulator:
        pass


def test_the_summary_says_what_was_refused_and_which_faults_hit() -> None:
    book = {
        "account": {"initial": 100, "reserved": 2.5, "spent": 10, "remaining": 87.5},
        "posts": [{"status": "completed"}, {"status": "completed"}, {"status": "processing"}],
        "refused": {"429": {"rate_limit_exceeded": 4}, "402": {"insufficient_quota": 1}},
        "replays": 1,
        "faulted": 2,
    }
    faults = [{"path": "/v1", "drop": "after", "matched": 3, "hit": 1}]
    assert summarize({"seed": 1, "speed": 50, "faults": faults, "api_key": "sk-secret"}, book, faults) == [
        "options: speed=50",
        "submissions: 3 accepted (2 completed, 1 processing); "
        "5 refused (4 x 429 rate_limit_exceeded, 1 x 402 insufficient_quota); 1 replayed; 2 stopped by a fault",
        "credits: 10 spent, 2.5 reserved, 87.5 of 100 left",
        'fault {"path": "/v1", "drop": "after"}: hit 1 of 3 requests it matched',
    ]
