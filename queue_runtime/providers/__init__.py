"""Finds the adapter of a configuration, and imports it only then."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from queue_runtime.clock import Clock
from queue_runtime.config import BUILT_IN, ProviderConfig
from queue_runtime.errors import ConfigurationError
from queue_runtime.providers.base import Provider


def open_provider(config: ProviderConfig, clock: Clock) -> Provider:
    """Return the provider that ``config`` is for: what its class names as ``provider``, called with both.

    Raises ConfigurationError when the class names none or it cannot be imported, and what the provider raises.
    """
    kind = type(config).__name__
    name = getattr(config, "provider", None)
    if not isinstance(name, str) or ":" not in name:
        raise ConfigurationError(
            "provider", f"{kind}.provider must be 'module:name'; of this package are {', '.join(sorted(BUILT_IN))}"
        )
    module, _, attribute = name.partition(":")
    try:
        factory = cast(Callable[..., Provider], getattr(import_module(module), attribute))
    except Exception as error:
        raise ConfigurationError(
            "provider", f"{name}, of {kind}, cannot be imported ({type(error).__name__}: {error})"
        ) from error
    return factory(config, clock=clock)
