"""Whether a series of samples is flat: a robust slope, and how sure it is.

The slope is Theil and Sen's: the median of the slopes between all pairs of samples, which a few outliers do not move
(P. K. Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968, which also gives the interval).
Samples of one process follow each other closely; the interval is widened by their autocorrelation at lag one, as if
there were fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Literal, NamedTuple

MOST = 240
"""Points that are compared in pairs; more samples are joined into so many medians."""
FEWEST = 20
"""Samples below which nothing is said."""
SURE = 1.96
"""Standard deviations on both sides of an interval of 95 %."""


class Trend(NamedTuple):
    """A series, over the time that was looked at."""

    median: float
    change: float
    """By the slope, over the whole time."""
    low: float
    high: float
    """Bounds of the change, with 95 % confidence."""
    samples: int


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Return how the values change over the times, both in order."""
    count = len(values)
    if count < 3:
        middle = median(values) if values else 0.0
        return Trend(middle, 0.0, -math.inf, math.inf, count)
    at, points = _joined(times), _joined(values)
    n, span = len(points), times[-1] - times[0]
    slopes = sorted(
        (points[j] - points[i]) / (at[j] - at[i]) for i in range(n) for j in range(i + 1, n) if at[j] > at[i]
    )
    slope = median(slopes)
    rest = [point - slope * time for time, point in zip(at, points, strict=True)]
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18 * _inflation(rest))
    first = max(0, math.floor((len(slopes) - SURE * deviation) / 2))
    last = min(len(slopes) - 1, math.ceil((len(slopes) + SURE * deviation) / 2))
    return Trend(median(values), slope * span, slopes[first] * span, slopes[last] * span, count)


def verdict(found: Trend, tolerance: float, direction: Literal["up", "down"]) -> bool | None:
    """Return whether it is flat; None when there are too few samples to tell.

    Not flat is what surely changes by more than ``tolerance`` (in the values' unit) in the bad ``direction``.
    """
    if found.samples < FEWEST:
        return None
    return found.low <= tolerance if direction == "up" else found.high >= -tolerance


def _joined(values: Sequence[float]) -> list[float]:
    """The medians of equal groups, at most MOST."""
    size = math.ceil(len(values) / MOST)
    return [median(values[start : start + size]) for start in range(0, len(values), size)]


def _inflation(rest: Sequence[float]) -> float:
    """How many samples count for one."""
    mean = fmean(rest)
    total = sum((value - mean) ** 2 for value in rest)
    if not total:
        return 1.0
    together = sum((a - mean) * (b - mean) for a, b in pairwise(rest))
    likeness = min(0.9, max(0.0, together / total))
    return (1 + likeness) / (1 - likeness)
