"""The consumer when what it calls misbehaves: handlers, policies, observers, adapters; and cancelled at any point."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from working import QUEUE, messages, running, until
from wrapping import fail, wrap

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.consumer import Consumer
from queue_runtime.handling import ConsumerConfig, ConsumerObserver
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.providers.base import Disposition


@pytest.fixture(params=["auto", "batched"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[QueueClient]:
    config = InMemoryConfig(settlement=request.param, settle_interval=0.001, max_concurrency=8, prefetch=50)
    async with QueueClient(config) as client:
        yield client


def both(number: int) -> list[Message]:
    """So many messages without a session, and so many of one."""
    return messages(number) + messages(number, session_id="s")


async def nothing_is_held(client: QueueClient, consumer: Consumer) -> bool:
    counts = await client.counts(QUEUE)
    return counts.in_flight == consumer.stats.waiting == consumer.stats.running == consumer._runner.room.taken == 0


async def test_busy_handlers_do_not_keep_others_from_beginning() -> None:
    """One message after another, each handled slowly: as many at once as may run."""
    running_now: set[bytes] = set()
    go = asyncio.Event()

    async def handle(message: ReceivedMessage) -> None:
        running_now.add(message.body)
        await go.wait()

    async with QueueClient(InMemoryConfig(max_concurrency=8)) as client:
        consumer = Consumer(client, QUEUE, handle)
        async with running(consumer):
            for number in range(8):
                await client.send_message(QUEUE, Message(body=b"%d" % number))
                await settle_tasks()
                assert len(running_now) == number + 1
            go.set()


async def test_a_cancellation_inside_a_handler_is_its_failure(client: QueueClient) -> None:
    """It awaited something that was cancelled: the consumer was not."""
    failures: list[str] = []

    class Observer(ConsumerObserver):
        def handler_failed(self, message: ReceivedMessage, error: Exception) -> None:
            failures.append(type(error).__name__)

    async def handle(message: ReceivedMessage) -> None:
        if message.delivery_count == 1:
            helper = asyncio.ensure_future(asyncio.sleep(60))
            helper.cancel()
            await helper

    await client.send_messages(QUEUE, both(3))
    consumer = Consumer(client, QUEUE, handle, observer=Observer())
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 6)
    assert failures == ["CancelledError"] * 6
    assert await nothing_is_held(client, consumer)


async def test_a_plain_handler_that_raises_stop_iteration_failed(client: QueueClient) -> None:
    """Python 3.11 cannot put one into a future: the caller would wait for ever."""

    def handle(message: ReceivedMessage) -> None:
        if message.delivery_count == 1:
            next(iter(()))

    await client.send_messages(QUEUE, both(1))
    consumer = Consumer(client, QUEUE, handle)
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 2)
    assert consumer.stats.failed == 2


class Fatal(BaseException):
    """Neither an Exception nor a cancellation."""


@pytest.mark.parametrize("session_id", [None, "s"])
async def test_what_is_no_exception_ends_the_run_and_releases_the_message(
    client: QueueClient, session_id: str | None
) -> None:
    async def handle(message: ReceivedMessage) -> None:
        raise Fatal

    await client.send_messages(QUEUE, messages(20, session_id=session_id))
    consumer = Consumer(client, QUEUE, handle)
    with pytest.raises(Fatal):
        await consumer.run()
    assert await nothing_is_held(client, consumer)
    assert (await client.counts(QUEUE)).active == 20


async def test_a_handler_that_outlives_its_cancellation_by_a_lost_lock_is_not_counted() -> None:
    """[C21] Its result is dropped, as its lock is; and the cancellation does not stick to the next message."""
    clock = ManualClock()
    pending: list[int] = []

    async def handle(message: ReceivedMessage) -> None:
        task = asyncio.current_task()
        assert task is not None
        pending.append(task.cancelling())
        if message.delivery_count == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return

    async with QueueClient(InMemoryConfig(lock_duration=10, max_lock_renewal=5), clock=clock) as client:
        await client.send_message(QUEUE, Message(body=b"x"))
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(max_concurrency=1))
        async with running(consumer):
            await clock.advance(11)
            await client.send_message(QUEUE, Message(body=b"y"))
            await clock.advance(11)
        assert consumer.stats.settle_errors == 0
        assert consumer.stats.locks_lost == 2
        assert consumer.stats.completed == 2
        assert pending == [0, 0, 0, 0]


@pytest.mark.parametrize("answer", [None, "abandon", Disposition], ids=str)
async def test_a_policy_that_does_not_decide_abandons(client: QueueClient, answer: Any) -> None:
    def policy(message: ReceivedMessage, error: Exception) -> Any:
        return answer

    async def handle(message: ReceivedMessage) -> None:
        if message.delivery_count == 1:
            raise ValueError("once")

    await client.send_messages(QUEUE, both(2))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(on_failure=policy))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 4)
    assert consumer.stats.abandoned == 4


class Broken(ConsumerObserver):
    """Raises whatever it is told."""

    def batch_received(self, messages: Any) -> None:
        raise ZeroDivisionError("batch")

    def message_settled(self, message: ReceivedMessage, disposition: Disposition, error: Any) -> None:
        raise ZeroDivisionError("settled")

    def handler_failed(self, message: ReceivedMessage, error: Exception) -> None:
        raise ZeroDivisionError("failed")

    def session_opened(self, session_id: str) -> None:
        raise ZeroDivisionError("opened")

    def session_closed(self, session_id: str) -> None:
        raise ZeroDivisionError("closed")


async def test_an_observer_that_raises_disturbs_nothing(client: QueueClient, caplog: pytest.LogCaptureFixture) -> None:
    async def handle(message: ReceivedMessage) -> None:
        if message.delivery_count == 1:
            raise ValueError("once")

    await client.send_messages(QUEUE, both(20))
    consumer = Consumer(client, QUEUE, handle, observer=Broken())
    with caplog.at_level(logging.CRITICAL, "queue_runtime"):
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 40)
    assert await nothing_is_held(client, consumer)


async def test_an_adapter_s_bug_in_a_settlement_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told and counted as what it is, a message that was not settled; the drain does not wait for it."""
    recorder = wrap(monkeypatch)
    recorder.settle_faults += [fail(ZeroDivisionError("bug")), fail(ZeroDivisionError("bug"))]

    async def handle(message: ReceivedMessage) -> None: ...

    async with QueueClient(InMemoryConfig(settle_interval=0.001, prefetch=4)) as client:
        await client.send_messages(QUEUE, both(10))
        consumer = Consumer(client, QUEUE, handle)
        async with running(consumer):
            await until(lambda: consumer.stats.completed + consumer.stats.settle_errors == 20)
        assert consumer.stats.settle_errors >= 2
        assert consumer.stats.waiting == consumer._runner.room.taken == 0


@pytest.mark.parametrize("turns", range(12))
async def test_a_run_that_is_cancelled_twice_leaves_nothing_behind(client: QueueClient, turns: int) -> None:
    """However far its drain has come when the second cancellation arrives."""
    cleaned = 0

    async def handle(message: ReceivedMessage) -> None:
        nonlocal cleaned
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned += 1

    await client.send_messages(QUEUE, both(20))
    consumer = Consumer(client, QUEUE, handle)
    task = asyncio.create_task(consumer.run())
    await until(lambda: consumer.stats.running == 8)
    task.cancel()
    await settle_tasks(turns)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == 8
    assert await nothing_is_held(client, consumer)


async def test_a_session_counts_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """[C39] Its messages are held, and its place is taken, for as long as others cannot have them."""
    recorder = wrap(monkeypatch)
    handled = asyncio.Event()
    closing, go = asyncio.Event(), asyncio.Event()
    close: Callable[[Any], Any] = QueueClient.close_session

    async def slow_close(self: QueueClient, lane: Any) -> None:
        closing.set()
        await go.wait()
        await close(self, lane)

    monkeypatch.setattr(QueueClient, "close_session", slow_close)

    async def handle(message: ReceivedMessage) -> None:
        handled.set()

    async with QueueClient(InMemoryConfig(settle_interval=0.001)) as client:
        await client.send_messages(QUEUE, messages(1, session_id="a"))
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(max_sessions=1))
        async with running(consumer):
            await closing.wait()
            await client.send_messages(QUEUE, messages(1, session_id="b"))
            await settle_tasks()
            assert len(recorder.open) <= 2, "of the queue and one session"
            assert consumer.stats.sessions_open == 1
            go.set()


@pytest.mark.parametrize("session_id", [None, "s"])
async def test_a_service_that_is_silent_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, session_id: str | None
) -> None:
    """[C38, C40] Settlements that do not come back are given up 5 s after the time to drain."""
    clock, recorder = ManualClock(), wrap(monkeypatch)
    handled: list[bytes] = []

    async def handle(message: ReceivedMessage) -> None:
        handled.append(message.body)
        recorder.gate = gate

    gate = asyncio.Event()
    async with QueueClient(InMemoryConfig(settle_interval=0.001), clock=clock) as client:
        await client.send_messages(QUEUE, messages(6, session_id=session_id))
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(drain_timeout=2, min_batch_size=6, max_concurrency=1))
        task = asyncio.create_task(consumer.run())
        await until(lambda: recorder.at_gate > 0)
        consumer.stop()
        for _ in range(13):
            await clock.advance(0.5)
        assert not task.done(), "2 s for handlers, 5 s for what is settled"
        for _ in range(3):
            await clock.advance(0.5)
        await asyncio.wait_for(task, 5)
        assert handled[0] == b"0"
        assert consumer.stats.running == 0
        assert consumer.stats.waiting == consumer._runner.room.taken == 0
        assert consumer.stats.settle_errors > 0
        gate.set()
