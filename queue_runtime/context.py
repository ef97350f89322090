"""What a handler may be given beside its messages: which attempt it is, the right to decide, and the lock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence, Set as AbstractSet
from datetime import datetime

from queue_runtime.client import QueueClient
from queue_runtime.config import Seconds, wait_seconds
from queue_runtime.errors import ValidationError
from queue_runtime.message import Receipt, ReceivedMessage
from queue_runtime.providers.base import COMPLETE, DEFER, Action, Disposition
from queue_runtime.sessions import Session


class MessageContext:
    """One delivery of one message, for its handler: ``async def handle(message, context)``.

    A decision is settled when the handler has returned; without one the message is completed. The last decision
    counts. A handler that raises leaves it to the failure policy, unless it had decided before.

    Thread-safety: decisions and flags may be made and read in the handler's own thread; ``renew`` and the session
    belong to the event loop, ``renew_from_thread`` to every other thread.
    """

    __slots__ = ("_client", "_is_lost", "_loop", "_lost", "decision", "message", "session")

    def __init__(
        self, client: QueueClient, message: ReceivedMessage, lost: AbstractSet[Receipt], session: Session | None = None
    ) -> None:
        self._client = client
        self._lost = lost
        self._is_lost = False
        self._loop = asyncio.get_running_loop()
        self.message = message
        self.session = session
        """The session that the message is of, with its state; None for a message without one."""
        self.decision: Disposition | None = None
        """What was decided so far; None while nothing was."""

    def __repr__(self) -> str:
        decided = "undecided" if self.decision is None else self.decision.action.value
        return f"<MessageContext of {self.message.message_id!r}, attempt {self.attempt}, {decided}>"

    @property
    def attempt(self) -> int:
        """Which delivery of the message this is; the first is 1."""
        return self.message.delivery_count

    @property
    def is_lock_lost(self) -> bool:
        """Whether the lock is lost: what the handler still does, another may be doing as well."""
        return self._is_lost or self.message.receipt in self._lost

    @property
    def messages(self) -> Sequence[ReceivedMessage]:
        """The message, unless it is decided on: as for a batch."""
        return () if self.decision is not None else (self.message,)

    def of(self, message: ReceivedMessage) -> MessageContext:
        """Return this context; as for a batch. Raises ValidationError for another message."""
        if message.receipt != self.message.receipt:
            raise ValidationError("message", "is not the one of this context")
        return self

    def complete(self) -> None:
        """Decide that the message is done, also if the handler raises later."""
        self.decision = COMPLETE

    def abandon(self, delay: Seconds = 0.0) -> None:
        """Decide that it comes back, after ``delay`` seconds or a timedelta."""
        self.decision = Disposition(Action.ABANDON, delay=wait_seconds("delay", delay))

    def dead_letter(self, reason: str, description: str | None = None) -> None:
        """Decide that it goes to the dead-letter queue. Raises ValidationError without a reason."""
        self.decision = Disposition.dead_letter(reason, description)

    def defer(self) -> None:
        """Decide that it is set aside, to be received by its sequence number. Raises CapabilityError."""
        self._client.require("defer")
        self.decision = DEFER

    def lose(self) -> None:
        """For the consumer: the message is held no more, while its handler may run on in a thread."""
        self._is_lost = True

    async def renew(self) -> datetime:
        """Extend the lock now; return its new end. Raises InvalidReceiptError when it is lost.

        It is renewed by itself, up to the configuration's ``max_lock_renewal``; this is for a handler that wants to
        know that it holds the message before it does what cannot be undone.
        """
        return await self._client.renew_lock(self.message)

    def renew_from_thread(self) -> datetime:
        """Do the same from a plain handler's thread, and wait for it."""
        return asyncio.run_coroutine_threadsafe(self.renew(), self._loop).result()


class BatchContext:
    """The contexts of a batch, in the order of its messages: ``async def handle(messages, context)``.

    What the handler decided for single messages holds, also when it raises; all others share its fate.

    Thread-safety: as MessageContext.
    """

    __slots__ = ("_contexts",)

    def __init__(self, contexts: Sequence[MessageContext]) -> None:
        self._contexts = {context.message.receipt: context for context in contexts}

    def __repr__(self) -> str:
        return f"<BatchContext of {len(self._contexts)} messages, {len(self.messages)} undecided>"

    def __len__(self) -> int:
        return len(self._contexts)

    def __iter__(self) -> Iterator[MessageContext]:
        return iter(self._contexts.values())

    @property
    def messages(self) -> Sequence[ReceivedMessage]:
        """Those that are not decided on yet."""
        return [context.message for context in self if context.decision is None]

    def of(self, message: ReceivedMessage) -> MessageContext:
        """Return the context of one message. Raises ValidationError when it is not of this batch."""
        try:
            return self._contexts[message.receipt]
        except (KeyError, AttributeError):
            raise ValidationError("message", "is not of this batch") from None


HandlerContext = MessageContext | BatchContext
