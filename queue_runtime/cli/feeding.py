"""From JSON lines to messages in a queue. A line that cannot be sent is told and counted, never dropped in silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from queue_runtime.cli.lines import Line, LineReader
from queue_runtime.client import QueueClient
from queue_runtime.errors import (
    BatchSendError,
    MessageTooLargeError,
    QueueFullError,
    QueueRuntimeError,
    ValidationError,
)
from queue_runtime.message import Message
from queue_runtime.sessions import CompositeKey, FieldKey, SessionKey, session_id_of

BATCH = 100
"""Messages of one send."""
AHEAD = 10_000
"""Messages that may wait in a queue of this process's memory before the feed pauses."""
PAUSE = 0.005
"""Seconds between looks at a queue that is full."""
LONGEST_LINE = 64 * 1024 * 1024
"""Bytes of a line, where the provider has no limit of its own."""
KEPT_REFUSALS = 100
"""Refused lines that the result names; all of them are counted, and told when they are met."""


class Refusal(NamedTuple):
    line: int
    problem: str


@dataclass(slots=True)
class FeedResult:
    """What became of a feed's lines. Blank ones are not counted."""

    source: str
    lines: int = 0
    sent: int = 0
    refused: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    finished: bool = False
    """Whether the end was reached."""
    error: str | None = None
    """Why it could not be read to its end."""


def session_key_of(fields: Sequence[str]) -> SessionKey | None:
    """Return the strategy for ``--session-key``: one field, or several of which a line has all or no session."""
    if not fields:
        return None
    return FieldKey(fields[0]) if len(fields) == 1 else CompositeKey(*fields)


def message_of(data: bytes, key: SessionKey | None, settings: Mapping[str, Any]) -> Message:
    """Return the message of one line: its bytes as they are. Raises ValidationError, which says what is wrong."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValidationError("line", f"is not UTF-8: {data[error.start]:#04x} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValidationError("line", f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except RecursionError:
        raise ValidationError("line", "is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValidationError("line", f"is not JSON that can be read: {error}") from None
    session_id = session_id_of(key, value) if key is not None and isinstance(value, dict) else None
    return Message(**{"body": data, "content_type": "application/json", "session_id": session_id, **settings})


class Feeder:
    """Sends the lines of a file, in their order, as fast as the queue takes them.

    Parameters
    ----------
    path:
        The file, or ``-`` for stdin.
    key:
        Where a line's session id comes from.
    settings:
        Fields that every message gets.
    tell:
        Called with a sentence for each line that is refused.

    Thread-safety: for the client's event loop.
    """

    def __init__(
        self,
        client: QueueClient,
        queue_name: str,
        path: str,
        *,
        key: SessionKey | None = None,
        settings: Mapping[str, Any] | None = None,
        tell: Callable[[str], None],
    ) -> None:
        self._client = client
        self._queue_name = queue_name
        self._largest = client.capabilities.max_message_size
        self._path = path
        self._key = key
        self._settings = settings or {}
        self._tell = tell
        self.result = FeedResult("stdin" if path == "-" else path)

    async def run(self) -> FeedResult:
        """Send all lines. Raises what makes sending impossible, such as QueueNotFoundError."""
        reader = LineReader(self._path, self._largest or LONGEST_LINE)
        try:
            async with aclosing(reader.chunks()) as chunks:
                async for lines in chunks:
                    await self._send_all(lines)
        except OSError as error:
            self.result.error = f"cannot read {self.result.source}: {error.strerror or error}"
            self._tell(self.result.error)
        else:
            self.result.finished = True
        return self.result

    async def _send_all(self, lines: Sequence[Line]) -> None:
        batch: list[tuple[int, Message]] = []
        for line in lines:
            if line.data is not None and not line.data.strip():
                continue
            self.result.lines += 1
            try:
                batch.append((line.number, self._message(line)))
            except (ValidationError, MessageTooLargeError) as error:
                self._refuse(line.number, error)
            if len(batch) == BATCH:
                await self._send(batch)
                batch = []
        if batch:
            await self._send(batch)

    def _message(self, line: Line) -> Message:
        if line.data is None:
            raise MessageTooLargeError(line.size, self._largest or LONGEST_LINE)
        message = message_of(line.data, self._key, self._settings)
        if self._largest is not None and message.size > self._largest:
            raise MessageTooLargeError(message.size, self._largest)
        return message

    async def _send(self, batch: list[tuple[int, Message]]) -> None:
        await self._wait_for_room()
        while batch:
            outcomes: Sequence[str | QueueRuntimeError]
            try:
                outcomes = await self._client.send_messages(self._queue_name, [message for _, message in batch])
            except BatchSendError as error:
                outcomes = error.outcomes
            except QueueRuntimeError as error:
                if not _passes(error):
                    raise
                outcomes = [error] * len(batch)
            again: list[tuple[int, Message]] = []
            pause = PAUSE
            for entry, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, str):
                    self.result.sent += 1
                elif _passes(outcome):
                    again.append(entry)
                    pause = max(pause, outcome.retry_after or 0.0)
                else:
                    self._refuse(entry[0], outcome)
            batch = again
            if batch:
                await asyncio.sleep(pause)

    async def _wait_for_room(self) -> None:
        if self._client.capabilities.settles_in_process:  # else the messages are in somebody else's memory
            while (await self._client.counts(self._queue_name)).active >= AHEAD:  # noqa: ASYNC110  # nothing wakes for it
                await asyncio.sleep(PAUSE)

    def _refuse(self, number: int, error: QueueRuntimeError) -> None:
        problem = str(error).removeprefix("line: ")
        self.result.refused += 1
        if len(self.result.refusals) < KEPT_REFUSALS:
            self.result.refusals.append(Refusal(number, problem))
        self._tell(f"{self.result.source}:{number}: not sent: {problem}")


def _passes(error: QueueRuntimeError) -> bool:
    return error.is_transient or isinstance(error, QueueFullError)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
