"""For tests of programs that use EvoLink: an emulator in the background, and what a network can do to them.

The pytest plugin is `plugin`, see docs/testing.md. pytest imports this file in every run of everybody, so names are
loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evolink_async.testing.background import BackgroundEmulator
    from evolink_async.testing.proxy import FaultProxy, ProxyStats
    from evolink_async.testing.toxics import (
        Bandwidth,
        HalfClose,
        Latency,
        LimitData,
        ResetPeer,
        Slicer,
        SlowClose,
        Timeout,
        Toxic,
    )

__all__ = [
    "BackgroundEmulator",
    "Bandwidth",
    "FaultProxy",
    "HalfClose",
    "Latency",
    "LimitData",
    "ProxyStats",
    "ResetPeer",
    "Slicer",
    "SlowClose",
    "Timeout",
    "Toxic",
]

_ROOMS = {
    "background": ("BackgroundEmulator",),
    "proxy": ("FaultProxy", "ProxyStats"),
    "toxics": (
        "Bandwidth",
        "HalfClose",
        "Latency",
        "LimitData",
        "ResetPeer",
        "Slicer",
        "SlowClose",
        "Timeout",
        "Toxic",
    ),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
