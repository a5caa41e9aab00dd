"""Keys that a ledger in PostgreSQL cannot keep, in a pool."""

from __future__ import annotations

from pathlib import Path

import pytest
from loop_executor import in_loop
from pool_world import drain, image, world

from evolink_async import InvalidRequestError

pytestmark = pytest.mark.looptime


async def test_a_key_that_the_ledger_cannot_keep_is_rejected_and_all_others_go_on(
    api_key: str, ledger_url: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_loop(monkeypatch)
    requests = [image(1, key="before"), image(2, key="a\0b"), image(3, key="after")]
    async with world(api_key) as w:
        async with w.pool(requests, ledger=ledger_url) as pool:
            outcomes = {outcome.key: outcome for outcome in await drain(pool)}
        assert outcomes["before"].ok
        assert outcomes["after"].ok
        odd = outcomes["a\0b"]
        if isinstance(ledger_url, Path):
            assert odd.ok
        else:
            assert (odd.status, type(odd.error)) == ("rejected", InvalidRequestError)
            assert len(w.wire.posts) == 2
