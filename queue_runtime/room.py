"""Bounds: on the messages that a consumer holds, and on the handlers that it runs [C39]."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_MESSAGES = 10
"""So many messages are taken to fill a byte bound, until one was seen."""
PART = 0.5
"""The share of the free bytes that one receive may reckon with."""
SLOWLY = 0.1
"""The share of the way that the reckoned size goes down with each receive."""


@dataclass(slots=True, eq=False)
class _Taker:
    future: asyncio.Future[int]
    wanted: int
    share: float
    at_least: int


class Room:
    """Places that are taken before something is begun, and given back when it is over.

    Thread-safety: for one event loop's thread only.
    """

    __slots__ = ("_closed", "_free", "_kept", "_takers", "_watchers", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = capacity
        self._kept = 0
        self._takers: deque[_Taker] = deque()
        self._watchers: deque[asyncio.Future[None]] = deque()
        self._closed = False

    @property
    def free(self) -> int:
        """Places that nobody has taken; below 0 while more are taken than a smaller capacity allows."""
        return self._free

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for places."""
        return bool(self._takers or self._watchers)

    @property
    def taken(self) -> int:
        """Places that are taken, also by those that wait for messages to come."""
        return self.capacity - self._free

    async def take(self, wanted: int, *, share: float = 1.0, at_least: int = 1) -> int:
        """Wait for room; return how many places were taken, from 1 to ``wanted``, or 0 when it was closed.

        Parameters
        ----------
        wanted:
            The places that could be used.
        share:
            The largest part of the free places that may be taken, so that somebody who waits long for messages
            leaves room to others. With less than 1.0, the places that are kept for others are left too.
        at_least:
            Wait until so many are free, for a batch that is worth its cost, or all there are; ``hurry`` ends such a
            wait.
        """
        if self._closed:
            return 0
        if not self._takers and self._suffices(at_least, share):
            return self._grant(wanted, share)
        taker = _Taker(asyncio.get_running_loop().create_future(), wanted, share, at_least)
        self._takers.append(taker)
        try:
            return await taker.future
        except asyncio.CancelledError:
            if taker.future.done() and not taker.future.cancelled():
                self.give(taker.future.result())
            else:
                if taker in self._takers:  # else it was passed over already
                    self._takers.remove(taker)
                self._serve()
            raise

    def take_one(self) -> bool:
        """Take one place if one is free."""
        if self._free <= 0 or self._closed:
            return False
        self._free -= 1
        return True

    def take_now(self, wanted: int) -> int:
        """Take as many of ``wanted`` places as are free, possibly none: who waits now waits for more than that."""
        if self._free <= 0 or self._closed:
            return 0
        granted = min(wanted, self._free)
        self._free -= granted
        return granted

    async def until_changed(self) -> None:
        """Wait until places were given back and some are free, or until ``nudge``; take none."""
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.append(watcher)
        try:
            await watcher
        finally:
            if watcher in self._watchers:  # cancelled
                self._watchers.remove(watcher)

    def nudge(self) -> None:
        """Have those who watch look again: something else has changed."""
        self._serve()

    def close(self) -> None:
        """Let nobody take anything any more."""
        self._closed = True
        while self._takers:
            future = self._takers.popleft().future
            if not future.done():
                future.set_result(0)

    def give(self, count: int) -> None:
        """Give back ``count`` places."""
        self._free += count
        if self._takers or self._watchers:
            self._serve()

    def resize(self, capacity: int) -> None:
        """Have another capacity, 1 at least; what is taken beyond a smaller one stays taken until it is given back."""
        self._free += capacity - self.capacity
        self.capacity = capacity
        self._serve()

    def keep(self, count: int) -> None:
        """Keep so many free places, less than there are, from those who take but a share."""
        is_less = count < self._kept
        self._kept = count
        if is_less and self._takers:
            self._serve()

    def hurry(self) -> None:
        """Let takers that wait for a large batch have what there is: there is nothing else to do."""
        for taker in self._takers:
            taker.at_least = 1
        self._serve()

    def _suffices(self, at_least: int, share: float) -> bool:
        kept = self._kept if share < 1.0 else 0
        return self._free - kept >= max(1, min(at_least, self.capacity - kept))

    def _grant(self, wanted: int, share: float) -> int:
        granted = min(wanted, max(1, int(self._free * share)))
        if share < 1.0:
            granted = min(granted, self._free - self._kept)
        self._free -= granted
        return granted

    def _serve(self) -> None:
        # One after another: a taker that waits for a large batch holds up nobody who would take less.
        waiting: deque[_Taker] = deque()
        while self._takers and self._free > 0:
            taker = self._takers.popleft()
            if taker.future.done():
                continue
            if not self._suffices(taker.at_least, taker.share):
                waiting.append(taker)
            else:
                taker.future.set_result(self._grant(taker.wanted, taker.share))
        self._takers.extendleft(reversed(waiting))
        while self._watchers and self._free > 0:
            watcher = self._watchers.popleft()
            if not watcher.done():
                watcher.set_result(None)


class ByteBound:
    """The bound on the bytes of the messages that are held [C39].

    Nobody knows the size of a message before it is there, so what a receive may bring is reckoned from the largest
    recent one. What is held passes the limit by what the receives under way misjudged at most, and, where the limit is
    less than that, by one message for each of them.

    Parameters
    ----------
    limit:
        Bytes; None: no limit.

    Thread-safety: for one event loop's thread only.
    """

    __slots__ = ("_expected", "_takers", "_typical", "held", "limit")

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.held = 0
        self._expected = 0.0
        self._typical = 0.0 if limit is None else limit / FIRST_MESSAGES
        self._takers: deque[asyncio.Future[None]] = deque()

    async def reserve(self, wanted: int) -> tuple[int, float]:
        """Wait until there is room for a message; return how many of ``wanted`` fit, 1 at least, and their bytes."""
        # With nothing held, who waits for messages keeps nobody else from waiting for some.
        while self.limit is not None and self.held and self.held + self._expected + self._typical > self.limit:
            taker = asyncio.get_running_loop().create_future()
            self._takers.append(taker)
            try:
                await taker
            except asyncio.CancelledError:
                self._wake()  # in case that it was this one's turn
                raise
        if self.limit is None:
            return wanted, 0.0
        # A part of the room, as whoever waits long for messages must leave some to others.
        free = max(0.0, self.limit - self.held - self._expected)
        fitting = max(1, min(wanted, int(free * PART / self._typical)))
        reserved = fitting * self._typical
        self._expected += reserved
        return fitting, reserved

    def arrived(self, reserved: float, sizes: Sequence[int]) -> None:
        """Count what came for a reservation of so many bytes."""
        self.held += sum(sizes)
        self._expected = max(0.0, self._expected - reserved)
        if self.limit is not None:
            if sizes:
                # Up at once, down slowly: the next receive must not take a hundred times what it reckoned with.
                largest = max(sizes)
                self._typical = max(1.0, largest, self._typical + (largest - self._typical) * SLOWLY)
            self._wake()

    def give(self, size: int) -> None:
        """Give back what so many bytes took."""
        self.held -= size
        if self._takers:
            self._wake()

    def resize(self, limit: int | None) -> None:
        """Have another limit from now on."""
        if limit is not None and self.limit is None:
            self._typical = limit / FIRST_MESSAGES
        self.limit = limit
        self._wake()

    def _wake(self) -> None:
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_result(None)
