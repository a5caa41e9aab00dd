"""A user's program: many requests through a pool with a ledger, a line on stdout for every outcome.

python kill_job.py LEDGER LOG OPTIONS

OPTIONS is JSON: requests, hold, rate (a second, None: learned), cap (credits), lost_after, room_after (seconds),
impatient (a ledger whose server is lost is not waited for).
KILL_AT and FULL_AT in the environment: see `kill_points`. Prints "entered", "outcome {...}" for each, "reason ..." if
the pool ended early, "end" with the census; or "refused ..." if it could not be entered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from decimal import Decimal
from typing import Any

from kill_points import Points

from evolink_async import AsyncEvoLink, EvoLinkError, ImageRequest, LedgerError, Outcome, RateLimit
from evolink_async.ledger import database
from evolink_async.polling import watcher

MODEL, PRICE = "gpt-4o-image", Decimal("2.5")


def say(word: str, value: Any = "") -> None:
    print(word, json.dumps(value) if value != "" else "", flush=True)


def told(outcome: Outcome) -> dict[str, Any]:
    """What a user keeps of an outcome."""
    return {
        "key": outcome.identity,
        "status": str(outcome.status),
        "task": None if outcome.task is None else outcome.task.id,
        "urls": list(outcome.urls),
        "credits": None if outcome.credits is None else str(outcome.credits),
        "from_ledger": outcome.from_ledger,
        "error": None if outcome.error is None else type(outcome.error).__name__,
    }


async def main(ledger: str, log: str, options: dict[str, Any]) -> int:
    points = Points(log, ledger, os.environ.get("KILL_AT"), os.environ.get("FULL_AT"), options.get("room_after"))
    points.install()
    watcher._LOST_AFTER = options.get("lost_after", watcher._LOST_AFTER)
    if options.get("impatient"):
        database.PAUSES_WHEN_LOST = ()
    rate, cap = options.get("rate"), options.get("cap")
    requests = (
        ImageRequest(model=MODEL, prompt=f"r{number}", key=f"r{number}") for number in range(options["requests"])
    )
    async with AsyncEvoLink(
        on_lost_response="hold" if options.get("hold") else "replay",
        rate_limit=None if rate is None else RateLimit(1, 1 / rate),
    ) as client:
        pool = client.pool(requests, ledger=ledger, prices={MODEL: PRICE}, max_credits=cap)
        try:
            async with pool:
                say("entered")
                async for outcome in pool:
                    say("outcome", told(outcome))
                    points.reached("outcome handed over")
        except EvoLinkError as error:
            if pool.reason is None and isinstance(error, LedgerError):
                say("refused", str(error))
                return 3
            say("reason", [type(error).__name__, str(error)])
        census = pool.census
        say("end", None if census is None else [census.known, census.new, census.changed, census.gone])
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(levelname)s %(message)s")
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
