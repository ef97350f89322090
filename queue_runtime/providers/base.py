"""What a provider is: a few methods and a close. Adapters translate; they decide nothing."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from queue_runtime.errors import QueueRuntimeError, ValidationError
from queue_runtime.message import Message, Receipt, ReceivedMessage

Outcome = QueueRuntimeError | None
"""Of one message in a batch: None where it went well, else its error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a provider can do, for tests and for code that must run on several.

    Sizes are in bytes, durations in seconds; None means that there is no limit.
    """

    sessions: bool
    session_state: bool
    peek: bool
    defer: bool
    deduplication: bool
    abandon_delay: bool
    sequence_numbers: bool
    dead_letter_on_expiration: bool
    max_message_size: int | None
    max_delay: float | None
    settles_in_process: bool = False
    """Settling is a call in this process's memory: batching it would only cost time."""
    renews_from_threads: bool = False
    """Locks can be renewed from another thread while the event loop is blocked."""
    shared_between_processes: bool = False
    """Clients of several processes that are given the same configuration reach the same queues."""


class Action(enum.Enum):
    COMPLETE = "complete"
    ABANDON = "abandon"
    DEAD_LETTER = "dead_letter"
    DEFER = "defer"


@dataclass(frozen=True, slots=True)
class Disposition:
    """How to settle: the action, and what it needs. Hashable, so that equal ones travel in one batch."""

    action: Action
    delay: float = 0.0
    """Of an abandon: seconds until the message is visible again."""
    reason: str | None = None
    description: str | None = None

    @classmethod
    def dead_letter(cls, reason: str, description: str | None = None) -> Self:
        """Return the one that moves a message to the dead-letter queue. Raises ValidationError without a reason."""
        if not isinstance(reason, str) or not reason:
            raise ValidationError("reason", "must be a non-empty text")
        if description is not None and not isinstance(description, str):
            raise ValidationError("description", f"must be a text or None, not {type(description).__name__}")
        return cls(Action.DEAD_LETTER, reason=reason, description=description)


COMPLETE = Disposition(Action.COMPLETE)
ABANDON = Disposition(Action.ABANDON)
DEFER = Disposition(Action.DEFER)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueCounts:
    """How many messages a queue holds, by state; approximate where the provider's own numbers are."""

    active: int
    """Ready to be received."""
    in_flight: int
    """Delivered and locked."""
    scheduled: int
    deferred: int
    dead_lettered: int


class Receiver(Protocol):
    """One link to a queue or its dead-letter queue. A message is settled on the receiver that it came from.

    Thread-safety: for the event loop that opened it; may be used by many of its tasks at once.
    """

    @property
    def id(self) -> int:
        """What its receipts carry as ``receiver_id``; unique in the process."""
        ...

    @property
    def queue_name(self) -> str: ...

    @property
    def lock_duration(self) -> float:
        """Seconds that a delivery stays locked, for whoever schedules its renewal; 0.0 where that does not end."""
        ...

    async def receive(self, max_count: int, timeout: float) -> list[ReceivedMessage]:
        """Return as soon as one message is there, at most ``max_count``; an empty list after ``timeout`` seconds.

        Cancelling it loses no message.
        """
        ...

    async def receive_deferred(self, sequence_numbers: Sequence[int]) -> list[ReceivedMessage]:
        """Lock and return the deferred messages of these numbers, leaving out those that are not there."""
        ...

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        """Settle all alike and return an outcome for each, in order. Raises only when no outcome is known."""
        ...

    async def renew(self, receipts: Sequence[Receipt]) -> list[float | QueueRuntimeError]:
        """Extend the locks and return for each, in order, the new end of its lock (epoch seconds) or the error."""
        ...

    def renew_from_thread(self, receipts: Sequence[Receipt]) -> Sequence[float | QueueRuntimeError]:
        """As ``renew``, called on another thread while the event loop is blocked; it may begin to turn meanwhile.

        Only where the provider ``renews_from_threads``.
        """
        ...

    async def close(self) -> None:
        """Release every message that is still locked, at once; whoever waits in ``receive`` gets a ClosedError."""
        ...


class SessionReceiver(Receiver, Protocol):
    """A receiver of one session, which it holds exclusively until it is closed or its lock runs out."""

    @property
    def session_id(self) -> str: ...

    @property
    def session_lock_duration(self) -> float:
        """Seconds that the session stays held, for whoever schedules its renewal; 0.0 where that does not end."""
        ...

    @property
    def locked_until(self) -> float:
        """The end of the session lock, in epoch seconds."""
        ...

    async def renew_session(self) -> float:
        """Extend the session lock; return its new end in epoch seconds. Raises SessionLockLostError."""
        ...

    def renew_session_from_thread(self) -> float:
        """As ``renew_session``, called on another thread. Only where the provider ``renews_from_threads``."""
        ...

    async def get_state(self) -> bytes | None: ...

    async def set_state(self, state: bytes | None) -> None: ...


class Provider(Protocol):
    """A connection to one messaging service.

    Every method maps the service's own errors onto ``queue_runtime.errors``, the original as ``__cause__``.
    """

    @property
    def name(self) -> str:
        """A short label, such as ``memory``; for metrics and errors."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    async def send(self, queue_name: str, messages: Sequence[Message]) -> list[Outcome]:
        """Send, split to the service's limits, and return an outcome for each message, in order.

        Raises QueueNotFoundError when there is no such queue and MessageTooLargeError when any is too large, both
        before anything is sent.
        """
        ...

    async def open_receiver(self, queue_name: str, *, dead_letter: bool = False) -> Receiver:
        """Open a receiver of the messages without a session, or of the queue's dead letters."""
        ...

    async def accept_session(self, queue_name: str, session_id: str | None, timeout: float) -> SessionReceiver | None:
        """Take this session, or with None the next one that has messages and no holder; None after ``timeout`` seconds.

        A session asked for by id is taken at once, even when it is empty. Raises SessionLockedError when it is held.
        """
        ...

    async def peek(
        self, queue_name: str, max_count: int, *, from_sequence_number: int = 0, dead_letter: bool = False
    ) -> list[ReceivedMessage]:
        """Show messages in order of sequence number, without locking or counting a delivery."""
        ...

    async def counts(self, queue_name: str) -> QueueCounts: ...

    async def create_queue(self, queue_name: str) -> None:
        """Create the queue; do nothing when it is there."""
        ...

    async def close(self) -> None:
        """Close every receiver and connection. Safe to call twice."""
        ...
