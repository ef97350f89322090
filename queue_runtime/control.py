"""Follows the load of one consumer: looks at it once an interval, and sets its limits [C39, C45]."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, cast

from queue_runtime.clock import Clock, Timer, within
from queue_runtime.message import ReceivedMessage
from queue_runtime.pressure import MemoryConfig, MemoryLevel, MemoryPressure
from queue_runtime.providers.base import QueueCounts
from queue_runtime.scaler import Scaler
from queue_runtime.scaling import Limits, Load, ScalingConfig

logger = logging.getLogger("queue_runtime.control")

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]

LEAST = Limits(1, 2, 1, 1)
"""What memory pressure leaves when nothing scales; two messages, as one may be of a session and one not."""
LONGEST_PAUSE = 60.0
"""Seconds between two questions for the depth, at the longest, while they fail."""
IDLE_INTERVAL = 10.0
"""Seconds between two looks while nothing happens, at the longest, where only the memory is looked at."""
COUNT_TIMEOUT = 60.0
"""Seconds after which a question for the depth that was not answered is given up, and asked again."""
STALE = 3
"""Count intervals after which a depth is known no more."""


class Counters(Protocol):
    """What the controller reads of a consumer's counters."""

    @property
    def received(self) -> int: ...
    @property
    def completed(self) -> int: ...
    @property
    def abandoned(self) -> int: ...
    @property
    def dead_lettered(self) -> int: ...
    @property
    def deferred(self) -> int: ...
    @property
    def locks_lost(self) -> int: ...
    @property
    def settle_errors(self) -> int: ...
    @property
    def handler_seconds(self) -> float:
        """The time of the handlers that have ended."""
        ...

    @property
    def busy_seconds(self) -> float:
        """The same, with the time up to now of those that run."""
        ...

    @property
    def held_bytes(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def sessions_open(self) -> int: ...


class Governed(Protocol):
    """What the controller needs of a consumer."""

    @property
    def stats(self) -> Counters: ...
    @property
    def limits(self) -> Limits: ...
    def set_limits(self, limits: Limits) -> None:
        """Work with these from now on; what is held or runs beyond them is left to finish."""
        ...

    def set_prefetch_bytes(self, limit: int | None) -> None:
        """Hold so many bytes of messages at most from now on; None: those of the configuration."""
        ...


class Controller:
    """Keeps a consumer's limits where its load and its memory want them.

    Parameters
    ----------
    consumer:
        Whose limits to set; those that it has now are the maximum of what has none in ``scaling``.
    queue_name:
        Its queue, for the log.
    clock:
        Where times and timers come from.
    scaling:
        How to follow the load; None leaves the limits as they are configured.
    memory:
        When to hold less; None does not look at the memory.
    counts:
        Asks for the queue's counts; may fail, or be None where nothing is to be asked.
    is_counting_cheap:
        Whether that is a call within this process.
    spawn:
        Makes the task that asks for them; who gives it waits for the task's end.

    There is one timer. While nothing is received and nothing held, it comes ever more rarely, up to the
    ``idle_interval`` of ``scaling`` (10 s without), and nothing is counted. Thread-safety: for the client's event loop.
    """

    def __init__(
        self,
        consumer: Governed,
        queue_name: str,
        clock: Clock,
        *,
        scaling: ScalingConfig | None = None,
        memory: MemoryConfig | MemoryPressure | None = None,
        counts: Callable[[], Awaitable[QueueCounts]] | None = None,
        is_counting_cheap: bool = False,
        spawn: Spawn | None = None,
    ) -> None:
        self._consumer = consumer
        self._queue_name = queue_name
        self._clock = clock
        self._configured = consumer.limits
        self._scaler = None if scaling is None else Scaler(scaling, self._configured)
        self._pressure = MemoryPressure(memory) if isinstance(memory, MemoryConfig) else memory
        intervals = [] if scaling is None else [scaling.interval]
        if self._pressure is not None:
            intervals.append(self._pressure.config.interval)
        self._interval = min(cast(list[float], intervals), default=1.0)
        idle_interval = IDLE_INTERVAL if scaling is None else cast(float, scaling.idle_interval)
        self._slowest = max(self._interval, idle_interval)
        self._pause = self._interval
        self._timer: Timer | None = None
        self._lowest = LEAST if self._scaler is None else self._scaler.lowest
        self._counting = _Counting(queue_name, clock, counts, scaling, is_counting_cheap, spawn)
        self._seen = _Seen(self._clock.monotonic(), consumer.stats)
        self._lag: float | None = None
        self._has_others = False
        """Whether messages without a session were received since the last look."""

    def start(self) -> None:
        """Begin with the lowest limits, or with those that the memory surely allows, and look from now on."""
        limits = self._configured
        if self._scaler is not None:
            limits = self._scaler.decide(self._clock.monotonic(), Load(), self._lowest)
        if self._pressure is not None:
            few = max(self._lowest.prefetch, 2 * limits.concurrency)
            limits = limits._replace(prefetch=min(limits.prefetch, few))
            self._pressure.look()
            self._consumer.set_prefetch_bytes(self._pressure.allowed_bytes(0))
        self._set(limits, "the consumer starts")
        self._seen = _Seen(self._clock.monotonic(), self._consumer.stats)
        self._arm()

    def stop(self) -> None:
        """Look no more; the limits stay as they are."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._interval = 0.0
        self._counting.stop()

    def received(self, messages: Sequence[ReceivedMessage]) -> None:
        """Learn the age of what came; begin to look often again after a quiet time."""
        first = messages[0]
        if first.session_id is None:
            self._has_others = True
        if first.delivery_count == 1:  # else it waited for something else, too
            self._lag = max(0.0, self._clock.time() - first.enqueued_at.timestamp())
        if self._pause > self._interval and self._timer is not None:
            self._timer.cancel()
            self._pause = self._interval
            self._seen = _Seen(self._clock.monotonic(), self._consumer.stats)
            self._arm()

    def _arm(self) -> None:
        if self._interval:
            self._timer = self._clock.call_later(self._pause, self._tick)

    def _tick(self) -> None:
        self._timer = None
        try:
            self._look()
        except Exception:
            logger.exception("cannot control, queue=%s", self._queue_name)
        finally:
            self._arm()

    def _look(self) -> None:
        now, stats, limits = self._clock.monotonic(), self._consumer.stats, self._consumer.limits
        seen, self._seen = self._seen, _Seen(now, stats)
        held = stats.waiting + stats.running
        wanted, reason = self._configured, "as configured"
        if self._scaler is not None:
            wanted = self._scaler.decide(now, self._load(now, seen, stats, limits), limits)
            reason = self._scaler.reason
        if self._pressure is not None:
            before = self._pressure.level
            level = self._pressure.look()
            allowed = self._pressure.allowed(wanted, limits, self._lowest)
            self._consumer.set_prefetch_bytes(self._pressure.allowed_bytes(stats.held_bytes))
            if allowed != wanted or level is not MemoryLevel.NORMAL:
                reason = _describe(self._pressure)
            wanted = allowed
            if level is not before:
                logger.warning("memory pressure, queue=%s: %s", self._queue_name, _describe(self._pressure))
        is_idle = stats.received == seen.received and not held
        self._set(wanted, reason)
        if is_idle and wanted == limits:
            self._pause = min(2 * self._pause, self._slowest)
        else:
            self._pause = self._interval
            if not is_idle:
                self._counting.ask(now, stats.received)
        self._lag = None
        self._has_others = False

    def _load(self, now: float, seen: _Seen, stats: Counters, limits: Limits) -> Load:
        seconds = now - seen.time
        if seconds <= 0:
            return Load()
        handled = max(0, _handled(stats) - seen.handled)
        spent = stats.handler_seconds - seen.handler_seconds
        busy = stats.busy_seconds - seen.busy_seconds
        is_in_sessions = stats.sessions_open > 0 and not self._has_others
        return Load(
            rate=handled / seconds,
            handler_seconds=max(0.0, spent / handled) if handled else 0.0,
            busy=min(1.0, max(0.0, busy / seconds / limits.concurrency)),
            in_flight=stats.waiting + stats.running,
            waiting=stats.waiting,
            depth=self._counting.depth(now, stats.received),
            lag=self._lag,
            sessions=stats.sessions_open,
            runnable=stats.sessions_open if is_in_sessions else None,
        )

    def _set(self, wanted: Limits, reason: str) -> None:
        limits = self._consumer.limits
        if wanted == limits:
            return
        self._consumer.set_limits(wanted)
        changes = ", ".join(
            f"{name} {before} to {after}"
            for name, before, after in zip(Limits._fields, limits, wanted, strict=True)
            if before != after
        )
        logger.info("limits set, queue=%s: %s: %s", self._queue_name, changes, reason)


class _Seen:
    """The counters at one time."""

    __slots__ = ("busy_seconds", "handled", "handler_seconds", "received", "time")

    def __init__(self, time: float, stats: Counters) -> None:
        self.time = time
        self.received = stats.received
        self.handled = _handled(stats)
        self.handler_seconds = stats.handler_seconds
        self.busy_seconds = stats.busy_seconds


def _handled(stats: Counters) -> int:
    """The messages that are done with."""
    settled = stats.completed + stats.abandoned + stats.dead_lettered + stats.deferred
    return settled + stats.settle_errors + stats.locks_lost


class _Counting:
    """Asks for the depth of the queue, not too often, and not so that a failure would hurt."""

    def __init__(
        self,
        queue_name: str,
        clock: Clock,
        counts: Callable[[], Awaitable[QueueCounts]] | None,
        scaling: ScalingConfig | None,
        is_cheap: bool,
        spawn: Spawn | None,
    ) -> None:
        self._queue_name = queue_name
        self._clock = clock
        self._counts = None if scaling is None else counts
        self._interval = 0.0 if scaling is None or is_cheap else cast(float, scaling.count_interval)
        self._lasting = STALE * max(self._interval, 0.0 if scaling is None else cast(float, scaling.interval))
        self._spawn = spawn or asyncio.create_task
        self._task: asyncio.Task[None] | None = None
        self._due = 0.0
        self._failures = 0
        self._active: int | None = None
        self._time = 0.0
        self._received = 0

    def ask(self, now: float, received: int) -> None:
        """Ask when it is time to; ``received`` are the messages received until now."""
        if self._counts is None or self._task is not None or now < self._due:
            return
        self._task = self._spawn(self._ask(self._counts, now, received))

    def depth(self, now: float, received: int) -> int | None:
        """Return what was counted less what was received since, None when it is not known."""
        if self._active is None or now - self._time > self._lasting:
            return None
        return max(0, self._active - (received - self._received))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _ask(self, counts: Callable[[], Awaitable[QueueCounts]], now: float, received: int) -> None:
        try:
            self._active = (await within(self._clock, COUNT_TIMEOUT, counts())).active
            self._time, self._received = now, received
            self._due = now + self._interval
            self._failures = 0
        except Exception as error:
            self._active = None
            self._failures += 1
            self._due = now + min(LONGEST_PAUSE, max(self._interval, 1.0) * 2.0 ** min(self._failures, 10))
            if self._failures == 1:
                logger.warning(
                    "cannot count, queue=%s, scaling without: %s", self._queue_name, str(error) or "no answer"
                )
        finally:
            self._task = None


def _describe(pressure: MemoryPressure) -> str:
    use = pressure.use
    if use is None:
        return "memory unknown"
    return f"memory {pressure.level.value}: {use.used >> 20} of {use.limit >> 20} MiB, {use.source}"
