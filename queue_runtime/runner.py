"""One message after another, or one batch: run the handler, settle what came of it, keep the count."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from queue_runtime.breaker import BreakerState, CircuitBreaker
from queue_runtime.calling import call_of
from queue_runtime.client import QueueClient
from queue_runtime.clock import sleep
from queue_runtime.context import BatchContext, HandlerContext, MessageContext
from queue_runtime.errors import QueueRuntimeError, QueueTimeoutError
from queue_runtime.handling import (
    ConsumerConfig,
    ConsumerObserver,
    ConsumerStats,
    Handler,
    RejectMessage,
    RetryMessage,
    policy_of,
)
from queue_runtime.message import Receipt, ReceivedMessage
from queue_runtime.middleware import Chain
from queue_runtime.providers.base import ABANDON, COMPLETE, Action, Disposition, Outcome
from queue_runtime.room import ByteBound, Room
from queue_runtime.sessions import Session
from queue_runtime.settlement import unexpected

logger = logging.getLogger("queue_runtime.consumer")

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class _Run(Protocol):
    """What runs a handler on a message: its task, or the batch that the message is part of."""

    def cancel(self) -> object: ...


class _BatchRun:
    """A batch in its handler: lost message by message, and cancelled with the last of them."""

    __slots__ = ("_left", "task")

    def __init__(self, task: asyncio.Task[Any], count: int) -> None:
        self.task = task
        self._left = count

    def cancel(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.task.cancel()


class _Stopped(Exception):
    """The handler was cancelled: the drain is over, or the locks are lost."""


_STOPPED = _Stopped()


def _given_up() -> QueueTimeoutError:
    return QueueTimeoutError("the consumer ended before it was settled")


@dataclass(slots=True)
class _Counters:
    """The part of ConsumerStats that is counted."""

    received: int = 0
    completed: int = 0
    abandoned: int = 0
    dead_lettered: int = 0
    deferred: int = 0
    failed: int = 0
    locks_lost: int = 0
    settle_errors: int = 0
    batches: int = 0
    sessions: int = 0
    sessions_open: int = 0
    handler_seconds: float = 0.0


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
        spawn: Spawn,
    ) -> None:
        self.client = client
        self.queue_name = queue_name
        self.observer = observer
        self.spawn = spawn
        self.counters = _Counters()
        self.room = Room(config.prefetch or client.config.prefetch)
        self.bytes = ByteBound(config.prefetch_bytes)
        self.permits = Room(config.max_concurrency or client.config.max_concurrency)
        self.is_batch = config.handler_form == "batch"
        self.breaker = None if config.breaker is None else CircuitBreaker(config.breaker, client.clock, self._changed)
        self.breaker_moved = asyncio.Event()
        """Set when the breaker has another state, or nothing is held for a handler any more."""
        self.chain = Chain(config.middleware)
        self.prepaid: set[int] = set()
        """Receivers whose messages take no room of their own: it was taken for all that the session may hold."""
        self.settling: dict[asyncio.Future[Any], Callable[[Outcome], None]] = {}
        """Settlements under way that nobody waits for."""
        self.is_beginning = True
        """Whether handlers still begin; false once the consumer drains."""
        most = config.scaling.max_concurrency if config.scaling is not None else None
        self._now = client.clock.monotonic
        self._call = call_of(handler, config.executor, max(self.permits.capacity, most or 0))
        self._needs_context = self._call.takes_context or self.chain.handle is not None or self.is_batch
        self._on_failure = config.on_failure or policy_of(config.retry)
        self._can_delay = client.capabilities.abandon_delay
        self._held: dict[Receipt, _Run | None] = {}
        self._lost: set[Receipt] = set()
        self._resting = 0
        self._running = 0
        self._calls = 0
        self._calls_began = 0.0
        """The times at which the calls under way began, added up."""
        self.on_received: Callable[[Sequence[ReceivedMessage]], None] | None = None
        """Told of every receive that brought messages."""
        self._waits: set[asyncio.Future[Any]] = set()
        self._cancelling = False

    @property
    def stats(self) -> ConsumerStats:
        waiting = len(self._held) - self._running
        begun = self._calls * self.client.clock.monotonic() - self._calls_began
        return ConsumerStats(
            **asdict(self.counters),
            busy_seconds=self.counters.handler_seconds + begun,
            waiting=waiting,
            running=self._running,
            held_bytes=self.bytes.held,
        )

    @property
    def will_try(self) -> bool:
        """Whether anything is held for a handler; what only waits to be given back is not."""
        return len(self._held) > self._resting

    # Holding.

    def hold(self, messages: Sequence[ReceivedMessage]) -> None:
        """Hold these from now on; their room was taken before."""
        self._held.update(dict.fromkeys([message.receipt for message in messages]))
        self.counters.received += len(messages)
        self.counters.batches += 1
        if self.on_received is not None:
            self.on_received(messages)
        self.tell(self.observer.batch_received, messages)

    def let_go(self, messages: Sequence[ReceivedMessage]) -> None:
        """Hold these no longer, however that came about."""
        size = places = 0
        for message in messages:
            receipt = message.receipt
            self._held.pop(receipt, None)
            self._lost.discard(receipt)
            size += message.size
            if receipt.receiver_id not in self.prepaid:
                places += 1
        self.bytes.give(size)
        if places:
            self.room.give(places)
        if self.breaker is not None and not self.will_try:
            self.breaker_moved.set()

    def pass_over(self, message: ReceivedMessage) -> None:
        """Have no handler begin with this one, which waits for its turn: one before it comes back."""
        if message.receipt in self._held and self._held[message.receipt] is None:
            self._lost.add(message.receipt)

    def runs(self) -> list[asyncio.Task[Any]]:
        """The tasks whose handlers run, those of the oldest messages first."""
        runs = (run.task if isinstance(run, _BatchRun) else run for run in self._held.values())
        return list(dict.fromkeys(run for run in runs if isinstance(run, asyncio.Task)))

    # Handling.

    async def handle(self, message: ReceivedMessage, session: Session | None = None) -> Disposition | None:
        """Run the handler when one may run; return how to settle, or None when the right to settle is lost.

        While the breaker keeps handlers from running, the message is held: its deliveries do not grow.
        """
        messages = (message,)
        try:
            while (self.breaker is None and self.permits.take_one()) or await self._admitted():
                if self._lost and self._lost_of(messages):
                    self._withdraw()
                    return None
                context = MessageContext(self.client, message, self._lost, session) if self._needs_context else None
                error = await self._run(message, context, messages)
                if message.receipt in self._lost:
                    if context is not None:
                        context.lose()
                    return None
                verdict = self._judge(message, context, error)
                if verdict is not None:
                    return verdict
            return ABANDON
        except GeneratorExit:  # the event loop is gone: nothing can be awaited any more
            raise
        except BaseException:  # this very task is cancelled, or the process is to end
            await self.settle(message, ABANDON)
            raise

    async def handle_batch(
        self, messages: Sequence[ReceivedMessage], session: Session | None = None
    ) -> list[Disposition | None]:
        """Do the same with a batch; return for each message, in order."""
        verdicts: dict[Receipt, Disposition | None] = {}
        left = list(messages)
        try:
            while left and await self._admitted():
                lost = self._lost_of(left)
                verdicts.update(dict.fromkeys(lost))
                left = [message for message in left if message.receipt not in lost]
                if not left:
                    self._withdraw()
                    break
                contexts = [MessageContext(self.client, message, self._lost, session) for message in left]
                error = await self._run(left, BatchContext(contexts), left)
                held = []
                for message, context in zip(left, contexts, strict=True):
                    if message.receipt in self._lost:
                        context.lose()
                        verdicts[message.receipt] = None
                    elif (verdict := self._judge(message, context, error)) is not None:
                        verdicts[message.receipt] = verdict
                    else:
                        held.append(message)
                left = held
        except GeneratorExit:
            raise
        except BaseException:
            await self.settle_all([(message, ABANDON) for message in messages])
            raise
        return [verdicts.get(message.receipt, ABANDON) for message in messages]

    async def _admitted(self) -> bool:
        """Wait for the breaker and for a permit; say whether a handler may begin."""
        breaker = self.breaker
        while self.is_beginning and (self.permits.take_one() or await self.permits.take(1)):
            # Asked last: the breaker may have opened while this waited for its permit.
            if breaker is None or breaker.may_try():
                return True
            self.permits.give(1)
            await self._unless_draining(breaker.wait_until_allowed())
        return False

    def _withdraw(self) -> None:
        """Give back an admission that was not used."""
        self.permits.give(1)
        if self.breaker is not None:
            self.breaker.abstained()

    def _lost_of(self, messages: Sequence[ReceivedMessage]) -> set[Receipt]:
        """Which of them were lost while they waited."""
        return {message.receipt for message in messages} & self._lost

    async def _run(
        self,
        argument: ReceivedMessage | list[ReceivedMessage],
        context: HandlerContext | None,
        messages: Sequence[ReceivedMessage],
    ) -> Exception | None:
        """Run the handler, with the admission that was given; return what it raised."""
        task = asyncio.current_task()
        assert task is not None
        count = len(messages)
        run: _Run = task if count == 1 else _BatchRun(task, count)
        for message in messages:
            self._held[message.receipt] = run
        error: Exception | None = _STOPPED
        since = 0 if self.breaker is None else self.breaker.changes
        started = self._now()
        self._running += count
        self._calls += 1
        self._calls_began += started
        try:
            if context is None:
                await self._call.alone(argument)
            elif self.chain.handle is None:
                await self._call(argument, context)
            else:
                await self.chain.handle(context, partial(self._call_undecided, context))()
            error = None
        except Exception as raised:
            error = raised
            if not isinstance(raised, RejectMessage | RetryMessage):
                self._report(messages, raised)
        except asyncio.CancelledError as cancelled:
            if not (self._cancelling or self._all_lost(messages)):
                if task.cancelling():
                    raise
                error = CancelledError("what the handler awaited was cancelled")  # of something else than this task
                error.__cause__ = cancelled
                self._report(messages, error)
        finally:
            for message in messages:
                self._held[message.receipt] = None
            self._running -= count
            self._calls -= 1
            self._calls_began -= started
            self.counters.handler_seconds += self._now() - started
            self.permits.give(1)
            if self.breaker is not None:
                self._tell_breaker(self.breaker, error, since)
        if self._cancelling or (self._lost and self._all_lost(messages)):
            while task.cancelling():  # that was meant for the handler; the task goes on to settle
                task.uncancel()
        return error

    async def _call_undecided(self, context: HandlerContext) -> None:
        """Call the handler with what no middleware has decided."""
        messages = list(context.messages)
        if messages:
            await self._call(messages if self.is_batch else messages[0], context)

    def _all_lost(self, messages: Sequence[ReceivedMessage]) -> bool:
        return all(message.receipt in self._lost for message in messages)

    def _report(self, messages: Sequence[ReceivedMessage], error: Exception) -> None:
        self.counters.failed += 1
        first = messages[0]
        logger.warning(
            "handler failed, queue=%s message_id=%s attempt=%d%s",
            self.queue_name,
            first.message_id,
            first.delivery_count,
            f" and {len(messages) - 1} more" if len(messages) > 1 else "",
            exc_info=error,
        )
        for message in messages:
            self.tell(self.observer.handler_failed, message, error)

    def _tell_breaker(self, breaker: CircuitBreaker, error: Exception | None, since: int) -> None:
        if error is None or isinstance(error, RejectMessage):  # a bad message is no outage
            breaker.succeeded(since)
        elif error is _STOPPED or isinstance(error, RetryMessage):
            breaker.abstained(since)
        else:
            breaker.failed(error, since)

    def _judge(
        self, message: ReceivedMessage, context: MessageContext | None, error: Exception | None
    ) -> Disposition | None:
        """Say how to settle; None: not now, the breaker holds it."""
        if context is not None and context.decision is not None:
            return context.decision
        if error is None:
            return COMPLETE
        if error is _STOPPED:
            return ABANDON
        if isinstance(error, RejectMessage):
            return Disposition(Action.DEAD_LETTER, reason=error.reason, description=error.description)
        if isinstance(error, RetryMessage):
            return Disposition(Action.ABANDON, delay=error.delay)
        if self.breaker is not None and self.breaker.state is not BreakerState.CLOSED and self.is_beginning:
            return None
        try:
            decision = self._on_failure(message, error)
            if not isinstance(decision, Disposition):
                raise TypeError(f"the policy must return a Disposition, not {type(decision).__name__}")
            return decision
        except Exception:
            logger.exception("the failure policy failed, queue=%s message_id=%s", self.queue_name, message.message_id)
            return ABANDON

    # Settling.

    async def settle(self, message: ReceivedMessage, disposition: Disposition | None) -> QueueRuntimeError | None:
        """Settle, count, and let go; return the error, if it came to one."""
        error = None
        try:
            if disposition is not None:
                if disposition.delay and self.waits_here(disposition):
                    await self._rest(disposition.delay)
                    disposition = ABANDON
                if self.chain.settle is None:
                    error = await self._settle_one(message, disposition)
                else:
                    disposition, error = await self._settle_hooked(message, disposition)
                self._count(message, disposition, error)
        except asyncio.CancelledError:
            if disposition is not None:
                self._count(message, disposition, _given_up())
            raise
        finally:
            self.let_go((message,))
        return error

    def settle_later(
        self, message: ReceivedMessage, disposition: Disposition | None, then: Callable[[Outcome], None]
    ) -> None:
        """Do the same, together with others where that is cheaper, without waiting; call ``then`` at the end."""
        if disposition is None or self.chain.settle is not None or self.waits_here(disposition):
            self.spawn(self._settle_then(message, disposition, then))
            return

        def settled(outcome: Outcome) -> None:
            if self.settling.pop(future, None) is None:
                return  # given up before
            self._count(message, disposition, outcome)
            self.let_go((message,))
            then(outcome)

        future = self.client.settle_soon(message.receipt, disposition, settled)
        self.settling[future] = settled

    async def settle_all(self, verdicts: Sequence[tuple[ReceivedMessage, Disposition | None]]) -> bool:
        """Settle a batch, what is settled alike in one call; say whether all of it is settled."""
        alike: dict[Disposition | None, list[ReceivedMessage]] = {}
        for message, disposition in verdicts:
            alike.setdefault(disposition, []).append(message)
        outcomes: list[Outcome] = []
        for disposition, messages in alike.items():
            if disposition is None or self.chain.settle is not None or self.waits_here(disposition):
                outcomes += await asyncio.gather(*(self.settle(message, disposition) for message in messages))
                continue
            try:
                try:
                    results = await self.client.settle_many([message.receipt for message in messages], disposition)
                except Exception as bug:
                    results = [unexpected(bug, self.client.provider_name)] * len(messages)
                for message, outcome in zip(messages, results, strict=True):
                    self._count(message, disposition, outcome)
                outcomes += results
            finally:
                self.let_go(messages)
        return None not in alike and not any(outcomes)

    def waits_here(self, disposition: Disposition) -> bool:
        """Whether the provider cannot delay, so that the message waits here with its lock renewed."""
        return disposition.delay > 0 and not self._can_delay

    async def _rest(self, delay: float) -> None:
        self._resting += 1
        if not self.will_try:
            self.breaker_moved.set()
        try:
            await self._unless_draining(sleep(self.client.clock, delay))
        finally:
            self._resting -= 1

    async def _settle_then(
        self, message: ReceivedMessage, disposition: Disposition | None, then: Callable[[Outcome], None]
    ) -> None:
        outcome: Outcome = _given_up()  # if this is cancelled: a session waits to be told
        try:
            outcome = await self.settle(message, disposition)
        finally:
            then(outcome)

    async def _settle_one(self, message: ReceivedMessage, disposition: Disposition) -> Outcome:
        try:
            return await self.client.settle(message.receipt, disposition)
        except Exception as bug:
            return unexpected(bug, self.client.provider_name)

    async def _settle_hooked(self, message: ReceivedMessage, disposition: Disposition) -> tuple[Disposition, Outcome]:
        """Settle through the middleware; return what came of it, whatever the middleware says."""
        try:
            return await self.chain.settled(message, disposition, partial(self._settle_one, message))
        except Exception as bug:
            return disposition, unexpected(bug, self.client.provider_name)

    def _count(self, message: ReceivedMessage, disposition: Disposition, error: QueueRuntimeError | None) -> None:
        if error is not None:
            self.counters.settle_errors += 1
            self.client.renew_no_more(message.receipt)  # so that it comes back when its lock ends
            logger.warning("not settled, queue=%s message_id=%s: %s", self.queue_name, message.message_id, error)
        elif disposition.action is Action.COMPLETE:
            self.counters.completed += 1
        elif disposition.action is Action.DEAD_LETTER:
            self.counters.dead_lettered += 1
        elif disposition.action is Action.DEFER:
            self.counters.deferred += 1
        else:
            self.counters.abandoned += 1
        self.tell(self.observer.message_settled, message, disposition, error)

    # The end, and what happens meanwhile.

    def begin_no_more(self) -> None:
        """Let no further handler begin: what waits for its turn is abandoned."""
        self.is_beginning = False
        self.permits.close()
        for wait in self._waits:
            wait.cancel()

    def cancel_all(self) -> None:
        """Cancel the handlers that run: their messages are abandoned."""
        self._cancelling = True
        for run in list(self._held.values()):
            if run is not None:
                run.cancel()

    def give_up(self) -> None:
        """Wait no more for settlements that nobody else waits for: they have failed, as far as is known."""
        for settled in list(self.settling.values()):
            settled(_given_up())

    def locks_lost(self, receiver_id: int, receipts: Sequence[Receipt], error: QueueRuntimeError | None) -> None:
        """Cancel the handlers of messages whose locks are lost, and handle those that wait no more."""
        for receipt in receipts:
            if receipt in self._held:
                self.counters.locks_lost += 1
                self._lost.add(receipt)
                run = self._held[receipt]
                if run is not None:
                    run.cancel()

    def tell(self, report: Callable[..., None], *what: object) -> None:
        """Tell the observer; what it raises is logged."""
        try:
            report(*what)
        except Exception:
            logger.exception("the observer failed, queue=%s", self.queue_name)

    def close(self) -> None:
        """Let go of threads and processes. A thread that runs on in a handler is not waited for."""
        self._call.close()

    async def _unless_draining(self, wait: Coroutine[Any, Any, None]) -> None:
        """Wait, at the longest until the drain begins."""
        if not self.is_beginning:
            wait.close()
            return
        waiting = asyncio.ensure_future(wait)
        self._waits.add(waiting)
        try:
            await asyncio.wait([waiting])
        finally:
            self._waits.discard(waiting)
            waiting.cancel()

    def _changed(self, before: BreakerState, after: BreakerState) -> None:
        logger.warning("the breaker was %s, is %s, queue=%s", before.value, after.value, self.queue_name)
        self.breaker_moved.set()
