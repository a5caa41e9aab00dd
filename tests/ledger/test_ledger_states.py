"""The table of states: every legal move, and that there is no other."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from ledger_world import accept, at, end_of, facts, intend, new_task, opened, row_in, task_of
from loop_executor import in_loop

from evolink_async import LedgerError
from evolink_async.ledger import JobLedger, Row, State
from evolink_async.ledger.states import MOVES, IllegalMove, Verb, after, diagram, table

# What each verb makes of each state, by hand; "." is "it stays", "-" is "no such move".
EXPECTED_TABLE = """
                 entered  sending   unsettled replaying accepted  completed failed  cancelled lost rejected given_up
intend           sending  -         -         -         -         -         sending -         -    sending  -
replay           -        -         replaying -         -         -         -       -         -    -        -
posted_in_vain   .        entered   .         unsettled .         .         .       .         .    -        .
rejected         rejected rejected  .         unsettled .         .         .       .         .    .        .
unsettled        -        unsettled .         unsettled .         .         .       .         .    -        .
left_sending     -        unsettled -         unsettled -         -         -       -         -    -        -
accepted         accepted accepted  accepted  accepted  .         .         .       .         .    accepted accepted
lost             -        -         -         -         lost      .         .       .         .    -        -
saved            -        -         -         -         -         .         -       -         -    -        -
not_submitted    -        -         entered   -         -         -         -       -         -    -        entered
given_up         -        -         given_up  -         -         -         -       -         -    -        -
ended:completed  -        -         -         -         completed .         .       .         completed -   -
ended:failed     -        -         -         -         failed    .         .       .         failed    -   -
ended:cancelled  -        -         -         -         cancelled .         .       .         cancelled -   -
"""
STATES, *_LINES = (line.split() for line in EXPECTED_TABLE.strip().splitlines())
EXPECTED = {verb: targets for verb, *targets in _LINES}

CASES = [
    (verb, state, state if target == "." else target)
    for verb, targets in EXPECTED.items()
    for state, target in zip(STATES, targets, strict=True)
]


@pytest.mark.parametrize(("verb", "state", "target"), CASES)
def test_each_verb_leads_where_it_should_and_nowhere_else(verb: str, state: str, target: str) -> None:
    name, _, end = verb.partition(":")
    if target == "-":
        with pytest.raises(IllegalMove, match=f"{name}.*{state}"):
            after(State(state), Verb(name), State(end) if end else None)
    else:
        assert after(State(state), Verb(name), State(end) if end else None) == target


def test_a_request_is_entered_once() -> None:
    assert after(None, Verb.ENTER) is State.ENTERED
    for state in State:
        with pytest.raises(IllegalMove):
            after(state, Verb.ENTER)
    for verb in set(Verb) - {Verb.ENTER}:
        with pytest.raises(IllegalMove, match="not in the ledger"):
            after(None, verb, State.COMPLETED)


def test_the_expectation_above_is_complete() -> None:
    assert list(State) == STATES
    assert {verb.partition(":")[0] for verb in EXPECTED} | {"enter"} == set(Verb)


def test_no_move_is_in_the_table_twice_and_every_state_can_be_reached() -> None:
    moves = [(move.verb, source, move.target or source) for move in MOVES for source in move.sources]
    assert len(moves) == len(set(moves))
    assert {move.target for move in MOVES} - {None} == set(State)


def test_the_diagram_and_the_table_show_every_move_that_changes_a_state() -> None:
    drawn = {
        (source, target, verb)
        for source, target, verbs in re.findall(r"^    (\S+) --> (\w+): (.*)$", diagram(), re.M)
        for verb in verbs.split(", ")
    }
    assert drawn == {
        (source or "[*]", move.target, move.verb)
        for move in MOVES
        for source in move.sources
        if move.target is not None and move.target is not source
    }
    assert table().count("\n") == 2 + sum(move.target is not None for move in MOVES)


# The same, told to a ledger.


async def tell(job: JobLedger, row: Row, verb: str) -> Any:
    name, _, end = verb.partition(":")
    task = task_of(row) if row.task_id else new_task()
    match name:
        case "intend":
            return await intend(job, row)
        case "replay":
            return await job.replay(row)
        case "posted_in_vain":
            return await job.posted_in_vain(row, sent=True)
        case "rejected":
            return await job.rejected(row, code=None, error="no")
        case "unsettled":
            return await job.unsettled(row, code=None, error="cut again")
        case "accepted":
            return await accept(job, row, task, at=at(3))
        case "ended":
            return await job.ended(row, end_of(task, end), at=at(4))
        case "lost":
            return await job.lost(row, error="gone", at=at(4))
        case "saved":
            return await job.saved(row, ["a.png"])
        case "not_submitted":
            return await job.not_submitted(row)
        case _:
            return await job.given_up(row)


async def test_a_ledger_obeys_the_table_and_an_illegal_move_changes_nothing(
    place: Path | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_loop(monkeypatch)
    told = [case for case in CASES if case[0] != "left_sending"]
    async with opened(place) as job:
        await job.keys_are_honoured()
        for number, (verb, state, target) in enumerate(told):
            row = await row_in(job, State(state), f"k{number}")
            before = facts(row), job.reserved, job.spent
            if target == "-" and not (verb == "replay" and row.task_id is not None):
                with pytest.raises(LedgerError, match=f"'k{number}'.*{state}"):
                    await tell(job, row, verb)
                assert (facts(row), job.reserved, job.spent) == before, (verb, state)
            elif target == "-":  # it was settled while the replay waited for its turn
                assert await tell(job, row, verb) is False
                assert (facts(row), job.reserved, job.spent) == before, (verb, state)
            else:
                await tell(job, row, verb)
                assert row.state == target, (verb, state)


async def test_what_is_told_twice_counts_once(place: Path | str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    in_loop(monkeypatch)
    facts_told = [verb for verb in EXPECTED if verb not in ("intend", "replay", "left_sending")]
    numbers = itertools.count()
    async with opened(place) as job:
        await job.keys_are_honoured()
        for verb, state, target in CASES:
            if verb in facts_told and target != "-" and verb not in ("not_submitted", "given_up"):
                row = await row_in(job, State(state), f"k{next(numbers)}")
                await tell(job, row, verb)
                once = row.state, row.credits, row.attempts, row.losses, row.past, job.reserved, job.spent
                await tell(job, row, verb)
                twice = row.state, row.credits, row.attempts, row.losses, row.past, job.reserved, job.spent
                assert twice == once, (verb, state)
