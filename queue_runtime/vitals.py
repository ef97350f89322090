"""How one consumer is: what its client's ``health`` and the watch over its progress ask it."""

from __future__ import annotations

import math
from asyncio import Task
from collections.abc import Sequence
from types import CodeType
from typing import Any

from queue_runtime.breaker import BreakerState
from queue_runtime.clock import Clock
from queue_runtime.feeds import QueueFeed
from queue_runtime.health import ConsumerHealth
from queue_runtime.intake import Intake
from queue_runtime.message import ReceivedMessage
from queue_runtime.progress import Held, Progress, ProgressWatch
from queue_runtime.runner import Runner
from queue_runtime.session_feed import SessionFeed
from queue_runtime.watchdog import is_ours


class Vitals:
    """Reads a consumer's counters; nothing is kept for it but them.

    Parameters
    ----------
    runner, intake, queue_feed, session_feed:
        Of the consumer.
    handler:
        The handler, for its name.
    stall_after:
        Seconds without progress that are a stall; None looks at nothing.

    Thread-safety: for the client's event loop.
    """

    def __init__(
        self,
        runner: Runner,
        intake: Intake,
        queue_feed: QueueFeed | None,
        session_feed: SessionFeed | None,
        handler: object,
        stall_after: float | None,
    ) -> None:
        self._runner = runner
        self._intake = intake
        self._queue_feed = queue_feed
        self._session_feed = session_feed
        self._handler = getattr(handler, "__qualname__", type(handler).__qualname__)
        self._watch = ProgressWatch(self, math.inf if stall_after is None else stall_after)
        self._is_running = False

    @property
    def queue_name(self) -> str:
        return self._runner.queue_name

    @property
    def clock(self) -> Clock:
        return self._runner.client.clock

    def start(self) -> None:
        self._is_running = True
        self._watch.start()

    def stop(self) -> None:
        self._is_running = False
        self._watch.stop()

    def health(self) -> ConsumerHealth:
        stats, breaker = self._runner.stats, self._runner.breaker
        return ConsumerHealth(
            self.queue_name,
            self._is_running and self._runner.is_beginning,
            waiting=stats.waiting,
            running=stats.running,
            breaker=None if breaker is None else breaker.state,
            problems=self._watch.problems,
        )

    def progress(self) -> Progress:
        runner, counters = self._runner, self._runner.counters
        breaker = runner.breaker
        return Progress(
            received=counters.received,
            # Whatever becomes of a message after its handler is counted, once, in one of these.
            handled=counters.completed
            + counters.abandoned
            + counters.dead_lettered
            + counters.deferred
            + counters.settle_errors
            + counters.locks_lost,
            waiting=0 if self._queue_feed is None else self._queue_feed.ready,
            running=runner.stats.running,
            free=runner.permits.free,
            fetch_due=min(self._intake.under_way.values(), default=None),
            is_paused=not runner.is_beginning or (breaker is not None and breaker.state is not BreakerState.CLOSED),
        )

    def oldest(self, count: int) -> Sequence[Held]:
        now = self.clock.time()
        found: list[Held] = []
        for run in self._runner.runs():
            found += [self._held(message, now, place) for message, place in _in_handler(run, self._handler)]
            if len(found) >= count:
                break
        if self._queue_feed is not None:
            found += [self._held(message, now, None) for message in self._queue_feed.first_ready(count - len(found))]
        return sorted(found[:count], key=lambda held: -held.seconds)

    def fetch_anew(self) -> None:
        if self._queue_feed is not None:
            self._queue_feed.fetch_anew()
        if self._session_feed is not None:
            self._session_feed.accept_anew()

    @staticmethod
    def _held(message: ReceivedMessage, now: float, place: str | None) -> Held:
        since = message.delivered_at
        return Held(message.message_id, 0.0 if since is None else max(0.0, now - since.timestamp()), place)


def _in_handler(task: Task[Any], handler: str) -> list[tuple[ReceivedMessage, str]]:
    """The messages that a task has in its handler, and where that waits, read from the task's own frames.

    Slow, and for one that is stuck: so no message has to be kept for it while all is well.
    """
    messages: list[ReceivedMessage] = []
    place = handler
    waits: Any = task.get_coro()
    while waits is not None:
        frame = getattr(waits, "cr_frame", None)
        if frame is not None:
            if is_ours(frame.f_code):
                known = frame.f_locals
                messages = list(known.get("messages", ())) or ([known["message"]] if "message" in known else messages)
            else:
                place = f"{handler}, at {_told(frame.f_code, frame.f_lineno)}"
        waits = getattr(waits, "cr_await", None)
    return [(message, place) for message in messages if isinstance(message, ReceivedMessage)]


def _told(code: CodeType, line: int) -> str:
    return f"{code.co_qualname} ({code.co_filename}:{line})"
