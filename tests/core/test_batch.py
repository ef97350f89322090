"""The adaptive batch sizer [C43] against an obvious twin."""

import math
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, strategies as st

from queue_runtime._core.batch import AdaptiveBatchSizer
from queue_runtime.errors import ValidationError

counts = st.integers(0, 10_000)
seconds = st.one_of(st.just(0.0), st.floats(0, 1e4), st.floats(0, 1e-300), st.floats(1e9, 1e10))


def model(least: int, most: int, target: float, batches: list[tuple[int, float]]) -> Fraction:
    recent = [(count, duration) for count, duration in batches[-10:] if count]
    if not recent:
        return Fraction(least)
    total = sum(Fraction(duration) for _, duration in recent)
    mean = total / sum(count for count, _ in recent)
    if mean == 0:
        return Fraction(most)
    return min(max(Fraction(target) / mean, Fraction(least)), Fraction(most))


@given(
    st.integers(1, 500), st.integers(0, 5000), st.floats(1e-3, 1e3), st.lists(st.tuples(counts, seconds), max_size=70)
)
def test_as_the_twin(least: int, span: int, target: float, batches: list[tuple[int, float]]) -> None:
    sizer = AdaptiveBatchSizer(least, least + span, target)
    assert sizer.calculate_optimal_batch_size() == least
    for number, (count, duration) in enumerate(batches, 1):
        sizer.record(count, duration)
        expected = model(least, least + span, target, batches[:number])
        # The sum of the doubles is rounded: next to a whole number the floor may be either one.
        allowed = {math.floor(expected * (1 + Fraction(part, 10**12))) for part in (-1, 1)}
        assert sizer.calculate_optimal_batch_size() in {min(max(size, least), least + span) for size in allowed}
    assert [record[:2] for record in sizer.history] == batches[-50:]


def test_the_mean_of_the_last_ten_batches() -> None:
    sizer = AdaptiveBatchSizer(1, 1000, timedelta(seconds=1))
    for _ in range(20):
        sizer.record(10, 100.0)
    assert sizer.calculate_optimal_batch_size() == 1
    for _ in range(10):
        sizer.record(100, timedelta(seconds=1), timedelta(milliseconds=900), 99)
    assert sizer.calculate_optimal_batch_size() == 100
    assert sizer.history[-1] == (100, 1.0, 0.9, 99)
    assert sizer.history[0] == (10, 100.0, None, None)
    sizer.record(1000, 1)
    assert sizer.calculate_optimal_batch_size() == 190  # 1900 messages in 10 s


def test_no_time_is_the_maximum_and_no_messages_say_nothing() -> None:
    sizer = AdaptiveBatchSizer(3, 40, 0.5)
    sizer.record(0, 9.0)
    assert sizer.calculate_optimal_batch_size() == 3
    sizer.record(5, 0)
    assert sizer.calculate_optimal_batch_size() == 40
    sizer.record(5, 5e-324)
    assert sizer.calculate_optimal_batch_size() == 40


@pytest.mark.parametrize(
    "bad", [-1, -0.001, math.nan, math.inf, -math.inf, 1e11, 10**400, timedelta(-1), "1", None, True]
)
def test_durations_out_of_range(bad: Any) -> None:
    sizer = AdaptiveBatchSizer(1, 10, 1)
    with pytest.raises(ValidationError, match="total_duration: must be "):
        sizer.record(1, bad)
    if bad is not None:
        with pytest.raises(ValidationError, match="processing_duration: must be "):
            sizer.record(1, 1, bad)
    with pytest.raises(ValidationError, match="target_batch_duration: must be "):
        AdaptiveBatchSizer(1, 10, bad)
    assert sizer.history == ()


@pytest.mark.parametrize("bad", [-1, 1.0, "1", None, True, 10**400])
def test_counts_out_of_range(bad: Any) -> None:
    sizer = AdaptiveBatchSizer(1, 10, 1)
    with pytest.raises(ValidationError, match="message_count: must be "):
        sizer.record(bad, 1)
    if bad is not None:
        with pytest.raises(ValidationError, match="success_count: must be "):
            sizer.record(1, 1, 1, bad)
    assert sizer.history == ()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((0, 1, 1), "min_batch_size"),
        ((5, 4, 1), "max_batch_size"),
        ((1, 10**10, 1), "max_batch_size"),
        ((1.5, 4, 1), "min_batch_size"),
        ((1, 4, 0), "target_batch_duration"),
    ],
)
def test_bad_limits(arguments: tuple[Any, Any, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AdaptiveBatchSizer(*arguments)
    assert caught.value.field == field


def test_more_successes_than_messages() -> None:
    sizer = AdaptiveBatchSizer(1, 10, 1)
    with pytest.raises(ValidationError, match="success_count: must be 0 to 3, not 4"):
        sizer.record(3, 1, None, 4)


def test_repr() -> None:
    assert repr(AdaptiveBatchSizer(1, 10, 2)).endswith("target_batch_duration=2.0): 1")
