"""Messages without a session, on their way to the handler.

A feed fetches into the room that the runner has, and has each message handled and settled. Stopping it ends the
fetching and releases what no handler has begun; what runs is left to finish.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

from queue_runtime._core.batch import AdaptiveBatchSizer
from queue_runtime.clock import Timer
from queue_runtime.handling import ConsumerConfig
from queue_runtime.intake import Intake
from queue_runtime.message import ReceivedMessage
from queue_runtime.providers.base import Outcome


class Feed(Protocol):
    def start(self) -> None: ...

    async def stop(self) -> None: ...


@dataclass(slots=True)
class _Receive:
    """The messages of one receive, until the last of them is settled."""

    size: int
    started: float
    left: int


class QueueFeed:
    """Messages without a session: pollers fetch adaptive batches, workers handle them side by side."""

    def __init__(self, intake: Intake, config: ConsumerConfig, *, share: float) -> None:
        capacity = intake.runner.room.capacity
        self._intake = intake
        self._runner = intake.runner
        self._share = share
        self._timeout = float(config.receive_timeout)  # type: ignore[arg-type]  # seconds since its creation
        self._sizer = AdaptiveBatchSizer(
            min(config.min_batch_size, capacity), min(config.max_batch_size, capacity), config.target_batch_duration
        )
        self._batch_wait = float(config.batch_wait)  # type: ignore[arg-type]  # seconds since its creation
        self._batch_timer: Timer | None = None
        self._ready: deque[tuple[ReceivedMessage, _Receive]] = deque()
        self._workers = 0
        self._pollers: list[asyncio.Task[None]] = []
        self._poller_count = config.pollers
        self._is_fetching = False

    def start(self) -> None:
        self._is_fetching = True
        self.set_pollers(self._poller_count)

    async def stop(self) -> None:
        self._is_fetching = False
        if self._batch_timer is not None:
            self._batch_timer.cancel()
        await cancelled(self._pollers)
        messages = [message for message, _ in self._ready]
        self._ready.clear()
        if messages:
            try:
                await self._intake.release(messages)
            finally:
                self._runner.let_go(messages)

    def set_pollers(self, count: int) -> None:
        """Have so many receives under way; one that is cancelled loses no message."""
        self._poller_count = count
        while self._is_fetching and len(self._pollers) < count:
            self._pollers.append(self._runner.spawn(self._poll()))
        while len(self._pollers) > count:
            self._pollers.pop().cancel()

    @property
    def ready(self) -> int:
        """Messages that wait for a handler and for nothing else."""
        if self._ready and self._runner.client.clock.monotonic() < self._ready[0][1].started + self._batch_wait:
            return 0
        return len(self._ready)

    def first_ready(self, count: int) -> list[ReceivedMessage]:
        """Return so many of those that wait, oldest first."""
        return [message for message, _ in islice(self._ready, max(0, count))]

    def fetch_anew(self) -> None:
        """Give up the receives that are under way, and begin others."""
        count = self._poller_count
        self.set_pollers(0)
        self.set_pollers(count)

    def call_workers(self) -> None:
        """Have what is ready handled, by as many as may."""
        while self._ready and self._workers < self._runner.permits.capacity:
            if self._runner.is_batch and not self._is_batch_due():
                return
            self._workers += 1
            self._runner.spawn(self._work_in_batches() if self._runner.is_batch else self._work())

    async def _poll(self) -> None:
        intake, runner = self._intake, self._runner
        receive = partial(runner.client.receive_messages, runner.queue_name, timeout=self._timeout)
        while self._is_fetching:
            wanted = min(self._sizer.calculate_optimal_batch_size(), await intake.allowed())
            # With messages still waiting, a larger batch later costs less than a small one now.
            at_least = min(wanted, max(1, runner.room.capacity // 2)) if self._ready else 1
            granted = await runner.room.take(wanted, share=self._share, at_least=at_least)
            messages = await intake.fetch(granted, receive, timeout=self._timeout)
            if messages:
                came = _Receive(len(messages), runner.client.clock.monotonic(), len(messages))
                self._ready.extend((message, came) for message in messages)
                self.call_workers()

    async def _work(self) -> None:
        """Handle one after another, until nothing is ready."""
        runner = self._runner
        try:
            while self._ready and self._workers <= runner.permits.capacity:
                message, came = self._ready.popleft()
                disposition = await runner.handle(message)
                if disposition is None or (runner.client.settles_at_once and not runner.waits_here(disposition)):
                    await runner.settle(message, disposition)
                    self._count_down(came)
                else:
                    runner.settle_later(message, disposition, partial(self._count_down, came))
        finally:
            self._workers -= 1
            runner.room.hurry()

    async def _work_in_batches(self) -> None:
        """Do the same, in the batches that the handler takes."""
        runner = self._runner
        clock = runner.client.clock
        try:
            while self._ready and self._workers <= runner.permits.capacity and self._is_batch_due():
                size = min(len(self._ready), self._sizer.calculate_optimal_batch_size())
                messages = [self._ready.popleft()[0] for _ in range(size)]
                started = clock.monotonic()
                dispositions = await runner.handle_batch(messages)
                self._sizer.record(size, max(0.0, clock.monotonic() - started))
                now = []
                for message, disposition in zip(messages, dispositions, strict=True):
                    if disposition is not None and runner.waits_here(disposition):
                        runner.settle_later(message, disposition, _nothing)  # it may wait long; this goes on
                    else:
                        now.append((message, disposition))
                await runner.settle_all(now)
        finally:
            self._workers -= 1
            runner.room.hurry()

    def _is_batch_due(self) -> bool:
        """Whether what is ready makes a batch, or has waited for it long enough; else a timer will ask again."""
        if not self._batch_wait or len(self._ready) >= self._sizer.calculate_optimal_batch_size():
            return True
        clock = self._runner.client.clock
        left = self._ready[0][1].started + self._batch_wait - clock.monotonic()
        if left <= 0:
            return True
        if self._batch_timer is not None:
            self._batch_timer.cancel()
        self._batch_timer = clock.call_later(left, self.call_workers)
        return False

    def _count_down(self, came: _Receive, outcome: Outcome = None) -> None:
        came.left -= 1
        if came.left == 0:
            self._sizer.record(came.size, max(0.0, self._runner.client.clock.monotonic() - came.started))


def _nothing(outcome: Outcome) -> None: ...


async def cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel these and wait for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
