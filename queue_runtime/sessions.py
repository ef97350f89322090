"""Sessions: where the session id of a message comes from [C29], and the hold on a session [C24–C30]."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

from queue_runtime.clock import utc
from queue_runtime.config import Seconds
from queue_runtime.errors import ConfigurationError, ValidationError
from queue_runtime.message import Message, ReceivedMessage, SessionId
from queue_runtime.providers.base import SessionReceiver
from queue_runtime.settlement import Lane

if TYPE_CHECKING:
    from queue_runtime.client import QueueClient

Lookup = Callable[[str], object]
"""Gives the value of a field, or None when there is none."""


class SessionKey(Protocol):
    """A strategy: from the fields of a message to a session key, or None for a message without a session."""

    def key(self, lookup: Lookup) -> str | None: ...


class FieldKey:
    """The value of one field, after ``prefix``. Dots go into nested objects: ``repository.full_name``."""

    def __init__(self, field: str, *, prefix: str = "") -> None:
        self.field = _field_name(field)
        self.prefix = prefix

    def key(self, lookup: Lookup) -> str | None:
        value = _text(self.field, lookup(self.field))
        return None if value is None else self.prefix + value

    def __repr__(self) -> str:
        return f"FieldKey({self.field!r}, prefix={self.prefix!r})"


class CompositeKey:
    """The values of several fields, joined; a message that lacks one of them has no session."""

    def __init__(self, *fields: str, separator: str = ":", prefix: str = "") -> None:
        if not fields:
            raise ConfigurationError("fields", "a composite key needs at least one field")
        self.fields = tuple(_field_name(field) for field in fields)
        self.separator = separator
        self.prefix = prefix

    def key(self, lookup: Lookup) -> str | None:
        values = [_text(field, lookup(field)) for field in self.fields]
        present = [value for value in values if value is not None]
        return None if len(present) < len(values) else self.prefix + self.separator.join(present)

    def __repr__(self) -> str:
        return (
            f"CompositeKey({', '.join(map(repr, self.fields))}, separator={self.separator!r}, prefix={self.prefix!r})"
        )


class FallbackKey:
    """The first of several strategies that answers."""

    def __init__(self, *strategies: SessionKey) -> None:
        if not strategies:
            raise ConfigurationError("strategies", "a fallback needs at least one strategy")
        self.strategies = strategies

    def key(self, lookup: Lookup) -> str | None:
        for strategy in self.strategies:
            key = strategy.key(lookup)
            if key is not None:
                return key
        return None

    def __repr__(self) -> str:
        return f"FallbackKey({', '.join(map(repr, self.strategies))})"


class NoKey:
    """No session for any message."""

    def key(self, lookup: Lookup) -> str | None:
        return None

    def __repr__(self) -> str:
        return "NoKey()"


def session_id_of(strategy: SessionKey, fields: Mapping[str, object]) -> str | None:
    """Return the session id that ``strategy`` finds in ``fields``, or None.

    Raises ValidationError when the key is not a valid SessionId: such a message is never sent unordered.
    """
    key = strategy.key(lambda field: _look_up(fields, field))
    return None if key is None else SessionId(key)


def with_session(strategy: SessionKey, message: Message, source: Literal["attributes", "body"]) -> Message:
    """Return ``message`` with the session id that ``strategy`` finds; one that has an id keeps it.

    ``source`` says where fields are looked up: the attributes, or the body read as a JSON object.
    """
    if message.session_id is not None:
        return message
    if source == "attributes":
        fields: Mapping[str, object] = message.attributes
    else:
        try:
            fields = json.loads(message.body)
        except (ValueError, RecursionError) as error:  # nested too deep for the parser
            raise ValidationError("body", f"the session key is looked up in it, but it is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValidationError("body", "the session key is looked up in it, but it is no JSON object")
    session_id = session_id_of(strategy, fields)
    return message if session_id is None else message.replace(session_id=session_id)


def _field_name(field: object) -> str:
    if not isinstance(field, str) or not field:
        raise ConfigurationError("field", f"must be a non-empty text, not {field!r}")
    return field


def _look_up(fields: Mapping[str, object], path: str) -> object:
    """A field by its full name, else by walking down its dots."""
    if path in fields:
        return fields[path]
    value: object = fields
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _text(field: str, value: object) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValidationError(field, f"a session key is made of texts and whole numbers, not {type(value).__name__}")


class Session:
    """A held session: its messages, in order, for nobody else [C24].

    Made by ``QueueClient.accept_session``. Its messages are settled through the client, as any others. Use it as
    ``async with session``, or call ``close()``, which releases the session for the next holder.

    Thread-safety: as the client it came from.
    """

    def __init__(self, client: QueueClient, lane: Lane, receiver: SessionReceiver) -> None:
        self._client = client
        self._lane = lane
        self._receiver = receiver

    def __repr__(self) -> str:
        return f"<Session {self.session_id!r} of {self._receiver.queue_name!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def session_id(self) -> str:
        return self._receiver.session_id

    @property
    def receiver_id(self) -> int:
        """What the receipts of its messages carry."""
        return self._receiver.id

    @property
    def locked_until(self) -> datetime:
        """The end of the session lock, as far as it is renewed."""
        return utc(self._receiver.locked_until)

    async def receive_messages(self, max_count: int = 10, timeout: Seconds = 20.0) -> list[ReceivedMessage]:
        """As ``QueueClient.receive_messages``, from this session. Raises SessionLockLostError when it is lost."""
        return await self._client.receive_on(self._lane, max_count, timeout)

    async def receive_message(self, timeout: Seconds = 20.0) -> ReceivedMessage | None:
        """Return the session's next message, or None after ``timeout`` seconds."""
        messages = await self.receive_messages(1, timeout)
        return messages[0] if messages else None

    async def renew_lock(self) -> datetime:
        """Extend the session lock by its full duration; return its new end. Raises SessionLockLostError."""
        return utc(await self._receiver.renew_session())

    async def get_state(self) -> bytes | None:
        """Return the session's state, None when none was set [C30]. Raises SessionLockLostError."""
        self._client.require("session_state")
        return await self._receiver.get_state()

    async def set_state(self, state: bytes | None) -> None:
        """Keep ``state`` with the session for its next holders; None removes it. Raises SessionLockLostError."""
        self._client.require("session_state")
        if state is not None and not isinstance(state, bytes):
            raise ValidationError("state", f"must be bytes or None, not {type(state).__name__}")
        await self._receiver.set_state(state)

    async def close(self) -> None:
        """Release the session and the messages of it that are not settled. Safe to call twice."""
        await self._client.close_session(self._lane)
