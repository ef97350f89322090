"""More handlers, more consumers, more processes: how much more is done [P3, P13].

Handlers wait 5 ms, as one does that calls a service, or compute for about 2 ms under the GIL. The messages are sent
outside the clock where the queue is in this process; where it is a broker's, the clock also has one send of them all.
The rival for handlers that wait is ``asyncio.Queue`` with as many tasks: nothing but the wait itself.
``python -m bench.step_load`` shows what the controller does with this [P14].
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from queue_runtime import (
    Consumer,
    ConsumerConfig,
    ConsumerObserver,
    Disposition,
    InMemoryConfig,
    Message,
    QueueClient,
    ReceivedMessage,
    ScalingConfig,
)

ROOT = Path(__file__).resolve().parent.parent
WAIT = 0.005
ROUNDS = 40
"""Messages for each handler of a round."""
HANDLERS = [1, 2, 4, 8, 16, 32, 64]
CONSUMERS = [1, 2, 4, 8]
BURNT = 600


async def wait(message: ReceivedMessage) -> None:
    await asyncio.sleep(WAIT)


class Countdown(ConsumerObserver):
    def __init__(self, left: int) -> None:
        self.left = left
        self.done = asyncio.Event()

    def message_settled(self, message: ReceivedMessage, disposition: Disposition, error: Exception | None) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()


class Setting:
    """An event loop with a client, its queue filled anew for every round."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = self.run(self._open())

    async def _open(self) -> QueueClient:
        return QueueClient(InMemoryConfig())

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    def fill(self, count: int) -> None:
        self.run(self.client.send_messages("q", [Message(body=b"x" * 100) for _ in range(count)]))

    async def consume(self, count: int, consumers: int, config: ConsumerConfig) -> None:
        countdown = Countdown(count)
        running = [Consumer(self.client, "q", wait, config, observer=countdown) for _ in range(consumers)]
        tasks = [asyncio.ensure_future(consumer.run()) for consumer in running]
        await countdown.done.wait()
        for consumer in running:
            consumer.stop()
        await asyncio.gather(*tasks)

    def close(self) -> None:
        self.run(self.client.close())
        self.loop.close()


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.close()


def measure(benchmark: Any, setting: Setting, count: int, consumers: int, config: ConsumerConfig) -> None:
    benchmark.extra_info["items"] = count
    benchmark.pedantic(
        lambda: setting.run(setting.consume(count, consumers, config)), setup=lambda: setting.fill(count), rounds=3
    )


@pytest.mark.parametrize("row", [f"ours: {handlers} handlers" for handlers in HANDLERS])
def test_handlers(benchmark: Any, setting: Setting, row: str) -> None:
    handlers = int(row.split()[1])
    benchmark.group = "P3: handlers that wait 5 ms, per message"
    if handlers > 1:
        benchmark.extra_info["goal"] = f"<= {1 / (0.8 * handlers):.4f} x ours: 1 handlers"
    config = ConsumerConfig(max_concurrency=handlers, prefetch=4 * handlers + 4)
    measure(benchmark, setting, ROUNDS * handlers, 1, config)


@pytest.mark.parametrize("handlers", HANDLERS)
def test_asyncio_queue(benchmark: Any, handlers: int) -> None:
    """The best that can be had: the wait, and what the event loop takes for it."""
    benchmark.group = "P3: handlers that wait 5 ms, per message"
    count = ROUNDS * handlers
    benchmark.extra_info["items"] = count

    async def run() -> None:
        queue: asyncio.Queue[int] = asyncio.Queue()
        for number in range(count):
            queue.put_nowait(number)

        async def work() -> None:
            while not queue.empty():
                queue.get_nowait()
                await asyncio.sleep(WAIT)

        await asyncio.gather(*[work() for _ in range(handlers)])

    benchmark.name = f"asyncio.Queue, {handlers} tasks"
    benchmark.pedantic(lambda: asyncio.run(run()), rounds=3)


@pytest.mark.parametrize("row", [f"ours: {consumers} consumers" for consumers in CONSUMERS])
def test_consumers(benchmark: Any, setting: Setting, row: str) -> None:
    consumers = int(row.split()[1])
    benchmark.group = "P13: consumers of 4 handlers that wait 5 ms, per message"
    if consumers > 1:
        benchmark.extra_info["goal"] = f"<= {1 / (0.8 * consumers):.4f} x ours: 1 consumers"
    measure(benchmark, setting, 4 * ROUNDS * consumers, consumers, ConsumerConfig(max_concurrency=4, prefetch=20))


@pytest.mark.parametrize("row", ["ours: controlled, up to 64 handlers", "ours: 64 handlers from the start"])
def test_what_the_start_costs(benchmark: Any, setting: Setting, row: str) -> None:
    """A backlog of 20,000: the controller begins with one handler."""
    benchmark.group = "a backlog of 20,000, handlers wait 5 ms, per message"
    scaling = ScalingConfig(interval=0.25) if "controlled" in row else None
    config = ConsumerConfig(max_concurrency=64, prefetch=300, scaling=scaling)
    measure(benchmark, setting, 20_000, 1, config)


@pytest.mark.parametrize("row", ["ours: 1 process", "ours: 2 processes"])
def test_processes(benchmark: Any, row: str) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from remote.running import RunningBroker

    processes = int(row.split()[1])
    benchmark.group = "P3: processes whose handlers compute 2 ms, through a broker, per message"
    benchmark.extra_info["items"] = BURNT
    if processes > 1:
        benchmark.extra_info["goal"] = "<= 0.625 x ours: 1 process"
    with RunningBroker() as broker:
        url = broker.url(space="bench")
        command = [sys.executable, "-m", "bench.burner", url, "q"]
        workers = [
            subprocess.Popen(command, cwd=ROOT, env=broker.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(processes)
        ]
        try:
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == b"ready\n"
            benchmark.pedantic(lambda: asyncio.run(burn_all(broker.config(space="bench"))), rounds=3)
        finally:
            for worker in workers:
                worker.communicate(timeout=30)


@pytest.mark.parametrize("row", ["1 process, no queue", "2 processes, no queue"])
def test_processes_alone(benchmark: Any, row: str) -> None:
    """What the machine itself gives to two processes: on a busy one, less than twice as much."""
    processes = int(row.split()[0])
    benchmark.group = "P3: processes whose handlers compute 2 ms, through a broker, per message"
    benchmark.extra_info["items"] = BURNT
    code = f"from bench.burner import work\nfor _ in range({BURNT // processes}): work()"

    def run() -> None:
        running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(processes)]
        assert [process.wait() for process in running] == [0] * processes

    benchmark.pedantic(run, rounds=3)


async def burn_all(config: Any) -> None:
    async with QueueClient(config) as client:
        await client.send_messages("q", [Message(body=b"x") for _ in range(BURNT)])
        while True:
            counts = await client.counts("q")
            if not counts.active + counts.in_flight:
                return
            await asyncio.sleep(0.01)
