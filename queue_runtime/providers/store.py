"""The files behind the in-memory provider: opened and read, written and synced, compacted.

The engines write to the journal's file themselves, before they change anything; here is who opens it, and one thread
for what may take long: syncing to the disk, and the files of a snapshot. docs/persistence.md tells the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import struct
import weakref
from collections.abc import Callable
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from queue_runtime._core.engine import Engine
from queue_runtime._core.journal import Gone, Journal, failed, refusal_of
from queue_runtime._core.recovery import Recovery, Snapshot, checksum, has_record
from queue_runtime.bodies import Spill
from queue_runtime.clock import Clock, Timer
from queue_runtime.errors import ConfigurationError, ProviderError
from queue_runtime.message import Message
from queue_runtime.providers.disk import (
    NAME,
    DirectoryLock,
    Disk,
    append,
    close_all,
    put_in_place,
    sync_directory,
    sync_files,
    write_new,
)

logger = logging.getLogger("queue_runtime")

VERSION = 1
MAGIC = b"QRJOURNL"
HEADER = struct.Struct("<8sIIqI")
"""Magic, version, kind, segment, four zero bytes; a checksum of these follows."""
HEADER_SIZE = HEADER.size + 4
LOG, SNAPSHOT = 1, 2
SEGMENT_SIZE = 64 << 20
"""Bytes after which the log goes on in another file."""
LEAST_GARBAGE = 16 << 20
"""Bytes of what is over that are never worth a compaction."""
PIECE = 256 << 10
"""Bytes of a snapshot that are made at once, in about half a millisecond."""
REPAIR_PAUSE = 1.0
"""Seconds between attempts to repair a journal that could not be synced."""


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def header(kind: int, segment: int) -> bytes:
    start = HEADER.pack(MAGIC, VERSION, kind, segment, 0)
    return start + struct.pack("<I", checksum(start))


class Store:
    """The journal of one broker's queues, in a directory that it has for itself.

    Parameters
    ----------
    directory:
        Made when it is not there.
    fsync:
        ``always``: a change is acknowledged when it is on the disk; ``interval``: it is so after ``fsync_interval``
        seconds; ``never``: when the system thinks fit.
    make:
        Called with each name that the journal has: returns the queue's engine, without any message.
    spill:
        Where large bodies go that are read.

    Raises ConfigurationError, which names ``path``, when the directory cannot be used.

    Thread-safety: as for the provider.
    """

    def __init__(
        self,
        directory: str,
        fsync: str,
        fsync_interval: float,
        clock: Clock,
        make: Callable[[str], Engine],
        spill: Spill | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.waits = fsync == "always"
        """Whether changes have to be waited for, with ``kept``."""
        self.users = 0
        """Providers that are open."""
        self._fsync = fsync
        self._interval = fsync_interval
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: Timer | None = None
        self._repair: Timer | None = None
        self._snapshot: Snapshot | None = None
        self._old: list[int] = []
        """Files that are full and were not synced yet."""
        self._forget_loop()
        self._synced = 0
        self._compact_above = 0
        with _told("be used", directory):
            made = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self._unsynced = [self.directory, *(path.parent for path in made)]
            """Directories that may have a name the disk does not know yet."""
            self.directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)
            self._lock = DirectoryLock(self.directory)
        self._disk = Disk()
        try:
            with _told("be used", directory):
                self._recover(make, spill)
        except BaseException:
            self._lock.release()
            raise
        self._finalizer = weakref.finalize(self, self._disk.end)
        _stores.add(self)

    # Opening.

    def _recover(self, make: Callable[[str], Engine], spill: Spill | None) -> None:
        logs, snapshots = self._listed()
        now, wall = self._clock.monotonic(), self._clock.time()
        recovery = Recovery(make, now, wall)
        if spill is not None:
            recovery = Recovery(make, now, wall, spill.threshold, partial(_moved, spill))
        base = max(snapshots, default=0)
        total = 0
        replaced = [snapshots[segment] for segment in sorted(snapshots.keys() - {base})]
        replaced += [logs.pop(segment) for segment in sorted(logs) if segment <= base]
        if snapshots:
            total += self._read(snapshots[base], SNAPSHOT, base, recovery)
        if replaced:  # a compaction was cut short after its snapshot was whole
            sync_directory(self.directory)
            for path in replaced:
                path.unlink()
        if not logs and not snapshots:
            logs[1] = self._create(1)
        for expected in range(base + 1, max(logs, default=base + 1) + 1):
            if expected not in logs:
                raise _damaged(self._log(expected), 0, "the file is missing")
        newest = max(logs)
        for segment in sorted(logs):
            total += self._read(logs[segment], LOG, segment, recovery, newest=segment == newest)
        self._file = _open(logs[newest])
        self.journal = journal = Journal(
            self._file,
            newest,
            logs[newest].stat().st_size,
            next_file=self._next_file,
            segment_size=SEGMENT_SIZE,
            total_bytes=total,
        )
        self._engines = recovery.queues
        for number, engine in recovery.queues.items():
            engine.attach(journal, number)
        recovery.finish()

    def _listed(self) -> tuple[dict[int, Path], dict[int, Path]]:
        logs: dict[int, Path] = {}
        snapshots: dict[int, Path] = {}
        for path in sorted(self.directory.iterdir()):
            if (found := NAME.fullmatch(path.name)) is None:
                continue  # somebody else's
            kind, number, suffix = found.groups()
            if suffix == "journal":
                (logs if kind == "log" else snapshots)[int(number)] = path
            elif kind == "snapshot":
                path.unlink()  # of a compaction that was cut short
        return logs, snapshots

    def _read(self, path: Path, kind: int, segment: int, recovery: Recovery, *, newest: bool = False) -> int:
        """Read one file; return its size. What is torn off at the end of the newest log is cut away."""
        size = path.stat().st_size
        if newest and (size < HEADER_SIZE or _is_blank(path)):
            path.write_bytes(header(kind, segment))
            return HEADER_SIZE
        with path.open("rb") as file:
            start = file.read(HEADER_SIZE)
            if (
                len(start) < HEADER_SIZE
                or start[:8] != MAGIC
                or checksum(start[:-4]) != int.from_bytes(start[-4:], "little")
            ):
                raise _damaged(path, 0, "it does not begin as a journal does")
            _, version, its_kind, its_segment, _ = HEADER.unpack(start[:-4])
            if version > VERSION:
                raise ConfigurationError(
                    "path", f"{path} has version {version} of the format, and this release reads up to {VERSION}"
                )
            if (its_kind, its_segment) != (kind, segment):
                raise _damaged(path, 0, "it is another file than its name says")
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                end = recovery.feed(content, segment, HEADER_SIZE)
                if kind == SNAPSHOT and not recovery.ended:
                    raise _damaged(path, end, "the snapshot ends too early")
                if end == size:
                    return size
                if not newest:
                    raise _damaged(path, end, "there is no right record")
                followed = has_record(content, segment, end + 1)
                if followed:
                    with path.with_suffix(f".torn-{end}").open("wb") as aside:
                        aside.write(content[end:])
                        aside.flush()
                        os.fsync(aside.fileno())
        logger.warning(
            "journal: cut off what could not be read at the end of the newest file",
            extra={"file": str(path), "offset": end, "bytes": size - end, "kept_aside": followed},
        )
        os.truncate(path, end)
        return end

    # Files.

    def _log(self, segment: int) -> Path:
        return self.directory / f"log-{segment:012}.journal"

    def _create(self, segment: int) -> Path:
        path = self._log(segment)
        path.write_bytes(header(LOG, segment))
        return path

    def _next_file(self) -> tuple[int, int, int]:
        """For the journal: the next file, when one is full or a snapshot begins."""
        segment = self.journal.segment + 1
        try:
            file = _open(self._create(segment))
        except OSError:
            with contextlib.suppress(OSError):
                self._log(segment).unlink()
            raise
        if self._fsync == "never":
            os.close(self._file)
        else:
            self._old.append(self._file)
        self._file = file
        return file, segment, HEADER_SIZE

    # Changes.

    def add(self, engine: Engine) -> None:
        """Keep a new queue. Raises ProviderError when that cannot be written."""
        number = max(self._engines, default=0) + 1
        self.journal.add_queue(number, engine.name)
        self._engines[number] = engine
        engine.attach(self.journal, number)

    def changed(self) -> None:
        """To be called after changes: sees to what has to be done in the background."""
        journal = self.journal
        if isinstance(journal.failure, Gone):
            return
        self._bind()
        self._arm()
        garbage = journal.total_bytes - journal.live_bytes
        if garbage > LEAST_GARBAGE and garbage > journal.live_bytes and journal.total_bytes > self._compact_above:
            self.compact()

    def _arm(self) -> None:
        """See that what was written will be synced, where that is done by the time."""
        journal = self.journal
        if (
            self._fsync == "interval"
            and self._timer is None
            and not self._syncing
            and journal.written != self._synced
            and journal.failure is None
        ):
            self._timer = self._clock.call_later(self._interval, self._sync)

    async def kept(self) -> ProviderError | None:
        """Wait until all that was written so far is on the disk; return None, or why it may not be there."""
        goal = self.journal.written
        if goal <= self._synced:
            return None
        if not isinstance(self.journal.failure, Gone):
            self._bind()
        if self.journal.failure is not None:  # that a sync succeeds now would prove nothing
            return failed(self.journal.failure)
        assert self._loop is not None
        future: asyncio.Future[ProviderError | None] = self._loop.create_future()
        self._waiters.append((goal, future))
        if not self._syncing:
            self._sync()
        return await future

    def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._forget_loop()
            self._loop = loop
            if self.journal.failure is not None:
                self.compact()

    def _forget_loop(self) -> None:
        """What was under way on another event loop will not come back."""
        self._waiters: list[tuple[int, asyncio.Future[ProviderError | None]]] = []
        self._syncing = False
        self._timer = self._repair = self._snapshot = None
        self._repairs = False

    def _submit(self, job: Callable[[], Any], done: Callable[[OSError | None], None]) -> None:
        assert self._loop is not None
        self._disk.submit(job, partial(_call_soon, self._loop, self._loop_is_mine(done)))

    def _loop_is_mine(self, done: Callable[[OSError | None], None]) -> Callable[[OSError | None], None]:
        loop = self._loop

        def call(error: OSError | None) -> None:
            if loop is self._loop:
                done(error)

        return call

    # Syncing.

    def _sync(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.journal.failure is not None:
            return
        self._syncing = True
        old, self._old = self._old, []
        if old and self.directory not in self._unsynced:
            self._unsynced.append(self.directory)
        self._submit(
            partial(self._sync_now, old, self._file, list(self._unsynced)),
            partial(self._sync_ended, self.journal.written, old),
        )

    def _sync_now(self, old: list[int], newest: int, directories: list[Path]) -> None:
        try:
            sync_files(old, newest, directories)
        except OSError as error:
            self.journal.failure = error  # at once, whatever becomes of the event loop
            raise

    def _sync_ended(self, goal: int, old: list[int], error: OSError | None) -> None:
        self._syncing = False
        if error is None:
            self._synced = goal
            self._unsynced = []
        else:
            self._old = old + self._old
            self._break(error)
        waiting = []
        for position, future in self._waiters:
            if position > goal and error is None:
                waiting.append((position, future))
            elif not future.done():
                future.set_result(None if error is None else refusal_of(error))
        self._waiters = waiting
        if waiting:
            self._sync()
        else:
            self._arm()

    def _break(self, error: OSError) -> None:
        """What was not synced may be lost, whatever a later sync says: only what is written anew can be relied on."""
        self.journal.failure = error
        logger.error("journal: syncing failed; it is written anew", extra={"reason": str(error)})
        if self._repair is None and self._snapshot is None:
            self.compact()

    # Compaction: all that is live goes into one file, which takes the place of all before it.

    def compact(self) -> None:
        """Begin, unless it is under way."""
        if self._snapshot is not None:
            return
        self._bind()
        self._repair = None
        covered = self.journal.segment
        before = self.journal.total_bytes
        try:
            if self.journal.failure is None:
                self.journal.flush()
            self.journal.turn()
        except OSError as error:
            self._compaction_failed(error)
            return
        self._snapshot = Snapshot(list(self._engines.values()))
        self._repairs = self.journal.failure is not None
        path = self.directory / f"snapshot-{covered:012}.part"
        start = header(SNAPSHOT, covered)
        self._submit(partial(write_new, path, start), partial(self._tell, path, covered, before, len(start)))

    def _tell(self, path: Path, covered: int, before: int, size: int, error: OSError | None) -> None:
        """Write the next piece of the snapshot; the event loop goes on in between."""
        if error is not None or self._snapshot is None:
            self._compaction_failed(error)
            return
        records = self._snapshot.more(PIECE, self._clock.monotonic(), self._clock.time())
        if records is None:
            job = partial(put_in_place, path, self.directory, covered)
            self._submit(job, partial(self._compacted, before, size))
            return
        piece = records.take(covered, size)
        self._submit(partial(append, path, piece), partial(self._tell, path, covered, before, size + len(piece)))

    def _compacted(self, before: int, size: int, error: OSError | None) -> None:
        if error is not None:
            self._compaction_failed(error)
            return
        self._snapshot = None
        self.journal.replaced(before, size)
        if self._repairs:  # nothing was written meanwhile: the snapshot has it all
            self.journal.failure = None
            self._synced = self.journal.written
            close_all(self._old)
            self._old = []
        elif self.journal.failure is not None:
            self.compact()

    def _compaction_failed(self, error: OSError | None) -> None:
        self._snapshot = None
        self._compact_above = self.journal.total_bytes + LEAST_GARBAGE
        logger.warning("journal: compaction failed; it goes on as it is", extra={"reason": str(error)})
        if self.journal.failure is not None:
            self._repair = self._clock.call_later(REPAIR_PAUSE, self.compact)

    # The end.

    async def leave(self) -> None:
        """A provider was closed; with the last one the store is."""
        self.users -= 1
        if not self.users:
            await self.close()

    async def close(self) -> None:
        """Write and sync what waits, end the thread, give the directory back."""
        if isinstance(self.journal.failure, Gone):  # the thread stayed with the process that forked
            self.abandon("the provider is closed")
            return
        self._bind()
        error = self.journal.flush()
        if error is None and self._fsync != "never" and self.journal.written > self._synced:
            error = await self.kept()
        if error is not None:
            logger.error("journal: closed with changes that may not be on the disk", extra={"reason": str(error)})
        for timer in (self._timer, self._repair):
            if timer is not None:
                timer.cancel()
        assert self._loop is not None
        ended: asyncio.Future[None] = self._loop.create_future()
        self._loop = None
        self._snapshot = None
        self._disk.submit(lambda: None, lambda _: _call_soon(ended.get_loop(), ended.set_result, None))
        await ended
        self._finalizer()
        while self._disk.is_alive:  # noqa: ASYNC110 - it ends within microseconds
            await asyncio.sleep(0)
        self.abandon("the provider is closed")

    def abandon(self, why: str) -> None:
        """Give the files back as they are; nothing is written any more."""
        self.journal.failure = Gone(why)
        close_all([*self._old, self._file])
        self._lock.release()

    def forked(self) -> None:
        """In the child: the parent goes on, and what both wrote would be in the same places of the same files."""
        self.journal.failure = Gone(
            "this process was forked from the one that uses the directory; open another path here, or fork before"
        )


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))


def _damaged(path: Path, offset: int, problem: str) -> ConfigurationError:
    return ConfigurationError(
        "path",
        f"the journal is damaged: {path}, at byte {offset}: {problem}; "
        "restore the directory from a copy, or move it away to begin without what was in it",
    )


def _moved(spill: Spill, message: Message) -> Message:
    try:
        return spill.move([message])[0]
    except ProviderError as error:  # of this disk, and not of the record
        raise OSError(str(error)) from error


def _is_blank(path: Path) -> bool:
    """Whether there are nothing but zeros: of a new file, a loss of power may have left no more than its length."""
    with path.open("rb") as file:
        return not file.read(HEADER_SIZE).strip(b"\0") and not file.read().strip(b"\0")


@contextlib.contextmanager
def _told(what: str, directory: str) -> Any:
    try:
        yield
    except OSError as error:
        raise ConfigurationError("path", f"{directory!r} cannot {what}: {error}") from error


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
        loop.call_soon_threadsafe(callback, *arguments)


def _forked() -> None:
    DirectoryLock.forget()
    for store in list(_stores):
        store.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
