"""Watching a program that generates: OpenTelemetry, cost forecasts, thresholds (docs/telemetry.md).

    from evolink_async.telemetry import Thresholds, forecast, instrument

Logging needs nothing from here. Only `instrument` needs the `telemetry` extra, and loads it when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolink_async.errors import ConfigurationError
from evolink_async.telemetry.forecast import Forecast, forecast
from evolink_async.telemetry.thresholds import Crossing, Thresholds

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from evolink_async.client import AsyncEvoLink

__all__ = ["Crossing", "Forecast", "Thresholds", "forecast", "instrument", "uninstrument"]


def instrument(
    client: AsyncEvoLink,
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    capture_prompts: bool = False,
) -> None:
    """Make OpenTelemetry spans and metrics of everything that a client does, single calls and pools alike.

    tracer_provider, meter_provider: by default the global ones. capture_prompts: put the first 1,000 characters of each
    prompt on its span, which may be personal data; it is off by default.
    Each task is one span from its submission to its end, below the span that is current where it is submitted, or
    where the block of its pool is entered. Names and attributes: docs/telemetry.md. What is under way already is not
    seen. Without a call of this function nothing of OpenTelemetry is loaded.

    Raises `ConfigurationError` without the `telemetry` extra, and for a client that is instrumented already. Since
    0.1.0.
    """
    if client._core.observation.observer is not None:
        raise ConfigurationError("this client is instrumented already: uninstrument(client) first")
    try:
        from evolink_async.telemetry.otel import Telemetry
    except ImportError as error:
        raise ConfigurationError('telemetry needs OpenTelemetry: pip install "evolink-async[telemetry]"') from error
    client._core.observation.observer = Telemetry(
        client._core.options.base_url, tracer_provider, meter_provider, capture_prompts=capture_prompts
    )


def uninstrument(client: AsyncEvoLink) -> None:
    """Stop what `instrument` began: spans of tasks that still run end now. Does nothing for a client without it."""
    observer, client._core.observation.observer = client._core.observation.observer, None
    if observer is not None:
        observer.close()
