"""Consumer: fetches in adaptive batches, runs handlers, settles what they did, and drains [C39, C40, C44]."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, cast

from queue_runtime.client import QueueClient
from queue_runtime.config import integer
from queue_runtime.control import Controller
from queue_runtime.errors import AlreadyStartedError, ConfigurationError, ValidationError
from queue_runtime.feeds import Feed, QueueFeed
from queue_runtime.handling import ConsumerConfig, ConsumerObserver, ConsumerStats, Handler
from queue_runtime.intake import Intake
from queue_runtime.message import QueueName
from queue_runtime.runner import Runner
from queue_runtime.scaling import Limits
from queue_runtime.session_feed import SessionFeed
from queue_runtime.vitals import Vitals

logger = logging.getLogger("queue_runtime.consumer")

END_PATIENCE = 5.0
"""Seconds that settlements and the closing of sessions get when the time to drain is over."""


class Consumer:
    """Runs a handler over the messages of a queue.

    Parameters
    ----------
    client:
        The client to receive from; it stays open when the consumer ends.
    queue_name:
        The queue.
    handler:
        ``async def handler(message)``, or ``handler(message, context)`` with a MessageContext; of a batch, the list of
        its messages, and a BatchContext. A plain function runs in a thread, or in a process (``executor``). When it
        returns, the message is completed. When it raises, ``retry`` and ``on_failure`` decide; ``RejectMessage`` and
        ``RetryMessage`` decide themselves.
    config:
        See ConsumerConfig.
    observer:
        Told of what happens.

    A handler may see a message more than once: delivery is at least once. Messages of one session are handled in
    order, one at a time; all others at most ``max_concurrency`` at a time. When the lock of a message is lost, its
    async handler is cancelled; a plain one runs on in its thread, and its result is dropped.
    Raises ConfigurationError or ValidationError, which name the field.

    Thread-safety: for the client's event loop.
    """

    def __init__(
        self,
        client: QueueClient,
        queue_name: str,
        handler: Handler,
        config: ConsumerConfig | None = None,
        *,
        observer: ConsumerObserver | None = None,
    ) -> None:
        config = config or ConsumerConfig()
        if not isinstance(client, QueueClient):
            raise ValidationError("client", f"must be a QueueClient, not {type(client).__name__}")
        if not isinstance(config, ConsumerConfig):
            raise ConfigurationError("config", f"must be a ConsumerConfig, not {type(config).__name__}")
        queue_name = QueueName(queue_name)
        self._client = client
        self._drain_timeout = float(config.drain_timeout)  # type: ignore[arg-type]  # seconds since its creation
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner = Runner(client, queue_name, handler, config, observer or ConsumerObserver(), self._spawn)
        takes_queue = config.source != "sessions"
        takes_sessions = config.source != "queue" and client.capabilities.sessions
        if config.source == "sessions":
            client.require("sessions")
        if takes_queue and takes_sessions and self._runner.room.capacity < 2:
            raise ConfigurationError("prefetch", "must be at least 2: one for sessions, one for other messages")
        share = 0.5 if takes_queue and takes_sessions else 1.0
        intake = Intake(self._runner)
        self._queue_feed = QueueFeed(intake, config, share=share) if takes_queue else None
        self._session_feed = SessionFeed(intake, config) if takes_sessions else None
        self._feeds: list[Feed] = [feed for feed in (self._queue_feed, self._session_feed) if feed is not None]
        self._limits = Limits(
            self._runner.permits.capacity, self._runner.room.capacity, config.pollers, config.max_sessions
        )
        self._prefetch_bytes = config.prefetch_bytes
        self._controller = self._make_controller(config)
        stall_after = cast("float | None", config.stall_after)
        self._vitals = Vitals(self._runner, intake, self._queue_feed, self._session_feed, handler, stall_after)
        self._started = False
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._failure: BaseException | None = None

    @property
    def stats(self) -> ConsumerStats:
        """The counters as they are now."""
        return self._runner.stats

    @property
    def limits(self) -> Limits:
        """What it is allowed now."""
        return self._limits

    def set_limits(self, limits: Limits) -> None:
        """Allow more or less from now on; what runs and what is held beyond a smaller limit is left to end.

        Raises ConfigurationError for a limit below 1.
        """
        if not isinstance(limits, Limits):
            raise ValidationError("limits", f"must be Limits, not {type(limits).__name__}")
        for field, value in limits._asdict().items():
            integer(field, value, minimum=2 if field == "prefetch" and len(self._feeds) == 2 else 1)
        self._limits = limits
        self._runner.permits.resize(limits.concurrency)
        self._runner.room.resize(limits.prefetch)
        if self._session_feed is not None:
            self._session_feed.take_room(0)
            self._session_feed.places.resize(limits.sessions)
        if self._queue_feed is not None:
            self._queue_feed.set_pollers(limits.pollers)
            self._queue_feed.call_workers()

    def set_prefetch_bytes(self, limit: int | None) -> None:
        """Hold so many bytes of messages at most from now on, but not more than configured; None: as configured."""
        given = [bound for bound in (limit, self._prefetch_bytes) if bound is not None]
        self._runner.bytes.resize(min(given, default=None))

    async def run(self, *, handle_signals: bool = False) -> ConsumerStats:
        """Work until ``stop`` is called, or the task is cancelled; return the final counters.

        With ``handle_signals``, SIGINT and SIGTERM drain, and a second one releases everything at once.
        Raises AlreadyStartedError on a second run, and the error that made fetching impossible, such as
        QueueNotFoundError, after draining.
        """
        if self._started:
            raise AlreadyStartedError("this consumer was started already; make another one")
        self._started = True
        unhook = self._hook_signals() if handle_signals else None
        forget_listener = self._client.on_locks_lost(self._runner.locks_lost)
        forget_reporter = self._client.add_reporter(self._vitals)
        self._vitals.start()
        cancelled: asyncio.CancelledError | None = None
        working = asyncio.create_task(self._work())
        try:
            while not working.done():
                try:
                    await asyncio.wait([working])
                except asyncio.CancelledError as error:  # however often: nothing is left behind
                    cancelled = error
                    self.stop_now()
        finally:
            forget_listener()
            forget_reporter()
            self._vitals.stop()
            if unhook is not None:
                unhook()
            self._runner.close()
        if cancelled is not None:
            raise cancelled
        working.result()
        if self._failure is not None:
            raise self._failure
        return self.stats

    def stop(self) -> None:
        """Drain [C40]: fetch no more, release what waits, let running handlers finish within ``drain_timeout``."""
        self._stop.set()

    def stop_now(self) -> None:
        """Cancel running handlers too, and release their messages."""
        self._stop.set()
        self._stop_now.set()

    async def _work(self) -> None:
        is_cut_off = False
        try:
            if self._controller is not None:
                self._controller.start()
            for feed in self._feeds:
                feed.start()
            await self._stop.wait()
        except GeneratorExit:  # the event loop is gone: nothing can be awaited any more
            is_cut_off = True
            raise
        finally:
            if not is_cut_off:
                await self._drain()

    async def _drain(self) -> None:
        deadline = self._client.clock.call_later(self._drain_timeout, self.stop_now)
        hurried = asyncio.ensure_future(self._stop_now.wait())
        try:
            if self._controller is not None:
                self._controller.stop()
            self._runner.begin_no_more()
            for feed in self._feeds:  # at once: while one releases what it holds, another must not go on fetching
                self._spawn(feed.stop())
            while (pending := self._pending()) and not hurried.done():
                await asyncio.wait([*pending, hurried], return_when=asyncio.FIRST_COMPLETED)
            if self.stats.running:
                logger.warning("the time to drain is over: %d handlers are cancelled", self.stats.running)
                self._runner.cancel_all()
            await self._end()
        finally:
            deadline.cancel()
            hurried.cancel()
            await asyncio.gather(hurried, return_exceptions=True)

    async def _end(self) -> None:
        """Wait for what is settled and closed, and give up what does not come to an end."""
        over = asyncio.Event()
        patience = self._client.clock.call_later(END_PATIENCE, over.set)
        waiting = asyncio.ensure_future(over.wait())
        try:
            while (pending := self._pending()) and not over.is_set():
                await asyncio.wait([*pending, waiting], return_when=asyncio.FIRST_COMPLETED)
            self._runner.give_up()
            if self._tasks:
                logger.warning("%d tasks do not end: their messages come back when the locks end", len(self._tasks))
            while self._tasks:  # again and again: what is cancelled may try to settle once more
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks, timeout=1.0)
        finally:
            patience.cancel()
            waiting.cancel()

    def _make_controller(self, config: ConsumerConfig) -> Controller | None:
        if config.scaling is None and config.memory is None:
            return None
        if config.scaling is not None and len(self._feeds) == 2:
            integer("scaling.min_prefetch", config.scaling.min_prefetch, minimum=2)
        client, queue_name = self._client, self._runner.queue_name
        controller = Controller(
            self,
            queue_name,
            client.clock,
            scaling=config.scaling,
            memory=config.memory,
            counts=partial(client.counts, queue_name),
            is_counting_cheap=client.capabilities.settles_in_process,
            spawn=self._spawn,
        )
        self._runner.on_received = controller.received
        return controller

    def _pending(self) -> set[asyncio.Future[Any]]:
        return {*self._tasks, *self._runner.settling}

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
            self.stop()

    def _hook_signals(self) -> Callable[[], None]:
        loop = asyncio.get_running_loop()

        def ask() -> None:
            if self._stop.is_set():
                self.stop_now()
            else:
                self.stop()

        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, ask)

        def unhook() -> None:
            for number in signals:
                loop.remove_signal_handler(number)

        return unhook
