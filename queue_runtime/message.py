"""Messages, receipts and ids. Values only: nothing here does I/O."""

from __future__ import annotations

import re
from typing import Self

from queue_runtime._core.delivery import Receipt, ReceivedMessage
from queue_runtime._core.message import Message
from queue_runtime.errors import ValidationError

__all__ = ["Message", "MessageId", "QueueName", "ReceivedMessage", "Receipt", "SessionId"]

_QUEUE_NAME = re.compile(r"[A-Za-z0-9_]+(?:-[A-Za-z0-9_]+)*(?:\.fifo)?")
_SESSION_ID = re.compile(r"[\x20-\x7e]{1,128}")


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise ValidationError(field, f"must be a str, not {type(value).__name__}")
    return str.__str__(value)


class QueueName(str):
    """A queue's name [C1].

    1 to 260 ASCII letters, digits, ``-`` and ``_``, with an optional ``.fifo`` ending; no leading, trailing or
    double ``-``. A provider may allow less.

    Raises
    ------
    ValidationError
        When the name is not one.

    Thread-safety: immutable.
    """

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        text = _text(value, "queue_name")
        if len(text) > 260 or _QUEUE_NAME.fullmatch(text) is None:
            raise ValidationError(
                "queue_name",
                "must be 1 to 260 ASCII letters, digits, '-' or '_', with an optional '.fifo' ending and no leading, "
                f"trailing or double '-', not {_shown(text)}",
            )
        return super().__new__(cls, text)


class SessionId(str):
    """A session's id [C2]: 1 to 128 printable ASCII characters (0x20 to 0x7e).

    Raises
    ------
    ValidationError
        When the id is not one.

    Thread-safety: immutable.
    """

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        text = _text(value, "session_id")
        if _SESSION_ID.fullmatch(text) is None:
            raise ValidationError("session_id", f"must be 1 to 128 printable ASCII characters, not {_shown(text)}")
        return super().__new__(cls, text)


class MessageId(str):
    """A message's id [C2]: any str that is not empty and has a UTF-8 form.

    Raises
    ------
    ValidationError
        When the id is not one.

    Thread-safety: immutable.
    """

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        text = _text(value, "message_id")
        if not text:
            raise ValidationError("message_id", "must not be empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValidationError(
                "message_id", f"must be valid Unicode: a lone surrogate at index {error.start} has no UTF-8"
            ) from None
        return super().__new__(cls, text)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:37] + "...")
