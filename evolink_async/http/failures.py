"""Failures of the network: httpcore's exceptions and the system's become httpx's."""

from __future__ import annotations

import httpcore
import httpx

_TRANSLATIONS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    # The most specific first: the first match wins.
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ReadTimeout, httpx.ReadTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.TimeoutException, httpx.TimeoutException),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.ReadError, httpx.ReadError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.NetworkError, httpx.NetworkError),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
    (httpcore.ProtocolError, httpx.ProtocolError),
    (httpcore.ProxyError, httpx.ProxyError),
    (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol),
    # Raised before anything is written, if a connection is asked for two things at once.
    (httpcore.ConnectionNotAvailable, httpx.ConnectError),
)


def translate_exception(exc: BaseException) -> httpx.TransportError | None:
    """The httpx exception that stands for one of httpcore's; None for anything else.

    It carries its `__cause__`, except where the original's text may show a header, and so the API key.
    """
    target = next((target for source, target in _TRANSLATIONS if isinstance(exc, source)), None)
    if target is None:
        return None
    if isinstance(exc, httpcore.LocalProtocolError):
        translated = target("the request isn't valid HTTP/1.1 (details withheld: they may show a header)")
        translated.__suppress_context__ = True
    else:
        translated = target(describe(exc))
        translated.__cause__ = exc
    return translated


def raise_translated(exc: BaseException) -> None:
    """Raise what stands for `exc`, if anything does; the caller re-raises the original otherwise."""
    translated = translate_exception(exc)
    if translated is not None:
        raise translated


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
