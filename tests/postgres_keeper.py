"""A PostgreSQL server for tests, which lives as long as the program that has started this one, however that ends.

    python postgres_keeper.py      USER, PASSWORD and the folder of the binaries come as a line of JSON

Then it prints the port, and obeys: "stop" (as if the server had crashed), "start", each answered by "done". When its
standard input ends, so does the server, and its folder is removed. Nothing here is durable: the machine may not crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",  # so that a ledger has to ask for more
    "scram_iterations": "1",
    "autovacuum": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "lc_messages": "C",
}


class Server:
    """One server in a folder of its own."""

    def __init__(self, binaries: Path, user: str, password: str, **settings: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="evolink-postgres-"))
        self._as: dict[str, Any] = {"cwd": self.folder}
        if os.name == "posix" and os.geteuid() == 0:  # which PostgreSQL refuses to be
            import pwd

            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._as |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._binaries = self._reachable(binaries)
        secret = self.folder / "password"
        secret.write_text(password)
        if "user" in self._as:
            os.chown(secret, self._as["user"], self._as["group"])
        how = (
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
            "--no-instructions",
            "-c",
            "scram_iterations=1",
        )
        self._run("initdb", "-D", "data", "-U", user, "--pwfile=password", *how)
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            for name, value in (SETTINGS | {"unix_socket_directories": str(self.folder)} | settings).items():
                file.write(f"{name} = '{value}'\n")
        for _ in range(5):  # another program may be faster in taking the port
            self.port = _unused_port()
            with contextlib.suppress(subprocess.CalledProcessError):
                self.start()
                return
        raise OSError((self.folder / "log").read_text())

    def start(self) -> None:
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", f"-p {self.port}", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")

    def _reachable(self, binaries: Path) -> Path:
        """Where whoever runs the server may run it: root's own folders are closed to others."""
        try:
            subprocess.run([binaries / "bin" / "postgres", "--version"], check=True, capture_output=True, **self._as)
        except (OSError, subprocess.CalledProcessError):
            copy = self.folder / "installed"
            shutil.copytree(binaries, copy / binaries.parent.name / binaries.name)
            libraries = binaries.parent.with_name(f"{binaries.parent.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, copy / libraries.name)
            return copy / binaries.parent.name / binaries.name
        return binaries

    def _run(self, program: str, *arguments: str) -> None:
        # Not through pipes: the server would keep them open.
        with (self.folder / f"{program}.out").open("w") as output:
            subprocess.run(
                [self._binaries / "bin" / program, *arguments],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
                **self._as,
            )


def _unused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main() -> None:
    told = json.loads(sys.stdin.readline())
    server = Server(Path(told.pop("binaries")), told.pop("user"), told.pop("password"), **told)
    running = True
    try:
        print(server.port, server.folder, flush=True)
        for line in sys.stdin:
            if (line == "start\n") != running:
                running = not running
                server.start() if running else server.stop()
            print("done", flush=True)
    finally:
        if running:
            server.stop()
        shutil.rmtree(server.folder)


if __name__ == "__main__":
    main()
