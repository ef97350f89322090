"""What else one would use in place of the MPCC, each as good as we could write it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

Pump = Callable[[list[Any], int, Any, Any], Awaitable[Any]]


class PlainMPCC:
    """The MPCC in plain Python: a deque for each slot, an event, a round of gather; for one thread.

    It has no bound, no outcome for an item, and one slow slot holds up the others: less than ours in every respect.
    """

    def __init__(self, batch_size: int, push_interval: float, max_concurrency: int, number_of_slots: int) -> None:
        self._batch_size = batch_size
        self._interval = push_interval
        self._max_concurrency = max_concurrency
        self._slots: list[deque[Any]] = [deque() for _ in range(number_of_slots)]
        self._event = asyncio.Event()
        self._closing = False

    def start(self, pump: Pump, state: Any = None) -> None:
        self._pump = pump
        self._state = state
        self._task = asyncio.get_running_loop().create_task(self._run())

    def push(self, item: Any, slot_number: int) -> None:
        slot = self._slots[slot_number]
        slot.append(item)
        if len(slot) == self._batch_size:
            self._event.set()

    def push_many(self, items: Iterable[Any], slot_number: int) -> None:
        slot = self._slots[slot_number]
        slot.extend(items)
        if len(slot) >= self._batch_size:
            self._event.set()

    async def complete(self) -> None:
        self._closing = True
        self._event.set()
        await self._task

    async def _run(self) -> None:
        while True:
            timed_out = False
            try:
                async with asyncio.timeout(self._interval):
                    await self._event.wait()
            except TimeoutError:
                timed_out = True
            self._event.clear()
            everything = timed_out or self._closing
            while True:
                batches = []
                for number, slot in enumerate(self._slots):
                    for _ in range(self._max_concurrency):
                        if len(slot) < self._batch_size and not (everything and slot):
                            break
                        take = min(self._batch_size, len(slot))
                        batch = [slot.popleft() for _ in range(take)]
                        batches.append(self._pump(batch, number, self._state, None))
                if not batches:
                    break
                await asyncio.gather(*batches)
            if self._closing:
                return


class LoopQueue:
    """asyncio.Queue, and call_soon_threadsafe for every item from another thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, item: Any) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def get(self) -> Any:
        return await self._queue.get()
