"""Some of the random lives of `lives.py`, and the proof that it would find a promise that is not kept."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from lives import CUT, MUTATIONS, lives, simulated
from postgres import Postgres

SEEDS, PARTS = int(os.environ.get("SIMULATION_SEEDS", "80")), 4

# The first seed from which each mutation is found soon.
FOUND_FROM = dict.fromkeys(MUTATIONS, 1)


@pytest.mark.timeout(600 + 4 * SEEDS)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_lives_keep_every_promise(part: int) -> None:
    came_upon: Counter[str] = Counter()
    with simulated():
        for seed, met, error in lives(range(1 + part, 1 + SEEDS, PARTS)):
            if error is not None:
                raise AssertionError(f"python tests/simulation/lives.py --first {seed} --seeds 1: {error}") from error
            came_upon.update(met)
    assert came_upon["replayed"]
    assert came_upon["429"]


@pytest.mark.timeout(600 + 4 * SEEDS)
def test_random_lives_keep_every_promise_on_a_server_whose_connection_is_lost(postgres: Postgres) -> None:
    came_upon: Counter[str] = Counter()
    with simulated():
        for seed, met, error in lives(range(1, 1 + SEEDS // 16), postgres):
            if error is not None:
                again = f"python tests/simulation/lives.py --ledger postgresql --first {seed} --seeds 1"
                raise AssertionError(f"{again}: {error}") from error
            came_upon.update(met)
    assert all(came_upon[cut] for cut in CUT)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_promise_is_found(mutation: str) -> None:
    with simulated(), MUTATIONS[mutation]():
        for _, _, error in lives(range(FOUND_FROM[mutation], FOUND_FROM[mutation] + 60)):
            if error is not None:
                return
    raise AssertionError("60 lives, and nobody noticed")
