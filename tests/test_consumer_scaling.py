"""A consumer that follows its load, end to end on the in-memory provider [C39, C45]."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from remote.running import RunningBroker

from queue_runtime import (
    ConfigurationError,
    Consumer,
    ConsumerConfig,
    InMemoryConfig,
    Limits,
    ManualClock,
    Message,
    QueueClient,
    ReceivedMessage,
    ScalingConfig,
)
from queue_runtime.clock import settle_tasks, sleep

NUMBERS = itertools.count()


class Work:
    """Handlers that take their time on the client's clock."""

    def __init__(self, clock: ManualClock, seconds: Callable[[int], float]) -> None:
        self.clock = clock
        self.seconds = seconds
        self.running = 0
        self.most = 0

    async def __call__(self, message: ReceivedMessage) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await sleep(self.clock, self.seconds(self.running))
        finally:
            self.running -= 1


class Running:
    """A consumer at work, on a clock that the test turns."""

    def __init__(self, seconds: Callable[[int], float], config: ConsumerConfig) -> None:
        self.clock = ManualClock()
        self.client = QueueClient("memory://?max_lock_renewal=3600", clock=self.clock)
        self.work = Work(self.clock, seconds)
        self.consumer = Consumer(self.client, "q", self.work, config)

    async def __aenter__(self) -> "Running":
        self.task = asyncio.ensure_future(self.consumer.run())
        await settle_tasks()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.consumer.stop_now()
        await self.task
        await self.client.close()

    async def send(self, count: int, sessions: int = 0) -> None:
        keys = [f"s{number % sessions}" if sessions else None for number in range(count)]
        await self.client.send_messages("q", [Message(body=b"x", session_id=key) for key in keys])

    async def depth(self) -> int:
        return (await self.client.counts("q")).active

    @property
    def concurrency(self) -> int:
        return self.consumer.limits.concurrency


def config(**changes: Any) -> ConsumerConfig:
    return ConsumerConfig(**{"max_concurrency": 16, "prefetch": 100, "scaling": ScalingConfig(), **changes})


async def test_a_backlog_is_worked_off_by_more_handlers_that_go_again() -> None:
    """800 messages of 0.2 s: one handler would take 160 s."""
    async with Running(lambda running: 0.2, config()) as running:
        assert running.consumer.limits == (1, 2, 1, 1)
        await running.send(800)
        await running.clock.advance(22)
        assert await running.depth() == 0
        assert running.work.most == 16
        await running.clock.advance(120)
        assert running.consumer.limits == (1, 2, 1, 1)
        assert running.consumer.stats.completed == 800


async def test_handlers_that_do_not_help_are_given_up() -> None:
    """Whatever they call answers 20 times a second and no more: four handlers of 0.2 s are all it takes."""
    async with Running(lambda running: 0.2 * max(1, running / 4), config()) as running:
        await running.send(4000)
        await running.clock.advance(60)
        seen = []
        for _ in range(60):
            await running.clock.advance(1)
            seen.append(running.concurrency)
        assert sum(seen) / len(seen) < 6
        assert running.consumer.stats.completed > 0.85 * 20 * 120


async def test_a_steady_load_moves_nothing() -> None:
    async with Running(lambda running: 0.1, config()) as running:
        seen = []
        for second in range(150):
            await running.send(30)
            await running.clock.advance(1)
            if second > 90:
                seen.append(running.consumer.limits)
        assert len(set(seen)) == 1
        assert running.consumer.stats.completed > 30 * 149


async def test_sessions_are_held_and_handled_by_as_many_as_there_are() -> None:
    async with Running(lambda running: 0.2, config(source="sessions")) as running:
        await running.send(600, sessions=6)
        await running.clock.advance(30)
        assert 4 <= running.concurrency <= 6
        assert running.work.most <= 6
        assert running.consumer.limits.sessions >= 6


async def test_messages_that_take_long_are_seen_while_they_run() -> None:
    """Each handler takes 30 s, many looks long: the time so far counts, though none has ended."""
    async with Running(lambda running: 30.0, config()) as running:
        await running.clock.advance(5)
        await running.send(1)
        await running.clock.advance(10)
        assert running.consumer.stats.handler_seconds == 0.0
        assert running.consumer.stats.busy_seconds == pytest.approx(10, abs=0.1)
        await running.send(50)
        await running.clock.advance(260)
        assert running.work.most >= 8


async def test_the_end_leaves_nothing_behind() -> None:
    """[C40] Also in the middle of growing."""
    async with Running(lambda running: 0.2, config()) as running:
        await running.send(100)
        await running.clock.advance(3)
    before = running.consumer.limits
    await running.clock.advance(100)
    assert running.consumer.limits == before


async def test_an_idle_consumer_is_looked_at_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """[P11]"""
    async with Running(lambda running: 0.2, config(receive_timeout=1000, stall_after=None)) as running:
        await running.clock.advance(100)
        calls = []
        call_later = running.clock.call_later
        monkeypatch.setattr(
            running.clock, "call_later", lambda delay, what: (calls.append(delay), call_later(delay, what))[1]
        )
        await running.clock.advance(500)
        assert calls == [10.0] * 50


async def test_batches_scale_by_their_handlers() -> None:
    clock = ManualClock()

    async def handle(messages: list[ReceivedMessage]) -> None:
        await sleep(clock, 0.5)

    async with QueueClient(InMemoryConfig(max_lock_renewal=3600), clock=clock) as client:
        settings = config(handler_form="batch", min_batch_size=10, max_batch_size=10, prefetch=200)
        consumer = Consumer(client, "q", handle, settings)
        task = asyncio.ensure_future(consumer.run())
        await client.send_messages("q", [Message(body=b"x") for _ in range(5000)])
        await clock.advance(40)
        assert consumer.limits.concurrency == 16
        assert consumer.limits.prefetch >= 160
        assert consumer.stats.completed > 2000
        consumer.stop_now()
        await task


async def test_it_grows_under_real_load() -> None:
    """Real time, real threads: 400 plain handlers that wait 5 ms take 2 s one after another."""
    from time import sleep as wait

    async with QueueClient("memory://") as client:
        await client.send_messages("q", [Message(body=b"x") for _ in range(400)])
        consumer = Consumer(client, "q", lambda message: wait(0.005), config(scaling=ScalingConfig(interval=0.05)))
        task = asyncio.ensure_future(consumer.run())
        most = 0
        while consumer.stats.completed < 400:
            await asyncio.sleep(0.01)
            most = max(most, consumer.limits.concurrency)
        consumer.stop()
        await task
        assert most > 1


@pytest.mark.parametrize("field", ["scaling", "memory", "breaker"])
def test_what_is_no_such_setting_is_named(field: str) -> None:
    """[C33]"""
    with pytest.raises(ConfigurationError, match=field):
        ConsumerConfig(**{field: True})  # type: ignore[arg-type]


async def test_messages_of_sessions_and_others_need_room_for_both() -> None:
    async with QueueClient("memory://") as client:
        with pytest.raises(ConfigurationError, match="min_prefetch"):
            Consumer(client, "q", print, config(scaling=ScalingConfig(min_prefetch=1)))
        Consumer(client, "q", print, config(scaling=ScalingConfig(min_prefetch=1), source="queue"))


async def test_the_bytes_that_are_configured_stay_the_most() -> None:
    async with QueueClient("memory://") as client:
        consumer = Consumer(client, "q", print, config(prefetch_bytes=1000))
        consumer.set_prefetch_bytes(5000)
        assert consumer._runner.bytes.limit == 1000
        consumer.set_prefetch_bytes(500)
        assert consumer._runner.bytes.limit == 500
        consumer.set_prefetch_bytes(None)
        assert consumer._runner.bytes.limit == 1000


def test_limits_have_names() -> None:
    assert Limits(1, 2)._asdict() == {"concurrency": 1, "prefetch": 2, "pollers": 1, "sessions": 1}


@pytest.fixture
async def full_queue(broker: RunningBroker) -> str:
    """A URL of a queue in another process, with 150 messages of 1 MiB."""
    settings = {"space": f"memory-{os.getpid()}-{next(NUMBERS)}", "max_message_size": 2 << 20}
    async with QueueClient(broker.config(**settings)) as client:
        for _ in range(15):
            await client.send_messages("q", [Message(body=os.urandom(1 << 20)) for _ in range(10)])
    return broker.url(**settings)


def consume(broker: RunningBroker, url: str, *options: str) -> dict[str, int]:
    command = [sys.executable, "-m", "surviving", url, *options]
    done = subprocess.run(command, env=broker.environment, capture_output=True, text=True, timeout=60, check=True)
    answer: dict[str, int] = json.loads(done.stdout)
    return answer


async def test_it_survives_a_real_limit_of_the_memory(broker: RunningBroker, full_queue: str) -> None:
    """[C39] 80 MiB are left to a consumer that may hold 1000 messages: it holds what fits and handles them all."""
    seen = await asyncio.to_thread(consume, broker, full_queue, "--room", "80", "--watch")
    assert seen["completed"] == 150
    assert seen["peak"] < seen["limit"]
    assert seen["largest_prefetch_bytes"] < 80 << 20


async def test_without_a_look_at_the_memory_it_would_not(broker: RunningBroker, full_queue: str) -> None:
    """The same consumer, with no limit to die of: its address space grows beyond the one above."""
    seen = await asyncio.to_thread(consume, broker, full_queue)
    assert seen["completed"] == 150
    assert seen["peak"] > seen["before"] + (80 << 20)
