"""How fast a model may be asked, and how much of it at once, as the service's answers have it. Pure."""

from __future__ import annotations

import math

from evolink_async.http.evidence import ENOUGH, PLACES_KEPT, TICK, Climb, Spacing, Together, Trials
from evolink_async.http.retry import RetryPolicy

# Without a limit from the user, until the service refuses: gentle, since the limits are unpublished.
START_BURST = 10
START_RATE = 5.0
SLOWEST = 0.01
# Growth per accepted request before the first refusal, in requests per second: about +50 % a second.
_GROWTH = 0.5
# After a refusal: how much less than what was accepted, and how fast from there to what was refused. A limit with a
# store of one second's worth refuses at (1 / excess) seconds, so who climbs slower the nearer he is finds it closely.
_BELOW, _SHORT = 0.99, 0.7
_CLIMB_SECONDS, _CLIMB_REQUESTS, _LEAST_CLIMB = 8.0, 20.0, 10.0
_DEEPEST_CUT = 0.5
# Climbing and probing take at most so long, in seconds and in accepted requests, and as many times as long as a hint
# asks for seconds: this sets the share of refusals, and that of the time which goes into pauses. At a slow rate as many
# requests would take hours: then at most so many patient seconds, for a limit that was raised is to be noticed.
_PATIENCE_SECONDS, _PATIENCE, _LEAST_PATIENCE = 30.0, 300.0, 50.0
_PATIENT_SECONDS = 600.0
# Where cuts had to be taken back more than once in a row: so much faster at most, but not much faster than that the
# pauses take most of the time; and so many refusals, twice as many each time, before it is cut again.
_BOLDER, _MOSTLY_PAUSES = 2.0, 4.0
_SPARED, _MOST_SPARED, _MOST_DOUBTS = 4, 32, 6
_SURE = 10  # accepted; fewer say little
_IDLE = 1.0  # seconds without a request, where more than two would have been due: nobody asked
# Places: less than this share of the rate came through (of one that runs alone this says little), and as many as had
# ended.
_FEW, _VERY_FEW, _BALANCE = 0.5, 0.25, 0.3
_APART, _FAR_APART = 1.0, 1.5  # usual gaps before the request that tries one place more: of a known cap, of none
_UNKNOWN_ENDS = 0.65  # beside a tenth: of three that ran together one may have ended unseen, of two none
_LEAST_PLACES_PATIENCE = 10.0
_LONGEST_PROBE = 2.0  # seconds for which the others wait for the answer to the first after a pause
_LATE = 0.01  # seconds by which a timer may be late
_TOGETHER = 1.0  # seconds


class ModelPace:
    """How fast one model may be asked now, and how many of its tasks may run. Pure: the caller passes the time, in
    seconds of any one clock.

    Until the first refusal the rate grows by half every second. A refusal begins a search. Between two refusals a
    limiter that stores what is not used has let through exactly its rate, so what was accepted since the last one,
    pauses included, is a rate that may be asked for, and the rate that was refused is one that may not. The rate climbs
    from the one to the other, the slower the nearer they are, and later, bolder and bolder, beyond, for limits change.

    No limit lets less through because it is asked for less. Where much less comes through than at a higher rate, the
    refusals have other reasons (an overloaded service, mere chance), or the limit was lowered meanwhile: the rate goes
    back to where most came through. That costs one more refusal where the limit was lowered. Where it has to go back
    again and again, it goes higher, until most of the time is spent in the pauses, and is cut more and more rarely.

    A refusal while few were sent lately, with as many accepted as had ended since the one before, was not for the rate
    but for the places: then the cap on running tasks is searched for in the same way. From then on the request that
    tries one place more goes well apart from the last: if it is refused, that was for the places, and the rate stays.

    A rate that is just what the places let through looks like a limit on the rate: few were never sent. So after a
    refusal in a steady flow the first request that would run beside more tasks than ran then goes well apart too.

    refused, cap: what was learned before, beside the rate.
    """

    __slots__ = (
        "_allowed",
        "_asked_at",
        "_believed_until",
        "_cap",
        "_ceiling",
        "_cut_at",
        "_doubts",
        "_due",
        "_ended",
        "_full",
        "_hint",
        "_idle",
        "_paused",
        "_pressed",
        "_probe_at",
        "_probing",
        "_rate",
        "_rate_then",
        "_refusals",
        "_refused_with",
        "_shared_until",
        "_since",
        "_spacing",
        "_spared",
        "_suspected",
        "_taken",
        "_together",
        "_trials",
        "_unwatched",
        "_watched",
        "burst",
        "cool_until",
        "under_way",
    )

    def __init__(
        self,
        rate: float,
        burst: int,
        now: float,
        ceiling: float = math.inf,
        *,
        refused: float = math.inf,
        cap: float = math.inf,
    ) -> None:
        self._rate = Climb(rate)
        if not math.isinf(refused):
            patience = _within(_LEAST_CLIMB, _PATIENT_SECONDS * rate, _PATIENCE)
            self._rate.begin(rate, max(rate, refused), patience, patience)
        self._cap = Climb(cap, unit=1.0)
        if not math.isinf(cap):
            self._cap.begin(cap, cap, 1, _LEAST_PATIENCE)
        self._ceiling = ceiling
        self.burst = burst
        self.cool_until = -math.inf
        self._due = now  # when the next one would be due at an even spacing
        self._allowed = 0.0  # a rate that was accepted
        self._refusals = 0  # in a row
        self._cut_at = -math.inf
        self._hint = 0.0  # what the latest refusal that counts asked for
        self._pressed = False  # the last one was sent as soon as it might
        self._probing = False  # after a pause one goes first
        self._probe_at = -math.inf
        self._trials = Trials()
        self._doubts = 0  # how often, about in a row, the cuts had to be taken back
        self._spared = 0  # so many refusals more don't cut the rate
        self._watched = 0  # running tasks of whose end we shall be told
        # The others, and until when they are believed to run; `_believed_until` is no later than the first of these.
        self._unwatched: dict[str, float] = {}
        self._believed_until = math.inf
        self._shared_until = -math.inf
        self._suspected = math.inf  # tasks that ran at a refusal that was taken for the rate, and may not have been
        self.under_way = 0  # that were let go and have no answer yet
        # What is measured since the last refusal.
        self._since = self._asked_at = now
        self._taken = self._ended = 0
        self._idle = self._paused = 0.0
        self._full = False  # whether requests had to wait for a place
        self._refused_with = math.inf  # the fewest tasks with which one was refused since then
        self._rate_then = rate  # from when it is measured
        self._spacing = Spacing(now)
        self._together = Together(now)

    @property
    def rate(self) -> float:
        """Submissions per second, infinite until there is a reason to slow down where the user set a `ceiling`."""
        return self._rate.level

    @property
    def refused_rate(self) -> float:
        """The rate to which it climbs, since it was refused; infinite before the first refusal."""
        return self._rate.refused

    @property
    def cap(self) -> float:
        """Tasks that may run at once, infinite while no refusal had to do with them."""
        return math.inf if math.isinf(self._cap.level) else max(1, int(self._cap.level))

    @property
    def running(self) -> int:
        """Tasks that are believed to run."""
        return self._watched + len(self._unwatched)

    # What happens

    def ready_at(self, now: float) -> float:
        """The moment from which the next one may be sent, unless something happens before."""
        moment = self.cool_until
        if self._rate.level < math.inf:
            store = max((self.burst - 1) / self._rate.level, _LATE)
            moment = max(moment, self._due - store)
        if self._probing and self._probe_at >= self.cool_until:
            moment = max(moment, self._probe_at + _LONGEST_PROBE)
        if self._is_full(now):
            moment = max(moment, self._believed_until)
        elif self._together.most <= self._most_tried <= self.running + self.under_way:  # it tries one place more
            moment = max(moment, self._spacing.apart_at(self._gaps_before_one_more))
        return moment

    def sent(self, now: float) -> None:
        """One was let go."""
        spacing = 1 / self._usable_rate
        self._pressed = now - self._due <= max(spacing, _LATE)
        self._due = max(self._due, now) + spacing
        asked_for = now - max(self._asked_at, self.cool_until)
        if asked_for > max(_IDLE, 2 * spacing):  # nobody asked; else others may have been in the way
            self._idle += asked_for - spacing
        self._asked_at = now
        self._spacing.sent(now)
        self.under_way += 1
        self._probe_at = now

    def landed(self) -> None:
        """One that was let go has its answer, or will get none."""
        self.under_way -= 1
        self._probe_at = -math.inf

    def accepted(self, now: float, task_id: str | None = None, until: float = math.inf) -> None:
        """The service took one: go a little faster, if we are as fast as we may be.

        `task_id`: the task that runs now, and is believed to until `until`, unless somebody watches it.
        """
        self._forget_old(now)
        if task_id is not None:
            self._believe(task_id, until)
        self._together.accepted(now, self.running, self._shortly)
        self._refusals = 0
        if now >= self.cool_until:  # else it was sent before the pause
            self._probing = False
        self._taken += 1
        self._spacing.accepted(now)
        rate = self._rate
        if not self._pressed or rate.level >= self._ceiling:
            return
        if rate.level > self._cap.level and not self._has_place():
            return  # the places hold it back, and are filled in a second
        if rate.refused < math.inf:
            rate.grow()
        else:
            # Where seconds pass between two, each may not count for more than it does at the start.
            rate.level += _GROWTH * min(1.0, rate.level / START_RATE)

    def watch(self, task_id: str) -> bool:
        """Somebody watches this task, and will tell when it has `ended`. Whether it is one of those that run."""
        if self._unwatched.pop(task_id, None) is None:
            return False
        self._watched += 1
        return True

    def unwatch(self, task_id: str, until: float) -> None:
        """A watched task is believed to run until then: of its end nobody will tell."""
        self._watched -= 1
        self._believe(task_id, until)

    def _believe(self, task_id: str, until: float) -> None:
        # There may be many: those that are believed in about as long share the moment.
        if not 0 <= until - self._shared_until < _TOGETHER:
            self._shared_until = until
        self._unwatched[task_id] = self._shared_until
        self._believed_until = min(self._believed_until, self._shared_until)

    def ended(self, now: float) -> None:
        """A watched task has ended."""
        full = self._is_full(now)
        self._together.ended(now, self._shortly)
        self._watched -= 1
        self._ended += 1
        if full:
            self._full = True
            self._idle += max(0.0, now - max(self._asked_at, self.cool_until))  # there was no place to ask for
            self._asked_at = now
            self._cap.grow()

    def refused(self, now: float, sent_at: float, hint: float | None, retry: RetryPolicy, rand: float) -> None:
        """A 429: nobody asks this model before the hint, and from then on slower, or for fewer at once, than now.

        `sent_at`: when the refused request was let go.
        """
        if sent_at >= self.cool_until or not self._refusals:
            self._refusals += 1  # those of one volley are one refusal
        self._together.count(now, self._shortly)
        if self.under_way <= 1:  # else what was accepted before it may not be known yet
            self._refused_with = min(self._refused_with, self.running)
        pause = retry.delay(self._refusals, None, rand) if hint is None else max(hint, 0.05) + 0.001
        self.cool(now, now + pause)
        # Requests that were under way when the rate was cut say nothing about the new rate.
        if sent_at <= self._cut_at:
            return
        self._cut_at = now
        self._hint = hint or 0.0
        self._probing = True
        self.burst = 1
        searching = not math.isinf(self._rate.refused)
        if searching and not self._taken:
            self._suspected = math.inf  # a task ends soon, the rate of a minute may be used up for long
            return  # the pause was too short, which says nothing about the rate
        if searching and self._was_for_places(now, sent_at):
            self._cut_places(now)
            if self._trials.highest_rate > self._usable_rate:
                self._go_back_to(self._trials.highest_rate)
        elif searching and self._full and self.running >= self._cap.refused and not self._more_ran(self._together.most):
            self._cut_places(now)  # it may have been for either
            self._search_rate(PLACES_KEPT * self._usable_rate, self._usable_rate)
        else:
            if self._full and self.running >= PLACES_KEPT * self._cap.level:
                self._cap.level = max(self._cap.level, self._cap.refused)  # that fewer may run has not helped
            steady = self._taken >= _SURE and self._was_balanced and self.running > 1
            self._suspected = self.running if steady else math.inf
            self._cut_rate(now)
        self._due = max(now + 1 / self._rate.level, self.cool_until)
        self._begin_measuring(now)
        self._paused = self.cool_until - now

    def cool(self, now: float, until: float) -> None:
        """Nobody asks this model before `until`."""
        if until > self.cool_until:
            self._paused += until - max(now, self.cool_until)
            self.cool_until = until

    # What follows from a refusal

    def _cut_rate(self, now: float) -> None:
        rate = self._usable_rate
        if math.isinf(self._rate.refused):  # what was stored until then hides the limit
            self._search_rate(_DEEPEST_CUT * rate, rate)
            return
        through = min(rate, self._through(now))
        self._trials.add(rate, self._taken, through)
        if self._spared:
            self._spared -= 1
            return
        if self._trials.compare():
            self._doubts = max(0, self._doubts - 1)
        if (better := self._trials.better()) is not None:
            self._take_back_cuts(*better)
            return
        allowed = through
        if self._taken >= _SURE and self._asked(now) >= self._allowed:  # else less is let through than before
            allowed = max(allowed, self._allowed)
        deepest = _DEEPEST_CUT * max(rate, self._trials.asked)  # few accepted cut no deeper, however many refusals
        self._search_rate(min(max(allowed, deepest), _BELOW * rate), rate)

    def _search_rate(self, allowed: float, refused: float) -> None:
        self._allowed = allowed
        level = max(SLOWEST, _BELOW * allowed)
        refused = level + _SHORT * max(0.0, refused - level)  # the limit is nearer to what was accepted
        longest = self._longest(level)
        distance = refused / level - 1
        steps = max(_CLIMB_SECONDS * level, _CLIMB_REQUESTS) / max(distance, 1e-3)
        patience = 2.0 * self._taken
        self._rate.begin(
            level, refused, _within(_LEAST_CLIMB, steps, longest), _within(_LEAST_PATIENCE, patience, longest)
        )

    def _longest(self, rate: float) -> float:
        """Accepted requests or ended tasks, of so many per second, in the longest climb or probe."""
        return max(_PATIENCE_SECONDS * max(1.0, self._hint) * rate, min(_PATIENCE, _PATIENT_SECONDS * rate))

    def _take_back_cuts(self, rate: float, through: float) -> None:
        """At this higher rate much more came through."""
        if self._doubts or self._taken < _SURE:  # where many are accepted in between, being wrong costs many refusals
            rate = max(rate, min(_BOLDER * rate, _MOSTLY_PAUSES * through))
        if self._doubts:
            self._spared = min(_SPARED * 2 ** (self._doubts - 1), _MOST_SPARED)
        self._doubts = min(self._doubts + 1, _MOST_DOUBTS)
        self._go_back_to(min(rate, self._ceiling))

    def _go_back_to(self, rate: float) -> None:
        """The last refusals had nothing to do with our rate."""
        self._trials.forget()
        self._search_rate(_BELOW * rate, rate)

    def _was_for_places(self, now: float, sent_at: float) -> bool:
        if self._was_to_try_a_place(sent_at):
            return not self._more_ran(self._together.most)
        if self._more_ran(self._together.most_lately):
            return False  # and that was no obstacle
        if self._refused_with < PLACES_KEPT * self.running:
            return False  # fewer ran at another refusal, and that was no help
        # Before a limit on the rate refuses one, it has let through all that it allows but for less than one.
        rate = min(self._usable_rate, self._rate_then)  # one that climbed has let fewer through on its way
        few = self._through(now, due=1) < (_FEW if self.running > 1 else _VERY_FEW) * rate
        return few and self._was_balanced and self._ended > 0 and self.running > 0

    def _more_ran(self, together: int) -> bool:
        """Whether that many are more than run now, also if the ends of a few are not known yet."""
        return self.running < PLACES_KEPT * together - _UNKNOWN_ENDS

    @property
    def _was_balanced(self) -> bool:
        """Whether since the last refusal about as many were accepted as have ended."""
        return abs(self._taken - self._ended) <= 1 + _BALANCE * max(self._taken, self._ended)

    @property
    def _shortly(self) -> float:
        return self._spacing.usual / 4

    def _cut_places(self, now: float) -> None:
        running = float(self.running)
        level = min(running, PLACES_KEPT * running + 1)  # of few none is given up: each is a good part
        rate = self._taken / max(now - self._since, 1e-3)
        # A hint that says when the next task ends may be long, and costs nothing.
        longest = max(1.0, min(self._longest(rate), _PATIENT_SECONDS * rate))
        patience = _within(_LEAST_PLACES_PATIENCE, 2.0 * self._taken, longest)
        self._cap.begin(level, max(level, running - 1), patience, patience)

    # Whether there is a place more

    @property
    def _most_tried(self) -> float:
        """As many ran when one was refused, and that was, or may have been, for the places."""
        return self._suspected if self._cap.refused == math.inf else self._cap.refused

    @property
    def _gaps_before_one_more(self) -> float:
        return _APART if self._cap.refused < math.inf else _FAR_APART

    def _was_to_try_a_place(self, sent_at: float) -> bool:
        """Whether a request was the one that told whether there is a place more."""
        if self._cap.refused == math.inf and self._taken < ENOUGH:
            return False  # too few to know what is usual
        return self.running >= self._most_tried and self._spacing.was_apart(sent_at, self._gaps_before_one_more)

    # Measuring

    @property
    def _usable_rate(self) -> float:
        return min(self._rate.level, self._ceiling)

    def _begin_measuring(self, now: float) -> None:
        self._since = self._asked_at = now
        self._taken = self._ended = 0
        self._idle = self._paused = 0.0
        self._full = False
        self._refused_with = math.inf
        self._rate_then = self._rate.level
        self._together.begin()

    def _through(self, now: float, due: int = 0) -> float:
        """Accepted per second since the last refusal, its pause included. due: how many more are counted as well."""
        return (self._taken + due) / max(now - self._since - self._idle, 1e-3)

    def _asked(self, now: float) -> float:
        """Asked for per second since the last refusal, its pause left out."""
        return min(self._usable_rate, (self._taken + 1) / max(now - self._since - self._idle - self._paused, 1e-3))

    def _is_full(self, now: float) -> bool:
        """Whether as many run as may."""
        if self._has_place():
            return False
        self._forget_old(now + TICK)
        return not self._has_place()

    def _forget_old(self, now: float) -> None:
        """Those that nobody watches, and that must have ended by now."""
        if now >= self._believed_until:
            for task_id in [task_id for task_id, until in self._unwatched.items() if until <= now]:
                del self._unwatched[task_id]
            self._believed_until = min(self._unwatched.values(), default=math.inf)

    def _has_place(self) -> bool:
        return self._cap.level == math.inf or self.running + self.under_way < self.cap


def _within(least: float, value: float, most: float) -> float:
    return min(max(value, least), most)
