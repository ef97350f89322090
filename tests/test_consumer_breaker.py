"""A consumer's circuit breaker [C35] and retry policy [C34]: an outage downstream fills no dead-letter queue."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from working import QUEUE, messages, running

from queue_runtime import (
    BreakerConfig,
    BreakerState,
    Consumer,
    ConsumerConfig,
    ExponentialRetry,
    FixedRetry,
    InMemoryConfig,
    ManualClock,
    Message,
    QueueClient,
    ReceivedMessage,
    RejectMessage,
    RetryMessage,
)
from queue_runtime.clock import settle_tasks


class Downstream:
    """What the handler depends on; it is down until it is told otherwise."""

    def __init__(self) -> None:
        self.is_up = False
        self.calls: list[tuple[bytes, int]] = []
        self.running = self.most = 0

    async def handle(self, message: ReceivedMessage) -> None:
        self.calls.append((message.body, message.delivery_count))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if not self.is_up:
            raise ConnectionError("down")


@pytest.mark.parametrize("session", [False, True], ids=["plain", "sessions"])
@pytest.mark.parametrize("settlement", ["auto", "batched"])
async def test_an_outage_costs_no_deliveries(session: bool, settlement: Any) -> None:
    """Ten minutes of it: the fetch pauses, single probes every 30 s, nothing is dead-lettered, order is kept."""
    clock, downstream = ManualClock(), Downstream()
    config = InMemoryConfig(settlement=settlement, settle_interval=0.001, lock_duration=30, max_lock_renewal=3600)
    async with QueueClient(config, clock=clock) as client:
        sent = [Message(body=b"%d" % number, session_id=f"s{number % 4}" if session else None) for number in range(200)]
        await client.send_messages(QUEUE, sent)
        consumer_config = ConsumerConfig(
            max_concurrency=4, prefetch=20, breaker=BreakerConfig(failures=5, open_for=30, successes=3)
        )
        consumer = Consumer(client, QUEUE, downstream.handle, consumer_config)
        async with running(consumer):
            breaker = consumer._runner.breaker
            assert breaker is not None
            while breaker.state is BreakerState.CLOSED:
                await clock.advance(0.01)
                await asyncio.sleep(0.001)  # for the batches, whose clock is the real one
            await clock.advance(20)
            first = len(downstream.calls)
            assert 5 <= first <= 8, "five failures in a row, and who was under way"
            received = consumer.stats.received
            for _ in range(600):
                await clock.advance(1)
            probes = len(downstream.calls) - first
            assert 15 <= probes <= 20, "one each time it is half-open"
            assert consumer.stats.received == received <= 28, "nothing was fetched meanwhile"
            downstream.is_up = True
            downstream.most = 0
            before = len(downstream.calls)
            await clock.advance(31)
            for _ in range(200):
                await asyncio.sleep(0.001)
                await clock.advance(0.1)
                if consumer.stats.completed == 200:
                    break
            assert consumer.stats.completed == 200
            assert consumer.stats.dead_lettered == 0
        deliveries = Counter(count for _, count in downstream.calls)
        assert max(deliveries) <= 2, "a delivery for those that failed before it opened, and none after"
        assert downstream.most > 1 or session, "closed, it works side by side again"
        if session:
            done: dict[int, list[int]] = {}
            for body, _ in downstream.calls[before:]:
                done.setdefault(int(body) % 4, []).append(int(body))
            for numbers in done.values():
                assert numbers == sorted(numbers)


async def test_probes_are_single() -> None:
    """Ten are held when it is half-open: one is tried, and then the next, until three have gone well."""
    clock, downstream = ManualClock(), Downstream()
    async with QueueClient(InMemoryConfig(max_lock_renewal=3600), clock=clock) as client:
        await client.send_messages(QUEUE, messages(10))
        config = ConsumerConfig(max_concurrency=10, min_batch_size=10, breaker=BreakerConfig(failures=10, open_for=5))
        together: list[int] = []

        async def handle(message: ReceivedMessage) -> None:
            if downstream.is_up:
                together.append(consumer.stats.running)
            await downstream.handle(message)

        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await clock.advance(1)
            assert (len(downstream.calls), downstream.most) == (10, 10)
            assert consumer.stats.waiting == 10
            downstream.is_up = True
            await clock.advance(5)
            await settle_tasks(200)
            assert consumer.stats.completed == 10
        assert together[:3] == [1, 1, 1]
        assert max(together[3:]) > 1


async def test_a_probe_that_finds_nothing_fetches_one() -> None:
    """With nothing held, half-open means a receive of one message."""
    clock = ManualClock()
    sizes: list[int] = []
    fail = True

    async def handle(message: ReceivedMessage) -> None:
        if fail:
            raise ConnectionError("down")

    async with QueueClient("memory://", clock=clock) as client:
        config = ConsumerConfig(
            breaker=BreakerConfig(failures=1, open_for=10, successes=2),
            min_batch_size=5,
            source="queue",
            receive_timeout=1,
        )
        real = client.receive_messages

        async def receive(queue: str, count: int = 10, timeout: Any = 20.0) -> Any:
            sizes.append(count)
            return await real(queue, count, timeout)

        client.receive_messages = receive  # type: ignore[method-assign]
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await client.send_message(QUEUE, Message(body=b"x"))
            await settle_tasks()
            assert consumer.stats.running == 0
            assert consumer.stats.waiting == 1, "held until it may be tried again"
            fail = False
            sizes.clear()
            await clock.advance(11)
            assert consumer.stats.completed == 1
            assert set(sizes) == {1}, "half-open still: two must succeed"
            sizes.clear()
            await client.send_messages(QUEUE, messages(20))
            await settle_tasks(100)
            assert min(sizes) > 1
            assert consumer.stats.completed == 21


@pytest.mark.parametrize(
    ("error", "opens"),
    [(ConnectionError(), True), (RejectMessage("Bad"), False), (RetryMessage(0), False), (ValueError(), False)],
    ids=["counted", "rejected", "put off", "not counted"],
)
async def test_what_opens_it(error: Exception, opens: bool) -> None:
    clock = ManualClock()

    async def handle(message: ReceivedMessage) -> None:
        raise error

    counts: Callable[[BaseException], bool] = lambda error: isinstance(error, ConnectionError)  # noqa: E731
    async with QueueClient("memory://?max_delivery_count=100", clock=clock) as client:
        await client.send_messages(QUEUE, messages(10))
        breaker = BreakerConfig(failures=3, open_for=1000, counts=counts)
        config = ConsumerConfig(max_concurrency=1, breaker=breaker, retry=FixedRetry(attempts=3))
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await settle_tasks(300)
            assert consumer._runner.breaker is not None
            assert (consumer._runner.breaker.state.value == "open") is opens
        counts_after = await client.counts(QUEUE)
        assert counts_after.in_flight == 0, "the drain ends the wait of what was held"


async def test_a_drain_does_not_wait_for_an_open_breaker() -> None:
    """[C40]"""
    clock, downstream = ManualClock(), Downstream()
    async with QueueClient("memory://", clock=clock) as client:
        await client.send_messages(QUEUE, messages(10) + messages(5, session_id="s"))
        config = ConsumerConfig(breaker=BreakerConfig(failures=1, open_for=1000))
        consumer = Consumer(client, QUEUE, downstream.handle, config)
        task = asyncio.create_task(consumer.run())
        await settle_tasks(100)
        consumer.stop()
        await asyncio.wait_for(task, 5)
        counts = await client.counts(QUEUE)
        assert (counts.active, counts.in_flight) == (15, 0)


@pytest.mark.parametrize("can_delay", [True, False], ids=["delayed by the provider", "waits here"])
@pytest.mark.parametrize("session_id", [None, "s"])
async def test_the_policy_s_pauses_come_before_the_next_attempt(
    can_delay: bool, session_id: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[C34] Delayed abandon where the provider can; elsewhere the message waits here, its lock renewed."""
    clock = ManualClock()
    attempts: list[tuple[float, bytes, int]] = []

    async def handle(message: ReceivedMessage) -> None:
        attempts.append((clock.monotonic(), message.body, message.delivery_count))
        if message.body == b"0":
            raise ValueError("no")

    async with QueueClient(InMemoryConfig(lock_duration=5, max_delivery_count=9), clock=clock) as client:
        if not can_delay:
            without = dataclasses.replace(client.capabilities, abandon_delay=False)
            monkeypatch.setattr(client._provider, "capabilities", without)
        await client.send_messages(QUEUE, messages(3, session_id=session_id))
        retry = ExponentialRetry(first=10, factor=2, longest=1000, attempts=3, jitter=0)
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(retry=retry))
        async with running(consumer):
            for _ in range(400):
                await clock.advance(0.1)
            assert consumer.stats.dead_lettered == 1
            assert consumer.stats.completed == 2
        times = [(round(time), count) for time, body, count in attempts if body == b"0"]
        assert times == [(0, 1), (10, 2), (30, 3)]
        others = [round(time) for time, body, _ in attempts if body != b"0"]
        assert others == ([30, 30] if session_id else [0, 0]), "its session waits for it, and nobody else"
