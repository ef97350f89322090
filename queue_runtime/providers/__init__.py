"""Finds the adapter of a configuration, and imports it only then."""

from __future__ import annotations

from queue_runtime.clock import Clock
from queue_runtime.config import InMemoryConfig, ProviderConfig
from queue_runtime.errors import ConfigurationError
from queue_runtime.providers.base import Provider


def open_provider(config: ProviderConfig, clock: Clock) -> Provider:
    """Return the provider that ``config`` is for. Raises ConfigurationError when there is none."""
    if isinstance(config, InMemoryConfig):
        from queue_runtime.providers.memory import InMemoryProvider

        return InMemoryProvider(config, clock=clock)
    raise ConfigurationError("provider", f"no provider for a {type(config).__name__}")
