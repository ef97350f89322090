"""The provider that reaches the broker: one connection, many requests on it at once, made again when it is lost."""

import asyncio
import contextlib
import itertools
import os
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from queue_runtime import decode_envelope, encode_envelope
from queue_runtime.clock import Clock
from queue_runtime.errors import (
    CapabilityError,
    ClosedError,
    ConnectionFailedError,
    InvalidReceiptError,
    QueueRuntimeError,
    QueueTimeoutError,
    SessionLockLostError,
)
from queue_runtime.message import Message, Receipt, ReceivedMessage
from queue_runtime.providers.base import (
    ABANDON,
    Capabilities,
    Disposition,
    Outcome,
    Provider,
    QueueCounts,
    Receiver,
    SessionReceiver,
)
from remote.config import REMOVABLE, RemoteConfig
from remote.link import Link

RELEASE_AFTER = 0.5
"""Seconds that what came too late for its receive waits for another one, before it goes back to the queue."""
_numbers = itertools.count((os.getpid() << 24) + (1 << 48))
"""Of receivers: unlike any other provider's, and any other process's."""


class RemoteProvider:
    """Queues of a broker in another process.

    Thread-safety: for one event loop's thread only; there, any number of tasks may use it at once.
    """

    def __init__(self, config: RemoteConfig, *, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self._client = uuid.uuid4().hex
        self._link: Link | None = None
        self._connecting = asyncio.Lock()
        self._receivers: set[RemoteReceiver] = set()
        self._closed = False
        can: dict[str, Any] = {name: name not in config.without for name in REMOVABLE}
        self.capabilities = Capabilities(
            **can,
            max_message_size=config.max_message_size or 1_048_576,
            max_delay=config.max_delay or None,  # type: ignore[arg-type]
            settles_in_process=False,
            shared_between_processes=True,
        )

    @property
    def name(self) -> str:
        return "remote"

    @property
    def current(self) -> Link | None:
        """The connection, if it is up."""
        return self._link if self._link is not None and self._link.is_up else None

    async def link(self) -> Link:
        """Return the connection, made anew when there is none."""
        link = self._link
        if link is None or not link.is_up:
            async with self._connecting:
                self._check_open()
                link = self._link
                if link is None or not link.is_up:
                    link = self._link = await self._connect()
        self._check_open()
        return link

    async def _connect(self) -> Link:
        config = self.config
        link: Link | None = None
        try:
            async with asyncio.timeout(config.connect_timeout):  # type: ignore[arg-type]
                loop = asyncio.get_running_loop()
                _, link = await loop.create_unix_connection(lambda: Link(config.retry_after), config.path)  # type: ignore
                link.attachment = await link.request(
                    "hello", self._client, config.space, config.of_the_space, config.linger, timeout=60.0
                )
        except (OSError, TimeoutError, QueueRuntimeError, asyncio.CancelledError) as error:
            if link is not None:
                link.fail(ConnectionFailedError("given up"))
                await link.close()
            if isinstance(error, QueueRuntimeError | asyncio.CancelledError):
                raise
            failure = ConnectionFailedError(f"cannot reach the broker: {type(error).__name__}")
            failure.retry_after = config.retry_after  # type: ignore[assignment]
            raise failure from error
        return link

    async def request(self, method: str, *arguments: Any, wait: float = 0.0, **options: Any) -> Any:
        link = await self.link()
        return await link.request(method, *arguments, timeout=wait + self.request_timeout, **options)

    @property
    def request_timeout(self) -> float:
        return self.config.request_timeout  # type: ignore[return-value]

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the provider is closed")

    async def send(self, queue_name: str, messages: Sequence[Message]) -> list[Outcome]:
        self._check_open()
        outcomes: list[Outcome] = await self.request("send", queue_name, [encode_envelope(m) for m in messages])
        return outcomes

    async def open_receiver(self, queue_name: str, *, dead_letter: bool = False) -> Receiver:
        receiver = RemoteReceiver(self, queue_name, next(_numbers), dead_letter)
        await receiver.attached()
        self._receivers.add(receiver)
        return receiver

    async def accept_session(self, queue_name: str, session_id: str | None, timeout: float) -> SessionReceiver | None:
        link = await self.link()
        number = next(_numbers)

        def late(found: Any) -> None:
            if found is not None:
                link.tell("close", number)

        found = await link.request(
            "accept",
            number,
            queue_name,
            None if session_id is None else str(session_id),
            timeout,
            timeout=timeout + self.request_timeout,
            late=late,
        )
        if found is None:
            return None
        session = RemoteSessionReceiver(self, queue_name, number, link.attachment, found)
        if self._closed:  # since the answer was sent
            raise ClosedError("the provider is closed")
        self._receivers.add(session)
        return session

    async def peek(
        self, queue_name: str, max_count: int, *, from_sequence_number: int = 0, dead_letter: bool = False
    ) -> list[ReceivedMessage]:
        shown = await self.request("peek", queue_name, max_count, from_sequence_number, dead_letter)
        return [self.unpacked(found, None) for found in shown]

    async def counts(self, queue_name: str) -> QueueCounts:
        return QueueCounts(**await self.request("counts", queue_name))

    async def create_queue(self, queue_name: str) -> None:
        await self.request("create", queue_name)

    async def control(self, fault: str, **options: Any) -> Any:
        """For tests: have the broker do this; see the README."""
        return await self.request("control", fault, options)

    async def close(self) -> None:
        self._closed = True
        async with self._connecting:
            link, self._link = self._link, None
        for receiver in list(self._receivers):
            receiver.end()
        if link is not None:
            if link.is_up:
                with contextlib.suppress(QueueRuntimeError):  # the broker notices by itself
                    await link.request("bye", timeout=self.request_timeout)
            link.fail(ClosedError("the provider is closed"))
            await link.close()

    def unpacked(self, found: tuple[Any, ...], receipt: Receipt | None) -> ReceivedMessage:
        """Return a delivery as it was before it travelled."""
        envelope, _, count, enqueued, first, delivered, locked, number, reason, description = found
        return ReceivedMessage(
            message=decode_envelope(envelope),
            receipt=receipt,
            delivery_count=count,
            enqueued_at=enqueued,
            first_delivered_at=first,
            delivered_at=delivered,
            locked_until=locked,
            sequence_number=number if self.capabilities.sequence_numbers else None,
            dead_letter_reason=reason,
            dead_letter_description=description,
        )

    def forget(self, receiver: "RemoteReceiver") -> None:
        self._receivers.discard(receiver)


class RemoteReceiver:
    """A link to a queue's messages without a session, or to its dead letters."""

    def __init__(self, provider: RemoteProvider, queue_name: str, number: int, dead_letter: bool = False) -> None:
        self.id = number
        self.queue_name = queue_name
        self.lock_duration = 0.0
        self._provider = provider
        self._dead_letter = dead_letter
        self._attachment: int | None = None
        self._closed = False
        self._waiting: dict[int, int] = {}
        """Requests for messages: how many each may have."""
        self._returned: deque[tuple[Any, ...]] = deque()
        """What came too late for the receive that asked for it."""
        self._release: asyncio.TimerHandle | None = None

    async def attached(self) -> Link:
        """Return a connection on which the broker knows this receiver."""
        self._check_open()
        link = await self._provider.link()
        if link.attachment != self._attachment:
            if self._attachment is not None and self._provider.config.receivers == "end":
                raise ClosedError("the connection of this receiver was lost")
            self.lock_duration = await link.request(
                "open", self.id, self.queue_name, self._dead_letter, timeout=self._provider.request_timeout
            )
            self._attachment = link.attachment
            self._returned.clear()
        self._check_open()
        return link

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the receiver is closed")

    async def receive(self, max_count: int, timeout: float) -> list[ReceivedMessage]:
        link = await self.attached()
        found = self._take_returned(max_count)
        if not found:
            mine = 0

            def begun(number: int) -> None:
                nonlocal mine
                mine = number
                self._waiting[number] = max_count

            try:
                found = await link.request(
                    "receive",
                    self.id,
                    max_count,
                    timeout,
                    timeout=timeout + self._provider.request_timeout,
                    late=self._came_late(link),
                    begun=begun,
                )
            finally:
                self._waiting.pop(mine, None)
        return self._unpacked(found, link.attachment)

    async def receive_deferred(self, sequence_numbers: Sequence[int]) -> list[ReceivedMessage]:
        link = await self.attached()
        found = await link.request("deferred", self.id, list(sequence_numbers), timeout=self._provider.request_timeout)
        return self._unpacked(found, link.attachment)

    def _unpacked(self, found: Sequence[tuple[Any, ...]], attachment: int) -> list[ReceivedMessage]:
        unpacked = self._provider.unpacked
        return [unpacked(one, Receipt(self.queue_name, (attachment, one[1]), self.id)) for one in found]

    def _came_late(self, link: Link) -> Callable[[Any], None]:
        def late(found: Any) -> None:
            if not found or not link.is_up or self._closed or link.attachment != self._attachment:
                return
            self._returned.extend(found)
            while self._returned and self._waiting:
                number = next(iter(self._waiting))
                wanted = self._waiting.pop(number)
                again = self._take_returned(wanted)
                if again and not link.divert(number, again, late):
                    self._returned.extendleft(reversed(again))
            if self._returned and self._release is None:
                self._release = asyncio.get_running_loop().call_later(RELEASE_AFTER, self._release_returned, link)

        return late

    def _take_returned(self, count: int) -> list[tuple[Any, ...]]:
        """Take of what came late, leaving out what is not locked any more."""
        now = self._provider.clock.time()
        taken: list[tuple[Any, ...]] = []
        while self._returned and len(taken) < count:
            found = self._returned.popleft()
            if found[6] > now:
                taken.append(found)
        return taken

    def _release_returned(self, link: Link) -> None:
        self._release = None
        tokens = [found[1] for found in self._returned]
        self._returned.clear()
        if tokens and link.attachment == self._attachment:
            link.tell("settle", self.id, ABANDON, tokens)

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        return await self._for_each("settle", receipts, disposition)

    async def renew(self, receipts: Sequence[Receipt]) -> list[float | QueueRuntimeError]:
        return await self._for_each("renew", receipts)

    def renew_from_thread(self, receipts: Sequence[Receipt]) -> list[float | QueueRuntimeError]:
        raise CapabilityError("remote", "renews_from_threads")

    async def _for_each(self, method: str, receipts: Sequence[Receipt], *arguments: Any) -> list[Any]:
        """Ask about receipts; those of a connection that was lost, with all that it held, are not asked about."""
        link = await self._provider.link()
        attachment = link.attachment
        answers: list[Any] = [None] * len(receipts)
        places, tokens = [], []
        for place, receipt in enumerate(receipts):
            match receipt.token:
                case (int(of), token) if of == attachment and receipt.receiver_id == self.id and not self._closed:
                    places.append(place)
                    tokens.append(token)
                case _:
                    answers[place] = self._invalid(receipt)
        if tokens:
            timeout = self._provider.request_timeout
            outcomes = await link.request(method, self.id, *arguments, tokens, timeout=timeout)
            for place, outcome in zip(places, outcomes, strict=True):
                is_invalid = isinstance(outcome, InvalidReceiptError)  # a receipt does not travel whole
                answers[place] = InvalidReceiptError(receipts[place]) if is_invalid else outcome
        return answers

    def _invalid(self, receipt: Receipt) -> QueueRuntimeError:
        return InvalidReceiptError(receipt, "it is of another receiver, or its connection was lost")

    def end(self) -> None:
        """Be closed, without a word to the broker."""
        self._closed = True
        self._returned.clear()
        if self._release is not None:
            self._release.cancel()
        self._provider.forget(self)

    async def close(self) -> None:
        if self._closed:
            return
        self.end()
        link = self._provider.current
        if link is not None and link.attachment == self._attachment:
            with contextlib.suppress(ConnectionFailedError, QueueTimeoutError):  # the broker notices by itself
                await link.request("close", self.id, timeout=self._provider.request_timeout)


class RemoteSessionReceiver(RemoteReceiver):
    """A link to one session, which it holds until its connection is lost."""

    def __init__(
        self, provider: RemoteProvider, queue_name: str, number: int, attachment: int, found: tuple[Any, ...]
    ) -> None:
        super().__init__(provider, queue_name, number)
        self._attachment = attachment
        self.session_id, self.lock_duration, self.session_lock_duration, self.locked_until = found

    async def attached(self) -> Link:
        self._check_open()
        link = await self._provider.link()
        if link.attachment != self._attachment:
            raise SessionLockLostError(self.session_id)
        return link

    def _invalid(self, receipt: Receipt) -> QueueRuntimeError:
        return super()._invalid(receipt) if self._closed else SessionLockLostError(self.session_id)

    async def renew_session(self) -> float:
        end: float = await self._ask("renew_session")
        self.locked_until = end
        return end

    def renew_session_from_thread(self) -> float:
        raise CapabilityError("remote", "renews_from_threads")

    async def get_state(self) -> bytes | None:
        state: bytes | None = await self._ask("get_state")
        return state

    async def set_state(self, state: bytes | None) -> None:
        await self._ask("set_state", state)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        link = await self.attached()
        return await link.request(method, self.id, *arguments, timeout=self._provider.request_timeout)


if TYPE_CHECKING:

    def _fits(provider: RemoteProvider) -> Provider:
        return provider
