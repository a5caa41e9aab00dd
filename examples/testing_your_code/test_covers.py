"""What becomes of the covers when all goes well, and when the service, the network or the account do not."""

import pytest
from covers import PLACEHOLDER, Cover, Product, fetch_cover, make_covers

LAMP, CHAIR, TABLE = Product("L-1", "a brass lamp"), Product("C-1", "an oak chair"), Product("T-1", "a round table")


async def test_every_product_gets_a_cover(evolink_emulator, tmp_path):
    covers = await make_covers([LAMP, CHAIR], tmp_path)
    assert list(covers) == ["L-1", "C-1"]
    assert all(cover.path.read_bytes().startswith(b"\x89PNG") for cover in covers.values())
    assert evolink_emulator.book()["account"]["spent"] == 5


@pytest.mark.evolink_faults({"method": "POST", "nth": 1, "drop": "after"})
async def test_a_cover_whose_response_is_lost_is_paid_once(evolink_emulator, tmp_path):
    covers = await make_covers([LAMP], tmp_path)
    assert covers["L-1"].problem is None
    book = evolink_emulator.book()
    assert (len(book["posts"]), book["replays"], book["account"]["spent"]) == (1, 1, 2.5)


@pytest.mark.evolink_emulator(rate=1)
async def test_when_the_service_is_busy_the_covers_only_take_longer(evolink_emulator, tmp_path):
    covers = await make_covers([LAMP, CHAIR, TABLE], tmp_path)
    assert not any(cover.problem for cover in covers.values())
    assert evolink_emulator.book()["refused"]["429"]["rate_limit_exceeded"] >= 1


@pytest.mark.evolink_emulator(failure_share=1)
async def test_a_generation_that_fails_leaves_the_placeholder_and_costs_nothing(evolink_emulator, tmp_path):
    assert await make_covers([LAMP], tmp_path) == {"L-1": Cover(PLACEHOLDER, "failed")}
    assert evolink_emulator.book()["account"]["spent"] == 0


@pytest.mark.evolink_emulator(credits=2.5)
async def test_an_empty_account_leaves_placeholders_for_the_rest(tmp_path, caplog):
    covers = await make_covers([LAMP, CHAIR, TABLE], tmp_path)
    assert sorted(cover.path == PLACEHOLDER for cover in covers.values()) == [False, True, True]
    assert "insufficient_quota" in caplog.text


async def test_a_cover_is_fetched_later_and_is_gone_after_a_day(evolink_client, evolink_emulator, tmp_path):
    task = await evolink_client.images.submit(model="gpt-4o-image", prompt=LAMP.name)
    assert (await fetch_cover(task.id, tmp_path / "today")).problem is None
    evolink_emulator.advance(24 * 3600)
    assert (await fetch_cover(task.id, tmp_path / "tomorrow")).path == PLACEHOLDER
