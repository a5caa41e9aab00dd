"""A user's program that is killed: pictures of its own through a pool with a ledger.

python upload_job.py LEDGER FOLDER ROWS

Makes the pictures that are missing, prints "entered", the key of each outcome that is ok, and "end".
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from evolink_async import AsyncEvoLink, ImageRequest


async def main(ledger: str, folder: Path, rows: int) -> None:
    pictures = [folder / f"{number}.png" for number in range(rows)]
    for number, path in enumerate(pictures):
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + str(number).encode())
    requests = [
        ImageRequest(model="gpt-4o-image", prompt="as a painting", image_urls=[path], key=path.stem)
        for path in pictures
    ]
    async with AsyncEvoLink() as client, client.pool(requests, ledger=ledger, max_outstanding=8) as pool:
        print("entered", flush=True)
        async for outcome in pool:
            print(outcome.key if outcome.ok else f"{outcome.status} {outcome.error}", flush=True)
    print("end", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
