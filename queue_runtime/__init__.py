"""One asynchronous API over message queues, with a compiled core.

``QueueClient`` sends, receives and settles; ``Consumer`` runs a handler over a queue. The names below are the whole
public face; everything else may change without notice. Each is imported when it is first asked for, so that who needs
only the envelope or the batch sizer does not load asyncio.
"""

from importlib import import_module

try:
    import queue_runtime._core.batch  # noqa: F401 - the lightest of the compiled modules
except ModuleNotFoundError as error:
    raise ImportError("queue_runtime is not compiled here: run `pip install --editable .` in its checkout") from error

_HOME = {
    "Action": "providers.base",
    "AdaptiveBatchProcessor": "processors",
    "AdaptiveBatchSizer": "_core.batch",
    "AlreadyStartedError": "errors",
    "AuthenticationFailedError": "errors",
    "BatchContext": "context",
    "BatchError": "errors",
    "BatchRecord": "_core.batch",
    "BatchSendError": "errors",
    "BatchSettleError": "errors",
    "BatchTooLargeError": "errors",
    "BodyStore": "bodies",
    "BreakerConfig": "breaker",
    "BreakerState": "breaker",
    "Cancellation": "_core.outcome",
    "Capabilities": "providers.base",
    "CapabilityError": "errors",
    "CircuitBreaker": "breaker",
    "CircuitOpenError": "errors",
    "Clock": "clock",
    "ClosedError": "errors",
    "CompositeKey": "sessions",
    "ConfigurationError": "errors",
    "ConnectionFailedError": "errors",
    "Consumer": "consumer",
    "ConsumerConfig": "handling",
    "ConsumerHealth": "health",
    "ConsumerObserver": "handling",
    "ConsumerStats": "handling",
    "DeadLetters": "dlq",
    "Disposition": "providers.base",
    "ExponentialRetry": "retry",
    "FailurePolicy": "handling",
    "FallbackKey": "sessions",
    "FieldKey": "sessions",
    "FixedRetry": "retry",
    "Handler": "handling",
    "HandlerContext": "context",
    "HandlerDiedError": "calling",
    "Health": "health",
    "HealthReporter": "health",
    "HighThroughputProcessor": "processors",
    "IdempotencyStore": "idempotency",
    "InMemoryConfig": "config",
    "InvalidReceiptError": "errors",
    "Limits": "scaling",
    "LinearRetry": "retry",
    "Load": "scaling",
    "LowLatencyProcessor": "processors",
    "MPCC": "_core.mpcc",
    "MPCCStats": "_core.outcome",
    "ManualClock": "clock",
    "MemoryConfig": "pressure",
    "MemoryIdempotencyStore": "idempotency",
    "Message": "message",
    "MessageContext": "context",
    "MessageId": "message",
    "MessageTooLargeError": "errors",
    "Middleware": "middleware",
    "MultiProducerConcurrentConsumer": "_core.mpcc",
    "NoKey": "sessions",
    "NoRetry": "retry",
    "PermissionDeniedError": "errors",
    "Processor": "processors",
    "Provider": "providers.base",
    "ProviderConfig": "config",
    "ProviderError": "errors",
    "QueueClient": "client",
    "QueueCounts": "providers.base",
    "QueueFullError": "errors",
    "QueueName": "message",
    "QueueNotFoundError": "errors",
    "QueueRuntimeError": "errors",
    "QueueTimeoutError": "errors",
    "Receipt": "message",
    "ReceivedMessage": "message",
    "Receiver": "providers.base",
    "RedriveResult": "dlq",
    "RejectMessage": "handling",
    "RetryMessage": "handling",
    "RetryPolicy": "retry",
    "RuntimeConfiguration": "runtime",
    "SQLiteIdempotencyStore": "idempotency_sqlite",
    "Scaler": "scaler",
    "ScalingConfig": "scaling",
    "SerializationError": "errors",
    "ServiceUnavailableError": "errors",
    "Session": "sessions",
    "SessionId": "message",
    "SessionKey": "sessions",
    "SessionLockLostError": "errors",
    "SessionLockedError": "errors",
    "SessionNotFoundError": "errors",
    "SessionProcessor": "processors",
    "SessionReceiver": "providers.base",
    "SkipDone": "idempotency",
    "SlotOutOfRangeError": "errors",
    "StoredBody": "bodies",
    "SystemClock": "clock",
    "ThrottledError": "errors",
    "ValidationError": "errors",
    "config_from_url": "config",
    "decode_envelope": "_core.envelope",
    "encode_envelope": "_core.envelope",
    "encode_envelope_into": "_core.envelope",
    "encode_envelope_parts": "_core.envelope",
    "retrying": "retry",
}
"""Every public name and the module that it lives in; ``__init__.pyi`` tells type checkers the same."""

__version__ = "0.1.0"

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
