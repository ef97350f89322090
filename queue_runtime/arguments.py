"""The checks of a client's arguments: bad ones raise ValidationError, which names the field."""

from __future__ import annotations

from functools import lru_cache

from queue_runtime.errors import ValidationError
from queue_runtime.message import QueueName, Receipt, ReceivedMessage

MAX_COUNT = 10_000
"""The most messages that one receive may ask for."""


def check_queue_name(queue_name: object) -> None:
    if not isinstance(queue_name, str):
        raise ValidationError("queue_name", f"must be a text, not {type(queue_name).__name__}")
    _valid_queue_name(queue_name)


_valid_queue_name = lru_cache(maxsize=1024)(QueueName)


def check_count(field: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
        raise ValidationError(field, f"must be a whole number from 1 to {MAX_COUNT}, not {count!r}")


def check_sequence_number(field: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValidationError(field, f"must be a whole number, 0 or more, not {number!r}")


def receipt_of(message: object) -> Receipt:
    if isinstance(message, Receipt):
        return message
    if isinstance(message, ReceivedMessage):
        return message.receipt
    raise ValidationError("message", f"must be a ReceivedMessage or a Receipt, not {type(message).__name__}")
