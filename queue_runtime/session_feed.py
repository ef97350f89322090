"""Messages of sessions, on their way to the handler: in order, for hundreds of sessions side by side [C24–C28].

A session that is held has a task, which handles its messages one after another, or in batches. Who has had his turn
lets go if others wait; who has nothing to do stays a while if nobody waits, so that the next messages find him there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from functools import partial
from typing import Any, cast

from queue_runtime.errors import QueueRuntimeError, SessionLockLostError
from queue_runtime.feeds import cancelled
from queue_runtime.handling import ConsumerConfig
from queue_runtime.intake import NO_ANSWER, Intake, LeftOutError
from queue_runtime.message import ReceivedMessage
from queue_runtime.providers.base import COMPLETE, Action, Disposition, Outcome
from queue_runtime.room import Room
from queue_runtime.sessions import Session

logger = logging.getLogger("queue_runtime.consumer")

ACCEPTORS = 4
"""Tasks that wait for sessions, so that one slow answer does not hold up the next session."""
SHORT_DELAY = 1.0
"""Seconds of delay for which a session keeps its place in any case; for longer, unless others want it."""
MOST_REMEMBERED = 10_000
"""Failing sessions that are remembered."""
COMES_BACK = 1.0
"""Seconds within which a provider over a network hands an abandoned message out again."""


class SessionFeed:
    """Accepts sessions and serves them."""

    def __init__(self, intake: Intake, config: ConsumerConfig) -> None:
        self.intake = intake
        self.runner = intake.runner
        self.turn = config.session_turn
        self.idle = float(config.session_idle)  # type: ignore[arg-type]  # seconds since its creation
        self.batch = config.session_batch
        self.settles_together = config.session_settlement == "together" and not intake.runner.client.settles_at_once
        self.places = Room(config.max_sessions)
        self.failing: OrderedDict[str, None] = OrderedDict()
        """Sessions whose last message failed: they are fetched one by one, or each failure would use up a delivery
        of the followers."""
        self.fetching: set[asyncio.Task[Any]] = set()
        self._timeout = float(config.receive_timeout)  # type: ignore[arg-type]  # seconds since its creation
        self._accepting = 0
        self._room_taken = 0
        self._acceptors: list[asyncio.Task[None]] = []
        self._idlers: OrderedDict[asyncio.Future[Any], None] = OrderedDict()

    def start(self) -> None:
        self.take_room(0)
        self._acceptors = [self.runner.spawn(self._accept()) for _ in range(min(ACCEPTORS, self.places.capacity))]

    def accept_anew(self) -> None:
        """Give up what waits for sessions, and begin to wait again."""
        if self.runner.is_beginning:
            for acceptor in self._acceptors:
                acceptor.cancel()
            self.start()

    async def stop(self) -> None:
        await cancelled([*self._acceptors, *self.fetching])

    @property
    def is_wanted(self) -> bool:
        """Whether others wait for what a session takes."""
        return self.places.is_wanted or self.runner.room.is_wanted

    def take_room(self, count: int) -> None:
        """Reckon with so many more places, or fewer, that sessions have taken; and have the other messages leave what
        is missing to those of one session."""
        self._room_taken += count
        self.runner.room.keep(max(0, self.batch_size() - self._room_taken))

    def batch_size(self) -> int:
        """Messages that a session may hold: the room is to be enough for a quarter more sessions than handlers, so
        that another one is there when a handler is free."""
        handlers = self.runner.permits.capacity
        return max(1, min(self.batch, self.runner.room.capacity // (handlers + max(1, handlers // 4))))

    async def wait_idly(self, session: Session, timeout: float, *, is_awaited: bool) -> list[ReceivedMessage]:
        """Wait for a message of a session that has none now, until the time is over or its place is wanted."""
        if not timeout or self.is_wanted:
            return []
        receive = partial(session.receive_messages, timeout=timeout)
        fetch = self.intake.fetch(1, receive, timeout=timeout, of_session=True, is_awaited=is_awaited)
        waiting = asyncio.ensure_future(fetch)
        self._idlers[waiting] = None
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:  # nobody will handle what came all the same; closing the session releases it
            waiting.cancel()
            await asyncio.wait([waiting])
            if not waiting.cancelled() and waiting.exception() is None:
                self.runner.let_go(waiting.result())
            raise
        finally:
            self._idlers.pop(waiting, None)
        return [] if waiting.cancelled() else waiting.result()

    def remember(self, session_id: str, *, is_failing: bool) -> None:
        if is_failing:
            self.failing[session_id] = None
            if len(self.failing) > MOST_REMEMBERED:
                self.failing.popitem(last=False)
        else:
            self.failing.pop(session_id, None)

    async def _accept(self) -> None:
        intake, runner = self.intake, self.runner
        accept = partial(runner.client.accept_session, runner.queue_name, timeout=self._timeout)
        while True:
            await intake.allowed()
            if not self.places.take_one():
                self._end_idling()
                await self.places.take(1)
            session: Session | None = None
            try:
                await self._room_for_a_batch()
                self._accepting += 1
                try:
                    session = await intake.persistently(accept, timeout=self._timeout)
                finally:
                    self._accepting -= 1
                    runner.room.nudge()  # another acceptor may need less now
            finally:
                if session is None:
                    self.places.give(1)
            if session is not None:
                room = runner.room.take_now(self.batch_size())
                self.take_room(room)
                runner.spawn(_Holding(self, session, room).run())

    async def _room_for_a_batch(self) -> None:
        """Take no session that would wait for room while others could serve it."""
        room = self.runner.room
        while room.free < min(self.batch_size() * (self._accepting + 1), room.capacity):
            if self._idlers:
                self._end_idling()
                await asyncio.sleep(0)
            else:
                await room.until_changed()

    def _end_idling(self) -> None:
        """Let the session go that has been idle for longest."""
        if self._idlers:
            waiting, _ = self._idlers.popitem(last=False)
            waiting.cancel()


class _Holding:
    """One session while it is held."""

    def __init__(self, feed: SessionFeed, session: Session, room: int) -> None:
        self._feed = feed
        self._runner = feed.runner
        self._session = session
        self._room = room
        """The messages that it may hold; taken before they are received, and given back at the end."""
        self._buffer: deque[ReceivedMessage] = deque()
        self._next: ReceivedMessage | None = None
        """In a handler, or waiting for one."""
        self._settling = 0
        self._settled = asyncio.Event()
        self._is_broken = False
        """Whether a message could not be settled: it comes back, and nothing may be handled before it."""

    async def run(self) -> None:
        """Serve the session for as long as it is its turn, then let it go."""
        runner, session = self._runner, self._session
        counters = runner.counters
        counters.sessions += 1
        counters.sessions_open += 1
        runner.tell(runner.observer.session_opened, session.session_id)
        runner.prepaid.add(session.receiver_id)
        try:
            await self._serve()
        except (SessionLockLostError, LeftOutError, *NO_ANSWER) as error:
            logger.warning("session let go, queue=%s session_id=%s: %s", runner.queue_name, session.session_id, error)
        finally:
            try:
                with contextlib.suppress(QueueRuntimeError):
                    await session.close()
                await self._all_settled()
            finally:
                runner.let_go(self._buffer)  # closing the session released them
                runner.prepaid.discard(session.receiver_id)
                self._feed.intake.left_out.discard(session.receiver_id)
                self._feed.take_room(-self._room)
                runner.room.give(self._room)
                counters.sessions_open -= 1
                self._feed.places.give(1)
                runner.tell(runner.observer.session_closed, session.session_id)

    async def _serve(self) -> None:
        feed, runner, buffer = self._feed, self._runner, self._buffer
        if not self._room and runner.is_beginning:  # others were quicker
            with self._cancellable():
                self._room = await runner.room.take(feed.batch_size(), at_least=feed.batch_size())
            feed.take_room(self._room)
        left = feed.turn
        while runner.is_beginning and not self._is_broken:
            if not buffer:
                if self._is_left_out:
                    return
                if left <= 0:
                    if feed.is_wanted:
                        return
                    left = feed.turn
                if self._settling >= self._room:
                    await self._all_settled()
                messages = await self._fetch(min(self._batch_size(), left)) or await self._wait_idly(feed.idle)
                if not messages:
                    return
                left -= len(messages)
                buffer.extend(messages)
                if self._is_broken:  # that came out while these were fetched
                    return
            goes_on = await (self._handle_batch() if runner.is_batch else self._handle_one())
            if not goes_on:
                return

    @property
    def _is_left_out(self) -> bool:
        return self._session.receiver_id in self._feed.intake.left_out

    def _batch_size(self) -> int:
        return 1 if self._session.session_id in self._feed.failing else max(1, self._room - self._settling)

    async def _handle_one(self) -> bool:
        """Handle the next message; say whether the session can go on."""
        runner = self._runner
        message = self._next = self._buffer.popleft()
        disposition = await runner.handle(message, self._session)
        if disposition is COMPLETE and self._feed.settles_together:
            # The next one begins meanwhile: this one was handled before it, even if it comes back for another time.
            self._settling += 1
            runner.settle_later(message, disposition, self._one_settled)
            self._feed.remember(self._session.session_id, is_failing=False)
            return True
        await self._all_settled()
        error = await runner.settle(message, disposition)
        if disposition is None or error is not None:
            return False
        return await self._after(disposition)

    async def _handle_batch(self) -> bool:
        runner = self._runner
        messages = list(self._buffer)
        self._buffer.clear()
        dispositions = await runner.handle_batch(messages, self._session)
        if not await runner.settle_all(list(zip(messages, dispositions, strict=True))):
            return False
        is_failing = any(disposition.action is Action.ABANDON for disposition in dispositions if disposition)
        self._feed.remember(self._session.session_id, is_failing=is_failing)
        return True

    async def _after(self, disposition: Disposition) -> bool:
        """Say whether the session can go on after a message was settled so."""
        is_failing = disposition.action is Action.ABANDON
        if is_failing or self._feed.failing:
            self._feed.remember(self._session.session_id, is_failing=is_failing)
        if not is_failing:
            return True
        if not self._buffer or not self._runner.is_beginning:
            return True
        # Its followers are here already and wait for it; released, they would use up deliveries.
        is_local = self._runner.client.settles_at_once
        patience = 0.0 if is_local and not disposition.delay else disposition.delay + COMES_BACK
        is_long = disposition.delay > SHORT_DELAY
        # Whatever the bounds and the breaker say: those that are held wait for it.
        again = await (self._wait_idly(patience, is_awaited=True) if is_long else self._fetch_again(patience))
        if self._is_left_out or (not again and (is_long or not is_local)):
            return False  # it may be a dead letter, or late: whatever comes next must be asked for
        ordered = sorted([*again, *self._buffer], key=lambda held: held.sequence_number or 0)
        self._buffer.clear()
        self._buffer.extend(ordered)
        return True

    async def _fetch(self, wanted: int, timeout: float = 0.0) -> list[ReceivedMessage]:
        intake = self._feed.intake
        receive = partial(self._session.receive_messages, timeout=timeout)
        with self._cancellable():
            count = min(wanted, await intake.allowed())
            return await intake.fetch(count, receive, timeout=timeout, of_session=True)

    async def _fetch_again(self, timeout: float) -> list[ReceivedMessage]:
        receive = partial(self._session.receive_messages, timeout=timeout)
        with self._cancellable():
            return await self._feed.intake.fetch(1, receive, timeout=timeout, of_session=True, is_awaited=True)

    async def _wait_idly(self, timeout: float, *, is_awaited: bool = False) -> list[ReceivedMessage]:
        with self._cancellable():
            return await self._feed.wait_idly(self._session, timeout, is_awaited=is_awaited)

    @contextlib.contextmanager
    def _cancellable(self) -> Any:
        """While it fetches, the drain cancels it."""
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._feed.fetching.add(task)
        try:
            yield
        finally:
            self._feed.fetching.discard(task)

    def _one_settled(self, outcome: Outcome) -> None:
        self._settling -= 1
        if outcome is not None:
            self._is_broken = True
            if self._next is not None:
                self._runner.pass_over(self._next)
        if not self._settling:
            self._settled.set()

    async def _all_settled(self) -> None:
        while self._settling:
            self._settled.clear()
            await self._settled.wait()
