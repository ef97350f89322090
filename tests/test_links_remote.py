"""The same with a broker in another process, whose connections really break [C37, C21]."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from remote.running import RunningBroker

from queue_runtime import links
from queue_runtime.client import QueueClient
from queue_runtime.consumer import Consumer
from queue_runtime.errors import QueueTimeoutError
from queue_runtime.handling import ConsumerConfig, ConsumerStats
from queue_runtime.message import Message, ReceivedMessage

COUNT = 60


async def consumed(client: QueueClient, disturb: Callable[[int], Any], count: int = COUNT) -> ConsumerStats:
    """Send to a queue and its sessions and handle everything, while ``disturb`` is called for each new message."""
    seen: set[bytes] = set()

    async def handle(message: ReceivedMessage) -> None:
        if message.body not in seen:
            seen.add(message.body)
            await disturb(len(seen))
        if len(seen) == count:
            consumer.stop()

    sessions = [None, None, "a", "b"]
    await client.send_messages(
        "q", [Message(body=b"%d" % number, session_id=sessions[number % 4]) for number in range(count)]
    )
    consumer = Consumer(client, "q", handle, ConsumerConfig(receive_timeout=1.0, max_batch_size=5, prefetch=8))
    async with asyncio.timeout(30):
        return await consumer.run()


@pytest.mark.both_loops
@pytest.mark.parametrize("receivers", ["reopen", "end"])
async def test_a_consumer_outlives_broken_connections(broker: RunningBroker, receivers: str) -> None:
    """And what its broker ends of its receivers; its client is not rebuilt."""
    config = broker.config(receivers=receivers, lock_duration=2.0, session_lock_duration=2.0, max_delivery_count=100)

    async def disturb(number: int) -> None:
        if number % 20 == 10:
            await broker.in_thread("ask", "drop", space=config.space)
        if number % 20 == 0:
            await broker.in_thread("ask", "detach", queue="q", space=config.space)

    async with QueueClient(config) as client:
        await consumed(client, disturb)
        while (counts := await client.counts("q")).in_flight:
            await asyncio.sleep(0.01)
        assert counts.dead_lettered == 0


@pytest.fixture
def mine(own_broker: Callable[..., RunningBroker]) -> RunningBroker:
    return own_broker()


@pytest.fixture
def slow(own_broker: Callable[..., RunningBroker]) -> RunningBroker:
    return own_broker(latency=0.002)


async def test_a_consumer_outlives_its_broker(mine: RunningBroker) -> None:
    """Killed, and started again without what it had: what is sent then is handled, by the same client."""
    seen: list[bytes] = []

    async def handle(message: ReceivedMessage) -> None:
        seen.append(message.body)

    async def both(client: QueueClient, body: bytes) -> None:
        await client.send_messages("q", [Message(body=body), Message(body=body, session_id="s")])
        async with asyncio.timeout(20):
            while seen.count(body) < 2:
                await asyncio.sleep(0.01)

    async with QueueClient(mine.config()) as client:
        consumer = Consumer(client, "q", handle, ConsumerConfig(receive_timeout=1.0))
        running = asyncio.create_task(consumer.run())
        await both(client, b"before")
        await mine.in_thread("kill")
        await asyncio.sleep(0.1)
        assert not running.done()
        await mine.in_thread("start")
        await both(client, b"after")
        consumer.stop()
        await running


async def test_a_receive_that_is_never_answered_is_given_up(
    mine: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[C38] By the client, where the provider waits for ever."""
    monkeypatch.setattr(links, "GRACE", 0.2)
    async with QueueClient(mine.config(request_timeout=3600.0)) as client:
        assert await client.receive_message("q", 0) is None
        await mine.in_thread("ask", "mute", method="receive", count=1)
        with pytest.raises(QueueTimeoutError):
            await client.receive_message("q", 0.1)
        await client.send_message("q", Message(body=b"x"))
        message = await client.receive_message("q", 1)
        assert message is not None
        await client.complete_message(message)


async def test_renewals_that_race_settlements_lose_nothing(
    slow: RunningBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """[C21] Settlements of a round trip each, at the time when the locks are renewed."""
    config = slow.config(lock_duration=0.4, settle_batch_size=5, settle_concurrency=1, settle_interval=0.001)
    lost: list[Any] = []
    async with QueueClient(config) as client:
        client.on_locks_lost(lambda *told: lost.append(told))
        await client.send_messages("q", [Message(body=b"x") for _ in range(300)])
        messages = await client.receive_messages("q", 300, 1)
        with caplog.at_level(logging.WARNING):
            await asyncio.sleep(0.15)
            await client.complete_messages(messages)
        statistics = await slow.in_thread("ask", "statistics", space=config.space)
        assert len(messages) == statistics["settle"][1] == 300
        assert statistics["renew"][0] >= 1
    assert lost == []
    assert caplog.text == ""
