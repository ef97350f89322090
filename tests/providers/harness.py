"""What the contract's tests ask of a provider under test: a client, a queue with settings, and time that passes."""

import abc
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from queue_runtime.client import QueueClient, Session
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.providers.base import Capabilities
from queue_runtime.sessions import SessionKey


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """The settings of one queue that every provider has. Durations in seconds; None: the harness's own."""

    max_delivery_count: int = 5
    dead_letter_on_expiration: bool = False
    deduplication_window: float = 300.0
    lock_duration: float | None = None
    session_lock_duration: float | None = None


class Place(NamedTuple):
    """A client and a queue to work on."""

    client: QueueClient
    queue: str


class Harness(abc.ABC):
    """One provider under test. ``close`` closes every client that it made."""

    capabilities: Capabilities
    """Declared here once more: a provider that silently loses one fails."""
    lock_duration: float
    """Seconds of a lock, where QueueSettings does not say."""
    unit: float
    """Seconds of a delay that is long enough to be told from none."""
    patience: float
    """Seconds after which a message that should be there counts as absent."""

    @abc.abstractmethod
    async def open(
        self,
        settings: QueueSettings | None = None,
        *,
        max_lock_renewal: float = 0.0,
        session_key: SessionKey | None = None,
    ) -> Place:
        """Make an empty queue and a client. Renewal is off unless asked for, so that locks can run out.

        Raises CapabilityError for a setting that the provider cannot have.
        """

    @abc.abstractmethod
    async def another(self, place: Place, **client: Any) -> QueueClient:
        """Make a second client of the same queues."""

    @abc.abstractmethod
    async def absent(self) -> Place:
        """Return a client and the name of a queue that does not exist."""

    @abc.abstractmethod
    async def pass_time(self, seconds: float) -> None:
        """Let so much time pass, for the service and for the client."""

    @abc.abstractmethod
    def now(self) -> float:
        """The wall-clock time of the service, in epoch seconds."""

    @abc.abstractmethod
    async def close(self) -> None: ...

    async def moments(self, count: int) -> None:
        """Wait for so many moments: with none of them no answer has come yet, and with five most have."""
        await turns(count)

    async def pass_lock(self) -> None:
        """Let more time pass than a lock lasts."""
        await self.pass_time(self.lock_duration * 1.01)

    async def take(self, source: Place | Session, count: int = 1) -> list[ReceivedMessage]:
        """Receive exactly ``count`` messages, in as many calls as the provider wants."""
        received: list[ReceivedMessage] = []
        while len(received) < count:
            batch = await self._receive(source, count - len(received))
            assert batch, f"{len(received)} of {count} messages are there"
            received += batch
        return received

    async def take_one(self, source: Place | Session) -> ReceivedMessage:
        return (await self.take(source))[0]

    async def nothing_from(self, source: Place | Session) -> None:
        """Check that nothing can be received."""
        assert await self._receive(source, 10) == []

    async def dead(self, place: Place, count: int = 1) -> list[ReceivedMessage]:
        """Receive exactly ``count`` dead letters."""
        letters = place.client.dead_letters(place.queue)
        received: list[ReceivedMessage] = []
        while len(received) < count:
            batch = await letters.receive_messages(count - len(received), self.patience)
            assert batch, f"{len(received)} of {count} dead letters are there"
            received += batch
        return received

    async def send(self, place: Place, *bodies: bytes, **fields: Any) -> list[str]:
        return await place.client.send_messages(place.queue, [Message(body=body, **fields) for body in bodies])

    async def session(self, place: Place, session_id: str | None = None) -> Session:
        session = await place.client.accept_session(place.queue, session_id, self.patience)
        assert session is not None, "a session is there"
        return session

    async def _receive(self, source: Place | Session, count: int) -> list[ReceivedMessage]:
        if isinstance(source, Session):
            return await source.receive_messages(count, self.patience)
        return await source.client.receive_messages(source.queue, count, self.patience)


def bodies(messages: Sequence[ReceivedMessage]) -> list[bytes]:
    return [message.body for message in messages]


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


async def turns(count: int) -> None:
    """Give the event loop so many turns."""
    for _ in range(count):
        await asyncio.sleep(0)
