"""The rules by which a consumer counts as stalled, and the watch that tells it."""

import itertools
import logging
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from queue_runtime.clock import ManualClock
from queue_runtime.progress import Held, Progress, ProgressWatch, Stall, stalls_of

STILL = Progress(received=5, handled=3, waiting=0, running=0, free=4, fetch_due=None)


@pytest.mark.parametrize(
    ("progress", "now", "still_for", "expected"),
    [
        (STILL, 100, 1000, set()),
        (STILL._replace(running=2), 100, 9.9, set()),
        (STILL._replace(running=2), 100, 10, {Stall.HANDLERS}),
        (STILL._replace(running=2, waiting=3), 100, 10, {Stall.HANDLERS}),
        (STILL._replace(waiting=3), 100, 10, {Stall.BEGINNING}),
        (STILL._replace(waiting=3, free=0), 100, 10, set()),
        (STILL._replace(waiting=3, is_paused=True), 100, 10, set()),
        (STILL._replace(fetch_due=90.1), 100, 0, set()),
        (STILL._replace(fetch_due=90.0), 100, 0, {Stall.FETCH}),
        (STILL._replace(fetch_due=90.0, running=1), 100, 10, {Stall.FETCH, Stall.HANDLERS}),
    ],
)
def test_the_rules(progress: Progress, now: float, still_for: float, expected: set[Stall]) -> None:
    assert stalls_of(progress, now, still_for, 10.0) == expected


class Body:
    """A consumer, as far as it is looked at."""

    queue_name = "orders"

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.state = STILL
        self.asked = self.fetches = 0
        self.fault: Exception | None = None

    def progress(self) -> Progress:
        if self.fault is not None:
            raise self.fault
        return self.state

    def oldest(self, count: int) -> Sequence[Held]:
        self.asked += 1
        return [Held("m-1", 61.0, "handle (app.py:7)"), Held("m-2", 60.0, None)][:count]

    def fetch_anew(self) -> None:
        self.fetches += 1

    def goes(self, **changes: int | float | bool | None) -> None:
        self.state = self.state._replace(**changes)


async def test_a_stall_is_told_once_and_again_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """With the handler, its message, and how long; nothing is asked for before."""
    body = Body()
    watch = ProgressWatch(body, 20.0)
    watch.start()
    body.goes(running=2, received=7)
    with caplog.at_level(logging.WARNING):
        await body.clock.advance(20)
        assert (watch.problems, body.asked) == ((), 0)
        await body.clock.advance(10)
        assert watch.problems == (
            "no handler of queue orders has ended for 20 s, and 2 run; the oldest: "
            "m-1 in handle (app.py:7), received 61 s ago, m-2 waiting, received 60 s ago",
        )
        assert watch.seconds_still >= 20
        await body.clock.advance(100)
        assert (caplog.text.count("stalled: "), body.asked) == (1, 1)
        body.goes(handled=4)
        await body.clock.advance(5)
        assert watch.problems == ()
    assert "it goes on, queue=orders, after 130.0 s in which no handler ends" in caplog.text
    watch.stop()
    watch.stop()
    assert body.clock._timers[-1][2].callback is None


async def test_messages_that_wait_for_nothing_are_told() -> None:
    body = Body()
    watch = ProgressWatch(body, 20.0)
    watch.start()
    body.goes(waiting=3)
    await body.clock.advance(30)
    assert watch.problems[0].startswith(
        "nothing has begun for 20 s on queue orders, although 3 messages wait and 4 handlers are free; the oldest: m-1"
    )
    watch.stop()


async def test_a_fetch_that_does_not_come_back_is_begun_anew_until_it_does(caplog: pytest.LogCaptureFixture) -> None:
    body = Body()
    watch = ProgressWatch(body, 20.0)
    watch.start()
    body.goes(fetch_due=30.0)
    await body.clock.advance(49)
    assert (watch.problems, body.fetches) == ((), 0)
    await body.clock.advance(1)
    assert watch.problems == ("a fetch from queue orders has been due for 20 s and is begun anew",)
    await body.clock.advance(10)
    assert body.fetches == 3
    body.goes(fetch_due=100.0)
    await body.clock.advance(5)
    assert (watch.problems, body.fetches) == ((), 3)
    watch.stop()


async def test_an_idle_consumer_is_not_stalled_however_long() -> None:
    """And what comes after that has its full time."""
    body = Body()
    watch = ProgressWatch(body, 20.0)
    watch.start()
    await body.clock.advance(10_000)
    assert watch.problems == ()
    body.goes(running=1, received=6)
    await body.clock.advance(19)
    assert watch.problems == ()
    watch.stop()


async def test_a_watch_that_fails_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    body = Body()
    watch = ProgressWatch(body, 20.0)
    watch.start()
    body.fault = ZeroDivisionError("bug")
    await body.clock.advance(20)
    body.fault = None
    body.goes(running=1)
    await body.clock.advance(40)
    assert "the watch over the progress failed" in caplog.text
    assert watch.problems
    watch.stop()


async def test_no_time_looks_at_nothing() -> None:
    body = Body()
    watch = ProgressWatch(body, math.inf)
    watch.start()
    assert body.clock._timers == []
    assert watch.problems == ()
    watch.stop()


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
async def test_whoever_moves_in_time_is_never_told(steps: list[tuple[int, bool]]) -> None:
    """And whoever does not is told at the latest a quarter late."""
    body = Body()
    watch = ProgressWatch(body, 20.0)
    watch.start()
    body.goes(running=1)
    still = 0.0
    numbers = itertools.count(10)
    for quarters, moves in steps:
        await body.clock.advance(quarters * 5.0)
        still += quarters * 5.0
        assert still > 20.0 or not watch.problems
        assert still < 30.0 or watch.problems
        if moves:
            body.goes(handled=next(numbers))
            await body.clock.advance(5.0)
            still = 5.0
            assert not watch.problems
    watch.stop()


async def test_what_could_not_move_does_not_stand_still(caplog: pytest.LogCaptureFixture) -> None:
    """A process that was stopped, by a debugger or with its machine, begins anew to count."""
    body = Body()
    watch = ProgressWatch(body, 20.0)
    watch.start()
    body.goes(running=2, fetch_due=3.0)
    await body.clock.advance(1)
    body.clock._now += 3600  # no timer fires meanwhile
    await body.clock.advance(0)
    body.goes(fetch_due=None)  # the answer was there already
    await body.clock.advance(19)
    assert (watch.problems, body.fetches, caplog.text) == ((), 0, "")
    await body.clock.advance(10)
    assert "no handler of queue orders has ended for 20 s" in watch.problems[0]
    watch.stop()
