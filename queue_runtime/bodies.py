"""Where large bodies are kept out of the process's memory: a file each, or many in a row that nobody else sees.

Either gives bodies back as read-only views of a mapped file. Mapped bytes belong to the page cache: the system may drop
them and read them again, so they do not count as the process's own memory, and a body that nobody looks at costs none.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import tempfile
import threading
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from queue_runtime._core.body import Mapping, map_file
from queue_runtime.errors import ProviderError, ValidationError
from queue_runtime.message import Message

_CHUNK = 1 << 20
"""Bytes of one write: the checksum of a chunk is taken while it is in the processor's cache."""
_SEGMENT = 64 << 20
"""Bytes of one file of a spill. Its space is given back when the last message with a body in it is gone."""
_ALIGNED = 64
"""Bodies in a spill begin at multiples of this, for those who read numbers in them."""
_WHOLE = ".body"
_PARTIAL = ".partial"
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_DELETE_ON_CLOSE = getattr(os, "O_TEMPORARY", 0)  # of Windows, where an open file cannot be deleted
_CODES = {
    errno.ENOSPC: "disk-full",
    errno.EDQUOT: "disk-full",
    errno.EFBIG: "disk-full",
    errno.EROFS: "read-only",
    errno.EACCES: "read-only",
    errno.EPERM: "read-only",
    errno.ENOENT: "missing",
    errno.EMFILE: "too-many-files",
    errno.ENFILE: "too-many-files",
    errno.ENOMEM: "too-many-mappings",
}
_HINTS = {
    "disk-full": "; free some space",
    "read-only": "; give a directory that this process can write to",
    "too-many-mappings": "; raise the limit (Linux: vm.max_map_count) or keep fewer large messages",
}


def _failed(doing: str, directory: Path, error: OSError) -> ProviderError:
    code = _CODES.get(error.errno or 0, "io")
    why = error.strerror or str(error)
    transient = code in ("disk-full", "too-many-files", "too-many-mappings")
    return ProviderError("memory", code, f"cannot {doing} in {directory}: {why}{_HINTS.get(code, '')}", transient)


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _write_summed(fd: int, body: memoryview) -> int:
    """Write all of it; return its checksum."""
    crc = 0
    for start in range(0, len(body), _CHUNK):
        chunk = body[start : start + _CHUNK]
        crc = zlib.crc32(chunk, crc)
        _write(fd, chunk)
    return crc


class StoredBody(NamedTuple):
    """What tells where a body is, and whether it is whole."""

    name: str
    """Of its file, in the store's directory."""
    size: int
    """In bytes."""
    crc: int
    """CRC-32, as ``zlib.crc32`` computes it."""


class BodyStore:
    """Bodies in files of a directory, a file each, for as long as nobody deletes them.

    A file is written under another name and renamed when it is whole: a crash leaves either no body or all of it, and
    perhaps a partial file, which ``sweep`` removes. After a crash of the system (and not just of the process) only
    what was stored with ``sync`` is sure to be there.

    Parameters
    ----------
    directory:
        Made, for this user alone, when it is not there. One store at a time should use it.

    Raises
    ------
    ProviderError
        From every method, when the system refuses: its ``code`` is ``disk-full``, ``read-only``, ``missing``,
        ``damaged``, ``too-many-files``, ``too-many-mappings`` or ``io``; the original is its ``__cause__``.

    Thread-safety: any thread may use it; every call waits for the disk, so none belongs on an event loop.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _failed("keep bodies", self.directory, error) from error

    def store(self, body: bytes | bytearray | memoryview, *, sync: bool = False) -> StoredBody:
        """Write a body. With ``sync``, return when the disk has it, and its name."""
        return self.store_many([body], sync=sync)[0]

    def store_many(self, bodies: Sequence[bytes | bytearray | memoryview], *, sync: bool = False) -> list[StoredBody]:
        """Write bodies, all or none; with ``sync``, the directory is synchronized once for all of them."""
        done: list[StoredBody] = []
        try:
            for body in bodies:
                done.append(self._store(memoryview(body).cast("B"), sync))
            if sync and done:
                self._sync_directory()
        except BaseException as error:
            for stored in done:
                with contextlib.suppress(OSError):
                    os.unlink(self.directory / stored.name)
            if isinstance(error, OSError):
                raise _failed("store a body", self.directory, error) from error
            raise
        return done

    def _store(self, body: memoryview, sync: bool) -> StoredBody:
        name = secrets.token_hex(16)
        partial = self.directory / (name + _PARTIAL)
        fd = os.open(partial, _CREATE, 0o600)
        try:
            try:
                crc = _write_summed(fd, body)
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(partial, self.directory / (name + _WHOLE))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        return StoredBody(name + _WHOLE, len(body), crc)

    def _sync_directory(self) -> None:
        if os.name == "nt":  # there a directory cannot be opened, and the rename is as durable as it gets
            return
        fd = os.open(self.directory, _READ)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def open(self, stored: StoredBody, *, check: bool = False) -> memoryview:
        """Return a read-only view of the mapped body, which stays readable when it is deleted meanwhile.

        No descriptor is kept, and nothing is read yet but with ``check``, which compares the checksum. Raises
        ProviderError with code ``missing`` or ``damaged`` when there is no such body, or it is not as it was stored.
        """
        path = self._path(stored.name)
        try:
            fd = os.open(path, _READ)
            try:
                size = os.fstat(fd).st_size
                view = map_file(fd, size) if size == stored.size else None
            finally:
                os.close(fd)
        except OSError as error:
            raise _failed(f"open the body {stored.name}", self.directory, error) from error
        if view is None:
            problem = f"the body {stored.name} has {size} bytes; {stored.size} were stored"
            raise ProviderError("memory", "damaged", problem)
        if check and zlib.crc32(view) != stored.crc:
            raise ProviderError("memory", "damaged", f"the body {stored.name} has another checksum than was stored")
        return view

    def delete(self, name: str) -> None:
        """Remove a body; do nothing when it is gone. Views of it stay readable, and hold its space until they go."""
        try:
            os.unlink(self._path(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _failed(f"delete the body {name}", self.directory, error) from error

    def names(self) -> Iterator[str]:
        """The names of all whole bodies, in no order."""
        return (name for name in self._listed() if name.endswith(_WHOLE))

    def sweep(self, keep: Collection[str]) -> int:
        """Remove every body that is not named in ``keep``, and partial files; return how many files were removed.

        For the start, before anything is stored: a body that is being written would be taken for a partial one.
        """
        kept = frozenset(keep)
        removed = 0
        for name in self._listed():
            if name.endswith(_PARTIAL) or (name.endswith(_WHOLE) and name not in kept):
                self.delete(name)
                removed += 1
        return removed

    def _listed(self) -> list[str]:
        try:
            return os.listdir(self.directory)
        except OSError as error:
            raise _failed("list the bodies", self.directory, error) from error

    def _path(self, name: str) -> Path:
        if not name.endswith((_WHOLE, _PARTIAL)) or os.path.basename(name) != name:
            raise ValidationError("name", f"is not of a stored body: {name!r}")
        return self.directory / name


class _Segment:
    """A file without a name, mapped as a whole; it is gone when neither this nor any view of its bodies is left."""

    __slots__ = ("_at", "_fd", "_size", "_view")

    def __init__(self, directory: Path, size: int) -> None:
        self._fd = -1
        path = directory / (secrets.token_hex(16) + ".queue-runtime")
        self._fd = os.open(path, _CREATE | _DELETE_ON_CLOSE, 0o600)
        if not _DELETE_ON_CLOSE:
            os.unlink(path)
        os.truncate(self._fd, size)  # of holes: what is not written takes no space
        self._view = map_file(self._fd, size)
        self._size = size
        self._at = 0

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def has_room(self, size: int) -> bool:
        return self._at + size <= self._size

    def write(self, body: memoryview) -> memoryview:
        start = self._at
        os.lseek(self._fd, start, os.SEEK_SET)
        _write(self._fd, body)
        end = start + len(body)
        self._at = -(-end // _ALIGNED) * _ALIGNED
        return self._view[start:end]


class Spill:
    """Moves large bodies out of memory: one after another into files that have no name and end with the process.

    A message whose body is in a mapped file already, from ``Message.from_file`` or from here, stays as it is.

    Parameters
    ----------
    threshold:
        Bytes from which a body is moved.
    directory:
        Made when it is not there. It must be on a disk: where ``/tmp`` is in memory, nothing would be gained by it.
        None: ``TMPDIR`` if that is set, else ``/var/tmp``, which is on a disk by custom, else the system's choice.

    Thread-safety: ``moved`` for one event loop's thread at a time; ``move`` for any thread.
    """

    def __init__(
        self, threshold: int, directory: str | os.PathLike[str] | None = None, *, segment_size: int = _SEGMENT
    ) -> None:
        self.threshold = threshold
        self._directory = None if directory is None else Path(directory)
        self._segment_size = segment_size
        self._segment: _Segment | None = None
        self._writing = threading.Lock()
        self._turn = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def takes(self, message: Message) -> bool:
        """Whether the message's body is to be moved."""
        if message.size < self.threshold:
            return False
        view = message.body_view
        return len(view) >= self.threshold and not isinstance(view.obj, Mapping)

    def concerns(self, messages: Sequence[Message]) -> bool:
        """Whether these have to go through ``moved``: for their bodies, or so that they overtake none."""
        return self._turn.locked() or any(map(self.takes, messages))

    async def moved(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages with their large bodies as views of a file; calls return in their order.

        The disk is waited for in a thread of the event loop's own executor. Raises ProviderError as ``BodyStore`` does;
        then none of the messages was moved.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._turn = loop, asyncio.Lock()
        async with self._turn:
            if any(map(self.takes, messages)):
                return await loop.run_in_executor(None, self.move, messages)
            return messages

    def move(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The same, and wait for the disk."""
        with self._writing:
            try:
                return [self._move(message) if self.takes(message) else message for message in messages]
            except OSError as error:
                raise _failed("move a large body to a file", self._place(), error) from error

    def _move(self, message: Message) -> Message:
        body = message.body_view
        segment = self._segment
        if segment is None or not segment.has_room(len(body)):
            directory = self._place()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._segment = segment = _Segment(directory, max(self._segment_size, len(body)))
        return message.replace(body=segment.write(body))

    def _place(self) -> Path:
        if self._directory is not None:
            return self._directory
        custom = Path("/var/tmp")
        if "TMPDIR" not in os.environ and custom.is_dir():
            return custom
        return Path(tempfile.gettempdir())

    def close(self) -> None:
        """Begin no further body in the present file, so that it ends with the messages that have theirs in it."""
        self._segment = None
