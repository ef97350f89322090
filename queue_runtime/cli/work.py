"""One ``run``: a consumer, a feed beside it, an end by an empty queue or by a signal, and the figures of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from queue_runtime.cli.failure import Code
from queue_runtime.cli.feeding import Feeder, FeedResult
from queue_runtime.cli.meter import KEPT_SESSIONS, DeadLetter, Meter
from queue_runtime.client import QueueClient
from queue_runtime.consumer import Consumer
from queue_runtime.errors import ConfigurationError
from queue_runtime.handling import ConsumerConfig, ConsumerStats, Handler
from queue_runtime.providers.base import QueueCounts
from queue_runtime.retry import FixedRetry
from queue_runtime.runtime import RuntimeConfiguration
from queue_runtime.sessions import SessionKey

LOOK = 0.01
LOOK_ELSEWHERE = 1.0
"""Seconds between looks at whether the queue is empty: in this process's memory, and over a network."""
PAGE = 1000
"""Dead letters of one look."""


RUNTIMES: dict[str, Callable[..., RuntimeConfiguration]] = {
    "default": RuntimeConfiguration,
    "high-throughput": RuntimeConfiguration.for_high_throughput,
    "low-resource": RuntimeConfiguration.for_low_resource,
}
"""What ``--runtime`` offers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What ``run`` was asked for."""

    queue_name: str
    handler_name: str
    feed: str | None
    session_key: SessionKey | None
    until_empty: bool
    show: int
    fail_on_dead_letters: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ``run`` did."""

    plan: Plan
    provider: str
    meter: Meter
    stats: ConsumerStats
    counts: QueueCounts
    fed: FeedResult | None
    ended_by: str
    hurried: bool
    """A second signal came."""
    processes: dict[str, Any] | None = None

    @property
    def code(self) -> Code:
        if self.ended_by == "SIGINT":
            return Code.INTERRUPTED
        if self.ended_by == "SIGTERM":
            return Code.TERMINATED
        if self.stats.settle_errors or (self.fed is not None and (self.fed.refused or self.fed.error)):
            return Code.FAILED
        if self.plan.fail_on_dead_letters and self.dead_lettered:
            return Code.DEAD_LETTERS
        return Code.FINE

    @property
    def dead_lettered(self) -> int:
        return self.meter.reasons.total()

    @property
    def left(self) -> int:
        """Messages that are in the queue still."""
        return self.counts.active + self.counts.in_flight + self.counts.scheduled + self.counts.deferred

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints. Durations are in seconds, sizes in messages."""
        meter, stats, latency = self.meter, self.stats, self.meter.latency
        sessions = len(meter.sessions)
        return {
            "handler": self.plan.handler_name,
            "provider": self.provider,
            "queue": self.plan.queue_name,
            "ended_by": self.ended_by,
            "exit_code": int(self.code),
            "duration": round(meter.seconds, 6),
            "throughput": round(meter.throughput, 1),
            "messages": {
                "received": stats.received,
                "completed": stats.completed,
                "dead_lettered": self.dead_lettered,
                "abandoned": stats.abandoned,
                "left": self.left,
            },
            "latency": {
                "p50": _rounded(latency.percentile(50)),
                "p95": _rounded(latency.percentile(95)),
                "p99": _rounded(latency.percentile(99)),
                "max": _rounded(latency.most) if latency.count else None,
            },
            "batches": {
                "count": meter.batches,
                "min": meter.smallest,
                "mean": round(meter.batched / meter.batches, 2) if meter.batches else 0,
                "max": meter.largest,
            },
            "sessions": {"different": sessions if sessions < KEPT_SESSIONS else None, "taken": stats.sessions},
            "retries": meter.retries,
            "failures": dict(meter.failures.most_common()),
            "locks_lost": stats.locks_lost,
            "settle_errors": stats.settle_errors,
            "dead_letters": {
                "reasons": dict(meter.reasons.most_common()),
                "first": [dead._asdict() for dead in meter.dead_letters],
            },
            "processes": self.processes,
            "fed": None if self.fed is None else _fed_as_json(self.fed),
        }


class Engine(Protocol):
    """What does the work of a run: a consumer in this process, or worker processes."""

    @property
    def meter(self) -> Meter: ...

    @property
    def stats(self) -> ConsumerStats: ...

    @property
    def alive(self) -> int:
        """Processes that work now."""
        ...

    def processes(self) -> dict[str, Any] | None:
        """What ``--json`` tells of worker processes; None when there are none."""
        ...

    async def health(self) -> dict[str, Any]:
        """How it is now: ``problems``, in words, and what else there is to tell, in JSON's own types."""
        ...

    async def run(self) -> object:
        """Work until ``stop``. Raises what makes it impossible."""
        ...

    def stop(self) -> None:
        """Drain."""
        ...

    def stop_now(self) -> None:
        """Release everything at once."""
        ...


class OneProcess:
    """A consumer in this process.

    Thread-safety: for the client's event loop.
    """

    def __init__(
        self, client: QueueClient, queue_name: str, handler: Handler, config: ConsumerConfig, *, keep: int
    ) -> None:
        self._client = client
        self._queue_name = queue_name
        self.meter = Meter(keep)
        self._consumer = Consumer(client, queue_name, handler, config, observer=self.meter)
        self.run = self._consumer.run
        self.stop = self._consumer.stop
        self.stop_now = self._consumer.stop_now

    @property
    def stats(self) -> ConsumerStats:
        return self._consumer.stats

    @property
    def alive(self) -> int:
        return 1

    def processes(self) -> dict[str, Any] | None:
        return None

    async def health(self) -> dict[str, Any]:
        health = await self._client.health(self._queue_name)
        return {
            "problems": list(health.problems),
            "connection": health.connection,
            "last_receive": health.last_receive,
            "last_settle": health.last_settle,
            "backlog": {name: dataclasses.asdict(counts) for name, counts in health.backlog.items()},
            "breakers": {name: state.value for name, state in health.breakers.items()},
        }


class Work:
    """Runs one plan.

    Parameters
    ----------
    client:
        An open client, to feed and to look with; it is not closed.
    tell:
        Called with sentences for the user.

    Raises what makes it impossible to go on, such as QueueNotFoundError. Thread-safety: for the client's event loop.
    """

    def __init__(self, client: QueueClient, plan: Plan, engine: Engine, tell: Callable[[str], None]) -> None:
        self._client = client
        self._plan = plan
        self._engine = engine
        self._tell = tell
        self.feeder: Feeder | None = None
        if plan.feed is not None:
            self.feeder = Feeder(client, plan.queue_name, plan.feed, key=plan.session_key, tell=tell)
        self._signals: list[signal.Signals] = []

    @property
    def meter(self) -> Meter:
        return self._engine.meter

    @property
    def stats(self) -> ConsumerStats:
        return self._engine.stats

    @property
    def engine(self) -> Engine:
        return self._engine

    async def health(self) -> dict[str, Any]:
        """How it is now, for the health file."""
        return {
            **await self._engine.health(),
            "draining": bool(self._signals),
            "queue": self._plan.queue_name,
            "provider": self._client.provider_name,
            "stats": self.stats._asdict(),
            "processes": self._engine.alive,
        }

    async def run(self) -> Report:
        """Work to the end, and tell what was done."""
        with self._hooked():
            await self._work()
        if self._client.capabilities.settles_in_process:
            await self._count_dead_letters()
        return Report(
            plan=self._plan,
            provider=self._client.provider_name,
            meter=self.meter,
            stats=self.stats,
            processes=self._engine.processes(),
            counts=await self._client.counts(self._plan.queue_name),
            fed=None if self.feeder is None else self.feeder.result,
            ended_by=self._signals[0].name if self._signals else "empty",
            hurried=len(self._signals) > 1,
        )

    async def _work(self) -> None:
        consuming = asyncio.ensure_future(self._engine.run())
        feeding = asyncio.ensure_future(self._feed_to_the_end())
        try:
            await asyncio.wait((consuming, feeding), return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                self._engine.stop()
                feeding.result()  # raises what kept it from sending
        finally:
            # A signal, an empty queue or an error: whatever ended one of them, both end, and none unseen.
            feeding.cancel()
            self._engine.stop()
            await asyncio.gather(consuming, feeding, return_exceptions=True)
        consuming.result()

    async def _feed_to_the_end(self) -> None:
        """Return when it is time to stop."""
        if self.feeder is not None:
            await self.feeder.run()
        if not self._plan.until_empty:
            await asyncio.get_running_loop().create_future()
        pause = LOOK if self._client.capabilities.settles_in_process else LOOK_ELSEWHERE
        while not await self._is_empty():  # noqa: ASYNC110  # no event says that a queue is empty
            await asyncio.sleep(pause)

    async def _is_empty(self) -> bool:
        stats = self.stats
        if stats.waiting or stats.running:
            return False
        counts = await self._client.counts(self._plan.queue_name)
        return not (counts.active or counts.in_flight or counts.scheduled)

    async def _count_dead_letters(self) -> None:
        """Look into the dead-letter queue, which nobody else can do: what the queue itself put there counts too."""
        self.meter.forget_dead_letters()
        dead_letters = self._client.dead_letters(self._plan.queue_name)
        page = await dead_letters.peek_messages(PAGE)
        while page:
            for message in page:
                self.meter.bury(
                    DeadLetter(
                        message.message_id,
                        message.session_id,
                        message.delivery_count,
                        message.dead_letter_reason,
                        message.dead_letter_description,
                    )
                )
            page = await dead_letters.peek_messages(PAGE, from_sequence_number=(page[-1].sequence_number or 0) + 1)

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        """The first signal drains, the second releases at once, the third is Python's own again."""
        if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
            yield  # there, Ctrl-C cancels the run, which releases everything
            return
        loop = asyncio.get_running_loop()

        def unhook() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

        def caught(number: signal.Signals) -> None:
            self._signals.append(number)
            if len(self._signals) == 1:
                self._tell(f"{number.name}: finishing what runs, releasing the rest; a second one releases all at once")
                self._engine.stop()
            else:
                self._tell(f"{number.name}: releasing everything now")
                self._engine.stop_now()
                unhook()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, caught, number)
        try:
            yield
        finally:
            unhook()


def consumer_config(client: QueueClient, limits: Mapping[str, Any]) -> ConsumerConfig:
    """The settings from the options, within what the queue itself allows."""
    allowed: int | None = getattr(client.config, "max_delivery_count", None)
    attempts: int | None = limits["max_attempts"]
    if attempts is not None and allowed is not None and attempts > allowed:
        raise ConfigurationError(
            "max_attempts",
            f"the queue itself gives a message up after {allowed} deliveries; "
            f"add max_delivery_count={attempts} to the provider's URL",
        )
    return ConsumerConfig(
        max_concurrency=limits["concurrency"],
        prefetch=limits["prefetch"],
        max_sessions=limits["max_sessions"],
        drain_timeout=limits["drain_timeout"],
        retry=FixedRetry(attempts=attempts or min(5, allowed or 5)),
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _fed_as_json(fed: FeedResult) -> dict[str, Any]:
    return {
        "source": fed.source,
        "lines": fed.lines,
        "sent": fed.sent,
        "refused": fed.refused,
        "refusals": [refusal._asdict() for refusal in fed.refusals],
        "finished": fed.finished,
        "error": fed.error,
    }
