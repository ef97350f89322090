"""When to try again [C34]: the policies, the rules over them, and the waiting."""

import asyncio
import dataclasses
import logging
import math
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, strategies as st

from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.errors import (
    ConfigurationError,
    ConnectionFailedError,
    QueueFullError,
    QueueNotFoundError,
    QueueRuntimeError,
    ServiceUnavailableError,
    SessionLockedError,
    ThrottledError,
)
from queue_runtime.retry import (
    ExponentialRetry,
    FixedRetry,
    LinearRetry,
    NoRetry,
    Retrier,
    RetryPolicy,
    checked_policy,
    pause_after,
    retrying,
)

BUSY = ServiceUnavailableError("busy")
NAN, INF = float("nan"), float("inf")


def pauses(policy: RetryPolicy) -> list[float | None]:
    return [policy.pause(attempt) for attempt in range(1, policy.attempts + 1)]


class Call:
    """Fails with these errors, one after the other, then returns; notes when it was called."""

    def __init__(self, clock: ManualClock, *errors: BaseException, takes: float = 0.0) -> None:
        self.clock = clock
        self.errors = list(errors)
        self.takes = takes
        self.times: list[float] = []

    async def __call__(self) -> str:
        self.times.append(self.clock.monotonic())
        self.clock._now += self.takes
        if self.errors:
            raise self.errors.pop(0)
        return "done"


# Policies.


def test_the_default_is_the_contract_s() -> None:
    """[C34] 0.1 s, doubled, at most 30 s, 3 attempts, 20 % jitter."""
    policy = ExponentialRetry()
    assert dataclasses.astuple(policy) == (0.1, 2.0, 30.0, 3, 0.2, None)
    for _ in range(100):
        first, second, none = pauses(policy)
        assert first is not None
        assert second is not None
        assert 0.08 <= first <= 0.12
        assert 0.16 <= second <= 0.24
        assert none is None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (NoRetry(), [None]),
        (FixedRetry(), [0.0, 0.0, None]),
        (FixedRetry(delay=2, attempts=4), [2.0, 2.0, 2.0, None]),
        (FixedRetry(attempts=1), [None]),
        (LinearRetry(step=1, longest=2.5, attempts=5, jitter=0), [1.0, 2.0, 2.5, 2.5, None]),
        (ExponentialRetry(first=1, longest=5, attempts=6, jitter=0), [1.0, 2.0, 4.0, 5.0, 5.0, None]),
        (ExponentialRetry(first=1, factor=1, attempts=3, jitter=0), [1.0, 1.0, None]),
        (ExponentialRetry(first=0, attempts=3), [0.0, 0.0, None]),
        (ExponentialRetry(first=10, longest=1, attempts=2, jitter=0), [1.0, None]),
    ],
    ids=str,
)
def test_pauses(policy: RetryPolicy, expected: list[float | None]) -> None:
    assert pauses(policy) == expected
    assert policy.pause(policy.attempts + 1) is None


def test_a_large_attempt_overflows_nothing() -> None:
    for policy in (ExponentialRetry(attempts=10**9), ExponentialRetry(attempts=10**9, factor=1000.0)):
        pause = policy.pause(10**8)
        assert pause is not None
        assert 24.0 <= pause <= 30.0
    assert ExponentialRetry(attempts=10**9, first=0.0).pause(10**8) == 0.0


POLICIES = st.one_of(
    st.builds(
        FixedRetry, delay=st.floats(0, 1e6), attempts=st.integers(1, 50), jitter=st.floats(0, 1), deadline=st.none()
    ),
    st.builds(
        LinearRetry,
        step=st.floats(0, 1e6),
        longest=st.floats(0, 1e6),
        attempts=st.integers(1, 50),
        jitter=st.floats(0, 1),
    ),
    st.builds(
        ExponentialRetry,
        first=st.floats(0, 1e6),
        factor=st.floats(1, 1000),
        longest=st.floats(0, 1e6),
        attempts=st.integers(1, 1000),
        jitter=st.floats(0, 1),
    ),
)


def plain(policy: Any, attempt: int) -> float:
    """The twin: the pause without jitter, step by step."""
    if isinstance(policy, FixedRetry):
        return float(policy.delay)  # type: ignore[arg-type]
    if isinstance(policy, LinearRetry):
        return min(sum(policy.step for _ in range(attempt)), policy.longest)  # type: ignore[misc, type-var, return-value]
    pause = policy.first
    for _ in range(attempt - 1):
        pause = min(pause * policy.factor, max(policy.longest, policy.first))
    return float(min(pause, policy.longest))


@given(POLICIES, st.integers(1, 1100))
def test_a_pause_is_near_its_plain_value(policy: Any, attempt: int) -> None:
    """[C34] Within the jitter, and never above the longest."""
    pause = policy.pause(attempt)
    if attempt >= policy.attempts:
        assert pause is None
        return
    expected = plain(policy, attempt)
    slack = 1e-6 * expected
    assert expected * (1 - policy.jitter) - slack <= pause <= expected * (1 + policy.jitter) + slack
    assert pause <= getattr(policy, "longest", math.inf)


def test_jitter_spreads_and_is_fair() -> None:
    """Also at the longest pause, where it may only be shorter."""
    for policy, low, high in (
        (FixedRetry(delay=10, jitter=0.5), 5.0, 15.0),
        (ExponentialRetry(first=100, longest=30), 24.0, 30.0),
    ):
        picked = [policy.pause(1) or 0.0 for _ in range(2000)]
        assert low <= min(picked) < low + (high - low) / 20
        assert high >= max(picked) > high - (high - low) / 20
        assert sum(picked) / 2000 == pytest.approx((low + high) / 2, rel=0.05)


@pytest.mark.parametrize(
    ("make", "field", "values"),
    [
        (ExponentialRetry, "first", [-1, NAN, INF, True, "1", None]),
        (ExponentialRetry, "factor", [0.99, 0, -2, NAN, INF, 1001, True, "2", None]),
        (ExponentialRetry, "longest", [-1, NAN, INF, False, "1", None]),
        (LinearRetry, "step", [-0.1, NAN, INF, True, "1", None]),
        (LinearRetry, "longest", [-1, NAN, INF, None]),
        (FixedRetry, "delay", [-1, NAN, INF, True, "1", None, timedelta(seconds=-1)]),
        *(
            (make, field, values)
            for make in (ExponentialRetry, LinearRetry, FixedRetry)
            for field, values in (
                ("attempts", [0, -1, 1.0, True, None, "3"]),
                ("jitter", [-0.1, 1.1, NAN, True, None, "0"]),
                ("deadline", [-1, NAN, INF, True, "1"]),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_setting_is_refused_by_name(make: Callable[..., object], field: str, values: list[object]) -> None:
    """[C33]"""
    for value in values:
        with pytest.raises(ConfigurationError) as caught:
            make(**{field: value})
        assert caught.value.field == field


def test_a_policy_is_a_value() -> None:
    """Frozen, keyword-only, hashable, pickled; durations are kept as seconds."""
    policy = ExponentialRetry(first=timedelta(milliseconds=500), deadline=timedelta(minutes=1), attempts=4)
    assert (policy.first, policy.deadline) == (0.5, 60.0)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(policy) == hash(dataclasses.replace(policy))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.attempts = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        FixedRetry(1.0)  # type: ignore[misc]
    assert NoRetry() == NoRetry()


# The rules over every policy.


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ServiceUnavailableError("busy"), 1.0),
        (ThrottledError(retry_after=0.5), 1.0),
        (ThrottledError(retry_after=7.0), 7.0),
        (ConnectionFailedError("reset"), 5.0),
        (SessionLockedError("s"), 5.0),
        (QueueNotFoundError("q"), None),
        (QueueFullError("queue", 1), None),
        (ValueError("bug"), None),
        (ConnectionError("not ours"), None),
        (asyncio.CancelledError(), None),
    ],
    ids=repr,
)
def test_the_error_has_a_say(error: BaseException, expected: float | None) -> None:
    """[C34] What is not transient is not tried again; the error's own pause wins when it is longer."""
    policy = FixedRetry(delay=1.0, attempts=2)
    assert pause_after(policy, 1, error) == expected
    assert pause_after(policy, 2, error) is None


@pytest.mark.parametrize("pause", [NAN, INF, -1.0, "soon", ZeroDivisionError("bug")], ids=repr)
async def test_a_broken_policy_gives_up(pause: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The caller is told what went wrong with the call, not with the policy."""

    class Broken:
        attempts = 5

        def pause(self, attempt: int) -> float | None:
            if isinstance(pause, Exception):
                raise pause
            return pause  # type: ignore[no-any-return]

    with pytest.raises(ServiceUnavailableError):
        await retrying(Call(clock := ManualClock(), BUSY), Broken(), clock)
    assert "the retry policy failed" in caplog.text


# Waiting.


async def test_it_calls_until_it_goes_well() -> None:
    clock = ManualClock()
    call = Call(clock, BUSY, ThrottledError(retry_after=5.0))
    task = asyncio.create_task(retrying(call, ExponentialRetry(first=1, jitter=0, attempts=5), clock))
    await clock.advance(60)
    assert await task == "done"
    assert call.times == [0.0, 1.0, 6.0]


async def test_the_last_error_is_raised() -> None:
    clock = ManualClock()
    errors = [ServiceUnavailableError(str(number)) for number in range(4)]
    call = Call(clock, *errors)
    task = asyncio.create_task(retrying(call, FixedRetry(attempts=3), clock))
    await settle_tasks()
    assert task.exception() is errors[2]
    assert call.times == [0.0] * 3


async def test_what_is_not_transient_ends_it() -> None:
    clock = ManualClock()
    for error in (QueueNotFoundError("q"), ZeroDivisionError("bug")):
        call = Call(clock, BUSY, error, BUSY)
        with pytest.raises(type(error)):
            await retrying(call, FixedRetry(attempts=9), clock)
        assert len(call.times) == 2


@pytest.mark.parametrize(
    ("deadline", "takes", "expected"),
    [
        (None, 0.0, [0.0, 1.0, 2.0, 3.0, 4.0]),
        (2.0, 0.0, [0.0, 1.0, 2.0]),
        (1.99, 0.0, [0.0, 1.0]),
        (0.0, 0.0, [0.0]),
        (3.0, 1.0, [0.0, 2.0]),
        (3.0, 10.0, [0.0]),
    ],
)
async def test_no_attempt_begins_after_the_deadline(
    deadline: float | None, takes: float, expected: list[float]
) -> None:
    """[C34] It runs from the beginning of the first attempt, what the attempts take included; it is not waited for."""
    clock = ManualClock()
    call = Call(clock, *[BUSY] * 9, takes=takes)
    task = asyncio.create_task(retrying(call, FixedRetry(delay=1, attempts=5, deadline=deadline), clock))
    await clock.advance(expected[-1] + takes)
    assert task.done()
    assert isinstance(task.exception(), ServiceUnavailableError)
    assert call.times == expected


async def test_the_caller_s_limit_holds_as_well() -> None:
    clock = ManualClock()
    for deadline, within in ((None, 2.0), (2.0, 50.0), (50.0, 2.0)):
        call = Call(clock, *[BUSY] * 9)
        retrier = Retrier(FixedRetry(delay=1, attempts=9, deadline=deadline), clock)
        task = asyncio.create_task(retrier.call(call, within=within))
        await clock.advance(20)
        assert isinstance(task.exception(), ServiceUnavailableError)
        assert len(call.times) == 3


async def test_closing_ends_the_waits_at_once() -> None:
    """[C23] Each caller is told its own last error, and no timer is left."""
    clock = ManualClock()
    retrier = Retrier(FixedRetry(delay=10, attempts=5), clock)
    errors = [ServiceUnavailableError(str(number)) for number in range(3)]
    calls = [Call(clock, error) for error in errors]
    tasks = [asyncio.create_task(retrier.call(call)) for call in calls]
    await clock.advance(5)
    retrier.close()
    await settle_tasks()
    assert [task.exception() for task in tasks] == errors
    assert all(timer.callback is None for _, _, timer in clock._timers)
    assert retrier._waits == set()
    late = Call(clock, BUSY)
    with pytest.raises(ServiceUnavailableError):
        await retrier.call(late)
    assert len(late.times) == 1


@pytest.mark.parametrize("delay", [0.0, 1.0])
async def test_closing_while_an_attempt_runs(delay: float) -> None:
    clock = ManualClock()
    retrier = Retrier(FixedRetry(delay=delay, attempts=5), clock)
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        asyncio.get_running_loop().call_soon(retrier.close)
        raise BUSY

    with pytest.raises(ServiceUnavailableError):
        await retrier.call(call)
    assert calls == 1


async def test_a_cancelled_wait_leaves_nothing() -> None:
    """[C38]"""
    clock = ManualClock()
    retrier = Retrier(FixedRetry(delay=10), clock)
    task = asyncio.create_task(retrier.call(Call(clock, BUSY)))
    await settle_tasks()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(timer.callback is None for _, _, timer in clock._timers)
    assert retrier._waits == set()
    retrier.close()


async def test_a_retry_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """[C50]"""
    clock = ManualClock()
    with caplog.at_level(logging.INFO):
        await retrying(Call(clock, BUSY), FixedRetry(), clock)
    assert "attempt 1 failed, the next in 0.00 s: busy" in caplog.text


async def test_a_policy_of_one_s_own() -> None:
    """Two names are enough."""

    class Twice:
        attempts = 2

        def pause(self, attempt: int) -> float | None:
            return 0.0 if attempt < self.attempts else None

    clock = ManualClock()
    assert await retrying(Call(clock, BUSY), Twice(), clock) == "done"
    error: QueueRuntimeError = BUSY
    with pytest.raises(ServiceUnavailableError):
        await retrying(Call(clock, error, error), Twice(), clock)


async def test_a_policy_of_one_s_own_may_say_its_deadline_as_a_timedelta() -> None:
    class Own:
        attempts = 9
        deadline = timedelta(seconds=2)

        def pause(self, attempt: int) -> float | None:
            return 1.0

    clock = ManualClock()
    calls: list[float] = []

    async def call() -> None:
        calls.append(clock.monotonic())
        raise ServiceUnavailableError("busy")

    task = asyncio.create_task(retrying(call, checked_policy("retry", Own()), clock))
    await clock.advance(9.0)
    with pytest.raises(ServiceUnavailableError):
        await task
    assert calls == [0.0, 1.0, 2.0]
