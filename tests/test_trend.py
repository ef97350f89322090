"""What the soak calls flat."""

import random

import pytest

from bench.trend import FEWEST, trend, verdict


def noisy(seed: int, count: int, slope: float, *, spread: float = 3.0, steps: float = 0.0) -> list[float]:
    """A level of 100 with noise, outliers, and a slow wander if asked for."""
    chance = random.Random(seed)
    values, wander = [], 0.0
    for number in range(count):
        wander = 0.9 * wander + chance.gauss(0, steps)
        outlier = 80.0 if chance.random() < 0.03 else 0.0
        values.append(100.0 + slope * number + chance.gauss(0, spread) + outlier + wander)
    return values


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("steps", [0.0, 1.0])
def test_noise_outliers_and_wander_are_flat(seed: int, steps: float) -> None:
    values = noisy(seed, 200, 0.0, steps=steps)
    found = trend(range(200), values)
    assert found.low < found.change < found.high
    assert verdict(found, 4.0, "up")
    assert verdict(found, 4.0, "down")


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(("count", "slope"), [(200, 0.1), (3000, 0.02)])
def test_a_slow_leak_is_not(seed: int, count: int, slope: float) -> None:
    found = trend(range(count), noisy(seed, count, slope))
    assert found.change == pytest.approx(slope * count, rel=0.3)
    assert verdict(found, 4.0, "up") is False
    assert verdict(found, 4.0, "down") is True
    fallen = trend(range(count), noisy(seed, count, -slope))
    assert verdict(fallen, 4.0, "down") is False
    assert verdict(fallen, 4.0, "up") is True


def test_a_constant_and_too_few() -> None:
    assert trend(range(50), [7.0] * 50) == (7.0, 0.0, 0.0, 0.0, 50)
    assert verdict(trend(range(FEWEST - 1), [7.0] * (FEWEST - 1)), 1.0, "up") is None
    assert verdict(trend([], []), 1.0, "up") is None
