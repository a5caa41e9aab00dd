"""A proxy before the PostgreSQL server that cuts a connection at the very word of the client that is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from postgres import Postgres, database_of

from evolink_async.ledger import database, turns
from evolink_async.testing import FaultProxy, ResetPeer
from evolink_async.testing import proxy as proxy_module


class Cutter:
    """url: of the database, through the proxy. cuts: how many there were."""

    def __init__(self, proxy: FaultProxy, url: str) -> None:
        self.proxy, self.url = proxy, url
        self.cuts = 0
        self._words: list[tuple[str, bytes]] = []

    def cut_at(self, *words: str, carried_out: bool = False) -> None:
        """Cut the connection at the last of the words, once they have come one after the other, in pieces of their own.

        carried_out: the server does what the last one says, and it is its answer that is lost.
        """
        self._words = [("upstream", word.encode()) for word in words]
        if carried_out:
            self._words.append(("downstream", self._words[-1][1]))

    def came(self, pipe: Any, data: bytes) -> None:
        if not self._words or self._words[0][0] != pipe._stream or self._words[0][1] not in data:
            return
        stream, _ = self._words.pop(0)
        if not self._words:
            self.cuts += 1
            pipe._connection.add(ResetPeer(stream=stream))


@asynccontextmanager
async def cutting(postgres: Postgres, url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cutter]:
    """Nobody waits for a lost server, what cannot be written is tried again soon, and statements are sent as text."""
    monkeypatch.setattr(database, "PAUSES_WHEN_LOST", ())
    monkeypatch.setattr(turns, "_FIRST_PAUSE", 0.1)
    connect = psycopg.connect

    def connected(*args: Any, **options: Any) -> Any:
        connection = connect(*args, **options)
        connection.prepare_threshold = None
        return connection

    monkeypatch.setattr(psycopg, "connect", connected)
    async with FaultProxy(f"127.0.0.1:{postgres.port}") as proxy:
        cutter = Cutter(proxy, postgres.url(database_of(url), port=proxy.address[1]))
        came = proxy_module._Pipe.came

        def watched(pipe: Any, data: bytes) -> None:
            cutter.came(pipe, data)
            came(pipe, data)

        monkeypatch.setattr(proxy_module._Pipe, "came", watched)
        yield cutter
