"""Dead letters: read them, count them, send them back [C16]."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from queue_runtime.clock import sleep
from queue_runtime.config import Seconds, wait_seconds
from queue_runtime.errors import BatchSendError, BatchSettleError, QueueRuntimeError, ValidationError
from queue_runtime.message import Message, Receipt, ReceivedMessage

if TYPE_CHECKING:
    from queue_runtime.client import QueueClient

logger = logging.getLogger("queue_runtime.dlq")

BATCH = 100


class RedriveResult(NamedTuple):
    """What a redrive did, in messages."""

    scanned: int
    """Dead letters that were looked at."""
    matched: int
    """Those of them that the filter let through, within the limit."""
    moved: int
    """Those that are back in the queue; none in a dry run."""
    failed: int
    """Those that are dead letters still: they could not be sent, or not be removed after they were."""


class DeadLetters:
    """The dead letters of one queue. Made by ``QueueClient.dead_letters``.

    Thread-safety: as the client it came from.
    """

    def __init__(self, client: QueueClient, queue_name: str) -> None:
        self._client = client
        self.queue_name = queue_name

    def __repr__(self) -> str:
        return f"<DeadLetters of {self.queue_name!r}>"

    async def receive_messages(self, max_count: int = 10, timeout: Seconds = 20.0) -> list[ReceivedMessage]:
        """As ``QueueClient.receive_messages``; each message tells its dead_letter_reason and its description."""
        return await self._client.receive_dead_letters(self.queue_name, max_count, timeout)

    async def receive_message(self, timeout: Seconds = 20.0) -> ReceivedMessage | None:
        """Return the next dead letter, or None after ``timeout`` seconds."""
        messages = await self.receive_messages(1, timeout)
        return messages[0] if messages else None

    async def peek_messages(self, max_count: int = 10, *, from_sequence_number: int = 0) -> list[ReceivedMessage]:
        """Show dead letters in order of sequence number, without locking them. Raises CapabilityError."""
        return await self._client.peek_dead_letters(self.queue_name, max_count, from_sequence_number)

    async def count(self) -> int:
        """Return how many there are; approximate where the provider's own number is."""
        return (await self._client.counts(self.queue_name)).dead_lettered

    async def redrive(
        self,
        *,
        where: Callable[[ReceivedMessage], bool] | None = None,
        limit: int | None = None,
        rate: float | None = None,
        dry_run: bool = False,
        timeout: Seconds = 1.0,
        progress: Callable[[RedriveResult], object] | None = None,
    ) -> RedriveResult:
        """Send dead letters back to their queue, with their id, body, attributes and session.

        Parameters
        ----------
        where:
            Which ones; all of them by default.
        limit:
            How many at most.
        rate:
            How many a second at most.
        dry_run:
            Only look, and count what would be moved.
        timeout:
            Seconds to wait for the next dead letter before this is taken for the end.
        progress:
            Called after each batch with the result so far.

        A message is sent first and then removed from the dead letters, so that a crash in between leaves it in both
        places and never in none. Its deduplication id, delay and schedule are left behind: they would keep it from
        arriving. It looks at no more messages than were there at the start, so that one which fails again at once is
        not moved for ever. Raises ValidationError for a bad argument, and what ``where`` raises; then nothing
        stays locked.
        """
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValidationError("limit", f"must be a whole number, at least 1, not {limit!r}")
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 < rate < math.inf):
            raise ValidationError("rate", f"must be above 0 messages a second, not {rate!r}")
        if where is not None and not callable(where):
            raise ValidationError("where", f"must be a function of a dead letter, not {where!r}")
        timeout = wait_seconds("timeout", timeout)
        total = await self.count()
        if dry_run and self._client.capabilities.peek:
            return await self._look(total, where, limit)
        return await _Redrive(self, where, limit, rate, dry_run, timeout, progress).run(total)

    async def _look(
        self, total: int, where: Callable[[ReceivedMessage], bool] | None, limit: int | None
    ) -> RedriveResult:
        scanned = matched = start = 0
        while scanned < total and (limit is None or matched < limit):
            messages = await self.peek_messages(BATCH, from_sequence_number=start)
            if not messages:
                break
            for message in messages:
                scanned += 1
                matched += where is None or bool(where(message))
                if matched == limit:
                    break
            last = messages[-1].sequence_number
            assert last is not None
            start = last + 1
        return RedriveResult(scanned, matched, 0, 0)


class _Redrive:
    """One run of it. What it must not move stays locked until the end, so that it is met only once."""

    def __init__(
        self,
        dead_letters: DeadLetters,
        where: Callable[[ReceivedMessage], bool] | None,
        limit: int | None,
        rate: float | None,
        dry_run: bool,
        timeout: Seconds,
        progress: Callable[[RedriveResult], object] | None,
    ) -> None:
        self._dead_letters = dead_letters
        self._client = dead_letters._client
        self._where = where
        self._limit = limit
        self._rate = rate
        self._dry_run = dry_run
        self._timeout = timeout
        self._progress = progress
        self._result = RedriveResult(0, 0, 0, 0)
        self._kept: dict[Receipt, None] = {}

    async def run(self, total: int) -> RedriveResult:
        clock = self._client.clock
        started = clock.monotonic()
        try:
            while self._result.scanned < total and (self._limit is None or self._result.matched < self._limit):
                room = min(BATCH, total - self._result.scanned, int(self._rate or BATCH) or 1)
                if self._limit is not None and self._where is None:
                    room = min(room, self._limit - self._result.matched)
                messages = await self._dead_letters.receive_messages(room, self._timeout)
                if not messages:
                    break
                await self._batch(messages)
                if self._progress is not None:
                    self._progress(self._result)
                if self._rate is not None:
                    await sleep(clock, started + self._result.moved / self._rate - clock.monotonic())
        finally:
            if self._kept:
                # Those whose locks ran out meanwhile are free already.
                with contextlib.suppress(BatchSettleError):
                    await self._client.abandon_messages(self._kept)
        return self._result

    async def _batch(self, messages: list[ReceivedMessage]) -> None:
        # Until each is moved: whatever happens, none stays locked.
        self._kept.update(dict.fromkeys(message.receipt for message in messages))
        chosen: list[ReceivedMessage] = []
        left = None if self._limit is None else self._limit - self._result.matched
        for message in messages:
            if (left is None or len(chosen) < left) and (self._where is None or self._where(message)):
                chosen.append(message)
        moved: list[ReceivedMessage] = []
        if chosen and not self._dry_run:
            moved = await self._move(chosen)
            for message in moved:
                del self._kept[message.receipt]
        result = self._result
        failed = 0 if self._dry_run else len(chosen) - len(moved)
        self._result = RedriveResult(
            result.scanned + len(messages),
            result.matched + len(chosen),
            result.moved + len(moved),
            result.failed + failed,
        )

    async def _move(self, messages: list[ReceivedMessage]) -> list[ReceivedMessage]:
        try:
            await self._client.send_as_they_are(
                self._dead_letters.queue_name, [_revived(message) for message in messages]
            )
        except BatchSendError as error:
            sent = [not isinstance(outcome, QueueRuntimeError) for outcome in error.outcomes]
            messages = [message for message, went in zip(messages, sent, strict=True) if went]
        if not messages:
            return []
        try:
            await self._client.complete_messages(messages)
        except BatchSettleError as error:
            logger.warning("sent back, but not all removed, queue=%s: %s", self._dead_letters.queue_name, error)
            return [message for message, outcome in zip(messages, error.outcomes, strict=True) if outcome is None]
        return messages


def _revived(message: ReceivedMessage) -> Message:
    return message.message().replace(deduplication_id=None, delay=None, scheduled_at=None)
