"""The bound on held messages [C39]."""

import asyncio

import pytest

from queue_runtime.clock import settle_tasks
from queue_runtime.room import Room


async def test_grants_what_is_free_up_to_what_is_wanted() -> None:
    room = Room(10)
    assert await room.take(4) == 4
    assert await room.take(100) == 6
    assert room.taken == 10


async def test_a_share_leaves_room_to_others() -> None:
    room = Room(10)
    assert await room.take(100, share=0.5) == 5
    assert await room.take(100, share=0.5) == 2
    assert await room.take(1, share=0.01) == 1, "never nothing"


async def test_takers_wait_in_turn_and_none_is_forgotten() -> None:
    room = Room(2)
    await room.take(2)
    order: list[int] = []

    async def take(number: int) -> None:
        await room.take(1)
        order.append(number)

    tasks = [asyncio.create_task(take(number)) for number in range(5)]
    await settle_tasks()
    assert order == []
    for count in range(5):
        room.give(1)
        await settle_tasks()
        assert order == list(range(count + 1))
    await asyncio.gather(*tasks)
    assert room.taken == 2


async def test_a_taker_for_a_large_batch_holds_up_nobody_and_can_be_hurried() -> None:
    room = Room(10)
    await room.take(10)
    large = asyncio.create_task(room.take(8, at_least=5))
    small = asyncio.create_task(room.take(1))
    await settle_tasks()
    room.give(3)
    await settle_tasks()
    assert small.done()
    assert not large.done()
    room.hurry()
    assert await large == 2
    assert await small == 1


@pytest.mark.parametrize("given_first", [True, False])
async def test_cancelling_a_taker_loses_no_room(given_first: bool) -> None:
    room = Room(3)
    await room.take(3)
    first = asyncio.create_task(room.take(3))
    second = asyncio.create_task(room.take(1))
    await settle_tasks()
    if given_first:
        room.give(3)  # first is granted, but cancelled before it runs
        first.cancel()
    else:
        first.cancel()
        room.give(3)
    await asyncio.gather(first, return_exceptions=True)
    assert await second == 1
    assert room.taken == 1


@pytest.mark.parametrize("then", ["give", "close"])
async def test_cancelling_a_taker_that_is_passed_over(then: str) -> None:
    """Room comes, or the end, after the cancellation and before the task has heard of it."""
    room = Room(1)
    await room.take(1)
    task = asyncio.create_task(room.take(1))
    await asyncio.sleep(0)
    task.cancel()
    room.give(1) if then == "give" else room.close()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert room.taken == (0 if then == "give" else 1)
