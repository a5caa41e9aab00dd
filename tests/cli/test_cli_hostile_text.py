"""Text from others on a terminal (F82): whichever way it is shown, it neither steers the terminal nor is markup."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable

import pytest
from rich.text import Text

from evolink_async.cli.view import Screen, link

EVIL = "a\x1b]0;title\x07b\x1b]8;;https://evil.example\x1b\\c\x1b[2Jd\x9b31me\x07f\rg\x08h\x1bPq\x1b\\i\u202ej[red]k[link=x]l[/]"
SEEN = "abcdefghijkl"
# What rich itself makes of styles, links and line ends; anything else is somebody else's.
_RICH = re.compile(r"\x1b\[[0-9;]*m|\x1b\]8;[^;\x1b]*;([^\x1b]*)\x1b\\")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


WAYS: dict[str, Callable[[Screen, Terminal], None]] = {
    "a sentence": lambda screen, out: screen.say("it says: ", EVIL),
    "a complaint": lambda screen, out: screen.complain(EVIL),
    "a line to be copied": lambda screen, out: screen.verbatim(EVIL),
    "a link": lambda screen, out: screen.row(link(f"https://a.example/{EVIL}")),
    "a sentence with a link": lambda screen, out: screen.say(Text("see "), link(EVIL)),
    "a log line": lambda screen, out: (
        screen.log.handle(
            logging.makeLogRecord({"name": "evolink_async", "msg": "%s", "args": (EVIL,), "levelno": logging.WARNING})
        )
        and None
    ),
    "a line of data": lambda screen, out: screen.standard().line(EVIL),
    "JSON": lambda screen, out: screen.standard().json({"prompt": EVIL}),
}


@pytest.mark.parametrize("both", [True, False], ids=["one terminal", "standard output alone"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_it_steers_the_terminal(way: str, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out if both or way not in ("a line of data", "JSON") else io.StringIO())
    WAYS[way](Screen(), out)
    links: list[str] = []
    shown = _RICH.sub(lambda found: links.append(found[1] or "") or "", out.getvalue())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown), ascii(shown)
    assert not any("evil.example" in target and target.startswith("https://evil") for target in links)
    if way == "JSON":
        assert json.loads(shown) == {"prompt": EVIL}
    else:
        letters = re.sub(r"\[red\]|\[link=x\]|\[/\]| ", "", shown.strip())
        assert letters.endswith(SEEN), ascii(shown)
        assert "[red]" in shown
        assert "[link=x]" in shown
