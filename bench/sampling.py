"""What the soak measures of its own process each second, and what it makes of it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table

from bench.trend import Trend, trend, verdict

WARM_UP = 0.25
"""The share of the run that is not judged: caches fill, the heap finds its size."""


class Sample(NamedTuple):
    """One second. Sizes in MB, times in seconds unless it says otherwise."""

    time: float
    rss: float
    pss: float
    objects: float
    """Blocks that Python's allocator has given out, in thousands."""
    cpu: float
    """Percent of one processor."""
    rate: float
    p50: float
    """Milliseconds from sending to completion, of what is completed at its first delivery."""
    p99: float
    files: float
    tasks: float
    threads: float


SERIES: dict[str, tuple[str, str]] = {
    "rss": ("RSS", "MB"),
    "pss": ("PSS", "MB"),
    "objects": ("Python objects", "thousand"),
    "cpu": ("CPU", "% of one"),
    "rate": ("completed", "/s"),
    "p50": ("latency p50", "ms"),
    "p99": ("latency p99", "ms"),
    "files": ("file descriptors", ""),
    "tasks": ("tasks", ""),
    "threads": ("threads", ""),
}
"""Of each series: its name and its unit."""
TOLERANCES: dict[str, tuple[Literal["up", "down"], float, float]] = {
    "rss": ("up", 0.03, 2.0),
    "pss": ("up", 0.03, 2.0),
    "objects": ("up", 0.05, 10.0),
    "cpu": ("up", 0.15, 5.0),
    "rate": ("down", 0.1, 0.0),
    "p50": ("up", 0.5, 5.0),
    "p99": ("up", 0.5, 50.0),
    "files": ("up", 0.0, 1.0),
    "tasks": ("up", 0.15, 10.0),
    "threads": ("up", 0.0, 1.0),
}
"""Of each series: the bad direction, and the change that is let pass, as a part of the median and at least so much."""


class Sampler:
    """Takes the samples. Thread-safety: for the event loop's thread."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._cpu = time.process_time()
        self._completed = 0

    def take(self, completed: int, latencies: Sequence[float]) -> Sample:
        """``completed`` since the start, and the latencies since the last sample, in seconds."""
        now, cpu = time.monotonic(), time.process_time()
        passed = now - self._last
        memory = _memory()
        ordered = sorted(latencies) or [0.0]
        sample = Sample(
            time=now - self._started,
            rss=memory["Rss"] / 1024,
            pss=memory["Pss"] / 1024,
            objects=sys.getallocatedblocks() / 1000,
            cpu=(cpu - self._cpu) / passed * 100,
            rate=(completed - self._completed) / passed,
            p50=ordered[len(ordered) // 2] * 1000,
            p99=ordered[int(len(ordered) * 0.99)] * 1000,
            files=len(os.listdir("/proc/self/fd")),
            tasks=len(asyncio.all_tasks()),
            threads=threading.active_count(),
        )
        self._last, self._cpu, self._completed = now, cpu, completed
        return sample


class Verdict(NamedTuple):
    series: str
    found: Trend
    tolerance: float
    is_flat: bool | None


def judge(samples: Sequence[Sample]) -> list[Verdict]:
    """Say of each series whether it is flat, the warm-up left out."""
    counted = samples[int(len(samples) * WARM_UP) :]
    times = [sample.time for sample in counted]
    verdicts = []
    for name, (direction, part, least) in TOLERANCES.items():
        found = trend(times, [getattr(sample, name) for sample in counted])
        tolerance = max(abs(found.median) * part, least)
        verdicts.append(Verdict(name, found, tolerance, verdict(found, tolerance, direction)))
    return verdicts


def table_of(verdicts: Sequence[Verdict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for column in ("median", "change over the run", "95 % interval", "let pass"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for name, found, tolerance, is_flat in verdicts:
        label, unit = SERIES[name]
        said = {True: "flat", False: "NOT FLAT", None: "too short to tell"}[is_flat]
        interval = f"{found.low:+,.2f} to {found.high:+,.2f}"
        cells = [f"{found.median:,.1f} {unit}", f"{found.change:+,.2f}", interval, f"{tolerance:,.2f}", said]
        table.add_row(label, *cells)
    return table


def plot(samples: Sequence[Sample], verdicts: Sequence[Verdict], path: Path, title: str) -> None:
    """Draw every series into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(5, 2, figsize=(14, 15), sharex=True)
    times = [sample.time for sample in samples]
    begin = times[int(len(samples) * WARM_UP)] if samples else 0.0
    for axis, (name, found, _, is_flat) in zip(axes.flat, verdicts, strict=True):
        label, unit = SERIES[name]
        axis.plot(times, [getattr(sample, name) for sample in samples], linewidth=0.8)
        axis.axvspan(0, begin, color="0.93")
        half = found.change / 2
        axis.plot([begin, times[-1]], [found.median - half, found.median + half], "r--", linewidth=1)
        said = {True: "flat", False: "NOT FLAT", None: "too short to tell"}[is_flat]
        axis.set_title(f"{label} {unit}: {said}", fontsize=10)
        axis.set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.suptitle(f"Soak, {title} (grey: warm-up, red: Theil-Sen slope)")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _memory() -> dict[str, int]:
    """Kilobytes, from the kernel."""
    found: dict[str, Any] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0])
    return found
