"""Consumers over a service that breaks and processes that die: nothing is lost, and no order is broken [C24, C37]."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from queue_runtime.client import QueueClient
from queue_runtime.consumer import Consumer
from queue_runtime.errors import QueueRuntimeError
from queue_runtime.handling import ConsumerConfig
from queue_runtime.message import Message, ReceivedMessage
from queue_runtime.retry import FixedRetry
from remote.config import RemoteConfig
from remote.running import RunningBroker

PATIENT = FixedRetry(delay=0.02, attempts=500)


class Record:
    """What was handled: how often each message, and each session in which order."""

    def __init__(self) -> None:
        self.times: Counter[tuple[str | None, int]] = Counter()
        self.first: dict[str | None, list[int]] = defaultdict(list)
        self.last: dict[str | None, int] = {}
        self.went_back: list[tuple[str, int]] = []
        """What came back after a later one of its session had been handled."""

    async def handle(self, message: ReceivedMessage) -> None:
        self.note(message.session_id, int(message.body))

    def note(self, session_id: str | None, number: int) -> None:
        if session_id is not None and number < self.last.get(session_id, 0):
            self.went_back.append((session_id, number))
        self.last[session_id] = number
        self.times[session_id, number] += 1
        if self.times[session_id, number] == 1:
            self.first[session_id].append(number)

    @property
    def repeated(self) -> int:
        return self.times.total() - len(self.times)

    def check(self, sessions: int, each: int) -> None:
        """Every message was handled, and those of a session for the first time in their order."""
        assert len(self.first) == sessions
        assert not self.went_back
        for session_id, numbers in self.first.items():
            if session_id is not None:
                assert numbers == list(range(each))
            assert sorted(numbers) == list(range(each))


def names(sessions: int) -> list[str | None]:
    return [None, *(f"s{number}" for number in range(1, sessions))]


async def send(client: QueueClient, sessions: int, each: int, start: int = 0) -> None:
    """To so many sessions, the first of which is none, each message of a session after its predecessor."""
    for number in range(start, each):
        await client.send_messages("q", [Message(body=b"%d" % number, session_id=name) for name in names(sessions)])


@contextlib.asynccontextmanager
async def consuming(client: QueueClient, record: Record, **settings: object) -> AsyncIterator[Consumer]:
    consumer = Consumer(client, "q", record.handle, ConsumerConfig(**settings))  # type: ignore[arg-type]
    task = asyncio.create_task(consumer.run())
    try:
        yield consumer
    finally:
        consumer.stop()
        await asyncio.wait_for(task, 20)


async def all_handled(record: Record, count: int, within: float = 40.0) -> None:
    async with asyncio.timeout(within):
        while len(record.times) < count:
            await asyncio.sleep(0.01)


async def empty(config: RemoteConfig, within: float = 10.0) -> None:
    """Wait until all is settled; nothing became a dead letter."""
    async with asyncio.timeout(within), QueueClient(config) as client:
        while True:
            with contextlib.suppress(QueueRuntimeError):
                counts = await client.counts("q")
                assert counts.dead_lettered == 0
                if counts.active == counts.in_flight == counts.scheduled == 0:
                    return
            await asyncio.sleep(0.01)


async def test_connections_dropped_at_random(broker: RunningBroker) -> None:
    """20,000 messages in 200 sessions: what was handled and could not be settled comes again, and is counted."""
    config = broker.config(max_delivery_count=1000, prefetch=1000, max_concurrency=64, settle_interval=0.001)
    record, chance, drops = Record(), random.Random(11), 0
    async with QueueClient(config) as client:
        for start in range(0, 100, 10):
            messages = [
                Message(body=b"%d" % number, session_id=f"s{session}")
                for number in range(start, start + 10)
                for session in range(200)
            ]
            await client.send_messages("q", messages)
        async with consuming(client, record, max_sessions=200) as consumer:
            while drops < 5:
                await asyncio.sleep(chance.uniform(0.1, 0.8))
                drops += await broker.in_thread("ask", "drop", space=config.space)
            await all_handled(record, 20_000)
            await empty(config)
            stats = consumer.stats
    record.check(200, 100)
    print(f"{drops} drops, {record.repeated} handled again; {stats}")
    assert record.repeated <= drops * 1000, "what was held when it broke"


@pytest.mark.parametrize("linger", [0.0, 30.0], ids=["locks end", "locks stay"])
async def test_every_kind_of_fault_at_once(broker: RunningBroker, linger: float) -> None:
    """Torn answers, refused and stolen messages, throttling, detached receivers: all is handled in order."""
    config = broker.config(
        max_delivery_count=1000,
        linger=linger,
        lock_duration=1.0,
        session_lock_duration=1.0,
        settle_interval=0.001,
        request_timeout=0.5,
    )
    record, chance = Record(), random.Random(5)
    async with QueueClient(config) as client:
        await send(client, 20, 50)
        async with consuming(client, record, max_sessions=10, session_turn=20, receive_timeout=0.5):
            while len(record.times) < 1000:
                await broker.in_thread("ask", "drop_share", share=0.01, seed=chance.randrange(1000))
                await broker.in_thread("ask", "refuse_every", number=7)
                for fault in ({"fault": "steal", "count": 3}, {"fault": "throttle", "method": "accept", "count": 2}):
                    await broker.in_thread("ask", **fault)
                await broker.in_thread("ask", "mute", method=chance.choice(["settle", "receive", "renew"]), count=1)
                await broker.in_thread("ask", "detach", queue="q", space=config.space)
                await broker.in_thread("ask", "steal_session", session_id=f"s{chance.randrange(1, 20)}")
                await asyncio.sleep(0.2)
                await broker.in_thread("ask", "reset")
                await asyncio.sleep(0.2)
            await empty(config)
    record.check(20, 50)
    print(f"{record.repeated} handled again")


async def test_the_broker_killed_in_the_middle(durable_broker: RunningBroker) -> None:
    """[C37, C47] Three times, while there are senders and a consumer: both go on with the clients that they have."""
    config = durable_broker.config(
        max_delivery_count=1000, settle_interval=0.001, max_concurrency=16, prefetch=100, retry=PATIENT
    )
    record, chance = Record(), random.Random(3)
    async with (
        QueueClient(config) as sender,
        QueueClient(config) as client,
        consuming(client, record, max_sessions=30),
    ):
        sending = asyncio.create_task(send(sender, 30, 100))
        for _ in range(3):
            await asyncio.sleep(chance.uniform(0.1, 0.4))
            await durable_broker.in_thread("restart")
        await asyncio.wait_for(sending, 30)
        await all_handled(record, 3000)
        await empty(config)
    record.check(30, 100)
    print(f"{record.repeated} handled again")


async def test_a_broker_that_stands_still(mortal_broker: RunningBroker) -> None:
    """[C37, C38] For longer than the locks last, with connections that look well all the while."""
    config = mortal_broker.config(
        max_delivery_count=1000,
        lock_duration=0.4,
        session_lock_duration=0.4,
        request_timeout=0.3,
        settle_interval=0.001,
        max_concurrency=8,
    )
    record = Record()
    async with QueueClient(config) as client:
        await send(client, 10, 100)
        async with consuming(client, record, max_sessions=5, receive_timeout=0.5):
            for _ in range(2):
                await asyncio.sleep(0.1)
                os.kill(mortal_broker.pid, signal.SIGSTOP)
                await asyncio.sleep(0.8)
                os.kill(mortal_broker.pid, signal.SIGCONT)
            await all_handled(record, 1000)
            await empty(config)
    record.check(10, 100)
    print(f"{record.repeated} handled again")


async def test_a_receive_whose_answer_was_lost(broker: RunningBroker) -> None:
    """[C24] What it took is locked at the service, while the session is held still: nothing may pass it over."""
    config = broker.config(linger=30.0, request_timeout=0.2, settle_interval=0.001)
    record = Record()
    async with QueueClient(config) as client:
        await client.send_messages("q", [Message(body=b"%d" % number, session_id="s") for number in range(30)])
        await broker.in_thread("ask", "mute", method="receive", count=1)
        async with consuming(client, record, source="sessions", session_batch=3):
            await all_handled(record, 30)
            await empty(config)
    record.check(1, 30)
    assert record.repeated == 0


def test_consumers_killed_at_random(broker: RunningBroker, tmp_path: Path) -> None:
    """Three processes, kill -9 again and again: others go on at once, and it shows only in what comes twice."""
    sessions, each, chance = 40, 75, random.Random(17)
    settings = {"space": f"killed-{os.getpid()}", "max_delivery_count": 1000, "prefetch": 60, "max_concurrency": 8}
    url, config = broker.url(**settings), broker.config(**settings)
    log = tmp_path / "handled"
    command = [sys.executable, "-m", "queue_runtime", "run", "remote.handlers:log_it", "--provider", url]
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        environment = broker.environment | {"HANDLED": str(log)}
        with open(tmp_path / "output", "ab") as output:
            running.append(subprocess.Popen([*command, "--queue", "q"], env=environment, stdout=output, stderr=output))

    async def fill() -> None:
        async with QueueClient(config) as client:
            await send(client, sessions, each)

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    kills = 0
    try:
        for _ in range(3):
            start()
        asyncio.run(fill())
        ends = time.monotonic() + 60
        while len({tuple(line.split()[:2]) for line in lines()}) < sessions * each:
            assert time.monotonic() < ends
            assert all(process.poll() is None for process in running), (tmp_path / "output").read_text()
            time.sleep(chance.uniform(0.02, 0.1))
            if lines() and kills < 8:
                victim = running.pop(chance.randrange(3))
                victim.kill()
                victim.wait()
                kills += 1
                start()
        asyncio.run(empty(config))
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(20)
    record = Record()
    for line in lines():
        session_id, number, _ = line.split()
        record.note(None if session_id == "None" else session_id, int(number))
    record.check(sessions, each)
    assert kills >= 3
    assert record.repeated <= kills * 60, "what a killed process held"
    print(f"{kills} kills, {record.repeated} handled again")
