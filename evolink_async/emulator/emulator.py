"""The face of the emulator: its options, its clock, and the ways to run it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .app import App
from .faults import Fault
from .limits import HINT_STYLES
from .models import MICRO
from .service import Service

if TYPE_CHECKING:
    from .server import LoopbackServer

API_KEY = "sk-evo-emulator"
_PLENTY = 1_000_000  # credits


@dataclass(frozen=True, slots=True)
class Server:
    """A running emulator: where it is, the key it knows, and the emulator itself."""

    base_url: str
    api_key: str
    emulator: Emulator


class Emulator:
    """A local EvoLink with one account.

    Tasks take as long as the real ones, divided by ``speed``. What is told on the wire is real seconds: with
    ``speed=50`` a video that takes EvoLink 165 s has ``estimated_time`` 3 and is there after about that. Result links
    live 24 hours divided by ``speed``. The same ``seed`` gives the same durations, failures and pictures to the same
    requests.

    - ``rate``, ``burst``: submissions per real second and at once (default: ``max(1, rate)``); ``concurrency``: most
      unfinished tasks. Beyond them: 429, with the hint in the style ``retry_after``: a Retry-After header in
      ``"seconds"`` or as a ``"date"``, a retry-after-ms header (``"ms"``), in the ``"body"``, or None.
    - ``credits``: balance at the start (None: a million). A submission that doesn't fit: 402.
    - ``failure_share``: the share of tasks, 0 to 1, that end as failed. They cost nothing.
    - ``idempotency=False``: the Idempotency-Key header is ignored, every POST is a new paid task.
    - ``batch=False``, ``listing=False``: no POST /v1/tasks/batch, no GET /v1/tasks (404).
    - ``faults``: what goes wrong on purpose, see :class:`Fault`.
    - ``clock``: a function giving seconds, by default unix time that never goes back; a test under virtual time passes
      its loop's. ``api_key``: the one key it knows.
    """

    def __init__(
        self,
        *,
        speed: float = 1,
        seed: int = 0,
        rate: float | None = None,
        burst: float | None = None,
        concurrency: int | None = None,
        retry_after: Literal["seconds", "date", "ms", "body"] | None = "seconds",
        credits: float | None = None,
        failure_share: float = 0,
        idempotency: bool = True,
        batch: bool = True,
        listing: bool = True,
        faults: Iterable[Fault | Mapping[str, Any]] = (),
        clock: Callable[[], float] | None = None,
        api_key: str = API_KEY,
    ) -> None:
        _require(speed > 0, "speed", "above 0", speed)
        _require(rate is None or rate > 0, "rate", "above 0, or None", rate)
        _require(burst is None or burst >= 1, "burst", "1 or more, or None", burst)
        _require(concurrency is None or concurrency >= 1, "concurrency", "1 or more, or None", concurrency)
        _require(retry_after in HINT_STYLES, "retry_after", f"one of {HINT_STYLES}", retry_after)
        _require(credits is None or credits >= 0, "credits", "0 or more, or None", credits)
        _require(0 <= failure_share <= 1, "failure_share", "between 0 and 1", failure_share)
        self.api_key = api_key
        service = Service(
            speed=speed,
            seed=seed,
            rate=rate,
            burst=burst,
            concurrency=concurrency,
            credits=round((_PLENTY if credits is None else credits) * MICRO),
            failure_share=failure_share,
            idempotency=idempotency,
        )
        self._app = App(
            service,
            clock=clock or wall_clock(),
            api_key=self.api_key,
            retry_after=retry_after,
            batch=batch,
            listing=listing,
            faults=[fault if isinstance(fault, Fault) else Fault.from_dict(fault) for fault in faults],
            seed=seed,
        )

    @property
    def app(self) -> App:
        """The ASGI application, for ``httpx.ASGITransport`` and the like."""
        return self._app

    def book(self) -> dict[str, Any]:
        """The ground truth: every accepted submission, every charge. As ``GET /_emulator/book``."""
        return self._app.book()

    def set_faults(self, faults: Iterable[Fault | Mapping[str, Any]]) -> None:
        """Replace the faults in force."""
        self._app.set_faults(fault if isinstance(fault, Fault) else Fault.from_dict(fault) for fault in faults)

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> AbstractAsyncContextManager[Server]:
        """``async with emulator.serve() as server``: a real TCP port in this event loop; 0 takes a free one."""
        return self._serve(host, port)

    @asynccontextmanager
    async def _serve(self, host: str, port: int) -> AsyncIterator[Server]:
        loopback, base_url = self._loopback(host, port)
        await loopback.open()
        try:
            yield Server(base_url, self.api_key, self)
        finally:
            await loopback.close()

    def run(
        self, host: str = "127.0.0.1", port: int = 8085, *, on_start: Callable[[Server], None] | None = None
    ) -> None:
        """Serve until SIGINT or SIGTERM, then return. Prints nothing; ``on_start`` is called once it listens."""
        asyncio.run(self._serve_until_signal(host, port, on_start))

    async def _serve_until_signal(self, host: str, port: int, on_start: Callable[[Server], None] | None) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with self._serve(host, port) as server:
            signals = (signal.SIGINT, signal.SIGTERM)
            # signal.signal, not the loop's own: that doesn't exist everywhere.
            before = [signal.signal(name, lambda *_: loop.call_soon_threadsafe(stop.set)) for name in signals]
            try:
                if on_start is not None:
                    on_start(server)
                await stop.wait()
            finally:
                for name, handler in zip(signals, before, strict=True):
                    signal.signal(name, handler)

    def _loopback(self, host: str, port: int) -> tuple[LoopbackServer, str]:
        try:
            from . import server
        except ImportError as exc:
            raise ImportError("the emulator's server needs uvicorn: pip install 'evolink_async[emulator]'") from exc
        listener = server.listen(host, port)
        return server.LoopbackServer(self._app, listener), server.url_of(listener)


def wall_clock() -> Callable[[], float]:
    """Unix time that never goes back, whatever is done to the machine's clock."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


def _require(condition: bool, name: str, wanted: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
