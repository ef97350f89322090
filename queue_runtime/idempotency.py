"""Skipping what was already done: stores of the keys of handled messages, and the middleware that asks them.

Queues deliver at least once: a message comes again when a settlement is lost, a lock runs out or a sender sends twice.
``SkipDone`` marks a message's key once its handler has returned, before the message is settled, and completes a message
whose key is marked without calling the handler.

What this gives, and what it does not:

- A delivery after the mark is skipped, as long as the store keeps the key.
- Two deliveries at the same time **in one process** are handled one after the other, so the second one is skipped.
- Between the effect of a handler and the mark there is a **window**: a crash in it repeats the effect, and so does a
  second process that got the message meanwhile because the lock ran out. Only a handler that commits the key together
  with its effect, in one transaction of its own database, has no such window.
- A handler that fails half-way is called again, and must bear that by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from queue_runtime.clock import Clock, SystemClock
from queue_runtime.config import Seconds, integer, seconds
from queue_runtime.context import HandlerContext
from queue_runtime.errors import ConfigurationError, ValidationError
from queue_runtime.message import ReceivedMessage
from queue_runtime.middleware import Middleware, Next
from queue_runtime.providers.base import Action

logger = logging.getLogger("queue_runtime.idempotency")

DAY = 86_400.0
LONGEST_KEY = 256
"""Characters of a key that is kept as it is; of a longer one, a digest is."""

KeyOf = Callable[[ReceivedMessage], str | None]


class IdempotencyStore(Protocol):
    """Remembers keys. A custom one may keep them anywhere, such as in the database that the handlers write to."""

    async def done(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys that are marked."""
        ...

    async def mark(self, keys: Sequence[str]) -> None:
        """Remember the keys. When this returns, every ``done`` that begins later knows them."""
        ...

    async def close(self) -> None:
        """Let go of files and connections. Safe to call twice."""
        ...


class MemoryIdempotencyStore:
    """Keys in this process's memory, gone with it.

    Parameters
    ----------
    capacity:
        Keys that it remembers at most; beyond, the one marked longest ago is forgotten [C39].
    window:
        Seconds for which a key is remembered after it was last marked.
    clock:
        For tests: a ``ManualClock``.

    Raises ConfigurationError, which names the field.

    Thread-safety: for one event loop's thread; there, for any number of tasks.
    """

    def __init__(self, capacity: int = 100_000, window: Seconds = DAY, clock: Clock | None = None) -> None:
        self._capacity = integer("capacity", capacity, minimum=1)
        self._window = seconds("window", window, minimum=0.001)
        self._clock: Clock = SystemClock() if clock is None else clock
        self._until: OrderedDict[str, float] = OrderedDict()
        """When each key is forgotten; the soonest is the first, as all are remembered equally long."""

    def __len__(self) -> int:
        return len(self._until)

    async def done(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys that are marked."""
        now = self._clock.monotonic()
        until = self._until
        return {key for key in keys if until.get(key, 0.0) > now}

    async def mark(self, keys: Sequence[str]) -> None:
        """Remember the keys."""
        now = self._clock.monotonic()
        kept = self._until
        for key in keys:
            kept[key] = now + self._window
            kept.move_to_end(key)
        while kept and (len(kept) > self._capacity or next(iter(kept.values())) <= now):
            kept.popitem(last=False)

    async def close(self) -> None:
        """Forget everything."""
        self._until.clear()


class SkipDone(Middleware):
    """Completes messages that were handled before, without calling the handler; see the module's text for the limits.

    Parameters
    ----------
    store:
        Where the keys are. It is the caller's to close.
    key:
        Gives a message's key; with None the message is handled in any case. By default the queue's name and the
        message's id, which a sender must then repeat when it sends the same message again.

    A store that cannot be asked fails the delivery, which comes back by the failure policy: handling it unasked could
    repeat its effect. A store that cannot mark is logged, and the message completed: its effect has happened. With
    batch handlers, the handler gets only the messages that are not done.

    Thread-safety: for one event loop's thread; may serve several consumers there.
    """

    def __init__(self, store: IdempotencyStore, key: KeyOf | None = None) -> None:
        if not (callable(getattr(store, "done", None)) and callable(getattr(store, "mark", None))):
            raise ConfigurationError("store", f"must be a store such as MemoryIdempotencyStore(), not {store!r}")
        if key is not None and not callable(key):
            raise ConfigurationError("key", f"must be a function of a message, not {key!r}")
        self._store = store
        self._key: KeyOf = queue_and_id if key is None else key
        self._running: dict[str, asyncio.Future[None]] = {}
        """The keys that are being handled, and what ends with it."""
        self.skipped = 0
        """Messages that were completed without their handler, so far."""

    async def handle(self, context: HandlerContext, call_next: Next) -> None:
        """Handle what is not done; mark what is, once the handler has returned."""
        keyed: dict[str, list[ReceivedMessage]] = {}
        for message in context.messages:
            key = self._key(message)
            if key is not None:
                keyed.setdefault(_stored(key), []).append(message)
        if not keyed:
            return await call_next()
        # Nothing is held while waiting, so two batches with the same keys cannot wait for each other.
        while busy := {self._running[key] for key in keyed if key in self._running}:
            await asyncio.wait(busy)
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running.update(dict.fromkeys(keyed, over))
        try:
            await self._handle(context, call_next, keyed)
        finally:
            for key in keyed:
                del self._running[key]
            over.set_result(None)

    async def _handle(self, context: HandlerContext, call_next: Next, keyed: dict[str, list[ReceivedMessage]]) -> None:
        known = await self._store.done(list(keyed))
        for key, messages in keyed.items():
            if key in known:
                self._skip(context, messages)
            else:
                for twin in messages[1:]:  # left out of the batch: it comes back if the first one fails
                    context.of(twin).abandon()
        if not context.messages:
            return
        try:
            await call_next()
        except Exception:
            await self._mark(context, keyed, known, undecided=False)
            raise
        await self._mark(context, keyed, known, undecided=True)

    def _skip(self, context: HandlerContext, messages: Iterable[ReceivedMessage]) -> None:
        for message in messages:
            context.of(message).complete()
            self.skipped += 1
            logger.info("done before, skipped, queue=%s message_id=%s", message.receipt.queue_name, message.message_id)

    async def _mark(
        self, context: HandlerContext, keyed: dict[str, list[ReceivedMessage]], known: set[str], *, undecided: bool
    ) -> None:
        """Mark what the handler completed: by its decision, or as ``undecided`` says by returning."""
        finished: list[str] = []
        for key, (first, *twins) in keyed.items():
            decision = context.of(first).decision
            if key not in known and (undecided if decision is None else decision.action is Action.COMPLETE):
                finished.append(key)
                self._skip(context, twins)
        if finished:
            try:
                await self._store.mark(finished)
            except Exception:
                logger.exception("cannot mark %d messages as done; they are settled all the same", len(finished))


def queue_and_id(message: ReceivedMessage) -> str:
    """Return the key by default: a message that is passed on to another queue is another one there."""
    return f"{message.receipt.queue_name}/{message.message_id}"


def _stored(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ValidationError("key", f"must be a non-empty text or None, not {key!r}")
    if len(key) <= LONGEST_KEY:
        return key
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
