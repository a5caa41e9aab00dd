"""The face of the package: its names, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import evolink_async

# DESIGN sections 4 and 5.
PROMISED = [
    "AsyncEvoLink",
    "RateLimit",
    "RetryPolicy",
    "ImageRequest",
    "VideoRequest",
    "AudioRequest",
    "GenerationRequest",
    "Task",
    "TaskStatus",
    "TaskFailure",
    "Usage",
    "Credits",
    "UploadedFile",
    "EvoLinkError",
    "ConfigurationError",
    "ClosedError",
    "InvalidRequestError",
    "ConnectionFailedError",
    "ResponseError",
    "SubmitOutcomeUnknownError",
    "NotSubmittedError",
    "APIStatusError",
    "BadRequestError",
    "AuthenticationError",
    "QuotaExhaustedError",
    "PermissionDeniedError",
    "NotFoundError",
    "RateLimitError",
    "ServerError",
    "TaskError",
    "TaskFailedError",
    "TaskCancelledError",
    "TaskLostError",
    "TaskTimeoutError",
    "BudgetExceededError",
    "LedgerError",
    "DownloadError",
    "ResultExpiredError",
    "TaskPool",
    "Outcome",
    "PoolStats",
]

EXTRAS = {
    "typer", "rich", "starlette", "uvicorn", "PIL", "obstore", "opentelemetry", "jinja2", "tqdm", "psycopg",
    "procrastinate", "uvloop", "sqlite3", "aiohttp",
}  # fmt: skip


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout))


def test_every_promised_name_is_there_and_loads() -> None:
    assert set(PROMISED) <= set(evolink_async.__all__)
    assert sorted(evolink_async.__all__, key=str.casefold) == sorted(set(evolink_async.__all__), key=str.casefold)
    assert dir(evolink_async) == sorted(evolink_async.__all__)
    for name in evolink_async.__all__:
        value = getattr(evolink_async, name)
        if isinstance(value, type):
            assert value.__name__ == name


def test_all_is_what_type_checkers_see() -> None:
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(evolink_async))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(evolink_async.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    for name in ("nothing", "SomeError", "annotations_"):
        with pytest.raises(AttributeError, match=name):
            getattr(evolink_async, name)
    with pytest.raises(ImportError):
        from evolink_async import Nothing  # type: ignore[attr-defined]  # noqa: F401


def test_importing_the_package_loads_nothing_but_itself() -> None:
    extra = modules_after("import evolink_async") - modules_after("import importlib, typing")
    assert {name.partition(".")[0] for name in extra} - sys.stdlib_module_names == {"evolink_async"}
    assert len(extra) < 5


def test_using_the_client_loads_no_extra() -> None:
    four = modules_after("import httpx, anyio, pydantic, aiolimiter")  # httpx itself takes rich where it finds it
    ours = modules_after("from evolink_async import *; AsyncEvoLink('sk-x')")
    assert {name.partition(".")[0] for name in ours - four} & EXTRAS == set()
