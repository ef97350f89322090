"""The circuit breaker [C35]: its states against a twin that reads the whole history, its waiting, its call."""

import asyncio
import contextlib
import gc
import logging
import weakref
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from queue_runtime.breaker import BreakerConfig, BreakerState, CircuitBreaker
from queue_runtime.clock import ManualClock, settle_tasks
from queue_runtime.errors import CircuitOpenError, ConfigurationError

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
ERROR = ConnectionError("down")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def breaker(clock: ManualClock) -> CircuitBreaker:
    return CircuitBreaker(BreakerConfig(), clock)


def trip(breaker: CircuitBreaker) -> None:
    for _ in range(5):
        assert breaker.may_try()
        breaker.failed(ERROR)


def live_timers(clock: ManualClock) -> int:
    return sum(timer.callback is not None for _, _, timer in clock._timers)


# The rules, in order.


def test_it_opens_after_five_failures_in_a_row(breaker: CircuitBreaker) -> None:
    """[C35] A success in between begins the count anew."""
    for _ in range(4):
        breaker.failed(ERROR)
    breaker.succeeded()
    for _ in range(4):
        breaker.failed(ERROR)
        assert breaker.state is CLOSED
        assert breaker.may_try()
    breaker.failed(ERROR)
    assert breaker.state is OPEN
    assert not breaker.may_try()
    assert breaker.retry_after == 30.0


async def test_it_is_half_open_after_thirty_seconds(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C35] And lets one try through at a time."""
    trip(breaker)
    await clock.advance(29.9)
    assert breaker.state is OPEN
    assert breaker.retry_after == pytest.approx(0.1)
    assert not breaker.may_try()
    await clock.advance(0.1)
    assert breaker.state is HALF_OPEN
    assert breaker.retry_after == 0.0
    assert breaker.may_try()
    assert not breaker.may_try()
    breaker.abstained()
    assert breaker.may_try()
    assert not breaker.may_try()


async def test_it_closes_after_three_successes(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C35] Then five failures in a row are needed again."""
    trip(breaker)
    await clock.advance(30)
    for _ in range(3):
        assert breaker.state is HALF_OPEN
        assert breaker.may_try()
        breaker.succeeded()
    assert breaker.state is CLOSED
    for _ in range(4):
        breaker.failed(ERROR)
    assert breaker.state is CLOSED


async def test_a_failed_try_opens_it_for_the_whole_time(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C35] And the successes before it are forgotten."""
    trip(breaker)
    for _ in range(3):
        await clock.advance(30)
        for _ in range(2):
            assert breaker.may_try()
            breaker.succeeded()
        assert breaker.may_try()
        breaker.failed(ERROR)
        assert breaker.state is OPEN
        assert breaker.retry_after == 30.0


async def test_results_of_earlier_calls_do_not_move_it(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """Those that began before it opened and end while it is open, half-open, or closed again."""
    before = breaker.changes
    trip(breaker)
    await clock.advance(10)
    breaker.failed(ERROR)
    breaker.succeeded()
    assert breaker.retry_after == 20.0
    await clock.advance(20)
    assert breaker.may_try()
    during = breaker.changes
    for _ in range(9):
        breaker.succeeded(before)
        breaker.failed(ERROR, before)
        breaker.abstained(before)
    assert breaker.state is HALF_OPEN
    assert not breaker.may_try()
    breaker.succeeded(during)
    breaker.succeeded()
    breaker.failed(ERROR)  # no try is under way: this cannot be its result
    assert breaker.state is HALF_OPEN
    for _ in range(2):
        assert breaker.may_try()
        breaker.succeeded(during)
    assert breaker.state is CLOSED
    for _ in range(9):
        breaker.failed(ERROR, before)
        breaker.failed(ERROR, during)
    assert breaker.state is CLOSED


async def test_what_does_not_count_changes_nothing(clock: ManualClock) -> None:
    """A bad message is no outage: neither a failure nor a success."""
    breaker = CircuitBreaker(BreakerConfig(counts=lambda error: isinstance(error, ConnectionError)), clock)
    for _ in range(4):
        breaker.failed(ERROR)
        breaker.failed(ValueError("bad message"))
    assert breaker.state is CLOSED
    breaker.failed(ERROR)
    assert breaker.state is OPEN
    await clock.advance(30)
    assert breaker.may_try()
    breaker.failed(ValueError("bad message"))
    assert breaker.state is HALF_OPEN
    assert breaker.may_try()


async def test_changes_are_told(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """Once each, in order, when the state is the new one; a listener that fails is logged."""
    told: list[tuple[BreakerState, BreakerState]] = []

    def on_change(old: BreakerState, new: BreakerState) -> None:
        assert breaker.state is new
        told.append((old, new))
        raise ZeroDivisionError("listener")

    breaker = CircuitBreaker(BreakerConfig(failures=1, successes=1), clock, on_change)
    breaker.failed(ERROR)
    assert told == [(CLOSED, OPEN)]
    await clock.advance(30)
    assert told == [(CLOSED, OPEN)], "nobody asked yet"
    assert breaker.state is HALF_OPEN
    assert breaker.may_try()
    breaker.succeeded()
    assert told == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]
    assert breaker.changes == 3
    assert caplog.text.count("on_change of a circuit breaker failed") == 3


def test_a_rule_that_fails_counts(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    def broken(error: BaseException) -> bool:
        raise ZeroDivisionError

    breaker = CircuitBreaker(BreakerConfig(failures=2, counts=broken), clock)
    breaker.failed(ERROR)
    breaker.failed(ERROR)
    assert breaker.state is OPEN
    assert "the breaker's rule failed" in caplog.text


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("failures", [0, -1, 1.5, True, None, "5"]),
        ("open_for", [0, -1, float("nan"), float("inf"), True, None, "30"]),
        ("successes", [0, 2.5, False, None]),
        ("counts", [5, "all", True]),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, values: list[Any]) -> None:
    """[C33]"""
    for value in values:
        with pytest.raises(ConfigurationError) as caught:
            BreakerConfig(**{field: value})
        assert caught.value.field == field
    assert BreakerConfig(open_for=timedelta(minutes=1)).open_for == 60.0


def test_every_field_changes_behaviour(clock: ManualClock) -> None:
    """[C46]"""
    for failures in (1, 3):
        breaker = CircuitBreaker(BreakerConfig(failures=failures), clock)
        for number in range(1, 5):
            breaker.failed(ERROR)
            assert (breaker.state is OPEN) == (number >= failures)
    for open_for in (1.0, 60.0):
        breaker = CircuitBreaker(BreakerConfig(failures=1, open_for=open_for), clock)
        breaker.failed(ERROR)
        assert breaker.retry_after == open_for
    for successes in (1, 4):
        breaker = CircuitBreaker(BreakerConfig(failures=1, open_for=1, successes=successes), clock)
        breaker.failed(ERROR)
        clock._now += 1
        for number in range(1, 5):
            breaker.may_try()
            breaker.succeeded()
            assert (breaker.state is CLOSED) == (number >= successes)


def test_what_it_is(breaker: CircuitBreaker) -> None:
    assert repr(breaker) == "<CircuitBreaker closed>"
    trip(breaker)
    assert repr(breaker) == "<CircuitBreaker open>"
    assert CircuitBreaker().may_try()


# Waiting.


async def test_waiting_ends_when_a_call_is_allowed(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C35] At once when it is closed; at the time when it is open; when the try is given back."""
    await breaker.wait_until_allowed()
    trip(breaker)
    waiters = [asyncio.create_task(breaker.wait_until_allowed()) for _ in range(3)]
    await clock.advance(29)
    assert live_timers(clock) == 1
    assert not any(waiter.done() for waiter in waiters)
    await clock.advance(1)
    assert all(waiter.done() for waiter in waiters)
    assert breaker.may_try()
    waiters = [asyncio.create_task(breaker.wait_until_allowed()) for _ in range(3)]
    await clock.advance(100)
    assert not any(waiter.done() for waiter in waiters)
    breaker.abstained()
    await settle_tasks()
    assert all(waiter.done() for waiter in waiters)
    assert live_timers(clock) == 0


async def test_waiting_goes_on_when_the_try_fails(breaker: CircuitBreaker, clock: ManualClock) -> None:
    trip(breaker)
    await clock.advance(30)
    assert breaker.may_try()
    waiter = asyncio.create_task(breaker.wait_until_allowed())
    await settle_tasks()
    breaker.failed(ERROR)
    await clock.advance(29.9)
    assert not waiter.done()
    await clock.advance(0.1)
    assert waiter.done()


async def test_only_one_of_many_who_waited_gets_the_try(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C35] The loop of a fetcher, five times: one probes, the others wait, until it is closed."""
    running = most = calls = 0

    async def fetch() -> None:
        nonlocal running, most, calls
        while not breaker.may_try():
            await breaker.wait_until_allowed()
        probing = breaker.state is HALF_OPEN
        calls += 1
        running += probing
        most = max(most, running)
        await asyncio.sleep(0)
        running -= probing
        breaker.succeeded()

    trip(breaker)
    tasks = [asyncio.create_task(fetch()) for _ in range(5)]
    await clock.advance(29)
    assert calls == 0
    await clock.advance(1)
    assert calls == 5
    assert most == 1
    assert breaker.state is CLOSED
    await asyncio.gather(*tasks)


async def test_a_cancelled_wait_leaves_nothing(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C38] The timer goes with the last waiter."""
    trip(breaker)
    waiters = [asyncio.create_task(breaker.wait_until_allowed()) for _ in range(2)]
    await settle_tasks()
    for waiter, left in zip(waiters, (1, 0), strict=True):
        assert live_timers(clock) == 1
        waiter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiter
        assert live_timers(clock) == left
    assert breaker._waiters == set()


@pytest.mark.both_loops
async def test_on_the_real_clock() -> None:
    """A timer of the loop may be early by its resolution: the wait is no shorter than it should be."""
    for _ in range(5):
        breaker = CircuitBreaker(BreakerConfig(failures=1, open_for=0.0113))
        breaker.failed(ERROR)
        async with asyncio.timeout(2):
            await breaker.wait_until_allowed()
        assert breaker.may_try()


async def test_it_is_collected(clock: ManualClock) -> None:
    """Waited for or not, no timer refers to it any more."""
    breaker = CircuitBreaker(BreakerConfig(failures=1))

    class Marker:
        pass

    marker = Marker()
    breaker._on_change = lambda old, new, marker=marker: None  # type: ignore[misc]
    seen = weakref.ref(marker)
    breaker.failed(ERROR)
    waiter = asyncio.create_task(breaker.wait_until_allowed())
    await settle_tasks()
    waiter.cancel()
    await asyncio.wait([waiter])
    del breaker, marker, waiter
    await settle_tasks()
    gc.collect()
    assert seen() is None


# The call.


async def test_an_open_breaker_refuses_at_once(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C35] Without the call; the error says when to come back."""
    calls = 0

    async def down() -> None:
        nonlocal calls
        calls += 1
        raise ERROR

    for _ in range(5):
        with pytest.raises(ConnectionError):
            await breaker.call(down)
    await clock.advance(12)
    with pytest.raises(CircuitOpenError) as caught:
        await breaker.call(down)
    assert caught.value.retry_after == 18.0
    assert not caught.value.is_transient
    assert calls == 5
    await clock.advance(18)
    with pytest.raises(ConnectionError):
        await breaker.call(down)
    with pytest.raises(CircuitOpenError):
        await breaker.call(down)
    assert calls == 6


async def test_calls_close_it_again(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C35] While a try is under way, the others are refused."""
    trip(breaker)
    await clock.advance(30)
    go = asyncio.Event()

    async def slow() -> str:
        await go.wait()
        return "done"

    for _ in range(3):
        go.clear()
        task = asyncio.create_task(breaker.call(slow))
        await settle_tasks()
        with pytest.raises(CircuitOpenError) as caught:
            await breaker.call(slow)
        assert caught.value.retry_after is None
        go.set()
        assert await task == "done"
    assert breaker.state is CLOSED


async def test_a_cancelled_call_counts_for_nothing(breaker: CircuitBreaker, clock: ManualClock) -> None:
    """[C38] And gives its try back."""

    async def hang() -> None:
        await asyncio.Event().wait()

    for _ in range(6):
        task = asyncio.create_task(breaker.call(hang))
        await settle_tasks()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    assert breaker.state is CLOSED
    trip(breaker)
    await clock.advance(30)
    task = asyncio.create_task(breaker.call(hang))
    await settle_tasks()
    assert not breaker.may_try()
    task.cancel()
    await asyncio.wait([task])
    assert breaker.state is HALF_OPEN
    assert breaker.may_try()


async def test_a_late_call_does_not_open_it_again(breaker: CircuitBreaker, clock: ManualClock) -> None:
    go = asyncio.Event()

    async def late() -> None:
        await go.wait()
        raise ERROR

    tasks = [asyncio.create_task(breaker.call(late)) for _ in range(9)]
    await settle_tasks()
    trip(breaker)
    await clock.advance(30)
    assert breaker.may_try()
    go.set()
    await asyncio.wait(tasks)
    assert all(isinstance(task.exception(), ConnectionError) for task in tasks)
    assert breaker.state is HALF_OPEN
    assert not breaker.may_try(), "the try is still under way"


async def test_its_opening_is_logged(breaker: CircuitBreaker, caplog: pytest.LogCaptureFixture) -> None:
    """[C50] Unless somebody is told of it, who can say which one it is."""
    with caplog.at_level(logging.DEBUG):
        CircuitBreaker(BreakerConfig(failures=1), on_change=lambda old, new: None).failed(ERROR)
        assert caplog.text == ""
        trip(breaker)
    assert "a circuit breaker was closed, is open" in caplog.text


# Against a twin.


class Twin:
    """Reads everything that ever happened, from the beginning, each time that it is asked."""

    def __init__(self, config: BreakerConfig) -> None:
        self.config = config
        self.history: list[tuple[float, str, int | None]] = []

    def tell(self, now: float, what: str, call: int | None = None) -> None:
        self.history.append((now, what, call))

    def read(self, now: float) -> tuple[BreakerState, bool, int, float]:
        """The state, whether a call is allowed, how often the state changed, and when it opened last."""
        state, row, opened, changes = CLOSED, 0, 0.0, 0
        allowed_in: dict[int, int] = {}
        probe: int | None = None
        for time, what, call in [*self.history, (now, "look", None)]:
            if state is OPEN and time >= opened + float(self.config.open_for):  # type: ignore[arg-type]
                state, row, probe, changes = HALF_OPEN, 0, None, changes + 1
            if what == "begin":
                assert call is not None
                if state is HALF_OPEN:
                    probe = call
                allowed_in[call] = changes
            elif what in ("success", "failure", "nothing") and call is not None:
                if allowed_in[call] != changes:
                    continue
                if state is HALF_OPEN:
                    assert probe == call
                    probe = None
                if state is OPEN or what == "nothing":
                    continue
                wanted = "failure" if state is CLOSED else "success"
                if what == wanted:
                    row += 1
                    limit = self.config.failures if state is CLOSED else self.config.successes
                    if row >= limit:
                        state, row, changes = (OPEN if state is CLOSED else CLOSED), 0, changes + 1
                        opened = time
                elif state is CLOSED:
                    row = 0
                else:
                    state, row, opened, changes = OPEN, 0, time, changes + 1
        allowed = state is CLOSED or (state is HALF_OPEN and probe is None)
        return state, allowed, changes, opened


class BreakerMachine(RuleBasedStateMachine):
    """Calls that begin and end in any order, time that passes, and tasks that wait, beside the twin."""

    @initialize(failures=st.integers(1, 3), successes=st.integers(1, 3), open_for=st.sampled_from([1.0, 2.5]))
    def begin(self, failures: int, successes: int, open_for: float) -> None:
        config = BreakerConfig(
            failures=failures,
            successes=successes,
            open_for=open_for,
            counts=lambda error: isinstance(error, ConnectionError),
        )
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.told: list[tuple[BreakerState, BreakerState]] = []
        self.breaker = CircuitBreaker(config, self.clock, lambda old, new: self.told.append((old, new)))
        self.twin = Twin(config)
        self.calls: dict[int, int] = {}
        """Those under way, and the number of changes when they were allowed."""
        self.begun = 0
        self.waiters: list[asyncio.Task[None]] = []

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for waiter in self.waiters:
                waiter.cancel()
            self.loop.run_until_complete(settle_tasks())
            assert live_timers(self.clock) == 0
            assert self.breaker._waiters == set()
            self.loop.close()

    def turn(self, seconds: float = 0.0) -> None:
        self.loop.run_until_complete(self.clock.advance(seconds))

    @rule()
    def try_to_call(self) -> None:
        allowed = self.twin.read(self.clock.monotonic())[1]
        assert self.breaker.may_try() is allowed
        if allowed:
            self.begun += 1
            self.calls[self.begun] = self.breaker.changes
            self.twin.tell(self.clock.monotonic(), "begin", self.begun)

    @precondition(lambda self: self.calls)
    @rule(what=st.sampled_from(["success", "success", "failure", "failure", "nothing", "unrelated"]), data=st.data())
    def end_a_call(self, what: str, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(sorted(self.calls)))
        since = self.calls.pop(call)
        if what == "success":
            self.breaker.succeeded(since)
        elif what == "failure":
            self.breaker.failed(ERROR, since)
        elif what == "nothing":
            self.breaker.abstained(since)
        else:
            self.breaker.failed(ValueError("bad message"), since)
        self.twin.tell(self.clock.monotonic(), "nothing" if what == "unrelated" else what, call)

    @rule(seconds=st.sampled_from([0.4, 0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.turn(seconds)

    @rule()
    def begin_waiting(self) -> None:
        self.waiters.append(self.loop.create_task(self.breaker.wait_until_allowed()))

    @precondition(lambda self: self.waiters)
    @rule()
    def give_up_waiting(self) -> None:
        self.waiters.pop().cancel()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.turn()
        now = self.clock.monotonic()
        state, allowed, changes, opened = self.twin.read(now)
        waiting = [waiter for waiter in self.waiters if not waiter.done()]
        if allowed:
            assert waiting == []
        self.waiters = waiting
        assert live_timers(self.clock) == (1 if waiting and state is OPEN else 0)
        assert self.breaker.state is state
        assert self.breaker.changes == changes == len(self.told)
        assert all(one[1] is next_[0] for one, next_ in zip(self.told, self.told[1:], strict=False))
        expected = max(0.0, opened + self.breaker._open_for - now) if state is OPEN else 0.0
        assert self.breaker.retry_after == pytest.approx(expected)


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
