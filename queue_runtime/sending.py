"""Sending until each message has its final outcome [C9]: what was accepted is never sent again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from queue_runtime.clock import Clock, utc
from queue_runtime.errors import CapabilityError, ConnectionFailedError, QueueRuntimeError, ValidationError
from queue_runtime.message import Message
from queue_runtime.providers.base import Capabilities, Outcome, Provider
from queue_runtime.retry import Retrier


def is_limited(capabilities: Capabilities) -> bool:
    """Whether there are messages that ``check_sendable`` refuses."""
    return not (capabilities.sessions and capabilities.deduplication and capabilities.max_delay is None)


def check_sendable(message: Message, provider: Provider, clock: Clock) -> None:
    """Raise CapabilityError or ValidationError for what the provider would leave undone without a word [C18, C19, C29].

    A message that is sent back from the dead letters is not asked about: it was accepted once.
    """
    can = provider.capabilities
    if message.session_id is not None and not can.sessions:
        raise CapabilityError(provider.name, "sessions")
    if message.deduplication_id is not None and not can.deduplication:
        raise CapabilityError(provider.name, "deduplication")
    if can.max_delay is None:
        return
    longest = timedelta(seconds=can.max_delay)
    if message.delay is not None and message.delay > longest:
        raise ValidationError("delay", f"must be at most {can.max_delay:g} s here, not {message.delay}")
    if message.scheduled_at is not None and message.scheduled_at - utc(clock.time()) > longest:
        raise ValidationError("scheduled_at", f"must be at most {can.max_delay:g} s from now here")


class Trouble(NamedTuple):
    """The last thing that went wrong with the connection."""

    at: float
    """By the monotonic clock."""
    sentence: str


class Sender:
    """Sends for one client.

    Thread-safety: for the client's event loop.
    """

    def __init__(self, provider: Provider, retrier: Retrier) -> None:
        self._provider = provider
        self._retrier = retrier
        self.trouble: Trouble | None = None
        """That the last attempt could not reach the service; None when it did."""

    async def send(self, queue_name: str, messages: Sequence[Message]) -> list[Outcome]:
        """Send, what failed for a passing reason again and alone, in the order given; return an outcome for each.

        Raises what the provider raises when that is all that is known of every message.
        """
        started = self._retrier.clock.monotonic()
        outcomes: list[Outcome]
        is_known = False
        """Whether any message ever had an outcome of its own."""
        try:
            outcomes = await self._provider.send(queue_name, messages)
            is_known = True
            self.trouble = None
        except QueueRuntimeError as error:
            self._note(queue_name, error)
            if not error.is_transient:
                raise
            outcomes = [error] * len(messages)
        if not any(outcomes):
            return outcomes
        attempt = 1
        while failed := {
            place: error for place, error in enumerate(outcomes) if error is not None and error.is_transient
        }:
            slowest = max(failed.values(), key=lambda error: error.retry_after or 0.0)
            if not await self._retrier.wait(attempt, slowest, started):
                break
            attempt += 1
            try:
                results = await self._provider.send(queue_name, [messages[place] for place in failed])
                is_known = True
                self.trouble = None
            except QueueRuntimeError as error:
                self._note(queue_name, error)
                results = [error] * len(failed)
            for place, outcome in zip(failed, results, strict=True):
                outcomes[place] = outcome
        if not is_known and outcomes[0] is not None:
            raise outcomes[0]
        return outcomes

    def _note(self, queue_name: str, error: QueueRuntimeError) -> None:
        if isinstance(error, ConnectionFailedError):
            sentence = f"sending to queue {queue_name} failed: {error}"
            self.trouble = Trouble(self._retrier.clock.monotonic(), sentence)
