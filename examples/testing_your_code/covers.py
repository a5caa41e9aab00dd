"""Code to be tested: a cover picture for every product of a shop, or a placeholder and the reason.

See test_covers.py beside it for its tests, and docs/testing.md for how they work.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evolink_async import AsyncEvoLink, DownloadError, EvoLinkError, ImageRequest, Task

PLACEHOLDER = Path("placeholder.png")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    sku: str
    name: str


@dataclass(frozen=True)
class Cover:
    """The picture of a product; `problem` says why it is only the placeholder."""

    path: Path
    problem: str | None = None


async def make_covers(products: Iterable[Product], folder: Path) -> dict[str, Cover]:
    """A cover for every product, by SKU. Never raises because of the service."""
    products = list(products)
    covers = {product.sku: Cover(PLACEHOLDER, "not tried") for product in products}
    requests = [
        ImageRequest(model="gpt-4o-image", prompt=f"{product.name}, on white", key=product.sku) for product in products
    ]
    async with AsyncEvoLink() as client:
        try:
            async with client.pool(requests) as pool:
                async for outcome in pool:
                    if outcome.ok:
                        covers[outcome.identity] = await _saved(client, outcome.unwrap(), folder)
                    else:
                        covers[outcome.identity] = Cover(PLACEHOLDER, outcome.status)
        except EvoLinkError as reason:  # what ended the pool early, such as an empty account
            logger.error("the covers are incomplete: %s", reason)
    return covers


async def fetch_cover(task_id: str, folder: Path) -> Cover:
    """The cover that an earlier run has paid for, as long as its link lives: a day."""
    async with AsyncEvoLink() as client:
        return await _saved(client, await client.tasks.wait(task_id), folder)


async def _saved(client: AsyncEvoLink, task: Task, folder: Path) -> Cover:
    try:
        [path] = await client.save(task, folder)
    except DownloadError as error:
        return Cover(PLACEHOLDER, str(error))
    return Cover(path)
