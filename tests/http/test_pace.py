"""When the next paid request may be sent, on virtual time."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tickets import Ticket

from evolink_async import ConfigurationError, RateLimit, RetryPolicy
from evolink_async.emulator.limits import TokenBucket
from evolink_async.http.evidence import TICK
from evolink_async.http.pace import LOST_IN_A_ROW, Lane, Pace, Urgency

pytestmark = pytest.mark.looptime

POLICY = RetryPolicy()


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Let:
    at: float
    model: str
    party: Hashable
    name: Any


@dataclass
class Service:
    """Lets tickets go and answers them after a while; `refuse(at)` gives None, or a hint, or -1 for none.

    `places` tasks run at once, each for `lasts` seconds; others are refused without a hint.
    """

    pace: Pace
    latency: float = 0.1
    refuse: Callable[[float], float | None] = lambda at: None
    let: list[Let] = field(default_factory=list)
    refused: list[Let] = field(default_factory=list)
    places: int | None = None
    lasts: float = 0.0
    running: int = 0
    accepted: int = 0
    most_under_way: int = 0
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    _under_way: int = 0

    def add(
        self, model: str = "m", party: Hashable = "p", urgency: Urgency = Urgency.SOURCE, name: Any = None
    ) -> Ticket:
        def go() -> None:
            let = Let(now(), model, party, name)
            self.let.append(let)
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
            hint = self.refuse(let.at)
            if hint is None and self.places is not None and self.running >= self.places:
                hint = -1.0
            if hint is None and self.lasts:
                self.running += 1
            asyncio.get_running_loop().call_later(self.latency, answer, let, hint)

        def end(lane: Lane) -> None:
            self.running -= 1
            self.pace.ended(lane)

        def answer(let: Let, hint: float | None) -> None:
            self._under_way -= 1
            if hint is None:
                self.accepted += 1
                self.pace.accepted(model, now(), f"task {self.accepted}" if self.lasts else None, self.lasts)
                if self.lasts:
                    lane = self.pace.watch(f"task {self.accepted}")
                    assert lane is not None
                    asyncio.get_running_loop().call_later(self.lasts, end, lane)
            else:
                self.refused.append(let)
                self.pace.refused(model, now(), let.at, None if hint < 0 else hint)
                self.add(model, party, Urgency.RETURNED, name)
            self.pace.finished(model)
            self.answered.set()

        ticket = Ticket(model, party, go)
        self.pace.enqueue(ticket, urgency)
        return ticket

    async def drain(self, count: int) -> None:
        """Until `count` were accepted."""
        async with asyncio.timeout(1e6):
            while self.accepted < count:
                self.answered.clear()
                await self.answered.wait()

    @property
    def times(self) -> list[float]:
        return [let.at for let in self.let]


def service(limit: str | RateLimit | None, parallel: int = 10_000, seed: int = 1, **options: Any) -> Service:
    parsed = None if limit is None else RateLimit.parse(limit)
    return Service(Pace(parsed, parallel, POLICY, {}, random.Random(seed)), **options)


def most_in_a_window(times: list[float], per: float) -> int:
    return max(bisect.bisect_right(times, at + per * (1 - 1e-9)) - index for index, at in enumerate(times))


# -- The limit of the user ------------------------------------------------------------------------------

LIMITS = [
    RateLimit(5),
    RateLimit(60, 60),
    RateLimit(1000, 3600),
    RateLimit(2000),
    RateLimit(0.5),
    RateLimit(1),
    RateLimit(3, 10),
    RateLimit(5, 0.001),
    RateLimit(100_000, 60),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", LIMITS, ids=str)
async def test_no_window_sees_more_than_the_rate_and_one(limit: RateLimit, seed: int) -> None:
    rng = random.Random(f"{limit} {seed}")
    wanted = 300
    second = 1 / limit.per_second
    room = service(limit, seed=seed, latency=second)
    room.refuse = lambda at: rng.choice([-1.0, 0.0, 3 * second]) if rng.random() < 0.03 else None
    withdrawn = 0
    for number in range(wanted):
        ticket = room.add(f"m{rng.randrange(4)}", rng.randrange(3), rng.choice(list(Urgency)), number)
        if rng.random() < 0.05:
            room.pace.withdraw(ticket)
            withdrawn += not any(let.name == number for let in room.let)
        if rng.random() < 0.1:
            await asyncio.sleep(rng.expovariate(1) * 5 * second)
    await room.drain(wanted - withdrawn)
    assert most_in_a_window(room.times, limit.per) <= limit.rate + 1


@pytest.mark.parametrize("rate", [250, 400, 1000])
async def test_a_fast_limit_holds_in_every_window_that_is_full(rate: int) -> None:
    room = service(RateLimit(rate))
    for _ in range(3 * rate):
        room.add()
    await room.drain(3 * rate)
    assert 0.98 * rate <= most_in_a_window(room.times, 1.0) <= rate + 1


@pytest.mark.parametrize("limit", LIMITS[:5], ids=str)
async def test_the_rate_is_reached(limit: RateLimit) -> None:
    room = service(limit)
    count = int(max(20, 3 * limit.rate))
    for _ in range(count):
        room.add()
    await room.drain(count)
    assert count / (room.times[-1] + 1 / limit.per_second) == pytest.approx(limit.per_second, rel=0.06)


async def test_a_limiter_that_is_waited_for_ends_when_nothing_waits() -> None:
    room = service("1/h")
    room.add()
    await asyncio.sleep(1)
    ticket = room.add()
    await asyncio.sleep(1)
    room.pace.withdraw(ticket)
    await asyncio.sleep(0.01)
    assert room.pace._task is None
    room.add(name="other")
    await asyncio.sleep(4000)
    assert [let.name for let in room.let] == [None, "other"]


async def test_two_models_share_a_limit_in_turns() -> None:
    room = service("5/s")
    for _ in range(50):
        room.add("a")
        room.add("b")
    await room.drain(100)
    assert Counter(let.model for let in room.let[:50]) == {"a": 25, "b": 25}


BAD_LIMITS = ["", "5", "5/", "/s", "-5/s", "0/s", "5/day", "1e3/s", "nan/s", "５/s", "5/s/s", 5, None, b"5/s"]


@pytest.mark.parametrize("text", BAD_LIMITS, ids=repr)
async def test_a_limit_that_reads_like_none_is_refused(text: Any) -> None:
    with pytest.raises(ConfigurationError):
        RateLimit.parse(text)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5/s", RateLimit(5)),
        (" 60 / min ", RateLimit(60, 60)),
        ("1000/h", RateLimit(1000, 3600)),
        ("0.5/s", RateLimit(0.5)),
        ("60 per minute", RateLimit(60, 60)),
    ],
)
async def test_limits_as_text(text: str, limit: RateLimit) -> None:
    assert RateLimit.parse(text) == limit


@pytest.mark.parametrize("rate", [1e-9, 1e9])
@pytest.mark.parametrize("per", [1e-9, 1e9])
async def test_the_most_extreme_limits_let_requests_go(rate: float, per: float) -> None:
    room = service(RateLimit(rate, per))
    for number in range(3):
        room.add(name=number)
    await room.drain(3 if rate == 1e9 else 1)
    assert now() == pytest.approx(0, abs=5)
    await room.pace.aclose()


@pytest.mark.parametrize("value", [0, -1, 1e-10, 1e10, 10**400, math.nan, math.inf, "5", True, None], ids=repr)
async def test_a_rate_must_be_a_positive_number(value: Any) -> None:
    with pytest.raises(ConfigurationError):
        RateLimit(value)
    with pytest.raises(ConfigurationError):
        RateLimit(5, value)


# -- Without a limit ------------------------------------------------------------------------------------


async def test_ten_at_once_then_five_a_second_and_upwards() -> None:
    room = service(None)
    for _ in range(500):
        room.add()
    await asyncio.sleep(0.01)
    assert len(room.let) == 10
    await asyncio.sleep(2)
    assert 10 + 8 <= len(room.let) <= 10 + 25
    before = len(room.let)
    await asyncio.sleep(10)
    assert len(room.let) - before > 80
    await room.drain(500)


async def test_single_calls_far_apart_do_not_raise_the_rate() -> None:
    room = service(None)
    for _ in range(500):
        room.add()
        await asyncio.sleep(2)
    assert room.pace.rate_of({"m"}) < 20  # type: ignore[operator]


@pytest.mark.parametrize("hint", [0.5, 7.0, 60.0, 0.0])
async def test_nobody_asks_a_model_before_the_hint_and_the_others_go_on(hint: float) -> None:
    room = service("50/s")
    room.refuse = lambda at: hint if at == 0 else None
    for _ in range(50):
        room.add("a")
    await asyncio.sleep(1)
    for _ in range(50):
        room.add("b")
    await room.drain(100)
    refused = room.refused[0]
    told = refused.at + room.latency
    assert all(let.at >= told + hint for let in room.let if let.model == refused.model and let.at > told)
    others = [let.at for let in room.let if let.model == "b"]
    assert others[-1] <= 3.2


async def test_a_learned_rate_survives_its_loop() -> None:
    rates: dict[str, float] = {}
    refused: dict[str, float] = {}
    pace = Pace(None, 10, POLICY, rates, refused=refused)
    room = Service(pace, refuse=lambda at: 1.0 if at < 0.3 else None)
    for _ in range(30):
        room.add()
    await room.drain(30)
    learned = pace.rate_of({"m"})
    assert rates == {"m": learned}
    again = Pace(None, 10, POLICY, rates, refused=refused)._lane("m", 0.0).pace
    assert again.rate == learned
    assert learned <= again.refused_rate < 20  # and it goes on searching


async def test_learned_places_survive_their_loop() -> None:
    caps: dict[str, float] = {}
    pace = Pace(None, 10, POLICY, {}, caps=caps)
    room = Service(pace, latency=0.2, places=12, lasts=20.0)
    for _ in range(200):
        room.add()
    await room.drain(200)
    assert 8 <= caps["m"] <= 14
    assert Pace(None, 10, POLICY, {}, caps=caps)._lane("m", 0.0).pace.cap == caps["m"]


async def test_a_model_without_a_place_waits_for_one_to_end_and_the_others_go_on() -> None:
    pace = Pace(None, 100, POLICY, {}, caps={"full": 2.0})
    room = Service(pace, lasts=50.0)
    for _ in range(6):
        room.add("full")
    await asyncio.sleep(10)
    assert len(room.let) == 2
    assert pace._task is not None  # a ticket waits, so somebody must
    room.add("free")
    await asyncio.sleep(1)
    assert len(room.let) == 3
    await room.drain(7)
    assert now() == pytest.approx(100, abs=2)
    await asyncio.sleep(51)
    assert pace._lane("full", now()).pace.running == 0


async def test_a_task_of_whose_end_nobody_tells_is_forgotten_after_three_times_its_estimate() -> None:
    pace = Pace(None, 100, POLICY, {}, caps={"m": 1.0})
    let: list[float] = []

    def go() -> None:
        let.append(now())
        pace.accepted("m", now(), f"task {len(let)}", 40.0)
        pace.finished("m")

    for _ in range(3):
        pace.enqueue(Ticket("m", "p", go), Urgency.SOURCE)
    await asyncio.sleep(1000)
    assert let == [pytest.approx(at, abs=0.1) for at in (0, 120, 240)]


async def test_the_end_of_a_task_that_is_not_known_is_nothing_to_it() -> None:
    pace = Pace(None, 100, POLICY, {}, caps={"m": 1.0})
    assert pace.watch("a stranger") is None
    pace.accepted("m", now(), "ours")
    assert pace.watch("a stranger") is None
    assert pace._lane("m", now()).pace.running == 1
    pace.accepted("other", now(), "another")
    lane = pace.watch("ours", "other")  # the service may call it by another name
    assert lane is not None
    assert lane.model == "m"
    pace.ended(lane)
    assert pace.watch("ours") is None
    assert pace._lane("m", now()).pace.running == 0


async def test_a_request_that_waits_for_a_place_goes_when_a_task_that_is_watched_no_more_must_have_ended() -> None:
    pace = Pace(None, 100, POLICY, {}, caps={"m": 1.0})
    let: list[float] = []
    pace.accepted("m", now(), "ours")
    lane = pace.watch("ours")
    assert lane is not None
    pace.enqueue(Ticket("m", "p", lambda: let.append(now())), Urgency.SOURCE)
    await asyncio.sleep(1000)
    assert let == []
    pace.unwatch(lane, "ours", 50.0)
    await asyncio.sleep(1000)
    assert let == [pytest.approx(1150, abs=0.1)]


async def test_what_is_let_go_a_hair_before_an_outages_pause_is_over_makes_the_next_one() -> None:
    pace = Pace(None, 10, POLICY, {})
    for _ in range(LOST_IN_A_ROW):
        pace.lost("m", now(), now())
    over = now() + pace.cool_down_of("m", now())
    await asyncio.sleep(over + 0.1 - now())
    pace.lost("m", now(), over - TICK / 2)
    assert pace.cool_down_of("m", now()) > 0


async def test_so_it_is_where_no_connection_can_be_made() -> None:
    pace = Pace(None, 10, POLICY, {})
    pace.unreachable(now(), now())
    over = pace._unreachable_until
    await asyncio.sleep(over + 0.1 - now())
    pace.unreachable(now(), over - TICK / 2)
    assert pace._unreachable_until > now()


async def test_clients_that_were_refused_together_come_back_one_after_the_other() -> None:
    paces = [Pace(None, 10, POLICY, {}) for _ in range(20)]
    for pace in paces:
        pace.refused("m", now(), now(), None)
    assert len({pace.cool_down_of("m", now()) for pace in paces}) == 20


async def test_after_a_pause_one_goes_first() -> None:
    room = service(None, latency=0.5)
    room.refuse = lambda at: 3.0 if at < 0.1 else None
    for _ in range(30):
        room.add()
    await asyncio.sleep(3.9)
    assert len(room.let) == 10 + 2 + 1  # ten at once, two until it was known, and the one that finds out
    await asyncio.sleep(1)
    assert len(room.let) > 13
    await room.drain(30)


async def simulate(limit: str | None, count: int, refuse: Callable[[float], float | None]) -> tuple[float, float]:
    """Seconds it took, and the share of requests that were refused."""
    room = service(limit, parallel=75, refuse=refuse)
    for _ in range(count):
        room.add()
    await room.drain(count)
    return room.times[-1], len(room.refused) / len(room.let)


@pytest.mark.parametrize("hint", [1.0, -1.0], ids=["hint", "no-hint"])
async def test_one_percent_of_refusals_by_chance_is_no_collapse(hint: float) -> None:
    rng = random.Random(3)
    seconds, _ = await simulate("500/s", 5000, lambda at: hint if rng.random() < 0.01 else None)
    assert seconds < 200


@pytest.mark.parametrize("hinted", [True, False])
async def test_a_hidden_limit_is_found_with_few_refusals(hinted: bool) -> None:
    bucket = TokenBucket(50, 50)

    def refuse(at: float) -> float | None:
        wait = bucket.take(at)
        return None if wait == 0 else max(1, math.ceil(wait)) if hinted else -1

    seconds, share = await simulate(None, 5000, refuse)
    assert share < 0.008
    assert 5000 / seconds > 0.95 * 50


# -- Fairness -------------------------------------------------------------------------------------------


async def test_parties_take_turns_and_a_single_call_is_not_starved() -> None:
    room = service("10/s")
    for _ in range(1000):
        room.add(party="pool")
    await asyncio.sleep(1)
    room.add(party="calls", urgency=Urgency.CALLER)
    await asyncio.sleep(0.3)
    assert "calls" in {let.party for let in room.let}
    for _ in range(20):
        room.add(party="calls")
    before = len(room.let)
    await asyncio.sleep(2)
    assert Counter(let.party for let in room.let[before:])["calls"] == pytest.approx(10, abs=1)
    await room.pace.aclose()


async def test_within_a_party_the_urgent_go_first_and_then_the_order_given() -> None:
    room = service("10/s")
    room.add(name="first")
    for urgency in (Urgency.SOURCE, Urgency.CALLER, Urgency.RETURNED):
        for number in range(3):
            room.add(urgency=urgency, name=(urgency, number))
    await room.drain(10)
    names = [let.name for let in room.let]
    assert names[0] == (Urgency.RETURNED, 0)  # nothing had been let go yet when all were there
    assert [name for name in names if name != "first"] == [(urgency, n) for urgency in Urgency for n in range(3)]


async def test_not_more_than_parallel_are_under_way() -> None:
    room = service("1000/s", parallel=7, latency=1.0)
    for _ in range(50):
        room.add()
    await room.drain(50)
    assert room.most_under_way == 7
    assert now() == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize("parallel", [4, 8, 75])
async def test_a_model_that_stops_answering_leaves_places_for_the_others(parallel: int) -> None:
    room = service("20/s", parallel=parallel, latency=0.1)
    silent = [Ticket("silent", "pool", lambda: None) for _ in range(1000)]  # never finished
    for ticket in silent:
        room.pace.enqueue(ticket, Urgency.SOURCE)
    for number in range(100):
        room.add(name=number)
    await room.drain(100)
    assert now() < 11  # half of the rate at worst
    for ticket in silent:
        room.pace.withdraw(ticket)


async def test_its_task_exists_only_while_something_waits() -> None:
    room = service("10/s")
    assert room.pace._task is None
    for _ in range(5):
        room.add()
    await asyncio.sleep(0)
    assert room.pace._task is not None
    await asyncio.sleep(1)
    assert room.pace._task is None
    room.add()
    await room.drain(6)
    assert room.pace._task is None


async def test_a_ticket_is_not_let_go_before_its_time() -> None:
    room = service("10/s")
    let: list[float] = []
    for delay in (5.0, 2.0):
        ticket = Ticket("m", "p", lambda: let.append(now()))
        room.pace.enqueue(ticket, Urgency.RETURNED, now() + delay)
    room.pace.withdraw(ticket)
    await asyncio.sleep(10)
    assert let == [pytest.approx(5, abs=0.01)]


async def test_while_the_service_cannot_be_reached_one_finds_out_for_all() -> None:
    room = service("1000/s")
    knocks: list[float] = []

    def knock() -> None:
        knocks.append(now())
        asyncio.get_running_loop().call_later(0.5, failed, now())

    def failed(sent_at: float) -> None:
        room.pace.unreachable(now(), sent_at)
        room.pace.finished("m")
        room.pace.enqueue(Ticket("m", "p", knock), Urgency.RETURNED)

    for _ in range(20):
        room.pace.enqueue(Ticket("m", "p", knock), Urgency.SOURCE)
    await asyncio.sleep(300)
    pauses = [b - a for a, b in itertools.pairwise(knocks[20:])]
    assert len(knocks) < 20 + 20
    assert min(pauses) > 0.5
    assert max(pauses) > 15
    room.pace.reachable()
    await asyncio.sleep(0.1)
    assert room.pace._places() > 1
    await room.pace.aclose()


async def test_closing_ends_the_dispatcher_and_tells_those_who_wait() -> None:
    room = service("1/h")
    failures: list[BaseException] = []
    for _ in range(2):
        room.pace.enqueue(Ticket("m", "p", lambda: None, failures), Urgency.SOURCE)
    room.pace.enqueue(withdrawn := Ticket("m", "p", lambda: None, failures), Urgency.SOURCE)
    room.pace.withdraw(withdrawn)
    await asyncio.sleep(1)
    await room.pace.aclose()
    assert [type(error) for error in failures] == [asyncio.CancelledError]


async def test_who_hears_that_somebody_cancelled_the_dispatcher_may_queue_another_ticket_and_it_goes() -> None:
    room = service("1/s")
    gone: list[float] = []

    class Stubborn(Ticket):
        def turn_failed(self, error: BaseException) -> None:
            room.pace.enqueue(Ticket("m", "p", lambda: gone.append(now())), Urgency.SOURCE)

    for _ in range(5):
        room.pace.enqueue(Stubborn("m", "p", lambda: None), Urgency.SOURCE)
    await asyncio.sleep(0.1)
    [dispatcher] = [task for task in asyncio.all_tasks() if task.get_name() == "evolink pace"]
    dispatcher.cancel()
    await asyncio.sleep(20)
    assert 3 <= len(gone) <= 4
    await room.pace.aclose()


async def test_a_ticket_that_cannot_be_started_harms_no_other() -> None:
    room = service("10/s", parallel=1)
    failures: list[BaseException] = []

    def broken() -> None:
        raise RuntimeError("a bug")

    room.pace.enqueue(Ticket("m", "p", broken, failures), Urgency.SOURCE)
    room.add()
    await room.drain(1)
    assert [type(error) for error in failures] == [RuntimeError]
