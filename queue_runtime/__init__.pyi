from queue_runtime._core.batch import (
    AdaptiveBatchSizer as AdaptiveBatchSizer,
    BatchRecord as BatchRecord,
)
from queue_runtime._core.envelope import (
    decode_envelope as decode_envelope,
    encode_envelope as encode_envelope,
    encode_envelope_into as encode_envelope_into,
    encode_envelope_parts as encode_envelope_parts,
)
from queue_runtime._core.mpcc import (
    MPCC as MPCC,
    MultiProducerConcurrentConsumer as MultiProducerConcurrentConsumer,
)
from queue_runtime._core.outcome import (
    Cancellation as Cancellation,
    MPCCStats as MPCCStats,
)
from queue_runtime.bodies import (
    BodyStore as BodyStore,
    StoredBody as StoredBody,
)
from queue_runtime.breaker import (
    BreakerConfig as BreakerConfig,
    BreakerState as BreakerState,
    CircuitBreaker as CircuitBreaker,
)
from queue_runtime.calling import (
    HandlerDiedError as HandlerDiedError,
)
from queue_runtime.client import (
    QueueClient as QueueClient,
)
from queue_runtime.clock import (
    Clock as Clock,
    ManualClock as ManualClock,
    SystemClock as SystemClock,
)
from queue_runtime.config import (
    InMemoryConfig as InMemoryConfig,
    ProviderConfig as ProviderConfig,
    config_from_url as config_from_url,
)
from queue_runtime.consumer import (
    Consumer as Consumer,
)
from queue_runtime.context import (
    BatchContext as BatchContext,
    HandlerContext as HandlerContext,
    MessageContext as MessageContext,
)
from queue_runtime.dlq import (
    DeadLetters as DeadLetters,
    RedriveResult as RedriveResult,
)
from queue_runtime.errors import (
    AlreadyStartedError as AlreadyStartedError,
    AuthenticationFailedError as AuthenticationFailedError,
    BatchError as BatchError,
    BatchSendError as BatchSendError,
    BatchSettleError as BatchSettleError,
    BatchTooLargeError as BatchTooLargeError,
    CapabilityError as CapabilityError,
    CircuitOpenError as CircuitOpenError,
    ClosedError as ClosedError,
    ConfigurationError as ConfigurationError,
    ConnectionFailedError as ConnectionFailedError,
    InvalidReceiptError as InvalidReceiptError,
    MessageTooLargeError as MessageTooLargeError,
    PermissionDeniedError as PermissionDeniedError,
    ProviderError as ProviderError,
    QueueFullError as QueueFullError,
    QueueNotFoundError as QueueNotFoundError,
    QueueRuntimeError as QueueRuntimeError,
    QueueTimeoutError as QueueTimeoutError,
    SerializationError as SerializationError,
    ServiceUnavailableError as ServiceUnavailableError,
    SessionLockedError as SessionLockedError,
    SessionLockLostError as SessionLockLostError,
    SessionNotFoundError as SessionNotFoundError,
    SlotOutOfRangeError as SlotOutOfRangeError,
    ThrottledError as ThrottledError,
    ValidationError as ValidationError,
)
from queue_runtime.handling import (
    ConsumerConfig as ConsumerConfig,
    ConsumerObserver as ConsumerObserver,
    ConsumerStats as ConsumerStats,
    FailurePolicy as FailurePolicy,
    Handler as Handler,
    RejectMessage as RejectMessage,
    RetryMessage as RetryMessage,
)
from queue_runtime.health import (
    ConsumerHealth as ConsumerHealth,
    Health as Health,
    HealthReporter as HealthReporter,
)
from queue_runtime.idempotency import (
    IdempotencyStore as IdempotencyStore,
    MemoryIdempotencyStore as MemoryIdempotencyStore,
    SkipDone as SkipDone,
)
from queue_runtime.idempotency_sqlite import (
    SQLiteIdempotencyStore as SQLiteIdempotencyStore,
)
from queue_runtime.message import (
    Message as Message,
    MessageId as MessageId,
    QueueName as QueueName,
    Receipt as Receipt,
    ReceivedMessage as ReceivedMessage,
    SessionId as SessionId,
)
from queue_runtime.middleware import (
    Middleware as Middleware,
)
from queue_runtime.pressure import (
    MemoryConfig as MemoryConfig,
)
from queue_runtime.processors import (
    AdaptiveBatchProcessor as AdaptiveBatchProcessor,
    HighThroughputProcessor as HighThroughputProcessor,
    LowLatencyProcessor as LowLatencyProcessor,
    Processor as Processor,
    SessionProcessor as SessionProcessor,
)
from queue_runtime.providers.base import (
    Action as Action,
    Capabilities as Capabilities,
    Disposition as Disposition,
    Provider as Provider,
    QueueCounts as QueueCounts,
    Receiver as Receiver,
    SessionReceiver as SessionReceiver,
)
from queue_runtime.retry import (
    ExponentialRetry as ExponentialRetry,
    FixedRetry as FixedRetry,
    LinearRetry as LinearRetry,
    NoRetry as NoRetry,
    RetryPolicy as RetryPolicy,
    retrying as retrying,
)
from queue_runtime.runtime import (
    RuntimeConfiguration as RuntimeConfiguration,
)
from queue_runtime.scaler import Scaler as Scaler
from queue_runtime.scaling import (
    Limits as Limits,
    Load as Load,
    ScalingConfig as ScalingConfig,
)
from queue_runtime.sessions import (
    CompositeKey as CompositeKey,
    FallbackKey as FallbackKey,
    FieldKey as FieldKey,
    NoKey as NoKey,
    Session as Session,
    SessionKey as SessionKey,
)

__version__: str

__all__ = [
    "Action",
    "AdaptiveBatchProcessor",
    "AdaptiveBatchSizer",
    "AlreadyStartedError",
    "AuthenticationFailedError",
    "BatchContext",
    "BatchError",
    "BatchRecord",
    "BatchSendError",
    "BatchSettleError",
    "BatchTooLargeError",
    "BodyStore",
    "BreakerConfig",
    "BreakerState",
    "Cancellation",
    "Capabilities",
    "CapabilityError",
    "CircuitBreaker",
    "CircuitOpenError",
    "Clock",
    "ClosedError",
    "CompositeKey",
    "ConfigurationError",
    "ConnectionFailedError",
    "Consumer",
    "ConsumerConfig",
    "ConsumerHealth",
    "ConsumerObserver",
    "ConsumerStats",
    "DeadLetters",
    "Disposition",
    "ExponentialRetry",
    "FailurePolicy",
    "FallbackKey",
    "FieldKey",
    "FixedRetry",
    "Handler",
    "HandlerContext",
    "HandlerDiedError",
    "Health",
    "HealthReporter",
    "HighThroughputProcessor",
    "IdempotencyStore",
    "InMemoryConfig",
    "InvalidReceiptError",
    "Limits",
    "LinearRetry",
    "Load",
    "LowLatencyProcessor",
    "MPCC",
    "MPCCStats",
    "ManualClock",
    "MemoryConfig",
    "MemoryIdempotencyStore",
    "Message",
    "MessageContext",
    "MessageId",
    "MessageTooLargeError",
    "Middleware",
    "MultiProducerConcurrentConsumer",
    "NoKey",
    "NoRetry",
    "PermissionDeniedError",
    "Processor",
    "Provider",
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
    "Receiver",
    "RedriveResult",
    "RejectMessage",
    "RetryMessage",
    "RetryPolicy",
    "RuntimeConfiguration",
    "SQLiteIdempotencyStore",
    "Scaler",
    "ScalingConfig",
    "SerializationError",
    "ServiceUnavailableError",
    "Session",
    "SessionId",
    "SessionKey",
    "SessionLockLostError",
    "SessionLockedError",
    "SessionNotFoundError",
    "SessionProcessor",
    "SessionReceiver",
    "SkipDone",
    "SlotOutOfRangeError",
    "StoredBody",
    "SystemClock",
    "ThrottledError",
    "ValidationError",
    "config_from_url",
    "decode_envelope",
    "encode_envelope",
    "encode_envelope_into",
    "encode_envelope_parts",
    "retrying",
]
