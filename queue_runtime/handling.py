"""What happens to one message in a consumer: the settings, the handler's signals, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from queue_runtime.config import Seconds, integer, seconds
from queue_runtime.errors import ConfigurationError, QueueRuntimeError, ValidationError
from queue_runtime.message import ReceivedMessage
from queue_runtime.providers.base import Action, Disposition

Handler = Callable[[ReceivedMessage], object]
"""An ``async def``, or a plain function, which is run in a thread. Returning completes the message."""
FailurePolicy = Callable[[ReceivedMessage, Exception], Disposition]
"""From a message and the exception of its handler to what becomes of it."""


class RejectMessage(Exception):
    """Raised by a handler: no further attempt will help, the message goes to the dead-letter queue."""

    def __init__(self, reason: str, description: str | None = None) -> None:
        if not isinstance(reason, str) or not reason:
            raise ValidationError("reason", "must be a non-empty text")
        if description is not None and not isinstance(description, str):
            raise ValidationError("description", f"must be a text or None, not {type(description).__name__}")
        super().__init__(reason if description is None else f"{reason}: {description}")
        self.reason = reason
        self.description = description


class RetryMessage(Exception):
    """Raised by a handler: not now; the message comes back after ``delay`` seconds or a timedelta."""

    def __init__(self, delay: Seconds = 0.0) -> None:
        self.delay = seconds("delay", delay)
        super().__init__(f"again after {self.delay:g} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerConfig:
    """How a consumer works.

    Parameters
    ----------
    max_concurrency:
        Handlers at once; None takes the provider configuration's.
    prefetch:
        Messages held at most, waiting and in handlers; None takes the provider configuration's.
    max_sessions:
        Sessions held at once.
    session_turn:
        Messages of one session before it is let go, so that another gets its turn.
    min_batch_size, max_batch_size, target_batch_duration:
        One receive asks for as many messages as are handled in ``target_batch_duration`` seconds, by the mean of
        the last batches, within these bounds [C43].
    receive_timeout:
        Seconds of one wait for messages.
    drain_timeout:
        Seconds that running handlers get to finish after ``stop``.
    max_attempts:
        The failure of this delivery of a message sends it to the dead-letter queue, with the exception's class as
        the reason and its text as the description; earlier failures make it visible again at once.
    on_failure:
        Decides instead of ``max_attempts``.

    Raises ConfigurationError, which names the field.
    """

    max_concurrency: int | None = None
    prefetch: int | None = None
    max_sessions: int = 100
    session_turn: int = 100
    min_batch_size: int = 1
    max_batch_size: int = 100
    target_batch_duration: Seconds = 1.0
    receive_timeout: Seconds = 20.0
    drain_timeout: Seconds = 30.0
    max_attempts: int = 5
    on_failure: FailurePolicy | None = None

    def __post_init__(self) -> None:
        for field in ("max_concurrency", "prefetch"):
            if getattr(self, field) is not None:
                integer(field, getattr(self, field), minimum=1)
        for field in ("max_sessions", "session_turn", "min_batch_size", "max_batch_size", "max_attempts"):
            integer(field, getattr(self, field), minimum=1)
        integer("max_batch_size", self.max_batch_size, minimum=self.min_batch_size, maximum=10_000)
        for field, minimum in (("target_batch_duration", 0.001), ("receive_timeout", 0.001), ("drain_timeout", 0.0)):
            object.__setattr__(self, field, seconds(field, getattr(self, field), minimum=minimum))
        if self.on_failure is not None and not callable(self.on_failure):
            raise ConfigurationError("on_failure", "must be a function of the message and the exception")


class ConsumerStats(NamedTuple):
    """A consumer's counters since its start, in messages unless it says otherwise."""

    received: int = 0
    completed: int = 0
    abandoned: int = 0
    dead_lettered: int = 0
    failed: int = 0
    """Handlers that raised."""
    locks_lost: int = 0
    settle_errors: int = 0
    batches: int = 0
    """Receives that brought messages."""
    sessions: int = 0
    """Sessions taken so far."""
    sessions_open: int = 0
    waiting: int = 0
    """Held, and not in a handler yet or any more."""
    running: int = 0
    """In a handler now."""


class ConsumerObserver:
    """Told what a consumer does. Override what you want to know; it is called on the event loop and must not block."""

    def batch_received(self, messages: Sequence[ReceivedMessage]) -> None: ...

    def message_settled(
        self, message: ReceivedMessage, disposition: Disposition, error: QueueRuntimeError | None
    ) -> None: ...

    def handler_failed(self, message: ReceivedMessage, error: Exception) -> None: ...

    def session_opened(self, session_id: str) -> None: ...

    def session_closed(self, session_id: str) -> None: ...


def default_policy(max_attempts: int) -> FailurePolicy:
    """Abandon, until the failure of the last attempt dead-letters."""

    def decide(message: ReceivedMessage, error: Exception) -> Disposition:
        if message.delivery_count < max_attempts:
            return Disposition(Action.ABANDON)
        return Disposition(Action.DEAD_LETTER, reason=type(error).__name__, description=str(error) or None)

    return decide
