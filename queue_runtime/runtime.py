"""RuntimeConfiguration: the event loop, the threads, the collector and the cores that a process works with [C46]."""

from __future__ import annotations

import asyncio
import gc
import inspect
import math
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from queue_runtime.errors import ConfigurationError, ValidationError
from queue_runtime.settings import Seconds, choice, flag, integer, seconds

T = TypeVar("T")

_NEEDS_UVLOOP = "uvloop is not installed: pip install 'queue-runtime[uvloop]'"
_freezers = 0
"""Configurations in use that have frozen the collector's objects: the last one of them thaws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfiguration:
    """What a process works with; what is None stays as it is.

    Parameters
    ----------
    loop:
        The event loop that ``run`` makes: ``asyncio``'s own, ``uvloop``, or ``auto``, which is uvloop where it is
        installed. ``apply`` finds a loop running, and refuses one that is not the named one.
    thread_pool_size:
        Threads of the loop's default pool, for ``asyncio.to_thread`` and look-ups of host names; asyncio's own has
        four more than there are CPUs, at most 32. Plain handlers have a pool of their own, as large as the consumer's
        ``max_concurrency``.
    gc_thresholds:
        As ``gc.set_threshold`` takes them: allocations between collections of the young generation, and how many of
        those, and of the next ones, go by before an older generation is collected. A first 0 ends automatic collection.
    gc_freeze:
        Whether what exists at the start, such as all imported modules, is collected once and then left out of every
        later collection.
    switch_interval:
        Seconds that a thread keeps the interpreter when others wait for it; Python's default is 0.005.
    cpu_affinity:
        The CPUs, by number, that this thread and all threads started from it may run on.

    Raises ConfigurationError, which names the field: when it is made for values that are wrong anywhere, when it is
    used for what this machine does not have.

    Thread-safety: immutable. But it changes what the whole process shares, and restores it afterwards: have no two in
    use in two threads at once; one inside another is fine.
    """

    loop: Literal["auto", "asyncio", "uvloop"] = "auto"
    thread_pool_size: int | None = None
    gc_thresholds: tuple[int, int, int] | None = None
    gc_freeze: bool = False
    switch_interval: Seconds | None = None
    cpu_affinity: Iterable[int] | None = None

    def __post_init__(self) -> None:
        choice("loop", self.loop, ("auto", "asyncio", "uvloop"))
        if self.thread_pool_size is not None:
            integer("thread_pool_size", self.thread_pool_size, minimum=1, maximum=10_000)
        if self.gc_thresholds is not None:
            thresholds = _numbers("gc_thresholds", self.gc_thresholds, maximum=2**31 - 1)
            if len(thresholds) != 3:
                raise ConfigurationError("gc_thresholds", f"must be three whole numbers, not {len(thresholds)}")
            object.__setattr__(self, "gc_thresholds", thresholds)
        flag("gc_freeze", self.gc_freeze)
        if self.switch_interval is not None:
            interval = seconds("switch_interval", self.switch_interval, minimum=1e-6, maximum=10.0)
            object.__setattr__(self, "switch_interval", interval)
        if self.cpu_affinity is not None:
            cores = _numbers("cpu_affinity", self.cpu_affinity, maximum=65_535)
            if not cores:
                raise ConfigurationError("cpu_affinity", "must name at least one CPU, or be None for all")
            object.__setattr__(self, "cpu_affinity", tuple(sorted(set(cores))))

    @classmethod
    def for_high_throughput(cls, **changes: Any) -> Self:
        """For a process that has a machine's cores to itself: uvloop where it is installed, and rare collections [C46].

        Messages are freed by their reference counts, so that the collector finds little; what is there at the start is
        frozen, and the young generation grows to 50,000 objects. A process with a million objects of its own, whose
        handlers read JSON, handles twice as many messages with it; one with a small heap, as many as before.
        """
        preset: dict[str, Any] = {
            "thread_pool_size": 4 * available_cpus() + 4,
            "gc_thresholds": (50_000, 20, 50),
            "gc_freeze": True,
        }
        return cls(**(preset | changes))

    @classmethod
    def for_low_resource(cls, **changes: Any) -> Self:
        """For a small container: asyncio's own loop, two threads, and collections early and often [C46]."""
        preset: dict[str, Any] = {"loop": "asyncio", "thread_pool_size": 2, "gc_thresholds": (500, 5, 5)}
        return cls(**(preset | changes))

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run ``main()`` to its end, as ``asyncio.run`` does, all of this applied, and restore it; return the result.

        Parameters
        ----------
        main:
            An ``async def`` without parameters; it is called when everything is applied.

        Raises what ``main`` raises, and ConfigurationError for what this machine does not have, before it is called.
        """
        if not callable(main):
            if inspect.iscoroutine(main):
                main.close()  # never to be awaited, and that is no news
            raise ValidationError("main", f"must be a function that returns a coroutine, not {type(main).__name__}")
        if _running_loop() is not None:
            raise RuntimeError(
                "run() cannot be called while an event loop runs; there, use `with configuration.apply():`"
            )
        factory = self._loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            loop = runner.get_loop()
            with self._applied():
                if self.thread_pool_size is not None:
                    loop.set_default_executor(_pool(self.thread_pool_size))  # the runner shuts it down
                return runner.run(main())

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Apply it to this process and to the running loop, for those who make their own; restore it at the end.

        Outside of a running loop, ``loop`` must be ``auto`` and ``thread_pool_size`` None. Afterwards the loop has a
        default pool of Python's own size: it does not tell which one it had before.
        """
        loop = _running_loop()
        self._check(loop)
        with self._applied(), ExitStack() as stack:
            if loop is not None and self.thread_pool_size is not None:
                pool = _pool(self.thread_pool_size)
                loop.set_default_executor(pool)
                stack.callback(pool.shutdown, wait=False)
                stack.callback(loop.set_default_executor, ThreadPoolExecutor(thread_name_prefix="asyncio"))
            yield

    def _loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop]:
        if self.loop != "asyncio":
            try:
                import uvloop
            except ModuleNotFoundError:
                if self.loop == "uvloop":
                    raise ConfigurationError("loop", _NEEDS_UVLOOP) from None
            else:
                return uvloop.new_event_loop
        if sys.platform == "win32":
            return asyncio.ProactorEventLoop
        return asyncio.SelectorEventLoop

    def _check(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Refuse what cannot be applied to this loop, or without one."""
        if loop is None:
            for field in ("loop", "thread_pool_size"):
                if getattr(self, field) not in ("auto", None):
                    raise ConfigurationError(
                        field, "is for an event loop, and none runs here; use run(), or enter it in one"
                    )
            return
        kind = type(loop).__module__.partition(".")[0]
        if self.loop != "auto" and kind != self.loop:
            raise ConfigurationError("loop", f"must be auto where a loop of {kind} runs already, not {self.loop!r}")

    @contextmanager
    def _applied(self) -> Iterator[None]:
        """What belongs to the process. Undone in the opposite order, also when only a part of it could be done."""
        with ExitStack() as stack:
            if self.cpu_affinity is not None:
                stack.callback(_pin, _pin(set(self.cpu_affinity)))
            if self.switch_interval is not None:
                stack.callback(sys.setswitchinterval, sys.getswitchinterval())
                sys.setswitchinterval(self.switch_interval)  # type: ignore[arg-type]  # seconds since its creation
            if self.gc_thresholds is not None:
                stack.callback(gc.set_threshold, *gc.get_threshold())
                gc.set_threshold(*self.gc_thresholds)
            if self.gc_freeze:
                stack.callback(_thaw)
                _freeze()
            yield


def available_cpus(quota: str = "/sys/fs/cgroup/cpu.max") -> int:
    """How many CPUs' worth of work this process can do at once: those it may run on, within its container's quota.

    ``quota`` is the file of cgroup v2 that says so: microseconds of a period, or ``max``, and the period.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(quota) as file:
            allowed, period = file.read().split()
        return max(1, min(count, math.ceil(int(allowed) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # there is none, or it says max
        return count


def _numbers(field: str, value: object, *, maximum: int) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ConfigurationError(field, f"must be a collection of whole numbers, not {type(value).__name__}")
    return tuple(integer(field, number, minimum=0, maximum=maximum) for number in value)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="queue-runtime-default")


def _pin(cores: set[int]) -> set[int]:
    """Pin this thread to ``cores``; return those that it had."""
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigurationError("cpu_affinity", "this system cannot pin a process to CPUs; leave it None")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
        missing = cores - os.sched_getaffinity(0)
    except OSError:  # none of them is there; a part of them would be taken in silence
        missing = cores
    if missing:
        os.sched_setaffinity(0, before)
        raise ConfigurationError("cpu_affinity", f"{_listed(missing)} cannot be used here, where {_listed(before)} can")
    return before


def _listed(cores: set[int]) -> str:
    return f"CPU {', '.join(map(str, sorted(cores)))}"


def _freeze() -> None:
    global _freezers
    _freezers += 1
    gc.collect()
    gc.freeze()


def _thaw() -> None:
    global _freezers
    _freezers -= 1
    if not _freezers:
        gc.unfreeze()
