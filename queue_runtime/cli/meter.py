"""Measures a run, in bounded memory however long it takes; what several processes measured adds up."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from queue_runtime.errors import QueueRuntimeError
from queue_runtime.handling import ConsumerObserver
from queue_runtime.message import ReceivedMessage
from queue_runtime.providers.base import Action, Disposition

GROWTH = 1.01
"""Ratio of neighbouring buckets: a percentile is right to within half of it, 0.5 %."""
KEPT_SESSIONS = 100_000
KEPT_NAMES = 1000
"""Different reasons, and classes of failures, that are counted apart; the rest is counted as OTHERS."""
OTHERS = "(others)"
RATE_WINDOW = 2.0
"""Seconds over which the progress shows the rate."""


class Histogram:
    """Durations in buckets that grow by a constant ratio, so that any range fits in a few hundred numbers.

    Thread-safety: for one thread.
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.count = 0
        self.least = math.inf
        self.most = 0.0

    def record(self, seconds: float) -> None:
        seconds = max(seconds, 1e-6)
        self._counts[math.floor(math.log(seconds) / _LOG_GROWTH)] += 1
        self.count += 1
        self.least = min(self.least, seconds)
        self.most = max(self.most, seconds)

    def take(self) -> list[Any]:
        """Return what ``add`` of another histogram takes, and begin anew."""
        state = [sorted(self._counts.items()), self.count, self.least if self.count else None, self.most]
        Histogram.__init__(self)
        return state

    def add(self, state: Sequence[Any]) -> None:
        counts, count, least, most = state
        if count:
            self._counts.update(dict(counts))
            self.count += count
            self.least = min(self.least, least)
            self.most = max(self.most, most)

    def percentile(self, percent: float) -> float | None:
        """The nearest rank's duration in seconds; None before there is any."""
        rank = math.ceil(self.count * percent / 100)
        for bucket in sorted(self._counts):
            rank -= self._counts[bucket]
            if rank <= 0:
                return min(max(math.exp((bucket + 0.5) * _LOG_GROWTH), self.least), self.most)
        return None


_LOG_GROWTH = math.log(GROWTH)


class DeadLetter(NamedTuple):
    message_id: str
    session_id: str | None
    delivery_count: int
    reason: str | None
    description: str | None


_SUMS = ("batches", "batched", "retries", "settled", "dead_lettered")


class Meter(ConsumerObserver):
    """Counts what a consumer does and how long messages take from their sending to their settlement.

    Parameters
    ----------
    keep:
        How many dead letters to remember one by one.

    Thread-safety: for the consumer's event loop; the progress reads single numbers from its own thread.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self.latency = Histogram()
        self.batches = 0
        self.batched = 0
        self.smallest = 0
        self.largest = 0
        self.retries = 0
        self.settled = 0
        self.dead_lettered = 0
        self.reasons: Counter[str] = Counter()
        self.dead_letters: list[DeadLetter] = []
        self.failures: Counter[str] = Counter()
        self.sessions: set[str] = set()
        self.first: float | None = None
        self.last: float | None = None
        self._samples: deque[tuple[float, int]] = deque()

    def take(self) -> dict[str, Any]:
        """Return what was measured since the last call, in JSON's own types, for ``add`` of another meter."""
        state = {
            "latency": self.latency.take(),
            **{name: getattr(self, name) for name in _SUMS},
            "smallest": self.smallest,
            "largest": self.largest,
            "reasons": dict(self.reasons),
            "failures": dict(self.failures),
            "dead_letters": self.dead_letters,
            "sessions": list(self.sessions),
            "first": self.first,
            "last": self.last,
        }
        Meter.__init__(self, self._keep)
        return state

    def add(self, state: Mapping[str, Any]) -> None:
        """Add what another meter measured, in this process or in another one of this machine."""
        self.latency.add(state["latency"])
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + state[name])
        if state["batches"]:
            self.smallest = min(self.smallest or state["smallest"], state["smallest"])
            self.largest = max(self.largest, state["largest"])
        for counter, more in ((self.reasons, state["reasons"]), (self.failures, state["failures"])):
            for name, count in more.items():
                _count(counter, name, count)
        self.dead_letters += [
            DeadLetter(*dead) for dead in state["dead_letters"][: self._keep - len(self.dead_letters)]
        ]
        for session_id in state["sessions"]:
            self.session_opened(session_id)
        if state["first"] is not None:  # the monotonic clock is one for all processes of a machine
            self.first = state["first"] if self.first is None else min(self.first, state["first"])
        if state["last"] is not None:
            self.last = state["last"] if self.last is None else max(self.last, state["last"])

    def batch_received(self, messages: Sequence[ReceivedMessage]) -> None:
        if self.first is None:
            self.first = time.monotonic()
        size = len(messages)
        self.smallest = min(self.smallest or size, size)
        self.largest = max(self.largest, size)
        self.batches += 1
        self.batched += size
        self.retries += sum(message.delivery_count > 1 for message in messages)

    def message_settled(
        self, message: ReceivedMessage, disposition: Disposition, error: QueueRuntimeError | None
    ) -> None:
        if error is not None or disposition.action not in (Action.COMPLETE, Action.DEAD_LETTER):
            return
        self.last = time.monotonic()
        self.settled += 1
        self.latency.record(time.time() - message.enqueued_at.timestamp())
        if disposition.action is Action.DEAD_LETTER:
            self.dead_lettered += 1
            self.bury(
                DeadLetter(
                    message.message_id,
                    message.session_id,
                    message.delivery_count,
                    disposition.reason,
                    disposition.description,
                )
            )

    def bury(self, dead: DeadLetter) -> None:
        """Count a dead letter by its reason, and remember the first ones."""
        _count(self.reasons, dead.reason or "(no reason)")
        if len(self.dead_letters) < self._keep:
            self.dead_letters.append(dead)

    def forget_dead_letters(self) -> None:
        """For who counts them anew, in the dead-letter queue itself."""
        self.reasons.clear()
        self.dead_letters.clear()

    def handler_failed(self, message: ReceivedMessage, error: Exception) -> None:
        _count(self.failures, type(error).__name__)

    def session_opened(self, session_id: str) -> None:
        if len(self.sessions) < KEPT_SESSIONS:
            self.sessions.add(session_id)

    @property
    def seconds(self) -> float:
        """From the first receipt to the last settlement."""
        return self.last - self.first if self.first is not None and self.last is not None else 0.0

    @property
    def throughput(self) -> float:
        """Messages settled for good a second, over ``seconds``."""
        return self.settled / self.seconds if self.seconds > 0 else 0.0

    def rate(self) -> float:
        """Messages a second, over the last RATE_WINDOW seconds of calls."""
        now = time.monotonic()
        self._samples.append((now, self.settled))
        while now - self._samples[0][0] > RATE_WINDOW and len(self._samples) > 2:
            self._samples.popleft()
        since, before = self._samples[0]
        return (self.settled - before) / (now - since) if now > since else 0.0


def _count(counter: Counter[str], name: str, count: int = 1) -> None:
    counter[name if name in counter or len(counter) < KEPT_NAMES else OTHERS] += count
