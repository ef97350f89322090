"""Consumers for four kinds of work [C44]: each is the consumer with other defaults, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from queue_runtime.client import QueueClient
from queue_runtime.consumer import Consumer
from queue_runtime.handling import ConsumerConfig, ConsumerObserver, Handler


class Processor(Consumer):
    """A consumer with a preset; make your own by another ``preset``.

    Parameters
    ----------
    client, queue_name, handler, observer:
        As of ``Consumer``.
    changes:
        Fields of ``ConsumerConfig`` that are to differ from the preset.

    Raises ConfigurationError, which names the field. Thread-safety: for the client's event loop.
    """

    preset: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """The fields of ``ConsumerConfig`` that it sets."""

    def __init__(
        self,
        client: QueueClient,
        queue_name: str,
        handler: Handler,
        *,
        observer: ConsumerObserver | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(client, queue_name, handler, self.config(**changes), observer=observer)

    @classmethod
    def config(cls, **changes: Any) -> ConsumerConfig:
        """Return the preset as a configuration, with changes; its bounds of a batch are changed together."""
        fields = {**cls.preset, **changes}
        if "max_batch_size" in changes and "min_batch_size" not in changes:
            fields.pop("min_batch_size", None)
        return ConsumerConfig(**fields)


class HighThroughputProcessor(Processor):
    """Many messages at once: large receives, up to 64 handlers side by side, settled in batches."""

    preset = MappingProxyType(
        {
            "max_concurrency": 64,
            "prefetch": 2000,
            "pollers": 2,
            "min_batch_size": 50,
            "max_batch_size": 500,
            "session_batch": 30,
        }
    )


class LowLatencyProcessor(Processor):
    """Each message as soon as it is there: received alone, and hardly any that wait here while others are idle."""

    preset = MappingProxyType(
        {"max_concurrency": 8, "prefetch": 10, "pollers": 2, "max_batch_size": 1, "session_batch": 1}
    )


class AdaptiveBatchProcessor(Processor):
    """A handler of batches, whose size follows the time that they take: about a second each, 10 to 1000 messages."""

    preset = MappingProxyType(
        {
            "handler_form": "batch",
            "max_concurrency": 4,
            "prefetch": 4000,
            "min_batch_size": 10,
            "max_batch_size": 1000,
            "batch_wait": 0.05,
            "session_batch": 1000,
        }
    )


class SessionProcessor(Processor):
    """Ordered work: up to 500 sessions at once, each handled in order, and nothing but sessions."""

    preset = MappingProxyType(
        {"source": "sessions", "max_concurrency": 500, "max_sessions": 500, "prefetch": 5000, "session_batch": 10}
    )
