"""Where a consumer's messages come from: the queue itself, and its sessions.

A feed fetches into the room that the runner has, and has each message handled and settled. Stopping it ends the
fetching and releases what no handler has begun; what runs is left to finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from queue_runtime._core.batch import AdaptiveBatchSizer
from queue_runtime.clock import sleep
from queue_runtime.errors import QueueRuntimeError, SessionLockLostError
from queue_runtime.handling import ConsumerConfig
from queue_runtime.message import ReceivedMessage
from queue_runtime.providers.base import Action
from queue_runtime.runner import Runner
from queue_runtime.sessions import Session

logger = logging.getLogger("queue_runtime.consumer")

T = TypeVar("T")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between attempts to fetch after passing errors: doubled from the first to the longest."""
ACCEPTORS = 4
"""Tasks that wait for sessions, so that one slow answer does not hold up the next session."""
SESSION_BATCH = 10
"""Messages of one session that are fetched ahead."""

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Feed(Protocol):
    def start(self) -> None: ...

    async def stop(self) -> None: ...


@dataclass(slots=True)
class _Batch:
    """The messages of one receive, until the last of them is settled."""

    size: int
    started: float
    left: int


class QueueFeed:
    """Messages without a session: one task fetches adaptive batches, workers handle them side by side."""

    def __init__(self, runner: Runner, config: ConsumerConfig, spawn: Spawn, *, share: float) -> None:
        capacity = runner.room.capacity
        self._runner = runner
        self._spawn = spawn
        self._share = share
        self._timeout = config.receive_timeout
        self._enough = max(1, capacity // 2)
        self._sizer = AdaptiveBatchSizer(
            min(config.min_batch_size, capacity), min(config.max_batch_size, capacity), config.target_batch_duration
        )
        self._ready: deque[tuple[ReceivedMessage, _Batch]] = deque()
        self._workers = 0
        self._fetcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._fetcher = self._spawn(self._fetch())

    async def stop(self) -> None:
        if self._fetcher is not None:
            await _cancelled([self._fetcher])
        messages = [message for message, _ in self._ready]
        self._ready.clear()
        if messages:
            try:
                await self._runner.client.abandon_messages(messages)
            except Exception as error:
                is_bug = not isinstance(error, QueueRuntimeError)
                logger.warning("not all released, queue=%s: %s", self._runner.queue_name, error, exc_info=is_bug)
            finally:
                self._runner.let_go(messages)

    async def _fetch(self) -> None:
        runner = self._runner
        while True:
            wanted = self._sizer.calculate_optimal_batch_size()
            # With messages still waiting, a larger batch later costs less than a small one now.
            at_least = min(wanted, self._enough) if self._ready else 1
            granted = await runner.room.take(wanted, share=self._share, at_least=at_least)
            receive = partial(runner.client.receive_messages, runner.queue_name, granted, self._timeout)
            messages = await _fill(runner, granted, receive)
            if messages:
                batch = _Batch(len(messages), runner.client.clock.monotonic(), len(messages))
                self._ready.extend((message, batch) for message in messages)
                self._call_workers()

    def _call_workers(self) -> None:
        while self._ready and self._workers < self._runner.max_concurrency:
            self._workers += 1
            self._spawn(self._work(*self._ready.popleft()))

    async def _work(self, message: ReceivedMessage, batch: _Batch) -> None:
        """Handle this one and what is ready, until nothing is."""
        runner = self._runner
        try:
            while True:
                disposition = await runner.handle(message)
                if disposition is None or runner.client.settles_at_once:
                    await runner.settle(message, disposition)
                    self._count_down(batch)
                else:
                    runner.settle_later(message, disposition, partial(self._count_down, batch))
                if not self._ready:
                    return
                message, batch = self._ready.popleft()
        finally:
            self._workers -= 1
            runner.room.hurry()

    def _count_down(self, batch: _Batch) -> None:
        batch.left -= 1
        if batch.left == 0:
            self._sizer.record(batch.size, max(0.0, self._runner.client.clock.monotonic() - batch.started))


class SessionFeed:
    """Messages of sessions: every session that is held has a task, which handles its messages one after another."""

    def __init__(self, runner: Runner, config: ConsumerConfig, spawn: Spawn, *, share: float) -> None:
        self._runner = runner
        self._spawn = spawn
        self._share = share
        self._timeout = config.receive_timeout
        self._turn = config.session_turn
        self._places = asyncio.Semaphore(config.max_sessions)
        self._acceptor_count = min(ACCEPTORS, config.max_sessions)
        self._acceptors: list[asyncio.Task[None]] = []
        self._waiting: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        self._acceptors = [self._spawn(self._accept()) for _ in range(self._acceptor_count)]

    async def stop(self) -> None:
        await _cancelled([*self._acceptors, *self._waiting])

    async def _accept(self) -> None:
        runner = self._runner
        accept = partial(runner.client.accept_session, runner.queue_name, timeout=self._timeout)
        while True:
            await self._places.acquire()
            session: Session | None = None
            try:
                session = await _persistently(runner, accept)
            finally:
                if session is None:
                    self._places.release()
            if session is not None:
                self._spawn(self._hold(session))

    async def _hold(self, session: Session) -> None:
        """Serve one session for a turn, then let it go."""
        runner, counters = self._runner, self._runner.counters
        counters.sessions += 1
        counters.sessions_open += 1
        runner.tell(runner.observer.session_opened, session.session_id)
        buffer: deque[ReceivedMessage] = deque()
        try:
            await self._serve(session, buffer)
        except SessionLockLostError:
            logger.warning("session lost, queue=%s session_id=%s", runner.queue_name, session.session_id)
        finally:
            try:
                with contextlib.suppress(QueueRuntimeError):
                    await session.close()
            finally:
                runner.let_go(buffer)  # closing the session released them
                counters.sessions_open -= 1
                self._places.release()
                runner.tell(runner.observer.session_closed, session.session_id)

    async def _serve(self, session: Session, buffer: deque[ReceivedMessage]) -> None:
        left = self._turn
        while self._runner.is_beginning:
            if not buffer:
                messages = await self._receive(session, min(SESSION_BATCH, left)) if left else []
                if not messages:
                    return
                left -= len(messages)
                buffer.extend(messages)
            message = buffer.popleft()
            disposition = await self._runner.handle(message)
            # Settled before the next one begins: if it comes back after all, it comes back in its place.
            error = await self._runner.settle(message, disposition)
            if disposition is None or error is not None:
                return
            if disposition.action is Action.ABANDON and buffer and self._runner.is_beginning:
                # Its followers are here already and wait for it; released, they would use up deliveries.
                again = await self._receive(session, 1, disposition.delay + 1.0 if disposition.delay else 0.0)
                ordered = sorted([*again, *buffer], key=lambda held: held.sequence_number or 0)
                buffer.clear()
                buffer.extend(ordered)

    async def _receive(self, session: Session, wanted: int, timeout: float = 0.0) -> list[ReceivedMessage]:
        runner = self._runner
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._waiting.add(task)
        try:
            granted = await runner.room.take(wanted, share=self._share)
            return await _fill(runner, granted, partial(session.receive_messages, granted, timeout))
        finally:
            self._waiting.discard(task)


async def _fill(
    runner: Runner, granted: int, receive: Callable[[], Awaitable[list[ReceivedMessage]]]
) -> list[ReceivedMessage]:
    """Receive into the room that was granted, and give back what was not needed of it."""
    messages: list[ReceivedMessage] = []
    try:
        messages = await _persistently(runner, receive)
    finally:
        runner.room.give(granted - len(messages))
    if messages:
        runner.take_over(messages)
    return messages


async def _persistently(runner: Runner, call: Callable[[], Awaitable[T]]) -> T:
    """Call, again after a pause while the error is a passing one."""
    pause = FIRST_PAUSE
    while True:
        try:
            return await call()
        except QueueRuntimeError as error:
            if not error.is_transient:
                raise
            wait = max(pause, error.retry_after or 0.0)
            logger.warning("cannot fetch, queue=%s, again in %.1f s: %s", runner.queue_name, wait, error)
        await sleep(runner.client.clock, wait)
        pause = min(pause * 2, LONGEST_PAUSE)


async def _cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
