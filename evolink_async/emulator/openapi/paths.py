"""The calls that the emulator answers. Pure."""

from __future__ import annotations

from evolink_async.emulator.answers import Json
from evolink_async.emulator.behaviour import Dialect
from evolink_async.emulator.files import TYPES
from evolink_async.emulator.media import CONTENT_TYPES
from evolink_async.emulator.models import KINDS, all_models
from evolink_async.emulator.rules import DEEPEST

from .examples import example_body
from .files import file_paths
from .inputs import PAGE, body, parameter, query
from .responses import EXAMPLE_TASK, answer, answers, call, headers_of
from .shapes import ref

_SHOWN = ("gpt-image-2", "seedance-2.0-text-to-video", "suno-v5-beta")  # the first model that a reader sees


def paths(dialect: Dialect, *, batch: bool, listing: bool, private_callbacks: bool) -> Json:
    """Every path, in the order in which a reader needs them."""
    results, own_files = ("getResult", "headResult"), ("getFile", "headFile")
    return {
        **{
            f"/v1/{kind}s/generations": {"post": _submit(kind, batch=batch, private_callbacks=private_callbacks)}
            for kind in KINDS
        },
        "/v1/tasks/{task_id}": {"get": _READ_TASK},
        **({"/v1/tasks/batch": {"post": _READ_TASKS}} if batch else {}),
        **({"/v1/tasks": {"get": _LIST_TASKS}} if listing else {}),
        "/v1/credits": {"get": _CREDITS},
        "/v1/models": {"get": _MODELS},
        **file_paths(dialect),
        "/results/{name}": _download(
            "name", f"{EXAMPLE_TASK}-1.png", "a result, by the link in its task", tuple(CONTENT_TYPES.values()), results
        ),
        "/files/{path}": _download("path", "dot.png", "an uploaded file, by its link", TYPES, own_files),
    }


_ABOUT_BODIES = (
    "Every model takes its own parameters (documented). What JSON Schema can't say of them is in the words of the "
    "schema, and `x-refused-beyond-schema` lists the parameters concerned. How long a model takes and how it is billed "
    "is documented for most, for the others our guess. Our guesses as well: a null is a parameter that was not sent; "
    "parameters that a model doesn't know are ignored, but for media, which are refused; nothing may be nested deeper "
    f"than {DEEPEST} levels."
)

_TASK_ENDED: Json = {
    "{$request.body#/callback_url}": {
        "post": {
            "summary": "The task has ended, and its billing is confirmed (documented)",
            "requestBody": body("Task"),
            "responses": {
                "2XX": {"description": "It is delivered. Anything else: again after 1, 2 and 4 s, then no more."}
            },
            "security": [],
        }
    }
}

_READ_TASK = call(
    "getTask",
    "Tasks",
    "Poll a task",
    answers(
        answer("The task as it is now; a failed one too.", ref("Task")),
        _400="InvalidTaskId",
        _401="Unauthorized",
        _403="KeyRefused",
        _404="TaskNotFound",
    ),
    parameters=[parameter("TaskId")],
)

_READ_TASKS = call(
    "getTasks",
    "Tasks",
    "Poll up to 50 tasks at once (vendor's client, not documented)",
    answers(
        answer("Those of the tasks that there are.", ref("TaskBatch")),
        _400="Invalid",
        _401="Unauthorized",
        _403="KeyRefused",
        _413="TooLarge",
    ),
    requestBody=body("BatchRequest"),
)

_LIST_TASKS = call(
    "listTasks",
    "Tasks",
    "List the account's tasks, the newest first (vendor's client, not documented)",
    answers(answer("One page.", ref("TaskPage")), _400="Invalid", _401="Unauthorized", _403="KeyRefused"),
    parameters=[
        PAGE,
        query("page_size", "Rows.", {"type": "integer", "minimum": 1, "maximum": 50, "default": 20}),
        query(
            "status",
            "processing includes pending, which is no value of its own (vendor's client).",
            {"type": "string", "enum": ["processing", "completed", "failed", "cancelled"]},
        ),
        query("type", "image, video or audio; other words match nothing.", {"type": "string"}),
        query("model", "A model's full id.", {"type": "string"}),
    ],
)

_CREDITS = call(
    "getCredits",
    "Account",
    "What is left",
    answers(answer("The balance.", ref("Credits")), _401="Unauthorized", _403="KeyRefused"),
)

_MODELS = call(
    "listModels",
    "Account",
    "The models that the key may use (vendor's client)",
    answers(answer("Every model.", ref("ModelList")), _401="Unauthorized", _403="KeyRefused"),
)


def _submit(kind: str, *, batch: bool, private_callbacks: bool) -> Json:
    links: Json = {
        "poll": {
            "operationId": "getTask",
            "parameters": {"task_id": "$response.body#/id"},
            "description": "Ask for the task until its status is completed or failed.",
        }
    }
    if batch:
        links["pollBatch"] = {"operationId": "getTasks", "requestBody": {"task_ids": ["$response.body#/id"]}}
    accepted = answer(
        "The task was accepted, and its price is reserved.",
        ref("CreatedTask"),
        headers_of(Idempotency_Replayed="IdempotencyReplayed"),
        links=links,
    )
    shown = next(model for model in all_models() if model.kind == kind and model.id in _SHOWN)
    return call(
        f"create{kind.title()}",
        "Generations",
        f"Start a task that makes {'audio' if kind == 'audio' else f'{kind}s'}",
        answers(
            accepted,
            _400="Invalid",
            _401="Unauthorized",
            _402="InsufficientCredits",
            _403="Forbidden",
            _409="Conflict",
            _413="TooLarge",
            _429="TooManyRequests",
        ),
        description=_ABOUT_BODIES,
        parameters=[parameter("IdempotencyKey")],
        requestBody=body(f"{kind.title()}Request", examples={shown.id: {"value": example_body(shown)}}),
        **({"callbacks": {"taskEnded": _TASK_ENDED}} if private_callbacks else {}),
    )


def _download(name: str, example: str, description: str, types: tuple[str, ...], operations: tuple[str, str]) -> Json:
    """GET and HEAD of what a link leads to."""
    whole = headers_of(Accept_Ranges="AcceptRanges", ETag="ETag")
    part = {**whole, **headers_of(Content_Range="ContentRange")}
    media: Json = {content_type: {} for content_type in types}
    text: Json = {"text/plain": {"schema": {"type": "string", "const": "no such file, or its link has expired"}}}

    def fetching(operation_id: str, method: str, with_body: bool) -> Json:
        def answered(description: str, headers: Json, content: Json) -> Json:
            return {"description": description, "headers": headers, **({"content": content} if with_body else {})}

        return {
            **call(
                operation_id,
                "Results",
                f"{method} {description}",
                {
                    "200": answered("The whole file.", whole, media),
                    "206": answered("The part asked for.", part, media),
                    "404": answered("No such file, or no longer.", headers_of(), text),
                    "416": answered("The part asked for lies outside the file.", part, media),
                },
                description="Without the key: never send it there. An Authorization header is noted in the book.",
            ),
            "security": [],
        }

    return {
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "example": example},
            parameter("Range"),
            parameter("IfRange"),
        ],
        "get": fetching(operations[0], "Fetch", True),
        "head": fetching(operations[1], "Look at", False),
    }
