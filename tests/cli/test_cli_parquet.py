"""Parquet files as people have them."""

from __future__ import annotations

import asyncio
import decimal
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from cli_process import command, lines_of, write_lines

from evolink_async.cli.entries import BadInput, Defaults, Entry
from evolink_async.cli.inputs import open_input

MODEL = "krea-2-turbo"


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """A file with these columns."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def entries(path: Path, **defaults: Any) -> list[Entry]:
    """What the file holds."""
    with open_input(str(path), Defaults(**defaults)) as source:
        return list(source.read(source.check().repeated))


def one(path: Path, columns: dict[str, Any], **defaults: Any) -> Any:
    """The only request of a file with these columns."""
    [entry] = entries(parquet(path, columns), **defaults)
    assert entry.request is not None, entry.reason
    return entry.request


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "rows.parquet"


def test_columns_mean_what_they_mean_in_csv(table: Path) -> None:
    request = one(
        table, {"ID": ["a"], "Prompt": ["x"], "model": [" krea-2-turbo "], "seed": [7], "metadata": ['{"r": 1}']}
    )
    assert (request.key, request.prompt, request.metadata) == ("a", "x", {"r": 1})
    assert request.body() == {"model": MODEL, "prompt": "x", "seed": 7}
    assert one(table, {"caption": ["a lighthouse"]}, model=MODEL).prompt == "a lighthouse"
    with pytest.raises(BadInput, match="key and custom_id are columns for the same thing"):
        entries(parquet(table, {"key": ["a"], "custom_id": ["a"]}))
    with pytest.raises(BadInput, match="'what is it' is no such name"):
        entries(parquet(table, {"prompt": ["a"], "what is it": ["a"]}))


def test_a_null_and_a_blank_text_are_not_given(table: Path) -> None:
    columns = {"prompt": ["a", "b", None], "seed": [None, 2, None], "size": ["", "1:1", " "], "nsfw_check": [None] * 3}
    first, second = entries(parquet(table, columns), model=MODEL)  # the third row holds nothing at all
    assert first.request is not None
    assert second.request is not None
    assert first.request.params() == {"prompt": "a"}
    assert second.request.params() == {"prompt": "b", "seed": 2, "size": "1:1"}


def test_lists_and_structs_become_json_without_what_other_rows_have(table: Path) -> None:
    columns = {
        "model": ["mj-v7", "gpt-4o-image"],
        "prompt": ["a", "b"],
        "image_urls": [None, ["https://a.example/1.png", "https://a.example/2.png"]],
        "model_params": [{"speed": "draft", "other": None}, None],
        "metadata": [{"row": 1, "tags": ["x"], "note": None}, {"row": 2, "tags": None, "note": "y"}],
    }
    first, second = entries(parquet(table, columns))
    assert first.request is not None
    assert second.request is not None
    assert first.request.params() == {"prompt": "a", "model_params": {"speed": "draft"}}
    assert second.request.params()["image_urls"] == ["https://a.example/1.png", "https://a.example/2.png"]
    assert [first.request.metadata, second.request.metadata] == [{"row": 1, "tags": ["x"]}, {"row": 2, "note": "y"}]


def test_texts_become_what_a_known_parameter_takes_and_stay_texts_elsewhere(table: Path) -> None:
    columns = {
        "model": ["gpt-4o-image"],
        "prompt": ["12"],
        "n": ["2"],
        "image_urls": ["https://a.b/1.png|https://a.b/2.png"],
    }
    params = one(table, columns).params()
    assert params == {"prompt": "12", "n": 2, "image_urls": ["https://a.b/1.png", "https://a.b/2.png"]}
    unknown = one(
        table, {"model": ["unheard-of"], "prompt": ["x"], "code": ["007"], "ref_urls": ["https://a.b/1"]}, kind="image"
    )
    assert unknown.params() == {"prompt": "x", "code": "007", "ref_urls": ["https://a.b/1"]}


def test_whole_numbers_with_gaps_are_whole_again(table: Path) -> None:
    columns = {"key": pyarrow.array([1, 2], pyarrow.int64()), "prompt": ["a", "b"], "seed": [3.0, None]}
    first, second = entries(parquet(table, columns), model=MODEL)
    assert first.request is not None
    assert second.request is not None
    assert (first.request.key, first.request.params()["seed"], second.request.key) == ("1", 3, "2")
    assert isinstance(first.request.params()["seed"], int)


def test_categories_and_every_width_of_number_are_read(table: Path) -> None:
    columns = {
        "prompt": pyarrow.array(["a"], pyarrow.large_string()),
        "model": pyarrow.array([MODEL]).dictionary_encode(),
        "seed": pyarrow.array([5], pyarrow.uint16()),
        "nsfw_check": [True],
    }
    assert one(table, columns).params() == {"prompt": "a", "seed": 5, "nsfw_check": True}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (datetime(2026, 1, 1, tzinfo=UTC), "timestamp.*cast it to text"),
        (date(2026, 1, 1), "date32.*cast it to text"),
        (decimal.Decimal("1.50"), "decimal.*cast it to a float or to text"),
        (b"png", "binary.*give links"),
        ({"inner": [b"png"]}, "inner is of type binary"),
    ],
)
def test_what_json_lacks_is_refused_with_what_to_do(value: Any, said: str, table: Path) -> None:
    with pytest.raises(BadInput, match=f"rows.parquet: column at.*{said}.*leave the column out"):
        entries(parquet(table, {"prompt": ["a"], "at": [value]}))


def test_bad_rows_are_named_by_their_number_and_can_be_written_down(table: Path) -> None:
    columns = {"key": ["a", "b", "a"], "prompt": ["x", "y", "z"], "seed": [1.0, float("nan"), 3.0]}
    good, bad, twice = entries(parquet(table, columns, row_group_size=1), model=MODEL)
    assert good.request is not None
    assert (bad.line, bad.data["seed"]) == (2, "nan")
    assert bad.reason.startswith("seed: nan cannot be sent")
    assert (twice.line, twice.reason) == (3, "its key stands in row 1 already; a key names one request")


def test_the_index_of_a_pandas_frame_is_no_parameter(table: Path) -> None:
    assert one(table, {"prompt": ["a"], "__index_level_0__": [17]}, model=MODEL).params() == {"prompt": "a"}


def test_a_torn_a_rotten_and_a_foreign_file_are_one_sentence(table: Path) -> None:
    whole = parquet(table, {"prompt": [f"picture {n}" for n in range(50_000)]}, row_group_size=10_000).read_bytes()
    table.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match=r"rows\.parquet cannot be read as Parquet"):
        entries(table, model=MODEL)
    middle = len(whole) // 2
    table.write_bytes(whole[:middle] + b"\xff" * 100 + whole[middle + 100 :])
    with pytest.raises(BadInput, match=r"cannot be read as Parquet, after row [1-4]0,000"):
        entries(table, model=MODEL)
    table.write_bytes(b"prompt\na lighthouse\n")
    with pytest.raises(BadInput, match="cannot be read as Parquet"):
        entries(table, model=MODEL)


def test_a_long_file_takes_the_memory_of_a_part_of_it(table: Path) -> None:
    text = "x" * 1000
    rows = 40_000
    parquet(table, {"prompt": [f"{n} {text}" for n in range(rows)]}, row_group_size=2000, compression="none")
    assert table.stat().st_size > 1000 * rows
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    with open_input(str(table), Defaults(model=MODEL)) as source:
        for number, _ in enumerate(source.read({})):
            if number % 500 == 0:
                most = max(most, pool.bytes_allocated() - before)
    assert number == rows - 1
    assert 0 < most < table.stat().st_size / 4


async def test_run_takes_a_parquet_file_by_name_or_by_pipe_and_its_errors_again(emulator: Any, tmp_path: Path) -> None:
    table = parquet(tmp_path / "rows.parquet", {"key": ["a", "b"], "prompt": ["x", "y"], "seed": [1.0, float("nan")]})
    options = ("--model", MODEL, "--skip-bad")
    result = await command("run", table, "--out", tmp_path / "out", *options, server=emulator)
    assert (result.code, len(emulator.emulator.book()["posts"])) == (1, 1)
    assert "row 2: seed: nan cannot be sent" in result.stderr
    [error] = lines_of(tmp_path / "out/errors.jsonl")
    assert (error["key"], error["line"], error["seed"]) == ("b", 2, "nan")
    mended = write_lines(tmp_path / "again.jsonl", error | {"seed": 2})
    again = await command("run", mended, "--out", tmp_path / "out", *options, server=emulator)
    assert again.code == 0
    piped = await command("run", "-", "--out", tmp_path / "out", *options, given=table.read_bytes(), server=emulator)
    assert piped.code == 1
    assert len(emulator.emulator.book()["posts"]) == 2


async def test_without_pyarrow_it_says_what_to_install(tmp_path: Path) -> None:
    parquet(tmp_path / "rows.parquet", {"prompt": ["a"]})
    arguments = ["evolink-async", "run", str(tmp_path / "rows.parquet"), "--dry-run", "--model", MODEL]
    code = (
        f"import sys\nsys.modules['pyarrow'] = None\nsys.argv = {arguments!r}\n"
        "from evolink_async.cli import main\nmain()"
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=pipe, stderr=pipe)
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert stderr.decode().rstrip().endswith("pip install 'evolink-async[parquet]'")
    assert len(stderr.splitlines()) == 1


async def test_other_inputs_load_no_pyarrow(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", {"model": MODEL, "prompt": "a"})
    arguments = ["evolink-async", "run", str(file), "--dry-run"]
    code = (
        f"import sys\nsys.argv = {arguments!r}\nfrom evolink_async.cli import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'pyarrow' in sys.modules)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0] == b"0 False\n"
