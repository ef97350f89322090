"""The embedded provider with a ``path``: the same queues, and a journal of them in a directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

from queue_runtime._core.engine import Engine
from queue_runtime.clock import Clock
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import ClosedError, ProviderError, QueueFullError
from queue_runtime.message import Message, QueueName, Receipt
from queue_runtime.providers.base import Disposition, Outcome
from queue_runtime.providers.memory import (
    InMemoryProvider,
    InMemoryReceiver,
    InMemorySessionReceiver,
    _Broker,
    _Queue,
    _shared,
)
from queue_runtime.providers.store import Store


def open_memory(config: InMemoryConfig, *, clock: Clock) -> InMemoryProvider:
    """Return the provider of this configuration: one that keeps what it has in files, where there is a path."""
    return InMemoryProvider(config, clock=clock) if config.path is None else DurableProvider(config, clock=clock)


class _DurableBroker(_Broker):
    def __init__(self, config: InMemoryConfig, clock: Clock) -> None:
        super().__init__(config, clock)
        assert config.path is not None
        path, interval = os.fspath(config.path), cast(float, config.fsync_interval)
        self.store = Store(path, config.fsync, interval, clock, self._recovered, self.spill)

    def _recovered(self, name: str) -> Engine:
        queue = self.queues[str(QueueName(name))] = _Queue(name, self.config, self.clock)
        return queue.engine

    def create(self, queue_name: str) -> _Queue:
        name = str(QueueName(queue_name))
        queue = self.queues.get(name)
        if queue is None:
            queue = _Queue(name, self.config, self.clock)
            self.store.add(queue.engine)
            self.queues[name] = queue
        return queue


class DurableProvider(InMemoryProvider):
    """Queues in this process's memory, with a journal in the directory ``config.path``.

    As ``InMemoryProvider``, and: what is acknowledged is in the journal. Raises ConfigurationError, which names
    ``path``, when the directory cannot be used, is in use, or what is in it cannot be read. Operations whose change
    cannot be written raise, or have as their outcome, a ProviderError with code ``no-room`` (transient: the disk is
    full) or ``journal-failed``, and change nothing; a sync that failed leaves open whether the change will last.

    Reading what is there happens when it is made, about a second for a million messages.

    Thread-safety: for one event loop's thread only; there, any number of tasks may use it at once.
    """

    _broker_type = _DurableBroker

    def __init__(self, config: InMemoryConfig, *, clock: Clock) -> None:
        try:
            super().__init__(config, clock=clock)
        except BaseException:
            broker = cast(_DurableBroker | None, getattr(self, "_broker", None))
            if broker is not None:  # one of the queues could not be written
                broker.users -= 1
                if not broker.users:
                    _shared.pop(config.name, None)
                    broker.store.abandon("it could not be opened")
            raise
        self._store = cast(_DurableBroker, self._broker).store
        self._store.users += 1

    async def send(self, queue_name: str, messages: Sequence[Message]) -> list[Outcome]:
        """See ``InMemoryProvider``. Where the journal cannot be written, the rest gets its error each."""
        queue = self._queue(queue_name)
        engine, clock, store = queue.engine, self._clock, self._store
        engine.check(messages)
        messages = tuple(messages)
        spill = self._broker.spill
        if spill is not None and spill.concerns(messages):
            messages = await spill.moved(messages)
            queue = self._queue(queue_name)  # raises when the provider was closed meanwhile
        count = len(messages)
        taken, again = 0, False
        error: Outcome = None
        while True:
            if again or not (queue.senders.waiting or queue.senders.woken):  # nobody passes those who wait for room
                try:
                    taken = engine.send(messages, taken, clock.monotonic(), clock.time())
                    if taken < count and engine.room:
                        taken = engine.send(messages, taken, clock.monotonic(), clock.time())
                except ProviderError as raised:
                    error = raised
                if queue.waiters:
                    queue.look()
            if taken == count or error is not None or self._config.on_full != "wait":
                break
            store.changed()
            await queue.wait(queue.senders, self._waits, float("inf"), again=again)
            again = True
            if self._closed:
                queue.look()
                error = ClosedError("the provider is closed")
                break
        store.changed()
        unkept = await store.kept() if store.waits and taken else None
        return [
            unkept if i < taken else error or QueueFullError(f"queue {engine.name!r}", engine.capacity)
            for i in range(count)
        ]

    async def create_queue(self, queue_name: str) -> None:
        await super().create_queue(queue_name)
        self._store.changed()
        if self._store.waits and (error := await self._store.kept()) is not None:
            raise error

    async def close(self) -> None:
        if not self._closed:
            await super().close()
            await self._store.leave()
        else:
            await super().close()


class DurableReceiver(InMemoryReceiver):
    """A link to a queue's messages without a session, or to its dead letters.

    Thread-safety: for one event loop's thread only; there, any number of tasks may use it at once.
    """

    __slots__ = ()

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        return await _settle(self, await super().settle(disposition, receipts))


class DurableSessionReceiver(InMemorySessionReceiver):
    """A link to one session, which it holds.

    Thread-safety: for one event loop's thread only; there, any number of tasks may use it at once.
    """

    __slots__ = ()

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        return await _settle(self, await super().settle(disposition, receipts))

    async def set_state(self, state: bytes | None) -> None:
        await super().set_state(state)
        store = cast(_DurableBroker, self._broker).store
        store.changed()
        if store.waits and (error := await store.kept()) is not None:
            raise error


async def _settle(receiver: InMemoryReceiver, outcomes: list[Outcome]) -> list[Outcome]:
    """After a settlement: wait until it is kept, where that was asked for."""
    store = cast(_DurableBroker, receiver._broker).store
    store.changed()
    if store.waits and None in outcomes and (error := await store.kept()) is not None:
        return [error if outcome is None else outcome for outcome in outcomes]
    return outcomes


DurableProvider._receiver_type = DurableReceiver
DurableProvider._session_receiver_type = DurableSessionReceiver
