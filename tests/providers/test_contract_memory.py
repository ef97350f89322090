"""The in-memory provider under the whole contract: settled directly, and through the batches."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from contract_whole import WholeContract
from harness import Harness, Place, QueueSettings, bodies, numbered, turns

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import BatchSendError, QueueFullError
from queue_runtime.message import Message
from queue_runtime.providers.base import Capabilities
from queue_runtime.sessions import SessionKey

NAMES = itertools.count()


class MemoryHarness(Harness):
    capabilities = Capabilities(
        sessions=True,
        session_state=True,
        peek=True,
        defer=True,
        deduplication=True,
        abandon_delay=True,
        sequence_numbers=True,
        dead_letter_on_expiration=True,
        max_message_size=1_048_576,
        max_delay=None,
        settles_in_process=True,
        renews_from_threads=True,
    )
    lock_duration = 30.0
    unit = 5.0
    patience = 0.0

    def __init__(self, settlement: str) -> None:
        self.settlement = settlement
        self.clock = ManualClock()
        self.configs: dict[QueueClient, InMemoryConfig] = {}

    async def open(
        self,
        settings: QueueSettings | None = None,
        *,
        max_lock_renewal: float = 0.0,
        session_key: SessionKey | None = None,
    ) -> Place:
        settings = settings or QueueSettings()
        return Place(
            self.client(
                session_key,
                max_delivery_count=settings.max_delivery_count,
                dead_letter_on_expiration=settings.dead_letter_on_expiration,
                deduplication_window=settings.deduplication_window,
                lock_duration=settings.lock_duration or self.lock_duration,
                session_lock_duration=settings.session_lock_duration or self.lock_duration,
                max_lock_renewal=max_lock_renewal,
            ),
            "orders",
        )

    def client(self, session_key: SessionKey | None = None, **settings: Any) -> QueueClient:
        values = {"name": f"contract-{next(NAMES)}", "settlement": self.settlement, "settle_interval": 0.001}
        config = InMemoryConfig(**{**values, **settings})
        client = QueueClient(config, session_key=session_key, clock=self.clock)
        self.configs[client] = config
        return client

    async def another(self, place: Place, **client: Any) -> QueueClient:
        config = self.configs[place.client]
        other = QueueClient(config, clock=self.clock, **client)
        self.configs[other] = config
        return other

    async def absent(self) -> Place:
        return Place(self.client(auto_create=False, queues=("there",)), "absent")

    async def pass_time(self, seconds: float) -> None:
        await self.clock.advance(seconds)

    def now(self) -> float:
        return self.clock.time()

    async def close(self) -> None:
        for client in self.configs:
            await client.close()


@pytest.fixture(params=["auto", "batched"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[MemoryHarness]:
    harness = MemoryHarness(request.param)
    yield harness
    await harness.close()


class TestContract(WholeContract):
    pass


class TestMemoryAlone:
    """What only this provider has: a capacity, shared names, the real clock."""

    async def test_a_full_queue_refuses(self, harness: MemoryHarness) -> None:
        """[C9, C39] An outcome for each, in input order; what was accepted is there."""
        client = harness.client(capacity=3)
        place = Place(client, "q")
        messages = [Message(body=body) for body in numbered(5)]
        with pytest.raises(BatchSendError) as caught:
            await client.send_messages("q", messages)
        assert caught.value.outcomes[:3] == tuple(message.message_id for message in messages[:3])
        assert [type(outcome) for outcome in caught.value.outcomes[3:]] == [QueueFullError] * 2
        assert not caught.value.is_transient
        with pytest.raises(QueueFullError) as full:
            await client.send_message("q", messages[3])
        assert full.value.capacity == 3
        received = await harness.take(place, 3)
        assert bodies(received) == numbered(3)
        with pytest.raises(QueueFullError):
            await client.send_message("q", messages[3])  # what is locked takes room as well
        await client.complete_message(received[0])
        await client.send_message("q", messages[3])

    async def test_a_full_queue_waits(self, harness: MemoryHarness) -> None:
        """[C39] In the order of the calls; a cancelled sender gives its place up."""
        client = harness.client(capacity=2, on_full="wait")
        place = Place(client, "q")
        await harness.send(place, b"0", b"1")
        senders = [asyncio.create_task(harness.send(place, b"%d" % number)) for number in range(2, 6)]
        await turns(5)
        assert not any(sender.done() for sender in senders)
        senders[1].cancel()
        arrived = []
        for _ in range(5):
            received = await harness.take_one(place)
            arrived.append(received.body)
            await client.complete_message(received)
            await turns(5)
        assert arrived == [b"0", b"1", b"2", b"4", b"5"]
        await asyncio.wait(senders)

    async def test_nobody_passes_a_sender_that_waits(self, harness: MemoryHarness) -> None:
        """[C39] Not even one that comes when there is room again, before the waiting one has run."""
        client = harness.client(capacity=1, on_full="wait")
        place = Place(client, "q")
        await harness.send(place, b"0")
        first = asyncio.create_task(harness.send(place, b"1"))
        await turns(5)
        received = await harness.take_one(place)

        async def make_room_and_take_it() -> None:
            await client.complete_message(received)
            await harness.send(place, b"2")

        second = asyncio.create_task(make_room_and_take_it())
        await first
        for expected in (b"1", b"2"):
            message = await harness.take_one(place)
            assert message.body == expected
            await client.complete_message(message)
            await turns(5)
        await second

    async def test_names_share_queues(self, harness: MemoryHarness) -> None:
        one = harness.client()
        two = await harness.another(Place(one, "q"))
        stranger = harness.client()
        await one.send_message("q", Message(body=b"x"))
        assert await stranger.receive_message("q", 0) is None
        received = await two.receive_message("q", 0)
        assert received is not None

    @pytest.mark.both_loops
    async def test_the_real_clock(self, harness: MemoryHarness) -> None:
        """[C10] ±100 ms, on a session too; a due message ends the wait."""
        config = InMemoryConfig(lock_duration=0.1, max_lock_renewal=0)
        async with QueueClient(config) as client:
            session = await client.accept_session("q", "s")
            assert session is not None
            started = time.monotonic()

            async def lateness() -> float:
                """Of the machine itself: a busy one wakes nobody in time."""
                await asyncio.sleep(0.2)
                return time.monotonic() - started - 0.2

            late, *results = await asyncio.gather(
                lateness(),
                client.receive_messages("q", 1, 0.2),
                session.receive_messages(1, 0.2),
                client.accept_session("q", None, 0.2),
                client.dead_letters("q").receive_message(0.2),
            )
            assert 0.2 <= time.monotonic() - started + 0.001 < 0.3 + late
            assert results == [[], [], None, None]
            await client.send_message("q", Message(body=b"x", delay=0.05))
            started = time.monotonic()
            for _ in range(2):  # first by its delay, then by the end of its lock
                assert await client.receive_message("q", 5) is not None
            assert 0.15 <= time.monotonic() - started + 0.001 < 2.0, "woken, and not by the end of the wait"

    @pytest.mark.both_loops
    async def test_renewal_on_the_real_clock(self, harness: MemoryHarness) -> None:
        """[C21]"""
        config = InMemoryConfig(lock_duration=0.3, settlement=harness.settlement)  # type: ignore[arg-type]
        async with QueueClient(config) as client:
            await client.send_messages("q", [Message(body=body) for body in numbered(20)])
            received = await client.receive_messages("q", 20, 0)
            assert await client.receive_messages("q", 20, 0.7) == []
            await client.complete_messages(received)
