"""Log records: stable events, sensible levels, no secrets."""

from __future__ import annotations

import ast
import asyncio
import logging
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import evolink_async
from evolink_async import AsyncEvoLink, EvoLinkError, ImageRequest, RetryPolicy
from evolink_async.emulator import Emulator
from evolink_async.http.pace import Pace

PACKAGE = Path(evolink_async.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "telemetry.md").read_text(encoding="utf-8")
METHODS = {"debug", "info", "warning", "error", "exception", "log"}
APART = {"emulator", "testing", "cli", "report"}  # programs and tests of their own
RECORD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a logger in the library: where, and the call."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room in APART:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                value = node.func.value
                if isinstance(value, ast.Name) and value.id == "logger":
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def facts(call: ast.Call) -> dict[str, str | None]:
    """The names in `extra`, with the text of those that are literal text."""
    [extra] = [keyword.value for keyword in call.keywords if keyword.arg == "extra"] or [ast.Dict([], [])]
    dicts = [node for node in ast.walk(extra) if isinstance(node, ast.Dict)]
    return {
        key.value: value.value if isinstance(value, ast.Constant) else None
        for found in dicts
        for key, value in zip(found.keys, found.values, strict=True)
        if isinstance(key, ast.Constant)
    }


def documented() -> dict[str, tuple[str, set[str]]]:
    """The table of the page: each event's level and facts."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+(?:, \w+)?) \|[^|]*\| ([^|]*) \|$", PAGE, re.M)
    return {event: (level, set(re.findall(r"`(\w+)`", names))) for event, level, names in rows}


def test_every_record_but_debug_has_an_event() -> None:
    without = [where for where, call in calls() if call.func.attr != "debug" and "event" not in facts(call)]  # type: ignore[attr-defined]
    assert without == []


def test_the_table_of_the_page_has_every_event_with_its_level_and_its_facts() -> None:
    found: dict[str, tuple[str, set[str]]] = {}
    for where, call in calls():
        names = facts(call)
        if "event" not in names:
            continue
        level = {"exception": "error", "log": "info, warning"}.get(call.func.attr, call.func.attr)  # type: ignore[attr-defined]
        events = [names.pop("event")]
        if events == [None]:  # two share a helper, which has their names as arguments
            source = (PACKAGE / where.partition(":")[0]).read_text(encoding="utf-8")
            events = re.findall(r'_warn_of_loss\(\s*"(\w+)"', source)
        for event in events:
            assert event is not None
            known = found.setdefault(event, (level, set()))
            assert known[0] == level, event
            known[1].update(names)
    # Both put their facts together elsewhere.
    for event in ("threshold_crossed", "threshold_cleared"):
        found[event][1].update({"threshold", "value", "limit"})
    assert documented() == found


def test_no_fact_has_the_name_of_what_every_record_has() -> None:
    assert not {name for _, call in calls() for name in facts(call)} & RECORD


async def test_a_job_is_told_in_events(client: AsyncEvoLink, caplog: pytest.LogCaptureFixture) -> None:
    requests = [ImageRequest(model="gpt-4o-image", prompt=f"p{n}", key=f"k{n}") for n in range(3)]
    async with client.pool(requests) as pool:
        outcomes = {outcome.identity: outcome async for outcome in pool}
    accepted = [record for record in caplog.records if getattr(record, "event", None) == "task_accepted"]
    ended = [record for record in caplog.records if getattr(record, "event", None) == "outcome"]
    assert {vars(record)["identity"] for record in accepted} == {"k0", "k1", "k2"}
    for record in ended:
        outcome = outcomes[vars(record)["identity"]]
        assert vars(record)["task_id"] == outcome.unwrap().id
        assert vars(record)["status"] == "completed"
        assert vars(record)["credits"] == 2.5
        assert record.levelno == logging.INFO
    assert len(ended) == len(accepted) == 3


async def test_a_single_call_is_told_in_events(client: AsyncEvoLink, caplog: pytest.LogCaptureFixture) -> None:
    task = await client.images.generate(model="gpt-4o-image", prompt="p")
    events = [vars(record) for record in caplog.records if hasattr(record, "event")]
    assert [(event["event"], event["task_id"]) for event in events] == [
        ("task_accepted", task.id),
        ("task_ended", task.id),
    ]


@pytest.mark.looptime
@pytest.mark.parametrize(("pause", "level"), [("1", logging.INFO), ("90", logging.WARNING)])
async def test_a_cool_down_is_told_once_and_a_long_one_loudly(
    pause: str, level: int, api_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    fault = {"method": "POST", "path": "/v1/images/generations", "status": 429, "headers": {"Retry-After": pause}}
    async with Emulator(speed=100, api_key=api_key, faults=[fault]).serve() as server:  # noqa: SIM117
        async with AsyncEvoLink(base_url=server.base_url) as client:
            with pytest.raises(EvoLinkError):
                await client.images.generate(model="gpt-4o-image", prompt="p", timeout=0.5)
    [record] = [record for record in caplog.records if getattr(record, "event", None) == "cool_down"]
    assert record.levelno == level
    assert vars(record)["model"] == "gpt-4o-image"
    assert vars(record)["seconds"] == pytest.approx(float(pause), rel=0.1)


@pytest.mark.looptime
async def test_a_volley_of_refusals_is_one_cool_down(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace(None, 10, RetryPolicy(), {})
    now = asyncio.get_running_loop().time()
    for hint in (1.0, 1.5, 1.0):
        pace.refused("m", now, now, hint)
    assert [vars(record)["event"] for record in caplog.records] == ["cool_down"]
    await asyncio.sleep(2)
    pace.cool("m", now + 5)
    assert [vars(record)["event"] for record in caplog.records] == ["cool_down"] * 2


async def test_no_record_of_a_job_that_goes_wrong_holds_the_key_or_a_prompt(
    api_key: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    prompt = f"prompt-canary-{secrets.token_hex(8)}"
    faults: list[dict[str, Any]] = [
        {"method": "POST", "nth": 1, "drop": "after"},
        {"method": "POST", "nth": 3, "status": 429, "headers": {"Retry-After": "1"}},
        {"method": "POST", "nth": 5, "status": 400},
        {"method": "GET", "path": "/v1/tasks/*", "nth": 2, "status": 500},
    ]
    requests = [ImageRequest(model="gpt-4o-image", prompt=f"{prompt} {n}", metadata={"p": prompt}) for n in range(8)]
    requests.append(ImageRequest(model="gpt-4o-image", prompt=prompt, size=f"{prompt}x1", quality=prompt))
    async with Emulator(speed=100, api_key=api_key, failure_share=0.3, faults=faults).serve() as server:  # noqa: SIM117
        async with AsyncEvoLink(base_url=server.base_url) as client:
            async with client.pool(requests, ledger=tmp_path / "job.db", save_to=tmp_path / "out") as pool:
                async for outcome in pool:
                    if outcome.index == 7:
                        break
    assert len({getattr(record, "event", None) for record in caplog.records}) >= 4
    for record in caplog.records:
        everything = f"{record.getMessage()} {vars(record)} {caplog.handler.format(record)}"
        for secret in (api_key, prompt):
            assert secret not in everything


def test_a_program_that_configures_no_logging_still_sees_warnings_and_nothing_less() -> None:
    """That is why the library adds no handler of its own, not even one that swallows them."""
    program = """
import logging
import evolink_async.client
logger = logging.getLogger("evolink_async.submit")
logger.warning("lost response")
logger.info("task accepted")
assert not logging.getLogger("evolink_async").handlers
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "lost response\n"
