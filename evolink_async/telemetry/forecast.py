"""What a job will have cost in the end, judged by what is known of it so far. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from evolink_async.pool.outcome import ModelStats, PoolStats
from evolink_async.pool.pricing import checked_price

__all__ = ["Forecast", "forecast"]

FEWEST = 5  # outcomes of which the price is known
_WIDTH = 2.0  # standard deviations to either side: 19 of 20
_CENT = Decimal("0.01")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a job will have cost when it is done, and when that is.

    credits: the likely sum, what earlier runs of the job have spent included; low, high: between these it lies 19 times
    out of 20, if what comes is like what came. None: nobody can know yet. seconds: until all is done, or None.
    """

    credits: Decimal | None = None
    low: Decimal | None = None
    high: Decimal | None = None
    seconds: float | None = None


def forecast(
    stats: PoolStats, *, requests: Mapping[str, int] | None = None, prices: Mapping[str, Decimal | float] | None = None
) -> Forecast:
    """What the job will cost and how long it goes on, from `pool.stats` or what `on_progress` is given.

    Failed and rejected requests cost nothing and lower what is expected of the others; retries raise it.
    requests: how many there are of each model in the whole job, `Counter(request.model for request in requests)`;
        without it what is to come is taken to be mixed as what came, and nothing is told while `stats.total` is None.
    prices: credits by model, for models of which fewer than five outcomes are known: nothing to all of it may be spent.

    Nothing but None is told of a job with something to come whose price is not known. Raises `ConfigurationError` for a
    price that is none.
    """
    done = sum((model.credits for model in stats.models.values()), Decimal(0))
    if requests is None and stats.total is None:
        return Forecast(seconds=stats.eta)
    least = likely = variance = 0.0
    for model, rest, seen in _to_come(stats, requests):
        if rest <= 0:
            continue
        if seen.priced >= FEWEST:
            expected = rest * float(seen.credits) / seen.priced
            likely, least = likely + expected, least + expected
            # How much each differs from the mean, and how well the mean is known.
            variance += seen.deviation**2 * rest * (1 + rest / seen.priced)
        elif prices is not None and model is not None and model in prices:
            likely += rest * float(checked_price(prices[model], f"prices[{model!r}]"))
        else:
            return Forecast(seconds=stats.eta)
    spread = _WIDTH * math.sqrt(variance)
    return Forecast(
        credits=done + _rounded(likely),
        low=done + _rounded(max(0.0, least - spread)),
        high=done + _rounded(likely + spread),
        seconds=stats.eta,
    )


def _to_come(stats: PoolStats, requests: Mapping[str, int] | None) -> list[tuple[str | None, int, ModelStats]]:
    """How many are to come, and what is known of their like."""
    if requests is not None:
        nothing = ModelStats()
        known = {model: stats.models.get(model, nothing) for model in requests}
        return [(model, count - known[model].requests, known[model]) for model, count in requests.items()]
    models = list(stats.models)
    only = models[0] if len(models) == 1 else None
    return [(only, (stats.total or 0) - stats.finished, _together(stats.models))]


def _together(models: Mapping[str, ModelStats]) -> ModelStats:
    """All models as one."""
    priced = sum(model.priced for model in models.values())
    credits = sum((model.credits for model in models.values()), Decimal(0))
    mean = float(credits) / priced if priced else 0.0
    squares = sum(
        model.priced * (model.deviation**2 + (float(model.credits) / model.priced) ** 2)
        for model in models.values()
        if model.priced
    )
    variance = max(0.0, squares / priced - mean * mean) if priced else 0.0
    return ModelStats(priced=priced, credits=credits, deviation=math.sqrt(variance))


def _rounded(credits: float) -> Decimal:
    return Decimal(repr(credits)).quantize(_CENT)
