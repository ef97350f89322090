"""A directory that one process has for itself, and a thread for what may take long on it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar

from queue_runtime.errors import ConfigurationError

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: int) -> None:
        # Of the process, and not of the open file: a forked child does not hold it when its parent is gone.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)


_LOCK_AT = 1 << 20
"""Where in the file the lock is: beyond the text, which can so be read where locked bytes cannot."""

Job = tuple[Callable[[], object], Callable[[OSError | None], object]]


class DirectoryLock:
    """The sole use of a directory, until ``release`` or the end of the process.

    Raises ConfigurationError, which names ``path`` and the process that has it, when it is in use.

    Thread-safety: any thread may use it.
    """

    _held: ClassVar[set[tuple[int, int]]] = set()

    def __init__(self, directory: Path) -> None:
        found = os.stat(directory)
        self._place = found.st_dev, found.st_ino
        if self._place in self._held:
            raise ConfigurationError("path", f"{directory} is in use by this process, {os.getpid()}")
        path = directory / "lock"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.lseek(self._file, _LOCK_AT, os.SEEK_SET)
            _lock(self._file)
        except OSError:
            os.close(self._file)
            process = path.read_text().strip() or "another"
            raise ConfigurationError("path", f"{directory} is in use by process {process}") from None
        except BaseException:
            os.close(self._file)
            raise
        self._held.add(self._place)
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, b"%d\n" % os.getpid())

    def release(self) -> None:
        """Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._held.discard(self._place)


class Disk:
    """A thread that does one job after another; it begins with the first one.

    Thread-safety: any thread may use it.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object], done: Callable[[OSError | None], object]) -> None:
        """Run ``job`` in the thread, and then there ``done`` with its OSError, if it had one."""
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="queue-runtime journal", daemon=True)
            self._thread.start()
        self._jobs.put((job, done))

    def end(self) -> None:
        """Let the thread end after the jobs that it has."""
        if self._thread is not None:
            self._jobs.put(None)

    @property
    def is_alive(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None and self._thread.is_alive()


def _work(jobs: SimpleQueue[Job | None]) -> None:
    while (given := jobs.get()) is not None:
        job, done = given
        error = None
        try:
            job()
        except OSError as raised:
            error = raised
        done(error)
        del given, job, done  # or else they would live until the next job
