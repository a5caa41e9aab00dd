"""What a request will cost, as far as somebody has told: by the caller's prices, else by its price class. Pure."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from evolink_async.catalog import get_model
from evolink_async.errors import ConfigurationError, InvalidRequestError
from evolink_async.requests import GenerationRequest

Price = Decimal | float | int
Prices = Mapping[str, Price] | Callable[[GenerationRequest], Price | None]

# Parameters that no price is known to depend on (our guess: no document says so).
_FREE = frozenset(
    {"seed", "callback_url", "style", "title", "negative_prompt", "negative_tags", "voice", "preferred_name"}
    | {"persona_id", "source_task_id", "base_video_task_id"}
)
_TEXTS = frozenset({"prompt", "preview_text", "voice_prompt", "text", "lyrics", "input"})
_LONGEST_WORD = 40  # a longer text is no choice out of a list
_LONGEST_CLASS = 200
_as_json = json.JSONEncoder(default=str).encode  # `json.dumps` makes one for each value


def price_class(request: GenerationRequest) -> str:
    """A name that is the same for requests that should cost the same: the model and all that may bear on the price.

    Numbers, switches and short words count as they are; of links, how many there are; texts only where the model may
    be billed by their length, in steps of two. Two names for one price cost an attempt; one name for two prices means
    that less or more is reserved than will be charged.
    """
    model = get_model(request.model)
    by_length = model is None or model.billing_rule not in ("per_call", "per_second")
    try:
        relevant = _relevant("", request.params(), by_length)
    except (ValueError, RecursionError):
        relevant = " ".join(sorted(request.params()))  # a number of 5,000 digits, or what will be rejected
    named = f"{request.model} {relevant or ''}"
    if len(named) <= _LONGEST_CLASS:
        return named
    return f"{request.model[:100]} {hashlib.sha256(named.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def _relevant(name: str, value: Any, by_length: bool) -> str | None:
    if name in _FREE:
        return None
    if isinstance(value, str):
        if value.startswith(("http:", "https:", "data:")):
            return "1"
        if name in _TEXTS or len(value) > _LONGEST_WORD:
            return f"{1 << len(value).bit_length()} characters" if by_length else None
    elif isinstance(value, (list, tuple)):
        return str(len(value))
    elif isinstance(value, (dict, Mapping)):
        parts = ((inner, _relevant(str(inner), part, by_length)) for inner, part in value.items())
        return " ".join(sorted(f"{inner}={part}" for inner, part in parts if part is not None))
    elif isinstance(value, (bytes, os.PathLike)):
        return "1"
    return _as_json(value)


def checked_prices(prices: Prices | None) -> Callable[[GenerationRequest], Decimal | None]:
    """The price of a request that the caller knows, in credits. Raises `ConfigurationError` for what is no price.

    What it gives raises `InvalidRequestError` for a request for which the caller's function fails.
    """
    if prices is None:
        return lambda request: None
    if isinstance(prices, Mapping):
        for model in prices:
            if not isinstance(model, str) or not model:
                raise ConfigurationError(f"prices must map the names of models to credits, got the name {model!r}")
        by_model = {model: checked_price(price, f"prices[{model!r}]") for model, price in prices.items()}
        return lambda request: by_model.get(request.model)
    if not callable(prices):
        raise ConfigurationError(
            f"prices must map models to credits, or be a function of a request, got {type(prices).__name__}"
        )

    def told(request: GenerationRequest) -> Decimal | None:
        try:
            price = prices(request)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a cancellation too: nothing is awaited, so it comes from the function itself
            raise InvalidRequestError(f"prices(request) raised {type(error).__name__}: {error}") from error
        try:
            return None if price is None else checked_price(price, "what prices(request) gave")
        except ConfigurationError as error:
            raise InvalidRequestError(error.message) from None

    return told


def checked_credits(value: object, name: str) -> Decimal | None:
    """An amount of credits, or None. Raises `ConfigurationError`."""
    return None if value is None else checked_price(value, name)


def checked_price(value: object, name: str) -> Decimal:
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        try:
            price = Decimal(str(value))
        except InvalidOperation:
            price = Decimal("NaN")
        if price.is_finite() and price >= 0:
            return price
    raise ConfigurationError(f"{name} must be a number of credits, 0 or more, got {value!r}")
