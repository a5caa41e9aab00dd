"""Files of requests as people have them."""

from __future__ import annotations

import io
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import to_json

from evolink_async.cli import inputs
from evolink_async.cli.entries import BadInput, Defaults, Entry, convert
from evolink_async.cli.inputs import open_input
from evolink_async.cli.outputs import bad_line, encoded, request_line

MODEL = "krea-2-turbo"


def entries(path: Path, data: bytes, **defaults: Any) -> list[Entry]:
    """What a file with these bytes holds."""
    path.write_bytes(data)
    with open_input(str(path), Defaults(**defaults)) as source:
        return list(source.read(source.check().repeated))


def reasons(path: Path, data: bytes, **defaults: Any) -> dict[int, str]:
    """Its bad lines."""
    return {entry.line: entry.reason for entry in entries(path, data, **defaults) if entry.request is None}


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "in.csv"


def test_our_lines_and_batch_lines_are_read_whatever_the_line_ends(jsonl: Path) -> None:
    data = (
        b'\xef\xbb\xbf{"model": "krea-2-turbo", "prompt": "a", "key": "x", "metadata": {"row": 1}}\r\n\r\n'
        b'{"custom_id": "y", "url": "/v1/videos/generations", "body": {"model": "veo3.1-fast-beta", "prompt": "b"}}'
    )
    first, second = entries(jsonl, data)
    assert first.request is not None
    assert second.request is not None
    assert (first.line, first.request.key, first.request.metadata) == (1, "x", {"row": 1})
    assert (second.line, second.request.key, second.request.kind) == (3, "y", "video")


def test_each_bad_line_is_named_with_its_reason(jsonl: Path) -> None:
    found = reasons(
        jsonl,
        b'{"model": "krea-2-turbo", "prompt": "fine"}\n'
        b"{nonsense}\n"
        b'{"model": "krea-2-turbo", "prompt": "a", "seed": NaN}\n'
        b"[1]\n"
        b'"text"\n'
        b'{"prompt": "no model"}\n'
        b'{"model": "gpt-4o-image", "prompt": "a", "n": 3}\n'
        b'{"model": "\xff"}\n'
        b'{"model": "unheard-of", "prompt": "a"}\n',
    )
    assert list(found) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert found[2].startswith("not JSON")
    assert found[3].startswith("not JSON")
    assert "a line of its own" in found[4]
    assert "not an object" in found[5]
    assert "--model" in found[6]
    assert "n: 3 is not accepted" in found[7]
    assert "not UTF-8" in found[8]
    assert "say its kind" in found[9]


def test_the_defaults_of_the_command_line_are_for_lines_that_say_nothing(jsonl: Path) -> None:
    data = b'{"prompt": "a"}\n{"prompt": "b", "model": "gpt-4o-image", "kind": "image"}\n'
    first, second = entries(jsonl, data, model="unheard-of", kind="video")
    assert first.request is not None
    assert second.request is not None
    assert (first.request.model, first.request.kind) == ("unheard-of", "video")
    assert (second.request.model, second.request.kind) == ("gpt-4o-image", "image")


def test_a_model_of_null_is_none(jsonl: Path) -> None:
    batch = b'{"url": "/v1/images/generations", "body": {"model": null, "prompt": "b"}}\n'
    read = entries(jsonl, b'{"model": null, "prompt": "a"}\n' + batch, model="krea-2-turbo")
    assert [entry.request and entry.request.model for entry in read] == ["krea-2-turbo"] * 2
    assert "--model" in reasons(jsonl, b'{"model": null, "prompt": "a"}\n')[1]
    assert "got 5" in reasons(jsonl, b'{"model": 5, "prompt": "a"}\n')[1]


def test_a_key_that_comes_twice_names_both_lines(jsonl: Path) -> None:
    row = b'{"model": "krea-2-turbo", "prompt": "a", "key": "%s"}\n'
    found = reasons(jsonl, row % b"x" + row % b"y" + row % b"x" + row % b"x")
    assert list(found) == [3, 4]
    assert all("line 1" in reason for reason in found.values())


def test_the_count_leaves_repeated_keys_out(jsonl: Path) -> None:
    jsonl.write_bytes(b'{"model": "krea-2-turbo", "prompt": "a", "key": "x"}\n' * 3)
    with open_input(str(jsonl), Defaults()) as source:
        report = source.check()
    assert (report.requests, report.bad_count) == (1, 2)
    assert report.models == {("image", MODEL): 1}


def test_a_line_that_failed_is_sent_again_without_its_error(jsonl: Path) -> None:
    error = b'{"status":"failed","task_id":"task-1"}'
    row = b'{"key":"x","kind":"image","model":"krea-2-turbo","prompt":"a","error":' + error + b"}\n"
    (entry,) = entries(jsonl, row)
    assert entry.request is not None
    assert entry.request.params() == {"prompt": "a"}


@pytest.mark.parametrize("line", [b"{nonsense", b'{"prompt": "' + b"x" * 50 + b'"}'])
def test_a_line_that_was_no_request_never_becomes_one_of_the_defaults(
    jsonl: Path, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "LONGEST_LINE", 50)
    (entry,) = entries(jsonl, line)
    monkeypatch.undo()
    again = encoded(bad_line(entry.line, entry.reason, entry.data))
    assert entry.reason in reasons(jsonl, again, model="unheard-of", kind="image")[1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (b'{"status":"unfinished","task_id":"task-1"}', "evolink-async wait task-1"),
        (b'{"status":"lost","task_id":"task-1"}', "task task-1"),
        (b'{"status":"unknown","task_id":null}', "answer lost"),
    ],
)
def test_a_line_whose_task_may_exist_is_refused_unless_asked_for(jsonl: Path, error: bytes, said: str) -> None:
    row = b'{"model":"krea-2-turbo","prompt":"a","error":' + error + b"}\n"
    assert said in reasons(jsonl, row)[1]
    assert not reasons(jsonl, row, resend_unsettled=True)


def test_a_line_of_results_is_no_request_and_not_paid_for_again(jsonl: Path) -> None:
    outcome = {"key": "a", "identity": "a", "status": "completed", "model": MODEL, "prompt": "p", "task_id": "task-1"}
    unsaved = outcome | {"error": {"status": "completed", "message": "no space left"}}
    found = reasons(jsonl, to_json(outcome) + b"\n" + to_json(unsaved))
    assert ["(task task-1): it would be paid for again" in found[line] for line in (1, 2)] == [True, True]


def test_a_line_without_end_is_named_and_costs_no_memory(jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LONGEST_LINE", 1000)
    good = b'{"model": "krea-2-turbo", "prompt": "a"}\n'
    found = reasons(jsonl, good + b'{"prompt": "' + b"x" * 5_000_000 + b'"}\n' + good)
    assert list(found) == [2]
    assert "longer than" in found[2]


def test_many_lines_need_no_more_memory_than_their_keys(jsonl: Path) -> None:
    with open(jsonl, "wb") as file:
        for number in range(5000):
            file.write(b'{"model": "krea-2-turbo", "prompt": "%s", "key": "k%d"}\n' % (b"x" * 500, number))
    tracemalloc.start()
    with open_input(str(jsonl), Defaults()) as source:
        assert source.check().requests == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # the file has 2.7 MB, the catalogue needs about 1


def test_a_table_with_semicolons_a_mark_and_typed_cells(table: Path) -> None:
    rows = entries(
        table,
        b"\xef\xbb\xbfid;Prompt;Model;n;image_urls;quality\r\n"
        b'a;"one; with ""quotes""\r\nand two lines";gpt-image-1.5;1;https://a.example/1.png https://a.example/2.png;\r\n'
        b";;;;;\r\n"
        b"b;two;gpt-image-1.5;;https://a.example/1.png|https://a.example/2.png;low\r\n",
    )
    assert [(entry.line, entry.reason) for entry in rows] == [(2, ""), (5, "")]
    first, second = (entry.request for entry in rows)
    assert first is not None
    assert second is not None
    links = ["https://a.example/1.png", "https://a.example/2.png"]
    assert first.key == "a"
    assert first.params() == {"prompt": 'one; with "quotes"\r\nand two lines', "n": 1, "image_urls": links}
    assert second.params() == {"prompt": "two", "image_urls": links, "quality": "low"}


def test_the_only_column_is_the_prompt_whatever_its_name(table: Path) -> None:
    first, second = entries(table, b"idea\na lighthouse\nan owl\n", model=MODEL)
    assert first.request is not None
    assert second.request is not None
    assert (first.request.prompt, second.request.prompt) == ("a lighthouse", "an owl")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a lighthouse at dusk\nan owl\n", "must name the columns"),
        (b"prompt,key,id\na,b,c\n", "keep one"),
        (b"prompt,prompt\na,b\n", "twice"),
        (b"prompt,,n\na,,1\n", "column 2 has no name"),
        (b"prompt,n\ra boat,1\rb,2\r", "LF or CRLF"),
        (b"a" * 200_000, "must name the columns"),
        (b"prompt,model\n\xe4,krea-2-turbo\n", "line 2: not UTF-8"),
        ("prompt\na".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04" + b"\0" * 40, "Excel .* save it as 'CSV UTF-8'"),
        (b"\x1f\x8b\x08\x00" + b"\xe4" * 40, "compressed; unpack it"),
        (b"", "empty"),
        (b" \n", "empty"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused_whole(table: Path, data: bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        entries(table, data, model=MODEL)


def test_a_comma_without_quotes_is_no_new_column(table: Path) -> None:
    found = reasons(table, b"prompt\na red, a blue\n", model=MODEL)
    assert "quotes" in found[2]


def test_a_line_end_of_an_old_mac_within_a_cell_is_named_as_such(table: Path) -> None:
    found = reasons(table, b"prompt,n\r\na\rb,1\r\n", model=MODEL)
    assert "outside of quotes" in found[2]


@pytest.mark.parametrize("data", [b'{\n"model": "krea-2-turbo"\n}\n', b'[{"model": "krea-2-turbo", "prompt": "a"},\n'])
def test_json_over_several_lines_is_told_that_a_request_has_one(jsonl: Path, data: bytes) -> None:
    assert "whole on one line" in reasons(jsonl, data)[1]


def test_broken_quotes_end_the_reading(table: Path) -> None:
    found = reasons(table, b'prompt\n"a" b\nc\n', model=MODEL)
    assert "not CSV" in found[2]


def test_a_cell_of_the_wrong_type_is_told_as_it_stands(table: Path) -> None:
    found = reasons(table, b"prompt,n\na,many\n", model="gpt-4o-image")
    assert "'many' is not a whole number" in found[2]


@pytest.mark.parametrize(
    ("model", "name", "text", "value"),
    [
        ("gpt-4o-image", "n", " 2 ", 2),
        ("gpt-4o-image", "size", " 1:1 ", "1:1"),
        ("seedance-2.0-text-to-video", "duration", "5", 5),
        ("suno-v5-beta", "instrumental", "TRUE", True),
        ("unheard-of", "seed", "5", 5),
        ("unheard-of", "seed", "007", "007"),
        ("unheard-of", "style", "true", True),
        ("unheard-of", "style", "a, b", "a, b"),
        ("unheard-of", "style", "[1]", [1]),
        ("unheard-of", "style", "{broken", "{broken"),
        ("unheard-of", "image_urls", "https://a.example/1.png", ["https://a.example/1.png"]),
        (None, "n", "2", 2),
    ],
)
def test_cells_and_options_become_what_the_catalogue_says(model: str | None, name: str, text: str, value: Any) -> None:
    converted = convert(model, name, text)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize("ending", [b"\n", b""], ids=["ended", "open"])
@pytest.mark.parametrize(
    ("name", "head", "line"),
    [
        ("in.jsonl", b"", b'{"model": "krea-2-turbo", "prompt": "%d"}'),
        ("in.csv", b"model,prompt\n", b"krea-2-turbo,%d"),
    ],
)
def test_what_is_appended_after_a_file_was_opened_is_not_read(
    tmp_path: Path, name: str, head: bytes, line: bytes, ending: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(head + line % 0 + ending)
    with open_input(str(path), Defaults()) as source, path.open("ab", buffering=0) as writer:
        writer.write(line % 1 + b"\n")
        report = source.check()
        writer.write(line % 2 + b"\n")
        assert [entry.request and entry.request.prompt for entry in source.read(report.repeated)] == ["0"]
        assert (report.requests, report.bad_count) == (1, 0)


def test_standard_input_is_kept_to_be_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b'{"model": "krea-2-turbo", "prompt": "a"}\n'))
    monkeypatch.setattr(sys, "stdin", stream)
    with open_input("-", Defaults()) as source:
        assert source.check().requests == 1
        assert len(list(source.read({}))) == 1


def test_lines_that_are_typed_end_with_one_ctrl_d(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = [b'{"model": "krea-2-turbo", "prompt": "a"}\n', b'{"model": "krea-2-turbo", "prompt": "b"}\n', b""]

    class Terminal(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, place: Any) -> int:
            data: bytes = typed.pop(0)  # IndexError: it would wait for somebody to type on
            place[: len(data)] = data
            return len(data)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Terminal())))
    with open_input("-", Defaults()) as source:
        assert source.check().requests == 2


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read .*: No such file"):
        open_input(str(tmp_path / "none.jsonl"), Defaults())


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        open_input(str(tmp_path), Defaults())


# Local files


def test_a_path_where_a_link_is_wanted_is_a_file_beside_the_list(jsonl: Path, table: Path, tmp_path: Path) -> None:
    (tmp_path / "my pictures").mkdir()
    picture = tmp_path / "my pictures" / "a.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    folder = {"folder": str(tmp_path)}
    line = b'{"model": "gpt-4o-image", "prompt": "x", "image_urls": ["my pictures/a.png", "https://example.com/b.png"]}'
    batch = (
        b'{"custom_id": "k", "url": "/v1/images/generations", "body": {"model": "gpt-4o-image", "prompt": "x", '
        b'"image_urls": ["' + str(picture).encode() + b'"]}}'
    )
    first, second = entries(jsonl, line + b"\n" + batch, **folder)
    assert first.request is not None
    assert first.request.params()["image_urls"] == [picture, "https://example.com/b.png"]
    assert second.request is not None
    assert (second.request.key, second.request.params()["image_urls"]) == ("k", [picture])
    assert not reasons(
        table, b"model,prompt,image_urls\ngpt-4o-image,x,my pictures/a.png|my pictures/a.png\n", **folder
    )
    again = [entry.request for entry in entries(jsonl, to_json(request_line(first.request)), folder="/elsewhere")]
    assert again == [first.request]  # as errors.jsonl has it


@pytest.mark.parametrize("name", ["none.png", "none/a", "/etc/passwd", "list.txt", ".", "../secret"])
def test_a_path_that_is_no_picture_is_a_bad_line(jsonl: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "list.txt").write_text("root:x:0:0")
    line = f'{{"model": "house", "kind": "image", "prompt": "x", "image_url": "{name}"}}'
    (reason,) = reasons(jsonl, line.encode(), folder=str(tmp_path)).values()
    assert reason.startswith("image_url: ")


def test_inline_pictures_are_no_paths(jsonl: Path) -> None:
    inline = "iVBORw0KGgo/" * 5000
    line = f'{{"model": "house", "kind": "image", "prompt": "x", "image_url": "{inline}"}}'
    assert not reasons(jsonl, line.encode())
