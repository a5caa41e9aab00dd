"""docs/cli.md says what the commands take and print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer.main
from cli_ledgers import a_ledger
from cli_process import command, images, lines_of, write_lines
from pydantic_core import from_json

from evolink_async.cli.app import app
from evolink_async.emulator import Emulator

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
OPAQUE = {"metadata", "params", "counts", "delivered"}  # their keys are the caller's, or names of states


def documented(heading: str) -> set[str]:
    """The keys of the table below a heading."""
    [section] = re.findall(rf"^### {heading}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    rows = re.findall(r"^\| (`.*?`) \|", section, re.M)
    return innermost(key for row in rows for key in re.findall(r"`([^`]+)`", row))


def innermost(names: Iterable[str]) -> set[str]:
    """Without those that are there for what is in them: they may be null or empty."""
    found = set(names)
    return {name for name in found if not any(other.startswith((f"{name}.", f"{name}[].")) for other in found)}


def keys(value: Any, path: str = "") -> Iterator[str]:
    """The keys of an object, those of inner objects after a point, those of objects in a list after []."""
    for name, inner in value.items():
        here = path + name
        if isinstance(inner, Mapping) and here not in OPAQUE:
            yield from keys(inner, f"{here}.")
        elif isinstance(inner, list) and inner and isinstance(inner[0], Mapping):
            for item in inner:
                yield from keys(item, f"{here}[].")
        else:
            yield here


def printed(*texts: str) -> set[str]:
    """The keys of all lines."""
    return innermost(key for text in texts for line in text.splitlines() for key in keys(from_json(line)))


async def test_every_command_and_option_is_on_the_page() -> None:
    group: Any = typer.main.get_command(app)
    commands = dict(group.commands)
    commands |= {f"job {name}": inner for name, inner in commands.pop("job").commands.items()}
    for name, inner in commands.items():
        assert re.search(rf"`{name}[ `]|\|{name.removeprefix('job ')}\b|job {name.removeprefix('job ')}\|", PAGE), name
        for option in (option for param in [*inner.params, *group.params] for option in param.opts):
            assert not option.startswith("--") or f"{option}`" in PAGE or f"{option} " in PAGE, (name, option)


async def test_its_tables_are_what_run_status_and_job_print(api_key: str, tmp_path: Path) -> None:
    good = write_lines(tmp_path / "in.jsonl", *images(3, metadata={"row": 1}))
    bad = write_lines(tmp_path / "bad.jsonl", {"model": "gpt-4o-image", "n": 3}, *images(1))
    new = write_lines(tmp_path / "new.jsonl", {"kind": "image", "model": "unheard-of", "prompt": "x"}, *images(5))
    out = tmp_path / "out"
    async with Emulator(speed=100, seed=1, api_key=api_key, failure_share=1).serve() as server:
        ran = await command("run", good, "--out", out, "--json", server=server)
        plans = [
            (await command("run", bad, "--dry-run", "--json", server=server)).stdout,
            (await command("run", new, "--dry-run", "--json", "--out", out, server=server)).stdout,
        ]
        task_id = lines_of(out / "errors.jsonl")[0]["error"]["task_id"]
        status = await command("status", task_id, "--json", server=server)
        waited = await command("wait", task_id, "--json", server=server)
    outcome = documented("An outcome")
    assert ran.code == 1
    assert printed(ran.stdout) == outcome
    assert printed((out / "errors.jsonl").read_text()) == {
        *("key", "kind", "model", "prompt", "metadata"),
        *(key for key in outcome if key.startswith("error.")),
    }
    assert printed(*plans) == documented("A plan")
    task = documented("A task")
    assert printed(status.stdout) == printed(waited.stdout) == task
    shown = await command("job", "show", out / "job.db", "--json")
    assert printed(shown.stdout) - {"costs"} == {key for key in documented("A job") if not key.startswith("costs")}
    exported = await command("job", "export", out / "job.db")
    assert printed(exported.stdout) == documented("A request in a ledger")


async def test_its_tables_are_what_generate_credits_models_and_the_other_job_commands_print(
    emulator: Any, tmp_path: Path
) -> None:
    sent = datetime.now(UTC)
    made = await command("generate", "image", "--model", "krea-2-turbo", "--prompt", "a", "--json", server=emulator)
    assert printed(made.stdout) == {key for key in documented("An outcome") if not key.startswith("error")}
    credits = await command("credits", "--json", server=emulator)
    assert printed(credits.stdout) == documented("Credits in JSON")
    listed = await command("models", "--kind", "audio", "--json")
    model = documented("A model")
    assert printed(listed.stdout) == model - {"params", "remarks"}
    one = await command("models", "gpt-4o-image", "--json")
    assert printed(one.stdout) == model
    for param in from_json(one.stdout)["params"].values():
        assert set(param) == {"type", "required", "allowed", "default", "aliases", "note", "items", "properties"}

    ledger = await a_ledger(tmp_path / "job.db", {"a": "unsettled", "b": "completed"}, sent=sent)
    unknown = await command("job", "unknown", ledger, "--candidates", "--json", server=emulator)
    assert printed(unknown.stdout) == documented("An unknown request")
    costs = printed((await command("job", "show", ledger, "--json")).stdout)
    assert costs == documented("A job")
    settled = await command("job", "resolve", ledger, "a", "--give-up", "--json")
    row = documented("A request in a ledger")
    assert printed(settled.stdout) in (row, {key.replace("error.code", "error") for key in row} - {"error.message"})
