"""The rules of scaling [C45]: bounds, calm, and what they do to a simulated queue."""

from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st
from queue_model import QueueModel, Seen

from queue_runtime import ConfigurationError, Limits, Load, Scaler, ScalingConfig

MOST = Limits(64, 1000, 4, 100)


def counts() -> st.SearchStrategy[int]:
    return st.integers(0, 10_000)


LOADS = st.builds(
    Load,
    rate=st.floats(0, 1e5),
    handler_seconds=st.floats(0, 100),
    busy=st.floats(0, 1),
    in_flight=counts(),
    waiting=counts(),
    depth=st.none() | counts(),
    lag=st.none() | st.floats(0, 1e6),
    sessions=st.integers(0, 100),
    runnable=st.none() | st.integers(0, 100),
)


def reversals(history: list[Seen]) -> int:
    """How often the concurrency went up after it had gone down, or the other way round."""
    values = [seen.limits.concurrency for seen in history]
    moves = [after > before for before, after in pairwise(values) if after != before]
    return sum(first != second for first, second in pairwise(moves))


def concurrencies(history: list[Seen]) -> set[int]:
    return {seen.limits.concurrency for seen in history}


@given(samples=st.lists(st.tuples(st.floats(0, 60), LOADS), max_size=60))
def test_whatever_is_seen_the_limits_stay_in_their_bounds_and_at_most_double(
    samples: list[tuple[float, Load]],
) -> None:
    config = ScalingConfig(min_concurrency=2, min_prefetch=3, max_prefetch=500, shrink_after=10)
    scaler = Scaler(config, MOST)
    assert scaler.lowest == (2, 3, 1, 1)
    assert scaler.highest == (64, 500, 4, 100)
    now, limits = 0.0, scaler.lowest
    for seconds, load in samples:
        now += seconds
        decided = scaler.decide(now, load, limits)
        for low, value, high, before in zip(scaler.lowest, decided, scaler.highest, limits, strict=True):
            assert low <= value <= high
            assert value <= 2 * before
        if load.runnable is not None and decided.concurrency > limits.concurrency:
            assert decided.concurrency <= load.runnable
        assert bool(scaler.reason) == (decided != limits) or scaler.reason
        limits = decided


@given(limits=st.builds(Limits, *[st.integers(1, 10_000)] * 4), load=LOADS)
def test_limits_that_somebody_else_set_are_brought_into_the_bounds(limits: Limits, load: Load) -> None:
    scaler = Scaler(ScalingConfig(), MOST)
    scaler.decide(0.0, load, scaler.lowest)
    decided = scaler.decide(1.0, load, limits)
    assert all(low <= value <= high for low, value, high in zip(scaler.lowest, decided, MOST, strict=True))


@settings(max_examples=20)
@given(rate=st.floats(0.5, 200), service=st.floats(0.002, 0.4))
def test_at_a_steady_load_the_limits_come_to_rest(rate: float, service: float) -> None:
    """The load fits the bounds: after the start nothing moves any more, however long one looks."""
    rate = min(rate, 40 / service)
    model = QueueModel(lambda now: rate, lambda running: service)
    scaler = Scaler(ScalingConfig(), MOST)
    start, steady = model.run(scaler, 120), model.run_on(scaler, 180)
    assert steady[-1].depth <= rate
    assert len(concurrencies(steady)) == 1, [(seen.time, seen.limits) for seen in steady]
    assert reversals(start) <= 1
    assert steady[-1].limits.concurrency >= rate * service


@pytest.mark.parametrize("seed", range(4))
def test_at_a_steady_random_load_the_limits_hardly_move(seed: int) -> None:
    """Poisson arrivals and exponential times: bursts may raise the limit, nothing makes it go up and down."""
    model = QueueModel(lambda now: 100, lambda running: 0.1, is_random=True, seed=seed)
    scaler = Scaler(ScalingConfig(), MOST)
    model.run(scaler, 60)
    history = model.run_on(scaler, 600)
    assert reversals(history) <= 2
    assert max(seen.depth for seen in history) < 200
    assert all(10 <= limit <= 40 for limit in concurrencies(history))


def test_a_step_of_load_is_followed_up_and_down() -> None:
    model = QueueModel(lambda now: 200 if 60 <= now < 160 else 0.0, lambda running: 0.05)
    scaler = Scaler(ScalingConfig(), MOST)
    history = model.run(scaler, 240)
    assert concurrencies(history[:59]) == {1}
    assert max(seen.depth for seen in history[70:]) == 0, "ten seconds after the step nothing waits"
    assert 10 <= history[120].limits.concurrency <= 20
    assert history[-1].limits == scaler.lowest
    assert reversals(history) == 1


@pytest.mark.parametrize("knows_depth", [True, False])
def test_it_finds_the_handlers_that_help(knows_depth: bool) -> None:
    """Beyond 12 handlers the throughput rises no more [P3]: it goes back, and rests there."""
    model = QueueModel(lambda now: 400, lambda running: 0.05 * max(1, running / 12))
    scaler = Scaler(ScalingConfig(), Limits(512, 5000))
    history = model.run(scaler, 300, knows_depth=knows_depth)
    if knows_depth:
        assert max(concurrencies(history)) <= 32, "never near the 512 that are allowed"
    late = [seen.limits.concurrency for seen in history[20:]]
    assert late.count(12) / len(late) > 0.9
    assert max(late) <= 15, "later attempts are small"
    assert model.handled > 0.97 * 240 * 300
    assert history[-1].load.rate == pytest.approx(240, rel=0.02)


def test_more_handlers_that_do_less_are_taken_back_at_once() -> None:
    """As plain handlers that compute do under the GIL."""
    model = QueueModel(lambda now: 200, lambda running: 0.01 * running * (1 + 0.05 * running))
    history = model.run(Scaler(ScalingConfig(), MOST), 120)
    assert max(concurrencies(history)) == 2
    values = [seen.limits.concurrency for seen in history]
    assert values.count(2) <= 3
    gaps = [after - before for before, after in pairwise([i for i, value in enumerate(values) if value == 2])]
    assert gaps == [30 + 1, 60 + 1], "each attempt waits twice as long"


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_them_among_random_times_too(seed: int) -> None:
    model = QueueModel(lambda now: 400, lambda running: 0.05 * max(1, running / 12), is_random=True, seed=seed)
    history = model.run(Scaler(ScalingConfig(), Limits(512, 5000)), 200)
    assert model.handled > 0.85 * 240 * 200
    late = [seen.limits.concurrency for seen in history[100:]]
    assert sum(late) / len(late) < 2 * 12
    assert max(late) <= 4 * 12


def test_when_the_service_behind_the_handlers_gets_slower_fewer_are_tried() -> None:
    """From 40 handlers that help to 8: it follows, without being told."""
    knee = {True: 40, False: 8}
    model = QueueModel(lambda now: 200, lambda running: 0.2 * max(1, running / knee[model.now < 100]))
    scaler = Scaler(ScalingConfig(), MOST)
    before = model.run(scaler, 100)
    assert 36 <= before[-1].limits.concurrency <= 64
    after = model.run_on(scaler, 400)
    assert after[-1].limits.concurrency <= 16
    assert after[-1].load.rate == pytest.approx(40, rel=0.1)


def test_slower_messages_do_not_cost_handlers_that_help() -> None:
    model = QueueModel(lambda now: 500, lambda running: 0.08 if model.now < 100 else 0.8)
    scaler = Scaler(ScalingConfig(), Limits(32, 1000))
    model.run(scaler, 100)
    history = model.run_on(scaler, 200)
    full = [seen.limits.concurrency == 32 for seen in history]
    assert sum(full) / len(full) > 0.95
    assert full[-1]


def test_slow_handlers_are_counted_over_their_own_time() -> None:
    """Handlers of ten seconds end in bursts: no interval by itself says how much they do."""
    model = QueueModel(lambda now: 2.0, lambda running: 10.0)
    scaler = Scaler(ScalingConfig(), MOST)
    history = model.run(scaler, 400)
    assert reversals(history) <= 1
    assert history[-1].depth == 0
    assert len(concurrencies(history[-100:])) == 1


def test_nothing_grows_before_the_first_handler_has_ended() -> None:
    """Handlers that hang say nothing about what more of them would do."""
    scaler = Scaler(ScalingConfig(), MOST)
    limits = scaler.decide(0, Load(), scaler.lowest)
    for now in range(1, 100):
        limits = scaler.decide(now, Load(busy=1.0, in_flight=2, waiting=1, depth=1000), limits)
    assert limits.concurrency == 1


@settings(max_examples=10)
@given(sessions=st.integers(1, 60), rate=st.floats(1, 400))
def test_there_are_never_more_handlers_than_sessions_that_can_run(sessions: int, rate: float) -> None:
    model = QueueModel(lambda now: rate, lambda running: 0.05, sessions=sessions)
    scaler = Scaler(ScalingConfig(), MOST)
    history = model.run(scaler, 60)
    for before, seen in pairwise(history):
        if seen.limits.concurrency > before.limits.concurrency:
            assert seen.limits.concurrency <= seen.load.runnable <= sessions
    capacity = sessions / 0.05
    late = sum(seen.load.rate for seen in history[-20:]) / 20
    assert late >= 0.85 * min(rate, capacity) - 0.1, "and as many as are needed"


def test_receives_are_added_while_handlers_lack_messages() -> None:
    """A receive brings 10 messages in 0.1 s: three are needed for 250 a second, and more would bring nothing."""
    model = QueueModel(lambda now: 250, lambda running: 0.01, round_trip=0.1)
    scaler = Scaler(ScalingConfig(), Limits(64, 1000, 1, 1))
    history = model.run(scaler, 120)
    assert history[-1].depth < 100
    assert 3 <= history[-1].limits.pollers <= 4
    assert len({seen.limits.pollers for seen in history[-60:]}) == 1


def test_receives_that_bring_no_more_are_taken_back() -> None:
    """The service answers 100 messages a second, whoever asks."""
    scaler = Scaler(ScalingConfig(), MOST)
    limits = scaler.decide(0, Load(), scaler.lowest)
    pollers = []
    for now in range(1, 61):
        load = Load(rate=100, handler_seconds=0.001, busy=min(1, 0.1 / limits.concurrency), in_flight=1, depth=9999)
        limits = scaler.decide(now, load, limits)
        pollers.append(limits.pollers)
    assert max(pollers) == 2
    assert pollers.count(2) <= 3


def test_the_backlog_asks_for_handlers_by_its_size() -> None:
    """100 messages of 0.1 s in 5 s are the work of two handlers more; in half a second, of twenty."""
    for target_lag, handlers in ((5.0, 9), (0.5, 16)):
        scaler = Scaler(ScalingConfig(min_concurrency=8, target_lag=target_lag), MOST)
        scaler.decide(0, Load(), scaler.lowest)
        load = Load(rate=40, handler_seconds=0.1, busy=0.5 if target_lag == 5 else 0.72, in_flight=8, depth=100)
        decided = scaler.decide(1, load, scaler.lowest)
        assert decided.concurrency == {9: 8, 16: 16}[handlers]


def test_the_age_of_messages_stands_in_for_an_unknown_depth() -> None:
    """By Little's law: those that wait are the throughput times the time that one waits."""
    known, by_age = (Scaler(ScalingConfig(), MOST) for _ in range(2))
    load = Load(rate=20, handler_seconds=0.05, busy=1.0, in_flight=2, waiting=1)
    limits = known.lowest
    known.decide(0, Load(), limits)
    by_age.decide(0, Load(), limits)
    assert known.decide(1, load._replace(depth=200), limits) == by_age.decide(1, load._replace(lag=10.0), limits)
    assert known.reason == by_age.reason


def test_what_was_set_meanwhile_voids_the_trial() -> None:
    """Memory pressure took the handlers back: their throughput says nothing of the growth."""
    scaler = Scaler(ScalingConfig(hold=1000), MOST)
    limits = scaler.decide(0, Load(), scaler.lowest)
    load = Load(rate=2000, handler_seconds=0.0005, busy=1.0, in_flight=2, waiting=1, depth=1_000_000)
    assert scaler.decide(1, load, limits).concurrency == 2
    assert scaler.decide(2, load, limits).concurrency == 2, "it is tried again, not found useless"


def test_nothing_shrinks_before_it_was_seen_for_long_enough() -> None:
    scaler = Scaler(ScalingConfig(shrink_after=30), MOST)
    limits = Limits(20, 100, 1, 1)
    times = []
    for now in range(40):
        decided = scaler.decide(now, Load(), limits)
        if decided.concurrency < limits.concurrency:
            times.append(now)
        limits = decided
    assert times == [30]


def test_time_that_stands_still_or_goes_back_changes_no_verdict() -> None:
    scaler = Scaler(ScalingConfig(), MOST)
    limits = scaler.lowest
    for now in (0.0, 1.0, 1.0, 0.5, 0.0, 2.0):
        limits = scaler.decide(now, Load(rate=20, handler_seconds=0.05, busy=1.0, depth=100), limits)
    assert limits.concurrency <= 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_concurrency", 0),
        ("max_concurrency", 0),
        ("max_prefetch", 1),
        ("min_pollers", True),
        ("max_sessions", 2.5),
        ("target_lag", 0),
        ("target_busy", 1.5),
        ("target_busy", 0.4),
        ("grow_above", 0.6),
        ("shrink_below", -0.1),
        ("shrink_below", float("nan")),
        ("min_gain", "much"),
        ("shrink_after", -1),
        ("interval", 0),
        ("idle_interval", 0.5),
        ("count_interval", float("inf")),
        ("hold", -1),
        ("hold_ahead", None),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: object) -> None:
    """[C33]"""
    with pytest.raises(ConfigurationError) as caught:
        ScalingConfig(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field or (field == "shrink_below" and caught.value.field == "target_busy")


def test_durations_may_be_timedeltas() -> None:
    assert ScalingConfig(shrink_after=timedelta(minutes=1)).shrink_after == 60.0


def test_a_minimum_above_what_the_consumer_has_wins() -> None:
    assert Scaler(ScalingConfig(min_concurrency=8), Limits(4, 10)).highest.concurrency == 8


@pytest.mark.parametrize(
    ("field", "small", "large"),
    [
        ("target_lag", 1.0, 50.0),
        ("grow_above", 0.71, 1.0),
        ("target_busy", 0.51, 0.89),
        ("shrink_below", 0.1, 0.69),
        ("shrink_after", 2.0, 60.0),
        ("min_gain", 0.0, 1.0),
        ("hold", 5.0, 100.0),
        ("hold_ahead", 0.1, 2.0),
        ("min_concurrency", 1, 20),
        ("max_concurrency", 4, 64),
        ("min_prefetch", 2, 300),
        ("max_prefetch", 5, 900),
    ],
)
def test_every_setting_changes_what_is_decided(field: str, small: float, large: float) -> None:
    """[C46]"""

    def decisions(value: float) -> list[Limits]:
        config = ScalingConfig(**{"max_concurrency": 32, field: value})  # type: ignore[arg-type]
        model = QueueModel(
            lambda now: 300 if now < 60 else 60, lambda running: 0.05 * max(1, running / 12), is_random=True
        )
        return [seen.limits for seen in model.run(Scaler(config, MOST), 150)]

    assert decisions(small) != decisions(large)
