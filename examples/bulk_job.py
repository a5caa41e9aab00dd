"""A bulk job: one prompt a line, each result as it completes, a summary at the end.

    EVOLINK_API_KEY=... python examples/bulk_job.py prompts.txt > results.tsv

Its ledger lies beside the prompts, as prompts.db: whatever happens to the program, run it again and it goes on. Lines
may be inserted, moved and changed meanwhile: only what is new is paid for.
Saving the files is left to you: links die in 24 hours, and `save_to="out/"` of the pool keeps them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

from evolink_async import AsyncEvoLink, EvoLinkError, ImageRequest


def requests(prompts: Path) -> Iterator[ImageRequest]:
    """One request a line; the file is read as the pool has room, so it may be of any length.

    It has no `key`: the ledger knows it by its content. A line number would be a bad key, it changes with the file.
    """
    with prompts.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield ImageRequest(model="gpt-4o-image", prompt=line.strip(), metadata={"line": number})


async def main(prompts: Path) -> int:
    """Run the job; the exit code tells whether everything completed."""
    async with AsyncEvoLink(rate_limit="10/s") as client:
        pool = client.pool(requests(prompts), ledger=prompts.with_suffix(".db"), max_outstanding=500)
        ended_early = False
        try:
            async with pool:
                async for outcome in pool:
                    line = outcome.request and outcome.request.metadata["line"]
                    if outcome.ok:
                        print(line, outcome.unwrap().id, *outcome.urls, sep="\t", flush=True)
                    else:
                        print(f"line {line}:", outcome.status, outcome.error, file=sys.stderr)
        except (EvoLinkError, OSError, UnicodeError) as reason:  # no credits, a wrong key, a file that is no text, ...
            ended_early = True
            print(f"ended early: {reason}", file=sys.stderr)
        finally:
            for outcome in pool.leftovers:  # after Ctrl-C: sent and paid for, not handed over
                print(outcome.identity, outcome.status, outcome.task and outcome.task.id, file=sys.stderr)
    stats = pool.stats
    print(f"{stats.completed} of {stats.finished} completed, {stats.credits_spent} credits", file=sys.stderr)
    return 0 if stats.completed == stats.finished and not ended_early else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if not Path(sys.argv[1]).is_file():
        sys.exit(f"{sys.argv[1]} is no file\n\n{__doc__}")
    try:
        sys.exit(asyncio.run(main(Path(sys.argv[1]))))
    except EvoLinkError as error:  # before the pool has begun: no key
        sys.exit(str(error))
