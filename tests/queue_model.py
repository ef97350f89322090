"""A queue and its consumer as a small discrete-event simulation: the world in which the rules of scaling are tried."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from queue_runtime.scaler import Scaler
from queue_runtime.scaling import Limits, Load

ARRIVES, FETCHED, ENDS = range(3)


class Seen(NamedTuple):
    time: float
    limits: Limits
    load: Load
    depth: int
    reason: str


class QueueModel:
    """Messages arrive, receives bring them after a round trip, handlers take the time that ``service`` says.

    Parameters
    ----------
    rate:
        From the time to the arrivals a second.
    service:
        From the handlers that run, this one included, to the seconds of one more.
    round_trip, batch:
        Of one receive: its seconds, and the messages that it brings at most.
    sessions:
        Every message belongs to one of so many sessions, which are handled one message after another; 0 for none.
    is_random:
        Whether arrivals are Poisson and handler times exponential, or as regular as can be.
    """

    def __init__(
        self,
        rate: Callable[[float], float],
        service: Callable[[int], float],
        *,
        round_trip: float = 0.0,
        batch: int = 10,
        sessions: int = 0,
        is_random: bool = False,
        seed: int = 0,
    ) -> None:
        self.now = 0.0
        self.handled = 0
        self.limits = Limits(1, 2)
        self._rate, self._service = rate, service
        self._round_trip, self._batch = round_trip, batch
        self._random = random.Random(seed)
        self._is_random = is_random
        self._order = itertools.count()
        self._events: list[tuple[float, int, int, object]] = []
        self._queue: deque[int] = deque()
        self._buffer: deque[int] = deque()
        self._session_count = sessions
        self._turns = itertools.count()
        self._open: dict[int, deque[int]] = {}
        self._locked: set[int] = set()
        self._ready: dict[int, int] = {}
        self._polls = self._on_the_way = 0
        self.running = 0
        self._handling = 0.0
        self._since = 0.0
        self._ended = 0
        self._ended_seconds = 0.0
        self._push(0.0, ARRIVES)

    @property
    def depth(self) -> int:
        return len(self._queue) + sum(self._ready.values())

    @property
    def held(self) -> int:
        return len(self._buffer) + self.running + self._on_the_way

    def run(self, scaler: Scaler, seconds: float, *, knows_depth: bool = True) -> list[Seen]:
        """Begin at the lowest limits; let the scaler look once an interval, for so many seconds."""
        self.limits = scaler.decide(self.now, Load(), scaler.lowest)
        return self.run_on(scaler, seconds, knows_depth=knows_depth)

    def run_on(self, scaler: Scaler, seconds: float, *, knows_depth: bool = True) -> list[Seen]:
        """Go on with the limits as they are."""
        history = []
        interval = float(scaler.config.interval)  # type: ignore[arg-type]
        end = self.now + seconds
        while self.now < end:
            load = self._advance(interval, knows_depth)
            self.limits = scaler.decide(self.now, load, self.limits)
            history.append(Seen(self.now, self.limits, load, self.depth, scaler.reason))
        return history

    def _advance(self, seconds: float, knows_depth: bool) -> Load:
        end = self.now + seconds
        self._handling = self._ended_seconds = 0.0
        self._ended = 0
        self._work()
        while self._events[0][0] <= end:
            due, _, kind, what = heapq.heappop(self._events)
            self._pass(due)
            if kind == ARRIVES:
                self._arrive()
            elif kind == FETCHED:
                self._polls -= 1
                self._on_the_way -= int(what)  # type: ignore[call-overload]
                for _ in range(int(what)):  # type: ignore[call-overload]
                    self._buffer.append(self._queue.popleft())
            else:
                self._end(what)
            self._work()
        self._pass(end)
        return Load(
            rate=self._ended / seconds,
            handler_seconds=self._ended_seconds / self._ended if self._ended else 0.0,
            busy=min(1.0, self._handling / seconds / self.limits.concurrency),
            in_flight=self.held,
            waiting=len(self._buffer),
            depth=self.depth if knows_depth else None,
            sessions=len(self._locked),
            runnable=len(self._locked) if self._session_count else None,
        )

    def _pass(self, now: float) -> None:
        self._handling += self.running * (now - self.now)
        self.now = now

    def _push(self, due: float, kind: int, what: object = None) -> None:
        heapq.heappush(self._events, (due, next(self._order), kind, what))

    def _arrive(self) -> None:
        rate = self._rate(self.now)
        if rate <= 0:
            self._push(self.now + 0.1, ARRIVES)
            return
        self._push(self.now + (self._random.expovariate(rate) if self._is_random else 1 / rate), ARRIVES)
        if self._session_count:
            session = next(self._turns) % self._session_count
            self._ready[session] = self._ready.get(session, 0) + 1
        else:
            self._queue.append(0)

    def _work(self) -> None:
        if self._session_count:
            self._accept()
            return
        while self._polls < self.limits.pollers and len(self._queue) > self._on_the_way:
            wanted = min(self._batch, len(self._queue) - self._on_the_way, self.limits.prefetch - self.held)
            if wanted < 1:
                break
            if self._round_trip:
                self._polls += 1
                self._on_the_way += wanted
                self._push(self.now + self._round_trip, FETCHED, wanted)
            else:
                self._buffer.extend(self._queue.popleft() for _ in range(wanted))
        while self._buffer and self.running < self.limits.concurrency:
            self._buffer.popleft()
            self._begin(None)

    def _accept(self) -> None:
        """Hold as many sessions with messages as may be held, and run one message of each."""
        for session in list(self._ready):
            if session not in self._locked and len(self._locked) < self.limits.sessions:
                self._locked.add(session)
        running = {session for session in self._locked if session in self._open}
        for session in list(self._locked - running):
            if self.running >= self.limits.concurrency:
                break
            if self._ready.get(session):
                self._ready[session] -= 1
                self._open[session] = deque()
                self._begin(session)
            else:
                self._ready.pop(session, None)
                self._locked.discard(session)

    def _begin(self, what: object) -> None:
        self.running += 1
        mean = self._service(self.running)
        seconds = self._random.expovariate(1 / mean) if self._is_random else mean
        self._push(self.now + seconds, ENDS, (seconds, what))

    def _end(self, what: object) -> None:
        seconds, session = what  # type: ignore[misc]
        self.running -= 1
        self.handled += 1
        self._ended += 1
        self._ended_seconds += seconds
        self._open.pop(session, None)
