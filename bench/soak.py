"""``python -m bench.soak``: real load on consumers for some minutes, watched every second, and judged: flat or not.

Three queues on one client of the in-memory provider: sessions and plain messages with an async handler, batches, and a
plain handler in threads. Handlers return, wait, fail, hang, block; locks are lost, dead letters sent back, consumers
stopped and started, limits moved. bench/ledger.py accounts for every message. Results go to bench/results/soak/.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench.ledger import CANCELLED, FAILED, RETURNED, Ledger, Witness
from bench.sampling import SERIES, Sample, Sampler, judge, plot, table_of
from bench.traffic import Fate, Handlers, Mix, Pace, Traffic
from queue_runtime import (
    BreakerConfig,
    Consumer,
    ConsumerConfig,
    Disposition,
    HandlerContext,
    InMemoryConfig,
    Limits,
    Middleware,
    QueueClient,
    QueueRuntimeError,
    ReceivedMessage,
    RejectMessage,
    RetryMessage,
)

RESULTS = Path(__file__).resolve().parent / "results" / "soak"
BACKLOG = 2000
"""Messages of a queue that are not completed yet, at most, before no more are sent."""
LOCK = 2.0
LIFE = 15.0
"""Seconds after which a consumer is replaced by another one, in one of several ways."""


class Timed(Witness):
    """Also takes the time from the sending of a message to its completion."""

    def __init__(self, ledger: Ledger, latencies: list[float]) -> None:
        super().__init__(ledger)
        self._latencies = latencies

    def message_settled(
        self, message: ReceivedMessage, disposition: Disposition, error: QueueRuntimeError | None
    ) -> None:
        super().message_settled(message, disposition, error)
        if error is None and disposition.action.value == "complete" and message.delivery_count == 1:
            self._latencies.append(time.time() - message.enqueued_at.timestamp())


class Accounted(Middleware):
    """Tells the witness of handlers that cannot do it themselves: of batches, and in threads."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    async def handle(self, context: HandlerContext, call_next: Callable[[], Awaitable[None]]) -> None:
        messages = list(context.messages)
        for place, message in enumerate(messages):
            self._witness.begin(message, together=place > 0)
        how = FAILED
        try:
            await call_next()
            how = RETURNED
        except asyncio.CancelledError:
            how = CANCELLED
            raise
        finally:
            for message in messages:
                self._witness.end(message, how)


@dataclass(slots=True)
class Stream:
    """One queue, its messages and its consumer."""

    name: str
    traffic: Traffic
    rate: float
    ledger: Ledger = field(default_factory=Ledger)
    consumer: Consumer | None = None
    task: asyncio.Task[Any] | None = None
    forget: Callable[[], None] | None = None


class Soak:
    """One run."""

    def __init__(self, seed: int, rate: float) -> None:
        self.chance = random.Random(seed)
        self.latencies: list[float] = []
        mix = Mix(hanging=0.05, stubborn=0.05, blocking=0.02)
        quick = Mix(hanging=0.0, stubborn=0.0, blocking=0.0)
        self.streams = [
            Stream("one", Traffic(seed, sessions=3000, plain=0.3, mix=mix), rate * 0.7),
            Stream("batch", Traffic(seed + 1, sessions=500, plain=0.5, mix=quick), rate * 0.25),
            Stream("threads", Traffic(seed + 2, sessions=100, plain=0.5, mix=quick), rate * 0.05),
        ]
        self.client = QueueClient(
            InMemoryConfig(
                lock_duration=LOCK,
                session_lock_duration=LOCK,
                max_lock_renewal=2 * LOCK,
                max_delivery_count=1000,
                max_concurrency=64,
                prefetch=1000,
            )
        )
        self.ended: Counter[str] = Counter()

    @property
    def completed(self) -> int:
        return sum(stream.ledger.completed for stream in self.streams)

    def start(self, stream: Stream) -> None:
        witness = Timed(stream.ledger, self.latencies)
        stream.forget = self.client.on_locks_lost(witness.locks_lost)
        settings: dict[str, Any] = {
            "max_sessions": 300,
            "session_turn": 20,
            "drain_timeout": 0.5,
            "breaker": BreakerConfig(failures=8, open_for=0.2, successes=1),
        }
        handler: Callable[..., object] = Handlers(stream.traffic, witness, pace=Pace(block=0.02)).handle
        if stream.name != "one":
            settings["middleware"] = (Accounted(witness),)
            handler = _batch_handler(stream.traffic) if stream.name == "batch" else _plain_handler(stream.traffic)
            settings["handler_form"] = "batch" if stream.name == "batch" else "one"
        if stream.name == "threads":
            settings["max_concurrency"] = 8
        stream.consumer = Consumer(self.client, stream.name, handler, ConsumerConfig(**settings), observer=witness)
        stream.task = asyncio.create_task(stream.consumer.run())

    async def feed(self, stream: Stream) -> None:
        owed = 0.0
        while True:
            await asyncio.sleep(0.05)
            owed = min(owed + stream.rate * 0.05, BACKLOG)
            if owed >= 1 and stream.ledger.pending < BACKLOG:
                messages = stream.traffic.messages(int(owed))
                owed -= len(messages)
                stream.ledger.sending(messages)
                await self.client.send_messages(stream.name, messages)

    async def redrive(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for stream in self.streams:
                await self.client.dead_letters(stream.name).redrive(where=stream.ledger.redriving, timeout=0.001)

    async def renew(self, stream: Stream) -> None:
        """Replace the consumer from time to time, and move its limits in between."""
        while True:
            for _ in range(3):
                await asyncio.sleep(LIFE / 3)
                assert stream.consumer is not None
                if stream.name == "one":
                    concurrency = self.chance.choice([8, 64, 128])
                    stream.consumer.set_limits(Limits(concurrency, 1000, self.chance.choice([1, 3]), 300))
            await self.end(stream, self.chance.choice(["stop", "stop_now", "cancel"]))
            self.start(stream)

    async def end(self, stream: Stream, how: str) -> None:
        assert stream.consumer is not None
        assert stream.task is not None
        self.ended[how] += 1
        if how == "cancel":
            stream.task.cancel()
        else:
            getattr(stream.consumer, how)()
        await asyncio.wait([stream.task])
        if stream.forget is not None:
            stream.forget()
            stream.forget = None
        if not stream.task.cancelled():
            stream.task.result()

    async def finish(self) -> list[dict[str, Any]]:
        """Stop, and account for every message."""
        accounts = []
        for stream in self.streams:
            await self.end(stream, "stop")
            left = await _all(partial(self.client.peek_messages, stream.name, 10_000))
            dead = await _all(partial(self.client.dead_letters(stream.name).peek_messages, 10_000))
            ledger = stream.ledger
            ledger.reckon(left, dead)
            accounts.append(
                {
                    "queue": stream.name,
                    "sent": ledger.sent,
                    "completed": ledger.completed,
                    "dead letters": len(dead),
                    "left": len(left),
                    "balance": ledger.sent - ledger.completed - len(dead) - len(left),
                    "handled again": dict(ledger.repeated),
                    "work done twice": dict(ledger.twice),
                    "sent back": ledger.redriven,
                    "violations": ledger.violations,
                }
            )
        await self.client.close()
        return accounts


async def _all(peek: Callable[..., Awaitable[list[ReceivedMessage]]]) -> list[ReceivedMessage]:
    found: list[ReceivedMessage] = []
    while more := await peek(from_sequence_number=(found[-1].sequence_number or 0) + 1 if found else 0):
        found += more
    return found


def _batch_handler(traffic: Traffic) -> Callable[..., object]:
    async def handle(messages: list[ReceivedMessage]) -> None:
        first = messages[0]
        await _outcome(traffic, first)

    return handle


def _plain_handler(traffic: Traffic) -> Callable[..., object]:
    def handle(message: ReceivedMessage) -> None:
        fate = traffic.fate(int(message.message_id), message.delivery_count)
        if fate is Fate.SLOW:
            time.sleep(0.01)
        _raise(fate)

    return handle


async def _outcome(traffic: Traffic, message: ReceivedMessage) -> None:
    fate = traffic.fate(int(message.message_id), message.delivery_count)
    if fate is Fate.SLOW:
        await asyncio.sleep(0.01)
    _raise(fate)


def _raise(fate: Fate) -> None:
    if fate is Fate.FAILING:
        raise ValueError("as it happens")
    if fate is Fate.RETRYING:
        raise RetryMessage(0.1)
    if fate is Fate.REJECTING:
        raise RejectMessage("Unwanted")


async def soak(
    minutes: float, seed: int, rate: float, console: Console
) -> tuple[list[Sample], list[dict[str, Any]], Soak]:
    logging.getLogger("queue_runtime").setLevel(logging.CRITICAL)
    run = Soak(seed, rate)
    helpers = [asyncio.create_task(run.redrive())]
    for stream in run.streams:
        run.start(stream)
        helpers += [asyncio.create_task(run.feed(stream)), asyncio.create_task(run.renew(stream))]
    samples: list[Sample] = []
    sampler = Sampler()
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end:
            await asyncio.sleep(1.0)
            samples.append(sampler.take(run.completed, run.latencies))
            run.latencies.clear()
            live.update(_progress(samples[-1], end - time.monotonic(), run))
            if not console.is_terminal and len(samples) % 10 == 0:
                last = samples[-1]
                console.print(f"{last.time:.0f} s: {last.rate:,.0f}/s, RSS {last.rss:.1f} MB, {last.tasks:.0f} tasks")
            broken = [helper for helper in helpers if helper.done()]
            if broken:
                broken[0].result()
    for helper in helpers:
        helper.cancel()
    await asyncio.gather(*helpers, return_exceptions=True)
    for stream in run.streams:  # a helper may have been at it
        if stream.task is None or stream.task.done():
            run.start(stream)
            await asyncio.sleep(0)
    accounts = await run.finish()
    return samples, accounts, run


def _progress(sample: Sample, left: float, run: Soak) -> Table:
    table = Table(title=f"{left:.0f} s to go, {run.completed:,} completed", title_justify="left", show_header=False)
    for name, (label, unit) in SERIES.items():
        table.add_row(label, f"{getattr(sample, name):,.1f} {unit}")
    table.add_row("violations", str(sum(stream.ledger.violation_count for stream in run.streams)))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=4000.0, help="messages a second")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the directory of the results")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    factory = None
    if arguments.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    console.print(
        f"{arguments.minutes:g} min, {arguments.rate:,.0f} messages/s, {arguments.loop}, seed {arguments.seed}"
    )
    before = threading.active_count()
    with asyncio.Runner(loop_factory=factory) as runner:
        samples, accounts, run = runner.run(soak(arguments.minutes, arguments.seed, arguments.rate, console))
        tasks = asyncio.all_tasks(runner.get_loop())
    gc.collect()
    for thread in threading.enumerate()[before:]:
        thread.join(2.0)  # a pool's threads are told to end, and not waited for
    left = [str(task) for task in tasks] + [str(thread) for thread in threading.enumerate()[before:]]
    verdicts = judge(samples)
    console.print(table_of(verdicts))
    for account in accounts:
        console.print(", ".join(f"{name} {value}" for name, value in account.items()))
    console.print(f"consumers ended: {dict(run.ended)}; left behind afterwards: {left or 'nothing'}")
    stamp = f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}"
    results: Path = arguments.results
    results.mkdir(parents=True, exist_ok=True)
    details = {
        "minutes": arguments.minutes,
        "rate": arguments.rate,
        "seed": arguments.seed,
        "loop": arguments.loop,
        "cpus": os.cpu_count(),
        "python": sys.version,
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "accounts": accounts,
        "samples": [sample._asdict() for sample in samples],
    }
    (results / f"{stamp}.json").write_text(json.dumps(details, indent=1) + "\n")
    plot(samples, verdicts, results / f"{stamp}.png", f"{arguments.minutes:g} min, seed {arguments.seed}")
    console.print(f"Saved to {results / stamp}.json and .png")
    balanced = all(not account["violations"] and account["balance"] == 0 for account in accounts)
    flat = all(verdict.is_flat is not False for verdict in verdicts)
    console.print(
        f"{'flat' if flat else 'NOT FLAT'}; {'every message accounted for' if balanced else 'NOT ACCOUNTED FOR'}"
    )
    return 0 if flat and balanced and not left else 1


if __name__ == "__main__":
    sys.exit(main())
