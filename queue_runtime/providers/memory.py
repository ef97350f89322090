"""The embedded provider: the engine's queues, and the asyncio side that waits for them.

The engine is told the time and never waits; here is who waits. A receiver that finds nothing stands in a line. What
changes a queue wakes the first of a line, and he, once he has looked, the next: one message wakes one waiter. While
somebody waits, one timer a queue stands at the engine's next event; otherwise there is none.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from queue_runtime._core import engine as core
from queue_runtime._core.engine import Engine
from queue_runtime._core.ledger import Link
from queue_runtime.bodies import Spill
from queue_runtime.clock import Clock, SystemClock, Timer
from queue_runtime.config import InMemoryConfig
from queue_runtime.errors import (
    ClosedError,
    ConfigurationError,
    ProviderError,
    QueueFullError,
    QueueNotFoundError,
    QueueRuntimeError,
)
from queue_runtime.message import Message, QueueName, Receipt, ReceivedMessage
from queue_runtime.providers.base import (
    COMPLETE,
    Action,
    Capabilities,
    Disposition,
    Outcome,
    Provider,
    QueueCounts,
    Receiver,
    SessionReceiver,
)

_running_loop = asyncio.get_running_loop
_ACTIONS = {
    Action.COMPLETE: core.COMPLETE,
    Action.ABANDON: core.ABANDON,
    Action.DEAD_LETTER: core.DEAD_LETTER,
    Action.DEFER: core.DEFER,
}
_SHARED_SETTINGS = (
    "capacity",
    "lock_duration",
    "session_lock_duration",
    "max_delivery_count",
    "dead_letter_on_expiration",
    "deduplication_window",
    "max_message_size",
)
_BODY_SETTINGS = ("body_file_threshold", "body_directory")
_SHORTEST_TIMER = 0.001
"""Seconds: what is due sooner is rounded up, so that a timer of millisecond steps (uvloop's) cannot spin."""
_EARLY = 1e-6
"""Seconds by which a timer may fire early, through rounding, and still find due what it was set for."""


class _Line:
    """Those who wait for one kind of thing, the longest waiting first."""

    __slots__ = ("link", "waiting", "woken")

    def __init__(self, link: Link | None = None) -> None:
        self.waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self.woken: set[asyncio.Future[None]] = set()
        self.link = link

    def wake(self) -> None:
        """Wake the first, unless somebody who was woken has not looked yet: he will wake the next."""
        if self.woken:
            return
        for future in self.waiting:
            if not future.done():
                del self.waiting[future]
                self.woken.add(future)
                future.set_result(None)
                return


class _Queue:
    """An engine, those who wait for it, and their timer."""

    def __init__(self, name: str, config: InMemoryConfig, clock: Clock) -> None:
        self.engine = Engine(name, **{setting: getattr(config, setting) for setting in _SHARED_SETTINGS})
        self.clock = clock
        self.clear()

    def clear(self) -> None:
        """Forget who waits: their event loop is closed."""
        self.plain, self.dead, self.sessions, self.senders = _Line(), _Line(), _Line(), _Line()
        self.holders: dict[int, _Line] = {}
        self.waiters: set[asyncio.Future[None]] = set()
        self.timer: Timer | None = None
        self.timer_end = math.inf

    async def wait(self, line: _Line, waits: set[asyncio.Future[None]], deadline: float, *, again: bool) -> None:
        """Wait in line until woken, or until the deadline by the monotonic clock; whoever waits again goes first.

        ``waits`` gets the future for as long as it is waited for: setting it ends the wait.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = None
        if deadline < math.inf:
            timer = self.clock.call_later(deadline - self.clock.monotonic(), lambda: _end(future))
        line.waiting[future] = None
        if again:
            line.waiting.move_to_end(future, last=False)
        if line.link is not None:
            line.link.waiting = True
            self.holders[line.link.receiver_id] = line
        waits.add(future)
        self.waiters.add(future)
        self.arm()
        try:
            await future
        except BaseException:
            self._leave(line, waits, future)
            self.look(line)  # a wake that was meant for this one goes on to the next
            raise
        finally:
            if timer is not None:
                timer.cancel()
        self._leave(line, waits, future)

    def _leave(self, line: _Line, waits: set[asyncio.Future[None]], future: asyncio.Future[None]) -> None:
        line.waiting.pop(future, None)
        line.woken.discard(future)
        waits.discard(future)
        self.waiters.discard(future)
        if line.link is not None and not line.waiting:
            self.holders.pop(line.link.receiver_id, None)
        if not self.waiters and self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def look(self, line: _Line | None = None) -> None:
        """After a change: wake whom it concerns. ``line`` is a session's, whose next waiter has to look as well."""
        engine = self.engine
        if self.plain.waiting and engine.has_plain:
            self.plain.wake()
        if self.dead.waiting and engine.has_dead:
            self.dead.wake()
        if self.sessions.waiting and engine.has_session:
            self.sessions.wake()
        if self.senders.waiting and engine.room:
            self.senders.wake()
        for receiver_id in engine.take_signals():
            holder = self.holders.get(receiver_id)
            if holder is not None:
                holder.wake()
        if line is not None and line.link is not None and line.waiting:
            if engine.is_ready(line.link):
                line.wake()
            else:
                line.link.waiting = True
        if self.waiters:
            self.arm()

    def arm(self) -> None:
        """See that a timer stands at the next event; one that stands earlier will look again then."""
        now = self.clock.monotonic()
        due = self.engine.next_due(now, self.clock.time())
        if self.timer is not None:
            if self.timer_end <= now + due:
                return
            self.timer.cancel()
            self.timer = None
        if due < math.inf:
            self.timer_end = now + due
            self.timer = self.clock.call_later(max(due, _SHORTEST_TIMER), self._timer_fired)

    def _timer_fired(self) -> None:
        self.timer = None
        if self.waiters:
            self.engine.tick(self.clock.monotonic() + _EARLY, self.clock.time() + _EARLY)
            self.look()


def _end(future: asyncio.Future[None]) -> None:
    if not (future.done() or future.get_loop().is_closed()):
        future.set_result(None)


class _Broker:
    """The queues that providers of one name share. It belongs to one running event loop at a time."""

    def __init__(self, config: InMemoryConfig, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.queues: dict[str, _Queue] = {}
        self.users = 0
        """Providers that are open."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.spill: Spill | None = None
        if config.body_file_threshold is not None:
            self.spill = Spill(config.body_file_threshold, config.body_directory)

    def create(self, queue_name: str) -> _Queue:
        name = str(QueueName(queue_name))
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = _Queue(name, self.config, self.clock)
        return queue

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.loop is not None and not self.loop.is_closed():
            raise ProviderError(
                "memory", "wrong-event-loop", "these queues are in use on another event loop; share them within one"
            )
        self.loop = loop
        for queue in self.queues.values():
            queue.clear()


_shared: weakref.WeakValueDictionary[str, _Broker] = weakref.WeakValueDictionary()


def _broker_for(config: InMemoryConfig, clock: Clock, make: type[_Broker]) -> _Broker:
    if not config.name:
        return make(config, clock)
    broker = _shared.get(config.name)
    if broker is None:
        broker = _shared[config.name] = make(config, clock)
        return broker
    for setting in (*_SHARED_SETTINGS, *_BODY_SETTINGS, "path", "fsync", "fsync_interval"):
        if getattr(config, setting) != getattr(broker.config, setting):
            raise ConfigurationError(
                setting, f"memory://{config.name} is in use with {getattr(broker.config, setting)!r}; give the same"
            )
    if clock is not broker.clock and not (isinstance(clock, SystemClock) and isinstance(broker.clock, SystemClock)):
        raise ConfigurationError("clock", f"memory://{config.name} is in use with another clock; give the same")
    return broker


class InMemoryProvider:
    """Queues in this process's memory.

    Parameters
    ----------
    config:
        Where it has a ``name``, all providers of that name share their queues for as long as one of them is open;
        they must agree in the settings of the queues.
    clock:
        The time; a ``ManualClock`` in tests.

    Raises ConfigurationError when the name is in use with other settings. A call from a second event loop, while
    the first one is not closed, raises ProviderError.

    Thread-safety: for one event loop's thread only; there, any number of tasks may use it at once.
    """

    _broker_type: type[_Broker] = _Broker
    _receiver_type: type[InMemoryReceiver]
    _session_receiver_type: type[InMemorySessionReceiver]

    def __init__(self, config: InMemoryConfig, *, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._broker = _broker_for(config, clock, self._broker_type)
        self._broker.users += 1
        self._receivers: set[InMemoryReceiver] = set()
        self._waits: set[asyncio.Future[None]] = set()
        self._closed = False
        self.capabilities = Capabilities(
            sessions=True,
            session_state=True,
            peek=True,
            defer=True,
            deduplication=True,
            abandon_delay=True,
            sequence_numbers=True,
            dead_letter_on_expiration=True,
            max_message_size=config.max_message_size,
            max_delay=None,
            settles_in_process=True,
            renews_from_threads=True,
        )
        for name in config.queues:
            self._broker.create(name)

    @property
    def name(self) -> str:
        return "memory"

    def _queue(self, queue_name: str) -> _Queue:
        broker = self._broker
        if self._closed:
            raise ClosedError("the provider is closed")
        loop = _running_loop()
        if loop is not broker.loop:
            broker.bind(loop)
        queue = broker.queues.get(queue_name)
        if queue is None:
            if not self._config.auto_create:
                raise QueueNotFoundError(QueueName(queue_name))
            queue = broker.create(queue_name)
        return queue

    async def send(self, queue_name: str, messages: Sequence[Message]) -> list[Outcome]:
        """See ``Provider``. When the queue is full, the rest waits for room or gets QueueFullError each."""
        queue = self._queue(queue_name)
        engine = queue.engine
        clock = self._clock
        engine.check(messages)
        spill = self._broker.spill
        if spill is not None and spill.concerns(messages):
            messages = await spill.moved(messages)
            queue = self._queue(queue_name)  # raises when the provider was closed meanwhile
        taken = 0
        if not (queue.senders.waiting or queue.senders.woken):  # nobody passes those who wait for room
            taken = engine.send(messages, 0, clock.monotonic(), clock.time())
            if queue.waiters:
                queue.look()
        if taken == len(messages):
            return [None] * taken
        if self._config.on_full == "wait":
            return await self._send_waiting(queue, tuple(messages), taken)
        refused: list[Outcome] = [QueueFullError(f"queue {engine.name!r}", engine.capacity) for _ in messages[taken:]]
        return [None] * taken + refused

    async def _send_waiting(self, queue: _Queue, messages: tuple[Message, ...], taken: int) -> list[Outcome]:
        again = False
        while taken < len(messages):
            await queue.wait(queue.senders, self._waits, math.inf, again=again)
            if self._closed:
                queue.look()
                return [None if i < taken else ClosedError("the provider is closed") for i in range(len(messages))]
            taken = queue.engine.send(messages, taken, self._clock.monotonic(), self._clock.time())
            queue.look()
            again = True
        return [None] * taken

    async def open_receiver(self, queue_name: str, *, dead_letter: bool = False) -> Receiver:
        queue = self._queue(queue_name)
        link = queue.engine.open_link(dead_letter)
        line = queue.dead if dead_letter else queue.plain
        return self._receiver_type(self, self._receivers, queue, link, line)

    async def accept_session(self, queue_name: str, session_id: str | None, timeout: float) -> SessionReceiver | None:
        queue = self._queue(queue_name)
        clock = self._clock
        deadline = clock.monotonic() + timeout
        again = False
        while True:
            now = clock.monotonic()
            link = queue.engine.accept(None if session_id is None else str(session_id), now, clock.time())
            if queue.waiters:
                queue.look()
            if link is not None:
                return self._session_receiver_type(self, self._receivers, queue, link, _Line(link))
            if deadline - now <= _EARLY:
                return None
            await queue.wait(queue.sessions, self._waits, deadline, again=again)
            if self._closed:
                queue.look()
                raise ClosedError("the provider is closed")
            again = True

    async def peek(
        self, queue_name: str, max_count: int, *, from_sequence_number: int = 0, dead_letter: bool = False
    ) -> list[ReceivedMessage]:
        queue = self._queue(queue_name)
        clock = self._clock
        messages = queue.engine.peek(max_count, from_sequence_number, dead_letter, clock.monotonic(), clock.time())
        if queue.waiters:
            queue.look()
        return messages

    async def counts(self, queue_name: str) -> QueueCounts:
        queue = self._queue(queue_name)
        active, in_flight, scheduled, deferred, dead = queue.engine.counts(self._clock.monotonic(), self._clock.time())
        if queue.waiters:
            queue.look()
        return QueueCounts(
            active=active, in_flight=in_flight, scheduled=scheduled, deferred=deferred, dead_lettered=dead
        )

    async def create_queue(self, queue_name: str) -> None:
        if self._closed:
            raise ClosedError("the provider is closed")
        self._broker.create(queue_name)

    async def close(self) -> None:
        """Release all that the provider's receivers hold, and end what waits. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._broker.users -= 1
            if not self._broker.users:
                if self._broker.spill is not None:
                    self._broker.spill.close()
                _shared.pop(self._config.name, None)
        for receiver in list(self._receivers):
            await receiver.close()
        for future in self._waits:
            _end(future)


class InMemoryReceiver:
    """A link to a queue's messages without a session, or to its dead letters.

    Thread-safety: for one event loop's thread only; there, any number of tasks may use it at once. Another thread may
    renew, by ``renew_from_thread``.
    """

    __slots__ = ("_broker", "_engine", "_line", "_link", "_now", "_peers", "_queue", "_waits", "_wall", "id")

    def __init__(
        self, provider: InMemoryProvider, peers: set[InMemoryReceiver], queue: _Queue, link: Link, line: _Line
    ) -> None:
        self._broker = provider._broker
        self._now = queue.clock.monotonic
        self._wall = queue.clock.time
        self._queue = queue
        self._engine = queue.engine
        self._link = link
        self._line = line
        self._peers = peers
        self._waits: set[asyncio.Future[None]] = set()
        self.id = link.receiver_id
        peers.add(self)

    @property
    def queue_name(self) -> str:
        return self._engine.name

    @property
    def lock_duration(self) -> float:
        return self._engine.lock_duration

    def _bind(self) -> None:
        loop = _running_loop()
        if loop is not self._broker.loop:
            self._broker.bind(loop)

    def _changed(self) -> None:
        if self._queue.waiters:
            self._queue.look(self._line)

    async def receive(self, max_count: int, timeout: float) -> list[ReceivedMessage]:
        if _running_loop() is not self._broker.loop:
            self._bind()
        messages = self._engine.receive(self._link, max_count, self._now(), self._wall())
        if self._queue.waiters:
            self._queue.look(self._line)
        if messages or timeout <= 0:
            return messages
        deadline = self._now() + timeout
        again = False
        while not messages and deadline - self._now() > _EARLY:
            await self._queue.wait(self._line, self._waits, deadline, again=again)
            again = True
            try:
                messages = self._engine.receive(self._link, max_count, self._now(), self._wall())
            finally:
                self._changed()
        return messages

    async def receive_deferred(self, sequence_numbers: Sequence[int]) -> list[ReceivedMessage]:
        self._bind()
        now, wall = self._now(), self._wall()
        messages = self._engine.receive_deferred(self._link, sequence_numbers, now, wall)
        self._changed()
        return messages

    async def settle(self, disposition: Disposition, receipts: Sequence[Receipt]) -> list[Outcome]:
        if _running_loop() is not self._broker.loop:
            self._bind()
        if disposition is COMPLETE:
            outcomes = self._engine.settle(self._link, core.COMPLETE, receipts, self._now(), self._wall())
        else:
            outcomes = self._engine.settle(
                self._link,
                _ACTIONS[disposition.action],
                receipts,
                self._now(),
                self._wall(),
                disposition.delay,
                disposition.reason,
                disposition.description,
            )
        if self._queue.waiters:
            self._queue.look(self._line)
        return outcomes

    async def renew(self, receipts: Sequence[Receipt]) -> list[float | QueueRuntimeError]:
        self._bind()
        ends = self._engine.renew(self._link, receipts, self._now(), self._wall())
        self._changed()
        return ends

    def renew_from_thread(self, receipts: Sequence[Receipt]) -> list[float | QueueRuntimeError]:
        return self._engine.renew_from_thread(self._link, receipts, self._now(), self._wall())

    async def close(self) -> None:
        self._peers.discard(self)
        self._engine.close_link(self._link, self._now(), self._wall())
        for future in self._waits:
            _end(future)
        self._changed()


class InMemorySessionReceiver(InMemoryReceiver):
    """A link to one session, which it holds.

    Thread-safety: for one event loop's thread only; there, any number of tasks may use it at once.
    """

    __slots__ = ()

    @property
    def session_id(self) -> str:
        assert self._link.session_id is not None
        return self._link.session_id

    @property
    def session_lock_duration(self) -> float:
        return self._engine.session_lock_duration

    @property
    def locked_until(self) -> float:
        return self._link.locked_until

    async def renew_session(self) -> float:
        self._bind()
        return self._engine.renew_session(self._link, self._now(), self._wall())

    def renew_session_from_thread(self) -> float:
        return self._engine.renew_session_from_thread(self._link, self._now(), self._wall())

    async def get_state(self) -> bytes | None:
        self._bind()
        return self._engine.get_state(self._link, self._now(), self._wall())

    async def set_state(self, state: bytes | None) -> None:
        self._bind()
        self._engine.set_state(self._link, state, self._now(), self._wall())


InMemoryProvider._receiver_type = InMemoryReceiver
InMemoryProvider._session_receiver_type = InMemorySessionReceiver


if TYPE_CHECKING:

    def _fits(provider: InMemoryProvider) -> Provider:
        return provider
