"""Where large bodies are kept out of the process's memory: a file each, or many in a row that nobody else sees.

Either gives bodies back as read-only views of a mapped file. Mapped bytes belong to the page cache: the system may drop
them and read them again, so they do not count as the process's own memory, and a body that nobody looks at costs none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from queue_runtime._core.body import map_file
from queue_runtime.errors import ProviderError, ValidationError

_CHUNK = 1 << 20
"""Bytes of one write: the checksum of a chunk is taken while it is in the processor's cache."""
_WHOLE = ".body"
_PARTIAL = ".partial"
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)
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


def _write(fd: int, body: memoryview) -> int:
    """Write all of it; return its checksum."""
    crc = 0
    for start in range(0, len(body), _CHUNK):
        chunk = body[start : start + _CHUNK]
        crc = zlib.crc32(chunk, crc)
        while chunk:
            chunk = chunk[os.write(fd, chunk) :]
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
                crc = _write(fd, body)
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
