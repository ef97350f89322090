"""A directory that one process has for itself, and a thread for what may take long on it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
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

NAME = re.compile(r"(log|snapshot)-([0-9]{12,18})\.(journal|part)")
"""Of the files that are ours; whatever else is in the directory is let alone."""

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

    @classmethod
    def forget(cls) -> None:
        """In a child that was forked: it holds nothing, and asks the system again."""
        cls._held.clear()

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


# What it does with the journal's files.


def sync_directory(directory: Path) -> None:
    if os.name == "nt":  # it has no such thing
        return
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_files(old: list[int], newest: int, directories: Iterable[Path]) -> None:
    """The full files first: what is in the newest follows what is in them."""
    for file in old:
        os.fsync(file)
    getattr(os, "fdatasync", os.fsync)(newest)
    for directory in directories:
        with contextlib.suppress(PermissionError):  # one above ours that we may write to and not read
            sync_directory(directory)
    close_all(old)


def close_all(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)


def write_new(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def put_in_place(path: Path, directory: Path, covered: int) -> None:
    """The snapshot is whole: sync it, give it its name, and remove what it replaces."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(path, path.with_suffix(".journal"))
    sync_directory(directory)
    for other in directory.iterdir():
        found = NAME.fullmatch(other.name)
        if found is not None and found[3] == "journal" and int(found[2]) < covered + (found[1] == "log"):
            other.unlink()
