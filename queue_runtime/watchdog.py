"""One daemon thread that notices when an event loop does not turn, and says what blocks it [C21].

It does not poll and the loop sends it no heartbeat. While locks are held, the loop has a timer anyway; the thread
sleeps until a little after the time at which that timer has to fire, and looks whether it did. So a loop that turns
costs one wake-up for each renewal, and without locks there is no thread at all. A loop that is blocked for a shorter
time than that passes unnoticed: no lock is in danger.

What the thread cannot do is run while compiled code keeps the interpreter's lock, such as a long regular expression.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import selectors
import sys
import threading
from pathlib import Path
from time import monotonic
from types import CodeType, FrameType
from typing import NamedTuple, Protocol

logger = logging.getLogger("queue_runtime.watchdog")

DEEPEST = 8
"""Frames of a stack that are told, from the handler inwards."""
PACKAGE = str(Path(__file__).parent) + os.sep
LOOPS = (str(Path(asyncio.__file__).parent) + os.sep, selectors.__file__)
"""What runs an event loop; uvloop has no frames of its own."""


class Watched(Protocol):
    """What the thread looks after: compared by identity."""

    def look(self, now: float) -> float | None:
        """Called on the watchdog's thread, with the monotonic time, whenever it is awake.

        Returns when it has to be called again at the latest, infinite for never, or None to be watched no more.
        """
        ...


class _Thread(threading.Thread):
    """One life of the thread: from the first that is watched to the last."""

    def __init__(self, dog: Watchdog) -> None:
        super().__init__(name="queue-runtime-watchdog", daemon=True)
        self._dog = dog
        self._bell = threading.Lock()
        self._bell.acquire()
        self.is_over = False
        self.wakes_at = math.inf
        """Infinite also while it looks around: who has something new then has to ring."""

    def ring(self) -> None:
        """Wake it. Any thread may; it never waits."""
        with contextlib.suppress(RuntimeError):  # it was rung already
            self._bell.release()

    def run(self) -> None:
        while not self.is_over:
            self.wakes_at = math.inf
            wakes_at = self._dog.look_around()
            self.wakes_at = wakes_at
            if wakes_at == math.inf:
                self._bell.acquire()
            else:
                self._bell.acquire(timeout=min(max(0.0, wakes_at - monotonic()), threading.TIMEOUT_MAX))


class Watchdog:
    """The thread and those it looks after.

    Thread-safety: any thread may call it.
    """

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Look after nothing: in the child of a fork there is neither the thread nor a loop that runs."""
        self._lock = threading.Lock()
        self._members: dict[Watched, None] = {}
        self._thread: _Thread | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    def watch(self, member: Watched, look_at: float) -> None:
        """Look after this one, at that monotonic time or before; starts the thread when it is the first."""
        thread = self._thread
        if thread is not None and member in self._members:
            if look_at < thread.wakes_at:
                thread.ring()
            return
        with self._lock:
            self._members[member] = None
            if self._thread is not None:
                self._thread.ring()
                return
            thread = _Thread(self)
            try:
                thread.start()
            except RuntimeError as error:  # it is a help, and nothing else may fail for it
                logger.warning("there is no watchdog: %s", error)
            else:
                self._thread = thread

    def leave(self, member: Watched) -> None:
        """Look after it no more; ends the thread when it was the last."""
        if member not in self._members:
            return
        with self._lock:
            self._members.pop(member, None)
            if not self._members and self._thread is not None:
                self._thread.is_over = True
                self._thread.ring()
                self._thread = None

    def look_around(self) -> float:
        """For the thread: look at each, and return when the next one has to be looked at."""
        next_look = math.inf
        for member in list(self._members):
            try:
                look_at = member.look(monotonic())
            except Exception:
                logger.exception("the watchdog failed")
                look_at = monotonic() + 1.0
            if look_at is None:
                self.leave(member)
            else:
                next_look = min(next_look, look_at)
        return next_look


watchdog = Watchdog()
"""The process's only one."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=watchdog.start_anew)


class Place(NamedTuple):
    """Where a thread is."""

    handler: str
    """The function that the library or the event loop called, with its file and line."""
    stack: str
    """From there inwards."""


def place_of(thread_id: int) -> Place | None:
    """Return where the event loop's thread is in what the loop called; None when it is not in such code."""
    frame = sys._current_frames().get(thread_id)
    frames: list[FrameType] = []
    while frame is not None and not _is_of(frame, LOOPS):  # what is further out runs the loop
        frames.append(frame)
        frame = frame.f_back
    if not frames:
        return None
    frames.reverse()
    ours = [number for number, frame in enumerate(frames) if _is_of(frame, PACKAGE)]
    inside = [number for number in range(ours[0], len(frames)) if number not in ours] if ours else [0]
    first = inside[0] if inside else len(frames) - 1
    inner = [_told(frame) for frame in frames[first:]]
    if len(inner) > DEEPEST:
        inner[DEEPEST - 2 : -1] = ["…"]
    return Place(inner[0], " → ".join(inner))


def is_ours(code: CodeType) -> bool:
    """Whether this is code of the library."""
    return code.co_filename.startswith(PACKAGE)


def _is_of(frame: FrameType, where: str | tuple[str, ...]) -> bool:
    return frame.f_code.co_filename.startswith(where)


def _told(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})"
