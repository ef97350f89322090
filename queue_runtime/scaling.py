"""How much a consumer may do at once, what is seen of its load, and the settings of its scaling [C45]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

from queue_runtime.config import Seconds, integer, seconds, share


class Limits(NamedTuple):
    """What a consumer may do at once."""

    concurrency: int
    """Handlers."""
    prefetch: int
    """Messages held, waiting and in handlers."""
    pollers: int = 1
    """Receives under way."""
    sessions: int = 1
    """Sessions held."""


class Load(NamedTuple):
    """What was seen of a consumer and its queue since the sample before."""

    rate: float = 0.0
    """Messages whose handlers ended, a second."""
    handler_seconds: float = 0.0
    """Mean duration of a handler; 0.0 when none ended."""
    busy: float = 0.0
    """Mean number of handlers that ran, as a share of those allowed, 0.0 to 1.0."""
    in_flight: int = 0
    """Messages held now, waiting and in handlers."""
    waiting: int = 0
    """Those of them that are in no handler."""
    depth: int | None = None
    """Messages that are ready in the queue; None when that is not known."""
    lag: float | None = None
    """Seconds that the message received last had been in the queue; None when that is not known."""
    sessions: int = 0
    """Sessions held now."""
    runnable: int | None = None
    """Handlers that could run at once at the most: the sessions held, when all work is in sessions; None: any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """How a consumer follows its load.

    Parameters
    ----------
    min_concurrency, max_concurrency:
        Handlers at once. A maximum of None, here and below, takes what the consumer is configured with.
    min_prefetch, max_prefetch:
        Messages held, waiting and in handlers.
    min_pollers, max_pollers:
        Receives under way.
    min_sessions, max_sessions:
        Sessions held.
    target_lag:
        Seconds in which a backlog is to be worked off.
    target_busy, grow_above, shrink_below:
        Shares of the allowed handlers that run: growth begins above the one, shrinking below the other, and both
        aim between them. The wider apart they are, the less a fluctuating load moves the limits.
    shrink_after:
        Seconds for which fewer must have been enough before anything shrinks.
    min_gain:
        The part of its fair share by which a larger limit must raise the throughput to be kept: with 0.5, twice the
        handlers must do at least one and a half times the work.
    hold:
        Seconds for which growth that did not help is not tried again; doubled each time, up to 16 times.
    hold_ahead:
        Seconds of work that are held beyond what is in handlers.
    interval, idle_interval:
        Seconds between two looks at the load, and the longest while nothing happens.
    count_interval:
        Seconds between two questions for the depth of the queue, which are calls to the service.

    Raises ConfigurationError, which names the field.
    """

    min_concurrency: int = 1
    max_concurrency: int | None = None
    min_prefetch: int = 2
    max_prefetch: int | None = None
    min_pollers: int = 1
    max_pollers: int | None = 4
    min_sessions: int = 1
    max_sessions: int | None = None
    target_lag: Seconds = 5.0
    target_busy: float = 0.7
    grow_above: float = 0.9
    shrink_below: float = 0.5
    shrink_after: Seconds = 30.0
    min_gain: float = 0.5
    hold: Seconds = 30.0
    hold_ahead: Seconds = 0.5
    interval: Seconds = 1.0
    idle_interval: Seconds = 10.0
    count_interval: Seconds = 5.0

    def __post_init__(self) -> None:
        for field in ("concurrency", "prefetch", "pollers", "sessions"):
            lowest = integer(f"min_{field}", getattr(self, f"min_{field}"), minimum=1)
            highest = getattr(self, f"max_{field}")
            if highest is not None:
                integer(f"max_{field}", highest, minimum=lowest)
        share("shrink_below", self.shrink_below)
        share("target_busy", self.target_busy, minimum=max(self.shrink_below, 0.01))
        share("grow_above", self.grow_above, minimum=self.target_busy)
        share("min_gain", self.min_gain)
        for field, minimum in (("target_lag", 0.001), ("interval", 0.001), ("hold", 0.0), ("hold_ahead", 0.0)):
            self._seconds(field, minimum)
        self._seconds("shrink_after", 0.0)
        self._seconds("idle_interval", cast(float, self.interval))
        self._seconds("count_interval", 0.0)

    def _seconds(self, field: str, minimum: float) -> None:
        object.__setattr__(self, field, seconds(field, getattr(self, field), minimum=minimum))

    def lowest(self) -> Limits:
        """Return the limits to begin with, and to come back to."""
        return Limits(self.min_concurrency, self.min_prefetch, self.min_pollers, self.min_sessions)

    def highest(self, configured: Limits) -> Limits:
        """Return the limits not to grow beyond; ``configured`` holds where there is no maximum."""
        given = (self.max_concurrency, self.max_prefetch, self.max_pollers, self.max_sessions)
        return Limits(
            *(
                max(lowest, own if most is None else most)
                for lowest, own, most in zip(self.lowest(), configured, given, strict=True)
            )
        )
