"""One message after another: run its handler, settle what came of it, keep the count."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, cast

from queue_runtime.client import QueueClient
from queue_runtime.errors import QueueRuntimeError
from queue_runtime.handling import (
    ConsumerConfig,
    ConsumerObserver,
    ConsumerStats,
    Handler,
    RejectMessage,
    RetryMessage,
    default_policy,
)
from queue_runtime.message import Receipt, ReceivedMessage
from queue_runtime.providers.base import ABANDON, COMPLETE, Action, Disposition, Outcome
from queue_runtime.room import Room
from queue_runtime.settlement import unexpected

logger = logging.getLogger("queue_runtime.consumer")


@dataclass(slots=True)
class _Counters:
    """The part of ConsumerStats that is counted."""

    received: int = 0
    completed: int = 0
    abandoned: int = 0
    dead_lettered: int = 0
    failed: int = 0
    locks_lost: int = 0
    settle_errors: int = 0
    batches: int = 0
    sessions: int = 0
    sessions_open: int = 0


class Runner:
    """What the feeds of one consumer share: the handler, its bounds, and the messages that are held.

    Thread-safety: for the client's event loop.
    """

    def __init__(
        self,
        client: QueueClient,
        queue_name: str,
        handler: Handler,
        config: ConsumerConfig,
        observer: ConsumerObserver,
    ) -> None:
        self.client = client
        self.queue_name = queue_name
        self.observer = observer
        self.counters = _Counters()
        self.max_concurrency = config.max_concurrency or client.config.max_concurrency
        self.room = Room(config.prefetch or client.config.prefetch)
        self._handler = handler
        self._threads = None if _is_async(handler) else self._pool()
        self._on_failure = config.on_failure or default_policy(config.max_attempts)
        self._permits = Room(self.max_concurrency)
        self._held: dict[Receipt, asyncio.Task[Any] | None] = {}
        self._running = 0
        self._lost: set[Receipt] = set()
        self.settling: set[asyncio.Future[Any]] = set()
        """Settlements under way that nobody waits for."""
        self.is_beginning = True
        """Whether handlers still begin; false once the consumer drains."""
        self._cancelling = False

    @property
    def stats(self) -> ConsumerStats:
        waiting = len(self._held) - self._running
        return ConsumerStats(**asdict(self.counters), waiting=waiting, running=self._running)

    def take_over(self, messages: Sequence[ReceivedMessage]) -> None:
        """Count these as held from now on; their room was taken before."""
        self._held.update(dict.fromkeys([message.receipt for message in messages]))
        self.counters.received += len(messages)
        self.counters.batches += 1
        self.tell(self.observer.batch_received, messages)

    def let_go(self, messages: Sequence[ReceivedMessage]) -> None:
        """Hold these no longer, however that came about."""
        for message in messages:
            self._held.pop(message.receipt, None)
            self._lost.discard(message.receipt)
        self.room.give(len(messages))

    async def handle(self, message: ReceivedMessage) -> Disposition | None:
        """Run the handler when one may run; return how to settle, or None when the right to settle is lost."""
        try:
            if not self._permits.take_one() and not await self._permits.take(1):
                return ABANDON
            try:
                return None if message.receipt in self._lost else await self._run(message)
            finally:
                self._permits.give(1)
        except GeneratorExit:  # the event loop is gone: nothing can be awaited any more
            raise
        except BaseException:  # this very task is cancelled, or the process is to end
            await self.settle(message, ABANDON)
            raise

    async def settle(self, message: ReceivedMessage, disposition: Disposition | None) -> QueueRuntimeError | None:
        """Settle, count, and let go; return the error, if it came to one."""
        error = None
        try:
            if disposition is not None:
                try:
                    error = await self.client.settle(message.receipt, disposition)
                except Exception as bug:
                    error = unexpected(bug, self.client.provider_name)
                self._count(message, disposition, error)
        finally:
            self.let_go((message,))
        return error

    def settle_later(self, message: ReceivedMessage, disposition: Disposition, then: Callable[[], None]) -> None:
        """Do the same together with others, without waiting, and call ``then`` at the end."""

        def settled(outcome: Outcome) -> None:
            self.settling.discard(future)
            self._count(message, disposition, outcome)
            self.let_go((message,))
            then()

        future = self.client.settle_soon(message.receipt, disposition, settled)
        self.settling.add(future)

    def begin_no_more(self) -> None:
        """Start no further handler: the messages that wait for one are abandoned at once."""
        self.is_beginning = False
        self._permits.close()

    def cancel_all(self) -> None:
        """Cancel the handlers that run: their messages are abandoned."""
        self._cancelling = True
        for task in self._held.values():
            if task is not None:
                task.cancel()

    def locks_lost(self, receiver_id: int, receipts: Sequence[Receipt], error: QueueRuntimeError | None) -> None:
        """Cancel the handlers of messages whose locks are lost, and handle those that wait no more."""
        for receipt in receipts:
            if receipt in self._held:
                self.counters.locks_lost += 1
                self._lost.add(receipt)
                task = self._held[receipt]
                if task is not None:
                    task.cancel()

    def tell(self, report: Callable[..., None], *what: object) -> None:
        """Tell the observer; what it raises is logged."""
        try:
            report(*what)
        except Exception:
            logger.exception("the observer failed, queue=%s", self.queue_name)

    def close(self) -> None:
        """Let go of the threads. One that runs on in a handler is not waited for."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, message: ReceivedMessage) -> Disposition | None:
        receipt = message.receipt
        task = self._held[receipt] = _current_task()
        self._running += 1
        disposition: Disposition = COMPLETE
        try:
            if self._threads is None:
                await cast(Coroutine[Any, Any, object], self._handler(message))
            else:
                call = contextvars.copy_context().run
                result = await task.get_loop().run_in_executor(self._threads, call, _called, self._handler, message)
                if inspect.isawaitable(result):
                    await result
        except RejectMessage as reject:
            disposition = Disposition(Action.DEAD_LETTER, reason=reject.reason, description=reject.description)
        except RetryMessage as retry:
            disposition = Disposition(Action.ABANDON, delay=retry.delay)
        except Exception as error:
            disposition = self._failed(message, error)
        except asyncio.CancelledError as error:
            if self._cancelling or receipt in self._lost:
                disposition = ABANDON
            elif task.cancelling():
                raise
            else:  # not of this task, but of something that the handler awaited
                failure = CancelledError("what the handler awaited was cancelled")
                failure.__cause__ = error
                disposition = self._failed(message, failure)
        finally:
            self._held[receipt] = None
            self._running -= 1
        is_lost = receipt in self._lost
        if is_lost or self._cancelling:
            while task.cancelling():  # that was meant for the handler; the task goes on to settle
                task.uncancel()
        return None if is_lost else disposition

    def _failed(self, message: ReceivedMessage, error: Exception) -> Disposition:
        self.counters.failed += 1
        logger.warning(
            "handler failed, queue=%s message_id=%s attempt=%d",
            self.queue_name,
            message.message_id,
            message.delivery_count,
            exc_info=error,
        )
        self.tell(self.observer.handler_failed, message, error)
        try:
            decision = self._on_failure(message, error)
            if not isinstance(decision, Disposition):
                raise TypeError(f"the policy must return a Disposition, not {type(decision).__name__}")
            return decision
        except Exception:
            logger.exception("the failure policy failed, queue=%s message_id=%s", self.queue_name, message.message_id)
            return ABANDON

    def _count(self, message: ReceivedMessage, disposition: Disposition, error: QueueRuntimeError | None) -> None:
        if error is not None:
            self.counters.settle_errors += 1
            self.client.renew_no_more(message.receipt)  # so that it comes back when its lock ends
            logger.warning("not settled, queue=%s message_id=%s: %s", self.queue_name, message.message_id, error)
        elif disposition.action is Action.COMPLETE:
            self.counters.completed += 1
        elif disposition.action is Action.DEAD_LETTER:
            self.counters.dead_lettered += 1
        else:
            self.counters.abandoned += 1
        self.tell(self.observer.message_settled, message, disposition, error)

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="queue-runtime-handler")


def _current_task() -> asyncio.Task[Any]:
    return cast("asyncio.Task[Any]", asyncio.current_task())


def _called(handler: Handler, message: ReceivedMessage) -> object:
    try:
        return handler(message)
    except StopIteration as error:  # Python 3.11 cannot put it into a future: its waiter would never hear of it
        raise RuntimeError("the handler raised StopIteration") from error


def _is_async(handler: Handler) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004
