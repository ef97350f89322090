"""Consumers of every configuration, through faults and changed limits: nothing lost, stuck or left behind.

Each seed draws a configuration over all fields, a handler that fits it, and faults of the service. Then the weather
turns fine: everything must be worked off, whatever happened before. Then the consumer ends in one of several ways.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from wrapping import Recorder, fail, hang, wrap

from queue_runtime.breaker import BreakerConfig
from queue_runtime.client import QueueClient
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.config import InMemoryConfig
from queue_runtime.consumer import Consumer
from queue_runtime.errors import (
    ConnectionFailedError,
    QueueRuntimeError,
    ServiceUnavailableError,
)
from queue_runtime.handling import ConsumerConfig, ConsumerObserver, RejectMessage, RetryMessage
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.middleware import Fetch, Middleware, Next, Settle
from queue_runtime.pressure import MemoryConfig
from queue_runtime.providers.base import COMPLETE, Action, Disposition, Outcome
from queue_runtime.retry import FixedRetry, NoRetry
from queue_runtime.scaling import Limits, ScalingConfig

QUEUE = "orders"
SEEDS = 40
LONGEST = 3000.0
"""Seconds of the manual clock in which everything must be done once there are no faults any more."""


class Book(ConsumerObserver):
    """What was settled how often, and the numbers that were completed, by session."""

    def __init__(self) -> None:
        self.completed: dict[str | None, list[int]] = defaultdict(list)
        self.settled = 0
        self.errors = 0
        self.received = 0
        self.opened = 0

    def batch_received(self, messages: Sequence[ReceivedMessage]) -> None:
        self.received += len(messages)

    def session_opened(self, session_id: str) -> None:
        self.opened += 1

    def session_closed(self, session_id: str) -> None:
        self.opened -= 1

    def message_settled(
        self, message: ReceivedMessage, disposition: Disposition, error: QueueRuntimeError | None
    ) -> None:
        if error is not None:
            self.errors += 1
            return
        self.settled += 1
        if disposition.action is Action.COMPLETE:
            self.completed[message.session_id].append(int(message.body[:4]))


class Weather:
    """What goes wrong, and when no more."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.is_fine = False
        self.fine = asyncio.Event()
        self.badness = chance.choice([0.0, 0.1, 0.4])

    def strikes(self, odds: float) -> bool:
        return not self.is_fine and self.chance.random() < odds * self.badness

    def clear(self) -> None:
        self.is_fine = True
        self.fine.set()


class Meddler(Middleware):
    """Hooks that leave out, decide, raise, and forget to go on."""

    def __init__(self, weather: Weather) -> None:
        self.weather = weather

    async def receive(self, fetch: Fetch) -> list[ReceivedMessage]:
        messages = await fetch()
        if messages and self.weather.strikes(0.3):
            kind = self.weather.chance.random()
            if kind < 0.3:
                raise ServiceUnavailableError("not taken")
            if kind < 0.6:
                await settle_tasks(3)
            elif messages[0].session_id is None:
                return messages[: len(messages) // 2]
        return messages

    async def handle(self, context: Any, call_next: Next) -> None:
        if self.weather.strikes(0.3):
            raise KeyError("the hook")
        if self.weather.strikes(0.2):
            for message in context.messages:
                context.of(message).dead_letter("Meddled")
        await call_next()

    async def settle(self, message: ReceivedMessage, disposition: Disposition, call_next: Settle) -> Outcome:
        if self.weather.strikes(0.2):
            raise ZeroDivisionError("before")
        if self.weather.strikes(0.1):
            return None
        outcome = await call_next(disposition)
        if outcome is not None and self.weather.strikes(0.5):
            outcome = await call_next(disposition)
        if self.weather.strikes(0.1):
            raise ZeroDivisionError("after")
        return outcome


def failure(weather: Weather) -> None:
    """Raise, or not, as a handler does."""
    if weather.strikes(0.5):
        kind = weather.chance.randrange(6)
        if kind == 0:
            raise RetryMessage(weather.chance.choice([0, 0.5, 3, 40]))
        if kind == 1:
            raise RejectMessage("no")
        raise ValueError("as it happens")


def handlers(weather: Weather, form: str) -> tuple[Callable[..., Any], str]:
    chance = weather.chance

    async def turns() -> None:
        await settle_tasks(chance.choice([0, 0, 1, 4]))
        if weather.strikes(0.1):
            try:
                await weather.fine.wait()
            except asyncio.CancelledError:
                if chance.random() < 0.5:
                    raise
        if weather.strikes(0.1):
            raise asyncio.CancelledError

    async def one(message: ReceivedMessage) -> None:
        await turns()
        failure(weather)

    async def one_deciding(message: ReceivedMessage, context: Any) -> None:
        await turns()
        if weather.strikes(0.5):
            context.abandon(chance.choice([0, 2]))
        failure(weather)

    async def batch(messages: Sequence[ReceivedMessage], context: Any) -> None:
        assert messages
        assert len({message.session_id for message in messages}) == 1
        await turns()
        if weather.strikes(0.7):  # from one on, or else they would be out of order
            delay = chance.choice([0, 2])
            for message in messages[chance.randrange(len(messages)) :]:
                context.of(message).abandon(delay)
        failure(weather)

    def plain(message: ReceivedMessage) -> None:
        failure(weather)

    def plain_batch(messages: Sequence[ReceivedMessage]) -> None:
        failure(weather)

    if form == "batch":
        return chance.choice([(batch, "auto"), (batch, "auto"), (plain_batch, "thread")])
    return chance.choice([(one, "auto"), (one_deciding, "auto"), (one, "auto"), (plain, "thread")])


def drawn(chance: random.Random, weather: Weather) -> tuple[InMemoryConfig, ConsumerConfig, Callable[..., Any]]:
    pick = chance.choice
    form: Any = pick(["one", "one", "batch"])
    handler, executor = handlers(weather, form)
    smallest = pick([1, 1, 3])
    provider = InMemoryConfig(
        settlement=pick(["auto", "batched"]),
        settle_interval=0.0005,
        retry=NoRetry(),
        lock_duration=pick([2.0, 30.0]),
        session_lock_duration=pick([2.0, 30.0]),
        max_lock_renewal=pick([0.0, 5.0, 300.0]),
        max_delivery_count=pick([3, 100]),
        max_concurrency=pick([1, 2, 8]),
        prefetch=pick([2, 3, 4, 50]),
    )
    return (
        provider,
        ConsumerConfig(
            max_concurrency=pick([None, 1, 3]),
            prefetch=pick([None, 2, 4, 100]),
            prefetch_bytes=pick([None, None, 100, 1000]),
            pollers=pick([1, 1, 2, 4]),
            source="all",
            handler_form=form,
            executor=executor,  # type: ignore[arg-type]
            middleware=pick([(), (), (Meddler(weather),)]),
            min_batch_size=smallest,
            max_batch_size=pick([smallest, 10, 100]),
            target_batch_duration=pick([0.001, 1.0]),
            batch_wait=pick([0.0, 0.0, 0.5, 1.5]),
            max_sessions=pick([1, 2, 100]),
            session_turn=pick([1, 3, 100]),
            session_batch=pick([1, 3, 10]),
            session_idle=pick([0.0, 1.0, 10.0]),
            session_settlement=pick(["each", "together"]),
            receive_timeout=pick([0.5, 20.0]),
            drain_timeout=pick([0.0, 5.0]),
            stall_after=pick([None, 3.0, 300.0]),
            retry=FixedRetry(attempts=pick([2, 50]), delay=pick([0.0, 0.0, 0.5, 20.0])),
            on_failure=pick([None, None, lambda message, error: COMPLETE if chance.random() < 0.1 else 1 / 0]),
            breaker=pick(
                [None, BreakerConfig(failures=pick([1, 3]), open_for=pick([0.5, 30.0]), successes=pick([1, 3]))]
            ),
            scaling=pick([None, None, ScalingConfig(shrink_after=pick([0.0, 30.0]))]),
            memory=pick([None, None, None, MemoryConfig()]),
        ),
        handler,
    )


def strike(weather: Weather, recorder: Recorder, client: QueueClient) -> None:
    """Have the service fail once."""
    faults = weather.chance.choice(
        [
            recorder.settle_faults,
            recorder.settle_faults,
            recorder.renew_faults,
            recorder.receive_faults,
            recorder.accept_faults,
            recorder.close_faults,
        ]
    )
    bug = ZeroDivisionError("bug") if faults is recorder.settle_faults else ServiceUnavailableError("busy")
    some = [fail(ServiceUnavailableError("busy")), fail(ConnectionFailedError("gone")), fail(bug)]
    if faults is recorder.settle_faults and not client.settles_at_once:
        some.append(hang)
    faults.append(weather.chance.choice(some))


def change_limits(chance: random.Random, consumer: Consumer) -> None:
    pick = chance.choice
    if pick([True, False]):
        consumer.set_limits(Limits(pick([1, 2, 10]), pick([2, 3, 60]), pick([1, 3]), pick([1, 2, 50])))
    else:
        consumer.set_prefetch_bytes(pick([None, 30, 300, 3000]))


def left_over(consumer: Consumer) -> dict[str, Any]:
    """What is held still; nothing may be."""
    runner, sessions, queue = consumer._runner, consumer._session_feed, consumer._queue_feed
    assert sessions is not None
    assert queue is not None
    held = {
        "room": runner.room.taken,
        "permits": runner.permits.taken,
        "places": sessions.places.taken,
        "bytes": runner.bytes.held,
        "expected bytes": round(runner.bytes._expected, 3),
        "prepaid": len(runner.prepaid),
        "held": len(runner._held),
        "lost": len(runner._lost),
        "settling": len(runner.settling),
        "waits": len(runner._waits),
        "calls": runner._calls,
        "running": runner.stats.running,
        "sessions": runner.stats.sessions_open,
        "ready": len(queue._ready),
        "workers": queue._workers,
        "accepting": sessions._accepting,
        "idlers": len(sessions._idlers),
        "fetching": len(sessions.fetching),
        "probe": 0 if runner.breaker is None else int(runner.breaker._is_probing),
        "tasks": len(consumer._tasks),
    }
    return {what: count for what, count in held.items() if count}


async def turn(clock: ManualClock, seconds: float) -> None:
    await clock.advance(seconds)
    await asyncio.sleep(0.0003)  # for threads, and for the batches, whose clock is the real one


@pytest.mark.parametrize("seed", [*range(SEEDS), 3331])
async def test_whatever_happens_all_is_done_in_order_and_nothing_stays(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """[C23] [C24] [C28] [C35] [C39] [C40]"""
    chance = random.Random(seed)
    weather = Weather(chance)
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
    can_delay = chance.random() < 0.6
    recorder = wrap(monkeypatch, abandon_delay=can_delay, settles_in_process=chance.random() < 0.4)
    clock, book = ManualClock(), Book()
    provider, config, handler = drawn(chance, weather)
    async with QueueClient(provider, clock=clock) as client:
        count = chance.randrange(5, 60)
        sessions = chance.choice([[None], ["a"], [None, "a"], [None, "a", "b", "c"], [None, *map(str, range(20))]])
        await client.send_messages(
            QUEUE,
            [
                Message(body=b"%04d" % number + b"." * chance.choice([0, 0, 90]), session_id=chance.choice(sessions))
                for number in range(count)
            ],
        )
        consumer = Consumer(client, QUEUE, handler, config, observer=book)
        task = asyncio.create_task(consumer.run())
        for _ in range(chance.randrange(25)):
            if weather.strikes(0.8):
                strike(weather, recorder, client)
            if weather.strikes(0.5):
                change_limits(chance, consumer)
            await turn(clock, chance.choice([0.0, 0.1, 1.0, 3.0]))

        waits_till_done = chance.random() < 0.7
        if waits_till_done:
            weather.clear()
            for faults in (recorder.settle_faults, recorder.renew_faults, recorder.receive_faults):
                faults.clear()
            recorder.accept_faults.clear()
            deadline = clock.monotonic() + LONGEST
            while True:
                counts = await client.counts(QUEUE)
                if not counts.active + counts.in_flight + counts.scheduled or clock.monotonic() > deadline:
                    break
                assert not task.done()
                await turn(clock, 1.0)
            assert not counts.active + counts.in_flight + counts.scheduled, (counts, left_over(consumer), config)

        ends: list[list[Callable[[], object]]] = [
            [consumer.stop],
            [consumer.stop_now],
            [task.cancel],
            [task.cancel, task.cancel],
            [consumer.stop, task.cancel],
        ]
        began = clock.monotonic()
        for end in chance.choice(ends):
            end()
            await settle_tasks(chance.randrange(6))
        while not task.done():
            await turn(clock, 0.5)
            assert clock.monotonic() - began < 100, ("does not drain", left_over(consumer), config)
        assert task.cancelled() or task.exception() is None
        await settle_tasks(5)
        assert left_over(consumer) == {}
        stats = consumer.stats
        assert stats.received == book.received
        assert stats.settle_errors == book.errors
        assert stats.completed + stats.abandoned + stats.dead_lettered + stats.deferred == book.settled
        assert book.opened == 0
        for session_id, numbers in book.completed.items():
            assert len(numbers) == len(set(numbers))
            if session_id is not None and config.session_settlement == "each":
                assert numbers == sorted(numbers)
        counts = await client.counts(QUEUE)
        there = counts.active + counts.in_flight + counts.scheduled + counts.dead_lettered
        assert there + stats.completed == count
        recorder.close_faults.clear()
        closing = asyncio.create_task(client.close())
        while not closing.done():  # a call that hangs is given up by the clock
            await turn(clock, 1.0)
        await closing
    assert unhandled == []
