"""What a look costs, from how many looks there may be. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from evolink_async.polling.schedule import SHORTEST


def price_for(urgencies: Sequence[float], outstanding: int, polls_per_second: float) -> float:
    """The price, in seconds of delay per look, at which so many outstanding tasks take so many looks per second.

    urgencies: `Expectation.urgency` of a random sample of them; a few hundred will do. 0.0: even free looks don't use
    up the budget. Raises `ValueError` for a budget that is not positive.
    """
    if not polls_per_second > 0:
        raise ValueError(f"polls_per_second must be positive, got {polls_per_second!r}")
    # A task takes urgency / sqrt(2 * price) looks per second, but never more than 1 / SHORTEST: find out how many of
    # the sample, the most urgent first, are at that bound.
    left = polls_per_second / max(outstanding, 1) * len(urgencies)
    ascending = sorted(urgencies)
    for urgency, sum_up_to in zip(reversed(ascending), reversed(list(itertools.accumulate(ascending))), strict=True):
        if left * urgency <= sum_up_to / SHORTEST:
            return (sum_up_to / left) ** 2 / 2
        left -= 1 / SHORTEST
    return 0.0
