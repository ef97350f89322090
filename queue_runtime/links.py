"""The receivers that a client has open, supervised: none of them can die or hang without being replaced [C37, C38].

A receive that does not come back long after its timeout, and a receiver that turns out to be closed while its client is
open, are given up. The next receive opens a new one. The old one is *retired*: what it delivered may still be settled
on it, if the service knows it still, and when nothing of it is held any more it is closed.

A provider that settles in this process has nothing to lose a connection to, and is called without any of this.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from queue_runtime.clock import Clock, Late, Timer, within
from queue_runtime.errors import (
    ClosedError,
    ConnectionFailedError,
    QueueRuntimeError,
    QueueTimeoutError,
    SessionLockLostError,
)
from queue_runtime.message import ReceivedMessage
from queue_runtime.providers.base import Provider, Receiver, SessionReceiver
from queue_runtime.renewal import LockRenewer
from queue_runtime.retry import Retrier
from queue_runtime.sending import Trouble
from queue_runtime.settlement import Lane, Settler

logger = logging.getLogger("queue_runtime.links")

T = TypeVar("T")

GRACE = 10.0
"""Seconds after its timeout that a call gets to come back: what a slow answer of a busy service may take."""
TRIES = 2
"""Receivers that one receive tries when they turn out to be closed."""


class _Home(NamedTuple):
    """What a receiver is of."""

    lanes: dict[str, Lane]
    queue_name: str


class _Retired(NamedTuple):
    """A lane on which nothing is received any more."""

    lane: Lane
    until: float
    """When the locks that nobody renews have run out, by the monotonic clock."""


class Links:
    """The open receivers of one client, each with its lane.

    Thread-safety: for the client's event loop.
    """

    def __init__(self, provider: Provider, settler: Settler, renewer: LockRenewer | None, retrier: Retrier) -> None:
        self._provider = provider
        self._settler = settler
        self._renewer = renewer
        self._retrier = retrier
        self._clock: Clock = retrier.clock
        self.is_supervised = not provider.capabilities.settles_in_process
        self.by_id: dict[int, Lane] = {}
        self.main: dict[str, Lane] = {}
        self.dead_letters: dict[str, Lane] = {}
        self._homes: dict[int, _Home] = {}
        self._opening: dict[tuple[str, bool], asyncio.Lock] = {}
        self._retired: dict[int, _Retired] = {}
        self._lost_sessions: dict[int, None] = {}
        self._sweep_timer: Timer | None = None
        self._ends: set[asyncio.Task[None]] = set()
        self.is_closed = False
        self.last_contact: float | None = None
        """When a receiver last answered, with messages or without; by the monotonic clock."""
        self.trouble: Trouble | None = None
        """Since then, or before."""

    # Opening.

    async def open(self, queue_name: str, lanes: dict[str, Lane], timeout: float = math.inf) -> Lane:
        """Return the lane of the queue, opened by the first who asks; try no longer than ``timeout`` seconds."""
        return await self._retrier.call(partial(self._try_to_open, queue_name, lanes), within=timeout)

    async def _try_to_open(self, queue_name: str, lanes: dict[str, Lane]) -> Lane:
        self._check_open()
        dead_letter = lanes is self.dead_letters
        key = (queue_name, dead_letter)
        async with self._opening.setdefault(key, asyncio.Lock()):
            if queue_name not in lanes:
                call = self._provider.open_receiver(queue_name, dead_letter=dead_letter)
                receiver = await self._in_time(GRACE, call, f"opening a receiver of queue {queue_name}")
                self.last_contact = self._clock.monotonic()
                lanes[queue_name] = await self._add(receiver)
                self._homes[receiver.id] = _Home(lanes, queue_name)
            return lanes[queue_name]

    async def accept(
        self, queue_name: str, session_id: str | None, timeout: float
    ) -> tuple[Lane, SessionReceiver] | None:
        """Take a session; see ``Provider``."""
        call = self._provider.accept_session(queue_name, session_id, timeout)
        receiver = await self._in_time(timeout + GRACE, call, f"accepting a session of queue {queue_name}")
        self.last_contact = self._clock.monotonic()
        if receiver is None:
            return None
        lane = await self._add(receiver)
        if self._renewer is not None:
            self._renewer.watch_session(receiver)
        return lane, receiver

    async def _add(self, receiver: Receiver) -> Lane:
        if self.is_closed:  # while the receiver was being opened
            await self._close(receiver)
            raise ClosedError("the client is closed")
        lane = self.by_id[receiver.id] = self._settler.open_lane(receiver)
        return lane

    # Receiving.

    async def receive_deferred(self, lane: Lane, sequence_numbers: Sequence[int]) -> list[ReceivedMessage]:
        call = lane.receiver.receive_deferred(sequence_numbers)
        messages = await self._in_time(GRACE, call, f"receiving deferred messages of {lane.receiver.queue_name}")
        if messages:
            self.watch(lane, messages)
        return messages

    def watch(self, lane: Lane, messages: list[ReceivedMessage]) -> None:
        self.last_contact = self._clock.monotonic()
        if self._renewer is not None:
            self._renewer.watch(lane.receiver, [message.receipt for message in messages])

    async def receive(self, lane: Lane, max_count: int, timeout: float) -> list[ReceivedMessage]:
        """Receive on this lane, or on the one that replaces it, and have the locks renewed.

        Raises SessionLockLostError where the lane is a session's and dead.
        """
        deadline = self._clock.monotonic() + timeout
        tries = 0
        while True:
            receiver = lane.receiver
            home = self._homes.get(receiver.id)
            tries += 1
            try:
                if receiver.id in self._lost_sessions:
                    raise ClosedError("its lock was lost")
                left = max(0.0, deadline - self._clock.monotonic())
                messages = await within(self._clock, left + GRACE, receiver.receive(max_count, left))
            except ClosedError as error:
                if self.is_closed or (home is None and receiver.id not in self.by_id):  # closed by its owner
                    raise
                self.retire(lane, f"a receiver of queue {receiver.queue_name} is closed and is replaced: {error}")
                if home is None:
                    raise _session_lost(receiver) from error
                if tries == TRIES:
                    raise ConnectionFailedError("the service closes its receivers") from error
                lane = await self.open(home.queue_name, home.lanes, max(0.0, deadline - self._clock.monotonic()))
            except ConnectionFailedError as error:
                if receiver.id in self._lost_sessions:
                    raise _session_lost(receiver) from error
                if home is not None:
                    self.retire(lane, f"the connection of a receiver of queue {receiver.queue_name} broke: {error}")
                else:
                    self._note(f"the connection of a session of queue {receiver.queue_name} broke: {error}")
                raise
            except Late as late:
                sentence = f"a receive from queue {receiver.queue_name} did not come back"
                self.retire(lane, f"{sentence}, and its receiver is replaced")
                raise (_session_lost(receiver) if home is None else QueueTimeoutError(sentence)) from late
            else:
                self.last_contact = self._clock.monotonic()
                if messages:
                    self.watch(lane, messages)
                return messages

    # Ending.

    def retire(self, lane: Lane, why: str) -> None:
        """Receive on this lane no more; it is closed when nothing that it delivered is held any more."""
        receiver_id = lane.receiver.id
        home = self._homes.pop(receiver_id, None)
        if home is None or self.is_closed:  # a session's, which its owner closes
            self._note(why)
            return
        if home.lanes.get(home.queue_name) is lane:
            del home.lanes[home.queue_name]
        self._note(why)
        self._retired[receiver_id] = _Retired(lane, self._clock.monotonic() + lane.receiver.lock_duration)
        self._sweep()

    def session_lost(self, receiver_id: int) -> None:
        """The lock of this session is lost: a receive that only finds its connection broken has to say so."""
        if receiver_id in self.by_id:
            self._lost_sessions[receiver_id] = None

    async def close_session(self, lane: Lane) -> None:
        """Settle what is under way, then release the session. Safe to call twice."""
        if lane.receiver.id in self.by_id:
            await self._end(lane)

    async def close(self) -> None:
        """Forget all; what is still being closed is not waited for longer than that takes."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for links in (self.by_id, self.main, self.dead_letters, self._retired, self._homes, self._lost_sessions):
            links.clear()
        for task in self._ends:
            task.cancel()
        await asyncio.gather(*self._ends, return_exceptions=True)

    async def close_provider(self) -> None:
        """Close the connection; one that does not end is left."""
        try:
            await self._in_time(GRACE, self._provider.close(), "closing the connection")
        except QueueTimeoutError as error:
            logger.warning("%s", error)

    def _sweep(self) -> None:
        """End the retired lanes that hold nothing, and look again when the locks of the others may have ended."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        now = self._clock.monotonic()
        for receiver_id, (lane, until) in list(self._retired.items()):
            if now >= until if self._renewer is None else not self._renewer.holds(receiver_id):
                del self._retired[receiver_id]
                task = asyncio.get_running_loop().create_task(self._end(lane))
                self._ends.add(task)
                task.add_done_callback(self._ended)
        if self._retired and not self.is_closed:
            pause = max(lane.receiver.lock_duration for lane, _ in self._retired.values())
            self._sweep_timer = self._clock.call_later(pause, self._sweep)

    async def _end(self, lane: Lane) -> None:
        self.by_id.pop(lane.receiver.id, None)
        self._lost_sessions.pop(lane.receiver.id, None)
        if self._renewer is not None:
            self._renewer.drop(lane.receiver.id)
        try:
            await self._settler.close_lane(lane)
        finally:
            await self._close(lane.receiver)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ends.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.info("a retired receiver was not closed well: %s", error)

    async def _close(self, receiver: Receiver) -> None:
        await self._in_time(GRACE, receiver.close(), f"closing a receiver of queue {receiver.queue_name}")

    async def _in_time(self, seconds: float, call: Coroutine[Any, Any, T], what: str) -> T:
        """Await a call to the provider; raise QueueTimeoutError when it does not come back."""
        if not self.is_supervised:
            return await call
        try:
            return await within(self._clock, seconds, call)
        except Late as late:
            self._note(f"{what} did not come back")
            raise QueueTimeoutError(f"{what} did not come back") from late
        except ConnectionFailedError as error:
            self._note(f"{what} failed: {error}")
            raise

    def _note(self, sentence: str) -> None:
        self.trouble = Trouble(self._clock.monotonic(), sentence)
        logger.warning("%s", sentence)

    def _check_open(self) -> None:
        if self.is_closed:
            raise ClosedError("the client is closed")


def _session_lost(receiver: Receiver) -> QueueRuntimeError:
    return SessionLockLostError(getattr(receiver, "session_id", "unknown"))
