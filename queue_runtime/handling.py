"""What happens to one message in a consumer: the settings, the handler's signals, and who is told."""

from __future__ import annotations

import hashlib
import os
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from queue_runtime.breaker import BreakerConfig
from queue_runtime.calling import Executor
from queue_runtime.config import Seconds, choice, integer, seconds
from queue_runtime.errors import ConfigurationError, QueueRuntimeError, ValidationError
from queue_runtime.message import ReceivedMessage
from queue_runtime.middleware import Middleware
from queue_runtime.pressure import MemoryConfig
from queue_runtime.providers.base import Action, Disposition
from queue_runtime.retry import FixedRetry, RetryPolicy, checked_policy
from queue_runtime.scaling import ScalingConfig

LONGEST_TEXT = 2000
"""Characters of an exception's text in a dead letter's description; Service Bus takes 4096 in all."""
FIVE_ATTEMPTS = FixedRetry(delay=0.0, attempts=5)
_HERE = os.path.dirname(__file__)
_REMOTE_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.M)

Handler = Callable[..., object]
"""A function of a message, or of a list of messages, and of its context if it takes two: see ``Consumer``."""
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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.description)


class RetryMessage(Exception):
    """Raised by a handler: not now; the message comes back after ``delay`` seconds or a timedelta."""

    def __init__(self, delay: Seconds = 0.0) -> None:
        self.delay = seconds("delay", delay)
        super().__init__(f"again after {self.delay:g} s")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.delay,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerConfig:
    """How a consumer works. Durations are in seconds, or timedeltas.

    Parameters
    ----------
    max_concurrency:
        Handlers at once; None takes the provider configuration's.
    prefetch, prefetch_bytes:
        Messages held at most, waiting and in handlers, and their bytes; None takes the provider configuration's
        number, and no limit of bytes.
    pollers:
        Receives of messages without a session at once.
    source:
        What is received: ``all``, only messages without a session (``queue``), or only ``sessions``.
    handler_form:
        What the handler takes: ``one`` message, or a ``batch``, a list of them, all of one session or of none.
    executor:
        Where a plain handler runs: in a ``thread`` (``auto`` as well), or, for one that computes, in a ``process``.
    middleware:
        Hooks around receive, handle and settle, the outermost first.
    min_batch_size, max_batch_size, target_batch_duration:
        One receive asks for as many messages, and a batch handler gets as many, as are handled in
        ``target_batch_duration``, by the mean of the last batches, within these bounds [C43].
    batch_wait:
        How long the first message waits for a batch handler's batch to fill.
    max_sessions:
        Sessions held at once.
    session_turn:
        Messages of one session before it is let go, if others wait.
    session_batch:
        Messages of one session fetched ahead; fewer where ``prefetch`` is short of that for each handler.
    session_idle:
        How long a session without messages is kept, unless others wait, so that the next ones find it here.
    session_settlement:
        ``each``: a message of a session is handled when the completion of the one before is confirmed, so that none
        ever comes back after a later one was handled. ``together``: while completions are under way, in batches, the
        next ones are handled, which is faster over a network; if one of them fails, its message comes back late.
    receive_timeout:
        The length of one wait for messages.
    drain_timeout:
        How long running handlers may go on after ``stop``.
    stall_after:
        How long nothing may move where something should, such as handlers of which none ends, before that is logged
        and a problem of the client's ``health``; set it above the longest that a handler may take. A fetch that is so
        long overdue is begun anew. None looks at nothing.
    retry:
        What follows a failure: its ``attempts`` are deliveries, and the failure of the last one sends the message to
        the dead-letter queue; its pauses are delays of the redelivery, or, where the provider has none, waits before
        the message is given back.
    on_failure:
        Decides instead of ``retry``.
    breaker:
        Pauses the fetch while handlers keep failing [C35]; None: never.
    scaling:
        Grows and shrinks the concurrency, prefetch, pollers and sessions with the load [C45]; those given here are
        the maximum of whatever has none there. None: they stay as they are.
    memory:
        Holds less before the memory is full [C39]; None: the memory is not looked at.

    Raises ConfigurationError, which names the field.
    """

    max_concurrency: int | None = None
    prefetch: int | None = None
    prefetch_bytes: int | None = None
    pollers: int = 1
    source: Literal["all", "queue", "sessions"] = "all"
    handler_form: Literal["one", "batch"] = "one"
    executor: Executor = "auto"
    middleware: Sequence[Middleware] = ()
    min_batch_size: int = 1
    max_batch_size: int = 100
    target_batch_duration: Seconds = 1.0
    batch_wait: Seconds = 0.0
    max_sessions: int = 100
    session_turn: int = 100
    session_batch: int = 10
    session_idle: Seconds = 1.0
    session_settlement: Literal["each", "together"] = "each"
    receive_timeout: Seconds = 20.0
    drain_timeout: Seconds = 30.0
    stall_after: Seconds | None = 300.0
    retry: RetryPolicy = FIVE_ATTEMPTS
    on_failure: FailurePolicy | None = None
    breaker: BreakerConfig | None = None
    scaling: ScalingConfig | None = None
    memory: MemoryConfig | None = None

    def __post_init__(self) -> None:
        for field in ("max_concurrency", "prefetch", "prefetch_bytes"):
            if getattr(self, field) is not None:
                integer(field, getattr(self, field), minimum=1)
        for field in ("pollers", "max_sessions", "session_turn", "session_batch", "min_batch_size", "max_batch_size"):
            integer(field, getattr(self, field), minimum=1)
        integer("max_batch_size", self.max_batch_size, minimum=self.min_batch_size, maximum=10_000)
        choice("source", self.source, ("all", "queue", "sessions"))
        choice("handler_form", self.handler_form, ("one", "batch"))
        choice("session_settlement", self.session_settlement, ("each", "together"))
        choice("executor", self.executor, ("auto", "thread", "process"))
        for field, minimum in (
            ("target_batch_duration", 0.001),
            ("batch_wait", 0.0),
            ("session_idle", 0.0),
            ("receive_timeout", 0.001),
            ("drain_timeout", 0.0),
        ):
            object.__setattr__(self, field, seconds(field, getattr(self, field), minimum=minimum))
        if self.stall_after is not None:
            object.__setattr__(self, "stall_after", seconds("stall_after", self.stall_after, minimum=0.001))
        if not isinstance(self.middleware, Sequence) or not all(isinstance(one, Middleware) for one in self.middleware):
            raise ConfigurationError("middleware", "must be a sequence of Middleware objects")
        object.__setattr__(self, "middleware", tuple(self.middleware))
        checked_policy("retry", self.retry)
        if self.on_failure is not None and not callable(self.on_failure):
            raise ConfigurationError("on_failure", "must be a function of the message and the exception")
        for field, kind in (("breaker", BreakerConfig), ("scaling", ScalingConfig), ("memory", MemoryConfig)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise ConfigurationError(field, f"must be a {kind.__name__} or None, not {type(value).__name__}")


class ConsumerStats(NamedTuple):
    """A consumer's counters since its start, in messages unless it says otherwise."""

    received: int = 0
    completed: int = 0
    abandoned: int = 0
    dead_lettered: int = 0
    deferred: int = 0
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
    handler_seconds: float = 0.0
    """Time in handlers that have ended, added up; a batch counts once."""
    busy_seconds: float = 0.0
    """The same, with the time up to now of those that run."""
    held_bytes: int = 0
    """The size of all messages that are held."""


class ConsumerObserver:
    """Told what a consumer does. Override what you want to know; it is called on the event loop and must not block."""

    def batch_received(self, messages: Sequence[ReceivedMessage]) -> None: ...

    def message_settled(
        self, message: ReceivedMessage, disposition: Disposition, error: QueueRuntimeError | None
    ) -> None: ...

    def handler_failed(self, message: ReceivedMessage, error: Exception) -> None: ...

    def session_opened(self, session_id: str) -> None: ...

    def session_closed(self, session_id: str) -> None: ...


def policy_of(retry: RetryPolicy) -> FailurePolicy:
    """Abandon with the policy's pauses, until the failure of its last attempt makes the message a dead letter."""

    def decide(message: ReceivedMessage, error: Exception) -> Disposition:
        pause = retry.pause(message.delivery_count)
        return poison(message, error) if pause is None else Disposition(Action.ABANDON, delay=pause)

    return decide


def poison(message: ReceivedMessage, error: Exception) -> Disposition:
    """Return what makes ``message`` a dead letter of its handler's ``error``.

    The reason is the exception's class; the description its text, the attempts, and a digest of the traceback, equal
    for failures at the same place, so that dead letters can be counted by their cause.
    """
    text = str(error)
    if len(text) > LONGEST_TEXT:
        text = text[: LONGEST_TEXT - 1] + "…"
    told = f"attempts={message.delivery_count} {_traceback_digest(error)}"
    return Disposition(Action.DEAD_LETTER, reason=type(error).__name__, description=f"{text}\n{told}" if text else told)


def _traceback_digest(error: Exception) -> str:
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frame for frame in frames if os.path.dirname(frame.filename) != _HERE] or frames
    places = [(os.path.basename(frame.filename), frame.name, str(frame.lineno)) for frame in frames]
    remote = error.__cause__  # of a handler in another process: its traceback, as text
    if type(remote).__name__ == "_RemoteTraceback":
        told = _REMOTE_FRAME.findall(str(remote))
        places = [(os.path.basename(path), name, line) for path, line, name in told if os.path.dirname(path) != _HERE]
    lines = [type(error).__qualname__, *(":".join(place) for place in places)]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    at = "" if not places else " at {0}:{2} in {1}".format(*places[-1])
    return f"traceback={digest}{at}"
