"""Pictures for requests, and what the emulated files service has seen of them, in virtual time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from loop_executor import InLoop
from pool_world import MODEL, Handler, World, now

from evolink_async import ImageRequest

FILES = "/api/v1/files"
UPLOAD = f"{FILES}/upload/stream"


def picture(number: object) -> bytes:
    """A picture as far as its first bytes tell, of a content of its own."""
    return b"\x89PNG\r\n\x1a\n" + f"picture {number}".encode()


def edit(picture: Path | bytes | str, name: object = 0, **params: Any) -> ImageRequest:
    return ImageRequest(model=MODEL, prompt=f"edit {name}", image_urls=[picture], **params)


def without_threads(monkeypatch: Any) -> None:
    """Files are read in the loop, so that virtual time does not pass meanwhile."""
    monkeypatch.setattr("evolink_async.saving.folder._threads", lambda process, purpose: InLoop())


@dataclass
class FilesSeen:
    """Watches a world's wire: how many files there were, and which links requests carried while their files lived."""

    world: World
    most: int = 0
    full: int = 0
    links: list[list[str]] = field(default_factory=list)  # of each POST
    dead: list[str] = field(default_factory=list)  # links that led nowhere when they were sent

    def __post_init__(self) -> None:
        self._tamper = self.world.wire.tamper
        self.world.wire.tamper = self.carry

    @property
    def store(self) -> Any:
        return self.world.emulator.app.files

    @property
    def stored(self) -> int:
        count: int = self.store.quota(now())["used_files"]
        return count

    @property
    def uploads(self) -> int:
        count: int = self.store.uploads
        return count

    def content(self, link: str) -> bytes | None:
        file = self.store.find(httpx.URL(link).path, now())
        return None if file is None else file.content

    async def carry(self, request: httpx.Request, go_on: Handler) -> httpx.Response:
        if request.url.path.endswith("/generations"):
            links = json.loads(await request.aread()).get("image_urls", [])
            self.links.append(links)
            self.dead += [link for link in links if self.content(link) is None]
        response = await (go_on(request) if self._tamper is None else self._tamper(request, go_on))
        if request.url.path.startswith(FILES):
            self.most = max(self.most, self.stored)
            if request.url.path == UPLOAD and response.status_code == 400:
                self.full += 1
        return response
