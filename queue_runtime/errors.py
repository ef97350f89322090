"""Every error that queue_runtime raises, in one tree.

::

    QueueRuntimeError
    ├── transient: trying again may help
    │   ├── SessionLockedError          another receiver holds the session
    │   ├── QueueTimeoutError           no answer in time
    │   ├── ConnectionFailedError       the service cannot be reached
    │   ├── ThrottledError              the service asked for a slower pace
    │   └── ServiceUnavailableError     the service is there, but cannot serve
    ├── not found, not held
    │   ├── QueueNotFoundError
    │   ├── SessionNotFoundError
    │   ├── SessionLockLostError
    │   └── InvalidReceiptError         settled before, or its lock ran out
    ├── refused by the service
    │   ├── AuthenticationFailedError
    │   ├── PermissionDeniedError
    │   └── ProviderError               whatever else a provider says
    ├── refused before anything was sent
    │   ├── ValidationError             a bad argument; names the field
    │   │   └── SlotOutOfRangeError
    │   ├── ConfigurationError          a bad setting; names the field
    │   ├── SerializationError          bytes that are not an envelope
    │   ├── MessageTooLargeError
    │   ├── BatchTooLargeError
    │   ├── QueueFullError
    │   ├── CircuitOpenError
    │   ├── CapabilityError             the provider cannot do this
    │   ├── AlreadyStartedError
    │   └── ClosedError                 used after close
    └── many messages, an outcome for each
        ├── BatchSendError
        ├── BatchSettleError
        └── BatchError                  raised *by* a pump, by item index

``is_transient`` says whether another attempt may succeed; ``retry_after`` is the pause in seconds that
makes sense before it, or None. Errors of an SDK are kept as ``__cause__``. Every error can be pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any


def shown(value: object) -> str:
    """How an error's text shows a bad value: its ``repr``, but for an int that Python might refuse to print."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def _restore(cls: type[QueueRuntimeError], args: tuple[Any, ...], state: dict[str, Any]) -> QueueRuntimeError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class QueueRuntimeError(Exception):
    """The root: ``except QueueRuntimeError`` catches all that this library raises on purpose."""

    is_transient: bool = False
    retry_after: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls cls(*args), which fails where __init__ takes other arguments.
        return _restore, (type(self), self.args, self.__dict__)


# Transient.


class SessionLockedError(QueueRuntimeError):
    """Another receiver holds the session until ``locked_until`` (None where the provider does not tell)."""

    is_transient = True
    retry_after = 5.0

    def __init__(self, session_id: str, locked_until: datetime | None = None) -> None:
        until = f" until {locked_until.isoformat()}" if locked_until else ""
        super().__init__(f"session {session_id!r} is held by another receiver{until}")
        self.session_id = session_id
        self.locked_until = locked_until


class QueueTimeoutError(QueueRuntimeError, TimeoutError):
    """The operation got no answer within its timeout; it may or may not have taken effect."""

    is_transient = True
    retry_after = 1.0


class ConnectionFailedError(QueueRuntimeError, ConnectionError):
    """The service cannot be reached, or the connection broke."""

    is_transient = True
    retry_after = 5.0


class ThrottledError(QueueRuntimeError):
    """The service asked for a slower pace; ``retry_after`` is what it said, else 2 s."""

    is_transient = True

    def __init__(self, message: str = "the service asked for a slower pace", retry_after: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServiceUnavailableError(QueueRuntimeError):
    """The service answered that it cannot serve at the moment."""

    is_transient = True


# Not found, not held.


class QueueNotFoundError(QueueRuntimeError):
    """There is no queue of this name."""

    def __init__(self, queue_name: str) -> None:
        super().__init__(f"queue {queue_name!r} does not exist")
        self.queue_name = queue_name


class SessionNotFoundError(QueueRuntimeError):
    """There is no session of this id."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id!r} does not exist")
        self.session_id = session_id


class SessionLockLostError(QueueRuntimeError):
    """The session is no longer held: its lock ran out, was taken over, or it was closed."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"the lock of session {session_id!r} is lost; accept the session again")
        self.session_id = session_id


class InvalidReceiptError(QueueRuntimeError):
    """The receipt gives no right to settle: it was used before, or its lock ran out."""

    def __init__(self, receipt: object, why: str = "it was settled before, or its lock ran out") -> None:
        super().__init__(f"{receipt!s} is not valid: {why}")
        self.receipt = receipt


# Refused by the service.


class AuthenticationFailedError(QueueRuntimeError):
    """The service does not accept the credentials."""


class PermissionDeniedError(QueueRuntimeError):
    """The credentials are accepted, but do not allow this."""


class ProviderError(QueueRuntimeError):
    """An error of a provider that fits no other class."""

    def __init__(self, provider: str, code: str, message: str, is_transient: bool = False) -> None:
        super().__init__(f"{provider}: {code}: {message}")
        self.provider = provider
        self.code = code
        self.is_transient = is_transient


# Refused before anything was sent.


class ValidationError(QueueRuntimeError, ValueError):
    """A bad argument. ``field`` names it; the text names the limit."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class SlotOutOfRangeError(ValidationError, IndexError):
    """A slot number outside 0..N-1."""

    def __init__(self, slot_number: int, number_of_slots: int) -> None:
        super().__init__("slot_number", f"{shown(slot_number)} is outside 0..{number_of_slots - 1}")
        self.slot_number = slot_number
        self.number_of_slots = number_of_slots


class ConfigurationError(QueueRuntimeError, ValueError):
    """A bad setting. ``field`` names it; the text names the limit and what to do."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class SerializationError(QueueRuntimeError, ValueError):
    """Bytes that are not a valid envelope, or a value that cannot be put into one."""


class MessageTooLargeError(QueueRuntimeError):
    """A message of ``size`` bytes, where the provider takes ``max_size``. Nothing was sent."""

    def __init__(self, size: int, max_size: int) -> None:
        super().__init__(f"the message has {size} bytes; the limit is {max_size}")
        self.size = size
        self.max_size = max_size


class BatchTooLargeError(QueueRuntimeError):
    """A batch of ``size`` that may not be split, where the provider takes ``max_size``. Nothing was sent."""

    def __init__(self, size: int, max_size: int) -> None:
        super().__init__(f"the batch has {size}; the limit is {max_size}")
        self.size = size
        self.max_size = max_size


class QueueFullError(QueueRuntimeError):
    """A bounded queue or slot has no room; ``capacity`` is its bound in items."""

    def __init__(self, what: str, capacity: int) -> None:
        super().__init__(f"{what} is full: it holds its capacity of {capacity}")
        self.capacity = capacity


class CircuitOpenError(QueueRuntimeError):
    """The circuit breaker is open: the call was not made."""


class CapabilityError(QueueRuntimeError):
    """The provider cannot do this; ``capability`` is the field of its ``Capabilities`` that says so."""

    def __init__(self, provider: str, capability: str) -> None:
        super().__init__(f"the {provider} provider cannot do this: capabilities.{capability} is false")
        self.provider = provider
        self.capability = capability


class AlreadyStartedError(QueueRuntimeError, RuntimeError):
    """A second start without a stop in between."""


class ClosedError(QueueRuntimeError, RuntimeError):
    """Used after it was closed or completed."""


# Many messages, an outcome for each.


class BatchSendError(QueueRuntimeError):
    """Some messages of a send were not accepted.

    ``outcomes`` holds, in input order, the message id where the message was accepted and the error where it
    was not. It is transient when every error in it is: then the failed ones alone may be sent again.
    """

    def __init__(self, outcomes: Sequence[str | QueueRuntimeError]) -> None:
        self.outcomes = tuple(outcomes)
        failed = [outcome for outcome in self.outcomes if isinstance(outcome, QueueRuntimeError)]
        super().__init__(f"{len(failed)} of {len(self.outcomes)} messages were not sent; the first: {failed[0]}")
        self.is_transient = all(error.is_transient for error in failed)


class BatchSettleError(QueueRuntimeError):
    """Some messages of a settlement were not settled.

    ``outcomes`` holds, in input order, None where the message was settled and the error where it was not.
    """

    def __init__(self, outcomes: Sequence[QueueRuntimeError | None]) -> None:
        self.outcomes = tuple(outcomes)
        failed = [outcome for outcome in self.outcomes if outcome is not None]
        super().__init__(f"{len(failed)} of {len(self.outcomes)} messages were not settled; the first: {failed[0]}")
        self.is_transient = all(error.is_transient for error in failed)


class BatchError(QueueRuntimeError):
    """Raised by a pump to fail some items of its batch: ``failures`` maps an index in the batch to its error.

    The items that it does not name succeeded.
    """

    def __init__(self, failures: Mapping[int, BaseException]) -> None:
        super().__init__(f"{len(failures)} items of the batch failed")
        self.failures = dict(failures)
