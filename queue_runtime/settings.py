"""Checks of settings and arguments: each names the field and tells the limit."""

from __future__ import annotations

import math
import os
from datetime import timedelta

from queue_runtime.errors import ConfigurationError, ValidationError

Seconds = float | timedelta
"""A duration: seconds, or a timedelta. Configurations keep it as seconds."""


def seconds(field: str, value: object, *, minimum: float = 0.0, maximum: float = math.inf) -> float:
    """Return a duration in seconds; raise ConfigurationError naming ``field`` when it is none or out of range."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(field, f"must be seconds or a timedelta, not {type(value).__name__}")
    if not minimum <= value <= maximum or math.isinf(value):
        limit = f"at least {minimum:g} s" if math.isinf(maximum) else f"from {minimum:g} to {maximum:g} s"
        raise ConfigurationError(field, f"must be {limit}, not {value:g}")
    return float(value)


def wait_seconds(field: str, value: object) -> float:
    """Return an argument that is a duration in seconds; raise ValidationError naming ``field`` when it is none."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValidationError(field, f"must be seconds or a timedelta, 0 or more, not {value!r}")
    return float(value)


def integer(field: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return ``value``; raise ConfigurationError naming ``field`` when it is no whole number or out of range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(field, f"must be a whole number, not {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        limit = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ConfigurationError(field, f"must be {limit}, not {value}")
    return value


def share(field: str, value: object, *, minimum: float = 0.0) -> float:
    """Return ``value``; raise ConfigurationError naming ``field`` when it is no number from ``minimum`` to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(field, f"must be a number, not {type(value).__name__}")
    if not minimum <= value <= 1.0:
        raise ConfigurationError(field, f"must be from {minimum:g} to 1, not {value:g}")
    return float(value)


def choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(field, f"must be one of {', '.join(allowed)}, not {value!r}")


def flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(field, f"must be true or false, not {value!r}")


def path(field: str, value: object) -> str:
    """Return a path as a text; raise ConfigurationError naming ``field`` when it is none, or empty."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise ConfigurationError(field, f"must be a path, not {value!r}")
    return text
