"""``run --processes N``: worker processes as the engine of a run, and what they did in one sum."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from queue_runtime.cli.meter import Meter
from queue_runtime.cli.supervisor import WORKER, Death, Supervisor
from queue_runtime.handling import ConsumerStats
from queue_runtime.retry import RetryPolicy

GAUGES = frozenset({"waiting", "running", "sessions_open", "held_bytes"})
"""Fields of ConsumerStats that say how much there is now; of a worker that is gone, nothing is left."""
SILENCE = 15.0
"""Seconds without a report after which a worker counts as stuck."""
KEPT_DEATHS = 100
"""Deaths that the report names; all are counted."""


class _Seat:
    """What is known of one worker's place, whoever sits there."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.starts = 0
        self.deaths = 0
        self.stats: Mapping[str, float] = {}
        self.problems: Sequence[str] = ()
        self.death: Death | None = None
        self.heard_at = 0.0


class ManyProcesses:
    """Worker processes as an engine; what they report adds up in ``meter`` and ``stats``.

    Parameters
    ----------
    jobs:
        What each worker is to do, but for its number.
    keep:
        How many dead letters to remember one by one.
    policy, drain_timeout, stdout:
        As ``Supervisor`` takes them.
    tell:
        Called with sentences for the user.

    Thread-safety: for one event loop's thread.
    """

    def __init__(
        self,
        jobs: Sequence[Mapping[str, Any]],
        *,
        keep: int,
        policy: RetryPolicy,
        drain_timeout: float,
        stdout: int | None,
        tell: Callable[[str], None],
        command: Sequence[str] = WORKER,
    ) -> None:
        self._tell = tell
        self.meter = Meter(keep)
        self._seats = [_Seat() for _ in jobs]
        self._past: dict[str, float] = {}
        """Of workers that are gone, what is not a gauge."""
        self._deaths: list[Death] = []
        self._supervisor = Supervisor(
            jobs, self, policy=policy, drain_timeout=drain_timeout, stdout=stdout, command=command
        )
        self.run = self._supervisor.run
        self.stop = self._supervisor.stop
        self.stop_now = self._supervisor.stop_now

    @property
    def stats(self) -> ConsumerStats:
        """The sum of all workers', by their last reports."""
        total = dict(self._past)
        for seat in self._seats:
            _add(total, seat.stats)
        return ConsumerStats(**{name: count for name, count in total.items() if name in ConsumerStats._fields})  # type: ignore[arg-type]

    @property
    def alive(self) -> int:
        """Workers that run now."""
        return sum(seat.pid is not None for seat in self._seats)

    def processes(self) -> dict[str, Any]:
        return {
            "workers": len(self._seats),
            "starts": sum(seat.starts for seat in self._seats),
            "died": sum(seat.deaths for seat in self._seats),
            "deaths": [death._asdict() for death in self._deaths],
        }

    async def health(self) -> dict[str, Any]:
        found = []
        now = time.monotonic()
        for number, seat in enumerate(self._seats):
            if seat.pid is None:
                found.append(f"{seat.death}; it does not run now" if seat.death else f"worker {number} does not run")
            elif now - seat.heard_at > SILENCE:
                found.append(f"worker {number} (process {seat.pid}) has said nothing for {now - seat.heard_at:.0f} s")
            found += [f"worker {number}: {problem}" for problem in seat.problems]
        return {"problems": found}

    # Told by the supervisor.

    def started(self, number: int, pid: int) -> None:
        seat = self._seats[number]
        seat.pid = pid
        seat.starts += 1
        seat.heard_at = time.monotonic()

    def heard(self, number: int, frame: Mapping[str, Any]) -> None:
        seat = self._seats[number]
        seat.heard_at = time.monotonic()
        seat.stats = frame["stats"]
        seat.problems = frame["problems"]
        self.meter.add(frame["meter"])

    def ended(self, number: int) -> None:
        seat = self._seats[number]
        _add(self._past, {name: count for name, count in seat.stats.items() if name not in GAUGES})
        seat.pid, seat.stats, seat.problems = None, {}, ()

    def died(self, death: Death, again_in: float | None) -> None:
        seat = self._seats[death.worker]
        seat.deaths += 1
        seat.death = death
        if len(self._deaths) < KEPT_DEATHS:
            self._deaths.append(death)
        again = "" if again_in is None else f"; it is started again in {again_in:.2g} s"
        self._tell(f"{death}{again}")


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, count in more.items():
        total[name] = total.get(name, 0) + count
