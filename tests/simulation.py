"""A world for chaos: consumers that are killed and cut off, clocks that jump, in a time that passes by itself.

Everything runs on one event loop whose time jumps to the next timer as soon as nothing else is left to do, so that
minutes of hanging handlers and lost locks cost milliseconds, and one seed gives one run.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from core.loops import JumpingLoop

from bench.ledger import Ledger, Witness
from bench.traffic import QUEUE, Handlers, Mix, Pace, Traffic
from queue_runtime import (
    ConnectionFailedError,
    Consumer,
    ConsumerConfig,
    Disposition,
    ExponentialRetry,
    FixedRetry,
    InMemoryConfig,
    NoRetry,
    QueueClient,
    QueueRuntimeError,
    Receipt,
    ReceivedMessage,
    SessionLockLostError,
    client as client_module,
)
from queue_runtime.clock import Timer
from queue_runtime.providers import open_provider

Outcome = QueueRuntimeError | None
_numbers = itertools.count()


class WorldClock:
    """The loop's time; its wall clock can be set, and both leap while the machine is suspended."""

    def __init__(self, loop: JumpingLoop) -> None:
        self._loop = loop
        self._epoch = 1_700_000_000.0

    def time(self) -> float:
        return self._epoch + self._loop.now

    def monotonic(self) -> float:
        return self._loop.now

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return self._loop.call_later(delay, callback)

    def set_wall(self, change: float) -> None:
        """The wall clock is put forward or back; the monotonic one goes on."""
        self._epoch += change

    def leap(self, seconds: float) -> None:
        """Nothing runs for so long: a suspended machine, or a handler that blocks the loop."""
        self._loop.now += seconds


class Line:
    """The connection of one client."""

    def __init__(self, chance: random.Random, delay: float) -> None:
        self.is_cut = False
        self.witness: Witness | None = None
        self.chance = chance
        self._delay = delay

    async def pass_through(self) -> None:
        if self._delay and self.chance.random() < 0.05:
            await asyncio.sleep(self._delay)
        self.check()

    def check(self) -> None:
        if self.is_cut:
            raise ConnectionFailedError("the line is cut")


class CutReceiver:
    """A receiver behind a line. What arrives at a cut end is locked until its lock runs out, as on any service."""

    def __init__(self, real: Any, line: Line) -> None:
        self._real = real
        self._line = line
        self._is_detached = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _check(self) -> None:
        self._line.check()
        if self._is_detached:
            raise SessionLockLostError(self._real.session_id)

    async def receive(self, max_count: int, timeout: float) -> list[ReceivedMessage]:
        self._check()
        messages: list[ReceivedMessage] = await self._real.receive(max_count, timeout)
        if self._line.is_cut and messages and hasattr(self._real, "session_id"):
            self._is_detached = True  # no service would let the holder go on behind what it never got
        self._check()
        return messages

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        line = self._line
        self._check()
        luck = line.chance.random()
        if luck > 0.9999:
            raise ZeroDivisionError("a bug of the adapter")
        await line.pass_through()
        outcomes: list[Outcome] = await self._real.settle(disposition, receipts)
        if line.witness is not None:
            done = [receipt for receipt, outcome in zip(receipts, outcomes, strict=True) if outcome is None]
            line.witness.applied(done, disposition.action)
        if luck < 0.0005:
            raise ConnectionFailedError("the answer is lost")
        return outcomes

    async def renew(self, receipts: Sequence[Receipt]) -> list[float | QueueRuntimeError]:
        await self._line.pass_through()
        ends: list[float | QueueRuntimeError] = await self._real.renew(receipts)
        return ends

    async def renew_session(self) -> float:
        self._check()
        await self._line.pass_through()
        end: float = await self._real.renew_session()
        return end

    async def close(self) -> None:
        if not self._line.is_cut:
            await self._real.close()


class CutProvider:
    """The real in-memory provider behind a line."""

    def __init__(self, real: Any, line: Line) -> None:
        self._real = real
        self._line = line
        self.capabilities = real.capabilities

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def open_receiver(self, *arguments: Any, **options: Any) -> Any:
        self._line.check()
        return CutReceiver(await self._real.open_receiver(*arguments, **options), self._line)

    async def accept_session(self, *arguments: Any) -> Any:
        self._line.check()
        real = await self._real.accept_session(*arguments)
        self._line.check()
        return None if real is None else CutReceiver(real, self._line)

    async def close(self) -> None:
        if not self._line.is_cut:
            await self._real.close()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the settings of consumers are drawn from."""

    concurrency: tuple[int, ...]
    prefetch: tuple[int, ...]
    sessions: tuple[int, ...]
    turn: tuple[int, ...]


NARROW = Bounds((1, 2, 8), (2, 3, 50), (1, 2, 20), (1, 3, 100))
WIDE = Bounds((8, 32, 128), (50, 500, 2000), (20, 200, 1000), (5, 100))


@dataclass(slots=True, eq=False)
class Worker:
    """One consumer with its own client, as a process of its own would be."""

    client: QueueClient
    consumer: Consumer
    config: ConsumerConfig
    witness: Witness
    line: Line
    task: asyncio.Task[Any]


class World:
    """One run.

    Parameters
    ----------
    seed:
        Of everything.
    count, sessions:
        Messages to send in all, and the sessions that they are in.
    workers:
        Consumers at once.
    wave:
        Messages sent together.
    quiet:
        The mean number of messages handled between two disasters.
    bounds:
        Of the consumers.
    """

    def __init__(
        self,
        seed: int,
        *,
        count: int,
        sessions: int,
        bounds: Bounds = WIDE,
        workers: int = 3,
        wave: int = 1000,
        quiet: int = 1000,
    ) -> None:
        self.chance = chance = random.Random(seed)
        self.seed = seed
        self.count = count
        self.wave = wave
        self.ledger = Ledger()
        self.events: Counter[str] = Counter()
        self.lock = chance.choice([5.0, 30.0])
        self._quiet = quiet
        self._bounds = bounds
        self._worker_count = workers
        self._workers: list[Worker] = []
        self._ending: set[asyncio.Task[Any]] = set()
        self._line: Line | None = None
        self._max_renewal = chance.choice([0.0, self.lock * 2, 300.0])
        # Without renewal nobody hears that a lock is lost, and what hangs would hang for ever.
        mix = Mix() if self._max_renewal else Mix(hanging=0.0, stubborn=0.0)
        self._traffic = Traffic(seed, sessions=sessions, sizes=(16, 100, 1000), mix=mix)
        self._name = f"world-{next(_numbers)}"

    def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run it to its end; every message is accounted for in ``ledger``."""
        monkeypatch.setattr(client_module, "open_provider", self._open)
        logging.getLogger("queue_runtime").setLevel(logging.CRITICAL)
        loop = JumpingLoop()
        self.clock = WorldClock(loop)
        unhandled: list[Any] = []
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.get_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
                runner.run(self._live())
                left = asyncio.all_tasks(loop)
                assert not left, left
        finally:
            logging.getLogger("queue_runtime").setLevel(logging.NOTSET)
        assert not unhandled

    def report(self) -> str:
        """What happened, in a few lines."""
        ledger = self.ledger
        lines = [
            f"seed {self.seed}: {ledger.sent} messages sent, {ledger.handled} handlings, {ledger.completed} completed, "
            f"{ledger.answers_lost} more whose answer was lost, {ledger.pending - ledger.answers_lost} left",
            f"dead-lettered {ledger.dead_lettered}, sent back {ledger.redriven}",
            f"handled again: {_told(ledger.repeated)}",
            f"of these the work was done twice: {_told(ledger.twice)}",
            f"disasters: {_told(self.events)}",
        ]
        return "\n".join(lines)

    async def _live(self) -> None:
        self._home = self._client(Line(random.Random(0), delay=0.0))
        producing = asyncio.create_task(self._produce())
        redriving = asyncio.create_task(self._redrive())
        for _ in range(self._worker_count):
            self._start()
        try:
            while not producing.done():
                await self._quiet_time()
                self._check()
                self._happen()
                while len(self._workers) < self._worker_count:
                    self._start()
                self._check_bounds()
            await producing
            await self._until_done()
        finally:
            producing.cancel()
            redriving.cancel()
            await asyncio.gather(producing, redriving, return_exceptions=True)
            for worker in list(self._workers):
                self._end(worker, worker.consumer.stop)
            while self._ending:
                await asyncio.wait(self._ending)
        left = await self._home.peek_messages(QUEUE, 10_000)
        dead = await self._home.dead_letters(QUEUE).peek_messages(10_000)
        self.ledger.reckon(left, dead)
        await self._home.close()
        self._check()

    # What goes on.

    async def _produce(self) -> None:
        while self._traffic.made < self.count:
            if self.ledger.pending < 20 * self.wave:
                messages = self._traffic.messages(min(self.wave, self.count - self._traffic.made))
                self.ledger.sending(messages)
                await self._home.send_messages(QUEUE, messages)
            await asyncio.sleep(0.01)

    async def _redrive(self) -> None:
        while True:
            await asyncio.sleep(2.0)
            await self._home.dead_letters(QUEUE).redrive(where=self.ledger.redriving, timeout=0.01)

    async def _quiet_time(self) -> None:
        """Until some messages are handled, or some time has passed."""
        enough = self.ledger.handled + self.chance.expovariate(1 / self._quiet)
        over = self.clock.monotonic() + self.chance.expovariate(1 / 10.0)
        while self.ledger.handled < enough and self.clock.monotonic() < over:
            await asyncio.sleep(0.01)

    async def _until_done(self) -> None:
        """No more chaos: what is in the queue is handled in the end."""
        for worker in self._workers:
            worker.line.is_cut = False
        deadline = self.clock.monotonic() + 3600
        while True:
            counts = await self._home.counts(QUEUE)
            if not (counts.active or counts.in_flight or counts.scheduled or counts.dead_lettered):
                return
            assert self.clock.monotonic() < deadline, f"an hour later there are still {counts}"
            await asyncio.sleep(1.0)

    def _happen(self) -> None:
        events: list[tuple[float, Callable[[], object]]] = [
            (3, self._kill),
            (2, self._stop_now),
            (2, self._cancel),
            (2, self._stop),
            (2, self._cut_off),
            (1, self._put_clock),
            (1, self._suspend),
        ]
        event = self.chance.choices([event for _, event in events], [weight for weight, _ in events])[0]
        self.events[event.__name__.strip("_")] += 1
        event()

    def _kill(self) -> None:
        """As kill -9: nothing that it does from now on reaches the service."""
        worker = self._any()
        worker.line.is_cut = True
        self._end(worker, worker.task.cancel)

    def _cancel(self) -> None:
        worker = self._any()
        self._end(worker, worker.task.cancel)

    def _stop_now(self) -> None:
        worker = self._any()
        self._end(worker, worker.consumer.stop_now)

    def _stop(self) -> None:
        worker = self._any()
        self._end(worker, worker.consumer.stop)

    def _cut_off(self) -> None:
        """The network fails for a while, at most for some locks' length [C37]."""
        line = self._any().line
        line.is_cut = True

        def mend() -> None:
            line.is_cut = False

        asyncio.get_running_loop().call_later(self.chance.uniform(0.1, self.lock * 2), mend)

    def _put_clock(self) -> None:
        self.clock.set_wall(self.chance.choice([-1, 1]) * self.chance.choice([0.5, 60.0, 86_400.0]))

    def _suspend(self) -> None:
        self.clock.leap(self.chance.uniform(0.1, self.lock * 1.5))

    # Consumers.

    def _any(self) -> Worker:
        return self.chance.choice(self._workers)

    def _start(self) -> None:
        pick, bounds = self.chance.choice, self._bounds
        line = Line(self.chance, delay=pick([0.0, 0.002]))
        client = self._client(line)
        line.witness = witness = Witness(self.ledger)
        client.on_locks_lost(witness.locks_lost)
        pace = Pace(block=self.lock * 1.2)
        handlers = Handlers(self._traffic, witness, pace=pace, block=self.clock.leap)
        config = ConsumerConfig(
            max_concurrency=pick(bounds.concurrency),
            prefetch=pick(bounds.prefetch),
            max_sessions=pick(bounds.sessions),
            session_turn=pick(bounds.turn),
            drain_timeout=pick([0.0, 1.0, 30.0]),
            retry=FixedRetry(attempts=pick([3, 50])),
            receive_timeout=pick([0.5, 20.0]),
        )
        consumer = Consumer(client, QUEUE, handlers.handle, config, observer=witness)
        task = asyncio.create_task(consumer.run())
        self._workers.append(Worker(client, consumer, config, witness, line, task))

    def _end(self, worker: Worker, how: Callable[[], object]) -> None:
        self._workers.remove(worker)
        how()
        self._spawn(self._bury(worker))

    async def _bury(self, worker: Worker) -> None:
        await asyncio.wait([worker.task])
        if not worker.task.cancelled():
            worker.task.result()
        stats = worker.consumer.stats
        assert stats.waiting == stats.running == stats.sessions_open == 0, stats
        assert stats.completed == worker.witness.completed, stats
        worker.witness.was_killed = worker.line.is_cut
        await worker.client.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._ending.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._ending.discard(task)
            if not task.cancelled() and task.exception() is not None:
                self.ledger.violate(f"the end of a consumer: {task.exception()!r}")

        task.add_done_callback(ended)

    def _client(self, line: Line) -> QueueClient:
        self._line = line
        config = InMemoryConfig(
            name=self._name,
            settlement=self.chance.choice(["auto", "batched"]),
            settle_interval=0.001,
            retry=self.chance.choice([NoRetry(), ExponentialRetry()]),
            lock_duration=self.lock,
            session_lock_duration=self.lock,
            max_lock_renewal=self._max_renewal,
            max_delivery_count=1000,
        )
        return QueueClient(config, clock=self.clock)

    def _open(self, config: Any, clock: Any) -> CutProvider:
        assert self._line is not None
        return CutProvider(open_provider(config, clock), self._line)

    # Checks on the way.

    def _check(self) -> None:
        assert not self.ledger.violations, "\n".join(
            [f"{self.ledger.violation_count} in all:", *self.ledger.violations]
        )

    def _check_bounds(self) -> None:
        """[C39]"""
        for worker in self._workers:
            stats, config = worker.consumer.stats, worker.config
            assert stats.running + stats.waiting <= (config.prefetch or 0)
            assert stats.running <= (config.max_concurrency or 0)
            assert stats.sessions_open <= config.max_sessions


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counts.most_common()) or "none"
