"""How much a consumer does at once: pure rules that grow and shrink it with its load [C45].

By Little's law the mean number of handlers that run is throughput times handler time (J. D. C. Little, "A Proof for
the Queuing Formula L = λW", Operations Research 9, 1961). From it follow

- the demand: the handlers that run, and those that would work the backlog off in time;
- the use of more: twice the handlers that do no more work must take twice the time for each message. So growth is a
  trial, whose throughput is compared with the one before, as .NET's thread pool does (Hellerstein, Morrison,
  Eilebrecht, "Optimizing Concurrency Levels in the .NET ThreadPool", 2008);
- the limit where it did not help: throughput times the handler time before the queueing, TCP BBR's bandwidth-delay
  product (Cardwell et al., ACM Queue 14(5), 2016), at least half of what it was, as Netflix's concurrency-limits clamps
  its gradient (Gradient2Limit).

What keeps it calm is taken from Kubernetes' HorizontalPodAutoscaler: a band in which nothing changes, and a window of
which the largest demand counts when shrinking.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import cast

from queue_runtime.scaling import Limits, Load, ScalingConfig

STEP = 2.0
"""The most that a limit grows at once, as in TCP's slow start (RFC 5681): its effect is seen before the next step."""
PROBE = 1.25
"""The step with which growth that did not help before is tried again."""
RETREAT = 0.75
"""What is left of the handlers in a trial of fewer, when each has come to take longer."""
SLOWER = 2.0
"""How many times as long handlers take, at the same throughput, for such a trial."""
MEMORY = 5
"""Intervals that are averaged to know how things are."""
CLOSE = 6
"""How often each handler has ended before a small change is judged: handlers that began together end in bursts."""
NEAR = 1.25
"""How many times the shortest handler time is still taken for it, as more handlers say it with more certainty."""
DOUBT = 2.0
"""Standard deviations by which a throughput must differ from another to be believed."""
MOST_HOLDS = 4
"""How often the hold is doubled."""


@dataclass(slots=True)
class _Measure:
    """What was done in a stretch of time."""

    seconds: float = 0.0
    ended: float = 0.0
    """Handlers that ended."""
    handling: float = 0.0
    """Seconds that handlers ran."""

    def add(self, seconds: float, load: Load, concurrency: int) -> None:
        self.seconds += seconds
        self.ended += load.rate * seconds
        self.handling += load.busy * concurrency * seconds

    @property
    def rate(self) -> float:
        return self.ended / self.seconds if self.seconds else 0.0

    @property
    def running(self) -> float:
        return self.handling / self.seconds if self.seconds else 0.0

    @property
    def handler_seconds(self) -> float:
        return self.handling / self.ended if self.ended else math.inf

    def forget(self, longest: float) -> None:
        """Keep the weight of the last ``longest`` seconds or so."""
        if self.seconds > longest:
            part = longest / self.seconds
            self.seconds, self.ended, self.handling = longest, self.ended * part, self.handling * part


class _Band:
    """Follows a need with one limit: up at once, down when less was enough for long, and not at all between.

    After either move the need is ``target_busy`` of the limit, within the band: so a need that stays moves it no more.
    """

    def __init__(self, config: ScalingConfig, lowest: int, highest: int) -> None:
        self._config = config
        self.lowest = lowest
        self.highest = highest
        self._needs: deque[tuple[float, float]] = deque()
        self._since: float | None = None

    def follow(self, now: float, need: float, limit: int, *, may_grow: bool = True, top: int | None = None) -> int:
        """Return the new limit; ``top`` is the largest that is of use now."""
        config = self._config
        if self._since is None:
            self._since = now
        wanted = need
        if top is not None:
            need = min(need, top * config.target_busy)
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()  # no longer the largest from here on
        self._needs.append((now, need))
        shrink_after = cast(float, config.shrink_after)
        while self._needs[0][0] < now - shrink_after:
            self._needs.popleft()
        highest = self.highest if top is None else max(self.lowest, min(self.highest, top))
        if may_grow and wanted > config.grow_above * limit and limit < highest:
            self._since = now
            return min(_ceil(wanted / config.target_busy), _ceil(limit * STEP), highest)
        most = self._needs[0][1]
        if now - self._since >= shrink_after and most < config.shrink_below * limit:
            return min(limit, max(self.lowest, _ceil(most / config.target_busy)))
        return limit


@dataclass(slots=True)
class _Trial:
    """A limit that was changed, until its effect is known."""

    before: int
    after: int
    was: _Measure
    counts_from: float
    """The time from which on it is measured: when what began before has ended."""
    seen: _Measure

    def gain(self, was: _Measure) -> tuple[float, float]:
        """Return how the throughput changed, as a ratio, and its uncertainty: counts vary by their square root."""
        if not was.ended:
            return math.inf, 0.0
        ended = max(self.seen.ended, 1.0)
        return self.seen.rate / was.rate, DOUBT * math.sqrt(1 / was.ended + 1 / ended)


class _Ceiling:
    """The limit above which growth did not help, and until when that is believed."""

    def __init__(self, hold: float) -> None:
        self._hold = hold
        self._times = 0
        self.limit: int | None = None
        self._until = 0.0

    def set(self, now: float, limit: int, *, has_failed: bool = True) -> None:
        self.limit = limit
        self._until = now + self._hold * 2.0**self._times
        if has_failed:
            self._times = min(self._times + 1, MOST_HOLDS)

    def raise_to(self, now: float, limit: int) -> None:
        """Growth helped after all: it goes on in small steps, as one of them may have helped by chance."""
        if self.limit is not None:
            self.limit = limit
            self._until = now
            self._times = 0

    def lift(self) -> None:
        self.limit = None
        self._times = 0

    def top(self, now: float) -> int | None:
        """Return the largest limit to try, None for any."""
        if self.limit is None or now < self._until:
            return self.limit
        return max(self.limit + 1, _ceil(self.limit * PROBE))

    def is_probed(self, now: float) -> bool:
        return self.limit is not None and now >= self._until


class Scaler:
    """Decides on the limits of one consumer from what is seen of its load.

    Parameters
    ----------
    config:
        The bounds and the calm.
    configured:
        The limits that the consumer was configured with: the maximum of whatever has none in ``config``.

    It keeps what it has learnt: one scaler for one consumer, asked again and again.

    Thread-safety: one caller at a time.
    """

    def __init__(self, config: ScalingConfig, configured: Limits) -> None:
        self.config = config
        lowest, highest = config.lowest(), config.highest(configured)
        self._concurrency, self._prefetch, self._pollers, self._sessions = (
            _Band(config, low, high) for low, high in zip(lowest, highest, strict=True)
        )
        self.lowest, self.highest = lowest, highest
        self.reason = ""
        """Why the last decision is as it is."""
        self._now: float | None = None
        self._decided: Limits | None = None
        self._level = _Measure()
        """Work at the present limits while every handler is busy."""
        self._accepted = math.inf
        """The handler time with which the present concurrency was last found good."""
        self._base: _Measure | None = None
        """The work with the shortest handler time of this climb: nothing queued behind the handlers."""
        self._is_suspect = False
        """Whether handlers seem to take longer than they did."""
        self._is_descending = False
        """Whether fewer handlers did as well, so that still fewer are tried."""
        self._handler_seconds = 0.0
        self._per_poller = math.inf
        """Messages a second that one poller brings, learnt when handlers lacked work."""
        self._trial: _Trial | None = None
        self._polling: _Trial | None = None
        self._interval, self._target_lag = cast(float, config.interval), cast(float, config.target_lag)
        self._ceiling = _Ceiling(cast(float, config.hold))
        self._polling_ceiling = _Ceiling(cast(float, config.hold))

    def decide(self, now: float, load: Load, limits: Limits) -> Limits:
        """Return the limits to work with from now on.

        Parameters
        ----------
        now:
            Seconds of a clock that never goes back.
        load:
            What was seen since the decision before, while ``limits`` held.
        limits:
            What the consumer works with; when it is not what was decided last, the effect of that is not judged.
        """
        seconds = 0.0 if self._now is None else max(0.0, now - self._now)
        self._now = now
        if limits != self._decided:
            self._trial = self._polling = None
            self._level = _Measure()
        self.reason = ""
        if load.handler_seconds > 0:
            self._handler_seconds = load.handler_seconds
        backlog = load.depth if load.depth is not None else (load.lag or 0.0) * load.rate
        concurrency = self._handlers(now, seconds, load, limits, backlog)
        held = self._held(now, load, limits, concurrency)
        sessions = self._held_sessions(now, load, limits, backlog)
        is_calm = concurrency == limits.concurrency and held == limits.prefetch and self._trial is None
        pollers = self._receives(now, seconds, load, limits, is_calm)
        decided = Limits(*map(_clamped, (concurrency, held, pollers, sessions), self.lowest, self.highest))
        if decided == limits:
            self.reason = ""
        self._decided = decided
        return decided

    def _handlers(self, now: float, seconds: float, load: Load, limits: Limits, backlog: float) -> int:
        config, limit = self.config, limits.concurrency
        is_busy = load.busy >= config.grow_above
        sample = _Measure()
        sample.add(seconds, load, limit)
        if is_busy:
            self._level.add(seconds, load, limit)
            if self._handler_seconds > 0:
                self._level.forget(max(MEMORY * self._interval, 2 * CLOSE * self._handler_seconds))
        need = sample.running + backlog * self._handler_seconds / self._target_lag
        if self._trial is not None:
            judged = self._judge(now, seconds, load, self._trial, is_busy)
            if self._trial is not None or judged != limit:
                self._concurrency.follow(now, need, judged, may_grow=False)
                return judged
        elif is_busy and self._is_slower(limit):
            fewer = max(self.lowest.concurrency, math.floor(limit * RETREAT))
            self.reason = f"handlers take {self._level.handler_seconds:.3g} s: are fewer enough?"
            self._begin_trial(now, limit, fewer, self._level)
            return fewer
        is_behind = load.busy >= config.target_busy and need > limit
        may_grow = (is_busy or is_behind) and self._handler_seconds > 0 and self._polling is None
        is_probe = self._ceiling.is_probed(now)
        top = self._ceiling.top(now)
        if load.runnable is not None:
            top = load.runnable if top is None else min(top, load.runnable)
        decided = self._concurrency.follow(now, need, limit, may_grow=may_grow, top=top)
        if decided > limit:
            level = self._level if is_busy else sample
            if is_probe or self._base is None or level.handler_seconds < NEAR * self._base.handler_seconds:
                self._base = level
            self.reason = f"{load.busy:.0%} busy, {need:.3g} handlers needed"
            self._begin_trial(now, limit, decided, level)
        elif decided < limit:
            self._base = None
            self._ceiling.lift()
            self._level = _Measure()
            self.reason = f"{decided} handlers were enough for {config.shrink_after:g} s"
        return decided

    def _begin_trial(self, now: float, before: int, after: int, was: _Measure) -> None:
        self._trial = self._new_trial(now, before, after, was)
        self._level = _Measure()

    def _new_trial(self, now: float, before: int, after: int, was: _Measure) -> _Trial:
        lead = self._handler_seconds if self._handler_seconds > self._interval / 10 else 0.0
        return _Trial(before, after, was, now + lead, _Measure())

    def _judge(self, now: float, seconds: float, load: Load, trial: _Trial, is_busy: bool) -> int:
        """Return the concurrency after one more sample of a trial, which is over when there is none any more."""
        if not is_busy:  # there is not so much to do, or it does not come
            self._trial = None
            return trial.after
        if now - seconds >= trial.counts_from:
            trial.seen.add(seconds, load, trial.after)
        if not self._is_seen(trial):
            return trial.after
        self._trial = None
        seen, was = trial.seen, trial.was
        ratio, _ = trial.gain(was)
        self.reason = f"{trial.after} handlers instead of {trial.before} did {ratio:.0%} of the work"
        if trial.after < trial.before:
            self._is_descending = self._does_its_share(trial, was, 0.0)
            if self._is_descending:
                self._ceiling.set(now, trial.after, has_failed=False)
                return trial.after
            self._accepted = was.handler_seconds
            self._base = was
            self._level = _Measure()
            return trial.before
        base = self._base or was
        # What has failed before gets no benefit of the doubt. Small steps that each may be of use add up: so the
        # first of the climb is looked at, too.
        trust = 1.0 if self._ceiling.limit is None else 0.0
        if self._does_its_share(trial, was, trust) and self._does_its_share(trial, base, trust):
            self.reason = ""
            self._ceiling.raise_to(now, trial.after)
            self._accepted = min(seen.handler_seconds, base.handler_seconds)
            self._level = seen
            return trial.after
        useful = _ceil(min(seen.rate * base.handler_seconds, trial.before))
        limit = max(useful, _ceil(trial.before / 2), self.lowest.concurrency)
        self._accepted = min(was.handler_seconds, base.handler_seconds)
        self._level = _Measure()
        self._ceiling.set(now, limit)
        return limit

    def _is_seen(self, trial: _Trial) -> bool:
        """Whether a trial lasted: every handler has ended once, or more often where the change is small."""
        once = max(self._interval, self._handler_seconds) * 0.99
        is_close = trial.after < trial.before or self._ceiling.limit is not None
        wanted = trial.after * (CLOSE if is_close else 1)
        seen = trial.seen
        return seen.seconds >= once and (seen.ended >= wanted or seen.seconds >= 2 * CLOSE * once)

    def _does_its_share(self, trial: _Trial, was: _Measure, trust: float) -> bool:
        """Whether the throughput changed with the handlers, by ``min_gain`` of what is fair at least."""
        ratio, doubt = trial.gain(was)
        fair = trial.seen.running / was.running if was.running else 1.0
        needed = 1 + self.config.min_gain * (fair - 1)
        return ratio * (1 + trust * doubt) >= needed

    def _is_slower(self, limit: int) -> bool:
        """Whether handlers take so much longer than they did that fewer may do as much."""
        level = self._level
        if limit <= self.lowest.concurrency or self._polling is not None:
            return False
        if level.ended < CLOSE * limit or level.seconds < 2 * self._interval:
            return False
        if not self._is_descending and level.handler_seconds < SLOWER * self._accepted:
            self._is_suspect = False
            return False
        if not (self._is_suspect or self._is_descending):
            self._is_suspect = True
            self._level = _Measure()  # looked at once more, without what was before it happened
            return False
        self._is_suspect = False
        return True

    def _held(self, now: float, load: Load, limits: Limits, concurrency: int) -> int:
        # Twice the handlers, or some time's work: the next message is there when a handler is free.
        ahead = load.rate * cast(float, self.config.hold_ahead)
        each = 1.0  # messages of a handler: of a batch handler, its batch
        if load.busy > 0.1:
            each = max(1.0, (load.in_flight - load.waiting) / (load.busy * limits.concurrency))
        need = self.config.target_busy * (concurrency * each + max(concurrency * each, ahead))
        held = self._prefetch.follow(now, need, limits.prefetch)
        if held != limits.prefetch and not self.reason:
            self.reason = f"{load.rate:.3g} messages a second"
        return held

    def _held_sessions(self, now: float, load: Load, limits: Limits, backlog: float) -> int:
        is_wanted = load.busy >= self.config.grow_above or backlog >= 1
        held = self._sessions.follow(now, load.sessions, limits.sessions, may_grow=is_wanted)
        if held != limits.sessions and not self.reason:
            self.reason = f"{load.sessions} sessions held"
        return held

    def _receives(self, now: float, seconds: float, load: Load, limits: Limits, is_calm: bool) -> int:
        """Return how many receives may be under way: more while handlers lack what waits in the queue."""
        limit = limits.pollers
        is_starved = (
            load.busy < self.config.target_busy
            and 2 * load.in_flight <= limits.prefetch
            and load.depth is not None
            and load.depth > limits.prefetch
        )
        sample = _Measure()
        sample.add(seconds, load, limits.concurrency)
        if self._polling is not None:
            trial = self._polling
            if now - seconds >= trial.counts_from:
                trial.seen.add(seconds, load, limits.concurrency)
            if trial.seen.seconds < self._interval * 0.99:
                return limit
            self._polling = None
            ratio, doubt = trial.gain(trial.was)
            if is_starved and ratio * (1 + doubt) < 1 + self.config.min_gain * (trial.after / trial.before - 1):
                self._polling_ceiling.set(now, trial.before)
                self.reason = (
                    self.reason
                    or f"{trial.after} receives instead of {trial.before} brought {ratio:.0%} of the messages"
                )
                return trial.before
            self._polling_ceiling.raise_to(now, trial.after)
        if is_starved and load.rate > 0:
            self._per_poller = max(load.rate / limit, 1e-9)
        need = load.rate / self._per_poller
        may_grow = is_starved and is_calm
        decided = self._pollers.follow(now, need, limit, may_grow=may_grow, top=self._polling_ceiling.top(now))
        if decided > limit:
            self._polling = self._new_trial(now, limit, decided, sample)
        if decided != limit and not self.reason:
            self.reason = "handlers lack messages" if decided > limit else "fewer receives were enough"
        return decided


def _clamped(value: int, lowest: int, highest: int) -> int:
    return max(lowest, min(value, highest))


def _ceil(value: float) -> int:
    return math.ceil(value - 1e-9)  # 0.7 x 3 / 0.7 is 3
