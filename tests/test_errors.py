"""The errors: the tree as drawn, what is transient and for how long, pickles, no secrets [section 6, C32]."""

import copy
import pickle
import re
from datetime import UTC, datetime
from typing import Any

import pytest

from queue_runtime import errors
from queue_runtime.errors import (
    BatchError,
    BatchSendError,
    BatchSettleError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidReceiptError,
    MessageTooLargeError,
    ProviderError,
    QueueFullError,
    QueueRuntimeError,
    QueueTimeoutError,
    SessionLockedError,
    SlotOutOfRangeError,
    ThrottledError,
    ValidationError,
)
from queue_runtime.message import Receipt

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, QueueRuntimeError)
}
SOON = datetime(2030, 1, 1, tzinfo=UTC)
EXAMPLES: list[QueueRuntimeError] = [
    QueueRuntimeError("anything"),
    errors.SessionLockedError("s", SOON),
    errors.QueueTimeoutError("no answer within 3 s"),
    errors.ConnectionFailedError("refused"),
    errors.ThrottledError(),
    errors.ServiceUnavailableError("503"),
    errors.QueueNotFoundError("orders"),
    errors.SessionNotFoundError("s"),
    errors.SessionLockLostError("s"),
    errors.InvalidReceiptError(Receipt("orders", "a-secret-token", 7)),
    errors.AuthenticationFailedError("401"),
    errors.PermissionDeniedError("403"),
    errors.ProviderError("sqs", "Odd", "what it said", True),
    errors.ValidationError("field", "must be more"),
    errors.SlotOutOfRangeError(9, 4),
    errors.ConfigurationError("field", "must be more"),
    errors.SerializationError("truncated"),
    errors.MessageTooLargeError(11, 10),
    errors.BatchTooLargeError(11, 10),
    errors.QueueFullError("queue 'orders'", 10),
    errors.CircuitOpenError("open"),
    errors.CapabilityError("sqs", "peek"),
    errors.AlreadyStartedError("started"),
    errors.ClosedError("closed"),
    errors.BatchSendError(["id", ThrottledError()]),
    errors.BatchSettleError([None, errors.SessionLockLostError("s")]),
    errors.BatchError({1: ValueError("bad")}),
]
# Section 6: transient, and the pause in seconds before another attempt.
TRANSIENT: dict[str, float | None] = {
    "SessionLockedError": 5.0,
    "QueueTimeoutError": 1.0,
    "ConnectionFailedError": 5.0,
    "ThrottledError": 2.0,
    "ServiceUnavailableError": None,
}


def state(error: BaseException) -> Any:
    """What makes two errors alike: errors compare by identity, and a receipt's token is not pickled."""
    if isinstance(error, QueueRuntimeError):
        return type(error), str(error), state_of_values(error.args), state_of_values(vars(error))
    return type(error), error.args


def state_of_values(value: Any) -> Any:
    if isinstance(value, BaseException):
        return state(value)
    if isinstance(value, dict):
        return {key: state_of_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [state_of_values(item) for item in value]
    if isinstance(value, Receipt):
        return repr(value)
    return value


def drawn_tree() -> dict[str, str]:
    """From each class in the docstring's drawing to the class that it is drawn under."""
    parents: dict[str, str] = {}
    branch: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)(\w+)(.*)", line)
        if found is None or not ("─" in found[1] or found[2] == "QueueRuntimeError"):
            continue
        depth = len(found[1])
        while branch and branch[-1][0] >= depth:
            branch.pop()
        if found[2] in CLASSES:
            if branch:
                parents[found[2]] = branch[-1][1]
            branch.append((depth, found[2]))
    return parents


def test_the_tree_is_as_drawn() -> None:
    """Headings are no classes: what is drawn under one hangs on the class above it."""
    real = {
        name: next(base.__name__ for base in cls.__mro__[1:] if issubclass(base, QueueRuntimeError))
        for name, cls in CLASSES.items()
        if cls is not QueueRuntimeError
    }
    assert drawn_tree() == real
    assert len(real) > 20


def test_every_class_has_an_example() -> None:
    assert {type(example).__name__ for example in EXAMPLES} == set(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_is_documented(name: str) -> None:
    assert CLASSES[name].__doc__


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_transience(error: QueueRuntimeError) -> None:
    """Exactly the table of section 6. Where the class leaves it open, the instance says."""
    name = type(error).__name__
    if name == "ProviderError":
        assert (error.is_transient, error.retry_after) == (True, None)
        assert not ProviderError("sqs", "Odd", "what it said").is_transient
        return
    if name == "BatchSendError":
        assert error.is_transient, "its only failure is"
        return
    assert error.is_transient == (name in TRANSIENT)
    assert error.retry_after == TRANSIENT.get(name)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickle(error: QueueRuntimeError, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert state(again) == state(error)
    assert (again.is_transient, again.retry_after) == (error.is_transient, error.retry_after)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_copy(error: QueueRuntimeError) -> None:
    assert state(copy.copy(error)) == state(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_no_secret_is_told(error: QueueRuntimeError) -> None:
    """[C32]"""
    assert "a-secret-token" not in f"{error} {error!r}"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (QueueTimeoutError("x"), TimeoutError),
        (ConnectionFailedError("x"), ConnectionError),
        (ValidationError("f", "p"), ValueError),
        (SlotOutOfRangeError(1, 1), IndexError),
        (ConfigurationError("f", "p"), ValueError),
        (errors.SerializationError("x"), ValueError),
        (errors.AlreadyStartedError("x"), RuntimeError),
        (errors.ClosedError("x"), RuntimeError),
    ],
)
def test_builtin_bases(error: QueueRuntimeError, builtin: type[Exception]) -> None:
    """Who expects Python's own error catches ours."""
    assert isinstance(error, builtin)


def test_what_each_tells() -> None:
    """The text names the field, the limit and the thing."""
    assert "session 's' is held by another receiver until 2030-01-01" in str(SessionLockedError("s", SOON))
    assert str(SessionLockedError("s")) == "session 's' is held by another receiver"
    assert str(ValidationError("limit", "must be at least 1")) == "limit: must be at least 1"
    assert str(SlotOutOfRangeError(-1, 4)) == "slot_number: -1 is outside 0..3"
    assert (MessageTooLargeError(11, 10).size, MessageTooLargeError(11, 10).max_size) == (11, 10)
    assert all(part in str(MessageTooLargeError(11, 10)) for part in ("11", "10"))
    assert QueueFullError("slot 3", 64).capacity == 64
    assert "capabilities.peek is false" in str(errors.CapabilityError("sqs", "peek"))
    assert ThrottledError(retry_after=9.0).retry_after == 9.0
    receipt = Receipt("orders", 1, 7)
    assert InvalidReceiptError(receipt).receipt == receipt
    assert "orders" in str(InvalidReceiptError(receipt))


def test_batches_are_transient_when_all_their_failures_are() -> None:
    lost = errors.SessionLockLostError("s")
    assert BatchSettleError([None, ThrottledError()]).is_transient
    assert not BatchSettleError([lost, ThrottledError()]).is_transient
    assert not BatchSendError(["id", lost, ThrottledError()]).is_transient
    assert BatchSendError(["id", lost]).outcomes == ("id", lost)
    assert "1 of 2 messages were not sent" in str(BatchSendError(["id", lost]))
    assert BatchError({0: lost}).failures == {0: lost}
