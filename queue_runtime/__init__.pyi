from queue_runtime._core.batch import (
    AdaptiveBatchSizer as AdaptiveBatchSizer,
)
from queue_runtime._core.envelope import (
    decode_envelope as decode_envelope,
)
from queue_runtime._core.envelope import (
    encode_envelope as encode_envelope,
)
from queue_runtime._core.envelope import (
    encode_envelope_into as encode_envelope_into,
)
from queue_runtime._core.mpcc import (
    MPCC as MPCC,
)
from queue_runtime._core.mpcc import (
    MultiProducerConcurrentConsumer as MultiProducerConcurrentConsumer,
)
from queue_runtime._core.outcome import MPCCStats as MPCCStats
from queue_runtime.client import (
    QueueClient as QueueClient,
)
from queue_runtime.client import (
    Session as Session,
)
from queue_runtime.clock import (
    Clock as Clock,
)
from queue_runtime.clock import (
    ManualClock as ManualClock,
)
from queue_runtime.clock import (
    SystemClock as SystemClock,
)
from queue_runtime.config import (
    InMemoryConfig as InMemoryConfig,
)
from queue_runtime.config import (
    ProviderConfig as ProviderConfig,
)
from queue_runtime.consumer import (
    Consumer as Consumer,
)
from queue_runtime.dlq import (
    DeadLetters as DeadLetters,
)
from queue_runtime.dlq import (
    RedriveResult as RedriveResult,
)
from queue_runtime.errors import (
    AlreadyStartedError as AlreadyStartedError,
)
from queue_runtime.errors import (
    AuthenticationFailedError as AuthenticationFailedError,
)
from queue_runtime.errors import (
    BatchError as BatchError,
)
from queue_runtime.errors import (
    BatchSendError as BatchSendError,
)
from queue_runtime.errors import (
    BatchSettleError as BatchSettleError,
)
from queue_runtime.errors import (
    BatchTooLargeError as BatchTooLargeError,
)
from queue_runtime.errors import (
    CapabilityError as CapabilityError,
)
from queue_runtime.errors import (
    CircuitOpenError as CircuitOpenError,
)
from queue_runtime.errors import (
    ClosedError as ClosedError,
)
from queue_runtime.errors import (
    ConfigurationError as ConfigurationError,
)
from queue_runtime.errors import (
    ConnectionFailedError as ConnectionFailedError,
)
from queue_runtime.errors import (
    InvalidReceiptError as InvalidReceiptError,
)
from queue_runtime.errors import (
    MessageTooLargeError as MessageTooLargeError,
)
from queue_runtime.errors import (
    PermissionDeniedError as PermissionDeniedError,
)
from queue_runtime.errors import (
    ProviderError as ProviderError,
)
from queue_runtime.errors import (
    QueueFullError as QueueFullError,
)
from queue_runtime.errors import (
    QueueNotFoundError as QueueNotFoundError,
)
from queue_runtime.errors import (
    QueueRuntimeError as QueueRuntimeError,
)
from queue_runtime.errors import (
    QueueTimeoutError as QueueTimeoutError,
)
from queue_runtime.errors import (
    SerializationError as SerializationError,
)
from queue_runtime.errors import (
    ServiceUnavailableError as ServiceUnavailableError,
)
from queue_runtime.errors import (
    SessionLockedError as SessionLockedError,
)
from queue_runtime.errors import (
    SessionLockLostError as SessionLockLostError,
)
from queue_runtime.errors import (
    SessionNotFoundError as SessionNotFoundError,
)
from queue_runtime.errors import (
    SlotOutOfRangeError as SlotOutOfRangeError,
)
from queue_runtime.errors import (
    ThrottledError as ThrottledError,
)
from queue_runtime.errors import (
    ValidationError as ValidationError,
)
from queue_runtime.handling import (
    ConsumerConfig as ConsumerConfig,
)
from queue_runtime.handling import (
    ConsumerObserver as ConsumerObserver,
)
from queue_runtime.handling import (
    ConsumerStats as ConsumerStats,
)
from queue_runtime.handling import (
    FailurePolicy as FailurePolicy,
)
from queue_runtime.handling import (
    Handler as Handler,
)
from queue_runtime.handling import (
    RejectMessage as RejectMessage,
)
from queue_runtime.handling import (
    RetryMessage as RetryMessage,
)
from queue_runtime.message import (
    Message as Message,
)
from queue_runtime.message import (
    MessageId as MessageId,
)
from queue_runtime.message import (
    QueueName as QueueName,
)
from queue_runtime.message import (
    Receipt as Receipt,
)
from queue_runtime.message import (
    ReceivedMessage as ReceivedMessage,
)
from queue_runtime.message import (
    SessionId as SessionId,
)
from queue_runtime.providers.base import (
    Action as Action,
)
from queue_runtime.providers.base import (
    Capabilities as Capabilities,
)
from queue_runtime.providers.base import (
    Disposition as Disposition,
)
from queue_runtime.providers.base import (
    QueueCounts as QueueCounts,
)
from queue_runtime.sessions import (
    CompositeKey as CompositeKey,
)
from queue_runtime.sessions import (
    FallbackKey as FallbackKey,
)
from queue_runtime.sessions import (
    FieldKey as FieldKey,
)
from queue_runtime.sessions import (
    NoKey as NoKey,
)
from queue_runtime.sessions import (
    SessionKey as SessionKey,
)

__version__: str
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
    "MPCCStats",
    "ManualClock",
    "Message",
    "MessageId",
    "MessageTooLargeError",
    "MultiProducerConcurrentConsumer",
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
    "decode_envelope",
    "encode_envelope",
    "encode_envelope_into",
]
