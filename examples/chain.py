"""A chain: generate a picture, and as soon as it is there make a video out of it, all in one pool.

EVOLINK_API_KEY=... python examples/chain.py "a lighthouse at dusk" "a harbour in fog"
"""

from __future__ import annotations

import asyncio
import sys

from evolink_async import AsyncEvoLink, EvoLinkError, ImageRequest, VideoRequest


def video_of(picture: str, prompt: str, key: str) -> VideoRequest:
    """The second step: the picture comes alive."""
    return VideoRequest(
        model="seedance-2.0-image-to-video",
        prompt=f"{prompt}, the camera moves slowly forward",
        image_urls=[picture],
        duration=5,
        quality="480p",
        key=f"{key}/video",
    )


async def main(prompts: list[str]) -> None:
    """Pictures first; each finished one adds its video to the same pool."""
    pictures = [
        ImageRequest(model="gpt-4o-image", prompt=prompt, key=f"{number}", metadata={"prompt": prompt})
        for number, prompt in enumerate(prompts, 1)
    ]
    async with AsyncEvoLink() as client, client.pool(pictures) as pool:
        async for outcome in pool:
            if not outcome.ok:
                print(outcome.key, outcome.status, outcome.error, file=sys.stderr)
            elif isinstance(outcome.request, ImageRequest):
                pool.add(video_of(outcome.urls[0], outcome.request.metadata["prompt"], outcome.identity))
            else:
                print(outcome.key, *outcome.urls)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        asyncio.run(main(sys.argv[1:]))
    except EvoLinkError as error:  # no key, no credits, ...
        sys.exit(str(error))
