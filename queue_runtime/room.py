"""Bounds: on the messages that a consumer holds, and on the handlers that it runs [C39]."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass


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

    __slots__ = ("_closed", "_free", "_takers", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = capacity
        self._takers: deque[_Taker] = deque()
        self._closed = False

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
            leaves room to others.
        at_least:
            Wait until so many are free, for a batch that is worth its cost; ``hurry`` ends such a wait.
        """
        if self._closed:
            return 0
        if not self._takers and self._free >= at_least:
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
        """Take one place if that needs no waiting."""
        if self._takers or not self._free or self._closed:
            return False
        self._free -= 1
        return True

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
        if self._takers:
            self._serve()

    def hurry(self) -> None:
        """Let takers that wait for a large batch have what there is: there is nothing else to do."""
        for taker in self._takers:
            taker.at_least = 1
        self._serve()

    def _grant(self, wanted: int, share: float) -> int:
        granted = min(wanted, max(1, int(self._free * share)))
        self._free -= granted
        return granted

    def _serve(self) -> None:
        # One after another: a taker that waits for a large batch holds up nobody who would take less.
        waiting: deque[_Taker] = deque()
        while self._takers and self._free:
            taker = self._takers.popleft()
            if taker.future.done():
                continue
            if self._free < taker.at_least:
                waiting.append(taker)
            else:
                taker.future.set_result(self._grant(taker.wanted, taker.share))
        self._takers.extendleft(reversed(waiting))
