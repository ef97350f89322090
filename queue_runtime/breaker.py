"""The circuit breaker [C35]: stop trying what fails again and again, and find out with single tries when it works.

::

             5 failures in a row                 30 s later
    CLOSED ──────────────────────▶ OPEN ──────────────────────▶ HALF_OPEN
       ▲                            ▲          a failure            │  one try at a time
       │                            └───────────────────────────────┤
       └────────────────────────────────────────────────────────────┘
                            3 successes in a row

After M. Nygard, "Release It!", 2007, chapter 5. What counts neither as a failure nor as a success follows the ignored
exceptions of resilience4j: it changes nothing, and a try that ends so may be made again.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from queue_runtime.clock import Clock, SystemClock, Timer
from queue_runtime.errors import CircuitOpenError, ConfigurationError
from queue_runtime.settings import Seconds, integer, seconds

logger = logging.getLogger("queue_runtime.breaker")

T = TypeVar("T")


class BreakerState(enum.Enum):
    """Whether calls are made: all, none, or one at a time to find out."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    """When a circuit breaker opens and closes [C35].

    Parameters
    ----------
    failures:
        Failures in a row that open it, at least 1.
    open_for:
        Seconds after which it lets a single try through.
    successes:
        Tries in a row that must go well before it closes again, at least 1.
    counts:
        Says which exceptions are failures of what lies behind it; all, by default. Such a rule keeps messages that
        are bad in themselves from stopping the good ones. One that raises is logged, and the exception counts.

    Raises ConfigurationError, which names the field.
    """

    failures: int = 5
    open_for: Seconds = 30.0
    successes: int = 3
    counts: Callable[[BaseException], bool] | None = None

    def __post_init__(self) -> None:
        integer("failures", self.failures, minimum=1)
        object.__setattr__(self, "open_for", seconds("open_for", self.open_for, minimum=0.001))
        integer("successes", self.successes, minimum=1)
        if self.counts is not None and not callable(self.counts):
            raise ConfigurationError("counts", f"must be a function of an exception, not {self.counts!r}")


class CircuitBreaker:
    """Counts how calls end, and says whether to make the next one [C35].

    Parameters
    ----------
    config:
        The rules; the defaults when None.
    clock:
        For tests: a ``ManualClock``.
    on_change:
        Called as ``on_change(old, new)`` when the state has changed; what it raises is logged. An open breaker
        becomes half-open when somebody asks it, or waits in ``wait_until_allowed``, at the time or later.

    ``call`` does all of it around one function. Who asks himself calls ``may_try`` before each call, and when it said
    yes, exactly one of ``succeeded``, ``failed`` and ``abstained`` after it; a half-open breaker waits for that.

    Thread-safety: for one event loop's thread only.
    """

    __slots__ = (
        "_changes",
        "_clock",
        "_config",
        "_failures",
        "_half_open_at",
        "_is_probing",
        "_on_change",
        "_open_for",
        "_state",
        "_successes",
        "_timer",
        "_waiters",
    )

    def __init__(
        self,
        config: BreakerConfig | None = None,
        clock: Clock | None = None,
        on_change: Callable[[BreakerState, BreakerState], None] | None = None,
    ) -> None:
        self._config = BreakerConfig() if config is None else config
        self._open_for = cast(float, self._config.open_for)
        self._clock: Clock = SystemClock() if clock is None else clock
        self._on_change = on_change
        self._state = CLOSED
        self._changes = 0
        self._failures = 0
        self._successes = 0
        self._half_open_at = 0.0
        self._is_probing = False
        self._waiters: set[asyncio.Future[None]] = set()
        self._timer: Timer | None = None

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self._state.value}>"

    @property
    def state(self) -> BreakerState:
        """The state at this moment."""
        if self._state is OPEN and self._clock.monotonic() >= self._half_open_at:
            self._successes = 0
            self._is_probing = False
            self._change(HALF_OPEN)
        return self._state

    @property
    def changes(self) -> int:
        """How often the state has changed, up to now: see ``succeeded``."""
        return self._changes

    @property
    def retry_after(self) -> float:
        """Seconds until it is half-open; 0.0 when it is not open."""
        return max(0.0, self._half_open_at - self._clock.monotonic()) if self.state is OPEN else 0.0

    def may_try(self) -> bool:
        """Return whether to make a call now. The yes of a half-open breaker is for one: it claims the try."""
        if self._state is CLOSED:
            return True
        if self.state is not HALF_OPEN or self._is_probing:
            return False
        self._is_probing = True
        return True

    def succeeded(self, since: int | None = None) -> None:
        """Count a call that went well.

        Parameters
        ----------
        since:
            What ``changes`` was when the call was allowed. A result from before the last change then counts for
            nothing: calls that began before the breaker opened say little about what came after, and must not
            be taken for the single try. None takes the result for a present one.
        """
        if since is not None and since != self._changes:
            return
        if self._state is CLOSED:
            self._failures = 0
        elif self.state is HALF_OPEN and self._is_probing:
            self._is_probing = False
            self._successes += 1
            if self._successes >= self._config.successes:
                self._failures = 0
                self._change(CLOSED)
            else:
                self._wake()

    def failed(self, error: BaseException, since: int | None = None) -> None:
        """Count a call that raised ``error``, if the configuration counts such; ``since`` as for ``succeeded``."""
        if not self._is_failure(error):
            self.abstained(since)
        elif since is not None and since != self._changes:
            return
        elif self._state is CLOSED:
            self._failures += 1
            if self._failures >= self._config.failures:
                self._open()
        elif self.state is HALF_OPEN and self._is_probing:
            self._is_probing = False
            self._open()

    def abstained(self, since: int | None = None) -> None:
        """Give a try back that says nothing, such as a cancelled one; ``since`` as for ``succeeded``."""
        if (since is None or since == self._changes) and self.state is HALF_OPEN and self._is_probing:
            self._is_probing = False
            self._wake()

    async def wait_until_allowed(self) -> None:
        """Return when ``may_try`` would say yes. It claims nothing: of many who waited, the first to ask gets the try.

        Cancelling it leaves nothing behind.
        """
        while self.state is OPEN or (self._state is HALF_OPEN and self._is_probing):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            self._set_timer()
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
                if not self._waiters:
                    self._stop_timer()

    async def call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what ``call`` returns, and count how it ends.

        Raises CircuitOpenError at once, without a call, when the breaker is open, or half-open with a try under way;
        its ``retry_after`` says when the breaker will be half-open. A cancelled call counts for nothing.
        """
        if not self.may_try():
            error = CircuitOpenError("the circuit breaker is open: the call was not made")
            error.retry_after = self.retry_after or None
            raise error
        since = self._changes
        try:
            result = await call()
        except Exception as error:
            self.failed(error, since)
            raise
        except BaseException:
            self.abstained(since)
            raise
        self.succeeded(since)
        return result

    def _is_failure(self, error: BaseException) -> bool:
        if self._config.counts is None:
            return True
        try:
            return bool(self._config.counts(error))
        except Exception:
            logger.exception("the breaker's rule failed; the exception counts as a failure")
            return True

    def _open(self) -> None:
        self._half_open_at = self._clock.monotonic() + self._open_for
        self._change(OPEN)

    def _change(self, state: BreakerState) -> None:
        old, self._state = self._state, state
        self._changes += 1
        if self._on_change is None:  # else whoever is told can say more
            logger.warning("a circuit breaker was %s, is %s", old.value, state.value)
        if state is OPEN:
            if self._waiters:
                self._set_timer()
        else:
            self._wake()
        if self._on_change is not None:
            try:
                self._on_change(old, state)
            except Exception:
                logger.exception("on_change of a circuit breaker failed")

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _set_timer(self) -> None:
        if self._timer is None and self._state is OPEN:
            left = max(0.0, self._half_open_at - self._clock.monotonic())
            self._timer = self._clock.call_later(left, self._timer_fired)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timer_fired(self) -> None:
        self._timer = None
        if self.state is OPEN:  # it opened again meanwhile, or an event loop's timer was early by its resolution
            self._set_timer()
