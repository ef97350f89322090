"""What is wrong with a client, in plain sentences, for probes and for people."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from queue_runtime.breaker import BreakerState
from queue_runtime.clock import Clock, Late, within
from queue_runtime.errors import CapabilityError, QueueRuntimeError
from queue_runtime.links import Links
from queue_runtime.providers.base import QueueCounts
from queue_runtime.renewal import LockRenewer
from queue_runtime.sending import Sender

logger = logging.getLogger("queue_runtime.health")

GROWING_FOR = 30.0
"""Seconds for which a backlog has to grow, with nothing settled, before that is a problem."""
REMEMBERED = 60.0
"""Seconds for which a block of the event loop stays a problem: whoever asks can only do so after it."""

FORGOTTEN = 300.0
"""Seconds after which a connection that failed is no problem any more when nobody has tried it again. A consumer tries
at least every minute."""


class ConsumerHealth(NamedTuple):
    """How one consumer is."""

    queue_name: str
    is_running: bool
    """Whether it fetches and begins; false before its start, while it drains, and after."""
    waiting: int = 0
    """Messages that it holds and that are in no handler."""
    running: int = 0
    """Handlers that run."""
    breaker: BreakerState | None = None
    """None without a breaker."""
    problems: tuple[str, ...] = ()
    """Such as its stalls; plain sentences."""


class HealthReporter(Protocol):
    """What a client asks: its consumers."""

    def health(self) -> ConsumerHealth: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How a client is. Made by ``QueueClient.health``.

    Times are seconds ago; None where it has not happened yet.
    """

    is_healthy: bool
    """Whether there are no problems."""
    problems: tuple[str, ...]
    """What is wrong, a plain sentence each."""
    provider: str
    connection: Literal["open", "failing", "closed"]
    """``failing``: the last that was heard of the service is that it cannot be reached."""
    last_receive: float | None = None
    """Since messages were received; or, of a service elsewhere, since it answered a receiver, if only with none."""
    last_settle: float | None = None
    """Since a message was settled well."""
    backlog: Mapping[str, QueueCounts] = field(default_factory=dict)
    """The counts of the queue that was asked for, or else of those that have consumers."""
    consumers: tuple[ConsumerHealth, ...] = ()

    @property
    def breakers(self) -> dict[str, BreakerState]:
        """The breakers' states by queue."""
        return {each.queue_name: each.breaker for each in self.consumers if each.breaker is not None}


class _Baseline(NamedTuple):
    """A backlog as it was when nothing had been settled since."""

    at: float
    active: int


class Checkup:
    """Examines one client.

    Parameters
    ----------
    clock, links, sender, renewer:
        The client's own.
    counts:
        Asks the provider for a queue's counts, once.

    Thread-safety: for the client's event loop.
    """

    def __init__(
        self,
        clock: Clock,
        links: Links,
        sender: Sender,
        renewer: LockRenewer | None,
        counts: Callable[[str], Awaitable[QueueCounts]],
    ) -> None:
        self._clock = clock
        self._links = links
        self._sender = sender
        self._renewer = renewer
        self._counts = counts
        self._reporters: dict[HealthReporter, None] = {}
        self._baselines: dict[str, _Baseline] = {}
        self.settled: dict[str, float] = {}
        """When a message of each queue was last settled well, by the monotonic clock; the client sets it."""

    def add(self, reporter: HealthReporter) -> Callable[[], None]:
        """Ask this one too; return what takes it back."""
        self._reporters[reporter] = None
        return lambda: self._reporters.pop(reporter, None)

    async def examine(self, provider: str, queue_name: str | None, timeout: float) -> Health:
        """Look at everything, waiting no longer than ``timeout`` seconds for the service."""
        if self._links.is_closed:
            return Health(is_healthy=False, problems=("the client is closed",), provider=provider, connection="closed")
        consumers = self._ask_consumers()
        problems: list[str] = []
        for each in consumers:
            problems += each.problems
            if each.breaker is BreakerState.OPEN:
                problems.append(f"the circuit breaker of queue {each.queue_name} is open, and its fetch is paused")
        queues = dict.fromkeys([each.queue_name for each in consumers] if queue_name is None else [queue_name])
        deadline = self._clock.monotonic() + timeout
        backlog: dict[str, QueueCounts] = {}
        is_failing = False
        for name in queues:
            try:
                left = max(0.0, deadline - self._clock.monotonic())
                backlog[name] = await within(self._clock, left, self._counts(name))
            except Late:
                is_failing = True
                problems.append(f"the service did not say within {timeout:g} s what is in queue {name}")
            except CapabilityError:
                pass
            except QueueRuntimeError as error:
                is_failing = is_failing or error.is_transient
                problems.append(f"the service did not say what is in queue {name}: {error}")
            except Exception as bug:
                problems.append(f"the service did not say what is in queue {name}: {bug!r}")
        now = self._clock.monotonic()
        contact, last_settle = self._links.last_contact, max(self.settled.values(), default=None)
        for trouble in (self._links.trouble, self._sender.trouble):
            if trouble is not None and (contact is None or trouble.at > contact) and now - trouble.at <= FORGOTTEN:
                is_failing = is_failing or not backlog
                problems.append(f"{trouble.sentence}, {now - trouble.at:.0f} s ago, and nothing was heard since")
        for name, counts in backlog.items():
            problems += self._growth(name, counts.active, now, any(each.queue_name == name for each in consumers))
        block = None if self._renewer is None else self._renewer.last_block
        if block is not None and now - block.ended_at <= REMEMBERED:
            problems.append(
                f"the event loop was blocked for at least {block.seconds:.1f} s by {block.place.handler}, "
                f"until {now - block.ended_at:.0f} s ago"
            )
        return Health(
            is_healthy=not problems,
            problems=tuple(problems),
            provider=provider,
            connection="failing" if is_failing else "open",
            last_receive=None if contact is None else now - contact,
            last_settle=None if last_settle is None else now - last_settle,
            backlog=backlog,
            consumers=consumers,
        )

    def _ask_consumers(self) -> tuple[ConsumerHealth, ...]:
        consumers = []
        for reporter in list(self._reporters):
            try:
                consumers.append(reporter.health())
            except Exception as bug:
                logger.exception("a consumer failed to tell its health")
                consumers.append(ConsumerHealth("unknown", True, problems=(f"a consumer cannot tell: {bug!r}",)))
        return tuple(consumers)

    def _growth(self, queue_name: str, active: int, now: float, has_consumer: bool) -> list[str]:
        """Say whether the backlog grows and nothing of it is settled, of a queue that is received from."""
        seen = self._baselines.get(queue_name)
        if seen is None or active <= seen.active or self.settled.get(queue_name, -math.inf) >= seen.at:
            self._baselines[queue_name] = _Baseline(now, active)
            return []
        if now - seen.at < GROWING_FOR or not (has_consumer or queue_name in self._links.main):
            return []
        return [
            f"the backlog of queue {queue_name} has grown from {seen.active} to {active} in {now - seen.at:.0f} s, "
            "and nothing was settled"
        ]
