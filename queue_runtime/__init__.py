"""One asynchronous API over message queues, with a compiled core.

``QueueClient`` sends, receives and settles; ``Consumer`` runs a handler over a queue. The names below are the whole
public face; everything else may change without notice.
"""

from queue_runtime._core.batch import AdaptiveBatchSizer
from queue_runtime._core.envelope import decode_envelope, encode_envelope, encode_envelope_into
from queue_runtime._core.mpcc import MultiProducerConcurrentConsumer, MultiProducerConcurrentConsumerStats
from queue_runtime.client import QueueClient, Session
from queue_runtime.clock import Clock, ManualClock, SystemClock
from queue_runtime.config import InMemoryConfig, ProviderConfig
from queue_runtime.consumer import Consumer
from queue_runtime.dlq import DeadLetters, RedriveResult
from queue_runtime.errors import (
    AlreadyStartedError,
    AuthenticationFailedError,
    BatchError,
    BatchSendError,
    BatchSettleError,
    BatchTooLargeError,
    CapabilityError,
    CircuitOpenError,
    ClosedError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidReceiptError,
    MessageTooLargeError,
    PermissionDeniedError,
    ProviderError,
    QueueFullError,
    QueueNotFoundError,
    QueueRuntimeError,
    QueueTimeoutError,
    SerializationError,
    ServiceUnavailableError,
    SessionLockedError,
    SessionLockLostError,
    SessionNotFoundError,
    SlotOutOfRangeError,
    ThrottledError,
    ValidationError,
)
from queue_runtime.handling import (
    ConsumerConfig,
    ConsumerObserver,
    ConsumerStats,
    FailurePolicy,
    Handler,
    RejectMessage,
    RetryMessage,
)
from queue_runtime.message import Message, MessageId, QueueName, Receipt, ReceivedMessage, SessionId
from queue_runtime.providers.base import Action, Capabilities, Disposition, QueueCounts
from queue_runtime.sessions import CompositeKey, FallbackKey, FieldKey, NoKey, SessionKey

MPCC = MultiProducerConcurrentConsumer

__version__ = "0.1.0"

__all__ = [
    "Action",
    "AdaptiveBatchSizer",
    "AlreadyStartedError",
    "AuthenticationFailedError",
    "BatchError",
    "BatchSendError",
    "BatchSettleError",
    "BatchTooLargeError",
    "Capabilities",
    "CapabilityError",
    "CircuitOpenError",
    "Clock",
    "ClosedError",
    "CompositeKey",
    "ConfigurationError",
    "ConnectionFailedError",
    "Consumer",
    "ConsumerConfig",
    "ConsumerObserver",
    "ConsumerStats",
    "DeadLetters",
    "Disposition",
    "FailurePolicy",
    "FallbackKey",
    "FieldKey",
    "Handler",
    "InMemoryConfig",
    "InvalidReceiptError",
    "MPCC",
    "ManualClock",
    "Message",
    "MessageId",
    "MessageTooLargeError",
    "MultiProducerConcurrentConsumer",
    "MultiProducerConcurrentConsumerStats",
    "NoKey",
    "PermissionDeniedError",
    "ProviderConfig",
    "ProviderError",
    "QueueClient",
    "QueueCounts",
    "QueueFullError",
    "QueueName",
    "QueueNotFoundError",
    "QueueRuntimeError",
    "QueueTimeoutError",
    "Receipt",
    "ReceivedMessage",
    "RedriveResult",
    "RejectMessage",
    "RetryMessage",
    "SerializationError",
    "ServiceUnavailableError",
    "Session",
    "SessionId",
    "SessionKey",
    "SessionLockLostError",
    "SessionLockedError",
    "SessionNotFoundError",
    "SlotOutOfRangeError",
    "SystemClock",
    "ThrottledError",
    "ValidationError",
    "__version__",
    "decode_envelope",
    "encode_envelope",
    "encode_envelope_into",
]
