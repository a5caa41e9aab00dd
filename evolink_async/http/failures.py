"""Failures on the way to a connection: the system's exceptions become httpx's."""

from __future__ import annotations

import httpx


def raise_connect_failure(exc: BaseException, timeout: float | None, place: str) -> None:
    """Raise what stands for a failure before the connection was ready; the caller re-raises anything else."""
    if isinstance(exc, TimeoutError):
        within = "" if timeout is None else f" within {timeout:g} s"
        raise httpx.ConnectTimeout(f"no connection to {place}{within}") from exc
    # OSError covers DNS, refusals, TLS (ssl.SSLError) and "too many open files"; UnicodeError is a host name
    # that DNS cannot spell.
    if isinstance(exc, OSError | UnicodeError):
        raise httpx.ConnectError(f"cannot connect to {place}: {describe(exc)}") from exc


def describe(exc: BaseException | None) -> str:
    """What an error says of itself; None is a connection that simply ended."""
    if exc is None:
        return "the connection was closed by the server"
    return str(exc) or type(exc).__name__
