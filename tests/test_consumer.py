"""The consumer on the in-memory provider: handlers, order, bounds, failures, lost locks, drain [C39, C40, C44]."""

import asyncio
import random
import re
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest
from working import QUEUE, messages, running, until

from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.consumer import Consumer
from queue_runtime.errors import (
    AlreadyStartedError,
    ConfigurationError,
    QueueNotFoundError,
    ValidationError,
)
from queue_runtime.handling import ConsumerConfig, ConsumerObserver, RejectMessage, RetryMessage
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.providers.base import Action, Disposition
from queue_runtime.retry import FixedRetry


@pytest.fixture(params=["auto", "batched"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[QueueClient]:
    """Settled at once, and through the batches."""
    config = InMemoryConfig(settlement=request.param, settle_interval=0.001, max_concurrency=8, prefetch=50)
    async with QueueClient(config) as client:
        yield client


async def test_everything_is_handled_once_and_completed(client: QueueClient) -> None:
    seen: list[bytes] = []

    async def handle(message: ReceivedMessage) -> None:
        seen.append(message.body)

    await client.send_messages(QUEUE, messages(500))
    consumer = Consumer(client, QUEUE, handle)
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 500)
    assert sorted(seen, key=int) == [str(number).encode() for number in range(500)]
    counts = await client.counts(QUEUE)
    assert (counts.active, counts.in_flight) == (0, 0)
    assert consumer.stats.waiting == consumer.stats.running == 0


async def test_no_more_handlers_and_no_more_messages_than_configured(client: QueueClient) -> None:
    """[C39]"""
    running_now = most = 0

    async def handle(message: ReceivedMessage) -> None:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0.001)
        running_now -= 1

    sent = messages(100) + [m for s in range(10) for m in messages(10, session_id=f"s{s}")]
    await client.send_messages(QUEUE, sent)
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(max_concurrency=4, prefetch=12))
    held = 0

    async def watch() -> None:
        nonlocal held
        while True:
            held = max(held, (await client.counts(QUEUE)).in_flight)
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 200)
    watcher.cancel()
    assert most == 4, "as many as allowed, so that it is shown to be concurrent"
    assert 4 < held <= 12


@pytest.mark.parametrize("seed", range(3))
async def test_sessions_in_order_whatever_fails(client: QueueClient, seed: int) -> None:
    """[C24]: also after failures, and with sessions by the hundred and messages without a session between them."""
    chance = random.Random(seed)
    done: dict[str | None, list[int]] = defaultdict(list)
    busy: set[str] = set()

    async def handle(message: ReceivedMessage) -> None:
        session = message.session_id
        if session is not None:
            assert session not in busy, "one at a time"
            busy.add(session)
        try:
            if chance.random() < 0.3:
                await asyncio.sleep(0)
            if chance.random() < 0.2 and message.delivery_count < 4:
                raise RuntimeError("as it happens")
            done[session].append(int(message.body))
        finally:
            if session is not None:
                busy.discard(session)

    sent = [Message(body=str(number).encode(), session_id=f"s{s}") for number in range(8) for s in range(150)]
    await client.send_messages(QUEUE, sent + messages(100))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(session_turn=5, max_sessions=50))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 1300)
    assert len(done) == 151
    for session, numbers in done.items():
        assert sorted(numbers) == list(range(100 if session is None else 8))
        if session is not None:
            assert numbers == sorted(numbers), session
    assert consumer.stats.failed > 0
    assert consumer.stats.sessions >= 200, "a turn of 5 of 8 messages takes each session twice while others wait"


async def test_a_slow_session_stalls_only_itself(client: QueueClient) -> None:
    """[C28]"""
    go = asyncio.Event()
    done: list[str] = []

    async def handle(message: ReceivedMessage) -> None:
        if message.session_id == "slow":
            await go.wait()
        done.append(message.session_id or "")

    await client.send_messages(QUEUE, messages(5, session_id="slow"))
    await client.send_messages(QUEUE, [m for s in range(40) for m in messages(3, session_id=f"s{s}")])
    consumer = Consumer(client, QUEUE, handle)
    async with running(consumer):
        await until(lambda: len(done) == 120)
        assert "slow" not in done
        go.set()
        await until(lambda: len(done) == 125)


async def test_a_hot_session_starves_nobody(client: QueueClient) -> None:
    order: list[str] = []

    async def handle(message: ReceivedMessage) -> None:
        order.append(message.session_id or "")

    await client.send_messages(QUEUE, messages(300, session_id="hot"))
    await client.send_messages(QUEUE, messages(1, session_id="cold"))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(max_sessions=1, session_turn=20))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 301)
    assert order.index("cold") <= 40


async def test_failures_are_tried_again_and_then_dead_lettered(client: QueueClient) -> None:
    attempts: list[int] = []

    async def handle(message: ReceivedMessage) -> None:
        attempts.append(message.delivery_count)
        raise ValueError("no such account")

    await client.send_message(QUEUE, Message(body=b"x", message_id="poison"))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(retry=FixedRetry(attempts=3)))
    async with running(consumer):
        await until(lambda: consumer.stats.dead_lettered == 1)
    assert attempts == [1, 2, 3]
    (dead,) = await client.dead_letters(QUEUE).peek_messages()
    assert dead.message_id == "poison"
    assert dead.dead_letter_reason == "ValueError"
    text, _, told = (dead.dead_letter_description or "").partition("\n")
    assert text == "no such account"
    assert re.fullmatch(r"attempts=3 traceback=[0-9a-f]{12} at test_consumer.py:\d+ in handle", told)
    assert (consumer.stats.failed, consumer.stats.abandoned) == (3, 2)


async def test_a_handler_can_reject_and_put_off() -> None:
    clock = ManualClock()
    seen: list[int] = []

    async def handle(message: ReceivedMessage) -> None:
        seen.append(message.delivery_count)
        if message.body == b"bad":
            raise RejectMessage("Malformed", "no id in it")
        if message.delivery_count == 1:
            raise RetryMessage(delay=60)

    async with QueueClient("memory://", clock=clock) as client:
        await client.send_message(QUEUE, Message(body=b"bad"))
        consumer = Consumer(client, QUEUE, handle)
        async with running(consumer):
            await settle_tasks()
            (dead,) = await client.dead_letters(QUEUE).peek_messages()
            assert (dead.dead_letter_reason, dead.dead_letter_description) == ("Malformed", "no id in it")
            await client.send_message(QUEUE, Message(body=b"later"))
            await clock.advance(59)
            assert seen == [1, 1]
            await clock.advance(2)
            assert seen == [1, 1, 2]
            assert consumer.stats.completed == 1


async def test_a_delayed_message_of_a_session_comes_before_its_followers() -> None:
    """[C24]"""
    clock = ManualClock()
    seen: list[tuple[bytes, int]] = []

    async def handle(message: ReceivedMessage) -> None:
        seen.append((message.body, message.delivery_count))
        if message.body == b"0" and message.delivery_count == 1:
            raise RetryMessage(delay=10)

    async with QueueClient("memory://", clock=clock) as client:
        await client.send_messages(QUEUE, messages(4, session_id="s"))
        consumer = Consumer(client, QUEUE, handle)
        async with running(consumer):
            await clock.advance(9)
            assert seen == [(b"0", 1)]
            await clock.advance(2)
            assert seen == [(b"0", 1), (b"0", 2), (b"1", 1), (b"2", 1), (b"3", 1)]


async def test_the_policy_decides_and_a_broken_policy_abandons(client: QueueClient) -> None:
    async def handle(message: ReceivedMessage) -> None:
        raise ValueError("no")

    def policy(message: ReceivedMessage, error: Exception) -> Disposition:
        if message.delivery_count == 1:
            raise RuntimeError("the policy is broken too")
        return Disposition(Action.DEAD_LETTER, reason="ByPolicy")

    await client.send_message(QUEUE, Message(body=b"x"))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(on_failure=policy))
    async with running(consumer):
        await until(lambda: consumer.stats.dead_lettered == 1)
    assert (await client.dead_letters(QUEUE).peek_messages())[0].dead_letter_reason == "ByPolicy"


async def test_plain_functions_run_in_threads(client: QueueClient) -> None:
    threads: set[int] = set()
    together = threading.Barrier(4)

    def handle(message: ReceivedMessage) -> None:
        together.wait(timeout=10)  # passes only when four run at once
        threads.add(threading.get_ident())

    await client.send_messages(QUEUE, messages(8))
    consumer = Consumer(client, QUEUE, handle, ConsumerConfig(max_concurrency=4))
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 8)
    assert len(threads) == 4
    assert threading.get_ident() not in threads


async def test_objects_and_lambdas_are_handlers_too(client: QueueClient) -> None:
    seen: list[str] = []

    class Handler:
        async def __call__(self, message: ReceivedMessage) -> None:
            seen.append("object")

    async def later() -> None:
        seen.append("lambda")

    for handler in (Handler(), lambda message: later()):
        await client.send_message(QUEUE, Message(body=b"x"))
        consumer = Consumer(client, QUEUE, handler)
        async with running(consumer):
            await until(lambda: consumer.stats.completed == 1)  # noqa: B023
    assert seen == ["object", "lambda"]


async def test_a_lost_lock_cancels_the_handler_and_settles_nothing() -> None:
    """[C21]: the longest renewal is over while the handler still runs."""
    clock = ManualClock()
    events: list[str] = []

    async def handle(message: ReceivedMessage) -> None:
        if message.delivery_count > 1:
            events.append("again")
            return
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    config = InMemoryConfig(lock_duration=10, max_lock_renewal=30)
    async with QueueClient(config, clock=clock) as client:
        await client.send_message(QUEUE, Message(body=b"x"))
        consumer = Consumer(client, QUEUE, handle)
        async with running(consumer):
            for _ in range(29):
                await clock.advance(1)
            assert events == [], "renewed while it is allowed"
            for _ in range(15):
                await clock.advance(1)
            assert events == ["cancelled", "again"]
            assert consumer.stats.locks_lost == 1
            assert consumer.stats.completed == 1


async def test_the_drain_lets_handlers_finish_and_releases_the_rest_at_once(client: QueueClient) -> None:
    """[C40]"""
    go = asyncio.Event()
    finished: list[bytes] = []

    async def handle(message: ReceivedMessage) -> None:
        await go.wait()
        finished.append(message.body)

    await client.send_messages(QUEUE, messages(30))
    await client.send_messages(QUEUE, messages(5, session_id="s"))
    # Batches of 10, so that messages wait in the buffer too.
    config = ConsumerConfig(max_concurrency=3, prefetch=20, min_batch_size=10)
    consumer = Consumer(client, QUEUE, handle, config)
    task = asyncio.create_task(consumer.run())
    await until(lambda: consumer.stats.running == 3 and consumer.stats.waiting > 3)
    consumer.stop()
    await until(lambda: consumer.stats.waiting <= 5)
    counts = await client.counts(QUEUE)
    assert counts.in_flight <= 3 + 5, (
        "what no handler had begun is free for others; the session is held until its handler ends"
    )
    go.set()
    stats = await task
    assert stats.completed == len(finished) == 3
    counts = await client.counts(QUEUE)
    assert (counts.active, counts.in_flight) == (32, 0)
    session = await client.accept_session(QUEUE, "s", timeout=0)
    assert session is not None, "the session is free"


async def test_the_drain_ends_at_its_deadline() -> None:
    clock = ManualClock()
    cancelled: list[bytes] = []

    async def handle(message: ReceivedMessage) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(message.body)
            raise

    async with QueueClient("memory://", clock=clock) as client:
        await client.send_messages(QUEUE, messages(3))
        consumer = Consumer(client, QUEUE, handle, ConsumerConfig(drain_timeout=5, min_batch_size=3))
        task = asyncio.create_task(consumer.run())
        await settle_tasks()
        assert consumer.stats.running == 3
        consumer.stop()
        await clock.advance(4)
        assert not task.done()
        await clock.advance(2)
        stats = await task
        assert sorted(cancelled) == [b"0", b"1", b"2"]
        assert stats.abandoned == 3
        counts = await client.counts(QUEUE)
        assert (counts.active, counts.in_flight) == (3, 0), "visible to others at once"


async def test_cancelling_run_releases_everything(client: QueueClient) -> None:
    async def handle(message: ReceivedMessage) -> None:
        await asyncio.Event().wait()

    await client.send_messages(QUEUE, messages(40))
    consumer = Consumer(client, QUEUE, handle)
    task = asyncio.create_task(consumer.run())
    await until(lambda: consumer.stats.running == 8)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    counts = await client.counts(QUEUE)
    assert (counts.active, counts.in_flight) == (40, 0)


async def test_a_missing_queue_ends_the_run_with_its_error() -> None:
    async with QueueClient(InMemoryConfig(auto_create=False)) as client:

        async def handle(message: ReceivedMessage) -> None: ...

        with pytest.raises(QueueNotFoundError, match="orders"):
            await Consumer(client, QUEUE, handle).run()


async def test_it_runs_once(client: QueueClient) -> None:
    async def handle(message: ReceivedMessage) -> None: ...

    consumer = Consumer(client, QUEUE, handle)
    consumer.stop()
    await consumer.run()
    with pytest.raises(AlreadyStartedError):
        await consumer.run()


async def test_the_observer_hears_all_of_it(client: QueueClient) -> None:
    class Observer(ConsumerObserver):
        def __init__(self) -> None:
            self.batches = 0
            self.settled: list[tuple[bytes, Action]] = []
            self.failed: list[str] = []
            self.sessions: list[str] = []

        def batch_received(self, messages: Any) -> None:
            self.batches += 1

        def message_settled(self, message: ReceivedMessage, disposition: Disposition, error: Any) -> None:
            assert error is None
            self.settled.append((message.body, disposition.action))

        def handler_failed(self, message: ReceivedMessage, error: Exception) -> None:
            self.failed.append(str(error))

        def session_opened(self, session_id: str) -> None:
            self.sessions.append("+" + session_id)

        def session_closed(self, session_id: str) -> None:
            self.sessions.append("-" + session_id)

    async def handle(message: ReceivedMessage) -> None:
        if message.body == b"1" and message.delivery_count == 1:
            raise ValueError("once")

    observer = Observer()
    await client.send_messages(QUEUE, messages(2, session_id="s"))
    consumer = Consumer(client, QUEUE, handle, observer=observer)
    async with running(consumer):
        await until(lambda: consumer.stats.completed == 2)
    assert observer.settled == [(b"0", Action.COMPLETE), (b"1", Action.ABANDON), (b"1", Action.COMPLETE)]
    assert observer.failed == ["once"]
    assert observer.sessions[:2] == ["+s", "-s"]
    assert observer.batches == consumer.stats.batches


async def test_batches_grow_with_fast_handlers_and_shrink_with_slow_ones() -> None:
    """[C43] in place: what one receive asks for follows the time that messages take."""
    clock = ManualClock()
    pause = 0.0

    async def handle(message: ReceivedMessage) -> None:
        if pause:
            over = asyncio.Event()
            clock.call_later(pause, over.set)
            await over.wait()

    sizes: list[int] = []

    class Observer(ConsumerObserver):
        def batch_received(self, messages: Any) -> None:
            sizes.append(len(messages))

    async with QueueClient(InMemoryConfig(prefetch=400, max_concurrency=1), clock=clock) as client:
        await client.send_messages(QUEUE, messages(1000))
        config = ConsumerConfig(max_batch_size=100, target_batch_duration=1.0)
        consumer = Consumer(client, QUEUE, handle, config, observer=Observer())
        async with running(consumer):
            await settle_tasks(400)
            assert sizes[0] == 1, "small before there is any history"
            assert max(sizes) == 100
            assert consumer.stats.completed == 1000
            pause = 0.5
            sizes.clear()
            await client.send_messages(QUEUE, messages(1500))
            await clock.advance(750)
            assert max(sizes) > 50, "at first as before"
            assert sizes[-1] <= 4, "half a second each, so two in the target of one second"
            consumer.stop_now()  # or the last handlers would wait for a clock that stands still


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"prefetch": True}, "prefetch"),
        ({"max_sessions": -1}, "max_sessions"),
        ({"session_turn": 0}, "session_turn"),
        ({"min_batch_size": 20, "max_batch_size": 10}, "max_batch_size"),
        ({"target_batch_duration": 0}, "target_batch_duration"),
        ({"receive_timeout": float("nan")}, "receive_timeout"),
        ({"drain_timeout": "soon"}, "drain_timeout"),
        ({"retry": 3}, "retry"),
        ({"retry": FixedRetry}, "retry"),
        ({"on_failure": "abandon"}, "on_failure"),
    ],
)
def test_wrong_settings_name_their_field(settings: dict[str, Any], field: str) -> None:
    """[C33]"""
    with pytest.raises(ConfigurationError) as caught:
        ConsumerConfig(**settings)
    assert caught.value.field == field


async def test_wrong_arguments_name_their_field(client: QueueClient) -> None:
    async def handle(message: ReceivedMessage) -> None: ...

    with pytest.raises(ConfigurationError, match="handler"):
        Consumer(client, QUEUE, "handle")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="prefetch"):
        Consumer(client, QUEUE, handle, ConsumerConfig(prefetch=1))
    with pytest.raises(ConfigurationError, match="config: must be a ConsumerConfig, not dict"):
        Consumer(client, QUEUE, handle, {"prefetch": 10})  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="client: must be a QueueClient, not str"):
        Consumer("memory://", QUEUE, handle)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="queue_name"):
        Consumer(client, "not a queue name", handle)
    with pytest.raises(ConfigurationError, match="delay"):
        RetryMessage(delay=-1)
    with pytest.raises(ValidationError, match="reason"):
        RejectMessage("")
    with pytest.raises(ValidationError, match="description: must be a text or None, not ValueError"):
        RejectMessage("Malformed", ValueError("no"))  # type: ignore[arg-type]


SIGNALLED = """
import asyncio, sys
from queue_runtime import Consumer, ConsumerConfig, Message, QueueClient

async def main():
    async with QueueClient("memory://") as client:
        await client.send_messages("q", [Message(body=b"x") for _ in range(3)])

        async def handle(message):
            print("started", flush=True)
            await asyncio.sleep(float(sys.argv[1]))

        async def watch():
            # One handler runs and two messages wait: they are released when the drain begins.
            while (await client.counts("q")).active != 2:
                await asyncio.sleep(0.001)
            print("draining", flush=True)

        watching = asyncio.create_task(watch())
        config = ConsumerConfig(max_concurrency=1, min_batch_size=3)
        stats = await Consumer(client, "q", handle, config).run(handle_signals=True)
        await watching
        counts = await client.counts("q")
        print("end", stats.completed, counts.active, counts.in_flight, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("patience", "completed"), [("1", 1), ("60", 0)])
def test_signals_drain_and_a_second_one_releases(number: signal.Signals, patience: str, completed: int) -> None:
    """[C40] with a real process and real signals."""
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED, patience], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        assert process.stdout.readline() == "draining\n"
        if patience == "60":
            process.send_signal(number)
        assert process.stdout.read() == f"end {completed} {3 - completed} 0\n"
    assert process.returncode == 0
