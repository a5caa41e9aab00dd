"""The emulator's own controls, below ``/_emulator/``: the truth, the clock, the account, faults, recordings.

They ask for no key: the emulator is a tool on a loopback port.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .answers import Json, Refusal, credits_body, invalid
from .http import Answer, Request, json_answer
from .models import MICRO
from .page import CONTENT_SECURITY_POLICY, render_page
from .world import InterventionRefused, World, fields_of

PREFIX = "/_emulator/"
PAGE = "/"


class Control:
    """What can be asked of the emulator and done to it from outside the API."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._table = self._table_of(world)

    def owns(self, path: str) -> bool:
        """Whether a request to this path is for the controls or their page."""
        return path.startswith(PREFIX) or path in (PAGE, PREFIX.removesuffix("/"))

    def handle(self, request: Request) -> Answer:
        """Answer a request to the controls or to a page."""
        if request.path == PAGE:
            return self._show(request)
        name = request.path.removeprefix(PREFIX)
        calls = self._calls(name)
        call = calls.get(request.method)
        if call is None:
            return self._refuse(self._nothing_at(request, calls), list(calls))
        try:
            return call(request)
        except InterventionRefused as exc:
            return self._refuse(exc.refusal)
        except ValueError as exc:
            return self._refuse(invalid(str(exc)))

    def _calls(self, name: str) -> Mapping[str, Callable[[Request], Answer]]:
        if name.startswith("tasks/"):
            return {"POST": lambda request: self._end(name.removeprefix("tasks/"), request)}
        return self._table.get(name, {})

    def _table_of(self, world: World) -> Mapping[str, Mapping[str, Callable[[Request], Answer]]]:
        return {
            "health": {"GET": lambda _: json_answer(200, {"status": "ok"})},
            "book": {"GET": lambda _: json_answer(200, world.book())},
            "faults": {"GET": lambda _: json_answer(200, self._faults()), "POST": self._replace_faults},
            "clock": {"GET": lambda _: json_answer(200, self.clock()), "POST": self._set_clock},
            "account": {"GET": lambda _: json_answer(200, self.account()), "POST": self._set_account},
            "reset": {"POST": self._reset},
            "recording": {
                "GET": self._recording,
                "POST": lambda _: self._record(True),
                "PUT": self._replay,
                "DELETE": lambda _: self._record(False),
            },
        }

    def _nothing_at(self, request: Request, calls: Mapping[str, Any]) -> Refusal:
        if calls:
            return Refusal(405, "method_not_allowed", f"{request.path} answers {', '.join(calls)} only.")
        controls = ", ".join(sorted([*self._table, "tasks/{id}"]))
        return Refusal(404, "not_found", f"There is nothing at {request.path}. Below {PREFIX} there are {controls}.")

    def _refuse(self, refusal: Refusal, allowed: list[str] | None = None) -> Answer:
        headers = [("allow", ", ".join(allowed))] if allowed and refusal.status == 405 else []
        return self._world.api.refused(refusal, headers)

    def _show(self, request: Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return self._refuse(Refusal(405, "method_not_allowed", "This is a page."), ["GET", "HEAD"])
        page = render_page(self._world, request.links_at)
        return Answer(200, page.encode("utf-8", "replace"), "text/html; charset=utf-8", _PAGE_HEADERS)

    # --- what is true ---------------------------------------------------------------------------------------------

    def clock(self) -> Json:
        """The time in seconds, whether it stands still, and how much faster than EvoLink the tasks go."""
        world = self._world
        return {"now": world.clock(), "standing": world.clock.standing, "speed": world.options.speed}

    def account(self) -> Json:
        """The balance, the state of the key, and the limits."""
        world = self._world
        world.service.settle(world.clock())
        figures = world.service.account
        body = credits_body(figures.remaining, figures.spent)["data"]["user"]
        return {
            "remaining": body["remaining_credits"],
            "spent": body["used_credits"],
            "reserved": figures.reserved / MICRO,
            "key": world.api.key_state,
            **world.service.limits(),
        }

    def _faults(self) -> Json:
        return {"faults": self._world.plan.as_json()}

    # --- the calls ------------------------------------------------------------------------------------------------

    def _replace_faults(self, request: Request) -> Answer:
        self._world.intervene("faults", _json(request))
        return json_answer(200, self._faults())

    def _set_clock(self, request: Request) -> Answer:
        self._world.intervene("clock", _json(request))
        return json_answer(200, self.clock())

    def _set_account(self, request: Request) -> Answer:
        self._world.intervene("account", _json(request))
        return json_answer(200, self.account())

    def _end(self, task_id: str, request: Request) -> Answer:
        fields = fields_of(_json(request), ("status", "code"))
        self._world.intervene("end", {**fields, "id": task_id})
        world = self._world
        task = world.service.task(task_id)
        assert task is not None
        return json_answer(200, world.service.tell(task, world.clock(), request.links_at))

    def _reset(self, request: Request) -> Answer:
        fields = fields_of(_json(request) if request.body else {}, ("seed",))
        seed = fields.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise ValueError(f"seed must be a whole number, not {seed!r}")
        self._world.reset(seed)
        return json_answer(200, {"seed": self._world.options.seed})

    def _record(self, on: bool) -> Answer:
        self._world.record(on)
        return json_answer(200, {"recording": on})

    def _recording(self, _: Request) -> Answer:
        recording = self._world.recording
        if recording is None:
            return self._refuse(Refusal(404, "not_recording", "Nothing is recorded: POST here to begin."))
        return Answer(200, recording.text().encode(), "application/jsonl")

    def _replay(self, request: Request) -> Answer:
        return json_answer(200, self._world.replay(request.body))


_PAGE_HEADERS = (("cache-control", "no-store"), ("content-security-policy", CONTENT_SECURITY_POLICY))


def _json(request: Request) -> Any:
    value = request.json()
    if isinstance(value, Refusal):
        raise ValueError(value.message)
    return value
