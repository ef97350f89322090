"""The controller [C39, C45]: when it looks, what it asks, and what it does with what it sees."""

import asyncio
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from queue_runtime import (
    Limits,
    ManualClock,
    MemoryConfig,
    Message,
    QueueClient,
    QueueCounts,
    ReceivedMessage,
    ScalingConfig,
)
from queue_runtime.control import Controller
from queue_runtime.pressure import MemoryPressure, MemoryUse

MOST = Limits(32, 200, 1, 10)


@dataclass(frozen=True)
class Stats:
    received: int = 0
    completed: int = 0
    abandoned: int = 0
    dead_lettered: int = 0
    deferred: int = 0
    locks_lost: int = 0
    settle_errors: int = 0
    handler_seconds: float = 0.0
    busy_seconds: float = 0.0
    held_bytes: int = 0
    waiting: int = 0
    running: int = 0
    sessions_open: int = 0


@dataclass
class Desk:
    """A consumer that works as the test says, and keeps what it was told."""

    clock: ManualClock = field(default_factory=ManualClock)
    limits: Limits = MOST
    stats: Stats = field(default_factory=Stats)
    bytes: int | None = None

    def set_limits(self, limits: Limits) -> None:
        self.limits = limits

    def set_prefetch_bytes(self, limit: int | None) -> None:
        self.bytes = limit

    def work(self, seconds: float, handler_seconds: float) -> None:
        """Every handler is busy for so long, and as many messages wait as may be held."""
        spent = self.limits.concurrency * seconds
        done = round(spent / handler_seconds)
        self.stats = replace(
            self.stats,
            received=self.stats.received + done,
            completed=self.stats.completed + done,
            handler_seconds=self.stats.handler_seconds + spent,
            busy_seconds=self.stats.busy_seconds + spent,
            running=self.limits.concurrency,
            waiting=max(0, self.limits.prefetch - self.limits.concurrency),
        )

    def rest(self) -> None:
        self.stats = replace(self.stats, running=0, waiting=0, held_bytes=0)


class Broker:
    """Counts, and how often it was asked."""

    def __init__(self, active: int = 1000) -> None:
        self.active = active
        self.asked = 0
        self.error: Exception | None = None

    async def counts(self) -> QueueCounts:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return QueueCounts(active=self.active, in_flight=0, scheduled=0, deferred=0, dead_lettered=0)


class Watching(MemoryPressure):
    """Real rules over figures that the test gives."""

    used = 0

    def uses(self) -> list[MemoryUse]:
        return [MemoryUse(self.used, 100 << 20, "the test")]


async def work(desk: Desk, seconds: int, handler_seconds: float = 0.05) -> None:
    for _ in range(seconds):
        desk.work(1.0, handler_seconds)
        await desk.clock.advance(1.0)


async def test_it_begins_low_grows_under_load_and_comes_back() -> None:
    desk, broker = Desk(), Broker()
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(), counts=broker.counts)
    controller.start()
    assert desk.limits == (1, 2, 1, 1)
    await work(desk, 12)
    assert desk.limits.concurrency == 32
    assert desk.limits.prefetch > 64
    desk.rest()
    broker.active = 0
    await desk.clock.advance(90)
    assert desk.limits == (1, 2, 1, 1)
    controller.stop()


async def test_it_looks_once_an_interval_and_seldom_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """[P11] 60 seconds of work are 60 looks; an idle hour is one every ten seconds, and nothing is counted."""
    desk, broker = Desk(), Broker(0)
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(), counts=broker.counts)
    looks: list[float] = []
    look = controller._look
    monkeypatch.setattr(controller, "_look", lambda: (looks.append(desk.clock.monotonic()), look()))
    controller.start()
    await work(desk, 60)
    assert len(looks) == 60
    desk.rest()
    await desk.clock.advance(120)
    looks.clear()
    asked = broker.asked
    await desk.clock.advance(3600)
    assert len(looks) == 360
    assert broker.asked == asked
    controller.stop()
    await desk.clock.advance(3600)
    assert len(looks) == 360


async def test_the_first_message_after_a_quiet_time_wakes_it(message: ReceivedMessage) -> None:
    desk = Desk()
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig())
    controller.start()
    await desk.clock.advance(200)
    assert desk.limits.concurrency == 1
    controller.received([message])
    await work(desk, 3)
    assert desk.limits.concurrency == 5, "one look each second, as if there had been no quiet time"
    controller.stop()


async def test_the_depth_is_asked_for_at_its_own_interval() -> None:
    desk, broker = Desk(), Broker()
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(count_interval=7.0), counts=broker.counts)
    controller.start()
    await work(desk, 70)
    assert broker.asked == 10
    controller.stop()


async def test_what_was_received_since_waits_no_more() -> None:
    desk, broker = Desk(), Broker(1000)
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(count_interval=7.0), counts=broker.counts)
    controller.start()
    await work(desk, 1)
    received, depth = desk.stats.received, controller._counting.depth
    assert depth(3.0, received) == 1000
    assert depth(3.0, received + 300) == 700
    assert depth(3.0, received + 3000) == 0
    assert depth(1.0 + 3 * 7.0 + 0.1, received) is None, "that is too long ago"
    controller.stop()


async def test_where_counting_is_cheap_each_look_counts() -> None:
    desk, broker = Desk(), Broker()
    controller = Controller(
        desk, "q", desk.clock, scaling=ScalingConfig(), counts=broker.counts, is_counting_cheap=True
    )
    controller.start()
    await work(desk, 10)
    assert broker.asked == 10
    controller.stop()


async def test_counts_that_fail_do_not_hurt(caplog: pytest.LogCaptureFixture) -> None:
    """They are asked for ever more rarely, it is told once, and the handlers follow what is known."""
    desk, broker = Desk(), Broker()
    broker.error = OSError("no permission")
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(), counts=broker.counts)
    controller.start()
    await work(desk, 300)
    assert desk.limits.concurrency == 32
    assert broker.asked < 12
    assert sum("cannot count" in record.message for record in caplog.records) == 1
    controller.stop()


async def test_a_count_under_way_is_ended_by_stop() -> None:
    """The leak check of every test sees that it is."""
    desk = Desk()

    async def never() -> QueueCounts:
        await asyncio.Event().wait()
        raise AssertionError

    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(), counts=never)
    controller.start()
    await work(desk, 20)
    assert desk.limits.concurrency > 1
    controller.stop()


async def test_each_change_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "queue_runtime.control")
    desk, broker = Desk(), Broker()
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(), counts=broker.counts)
    controller.start()
    await work(desk, 40)
    controller.stop()
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == (
        "limits set, queue=q: concurrency 32 to 1, prefetch 200 to 2, sessions 10 to 1: the consumer starts"
    )
    assert "concurrency 1 to 2" in texts[1]
    assert texts[1].endswith("handlers needed")
    assert len(texts) == len(set(texts)) <= 12


async def test_a_consumer_that_breaks_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig())
    controller.start()

    def refuse(limits: Limits) -> None:
        raise RuntimeError("not now")

    accept, desk.set_limits = desk.set_limits, refuse  # type: ignore[method-assign]
    await work(desk, 3)
    assert any("cannot control" in record.message for record in caplog.records)
    desk.set_limits = accept  # type: ignore[method-assign]
    await work(desk, 5)
    assert desk.limits.concurrency > 1
    controller.stop()


async def test_memory_alone_opens_step_by_step_and_closes_before_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    """100 MiB are the limit, 80 are high: bytes are bounded by what is left below it, from the first moment on."""
    desk = Desk()
    memory = Watching(MemoryConfig())
    memory.used = 20 << 20
    controller = Controller(desk, "q", desk.clock, memory=memory)
    controller.start()
    assert desk.limits == (32, 64, 1, 10), "twice the handlers to begin with"
    assert desk.bytes == 60 << 20
    desk.stats = Stats(received=10, waiting=10, held_bytes=10 << 20)
    memory.used = 30 << 20
    await desk.clock.advance(1)
    assert desk.limits.prefetch == 128
    assert desk.bytes == 60 << 20
    memory.used = 85 << 20
    await desk.clock.advance(1)
    assert desk.limits.prefetch == 64
    assert desk.bytes == 5 << 20
    memory.used = 95 << 20
    await desk.clock.advance(1)
    assert desk.limits == (16, 2, 1, 10)
    memory.used = 30 << 20
    desk.stats = Stats(received=20)
    await desk.clock.advance(7)
    assert desk.limits == MOST
    levels = [record.getMessage() for record in caplog.records if "memory pressure" in record.getMessage()]
    assert [text.split("memory ")[2].split(":")[0] for text in levels] == ["high", "critical", "normal"]
    controller.stop()


async def test_a_memory_of_which_nothing_is_known_bounds_nothing(tmp_path: Path) -> None:
    desk = Desk()
    controller = Controller(desk, "q", desk.clock, memory=MemoryPressure(root=tmp_path))
    controller.start()
    await desk.clock.advance(10)
    assert desk.limits == MOST
    assert desk.bytes is None
    controller.stop()


async def test_memory_has_the_last_word_over_the_load() -> None:
    desk, memory = Desk(), Watching(MemoryConfig())
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(), memory=memory, counts=Broker().counts)
    controller.start()
    memory.used = 85 << 20
    await work(desk, 20)
    assert desk.limits == (1, 2, 1, 1)
    memory.used = 10 << 20
    await work(desk, 20)
    assert desk.limits.concurrency > 8
    controller.stop()


async def test_of_sessions_only_those_held_can_run(message: ReceivedMessage) -> None:
    desk = Desk()
    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(), counts=Broker().counts)
    controller.start()
    desk.stats = Stats(sessions_open=3)
    await work(desk, 30)
    assert desk.limits.concurrency == 3
    controller.received([message])
    await work(desk, 1)
    assert desk.limits.concurrency > 3, "messages without a session may run beside them"
    controller.stop()


@pytest.fixture
async def message() -> Any:
    async with QueueClient("memory://") as client:
        await client.send_message("q", Message(body=b"x"))
        [message] = await client.receive_messages("q", 1)
        yield message


async def test_a_look_at_the_memory_alone_is_rare_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """[P11]"""
    desk = Desk()
    controller = Controller(desk, "q", desk.clock, memory=Watching(MemoryConfig()))
    looks: list[float] = []
    look = controller._look
    monkeypatch.setattr(controller, "_look", lambda: (looks.append(desk.clock.monotonic()), look()))
    controller.start()
    await desk.clock.advance(600)
    controller.stop()
    assert len(looks) < 70


async def test_a_count_that_does_not_come_back_is_asked_for_again() -> None:
    desk, broker = Desk(), Broker()
    silent = True

    async def counts() -> QueueCounts:
        if silent:
            await asyncio.Event().wait()
        return await broker.counts()

    controller = Controller(desk, "q", desk.clock, scaling=ScalingConfig(), counts=counts)
    controller.start()
    await work(desk, 3)
    silent = False
    await work(desk, 150)
    controller.stop()
    assert broker.asked
