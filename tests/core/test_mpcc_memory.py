"""References: none lost, none kept, and cycles through a slot are collected."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from loops import run, turns

from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer as MPCC
from queue_runtime.errors import BatchError, ClosedError, QueueFullError

DAY = 86400


class Item:
    alive = 0

    def __init__(self) -> None:
        Item.alive += 1

    def __del__(self) -> None:
        Item.alive -= 1


@pytest.fixture(autouse=True)
def all_items_die() -> Iterator[None]:
    Item.alive = 0
    yield
    gc.collect()
    assert Item.alive == 0


@pytest.mark.parametrize("overflow", ["raise", "block", "drop_oldest", "unbounded"])
def test_a_slot_holds_one_reference(overflow: Any) -> None:
    item = object()
    before = sys.getrefcount(item)
    mpcc: MPCC[Any] = MPCC(2, DAY, 1, 1, overflow=overflow, slot_capacity=4)
    for _ in range(3):
        mpcc.push(item, 0)
    assert sys.getrefcount(item) == before + 3
    if overflow != "block":
        for _ in range(3):
            try:
                mpcc.push_many([item, item], 0)
            except QueueFullError:
                continue
        held = {"raise": 3, "drop_oldest": 4, "unbounded": 9}[overflow]
        assert sys.getrefcount(item) == before + held
    left = run(mpcc.complete())
    assert sys.getrefcount(item) == before + len(left[0])
    with pytest.raises(ClosedError):
        mpcc.push(item, 0)
    with pytest.raises(ClosedError):
        mpcc.push_many([item], 0)
    del left
    assert sys.getrefcount(item) == before
    del mpcc
    gc.collect()
    assert sys.getrefcount(item) == before


@pytest.mark.parametrize("overflow", ["raise", "unbounded", "drop_oldest"])
def test_a_full_slot_dies_with_its_items(overflow: Any) -> None:
    mpcc: MPCC[Any] = MPCC(2, DAY, 1, 2, overflow=overflow, slot_capacity=10)
    mpcc.push_many([Item() for _ in range(10)], 0)
    if overflow != "raise":
        mpcc.push_many([Item() for _ in range(25)], 0)
    assert Item.alive == (35 if overflow == "unbounded" else 10)
    del mpcc
    assert Item.alive == 0  # by reference counts alone, no collection needed


def test_nothing_is_kept_after_the_pump() -> None:
    async def main() -> None:
        async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> Any:
            if len(items) == 3:
                raise BatchError({0: KeyError(), 2: KeyError()})
            if len(items) == 2:
                raise KeyError
            return [None] * len(items)

        mpcc: MPCC[Any] = MPCC(
            5, 1, 2, 1, retry=lambda error, n: 1 if n < 3 else None, on_failure=lambda slot, items, errors: None
        )
        mpcc.start(pump)
        for count in (5, 3, 2, 1, 4):
            mpcc.push_many([Item() for _ in range(count)], 0)
            waiter = asyncio.ensure_future(mpcc.push_and_wait(Item(), 0))
            await asyncio.sleep(20)
            assert waiter.done()
            waiter.exception()
            del waiter
            gc.collect()
            assert Item.alive == 0
        await mpcc.complete()

    run(main())


@pytest.mark.parametrize("how", ["item", "list", "pump", "overflow", "subclass", "carried", "failed"])
def test_cycles_are_collected(how: str) -> None:
    class Subclass(MPCC[Any]):
        def __init__(self) -> None:
            super().__init__(2, DAY, 1, 1, overflow="unbounded", slot_capacity=2, on_failure=self.failed)

        def failed(self, *arguments: Any) -> None: ...

    async def main() -> weakref.ref[Any]:
        mpcc: MPCC[Any] = (
            Subclass()
            if how == "subclass"
            else MPCC(2, DAY, 1, 1, overflow="unbounded", slot_capacity=2, retry=lambda error, attempt: DAY)
        )
        reference = weakref.ref(mpcc)
        if how == "item":
            mpcc.push(mpcc, 0)
        elif how == "list":
            mpcc.push_many([Item(), [mpcc]], 0)
        elif how == "pump":

            async def pump(items: list[Any], slot: int, state: Any, cancellation: Any) -> None:
                mpcc.stats()

            mpcc.start(pump)
            mpcc.push(Item(), 0)
            await turns()
        elif how == "overflow":
            mpcc.push_many([Item(), Item(), Item(), mpcc], 0)
        elif how == "carried":
            task = asyncio.ensure_future(mpcc.push_and_wait([mpcc, Item()], 0))
            await turns()
            task.cancel()
            await asyncio.wait([task])
        elif how == "failed":

            async def bad(items: list[Any], slot: int, state: Any, cancellation: Any) -> None:
                raise KeyError

            mpcc.start(bad)
            mpcc.push_many([mpcc, Item()], 0)
            await turns()
            assert mpcc.stats().retried == 2
        return reference

    reference = run(main())
    gc.collect()
    assert reference() is None


def test_a_push_from_a_finalizer_of_the_cycle() -> None:
    """The collector finds the whole cycle dead, and runs code of it that pushes: no crash, before or after clearing."""
    seen: list[str] = []

    class Pusher:
        mpcc: MPCC[Any]

        def __del__(self) -> None:
            try:
                self.mpcc.push(1, 0)
                seen.append("pushed")
            except Exception as error:
                seen.append(type(error).__name__)

    pusher = Pusher()
    pusher.mpcc = MPCC(2, DAY, 1, 1)
    pusher.mpcc.push(pusher, 0)
    reference = weakref.ref(pusher.mpcc)
    del pusher
    gc.collect()
    gc.collect()
    assert seen
    assert reference() is None


def test_a_finalizer_may_push_while_items_are_dropped() -> None:
    class Again:
        def __del__(self) -> None:
            mpcc.push("from a finalizer", 0)

    mpcc: MPCC[Any] = MPCC(1, DAY, 1, 1, overflow="drop_oldest", slot_capacity=3)
    for _ in range(3):
        mpcc.push(Again(), 0)
    mpcc.push("x", 0)
    left = run(mpcc.complete())
    assert len(left[0]) == 3
    left[0].clear()


def test_the_batch_is_freed_when_its_pump_ends() -> None:
    """At once: no cycle waits for the collector."""

    async def forget(items: list[Any], slot: int, state: Any, cancellation: Any) -> None: ...

    async def main() -> None:
        mpcc: MPCC[Any] = MPCC(3, DAY, 1, 1)
        mpcc.start(forget)
        gc.disable()
        try:
            mpcc.push_many([Item() for _ in range(3)], 0)
            await turns()
            assert Item.alive == 0
        finally:
            gc.enable()
        await mpcc.complete()

    run(main())
