"""The examples run as they stand, against the emulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, run_program

from evolink_async.emulator import Emulator

EXAMPLES = ROOT / "examples"

USE_BACKEND = """
import asyncio, os, sys
import httpx
sys.path.insert(0, "examples")
import web_backend
from web_backend import app

async def main():
    transport = httpx.ASGITransport(app=app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://app") as http:
        key = {"Idempotency-Key": "one-click-0123456789"}
        first = await http.post("/pictures", json={"prompt": "a lighthouse"}, headers=key)
        again = await http.post("/pictures", json={"prompt": "a lighthouse"}, headers=key)
        assert first.status_code == again.status_code == 202, first.text
        assert first.json()["id"] == again.json()["id"]
        other = await http.post("/pictures", json={"prompt": "a harbour"}, headers=key)
        assert other.status_code == 409, other.text
        done = await http.get(f"/pictures/{first.json()['id']}", timeout=40)
        assert done.status_code == 200 and done.json()["urls"], done.text
        wrong = await http.post("/pictures", json={"prompt": "x", "size": "7x7"})
        assert wrong.status_code == 422 and "size" in wrong.text, wrong.text
        web_backend.PATIENCE = 0.5
        nobodys = await http.get("/pictures/task-unified-1774857405-nobody00", timeout=40)
        assert nobodys.status_code == 404, nobodys.text
        async with httpx.AsyncClient() as control:  # no task ends from here on
            await control.post(os.environ["EVOLINK_BASE_URL"] + "/_emulator/clock", json={"standing": True})
        running = (await http.post("/pictures", json={"prompt": "a slow one"})).json()
        seen = await http.get(f"/pictures/{running['id']}", timeout=40)
        assert seen.status_code == 202 and seen.json()["status"] in ("pending", "processing"), seen.text
        print("ok")

asyncio.run(main())
"""

USE_CALLBACKS = """
import asyncio, os, sys
import httpx, uvicorn
from evolink_async.emulator.server import listen, url_of
listener = listen("127.0.0.1", 0)
os.environ |= {"PUBLIC_URL": url_of(listener) + "/evolink", "CALLBACK_SECRET": "a secret for a test, and long enough"}
sys.path.insert(0, "examples")
from callback_backend import app

async def main():
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    async with httpx.AsyncClient(base_url=url_of(listener), timeout=40) as http:
        task = (await http.post("/pictures", json={"prompt": "a lighthouse"})).raise_for_status().json()
        events = (await http.get(task["events"])).text
        assert events.count("event: done") == 1 and ".png" in events, events
        for _ in range(200):  # the callback comes half a second of the emulator's after the end
            book = (await http.get(os.environ["EVOLINK_BASE_URL"] + "/_emulator/book")).json()
            if book["posts"][0]["callback"]["delivered"]:
                break
            await asyncio.sleep(0.05)
        lost = (await http.get("/pictures/task-unified-1-nobody!/events")).text
        assert lost.startswith("event: error"), lost
        wrong = await http.post("/pictures", json={"prompt": "x", "size": "7x7"})
        assert wrong.status_code == 422, wrong.text
        assert (await http.post("/evolink/forged", content=b"{}")).status_code == 404
        await asyncio.sleep(0.5)
    server.should_exit = True
    await running

asyncio.run(main())
"""

RUN_NOTEBOOK = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=40, kernel_name="python3").execute()
print("".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", [])))
"""


async def test_the_bulk_job_prints_a_line_for_every_prompt(emulator: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a lighthouse number {n}\n\n" for n in range(12)), encoding="utf-8")
    done = await run_program([sys.executable, str(EXAMPLES / "bulk_job.py"), str(prompts)], emulator)
    assert done.code == 0, done.stderr
    assert sorted(int(line.split("\t")[0]) for line in done.stdout.splitlines()) == list(range(1, 24, 2))
    assert "12 of 12 completed, 30 credits" in done.stderr
    prompts.write_text(f"one more\n{prompts.read_text(encoding='utf-8')}", encoding="utf-8")
    again = await run_program([sys.executable, str(EXAMPLES / "bulk_job.py"), str(prompts)], emulator)
    assert again.code == 0, again.stderr
    assert sorted(int(line.split("\t")[0]) for line in again.stdout.splitlines()) == [1, *range(2, 25, 2)]
    assert len(emulator.emulator.book()["posts"]) == 13


async def test_the_chain_makes_a_video_of_every_picture(emulator: Any) -> None:
    done = await run_program([sys.executable, str(EXAMPLES / "chain.py"), "a lighthouse", "a harbour"], emulator)
    assert done.code == 0, done.stderr
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == ["1/video", "2/video"]
    kinds = [post["kind"] for post in emulator.emulator.book()["posts"]]
    assert sorted(kinds) == ["image", "image", "video", "video"]


async def test_a_bulk_job_that_cannot_begin_says_why_and_does_not_end_as_if_all_were_done(
    emulator: Any, tmp_path: Path
) -> None:
    program = [sys.executable, str(EXAMPLES / "bulk_job.py")]
    for wrong in ([], ["--help"], [str(tmp_path / "nothere.txt")], [str(tmp_path)]):
        done = await run_program([*program, *wrong], emulator, cwd=tmp_path)
        assert done.code == 1
        assert done.stderr.startswith(f"{wrong[0]} is no file\n" if wrong else "A bulk job")
        assert "python examples/bulk_job.py prompts.txt" in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # no ledger either
    (tmp_path / "latin.txt").write_bytes(b"a caf\xe9\n")
    (tmp_path / "prompts.txt").write_text("a lighthouse\n")
    (tmp_path / "prompts.db").write_text("this is no ledger")
    for file, why in [("latin.txt", "utf-8"), ("prompts.txt", "is no ledger")]:
        done = await run_program([*program, str(tmp_path / file)], emulator)
        assert done.code == 1
        assert "ended early: " in done.stderr
        assert why in done.stderr
        assert "Traceback" not in done.stderr
    assert emulator.emulator.book()["posts"] == []


@pytest.mark.parametrize("program", [["bulk_job.py", "prompts.txt"], ["chain.py", "a lighthouse"]])
async def test_a_program_without_a_key_says_so_in_one_line(program: list[str], emulator: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a lighthouse\n")
    command = ["env", "-u", "EVOLINK_API_KEY", sys.executable, str(EXAMPLES / program[0]), program[1]]
    done = await run_program(command, emulator, cwd=tmp_path)
    assert done.code == 1
    assert "set EVOLINK_API_KEY" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--help"]])
async def test_asking_the_chain_how_to_use_it_costs_nothing(arguments: list[str], emulator: Any) -> None:
    done = await run_program([sys.executable, str(EXAMPLES / "chain.py"), *arguments], emulator)
    assert "python examples/chain.py" in done.stderr
    assert emulator.emulator.book()["posts"] == []


async def test_the_web_backend_pays_once_for_a_click_and_knows_ids_that_are_nobodys(emulator: Any) -> None:
    done = await run_program([sys.executable, "-c", USE_BACKEND], emulator)
    assert done.code == 0, done.stderr
    assert done.stdout == "ok\n"
    assert len(emulator.emulator.book()["posts"]) == 2


async def test_the_callback_backend_streams_progress_and_keeps_what_it_was_called_about(api_key: str) -> None:
    async with Emulator(speed=50, seed=1, api_key=api_key, private_callbacks=True).serve() as server:
        done = await run_program([sys.executable, "-c", USE_CALLBACKS], server)
        assert done.code == 0, done.stderr
        [post] = server.emulator.book()["posts"]
    assert [attempt["result"] for attempt in post["callback"]["attempts"]] == ["204"]
    assert done.stdout == f"{post['task_id']} completed 1 links\n"


async def test_the_notebook_runs_from_top_to_bottom(emulator: Any, tmp_path: Path) -> None:
    notebook = str(EXAMPLES / "notebook.ipynb")
    done = await run_program([sys.executable, "-c", RUN_NOTEBOOK, notebook], emulator, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.stdout.count("completed") >= 5
    assert len(emulator.emulator.book()["posts"]) == 7
    assert len(list((tmp_path / "out").iterdir())) == 5


async def test_the_tests_of_the_example_project_pass_and_reach_no_other_service(emulator: Any) -> None:
    project = EXAMPLES / "testing_your_code"
    done = await run_program([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(project)], emulator)
    assert done.code == 0, done.stdout
    assert "6 passed" in done.stdout
    assert emulator.emulator.book()["requests"] == {}


def test_programs_that_use_the_package_pass_a_strict_type_check(tmp_path: Path) -> None:
    """With parameters of a model in a request, which are no fields of it."""
    programs = [*EXAMPLES.glob("*.py"), EXAMPLES / "testing_your_code" / "covers.py"]
    # In a process of its own: mypy tells the garbage collector to rest, and that would hold for the tests after it.
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path}", *map(str, programs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("Success"), done.stdout
