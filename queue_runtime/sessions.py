"""Where a message's session id comes from when the sender does not give it [C29]."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from queue_runtime.errors import ConfigurationError, ValidationError
from queue_runtime.message import Message, SessionId

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
        except ValueError as error:
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
