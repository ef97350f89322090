"""From receipts to outcomes [C41, C42]: a lane per receiver, so that a message settles where it came from.

A lane of a provider that settles in this process calls it at once. Every other lane is a slot of a
MultiProducerConcurrentConsumer: what many callers settle at the same time travels in few batches, and each caller
gets the outcome of its own message.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer
from queue_runtime.clock import Clock, Late, within
from queue_runtime.config import ProviderConfig
from queue_runtime.errors import (
    ClosedError,
    InvalidReceiptError,
    ProviderError,
    QueueRuntimeError,
    QueueTimeoutError,
)
from queue_runtime.message import Receipt
from queue_runtime.providers.base import Disposition, Outcome, Receiver
from queue_runtime.retry import pause_after

logger = logging.getLogger("queue_runtime.settlement")

SLOTS = 64
"""Lanes of one MPCC; with more receivers than that, another one is made."""

LONGEST_CALL = 30.0
"""Seconds after which a batch that has not come back from the service is given up, and tried again by the policy."""

Over = Callable[[int, Sequence[Receipt]], None]
"""Told (receiver_id, receipts) at once when there is nothing left to settle."""


class Lane(Protocol):
    """The way to settle what one receiver delivered."""

    receiver: Receiver

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt], /) -> list[Outcome]:
        """Settle all alike; return an outcome for each, in order."""
        ...

    def submit(self, disposition: Disposition, receipt: Receipt) -> asyncio.Future[Any]:
        """Settle one without waiting; ``outcome_of`` reads the future when it is done."""
        ...

    def is_settling(self, receipt: Receipt) -> bool:
        """Whether a settlement of this one is under way. Slow, for rare questions."""
        ...

    async def flush(self) -> None:
        """Wait until everything that was submitted has its outcome."""
        ...


class DirectLane:
    """Settles at once."""

    __slots__ = ("receiver", "settle")

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.settle: Callable[[Disposition, Sequence[Receipt]], Coroutine[Any, Any, list[Outcome]]] = receiver.settle

    def submit(self, disposition: Disposition, receipt: Receipt) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._settle_one(disposition, receipt))

    def is_settling(self, receipt: Receipt) -> bool:
        """Nothing is ever under way."""
        return False

    async def flush(self) -> None:
        """Nothing is ever under way."""

    async def _settle_one(self, disposition: Disposition, receipt: Receipt) -> None:
        outcome = (await self.settle(disposition, (receipt,)))[0]
        if outcome is not None:
            raise outcome


class _Item(NamedTuple):
    disposition: Disposition
    receipt: Receipt


class BatchedLane:
    """Settles through a slot of an MPCC."""

    __slots__ = ("_mpcc", "_over", "_slot", "_waiting", "receiver")

    def __init__(
        self, receiver: Receiver, mpcc: MultiProducerConcurrentConsumer[_Item], slot: int, over: Over | None
    ) -> None:
        self.receiver = receiver
        self._over = over
        self._mpcc = mpcc
        self._slot = slot
        self._waiting: dict[asyncio.Future[Any], Receipt] = {}

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        futures = [self.submit(disposition, receipt) for receipt in receipts]
        if futures:
            await asyncio.wait(futures)
        return [outcome_of(future) for future in futures]

    def submit(self, disposition: Disposition, receipt: Receipt) -> asyncio.Future[Any]:
        try:
            future = self._mpcc.submit(_Item(disposition, receipt), self._slot)
        except ClosedError as error:
            return failed(error)
        self._waiting[future] = receipt
        future.add_done_callback(self._done)
        return future

    def _done(self, future: asyncio.Future[Any]) -> None:
        receipt = self._waiting.pop(future)
        if not future.cancelled():
            error = future.exception()  # looked at: a caller that was cancelled does so no more
            if self._over is not None and not (isinstance(error, QueueRuntimeError) and error.is_transient):
                self._over(receipt.receiver_id, (receipt,))

    def is_settling(self, receipt: Receipt) -> bool:
        return receipt in self._waiting.values()

    async def flush(self) -> None:
        while self._waiting:
            await asyncio.wait(self._waiting)


class Settler:
    """Makes the lanes of one client and runs the MPCCs behind them.

    ``over`` is told of each message whose settlement in a batch came to its end, before its caller is.

    Thread-safety: for one event loop's thread only.
    """

    def __init__(self, config: ProviderConfig, *, in_process: bool, clock: Clock, over: Over | None = None) -> None:
        self._config = config
        self._clock = clock
        self._over = over
        self.is_direct = in_process and config.settlement == "auto"
        self._receivers: list[list[Receiver | None]] = []
        self._mpccs: list[MultiProducerConcurrentConsumer[_Item]] = []
        self._slots: dict[int, tuple[int, int]] = {}
        self._free: list[tuple[int, int]] = []

    def open_lane(self, receiver: Receiver) -> Lane:
        """Return the lane of a receiver that was just opened."""
        if self.is_direct:
            return DirectLane(receiver)
        if not self._free:
            self._add_mpcc()
        group, slot = self._slots[receiver.id] = self._free.pop()
        self._receivers[group][slot] = receiver
        return BatchedLane(receiver, self._mpccs[group], slot, self._over)

    async def close_lane(self, lane: Lane) -> None:
        """Wait for what is under way on the lane, then free its slot. The receiver is left open."""
        await lane.flush()
        place = self._slots.pop(lane.receiver.id, None)
        if place is not None:
            group, slot = place
            self._receivers[group][slot] = None
            self._free.append(place)

    async def close(self, timeout: float = math.inf) -> None:
        """Settle what is under way and stop; after ``timeout`` seconds, or when cancelled, give up the rest."""
        if not self._mpccs:
            return
        hurried: list[asyncio.Task[Any]] = []

        def hurry() -> None:
            logger.warning("the time to settle is over, and what is not settled yet is given up")
            hurried.extend(asyncio.ensure_future(mpcc.complete(drain=False, timeout=0)) for mpcc in self._mpccs)

        timer = None if timeout == math.inf else self._clock.call_later(timeout, hurry)
        try:
            for mpcc in self._mpccs:
                await mpcc.complete()
        except asyncio.CancelledError:
            hurry()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            await asyncio.gather(*hurried, return_exceptions=True)

    def _add_mpcc(self) -> None:
        config = self._config
        receivers: list[Receiver | None] = [None] * SLOTS
        mpcc: MultiProducerConcurrentConsumer[_Item] = MultiProducerConcurrentConsumer(
            config.settle_batch_size,
            config.settle_interval,
            config.settle_concurrency,
            SLOTS,
            retry=self._pause_before_retry,
            overflow="unbounded",  # bounded by what was received: nobody settles more than he holds
            slot_capacity=1024,
        )
        mpcc.start(self._pump, receivers)
        group = len(self._mpccs)
        self._mpccs.append(mpcc)
        self._receivers.append(receivers)
        self._free.extend((group, slot) for slot in reversed(range(SLOTS)))

    def _pause_before_retry(self, error: BaseException, attempt: int) -> float | None:
        return pause_after(self._config.retry, attempt, error)

    async def _pump(
        self, items: list[_Item], slot: int, receivers: list[Receiver | None], cancellation: object
    ) -> list[Outcome]:
        """Settle a batch of one receiver: a call for each different disposition in it."""
        receiver = receivers[slot]
        if receiver is None:
            raise ClosedError("the receiver of these messages is closed")
        outcomes: list[Outcome] = [None] * len(items)
        alike: dict[Disposition, list[int]] = {}
        for place, item in enumerate(items):
            alike.setdefault(item.disposition, []).append(place)
        for disposition, places in alike.items():
            receipts = [items[place].receipt for place in places]
            results: Sequence[Outcome]
            try:
                results = await within(self._clock, LONGEST_CALL, receiver.settle(disposition, receipts))
            except Late:
                results = [QueueTimeoutError("settling did not come back in time")] * len(places)
            except ClosedError:  # the service's doing: the lane is still open
                results = [InvalidReceiptError(receipt, "its receiver is closed") for receipt in receipts]
            except QueueRuntimeError as error:
                results = [error] * len(places)
            for place, result in zip(places, results, strict=True):
                outcomes[place] = result
        return outcomes


def failed(error: QueueRuntimeError) -> asyncio.Future[Any]:
    """Return a future that is done with this error."""
    future = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


def unexpected(bug: BaseException, provider: str) -> ProviderError:
    """Return what is no error of a settlement, such as a bug, as one, where no caller waits who could be told."""
    logger.error("settling failed unexpectedly, provider=%s", provider, exc_info=bug)
    error = ProviderError(provider, type(bug).__name__, str(bug))
    error.__cause__ = bug
    return error


def outcome_of(future: asyncio.Future[Any]) -> Outcome:
    """Return what a future of ``submit`` came to. Raises what is no error of a settlement, such as a bug."""
    error = future.exception()
    if error is not None and not isinstance(error, QueueRuntimeError):
        raise error
    return error
