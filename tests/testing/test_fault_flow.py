"""When bytes get through, decided without any socket: properties of every combination of toxics."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from evolink_async.testing import (
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
from evolink_async.testing.flow import Act, Flow

milliseconds = st.integers(0, 5_000)
slowing = st.one_of(
    st.builds(Latency, latency=milliseconds, jitter=milliseconds),
    st.builds(Bandwidth, rate=st.floats(0.5, 1000)),
    st.builds(SlowClose, delay=milliseconds),
    st.builds(Slicer, average_size=st.integers(6, 400), size_variation=st.integers(0, 5), delay=st.integers(0, 10**6)),
)
ending = st.one_of(
    st.builds(Timeout, timeout=st.integers(1, 20_000)),
    st.builds(ResetPeer, timeout=milliseconds),
    st.builds(LimitData, bytes=st.integers(0, 1500)),
    st.builds(HalfClose, bytes=st.integers(0, 1500)),
)
# Bytes, and seconds until the next ones.
arrivals = st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.floats(0, 3)), max_size=6)


class Run:
    """A flow driven to its end: what got through and when."""

    def __init__(self, toxics: list[Toxic], arrivals: list[tuple[bytes, float]], seed: int) -> None:
        self.flow = Flow()
        self.passed: list[tuple[float, bytes]] = []
        self.last: tuple[float, Act] | None = None
        self.now = 100.0
        for number, toxic in enumerate(toxics):
            self.flow.add(replace(toxic, name=str(number)), self.now, Random(seed + number))
        for data, pause in arrivals:
            self.flow.came(data, self.now)
            self._go_on(self.now + pause)
        self.flow.ended(Act.FINISH, self.now)
        self.ended_at = self.now
        self._go_on(self.now + 10**7)

    def _go_on(self, until: float) -> None:
        while self.last is None and (step := self.flow.next()) is not None and step.at <= until:
            self.now = max(self.now, step.at)
            if step.act is Act.PASS:
                self.passed.append((self.now, bytes(self.flow.take(step, self.now))))
            else:
                self.last = self.now, step.act
        self.now = max(self.now, until) if self.last is None else self.now

    @property
    def data(self) -> bytes:
        return b"".join(piece for _, piece in self.passed)


@given(st.lists(slowing, max_size=4), arrivals, st.integers(0, 99))
def test_toxics_that_slow_down_lose_nothing_and_end_in_order(toxics: list[Toxic], sent: Any, seed: int) -> None:
    run = Run(toxics, sent, seed)
    assert run.data == b"".join(data for data, _ in sent)
    assert run.last is not None
    assert run.last[1] is Act.FINISH
    times = [at for at, _ in run.passed]
    assert times == sorted(times)
    delays = [toxic.delay for toxic in toxics if isinstance(toxic, SlowClose)]
    assert run.last[0] >= run.ended_at + sum(delays) / 1000 - 1e-6
    assert run.flow.waiting == 0


@given(st.lists(st.one_of(slowing, ending), max_size=5), arrivals, st.integers(0, 99))
def test_whatever_the_toxics_what_gets_through_is_the_beginning_and_there_is_an_end(
    toxics: list[Toxic], sent: Any, seed: int
) -> None:
    run = Run(toxics, sent, seed)
    whole = b"".join(data for data, _ in sent)
    assert whole.startswith(run.data)
    assert run.last is not None
    limits = [toxic.bytes for toxic in toxics if isinstance(toxic, LimitData | HalfClose)]
    assert len(run.data) <= min(limits, default=len(whole))
    if any(isinstance(toxic, Timeout) for toxic in toxics):
        assert run.data == b""
    if {type(toxic) for toxic in toxics} <= {Latency, Bandwidth, SlowClose, Slicer, LimitData}:
        assert len(run.data) == min([len(whole), *limits])


@given(
    st.floats(0.01, 100), arrivals, st.lists(st.sampled_from([Latency(latency=700), SlowClose(delay=5)]), max_size=2)
)
def test_no_bandwidth_is_exceeded_over_any_time(rate: float, sent: Any, others: list[Toxic]) -> None:
    run = Run([*others, Bandwidth(rate=rate)], sent, 0)
    through = 0
    for at, piece in run.passed:
        through += len(piece)
        assert through <= (at - 100.0) * rate * 1000 + 1e-3


@given(arrivals, milliseconds, milliseconds)
def test_no_byte_is_earlier_than_the_latency_and_none_later_than_its_predecessor_needs(
    sent: Any, latency: int, jitter: int
) -> None:
    run = Run([Latency(latency=latency, jitter=jitter)], sent, 1)
    assert len(run.passed) == len(sent)
    came, before = 100.0, 0.0
    for (at, _), (_, pause) in zip(run.passed, sent, strict=True):
        assert came + max(0, latency - jitter) / 1000 <= at + 1e-6
        assert at <= max(before, came + (latency + jitter) / 1000) + 1e-6
        came, before = came + pause, at


def test_a_receiver_that_held_up_the_line_gets_no_burst_afterwards() -> None:
    flow = Flow()
    flow.add(Bandwidth(rate=1), 0.0, Random(0))
    flow.came(bytes(10_000), 0.0)
    now = 5.0  # the receiver took nothing for so long
    assert flow.next(blocked=True) is None
    for _ in range(100):
        step = flow.next()
        assert step is not None
        now = max(now, step.at)
        flow.take(step, now)
    assert now > 5.0 + 100 * 0.02 * 0.95


def test_a_timer_that_was_a_little_late_is_made_up_for() -> None:
    flow = Flow()
    flow.add(Bandwidth(rate=1), 0.0, Random(0))
    flow.came(bytes(10_000), 0.0)
    for _ in range(100):
        step = flow.next()
        assert step is not None
        flow.take(step, step.at + 0.01)
    assert step.at < 2.0 + 1e-6
