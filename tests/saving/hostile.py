"""Checks of hostile lines, as file names and as links; with other people's lists:

    python tests/saving/hostile.py names traversal.txt ...
    python tests/saving/hostile.py links ssrf.txt ...

Such lists: PayloadsAllTheThings (MIT), "Directory Traversal/Intruder", "Server Side Request Forgery".
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from unittest.mock import patch

from mediahost import Call, answer, media_host, picture

from evolink_async import AsyncEvoLink, DownloadError, InvalidRequestError, RetryPolicy, Task
from evolink_async.http import stream
from evolink_async.http.addresses import refusal
from evolink_async.saving import download
from evolink_async.saving.folder import Folder, PartFile
from evolink_async.saving.names import request_stem, stem_of_url, unique_stem

PNG = picture(16)
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))}


def is_safe(name: str) -> bool:
    """Safe on POSIX and on Windows, as a plain name in whatever folder."""
    stem = name.partition(".")[0].upper().translate(str.maketrans("¹²³", "123"))
    return (
        PurePosixPath("folder", name).parent == PurePosixPath("folder")
        and PureWindowsPath("folder", name).parent == PureWindowsPath("folder")
        and name not in ("", ".", "..")
        and name[0] not in ".-"
        and name[-1] not in ". "
        and 0 < len(name.encode()) <= 255
        and stem not in _RESERVED
        and not any(not character.isprintable() or character in '/\\:*?"<>|' for character in name)
    )


def names_of(line: str) -> list[str]:
    """The names of files that such a line can lead to: as a key, an id, a link, or the end of one."""
    links = line, f"https://media.example/{line}", f"https://media.example/a/{line}?name={line}"
    return [
        f"{request_stem(line, 0, line)}-1.png",
        f"{request_stem(line, 0, line, case_matters=False)}-12.mp4",
        f"{request_stem(None, 0, line)}-1.png",
        f"{unique_stem(line)}-1.png",
        *(f"{stem_of_url(link)}.png" for link in links),
    ]


def check_names(lines: Iterable[str], top: Path) -> Counter[str]:
    """Write a file under every name that the lines lead to; raise if one is not in the folder, or is not safe."""
    place, found = Folder(top / "out"), Counter[str]()
    names: set[str] = set()
    for line in lines:
        found["lines"] += 1
        for name in names_of(line):
            assert is_safe(name), (line, name)
            names.add(name)
    with patch.object(os, "fsync", lambda _: None):
        for name in names:
            found["names"] += 1
            part = PartFile(top / "out")
            part.open()
            part.add(b"x")
            path = place.publish(part, name, None)
            assert path.resolve().parent == (top / "out").resolve(), name
            path.unlink()
            assert list((top / "out").iterdir()) == [], name
    assert [path.name for path in top.iterdir()] == ["out"]
    return found


async def _resolve_for_evil(host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
    """The system's reading of numbers in all their forms; every name leads to the machine itself."""
    loop = asyncio.get_running_loop()
    try:
        return await type(loop).getaddrinfo(loop, host, port, flags=socket.AI_NUMERICHOST, **options)
    except OSError:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


async def check_links(lines: Iterable[str], folder: Path) -> Counter[str]:
    """Follow every line as a result link and as a redirect: raise if anything private is connected to."""
    loop, found, reached = asyncio.get_running_loop(), Counter[str](), []
    connect = stream._connect_one

    async def tripwire(loop: Any, address: tuple[int, Any]) -> socket.socket:
        if address[1][:2] == ("127.0.0.1", host.port):
            return await connect(loop, address)
        reached.append(str(address[1][0]))
        raise ConnectionRefusedError("nothing of the public internet is here")

    target = ""

    async def redirect(call: Call, writer: asyncio.StreamWriter) -> None:
        answer(writer, b"", "302 Found", location=re.sub(r"[^\x21-\x7e]", "", target))

    async with media_host(redirect) as host, AsyncEvoLink("sk-x", base_url=host.url, retry=_ONCE) as client:
        with (
            patch.object(loop, "getaddrinfo", _resolve_for_evil),
            patch.object(stream, "_connect_one", tripwire),
            patch.object(download, "TRIES", 1),
        ):
            for line in lines:
                found["lines"] += 1
                target = line
                wire = {"id": "task-unified-1-x", "status": "completed", "results": [line]}
                for source in (line, Task.model_validate(wire), f"{host.url}/a.png"):
                    try:
                        saved = await client.save(source, folder)
                    except (DownloadError, InvalidRequestError) as error:
                        found[_reason(str(error))] += 1
                    else:
                        assert saved == [], (line, saved)  # a task without an http(s) link has nothing to save
                        found["no link at all"] += 1
    for address in reached:
        assert refusal(address) is None, address
    found["connections to public addresses"] = len(reached)
    assert not folder.exists() or list(folder.iterdir()) == []
    return found


_ONCE = RetryPolicy(base_delay=0.001, max_delay=0.001)
_REASONS = (
    "loopback", "link-local", "private", "multicast", "no network address", "user name", "only http", "is no URL",
    "no URL", "none that can exist", "give a Task", "could not be fetched", "redirects", "HTTP",
)  # fmt: skip


def _reason(message: str) -> str:
    return next((reason for reason in _REASONS if reason in message), message[:80])


def main(what: str, *files: str) -> None:
    texts = [Path(file).read_bytes().decode("utf-8", "surrogateescape") for file in files]
    lines = list(dict.fromkeys(line for text in texts for line in text.splitlines() if line))
    with tempfile.TemporaryDirectory() as top:
        out = Path(top)
        found = check_names(lines, out) if what == "names" else asyncio.run(check_links(lines, out / "out"))
    print(", ".join(f"{name}: {count}" for name, count in found.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
