"""QueueClient: send, receive, settle and sessions, the same on every provider."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Literal, Self, cast

from queue_runtime.arguments import check_count, check_queue_name, check_sequence_number, receipt_of
from queue_runtime.clock import Clock, SystemClock, utc
from queue_runtime.config import ProviderConfig, Seconds, config_from_url, wait_seconds
from queue_runtime.dlq import DeadLetters
from queue_runtime.errors import (
    BatchSendError,
    BatchSettleError,
    CapabilityError,
    ClosedError,
    ConfigurationError,
    InvalidReceiptError,
    QueueRuntimeError,
    SessionLockLostError,
    ValidationError,
)
from queue_runtime.health import Checkup, Health, HealthReporter
from queue_runtime.links import Links
from queue_runtime.message import Message, Receipt, ReceivedMessage, SessionId
from queue_runtime.providers import open_provider
from queue_runtime.providers.base import (
    ABANDON,
    COMPLETE,
    DEFER,
    Action,
    Capabilities,
    Disposition,
    Outcome,
    Provider,
    QueueCounts,
)
from queue_runtime.renewal import LockRenewer, LostCallback
from queue_runtime.retry import Retrier
from queue_runtime.sending import Sender, check_sendable, is_limited
from queue_runtime.sessions import Session, SessionKey, with_session
from queue_runtime.settlement import Lane, Settler, failed, outcome_of, unexpected

Settleable = ReceivedMessage | Receipt


class QueueClient:
    """A connection to one messaging service.

    Parameters
    ----------
    provider:
        A configuration, or a URL such as ``memory://`` or ``memory://shared?lock_duration=10``.
    session_key:
        A strategy that gives messages without a session id one when they are sent [C29].
    session_key_source:
        Where the strategy looks fields up: in the ``attributes``, or in the ``body`` read as a JSON object.
    clock:
        For tests: a ``ManualClock``.

    Raises ConfigurationError, which names the field. Every method raises ValidationError for a bad argument and
    ClosedError after ``close``.

    Use it as ``async with QueueClient(...) as client``, or call ``close()``. Until they are settled, the locks of
    received messages are renewed, for at most ``max_lock_renewal`` seconds of the configuration.

    What fails for a passing reason is tried again as the configuration's ``retry`` says [C34], except ``receive`` and
    ``accept_session``: who waits for messages calls again anyhow. ``close`` ends the pauses in between at once.

    Thread-safety: for one event loop; there, any number of tasks may use it at once [C23].
    """

    def __init__(
        self,
        provider: str | ProviderConfig = "memory://",
        *,
        session_key: SessionKey | None = None,
        session_key_source: Literal["attributes", "body"] = "attributes",
        clock: Clock | None = None,
    ) -> None:
        self.config = provider if isinstance(provider, ProviderConfig) else config_from_url(provider)
        if session_key_source not in ("attributes", "body"):
            raise ConfigurationError("session_key_source", f"must be attributes or body, not {session_key_source!r}")
        if session_key is not None and not callable(getattr(session_key, "key", None)):
            raise ConfigurationError("session_key", f"must be a strategy such as FieldKey, not {session_key!r}")
        self._session_key = session_key
        self._session_key_source: Literal["attributes", "body"] = session_key_source
        self.clock: Clock = SystemClock() if clock is None else clock
        self._monotonic = self.clock.monotonic
        self._provider: Provider = open_provider(self.config, self.clock)
        self._is_limited = is_limited(self._provider.capabilities)
        self._retrier = Retrier(self.config.retry, self.clock)
        self._sender = Sender(self._provider, self._retrier)
        max_renewal = cast(float, self.config.max_lock_renewal)
        self._renewer = (
            LockRenewer(
                self.clock,
                max_renewal,
                self._locks_lost,
                is_settling=self._is_settling,
                from_threads=self._provider.capabilities.renews_from_threads,
            )
            if max_renewal
            else None
        )
        self._settler = Settler(
            self.config,
            in_process=self._provider.capabilities.settles_in_process,
            clock=self.clock,
            over=None if self._renewer is None else self._renewer.forget,
        )
        self._links = Links(self._provider, self._settler, self._renewer, self._retrier)
        self._lanes = self._links.by_id
        self._checkup = Checkup(self.clock, self._links, self._sender, self._renewer, self._provider.counts)
        self._settled = self._checkup.settled
        self._closing = asyncio.Lock()
        self._lost_listeners: list[LostCallback] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<QueueClient {self._provider.name}{' closed' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def capabilities(self) -> Capabilities:
        """What the provider can do."""
        return self._provider.capabilities

    @property
    def provider_name(self) -> str:
        """The provider's short label, such as ``memory``."""
        return self._provider.name

    @property
    def settles_at_once(self) -> bool:
        """Whether settling is a call in this process; otherwise settlements travel in batches."""
        return self._settler.is_direct

    # Sending.

    async def send_message(self, queue_name: str, message: Message) -> str:
        """Send one message; return its id [C8].

        Raises QueueNotFoundError, MessageTooLargeError or QueueFullError before anything is sent. Where an attempt
        got no answer, the next one may send the message twice: a ``deduplication_id`` helps where there is one.
        """
        self._check_open()
        check_queue_name(queue_name)
        outgoing = (self._outgoing(message, "message"),)
        outcome = (await self._sender.send(queue_name, outgoing))[0]
        if outcome is not None:
            raise outcome
        return message.message_id

    async def send_messages(self, queue_name: str, messages: Iterable[Message]) -> list[str]:
        """Send many, split to the provider's limits; return their ids in input order [C9].

        It is not atomic: when some are not accepted, BatchSendError tells the outcome of each, in input order, as it
        was after the last attempt. What was accepted is never sent again; so what fails alone and is sent again comes
        after those that did not fail.
        A bad argument, a missing queue or a message that is too large is told before anything is sent.
        """
        self._check_open()
        check_queue_name(queue_name)
        if isinstance(messages, Message):
            raise ValidationError("messages", "must be several; send_message takes one")
        return await self.send_as_they_are(
            queue_name, [self._outgoing(message, f"messages[{place}]") for place, message in enumerate(messages)]
        )

    # Receiving.

    async def receive_messages(
        self, queue_name: str, max_count: int = 10, timeout: Seconds = 20.0
    ) -> list[ReceivedMessage]:
        """Return as soon as one message is there, at most ``max_count`` of them [C10].

        Parameters
        ----------
        max_count:
            From 1 to 10,000.
        timeout:
            Seconds or a timedelta to wait for the first message; an empty list when it is over.

        Messages of a session are not among them: ``accept_session`` gives those, to one holder at a time.
        Cancelling the call loses no message. Raises QueueNotFoundError.
        """
        check_queue_name(queue_name)
        lanes = self._links.main
        lane = lanes.get(queue_name) or await self._lane(queue_name, lanes, timeout)
        return await self.receive_on(lane, max_count, timeout)

    async def receive_message(self, queue_name: str, timeout: Seconds = 20.0) -> ReceivedMessage | None:
        """Return the next message, or None after ``timeout`` seconds."""
        check_queue_name(queue_name)
        lanes = self._links.main
        lane = lanes.get(queue_name) or await self._lane(queue_name, lanes, timeout)
        messages = await self.receive_on(lane, 1, timeout)
        return messages[0] if messages else None

    async def receive_deferred_messages(
        self, queue_name: str, sequence_numbers: Sequence[int]
    ) -> list[ReceivedMessage]:
        """Lock and return deferred messages by their sequence numbers, leaving out those that are not there."""
        self.require("defer")
        check_queue_name(queue_name)
        for number in sequence_numbers:
            check_sequence_number("sequence_numbers", number)
        return await self._links.receive_deferred(await self._lane(queue_name, self._links.main), sequence_numbers)

    async def peek_messages(
        self, queue_name: str, max_count: int = 10, *, from_sequence_number: int = 0
    ) -> list[ReceivedMessage]:
        """Show messages in order of sequence number, without locking them or counting a delivery [C20]."""
        return await self._peek(queue_name, max_count, from_sequence_number, dead_letter=False)

    # Settling.

    async def complete_message(self, message: Settleable) -> None:
        """Remove the message for good [C11]. Raises InvalidReceiptError when the right to settle it is gone."""
        _raise(await self.settle(receipt_of(message), COMPLETE))

    async def complete_messages(self, messages: Iterable[Settleable]) -> None:
        """Remove many for good. Raises BatchSettleError with an outcome for each when some could not be [C22]."""
        await self._settle_many(messages, COMPLETE)

    async def abandon_message(self, message: Settleable, delay: Seconds = 0.0) -> None:
        """Make the message visible again, at once or after ``delay`` seconds [C12]."""
        _raise(await self.settle(receipt_of(message), self._abandonment(delay)))

    async def abandon_messages(self, messages: Iterable[Settleable], delay: Seconds = 0.0) -> None:
        """Make many visible again. Raises BatchSettleError with an outcome for each when some could not be."""
        await self._settle_many(messages, self._abandonment(delay))

    async def dead_letter_message(self, message: Settleable, reason: str, description: str | None = None) -> None:
        """Move the message to the dead-letter queue, with the reason and the description [C15]."""
        _raise(await self.settle(receipt_of(message), Disposition.dead_letter(reason, description)))

    async def defer_message(self, message: Settleable) -> None:
        """Set the message aside; ``receive_deferred_messages`` gets it by its sequence number."""
        self.require("defer")
        _raise(await self.settle(receipt_of(message), DEFER))

    async def renew_lock(self, message: Settleable) -> datetime:
        """Extend the lock by its full duration; return its new end [C21]. Raises InvalidReceiptError."""
        outcome = (await self.renew_locks((message,)))[0]
        if isinstance(outcome, QueueRuntimeError):
            raise outcome
        return outcome

    async def renew_locks(self, messages: Iterable[Settleable]) -> list[datetime | QueueRuntimeError]:
        """Extend many locks, in one call a receiver; return for each, in order, the new end or the error."""
        receipts = [receipt_of(message) for message in messages]
        self._check_open()
        results: list[datetime | QueueRuntimeError] = [InvalidReceiptError(receipt, _GONE) for receipt in receipts]
        for lane, places in self._by_lane(receipts):
            ends = await lane.receiver.renew([receipts[place] for place in places])
            for place, end in zip(places, ends, strict=True):
                results[place] = end if isinstance(end, QueueRuntimeError) else utc(end)
        return results

    # Sessions.

    async def accept_session(
        self, queue_name: str, session_id: str | None = None, timeout: Seconds = 20.0
    ) -> Session | None:
        """Take a session: this one, or the next that has messages and no holder [C25, C26].

        Returns None when no session had messages by ``timeout`` seconds. Raises SessionLockedError when the session
        asked for is held. Its lock is renewed until the Session is closed [C27].
        """
        self._check_open()
        self.require("sessions")
        check_queue_name(queue_name)
        if session_id is not None:
            session_id = SessionId(session_id)
        accepted = await self._links.accept(queue_name, session_id, wait_seconds("timeout", timeout))
        return None if accepted is None else Session(self, *accepted)

    # Around the queue.

    def dead_letters(self, queue_name: str) -> DeadLetters:
        """Return the queue's dead letters: to read, count and re-drive [C16]."""
        check_queue_name(queue_name)
        return DeadLetters(self, queue_name)

    async def counts(self, queue_name: str) -> QueueCounts:
        """Return how many messages the queue holds, by state."""
        self._check_open()
        check_queue_name(queue_name)
        return await self._retrier.call(partial(self._provider.counts, queue_name))

    async def health(self, queue_name: str | None = None, timeout: Seconds = 5.0) -> Health:
        """Return what is wrong, for probes: connection, backlog, stalled consumers, open breakers, a blocked loop.

        Parameters
        ----------
        queue_name:
            The queue whose backlog to look at; those that have consumers by default. A backlog that grows while
            nothing is settled is seen when this is called now and then.
        timeout:
            Seconds to wait for the service.

        Never raises but for a bad argument: what cannot be found out is a problem too.
        """
        if queue_name is not None:
            check_queue_name(queue_name)
        return await self._checkup.examine(self._provider.name, queue_name, wait_seconds("timeout", timeout))

    async def create_queue(self, queue_name: str) -> None:
        """Create the queue; do nothing when it is there."""
        self._check_open()
        check_queue_name(queue_name)
        await self._retrier.call(partial(self._provider.create_queue, queue_name))

    async def close(self, timeout: Seconds = 30.0) -> None:
        """Settle what is under way, release every message still locked, and leave nothing behind [C23].

        Parameters
        ----------
        timeout:
            Seconds after which settlements that are still on the way, or tried again, are given up; so their messages
            come back. A service that does not answer does not keep a client from closing.

        Safe to call twice; a second caller waits for the first.
        """
        seconds = wait_seconds("timeout", timeout)
        self._closed = self._links.is_closed = True
        self._retrier.close()
        async with self._closing:
            try:
                if self._renewer is not None:
                    await self._renewer.close()
                await self._settler.close(seconds)
            finally:
                await self._links.close()
                await self._links.close_provider()

    # Within the package.

    def require(self, capability: str) -> None:
        """Raise CapabilityError unless the provider has this."""
        if not getattr(self._provider.capabilities, capability):
            raise CapabilityError(self._provider.name, capability)

    def on_locks_lost(self, listener: LostCallback) -> Callable[[], None]:
        """Have ``listener`` told of lost locks (see ``renewal.LostCallback``); return what takes it back."""
        self._lost_listeners.append(listener)
        return lambda: self._lost_listeners.remove(listener)

    def add_reporter(self, reporter: HealthReporter) -> Callable[[], None]:
        """Have ``health`` ask this consumer too; return what takes it back."""
        return self._checkup.add(reporter)

    async def send_as_they_are(self, queue_name: str, batch: Sequence[Message]) -> list[str]:
        """Send, asking for no session key: what comes back from the dead letters keeps the session that it had."""
        if not batch:
            return []
        outcomes = await self._sender.send(queue_name, batch)
        if any(outcomes):
            raise BatchSendError(
                [
                    message.message_id if outcome is None else outcome
                    for message, outcome in zip(batch, outcomes, strict=True)
                ]
            )
        return [message.message_id for message in batch]

    async def receive_dead_letters(self, queue_name: str, max_count: int, timeout: Seconds) -> list[ReceivedMessage]:
        """For ``DeadLetters``."""
        return await self.receive_on(
            await self._lane(queue_name, self._links.dead_letters, timeout), max_count, timeout
        )

    async def peek_dead_letters(
        self, queue_name: str, max_count: int, from_sequence_number: int
    ) -> list[ReceivedMessage]:
        """For ``DeadLetters``."""
        return await self._peek(queue_name, max_count, from_sequence_number, dead_letter=True)

    async def settle(self, receipt: Receipt, disposition: Disposition) -> Outcome:
        """Settle one message and return its outcome, for those who must not raise."""
        lane = self._lanes.get(receipt.receiver_id)
        if lane is None:
            return self._no_lane(receipt)
        receipts = (receipt,)
        outcome = (await lane.settle(disposition, receipts))[0]
        if outcome is None:
            self._settled[receipt.queue_name] = self._monotonic()
        if self._renewer is not None and (outcome is None or not outcome.is_transient):
            self._renewer.forget(receipt.receiver_id, receipts)
        return outcome

    async def settle_many(self, receipts: Sequence[Receipt], disposition: Disposition) -> list[Outcome]:
        """Settle many alike and return an outcome for each, in order, for those who must not raise."""
        lanes = self._by_lane(receipts)
        if len(lanes) == 1 and len(lanes[0][1]) == len(receipts):
            return await self._settle_on(lanes[0][0], disposition, receipts)
        outcomes: list[Outcome] = [self._no_lane(receipt) for receipt in receipts]
        for lane, places in lanes:
            settled = await self._settle_on(lane, disposition, [receipts[place] for place in places])
            for place, outcome in zip(places, settled, strict=True):
                outcomes[place] = outcome
        return outcomes

    def settle_soon(
        self, receipt: Receipt, disposition: Disposition, done: Callable[[Outcome], None]
    ) -> asyncio.Future[None]:
        """Settle one message together with others, and call ``done`` with its outcome."""
        lane = self._lanes.get(receipt.receiver_id)
        future = failed(self._no_lane(receipt)) if lane is None else lane.submit(disposition, receipt)

        def settled(future: asyncio.Future[None]) -> None:
            try:
                outcome = outcome_of(future)
            except BaseException as bug:
                outcome = unexpected(bug, self._provider.name)
            if outcome is None:
                self._settled[receipt.queue_name] = self._monotonic()
            if outcome is None or not outcome.is_transient:
                self.renew_no_more(receipt)
            done(outcome)

        future.add_done_callback(settled)
        return future

    def renew_no_more(self, receipt: Receipt) -> None:
        """Let the lock end: this message is settled, or nobody will settle it."""
        if self._renewer is not None:
            self._renewer.forget(receipt.receiver_id, (receipt,))

    async def receive_on(self, lane: Lane, max_count: int, timeout: Seconds) -> list[ReceivedMessage]:
        """Receive on a lane and have the locks renewed."""
        self._check_open()
        check_count("max_count", max_count)
        if self._links.is_supervised:
            return await self._links.receive(lane, max_count, wait_seconds("timeout", timeout))
        messages = await lane.receiver.receive(max_count, wait_seconds("timeout", timeout))
        if messages:
            self._links.watch(lane, messages)
        return messages

    async def close_session(self, lane: Lane) -> None:
        """For ``Session``: settle what is under way, then release it. Safe to call twice."""
        await self._links.close_session(lane)

    async def _peek(
        self, queue_name: str, max_count: int, from_sequence_number: int, *, dead_letter: bool
    ) -> list[ReceivedMessage]:
        self._check_open()
        self.require("peek")
        check_queue_name(queue_name)
        check_count("max_count", max_count)
        check_sequence_number("from_sequence_number", from_sequence_number)
        peek = partial(self._provider.peek, from_sequence_number=from_sequence_number, dead_letter=dead_letter)
        return await self._retrier.call(partial(peek, queue_name, max_count))

    async def _settle_on(self, lane: Lane, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        outcomes = await lane.settle(disposition, receipts)
        if None in outcomes:
            self._settled[lane.receiver.queue_name] = self._monotonic()
        if self._renewer is not None:
            if any(outcomes):  # what failed for a passing reason may be tried again, so its lock is kept
                pairs = zip(receipts, outcomes, strict=True)
                receipts = [receipt for receipt, outcome in pairs if outcome is None or not outcome.is_transient]
            self._renewer.forget(lane.receiver.id, receipts)
        return outcomes

    async def _settle_many(self, messages: Iterable[Settleable], disposition: Disposition) -> None:
        receipts = [receipt_of(message) for message in messages]
        self._check_open()
        outcomes = await self.settle_many(receipts, disposition)
        if any(outcomes):
            raise BatchSettleError(outcomes)

    def _no_lane(self, receipt: Receipt) -> QueueRuntimeError:
        return ClosedError("the client is closed") if self._closed else InvalidReceiptError(receipt, _GONE)

    def _by_lane(self, receipts: Sequence[Receipt]) -> list[tuple[Lane, list[int]]]:
        """The places of the receipts by the lane they belong to; those of closed receivers are left out."""
        places: dict[int, list[int]] = {}
        for place, receipt in enumerate(receipts):
            places.setdefault(receipt.receiver_id, []).append(place)
        return [(self._lanes[key], found) for key, found in places.items() if key in self._lanes]

    def _abandonment(self, delay: Seconds) -> Disposition:
        pause = wait_seconds("delay", delay)
        if pause == 0.0:
            return ABANDON
        self.require("abandon_delay")
        return Disposition(Action.ABANDON, delay=pause)

    def _outgoing(self, message: Message, field: str) -> Message:
        if not isinstance(message, Message):
            hint = "; use its .message()" if isinstance(message, ReceivedMessage) else ""
            raise ValidationError(field, f"must be a Message, not {type(message).__name__}{hint}")
        if self._session_key is not None:
            message = with_session(self._session_key, message, self._session_key_source)
        if self._is_limited:
            check_sendable(message, self._provider, self.clock)
        return message

    async def _lane(self, queue_name: str, lanes: dict[str, Lane], timeout: Seconds | None = None) -> Lane:
        lane = lanes.get(queue_name)
        if lane is None:
            seconds = math.inf if timeout is None else wait_seconds("timeout", timeout)
            lane = await self._links.open(queue_name, lanes, seconds)
        return lane

    def _locks_lost(self, receiver_id: int, receipts: Sequence[Receipt], error: QueueRuntimeError | None) -> None:
        if isinstance(error, SessionLockLostError):
            self._links.session_lost(receiver_id)
        for listener in list(self._lost_listeners):
            listener(receiver_id, receipts, error)

    def _is_settling(self, receipt: Receipt) -> bool:
        lane = self._lanes.get(receipt.receiver_id)
        return lane is not None and lane.is_settling(receipt)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the client is closed")


_GONE = "its receiver is not open in this client"


def _raise(outcome: Outcome) -> None:
    if outcome is not None:
        raise outcome
