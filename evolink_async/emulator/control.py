"""The emulator's own controls, below ``/_emulator/``: the truth, the clock, the account, faults, recordings.

They ask for no key: the emulator is a tool on a loopback port.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .answers import Json, Refusal, credits_body, invalid
from .api import KEY_STATES
from .faults import read_faults
from .http import Answer, Request, json_answer
from .models import MICRO
from .page import CONTENT_SECURITY_POLICY, render_page

if TYPE_CHECKING:
    from .app import App

PREFIX = "/_emulator/"
_LIMITS = ("rate", "burst", "concurrency")


class InterventionRefused(ValueError):
    """An intervention makes no sense; the refusal says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Control:
    """What can be asked of the emulator and done to it from outside the API."""

    pages = ("/",)

    def __init__(self, app: App) -> None:
        self._app = app

    def handle(self, request: Request) -> Answer:
        """Answer a request to the controls or to a page."""
        if request.path in self.pages:
            return self._show(request)
        name = request.path.removeprefix(PREFIX)
        calls = self._calls(name)
        call = calls.get(request.method)
        if call is None:
            return self._refuse(_nothing_at(request, calls), list(calls))
        try:
            return call(request)
        except InterventionRefused as exc:
            return self._refuse(exc.refusal)
        except ValueError as exc:
            return self._refuse(invalid(str(exc)))

    def _calls(self, name: str) -> Mapping[str, Callable[[Request], Answer]]:
        app = self._app
        if name.startswith("tasks/"):
            return {"POST": lambda request: self._end(name.removeprefix("tasks/"), request)}
        table: dict[str, dict[str, Callable[[Request], Answer]]] = {
            "health": {"GET": lambda _: json_answer(200, {"status": "ok"})},
            "book": {"GET": lambda _: json_answer(200, app.book())},
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
        return table.get(name, {})

    def _refuse(self, refusal: Refusal, allowed: list[str] | None = None) -> Answer:
        headers = [("allow", ", ".join(allowed))] if allowed and refusal.status == 405 else []
        return self._app.api.refused(refusal, headers)

    def _show(self, request: Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return self._refuse(Refusal(405, "method_not_allowed", "This is a page."), ["GET", "HEAD"])
        page = render_page(self._app, request.links_at)
        return Answer(200, page.encode("utf-8", "replace"), "text/html; charset=utf-8", _PAGE_HEADERS)

    # --- what is true ---------------------------------------------------------------------------------------------

    def clock(self) -> Json:
        """The time in seconds, whether it stands still, and how much faster than EvoLink the tasks go."""
        app = self._app
        return {"now": app.clock(), "standing": app.clock.standing, "speed": app.options.speed}

    def account(self) -> Json:
        """The balance, the state of the key, and the limits."""
        app = self._app
        app.service.settle(app.clock())
        figures = app.service.account
        body = credits_body(figures.remaining, figures.spent)["data"]["user"]
        return {
            "remaining": body["remaining_credits"],
            "spent": body["used_credits"],
            "reserved": figures.reserved / MICRO,
            "key": app.api.key_state,
            **app.service.limits(),
        }

    def _faults(self) -> Json:
        return {"faults": self._app.plan.as_json()}

    # --- interventions: each has a name, so that a recording can carry it out again ---------------------------------

    def intervene(self, name: str, value: Any) -> None:
        """Carry out an intervention and record it. ValueError says what is wrong with it."""
        self.repeat(name, value)
        app = self._app
        if app.recording is not None and name != "clock":  # recorded times hold what the clock was told
            app.recording.add_action(app.clock(), name, value)
        app.woken()

    def repeat(self, name: str, value: Any) -> None:
        """Carry out an intervention."""
        actions = {
            "faults": self._do_faults,
            "clock": self._do_clock,
            "account": self._do_account,
            "end": self._do_end,
            "callback": self._do_callback,
        }
        if name not in actions:
            raise ValueError(f"there is no intervention {name!r}")
        actions[name](value)

    def _do_faults(self, value: Any) -> None:
        self._app.set_faults(read_faults(json.dumps(value)))

    def _do_clock(self, value: Any) -> None:
        fields = _fields(value, ("advance", "standing"))
        clock = self._app.clock
        if "standing" in fields:
            if not isinstance(fields["standing"], bool):
                raise ValueError(f"standing must be true or false, not {fields['standing']!r}")
            (clock.stand if fields["standing"] else clock.run)()
        if "advance" in fields:
            clock.advance(_number(fields["advance"], "advance"))

    def _do_account(self, value: Any) -> None:
        fields = _fields(value, ("credits", "key", *_LIMITS))
        if fields.get("key", "active") not in KEY_STATES:
            raise ValueError(f"key must be one of {', '.join(KEY_STATES)}, not {fields['key']!r}")
        chosen = {name: fields[name] for name in _LIMITS if name in fields}
        limits = {**self._app.service.limits(), **chosen}
        for name, low in (("rate", 1e-9), ("burst", 1), ("concurrency", 1)):
            if limits[name] is not None and _number(limits[name], name) < low:
                raise ValueError(f"{name} must be {low:g} or more, or null, not {limits[name]!r}")
        self._app.api.key_state = fields.get("key", self._app.api.key_state)
        if "credits" in fields:
            self._app.service.account.set_remaining(round(_number(fields["credits"], "credits") * MICRO))
        if chosen:
            self._app.service.set_limits(limits["rate"], limits["burst"], limits["concurrency"])

    def _do_end(self, value: Any) -> None:
        fields = _fields(value, ("id", "status", "code"))
        status, code = fields.get("status", "completed"), fields.get("code")
        if code is not None and not isinstance(code, str):
            raise ValueError(f"code must be text, not {code!r}")
        ended = self._app.service.end(str(fields.get("id")), status, code, self._app.clock())
        if isinstance(ended, Refusal):
            raise InterventionRefused(ended)

    def _do_callback(self, value: Any) -> None:
        """What a recording says of an attempt to deliver a callback."""
        fields = _fields(value, ("id", "result"))
        self._app.service.callback_attempted(str(fields.get("id")), str(fields.get("result")), self._app.clock())

    # --- the calls ------------------------------------------------------------------------------------------------

    def _replace_faults(self, request: Request) -> Answer:
        self.intervene("faults", _json(request))
        return json_answer(200, self._faults())

    def _set_clock(self, request: Request) -> Answer:
        self.intervene("clock", _json(request))
        return json_answer(200, self.clock())

    def _set_account(self, request: Request) -> Answer:
        self.intervene("account", _json(request))
        return json_answer(200, self.account())

    def _end(self, task_id: str, request: Request) -> Answer:
        fields = _fields(_json(request), ("status", "code"))
        self.intervene("end", {**fields, "id": task_id})
        app = self._app
        task = app.service.task(task_id)
        assert task is not None
        return json_answer(200, app.service.tell(task, app.clock(), request.links_at))

    def _reset(self, request: Request) -> Answer:
        fields = _fields(_json(request) if request.body else {}, ("seed",))
        seed = fields.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise ValueError(f"seed must be a whole number, not {seed!r}")
        self._app.reset(seed)
        return json_answer(200, {"seed": self._app.options.seed})

    def _record(self, on: bool) -> Answer:
        self._app.record(on)
        return json_answer(200, {"recording": on})

    def _recording(self, _: Request) -> Answer:
        recording = self._app.recording
        if recording is None:
            return self._refuse(Refusal(404, "not_recording", "Nothing is recorded: POST here to begin."))
        return Answer(200, recording.text().encode(), "application/jsonl")

    def _replay(self, request: Request) -> Answer:
        return json_answer(200, self._app.replay(request.body))


_PAGE_HEADERS = (("cache-control", "no-store"), ("content-security-policy", CONTENT_SECURITY_POLICY))


def _nothing_at(request: Request, calls: Mapping[str, Any]) -> Refusal:
    if calls:
        return Refusal(405, "method_not_allowed", f"{request.path} answers {', '.join(calls)} only.")
    return Refusal(404, "not_found", f"There is nothing at {request.method} {request.path}.")


def _json(request: Request) -> Any:
    value = request.json()
    if isinstance(value, Refusal):
        raise ValueError(value.message)
    return value


def _fields(value: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"send a JSON object with {', '.join(known)}")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"there is no {unknown[0]!r} here, only {', '.join(known)}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:
        raise ValueError(f"{name} must be a number from 0, not {value!r}")
    return value
