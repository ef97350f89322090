"""Notices that a consumer does not get on although it should, says what is stuck, and has its fetch begun anew.

Three things can stand still: handlers that never end, messages that wait while nothing runs, and a fetch that does not
come back. What moves is told from counters, looked at a few times in ``stall_after``; nothing is done for a message.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from queue_runtime.clock import Clock, Timer

logger = logging.getLogger("queue_runtime.consumer")

LOOKS = 4
"""Looks in ``stall_after`` seconds: a stall is told by a fourth of it late at most."""
TOLD = 3
"""Messages that are named, the oldest first."""


class Progress(NamedTuple):
    """Where a consumer is, in what costs nothing to tell."""

    received: int
    """Messages so far."""
    handled: int
    """Handlers that have ended so far."""
    waiting: int
    """Messages that are held and could begin: not those that wait for an earlier one of their session."""
    running: int
    """Handlers that run."""
    free: int
    """Handlers that could begin beside them."""
    fetch_due: float | None
    """When the oldest fetch under way has to be back, by the monotonic clock; None when there is none."""
    is_paused: bool = False
    """Whether nothing is to be begun or fetched: by a breaker, in a drain, or until the next try after an error."""


class Held(NamedTuple):
    """A message that a consumer holds."""

    message_id: str
    seconds: float
    """Since it was received."""
    handler: str | None
    """The handler that it is in; None when it waits."""


class Moving(Protocol):
    """What the watch needs of a consumer."""

    @property
    def queue_name(self) -> str: ...
    @property
    def clock(self) -> Clock: ...
    def progress(self) -> Progress: ...
    def oldest(self, count: int) -> Sequence[Held]:
        """Return so many of the messages held, oldest first. Asked for only when something is stuck."""
        ...

    def fetch_anew(self) -> None:
        """Give up the fetches under way and begin others."""
        ...


class Stall(enum.Enum):
    """What stands still."""

    HANDLERS = "no handler ends"
    BEGINNING = "messages wait, handlers are free and nothing begins"
    FETCH = "a fetch does not come back"


def stalls_of(progress: Progress, now: float, still_for: float, stall_after: float) -> set[Stall]:
    """Return what stands still.

    Parameters
    ----------
    progress, now:
        Where the consumer is, and the monotonic time.
    still_for:
        Seconds for which neither ``received`` nor ``handled`` has changed.
    stall_after:
        Seconds after which that is a stall.
    """
    found = set()
    if still_for >= stall_after:
        if progress.running:
            found.add(Stall.HANDLERS)
        elif progress.waiting and progress.free and not progress.is_paused:
            found.add(Stall.BEGINNING)
    if progress.fetch_due is not None and now >= progress.fetch_due + stall_after:
        found.add(Stall.FETCH)
    return found


class ProgressWatch:
    """Looks after one consumer, with one timer.

    Parameters
    ----------
    consumer:
        Whose progress to look at.
    stall_after:
        Seconds without progress, where there should be some, that are a stall; infinite looks at nothing. A handler
        may well take longer than others: set it above the longest that is right.

    A stall is logged once, with the oldest messages and their handlers, and again when it is over. Thread-safety: for
    the client's event loop.
    """

    def __init__(self, consumer: Moving, stall_after: float) -> None:
        self._consumer = consumer
        self._clock = consumer.clock
        self._stall_after = stall_after
        self._pause = stall_after / LOOKS
        self._timer: Timer | None = None
        self._due = 0.0
        """The time of the next look."""
        self._seen = (0, 0)
        self._moved_at = 0.0
        self._stalls: dict[Stall, float] = {}
        """Since when, by the monotonic clock."""
        self._sentences: dict[Stall, str] = {}

    def start(self) -> None:
        """Look from now on."""
        self._moved_at = self._clock.monotonic()
        if self._stall_after < math.inf:
            self._arm(self._moved_at)

    def stop(self) -> None:
        """Look no more. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What stands still now, in plain sentences."""
        return tuple(self._sentences.values())

    @property
    def seconds_still(self) -> float:
        """Seconds since anything was received or a handler ended, as far as the looks tell."""
        return self._clock.monotonic() - self._moved_at

    def _arm(self, now: float) -> None:
        self._due = now + self._pause
        self._timer = self._clock.call_later(self._pause, self._look)

    def _look(self) -> None:
        now = self._clock.monotonic()
        is_late = now > self._due + self._pause
        self._arm(now)
        if is_late:  # the loop did not turn, or the whole process was stopped: nothing could move
            self._moved_at = now
            return
        try:
            progress = self._consumer.progress()
            if (progress.received, progress.handled) != self._seen or not (progress.running or progress.waiting):
                self._seen = (progress.received, progress.handled)
                self._moved_at = now
            found = stalls_of(progress, now, now - self._moved_at, self._stall_after)
            for stall in found - self._stalls.keys():
                self._begin(stall, progress, now)
            for stall in self._stalls.keys() - found:
                lasted = now - self._stalls.pop(stall)
                del self._sentences[stall]
                logger.warning("it goes on, queue=%s, after %.1f s in which %s", self._queue, lasted, stall.value)
            if Stall.FETCH in found:
                self._consumer.fetch_anew()
        except Exception:
            logger.exception("the watch over the progress failed, queue=%s", self._queue)

    @property
    def _queue(self) -> str:
        return self._consumer.queue_name

    def _begin(self, stall: Stall, progress: Progress, now: float) -> None:
        if stall is Stall.FETCH:
            assert progress.fetch_due is not None
            since = progress.fetch_due
            sentence = f"a fetch from queue {self._queue} has been due for {now - since:.0f} s and is begun anew"
        else:
            since = self._moved_at
            seconds = f"{now - since:.0f} s"
            if stall is Stall.HANDLERS:
                sentence = f"no handler of queue {self._queue} has ended for {seconds}, and {progress.running} run"
            else:
                sentence = (
                    f"nothing has begun for {seconds} on queue {self._queue}, although {progress.waiting} messages wait"
                    f" and {progress.free} handlers are free"
                )
            held = self._consumer.oldest(TOLD)
            if held:
                sentence += f"; the oldest: {', '.join(map(_told, held))}"
        self._stalls[stall] = since
        self._sentences[stall] = sentence
        logger.error("stalled: %s", sentence)


def _told(held: Held) -> str:
    where = "waiting" if held.handler is None else f"in {held.handler}"
    return f"{held.message_id} {where}, received {held.seconds:.0f} s ago"
