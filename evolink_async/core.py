"""`ClientCore`: what a client's namespaces and pools share. `AsyncEvoLink` is the face of one."""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from evolink_async.checks import checked_seconds
from evolink_async.errors import ClosedError, ConfigurationError, InvalidRequestError
from evolink_async.http.observer import Observation
from evolink_async.requests import GenerationRequest
from evolink_async.session import CLOSED, Memory, Options, Session

if TYPE_CHECKING:
    from evolink_async.catalog import Finding

logger = logging.getLogger("evolink_async")

_MOST_WARNINGS = 1000  # that are remembered, so as not to be repeated


class ClientCore:
    """The options of a client, what it has learned, and its session in the running loop. See `AsyncEvoLink`.

    session: None while nothing was asked of the service.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.memory = Memory()
        self.observation = Observation()
        self.session: Session | None = None
        self.closed = False
        self._warned: set[str] = set()

    # Life

    def open(self) -> Session:
        """The session of the running loop. Raises `ClosedError`, and `ConfigurationError` where it lives elsewhere."""
        if self.closed:
            raise ClosedError(CLOSED)
        session = self.session
        if session is not None:
            # A closed loop is replaced, but not in a forked child, which shares its sockets with the parent.
            if not session.loop.is_closed() or session.pid != os.getpid():
                _refuse_elsewhere(session)
                return session
            session.abandon()
        self.session = session = Session(self.options, self.memory, self.observation)
        return session

    async def aclose(self) -> None:
        """End the session; repeatable."""
        if self.closed:
            return
        session = self.session
        if session is not None and not session.loop.is_closed():
            _refuse_elsewhere(session)
        self.closed = True
        self.session = None
        if session is None:
            return
        if session.loop.is_closed():
            session.abandon()
        else:
            await session.aclose()

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        session = getattr(self, "session", None)
        if session is not None and session.pid == os.getpid():
            warn(f"unclosed {self!r}: use 'async with' or aclose()", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "idle" if self.session is None else "open"
        return f"<AsyncEvoLink {self.options.base_url} {state}>"

    # Calls

    async def read(self, method: str, path: str, timeout: float | None) -> Any:
        """The JSON of a call that costs nothing, tried again for `timeout` seconds."""
        seconds = checked_seconds(timeout, "timeout")
        session = self.open()
        return await session.until_closed(session.reader.json(method, path, timeout=seconds))

    @property
    def calls_private_hosts(self) -> bool:
        """Whether callback URLs may lead to private hosts, as far as this side minds.

        A service on a loopback host, which is the only one that plain http is allowed for, may call back to one.
        """
        return self.options.allow_private_hosts or self.options.base_url.startswith("http:")

    def check(self, request: GenerationRequest) -> None:
        """Raise `InvalidRequestError` for what the catalogue knows to be wrong, as far as `validate` asks for it."""
        if not isinstance(request, GenerationRequest):
            raise InvalidRequestError(
                f"a request must be an ImageRequest, VideoRequest or AudioRequest, got {type(request).__name__}; "
                "make one out of a dict with GenerationRequest.from_dict"
            )
        mode = self.options.validate
        if mode is False:
            return
        check, lenient = _catalogue_check(), self.calls_private_hosts
        findings = check(request.kind, request.model, request.params(), allow_private_hosts=lenient)
        if not findings:
            return
        errors = [finding for finding in findings if finding.severity == "error" and mode is True]
        for finding in findings:
            if finding not in errors:
                self._warn_once(str(finding))
        if errors:
            raise InvalidRequestError("; ".join(str(finding) for finding in errors), param=errors[0].param)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            if len(self._warned) < _MOST_WARNINGS:
                self._warned.add(text)
            logger.warning("%s", text, extra={"event": "request_doubtful"})


def _refuse_elsewhere(session: Session) -> None:
    """Raise unless this is the process and the loop that the session lives in."""
    if session.pid != os.getpid():
        raise ConfigurationError("this client was used before a fork; make a new one in each process")
    if session.loop is not asyncio.get_running_loop():
        raise ConfigurationError(
            "this client lives in another event loop that isn't closed; make one client for each loop or thread"
        )


@cache
def _catalogue_check() -> Callable[..., list[Finding]]:
    from evolink_async.catalog import check  # reads the catalogue, which not every program needs

    return check
