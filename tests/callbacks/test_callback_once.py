"""Callbacks and polls that tell of the same end, again and again: one outcome, one download (F138, F142, F147)."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from callback_world import SECRET, image, path_of, status, told

from evolink_async import AsyncEvoLink, Task
from evolink_async.callbacks import CallbackReceiver
from evolink_async.emulator import Emulator, Fault


async def test_an_end_that_is_told_many_times_is_one_outcome_and_one_download(
    api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: Counter[int] = Counter()
    told_about: Counter[str] = Counter()
    receiver: CallbackReceiver
    all_told = asyncio.Event()

    def on_task(task: Task) -> None:
        told_about[task.id] += 1
        if len(told_about) == 20:
            all_told.set()

    async def post(url: str, body: bytes) -> str:
        answered = await status(receiver.asgi, path_of(url), body)
        statuses[answered] += 1
        return str(answered)

    monkeypatch.setattr("evolink_async.emulator.callbacks.post", post)
    repeated = Fault(method="CALLBACK", repeat=5)
    out_of_order = {"status": "processing", "progress": 3}
    emulator = Emulator(speed=100, seed=1, api_key=api_key, private_callbacks=True, faults=[repeated])
    async with emulator.serve() as server, AsyncEvoLink(base_url=server.base_url) as client:
        receiver = CallbackReceiver(
            client,
            public_url=f"{server.base_url}/elsewhere",
            secret=SECRET,
            on_task=on_task,
        )
        outcomes: list[Any] = []
        async with client.pool(
            [image(number, key=f"k{number}") for number in range(20)], callbacks=receiver, save_to=tmp_path
        ) as pool:
            async for outcome in pool:
                outcomes.append(outcome)
                assert outcome.task is not None
                # Once more, later than its end, and as if it still ran.
                late = told(outcome.task.id) if len(outcomes) % 2 else told(outcome.task.id, **out_of_order)
                assert await status(receiver.asgi, path_of(receiver.url_for(outcome.key)), late) == 204
        async with asyncio.timeout(60):
            await all_told.wait()
        book = emulator.book()
    assert sorted(outcome.key for outcome in outcomes) == sorted(f"k{number}" for number in range(20))
    assert all(outcome.ok and len(outcome.files) == 1 for outcome in outcomes)
    assert set(statuses) == {204}
    assert statuses[204] > 20
    assert set(told_about.values()) == {1}
    assert book["media"]["requests"] == 20
    assert len(list(tmp_path.iterdir())) == 20
