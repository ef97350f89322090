"""A consumer's bounds [C39, C45]: by count, by bytes, and moved while it runs; and the four processors [C44]."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st
from working import QUEUE, messages, running, until

from queue_runtime import (
    AdaptiveBatchProcessor,
    Consumer,
    ConsumerConfig,
    ConsumerObserver,
    HighThroughputProcessor,
    InMemoryConfig,
    LowLatencyProcessor,
    ManualClock,
    Message,
    Processor,
    QueueClient,
    ReceivedMessage,
    SessionProcessor,
)
from queue_runtime.clock import settle_tasks
from queue_runtime.errors import ConfigurationError, ValidationError
from queue_runtime.room import ByteBound, Room


class TestByteBound:
    async def test_no_limit_never_waits(self) -> None:
        bound = ByteBound(None)
        assert await bound.reserve(100) == (100, 0.0)
        bound.arrived(0.0, [1000, 2000])
        assert bound.held == 3000
        bound.give(3000)
        assert bound.held == 0

    @given(
        limit=st.integers(1_000, 100_000),
        sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=60),
        wanted=st.integers(1, 50),
    )
    async def test_what_is_held_stays_near_the_limit(self, limit: int, sizes: list[int], wanted: int) -> None:
        """One receive at a time: over the limit by the misjudged part of one receive at most."""
        bound = ByteBound(limit)
        queue, held, largest_seen = list(sizes), [], 0
        while queue:
            task = asyncio.create_task(bound.reserve(wanted))
            await settle_tasks(3)
            while not task.done():
                assert held, "it waits only while something is held"
                bound.give(held.pop(0))
                await settle_tasks(3)
            count, reserved = task.result()
            assert 1 <= count <= wanted
            came, queue = queue[:count], queue[count:]
            before = bound.held
            bound.arrived(reserved, came)
            held += came
            if largest_seen >= max(came):
                assert bound.held <= max(limit, before + max(came)), "sizes as before: no misjudgement"
            largest_seen = max(largest_seen, *came)
        for size in held:
            bound.give(size)
        assert bound.held == 0
        assert bound._expected == pytest.approx(0.0, abs=1e-6)

    async def test_cancelling_a_wait_loses_nobody_else_s_turn(self) -> None:
        bound = ByteBound(100)
        bound.arrived((await bound.reserve(1))[1], [100])
        first, second = (asyncio.create_task(bound.reserve(1)) for _ in range(2))
        await settle_tasks()
        assert not first.done() and not second.done()  # noqa: PT018
        bound.give(100)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert (await second)[0] == 1

    async def test_a_larger_limit_wakes(self) -> None:
        bound = ByteBound(100)
        bound.arrived((await bound.reserve(1))[1], [100])
        waiting = asyncio.create_task(bound.reserve(1))
        await settle_tasks()
        bound.resize(1000)
        assert (await waiting)[0] == 1


async def test_a_consumer_holds_no_more_bytes_than_configured() -> None:
    most = 0

    async def handle(message: ReceivedMessage) -> None:
        nonlocal most
        most = max(most, consumer.stats.held_bytes)
        await asyncio.sleep(0)

    async with QueueClient(InMemoryConfig(prefetch=1000, max_concurrency=4)) as client:
        sent = [Message(body=bytes(10_000), session_id=f"s{n % 7}" if n % 2 else None) for n in range(400)]
        await client.send_messages(QUEUE, sent)
        config = ConsumerConfig(prefetch_bytes=200_000, min_batch_size=100)
        consumer = Consumer(client, QUEUE, handle, config)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 400)
        assert 20_000 < most <= 250_000, "4 MB in all"
        assert consumer.stats.held_bytes == 0
        one = Consumer(client, QUEUE, handle, ConsumerConfig(prefetch_bytes=1))
        await client.send_messages(QUEUE, sent[:5])
        consumer = one
        async with running(one):
            await until(lambda: one.stats.completed == 5)


@given(steps=st.lists(st.tuples(st.sampled_from(["take", "give", "resize"]), st.integers(1, 8)), max_size=40))
async def test_a_room_that_is_resized_forgets_nobody(steps: list[tuple[str, int]]) -> None:
    """What is taken never exceeds the largest capacity since; whoever waits is served when there is room."""
    room = Room(4)
    taken = 0
    waiting: list[asyncio.Task[int]] = []
    for step, number in steps:
        if step == "take":
            waiting.append(asyncio.create_task(room.take(number, at_least=number)))
        elif step == "give" and taken:
            number = min(number, taken)
            taken -= number
            room.give(number)
        elif step == "resize":
            room.resize(number)
        await settle_tasks(3)
        done = [task for task in waiting if task.done()]
        taken += sum(task.result() for task in done)
        waiting = [task for task in waiting if not task.done()]
        assert room.taken == taken
        assert room.free == room.capacity - taken
        if waiting:
            assert room.free < room.capacity, "somebody waits although all is free"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_limits_move_while_it_runs() -> None:
    """[C45] In either direction; what runs is left to end, and nothing is lost on the way."""
    go = asyncio.Event()

    async def handle(message: ReceivedMessage) -> None:
        await go.wait()

    async with QueueClient(InMemoryConfig(max_concurrency=4, prefetch=20)) as client:
        await client.send_messages(QUEUE, messages(300))
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(min_batch_size=5, source="queue"))
        assert consumer.limits == (4, 20, 1, 100)
        async with running(consumer):
            await until(lambda: consumer.stats.running == 4)
            consumer.set_limits(consumer.limits._replace(concurrency=12, prefetch=60, pollers=3))
            await until(lambda: consumer.stats.running == 12 and consumer.stats.waiting > 12)
            assert len(consumer._queue_feed._pollers) == 3  # type: ignore[union-attr]
            consumer.set_limits(consumer.limits._replace(concurrency=2, prefetch=5, pollers=1))
            await settle_tasks()
            assert consumer.stats.running == 12, "nothing is cancelled"
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, consumer.stats.running)
                    await asyncio.sleep(0)

            go.set()
            await until(lambda: consumer.stats.running <= 2)
            watching = asyncio.create_task(watch())
            await until(lambda: consumer.stats.completed == 300)
            watching.cancel()
            assert most <= 2
        assert consumer._runner.room.taken == consumer._runner.permits.taken == 0
        for field in ("concurrency", "prefetch", "pollers", "sessions"):
            with pytest.raises(ConfigurationError, match=field):
                consumer.set_limits(consumer.limits._replace(**{field: 0}))
        with pytest.raises(ValidationError, match="limits: must be Limits, not int"):
            consumer.set_limits(5)  # type: ignore[arg-type]


async def test_the_source_says_what_is_received() -> None:
    seen: list[str | None] = []

    async def handle(message: ReceivedMessage) -> None:
        seen.append(message.session_id)

    for source, expected in (("queue", [None]), ("sessions", ["s"]), ("all", [None, "s"])):
        seen.clear()
        async with QueueClient("memory://") as client:
            await client.send_messages(QUEUE, [Message(body=b"x"), Message(body=b"y", session_id="s")])
            consumer = Consumer(client, QUEUE, handle, ConsumerConfig(source=source))  # type: ignore[arg-type]
            async with running(consumer):
                await until(lambda: len(seen) == len(expected))  # noqa: B023
                await settle_tasks()
        assert sorted(seen, key=str) == expected


class Sizes(ConsumerObserver):
    def __init__(self) -> None:
        self.batches: list[int] = []

    def batch_received(self, messages: Sequence[ReceivedMessage]) -> None:
        self.batches.append(len(messages))


class TestProcessors:
    async def test_high_throughput_works_side_by_side_on_large_receives(self) -> None:
        most = 0

        async def handle(message: ReceivedMessage) -> None:
            nonlocal most
            most = max(most, processor.stats.running)
            await asyncio.sleep(0)

        async with QueueClient("memory://") as client:
            await client.send_messages(QUEUE, messages(5000))
            sizes = Sizes()
            processor = HighThroughputProcessor(client, QUEUE, handle, observer=sizes)
            async with running(processor):
                await until(lambda: processor.stats.completed == 5000)
        assert most == 64
        assert max(sizes.batches) >= 50

    async def test_low_latency_receives_one_at_a_time(self) -> None:
        async def handle(message: ReceivedMessage) -> None: ...

        async with QueueClient("memory://") as client:
            await client.send_messages(QUEUE, messages(50))
            sizes = Sizes()
            processor = LowLatencyProcessor(client, QUEUE, handle, observer=sizes)
            async with running(processor):
                await until(lambda: processor.stats.completed == 50)
        assert set(sizes.batches) == {1}
        assert processor.limits.prefetch == 10

    async def test_adaptive_batches_follow_their_time(self) -> None:
        """[C43]"""
        clock = ManualClock()
        sizes: list[int] = []

        async def handle(batch: Sequence[ReceivedMessage]) -> None:
            sizes.append(len(batch))
            over = asyncio.Event()
            clock.call_later(len(batch) * 0.1, over.set)
            await over.wait()

        async with QueueClient("memory://", clock=clock) as client:
            await client.send_messages(QUEUE, messages(500))
            processor = AdaptiveBatchProcessor(client, QUEUE, handle, max_concurrency=1)
            async with running(processor):
                for _ in range(100):
                    await clock.advance(1)
        assert processor.stats.completed == 500
        assert 8 <= sorted(sizes)[len(sizes) // 2] <= 12, "a tenth of a second each, so ten in a second"

    async def test_sessions_by_the_hundred_in_order(self) -> None:
        """[C28]"""
        together = 0
        done: dict[str | None, list[int]] = {}

        async def handle(message: ReceivedMessage) -> None:
            nonlocal together
            together = max(together, processor.stats.sessions_open)
            done.setdefault(message.session_id, []).append(int(message.body))
            await asyncio.sleep(0.001)

        async with QueueClient("memory://") as client:
            sent = [Message(body=b"%d" % n, session_id=f"s{s}") for n in range(5) for s in range(400)]
            await client.send_messages(QUEUE, sent + messages(3))
            processor = SessionProcessor(client, QUEUE, handle)
            async with running(processor):
                await until(lambda: processor.stats.completed == 2000)
            assert (await client.counts(QUEUE)).active == 3, "nothing but sessions"
        assert together == 400
        assert all(numbers == list(range(5)) for numbers in done.values())

    async def test_a_preset_can_be_changed_and_made(self) -> None:
        class Mine(Processor):
            preset = {"max_concurrency": 3}  # noqa: RUF012

        async with QueueClient("memory://") as client:
            assert Mine(client, QUEUE, print).limits.concurrency == 3
            assert HighThroughputProcessor(client, QUEUE, print, max_concurrency=5, prefetch=7).limits[:2] == (5, 7)
            assert AdaptiveBatchProcessor.config(max_batch_size=5).min_batch_size == 1, "not above the largest"
            with pytest.raises(ConfigurationError, match="prefetch"):
                Mine(client, QUEUE, print, prefetch=0)
            with pytest.raises(TypeError):
                Mine(client, QUEUE, print, speed=1)

    @pytest.mark.parametrize(
        "kind", [HighThroughputProcessor, LowLatencyProcessor, AdaptiveBatchProcessor, SessionProcessor]
    )
    def test_each_field_of_a_preset_is_another_than_the_default(self, kind: type[Processor]) -> None:
        """[C46]"""
        plain, preset = ConsumerConfig(), kind.config()
        for field, value in kind.preset.items():
            assert getattr(preset, field) == value
            if field not in ("session_batch", "pollers"):
                assert getattr(plain, field) != value, field


def test_wrong_bounds_name_their_field() -> None:
    """[C33]"""
    wrong: list[tuple[str, Any]] = [
        ("prefetch_bytes", 0),
        ("pollers", 0),
        ("session_batch", 0),
        ("session_idle", -1),
        ("batch_wait", "soon"),
        ("source", "all of it"),
        ("handler_form", "two"),
        ("executor", "fiber"),
        ("breaker", 5),
    ]
    for field, value in wrong:
        with pytest.raises(ConfigurationError) as caught:
            ConsumerConfig(**{field: value})
        assert caught.value.field == field
