"""The emulator and the OpenAPI document that it serves say the same."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from jsonschema_rs import Draft202012, Draft202012Validator, Registry
from openapi_spec_validator import validate

from evolink_async.emulator import Emulator, api
from evolink_async.emulator.answers import CURRENT, Refusal
from evolink_async.emulator.behaviour import Dialect
from evolink_async.emulator.files import MOST_FILES
from evolink_async.emulator.models import KINDS, Model, all_models
from evolink_async.emulator.openapi import document
from evolink_async.emulator.openapi.bodies import schema_name
from evolink_async.emulator.openapi.shapes import answer_schemas
from evolink_async.emulator.rules import check, item_spec

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]
HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
URL = "https://a.b/c.png"


class Document:
    """An OpenAPI document that can be looked things up in."""

    def __init__(self, content: Json) -> None:
        self.content = content
        self._registry = Registry([("urn:openapi", content)], draft=Draft202012)
        self._pointers = {id(node): pointer for pointer, node in walk(content)}
        self._validators: dict[str, Draft202012Validator] = {}

    def validator(self, schema: Json) -> Draft202012Validator:
        """A validator for a schema that stands in the document."""
        pointer = quote(self._pointers[id(schema)], safe="/~")
        if pointer not in self._validators:
            reference = {"$ref": f"urn:openapi#{pointer}"}
            made = Draft202012Validator(reference, registry=self._registry, validate_formats=True)
            self._validators[pointer] = made
        return self._validators[pointer]

    def schema(self, name: str) -> Json:
        found: Json = self.content["components"]["schemas"][name]
        return found

    def schema_of(self, model: Model) -> Json:
        return self.schema(schema_name(model))

    def resolved(self, node: Json) -> Json:
        """The component that a reference leads to."""
        if "$ref" not in node:
            return node
        target: Any = self.content
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return self.resolved(target)

    def operations(self) -> Iterator[tuple[str, str, Json]]:
        for path, item in self.content["paths"].items():
            for method in HTTP_METHODS:
                if method.lower() in item:
                    yield method, path, item[method.lower()]


def walk(node: Any, pointer: str = "") -> Iterator[tuple[str, Json]]:
    """Every object of a JSON text, with its JSON pointer."""
    if isinstance(node, dict):
        yield pointer, node
        for name, value in node.items():
            yield from walk(value, f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{pointer}/{index}")


@cache
def usual() -> Document:
    """The document of an emulator with no options."""
    return Document(json.loads(json.dumps(document())))


# Every word of every dialect, a word at a time.
DIALECTS = [
    Dialect(),
    Dialect(errors="old"),
    Dialect(created="bare", credits="old"),
    Dialect(created="brief", results="nested"),
    Dialect(credits="old", results="objects", polled_usage=True),
    Dialect(cancelled="cancelled", unknown_model=403),
    Dialect(validation="lenient"),
    Dialect(files_with_200=True),
]
every_dialect = pytest.mark.parametrize(
    "dialect",
    DIALECTS,
    ids=["usual", "old errors", "bare", "brief", "objects", "cancelled", "lenient", "files with 200"],
)


# --- the document ----------------------------------------------------------------------------------------------


def test_the_document_is_valid_openapi() -> None:
    validate(document(private_callbacks=True))


@every_dialect
def test_the_document_of_every_dialect_is_valid_openapi(dialect: Dialect) -> None:
    validate(document(replace(dialect, validation="lenient")))  # without the bodies of 165 models, which take a second


@every_dialect
def test_every_reference_leads_somewhere(dialect: Dialect) -> None:
    found = Document(document(dialect))
    for _, node in walk(found.content):
        if isinstance(node.get("$ref"), str):
            found.resolved(node)
        if "propertyName" in node and "mapping" in node:
            for target in node["mapping"].values():
                found.resolved({"$ref": target})


def test_every_operation_has_a_name_a_tag_and_a_summary() -> None:
    calls = [operation for _, _, operation in usual().operations()]
    assert len({call["operationId"] for call in calls}) == len(calls)
    tags = {tag["name"] for tag in usual().content["tags"]}
    assert {tag for call in calls for tag in call["tags"]} == tags
    assert all(call["summary"] for call in calls)


@every_dialect
def test_every_object_that_the_emulator_answers_is_closed(dialect: Dialect) -> None:
    for pointer, node in walk(answer_schemas(dialect)):
        if node.get("type") == "object":
            assert node["additionalProperties"] is False, pointer


def test_every_model_has_its_schema_and_every_name_of_it_leads_there() -> None:
    names = [schema_name(model) for model in all_models()]
    assert len(set(names)) == len(names) == 165
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) for name in names)
    for kind in KINDS:
        union = usual().schema(f"{kind.title()}Request")
        ours = [model for model in all_models() if model.kind == kind]
        wanted = {name: f"#/components/schemas/{schema_name(m)}" for m in ours for name in (m.id, *m.aliases)}
        assert union["discriminator"] == {"propertyName": "model", "mapping": wanted}
        assert [branch["$ref"] for branch in union["oneOf"]] == list(dict.fromkeys(wanted.values()))


def test_without_batch_or_list_the_document_says_nothing_of_them() -> None:
    smaller = document(batch=False, listing=False)
    assert set(usual().content["paths"]) - set(smaller["paths"]) == {"/v1/tasks/batch", "/v1/tasks"}
    assert "getTasks" not in json.dumps(smaller)


def test_callbacks_are_described_where_the_emulator_makes_any() -> None:
    for private in (False, True):
        for kind in KINDS:
            call = document(private_callbacks=private)["paths"][f"/v1/{kind}s/generations"]["post"]
            assert ("callbacks" in call) is private


# --- bodies: the schema and the service accept the same --------------------------------------------------------


@pytest.mark.parametrize("model", all_models(), ids=lambda model: model.id)
def test_the_example_of_a_model_is_accepted_by_its_schema_and_by_the_service(model: Model) -> None:
    [body] = usual().schema_of(model)["examples"]
    assert body["model"] == model.id
    assert not isinstance(refusal := check(model.kind, body), Refusal), refusal
    usual().validator(usual().schema_of(model)).validate(body)
    usual().validator(usual().schema(f"{model.kind.title()}Request")).validate(body)


GONE = object()  # a parameter that is left out
# What may stand anywhere in a body.
ODD_VALUES: tuple[Any, ...] = (
    *(GONE, None, True, False, 0, 1, 1.0, 2.5, -1, 10**30, 1e300, "", " ", "\n", "x", "1k", "1K", "1024x1024", "16:9"),
    *("16:9\n", "auto", "Auto", "5", "٣", "\u212a", "a --niji", "--fast\nx", "x" * 3000, "https://[half", "HTTP://a.b"),
    *("http://a", URL, "http:///", "http:// a", "ftp://a.b/c", "6f0c1a52-3b1e-4f4e-9d0a-0123456789ab"),
    *([], [""], [URL], [URL] * 2, [URL] * 4, [URL, None], ["x"], [[]], [{}], {}, {"x": 1}, [{"element_id": "e"}] * 2),
    [{"index": 1, "prompt": "p", "duration": "5"}],
    [{"index": "1", "prompt": "p", "duration": 5}],
    [{"index": 1, "prompt": "p" * 513, "duration": "5"}],
    [{"width": 1, "height": 1, "points": [1, 2.5]}],
    [{"width": 1, "height": 1, "points": ["1"]}],
    [{"type": "web_search"}],
)


def good_values(spec: Json) -> list[Any]:
    """Values that a parameter of this specification takes, as far as itself goes."""
    good: list[Any] = [*spec.get("enum", ()), *spec.get("also", ()), *spec.get("ratios", ())]
    if "min" in spec:
        good += [number for number in (spec["min"], 5, 6, 8, 10, spec.get("max", 25)) if number >= spec["min"]]
        good = [number for number in good if isinstance(number, str) or number <= spec.get("max", 25)]
    if good:
        return good
    if spec["type"] == "array":
        counts = {spec.get("min_items", 0), 1, 2, 3, 4, 8, spec.get("max_items", 5)}
        fitting = [count for count in counts if spec.get("min_items", 0) <= count <= spec.get("max_items", 8)]
        return [[good_values(item_spec(spec))[0]] * count for count in sorted(fitting)]
    if spec["type"] == "object":
        return [{name: good_values(value)[0] for name, value in spec.get("properties", {}).items()}]
    plain = {"boolean": [True, False], "integer": [0, 5], "number": [0, 12.5, 25]}
    text = {"uri": [URL], "uuid": ["6f0c1a52-3b1e-4f4e-9d0a-0123456789ab"]}.get(spec.get("format", ""), ["5", "x"])
    return plain.get(spec["type"], ["1024x1024"] if "pixels" in spec else text)


def values_for(spec: Json) -> list[Any]:
    """Values that a parameter of this specification takes, or just not."""
    near = good_values(spec)
    near += [spec[name] + step for name in ("min", "max") if name in spec for step in (-1, 1)]
    near += ["x" * (spec[name] + step) for name in ("min_length", "max_length") if name in spec for step in (-1, 0, 1)]
    near += [
        [URL] * max(0, spec[name] + step) for name in ("min_items", "max_items") if name in spec for step in (-1, 1)
    ]
    words = [word for word in near if isinstance(word, str)]
    return near + [change(word) for word in words for change in LOOKALIKES]


# What Python takes for the same, and nobody else.
LOOKALIKES: tuple[Callable[[str], str], ...] = (
    str.upper,
    lambda word: word.replace("K", "\u212a"),
    lambda word: word.replace("1", "١"),
    lambda word: f"{word}\n",
)


Change = tuple[tuple[str, ...], Any]


def changes_of(params: Json, prefix: tuple[str, ...] = ()) -> Iterator[Change]:
    """A parameter, also one inside another, and a value to try there."""
    for name, spec in params.items():
        yield from (((*prefix, name), value) for value in (*values_for(spec), *ODD_VALUES))
        yield from changes_of(spec.get("properties", {}), (*prefix, name))
    yield (*prefix, "unknown"), [1]


def good_changes_of(params: Json, prefix: tuple[str, ...] = ()) -> Iterator[Change]:
    """A parameter, also one inside another, and a value that it takes; or no value."""
    for name, spec in params.items():
        yield from (((*prefix, name), value) for value in (*good_values(spec), GONE))
        yield from good_changes_of(spec.get("properties", {}), (*prefix, name))


def changed(body: Json, changes: Iterable[Change]) -> Json:
    body = json.loads(json.dumps(body))
    for path, value in changes:
        place = body
        for name in path[:-1]:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        if value is GONE:
            place.pop(path[-1], None)
        else:
            place[path[-1]] = value
    return body


def disagreement(
    kind: str, schema: Json, body: Json, found: Document, dialect: Dialect = CURRENT, *, private: bool = False
) -> str | None:
    """How schema and service differ about a body, but for what the document says it can't express."""
    answer = check(kind, body, private_callbacks=private, dialect=dialect)
    fits = found.validator(schema).is_valid(body)
    if not isinstance(answer, Refusal):
        return None if fits else "accepted against the schema"
    if not fits or answer.param in schema["x-refused-beyond-schema"]:
        return None
    return f"refused against the schema: {answer.message}"


@pytest.mark.parametrize("model", all_models(), ids=lambda model: model.id)
def test_a_body_is_accepted_exactly_when_its_schema_says_so(model: Model) -> None:
    # A service that refuses more than its schema, or less, is a document that generates wrong clients.
    schema = usual().schema_of(model)
    [example] = schema["examples"]
    others = {name: {"type": "string"} for name in ("model", "callback_url", "image_url", "image_urls", "video_urls")}
    for single in changes_of({**others, **model.params}):
        body = changed(example, [single])
        assert (found := disagreement(model.kind, schema, body, usual())) is None, f"{found}: {body}"


@pytest.mark.parametrize("model", all_models(), ids=lambda model: model.id)
def test_rules_over_several_parameters_are_the_same_in_schema_and_service(model: Model) -> None:
    schema = usual().schema_of(model)
    [example] = schema["examples"]
    good = list(good_changes_of(model.params))
    bad = list(changes_of(model.params))
    chance = random.Random(model.id)
    for _ in range(400 if model.rules else 40):
        changes = chance.sample(good, min(len(good), chance.randint(1, 7)))
        body = changed(example, [*changes, *chance.sample(bad, chance.choice((0, 0, 1)))])
        assert (found := disagreement(model.kind, schema, body, usual())) is None, f"{found}: {body}"


@pytest.mark.parametrize("private", [False, True])
def test_a_lenient_emulator_and_one_with_private_callbacks_accept_what_their_documents_say(private: bool) -> None:
    dialect = Dialect(validation="lenient")
    lenient = Document(document(dialect, private_callbacks=private))
    schema = lenient.schema("ImageRequest")
    names = {name: {"type": "string"} for name in ("model", "callback_url", "prompt", "n", "image_url")}
    for change in changes_of(names):
        body = changed(IMAGE, [change])
        found = disagreement("image", schema, body, lenient, dialect, private=private)
        assert found is None, f"{found}: {body}"


# --- answers: everything that is sent is described -------------------------------------------------------------


class Described:
    """A client that checks every answer against the document, and remembers which it saw."""

    def __init__(self, client: httpx.AsyncClient, emulator: Emulator, document: Document) -> None:
        self._client = client
        self.emulator = emulator
        self.document = document
        self.seen: set[tuple[str, int]] = set()

    async def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = await self._client.request(method, path, **options)
        operation = self._find(method, path.partition("?")[0])
        self.seen.add((operation["operationId"], response.status_code))
        described = operation["responses"][str(response.status_code)]
        self._check_headers(response, self.document.resolved(described))
        self._check_body(response, self.document.resolved(described))
        return response

    def _find(self, method: str, path: str) -> Json:
        calls = [(template, call) for known, template, call in self.document.operations() if known == method]
        exact = [call for template, call in calls if template == path]
        [operation] = exact or [
            call for template, call in calls if re.fullmatch(re.sub(r"\{\w+\}", ".+", template), path)
        ]
        return operation

    def _check_headers(self, response: httpx.Response, described: Json) -> None:
        headers = {name.lower(): self.document.resolved(header) for name, header in described["headers"].items()}
        sent = set(response.headers) - {"content-type", "content-length"}
        assert sent <= set(headers), f"undescribed headers: {sent - set(headers)}"
        for name, header in headers.items():
            if name in sent:
                Draft202012Validator(header["schema"]).validate(response.headers[name])
            else:
                assert not header.get("required"), f"{name} is missing"

    def _check_body(self, response: httpx.Response, described: Json) -> None:
        if response.request.method == "HEAD":
            assert "content" not in described
            return
        content_type = response.headers["content-type"]
        schema = described["content"][content_type].get("schema")
        if schema is None:
            assert bool(response.content) == (response.status_code != 416)
            return
        body = response.json() if content_type == "application/json" else response.text
        errors = [
            f"{error.instance_path}: {error.message}" for error in self.document.validator(schema).iter_errors(body)
        ]
        assert not errors, f"{response.request.method} {response.request.url} {response.status_code}: {errors}"


class Clock:
    """Seconds that pass when the test says so."""

    now = 1_774_857_405.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def described(**options: Any) -> AsyncIterator[tuple[Described, Clock]]:
    clock = Clock()
    emulator = Emulator(clock=clock, **options)
    headers = {"Authorization": f"Bearer {emulator.api_key}"}
    transport = httpx.ASGITransport(emulator.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport, headers=headers) as client:
        served = (await client.get("/openapi.json")).json()
        yield Described(client, emulator, Document(served)), clock


def path_of(model: Model) -> str:
    return f"/v1/{model.kind}s/generations"


IMAGE = {"model": "gpt-4o-image", "prompt": "x"}
IMAGES = "/v1/images/generations"
FILES = "/api/v1/files"
NOBODY = {"Authorization": "Bearer sk-other"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def example_of(model: Model) -> Json:
    [body] = usual().schema_of(model)["examples"]
    return dict(body)


@every_dialect
async def test_every_answer_about_a_task_is_described_for_every_model_from_beginning_to_end(dialect: Dialect) -> None:
    statuses: set[tuple[str, str]] = set()
    models = {"*": {"cancelled_share": 0.2, "partial_share": 0.5}, "audio": {"tells_estimate": False}}
    async with described(failure_share=0.4, dialect=dialect, models=models) as (call, clock):
        tasks = []
        for model in all_models():
            tasks += [(await call("POST", path_of(model), json=example_of(model))).json()["id"] for _ in range(2)]
        for wait in (0, 30, 60, 900):
            clock.now += wait
            for start in range(0, len(tasks), 50):
                batch = await call("POST", "/v1/tasks/batch", json={"task_ids": tasks[start : start + 50]})
                assert len(batch.json()["data"]) == len(tasks[start : start + 50])
            for task_id in tasks:
                task = (await call("GET", f"/v1/tasks/{task_id}")).json()
                statuses.add((task["type"], task["status"]))
            await call("GET", "/v1/tasks?page_size=50")
            await call("GET", "/v1/credits")
    words = {"pending", "processing", "completed", "failed", dialect.cancelled}
    assert statuses == {(kind, word) for kind in KINDS for word in words}


@every_dialect
async def test_every_status_that_is_documented_is_seen_and_every_answer_is_as_described(
    dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolink_async.emulator.http.BODY_LIMIT", 10_000)
    monkeypatch.setattr("evolink_async.emulator.files.BODY_LIMIT", 10_000)
    seen: set[tuple[str, int]] = set()
    firsts = [next(model for model in all_models() if model.kind == kind) for kind in KINDS]

    async with described(dialect=dialect) as (call, clock):
        for model in firsts:
            body, path = example_of(model), path_of(model)
            key = {"Idempotency-Key": f"key-{model.kind}"}
            await call("POST", path, json=body, headers=key)
            replay = await call("POST", path, json=body, headers=key)
            assert replay.headers["idempotency-replayed"] == "true"
            await call("POST", path, json={**body, "callback_url": URL}, headers=key)
            await call("POST", path, json={})
            await call("POST", path, json={**body, "model": "unknown"})
            await call("POST", path, json=body, headers=NOBODY)
            await call("POST", path, content=b" " * 10_001)
        await _read_everything(call, clock)
        await _use_files(call)
        for state in ("disabled", "expired"):
            call.emulator.set_account(key=state)
            for method, path, operation in call.document.operations():
                if operation.get("security") is None:
                    await call(method, path)
        seen |= call.seen

    async with described(dialect=dialect, credits=0) as (call, _):
        for model in firsts:
            await call("POST", path_of(model), json=example_of(model))
        seen |= call.seen

    async with described(dialect=dialect, rate=1e-6) as (call, _):
        for model in (firsts[0], *firsts):
            await call("POST", path_of(model), json=example_of(model))
        seen |= call.seen

    assert seen == {
        (operation["operationId"], int(status))
        for _, _, operation in call.document.operations()
        for status in operation["responses"]
    }


async def _read_everything(call: Described, clock: Clock) -> None:
    task_id = (await call("POST", IMAGES, json=IMAGE)).json()["id"]
    clock.now += 1000
    await call("GET", f"/v1/tasks/{task_id}")
    await call("GET", "/v1/tasks/nonsense")
    await call("GET", "/v1/tasks/task-unified-none")
    await call("POST", "/v1/tasks/batch", json={"task_ids": [task_id, "task-unified-none"]})
    await call("POST", "/v1/tasks/batch", json={"task_ids": []})
    await call("POST", "/v1/tasks/batch", content=b" " * 10_001)
    for query in ("", "?page=2&page_size=1&status=completed&type=image&model=gpt-4o-image", "?page=0"):
        await call("GET", f"/v1/tasks{query}")
    for path in ("/v1/credits", "/v1/models"):
        await call("GET", path)
    for path in (f"/v1/tasks/{task_id}", "/v1/tasks", "/v1/credits", "/v1/models"):
        await call("GET", path, headers=NOBODY)
    await call("POST", "/v1/tasks/batch", json={}, headers=NOBODY)
    await _download(call, f"/results/{task_id}-1.png")


async def _download(call: Described, path: str) -> None:
    for method in ("GET", "HEAD"):
        await call(method, path)
        await call(method, path, headers={"Range": "bytes=1-5"})
        await call(method, path, headers={"Range": "bytes=9999999-"})
        await call(method, f"{path}x")


async def _use_files(call: Described) -> None:
    await call("POST", f"{FILES}/upload/stream", files={"file": ("dot.png", PNG)}, data={"uploadPath": "a/b"})
    await _download(call, "/files/a/b/dot.png")
    example = call.document.schema("Base64Upload")["examples"][0]
    own_id = {"X-Evo-Upload-Id": "upload-0123456789"}
    await call("POST", f"{FILES}/upload/base64", json=example, headers=own_id)
    for receipt in own_id.values():
        await call("GET", f"{FILES}/upload-receipts/{receipt}")
        await call("GET", f"{FILES}/upload-receipts/{receipt}x")
        await call("GET", f"{FILES}/upload-receipts/{receipt}", headers=NOBODY)
    link = {"file_url": "http://evolink.test/files/dot.png"}
    file_id = (await call("POST", f"{FILES}/upload/url", json=link)).json()["data"]["file_id"]
    for name in ("base64", "stream", "url"):
        await call("POST", f"{FILES}/upload/{name}", json={})
        await call("POST", f"{FILES}/upload/{name}", json={}, headers=NOBODY)
        await call("POST", f"{FILES}/upload/{name}", content=b" " * 10_001)
    await call("GET", f"{FILES}/list?page=1&pageSize=1")
    await call("GET", f"{FILES}/list?pageSize=101")
    await call("GET", f"{FILES}/quota")
    for path in ("list", "quota"):
        await call("GET", f"{FILES}/{path}", headers=NOBODY)
    await call("DELETE", f"{FILES}/file_none")
    await call("DELETE", f"{FILES}/{file_id}", headers=NOBODY)
    await call("DELETE", f"{FILES}/{file_id}")


@pytest.mark.parametrize("retry_after", ["seconds", "date", "ms", "body", None])
async def test_a_refusal_for_pace_is_described_whatever_its_hint_looks_like(retry_after: Any) -> None:
    async with described(rate=0.001, retry_after=retry_after) as (call, _):
        statuses = [(await call("POST", f"/v1/{kind}s/generations", json={})).status_code for kind in KINDS]
    assert statuses == [400, 429, 429]


async def test_every_reason_to_refuse_a_file_is_described() -> None:
    async with described() as (call, _):
        codes = set()
        for content in (b"", b"plain text", PNG):
            for number in range(MOST_FILES + 1 if content == PNG else 1):
                form = {"file": (f"{number}.png", content)}
                codes.add((await call("POST", f"{FILES}/upload/stream", files=form)).json()["code"])
        link = {"file_url": "http://elsewhere.test/x.png"}
        codes.add((await call("POST", f"{FILES}/upload/url", json=link)).json()["code"])
    assert codes == {200, 400, 40002, 40003, 40004}


async def test_a_key_whose_first_request_is_in_progress_is_refused_as_described() -> None:
    key = {"Idempotency-Key": "the-same-key-twice"}
    async with described(faults=[{"path": IMAGES, "nth": [1], "delay": 0.05}]) as (call, _):
        first = asyncio.create_task(call("POST", IMAGES, json=IMAGE, headers=key))
        for _ in range(100):  # rounds of the loop, until the first request waits for its fault
            await asyncio.sleep(0)
        assert len(call.emulator.book()["posts"]) == 1
        early = await call("POST", IMAGES, json=IMAGE, headers=key)
        assert (early.status_code, early.json()["error"]["code"]) == (409, "paid_outcome_unknown")
        assert (await first).status_code == 200


async def test_an_answer_with_a_field_more_or_less_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = api.created_task
    for change in ({"surprise": 1}, {"progress": "0"}):
        monkeypatch.setattr(api, "created_task", lambda *args, change=change: {**original(*args), **change})
        async with described() as (call, _):
            with pytest.raises(AssertionError, match=next(iter(change))):
                await call("POST", IMAGES, json=IMAGE)


@every_dialect
def test_the_examples_of_refusals_fit_their_schemas(dialect: Dialect) -> None:
    found = Document(document(dialect))
    examples = 0
    for response in found.content["components"]["responses"].values():
        media = response["content"]["application/json"]
        for example in media.get("examples", {}).values():
            examples += 1
            found.validator(media["schema"]).validate(example["value"])
    assert examples >= 13


# --- serving ---------------------------------------------------------------------------------------------------


async def test_the_document_is_served_without_a_key_and_built_once() -> None:
    async with httpx.AsyncClient(
        base_url="http://evolink.test",
        transport=httpx.ASGITransport(Emulator().app),  # type: ignore[arg-type]
    ) as client:
        answer, again = await client.get("/openapi.json"), await client.get("/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == usual().content
        assert answer.content == again.content
        head = await client.head("/openapi.json")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(answer.content))
        refused = await client.post("/openapi.json")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_an_emulator_without_batch_and_list_serves_its_own_document() -> None:
    transport = httpx.ASGITransport(Emulator(batch=False, listing=False).app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert "/v1/tasks/batch" not in paths
    assert "/v1/tasks" not in paths


async def test_nothing_of_the_document_is_loaded_before_it_is_asked_for() -> None:
    program = (
        "import asyncio, sys\n"
        "from evolink_async.emulator import Emulator\n"
        "async def main():\n"
        "    async with Emulator().serve(): pass\n"
        "asyncio.run(main())\n"
        "print([name for name in sys.modules if 'openapi' in name])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert (await process.communicate())[0] == b"[]\n"


# --- what nobody expects ---------------------------------------------------------------------------------------


async def test_a_wrong_method_is_refused_with_those_that_are_right() -> None:
    emulator = Emulator()
    headers = {"Authorization": f"Bearer {emulator.api_key}"}
    transport = httpx.ASGITransport(emulator.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(base_url="http://evolink.test", transport=transport, headers=headers) as client:
        for template, item in usual().content["paths"].items():
            path = re.sub(r"\{\w+\}", "x", template)
            right = [method for method in HTTP_METHODS if method.lower() in item]
            for method in set(HTTP_METHODS) - set(right):
                answer = await client.request(method, path)
                assert answer.status_code == 405, f"{method} {path}"
                assert answer.headers["allow"] == ", ".join(right), f"{method} {path}"


DEEP = 100_000
ODD_BODIES = [
    b"",
    b"null",
    b"[]",
    b'"x"',
    b"{",
    b"\x00",
    b"\xff\xfe",
    "{}".encode("utf-16"),
    b"[" * DEEP,
    *(
        b'{"model":"gpt-4o-image","prompt":"x","extra":' + b"[" * depth + b"]" * depth + b"}"
        for depth in (400, *range(900, 1000, 4), 40_000)
    ),
    b'{"model":"gpt-4o-image","model":"gpt-4o-image","prompt":1,"prompt":"x","prompt":"y"}',
    b'{"model":"gpt-4o-image","prompt":"\\ud800"}',
    b'{"model":"\\ud800","prompt":"x"}',
    b'{"model":"gpt-4o-image","prompt":"\\u0000"}',
    b'{"model":"gpt-4o-image","prompt":"x","n":' + b"9" * 4000 + b"}",
    b'{"model":"gpt-4o-image","prompt":"x","n":' + b"9" * 5000 + b"}",
    b'{"model":"gpt-4o-image","prompt":"x","n":1e999}',
    b'{"model":"gpt-4o-image","prompt":"x","n":NaN}',
    b'{"model":"suno-persona","model_params":{"source_task_id":"x","name":"x","description":"x",'
    b'"result_id":"6f0c1a52-3b1e-4f4e-9d0a-0123456789ab","vocal_start":0.5,"vocal_end":' + b"9" * 400 + b"}}",
    b'{"model":"kling-v3-text-to-video","prompt":"x","model_params":{"multi_prompt":[{"index":1,"prompt":"x",'
    b'"duration":"' + b"9" * 5000 + b'"}]}}',
    b'{"model":"suno-v5","custom_mode":true,"instrumental":true,"style":"\\udfff","title":"\\ud800"}',
    b'{"task_ids":["\\ud800","\\u0000"]}',
    b'{"base64_data":"iVBORw0KGgo=","file_name":"\\ud800.png"}',
    b'{"base64_data":"iVBORw0KGgo=","upload_path":"\\u0000/../x"}',
    b'{"base64_data":"\\ud800"}',
    b'{"file_url":"http://[half"}',
    b'{"file_url":"\\ud800"}',
]
ODD_TARGETS = [
    "/v1/tasks/%00",
    "/v1/tasks/%ff%fe",
    "/v1/tasks/%",
    "/v1/tasks/%zz",
    "/v1/tasks/%ed%a0%80",
    "/v1/tasks/task-unified-" + "9" * 20_000,
    "/v1/tasks/../../x",
    "/v1/tasks//",
    "/v1/tasks?page=" + "9" * 5000,
    "/v1/tasks?page=%D9%A3",
    "/v1/tasks?page=1&page=&page_size",
    "/v1/tasks?%00=%ff&&&==&page_size=1%00",
    "/v1/tasks?status=%ed%a0%80&type=%00",
    "/api/v1/files/list?page=" + "9" * 5000,
    "/api/v1/files/list?pageSize=%B2",
    "/api/v1/files/%00",
    "/results/%00",
    "/results/-1.",
    "/results/task-unified-" + "9" * 5000 + ".png",
    "/files/%ff/../%2e%2e/x",
    "/openapi.json?%ff",
    "//v1/tasks",
    "/%F0%9F%92%A9",
]


@asynccontextmanager
async def raw_server() -> AsyncIterator[Callable[[bytes], Awaitable[bytes]]]:
    """A function that sends bytes to an emulator and gives the bytes of its answer."""
    async with Emulator(speed=1e6).serve() as server:
        host, port = server.base_url.removeprefix("http://").split(":")

        async def send(request: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            answer = await asyncio.wait_for(reader.read(), 60)
            writer.close()
            await writer.wait_closed()
            return answer

        yield send


async def status_of(answer: Awaitable[bytes]) -> int:
    return int((await answer).split(b" ", 2)[1])


def request_bytes(method: str, target: str, body: bytes = b"", *headers: bytes) -> bytes:
    lines = [f"{method} {target} HTTP/1.1".encode(), b"Host: evolink.test", b"Connection: close"]
    lines += [b"Authorization: Bearer sk-evo-emulator", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def test_no_body_however_odd_breaks_a_call() -> None:
    calls = [path for method, path, _ in usual().operations() if method == "POST"]
    async with raw_server() as send:
        for path in calls:
            for body in ODD_BODIES:
                status = await status_of(send(request_bytes("POST", path, body, b"Content-Type: application/json")))
                assert status in (200, 400), f"{status} {path} {body[:80]!r}"


async def test_no_target_however_odd_breaks_a_call() -> None:
    async with raw_server() as send:
        answer = await send(request_bytes("POST", IMAGES, json.dumps(IMAGE).encode()))
        task_id = json.loads(answer.partition(b"\r\n\r\n")[2])["id"]
        results = [f"/results/{task_id}-{number}.png" for number in ("9" * 5000, "%D9%A1", "", "0", "-1")]
        for target in [*ODD_TARGETS, *results]:
            for method in ("GET", "DELETE", "POST", "HEAD"):
                status = await status_of(send(request_bytes(method, target)))
                assert 200 <= status < 500, f"{status} {method} {target[:80]}"


async def test_no_header_however_odd_breaks_a_call() -> None:
    image = json.dumps(IMAGE).encode()
    async with raw_server() as send:
        for value in (b"", b"\xff\xfe", b"x" * 30_000, b"\t", b'"', b"a,b"):
            for name in (b"Idempotency-Key", b"Authorization", b"Accept", b"Range", b"Content-Type", b"Host"):
                status = await status_of(send(request_bytes("POST", IMAGES, image, name + b": " + value)))
                assert 200 <= status < 500, f"{status} {name!r} {value[:20]!r}"
        assert (
            await status_of(send(request_bytes("POST", f"{FILES}/upload/stream", b"--\xff", b"Content-Type: \xff")))
            == 400
        )
        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="dot.png"\r\n\r\n' + PNG + b"\r\n--x--"
        multipart = b"Content-Type: multipart/form-data; boundary=x"
        assert await status_of(send(request_bytes("POST", f"{FILES}/upload/stream", form, multipart))) == 200
        for value in (
            b"bytes=" + b"9" * 5000 + b"-",
            b"bytes=-" + b"9" * 5000,
            b"bytes=\xb2-",
            b"bytes=-",
            b"bytes=5-2",
        ):
            status = await status_of(send(request_bytes("GET", "/files/dot.png", b"", b"Range: " + value)))
            assert status in (200, 206, 416), f"{status} {value[:20]!r}"


async def test_half_a_surrogate_pair_is_answered_as_valid_json() -> None:
    async with described() as (call, clock):
        body = {"model": "suno-v5", "custom_mode": True, "instrumental": True, "style": "s", "title": "T"}
        text = json.dumps(body).replace("T", "\\ud800")
        task = (await call("POST", "/v1/audios/generations", content=text)).json()
        clock.now += 1000
        done = (await call("GET", f"/v1/tasks/{task['id']}")).json()
    assert done["result_data"][0]["title"] == "?"


# --- schemathesis ----------------------------------------------------------------------------------------------


async def test_schemathesis_finds_nothing() -> None:
    # A bounded share of what tests/emulator/schemathesis.toml describes: all phases, but the coverage phase only of the
    # calls that don't generate, as for 165 models it sends 18 000 requests.
    async with Emulator(speed=2000, failure_share=0.3).serve() as server:
        address = f"{server.base_url}/openapi.json"
        runs = [
            ("--phases", "examples,fuzzing,stateful", "--max-examples", "10"),
            ("--phases", "coverage", "--exclude-tag", "Generations"),
        ]
        outputs = await asyncio.gather(*(schemathesis(address, *run) for run in runs))
    for code, output in outputs:
        assert code == 0, output
        found = re.search(r"(\d+) generated, \1 passed", output)
        assert found is not None, output
        assert int(found[1]) > 300, output


async def schemathesis(address: str, *options: str) -> tuple[int, str]:
    """Exit code and output of a run; always with the same seed, so that a failure is about what was changed."""
    config = "tests/emulator/schemathesis.toml"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run", address),
        *("--seed", "1", "--continue-on-failure", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    try:
        output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output
