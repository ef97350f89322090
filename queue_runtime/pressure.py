"""How near this process is to the limit of its memory, and what a consumer may hold then [C39].

Looked at are, each with what counts against it:

- the limit given in the configuration, with this process's resident memory;
- ``ulimit -v`` (RLIMIT_AS), with its address space;
- every control group that it is in, nested ones too, with the group's usage less the file cache that the kernel drops
  first: what Kubernetes calls the working set;
- without any of these, the machine's memory, with what is not available of it.

The nearest one counts. All of it is read from ``/proc`` and ``/sys``: elsewhere nothing is known, and nothing shrinks.
Kernel documentation: cgroup-v2.rst ("Memory Interface Files"), cgroup-v1/memory.rst, filesystems/proc.rst.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from queue_runtime.config import Seconds, integer, seconds, share
from queue_runtime.scaling import Limits

NO_LIMIT = 1 << 60
"""Limits from here on mean none: version 1 of control groups has no other word for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """When a consumer holds less, so that its memory stays within its limit.

    Parameters
    ----------
    limit:
        Bytes of resident memory for this process; None looks only at the limits that the system sets.
    high:
        The share of a limit at which a consumer begins to hold fewer messages.
    critical:
        The share at which it holds as few as it may, and runs fewer handlers too.
    low:
        The share below which it may hold more again.
    interval:
        Seconds between two looks.

    Raises ConfigurationError, which names the field.
    """

    limit: int | None = None
    high: float = 0.8
    critical: float = 0.9
    low: float = 0.7
    interval: Seconds = 1.0

    def __post_init__(self) -> None:
        if self.limit is not None:
            integer("limit", self.limit, minimum=1)
        share("low", self.low, minimum=0.01)
        share("high", self.high, minimum=self.low)
        share("critical", self.critical, minimum=self.high)
        object.__setattr__(self, "interval", seconds("interval", self.interval, minimum=0.001))


class MemoryLevel(enum.Enum):
    """How near the limit is."""

    NORMAL = "normal"
    HIGH = "high"
    CRITICAL = "critical"


class MemoryUse(NamedTuple):
    """Bytes used of one limit."""

    used: int
    limit: int
    source: str
    """Whose limit it is, such as ``cgroup /sys/fs/cgroup/app``."""

    @property
    def share(self) -> float:
        return self.used / self.limit if self.limit else 1.0


class MemoryPressure:
    """Watches this process's memory, with hysteresis.

    Parameters
    ----------
    config:
        The limit and the levels.
    root:
        The directory that ``proc`` and ``sys`` are in.

    Thread-safety: one caller at a time.
    """

    def __init__(self, config: MemoryConfig | None = None, root: str | os.PathLike[str] = "/") -> None:
        self.config = config or MemoryConfig()
        self._root = Path(root)
        self._groups = list(_groups(self._root))
        self._room = 0.0
        """Bytes below the high level, of the limit that leaves fewest."""
        self.level = MemoryLevel.NORMAL
        """As it was at the last look."""
        self.use: MemoryUse | None = None
        """Of the nearest limit, at the last look; None when nothing is known."""

    def uses(self) -> list[MemoryUse]:
        """Read what is used of every limit that there is."""
        found = []
        pages = (_text(self._root / "proc/self/statm") or "").split()
        if len(pages) > 1:
            size = _page_size()
            if self.config.limit is not None:
                found.append(MemoryUse(int(pages[1]) * size, self.config.limit, "the configured limit"))
            address_space = _address_space_limit()
            if address_space is not None:
                found.append(MemoryUse(int(pages[0]) * size, address_space, "RLIMIT_AS"))
        for group in self._groups:
            use = group.use()
            if use is not None:
                found.append(use)
        if not found and self.config.limit is None:
            machine = _machine(self._root)
            if machine is not None:
                found.append(machine)
        return found

    def look(self) -> MemoryLevel:
        """Read, and return the level: up at once, down only below the next lower bound."""
        config = self.config
        uses = self.uses()
        self.use = max(uses, key=lambda use: use.share, default=None)
        self._room = min((use.limit * config.high - use.used for use in uses), default=0.0)
        part = 0.0 if self.use is None else self.use.share
        if part >= config.critical or (self.level is MemoryLevel.CRITICAL and part >= config.high):
            self.level = MemoryLevel.CRITICAL
        elif part >= config.high or (self.level is not MemoryLevel.NORMAL and part >= config.low):
            self.level = MemoryLevel.HIGH
        else:
            self.level = MemoryLevel.NORMAL
        return self.level

    def allowed(self, wanted: Limits, now: Limits, lowest: Limits) -> Limits:
        """Return what of the ``wanted`` limits the memory allows, as of the last look.

        Parameters
        ----------
        wanted, now, lowest:
            What there should be, what there is, and what it may not fall below.
        """
        if self.level is MemoryLevel.NORMAL:
            # Opened step by step: what a message takes beside its body is seen only once it is held.
            return wanted._replace(prefetch=min(wanted.prefetch, 2 * now.prefetch))
        prefetch = max(lowest.prefetch, min(wanted.prefetch, now.prefetch // 2))
        concurrency = min(wanted.concurrency, now.concurrency)
        if self.level is MemoryLevel.CRITICAL:
            prefetch = lowest.prefetch
            concurrency = max(lowest.concurrency, concurrency // 2)
        return Limits(concurrency, prefetch, min(wanted.pollers, now.pollers), min(wanted.sessions, now.sessions))

    def allowed_bytes(self, held_bytes: int) -> int | None:
        """Return the bytes of messages that may be held, of which ``held_bytes`` are; None when nothing is known."""
        if self.use is None:
            return None
        if self.level is not MemoryLevel.NORMAL:
            return max(1, held_bytes // 2)
        return held_bytes + max(1, int(self._room))


@dataclass(frozen=True, slots=True)
class _Group:
    """A control group with the names of its files."""

    directory: Path
    limits: tuple[str, ...]
    usage: str
    cache: str
    """The line of ``memory.stat`` that holds the file cache which was not used lately."""

    def use(self) -> MemoryUse | None:
        limits = [limit for name in self.limits if (limit := _number(self.directory / name)) is not None]
        if not limits or min(limits) >= NO_LIMIT:
            return None
        used = _number(self.directory / self.usage)
        if used is None:
            return None
        for line in (_text(self.directory / "memory.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name == self.cache:
                used = max(0, used - int(value))
        return MemoryUse(used, min(limits), f"cgroup {self.directory}")


V2 = (("memory.max", "memory.high"), "memory.current", "inactive_file")
V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def _groups(root: Path) -> Iterator[_Group]:
    """Yield the control groups of this process that may limit its memory, from its own to the outermost."""
    paths: dict[str, str] = {}
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers or "memory" in controllers.split(","):
            paths["v1" if controllers else "v2"] = path
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        mount, kind = before.split(), [*after.split(), "", "", ""][:3]
        if len(mount) < 5:
            continue
        version = {"cgroup2": "v2", "cgroup": "v1"}.get(kind[0])
        if version not in paths or (version == "v1" and "memory" not in kind[2].split(",")):
            continue
        top = root / _unescaped(mount[4]).lstrip("/")
        inside = _inside(paths.pop(version), _unescaped(mount[3]))
        for depth in range(len(inside), -1, -1):
            yield _Group(top.joinpath(*inside[:depth]), *(V2 if version == "v2" else V1))


def _inside(path: str, mount_root: str) -> list[str]:
    """Return the way from the mounted group to the process's own; of a container that sees only its own, nothing."""
    own = [part for part in path.split("/") if part]
    base = [part for part in mount_root.split("/") if part]
    inside = own[len(base) :] if own[: len(base)] == base else []
    return [] if ".." in inside else inside


def _machine(root: Path) -> MemoryUse | None:
    values = {}
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        values[name] = value.removesuffix("kB").strip()
    try:
        total, available = int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024
    except (KeyError, ValueError):
        return None
    return MemoryUse(total - available, total, "the machine's memory")


def _address_space_limit() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _page_size() -> int:
    return os.sysconf("SC_PAGE_SIZE")


def _number(path: Path) -> int | None:
    """Read a file that holds a number; ``max`` is none."""
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _unescaped(path: str) -> str:
    return path.replace("\\040", " ")


def _text(path: Path) -> str | None:
    """Read a file that the kernel makes up from its memory: no disk is waited for, so the event loop may do it."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        return b"".join(_blocks(handle)).decode("ascii", "replace")
    except OSError:
        return None
    finally:
        os.close(handle)


def _blocks(handle: int) -> Iterator[bytes]:
    offset = 0
    while block := os.pread(handle, 1 << 16, offset):
        offset += len(block)
        yield block
