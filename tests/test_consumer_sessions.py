"""How a consumer holds sessions [C24–C28]: batches, fair turns, affinity, idle ones, failing ones."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from working import QUEUE, messages, running, until
from wrapping import wrap

from queue_runtime import (
    Action,
    BatchContext,
    Consumer,
    ConsumerConfig,
    ConsumerObserver,
    FixedRetry,
    InMemoryConfig,
    InvalidReceiptError,
    ManualClock,
    Message,
    QueueClient,
    ReceivedMessage,
)
from queue_runtime.clock import settle_tasks


class Sessions(ConsumerObserver):
    """The sessions that were opened and closed, and the sizes of receives."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.held: set[str] = set()
        self.most = 0
        self.batches: list[tuple[str | None, int]] = []

    def session_opened(self, session_id: str) -> None:
        self.opened.append(session_id)
        self.held.add(session_id)
        self.most = max(self.most, len(self.held))

    def session_closed(self, session_id: str) -> None:
        self.held.discard(session_id)

    def batch_received(self, messages: Sequence[ReceivedMessage]) -> None:
        self.batches.append((messages[0].session_id, len(messages)))


async def test_an_idle_session_stays_here_until_its_time_is_over() -> None:
    """Affinity: what comes next finds the session where it was."""
    clock, seen = ManualClock(), Sessions()

    async def handle(message: ReceivedMessage) -> None: ...

    async with QueueClient("memory://", clock=clock) as client:
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(session_idle=5), observer=seen)
        async with running(consumer):
            for _ in range(4):
                await client.send_message(QUEUE, Message(body=b"x", session_id="s"))
                await clock.advance(4)
            assert consumer.stats.completed == 4
            assert seen.opened == ["s"], "held all the time"
            assert consumer.stats.sessions_open == 1
            await clock.advance(2)
            assert consumer.stats.sessions_open == 0, "idle for 5 s"
        assert consumer._runner.room.taken == 0


async def test_an_idle_session_lets_go_for_another_at_once() -> None:
    clock, seen = ManualClock(), Sessions()

    async def handle(message: ReceivedMessage) -> None: ...

    async with QueueClient("memory://", clock=clock) as client:
        config = ConsumerConfig(session_idle=1000, max_sessions=2)
        consumer = Consumer(client, QUEUE, handle, config, observer=seen)
        async with running(consumer):
            for number in range(6):
                await client.send_message(QUEUE, Message(body=b"x", session_id=f"s{number}"))
                await settle_tasks(50)
            assert consumer.stats.completed == 6
            assert seen.most <= 2
            assert clock.monotonic() == 0.0


async def test_a_busy_session_is_kept_beyond_its_turn_unless_others_wait() -> None:
    seen = Sessions()

    async def handle(message: ReceivedMessage) -> None:
        await asyncio.sleep(0)

    async with QueueClient("memory://") as client:
        await client.send_messages(QUEUE, messages(200, session_id="hot"))
        config = ConsumerConfig(session_turn=10, session_idle=0, max_sessions=10)
        consumer = Consumer(client, QUEUE, handle, config, observer=seen)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 200)
        assert seen.opened == ["hot"]


async def test_turns_are_fair_between_hot_sessions() -> None:
    """With two places and six hot sessions, none is served twice before each was served once."""
    order: list[str] = []

    async def handle(message: ReceivedMessage) -> None:
        order.append(message.session_id or "")
        await asyncio.sleep(0)

    async with QueueClient("memory://") as client:
        for session in range(6):
            await client.send_messages(QUEUE, messages(60, session_id=f"s{session}"))
        config = ConsumerConfig(session_turn=10, max_sessions=2)
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 360)
    first = {session: order.index(session) for session in set(order)}
    assert max(first.values()) < 80, "in the first round already"
    for start in range(0, 300, 60):
        assert len(set(order[start : start + 80])) >= 5


async def test_no_session_waits_for_room_that_others_could_use() -> None:
    """A session is accepted when there is room for its batch: nobody else's while it would only wait here."""
    go = asyncio.Event()

    async def handle(message: ReceivedMessage) -> None:
        await go.wait()

    async with QueueClient(InMemoryConfig(name="room-for-sessions")) as client:
        await client.send_messages(QUEUE, [m for s in range(50) for m in messages(10, session_id=f"s{s}")])
        config = ConsumerConfig(prefetch=30, max_concurrency=3, max_sessions=50, source="sessions")
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await until(lambda: consumer.stats.running == 3)
            await settle_tasks(100)
            assert consumer.stats.sessions_open == 4, "of 7 messages each: one more than handlers"
            async with QueueClient(InMemoryConfig(name="room-for-sessions")) as other:
                session = await other.accept_session(QUEUE, None, 0)
                assert session is not None
                await session.close()
            go.set()
            await until(lambda: consumer.stats.completed == 500)


async def test_fetched_ahead_is_what_the_room_is_enough_for() -> None:
    """100 sessions and plain handlers share the room, so that all handlers have something to do."""
    seen = Sessions()
    most = 0

    async def handle(message: ReceivedMessage) -> None:
        nonlocal most
        most = max(most, consumer.stats.running)
        await asyncio.sleep(0.001)

    async with QueueClient("memory://") as client:
        await client.send_messages(QUEUE, [m for s in range(100) for m in messages(20, session_id=f"s{s}")])
        config = ConsumerConfig(prefetch=125, max_concurrency=20, source="sessions")
        consumer = Consumer(client, QUEUE, handle, config, observer=seen)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 2000)
        assert most == 20
        sizes = [size for _, size in seen.batches]
        assert max(sizes) == 5
        assert sum(sizes) / len(sizes) > 4


async def test_a_failing_session_backs_off_alone_and_leaves_its_place() -> None:
    """[C28] Its followers lose one delivery and not one for each failure, and come after it."""
    clock = ManualClock()
    handled: dict[str, list[tuple[int, int]]] = defaultdict(list)

    async def handle(message: ReceivedMessage) -> None:
        handled[message.session_id or ""].append((int(message.body), message.delivery_count))
        if message.session_id == "bad" and message.body == b"0" and message.delivery_count <= 4:
            raise ValueError("not yet")

    async with QueueClient(InMemoryConfig(max_delivery_count=10), clock=clock) as client:
        await client.send_messages(QUEUE, messages(5, session_id="bad"))
        config = ConsumerConfig(max_sessions=1, retry=FixedRetry(delay=60, attempts=6))
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await clock.advance(1)
            assert handled["bad"] == [(0, 1)]
            await client.send_messages(QUEUE, [m for s in range(20) for m in messages(5, session_id=f"s{s}")])
            await clock.advance(5)
            assert consumer.stats.completed == 100, "the only place is not kept by who waits"
            for _ in range(60):
                await clock.advance(5)
            assert consumer.stats.completed == 105
    numbers = [number for number, _ in handled["bad"]]
    assert numbers == [0, 0, 0, 0, 0, 1, 2, 3, 4]
    assert max(count for number, count in handled["bad"] if number) <= 2


async def test_completes_of_a_session_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next message is handled while the one before is settled: many to a batch, in one session's lock."""
    recorder = wrap(monkeypatch)

    async def handle(message: ReceivedMessage) -> None: ...

    async with QueueClient(InMemoryConfig(settlement="batched", settle_interval=0.01)) as client:
        await client.send_messages(QUEUE, messages(100, session_id="s"))
        config = ConsumerConfig(session_batch=50, max_concurrency=1, session_settlement="together")
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 100)
    completes = [
        len(receipts) for _, disposition, receipts in recorder.settled if disposition.action is Action.COMPLETE
    ]
    assert sum(completes) == 100
    assert len(completes) <= 20


@pytest.mark.parametrize("settlement", ["each", "together"])
async def test_a_settlement_that_fails_stops_its_session_and_keeps_the_order(
    monkeypatch: pytest.MonkeyPatch, settlement: Any
) -> None:
    """[C24] What was handled comes again, and never a message ahead of its time; settled each, nothing comes late."""
    recorder = wrap(monkeypatch)
    seen: list[int] = []

    def refuse(receipts: Sequence[Any]) -> list[Any]:
        return [InvalidReceiptError(receipt) for receipt in receipts]

    async def handle(message: ReceivedMessage) -> None:
        seen.append(int(message.body))
        if len(seen) == 8:
            recorder.settle_faults.append(refuse)

    config = InMemoryConfig(settlement="batched", settle_interval=0.005, lock_duration=0.2, session_lock_duration=0.2)
    async with QueueClient(config) as client:
        await client.send_messages(QUEUE, messages(30, session_id="s"))
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(max_concurrency=1, session_settlement=settlement))
        async with running(consumer):
            await until(lambda: (seen[-1:] == [29]) and consumer.stats.sessions_open == 0)
    assert consumer.stats.settle_errors > 0
    first = [number for place, number in enumerate(seen) if number not in seen[:place]]
    assert first == list(range(30)), "for the first time, in order"
    fresh = 0
    for number in seen:
        assert number <= fresh, "never ahead"
        if settlement == "each":
            assert number >= fresh - 1, "only the one whose completion failed comes again"
        fresh = max(fresh, number + 1)


async def test_batches_of_a_session_are_of_one_session_and_in_order() -> None:
    batches: list[list[tuple[str | None, int]]] = []

    async def handle(batch: Sequence[ReceivedMessage]) -> None:
        batches.append([(message.session_id, int(message.body)) for message in batch])
        if len(batches) % 5 == 0:
            raise ValueError("again, all of it")

    async with QueueClient("memory://?max_delivery_count=50") as client:
        await client.send_messages(QUEUE, [m for s in range(10) for m in messages(30, session_id=f"s{s}")])
        config = ConsumerConfig(handler_form="batch", session_batch=7, retry=FixedRetry(attempts=50), prefetch=500)
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 300)
    done: dict[str | None, list[int]] = defaultdict(list)
    for batch in batches:
        assert len({session for session, _ in batch}) == 1
        assert len(batch) <= 7
        for session, number in batch:
            if number not in done[session]:
                done[session].append(number)
    assert all(numbers == list(range(30)) for numbers in done.values())


async def test_hundreds_at_once() -> None:
    """[C28] 800 sessions held by one consumer, each in the middle of a message."""
    go = asyncio.Event()

    async def handle(message: ReceivedMessage) -> None:
        await go.wait()

    async with QueueClient("memory://") as client:
        await client.send_messages(QUEUE, [Message(body=b"x", session_id=f"s{n}") for n in range(800)])
        config = ConsumerConfig(max_sessions=800, max_concurrency=800, prefetch=1600, source="sessions")
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await until(lambda: consumer.stats.running == 800)
            assert consumer.stats.sessions_open == 800
            go.set()
            await until(lambda: consumer.stats.completed == 800)


async def test_a_batch_that_fails_in_part_makes_its_session_a_failing_one() -> None:
    """Whichever of its messages it is: the next are fetched one by one, until one has gone well."""
    clock = ManualClock()
    sizes: list[int] = []

    async def handle(batch: Sequence[ReceivedMessage], context: BatchContext) -> None:
        sizes.append(len(batch))
        if len(sizes) == 1:
            context.of(batch[0]).abandon(delay=30)

    async with QueueClient("memory://", clock=clock) as client:
        await client.send_messages(QUEUE, messages(4, session_id="s"))
        config = ConsumerConfig(handler_form="batch", prefetch=100, max_concurrency=4)
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await clock.advance(20)
            await client.send_messages(QUEUE, messages(6, session_id="s"))
            await clock.advance(20)
            assert consumer.stats.completed == 10
    assert sizes == [4, 1, 6]
