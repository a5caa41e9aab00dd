"""What goes wrong on a connection, as values.

Names, attributes, defaults and units are those of toxiproxy (https://github.com/Shopify/toxiproxy), so that what is
known about the one holds for the other and its JSON can be read. ``half_close`` is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

Stream = Literal["upstream", "downstream"]

_COMMON = ("type", "name", "stream", "toxicity", "attributes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Toxic:
    """One thing that goes wrong; see the kinds below it. Give it to `FaultProxy.add`.

    - ``stream``: ``"upstream"``, what the client sends to the server, or ``"downstream"``, what the server answers.
    - ``toxicity``: the share of connections, 0 to 1, that it befalls.
    - ``name``: unique on its proxy; by default kind and stream, as ``latency_downstream``.

    An attribute that cannot be is a `ValueError`.
    """

    type: ClassVar[str]

    stream: Stream = "downstream"
    toxicity: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if self.stream not in get_args(Stream):
            raise ValueError(f"stream must be 'upstream' or 'downstream', not {self.stream!r}")
        if not _is_number(self.toxicity) or self.toxicity > 1:
            raise ValueError(f"toxicity must be between 0 and 1, not {self.toxicity!r}")
        if not isinstance(self.name, str):
            raise ValueError(f"name must be text, not {self.name!r}")
        if not self.name:
            object.__setattr__(self, "name", f"{self.type}_{self.stream}")
        for spec in _attributes(type(self)):
            value = getattr(self, spec.name)
            if not _is_number(value):
                raise ValueError(f"{self.type}: {spec.name} must be 0 or more, not {value!r}")
            if spec.type == "int" and value != int(value):
                raise ValueError(f"{self.type}: {spec.name} counts bytes, not {value!r}")

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Toxic:
        """Read toxiproxy's JSON: ``{"type": "latency", "stream": ..., "toxicity": ..., "attributes": {...}}``.

        Raises `ValueError` for what is no toxic.
        """
        _refuse_unknown(data, _COMMON, "a toxic")
        name = data.get("type")
        kind = _KINDS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ValueError(f"the type of a toxic is one of {', '.join(_KINDS)}, not {name!r}")
        attributes = data.get("attributes", {})
        if not isinstance(attributes, Mapping):
            raise ValueError(f"{kind.type}: attributes must be a mapping, not {attributes!r}")
        _refuse_unknown(attributes, [spec.name for spec in _attributes(kind)], kind.type)
        common = {name: data[name] for name in ("name", "stream", "toxicity") if name in data}
        try:
            return kind(**common, **attributes)
        except TypeError as exc:
            raise ValueError(f"{kind.type} lacks an attribute: {exc}") from exc

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, whole."""
        attributes = {spec.name: getattr(self, spec.name) for spec in _attributes(type(self))}
        common = {"type": self.type, "name": self.name, "stream": self.stream, "toxicity": self.toxicity}
        return {**common, "attributes": attributes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency(Toxic):
    """Everything arrives ``latency`` milliseconds later, give or take up to ``jitter`` milliseconds.

    Order is kept, and data that follows is not held up by data before it. Up to 1 MB is under way at a time.
    """

    type: ClassVar[str] = "latency"

    latency: float
    jitter: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth(Toxic):
    """At most ``rate`` KB/s (1000 bytes a second) get through on each connection."""

    type: ClassVar[str] = "bandwidth"

    rate: float

    def __post_init__(self) -> None:
        Toxic.__post_init__(self)
        if self.rate == 0:
            raise ValueError("bandwidth: rate must be above 0; timeout lets nothing through")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowClose(Toxic):
    """The end of the stream arrives ``delay`` milliseconds later; data doesn't."""

    type: ClassVar[str] = "slow_close"

    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout(Toxic):
    """Nothing gets through, and after ``timeout`` milliseconds the connection is closed; 0: never.

    The time runs from the beginning of the connection, or from when the toxic was added. What came is lost: when the
    toxic is removed, connections that lost something are closed.
    """

    type: ClassVar[str] = "timeout"

    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetPeer(Toxic):
    """``timeout`` milliseconds after something came on this stream, both ends get a TCP reset; it doesn't get through.

    Upstream the server never sees the request; downstream it has answered, and the client never sees the answer.
    A connection on which nothing comes is not reset.
    """

    type: ClassVar[str] = "reset_peer"

    timeout: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slicer(Toxic):
    """Data arrives in small pieces of ``average_size`` bytes, give or take up to ``size_variation`` bytes.

    ``delay``: *micro*seconds between pieces. Without one the receiver's machine may join them again.
    """

    type: ClassVar[str] = "slicer"

    average_size: int
    size_variation: int = 0
    delay: float = 0

    def __post_init__(self) -> None:
        Toxic.__post_init__(self)
        if self.size_variation >= self.average_size:
            raise ValueError(
                f"slicer: size_variation must be below average_size, which must be 1 or more, "
                f"not {self.size_variation!r} of {self.average_size!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitData(Toxic):
    """The connection is closed as soon as ``bytes`` bytes got through on this stream; with 0 as soon as something came.

    The receiver gets exactly those bytes and an orderly end.
    """

    type: ClassVar[str] = "limit_data"

    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfClose(Toxic):
    """This stream ends (TCP FIN) as soon as ``bytes`` bytes got through, with 0 at once; the other one stays open.

    What the sender still sends is lost. Not among toxiproxy's.
    """

    type: ClassVar[str] = "half_close"

    bytes: int = 0


_KINDS: dict[str, type[Toxic]] = {
    kind.type: kind for kind in (Latency, Bandwidth, SlowClose, Timeout, ResetPeer, Slicer, LimitData, HalfClose)
}


def _attributes(kind: type[Toxic]) -> list[dataclasses.Field[Any]]:
    """The fields that the kind has of its own."""
    common = {spec.name for spec in dataclasses.fields(Toxic)}
    return [spec for spec in dataclasses.fields(kind) if spec.name not in common]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _refuse_unknown(data: Mapping[str, Any], known: list[str] | tuple[str, ...], what: str) -> None:
    unknown = [name for name in data if name not in known]
    if unknown:
        raise ValueError(f"{what} has no {unknown[0]!r}; it has {', '.join(known)}")
