"""The fault proxy, seen by bare sockets on both of its sides. Time is virtual."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from wire import Line, Peer, World, world

from evolink_async.testing import (
    Bandwidth,
    FaultProxy,
    HalfClose,
    Latency,
    LimitData,
    ProxyStats,
    ResetPeer,
    Slicer,
    SlowClose,
    Timeout,
    Toxic,
)

pytestmark = pytest.mark.looptime
streams = pytest.mark.parametrize("stream", ["upstream", "downstream"])
DAY = 86_400.0


@pytest.fixture(autouse=True)
def _no_sockets_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() <= before


def descriptors() -> int:
    process = psutil.Process()
    return process.num_handles() if os.name == "nt" else process.num_fds()


def now() -> float:
    return asyncio.get_running_loop().time()


async def elapsed(call: Any) -> tuple[float, Any]:
    """How many seconds something takes, and its result."""
    begun = now()
    result = await call
    return now() - begun, result


async def echo_both_ways(line: Line) -> None:
    """Bytes get through in both directions, at once."""
    begun = now()
    for sender, receiver in (line.along("upstream"), line.along("downstream")):
        await sender.send(b"hello")
        assert await receiver.reader.readexactly(5) == b"hello"
    assert now() - begun < 0.001


def reset(peer: Peer) -> None:
    """Close a socket the hard way."""
    peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.writer.transport.abort()


# --- without toxics it is not there -----------------------------------------------------------------------------


async def test_without_toxics_every_byte_gets_through_in_both_directions() -> None:
    async with world() as here:
        line = await here.line()
        for stream in ("upstream", "downstream"):
            sender, receiver = line.along(stream)
            data = os.urandom(3_000_000)
            sending = asyncio.create_task(sender.send(data))
            assert await receiver.reader.readexactly(len(data)) == data
            await sending
        assert here.proxy.stats == ProxyStats(accepted=1, open=1, upstream_bytes=3_000_000, downstream_bytes=3_000_000)


@streams
async def test_without_toxics_a_half_close_and_then_the_whole_close_get_through(stream: str) -> None:
    async with world() as here:
        line = await here.line()
        sender, receiver = line.along(stream)
        sender.writer.write(b"last words")
        sender.writer.write_eof()
        assert await receiver.reader.read() == b"last words"
        await receiver.send(b"noted")
        assert await sender.reader.readexactly(5) == b"noted"
        assert here.proxy.stats.open == 1
        receiver.writer.write_eof()
        assert await sender.reader.read() == b""
        await settled(here)


@streams
async def test_without_toxics_a_reset_gets_through_after_the_data_before_it(stream: str) -> None:
    async with world() as here:
        here.proxy.add(Latency(latency=1000, stream=stream))  # type: ignore[arg-type]
        line = await here.line()
        sender, receiver = line.along(stream)
        await sender.send(b"before")
        await asyncio.sleep(0.1)
        reset(sender)
        assert await receiver.reader.readexactly(6) == b"before"
        with pytest.raises(ConnectionResetError):
            await receiver.reader.read()
        await settled(here)


async def settled(here: World) -> None:
    """The proxy has let go of every connection."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert here.proxy.stats.open == 0


async def test_a_server_that_cannot_be_reached_ends_the_connection() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with FaultProxy(f"http://127.0.0.1:{nobody.getsockname()[1]}") as proxy:
            reader, writer = await asyncio.open_connection(*proxy.address)
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            assert proxy.stats == ProxyStats(accepted=1, open=0, upstream_bytes=0, downstream_bytes=0)


@streams
async def test_a_receiver_that_does_not_read_stops_the_sender(stream: str) -> None:
    async with world() as here:
        sender, _ = (await here.line()).along(stream)
        sending = asyncio.create_task(send_much(sender))
        await asyncio.sleep(DAY)
        sending.cancel()
        [sent] = await asyncio.gather(sending)
        assert 0 < sent < 30_000_000  # what two pairs of the system's buffers hold


async def send_much(sender: Peer) -> int:
    """How many of 100 MB could be sent until cancelled."""
    sent = 0
    try:
        while sent < 100_000_000:
            await sender.send(bytes(100_000))
            sent += 100_000
    except asyncio.CancelledError:
        pass
    return sent


@streams
async def test_a_receiver_that_reads_on_gets_everything(stream: str) -> None:
    async with world() as here:
        sender, receiver = (await here.line()).along(stream)
        sending = asyncio.create_task(sender.send(bytes(20_000_000)))
        await asyncio.sleep(1)
        assert not sending.done()
        assert len(await receiver.reader.readexactly(20_000_000)) == 20_000_000
        await sending


# --- each toxic, in both directions -----------------------------------------------------------------------------


@streams
async def test_latency_delays_each_byte_and_not_the_ones_that_follow(stream: Any) -> None:
    async with world() as here:
        here.proxy.add(Latency(latency=60_000, stream=stream))
        sender, receiver = (await here.line()).along(stream)
        begun = now()
        await sender.send(b"1")
        await asyncio.sleep(5)
        await sender.send(b"2")
        sender.writer.write_eof()
        assert [(round(at - begun, 2), data) for at, data in await receiver.reads()] == [(60.0, b"1"), (65.0, b"2")]
        took, _ = await elapsed(send_across(receiver, sender))
        assert took < 0.01  # the other direction has none


async def send_across(sender: Peer, receiver: Peer) -> None:
    await sender.send(b"x")
    assert await receiver.reader.readexactly(1) == b"x"


async def test_jitter_spreads_the_latency_and_is_the_same_for_the_same_seed() -> None:
    async def delays(seed: int) -> list[float]:
        async with world(seed) as here:
            here.proxy.add(Latency(latency=1000, jitter=400))
            line = await here.line()
            return [(await elapsed(send_across(line.server, line.client)))[0] for _ in range(30)]

    first = await delays(1)
    assert 0.6 <= min(first) < 0.75
    assert 1.25 < max(first) <= 1.41
    assert await delays(1) == pytest.approx(first, abs=0.01)
    assert await delays(2) != pytest.approx(first, abs=0.01)


@streams
@pytest.mark.parametrize(("rate", "size"), [(0.1, 500), (10, 100_000), (2000, 6_000_000)])
async def test_bandwidth_is_kept_from_the_first_byte_to_the_last(stream: Any, rate: float, size: int) -> None:
    async with world() as here:
        here.proxy.add(Bandwidth(rate=rate, stream=stream))
        sender, receiver = (await here.line()).along(stream)
        begun = now()
        sending = asyncio.create_task(sender.send(bytes(size)))
        half, _ = await elapsed(receiver.reader.readexactly(size // 2))
        await receiver.reader.readexactly(size - size // 2)
        assert half == pytest.approx(size / 2 / (rate * 1000), rel=0.05)
        assert now() - begun == pytest.approx(size / (rate * 1000), rel=0.02)
        await sending


@streams
async def test_slow_close_delays_the_end_and_not_the_data(stream: Any) -> None:
    async with world() as here:
        here.proxy.add(SlowClose(delay=30_000, stream=stream))
        sender, receiver = (await here.line()).along(stream)
        sender.writer.write(b"data")
        sender.writer.write_eof()
        took, data = await elapsed(receiver.reader.readexactly(4))
        assert (round(took, 2), data) == (0, b"data")
        took, data = await elapsed(receiver.reader.read())
        assert (round(took, 2), data) == (30, b"")


@streams
async def test_timeout_lets_nothing_through_and_closes_in_the_end(stream: Any) -> None:
    async with world() as here:
        here.proxy.add(Timeout(timeout=20_000, stream=stream))
        line = await here.line()
        sender, receiver = line.along(stream)
        await sender.send(b"into the void")
        await send_across(receiver, sender)  # the other direction works as long as there is a connection
        took, data = await elapsed(receiver.reader.read())
        assert (round(took, 1), data) == (20, b"")
        assert await sender.reader.read() == b""
        await settled(here)


@streams
async def test_timeout_0_never_closes(stream: Any) -> None:
    async with world() as here:
        here.proxy.add(Timeout(timeout=0, stream=stream))
        sender, receiver = (await here.line()).along(stream)
        for _ in range(50):
            await sender.send(bytes(100_000))  # it is read and lost, so the sender is not stopped
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(DAY):
                await receiver.reader.read()
        assert here.proxy.stats.open == 1


@streams
async def test_connections_that_lost_data_to_a_timeout_end_with_it_and_others_go_on(stream: Any) -> None:
    async with world() as here:
        loser, winner = await here.line(), await here.line()
        toxic = here.proxy.add(Timeout(timeout=0, stream=stream))
        await loser.along(stream)[0].send(b"lost")
        await asyncio.sleep(1)
        here.proxy.remove(toxic)
        assert await loser.along(stream)[1].reader.read() == b""
        await echo_both_ways(winner)


@streams
@pytest.mark.parametrize("timeout", [0, 4_000])
async def test_reset_peer_tears_down_both_ends_when_something_comes(stream: Any, timeout: float) -> None:
    async with world() as here:
        here.proxy.add(ResetPeer(timeout=timeout, stream=stream))
        line = await here.line()
        sender, receiver = line.along(stream)
        await asyncio.sleep(DAY)
        await send_across(receiver, sender)  # nothing came on the stream so far
        begun = now()
        await sender.send(b"never seen")
        for peer in (line.client, line.server):
            with pytest.raises(ConnectionResetError):
                assert await peer.reader.read() == b""
        assert round(now() - begun, 2) == timeout / 1000
        await settled(here)


@streams
async def test_slicer_cuts_the_data_into_pieces_of_the_size(stream: Any) -> None:
    async with world() as here:
        here.proxy.add(Slicer(average_size=100, size_variation=20, delay=50_000, stream=stream))
        sender, receiver = (await here.line()).along(stream)
        data = os.urandom(5_000)
        sender.writer.write(data)
        sender.writer.write_eof()
        took, seen = await elapsed(receiver.reads())
        pieces = [piece for _, piece in seen]
        assert b"".join(pieces) == data
        assert all(80 <= len(piece) <= 120 for piece in pieces[:-1])
        assert len({len(piece) for piece in pieces}) > 5
        assert 42 <= len(pieces) <= 63
        assert took == pytest.approx((len(pieces) - 1) * 0.05, abs=0.01)  # microseconds, not milliseconds


@streams
async def test_slicer_can_cut_between_any_two_bytes(stream: Any) -> None:
    async with world() as here:
        here.proxy.add(Slicer(average_size=1, delay=10, stream=stream))
        sender, receiver = (await here.line()).along(stream)
        sender.writer.write(bytes(range(200)))
        sender.writer.write_eof()
        seen = await receiver.reads()
        assert b"".join(piece for _, piece in seen) == bytes(range(200))
        assert len(seen) == 200


async def test_very_many_pieces_at_once_leave_others_their_turn() -> None:
    async with world() as here:
        here.proxy.add(Slicer(average_size=1, stream="upstream"))
        line = await here.line()
        await line.client.send(bytes(20_000))
        answered = 0
        while here.proxy.stats.upstream_bytes < 20_000:
            await send_across(line.server, line.client)
            answered += 1
        assert answered > 1000
        assert await line.server.reader.readexactly(20_000) == bytes(20_000)


@streams
@pytest.mark.parametrize("limit", [0, 1, 1000, 1_500_000])
async def test_limit_data_ends_in_order_after_exactly_its_bytes(stream: Any, limit: int) -> None:
    async with world() as here:
        here.proxy.add(LimitData(bytes=limit, stream=stream))
        line = await here.line()
        sender, receiver = line.along(stream)
        await send_across(receiver, sender)  # the other direction doesn't count
        data = os.urandom(2_000_000)
        sending = asyncio.create_task(sender.send(data))
        assert await receiver.reader.read() == data[:limit]
        await asyncio.wait([sending])
        sending.exception()  # it may have been cut
        await settled(here)
        assert getattr(here.proxy.stats, f"{stream}_bytes") == limit


@streams
async def test_limit_data_does_not_wait_for_a_byte_beyond_the_limit(stream: Any) -> None:
    async with world() as here:
        here.proxy.add(LimitData(bytes=5, stream=stream))
        sender, receiver = (await here.line()).along(stream)
        await sender.send(b"12345")
        assert await receiver.reader.read() == b"12345"
        assert await sender.reader.read() == b""


@streams
@pytest.mark.parametrize("limit", [0, 5])
async def test_half_close_ends_one_direction_and_the_other_goes_on(stream: Any, limit: int) -> None:
    async with world() as here:
        line = await here.line()
        here.proxy.add(HalfClose(bytes=limit, stream=stream))
        sender, receiver = line.along(stream)
        if limit:
            await sender.send(b"12345")
        assert await receiver.reader.read() == b"12345"[:limit]
        for _ in range(3):
            await sender.send(b"into the void")
            await send_across(receiver, sender)
        assert here.proxy.stats.open == 1
        receiver.writer.write_eof()
        assert await sender.reader.read() == b""
        await settled(here)


# --- down -------------------------------------------------------------------------------------------------------


async def test_disabled_it_refuses_and_cuts_and_enabled_again_it_is_at_the_same_port() -> None:
    async with world() as here:
        line = await here.line()
        address = here.proxy.address
        await here.proxy.disable()
        assert not here.proxy.enabled
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)
        assert await line.client.reader.read() == b""
        assert await line.server.reader.read() == b""
        assert here.proxy.stats.open == 0
        await here.proxy.enable()
        assert here.proxy.address == address
        await echo_both_ways(await here.line())


async def test_disabling_and_enabling_twice_or_at_once_is_the_same_as_once() -> None:
    async with world() as here:
        proxy = here.proxy
        await asyncio.gather(proxy.disable(), proxy.enable(), proxy.disable(), proxy.disable(), proxy.enable())
        await proxy.enable()
        await echo_both_ways(await here.line())


async def test_a_port_that_somebody_else_has_is_an_os_error_and_can_be_tried_again() -> None:
    async with world() as here:
        await here.proxy.disable()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(here.proxy.address)
            other.listen()
            with pytest.raises(OSError, match=str(here.proxy.address[1])):
                await here.proxy.enable()
            assert not here.proxy.enabled
        await here.proxy.enable()
        await echo_both_ways(await here.line())


async def test_disabling_in_the_middle_of_connecting_leaves_nothing() -> None:
    for rounds in range(12):
        async with world() as here:
            connecting = [asyncio.create_task(here.connect()) for _ in range(5)]
            for _ in range(rounds):
                await asyncio.sleep(0)
            await here.proxy.disable()
            assert here.proxy.stats.open == 0
            for result in await asyncio.gather(*connecting, return_exceptions=True):
                if isinstance(result, Peer):  # it was in time; now it is at its end
                    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                        await result.reader.readexactly(1)


async def test_a_cancelled_leave_cuts_and_closes_all_the_same() -> None:
    async with world() as here:
        line = await here.line()
        leaving = asyncio.create_task(here.proxy.disable())
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await line.client.reader.read() == b""
        with pytest.raises(ConnectionRefusedError):
            await here.connect()


async def test_leaving_with_connections_in_every_state_leaves_nothing() -> None:
    async with world() as here:
        here.proxy.add(Latency(latency=1000, name="both"))
        here.proxy.add(SlowClose(delay=1000))
        lines = [await here.line() for _ in range(6)]
        await lines[0].client.send(b"x")
        await lines[1].server.send(bytes(2_000_000))
        lines[2].client.writer.write_eof()
        lines[3].server.writer.write_eof()
        reset(lines[4].client)
        await asyncio.sleep(0.5)
        before = len(asyncio.all_tasks())
        await here.proxy.disable()
        assert here.proxy.stats.open == 0
        assert len(asyncio.all_tasks()) <= before


async def test_no_task_runs_for_an_open_connection() -> None:
    async with world() as here:
        before = asyncio.all_tasks()
        lines = [await here.line() for _ in range(20)]
        for line in lines:
            await echo_both_ways(line)
        assert {task for task in asyncio.all_tasks() - before if "proxy" in task.get_name()} == set()


# --- which connections, and when --------------------------------------------------------------------------------


async def test_a_toxic_added_or_removed_befalls_open_connections() -> None:
    async with world() as here:
        line = await here.line()
        await echo_both_ways(line)
        toxic = here.proxy.add(Latency(latency=DAY * 1000))
        await line.server.send(b"held back")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(DAY / 2):
                await line.client.reader.read(100)
        here.proxy.remove(toxic)
        took, data = await elapsed(line.client.reader.read(100))
        assert (round(took, 2), data) == (0, b"held back")
        await echo_both_ways(line)


async def test_several_toxics_of_a_stream_work_one_after_the_other() -> None:
    async with world() as here:
        here.proxy.add(Latency(latency=1000))
        here.proxy.add(Latency(latency=2000, name="another"))
        here.proxy.add(Bandwidth(rate=1))
        here.proxy.add(SlowClose(delay=3000))
        line = await here.line()
        begun = now()
        line.server.writer.write(bytes(1000))
        line.server.writer.write_eof()
        took, _ = await elapsed(line.client.reader.readexactly(1000))
        assert took == pytest.approx(3 + 1, abs=0.05)
        assert await line.client.reader.read() == b""
        assert now() - begun == pytest.approx(4, abs=0.05)  # the end waits from when it came


async def test_toxicity_is_the_share_of_connections_and_the_same_for_the_same_seed() -> None:
    async def befallen(seed: int) -> list[bool]:
        async with world(seed) as here:
            here.proxy.add(Latency(latency=1000, toxicity=0.3))
            return [
                (await elapsed(send_across(line.server, line.client)))[0] > 0.5
                for line in [await here.line() for _ in range(60)]
            ]

    first = await befallen(7)
    assert 8 <= sum(first) <= 28
    assert await befallen(7) == first
    assert await befallen(8) != first


async def test_reset_removes_every_toxic_and_enables() -> None:
    async with world() as here:
        here.proxy.add(Timeout(timeout=0))
        here.proxy.add(Latency(latency=1000, stream="upstream"))
        await here.proxy.disable()
        await here.proxy.reset()
        assert here.proxy.toxics == ()
        await echo_both_ways(await here.line())


# --- its face ---------------------------------------------------------------------------------------------------


async def test_it_says_where_it_is_what_it_does_and_its_seed() -> None:
    proxy = FaultProxy("http://localhost:8085/v1", seed=42)
    with pytest.raises(RuntimeError, match="async with"):
        _ = proxy.base_url
    proxy.add(Latency(latency=5))
    async with proxy:
        host, port = proxy.address
        assert proxy.base_url == f"http://127.0.0.1:{port}"
        assert repr(proxy) == f"<FaultProxy {host}:{port} -> localhost:8085 enabled, latency_downstream, seed 42>"
    assert "disabled" in repr(proxy)
    with pytest.raises(ValueError, match="port must be between"):
        FaultProxy("127.0.0.1:1", port=70_000)
    assert FaultProxy("https://example.com", port=4430).base_url == "https://127.0.0.1:4430"


@pytest.mark.parametrize("upstream", ["", "8085", "host", "ftp://host", "http://:80", "host:99999", None])
def test_an_upstream_that_is_no_place_is_refused(upstream: Any) -> None:
    with pytest.raises(ValueError, match="upstream must be"):
        FaultProxy(upstream)


async def test_toxics_have_names_which_are_unique() -> None:
    proxy = FaultProxy("127.0.0.1:1")
    first = proxy.add(Latency(latency=1))
    assert first.name == "latency_downstream"
    with pytest.raises(ValueError, match="already"):
        proxy.add({"type": "latency", "attributes": {"latency": 2}})
    second = proxy.add({"type": "latency", "stream": "upstream", "attributes": {"latency": 2}})
    third = proxy.add(Latency(latency=1, name="third"))
    assert proxy.toxics == (first, second, third)
    proxy.remove("latency_upstream")
    proxy.remove(third)
    assert proxy.toxics == (first,)
    with pytest.raises(ValueError, match="no toxic named 'third'; there is latency_downstream"):
        proxy.remove(third)


JSON = [
    {"type": "latency", "attributes": {"latency": 1000, "jitter": 50}},
    {"type": "bandwidth", "attributes": {"rate": 10}},
    {"type": "slow_close", "attributes": {"delay": 10}},
    {"type": "timeout", "attributes": {"timeout": 0}},
    {"type": "reset_peer", "attributes": {"timeout": 10}},
    {"type": "slicer", "attributes": {"average_size": 10, "size_variation": 2, "delay": 100}},
    {"type": "limit_data", "attributes": {"bytes": 10}},
    {"type": "half_close", "attributes": {"bytes": 10}},
]


@pytest.mark.parametrize("data", JSON, ids=lambda data: data["type"])
def test_a_toxic_is_read_from_toxiproxys_json_and_written_as_such(data: dict[str, Any]) -> None:
    toxic = Toxic.from_dict(data)
    whole = {"name": f"{data['type']}_downstream", "stream": "downstream", "toxicity": 1.0, **data}
    assert toxic.to_dict() == whole
    assert Toxic.from_dict(whole) == toxic
    other = {**data, "name": "mine", "stream": "upstream", "toxicity": 0.5}
    assert Toxic.from_dict(other).to_dict() == other
    assert hash(toxic) == hash(Toxic.from_dict(data))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({}, "type of a toxic is one of latency, "),
        ({"type": "noop"}, "not 'noop'"),
        ({"type": ["latency"]}, "type of a toxic"),
        ({"type": "latency"}, "lacks an attribute.*latency"),
        ({"type": "latency", "latency": 5}, "a toxic has no 'latency'"),
        ({"type": "latency", "attributes": {"delay": 5}}, "latency has no 'delay'; it has latency, jitter"),
        ({"type": "latency", "attributes": [5]}, "must be a mapping"),
        ({"type": "latency", "attributes": {"latency": -1}}, "latency must be 0 or more, not -1"),
        ({"type": "latency", "attributes": {"latency": "5"}}, "not '5'"),
        ({"type": "latency", "attributes": {"latency": float("nan")}}, "not nan"),
        ({"type": "latency", "attributes": {"latency": True}}, "not True"),
        ({"type": "latency", "stream": "both", "attributes": {"latency": 5}}, "stream must be"),
        ({"type": "latency", "toxicity": 1.5, "attributes": {"latency": 5}}, "toxicity must be"),
        ({"type": "latency", "name": 5, "attributes": {"latency": 5}}, "name must be"),
        ({"type": "bandwidth", "attributes": {"rate": 0}}, "rate must be above 0"),
        ({"type": "limit_data", "attributes": {"bytes": 0.5}}, "counts bytes, not 0.5"),
        ({"type": "slicer", "attributes": {"average_size": 0}}, "size_variation must be below"),
        ({"type": "slicer", "attributes": {"average_size": 5, "size_variation": 5}}, "size_variation must be below"),
    ],
)
def test_what_is_no_toxic_is_a_value_error_that_says_why(data: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        FaultProxy("127.0.0.1:1").add(data)
