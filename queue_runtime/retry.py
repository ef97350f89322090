"""When to try again [C34]: policies that say how long to wait, and the two rules that hold for each of them.

Only an error that says ``is_transient`` is followed by another attempt, and where the error itself asks for a longer
pause (``retry_after``), that one is kept.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from queue_runtime.clock import Clock
from queue_runtime.errors import ConfigurationError, QueueRuntimeError
from queue_runtime.settings import Seconds, integer, seconds, share

logger = logging.getLogger("queue_runtime.retry")

T = TypeVar("T")


class RetryPolicy(Protocol):
    """How often to try, and how long to wait in between.

    A policy may also have a ``deadline``: no attempt begins later than so many seconds after the first one began.
    Thread-safety: the library asks a policy on the event loop's thread; those below may be shared by any.
    """

    @property
    def attempts(self) -> int:
        """Attempts in all, the first one included."""
        ...

    def pause(self, attempt: int) -> float | None:
        """Return the seconds to wait after attempt number ``attempt`` (1 is the first) failed; None to give up."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRetry:
    """One attempt."""

    @property
    def attempts(self) -> int:
        return 1

    def pause(self, attempt: int) -> float | None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRetry:
    """The same pause each time.

    Parameters
    ----------
    delay:
        Seconds between two attempts.
    attempts:
        Attempts in all, at least 1.
    jitter:
        The part of a pause, from 0 to 1, by which it is made longer or shorter at random, so that many who failed
        together do not come back together.
    deadline:
        Seconds after the beginning of the first attempt, later than which no other one begins; None for no limit.

    Raises ConfigurationError, which names the field.
    """

    delay: Seconds = 0.0
    attempts: int = 3
    jitter: float = 0.0
    deadline: Seconds | None = None

    def __post_init__(self) -> None:
        _check(self, "delay")

    def pause(self, attempt: int) -> float | None:
        return None if attempt >= self.attempts else _spread(self.delay, self.jitter, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRetry:
    """Pauses that grow by the same ``step`` each time, from ``step`` up to ``longest`` seconds.

    The other parameters are those of ``FixedRetry``.
    """

    step: Seconds = 0.5
    longest: Seconds = 30.0
    attempts: int = 3
    jitter: float = 0.2
    deadline: Seconds | None = None

    def __post_init__(self) -> None:
        _check(self, "step", "longest")

    def pause(self, attempt: int) -> float | None:
        return None if attempt >= self.attempts else _spread(self.step * attempt, self.jitter, self.longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialRetry:
    """Pauses that grow ``factor``-fold each time, from ``first`` up to ``longest`` seconds.

    The other parameters are those of ``FixedRetry``. Why the jitter: M. Brooker, "Exponential Backoff And Jitter",
    AWS Architecture Blog, 2015.
    """

    first: Seconds = 0.1
    factor: float = 2.0
    longest: Seconds = 30.0
    attempts: int = 3
    jitter: float = 0.2
    deadline: Seconds | None = None

    def __post_init__(self) -> None:
        _check(self, "first", "longest")
        factor = self.factor
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1.0 <= factor <= 1000.0:
            raise ConfigurationError("factor", f"must be from 1 to 1000, not {factor!r}")
        object.__setattr__(self, "factor", float(factor))

    def pause(self, attempt: int) -> float | None:
        if attempt >= self.attempts:
            return None
        try:
            pause = self.first * self.factor ** (attempt - 1)
        except OverflowError:
            pause = self.longest if self.first else 0.0
        return _spread(pause, self.jitter, self.longest)


def pause_after(policy: RetryPolicy, attempt: int, error: BaseException) -> float | None:
    """Return the seconds to wait after attempt number ``attempt`` ended with ``error``, or None to give up.

    A policy that raises, or whose pause is no number of seconds, is logged and gives up: the error that is being
    dealt with must not be replaced by another one.
    """
    if not (isinstance(error, QueueRuntimeError) and error.is_transient):
        return None
    try:
        pause = policy.pause(attempt)
        if pause is None:
            return None
        if not 0.0 <= pause < math.inf:
            raise ValueError(f"a pause of {pause} seconds")
    except Exception:
        logger.exception("the retry policy failed; there is no further attempt")
        return None
    return max(pause, error.retry_after or 0.0)


class Retrier:
    """Calls again by one policy, until it is closed.

    Parameters
    ----------
    policy, clock:
        The rules, and the time that the pauses are of.

    Thread-safety: for one event loop's thread; there, for any number of tasks at once.
    """

    __slots__ = ("_closed", "_deadline", "_waits", "clock", "policy")

    def __init__(self, policy: RetryPolicy, clock: Clock) -> None:
        self.policy = policy
        self.clock = clock
        deadline: Seconds | None = getattr(policy, "deadline", None)
        self._deadline = math.inf if deadline is None else seconds("deadline", deadline)
        self._waits: set[asyncio.Future[bool]] = set()
        self._closed = False

    async def call(self, call: Callable[[], Awaitable[T]], *, within: float = math.inf) -> T:
        """Return what ``call`` returns, calling again while the policy says so; then raise its last error.

        Parameters
        ----------
        within:
            Seconds from now, later than which no other attempt begins, where the policy's deadline is not sooner.
        """
        started = self.clock.monotonic()
        attempt = 1
        while True:
            try:
                return await call()
            except QueueRuntimeError as error:
                if not await self.wait(attempt, error, started, within=within):
                    raise
            attempt += 1

    async def wait(self, attempt: int, error: QueueRuntimeError, started: float, *, within: float = math.inf) -> bool:
        """Wait for the next attempt; return False when there is none: by the rules, or as this was closed.

        Parameters
        ----------
        attempt, error:
            The number of the attempt that failed, from 1, and how.
        started:
            When the first attempt began, by the clock's ``monotonic``.
        """
        pause = pause_after(self.policy, attempt, error)
        if pause is None or self._closed:
            return False
        if self.clock.monotonic() + pause > started + min(self._deadline, within):
            return False
        logger.info("attempt %d failed, the next in %.2f s: %s", attempt, pause, error)
        if pause == 0.0:
            await asyncio.sleep(0)
            return not self._closed
        over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waits.add(over)
        timer = self.clock.call_later(pause, partial(_end, over, True))
        try:
            return await over
        finally:
            timer.cancel()
            self._waits.discard(over)

    def close(self) -> None:
        """End every wait at once: there is no further attempt."""
        self._closed = True
        for over in self._waits:
            _end(over, False)


async def retrying(call: Callable[[], Awaitable[T]], policy: RetryPolicy, clock: Clock) -> T:
    """Return what ``call`` returns; call again by the policy while it raises a passing error [C34].

    Raises the error of the last attempt. An attempt that is under way at the policy's deadline is not cut off.
    """
    return await Retrier(policy, clock).call(call)


_POLICIES: dict[str, Callable[..., RetryPolicy]] = {
    "none": NoRetry,
    "fixed": FixedRetry,
    "linear": LinearRetry,
    "exponential": ExponentialRetry,
}


def checked_policy(field: str, policy: object) -> RetryPolicy:
    """Return ``policy``; raise ConfigurationError naming ``field`` when it is none."""
    if isinstance(policy, type) or not callable(getattr(policy, "pause", None)):
        raise ConfigurationError(field, f"must be a policy such as ExponentialRetry(), not {policy!r}")
    try:
        integer("attempts", getattr(policy, "attempts", None), minimum=1)
        if getattr(policy, "deadline", None) is not None:
            seconds("deadline", policy.deadline)  # type: ignore[attr-defined]
    except ConfigurationError as error:
        raise ConfigurationError(field, str(error)) from error
    return policy  # type: ignore[return-value]


def policy_from(field: str, value: str | Mapping[str, Any]) -> RetryPolicy:
    """Read a policy from settings: ``linear``, ``linear,step=2,attempts=5``, or the mapping of the same.

    In a mapping the policy's name is its ``kind``; without one it is ``exponential``. Raises ConfigurationError
    naming ``field``.
    """
    settings: dict[str, Any]
    if isinstance(value, str):
        kind, *parts = value.split(",")
        settings = {}
        for part in parts:
            name, equals, text = part.partition("=")
            if not equals or name in settings:
                raise ConfigurationError(field, f"cannot read {part!r}; use {kind},setting=value,... each once")
            settings[name] = text
    else:
        settings = dict(value)
        kind = settings.pop("kind", "exponential")
    make = _POLICIES.get(kind) if isinstance(kind, str) else None
    if make is None:
        raise ConfigurationError(field, f"must be one of {', '.join(_POLICIES)}, not {kind!r}")
    names = [each.name for each in dataclasses.fields(make)]  # type: ignore[arg-type]
    try:
        for name, setting in settings.items():
            if name not in names:
                raise ConfigurationError(str(name), f"is no setting of {kind}; there are {', '.join(names) or 'none'}")
            if isinstance(setting, str):
                settings[name] = _number_from(name, setting)
        return make(**settings)
    except ConfigurationError as error:
        raise ConfigurationError(field, str(error)) from error


def _number_from(name: str, text: str) -> float:
    try:
        return int(text) if name == "attempts" else float(text)
    except ValueError:
        raise ConfigurationError(name, f"cannot read {text!r} as a number") from None


def _check(policy: Any, *durations: str) -> None:
    for field in durations:
        object.__setattr__(policy, field, seconds(field, getattr(policy, field)))
    integer("attempts", policy.attempts, minimum=1)
    object.__setattr__(policy, "jitter", share("jitter", policy.jitter))
    if policy.deadline is not None:
        object.__setattr__(policy, "deadline", seconds("deadline", policy.deadline))


def _spread(pause: Any, jitter: float, longest: Any) -> float:
    """Pick a pause around this one. At the longest it is spread below it only, so that not all pick the same."""
    pause = min(pause, longest)
    picked: float = random.uniform(pause * (1.0 - jitter), min(pause * (1.0 + jitter), longest))
    return picked


def _end(over: asyncio.Future[bool], outcome: bool) -> None:
    if not over.done():
        over.set_result(outcome)
