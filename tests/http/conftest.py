"""Answers are read by either of two parsers: what goes over sockets is tested with both."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from evolink_async.http import wire


@pytest.fixture(params=["httptools", "h11"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The parser that new connections use: that of the `fast` extra, or that of the core install."""
    if request.param == "h11":
        monkeypatch.setitem(sys.modules, "httptools", None)
    wire.parser_class.cache_clear()
    assert wire.parser_class().__name__.lower().startswith(request.param)
    yield request.param
    wire.parser_class.cache_clear()
