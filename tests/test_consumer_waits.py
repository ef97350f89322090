"""A consumer never waits for what waits for it: bounds, the breaker, pauses and the drain beside each other."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from working import QUEUE, messages, until
from wrapping import wrap

from queue_runtime.breaker import BreakerConfig
from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.consumer import Consumer
from queue_runtime.errors import QueueRuntimeError
from queue_runtime.handling import ConsumerConfig, RetryMessage
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.middleware import Fetch, Middleware, Settle
from queue_runtime.providers.base import Disposition, Outcome
from queue_runtime.room import ByteBound, Room


async def ended(consumer: Consumer, task: asyncio.Task[Any]) -> None:
    consumer.stop()
    await asyncio.wait_for(task, 5)


async def test_a_drain_does_not_wait_for_pauses_of_handlers_that_end_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """[C40] The provider has no delay; the clock stands still."""
    wrap(monkeypatch, abandon_delay=False)
    began, end = asyncio.Event(), asyncio.Event()

    async def handle(message: ReceivedMessage) -> None:
        began.set()
        await end.wait()
        raise RetryMessage(3600)

    async with QueueClient(InMemoryConfig(settle_interval=0.001), clock=ManualClock()) as client:
        await client.send_messages(QUEUE, messages(1))
        consumer = Consumer(client, QUEUE, handle)
        task = asyncio.create_task(consumer.run())
        await began.wait()
        consumer.stop()
        await settle_tasks()
        end.set()
        await ended(consumer, task)
        assert consumer.stats.abandoned == 1


@pytest.mark.parametrize("form", ["one", "batch"])
@pytest.mark.parametrize("in_process", [True, False])
async def test_what_waits_to_be_given_back_keeps_no_handler_from_others(
    monkeypatch: pytest.MonkeyPatch, form: Any, in_process: bool
) -> None:
    """[C34] Also when there is but one handler, and the provider has no delay."""
    wrap(monkeypatch, abandon_delay=False, settles_in_process=in_process)

    async def handle(argument: Any) -> None:
        batch: Sequence[ReceivedMessage] = argument if form == "batch" else [argument]
        if any(message.body == b"0" for message in batch):
            raise RetryMessage(3600)

    clock = ManualClock()
    async with QueueClient(InMemoryConfig(settle_interval=0.001), clock=clock) as client:
        await client.send_messages(QUEUE, messages(4))
        config = ConsumerConfig(max_concurrency=1, max_batch_size=1, handler_form=form)
        consumer = Consumer(client, QUEUE, handle, config)
        task = asyncio.create_task(consumer.run())
        for _ in range(50):
            await clock.advance(0.01)
            await asyncio.sleep(0.001)
        assert consumer.stats.completed == 3
        await ended(consumer, task)


async def test_the_breaker_is_tried_while_something_only_waits_to_be_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[C35]"""
    wrap(monkeypatch, abandon_delay=False)

    down = [OSError("down")]

    async def handle(message: ReceivedMessage) -> None:
        if message.body == b"0":
            raise RetryMessage(200)
        if down:
            raise down.pop()

    clock = ManualClock()
    async with QueueClient(InMemoryConfig(settle_interval=0.001), clock=clock) as client:
        await client.send_messages(QUEUE, messages(2))
        breaker = BreakerConfig(failures=1, open_for=5, successes=2)
        config = ConsumerConfig(breaker=breaker, max_concurrency=1, prefetch=4, max_batch_size=1)
        consumer = Consumer(client, QUEUE, handle, config)
        task = asyncio.create_task(consumer.run())
        for _ in range(3):
            await clock.advance(1)
            await asyncio.sleep(0.001)
        await client.send_messages(QUEUE, messages(4)[2:])
        for _ in range(50):
            await clock.advance(1)
            await asyncio.sleep(0.001)
        assert consumer.stats.completed == 3
        await ended(consumer, task)


async def test_followers_get_their_predecessor_back_past_the_breaker() -> None:
    """[C24] [C35] Else they would be held, and while something is held nobody fetches what is to be tried."""
    opened = asyncio.Event()
    down = [OSError("down")]

    async def handle(message: ReceivedMessage) -> None:
        if message.session_id is None and down:
            asyncio.get_running_loop().call_soon(opened.set)
            raise down.pop()
        if message.body == b"0" and message.session_id and message.delivery_count == 1:
            await opened.wait()
            raise RetryMessage(0)

    clock = ManualClock()
    async with QueueClient(clock=clock) as client:
        breaker = BreakerConfig(failures=1, open_for=5, successes=5)
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(breaker=breaker, prefetch=100, max_concurrency=2))
        task = asyncio.create_task(consumer.run())
        await client.send_messages(QUEUE, messages(3, session_id="s"))
        await settle_tasks()
        await client.send_messages(QUEUE, messages(3))
        for _ in range(100):
            await clock.advance(1)
        assert consumer.stats.completed == 6
        await ended(consumer, task)


async def test_followers_get_their_predecessor_back_past_the_bound_on_bytes() -> None:
    """[C24] [C39] The followers themselves use it up."""

    async def handle(message: ReceivedMessage) -> None:
        if message.delivery_count == 1 and message.body.startswith(b"0"):
            raise ValueError("once")

    clock = ManualClock()
    async with QueueClient(clock=clock) as client:
        config = ConsumerConfig(prefetch_bytes=300, session_batch=10, max_concurrency=1)
        consumer = Consumer(client, QUEUE, handle, config)
        sizes = [Message(body=b"%d" % number + b"." * 200, session_id="s") for number in range(3)]
        await client.send_messages(QUEUE, sizes)
        task = asyncio.create_task(consumer.run())
        for _ in range(20):
            await clock.advance(1)
        assert consumer.stats.completed == 3
        await ended(consumer, task)


@pytest.mark.parametrize(("pollers", "prefetch"), [(1, 2), (2, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("others", [0, 2000])
async def test_sessions_have_their_turn_beside_other_messages(pollers: int, prefetch: int, others: int) -> None:
    """[C28] [C39] In small rooms, when there are none and when there is no end of them."""
    clock = ManualClock()

    async def handle(message: ReceivedMessage) -> None:
        await settle_tasks(2)

    async with QueueClient(clock=clock) as client:
        await client.send_messages(QUEUE, messages(others))
        config = ConsumerConfig(pollers=pollers, prefetch=prefetch, max_concurrency=2)
        consumer = Consumer(client, QUEUE, handle, config)
        task = asyncio.create_task(consumer.run())
        await settle_tasks()
        await client.send_messages(QUEUE, messages(3, session_id="s"))
        for _ in range(3):
            await clock.advance(0.1)
        assert consumer.stats.sessions >= 1
        assert consumer.stats.received < others or not others, "there are others still"
        await ended(consumer, task)


async def test_settling_together_holds_no_more_than_the_room_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """[C39] However long the completions take."""
    recorder = wrap(monkeypatch)

    async def handle(message: ReceivedMessage) -> None:
        if message.body == b"0":
            recorder.gate = asyncio.Event()

    async with QueueClient(InMemoryConfig(settle_interval=0.001)) as client:
        await client.send_messages(QUEUE, messages(50, session_id="s"))
        config = ConsumerConfig(
            prefetch=4, session_settlement="together", session_batch=2, source="sessions", max_concurrency=1
        )
        consumer = Consumer(client, QUEUE, handle, config)
        task = asyncio.create_task(consumer.run())
        await until(lambda: recorder.gate is not None)
        for _ in range(50):
            await asyncio.sleep(0.001)
            assert consumer.stats.waiting <= 4
        assert recorder.gate is not None
        recorder.gate.set()
        await until(lambda: consumer.stats.completed == 50)
        await ended(consumer, task)


async def test_a_hook_that_settles_not_at_all_or_twice_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Middleware):
        async def settle(self, message: ReceivedMessage, disposition: Disposition, call_next: Settle) -> Outcome:
            if message.body == b"0":
                return None
            if message.body == b"1":
                await call_next(disposition)
            outcome = await call_next(disposition)
            if message.body == b"2":
                raise ValueError("too late to matter")
            return outcome

    told: list[QueueRuntimeError | None] = []

    async def handle(message: ReceivedMessage) -> None: ...

    clock = ManualClock()
    async with QueueClient(InMemoryConfig(lock_duration=5), clock=clock) as client:
        await client.send_messages(QUEUE, messages(4))
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(middleware=[Odd()]))
        consumer._runner.observer.message_settled = lambda *what: told.append(what[-1])  # type: ignore[method-assign]
        task = asyncio.create_task(consumer.run())
        await clock.advance(0)
        stats = consumer.stats
        assert (stats.completed, stats.settle_errors, len(told)) == (3, 1, 4)
        await ended(consumer, task)
        await clock.advance(6)
        assert (await client.counts(QUEUE)).active == 1, "its lock is not renewed any more"


async def test_what_a_hook_leaves_out_of_a_session_is_not_overtaken() -> None:
    """[C24] Nor when a hook fails with a passing error."""

    class Dropper(Middleware):
        calls = 0

        async def receive(self, fetch: Fetch) -> list[ReceivedMessage]:
            got = await fetch()
            self.calls += bool(got)
            if got and self.calls == 2:
                raise QueueRuntimeErrorThatPasses("not now")
            return got[:1] if self.calls < 5 else got

    seen: list[int] = []

    async def handle(message: ReceivedMessage) -> None:
        seen.append(int(message.body))

    clock = ManualClock()
    async with QueueClient(clock=clock) as client:
        await client.send_messages(QUEUE, messages(30, session_id="s"))
        config = ConsumerConfig(middleware=[Dropper()], session_batch=3, source="sessions")
        consumer = Consumer(client, QUEUE, handle, config)
        task = asyncio.create_task(consumer.run())
        for _ in range(20):
            await clock.advance(1)
        assert seen == list(range(30))
        await ended(consumer, task)


class QueueRuntimeErrorThatPasses(QueueRuntimeError):
    is_transient = True


async def test_the_bound_on_bytes_may_be_lifted_while_somebody_waits_for_it() -> None:
    """[C39] And what was reckoned with under it is forgotten."""
    bound = ByteBound(100)
    _, reserved = await bound.reserve(10)
    bound.arrived(0.0, [100])
    waiting = asyncio.create_task(bound.reserve(10))
    await settle_tasks()
    assert not waiting.done()
    bound.resize(None)
    assert await waiting == (10, 0.0)
    bound.arrived(reserved, [])
    bound.give(100)
    bound.resize(100)
    assert bound._expected == 0.0


async def test_places_that_are_kept_are_for_those_who_take_all_they_may() -> None:
    room = Room(4)
    room.keep(2)
    assert await room.take(10, share=0.9) == 2
    waiting = asyncio.create_task(room.take(10, share=0.9))
    await settle_tasks()
    assert not waiting.done()
    assert room.take_now(1) == 1
    room.keep(0)
    assert await waiting == 1
    room.give(4)
    assert room.taken == 0
