"""Sending until each message has its final outcome [C9]: what was accepted is never sent again."""

from __future__ import annotations

from collections.abc import Sequence

from queue_runtime.errors import QueueRuntimeError
from queue_runtime.message import Message
from queue_runtime.providers.base import Outcome, Provider
from queue_runtime.retry import Retrier


async def send(provider: Provider, retrier: Retrier, queue_name: str, messages: Sequence[Message]) -> list[Outcome]:
    """Send, what failed for a passing reason again and alone, in the order given; return an outcome for each.

    Raises what the provider raises when that is all that is known of every message.
    """
    started = retrier.clock.monotonic()
    outcomes: list[Outcome]
    is_known = False
    """Whether any message ever had an outcome of its own."""
    try:
        outcomes = await provider.send(queue_name, messages)
        is_known = True
    except QueueRuntimeError as error:
        if not error.is_transient:
            raise
        outcomes = [error] * len(messages)
    if not any(outcomes):
        return outcomes
    attempt = 1
    while failed := {place: error for place, error in enumerate(outcomes) if error is not None and error.is_transient}:
        slowest = max(failed.values(), key=lambda error: error.retry_after or 0.0)
        if not await retrier.wait(attempt, slowest, started):
            break
        attempt += 1
        try:
            results = await provider.send(queue_name, [messages[place] for place in failed])
            is_known = True
        except QueueRuntimeError as error:
            results = [error] * len(failed)
        for place, outcome in zip(failed, results, strict=True):
            outcomes[place] = outcome
    if not is_known and outcomes[0] is not None:
        raise outcomes[0]
    return outcomes
