"""What a single call tells of its price and estimate, which polls leave out."""

from __future__ import annotations

from decimal import Decimal

import pytest

from evolink_async import AsyncEvoLink, Task, TaskFailedError
from evolink_async.emulator import Emulator
from evolink_async.types import with_what_creation_told


async def test_a_completed_task_still_has_the_price_and_estimate_it_was_created_with(api_key: str) -> None:
    async with (
        Emulator(speed=100, api_key=api_key).serve() as server,
        AsyncEvoLink(api_key, base_url=server.base_url) as client,
    ):
        created = await client.images.submit(model="gpt-4o-image", prompt="a lighthouse")
        assert created.usage.credits_reserved is not None
        waited = await client.tasks.wait(created)
        generated = await client.images.generate(model="gpt-4o-image", prompt="a lighthouse")
        for task in (waited, generated):
            assert task.succeeded
            assert task.usage.credits_reserved == created.usage.credits_reserved
            assert task.usage.billing_rule == created.usage.billing_rule
            assert task.estimated_time == created.estimated_time
            assert task.raw["status"] == "completed"


def test_what_a_later_answer_tells_itself_is_kept() -> None:
    created = Task(id="t", usage={"credits_reserved": 4, "user_group": "a"}, task_info={"estimated_time": 9})  # type: ignore[arg-type]
    ended = Task(id="t", status="completed", usage={"credits_used": 3, "credits_reserved": 3})  # type: ignore[arg-type]
    both = with_what_creation_told(ended, created)
    assert (both.usage.credits_reserved, both.usage.credits_used, both.usage.user_group) == (
        Decimal(3),
        Decimal(3),
        "a",
    )
    assert both.estimated_time == 9
    assert with_what_creation_told(ended, Task(id="t")) is ended


async def test_the_task_of_a_failure_has_them_too(api_key: str) -> None:
    async with (
        Emulator(speed=100, api_key=api_key, failure_share=1).serve() as server,
        AsyncEvoLink(api_key, base_url=server.base_url) as client,
    ):
        with pytest.raises(TaskFailedError) as caught:
            await client.images.generate(model="gpt-4o-image", prompt="a lighthouse")
        assert caught.value.task is not None
        assert caught.value.task.estimated_time is not None
