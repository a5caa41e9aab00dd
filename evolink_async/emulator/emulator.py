"""The face of the emulator: its options, its clock, and the ways to run it."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from .app import App
from .behaviour import Behaviour, Dialect, read_choice
from .clock import Clock, wall_clock
from .faults import Fault, faults_of
from .limits import HINT_STYLES
from .world import Options, World

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
    - ``models``: how the tasks of a model go, see :class:`Behaviour`: by model id, by kind, or ``"*"`` for all.
    - ``dialect``: how the service speaks where its documents differ, see :class:`Dialect`.
    - ``private_callbacks=True``: a ``callback_url`` may be http and lead to this machine or its network, as tests need;
      otherwise it must be https and public, as documented, and the emulator then calls nobody.
    - ``standing=True``: the clock stands still until :meth:`advance`. ``clock``: a function giving seconds, by default
      unix time that never goes back; a test under virtual time passes its loop's.
    - ``record=True``: record from the start, see :meth:`recording`. ``api_key``: the one key it knows.

    Raises ValueError for an option that makes no sense.
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
        models: Mapping[str, Behaviour | Mapping[str, Any]] | None = None,
        dialect: Dialect | Mapping[str, Any] | None = None,
        private_callbacks: bool = False,
        standing: bool = False,
        record: bool = False,
        clock: Callable[[], float] | None = None,
        api_key: str = API_KEY,
    ) -> None:
        _require(_is_number(speed) and speed > 0, "speed", "a number above 0", speed)
        _require(_is_whole(seed), "seed", "a whole number", seed)
        _require(rate is None or (_is_number(rate) and rate > 0), "rate", "a number above 0, or None", rate)
        _require(burst is None or (_is_number(burst) and burst >= 1), "burst", "a number from 1, or None", burst)
        _require(
            concurrency is None or (_is_whole(concurrency) and concurrency >= 1),
            "concurrency",
            "a whole number from 1, or None",
            concurrency,
        )
        _require(retry_after in HINT_STYLES, "retry_after", f"one of {HINT_STYLES}", retry_after)
        _require(
            credits is None or (_is_number(credits) and credits >= 0), "credits", "a number from 0, or None", credits
        )
        _require(
            _is_number(failure_share) and 0 <= failure_share <= 1, "failure_share", "between 0 and 1", failure_share
        )
        switches = {"idempotency": idempotency, "batch": batch, "listing": listing, "standing": standing}
        switches |= {"private_callbacks": private_callbacks, "record": record}
        for name, value in switches.items():
            _require(isinstance(value, bool), name, "True or False", value)
        _require(isinstance(api_key, str) and api_key != "", "api_key", "a text", "something else")
        self.api_key = api_key
        options = Options(
            speed=speed,
            seed=seed,
            rate=rate,
            burst=burst,
            concurrency=concurrency,
            retry_after=retry_after,
            credits=_PLENTY if credits is None else credits,
            failure_share=failure_share,
            idempotency=idempotency,
            batch=batch,
            listing=listing,
            faults=faults_of(faults),
            models=_mapping(models),
            dialect=read_choice(Dialect, dialect or {}),
            private_callbacks=private_callbacks,
            record=record,
            api_key=api_key,
        )
        self._world = World(options, Clock(clock or wall_clock(), standing=standing))
        self._app = App(self._world)

    def __repr__(self) -> str:
        options = self._world.options
        return f"<Emulator speed={options.speed:g} seed={options.seed}>"

    @property
    def app(self) -> App:
        """The ASGI application, for ``httpx.ASGITransport`` and the like."""
        return self._app

    def book(self) -> dict[str, Any]:
        """The ground truth: every accepted submission, every charge. As ``GET /_emulator/book``."""
        return self._world.book()

    def set_faults(self, faults: Iterable[Fault | Mapping[str, Any]]) -> None:
        """Replace the faults in force; their counts start again. As ``POST /_emulator/faults``."""
        self._world.set_faults(faults_of(faults))

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once, on the clock of the wire. As ``POST /_emulator/clock``.

        With ``speed=1`` these are EvoLink's seconds: ``advance(24 * 3600)`` lets result links die.
        """
        self._world.intervene("clock", {"advance": seconds})

    def end(self, task_id: str, status: str = "completed", *, code: str | None = None) -> None:
        """Let a task end now: completed, failed (with ``code``) or cancelled. As ``POST /_emulator/tasks/{id}``.

        Raises ValueError for an unknown or finished task.
        """
        self._world.intervene("end", {"id": task_id, "status": status, "code": code})

    def set_account(self, **changes: Any) -> None:
        """Change the account: ``credits`` that are free, ``rate``, ``burst``, ``concurrency``, and ``key``, which is
        active, invalid, disabled or expired. As ``POST /_emulator/account``.
        """
        self._world.intervene("account", changes)

    def reset(self, seed: int | None = None) -> None:
        """Begin again as at first: no tasks, no files, the first balance, the first faults; the clock goes on.

        As ``POST /_emulator/reset``.
        """
        self._world.reset(seed)

    def recording(self) -> str:
        """What was recorded so far, as JSON lines, without the key. ValueError unless ``record`` is on."""
        if self._world.recording is None:
            raise ValueError("nothing is recorded: Emulator(record=True), or POST /_emulator/recording")
        return self._world.recording.text()

    def replay(self, recording: str) -> dict[str, Any]:
        """Begin again and carry out a recording at its own times: the book is then the recorded run's.

        Gives the number of ``lines`` and those whose answers are ``differing`` (with the same options: none).
        As ``PUT /_emulator/recording``. Raises ValueError for what is no recording.
        """
        return self._world.replay(recording)

    async def aclose(self) -> None:
        """End the callbacks that run in the background; needed only where :attr:`app` is used without :meth:`serve`."""
        await self._world.close()

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
            await self.aclose()

    def run(
        self, host: str = "127.0.0.1", port: int = 8085, *, on_start: Callable[[Server], None] | None = None
    ) -> None:
        """Serve until SIGINT or SIGTERM, then return. Prints nothing; ``on_start`` is called once it listens.

        Where the extra ``fast`` is installed it takes twice as many requests.
        """
        with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
            runner.run(self._serve_until_signal(host, port, on_start))

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


def _mapping(models: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if models is not None and not isinstance(models, Mapping):
        raise ValueError(f"models are a mapping from a model, a kind or '*', not {models!r}")
    return models or {}


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, name: str, wanted: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
